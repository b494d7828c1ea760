"""Times how long JAX takes to trace and lower a LoRA step, compared with the full step.

    python benchmarks/tracing.py

Traces from shapes alone, with empty caches, and measures processor time: layer by
layer, then scanned under remat. `split` differentiates only the adapters,
`adapters_only` the entire tree.
"""

import argparse
import gc
import re
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import training

import lora_jax as lj

WIDTH, HEADS, VOCAB, BATCH, LENGTH, RANK = 768, 12, 32_000, 8, 128, 8
AXES = {"variable_axes": {"params": 0}, "in_axes": nn.broadcast}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        attend = nn.MultiHeadDotProductAttention(HEADS, deterministic=True)
        x = x + attend(nn.LayerNorm()(x), mask=mask)
        h = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH)(h), None  # nothing for a scan to stack


class Decoder(nn.Module):
    layers: int
    scanned: bool

    @nn.compact
    def __call__(self, tokens):  # (BATCH, LENGTH) -> (BATCH, LENGTH, VOCAB)
        embed, mask = nn.Embed(VOCAB, WIDTH), nn.make_causal_mask(tokens)
        x = embed(tokens) + nn.Embed(LENGTH, WIDTH)(jnp.arange(LENGTH))
        stack = [Block] * self.layers
        if self.scanned:
            options = AXES | {"split_rngs": {"params": True}, "length": self.layers}
            stack = [nn.scan(nn.remat(Block), **options)]
        for layer in stack:
            x, _ = layer()(x, mask)
        return embed.attend(nn.LayerNorm()(x))


def contenders(model):
    """Returns the three training steps by name, each with its arguments as shapes."""
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    plain = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    apply = lambda params, tokens: model.apply({"params": params}, tokens)
    params = lj.lorafy(plain, RANK, axes=lj.find_axes(apply, plain, tokens))
    lora, tx = lj.lora(apply), optax.adamw(1e-3)
    ignore_frozen = lambda fn: lambda params, _, tokens: fn(params, tokens)
    combined = lambda adapters, base, tokens: lora(lj.combine(adapters, base), tokens)
    batch = tokens, tokens  # labels have the same shape
    return {
        "full": step(ignore_frozen(apply), tx, plain, {}, *batch),
        "split": step(combined, tx, *lj.split(params), *batch),
        "adapters_only": step(
            ignore_frozen(lora), lj.adapters_only(tx), params, {}, *batch
        ),
    }


def step(fn, tx, trained, frozen, *batch):
    state = trained, jax.eval_shape(tx.init, trained)
    return training.step(fn, tx), (state, frozen, *batch)


def compare(steps, repeats):
    """Returns a table of medians and quartiles.

    The steps take turns, so that noise affects all of them alike.
    """
    clock, times = time.process_time, {name: [] for name in steps}
    for _ in range(repeats + 1):  # the first turn warms up
        for name, (update, args) in steps.items():
            jax.clear_caches()
            gc.collect()
            # JAX caches the traces of a function, so each turn needs a new one.
            fresh, began = jax.jit(lambda *args, fn=update: fn(*args)), clock()
            traced, middle = fresh.trace(*args), clock()
            _, ended = traced.lower(), clock()
            times[name].append((middle - began, ended - middle, ended - began))
    table = "| step | trace, ms | lower, ms | sum | / full |\n|---|---|---|---|---|\n"
    for name in steps:
        ms, full = (1000 * np.array(times[x][1:]) for x in (name, "full"))
        cells = " | ".join(f"{x:,.0f}" for x in np.median(ms, axis=0))
        low, ratio, high = np.percentile(ms[:, 2] / full[:, 2], [25, 50, 75])
        table += f"| {name} | {cells} | {ratio:.2f} ({low:.2f} to {high:.2f}) |\n"
    return table


def same_program():
    """Returns whether lora(fn) compiles to the program of fn, except source lines."""
    params = lj.lorafy({"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}, RANK)
    layer = lambda x, bias: (jax.nn.relu(x @ x.T + bias), x.sum())
    fn = lambda params, x: jax.lax.scan(layer, x, jnp.stack([params["bias"]] * 3))
    texts = set()
    for program in (fn, lj.lora(fn, unused="ignore")):
        text = jax.jit(program).lower(params, params["kernel"]).compile().as_text()
        texts.add(re.sub(r", metadata=\{[^}]*\}|^\d+ .*\n", "", text, flags=re.M))
    return len(texts) == 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=9, help="of every step")
    parser.add_argument("--output", type=Path, help="folder for tracing.md")
    args = parser.parse_args()
    text = ""
    for layout in ("one by one", "scanned"):
        steps = contenders(Decoder(args.layers, layout == "scanned"))
        text += f"{args.layers} layers {layout}, jax {jax.__version__}:\n\n"
        text += compare(steps, args.repeats) + "\n"
    text += f"lora(fn) compiles to fn if fn uses no adapter: {same_program()}.\n"
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "tracing.md").write_text(text, encoding="utf-8")
