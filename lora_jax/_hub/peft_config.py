"""PEFT's adapter_config.json: the modules that have an adapter, its rank and scale.

The fields: https://huggingface.co/docs/peft/package_reference/lora
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Fields that do not change the result of a trained adapter.
IGNORED = {
    *"auto_mapping base_model_name_or_path inference_mode lora_dropout".split(),
    *"megatron_core peft_version qalora_group_size revision task_type".split(),
    *"loftq_config eva_config corda_config lora_ga_config".split(),  # initial values
    *"runtime_config fan_in_fan_out velora_config".split(),  # velora: the backward pass
}
UNDERSTOOD = {
    *"peft_type r lora_alpha use_rslora rank_pattern alpha_pattern use_dora".split(),
    *"target_modules target_parameters exclude_modules modules_to_save bias".split(),
    *"layers_to_transform layers_pattern init_lora_weights lora_bias".split(),
    *"ensure_weight_tying trainable_token_indices".split(),
}
BIASES = ("none", "lora_only", "all")  # those that are trained in full
# The types of fields: a test of the value, and its description.
_whole = lambda n: type(n) is int and 0 < n < 2**31
_real = lambda x: type(x) in (int, float) and abs(x) < 1e30  # within a float32
_values = lambda fits: lambda x: isinstance(x, dict) and all(map(fits, x.values()))
_list = lambda kind: lambda x: isinstance(x, list) and all(type(n) is kind for n in x)
_names = lambda x: isinstance(x, str) or _list(str)(x)
FIELDS = {
    "r": (_whole, "a whole number above 0"),
    "lora_alpha": (_real, "a number"),
    "rank_pattern": (_values(_whole), "{module: rank}"),
    "alpha_pattern": (_values(_real), "{module: alpha}"),
    "target_modules": (_names, "a list of modules, or a regular expression"),
    "exclude_modules": (_names, "a list of modules, or a regular expression"),
    "target_parameters": (_list(str), "a list of parameters"),
    "modules_to_save": (_list(str), "a list of modules"),
    "layers_pattern": (_names, "a list of names"),
    "trainable_token_indices": (
        lambda x: _list(int)(x) or _values(_list(int))(x),
        "a list of numbers, or {module: list of numbers}",
    ),
    "bias": (lambda x: x in BIASES, f"one of {', '.join(BIASES)}"),
    "layers_to_transform": (
        lambda x: type(x) is int or _list(int)(x),
        "a list of numbers",
    ),
}
# Ways to initialize an adapter that leave the base weights as they are.
INITIALIZERS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def new_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    parameters: Iterable[str],
    **settings: Any,
) -> dict[str, Any]:
    """Returns the config of modules with these ranks and alphas.

    Args:
      ranks: The rank of each module, by its full name.
      alphas: Its scale times its rank.
      parameters: Those of the modules that are bare parameters, such as experts.
      **settings: Further entries.
    """
    parameters = sorted(parameters)
    # PEFT warns about a pattern for a parameter, although it uses it: the parameters
    # get the most common values, which need no pattern.
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
    if parameters:  # a field that older versions of PEFT do not have
        config["target_parameters"] = parameters
    return config | settings


def read_config(folder: str) -> dict[str, Any]:
    """Returns the config in a folder, if every entry that changes a result is known.

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If it is no config of a plain LoRA or DoRA.
    """
    path = os.path.join(folder, "adapter_config.json")
    with open(path, encoding="utf-8") as file:
        try:
            config = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no JSON: {error}.") from error
    if problem := _problem(config):
        raise ValueError(f"{path} {problem}")
    return config


def _problem(config: Any) -> str | None:
    """Returns what is wrong with a config, or cannot be imported."""
    if not isinstance(config, dict):
        return f"is no config: found {type(config).__name__}."
    if (method := config.get("peft_type")) != "LORA":
        return f"is of the PEFT method {method!r}. Only 'LORA' can be imported."
    for field, (fits, what) in FIELDS.items():
        value = config.get(field)
        if not fits(value) and (value is not None or field in ("r", "lora_alpha")):
            advice = "Save the adapter again with PEFT."
            return f"has {field} {value!r}: {what} is needed. {advice}"
    if (start := config.get("init_lora_weights", True)) not in INITIALIZERS:
        return (
            f"has init_lora_weights {start!r}, which also changes the base weights. "
            "Convert it to a plain LoRA, with save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)."
        )
    for field, value in config.items():
        if value and field not in IGNORED | UNDERSTOOD:
            return (
                f"has {field} {value!r}. That is no plain LoRA, or unknown here, and "
                "could change the result: it cannot be imported."
            )
    for field, pattern in _expressions(config):
        try:
            re.compile(pattern)
        except re.error as error:
            return f"has a {field} that is no pattern: {error}."
    return None


def _expressions(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for field in ("rank_pattern", "alpha_pattern"):
        yield from ((field, rf"(.*\.)?({key})$") for key in config.get(field) or ())
    for field in ("target_modules", "exclude_modules"):
        if isinstance(config.get(field), str):
            yield field, config[field]
    for field in ("modules_to_save", "layers_pattern"):
        yield from ((field, entry) for entry in _entries(config, field))


def rank_and_scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Returns the rank and the scale of one module, by its patterns if it has any."""
    found = []
    for field, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        given = (
            x for key, x in (config.get(field) or {}).items() if _ends(key, module)
        )
        found.append(next(given, config[default]))
    r, alpha = found
    return r, alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would adapt a module of this name, if the model has it."""
    if _is_named(config.get("exclude_modules"), module) or is_saved(config, module):
        return False
    chosen = config.get("target_modules") or ()
    if not _is_named(chosen, module):
        return False
    layers = config.get("layers_to_transform")
    if layers in (None, []) or isinstance(chosen, str) or module in chosen:
        return True
    patterns, lead = _entries(config, "layers_pattern"), r"(?:^|.*?\.)"
    if not patterns:
        patterns, lead = [r"[^.]*"], r".*?\."
    for pattern in patterns:
        found = re.match(rf"{lead}{pattern}\.(?P<index>\d+)\.", module)
        if found:
            index = int(found["index"])
            return index in ([layers] if type(layers) is int else layers)
    return False


def has_all_linear(config: Mapping[str, Any]) -> bool:
    """Whether the config targets all linear modules, which the tensors must tell."""
    chosen = config.get("target_modules")
    return isinstance(chosen, str) and chosen.lower() == "all-linear"


def is_target_parameter(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT would adapt a parameter, or the `weight` of a module, of this name.

    A matrix that is a bare parameter of its module, such as a router's, has the keys of
    a linear module.
    """
    entries = config.get("target_parameters")
    return any(_is_named(entries, each) for each in (name, f"{name}.weight"))


