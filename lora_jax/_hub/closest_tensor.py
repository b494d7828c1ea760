"""The checkpoint tensor that is closest to an unmatched weight, for error messages."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from lora_jax._hub.checkpoint import CheckpointTensor
from lora_jax._hub.match_tensors import WeightValues, cuts, matrix

MOST = 64  # tensors of one size that are compared
CLOSE = 1e-2  # the relative distance below which values count as the same


def describe_closest(weight: WeightValues, tensors: Sequence[CheckpointTensor]) -> str:
    """Returns which tensor is closest to a weight, and how it differs."""
    best, description = 0.5, "no tensor of its size is close"
    for cut in cuts(weight.x.shape):
        x = matrix(weight.x, cut, (0,) * len(cut.batch)).astype(np.float32)
        if min(x.shape) < 2 < max(weight.x.shape[:-1], default=0):
            continue  # one row or column of a matrix is similar to many others
        for tensor, y, lines in _same_sized(x, tensors):
            share, how = _compared(x, y, tensor.name, lines)
            share -= len(cut.batch) / 10  # only the first of a stack is compared
            if share > best:
                of_stack = ", for the first of the stack" if cut.batch else ""
                best, description = share, how + of_stack
    return description


def _same_sized(
    x: np.ndarray, tensors: Sequence[CheckpointTensor]
) -> Iterator[tuple[CheckpointTensor, np.ndarray, str]]:
    """Yields tensors with at least the rows, or at least the columns, of a matrix."""
    width = lambda t: math.prod(t.shape[1:])
    rows = [t for t in tensors if width(t) == x.shape[1] and t.shape[0] >= len(x)]
    transposed = [t for t in tensors if len(t.shape) == 2 and t.shape[0] == x.shape[1]]
    columns = [t for t in transposed if t.shape[1] > len(x)]
    for candidates, lines in ((rows, "rows"), (columns, "columns")):
        for tensor in candidates[:MOST]:
            y = np.asarray(tensor.rows(0, tensor.shape[0])).astype(np.float32)
            y = y.reshape(len(y), -1)
            yield tensor, y if lines == "rows" else y.T, lines


def _compared(x: np.ndarray, y: np.ndarray, name: str, lines: str) -> tuple[float, str]:
    """Returns the similarity of two matrices, from 0 to 1, and how they differ."""
    if len(y) > len(x):
        for low in np.flatnonzero((y == x[0]).all(1)):
            if np.array_equal(y[low : low + len(x)], x):
                some = f"the {lines} {low} to {low + len(x)} of {name!r}"
                return 1.0, f"it is {some}, which is one module in PyTorch"
        return 0.0, ""
    if order := _row_order(x, y):
        first = ", ".join(map(str, order[:4]))
        return 1.0, (
            f"it has the rows of {name!r} in another order ({first}, ...), as "
            "converters leave rotary embeddings whose halves they interleave; its "
            "adapter would not fit the outputs in PyTorch"
        )
    if _row_order(x.T, y.T):
        return 1.0, f"it has the columns of {name!r} in another order"
    flat, other = x.ravel(), y.ravel()
    product, square = float(flat @ other), float(other @ other)
    norm, size = float(np.linalg.norm(flat)), math.sqrt(square)
    shift = float(np.median(flat - other))
    shifted = np.linalg.norm(flat - other - shift) <= CLOSE * size
    if shifted and abs(shift) > CLOSE * size / math.sqrt(other.size):
        sign = "plus" if shift > 0 else "minus"
        return 0.99, f"it is {name!r} {sign} {abs(shift):.4g}"
    ratio = product / (square or 1.0)
    if np.linalg.norm(flat - ratio * other) <= CLOSE * norm and abs(ratio) > CLOSE:
        if abs(ratio - 1) > CLOSE:
            return 0.99, f"it is {ratio:.4g} times {name!r}"
        off = np.linalg.norm(flat - other) / (size or 1.0)
        return (
            0.99,
            f"it is close to {name!r}, {off:.2g} off: trained since, or rounded",
        )
    cosine = product / (norm * size or 1.0)
    if cosine > 0.5:
        equal = float(np.mean(flat == other))
        return cosine, f"it is similar to {name!r}: {equal:.0%} of it is the same"
    return 0.0, ""


def _row_order(x: np.ndarray, y: np.ndarray) -> list[int] | None:
    """Returns the row of y that each row of x is, if only their order differs."""
    sums = [z.astype(np.float64).sum(1) for z in (x, y)]
    orders = [np.argsort(s, kind="stable") for s in sums]
    if not np.allclose(*(s[o] for s, o in zip(sums, orders, strict=True)), rtol=1e-4):
        return None
    where = np.empty(len(x), int)
    where[orders[0]] = orders[1]
    if np.array_equal(where, np.arange(len(x))) or not np.array_equal(x, y[where]):
        return None
    return where.tolist()
