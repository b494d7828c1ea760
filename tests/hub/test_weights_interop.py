"""Checkpoints of transformers into JAX and out again, and of bitsandbytes.

Needs torch and transformers; bitsandbytes for its 4-bit files.
"""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from models import architectures
from models.folder import names as module_names

import lora_jax as lj

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("third_party", "one_thread")

SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
MODELS = {
    "llama": ("Llama", SIZES),
    "llama, scaled rope": ("Llama", SIZES | {"rope_scaling": ROPE}),
    "llama, tied": ("Llama", SIZES | {"tie_word_embeddings": True}),
    "mistral": ("Mistral", SIZES),
    "qwen 2": ("Qwen2", SIZES),
    "qwen 3": ("Qwen3", SIZES | {"head_dim": 16}),
    "gemma 3": ("Gemma3", SIZES | {"head_dim": 16}),
    "qwen 3 moe": ("Qwen3Moe", SIZES | EXPERTS | {"head_dim": 16}),
    "gpt-2": ("GPT2", dict(vocab_size=96, n_embd=64, n_layer=2, n_head=4)),
    "bert": ("Bert", SIZES),
}


def torch_model(kind, dtype=None):
    name, fields = MODELS[kind]
    if name == "Bert":
        config = transformers.BertConfig(**fields)
        cls = transformers.BertForMaskedLM
    elif name == "GPT2":
        config, cls = transformers.GPT2Config(**fields), transformers.GPT2LMHeadModel
    else:
        end = "TextConfig" if name == "Gemma3" else "Config"
        config = getattr(transformers, f"{name}{end}")(**fields)
        cls = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for (
            x
        ) in model.parameters():  # norms of one and biases of zero would hide errors
            x.copy_(0.1 * torch.randn(x.shape) + (x.dim() == 1))
    return model if dtype is None else model.to(dtype)


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids))).logits.float().numpy()


def tree_of(folder):
    """An abstract tree with a leaf for each tensor, and its map."""
    like, names = {}, {}
    for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
        for name, x in safetensors.numpy.load_file(file).items():
            module, _, last = name.rpartition(".")
            is_table = bool(re.search(r"embed|wte|wpe", name)) and x.ndim == 2
            leaf, shape = last, x.shape
            if x.ndim == 2:
                leaf = "embedding" if is_table else "kernel"
                in_order = is_table or module.split(".")[-1].startswith("c_")
                shape = shape if in_order else shape[::-1]
            like.setdefault(module, {})[leaf] = jax.ShapeDtypeStruct(shape, jnp.float32)
            names[f"{module}/{leaf}"] = name
    return like, names


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_weights_is_loaded_by_transformers(tmp_path, randomized, kind, dtype):
    """Logits of the exported checkpoint equal those with weights summed by NumPy."""
    model = torch_model(kind, getattr(torch, dtype))
    folder, out = tmp_path / "base", tmp_path / "out"
    model.save_pretrained(folder, max_shard_size="60KB")
    like, names = tree_of(folder)
    params = lj.import_weights(folder, like, names)
    # Every second kernel, in float32 here whatever the file has.
    targets = [n for n in names if n.endswith("kernel")][::2]
    params = randomized(lj.lorafy(params, 2, targets=targets))
    lj.export_weights(out, params, names, folder, dtype=jnp.float32, shard_bytes=50_000)
    new = type(model).from_pretrained(out, dtype=torch.float32).eval()

    stored = {
        name: x
        for file in folder.glob("*.safetensors")
        for name, x in safetensors.numpy.load_file(file).items()
    }
    for target in targets:
        leaves = params[target.rpartition("/")[0]]
        a, b, s = (np.asarray(leaves[f"lora_{n}"]) for n in ("a", "b", "scale"))
        update = s * (a @ b)
        name = names[target]
        conv1d = name.split(".")[-2].startswith("c_")
        stored[name] = stored[name].astype("f") + (update if conv1d else update.T)
    (tmp_path / "want").mkdir()
    want = load(model, stored, tmp_path / "want")
    ids = np.arange(12).reshape(2, 6)
    np.testing.assert_allclose(logits(new, ids), logits(want, ids), atol=1e-4)
    assert abs(logits(new, ids) - logits(model.float(), ids)).max() > 1e-2


