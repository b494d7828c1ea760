"""A GGUF converts exactly to the published Llama; the converter is strict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import architectures, smollm2

import lora_jax as lj

pytestmark = pytest.mark.usefixtures("third_party")


@pytest.fixture
def tiny(tiny_smollm2):
    return tiny_smollm2


def models(file):
    """Yields the function and the parameters of the model, scanned and unrolled."""
    arch = smollm2.measure(file.fields)
    for scanned in (True, False):
        model = smollm2.build(arch, scanned)
        params = smollm2.convert(file.tensors, arch, scanned=scanned)
        yield lambda p, x, model=model: model.apply({"params": p}, x), params


# The parameters.


def test_convert_gives_the_parameters_of_the_module(tiny):
    arch, ids = smollm2.measure(tiny.fields), jnp.ones((1, 4), jnp.int32)
    assert (arch.layers, arch.rope, arch.epsilon) == (2, 100.0, 1e-5)
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
    for scanned in (True, False):
        made = jax.eval_shape(
            smollm2.build(arch, scanned).init, jax.random.key(0), ids
        )["params"]
        params = smollm2.convert(tiny.tensors, arch, scanned=scanned)
        assert describe(params) == describe(made)
        layer = params["blocks"] if scanned else params["blocks_1"]
        down = layer["mlp"]["down"]["kernel"]
        down = down[1] if scanned else down
        np.testing.assert_array_equal(down, tiny.tensors["blk.1.ffn_down.weight"].T)


def test_convert_gives_the_same_function_scanned_and_unrolled(tiny):
    ids = np.random.default_rng(1).integers(0, 200, (2, 9))
    scanned, unrolled = (jax.jit(fn)(params, ids) for fn, params in models(tiny))
    np.testing.assert_allclose(scanned, unrolled, atol=1e-5)


def test_split_pairs_keeps_rotated_products():
    """A GGUF rotates adjacent rows; with `rotate` the products must be the same."""
    heads, size, time, wavelength = 3, 8, 5, 50.0
    rng = np.random.default_rng(0)
    x = rng.normal(size=(time, 16)).astype(np.float32)
    speed = wavelength ** (-np.arange(size // 2) / (size // 2))
    turn = np.exp(1j * np.arange(time)[:, None] * speed)[:, None]  # (time, 1, pair)

    def adjacent(w):
        pairs = (x @ w.T).reshape(time, heads, -1, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
        return np.stack([turned.real, turned.imag], -1).reshape(time, heads, size)

    def split(w):
        y = (x @ smollm2.split_pairs(w, heads).T).reshape(1, time, heads, size)
        return np.asarray(architectures.rotate(jnp.asarray(y), wavelength))[0]

    q, k = (rng.normal(size=(heads * size, 16)).astype(np.float32) for _ in "qk")
    products = lambda rotate: np.einsum("thd,shd->hts", rotate(q), rotate(k))
    np.testing.assert_allclose(products(split), products(adjacent), atol=1e-3)


DOWN = "blk.1.ffn_down.weight"
KERNELS = list(smollm2.LINEAR)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (DOWN, None, r"lack blk\.1\.ffn_down\.weight: exactly"),
        ("output.weight", np.zeros(1, "f4"), r"also hold output\.weight: .* tied head"),
        ("blk.2.attn_q.weight", np.zeros(1, "f4"), r"also hold blk\.2\.attn_q\.weight"),
        ("blk.0.attn_q.bias", np.zeros(1, "f4"), r"also hold blk\.0\.attn_q\.bias"),
        (DOWN, np.zeros((64, 32), "f4"), r"is float32 \(64, 32\): .* \(32, 64\)"),
        (DOWN, np.zeros((32, 64), "f2"), r"is float16 \(32, 64\): .* float32"),
    ],
)
def test_convert_refuses_other_tensors(tiny, name, value, message):
    arch = smollm2.measure(tiny.fields)
    tiny.tensors.pop(name, None)
    if value is not None:
        tiny.tensors[name] = value
    with pytest.raises(ValueError, match=message):
        smollm2.convert(tiny.tensors, arch)


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


def test_load_refuses_another_model_in_the_package(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "packaged_file", lambda: tmp_path)
    monkeypatch.setattr(smollm2, "read", lambda path, **_: tiny)
    with pytest.raises(ValueError, match=r"has Architecture\(layers=2, .* is needed"):
        smollm2.load()
    loaded = smollm2.load(tmp_path, scanned=False, remat=True)
    assert (loaded.model.scanned, loaded.model.remat) == (False, True)
    assert loaded.tokenizer.get_vocab_size() == loaded.model.arch.vocab


@pytest.mark.parametrize("scanned", [True, False])
def test_names_match_every_kernel(tiny, scanned):
    arch = smollm2.measure(tiny.fields)
    params = smollm2.convert(tiny.tensors, arch, scanned=scanned)
    shapes = jax.eval_shape(lambda: params)
    names = smollm2.names(scanned=scanned)
    stacks = {f"blocks/{part}/kernel": lj.Axes((0,), (1,), (2,)) for part in KERNELS}
    adapted = lj.lorafy(
        shapes, 2, targets=[*names], axes=stacks if scanned else None
    )  # raises for a pattern that matches nothing
    kernels = 7 if scanned else 7 * arch.layers
    assert len(jax.tree.leaves(lj.split(adapted)[0])) == 2 * (kernels + 1)
    assert names["tokens/embedding"] == ("model.embed_tokens", "lm_head")
    assert len(set(names.values())) == 8


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


def test_generate_appends_the_most_likely_tokens():
    """The model predicts the sum of the last two tokens."""

    def apply(params, ids):
        before = jnp.pad(ids, ((0, 0), (1, 0)))[:, :-1]
        return params * jax.nn.one_hot(ids + before, 50)

    ids = jnp.array([[1, 1], [2, 5]], jnp.int32)
    made = smollm2.generate(apply, jnp.float32(1), ids, 4)
    assert made.tolist() == [[1, 1, 2, 3, 5, 8], [2, 5, 7, 12, 19, 31]]


def test_generate_agrees_with_the_logits_of_the_result(tiny):
    fn, params = next(models(tiny))
    ids = jnp.array([[5, 9, 14], [70, 7, 7]], jnp.int32)
    made = smollm2.generate(fn, params, ids, 5)
    # No token attends to a later one, so the final text gives the logits of each step.
    logits = jax.jit(fn)(params, made)
    np.testing.assert_array_equal(logits[:, 2:-1].argmax(-1), made[:, 3:])


# The file, and other readers of it.


@pytest.fixture
def path(tiny, tmp_path):
    """Returns the tiny model as a GGUF, its kernels quantized like SmolLM2's."""
    return write(tmp_path / "tiny.gguf", tiny, lambda name: "Q4_1")


