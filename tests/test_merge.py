"""Plain parameters again: with W + scale * A B, or with W bit for bit."""

import collections

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj

RNG = np.random.default_rng(0)


def weight(*shape, dtype=jnp.float32):
    return jax.device_put(np.asarray(RNG.standard_normal(shape), dtype))


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def dtypes(tree):
    return [x.dtype for x in jax.tree.leaves(tree)]


def boxed(box):
    kernel = box(weight(4, 2, 3), ("embed", "heads", "kv"))
    return {"query": {"kernel": kernel, "bias": box(weight(2, 3), ("heads", "kv"))}}


CONTAINERS = {
    "dict": lambda: {"b": {"kernel": weight(4, 3), "bias": weight(3)}, "a": weight(2)},
    "frozen": lambda: flax.core.freeze({"m": {"kernel": weight(4, 3)}, "n": weight(2)}),
    "ordered": lambda: collections.OrderedDict(
        z={"kernel": weight(4, 3)}, a={"kernel": weight(4, 3)}
    ),
    "variables": lambda: {
        "params": {"m": {"kernel": weight(4, 3)}},
        "stats": {"n": jnp.int32(3), "none": None, "empty": {}},
        "key": jax.random.key(0),
    },
    "list": lambda: [{"kernel": weight(4, 3)}, {"kernel": weight(4, 3), "x": None}],
    "tuple": lambda: {"layers": ({"kernel": weight(4, 3)}, {"bias": weight(3)})},
    "state": lambda: nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param),
    "state of modules": lambda: nnx.State(
        {"m": {0: {"kernel": nnx.Param(weight(4, 3))}, 1: nnx.Param(weight(3))}}
    ),
    "partitioned": lambda: boxed(nn.Partitioned),
    "logical": lambda: boxed(nn.LogicallyPartitioned),
    "numpy": lambda: {"m": {"kernel": np.ones((4, 3), np.float32), "x": np.ones(3)}},
    "bfloat16": lambda: {"m": {"kernel": weight(4, 3, dtype=jnp.bfloat16)}},
}

each_container = pytest.mark.parametrize("kind", CONTAINERS)


@each_container
def test_strip_restores_container_and_bits_and_shares_every_leaf(kind, randomized):
    params = CONTAINERS[kind]()
    plain = lj.strip(randomized(lj.lorafy(params, 2)))
    assert type(plain) is type(params)
    assert jax.tree.structure(plain) == jax.tree.structure(params)
    pairs = zip(jax.tree.leaves(plain), jax.tree.leaves(params), strict=True)
    assert all(x is y for x, y in pairs)


@each_container
def test_merge_restores_container_boxes_and_dtypes(kind, randomized):
    params = CONTAINERS[kind]()
    adapted = lj.lorafy(params, 2)
    assert jax.tree.structure(lj.merge(adapted)) == jax.tree.structure(params)
    if kind != "variables":  # its key has no bytes
        assert bits(lj.merge(adapted)) == bits(params), "B is zero at the start"
    merged = lj.merge(randomized(adapted))
    assert type(merged) is type(params)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert dtypes(merged) == dtypes(params)
    pairs = zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True)
    moved = [x is not y for x, y in pairs]
    n_adapters = sum(
        "lora_a" in jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(adapted)
    )
    assert sum(moved) == n_adapters, "leaves without an adapter are shared"