def trained_rows(config: Mapping[str, Any], module: str) -> list[int] | None:
    """Returns the rows of a table that are trained, if only some of them are."""
    rows = config.get("trainable_token_indices") or {}
    if isinstance(rows, list):  # those of the model's table of tokens
        return rows
    found = (rows[name] for name in rows if _is_named([name], module))
    return next(found, None)


def unmatched_rows(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Returns the entries of trainable_token_indices that are none of these modules."""
    rows, modules = config.get("trainable_token_indices") or {}, list(modules)
    if isinstance(rows, list):
        return [] if modules else ["trainable_token_indices"]
    return [
        f"trainable_token_indices {name!r}"
        for name in rows
        if not any(_is_named([name], module) for module in modules)
    ]


def is_saved(config: Mapping[str, Any], module: str) -> bool:
    """Whether the config has a module among those that are trained in full."""
    return any(is_saved_by(e, module) for e in _entries(config, "modules_to_save"))


def is_saved_by(entry: str, module: str) -> bool:
    """Whether PEFT trains a module in full for this entry of modules_to_save."""
    return re.match(rf"(^|.*\.){entry}($|\..*)", module) is not None


def _entries(config: Mapping[str, Any], field: str) -> list[str]:
    value = config.get(field) or []
    return [value] if isinstance(value, str) else value


def _is_named(entries: Any, module: str) -> bool:
    """Whether an expression matches a module, or one of several names is its end."""
    if isinstance(entries, str):
        return re.fullmatch(entries, module) is not None
    return any(module == e or module.endswith(f".{e}") for e in entries or ())


def _ends(pattern: str, module: str) -> bool:
    """Whether a key of a pattern field, an expression, matches the end of a name."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Returns values other than the default, each by a key that no other name matches.

    A key is an expression for the end of a name, so that "q" would match "a.q" too.
    """
    found = {}
    for module, value in values.items():
        if value == default:
            continue
        special = not re.fullmatch(r"[\w.-]+", module)
        if special or any(_ends(module, name) for name in values if name != module):
            module = "^" + re.escape(module)
        found[module] = value
    return found
