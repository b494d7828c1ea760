"""Makes the leaves of adapters: in a box like the weight's, on the weight's devices."""

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core.meta import AxisMetadata
from flax.linen import LogicallyPartitioned, get_logical_axis_rules
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax._adapters import (
    ABSENT,
    Adapters,
    LowRank,
    adapter_of,
    factor_dims,
    of_copies,
    without_adapters,
)
from lora_jax._engine.dtypes import wider
from lora_jax._engine.quantized import values_of, widened
from lora_jax._processes import put
from lora_jax._tree import (
    Path,
    is_abstract,
    is_traced,
    open_box,
    path_name,
    rebox,
    unbox,
)

# The metadata of an `nnx.Variable` that names the mesh axes of each dimension.
SHARDING_KEYS = ("out_sharding", "sharding_names", "sharding")


class LoRAScale(nnx.Variable):
    """The scale of an adapter in an `nnx.State`: a setting, which no filter trains."""


gaussian = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def path_key(key: jax.Array, path: Path) -> jax.Array:
    """Returns a random key for one leaf, which depends on its path alone."""
    return jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))


def of_one_dtype(xs: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns arrays in their one dtype, or in float32 or wider if they differ."""
    dtypes = {x.dtype for x in xs}
    dtype = dtypes.pop() if len(dtypes) == 1 else wider(*dtypes)
    return [x.astype(dtype) for x in xs]


@functools.partial(jax.jit, static_argnums=1)
def input_norms(w: Any, inputs: tuple[int, ...]) -> jax.Array:
    """Returns the norm of a weight over its inputs, in float32 or wider."""
    return jnp.sqrt(jnp.sum(widened(w, wider(w.dtype)) ** 2, inputs))


def adapter_leaves(
    weight: Path, leaf: Any, values: LowRank[Any], *, stacked: bool = False
) -> dict[Path, Any]:
    """Returns the leaves of an adapter, boxed and sharded like its weight.

    Args:
      weight: The path of the weight.
      leaf: The weight, in its box if it has one.
      values: The arrays, concrete, traced or abstract, and the axes of the weight.
      stacked: Whether each array has several adapters along its first dimension.
    """
    parts = adapter_of(weight, magnitude=values.magnitude is not None)
    all_dims = factor_dims(unbox(leaf).shape, **values.layout)
    new = {}
    for part, kept, value in zip(parts, all_dims, values, strict=False):
        dims = (*[ABSENT] * stacked, *kept)
        new[part] = new_leaf(value, dims, leaf, trained=part != parts.scale)
    return new


def trained_copy(leaf: Any, value: Any = None, *, stack: int | None = None) -> Any:
    """Returns a copy of a leaf to train in full, boxed and sharded like the leaf.

    Args:
      leaf: The leaf, in its box if it has one.
      value: The array to use instead of the leaf's own.
      stack: The number of copies in a stack. `value` may be one for all, or the stack.
    """
    w = unbox(leaf)
    dtype = wider(w.dtype) if value is None else wider(value.dtype, w.dtype)
    dims, shape = tuple(range(len(w.shape))), w.shape
    if stack is not None:
        dims, shape = (ABSENT, *dims), (stack, *shape)
    if is_abstract(w) and value is None:
        return new_leaf(jax.ShapeDtypeStruct(shape, dtype), dims, leaf)
    if isinstance(value, np.ndarray) and value.shape == shape:
        return new_leaf(value.astype(dtype), dims, leaf)  # each device gets its part
    # A copy even if the dtype is the same: one buffer cannot be donated as two leaves.
    x = jnp.array(w if value is None else value, dtype, copy=True)
    return new_leaf(jnp.broadcast_to(x, shape), dims, leaf)


def with_copies(leaves: Mapping[Path, Any], adapters: Adapters) -> dict[Path, Any]:
    """Returns the plain tree's leaves, with trained copies cast and in their places."""
    plain = without_adapters(leaves, adapters)
    for path, copy in of_copies(adapters).items():
        x, dtype = unbox(leaves[copy.w]), unbox(leaves[path]).dtype
        if is_abstract(x):
            x = x.update(dtype=dtype)
        elif x.dtype != dtype:
            x = x.astype(jax.dtypes.canonicalize_dtype(dtype))
        plain[path] = rebox(leaves[path], x)
    return plain


def new_leaf(x: Any, dims: tuple[int, ...], leaf: Any, *, trained: bool = True) -> Any:
    """Returns an array where a weight is, in a box like the weight's.

    Args:
      x: The array, concrete, traced or abstract.
      dims: The weight's dimension for each dimension of `x`, `RANK` or `ABSENT`.
      leaf: The weight, in its box if it has one.
      trained: Whether filters for nnx's `LoRAParam` should select the leaf.
    """
    return _box_like(put_like(x, dims, leaf), dims, leaf, trained)


def put_like(x: Any, dims: tuple[int, ...], leaf: Any) -> Any:
    """Puts an array where a weight is, sharded along the dimensions that they share.

    The arguments are those of `new_leaf`. Each device gets only its part of an array
    that is in the host's memory.
    """
    w = unbox(leaf)
    if is_traced(w):
        sharding = jax.typeof(values_of(w)).sharding
        if not any(sharding.spec):
            return _constrain(jnp.asarray(x), dims, leaf)
        spec = _spec(sharding.spec, dims, w)
        return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))
    sharding = _sharding(w, dims)
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(sharding=sharding)
    return jnp.asarray(x) if sharding is None else put(x, sharding)


