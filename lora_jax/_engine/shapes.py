"""How many numbers a shape has, and what a reshape does: of shapes alone."""

import math
from collections.abc import Iterable, Iterator
from typing import Any


def size(shape: Iterable[Any]) -> int:
    """How many numbers there are, roughly: a dimension without a number is a large one.

    Such are those of `jax.export.symbolic_shape`, which cannot be compared.
    """
    return math.prod(n if isinstance(n, int) else 2**20 for n in shape)


def segments(
    old: tuple[int, ...], new: tuple[int, ...]
) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs of runs of dimensions of equal size, as short as can be."""
    i = j = 0
    while i < len(old) or j < len(new):
        first, second = [], []
        while not (first or second) or _size(old, first) != _size(new, second):
            behind = size(old[d] for d in first) <= size(new[d] for d in second)
            if j == len(new) or (i < len(old) and behind):
                first.append(i)
                i += 1
            else:
                second.append(j)
                j += 1
        yield first, second


def _size(shape: tuple[int, ...], dims: list[int]) -> int:
    return math.prod(shape[d] for d in dims)
