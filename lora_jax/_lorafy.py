"""Parameters to parameters with adapters: initial values, boxes and shardings."""

import functools
import math
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core.meta import AxisMetadata
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._adapters import (
    Axes,
    Copy,
    Dora,
    Ranked,
    adapter_of,
    copy_of,
    dora_of,
    of_copies,
    without_adapters,
)
from lora_jax._engine.factors import wider
from lora_jax._engine.quantized import is_quantized, values_of, widened
from lora_jax._processes import placed
from lora_jax._targets import Patterns, Selector, also_trained, plan
from lora_jax._tree import (
    Path,
    flatten,
    is_abstract,
    is_traced,
    open_box,
    path_name,
    rebox,
    unbox,
    unflatten,
)

# A factor's dimension is one of the weight's, or one of these two.
RANK, ABSENT = -1, -2


class LoRAScale(nnx.Variable):
    """The scale of an adapter in an `nnx.State`: a setting, which no filter trains."""


gaussian = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def lorafy(
    params: Any,
    rank: int | Mapping[str, int],
    *,
    alpha: float | jax.Array | Mapping[str, float | jax.Array] | None = None,
    targets: Selector | None = None,
    exclude: Selector = (),
    also: Patterns = (),
    axes: Mapping[str, Axes] | None = None,
    init: Callable[..., jax.Array] = gaussian,
    rslora: bool = False,
    dora: bool = False,
    dtype: Any = None,
    stack: int | None = None,
    key: jax.Array | None = None,
) -> Any:
    """Adds a low-rank adapter beside each chosen weight, and moves nothing.

    The new tree computes, through `lora`, exactly what the old one did: A is Gaussian
    of variance 1 / inputs and B is zero. Beside `kernel` or `embedding` stand `lora_a`
    of shape (batch..., in..., rank), `lora_b` (batch..., rank, out...) and `lora_scale`
    (batch...) in float32; beside any other name `w` stand `w_lora_a`, and so on. Leaves
    that are to train whole get a copy beside them, `lora_w`, `bias_lora_w`, ..., which
    takes their place. So what trains is what has such a name, and nothing else is.

    Args:
      params: A tree of mappings: nested dict, `FrozenDict`, `nnx.State`, a whole
        `{"params": ...}`; boxed leaves or not; arrays, tracers or `ShapeDtypeStruct`.
      rank: Rank r of the update, or `{pattern: rank}`, which is its own targets. Above
        the inputs or the outputs of a weight, as for a head of two classes, it is
        wasteful and no error; `explain` says so.
      alpha: The update is scaled by alpha / rank; `{pattern: alpha}` for some. A number
        above 0, or a JAX scalar, which may be traced. Default: the rank, for a scale
        of 1.
      targets: A pattern, several, or `callable(path, array) -> bool`. A pattern matches
        a run of whole path components, `*` may cross slashes: "query", "attn/*/kernel".
        Default: every leaf named `kernel` of two or more dimensions.
      exclude: What to leave out, in the same form.
      also: Patterns of further leaves that train, such as a new head, norms or biases:
        floating, of any shape. Each gets a copy of itself, in float32 beside a narrower
        one, so that small updates are not rounded away.
      axes: `{path: Axes(batch, inputs, outputs)}`, as `find_axes` reads it off a
        function, where Flax's names do not tell which dimensions of a weight are which.
      init: Initial values of A: `init(key, (inputs, rank), dtype)`.
      rslora: Scale by alpha / sqrt(rank) instead.
      dora: Decompose each weight into magnitudes and directions: it becomes
        m (W + scale A B) / |W + scale A B|, the norm over the inputs, a constant for
        derivatives. `lora_magnitude`, m, of shape (batch..., out...) in float32 or
        wider, starts as |W| and trains. An output whose weights are all zero has
        nothing to divide, stays zero, and is warned of.
      dtype: Of A and B. Default: float32 beside a narrower weight or one in few bits,
        else the weight's.
      stack: How many adapters, over this one base, to run at once by `jax.vmap`: each
        new leaf has them along a first dimension. See `stack`, which makes one of
        trees that differ. Default: one, without that dimension.
      key: Random key for A; each weight folds its own path into it, and each adapter of
        a stack starts as with its own of `jax.random.split(key, stack)`. Default:
        `jax.random.key(0)`.

    Returns:
      A tree with the same containers, boxes and shardings that shares every old leaf.

    Raises:
      TypeError: If `params` is no tree of parameters.
      ValueError: If a pattern matches nothing, a rank is below 1, alpha is no number
        above 0, a weight already has an adapter or is also to train whole, its
        dimensions cannot be told, or nothing is left to adapt; if `also` names a weight
        in few bits; or if `stack` is no whole number above 0.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj
      >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
      >>> adapted = lj.lorafy(params, rank=2)
      >>> jax.tree.map(jnp.shape, adapted)["dense"]["lora_a"]
      (4, 2)

    Reference:
      Hu et al., "LoRA", 2021. https://arxiv.org/abs/2106.09685
      Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024.
      https://arxiv.org/abs/2402.09353
      Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
      2023. https://arxiv.org/abs/2312.03732
    """
    leaves = flatten(params)
    plans = plan(leaves, rank, alpha, targets, exclude, axes)
    copied = also_trained(leaves, also, plans)
    key = jax.random.key(0) if key is None else key
    if stack is not None and (not isinstance(stack, int) or stack < 1):
        raise ValueError(f"stack must be a whole number above 0, found {stack!r}.")
    several = () if stack is None else (stack,)
    # Each new leaf must find its place before any array is made.
    parts_of = dora_of if dora else adapter_of
    trial = {part: leaves[path] for path in plans for part in parts_of(path)}
    trial |= {copy_of(path).w: leaves[path] for path in copied}
    unflatten(params, leaves | trial)
    new: dict[Path, Any] = {
        copy_of(path).w: trained_copy(leaves[path], stack=stack) for path in copied
    }
    for path, (r, weight_alpha, dims) in plans.items():
        w = unbox(leaves[path])
        kept = jnp.float32 if is_quantized(w) else wider(w.dtype)
        factor_dtype = kept if dtype is None else dtype
        scale = weight_alpha / (math.sqrt(r) if rslora else r)
        draw = functools.partial(_draw, w.shape, dims, r, init, factor_dtype)
        fills = (
            functools.partial(_draw_each, draw, path, key, stack),
            functools.partial(jnp.zeros, dtype=factor_dtype),
            functools.partial(jnp.full, fill_value=scale, dtype=jnp.float32),
            functools.partial(_magnitude, path, w, dims),
        )
        dtypes = (factor_dtype, factor_dtype, jnp.float32, kept)
        sizes = dict(enumerate(w.shape)) | {RANK: r, ABSENT: 1}
        all_dims = factor_dims(dims, w.shape, aligned=not dims.standard)
        parts = parts_of(path)
        # The magnitudes are the last of four, and not of all adapters.
        for part, own, fill, kind in zip(parts, all_dims, fills, dtypes, strict=False):
            shape = tuple(sizes[d] for d in own)
            own = (*(ABSENT for _ in several), *own)
            if is_abstract(w):
                sharding = _sharding(w, own)
                value = jax.ShapeDtypeStruct(
                    (*several, *shape), kind, sharding=sharding
                )
            else:
                value = jnp.broadcast_to(fill(shape), (*several, *shape))
                value = place(value, own, w)
            trains = part in parts.trained
            new[part] = box(value, own, leaves[path], trains=trains)
    return unflatten(params, leaves | new)


