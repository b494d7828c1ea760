"""The tensors of a PEFT folder, each sorted to the leaf of the base that it is for."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax._adapters import Axes
from lora_jax._flax_names import is_adaptable
from lora_jax._hub.module_kinds import KINDS, Embedding
from lora_jax._hub.module_plan import module_kinds
from lora_jax._hub.module_rules import unmatched_rows
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
    BASE_BIAS_SUFFIX,
    BASE_SUFFIX,
    LORA_BIAS_SUFFIX,
    MAGNITUDE_SUFFIX,
    PREFIX,
    ROWS_SUFFIX,
    parameter_stems,
    tensor_name,
)
from lora_jax._tree import Path, is_array, listed, path_name, unbox

SUFFIXES = (
    *KINDS["linear"].suffixes,
    *KINDS["embedding"].suffixes,
    MAGNITUDE_SUFFIX,
    LORA_BIAS_SUFFIX,
)


class LeafIndex(NamedTuple):
    """Maps PyTorch's names to paths of a tree."""

    named: dict[Path, ModuleNames]
    modules: dict[str, Path]  # the weight that each module is, or is a part of
    tensors: dict[str, tuple[str, Path]]  # the module and the leaf of each tensor
    tied: dict[str, str]  # a table's head by the table, and the table by the head


class SortedTensors(NamedTuple):
    """The tensors of a folder, by what they are for."""

    factors: dict[str, dict[str, np.ndarray]]  # of adapters: by module and suffix
    base_weights: dict[str, np.ndarray]  # of adapted modules: by module
    whole: dict[Path, dict[str, np.ndarray]]  # of leaves: by leaf and module
    rows: dict[str, np.ndarray]  # of tables: by module
    lora_biases: dict[str, np.ndarray]  # which B adds to biases: by module


def index_leaves(
    names: Names,
    leaves: dict[Path, Any],
    axes: Mapping[Path, Axes],
    kinds: Mapping[str, str] | None,
) -> LeafIndex:
    """Returns the index of all leaves that the map has names for.

    Raises:
      ValueError: If a pattern of the map matches nothing, or two weights have one name.
    """
    check_names(names, leaves)
    index, named_as = LeafIndex({}, {}, {}, {}), name_finder(names)
    for path, leaf in leaves.items():
        if is_array(unbox(leaf)) and (named := named_as(path)):
            index.named[path] = named
    kind_of = module_kinds(kinds, leaves)
    for path, named in index.named.items():
        shape, counted = unbox(leaves[path]).shape, named.stacked
        if len(shape) < counted:
            continue
        is_table = isinstance(kind_of[path], Embedding)
        is_vector = not is_adaptable(path, leaves[path])
        for _, modules in each_index(path, named, shape[:counted]):
            if is_vector or len(modules) == 1 or (is_table and len(modules) == 2):
                kept = {tensor_name(name, path): (name, path) for name in modules}
                index.tensors.update(kept)
            if is_table and len(modules) == 2:
                table, head = modules
                index.tied.update({table: head, head: table})
        if is_vector:
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


def sort_tensors(folder: PeftFolder, index: LeafIndex) -> SortedTensors:
    """Sorts the tensors of a folder.

    Raises:
      ValueError: If a tensor has no place in the tree, or none is of an adapter.
    """
    found = SortedTensors({}, {}, {}, {}, {})
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
        if suffix == LORA_BIAS_SUFFIX:
            found.lora_biases[name.removesuffix(suffix)] = x
        elif suffix is not None:
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
        if ".base_layer.out_proj" in name:
            raise ValueError(
                f"{folder.path} has an adapter of {name.split('.base_layer.')[0]!r}, "
                "an nn.MultiheadAttention, which PEFT stores as no other module: it "
                "cannot be imported. Merge it in PyTorch, merge_and_unload(), and read "
                "the weights with import_weights."
            )
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
        elif name.endswith(ROWS_SUFFIX):
            found.rows[name.removesuffix(ROWS_SUFFIX)] = x
        else:
            module, path = _leaf_of_tensor(folder, index, name)
            found.whole.setdefault(path, {})[module] = x
    return found


def check_complete(
    folder: PeftFolder,
    index: LeafIndex,
    found: SortedTensors,
    copied: Mapping[Path, Mapping[str, np.ndarray]],
) -> None:
    """Checks that every adapter is of a target, and every target has its tensors.

    The config may also name modules that the model does not have. With
    `ensure_weight_tying` the head of a table is adapted and saved with it.
    """
    config, rules = folder.config, folder.rules
    tied = index.tied if config.get("ensure_weight_tying") else {}
    any_linear = rules.has_all_linear

    def chosen(name: str) -> bool:
        names = [name, *([tied[name]] if name in tied else [])]
        return any_linear or any(
            rules.is_target(each) or rules.is_target_parameter(each) for each in names
        )

    if stray := [name for name in found.factors if not chosen(name)]:
        raise ValueError(
            f"{folder.path} has tensors of {listed(stray)}, which its config does not "
            "target: PEFT would ignore them."
        )
    wanted = [name for name in index.modules if not any_linear and chosen(name)]
    missing = [name for name in wanted if name not in found.factors]
    missing += [
        key
        for key, (name, path) in index.tensors.items()
        if rules.is_saved(name) and name not in copied.get(path, {})
    ]
    missing += [
        name + LORA_BIAS_SUFFIX
        for name, parts in found.factors.items()
        if config.get("lora_bias") and KINDS["linear"].suffixes[1] in parts
        if name not in found.lora_biases
    ]
    tables = {*found.rows, *(index.tied.get(name, name) for name in found.rows)}
    missing += unmatched_rows(config, tables)
    if missing:
        raise ValueError(
            f"{folder.path} lacks the tensors of {listed(missing)}, which its config "
            "targets. It may be truncated, or names may be the map of another model."
        )


def _parameters_by_stem(folder: PeftFolder, index: LeafIndex) -> dict[str, str]:
    """Returns the parameters that the config targets, by the start of their keys."""
    orders = {
        name: index.named[path].order
        for name, path in index.modules.items()
        if folder.rules.is_target_parameter(name)
    }
    return {stem: name for name, stem in parameter_stems(orders).items()}


def _leaf_of_tensor(folder: PeftFolder, index: LeafIndex, key: str) -> tuple[str, Path]:
    """Returns the module and the leaf of a tensor of the model itself."""
    name = key
    if name.endswith(BASE_BIAS_SUFFIX):  # of an adapted module
        name = name.removesuffix(BASE_BIAS_SUFFIX) + ".bias"
    if name not in index.tensors:
        raise ValueError(
            f"{folder.path}: the tensor {PREFIX + key!r} has no leaf in base. Close: "
            f"{similar_names(name, index.tensors)}. Add a name for it to names."
        )
    return index.tensors[name]
