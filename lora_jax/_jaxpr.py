"""Reads JAX's jaxprs: the only file that does, and the only one that knows a version.

A jaxpr is a list of equations over typed variables. What differs between releases
(where `scan` counts its arguments, what `get_bind_params` returns, whether a jaxpr is
closed) is settled here, through `jax.extend.core` alone.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
from jax.extend import core

# Calls whose operands are the inputs of the jaxpr under this parameter, one to one.
CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",  # up to 0.10
    "eval_jaxpr": "call_jaxpr",  # the same in 0.12
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


class Trace(NamedTuple):
    """A function as a jaxpr over flat arrays."""

    jaxpr: Any
    restore: Callable[[Sequence[Any]], Any]  # flat results to the function's own


def trace(fn: Callable[..., Any], *args: Any) -> Trace:
    """Traces `fn(*args)` once; what it returns besides arrays is kept as it is."""
    static: list[Any] = []
    out_tree = None

    def flat(*args):
        nonlocal static, out_tree
        leaves, out_tree = jax.tree.flatten(fn(*args))
        static = [None if isinstance(x, jax.Array) else x for x in leaves]
        return [x for x in leaves if isinstance(x, jax.Array)]

    jaxpr = jax.make_jaxpr(flat)(*args)
    is_array = [x is None for x in static]

    def restore(results):
        rest = iter(results)
        leaves = [next(rest) if a else x for a, x in zip(is_array, static, strict=True)]
        return jax.tree.unflatten(out_tree, leaves)

    return Trace(jaxpr, restore)


def evaluate(
    jaxpr: Any,
    args: Sequence[Any],
    apply: Callable[[int, Any, list[Any]], Sequence[Any]],
) -> list[Any]:
    """Runs `apply(index, equation, operands) -> results` over the equations."""
    jaxpr, consts = _opened(jaxpr)
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))
    read = lambda v: v.val if isinstance(v, core.Literal) else values[v]

    last_use = {
        v: i for i, eqn in enumerate(jaxpr.eqns) for v in _variables(eqn.invars)
    }
    kept = set(_variables(jaxpr.outvars))
    for i, eqn in enumerate(jaxpr.eqns):
        operands = [read(v) for v in eqn.invars]
        # Without jit each value is an array in memory: let it go after its last use.
        for v in set(_variables(eqn.invars)):
            if last_use[v] == i and v not in kept:
                del values[v]
        scope = str(eqn.source_info.name_stack)
        with eqn.ctx.manager, jax.named_scope(scope) if scope else nullcontext():
            results = apply(i, eqn, operands)
        pairs = zip(eqn.outvars, results, strict=True)
        values |= ((v, x) for v, x in pairs if v in last_use or v in kept)
    return [read(v) for v in jaxpr.outvars]


def bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Runs one equation as it is on other operands, with its own derivative rules."""
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)
    out = eqn.primitive.bind(*functions, *args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def call_jaxpr(eqn: Any) -> Any:
    return eqn.params[CALLS[eqn.primitive.name]]


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many operands of a `scan` are constants, and how many are carried."""
    if "num_carry" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def passed_on(jaxpr: Any, output: int, operand: int) -> bool:
    """Whether an output is just that operand, untouched."""
    jaxpr, _ = _opened(jaxpr)
    return jaxpr.outvars[output] is jaxpr.invars[operand]


def used_inputs(jaxpr: Any, outputs: Sequence[bool] | None = None) -> list[bool]:
    """Which inputs the given outputs (all, if `None`) or an effect depend on."""
    jaxpr, _ = _opened(jaxpr)
    wanted = [True] * len(jaxpr.outvars) if outputs is None else outputs
    pairs = zip(jaxpr.outvars, wanted, strict=True)
    live = set(_variables(v for v, want in pairs if want))
    for eqn in reversed(jaxpr.eqns):
        results = [v in live for v in eqn.outvars]
        if not any(results) and not eqn.effects:
            continue
        used = _used_operands(eqn, results)
        live.update(
            _variables(v for v, use in zip(eqn.invars, used, strict=True) if use)
        )
    return [v in live for v in jaxpr.invars]


def _used_operands(eqn: Any, results: list[bool]) -> list[bool]:
    name = eqn.primitive.name
    if name in CALLS:
        return used_inputs(call_jaxpr(eqn), results)
    if name == "scan":
        return used_inputs(eqn.params["jaxpr"])
    if name == "cond":
        branches = [used_inputs(branch, results) for branch in eqn.params["branches"]]
        return [True, *map(any, zip(*branches, strict=True))]
    return [True] * len(eqn.invars)


def _variables(atoms: Any) -> list[Any]:
    return [v for v in atoms if not isinstance(v, core.Literal)]


def _opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and the values of its constants; newer releases keep the two together."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())
