"""The modules that a program loads only together with adapted ones, and their sizes.

Those of them without an adapter get one of zeros. The tree has their weights.
"""

import functools
import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from lora_jax._adapters import Axes, is_adapter
from lora_jax._flax_names import is_adaptable
from lora_jax._hub.consumers import Consumer, Group
from lora_jax._hub.module_plan import ModulePlan
from lora_jax._hub.names import Names, each_index, last_part, name_finder
from lora_jax._tree import Path, path_name, unbox


class ModuleGroup(NamedTuple):
    """Modules that are loaded together."""

    sizes: dict[str, tuple[int, int]]  # the inputs and outputs of each, by its name
    of_experts: bool


def module_groups(
    groups: Iterable[tuple[Consumer, Group]],
    plan: ModulePlan,
    leaves: Mapping[Path, Any],
    names: Names,
    axes: Mapping[Path, Axes],
    modules: Container[str] | None,
) -> list[ModuleGroup]:
    """Returns the groups of which some module is adapted.

    Args:
      groups: Each program that the export is for with one of its groups.
      plan: All adapted leaves.
      leaves: Of the tree.
      names: The map.
      axes: Those that the caller gave.
      modules: Of the PyTorch model, if the caller gave them.

    Raises:
      ValueError: If names has no name for a module that a program needs, or a weight
        does not fit those of its group.
    """
    adapted = dict(_adapted_sizes(plan))
    others: dict[str, tuple[Path, int]] | None = None  # which few exports need
    found = []
    for row, group in groups:
        for prefix, first in _prefixes(group, adapted).items():
            members = _members(group, prefix, adapted)
            if group.of_experts or not adapted.keys() >= {*members}:
                if others is None:
                    others = dict(_other_modules(plan, leaves, names, axes))
                members = _members(group, prefix, [*adapted, *others])
            sizes = {}
            for name in members:
                if name in adapted:
                    sizes[name] = adapted[name]
                elif others is not None and name in others:
                    sizes[name] = _sizes(group, name, *others[name], first, adapted)
                elif not _may_be_absent(group, name, modules):
                    raise ValueError(_missing(row, group, name, first, plan))
            found.append(ModuleGroup(sizes, group.of_experts))
    return found


def _adapted_sizes(plan: ModulePlan) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields the inputs and outputs of each adapted module."""
    for weight in plan.adapted.values():
        _, n_in, n_out = weight.matrix
        for name, part in weight.modules.items():
            yield name, (n_in, len(range(n_out)[part.outputs]))


def _prefixes(group: Group, adapted: Iterable[str]) -> dict[str, str]:
    """Returns the start of names of each such group, and its first adapted module."""
    found: dict[str, str] = {}
    for name in adapted:
        prefix, last = name[: -len(last_part(name))], last_part(name)
        if group.of_experts:
            expert = re.fullmatch(r"(.*\.experts\.)\d+\.", prefix)
            prefix = expert[1] if expert else None
        if prefix is not None and last in group.modules:
            found.setdefault(prefix, name)
    return found


def _members(group: Group, prefix: str, names: Iterable[str]) -> list[str]:
    """Returns the names of all modules of a group, by those of some of them."""
    if not group.of_experts:
        return [prefix + last for last in group.modules]
    pattern = re.compile(re.escape(prefix) + rf"(\d+)\.({'|'.join(group.modules)})")
    matched = map(pattern.fullmatch, names)
    experts = sorted({int(found[1]) for found in matched if found})
    return [f"{prefix}{i}.{last}" for i in experts for last in group.modules]


def _other_modules(
    plan: ModulePlan,
    leaves: Mapping[Path, Any],
    names: Names,
    axes: Mapping[Path, Axes],
) -> Iterator[tuple[str, tuple[Path, int]]]:
    """Yields the weight and the elements of each named module without an adapter."""
    find = name_finder(names)
    stacked_dims = functools.cache(functools.partial(_stacked_dims, plan))
    for path, leaf in leaves.items():
        if path in plan.adapted or is_adapter(path) or not is_adaptable(path, leaf):
            continue
        shape, named = unbox(leaf).shape, find(path)
        if named is None or len(shape) < named.stacked:
            continue
        if path in axes:
            dims = axes[path].batch[: named.stacked]
        else:
            dims = stacked_dims(named.stacked)
        stack = [shape[d] for d in dims]
        widths = named.sizes or (1,) * len(named.templates)
        size = math.prod(shape) // math.prod(stack)
        for _, parts in each_index(path, named, stack):
            for name, width in zip(parts, widths, strict=True):
                yield name, (path, size * width // sum(widths))


def _stacked_dims(plan: ModulePlan, stacked: int) -> tuple[int, ...]:
    """Returns the stacked dimensions of a weight: the same as of adapted ones."""
    batches = (weight.axes.batch for weight in plan.adapted.values())
    seen = {batch[:stacked] for batch in batches if len(batch) >= stacked}
    return seen.pop() if len(seen) == 1 else tuple(range(stacked))


def _sizes(
    group: Group,
    name: str,
    path: Path,
    elements: int,
    first: str,
    adapted: Mapping[str, tuple[int, int]],
) -> tuple[int, int]:
    """Returns the inputs and outputs of a weight, by those of an adapted one.

    Its own shape would not show which of its dimensions are inputs.
    """
    turned = (last_part(name) in group.reversed) != (last_part(first) in group.reversed)
    n_in = adapted[first][turned]
    if elements % n_in:
        raise ValueError(
            f"{path_name(path)!r} is {name!r} by its name, of {elements} elements, and "
            f"{first!r} shows that it has {n_in} inputs. Correct names, or write "
            "axes=find_axes(fn, params, *args)."
        )
    return n_in, elements // n_in


def _may_be_absent(group: Group, name: str, modules: Container[str] | None) -> bool:
    """Whether a program loads the others of a group without this module."""
    last = last_part(name)
    known = modules is not None and name not in modules
    return last in group.implied or (known and last in group.optional)


def _missing(
    row: Consumer, group: Group, name: str, first: str, plan: ModulePlan
) -> str:
    """Returns the message about a module that names does not have."""
    path = next(path for path, leaf in plan.adapted.items() if first in leaf.modules)
    absent = "if the model has none, pass its modules=, " * (
        last_part(name) in group.optional
    )
    return (
        f"{path_name(path)!r} is {first!r}, which {row.title} {row.version} loads only "
        f"together with {name!r}, and names gives that name to no weight. Add the "
        f"weight to names, so that zeros of its size can be written, {absent}or leave "
        f"{row.name!r} out of for_."
    )
