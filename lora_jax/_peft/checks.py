"""What PEFT, or vLLM, would not load as it was meant: the checks of an export's plan.

PEFT goes by names and their ends, and is silent about what it leaves out.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp

from lora_jax._adapters import adapter_of, is_adapter
from lora_jax._flax_names import is_floating
from lora_jax._peft.config import within
from lora_jax._peft.folder import DTYPES
from lora_jax._peft.layouts import stems_of, tensor_name
from lora_jax._peft.modules import Weight, tensor_shapes
from lora_jax._peft.names import Names, Naming, naming_of, near
from lora_jax._peft.plan import Plan, adapted_modules, copied_modules, orders_of
from lora_jax._tree import (
    Path,
    components,
    is_array,
    listed,
    path_name,
    unbox,
)

# https://github.com/vllm-project/vllm/blob/main/vllm/config/lora.py
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# What PEFT adds to modules_to_save, for a model of such a task.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def check_loads(
    plan: Plan,
    leaves: dict[Path, Any],
    names: Names,
    modules: Iterable[str] | None,
    task_type: str | None,
) -> None:
    """PEFT loads the whole plan, each tensor into the module that it is of.

    Raises:
      TypeError: If `modules` is one name.
      ValueError: If a name is no module or has two owners, an adapter is in a module
        saved whole, such a module lacks a leaf, or there is no adapter.
    """
    if not plan.adapted:
        raise ValueError(
            "There are trained copies and no low-rank adapter, and PEFT's format needs "
            "one. Write targets= in lorafy."
        )
    _check_known(plan, leaves, modules)
    _check_unique(plan, leaves)
    saved, adapted = copied_modules(plan, leaves), adapted_modules(plan)
    _check_apart(saved, adapted)
    _check_task(saved, adapted, task_type)
    _check_own(plan)
    _check_beside(plan, leaves)
    _check_below(plan, saved, names, leaves)
    _check_magnitudes(plan, leaves)
    stems_of(orders_of(plan))  # raises if the parameters of one module are in no order


def _check_magnitudes(plan: Plan, leaves: dict[Path, Any]) -> None:
    """PEFT has DoRA for all modules or for none, and one norm for each update."""
    own = {path for path in plan.adapted if _has_magnitude(path, leaves)}
    if own and (plain := [path for path in plan.adapted if path not in own]):
        raise ValueError(
            f"{listed(sorted(own))} have DoRA's magnitudes, and {listed(plain)} have "
            "not: PEFT has use_dora for all or for none. Build them alike."
        )
    for path in own:
        for name, slot in plan.adapted[path].slots.items():
            if slot.kind in ("head", "experts"):
                raise ValueError(
                    f"{path_name(path)!r} has DoRA's magnitudes, and is {slot.kind} "
                    f"{name!r} too: PEFT has no such norm. Leave it out of "
                    "lorafy(..., dora=True)."
                )


def _has_magnitude(path: Path, leaves: dict[Path, Any]) -> bool:
    return adapter_of(path, magnitude=True).magnitude in leaves


def check_portable(plan: Plan, leaves: dict[Path, Any], dtype: Any) -> None:
    """Every program that knows PEFT's format, vLLM included, loads the plan."""
    for path in plan.copied:
        raise ValueError(
            f"{path_name(path)!r} cannot be portable: vLLM takes no modules_to_save. "
            "Leave it out of also= in lorafy, or write portable=False."
        )
    for path, weight in plan.adapted.items():
        if _has_magnitude(path, leaves):
            raise ValueError(
                f"{path_name(path)!r} cannot be portable: vLLM takes no DoRA. Write "
                "portable=False."
            )
        if why := _not_portable(weight, unbox(leaves[adapter_of(path).a]), dtype):
            raise ValueError(
                f"{path_name(path)!r} cannot be portable: {why}. Leave it out with "
                "merge or strip, or write portable=False."
            )


def _check_known(
    plan: Plan, leaves: dict[Path, Any], modules: Iterable[str] | None
) -> None:
    """The PyTorch model has each module, or the one that holds a bare parameter."""
    if isinstance(modules, str):
        raise TypeError("modules is a list of names, or a mapping with them as keys.")
    if modules is None:
        return
    known = {*modules}
    known |= {name.rpartition(".")[0] for name in known}
    parameters = orders_of(plan)
    for path, name in _each_module(plan, leaves):
        holder = name.rpartition(".")[0] if name in parameters else name
        if holder not in known:
            raise ValueError(
                f"{path_name(path)!r} has the name {name!r}, which is not in "
                f"modules. Close: {listed(near(name, known))}. Correct names."
            )


def _check_unique(plan: Plan, leaves: dict[Path, Any]) -> None:
    """Each module has one adapter, and each tensor saved whole is of one leaf."""
    owner: dict[str, Path] = {}
    for path, name in _each_module(plan, leaves):
        key = name if path in plan.adapted else tensor_name(name, path)
        if key in owner:
            raise ValueError(
                f"{path_name(owner[key])!r} and {path_name(path)!r} have one name, "
                f"{key!r}. Correct names: each weight has its own."
            )
        owner[key] = path