def path_key(key: jax.Array, path: Path) -> jax.Array:
    """A key of a leaf's own, whatever stands beside it."""
    return jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))


def trained_copy(leaf: Any, value: Any = None, *, stack: int | None = None) -> Any:
    """A copy of a leaf to train, or another value in its place, in the leaf's box.

    Or so many of them in a stack, of which `value` has them all.
    """
    w = unbox(leaf)
    dtype = wider(w.dtype) if value is None else wider(value.dtype, w.dtype)
    dims, shape = tuple(range(len(w.shape))), w.shape
    if stack is not None:
        dims, shape = (ABSENT, *dims), (stack, *shape)
    if is_abstract(w) and value is None:
        x = jax.ShapeDtypeStruct(shape, dtype, sharding=_sharding(w, dims))
    elif isinstance(value, np.ndarray) and value.shape == shape:
        x = place(value.astype(dtype), dims, w)
    else:
        # A copy indeed: one buffer cannot be donated for two leaves.
        x = jnp.array(w if value is None else value, dtype, copy=True)
        x = place(jnp.broadcast_to(x, shape), dims, w)
    return box(x, dims, leaf)


def with_copies(
    leaves: dict[Path, Any], adapters: dict[Path, Ranked | Copy]
) -> dict[Path, Any]:
    """The plain tree's leaves, the trained copies in their places, in their dtypes."""
    plain = without_adapters(leaves, adapters)
    for path, copy in of_copies(adapters).items():
        x, dtype = unbox(leaves[copy.w]), unbox(leaves[path]).dtype
        if is_abstract(x):
            x = x.update(dtype=dtype)
        elif x.dtype != dtype:
            x = x.astype(jax.dtypes.canonicalize_dtype(dtype))
        plain[path] = rebox(leaves[path], x)
    return plain


