"""Walks JAX's jaxprs: the only file that does, and the only one that knows a version.

A jaxpr is a list of equations over typed variables. What differs between releases
(where `scan` counts its arguments, what `get_bind_params` returns, whether a jaxpr is
closed) is settled here, through `jax.extend.core` alone.
"""

import functools
import linecache
import math
import os
import sysconfig
import textwrap
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from lora_jax._engine import quantized
from lora_jax._engine.factors import canonical, x64
from lora_jax._engine.quantized import Quantized, is_quantized, like

# Calls whose operands are the inputs of the jaxpr under this parameter, one to one.
CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",  # up to 0.10
    "eval_jaxpr": "call_jaxpr",  # the same in 0.12
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "shard_map": "jaxpr",
}

# Those with a derivative rule, which may read what the call itself does not.
CUSTOM = {"custom_jvp_call", "custom_vjp_call"}

# What a function is traced over; its other arguments reach it as they are.
ARRAYS = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct | Quantized

# Where the frames of libraries are, which no user would call a place in the model.
_LIBRARIES = tuple(os.path.join(os.path.dirname(m.__file__), "") for m in (jax, flax))
_STANDARD = os.path.join(sysconfig.get_paths()["stdlib"], "")
_HERE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")


class Trace(NamedTuple):
    """A function as a jaxpr over flat arrays."""

    jaxpr: Any
    restore: Callable[[Sequence[Any]], Any]  # flat results to the function's own
    inputs: tuple[Any, ...] = ()  # the tracers that the function got


def trace(fn: Callable[..., Any], *args: Any) -> Trace:
    """Traces `fn(*args)` once; what it returns besides arrays is kept as it is.

    A weight in few bits is, for `fn`, the plain array.
    """
    args = jax.tree.map(like, args, is_leaf=is_quantized)
    static: list[Any] = []
    inputs: tuple[Any, ...] = ()
    out_tree = None

    def flat(*args):
        nonlocal static, out_tree, inputs
        inputs = tuple(jax.tree.leaves(args))
        leaves, out_tree = jax.tree.flatten(fn(*args))
        static = [None if isinstance(x, jax.Array) else x for x in leaves]
        return [x for x in leaves if isinstance(x, jax.Array)]

    types = (getattr(x, "dtype", None) for x in jax.tree.leaves(args))
    with x64(types):
        jaxpr = jax.make_jaxpr(flat)(*args)
    traced = [x is None for x in static]

    def restore(results):
        rest = map(_array, results, jaxpr.out_avals)
        leaves = [next(rest) if t else x for t, x in zip(traced, static, strict=True)]
        return jax.tree.unflatten(out_tree, leaves)

    return Trace(jaxpr, restore, inputs)


def _array(x: Any, like: Any) -> Any:
    """A result; a constant is in the jaxpr as a number, and no array yet."""
    if x is None or isinstance(x, jax.Array):
        return x
    with x64([like.dtype]):
        return jnp.asarray(x, like.dtype)


