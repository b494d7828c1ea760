"""`export_peft`: adapters to a folder that Hugging Face PEFT and vLLM load."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapters import (
    Adapters,
    Axes,
    LowRank,
    copy_of,
    find_adapters,
    of_copies,
    of_rank,
)
from lora_jax._hub.export_checks import VLLM_RANKS, check_loads, check_portable
from lora_jax._hub.module_adapters import split_adapter
from lora_jax._hub.module_kinds import ModuleAdapter
from lora_jax._hub.module_plan import (
    ModulePlan,
    axes_by_path,
    check_inputs,
    plan_modules,
    trained_axes,
    trained_names,
)
from lora_jax._hub.modules import leaf_to_torch
from lora_jax._hub.names import Names
from lora_jax._hub.peft_config import new_config
from lora_jax._hub.peft_folder import (
    TORCH_DTYPES,
    adapter_folder,
    as_dtype,
    write_folder,
)
from lora_jax._hub.tensor_keys import (
    MAGNITUDE_SUFFIX,
    PREFIX,
    parameter_stems,
    tensor_name,
)
from lora_jax._processes import agreed, is_first, outline
from lora_jax._tree import Path, PyTree, flatten, path_name, unbox
from lora_jax._write import check_finite, check_savable, in_memory


def export_peft(
    folder: str | os.PathLike[str],
    params: PyTree,
    names: Names,
    *,
    axes: Mapping[str, Axes] | None = None,
    kinds: Mapping[str, str] | None = None,
    modules: Iterable[str] | None = None,
    base_model: str | os.PathLike[str] | None = None,
    task_type: str | None = None,
    fan_in_fan_out: bool = False,
    portable: bool = False,
    dtype: Any = None,
    overwrite: bool = False,
) -> None:
    """Writes the adapters as a folder that Hugging Face PEFT and vLLM load.

    The PyTorch model with the folder computes what `lora(fn)` does with `params`, up to
    rounding. Ranks and scales that differ become PEFT's `rank_pattern` and
    `alpha_pattern`, exactly. The folder is written completely or not at all: if the
    process is killed, `import_peft` and the next export find the old adapter or the new
    one. If JAX runs as several processes, all of them call this, with a folder that all
    of them see; the first one writes.

    Args:
      folder: The folder to write. An old export is replaced, and files of other names,
        such as a tokenizer, stay. A folder with a model is refused.
      params: A tree from `lorafy`, trained or not, of concrete arrays. Its trained
        copies, `also=` in `lorafy`, become PEFT's `modules_to_save`.
      names: The modules of the PyTorch model that the weights are: `{pattern: name}` or
        a function of a path. A pattern is as in `lorafy`, with `*` as the only special
        character and without a leading `params/`; the first that matches wins, and each
        must match a leaf. A name has a place `{}` for the text of each star, and
        `{layer}` or `{expert}` for the number along a stacked dimension. Several names
        are the parts of a fused weight, equal along its outputs, and `{name: outputs}`
        are unequal ones. Two names of an embedding are its own and that of its tied
        head. See `transformers_names` and `find_names`.
      axes: `{path: Axes}` from `find_axes`, for weights that are not stored as (inputs,
        outputs), unless `lorafy` was given them too.
      kinds: `{pattern: kind}` for leaves whose names in Flax do not show it: "linear",
        "conv" for a kernel (window..., in, out), "embedding" for a table (rows,
        features), "experts" if PyTorch has a stack in one parameter of three
        dimensions. Default: "embedding" for a leaf of that name, "conv" for the kernel
        of a module named conv, else "linear".
      modules: The PyTorch model's modules, `dict(model.named_modules())`, or the names
        of its tensors. Each name must be among them.
      base_model: The name or path of the base model, for the config.
      task_type: PEFT's, such as "CAUSAL_LM", for the config.
      fan_in_fan_out: Whether the PyTorch layers store (inputs, outputs), as GPT-2's do.
      portable: Write what every program loads, vLLM included: one rank that vLLM
        supports, by padding with zeros, and each scale multiplied into B. An error if
        that is not possible: for convolutions, experts in one parameter, embeddings
        other than embed_tokens, DoRA, trained copies and float16.
      dtype: Of the tensors: float32, bfloat16 or float16. Default: that of the leaves.
      overwrite: Whether to replace an adapter in the folder that another program wrote.

    Raises:
      ValueError: If a weight has no name or two have the same one, a name or pattern
        matches nothing, a leaf is abstract, not finite or of another dtype, the folder
        holds a model or an adapter of another program, or another process has other
        adapters or names. The folder stays as it was.
      OSError: If the folder cannot be written.
      RuntimeError: If the export failed in another process, whose error it quotes.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj, os, tempfile
      >>> params = {"layer_0": {"query": {"kernel": jnp.ones((4, 3))}}}
      >>> folder = os.path.join(tempfile.mkdtemp(), "adapter")
      >>> names = {"layer_*/query": "model.layers.{}.self_attn.q_proj"}
      >>> lj.export_peft(folder, lj.lorafy(params, rank=2), names)
      >>> sorted(os.listdir(folder))
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    with agreed("export_peft") as same:
        target = adapter_folder(folder, overwrite) if is_first() else ""
        if dtype is not None and jnp.dtype(dtype).name not in TORCH_DTYPES:
            raise ValueError(
                f"dtype is one of {', '.join(TORCH_DTYPES)}, found {dtype}."
            )
        leaves = flatten(params)
        adapters = find_adapters(leaves)
        plan = _export_plan(leaves, adapters, names, axes, kinds)
        check_loads(plan, leaves, names, modules, task_type)
        known = {p for p, adapter in of_rank(adapters).items() if adapter.aligned}
        known |= axes_by_path(axes, leaves).keys()
        check_inputs(plan, leaves, known, fan_in_fan_out)
        if portable:
            check_portable(plan, leaves, dtype)
        parts = [part for adapter in adapters.values() for part in adapter]
        for part in parts:
            check_savable(part, leaves[part])
        same["adapters"] = {path_name(p): outline(unbox(leaves[p])) for p in parts}
        same["names"] = {path_name(p): named for p, named in plan.named.items()}
    leaves |= in_memory(leaves, parts)
    with agreed("export_peft"):
        for part in parts:
            check_finite(repr(path_name(part)), leaves[part])
        arrays = {p: x.map(leaves.__getitem__) for p, x in of_rank(adapters).items()}
        found: dict[str, ModuleAdapter] = {}
        for path, weight in plan.adapted.items():
            found |= split_adapter(weight, arrays[path], fold=portable)
        if portable:
            found = _pad_ranks(found)
        tensors = _factor_tensors(plan, arrays, found, dtype)
        tensors |= _copy_tensors(plan, leaves, dtype)
        ranks = {name: module.a.shape[-1] for name, module in found.items()}
        config = new_config(
            ranks,
            {name: _alpha(module.scale, ranks[name]) for name, module in found.items()},
            plan.parameter_orders.keys() & found.keys(),
            base_model_name_or_path=base_model and str(base_model),
            fan_in_fan_out=fan_in_fan_out,
            modules_to_save=sorted(plan.copied_modules) or None,
            task_type=task_type,
            use_dora=any(module.magnitude is not None for module in found.values()),
        )
        if is_first():
            write_folder(target, config, tensors)