def factor_dims(axes: Axes, shape: tuple[int, ...], *, aligned: bool) -> Dora:
    """Which of the weight's dimensions each dimension of an adapter's leaves is."""
    if aligned:
        # A dimension of size 1 is in neither factor: their shapes could not say which.
        in_a, in_b = (
            [
                n if size > 1 and n not in others else ABSENT
                for n, size in enumerate(shape)
            ]
            for others in (axes.outputs, axes.inputs)
        )
        batch = tuple(n if shape[n] > 1 else ABSENT for n in axes.batch)
        lengths = tuple(d for d in in_b if d != ABSENT)
        return Dora((*in_a, RANK), (*in_b, RANK), batch, lengths)
    a, b = (*axes.batch, *axes.inputs, RANK), (*axes.batch, RANK, *axes.outputs)
    return Dora(a, b, axes.batch, (*axes.batch, *axes.outputs))


def beside(
    leaf: Any,
    parts: Ranked,
    values: Sequence[Any],
    axes: Axes,
    *,
    stacked: bool = False,
) -> dict[Path, Any]:
    """An adapter's leaves for a tree: in the weight's box, where the weight is.

    Or several, `stacked`: one for each along the first dimension of the values.
    """
    w = unbox(leaf)
    aligned = len(values[0].shape) == len(w.shape) + 1 + stacked
    all_dims = factor_dims(axes, w.shape, aligned=aligned)
    new = {}
    for part, own, value in zip(parts, all_dims[: len(parts)], values, strict=True):
        dims = (*[ABSENT] * stacked, *own)
        x = place(value, dims, w)
        new[part] = box(x, dims, leaf, trains=part in parts.trained)
    return new


def place(x: Any, dims: tuple[int, ...], w: Any) -> jax.Array:
    """The array where the weight is: sharded along the dimensions that they share.

    Of one in the host's memory each device gets its own part alone.
    """
    if is_traced(w):
        w = values_of(w)
        mesh, spec = jax.typeof(w).sharding.mesh, jax.typeof(w).sharding.spec
        if not any(spec):
            return jnp.asarray(x)
        return jax.sharding.reshard(x, NamedSharding(mesh, _spec(spec, dims, w)))
    sharding = _sharding(w, dims)
    return jnp.asarray(x) if sharding is None else placed(x, sharding)