def trace_call(
    fn: Callable[..., Any], args: Any, kwargs: Any, which: Container[int] | None = None
):
    """Traces `fn(*args, **kwargs)` over the arrays among its arguments.

    Args:
      fn: The function.
      args: Its positional arguments.
      kwargs: Its keyword arguments.
      which: The only leaves of `(args, kwargs)` to trace over; `None`: all.

    Returns:
      The trace, and which of the leaves of `(args, kwargs)` it takes, a weight in few
      bits for one: the others reach `fn` as they are.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_quantized)
    leaves = [canonical(x) for x in leaves]
    dynamic = [
        i
        for i, x in enumerate(leaves)
        if isinstance(x, ARRAYS) and (which is None or i in which)
    ]

    def flat(*arrays):
        filled = list(leaves)
        for i, x in zip(dynamic, arrays, strict=True):
            filled[i] = x
        args, kwargs = treedef.unflatten(filled)
        return fn(*args, **kwargs)

    return trace(flat, *(leaves[i] for i in dynamic)), dynamic


def evaluate(
    jaxpr: Any,
    args: Sequence[Any],
    apply: Callable[[int, Any, list[Any]], Sequence[Any]],
    known: Mapping[int, Any] | None = None,
) -> list[Any]:
    """Runs `apply(index, equation, operands) -> results` over the equations.

    Constants that are tracers of a finished trace are replaced: `known` has the value
    for the `id` of each.
    """
    jaxpr, consts = _opened(jaxpr)
    consts = [known.get(id(c), c) for c in consts] if known else consts
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
        named = jax.named_scope(scope) if scope else nullcontext()
        with eqn.ctx.manager, x64(_dtypes(eqn)), named:
            results = apply(i, eqn, operands)
        pairs = zip(eqn.outvars, results, strict=True)
        values |= ((v, x) for v, x in pairs if v in last_use or v in kept)
    return [read(v) for v in jaxpr.outvars]


def _dtypes(eqn: Any) -> Iterator[Any]:
    """Of all that an equation takes or gives, and of all within it."""
    for v in (*eqn.invars, *eqn.outvars):
        yield getattr(v.aval, "dtype", None)
    for jaxpr in _inner(eqn):
        for inner in _opened(jaxpr)[0].eqns:
            yield from _dtypes(inner)


def bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Runs one equation as it is on other operands, with its own derivative rules."""
    if any(map(is_quantized, args)):
        plain = lambda args: bind(eqn, args)
        return quantized.bind(eqn.primitive.name, eqn.params, list(args), plain)
    to = eqn.params["devices"] if eqn.primitive.name == "device_put" else [None]
    if None not in to:
        # The equation does not know whence arrays come, and where derivatives go back.
        return [*map(jax.device_put, args, to)]
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)
    out = eqn.primitive.bind(*functions, *args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def custom_consts(eqn: Any) -> int:
    """How many operands a custom rule closes over: they come first."""
    return eqn.params["num_consts"]


def knows_what_moves(eqn: Any) -> bool:
    """Whether a `custom_vjp` has a rule that is told what is differentiated."""
    return eqn.params["symbolic_zeros"]


def call_jaxpr(eqn: Any) -> Any:
    return eqn.params[CALLS[eqn.primitive.name]]


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many operands of a `scan` are constants, and how many are carried."""
    if "num_carry" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def loop_body(eqn: Any) -> Any:
    """The jaxpr of one step of a `scan` or a `while`, the key to caches of it."""
    return eqn.params["jaxpr" if eqn.primitive.name == "scan" else "body_jaxpr"]


def manual_axes(eqn: Any) -> frozenset:
    """The mesh axes that a `shard_map` maps over."""
    new = eqn.params.get("newly_manual_axes")  # up to 0.10 it was `manual_axes`
    return eqn.params["manual_axes"] if new is None else new


def varying_axes(x: jax.Array) -> frozenset:
    """The axes of `shard_map` along which devices may hold different values of x."""
    return _varying(jax.typeof(x))


def vary_like(w: Any, parts: Sequence[Any]) -> Any:
    """A weight, varying along every axis of `shard_map` that a part of its adapter has.

    W + scale * A B varies along all of them. A function traced on a W of fewer axes has
    the wrong types wherever that sum is materialized: in a carry, in a custom rule.
    """
    axes = frozenset().union(*map(varying_axes, parts))

    def vary(x):
        missing = axes - varying_axes(x)
        return lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(vary, w) if axes else w


def zeros(aval: Any) -> jax.Array | np.ndarray:
    """Zeros of an abstract type, varying along the axes of `shard_map` that it has."""
    if aval.dtype == jax.dtypes.float0:  # a whole number has no other derivative
        return np.zeros(aval.shape, aval.dtype)
    axes, x = _varying(aval), jnp.zeros(aval.shape, aval.dtype)
    return lax.pcast(x, tuple(axes), to="varying") if axes else x


def _varying(aval: Any) -> frozenset:
    kinds = getattr(aval, "manual_axis_type", None)  # up to 0.11 it was `vma`
    return aval.vma if kinds is None else kinds.varying


def shapes(eqn: Any) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Of an equation's operands, and of its results."""
    return [v.aval.shape for v in eqn.invars], [v.aval.shape for v in eqn.outvars]


def result_dtypes(eqn: Any) -> list[Any]:
    return [v.aval.dtype for v in eqn.outvars]


def operand_dtypes(eqn: Any) -> list[Any]:
    return [v.aval.dtype for v in eqn.invars]


def flow(
    jaxpr: Any,
    states: Sequence[Any],
    step: Callable[[Any, list[Any]], Sequence[Any]],
    join: Callable[[Sequence[Any]], Any],
    nothing: Any,
    enter: Callable[[Any, list[Any]], None] = lambda eqn, states: None,
) -> list[Any]:
    """What is known of a jaxpr's outputs, given what is known of its inputs.

    Runs `step(equation, states) -> states` over all equations that an input reaches, in
    calls, loops and branches too; `enter(equation, states)` first where there are such.
    A loop is repeated until its carry no longer changes, so that states must be sets
    that only grow under `join`. `nothing` is the state of constants.
    """
    jaxpr, _ = _opened(jaxpr)
    known = dict(zip(jaxpr.invars, states, strict=True))
    read = lambda v: nothing if isinstance(v, core.Literal) else known.get(v, nothing)
    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        if any(x != nothing for x in operands):
            results = flow_through(eqn, operands, step, join, nothing, enter)
            known.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def flow_through(
    eqn: Any,
    operands: list[Any],
    step: Callable[[Any, list[Any]], Sequence[Any]],
    join: Callable[[Sequence[Any]], Any],
    nothing: Any,
    enter: Callable[[Any, list[Any]], None] = lambda eqn, states: None,
) -> Sequence[Any]:
    """One equation of `flow`: what is known of its results."""
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
        body, own = params["body_jaxpr"], operands[n:]
        results = _flow_loop(body, consts, len(eqn.outvars), own, inside, join)
        inside(params["cond_jaxpr"], [*operands[:n], *results])
        return results
    if name == "cond":
        branches = [inside(branch, operands[1:]) for branch in params["branches"]]
        return [join(x) for x in zip(*branches, strict=True)]
    return step(eqn, operands)


def _flow_loop(
    body: Any, consts: int, carry: int, operands: list[Any], inside: Any, join: Any
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


def contains(jaxpr: Any, name: str) -> bool:
    """Whether a primitive stands in a jaxpr, or in one within it."""
    return any(
        eqn.primitive.name == name or any(contains(sub, name) for sub in _inner(eqn))
        for eqn in _opened(jaxpr)[0].eqns
    )


def _inner(eqn: Any) -> list[Any]:
    values = (
        v for x in eqn.params.values() for v in (x if isinstance(x, tuple) else [x])
    )
    return [v for v in values if isinstance(v, core.Jaxpr | core.ClosedJaxpr)]


def ids_of(jaxpr: Any) -> set[int]:
    """The `id`s of all equations of a jaxpr, and of those within it."""
    eqns = _opened(jaxpr)[0].eqns
    inner = (ids_of(sub) for eqn in eqns for sub in _inner(eqn))
    return {*map(id, eqns)}.union(*inner)


def result_shapes(jaxpr: Any) -> list[tuple[int, ...]]:
    return [v.aval.shape for v in _opened(jaxpr)[0].outvars]


def place(eqn: Any, within: str | None = None) -> str:
    """The line of the user's source that an equation stands for, as `file:line`.

    The innermost frame, within the traced function, that is in no library: neither in
    JAX or Flax nor in Python's own; or the innermost of Flax; or "". What a jitted
    function did is known from its first call: `within` it, other callers do not count.
    """
    inside = []
    for frame in getattr(eqn.source_info.traceback, "frames", ()):
        if frame.file_name.startswith(_HERE):
            break
        inside.append(frame)
    if within is not None:
        depths = [i for i, f in enumerate(inside) if f.function_name == within]
        inside = inside[: depths[-1] + 1] if depths else []
    own = [frame for frame in inside if not _in_library(frame.file_name)]
    flaxs = [frame for frame in inside if frame.file_name.startswith(_LIBRARIES[1:])]
    for frame in (*own, *flaxs):
        return _spot(frame.file_name, frame.line_num)
    return ""


def _spot(file: str, line: int) -> str:
    # The file of a notebook's cell has a number for a name: its text tells which it is.
    folder = os.path.basename(os.path.dirname(file))
    if folder.startswith("ipykernel_") or file.startswith("<ipython-input-"):
        text = textwrap.shorten(linecache.getline(file, line), 50)
        return f"line {line} of a cell, {text}"
    path = os.path.relpath(file)
    if path.startswith(os.pardir):
        path = os.path.basename(path)
    return f"{path}:{line}"


def _in_library(file: str) -> bool:
    standard = file.startswith(_STANDARD) and "site-packages" not in file
    return standard or file.startswith((*_LIBRARIES, "<frozen"))


def passed_on(jaxpr: Any, output: int, operand: int) -> bool:
    """Whether an output is just that operand, untouched, through calls as well."""
    jaxpr, _ = _opened(jaxpr)
    v, target = jaxpr.outvars[output], jaxpr.invars[operand]
    for eqn in reversed(jaxpr.eqns):
        if v in eqn.outvars:
            if eqn.primitive.name not in CALLS:
                return False
            n, inner = eqn.outvars.index(v), call_jaxpr(eqn)
            sources = [i for i in range(len(eqn.invars)) if passed_on(inner, n, i)]
            if not sources:
                return False
            v = eqn.invars[sources[0]]
    return v is target


def used_inputs(jaxpr: Any, outputs: Sequence[bool] | None = None) -> list[bool]:
    """Which inputs the given outputs (all, if `None`) or an effect depend on.

    Or a derivative of them: what a function with a rule of its own does not read, the
    rule may.
    """

    def operands(eqn, results):
        live = any(results) or bool(eqn.effects)
        if eqn.primitive.name in CUSTOM:
            first = custom_consts(eqn)
            own = _backward(call_jaxpr(eqn), results, operands)
            return [*own[:first], *(x or live for x in own[first:])]
        return [live] * len(eqn.invars)

    return _backward(jaxpr, outputs, operands)


def look_ahead(
    jaxpr: Any, beyond: Callable[..., bool] | None = None
) -> Callable[..., bool]:
    """Tells, of equations of a jaxpr, whether what they give meets a goal later on.

    Args:
      jaxpr: The equations' own.
      beyond: Whether its result `i` does so where it is called: `beyond(i, *how)`.

    Returns:
      `leads_to(equation, goal, passes, leaves=False)`: whether a result of the equation
      meets an equation for which `goal` holds, on a way through calls, and equations
      that `passes` allows. What leaves the jaxpr for a place that is not known `leaves`
      counts among that, or not. One walk answers all that ask the same.
    """
    jaxpr, _ = _opened(jaxpr)

    @functools.cache
    def live(goal, passes, leaves=False):
        def operands(eqn, results):
            if eqn.primitive.name in CUSTOM:
                return _backward(call_jaxpr(eqn), results, operands)
            return [goal(eqn) or (any(results) and passes(eqn))] * len(eqn.invars)

        outside = lambda i: beyond(i, goal, passes, leaves) if beyond else leaves
        out = enumerate(jaxpr.outvars)
        found = set(_variables(v for i, v in out if outside(i)))
        for eqn in reversed(jaxpr.eqns):
            found |= _live_operands(eqn, found, operands)
        return found

    def leads_to(eqn, *how, result=None):
        results = eqn.outvars if result is None else [eqn.outvars[result]]
        return not live(*how).isdisjoint(results)

    return leads_to


def made_of(jaxpr: Any, passes: Callable[[Any], bool]) -> bool:
    """Whether `passes` allows each equation of a jaxpr."""
    return all(map(passes, _opened(jaxpr)[0].eqns))


def _backward(jaxpr: Any, outputs: Sequence[bool] | None, rule: Any) -> list[bool]:
    """Which inputs matter, if these outputs do, by `rule(eqn, results) -> operands`."""
    jaxpr, _ = _opened(jaxpr)
    wanted = [True] * len(jaxpr.outvars) if outputs is None else outputs
    pairs = zip(jaxpr.outvars, wanted, strict=True)
    live = set(_variables(v for v, want in pairs if want))
    for eqn in reversed(jaxpr.eqns):
        live |= _live_operands(eqn, live, rule)
    return [v in live for v in jaxpr.invars]


def _live_operands(eqn: Any, live: set[Any], rule: Any) -> set[Any]:
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
    return set(_variables(v for v, use in zip(eqn.invars, used, strict=True) if use))


def _loop(
    jaxpr: Any, n_consts: int, n_carry: int, results: Sequence[bool], rule: Any
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


def flops(jaxpr: Any) -> int:
    """The FLOPs of a jaxpr's products: two for each number multiplied and added.

    The body of a `scan` counts as often as it runs, that of a `while` once.
    """
    jaxpr, _ = _opened(jaxpr)
    return sum(_flops(eqn) for eqn in jaxpr.eqns)


def _flops(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        return flops(call_jaxpr(eqn))
    if name == "scan":
        return params["length"] * flops(params["jaxpr"])
    if name == "while":
        return flops(params["cond_jaxpr"]) + flops(params["body_jaxpr"])
    if name == "cond":
        return max(map(flops, params["branches"]))
    if name not in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
        return 0
    (lhs, rhs, *_), (out,) = shapes(eqn)
    if name == "conv_general_dilated":
        out_channel = params["dimension_numbers"].rhs_spec[0]
        return 2 * math.prod(out) * math.prod(rhs) // max(rhs[out_channel], 1)
    if name == "ragged_dot_general":
        dims = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    else:
        dims = params["dimension_numbers"]
    (summed, _), _ = dims
    return 2 * math.prod(out) * math.prod(lhs[d] for d in summed)


def _variables(atoms: Any) -> list[Any]:
    return [v for v in atoms if not isinstance(v, core.Literal)]


def _opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and the values of its constants; newer releases keep the two together."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())
