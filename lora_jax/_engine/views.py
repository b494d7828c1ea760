"""What becomes of an adapted weight that JAX hands on: one rule per primitive.

A rule takes the equation and its operands, of which at least one is `Factors`, and
gives other `Factors`. `None`: the weight has to be materialised.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from lora_jax._engine import factors
from lora_jax._engine.casts import digits
from lora_jax._engine.factors import Factors
from lora_jax._engine.jaxpr import (
    bind,
    result_dtypes,
    shapes,
    varying_axes,
)
from lora_jax._engine.products import PRODUCTS
from lora_jax._engine.run import Note, Rule, Run, note, place_of, weights
from lora_jax._engine.shapes import size

LARGE = 2**13  # elements of a weight, below which its factors are kept


def _on_weight(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """What changes the weight's storage, and not the factors'."""
    (f,) = operands
    (w,) = bind(eqn, [f.w])
    return [dataclasses.replace(f, w=w)]


def _cast(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """A cast is of the weight alone: the factors keep the digits that they have.

    That is right to the new type's rounding, which is no rounding in a byte or less:
    there it is what the function is about. So it is where the function comes back to
    more digits and takes a difference, as a straight-through estimator does.
    """
    (f,), (dtype,) = operands, result_dtypes(eqn)
    if not jnp.issubdtype(dtype, jnp.inexact) or dtype.itemsize < 2:
        return None
    own = digits(dtype)
    if own < digits(f.dtype):
        if id(eqn) in run.exact or run.leads_to(eqn, *_finer(own)):
            return None
        note(
            run, Note(f.name, "convert_element_type", place_of(run), False, alone=True)
        )
    return _on_weight(run, eqn, operands)


@functools.cache
def _finer(few: int) -> tuple[Callable[[Any], bool] | bool, ...]:
    """What `leads_to` asks of a weight of few digits: whether it is summed in more.

    It may be wherever a shared form, or a loop, hands it out.
    """

    def is_sum(eqn):
        named = eqn.primitive.name in ("add", "sub")
        return named and digits(result_dtypes(eqn)[0]) > few

    return is_sum, _is_no_product, True


@functools.cache
def _coarser(many: int) -> tuple[Callable[[Any], bool] | bool, ...]:
    """What `leads_to` asks of a difference: whether digits of it are cast away."""

    def is_cast(eqn):
        return is_view(eqn) and digits(result_dtypes(eqn)[0]) < many

    return is_cast, is_view, True


def _reduce_precision(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """Nothing where all digits are kept, as JAX itself writes it for residuals."""
    (f,), params = operands, eqn.params
    own = jnp.finfo(f.dtype)
    if params["exponent_bits"] < own.nexp or params["mantissa_bits"] < own.nmant:
        return None
    return _on_weight(run, eqn, operands)


def _device_put(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    """The factors follow to the same devices, but never into the hosts' memory."""
    moved = zip(operands, bind(eqn, weights(operands)), strict=True)
    return [
        factors.device_put(x, w, to) if isinstance(x, Factors) else w
        for (x, w), to in zip(moved, eqn.params["devices"], strict=True)
    ]


