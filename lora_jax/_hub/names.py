"""The map of names: which PyTorch modules each leaf of a tree is.

It needs paths and patterns alone, no file and no values.
"""

import difflib
import functools
import itertools
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lora_jax._adapters import is_adapter
from lora_jax._patterns import as_patterns
from lora_jax._tree import Path, PyTree, flatten, listed, path_name

Name = str | Sequence[str] | Mapping[str, int]
Names = Mapping[str, Name] | Callable[[str], Name | None]

STACK_FIELDS = ("layer", "expert")  # what a name can count, the outer dimension first

# Flax models of transformers: the module around the model if it has a head, and the
# start of paths that each model has.
FAMILIES = {
    "bert": "encoder/layer/0/attention/self/",
    "transformer": "h/0/attn/c_attn/",
    "model": "layers/0/self_attn/",
}
# Their embeddings of tokens, and the heads that share those unless they have a kernel.
FLAX_HEADS = {
    "bert/embeddings/word_embeddings": "cls/predictions/decoder",
    "transformer/wte": "lm_head",
    "model/embed_tokens": "lm_head",
}


class ModuleNames(NamedTuple):
    """The names of the PyTorch modules that the map gives one leaf."""

    templates: tuple[str, ...]  # with {layer} and {expert} still in them
    sizes: tuple[int, ...] | None  # the outputs of each, if the map has them
    stacked: int  # how many dimensions, from the first, the names count
    order: int | None  # the position of the pattern in the map


def transformers_names(params: PyTree) -> dict[str, Name]:
    """Names the modules of a Flax model of Hugging Face transformers.

    The same model in PyTorch has the same paths, with dots. An embedding of tokens that
    is also the head has two names there, its own and the head's.

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
    paths = {map_path(path) for path in flatten(params) if not is_adapter(path)}
    starts = tuple(
        s for root, prefix in FAMILIES.items() for s in (prefix, f"{root}/{prefix}")
    )
    if not any(path.startswith(starts) for path in paths):
        raise ValueError(
            "These are not the parameters of a Flax BERT, GPT-2 or Llama of "
            "transformers: none of their paths starts with "
            f"{listed([*FAMILIES.values()])}. Write the map: names={{path: name}}."
        )
    names: dict[str, Name] = {}
    for table, head in FLAX_HEADS.items():
        has_head = head == "lm_head" or "cls/predictions/bias" in paths
        if f"{table}/embedding" in paths and has_head and f"{head}/kernel" not in paths:
            both = table.replace("/", "."), head.replace("/", ".")
            names[f"{table}/embedding"] = both
    for leaf in ("kernel", "embedding", "bias", "scale", "weight"):
        if any(path.endswith(f"/{leaf}") for path in paths):
            names[f"*/{leaf}"] = "{}"
    return names


def check_names(names: Names, paths: Iterable[Path]) -> None:
    """Checks that `names` is a map, and that each of its patterns matches a leaf."""
    if callable(names):
        return
    if not isinstance(names, Mapping):
        raise TypeError(
            "names is {pattern of a path: name of a module} or a function of a path, "
            f"found {type(names).__name__}."
        )
    weights = [path for path in paths if not is_adapter(path)]
    patterns = as_patterns(names, "names")
    plain = {pattern for pattern in patterns if "*" not in pattern}
    found = {run for path in weights for run in _runs(path) if run in plain}
    for pattern in patterns:
        matched = (match_stars(pattern, path) is not None for path in weights)
        if not (pattern in found if pattern in plain else any(matched)):
            raise ValueError(
                f"No leaf matches {pattern!r} of names. Close: "
                f"{similar_names(pattern, map(path_name, weights))}. Correct the "
                "pattern or remove it."
            )


def name_finder(names: Names) -> Callable[[Path], ModuleNames | None]:
    """Returns `module_names` of one map, prepared for many paths.

    A map can have a pattern for each of thousands of leaves. Those without a star are
    looked up by the runs of components of a path, instead of compared with each path.
    """
    if callable(names):
        return lambda path: _filled(names(map_path(path)), None, [], path)
    values = list(names.values())
    plain: dict[str, int] = {}
    starred: list[tuple[int, str]] = []
    for i, pattern in enumerate(pattern.strip("/") for pattern in names):
        if "*" in pattern:
            starred.append((i, pattern))
        else:
            plain.setdefault(pattern, i)

    def find(path: Path) -> ModuleNames | None:
        runs = _runs(path) if plain else ()
        first = min((plain[run] for run in runs if run in plain), default=len(values))
        for i, pattern in starred:
            if i > first:
                break
            stars = match_stars(pattern, path)
            if stars is not None:
                return _filled(values[i], i, stars, path)
        return _filled(values[first], first, [], path) if first < len(values) else None

    return find


def module_names(names: Names, path: Path) -> ModuleNames | None:
    """Returns the modules that the map gives a leaf, or `None` if it has no such leaf.

    Raises:
      TypeError: If the map gives no name, or something else than names.
      ValueError: If a name has braces that cannot be filled in.
    """
    return name_finder(names)(path)


def _filled(
    value: Name | None, order: int | None, stars: list[str], path: Path
) -> ModuleNames | None:
    """Returns the names that a value of the map gives a path."""
    if value is None:
        return None
    where = f"The name {value!r} of {path_name(path)!r}"
    several = isinstance(value, Sequence | Mapping) and not isinstance(value, str)
    given = list(value) if several else [value]
    templates = [template for template in given if isinstance(template, str)]
    if not all(templates) or not templates or len(templates) < len(given):
        raise TypeError(
            f"{where} is no module name. Write a name, several for the parts of a "
            "fused weight, or {name: outputs} for parts of unequal size."
        )
    sizes = tuple(value.values()) if isinstance(value, Mapping) else None
    if sizes is not None and not all(type(n) is int and n > 0 for n in sizes):
        raise ValueError(f"{where} must give each part's outputs, a whole number.")
    counted = {_stack_fields(template, where) for template in templates}
    if len(counted) > 1:
        raise ValueError(f"{where} counts layers or experts in some of its parts only.")
    # The stars are filled in now, {layer} and {expert} by a second format: braces that
    # the path has are escaped, so that the second one leaves them.
    stars = [escape_braces(text.replace("/", ".")) for text in stars]
    kept = {field: f"{{{field}}}" for field in STACK_FIELDS}
    try:
        filled = tuple(template.format(*stars, **kept) for template in templates)
    except IndexError:
        raise ValueError(
            f"{where} has more places {{}} than its pattern has stars: {len(stars)}."
        ) from None
    return ModuleNames(filled, sizes, len(counted.pop()), order)


def required_names(names: Names, paths: Iterable[Path]) -> dict[Path, ModuleNames]:
    """Returns the modules that the map gives each leaf, which must have a name."""
    find, found = name_finder(names), {}
    for path in paths:
        named = find(path)
        if named is None:
            patterns = similar_names(path_name(path), () if callable(names) else names)
            raise ValueError(
                f"names has no name for {path_name(path)!r}. Its patterns that come "
                f"close: {patterns}. Write names={{{path_name(path)!r}: "
                "'module.of.torch'}."
            )
        found[path] = named
    return found


def each_index(
    path: Path, named: ModuleNames, sizes: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[str, ...]]]:
    """Yields each index along a leaf's stacked dimensions, and the names there."""
    if len(sizes) < named.stacked:
        raise ValueError(
            f"The name {named.templates[0]!r} of {path_name(path)!r} counts "
            f"{named.stacked} stacked dimensions, and the leaf has {len(sizes)}. "
            "Remove {layer} or {expert} from it."
        )
    fields = [s for s in STACK_FIELDS if f"{{{s}}}" in named.templates[0]]
    for index in itertools.product(*map(range, sizes)):
        counts = dict(zip(fields, index, strict=True))
        yield index, tuple(template.format(**counts) for template in named.templates)


