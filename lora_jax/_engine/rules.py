"""The evaluation of a jaxpr on factors, a rule per primitive, and the rules of calls.

A rule takes the equation and its operands, of which at least one is `Factors`, and
gives the results: another `Factors` for a change of view, an array for a product. A
call carries the factors inside. No rule, or a rule that gives `None`: the weight is
materialised for this one use, which is slower and never wrong.
"""

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import PartitionSpec

from lora_jax._engine import factors
from lora_jax._engine.casts import exact_casts
from lora_jax._engine.factors import JOIN, Factors, Label, materialize, settled
from lora_jax._engine.jaxpr import (
    CALLS,
    Trace,
    bind,
    call_jaxpr,
    contains,
    custom_consts,
    evaluate,
    flow_through,
    ids_of,
    knows_what_moves,
    look_ahead,
    loop_body,
    made_of,
    manual_axes,
    passed_on,
    result_shapes,
    scan_counts,
    trace,
    zeros,
)
from lora_jax._engine.products import PRODUCTS
from lora_jax._engine.quantized import constrained, is_quantized, spread, wide_scaled
from lora_jax._engine.run import (
    Note,
    Rule,
    Run,
    by_weight,
    calls,
    count,
    form,
    listener,
    note,
    noting,
    place_of,
    plain,
    plain_one,
    weights,
)
from lora_jax._engine.views import VIEWS, always_follows, is_product, is_view


def run_jaxpr(
    run: Run,
    jaxpr: Any,
    args: Sequence[Any],
    beyond: Any = None,
    leaving: Sequence[int] = (),
) -> list[Any]:
    """The results of a jaxpr on arrays and `Factors`; they are such themselves.

    `beyond` is as in `look_ahead`, and `leaving` as in `exact_casts`.
    """
    leads_to = look_ahead(jaxpr, beyond)
    if run.exact is None:
        run = run._replace(exact=exact_casts(jaxpr, [*map(_names, args)], leaving))

    def apply(index, eqn, operands):
        if not any(isinstance(x, Factors) for x in operands):
            return bind(eqn, operands)
        name, times = eqn.primitive.name, eqn.params.get("length", 1)
        trail = (*run.trail, (index, times))
        here = run._replace(leads_to=leads_to, eqn=eqn, trail=trail)
        if run.key is not None:
            here = here._replace(key=jax.random.fold_in(run.key, index))
        rule = RULES.get(name)
        results = rule and rule(here, eqn, operands)
        if results is None:
            return bind(eqn, plain(here, operands, name))
        if run.counting and name in PRODUCTS:
            count(here, rule, operands)
        return map(settled, results)

    return evaluate(jaxpr, args, apply, run.known)


def _names(x: Any) -> list[str]:
    return x.name.split(JOIN) if isinstance(x, Factors) else []


