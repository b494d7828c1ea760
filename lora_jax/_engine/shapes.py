"""Sizes of shapes, and what a reshape does to dimensions."""

import math
from collections.abc import Iterable, Iterator
from typing import Any


def size(shape: Iterable[Any]) -> int:
    """The number of elements, for comparisons.

    A symbolic dimension, as from `jax.export.symbolic_shape`, counts as a large one: it
    cannot be compared itself.
    """
    return math.prod(n if isinstance(n, int) else 2**20 for n in shape)


def segments(
    old: tuple[int, ...], new: tuple[int, ...]
) -> Iterator[tuple[list[int], list[int]]]:
    """Pairs of runs of dimensions of equal size, each as short as possible.

    A reshape from `old` to `new` merges and splits dimensions within such runs only.
    """
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
