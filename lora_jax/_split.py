"""The trainable part and the frozen part of a tree: two trees, one mask, or a count."""

from typing import Any, NamedTuple

from lora_jax._adapters import (
    FROZEN,
    adapters_if_any,
    find_adapters,
    label_of,
    without_adapters,
)
from lora_jax._engine.quantized import nbytes
from lora_jax._tree import (
    Path,
    flatten,
    is_array,
    is_counter,
    path_name,
    unbox,
    unflatten,
)

UNITS = ("B", "kB", "MB", "GB", "TB")


class Count(NamedTuple):
    """How many numbers train, and how many there are; scales are not counted.

    `base_bytes` is what XLA keeps the frozen ones in.
    """

    trainable: int
    total: int
    base_bytes: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        size, unit = float(self.base_bytes), 0
        while size >= 1000 and unit < len(UNITS) - 1:
            size, unit = size / 1000, unit + 1
        return (
            f"trainable {self.trainable:,} of {self.total:,} ({share:.2f} %), "
            f"base {size:.3g} {UNITS[unit]}"
        )


def split(params: Any) -> tuple[Any, Any]:
    """Splits parameters in two trees of the same shape, with `None` in the holes.

    Differentiating with respect to the first alone never computes a gradient of a
    frozen weight, and an optimizer of the first alone holds no state for one. A jitted
    step that takes both and returns the first copies no frozen weight. It may donate
    the first, `@jax.jit(donate_argnums=(0, 1))`, and the base stays for other trees.

    Args:
      params: A tree from `lorafy`.

    Returns:
      `(adapters, base)`: the trainable leaves, which are A, B and magnitudes of each
      adapter and each trained copy; and all other leaves, scales too. To store the
      adapters, use `detach`, which includes their scales.

    Raises:
      ValueError: If `params` has no adapters, or a broken one.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj
      >>> params = lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2)
      >>> adapters, base = lj.split(params)
      >>> jax.tree.map(jnp.shape, adapters)
      {'kernel': None, 'lora_a': (4, 2), 'lora_b': (2, 3), 'lora_scale': None}
    """
    leaves = flatten(params)
    trains = trainable(leaves)
    return (
        unflatten(params, {p: x if p in trains else None for p, x in leaves.items()}),
        unflatten(params, {p: None if p in trains else x for p, x in leaves.items()}),
    )


def combine(adapters: Any, base: Any) -> Any:
    """Joins the two trees of `split`, before or after training, into one.

    Args:
      adapters: The trainable tree, or any of the same structure.
      base: The frozen tree.

    Returns:
      A new tree that shares the leaves of both.

    Raises:
      ValueError: If the two are not halves of one tree.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> params = lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2)
      >>> sorted(lj.combine(*lj.split(params)))
      ['kernel', 'lora_a', 'lora_b', 'lora_scale']
    """
    first, second = flatten(adapters), flatten(base)
    for path in first | second:
        if path not in first or path not in second:
            where = "base" if path in first else "adapters"
            raise ValueError(
                f"{path_name(path)!r} is missing in {where}. Pass the two trees of one "
                "split(params)."
            )
        if first[path] is not None and second[path] is not None:
            raise ValueError(
                f"{path_name(path)!r} is in adapters and in base. Pass the two trees "
                "of one split(params)."
            )
    joined = {p: x if first[p] is None else first[p] for p, x in second.items()}
    return unflatten(base, joined)


def mask(params: Any) -> Any:
    """Makes a tree with `True` at each trainable leaf and `False` at the others.

    For `optax.masked`, `optax.freeze` and their like; `adapters_only` needs no mask.
    Use it, or `labels`, or `nnx.LoRAParam` in an nnx module, in place of a filter of
    your own: ".*lora.*" also takes `lora_scale`. A scale has no gradient, but an
    optimizer with weight decay, such as `optax.adamw`, shrinks every leaf that it is
    given. (`optax.masked` passes the gradients of the other leaves on as updates:
    `optax.partition` with `labels` sets them to zero.)

    Args:
      params: A tree from `lorafy`.

    Returns:
      A tree of the same containers with a bool for each leaf, boxed or not.

    Raises:
      ValueError: As `split`.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> lj.mask(lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2))
      {'kernel': False, 'lora_a': True, 'lora_b': True, 'lora_scale': False}
    """
    leaves = flatten(params)
    trains = trainable(leaves)
    return unflatten(params, {path: path in trains for path in leaves})


