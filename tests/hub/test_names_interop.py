"""Names found in the folder of a checkpoint: PEFT loads every adapter by them.

Needs torch, peft and transformers, of version 4 or 5. The folders are those whose
tensors have other names than the modules, or fewer: tied, without a prefix, renamed.
"""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from models import architectures
from models.folder import names as module_names

import lora_jax as lj

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("third_party", "one_thread")

IDS = np.array([[3, 7, 1, 2, 9], [4, 4, 8, 0, 5]])
LAYERS, RANK, ALPHA = 2, 2, 3.0
TOKENS = dict(vocab_size=30, bos_token_id=0, eos_token_id=0)
SIZES = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
    **TOKENS,
)
VISION = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
BLOCK = "transformer.h.{layer}"
LLAVA = "model.language_model.layers.{layer}"

# The class, its config, the loader, the start that the hub's tensors lack, and the
# modules that the leaves of a tree of ours are.
MODELS = {
    "gpt-2": (
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            n_embd=16, n_layer=LAYERS, n_head=4, n_positions=8, **TOKENS
        ),
        "CausalLM",
        "transformer.",
        {
            "tokens/embedding": ("transformer.wte", "lm_head"),
            "positions/embedding": "transformer.wpe",
            "blocks/qkv/kernel": f"{BLOCK}.attn.c_attn",
            "blocks/out/kernel": f"{BLOCK}.attn.c_proj",
            "blocks/up/kernel": f"{BLOCK}.mlp.c_fc",
            "blocks/down/kernel": f"{BLOCK}.mlp.c_proj",
        },
    ),
    "bloom": (
        "BloomForCausalLM",
        lambda: transformers.BloomConfig(
            hidden_size=16, n_layer=LAYERS, n_head=4, **TOKENS
        ),
        "CausalLM",
        "transformer.",
        {
            "tokens/embedding": ("transformer.word_embeddings", "lm_head"),
            "blocks/qkv/kernel": f"{BLOCK}.self_attention.query_key_value",
            "blocks/out/kernel": f"{BLOCK}.self_attention.dense",
            "blocks/up/kernel": f"{BLOCK}.mlp.dense_h_to_4h",
            "blocks/down/kernel": f"{BLOCK}.mlp.dense_4h_to_h",
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        lambda: transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**SIZES),
            vision_config=transformers.CLIPVisionConfig(**VISION),
            image_token_index=29,
        ),
        "ImageTextToText",
        "",
        {
            "tokens/embedding": "model.language_model.embed_tokens",
            "head/kernel": "lm_head",
            "blocks/query/kernel": f"{LLAVA}.self_attn.q_proj",
            "blocks/down/kernel": f"{LLAVA}.mlp.down_proj",
        },
    ),
}