def _reshard(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    """Each part where the weight goes, along the dimensions that they share."""
    (f,), to = operands, eqn.params["dst_sharding"]
    (w,) = bind(eqn, [f.w])
    move = lambda x, spec: jax.sharding.reshard(x, NamedSharding(to.mesh, spec))
    thin = zip(factors.thin_parts(f), factors.thin_specs(f, to.spec), strict=True)
    return [factors.with_thin(f, w, itertools.starmap(move, thin))]


def _on_each(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    """Identities with a meaning for gradients or memory, one part at a time.

    A barrier is one for all of them, but that JAX 0.9 takes only those together that
    vary along the same axes of `shard_map`, and a thin factor may vary along fewer.
    """
    leaves, treedef = jax.tree.flatten(operands)
    results = list(leaves)
    together = eqn.primitive.multiple_results
    kind = lambda i: varying_axes(leaves[i]) if together else i
    kinds = [kind(i) for i in range(len(leaves))]
    for one in dict.fromkeys(kinds):
        places = [i for i, k in enumerate(kinds) if k == one]
        bound = bind(eqn, [leaves[i] for i in places])
        for i, result in zip(places, bound, strict=True):
            results[i] = result
    return treedef.unflatten(results)


def _pvary(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    """Within `shard_map`: parts equal on all devices no longer count as that."""
    axes = set(eqn.params["axes"])

    def vary(x):
        return x if axes <= varying_axes(x) else bind(eqn, [x])[0]

    return jax.tree.map(vary, operands)


def _transpose(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    (f,) = operands
    (w,) = bind(eqn, [f.w])
    return [factors.transpose(f, w, eqn.params["permutation"])]


def _reshape(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    (f,) = operands
    (w,) = bind(eqn, [f.w])
    return _maybe(factors.reshape(_turned_first(eqn, f), w))


def _turned_first(eqn: Any, f: Factors) -> Factors:
    """`lax.reshape` may be told to read the dimensions in another order."""
    order = eqn.params["dimensions"] if eqn.primitive.name == "reshape" else None
    if order is None:
        return f
    w = jax.tree.map(lambda x: lax.transpose(x, order), f.w)
    return factors.transpose(f, w, order)


def _broadcast(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    f, *dynamic_shape = operands
    if dynamic_shape:
        return None
    (w,) = bind(eqn, [f.w])
    return [factors.broadcast(f, w, eqn.params["broadcast_dimensions"])]


def _slice(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    (f,) = operands
    (w,) = bind(eqn, [f.w])
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    return _maybe(_cut(f, w, starts, limits, eqn.params["strides"] or (1,) * f.ndim))


def _split(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    (f,) = operands
    axis, ones = eqn.params["axis"], (1,) * f.ndim
    starts, parts = [0] * f.ndim, []
    for w in bind(eqn, [f.w]):
        limits = [i + n for i, n in zip(starts, w.shape, strict=True)]
        parts.append(_cut(f, w, tuple(starts), limits, ones))
        starts[axis] = limits[axis]
    return None if any(part is None for part in parts) else parts


def _unstack(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    (f,) = operands
    axis = eqn.params["axis"]

    def nth(i, w):
        def pick(x):
            own = axis in factors.present(x)
            return lax.index_in_dim(x, i if own else 0, axis, keepdims=False)

        return factors.view(f, w, pick)

    return [nth(i, w) for i, w in enumerate(bind(eqn, [f.w]))]


def _rev(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    (f,) = operands
    (w,) = bind(eqn, [f.w])
    # Along a dimension that a factor lacks there is one number, and nothing to turn.
    own = lambda x: [d for d in eqn.params["dimensions"] if d in factors.present(x)]
    return [factors.view(f, w, lambda x: lax.rev(x, own(x)) if own(x) else x)]


def _tile(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    (f,) = operands
    (w,) = bind(eqn, [f.w])
    reps = eqn.params["reps"]

    def tile(x):
        own = factors.present(x)
        return jnp.tile(x, [n if d in own else 1 for d, n in enumerate(reps)] + [1])

    return [factors.view(f, w, tile)]


def _pad(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    f, padding = operands
    if not isinstance(f, Factors) or isinstance(padding, Factors):
        return None
    config = eqn.params["padding_config"]
    changed = [d for d, edges in enumerate(config) if any(edges)]
    if not factors.varying(f).issuperset(changed) or f.gain is not None:
        return None  # what a weight repeats, or multiplies, it does not in its padding
    (w,) = bind(eqn, [f.w, padding])

    def pad(x):
        own = factors.present(x)
        edges = [c if d in own else (0, 0, 0) for d, c in enumerate(config)]
        zero = jnp.zeros((), x.dtype)
        return lax.pad(x, zero, [*edges, (0, 0, 0)]) if any(map(any, edges)) else x

    return [factors.view(f, w, pad)]


def _concatenate(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    return _side_by_side(run, eqn, operands, eqn.params["dimension"])


def _stack(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    axis = eqn.params["axis"]
    expand = lambda x: lax.expand_dims(x, [axis])

    def row(x):
        factored = isinstance(x, Factors)
        w = jax.tree.map(expand, x.w) if factored else expand(x)
        return factors.view(x, w, expand) if factored else w

    return _side_by_side(run, eqn, operands, axis, row)


def _side_by_side(
    run: Run, eqn: Any, operands: list[Any], axis: int, row: Any = lambda x: x
) -> list[Any] | None:
    """Weights as one, as fused projections are: each keeps its own rank."""
    if not _is_weight(run, operands):
        return None
    (w,) = bind(eqn, weights(operands))
    whole = factors.concatenate([*map(row, operands)], w, axis)
    return _grown(run, whole, operands)


def _grown(run: Run, f: Factors | None, parts: list[Any]) -> list[Any] | None:
    """A weight made of several, unless the sum of their ranks is too large for it.

    Each product with it takes as many FLOPs for each row as its factors have elements.
    Where those are more than a quarter of the weight's own, the weights are cheaper as
    arrays: see `ops.is_dearer`. Of fewer digits than float32 arrays would round the
    update away, and the factors stay until they are larger than the weight.
    """
    adapted = [x for x in parts if isinstance(x, Factors)]
    if f is None or f.rank == max(x.rank for x in adapted):
        return _maybe(f)
    own = size(f.shape[d] for d in factors.varying(f))
    elements = size(f.a.shape) + size(f.b.shape)
    if elements > own:
        return None
    if 4 * elements <= own or own < LARGE or f.dtype.itemsize < 4:
        return [f]
    for x in adapted:
        cost = factors.delta_flops(x)
        name = run.eqn.primitive.name
        note(run, Note(x.name, name, place_of(run), True, cost, cheaper=True))
    arrays = [factors.materialize(x) if isinstance(x, Factors) else x for x in parts]
    return bind(run.eqn, arrays)


def _is_weight(run: Run, operands: list[Any]) -> bool:
    """Whether weights, together with plain arrays, still make a weight.

    So they do where a product awaits the result. Otherwise that is an activation, as
    where a table of positions is added to each example, or a token is put before it: in
    factors, it would be formed again by whatever comes next.
    """
    adapted = [x for x in operands if isinstance(x, Factors)]
    trivial = lambda x: np.ndim(x) == 0 or 0 in np.shape(x)
    if len(adapted) == len(operands) or any(map(trivial, operands)):
        return True
    (shape,) = shapes(run.eqn)[1]
    for f in adapted:
        if any(n != 1 for d, n in enumerate(shape) if d not in factors.varying(f)):
            return False  # the weight repeats itself, for each example of a batch
    return run.leads_to(run.eqn, is_product, keeps)


def is_product(eqn: Any) -> bool:
    return eqn.primitive.name in PRODUCTS


def _is_no_product(eqn: Any) -> bool:
    """Whether a weight that goes through an equation is one, or formed there anyway."""
    return not is_product(eqn)


def is_view(eqn: Any) -> bool:
    """Whether an equation hands a weight on: in factors, if these operands allow."""
    return eqn.primitive.name in VIEWS


# Views that never materialize a weight, whatever the operands.
_ALWAYS = {
    *("copy", "transpose", "squeeze", "broadcast_in_dim", "slice", "dynamic_slice"),
    *("split", "unstack", "rev", "neg", "stop_gradient", "name", "pvary"),
    *("optimization_barrier", "sharding_constraint", "reshard", "device_put"),
}


def always_follows(run: Run, eqn: Any) -> bool:
    """Whether the factors follow a weight through an equation, whatever they are."""
    if eqn.primitive.name != "convert_element_type":
        return eqn.primitive.name in _ALWAYS
    (dtype,) = result_dtypes(eqn)
    floating = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 1
    return floating and id(eqn) not in run.exact


def keeps(eqn: Any) -> bool:
    """Whether a weight that goes through an equation is still one, in factors."""
    scales = eqn.primitive.name in ("mul", "div")
    return is_view(eqn) and (not scales or () in shapes(eqn)[0])


def _cut(f: Factors, w: jax.Array, starts: Any, limits: Any, strides: Any):
    def cut(x, present):
        for d in present:
            if (starts[d], limits[d], strides[d]) == (0, x.shape[d], 1):
                continue  # the same array: pieces of a weight share it
            x = lax.slice_in_dim(x, starts[d], limits[d], strides[d], axis=d)
        return x

    return factors.cut(f, w, cut)


def _dynamic_slice(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    f, *starts = operands
    if not isinstance(f, Factors):
        return None
    (w,) = bind(eqn, [f.w, *starts])
    sizes = eqn.params["slice_sizes"]

    def cut(x, present):
        for d in present:
            if sizes[d] != x.shape[d]:
                x = lax.dynamic_slice_in_dim(x, starts[d], sizes[d], axis=d)
        return x

    return _maybe(factors.cut(f, w, cut))


def _reduce_sum(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    (f,) = operands
    axes = eqn.params["axes"]
    if factors.stacked(f).intersection(axes):
        return None  # a sum over layers or experts is no product of two factors
    if {*factors.gained(f)}.intersection(axes):
        return None
    (w,) = bind(eqn, [f.w])
    repeats = math.prod(f.shape[d] for d in axes if d not in factors.varying(f))
    summed = factors.view(f, w, lambda x: jnp.sum(x, axes))
    return [dataclasses.replace(summed, scale=summed.scale * repeats)]


def _sum(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """A sum, or a difference, with a number or an array, or with another weight."""
    f, g = operands
    minus = eqn.primitive.name == "sub"
    if not _is_weight(run, operands):
        return None
    if any(isinstance(x, Factors) and x.gain is not None for x in operands):
        return None  # what is added has no gain
    (w,) = bind(eqn, weights(operands))
    both = isinstance(f, Factors) and isinstance(g, Factors)
    if not both and run.leads_to(eqn, *_coarser(digits(w.dtype))):
        return (
            None  # the array may be nearly +-(W + A B): then what is left of W is not
        )
    if isinstance(g, Factors) and minus:
        g = dataclasses.replace(g, scale=-g.scale)
    if not isinstance(g, Factors):
        return [dataclasses.replace(f, w=w)]
    if not isinstance(f, Factors):
        return [dataclasses.replace(g, w=w)]
    return _grown(run, factors.add(f, g, w), operands)


def _scaled(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """Negation, multiplication or division by a number, or by one for each channel."""
    f, *others = sorted(operands, key=lambda x: not isinstance(x, Factors))
    name, (shape,) = eqn.primitive.name, shapes(eqn)[1]
    if any(isinstance(x, Factors) or jnp.iscomplexobj(x) for x in others):
        return None
    if shape != f.shape or (name == "div" and f is not operands[0]):
        return None
    (w,) = bind(eqn, weights(operands))
    apply = {"neg": jnp.negative, "mul": jnp.multiply, "div": jnp.divide}[name]
    dtype = factors.wider(f.scale.dtype, f.dtype)
    others = [jnp.asarray(x, dtype) for x in others]
    if all(x.size == 1 for x in others):
        scale = apply(f.scale.astype(dtype), *(jnp.reshape(x, ()) for x in others))
        return [dataclasses.replace(f, w=w, scale=scale)]
    (x,) = others
    channels = {d for d, n in enumerate(x.shape) if n != 1}
    for part, factor in (("a", f.a), ("b", f.b)):
        if channels.issubset(factors.present(factor)):
            factor = apply(factor.astype(dtype), x[..., None])
            return [dataclasses.replace(f, w=w, **{part: factor})]
    return None


def _maybe(f: Factors | None) -> list[Factors] | None:
    return None if f is None else [f]


VIEWS: dict[str, Rule] = {
    "convert_element_type": _cast,
    "copy": _on_weight,
    "reduce_precision": _reduce_precision,
    "device_put": _device_put,
    "sharding_constraint": _on_weight,
    "reshard": _reshard,
    "stop_gradient": _on_each,
    "name": _on_each,
    "optimization_barrier": _on_each,
    "pvary": _pvary,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "unstack": _unstack,
    "rev": _rev,
    "tile": _tile,
    "pad": _pad,
    "concatenate": _concatenate,
    "stack": _stack,
    "reduce_sum": _reduce_sum,
    "add": _sum,
    "sub": _sum,
    "neg": _scaled,
    "mul": _scaled,
    "div": _scaled,
}
