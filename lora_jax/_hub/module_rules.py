"""The rules of a PEFT config: which modules it adapts, with which rank and scale.

PEFT compares each entry of a config with each module. Models of experts have thousands
of both, so that here the entries are put in an index by their text once, and each name
is looked up by its parts. Only entries that need one are regular expressions.

PEFT's own rules are `check_target_module_exists` and `get_pattern_key`:
https://github.com/huggingface/peft/blob/main/src/peft/tuners/tuners_utils.py
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from lora_jax._hub.name_expressions import NameTest, compile_expression

# A key of a pattern field that needs no expression: perhaps "^" for the start of the
# name, and then characters that stand for themselves, or dots, which match any one.
SIMPLE = re.compile(r"(\^?)((?:[\w-]|\.|\\[^\w\s])*)")


MOST_EXPRESSIONS = 1000  # in one field, since each name is compared with each of them


class ModuleRules(NamedTuple):
    """The rules of a config, each a function of the name of a module."""

    is_target: NameTest  # whether PEFT would adapt it, if the model has it
    is_target_parameter: NameTest  # the same for a parameter, or the weight of a module
    is_saved: NameTest  # whether it is among those that are trained in full
    rank_and_scale: Callable[[str], tuple[int, float]]
    trained_rows: Callable[[str], list[int] | None]  # of a table, if some of them are
    has_all_linear: bool  # whether all linear modules are targets: the tensors tell


def module_rules(config: Mapping[str, Any]) -> ModuleRules:
    """Returns the rules of a config, prepared for many modules."""
    is_saved = saved_by(_entries(config, "modules_to_save"))
    is_excluded = _named_by(config.get("exclude_modules"))
    chosen = config.get("target_modules") or ()
    is_chosen, in_layers = _named_by(chosen), _layer_test(config)
    full_names = None if isinstance(chosen, str) else frozenset(chosen)

    def is_target(module: str) -> bool:
        if is_excluded(module) or is_saved(module) or not is_chosen(module):
            return False
        return full_names is None or module in full_names or in_layers(module)

    rank_key, alpha_key = (
        _first_key(config.get(field) or {})
        for field in ("rank_pattern", "alpha_pattern")
    )

    def rank_and_scale(module: str) -> tuple[int, float]:
        key = rank_key(module)
        r = config["r"] if key is None else config["rank_pattern"][key]
        key = alpha_key(module)
        alpha = config["lora_alpha"] if key is None else config["alpha_pattern"][key]
        return r, alpha / (math.sqrt(r) if config.get("use_rslora") else r)

    is_named = _named_by(config.get("target_parameters"))

    # A matrix that is a bare parameter of its module, such as a router's, has the keys
    # of a linear module.
    def is_target_parameter(name: str) -> bool:
        return is_named(name) or is_named(f"{name}.weight")

    rows = config.get("trainable_token_indices") or {}

    def trained_rows(module: str) -> list[int] | None:
        if isinstance(rows, list):  # those of the model's table of tokens
            return rows
        return next((rows[end] for end in _ends(module) if end in rows), None)

    return ModuleRules(
        is_target,
        is_target_parameter,
        is_saved,
        rank_and_scale,
        trained_rows,
        isinstance(chosen, str) and chosen.lower() == "all-linear",
    )


def check_expressions(config: Mapping[str, Any]) -> None:
    """Checks that each expression of a config is one, and can be matched in time.

    Raises:
      ValueError: If one is not. The text of the error continues a sentence.
    """
    checks: list[tuple[str, Callable[[Any], Any]]] = [
        *((field, _named_by) for field in ("target_modules", "exclude_modules")),
        *((field, _first_key) for field in ("rank_pattern", "alpha_pattern")),
        ("modules_to_save", lambda _: saved_by(_entries(config, "modules_to_save"))),
    ]
    for field, check in checks:
        try:
            check(config.get(field) or ())
        except ValueError as error:
            raise ValueError(f"has a {field} that {error}") from error
    for entry in _entries(config, "layers_pattern"):
        # Without quantifiers, an expression takes no longer than the name is.
        try:
            plain = re.fullmatch(r"[\w.|()-]+", entry) and re.compile(entry)
        except re.error:
            plain = None
        if not plain:
            raise ValueError(
                f"has the layers_pattern {entry!r}, and the name of a list of layers, "
                "or several as (layers|h), is needed"
            )


def unmatched_rows(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Returns the entries of trainable_token_indices that are none of these modules."""
    rows, modules = config.get("trainable_token_indices") or {}, list(modules)
    if isinstance(rows, list):
        return [] if modules else ["trainable_token_indices"]
    found = {end for module in modules for end in _ends(module)}
    return [f"trainable_token_indices {n!r}" for n in rows if n not in found]


