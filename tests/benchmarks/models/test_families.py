"""Each family computes exactly what transformers computes from the same folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import folder

pytestmark = pytest.mark.usefixtures("third_party")

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
GEMMA = dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=5)
# transformers' class, and its settings. Texts of 40 tokens are longer than all windows.
FAMILIES = {
    "llama2": ("Llama", dict(num_key_value_heads=4)),
    "llama3": ("Llama", dict(rope_theta=5e5, attention_bias=True, mlp_bias=True)),
    "llama3.1": ("Llama", dict(rope_theta=5e5, rope_scaling=LLAMA3)),
    "llama3.2": (
        "Llama",
        dict(rope_scaling=LLAMA3, head_dim=16, tie_word_embeddings=True),
    ),
    "linear": ("Llama", dict(rope_scaling=dict(rope_type="linear", factor=4.0))),
    "mistral": ("Mistral", dict(sliding_window=6)),
    "mistral_full": ("Mistral", dict(sliding_window=None, head_dim=16)),
    "qwen2": ("Qwen2", dict(rope_theta=1e6)),
    "qwen2_local": (
        "Qwen2",
        dict(use_sliding_window=True, sliding_window=7, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "gemma2": (
        "Gemma2",
        GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "gemma3": ("Gemma3Text", GEMMA | dict(num_hidden_layers=7)),
    "gemma3_scaled": (
        "Gemma3Text",
        GEMMA
        | dict(
            rope_scaling=dict(rope_type="linear", factor=8.0),
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "smollm2": ("Llama", dict(tie_word_embeddings=True, rope_theta=1e5)),
}
IDS = np.random.default_rng(1).integers(1, 96, (2, 40))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns a function that saves a random model, and returns its folder and logits.

    Parameters are large enough that all of them matter, norms and biases too.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    made = {}

    def save(name):
        if name in made:
            return made[name]
        kind, settings = FAMILIES[name]
        torch.manual_seed(0)
        settings = SIZES | dict(num_hidden_layers=3) | settings
        config = getattr(transformers, f"{kind}Config")(**settings)
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager"
        )
        with torch.no_grad():
            for p in model.parameters():
                wide = 0.4 / np.sqrt(p.shape[-1]) if p.ndim > 1 else 0.1
                p.copy_(wide * 3 * torch.randn(p.shape) + (p.ndim == 1))
        path = tmp_path_factory.mktemp(name)
        model.eval().save_pretrained(path)
        made[name] = path, torch_logits(model, IDS)
        return made[name]

    return save


def torch_logits(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids)).logits.float().numpy()


def load(path, **options):
    return folder.load(path, dtype=jnp.float32, **options)


def apply(model):
    return lambda params, ids, **more: model.apply({"params": params}, ids, **more)


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_load_gives_the_logits_of_transformers(saved, name, scanned):
    path, want = saved(name)
    model, params = load(path, scanned=scanned)
    got = jax.jit(apply(model))(params, IDS)
    assert got.dtype == jnp.float32
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(got, want, atol=1e-4)
