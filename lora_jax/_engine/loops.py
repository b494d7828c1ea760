"""The rules of loops and branches: `scan`, `while` and `cond`.

A weight that the body only reads stays factored. One that is carried does if the body
returns it with factors of the same shapes; otherwise it is materialized before the
loop. What leaves a branch is an array.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._engine import factors
from lora_jax._engine.evaluate import rule_for, run_jaxpr, types_of
from lora_jax._engine.factors import (
    Factors,
    WeightName,
    is_factors,
    joined,
    materialize,
    renamed,
)
from lora_jax._engine.flow import flow_through
from lora_jax._engine.jaxpr import ids_of, loop_body, result_shapes
from lora_jax._engine.liveness import passed_on
from lora_jax._engine.quantized import is_quantized, spread
from lora_jax._engine.quantized_views import wide_scaled
from lora_jax._engine.run import (
    Run,
    by_weight,
    collect_notes,
    materialize_all,
    materialize_one,
    note,
)
from lora_jax._engine.views import always_follows, is_product

# A loop can carry a weight from step to step, for example two tables that swap places.
# The structure of a carry must be the same after each step, and `Factors` are several
# arrays. So each rule divides the carry: weights that the body returns unchanged are
# constants (`_fixed`), weights that it returns as factors of the same shapes stay
# factors (`_steady`), and all others are materialized before the first step. Operands
# that are scanned over are sliced together with their factors (`_slices`), since each
# layer of a stack has its factors.


@rule_for("scan")
def _scan(
    run: Run,
    *operands: Any,
    jaxpr: Any,
    length: int,
    n_consts: int,
    n_carry: int,
    options: dict[str, Any],
) -> list[Any]:
    consts, init = operands[:n_consts], operands[n_consts : n_consts + n_carry]
    xs = operands[n_consts + n_carry :]
    fixed = _fixed(jaxpr, init, n_consts)
    stacks = [_slices(x) if is_factors(x) else (x, lambda x: x) for x in xs]
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
    constants = (list(consts), fixed)
    if length:
        constants = _materialized_once(run, operands, constants, first_with, carry, xs)
    fixed = constants[1]
    trial = lambda run, carry, xs: first_with(run, constants, carry, xs)
    if length:
        carry = _steady(run, operands, carry, trial, xs)
    else:
        carry = materialize_all(run, carry, "scan")

    def body(carry, x):
        after, ys = step_with(run, constants, carry, x)
        return _alike(run, carry, after), ys

    carry, ys = lax.scan(body, carry, xs, length, **options)
    return [*_filled(carry, fixed), *ys]


# A `while` has two functions of its carry, and both may use a weight. The dropout key
# is part of the carry, because a `while` has no `xs` with a key for each step.


@rule_for("while")
def _while(
    run: Run,
    *operands: Any,
    cond_jaxpr: Any,
    body_jaxpr: Any,
    cond_nconsts: int,
    body_nconsts: int,
) -> list[Any]:
    cond_consts, rest = [*operands[:cond_nconsts]], operands[cond_nconsts:]
    body_consts, init = [*rest[:body_nconsts]], rest[body_nconsts:]
    fixed = _fixed(body_jaxpr, init, body_nconsts)
    # Under `vmap` the condition is batched: finished examples stay as they are while
    # the others continue.
    ((*batch,),) = result_shapes(cond_jaxpr)

    def more(run, constants, carry):
        cond_consts, _, fixed = constants
        return run_jaxpr(run, cond_jaxpr, [*cond_consts, *_filled(carry, fixed)])[0]

    def next_carry(run, constants, carry):
        _, body_consts, fixed = constants
        run = run._replace(looped=True)
        results = run_jaxpr(run, body_jaxpr, [*body_consts, *_filled(carry, fixed)])
        return _free(results, fixed)

    def first(run, constants, carry):
        return more(run, constants, carry), next_carry(run, constants, carry)

    carry, constants = _free(init, fixed), (cond_consts, body_consts, fixed)
    constants = _materialized_once(run, operands, constants, first, carry)
    fixed = constants[-1]

    def step(run, carry):
        results = next_carry(run, constants, carry)
        if not batch:
            return results
        running = more(run, constants, carry)
        pairs = zip(materialize_all(run, results, "while"), carry, strict=True)
        return [
            lax.select(lax.broadcast_in_dim(running, y.shape, range(len(batch))), y, x)
            for y, x in pairs
        ]

    def cond(state):
        key, carry = state
        running = more(run._replace(key=key), constants, carry)
        return jnp.any(running) if batch else running

    def body(state):
        key, carry = state
        key, now = (None, None) if key is None else jax.random.split(key)
        return key, _alike(run, carry, step(run._replace(key=now), carry))

    if batch:
        carry = materialize_all(run, carry, "while")
    else:
        carry = _steady(run, operands, carry, step)
    return _filled(lax.while_loop(cond, body, (run.key, carry))[1], fixed)


# The branches of a `cond` must return the same types, but one may return a weight
# unchanged and another its square. So the results of a branch are arrays.


@rule_for("cond")
def _cond(
    run: Run,
    index: Any,
    *operands: Any,
    branches: Any,
    branches_platforms: Any,
    **_: Any,
) -> list[Any]:
    def branch(jaxpr, operands):
        return materialize_all(run, run_jaxpr(run, jaxpr, operands), "cond")

    functions = [functools.partial(branch, jaxpr) for jaxpr in branches]
    if branches_platforms is None:
        return lax.switch(index, functions, list(operands))
    # `lax.platform_dependent`: only one of its branches is ever lowered.
    pairs = [*zip(branches_platforms, functions, strict=True)]
    by_platform = {name: function for names, function in pairs for name in names or ()}
    default = next((function for names, function in pairs if names is None), None)
    return lax.platform_dependent(list(operands), default=default, **by_platform)


def _fixed(jaxpr: Any, init: Sequence[Any], n_consts: int) -> dict[int, Factors]:
    """The carried weights that the loop never changes, which are in fact constants."""
    return {
        i: x
        for i, x in enumerate(init)
        if is_factors(x) and passed_on(jaxpr, i, n_consts + i)
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
      operands: The operands of the loop's equation.
      constants: A tree of arrays and `Factors`.
      step: `step(run, constants, *args)`, one step of the loop.
      *args: Its other arguments.
    """
    leaves, treedef = jax.tree.flatten(constants, is_leaf=is_factors)
    weights = {i: x for i, x in enumerate(leaves) if is_factors(x) and x.rank}
    if not weights or run.materialize == "error":
        return constants  # the error has to be raised where the weight is met
    if _meets_only_products(run, operands):
        return constants
    marks = {f"constant {i} of the loop": i for i in weights}
    marked = list(leaves)
    for mark, i in marks.items():
        marked[i] = renamed(leaves[i], WeightName((mark,)))
    quiet = run._replace(materialize="allow", counting=False)
    with collect_notes() as found:
        jax.eval_shape(
            lambda leaves, *args: step(quiet, treedef.unflatten(leaves), *args),
            marked,
            *args,
        )
    once = run._replace(trail=(*run.trail[:-1], (run.trail[-1][0], 1)))
    seen: set[int] = set()
    for one in by_weight(found):
        i = marks.get(str(one.name))
        if i is None or not one.materialized:
            continue
        cost = 0 if i in seen else factors.delta_flops(weights[i])
        note(once, one._replace(name=weights[i].name, flops=cost))
        seen.add(i)
        leaves[i] = materialize(weights[i])
    return treedef.unflatten(leaves)


