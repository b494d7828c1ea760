"""Products with an adapted weight: one rule per primitive.

A rule returns the product as an array, computed from the factors where that is cheaper
than from the materialized weight. None: the weight has to be materialized.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._engine import factors, low_rank, ops
from lora_jax._engine.factors import Factors, is_factors, materialize
from lora_jax._engine.jaxpr import shapes
from lora_jax._engine.quantized import dequantize, is_quantized, through
from lora_jax._engine.run import Rule, Run, materialize_one
from lora_jax._engine.shapes import size


def _dot_general(
    run: Run, lhs: Any, rhs: Any, *, dimension_numbers: Any, **params: Any
) -> list[Any] | None:
    if is_factors(lhs) and is_factors(rhs):
        # The one with an adapter stays factored, and of two adapters the larger.
        if (lhs.rank > 0, size(lhs.shape)) < (rhs.rank > 0, size(rhs.shape)):
            lhs = materialize_one(run, lhs, "dot_general")
        else:
            rhs = materialize_one(run, rhs, "dot_general")
    swap = is_factors(lhs)
    x, f = (rhs, lhs) if swap else (lhs, rhs)
    drop, (contracted, batch) = _dropout(run), dimension_numbers
    gain = {*factors.gain_dims(f)} - {*batch[not swap]}
    sums = contracted[not swap]
    if gain.intersection(sums) and not gain.issubset(sums):
        return None  # a gain of contracted and of free dimensions is on neither side
    product = lambda w: run.bind(w, x) if swap else run.bind(x, w)
    if drop is None and factors.adapted_dims(f).isdisjoint(sums):
        # An outer product has an element for each element of the weight and of x, and
        # the factors would compute each of them once per rank.
        return product(materialize(f))
    if drop is None:
        cheap = _without_factors(run, product, x, f, dimension_numbers, swap)
        if cheap is not None:
            return cheap
    params |= {"dimension_numbers": dimension_numbers, "looped": run.looped}
    return [ops.dot_general(x, f, swap=swap, drop=drop, **params)]


def _without_factors(
    run: Run, product: Any, x: Any, f: Factors, numbers: Any, swap: bool
) -> list[Any] | None:
    """The product with W + scale * A B as one array, where the factors cost more.

    That is so where a side of the weight is short (coordinates, routers, heads of two
    classes), where many small weights are concatenated, and where experts are averaged.
    In fewer digits than float32 the sum would round the update away. There the update
    is an array of its own, which has to save more to be worthwhile; in one byte it
    would be rounded too much itself.
    """
    if not f.rank or f.dtype.itemsize < 2 or low_rank.is_explicit(x):
        return None
    base, extra = ops.dot_general_flops(x, f, numbers, swap)
    if not is_quantized(f.w) and f.dtype.itemsize > 3:
        if not ops.is_dearer(base, extra, f):
            return None
        return product(materialize(f))
    if f.gain is not None or extra - base < ops.WORTHWHILE + factors.delta_flops(f):
        return None
    with_weight = lambda x, w: (run.bind(w, x) if swap else run.bind(x, w))[0]
    y = through(with_weight, x, f.w, looped=run.looped)
    return [y + with_weight(x, factors.delta(f).astype(f.dtype))]


def _gather(run: Run, f: Any, indices: Any, **params: Any) -> list[Any] | None:
    if not is_factors(f):
        return None
    dnums, (shape,) = params["dimension_numbers"], shapes(run.eqn)[1]
    named = dnums.start_index_map
    looked_up = not factors.batch_dims(f).issuperset(named)
    if looked_up and size(shape) > size(f.shape):
        # More rows than the table has, as for positions or for a few token types: the
        # materialized table is smaller than the rows.
        return run.bind(materialize(f), indices)
    fills = params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    if fills and not factors.adapted_dims(f).issuperset(named):
        return None  # neither factor could leave out what is out of bounds
    found = ops.gather(f, indices, **params)
    if not looked_up:
        return [found]  # one layer or expert of a stack, which is a weight still
    # The rows of an embedding have as many elements in the plain function, so that
    # adding the low-rank product to them takes no more memory.
    rows = materialize(found)
    if not fills:
        return [rows]
    # A fill value has no adapter: its gradient must not reach one, least of all NaN.
    inside = ops.inside(f, indices, dnums, params["slice_sizes"])
    return [jnp.where(inside, rows, dequantize(found.w))]


def _conv_general_dilated(run: Run, x: Any, f: Any, **params: Any) -> list[Any] | None:
    if is_factors(x):
        return None
    options = {"drop": _dropout(run), "looped": run.looped}
    y = ops.conv_general_dilated(x, f, **options, **params)
    return None if y is None else [y]


def _ragged_dot_general(
    run: Run, x: Any, f: Any, sizes: Any, **params: Any
) -> list[Any] | None:
    if is_factors(x) or is_factors(sizes):
        return None
    options = {"drop": _dropout(run), "looped": run.looped}
    y = ops.ragged_dot_general(x, f, sizes, **options, **params)
    return None if y is None else [y]


def _dropout(run: Run) -> Callable[[jax.Array], jax.Array] | None:
    if (key := run.key) is None:
        return None

    def drop(x):
        keep = jax.random.bernoulli(key, 1 - run.rate, x.shape)
        return jnp.where(
            keep, x / jnp.asarray(1 - run.rate, x.dtype), jnp.zeros_like(x)
        )

    return drop


PRODUCTS: dict[str, Rule] = {
    "dot_general": _dot_general,
    "gather": _gather,
    "conv_general_dilated": _conv_general_dilated,
    "ragged_dot_general": _ragged_dot_general,
}
