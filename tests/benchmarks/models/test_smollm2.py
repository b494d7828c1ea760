"""A GGUF becomes exactly the published Llama; wrong files are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import folder, smollm2
from models.attention import rotate, speeds

import lora_jax as lj

pytestmark = pytest.mark.usefixtures("third_party")

# Modules of a block: the name here, and that after `blk.0.` in a GGUF.
LINEAR = {
    "attention/query": "attn_q",
    "attention/key": "attn_k",
    "attention/value": "attn_v",
    "attention/out": "attn_output",
    "mlp/gate": "ffn_gate",
    "mlp/up": "ffn_up",
    "mlp/down": "ffn_down",
}
NORMS = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"}


@pytest.fixture
def tiny(tiny_smollm2):
    return tiny_smollm2


@pytest.fixture
def path(tiny, tmp_path):
    """Returns the tiny model as a GGUF, its kernels quantized like SmolLM2's."""
    return tiny.write(tmp_path / "tiny.gguf")


def expected(tiny, kind, scanned):
    """Returns the parameters of a GGUF whose matrices are stored in this type.

    gguf itself quantizes and dequantizes. In a GGUF the two rows of a rotated pair are
    adjacent; here they are half a head apart.
    """
    import gguf

    def stored(name):
        x = tiny.tensors[f"{name}.weight"]
        if x.ndim == 1 or kind is None:
            return x
        as_kind = gguf.GGMLQuantizationType[kind]
        return gguf.quants.dequantize(gguf.quants.quantize(x, as_kind), as_kind)

    def kernel(name):
        x = stored(name)
        if name.endswith(("attn_q", "attn_k")):
            rows = np.arange(len(x)).reshape(-1, 8)  # heads of 8
            x = x[np.concatenate([rows[:, ::2], rows[:, 1::2]], 1).ravel()]
        return x.T

    def block(i):
        found = {n: {"scale": stored(f"blk.{i}.{there}")} for n, there in NORMS.items()}
        for here, there in LINEAR.items():
            part, module = here.split("/")
            weight = {"kernel": kernel(f"blk.{i}.{there}")}
            found.setdefault(part, {})[module] = weight
        return found

    params = {"tokens": {"embedding": stored("token_embd")}}
    params |= {"norm": {"scale": stored("output_norm")}}
    blocks = [block(i) for i in range(2)]
    if scanned:
        return params | {"blocks": jax.tree.map(lambda *xs: np.stack(xs), *blocks)}
    return params | {f"blocks_{i}": block for i, block in enumerate(blocks)}