def _each_module(plan: Plan, leaves: dict[Path, Any]) -> Iterator[tuple[Path, str]]:
    layouts: dict[Path, Weight | Naming] = {**plan.adapted, **plan.copied}
    for path, layout in layouts.items():
        for name in tensor_shapes(layout, unbox(leaves[path]).shape):
            yield path, name


def _check_apart(saved: set[str], adapted: set[str]) -> None:
    """PEFT finds modules to save by the ends of names, and leaves them no adapter."""
    for module in sorted(saved):
        for name in sorted(adapted):
            if name.endswith(module) or within(re.escape(module), name):
                raise ValueError(
                    f"{module!r} would be saved whole, and PEFT then ignores the "
                    f"adapter of {name!r}. Leave that adapter out with exclude= in "
                    "lorafy, or the module out of also=."
                )
        if longer := [name for name in saved - {module} if name.endswith(module)]:
            raise ValueError(
                f"{module!r} would be saved whole, and PEFT, which goes by the ends of "
                f"names, takes {listed(sorted(longer))} for it. Leave it out of also= "
                "in lorafy."
            )


def _check_task(saved: set[str], adapted: set[str], task_type: str | None) -> None:
    """For some tasks PEFT saves the head whole, by itself."""
    heads = TASK_HEADS.get(task_type or "", ())
    if heads and not any(module.split(".")[-1] in heads for module in saved):
        raise ValueError(
            f"For {task_type} PEFT saves the head whole, a module called "
            f"{' or '.join(heads)}: train it, and name it in also= in lorafy."
        )
    for name in sorted(adapted):
        if any(within(head, name) for head in heads):
            raise ValueError(
                f"For {task_type} PEFT saves {name!r} whole, and it has an adapter. "
                "Leave that out with exclude= in lorafy, and name the module in also=."
            )


def _check_own(plan: Plan) -> None:
    """A leaf saved whole is of one module, all its own."""
    parameters = lambda layout: (
        isinstance(layout, Weight)
        and any(slot.kind == "experts" for slot in layout.slots.values())
    )
    for path, layout in plan.copied.items():
        templates = plan.namings[path].templates
        if len(templates) > 1 or parameters(layout):
            raise ValueError(
                f"{path_name(path)!r} trains as a whole, and its name is no module of "
                f"its own: {listed(templates)}. Leave it out of also= in lorafy."
            )


def _check_beside(plan: Plan, leaves: dict[Path, Any]) -> None:
    """PEFT saves modules, not leaves: all of a mapping or none."""
    for path in plan.copied:
        for other, leaf in leaves.items():
            module = components(other)[:-1] == components(path)[:-1]
            beside = module and is_array(unbox(leaf))
            if beside and other not in plan.copied and not is_adapter(other):
                advice = f"add {path_name(other)!r} to also= in lorafy"
                if not is_floating(other, leaf):
                    advice = (
                        f"leave it out of also= in lorafy, since {path_name(other)!r}, "
                        f"of dtype {unbox(leaf).dtype}, cannot train"
                    )
                raise ValueError(
                    f"{path_name(path)!r} trains as a whole, and PEFT saves whole "
                    f"modules: {advice}."
                )


def _check_below(
    plan: Plan, saved: set[str], names: Names, leaves: dict[Path, Any]
) -> None:
    """All that the map puts in a saved module, or below it, is saved with it."""
    saved = saved | {plan.namings[path].templates[0] for path in plan.copied}
    for path, leaf in leaves.items():
        if path in plan.copied or is_adapter(path) or not is_array(unbox(leaf)):
            continue
        naming = naming_of(names, path) if saved else None
        for template in naming.templates if naming else ():
            if any(f"{template}.".startswith(f"{module}.") for module in saved):
                raise ValueError(
                    f"PEFT saves whole modules, and {path_name(path)!r} is in one that "
                    "also= in lorafy names: add it to also=, or leave that out."
                )


def _not_portable(weight: Weight, a: Any, dtype: Any) -> str | None:
    """Why an adapter with such a factor A is not for every program."""
    for name, slot in weight.slots.items():
        if slot.kind in ("conv", "experts"):
            what = {"conv": "convolution", "experts": "parameter of experts"}
            return f"{name!r} is a {what[slot.kind]}"
        if slot.kind == "embedding" and name.split(".")[-1] != "embed_tokens":
            return f"vLLM adapts the table embed_tokens, not {name!r}"
    if (r := a.shape[-1]) > VLLM_RANKS[-1]:
        return f"vLLM takes ranks up to {VLLM_RANKS[-1]}, not {r}"
    kept = jnp.dtype(a.dtype if dtype is None else dtype).name
    if kept not in DTYPES[:2]:
        return f"it is {kept}, and float32 or bfloat16 loads everywhere"
    return None
