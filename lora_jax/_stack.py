"""Stacks adapters over one base along a first dimension, to run them by `jax.vmap`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lora_jax._adapters import (
    Adapters,
    FullCopy,
    LowRank,
    adapter_of,
    arrays_of,
    check_adapter,
    check_stack,
    copy_of,
    find_adapters,
    fits,
    is_adapter,
    scale_of_ranks,
    without_adapters,
)
from lora_jax._checks import check_base, check_values, layout_of
from lora_jax._leaves import (
    adapter_leaves,
    input_norms,
    of_one_dtype,
    trained_copy,
)
from lora_jax._tree import (
    Path,
    PyTree,
    flatten,
    is_array,
    is_traced,
    path_name,
    unbox,
    unflatten,
)


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Stacks several adapters over one base, to run them at once by `jax.vmap`.

        jax.vmap(lora(fn), in_axes=(in_axes(stacked), 0))(stacked, batches)

    The base is not stacked, and is read once for all adapters: training n adapters in
    this way takes as long as training one on all of their tokens. A batch may also use
    another adapter for each example: see `take`.

    Smaller ranks are padded with zeros, and where a tree has no adapter, its adapter is
    zero. Both are exact, also in training, because their gradients are zero. Where a
    tree has no trained copy or no magnitudes, it gets those of the weight; these are
    exact too, but training changes them. To replace one of n adapters, stack again:
    nothing is recompiled if the shapes are the same.

    Args:
      trees: Trees from `lorafy`, trained or not, over one base: their other leaves are
        the same arrays or equal ones. (Tracers are compared by shape and dtype.)

    Returns:
      A tree with the containers and the base of the first; each adapter leaf has an
      additional first dimension of size n. `split`, `combine`, `mask`, `count`,
      `strip`, `detach` and `attach` accept this tree; other functions accept it under
      `jax.vmap`, or accept one adapter from `take`.

    Raises:
      ValueError: If there is no tree; if the bases differ; or if the adapters of a
        weight are of different kinds: with other inputs and outputs, with and without
        magnitudes, or low-rank and trained copy. The message names the path.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj
      >>> base = {"kernel": jnp.ones((4, 3))}
      >>> both = lj.stack([lj.lorafy(base, rank) for rank in (1, 2)])
      >>> both["lora_a"].shape, both["lora_b"].shape, both["kernel"].shape
      ((2, 4, 2), (2, 2, 3), (4, 3))
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> run = jax.vmap(lj.lora(fn), in_axes=(lj.in_axes(both), 0))
      >>> run(both, jnp.ones((2, 5, 4))).shape
      (2, 5, 3)
    """
    if isinstance(trees, Mapping) or not isinstance(trees, Sequence):
        raise TypeError(
            f"stack takes a list of trees, found {type(trees).__name__}. Write "
            "stack([one, two, ...])."
        )
    if not trees:
        raise ValueError("There is nothing to stack. Write stack([one, two, ...]).")
    leaves = [flatten(tree) for tree in trees]
    adapters = [find_adapters(tree) for tree in leaves]
    base = without_adapters(leaves[0], adapters[0])
    for i, (tree, found) in enumerate(zip(leaves, adapters, strict=True)):
        check_base(base, without_adapters(tree, found), i)
        check_values(tree, found, finite=False)
    new: dict[Path, Any] = {}
    for path in dict.fromkeys(path for found in adapters for path in found):
        each = [found.get(path) for found in adapters]
        _check_kind(path, [adapter for adapter in each if adapter is not None])
        leaf, w = base[path], unbox(base[path])
        if any(isinstance(adapter, FullCopy) for adapter in each):
            copies = [
                unbox(tree[x.w]) if isinstance(x, FullCopy) else w
                for tree, x in zip(leaves, each, strict=True)
            ]
            new[copy_of(path).w] = trained_copy(
                leaf, jnp.stack(of_one_dtype(copies)), stack=len(trees)
            )
        else:
            arrays = [
                arrays_of(x, tree) if isinstance(x, LowRank) else None
                for tree, x in zip(leaves, each, strict=True)
            ]
            new |= adapter_leaves(path, leaf, _padded(path, w, arrays), stacked=True)
    return unflatten(trees[0], base | new)