def _export_plan(
    leaves: dict[Path, Any],
    adapters: Adapters,
    names: Names,
    axes: Mapping[str, Axes] | None,
    kinds: Mapping[str, str] | None,
) -> ModulePlan:
    """Returns the plan of all adapted and copied leaves, which must have names."""
    named = trained_names(leaves, adapters, names)
    weights = of_rank(adapters)
    known = trained_axes(leaves, adapters, axes)
    return plan_modules(leaves, named, weights, of_copies(adapters), known, kinds)


def _pad_ranks(modules: Mapping[str, ModuleAdapter]) -> dict[str, ModuleAdapter]:
    """Returns the adapters padded with zeros to the least rank that vLLM supports."""
    most = max(module.a.shape[-1] for module in modules.values())
    r = next(n for n in VLLM_RANKS if n >= most)
    padded = {}
    for name, (a, b, scale, _) in modules.items():
        more = (0, r - a.shape[-1])
        a, b = np.pad(a, ((0, 0), more)), np.pad(b, (more, (0, 0)))
        padded[name] = ModuleAdapter(a, b, scale)
    return padded


def _factor_tensors(
    plan: ModulePlan,
    adapters: Mapping[Path, LowRank[np.ndarray]],
    modules: Mapping[str, ModuleAdapter],
    dtype: Any,
) -> dict[str, np.ndarray]:
    """Returns the tensors of the adapters, in `dtype` or in that of their leaves."""
    orders = plan.parameter_orders
    stems = parameter_stems({name: orders[name] for name in orders if name in modules})
    tensors = {}
    for path, weight in plan.adapted.items():
        inputs = weight.sizes(weight.axes.inputs)
        stored = adapters[path].a.dtype if dtype is None else dtype
        for name, (kind, *_) in weight.modules.items():
            if name not in modules:
                continue
            a, b, _, m = modules[name]
            key = PREFIX + stems.get(name, name)
            both = kind.factors_to_torch(a, b, inputs)
            for suffix, x in zip(kind.suffixes, both, strict=True):
                tensors[key + suffix] = as_dtype(key + suffix, x, stored)
            if m is not None:
                m = m.reshape(kind.magnitude_shape(len(m), inputs))
                key += MAGNITUDE_SUFFIX
                tensors[key] = as_dtype(key, m, dtype)
    return tensors


def _copy_tensors(
    plan: ModulePlan, leaves: dict[Path, Any], dtype: Any
) -> dict[str, np.ndarray]:
    """Returns the tensors of the leaves that are trained in full."""
    tensors = {}
    for path, leaf in plan.copied.items():
        for name, x in leaf_to_torch(leaf, leaves[copy_of(path).w]).items():
            key = PREFIX + tensor_name(name, path)
            tensors[key] = as_dtype(key, x, dtype)
    return tensors


def _alpha(scale: float, r: int) -> float:
    """Returns the shortest number whose quotient by r is the scale, a float32."""
    alphas = (float(f"{scale * r:.{digits}g}") for digits in range(1, 18))
    return next(x for x in alphas if np.float32(x / r) == np.float32(scale))
