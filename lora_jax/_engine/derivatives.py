"""The rules of functions with derivative rules of their own, `jax.custom_{jvp,vjp}`.

Such a function is wrapped in one of ours, of the same kind, on factors. Its value is
the function, evaluated on the factors. Its derivative is the user's rule, traced to a
jaxpr and evaluated on the factors, too. The user's rule gets tangents and gives
cotangents of materialized weights, so those are computed, and noted.

JAX runs a derivative rule when it differentiates, which can be after `lora(fn)` has
returned. A rule may therefore use only its own arguments.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from lora_jax._engine.evaluate import rule_for, run_jaxpr
from lora_jax._engine.factors import is_factors, joined, materialize
from lora_jax._engine.jaxpr import (
    Trace,
    bind,
    call_jaxpr,
    contains,
    custom_consts,
    result_shapes,
    sees_perturbed,
    trace,
    zeros,
)
from lora_jax._engine.run import (
    Run,
    collect_notes,
    line_of,
    materialize_all,
    note,
    note_materialized,
    weights,
)


@rule_for("custom_jvp_call")
def _custom_jvp(run: Run, *operands: Any, **_: Any) -> list[Any]:
    """The user's forward rule: `jax.jvp` of the equation, evaluated on the factors."""
    run = run._replace(key=None)  # a rule cannot know of a dropout mask
    quiet = run._replace(counting=False, exact=None)  # of another jaxpr
    outer, eqn = operands, run.eqn
    closed = custom_consts(eqn)
    function = jax.custom_jvp(_without_rule(run))

    @_closures_named(run, operands)
    def jvp(primals, tangents):
        (operands,), (dots,) = primals, tangents
        inner = _closed_over(quiet, outer, operands)
        is_perturbed = lambda dot: not isinstance(dot, SymbolicZero)
        perturbed = _perturbed(operands, dots, is_perturbed)
        if any(is_factors(operands[i]) for i in perturbed if i < closed):
            raise _closure_error(run, operands)  # JAX would drop its tangent silently
        _note_derivatives(inner, operands, perturbed)
        dots = {
            i: _tangent(operands[i], jax.tree.map(_dense, dots[i])) for i in perturbed
        }
        take = lambda xs, dots: jax.jvp(_along(eqn, xs), [_pick(xs, dots)], [dots])
        traced = trace(take, weights(operands), dots)
        if contains(traced.jaxpr, "scan"):
            # On factors this would be no derivative of a scan but a scan over tangents,
            # which JAX 0.9 cannot transpose.
            operands = materialize_all(inner, operands, "custom_jvp_call")
        operands = [*operands, *jax.tree.leaves(dots)]
        results = run_jaxpr(inner, traced.jaxpr, operands)
        results = materialize_all(inner, results, "custom_jvp_call")
        out, out_dots = traced.restore(results)
        return out, out_dots

    function.defjvp(jvp, symbolic_zeros=True)
    if run.counting:
        _foresee(run, lambda f, xs: jax.jvp(f, [xs], [xs]), function, operands)
    return function(list(operands))


# The user's rule is `jax.vjp` of the equation by its perturbed inputs, those that are
# differentiated. Two constraints shape what follows.
#
# JAX keeps one treedef of residuals per `custom_vjp`, that of the last trace of
# `forward`, even if traces differ in which inputs are perturbed, as in two gradients of
# one jitted function. So `forward` must return residuals of one structure for all.
#
#   - A plain rule gives the gradients of all inputs. It is traced as if all were
#     perturbed, and its residuals are the same for all (`rule_for_all`).
#   - With `symbolic_zeros=True` the rule sees which are, and may save something else
#     for each case. Here the residuals are the operands, and `backward` evaluates the
#     forward rule again. `backward` has to know which inputs were perturbed, and static
#     data would be part of the treedef. The information is in shapes instead: a
#     residual of shape (0, 2) for a perturbed input, of (0, 1) for any other. Shapes
#     stay with the residuals of each trace. The last dimension counts, because `vmap`
#     and loops add dimensions in front. The arrays have no elements and cost nothing.
#
# The user's function has the same constraint: JAX keeps the residual treedef of the
# last trace of its forward rule. The two halves for one set of perturbed inputs are
# therefore traced together, before another trace can come between, and kept.

