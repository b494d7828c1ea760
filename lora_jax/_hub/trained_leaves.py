"""The leaves that a PEFT folder trains in full, and the tensors of their new values.

PEFT has four ways to store them: whole modules (`modules_to_save`), biases (`bias`), a
few rows of a table (`trainable_token_indices`), and a bias of B that is added to the
module's own (`lora_bias`). It can also store a model's tables without training them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax._adapters import Axes
from lora_jax._engine.quantized import dequantize
from lora_jax._hub.module_kinds import Embedding
from lora_jax._hub.module_plan import ModulePlan, map_leaf, module_kinds
from lora_jax._hub.modules import MappedLeaf, leaf_to_torch, tensor_shapes
from lora_jax._hub.peft_folder import PeftFolder
from lora_jax._hub.sort_tensors import LeafIndex, SortedTensors
from lora_jax._hub.tensor_keys import (
    BASE_SUFFIX,
    LORA_BIAS_SUFFIX,
    PREFIX,
    ROWS_SUFFIX,
    tensor_name,
)
from lora_jax._processes import gathered
from lora_jax._sample import differ, sample
from lora_jax._tree import (
    Path,
    is_abstract,
    is_quantized,
    leaf_name,
    path_name,
    unbox,
)

Tensors = dict[str, np.ndarray]


def trained_tensors(
    folder: PeftFolder,
    index: LeafIndex,
    found: SortedTensors,
    leaves: dict[Path, Any],
    axes: Mapping[Path, Axes],
    kinds: Mapping[str, str] | None,
) -> dict[Path, Tensors]:
    """Returns the tensors of each leaf that is trained in full, by its modules.

    Tables that are stored and equal the base's are left out.

    Raises:
      ValueError: If a tensor is not trained by the config and not that of the base, or
        no leaf can hold what is trained.
    """
    kind_of = module_kinds(kinds, leaves)

    def mapped(path: Path) -> MappedLeaf:
        given = axes.get(path)
        return map_leaf(path, leaves, index.named[path], given, kind_of[path])

    tables = {
        unbox(leaves[path]).shape[-2:]
        for path in index.named
        if isinstance(kind_of[path], Embedding)
    }
    new = {}
    for path, tensors in found.whole.items():
        w = unbox(leaves[path])
        is_trained = any(_is_trained(folder, index, n, path) for n in tensors)
        if is_trained or not _is_of_base(mapped(path), leaves[path], tensors):
            shape = w.shape[-2:]
            if not is_trained and not {shape, shape[::-1]} & tables:
                key = PREFIX + tensor_name(next(iter(tensors)), path)
                raise ValueError(
                    f"{folder.path}: the tensor {key!r} is of no module in the "
                    "config's modules_to_save."
                )
            if is_quantized(w):
                raise ValueError(
                    f"{folder.path} has values of its own for {path_name(path)!r}, "
                    "which is quantized in base. Leave it out in quantize."
                )
            new[path] = tensors
    for module, x in found.rows.items():
        path = _leaf_of(folder, index, module, "weight", module + ROWS_SUFFIX)
        new[path] = _with_rows(folder, module, mapped(path), leaves[path], x)
    for module, x in found.lora_biases.items():
        if not folder.config.get("lora_bias"):
            raise ValueError(
                f"{folder.path} has the tensor {PREFIX + module + LORA_BIAS_SUFFIX!r}, "
                "and its config has no lora_bias: PEFT would ignore it."
            )
        path = _leaf_of(folder, index, module, "bias", module + LORA_BIAS_SUFFIX)
        old = new.get(path, {})
        if path not in new or module not in old:
            old = _base_tensors(folder, mapped(path), leaves[path]) | old
        _, scale = folder.rules.rank_and_scale(module)
        wide = np.result_type(x.dtype, np.float32)
        _check_shape(folder, module + LORA_BIAS_SUFFIX, x, old[module].shape)
        total = old[module].astype(wide) + np.asarray(scale, wide) * x.astype(wide)
        new[path] = old | {module: total}
    return new


def check_base_weights(
    folder: PeftFolder, found: SortedTensors, plan: ModulePlan, leaves: dict[Path, Any]
) -> None:
    """Checks that embeddings that PEFT saved with their adapters are the base's own."""
    owner = {name: leaf for leaf in plan.adapted.values() for name in leaf.modules}
    for name, x in found.base_weights.items():
        leaf = owner.get(name)
        if leaf is None or not _is_of_base(leaf, leaves[leaf.path], {name: x}):
            raise ValueError(
                f"{folder.path}: the tensor {PREFIX + name + BASE_SUFFIX!r} is not the "
                "weight of base. Its model was resized or trained: pass the parameters "
                "of that one."
            )


