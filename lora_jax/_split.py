"""Separates the trainable leaves of a tree from the frozen ones."""

from typing import Any, NamedTuple

from lora_jax._adapters import (
    FROZEN,
    adapters_or_quantized,
    find_adapters,
    label_of,
    without_adapters,
)
from lora_jax._engine.quantized import nbytes
from lora_jax._tree import (
    Path,
    PyTree,
    flatten,
    is_array,
    is_counter,
    path_name,
    unbox,
    unflatten,
)

UNITS = ("B", "kB", "MB", "GB", "TB")


class Count(NamedTuple):
    """The number of trainable and of all parameters. Prints as one line.

    `base_bytes` is the size of the frozen leaves in XLA's memory.
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


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """Splits parameters into trainable and frozen ones: two trees with `None` in them.

    Differentiating with respect to the first tree computes no gradient of a frozen
    weight, and an optimizer of the first tree holds no state for one. A jitted step
    that takes both and returns the first copies no frozen weight. It may donate the
    first and the optimizer's state, `@jax.jit(donate_argnums=(0, 1))`; the base remains
    usable with other adapters.

    Args:
      params: A tree from `lorafy`.

    Returns:
      `(adapters, base)`: the trainable leaves, which are A, B and the magnitudes of
      each adapter, and the trained copies; and all other leaves, including scales. To
      store adapters, use `detach`, which includes their scales.

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
    trained = trainable(leaves)
    return (
        unflatten(params, {p: x if p in trained else None for p, x in leaves.items()}),
        unflatten(params, {p: None if p in trained else x for p, x in leaves.items()}),
    )


def combine(adapters: PyTree, base: PyTree) -> PyTree:
    """Joins the two trees of `split`, before or after training, into one.

    Args:
      adapters: The trainable tree, or another one of the same structure.
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


def mask(params: PyTree) -> PyTree:
    """Makes a tree with `True` at each trainable leaf and `False` at the others.

    For `optax.masked`, `optax.freeze` and the like; `adapters_only` needs no mask. Use
    it, or `labels`, or `nnx.LoRAParam` in an nnx module, instead of a filter of your
    own: `".*lora.*"` also selects `lora_scale`. A scale has no gradient, but an
    optimizer with weight decay, such as `optax.adamw`, shrinks every leaf that it gets.
    (`optax.masked` passes the gradients of the other leaves on as updates, while
    `optax.partition` with `labels` sets them to zero.)

    Args:
      params: A tree from `lorafy`.

    Returns:
      A tree with the same containers and a bool in the place of each leaf or box.

    Raises:
      ValueError: As `split`.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> lj.mask(lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2))
      {'kernel': False, 'lora_a': True, 'lora_b': True, 'lora_scale': False}
    """
    leaves = flatten(params)
    trained = trainable(leaves)
    return unflatten(params, {path: path in trained for path in leaves})


def labels(params: PyTree) -> PyTree:
    """Labels each leaf "lora_a", "lora_b", "lora_magnitude", "lora_w", or "frozen".

    For `optax.partition`, to train factors at different rates. LoRA+ has a larger rate
    for B than for A. LoRA-FA freezes A at its initial values: under one `jit` its
    gradient is not computed, and x is not stored for it. A scale is "frozen".

    Args:
      params: A tree from `lorafy`, or the trainable tree of `split`.

    Returns:
      A tree with the same containers and a string in the place of each leaf or box;
      `None` stays `None`.

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


def count(params: PyTree) -> Count:
    """Counts the trainable and all parameters, and the bytes of the base.

    Args:
      params: A tree from `lorafy`, or from `quantize`.

    Returns:
      `Count(trainable, total, base_bytes)`. The scales of adapters, which are settings,
      are not counted. The bytes are those of all frozen leaves in XLA's memory: for a
      quantized weight its codes (two of four bits in a byte) and its scales.

    Raises:
      ValueError: As `split`, except that a quantized tree needs no adapters.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> base = {"kernel": jnp.ones((64, 32))}
      >>> print(lj.count(lj.lorafy(base, rank=1)))
      trainable 96 of 2,144 (4.48 %), base 8.19 kB
      >>> print(lj.count(lj.lorafy(lj.quantize(base, "nf4"), rank=1)))
      trainable 96 of 2,144 (4.48 %), base 1.09 kB
    """
    leaves = flatten(params)
    adapters = adapters_or_quantized(leaves, stacks=True)
    boxed = {p: x for p, x in leaves.items() if not is_counter(x)}
    arrays = {p: unbox(x) for p, x in boxed.items() if is_array(unbox(x))}
    base = without_adapters(arrays, adapters)
    trained = sum(
        arrays[part].size for adapter in adapters.values() for part in adapter.trained
    )
    frozen = sum(x.size for x in base.values())
    return Count(trained, trained + frozen, sum(map(nbytes, base.values())))


def trainable(leaves: dict[Path, Any]) -> set[Path]:
    """Returns the paths of all trainable leaves."""
    found = find_adapters(leaves, stacks=True)
    return {part for adapter in found.values() for part in adapter.trained}
