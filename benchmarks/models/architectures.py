"""Published transformers in plain Flax Linen: GPT-2, Llama 3, Gemma 2 and ViT.

One block serves all of them; `Architecture` describes the differences, with Llama's
defaults. The layers are stacked by `nn.scan`, or separate. This file has no code for
LoRA. Omitted are features without influence on shapes and memory: Llama's scaling of
rotary frequencies for long texts, Gemma's windows of 4,096 tokens, and dropout.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The fields of a published configuration."""

    layers: int
    width: int
    heads: int
    mlp: int
    vocab: int  # tokens; in an image model, classes
    kv_heads: int | None = None  # default: one for each head
    head_dim: int | None = None  # default: width / heads
    positions: int = 0  # learned positions; 0: rotary embeddings
    rope: float = 10_000.0  # the slowest rotary wavelength
    norm: str = "rms"  # or "layer"
    post_norm: bool = False  # normalize also after attention and MLP
    epsilon: float = 1e-5
    gated: bool = True  # act(x W) * (x V) instead of act(x W)
    activation: str = "silu"
    bias: bool = False
    tied: bool = True  # the token embedding is also the head
    scaled_embedding: bool = False  # by sqrt(width)
    attention_cap: float = 0.0  # cap * tanh(x / cap); 0: no cap
    logit_cap: float = 0.0
    patch: int = 0  # pixels; 0: a decoder of tokens
    image: int = 0


GPT2 = dict(norm="layer", gated=False, activation="gelu", bias=True)

ARCHITECTURES = {
    # https://huggingface.co/openai-community/gpt2-medium/blob/main/config.json
    "gpt2-medium": Architecture(24, 1024, 16, 4096, 50257, positions=1024, **GPT2),
    # https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
    "llama-3.2-1b": Architecture(16, 2048, 32, 8192, 128256, kv_heads=8, rope=5e5),
    # https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/config.json
    "llama-3-8b": Architecture(
        32, 4096, 32, 14336, 128256, kv_heads=8, rope=5e5, tied=False
    ),
    # https://huggingface.co/meta-llama/Meta-Llama-3-70B/blob/main/config.json
    "llama-3-70b": Architecture(
        80, 8192, 64, 28672, 128256, kv_heads=8, rope=5e5, tied=False
    ),
    # https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/blob/main/config.json
    "smollm2-135m": Architecture(30, 576, 9, 1536, 49152, kv_heads=3, rope=1e5),
    # https://huggingface.co/google/gemma-2-2b/blob/main/config.json
    "gemma-2-2b": Architecture(
        *(26, 2304, 8, 9216, 256000),
        kv_heads=4,
        head_dim=256,
        post_norm=True,
        epsilon=1e-6,
        activation="gelu",
        scaled_embedding=True,
        attention_cap=50.0,
        logit_cap=30.0,
    ),
    # Table 1 of https://arxiv.org/abs/2010.11929, for ImageNet's 1,000 classes
    "vit-h": Architecture(
        32, 1280, 16, 5120, 1000, patch=14, image=224, epsilon=1e-6, **GPT2
    ),
    # https://huggingface.co/openai-community/gpt2/blob/main/config.json
    "gpt2": Architecture(12, 768, 12, 3072, 50257, positions=1024, **GPT2),
    # Not published: 0.87 billion parameters, for a reproducible measurement
    "gpt-0.87b": Architecture(16, 2048, 16, 8192, 32000, positions=1024, **GPT2),
}


