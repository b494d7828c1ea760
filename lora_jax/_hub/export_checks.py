"""The checks of an export's plan: PEFT, or vLLM too, must load it as it was meant.

PEFT goes by names and their ends, and leaves out without a warning what it does not
find.
"""

import re
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from lora_jax._adapters import adapter_of, is_adapter
from lora_jax._flax_names import is_floating
from lora_jax._hub.module_kinds import EXPERTS
from lora_jax._hub.module_plan import ModulePlan
from lora_jax._hub.module_rules import saved_by
from lora_jax._hub.modules import MappedLeaf
from lora_jax._hub.names import Names, name_finder, similar_names
from lora_jax._hub.peft_folder import TORCH_DTYPES
from lora_jax._hub.tensor_keys import parameter_stems, tensor_name
from lora_jax._tree import Path, components, is_array, listed, path_name, unbox

# https://github.com/vllm-project/vllm/blob/main/vllm/config/lora.py
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# The heads that PEFT adds to modules_to_save for a task.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def check_loads(
    plan: ModulePlan,
    leaves: dict[Path, Any],
    names: Names,
    modules: Iterable[str] | None,
    task_type: str | None,
) -> None:
    """Checks that PEFT loads every tensor of the plan into its own module."""
    if not plan.adapted:
        raise ValueError(
            "There are trained copies and no low-rank adapter, and PEFT's format needs "
            "one. Write targets= in lorafy."
        )
    _check_names(plan, modules)
    _check_separate(plan)
    _check_task(plan, task_type)
    _check_own_modules(plan)
    _check_same_module(plan, leaves)
    _check_submodules(plan, names, leaves)
    _check_magnitudes(plan, leaves)
    parameter_stems(plan.parameter_orders)  # raises if a module's have no order


def check_portable(plan: ModulePlan, leaves: dict[Path, Any], dtype: Any) -> None:
    """Checks that every program with PEFT's format, vLLM included, loads the plan."""
    for path in plan.copied:
        raise ValueError(
            f"{path_name(path)!r} cannot be portable: vLLM loads no modules_to_save. "
            "Leave it out of also= in lorafy, or write portable=False."
        )
    for path, weight in plan.adapted.items():
        if why := _not_portable(weight, leaves, dtype):
            raise ValueError(
                f"{path_name(path)!r} cannot be portable: {why}. Leave it out with "
                "merge or strip, or write portable=False."
            )


def _not_portable(weight: MappedLeaf, leaves: dict[Path, Any], dtype: Any) -> str:
    """Returns why some programs do not load an adapter, or nothing."""
    a = unbox(leaves[adapter_of(weight.path).a])
    stored = jnp.dtype(a.dtype if dtype is None else dtype).name
    refused = {"conv": "a convolution", "experts": "a parameter of experts"}
    if _has_magnitude(weight.path, leaves):
        return "vLLM loads no DoRA"
    for name, part in weight.modules.items():
        if part.kind.name in refused:
            return f"{name!r} is {refused[part.kind.name]}"
        if part.kind.name == "embedding" and name.split(".")[-1] != "embed_tokens":
            return f"vLLM adapts the embedding embed_tokens, not {name!r}"
    if (r := a.shape[-1]) > VLLM_RANKS[-1]:
        return f"vLLM loads ranks up to {VLLM_RANKS[-1]}, not {r}"
    if stored not in TORCH_DTYPES[:2]:
        return f"it is {stored}, and float32 or bfloat16 loads everywhere"
    return ""


def _has_magnitude(path: Path, leaves: dict[Path, Any]) -> bool:
    return adapter_of(path, magnitude=True).magnitude in leaves


def _check_names(plan: ModulePlan, modules: Iterable[str] | None) -> None:
    """Checks that each name is a module of the model, and belongs to one leaf.

    The name of a parameter, such as experts, begins with that of its module. The leaves
    of a module that is trained in full share its name, and are separate tensors.
    """
    if isinstance(modules, str):
        raise TypeError("modules is a list of names, or a mapping with them as keys.")
    known, parameters = {*(modules or ())}, plan.parameter_orders
    known |= {name.rpartition(".")[0] for name in known}
    owner: dict[str, Path] = {}
    for path, leaf in (*plan.adapted.items(), *plan.copied.items()):
        for name in leaf.modules:
            holder = name.rpartition(".")[0] if name in parameters else name
            if modules is not None and holder not in known:
                raise ValueError(
                    f"{path_name(path)!r} has the name {name!r}, which is not in "
                    f"modules. Close: {similar_names(name, known)}. Correct names."
                )
            key = name if path in plan.adapted else tensor_name(name, path)
            if (other := owner.setdefault(key, path)) != path:
                raise ValueError(
                    f"{path_name(other)!r} and {path_name(path)!r} have one name, "
                    f"{key!r}. Correct names: each weight has its own."
                )


