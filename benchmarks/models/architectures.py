"""Published transformers in plain Flax Linen: GPT-2, Llama, Qwen, Gemma and ViT.

One block serves all of them; `Architecture` describes the differences, with Llama's
defaults. The layers are stacked by `nn.scan`, or separate. This file has no code for
LoRA, and dropout is omitted.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from models.attention import (
    Mask,
    RopeScaling,
    attend,
    attend_to,
    cap,
    positions_in,
    rotate,
    speeds,
)


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
    scaling: RopeScaling | None = None  # of the rotary frequencies
    window: int = 0  # tokens to which a local layer attends
    local: tuple[bool, ...] = (True,)  # the layers with the window, repeated
    local_rope: float | None = None  # instead of `rope` and `scaling` in these
    query_scale: float | None = None  # default: 1 / sqrt(head_dim)
    head_norm: bool = False  # normalize the queries and keys of each head
    norm: str = "rms"  # "layer", or "offset": rms with the gain 1 + scale
    post_norm: bool = False  # normalize also after attention and MLP
    epsilon: float = 1e-5
    gated: bool = True  # act(x W) * (x V) instead of act(x W)
    activation: str = "silu"
    bias: bool | tuple[str, ...] = False  # of all dense layers, or of those named
    tied: bool = True  # the token embedding is also the head
    scaled_embedding: bool = False  # by sqrt(width)
    attention_cap: float = 0.0  # cap * tanh(x / cap); 0: no cap
    logit_cap: float = 0.0
    patch: int = 0  # pixels; 0: a decoder of tokens
    image: int = 0

    @property
    def size(self) -> int:
        """The elements of a head's queries, keys and values."""
        return self.head_dim or self.width // self.heads

    def is_local(self, layer: int) -> bool:
        """Whether a layer attends to the window only."""
        return self.window > 0 and self.local[layer % len(self.local)]


GPT2 = dict(norm="layer", gated=False, activation="gelu", bias=True)

