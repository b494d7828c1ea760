"""Parameters to parameters with adapters: initial values, boxes and shardings."""

import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core.meta import AxisMetadata
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax._adapters import (
    Adapters,
    Axes,
    LowRank,
    Shape,
    adapter_of,
    copy_of,
    of_copies,
    without_adapters,
)
from lora_jax._engine.dtypes import wider
from lora_jax._engine.quantized import is_quantized, values_of, widened
from lora_jax._processes import placed
from lora_jax._targets import (
    Patterns,
    Selector,
    also_trained,
    check_axes,
    check_held,
    plan,
    report_left_out,
    warn,
)
from lora_jax._tree import (
    Path,
    fixed_leaves,
    flatten,
    is_abstract,
    is_live,
    is_traced,
    open_box,
    path_name,
    rebox,
    unbox,
    unflatten,
)

# A factor's dimension is one of the weight's, or one of these two.
RANK, ABSENT = -1, -2

# The metadata of an `nnx.Variable` that names the sharding of each dimension.
NAMES = ("out_sharding", "sharding_names", "sharding")


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
    """Adds a low-rank adapter next to each chosen weight, and moves nothing.

    The new tree computes, through `lora`, exactly what the old one did: A is Gaussian
    of variance 1 / inputs and B is zero. Next to `kernel` or `embedding` the new leaves
    are `lora_a` of shape (batch..., in..., rank), `lora_b` (batch..., rank, out...) and
    `lora_scale` (batch...) in float32; next to any other key `w` they are `w_lora_a`,
    and so on. Leaves that are trained in full get a copy next to them, `lora_w`,
    `bias_lora_w`, ..., which takes their place. Leaves with such names are trained,
    except for scales; all others are frozen.

    One dict with path-like keys ("dense/kernel", "layers.q.bias", ".layers[0].weight")
    is treated like the nested tree: the last component of a key is the leaf's name, and
    patterns match components. Its new keys are "dense/kernel_lora_a", and so on. Trees
    of lists, tuples or dataclasses (Equinox) cannot gain leaves: the error shows how to
    adapt their leaves in such a dict.

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
        Norms and biases are no weights: leaves named `bias`, `scale`, `gamma`, `beta`
        or `..._bias`, and those that are named, or whose module is named, `..norm`,
        `norm_1`, `ln_f` or the like. Default: every leaf named `kernel` of two or more
        dimensions, and a warning that lists other weights that are no tables
        (`embedding`, `wte`, `positions`, ...). With `axes` as from `find_axes`: every
        weight in it that is no table.
      exclude: What to leave out, in the same form.
      also: Patterns of further leaves that train, such as a new head, norms or biases:
        floating, of any shape. Each gets a copy of itself, in float32 beside a narrower
        one, so that small updates are not rounded away.
      axes: `{path: Axes(batch, inputs, outputs)}`, which `find_axes` reads from a
        function, or only those of weights whose names in Flax do not say which
        dimensions are which. With `targets` it may name others, too.
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
      Adapters are placed like their weights: by the weight's sharding, or, under `jit`
      and a mesh of automatic axes, by the names in its box.

    Raises:
      TypeError: If `params` is no tree of parameters.
      ValueError: If a pattern matches nothing, a rank is below 1, alpha is no number
        above 0, a weight already has an adapter, of this or of another library, or is
        also trained in full, its dimensions cannot be told, or nothing is left to
        adapt; if a weight is held by a list, a tuple or a dataclass; if `also` names a
        quantized weight; or if `stack` is no whole number above 0.

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
    if is_live(params):
        raise TypeError(
            f"lorafy takes a tree of parameters, found the live module "
            f"{type(params).__name__}. Write LoRA(model, rank), with the same options."
        )
    leaves, held = flatten(params), fixed_leaves(params)
    check_held(held, leaves, None)
    plans = plan(leaves, rank, alpha, targets, exclude, axes)
    copied = also_trained(leaves, also, plans)
    check_held(held, leaves, (*plans, *copied))
    key = jax.random.key(0) if key is None else key
    if stack is not None and (not isinstance(stack, int) or stack < 1):
        raise ValueError(f"stack must be a whole number above 0, found {stack!r}.")
    if targets is None and not isinstance(rank, Mapping):
        named = check_axes(axes or {}, leaves)
        report_left_out(
            leaves, plans, held=held, copied=copied, exclude=exclude, axes=named
        )
    several = () if stack is None else (stack,)
    # Each new leaf must find its place before any array is made.
    parts_of = functools.partial(adapter_of, magnitude=dora)
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
        # Only DoRA has a part for the last fill, that of the magnitude.
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
                value = place(value, own, leaves[path])
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
        x = place(value.astype(dtype), dims, leaf)
    else:
        # A copy indeed: one buffer cannot be donated for two leaves.
        x = jnp.array(w if value is None else value, dtype, copy=True)
        x = place(jnp.broadcast_to(x, shape), dims, leaf)
    return box(x, dims, leaf)


def with_copies(leaves: dict[Path, Any], adapters: Adapters) -> dict[Path, Any]:
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


def factor_dims(axes: Axes, shape: Shape, *, aligned: bool) -> LowRank[Shape]:
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
        return LowRank((*in_a, RANK), (*in_b, RANK), batch, lengths)
    a, b = (*axes.batch, *axes.inputs, RANK), (*axes.batch, RANK, *axes.outputs)
    return LowRank(a, b, axes.batch, (*axes.batch, *axes.outputs))


def beside(
    weight: Path, leaf: Any, values: LowRank[Any], *, stacked: bool = False
) -> dict[Path, Any]:
    """An adapter's leaves for a tree: in the weight's box, where the weight is.

    Or several, `stacked`: one for each along the first dimension of the values.
    """
    parts = adapter_of(weight, magnitude=values.magnitude is not None)
    all_dims = factor_dims(values.axes, unbox(leaf).shape, aligned=values.aligned)
    new = {}
    for part, own, value in zip(parts, all_dims, values, strict=False):
        dims = (*[ABSENT] * stacked, *own)
        x = place(value, dims, leaf)
        new[part] = box(x, dims, leaf, trains=part in parts.trained)
    return new


def place(x: Any, dims: tuple[int, ...], leaf: Any) -> jax.Array:
    """The array where a weight is: sharded along the dimensions that they share.

    Args:
      x: The array. Of one in the host's memory each device gets its own part alone.
      dims: The weight's dimension for each dimension of `x`.
      leaf: The weight, in its box if it has one.
    """
    w = unbox(leaf)
    if is_traced(w):
        w = values_of(w)
        mesh, spec = jax.typeof(w).sharding.mesh, jax.typeof(w).sharding.spec
        if not any(spec):
            return _constrain(jnp.asarray(x), dims, leaf)
        return jax.sharding.reshard(x, NamedSharding(mesh, _spec(spec, dims, w)))
    sharding = _sharding(w, dims)
    return jnp.asarray(x) if sharding is None else placed(x, sharding)


def _constrain(x: jax.Array, dims: tuple[int, ...], leaf: Any) -> jax.Array:
    """A traced array with the sharding that the weight's box names, if it names one.

    Along the automatic axes of a mesh the type of a traced weight has no sharding; the
    names in its box remain. Without a constraint XLA replicates the new arrays: zeros
    and random numbers depend on no sharded input.
    """
    mesh = _mesh_in(leaf) or jax.sharding.get_abstract_mesh()
    auto = {
        axis: mesh.shape[axis]
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }
    if not auto:
        return x

    def kept(name: Any, size: int) -> Any:
        axes = name if isinstance(name, tuple) else (name,)
        known = all(axis in auto for axis in axes)
        return name if known and size % math.prod(map(auto.get, axes)) == 0 else None

    names, shape = _names_in(leaf), unbox(leaf).shape
    spec = [kept(name, n) for name, n in zip(names, shape, strict=False)]
    spec += [None] * (len(shape) - len(spec))
    if not any(spec):
        return x
    sharding = NamedSharding(mesh, PartitionSpec(*_pick(spec, dims)))
    return jax.lax.with_sharding_constraint(x, sharding)


def _mesh_in(leaf: Any) -> Any:
    """The mesh that a box holds, if it holds one."""
    if isinstance(leaf, AxisMetadata):
        return getattr(leaf, "mesh", None) or _mesh_in(open_box(leaf))
    if isinstance(leaf, nnx.Variable):
        names = _metadata_names(leaf)
        own = names.mesh if isinstance(names, NamedSharding) else None
        return own or leaf.get_metadata().get("mesh")
    return None


def _names_in(leaf: Any) -> Sequence[Any]:
    """The mesh axes that a box names for the weight's dimensions."""
    if isinstance(leaf, nn.LogicallyPartitioned):
        return nn.logical_to_mesh_axes(leaf.names, leaf.rules) or ()
    if isinstance(leaf, AxisMetadata):
        return leaf.names if hasattr(leaf, "names") else _names_in(open_box(leaf))
    if not isinstance(leaf, nnx.Variable):
        return ()
    names = _metadata_names(leaf)
    if isinstance(names, NamedSharding):
        return names.spec
    rules = dict(leaf.get_metadata().get("sharding_rules") or ())
    rules |= dict(nn.get_logical_axis_rules())
    return [rules.get(name, name) for name in names]


def _metadata_names(variable: nnx.Variable) -> Any:
    metadata = variable.get_metadata()
    return next((metadata[key] for key in NAMES if metadata.get(key) is not None), ())


def box(value: Any, dims: tuple[int, ...], like: Any, *, trains: bool = True) -> Any:
    """The value in a box like the weight's, with the names of its own dimensions."""
    if isinstance(like, AxisMetadata):
        value = box(value, dims, open_box(like), trains=trains)
        if hasattr(like, "names"):
            return like.replace(value=value, names=_pick(like.names, dims))
        return like.replace_boxed(value)
    if isinstance(like, nnx.Variable):
        metadata = like.get_metadata()
        for name in NAMES:
            names = metadata.get(name)
            if isinstance(names, NamedSharding):
                metadata[name] = names.update(spec=_spec(names.spec, dims, unbox(like)))
            elif names is not None:
                metadata[name] = _pick(names, dims)
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
        warn(
            f"{zero} outputs of {path_name(path)!r} have weights of zero alone: they "
            "have no direction, so that DoRA leaves them zero. Write dora=False, or "
            f"exclude=[{path_name(path)!r}]."
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
