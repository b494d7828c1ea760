"""Each family computes exactly what transformers computes from the same folder."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from jax.sharding import Mesh
from models import folder

import lora_jax as lj

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


@pytest.mark.parametrize("name", ["gemma3_scaled"])
def test_training_on_a_mesh_gives_the_steps_of_one_device(saved, name):
    """Eight devices share the weights and the batch."""
    path, _ = saved(name)
    mesh = Mesh(np.array(jax.devices()), "devices")
    rows = np.random.default_rng(0).integers(1, 96, (8, 17))
    found = []
    for sharding in (None, mesh):
        model, params = load(path, sharding=sharding)
        if sharding is not None:
            kernel = params["blocks"]["mlp"]["up"]["kernel"]
            assert kernel.sharding.shard_shape(kernel.shape) == (3, 32, 6)
        found.append(train(model, adapted(model, params), rows))
    (losses, one), (sharded, other) = found
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(sharded, losses, rtol=1e-4)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


def test_load_quantizes_on_the_way(saved):
    path, _ = saved("llama3.2")
    mesh = Mesh(np.array(jax.devices()), "devices")
    for sharding in (None, mesh):
        model, params = load(path, how="nf4", table="int8", sharding=sharding)
        kernel = params["blocks"]["mlp"]["up"]["kernel"]
        assert (kernel.format, params["tokens"]["embedding"].format) == ("nf4", "int8")
    assert not kernel.values.sharding.is_fully_replicated
    rows = np.random.default_rng(0).integers(1, 96, (8, 17))
    losses, _ = train(model, adapted(model, params), rows)
    assert losses[-1] < losses[0]


def adapted(model, params):
    """Returns the parameters with adapters at all kernels of the layers."""
    ids = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    axes = lj.find_axes(apply(model), folder.shapes(model), ids)
    return lj.lorafy(params, 2, targets=["blocks*/*/kernel"], axes=axes)


def train(model, params, rows, steps=3):
    """Returns the losses of a few steps, and the adapters after them."""
    fn = lj.lora(apply(model))
    run = lambda adapters, base, ids: fn(lj.combine(adapters, base), ids)
    tx = optax.sgd(0.5)
    adapters, base = lj.split(params)
    step = jax.jit(training.step(run, tx))
    state, losses = (adapters, tx.init(adapters)), []
    for _ in range(steps):
        state, loss = step(state, base, rows[:, :-1], rows[:, 1:])
        losses.append(float(loss))
    return losses, state[0]


@pytest.mark.filterwarnings("ignore")  # from PEFT
@pytest.mark.parametrize("name", ["qwen2", "gemma3_scaled"])
def test_peft_loads_the_exported_adapter(saved, randomized, tmp_path, name):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    import transformers

    path, plain = saved(name)
    model, params = load(path)
    axes = lj.find_axes(apply(model), params, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    params = randomized(adapted(model, params))
    got = jax.jit(lj.lora(apply(model)))(params, IDS)
    names = folder.names(model.arch)
    lj.export_peft(tmp_path, params, names, task_type="CAUSAL_LM")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    want = torch_logits(peft.PeftModel.from_pretrained(base, tmp_path).eval(), IDS)
    assert np.abs(want - plain).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4)
    back = lj.import_peft(tmp_path, lj.strip(params), names, axes=axes)
    assert jax.tree.structure(back) == jax.tree.structure(params)


def test_merged_weights_load_as_a_folder_again(saved, randomized, tmp_path):
    path, _ = saved("gemma2")
    model, params = load(path, scanned=False)
    params = randomized(adapted(model, params))
    names = folder.names(model.arch, scanned=False)
    lj.export_weights(tmp_path / "merged", params, names, path)
    merged, new = load(tmp_path / "merged")
    got = jax.jit(apply(merged))(new, IDS)
    want = jax.jit(lj.lora(apply(model)))(params, IDS)
    # Of the largest logits, 2.6: the norms make rounding in the merged weights larger.
    np.testing.assert_allclose(got, want, atol=5e-4)
