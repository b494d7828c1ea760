"""Plans how adapters of other libraries become ours: which, with which axes and scale.

Everything here reads paths and shapes alone and runs before any array is made.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from lora_jax._adapters import Axes, Shape
from lora_jax._factor_axes import possible_axes, significant
from lora_jax._flax_names import is_floating, is_table
from lora_jax._layouts import (
    QWIX,
    WRAPPER,
    Foreign,
    find_foreign,
    layout_table,
    looks_foreign,
)
from lora_jax._patterns import as_patterns, by_pattern, matches
from lora_jax._tree import Path, components, is_array, listed, path_name, unbox

Number = float | jax.Array

# The einsums of openpi, src/openpi/models/gemma.py. "BTD,NDH->BTNH" and
# "BSD,2KDH->2BSKH" keep the heads, so each head has factors of its own. For
# "BTNH,NHD->BTD" the product with the first factor sums over the heads already, and the
# product with the second sums that factor over them.
PER_HEAD = re.compile(r"(q|kv|qkv)_einsum(_\d+)?")
SUMMED = re.compile(r"attn_vec_einsum(_\d+)?")


class Reading(NamedTuple):
    """How to read an adapter.

    Attributes:
      axes: The dimensions of the weight.
      summed: The dimensions of the second factor to sum over.
    """

    axes: Axes
    summed: tuple[int, ...] = ()


def recognized(leaves: Mapping[Path, Any]) -> list[Foreign]:
    """Returns the adapters of the one library that explains every leaf of an adapter.

    Raises:
      ValueError: If there are no such adapters, or leaves that no row explains, or
        adapters of several libraries or of this one.
    """
    parts = [path for path in leaves if looks_foreign(path)]
    ends = ("lora_scale", "lora_magnitude", "lora_w")
    if ours := [path for path in parts if str(path[-1]).endswith(ends)]:
        raise ValueError(
            f"{path_name(ours[0])!r} belongs to an adapter of lora_jax. adopt takes a "
            "tree with adapters of one other library, and no others."
        )
    found = find_foreign(leaves)
    factors = {
        library: {path for x in adapters for path in (x.a, x.b)}
        for library, adapters in found.items()
    }
    complete = [library for library in found if factors[library].issuperset(parts)]
    if not complete:
        explained = set().union(*factors.values())
        unknown = [path for path in parts if path not in explained]
        raise ValueError(_unexplained(leaves, parts, unknown, found))
    fits = lambda library: all(_options(x, leaves) for x in found[library])
    adapters = found[next(filter(fits, complete), complete[0])]
    seen: dict[Path, Path] = {}
    for adapter in adapters:
        if (other := seen.setdefault(adapter.weight, adapter.a)) != adapter.a:
            raise ValueError(
                f"{path_name(adapter.weight)!r} has two adapters, {path_name(other)!r} "
                f"and {path_name(adapter.a)!r}. Remove one of them."
            )
    return adapters


def _unexplained(
    leaves: Mapping[Path, Any],
    parts: list[Path],
    unknown: list[Path],
    found: Mapping[str, list[Foreign]],
) -> str:
    """Returns the message for parts of adapters that no single library explains."""
    rows = f"adopt reads these layouts:\n\n{layout_table()}"
    if not parts:
        return f"These parameters have no adapters of another library. {rows}"
    if not unknown:
        pairs = [f"{library}: {path_name(x[0].a)}" for library, x in found.items()]
        return (
            f"These parameters have adapters of several libraries, {listed(pairs)}. "
            "Adopt those of each from a tree without the others: add(one, two)."
        )
    if len(parts) == len(leaves):
        return (
            f"{listed(unknown)}: these are factors without their weights. Pass one "
            "tree with both, such as nnx.merge_state(nnx.state(model), factors) or "
            "gemma.peft.merge_params(params, factors)."
        )
    for path in unknown:
        weight = (*path[:-1], str(path[-1]).removesuffix("_lora_a"))
        if any(p[: len(weight)] == weight and p != weight for p in leaves):
            return (
                f"{path_name(weight)!r}, the weight of {path_name(path)!r}, is several "
                "leaves, as qwix stores a quantized weight. Put the original weight or "
                "qwix.dequantize(...) in its place; to quantize it as lora_jax does, "
                "write quantize(adopt(params, alpha=...), how)."
            )
    return (
        f"{listed(unknown)}: no layout has a leaf of this name next to a weight. "
        f"Remove such leaves, or rename them. {rows}"
    )


def moved_paths(
    leaves: Mapping[Path, Any], adapters: list[Foreign]
) -> dict[Path, Path]:
    """Returns the path of each leaf in the tree of the plain model.

    It differs for layers in an `nnx.LoRA`, which stand alone in the plain model.
    """
    wrapped = [x for x in adapters if x.layout.weight.startswith(f"{WRAPPER}/")]
    for adapter in wrapped:
        if adapter.weight[-2:-1] != (WRAPPER,):
            raise ValueError(
                f"{path_name(adapter.weight)!r} is the weight of a layer in an "
                "nnx.LoRA, in a tree with path-like keys. Nest the keys, "
                "flax.traverse_util.unflatten_dict(params, sep='/')."
            )
    wrappers = {adapter.weight[:-1] for adapter in wrapped}
    for path in leaves:
        if deep := [path[:n] for n in range(1, len(path) - 1) if path[:n] in wrappers]:
            raise ValueError(
                f"{path_name(deep[0])!r} holds more than one layer, and its nnx.LoRA "
                "adapts them together, not its kernel. Wrap each layer."
            )
    kept = lambda path, i: path[: i + 1] not in wrappers
    new = {p: tuple(k for i, k in enumerate(p) if kept(p, i)) for p in leaves}
    seen: dict[Path, Path] = {}
    for path, to in new.items():
        if (other := seen.setdefault(to, path)) != path:
            raise ValueError(
                f"{path_name(other)!r} and {path_name(path)!r} would have one path "
                f"without the nnx.LoRA, {path_name(to)!r}. Rename one of them."
            )
    return new


def reading(
    adapter: Foreign, path: Path, leaves: Mapping[Path, Any], known: Mapping[str, Axes]
) -> Reading:
    """Returns how to read an adapter.

    Args:
      adapter: The adapter.
      path: The path of its weight in the plain model, for messages and `known`.
      leaves: The leaves of the tree.
      known: The axes that the caller gives, by path.

    Raises:
      ValueError: If the factors do not fit the weight, or in several ways.
    """
    weight, name = leaves[adapter.weight], path_name(path)
    if not is_floating(adapter.weight, weight):
        found = unbox(weight)
        kind = found.dtype if is_array(found) else type(found).__name__
        raise ValueError(
            f"{name!r}, which has an adapter of {adapter.layout.library}, is {kind}, "
            "not floating. Put the weight from before it was quantized in its place."
        )
    if adapter.layout.library == QWIX and is_table(path) and name not in known:
        raise ValueError(
            f"{name!r} is a table, and qwix adapts its product as a head but not its "
            "lookup, which no adapter of the table does. If it is only the head, write "
            f"axes={{{name!r}: Axes((), (1,), (0,))}}."
        )
    options = _options(adapter, leaves)
    w, a, b = _shapes(adapter, leaves)
    names = path_name(adapter.a), path_name(adapter.b)
    described = f"{names[0]!r} {a} and {names[1]!r} {b} for {name!r} {w}"
    if not options:
        raise ValueError(
            f"{described} make no update in the layout of {adapter.layout.library}. "
            "Restore them with the weights that they were trained for."
        )
    options = _preferred(adapter, options, known.get(name), w)
    if len(options) > 1:
        raise ValueError(
            f"{described} make different updates, depending on which dimensions of the "
            f"weight are inputs: {listed([str(x.axes) for x in options])}. Write "
            f"axes={{{name!r}: Axes(batch, inputs, outputs)}}, or axes=find_axes(fn, "
            "base, *args) with the plain model and its parameters."
        )
    return options[0]


def scales(
    adapters: Mapping[Path, Foreign],
    alpha: Number | Mapping[str, Number] | None,
    leaves: Mapping[Path, Any],
) -> dict[Path, Number]:
    """Returns the scale of each adapter, by the path of its weight.

    Raises:
      ValueError: If the layout does not fix a scale and alpha does not give it; or if
        alpha names an adapter whose scale is fixed.
    """
    ranks = {path: unbox(leaves[x.a]).shape[-1] for path, x in adapters.items()}
    fixed = {p: 1.0 for p, adapter in adapters.items() if adapter.layout.alpha is None}
    unknown = [path for path in adapters if path not in fixed]
    library = next(iter(adapters.values())).layout.library
    if alpha is not None and not unknown:
        raise ValueError(
            f"{library} scales these updates by 1, whatever the rank. Write "
            "adopt(params), without alpha."
        )
    if isinstance(alpha, Mapping):
        for pattern in as_patterns(alpha, "alpha"):
            hit = [path for path in fixed if matches(pattern, path)]
            if hit and not any(matches(pattern, path) for path in unknown):
                raise ValueError(
                    f"alpha names {path_name(hit[0])!r}, whose update {library} scales "
                    f"by 1. Remove {pattern!r}."
                )
        alphas = by_pattern(alpha, unknown, "alpha")
    else:
        alphas = {} if alpha is None else dict.fromkeys(unknown, alpha)
    if missing := [path for path in unknown if path not in alphas]:
        pattern = "" if alpha is None else f"{{..., {path_name(missing[0])!r}: ...}}"
        raise ValueError(
            f"The tree has no scale of {listed(missing)}: {library} multiplies these "
            "updates by alpha / rank, and keeps alpha elsewhere. Write "
            f"adopt(params, alpha={pattern or '...'}) with its "
            f"{adapters[missing[0]].layout.alpha}, in training."
        )
    return fixed | {path: x / ranks[path] for path, x in alphas.items()}


def _shapes(adapter: Foreign, leaves: Mapping[Path, Any]) -> tuple[Shape, ...]:
    parts = adapter.weight, adapter.a, adapter.b
    return tuple(getattr(unbox(leaves[path]), "shape", ()) for path in parts)


def _options(adapter: Foreign, leaves: Mapping[Path, Any]) -> list[Reading]:
    """Returns each way to read an adapter that its layout and the shapes allow."""
    shapes = w, a, b = _shapes(adapter, leaves)
    if adapter.layout.shapes == "heads":
        r = a[-1:]
        fits = len(w) > 1 and a == (*w[:-1], *r) and b == (*w[:-2], *r, *w[-1:])
        *heads, i, o = range(len(w)) if fits else (0, 0)
        return [
            Reading(Axes((*heads[:n],), (*heads[n:], i), (o,)), (*heads[n:],))
            for n in range(len(heads) + 1)
            if fits
        ]
    dense = adapter.layout.shapes == "dense"
    found = map(Reading, possible_axes(*shapes, joined=not dense))
    return [x for x in found if x.axes.standard or not dense]


def _preferred(
    adapter: Foreign, options: list[Reading], known: Axes | None, w: Shape
) -> list[Reading]:
    """Returns the readings that the caller's axes, or else the row, prefer.

    The caller's axes only decide between readings, because those of a product may
    differ: Keras's first factor also has the outputs that are not the last dimension.
    """
    if adapter.layout.shapes == "heads":
        module = ("", *components(adapter.weight))[-2]
        summed = {len(w) - 3} if SUMMED.fullmatch(module) else None
        summed = set() if PER_HEAD.fullmatch(module) else summed
        if known is not None:
            summed = {*known.inputs} - {len(w) - 2}
        return [x for x in options if {*x.summed} == summed] or options
    if known is not None:
        wanted = significant(known, w)
        if same := [x for x in options if significant(x.axes, w) == wanted]:
            return same
    first = [x for x in options if x.axes.standard]
    return first[:1] or options if adapter.layout.shapes == "dense first" else options
