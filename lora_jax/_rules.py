"""One rule per primitive: what becomes of an adapted weight that JAX hands to it.

A rule takes the equation and its operands, of which at least one is `Factors`, and
gives the results: another `Factors` for a change of view, an array for a product. A
call carries the factors inside. No rule, or a rule that gives `None`: the weight is
materialised for this one use, which is slower and never wrong.
"""

import dataclasses
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import _factors, _ops
from lora_jax._factors import Factors, materialize
from lora_jax._jaxpr import (
    CALLS,
    bind,
    call_jaxpr,
    evaluate,
    passed_on,
    scan_counts,
    trace,
)


class Run(NamedTuple):
    """One evaluation of a jaxpr: how to treat what cannot be factored, and dropout."""

    materialize: str  # "warn", "error" or "allow"
    rate: float
    key: jax.Array | None  # None: no dropout


def run_jaxpr(run: Run, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """The results of a jaxpr on arrays and `Factors`; they are such themselves."""

    def apply(index, eqn, operands):
        if not any(isinstance(x, Factors) for x in operands):
            return bind(eqn, operands)
        here = run
        if run.key is not None:
            here = run._replace(key=jax.random.fold_in(run.key, index))
        rule = RULES.get(eqn.primitive.name)
        results = rule and rule(here, eqn, operands)
        if results is None:
            return bind(eqn, plain(run, operands, eqn.primitive.name))
        return results

    return evaluate(jaxpr, args, apply)


def plain(run: Run, values: Sequence[Any], cause: str) -> list[Any]:
    """The values with every `Factors` among them materialised."""
    return [_plain(run, x, cause) if isinstance(x, Factors) else x for x in values]


def _plain(run: Run, f: Factors, cause: str) -> jax.Array:
    in_a, in_b = (set(_factors.present(x)) for x in (f.a, f.b))
    if in_a <= in_b or in_b <= in_a:
        return materialize(f)  # a row, a column, or some: no dearer than a product
    problem = f"{f.name!r} meets {cause!r}, which needs the whole weight"
    if run.materialize == "error":
        raise ValueError(
            f"{problem}, so it cannot stay factored. Write lora(fn, materialize="
            "'allow') to form W + scale * A B there, or leave the weight out: "
            "lorafy(params, rank, exclude=[...])."
        )
    if run.materialize == "warn":
        warnings.warn(
            f"{problem}: W + scale * A B is formed there, exactly, for more time and "
            "memory. Write lora(fn, materialize='allow') if that is meant.",
            stacklevel=2,
        )
    return materialize(f)


# Views.


def _on_weight(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """What changes the weight's storage or digits, and not the factors'."""
    (f,) = operands
    (w,) = bind(eqn, [f.w])
    if not jnp.issubdtype(w.dtype, jnp.inexact):
        return None
    return [dataclasses.replace(f, w=w)]


def _on_each(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    """Identities with a meaning for gradients or memory, one part at a time."""
    leaves, treedef = jax.tree.flatten(operands)
    if eqn.primitive.multiple_results:
        return treedef.unflatten(bind(eqn, leaves))
    return treedef.unflatten([bind(eqn, [leaf])[0] for leaf in leaves])


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
    if any(d in in_a and d in in_b for d in axes):
        return None  # a sum over layers or experts is no product of two factors
    (w,) = bind(eqn, [f.w])
    repeats = math.prod(f.shape[d] for d in axes if d not in (*in_a, *in_b))
    summed = _factors.view(f, w, lambda x: jnp.sum(x, axes))
    return [dataclasses.replace(summed, scale=summed.scale * repeats)]


def _scaled(run: Run, eqn: Any, operands: list[Any]) -> list[Any] | None:
    """Negation, and multiplication or division by a number."""
    f, *numbers = sorted(operands, key=lambda x: not isinstance(x, Factors))
    swapped = f is not operands[0]
    if any(isinstance(x, Factors) or jnp.ndim(x) > 0 for x in numbers):
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
    if all(d in _factors.present(f.scale[..., None]) for d in named):
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


def _dropout(run: Run) -> Callable[[jax.Array], jax.Array]:
    def drop(x):
        if run.key is None:
            return x
        keep = jax.random.bernoulli(run.key, 1 - run.rate, x.shape)
        return jnp.where(
            keep, x / jnp.asarray(1 - run.rate, x.dtype), jnp.zeros_like(x)
        )

    return drop


# Calls.


def _inline(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    return run_jaxpr(run, call_jaxpr(eqn), operands)


# The jitted forms of a jaxpr, so that calling a jitted function again compiles nothing.
_jitted: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _jit(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    jaxpr, params = call_jaxpr(eqn), eqn.params
    shardings = params["in_shardings"], params["out_shardings"]
    how = (run._replace(key=None), params["inline"], shardings)
    forms = _jitted.setdefault(jaxpr, {})
    if how not in forms:
        keyless, _, _ = how
        # Holding the jaxpr itself would keep its own entry alive for ever.
        held = weakref.ref(jaxpr)

        def call(key, operands):
            operands = map(_constrained, operands, shardings[0])
            results = run_jaxpr(keyless._replace(key=key), held(), list(operands))
            return list(map(_constrained, results, shardings[1]))

        call.__name__ = params["name"]
        forms[how] = jax.jit(call, inline=params["inline"])
    return forms[how](run.key, operands)


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

    # A weight that is carried and never changed is a constant.
    fixed = {
        i: x
        for i, x in enumerate(init)
        if isinstance(x, Factors) and passed_on(jaxpr, i, n_consts + i)
    }
    carry = [x for i, x in enumerate(init) if i not in fixed]
    stacks = [_unstack(x) if isinstance(x, Factors) else (x, lambda x: x) for x in xs]
    slices, restore = zip(*stacks, strict=True) if stacks else ((), ())
    keys = None if run.key is None else jax.random.split(run.key, length)

    def body(carry, x):
        slices, key = x
        rest = iter(carry)
        carried = [fixed[i] if i in fixed else next(rest) for i in range(n_carry)]
        xs = [join(x) for join, x in zip(restore, slices, strict=True)]
        here = run._replace(key=key)
        results = run_jaxpr(here, jaxpr, [*consts, *carried, *xs])
        carry = [x for i, x in enumerate(results[:n_carry]) if i not in fixed]
        return plain(here, carry, "scan"), plain(here, results[n_carry:], "scan")

    options = {
        n: params[n] for n in ("reverse", "unroll", "_split_transpose") if n in params
    }
    carry, ys = lax.scan(
        body, plain(run, carry, "scan"), (list(slices), keys), length, **options
    )
    rest = iter(carry)
    return [fixed[i] if i in fixed else next(rest) for i in range(n_carry)] + ys


def _unstack(f: Factors):
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
    init = plain(run, init, "while")

    def cond(state):
        key, carry = state
        here = run._replace(key=key)
        (go,) = run_jaxpr(here, params["cond_jaxpr"], [*cond_consts, *carry])
        return go

    def body(state):
        key, carry = state
        key, here = (None, None) if key is None else jax.random.split(key)
        inner = run._replace(key=here)
        results = run_jaxpr(inner, params["body_jaxpr"], [*body_consts, *carry])
        return key, plain(inner, results, "while")

    return lax.while_loop(cond, body, (run.key, init))[1]


def _cond(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    index, *operands = operands

    def branch(jaxpr, operands):
        return plain(run, run_jaxpr(run, jaxpr, operands), "cond")

    branches = [functools.partial(branch, jaxpr) for jaxpr in eqn.params["branches"]]
    return lax.switch(index, branches, operands)


RULES: dict[str, Callable[[Run, Any, list[Any]], list[Any] | None]] = {
    "convert_element_type": _on_weight,
    "copy": _on_weight,
    "reduce_precision": _on_weight,
    "sharding_constraint": _on_weight,
    "reshard": _on_weight,
    "stop_gradient": _on_each,
    "name": _on_each,
    "optimization_barrier": _on_each,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "reduce_sum": _reduce_sum,
    "neg": _scaled,
    "mul": _scaled,
    "div": _scaled,
    "dot_general": _dot_general,
    "gather": _gather,
    "conv_general_dilated": _conv,
    **dict.fromkeys(CALLS, _inline),
    "jit": _jit,
    "remat2": _remat,
    "custom_jvp_call": _custom_jvp,
    "custom_vjp_call": _custom_vjp,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
