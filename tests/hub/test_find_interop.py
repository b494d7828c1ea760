"""find_names on models from the converters of other libraries, to PEFT and back.

Needs the extra `peers`: torch, peft and transformers. Each PyTorch model is random and
saved as safetensors, loaded by the other library, adapted at random here, and compared
with PEFT on torch.
"""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from models import folder, smollm2

import lora_jax as lj

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("third_party", "one_thread")
IDS = np.array([[3, 7, 1, 2, 9], [4, 4, 8, 0, 5]])
SIZES = dict(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
# Flax makes a mask of all positions: with Mistral's own number it has 17 GB.
LLAMA = SIZES | dict(
    intermediate_size=24, num_key_value_heads=2, max_position_embeddings=16
)
QWEN = LLAMA | dict(head_dim=4)


def saved(name, config, folder):
    """A random PyTorch model, and its folder of safetensors."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{config}Config")(**name[1])
    module = getattr(transformers, name[0])(config).eval()
    module.save_pretrained(folder, safe_serialization=True)
    return module


def logits(module, folder=None):
    """PyTorch's logits, with an adapter that PEFT loads from a folder or without."""
    if folder is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
            warnings.filterwarnings("ignore", "(?s).*tie_word_embeddings")
            module = copy.deepcopy(module)
            module = peft.PeftModel.from_pretrained(module, folder).eval()
    with torch.no_grad():
        return module(torch.tensor(IDS)).logits.numpy()


@pytest.fixture
def check(randomized):
    """Finds names, exports, compares with PEFT, imports, compares with the original."""

    def run(fn, params, module, source, folder, **given):
        export = {k: given.pop(k) for k in ("fan_in_fan_out",) if k in given}
        axes = lj.find_axes(fn, params)
        adapted = randomized(lj.lorafy(params, 2, alpha=3.0, axes=axes, **given))
        names = lj.find_names(adapted, source)
        lj.export_peft(folder, adapted, names, axes=axes, **export)
        np.testing.assert_allclose(fn(params), logits(module), atol=1e-4)
        got, want = np.asarray(jax.jit(lj.lora(fn))(adapted)), logits(module, folder)
        assert np.abs(want - logits(module)).max() > 0.01
        np.testing.assert_allclose(got, want, atol=1e-4)
        back = lj.import_peft(folder, lj.strip(adapted), names, axes=axes)
        np.testing.assert_allclose(jax.jit(lj.lora(fn))(back), got, atol=1e-5)
        return names

    return run


FLAX = {
    "Llama": ("LlamaForCausalLM", LLAMA),
    "Mistral": ("MistralForCausalLM", LLAMA),
    "Gemma": ("GemmaForCausalLM", LLAMA | dict(head_dim=4)),
    "GPT2": (
        "GPT2LMHeadModel",
        dict(vocab_size=30, n_embd=16, n_layer=2, n_head=4, n_positions=8),
    ),
    "Bert": ("BertForMaskedLM", SIZES | dict(intermediate_size=24)),
}


@pytest.mark.filterwarnings("ignore")  # from transformers
@pytest.mark.parametrize("family", FLAX)
def test_find_names_of_flax_models_of_transformers(family, tmp_path, check):
    name, sizes = FLAX[family]
    module = saved((name, sizes), family, tmp_path / "torch")
    flax = getattr(transformers, f"Flax{name}")
    model = flax.from_pretrained(tmp_path / "torch", from_pt=True)
    fn = jax.jit(lambda params: model(IDS, params=params).logits)
    given = {"fan_in_fan_out": True} if family == "GPT2" else {}
    names = check(fn, model.params, module, tmp_path / "torch", tmp_path / "a", **given)
    assert all("*" in pattern or "{" not in str(n) for pattern, n in names.items())


# Tunix reads Hugging Face's safetensors itself. Tested with google-tunix 0.1.7.

OURS = dict(num_layers=2, embed_dim=16, hidden_dim=24, num_heads=4, num_kv_heads=2)
# Its Llama 3 and Qwen 3 use this rotary base whatever the configuration has.
OURS |= dict(vocab_size=30, head_dim=4, rope_theta=1_000_000, norm_eps=1e-6)
THEIRS = QWEN | dict(rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=False)
MOE = dict(num_experts=4, num_experts_per_tok=2)
GEMMA = dict(num_layers=2, num_embed=30, embed_dim=16, hidden_dim=24, num_heads=4)
GEMMA |= dict(num_kv_heads=2, head_dim=4, sliding_window_size=8)
GEMMA |= dict(local_base_frequency=10_000, global_base_frequency=10_000)
TUNIX = {
    "llama3": ("Llama", "LlamaForCausalLM", THEIRS, OURS),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", THEIRS, OURS),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", THEIRS, OURS),
    "qwen3 moe": (
        "Qwen3Moe",
        "Qwen3MoeForCausalLM",
        THEIRS | MOE | dict(moe_intermediate_size=24, norm_topk_prob=True),
        OURS | MOE,
    ),
    "gemma3": (
        "Gemma3Text",
        "Gemma3ForCausalLM",
        THEIRS
        | dict(tie_word_embeddings=True, sliding_window=8, query_pre_attn_scalar=4)
        | dict(
            rope_theta=1e4,
            rope_local_base_freq=1e4,
            layer_types=["sliding_attention"] * 2,
        ),
        GEMMA,
    ),
}


