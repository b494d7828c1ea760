"""`adopt` and `as_qwix` on adapters that other JAX libraries made and trained a step.

Each test skips without its library: qwix; gemma with kauldron (both without most of
their dependencies, see .ci/run); Keras; tunix, and torch, peft and transformers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import lora_jax as lj

pytestmark = [
    pytest.mark.usefixtures("third_party"),
    pytest.mark.filterwarnings("ignore"),  # warnings of other libraries
    pytest.mark.filterwarnings("error:'.*' meets"),  # ours: no weight is materialized
]
RNG = np.random.default_rng(0)
R, ALPHA = 3, 7.0
RATE = 0.1
TX = optax.sgd(RATE)


def normal(*shape):
    # Small, so that outputs are near 1 and a tolerance of 1e-5 is one of rounding.
    return jnp.asarray(0.2 * RNG.standard_normal(shape), jnp.float32)


def same(got, want, atol=1e-5):
    np.testing.assert_allclose(got, want, atol=atol, rtol=1e-5)


def trained(model, *args):
    """A live module after a step that trains its `nnx.LoRAParam`s, from random ones."""
    draw = lambda x: normal(*x.shape).astype(x.dtype)
    nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.LoRAParam)))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.LoRAParam)
    factors = lambda: map(np.asarray, jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    before = [*factors()]

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean(model(*args) ** 2)
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)

    step(model, optimizer)
    pairs = zip(before, factors(), strict=True)
    assert all(np.abs(x - y).max() > 0 for x, y in pairs)
    return model


def trained_params(apply, params, is_factor):
    """Parameters after a step that trains the leaves whose path is a factor's."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    kept = [is_factor(jax.tree_util.keystr(path)) for path, _ in flat]
    pairs = zip(flat, kept, strict=True)
    start = treedef.unflatten([normal(*x.shape) if k else x for (_, x), k in pairs])
    loss = lambda params: jnp.mean(apply(params) ** 2)
    grads = jax.tree.leaves(jax.jit(jax.grad(loss))(start))
    new = zip(jax.tree.leaves(start), grads, kept, strict=True)
    return treedef.unflatten([x - RATE * g if k else x for x, g, k in new])


def check_tree(fn, plain, adopted, want):
    """Checks the results of a function of the plain model's tree."""
    assert jax.tree.structure(lj.strip(adopted)) == jax.tree.structure(plain)
    same(jax.jit(lj.lora(fn, materialize="allow"))(adopted), want)
    same(jax.jit(fn)(lj.merge(adopted)), want)


# flax.nnx


