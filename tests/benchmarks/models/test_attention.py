"""Attention with windows and segments, and the conditions of flash attention."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import attention
from models.architectures import Architecture, Model
from models.attention import Mask

import lora_jax as lj

pytestmark = pytest.mark.usefixtures("third_party")

SMALL = dict(layers=3, width=32, heads=4, mlp=24, vocab=50, kv_heads=2)
KINDS = {
    "llama": Architecture(**SMALL),
    "mistral": Architecture(**SMALL, window=3),
    "gemma2": Architecture(**SMALL, window=3, local=(True, False), attention_cap=2.0),
    "gemma3": Architecture(**SMALL, window=3, local=(True, False), local_rope=100.0),
}
IDS = np.random.default_rng(0).integers(0, 50, (2, 12))
# Texts of 5, 4, 1 tokens and padding; and one of 12.
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [3] + [0] * 2, [1] * 12], np.int32)


def made(arch, scanned=True, **options):
    """Returns a random model, its parameters and its function."""
    model = Model(arch, scanned, True, jnp.float32, jnp.float32, **options)
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), x.dtype)
    apply = lambda params, *more: model.apply({"params": params}, *more)
    return model, jax.tree.map(draw, shapes), apply


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_model_computes_each_segment_as_a_text_of_its_own(kind, scanned):
    _, params, apply = made(KINDS[kind], scanned)
    got = jax.jit(apply)(params, IDS, SEGMENTS)
    whole = jax.jit(apply)(params, IDS)
    np.testing.assert_allclose(got[1], whole[1], atol=1e-5)
    np.testing.assert_allclose(got[0, :5], whole[0, :5], atol=1e-5)
    moved = np.roll(IDS, -5, 1)  # what follows the second text does not matter
    second = jax.jit(apply)(params, moved)[0, :4]
    np.testing.assert_allclose(got[0, 5:9], second, atol=1e-5)
    assert np.isfinite(got).all()
    assert np.abs(whole[0, 5:9] - got[0, 5:9]).max() > 1e-2


def test_positions_in_segments():
    found = attention.positions_in(jnp.asarray(SEGMENTS))
    want = [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 1], [*range(12)]]
    assert found.tolist() == want


def test_model_takes_positions():
    _, params, apply = made(KINDS["llama"])
    later = np.arange(12, dtype=np.int32)[None] + np.array([[3], [40]], np.int32)
    got, want = apply(params, IDS, None, later), apply(params, IDS)
    np.testing.assert_allclose(got, want, atol=1e-4)  # only distances matter
    apart = apply(params, IDS, None, 2 * later)
    assert np.abs(apart - want).max() > 1e-2


@pytest.fixture
def flash(monkeypatch):
    """Replaces cuDNN's attention by XLA's; returns a list of its calls' options."""
    calls = []
    plain = jax.nn.dot_product_attention

    def run(*args, implementation, **options):
        assert implementation == "cudnn"
        calls.append(options)
        return plain(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", run)
    return calls


@pytest.mark.parametrize(
    ("kind", "segments", "scanned"),
    [
        ("llama", None, True),
        ("mistral", None, True),
        ("gemma2", None, True),
        ("gemma3", None, True),
        ("gemma3", None, False),
        ("gemma3", SEGMENTS, True),
    ],
)
def test_model_calls_flash_attention_for_the_same_result(
    flash, randomized, kind, segments, scanned
):
    model, params, _ = made(KINDS[kind], scanned)
    ids = jnp.asarray(IDS)
    fn = lambda model: (
        lambda params, ids: model.apply({"params": params}, ids, segments)
    )
    params = randomized(lj.lorafy(params, 2, axes=lj.find_axes(fn(model), params, ids)))
    adapters, base = lj.split(params)

    def loss(model):
        run = lj.lora(fn(model))
        return lambda adapters: (run(lj.combine(adapters, base), ids) ** 2).mean()

    want = jax.jit(jax.value_and_grad(loss(model)))(adapters)
    assert not flash
    flashed = model.clone(attention="cudnn")
    got = jax.jit(jax.value_and_grad(loss(flashed)))(adapters)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), got, want)
    windows = {options.get("local_window_size") for options in flash}
    if kind == "gemma2":  # cuDNN has no cap
        assert not flash
    elif segments is not None:
        assert windows == {None} and "mask" in flash[0]
    else:
        expected = {"llama": {None}, "mistral": {(2, 0)}, "gemma3": {None, (2, 0)}}
        assert windows == expected[kind]


def test_flash_applies_where_cudnn_computes_the_same(monkeypatch):
    q = lambda time, size, dtype: jax.ShapeDtypeStruct((1, time, 2, size), dtype)
    half, packed = jnp.bfloat16, Mask(segments=jnp.ones((1, 7), jnp.int32))
    assert not attention.flash_applies(q(8, 64, half), Mask())  # no GPU
    monkeypatch.setattr(attention, "largest_flash_head", lambda: 128)
    assert attention.flash_applies(q(7, 64, half), Mask())
    assert attention.flash_applies(q(8, 128, jnp.float16), packed)
    for time, size, dtype, mask in (
        (8, 64, jnp.float32, Mask()),
        (8, 256, half, Mask()),
        (8, 60, half, Mask()),
        (7, 64, half, packed),
    ):
        assert not attention.flash_applies(q(time, size, dtype), mask)


@pytest.mark.parametrize(
    ("backend", "capability", "size"),
    [("cpu", "9.0", 0), ("gpu", "7.5", 0), ("gpu", "8.9", 128), ("gpu", "10.0", 256)],
)
def test_largest_flash_head_of_each_gpu(monkeypatch, backend, capability, size):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert attention.largest_flash_head.__wrapped__() == size


def test_model_without_windows_is_scanned_without_flags():
    """The plain families pay nothing for the layers' differences in other families."""
    counted = {}
    for kind in ("llama", "mistral", "gemma3"):
        arch = dataclasses.replace(KINDS[kind], local_rope=None)
        _, params, apply = made(arch)
        (scan,) = (
            eqn
            for eqn in jax.make_jaxpr(apply)(params, IDS).eqns
            if eqn.primitive.name == "scan"
        )
        counted[kind] = sum(x.aval.dtype == bool for x in scan.invars)
    assert counted == {"llama": 0, "mistral": 0, "gemma3": 1}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_model_in_16_bits_is_close_to_float32(dtype):
    _, params, apply = made(KINDS["llama"])
    want = apply(params, IDS)
    half = Model(KINDS["llama"], True, True, dtype, dtype)
    low = jax.tree.map(lambda x: x.astype(dtype), params)
    got = jax.jit(half.apply)({"params": low}, IDS)
    assert got.dtype == jnp.float32
    assert np.abs(got - want).mean() < 0.05 * np.abs(want).mean()
