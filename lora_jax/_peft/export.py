"""Adapters out to a folder that Hugging Face PEFT and vLLM load."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapters import Adapter, Axes, axes_of_shapes, find_adapters, is_adapter
from lora_jax._peft.config import new_config, within
from lora_jax._peft.folder import DTYPES, as_dtype, free_folder, write_folder
from lora_jax._peft.layouts import (
    PREFIX,
    check_inputs,
    given_axes,
    kinds_of,
    layouts_of,
    stems_of,
    suffixes,
    tensor_name,
)
from lora_jax._peft.modules import (
    Module,
    Weight,
    leaf_to_torch,
    modules_of,
    tensor_shapes,
    to_torch,
    turned,
    weight_of,
)
from lora_jax._peft.names import Names, Naming, check_names, naming_of, near
from lora_jax._save import concrete
from lora_jax._split import trainable
from lora_jax._targets import Patterns
from lora_jax._tree import Path, flatten, is_array, listed, path_name, unbox

# https://github.com/vllm-project/vllm/blob/main/vllm/config/lora.py
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# What PEFT adds to modules_to_save, for a model of such a task.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def export_peft(
    folder: str | os.PathLike[str],
    params: Any,
    names: Names,
    *,
    also: Patterns = (),
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
    `alpha_pattern`, exactly. The folder appears whole or not at all.

    Args:
      folder: Where. An old export is replaced; other files are never touched.
      params: A tree from `lorafy`, trained or not, of concrete arrays.
      names: Which modules of the PyTorch model the weights are: `{pattern: name}` or a
        function of a path. A pattern is as in `lorafy`, with stars alone and without a
        leading `params/`; the first that matches wins, and each must match a leaf. A
        name has a place `{}` for what each star stands for, and `{layer}` or `{expert}`
        for the number along a stacked dimension. Several names are the parts of a fused
        weight, equal along its outputs; `{name: outputs}` unequal ones; for a table,
        the lookup and its tied head. See `transformers_names`.
      also: Patterns of further trained leaves, as in `split`. They become PEFT's
        `modules_to_save`.
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
        embed_tokens, `also`, float16.
      dtype: Of the tensors: float32, bfloat16 or float16. Default: that of the leaves.

    Raises:
      ValueError: If a weight has no name or two have one, a name or pattern fits
        nothing, a leaf is abstract, not finite or of another dtype, or the folder holds
        other files. The folder is then as it was.
      OSError: If the folder cannot be written.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj, os, tempfile
      >>> params = {"layer_0": {"query": {"kernel": jnp.ones((4, 3))}}}
      >>> folder = os.path.join(tempfile.mkdtemp(), "adapter")
      >>> names = {"layer_*/query": "model.layers.{}.self_attn.q_proj"}
      >>> lj.export_peft(folder, lj.lorafy(params, rank=2), names)
      >>> sorted(os.listdir(folder))
      ['adapter_config.json', 'adapter_model.safetensors']
    """
    target = free_folder(folder)
    if dtype is not None and jnp.dtype(dtype).name not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}, found {dtype}.")
    leaves = flatten(params)
    adapters = find_adapters(leaves)
    factors = {part for adapter in adapters.values() for part in adapter}
    whole = [path for path in leaves if path in trainable(leaves, also) - factors]
    check_names(names, leaves)
    namings = {path: _placed(names, path) for path in (*adapters, *whole)}
    given = given_axes(axes, leaves)
    shapes = {p: [unbox(leaves[part]).shape for part in adapters[p]] for p in adapters}
    kind_of = kinds_of(kinds, namings)
    weights: dict[Path, Weight] = {}
    for path in adapters:
        w = unbox(leaves[path])
        own = axes_of_shapes(w.shape, *shapes[path])
        dims = given.get(path, own)
        turned(path, w.shape, own, dims)  # raises if the two do not fit
        weights[path] = weight_of(path, leaves, namings[path], dims, kind_of[path])
    rest = {path: namings[path] for path in whole}
    known_axes = given | {path: weight.axes for path, weight in weights.items()}
    layouts = weights | layouts_of(rest, leaves, known_axes, kind_of, kinds)
    saved = _check_unique(layouts, adapters, leaves, modules)
    _check_saved(saved, {n for w in weights.values() for n in w.slots}, task_type)
    _check_siblings(whole, namings, layouts, leaves)
    _check_below(saved, whole, names, leaves)
    orders = {
        name: namings[path].order
        for path, weight in weights.items()
        for name, slot in weight.slots.items()
        if slot.kind == "experts"
    }
    stems_of(orders)  # raises if the parameters of one module are in no order
    aligned = {p for p in weights if len(shapes[p][0]) == len(weights[p].shape) + 1}
    check_inputs(weights, {*given, *aligned}, leaves, fan_in_fan_out)
    if portable:
        _check_portable(weights, whole, dtype, adapters, leaves)

    found: dict[str, Module] = {}
    kept: dict[str, Any] = {}  # the dtype of each
    for path, weight in weights.items():
        parts = [concrete(part, leaves[part]) for part in adapters[path]]
        own = modules_of(weight, *parts, fold=portable)
        found |= own
        kept |= dict.fromkeys(own, parts[0].dtype if dtype is None else dtype)
    if portable:
        found = _of_one_rank(found)
    slots = {name: s for weight in weights.values() for name, s in weight.slots.items()}
    stems = stems_of({name: orders[name] for name in orders if name in found})
    tensors = {}
    for name, module in found.items():
        kind = slots[name].kind
        for suffix, x in zip(suffixes(kind), to_torch(kind, module), strict=True):
            key = PREFIX + stems.get(name, name) + suffix
            tensors[key] = as_dtype(key, x, kept[name])
    for path in whole:
        own = leaf_to_torch(layouts[path], concrete(path, leaves[path]))
        for name, x in own.items():
            key = PREFIX + tensor_name(name, path)
            tensors[key] = as_dtype(key, x, dtype)
    ranks = {name: module.a.shape[-1] for name, module in found.items()}
    config = new_config(
        ranks,
        {name: _alpha(module.scale, ranks[name]) for name, module in found.items()},
        orders.keys() & found.keys(),
        base_model_name_or_path=base_model and str(base_model),
        fan_in_fan_out=fan_in_fan_out,
        modules_to_save=sorted(saved) or None,
        task_type=task_type,
    )
    write_folder(target, config, tensors)


