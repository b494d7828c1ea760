"""Several weights as one: side by side, or added up.

The factors of the parts become those of the result. Where that is impossible the
functions return None, and the weights are materialized.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._engine.dtypes import wider
from lora_jax._engine.factors import (
    Factors,
    batch_dims,
    dims_of,
    gain_dims,
    is_factors,
    joined,
    without_adapter,
)


def concatenate(parts: Sequence[Any], w: jax.Array, axis: int) -> Factors | None:
    """Weights, and plain arrays, side by side as the one weight `w`.

    Along an input, outputs stay apart: `a` becomes block diagonal and the ranks add up,
    except for pieces of one weight, which share their `b`. Along an output the same
    holds with `a` and `b` exchanged. Along a stack both are stacked.
    """
    if not any(is_factors(x) and x.rank for x in parts):
        return without_adapter(w, joined(x.name for x in parts if is_factors(x)))
    parts = [x.w if is_factors(x) and not x.rank else x for x in parts]
    first = next(x for x in parts if is_factors(x))
    parts = [_in_order_of(first, x, axis) if is_factors(x) else x for x in parts]
    weights = [x for x in parts if is_factors(x)]
    roles = {_roles(f, axis) for f in weights}
    owned = [(axis in dims_of(f.a), axis in dims_of(f.b)) for f in weights]
    in_a, in_b = map(any, zip(*owned, strict=True))
    stack = in_a == in_b
    if 0 in w.shape or len(roles) > 1 or (stack and any(i != o for i, o in owned)):
        return None
    if any(f.gain is not None and axis not in gain_dims(f) for f in weights):
        return None  # side by side along the inputs, each output would have two gains
    owner, other = ("a", "b") if in_a and not in_b else ("b", "a")
    dtype = wider(*(getattr(f, n).dtype for f in weights for n in "ab"))
    others = [getattr(f, other) for f in weights]
    together = stack or all(x is others[0] for x in others)
    ranks = [x.rank if is_factors(x) else 0 for x in parts]
    rank = max(ranks) if together else sum(ranks)

    def side_by_side(name):
        pieces, low = [], 0
        for x, r in zip(parts, ranks, strict=True):
            long = lambda shape, n=x.shape[axis]: (*shape[:axis], n, *shape[axis + 1 :])
            if is_factors(x):
                factor = getattr(_folded(x, owner), name).astype(dtype)
                factor = jnp.broadcast_to(factor, long(factor.shape))
                edges = [(0, 0, 0)] * w.ndim + [(low, rank - low - r, 0)]
                pieces.append(lax.pad(factor, jnp.zeros((), dtype), edges))
            else:
                shape = getattr(weights[0], name).shape[:-1]
                pieces.append(jnp.zeros((*long(shape), rank), dtype))
            low += 0 if together else r
        return lax.concatenate(pieces, axis)

    new = {owner: side_by_side(owner)}
    if stack:
        new[other] = side_by_side(other)
    elif together:
        new[other] = others[0]
    else:
        new[other] = lax.concatenate([x.astype(dtype) for x in others], w.ndim)
    gain, name = _gains(parts, w, axis), joined(f.name for f in weights)
    return Factors(w, new["a"], new["b"], _one(w), name, gain)


def _gains(parts: Sequence[Any], w: jax.Array, axis: int) -> jax.Array | None:
    """The gains of weights and plain arrays side by side, 1 where there is none."""
    dims = {d for x in parts if is_factors(x) for d in gain_dims(x)}
    if not dims:
        return None
    pieces = []
    for x in parts:
        sizes = [n if d in dims else 1 for d, n in enumerate(w.shape)]
        sizes[axis] = x.shape[axis]
        gain = x.gain if is_factors(x) else None
        gain = jnp.ones((1,) * w.ndim) if gain is None else gain
        pieces.append(jnp.broadcast_to(gain, sizes))
    dtype = wider(*(x.dtype for x in pieces))
    return lax.concatenate([x.astype(dtype) for x in pieces], axis)


def add(f: Factors, g: Factors, w: jax.Array) -> Factors | None:
    """The sum `w` of two weights: their ranks add up, unless they share a factor."""
    if f.gain is not None or g.gain is not None:
        return None
    if not (f.rank and g.rank):
        return dataclasses.replace(f if f.rank else g, w=w)
    name = joined([f.name, g.name])
    for kept, shared in (("a", "b"), ("b", "a")):
        if getattr(f, shared) is getattr(g, shared):
            f, g = _folded(f, kept), _folded(g, kept)
            total = getattr(f, kept) + getattr(g, kept)
            same = dataclasses.replace(f, w=w, name=name)
            return dataclasses.replace(same, **{kept: total})
    g = _in_order_of(f, g)
    a, b = ({*dims_of(x)} | {*dims_of(y)} for x, y in ((f.a, g.a), (f.b, g.b)))
    if a & b != batch_dims(f) | batch_dims(g):
        return None
    f, g = _folded(f, "b"), _folded(g, "b")
    dtype = wider(*(x.dtype for x in (f.a, f.b, g.a, g.b)))

    def both(x, y, kept):
        sizes = [n if d in kept else 1 for d, n in enumerate(w.shape)]
        wide = [
            jnp.broadcast_to(z, (*sizes, z.shape[-1])).astype(dtype) for z in (x, y)
        ]
        return lax.concatenate(wide, w.ndim)

    return Factors(w, both(f.a, g.a, a), both(f.b, g.b, b), _one(w), name)


def _roles(f: Factors, axis: int | None = None) -> tuple[frozenset[int], ...]:
    """The dimensions that each factor has, without `axis`."""
    return tuple(frozenset(dims_of(x)) - {axis} for x in (f.a, f.b))


def _in_order_of(like: Factors, f: Factors, axis: int | None = None) -> Factors:
    """The weight `f`, with `a` and `b` exchanged if that matches `like`.

    A transposed weight has its inputs in `b`.
    """
    swapped = dataclasses.replace(f, a=f.b, b=f.a)
    same = _roles(f, axis) != _roles(like, axis) == _roles(swapped, axis)
    return swapped if same else f


def _folded(f: Factors, name: str) -> Factors:
    """The same weight with its scale multiplied into `a` or `b`, in float32."""
    x, scale = getattr(f, name), f.scale
    dtype = wider(x.dtype, scale.dtype)
    x = x.astype(dtype) * scale.astype(dtype)
    return dataclasses.replace(f, **{name: x}, scale=_one(f.w))


def _one(w: jax.Array) -> jax.Array:
    return jnp.ones((1,) * (w.ndim + 1), jnp.float32)