class Layers(nnx.Module):
    def __init__(self, rngs, rank=R):
        linear = nnx.Linear(8, 6, rngs=rngs)
        self.up = nnx.LoRALinear(8, 8, lora_rank=rank, rngs=rngs)
        self.down = nnx.LoRA(8, rank, 6, base_module=linear, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def test_adopt_of_flax_ends_as_a_peft_folder(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    x = normal(5, 8)
    model = trained(Layers(nnx.Rngs(0)), x)
    want = np.asarray(model(x))
    module = lj.adopt(model)
    same(module(x), want)
    names = {"up/kernel": "up", "down/kernel": "down"}
    lj.export_peft(tmp_path / "adapter", module, names)

    class Torch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.nn.Linear(8, 8), torch.nn.Linear(8, 6)

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    plain = Torch()
    state = nnx.to_pure_dict(nnx.state(module.model))
    for name in ("up", "down"):
        layer, arrays = getattr(plain, name), jax.tree.map(np.array, state[name])
        layer.weight.data = torch.tensor(arrays["kernel"].T)
        layer.bias.data = torch.tensor(arrays["bias"])
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    with torch.no_grad():
        same(loaded(torch.tensor(np.array(x))).numpy(), want)


# qwix


class Mixed(nnx.Module):
    """Attention whose kernels qwix joins, an einsum, a convolution, a dense layer."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(
            2, 8, qkv_features=12, rngs=rngs, decode=False
        )
        self.einsum = nnx.Einsum("btd,ndh->btnh", (2, 8, 4), rngs=rngs)
        self.conv = nnx.Conv(8, 6, (3,), rngs=rngs)
        self.dense = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        x = x + self.einsum(x).reshape(x.shape)
        return self.dense(self.conv(x))


def test_adopt_of_qwix_in_nnx_and_back():
    qwix = pytest.importorskip("qwix")
    plain, x = Mixed(nnx.Rngs(0)), normal(2, 5, 8)

    def theirs(alpha, seed):
        provider = qwix.LoraProvider(module_path=".*", rank=R, alpha=alpha)
        return qwix.apply_lora_to_model(plain, provider, x, rngs=nnx.Rngs(seed))

    model = trained(theirs(ALPHA, 1), x)
    want = model(x)
    module = lj.adopt(model, alpha=ALPHA)
    assert type(module.model) is Mixed
    same(module(x), want)
    same(module.merge()(x), want)
    tree = lj.adopt(nnx.state(model), alpha=ALPHA)
    same(nnx.merge(nnx.graphdef(plain), lj.merge(tree))(x), want)
    for alpha, given in ((ALPHA, {"alpha": ALPHA}), (R, {}), (5.0, {"alpha": 5.0})):
        model = theirs(alpha, 2)
        nnx.update(model, lj.as_qwix(module, **given))
        same(model(x), want)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                h = nn.DenseGeneral((2, 4), name="up")(x)
                return x + nn.DenseGeneral(8, axis=(-2, -1), name="down")(h), None

        # As many layers as the rank: the shapes alone do not tell them apart.
        scan = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=R
        )
        return scan(name="layers")(x, None)[0]


def test_adopt_of_qwix_in_scanned_linen():
    qwix = pytest.importorskip("qwix")
    plain, x = Scanned(), normal(2, 5, 8)
    provider = qwix.LoraProvider(module_path=".*", rank=R, alpha=ALPHA)
    model = qwix.apply_lora_to_model(plain, provider)
    apply = lambda params: model.apply(params, x)
    params = trained_params(
        apply, model.init(jax.random.key(0), x), lambda name: "_lora_" in name
    )
    fn = lambda params: plain.apply(params, x)
    base = jax.eval_shape(plain.init, jax.random.key(0), x)
    check_tree(fn, base, lj.adopt(params, alpha=ALPHA), apply(params))


def test_adopt_names_a_weight_that_qwix_quantized():
    qwix = pytest.importorskip("qwix")
    provider = qwix.LoraProvider(
        module_path=".*", rank=R, alpha=ALPHA, weight_qtype="int8"
    )
    model = qwix.apply_lora_to_model(nn.Dense(4), provider)
    params = model.init(jax.random.key(0), normal(2, 8))
    match = "'params/kernel', the weight of .*, is several leaves, as qwix stores"
    with pytest.raises(ValueError, match=match):
        lj.adopt(params, alpha=ALPHA)


# gemma.peft


def test_adopt_of_gemma_ends_as_a_peft_folder(tmp_path):
    lora = pytest.importorskip("gemma.gm.nn._lora", exc_type=ImportError)
    layers = pytest.importorskip("gemma.gm.nn._layers", exc_type=ImportError)
    modules = pytest.importorskip("gemma.gm.nn._modules", exc_type=ImportError)

    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            einsum = lambda name, *shape: layers.Einsum(shape=shape, name=name)
            q = einsum("q_einsum", 2, 8, 4)("BTD,NDH->BTNH", x)
            k, v = einsum("kv_einsum", 2, 1, 8, 4)("BSD,CKDH->CBSKH", x)
            weights = jax.nn.softmax(jnp.einsum("BTNH,BSKH->BTNS", q, k))
            h = jnp.einsum("BTNS,BSKH->BTNH", weights, v)
            return einsum("attn_vec_einsum", 2, 4, 8)("BTNH,NHD->BTD", h)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + Attention(name="attn")(x)
            feed = lambda name, t: modules.FeedForward(
                name=name, features=8, hidden_dim=6, transpose_gating_einsum=t
            )
            x = x + feed("mlp", True)(x) + feed("other_mlp", False)(x)
            heads = nn.DenseGeneral((2, 3), name="general")(x)
            return nn.Dense(6, name="head")(heads.reshape(*x.shape[:2], 6))

    plain, x = Block(), normal(2, 5, 8)
    model = lora.LoRA(rank=R, model=Block(), dtype=jnp.float32)
    apply = lambda params: model.apply(params, x)
    params = jax.jit(model.init)(jax.random.key(0), x)
    params = trained_params(apply, params, lambda name: "['lora']" in name)
    want = apply(params)
    fn = lambda params: plain.apply(params, x)
    base = jax.eval_shape(plain.init, jax.random.key(0), x)
    adopted = lj.adopt(params)
    check_tree(fn, base, adopted, want)

    axes = lj.find_axes(fn, base)
    names = {
        "params/attn/q_einsum/w": "attn.q_proj",
        "params/attn/kv_einsum/w": ("attn.k_proj", "attn.v_proj"),
        "params/attn/attn_vec_einsum/w": "attn.o_proj",
        "params/mlp/gating_einsum": ("mlp.gate_proj", "mlp.up_proj"),
        "params/mlp/linear": "mlp.down_proj",
        "params/other_mlp/gating_einsum": ("other.gate_proj", "other.up_proj"),
        "params/other_mlp/linear": "other.down_proj",
        "params/general/kernel": "general",
        "params/head/kernel": "head",
    }
    lj.export_peft(tmp_path / "adapter", adopted, names, axes=axes)
    back = lj.import_peft(tmp_path / "adapter", lj.strip(adopted), names, axes=axes)
    same(jax.jit(fn)(lj.merge(back)), want)


# Keras


def test_adopt_of_keras_with_alpha(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")

    def build():
        ids = keras.Input((5,), dtype="int32")
        x = keras.layers.Embedding(9, 8, name="table")(ids)
        heads = keras.layers.EinsumDense(
            "abc,cde->abde", output_shape=(5, 2, 4), name="query"
        )(x)
        x = keras.layers.EinsumDense("abde,dec->abc", output_shape=(5, 8), name="out")(
            heads
        )
        x = keras.layers.Conv1D(6, 3, padding="same", name="conv")(x)
        return keras.Model(ids, keras.layers.Dense(6, name="dense")(x))

    ids = np.asarray(RNG.integers(0, 9, (2, 5)))
    model, plain = build(), build()
    plain.set_weights(model.get_weights())
    for layer in model.layers[1:]:
        layer.enable_lora(R, lora_alpha=ALPHA)
    for variable in model.trainable_variables:
        if "lora" in variable.name:
            variable.assign(normal(*variable.shape))
    before = {v.path: np.array(v.value) for v in model.variables}
    model.compile(keras.optimizers.SGD(RATE), "mse", jit_compile=False)
    model.train_on_batch(ids, np.zeros((2, 5, 6), np.float32))
    params = {v.path: v.value for v in model.variables}
    changed = [name for name, x in before.items() if np.abs(x - params[name]).max() > 0]
    assert len([name for name in changed if "lora" in name]) == 10

    def fn(params):
        order = plain.trainable_variables, plain.non_trainable_variables
        values = ([params[v.path] for v in variables] for variables in order)
        return plain.stateless_call(*values, ids)[0]

    names = [v.path for v in plain.variables]
    params = {k: x for k, x in params.items() if k in names or "/lora_" in k}
    base = {name: params[name] for name in names}
    adopted = lj.adopt(params, alpha=ALPHA)
    check_tree(fn, base, adopted, model(ids))

    # The query's first factor has the heads, which are outputs. PEFT has no such
    # factor, but the update is one of rank 2 R.
    axes = lj.find_axes(fn, base)
    merged = lj.merge(adopted)
    query = {**merged, **{k: x for k, x in base.items() if not k.startswith("query")}}
    exact = lj.extract(query, base, 2 * R, targets="query", axes=axes)
    same(jax.jit(fn)(lj.merge(exact)), jax.jit(fn)(query))


# tunix, whose models qwix adapts. Needs torch, peft and transformers for the models of
# Hugging Face that they come from.

SIZES = dict(num_layers=1, embed_dim=16, hidden_dim=24, num_heads=4, num_kv_heads=2)
SIZES |= dict(vocab_size=30, head_dim=4, rope_theta=1_000_000, norm_eps=1e-6)
IDS = np.array([[3, 7, 1, 2, 9], [4, 4, 8, 0, 5]])
MODULES = ".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj"


def call(model, ids=None):
    ids = jnp.asarray(IDS) if ids is None else ids
    n = ids.shape[1]
    positions = jnp.broadcast_to(jnp.arange(n), ids.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((n, n), bool)), (len(ids), n, n))
    return model(ids, positions, None, mask)[0]


class Words:
    """A tokenizer for texts of integers."""

    def encode(self, text):
        return [int(x) for x in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))

    bos_id, eos_id, pad_id = (lambda self, i=i: i for i in (1, 2, 0))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """A Qwen 3 of transformers, its folder, tunix's and the one that qwix trained."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return models_of_qwen3(tmp_path_factory.mktemp("qwen3") / "torch")


def models_of_qwen3(folder):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    qwix = pytest.importorskip("qwix")
    models = pytest.importorskip("tunix.models.qwen3.model")
    loader = pytest.importorskip("tunix.models.qwen3.params")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    torch_model = transformers.Qwen3ForCausalLM(config).eval()
    torch_model.save_pretrained(folder, safe_serialization=True)
    plain = loader.create_model_from_safe_tensors(
        str(folder), models.ModelConfig(**SIZES), dtype=jnp.float32
    )

    def theirs(alpha=ALPHA):
        provider = qwix.LoraProvider(module_path=MODULES, rank=R, alpha=alpha)
        return qwix.apply_lora_to_model(plain, provider, **plain.get_model_input())

    model = theirs()
    draw = lambda x: normal(*x.shape)
    nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.LoRAParam)))
    sft = pytest.importorskip("tunix.sft.peft_trainer")
    trainer = sft.PeftTrainer(
        model, TX, sft.TrainingConfig(eval_every_n_steps=100, max_steps=1)
    )
    trainer = trainer.with_gen_model_input_fn(
        lambda x: {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": jnp.broadcast_to(jnp.arange(5), (2, 5)),
            "attention_mask": jnp.broadcast_to(
                jnp.tril(jnp.ones((5, 5), bool)), (2, 5, 5)
            ),
        }
    )
    inputs = sft.TrainingInput(
        input_tokens=jnp.asarray(IDS), input_mask=jnp.ones(IDS.shape, bool)
    )
    trainer.train([inputs])
    return torch_model, folder, plain, theirs, model


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def test_adopt_of_tunix_ends_as_a_peft_folder(qwen3, tmp_path):
    import peft

    torch_model, folder, plain, _, model = qwen3
    want = np.asarray(call(model))
    assert np.abs(want - call(plain)).max() > 0.01
    module = lj.adopt(model, alpha=ALPHA)
    same(call(module), want)
    names = lj.find_names(module, folder)
    lj.export_peft(tmp_path / "adapter", module, names)
    loaded = peft.PeftModel.from_pretrained(torch_model, tmp_path / "adapter")
    same(torch_logits(loaded), want, atol=1e-4)
    loaded.unload()


