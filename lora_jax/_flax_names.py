"""Infers from Flax's names which leaves are weights, and the axes of each."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax._adapters import Axes, is_adapter
from lora_jax._patterns import collapsed
from lora_jax._tree import (
    Path,
    components,
    is_array,
    leaf_name,
    listed,
    path_name,
    sibling,
    unbox,
)

# Leaves that no product uses: biases, and one factor for each feature.
BIAS = re.compile(r"(.*_)?(bias|scale|gamma|beta)", re.I)
# Leaves and modules that are norms: "layernorm", "norm_1", "ln_f", ...
NORM = re.compile(r".*norm(alization)?(s|_?\d+|_[a-z])?|(.*_)?ln\d*(_.*)?", re.I)
# Leaves and modules that are tables: "embedding", "pos_embed", "wte", ...
TABLE = re.compile(r"(?!.*patch).*embed.*|(.*_)?(wte|wpe)", re.I)
# Leaves that are tables or single rows: "positions", "cls_token", ...
ROWS = re.compile(r"(.*_)?(table|tokens?|class|cls|pos|positions?)(_.*)?", re.I)


def is_floating(path: Path, leaf: Any) -> bool:
    """Whether a leaf is a floating array and belongs to no adapter."""
    w = unbox(leaf)
    floating = is_array(w) and jnp.issubdtype(w.dtype, jnp.floating)
    return floating and not is_adapter(path)


def is_adaptable(path: Path, leaf: Any) -> bool:
    """Whether a leaf is a floating array of 2 or more dimensions, no norm or bias.

    Norms and biases that `scan` stacks, or that have a value for each head, also have
    two dimensions. Only their names distinguish them from the weights of products.
    """
    return (
        is_floating(path, leaf)
        and len(unbox(leaf).shape) >= 2
        and not is_norm_or_bias(path)
    )


def is_norm_or_bias(path: Path) -> bool:
    """Whether a leaf is a norm or a bias by its own name, or a norm by its module's."""
    name, module = own_names(path)
    return bool(BIAS.fullmatch(name)) or any(map(NORM.fullmatch, (name, module)))


def is_table(path: Path) -> bool:
    """Whether a leaf other than `kernel` is a table by its own or its module's name."""
    name, module = own_names(path)
    if name == "kernel":
        return False
    return any(map(TABLE.fullmatch, (name, module))) or bool(ROWS.fullmatch(name))


def own_names(path: Path) -> tuple[str, str]:
    """Returns the name of a leaf, and in lower case that of its module."""
    *_, module, name = ("", *components(path[-2:]))
    return name, module.lower()


def axes_by_name(path: Path, leaves: Mapping[Path, Any]) -> Axes | None:
    """Returns a weight's axes, or `None` if its name and shape leave a choice."""
    shape = unbox(leaves[path]).shape
    n = len(shape)
    if n == 2:
        return Axes((), (0,), (1,))
    name, module = leaf_name(path), own_names(path)[1]
    if name == "kernel":
        # A bias has the shape of the outputs. Without one, a kernel of three dimensions
        # can be an attention's, with heads, or a stack of layers.
        bias = unbox(leaves.get(sibling(path, "bias")))
        first = module in ("query", "key", "value")
        last = module == "out" or module.startswith("conv")
        known = module.startswith("conv") or (n == 3 and _has_heads(path, leaves))
        if first and (known if bias is None else bias.shape == shape[1:]):
            return Axes((), (0,), tuple(range(1, n)))
        if last and (known if bias is None else bias.shape == shape[-1:]):
            return Axes((), tuple(range(n - 1)), (n - 1,))
    return None


def paths_of_axes(path: Path) -> list[Path]:
    """Returns the paths of the leaves whose shapes `axes_by_name` reads."""
    heads = (sibling(path, name, "kernel") for name in ("query", "out"))
    return [path, sibling(path, "bias"), *heads]


def axes_of(path: Path, leaves: Mapping[Path, Any], others: bool = False) -> Axes:
    """Returns what `axes_by_name` does, or raises ValueError if that is `None`.

    Args:
      path: The path of the weight.
      leaves: The leaves of the tree.
      others: Whether the caller named the axes of other weights.
    """
    axes = axes_by_name(path, leaves)
    if axes is None:
        raise ValueError(undecided([path], leaves, others))
    return axes


def undecided(paths: list[Path], leaves: Mapping[Path, Any], others: bool) -> str:
    """Returns the message for weights whose axes are neither given nor in a name."""
    name, shape = path_name(paths[0]), unbox(leaves[paths[0]]).shape
    exclude = f"exclude=[{listed(collapsed(paths))}]"
    if others:
        return (
            f"axes does not name {name!r}, of shape {shape}, and its own name does not "
            "determine which dimensions are inputs and which outputs. If axes is from "
            "find_axes, no product and no lookup of the function uses this weight: "
            f"leave it out, {exclude}."
        )
    return (
        f"{name!r}, of shape {shape}, has ambiguous dimensions: its name does not "
        "determine which are inputs and which outputs. Write "
        "axes=find_axes(fn, params, *args), or "
        f"axes={{{name!r}: Axes(batch, inputs, outputs)}}, or leave it out: {exclude}."
    )


def _has_heads(path: Path, leaves: Mapping[Path, Any]) -> bool:
    """Whether the kernels of query and out have the same heads; stacks do not."""
    query, out = (
        unbox(leaves.get(sibling(path, name, "kernel"))) for name in ("query", "out")
    )
    return query is None or out is None or query.shape[1:] == out.shape[:-1]


def check_axes(
    axes: Mapping[str, Iterable[Iterable[int]]], leaves: Mapping[Path, Any]
) -> dict[str, Axes]:
    """Returns the axes that a caller gives, each checked against its weight.

    Raises:
      ValueError: If a path is unknown, or a dimension is missing or out of order.
    """
    names = {path_name(p): p for p, leaf in leaves.items() if is_array(unbox(leaf))}
    checked = {}
    for name, dims in axes.items():
        if name not in names:
            close = difflib.get_close_matches(name, names, n=6, cutoff=0.0)
            raise ValueError(
                f"axes names {name!r}, which is no path of the parameters. Close: "
                f"{listed(close)}. Pass the same tree to find_axes."
            )
        groups = [tuple(group) for group in dims]
        n = len(unbox(leaves[names[name]]).shape)
        once = sorted(d for group in groups for d in group) == list(range(n))
        if not once or len(groups) != 3 or not (groups[1] and groups[2]):
            raise ValueError(
                f"axes of {name!r} must name each of its {n} dimensions once, at least "
                "one of them an input and one an output; found (batch, inputs, "
                f"outputs) = {tuple(groups)}."
            )
        if any(list(group) != sorted(group) for group in groups):
            raise ValueError(
                f"axes of {name!r} must name each group of dimensions in their order; "
                f"found (batch, inputs, outputs) = {tuple(groups)}."
            )
        checked[name] = Axes(*groups)
    return checked


def lists_all(axes: Mapping[str, Axes], leaves: Mapping[Path, Any]) -> bool:
    """Whether axes list every weight that a function uses, as `find_axes` does.

    A caller who writes axes by hand names only weights whose own names do not give
    them. So an entry that repeats what a name gives comes from `find_axes`.
    """
    return any(
        axes.get(path_name(path)) == axes_by_name(path, leaves)
        for path, leaf in leaves.items()
        if path_name(path) in axes and is_array(unbox(leaf))
    )