def llama_names(arch: Architecture, *, scanned: bool = True) -> dict[str, Any]:
    """Returns the PyTorch module of each leaf of a Llama, for all of lora_jax's files.

    It is the map of `import_weights`, `export_weights`, `export_peft` and
    `import_peft`.
    """
    ours, theirs = ("blocks", "{layer}") if scanned else ("blocks_*", "{}")
    attention = dict(query="q_proj", key="k_proj", value="v_proj", out="o_proj")
    parts = {f"attention/{a}": f"self_attn.{b}" for a, b in attention.items()}
    parts |= {f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    parts |= {"attention_norm": "input_layernorm"}
    parts |= {"mlp_norm": "post_attention_layernorm"}
    names: dict[str, Any] = {
        f"{ours}/{a}": f"model.layers.{theirs}.{b}" for a, b in parts.items()
    }
    if arch.tied:
        names |= {"tokens": ("model.embed_tokens", "lm_head")}
    else:
        names |= {"tokens": "model.embed_tokens", "head": "lm_head"}
    return names | {"norm": "model.norm"}


class Model(nn.Module):
    """Maps tokens (batch, time), or images (batch, y, x, 3), to logits in float32."""

    arch: Architecture
    scanned: bool = True
    remat: bool = True  # keep only each block's input, and compute the rest again
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.bfloat16
    keep: Callable[[jax.Array], jax.Array] = lambda x: x  # shards activations

    def setup(self):
        arch = self.arch
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        if arch.patch:
            window, init = (arch.patch,) * 2, nn.initializers.normal(0.02)
            self.patches = nn.Conv(arch.width, window, window, **dtypes)
            shape = 1, 1 + (arch.image // arch.patch) ** 2, arch.width
            first = 1, 1, arch.width
            self.first = self.param("class", init, first, self.param_dtype)
            self.places = self.param("places", init, shape, self.param_dtype)
        else:
            self.tokens = nn.Embed(arch.vocab, arch.width, **dtypes)
        if arch.positions:
            self.positions = nn.Embed(arch.positions, arch.width, **dtypes)
        block = nn.remat(Block, prevent_cse=not self.scanned) if self.remat else Block
        args = arch, dtypes, self.keep
        if self.scanned:
            stack = nn.scan(
                block, {"params": 0}, split_rngs={"params": True}, length=arch.layers
            )
            self.blocks = stack(*args)
        else:
            self.blocks = [block(*args) for _ in range(arch.layers)]
        self.norm = norm(arch, dtypes)
        if arch.patch or not arch.tied:
            product = functools.partial(
                jax.lax.dot_general, preferred_element_type=jnp.float32
            )
            self.head = nn.Dense(
                *(arch.vocab, arch.patch > 0), **dtypes, dot_general=product
            )

    def __call__(self, x):
        return self.logits(self.hidden(x))

    def hidden(self, x):
        """Returns the head's input: (batch, time, width); of images (batch, width)."""
        arch = self.arch
        x = self.embed_image(x) if arch.patch else self.tokens(x)
        if arch.scaled_embedding:
            x *= jnp.sqrt(arch.width).astype(x.dtype)
        if arch.positions:
            x += self.positions(jnp.arange(x.shape[1]))[None]
        x = self.keep(x)
        for block in [self.blocks] if self.scanned else self.blocks:
            x, _ = block(x, None)
        x = self.norm(x)
        return x[:, 0] if arch.patch else x

    def logits(self, x):
        """Applies the head to the output of `hidden`, or to some of its tokens."""
        if self.arch.patch or not self.arch.tied:
            logits = self.head(x)
        else:
            logits = jnp.einsum(
                *("btd,vd->btv", x, self.tokens.embedding.astype(x.dtype)),
                preferred_element_type=jnp.float32,
            )
        return cap(self.keep(logits), self.arch.logit_cap)

    def embed_image(self, images):
        x = self.patches(images)
        x = x.reshape(len(x), -1, self.arch.width)
        first = jnp.broadcast_to(self.first, (len(x), 1, x.shape[-1])).astype(x.dtype)
        return jnp.concatenate([first, x], 1) + self.places.astype(x.dtype)


class Part(nn.Module):
    """The base class of a block and its parts, with their shared fields."""

    arch: Architecture
    dtypes: dict[str, Any]
    keep: Callable[[jax.Array], jax.Array]

    def dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, self.arch.bias, name=name, **self.dtypes)


class Block(Part):
    """Attention and an MLP, each added to the residual stream."""

    @nn.compact
    def __call__(self, x, _):
        for name, part in (("attention", Attention), ("mlp", MLP)):
            h = norm(self.arch, self.dtypes, f"{name}_norm")(x)
            h = part(self.arch, self.dtypes, self.keep, name=name)(h)
            if self.arch.post_norm:
                h = norm(self.arch, self.dtypes, f"{name}_post_norm")(h)
            x = self.keep(x + h)
        return x, None  # nothing for a scan to stack


class Attention(Part):
    @nn.compact
    def __call__(self, x):
        arch, (batch, time, _) = self.arch, x.shape
        size = arch.head_dim or arch.width // arch.heads
        groups = arch.kv_heads or arch.heads
        split = lambda x: self.keep(x).reshape(batch, time, groups, -1, size)
        q = split(self.dense(arch.heads * size, "query")(x))
        k = split(self.dense(groups * size, "key")(x))
        v = split(self.dense(groups * size, "value")(x))
        if not (arch.positions or arch.patch):
            q, k = rotate(q, arch.rope), rotate(k, arch.rope)
        # (batch, group, head of the group, to, from)
        weights = jnp.einsum(
            *("btghd,bsgd->bghts", q, k[:, :, :, 0]),
            preferred_element_type=jnp.float32,
        )
        weights = cap(weights * size**-0.5, arch.attention_cap)
        if not arch.patch:
            before = jnp.tril(jnp.ones((time, time), bool))
            weights = jnp.where(before[None, None, None], weights, -jnp.inf)
        weights = jax.nn.softmax(weights).astype(v.dtype)
        y = jnp.einsum("bghts,bsgd->btghd", weights, v[:, :, :, 0])
        return self.dense(arch.width, "out")(y.reshape(batch, time, -1))


class MLP(Part):
    @nn.compact
    def __call__(self, x):
        arch = self.arch
        act = getattr(jax.nn, arch.activation)
        h = self.keep(self.dense(arch.mlp, "up")(x))
        if arch.gated:
            h = act(self.keep(self.dense(arch.mlp, "gate")(x))) * h
        else:
            h = act(h)
        return self.dense(arch.width, "down")(h)


def norm(
    arch: Architecture, dtypes: dict[str, Any], name: str | None = None
) -> nn.Module:
    """Returns the architecture's normalization layer."""
    kind = nn.RMSNorm if arch.norm == "rms" else nn.LayerNorm
    return kind(epsilon=arch.epsilon, name=name, **dtypes)


def rotate(x: jax.Array, wavelength: float) -> jax.Array:
    """Rotates pairs of x (batch, time, ..., size) by angles that grow with time."""
    half = x.shape[-1] // 2
    speed = wavelength ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * speed
    angle = angle.reshape(1, x.shape[1], *(1,) * (x.ndim - 3), half)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def cap(x: jax.Array, most: float) -> jax.Array:
    """Bounds x smoothly by `most`; 0 means no bound."""
    return most * jnp.tanh(x / most) if most else x