def load(model, tensors, folder):
    """Returns the model that from_pretrained makes of tensors in float32."""
    arrays = {name: np.asarray(x, np.float32) for name, x in tensors.items()}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(folder)
    found, info = type(model).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    return found.eval()


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("kind", ["llama", "llama, tied"])
def test_import_weights_gives_the_logits_of_transformers(
    tmp_path, randomized, kind, scanned
):
    """Into Flax's transformer of the benchmarks, adapted, and out again."""
    model = torch_model(kind)
    model.save_pretrained(tmp_path / "base", max_shard_size="80KB")
    tied = model.config.tie_word_embeddings
    arch = architectures.Architecture(
        2, 64, 4, 128, 96, kv_heads=2, tied=tied, epsilon=model.config.rms_norm_eps
    )
    flax = architectures.Model(
        arch, scanned=scanned, dtype=jnp.float32, param_dtype=jnp.float32
    )
    ids = np.arange(12).reshape(2, 6)
    like = jax.eval_shape(flax.init, jax.random.key(0), ids)
    names = module_names(arch, scanned=scanned)
    base = tmp_path / "base"
    params = lj.import_weights(base, like, names)
    np.testing.assert_allclose(flax.apply(params, ids), logits(model, ids), atol=1e-4)
    axes = lj.find_axes(flax.apply, like, ids)
    params = randomized(lj.lorafy(params, 2, axes=axes, targets="*/kernel"))
    got = jax.jit(lj.lora(flax.apply))(params, ids)
    lj.export_weights(tmp_path / "out", params, names, base, axes=axes)
    new = type(model).from_pretrained(tmp_path / "out").eval()
    np.testing.assert_allclose(got, logits(new, ids), atol=1e-4)
    assert abs(logits(new, ids) - logits(model, ids)).max() > 1e-2


def test_import_weights_of_llava_by_either_names(tmp_path):
    """The checkpoint of a LLaVA renames the modules of its language model."""
    text = transformers.LlamaConfig(**SIZES)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    module = "model.language_model.layers.{layer}.self_attn.q_proj"
    want = np.stack(
        [
            x.self_attn.q_proj.weight.detach().numpy().T
            for x in model.model.language_model.layers
        ]
    )
    like = {"q": {"kernel": jax.ShapeDtypeStruct(want.shape, jnp.float32)}}
    got = lj.import_weights(tmp_path, like, {"q": module}, ignore="*")
    np.testing.assert_array_equal(got["q"]["kernel"], want)
    found = lj.find_names(got, tmp_path)
    assert found == {"q/kernel": module}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_import_weights_keeps_the_bits_of_bitsandbytes(tmp_path, double, dtype):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes import functional

    torch_model("llama", getattr(torch, dtype)).save_pretrained(tmp_path / "base")
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        dtype=getattr(torch, dtype),
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        ),
        device_map="cpu",
    )
    quantized.save_pretrained(tmp_path / "nf4")
    layer = lambda i: quantized.model.layers[i].self_attn.q_proj.weight
    want = [
        functional.dequantize_4bit(w.data, w.quant_state) for w in map(layer, (0, 1))
    ]
    want = np.stack([w.float().numpy().T for w in want])
    name = "model.layers.{layer}.self_attn.q_proj"
    for shape in ((2, 64, 64), (2, 64, 4, 16)):
        like = {"q": {"kernel": jax.ShapeDtypeStruct(shape, dtype)}}
        got = lj.import_weights(
            tmp_path / "nf4", like, {"q": name}, ignore="*", how={"q": "int8"}
        )
        w = got["q"]["kernel"]
        assert (w.format, w.dtype) == ("nf4", jnp.dtype(dtype))
        plain = np.asarray(lj.dequantize(got)["q"]["kernel"], np.float32)
        np.testing.assert_array_equal(plain, want.reshape(shape))
    assert "quantization_config" in json.loads(
        (tmp_path / "nf4" / "config.json").read_text()
    )
    assert lj.find_names(got, tmp_path / "nf4") == {"q/kernel": name}
    # Merged, it is written as floats.
    axes = {"q/kernel": lj.Axes((0,), (1,), (2, 3))}
    params = lj.lorafy(got, 2, axes=axes)
    lj.export_weights(
        tmp_path / "out", params, {"q": name}, tmp_path / "nf4", axes=axes
    )
    new = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = np.arange(6)[None]
    np.testing.assert_allclose(
        logits(new, ids),
        logits(quantized, ids),
        atol=3e-2 if dtype != "float32" else 1e-4,
    )


def test_weights_of_a_state_dict_keep_their_dtypes(tmp_path):
    """PyTorch's own tensors: bfloat16, which NumPy lacks, and whole numbers."""
    tensors = {
        "up.weight": torch.randn(3, 4).to(torch.bfloat16).t().contiguous().t(),
        "steps": torch.tensor([2**40 + 1]),
        "wide": torch.tensor(0.1, dtype=torch.float64),
    }
    target = {"up": {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.bfloat16)}}
    names, ignore = {"up": "up"}, ["steps", "wide"]
    params = lj.import_weights(tensors, target, names, ignore=ignore)
    kernel = np.asarray(params["up"]["kernel"], np.float32)
    np.testing.assert_array_equal(kernel, tensors["up.weight"].float().numpy().T)
    params = lj.lorafy(params, rank=1)
    lj.export_weights(tmp_path / "out", params, names, tensors)
    from safetensors.torch import load_file

    new = load_file(tmp_path / "out" / "model.safetensors")
    for name, x in tensors.items():
        assert new[name].dtype == x.dtype and torch.equal(new[name], x)
    narrow = {"up.weight": torch.zeros(3, 4).to(torch.float8_e4m3fn)}
    with pytest.raises(ValueError, match=r"'up.weight' in float8_e4m3fn"):
        lj.import_weights(narrow, target, names)
