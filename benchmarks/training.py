"""The training step of all methods, and the memory that XLA allocates for it."""

import argparse
import functools
import math
import os
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lora_jax as lj


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


def accumulated_update(
    loss: Callable[..., jax.Array], tx: optax.GradientTransformation
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """Returns one training step of a decoder on one batch or several.

    The gradients of the batches are summed by `scan`. Each loss is divided by the
    number of trained tokens of all batches, not of its own, so that the sum is the
    gradient of one large batch. If the loss or the gradient is not finite, the state
    stays as it was: it is donated, so the caller has no copy of it.

    Args:
      loss: `loss(params, *inputs, labels, total=...)`, from `loss_in_chunks`.
      tx: The optimizer of the trainable parameters.

    Returns:
      `step((trainable, optimizer state), frozen, batch)`, for a batch of arrays
      (batches, rows, time), the last of them the labels. It returns the new state, and
      the mean loss and the gradient's norm.
    """

    def step(state, frozen, batch):
        trainable, optimizer = state
        total = count_trained(batch[-1])
        gradients = jax.value_and_grad(
            lambda trainable, *part: loss(
                lj.combine(trainable, frozen), *part, total=total
            )
        )
        if len(batch[-1]) == 1:  # no loop around the one over layers
            value, grads = gradients(trainable, *(x[0] for x in batch))
        else:
            add = lambda sums, part: (
                jax.tree.map(jnp.add, sums, gradients(trainable, *part)),
                None,
            )
            zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable)
            (value, grads), _ = jax.lax.scan(add, zeros, tuple(batch))
        norm = optax.tree.norm(grads)
        updates, new = tx.update(grads, optimizer, trainable)
        new = optax.apply_updates(trainable, updates), new
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        new = jax.tree.map(lambda x, old: jnp.where(finite, x, old), new, state)
        return new, {"loss": jnp.where(finite, value, jnp.nan), "norm": norm}

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
    *,
    adapted: bool = False,
    modules: Sequence[str] = ("tokens", "head"),
) -> Callable[..., jax.Array]:
    """Returns the loss of a decoder, computed from a chunk of the logits at a time.

    The logits, in float32, have an element for each token and each word of the
    vocabulary, and so do their gradients. Here only those of `chunk` tokens of each
    sequence exist at a time, and the backward pass computes them again. Up to
    rounding, the loss is the same.

    With `adapted` the parameters may have adapters and quantized weights, and the
    result is not to be wrapped in `lj.lora` again. A quantized head is dequantized once
    per step, before the loop over the chunks. `lj.lora` of the loop would do it in
    every iteration, forward and backward. `hidden` gets the weights as they are stored,
    also a table that is the head too.

    Args:
      hidden: `hidden(params, *inputs)` returns the input of the head, (batch, time,
        width).
      head: `head(params, states)` returns the logits of a part of it.
      chunk: The number of tokens, which must divide the time.
      adapted: Whether the parameters may have adapters and quantized weights.
      modules: With `adapted`, the first keys of the parameters that `head` reads. It
        gets no others, and of these those that exist.

    Returns:
      `loss(params, *inputs, labels, total=None)`, for labels (batch, time): the sum of
      the losses of all tokens whose label is not negative, divided by `total`, or by
      their number.
    """
    known, used = lambda params: params, head
    if adapted:
        hidden = lj.lora(hidden, unused="ignore")
        known = functools.partial(head_parameters, modules=modules)
        with_adapters = lj.lora(head, unused="ignore")
        used = lambda params, x: (
            with_adapters if has_adapters(params) else head  # which `lora` refuses
        )(params, x)

    def loss(params, *batch, total=None):
        *inputs, labels = batch
        head_params = known(params)
        apart = (
            lambda x: jnp.moveaxis(  # (batch, time, ...) -> (n, batch, chunk, ...)
                jnp.reshape(x, (len(x), -1, chunk, *x.shape[2:])), 1, 0
            )
        )

        def add(added, part):
            states, labels = part
            trained = labels >= 0
            # Every label must be a word, also where its loss is not counted.
            losses = cross_entropy(used(head_params, states), jnp.maximum(labels, 0))
            return added + jnp.where(trained, losses, 0).sum(), None

        # XLA eliminates no common subexpressions across loop iterations, so the
        # barriers of `prevent_cse` are not needed.
        add = jax.checkpoint(add, prevent_cse=False)
        parts = apart(hidden(params, *inputs)), apart(labels)
        added, _ = jax.lax.scan(add, jnp.zeros(()), parts)
        return added / (count_trained(labels) if total is None else total)

    return loss


def count_trained(labels: jax.Array) -> jax.Array:
    """Returns the number of labels that are not negative, in float32, at least 1."""
    return jnp.maximum((labels >= 0).sum(), 1).astype(jnp.float32)


def head_parameters(params: Any, modules: Sequence[str]) -> Any:
    """Returns the parameters of the head, with adapters, and as floats."""
    head = {name: params[name] for name in modules if name in params}
    return lj.dequantize(head) if has_quantized(head) else head


def has_quantized(params: Any) -> bool:
    """Returns whether a leaf of the parameters is a quantized weight."""
    quantized = lambda x: isinstance(x, lj.Quantized)
    return any(map(quantized, jax.tree.leaves(params, is_leaf=quantized)))


def has_adapters(params: Any) -> bool:
    """Returns whether a leaf of the parameters is that of an adapter."""
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    names = [jax.tree_util.keystr(path[-1:], simple=True) for path in paths]
    return any(name.endswith(("lora_a", "lora_w")) for name in names)


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
