"""Adapters to and from PEFT itself, on PyTorch models with the same weights.

Needs the extra `peers`: torch, peft and transformers.
"""

import copy
import json
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
from models import minilm

import lora_jax as lj

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("third_party", "one_thread")


def to_torch(module, weights):
    """Loads all weights of a PyTorch module."""
    state = {name: torch.tensor(np.asarray(x)) for name, x in weights.items()}
    module.load_state_dict(state, strict=True)
    return module.eval()


def loaded(module, folder):
    """The module with the adapter, loaded by PEFT without a warning."""
    with warnings.catch_warnings():
        # A warning, as about missing or unexpected keys, is an error, except for two:
        # PEFT corrects the first setting itself, and the second is about merging.
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", "(?s).*tie_word_embeddings")
        return peft.PeftModel.from_pretrained(copy.deepcopy(module), folder).eval()


def run(module, *args, **kwargs):
    with torch.no_grad():
        y = module(*(torch.tensor(np.asarray(x)) for x in args), **kwargs)
    return (y if isinstance(y, torch.Tensor) else y.logits).numpy()


class Torch(torch.nn.Module):
    """One of each layer that PEFT adapts."""

    def __init__(self):
        super().__init__()
        layer = torch.nn
        self.table = layer.Embedding(11, 6)
        self.conv = layer.Conv2d(2, 3, (3, 2), padding="valid")
        self.conv1 = layer.Conv1d(3, 4, 2)
        self.qkv = transformers.pytorch_utils.Conv1D(12, 6)
        self.blocks = layer.ModuleList(
            layer.ModuleDict({n: layer.Linear(6, 6) for n in ("query", "value", "out")})
            for _ in range(3)
        )
        self.score = layer.Linear(6, 2)

    def forward(self, ids, images):
        x = self.table(ids)  # (2, 5, 6)
        y = self.conv1(self.conv(images).flatten(2))  # (2, 4, _)
        x = x + self.qkv(x)[..., 6:] + y.mean((1, 2))[:, None, None]
        for block in self.blocks:
            x = x + block["out"](torch.tanh(block["query"](x)) * block["value"](x))
        return self.score(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        heads = lambda name: nn.DenseGeneral((2, 3), name=name)(x)
        y = jnp.tanh(heads("query")) * heads("value")
        return x + nn.DenseGeneral(6, (-2, -1), name="out")(y), None


class Flax(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, ids, images):
        x = nn.Embed(11, 6, name="table")(ids)
        y = nn.Conv(3, (3, 2), padding="VALID", name="conv")(images)
        y = nn.Conv(4, (2,), padding="VALID", name="conv1")(y.reshape(2, -1, 3))
        x = x + nn.Dense(12, name="qkv")(x)[..., 6:] + y.mean((1, 2))[:, None, None]
        if self.scanned:
            stack = nn.scan(Block, {"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = stack(name="blocks")(x, None)
        else:
            for i in range(3):
                x, _ = Block(name=f"blocks_{i}")(x)
        return nn.Dense(2, name="score")(x)


NAMES = {
    "blocks_*/*": "blocks.{}.{}",
    "table": "table",
    "conv": "conv",
    "conv1": "conv1",
    "qkv": "qkv",
    "score": "score",
}
SCANNED = {"blocks/*": "blocks.{layer}.{}", **NAMES}
del SCANNED["blocks_*/*"]


def inputs():
    rng = np.random.default_rng(0)
    return rng.integers(0, 11, (2, 5)), rng.standard_normal((2, 4, 5, 2), np.float32)


def flax_and_torch(scanned):
    model = Flax(scanned)
    ids, images = inputs()
    params = model.init(jax.random.key(1), ids, images)["params"]
    params = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )
    p = jax.tree.map(np.asarray, params)
    dense = lambda layer: {
        "weight": layer["kernel"].reshape(6, -1).T,
        "bias": layer["bias"].reshape(-1),
    }
    state = {"table.weight": p["table"]["embedding"]}
    state |= {"conv.weight": p["conv"]["kernel"].transpose(3, 2, 0, 1)}
    state |= {"conv1.weight": p["conv1"]["kernel"].transpose(2, 1, 0)}
    state |= {"qkv.weight": p["qkv"]["kernel"], "score.weight": p["score"]["kernel"].T}
    state |= {f"{n}.bias": p[n]["bias"] for n in ("conv", "conv1", "qkv", "score")}
    for i in range(3):
        block = (
            p[f"blocks_{i}"]
            if not scanned
            else jax.tree.map(lambda x, i=i: x[i], p["blocks"])
        )
        for name in ("query", "value", "out"):
            own = dense(block[name])
            state |= {f"blocks.{i}.{name}.{k}": x for k, x in own.items()}
    return model, params, to_torch(Torch(), state)


def compare(model, params, module, folder):
    ids, images = inputs()
    want = lj.lora(model.apply)({"params": params}, ids, images)
    got = run(loaded(module, folder), ids, images.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=2e-5)
    return np.asarray(want)


@pytest.mark.parametrize(
    ("scanned", "dora"), [(False, False), (True, False), (True, True)]
)
def test_export_peft_of_every_type_of_layer(tmp_path, randomized, scanned, dora):
    model, base, module = flax_and_torch(scanned)
    plain = run(module, inputs()[0], inputs()[1].transpose(0, 3, 1, 2))
    first = "blocks" if scanned else "blocks_0"
    ranks = {f"{first}/query": 2, "blocks*/*/kernel": 3, "table": 4, "*": 1}
    axes = lj.find_axes(
        lambda p, *args: model.apply({"params": p}, *args), base, *inputs()
    )
    params = lj.lorafy(
        base, ranks, alpha={"conv1": 5, "*/value": 0.3}, axes=axes, dora=dora
    )
    params = randomized(params)
    names = SCANNED if scanned else NAMES
    lj.export_peft(tmp_path / "a", params, names, modules=dict(module.named_modules()))
    want = compare(model, params, module, tmp_path / "a")
    assert np.abs(want - plain).max() > 1
    back = lj.import_peft(tmp_path / "a", base, names, axes=axes)
    ids, images = inputs()
    again = lj.lora(model.apply)({"params": back}, ids, images)
    np.testing.assert_array_equal(again, want)
    lj.export_peft(tmp_path / "b", back, names)
    same_files(tmp_path / "a", tmp_path / "b")


def peft_saved(module, folder, **config):
    """The model with a random adapter of PEFT, which is saved to a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        config = peft.LoraConfig(init_lora_weights=False, **config)
        adapted = peft.get_peft_model(copy.deepcopy(module), config).eval()
        with torch.no_grad():
            for name, x in adapted.named_parameters():
                if "modules_to_save" in name or "magnitude" in name:
                    x += torch.randn_like(x)
        adapted.save_pretrained(folder)
    return adapted


def same_files(first, second):
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


MIXED: dict[str, Any] = dict(
    r=3,
    lora_alpha=1,
    target_modules=["table", "conv", "conv1", "qkv", "query", "blocks.1.value"],
    rank_pattern={"blocks.1.query": 2, "conv1": 1},
    alpha_pattern={"query": 0.5, "table": 2},
    modules_to_save=["score"],
)


@pytest.mark.parametrize(
    "config",
    [
        MIXED,
        MIXED | {"use_rslora": True},
        dict(r=2, target_modules=r"blocks\.\d\.(query|out)"),
        dict(
            r=2,
            target_modules=["out"],
            layers_to_transform=[0, 2],
            layers_pattern="blocks",
        ),
        dict(r=2, target_modules=["out", "value"], exclude_modules=["blocks.1.out"]),
        MIXED | {"use_dora": True, "target_modules": [*MIXED["target_modules"][:5]]},
    ],
)
def test_import_peft_of_what_peft_saved(tmp_path, config):
    model, base, module = flax_and_torch(scanned=True)
    adapted = peft_saved(module, tmp_path / "peft", **config)
    ids, images = inputs()
    want = run(adapted, ids, images.transpose(0, 3, 1, 2))
    axes = lj.find_axes(
        lambda p, *args: model.apply({"params": p}, *args), base, ids, images
    )
    folder = tmp_path / "peft"
    for out in (tmp_path / "first", tmp_path / "second"):
        params = lj.import_peft(folder, base, SCANNED, axes=axes)
        got = lj.lora(model.apply)({"params": params}, ids, images)
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=2e-5)
        lj.export_peft(out, params, SCANNED)
        got = run(loaded(module, out), ids, images.transpose(0, 3, 1, 2))
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=2e-5)
        folder = out
    same_files(tmp_path / "first", tmp_path / "second")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_peft_of_modules_trained_in_full(tmp_path, randomized, dtype):
    """Only also= in lorafy names them; one is a stack of layers."""
    model, base, module = flax_and_torch(scanned=True)
    base = jax.tree.map(lambda x: x.astype(dtype), base)
    ids, images = inputs()
    axes = lj.find_axes(
        lambda p, *args: model.apply({"params": p}, *args), base, ids, images
    )
    also = ["score", "conv", "blocks/out"]
    params = lj.lorafy(base, 2, targets=["query", "table"], axes=axes, also=also)
    params = randomized(params)
    lj.export_peft(tmp_path / "a", params, SCANNED, modules=module.state_dict())
    got = loaded(module, tmp_path / "a")
    saved = safetensors.numpy.load_file(tmp_path / "a/adapter_model.safetensors")
    assert {x.dtype.name for x in saved.values()} == {"float32"}
    back = lj.import_peft(tmp_path / "a", base, SCANNED, axes=axes)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for x, y in zip(*map(jax.tree.leaves, (back, params)), strict=True):
        np.testing.assert_array_equal(x, y)
    lj.export_peft(tmp_path / "b", back, SCANNED)
    same_files(tmp_path / "a", tmp_path / "b")
    if dtype == "float32":
        want = lj.lora(model.apply)({"params": params}, ids, images)
        y = run(got, ids, images.transpose(0, 3, 1, 2))
        np.testing.assert_allclose(y, want, atol=1e-5, rtol=2e-5)
        plain = run(module, ids, images.transpose(0, 3, 1, 2))
        assert np.abs(want - plain).max() > 0.3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_import_peft_of_narrow_dtypes(tmp_path, dtype):
    model, base, module = flax_and_torch(scanned=True)
    adapted = peft_saved(module, tmp_path, r=2, target_modules=["query", "table"])
    adapted.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    ids, images = inputs()
    want = run(adapted.float(), ids, images.transpose(0, 3, 1, 2))
    base = jax.tree.map(lambda x: x.astype(dtype), base)
    params = lj.import_peft(tmp_path, base, SCANNED)
    assert params["table"]["lora_a"].dtype == jnp.float32
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    got = lj.lora(model.apply)({"params": params}, ids, images)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=2e-5)
    lj.export_peft(tmp_path / "out", params, SCANNED, dtype=dtype)
    tensors = safetensors.numpy.load_file(tmp_path / "out/adapter_model.safetensors")
    assert {x.dtype.name for x in tensors.values()} == {dtype}
    saved = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    for name, x in tensors.items():
        np.testing.assert_array_equal(x, saved[name])


TINY = dict(vocab_size=17, tie_word_embeddings=True)
MODELS = {
    "GPT2LMHeadModel": transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, n_positions=8, **TINY
    ),
    "BertForMaskedLM": transformers.BertConfig(
        num_hidden_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        **TINY,
    ),
    "LlamaForCausalLM": transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        **TINY | {"tie_word_embeddings": False},
    ),
}
MODELS["BertForSequenceClassification"] = MODELS["BertForMaskedLM"]


def from_flax(name, params):
    """The model of transformers in PyTorch, with weights by its own conversion."""
    from transformers.modeling_flax_pytorch_utils import (
        load_flax_weights_in_pytorch_model,
    )

    module = getattr(transformers, name)(MODELS[name])
    return load_flax_weights_in_pytorch_model(module, params).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in MODELS if "Classif" not in name])
def test_export_peft_of_models_of_transformers(tmp_path, randomized, name):
    model = getattr(transformers, f"Flax{name}")(MODELS[name])
    base = model.params
    module = from_flax(name, base)
    ids = np.random.default_rng(0).integers(0, 17, (2, 6))
    fn = lambda params, ids: model(ids, params=params, train=False).logits
    plain = run(module, ids)
    np.testing.assert_allclose(fn(base, ids), plain, atol=2e-5)
    axes = lj.find_axes(fn, base, ids)
    params = randomized(lj.lorafy(base, 2, alpha=3, targets="*", axes=axes))
    names = lj.transformers_names(base)
    fan = name.startswith("GPT2")
    lj.export_peft(tmp_path, params, names, fan_in_fan_out=fan)
    want = lj.lora(fn)(params, ids)
    got = run(loaded(module, tmp_path), ids)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)
    assert np.abs(got - plain).max() > 0.1
    back = lj.import_peft(tmp_path, base, names, axes=axes)
    np.testing.assert_array_equal(lj.lora(fn)(back, ids), want)
    if name == "BertForMaskedLM":  # a table that is trained in full, and the head's
        also = lj.lorafy(base, 2, targets="query", also="word_embeddings", axes=axes)
        lj.export_peft(tmp_path / "also", also := randomized(also), names)
        got, want = run(loaded(module, tmp_path / "also"), ids), lj.lora(fn)(also, ids)
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)
    if fan:  # an adapter made without axes has lora_a on the outputs
        reversed_ = randomized(lj.lorafy(base, 2, targets="c_*"))
        lj.export_peft(tmp_path, reversed_, names, fan_in_fan_out=True, axes=axes)
        got, want = run(loaded(module, tmp_path), ids), lj.lora(fn)(reversed_, ids)
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_import_peft_of_a_classifier_and_its_head(tmp_path, randomized):
    """For this task PEFT adds names of heads to save, which the model may lack."""
    name, task = "BertForSequenceClassification", "SEQ_CLS"
    model = transformers.FlaxBertForSequenceClassification(MODELS[name])
    base, names = model.params, lj.transformers_names(model.params)
    module = from_flax(name, base)
    ids = np.random.default_rng(0).integers(0, 17, (2, 6))
    fn = lambda params: lj.lora(
        lambda params: model(ids, params=params, train=False).logits
    )(params)
    config = dict(target_modules=["query"], task_type=task)
    adapted = peft_saved(module, tmp_path / "a", **config)
    params = lj.import_peft(tmp_path / "a", base, names)
    np.testing.assert_allclose(fn(params), run(adapted, ids), atol=2e-5, rtol=2e-5)
    head = params["classifier"]
    assert head["kernel"] is base["classifier"]["kernel"]
    assert (head["lora_w"] != head["kernel"]).all()
    params = randomized(params)
    lj.export_peft(tmp_path / "b", params, names, task_type=task)
    got = run(loaded(module, tmp_path / "b"), ids)
    np.testing.assert_allclose(got, fn(params), atol=2e-5, rtol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_export_peft_of_minilm(tmp_path, randomized):
    """MiniLM's map, and weights from the converter of the benchmarks."""
    config = transformers.BertConfig(
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        vocab_size=17,
    )
    module = transformers.BertModel(config).eval()
    tensors = {name: x.numpy() for name, x in module.state_dict().items()}
    base = minilm.convert(tensors)
    model = minilm.Encoder(**minilm.measure(tensors))
    fn = lambda params, ids: model.apply({"params": params}, ids, jnp.ones_like(ids))
    params = randomized(lj.lorafy(base, 2, alpha=1, targets=["layer_*", "word"]))
    lj.export_peft(tmp_path, params, minilm.NAMES, modules=tensors)
    ids = np.random.default_rng(0).integers(0, 17, (2, 6))
    with torch.no_grad():
        got = loaded(module, tmp_path)(torch.tensor(ids)).last_hidden_state
    want = lj.lora(fn)(params, ids)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)
    back = lj.import_peft(tmp_path, base, minilm.NAMES)
    np.testing.assert_array_equal(lj.lora(fn)(back, ids), want)


@pytest.mark.filterwarnings("ignore")
def test_import_peft_refuses_a_tied_head_with_its_own_adapter(tmp_path):
    """PEFT trains an embedding and its tied head separately, as one leaf cannot be."""
    config = MODELS["GPT2LMHeadModel"]
    module = transformers.GPT2LMHeadModel(config)
    base = transformers.FlaxGPT2LMHeadModel(config).params
    table = module.transformer.wte.weight.detach().numpy()
    base["transformer"]["wte"]["embedding"] = jnp.asarray(table)
    names = lj.transformers_names(base)
    peft_saved(module, tmp_path / "a", r=2, target_modules=["wte"])
    peft_saved(module, tmp_path / "b", r=2, target_modules=["wte", "lm_head"])
    for folder, what in (("a", "are not both there"), ("b", "differ")):
        with pytest.raises(ValueError, match=what):
            lj.import_peft(tmp_path / folder, base, names)
    untied = {"*/embedding": "{}"}
    got = lj.import_peft(tmp_path / "a", base, untied)["transformer"]["wte"]
    assert got["lora_a"].shape == (17, 2)


@pytest.mark.filterwarnings("ignore")
def test_import_peft_checks_an_embedding_that_peft_saved(tmp_path):
    """PEFT saves an adapted embedding itself, too: it must be that of the base."""
    config = MODELS["LlamaForCausalLM"]
    module = transformers.LlamaForCausalLM(config)
    base = transformers.FlaxLlamaForCausalLM(config).params
    table = module.model.embed_tokens.weight.detach().numpy()
    base["model"]["embed_tokens"]["embedding"] = jnp.asarray(table)
    peft_saved(module, tmp_path, r=2, target_modules=["embed_tokens"])
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in tensors
    names = lj.transformers_names(base)
    got = lj.import_peft(tmp_path, base, names)["model"]["embed_tokens"]
    assert got["lora_a"].shape == (17, 2)
    base["model"]["embed_tokens"]["embedding"] += 1
    with pytest.raises(ValueError, match="not the weight of base"):
        lj.import_peft(tmp_path, base, names)


class Experts(torch.nn.Module):
    """Two stacks of three experts each, stored (experts, out, in) or the reverse."""

    def __init__(self, up, down, is_transposed):
        super().__init__()
        self.is_transposed = is_transposed
        turn = (lambda x: x) if is_transposed else (lambda x: x.mT)
        self.gate_up_proj = torch.nn.Parameter(turn(torch.tensor(up)).contiguous())
        self.down_proj = torch.nn.Parameter(turn(torch.tensor(down)).contiguous())

    def forward(self, x):
        turn = (lambda w: w) if self.is_transposed else (lambda w: w.mT)
        up, down = turn(self.gate_up_proj), turn(self.down_proj)
        return torch.einsum(
            "ted,edf->tef", torch.tanh(torch.einsum("td,edf->tef", x, up)), down
        )


@pytest.mark.parametrize("is_transposed", [False, True])
def test_export_peft_of_experts(tmp_path, randomized, is_transposed):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    base = {"moe": {"down": draw(2, 3, 6, 4), "up": draw(2, 3, 4, 6)}}
    x = draw(5, 4)
    wrap = lambda i: torch.nn.ModuleDict(
        {
            "experts": Experts(
                base["moe"]["up"][i], base["moe"]["down"][i], is_transposed
            )
        }
    )

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(map(wrap, range(2)))

        def forward(self, x):
            return sum(layer["experts"](x) for layer in self.layers)

    def fn(params, x):
        one = lambda up, down: jnp.tanh(x @ up) @ down
        y = jax.vmap(jax.vmap(one))(params["moe"]["up"], params["moe"]["down"])
        return jnp.moveaxis(y.sum(0), 0, 1)

    module = Model()
    np.testing.assert_allclose(fn(base, x), run(module, x), atol=1e-5)
    dims = lj.Axes((0, 1), (2,), (3,))
    axes = {"moe/up": dims, "moe/down": dims}
    params = randomized(lj.lorafy(base, 2, alpha=1, targets="moe", axes=axes))
    names = {
        "up": "layers.{layer}.experts.gate_up_proj",
        "down": "layers.{layer}.experts.down_proj",
    }
    kinds = {"moe": "experts"}
    lj.export_peft(tmp_path / "a", params, names, kinds=kinds)
    want = lj.lora(fn)(params, x)
    got = run(loaded(module, tmp_path / "a"), x)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)
    peft_config = dict(target_parameters=["gate_up_proj", "down_proj"], r=2)
    adapted = peft_saved(module, tmp_path / "b", target_modules=[], **peft_config)
    params = lj.import_peft(tmp_path / "b", base, names, axes=axes, kinds=kinds)
    want = run(adapted, x)
    got = lj.lora(fn)(params, x)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)
    lj.export_peft(tmp_path / "c", params, names, kinds=kinds)
    np.testing.assert_allclose(run(loaded(module, tmp_path / "c"), x), want, atol=2e-5)