@pytest.mark.parametrize(
    ("dtype", "factors"),
    [
        ("float32", "float32"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float8_e4m3fn", "float32"),
        ("float32", "bfloat16"),
        ("bfloat16", "bfloat16"),
    ],
)
def test_the_sum_is_made_in_float32_and_cast_once(dtype, factors):
    # Multiples of 1/256 below 4: float32 holds every product and sum exactly, so the
    # oracle is exact and a second rounding, or a narrow sum, shows.
    numbers = lambda *shape: RNG.integers(-1023, 1024, shape) / 256
    w = numbers(16, 12).astype(jnp.dtype(dtype))
    a, b = numbers(16, 4).astype(factors), numbers(4, 12).astype(factors)
    leaves = {"kernel": w, "lora_a": a, "lora_b": b, "lora_scale": np.float32(0.5)}
    wide = np.float64
    exact = w.astype(wide) + 0.5 * (a.astype(wide) @ b.astype(wide))
    expected = exact.astype(np.float32).astype(jnp.dtype(dtype))
    narrow = w + (0.5 * (a.astype(wide) @ b.astype(wide))).astype(jnp.dtype(dtype))
    merged = lj.merge(jax.tree.map(jnp.asarray, leaves))["kernel"]
    assert merged.dtype == dtype
    assert bits(merged) == bits(expected)
    assert dtype == "float32" or bits(narrow) != bits(expected), "the test can fail"


def test_a_float64_weight_is_merged_in_float64():
    w, a, b = RNG.standard_normal((4, 3)), RNG.standard_normal((4, 2)), np.ones((2, 3))
    leaves = {"kernel": w, "lora_a": a, "lora_b": b, "lora_scale": np.float32(0.1)}
    with jax.enable_x64(True):
        merged = lj.merge(jax.tree.map(jnp.asarray, leaves))["kernel"]
        expected = w + np.float64(np.float32(0.1)) * (a @ b)
        np.testing.assert_allclose(merged, expected, rtol=1e-14)
        narrow = leaves | {"kernel": w.astype(np.float32)}
        merged = lj.merge(jax.tree.map(jnp.asarray, narrow))["kernel"]
        assert merged.dtype == np.float32


def test_numpy_float64_weights_merge_where_jax_has_no_float64(randomized):
    base = {"kernel": RNG.standard_normal((4, 3))}
    adapted = randomized(lj.lorafy(base, 2))
    a, b = np.asarray(adapted["lora_a"]), np.asarray(adapted["lora_b"])
    np.testing.assert_allclose(
        lj.merge(adapted)["kernel"], base["kernel"] + a @ b, rtol=1e-5, atol=1e-7
    )


def test_a_weight_in_the_hosts_memory_stays_there(randomized):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    host = sharding.with_memory_kind("pinned_host")
    params = {"kernel": jax.device_put(jnp.ones((4, 3)), host)}
    params = randomized(lj.lorafy(params, 2))
    want = np.ones((4, 3)) + params["lora_a"] @ params["lora_b"]
    for merged in (lj.merge(params), jax.jit(lj.merge)(params)):
        np.testing.assert_allclose(merged["kernel"], want, rtol=1e-6)
    assert lj.merge(params)["kernel"].sharding.memory_kind == "pinned_host"


def test_a_new_scale_changes_the_merged_weight_in_proportion(randomized):
    adapted = randomized(lj.lorafy({"kernel": jnp.zeros((4, 3))}, 2, alpha=6))
    once = np.asarray(lj.merge(adapted)["kernel"])
    half = lj.merge(adapted | {"lora_scale": jnp.float32(1.5)})["kernel"]
    np.testing.assert_array_equal(2 * np.asarray(half), once)
    expected = 3 * np.asarray(adapted["lora_a"]) @ np.asarray(adapted["lora_b"])
    np.testing.assert_allclose(once, expected, rtol=1e-5, atol=1e-6)


def test_several_weights_of_one_mapping_take_their_own_adapters(randomized):
    params = {"gate": weight(4, 3), "up": weight(4, 3), "kernel": weight(4, 3)}
    adapted = randomized(lj.lorafy(params, 2, targets="*"))
    merged = lj.merge(adapted)
    for name, prefix in (("gate", "gate_"), ("up", "up_"), ("kernel", "")):
        a, b = (np.asarray(adapted[f"{prefix}lora_{x}"]) for x in "ab")
        expected = np.asarray(params[name]) + a @ b
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-6)


def test_merge_and_strip_work_under_jit_and_on_shapes(randomized, close):
    adapted = randomized(lj.lorafy({"m": {"kernel": weight(4, 3)}}, 2))
    close(jax.jit(lj.merge)(adapted), lj.merge(adapted), atol=1e-6)
    shapes = jax.eval_shape(lambda: adapted)
    assert lj.strip(shapes) == {"m": {"kernel": shapes["m"]["kernel"]}}
    merged = jax.eval_shape(lj.merge, shapes)
    assert merged["m"]["kernel"].shape == (4, 3)


@pytest.mark.parametrize("use", [lj.merge, lj.strip])
def test_twice_is_refused(use):
    adapted = lj.lorafy({"m": {"kernel": weight(4, 3)}}, 2)
    with pytest.raises(ValueError, match=r"no adapters. Write params = lorafy\(params"):
        use(use(adapted))


@pytest.mark.parametrize("use", [lj.merge, lj.strip])
@pytest.mark.parametrize("part", ["lora_a", "lora_b", "lora_scale", "kernel"])
def test_a_broken_adapter_is_refused_by_path(use, part):
    adapted = lj.lorafy({"m": {"kernel": weight(4, 3)}}, 2)
    del adapted["m"][part]
    match = "'m/lora_a' belongs to no weight" if part == "kernel" else f"'m/{part}' is"
    with pytest.raises(ValueError, match=match):
        use(adapted)


def test_abstract_parameters_merge_to_abstract_ones():
    base = {"m": {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.bfloat16)}}
    assert lj.merge(lj.lorafy(base, 2)) == base