def _placed(names: Names, path: Path) -> Naming:
    naming = naming_of(names, path)
    if naming is None:
        known = [] if callable(names) else near(path_name(path), names)
        raise ValueError(
            f"names has no name for {path_name(path)!r}. Its patterns that come close: "
            f"{listed(known)}. Write names={{{path_name(path)!r}: 'module.of.torch'}}."
        )
    return naming


def _check_unique(
    layouts: Mapping[Path, Weight | Naming],
    adapters: Mapping[Path, Any],
    leaves: dict[Path, Any],
    modules: Iterable[str] | None,
) -> set[str]:
    """Each module has one adapter or is saved whole; returns those that are."""
    if isinstance(modules, str):
        raise TypeError("modules is a list of names, or a mapping with them as keys.")
    known = None if modules is None else {*modules}
    if known is not None:
        known |= {name.rpartition(".")[0] for name in known}
    parameter = lambda layout, name: (
        isinstance(layout, Weight) and layout.slots[name].kind == "experts"
    )
    owner: dict[str, Path] = {}
    saved: set[str] = set()
    for path, layout in layouts.items():
        for name in tensor_shapes(layout, unbox(leaves[path]).shape):
            holder = name.rpartition(".")[0] if parameter(layout, name) else name
            if known is not None and holder not in known:
                raise ValueError(
                    f"{path_name(path)!r} has the name {name!r}, which is not in "
                    f"modules. Close: {listed(near(name, known))}. Correct names."
                )
            key = name
            if path not in adapters:
                key = tensor_name(name, path)
                saved.add(name)
            if key in owner:
                raise ValueError(
                    f"{path_name(owner[key])!r} and {path_name(path)!r} have one name, "
                    f"{key!r}. Correct names: each weight has its own."
                )
            owner[key] = path
    return saved


def _check_saved(saved: set[str], adapted: set[str], task_type: str | None) -> None:
    """PEFT finds modules to save by the ends of names, and leaves them no adapter."""
    for module in sorted(saved):
        for name in sorted(adapted):
            if name.endswith(module) or within(re.escape(module), name):
                raise ValueError(
                    f"{module!r} would be saved whole, and PEFT then ignores the "
                    f"adapter of {name!r}. Leave that adapter out with exclude, or the "
                    "module out of also."
                )
        if longer := [name for name in saved - {module} if name.endswith(module)]:
            raise ValueError(
                f"{module!r} would be saved whole, and PEFT, which goes by the ends of "
                f"names, takes {listed(sorted(longer))} for it. Leave it out of also."
            )
    heads = TASK_HEADS.get(task_type or "", ())
    if heads and not any(module.split(".")[-1] in heads for module in saved):
        raise ValueError(
            f"For {task_type} PEFT saves the head whole, a module called "
            f"{' or '.join(heads)}: train it, and name it in also."
        )
    for name in sorted(adapted):
        if any(within(head, name) for head in heads):
            raise ValueError(
                f"For {task_type} PEFT saves {name!r} whole, and it has an adapter. "
                "Leave that out with exclude, and name the module in also."
            )


