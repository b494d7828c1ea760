"""The checkpoint tensors that a weight consists of, compared in every value.

A weight is cut into matrices: some of its dimensions count layers or experts, some are
the rows of PyTorch's tensor (its outputs, except in an embedding), and the rest are its
columns. Each way to cut it is tried. The first row of a matrix finds the tensors that
it may be, and then all of their values are compared. If a matrix is longer than the
tensor, the tensors of the next rows are the other parts of a fused weight.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax._engine.quantized import dequantize
from lora_jax._hub.checkpoint import CHUNK, CheckpointTensor
from lora_jax._processes import gathered
from lora_jax._tree import is_quantized

# The largest relative error of a quantized weight: NF4 has about 0.1, and the distance
# to any other tensor is about 1.4.
QUANTIZED_ERROR = 0.35


class Cut(NamedTuple):
    """The use of each dimension of a weight."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]


class TensorMatch(NamedTuple):
    """The tensors of one cut of a weight.

    At each index of the stack there are one or several parts. A part is a list of equal
    tensors, and the weight may be any of them.
    """

    shape: tuple[int, ...]
    cut: Cut
    parts: dict[tuple[int, ...], list[list[CheckpointTensor]]]


@dataclasses.dataclass(frozen=True)
class WeightValues:
    """The values of a weight, and how tensors are compared with them."""

    x: np.ndarray
    dtype: Any  # tensors are rounded to it first
    quantized: bool  # compared with a tolerance


class TensorIndex:
    """The tensors of a checkpoint by their first rows."""

    def __init__(self, tensors: Iterable[CheckpointTensor]):
        self.tensors = [t for t in tensors if t.shape and math.prod(t.shape)]
        self.by_dtype: dict[Any, dict[bytes, list[CheckpointTensor]]] = {}

    def starting(self, row: np.ndarray, weight: WeightValues) -> list[CheckpointTensor]:
        """Returns the tensors with this first row, in some order of their window."""
        if weight.quantized:
            sized = [t for t in self.tensors if math.prod(t.shape[1:]) == row.size]
            return [t for t in sized if any(_is_near(row, r) for r in _first_rows(t))]
        if weight.dtype not in self.by_dtype:
            by_row: dict[bytes, list[CheckpointTensor]] = {}
            for tensor in self.tensors:
                for key in {_key(rows, weight.dtype) for rows in _first_rows(tensor)}:
                    by_row.setdefault(key, []).append(tensor)
            self.by_dtype[weight.dtype] = by_row
        return self.by_dtype[weight.dtype].get(_key(row, weight.dtype), [])


def values_of_leaf(leaf: Any) -> WeightValues:
    """Returns the values of an array, in this process, to compare in its own dtype."""
    quantized = is_quantized(leaf)
    x = np.asarray(gathered(dequantize(leaf) if quantized else leaf))
    return WeightValues(x, x.dtype, quantized)


def _rounded_values(weight: WeightValues) -> Iterator[WeightValues]:
    """Yields the weight as one that was rounded to a narrower dtype on its way.

    It can have been if that dtype holds all of its values, and they are too many for a
    coincidence.
    """
    if weight.quantized or weight.x.dtype not in (np.float32, np.float64):
        return
    if len(np.unique(weight.x.reshape(-1)[: 1 << 16])) <= 16:
        return
    for dtype in (np.float32, np.float16, jnp.bfloat16):
        if dtype != weight.x.dtype and _holds(weight.x, dtype):
            yield dataclasses.replace(weight, dtype=jnp.dtype(dtype))


def match_tensors(weight: WeightValues, index: TensorIndex) -> list[TensorMatch]:
    """Returns every cut of a weight into tensors of the checkpoint."""
    for values in itertools.chain([weight], _rounded_values(weight)):
        matches = []
        for cut in cuts(weight.x.shape):
            parts = {}
            for at in np.ndindex(*(weight.x.shape[d] for d in cut.batch)):
                found = _parts(matrix(weight.x, cut, at), values, index)
                if found is None:
                    break
                parts[at] = found
            else:
                matches.append(TensorMatch(weight.x.shape, cut, parts))
        if matches:
            return matches
    return []