def _inline(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    return run_jaxpr(run, call_jaxpr(eqn), operands)


def _shard_map(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    params, axes = eqn.params, manual_axes(eqn)
    specs: list[Any] = []
    for i, spec in enumerate(params["in_specs"]):
        own = [spec]
        if isinstance(operands[i], Factors):
            operands[i], own = factors.cut_for(operands[i], spec, params["mesh"])
        specs += own
    leaves, treedef = jax.tree.flatten(operands)

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


class Form(NamedTuple):
    """A jaxpr, jitted on factors, and what its evaluation had to tell."""

    run: Callable[..., list[Any]]
    told: dict[Any, list[Note]]  # by the operands' shapes


# So that calling a jitted function again compiles nothing.
_forms: weakref.WeakKeyDictionary[Any, dict[Any, Form]] = weakref.WeakKeyDictionary()


def _jit(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    token = calls.set((*calls.get(), eqn))
    try:
        # What is handed through a shared form comes out as another array, but views of
        # one weight share a factor. And a form is traced, and noted, but once.
        if made_of(call_jaxpr(eqn), is_view) and not _places(eqn):
            beyond = lambda i, *how: run.leads_to(eqn, *how, result=i)
            return run_jaxpr(run, call_jaxpr(eqn), operands, beyond)
        if run.counting:
            return _inline(run, eqn, operands)
        shared = _form(run, eqn)
        # What a shared form returns, and tells, is of its operands: names follow them.
        marked = [
            dataclasses.replace(x, name=Label(x.name, [i]))
            if isinstance(x, Factors)
            else x
            for i, x in enumerate(operands)
        ]
        with noting() as new:
            results = shared.run(run.key, marked)
    finally:
        calls.reset(token)
    owner = lambda name: (
        factors.joined([operands[i] for i in sorted(name.of)]) if name.of else name
    )
    for told in new.values():
        note(run, told._replace(name=owner(told.name)))
    shapes = _avals_of(operands)
    # A line inside the jitted function is the same for every caller. Where there is
    # none the note names the line of the call, which the next caller has to replace.
    call_line = place_of(run)
    if new:
        own_line = lambda told: "" if told.place == call_line else told.place
        shared.told[shapes] = [
            told._replace(name=Label("", told.name.of), place=own_line(told))
            for told in new.values()
            if told.name.of
        ]
    else:
        for i, told in enumerate(shared.told.get(shapes, ())):
            here = run._replace(trail=(*run.trail, (i, 1)))
            line = told.place or call_line
            note(here, told._replace(name=owner(told.name), place=line))
    return [
        dataclasses.replace(x, name=owner(x.name)) if isinstance(x, Factors) else x
        for x in results
    ]


def _places(eqn: Any) -> bool:
    """Whether a jitted function says where its arguments or results are."""
    shardings = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    return any(isinstance(x, jax.sharding.Sharding) for x in shardings)


def _form(run: Run, eqn: Any) -> Form:
    jaxpr, params = call_jaxpr(eqn), eqn.params
    shardings = params["in_shardings"], params["out_shardings"]
    options = params.get("compiler_options_kvs", ())
    exact = run.exact and run.exact & ids_of(jaxpr)
    keyless = Run(run.materialize, run.rate, looped=run.looped, exact=exact)
    how = (keyless, params["inline"], shardings, options)
    forms = _forms.setdefault(jaxpr, {})
    if how not in forms:
        # Holding the jaxpr itself would keep its own entry alive for ever.
        held = weakref.ref(jaxpr)

        def call(key, operands):
            operands = map(_constrained, operands, shardings[0])
            results = run_jaxpr(keyless._replace(key=key), held(), list(operands))
            return list(map(_constrained, results, shardings[1]))

        call.__name__ = params["name"]
        jitted = jax.jit(
            call, inline=params["inline"], compiler_options=dict(options) or None
        )
        forms[how] = Form(jitted, {})
    return forms[how]


def _constrained(x: Any, sharding: Any) -> Any:
    if not isinstance(sharding, jax.sharding.Sharding):
        return x
    if isinstance(x, Factors):
        return dataclasses.replace(x, w=constrained(x.w, sharding))
    return constrained(x, sharding)


def _remat(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    def call(key, operands):
        return run_jaxpr(run._replace(key=key), call_jaxpr(eqn), operands)

    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(call, **options)(run.key, operands)


def _custom_jvp(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    """The function's own forward rule, itself evaluated on the factors."""
    run = run._replace(key=None)  # no rule knows of a mask
    quiet = run._replace(counting=False, exact=None)  # of another jaxpr
    here, outer = listener(), operands
    closed = custom_consts(eqn)
    call = jax.custom_jvp(_function_of(run, eqn))

    @_closures_named(run, operands)
    def call_jvp(primals, tangents):
        (operands,), (dots,) = primals, tangents
        operands = _named_here(operands, here)
        inner = _closed_over(quiet, outer, operands)
        moving = _moving(operands, dots, lambda dot: not isinstance(dot, SymbolicZero))
        if any(isinstance(operands[i], Factors) for i in moving if i < closed):
            raise _closure_error(run, operands)  # JAX would drop its tangent silently
        _form_gradients(inner, operands, moving)
        dots = {i: _tangent(operands[i], jax.tree.map(_dense, dots[i])) for i in moving}
        jvp = lambda xs, dots: jax.jvp(_along(eqn, xs), [_pick(xs, dots)], [dots])
        traced = trace(jvp, weights(operands), dots)
        if contains(traced.jaxpr, "scan"):
            # Ours would be no derivative of a scan, but a scan over tangents: JAX 0.9
            # cannot transpose that.
            operands = plain(inner, operands, "custom_jvp_call")
        operands = [*operands, *jax.tree.leaves(dots)]
        results = run_jaxpr(inner, traced.jaxpr, operands)
        out, out_dots = traced.restore(plain(inner, results, "custom_jvp_call"))
        return out, out_dots

    call.defjvp(call_jvp, symbolic_zeros=True)
    if run.counting:
        _foresee(run, lambda f, xs: jax.jvp(f, [xs], [xs]), call, operands)
    return call(operands)


# The rules that depend on what moves, traced: by the function, and by what moves.
_rules: weakref.WeakKeyDictionary[Any, dict[Any, tuple[Trace, Trace]]] = (
    weakref.WeakKeyDictionary()
)


def _custom_vjp(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    """The function's own backward rule, itself evaluated on the factors.

    Of what a forward rule saves JAX keeps one treedef, that of its last trace, whatever
    is differentiated in the others. So `forward` saves the same for all; and of a rule
    of the function's that does not, both ways are traced at once, and never again.
    """
    run = run._replace(key=None)  # no rule knows of a mask
    inner, here = run._replace(counting=False, exact=None), listener()
    n, known = len(eqn.outvars), _rules.setdefault(call_jaxpr(eqn), {})

    def rule(moving, operands):
        vjp = lambda *xs: jax.vjp(_along(eqn, xs), _pick(xs, moving))
        return trace(vjp, *weights(operands))

    def way_back(traced, residuals, cotangents):
        def back(residuals, cotangents):
            _, pullback = traced.restore([None] * n + residuals)
            return pullback(cotangents)

        return trace(back, weights(residuals), cotangents)

    def rule_for_all(operands):
        """The rule that gives the gradients of all, whatever moves; if there is one."""
        if knows_what_moves(eqn):
            return None
        every = range(custom_consts(eqn), len(operands))
        every = [i for i in every if _is_inexact(operands[i])]
        try:
            return rule(every, operands)
        except Exception:  # `vmap` makes operands of the constants of a rule
            return None

    @_closures_named(run, operands)
    def forward(operands):
        is_primal = lambda x: isinstance(x, CustomVJPPrimal)
        primals = operands
        operands = jax.tree.map(lambda x: x.value, primals, is_leaf=is_primal)
        operands = _named_here(operands, here)
        moving = tuple(_moving(operands, primals, lambda x: x.perturbed, is_primal))
        _form_gradients(inner, operands, moving)
        traced = None
        if not any(i < custom_consts(eqn) for i in moving):  # else it is JAX's error
            traced = rule_for_all(operands)
        # Where the rule depends on what moves, what it saves may, too: that is computed
        # again, and what moves is in the shapes of arrays without numbers.
        marks = []
        if traced is None:
            marks = [
                jnp.zeros((0, 1 + (i in moving)), bool) for i in range(len(operands))
            ]
            traced = known[moving][0] if moving in known else rule(moving, operands)
        saved = range(n, len(result_shapes(traced.jaxpr)))  # the way back may use any
        results = run_jaxpr(inner, traced.jaxpr, operands, leaving=saved)
        out = plain(inner, results[:n], "custom_vjp_call")
        if marks and moving not in known:
            cotangents = [*map(_zero_cotangent, out)]
            known[moving] = traced, way_back(traced, results[n:], cotangents)
        return out, (operands, marks, [] if marks else results[n:])

    @_closures_named(run, operands)
    def backward(saved, cotangents):
        operands, marks, residuals = saved
        operands, residuals = (_named_here(x, here) for x in (operands, residuals))
        cotangents = [*map(_dense, cotangents)]
        if marks:
            moving = tuple(i for i, x in enumerate(marks) if x.shape[-1] > 1)
            traced, pulled = known[moving]
            saved = range(n, len(result_shapes(traced.jaxpr)))
            residuals = run_jaxpr(inner, traced.jaxpr, operands, leaving=saved)[n:]
        else:
            pulled = way_back(rule_for_all(operands), residuals, cotangents)
        results = run_jaxpr(inner, pulled.jaxpr, [*residuals, *cotangents])
        (grads,) = pulled.restore(plain(inner, results, "custom_vjp_call"))
        for i, grad in grads.items():
            if isinstance(operands[i], Factors):
                (grads[i],) = jax.vjp(materialize, operands[i])[1](grad)
        return ([grads.get(i) for i in range(len(operands))],)

    custom = jax.custom_vjp(_function_of(run, eqn))
    custom.defvjp(forward, backward, symbolic_zeros=True)
    if run.counting:
        _foresee(run, _pull, custom, operands)
    return custom(operands)


def _closed_over(run: Run, outer: Sequence[Any], own: Sequence[Any]) -> Run:
    """The run of a derivative rule that may close over tracers of a finished trace.

    What the function closes over are its first operands. The rule closes over the same
    values, but JAX does not pass them to it: it holds the tracers that `fn` got.
    """
    values = zip(outer[: custom_consts(run.eqn)], own, strict=False)
    pairs = ((t, new) for old, new in values for t, v in run.inputs if v is old)
    return run._replace(known={id(t): new for t, new in pairs} | (run.known or {}))


def _named_here(operands: Sequence[Any], here: int) -> list[Any]:
    """The operands of a rule that JAX may run later, while another form is traced.

    Of which operand of its own form a weight came means nothing there.
    """
    if listener() == here:
        return list(operands)
    return [
        dataclasses.replace(x, name=Label(x.name)) if isinstance(x, Factors) else x
        for x in operands
    ]


@contextlib.contextmanager
def _closures_named(run: Run, operands: Sequence[Any]) -> Iterator[None]:
    """Explains the error of a derivative rule that closes over a traced value.

    The function was traced before the rule runs, so whatever the rule closes over is a
    value of a finished trace. JAX itself gives the same error under `jax.jit`. The
    function closes over the same values, which are operands of the call, and first.
    """
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        raise _closure_error(run, operands) from error


def _closure_error(run: Run, operands: Sequence[Any]) -> ValueError:
    name, n = run.eqn.primitive.name.removesuffix("_call"), custom_consts(run.eqn)
    own = [x for x in operands[:n] if isinstance(x, Factors)]
    what = repr(str(factors.joined(own))) if own else "a value made of the weights"
    line = f" at {at}" if (at := place_of(run)) else ""
    return ValueError(
        f"A jax.{name} function{line} closes over {what}: its rule, which runs later, "
        "has no derivative for that. Pass it as an argument, f(x, w) with a rule for "
        "both, in place of f(x) with w from outside."
    )


def _form_gradients(run: Run, operands: Sequence[Any], moving: Sequence[int]) -> None:
    """Says that a custom rule takes, or gives, whole derivatives of these weights."""
    for i in moving:
        if isinstance(operands[i], Factors):
            form(run, operands[i], f"derivative of {run.eqn.primitive.name}")


def _foresee(run: Run, take: Any, fn: Callable[..., Any], operands: list[Any]) -> None:
    """Notes what the derivative of `fn` by the weights will form, as it is taken."""
    which = [i for i, x in enumerate(operands) if isinstance(x, Factors)]
    some = lambda xs: fn([xs.get(i, x) for i, x in enumerate(operands)])
    with noting() as found:
        try:
            jax.eval_shape(lambda xs: take(some, xs), _pick(operands, which))
        except Exception:  # it has none, and so forms nothing in it
            return
    for told in found.values():
        if told.formed:
            note(run, told)


def _pull(fn: Callable[..., Any], xs: Any) -> Any:
    out, pull = jax.vjp(fn, xs)
    return pull(jax.tree.map(_zero_cotangent, out))


def _zero_cotangent(y: Any) -> Any:
    if jnp.issubdtype(y.dtype, jnp.inexact):
        return jnp.zeros_like(y)
    return np.zeros(y.shape, jax.dtypes.float0)


def _function_of(run: Run, eqn: Any) -> Callable[..., list[Any]]:
    """A custom function without its rule: of operands, to arrays."""

    def call(operands):
        results = run_jaxpr(run, call_jaxpr(eqn), operands)
        return plain(run, results, eqn.primitive.name)

    return call


def _moving(operands: Sequence[Any], marks: Any, moves: Any, is_leaf: Any = None):
    """The operands that are differentiated, as marks on their leaves say.

    Others may be constants that the function closes over. By those JAX does not
    differentiate a custom function: to ask would be an error.
    """
    return [
        i
        for i, (x, mark) in enumerate(zip(operands, marks, strict=True))
        if _is_inexact(x) and any(map(moves, jax.tree.leaves(mark, is_leaf=is_leaf)))
    ]


def _is_inexact(x: Any) -> bool:
    dtype = x.dtype if isinstance(x, Factors) else jnp.result_type(x)
    return jnp.issubdtype(dtype, jnp.inexact)


def _dense(x: Any) -> Any:
    return zeros(x.aval) if isinstance(x, SymbolicZero) else x


def _pick(xs: Sequence[Any], which: Any) -> dict[int, Any]:
    return {i: xs[i] for i in which}


def _along(eqn: Any, xs: Sequence[Any]) -> Callable[[dict[int, Any]], list[Any]]:
    """The equation as a function of some of its operands."""
    return lambda some: bind(eqn, [some.get(i, x) for i, x in enumerate(xs)])


def _tangent(x: Any, dot: Any) -> Any:
    """The tangent of the whole weight: a custom rule sees no other."""
    return jax.jvp(materialize, (x,), (dot,))[1] if isinstance(x, Factors) else dot


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

    def step_with(run, constants, carry, x):
        (consts, fixed), (slices, key) = constants, x
        xs = [join(x) for join, x in zip(restore, slices, strict=True)]
        run = run._replace(key=key, looped=True)
        results = run_jaxpr(run, jaxpr, [*consts, *_filled(carry, fixed), *xs])
        # A weight that comes out of each step is a stack of weights again.
        return _free(results[:n_carry], fixed), results[n_carry:]

    def first_with(run, constants, carry, xs):
        return step_with(run, constants, carry, jax.tree.map(lambda x: x[0], xs))[0]

    xs = (list(slices), keys)
    carry = _free(init, fixed)
    constants = (consts, fixed)
    if length:
        constants = _materialized_once(run, operands, constants, first_with, carry, xs)
    fixed = constants[1]
    step = lambda run, carry, x: step_with(run, constants, carry, x)
    trial = lambda run, carry, xs: first_with(run, constants, carry, xs)
    carry = (
        _steady(run, operands, carry, trial, xs)
        if length
        else plain(run, carry, "scan")
    )

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


def _materialized_once(
    run: Run, operands: Sequence[Any], constants: Any, step: Any, *args: Any
) -> Any:
    """A loop's constants, as arrays where its body would materialize them.

    XLA does not move the sum W + scale * A B out of the loop, so that each step would
    compute it again, and its derivative as well. One abstract step shows which weights
    the body materializes. Most bodies need none: there every weight goes to a product
    by way of views that its factors can always follow.

    Args:
      run: The evaluation, at the loop.
      operands: Of the loop's equation.
      constants: A tree of arrays and `Factors`.
      step: `step(run, constants, *args)`, one step of the loop.
      *args: Its other arguments.
    """
    leaves, treedef = jax.tree.flatten(constants, is_leaf=_is_factors)
    weights = {i: x for i, x in enumerate(leaves) if _is_factors(x) and x.rank}
    if not weights or run.materialize == "error":
        return constants  # as an error it has to be raised where it is met
    if _meets_only_products(run, operands):
        return constants
    marks = {f"constant {i} of the loop": i for i in weights}
    marked = list(leaves)
    for mark, i in marks.items():
        marked[i] = dataclasses.replace(leaves[i], name=Label(mark))
    quiet = run._replace(materialize="allow", counting=False)
    with noting() as found:
        jax.eval_shape(
            lambda leaves, *args: step(quiet, treedef.unflatten(leaves), *args),
            marked,
            *args,
        )
    once = run._replace(trail=(*run.trail[:-1], (run.trail[-1][0], 1)))
    seen: set[int] = set()
    for told in by_weight(found):
        i = marks.get(str(told.name))
        if i is None or not told.formed:
            continue
        cost = 0 if i in seen else factors.delta_flops(weights[i])
        note(once, told._replace(name=weights[i].name, flops=cost))
        seen.add(i)
        leaves[i] = materialize(weights[i])
    return treedef.unflatten(leaves)


def _is_factors(x: Any) -> bool:
    return isinstance(x, Factors)


def _meets_only_products(run: Run, operands: Sequence[Any]) -> bool:
    """Whether a loop's weights go to products alone, by views that always follow."""
    blocked = []

    def step(eqn, states):
        if is_product(eqn):
            return [False] * len(eqn.outvars)
        if not always_follows(run, eqn):
            blocked.append(eqn)
        return [True] * len(eqn.outvars)

    flow_through(run.eqn, [*map(_is_factors, operands)], step, any, False)
    return not blocked


def _steady(
    run: Run,
    operands: list[Any],
    carry: list[Any],
    step: Callable[..., Any],
    *xs: Any,
) -> list[Any]:
    """The carry in which what enters the loop as a weight also leaves it as one."""
    cause = run.eqn.primitive.name
    carry = [_scalable(x) for x in carry]
    pairs = zip(carry, _kept(run, carry, step, operands, xs), strict=True)
    carry = [x if keep else plain_one(run, x, cause) for x, keep in pairs]
    # Weights may change places from round to round: each has the names of all.
    carried = [x for x in carry if isinstance(x, Factors)]
    name = factors.joined(carried)
    return [
        dataclasses.replace(x, name=name) if isinstance(x, Factors) else x
        for x in carry
    ]


def _scalable(x: Any) -> Any:
    """A carried weight in few bits may be multiplied, and is the same kind after."""
    if isinstance(x, Factors) and is_quantized(x.w):
        return dataclasses.replace(x, w=wide_scaled(x.w))
    return x


# Which of a loop's carry stay as they are, by its body and the shapes of its operands.
# Else each loop would be tried in each trial of one around it: 2^depth traces.
_stays: weakref.WeakKeyDictionary[Any, dict[Any, list[bool]]] = (
    weakref.WeakKeyDictionary()
)


def _kept(run: Run, carry: Any, step: Any, operands: Any, xs: Any) -> list[bool]:
    body = loop_body(run.eqn)
    exact = run.exact and run.exact & ids_of(body)
    avals = _avals_of(_nameless(operands))
    shapes = (run.eqn.primitive.name, run.key is None, exact, avals)
    found = _stays.setdefault(body, {})
    if shapes not in found:
        quiet = run._replace(materialize="allow", counting=False)
        kept = [True] * len(carry)
        while any(isinstance(x, Factors) for x in carry):
            with noting():  # and not telling: this was no evaluation
                after = jax.eval_shape(functools.partial(step, quiet), carry, *xs)
            stays = [
                not isinstance(x, Factors) or _avals_of(x) == _avals_of(y)
                for x, y in zip(carry, after, strict=True)
            ]
            if all(stays):
                break
            kept = [k and s for k, s in zip(kept, stays, strict=True)]
            carry = [
                x if stay else jax.eval_shape(materialize, x)
                for x, stay in zip(carry, stays, strict=True)
            ]
        found[shapes] = kept
    return found[shapes]


def _nameless(operands: Sequence[Any]) -> list[Any]:
    return [
        dataclasses.replace(x, name=Label()) if isinstance(x, Factors) else x
        for x in operands
    ]


def _alike(run: Run, before: Sequence[Any], after: Sequence[Any]) -> list[Any]:
    """What a loop hands on, weights only where it took weights."""
    return [
        y if isinstance(x, Factors) else plain(run, [y], run.eqn.primitive.name)[0]
        for x, y in zip(before, after, strict=True)
    ]


def _avals_of(x: Any) -> Any:
    leaves, treedef = jax.tree.flatten(x)
    return treedef, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)


def _slices(f: Factors):
    """The parts of `f` that differ from slice to slice, and how to join one slice."""
    w = spread(f.w, 0) if is_quantized(f.w) else f.w
    parts = {"a": f.a, "b": f.b, "scale": f.scale[..., None]}
    if f.gain is not None:
        parts["gain"] = f.gain[..., None]
    same = {
        k: jnp.squeeze(x, 0) for k, x in parts.items() if 0 not in factors.present(x)
    }
    varying = {k: x for k, x in parts.items() if k not in same}

    def join(slices):
        w, varying = slices
        parts = same | varying
        numbers = [parts[name][..., 0] for name in ("scale", "gain") if name in parts]
        return factors.with_thin(f, w, (parts["a"], parts["b"], *numbers))

    return (w, varying), join


def _while(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, operands = operands[:n_cond], operands[n_cond:]
    body_consts, init = operands[:n_body], operands[n_body:]
    fixed = _fixed(params["body_jaxpr"], init, n_body)
    # Under `vmap` each example has its own end: the others go on without it.
    ((*mapped,),) = result_shapes(params["cond_jaxpr"])

    def more(run, constants, carry):
        cond_consts, _, fixed = constants
        operands = [*cond_consts, *_filled(carry, fixed)]
        return run_jaxpr(run, params["cond_jaxpr"], operands)[0]

    def next_carry(run, constants, carry):
        _, body_consts, fixed = constants
        run = run._replace(looped=True)
        operands = [*body_consts, *_filled(carry, fixed)]
        return _free(run_jaxpr(run, params["body_jaxpr"], operands), fixed)

    def first(run, constants, carry):
        return more(run, constants, carry), next_carry(run, constants, carry)

    carry, constants = _free(init, fixed), (cond_consts, body_consts, fixed)
    every = [*cond_consts, *operands]
    constants = _materialized_once(run, every, constants, first, carry)
    fixed = constants[-1]
    go = lambda run, carry: more(run, constants, carry)

    def step(run, carry):
        results = next_carry(run, constants, carry)
        if not mapped:
            return results
        running = go(run, carry)
        pairs = zip(plain(run, results, "while"), carry, strict=True)
        return [
            lax.select(lax.broadcast_in_dim(running, y.shape, range(len(mapped))), y, x)
            for y, x in pairs
        ]

    def cond(state):
        key, carry = state
        more = go(run._replace(key=key), carry)
        return jnp.any(more) if mapped else more

    def body(state):
        key, carry = state
        key, own = (None, None) if key is None else jax.random.split(key)
        return key, _alike(run, carry, step(run._replace(key=own), carry))

    carry = (
        plain(run, carry, "while")
        if mapped
        else _steady(run, [*cond_consts, *operands], carry, step)
    )
    return _filled(lax.while_loop(cond, body, (run.key, carry))[1], fixed)


def _cond(run: Run, eqn: Any, operands: list[Any]) -> list[Any]:
    index, *operands = operands

    def branch(jaxpr, operands):
        return plain(run, run_jaxpr(run, jaxpr, operands), "cond")

    branches = [functools.partial(branch, jaxpr) for jaxpr in eqn.params["branches"]]
    platforms = eqn.params.get("branches_platforms")
    if platforms is not None:  # of `lax.platform_dependent`: only one is ever lowered
        pairs = [*zip(platforms, branches, strict=True)]
        own = {name: branch for names, branch in pairs for name in names or ()}
        default = next((branch for names, branch in pairs if names is None), None)
        return lax.platform_dependent(operands, default=default, **own)
    return lax.switch(index, branches, operands)


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
