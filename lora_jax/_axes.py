"""How a function uses each weight: its stacked, input and output dimensions.

A walk along the jaxpr in which each array that holds a weight carries, instead of
numbers, the weight's own dimensions behind each of its own. No FLOPs, and no memory.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from lora_jax._adapters import Axes
from lora_jax._factors import segments
from lora_jax._jaxpr import (
    CALLS,
    call_jaxpr,
    evaluate,
    place,
    scan_counts,
    shapes,
    trace_call,
    used_inputs,
)
from lora_jax._targets import is_adaptable
from lora_jax._tree import Path, flatten, leaf_order, path_name, unbox
from lora_jax._views import keeps

Dims = frozenset[int]

# Primitives that only shorten or lengthen dimensions, or turn them round.
CUTS = {"slice", "dynamic_slice", "split", "pad", "concatenate", "tile", "rev"}


class View(NamedTuple):
    """An array that holds a weight, each dimension as dimensions of the weight."""

    weight: Path
    dims: tuple[Dims, ...]
    sure: bool = True  # False after a lookup or a sum: an activation, perhaps


class Use(NamedTuple):
    """What one equation does with the dimensions of a weight."""

    summed: Dims = frozenset()
    window: Dims = frozenset()  # of a convolution: an input, if it is forward
    free: Dims = frozenset()
    batch: Dims = frozenset()
    picked: Dims = frozenset()  # some of many: a row of a table, a layer of a stack
    rows: Dims = frozenset()  # those that are picked by numbers known at run time
    sure: bool = True
    where: str = ""


def find_axes(
    fn: Callable[..., Any], params: Any, *args: Any, argnum: int = 0, **kwargs: Any
) -> dict[str, Axes]:
    """Finds out, from how a function uses each weight, which dimensions are which.

    What a product sums over is an input, and the rest an output; what it keeps apart,
    and what a `scan` goes over, is a stack of layers or experts. The rows of a lookup
    are inputs. It works for kernels stored (out, in), fused ones of shape (3, heads, d,
    head_dim), scanned ones, experts, and tables that are also the head.

    Args:
      fn: Any function of arrays in JAX, such as `model.apply`; traced, never run.
      params: Its parameters, without adapters: the tree that `lorafy` will get. Arrays
        or `ShapeDtypeStruct`.
      *args: The other arguments, arrays or `ShapeDtypeStruct`.
      argnum: The position of `params` among the arguments of `fn`.
      **kwargs: Keyword arguments of `fn`.

    Returns:
      `{path: Axes(batch, inputs, outputs)}` for each floating weight of two or more
      dimensions that `fn` uses. A weight that meets no product and no lookup, as a
      table of positions that is added, has its last dimension for an output. Experts
      that are all computed at once, "td,edh->teh", cannot be told from heads; for an
      adapter each, write `find_axes(...) | {path: Axes((0,), (1,), (2,))}`.

    Raises:
      ValueError: If a weight is used in two ways that no one adapter can serve.
      TypeError: If `argnum` is no position among the arguments.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> fn = lambda params, x: x @ params["w"].T
      >>> params, x = {"w": jnp.ones((3, 4))}, jnp.ones((2, 4))
      >>> lj.find_axes(fn, params, x)
      {'w': Axes(batch=(), inputs=(1,), outputs=(0,))}
      >>> adapted = lj.lorafy(params, 2, targets="w", axes=lj.find_axes(fn, params, x))

    Reference:
      Hu et al., "LoRA", 2021. https://arxiv.org/abs/2106.09685
    """
    if not 0 <= argnum <= len(args):
        raise TypeError(
            f"argnum={argnum} names no argument: with params there are {len(args) + 1} "
            "positional. Pass the other arguments after params, in their order."
        )
    leaves = flatten(params)
    weights = {
        path: len(unbox(leaf).shape)
        for path, leaf in leaves.items()
        if is_adaptable(path, leaf)
    }
    traced, dynamic = trace_call(fn, (*args[:argnum], params, *args[argnum:]), kwargs)
    before = len(jax.tree.leaves(args[:argnum]))
    paths = dict(enumerate(leaf_order(params), before))
    paths = [paths.get(i) for i in dynamic]
    dims = {p: tuple(frozenset([d]) for d in range(n)) for p, n in weights.items()}
    views = [(View(path, dims[path]),) if path in dims else () for path in paths]
    uses: dict[Path, list[Use]] = {path: [] for path in weights}
    _walk(traced.jaxpr, views, uses)
    used = zip(paths, used_inputs(traced.jaxpr), strict=True)
    met = {path for path, use in used if use and path in weights}
    return {path_name(p): _settle(p, weights[p], uses[p]) for p in weights if p in met}


# From the uses of one weight to its dimensions.


def _settle(path: Path, n: int, uses: list[Use]) -> Axes:
    """The axes that serve every use."""
    dims = range(n)
    picked = {d for use in uses for d in use.picked}
    kept_apart = {d for use in uses for d in use.batch - use.summed - use.free}
    sides = _sides(path, [_without(use, kept_apart) for use in uses])
    first = {d for d, side in sides.items() if side == 0}
    second = sides.keys() - first
    rows = {d for use in uses if use.sure for d in use.rows}
    if second & rows:  # of a table that is also the head
        first, second = second, first
    if first and second:
        batch = kept_apart | (picked - sides.keys())
        edge = min(second)
        inputs = [
            d for d in dims if d in first or (d not in second | batch and d < edge)
        ]
    else:
        # No product decides: a table, whose rows are looked up or added.
        batch = kept_apart
        rest = [d for d in dims if d not in batch]
        inputs = [d for d in rest if d in picked] or rest[:-1]
        if not inputs or inputs == rest:
            batch, inputs = set(), [d for d in dims if d in picked]
            inputs = inputs if 0 < len(inputs) < n else list(dims[:-1])
    outputs = [d for d in dims if d not in batch and d not in inputs]
    return Axes(tuple(sorted(batch)), tuple(inputs), tuple(outputs))


def _sides(path: Path, uses: list[Use]) -> dict[int, int]:
    """Each dimension on the inputs' side, 0, or the outputs', 1, as products say."""
    sides: dict[int, int] = {}
    decided: list[Use] = []
    # Products with the weight itself first: an activation's may be anything.
    for use in sorted(uses, key=lambda use: not use.sure):
        if not (use.summed and use.free):
            continue
        own = dict.fromkeys(use.summed, 0) | dict.fromkeys(use.free, 1)
        shared = own.keys() & sides.keys()
        same = [own[d] == sides[d] for d in shared]
        if any(same) and not all(same):
            if not use.sure:
                continue
            other = next(u for u in decided if (u.summed | u.free) & shared)
            raise ValueError(
                f"{path_name(path)!r} is used in two ways that no one adapter serves: "
                f"{_side_names(other)}, and {_side_names(use)}. Leave it out of "
                "params, in a function that holds it itself, and name its axes in "
                "lorafy(..., axes={...}) for the one to factor, or exclude it."
            )
        flip = bool(same) and not all(same)
        own = dict.fromkeys(use.window, 0) | own
        sides |= {d: side ^ flip for d, side in own.items() if d not in sides}
        decided.append(use)
    return sides


def _without(use: Use, batch: set[int]) -> Use:
    """The use without stacked dimensions, and those that are on both of its sides."""
    both = use.summed & use.free
    return use._replace(summed=use.summed - both - batch, free=use.free - both - batch)


def _side_names(use: Use) -> str:
    sides = use.summed | use.window, use.free
    inputs, outputs = (tuple(sorted(dims)) for dims in sides)
    return f"inputs {inputs} and outputs {outputs} at {use.where}"


# The walk.


def _walk(jaxpr: Any, args: Sequence[Any], uses: dict[Path, list[Use]]) -> list[Any]:
    """The results of a jaxpr on tuples of views; a plain array is an empty tuple."""

    def apply(index, eqn, operands):
        views = [x if isinstance(x, tuple) else () for x in operands]
        if not any(views):
            return [()] * len(eqn.outvars)
        return _step(eqn, views, uses)

    return evaluate(jaxpr, args, apply)


def _step(eqn: Any, views: list[Any], uses: dict[Path, list[Use]]) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    nothing = [()] * len(eqn.outvars)

    def note(view: View, **roles: Any) -> None:
        """Where a role is given by positions of the view's dimensions."""
        sets = {
            role: frozenset().union(*(view.dims[i] for i in positions))
            for role, positions in roles.items()
        }
        uses[view.weight].append(Use(**sets, sure=view.sure, where=place(eqn)))

    if name in CALLS:
        return _walk(call_jaxpr(eqn), views, uses)
    if name == "scan":
        consts, carried = scan_counts(eqn)
        n = consts + carried
        for view in itertools.chain(*views[n:]):
            note(view, batch=[0])
        slices = [tuple(v._replace(dims=v.dims[1:]) for v in x) for x in views[n:]]
        results = _walk(params["jaxpr"], [*views[:n], *slices], uses)
        return [*results[:carried], *nothing[carried:]]
    if name == "while":
        n, m = params["cond_nconsts"], params["body_nconsts"]
        carry = views[n + m :]
        _walk(params["cond_jaxpr"], [*views[:n], *carry], uses)
        return _walk(params["body_jaxpr"], [*views[n : n + m], *carry], uses)
    if name == "cond":
        branches = [_walk(branch, views[1:], uses) for branch in params["branches"]]
        return [
            tuple(dict.fromkeys(itertools.chain(*x)))
            for x in zip(*branches, strict=True)
        ]

    if name == "dot_general":
        sums, batches = params["dimension_numbers"]
        for side, summed, batch in zip(views, sums, batches, strict=True):
            for view in side:
                free = {*range(len(view.dims))} - {*summed, *batch}
                note(view, summed=summed, free=free, batch=batch)
        return nothing
    if name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"]
        ((_, summed), (_, batch)) = numbers.dot_dimension_numbers
        for view in views[1]:
            batch = {*batch, *numbers.rhs_group_dimensions}
            free = {*range(len(view.dims))} - {*summed, *batch}
            note(view, summed=summed, free=free, batch=batch)
        return nothing
    if name == "conv_general_dilated":
        out, into, *window = params["dimension_numbers"].rhs_spec
        for view in views[1]:
            note(view, summed=[into], window=window, free=[out])
        return nothing

    olds, news = shapes(eqn)
    results = []
    for k, new in enumerate(news):
        one_to_one = name in ("optimization_barrier", "device_put")
        sources = [k] if one_to_one else range(len(views))
        moved = [
            view._replace(dims=dims, sure=view.sure and _is_sure(eqn, olds))
            for i in sources
            for view in views[i]
            if (dims := _moved(eqn, view.dims, olds[i], new)) is not None
        ]
        results.append(tuple(dict.fromkeys(moved)))
    for view in itertools.chain(*views):
        note(view, **_looked_up(eqn, olds[0], news[0]))
    return results


