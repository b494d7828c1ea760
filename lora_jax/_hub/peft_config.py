"""PEFT's adapter_config.json: which modules it speaks of, with which rank and scale.

Facts of the format: https://huggingface.co/docs/peft/package_reference/lora
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

# What a reader need not know to compute what the writer did.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout"),
    *("megatron_core", "peft_version", "qalora_group_size", "revision", "task_type"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # for the start
    *("ensure_weight_tying", "runtime_config", "fan_in_fan_out"),
}
UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "target_parameters", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "bias", "init_lora_weights"),
    "use_dora",
}
# These ways to start leave the base as it is; the others change it.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def new_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    parameters: Iterable[str],
    **settings: Any,
) -> dict[str, Any]:
    """The config of modules with these ranks and alphas, all by their full names.

    Args:
      ranks: Of each module.
      alphas: Of each module: its scale times its rank.
      parameters: Those of the modules that are bare parameters, such as experts.
      **settings: Further entries.
    """
    parameters = sorted(parameters)
    # PEFT warns of a pattern for a parameter, though it heeds it.
    first = parameters or list(ranks)
    r = Counter(ranks[name] for name in first).most_common(1)[0][0]
    alpha = Counter(alphas[name] for name in first).most_common(1)[0][0]
    number = lambda x: int(x) if float(x).is_integer() else x
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": number(alpha),
        "target_modules": sorted(set(ranks) - set(parameters)),
        "rank_pattern": _patterns(ranks, r),
        "alpha_pattern": {k: number(x) for k, x in _patterns(alphas, alpha).items()},
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
    }
    if parameters:  # a field that older versions of PEFT do not know
        config["target_parameters"] = parameters
    return config | settings


def read_config(folder: str) -> dict[str, Any]:
    """The config in a folder, refused unless all that it says is understood.

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If it is no config of a plain LoRA.
    """
    path = os.path.join(folder, "adapter_config.json")
    with open(path, encoding="utf-8") as file:
        try:
            config = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no config: found {type(config).__name__}.")
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{path} is of the PEFT method {config.get('peft_type')!r}. Only 'LORA' "
            "can be imported."
        )
    _check_fields(path, config)
    if config.get("target_modules") == "all-linear":
        raise ValueError(
            f"{path} has target_modules 'all-linear', which only the PyTorch model can "
            "resolve. Save the adapter with PEFT, which writes the names."
        )
    if config.get("bias", "none") != "none":
        raise ValueError(
            f"{path} has bias {config['bias']!r}. Only 'none' can be imported."
        )
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        raise ValueError(
            f"{path} has init_lora_weights {start!r}, which also changes the base "
            "weights. Make it a plain LoRA, with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)."
        )
    for field, value in config.items():
        if value and field not in HARMLESS | UNDERSTOOD:
            raise ValueError(
                f"{path} has {field} {value!r}. That is no plain LoRA, or unknown "
                "here, and could change the result: it cannot be imported."
            )
    for field in ("rank_pattern", "alpha_pattern"):
        for key in config.get(field) or ():
            _compiled(path, field, rf"(.*\.)?({key})$")
    for field in ("target_modules", "exclude_modules"):
        if isinstance(config.get(field), str):
            _compiled(path, field, config[field])
    for field in ("modules_to_save", "layers_pattern"):
        entries = config.get(field) or ()
        for entry in [entries] if isinstance(entries, str) else entries:
            _compiled(path, field, entry)
    return config


def _check_fields(path: str, config: dict[str, Any]) -> None:
    whole = lambda n: type(n) is int and 0 < n < 2**31
    real = lambda x: type(x) in (int, float) and abs(x) < 1e30  # within a float32
    each = lambda ok: lambda x: isinstance(x, dict) and all(map(ok, x.values()))
    names = lambda x: isinstance(x, list) and all(isinstance(n, str) for n in x)
    named = lambda x: isinstance(x, str) or names(x)
    count = lambda n: type(n) is int
    counts = lambda x: count(x) or (isinstance(x, list) and all(map(count, x)))
    needed = {
        "r": (whole, "a whole number above 0"),
        "lora_alpha": (real, "a number"),
        "rank_pattern": (each(whole), "{module: rank}"),
        "alpha_pattern": (each(real), "{module: alpha}"),
        "target_modules": (named, "a list of modules, or a regular expression"),
        "exclude_modules": (named, "a list of modules, or a regular expression"),
        "target_parameters": (names, "a list of parameters"),
        "modules_to_save": (names, "a list of modules"),
        "layers_pattern": (named, "a list of names"),
        "layers_to_transform": (counts, "a list of numbers"),
    }
    for field, (fits, what) in needed.items():
        value = config.get(field)
        if not fits(value) and (value is not None or field in ("r", "lora_alpha")):
            raise ValueError(
                f"{path} has {field} {value!r}: {what} is needed. Save the adapter "
                "again with PEFT."
            )


def rank_and_scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """What the config says of one module, its patterns included."""
    r = _of_pattern(config, "rank_pattern", module, config["r"])
    alpha = _of_pattern(config, "alpha_pattern", module, config["lora_alpha"])
    return r, alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def targets(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would adapt a module of this name, if the model has it."""
    if _named(config.get("exclude_modules"), module) or saves(config, module):
        return False
    chosen = config.get("target_modules")
    if not _named(chosen, module):
        return False
    layers = config.get("layers_to_transform")
    if layers in (None, []) or isinstance(chosen, str) or module in chosen:
        return True
    patterns, lead = config.get("layers_pattern"), r"(?:^|.*?\.)"
    if not patterns:
        patterns, lead = [r"[^.]*"], r".*?\."
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"{lead}{pattern}\.(\d+)\.", module)
        if found:
            return int(found[1]) in ([layers] if type(layers) is int else layers)
    return False


def saves(config: Mapping[str, Any], module: str) -> bool:
    """Whether the config keeps a module whole."""
    return any(within(name, module) for name in config.get("modules_to_save") or ())


def within(saved: str, module: str) -> bool:
    """Whether PEFT keeps a module whole by this entry of modules_to_save."""
    return re.match(rf"(^|.*\.){saved}($|\..*)", module) is not None


def targets_parameter(config: Mapping[str, Any], name: str) -> bool:
    return _named(config.get("target_parameters"), name)


def unfilled(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """The entries of the config that name none of these modules.

    Those of modules_to_save may do so: PEFT names heads there that few models have.
    """
    modules = list(modules)
    missing = []
    for field in ("target_modules", "target_parameters"):
        entries = config.get(field) or ()
        for entry in [entries] if isinstance(entries, str) else entries:
            each = entry if entries is entry else [entry]
            if not any(_named(each, module) for module in modules):
                missing.append(f"{field} {entry!r}")
    return missing


def _named(entries: Any, module: str) -> bool:
    """Whether a list of names, or of last parts of names, or an expression has it."""
    if isinstance(entries, str):
        return re.fullmatch(entries, module) is not None
    return any(module == e or module.endswith(f".{e}") for e in entries or ())


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The entries of those that differ, each under a key that no other matches."""
    found = {}
    for module, value in values.items():
        # A key is an expression that may match the last part of a longer name.
        others = [other for other in values if other != module]
        plain, key = rf"(.*\.)?({module})$", module
        special = not re.fullmatch(r"[\w.-]+", module)
        if special or any(re.match(plain, other) for other in others):
            key = "^" + re.escape(module)
        if value != default:
            found[key] = value
    return found


def _of_pattern(
    config: Mapping[str, Any], field: str, module: str, default: Any
) -> Any:
    for key, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _compiled(path: str, field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{path} has a {field} that is no pattern: {error}."
        ) from error