_traced_rules: weakref.WeakKeyDictionary[Any, dict[Any, tuple[Trace, Trace]]] = (
    weakref.WeakKeyDictionary()
)


@rule_for("custom_vjp_call")
def _custom_vjp(run: Run, *operands: Any, **_: Any) -> list[Any]:
    """The user's two rules, traced by `jax.vjp` and evaluated on the factors."""
    run = run._replace(key=None)  # a rule cannot know of a dropout mask
    inner = run._replace(counting=False, exact=None)  # of other jaxprs
    eqn, n = run.eqn, len(run.eqn.outvars)
    closed, known = custom_consts(eqn), _traced_rules.setdefault(call_jaxpr(eqn), {})

    def rule(perturbed, operands):
        vjp = lambda *xs: jax.vjp(_along(eqn, xs), _pick(xs, perturbed))
        return trace(vjp, *weights(operands))

    def way_back(traced, residuals, cotangents):
        def back(residuals, cotangents):
            _, pullback = traced.restore([None] * n + residuals)
            return pullback(cotangents)

        return trace(back, weights(residuals), cotangents)

    def rule_for_all(operands):
        """The rule that gives all gradients, whatever is perturbed, if there is one."""
        if sees_perturbed(eqn):
            return None
        every = [i for i in range(closed, len(operands)) if _is_inexact(operands[i])]
        try:
            return rule(every, operands)
        except Exception:  # `vmap` makes operands of the constants of a rule
            return None

    @_closures_named(run, operands)
    def forward(operands):
        is_primal = lambda x: isinstance(x, CustomVJPPrimal)
        primals = operands
        operands = jax.tree.map(lambda x: x.value, primals, is_leaf=is_primal)
        perturbed = _perturbed(operands, primals, lambda x: x.perturbed, is_primal)
        perturbed = tuple(perturbed)
        _note_derivatives(inner, operands, perturbed)
        traced = None
        if not any(i < closed for i in perturbed):  # that is an error, which JAX raises
            traced = rule_for_all(operands)
        marks = []
        if traced is None:
            every = range(len(operands))
            marks = [jnp.zeros((0, 1 + (i in perturbed)), bool) for i in every]
            in_cache = perturbed in known
            traced = known[perturbed][0] if in_cache else rule(perturbed, operands)
        leaving = range(n, len(result_shapes(traced.jaxpr)))  # `backward` may use any
        results = run_jaxpr(inner, traced.jaxpr, operands, leaving=leaving)
        out = materialize_all(inner, results[:n], "custom_vjp_call")
        if marks and perturbed not in known:
            cotangents = [*map(_zero_cotangent, out)]
            known[perturbed] = traced, way_back(traced, results[n:], cotangents)
        return out, (operands, marks, [] if marks else results[n:])

    @_closures_named(run, operands)
    def backward(saved, cotangents):
        operands, marks, residuals = saved
        cotangents = [*map(_dense, cotangents)]
        if marks:
            perturbed = tuple(i for i, x in enumerate(marks) if x.shape[-1] > 1)
            traced, pulled = known[perturbed]
            leaving = range(n, len(result_shapes(traced.jaxpr)))
            residuals = run_jaxpr(inner, traced.jaxpr, operands, leaving=leaving)[n:]
        else:
            pulled = way_back(rule_for_all(operands), residuals, cotangents)
        results = run_jaxpr(inner, pulled.jaxpr, [*residuals, *cotangents])
        results = materialize_all(inner, results, "custom_vjp_call")
        (grads,) = pulled.restore(results)
        for i, grad in grads.items():
            if is_factors(operands[i]):
                (grads[i],) = jax.vjp(materialize, operands[i])[1](grad)
        return ([grads.get(i) for i in range(len(operands))],)

    function = jax.custom_vjp(_without_rule(run))
    function.defvjp(forward, backward, symbolic_zeros=True)
    if run.counting:
        _foresee(run, _pull, function, operands)
    return function(list(operands))


def _without_rule(run: Run) -> Callable[..., list[Any]]:
    """A function with a derivative rule, without the rule: of operands, to arrays."""

    def call(operands):
        results = run_jaxpr(run, call_jaxpr(run.eqn), operands)
        return materialize_all(run, results, run.eqn.primitive.name)

    return call


