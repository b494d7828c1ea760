"""Views of an adapted weight, and what else keeps it factored: one rule per primitive.

Most views take their rule from companions.py, since factors, scale and gain follow
their weight. The rest is here: what changes the weight's storage or place, what has
several operands, and what only factors can do. A rule returns `Factors`. None: the
weight has to be materialized.
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
from jax.sharding import NamedSharding

from lora_jax._engine import companions, factors, joins
from lora_jax._engine.dtypes import digits, wider
from lora_jax._engine.factors import (
    Factors,
    follow,
    is_factors,
    parts,
    with_parts,
)
from lora_jax._engine.jaxpr import result_dtypes, shapes, varying_axes
from lora_jax._engine.products import PRODUCTS
from lora_jax._engine.run import Note, Rule, Run, line_of, note, weights
from lora_jax._engine.shapes import segments, size

LARGE = 2**13  # elements of a weight, below which its factors are kept


# The weight itself takes the view by its equation (`run.bind`), with all of JAX's
# parameters, and its companions take it by their rule. If the adapted array is not the
# first operand, as in `x[w]` with adapted indices, it is no view of a weight.


def _follow(run: Run, f: Any, *others: Any, **params: Any) -> list[Any] | None:
    if not is_factors(f):
        return None
    rule = companions.RULES[run.eqn.primitive.name]
    return follow(f, run.bind(f.w, *others), rule, *others, **params)


def _reshape(run: Run, f: Factors, **params: Any) -> list[Any] | None:
    """A reshape that may merge a dimension along which all parts repeat themselves.

    As in `jnp.repeat`, where a companion that has the other dimensions of the merge has
    to be repeated along this one.
    """
    (w,) = run.bind(f.w)
    order, adapted = params.get("dimensions") or range(f.ndim), factors.adapted_dims(f)
    if 0 in f.shape:
        return [w]
    merges = [*segments(tuple(f.shape[d] for d in order), w.shape)]

    def repeat(c):
        sizes = [*c.shape]
        for merged, _ in merges:
            dims = [order[i] for i in merged]
            if any(c.shape[d] != 1 for d in dims):
                for d in {*dims} - adapted:
                    sizes[d] = f.shape[d]
        return jnp.broadcast_to(c, sizes)

    long = with_parts(f, f.w, map(repeat, parts(f)))
    return follow(long, [w], companions.reshape, **params)


def _on_weight(run: Run, f: Factors, **_: Any) -> list[Any]:
    """Changes the weight's storage, and not the factors'."""
    (w,) = run.bind(f.w)
    return [dataclasses.replace(f, w=w)]


# A cast to bfloat16 or float16 on the way to a product is applied to W alone, and the
# factors keep the digits that they have: the product is right up to the rounding of the
# new type. That is wrong where the rounding is the result. It is in one byte or less,
# which functions use to quantize; where a rounded weight meets the weight itself again
# (`run.exact`: casts.py finds these before the evaluation begins); and where it is cast
# back to more digits and added to something, as in a straight-through estimator.


def _convert_element_type(
    run: Run, f: Factors, *, new_dtype: Any, **_: Any
) -> list[Any] | None:
    if not jnp.issubdtype(new_dtype, jnp.inexact) or new_dtype.itemsize < 2:
        return None
    left = digits(new_dtype)
    if left < digits(f.dtype):
        exact = run.exact or ()
        if id(run.eqn) in exact or run.leads_to(run.eqn, *_is_summed_in_more(left)):
            return None
        name = "convert_element_type"
        note(run, Note(f.name, name, line_of(run), False, alone=True))
    return _on_weight(run, f)


@functools.cache
def _is_summed_in_more(few: int) -> tuple[Callable[[Any], bool] | bool, ...]:
    """The question to `leads_to` whether a rounded weight is summed in more digits.

    It may be, wherever a cached call or a loop returns it. Cached, so that equal
    questions are the same object and share one walk.
    """

    def is_sum(eqn):
        named = eqn.primitive.name in ("add", "sub")
        return named and digits(result_dtypes(eqn)[0]) > few

    return is_sum, lambda eqn: not is_product(eqn), True


@functools.cache
def _is_cast_to_fewer(many: int) -> tuple[Callable[[Any], bool] | bool, ...]:
    """The question to `leads_to` whether digits of a difference are cast away."""

    def is_cast(eqn):
        return is_view(eqn) and digits(result_dtypes(eqn)[0]) < many

    return is_cast, is_view, True


def _reduce_precision(
    run: Run, f: Factors, *, exponent_bits: int, mantissa_bits: int
) -> list[Any] | None:
    """No change where all digits are kept, as JAX itself writes it for residuals."""
    held = jnp.finfo(f.dtype)
    if exponent_bits < held.nexp or mantissa_bits < held.nmant:
        return None
    return _on_weight(run, f)


# Placement. The weight goes where the equation sends it, and its companions to the same
# devices: to a spec with only the dimensions that they have. A weight can live in the
# hosts' memory while it is not used; factors are small, and XLA computes with them.


def _device_put(run: Run, *operands: Any, devices: Any, **_: Any) -> list[Any]:
    """The factors follow to the same devices, but never into the hosts' memory."""
    moved = zip(operands, run.bind(*weights(operands)), devices, strict=True)
    return [factors.device_put(x, w, to) if is_factors(x) else w for x, w, to in moved]