def match_stars(pattern: str, path: Path) -> list[str] | None:
    """Returns the text of each star of a pattern, or `None` if it does not match.

    As patterns do everywhere, it matches a run of complete components. The run begins
    as early as possible: the star of "*/kernel" is all of the path before it.
    """
    expression = _star_expression(pattern)
    for name in dict.fromkeys([map_path(path), path_name(path)]):
        found = expression.fullmatch(name)
        if found:
            return list(found.groups())
    return None


@functools.lru_cache(maxsize=4096)
def _star_expression(pattern: str) -> re.Pattern[str]:
    star = "([^/](?:.*?[^/])??)"
    middle = star.join(map(re.escape, pattern.split("*")))
    return re.compile(rf"(?:.*?/)??{middle}(?:/.*)?")


def _runs(path: Path) -> Iterator[str]:
    """Yields each run of complete components of a path."""
    parts = path_name(path).split("/")
    for i, j in itertools.combinations(range(len(parts) + 1), 2):
        yield "/".join(parts[i:j])


def similar_names(name: str, names: Iterable[str]) -> str:
    """Returns the names most similar to one that is not there, for a message."""
    return listed(difflib.get_close_matches(name, sorted(set(names)), n=6, cutoff=0.0))


def map_path(path: Path) -> str:
    """Returns the path as maps have it: without the "params/" of Flax's variables."""
    return path_name(path).removeprefix("params/")


def last_part(name: str) -> str:
    """Returns the last part of a module's name, "q_proj" of "layers.0.q_proj"."""
    return name.rpartition(".")[2]


def escape_braces(name: str) -> str:
    """Returns the template that `str.format` turns into this name."""
    return re.sub(r"([{}])", r"\1\1", name)


def _stack_fields(template: str, where: str) -> tuple[str, ...]:
    """Returns those of "layer" and "expert" that stand in a template."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{where} is no template: {error}.") from None
    if any("{" in text or "}" in text or spec or how for text, _, spec, how in parsed):
        raise ValueError(
            f"{where} is no template: only {{}}, a number in braces, {{layer}} and "
            "{expert} are places to fill in."
        )
    fields = [field for _, field, *_ in parsed]
    for field in fields:
        if field and not field.isdecimal() and field not in STACK_FIELDS:
            raise ValueError(
                f"{where} has a place {{{field}}}. Write {{}} for a star of the "
                "pattern, {layer} or {expert} for the number along a stack."
            )
    return tuple(stack for stack in STACK_FIELDS if stack in fields)
