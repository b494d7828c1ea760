"""Generation with a cache gives the tokens of full forward passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.architectures import GPT2, Architecture, Model
from models.attention import RopeScaling
from models.generation import generate

import lora_jax as lj

pytestmark = pytest.mark.usefixtures("third_party")

SMALL = dict(layers=3, width=32, heads=4, mlp=24, vocab=50, kv_heads=2)
KINDS = {
    "llama": Architecture(**SMALL, tied=False, scaling=RopeScaling(4.0, 1.0, 4.0, 8)),
    "mistral": Architecture(**SMALL, window=3),
    "gemma2": Architecture(
        **SMALL, window=3, local=(True, False), norm="offset", attention_cap=2.0
    ),
    "gemma3": Architecture(
        **SMALL, window=3, local=(True, False), local_rope=100.0, head_norm=True
    ),
    "gpt2": Architecture(**SMALL, positions=20, **GPT2),
}
LENGTHS = np.array([7, 2, 5])


@functools.cache
def made(kind, scanned=True):
    """Returns a random model and its parameters."""
    model = Model(KINDS[kind], scanned, True, jnp.float32, jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), x.dtype)
    return model, jax.tree.map(draw, shapes)


def texts(seed=0):
    return np.random.default_rng(seed).integers(1, 50, (3, 7))


def assert_greedy(apply, params, ids, got):
    """Checks that each new token is the most likely one after those before it.

    No token attends to a later one, so the final texts give the logits of each step.
    """
    logits = np.asarray(jax.jit(apply)(params, got.ids))
    for row, length in enumerate(LENGTHS):
        new = slice(length, got.lengths[row])
        np.testing.assert_array_equal(got.ids[row, :length], ids[row, :length])
        best = logits[row].argmax(-1)[length - 1 : got.lengths[row] - 1]
        np.testing.assert_array_equal(got.ids[row, new], best)
        assert not np.any(got.ids[row, got.lengths[row] :])


def apply_of(model):
    return lambda params, ids: model.apply({"params": params}, ids)


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_generate_gives_the_most_likely_tokens(kind, scanned):
    model, params = made(kind, scanned)
    ids = texts()
    got = generate(model, params, ids, LENGTHS, 8)
    assert got.lengths.tolist() == [15, 10, 13]
    assert_greedy(apply_of(model), params, ids, got)
    again = generate(model, params, np.where(ids > 9, ids, 9)[:1, :2], None, 8)
    assert again.ids.shape == (1, 10)


def test_generate_ignores_what_texts_are_padded_with():
    model, params = made("mistral")
    ids = texts()
    other = np.where(np.arange(7) < LENGTHS[:, None], ids, 3)
    one, two = (generate(model, params, x, LENGTHS, 6).ids for x in (ids, other))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("how", ["nf4", None])
def test_generate_runs_adapted_and_quantized_parameters(randomized, how):
    model, params = made("gemma3")
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    axes = lj.find_axes(apply_of(model), params, ids)
    if how:
        params = lj.quantize(params, how, axes=axes)
    params = randomized(lj.lorafy(params, 2, axes=axes))
    got = generate(model, params, texts(), LENGTHS, 8)
    assert_greedy(lj.lora(apply_of(model)), params, texts(), got)
    plain = generate(model, made("gemma3")[1], texts(), LENGTHS, 8)
    assert (plain.ids != got.ids).any()


def test_generate_stops_each_text_at_its_first_stop():
    model, params = made("llama")
    plain = generate(model, params, texts(), LENGTHS, 8)
    first, second = int(plain.ids[0, 9]), int(plain.ids[1, 4])
    got = generate(model, params, texts(), LENGTHS, 8, stop=[first, second])
    for row, length in enumerate(LENGTHS):
        new = plain.ids[row, length : length + 8].tolist()
        ends = [i + 1 for i, x in enumerate(new) if x in (first, second)]
        end = length + min(ends, default=8)
        assert got.lengths[row] == end
        np.testing.assert_array_equal(got.ids[row, :end], plain.ids[row, :end])
        assert not np.any(got.ids[row, end:])
    assert (got.lengths < LENGTHS + 8).any()
    one = generate(model, params, texts(), LENGTHS, 8, stop=first)
    assert (one.lengths >= got.lengths).all()


def test_generate_samples_in_proportion_to_the_probabilities():
    model, params = made("llama")
    ids = np.tile(texts()[:1, :3], (4000, 1))
    key = jax.random.key(0)
    got = generate(model, params, ids, None, 1, temperature=2.0, key=key)
    logits = apply_of(model)(params, ids[:1])[0, -1]
    found = np.bincount(got.ids[:, 3], minlength=50) / len(ids)
    np.testing.assert_allclose(found, jax.nn.softmax(logits / 2), atol=0.03)
    same = generate(model, params, ids, None, 1, temperature=2.0, key=key)
    np.testing.assert_array_equal(same.ids, got.ids)


def test_generate_refuses_other_arguments():
    model, params = made("llama")
    for lengths in ([7, 0, 5], [7, 8, 5], [7, 7]):
        with pytest.raises(ValueError, match="3 numbers from 1 to 7"):
            generate(model, params, texts(), lengths, 2)
    with pytest.raises(ValueError, match="steps must be positive"):
        generate(model, params, texts(), LENGTHS, 0)
    for more in (dict(temperature=1.0), dict(key=jax.random.key(0))):
        with pytest.raises(ValueError, match="Pass a key with a positive temperature"):
            generate(model, params, texts(), LENGTHS, 2, **more)
