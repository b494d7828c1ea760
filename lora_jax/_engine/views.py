"""What becomes of an adapted weight that JAX hands on: one rule per primitive.

A rule takes the equation and its operands, of which at least one is `Factors`, and
gives other `Factors`. `None`: the weight has to be materialised.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from lora_jax._engine import factors
from lora_jax._engine.factors import Factors
from lora_jax._engine.jaxpr import (
    bind,
    leads_to,
    shapes,
    varying_axes,
)
from lora_jax._engine.products import PRODUCTS
from lora_jax._engine.run import Rule, Run, weights


def _on_weight(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """What changes the weight's storage or digits, and not the factors'."""
    moved = bind(eqn, weights(operands))
    if not jnp.issubdtype(moved[0].dtype, jnp.inexact):
        return None
    pairs = zip(operands, moved, strict=True)
    return [
        dataclasses.replace(f, w=w) if isinstance(f, Factors) else w for f, w in pairs
    ]


def _reshard(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    """Each part where the weight goes, along the dimensions that they share."""
    (f,), to = operands, eqn.params["dst_sharding"]
    (w,) = bind(eqn, [f.w])
    move = lambda x, spec: jax.sharding.reshard(x, NamedSharding(to.mesh, spec))
    thin = zip((f.a, f.b, f.scale), factors.part_specs(f, to.spec)[1:], strict=True)
    return [Factors(w, *itertools.starmap(move, thin), f.name)]


def _on_each(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    """Identities with a meaning for gradients or memory, one part at a time."""
    leaves, treedef = jax.tree.flatten(operands)
    if eqn.primitive.multiple_results:
        return treedef.unflatten(bind(eqn, leaves))
    return treedef.unflatten([bind(eqn, [leaf])[0] for leaf in leaves])


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
    return factors.transpose(f, lax.transpose(f.w, order), order)


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
    return [factors.view(f, w, lambda x: lax.rev(x, eqn.params["dimensions"]))]


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
    if not factors.varying(f).issuperset(changed):
        return None  # what a weight repeats, it does not repeat in its padding
    (w,) = bind(eqn, [f.w, padding])

    def pad(x):
        own = factors.present(x)
        edges = [c if d in own else (0, 0, 0) for d, c in enumerate(config)]
        return lax.pad(x, jnp.zeros((), x.dtype), [*edges, (0, 0, 0)])

    return [factors.view(f, w, pad)]


def _concatenate(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    return _side_by_side(run, eqn, operands, eqn.params["dimension"])


def _stack(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    axis = eqn.params["axis"]
    expand = lambda x: lax.expand_dims(x, [axis])

    def row(x):
        factored = isinstance(x, Factors)
        return factors.view(x, expand(x.w), expand) if factored else expand(x)

    return _side_by_side(run, eqn, operands, axis, row)


def _side_by_side(
    run: Run, eqn: Any, operands: list[Any], axis: int, row: Any = lambda x: x
) -> list[Any] | None:
    """Weights as one, as fused projections are: each keeps its own rank."""
    if not _is_weight(run, operands):
        return None
    (w,) = bind(eqn, weights(operands))
    return _maybe(factors.concatenate([*map(row, operands)], w, axis))


def _is_weight(run: Run, operands: list[Any]) -> bool:
    """Whether weights, together with plain arrays, still make a weight.

    So they do where a product awaits the result. Otherwise that is an activation, as
    where a table of positions is added to each example, or a token is put before it: in
    factors, it would be formed again by whatever comes next.
    """
    adapted = [x for x in operands if isinstance(x, Factors)]
    if len(adapted) == len(operands) or any(np.ndim(x) == 0 for x in operands):
        return True
    (shape,) = shapes(run.eqn)[1]
    for f in adapted:
        if any(n != 1 for d, n in enumerate(shape) if d not in factors.varying(f)):
            return False  # the weight repeats itself, for each example of a batch
    return leads_to(run.jaxpr, run.trail[-1][0], PRODUCTS, keeps)


def keeps(eqn: Any) -> bool:
    """Whether a weight that goes through an equation is still one, in factors."""
    name = eqn.primitive.name
    return name in VIEWS and (name not in ("mul", "div") or () in shapes(eqn)[0])


def _cut(f: Factors, w: jax.Array, starts: Any, limits: Any, strides: Any):
    def cut(x, present):
        for d in present:
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
            x = lax.dynamic_slice_in_dim(x, starts[d], sizes[d], axis=d)
        return x

    return _maybe(factors.cut(f, w, cut))


def _reduce_sum(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    (f,) = operands
    axes = eqn.params["axes"]
    if factors.stacked(f).intersection(axes):
        return None  # a sum over layers or experts is no product of two factors
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
    (w,) = bind(eqn, weights(operands))
    if isinstance(g, Factors) and minus:
        g = dataclasses.replace(g, scale=-g.scale)
    if not isinstance(g, Factors):
        return [dataclasses.replace(f, w=w)]
    if not isinstance(f, Factors):
        return [dataclasses.replace(g, w=w)]
    return _maybe(factors.add(f, g, w))


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
    channels = {d for d, n in enumerate(x.shape) if n > 1}
    for part, factor in (("a", f.a), ("b", f.b)):
        if channels.issubset(factors.present(factor)):
            factor = apply(factor.astype(dtype), x[..., None]).astype(factor.dtype)
            return [dataclasses.replace(f, w=w, **{part: factor})]
    return None


def _maybe(f: Factors | None) -> list[Factors] | None:
    return None if f is None else [f]


VIEWS: dict[str, Rule] = {
    "convert_element_type": _on_weight,
    "copy": _on_weight,
    "reduce_precision": _on_weight,
    "device_put": _on_weight,
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