def take(stacked: PyTree, ids: ArrayLike | Sequence[int]) -> PyTree:
    """Returns one adapter of a stack, or one for each example of a batch.

        own = take(stacked, ids)  # ids: (batch,)
        jax.vmap(lora(fn), in_axes=(in_axes(own), 0))(own, examples)

    Args:
      stacked: A tree from `stack`, or from `lorafy(..., stack=n)`.
      ids: The index of an adapter, or a one-dimensional array of indices. They may be
        traced, so that other indices recompile nothing.

    Returns:
      A tree that shares the base. For one index it is like a tree from `lorafy`; for an
      array it is a stack with the adapters in the order of the indices. A traced index
      that is out of range gives the base alone: scale 0, and copies and magnitudes that
      equal the base.

    Raises:
      ValueError: If the tree has no stack.
      TypeError: If `ids` are no integers, or have more than one dimension.
      IndexError: If a concrete index is negative or too large.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> stacked = lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2, stack=8)
      >>> lj.take(stacked, 5)["lora_a"].shape
      (4, 2)
      >>> lj.take(stacked, jnp.array([5, 0, 5]))["lora_a"].shape
      (3, 4, 2)
    """
    leaves = flatten(stacked)
    adapters, n = find_stack(leaves)
    index, valid = check_ids(ids, n)
    several = index.shape[0] if index.ndim else None

    def where_valid(x: jax.Array, default: jax.Array) -> jax.Array:
        if valid is None:
            return x
        mask = jnp.reshape(valid, valid.shape + (1,) * (x.ndim - valid.ndim))
        return jnp.where(mask, x, jnp.broadcast_to(default.astype(x.dtype), x.shape))

    new: dict[Path, Any] = {}
    for path, adapter in adapters.items():
        leaf, w = leaves[path], unbox(leaves[path])
        pick = lambda part: jnp.take(unbox(leaves[part]), index, axis=0, mode="clip")
        if isinstance(adapter, FullCopy):
            copies = where_valid(pick(adapter.w), w)
            new[adapter.w] = trained_copy(leaf, copies, stack=several)
            continue
        taken = adapter.map(pick)
        scale, m = where_valid(taken.scale, jnp.zeros(())), taken.magnitude
        if valid is not None and m is not None:
            norm = jnp.reshape(
                input_norms(w, adapter.axes.inputs), m.shape[index.ndim :]
            )
            m = where_valid(m, norm)
        taken = dataclasses.replace(taken, scale=scale, magnitude=m)
        new |= adapter_leaves(path, leaf, taken, stacked=several is not None)
    return unflatten(stacked, leaves | new)


def in_axes(stacked: PyTree) -> PyTree:
    """Returns the `in_axes` of `jax.vmap` for a stack: 0 at adapters, `None` elsewhere.

    It is also the `out_axes` of a step that returns the tree: the base in the result
    then is that of the arguments, not n copies of it.

    Args:
      stacked: A tree from `stack`, from `take` with several indices, or a half of one
        from `split` or `detach`; or a tree from `mix`, of which only scales are mapped.

    Returns:
      A tree with the same containers, with 0 or `None` for each leaf, boxed or not.

    Raises:
      ValueError: If there is no adapter, or if the leaves of adapters have different
        first dimensions.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> stacked = lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2, stack=8)
      >>> lj.in_axes(stacked)
      {'kernel': None, 'lora_a': 0, 'lora_b': 0, 'lora_scale': 0}
    """
    leaves = flatten(stacked)
    arrays = {p: unbox(x) for p, x in leaves.items() if is_adapter(p) and x is not None}
    if not arrays:
        raise ValueError(
            "These parameters have no adapters. Write params = stack([one, two, ...])."
        )
    mapped = _mixed_scales(leaves) or set(arrays)
    if single := [path for path in mapped if not np.ndim(arrays[path])]:
        raise ValueError(_no_stack(single[0]))
    check_stack({path: arrays[path].shape[0] for path in mapped})
    return unflatten(stacked, {path: 0 if path in mapped else None for path in leaves})


