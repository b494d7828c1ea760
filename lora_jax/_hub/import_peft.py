"""`import_peft`: the adapters of a Hugging Face PEFT folder, next to their weights."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax._adapters import Axes, copy_of, is_adapter
from lora_jax._detach import attached
from lora_jax._engine.dtypes import wider
from lora_jax._flax_names import is_floating
from lora_jax._hub.checkpoint import check_floating
from lora_jax._hub.fused_experts import with_separate_experts
from lora_jax._hub.module_adapters import factor_shapes, join_adapters
from lora_jax._hub.module_kinds import ModuleAdapter
from lora_jax._hub.module_plan import axes_by_path, check_inputs, plan_modules
from lora_jax._hub.modules import MappedLeaf, leaf_from_torch, tensor_shapes
from lora_jax._hub.names import Names
from lora_jax._hub.peft_folder import PeftFolder, read_folder
from lora_jax._hub.sort_tensors import check_complete, index_leaves, sort_tensors
from lora_jax._hub.tensor_keys import MAGNITUDE_SUFFIX, tensor_name
from lora_jax._hub.trained_leaves import check_base_weights, trained_tensors
from lora_jax._leaves import adapter_leaves, trained_copy
from lora_jax._processes import agreed, outline
from lora_jax._tree import Path, PyTree, flatten, listed, path_name, unbox
from lora_jax._write import check_finite


def import_peft(
    folder: str | os.PathLike[str],
    base: PyTree,
    names: Names,
    *,
    axes: Mapping[str, Axes] | None = None,
    kinds: Mapping[str, str] | None = None,
    dtype: Any = None,
) -> PyTree:
    """Adds the adapters of a PEFT folder next to the weights of a plain tree.

    With the result `lora(fn)` computes what the PyTorch model does with the folder, up
    to rounding. Every tensor must find its weight, and every module that the folder's
    config names must find its tensors.

    Args:
      folder: What PEFT's `save_pretrained`, or `export_peft`, wrote.
      base: The plain parameters, before `lorafy`. Adapters and copies take their boxes
        and shardings from it.
      names: As in `export_peft`.
      axes: As in `export_peft`: `{path: Axes}` for weights whose names in Flax do not
        show which dimensions are which, as in Flax GPT-2, which stores (outputs,
        inputs).
      kinds: As in `export_peft`.
      dtype: Of A and B. Default: float32 for a narrower weight, else the weight's.

    Returns:
      A new tree that shares every leaf of `base`, with the adapters next to them. What
      the folder trains in full becomes trained copies, in float32 for a narrower leaf,
      as `also=` in `lorafy` would have made and trained them: its `modules_to_save`,
      biases (`bias`, `lora_bias`), and tables of which it trains some rows
      (`trainable_token_indices`). Tables that it stores untrained are left out.

    Raises:
      FileNotFoundError: If a file is missing.
      ValueError: If the folder is no LoRA or DoRA (aLoRA, multi-head attention in one
        module and other methods are refused), is truncated, or does not fit `base` and
        `names` exactly; or another process has another folder, base or names.
      RuntimeError: If the import failed in another process, whose error it quotes.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj, os, tempfile
      >>> base = {"layer_0": {"query": {"kernel": jnp.ones((4, 3))}}}
      >>> folder = os.path.join(tempfile.mkdtemp(), "adapter")
      >>> names = {"layer_*/query": "model.layers.{}.self_attn.q_proj"}
      >>> lj.export_peft(folder, lj.lorafy(base, rank=2), names)
      >>> lj.import_peft(folder, base, names)["layer_0"]["query"]["lora_a"].shape
      (4, 2)
    """
    with agreed("import_peft") as same:
        source = read_folder(folder)
        leaves = _plain_leaves(base, dtype)
        given = axes_by_path(axes, leaves)
        index = index_leaves(names, leaves, given, kinds)
        named = {path_name(p): named_weight for p, named_weight in index.named.items()}
        same["folder"] = [source.config, source.tensors]
        source = with_separate_experts(source, index.modules)
        same["names"] = [named, axes and dict(axes), kinds and dict(kinds), str(dtype)]
        same["base"] = {path_name(p): outline(unbox(leaves[p])) for p in index.named}
    tensors = sort_tensors(source, index)
    whole = trained_tensors(source, index, tensors, leaves, given, kinds)
    used = {index.modules[name] for name in tensors.factors}
    adapted = [path for path in leaves if path in used]
    plan = plan_modules(leaves, index.named, adapted, whole, given, kinds)
    check_inputs(plan, leaves, given, bool(source.config.get("fan_in_fan_out")))
    check_base_weights(source, tensors, plan, leaves)
    adapters: dict[Path, dict[str, ModuleAdapter]] = {}
    for path, weight in plan.adapted.items():
        stored = wider(unbox(leaves[path]).dtype) if dtype is None else dtype
        adapters[path] = {
            name: _module_adapter(source, name, weight, tensors.factors[name], stored)
            for name in weight.modules
            if name in tensors.factors
        }
    copies = {
        path: _copied_values(source, leaf, leaves[path], whole[path])
        for path, leaf in plan.copied.items()
    }
    check_complete(source, index, tensors, whole)
    new = {copy_of(p).w: trained_copy(leaves[p], x) for p, x in copies.items()}
    for path, modules in adapters.items():
        joined = join_adapters(plan.adapted[path], modules)
        new |= adapter_leaves(path, leaves[path], joined)
    return attached(base, leaves, new)


def _plain_leaves(base: PyTree, dtype: Any) -> dict[Path, Any]:
    check_floating(dtype)
    leaves = flatten(base)
    if old := [path for path in leaves if is_adapter(path)]:
        raise ValueError(
            f"base has adapters already: {listed(old)}. Pass the plain parameters: "
            "import_peft(folder, strip(params), names)."
        )
    return leaves


def _module_adapter(
    folder: PeftFolder,
    name: str,
    weight: MappedLeaf,
    tensors: Mapping[str, np.ndarray],
    dtype: Any,
) -> ModuleAdapter:
    """Returns a module's adapter, after a check of its tensors' shapes."""
    kind, path = weight.modules[name].kind, path_name(weight.path)
    suffixes: tuple[str, ...] = kind.suffixes
    if folder.config.get("use_dora"):
        suffixes = (*suffixes, MAGNITUDE_SUFFIX)
        if not kind.has_dora:
            raise ValueError(
                f"{folder.path}: DoRA of {path!r}, {kind.name} {name!r}, cannot be "
                "imported: its update would have two norms."
            )
    if tensors.keys() != {*suffixes}:
        raise ValueError(
            f"{folder.path}: {name!r}, of the weight {path!r}, has the tensors "
            f"{sorted(tensors)}, and {list(suffixes)} are needed."
        )
    r, scale = folder.rules.rank_and_scale(name)
    inputs = weight.sizes(weight.axes.inputs)
    a_shape, b_shape = factor_shapes(weight, name, r)
    a, b = (np.broadcast_to(np.int8(0), shape) for shape in (a_shape, b_shape))
    wanted = [x.shape for x in kind.factors_to_torch(a, b, inputs)]
    wanted.append(kind.magnitude_shape(b_shape[-1], inputs))
    for suffix, shape in zip(suffixes, wanted, strict=False):  # the last is for DoRA
        found = tensors[suffix].shape
        if found != shape:
            hint = " It looks transposed." if found == shape[::-1] else ""
            raise ValueError(
                f"{folder.path}: {name + suffix!r} must be of shape {shape}, by rank "
                f"{r} of the config and the weight {path!r} {weight.shape}; found "
                f"{found}.{hint}"
            )
    a, b = (_cast(name, tensors[suffix], dtype) for suffix in kind.suffixes)
    a, b = kind.factors_from_torch(a, b, a_shape)
    magnitude = tensors.get(MAGNITUDE_SUFFIX)
    if magnitude is not None:
        magnitude = _cast(name, magnitude, np.float32).reshape(-1)
    return ModuleAdapter(a, b, scale, magnitude)


def _copied_values(
    folder: PeftFolder, leaf: MappedLeaf, old: Any, tensors: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Returns the values of a leaf that was trained in full, in the shape of base's."""
    path = path_name(leaf.path)
    if not is_floating(leaf.path, old):
        raise ValueError(
            f"{folder.path} holds {path!r}, which is {unbox(old).dtype} in base, and "
            "only floating leaves can be trained. Cast it in base."
        )
    for name, shape in tensor_shapes(leaf).items():
        if name not in tensors and leaf.is_tied:
            raise ValueError(
                f"{folder.path} trains {listed(sorted(tensors))} in full, and not "
                f"{name!r}: {path_name(leaf.path)!r} of base is both. Train the two as "
                "one, with ensure_weight_tying in PEFT, or give base a head of its own."
            )
        if name not in tensors:
            raise ValueError(
                f"{folder.path}: {path!r} of base is a stack. The folder has "
                f"{listed(sorted(tensors))} of it, and not {name!r}."
            )
        if tensors[name].shape != shape:
            raise ValueError(
                f"{folder.path}: {tensor_name(name, leaf.path)!r}, of shape "
                f"{tensors[name].shape}, must be {shape} for {path!r} of base, "
                f"{leaf.shape}. If its vocabulary was resized, pass the parameters of "
                "the model that was trained."
            )
    first, *others = tensors.values()
    if leaf.is_tied and not all(np.array_equal(x, first) for x in others):
        raise ValueError(
            f"{folder.path} has different {listed(sorted(tensors))}, and "
            f"{path_name(leaf.path)!r} of base is all of them. Give base a head of its "
            "own, with a copy of the embedding."
        )
    return leaf_from_torch(leaf, tensors)


def _cast(name: str, x: np.ndarray, dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # check_finite below reports it with the name
        x = x.astype(dtype)
    check_finite(f"The adapter of {name!r} in {x.dtype}", x)
    return x
