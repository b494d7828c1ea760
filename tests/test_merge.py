"""Tests of `merge`, W + scale * A B, and of `strip`, which keeps W bit for bit."""

import collections
import re
import warnings

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

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
    changed = [x is not y for x, y in pairs]
    n_adapters = sum(
        "lora_a" in jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(adapted)
    )
    assert sum(changed) == n_adapters, "leaves without an adapter are shared"


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
def test_merge_sums_in_float32_and_casts_once(dtype, factors):
    # Multiples of 1/256 below 4: float32 holds every product and sum exactly, so that
    # the expected values are exact, and a second rounding or a narrow sum is detected.
    dyadics = lambda *shape: RNG.integers(-1023, 1024, shape) / 256
    w = dyadics(16, 12).astype(jnp.dtype(dtype))
    a, b = dyadics(16, 4).astype(factors), dyadics(4, 12).astype(factors)
    leaves = {"kernel": w, "lora_a": a, "lora_b": b, "lora_scale": np.float32(0.5)}
    wide = np.float64
    exact = w.astype(wide) + 0.5 * (a.astype(wide) @ b.astype(wide))
    expected = exact.astype(np.float32).astype(jnp.dtype(dtype))
    narrow = w + (0.5 * (a.astype(wide) @ b.astype(wide))).astype(jnp.dtype(dtype))
    merged = lj.merge(jax.tree.map(jnp.asarray, leaves))["kernel"]
    assert merged.dtype == dtype
    assert bits(merged) == bits(expected)
    assert dtype == "float32" or bits(narrow) != bits(expected), "the test can fail"


def test_merge_sums_a_float64_weight_in_float64():
    w, a, b = RNG.standard_normal((4, 3)), RNG.standard_normal((4, 2)), np.ones((2, 3))
    leaves = {"kernel": w, "lora_a": a, "lora_b": b, "lora_scale": np.float32(0.1)}
    with jax.enable_x64(True):
        merged = lj.merge(jax.tree.map(jnp.asarray, leaves))["kernel"]
        expected = w + np.float64(np.float32(0.1)) * (a @ b)
        np.testing.assert_allclose(merged, expected, rtol=1e-14)
        narrow = leaves | {"kernel": w.astype(np.float32)}
        merged = lj.merge(jax.tree.map(jnp.asarray, narrow))["kernel"]
        assert merged.dtype == np.float32


def test_merge_of_numpy_float64_weights_without_x64(randomized):
    base = {"kernel": RNG.standard_normal((4, 3))}
    adapted = randomized(lj.lorafy(base, 2))
    a, b = np.asarray(adapted["lora_a"]), np.asarray(adapted["lora_b"])
    np.testing.assert_allclose(
        lj.merge(adapted)["kernel"], base["kernel"] + a @ b, rtol=1e-5, atol=1e-7
    )


def test_merge_keeps_a_weight_in_the_hosts_memory(randomized):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    host = sharding.with_memory_kind("pinned_host")
    params = {"kernel": jax.device_put(jnp.ones((4, 3)), host)}
    params = randomized(lj.lorafy(params, 2))
    want = np.ones((4, 3)) + params["lora_a"] @ params["lora_b"]
    for merged in (lj.merge(params), jax.jit(lj.merge)(params)):
        np.testing.assert_allclose(merged["kernel"], want, rtol=1e-6)
    assert lj.merge(params)["kernel"].sharding.memory_kind == "pinned_host"


def test_merge_is_proportional_to_the_scale(randomized):
    adapted = randomized(lj.lorafy({"kernel": jnp.zeros((4, 3))}, 2, alpha=6))
    once = np.asarray(lj.merge(adapted)["kernel"])
    half = lj.merge(adapted | {"lora_scale": jnp.float32(1.5)})["kernel"]
    np.testing.assert_array_equal(2 * np.asarray(half), once)
    expected = 3 * np.asarray(adapted["lora_a"]) @ np.asarray(adapted["lora_b"])
    np.testing.assert_allclose(once, expected, rtol=1e-5, atol=1e-6)


