"""Samples a few values of a weight, by which `load` recognizes an adapter's base."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._engine.quantized import Quantized, dequantize
from lora_jax._processes import first_found
from lora_jax._tree import is_abstract, is_array, is_quantized, is_traced

COUNT = 32
# The largest relative error, in the Frobenius norm, of two samples of one weight. Casts
# to bfloat16 are off by less than 0.01, and 4 bits, with a scale for 64 elements or for
# a row, by at most 0.45 (in 200 draws, some with long tails). Another model's weights
# differ by at least 0.96, mostly 1.4.
TOLERANCE = 0.6


def sample(w: Any) -> np.ndarray | None:
    """Returns some values of a weight, (COUNT,) in bfloat16; none of an empty one.

    `None` if the weight is abstract, traced or no array. If it spans processes, all of
    them must call this.
    """
    if not is_array(w) or is_abstract(w) or is_traced(w):
        return None
    size = math.prod(w.shape)
    if not size:
        return np.zeros(0, jnp.bfloat16)
    values = values_at(w, np.unravel_index(_spread(size), w.shape)).astype(jnp.bfloat16)
    # Zero where not finite, so that a weight that is not finite equals itself.
    return np.where(np.isfinite(values.astype(np.float32)), values, jnp.bfloat16(0))


def differ(found: np.ndarray, known: np.ndarray) -> float:
    """Returns the relative error of a sample, or 0 if it is within the tolerance."""
    found, known = (x.astype(np.float64) for x in (found, known))
    if found.shape != known.shape:
        return np.inf
    off, size = (np.sqrt(np.sum(x**2)) for x in (found - known, known))
    if off <= TOLERANCE * size:
        return 0.0
    return off / size if size else np.inf


def _spread(size: int) -> list[int]:
    """Returns COUNT indices below `size`, always the same and evenly spread.

    They are the fractional parts of multiples of the golden ratio, in 64-bit integers.
    """
    golden = 0x9E3779B97F4A7C15
    return [(i * golden % 2**64) * size >> 64 for i in range(1, COUNT + 1)]


def values_at(w: Any, indices: tuple[np.ndarray, ...]) -> np.ndarray:
    """Returns the values at indices, read from the shards that hold them.

    The weight is never gathered: only the values, where it spans processes.
    """
    if is_quantized(w):
        counts = zip(indices, w.shape, w.scale.shape, strict=True)
        blocks = tuple(i * m // n for i, n, m in counts)
        parts = values_at(w.values, indices), values_at(w.scale, blocks)
        values, scale = map(jnp.asarray, parts)
        return np.asarray(dequantize(Quantized(values, scale, w.dtypes, w.format)))
    if not isinstance(w, jax.Array):
        return np.asarray(w[indices])
    values = np.empty(len(indices[0]), w.dtype)
    missing = np.ones(len(indices[0]), bool)
    for shard in w.addressable_shards:
        starts = [cut.start or 0 for cut in shard.index]
        local = [i - low for i, low in zip(indices, starts, strict=True)]
        pairs = zip(local, shard.data.shape, strict=True)
        here = missing & np.all([(i >= 0) & (i < n) for i, n in pairs], axis=0)
        if here.any():
            data = shard.data
            if data.sharding.memory_kind not in (None, "device"):
                data = np.asarray(data)  # devices cannot index the host's memory
            values[here] = np.asarray(data[tuple(i[here] for i in local)])
            missing &= ~here
    if not w.is_fully_addressable:
        values, found = first_found(values, ~missing)
        missing = ~found
    assert not missing.any(), "a value is in no shard"
    return values
