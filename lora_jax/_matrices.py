"""Weights and factors as batches of matrices, and low-rank approximations of those.

A weight with `Axes(batch, inputs, outputs)` is a batch of matrices (in, out): one for
each layer or expert of a stack, or a batch of one. Its factors are `Matrices`.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapters import Axes, LowRank
from lora_jax._engine.dtypes import wider
from lora_jax._leaves import gaussian

# Matrices whose smaller side is larger get a randomized SVD, which computes only the
# largest singular values (Halko et al., 2011).
LARGE = 1024
OVERSAMPLING, ITERATIONS = 16, 4  # directions beyond the rank; power iterations


class Matrices(NamedTuple):
    """The factors of an adapter as matrices, one pair for each of a batch."""

    a: jax.Array  # (batch, in, r)
    b: jax.Array  # (batch, r, out)


def matrix_sizes(shape: tuple[int, ...], axes: Axes) -> list[int]:
    """Returns the sizes (batch, in, out) of a weight as matrices."""
    return [math.prod(shape[d] for d in dims) for dims in axes]


def weight_matrices(w: jax.Array, axes: Axes) -> jax.Array:
    """Returns a weight as matrices, (batch, in, out)."""
    order = (*axes.batch, *axes.inputs, *axes.outputs)
    return jnp.reshape(jnp.transpose(w, order), matrix_sizes(w.shape, axes))


def factor_matrices(shape: tuple[int, ...], adapter: LowRank[Any]) -> Matrices:
    """Returns the factors of a weight of this shape as matrices, float32 or wider."""
    a, b = adapter.a, adapter.b
    dtype, r = wider(a.dtype, b.dtype), a.shape[-1]
    n, n_in, n_out = matrix_sizes(shape, adapter.axes)
    if adapter.aligned:  # the rank last, and size 1 elsewhere
        a, b = (jnp.transpose(x, _order(adapter.axes, x)) for x in (a, b))
        b = jnp.swapaxes(jnp.reshape(b, (n, n_out, r)), 1, 2)
    return Matrices(
        jnp.reshape(a, (n, n_in, r)).astype(dtype),
        jnp.reshape(b, (n, r, n_out)).astype(dtype),
    )


def with_scale_in_b(
    adapter: LowRank[Any], factors: Matrices
) -> tuple[LowRank[Any], Matrices]:
    """Returns an adapter whose ranks have one scale, and its factors as matrices.

    Scales that differ between ranks are multiplied into B, and become 1.
    """
    if not adapter.rank_scales:
        return adapter, factors
    a, b = factors
    scale = jnp.reshape(adapter.scale, (*b.shape[:2], 1)).astype(b.dtype)
    ones = jnp.ones(adapter.scale.shape[:-1], adapter.scale.dtype)
    return dataclasses.replace(adapter, scale=ones, rank_scales=False), Matrices(
        a, b * scale
    )


def with_matrices(adapter: LowRank[Any], new: Matrices) -> LowRank[Any]:
    """Returns an adapter with new factors, perhaps of another rank.

    Their layout and dtypes stay. The result has no magnitude: that of the tree stays.
    """
    a, b, r = adapter.a, adapter.b, new.a.shape[-1]
    if not adapter.aligned:
        n = len(adapter.axes.batch)
        sizes = (*a.shape[:-1], r), (*b.shape[:n], r, *b.shape[n + 1 :])
        parts = [jnp.reshape(x, size) for x, size in zip(new, sizes, strict=True)]
    else:
        parts = []
        for x, old in ((new.a, a), (jnp.swapaxes(new.b, 1, 2), b)):
            order = _order(adapter.axes, old)
            sizes = [(*old.shape[:-1], r)[d] for d in order]
            inverse = np.argsort(order).tolist()
            parts.append(jnp.transpose(jnp.reshape(x, sizes), inverse))
    a, b = (x.astype(old.dtype) for x, old in zip(parts, (a, b), strict=True))
    return dataclasses.replace(adapter, a=a, b=b, magnitude=None)


def _order(axes: Axes, x: Any) -> tuple[int, ...]:
    return (*axes.batch, *axes.inputs, *axes.outputs, x.ndim - 1)


# All products below are of full float32 precision: by default a TPU rounds their
# operands to bfloat16, whose errors hide the smaller singular values.


def truncated(factors: Matrices, r: int) -> Matrices:
    """Returns the nearest products of rank r, from thin QR and a small SVD.

    With A = Q R and B^T = P T, and U S V^T the SVD of R T^T, the nearest A B is the
    product of Q U S^1/2 = A T^T V S^-1/2 and S^1/2 V^T P^T = S^-1/2 U^T R B. The right
    sides need neither Q nor P, nor anything of the size of the weight.
    """

    def one(a, b):
        r_a, r_b = (jnp.linalg.qr(x, mode="r") for x in (a, b.T))
        u, s, v = jnp.linalg.svd(r_a @ r_b.T, full_matrices=False)
        u, s, v = u[:, :r], s[:r], v[:r]
        live = s > s[0] * jnp.finfo(s.dtype).eps
        root = jnp.where(live, 1 / jnp.sqrt(jnp.where(live, s, 1)), 0)
        return a @ (r_b.T @ v.T * root[None]), (root[:, None] * (u.T @ r_a)) @ b

    with jax.default_matmul_precision("highest"):
        a, b = jax.vmap(one)(*factors)
    missing = r - a.shape[-1]  # the matrices have fewer than r singular values
    return Matrices(
        jnp.pad(a, ((0, 0), (0, 0), (0, missing))),
        jnp.pad(b, ((0, 0), (0, missing), (0, 0))),
    )


def padded(factors: Matrices, r: int, key: jax.Array) -> Matrices:
    """Returns equal products of a larger rank: random columns in A, zeros in B."""
    a, b = factors
    n, n_in, r_old = a.shape
    keys = jax.random.split(key, n)
    more = jax.vmap(lambda key: gaussian(key, (n_in, r - r_old), a.dtype))(keys)
    zeros = jnp.zeros((n, r - r_old, b.shape[-1]), b.dtype)
    return Matrices(jnp.concatenate([a, more], 2), jnp.concatenate([b, zeros], 1))


def nearest(matrices: jax.Array, start: Matrices) -> Matrices:
    """Returns the nearest products to matrices (batch, in, out), of `start`'s rank.

    Where a matrix has a lower rank, the remaining columns of A are those of `start`,
    and the rows of B are zero.
    """
    r = start.a.shape[-1]
    full = min(matrices.shape[1:])
    randomized = full > LARGE and r + OVERSAMPLING < full // 2

    def one(m, a, b):
        if randomized:
            u, s, v = _largest(m, r + OVERSAMPLING)
        else:
            u, s, v = jnp.linalg.svd(m, full_matrices=False)
        k = min(r, full)
        u, s, v = u[:, :k], s[:k], v[:k]
        live = s > s[0] * jnp.finfo(s.dtype).eps * full
        root = jnp.sqrt(s)
        a = a.at[:, :k].set(jnp.where(live[None], u * root[None], a[:, :k]))
        b = b.at[:k].set(jnp.where(live[:, None], root[:, None] * v, 0))
        return a, b

    with jax.default_matmul_precision("highest"):
        a, b = jax.vmap(one)(matrices.astype(start.a.dtype), *start)
    return Matrices(a, jnp.where(jnp.arange(r)[None, :, None] < full, b, 0))


def _largest(m: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Approximates the k largest singular values and vectors of a matrix.

    Halko et al., algorithm 4.4: QR after each product keeps small directions apart.
    """
    q = jax.random.normal(jax.random.key(0), (m.shape[1], k), m.dtype)
    q, _ = jnp.linalg.qr(m @ q)
    for _ in range(ITERATIONS):
        q, _ = jnp.linalg.qr(m.T @ q)
        q, _ = jnp.linalg.qr(m @ q)
    u, s, v = jnp.linalg.svd(q.T @ m, full_matrices=False)
    return q @ u, s, v
