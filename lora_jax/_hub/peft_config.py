"""PEFT's adapter_config.json: the modules that have an adapter, its rank and scale.

The fields: https://huggingface.co/docs/peft/package_reference/lora
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax._hub.folder_files import check_regular
from lora_jax._hub.module_rules import check_expressions, unique_keys
from lora_jax._tree import listed

CONFIG_FILE = "adapter_config.json"

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
# The last names of modules that PEFT takes for a table and its head, to tie them.
TIED_BY_PEFT = ("embed_tokens", "lm_head")
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
        "rank_pattern": unique_keys(ranks, r),
        "alpha_pattern": {k: number(x) for k, x in unique_keys(alphas, alpha).items()},
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


def read_config(path: str) -> dict[str, Any]:
    """Returns the config in a file, if every entry that changes a result is known.

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If it is no config of a plain LoRA or DoRA.
    """
    check_regular(path)  # opening a pipe would wait for a writer
    with open(path, encoding="utf-8") as file:
        try:
            config = json.load(file, object_pairs_hook=_once)
            problem = _problem(config)
        except RecursionError:
            raise ValueError(f"{path} has too many levels within each other.") from None
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}.") from error
    if problem:
        raise ValueError(f"{path} {problem}")
    return config


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the dict of the entries of a JSON object, each of which has its own key.

    Python and PEFT take the last of several, and other programs take the first.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
        raise ValueError(f"it has {listed(keys)} more than once")
    return found


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
    try:
        check_expressions(config)
    except ValueError as error:
        return f"{error}. Write the names of the modules instead."
    return None
