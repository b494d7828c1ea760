"""One rule per primitive: what becomes of an adapted weight that JAX hands to it.

A rule takes the equation and its operands, of which at least one is `Factors`, and
gives the results: another `Factors` for a change of view, an array for a product. A
call carries the factors inside. No rule, or a rule that gives `None`: the weight is
materialised for this one use, which is slower and never wrong.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax import _factors, _ops
from lora_jax._factors import Factors, materialize
from lora_jax._jaxpr import (
    CALLS,
    bind,
    call_jaxpr,
    evaluate,
    flops,
    leads_to,
    manual_axes,
    passed_on,
    place,
    scan_counts,
    trace,
    varying_axes,
)


class Run(NamedTuple):
    """One evaluation of a jaxpr: how to treat what cannot be factored, and dropout."""

    materialize: str  # "warn", "error" or "allow"
    rate: float = 0.0
    key: jax.Array | None = None  # None: no dropout
    counting: bool = False  # whether to note every product, with its FLOPs
    jaxpr: Any = None  # where the evaluation stands: the jaxpr, the equation in it,
    eqn: Any = None
    trail: tuple[tuple[int, int], ...] = ()  # and (its index, how often it runs) ...


class Note(NamedTuple):
    """What became of a weight in one equation."""

    name: str  # the weight's
    primitive: str
    place: str  # file:line in the user's source
    formed: bool  # W + scale * A B was formed, instead of a factored product
    flops: int = 0  # added by the adapter, if they were counted


# What an evaluation has to tell its caller, by equation and weight: an equation that
# JAX traces twice is told once. A context, because the jitted forms below are shared.
notes: contextvars.ContextVar[dict[Any, Note] | None] = contextvars.ContextVar(
    "notes", default=None
)


# The calls of jitted functions that an evaluation is in; a context for the same reason.
calls: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar(
    "calls", default=()
)


def run_jaxpr(run: Run, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """The results of a jaxpr on arrays and `Factors`; they are such themselves."""

    def apply(index, eqn, operands):
        if not any(isinstance(x, Factors) for x in operands):
            return bind(eqn, operands)
        name, times = eqn.primitive.name, eqn.params.get("length", 1)
        trail = (*run.trail, (index, times))
        here = run._replace(jaxpr=jaxpr, eqn=eqn, trail=trail)
        if run.key is not None:
            here = here._replace(key=jax.random.fold_in(run.key, index))
        rule = RULES.get(name)
        results = rule and rule(here, eqn, operands)
        if results is None:
            return bind(eqn, plain(here, operands, name))
        if run.counting and name in PRODUCTS:
            _count(here, rule, operands)
        return results

    return evaluate(jaxpr, args, apply)


def plain(run: Run, values: Sequence[Any], cause: str) -> list[Any]:
    """The values with every `Factors` among them materialised."""
    return [_plain(run, x, cause) if isinstance(x, Factors) else x for x in values]


def _plain(run: Run, f: Factors, cause: str) -> jax.Array:
    in_a, in_b = (set(_factors.present(x)) for x in (f.a, f.b))
    where = _place(run)
    cost = 2 * math.prod(f.shape[d] for d in in_a | in_b) * f.a.shape[-1]
    if in_a <= in_b or in_b <= in_a:
        # A row, a column, or some: no dearer than a product.
        _note(run, Note(str(f.name), cause, where, False, cost))
        return materialize(f)
    if run.materialize == "error":
        at = f" at {where}" if where else ""
        raise ValueError(
            f"{f.name!r} meets {cause!r}{at}, which needs the whole weight, so it "
            "cannot stay factored. Write lora(fn, materialize='allow') to form "
            "W + scale * A B there, or leave the weight out: "
            "lorafy(params, rank, exclude=[...])."
        )
    _note(run, Note(str(f.name), cause, where, True, cost))
    return materialize(f)


def _count(run: Run, rule: Callable[..., Any], operands: Sequence[Any]) -> None:
    """Notes a product that stayed factored, and what it adds to the plain one."""
    eqn = run.eqn
    (f, *_) = (x for x in operands if isinstance(x, Factors))
    quiet = run._replace(materialize="allow", counting=False)
    whole = trace(lambda *xs: rule(quiet, eqn, list(xs)), *operands)
    base = trace(lambda *xs: bind(eqn, xs), *_avals(operands))
    added = flops(whole.jaxpr) - flops(base.jaxpr)
    note = Note(str(f.name), eqn.primitive.name, _place(run), False, added)
    _note(run, note)


@contextlib.contextmanager
def noting() -> Iterator[dict[Any, Note]]:
    """Collects what evaluations within it have to tell."""
    found: dict[Any, Note] = {}
    token = notes.set(found)
    try:
        yield found
    finally:
        notes.reset(token)


def _place(run: Run) -> str:
    """Where in the user's source an evaluation stands, or ""."""
    if run.eqn is None:
        return ""
    chain = [*calls.get(), run.eqn]
    names = [None, *(call.params["name"] for call in chain[:-1])]
    places = map(place, reversed(chain), reversed(names))
    return next(filter(None, places), "")