def _check_below(
    saved: set[str], whole: list[Path], names: Names, leaves: dict[Path, Any]
) -> None:
    """All that is below a saved module is saved with it."""
    for path, leaf in leaves.items():
        if not saved or path in whole or is_adapter(path) or not is_array(unbox(leaf)):
            continue
        naming = naming_of(names, path)
        for template in naming.templates if naming else ():
            if any(template.startswith(f"{module}.") for module in saved):
                raise ValueError(
                    f"PEFT saves whole modules, and {path_name(path)!r} is in one that "
                    f"also names: add it to also, or leave that out."
                )


def _check_siblings(
    whole: list[Path],
    namings: Mapping[Path, Naming],
    layouts: Mapping[Path, Weight | Naming],
    leaves: dict[Path, Any],
) -> None:
    """PEFT saves modules, not leaves: all of a mapping or none."""
    for path in whole:
        if len(namings[path].templates) > 1 or _has_experts(layouts[path]):
            raise ValueError(
                f"{path_name(path)!r} trains as a whole, and its name is no module of "
                f"its own: {listed(namings[path].templates)}. Leave it out of also."
            )
        for other in leaves:
            mine = other[:-1] == path[:-1] and is_array(unbox(leaves[other]))
            if mine and other not in whole and not is_adapter(other):
                raise ValueError(
                    f"{path_name(path)!r} trains as a whole, and PEFT saves whole "
                    f"modules: add {path_name(other)!r} to also."
                )


def _has_experts(layout: Weight | Naming) -> bool:
    return isinstance(layout, Weight) and any(
        slot.kind == "experts" for slot in layout.slots.values()
    )


def _check_portable(
    weights: Mapping[Path, Weight],
    whole: list[Path],
    dtype: Any,
    adapters: Mapping[Path, Adapter],
    leaves: dict[Path, Any],
) -> None:
    refuse = lambda path, why: ValueError(
        f"{path_name(path)!r} cannot be portable: {why}. Leave it out with "
        "merge or strip, or write portable=False."
    )
    if whole:
        raise refuse(whole[0], "vLLM takes no modules_to_save")
    for path, weight in weights.items():
        for name, slot in weight.slots.items():
            if slot.kind in ("conv", "experts"):
                what = {"conv": "convolution", "experts": "parameter of experts"}
                raise refuse(path, f"{name!r} is a {what[slot.kind]}")
            if slot.kind == "embedding" and name.split(".")[-1] != "embed_tokens":
                raise refuse(path, f"vLLM adapts the table embed_tokens, not {name!r}")
        a = unbox(leaves[adapters[path].a])
        if (r := a.shape[-1]) > VLLM_RANKS[-1]:
            raise refuse(path, f"vLLM takes ranks up to {VLLM_RANKS[-1]}, not {r}")
        kept = jnp.dtype(a.dtype if dtype is None else dtype).name
        if kept not in DTYPES[:2]:
            raise refuse(
                path, f"it is {kept}, and float32 or bfloat16 loads everywhere"
            )


def _alpha(scale: float, r: int) -> float:
    """The shortest number that gives the scale, which is a float32."""
    alphas = (float(f"{scale * r:.{digits}g}") for digits in range(1, 18))
    return next(x for x in alphas if np.float32(x / r) == np.float32(scale))


def _of_one_rank(found: Mapping[str, Module]) -> dict[str, Module]:
    """The modules padded with zeros to the least rank that vLLM takes."""
    most = max(module.a.shape[-1] for module in found.values())
    r = next(n for n in VLLM_RANKS if n >= most)
    padded = {}
    for name, (a, b, scale) in found.items():
        more = r - a.shape[-1]
        padded[name] = Module(
            np.pad(a, ((0, 0), (0, more))), np.pad(b, ((0, more), (0, 0))), scale
        )
    return padded