def box(value: Any, dims: tuple[int, ...], like: Any, *, trains: bool = True) -> Any:
    """The value in a box like the weight's, with the names of its own dimensions."""
    if isinstance(like, AxisMetadata):
        value = box(value, dims, open_box(like), trains=trains)
        if hasattr(like, "names"):
            return like.replace(value=value, names=_pick(like.names, dims))
        return like.replace_boxed(value)
    if isinstance(like, nnx.Variable):
        metadata = like.get_metadata()
        for name in ("out_sharding", "sharding_names", "sharding"):
            if metadata.get(name) is not None:
                metadata[name] = _pick(metadata[name], dims)
        # The value is placed already; nnx need not look for a mesh to place it on.
        kind = nnx.LoRAParam if trains else LoRAScale
        return kind(value, **metadata | {"eager_sharding": False})
    return value


def _draw(
    w_shape: tuple[int, ...],
    axes: Axes,
    r: int,
    init: Callable[..., jax.Array],
    dtype: Any,
    key: jax.Array,
    shape: tuple[int, ...],
) -> jax.Array:
    """A's initial values, drawn as a matrix (inputs, r) for each adapter of a batch."""
    n_in = math.prod(w_shape[d] for d in axes.inputs)
    if axes.batch:
        n_batch = math.prod(w_shape[d] for d in axes.batch)
        keys = jax.random.split(key, n_batch)
        a = jax.vmap(lambda key: init(key, (n_in, r), dtype))(keys)
    else:
        a = init(key, (n_in, r), dtype)
    # The values come in the order (batch, inputs, rank); the weight may not.
    stored = (*axes.batch, *axes.inputs)
    a = jnp.reshape(a, (*(w_shape[d] for d in stored), r))
    a = jnp.transpose(a, (*np.argsort(stored), len(stored)))
    return jnp.reshape(a, shape)


def _draw_each(
    draw: Callable[..., jax.Array],
    path: Path,
    key: jax.Array,
    stack: int | None,
    shape: tuple[int, ...],
) -> jax.Array:
    """The initial values of one adapter, or of each in a stack with its own key."""
    one = lambda key: draw(path_key(key, path), shape)
    return one(key) if stack is None else jax.vmap(one)(jax.random.split(key, stack))


def _magnitude(path: Path, w: Any, axes: Axes, shape: tuple[int, ...]) -> jax.Array:
    """|W|, the norm over the inputs, for each output."""
    norm = norms(w, axes.inputs)
    if not is_traced(norm) and (zero := int(jnp.sum(norm == 0))):
        warnings.warn(
            f"{zero} outputs of {path_name(path)!r} have weights of zero alone: they "
            "have no direction, so that DoRA leaves them zero. Write dora=False, or "
            f"exclude=[{path_name(path)!r}].",
            stacklevel=3,
        )
    return jnp.reshape(norm, shape)


@functools.partial(jax.jit, static_argnums=1)
def norms(w: Any, axes: tuple[int, ...]) -> jax.Array:
    """|W| over these dimensions, in float32 or wider."""
    return jnp.sqrt(jnp.sum(widened(w, wider(w.dtype)) ** 2, axes))


def _sharding(w: Any, dims: tuple[int, ...]) -> jax.sharding.Sharding | None:
    w = values_of(w)
    sharding = getattr(w, "sharding", None)
    if sharding is not None:  # adapters of a weight in the host's memory are not there
        sharding = sharding.with_memory_kind(None)
    if isinstance(sharding, NamedSharding):
        return sharding.update(spec=_spec(sharding.spec, dims, w))
    # An array that is nowhere in particular binds its adapter to no device either.
    return sharding if getattr(w, "committed", True) else None


def _spec(spec: PartitionSpec, dims: tuple[int, ...], w: Any) -> PartitionSpec:
    # The rank is never sharded: it is small, and every device needs all of it.
    names = (*spec, *(None,) * (len(w.shape) - len(spec)))
    return PartitionSpec(*_pick(names, dims))


def _pick(names: tuple[Any, ...], dims: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(names[d] if d >= 0 else None for d in dims)
