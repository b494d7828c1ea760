"""What the outputs of a program depend on, carried back from them to its inputs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from lora_jax._engine.jaxpr import (
    CALLS,
    CUSTOM,
    call_jaxpr,
    custom_consts,
    opened,
    operand_atoms,
    scan_counts,
    variables,
)

# `rule(equation, results) -> operands`: which operands matter if these results do.
Backward = Callable[[Any, list[bool]], list[bool]]


def used_inputs(jaxpr: Any, outputs: Sequence[bool] | None = None) -> list[bool]:
    """Which inputs the outputs (all, if None), their derivatives or an effect use.

    A function with a derivative rule of its own may not read an operand that the rule
    reads.
    """

    def operands(eqn, results):
        live = any(results) or bool(eqn.effects)
        if eqn.primitive.name in CUSTOM:
            first = custom_consts(eqn)
            used = _backward(call_jaxpr(eqn), results, operands)
            return [*used[:first], *(x or live for x in used[first:])]
        return [live] * len(operand_atoms(eqn))

    return _backward(jaxpr, outputs, operands)


def look_ahead(
    jaxpr: Any, beyond: Callable[..., bool] | None = None
) -> Callable[..., bool]:
    """Answers, for equations of a jaxpr, whether a result meets a goal later on.

    Args:
      jaxpr: The jaxpr of the equations.
      beyond: `beyond(i, goal, passes, leaves)`: the same for output i where the jaxpr
        is called.

    Returns:
      `leads_to(equation, goal, passes, leaves=False)`: whether a result of the equation
      meets an equation for which `goal` holds, by way of calls and of equations that
      `passes` allows. `leaves` is the answer for what leaves the jaxpr for an unknown
      place. All equations that ask the same question share one walk.
    """
    program = opened(jaxpr)

    @functools.cache
    def live(goal, passes, leaves=False):
        def operands(eqn, results):
            if eqn.primitive.name in CUSTOM:
                return _backward(call_jaxpr(eqn), results, operands)
            matter = goal(eqn) or (any(results) and passes(eqn))
            return [matter] * len(operand_atoms(eqn))

        outside = lambda i: beyond(i, goal, passes, leaves) if beyond else leaves
        out = enumerate(program.outputs)
        found = set(variables(v for i, v in out if outside(i)))
        for eqn in reversed(program.equations):
            found |= _live_operands(eqn, found, operands)
        return found

    def leads_to(eqn, *how, result=None):
        results = eqn.outvars if result is None else [eqn.outvars[result]]
        return not live(*how).isdisjoint(results)

    return leads_to


def passed_on(jaxpr: Any, output: int, operand: int) -> bool:
    """Whether an output is just that input, untouched, through calls as well."""
    program = opened(jaxpr)
    v, target = program.outputs[output], program.inputs[operand]
    for eqn in reversed(program.equations):
        if v in eqn.outvars:
            if eqn.primitive.name not in CALLS:
                return False
            n, inner, atoms = eqn.outvars.index(v), call_jaxpr(eqn), operand_atoms(eqn)
            sources = [i for i in range(len(atoms)) if passed_on(inner, n, i)]
            if not sources:
                return False
            v = atoms[sources[0]]
    return v is target


def _backward(jaxpr: Any, outputs: Sequence[bool] | None, rule: Backward) -> list[bool]:
    """Which inputs matter, if these outputs do."""
    program = opened(jaxpr)
    wanted = [True] * len(program.outputs) if outputs is None else outputs
    pairs = zip(program.outputs, wanted, strict=True)
    live = set(variables(v for v, want in pairs if want))
    for eqn in reversed(program.equations):
        live |= _live_operands(eqn, live, rule)
    return [v in live for v in program.inputs]


def _live_operands(eqn: Any, live: set[Any], rule: Backward) -> set[Any]:
    name, results = eqn.primitive.name, [v in live for v in eqn.outvars]
    if name in CALLS and name not in CUSTOM:
        used = _backward(call_jaxpr(eqn), results, rule)
    elif name == "scan":
        consts, carry = scan_counts(eqn)
        used = _loop(eqn.params["jaxpr"], consts, carry, results, rule)
    elif name == "while":
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        test = _backward(eqn.params["cond_jaxpr"], None, rule)
        wanted = [any(pair) for pair in zip(results, test[n:], strict=True)]
        body = _loop(eqn.params["body_jaxpr"], m, len(results), wanted, rule)
        carry = [any(pair) for pair in zip(test[n:], body[m:], strict=True)]
        used = [*test[:n], *body[:m], *carry]
    elif name == "cond":
        branches = [_backward(b, results, rule) for b in eqn.params["branches"]]
        used = [True, *map(any, zip(*branches, strict=True))]
    else:
        used = rule(eqn, results)
    pairs = zip(operand_atoms(eqn), used, strict=True)
    return set(variables(v for v, use in pairs if use))


def _loop(
    jaxpr: Any, n_consts: int, n_carry: int, results: Sequence[bool], rule: Backward
) -> list[bool]:
    """The operands of a loop's body that matter, in this round or in a later one."""
    while True:
        used = _backward(jaxpr, results, rule)
        carry = used[n_consts : n_consts + n_carry]
        carry += [False] * (len(results) - n_carry)
        wanted = [any(pair) for pair in zip(results, carry, strict=True)]
        if wanted == list(results):
            return used
        results = wanted
