"""Checks whether adapters can be combined: finite values, equal bases, equal axes."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax._adapters import Adapters, Axes, LowRank
from lora_jax._tree import (
    Path,
    is_abstract,
    is_counter,
    is_quantized,
    is_traced,
    listed,
    path_name,
    unbox,
)


def check_values(
    leaves: dict[Path, Any],
    adapters: Adapters,
    *,
    finite: bool = True,
) -> None:
    """Raises if a leaf of an adapter has no values, or values that are not finite."""
    for adapter in adapters.values():
        for path in adapter:
            x = unbox(leaves[path])
            if is_abstract(x):
                raise ValueError(
                    f"{path_name(path)!r} has no values: it is a ShapeDtypeStruct. "
                    "Pass arrays, or call the function within jax.eval_shape."
                )
            if finite and not (is_traced(x) or jnp.isfinite(x).all()):
                raise ValueError(
                    f"{path_name(path)!r} is not finite: the training had diverged. "
                    "Restore an earlier adapter."
                )


def check_base(base: dict[Path, Any], other: dict[Path, Any], i: int) -> None:
    """Raises if the plain leaves of tree `i` differ from those of the first tree."""
    for path in base | other:
        first, second = (unbox(leaves.get(path)) for leaves in (base, other))
        if is_counter(base.get(path)) or first is second or _equal(first, second):
            continue
        raise ValueError(
            f"The trees have different bases: {path_name(path)!r} of tree {i} differs "
            "from that of tree 0. Put them over one base first: "
            "attach(detach(params), base)."
        )


def _equal(x: Any, y: Any) -> bool:
    """Whether two leaves are equal; in shape and dtype if values are unknown."""
    if is_quantized(x) and is_quantized(y):
        parts = (x.values, y.values), (x.scale, y.scale)
        same = (x.dtypes, x.format) == (y.dtypes, y.format)
        return same and all(_equal(a, b) for a, b in parts)
    if is_quantized(x) or is_quantized(y):
        return False
    described = [(getattr(z, "shape", None), getattr(z, "dtype", None)) for z in (x, y)]
    if described[0] != described[1]:
        return False
    if described[0] == (None, None):
        return bool(x == y)
    unknown = any(is_traced(z) or is_abstract(z) for z in (x, y))
    return unknown or bool(jnp.array_equal(x, y))


def layout_of(path: Path, adapters: Sequence[LowRank[Any]]) -> tuple[Axes, int]:
    """Returns the axes that the adapters of a weight share, and B's dimension of rank.

    The rank is the last dimension of A. In B it is the last one too if the factors are
    aligned, and otherwise the one after the batch.
    """
    found = dict.fromkeys((adapter.axes, adapter.aligned) for adapter in adapters)
    if len(found) > 1:
        raise ValueError(
            f"The adapters of {path_name(path)!r} have different axes and cannot be "
            f"combined: {listed([str(axes) for axes, _ in found])}. Build them with "
            "the same axes."
        )
    ((axes, aligned),) = found
    return axes, sum(map(len, axes)) if aligned else len(axes.batch)
