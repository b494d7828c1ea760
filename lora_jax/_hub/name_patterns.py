"""A map that a reader can check: patterns where layers repeat, and no path twice."""

import re
from collections.abc import Mapping, Sequence

from lora_jax._hub.names import Name, escaped, inner, naming_of
from lora_jax._tree import Path

NUMBER = re.compile(r"\d+")


def template_of(
    names: Mapping[tuple[int, ...], str], counts: Sequence[int]
) -> str | None:
    """The one name that counts a stack: "layers.{layer}.q"; `None` if there is none."""
    split = {at: _split(name) for at, name in names.items()}
    tokens = next(iter(split.values()))
    if len({len(own) for own in split.values()}) > 1:
        return None
    used: set[int] = set()
    for dim, size in enumerate(counts):
        numbered = [
            i
            for i in range(1, len(tokens), 2)
            if all(own[i] == str(at[dim]) for at, own in split.items())
        ]
        if size == 1:  # one layer: its number is the first 0, if it has any
            numbered = [i for i in numbered if i not in used][:1]
        if len(numbered) != 1 or numbered[0] in used:
            return None
        used.add(numbered[0])
    # The outer one is the layer, or the expert where the name says so.
    order = sorted(used)
    labels = ["layer", "expert"] if len(order) == 2 else ["layer"]
    if len(order) == 1 and "expert" in tokens[order[0] - 1].rpartition(".")[0][-8:]:
        labels = ["expert"]
    made = [escaped(text) for text in tokens]
    for i, label in zip(order, labels, strict=True):
        made[i] = f"{{{label}}}"
    template = "".join(made)
    for at, name in names.items():
        filled = dict(zip(labels, at, strict=True))
        if template.format(**filled) != name:
            return None
    return template


def readable(found: Mapping[Path, Name]) -> dict[str, Name]:
    """The same map with a star for each number that counts layers, where it can be."""
    groups: dict[str, list[Path]] = {}
    for path in found:
        groups.setdefault(NUMBER.sub("#", inner(path)), []).append(path)
    names: dict[str, Name] = {}
    for members in groups.values():
        made = _pattern(members, found) if len(members) > 1 else None
        names |= made or {inner(path): found[path] for path in members}
    if any(_said(names, p) != _said({inner(p): found[p]}, p) for p in found):
        # A pattern of one group meets another's path.
        return {inner(path): name for path, name in found.items()}
    return names


def _pattern(
    members: Sequence[Path], found: Mapping[Path, Name]
) -> dict[str, Name] | None:
    """One pattern, and its name, for paths that differ in numbers alone."""
    numbers = [NUMBER.findall(inner(path)) for path in members]
    stars = [i for i, own in enumerate(zip(*numbers, strict=True)) if len({*own}) > 1]
    counted = {i: [own[i] for own in numbers] for i in stars}
    texts = NUMBER.split(inner(members[0]))
    pattern = texts[0]
    for i, text in enumerate(texts[1:]):
        pattern += ("*" if i in stars else numbers[0][i]) + text
    made = _with_places([_names(found[p]) for p in members], counted)
    if made is None:
        return None
    first = found[members[0]]
    if isinstance(first, str):
        return {pattern: made[0]}
    if isinstance(first, Mapping):
        sizes = {tuple(found[p].values()) for p in members}
        if len(sizes) > 1:
            return None
        return {pattern: dict(zip(made, first.values(), strict=True))}
    return {pattern: made}


def _with_places(
    names: Sequence[tuple[str, ...]], counted: Mapping[int, Sequence[str]]
) -> tuple[str, ...] | None:
    """The names of the first, with a place for what each star stands for."""
    if len({len(own) for own in names}) > 1:
        return None
    made = []
    for column in zip(*names, strict=True):
        split = [_split(name) for name in column]
        if len({len(own) for own in split}) > 1:
            return None
        text, used = "", []
        for i, tokens in enumerate(zip(*split, strict=True)):
            if len({*tokens}) == 1:
                text += tokens[0]
                continue
            stars = [s for s, own in counted.items() if [*own] == [*tokens]]
            if i % 2 == 0 or not stars:
                return None
            used.append([*counted].index(stars[0]))
            text += f"{{{used[-1]}}}"
        in_order = used == list(range(len(counted)))
        made.append(re.sub(r"\{\d+\}", "{}", text) if in_order else text)
    return tuple(made)


def _names(name: Name) -> tuple[str, ...]:
    return (name,) if isinstance(name, str) else tuple(name)


def _said(names: Mapping[str, Name], path: Path) -> object:
    found = naming_of(names, path)
    return found and found._replace(order=None)


def _split(name: str) -> list[str]:
    """Text and numbers in turn, text first."""
    return re.split(r"(\d+)", name)
