"""The tensors of a PEFT folder, each sorted to the leaf of base that it is for."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax._adapters import Axes
from lora_jax._engine.quantized import dequantize
from lora_jax._flax_names import is_adaptable
from lora_jax._peft.config import saves, targets, targets_parameter, unfilled
from lora_jax._peft.layouts import (
    LINEAR,
    MAGNITUDE,
    PREFIX,
    TABLE,
    stems_of,
    tensor_name,
)
from lora_jax._peft.modules import leaf_to_torch, tensor_shapes
from lora_jax._peft.names import Names, Naming, check_names, naming_of, near, numbered
from lora_jax._peft.plan import Plan
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

ENDS = (*LINEAR, *TABLE, MAGNITUDE)
ORIGINAL = ".base_layer.weight"  # ends the key of a module's own weight


class Index(NamedTuple):
    """Where in a tree what PyTorch calls by a name is."""

    namings: dict[Path, Naming]  # of the leaves of which the map speaks
    modules: dict[str, Path]  # the weight that each module is, or is a part of
    tensors: dict[str, tuple[str, Path]]  # the module and the leaf of each tensor


class Parts(NamedTuple):
    """The tensors of a folder."""

    factors: dict[str, dict[str, np.ndarray]]  # of adapters: by module and suffix
    originals: dict[str, np.ndarray]  # weights beside their adapters: by module
    copies: dict[Path, dict[str, np.ndarray]]  # saved whole: by leaf and module


def index_of(names: Names, leaves: dict[Path, Any], axes: Mapping[Path, Axes]) -> Index:
    """The index of all leaves of which the map speaks.

    Raises:
      ValueError: If a pattern of the map fits nothing, or two weights have one name.
    """
    check_names(names, leaves)
    arrays = (path for path, x in leaves.items() if is_array(unbox(x)))
    found = {path: naming_of(names, path) for path in arrays}
    namings = {path: naming for path, naming in found.items() if naming is not None}
    modules: dict[str, Path] = {}
    for name, path in _each_module(namings, leaves, axes):
        if name in modules:
            raise ValueError(
                f"{path_name(modules[name])!r} and {path_name(path)!r} have one "
                f"name, {name!r}. Correct names: each weight has its own."
            )
        modules[name] = path
    return Index(namings, modules, _leaf_of_each_tensor(namings, leaves))


def parts_of(
    source: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    index: Index,
    leaves: dict[Path, Any],
) -> Parts:
    """The tensors of the folder `source`, without tables that nothing trained.

    Raises:
      ValueError: If a tensor has no place in the tree, or none is of an adapter.
    """
    factors, others = _parted(source, tensors, _module_of_each_stem(config, index))
    if stray := [name for name in factors if name not in index.modules]:
        key = PREFIX + stray[0] + next(iter(factors[stray[0]]))
        raise ValueError(
            f"{source}: the tensor {key!r} is of the module {stray[0]!r}, which "
            f"names gives to no weight. Close: {listed(near(stray[0], index.modules))}."
        )
    if not factors:
        raise ValueError(f"{source} holds no adapter.")
    parts = Parts(factors, {}, {})
    for key, x in others.items():
        if key.endswith(ORIGINAL):
            parts.originals[key.removesuffix(ORIGINAL)] = x
        elif not _is_idle_table(config, index, leaves, key, x):
            name, path = _saved(source, config, index, key)
            parts.copies.setdefault(path, {})[name] = x
    return parts


def check_complete(
    source: str, config: Mapping[str, Any], index: Index, parts: Parts
) -> None:
    """Every adapter is of a target, and every target has its tensors."""
    chosen = lambda name: targets(config, name) or targets_parameter(config, name)
    if stray := [name for name in parts.factors if not chosen(name)]:
        raise ValueError(
            f"{source} has tensors of {listed(stray)}, which its config does not "
            "target: PEFT would ignore them."
        )
    wanted = [name for name in index.modules if chosen(name)]
    missing = [name for name in wanted if name not in parts.factors]
    missing += [
        key
        for key, (name, path) in index.tensors.items()
        if saves(config, name) and name not in parts.copies.get(path, {})
    ]
    # An entry may speak of nothing but modules that another one excludes.
    excluded = index.modules.keys() - {*wanted}
    kept = {name for own in parts.copies.values() for name in own}
    missing += unfilled(config, {*parts.factors, *kept, *excluded})
    if missing:
        raise ValueError(
            f"{source} lacks the tensors of {listed(missing)}, which its config "
            "targets. It may be truncated, or names may speak of other modules."
        )


def check_originals(
    source: str,
    originals: Mapping[str, np.ndarray],
    plan: Plan,
    leaves: dict[Path, Any],
) -> None:
    """The tables that PEFT saves beside their adapters are base's very own."""
    paths = {
        name: path for path, weight in plan.adapted.items() for name in weight.slots
    }
    for name, x in originals.items():
        same = False
        if name in paths:
            w, weight = unbox(leaves[paths[name]]), plan.adapted[paths[name]]
            same = x.shape == tensor_shapes(weight, w.shape)[name]
            if same and not is_abstract(w):
                values = np.asarray(gathered(dequantize(w)))
                same = _same(w, leaf_to_torch(weight, values)[name], x)
        if not same:
            key = PREFIX + name + ORIGINAL
            raise ValueError(
                f"{source}: the tensor {key!r} is not the weight of base, but "
                "that of a model which was resized or trained. Pass those parameters."
            )


