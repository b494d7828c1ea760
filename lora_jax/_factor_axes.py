"""Infers a weight's axes from factors in the layout of another library.

In our own layouts the number of dimensions shows which of them are inputs. Here the
factors keep the dimensions of the weight in its order, or join the inputs to one and
the outputs to one, wherever these are in the weight.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax._adapters import Axes, LowRank, Shape


def possible_axes(w: Shape, a: Shape, b: Shape, *, joined: bool) -> list[Axes]:
    """Returns each axes with which factors of these shapes make an update of a weight.

    The factors are (stacked..., inputs..., rank) and (stacked..., rank, outputs...),
    where the inputs and the outputs are in the order of the weight, or, with `joined`,
    may be joined to one dimension each. Weights are stacked along their first
    dimensions. Axes that differ only in dimensions of size 1 give the same update, and
    one of them is returned: that of a weight in standard order, if it is possible.
    """
    found: dict[Any, Axes] = {}
    for n in range(min(len(w), len(a), len(b))):
        if not w[:n] == a[:n] == b[:n]:
            break
        if a[-1] != b[n]:
            continue
        dims = range(n, len(w))
        for size in range(1, len(dims)):
            for inputs in itertools.combinations(dims, size):
                outputs = tuple(d for d in dims if d not in inputs)
                pairs = (a[n:-1], inputs), (b[n + 1 :], outputs)
                if all(_holds(x, [w[d] for d in kept], joined) for x, kept in pairs):
                    axes = Axes(tuple(range(n)), inputs, outputs)
                    key = significant(axes, w)
                    if key not in found or axes.standard:
                        found[key] = axes
    return [*found.values()]


def significant(axes: Axes, w: Shape) -> tuple[tuple[int, ...], ...]:
    """Returns the dimensions of more than size 1 that are stacked, inputs, outputs."""
    return tuple(tuple(d for d in dims if w[d] != 1) for dims in axes)


def to_our_order(w: Shape, a: Any, b: Any, axes: Axes) -> tuple[Any, Any]:
    """Returns factors in standard order, or in aligned order if the weight needs it.

    Args:
      w: The shape of the weight.
      a: (stacked..., inputs..., rank), the inputs joined to one dimension or not.
      b: (stacked..., rank, outputs...), the outputs too.
      axes: The weight's axes.
    """
    batch, inputs, outputs = axes
    r = a.shape[-1]
    first, second = [w[d] for d in (*batch, *inputs)], [w[d] for d in outputs]
    a = jnp.reshape(a, (*first, r))
    b = jnp.reshape(b, (*(w[d] for d in batch), r, *second))
    if axes.standard:
        return a, b
    b = jnp.moveaxis(b, len(batch), -1)
    sides = ((a, (*batch, *inputs)), (b, (*batch, *outputs)))
    a, b = (
        jnp.reshape(x, (*(n if d in kept else 1 for d, n in enumerate(w)), r))
        for x, kept in sides
    )
    return a, b


def from_our_order(w: Shape, adapter: LowRank[Any]) -> tuple[Any, Any]:
    """Returns factors as (stacked..., inputs..., rank), (stacked..., rank, outputs...).

    The inverse of `to_our_order`, for the dimensions of `split_dims`.
    """
    if not adapter.aligned:
        return adapter.a, adapter.b
    batch, inputs, outputs = split_dims(w, adapter)
    a, b = (
        jnp.transpose(x, [*dims, *(d for d in range(len(w)) if d not in dims), len(w)])
        for x, dims in ((adapter.a, (*batch, *inputs)), (adapter.b, (*batch, *outputs)))
    )
    r = a.shape[-1]
    a = jnp.reshape(a, (*(w[d] for d in (*batch, *inputs)), r))
    b = jnp.reshape(b, (*(w[d] for d in (*batch, *outputs)), r))
    return a, jnp.moveaxis(b, -1, len(batch))


def split_dims(w: Shape, adapter: LowRank[Any]) -> Axes:
    """Returns the axes of a weight with each dimension of size 1 on one side.

    In aligned factors such a dimension is on neither. It counts as an output, as do the
    single heads of keys and values.
    """
    batch, inputs, _ = adapter.axes
    if not adapter.aligned:
        return adapter.axes
    inputs = tuple(d for d in inputs if w[d] != 1) or inputs[-1:]
    return Axes(
        batch,
        inputs,
        tuple(d for d in range(len(w)) if d not in (*batch, *inputs)),
    )


def _holds(x: Sequence[int], w: Sequence[int], joined: bool) -> bool:
    """Whether a factor has some dimensions of the weight, or all joined to one."""
    return tuple(x) == tuple(w) or (joined and len(x) == 1 and x[0] == math.prod(w))
