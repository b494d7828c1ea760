"""What becomes of an adapted weight that meets a product: one rule per primitive.

A rule takes the equation and its operands, of which at least one is `Factors`, and
gives the results. `None`: the weight has to be materialised.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._engine import factors, ops, thin
from lora_jax._engine.factors import Factors, materialize
from lora_jax._engine.jaxpr import bind, shapes
from lora_jax._engine.quantized import dequantize, is_quantized
from lora_jax._engine.run import Rule, Run, plain_one
from lora_jax._engine.shapes import size


def _dot_general(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    lhs, rhs = operands
    if isinstance(lhs, Factors) and isinstance(rhs, Factors):
        # One without an adapter loses nothing, and the larger loses most.
        if (lhs.rank > 0, size(lhs.shape)) < (rhs.rank > 0, size(rhs.shape)):
            lhs = plain_one(run, lhs, "dot_general")
        else:
            rhs = plain_one(run, rhs, "dot_general")
    swap = isinstance(lhs, Factors)
    x, f = (rhs, lhs) if swap else (lhs, rhs)
    drop, (sums, batches) = _dropout(run), eqn.params["dimension_numbers"]
    own = {*factors.gained(f)} - {*batches[not swap]}
    if own.intersection(sums[not swap]) and not own.issubset(sums[not swap]):
        return None  # a gain of what is summed and of what is not: on neither side
    if drop is None and factors.varying(f).isdisjoint(sums[not swap]):
        # An outer product: the plain one forms as many numbers as the weight has, times
        # those of x, and the factors would form them once for each rank.
        whole = materialize(f)
        return bind(eqn, [whole, x] if swap else [x, whole])
    if drop is None and (cheap := _without_factors(eqn, x, f, swap)) is not None:
        return cheap
    options = {"swap": swap, "drop": drop, "looped": run.looped}
    return [ops.dot_general(x, f, **options, **eqn.params)]


def _without_factors(eqn: Any, x: Any, f: Factors, swap: bool) -> list[Any] | None:
    """The product with W + scale * A B as one array, where the factors cost more.

    That is so where a side of the weight is short (coordinates, routers, heads of two
    classes), where many small weights are concatenated, and where experts are averaged.
    A weight of fewer digits than float32 would round the update away, so there the
    update is an array of its own, next to W, and pays later; but of a byte it would be
    rounded too much itself.
    """
    if not f.rank or f.dtype.itemsize < 2 or thin.is_explicit(x):
        return None
    base, extra = ops.dot_general_flops(x, f, eqn.params["dimension_numbers"], swap)
    product = lambda w: bind(eqn, [w, x] if swap else [x, w])
    if not is_quantized(f.w) and f.dtype.itemsize > 3:
        if not ops.is_dearer(base, extra, f):
            return None
        return product(materialize(f))
    if f.gain is not None or extra - base < ops.WORTHWHILE + factors.delta_flops(f):
        return None
    (y,), (update,) = product(f.w), product(factors.delta(f).astype(f.dtype))
    return [y + update]


def _gather(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    f, indices = operands
    if not isinstance(f, Factors):
        return None
    named, (shape,) = eqn.params["dimension_numbers"].start_index_map, shapes(eqn)[1]
    looked_up = not factors.stacked(f).issuperset(named)
    if looked_up and size(shape) > size(f.shape):
        # More rows than the table has, as of positions or of a few kinds of token: one
        # table takes less than them.
        return bind(eqn, [materialize(f), indices])
    fills = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    if fills and not factors.varying(f).issuperset(named):
        return None  # out of bounds where neither factor has a number to leave out
    found = ops.gather(f, indices, **eqn.params)
    if not looked_up:
        return [found]  # one layer, or expert, of a stack: a weight still
    # The rows of an embedding. The plain function forms as many numbers, so that adding
    # the thin product to them takes no more memory.
    rows = materialize(found)
    if not fills:
        return [rows]
    # No adapter learns of what is filled in, least of all where that is NaN.
    windows = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    return [jnp.where(ops.inside(f, indices, *windows), rows, dequantize(found.w))]


def _conv(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    x, f = operands
    if isinstance(x, Factors):
        return None
    options = {"drop": _dropout(run), "looped": run.looped}
    y = ops.conv_general_dilated(x, f, **options, **eqn.params)
    return None if y is None else [y]


def _ragged_dot(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    x, f, sizes = operands
    if isinstance(x, Factors) or isinstance(sizes, Factors):
        return None
    options = {"drop": _dropout(run), "looped": run.looped}
    y = ops.ragged_dot_general(x, f, sizes, **options, **eqn.params)
    return None if y is None else [y]


def _dropout(run: Run) -> Callable[[jax.Array], jax.Array] | None:
    if run.key is None:
        return None

    def drop(x):
        keep = jax.random.bernoulli(run.key, 1 - run.rate, x.shape)
        return jnp.where(
            keep, x / jnp.asarray(1 - run.rate, x.dtype), jnp.zeros_like(x)
        )

    return drop


PRODUCTS: dict[str, Rule] = {
    "dot_general": _dot_general,
    "gather": _gather,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged_dot,
}