ARCHITECTURES = {
    # https://huggingface.co/openai-community/gpt2-medium/blob/main/config.json
    "gpt2-medium": Architecture(24, 1024, 16, 4096, 50257, positions=1024, **GPT2),
    # https://huggingface.co/meta-llama/Llama-3.2-1B/blob/main/config.json
    "llama-3.2-1b": Architecture(
        *(16, 2048, 32, 8192, 128256),
        kv_heads=8,
        rope=5e5,
        scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
    ),
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
        window=4096,
        local=(True, False),
        norm="offset",
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


class Context(NamedTuple):
    """What all layers share, besides the parameters.

    Attributes:
      positions: The positions of the tokens, (batch or 1, time). None: 0, 1, 2...
      segments: The segment of each token, (batch, time). None: one text in each row.
    """

    positions: jax.Array | None = None
    segments: jax.Array | None = None


class Cache(NamedTuple):
    """Keys and values of earlier tokens, (batch, time, groups, size), in their order.

    The layers are stacked in front, or it is a list of one for each layer.
    """

    keys: jax.Array
    values: jax.Array


class Model(nn.Module):
    """Maps tokens (batch, time), or images (batch, y, x, 3), to logits in float32."""

    arch: Architecture
    scanned: bool = True
    remat: bool = True  # keep only each block's input, and compute the rest again
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.bfloat16
    keep: Callable[[jax.Array], jax.Array] = lambda x: x  # shards activations
    attention: str | None = None  # "xla" or "cudnn"; default: cuDNN where it applies

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
        args = arch, dtypes, self.keep, self.attention
        if self.scanned:
            stack = nn.scan(
                block,
                {"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=arch.layers,
            )
            self.blocks = stack(*args)
        else:
            layers = range(arch.layers)
            self.blocks = [block(*args, arch.is_local(layer)) for layer in layers]
        self.norm = norm(arch, dtypes)
        if arch.patch or not arch.tied:
            product = functools.partial(
                jax.lax.dot_general, preferred_element_type=jnp.float32
            )
            self.head = nn.Dense(
                *(arch.vocab, arch.patch > 0), **dtypes, dot_general=product
            )

    def __call__(self, x, segments=None, positions=None):
        """Returns the logits in float32.

        Args:
          x: Tokens or images.
          segments: Of rows that hold several texts: the text of each token, (batch,
            time), from 1, and 0 for padding. A token attends only to its own text.
          positions: The positions of the tokens, (batch, time). Default: those in each
            text.
        """
        return self.logits(self.hidden(x, segments, positions))

    def hidden(self, x, segments=None, positions=None):
        """Returns the head's input: (batch, time, width); of images (batch, width)."""
        if segments is not None and positions is None:
            positions = positions_in(segments)
        return self.run(x, Context(positions, segments), None)[0]

    def continued(self, x, positions, cache):
        """Returns the head's input, and the keys and values of these tokens alone.

        Args:
          x: Tokens (batch, time): the first ones of texts, for an empty cache, else one
            for each text.
          positions: Their positions, (batch, time).
          cache: From `empty_cache`, or with the keys and values of all positions before
            these at their indices. What it has at others is not used.
        """
        return self.run(x, Context(positions), cache)

    def empty_cache(self, batch, time=0):
        """Returns a cache of zeros; one of no time is for the first tokens."""
        arch = self.arch
        shape = batch, time, arch.kv_heads or arch.heads, arch.size
        zeros = lambda *layers: Cache(
            *(jnp.zeros((*layers, *shape), self.dtype) for _ in Cache._fields)
        )
        if self.scanned:
            return zeros(arch.layers)
        return [zeros() for _ in range(arch.layers)]

    def run(self, x, context, cache):
        arch = self.arch
        x = self.embed_image(x) if arch.patch else self.tokens(x)
        if arch.scaled_embedding:
            x *= jnp.sqrt(arch.width).astype(x.dtype)
        if arch.positions:
            at = context.positions
            x += self.positions(jnp.arange(x.shape[1])[None] if at is None else at)
        x = self.keep(x)
        if self.scanned:
            # Layers that are all alike get no flag, so that their scan has no input.
            local = [arch.is_local(layer) for layer in range(arch.layers)]
            flags = jnp.array(local) if len({*local}) > 1 else None
            x, new = self.blocks(x, (flags, cache), context)
        else:
            new = []
            for i, block in enumerate(self.blocks):
                x, kept = block(x, (None, cache and cache[i]), context)
                new.append(kept)
        x = self.norm(x)
        return (x[:, 0] if arch.patch else x), new

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
        bias = self.arch.bias
        bias = bias if isinstance(bias, bool) else name in bias
        return nn.Dense(features, bias, name=name, **self.dtypes)


class Block(Part):
    """Attention and an MLP, each added to the residual stream."""

    attention: str | None = None
    local: bool | None = None  # whether the window applies; None: that of layer 0

    @nn.compact
    def __call__(self, x, layer, context):
        """Returns x and, if there is a cache, the keys and values of these tokens.

        Args:
          x: (batch, time, width).
          layer: A traced boolean if only some layers are local, else None; and the
            layer's cache, or None.
          context: What all layers share.
        """
        args = self.arch, self.dtypes, self.keep
        flag, cache = layer
        if flag is None:
            flag = self.arch.is_local(0) if self.local is None else self.local
        attend = Attention(*args, self.attention, name="attention")
        h, new = attend(self.before("attention", x), flag, cache, context)
        x = self.after("attention", x, h)
        h = MLP(*args, name="mlp")(self.before("mlp", x))
        return self.after("mlp", x, h), new

    def before(self, part: str, x: jax.Array) -> jax.Array:
        return norm(self.arch, self.dtypes, f"{part}_norm")(x)

    def after(self, part: str, x: jax.Array, h: jax.Array) -> jax.Array:
        if self.arch.post_norm:
            h = norm(self.arch, self.dtypes, f"{part}_post_norm")(h)
        return self.keep(x + h)


class Attention(Part):
    attention: str | None = None

    @nn.compact
    def __call__(self, x, local, cache, context):
        arch, (batch, time, _) = self.arch, x.shape
        groups = arch.kv_heads or arch.heads
        split = lambda x: self.keep(x).reshape(batch, time, -1, arch.size)
        q = split(self.dense(arch.heads * arch.size, "query")(x))
        k = split(self.dense(groups * arch.size, "key")(x))
        v = split(self.dense(groups * arch.size, "value")(x))
        if arch.head_norm:
            q = norm(arch, self.dtypes, "query_norm")(q)
            k = norm(arch, self.dtypes, "key_norm")(k)
        if not (arch.positions or arch.patch):
            speed = self.speed(local)
            q, k = (rotate(x, speed, context.positions) for x in (q, k))
        scale = arch.query_scale or arch.size**-0.5
        options = dict(scale=scale, most=arch.attention_cap)
        mask = None if arch.patch else Mask(arch.window, local, context.segments)
        if cache is None or cache.keys.shape[1] == 0:
            y = attend(q, k, v, mask, **options, implementation=self.attention)
        else:
            slots = jnp.arange(cache.keys.shape[1], dtype=jnp.int32)[None]
            at = context.positions
            # The positions from the first token on belong to these tokens.
            before = jnp.where(slots < at[:, :1], slots, jnp.iinfo(jnp.int32).max)
            pairs = mask.pairs(at, jnp.concatenate([before, at], 1))
            join = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], 1)
            keys, values = join(cache.keys, k), join(cache.values, v)
            y = attend_to(q, keys, values, pairs, **options)
        y = self.dense(arch.width, "out")(y.reshape(batch, time, -1))
        return y, None if cache is None else Cache(k, v)

    def speed(self, local):
        """Returns the angles per token of the rotary pairs."""
        arch = self.arch
        everywhere = speeds(arch.size, arch.rope, arch.scaling)
        if arch.local_rope is None:
            return everywhere
        nearby = speeds(arch.size, arch.local_rope)
        return jnp.where(local, nearby, everywhere)


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


class OffsetNorm(nn.Module):
    """RMS normalization with the gain 1 + scale, for the checkpoints of Gemma."""

    epsilon: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        zeros, width = nn.initializers.zeros, x.shape[-1]
        scale = self.param("scale", zeros, (width,), self.param_dtype)
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
        gain = 1 + scale.astype(jnp.float32).reshape(*(1,) * (x.ndim - 1), width)
        return (x * gain).astype(self.dtype)


NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm, "offset": OffsetNorm}


def norm(
    arch: Architecture, dtypes: dict[str, Any], name: str | None = None
) -> nn.Module:
    """Returns the architecture's normalization layer."""
    return NORMS[arch.norm](epsilon=arch.epsilon, name=name, **dtypes)
