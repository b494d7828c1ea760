"""Adapters out to a folder that Hugging Face PEFT and vLLM load."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapters import (
    Axes,
    Copy,
    Ranked,
    adapter_of,
    axes_of_shapes,
    copy_of,
    find_adapters,
    of_copies,
    of_rank,
)
from lora_jax._hub.export_checks import VLLM_RANKS, check_loads, check_portable
from lora_jax._hub.peft_config import new_config
from lora_jax._hub.peft_folder import DTYPES, as_dtype, free_folder, write_folder
from lora_jax._hub.tensor_keys import MAGNITUDE, PREFIX, stems_of, suffixes, tensor_name
from lora_jax._hub.modules import (
    Module,
    leaf_to_torch,
    magnitude_shape,
    modules_of,
    to_torch,
    turned,
)
from lora_jax._hub.names import Names, Naming, check_names, naming_of, near
from lora_jax._hub.module_plan import (
    Plan,
    check_inputs,
    copied_modules,
    given_axes,
    orders_of,
    plan_of,
)
from lora_jax._processes import agreed, is_first, outline
from lora_jax._tree import Path, flatten, listed, path_name, unbox
from lora_jax._write import check_finite, check_savable, in_memory


def export_peft(
    folder: str | os.PathLike[str],
    params: Any,
    names: Names,
    *,
    axes: Mapping[str, Axes] | None = None,
    kinds: Mapping[str, str] | None = None,
    modules: Iterable[str] | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    fan_in_fan_out: bool = False,
    portable: bool = False,
    dtype: Any = None,
) -> None:
    """Writes the adapters as a folder that Hugging Face PEFT and vLLM load.

    The PyTorch model with the folder computes what `lora(fn)` does with `params`, up to
    rounding. Ranks and scales that differ become PEFT's `rank_pattern` and
    `alpha_pattern`, exactly. The folder appears whole or not at all. Where JAX runs as
    several processes, all of them call this, with a folder that all see; the first
    writes.

    Args:
      folder: Where. An old export is replaced; other files are never touched.
      params: A tree from `lorafy`, trained or not, of concrete arrays. Its trained
        copies, `also=` in `lorafy`, become PEFT's `modules_to_save`.
      names: Which modules of the PyTorch model the weights are: `{pattern: name}` or a
        function of a path. A pattern is as in `lorafy`, with stars alone and without a
        leading `params/`; the first that matches wins, and each must match a leaf. A
        name has a place `{}` for what each star stands for, and `{layer}` or `{expert}`
        for the number along a stacked dimension. Several names are the parts of a fused
        weight, equal along its outputs; `{name: outputs}` unequal ones; for a table,
        the lookup and its tied head. See `transformers_names`.
      axes: `{path: Axes}` from `find_axes`, for weights that are not stored as (inputs,
        outputs), unless `lorafy` was given them too.
      kinds: `{pattern: kind}` where Flax's names do not tell: "linear", "conv" for a
        kernel (window..., in, out), "embedding" for a table (vocabulary, features),
        "experts" where PyTorch has a stack in one parameter of three dimensions.
        Default: "embedding" for such a leaf, "conv" for the kernel of a module named
        conv, else "linear".
      modules: The PyTorch model's modules, `dict(model.named_modules())`, or the names
        of its tensors. Each name must be among them.
      base_model: The name or path of the base model, for the config.
      task_type: PEFT's, such as "CAUSAL_LM", for the config.
      fan_in_fan_out: Whether the PyTorch layers store (inputs, outputs), as GPT-2's do.
      portable: Write what everything loads, vLLM included: one rank that vLLM takes, by
        padding with zeros, and each scale multiplied into B. What cannot be so written
        is refused: convolutions, experts in one parameter, tables other than
        embed_tokens, trained copies, float16.
      dtype: Of the tensors: float32, bfloat16 or float16. Default: that of the leaves.

    Raises:
      ValueError: If a weight has no name or two have one, a name or pattern fits
        nothing, a leaf is abstract, not finite or of another dtype, the folder holds
        other files, or another process has other adapters or names. The folder is then
        as it was.
      OSError: If the folder cannot be written.
      RuntimeError: If it failed in another process, of which it tells.

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
        target = free_folder(folder) if is_first() else os.fspath(folder)
        dtype = _known_dtype(dtype)
        leaves = flatten(params)
        adapters = find_adapters(leaves)
        plan = _plan(leaves, adapters, names, axes, kinds)
        check_loads(plan, leaves, names, modules, task_type)
        check_inputs(plan, leaves, fan_in_fan_out)
        if portable:
            check_portable(plan, leaves, dtype)
        parts = [part for own in adapters.values() for part in own]
        for part in parts:
            check_savable(part, leaves[part])
        same["adapters"] = {path_name(p): outline(unbox(leaves[p])) for p in parts}
        same["names"] = {path_name(p): named for p, named in plan.namings.items()}
    leaves |= in_memory(leaves, parts)
    with agreed("export_peft"):
        for part in parts:
            check_finite(repr(path_name(part)), leaves[part])
        found = _modules(plan, leaves, of_rank(adapters), portable)
        tensors = _factors(plan, leaves, found, dtype) | _copies(plan, leaves, dtype)
        config = _config(
            found,
            orders_of(plan).keys() & found.keys(),
            base_model_name_or_path=base_model and str(base_model),
            fan_in_fan_out=fan_in_fan_out,
            modules_to_save=sorted(copied_modules(plan, leaves)) or None,
            task_type=task_type,
            use_dora=any(module.magnitude is not None for module in found.values()),
        )
        if is_first():
            write_folder(target, config, tensors)


