"""Adds adapters over one base (`add`) and multiplies them (`rescale`), exactly."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapters import (
    Adapters,
    FullCopy,
    LowRank,
    arrays_of,
    copy_of,
    find_adapters,
    scale_of_ranks,
    without_adapters,
)
from lora_jax._checks import check_base, check_values, layout_of
from lora_jax._engine.dtypes import wider
from lora_jax._engine.factors import align, delta
from lora_jax._engine.quantized import dequantize
from lora_jax._leaves import adapter_leaves, of_one_dtype, trained_copy
from lora_jax._patterns import by_pattern
from lora_jax._tree import (
    Path,
    PyTree,
    flatten,
    is_traced,
    path_name,
    rebox,
    unbox,
    unflatten,
)

Number = float | jax.Array
# One term of a sum: its coefficient, and an adapter's arrays or a trained copy.
Term = tuple[Number, LowRank[Any] | jax.Array]


def add(*params: PyTree, weights: Sequence[Number] | None = None) -> PyTree:
    """Adds the updates of several adapters over one base, exactly.

    The result computes W + sum_i c_i s_i A_i B_i. The ranks add up, because averaging
    factors does not average their products. The result adapts each weight that any of
    the trees adapts. Trained copies become W + sum_i c_i (w_i - W), which includes the
    low-rank updates that other trees have there.

    Args:
      *params: Trees from `lorafy`, trained or not, over one base: their other leaves
        are the same arrays or equal ones. (Tracers are compared by shape and dtype.)
      weights: A number c_i for each tree, which may be traced. Default: 1 for each.

    Returns:
      A tree with the containers and the base of the first. Where only one tree adapts a
      weight, its factors are shared and its scale is multiplied. Where several do,
      `lora_a` and `lora_b` are the concatenations of theirs, and `lora_scale`, of shape
      (batch..., rank), has c_i s_i for each of their ranks.

    Raises:
      ValueError: If there is no tree, or not one weight for each tree; if the bases
        differ; if a weight has adapters with different inputs and outputs; or if an
        adapter is broken, not finite, or has DoRA's magnitudes. The message names the
        path.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj
      >>> base = {"kernel": jnp.ones((4, 3))}
      >>> one, two = (lj.lorafy(base, 2, key=jax.random.key(i)) for i in range(2))
      >>> average = lj.add(one, two, weights=[0.5, 0.5])
      >>> average["lora_a"].shape, average["lora_b"].shape
      ((4, 4), (4, 3))
    """
    if not params:
        raise ValueError("There is nothing to add. Write add(one, two, ...).")
    weights = [1.0] * len(params) if weights is None else [*weights]
    if len(weights) != len(params):
        raise ValueError(
            f"add needs one weight for each of its {len(params)} trees, found "
            f"{len(weights)}. Write weights=[...] with {len(params)} numbers."
        )
    weights = [_number(c, "weights") for c in weights]
    trees = [flatten(tree) for tree in params]
    adapters = [find_adapters(leaves) for leaves in trees]
    for adapter in adapters:
        _check_linear(adapter, "add")
    base = without_adapters(trees[0], adapters[0])
    for i, (leaves, adapter) in enumerate(zip(trees, adapters, strict=True)):
        check_base(base, without_adapters(leaves, adapter), i)
        check_values(leaves, adapter)
    new: dict[Path, Any] = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter):
        terms = [
            (c, _values(leaves, adapter[path]))
            for c, leaves, adapter in zip(weights, trees, adapters, strict=True)
            if path in adapter
        ]
        w = unbox(base[path])
        factored = [(c, x) for c, x in terms if isinstance(x, LowRank)]
        if len(factored) < len(terms):  # a trained copy includes the updates
            total = _full_sum(w, terms)
            new[copy_of(path).w] = trained_copy(base[path], total)
        else:
            new |= adapter_leaves(path, base[path], _low_rank_sum(path, factored))
    return unflatten(params[0], base | new)


def rescale(params: PyTree, factor: Number | Mapping[str, Number]) -> PyTree:
    """Multiplies the updates of adapters by a number.

    A negative number subtracts the updates, and 0 turns them off. Only scales change,
    and trained copies: w becomes W + factor (w - W).

    Args:
      params: A tree from `lorafy`.
      factor: A number, which may be traced, or `{pattern: number}` for some weights.

    Returns:
      A tree that shares all other leaves.

    Raises:
      ValueError: If a factor is no finite number, if a pattern matches no adapter, or
        if an adapter is broken, not finite, or has DoRA's magnitudes.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> params = lj.lorafy({"kernel": jnp.ones((4, 3))}, 2)
      >>> float(lj.rescale(params, -1)["lora_scale"])
      -1.0
    """
    leaves = flatten(params)
    adapters = find_adapters(leaves)
    check_values(leaves, adapters)
    _check_linear(adapters, "rescale")
    if isinstance(factor, Mapping):
        given = {name: _number(x, "factor") for name, x in factor.items()}
        factors = by_pattern(given, [*adapters], "factor")
    else:
        number = _number(factor, "factor")
        factors = {path: number for path in adapters}
    new = {}
    for path, c in factors.items():
        adapter = adapters[path]
        if isinstance(adapter, LowRank):
            scale = unbox(leaves[adapter.scale])
            new[adapter.scale] = rebox(leaves[adapter.scale], _times(scale, c))
        else:
            copy = unbox(leaves[adapter.w])
            total = _full_sum(unbox(leaves[path]), [(c, copy)]).astype(copy.dtype)
            new[adapter.w] = rebox(leaves[adapter.w], total)
    return unflatten(params, leaves | new)


def _check_linear(adapters: Adapters, verb: str) -> None:
    """Raises for DoRA: a sum or multiple of its updates is no update of DoRA."""
    for path, adapter in adapters.items():
        if isinstance(adapter, LowRank) and adapter.magnitude is not None:
            raise ValueError(
                f"{verb} cannot be exact for {path_name(path)!r}, which has DoRA's "
                "magnitudes. For the nearest adapter without them, write "
                "extract(merge(params), base, rank)."
            )


def _number(x: Any, name: str) -> Any:
    """Returns a number of the caller, after checking that it is finite or traced."""
    kind = getattr(x, "dtype", None) or np.result_type(type(x))
    real = any(jnp.issubdtype(kind, k) for k in (jnp.integer, jnp.floating))
    if not real or np.shape(x) != () or not (is_traced(x) or math.isfinite(x)):
        raise ValueError(f"{name} must be finite numbers, found {x!r}.")
    return x


def _times(x: jax.Array, c: Number) -> jax.Array:
    return x * jnp.asarray(c, x.dtype)


def _values(leaves: dict[Path, Any], adapter: LowRank[Path] | FullCopy) -> Any:
    return (
        arrays_of(adapter, leaves)
        if isinstance(adapter, LowRank)
        else unbox(leaves[adapter.w])
    )


def _full_sum(w: Any, terms: Sequence[Term]) -> jax.Array:
    """Returns W + sum c_i (w_i - W), where w_i is a copy or the sum of an adapter."""
    w = dequantize(w)
    firsts = (x.a if isinstance(x, LowRank) else x for _, x in terms)
    wide = wider(w.dtype, *(x.dtype for x in firsts))
    w = total = jnp.asarray(w, wide)
    for c, x in terms:
        if isinstance(x, LowRank):
            update = delta(align(w, *x)).astype(wide)
        else:
            update = jnp.asarray(x, wide) - w
        total = total + _times(update, c)
    return total


def _low_rank_sum(
    path: Path, terms: Sequence[tuple[Number, LowRank[Any]]]
) -> LowRank[jax.Array]:
    """Returns the sum of several low-rank updates: their ranks, each with its scale."""
    first = terms[0][1]
    _, at = layout_of(path, [term for _, term in terms])
    if len(terms) == 1:
        return dataclasses.replace(first, scale=_times(first.scale, terms[0][0]))
    parts = [term for _, term in terms]
    a = jnp.concatenate(of_one_dtype([term.a for term in parts]), -1)
    b = jnp.concatenate(of_one_dtype([term.b for term in parts]), at)
    scales = [_times(scale_of_ranks(term), c) for c, term in terms]
    scale = jnp.concatenate(of_one_dtype(scales), -1)
    return dataclasses.replace(first, a=a, b=b, scale=scale, rank_scales=True)
