"""Adapters of experts that one parameter fuses, as those of each expert's own modules.

transformers 5 keeps the experts of a layer in parameters of three dimensions, in one of
which the gate and up projections are side by side. Its checkpoints, vLLM's files and
most trees have modules for each expert. PEFT turns the second form into the first when
it loads a folder; this is the way back:
https://github.com/huggingface/peft/blob/main/src/peft/utils/transformers_weight_conversion.py
"""

from collections.abc import Container, Iterable, Iterator

import numpy as np

from lora_jax._hub.module_rules import module_rules
from lora_jax._hub.peft_folder import PeftFolder
from lora_jax._hub.tensor_keys import PREFIX

# The parameters of fused experts: PEFT wraps their module once for each, the last one
# outermost. Then the modules of one expert whose outputs each has in a row.
PARTS = {
    "down_proj": (("down_proj",), ("w2",)),
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
}
# The fused module, and others that checkpoints of the same models have for it.
FUSED, *OTHERS = ("mlp.experts", "block_sparse_moe.experts")
SUFFIXES = (".lora_A.weight", ".lora_B.weight")


def with_separate_experts(folder: PeftFolder, modules: Iterable[str]) -> PeftFolder:
    """Returns a folder with the adapters of fused experts split into the experts' own.

    Experts that the map of the tree has fused, too, stay as they are.

    Args:
      folder: The contents of a PEFT folder.
      modules: The modules and parameters that the map of the tree names.

    Raises:
      ValueError: If the tensors of a fused parameter do not fit its experts.
    """
    modules = set(modules)
    tensors, config = dict(folder.tensors), dict(folder.config)
    new: dict[str, tuple[int, float]] = {}  # the rank and alpha of each new module
    for stem, name in _fused_parameters(folder):
        module, parameter = name.rsplit(".", 1)
        parts = _parts_of(module, parameter, modules)
        if name in modules or parts is None:
            continue
        a, b = (tensors.pop(PREFIX + stem + suffix, None) for suffix in SUFFIXES)
        r, scale = folder.rules.rank_and_scale(name)
        if a is None or b is None or len(a) % r or b.ndim != 2 or b.shape[1] != len(a):
            raise ValueError(
                f"{folder.path}: the tensors of {name!r} must be A (experts * {r}, "
                f"inputs) and B (outputs, experts * {r}); found "
                f"{[None if x is None else x.shape for x in (a, b)]}."
            )
        each = a.reshape(-1, r, a.shape[-1])  # (experts, r, inputs)
        b = b.reshape(len(b), r, -1)  # the experts are innermost
        alpha = scale * (r**0.5 if config.get("use_rslora") else r)
        for expert, a in enumerate(each):
            halves = np.split(b[..., expert], len(parts))
            for part, half in zip(parts, halves, strict=True):
                own = part.format(expert)
                new[own] = r, alpha
                for suffix, x in zip(SUFFIXES, (a, half), strict=True):
                    tensors[PREFIX + own + suffix] = np.ascontiguousarray(x)
    if not new:
        return folder
    if not folder.rules.has_all_linear:
        chosen = config.get("target_modules")
        if isinstance(chosen, str):  # an expression
            chosen = [name for name in modules if folder.rules.is_target(name)]
        config["target_modules"] = [*(chosen or ()), *new]
    for field, default, i in (
        ("rank_pattern", "r", 0),
        ("alpha_pattern", "lora_alpha", 1),
    ):
        own = {name: x[i] for name, x in new.items() if x[i] != config[default]}
        config[field] = own | (config.get(field) or {})
    return PeftFolder(folder.path, config, module_rules(config), tensors)


def _fused_parameters(folder: PeftFolder) -> Iterator[tuple[str, str]]:
    """Yields each adapted fused parameter: the start of its keys, and its name."""
    stems = [
        key.removeprefix(PREFIX).removesuffix(SUFFIXES[0])
        for key in folder.tensors
        if key.endswith(SUFFIXES[0])
    ]
    for module in {stem.removesuffix(".base_layer"): None for stem in stems}:
        if module == FUSED or module.endswith(f".{FUSED}"):
            names = [f"{module}.{parameter}" for parameter in PARTS]
            names = [n for n in names if folder.rules.is_target_parameter(n)]
            for depth, name in enumerate(names):
                yield module + depth * ".base_layer", name


def _parts_of(module: str, parameter: str, modules: Container[str]) -> list[str] | None:
    """Returns the modules of one expert, with a place for its number."""
    for other in (FUSED, *OTHERS):
        for names in PARTS[parameter]:
            parts = [f"{module.removesuffix(FUSED)}{other}.{{}}.{n}" for n in names]
            if all(part.format(0) in modules for part in parts):
                return parts
    return None
