"""Matches patterns of paths. A pattern that matches nothing is an error.

A pattern that silently matched nothing would leave a weight without the adapter, the
rank or the format that the caller asked for.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapters import is_adapter
from lora_jax._tree import Path, components, is_array, listed, path_name, unbox

Patterns = str | Iterable[str]
Selector = Patterns | Callable[[str, Any], bool]

WILDCARDS = frozenset("*?[")
# PyTorch's and PEFT's names of modules that have other names in Flax.
TORCH_NAMES = ("all-linear", "*_proj", "*.*", "c_attn", "c_fc", "c_proj", "fc[12]")


def matches(pattern: str, path: Path) -> bool:
    """Whether a pattern matches a run of whole components; `*` may cross slashes.

    A key that is itself a path, "layers.q.kernel", has the components of the nested
    tree, and a pattern may be written with its separators or with slashes.
    """
    return _fits(pattern, _spellings(path))


def _spellings(path: Path) -> tuple[str, ...]:
    """The path as text, and the path of the nested tree if that differs."""
    name, nested = path_name(path), "/".join(components(path))
    return (name,) if nested == name else (name, nested)


def _fits(pattern: str, spellings: Sequence[str]) -> bool:
    name, *nested = spellings
    # A name may contain a bracket, "w[0,1]", which fnmatch interprets.
    if name == pattern or _is_run(pattern, name):
        return True
    if not nested:
        return False
    written = {pattern, pattern.replace(".", "/"), "/".join(components((pattern,)))}
    return any(_is_run(each, *nested) for each in written)


def _is_run(pattern: str, name: str) -> bool:
    if WILDCARDS.isdisjoint(pattern):  # as fnmatch does, in a tenth of its time
        return f"/{pattern}/" in f"/{name}/"
    return fnmatchcase(f"/{name}/", f"*/{pattern}/*")


def as_patterns(patterns: Patterns, name: str) -> tuple[str, ...]:
    """Returns one pattern or several as a tuple of distinct, non-empty strings."""
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        patterns = (patterns,)
    patterns = tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.strip("/"):
            raise ValueError(f"{name} takes patterns of paths, found {pattern!r}.")
    patterns = tuple(pattern.strip("/") for pattern in patterns)
    if len(set(patterns)) < len(patterns):
        raise ValueError(f"{name} has one pattern twice, in {listed(patterns)}.")
    return patterns


def match_each(
    patterns: Sequence[str],
    paths: Sequence[Path],
    name: str,
    leaves: Mapping[Path, Any] | None = None,
) -> list[Path]:
    """Returns the paths that any of the patterns matches.

    Args:
      patterns: The patterns.
      paths: The paths to choose from.
      name: The argument that holds the patterns, for messages.
      leaves: The leaves of the tree, for the message about a pattern that matches only
        leaves that are not among `paths`.

    Raises:
      ValueError: If a pattern matches no path.
    """
    spelled = [_spellings(path) for path in paths]
    names, written = {name for name, *_ in spelled}, set(patterns)
    for pattern in patterns:
        if pattern not in names and not any(_fits(pattern, each) for each in spelled):
            raise ValueError(_no_match(pattern, paths, name, leaves or {}))
    return [
        path
        for path, each in zip(paths, spelled, strict=True)
        if each[0] in written or any(_fits(pattern, each) for pattern in patterns)
    ]


def select(
    leaves: Mapping[Path, Any], weights: list[Path], selector: Selector, name: str
) -> list[Path]:
    """Returns the weights that patterns, or a function of path and array, select."""
    if callable(selector):
        return [p for p in weights if selector(path_name(p), unbox(leaves[p]))]
    return match_each(as_patterns(selector, name), weights, name, leaves)


def by_pattern(
    values: Mapping[str, Any], chosen: list[Path], name: str
) -> dict[Path, Any]:
    """Returns the value of the first pattern that matches each path.

    Raises:
      ValueError: If a pattern is the first match of no path.
    """
    patterns = as_patterns(values, name)
    stripped = dict(zip(patterns, values.values(), strict=True))
    first = {}
    for path in match_each(patterns, chosen, name):
        spellings = _spellings(path)
        first[path] = next(p for p in patterns if _fits(p, spellings))
    used = set(first.values())
    for pattern in patterns:
        if pattern not in used:
            raise ValueError(
                f"The {name} of {pattern!r} is never used: earlier patterns match all "
                "that it does, and the first wins. Put it before them."
            )
    return {path: stripped[pattern] for path, pattern in first.items()}


def collapsed(paths: Iterable[Path]) -> list[str]:
    """Returns patterns of some paths, one for layers that differ only in a number."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        parts = (re.sub(r"(^|_)\d+$", r"\1*", part) for part in components(path))
        groups.setdefault("/".join(parts), []).append(path)
    return [
        pattern if len(same) > 1 else path_name(same[0])
        for pattern, same in groups.items()
    ]


def _no_match(
    pattern: str, paths: Sequence[Path], name: str, leaves: Mapping[Path, Any]
) -> str:
    for path, leaf in leaves.items():
        w = unbox(leaf)
        if matches(pattern, path) and is_array(w) and not is_adapter(path):
            is_key = jnp.issubdtype(w.dtype, jax.dtypes.prng_key)
            return (
                f"No weight matches {pattern!r} of {name}: {path_name(path)!r} is "
                f"{'a random key' if is_key else w.dtype} of shape {w.shape}. "
                f"{_advice(name)}"
            )
    names = [path_name(path) for path in paths]
    parts = sorted({part for path in paths for part in components(path)})
    dotted = any("." in name for name in names)
    pieces = (pattern.replace(".", "/") if dotted else pattern).split("/")
    closest = (difflib.get_close_matches(p, parts, n=1) or [p] for p in pieces)
    better = "/".join(match for match, *_ in closest)
    close = [n for n, path in zip(names, paths, strict=True) if matches(better, path)]
    if close:
        takes_mapping = name in ("rank", "alpha", "kinds")
        write = f"{{{better!r}: ...}}" if takes_mapping else f"[{better!r}]"
        advice = f"Write {name}={write}."
    else:
        close = difflib.get_close_matches(pattern, names, n=6, cutoff=0.0)
        modules = dict.fromkeys(_module(path) for path in paths)
        advice = f"Their names end in {listed(list(modules))}. {_advice(name)}"
        torch = (known for known in TORCH_NAMES if known != "*.*" or not dotted)
        if any(fnmatchcase(pattern, known) for known in torch):
            advice += f" {pattern!r} is a name of PyTorch: write those of Flax here"
            advice += ", or no targets for all kernels." if name == "targets" else "."
    return f"No weight matches {pattern!r} of {name}. Close: {listed(close)}. {advice}"


def _module(path: Path) -> str:
    """Returns the last component that distinguishes weights."""
    *_, module, name = ("", *components(path[-2:]))
    return module if module and name in ("kernel", "embedding") else name


def _advice(name: str) -> str:
    if name == "also":
        return "A leaf that is trained must be floating."
    return (
        "A weight is floating, has 2 or more dimensions and is no norm or bias by its "
        "name."
    )
