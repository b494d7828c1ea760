"""Products with low-rank factors, and their addition to a product with the weight.

A low-rank array has the rank as one of its dimensions. The product that contracts the
inputs is small. The one that contracts the rank is as large as what it is added to.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax._engine.dtypes import wider, x64
from lora_jax._engine.shapes import size

Labels = Sequence[int]  # one per dimension; equal labels are summed or kept together
RANK = -1  # the label of the rank
FEW = 3  # rows or columns, up to which the order of a product makes no difference
COLUMNS = 16  # at most so many are added one by one, where that is faster


def einsum(
    x: jax.Array,
    x_labels: Labels,
    y: jax.Array,
    y_labels: Labels,
    out: Labels,
    precision: Any = None,
    dtype: Any = None,
) -> jax.Array:
    """The product of `x` and a low-rank `y`.

    A label of `out` that neither has gets size 1.
    """
    x_labels, y_labels = list(x_labels), list(y_labels)
    lonely = [n for n in x_labels if n not in y_labels and n not in out]
    if lonely:
        x = jnp.sum(x, axis=tuple(x_labels.index(n) for n in lonely))
        x_labels = [n for n in x_labels if n not in lonely]
    sizes = dict(zip(x_labels, x.shape, strict=True))
    sizes |= dict(zip(y_labels, y.shape, strict=True))
    batch = [n for n in x_labels if n in y_labels and n in out]
    summed = [n for n in x_labels if n in y_labels and n not in out]
    x_free = [n for n in x_labels if n not in y_labels]
    y_free = [n for n in y_labels if n not in x_labels]

    options: dict[str, Any] = {"precision": precision}
    if dtype is not None and jnp.dtype(dtype).itemsize > x.dtype.itemsize:
        options["preferred_element_type"] = dtype
    have = [n for n in out if n in sizes]
    swap = not batch and have == [*y_free, *x_free]
    labels = [*batch, *y_free, *x_free] if swap else [*batch, *x_free, *y_free]
    if is_explicit(x):
        options["out_sharding"] = _spec(labels, (x, x_labels), (y, y_labels))
    length = lambda side: size(sizes[n] for n in side)
    short, long = sorted((y_free, summed), key=length)
    # Not in a batch, which includes that of `vmap`: up to jax 0.11, XLA for CPU cannot
    # compile the gradient of the barrier there. Nor for two or three rows or columns.
    if not batch and min(length(x_free), length(long)) > FEW:
        # The short side of y first, because of its gradient: XLA for CPU computes it as
        # (r, k) in a tenth of the time of (k, r), 0.4 against 4.1 ms for 1,536 tokens
        # of 1,536 features at r = 8. Without the barrier XLA would undo the transpose.
        order = [*short, *long]
        y = jnp.transpose(y, [y_labels.index(n) for n in order])
        y, y_labels = lax.optimization_barrier(y), order
    dims: Any = [
        ([x_labels.index(n) for n in group], [y_labels.index(n) for n in group])
        for group in (summed, batch)
    ]
    if swap:
        z = lax.dot_general(y, x, tuple(pair[::-1] for pair in dims), **options)
    else:
        z = lax.dot_general(x, y, dims, **options)
    z = jnp.transpose(z, [labels.index(n) for n in have])
    return jnp.reshape(z, [sizes.get(n, 1) for n in out])


@jax.custom_jvp
def made_once(x: jax.Array) -> jax.Array:
    """Makes XLA compute an array once that two products read.

    Where each example has an adapter of its own, the products read x in different
    shapes, and XLA for CPU would repeat the operations that lead to x, such as a gelu,
    for each of them: a mixed batch of 16 (benchmarks/many_adapters.py) takes 1.19
    instead of 1.12 of the plain pass. Under differentiation x is kept, and computed
    once anyway.
    """
    once = lax.optimization_barrier
    return lax.platform_dependent(x, cpu=once, default=lambda x: x)


made_once.defjvp(lambda primals, tangents: (*primals, *tangents))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def add(y: jax.Array, h: jax.Array, b: jax.Array, precision: Any) -> jax.Array:
    """`y + h b`: y (*rows, *columns), h (*rows, r) and b (*columns, r).

    XLA for CPU does not fuse the addition with the product: it would write `h b`, as
    large as y, and read it again. It does fuse a sum of r outer products with the
    addition, in place of y: a step of the transformer of benchmarks/speed.py has 451
    instead of 534 MB of temporaries at r = 8, its forward pass 12 instead of 67 MB, in
    0.94 of the time, as at r = 16. At r = 32 the product is faster.
    """
    if h.shape[-1] > COLUMNS or not 1 < h.ndim <= y.ndim:
        return y + _outer(h, b, precision, y.dtype)
    return _add_columns(y, h, b, precision)


@functools.partial(jax.jit, static_argnums=3, inline=True)
def _add_columns(y: jax.Array, h: jax.Array, b: jax.Array, precision: Any) -> jax.Array:
    """Jitted, so that JAX traces it once for a shape."""

    def columns(y, h, b):
        rows, wide, ones = h.ndim - 1, wider(y.dtype), [1] * h.shape[-1]
        left = lax.expand_dims(h.astype(wide), range(rows, y.ndim - 1))
        right = lax.expand_dims(jnp.moveaxis(b.astype(wide), -1, 0), range(1, rows))
        # XLA for CPU multiplies matrices. Without the second barrier the reshape of the
        # product would be fused with the sum. Without the first its dimensions of size
        # 1, as those of `vmap`, could have another order in memory than the sum's. In
        # both cases the sum would be a new array.
        matrix = lax.collapse(lax.collapse(y, rows, y.ndim), 0, rows)
        product = jnp.reshape(lax.optimization_barrier(matrix), y.shape)
        total = lax.optimization_barrier(product).astype(wide)
        for u, v in zip(lax.split(left, ones, -1), lax.split(right, ones), strict=True):
            total += u * v
        # Without the barrier all operations that read the total would compute it again.
        return lax.optimization_barrier(total.astype(y.dtype))

    product = lambda y, h, b: y + _outer(h, b, precision, y.dtype)
    return lax.platform_dependent(y, h, b, cpu=columns, default=product)


@add.defjvp
def _add_jvp(precision: Any, primals: Any, tangents: Any) -> Any:
    """Reshapes the rows for the gradient of b, a sum over them, to one dimension.

    For a sum over several, XLA for CPU makes a transposed copy of y's cotangent, and a
    step takes 1.08 instead of 0.61 of the full one's time. The rest keeps its
    dimensions: with matrices XLA for TPU accesses 5 % more bytes (GPT-2 medium, 4 x
    1,024 tokens, v5e).
    """
    (y, h, b), (dy, dh, db) = primals, tangents
    flat = lambda x: jnp.reshape(x, (-1, x.shape[-1]))
    with x64([y.dtype]):
        by_h = _outer(dh, b, precision, y.dtype)
        by_b = jnp.reshape(_outer(flat(h), flat(db), precision, y.dtype), y.shape)
        return add(y, h, b, precision), dy + by_h + by_b


def _outer(h: jax.Array, b: jax.Array, precision: Any, dtype: Any) -> jax.Array:
    """`h b`: (*rows, r) and (*columns, r) to (*rows, *columns)."""
    out = list(range(h.ndim + b.ndim - 2))
    rows, columns = out[: h.ndim - 1], out[h.ndim - 1 :]
    product = einsum(h, [*rows, RANK], b, [*columns, RANK], out, precision, dtype)
    return product.astype(dtype)


def is_explicit(x: jax.Array) -> bool:
    """Whether x is on a mesh with explicit axes, where shardings are part of types."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def _spec(labels: Labels, *operands: tuple[jax.Array, Labels]) -> NamedSharding:
    """The result's sharding on a mesh with explicit axes, from that of its operands."""
    axes: dict[int, Any] = {}
    for array, its_labels in operands:
        for n, names in zip(its_labels, jax.typeof(array).sharding.spec, strict=True):
            taken = {name for other in axes.values() for name in _names(other)}
            if n in labels and n not in axes and taken.isdisjoint(_names(names)):
                axes[n] = names
    mesh = jax.typeof(operands[0][0]).sharding.mesh
    return NamedSharding(mesh, PartitionSpec(*(axes.get(n) for n in labels)))


def _names(axes: Any) -> tuple[str, ...]:
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)
