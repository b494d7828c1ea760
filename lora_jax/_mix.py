"""`mix`: the adapters of a batch side by side as one, of which only scales differ."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lora_jax._adapters import (
    ABSENT,
    FullCopy,
    LowRank,
    adapter_of,
    arrays_of,
    factor_dims,
    scale_of_ranks,
)
from lora_jax._leaves import new_leaf
from lora_jax._stack import check_ids, find_stack
from lora_jax._tree import (
    Path,
    PyTree,
    flatten,
    is_traced,
    path_name,
    unbox,
    unflatten,
)


def mix(
    stacked: PyTree, ids: ArrayLike | Sequence[int], *, most: int | None = None
) -> PyTree:
    """Returns the tree of a batch in which each example uses an adapter of a stack.

        mixed = mix(stacked, ids)  # ids: (batch,)
        jax.vmap(lora(fn), in_axes=(in_axes(mixed), 0))(mixed, examples)

    It computes what `take(stacked, ids)` does, and copies no factors: those of all n
    adapters stand side by side once, as one adapter of rank n * r, with a scale for
    each rank. Only the scales differ between examples: those of its own adapter for r
    ranks, 0 for all others. So each token costs the products of all n adapters, or of k
    with `most=k`, and no memory for each example. That is better where examples have
    few tokens and share few adapters, as in decoding; `take` is better for long
    examples, and for many different adapters.

    Gradients go to the factors of each adapter, so that one step trains the adapters of
    several tasks, each with the examples of its own.

    Args:
      stacked: A tree from `stack`, or from `lorafy(..., stack=n)`.
      ids: The index of an adapter for each example, (batch,); or the weight of every
        adapter, floating, (batch, n): the update is the weighted sum. Either may be
        traced. For learned weights write `lora(fn, gates=True)`: otherwise no gradient
        reaches them, since they are in `lora_scale`.
      most: How many different adapters a batch of indices has at most: their factors
        are gathered, once each.

    Returns:
      A tree that shares the base, with `lora_a` and `lora_b` of rank n * r, or k * r,
      and `lora_scale` (batch, ..., rank). `in_axes` maps the scale alone. A traced
      index that is out of range, or beyond the first `most` different ones, gives the
      base alone.

    Raises:
      ValueError: If the tree has no stack; if it has trained copies or magnitudes,
        which cannot be mixed (use `take`); or if there are more than `most` indices.
      TypeError: If `ids` are neither indices nor weights.
      IndexError: If a concrete index is negative or too large.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj
      >>> stacked = lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2, stack=8)
      >>> mixed = lj.mix(stacked, jnp.array([5, 0, 5]), most=2)
      >>> jax.tree.map(jnp.shape, mixed)["lora_a"], mixed["lora_scale"].shape
      ((4, 4), (3, 4))
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> run = jax.vmap(lj.lora(fn), in_axes=(lj.in_axes(mixed), 0))
      >>> run(mixed, jnp.ones((3, 4))).shape
      (3, 3)

    Reference:
      Chen et al., "Punica: Multi-Tenant LoRA Serving", 2023.
      https://arxiv.org/abs/2310.18547
    """
    leaves = flatten(stacked)
    adapters, n = find_stack(leaves)
    for path, adapter in adapters.items():
        if isinstance(adapter, FullCopy) or adapter.magnitude is not None:
            kind = "a trained copy" if isinstance(adapter, FullCopy) else "magnitudes"
            raise ValueError(
                f"{path_name(path)!r} has {kind} of each adapter, which cannot be "
                "mixed without a copy for each example. Write take(stacked, ids)."
            )
    chosen, gates = _gates(ids, n, most)
    new: dict[Path, Any] = {}
    for path, adapter in adapters.items():
        assert isinstance(adapter, LowRank)
        arrays = arrays_of(adapter, leaves)
        if chosen is not None:
            arrays = arrays.map(lambda x: jnp.take(x, chosen, axis=0, mode="clip"))
        mixed = _side_by_side(arrays, gates)
        dims = factor_dims(unbox(leaves[path]).shape, **mixed.layout)
        examples = (ABSENT,) * (gates.ndim - 1)
        parts = adapter_of(path)
        new[parts.a] = new_leaf(mixed.a, dims.a, leaves[path])
        new[parts.b] = new_leaf(mixed.b, dims.b, leaves[path])
        scale_dims = (*examples, *dims.scale)
        new[parts.scale] = new_leaf(
            mixed.scale, scale_dims, leaves[path], trained=False
        )
    return unflatten(stacked, leaves | new)


def _side_by_side(adapter: LowRank[Any], gates: jax.Array) -> LowRank[jax.Array]:
    """Returns the adapters of a stack as one, whose scales are those of each example.

    Args:
      adapter: The arrays of one weight, each with n adapters along its first dimension.
      gates: (examples..., n).
    """
    a, b = adapter.a, adapter.b
    n, r = len(a), a.shape[-1]
    at = b.ndim - 1 if adapter.aligned else 1 + len(adapter.axes.batch)
    a = jnp.moveaxis(a, 0, -2)  # (..., n, r)
    b = jnp.moveaxis(b, 0, at - 1)  # the rank is now at `at`
    scale = jnp.moveaxis(scale_of_ranks(adapter), 0, -2)  # (batch..., n, r)
    batch = scale.shape[:-2]
    gates = jnp.reshape(gates, (*gates.shape[:-1], *[1] * len(batch), n, 1))
    scale = gates.astype(scale.dtype) * jnp.reshape(
        scale, (*[1] * (gates.ndim - scale.ndim), *scale.shape)
    )
    a = jnp.reshape(a, (*a.shape[:-2], n * r))
    b = jnp.reshape(b, (*b.shape[: at - 1], n * r, *b.shape[at + 1 :]))
    scale = jnp.reshape(scale, (*scale.shape[:-2], n * r))
    return dataclasses.replace(adapter, a=a, b=b, scale=scale, rank_scales=True)


def _gates(ids: Any, n: int, most: int | None) -> tuple[jax.Array | None, jax.Array]:
    """Returns the adapters to gather, if not all, and each example's weight of each."""
    if not hasattr(ids, "dtype"):
        ids = np.asarray(ids)
    if jnp.issubdtype(ids.dtype, jnp.floating):
        if most is not None:
            raise TypeError("most= is for indices: weights use every adapter.")
        if ids.ndim > 2 or ids.shape[-1:] != (n,):
            raise TypeError(
                f"Weights must be of shape (batch, {n}), for the {n} adapters of the "
                f"stack; found {ids.shape}."
            )
        return None, jnp.asarray(ids)
    index, _ = check_ids(ids, n)
    if most is not None and (type(most) is not int or most < 1):
        raise ValueError(f"most must be a whole number above 0, found {most!r}.")
    gates = jax.nn.one_hot(index, n)  # zeros where out of range
    if most is None or most >= n:
        return None, gates
    if not is_traced(index) and len(found := np.unique(np.asarray(index))) > most:
        raise ValueError(
            f"The batch has {len(found)} different adapters, and most={most}. Write "
            f"mix(stacked, ids, most={len(found)})."
        )
    # The indices of the batch, in order, then n, which `mix` clips and which has zeros
    # for gates. `jnp.unique` would be a dozen scans and scatters over the batch.
    there = jnp.any(jnp.reshape(gates, (-1, n)) > 0, axis=0)
    chosen = jnp.sort(jnp.where(there, jnp.arange(n), n))[:most]
    return chosen, jnp.take(gates, chosen, axis=-1, mode="fill", fill_value=0)
