"""`import_weights`: a checkpoint of PyTorch to a tree, one tensor at a time."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax._adapters import Axes, Shape, is_adapter
from lora_jax._engine.quantized import Quantized, quantize_array
from lora_jax._flax_names import axes_by_name, is_adaptable, is_floating, own_names
from lora_jax._hub.checkpoint import BlockFormat, CheckpointTensor
from lora_jax._hub.fill_leaf import Source, fill_leaf
from lora_jax._hub.leaf_layout import block_leaf
from lora_jax._hub.model_tensors import ModelTensors, open_model
from lora_jax._hub.module_kinds import CONV1D, EXPERTS, HEAD, LINEAR, Linear
from lora_jax._hub.module_plan import axes_by_path, module_kinds
from lora_jax._hub.modules import MappedLeaf, map_vector, map_weight, tensor_shapes
from lora_jax._hub.names import (
    ModuleNames,
    Names,
    check_names,
    each_index,
    module_names,
    similar_names,
)
from lora_jax._hub.progress import progress
from lora_jax._hub.tensor_keys import TORCH_LEAVES
from lora_jax._processes import agreed, outline
from lora_jax._quantize import quantize
from lora_jax._tree import (
    Path,
    PyTree,
    flatten,
    is_abstract,
    is_array,
    is_traced,
    leaf_name,
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
      >>> torch = {f"layers.{i}.q_proj.weight": np.full((3, 4), i) for i in range(2)}
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
        sources = _sources(leaves, names, axes, kinds, tensors)
        _check_used(sources, tensors, ignore)
        targets = _targets(like, leaves, sources, how, axes, dtype)
        same["leaves"] = {path_name(p): outline(unbox(leaves[p])) for p in sources}
        same["tensors"] = [[tensor.name, tensor.shape] for tensor in tensors.each]
    new = {}
    reads = sum(len(source.leaf.modules) for source in sources.values())
    with agreed("import_weights"), progress("import_weights", reads, "tensors") as tick:
        for path, source in sources.items():
            new[path] = rebox(leaves[path], fill_leaf(source, targets[path], tick))
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


def _sources(
    leaves: dict[Path, Any],
    names: Names,
    axes: Mapping[str, Axes] | None,
    kinds: Mapping[str, str] | None,
    tensors: ModelTensors,
) -> dict[Path, Source]:
    """Returns the source of each leaf that has a name."""
    check_names(names, leaves)
    named = {path: module_names(names, path) for path in leaves}
    for path, found in named.items():
        w = unbox(leaves[path])
        if found is None and (is_abstract(w) or is_floating(path, leaves[path])):
            patterns = similar_names(path_name(path), () if callable(names) else names)
            raise ValueError(
                f"names has no name for {path_name(path)!r}. Its patterns that come "
                f"close: {patterns}. Write names={{{path_name(path)!r}: "
                "'module.of.torch'}."
            )
    chosen = {path: found for path, found in named.items() if found is not None}
    kind_of, given = module_kinds(kinds, chosen), axes_by_path(axes, leaves)
    sources = {
        path: _source(path, leaves, found, kind_of[path], given.get(path), tensors)
        for path, found in chosen.items()
    }
    sources = _with_conv1d(sources)
    for source in sources.values():
        _check_shapes(source)
    return {path: _with_blocks(_untied(source)) for path, source in sources.items()}


def _source(
    path: Path,
    leaves: dict[Path, Any],
    named: ModuleNames,
    kind: Linear,
    axes: Axes | None,
    tensors: ModelTensors,
) -> Source:
    """Returns the tensors of a leaf, whose shapes fit it."""
    shape = unbox(leaves[path]).shape
    if own_names(path)[1].startswith("convtranspose"):
        raise ValueError(
            f"{path_name(path)!r} is of a transposed convolution, whose windows "
            "PyTorch flips: it cannot be imported. Convert it by hand."
        )
    found = _tensors_of(path, named, shape, tensors)
    is_vector = len(shape) - named.stacked < 2 or not is_adaptable(path, leaves[path])
    if axes is None and not is_vector and kind is not EXPERTS:
        axes = _axes(path, leaves, named.stacked, [*found.values()])
        first = next(iter(found.values())).shape
        is_vector = axes is None and first == shape[named.stacked :]
    if is_vector:
        leaf = map_vector(path, shape, named)
    else:
        named = _with_sizes(named, kind, found)
        leaf = map_weight(path, leaves, named, axes, kind)
    return Source(leaf, named.stacked, found)


def _axes(
    path: Path,
    leaves: Mapping[Path, Any],
    stacked: int,
    tensors: Sequence[CheckpointTensor],
) -> Axes | None:
    """Returns the axes by Flax's names for one layer, or by the shapes of matrices.

    Inputs come first, as in all layers of Flax: the dimensions of a kernel (d, heads,
    size) whose tensor is (heads * size, d) can be divided in one way only.
    """
    one = {
        other: jax.ShapeDtypeStruct(unbox(x).shape[stacked:], jnp.float32)
        for other, x in leaves.items()
        if is_array(unbox(x))
    }
    axes = axes_by_name(path, one)
    if axes is None and all(len(tensor.shape) == 2 for tensor in tensors):
        shape, n_in = one[path].shape, tensors[0].shape[1]
        dims = tuple(range(len(shape)))
        cuts = [i for i in dims[1:] if math.prod(shape[:i]) == n_in]
        if len(cuts) == 1:
            axes = Axes((), dims[: cuts[0]], dims[cuts[0] :])
    if axes is None:
        return None
    _, inputs, outputs = (tuple(d + stacked for d in dims) for dims in axes)
    return Axes(tuple(range(stacked)), inputs, outputs)


def _with_sizes(
    named: ModuleNames, kind: Linear, tensors: Mapping[str, CheckpointTensor]
) -> ModuleNames:
    """Returns the names with the outputs of each part of a fused weight."""
    parts = len(named.templates)
    if parts < 2 or named.sizes is not None or kind is not LINEAR:
        return named
    first = [*tensors.values()][:parts]
    return named._replace(sizes=tuple(tensor.shape[0] for tensor in first))


def _tensors_of(
    path: Path, named: ModuleNames, shape: Shape, tensors: ModelTensors
) -> dict[str, CheckpointTensor]:
    """Returns the tensors of the modules of a leaf, by the names of the modules."""
    found: dict[str, CheckpointTensor] = {}
    for _, modules in each_index(path, named, shape[: named.stacked]):
        for module in modules:
            tensor = _tensor_of(path, module, tensors)
            if tensor is not None:
                found[module] = tensor
                continue
            # A tied table has two names, and checkpoints store one of them.
            tied = leaf_name(path) == "embedding" and len(modules) == 2
            if not (tied and any(_tensor_of(path, m, tensors) for m in modules)):
                wanted = _candidates(path, module)[0]
                raise ValueError(
                    f"The checkpoint has no tensor {wanted!r} for {path_name(path)!r}, "
                    f"of shape {shape}. Close: {similar_names(wanted, tensors.names)}. "
                    f"{tensors.advice(wanted)}Correct names, or pass the checkpoint of "
                    "this model."
                )
    return found


def _candidates(path: Path, module: str) -> list[str]:
    """Returns the names of tensors that a leaf of a module can have, in order."""
    leaf = leaf_name(path)
    others = [TORCH_LEAVES.get(leaf, leaf), *["weight"] * (leaf != "bias")]
    return list(dict.fromkeys([f"{module}.{name}" for name in others] + [module]))


def _tensor_of(
    path: Path, module: str, tensors: ModelTensors
) -> CheckpointTensor | None:
    found = map(tensors.find, _candidates(path, module))
    return next((tensor for tensor in found if tensor is not None), None)


def _with_conv1d(sources: dict[Path, Source]) -> dict[Path, Source]:
    """Returns the sources with the layout of GPT-2's modules, where shapes show it.

    These store (inputs, outputs). The shape of a square matrix shows nothing, so it has
    the layout of the others in its checkpoint.
    """
    named = {
        path: source
        for path, source in sources.items()
        if source.leaf.has_conv1d_name
        and all(part.kind is LINEAR for part in source.leaf.modules.values())
    }
    fits = {path: _fitting_kinds(source) for path, source in named.items()}
    sure = {kinds[0] for kinds in fits.values() if len(kinds) == 1}
    new = dict(sources)
    for path, source in named.items():
        possible = [kind for kind in fits[path] if kind in sure] or fits[path]
        if len(possible) > 1:
            raise ValueError(
                f"{path_name(path)!r} is square, and layers like GPT-2's store it "
                f"either way. Write kinds={{{path_name(path)!r}: ...}}, 'conv1d' for "
                "(inputs, outputs) in PyTorch or 'linear' for (outputs, inputs)."
            )
        if possible:
            new[path] = source._replace(leaf=_of_kind(source.leaf, possible[0]))
    return new


def _of_kind(leaf: MappedLeaf, kind: Linear) -> MappedLeaf:
    modules = {name: p._replace(kind=kind) for name, p in leaf.modules.items()}
    return leaf._replace(modules=modules)


def _fitting_kinds(source: Source) -> list[Linear]:
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    fits = lambda kind: tensor_shapes(_of_kind(source.leaf, kind)) == shapes
    return [kind for kind in (LINEAR, CONV1D) if fits(kind)]


def _untied(source: Source) -> Source:
    """Returns the source with one module of a tied table, which the other must equal.

    Of the table and its head, checkpoints store the table, or both, or (rarely) the
    head.
    """
    leaf, heads = source.leaf, []
    for name, part in leaf.modules.items():
        if part.kind is HEAD:
            heads.append(name)
    if not heads:
        return source
    tables = [name for name in leaf.modules if name not in heads]
    pairs = [*zip(tables, heads, strict=True)]
    read = {table if table in source.tensors else head for table, head in pairs}
    both = tuple(
        (source.tensors[table], source.tensors[head])
        for table, head in pairs
        if table in source.tensors and head in source.tensors
    )
    modules = {name: part for name, part in leaf.modules.items() if name in read}
    return source._replace(leaf=leaf._replace(modules=modules), equal=both)


def _with_blocks(source: Source) -> Source:
    """Returns the source with the format of the blocks that all tensors have, if any.

    Otherwise blocks are dequantized.
    """
    formats = {source.tensors[name].format for name in source.leaf.modules}
    form = formats.pop() if len(formats) == 1 else None
    if form is None or block_leaf(source.leaf, form.size) is None:
        return source
    return source._replace(form=form)


def _check_shapes(source: Source) -> None:
    """Checks that each tensor has the shape that the leaf needs."""
    leaf, wanted = source.leaf, tensor_shapes(source.leaf)
    for module, tensor in source.tensors.items():
        part, found = leaf.modules[module], tensor.shape
        vector = not leaf.axes.inputs and math.prod(found) == math.prod(wanted[module])
        if found == wanted[module]:
            continue
        if vector and found == leaf.shape[source.stacked :]:
            continue
        hint = ""
        if found == wanted[module][::-1] and part.kind is LINEAR:
            hint = (
                " It is the transpose: if PyTorch stores (inputs, outputs), write "
                f"kinds={{{path_name(leaf.path)!r}: 'conv1d'}}, or 'embedding' for a "
                "table."
            )
        raise ValueError(
            f"{path_name(leaf.path)!r}, of shape {leaf.shape}, needs the tensor "
            f"{tensor.name!r} of shape {wanted[module]}, and the checkpoint has "
            f"{found}.{hint} Is it the checkpoint of another model?"
        )


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
    sources: Mapping[Path, Source],
    how: str | Mapping[str, str] | None,
    axes: Mapping[str, Axes] | None,
    dtype: DTypeLike | None,
) -> dict[Path, Any]:
    """Returns what each leaf becomes, abstract, with shardings."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be floating, found {jnp.dtype(dtype).name}.")
    plain = {path: _abstract(leaves[path], dtype) for path in sources}
    targets: dict[Path, Any] = dict(plain)
    if how is not None:
        boxed = {path: rebox(leaves[path], x) for path, x in plain.items()}
        tree = unflatten(like, leaves | boxed)
        found = flatten(quantize(tree, how, axes=axes))
        targets = {path: unbox(found[path]) for path in sources}
    for path, source in sources.items():
        if source.form is not None:
            targets[path] = _kept_blocks(source, source.form, plain[path])
        _check_castable(source, targets[path])
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
    source: Source, form: BlockFormat, plain: jax.ShapeDtypeStruct
) -> Quantized:
    """Returns the abstract `Quantized` of a leaf whose tensors are kept as they are."""
    scales = block_leaf(source.leaf, form.size)
    assert scales is not None
    placed = quantize_array(plain, form.name, scales.shape)
    scale = placed.scale.update(dtype=form.scale_dtype)
    dtypes = dict.fromkeys((*form.dtypes, str(plain.dtype)))
    return Quantized(placed.values, scale, tuple(dtypes), form.name)


def _check_castable(source: Source, target: Any) -> None:
    """Checks that floats stay floats, and that other numbers keep their values."""
    for tensor in source.tensors.values():
        old, new = jnp.dtype(tensor.dtype), jnp.dtype(target.dtype)
        floats = [jnp.issubdtype(dtype, jnp.floating) for dtype in (old, new)]
        if floats[0] != floats[1] or not (floats[0] or jnp.can_cast(old, new)):
            raise ValueError(
                f"{path_name(source.leaf.path)!r} is {new}, and the tensor "
                f"{tensor.name!r} is {old}: one is not cast to the other."
            )
