"""Views of quantized arrays: on codes and scales where the blocks allow it.

The scale is a companion of the codes, so most views take its rule from companions.py.
The rest is here: what has several operands, and what only a scale can do. A rule takes
the parameters of an equation, its operands, and `plain`, the equation as a function of
plain operands. It returns the results, or None: then the array is dequantized for this
one use.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax._engine import companions
from lora_jax._engine.companions import LEAST, sharding_of
from lora_jax._engine.dtypes import digits, promoted
from lora_jax._engine.quantized import (
    Quantized,
    blocks,
    dequantize,
    is_quantized,
    spread,
)

QuantizedRule = Callable[..., list[Any] | None]


def bind(
    primitive: str, params: dict[str, Any], args: list[Any], plain: Any
) -> list[Any]:
    """Evaluates an equation on quantized operands: as a view, or on plain arrays.

    Only the first operand of a view is quantized, except for `SEVERAL`. Empty arrays
    have no blocks, and are plain.
    """
    args = [_plain_if_empty(x) for x in args]
    quantized = [*map(is_quantized, args)]
    results = None
    if primitive in SEVERAL and any(quantized):
        results = SEVERAL[primitive](params, *args, plain=plain)
    elif quantized[0] and not any(quantized[1:]):
        rule = RULES.get(primitive, _follow if primitive in companions.RULES else None)
        results = rule and rule(params, *args, plain=plain, primitive=primitive)
    if results is None:
        results = plain([dequantize(x) for x in args])
    return [_plain_if_empty(x) for x in results]


def constrained(x: Any, sharding: Any) -> Any:
    """`lax.with_sharding_constraint` for both parts."""
    if not isinstance(x, Quantized):
        return lax.with_sharding_constraint(x, sharding)
    at = sharding, sharding_of(x.scale.shape, sharding)
    parts = map(lax.with_sharding_constraint, (x.values, x.scale), at)
    return _with(x, *parts)


def part_specs(x: Quantized, spec: PartitionSpec, mesh: Any) -> tuple[Any, Any] | None:
    """An array's sharding for both parts, or None if it would cut a block."""
    sizes = x.scale.shape
    if companions.is_cut_within_blocks(sizes, spec, mesh):
        return None
    return spec, companions.spec_of(sizes, spec, mesh)


def wide_scaled(x: Quantized) -> Quantized:
    """The same array, with scales as wide as those of its product with a number."""
    dtype = promoted(x.scale.dtype, jnp.float32, x.dtype)
    return dataclasses.replace(x, scale=x.scale.astype(dtype))


def _plain_if_empty(x: Any) -> Any:
    return dequantize(x) if is_quantized(x) and 0 in x.shape else x


def _with(x: Quantized, values: Any, scale: Any) -> Quantized:
    return dataclasses.replace(x, values=values, scale=scale)


def _follow(
    params: Any, x: Any, *others: Any, plain: Any, primitive: str
) -> list[Any] | None:
    """A view whose scales follow by the rule for companions."""
    values = plain([x.values, *others])
    new = [v.shape for v in values]
    rule = companions.RULES[primitive]
    scales = rule(x.scale, x.shape, new, *others, **params)
    if scales is None:
        return None
    return [_with(x, v, s) for v, s in zip(values, scales, strict=True)]


def _gather(
    params: Any, x: Any, indices: Any, *, plain: Any, primitive: str
) -> list[Any] | None:
    """Rows whose codes are 0 out of bounds, and whose scales are the fill value there.

    Their product is the fill value then, if that is 0 or NaN. A scale that the rows
    share is not looked up, and fills in nothing.
    """
    if params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        numbers, fill = params["dimension_numbers"], params["fill_value"]
        named = (*numbers.start_index_map, *numbers.operand_batching_dims)
        shared = any(x.scale.shape[d] < x.shape[d] for d in named)
        if fill != 0 and (shared or not (fill is None or np.isnan(fill))):
            return None
    rule = companions.RULES["gather"]
    values = lax.gather(x.values, indices, **params | {"fill_value": 0})
    scales = rule(x.scale, x.shape, [values.shape], indices, **params)
    return scales and [_with(x, values, scales[0])]


