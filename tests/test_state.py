"""Quantized weights in the state dicts and bytes of `flax.serialization`."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import lora_jax as lj

each_format = pytest.mark.parametrize("how", ["int8", "int4", "nf4"])


def base_of(*shape):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return {
        "m": {"kernel": draw(*shape), "bias": draw(shape[-1])},
        "n": {"kernel": nn.Partitioned(draw(6, 4), ("in", "out"))},
    }


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@each_format
@pytest.mark.parametrize("shape", [(6, 4), (9, 7), (2, 3, 5)])
@pytest.mark.parametrize("wrap", [dict, flax.core.freeze])
def test_from_state_restores_a_quantized_base(how, shape, wrap):
    """The target may be abstract, and the number of codes of four bits odd."""
    axes = {"m/kernel": lj.Axes((), (*range(len(shape) - 1),), (len(shape) - 1,))}
    quantize = lambda base: lj.quantize(
        base, how, axes=axes, block=3 if shape[-2] % 3 == 0 else 5
    )
    base = wrap(base_of(*shape))
    params = quantize(base)
    stored = serialization.to_bytes(params)
    for target in (params, quantize(shapes(base))):
        got = serialization.from_bytes(target, stored)
        same(got, params)
        same(lj.dequantize(got), lj.dequantize(params))
        again = serialization.from_state_dict(
            target, serialization.to_state_dict(params)
        )
        same(again, params)


@each_format
def test_to_state_packs_codes_of_four_bits(how):
    params = lj.quantize({"kernel": base_of(64, 64)["m"]["kernel"]}, how)
    bits = 8 * len(serialization.to_bytes(params)) / 64**2
    assert bits == pytest.approx(8.5 if how == "int8" else 4.5, abs=0.3)
    abstract = serialization.to_state_dict(jax.eval_shape(lambda: params))
    held = serialization.to_state_dict(params)
    describe = lambda x: (x.shape, x.dtype)
    assert jax.tree.map(describe, abstract) == jax.tree.map(describe, held)
    assert held["kernel"].keys() == {how, "scale"}


def test_to_state_leaves_traced_codes_unpacked():
    params = lj.quantize({"kernel": base_of(6, 4)["m"]["kernel"]}, "nf4", block=3)
    traced = jax.jit(serialization.to_state_dict)(params)
    same(serialization.from_state_dict(params, traced), params)


@each_format
def test_from_state_refuses_another_format_or_block(how):
    base = {"m": {"kernel": base_of(6, 4)["m"]["kernel"]}}
    stored = serialization.to_bytes(lj.quantize(base, how, block=3))
    for other in {"int8", "int4", "nf4"} - {how}:
        match = f"'m/kernel' is '{other}' in the target, found .'{how}', 'scale'.*saved"
        with pytest.raises(ValueError, match=match):
            serialization.from_bytes(lj.quantize(base, other, block=3), stored)
    match = (
        r"'scale' of 'm/kernel' has the shape \(3, 4\) .* \(2, 4\) in the checkpoint"
    )
    with pytest.raises(ValueError, match=match):
        serialization.from_bytes(lj.quantize(base, how, block=2), stored)
    other = {"m": {"kernel": base_of(6, 8)["m"]["kernel"]}}
    with pytest.raises(ValueError, match=f"'{how}' of 'm/kernel' has the shape"):
        serialization.from_bytes(lj.quantize(other, how, block=3), stored)
    with pytest.raises(ValueError, match=r"'m/kernel' is .* found ndarray in the"):
        plain = serialization.to_bytes(base)
        serialization.from_bytes(lj.quantize(base, how, block=3), plain)


@pytest.mark.parametrize(("how", "line"), [("int8", True), ("nf4", False)])
def test_quantize_and_dequantize_refuse_a_state_restored_without_a_target(how, line):
    """`Quantized` takes the codes of int8, but no packed ones."""
    base = {"m": {"kernel": base_of(6, 4)["m"]["kernel"]}}
    stored = serialization.to_bytes(lj.quantize(base, how, block=3))
    loose = serialization.msgpack_restore(stored)
    for use in (lj.dequantize, lambda p: lj.quantize(p, how)):
        with pytest.raises(ValueError, match="Restore with a target") as caught:
            use(loose)
        assert ("Or write Quantized(x['int8'], " in str(caught.value)) == line
