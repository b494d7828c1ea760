"""The map in as few lines as possible: patterns for the numbers of layers.

Names that only differ in numbers become one template: with {layer} and {expert} for the
modules of a stack, and with a star and a place {} for paths that differ, too.
"""

import re
from collections.abc import Mapping, Sequence

from lora_jax._hub.names import (
    ModuleNames,
    Name,
    escape_braces,
    map_path,
    module_names,
    name_finder,
)
from lora_jax._tree import Path

NUMBER = re.compile(r"(\d+)")  # re.split gives text and numbers in turn, text first


def stack_template(
    names: Mapping[tuple[int, ...], str], counts: Sequence[int]
) -> str | None:
    """Returns the template of the names of a stack, as "layers.{layer}.q".

    Args:
      names: Of the module at each index.
      counts: The sizes of the stacked dimensions.

    Returns:
      The template, or `None` if the names do not count each dimension from 0.
    """
    split = {at: NUMBER.split(name) for at, name in names.items()}
    tokens = next(iter(split.values()))
    if len({len(pieces) for pieces in split.values()}) > 1:
        return None
    used: set[int] = set()
    for dim, size in enumerate(counts):
        numbered = [
            i
            for i in range(1, len(tokens), 2)
            if all(pieces[i] == str(at[dim]) for at, pieces in split.items())
        ]
        if size == 1:  # one layer: its number is the first 0, if it has any
            numbered = [i for i in numbered if i not in used][:1]
        if len(numbered) != 1 or numbered[0] in used:
            return None
        used.add(numbered[0])
    # The outer number is the layer's, or the expert's if the name has that word.
    order = sorted(used)
    labels = ["layer", "expert"] if len(order) == 2 else ["layer"]
    if len(order) == 1 and "expert" in tokens[order[0] - 1].rpartition(".")[0][-8:]:
        labels = ["expert"]
    tokens = [escape_braces(text) for text in tokens]
    for i, label in zip(order, labels, strict=True):
        tokens[i] = f"{{{label}}}"
    template = "".join(tokens)
    for at, name in names.items():
        if template.format(**dict(zip(labels, at, strict=True))) != name:
            return None
    return template


def with_stars(found: Mapping[Path, Name]) -> dict[str, Name]:
    """Returns the map with a star for each number that counts layers, if possible."""
    groups: dict[tuple[str, ...], list[Path]] = {}
    for path in found:
        texts = tuple(NUMBER.split(map_path(path))[::2])
        groups.setdefault(texts, []).append(path)
    names: dict[str, Name] = {}
    for members in groups.values():
        pattern = _pattern(members, found) if len(members) > 1 else None
        names |= pattern or {map_path(path): found[path] for path in members}
    named_as = name_finder(names)
    for path, name in found.items():
        own = module_names({map_path(path): name}, path)
        if _without_order(named_as(path)) != _without_order(own):
            # A pattern of one group matches a path of another.
            return {map_path(path): name for path, name in found.items()}
    return names


def _pattern(
    members: Sequence[Path], found: Mapping[Path, Name]
) -> dict[str, Name] | None:
    """Returns one pattern, and its name, for paths that differ in numbers alone."""
    split = [NUMBER.split(map_path(path)) for path in members]
    columns = list(zip(*split, strict=True))
    pattern = "".join("*" if len({*column}) > 1 else column[0] for column in columns)
    stars = [column for column in columns if len({*column}) > 1]
    names = [found[path] for path in members]
    templates = _templates([_parts(name) for name in names], stars)
    if templates is None:
        return None
    if isinstance(names[0], str):
        return {pattern: templates[0]}
    if not isinstance(names[0], Mapping):
        return {pattern: templates}
    sizes = {tuple(name.values()) for name in names if isinstance(name, Mapping)}
    if len(sizes) > 1:
        return None
    return {pattern: dict(zip(templates, sizes.pop(), strict=True))}


def _templates(
    names: Sequence[tuple[str, ...]], stars: Sequence[tuple[str, ...]]
) -> tuple[str, ...] | None:
    """Returns the names of all paths in one, with a place for the text of each star."""
    if len({len(pieces) for pieces in names}) > 1:
        return None
    templates = []
    for parts in zip(*names, strict=True):
        split = [NUMBER.split(name) for name in parts]
        if len({len(pieces) for pieces in split}) > 1:
            return None
        text, used = "", []
        for i, tokens in enumerate(zip(*split, strict=True)):
            if len({*tokens}) == 1:
                text += tokens[0]
            elif i % 2 and tokens in stars:
                used.append(stars.index(tokens))
                text += f"{{{used[-1]}}}"
            else:
                return None
        in_order = used == list(range(len(stars)))
        templates.append(re.sub(r"\{\d+\}", "{}", text) if in_order else text)
    return tuple(templates)


def _parts(name: Name) -> tuple[str, ...]:
    return (name,) if isinstance(name, str) else tuple(name)


def _without_order(named: ModuleNames | None) -> ModuleNames | None:
    return named and named._replace(order=None)
