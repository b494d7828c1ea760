"""`lora`: a function on adapted parameters, traced once and evaluated on factors."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax

from lora_jax._adapters import Adapters, LowRank, adapters_or_quantized, of_rank
from lora_jax._arguments import (
    Where,
    adapters_elsewhere,
    check_elsewhere,
    chosen,
    leaf_offset,
    leaves_of,
    named,
    pick,
    replaced,
)
from lora_jax._engine.dora import from_leaves
from lora_jax._engine.dtypes import canonical
from lora_jax._engine.evaluate import run_jaxpr
from lora_jax._engine.factors import Factors, without_adapter
from lora_jax._engine.jaxpr import trace_call, vary_like
from lora_jax._engine.liveness import used_inputs
from lora_jax._engine.run import Run, by_weight, collect_notes, materialize_all, warn
from lora_jax._leaves import with_copies
from lora_jax._tree import (
    Path,
    is_live,
    is_quantized,
    leaf_order,
    listed,
    rebox,
    tree_leaves,
    unbox,
    unflatten,
)

P = ParamSpec("P")
R = TypeVar("R")


def lora(
    fn: Callable[P, R],
    *,
    argnums: int | Sequence[int] | None = None,
    argnames: str | Sequence[str] = (),
    dropout: float = 0.0,
    unused: str = "error",
    materialize: str = "warn",
    gates: bool = False,
) -> Callable[P, R]:
    """Makes a function of parameters a function of parameters with adapters.

    `lora(fn)(params, ...)` equals `fn(merge(params), ...)` up to rounding, for every
    JAX function `fn`. Where a weight meets a matrix product, a lookup or a convolution
    it adds (x A) B to x W, and does not materialize W + scale * A B unless that takes
    fewer FLOPs, as where a side of W is shorter than the rank. A leaf that is trained
    in full is replaced by its copy, `lora_w`, cast to the leaf's dtype. The
    function itself is not changed and need not support adapters. Works inside and
    around `jit`, `grad`, `jvp`, `vmap`, `scan`, `remat` and shardings.

    Dropout acts only in calls with `dropout_key=`: without one nothing is dropped,
    under `jax.grad` too.

    A cast to bfloat16 or float16 on the way to a product is applied to W alone, and the
    update is added to the product. The result equals that of merged weights up to the
    rounding of that type, except that a sum beyond the range of float16 is finite. So
    the difference of two products of different precision, `x @ q(w) - x @ w` with a
    rounding q, is x q(W) - x W here, the rounding error of W. Merged weights give that
    of W + scale * A B, which has the same size and another value. `explain` marks these
    weights. Where a rounded weight meets the weight itself in any other way
    (`w - q(w)`, `where(q(w) == w, ...)`, a custom rule), W + scale * A B is rounded.

    `lora_scale` is a setting: its gradient is zero, without `gates`. A function with a
    rule of `jax.custom_jvp` or `jax.custom_vjp` should take a weight as an argument,
    and not close over it. `jax.experimental.jet` is not supported.

    Args:
      fn: Any function of arrays in JAX, such as `model.apply`.
      argnums: Which positional argument, or arguments, hold the parameters. Default: 0,
        or none if there are `argnames`.
      argnames: Which keyword arguments hold them, as in Hugging Face's
        `model(ids, params=params)`.
      dropout: Rate at which the input of each adapter in a matrix product or a
        convolution is dropped. Acts only in calls with `dropout_key=`, and not within
        functions with derivative rules of their own (`jax.custom_vjp`,
        `jax.custom_jvp`), which cannot know of a mask.
      unused: What to do about an adapter that the result does not depend on: "error",
        or "ignore".
      materialize: What to do where a function needs W + scale * A B itself: "warn" and
        materialize it there, "allow" it without a warning, or raise an "error".
      gates: Whether gradients flow to `lora_scale`, for a tree that `mix` made of
        learned weights.

    Returns:
      A function of the same arguments, for type checkers too, and of an optional
      keyword argument `dropout_key`, which `fn` gets as well if it has such a
      parameter. Adapted weights are traced; anything else is passed through unchanged,
      in and out. Each call outside of `jit` traces `fn` again, as with `jax.grad`: put
      `jit` around it.

    Raises:
      ValueError: If an option is not one of those above. When called: if the parameters
        have no adapters or broken ones, an adapter is unused, or a weight cannot stay
        factored under `materialize="error"`.
      TypeError: When called, if `argnums` or `argnames` names no argument, or one that
        is no tree of parameters.

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
    where = chosen(argnums, argnames)
    check_options(dropout, unused, materialize)
    if is_live(fn):
        raise TypeError(
            "lora takes a function of a tree of parameters, found the live module "
            f"{type(fn).__name__}. Write LoRA(model, rank), and call that."
        )
    shares_key = _has_parameter(fn, "dropout_key")

    @functools.wraps(fn)
    def adapted(*args: Any, dropout_key: jax.Array | None = None, **kwargs: Any) -> R:
        if shares_key:
            kwargs["dropout_key"] = dropout_key
        key = dropout_key if dropout else None
        run = Run(materialize, float(dropout), key)
        with collect_notes() as notes:
            results = call(fn, args, kwargs, where, unused, run, gates)
        if materialize == "warn":
            warn(by_weight(notes))
        return results

    return adapted  # pyright: ignore[reportReturnType]  `dropout_key` is in no ParamSpec


