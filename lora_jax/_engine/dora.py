"""Weights with magnitudes: m (W + s A B) / |W + s A B|, the norm over the inputs.

The quotient m / |W + s A B| is the gain of `Factors`, one element per output. The norm
counts as a constant in derivatives (Liu et al., "DoRA", 2024, section 4.3). It is
computed from |W|, W^T A and B: the sum is not materialized.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._engine.dtypes import wider
from lora_jax._engine.factors import (
    Factors,
    align,
    batch_dims,
    dims_of,
    on_device,
    squeeze_absent,
)
from lora_jax._engine.low_rank import einsum
from lora_jax._engine.quantized import is_quantized, spread, widened


def from_leaves(
    w: Any,
    a: Any,
    b: Any,
    scale: Any,
    magnitude: Any = None,
    *,
    name: str = "",
    gates: bool = False,
) -> Factors:
    """`Factors` from the leaves of a tree, those of DoRA or of LoRA.

    Where the norm is zero there is nothing to divide, and the weight is zero.
    """
    return with_magnitude(align(w, a, b, scale, name, gates=gates), magnitude)


def with_magnitude(f: Factors, magnitude: Any) -> Factors:
    """The same weight with the gain of a magnitude; None is no magnitude."""
    if magnitude is None:
        return f
    outputs = [d for d in range(f.ndim) if f.b.shape[d] != 1]
    sizes = [n if d in outputs else 1 for d, n in enumerate(f.shape)]
    norm = norms(lax.stop_gradient(f))
    gain = jnp.reshape(magnitude, sizes).astype(norm.dtype)
    return dataclasses.replace(f, gain=gain / jnp.where(norm > 0, norm, 1))


def norms(f: Factors) -> jax.Array:
    """|W + s A B| over the inputs, in float32 or wider, of size 1 along them.

    A quantized stack is dequantized one layer at a time.
    """
    if not (is_quantized(f.w) and batch_dims(f)):
        return _norms(f)
    layer = min(batch_dims(f))
    parts = {"w": spread(f.w, layer), "a": f.a, "b": f.b, "scale": f.scale}
    front = lambda x: jnp.moveaxis(x, layer, 0)
    back = lambda x: jnp.expand_dims(x, layer)
    one = lambda parts: _norms(dataclasses.replace(f, **jax.tree.map(back, parts)))
    each = lax.map(one, jax.tree.map(front, parts))
    return jnp.moveaxis(jnp.squeeze(each, layer + 1), 0, layer)


# Jitted, so that JAX traces those of equal layers once.
@functools.partial(jax.jit, inline=True)
def _norms(f: Factors) -> jax.Array:
    dtype = wider(f.dtype, f.a.dtype, f.b.dtype)
    w, a, b = (widened(on_device(x), dtype) for x in (f.w, f.a, f.b))
    b = b * on_device(f.scale).astype(dtype)
    product = functools.partial(einsum, precision=lax.Precision.HIGHEST)
    dims, r, q = list(range(f.ndim)), f.ndim, f.ndim + 1
    in_a, in_b = dims_of(a), dims_of(b)
    inputs = [d for d in dims if b.shape[d] == 1]
    outputs = [d for d in dims if d not in inputs]
    layers = [d for d in in_a if d in in_b]
    a, b = squeeze_absent(a), squeeze_absent(b)
    # |W + A B|^2 = |W|^2 + 2 (W^T A) B + B^T (A^T A) B, for each output; B is scaled.
    met = product(w, dims, a, [*in_a, r], [*outputs, r])
    met = product(met, [*outputs, r], b, [*in_b, r], outputs)
    gram = product(a, [*in_a, r], a, [*in_a, q], [*layers, r, q])
    square = product(gram, [*layers, r, q], b, [*in_b, q], [*in_b, r])
    square = product(square, [*in_b, r], b, [*in_b, r], in_b)
    sizes = [n if d in in_b else 1 for d, n in enumerate(f.shape)]
    total = jnp.sum(w * w, axis=tuple(inputs), keepdims=True)
    total += 2 * jnp.expand_dims(met, inputs)
    total += jnp.reshape(square, sizes)
    return jnp.sqrt(jnp.maximum(total, 0))
