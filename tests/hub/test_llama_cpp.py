"""Merged checkpoints and PEFT folders in llama.cpp: its converters and its inference.

Needs torch, transformers, xllamacpp and sentencepiece, and in the environment variable
LLAMA_CPP a folder with llama.cpp's converters. The source distribution of
llama-cpp-python has them; `.ci/run hub` shows how to get it.
"""

import os
import pathlib
import runpy
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import architectures
from models.folder import names as module_names

import lora_jax as lj

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
xllamacpp = pytest.importorskip("xllamacpp")
SOURCES = os.environ.get("LLAMA_CPP")

pytestmark = [
    pytest.mark.skipif(SOURCES is None, reason="set LLAMA_CPP to llama.cpp's sources"),
    pytest.mark.usefixtures("third_party", "one_thread"),
]
VOCAB = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(93))]
IDS = [5, 60, 7, 91, 3, 20]


def save_model(folder, tied):
    """Writes a random Llama and its tokenizer, and returns its architecture in Flax."""
    config = transformers.LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for x in model.parameters():  # norms of one would hide errors
            x.copy_(0.1 * torch.randn(x.shape) + (x.dim() == 1))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return architectures.Architecture(
        *(2, 64, 4, 128, len(VOCAB)),
        kv_heads=2,
        tied=tied,
        epsilon=config.rms_norm_eps,
    )


def save_tokenizer(folder):
    """Writes a tokenizer of whole words, in Llama 2's form.

    The converter knows the tokenizers of published models by a hash of what they make
    of one text, except those in this form. llama.cpp drops an answer that ends within
    a character, as tokens for single bytes would.
    """
    ids = {token: i for i, token in enumerate(VOCAB)}
    bpe = tokenizers.models.BPE(ids, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Fuse()])
    tokenizer.add_special_tokens(VOCAB[:3])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


@pytest.fixture
def converted(monkeypatch):
    """Returns a function that runs a converter of llama.cpp in this process.

    Each of them imports torch and transformers, which takes longer than the rest.
    """

    def convert(script, source, *options):
        to = pathlib.Path(f"{source}.gguf")
        arguments = (source, "--outtype", "f32", "--outfile", to, *options)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.syspath_prepend(SOURCES)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_path(os.path.join(SOURCES, script), run_name="__main__")
        return to

    return convert


def llama_cpp(model, adapter=None):
    """Returns llama.cpp's log-probabilities (time, vocabulary) after each token."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    params.n_ctx, params.n_parallel = 64, 1
    params.warmup = params.fit_params = False
    params.verbosity = -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # By default keys and values are cached in float16.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    disabled = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.flash_attn_type = disabled
    server = xllamacpp.Server(params)
    found = np.full((len(IDS), len(VOCAB)), np.nan)
    for i in range(len(IDS)):
        request = dict(prompt=IDS[: i + 1], max_tokens=1, logprobs=len(VOCAB))
        # The end of a text has no log-probabilities.
        answer = server.handle_completions(request | dict(ignore_eos=True))
        (token,) = answer["choices"][0]["logprobs"]["content"]
        for each in token["top_logprobs"]:
            found[i, each["id"]] = each["logprob"]
    return found


@pytest.fixture
def adapted(tmp_path, randomized):
    """Returns a function that makes an adapted Llama, of a checkpoint in "base".

    It returns the parameters, the map of names, and the log-probabilities of the base
    and of the adapted model.
    """

    def adapt(tied, rank, **options):
        arch = save_model(tmp_path / "base", tied)
        model = architectures.Model(arch, dtype=jnp.float32, param_dtype=jnp.float32)
        ids = jnp.asarray([IDS])
        like = jax.eval_shape(model.init, jax.random.key(0), ids)
        names = module_names(arch)
        base = lj.import_weights(tmp_path / "base", like, names)
        axes = lj.find_axes(model.apply, like, ids)
        params = randomized(lj.lorafy(base, rank, axes=axes, **options))
        plain, changed = (
            jax.nn.log_softmax(jax.jit(fn)(tree, ids)[0])
            for fn, tree in ((model.apply, base), (lj.lora(model.apply), params))
        )
        return params, names, axes, plain, changed

    return adapt


def assert_equal(got, want, other):
    """Asserts equal log-probabilities, and clearly others than those of another model.

    Both programs compute in float32, so that only the order of sums differs. Where this
    was tested, values down to -8 differed by less than 6e-6.
    """
    np.testing.assert_allclose(got, want, atol=5e-5)
    assert np.abs(got - other).max() > 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_export_weights_is_run_by_llama_cpp(tmp_path, adapted, converted, tied):
    """Kernels, table and head have adapters; a norm is trained in full."""
    options = dict(targets="*", alpha=0.5, also="params/norm")
    params, names, axes, base, want = adapted(tied, 2, **options)
    out = tmp_path / "out"
    lj.export_weights(out, params, names, tmp_path / "base", axes=axes)
    got = llama_cpp(converted("convert_hf_to_gguf.py", out))
    assert_equal(got, want, base)


RANKS = {"attention": 2, "mlp": 3, "tokens": 4, "head": 5}
# Whether the model is tied, the ranks, the options of `lorafy` and of `export_peft`.
ADAPTERS = {
    "one rank": (True, 2, dict(targets="*/kernel", alpha=0.5), {}),
    # llama.cpp divides the one alpha of the config by the rank of each module.
    "mixed ranks, one alpha": (False, RANKS, dict(alpha=0.5), {}),
    # It ignores `alpha_pattern`.
    "mixed ranks and alphas": (
        *(False, RANKS, dict(alpha={"mlp": 1.0, "*": 0.3})),
        dict(for_="llama.cpp"),
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_export_peft_is_run_by_llama_cpp(tmp_path, adapted, converted, kind):
    tied, ranks, options, export = ADAPTERS[kind]
    params, names, axes, base, want = adapted(tied, ranks, **options)
    lj.export_peft(tmp_path / "adapter", params, names, axes=axes, **export)
    model = converted("convert_hf_to_gguf.py", tmp_path / "base")
    of_base = "--base", tmp_path / "base"
    adapter = converted("convert_lora_to_gguf.py", tmp_path / "adapter", *of_base)
    assert_equal(llama_cpp(model), base, want)
    assert_equal(llama_cpp(model, adapter), want, base)
