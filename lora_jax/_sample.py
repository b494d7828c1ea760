"""A few values of each weight, by which an adapter knows its base again."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._engine.quantized import Quantized, dequantize
from lora_jax._processes import first_found
from lora_jax._tree import is_abstract, is_array, is_quantized, is_traced

COUNT = 32
# How far values may be off, beside their own size. A cast to bfloat16 is off by less
# than 0.01; four bits, with a scale for 64 values or for a whole row, by 0.45 at most
# (of 200 draws, also with long tails); another model's by 0.96 at least, 1.4 mostly.
TOLERANCE = 0.6


def sample(w: Any) -> np.ndarray | None:
    """Some values of a weight, (COUNT,) in bfloat16.

    `None` where it has none: it is abstract. Of a weight that spans processes all of
    them ask.
    """
    if not is_array(w) or is_abstract(w) or is_traced(w):
        return None
    size = math.prod(w.shape)
    if not size:
        return np.zeros(0, jnp.bfloat16)
    values = _values(w, np.unravel_index(_spread(size), w.shape))
    short = values.astype(jnp.bfloat16)
    return np.where(np.isfinite(short.astype(np.float32)), short, jnp.bfloat16(0))


def differ(found: np.ndarray, known: np.ndarray) -> float:
    """How far a sample is from a known one, beside the size of that; 0 if within."""
    found, known = (x.astype(np.float64) for x in (found, known))
    if found.shape != known.shape:
        return np.inf
    off, size = (np.sqrt(np.sum(x**2)) for x in (found - known, known))
    if off <= TOLERANCE * size:
        return 0.0
    return off / size if size else np.inf


def _spread(size: int) -> list[int]:
    """Places among `size`, the same at any time: multiples of the golden ratio."""
    golden = 0x9E3779B97F4A7C15
    return [(i * golden % 2**64) * size >> 64 for i in range(1, COUNT + 1)]


def _values(w: Any, places: tuple[np.ndarray, ...]) -> np.ndarray:
    """The values at these places, read from the shards where they are."""
    if is_quantized(w):
        counts = zip(places, w.shape, w.scale.shape, strict=True)
        blocks = tuple(p * m // n for p, n, m in counts)
        parts = _values(w.values, places), _values(w.scale, blocks)
        values, scale = map(jnp.asarray, parts)
        return np.asarray(dequantize(Quantized(values, scale, w.dtypes, w.format)))
    if not isinstance(w, jax.Array):
        return np.asarray(w[places])
    values = np.empty(len(places[0]), w.dtype)
    missing = np.ones(len(places[0]), bool)
    for shard in w.addressable_shards:
        starts = [cut.start or 0 for cut in shard.index]
        local = [p - low for p, low in zip(places, starts, strict=True)]
        pairs = zip(local, shard.data.shape, strict=True)
        here = missing & np.all([(i >= 0) & (i < n) for i, n in pairs], axis=0)
        if here.any():
            data = shard.data
            if data.sharding.memory_kind not in (None, "device"):
                data = np.asarray(data)  # there no device can index it
            values[here] = np.asarray(data[tuple(i[here] for i in local)])
            missing &= ~here
    if not w.is_fully_addressable:
        values, found = first_found(values, ~missing)
        missing = ~found
    assert not missing.any(), "every value is in a shard"
    return values
