"""What is known of a program's values, carried forward from its inputs."""

from collections.abc import Callable, Sequence
from typing import Any

from lora_jax._engine.jaxpr import (
    CALLS,
    call_jaxpr,
    is_literal,
    opened,
    operand_atoms,
    scan_counts,
)

Step = Callable[[Any, list[Any]], Sequence[Any]]
Join = Callable[[Sequence[Any]], Any]
Enter = Callable[[Any, list[Any]], None]


def flow(
    jaxpr: Any,
    states: Sequence[Any],
    step: Step,
    join: Join,
    nothing: Any,
    enter: Enter = lambda eqn, states: None,
) -> list[Any]:
    """The states of a jaxpr's outputs, given those of its inputs.

    Args:
      jaxpr: The program.
      states: One per input.
      step: `step(equation, states) -> states`, for each equation that is no call, loop
        or branch and that an input with a state reaches.
      join: Combines the states that meet where branches or the rounds of a loop join. A
        loop is repeated until the states of its carry no longer change, so states must
        be sets, of finitely many elements, that only grow under `join`.
      nothing: The state of constants.
      enter: `enter(equation, states)` is called first for each call.
    """
    program = opened(jaxpr)
    known = dict(zip(program.inputs, states, strict=True))
    read = lambda v: nothing if is_literal(v) else known.get(v, nothing)
    for eqn in program.equations:
        operands = [read(v) for v in operand_atoms(eqn)]
        if any(x != nothing for x in operands):
            results = flow_through(eqn, operands, step, join, nothing, enter)
            known.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in program.outputs]


def flow_through(
    eqn: Any,
    operands: list[Any],
    step: Step,
    join: Join,
    nothing: Any,
    enter: Enter = lambda eqn, states: None,
) -> Sequence[Any]:
    """One equation of `flow`: the states of its results."""
    inside = lambda inner, states: flow(inner, states, step, join, nothing, enter)
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        enter(eqn, operands)
        return inside(call_jaxpr(eqn), operands)
    if name == "scan":
        consts, carry = scan_counts(eqn)
        return _flow_loop(params["jaxpr"], consts, carry, operands, inside, join)
    if name == "while":
        n, consts = params["cond_nconsts"], params["body_nconsts"]
        body, body_operands = params["body_jaxpr"], operands[n:]
        results = _flow_loop(
            body, consts, len(eqn.outvars), body_operands, inside, join
        )
        inside(params["cond_jaxpr"], [*operands[:n], *results])
        return results
    if name == "cond":
        branches = [inside(branch, operands[1:]) for branch in params["branches"]]
        return [join(x) for x in zip(*branches, strict=True)]
    return step(eqn, operands)


def _flow_loop(
    body: Any, consts: int, carry: int, operands: list[Any], inside: Any, join: Join
) -> list[Any]:
    before = operands[consts : consts + carry]
    while True:
        results = inside(
            body, [*operands[:consts], *before, *operands[consts + carry :]]
        )
        after = [join(pair) for pair in zip(before, results[:carry], strict=True)]
        if after == before:
            return [*after, *results[carry:]]
        before = after
