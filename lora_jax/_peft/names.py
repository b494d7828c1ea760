"""Which PyTorch modules a weight is: our paths and Hugging Face's names.

Knows names and shapes, not files or values.
"""

import difflib
import itertools
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax._adapters import is_adapter
from lora_jax._patterns import as_patterns
from lora_jax._tree import Path, flatten, listed, path_name

Name = str | Sequence[str] | Mapping[str, int]
Names = Mapping[str, Name] | Callable[[str], Name | None]

STACKS = ("layer", "expert")  # what a name may count, the outer one first

# Flax models of transformers, by a path that each has, with its head's root or without.
FAMILIES = {
    "bert": "encoder/layer/0/attention/self/",
    "transformer": "h/0/attn/c_attn/",
    "model": "layers/0/self_attn/",
}


class Naming(NamedTuple):
    """What a map says of one leaf: the modules that it is, or is a stack of."""

    templates: tuple[str, ...]  # names, in which {layer} and {expert} still stand
    sizes: tuple[int, ...] | None  # outputs of each, where the map says them
    stacked: int  # how many dimensions, from the first, the names count
    order: int | None  # of the pattern in the map


def transformers_names(params: Any) -> dict[str, Name]:
    """Names the modules of a Flax model of Hugging Face transformers.

    Their PyTorch twins have the same paths, with dots. A table of tokens that is the
    head too has two names there, the lookup's and the head's.

    Args:
      params: The parameters of a Flax BERT, GPT-2 or Llama with any head, or none; or
        of a model with their layout. With adapters or without.

    Returns:
      The map for `export_peft` and `import_peft`, a plain dict to print and change.

    Raises:
      ValueError: If `params` has none of the three layouts.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> layer = {"attn": {"c_attn": {"kernel": jnp.ones((12, 4))}}}
      >>> params = {"h": {"0": layer}, "wte": {"embedding": jnp.ones((9, 4))}}
      >>> lj.transformers_names({"transformer": params})["transformer/wte/embedding"]
      ('transformer.wte', 'lm_head')
    """
    paths = {inner(path) for path in flatten(params) if not is_adapter(path)}
    for root, mark in FAMILIES.items():
        if any(path.startswith((mark, f"{root}/{mark}")) for path in paths):
            break
    else:
        raise ValueError(
            "These are not the parameters of a Flax BERT, GPT-2 or Llama of "
            "transformers: none of their paths starts with "
            f"{listed(list(FAMILIES.values()))}. Write the map: names={{path: name}}."
        )
    head = "lm_head/kernel", "lm_head"
    tables = {
        "bert/embeddings/word_embeddings": (
            "cls/predictions/decoder/kernel",
            "cls.predictions.decoder",
        ),
        "transformer/wte": head,
        "model/embed_tokens": head,
    }
    names: dict[str, Name] = {}
    for table, (own, head) in tables.items():
        has_head = table[:4] != "bert" or "cls/predictions/bias" in paths
        if f"{table}/embedding" in paths and has_head and own not in paths:
            names[f"{table}/embedding"] = (table.replace("/", "."), head)
    for leaf in ("kernel", "embedding", "bias", "scale", "weight"):
        if any(path.endswith(f"/{leaf}") for path in paths):
            names[f"*/{leaf}"] = "{}"
    return names


def check_names(names: Names, paths: Iterable[Path]) -> None:
    """Every pattern of a map must match a leaf: one that does not is a slip."""
    if callable(names):
        return
    if not isinstance(names, Mapping):
        raise TypeError(
            "names is {pattern of a path: name of a module} or a function of a path, "
            f"found {type(names).__name__}."
        )
    own = [path for path in paths if not is_adapter(path)]
    for pattern in as_patterns(names, "names"):
        if not any(captures(pattern, path) is not None for path in own):
            raise ValueError(
                f"No leaf matches {pattern!r} of names. Close: "
                f"{listed(near(pattern, map(path_name, own)))}. Correct the pattern or "
                "remove it."
            )


