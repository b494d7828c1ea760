"""Returns plain parameters: with the updates (`merge`) or without them (`strip`)."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from lora_jax._adapters import (
    adapters_or_quantized,
    find_adapters,
    of_copies,
    of_rank,
    without_adapters,
)
from lora_jax._engine.dora import with_magnitude
from lora_jax._engine.dtypes import rounded, wider, x64
from lora_jax._engine.factors import (
    align,
    batch_dims,
    materialize,
    on_device,
)
from lora_jax._engine.per_layer import per_layer
from lora_jax._engine.quantized import (
    Quantized,
    dequantize,
    is_quantized,
    loops_over,
    spread,
    values_of,
)
from lora_jax._engine.source import warn_user
from lora_jax._leaves import with_copies
from lora_jax._tree import (
    Path,
    PyTree,
    flatten,
    is_abstract,
    is_traced,
    path_name,
    quantized_leaves,
    rebox,
    unbox,
    unflatten,
)

MOST = 0.5  # the share of an update whose loss to rounding causes a warning


def merge(params: PyTree, *, dtype: DTypeLike | None = None) -> PyTree:
    """Returns the plain parameters with the updates in them: W + scale * A B.

    Each sum is computed in float32 (float64 for a float64 weight) and cast once. With
    DoRA's magnitudes m it is m (W + scale * A B) / |W + scale * A B|, where the norm is
    over the inputs. Trained copies replace their leaves. Quantized weights become
    floats, also those without an adapter. The result has the structure, boxes and,
    without `dtype`, the dtypes from before `lorafy` and `quantize`.

    A weight's own dtype may be too coarse for its update: a bfloat16 weight does not
    change where the update is below 0.2 % of it. If rounding loses most of an update, a
    warning names the weight (outside of `jit`, where values are known).

    Args:
      params: A tree from `lorafy`, or from `quantize`; or a live module.
      dtype: The dtype of adapted weights and trained copies in the result; other leaves
        keep theirs. Default: the dtype of each leaf.

    Returns:
      A new tree, which shares the leaves without an adapter. For a `LoRA` it is a plain
      model, as from `module.merge()`.

    Raises:
      ValueError: If `params` has nothing to merge or a broken adapter, or if `dtype` is
        not floating.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> params = lj.lorafy({"kernel": jnp.ones((4, 3), jnp.bfloat16)}, rank=2)
      >>> sorted(lj.merge(params))
      ['kernel']
      >>> lj.merge(params, dtype=jnp.float32)["kernel"].dtype.name
      'float32'
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"dtype must be floating, found {jnp.dtype(dtype).name}. Write "
            "merge(params, dtype=jnp.float32)."
        )
    leaves = flatten(params)
    adapters = adapters_or_quantized(leaves)
    plain = with_copies(leaves, adapters)
    for path, w in quantized_leaves(plain).items():
        if path not in adapters:
            plain[path] = rebox(leaves[path], _plain(w))
    if dtype is not None:
        for path, copy in of_copies(adapters).items():
            plain[path] = rebox(leaves[path], _cast(unbox(leaves[copy.w]), dtype))
    norms: dict[Path, Any] = {}
    for path, adapter in of_rank(adapters).items():
        w, *factors = (unbox(leaves[part]) for part in (path, *adapter))
        total, norms[path] = _merged(w, factors, dtype or w.dtype)
        plain[path] = rebox(leaves[path], total)
    _warn_of_loss({path: x for path, x in norms.items() if x}, plain)
    return unflatten(params, plain)


def _plain(w: Quantized) -> Any:
    return jax.eval_shape(dequantize, w) if is_abstract(w) else dequantize(w)


def _cast(x: Any, dtype: Any) -> Any:
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    return x.update(dtype=dtype) if is_abstract(x) else x.astype(dtype)