def test_merge_of_several_weights_in_one_mapping(randomized):
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
def test_merge_and_strip_refuse_a_plain_tree(use):
    adapted = lj.lorafy({"m": {"kernel": weight(4, 3)}}, 2)
    with pytest.raises(ValueError, match=r"no adapters. Write params = lorafy\(params"):
        use(use(adapted))


@pytest.mark.parametrize("use", [lj.merge, lj.strip])
@pytest.mark.parametrize("part", ["lora_a", "lora_b", "lora_scale", "kernel"])
def test_merge_and_strip_name_a_broken_adapter(use, part):
    adapted = lj.lorafy({"m": {"kernel": weight(4, 3)}}, 2)
    del adapted["m"][part]
    match = "'m/lora_a' belongs to no weight" if part == "kernel" else f"'m/{part}' is"
    with pytest.raises(ValueError, match=match):
        use(adapted)


def test_merge_of_abstract_parameters_is_abstract():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    for sharding in (None, NamedSharding(mesh, P("x", None))):
        w = jax.ShapeDtypeStruct((4, 3), jnp.bfloat16, sharding=sharding)
        base = {"m": {"kernel": w, "bias": w}}
        params = lj.lorafy(base, 2, also="bias")
        assert lj.merge(params) == base
        for leaf in jax.tree.leaves(lj.merge(params, dtype=jnp.float32)):
            assert (leaf.dtype, leaf.sharding) == (jnp.float32, sharding)


# Stacks of layers


def dyadic(shape, dtype="float32"):
    """Draws multiples of 1/256 below 4: float32 holds their products and sums here."""
    return jnp.asarray(RNG.integers(-1023, 1024, shape) / 256, jnp.float32).astype(
        dtype
    )


def stack_of(at, dtype):
    """Three layers along dimension `at`, with an adapter."""
    shape = [8, 6]
    shape.insert(at, 3)
    inputs, outputs = (d for d in range(3) if d != at)
    axes = {"w": lj.Axes((at,), (inputs,), (outputs,))}
    params = lj.lorafy({"w": dyadic(shape, dtype)}, 2, targets="*", axes=axes)
    for name in ("w_lora_a", "w_lora_b"):
        params[name] = dyadic(params[name].shape)
    return params | {"w_lora_scale": jnp.float32([0.5, 1, 2])}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_of_a_stack_is_that_of_each_layer(at, dtype, wrap):
    params = stack_of(at, dtype)
    got = np.moveaxis(np.asarray(wrap(lj.merge)(params)["w"]), at, 0)
    for i, scale in enumerate([0.5, 1, 2]):
        take = lambda x, i=i: np.take(np.asarray(x, np.float64), i, at)
        w = take(params["w"])
        a, b = params["w_lora_a"], params["w_lora_b"]
        if a.ndim == 4:  # both have the dimensions of the stack, then the rank
            update = np.sum(np.asarray(a, np.float64) * np.asarray(b, np.float64), -1)
            update = take(update)
        else:
            update = np.asarray(a[i], np.float64) @ np.asarray(b[i], np.float64)
        want = (w + scale * update).astype(np.float32).astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(got[i], want)


@pytest.mark.parametrize("how", [None, "int8", "nf4"])
@pytest.mark.parametrize("dora", [False, True])
def test_merge_of_a_stack_with_magnitudes_or_quantized(how, dora, randomized, close):
    axes = {"kernel": lj.Axes((0,), (1,), (2,))}
    base = {"kernel": weight(3, 8, 6)}
    if how:
        base = lj.quantize(base, how, axes=axes, block=4)
    params = randomized(lj.lorafy(base, 2, axes=axes, dora=dora))

    @jax.jit
    def each_layer(params):
        one = lambda i: lj.merge(jax.tree.map(lambda x: x[i], params))["kernel"]
        return jnp.stack([one(i) for i in range(3)])

    want = each_layer(params)
    close(lj.merge(params)["kernel"], want)
    close(jax.jit(lj.merge)(params)["kernel"], want)


