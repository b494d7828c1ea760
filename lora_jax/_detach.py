"""Separates adapters from their base (`detach`) and joins them again (`attach`)."""

from typing import Any

from lora_jax._adapters import check_own, find_adapters, is_adapter
from lora_jax._tree import Path, PyTree, flatten, is_box, listed, path_name, unflatten


def detach(params: PyTree) -> PyTree:
    """Returns all leaves of the adapters, scales included, and `None` elsewhere.

    Use the result to checkpoint adapters with Orbax or any other checkpointer of trees,
    to average them over steps, or to swap them while a program runs, which compiles
    nothing again. (`split` divides a tree for training: its scales, which are never
    trained, stay with the base.)

    Args:
      params: A tree from `lorafy`; arrays, tracers or `ShapeDtypeStruct`.

    Returns:
      A tree with the same containers that shares the leaves of every adapter and
      trained copy, with `None` in the other places.

    Raises:
      ValueError: If `params` has no adapters, or a broken one.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj
      >>> params = lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2)
      >>> jax.tree.map(jnp.shape, lj.detach(params))
      {'kernel': None, 'lora_a': (4, 2), 'lora_b': (2, 3), 'lora_scale': ()}
    """
    leaves = flatten(params)
    parts = {
        part
        for adapter in find_adapters(leaves, stacks=True).values()
        for part in adapter
    }
    return unflatten(params, {p: x if p in parts else None for p, x in leaves.items()})


def attach(adapters: PyTree, base: PyTree) -> PyTree:
    """Puts adapters next to the weights of a plain tree: the inverse of `detach`.

    Args:
      adapters: A tree from `detach`, or one like it that a checkpointer restored.
      base: The plain parameters: the tree of `strip`, before `lorafy`; or a plain live
        `nnx.Module`.

    Returns:
      A new tree that shares the leaves of both. For a live module it is a `LoRA`.

    Raises:
      ValueError: If a leaf of an adapter is missing or does not fit its weight; if
        `base` lacks a weight or already has an adapter there; or if `adapters` has
        leaves that are no adapters. Whether `base` is the one that they were trained on
        is not checked: only files of `save` allow that.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> params = lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2)
      >>> sorted(lj.attach(lj.detach(params), lj.strip(params)))
      ['kernel', 'lora_a', 'lora_b', 'lora_scale']
    """
    leaves, given = flatten(base), flatten(adapters)
    check_own(given)
    new = {path: x for path, x in given.items() if x is not None}
    for path, x in given.items():
        if x is None and is_adapter(path):
            raise ValueError(
                f"adapters lacks {path_name(path)!r}. Pass detach(params), which keeps "
                "scales, not a half of split(params)."
            )
        if x is None and path not in leaves:
            raise ValueError(
                f"base lacks {path_name(path)!r}, which the tree of the adapters has. "
                "Pass the parameters that they were trained for."
            )
        if x is not None and not is_adapter(path):
            raise ValueError(
                f"adapters contains {path_name(path)!r}, which is no leaf of an "
                "adapter. Pass detach(params)."
            )
    if len(new) < len(given) and (lost := [p for p in leaves if p not in given]):
        raise ValueError(
            f"base has {listed(lost)}, which the tree of the adapters lacks. Pass all "
            "of detach(params), and the parameters that the adapters were trained for."
        )
    return attached(base, leaves, new)


def attached(base: PyTree, leaves: dict[Path, Any], new: dict[Path, Any]) -> PyTree:
    """Returns the tree `base`, with these leaves, and the new leaves of adapters."""
    for path in new:
        if path in leaves:
            raise ValueError(
                f"base already has the adapter leaf {path_name(path)!r}. Pass the "
                "plain parameters, strip(params)."
            )
    found = find_adapters(leaves | new, stacks=True)  # raises if one is broken
    for weight, adapter in found.items():
        for path in adapter:
            if is_box(leaves[weight]) and path in new and not is_box(new[path]):
                raise ValueError(
                    f"{path_name(path)!r} is a plain array, and its weight is in a "
                    f"{type(leaves[weight]).__name__}: no filter would select it. "
                    "Restore it into detach(lorafy(base, rank)), with boxes."
                )
    return unflatten(base, leaves | new)
