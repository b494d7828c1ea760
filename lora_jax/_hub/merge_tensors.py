"""A tensor of a checkpoint with the update of its module, in NumPy."""

import math
from typing import NamedTuple

import numpy as np

from lora_jax._hub.checkpoint import CHUNK
from lora_jax._hub.module_kinds import Linear, ModuleAdapter


class Merged(NamedTuple):
    """A merged tensor, and how much of its update the rounding took.

    Attributes:
      x: The tensor.
      change: The sum of squares of the change by rounding.
      update: That of the update.
    """

    x: np.ndarray
    change: float
    update: float


def merged(
    w: np.ndarray,
    adapter: ModuleAdapter,
    kind: Linear,
    inputs: tuple[int, ...],
    dtype: np.dtype,
) -> Merged:
    """Returns W + scale * A B, summed in float32 or wider and rounded once.

    With DoRA's magnitude m it is m (W + scale * A B) / |W + scale * A B|, the norm over
    the inputs.

    Args:
      w: The tensor, as PyTorch stores it.
      adapter: That of its module: matrices (inputs, r) and (r, outputs).
      kind: The kind of the module.
      inputs: The sizes of the inputs' dimensions, for convolutions.
      dtype: That of the result.
    """
    wide = np.result_type(np.float32, adapter.a.dtype, adapter.b.dtype, _wide(w))
    a, b = adapter.a.astype(wide), adapter.b.astype(wide)
    matrix = kind.weight_from_torch(w)  # (..., inputs, outputs)
    result = np.empty(matrix.shape, dtype)
    step = max(1, CHUNK // math.prod(matrix.shape[:-1]))
    change = update = 0.0
    for low in range(0, matrix.shape[-1], step):
        part = slice(low, low + step)
        old = matrix[..., part].astype(wide)
        new = old + wide.type(adapter.scale) * (a @ b[..., part])
        if adapter.magnitude is not None:
            norm = np.sqrt(np.sum(new**2, axis=-2, keepdims=True))
            gain = adapter.magnitude[..., None, part].astype(wide)
            new *= gain / np.where(norm > 0, norm, 1)
        with np.errstate(over="ignore"):  # reported by the caller
            result[..., part] = new.astype(dtype)
        change += float(np.sum((result[..., part].astype(wide) - new) ** 2))
        update += float(np.sum((new - old) ** 2))
    return Merged(kind.weight_to_torch(result, inputs), change, update)


def _wide(w: np.ndarray) -> np.dtype:
    return w.dtype if w.dtype == np.float64 else np.dtype(np.float32)
