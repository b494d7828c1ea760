"""Checkpoints of transformers into Tunix's modules, and out again with adapters.

Needs torch, transformers and google-tunix. Tested with google-tunix 0.1.5 and 0.1.7.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tunix", reason="pip install google-tunix")

pytestmark = [
    pytest.mark.usefixtures("third_party", "one_thread"),
    pytest.mark.filterwarnings("ignore"),  # warnings of tunix
    # A warning of lora_jax is an error: no weight is materialized here.
    pytest.mark.filterwarnings("error:'.*' meets"),
]

OURS = dict(num_layers=2, embed_dim=16, hidden_dim=24, num_heads=4, num_kv_heads=2)
OURS |= dict(head_dim=4)
# Tunix's Llama 3 and Qwen 3 use this rotary base whatever the configuration has.
LLAMA = OURS | dict(vocab_size=30, rope_theta=1_000_000, norm_eps=1e-6)
GEMMA = OURS | dict(num_embed=30, sliding_window_size=3, param_dtype=jnp.float32)
GEMMA |= dict(local_base_frequency=10_000, global_base_frequency=10_000)
THEIRS = dict(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
THEIRS |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=4)
THEIRS |= dict(rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=16)
UNTIED, TIED = (THEIRS | dict(tie_word_embeddings=tied) for tied in (False, True))
THEIR_GEMMA = TIED | dict(sliding_window=3, query_pre_attn_scalar=4, rope_theta=1e4)
THEIR_GEMMA |= dict(rope_local_base_freq=1e4, layer_types=["sliding_attention"] * 2)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)

MLP = {"layers/*/mlp/*": "model.layers.{}.mlp.{}"}
MOE = {
    "layers/*/mlp/router": "model.layers.{}.mlp.gate",
    "layers/*/mlp/*": "model.layers.{}.mlp.experts.{expert}.{}",
}
OTHERS = {
    "layers/*/attn/*": "model.layers.{}.self_attn.{}",
    "layers/*/*": "model.layers.{}.{}",
    "final_norm": "model.norm",
}
HEAD = {"embedder": "model.embed_tokens", "lm_head": "lm_head"}
TIED_HEAD = {"embedder": ("model.embed_tokens", "lm_head")}
Q, K, V = (f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv")
GEMMA_NAMES = MLP | TIED_HEAD
GEMMA_NAMES |= {
    "layers/*/attn/attn_vec_einsum": "model.layers.{}.self_attn.o_proj",
    "layers/*/attn/_query_norm": "model.layers.{}.self_attn.q_norm",
    "layers/*/attn/_key_norm": "model.layers.{}.self_attn.k_norm",
    "layers/*/pre_attention_norm": "model.layers.{}.input_layernorm",
    "layers/*/post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "layers/*/*_ffw_norm": "model.layers.{}.{}_feedforward_layernorm",
    "final_norm": "model.norm",
}
# The module of Tunix, its class and config; the class and config of transformers; the
# map of names.
MODELS = {
    "llama": ("llama3.Llama3", LLAMA, "Llama", UNTIED, MLP | OTHERS | HEAD),
    "llama, tied": (
        *("llama3.Llama3", LLAMA | dict(weight_tying=True)),
        *("Llama", TIED, MLP | OTHERS | TIED_HEAD),
    ),
    "qwen 3": ("qwen3.Qwen3", LLAMA, "Qwen3", UNTIED, MLP | OTHERS | HEAD),
    "qwen 3, experts": (
        *("qwen3.Qwen3", LLAMA | EXPERTS, "Qwen3Moe"),
        UNTIED | EXPERTS | dict(moe_intermediate_size=24, norm_topk_prob=True),
        MOE | OTHERS | HEAD,
    ),
    "gemma 3": (
        *("gemma3.Gemma3", GEMMA, "Gemma3", THEIR_GEMMA),
        {"layers/*/attn/q_einsum": Q, "layers/*/attn/kv_einsum": (K, V)} | GEMMA_NAMES,
    ),
    "gemma 3, fused": (
        *("gemma3.Gemma3", GEMMA | dict(num_kv_heads=4), "Gemma3"),
        THEIR_GEMMA | dict(num_key_value_heads=4),
        {"layers/*/attn/qkv_einsum": (Q, K, V)} | GEMMA_NAMES,
    ),
}
KINDS = {"embedder": "embedding"}  # by its name, input_embedding is no table
IDS = np.array([[3, 7, 1, 2, 9], [4, 4, 8, 0, 5]])


def torch_model(name, fields):
    config = name + ("TextConfig" if name == "Gemma3" else "Config")
    torch.manual_seed(0)
    config = getattr(transformers, config)(**fields)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for x in model.parameters():  # norms of one would hide errors
            x.copy_(0.2 * torch.randn(x.shape) + (x.dim() == 1))
    return model


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def tunix_arguments():
    batch, n = IDS.shape
    positions = jnp.broadcast_to(jnp.arange(n), IDS.shape)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((n, n), bool)), (batch, n, n))
    return jnp.asarray(IDS), positions, None, causal


@nnx.jit
def tunix_logits(model):
    return model(*tunix_arguments())[0]


@pytest.mark.parametrize("kind", MODELS)
def test_import_and_export_weights_of_models_of_tunix(kind, tmp_path):
    path, ours, name, theirs, names = MODELS[kind]
    file, cls = path.split(".")
    base = torch_model(name, theirs)
    base.save_pretrained(tmp_path / "base")
    library = importlib.import_module(f"tunix.models.{file}.model")
    config = library.ModelConfig(**ours)
    abstract = nnx.eval_shape(lambda: getattr(library, cls)(config, rngs=nnx.Rngs(0)))
    # The weights of its einsums have inputs in any place: (heads, inputs, size).
    axes = lj.find_axes(abstract, *tunix_arguments())

    options = dict(axes=axes, kinds=KINDS)
    model = lj.import_weights(tmp_path / "base", abstract, names, **options)
    assert type(model) is getattr(library, cls)
    logits = torch_logits(base)
    np.testing.assert_allclose(tunix_logits(model), logits, atol=1e-4)

    # Every weight gets an adapter, the tables and the experts too.
    module = lj.LoRA(model, 2, targets="*", axes=axes)
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)
    nnx.update(module, jax.tree.map(draw, nnx.state(module, nnx.LoRAParam)))
    lj.export_weights(tmp_path / "out", module, names, tmp_path / "base", **options)
    new = type(base).from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(tunix_logits(module), torch_logits(new), atol=1e-4)
    assert np.abs(torch_logits(new) - logits).max() > 0.1
