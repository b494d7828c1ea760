"""Infers the axes of weights from how a function uses them."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from lora_jax._adapters import Axes
from lora_jax._arguments import chosen, leaf_offset, leaves_of, on_states, pick
from lora_jax._engine.jaxpr import trace_call
from lora_jax._engine.liveness import used_inputs
from lora_jax._engine.uses import Use, uses_of
from lora_jax._flax_names import is_adaptable
from lora_jax._tree import Path, leaf_order, path_name, unbox


def find_axes(
    fn: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] | None = None,
    argnames: str | Sequence[str] = (),
    **kwargs: Any,
) -> Any:
    """Infers which dimensions of each weight are stacked, inputs and outputs.

    Dimensions that a product contracts are inputs, and its free dimensions outputs. Its
    batch dimensions, and those that a `scan` loops over, are a stack of layers or
    experts. The rows of a lookup are inputs. Supports kernels stored (out, in), fused
    ones of shape (3, heads, d, head_dim), scanned ones, experts, and tables that are
    also the head. Weights that no product and no lookup uses have no axes: norms and
    biases that `scan` stacks, and tables of positions that are added.

    Args:
      fn: Any function of arrays in JAX, such as `model.apply`; it is traced and never
        runs. Or a live `nnx.Module`, or a method of one, which holds the parameters
        itself: `find_axes(model, x)` returns the axes of its `nnx.Param`.
      *args: Its arguments, arrays or `ShapeDtypeStruct`. The parameters among them have
        no adapters: they are the tree to pass to `lorafy`.
      argnums: Which positional argument holds the parameters, as in `lora`. Default: 0.
      argnames: Which keyword argument holds them, as in `lora`.
      **kwargs: Its keyword arguments.

    Returns:
      `{path: Axes(batch, inputs, outputs)}` for each floating weight of two or more
      dimensions that a product or a lookup of `fn` uses; a tuple of such dicts if
      several arguments hold parameters, positions first. `lorafy(params, rank,
      axes=...)` adapts those that are no tables. Experts that are all computed at once,
      "td,edh->teh", look like heads; for an adapter each, write
      `find_axes(...) | {path: Axes((0,), (1,), (2,))}`.

    Raises:
      ValueError: If a weight is used in two ways that no one adapter can serve.
      TypeError: If `argnums` or `argnames` names no argument, or one that is no tree.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> fn = lambda params, x: x @ params["w"].T
      >>> params, x = {"w": jnp.ones((3, 4))}, jnp.ones((2, 4))
      >>> lj.find_axes(fn, params, x)
      {'w': Axes(batch=(), inputs=(1,), outputs=(0,))}
      >>> adapted = lj.lorafy(params, 2, axes=lj.find_axes(fn, params, x))

    Reference:
      Hu et al., "LoRA", 2021. https://arxiv.org/abs/2106.09685
    """
    where = chosen(argnums, argnames)
    fn, args, kwargs, live = on_states(fn, args, kwargs, where, adapters=False)
    trees = pick(args, kwargs, where)
    traced, dynamic = trace_call(fn, args, kwargs)
    weights, paths = {}, {}  # the number of dimensions of each; the path of each leaf
    for key, params in trees.items():
        leaves = leaves_of(key, params)
        for i, path in enumerate(leaf_order(params), leaf_offset(args, kwargs, key)):
            paths[i] = key, path
            is_weight = key not in live or isinstance(leaves[path], nnx.Param)
            if is_weight and is_adaptable(path, leaves[path]):
                weights[key, path] = len(unbox(leaves[path]).shape)
    names = [paths.get(i) for i in dynamic]
    argument_names = {n for n, i in enumerate(dynamic) if i in paths}
    uses = uses_of(traced.jaxpr, names, weights, argument_names)
    # A weight that no result depends on is unused, whatever is computed from it.
    met = dict(zip(names, used_inputs(traced.jaxpr), strict=True))
    found = [
        {
            path_name(path): _settle(path, n, uses[argument, path])
            for (argument, path), n in weights.items()
            if argument == key and met[key, path] and _is_used(uses[argument, path])
        }
        for key in trees
    ]
    return found[0] if len(found) == 1 else tuple(found)


def _is_used(uses: list[Use]) -> bool:
    """Whether a product or a lookup uses the weight."""
    return any(use.is_product or use.is_lookup for use in uses)


def _settle(path: Path, n: int, uses: list[Use]) -> Axes:
    """Returns the axes of a weight that fit all of its uses."""
    dims = range(n)
    picked = {d for use in uses for d in use.picked}
    kept_apart = {d for use in uses for d in use.batch - use.contracted - use.free}
    sides = _sides(path, [_without(use, kept_apart) for use in uses])
    first = {d for d, side in sides.items() if side == 0}
    second = sides.keys() - first
    rows = {d for use in uses if use.sure for d in use.rows}
    if second & rows:  # a table that is also the head: its rows are inputs
        first, second = second, first
    if first and second:
        batch = kept_apart | (picked - sides.keys())
        edge = min(second)
        inputs = [
            d for d in dims if d in first or (d not in second | batch and d < edge)
        ]
    else:
        # No product decides, so this is a table, whose rows are looked up or added.
        batch = kept_apart
        rest = [d for d in dims if d not in batch]
        inputs = [d for d in rest if d in picked] or rest[:-1]
        if not inputs or inputs == rest:
            batch, inputs = set(), [d for d in dims if d in picked]
            inputs = inputs if 0 < len(inputs) < n else list(dims[:-1])
    outputs = [d for d in dims if d not in batch and d not in inputs]
    return Axes(tuple(sorted(batch)), tuple(inputs), tuple(outputs))


def _sides(path: Path, uses: list[Use]) -> dict[int, int]:
    """Returns which dimensions are inputs, 0, and which are outputs, 1, in products.

    A product contracts the dimensions on one side and keeps those on the other. A
    second product may be in the opposite direction, like that of a tied head: then its
    sides are swapped. A product with an activation computed from the weight, which is
    not `sure`, may contract any dimensions. So it comes last, and is skipped if it
    contradicts the others.
    """
    sides: dict[int, int] = {}
    decided: list[Use] = []
    for use in sorted(uses, key=lambda use: not use.sure):
        if not (use.contracted and use.free):
            continue
        use_sides = dict.fromkeys(use.contracted, 0) | dict.fromkeys(use.free, 1)
        shared = use_sides.keys() & sides.keys()
        same = [use_sides[d] == sides[d] for d in shared]
        if any(same) and not all(same):
            if not use.sure:
                continue
            other = next(u for u in decided if (u.contracted | u.free) & shared)
            raise ValueError(
                f"{path_name(path)!r} is used in two ways that no single adapter fits: "
                f"{_side_names(other)}, and {_side_names(use)}. Exclude it from "
                "lorafy; or call find_axes on a function that closes over it, and add "
                "the axes of the use to factor: lorafy(..., axes=found | {...})."
            )
        flip = bool(same) and not all(same)
        use_sides = dict.fromkeys(use.window, 0) | use_sides
        sides |= {d: side ^ flip for d, side in use_sides.items() if d not in sides}
        decided.append(use)
    return sides


def _without(use: Use, batch: set[int]) -> Use:
    """Removes stacked dimensions, and those on both sides, from a use."""
    both = use.contracted & use.free
    return use._replace(
        contracted=use.contracted - both - batch, free=use.free - both - batch
    )


def _side_names(use: Use) -> str:
    sides = use.contracted | use.window, use.free
    inputs, outputs = (tuple(sorted(dims)) for dims in sides)
    return f"inputs {inputs} and outputs {outputs} at {use.where}"