def assert_same_bits(got, want):
    """Compares bytes, which distinguish zeros of different sign."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# The parameters.


@pytest.mark.parametrize("scanned", [True, False])
def test_load_gives_the_parameters_of_the_module(tiny, tmp_path, scanned):
    path = tiny.write(tmp_path / "tiny.gguf", lambda name: None)
    model, params, _ = smollm2.load(path, scanned=scanned)
    assert (model.arch.layers, model.arch.rope, model.arch.epsilon) == (2, 100.0, 1e-5)
    ids = jnp.ones((1, 4), jnp.int32)
    made = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
    assert describe(params) == describe(made)
    assert_same_bits(params, expected(tiny, None, scanned))


def test_load_gives_the_same_function_scanned_and_unrolled(path):
    ids = np.random.default_rng(1).integers(0, 200, (2, 9))
    loaded = [smollm2.load(path, scanned=scanned) for scanned in (True, False)]
    scanned, unrolled = (logits(model, params, ids) for model, params, _ in loaded)
    np.testing.assert_allclose(scanned, unrolled, atol=1e-5)


def logits(model, params, ids):
    return jax.jit(model.apply)({"params": params}, ids)


def test_load_keeps_rotated_products(tiny, tmp_path):
    """A GGUF rotates adjacent rows; with `rotate` the products must be the same."""
    path = tiny.write(tmp_path / "tiny.gguf", lambda name: None)
    attention = smollm2.load(path, scanned=False).params["blocks_0"]["attention"]
    size, time, wavelength = 8, 5, 50.0
    x = np.random.default_rng(0).normal(size=(time, 32)).astype(np.float32)
    speed = wavelength ** (-np.arange(size // 2) / (size // 2))
    turn = np.exp(1j * np.arange(time)[:, None] * speed)[:, None]  # (time, 1, pair)

    def adjacent(name):
        w = tiny.tensors[f"blk.0.attn_{name[0]}.weight"]
        pairs = (x @ w.T).reshape(time, -1, size // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
        return np.stack([turned.real, turned.imag], -1).reshape(time, -1, size)

    def split(name):
        y = (x @ attention[name]["kernel"]).reshape(1, time, -1, size)
        return np.asarray(rotate(jnp.asarray(y), speeds(size, wavelength)))[0]

    def products(rotated):  # of each query with the key of its group
        q, k = rotated("query"), np.repeat(rotated("key"), 2, 1)
        return np.einsum("thd,shd->hts", q, k)

    np.testing.assert_allclose(products(split), products(adjacent), atol=1e-3)


DOWN = "blk.1.ffn_down.weight"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (DOWN, None, r"no tensor.*model\.layers\.1\.mlp\.down_proj\.weight"),
        ("output.weight", np.zeros((263, 32), "f4"), r"output\.weight.*differ"),
        ("blk.0.attn_q.bias", np.zeros(32, "f4"), r"takes 1 .*blk\.0\.attn_q\.bias"),
        (DOWN, np.zeros((64, 32), "f4"), r"\(64, 32\)\. It is the transpose"),
    ],
)
def test_load_refuses_other_tensors(tiny, tmp_path, name, value, message):
    tiny.tensors.pop(name, None)
    if value is not None:
        tiny.tensors[name] = value
    path = tiny.write(tmp_path / "other.gguf", lambda name: None)
    with pytest.raises(ValueError, match=message):
        smollm2.load(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("general.architecture", "gemma2", "contains a gemma2: a llama is needed"),
        ("llama.block_count", None, r"no field llama\.block_count"),
        (
            "llama.rope.scaling.type",
            "yarn",
            r"llama\.rope\.scaling\.type, which is not",
        ),
        ("llama.rope.dimension_count", 4, "rotates 4 dimensions of a head's 8"),
        ("llama.attention.head_count_kv", 3, "has 4 heads, 3 of keys and values"),
        ("llama.embedding_length", 30, "and the width 30: each must divide"),
    ],
)
def test_measure_refuses_other_architectures(tiny, name, value, message):
    tiny.fields.pop(name, None)
    if value is not None:
        tiny.fields[name] = value
    with pytest.raises(ValueError, match=message):
        smollm2.measure(tiny.fields)


def test_load_refuses_another_model_in_the_package(path, monkeypatch):
    monkeypatch.setattr(smollm2, "packaged_file", lambda: path)
    with pytest.raises(ValueError, match=r"has Architecture\(layers=2, .* is needed"):
        smollm2.load()
    loaded = smollm2.load(path, scanned=False, remat=True)
    assert (loaded.model.scanned, loaded.model.remat) == (False, True)
    assert loaded.tokenizer.get_vocab_size() == loaded.model.arch.vocab


# The text.


def test_tokenizer_decodes_what_it_encodes(tiny):
    tokenizer = smollm2.tokenizer(tiny.fields)
    for text in ("the naïve café, 112 ½ times", " then\n\tthe end  ", "日本"):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
    # A digit is a token, even if a merge would join two; spaces start the next word.
    assert tokenizer.encode("the the 12").tokens == ["the", "Ġthe", "Ġ", "1", "2"]
    assert tokenizer.encode("the<|im_end|>").ids[-1] == 2
    assert tokenizer.get_vocab_size() == len(tiny.fields["tokenizer.ggml.tokens"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pre", "llama-bpe", "is gpt2 and llama-bpe: gpt2 and smollm"),
        ("merges", None, r"no field tokenizer\.ggml\.merges"),
        ("tokens", ["a", "a"], "has 2 tokens, 1 of them different, and"),
    ],
)
def test_tokenizer_refuses_other_kinds(tiny, name, value, message):
    tiny.fields[f"tokenizer.ggml.{name}"] = value
    if value is None:
        del tiny.fields[f"tokenizer.ggml.{name}"]
    with pytest.raises(ValueError, match=message):
        smollm2.tokenizer(tiny.fields)


# The file, and other readers of it.


def test_read_fields_returns_those_of_the_file(tiny, path):
    fields = smollm2.read_fields(path)
    assert {name: fields[name] for name in tiny.fields} == tiny.fields


def is_quantized(x):
    return isinstance(x, lj.Quantized)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16"])
@pytest.mark.parametrize("scanned", [True, False])
def test_load_keeps_the_values_of_the_file(tiny, tmp_path, kind, scanned):
    """Codes and scales of the first two are kept; all dequantize to the file's bits."""
    path = tiny.write(tmp_path / "tiny.gguf", lambda name: kind)
    model, params, _ = smollm2.load(path, scanned=scanned, quantized=True)
    stored = [x for x in jax.tree.leaves(params, is_leaf=is_quantized)]
    stored = [x for x in stored if is_quantized(x)]
    plain = lj.dequantize(params) if stored else params
    assert_same_bits(plain, expected(tiny, kind, scanned))
    assert_same_bits(smollm2.load(path, scanned=scanned).params, plain)
    if kind not in ("Q8_0", "Q4_0"):
        assert not stored
        return
    assert len(stored) == (8 if scanned else 15)
    down = params["blocks" if scanned else "blocks_1"]["mlp"]["down"]["kernel"]
    assert down.values.dtype == {"Q8_0": jnp.int8, "Q4_0": jnp.int4}[kind]
    assert down.scale.dtype == np.float16
    assert down.scale.shape == ((2, 2, 32) if scanned else (2, 32))  # of 64 inputs
    ids = np.random.default_rng(1).integers(0, 200, (2, 9))
    fn = lambda params, ids: model.apply({"params": params}, ids)
    got = jax.jit(lj.lora(fn))(params, ids)
    np.testing.assert_allclose(got, logits(model, plain, ids), atol=1e-5)


