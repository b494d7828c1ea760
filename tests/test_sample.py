"""Tests of `sample` and `differ`: they recognize a weight however it is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax._sample import COUNT, TOLERANCE, differ, sample

RNG = np.random.default_rng(0)


def drawn(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def quantized(w, levels=7, block=64):
    """Returns a weight rounded to integers times one scale per block."""
    blocks = w.reshape(-1, block)
    scale = np.abs(blocks).max(-1, keepdims=True) / levels
    return (np.round(blocks / scale) * scale).reshape(w.shape)


SAME = {
    "itself": lambda w: w,
    "bfloat16": lambda w: w.astype(jnp.bfloat16),
    "float16": lambda w: w.astype(np.float16),
    "a JAX array": jnp.asarray,
    "8 bits per channel": lambda w: quantized(w, 127, w.shape[-1]),
    "4 bits, blocks of 64": quantized,
    "4 bits per row": lambda w: quantized(w, 7, w.shape[-1]),
}


@pytest.mark.parametrize("how", SAME)
@pytest.mark.parametrize("tail", [drawn, lambda *n: RNG.laplace(size=n)])
def test_differ_is_zero_for_the_same_weight_stored_otherwise(how, tail):
    for _ in range(50):
        w = tail(128, 256).astype(np.float32)
        assert differ(sample(SAME[how](w)), sample(w)) == 0


@pytest.mark.parametrize(
    "other",
    [
        lambda w: drawn(*w.shape),
        lambda w: -w,
        lambda w: 2 * w,
        lambda w: w[::-1],
        lambda w: w + drawn(*w.shape),
        np.zeros_like,
        lambda w: np.roll(w, 1),
    ],
)
def test_differ_is_large_for_another_weight(other):
    for _ in range(50):
        w = drawn(128, 256)
        assert differ(sample(other(w)), sample(w)) > TOLERANCE


@pytest.mark.parametrize("shape", [(1,), (5,), (0, 3), (2, 1, 7), (3, 40, 11)])
def test_sample_of_any_shape(shape):
    w = drawn(*shape)
    found = sample(w)
    assert found.dtype == jnp.bfloat16 and found.size in (0, COUNT)
    assert differ(sample(jnp.asarray(w)), found) == 0
    assert {*found.tolist()} <= {*w.astype(jnp.bfloat16).ravel().tolist()}


def test_sample_is_spread_over_the_weight():
    w = np.arange(64.0).reshape(8, 8)
    assert len({*sample(w).tolist()}) == COUNT
    rows = {int(x) // 8 for x in sample(w)}
    assert rows == {*range(8)}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sample_of_sharded_weights(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    w = drawn(8, 16)
    for spec in (("x", "y"), (None, ("x", "y")), ("y", None), ()):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        found = sample(jax.device_put(w, sharding))
        np.testing.assert_array_equal(found, sample(w))


def test_sample_of_abstract_and_traced_weights_is_none():
    assert sample(jax.ShapeDtypeStruct((3, 4), jnp.float32)) is None
    jax.jit(lambda w: np.testing.assert_equal(sample(w), None))(jnp.ones(3))


@pytest.mark.parametrize("value", [np.nan, np.inf, 3.4e38])
def test_differ_is_zero_for_values_that_are_not_finite(value):
    w = drawn(16, 16)
    w[:, ::2] = value
    with np.errstate(over="ignore"):
        assert differ(sample(w), sample(w)) == 0
