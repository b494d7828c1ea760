"""Which modules the leaves that train are: one plan for the way out and the way in.

Made once, from names and shapes, before any array is touched.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lora_jax._adapters import Axes
from lora_jax._flax_names import check_axes
from lora_jax._peft.layouts import CONV1D, kinds_of, layouts_of
from lora_jax._peft.modules import Weight, tensor_shapes, weight_of
from lora_jax._peft.names import Naming
from lora_jax._tree import (
    Path,
    is_array,
    leaf_name,
    path_name,
    sibling,
    unbox,
)


class Plan(NamedTuple):
    """What the leaves that train are in PyTorch."""

    adapted: dict[Path, Weight]  # the weights with an adapter
    copied: dict[Path, Weight | Naming]  # the leaves saved whole, and their layouts
    namings: Mapping[Path, Naming]  # what the map says of each
    told: set[Path]  # those whose dimensions something better than their names tells


def plan_of(
    leaves: dict[Path, Any],
    namings: Mapping[Path, Naming],
    adapted: Iterable[Path],
    copied: Iterable[Path],
    axes: Mapping[Path, Axes],
    told: Iterable[Path],
    kinds: Mapping[str, str] | None,
) -> Plan:
    """The plan of the leaves that have an adapter and of those that are saved whole.

    Raises:
      ValueError: If a leaf cannot be what the map and `kinds` say, or its dimensions or
        its layout in PyTorch are not known.
    """
    kind_of = kinds_of(kinds, namings)
    weights = {
        path: weight_of(path, leaves, namings[path], axes.get(path), kind_of[path])
        for path in adapted
    }
    known = {**axes, **{path: weight.axes for path, weight in weights.items()}}
    whole = {path: namings[path] for path in copied}
    layouts = layouts_of(whole, leaves, known, kind_of, kinds)
    return Plan(weights, layouts, namings, {*told})


def given_axes(
    axes: Mapping[str, Axes] | None, leaves: dict[Path, Any]
) -> dict[Path, Axes]:
    by_name = check_axes(axes or {}, leaves)
    return {p: by_name[path_name(p)] for p in leaves if path_name(p) in by_name}


def adapted_modules(plan: Plan) -> set[str]:
    return {name for weight in plan.adapted.values() for name in weight.slots}


def copied_modules(plan: Plan, leaves: Mapping[Path, Any]) -> set[str]:
    shape = lambda path: unbox(leaves[path]).shape
    return {
        name
        for path, layout in plan.copied.items()
        for name in tensor_shapes(layout, shape(path))
    }


def orders_of(plan: Plan) -> dict[str, int | None]:
    """The bare parameters with an adapter, and the place of each in the map."""
    return {
        name: plan.namings[path].order
        for path, weight in plan.adapted.items()
        for name, slot in weight.slots.items()
        if slot.kind == "experts"
    }


def check_inputs(plan: Plan, leaves: Mapping[Path, Any], fan_in_fan_out: bool) -> None:
    """A kernel of GPT-2 does not say by itself which dimension is the input.

    A bias beside it does, with a number for each output, unless the kernel is square.
    """
    for path, weight in plan.adapted.items():
        if path in plan.told or leaf_name(path) == "embedding":
            continue
        n, n_in, n_out = (math.prod(weight.sizes(dims)) for dims in weight.axes)
        like = any(name.split(".")[-1] in CONV1D for name in weight.slots)
        bias = unbox(leaves.get(sibling(path, "bias")))
        size = math.prod(bias.shape) if is_array(bias) else 0
        why = ""
        if n_in == n_out and (fan_in_fan_out or like):
            why = "is square, and a name like GPT-2's says nothing: which"
        elif n_in != n_out and size == n * n_in:
            why = f"has {n_out} outputs by its name, and its bias has {n_in}: which"
        if why:
            raise ValueError(
                f"{path_name(path)!r}, of shape {weight.shape}, {why} dimension is the "
                "input must be told. Write axes=find_axes(fn, params, *args)."
            )