def _moved(eqn: Any, dims: tuple[Dims, ...], old: Any, new: Any) -> Any:
    """The dimensions behind those of a result, or `None` if it is no view at all."""
    name, params = eqn.primitive.name, eqn.params
    none = frozenset()
    if name == "transpose":
        return tuple(dims[d] for d in params["permutation"])
    if name == "broadcast_in_dim":
        at = dict(zip(params["broadcast_dimensions"], range(len(dims)), strict=True))
        kept = {d: i for d, i in at.items() if old[i] == new[d]}
        return tuple(dims[kept[d]] if d in kept else none for d in range(len(new)))
    if name in ("reshape", "squeeze"):
        order = params["dimensions"] if name == "reshape" else None
        order = range(len(dims)) if order is None else order
        moved = [none] * len(new)
        for olds, news in segments(tuple(old[d] for d in order), new):
            for d in news:
                moved[d] = none.union(*(dims[order[i]] for i in olds))
        return tuple(moved)
    if name == "stack":
        return (*dims[: params["axis"]], none, *dims[params["axis"] :])
    if name == "unstack":
        return dims[: params["axis"]] + dims[params["axis"] + 1 :]
    if name == "gather":
        numbers = params["dimension_numbers"]
        gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        window = [d for d in range(len(dims)) if d not in gone]
        moved = [none] * len(new)
        for i, d in zip(numbers.offset_dims, window, strict=True):
            moved[i] = dims[d] if params["slice_sizes"][d] == old[d] else none
        return tuple(moved)
    if name.startswith("reduce_") and "axes" in params:
        return tuple(x for d, x in enumerate(dims) if d not in params["axes"])
    if name in CUTS or old == new:
        return dims
    return None


def _is_sure(eqn: Any, olds: Sequence[tuple[int, ...]]) -> bool:
    """Whether a weight that goes through stays one: no lookup, no sum with another."""
    by_an_array = eqn.primitive.name in ("add", "sub") and () not in olds
    return keeps(eqn) and not by_an_array


def _looked_up(eqn: Any, old: tuple[int, ...], new: tuple[int, ...]) -> dict[str, Any]:
    """The dimensions along which an equation picks some of many, or keeps apart."""
    name, params = eqn.primitive.name, eqn.params
    if name == "gather":
        numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
        picked = [d for d in numbers.start_index_map if sizes[d] < old[d]]
        kept_apart = numbers.operand_batching_dims
        return {"picked": picked, "rows": picked, "batch": kept_apart}
    if name == "unstack":
        return {"picked": [params["axis"]]}
    if name in ("slice", "dynamic_slice", "split"):
        cut = [d for d, (n, m) in enumerate(zip(old, new, strict=True)) if m < n]
        if name == "dynamic_slice":
            return {"picked": cut, "rows": cut}
        return {"picked": [d for d in cut if new[d] == 1]}
    return {}
