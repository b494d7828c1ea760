"""Continues texts token by token, with a cache of keys and values."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import training
from models.architectures import Model

import lora_jax as lj


class Generated(NamedTuple):
    """The texts with their continuations.

    Attributes:
      ids: (batch, time + steps). Each text, its continuation, and zeros.
      lengths: The number of tokens of each text with its continuation, (batch,).
    """

    ids: jax.Array
    lengths: jax.Array


def generate(
    model: Model,
    params: Any,
    ids: Any,
    lengths: Any,
    steps: int,
    *,
    stop: int | Iterable[int] | None = None,
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> Generated:
    """Continues each text by up to `steps` tokens.

    The texts are padded on the right, and what they are padded with has no effect.
    Calls of equal shapes compile once.

    Args:
      model: A decoder of tokens.
      params: Its parameters, which may have adapters and be quantized.
      ids: The texts, (batch, time) integers.
      lengths: The number of tokens of each text, (batch,). None: all have `time`.
      steps: The number of tokens to add.
      stop: Tokens that end a text, which are kept. The loop ends when all texts have.
      temperature: Divides the logits, from which a token is sampled. 0 takes the most
        likely token.
      key: The random key for sampling.

    Raises:
      ValueError: If a length is not from 1 to `time`, or a key is missing or useless.
    """
    ids = jnp.asarray(ids, jnp.int32)
    batch, time = ids.shape
    lengths = np.full(batch, time, np.int32) if lengths is None else lengths
    lengths = np.asarray(lengths, np.int32)
    if lengths.shape != (batch,) or not ((lengths >= 1) & (lengths <= time)).all():
        raise ValueError(
            f"lengths must be {batch} numbers from 1 to {time}: they are "
            f"{lengths.tolist()}."
        )
    if steps < 1:
        raise ValueError(f"steps must be positive: it is {steps}.")
    if temperature < 0 or (temperature > 0) == (key is None):
        raise ValueError(
            "Pass a key with a positive temperature, and none with temperature 0: "
            f"temperature is {temperature}, key is {key}."
        )
    stops = [stop] if isinstance(stop, int) else [*(stop or ())]
    return _generate(
        params,
        ids,
        lengths,
        np.array(stops, np.int32),
        np.float32(temperature),
        key,
        model=model,
        steps=steps,
    )


@functools.partial(jax.jit, static_argnames=("model", "steps"))
def _generate(params, ids, lengths, stops, temperature, key, *, model, steps):
    """Runs the texts once, then single tokens. Without a key it samples nothing."""
    batch, time = ids.shape
    run = functools.partial(_next_logits, model)
    if training.has_adapters(params) or training.has_quantized(params):
        run = lj.lora(run)

    def choose(logits, step):
        if key is None:
            return logits.argmax(-1).astype(jnp.int32)
        logits /= temperature
        chosen = jax.random.categorical(jax.random.fold_in(key, step), logits)
        return chosen.astype(jnp.int32)

    def append(ids, lengths, done, token):
        at = jnp.where(done, time + steps, lengths)  # past the end nothing is written
        ids = ids.at[jnp.arange(batch), at].set(token, mode="drop")
        lengths += (~done).astype(lengths.dtype)
        return ids, lengths, done | (token[:, None] == stops[None]).any(1)

    def step(state):
        i, ids, lengths, done, token, cache = state
        at = lengths - 1  # the last token's position, and its index in the cache
        logits, new = run(params, token[:, None], at[:, None], cache, at - at)
        cache = jax.tree.map(functools.partial(_store, at), cache, new)
        token = choose(logits, i)
        return i + 1, *append(ids, lengths, done, token), token, cache

    index = jnp.arange(time, dtype=jnp.int32)[None]
    positions = jnp.broadcast_to(index, ids.shape)
    empty = model.empty_cache(batch)
    logits, cache = run(params, ids, positions, empty, lengths - 1)
    ids = jnp.pad(jnp.where(index < lengths[:, None], ids, 0), ((0, 0), (0, steps)))
    token = choose(logits, 0)
    state = append(ids, lengths, jnp.zeros(batch, bool), token)
    cache = jax.tree.map(functools.partial(_pad, steps), cache)
    state = jax.lax.while_loop(
        lambda state: (state[0] < steps) & ~state[3].all(),
        step,
        (jnp.int32(1), *state, token, cache),
    )
    return Generated(state[1], state[2])


def _next_logits(model, params, ids, positions, cache, last):
    """Returns the logits after each text's token of index `last`, and its new cache."""
    run = functools.partial(model.apply, {"params": params})
    states, new = run(ids, positions, cache, method="continued")
    states = jnp.take_along_axis(states, last[:, None, None], 1)
    return run(states, method="logits")[:, 0], new


def _store(at, cache, new):
    """Writes one token's keys or values of each text, (..., batch, 1, groups, size)."""
    rows = jnp.arange(len(at))
    new = new[..., 0, :, :].astype(cache.dtype)
    return cache.at[..., rows, at, :, :].set(new)


def _pad(steps, x):
    """Adds indices for more tokens to (..., batch, time, groups, size)."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, steps), (0, 0), (0, 0)])
