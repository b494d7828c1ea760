"""Causal attention with windows, segments, soft caps and rotary positions.

On GPUs it is cuDNN's flash attention where that computes the same, which never
materializes the weights of all pairs of tokens.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class RopeScaling(NamedTuple):
    """Slower rotary frequencies, for texts longer than those of the pretraining.

    All frequencies are divided by `factor`; with `positions`, as in Llama 3.1, only
    those whose period is long compared with that number of tokens.
    """

    factor: float
    low: float = 0.0
    high: float = 0.0
    positions: int = 0


def speeds(size: int, wavelength: float, scaling: RopeScaling | None = None) -> Any:
    """Returns the angles per token of a head's pairs, (size / 2,) in float32.

    Reference:
      transformers, modeling_rope_utils.py: `_compute_llama3_parameters`,
      `_compute_linear_scaling_rope_parameters`.
    """
    powers = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    speed = (1 / np.float32(wavelength) ** powers).astype(np.float32)
    if scaling is None:
        return speed
    slow = speed / np.float32(scaling.factor)
    if not scaling.positions:
        return slow
    turns = scaling.positions * speed / (2 * math.pi)  # in the original context
    keep = (turns - scaling.low) / (scaling.high - scaling.low)
    keep = np.clip(keep, 0, 1).astype(np.float32)
    return (1 - keep) * slow + keep * speed


def rotate(x: jax.Array, speed: Any, positions: jax.Array | None = None) -> jax.Array:
    """Rotates pairs of x (batch, time, ..., size) by angles that grow with time.

    Args:
      x: Queries or keys. A pair is an element of the first half of the last dimension,
        and that of the second half.
      speed: The angle per token of each pair, as from `speeds`.
      positions: The positions of the tokens, (batch or 1, time). Default: 0, 1, 2...
    """
    half = x.shape[-1] // 2
    if positions is None:
        positions = jnp.arange(x.shape[1])[None]
    speed = jnp.asarray(speed).reshape(1, 1, half)
    angle = positions.astype(jnp.float32)[..., None] * speed
    angle = angle.reshape(*positions.shape, *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def cap(x: jax.Array, most: float) -> jax.Array:
    """Bounds x smoothly by `most`; 0 means no bound."""
    return most * jnp.tanh(x / most) if most else x


def positions_in(segments: jax.Array) -> jax.Array:
    """Returns each token's position in its segment, for segments (batch, time)."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    first = segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return index - jax.lax.cummax(jnp.where(first, index, 0), 1)


class Mask(NamedTuple):
    """The tokens to which each token attends, besides those before it and itself.

    Attributes:
      window: Only to the last `window` tokens, itself included; 0: to all.
      local: Whether the window applies; a traced boolean if layers differ and are
        scanned.
      segments: Only to tokens of the same segment, (batch, time) integers.
    """

    window: int = 0
    local: bool | jax.Array = True
    segments: jax.Array | None = None

    def pairs(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Returns the mask (batch or 1, 1, to, from) for indices (batch or 1, time)."""
        back = queries[:, :, None] - keys[:, None]
        allowed = back >= 0
        if self.window:
            allowed &= (back < self.window) | ~jnp.asarray(self.local)
        if self.segments is not None:
            allowed &= self.segments[:, :, None] == self.segments[:, None]
        return allowed[:, None]

    def all_pairs(self, time: int) -> jax.Array:
        """Returns the mask of a text of that length."""
        index = jnp.arange(time, dtype=jnp.int32)[None]
        return self.pairs(index, index)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask | None,
    *,
    scale: float,
    most: float = 0.0,
    implementation: str | None = None,
) -> jax.Array:
    """Returns the attention of all tokens of a text.

    Args:
      q: (batch, time, heads, size).
      k: (batch, time, groups, size).
      v: Like k.
      mask: None means that every token attends to every other, as in an image.
      scale: The factor of the products of queries and keys.
      most: Bounds the scaled products by `most * tanh(x / most)`; 0: no bound.
      implementation: "xla" or "cudnn". Default: cuDNN where it computes the same.
    """
    if mask is None:
        return attend_to(q, k, v, None, scale=scale, most=most)
    if implementation is None and flash_applies(q, mask):
        implementation = "cudnn"
    if implementation == "cudnn" and not most:
        return flash(q, k, v, mask, scale)
    return attend_to(q, k, v, mask.all_pairs(q.shape[1]), scale=scale, most=most)


def flash(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: float) -> Any:
    """Returns the attention of all tokens of a text, computed by cuDNN."""
    run = functools.partial(
        jax.nn.dot_product_attention, scale=scale, implementation="cudnn"
    )
    if mask.segments is not None:
        return run(q, k, v, mask=mask.all_pairs(q.shape[1]))
    window = (mask.window - 1, 0) if mask.window else None
    full = functools.partial(run, is_causal=True)
    local = functools.partial(full, local_window_size=window)
    if isinstance(mask.local, bool):
        return (local if mask.local else full)(q, k, v)
    # cuDNN needs a static window: only one of the branches is executed.
    return jax.lax.cond(mask.local, local, full, q, k, v)


def attend_to(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pairs: jax.Array | None,
    *,
    scale: float,
    most: float = 0.0,
) -> jax.Array:
    """Returns attention to the keys of a mask (batch or 1, 1, to, from); None: all.

    XLA's part of `jax.nn.dot_product_attention` computes the same, but has no cap, and
    for float16 asks for a precision that CPUs and TPUs do not support (JAX 0.12).
    """
    batch, time, heads, size = q.shape
    q = q.reshape(batch, time, k.shape[2], -1, size)
    # (batch, group, head of the group, to, from)
    weights = jnp.einsum("btghd,bsgd->bghts", q, k, preferred_element_type=jnp.float32)
    weights = cap(weights * scale, most)
    if pairs is not None:
        weights = jnp.where(pairs[:, :, None], weights, -jnp.inf)
    weights = jax.nn.softmax(weights).astype(v.dtype)
    y = jnp.einsum("bghts,bsgd->btghd", weights, v)
    return y.reshape(batch, time, heads, size)


def flash_applies(q: jax.Array, mask: Mask) -> bool:
    """Whether cuDNN's flash attention runs on this machine's GPU for these queries."""
    time, size = q.shape[1], q.shape[-1]
    if q.dtype not in (jnp.bfloat16, jnp.float16) or size % 8:
        return False
    if mask.segments is not None and time % 2:  # the mask becomes a bias
        return False
    return size <= largest_flash_head()


@functools.cache
def largest_flash_head() -> int:
    """Returns the largest head of cuDNN's flash attention on the GPU here, or 0.

    It needs compute capability 8: on a T4 (7.5) attention is XLA's.
    """
    if jax.default_backend() != "gpu":
        return 0
    capability = getattr(jax.local_devices()[0], "compute_capability", "0")
    try:
        major = int(str(capability).split(".")[0])
    except ValueError:  # an AMD GPU
        return 0
    return 256 if major >= 9 else 128 if major == 8 else 0