@pytest.mark.filterwarnings("ignore")  # from tunix
@pytest.mark.parametrize("family", TUNIX)
def test_find_names_of_models_of_tunix(family, tmp_path, check):
    package = f"tunix.models.{family.split()[0]}"
    models = pytest.importorskip(f"{package}.model")
    end = "params_safetensors" if family == "gemma3" else "params"
    loader = pytest.importorskip(f"{package}.{end}")
    config, name, theirs, ours = TUNIX[family]
    module = saved((name, theirs), config, tmp_path / "torch")
    if family == "gemma3":
        ours = ours | dict(param_dtype=jnp.float32)
    model = loader.create_model_from_safe_tensors(
        str(tmp_path / "torch"), models.ModelConfig(**ours), dtype=jnp.float32
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    ids, n = jnp.asarray(IDS), IDS.shape[1]
    given = jnp.broadcast_to(jnp.arange(n), IDS.shape), None
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((n, n), bool)), (len(IDS), n, n))

    @jax.jit
    def fn(params):
        return nnx.merge(graph, params, rest)(ids, *given, mask)[0]

    names = check(
        fn, params, module, tmp_path / "torch", tmp_path / "a", targets="layers"
    )
    assert len(names) < 12, names


# Keras Hub converts folders of Hugging Face, too. Tested with keras-hub 0.32 on JAX.


def keras_model(source, backbone, monkeypatch):
    """The parameters of a backbone of Keras Hub, and its function of them."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    hub = pytest.importorskip("keras_hub")
    model = getattr(hub.models, backbone).from_preset(str(source))
    order = [tuple(v.path.split("/")) for v in model.trainable_variables]
    values = [v.value for v in model.trainable_variables]
    frozen = [v.value for v in model.non_trainable_variables]
    ids = {"token_ids": jnp.asarray(IDS), "padding_mask": jnp.ones(IDS.shape, int)}

    def states(params):
        flat = flatten_dict(params)
        return model.stateless_call([flat[p] for p in order], frozen, ids)[0]

    return unflatten_dict(dict(zip(order, values, strict=True))), states


@pytest.mark.filterwarnings("ignore")  # from Keras
def test_find_names_of_a_model_of_keras_hub(tmp_path, monkeypatch, check):
    sizes = LLAMA | dict(rms_norm_eps=1e-6, tie_word_embeddings=True)
    source = tmp_path / "torch"
    module = saved(("Qwen2ForCausalLM", sizes), "Qwen2", source)
    params, states = keras_model(source, "QwenBackbone", monkeypatch)

    @jax.jit
    def fn(params):
        return states(params) @ params["token_embedding"]["embeddings"].T

    check(fn, params, module, source, tmp_path / "a", targets="transformer_layer_*")


@pytest.mark.filterwarnings("ignore")
def test_find_names_refuses_parts_of_one_module(tmp_path, monkeypatch):
    """Keras Hub splits GPT-2's fused query, key and value."""
    name, sizes = FLAX["GPT2"]
    source = tmp_path / "torch"
    saved((name, sizes), "GPT2", source)
    params, _ = keras_model(source, "GPT2Backbone", monkeypatch)
    with pytest.raises(
        ValueError,
        match=r"it is the columns 0 to 16 of .*c_attn.*, which is one module",
    ):
        lj.find_names(params, source, targets="query")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # from transformers
def test_smollm2_in_its_gguf_and_in_the_folder_made_of_it(tmp_path, randomized):
    """The folder is written by transformers from the same GGUF."""
    base, out = tmp_path / "base", tmp_path / "out"
    smollm2.torch_model(None).save_pretrained(base, safe_serialization=True)
    model, params, _ = smollm2.load()
    names = folder.names(model.arch)
    got = lj.import_weights(base, jax.eval_shape(lambda: params), names)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(x, y)

    found = lj.find_names(params, base, targets=["blocks", "tokens"])
    for pattern, name in found.items():
        assert names[pattern.rpartition("/")[0]] == name
    assert len(found) == 8

    fn = lambda params, ids: model.apply({"params": params}, ids)
    ids = np.random.default_rng(0).integers(0, model.arch.vocab, (1, 12))
    axes = lj.find_axes(fn, params, ids)
    targets = ["blocks/attention", "tokens"]
    params = randomized(lj.lorafy(params, 4, targets=targets, axes=axes))
    got = jax.jit(lj.lora(fn))(params, ids)
    lj.export_weights(out, params, names, base, axes=axes)
    new = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        want = new(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(got, want, atol=1e-4 * abs(want).max())
    assert abs(got - jax.jit(fn)(lj.strip(params), ids)).max() > 0.1