def call(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    where: Where,
    unused: str,
    run: Run,
    gates: bool = False,
) -> Any:
    """Calls `fn` on the base of the adapted arguments, evaluated on the factors."""
    _check_transformation(args, kwargs)
    given = pick(args, kwargs, where)
    leaves = {key: leaves_of(key, params) for key, params in given.items()}
    adapters = {key: adapters_or_quantized(each) for key, each in leaves.items()}
    leaves = {key: _in_shard_map(each, adapters[key]) for key, each in leaves.items()}
    base = {
        key: unflatten(params, with_copies(leaves[key], adapters[key]))
        for key, params in given.items()
    }
    args, kwargs = replaced(args, kwargs, base)
    operands = [canonical(x) for x in tree_leaves((args, kwargs))]
    factors: dict[int, Factors] = {}
    names: dict[int, str] = {}  # of all adapted leaves
    for key, tree in base.items():
        for i, path in enumerate(leaf_order(tree), leaf_offset(args, kwargs, key)):
            adapter, name = adapters[key].get(path), named(key, path, given)
            if adapter is not None:
                names[i] = name
            if isinstance(adapter, LowRank):
                parts = (canonical(unbox(leaves[key][p])) for p in (path, *adapter))
                factors[i] = from_leaves(*parts, name=name, gates=gates)
            elif is_quantized(operands[i]):
                factors[i] = without_adapter(operands[i], name)

    # Other arguments reach `fn` untraced: derivative rules in it may close over them.
    others = adapters_elsewhere(args, kwargs)
    traced, dynamic = trace_call(fn, args, kwargs, {*names, *factors, *others})
    if unused == "error":
        used = dict(zip(dynamic, used_inputs(traced.jaxpr), strict=True))
        _check_used({names[i]: used[i] for i in names})
        check_elsewhere(others, used)
    operands = [factors.get(i, operands[i]) for i in dynamic]
    run = run._replace(inputs=tuple(zip(traced.inputs, operands, strict=True)))
    results = run_jaxpr(run, traced.jaxpr, operands)
    return traced.restore(materialize_all(run, results, "return"))


def _check_transformation(args: Any, kwargs: Any) -> None:
    """Refuses `jax.experimental.jet`, which cannot differentiate a factored product.

    It has no rules for `jax.custom_jvp`, barriers and `jax.checkpoint`, not even where
    Flax or `jax.nn.relu` use them, and its own errors do not say so. Its tracers have
    no public class, only a name.
    """
    if any(type(x).__name__ == "JetTracer" for x in jax.tree.leaves((args, kwargs))):
        raise ValueError(
            "jax.experimental.jet has no rule for jax.custom_jvp, which lora(fn) "
            "needs. Take the Taylor series of the merged model, "
            "jet(lambda x: fn(merge(params), x), ...), or nest jax.jvp over lora(fn)."
        )


def _in_shard_map(leaves: dict[Path, Any], adapters: Adapters) -> dict[Path, Any]:
    """The leaves, with weights that vary like their adapters within `shard_map`."""
    new = {}
    for path, adapter in of_rank(adapters).items():
        w, *parts = (unbox(leaves[part]) for part in (path, *adapter))
        if (varying := vary_like(w, parts)) is not w:
            new[path] = rebox(leaves[path], varying)
    return leaves | new


def _check_used(used: dict[str, bool]) -> None:
    if idle := [name for name, use in used.items() if not use]:
        raise ValueError(
            f"The function never uses {len(idle)} adapted weight(s): {listed(idle)}. "
            "What is trained there would learn nothing. Leave them out of lorafy("
            "params, rank, also=...), or exclude=[...], or write "
            "lora(fn, unused='ignore')."
        )


def _has_parameter(fn: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(fn).parameters
    except (TypeError, ValueError):  # some built-in functions have no signature
        return False


def check_options(dropout: float, unused: str, materialize: str) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), found {dropout}.")
    if unused not in ("error", "ignore"):
        raise ValueError(f"unused must be 'error' or 'ignore', found {unused!r}.")
    if materialize not in ("warn", "error", "allow"):
        raise ValueError(
            f"materialize must be 'warn', 'error' or 'allow', found {materialize!r}."
        )