def test_adopt_of_a_checkpoint_of_tunix(qwen3, tmp_path):
    manager = pytest.importorskip("tunix.sft.checkpoint_manager")
    _, _, _, theirs, model = qwen3
    saved = manager.CheckpointManager(str(tmp_path))
    saved.save(1, model, save_only_lora_params=True)
    saved.close()
    restored = theirs()
    manager.CheckpointManager(str(tmp_path)).maybe_restore(
        restored, restore_only_lora_params=True
    )
    same(call(lj.adopt(restored, alpha=ALPHA)), call(model))


def test_as_qwix_is_read_by_tunix(qwen3, tmp_path):
    """Its exporter and its sampler take the factors."""
    transformers = pytest.importorskip("transformers")
    exporter = pytest.importorskip("tunix.models.qwen3.params")
    if not hasattr(exporter, "save_lora_merged_model_as_safetensors"):
        pytest.skip("needs tunix 0.1.7")
    from tunix.generate import sampler

    _, folder, _, theirs, model = qwen3
    want = np.asarray(call(model))
    module = lj.adopt(model, alpha=ALPHA)
    model = theirs(alpha=5.0)
    factors = nnx.filter_state(lj.as_qwix(module, alpha=5.0), nnx.LoRAParam)
    own = nnx.state(model, nnx.LoRAParam)
    assert jax.tree.structure(factors) == jax.tree.structure(own)
    nnx.update(model, factors)
    same(call(model), want)

    out = tmp_path / "merged"
    exporter.save_lora_merged_model_as_safetensors(
        str(folder), str(out), model, rank=R, alpha=5.0
    )
    loaded = transformers.Qwen3ForCausalLM.from_pretrained(out).eval()
    same(torch_logits(loaded), want, atol=1e-4)

    cache = sampler.CacheConfig(cache_size=16, num_layers=1, num_kv_heads=2, head_dim=4)
    run = lambda model: sampler.Sampler(model, Words(), cache)(
        ["5 6 7", "8"], max_generation_steps=4, return_logprobs=True
    )
    first = sampler.Sampler(theirs(alpha=5.0), Words(), cache)
    first.transformer_state = factors
    got, merged = (
        first(["5 6 7", "8"], max_generation_steps=4, return_logprobs=True),
        run(module.merge()),
    )
    assert got.text == merged.text
    for x, y in zip(got.logprobs, merged.logprobs, strict=True):
        same(x, y, atol=1e-4)
