"""The same function on adapted parameters: traced once, evaluated on the factors."""

import functools
import inspect
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax._adapters import find_adapters, is_adapter, without_adapters
from lora_jax._engine.factors import Factors, align
from lora_jax._engine.jaxpr import trace_call, used_inputs
from lora_jax._engine.rules import run_jaxpr
from lora_jax._engine.run import Note, Run, noting, plain
from lora_jax._tree import (
    flatten,
    leaf_order,
    listed,
    path_name,
    unbox,
    unflatten,
)


def lora(
    fn: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    dropout: float = 0.0,
    unused: str = "error",
    materialize: str = "warn",
) -> Callable[..., Any]:
    """The same function, on parameters with adapters.

    `lora(fn)(params, ...)` equals `fn(merge(params), ...)` to rounding, for every JAX
    function `fn`, and does not form `W + scale * A B` where a weight meets a matrix
    product, a lookup or a convolution: it adds `(x A) B` to `x W`. The function is not
    changed and need not know of adapters. Works inside and around `jit`, `grad`, `jvp`,
    `vmap`, `scan`, `remat` and shardings.

    Args:
      fn: Any function of arrays in JAX, such as `model.apply`.
      argnums: Which positional argument, or arguments, hold the parameters.
      dropout: Rate at which the input of each adapter in a matrix product or a
        convolution is dropped. Acts only in calls that are given `dropout_key=`.
      unused: What to do about an adapter that the result does not depend on: "error",
        or "ignore".
      materialize: What to do where JAX needs a whole weight: "warn" and form it there,
        "allow" the same in silence, or "error".

    Returns:
      A function of the same arguments, and of an optional `dropout_key`, which `fn`
      gets too if it has such a parameter. Arrays among the arguments are traced;
      anything else is passed through as it is, in and out. Each call outside of `jit`
      traces `fn` again, as with `jax.grad`: put `jit` around it.

    Raises:
      ValueError: If an option is not one of those above. When called: if the parameters
        have no adapters or broken ones, an adapter is unused, or a weight cannot stay
        factored under `materialize="error"`.
      TypeError: When called, if `argnums` names no positional argument.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, lora_jax as lj
      >>> model, x = nn.Dense(3), jnp.ones((2, 4))
      >>> params = lj.lorafy(model.init(jax.random.key(0), x)["params"], rank=2)
      >>> lj.lora(model.apply)({"params": params}, x).shape
      (2, 3)

    Reference:
      Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
      https://arxiv.org/abs/2106.09685
    """
    several = isinstance(argnums, Sequence)
    positions = tuple(map(operator.index, argnums if several else [argnums]))
    _check_options(positions, dropout, unused, materialize)
    shares_key = _has_parameter(fn, "dropout_key")

    @functools.wraps(fn)
    def adapted(*args: Any, dropout_key: jax.Array | None = None, **kwargs: Any) -> Any:
        if shares_key:
            kwargs["dropout_key"] = dropout_key
        key = dropout_key if dropout else None
        run = Run(materialize, float(dropout), key)
        with noting() as notes:
            results = call(fn, args, kwargs, positions, unused, run)
        if materialize == "warn":
            _warn(list(notes.values()))
        return results

    return adapted


def call(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    positions: tuple[int, ...],
    unused: str,
    run: Run,
) -> Any:
    base, factors = list(args), []
    for position in positions:
        if not -len(args) <= position < len(args):
            raise TypeError(
                f"argnums={position} names no argument: the call has {len(args)} "
                "positional. Pass the parameters by position, not by keyword."
            )
        base[position], found = _take_apart(args[position])
        factors.append((position % len(args), found))

    traced, dynamic = trace_call(fn, base, kwargs)
    operands = jax.tree.leaves((base, kwargs))
    for position, found in factors:
        before = len(jax.tree.leaves(base[:position]))
        for i, f in found.items():
            operands[before + i] = f
    operands = [operands[i] for i in dynamic]
    if unused == "error":
        used = used_inputs(traced.jaxpr)
        _check_used(operands, used)
        _check_elsewhere(base, dict(zip(dynamic, used, strict=True)))
    results = run_jaxpr(run, traced.jaxpr, operands)
    return traced.restore(plain(run, results, "return"))


def _take_apart(params: Any) -> tuple[Any, dict[int, Factors]]:
    """The plain tree, and the `Factors` in place of some of its `jax.tree.leaves`."""
    leaves = flatten(params)
    factors = {}
    adapters = find_adapters(leaves)
    for weight, paths in adapters.items():
        parts = (unbox(leaves[path]) for path in (weight, *paths))
        factors[weight] = align(*parts, name=path_name(weight))
    base = unflatten(params, without_adapters(leaves, adapters))
    order = enumerate(leaf_order(base))
    return base, {i: factors[path] for i, path in order if path in factors}


def _warn(notes: list[Note]) -> None:
    formed = [f"{n.name!r} meets {n.primitive!r}{_at(n)}" for n in notes if n.formed]
    if formed:
        formed = list(dict.fromkeys(formed))
        listing = "; ".join(formed[:6]) + ("; ..." if len(formed) > 6 else "")
        warnings.warn(
            f"{listing}, which needs the whole weight: W + scale * A B is formed "
            "there, exactly, for more time and memory. Write lora(fn, "
            "materialize='allow') if that is meant.",
            stacklevel=3,
        )


def _at(note: Note) -> str:
    return f" at {note.place}" if note.place else ""


def _check_used(operands: Sequence[Any], used: Sequence[bool]) -> None:
    idle = [
        str(f.name)
        for f, use in zip(operands, used, strict=True)
        if isinstance(f, Factors) and not use
    ]
    if idle:
        raise ValueError(
            f"The function never uses {len(idle)} adapted weight(s): {listed(idle)}. "
            "An adapter there would learn nothing. Leave them out, "
            "lorafy(params, rank, exclude=[...]), or write lora(fn, unused='ignore')."
        )


def _check_elsewhere(args: Sequence[Any], used: dict[int, bool]) -> None:
    """Adapters in an argument that `argnums` does not name would do nothing."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tuple(args))
    for i, (path, _) in enumerate(leaves):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if is_adapter((name,)) and not used.get(i, True):
            raise ValueError(
                f"Argument {path[0].idx} has adapters too, such as {name!r}, and the "
                "function never reads them: they would do nothing. Name both, "
                f"lora(fn, argnums=(..., {path[0].idx})), or pass strip(params)."
            )


def _has_parameter(fn: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(fn).parameters
    except (TypeError, ValueError):  # some built-in functions have no signature
        return False


def _check_options(
    positions: tuple[int, ...], dropout: float, unused: str, materialize: str
) -> None:
    if not positions:
        raise ValueError("argnums is empty. Name the parameters' position: argnums=0.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), found {dropout}.")
    if unused not in ("error", "ignore"):
        raise ValueError(f"unused must be 'error' or 'ignore', found {unused!r}.")
    if materialize not in ("warn", "error", "allow"):
        raise ValueError(
            f"materialize must be 'warn', 'error' or 'allow', found {materialize!r}."
        )