def _check_separate(plan: ModulePlan) -> None:
    """Checks that PEFT finds no other module by the name of one that it saves.

    It finds modules to save by the ends of names, and drops the adapters in them.
    """
    saved = plan.copied_modules
    is_saved, lengths = saved_by(map(re.escape, saved)), {*map(len, saved)}
    ends_of = lambda name: {name[-n:] for n in lengths if n <= len(name)} & saved
    for name in sorted(plan.adapted_modules):
        if (ends := ends_of(name)) or is_saved(name):
            within = (x for x in sorted(saved) if saved_by([re.escape(x)])(name))
            module = min(ends) if ends else next(within)
            raise ValueError(
                f"{module!r} is trained in full, so that PEFT ignores the adapter of "
                f"{name!r}. Leave that adapter out with exclude= in lorafy, or the "
                "module out of also=."
            )
    for name in sorted(saved):
        if ends := ends_of(name) - {name}:
            raise ValueError(
                f"{min(ends)!r} is trained in full, and PEFT, which goes by the ends "
                f"of names, takes {name!r} for it. Leave it out of also= in lorafy."
            )


def _check_task(plan: ModulePlan, task_type: str | None) -> None:
    """Checks the head, which PEFT saves in full for some tasks."""
    heads = TASK_HEADS.get(task_type or "", ())
    saved = {module.split(".")[-1] for module in plan.copied_modules}
    if heads and saved.isdisjoint(heads):
        raise ValueError(
            f"For {task_type} PEFT saves the whole head, a module called "
            f"{' or '.join(heads)}: train it, and name it in also= in lorafy."
        )
    is_head = saved_by(heads)
    for name in sorted(plan.adapted_modules):
        if is_head(name):
            raise ValueError(
                f"For {task_type} PEFT saves {name!r} as a whole, and it has an "
                "adapter. Leave that out with exclude= in lorafy, and name the module "
                "in also=."
            )


def _check_own_modules(plan: ModulePlan) -> None:
    """Checks that a leaf trained in full is a module, and no part of several."""
    for path, leaf in plan.copied.items():
        templates = plan.named[path].templates
        kinds = {part.kind for part in leaf.modules.values()}
        if len(templates) > 1 or EXPERTS in kinds:
            raise ValueError(
                f"{path_name(path)!r} is trained in full, and is no module of its "
                f"own: {listed(templates)}. Leave it out of also= in lorafy."
            )


def _check_same_module(plan: ModulePlan, leaves: dict[Path, Any]) -> None:
    """Checks that all leaves of a module are trained in full, or none of them."""
    by_module: dict[tuple[str, ...], list[Path]] = {}
    for path in leaves if plan.copied else ():
        by_module.setdefault(components(path)[:-1], []).append(path)
    for path in plan.copied:
        for other in by_module[components(path)[:-1]]:
            leaf = leaves[other]
            if other in plan.copied or is_adapter(other) or not is_array(unbox(leaf)):
                continue
            advice = f"add {path_name(other)!r} to also= in lorafy"
            if not is_floating(other, leaf):
                advice = (
                    f"leave it out of also= in lorafy, since {path_name(other)!r}, of "
                    f"dtype {unbox(leaf).dtype}, cannot be trained"
                )
            raise ValueError(
                f"{path_name(path)!r} is trained in full, and PEFT saves whole "
                f"modules: {advice}."
            )


def _check_submodules(plan: ModulePlan, names: Names, leaves: dict[Path, Any]) -> None:
    """Checks that all leaves in a module trained in full, or below it, are trained."""
    saved = {plan.named[path].templates[0] for path in plan.copied}
    saved |= plan.copied_modules
    named_as = name_finder(names)
    for path, leaf in leaves.items() if saved else ():
        if path in plan.copied or is_adapter(path) or not is_array(unbox(leaf)):
            continue
        named = named_as(path)
        for template in named.templates if named else ():
            parts = template.split(".")
            if any(".".join(parts[:i]) in saved for i in range(1, len(parts) + 1)):
                raise ValueError(
                    f"PEFT saves whole modules, and {path_name(path)!r} is in one that "
                    "also= in lorafy names: add it to also=, or leave that out."
                )


def _check_magnitudes(plan: ModulePlan, leaves: dict[Path, Any]) -> None:
    """Checks that PEFT has DoRA's norms: for all modules, and one for each update."""
    dora = {path for path in plan.adapted if _has_magnitude(path, leaves)}
    if dora and (plain := [path for path in plan.adapted if path not in dora]):
        raise ValueError(
            f"{listed(sorted(dora))} have DoRA's magnitudes, and {listed(plain)} do "
            "not: PEFT has use_dora for all or for none. Build them alike."
        )
    for path in dora:
        for name, part in plan.adapted[path].modules.items():
            if not part.kind.has_dora:
                raise ValueError(
                    f"{path_name(path)!r} has DoRA's magnitudes, and is the "
                    f"{part.kind.name} {name!r}, for which PEFT has no norm. Leave it "
                    "out of lorafy(..., dora=True)."
                )
