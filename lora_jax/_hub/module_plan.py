"""The plan of an export or import: the PyTorch modules of all leaves that are trained.

It is made from names and shapes alone, before any array is read.
"""

import math
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

from lora_jax._adapters import Adapters, Axes, is_adapter, of_rank
from lora_jax._flax_names import check_axes, is_adaptable, own_names
from lora_jax._hub.module_adapters import is_reversed
from lora_jax._hub.module_kinds import EXPERTS, KINDS, VECTOR, Linear
from lora_jax._hub.modules import MappedLeaf, map_vector, map_weight
from lora_jax._hub.names import ModuleNames, Names, check_names, required_names
from lora_jax._patterns import match_each, matches
from lora_jax._tree import Path, is_array, leaf_name, path_name, sibling, unbox


class ModulePlan(NamedTuple):
    """The PyTorch modules of the leaves that are trained."""

    adapted: dict[Path, MappedLeaf]  # weights with a low-rank adapter
    copied: dict[Path, MappedLeaf]  # leaves that are trained in full
    biases: dict[Path, MappedLeaf]  # those of them whose module is not, in an export
    named: Mapping[Path, ModuleNames]

    @property
    def adapted_modules(self) -> set[str]:
        return {name for leaf in self.adapted.values() for name in leaf.modules}

    @property
    def copied_modules(self) -> set[str]:
        return {name for leaf in self.copied.values() for name in leaf.modules}

    @property
    def parameter_orders(self) -> dict[str, int | None]:
        """The adapted parameters, such as experts: positions of their map patterns."""
        return {
            name: self.named[path].order
            for path, leaf in self.adapted.items()
            for name, part in leaf.modules.items()
            if part.kind is EXPERTS
        }


def plan_modules(
    leaves: dict[Path, Any],
    named: Mapping[Path, ModuleNames],
    adapted: Iterable[Path],
    copied: Iterable[Path],
    axes: Mapping[Path, Axes],
    kinds: Mapping[str, str] | None,
) -> ModulePlan:
    """Returns the plan of the adapted leaves and of those that are trained in full.

    Raises:
      ValueError: If a leaf does not fit its names or its kind, or its dimensions or its
        layout in PyTorch are not known.
    """
    kind_of = module_kinds(kinds, leaves)
    weights = {
        path: map_weight(path, leaves, named[path], axes.get(path), kind_of[path])
        for path in adapted
    }
    known = [*axes.values(), *(weight.axes for weight in weights.values())]
    stack_first = all(
        adapter.batch == tuple(range(len(adapter.batch))) for adapter in known
    )
    copies = {}
    for path in copied:
        given = axes.get(path)
        copies[path] = map_leaf(path, leaves, named[path], given, kind_of[path])
        _check_layout(copies[path], named[path], stack_first, kinds or {})
    return ModulePlan(weights, copies, {}, named)


def with_biases_apart(plan: ModulePlan) -> ModulePlan:
    """Returns the plan with the biases that are trained without their modules apart.

    PEFT saves whole modules, and biases by themselves.
    """
    others = {
        name
        for path, leaf in plan.copied.items()
        if leaf_name(path) != "bias"
        for name in leaf.modules
    }
    biases = {
        path: leaf
        for path, leaf in plan.copied.items()
        if leaf_name(path) == "bias" and others.isdisjoint(leaf.modules)
    }
    copied = {path: leaf for path, leaf in plan.copied.items() if path not in biases}
    return plan._replace(copied=copied, biases=biases)


def map_leaf(
    path: Path,
    leaves: dict[Path, Any],
    named: ModuleNames,
    axes: Axes | None,
    kind: Linear,
) -> MappedLeaf:
    """Returns the modules of any leaf: a weight, or what PyTorch keeps as a vector."""
    shape = unbox(leaves[path]).shape
    if len(shape) - named.stacked < 2 or not is_adaptable(path, leaves[path]):
        return map_vector(path, shape, named)
    return map_weight(path, leaves, named, axes, kind)


def trained_names(
    leaves: dict[Path, Any], adapters: Adapters, names: Names
) -> dict[Path, ModuleNames]:
    """Returns the names of all leaves that are trained, which must have one."""
    check_names(names, leaves)
    return required_names(names, adapters)