@pytest.mark.parametrize("how", [None, "nf4"])
def test_merge_of_a_stack_makes_floats_of_one_layer(how):
    axes = {"kernel": lj.Axes((0,), (1,), (2,))}
    temporaries = []
    for layers in (1, 16):
        w = jax.ShapeDtypeStruct((layers, 64, 64), jnp.bfloat16)
        base = {"kernel": w}
        base = lj.quantize(base, how, axes=axes) if how else base
        params = lj.lorafy(base, 2, axes=axes)
        compiled = jax.jit(lj.merge).lower(params).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    assert temporaries[1] < temporaries[0] + 2 * 64 * 64 * 4


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("x", None, "y"), P("y", "x"), P(None, "x", "y")])
def test_merge_keeps_the_sharding_of_a_stack(kind, spec, randomized, close):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    at = NamedSharding(mesh, spec)
    base = {"kernel": weight(8, 16, 8, dtype=jnp.bfloat16)}
    axes = {"kernel": lj.Axes((0,), (1,), (2,))}
    want = lj.merge(randomized(lj.lorafy(base, 2, axes=axes)))["kernel"]
    base = {"kernel": jax.device_put(base["kernel"], at)}
    placed = lj.lorafy(base, 2, axes=axes)
    params = jax.tree.map(
        lambda x, y: jax.device_put(x, y.sharding), randomized(placed), placed
    )
    merged = lj.merge(params)["kernel"]
    assert merged.sharding.is_equivalent_to(at, 3)
    close(merged.astype("float32"), want.astype("float32"), atol=0.02)
    if kind == AxisType.Explicit:
        text = jax.jit(lj.merge).lower(params).compile().as_text()
        assert f"[{8},{16},{8}]" not in text, "no device has the whole stack"


# The dtype, and what rounding loses


def test_merge_to_a_dtype_rounds_once_to_it():
    """For adapted weights and trained copies; other leaves keep their dtype."""
    params = {
        "m": {"kernel": dyadic((16, 12), "bfloat16"), "bias": dyadic(12, "bfloat16")},
        "table": {"embedding": dyadic((5, 4), "bfloat16")},
    }
    adapted = lj.lorafy(params, 4, also="bias")
    a, b = dyadic((16, 4)), dyadic((4, 12))
    adapted["m"] |= {"lora_a": a, "lora_b": b, "bias_lora_w": dyadic(12) + 2**-12}
    exact = np.asarray(params["m"]["kernel"], float) + np.asarray(a, float) @ b
    for dtype in ("float32", "float16", "bfloat16", None):
        for wrap in (lambda f: f, jax.jit):
            merged = wrap(lambda p, dtype=dtype: lj.merge(p, dtype=dtype))(adapted)
            to = jnp.dtype(dtype or "bfloat16")
            want = exact.astype(np.float32).astype(to)
            assert bits(merged["m"]["kernel"]) == bits(want)
            bias = np.asarray(adapted["m"]["bias_lora_w"]).astype(to)
            assert bits(merged["m"]["bias"]) == bits(bias)
            assert merged["table"]["embedding"].dtype == jnp.bfloat16
    base = lj.quantize(params, "int8", targets=["kernel", "table"])
    merged = lj.merge(lj.lorafy(base, 2), dtype=jnp.float32)
    assert merged["m"]["kernel"].dtype == jnp.float32
    assert merged["table"]["embedding"].dtype == jnp.bfloat16
    with pytest.raises(
        ValueError, match=r"floating, found int8. Write merge\(params, dt"
    ):
        lj.merge(adapted, dtype=jnp.int8)


