"""One layer of a stack after another, so that intermediates are those of one layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def per_layer(
    fn: Callable[..., Any], arrays: Sequence[Any], layers: Mapping[int, int]
) -> Any:
    """`fn(*arrays)`, where `fn` acts on each layer of a stack alone.

    A loop takes one layer per step. Where a mesh cuts the stack into parts, a step
    takes one layer of each part: each device works on a layer that it has, and none
    gathers the stack.

    Args:
      fn: Takes and returns arrays with the dimensions of `layers`.
      arrays: A dimension of `layers` may have size 1 in some of them, as in
        broadcasting.
      layers: The dimensions to loop over, and the parts that a mesh cuts each into.
    """
    layers = dict(sorted(layers.items()))
    sizes = {d: max(x.shape[d] for x in arrays) for d in layers}
    steps = [n // layers[d] for d, n in sizes.items()]
    if math.prod(steps) == 1:
        return fn(*arrays)
    split = [_split(x, layers) for x in arrays]

    def step(i: jax.Array) -> Any:
        # XLA moves what does not depend on the step out of the loop, and on CPUs up to
        # jaxlib 0.10 that is a float32 copy of a bfloat16 stack. The barrier makes the
        # stack depend on the step; it costs no copy.
        stacks, i = lax.optimization_barrier((split, i))
        at = dict(zip(layers, jnp.unravel_index(i, steps), strict=True))
        return fn(*(_taken(x, at, layers) for x in stacks))

    results = lax.map(step, jnp.arange(math.prod(steps)))
    return jax.tree.map(lambda x: _joined(x, layers, steps), results)


def _split(x: jax.Array, layers: Mapping[int, int]) -> jax.Array:
    """The array, with each dimension of n layers that is cut as (parts, n / parts).

    The first of the two has the sharding, so that the loop is over an unsharded one.
    """
    shape: list[int] = []
    for d, n in enumerate(x.shape):
        parts = min(n, layers.get(d, 1))
        shape += [n] if layers.get(d, 1) == 1 else [parts, n // parts]
    return jnp.reshape(x, shape)


def _taken(
    x: jax.Array, at: Mapping[int, jax.Array], layers: Mapping[int, int]
) -> jax.Array:
    """One layer of each part: the dimensions of `layers` count the parts."""
    for d, parts in layers.items():  # in order: those before `d` are one dimension
        axis = d + (parts > 1)
        if x.shape[axis] > 1:
            x = lax.dynamic_index_in_dim(x, at[d], axis, keepdims=True)
        if parts > 1:
            x = jnp.squeeze(x, axis)
    return x


def _joined(x: jax.Array, layers: Mapping[int, int], steps: Sequence[int]) -> jax.Array:
    """The results of all steps, (steps, ...), as one array."""
    x = jnp.reshape(x, (*steps, *x.shape[1:]))
    for i, (d, parts) in enumerate(layers.items()):
        at = len(steps) - i  # the first dimension of a result
        x = jnp.moveaxis(x, 0, at + d)  # (..., parts, steps, ...)
        shape = (*x.shape[: at + d - 1], parts * steps[i], *x.shape[at + d + 1 :])
        x = _merged(x, shape, at + d - 1)
    return x


def _merged(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A reshape that merges a dimension, which may be sharded, and the next one."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return jnp.reshape(x, shape)
    # Next to a dimension of size 1 older releases of JAX do not find the sharding.
    spec = (*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))
    spec = PartitionSpec(*spec[: axis + 1], *spec[axis + 2 :])
    return jnp.reshape(x, shape, out_sharding=NamedSharding(sharding.mesh, spec))
