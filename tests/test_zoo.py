"""Complete, unmodified models: every weight is adapted, and stays factored."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import lora_jax as lj

BATCH, TIME, D, HEADS, HIDDEN, VOCAB, LAYERS, EXPERTS = 2, 5, 16, 2, 24, 30, 2, 3
RNG = np.random.default_rng(0)
IDS = RNG.integers(VOCAB, size=(BATCH, TIME))
X = RNG.standard_normal((BATCH, TIME, D)).astype(np.float32)
IMAGES = RNG.standard_normal((BATCH, 8, 8, 3)).astype(np.float32)


class Model(NamedTuple):
    """A function, the shapes of its parameters, and its inputs."""

    apply: Callable[..., jax.Array]
    params: Any
    inputs: tuple[Any, ...]
    rank: Any = 2
    # Axes that `find_axes` cannot infer: of experts, and of tables that are added
    axes: Any = ()
    materialized: Any = ()  # {weight: primitives that have to materialize it}


# Flax models of transformers.

SIZES = {
    "hidden_size": D,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 8,
}
GROUPED = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2}
HUGGING_FACE = {
    "GPT2LMHeadModel": {"vocab_size": VOCAB, "n_embd": D, "n_layer": 1, "n_head": 2},
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": GROUPED,
    "GemmaForCausalLM": GROUPED | {"head_dim": 4, "hidden_activation": "gelu"},
    "BertForMaskedLM": SIZES,
    "BloomForCausalLM": SIZES | {"n_layer": 1, "n_head": HEADS},
    "ViTForImageClassification": SIZES | {"image_size": 8, "patch_size": 4},
}


def hugging_face(name, *inputs, **options):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, f"Flax{name}")
    model = kind(kind.config_class(**HUGGING_FACE[name]), _do_init=False)
    apply = lambda params, *inputs: model(*inputs, params=params)[0]
    return Model(apply, model.params_shape_tree, inputs, **options)


ROWS, POSITIONS = lj.Axes((), (0, 1), (2,)), "position_embeddings"


def vision_transformer():
    return hugging_face(
        "ViTForImageClassification",
        IMAGES.transpose(0, 3, 1, 2),
        rank={"cls_token": 1, "*": 2},
        axes={f"vit/embeddings/{name}": ROWS for name in ("cls_token", POSITIONS)},
        materialized={f"vit/embeddings/{POSITIONS}": ("add",)},
    )


# Modules of flax.nnx.


def stateless(kind, *inputs, **options):
    module = nnx.eval_shape(lambda: kind(nnx.Rngs(0)))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    rest = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), rest)
    apply = lambda params, *inputs: nnx.merge(graph, params, rest, copy=True)(*inputs)
    return Model(apply, params, inputs, **options)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, D, decode=False, rngs=rngs)
        self.up = nnx.LinearGeneral(D, (2, HIDDEN), rngs=rngs)
        self.down = nnx.Einsum("bth,hd->btd", (HIDDEN, D), (D,), rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        gate, up = jnp.moveaxis(self.up(self.norm(x)), -2, 0)
        return x + self.down(nnx.silu(gate) * up)


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((8, D)))
        self.block = Block(rngs)

    def __call__(self, ids):
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        return self.embed.attend(self.block(x))


class Stacked(nnx.Module):
    """Layers created under `vmap`, run under `scan` and `remat`."""

    def __init__(self, rngs):
        self.blocks = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Block))(rngs)
        self.head = nnx.Linear(D, VOCAB, rngs=rngs)

    def __call__(self, x):
        run = nnx.remat(lambda block, x: block(x))
        scan = nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.head(scan(self.blocks, x))


class Convolutional(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)
        self.grouped = nnx.Conv(8, 8, (3, 3), feature_group_count=2, rngs=rngs)
        self.depthwise = nnx.Conv(8, 16, (2, 2), feature_group_count=8, rngs=rngs)
        self.up = nnx.ConvTranspose(16, 4, (2, 2), strides=2, rngs=rngs)
        self.mirrored = nnx.ConvTranspose(
            4, 3, (3, 3), transpose_kernel=True, rngs=rngs
        )

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.max_pool(self.grouped(x), (2, 2), strides=(2, 2))
        return self.mirrored(self.up(nnx.gelu(self.depthwise(x))))


# Modules of flax.linen.


def linen(module, *inputs, **options):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return Model(module.apply, shapes, inputs, **options)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
        return x + nn.Dense(D)(nn.gelu(nn.Dense(HIDDEN)(nn.LayerNorm()(x)))), None


class Scanned(nn.Module):
    """Layers under `scan` and `remat`, with an embedding tied to the head."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(VOCAB, D)
        stack = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        layers = nn.scan(nn.remat(Layer), **stack, length=LAYERS)()
        return embed.attend(layers(embed(ids), None)[0])


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(D))(x)
        return nn.RNN(nn.GRUCell(D))(x)


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        weights = nn.softmax(nn.Dense(EXPERTS)(x))
        stack = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        experts = nn.vmap(nn.Dense, **stack, in_axes=None, axis_size=EXPERTS)
        return jnp.einsum("ebtd,bte->btd", experts(D, name="experts")(x), weights)


# Mixtures of experts as plain functions.

EXPERT = lj.Axes((0,), (1,), (2,))


def mixture(fn, **options):
    sizes = {
        "router": (D, EXPERTS),
        "up": (EXPERTS, D, HIDDEN),
        "down": (EXPERTS, HIDDEN, D),
    }
    params = {k: jax.ShapeDtypeStruct(n, np.float32) for k, n in sizes.items()}
    return Model(fn, params, (X,), **options)