def _reshard(run: Run, f: Factors, *, dst_sharding: Any, **_: Any) -> list[Any]:
    """Each companion goes where the weight goes, along the dimensions they share."""
    (w,), mesh = run.bind(f.w), dst_sharding.mesh
    specs = factors.part_sharding(f, dst_sharding.spec, mesh)
    pairs = zip(parts(f), specs, strict=True)
    moved = [jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in pairs]
    return [with_parts(f, w, moved)]


def _on_each(run: Run, *operands: Any, **_: Any) -> list[Any]:
    """Identities that matter for gradients or memory, on the weight and each companion.

    A barrier keeps all its operands together. JAX 0.9 accepts only operands that vary
    along the same axes of `shard_map`, and a factor may vary along fewer than its
    weight: there is one barrier for each set of axes.
    """
    leaves, treedef = jax.tree.flatten(operands)
    results = list(leaves)
    together = run.eqn.primitive.multiple_results
    kinds = [varying_axes(x) if together else i for i, x in enumerate(leaves)]
    for one in dict.fromkeys(kinds):
        places = [i for i, kind in enumerate(kinds) if kind == one]
        bound = run.bind(*(leaves[i] for i in places))
        for i, result in zip(places, bound, strict=True):
            results[i] = result
    return [*treedef.unflatten(results)]


def _pvary(run: Run, *operands: Any, axes: Any, **_: Any) -> list[Any]:
    """Within `shard_map`, marks equal parts as different from device to device."""

    def vary(x):
        return x if {*axes} <= varying_axes(x) else run.bind(x)[0]

    return [jax.tree.map(vary, x) for x in operands]


# Views with several operands. A plain array next to an adapted one counts as a weight
# without an update, so that fused projections stay factored if only some are adapted.


def _pad(run: Run, f: Any, padding: Any, *, padding_config: Any) -> list[Any] | None:
    if not is_factors(f) or is_factors(padding):
        return None
    changed = [d for d, edges in enumerate(padding_config) if any(edges)]
    if not factors.adapted_dims(f).issuperset(changed) or f.gain is not None:
        return None  # the update and the gain would extend into the padding

    def pad(c, old, new):
        pads = [
            edges if c.shape[d] != 1 else (0, 0, 0)
            for d, edges in enumerate(padding_config)
        ]
        if not any(map(any, pads)):
            return [c]
        extra = [(0, 0, 0)] * (c.ndim - len(old))
        return [lax.pad(c, jnp.zeros((), c.dtype), [*pads, *extra])]

    return follow(f, run.bind(f.w, padding), pad)