def _convert(params: Any, x: Any, *, plain: Any, primitive: str) -> list[Any] | None:
    dtype = jnp.dtype(params["new_dtype"])
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return [dataclasses.replace(x, dtypes=(*x.dtypes, dtype))]


def _constrained(params: Any, x: Any, *, plain: Any, primitive: str) -> list[Any]:
    return [constrained(x, params["sharding"])]


def _reshard(params: Any, x: Any, *, plain: Any, primitive: str) -> list[Any]:
    to = sharding_of(x.scale.shape, params["dst_sharding"])
    (values,) = plain([x.values])
    return [_with(x, values, jax.sharding.reshard(x.scale, to))]


def _device_put(params: Any, *xs: Any, plain: Any) -> list[Any]:
    def move(x, to):
        if to is None:
            # `device_put` would commit a concrete array to its current device, which
            # can conflict with a sharding constraint later.
            return x if isinstance(x, Quantized) else jnp.asarray(x)
        if not isinstance(x, Quantized):
            return jax.device_put(x, to)
        at = sharding_of(x.scale.shape, to)
        return _with(x, jax.device_put(x.values, to), jax.device_put(x.scale, at))

    return list(map(move, xs, params["devices"]))


def _concatenate(params: Any, *xs: Any, plain: Any) -> list[Any] | None:
    return _side_by_side(xs, params["dimension"], plain)


def _stack(params: Any, *xs: Any, plain: Any) -> list[Any] | None:
    axis = params["axis"]
    if not all(map(is_quantized, xs)):
        return None
    rows = [jax.tree.map(lambda y: lax.expand_dims(y, [axis]), x) for x in xs]
    return _side_by_side(rows, axis, lambda values: [lax.concatenate(values, axis)])


def _side_by_side(xs: Sequence[Any], axis: int, plain: Any) -> list[Any] | None:
    first = xs[0]
    if not all(map(is_quantized, xs)):
        return None
    if len({(x.format, x.dtypes) for x in xs}) > 1:
        return None
    # Along each dimension the blocks of the result divide those of all operands.
    for d in range(first.ndim):
        block = math.gcd(*(blocks(x)[d] for x in xs))
        if block < min(LEAST, *(blocks(x)[d] for x in xs)):
            return None
        xs = [spread(x, d, block) for x in xs]
    wide = promoted(*(x.scale.dtype for x in xs))
    scale = lax.concatenate([x.scale.astype(wide) for x in xs], axis)
    (values,) = plain([x.values for x in xs])
    return [_with(first, values, scale)]


def _scaled(params: Any, *args: Any, plain: Any, by: Any) -> list[Any] | None:
    """Negation, or a product with a number, or with one number per scale."""
    x, *others = sorted(args, key=lambda y: not is_quantized(y))
    if x is not args[0] and by is jnp.divide:
        return None
    if others and len({*map(digits, x.dtypes)}) > 1:
        return None  # the product of a rounded array is another one rounded later

    def fits(y):
        sizes = zip(jnp.shape(y), x.scale.shape, strict=False)
        broadcasts = jnp.ndim(y) in (0, x.ndim) and all(n in (1, m) for n, m in sizes)
        return broadcasts and not is_quantized(y) and not jnp.iscomplexobj(y)

    if not all(map(fits, others)):
        return None
    dtype = promoted(x.scale.dtype, *[jnp.float32, x.dtype] * len(others))
    others = [jnp.asarray(y, dtype) for y in others]
    return [_with(x, x.values, by(x.scale.astype(dtype), *others))]


RULES: dict[str, QuantizedRule] = {
    "convert_element_type": _convert,
    "gather": _gather,
    "sharding_constraint": _constrained,
    "reshard": _reshard,
}
# Primitives that accept a quantized array as any operand.
SEVERAL: dict[str, QuantizedRule] = {
    "concatenate": _concatenate,
    "stack": _stack,
    "neg": functools.partial(_scaled, by=jnp.negative),
    "mul": functools.partial(_scaled, by=jnp.multiply),
    "div": functools.partial(_scaled, by=jnp.divide),
    "device_put": _device_put,
}
