"""What a function does with each dimension of its weights, from its jaxpr.

The jaxpr is evaluated on dimensions rather than on elements: the value of an array that
holds a weight is, for each of its dimensions, the dimensions of the weight behind it.
This takes no FLOPs and no memory.
"""

import itertools
from collections.abc import Container, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from lora_jax._engine.companions import origins
from lora_jax._engine.jaxpr import CALLS, call_jaxpr, evaluate, scan_counts, shapes
from lora_jax._engine.source import source_line
from lora_jax._engine.views import keeps

Dims = frozenset[int]

# Primitives that join arrays: `x @ w + bias`, `x + positions`, a token in front of `x`.
# A weight that is joined with an activation is part of an activation: a later product
# is with that, not with the weight.
JOINS = {"add", "sub", "add_any", "max", "min", "concatenate", "stack", "select_n"}
JOINS |= {"dynamic_update_slice", "scatter", "scatter-add", "scatter_add"}


class View(NamedTuple):
    """An array that holds a weight: the dimensions of the weight behind each of its."""

    weight: Hashable
    dims: tuple[Dims, ...]
    sure: bool = True  # False after a lookup or a sum: an activation, perhaps
    alone: bool = True  # False once joined with an activation: a bias, a position


# Marks an activation among the views that an array holds: the array depends on an input
# that is no parameter.
ACTIVE = View(None, ())


class Use(NamedTuple):
    """What one equation does with the dimensions of a weight."""

    contracted: Dims = frozenset()
    window: Dims = frozenset()  # of a convolution: an input in the forward direction
    free: Dims = frozenset()
    batch: Dims = frozenset()
    picked: Dims = frozenset()  # a row of a table, a layer of a stack
    rows: Dims = frozenset()  # those that are picked by indices known at run time
    sure: bool = True
    alone: bool = True
    where: str = ""

    @property
    def is_product(self) -> bool:
        """Whether it is a product with the weight itself, and no sum or broadcast."""
        return self.alone and bool(self.contracted and self.free)

    @property
    def is_lookup(self) -> bool:
        """Whether it picks rows of the weight by indices known at run time."""
        return self.alone and bool(self.rows)


def uses_of(
    jaxpr: Any,
    names: Sequence[Hashable | None],
    ndims: dict[Any, int],
    params: Container[int],
) -> dict[Any, list[Use]]:
    """What the equations of a jaxpr do with the weights among its inputs.

    Args:
      jaxpr: The function.
      names: Of the inputs; those in `ndims` are weights.
      ndims: The number of dimensions of each weight.
      params: Which inputs are parameters: what depends on any other is an activation.
    """
    dims = {name: tuple(frozenset([d]) for d in range(n)) for name, n in ndims.items()}
    views = [
        (View(name, dims[name]),)
        if name in dims
        else (() if i in params else (ACTIVE,))
        for i, name in enumerate(names)
    ]
    uses: dict[Any, list[Use]] = {name: [] for name in ndims}
    _walk(jaxpr, views, uses)
    return uses


def _walk(jaxpr: Any, args: Sequence[Any], uses: dict[Any, list[Use]]) -> list[Any]:
    """The results of a jaxpr on tuples of views; a plain array is an empty tuple."""

    def apply(index, eqn, operands):
        views = [x if isinstance(x, tuple) else () for x in operands]
        held = {*itertools.chain(*views)}
        if held <= {ACTIVE}:
            return [tuple(held)] * len(eqn.outvars)
        return _step(eqn, views, uses)

    return evaluate(jaxpr, args, apply)


def _step(eqn: Any, views: list[Any], uses: dict[Any, list[Use]]) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    active = (ACTIVE,) if any(ACTIVE in x for x in views) else ()
    nothing = [active] * len(eqn.outvars)

    def note(view: View, **roles: Any) -> None:
        """Adds a use; the view's dimensions of each role are given by position."""
        sets = {
            role: frozenset().union(*(view.dims[i] for i in positions))
            for role, positions in roles.items()
        }
        known = {"sure": view.sure, "alone": view.alone, "where": source_line(eqn)}
        uses[view.weight].append(Use(**sets, **known))

    if name in CALLS:
        return _walk(call_jaxpr(eqn), views, uses)
    if name == "scan":
        consts, carried = scan_counts(eqn)
        n = consts + carried
        for view in _weights(itertools.chain(*views[n:])):
            note(view, batch=[0])
        slices = [tuple(v._replace(dims=v.dims[1:]) for v in x) for x in views[n:]]
        # What a loop carries may become an activation in its body.
        carry = [x or active for x in views[consts:n]]
        results = _walk(params["jaxpr"], [*views[:consts], *carry, *slices], uses)
        return [*results[:carried], *nothing[carried:]]
    if name == "while":
        n, m = params["cond_nconsts"], params["body_nconsts"]
        carry = [x or active for x in views[n + m :]]
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
        for side, contracted, batch in zip(views, sums, batches, strict=True):
            for view in _weights(side):
                free = {*range(len(view.dims))} - {*contracted, *batch}
                note(view, contracted=contracted, free=free, batch=batch)
        return nothing
    if name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"]
        ((_, contracted), (_, batch)) = numbers.dot_dimension_numbers
        for view in _weights(views[1]):
            batch = {*batch, *numbers.rhs_group_dimensions}
            free = {*range(len(view.dims))} - {*contracted, *batch}
            note(view, contracted=contracted, free=free, batch=batch)
        return nothing
    if name == "conv_general_dilated":
        out, into, *window = params["dimension_numbers"].rhs_spec
        for view in _weights(views[1]):
            note(view, contracted=[into], window=window, free=[out])
        return nothing

    olds, news = shapes(eqn)
    results = []
    for k, new in enumerate(news):
        one_to_one = name in ("optimization_barrier", "device_put")
        sources = [k] if one_to_one else range(len(views))
        sure = _is_sure(eqn, olds)
        moved = [
            view._replace(
                dims=dims,
                sure=view.sure and sure,
                alone=view.alone and not _is_joined(eqn, i, views, olds),
            )
            for i in sources
            for view in _weights(views[i])
            if (dims := _moved(eqn, view.dims, olds[i], new)) is not None
        ]
        results.append(tuple(dict.fromkeys((*moved, *active))))
    for view in _weights(itertools.chain(*views)):
        note(view, **_looked_up(eqn, olds[0], news[0]))
    return results


def _moved(eqn: Any, dims: tuple[Dims, ...], old: Any, new: Any) -> Any:
    """The dimensions behind those of a result, or None if it is no view at all."""
    behind = origins(eqn.primitive.name, eqn.params, old, new)
    if behind is None:
        return None
    return tuple(frozenset().union(*(dims[d] for d in before)) for before in behind)


def _weights(views: Iterable[View]) -> list[View]:
    return [view for view in views if view != ACTIVE]


def _is_joined(eqn: Any, i: int, views: Any, olds: Any) -> bool:
    """Whether an equation joins an operand with an activation, a bias with `x @ w`."""
    if eqn.primitive.name not in JOINS:
        return False
    first = 1 if eqn.primitive.name == "select_n" else 0  # which takes the condition
    others = (j for j in range(first, len(views)) if j != i and olds[j] != ())
    return any(ACTIVE in views[j] for j in others)


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