def lost_share(w, update, dtype):
    """Returns the share of an update that rounding the sum loses, in NumPy."""
    w, update = np.asarray(w, np.float64), np.asarray(update, np.float64)
    rounded = (w + update).astype(np.float32).astype(dtype).astype(np.float64)
    return np.linalg.norm(rounded - w - update) / np.linalg.norm(update)


def with_update(w, size, stack=False):
    """Returns a weight with an adapter, whose update has this size relative to it."""
    params = lj.lorafy({"kernel": w}, 4, axes=AXES if stack else None)
    a, b = (RNG.standard_normal(params[k].shape) for k in ("lora_a", "lora_b"))
    factor = size * np.std(np.asarray(w, np.float64)) / np.std(a @ b)
    params |= {"lora_a": jnp.asarray(a, "float32")}
    params |= {"lora_b": jnp.asarray(b * factor, "float32")}
    return params, a @ b * factor


AXES = {"kernel": lj.Axes((0,), (1,), (2,))}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(64, 32), (4, 32, 16)])
@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 0.1])
def test_merge_warns_where_rounding_loses_most_of_an_update(dtype, shape, size):
    w = weight(*shape, dtype=dtype)
    params, update = with_update(w, size, len(shape) == 3)
    share = lost_share(w, update, jnp.dtype(dtype))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lj.merge(params)
    assert abs(share - 0.5) > 1e-3, "the sizes of this test are clear cases"
    assert len(caught) == (share > 0.5)
    if caught:
        text, lost = str(caught[0].message), f"{min(share, 1):.0%}"
        assert f"'kernel' ({lost} in {dtype})" in text
        assert "merge(params, dtype=jnp.float32)" in text
        assert caught[0].filename == __file__
    lj.merge(params, dtype=jnp.float32)  # warnings are errors
    jax.jit(lj.merge)(params)
    jax.eval_shape(lj.merge, params)


def test_merge_warns_with_magnitudes_and_quantized_weights():
    w = weight(64, 32, dtype=jnp.bfloat16)
    params, _ = with_update(w, 1e-4)
    quantized = params | lj.quantize({"kernel": w}, "int8")
    norm = np.linalg.norm(np.asarray(w, np.float64), axis=0)
    dora = params | {"lora_magnitude": jnp.asarray(norm, jnp.float32)}
    for p in (quantized, dora):
        with pytest.warns(UserWarning, match=r"'kernel' \(\d+% in bfloat16\)"):
            lj.merge(p)
    larger = dora | {"lora_magnitude": jnp.asarray(1.1 * norm, jnp.float32)}
    lj.merge(larger)


def test_merge_warns_once_and_lists_six_weights():
    params = {
        str(i): with_update(weight(8, 8, dtype="bfloat16"), 1e-5)[0] for i in range(8)
    }
    params["0"], _ = with_update(weight(8, 8, dtype="bfloat16"), 0.1)
    with pytest.warns(UserWarning, match="loses most of the updates of") as caught:
        lj.merge(params)
    assert len(caught) == 1
    assert re.findall(r"'(\d)/kernel'", str(caught[0].message)) == [*"123456"]
    assert "'6/kernel' (100% in bfloat16), .... To keep them" in str(caught[0].message)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_merge_does_not_warn_of_a_zero_update(dtype):
    lj.merge(lj.lorafy({"kernel": weight(8, 8).astype(dtype)}, 2))


def test_merge_does_not_warn_of_a_trained_copy():
    """`lora` also rounds a copy to the leaf's dtype, so that merging loses nothing."""
    base = {"kernel": weight(8, 8), "scale": jnp.ones(8, jnp.bfloat16)}
    params = lj.lorafy(base, 2, also="scale")
    params |= {"scale_lora_w": jnp.full(8, 1.001)}
    np.testing.assert_array_equal(lj.merge(params)["scale"], 1)
    np.testing.assert_array_equal(
        lj.merge(params, dtype=jnp.float32)["scale"], np.float32(1.001)
    )
