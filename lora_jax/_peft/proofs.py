"""Which tensors a weight is, proven on all of its values.

A weight of ours is cut up: some of its dimensions count layers or experts, some are the
rows of PyTorch's tensor, its outputs but in a table, and the rest its columns. For each
such cut the first row says which tensor it may be, and then every value must agree.
Rows of several tensors, one after the other, are the parts of a fused weight.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax._engine.quantized import dequantize
from lora_jax._peft.checkpoint import Tensor
from lora_jax._processes import gathered
from lora_jax._tree import is_quantized

CHUNK = 1 << 24  # values that are compared at a time
# How far a weight in few bits may be off, beside its own size: NF4 by 0.1 or so, and
# any other tensor by about 1.4.
FEW_BITS = 0.35


class Cut(NamedTuple):
    """What each dimension of a weight is: stacked, rows, or columns."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


class Proof(NamedTuple):
    """A cut, and for each index of its stack the parts: tensors that are all equal."""

    shape: tuple[int, ...]
    cut: Cut
    parts: dict[tuple[int, ...], list[list[Tensor]]]


class Weight(NamedTuple):
    """The values of a weight, and the dtype in which a tensor has to equal them."""

    x: np.ndarray
    grid: Any
    rounded: bool  # in few bits: equal to their rounding alone


class Index:
    """The tensors by their first rows, in each dtype that is asked for."""

    def __init__(self, tensors: Iterable[Tensor]):
        self.tensors = [t for t in tensors if math.prod(t.shape)]
        self.by_row: dict[Any, dict[bytes, list[Tensor]]] = {}

    def starting(self, row: np.ndarray, weight: Weight) -> list[Tensor]:
        """Those whose first row this is, in some order of its window."""
        if weight.rounded:
            near = [t for t in self.tensors if math.prod(t.shape[1:]) == row.size]
            return [t for t in near if any(_near(row, r) for r in _first(t))]
        if weight.grid not in self.by_row:
            made: dict[bytes, list[Tensor]] = {}
            for tensor in self.tensors:
                keys = {_key(row, weight.grid) for row in _first(tensor)}
                for key in keys:
                    made.setdefault(key, []).append(tensor)
            self.by_row[weight.grid] = made
        return self.by_row[weight.grid].get(_key(row, weight.grid), [])


def values_of(leaf: Any) -> Weight:
    """A weight's values in this process, and what they can be compared in."""
    rounded = is_quantized(leaf)
    x = np.asarray(gathered(dequantize(leaf) if rounded else leaf))
    return Weight(x, x.dtype, rounded)


def narrower(weight: Weight) -> Iterator[Weight]:
    """The same weight, as one that was rounded to fewer bits on its way.

    Not if it has so few different values that it would not show.
    """
    if weight.rounded or weight.x.dtype not in (np.float32, np.float64):
        return
    some = weight.x.reshape(-1)[: 1 << 16]
    if len(np.unique(some)) <= 16:
        return
    for grid in (np.float32, np.float16, jnp.bfloat16):
        if grid != weight.x.dtype and _holds(weight.x, grid):
            yield weight._replace(grid=jnp.dtype(grid))


def prove(weight: Weight, index: Index) -> list[Proof]:
    """Every cut of a weight into tensors of the checkpoint, each value compared."""
    proofs = []
    for cut in cuts(weight.x.shape):
        parts = {}
        for at in np.ndindex(*(weight.x.shape[d] for d in cut.batch)):
            found = _parts(matrix(weight.x, cut, at), weight, index)
            if found is None:
                break
            parts[at] = found
        else:
            proofs.append(Proof(weight.x.shape, cut, parts))
    return proofs


def cuts(shape: tuple[int, ...]) -> Iterator[Cut]:
    """The ways to use the dimensions: those of one number are always columns."""
    wide = [d for d, n in enumerate(shape) if n > 1]
    for roles in itertools.product(range(3), repeat=len(wide)):
        groups: list[list[int]] = [[], [], []]
        for d, role in zip(wide, roles, strict=True):
            groups[role].append(d)
        batch, rows, columns = groups
        thin = [d for d, n in enumerate(shape) if n == 1]
        if len(batch) < 3 and (rows or len(wide) - len(batch) < 2):
            # A matrix of one row, or of one column, has a dimension of one number.
            yield Cut(tuple(batch), tuple(rows), tuple(sorted(columns + thin)))


def matrix(x: np.ndarray, cut: Cut, at: tuple[int, ...]) -> np.ndarray:
    """One of a stack as (rows, columns)."""
    x = np.transpose(x, (*cut.batch, *cut.rows, *cut.columns))[at]
    n = math.prod(x.shape[: len(cut.rows)])
    return x.reshape(n, -1)


def _parts(x: np.ndarray, weight: Weight, index: Index) -> list[list[Tensor]] | None:
    """The tensors whose rows these are, one after the other; of each, its equals."""
    low, found = 0, []
    while low < len(x):
        fits = [
            t
            for t in index.starting(x[low], weight)
            if t.shape[0] <= len(x) - low and _equal(x[low:], t, weight)
        ]
        # The longest: equal rows could be a short tensor's, then a long one's.
        most = max((t.shape[0] for t in fits), default=0)
        if not most:
            return None
        found.append([t for t in fits if t.shape[0] == most])
        low += most
    return found


def _equal(x: np.ndarray, tensor: Tensor, weight: Weight) -> bool:
    """Whether all rows of a tensor are the first ones of a matrix."""
    size = math.prod(tensor.shape[1:])
    if size != x.shape[1]:
        return False
    step = max(1, CHUNK // size)
    orders = [True] * len(_first(tensor))
    for low in range(0, tensor.shape[0], step):
        rows = tensor.rows(low, min(low + step, tensor.shape[0]))
        own = x[low : low + len(rows)]
        for i, y in enumerate(_orders(rows)):
            if orders[i]:
                orders[i] = _same(own, y, weight)
        if not any(orders):
            return False
    return True


def _same(x: np.ndarray, y: np.ndarray, weight: Weight) -> bool:
    if weight.rounded:
        return all(_near(row, other) for row, other in zip(x, y, strict=True))
    return np.array_equal(x, cast(y, weight.grid).astype(x.dtype))


def _near(x: np.ndarray, y: np.ndarray) -> bool:
    x, y = (z.astype(np.float32) for z in (x, y))
    return bool(np.linalg.norm(x - y) <= FEW_BITS * np.linalg.norm(y))


def _first(tensor: Tensor) -> list[np.ndarray]:
    return [rows[0] for rows in _orders(tensor.rows(0, 1))]


def _orders(rows: np.ndarray) -> list[np.ndarray]:
    """Rows as matrices: those of a convolution also with the window first, as ours."""
    flat = [rows.reshape(len(rows), -1)]
    if rows.ndim > 2:
        flat.append(np.moveaxis(rows, 1, -1).reshape(len(rows), -1))
    return flat


def _key(row: np.ndarray, grid: Any) -> bytes:
    return str(row.size).encode() + cast(row, grid).tobytes()


def cast(x: np.ndarray, grid: Any) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.add(x.astype(grid), jnp.dtype(grid).type(0))  # no zero below zero


def _holds(x: np.ndarray, grid: Any) -> bool:
    flat = x.reshape(-1)
    return all(
        np.array_equal(part, cast(part, grid).astype(part.dtype))
        for part in (flat[i : i + CHUNK] for i in range(0, flat.size, CHUNK))
    )