def _merged(w: Any, adapter: list[Any], dtype: Any) -> tuple[Any, Any]:
    """Returns a weight with its update, and the squared norms of `_sum` or `None`."""
    parts = (w, *adapter)
    options = {"dtype": jnp.dtype(dtype), "loops": (), "measured": False}
    if any(map(is_abstract, parts)):
        total, _ = jax.eval_shape(functools.partial(_sum, **options), *parts)
        return total.update(sharding=getattr(values_of(w), "sharding", None)), None
    # The device cannot compute with arrays in the host's memory: move them, and move
    # the sum back.
    near, *adapter = on_device(parts)
    stack = sorted(batch_dims(jax.eval_shape(align, near, *adapter[:3])))
    options["loops"] = tuple(loops_over(near, stack).items())
    with x64([w.dtype] if isinstance(w, jax.Array) else []):
        if any(map(is_traced, parts)):
            total, norms = _sum(near, *adapter, **options)
        else:
            options["measured"] = jnp.finfo(dtype).nmant < jnp.finfo("float32").nmant
            sharding = getattr(values_of(near), "sharding", None)
            out = sharding if isinstance(sharding, NamedSharding) else None
            fn = jax.jit(_sum, static_argnames=[*options], out_shardings=(out, None))
            total, norms = fn(near, *adapter, **options)
    if is_quantized(w) or near is w:
        return total, norms
    back = jax.memory.Space.Host if is_traced(w) else w.sharding
    return jax.device_put(total, back, src=jax.memory.Space.Device), norms


def _sum(
    w: Any,
    a: Any,
    b: Any,
    scale: Any,
    magnitude: Any = None,
    *,
    dtype: Any,
    loops: tuple[tuple[int, int], ...],
    measured: bool,
) -> tuple[Any, Any]:
    """Returns W + scale * A B in a dtype, and squared norms if `measured`.

    The norms are those of the change by the final rounding and of the update. They cost
    another pass over the weight. `loops` are the stacked dimensions, which are looped
    over so that float32 intermediates exist for one layer only, and the number of parts
    that a mesh cuts each into.
    """
    f = align(w, a, b, scale)
    if magnitude is not None:  # align it with the dimensions of the weight
        sizes = [n if f.b.shape[d] != 1 else 1 for d, n in enumerate(f.shape)]
        magnitude = jnp.reshape(magnitude, sizes)
    for d, _ in loops:
        if is_quantized(f.w):
            f = dataclasses.replace(f, w=spread(f.w, d))
    leaves, structure = jax.tree.flatten((f, magnitude))
    summed = [d for d in range(f.ndim) if d not in dict(loops)]
    to = jax.dtypes.canonicalize_dtype(dtype)

    def one(*leaves: Any) -> tuple[Any, ...]:
        f, magnitude = structure.unflatten(leaves)
        w = dequantize(f.w)
        if is_quantized(f.w):
            # The floats must be those of `dequantize`. Without the barrier XLA may fuse
            # the product with the scales and the sum into one operation, which rounds
            # only once.
            w = lax.optimization_barrier(w)
        w = w.astype(wider(w.dtype, to))
        total = materialize(with_magnitude(dataclasses.replace(f, w=w), magnitude))
        if not measured:
            return (total.astype(to),)
        result = rounded(total, to)
        changes = total - result.astype(total.dtype), total - w
        return result, *(jnp.sum(x**2, summed, keepdims=True) for x in changes)

    total, *norms = per_layer(one, leaves, dict(loops))
    return total, [jnp.sum(x) for x in norms]


def _warn_of_loss(norms: dict[Path, Any], plain: dict[Path, Any]) -> None:
    """Warns once, naming all weights whose update is mostly lost to rounding."""
    lost = []
    for path, (change, update) in norms.items():
        change, update = float(change), float(update)
        share = min(math.sqrt(change / update), 1.0) if update else 0.0
        if share > MOST:
            dtype = unbox(plain[path]).dtype
            lost.append(f"{path_name(path)!r} ({share:.0%} in {dtype})")
    if lost:
        warn_user(
            "Rounding the merged weights loses most of the updates of "
            f"{', '.join(lost[:6])}{', ...' if len(lost) > 6 else ''}. To keep them, "
            "write merge(params, dtype=jnp.float32)."
        )


def strip(params: PyTree) -> PyTree:
    """Returns the plain parameters without the updates, bit for bit.

    Args:
      params: A tree from `lorafy`.

    Returns:
      A new tree that shares all leaves except those of adapters. Quantized weights
      stay quantized.

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