def write(path, tiny, kind_of):
    """Writes a GGUF; `kind_of` returns the type of a matrix, or None for float32."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, tiny.fields["general.architecture"])
    for name, value in tiny.fields.items():
        if name == "general.architecture":
            continue  # already written
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    for name, x in tiny.tensors.items():
        kind = kind_of(name) if x.ndim == 2 else None
        written = x
        if kind is not None:
            kind = gguf.GGMLQuantizationType[kind]
            written = gguf.quants.quantize(x, kind)
        writer.add_tensor(name, written, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_read_dequantizes_a_file(tiny, path):
    file = smollm2.read(path)
    assert {name: file.fields[name] for name in tiny.fields} == tiny.fields
    assert set(file.tensors) == set(tiny.tensors)
    for name, x in tiny.tensors.items():
        blocks, found = (y.reshape(-1, 32) for y in (x, file.tensors[name]))
        assert file.tensors[name].dtype == np.float32
        # Sixteen levels between the least and the largest element of a block
        step = np.ptp(blocks, axis=1, keepdims=True) / np.float32(15)
        assert np.all(abs(found - blocks) <= 0.6 * step if x.ndim == 2 else found == x)
    smollm2.load(path)


def bits(tree):
    """Returns the bytes of each array, to distinguish zeros of different sign."""
    return jax.tree.map(lambda x: (x.shape, np.asarray(x).tobytes()), tree)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("scanned", [True, False])
def test_load_keeps_quantized_blocks(tiny, tmp_path, kind, scanned):
    """Codes and scales are those of the file, so both dequantize to the same bits."""
    path = write(tmp_path / "tiny.gguf", tiny, lambda name: kind)
    model, params, _ = smollm2.load(path, scanned=scanned, quantized=True)
    plain = smollm2.load(path, scanned=scanned).params
    down = params["blocks" if scanned else "blocks_1"]["mlp"]["down"]["kernel"]
    assert down.values.dtype == {"Q8_0": jnp.int8, "Q4_0": jnp.int4}[kind]
    assert down.scale.dtype == np.float16
    assert down.scale.shape == ((2, 2, 32) if scanned else (2, 32))  # of 64 inputs
    kernels = 7 if scanned else 7 * model.arch.layers
    stored = lambda x: isinstance(x, lj.Quantized)
    assert sum(map(stored, jax.tree.leaves(params, is_leaf=stored))) == kernels + 1
    assert bits(lj.dequantize(params)) == bits(plain)

    fn = lambda params, ids: model.apply({"params": params}, ids)
    ids = np.random.default_rng(1).integers(0, 200, (2, 9))
    want = jax.jit(fn)(plain, ids)
    np.testing.assert_allclose(jax.jit(lj.lora(fn))(params, ids), want, atol=1e-5)


def test_load_dequantizes_types_that_are_not_supported(tiny, tmp_path):
    """Types with an offset for each block, and layers of different types in a stack."""
    kinds = {"token_embd.weight": "Q8_0", DOWN: "Q8_0", "blk.0.attn_q.weight": "Q4_0"}
    path = write(tmp_path / "tiny.gguf", tiny, lambda name: kinds.get(name, "Q4_1"))
    for scanned, count in ((True, 1), (False, 3)):
        params = smollm2.load(path, scanned=scanned, quantized=True).params
        stored = lambda x: isinstance(x, lj.Quantized)
        assert sum(map(stored, jax.tree.leaves(params, is_leaf=stored))) == count
        assert isinstance(params["tokens"]["embedding"], lj.Quantized)
        plain = smollm2.load(path, scanned=scanned).params
        assert bits(lj.dequantize(params)) == bits(plain)


@pytest.mark.parametrize("data", [b"", b"nothing of the kind", 5000, -64])
def test_read_refuses_other_files(path, data):
    path.write_bytes(data if isinstance(data, bytes) else path.read_bytes()[:data])
    with pytest.raises(ValueError, match="cannot be read as a GGUF file"):
        smollm2.read(path)
    with pytest.raises(FileNotFoundError):
        smollm2.read(path.with_name("missing"))


@pytest.mark.filterwarnings("ignore")
def test_load_gives_the_logits_and_tokens_of_transformers(tiny, path):
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    theirs = smollm2.torch_model(path)
    ids = np.random.default_rng(1).integers(0, 200, (2, 40))
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    for fn, params in models(smollm2.read(path)):
        np.testing.assert_allclose(jax.jit(fn)(params, ids), want, atol=1e-4)
    for pattern, names in smollm2.names().items():
        part = smollm2.LINEAR.get(pattern.removeprefix("blocks/"))
        tensor = "token_embd.weight" if part is None else f"blk.1.{part[0]}.weight"
        for name in (names,) if isinstance(names, str) else names:
            weight = theirs.get_submodule(name.format(layer=1)).weight
            assert weight.shape == tiny.tensors[tensor].shape
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "the naïve café, then the end"
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert found == smollm2.tokenizer(tiny.fields).encode(text).ids


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "F16"])
@pytest.mark.parametrize("scanned", [True, False])
def test_import_weights_of_a_gguf(tiny, tmp_path, kind, scanned):
    """The same tree as the converter here makes; blocks of the first two are kept."""
    path = write(tmp_path / "tiny.gguf", tiny, lambda name: kind)
    want = smollm2.load(path, scanned=scanned).params
    arch = smollm2.measure(tiny.fields)
    like = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, want))
    names = architectures.llama_names(arch, scanned=scanned)
    names["norm"] = names.pop("params/norm")
    got = lj.import_weights(path, like, names)
    stored = [x for x in jax.tree.leaves(got, is_leaf=is_quantized) if is_quantized(x)]
    if kind in ("Q8_0", "Q4_0"):
        assert len(stored) == (8 if scanned else 15)
        got = lj.dequantize(got)
    else:
        assert not stored
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(x, y)
    if kind == "Q4_1":  # dequantized, and quantized by `how`
        got = lj.import_weights(path, like, names, how="int8")
        layer = got["blocks" if scanned else "blocks_0"]
        assert layer["mlp"]["up"]["kernel"].format == "int8"


def is_quantized(x):
    return isinstance(x, lj.Quantized)


def test_import_weights_refuses_a_gguf_that_is_not_known(tiny, tmp_path):
    read = lambda path: lj.import_weights(path, {"a": jnp.ones(2)}, {"a": "a"})
    path = write(tmp_path / "tiny.gguf", tiny, lambda name: "Q8_0")
    half = tmp_path / "half.gguf"
    half.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"half.gguf is no complete GGUF"):
        read(half)
    tiny.fields["general.architecture"] = "mamba"
    tiny.fields["mamba.block_count"] = 2
    path = write(tmp_path / "mamba.gguf", tiny, lambda name: "Q8_0")
    with pytest.raises(ValueError, match=r"holds a mamba.*llama"):
        read(path)