def _each_module(
    namings: Mapping[Path, Naming], leaves: dict[Path, Any], axes: Mapping[Path, Axes]
) -> Iterator[tuple[str, Path]]:
    """Every module that can have an adapter, and its weight."""
    for path, naming in namings.items():
        shape = unbox(leaves[path]).shape
        if not is_adaptable(path, leaves[path]) or len(shape) < naming.stacked:
            continue
        stacked = axes[path].batch if path in axes else range(len(shape))
        counts = [shape[d] for d in stacked[: naming.stacked]]
        for _, modules in numbered(naming, counts):
            yield from ((name, path) for name in modules)


def _leaf_of_each_tensor(
    namings: Mapping[Path, Naming], leaves: dict[Path, Any]
) -> dict[str, tuple[str, Path]]:
    """The module and the leaf of each tensor of PyTorch's that is in one leaf."""
    tensors = {}
    for path, naming in namings.items():
        counts = unbox(leaves[path]).shape[: naming.stacked]
        if len(counts) < naming.stacked:
            continue
        for _, (name, *more) in numbered(naming, counts):
            if not more:
                tensors[tensor_name(name, path)] = name, path
    return tensors


def _module_of_each_stem(config: Mapping[str, Any], index: Index) -> dict[str, str]:
    """The bare parameters that the config names, by the start of their keys."""
    orders = {
        name: index.namings[path].order
        for name, path in index.modules.items()
        if targets_parameter(config, name)
    }
    return {stem: name for name, stem in stems_of(orders).items()}


def _parted(
    source: str, tensors: Mapping[str, np.ndarray], by_stem: Mapping[str, str]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """The tensors of each module's adapter, and all others, by their PyTorch names."""
    factors: dict[str, dict[str, np.ndarray]] = {}
    others = {}
    for key, x in tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            raise ValueError(
                f"{source}: the tensor {key!r} does not begin with {PREFIX!r}: "
                "PEFT would ignore it."
            )
        suffix = next((end for end in ENDS if name.endswith(end)), None)
        if suffix is not None:
            stem = name.removesuffix(suffix)
            factors.setdefault(by_stem.get(stem, stem), {})[suffix] = x
        elif ".lora_" in name.lower():
            raise ValueError(
                f"{source}: the tensor {key!r} is no part of a plain LoRA. Only "
                f"{', '.join(end[1:] for end in ENDS)} are."
            )
        else:
            others[name] = x
    return factors, others


def _is_idle_table(
    config: Mapping[str, Any],
    index: Index,
    leaves: dict[Path, Any],
    key: str,
    x: np.ndarray,
) -> bool:
    """Whether PEFT saved a table that nothing trained: base's very own."""
    name, path = index.tensors.get(key, ("", ()))
    if not path or leaf_name(path) != "embedding" or saves(config, name):
        return False
    w = unbox(leaves[path])
    if w.shape != x.shape or is_abstract(w):
        return w.shape == x.shape
    return _same(w, np.asarray(gathered(dequantize(w))), x)


def _same(leaf: Any, w: np.ndarray, x: np.ndarray) -> bool:
    """Whether a tensor is base's array, which may be of another dtype."""
    if is_quantized(leaf):
        return not differ(sample(w), sample(x))
    return np.array_equal(w.astype(x.dtype), x) or np.array_equal(w, x.astype(w.dtype))


def _saved(
    source: str, config: Mapping[str, Any], index: Index, key: str
) -> tuple[str, Path]:
    """The module and the leaf of a tensor that the config says is saved whole."""
    if key not in index.tensors:
        raise ValueError(
            f"{source}: the tensor {PREFIX + key!r} finds no leaf of base. Close: "
            f"{listed(near(key, index.tensors))}. Add a name for it to names."
        )
    name, path = index.tensors[key]
    if not saves(config, name):
        raise ValueError(
            f"{source}: the tensor {PREFIX + key!r} is of no module that the "
            "config's modules_to_save names."
        )
    return name, path
