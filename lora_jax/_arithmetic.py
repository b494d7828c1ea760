"""Sums and multiples of adapters over one base, exactly."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapters import (
    Adapters,
    Axes,
    FullCopy,
    LowRank,
    arrays_of,
    copy_of,
    find_adapters,
    without_adapters,
)
from lora_jax._engine.factors import align, delta, wider
from lora_jax._engine.quantized import dequantize
from lora_jax._leaves import adapter_leaves, trained_copy
from lora_jax._patterns import by_pattern
from lora_jax._tree import (
    Path,
    flatten,
    is_abstract,
    is_counter,
    is_quantized,
    is_traced,
    listed,
    path_name,
    rebox,
    unbox,
    unflatten,
)

Number = float | jax.Array
# What a tree adds to a sum: a number, and an adapter's arrays or a trained copy.
Term = tuple[Number, LowRank[Any] | jax.Array]


def add(*params: Any, weights: Sequence[Number] | None = None) -> Any:
    """Adds the updates of several adapters over one base, exactly.

    The result computes W + sum_i c_i s_i A_i B_i: ranks add up, since the average of
    factors is not that of their products. Adapters of different weights are united.
    Trained copies become W + sum_i c_i (w_i - W), with the updates of others in them.

    Args:
      *params: Trees from `lorafy`, trained or not, over one base: their other leaves
        are the same arrays, or equal ones. (Of tracers only shapes are compared.)
      weights: A number c_i for each, which may be traced. Default: 1 for each.

    Returns:
      A tree with the containers and the base of the first. Where one tree alone adapts
      a weight, its factors are shared and its scale is multiplied; where several do,
      `lora_a` is all of theirs, `lora_b` all of theirs times c_i s_i, in float32 or
      wider, and the scale is 1.

    Raises:
      ValueError: If there is no tree, or a number of weights other than theirs; if the
        bases differ, or a weight has adapters whose inputs and outputs differ; if an
        adapter is broken, or not finite. The message names the path.

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
            f"add takes a weight for each of its {len(params)} trees, found "
            f"{len(weights)}. Write weights=[...] with one for each."
        )
    weights = [_number(c, "weights") for c in weights]
    trees = [flatten(tree) for tree in params]
    adapters = [find_adapters(leaves) for leaves in trees]
    for own in adapters:
        _check_linear(own, "add")
    base = without_adapters(trees[0], adapters[0])
    for i, (leaves, own) in enumerate(zip(trees, adapters, strict=True)):
        check_base(base, without_adapters(leaves, own), i)
        check_values(leaves, own)
    new: dict[Path, Any] = {}
    for path in dict.fromkeys(path for own in adapters for path in own):
        terms = [
            (c, _values(leaves, own[path]))
            for c, leaves, own in zip(weights, trees, adapters, strict=True)
            if path in own
        ]
        w = unbox(base[path])
        factored = [(c, x) for c, x in terms if isinstance(x, LowRank)]
        if len(factored) < len(terms):  # a copy: whole already
            total = _copies(w, terms)
            new[copy_of(path).w] = trained_copy(base[path], total)
        else:
            new |= adapter_leaves(path, base[path], _ranks(path, w, factored))
    return unflatten(params[0], base | new)


def rescale(params: Any, factor: Number | Mapping[str, Number]) -> Any:
    """Multiplies the updates of adapters by a number.

    A negative one unlearns what was learned, 0 switches it off. The scales change, and
    nothing else does; a trained copy w becomes W + factor (w - W).

    Args:
      params: A tree from `lorafy`.
      factor: A number, which may be traced, or `{pattern: number}` for some weights.

    Returns:
      A tree that shares all other leaves.

    Raises:
      ValueError: If a factor is no finite number, or a pattern matches no adapter.

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
        factors = {name: _number(x, "factor") for name, x in factor.items()}
        factors = by_pattern(factors, [*adapters], "factor")
    else:
        factors = dict.fromkeys(adapters, _number(factor, "factor"))
    new = {}
    for path, c in factors.items():
        own = adapters[path]
        if isinstance(own, LowRank):
            scale = unbox(leaves[own.scale])
            new[own.scale] = rebox(leaves[own.scale], _times(scale, c))
        else:
            copy = unbox(leaves[own.w])
            total = _copies(unbox(leaves[path]), [(c, copy)]).astype(copy.dtype)
            new[own.w] = rebox(leaves[own.w], total)
    return unflatten(params, leaves | new)


def check_values(
    leaves: dict[Path, Any],
    adapters: Adapters,
    *,
    finite: bool = True,
) -> None:
    """Raises if a leaf of an adapter has no values, or one that is not finite."""
    for own in adapters.values():
        for path in own:
            x = unbox(leaves[path])
            if is_abstract(x):
                raise ValueError(
                    f"{path_name(path)!r} has no values: it is a shape. Pass arrays, "
                    "or take the shapes of the whole, jax.eval_shape(...)."
                )
            if finite and not (is_traced(x) or jnp.isfinite(x).all()):
                raise ValueError(
                    f"{path_name(path)!r} is not finite: training has diverged before "
                    "it. Restore an earlier one."
                )


def _check_linear(adapters: Adapters, verb: str) -> None:
    """Raises for DoRA: of weights with norms neither sums nor multiples are such."""
    for path, own in adapters.items():
        if isinstance(own, LowRank) and own.magnitude is not None:
            raise ValueError(
                f"{verb} cannot be exact for {path_name(path)!r}, which has DoRA's "
                "magnitudes: no adapter is that. Take extract(merge(params), base, "
                "rank) for the nearest one without them."
            )


def _number(x: Any, name: str) -> Any:
    """A number of a caller: finite, or traced."""
    kind = getattr(x, "dtype", None) or np.result_type(type(x))
    real = any(jnp.issubdtype(kind, k) for k in (jnp.integer, jnp.floating))
    if not real or np.shape(x) != () or not (is_traced(x) or math.isfinite(x)):
        raise ValueError(f"{name} must be finite numbers, found {x!r}.")
    return x


def _times(x: jax.Array, c: Number) -> jax.Array:
    return x * jnp.asarray(c, x.dtype)


def check_base(base: dict[Path, Any], other: dict[Path, Any], i: int) -> None:
    """Raises if another tree's plain leaves are not those of the first."""
    for path in base | other:
        first, second = (unbox(leaves.get(path)) for leaves in (base, other))
        if is_counter(base.get(path)) or first is second or _equal(first, second):
            continue
        raise ValueError(
            f"The trees stand over different bases: {path_name(path)!r} of tree {i} is "
            "not that of tree 0. Put them over one base first: "
            "attach(detach(params), base)."
        )