def _mixed_scales(leaves: Mapping[Path, Any]) -> set[Path]:
    """Returns the scales of a tree from `mix`: one for each example and each rank."""
    found = set()
    for path in leaves:
        parts = adapter_of(path)
        arrays = [unbox(leaves.get(p)) for p in (path, *parts)]
        if not all(is_array(x) for x in arrays):
            continue  # not a weight with an adapter, or a half of the tree
        w, a, b, scale = (x.shape for x in arrays)
        if not fits(w, a, b, scale) and fits(w, a, b, scale[1:]):
            found.add(parts.scale)
    return found


def _check_kind(path: Path, adapters: Sequence[LowRank[Path] | FullCopy]) -> None:
    """Raises unless the adapters of a leaf have the same parts."""
    if len({adapter.trained for adapter in adapters}) > 1:
        raise ValueError(
            f"{path_name(path)!r} has adapters of different kinds in these trees: "
            "low-rank, with magnitudes (dora=True), or a trained copy (also=). Stack "
            "adapters of one kind."
        )


def _padded(
    path: Path, w: Any, each: Sequence[LowRank[Any] | None]
) -> LowRank[jax.Array]:
    """Returns the adapters of one weight in a stack, padded to the largest rank.

    Where a tree has none (`None`), its adapter is zero.
    """
    given = [adapter for adapter in each if adapter is not None]
    axes, at = layout_of(path, given)
    first, r = given[0], max(adapter.a.shape[-1] for adapter in given)
    nothing = first.map(jnp.zeros_like)
    if first.magnitude is not None and len(given) < len(each):
        norm = jnp.reshape(input_norms(w, axes.inputs), first.magnitude.shape)
        nothing = dataclasses.replace(nothing, magnitude=norm)

    def pad(x: jax.Array, axis: int) -> jax.Array:
        edges = [(0, 0)] * x.ndim
        edges[axis] = (0, r - x.shape[axis])
        return jnp.pad(x, edges)

    rank_scales = any(adapter.rank_scales for adapter in given)

    def widened(adapter: LowRank[Any]) -> LowRank[Any]:
        scale = adapter.scale
        if rank_scales:
            scale = pad(scale_of_ranks(adapter), -1)
        a, b = pad(adapter.a, -1), pad(adapter.b, at)
        return dataclasses.replace(adapter, a=a, b=b, scale=scale)

    padded = [widened(nothing if adapter is None else adapter) for adapter in each]
    parts = (jnp.stack(of_one_dtype(xs)) for xs in zip(*padded, strict=True))
    return LowRank(*parts, **first.layout | {"rank_scales": rank_scales})


def find_stack(leaves: Mapping[Path, Any]) -> tuple[Adapters, int]:
    """Returns the adapters of a stack, and their number.

    Raises:
      ValueError: As `find_adapters`, or if each weight has a single adapter.
    """
    adapters = find_adapters(leaves, stacks=True)
    path, adapter = next(iter(adapters.items()))
    n = check_adapter(leaves, path, adapter)
    if n is None:
        raise ValueError(_no_stack(adapter.trained[0]))
    return adapters, n


def _no_stack(path: Path) -> str:
    return (
        f"{path_name(path)!r} belongs to one adapter, not to a stack. Write "
        "stack([one, two, ...]), or lorafy(..., stack=n)."
    )


def check_ids(ids: Any, n: int) -> tuple[jax.Array, jax.Array | None]:
    """Returns indices as an array, and which are in range if they are traced."""
    if not hasattr(ids, "dtype"):
        ids = np.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim > 1:
        raise TypeError(
            "ids must be an integer or a one-dimensional array of integers, found "
            f"{ids.dtype} of shape {ids.shape}."
        )
    if is_traced(ids):
        return ids, (ids >= 0) & (ids < n)
    if wrong := sorted({int(i) for i in np.ravel(ids) if not 0 <= i < n}):
        raise IndexError(f"ids {wrong} are out of range: the stack has 0 to {n - 1}.")
    return jnp.asarray(ids), None