def _is_of_base(leaf: MappedLeaf, w: Any, tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether tensors have a leaf's values, or its shape if that is abstract.

    The leaf may have another dtype.
    """
    shapes = tensor_shapes(leaf)
    if any(x.shape != shapes.get(name) for name, x in tensors.items()):
        return False
    if is_abstract(unbox(w)):
        return True
    own = leaf_to_torch(leaf, np.asarray(gathered(dequantize(unbox(w)))))
    near = _is_near if is_quantized(unbox(w)) else _is_equal
    return all(near(own[name], x) for name, x in tensors.items())


def _is_near(held: np.ndarray, x: np.ndarray) -> bool:
    ours, theirs = sample(held), sample(x)
    return ours is not None and theirs is not None and not differ(ours, theirs)


def _is_equal(held: np.ndarray, x: np.ndarray) -> bool:
    same = np.array_equal(held.astype(x.dtype), x)
    return same or np.array_equal(held, x.astype(held.dtype))


def _is_trained(folder: PeftFolder, index: LeafIndex, module: str, path: Path) -> bool:
    """Whether the config trains the tensor of a module in full."""
    config = folder.config
    if config.get("bias", "none") != "none" and leaf_name(path) == "bias":
        return True
    tied = index.tied.get(module) if config.get("ensure_weight_tying") else None
    return any(folder.rules.is_saved(name) for name in (module, tied) if name)


def _leaf_of(
    folder: PeftFolder, index: LeafIndex, module: str, tensor: str, key: str
) -> Path:
    """Returns the leaf that is a tensor of a module."""
    if (held := index.tensors.get(f"{module}.{tensor}")) is None:
        raise ValueError(
            f"{folder.path}: the tensor {PREFIX + key!r} changes the {tensor} of "
            f"{module!r}, and names gives that to no leaf of base. Add a name for it; "
            f"if base has no such {tensor}, it cannot hold what the folder has."
        )
    return held[1]


def _with_rows(
    folder: PeftFolder, module: str, leaf: MappedLeaf, w: Any, x: np.ndarray
) -> Tensors:
    """Returns the tensors of a table, with the rows that were trained in their places.

    PEFT also uses the rows in a head that is tied to the table.
    """
    rows = folder.rules.trained_rows(module)
    key = PREFIX + module + ROWS_SUFFIX
    if rows is None:
        raise ValueError(
            f"{folder.path} has the tensor {key!r}, and its config no "
            f"trainable_token_indices of {module!r}."
        )
    tensors = _base_tensors(folder, leaf, w)
    count, width = tensors[module].shape
    _check_shape(folder, module + ROWS_SUFFIX, x, (len(rows), width))
    if wrong := [row for row in rows if not 0 <= row < count]:
        raise ValueError(
            f"{folder.path}: trainable_token_indices of {module!r} has {wrong[0]}, and "
            f"{path_name(leaf.path)!r} has {count} rows. Pass the parameters of the "
            "model that was trained, with its vocabulary."
        )
    for name, table in tensors.items():
        table = table.astype(np.result_type(x.dtype, table.dtype))
        table[rows] = x
        tensors[name] = table
    return tensors


def _base_tensors(folder: PeftFolder, leaf: MappedLeaf, w: Any) -> Tensors:
    """Returns the tensors of a leaf of the base, of which a part is trained."""
    name = path_name(leaf.path)
    for problem, advice in (
        (is_abstract(unbox(w)) and "abstract", "Pass its values"),
        (is_quantized(unbox(w)) and "quantized", "Leave it out in quantize"),
    ):
        if problem:
            raise ValueError(
                f"{folder.path} changes a part of {name!r}, which is {problem} in base."
                f" {advice}."
            )
    own = leaf_to_torch(leaf, np.asarray(gathered(unbox(w))))
    return {module: np.array(x) for module, x in own.items()}


def _check_shape(
    folder: PeftFolder, key: str, x: np.ndarray, shape: tuple[int, ...]
) -> None:
    if x.shape != shape:
        raise ValueError(
            f"{folder.path}: the tensor {PREFIX + key!r} is of shape {x.shape}, and "
            f"{shape} is needed."
        )
