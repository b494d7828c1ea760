"""The tensors of a PEFT folder, each sorted to the leaf of the base that it is for."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax._adapters import Axes
from lora_jax._engine.quantized import dequantize
from lora_jax._flax_names import is_adaptable
from lora_jax._hub.module_kinds import KINDS
from lora_jax._hub.module_plan import ModulePlan
from lora_jax._hub.module_rules import unmatched_targets
from lora_jax._hub.modules import leaf_to_torch
from lora_jax._hub.names import (
    ModuleNames,
    Names,
    check_names,
    each_index,
    name_finder,
    similar_names,
)
from lora_jax._hub.peft_folder import PeftFolder
from lora_jax._hub.tensor_keys import (
    MAGNITUDE_SUFFIX,
    PREFIX,
    parameter_stems,
    tensor_name,
)
from lora_jax._processes import gathered
from lora_jax._sample import differ, sample
from lora_jax._tree import (
    Path,
    is_abstract,
    is_array,
    is_quantized,
    leaf_name,
    listed,
    path_name,
    unbox,
)

SUFFIXES = (
    *KINDS["linear"].suffixes,
    *KINDS["embedding"].suffixes,
    MAGNITUDE_SUFFIX,
)
BASE_SUFFIX = ".base_layer.weight"  # of the key of an adapted module's own weight


class LeafIndex(NamedTuple):
    """Maps PyTorch's names to paths of a tree."""

    named: dict[Path, ModuleNames]
    modules: dict[str, Path]  # the weight that each module is, or is a part of
    tensors: dict[str, tuple[str, Path]]  # the module and the leaf of each tensor


class SortedTensors(NamedTuple):
    """The tensors of a folder, by what they are for."""

    factors: dict[str, dict[str, np.ndarray]]  # of adapters: by module and suffix
    base_weights: dict[str, np.ndarray]  # of adapted modules: by module
    copies: dict[Path, dict[str, np.ndarray]]  # trained in full: by leaf and module


def index_leaves(
    names: Names, leaves: dict[Path, Any], axes: Mapping[Path, Axes]
) -> LeafIndex:
    """Returns the index of all leaves that the map has names for.

    Raises:
      ValueError: If a pattern of the map matches nothing, or two weights have one name.
    """
    check_names(names, leaves)
    index, named_as = LeafIndex({}, {}, {}), name_finder(names)
    for path, leaf in leaves.items():
        named = named_as(path) if is_array(unbox(leaf)) else None
        if named is None:
            continue
        index.named[path] = named
        shape, counted = unbox(leaf).shape, named.stacked
        if len(shape) < counted:
            continue
        for _, (name, *others) in each_index(path, named, shape[:counted]):
            if not others:
                index.tensors[tensor_name(name, path)] = name, path
        if not is_adaptable(path, leaf):
            continue
        stack = axes[path].batch[:counted] if path in axes else range(counted)
        for _, modules in each_index(path, named, [shape[d] for d in stack]):
            for name in modules:
                if name in index.modules:
                    raise ValueError(
                        f"{path_name(index.modules[name])!r} and {path_name(path)!r} "
                        f"have one name, {name!r}. Correct names: each weight has its "
                        "own."
                    )
                index.modules[name] = path
    return index


def sort_tensors(
    folder: PeftFolder, index: LeafIndex, leaves: dict[Path, Any]
) -> SortedTensors:
    """Sorts the tensors of a folder, and leaves out embeddings that were not trained.

    Raises:
      ValueError: If a tensor has no place in the tree, or none is of an adapter.
    """
    found = SortedTensors({}, {}, {})
    stems = _parameters_by_stem(folder, index)
    others = {}
    for key, x in folder.tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            raise ValueError(
                f"{folder.path}: the tensor {key!r} does not begin with {PREFIX!r}: "
                "PEFT would ignore it."
            )
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        if suffix is not None:
            stem = name.removesuffix(suffix)
            found.factors.setdefault(stems.get(stem, stem), {})[suffix] = x
        elif ".lora_" in name.lower():
            raise ValueError(
                f"{folder.path}: the tensor {key!r} is no part of a plain LoRA. Only "
                f"{', '.join(suffix[1:] for suffix in SUFFIXES)} are."
            )
        else:
            others[name] = x
    for name, parts in found.factors.items():
        if name not in index.modules:
            raise ValueError(
                f"{folder.path}: the tensor {PREFIX + name + next(iter(parts))!r} is "
                f"of the module {name!r}, which names gives to no weight. Close: "
                f"{similar_names(name, index.modules)}."
            )
    if not found.factors:
        raise ValueError(f"{folder.path} holds no adapter.")
    for name, x in others.items():
        if name.endswith(BASE_SUFFIX):
            found.base_weights[name.removesuffix(BASE_SUFFIX)] = x
        elif copied := _copied_leaf(folder, index, leaves, name, x):
            module, path = copied
            found.copies.setdefault(path, {})[module] = x
    return found