def saved_by(entries: Iterable[str]) -> NameTest:
    """Returns the test whether PEFT trains a module in full for modules_to_save.

    Each entry is an expression for whole components anywhere in the name.
    """
    index = _index(entries)
    others = [
        compile_expression(rf"(^|.*\.){entry}($|\..*)", whole=False)
        for entry in index.expressions.values()
    ]

    def is_saved(module: str) -> bool:
        for end in _ends(module) if index.simple else ():
            for run in _starts(end):
                if next(_found(index, run, end == module), None) is not None:
                    return True
        return any(test(module) for test in others)

    return is_saved


def unique_keys(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Returns values other than the default, each by a key that no other name matches.

    A key is an expression for the end of a name, so that "q" would match "a.q" too.
    """
    others = {module: x for module, x in values.items() if x != default}
    plain = [module for module in others if re.fullmatch(r"[\w.-]+", module)]
    index = _index(plain)
    unique = {*plain} - {
        plain[i] for name in values for i in _matched(index, name) if plain[i] != name
    }
    return {
        module if module in unique else "^" + re.escape(module): x
        for module, x in others.items()
    }


def _entries(config: Mapping[str, Any], field: str) -> list[str]:
    value = config.get(field) or []
    return [value] if isinstance(value, str) else value


def _named_by(entries: str | Collection[str] | None) -> NameTest:
    """Returns the test of a field: an expression, or names that are the end of one."""
    if not entries:
        return lambda module: False
    if isinstance(entries, str):
        return compile_expression(entries, whole=True)
    known = frozenset(entries)
    return lambda module: any(end in known for end in _ends(module))


def _layer_test(config: Mapping[str, Any]) -> NameTest:
    """Returns the test whether a module is in one of the layers to transform."""
    layers = config.get("layers_to_transform")
    if layers in (None, []):
        return lambda module: True
    wanted = {layers} if type(layers) is int else {*layers}
    lead, patterns = r"(?:^|.*?\.)", _entries(config, "layers_pattern")
    if not patterns:
        lead, patterns = r".*?\.", ["[^.]*"]
    tests = [re.compile(rf"{lead}{pattern}\.(?P<index>\d+)\.") for pattern in patterns]

    def in_layers(module: str) -> bool:
        found = next((m for test in tests if (m := test.match(module))), None)
        return found is not None and int(found["index"]) in wanted

    return in_layers


def _first_key(keys: Iterable[str]) -> Callable[[str], str | None]:
    """Returns the function that finds the first key to match the end of a name."""
    keys = list(keys)
    index = _index(keys)
    others = {
        i: compile_expression(rf"(.*\.)?({key})$", whole=False)
        for i, key in index.expressions.items()
    }

    def first_key(module: str) -> str | None:
        first = min(_matched(index, module), default=len(keys))
        for i, test in others.items():
            if i > first:
                break
            if test(module):
                first = i
                break
        return keys[first] if first < len(keys) else None

    return first_key


class _Index(NamedTuple):
    """Entries by their text: those of one length with dots at the same positions."""

    # By the length, by the positions of the dots, and by the text: positions in the
    # list of entries, and whether each must match at the start of a name.
    simple: dict[int, dict[tuple[int, ...], dict[str, list[tuple[int, bool]]]]]
    expressions: dict[int, str]  # the other entries, by their positions


def _index(entries: Iterable[str]) -> _Index:
    index = _Index({}, {})
    for i, entry in enumerate(entries):
        found = SIMPLE.fullmatch(entry)
        if found is None:
            index.expressions[i] = entry
            if len(index.expressions) > MOST_EXPRESSIONS:
                raise ValueError(f"has more than {MOST_EXPRESSIONS} expressions")
            continue
        text, dots = "", []
        for escaped, character in re.findall(r"\\(.)|(.)", found[2]):
            if character == ".":
                dots.append(len(text))
            text += escaped or character
        by_dots = index.simple.setdefault(len(text), {})
        same = by_dots.setdefault(tuple(dots), {}).setdefault(text, [])
        same.append((i, found[1] == "^"))
    return index


def _found(index: _Index, text: str, is_start: bool) -> Iterator[int]:
    """Yields the positions of the simple entries that match a part of a name."""
    for dots, by_text in index.simple.get(len(text), {}).items():
        masked = text
        for i in dots:
            masked = f"{masked[:i]}.{masked[i + 1 :]}"
        for i, at_start in by_text.get(masked, ()):
            if is_start or not at_start:
                yield i


def _matched(index: _Index, module: str) -> Iterator[int]:
    """Yields the positions of the simple entries that match the end of a name."""
    for end in _ends(module) if index.simple else ():
        yield from _found(index, end, end == module)


def _ends(module: str) -> Iterator[str]:
    """Yields the name, and what is after each of its dots."""
    yield module
    at = module.find(".")
    while at >= 0:
        yield module[at + 1 :]
        at = module.find(".", at + 1)


def _starts(text: str) -> Iterator[str]:
    """Yields what is before each dot, and the text."""
    at = text.find(".")
    while at >= 0:
        yield text[:at]
        at = text.find(".", at + 1)
    yield text
