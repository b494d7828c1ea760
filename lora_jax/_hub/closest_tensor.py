"""What a weight is like that is no tensor of the checkpoint: for the message."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from lora_jax._hub.checkpoint import Tensor
from lora_jax._hub.match_tensors import Weight, cuts, matrix

MOST = 64  # tensors of one size that are looked at
CLOSE = 1e-2  # how near, beside its size, what is called the same is


def nearest(weight: Weight, tensors: Sequence[Tensor]) -> str:
    """Says which tensor comes nearest to a weight, and how it differs."""
    best, said = 0.5, "no tensor of its size comes near"
    for cut in cuts(weight.x.shape):
        x = matrix(weight.x, cut, (0,) * len(cut.batch)).astype(np.float32)
        if min(x.shape) < 2 < max(weight.x.shape[:-1], default=0):
            continue  # a row or a column of a matrix tells nothing
        for tensor, y, lines in _alike(x, tensors):
            share, what = _compared(x, y, tensor.name, lines)
            share -= len(cut.batch) / 10  # of a stack only the first is looked at
            if share > best:
                of_stack = ", for the first of the stack" if cut.batch else ""
                best, said = share, what + of_stack
    return said


def _alike(
    x: np.ndarray, tensors: Sequence[Tensor]
) -> Iterator[tuple[Tensor, np.ndarray, str]]:
    """Tensors of as many rows and columns, or more; also those the other way around."""
    size = lambda t: math.prod(t.shape[1:])
    rows = [t for t in tensors if size(t) == x.shape[1] and t.shape[0] >= len(x)]
    turned = [t for t in tensors if len(t.shape) == 2 and t.shape[0] == x.shape[1]]
    columns = [t for t in turned if t.shape[1] > len(x)]
    for own, lines in ((rows, "rows"), (columns, "columns")):
        for tensor in own[:MOST]:
            y = np.asarray(tensor.rows(0, tensor.shape[0])).astype(np.float32)
            y = y.reshape(len(y), -1)
            yield tensor, y if lines == "rows" else y.T, lines


def _compared(x: np.ndarray, y: np.ndarray, name: str, lines: str) -> tuple[float, str]:
    """How much two matrices have in common, from 0 to 1, and in which way."""
    if len(y) > len(x):
        for low in np.flatnonzero((y == x[0]).all(1)):
            if np.array_equal(y[low : low + len(x)], x):
                some = f"the {lines} {low} to {low + len(x)} of {name!r}"
                return 1.0, f"it is {some}, which is one module in PyTorch"
        return 0.0, ""
    if order := _reordered(x, y):
        first = ", ".join(map(str, order[:4]))
        return 1.0, (
            f"it has the rows of {name!r} in another order ({first}, ...), as "
            "converters leave rotary embeddings whose halves they interleave; such an "
            "adapter would fit other outputs than PyTorch's"
        )
    if _reordered(x.T, y.T):
        return 1.0, f"it has the columns of {name!r} in another order"
    flat, other = x.ravel(), y.ravel()
    norm = float(np.linalg.norm(flat) * np.linalg.norm(other)) or 1.0
    shift = float(np.median(flat - other))
    size = float(np.sqrt(np.mean(other**2)))
    shifted = np.linalg.norm(flat - other - shift) <= CLOSE * np.linalg.norm(other)
    if shifted and abs(shift) > CLOSE * size:
        sign = "plus" if shift > 0 else "minus"
        return 0.99, f"it is {name!r} {sign} {abs(shift):.4g}"
    cosine = float(flat @ other) / norm
    ratio = float(flat @ other) / (float(other @ other) or 1.0)
    near = np.linalg.norm(flat - ratio * other) <= CLOSE * np.linalg.norm(flat)
    if near and abs(ratio) > CLOSE:
        if abs(ratio - 1) > CLOSE:
            return 0.99, f"it is {ratio:.4g} times {name!r}"
        off = np.linalg.norm(flat - other) / (np.linalg.norm(other) or 1.0)
        return 0.99, f"it is near {name!r}, {off:.2g} off it: trained since, or rounded"
    equal = float(np.mean(flat == other))
    if cosine > 0.5:
        return cosine, f"it is most like {name!r}, of which {equal:.0%} is the same"
    return 0.0, ""


def _reordered(x: np.ndarray, y: np.ndarray) -> list[int] | None:
    """Which row of y each row of x is, if they are the same in another order."""
    sums = [z.astype(np.float64).sum(1) for z in (x, y)]
    orders = [np.argsort(s, kind="stable") for s in sums]
    if not np.allclose(*(s[o] for s, o in zip(sums, orders, strict=True)), rtol=1e-4):
        return None
    where = np.empty(len(x), int)
    where[orders[0]] = orders[1]
    if np.array_equal(where, np.arange(len(x))) or not np.array_equal(x, y[where]):
        return None
    return where.tolist()