def _constrain(x: jax.Array, dims: tuple[int, ...], leaf: Any) -> jax.Array:
    """Constrains a traced array to the sharding that the weight's box names, if any.

    Along the automatic axes of a mesh a traced weight's type has no sharding, so the
    names in its box are all that is known. Without a constraint XLA replicates the new
    arrays, because zeros and random numbers depend on no sharded input.
    """
    mesh = _mesh_in(leaf) or jax.sharding.get_abstract_mesh()
    auto = {
        axis: mesh.shape[axis]
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }
    if not auto:
        return x  # without a mesh any names are allowed, even one that occurs twice

    def divides(name: Any, size: int) -> bool:
        axes = name if isinstance(name, tuple) else (name,)
        known = all(axis in auto for axis in axes)
        return known and size % math.prod(auto[axis] for axis in axes) == 0

    names, shape = _names_in(leaf), unbox(leaf).shape
    pairs = zip(names, shape, strict=False)
    spec = tuple(name if divides(name, n) else None for name, n in pairs)
    if not any(spec):
        return x
    sharding = NamedSharding(mesh, _spec(spec, dims, unbox(leaf)))
    return jax.lax.with_sharding_constraint(x, sharding)


def _mesh_in(leaf: Any) -> Any:
    """Returns the mesh that a box holds, or `None`."""
    if isinstance(leaf, AxisMetadata):
        return getattr(leaf, "mesh", None) or _mesh_in(open_box(leaf))
    if isinstance(leaf, nnx.Variable):
        names = _metadata_names(leaf)
        found = names.mesh if isinstance(names, NamedSharding) else None
        return found or leaf.get_metadata().get("mesh")
    return None


def _names_in(leaf: Any) -> tuple[Any, ...]:
    """Returns the mesh axes that a box names for the weight's dimensions."""
    if isinstance(leaf, LogicallyPartitioned):
        return tuple(logical_to_mesh_axes(leaf.names, leaf.rules) or ())
    if isinstance(leaf, AxisMetadata):
        found = getattr(leaf, "names", None)
        return _names_in(open_box(leaf)) if found is None else found
    if not isinstance(leaf, nnx.Variable):
        return ()
    names = _metadata_names(leaf)
    if isinstance(names, NamedSharding):
        return tuple(names.spec)
    rules = dict(leaf.get_metadata().get("sharding_rules") or ())
    rules |= dict(get_logical_axis_rules())
    return tuple(rules.get(name, name) for name in names)


def _metadata_names(variable: nnx.Variable) -> Any:
    metadata = variable.get_metadata()
    found = (metadata.get(key) for key in SHARDING_KEYS)
    return next((names for names in found if names is not None), ())


def _box_like(value: Any, dims: tuple[int, ...], like: Any, trained: bool) -> Any:
    """Puts a value in a box like the weight's, with the names of its own dimensions."""
    if isinstance(like, AxisMetadata):
        value = _box_like(value, dims, open_box(like), trained)
        box: Any = like
        if hasattr(box, "names"):
            return box.replace(value=value, names=_pick(box.names, dims))
        return box.replace_boxed(value)
    if not isinstance(like, nnx.Variable):
        return value
    metadata = like.get_metadata()
    for key in SHARDING_KEYS:
        names = metadata.get(key)
        if isinstance(names, NamedSharding):
            metadata[key] = names.update(spec=_spec(names.spec, dims, unbox(like)))
        elif names is not None:
            metadata[key] = _pick(names, dims)
    # The value is on its devices already, so nnx need not look for a mesh.
    kind = nnx.LoRAParam if trained else LoRAScale
    return kind(value, **metadata | {"eager_sharding": False})


def _sharding(w: Any, dims: tuple[int, ...]) -> jax.sharding.Sharding | None:
    w = values_of(w)
    sharding = getattr(w, "sharding", None)
    if sharding is not None:  # adapters of a weight in the host's memory are not there
        sharding = sharding.with_memory_kind(None)
    if isinstance(sharding, NamedSharding):
        return sharding.update(spec=_spec(sharding.spec, dims, w))
    # An uncommitted weight commits its adapter to no device either.
    return sharding if getattr(w, "committed", True) else None


def _spec(names: Any, dims: tuple[int, ...], w: Any) -> PartitionSpec:
    """Returns the spec of an array with some of the weight's dimensions.

    The rank is never sharded: it is small, and every device needs all of it.
    """
    return PartitionSpec(*_pick((*names, *(None,) * (len(w.shape) - len(names))), dims))


def _pick(names: tuple[Any, ...], dims: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(names[d] if d >= 0 else None for d in dims)