def cuts(shape: tuple[int, ...]) -> Iterator[Cut]:
    """Yields the ways to use the dimensions; those of size 1 are always columns."""
    wide = [d for d, n in enumerate(shape) if n > 1]
    single = [d for d, n in enumerate(shape) if n == 1]
    for roles in itertools.product(range(3), repeat=len(wide)):
        batch, rows, columns = (
            tuple(d for d, role in zip(wide, roles, strict=True) if role == kind)
            for kind in range(3)
        )
        # Without row dimensions it is a matrix of one row, which is never stored with
        # several dimensions for its columns.
        if len(batch) < 3 and (rows or len(columns) < 2):
            yield Cut(batch, rows, tuple(sorted((*columns, *single))))


def matrix(x: np.ndarray, cut: Cut, at: tuple[int, ...]) -> np.ndarray:
    """Returns one of the stack as (rows, columns)."""
    x = np.transpose(x, (*cut.batch, *cut.rows, *cut.columns))[at]
    return x.reshape(math.prod(x.shape[: len(cut.rows)]), -1)


def _parts(
    x: np.ndarray, weight: WeightValues, index: TensorIndex
) -> list[list[CheckpointTensor]] | None:
    """Returns the tensors whose rows follow each other in a matrix, or `None`."""
    low, found = 0, []
    while low < len(x):
        fits = [
            t
            for t in index.starting(x[low], weight)
            if t.shape[0] <= len(x) - low and _is_equal(x[low:], t, weight)
        ]
        # The longest: equal rows could be a short tensor's, then a long one's.
        most = max((t.shape[0] for t in fits), default=0)
        if not most:
            return None
        found.append([t for t in fits if t.shape[0] == most])
        low += most
    return found


def _is_equal(x: np.ndarray, tensor: CheckpointTensor, weight: WeightValues) -> bool:
    """Whether all rows of a tensor are the first ones of a matrix."""
    size = math.prod(tensor.shape[1:])
    if size != x.shape[1]:
        return False
    step = max(1, CHUNK // size)
    possible = range(len(_first_rows(tensor)))  # orders of the window that still fit
    for low in range(0, tensor.shape[0], step):
        orders = _window_orders(tensor.rows(low, min(low + step, tensor.shape[0])))
        step_rows = x[low : low + step][: len(orders[0])]
        possible = [i for i in possible if _is_same(step_rows, orders[i], weight)]
        if not possible:
            return False
    return True


def _is_same(x: np.ndarray, y: np.ndarray, weight: WeightValues) -> bool:
    if weight.quantized:
        return all(_is_near(row, other) for row, other in zip(x, y, strict=True))
    return np.array_equal(x, _rounded(y, weight.dtype).astype(x.dtype))


def _is_near(x: np.ndarray, y: np.ndarray) -> bool:
    x, y = (z.astype(np.float32) for z in (x, y))
    return bool(np.linalg.norm(x - y) <= QUANTIZED_ERROR * np.linalg.norm(y))


def _first_rows(tensor: CheckpointTensor) -> list[np.ndarray]:
    return [rows[0] for rows in _window_orders(tensor.rows(0, 1))]


def _window_orders(rows: np.ndarray) -> list[np.ndarray]:
    """Returns rows as matrices; a convolution's also with the window first, as here."""
    flat = [rows.reshape(len(rows), -1)]
    if rows.ndim > 2:
        flat.append(np.moveaxis(rows, 1, -1).reshape(len(rows), -1))
    return flat


def _key(row: np.ndarray, dtype: Any) -> bytes:
    return str(row.size).encode() + _rounded(row, dtype).tobytes()


def _rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns the array in a dtype, with 0.0 for -0.0, which has other bytes."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.add(x.astype(dtype), jnp.dtype(dtype).type(0))


def _holds(x: np.ndarray, dtype: Any) -> bool:
    """Whether rounding to a dtype changes no value."""
    flat = x.reshape(-1)
    return all(
        np.array_equal(part, _rounded(part, dtype).astype(part.dtype))
        for part in (flat[i : i + CHUNK] for i in range(0, flat.size, CHUNK))
    )