def saved(cls, config, folder, lacks=""):
    """Writes a random model without a start of names; returns the tensors written."""
    torch.manual_seed(0)
    getattr(transformers, cls)(config).save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    assert any(name.startswith(lacks) for name in tensors)
    tensors = {name.removeprefix(lacks): x for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    return tensors


def loaded(folder, kind="CausalLM"):
    """The model that transformers makes of the folder, with all of its tensors."""
    auto = getattr(transformers, f"AutoModelFor{kind}")
    model, about = auto.from_pretrained(folder, output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"]
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.numpy()


def tree_of(model, names):
    """The weights as leaves of ours: (in, out), and a stack of the layers."""
    modules = dict(model.named_modules())
    leaves = {}
    for path, name in names.items():
        each = [modules[n].weight.detach().numpy() for n in each_layer(name)]
        if path.endswith("kernel") and not has_input_rows(name):
            each = [w.T for w in each]
        leaves[path] = jnp.asarray(np.stack(each) if "{layer}" in name else each[0])
    return unflatten_dict(leaves, "/")


def each_layer(name):
    """The modules of a leaf, without the tied head, which has the same weight."""
    name = name if isinstance(name, str) else name[0]
    return [name.format(layer=i) for i in range(LAYERS if "{layer}" in name else 1)]


def has_input_rows(name):
    return ".c_" in name


def merged(model, params, names):
    """The model with weights to which NumPy adds the updates; the tied head's too."""
    model, leaves = copy.deepcopy(model), flatten_dict(params, sep="/")
    modules = dict(model.named_modules())
    for path, name in names.items():
        start = path.rpartition("/")[0]
        a, b = (np.asarray(leaves[f"{start}/lora_{n}"]) for n in "ab")
        updates = (ALPHA / RANK * (a @ b)).reshape(-1, a.shape[-2], b.shape[-1])
        for module, update in zip(each_layer(name), updates, strict=True):
            if path.endswith("kernel") and not has_input_rows(name):
                update = update.T
            w = modules[module].weight
            w.data = torch.tensor(w.detach().numpy() + update)
    return model


def adapted_by_peft(model, folder):
    """PEFT's model, which must have loaded every tensor of the file and no other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", UserWarning)  # as about missing keys
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        # PEFT warns that the adapters of a tied pair would be trained apart.
        warnings.filterwarnings("ignore", "(?s).*tie_word_embeddings")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    assert state.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(state[name].numpy(), x)
    return model


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", MODELS)
def test_find_names_of_a_folder_gives_peft_every_adapter(tmp_path, randomized, kind):
    """The logits are those of the model whose weights NumPy has merged."""
    cls, config, auto, lacks, want = MODELS[kind]
    source, folder = tmp_path / "base", tmp_path / "adapter"
    tensors = saved(cls, config(), source, lacks)
    modules = [module for name in want.values() for module in each_layer(name)]
    assert not any(f"{module}.weight" in tensors for module in modules)
    model = loaded(source, auto)
    params = tree_of(model, want)
    names = lj.find_names(params, source)
    assert names == want
    # The layout of a square kernel of GPT-2's cannot be seen.
    axes = {
        path: lj.Axes((0,), (1,), (2,)) for path in want if path.startswith("blocks")
    }
    params = lj.lorafy(params, RANK, alpha=ALPHA, targets="*", axes=axes)
    params = randomized(params)
    lj.export_peft(folder, params, names, axes=axes, fan_in_fan_out=kind == "gpt-2")
    got = logits(adapted_by_peft(model, folder))
    np.testing.assert_allclose(got, logits(merged(model, params, want)), atol=1e-4)
    assert np.abs(got - logits(model)).max() > 0.1
    back = lj.import_peft(folder, lj.strip(params), names, axes=axes)
    assert_equal(back, params)


@pytest.mark.parametrize("scanned", [True, False])
def test_find_names_of_a_tied_llama_gives_peft_every_adapter(
    tmp_path, randomized, scanned
):
    """Flax's transformer of the benchmarks, PEFT's model and the merged one agree."""
    source, folder = tmp_path / "base", tmp_path / "adapter"
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    saved("LlamaForCausalLM", config, source)
    model = loaded(source)
    arch = architectures.Architecture(
        LAYERS, 16, 4, 24, 30, kv_heads=2, epsilon=config.rms_norm_eps
    )
    flax = architectures.Model(
        arch, scanned=scanned, dtype=jnp.float32, param_dtype=jnp.float32
    )
    like = jax.eval_shape(flax.init, jax.random.key(0), IDS)
    by_hand = module_names(arch, scanned=scanned)
    params = lj.import_weights(source, like, by_hand)
    names = lj.find_names(params, source)
    assert names["tokens/embedding"] == ("model.embed_tokens", "lm_head")
    axes = lj.find_axes(flax.apply, params, IDS)
    params = lj.lorafy(params, RANK, alpha=ALPHA, targets="*", axes=axes)
    params = randomized(params)
    lj.export_peft(folder, params, names)
    got = logits(adapted_by_peft(model, folder))
    fn = jax.jit(lj.lora(flax.apply))
    np.testing.assert_allclose(fn(params, IDS), got, atol=1e-4)
    lj.export_weights(tmp_path / "merged", params, names, source, axes=axes)
    np.testing.assert_allclose(logits(loaded(tmp_path / "merged")), got, atol=1e-4)
    assert np.abs(got - logits(model)).max() > 0.1
    for each in (names, by_hand):
        assert_equal(lj.import_peft(folder, lj.strip(params), each, axes=axes), params)
