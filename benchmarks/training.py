"""One training step, the same whatever trains, and the memory that XLA gives it."""

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
    """Returns one step of training a classifier, of sentences or of next tokens.

    Args:
      apply: `apply(trainable, frozen, *inputs)`, the logits.
      tx: The optimizer of what trains.

    Returns:
      `step((trainable, optimizer state), frozen, *inputs, labels)`: the new state, and
      the loss. Donate the state, so that the new one takes its place.
    """
    return update(loss(apply), tx)


def update(
    loss: Callable[..., jax.Array], tx: optax.GradientTransformation
) -> Callable[..., tuple[Any, jax.Array]]:
    """Returns the same step for `loss(trainable, frozen, *inputs, labels)`."""

    def step(state, frozen, *batch):
        trainable, optimizer = state
        value, grads = jax.value_and_grad(loss)(trainable, frozen, *batch)
        updates, optimizer = tx.update(grads, optimizer, trainable)
        return (optax.apply_updates(trainable, updates), optimizer), value

    return step


def loss(apply: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns `loss(*args, labels)`, the mean of all, for logits `apply(*args)`."""

    def loss(*batch):
        *args, labels = batch
        return cross_entropy(apply(*args), labels).mean()

    return loss


def loss_in_chunks(
    hidden: Callable[..., jax.Array],
    head: Callable[[Any, jax.Array], jax.Array],
    chunk: int,
) -> Callable[..., jax.Array]:
    """Returns the loss of a decoder that never has all of its logits at one time.

    They are one number in float32 for each token and each word of the vocabulary, and
    their gradients are as many. Here those of `chunk` tokens of each sequence exist at
    a time; the backward pass makes them again. To rounding it is the loss of all.

    Args:
      hidden: `hidden(params, *inputs)`: what the head reads, (batch, time, width).
      head: `head(params, states)`: the logits of some of it.
      chunk: How many tokens. It divides the time.

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

        add = jax.checkpoint(add, prevent_cse=False)  # in a loop nothing can be joined
        parts = apart(hidden(params, *inputs)), apart(labels)
        total, _ = jax.lax.scan(add, jnp.zeros(()), parts)
        return total / labels.size

    return loss


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def memory(compiled: Any, state: Any, frozen: Any, batch: Any) -> dict[str, int]:
    """Returns the bytes that one training step takes, in parts.

    Parameters and optimizer state are the step's arguments, as XLA counts them too.
    The gradients live only inside the step: XLA counts them, as far as they exist at
    one time, within its temporaries, beside the activations. The peak is all that XLA
    allocates for the step: arguments, temporaries, and outputs that reuse no argument.
    (XLA's own peak_memory_in_bytes leaves the temporaries out on CPU.)

    Where `lorafy(..., also=...)` trains a copy of a leaf, the step does not read the
    leaf itself, and `jit` does not hand it over. It is `unread`, and no part of the
    parameters; as it is held in memory all the same, the peak counts it.
    """
    known = parts(state, frozen)
    stats = compiled.memory_analysis()
    given = stats.argument_size_in_bytes
    held = known["parameters"] + known["optimizer"] + nbytes(batch)
    if given < held:  # more is padding, which some devices add
        raise RuntimeError(
            f"The step takes {given} bytes of arguments, its trees hold {held}, and "
            f"{known['unread']} that trained copies replace: it leaves a part unused."
        )
    peak = known["unread"] + allocated(compiled)
    return known | {"temporaries": stats.temp_size_in_bytes, "peak": peak}


def allocated(compiled: Any) -> int:
    """Returns all bytes of a compiled function: of arguments, temporaries, results."""
    stats = compiled.memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + stats.temp_size_in_bytes + outputs


def parts(state: Any, frozen: Any) -> dict[str, int]:
    """Returns the bytes of a training step that shapes alone tell."""
    trainable, optimizer = state
    unread = nbytes(replaced(trainable, frozen))
    return {
        "parameters": nbytes((trainable, frozen)) - unread,
        "unread": unread,
        "gradients": nbytes(trainable),
        "optimizer": nbytes(optimizer),
    }


def replaced(trainable: Any, frozen: Any) -> list[Any]:
    """Returns the frozen leaves in whose place a copy trains, which stands beside."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    trained = {name(path) for path, _ in jax.tree.leaves_with_path(trainable)}

    def copy(path: Any) -> str:
        *parent, leaf = name(path).split("/")
        prefix = "" if leaf in ("kernel", "embedding") else f"{leaf}_"
        return "/".join([*parent, f"{prefix}lora_w"])

    leaves = jax.tree.leaves_with_path(frozen)
    return [leaf for path, leaf in leaves if copy(path) in trained]


def nbytes(tree: Any) -> int:
    """Returns the bytes that a tree's arrays, or their shapes, take on one device."""

    def held(x: Any) -> int:
        sharding = getattr(x, "sharding", None)
        shape = sharding.shard_shape(x.shape) if sharding else x.shape
        bits = 8 * x.dtype.itemsize
        if jnp.issubdtype(x.dtype, jnp.integer):
            bits = jnp.iinfo(x.dtype).bits  # of int4, 4: XLA packs them
        return -(-math.prod(shape) * bits // 8)

    return sum(map(held, jax.tree.leaves(tree)))


def copied(tree: Any) -> Any:
    """Returns copies on the device: a step that donates takes what it is given."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options as JSON can hold them."""
    return {k: str(x) if isinstance(x, Path) else x for k, x in vars(args).items()}


def versions() -> dict[str, str]:
    """Returns the versions that the numbers depend on, and the device."""
    names = "jax", "jaxlib", "flax", "optax", "numpy"
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
    }
