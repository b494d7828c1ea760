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
    names: list[Any] = []
    for d, (n, name) in enumerate(zip(x.shape, _spec(x), strict=True)):
        parts = min(n, layers.get(d, 1))
        cut = layers.get(d, 1) > 1
        shape += [parts, n // parts] if cut else [n]
        names += [name, None] if cut else [name]
    return _reshaped(x, shape, names)


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
    for i, d in enumerate(layers):
        at = len(steps) - i  # the first dimension of a result
        x = jnp.moveaxis(x, 0, at + d)  # (..., parts, steps, ...)
        shape, names = [*x.shape], _spec(x)
        shape[at + d - 1] *= shape.pop(at + d)
        names.pop(at + d)
        x = _reshaped(x, shape, names)
    return x


def _spec(x: jax.Array) -> list[Any]:
    """The names of mesh axes that cut each dimension, as far as its type has them."""
    spec = jax.typeof(x).sharding.spec
    return [*spec, *(None,) * (x.ndim - len(spec))]


def _reshaped(x: jax.Array, shape: Sequence[int], names: Sequence[Any]) -> jax.Array:
    """A reshape to a sharding that JAX does not find by itself in each release."""
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return jnp.reshape(x, shape)
    to = NamedSharding(mesh, PartitionSpec(*names))
    return jnp.reshape(x, shape, out_sharding=to)