def check_complete(folder: PeftFolder, index: LeafIndex, found: SortedTensors) -> None:
    """Checks that every adapter is of a target, and every target has its tensors."""
    config, rules = folder.config, folder.rules
    chosen = lambda name: rules.is_target(name) or rules.is_target_parameter(name)
    if stray := [name for name in found.factors if not chosen(name)]:
        raise ValueError(
            f"{folder.path} has tensors of {listed(stray)}, which its config does not "
            "target: PEFT would ignore them."
        )
    wanted = [name for name in index.modules if chosen(name)]
    missing = [name for name in wanted if name not in found.factors]
    missing += [
        key
        for key, (name, path) in index.tensors.items()
        if rules.is_saved(name) and name not in found.copies.get(path, {})
    ]
    # An entry may match only modules that another entry excludes.
    excluded = index.modules.keys() - {*wanted}
    copied = {name for names in found.copies.values() for name in names}
    missing += unmatched_targets(config, {*found.factors, *copied, *excluded})
    if missing:
        raise ValueError(
            f"{folder.path} lacks the tensors of {listed(missing)}, which its config "
            "targets. It may be truncated, or names may be the map of another model."
        )


def check_base_weights(
    folder: PeftFolder, found: SortedTensors, plan: ModulePlan, leaves: dict[Path, Any]
) -> None:
    """Checks that embeddings that PEFT saved with their adapters are the base's own."""
    owner = {name: leaf for leaf in plan.adapted.values() for name in leaf.modules}
    for name, x in found.base_weights.items():
        same = False
        if (leaf := owner.get(name)) is not None:
            stored = lambda w, leaf=leaf, name=name: leaf_to_torch(leaf, w)[name]
            same = _is_of_base(unbox(leaves[leaf.path]), x, stored)
        if not same:
            raise ValueError(
                f"{folder.path}: the tensor {PREFIX + name + BASE_SUFFIX!r} is not the "
                "weight of base. Its model was resized or trained: pass the parameters "
                "of that one."
            )


def _parameters_by_stem(folder: PeftFolder, index: LeafIndex) -> dict[str, str]:
    """Returns the parameters that the config targets, by the start of their keys."""
    orders = {
        name: index.named[path].order
        for name, path in index.modules.items()
        if folder.rules.is_target_parameter(name)
    }
    return {stem: name for name, stem in parameter_stems(orders).items()}


def _copied_leaf(
    folder: PeftFolder,
    index: LeafIndex,
    leaves: dict[Path, Any],
    key: str,
    x: np.ndarray,
) -> tuple[str, Path] | None:
    """Returns the module and the leaf of a tensor that was trained in full.

    Or `None` for an embedding of the base: PEFT saves all embeddings, untrained, of a
    model whose vocabulary seems to have grown.
    """
    if key not in index.tensors:
        raise ValueError(
            f"{folder.path}: the tensor {PREFIX + key!r} has no leaf in base. Close: "
            f"{similar_names(key, index.tensors)}. Add a name for it to names."
        )
    name, path = index.tensors[key]
    if folder.rules.is_saved(name):
        return name, path
    is_embedding = leaf_name(path) == "embedding"
    if is_embedding and _is_of_base(unbox(leaves[path]), x, lambda w: w):
        return None
    raise ValueError(
        f"{folder.path}: the tensor {PREFIX + key!r} is of no module in the config's "
        "modules_to_save."
    )


def _is_of_base(w: Any, x: np.ndarray, to_torch: Callable[..., np.ndarray]) -> bool:
    """Whether a tensor has the values of a weight, or its shape if that is abstract.

    The weight may have another dtype.
    """
    if is_abstract(w):
        return to_torch(np.broadcast_to(np.int8(0), w.shape)).shape == x.shape
    held = to_torch(np.asarray(gathered(dequantize(w))))
    if held.shape != x.shape:
        return False
    if is_quantized(w):
        ours, theirs = sample(held), sample(x)
        return ours is not None and theirs is not None and not differ(ours, theirs)
    same = np.array_equal(held.astype(x.dtype), x)
    return same or np.array_equal(held, x.astype(held.dtype))
