"""The training step of all methods, and the memory that XLA allocates for it."""

import argparse
import math
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax


def step(
    apply: Callable[..., jax.Array], tx: optax.GradientTransformation
) -> Callable[..., tuple[Any, jax.Array]]:
    """Returns one training step of a classifier of sentences or of next tokens.

    Args:
      apply: `apply(trainable, frozen, *inputs)` returns the logits.
      tx: The optimizer of the trainable parameters.

    Returns:
      `step((trainable, optimizer state), frozen, *inputs, labels)`, which returns the
      new state and the loss. Donate the state, so that the new one reuses its memory.
    """
    return update(loss(apply), tx)


def update(
    loss: Callable[..., jax.Array], tx: optax.GradientTransformation
) -> Callable[..., tuple[Any, jax.Array]]:
    """Returns one training step for `loss(trainable, frozen, *inputs, labels)`."""

    def step(state, frozen, *batch):
        trainable, optimizer = state
        value, grads = jax.value_and_grad(loss)(trainable, frozen, *batch)
        updates, optimizer = tx.update(grads, optimizer, trainable)
        return (optax.apply_updates(trainable, updates), optimizer), value

    return step


def loss(apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns `loss(*args, labels)`, the mean cross-entropy of `apply(*args)`."""

    def loss(*batch):
        *args, labels = batch
        return cross_entropy(apply(*args), labels).mean()

    return loss


def loss_in_chunks(
    hidden: Callable[..., jax.Array],
    head: Callable[[Any, jax.Array], jax.Array],
    chunk: int,
) -> Callable[..., jax.Array]:
    """Returns the loss of a decoder, computed from a chunk of the logits at a time.

    The logits, in float32, have an element for each token and each word of the
    vocabulary, and so do their gradients. Here only those of `chunk` tokens of each
    sequence exist at a time, and the backward pass computes them again. Up to
    rounding, the loss is the same.

    Args:
      hidden: `hidden(params, *inputs)` returns the input of the head, (batch, time,
        width).
      head: `head(params, states)` returns the logits of a part of it.
      chunk: The number of tokens, which must divide the time.

    Returns:
      `loss(params, *inputs, labels)`, for labels (batch, time).
    """

    def loss(params, *batch):
        *inputs, labels = batch
        apart = (
            lambda x: jnp.moveaxis(  # (batch, time, ...) -> (n, batch, chunk, ...)
                jnp.reshape(x, (len(x), -1, chunk, *x.shape[2:])), 1, 0
            )
        )

        def add(total, part):
            states, labels = part
            return total + cross_entropy(head(params, states), labels).sum(), None

        # XLA eliminates no common subexpressions across loop iterations, so the
        # barriers of `prevent_cse` are not needed.
        add = jax.checkpoint(add, prevent_cse=False)
        parts = apart(hidden(params, *inputs)), apart(labels)
        total, _ = jax.lax.scan(add, jnp.zeros(()), parts)
        return total / labels.size

    return loss


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def memory(compiled: Any, state: Any, frozen: Any, batch: Any) -> dict[str, int]:
    """Returns the memory of one training step in bytes, in parts.

    Parameters and optimizer state are arguments of the step. Gradients exist only
    inside the step: XLA counts those that exist at one time in its temporaries,
    together with the activations. The peak is everything that XLA allocates for the
    step: arguments, temporaries, and outputs that reuse no argument. (On CPU, XLA's own
    `peak_memory_in_bytes` excludes the temporaries.)

    If `lorafy(..., also=...)` trains a copy of a leaf, the step does not read the leaf
    itself, and `jit` does not pass it. Such a leaf counts as `unread` instead of as a
    parameter. It still occupies memory, so the peak includes it.
    """
    known = parts(state, frozen)
    stats = compiled.memory_analysis()
    given = stats.argument_size_in_bytes
    held = known["parameters"] + known["optimizer"] + nbytes(batch)
    if given < held:  # `given` may be larger: some devices pad their arrays
        raise RuntimeError(
            f"The step takes {given} bytes of arguments, but its trees have {held} "
            f"(and {known['unread']} that trained copies replace): a leaf is unused."
        )
    peak = known["unread"] + allocated(compiled)
    return known | {"temporaries": stats.temp_size_in_bytes, "peak": peak}


def allocated(compiled: Any) -> int:
    """Returns all bytes of a compiled function: arguments, temporaries and results."""
    stats = compiled.memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + stats.temp_size_in_bytes + outputs


def parts(state: Any, frozen: Any) -> dict[str, int]:
    """Returns those parts of a training step's memory that follow from shapes."""
    trainable, optimizer = state
    unread = nbytes(replaced(trainable, frozen))
    return {
        "parameters": nbytes((trainable, frozen)) - unread,
        "unread": unread,
        "gradients": nbytes(trainable),
        "optimizer": nbytes(optimizer),
    }


def replaced(trainable: Any, frozen: Any) -> list[Any]:
    """Returns the frozen leaves that are replaced by a trained copy next to them."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    trained = {name(path) for path, _ in jax.tree.leaves_with_path(trainable)}

    def copy(path: Any) -> str:
        *parent, leaf = name(path).split("/")
        prefix = "" if leaf in ("kernel", "embedding") else f"{leaf}_"
        return "/".join([*parent, f"{prefix}lora_w"])

    leaves = jax.tree.leaves_with_path(frozen)
    return [leaf for path, leaf in leaves if copy(path) in trained]


def nbytes(tree: Any) -> int:
    """Returns the bytes of a tree of arrays or shapes on one device."""

    def held(x: Any) -> int:
        sharding = getattr(x, "sharding", None)
        shape = sharding.shard_shape(x.shape) if sharding else x.shape
        bits = 8 * x.dtype.itemsize
        if jnp.issubdtype(x.dtype, jnp.integer):
            bits = jnp.iinfo(x.dtype).bits  # 4 for int4, which XLA packs
        return -(-math.prod(shape) * bits // 8)

    return sum(map(held, jax.tree.leaves(tree)))


def copied(tree: Any) -> Any:
    """Returns copies on the device, for a step that donates its arguments."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options as values that JSON supports."""
    return {k: str(x) if isinstance(x, Path) else x for k, x in vars(args).items()}


def versions() -> dict[str, str]:
    """Returns the versions that the results depend on, and the device."""
    names = "jax", "jaxlib", "flax", "optax", "numpy"
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
    }
