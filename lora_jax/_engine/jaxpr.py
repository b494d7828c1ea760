"""Reads JAX's jaxprs: the only file that knows how a release of JAX writes them.

A jaxpr is a list of equations over typed variables. Where releases differ, this file
gives one form to the rest of the engine: whether a jaxpr is closed (`opened`), what the
parameters of an equation are called (`params_of`, `scan_counts`), what
`get_bind_params` returns (`bind`), and where a type stores the axes of `shard_map`
along which it varies (`varying_axes`). It uses only the public `jax.extend.core`.
"""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from lora_jax._engine import quantized_views
from lora_jax._engine.dtypes import canonical, x64
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

# Products that contract dimensions.
CONTRACTIONS = {"dot_general", "conv_general_dilated", "ragged_dot_general"}

# What a function is traced over; its other arguments reach it as they are.
ARRAYS = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct | Quantized


class Program(NamedTuple):
    """A jaxpr, closed or open."""

    inputs: list[Any]  # variables
    outputs: list[Any]  # variables and literals
    equations: list[Any]
    constants: dict[Any, Any]  # by their variables


def opened(jaxpr: Any) -> Program:
    """The parts of a jaxpr; newer releases keep it together with its constants."""
    consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
    constants = dict(zip(jaxpr.constvars, consts, strict=False))
    return Program(jaxpr.invars, jaxpr.outvars, jaxpr.eqns, constants)


def operand_atoms(eqn: Any) -> list[Any]:
    """The variables and literals that an equation takes."""
    return eqn.invars


def is_literal(atom: Any) -> bool:
    return isinstance(atom, core.Literal)


def variables(atoms: Iterable[Any]) -> list[Any]:
    return [v for v in atoms if not is_literal(v)]


class Trace(NamedTuple):
    """A function as a jaxpr over flat arrays."""

    jaxpr: Any
    restore: Callable[[Sequence[Any]], Any]  # flat results to the function's own
    inputs: tuple[Any, ...] = ()  # the tracers that the function got


def trace(fn: Callable[..., Any], *args: Any) -> Trace:
    """Traces `fn(*args)` once; results that are no arrays are kept as they are.

    For `fn`, a quantized weight is an array of its shape and dtype.
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
    """A result; the jaxpr can hold a constant one as a Python or NumPy number."""
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
      The trace, and which of the leaves of `(args, kwargs)` it takes, where a quantized
      weight is one leaf. The other leaves reach `fn` as they are.
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

    Args:
      jaxpr: The program.
      args: Its inputs.
      apply: Evaluates one equation.
      known: Values for constants that are tracers of a finished trace, by their `id`.
    """
    program = opened(jaxpr)
    constants = program.constants
    if known:
        constants = {v: known.get(id(c), c) for v, c in constants.items()}
    values = constants | dict(zip(program.inputs, args, strict=True))
    read = lambda v: v.val if is_literal(v) else values[v]

    last_use = {
        v: i for i, eqn in enumerate(program.equations) for v in variables(eqn.invars)
    }
    kept = set(variables(program.outputs))
    for i, eqn in enumerate(program.equations):
        operands = [read(v) for v in eqn.invars]
        # Without jit each value is an array in memory, freed here after its last use.
        for v in set(variables(eqn.invars)):
            if last_use[v] == i and v not in kept:
                del values[v]
        scope = str(eqn.source_info.name_stack)
        named = jax.named_scope(scope) if scope else nullcontext()
        with eqn.ctx.manager, x64(_dtypes(eqn)), named:
            results = apply(i, eqn, operands)
        pairs = zip(eqn.outvars, results, strict=True)
        values |= ((v, x) for v, x in pairs if v in last_use or v in kept)
    return [read(v) for v in program.outputs]


def _dtypes(eqn: Any) -> Iterator[Any]:
    """The dtypes of all operands and results of an equation, and of those within it."""
    for v in (*eqn.invars, *eqn.outvars):
        yield getattr(v.aval, "dtype", None)
    for jaxpr in _inner(eqn):
        for inner in opened(jaxpr).equations:
            yield from _dtypes(inner)


def bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Runs one equation as it is on other operands, with its own derivative rules."""
    if any(map(is_quantized, args)):
        plain = lambda args: bind(eqn, args)
        return quantized_views.bind(eqn.primitive.name, eqn.params, list(args), plain)
    to = eqn.params["devices"] if eqn.primitive.name == "device_put" else [None]
    if None not in to:
        # The equation does not say where its operands are, and a derivative has to put
        # cotangents there.
        return [*map(jax.device_put, args, to)]
    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)
    out = eqn.primitive.bind(*functions, *args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def params_of(eqn: Any) -> dict[str, Any]:
    """The parameters of an equation, under the same names in each release of JAX."""
    name, params = eqn.primitive.name, dict(eqn.params)
    if name == "jit":
        params.setdefault("compiler_options_kvs", ())
    elif name == "cond":
        params.setdefault("branches_platforms", None)
    elif name == "scan":
        kept = ("reverse", "unroll", "_split_transpose")
        options = {n: params[n] for n in kept if n in params}
        n_consts, n_carry = scan_counts(eqn)
        params = {n: params[n] for n in ("jaxpr", "length")}
        params |= {"n_consts": n_consts, "n_carry": n_carry, "options": options}
    elif name == "shard_map" and "newly_manual_axes" in params:  # from 0.11
        params["manual_axes"] = params["newly_manual_axes"]
    return params


def custom_consts(eqn: Any) -> int:
    """The number of operands that a custom rule closes over: they come first."""
    return eqn.params["num_consts"]


def sees_perturbed(eqn: Any) -> bool:
    """Whether the rule of a `custom_vjp` gets to know which inputs are perturbed."""
    return eqn.params["symbolic_zeros"]


def call_jaxpr(eqn: Any) -> Any:
    return eqn.params[CALLS[eqn.primitive.name]]


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many operands of a `scan` are constants, and how many are carried."""
    if "num_carry" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return len(consts), len(carry)


def repeats(eqn: Any) -> int:
    """How often the body of an equation runs: the length of a `scan`, or 1."""
    return eqn.params["length"] if eqn.primitive.name == "scan" else 1


def loop_body(eqn: Any) -> Any:
    """The jaxpr of one step of a `scan` or a `while`, the key to caches of it."""
    return eqn.params["jaxpr" if eqn.primitive.name == "scan" else "body_jaxpr"]


def varying_axes(x: jax.Array) -> frozenset:
    """The axes of `shard_map` along which devices may hold different values of x."""
    return _varying(jax.typeof(x))


def vary_like(w: Any, parts: Sequence[Any]) -> Any:
    """A weight that varies along the axes of `shard_map` along which `parts` vary.

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
    if aval.dtype == jax.dtypes.float0:  # the tangent type of integers
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


def contains(jaxpr: Any, name: str) -> bool:
    """Whether a jaxpr, or one within it, has an equation of this primitive."""
    return any(
        eqn.primitive.name == name or any(contains(sub, name) for sub in _inner(eqn))
        for eqn in opened(jaxpr).equations
    )


def _inner(eqn: Any) -> list[Any]:
    values = (
        v for x in eqn.params.values() for v in (x if isinstance(x, tuple) else [x])
    )
    kinds = core.Jaxpr | core.ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]
    return [v for v in values if isinstance(v, kinds)]


def ids_of(jaxpr: Any) -> set[int]:
    """The `id`s of all equations of a jaxpr, and of those within it."""
    eqns = opened(jaxpr).equations
    inner = (ids_of(sub) for eqn in eqns for sub in _inner(eqn))
    return {*map(id, eqns)}.union(*inner)


def result_shapes(jaxpr: Any) -> list[tuple[int, ...]]:
    return [v.aval.shape for v in opened(jaxpr).outputs]