def naming_of(names: Names, path: Path) -> Naming | None:
    """The modules of one leaf, or `None` if the map does not speak of it."""
    if callable(names):
        value, found, order = names(inner(path)), (), None
    else:
        value = order = None
        for i, (pattern, name) in enumerate(names.items()):
            found = captures(pattern.strip("/"), path)
            if found is not None:
                value, order = name, i
                break
    if value is None:
        return None
    where = f"The name of {path_name(path)!r}, {value!r},"
    sizes = tuple(value.values()) if isinstance(value, Mapping) else None
    several = isinstance(value, Sequence | Mapping) and not isinstance(value, str)
    templates = tuple(value) if several else (value,)
    if not templates or not all(isinstance(t, str) and t for t in templates):
        raise TypeError(
            f"{where} is no module name. Write a name, several for parts of one weight "
            "side by side, or {name: outputs} for parts of unequal size."
        )
    if sizes is not None and not all(type(n) is int and n > 0 for n in sizes):
        raise ValueError(f"{where} must give each part's outputs, a whole number.")
    counted = {_counted(template, where) for template in templates}
    if len(counted) > 1:
        raise ValueError(f"{where} counts layers or experts in some of its parts only.")
    # A captured path becomes a dotted name; layers and experts are filled in later, by
    # a second format, which takes its braces for ours.
    found = [escaped(text.replace("/", ".")) for text in found]
    kept = {stack: f"{{{stack}}}" for stack in STACKS}
    try:
        templates = tuple(template.format(*found, **kept) for template in templates)
    except IndexError:
        raise ValueError(
            f"{where} has more places {{}} than its pattern has stars: {len(found)}."
        ) from None
    return Naming(templates, sizes, len(counted.pop()), order)


def numbered(
    naming: Naming, sizes: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[str, ...]]]:
    """For each layer and expert that the names count, its index and its names."""
    if len(sizes) < naming.stacked:
        raise ValueError(
            f"The name {naming.templates[0]!r} counts {naming.stacked} stacked "
            f"dimensions, and a leaf of that name has {len(sizes)}. Take {{layer}} or "
            "{expert} out of it."
        )
    stacks = [s for s in STACKS if f"{{{s}}}" in naming.templates[0]]
    for index in itertools.product(*map(range, sizes)):
        counts = dict(zip(stacks, index, strict=True))
        yield index, tuple(template.format(**counts) for template in naming.templates)


def captures(pattern: str, path: Path) -> list[str] | None:
    """What the stars of a pattern stand for, or `None` if it does not match.

    It matches a run of whole components, as patterns do everywhere, that begins as
    early as it can: the star of "*/kernel" is all that comes before.
    """
    star = "([^/](?:.*?[^/])??)"
    middle = star.join(map(re.escape, pattern.split("*")))
    # A whole tree of variables has one component more, which PyTorch knows nothing of.
    for name in dict.fromkeys([inner(path), path_name(path)]):
        found = re.fullmatch(rf"(?:.*?/)??{middle}(?:/.*)?", name)
        if found:
            return list(found.groups())
    return None


def near(name: str, names: Iterable[str]) -> list[str]:
    """The names most like one that is not there."""
    return difflib.get_close_matches(name, sorted(set(names)), n=6, cutoff=0.0)


def inner(path: Path) -> str:
    """The path as maps write it: PyTorch knows nothing of a tree of variables."""
    return path_name(path).removeprefix("params/")


def escaped(name: str) -> str:
    """A name as a template that says the same."""
    return re.sub(r"([{}])", r"\1\1", name)


def _counted(template: str, where: str) -> tuple[str, ...]:
    """Which of layers and experts a template counts."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{where} is no template: {error}.") from None
    if any("{" in text or "}" in text or spec or how for text, _, spec, how in parsed):
        raise ValueError(
            f"{where} is no template: braces stand around {{}}, a number, "
            "{layer} or {expert} alone."
        )
    fields = [field for _, field, *_ in parsed]
    for field in fields:
        if field and not field.isdecimal() and field not in STACKS:
            raise ValueError(
                f"{where} has a place {{{field}}}. There are {{}} for the stars of the "
                "pattern, {layer} and {expert} for what is stacked."
            )
    return tuple(stack for stack in STACKS if stack in fields)
