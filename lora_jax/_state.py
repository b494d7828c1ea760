"""Converts `Quantized` to and from the state dicts of `flax.serialization`.

The msgpack format of Flax has no 4-bit types, so two codes share a byte, the first one
in the high bits.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from lora_jax._engine.quantized import Quantized, keys_of
from lora_jax._tree import is_abstract, is_traced


def to_state(x: Quantized) -> dict[str, Any]:
    """Returns a quantized array as `{format: codes, "scale": scale}`."""
    values, scale = keys_of(x)
    return {values: _packed(x.values), scale: x.scale}


def from_state(target: Quantized, state: Any) -> Quantized:
    """Returns the quantized array of a state dict, in the format of `target`.

    Raises:
      ValueError: If the state is in another format, or has other shapes.
    """
    path, keys = serialization.current_path().removeprefix("./"), keys_of(target)
    found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
    if found != sorted(keys):
        raise ValueError(
            f"{path!r} is {target.format!r} in the target, found {found} in the "
            "checkpoint. Restore with quantize(params, how) in the format that was "
            "saved."
        )
    values, scale = (state[key] for key in keys)
    if values.dtype == jnp.uint8:
        n = math.prod(target.shape)
        fits = values.shape == (-(-n // 2),)
        values = _unpacked(values)[:n].reshape(target.shape) if fits else values
    parts = zip(keys, (values, scale), (target.values, target.scale), strict=True)
    for key, x, y in parts:
        if x.shape != y.shape:
            raise ValueError(
                f"{key!r} of {path!r} has the shape {y.shape} in the target, found "
                f"{x.shape} in the checkpoint. Restore with quantize(params, how, "
                "block=...) as it was saved."
            )
    return dataclasses.replace(target, values=values, scale=scale)


def _packed(values: Any) -> Any:
    if values.dtype != jnp.int4 or is_traced(values):
        return values
    n = -(-math.prod(values.shape) // 2)
    if is_abstract(values):
        return jax.ShapeDtypeStruct((n,), np.uint8)
    codes = np.zeros(2 * n, np.uint8)
    flat = np.asarray(values).ravel().astype(np.int8).view(np.uint8)
    codes[: values.size] = flat & 15
    return codes[::2] << 4 | codes[1::2]


def _unpacked(packed: Any) -> np.ndarray:
    packed = np.asarray(packed)
    codes = np.stack([packed >> 4, packed & 15], -1).ravel().astype(np.int8)
    return ((codes ^ 8) - 8).astype(jnp.int4)