def _meets_only_products(run: Run, operands: Sequence[Any]) -> bool:
    """Whether a loop's weights go to products alone, by views that always follow."""
    blocked = []

    def step(eqn, states):
        if is_product(eqn):
            return [False] * len(eqn.outvars)
        if not always_follows(run, eqn):
            blocked.append(eqn)
        return [True] * len(eqn.outvars)

    flow_through(run.eqn, [*map(is_factors, operands)], step, any, False)
    return not blocked


def _steady(
    run: Run,
    operands: Sequence[Any],
    carry: list[Any],
    step: Callable[..., Any],
    *xs: Any,
) -> list[Any]:
    """The carry, in which only weights that the body returns as such stay factored."""
    cause = run.eqn.primitive.name
    carry = [_scalable(x) for x in carry]
    pairs = zip(carry, _kept(run, carry, step, operands, xs), strict=True)
    carry = [x if keep else materialize_one(run, x, cause) for x, keep in pairs]
    # Weights may change places from round to round: each has the names of all.
    name = joined(x.name for x in carry if is_factors(x))
    return [renamed(x, name) for x in carry]


def _scalable(x: Any) -> Any:
    """A carried weight whose scales keep their dtype when the body multiplies them."""
    if is_factors(x) and is_quantized(x.w):
        return dataclasses.replace(x, w=wide_scaled(x.w))
    return x


# Which of a loop's carry stay weights, by its body and the shapes of its operands.
# Without this cache each loop would be tried in each trial of the loop around it, and n
# nested loops would take 2^n traces.
_stays: weakref.WeakKeyDictionary[Any, dict[Any, list[bool]]] = (
    weakref.WeakKeyDictionary()
)


# Whether a weight stays a weight depends on the others: a carry that swaps two of them
# keeps both or neither. So all stay at first, one abstract step shows which come back
# with other types, these are materialized, and the step is tried again until nothing
# changes. Each round removes at least one weight, which bounds the number of rounds.


def _kept(run: Run, carry: Any, step: Any, operands: Any, xs: Any) -> list[bool]:
    body = loop_body(run.eqn)
    exact = run.exact and run.exact & ids_of(body)
    shapes = types_of([renamed(x, WeightName()) for x in operands])
    how = (run.eqn.primitive.name, run.key is None, exact, shapes)
    found = _stays.setdefault(body, {})
    if how not in found:
        quiet = run._replace(materialize="allow", counting=False)
        kept = [True] * len(carry)
        while any(map(is_factors, carry)):
            with collect_notes():  # discarded: a trial is no evaluation
                after = jax.eval_shape(functools.partial(step, quiet), carry, *xs)
            stays = [
                not is_factors(x) or types_of(x) == types_of(y)
                for x, y in zip(carry, after, strict=True)
            ]
            if all(stays):
                break
            kept = [k and s for k, s in zip(kept, stays, strict=True)]
            carry = [
                x if stay else jax.eval_shape(materialize, x)
                for x, stay in zip(carry, stays, strict=True)
            ]
        found[how] = kept
    return found[how]


def _alike(run: Run, before: Sequence[Any], after: Sequence[Any]) -> list[Any]:
    """The carry after a step, with weights only where there were weights before it."""
    cause = run.eqn.primitive.name
    return [
        y if is_factors(x) else materialize_all(run, [y], cause)[0]
        for x, y in zip(before, after, strict=True)
    ]


def _slices(f: Factors) -> tuple[Any, Callable[[Any], Factors]]:
    """The parts of `f` that differ from slice to slice, and how to join one slice."""
    w = spread(f.w, 0) if is_quantized(f.w) else f.w
    companions = factors.parts(f)
    varying = {i: x for i, x in enumerate(companions) if x.shape[0] != 1}
    same = {i: jnp.squeeze(x, 0) for i, x in enumerate(companions) if i not in varying}

    def join(slices):
        w, varying = slices
        every = same | varying
        return factors.with_parts(f, w, (every[i] for i in range(len(companions))))

    return (w, varying), join
