"""Many adapters over one base, each along the first dimension of its leaves."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapters import (
    FullCopy,
    LowRank,
    arrays_of,
    check_adapter,
    check_stack,
    copy_of,
    find_adapters,
    is_adapter,
    without_adapters,
)
from lora_jax._arithmetic import check_base, check_values, layout_of
from lora_jax._engine.factors import wider
from lora_jax._leaves import adapter_leaves, input_norms, trained_copy
from lora_jax._tree import (
    Path,
    flatten,
    is_traced,
    path_name,
    unbox,
    unflatten,
)


def stack(trees: Sequence[Any]) -> Any:
    """Puts several adapters over one base together, to run them at once by `jax.vmap`.

    The base stays one, and is read once for all: training n adapters so takes the time
    of training one with all their tokens, and a batch may have one for each example.

        jax.vmap(lora(fn), in_axes=(in_axes(stacked), 0))(stacked, batches)

    Ranks that differ are padded with zeros, and an adapter that one tree lacks is zero:
    exact, and so it stays in training, as its gradient is zero too. A trained copy that
    a tree lacks is that of the leaf, and magnitudes those of the weight: also exact,
    but in training they move. To swap one of n, stack again: nothing compiles anew if
    the shapes are the same.

    Args:
      trees: Of `lorafy`, trained or not, over one base: their other leaves are the same
        arrays, or equal ones. (Of tracers only shapes are compared.)

    Returns:
      A tree with the containers and the base of the first; each leaf of an adapter has
      a first dimension more, of size n. `split`, `combine`, `mask`, `count`, `strip`,
      `detach` and `attach` take it as it is, all others under `jax.vmap` or by `take`.

    Raises:
      ValueError: If there is no tree, the bases differ, or a weight has adapters that
        are not of one kind: other inputs and outputs, magnitudes in some alone, or one
        trained whole. The message names the path.

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
    adapters = [find_adapters(own) for own in leaves]
    base = without_adapters(leaves[0], adapters[0])
    for i, (own, found) in enumerate(zip(leaves, adapters, strict=True)):
        check_base(base, without_adapters(own, found), i)
        check_values(own, found, finite=False)
    new: dict[Path, Any] = {}
    for path in dict.fromkeys(path for found in adapters for path in found):
        each = [found.get(path) for found in adapters]
        _check_kind(path, [own for own in each if own is not None])
        leaf, w = base[path], unbox(base[path])
        if any(isinstance(own, FullCopy) for own in each):
            copies = [
                unbox(tree[own.w]) if isinstance(own, FullCopy) else w
                for tree, own in zip(leaves, each, strict=True)
            ]
            new[copy_of(path).w] = trained_copy(
                leaf, jnp.stack(_of_one_dtype(copies)), stack=len(trees)
            )
        else:
            arrays = [
                arrays_of(own, tree) if isinstance(own, LowRank) else None
                for tree, own in zip(leaves, each, strict=True)
            ]
            new |= adapter_leaves(path, leaf, _padded(path, w, arrays), stacked=True)
    return unflatten(trees[0], base | new)


def take(stacked: Any, ids: Any) -> Any:
    """One adapter of a stack, or one for each example of a batch.

        own = take(stacked, ids)  # ids: (batch,)
        jax.vmap(lora(fn), in_axes=(in_axes(own), 0))(own, examples)

    Args:
      stacked: A tree of `stack`, or of `lorafy(..., stack=n)`.
      ids: Which: a whole number, or an array of them of one dimension; concrete or
        traced, so that other ids compile nothing anew.

    Returns:
      A tree that shares the base. For one id it is one as of `lorafy`; for an array a
      stack, with the adapters in the order of the ids. An id that is traced and out of
      range gives the base alone: its scale is 0, its copies are those of the leaves.

    Raises:
      ValueError: If the tree has no stack.
      TypeError: If `ids` are no whole numbers, or have more than one dimension.
      IndexError: If an id is out of range, outside of `jit`; negative ones are.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> stacked = lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2, stack=8)
      >>> lj.take(stacked, 5)["lora_a"].shape
      (4, 2)
      >>> lj.take(stacked, jnp.array([5, 0, 5]))["lora_a"].shape
      (3, 4, 2)
    """
    leaves = flatten(stacked)
    adapters = find_adapters(leaves, stacks=True)
    n = check_adapter(leaves, *next(iter(adapters.items())))
    if n is None:
        raise ValueError(_no_stack(next(iter(adapters.values())).trained[0]))
    ids, there = _checked(ids, n)
    several = ids.shape[0] if ids.ndim else None

    def where(inside: jax.Array, outside: jax.Array) -> jax.Array:
        if there is None:
            return inside
        known = jnp.reshape(there, there.shape + (1,) * (inside.ndim - there.ndim))
        outside = jnp.broadcast_to(outside.astype(inside.dtype), inside.shape)
        return jnp.where(known, inside, outside)

    new: dict[Path, Any] = {}
    for path, own in adapters.items():
        leaf, w = leaves[path], unbox(leaves[path])
        pick = lambda part: jnp.take(unbox(leaves[part]), ids, axis=0, mode="clip")
        if isinstance(own, FullCopy):
            new[own.w] = trained_copy(leaf, where(pick(own.w), w), stack=several)
            continue
        taken = own.map(pick)
        taken = dataclasses.replace(taken, scale=where(taken.scale, jnp.zeros(())))
        if there is not None and own.magnitude is not None:
            shape = unbox(leaves[own.magnitude]).shape[1:]
            norm = jnp.reshape(input_norms(w, own.axes.inputs), shape)
            taken = dataclasses.replace(taken, magnitude=where(taken.magnitude, norm))
        new |= adapter_leaves(path, leaf, taken, stacked=several is not None)
    return unflatten(stacked, leaves | new)