class Fused(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        for name, w in weights.items():
            linear = torch.nn.Linear(*w.shape, bias=False)
            linear.weight.data = torch.tensor(w.T.copy())
            setattr(self, name, linear)

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.children()], -1)


def test_export_peft_of_fused_weights(tmp_path, randomized):
    """A kernel with parts of unequal size, and one with the parts before its inputs."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    base = {"qkv": {"kernel": draw(5, 10)}, "kv": draw(2, 3, 5, 2)}
    x, sizes = draw(4, 5), {"q": 6, "k": 2, "v": 2}
    cut = np.split(base["qkv"]["kernel"], [6, 8], 1)
    weights = dict(zip(sizes, cut, strict=True))
    weights |= {
        n: w.swapaxes(0, 1).reshape(5, 6) for n, w in zip("ij", base["kv"], strict=True)
    }
    module = Fused(weights)

    def fn(params, x):
        y = jnp.einsum("bi,shid->bshd", x, params["kv"]).reshape(4, 12)
        return jnp.concatenate([x @ params["qkv"]["kernel"], y], 1)

    np.testing.assert_allclose(fn(base, x), run(module, x), atol=1e-5)
    axes, names = lj.find_axes(fn, base, x), {"qkv": sizes, "kv": ("i", "j")}
    assert axes["kv"] == lj.Axes((), (2,), (0, 1, 3))
    params = randomized(lj.lorafy(base, 2, alpha=1, targets="*", axes=axes))
    lj.export_peft(tmp_path / "a", params, names)
    want = lj.lora(fn)(params, x)
    got = run(loaded(module, tmp_path / "a"), x)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)
    back = lj.import_peft(tmp_path / "a", base, names, axes=axes)
    np.testing.assert_array_equal(lj.lora(fn)(back, x), want)
    # PEFT's adapters of the parts are separate, also after import and export.
    config = dict(r=2, target_modules=["q", "v", "i", "j"], alpha_pattern={"v": 3})
    adapted = peft_saved(module, tmp_path / "b", rank_pattern={"v": 1}, **config)
    params = lj.import_peft(tmp_path / "b", base, names, axes=axes)
    np.testing.assert_allclose(lj.lora(fn)(params, x), run(adapted, x), atol=2e-5)
    lj.export_peft(tmp_path / "c", params, names)
    again = loaded(module, tmp_path / "c")
    np.testing.assert_allclose(run(again, x), run(adapted, x), atol=2e-5)
    ranks = {
        n: m.r["default"]
        for n, m in again.base_model.model.named_children()
        if hasattr(m, "r")
    }
    assert ranks == {"q": 2, "v": 1, "i": 2, "j": 2}


def test_import_peft_after_the_same_step_of_training(
    tmp_path, randomized, optax_promotion
):
    model, base, module = flax_and_torch(scanned=True)
    ids, images = inputs()
    targets = ["table", "query", "value", "score"]
    axes = lj.find_axes(
        lambda p, *args: model.apply({"params": p}, *args), base, ids, images
    )
    params = lj.lorafy(base, 2, alpha=0.5, targets=targets, axes=axes)
    params = randomized(params)
    lj.export_peft(tmp_path / "start", params, SCANNED)
    settings: dict[str, Any] = dict(b1=0.8, b2=0.9, eps=1e-3)
    tx = lj.adapters_only(optax.adamw(1e-2, weight_decay=0.1, **settings))

    def loss(params):
        return jnp.mean(lj.lora(model.apply)({"params": params}, ids, images) ** 2)

    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
    want = optax.apply_updates(params, updates)
    adapted = peft.PeftModel.from_pretrained(
        module, tmp_path / "start", is_trainable=True
    )
    trained = [x for x in adapted.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, 1e-2, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1
    )
    args = torch.tensor(ids), torch.tensor(images.transpose(0, 3, 1, 2))
    adapted(*args).square().mean().backward()
    optimizer.step()
    adapted.save_pretrained(tmp_path / "end")
    got = lj.import_peft(tmp_path / "end", base, SCANNED, axes=axes)
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
    first, last = params["table"]["lora_a"], got["table"]["lora_a"]
    assert np.abs(first - last).max() > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_export_peft_for_all_is_loaded_by_peft(tmp_path, randomized):
    """One rank, one alpha, and zeros for what has no adapter, on PEFT itself."""
    config = MODELS["LlamaForCausalLM"]
    model = transformers.FlaxLlamaForCausalLM(config)
    module = from_flax("LlamaForCausalLM", model.params)
    fn = lambda params, ids: model(ids, params=params).logits
    ranks = {"q_proj": 2, "mlp": 3, "*": 1}
    axes = lj.find_axes(fn, model.params, np.ones((1, 4), int))
    alphas, exclude = {"mlp": 0.7, "*": 3}, ["v_proj", "gate_proj"]
    options = dict(alpha=alphas, axes=axes, exclude=exclude)
    params = randomized(lj.lorafy(model.params, ranks, **options))
    names = lj.transformers_names(params)
    every = ("vllm", "sglang", "llama.cpp")
    lj.export_peft(tmp_path, params, names, for_=every, base_model="llama")
    patterns = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not patterns["rank_pattern"] and not patterns["alpha_pattern"]
    ids = np.random.default_rng(0).integers(0, 17, (2, 6))
    got, want = run(loaded(module, tmp_path), ids), lj.lora(fn)(params, ids)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=2e-5)
    back = lj.import_peft(tmp_path, model.params, names, axes=axes)
    np.testing.assert_allclose(lj.lora(fn)(back, ids), want, atol=2e-5, rtol=2e-5)