def dense_mixture(p, x):
    weights = jax.nn.softmax(jnp.einsum("btd,de->bte", x, p["router"]))
    h = jnp.tanh(jnp.einsum("btd,edh->bteh", x, p["up"]))
    return jnp.einsum("bteh,ehd,bte->btd", h, p["down"], weights)


def routed_mixture(p, x, k=2):
    """Routes each token to its best experts, in one ragged product."""
    tokens = x.reshape(-1, D)
    weights, chosen = lax.top_k(jax.nn.softmax(tokens @ p["router"]), k)
    order = jnp.argsort(chosen.ravel())
    sizes = jnp.bincount(chosen.ravel(), length=EXPERTS)
    h = jnp.tanh(lax.ragged_dot(tokens[order // k], p["up"], sizes))
    y = lax.ragged_dot(h, p["down"], sizes)[jnp.argsort(order)]
    return (y.reshape(-1, k, D) * weights[..., None]).sum(1)


ZOO = {
    **{name: functools.partial(hugging_face, name, IDS) for name in HUGGING_FACE},
    "ViTForImageClassification": vision_transformer,
    "nnx transformer": lambda: stateless(
        Transformer,
        IDS,
        axes={"positions": lj.Axes((), (0,), (1,))},
        materialized={"positions": ("add",)},
    ),
    "nnx scan": lambda: stateless(Stacked, X),
    "nnx convolutions": lambda: stateless(Convolutional, IMAGES),
    "linen scan": lambda: linen(Scanned(), IDS),
    "linen recurrent": lambda: linen(Recurrent(), X),
    "linen experts": lambda: linen(Experts(), X),
    "linen experts, one adapter each": lambda: linen(
        Experts(), X, axes={"params/experts/kernel": EXPERT}
    ),
    "dense experts": lambda: mixture(dense_mixture),
    "dense experts, one adapter each": lambda: mixture(
        dense_mixture, axes={"up": EXPERT, "down": EXPERT}
    ),
    "routed experts": lambda: mixture(routed_mixture),
}
# Large models take the longest to trace, so only one of them is not slow.
LARGE = [name for name in ZOO if "For" in name and not name.startswith("GPT2")]
NAMES = [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in ZOO]


@functools.cache
def made(name):
    """Returns a model and the axes of its weights, traced once for all tests."""
    model = ZOO[name]()
    axes = lj.find_axes(model.apply, model.params, *model.inputs) | dict(model.axes)
    return model, axes


def adapted(name, **options):
    model, axes = made(name)
    return lj.lorafy(model.params, model.rank, targets=[*axes], axes=axes, **options)


def filled(shapes, seed):
    """Returns random values for a tree of shapes; zeros would hide errors."""
    rng = np.random.default_rng(seed)
    draw = lambda x: rng.normal(scale=0.3, size=x.shape).astype(x.dtype)
    return jax.tree.map(draw, shapes)


def quantized(axes, params):
    """Quantizes every weight with an even number of inputs to NF4, in blocks of two."""

    def is_even(path, w):
        table = path.endswith("embedding")
        return path in axes and w.shape[-1 if table else axes[path].inputs[-1]] % 2 == 0

    return lj.quantize(params, "nf4", targets=is_even, axes=axes, block=2)


# By default without the large models, and with only three quantized or DoRA runs.
WAYS = [
    *((name, "plain") for name in ZOO),
    *((name, how) for name in ZOO for how in ("nf4", "dora")),
]
QUICK = {("linen scan", "nf4"), ("routed experts", "nf4"), ("linen scan", "dora")}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(
            *way,
            marks=[pytest.mark.slow]
            * (way[0] in LARGE or (way[1] != "plain" and way not in QUICK)),
        )
        for way in WAYS
    ],
)
def test_lora_equals_the_merged_model(name, how, third_party, close):
    """Compares values and gradients, of a function that is traced once."""
    chex.clear_trace_counter()
    model, axes = made(name)
    params = adapted(name, dora=how == "dora")
    fill = lambda seed: filled(params, seed)
    if how == "nf4":
        store = jax.jit(functools.partial(quantized, axes))
        fill = lambda seed: store(filled(params, seed))

    @chex.assert_max_traces(n=1)
    def once(*args):
        return model.apply(*args)

    def loss(adapters, base, fn, inputs):
        y = fn(lj.combine(adapters, base), *inputs)
        return -jax.nn.log_softmax(y)[..., 0].sum(), y

    @jax.jit
    def both(params, inputs):
        grad = jax.grad(loss, has_aux=True)
        merged = lambda params, *inputs: model.apply(lj.merge(params), *inputs)
        fns = lj.lora(once, materialize="allow"), merged
        return [grad(*lj.split(params), fn, inputs) for fn in fns]

    for seed in (0, 1):
        close(*both(fill(seed), model.inputs), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_lora_keeps_every_weight_factored(name, third_party):
    model, _ = made(name)
    rows = lj.explain(model.apply, adapted(name), *model.inputs).rows
    assert [row.path for row in rows if not row.used] == []
    materialized = {row.path: row.materialized for row in rows if row.materialized}
    assert materialized == dict(model.materialized)
    params = adapted(name, exclude=list(model.materialized))
    jax.eval_shape(lj.lora(model.apply, materialize="error"), params, *model.inputs)
