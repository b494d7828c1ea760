"""Makes adapters of other JAX libraries ours (`adopt`), and ours qwix's (`as_qwix`)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapters import (
    ABSENT,
    RANK,
    Axes,
    LowRank,
    Shape,
    arrays_of,
    check_boxes,
    factor_dims,
    find_adapters,
    of_rank,
)
from lora_jax._detach import attached
from lora_jax._engine.dtypes import wider
from lora_jax._factor_axes import from_our_order, split_dims, to_our_order
from lora_jax._flax_names import check_axes
from lora_jax._foreign import (
    Number,
    Reading,
    moved_paths,
    reading,
    recognized,
    scales,
)
from lora_jax._leaves import adapter_leaves, new_leaf, with_copies
from lora_jax._live import without_foreign
from lora_jax._patterns import by_pattern
from lora_jax._targets import check_each, check_positive
from lora_jax._tree import (
    Path,
    PyTree,
    as_tree,
    flatten,
    is_abstract,
    is_live,
    is_traced,
    path_name,
    quantized_leaves,
    unbox,
    unflatten,
)


def adopt(
    params: PyTree,
    *,
    alpha: Number | Mapping[str, Number] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> PyTree:
    """Converts the adapters of another JAX library to those of this library.

    `lora(fn)` of the plain model computes on the result what the other library computes
    on `params`: the factors get our names and our order of dimensions, and `lora_scale`
    is the number that the library multiplies by. So `merge`, `add`, `stack`,
    `export_peft`, `export_weights` and all other functions take the result.

    Each row is a layout. Names are relative to the module of the weight, and `{w}`
    stands for any name; the second factor has b as its last letter:

        library               weight              first factor            scale
        openpi                w                   lora_a                  alpha / rank
        openpi                gating_einsum       gating_einsum_lora_a    1
        openpi                linear              linear_lora_a           1
        gemma.peft            kernel              lora/a                  1
        gemma.peft            w                   lora/a                  1
        gemma.peft            w                   _LoRAEinsum_0/lora/a    1
        gemma.peft            {w}                 _LoRAEinsum_{w}/lora/a  1
        flax.nnx              kernel              lora/lora_a             1
        flax.nnx              base_module/kernel  lora_a                  1
        Keras                 kernel              lora_kernel_a           alpha / rank
        Keras                 embeddings          lora_embeddings_a       alpha / rank
        qwix, tunix, MaxText  kernel              kernel_lora_a           alpha / rank
        qwix, tunix, MaxText  {w}                 {w}_lora_a              alpha / rank

    The shapes of the factors prove which dimensions of a weight are inputs. If they
    allow several (an einsum's weight with two equal dimensions), `axes` decides. Only a
    weight named `kernel` is then taken to be (inputs, outputs), as Flax's layers are.

    Some adapters have no counterpart in PEFT: those of Keras on kernels with heads,
    where the first factor has outputs too, and those of openpi with factors for each
    head. They merge exactly. For `export_peft`, write
    `extract(merge(adopted), strip(adopted), rank, axes=find_axes(...))`. qwix's
    adapters of grouped convolutions are no updates of the kernel, which neither names
    nor shapes show: do not adopt them.

    Args:
      params: One tree with the weights and their adapters: nested dict, `FrozenDict`,
        `nnx.State`, or one dict with path-like keys; boxed leaves or not; arrays,
        tracers or `ShapeDtypeStruct`. Or a live module with layers of `nnx.LoRA`, or
        one of qwix. Of a Keras model: `{v.path: v.value for v in model.variables}`. If
        the adapters are in a tree of their own:
        `nnx.merge_state(nnx.state(model), factors)`.
      alpha: The alpha of the training, or `{pattern: alpha}` for some weights each, as
        in `lorafy`. Required where the scale is alpha / rank, which no layout stores,
        and refused where it is 1. With openpi's `rslora`: alpha * sqrt(rank).
      axes: `{path: Axes(batch, inputs, outputs)}` of weights whose factors fit in
        several ways, by their paths in the plain model, or all axes from
        `find_axes(fn, base, *args)`.

    Returns:
      A tree with the containers of the plain model, which shares every weight and has
      adapters like those of `lorafy`, in the dtypes of their factors. An `nnx.LoRA`
      leaves the layer that it is around in its place. For a live module: a `LoRA` with
      a plain model, whose class is the one before qwix, and `nnx.Linear` for
      `nnx.LoRALinear`.

    Raises:
      TypeError: If `params` is no tree of parameters.
      ValueError: If no row, or rows of several libraries, explain a leaf that is named
        like an adapter; if factors do not fit their weight, or fit it in several ways;
        if alpha is missing, or given where the scale is 1; if a pattern matches no
        adapter; if a weight is quantized by the other library, or is a table, which
        qwix adapts as a head alone; or if there are adapters of this library.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj
      >>> from flax import nnx
      >>> layer = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0))
      >>> params = lj.adopt(nnx.to_pure_dict(nnx.state(layer)))
      >>> jax.tree.map(jnp.shape, lj.split(params)[0])["lora_a"]
      (4, 2)
      >>> module = lj.adopt(layer)  # a LoRA, which calls an nnx.Linear
      >>> x = jnp.ones((5, 4))
      >>> bool(jnp.allclose(module(x), layer(x)))
      True
    """
    given = None if alpha is None else check_each(alpha, check_positive)
    leaves = flatten(params)
    check_boxes(leaves)
    found = recognized(leaves)
    factors = {path for adapter in found for path in (adapter.a, adapter.b)}
    moved = moved_paths(leaves, found)
    base = {moved[path]: x for path, x in leaves.items() if path not in factors}
    known = check_axes(axes or {}, base)
    adapters = {moved[adapter.weight]: adapter for adapter in found}
    readings = {p: reading(x, p, leaves, known) for p, x in adapters.items()}
    by_path = scales(adapters, given, leaves)
    like = without_foreign(params, factors) if is_live(params) else params
    new: dict[Path, Any] = {}
    for path, adapter in adapters.items():
        a, b = unbox(leaves[adapter.a]), unbox(leaves[adapter.b])
        values = _values(unbox(base[path]), a, b, by_path[path], readings[path])
        new |= adapter_leaves(path, base[path], values)
    return attached(like, base, new)


def _values(w: Any, a: Any, b: Any, scale: Number, read: Reading) -> LowRank[Any]:
    """Returns the arrays of an adapter in our order, abstract if the factors are."""
    axes, aligned = read.axes, not read.axes.standard
    dims = factor_dims(w.shape, axes, aligned=aligned).scale
    shape = tuple(1 if d == ABSENT else w.shape[d] for d in dims)

    def arrays(a: Any, b: Any) -> tuple[Any, Any, Any]:
        b = jnp.sum(b, read.summed) if read.summed else b
        full = jnp.full(shape, scale, jnp.float32)
        return *to_our_order(w.shape, a, b, axes), full

    abstract = is_abstract(a) or is_abstract(b)
    values = jax.eval_shape(arrays, a, b) if abstract else arrays(a, b)
    return LowRank(*values, axes=axes, aligned=aligned)


def as_qwix(
    params: PyTree, *, alpha: Number | Mapping[str, Number] | None = None
) -> PyTree:
    """Returns the tree with the names and the order of qwix's adapters, for tunix.

    The inverse of `adopt` for qwix: next to `kernel` the factors are `kernel_lora_a`
    and `kernel_lora_b`, (inputs..., rank) and (rank, outputs...) with the dimensions of
    the weight in its order, and there is no scale. qwix multiplies by alpha / rank, so
    `lora_b` is multiplied by `lora_scale` / (alpha / rank). If that is 1, it is shared.

    qwix itself joins the dimensions of heads to one in the factors of kernels of dense
    layers. It also reads them like this.

    Args:
      params: A tree from `lorafy`, or a live module.
      alpha: The alpha of qwix's `LoraProvider`, or `{pattern: alpha}` for some weights.
        Default: the rank of each, so that qwix multiplies by 1.

    Returns:
      A tree with the same containers that shares the weights; trained copies take the
      places of their leaves. For a live module it is an `nnx.State`, because the
      model's own methods would ignore the adapters: write it into a model of qwix.

    Raises:
      ValueError: If `params` has no adapters, or a broken one; if one has DoRA's
        magnitudes, or a weight is quantized; or if a pattern of alpha matches nothing.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj
      >>> params = lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2, alpha=16)
      >>> theirs = lj.as_qwix(params, alpha=16)
      >>> jax.tree.map(jnp.shape, theirs)
      {'kernel': (4, 3), 'kernel_lora_a': (4, 2), 'kernel_lora_b': (2, 3)}

      With tunix, whose exporters and samplers take the model of qwix:

          provider = qwix.LoraProvider(module_path=..., rank=2, alpha=16)
          theirs = qwix.apply_lora_to_model(model, provider, **model.get_model_input())
          nnx.update(theirs, lj.as_qwix(module, alpha=16))
    """
    given = None if alpha is None else check_each(alpha, check_positive)
    tree = as_tree(params)
    leaves = flatten(tree)
    found = find_adapters(leaves)
    adapters = of_rank(found)
    _check_for_qwix(leaves, adapters)
    if isinstance(given, Mapping):
        alphas = by_pattern(given, [*adapters], "alpha")
    else:
        alphas = {} if given is None else dict.fromkeys(adapters, given)
    new: dict[Path, Any] = {}
    for path, adapter in adapters.items():
        w, values = unbox(leaves[path]), arrays_of(adapter, leaves)
        r = values.a.shape[-1]
        convert = functools.partial(
            _for_qwix, w.shape, adapter, alphas.get(path, r) / r
        )
        abstract = any(map(is_abstract, values))
        a, b = jax.eval_shape(convert, *values) if abstract else convert(*values)
        batch, inputs, outputs = split_dims(w.shape, values)
        for name, x, dims in (
            ("lora_a", a, (*batch, *inputs, RANK)),
            ("lora_b", b, (*batch, RANK, *outputs)),
        ):
            new[*path[:-1], f"{path[-1]}_{name}"] = new_leaf(x, dims, leaves[path])
    return unflatten(tree, with_copies(leaves, found) | new)


def _for_qwix(
    w: Shape, adapter: LowRank[Path], target: Number, a: Any, b: Any, scale: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns factors in qwix's order, whose product qwix multiplies by a scale."""
    a, b = from_our_order(w, dataclasses.replace(adapter, a=a, b=b))
    known = not (is_traced(scale) or is_traced(target))
    if known and np.all(np.asarray(scale) == np.float32(target)):
        return a, b
    factor = scale.astype(wider(b.dtype)) / target
    factor = jnp.reshape(factor, factor.shape + (1,) * (b.ndim - factor.ndim))
    return a, (b.astype(factor.dtype) * factor).astype(b.dtype)


def _check_for_qwix(
    leaves: Mapping[Path, Any], adapters: Mapping[Path, LowRank[Path]]
) -> None:
    """Raises ValueError for what qwix has no leaves for."""
    for path, adapter in adapters.items():
        if adapter.magnitude is not None:
            raise ValueError(
                f"{path_name(path)!r} has DoRA's magnitudes, which qwix does not read. "
                "For the nearest adapter without them, write "
                "extract(merge(params), base, rank)."
            )
    for path in quantized_leaves(leaves):
        raise ValueError(
            f"{path_name(path)!r} is quantized in a format of lora_jax. Write "
            "as_qwix(dequantize(params)), and quantize with qwix."
        )