def _concatenate(run: Run, *operands: Any, dimension: int) -> list[Any] | None:
    return _side_by_side(run, operands, operands, dimension)


def _stack(run: Run, *operands: Any, axis: int) -> list[Any] | None:
    expand = lambda x: lax.expand_dims(x, [axis])

    def row(x):
        if not is_factors(x):
            return expand(x)
        w = jax.tree.map(expand, x.w)
        (row,) = follow(x, [w], lambda c, old, new: [expand(c)]) or [None]
        return row

    return _side_by_side(run, operands, [*map(row, operands)], axis)


def _side_by_side(
    run: Run, operands: Sequence[Any], rows: Sequence[Any], axis: int
) -> list[Any] | None:
    """Weights as one, as fused projections are: each keeps its own rank."""
    if not _is_weight(run, operands):
        return None
    (w,) = run.bind(*weights(operands))
    return _unless_grown(run, joins.concatenate(rows, w, axis), operands)


def _unless_grown(
    run: Run, f: Factors | None, operands: Sequence[Any]
) -> list[Any] | None:
    """A weight made of several, unless the sum of their ranks is too large for it.

    Each product with it takes as many FLOPs for each row as its factors have elements.
    Where those are more than a quarter of the weight's own, the weights are cheaper as
    arrays (see `ops.is_dearer`). An array of fewer digits than float32 would round the
    update away, so there the factors stay until they are larger than the weight.
    """
    adapted = [x for x in operands if is_factors(x)]
    if f is None or f.rank == max(x.rank for x in adapted):
        return None if f is None else [f]
    full = size(f.shape[d] for d in factors.adapted_dims(f))
    elements = size(f.a.shape) + size(f.b.shape)
    if elements > full:
        return None
    if 4 * elements <= full or full < LARGE or f.dtype.itemsize < 4:
        return [f]
    for x in adapted:
        cost, name = factors.delta_flops(x), run.eqn.primitive.name
        note(run, Note(x.name, name, line_of(run), True, cost, cheaper=True))
    return run.bind(*(factors.materialize(x) if is_factors(x) else x for x in operands))


def _is_weight(run: Run, operands: Sequence[Any]) -> bool:
    """Whether weights, together with plain arrays, still make a weight.

    They do where a product awaits the result. Otherwise the result is an activation, as
    where a table of positions is added to each example, or a token is put in front of
    it: in factors it would be materialized by every operation that follows.
    """
    adapted = [x for x in operands if is_factors(x)]
    trivial = lambda x: np.ndim(x) == 0 or 0 in np.shape(x)
    if len(adapted) == len(operands) or any(map(trivial, operands)):
        return True
    (shape,) = shapes(run.eqn)[1]
    for f in adapted:
        if any(n != 1 for d, n in enumerate(shape) if d not in factors.adapted_dims(f)):
            return False  # the weight repeats itself, for each example of a batch
    return run.leads_to(run.eqn, is_product, keeps)


def _reduce_sum(run: Run, f: Factors, *, axes: Any, **_: Any) -> list[Any] | None:
    if factors.batch_dims(f).intersection(axes):
        return None  # a sum over layers or experts is no product of two factors
    if {*factors.gain_dims(f)}.intersection(axes):
        return None
    repeats = math.prod(f.shape[d] for d in axes if d not in factors.adapted_dims(f))
    views = follow(f, run.bind(f.w), lambda c, old, new: [jnp.sum(c, axes)])
    return views and [
        dataclasses.replace(x, scale=x.scale * repeats) if is_factors(x) else x
        for x in views
    ]


# Arithmetic. A term that is added changes W alone and leaves the update. A number that
# multiplies goes into the scale, and one number per channel into the factor with that
# channel. The gain multiplies the whole sum, so nothing can be added after it.


