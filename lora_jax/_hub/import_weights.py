"""`import_weights`: a checkpoint of PyTorch to a tree, one tensor at a time."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax._adapters import Axes, is_adapter
from lora_jax._engine.quantized import Quantized, quantize_array
from lora_jax._flax_names import is_floating
from lora_jax._hub.checkpoint import BlockFormat, check_dtype, check_floating
from lora_jax._hub.fill_leaf import Filling, as_filling, fill_leaf
from lora_jax._hub.leaf_layout import block_leaf
from lora_jax._hub.model_tensors import ModelTensors, open_model
from lora_jax._hub.module_plan import axes_by_path
from lora_jax._hub.names import (
    ModuleNames,
    Names,
    check_names,
    name_finder,
    required_names,
)
from lora_jax._hub.progress import progress
from lora_jax._hub.tensor_sources import Source, find_sources
from lora_jax._processes import agreed, outline
from lora_jax._quantize import quantize
from lora_jax._tree import (
    Path,
    PyTree,
    flatten,
    is_abstract,
    is_array,
    is_traced,
    listed,
    path_name,
    quantized_leaves,
    rebox,
    unbox,
    unflatten,
)


def import_weights(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    like: PyTree,
    names: Names,
    *,
    how: str | Mapping[str, str] | None = None,
    axes: Mapping[str, Axes] | None = None,
    kinds: Mapping[str, str] | None = None,
    dtype: DTypeLike | None = None,
    ignore: str | Iterable[str] = (),
) -> PyTree:
    """Reads a Hugging Face checkpoint into a tree, quantized on the way if wanted.

    One tensor is read at a time, then cast, transposed, quantized and put on its
    devices, and dropped. A stack is filled layer by layer. So the host needs memory for
    a few of the largest tensors, not for the checkpoint. A process reads only what its
    own devices hold.

    Args:
      checkpoint: A `.safetensors` file; a folder of them, with their index if it has
        one; a `.gguf` file, with the package gguf installed; or `{name: array}`.
      like: The tree to return, with other values or none: parameters, an `nnx.State` or
        a live module, from `jax.eval_shape(model.init, ...)` or `nnx.eval_shape(...)`,
        or with `ShapeDtypeStruct`s that have shardings. It has no adapters.
      names: The modules of the PyTorch model that the leaves are, as in `export_peft`,
        for every leaf. A module's tensor `weight` becomes `kernel`, `embedding` and
        `scale`, its `bias` becomes `bias`. A name can also be that of a tensor.
      how: Formats to quantize weights in, as in `quantize`. Tensors that the checkpoint
        has in 4 bits of bitsandbytes, or in a GGUF's Q8_0 or Q4_0, are kept as they
        are, whatever `how` says.
      axes: `{path: Axes(batch, inputs, outputs)}`, as from `find_axes`, for weights
        whose dimensions neither names nor the shapes of tensors determine.
      kinds: `{pattern: kind}`, as in `export_peft`, and "conv1d" for matrices that
        PyTorch stores as (inputs, outputs).
      dtype: Of all floating leaves. Default: that of each leaf of `like`.
      ignore: Names of tensors that no leaf takes, in which `*` is any text.

    Returns:
      A tree with the containers, boxes and shardings of `like`. A leaf that the map
      leaves out is kept, if it has values and is not floating, like a random key.

    Raises:
      FileNotFoundError: If there is no checkpoint, or one of its files is missing.
      ValueError: If a leaf has no name, or no tensor of its shape; if a tensor is used
        by no leaf and not ignored; if a tensor is quantized in a format that is not
        supported, or too large for the dtype; if a file is truncated; or as `quantize`.
      RuntimeError: If another process failed, whose error it quotes.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj, numpy as np
      >>> one = lambda i: np.full((3, 4), float(i))
      >>> torch = {f"layers.{i}.q_proj.weight": one(i) for i in range(2)}
      >>> like = {"query": {"kernel": jax.ShapeDtypeStruct((2, 4, 3), jnp.float32)}}
      >>> names = {"query": "layers.{layer}.q_proj"}
      >>> params = lj.import_weights(torch, like, names)
      >>> params["query"]["kernel"].shape, float(params["query"]["kernel"][1, 0, 0])
      ((2, 4, 3), 1.0)
    """
    with agreed("import_weights") as same:
        leaves = flatten(like)
        _check_like(leaves)
        tensors = open_model(checkpoint)
        given = axes_by_path(axes, leaves)
        sources = find_sources(leaves, _names_of(leaves, names), given, kinds, tensors)
        _check_used(sources, tensors, ignore)
        fillings = {path: as_filling(source) for path, source in sources.items()}
        targets = _targets(like, leaves, fillings, how, dtype)
        same["leaves"] = {path_name(p): outline(unbox(leaves[p])) for p in sources}
        same["tensors"] = [[tensor.name, tensor.shape] for tensor in tensors.each]
    new = {}
    reads = sum(len(filling.leaf.modules) for filling in fillings.values())
    with agreed("import_weights"), progress("import_weights", reads, "tensors") as tick:
        for path, filling in fillings.items():
            new[path] = rebox(leaves[path], fill_leaf(filling, targets[path], tick))
    return unflatten(like, leaves | new)


def _check_like(leaves: Mapping[Path, Any]) -> None:
    if adapted := [path for path in leaves if is_adapter(path)]:
        raise ValueError(
            f"like has adapters: {listed(adapted)}. Import the base first, and call "
            "lorafy(params, rank) on the result."
        )
    if stored := [*quantized_leaves(dict(leaves))]:
        raise ValueError(
            f"like is quantized: {listed(stored)}. Pass the plain tree, and how= in "
            "place of quantize(params, how)."
        )
    if traced := [path for path, leaf in leaves.items() if is_traced(unbox(leaf))]:
        raise ValueError(
            f"like is traced: {listed(traced)}. Call import_weights outside of jit."
        )


def _names_of(leaves: dict[Path, Any], names: Names) -> dict[Path, ModuleNames]:
    """Returns the names of each leaf; a leaf without one must keep its value."""
    check_names(names, leaves)
    needed = [
        p for p, x in leaves.items() if is_abstract(unbox(x)) or is_floating(p, x)
    ]
    named, find = required_names(names, needed), name_finder(names)
    arrays = [p for p, x in leaves.items() if is_array(unbox(x))]
    return {p: found for p in arrays if (found := named.get(p) or find(p))}


def _check_used(
    sources: Mapping[Path, Source], tensors: ModelTensors, ignore: str | Iterable[str]
) -> None:
    used = {t.name for source in sources.values() for t in source.tensors.values()}
    unused = tensors.unused(used, (ignore,) if isinstance(ignore, str) else ignore)
    if unused:
        raise ValueError(
            f"No leaf takes {len(unused)} tensors of the checkpoint: {listed(unused)}. "
            f"Add names for them, or write ignore=[{unused[0]!r}]."
        )


def _targets(
    like: PyTree,
    leaves: dict[Path, Any],
    fillings: Mapping[Path, Filling],
    how: str | Mapping[str, str] | None,
    dtype: DTypeLike | None,
) -> dict[Path, Any]:
    """Returns what each leaf becomes, abstract, with shardings.

    The tensors have shown the inputs and outputs of every weight, stacked or not.
    """
    check_floating(dtype)
    plain = {path: _abstract(leaves[path], dtype) for path in fillings}
    targets: dict[Path, Any] = dict(plain)
    if how is not None:
        boxed = {path: rebox(leaves[path], x) for path, x in plain.items()}
        tree = unflatten(like, leaves | boxed)
        axes = {
            path_name(path): filling.leaf.axes
            for path, filling in fillings.items()
            if filling.leaf.axes.inputs
        }
        found = flatten(quantize(tree, how, axes=axes))
        targets = {path: unbox(found[path]) for path in fillings}
    for path, filling in fillings.items():
        if filling.form is not None:
            targets[path] = _kept_blocks(filling, filling.form, plain[path])
        _check_castable(filling, targets[path])
    return targets


def _abstract(leaf: Any, dtype: DTypeLike | None) -> jax.ShapeDtypeStruct:
    w = unbox(leaf)
    if dtype is None or not jnp.issubdtype(w.dtype, jnp.floating):
        dtype = w.dtype
    placed = is_abstract(w) or getattr(w, "committed", False)
    sharding = getattr(w, "sharding", None) if placed else None
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(w.shape, dtype, sharding=sharding)


def _kept_blocks(
    filling: Filling, form: BlockFormat, plain: jax.ShapeDtypeStruct
) -> Quantized:
    """Returns the abstract `Quantized` of a leaf whose tensors are kept as they are."""
    scales = block_leaf(filling.leaf, form.size)
    assert scales is not None
    placed = quantize_array(plain, form.name, scales.shape)
    scale = placed.scale.update(dtype=form.scale_dtype)
    dtypes = dict.fromkeys((*form.dtypes, str(plain.dtype)))
    return Quantized(placed.values, scale, tuple(dtypes), form.name)


def _check_castable(filling: Filling, target: Any) -> None:
    """Checks that floats stay floats, and that other numbers keep their values."""
    for tensor in filling.tensors.values():
        check_dtype(tensor)
        old, new = jnp.dtype(tensor.dtype), jnp.dtype(target.dtype)
        floats = [jnp.issubdtype(dtype, jnp.floating) for dtype in (old, new)]
        if floats[0] != floats[1] or not (floats[0] or jnp.can_cast(old, new)):
            raise ValueError(
                f"{path_name(filling.leaf.path)!r} is {new}, and the tensor "
                f"{tensor.name!r} is {old}: one is not cast to the other."
            )