def in_axes(stacked: Any) -> Any:
    """What `jax.vmap` maps over in a tree of `stack`: 0 at adapters, `None` elsewhere.

    As `in_axes=`, and as `out_axes=` of a step that gives back the whole tree: there
    the base is not multiplied.

    Args:
      stacked: A tree of `stack`, of `take` with several ids, or a half of one, as
        `split` and `detach` make them.

    Returns:
      A tree with the same containers, a number or `None` for each leaf, boxed or not.

    Raises:
      ValueError: If there is no adapter, or the leaves of adapters have first
        dimensions that differ.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> stacked = lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2, stack=8)
      >>> lj.in_axes(stacked)
      {'kernel': None, 'lora_a': 0, 'lora_b': 0, 'lora_scale': 0}
    """
    leaves = flatten(stacked)
    own = {p: unbox(x) for p, x in leaves.items() if is_adapter(p) and x is not None}
    if not own:
        raise ValueError(
            "These parameters have no adapters. Write params = stack([one, two, ...])."
        )
    if single := [path for path, x in own.items() if not np.ndim(x)]:
        raise ValueError(_no_stack(single[0]))
    check_stack({path: x.shape[0] for path, x in own.items()})
    return unflatten(stacked, {path: 0 if path in own else None for path in leaves})


def _check_kind(path: Path, adapters: Sequence[LowRank[Path] | FullCopy]) -> None:
    """Raises unless the adapters of a leaf train leaves of the same names."""
    if len({own.trained for own in adapters}) > 1:
        raise ValueError(
            f"{path_name(path)!r} trains differently in these trees: whole (also=), in "
            "low rank, or with magnitudes (dora=True). Stack those of one kind."
        )


def _padded(
    path: Path, w: Any, each: Sequence[LowRank[Any] | None]
) -> LowRank[jax.Array]:
    """The adapters of one weight in a stack, all of the largest rank.

    Where there is none, one of zeros.
    """
    given = [own for own in each if own is not None]
    axes, at = layout_of(path, given)
    first, r = given[0], max(own.a.shape[-1] for own in given)
    nothing = first.map(jnp.zeros_like)
    if first.magnitude is not None and len(given) < len(each):
        norm = jnp.reshape(input_norms(w, axes.inputs), first.magnitude.shape)
        nothing = dataclasses.replace(nothing, magnitude=norm)

    def pad(x: jax.Array, axis: int) -> jax.Array:
        edges = [(0, 0)] * x.ndim
        edges[axis] = (0, r - x.shape[axis])
        return jnp.pad(x, edges)

    padded = [
        dataclasses.replace(own, a=pad(own.a, -1), b=pad(own.b, at))
        for own in (nothing if own is None else own for own in each)
    ]
    parts = (jnp.stack(_of_one_dtype(xs)) for xs in zip(*padded, strict=True))
    return LowRank(*parts, axes=first.axes, aligned=first.aligned)


def _of_one_dtype(xs: Sequence[jax.Array]) -> list[jax.Array]:
    dtypes = {x.dtype for x in xs}
    dtype = dtypes.pop() if len(dtypes) == 1 else wider(*dtypes)
    return [x.astype(dtype) for x in xs]


def _no_stack(path: Path) -> str:
    return (
        f"{path_name(path)!r} belongs to one adapter, and not to several in a stack. "
        "Write stack([one, two, ...]), or lorafy(..., stack=n)."
    )


def _checked(ids: Any, n: int) -> tuple[Any, Any]:
    """The ids as an array, and which are in range where that is not known yet."""
    if not hasattr(ids, "dtype"):
        ids = np.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim > 1:
        raise TypeError(
            "ids are whole numbers, one or an array of one dimension, found "
            f"{ids.dtype} of shape {ids.shape}."
        )
    if is_traced(ids):
        return ids, (ids >= 0) & (ids < n)
    if wrong := sorted({int(i) for i in np.ravel(ids) if not 0 <= i < n}):
        raise IndexError(f"ids {wrong} are out of range: the stack has 0 to {n - 1}.")
    return jnp.asarray(ids), None