def _known_dtype(dtype: Any) -> Any:
    if dtype is not None and jnp.dtype(dtype).name not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, found {dtype}.")
    return dtype


def _plan(
    leaves: dict[Path, Any],
    adapters: Mapping[Path, Ranked | Copy],
    names: Names,
    axes: Mapping[str, Axes] | None,
    kinds: Mapping[str, str] | None,
) -> Plan:
    """The plan of all that trains, which must have names."""
    check_names(names, leaves)
    namings = {path: _placed(names, path) for path in adapters}
    given = given_axes(axes, leaves)
    own, aligned = _own_axes(leaves, of_rank(adapters))
    for path, dims in own.items():  # raises if the two do not fit
        turned(path, unbox(leaves[path]).shape, dims, given.get(path, dims))
    return plan_of(
        leaves,
        namings,
        adapted=of_rank(adapters),
        copied=of_copies(adapters),
        axes=own | given,
        told={*given, *aligned},
        kinds=kinds,
    )


def _placed(names: Names, path: Path) -> Naming:
    naming = naming_of(names, path)
    if naming is None:
        known = [] if callable(names) else near(path_name(path), names)
        raise ValueError(
            f"names has no name for {path_name(path)!r}. Its patterns that come close: "
            f"{listed(known)}. Write names={{{path_name(path)!r}: 'module.of.torch'}}."
        )
    return naming


def _own_axes(
    leaves: dict[Path, Any], adapters: Mapping[Path, Ranked]
) -> tuple[dict[Path, Axes], set[Path]]:
    """The dimensions for which each adapter was made, and which are aligned."""
    own, aligned = {}, set()
    for path, adapter in adapters.items():
        w, a, *others = (unbox(leaves[p]).shape for p in (path, *adapter))
        own[path] = axes_of_shapes(w, a, *others)
        if len(a) == len(w) + 1:
            aligned.add(path)
    return own, aligned


def _modules(
    plan: Plan,
    leaves: dict[Path, Any],
    adapters: Mapping[Path, Ranked],
    portable: bool,
) -> dict[str, Module]:
    """The adapter of each module that has one: no rank is left to some."""
    found: dict[str, Module] = {}
    for path, weight in plan.adapted.items():
        parts = [leaves[part] for part in adapters[path]]
        found |= modules_of(weight, *parts, fold=portable)
    return _of_one_rank(found) if portable else found


def _of_one_rank(found: Mapping[str, Module]) -> dict[str, Module]:
    """The modules padded with zeros to the least rank that vLLM takes."""
    most = max(module.a.shape[-1] for module in found.values())
    r = next(n for n in VLLM_RANKS if n >= most)
    padded = {}
    for name, (a, b, scale, _) in found.items():
        more = r - a.shape[-1]
        padded[name] = Module(
            np.pad(a, ((0, 0), (0, more))), np.pad(b, ((0, more), (0, 0))), scale
        )
    return padded


def _factors(
    plan: Plan, leaves: dict[Path, Any], found: Mapping[str, Module], dtype: Any
) -> dict[str, np.ndarray]:
    """The tensors of the adapters, in the dtype of their leaves or in `dtype`."""
    orders = orders_of(plan)
    stems = stems_of({name: orders[name] for name in orders if name in found})
    tensors = {}
    for path, weight in plan.adapted.items():
        kept = unbox(leaves[adapter_of(path).a]).dtype if dtype is None else dtype
        for name, slot in weight.slots.items():
            if name not in found:
                continue
            both = to_torch(slot.kind, found[name])
            for suffix, x in zip(suffixes(slot.kind), both, strict=True):
                key = PREFIX + stems.get(name, name) + suffix
                tensors[key] = as_dtype(key, x, kept)
            if (m := found[name].magnitude) is not None:
                key = PREFIX + stems.get(name, name) + MAGNITUDE
                shape = magnitude_shape(slot.kind, m, found[name].a)
                tensors[key] = as_dtype(key, m.reshape(shape), dtype)
    return tensors


def _copies(plan: Plan, leaves: dict[Path, Any], dtype: Any) -> dict[str, np.ndarray]:
    """The tensors of the modules that are saved whole: the trained copies."""
    tensors = {}
    for path, layout in plan.copied.items():
        copy = copy_of(path).w
        own = leaf_to_torch(layout, leaves[copy])
        for name, x in own.items():
            key = PREFIX + tensor_name(name, path)
            tensors[key] = as_dtype(key, x, dtype)
    return tensors


def _config(
    found: Mapping[str, Module], parameters: Iterable[str], **settings: Any
) -> dict[str, Any]:
    ranks = {name: module.a.shape[-1] for name, module in found.items()}
    alphas = {name: _alpha(module.scale, ranks[name]) for name, module in found.items()}
    return new_config(ranks, alphas, parameters, **settings)


def _alpha(scale: float, r: int) -> float:
    """The shortest number that gives the scale, which is a float32."""
    alphas = (float(f"{scale * r:.{digits}g}") for digits in range(1, 18))
    return next(x for x in alphas if np.float32(x / r) == np.float32(scale))
