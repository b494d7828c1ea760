"""Back to plain parameters: with the update in the weights, or without it."""

from typing import Any

import jax

from lora_jax._adapters import (
    adapters_if_any,
    find_adapters,
    of_rank,
    without_adapters,
)
from lora_jax._engine.dora import weight
from lora_jax._engine.factors import materialize
from lora_jax._engine.quantized import dequantize
from lora_jax._lorafy import with_copies
from lora_jax._tree import (
    flatten,
    is_abstract,
    quantized_leaves,
    rebox,
    unbox,
    unflatten,
)


def merge(params: Any) -> Any:
    """The plain parameters with the updates in them: W + scale * A B.

    Each sum is made in float32 (float64 for a float64 weight) and cast once to the
    weight's dtype; with DoRA's magnitudes m (W + scale * A B) / |W + scale * A B|, the
    norm over the inputs. Trained copies take the places of their leaves, cast likewise.
    Weights in few bits become floats, also those without an adapter. The result has the
    tree, boxes and dtypes from before `lorafy` and `quantize`.

    Args:
      params: A tree from `lorafy`, or from `quantize`; or a live module.

    Returns:
      A new tree; leaves that nothing adapts are shared. For a `LoRA` it is a plain
      model, as from `module.merge()`.

    Raises:
      ValueError: If `params` has nothing to merge, or a broken adapter.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> params = lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2)
      >>> sorted(lj.merge(params))
      ['kernel']
    """
    leaves = flatten(params)
    adapters = adapters_if_any(leaves)
    plain = with_copies(leaves, adapters)
    stored = {path: () for path in quantized_leaves(plain)}
    for path, own in (stored | of_rank(adapters)).items():
        parts = (unbox(leaves[part]) for part in (path, *own))
        plain[path] = rebox(leaves[path], _merged(*parts))
    return unflatten(params, plain)


def _merged(w: Any, *adapter: Any) -> Any:
    whole = lambda w, *parts: materialize(weight(w, *parts)) if parts else dequantize(w)
    abstract = any(map(is_abstract, (w, *adapter)))
    return jax.eval_shape(whole, w, *adapter) if abstract else whole(w, *adapter)


def strip(params: Any) -> Any:
    """The plain parameters without the updates, bit for bit, in few bits or not.

    Args:
      params: A tree from `lorafy`.

    Returns:
      A new tree that shares every leaf but the adapters'.

    Raises:
      ValueError: If `params` has no adapters, or a broken one.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> base = {"kernel": jnp.ones((4, 3))}
      >>> lj.strip(lj.lorafy(base, rank=2))["kernel"] is base["kernel"]
      True
    """
    leaves = flatten(params)
    adapters = find_adapters(leaves, stacks=True)
    return unflatten(params, without_adapters(leaves, adapters))
