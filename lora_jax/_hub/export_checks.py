"""The checks of an export's plan: PEFT must load it as intended.

PEFT goes by names and their ends, and leaves out without a warning what it does not
find.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax._adapters import adapter_of, is_adapter
from lora_jax._flax_names import is_floating
from lora_jax._hub.module_kinds import EXPERTS, HEAD
from lora_jax._hub.module_plan import ModulePlan
from lora_jax._hub.module_rules import saved_by
from lora_jax._hub.names import Names, name_finder, similar_names
from lora_jax._hub.tensor_keys import parameter_stems, tensor_name
from lora_jax._tree import Path, components, is_array, listed, path_name, unbox

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
    known: set[str] | None,
    task_type: str | None,
) -> None:
    """Checks that PEFT loads every tensor of the plan into its own module.

    Args:
      plan: The modules of all leaves that are trained.
      leaves: Of the tree.
      names: The map.
      known: The modules of the PyTorch model, from `known_modules`.
      task_type: PEFT's.
    """
    if not plan.adapted:
        raise ValueError(
            "There are trained copies and no low-rank adapter, and PEFT's format needs "
            "one. Write targets= in lorafy."
        )
    _check_names(plan, known)
    _check_separate(plan)
    _check_task(plan, task_type)
    _check_own_modules(plan)
    _check_same_module(plan, leaves)
    _check_submodules(plan, names, leaves)
    _check_magnitudes(plan, leaves)
    parameter_stems(plan.parameter_orders)  # raises if a module's have no order


def has_magnitude(path: Path, leaves: Mapping[Path, Any]) -> bool:
    """Whether the adapter of a weight has DoRA's magnitudes."""
    return adapter_of(path, magnitude=True).magnitude in leaves


def known_modules(modules: Iterable[str] | None) -> set[str] | None:
    """Returns the modules of the PyTorch model, also by the names of tensors."""
    if isinstance(modules, str):
        raise TypeError("modules is a list of names, or a mapping with them as keys.")
    if modules is None:
        return None
    known = {*modules}
    return known | {name.rpartition(".")[0] for name in known}


def _check_names(plan: ModulePlan, known: set[str] | None) -> None:
    """Checks that each name is a module of the model, and belongs to one leaf.

    The name of a parameter, such as experts, begins with that of its module. The leaves
    of a module that is trained in full share its name, and are separate tensors.
    """
    parameters = plan.parameter_orders
    owner: dict[str, Path] = {}
    copied = plan.copied | plan.biases
    for path, leaf in (*plan.adapted.items(), *copied.items()):
        for name in leaf.modules:
            holder = name.rpartition(".")[0] if name in parameters else name
            if known is not None and holder not in known:
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
        if (len(templates) > 1 and HEAD not in kinds) or EXPERTS in kinds:
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
            if is_adapter(other) or not is_array(unbox(leaf)):
                continue
            if other in plan.copied or other in plan.biases:
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
    dora = {path for path in plan.adapted if has_magnitude(path, leaves)}
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