def test_load_dequantizes_types_that_are_not_supported(tiny, tmp_path):
    """Types with an offset for each block, and layers of different types in a stack."""
    kinds = {"token_embd.weight": "Q8_0", DOWN: "Q8_0", "blk.0.attn_q.weight": "Q4_0"}
    path = tiny.write(tmp_path / "tiny.gguf", lambda name: kinds.get(name, "Q4_1"))
    for scanned, count in ((True, 1), (False, 3)):
        params = smollm2.load(path, scanned=scanned, quantized=True).params
        leaves = jax.tree.leaves(params, is_leaf=is_quantized)
        assert sum(map(is_quantized, leaves)) == count
        assert is_quantized(params["tokens"]["embedding"])
        plain = smollm2.load(path, scanned=scanned).params
        assert_same_bits(lj.dequantize(params), plain)


def test_import_weights_quantizes_what_a_gguf_has_in_other_types(path):
    model, want, _ = smollm2.load(path)
    like = jax.eval_shape(lambda: want)
    names = folder.names(model.arch)
    got = lj.import_weights(path, like, names, how="int8")
    w = got["blocks"]["mlp"]["up"]["kernel"]
    assert w.format == "int8"
    axes = {"blocks/mlp/up/kernel": lj.Axes((0,), (1,), (2,))}
    quantized = lj.quantize(want, {"up": "int8"}, axes=axes)
    assert_same_bits(w, quantized["blocks"]["mlp"]["up"]["kernel"])


@pytest.mark.parametrize("data", [b"", b"nothing of the kind", 5000, -64])
def test_load_refuses_other_files(path, data):
    path.write_bytes(data if isinstance(data, bytes) else path.read_bytes()[:data])
    with pytest.raises(ValueError, match="cannot be read as a GGUF file"):
        smollm2.load(path)
    with pytest.raises(FileNotFoundError):
        smollm2.load(path.with_name("missing"))


@pytest.mark.filterwarnings("ignore")
def test_load_gives_the_logits_and_tokens_of_transformers(tiny, path):
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    theirs = smollm2.torch_model(path)
    ids = np.random.default_rng(1).integers(0, 200, (2, 40))
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    for scanned in (True, False):
        model, params, _ = smollm2.load(path, scanned=scanned)
        np.testing.assert_allclose(logits(model, params, ids), want, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "the naïve café, then the end"
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found == smollm2.tokenizer(tiny.fields).encode(text).ids


def test_import_weights_refuses_a_gguf_that_is_not_known(tiny, tmp_path):
    read = lambda path: lj.import_weights(path, {"a": jnp.ones(2)}, {"a": "a"})
    path = tiny.write(tmp_path / "tiny.gguf", lambda name: "Q8_0")
    half = tmp_path / "half.gguf"
    half.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"half.gguf is no complete GGUF"):
        read(half)
    tiny.fields["general.architecture"] = "mamba"
    tiny.fields["mamba.block_count"] = 2
    path = tiny.write(tmp_path / "mamba.gguf", lambda name: "Q8_0")
    with pytest.raises(ValueError, match=r"holds a mamba.*llama"):
        read(path)