def trained_axes(
    leaves: dict[Path, Any], adapters: Adapters, axes: Mapping[str, Axes] | None
) -> dict[Path, Axes]:
    """Returns the axes that the caller gave, or else those of the adapters.

    Raises:
      ValueError: If the two do not fit.
    """
    given = axes_by_path(axes, leaves)
    known = {path: adapter.axes for path, adapter in of_rank(adapters).items()}
    for path, dims in known.items():
        is_reversed(path, unbox(leaves[path]).shape, dims, given.get(path, dims))
    return known | given


def module_kinds(
    kinds: Mapping[str, str] | None, leaves: Iterable[Path]
) -> dict[Path, Linear]:
    """Returns the kind of module of each leaf: by Flax's names, or by `kinds`.

    A pattern may be that of any leaf of the tree, with an adapter or without: the same
    `kinds` serve for reading the model, training it and writing a part of it.
    """
    paths, found = [path for path in leaves if not is_adapter(path)], {}
    if not isinstance(kinds or {}, Mapping):
        raise TypeError(f"kinds is {{pattern: kind}}, found {type(kinds).__name__}.")
    for path in paths:
        name, module = own_names(path)
        is_conv = name == "kernel" and module.startswith("conv")
        kind = "embedding" if name == "embedding" else "conv" if is_conv else "linear"
        found[path] = KINDS[kind]
    for pattern, kind in reversed([*(kinds or {}).items()]):  # the first one wins
        if kind not in KINDS:
            raise ValueError(
                f"kinds of {pattern!r} is one of {', '.join(KINDS)}, found {kind!r}."
            )
        found |= dict.fromkeys(match_each([pattern], paths, "kinds"), KINDS[kind])
    return found


def axes_by_path(
    axes: Mapping[str, Axes] | None, leaves: dict[Path, Any]
) -> dict[Path, Axes]:
    """Returns the axes that the caller gave, checked, by the paths of the weights."""
    by_name = check_axes(axes or {}, leaves)
    return {p: by_name[path_name(p)] for p in leaves if path_name(p) in by_name}


def check_inputs(
    plan: ModulePlan,
    leaves: Mapping[Path, Any],
    known: Container[Path],
    fan_in_fan_out: bool,
) -> None:
    """Checks that the inputs of kernels like GPT-2's are known.

    Flax stores them in either order. A bias next to a kernel shows which dimension is
    the output, unless the kernel is square.

    Args:
      plan: All adapted leaves.
      leaves: Of the tree.
      known: Weights whose axes come from the function, not from their names.
      fan_in_fan_out: Whether PyTorch stores (inputs, outputs).
    """
    for path, weight in plan.adapted.items():
        if path in known or leaf_name(path) == "embedding":
            continue
        batch, n_in, n_out = weight.matrix
        bias = unbox(leaves.get(sibling(path, "bias")))
        size = math.prod(bias.shape) if is_array(bias) else 0
        if n_in == n_out and (fan_in_fan_out or weight.has_conv1d_name):
            why = "is square, and layers like GPT-2's store it either way"
        elif n_in != n_out and size == math.prod(batch) * n_in:
            why = f"has {n_out} outputs by its name, and its bias has {n_in}"
        else:
            continue
        raise ValueError(
            f"{path_name(path)!r}, of shape {weight.shape}, {why}: its inputs are not "
            "known. Write axes=find_axes(fn, params, *args)."
        )


def _check_layout(
    leaf: MappedLeaf, named: ModuleNames, stack_first: bool, kinds: Iterable[str]
) -> None:
    """Checks that PyTorch's layout of a leaf that is trained in full is known."""
    path, (name, module) = leaf.path, own_names(leaf.path)
    why = None
    if any(part.kind is VECTOR for part in leaf.modules.values()):
        if named.stacked and not stack_first:
            why = "which of its dimensions is the stack is not known"
        elif name in ("mean", "var"):
            why = "PyTorch has more of such statistics than Flax"
    elif module.startswith("convtranspose"):
        why = "PyTorch flips the windows of such layers"
    elif leaf.has_conv1d_name:
        why = "PyTorch's layer of that name may store (in, out)"
    elif name not in ("kernel", "embedding"):
        if not any(matches(pattern, path) for pattern in kinds):
            raise ValueError(
                f"{path_name(path)!r} is trained in full, and its name does not show "
                f"its kind. Write kinds={{{path_name(path)!r}: ...}}, one of linear, "
                "conv, embedding."
            )
    if why is not None:
        raise ValueError(
            f"{path_name(path)!r} is trained in full, and {why}. Leave it out of also= "
            "in lorafy, or of PEFT's modules_to_save: it can have an adapter, or stay "
            "frozen."
        )