def labels(params: Any) -> Any:
    """Labels each leaf "lora_a", "lora_b", "lora_magnitude", "lora_w", or "frozen".

    For `optax.partition`, to train factors at different rates. LoRA+ has a larger rate
    for B than for A. LoRA-FA keeps A as it is drawn: under one `jit` its gradient is
    never computed, nor is x kept for it. A scale is "frozen"; a filter of names such as
    ".*lora.*" would take it, and weight decay would shrink it.

    Args:
      params: A tree from `lorafy`, or the half of `split` that trains.

    Returns:
      A tree with the same containers and a string for each leaf, boxed or not; `None`
      in the holes of a half.

    Raises:
      ValueError: If `params` has no adapters.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj, optax
      >>> params = lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2)
      >>> sorted(lj.labels(params).items())[:2]
      [('kernel', 'frozen'), ('lora_a', 'lora_a')]
      >>> rates = {"lora_a": optax.adam(1e-4), "lora_b": optax.adam(16e-4)}
      >>> plus = lj.adapters_only(optax.partition(rates, lj.labels))
      >>> rates = {"lora_a": optax.set_to_zero(), "lora_b": optax.adam(1e-3)}
      >>> frozen_a = lj.adapters_only(optax.partition(rates, lj.labels))

    Reference:
      Hayou et al., "LoRA+", 2024. https://arxiv.org/abs/2402.12354
      Zhang et al., "LoRA-FA", 2023. https://arxiv.org/abs/2308.03303
    """
    leaves = flatten(params)
    found = {p: None if x is None else label_of(p) for p, x in leaves.items()}
    if not {*found.values()} - {None, FROZEN}:
        raise ValueError(
            "These parameters have no adapters. Write params = lorafy(params, rank), "
            "or LoRA(model, rank) for a live nnx.Module."
        )
    return unflatten(params, found)


def count(params: Any) -> Count:
    """Counts the numbers that train, all that there are, and the bytes of the base.

    Args:
      params: A tree from `lorafy`, or from `quantize`.

    Returns:
      `Count(trainable, total, base_bytes)`. The scales of adapters, which are settings,
      are not counted. The bytes are those of all frozen leaves, as XLA keeps them: of
      weights in few bits, their numbers (two of four bits to a byte) and their scales.

    Raises:
      ValueError: As `split`, but that a tree in few bits needs no adapters.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> base = {"kernel": jnp.ones((64, 32))}
      >>> print(lj.count(lj.lorafy(base, rank=1)))
      trainable 96 of 2,144 (4.48 %), base 8.19 kB
      >>> print(lj.count(lj.lorafy(lj.quantize(base, "nf4"), rank=1)))
      trainable 96 of 2,144 (4.48 %), base 1.09 kB
    """
    leaves = flatten(params)
    adapters = adapters_if_any(leaves, stacks=True)
    boxed = {p: x for p, x in leaves.items() if not is_counter(x)}
    arrays = {p: unbox(x) for p, x in boxed.items() if is_array(unbox(x))}
    base = without_adapters(arrays, adapters)
    trained = sum(
        arrays[part].size for own in adapters.values() for part in own.trained
    )
    frozen = sum(x.size for x in base.values())
    return Count(trained, trained + frozen, sum(map(nbytes, base.values())))


def trainable(leaves: dict[Path, Any]) -> set[Path]:
    """The paths of all leaves that train."""
    found = find_adapters(leaves, stacks=True)
    return {part for own in found.values() for part in own.trained}