def _note(run: Run, note: Note) -> None:
    found = notes.get()
    if found is not None:
        times = math.prod(n for _, n in run.trail)
        key = (run.trail, note.name, note.formed)
        found[key] = note._replace(flops=times * note.flops)


# Views.


def _on_weight(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """What changes the weight's storage or digits, and not the factors'."""
    weights = [x.w if isinstance(x, Factors) else x for x in operands]
    moved = bind(eqn, weights)
    if not jnp.issubdtype(moved[0].dtype, jnp.inexact):
        return None
    pairs = zip(operands, moved, strict=True)
    return [
        dataclasses.replace(f, w=w) if isinstance(f, Factors) else w for f, w in pairs
    ]


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
    return [_factors.transpose(f, w, eqn.params["permutation"])]


def _reshape(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    (f,) = operands
    (w,) = bind(eqn, [f.w])
    return _maybe(_factors.reshape(f, w))


def _broadcast(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    f, *dynamic_shape = operands
    if dynamic_shape:
        return None
    (w,) = bind(eqn, [f.w])
    return [_factors.broadcast(f, w, eqn.params["broadcast_dimensions"])]


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
            own = axis in _factors.present(x)
            return lax.index_in_dim(x, i if own else 0, axis, keepdims=False)

        return _factors.view(f, w, pick)

    return [nth(i, w) for i, w in enumerate(bind(eqn, [f.w]))]


def _rev(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    (f,) = operands
    (w,) = bind(eqn, [f.w])
    # Along a dimension that a factor lacks there is one number, and nothing to turn.
    return [_factors.view(f, w, lambda x: lax.rev(x, eqn.params["dimensions"]))]


def _tile(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    (f,) = operands
    (w,) = bind(eqn, [f.w])
    reps = eqn.params["reps"]

    def tile(x):
        own = _factors.present(x)
        return jnp.tile(x, [n if d in own else 1 for d, n in enumerate(reps)] + [1])

    return [_factors.view(f, w, tile)]


def _pad(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    f, padding = operands
    if not isinstance(f, Factors) or isinstance(padding, Factors):
        return None
    config = eqn.params["padding_config"]
    changed = [d for d, edges in enumerate(config) if any(edges)]
    in_either = {*_factors.present(f.a), *_factors.present(f.b)}
    if not in_either.issuperset(changed):
        return None  # what a weight repeats, it does not repeat in its padding
    (w,) = bind(eqn, [f.w, padding])

    def pad(x):
        own = _factors.present(x)
        edges = [c if d in own else (0, 0, 0) for d, c in enumerate(config)]
        return lax.pad(x, jnp.zeros((), x.dtype), [*edges, (0, 0, 0)])

    return [_factors.view(f, w, pad)]


def _concatenate(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """Weights side by side, as fused projections are: each keeps its own rank."""
    if not all(isinstance(x, Factors) for x in operands) and not _is_weight(run):
        return None
    (w,) = bind(eqn, [x.w if isinstance(x, Factors) else x for x in operands])
    return _maybe(_factors.concatenate(operands, w, eqn.params["dimension"]))


def _stack(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    if not all(isinstance(x, Factors) for x in operands) and not _is_weight(run):
        return None
    axis = eqn.params["axis"]
    rows = []
    for x in operands:
        part = lax.expand_dims(x.w if isinstance(x, Factors) else x, [axis])
        if isinstance(x, Factors):
            part = _factors.view(x, part, lambda x: lax.expand_dims(x, [axis]))
        rows.append(part)
    (w,) = bind(eqn, [x.w if isinstance(x, Factors) else x for x in operands])
    return _maybe(_factors.concatenate(rows, w, axis))


def _is_weight(run: Run) -> bool:
    """Whether a product awaits what the equation makes of weights and plain arrays.

    If not, it is rather an activation, as where a table of positions is added: in
    factors it would be formed again by whatever comes next.
    """
    return leads_to(run.jaxpr, run.trail[-1][0], PRODUCTS, VIEWS)


def _cut(f: Factors, w: jax.Array, starts: Any, limits: Any, strides: Any):
    def cut(x, present):
        for d in present:
            x = lax.slice_in_dim(x, starts[d], limits[d], strides[d], axis=d)
        return x

    return _factors.cut(f, w, cut)


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

    return _maybe(_factors.cut(f, w, cut))


def _reduce_sum(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    (f,) = operands
    axes = eqn.params["axes"]
    in_a, in_b = _factors.present(f.a), _factors.present(f.b)
    if _factors.stacked(f).intersection(axes):
        return None  # a sum over layers or experts is no product of two factors
    (w,) = bind(eqn, [f.w])
    repeats = math.prod(f.shape[d] for d in axes if d not in (*in_a, *in_b))
    summed = _factors.view(f, w, lambda x: jnp.sum(x, axes))
    return [dataclasses.replace(summed, scale=summed.scale * repeats)]


def _sum(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """A sum, or a difference, with a number or an array, or with another weight."""
    f, g = operands
    minus = eqn.primitive.name == "sub"
    numbers = [x for x in operands if np.ndim(x) == 0]
    if not (numbers or _is_weight(run)):
        return None
    (w,) = bind(eqn, [x.w if isinstance(x, Factors) else x for x in operands])
    if isinstance(g, Factors) and minus:
        g = dataclasses.replace(g, scale=-g.scale)
    if not isinstance(g, Factors):
        return [dataclasses.replace(f, w=w)]
    if not isinstance(f, Factors):
        return [dataclasses.replace(g, w=w)]
    return _maybe(_factors.add(f, g, w))


def _scaled(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """Negation, and multiplication or division by a number."""
    f, *numbers = sorted(operands, key=lambda x: not isinstance(x, Factors))
    swapped = f is not operands[0]
    if any(isinstance(x, Factors) or np.ndim(x) > 0 for x in numbers):
        return None
    if any(jnp.iscomplexobj(x) for x in numbers):
        return None
    if swapped and eqn.primitive.name == "div":
        return None
    (w,) = bind(eqn, [x if x is not f else f.w for x in operands])
    dtype = _factors.wider(f.scale.dtype, f.dtype)
    numbers = [jnp.asarray(x, dtype) for x in numbers]
    operation = {"neg": jnp.negative, "mul": jnp.multiply, "div": jnp.divide}
    scale = operation[eqn.primitive.name](f.scale.astype(dtype), *numbers)
    return [dataclasses.replace(f, w=w, scale=scale)]


def _maybe(f: Factors | None) -> list[Factors] | None:
    return None if f is None else [f]


# Products.


def _dot_general(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    lhs, rhs = operands
    if isinstance(lhs, Factors) and isinstance(rhs, Factors):
        if lhs.w.size < rhs.w.size:
            lhs = _plain(run, lhs, "dot_general")
        else:
            rhs = _plain(run, rhs, "dot_general")
    swap = isinstance(lhs, Factors)
    x, f = (rhs, lhs) if swap else (lhs, rhs)
    return [_ops.dot_general(x, f, swap=swap, drop=_dropout(run), **eqn.params)]


def _gather(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    f, indices = operands
    if not isinstance(f, Factors):
        return None
    found = _ops.gather(f, indices, **eqn.params)
    named = eqn.params["dimension_numbers"].start_index_map
    if _factors.stacked(f).issuperset(named):
        return [found]  # one layer, or expert, of a stack: a weight still
    # The rows of an embedding. The plain function forms as many numbers, so that adding
    # the thin product to them takes no more memory.
    return [materialize(found)]


def _conv(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    x, f = operands
    if isinstance(x, Factors):
        return None
    y = _ops.conv_general_dilated(x, f, drop=_dropout(run), **eqn.params)
    return None if y is None else [y]


def _ragged_dot(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    x, f, sizes = operands
    if isinstance(x, Factors) or isinstance(sizes, Factors):
        return None
    y = _ops.ragged_dot_general(x, f, sizes, drop=_dropout(run), **eqn.params)
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


# Calls.


def _inline(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    return run_jaxpr(run, call_jaxpr(eqn), operands)


def _shard_map(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    params, axes = eqn.params, manual_axes(eqn)
    leaves, treedef = jax.tree.flatten(operands)
    specs = [
        spec
        for x, whole in zip(operands, params["in_specs"], strict=True)
        for spec in (_part_specs(x, whole) if isinstance(x, Factors) else [whole])
    ]

    def call(key, leaves):
        for axis in axes if key is not None else ():
            key = jax.random.fold_in(key, lax.axis_index(axis))
        here = run._replace(key=key)
        results = run_jaxpr(here, call_jaxpr(eqn), treedef.unflatten(leaves))
        return plain(here, results, "shard_map")

    mapped = jax.shard_map(
        call,
        mesh=params["mesh"],
        in_specs=(None if run.key is None else PartitionSpec(), specs),
        out_specs=list(params["out_specs"]),
        axis_names=set(axes),
        check_vma=params["check_vma"],
    )
    return mapped(run.key, leaves)


def _part_specs(f: Factors, spec: PartitionSpec) -> list[PartitionSpec]:
    """A weight's sharding for each of its parts, along the dimensions they share."""
    names = (*spec, *(None,) * (f.ndim - len(spec)))
    parts = jax.tree.leaves(dataclasses.replace(f, scale=f.scale[..., None]))
    own = (range(f.ndim), *map(_factors.present, parts[1:]))
    return [
        PartitionSpec(*(n if d in dims else None for d, n in enumerate(names)))
        for dims in own
    ]


# The jitted forms of a jaxpr, so that calling a jitted function again compiles nothing.
_jitted: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _jit(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    token = calls.set((*calls.get(), eqn))
    try:
        if run.counting:  # a shared form is traced, and noted, but once
            return _inline(run, eqn, operands)
        return _jitted_form(run, eqn)(run.key, operands)
    finally:
        calls.reset(token)


def _jitted_form(run: Run, eqn: Any) -> Callable[..., list[Any]]:
    jaxpr, params = call_jaxpr(eqn), eqn.params
    shardings = params["in_shardings"], params["out_shardings"]
    options = params.get("compiler_options_kvs", ())
    keyless = Run(run.materialize, run.rate)
    how = (keyless, params["inline"], shardings, options)
    forms = _jitted.setdefault(jaxpr, {})
    if how not in forms:
        # Holding the jaxpr itself would keep its own entry alive for ever.
        held = weakref.ref(jaxpr)

        def call(key, operands):
            operands = map(_constrained, operands, shardings[0])
            results = run_jaxpr(keyless._replace(key=key), held(), list(operands))
            return list(map(_constrained, results, shardings[1]))

        call.__name__ = params["name"]
        forms[how] = jax.jit(
            call, inline=params["inline"], compiler_options=dict(options) or None
        )
    return forms[how]


def _constrained(x: Any, sharding: Any) -> Any:
    if not isinstance(sharding, jax.sharding.Sharding):
        return x
    if isinstance(x, Factors):
        return dataclasses.replace(x, w=lax.with_sharding_constraint(x.w, sharding))
    return lax.with_sharding_constraint(x, sharding)


def _remat(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    def call(key, operands):
        return run_jaxpr(run._replace(key=key), call_jaxpr(eqn), operands)

    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(call, **options)(run.key, operands)


def _custom_jvp(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    """The function's own forward rule, itself evaluated on the factors."""

    @jax.custom_jvp
    def call(key, operands):
        inner = run._replace(key=key)
        results = run_jaxpr(inner, call_jaxpr(eqn), operands)
        return plain(inner, results, "custom_jvp_call")

    @call.defjvp
    def call_jvp(primals, tangents):
        (key, operands), (_, dots) = primals, tangents
        fn, smooth = _smooth(eqn, operands)
        dots = [_tangent(operands[i], dots[i]) for i in smooth]
        jvp = lambda xs, dots: jax.jvp(
            lambda *smooth_xs: fn(xs, smooth_xs), [xs[i] for i in smooth], dots
        )
        traced = trace(jvp, _avals(operands), _avals(dots))
        inner = run._replace(key=key)
        results = run_jaxpr(inner, traced.jaxpr, [*operands, *dots])
        out, out_dots = traced.restore(plain(inner, results, "custom_jvp_call"))
        return out, out_dots

    return call(run.key, operands)


def _custom_vjp(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    """The function's own backward rule, itself evaluated on the factors."""

    def call(key, operands):
        inner = run._replace(key=key)
        results = run_jaxpr(inner, call_jaxpr(eqn), operands)
        return plain(inner, results, "custom_vjp_call")

    pullback = None  # how to run the backward pass from its residuals

    def forward(key, operands):
        nonlocal pullback
        fn, smooth = _smooth(eqn, operands)
        vjp = lambda *xs: jax.vjp(
            lambda *smooth_xs: fn(xs, smooth_xs), *[xs[i] for i in smooth]
        )
        traced = trace(vjp, *_avals(operands))
        results = run_jaxpr(run._replace(key=key), traced.jaxpr, operands)
        n = len(eqn.outvars)
        out = plain(run, results[:n], "custom_vjp_call")
        residuals = results[n:]
        pullback = lambda residuals: traced.restore([None] * n + residuals)[1]
        return out, (key, operands, residuals)

    def backward(saved, cotangents):
        key, operands, residuals = saved
        _, smooth = _smooth(eqn, operands)
        back = lambda residuals, ct: pullback(residuals)(ct)
        traced = trace(back, _avals(residuals), _avals(cotangents))
        inner = run._replace(key=key)
        results = run_jaxpr(inner, traced.jaxpr, [*residuals, *cotangents])
        grads = traced.restore(plain(inner, results, "custom_vjp_call"))
        out = [None] * len(operands)
        for i, grad in zip(smooth, grads, strict=True):
            if isinstance(operands[i], Factors):
                (grad,) = jax.vjp(materialize, operands[i])[1](grad)
            out[i] = grad
        return None, out

    custom = jax.custom_vjp(call)
    custom.defvjp(forward, backward)
    return custom(run.key, operands)


def _smooth(eqn: Any, operands: Sequence[Any]):
    """The equation as a function of its differentiable operands, and which they are."""
    smooth = [
        i
        for i, x in enumerate(_avals(operands))
        if jnp.issubdtype(x.dtype, jnp.inexact)
    ]

    def fn(xs, smooth_xs):
        xs = list(xs)
        for i, x in zip(smooth, smooth_xs, strict=True):
            xs[i] = x
        return bind(eqn, xs)

    return fn, smooth


def _tangent(x: Any, dot: Any) -> Any:
    """The tangent of the whole weight: a custom rule sees no other."""
    return jax.jvp(materialize, (x,), (dot,))[1] if isinstance(x, Factors) else dot


def _avals(values: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    arrays = (x.w if isinstance(x, Factors) else x for x in values)
    return [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in arrays]


def _scan(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    params = eqn.params
    jaxpr, length = params["jaxpr"], params["length"]
    n_consts, n_carry = scan_counts(eqn)
    consts, init = operands[:n_consts], operands[n_consts : n_consts + n_carry]
    xs = operands[n_consts + n_carry :]
    fixed = _fixed(jaxpr, init, n_consts)
    stacks = [_slices(x) if isinstance(x, Factors) else (x, lambda x: x) for x in xs]
    slices, restore = zip(*stacks, strict=True) if stacks else ((), ())
    keys = None if run.key is None else jax.random.split(run.key, length)

    def step(run, carry, x):
        slices, key = x
        xs = [join(x) for join, x in zip(restore, slices, strict=True)]
        run = run._replace(key=key)
        results = run_jaxpr(run, jaxpr, [*consts, *_filled(carry, fixed), *xs])
        return _free(results[:n_carry], fixed), plain(run, results[n_carry:], "scan")

    xs = (list(slices), keys)
    first = jax.eval_shape(lambda xs: jax.tree.map(lambda x: x[0], xs), xs)
    carry = _steady(run, _free(init, fixed), lambda run, c: step(run, c, first)[0])

    def body(carry, x):
        after, ys = step(run, carry, x)
        return _alike(run, carry, after), ys

    options = {
        n: params[n] for n in ("reverse", "unroll", "_split_transpose") if n in params
    }
    carry, ys = lax.scan(body, carry, xs, length, **options)
    return [*_filled(carry, fixed), *ys]


def _fixed(jaxpr: Any, init: Sequence[Any], n_consts: int) -> dict[int, Factors]:
    """The carried weights that the loop never changes: constants, in truth."""
    return {
        i: x
        for i, x in enumerate(init)
        if isinstance(x, Factors) and passed_on(jaxpr, i, n_consts + i)
    }


def _free(carry: Sequence[Any], fixed: dict[int, Factors]) -> list[Any]:
    return [x for i, x in enumerate(carry) if i not in fixed]


def _filled(carry: Sequence[Any], fixed: dict[int, Factors]) -> list[Any]:
    rest = iter(carry)
    return [
        fixed[i] if i in fixed else next(rest) for i in range(len(carry) + len(fixed))
    ]


def _steady(run: Run, carry: list[Any], step: Callable[..., Any]) -> list[Any]:
    """The carry in which what enters the loop as a weight also leaves it as one."""
    quiet = run._replace(materialize="allow")
    while any(isinstance(x, Factors) for x in carry):
        with noting():  # and not telling: this was no evaluation
            after = jax.eval_shape(functools.partial(step, quiet), carry)
        kept = [
            not isinstance(x, Factors) or _avals_of(x) == _avals_of(y)
            for x, y in zip(carry, after, strict=True)
        ]
        if all(kept):
            break
        pairs = zip(carry, kept, strict=True)
        carry = [
            x if keep else _plain(run, x, run.eqn.primitive.name) for x, keep in pairs
        ]
    return carry


def _alike(run: Run, before: Sequence[Any], after: Sequence[Any]) -> list[Any]:
    """What a loop hands on, weights only where it took weights."""
    return [
        y if isinstance(x, Factors) else plain(run, [y], run.eqn.primitive.name)[0]
        for x, y in zip(before, after, strict=True)
    ]


def _avals_of(x: Any) -> Any:
    leaves, treedef = jax.tree.flatten(x)
    return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _slices(f: Factors):
    """The parts of `f` that differ from slice to slice, and how to join one slice."""
    parts = {"a": f.a, "b": f.b, "scale": f.scale[..., None]}
    same = {
        k: jnp.squeeze(x, 0) for k, x in parts.items() if 0 not in _factors.present(x)
    }
    varying = {k: x for k, x in parts.items() if k not in same}

    def join(slices):
        w, varying = slices
        parts = same | varying
        return Factors(w, parts["a"], parts["b"], parts["scale"][..., 0], f.name)

    return (f.w, varying), join


def _while(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, operands = operands[:n_cond], operands[n_cond:]
    body_consts, init = operands[:n_body], operands[n_body:]
    fixed = _fixed(params["body_jaxpr"], init, n_body)

    def cond(state):
        key, carry = state
        here, carry = run._replace(key=key), _filled(carry, fixed)
        (go,) = run_jaxpr(here, params["cond_jaxpr"], [*cond_consts, *carry])
        return go

    def step(run, carry):
        carry = _filled(carry, fixed)
        results = run_jaxpr(run, params["body_jaxpr"], [*body_consts, *carry])
        return _free(results, fixed)

    def body(state):
        key, carry = state
        key, own = (None, None) if key is None else jax.random.split(key)
        return key, _alike(run, carry, step(run._replace(key=own), carry))

    carry = _steady(run, _free(init, fixed), step)
    return _filled(lax.while_loop(cond, body, (run.key, carry))[1], fixed)


def _cond(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    index, *operands = operands

    def branch(jaxpr, operands):
        return plain(run, run_jaxpr(run, jaxpr, operands), "cond")

    branches = [functools.partial(branch, jaxpr) for jaxpr in eqn.params["branches"]]
    return lax.switch(index, branches, operands)


Rule = Callable[[Run, Any, list[Any]], list[Any] | None]

VIEWS: dict[str, Rule] = {
    "convert_element_type": _on_weight,
    "copy": _on_weight,
    "reduce_precision": _on_weight,
    "device_put": _on_weight,
    "sharding_constraint": _on_weight,
    "reshard": _on_weight,
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
PRODUCTS: dict[str, Rule] = {
    "dot_general": _dot_general,
    "gather": _gather,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged_dot,
}
RULES: dict[str, Rule] = {
    **VIEWS,
    **PRODUCTS,
    **dict.fromkeys(CALLS, _inline),
    "jit": _jit,
    "shard_map": _shard_map,
    "remat2": _remat,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