def _equal(x: Any, y: Any) -> bool:
    """Whether two leaves are equal, as far as can be known."""
    if is_quantized(x) and is_quantized(y):
        parts = (x.values, y.values), (x.scale, y.scale)
        same = (x.dtypes, x.format) == (y.dtypes, y.format)
        return same and all(_equal(a, b) for a, b in parts)
    if is_quantized(x) or is_quantized(y):
        return False
    described = [(getattr(z, "shape", None), getattr(z, "dtype", None)) for z in (x, y)]
    if described[0] != described[1]:
        return False
    if described[0] == (None, None):
        return bool(x == y)
    unknown = any(is_traced(z) or is_abstract(z) for z in (x, y))
    return unknown or bool(jnp.array_equal(x, y))


def _values(leaves: dict[Path, Any], own: LowRank[Path] | FullCopy) -> Any:
    return arrays_of(own, leaves) if isinstance(own, LowRank) else unbox(leaves[own.w])


def _copies(w: Any, terms: Sequence[Term]) -> jax.Array:
    """W + sum c_i (w_i - W), and the updates of adapters beside it, in full."""
    w = dequantize(w)
    firsts = (x.a if isinstance(x, LowRank) else x for _, x in terms)
    wide = wider(w.dtype, *(x.dtype for x in firsts))
    w = total = jnp.asarray(w, wide)
    for c, x in terms:
        moved = (
            delta(align(w, *x)).astype(wide)
            if isinstance(x, LowRank)
            else jnp.asarray(x, wide) - w
        )
        total = total + _times(moved, c)
    return total


def _ranks(
    path: Path, w: Any, terms: Sequence[tuple[Number, LowRank[Any]]]
) -> LowRank[jax.Array]:
    """The leaves of the sum of several low-rank updates."""
    first = terms[0][1]
    axes, at = layout_of(path, [own for _, own in terms])
    if len(terms) == 1:
        return dataclasses.replace(first, scale=_times(first.scale, terms[0][0]))
    dtype = wider(*(x.dtype for _, own in terms for x in (own.a, own.b)))
    folded = []
    for c, own in terms:
        b, scale = own.b, own.scale
        if own.aligned:  # of a batch, each dimension stands as in the weight
            batch = {*axes.batch}
            sizes = [*(n if d in batch else 1 for d, n in enumerate(w.shape)), 1]
        else:
            sizes = [*scale.shape, *[1] * (b.ndim - scale.ndim)]
        scale = jnp.reshape(_times(scale, c).astype(dtype), sizes)
        folded.append(b.astype(dtype) * scale)
    a = jnp.concatenate([own.a.astype(dtype) for _, own in terms], -1)
    b, scale = jnp.concatenate(folded, at), jnp.ones_like(first.scale)
    return dataclasses.replace(first, a=a, b=b, scale=scale)


def layout_of(path: Path, adapters: Sequence[LowRank[Any]]) -> tuple[Axes, int]:
    """The dimensions that adapters say a weight has, and which of B is the rank.

    Of A it is the last. Of B too where the two are aligned, else that after the batch.
    """
    found = dict.fromkeys((own.axes, own.aligned) for own in adapters)
    if len(found) > 1:
        raise ValueError(
            f"The adapters of {path_name(path)!r} have different inputs and outputs, "
            f"{listed([str(axes) for axes, _ in found])}, and make no adapter "
            "together. Build them with the same axes."
        )
    ((axes, aligned),) = found
    return axes, sum(map(len, axes)) if aligned else len(axes.batch)