def _add(run: Run, f: Any, g: Any, **_: Any) -> list[Any] | None:
    """A sum or difference of a weight and a number, an array or another weight."""
    minus = run.eqn.primitive.name == "sub"
    if not _is_weight(run, (f, g)):
        return None
    if any(is_factors(x) and x.gain is not None for x in (f, g)):
        return None  # the gain would multiply the other term
    (w,) = run.bind(*weights((f, g)))
    both = is_factors(f) and is_factors(g)
    if not both and run.leads_to(run.eqn, *_is_cast_to_fewer(digits(w.dtype))):
        # The array may be nearly +-(W + A B). Then little is left of the sum, and more
        # of W, whose digits the cast would remove.
        return None
    operands = f, g  # as the equation has them, where they are materialized
    if is_factors(g) and minus:
        g = dataclasses.replace(g, scale=-g.scale)
    if not both:
        return [dataclasses.replace(g if is_factors(g) else f, w=w)]
    return _unless_grown(run, joins.add(f, g, w), operands)


def _scale(run: Run, *operands: Any, **_: Any) -> list[Any] | None:
    """Negation, multiplication or division by a number, or by one for each channel."""
    f, *others = sorted(operands, key=lambda x: not is_factors(x))
    name, (shape,) = run.eqn.primitive.name, shapes(run.eqn)[1]
    if any(is_factors(x) or jnp.iscomplexobj(x) for x in others):
        return None
    if shape != f.shape or (name == "div" and f is not operands[0]):
        return None
    (w,) = run.bind(*weights(operands))
    apply = {"neg": jnp.negative, "mul": jnp.multiply, "div": jnp.divide}[name]
    dtype = wider(f.scale.dtype, f.dtype)
    others = [jnp.asarray(x, dtype) for x in others]
    if all(x.size == 1 for x in others):
        scale = apply(f.scale.astype(dtype), *(jnp.reshape(x, ()) for x in others))
        return [dataclasses.replace(f, w=w, scale=scale)]
    (x,) = others
    channels = {d for d, n in enumerate(x.shape) if n != 1}
    for part, factor in (("a", f.a), ("b", f.b)):
        if channels.issubset(factors.dims_of(factor)):
            factor = apply(factor.astype(dtype), x[..., None])
            return [dataclasses.replace(f, w=w, **{part: factor})]
    return None


VIEWS: dict[str, Rule] = {
    **{name: _follow for name in companions.RULES if name not in PRODUCTS},
    "reshape": _reshape,
    "convert_element_type": _convert_element_type,
    "reduce_precision": _reduce_precision,
    "sharding_constraint": _on_weight,
    "device_put": _device_put,
    "reshard": _reshard,
    "stop_gradient": _on_each,
    "name": _on_each,
    "optimization_barrier": _on_each,
    "pvary": _pvary,
    "pad": _pad,
    "concatenate": _concatenate,
    "stack": _stack,
    "reduce_sum": _reduce_sum,
    "add": _add,
    "sub": _add,
    "neg": _scale,
    "mul": _scale,
    "div": _scale,
}

# Views that never materialize a weight, whatever the operands.
ALWAYS = {
    *("copy", "transpose", "squeeze", "broadcast_in_dim", "slice", "dynamic_slice"),
    *("split", "unstack", "rev", "neg", "stop_gradient", "name", "pvary"),
    *("optimization_barrier", "sharding_constraint", "reshard", "device_put"),
}


def is_product(eqn: Any) -> bool:
    return eqn.primitive.name in PRODUCTS


def is_view(eqn: Any) -> bool:
    """Whether an equation can return a weight in factors, if its operands allow."""
    return eqn.primitive.name in VIEWS


def always_follows(run: Run, eqn: Any) -> bool:
    """Whether the factors follow a weight through an equation, whatever they are."""
    if eqn.primitive.name != "convert_element_type":
        return eqn.primitive.name in ALWAYS
    (dtype,) = result_dtypes(eqn)
    floating = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 1
    return floating and id(eqn) not in (run.exact or ())


def keeps(eqn: Any) -> bool:
    """Whether a weight that goes through an equation is still one, in factors."""
    scales = eqn.primitive.name in ("mul", "div")
    return is_view(eqn) and (not scales or () in shapes(eqn)[0])