def _closed_over(run: Run, outer: Sequence[Any], inner: Sequence[Any]) -> Run:
    """The run of a rule that may close over tracers of the finished trace of `fn`.

    The first operands of the call are what the function closes over. Its rule closes
    over the same values, but JAX does not pass them to it: it holds the tracers that
    `fn` got. They stand for operands of `fn`, and so for the arguments of the rule.
    """
    values = zip(outer[: custom_consts(run.eqn)], inner, strict=False)
    pairs = ((t, new) for old, new in values for t, v in run.inputs if v is old)
    return run._replace(known={id(t): new for t, new in pairs} | (run.known or {}))


@contextlib.contextmanager
def _closures_named(run: Run, operands: Sequence[Any]) -> Iterator[None]:
    """Explains the error of a derivative rule that closes over a traced value.

    `fn` was traced before the rule runs, so whatever else the rule closes over is a
    value of a finished trace. JAX itself raises the same error under `jax.jit`.
    """
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        raise _closure_error(run, operands) from error


def _closure_error(run: Run, operands: Sequence[Any]) -> ValueError:
    name, n = run.eqn.primitive.name.removesuffix("_call"), custom_consts(run.eqn)
    names = [x.name for x in operands[:n] if is_factors(x)]
    what = repr(str(joined(names))) if names else "a value made of the weights"
    line = f" at {at}" if (at := line_of(run)) else ""
    return ValueError(
        f"A jax.{name} function{line} closes over {what}: its rule, which runs later, "
        "has no derivative for that. Pass it as an argument, f(x, w) with a rule for "
        "both, in place of f(x) with w from outside."
    )


def _note_derivatives(
    run: Run, operands: Sequence[Any], perturbed: Sequence[int]
) -> None:
    """Notes that a rule takes or gives materialized derivatives of these weights."""
    for i in perturbed:
        if is_factors(operands[i]):
            cause = f"derivative of {run.eqn.primitive.name}"
            note_materialized(run, operands[i], cause)


def _foresee(
    run: Run, take: Any, fn: Callable[..., Any], operands: Sequence[Any]
) -> None:
    """Notes what the derivative of `fn` by the weights will materialize."""
    which = [i for i, x in enumerate(operands) if is_factors(x)]
    some = lambda xs: fn([xs.get(i, x) for i, x in enumerate(operands)])
    with collect_notes() as found:
        try:
            jax.eval_shape(lambda xs: take(some, xs), _pick(operands, which))
        except Exception:  # it has none, and so materializes nothing in it
            return
    for one in found.values():
        if one.materialized:
            note(run, one)


def _pull(fn: Callable[..., Any], xs: Any) -> Any:
    out, pull = jax.vjp(fn, xs)
    return pull(jax.tree.map(_zero_cotangent, out))


def _zero_cotangent(y: Any) -> Any:
    if jnp.issubdtype(y.dtype, jnp.inexact):
        return jnp.zeros_like(y)
    return np.zeros(y.shape, jax.dtypes.float0)


def _perturbed(
    operands: Sequence[Any], marks: Any, is_perturbed: Any, is_leaf: Any = None
) -> list[int]:
    """The operands that are differentiated, as marks on their leaves show.

    Integers are not. JAX marks others as perturbed, too, and to differentiate a custom
    function by constants that it closes over would be an error.
    """
    any_leaf = lambda mark: any(
        map(is_perturbed, jax.tree.leaves(mark, is_leaf=is_leaf))
    )
    pairs = enumerate(zip(operands, marks, strict=True))
    return [i for i, (x, mark) in pairs if _is_inexact(x) and any_leaf(mark)]


def _is_inexact(x: Any) -> bool:
    dtype = x.dtype if is_factors(x) else jnp.result_type(x)
    return jnp.issubdtype(dtype, jnp.inexact)


def _dense(x: Any) -> Any:
    return zeros(x.aval) if isinstance(x, SymbolicZero) else x


def _pick(xs: Sequence[Any], which: Any) -> dict[int, Any]:
    return {i: xs[i] for i in which}


def _along(eqn: Any, xs: Sequence[Any]) -> Callable[[dict[int, Any]], list[Any]]:
    """The equation as a function of some of its operands."""
    return lambda some: bind(eqn, [some.get(i, x) for i, x in enumerate(xs)])


def _tangent(x: Any, dot: Any) -> Any:
    """The tangent of the materialized weight: a custom rule sees no other."""
    return jax.jvp(materialize, (x,), (dot,))[1] if is_factors(x) else dot
