"""Quantized arrays: their values, their errors, and views of codes and scales."""

import dataclasses
import pickle
import re
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax._engine.jaxpr import CALLS, bind, call_jaxpr, evaluate, trace
from lora_jax._engine.quantized import (
    FORMATS,
    NF4,
    Quantized,
    _make,
    dequantize,
    format_name,
    is_quantized,
    like,
    nbytes,
    quantize_array,
    through,
    widened,
    wrong,
)
from lora_jax._engine.quantized_views import part_specs

RNG = np.random.default_rng(0)
each_format = pytest.mark.parametrize("how", FORMATS)
COLLECTIVES = "all-gather", "all-to-all", "collective-permute", "all-reduce"


def normal(*shape, dtype=np.float32):
    return jax.device_put(np.asarray(RNG.standard_normal(shape), dtype))


def drawn(how, shape, sizes, dtypes=("float32",)):
    """Returns a quantized array with codes of the full range, and bfloat16 scales."""
    n = 128 if how == "int8" else 8
    values = jax.device_put(np.asarray(RNG.integers(-n, n, shape), jnp.int32))
    scale = jax.device_put(np.asarray(RNG.uniform(0.5, 2, sizes), jnp.bfloat16))
    return Quantized(values.astype(FORMATS[how]), scale, dtypes, how)


def in_numpy(q):
    """Dequantizes in NumPy: each code's value times the scale of its block."""
    first, *rest = q.dtypes
    wide = np.float32 if first == np.float16 else first
    values = np.asarray(q.values).astype(int)
    table = np.array(NF4, np.float64).astype(wide)
    elements = table[values + 8] if q.format == "nf4" else values.astype(wide)
    scale = np.asarray(q.scale)
    for d, (n, m) in enumerate(zip(q.shape, q.scale.shape, strict=True)):
        scale = np.repeat(scale, n // m, d)
    w = (elements * scale.astype(wide)).astype(first)
    for dtype in rest:
        w = w.astype(dtype)
    return w


def same(got, want):
    assert got.dtype == want.dtype and got.shape == want.shape
    assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


# Values


@each_format
@pytest.mark.parametrize(
    "sizes", [(1, 1), (4, 1), (2, 6), (8, 1), (8, 6), (1, 3), (4, 2)]
)
def test_dequantize_blocks_along_any_dimensions(how, sizes):
    q = drawn(how, (8, 6), sizes)
    same(dequantize(q), in_numpy(q))
    assert (q.shape, q.ndim, q.size, q.dtype) == ((8, 6), 2, 48, jnp.float32)


@each_format
@pytest.mark.parametrize(
    "dtypes",
    [
        ("bfloat16",),
        ("float16",),
        ("float32",),
        ("bfloat16", "float32"),
        ("float32", "bfloat16", "float16", "float32"),
        ("float8_e4m3fn", "bfloat16"),
    ],
)
def test_dequantize_to_one_dtype_or_several_in_sequence(how, dtypes):
    q = drawn(how, (4, 2, 6), (4, 1, 3), dtypes)
    if dtypes[0] == "float8_e4m3fn":  # dequantizes to float32, and casts the result
        from_float32 = dataclasses.replace(q, dtypes=("float32", *dtypes))
        same(dequantize(q), in_numpy(from_float32))
    else:
        same(dequantize(q), in_numpy(q))
    assert q.dtype == jnp.dtype(dtypes[-1]) == like(q).dtype
    assert like(q).shape == q.shape


def test_dequantize_keeps_the_digits_of_small_scales_in_half_precision():
    q = Quantized(jnp.full((4, 2), 127, jnp.int8), jnp.full((1, 2), 1e-7), ("float16",))
    np.testing.assert_allclose(dequantize(q), np.float16(1.27e-5))


def test_dequantize_returns_a_plain_array_unchanged():
    w = normal(3)
    assert dequantize(w) is w and like(w) is w
    assert nbytes(w) == 12 and not is_quantized(w)


def test_dequantize_a_scalar():
    q = drawn("nf4", (), ())
    same(dequantize(q), in_numpy(q))


@each_format
def test_quantize_array_is_exact_on_the_values_of_a_format(how):
    """Multiples of the scale by a format's values are stored exactly."""
    levels = np.array(NF4) if how == "nf4" else np.arange(-128, 128.0)
    if how == "int4":
        levels = np.arange(-8, 8.0)
    most = {"int8": 127.5, "int4": 7.5, "nf4": 1.0}[how]
    w = jnp.asarray([[*levels[1:], most]], jnp.float32) / 4
    q = quantize_array(w, how, (1, 1))
    np.testing.assert_array_equal(q.scale, [[0.25]])
    np.testing.assert_array_equal(dequantize(q)[0, :-1], w[0, :-1])


@each_format
def test_quantize_array_rounds_to_the_nearest_value(how):
    w = normal(64, 5)
    q = quantize_array(w, how, (4, 5))
    scale = np.repeat(np.asarray(q.scale, np.float32), 16, 0)
    levels = {"int8": np.arange(-128, 128), "int4": np.arange(-8, 8), "nf4": NF4}[how]
    choices = scale[..., None] * np.asarray(levels, np.float32)
    nearest = np.abs(choices - np.asarray(w)[..., None]).min(-1)
    np.testing.assert_allclose(np.abs(dequantize(q) - w), nearest, atol=1e-6)


@each_format
def test_quantize_array_of_zeros_and_of_nonfinite_blocks(how):
    w = jnp.zeros((8, 3)).at[4, 1].set(jnp.inf).at[5, 2].set(jnp.nan)
    q = quantize_array(w, how, (2, 3))
    np.testing.assert_array_equal(dequantize(q)[:4], 0)
    finite = np.isfinite(np.asarray(q.scale, np.float32))
    np.testing.assert_array_equal(finite, [[True] * 3, [True, False, False]])


def test_nf4_values_are_quantiles_of_a_normal_distribution():
    """Computes them like bitsandbytes, with its rounded offset."""
    draw, offset = NormalDist().inv_cdf, 0.9677083
    quantiles = [draw(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    quantiles += [0.0, *(-draw(p) for p in np.linspace(offset, 0.5, 8)[:-1])]
    np.testing.assert_allclose(NF4, np.sort(quantiles) / max(quantiles), atol=2e-7)


def expected(w, how, sizes):
    """Quantizes in NumPy: returns codes, scales, and the scaled elements."""
    split = [n for n, m in zip(w.shape, sizes, strict=True) for n in (m, n // m)]
    blocks = np.asarray(w, np.float32).reshape(split)
    most = np.abs(blocks).max(tuple(range(1, 2 * w.ndim, 2)), keepdims=True)
    bound = {"int8": 127.5, "int4": 7.5, "nf4": 1.0}[how]
    scale = (most / np.float32(bound)).astype(jnp.bfloat16)
    scale[scale == 0] = 1
    x = blocks / scale.astype(np.float32)
    if how == "nf4":
        codes = np.abs(x[..., None] - np.array(NF4)).argmin(-1) - 8
    else:
        n = {"int8": 128, "int4": 8}[how]
        codes = np.clip(np.round(x), -n, n - 1)
    return codes.reshape(w.shape), scale.reshape(sizes), x.reshape(w.shape)


@each_format
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_quantize_array_agrees_with_numpy(how, jit, seed):
    """Draws shapes, blocks, dtypes and stacks; runs compiled and eagerly."""
    rng = np.random.default_rng(seed)
    shape = rng.choice([1, 2, 4, 6, 8], rng.integers(1, 5))
    sizes = [int(rng.choice([m for m in (1, 2, n) if n % m == 0])) for n in shape]
    dtype = ["float32", "bfloat16", "float16", "float8_e4m3fn"][seed]
    w = jnp.asarray(rng.standard_normal(shape), dtype)
    batch = [d for d in range(w.ndim) if rng.random() < 0.5]
    for d in batch:
        sizes[d] = w.shape[d]
    make = lambda w: quantize_array(w, how, sizes, batch)
    q = (jax.jit(make) if jit else make)(w)
    codes, scale, x = expected(w, how, tuple(sizes))
    assert (q.format, q.dtypes) == (how, (jnp.dtype(dtype),))
    np.testing.assert_array_equal(q.scale, scale)
    # XLA multiplies by the reciprocal of a scale, so ties may round either way.
    tie = np.abs(x - np.round(x)) > 0.499 if how != "nf4" else False
    assert np.all((np.asarray(q.values, int) == codes) | tie)


@pytest.mark.parametrize("jit", [False, True])
@each_format
def test_quantize_array_computes_codes_for_the_stored_scale(how, jit):
    """In large enough fusions XLA removes a cast to bfloat16 and back."""
    w = 0.02 * np.random.default_rng(1).standard_normal((4096, 64), np.float32)
    make = lambda w: quantize_array(w, how, (64, 64))
    q = (jax.jit(make) if jit else make)(w)
    codes, scale, _ = expected(w, how, (64, 64))
    np.testing.assert_array_equal(q.scale, scale)
    assert np.mean(np.asarray(q.values, int) != codes) < 1e-4  # ties


@pytest.mark.parametrize(
    ("dtypes", "kept"),
    [
        (("bfloat16",), False),
        (("float16",), False),
        (("float32", "bfloat16", "float32"), True),
        (("bfloat16", "float32"), True),
        (("float32", "float16", "float32"), True),
        (("float32",), True),
    ],
)
def test_widened_rounds_values_under_jit(dtypes, kept):
    """So does `dequantize`, if the dtype of the array is wide enough to show it."""
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.integers(-127, 128, (1024, 64)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.5, 1.5, (16, 64)), jnp.float32)
    q = Quantized(values, scale, dtypes)
    want = np.max(in_numpy(q).astype(np.float32), 0)
    largest = lambda w: jnp.max(w, 0)
    got = [jax.jit(lambda q: largest(widened(q, jnp.float32)))(q)]
    if kept:
        got.append(jax.jit(lambda q: largest(dequantize(q)))(q))
    for x in got:
        np.testing.assert_array_equal(x, want)


# Stacks: one layer at a time


def floats(layers, how, dtype=jnp.bfloat16):
    """Returns the bytes of temporaries for quantizing a stack."""
    make = lambda w: quantize_array(
        w, how, (layers, 8 if how != "int8" else 1, 64), [0]
    )
    w = jax.ShapeDtypeStruct((layers, 128, 64), dtype)
    return jax.jit(make).lower(w).compile().memory_analysis().temp_size_in_bytes


@each_format
def test_quantize_array_of_a_stack_makes_floats_of_one_layer(how):
    one, stack = floats(1, how), floats(16, how)
    assert stack < one + 2 * 128 * 64 * 4


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("spec", "reduced"),
    [
        (P("x", None, "y"), False),
        (P("y", "x"), True),  # one scale for inputs on several devices
        (P(("x", "y")), False),
        (P(None, "x", "y"), True),
    ],
)
@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_quantize_array_gathers_no_stack(kind, spec, reduced, how):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    at = NamedSharding(mesh, spec)
    w = jax.device_put(normal(16, 32, 8, dtype=jnp.bfloat16), at)
    sizes = (16, 1 if how == "int8" else 8, 8)
    q = quantize_array(w, how, sizes, [0])
    want = quantize_array(np.asarray(w), how, sizes)
    same(q.values, want.values), same(q.scale, want.scale)
    assert q.values.sharding.spec == spec
    names = (*spec, None, None)[:3]
    names = P(*(n if m > 1 else None for n, m in zip(names, sizes, strict=True)))
    assert q.scale.sharding.is_equivalent_to(NamedSharding(mesh, names), 3)
    parts = {"x": 2, "y": 4, ("x", "y"): 8, None: 1}[spec[0]]
    options = {"static_argnums": (1, 2, 3), "out_shardings": (at, q.scale.sharding)}
    make = jax.jit(_make, **options)
    text = make.lower(w, how, sizes, ((0, parts),)).compile().as_text()
    crossed = {name for name in COLLECTIVES if f" {name}(" in text}
    assert crossed == ({"all-reduce"} if reduced and how == "int8" else set())
    if kind == AxisType.Explicit:
        traced = jax.jit(lambda w: quantize_array(w, how, sizes, [0]))
        traced = traced.lower(w).compile()
        same(traced(w).values, want.values)
        text = traced.as_text()
        assert crossed == {name for name in COLLECTIVES if f" {name}(" in text}


# Formats


def test_quantized_formats_of_equal_codes_are_different_trees():
    codes, scale = jnp.ones((4, 6), jnp.int4), jnp.ones((2, 6))
    four, nf4 = (Quantized(codes, scale, ("float32",), *f) for f in ([], ["nf4"]))
    assert (four.format, nf4.format) == ("int4", "nf4")
    assert Quantized(jnp.ones((4, 6), jnp.int8), scale, ("float32",)).format == "int8"
    assert jax.tree.structure(four) != jax.tree.structure(nf4)
    names = [
        jax.tree_util.keystr(path)
        for x in (four, nf4)
        for path, _ in jax.tree_util.tree_leaves_with_path(x)
    ]
    assert names == [".int4", ".scale", ".nf4", ".scale"]
    np.testing.assert_array_equal(dequantize(four), 1)
    np.testing.assert_array_equal(dequantize(nf4), np.float32(NF4[9]))
    mixed = on(lambda x, y: jnp.concatenate([x, y]), four, nf4)
    assert not is_quantized(mixed)
    want = np.repeat(np.float32([[1], [NF4[9]]]), 4, 0)
    np.testing.assert_array_equal(mixed, np.broadcast_to(want, (8, 6)))


@each_format
def test_quantized_array_is_a_pytree_and_pickles(how):
    q = drawn(how, (4, 6), (2, 6), ("bfloat16", "float32"))
    again = jax.tree.map(lambda x: x, q)
    for x in (again, pickle.loads(pickle.dumps(q))):
        assert jax.tree.structure(x) == jax.tree.structure(q)
        same(x.values, q.values), same(x.scale, q.scale)
    holes = jax.tree.map(lambda x: None, q)
    assert (holes.format, holes.dtypes) == (how, q.dtypes)


@pytest.mark.parametrize("shape", [(128, 6), (2, 64, 3)])
def test_quantized_from_bitsandbytes_codes(shape):
    """A byte holds two codes plus 8, the first one in the high bits."""
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, np.prod(shape) // 2).astype(np.uint8)
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(shape)
    scale = rng.uniform(0.5, 2, (*shape[:-2], shape[-2] // 64, shape[-1]))
    scale = scale.astype(np.float32)
    values = jnp.asarray(codes.astype(np.int8) - 8).astype(jnp.int4)
    q = Quantized(values, jnp.asarray(scale), ("float32",), "nf4")
    assert wrong(q) is None
    want = np.float32(NF4)[codes] * np.repeat(scale, 64, -2)
    np.testing.assert_array_equal(dequantize(q), want)


# Errors, compared with published ones

ERRORS = {  # by format and block: relative Frobenius errors of N(0, 0.02^2)
    ("int8", 1024): 0.0086,
    ("int8", 64): 0.0060,
    ("int4", 32): 0.0947,
    ("int4", 64): 0.1027,
    ("nf4", 32): 0.0873,
    ("nf4", 64): 0.0920,
    ("nf4", 128): 0.0956,
}


def gap(w, v):
    return float(np.linalg.norm(np.asarray(v) - w) / np.linalg.norm(w))


@pytest.mark.parametrize(("how", "block"), ERRORS)
def test_quantize_array_has_the_published_errors(how, block):
    w = 0.02 * np.random.default_rng(1).standard_normal((4096, 64), np.float32)
    n = 4096 if block == 1024 else block
    q = quantize_array(w, how, (4096 // n, 64))
    assert gap(w, dequantize(q)) == pytest.approx(ERRORS[how, block], rel=0.02)


def test_quantize_array_has_the_nf4_error_of_bitsandbytes():
    w = np.random.default_rng(0).standard_normal((1024, 512), np.float32)
    q = quantize_array(w, "nf4", (16, 512))
    assert np.abs(np.asarray(dequantize(q)) - w).mean() == pytest.approx(
        0.072792, abs=2e-4
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", [64, 256])
@each_format
def test_quantize_array_has_the_errors_of_qwix(how, block, third_party):
    qwix = pytest.importorskip("qwix")
    w = 0.02 * np.random.default_rng(1).standard_normal((256, 128), np.float32)
    theirs = qwix.quantize(
        jnp.asarray(w), how, channelwise_axes=(1,), tiled_axes={0: block}
    )
    q = quantize_array(w, how, (256 // block, 128))
    want = gap(w, qwix.dequantize(theirs))
    assert gap(w, dequantize(q)) == pytest.approx(want, rel=5e-3)
    values = theirs.qvalue
    if how == "nf4":  # qwix's codes are 0 to 15
        values = (values.astype(jnp.int8) - 8).astype(jnp.int4)
    taken = Quantized(values, theirs.scale, (jnp.float32,), how)
    np.testing.assert_allclose(dequantize(taken), qwix.dequantize(theirs), rtol=1e-6)


# Names and sizes


@pytest.mark.parametrize(
    ("q", "name", "size"),
    [
        (drawn("nf4", (128, 6), (2, 6)), "nf4/64", 128 * 6 // 2 + 24),
        (drawn("int4", (128, 3), (1, 3)), "int4/128", 192 + 6),
        (drawn("int8", (5, 3), (1, 3)), "int8/5", 15 + 6),
        (drawn("int4", (3, 3), (3, 3)), "int4/1", 5 + 18),  # 4.5 bytes
    ],
)
def test_format_name_and_nbytes(q, name, size):
    assert format_name(q) == name and nbytes(q) == size
    abstract = jax.eval_shape(lambda: q)
    assert format_name(abstract) == name and nbytes(abstract) == size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4", "uint8", "bool"])
def test_nbytes_of_plain_arrays(dtype):
    bits = {"float32": 32, "bfloat16": 16, "int4": 4, "uint8": 8, "bool": 8}[dtype]
    assert nbytes(jax.ShapeDtypeStruct((3, 5), dtype)) == -(-15 * bits // 8)


def test_nbytes_of_keys():
    assert nbytes(jax.random.key(0)) == 8


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"values": jnp.ones((4, 6), jnp.int16)}, "its values are int16"),
        ({"values": jnp.ones((4, 6))}, "its values are float32"),
        ({"values": jnp.ones((4, 6), jnp.uint4)}, r"uint4, .*astype\(jnp.int8\) - 8\)"),
        ({"values": jnp.ones((4, 6), jnp.int4)}, "int4, and those of 'int8' are int8"),
        ({"format": "nf4"}, "its values are int8, and those of 'nf4' are int4"),
        ({"format": "fp4"}, "its format is 'fp4', and may be 'int8', 'int4', 'nf4'"),
        ({"scale": jnp.ones((2, 6), jnp.int32)}, "scale and dtypes must be floating"),
        ({"dtypes": ("int8",)}, "scale and dtypes must be floating"),
        ({"scale": jnp.ones((3, 6))}, r"shape \(3, 6\) makes no blocks of \(4, 6\)"),
        ({"scale": jnp.ones((6,))}, "makes no blocks"),
        ({"scale": jnp.ones((1, 2, 6))}, "makes no blocks"),
        ({"scale": jnp.ones((0, 6))}, "makes no blocks"),
        ({"scale": jnp.ones((8, 6))}, "makes no blocks"),
        ({"scale": None}, "its scale is None, no array"),
        ({"values": 3}, "its values is 3, no array"),
        ({"dtypes": ()}, "it names no dtype"),
    ],
)
def test_wrong_names_the_problem(changes, why):
    good = drawn("int8", (4, 6), (2, 6))
    assert wrong(good) is None
    assert re.search(why, wrong(dataclasses.replace(good, **changes)))


# Views


def on(fn, *args):
    """Evaluates a function by equations, on arguments that can be quantized."""
    traced = trace(fn, *args)
    leaves = jax.tree.leaves(args, is_leaf=is_quantized)

    def apply(i, eqn, operands):
        if eqn.primitive.name in CALLS:
            return evaluate(call_jaxpr(eqn), operands, apply)
        return bind(eqn, operands)

    # `traced.restore` takes arrays only, and these results may be quantized.
    zeros = [np.zeros(t.shape, t.dtype) for t in traced.jaxpr.out_avals]
    treedef = jax.tree.structure(traced.restore(zeros))
    return jax.tree.unflatten(treedef, evaluate(traced.jaxpr, leaves, apply))


IDS = np.array([[0, 3], [1, 1]])
M, BLOCKS = (32, 6), (4, 6)  # rows in blocks of 8
KEPT = {  # (function, shape, blocks) of views that stay quantized
    "transpose": (lambda w: w.T, M, BLOCKS),
    "copy": (lambda w: jnp.copy(w), M, BLOCKS),
    "cast": (lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), M, BLOCKS),
    "outputs split": (lambda w: w.reshape(32, 2, 3), M, BLOCKS),
    "inputs split on blocks": (lambda w: w.reshape(2, 16, 6), M, BLOCKS),
    "inputs split in a block": (lambda w: w.reshape(4, 8, 6), M, BLOCKS),
    "inputs split below a block": (lambda w: w.reshape(8, 4, 6), M, BLOCKS),
    "merged before blocks": (lambda w: w.reshape(64, 6), (2, 32, 6), (2, 4, 6)),
    "heads merged": (lambda w: w.reshape(32, 6), (32, 2, 3), (4, 2, 3)),
    "whole columns split": (lambda w: w.reshape(4, 8, 6), M, (1, 6)),
    "ones": (lambda w: w[None].reshape(1, 32, 1, 6)[0, :, 0], M, BLOCKS),
    "squeeze": (lambda w: lax.squeeze(w, [0]), (1, 32, 6), (1, 4, 6)),
    "broadcast": (lambda w: jnp.broadcast_to(w, (3, 32, 6)), M, BLOCKS),
    "broadcast of a row": (lambda w: jnp.broadcast_to(w, (5, 6)), (1, 6), (1, 3)),
    "slice on blocks": (lambda w: lax.slice(w, (8, 1), (24, 5), (1, 2)), M, BLOCKS),
    "slice within whole columns": (lambda w: w[3:7, :2], M, (1, 6)),
    "strided whole columns": (
        lambda w: lax.slice(w, (1, 0), (32, 6), (3, 1)),
        M,
        (1, 6),
    ),
    "split on blocks": (lambda w: jnp.split(w, [8, 24]), M, BLOCKS),
    "split into halves of blocks": (lambda w: jnp.split(w, 4), M, (2, 6)),
    "split of outputs": (lambda w: jnp.split(w, 2, axis=1), M, BLOCKS),
    "layers": (lambda w: list(jnp.unstack(w)), (3, 8, 2), (3, 1, 2)),
    "layers of one scale": (lambda w: list(jnp.unstack(w)), (3, 8, 2), (1, 1, 2)),
    "outputs reversed": (lambda w: w[:, ::-1], M, BLOCKS),
    "whole columns reversed": (lambda w: w[::-1], M, (1, 6)),
    "blocks reversed": (lambda w: w[::-1], M, BLOCKS),
    "a layer": (
        lambda w, i: lax.dynamic_index_in_dim(w, i, keepdims=False),
        (3, 8, 2),
        (3, 1, 2),
    ),
    "rows of whole columns": (
        lambda w, i: lax.dynamic_slice(w, (i, i), (8, 2)),
        M,
        (1, 6),
    ),
    "rows looked up": (lambda w: jnp.take(w, IDS, axis=0), (5, 16), (5, 2)),
    "layers looked up": (lambda w: w[IDS[0]], (4, 8, 2), (4, 1, 2)),
    "side by side": (
        lambda w: jnp.concatenate([w, w[:, 1:]], axis=1),
        M,
        BLOCKS,
    ),
    "one after another": (lambda w: jnp.concatenate([w, w[8:]]), M, BLOCKS),
    "negation": (lambda w: -w, M, BLOCKS),
    "twice": (lambda w: 2 * w, M, BLOCKS),
    "a half": (lambda w: w / 2, M, BLOCKS),
    "columns times vectors": (lambda w: w * jnp.exp2(jnp.arange(6.0))[None], M, BLOCKS),
    "lookup within columns": (lambda w: w[IDS], (5, 16), (1, 16)),
}
if hasattr(jnp, "unstack"):
    KEPT["stack"] = (lambda w: jnp.stack([w, -w], axis=1), M, BLOCKS)
DEQUANTIZED = {  # views that blocks cannot follow
    "blocks merged": (lambda w: w.reshape(-1), M, BLOCKS),
    "slice across blocks": (lambda w: w[3:20], M, BLOCKS),
    "blocks strided": (lambda w: w[::2], M, BLOCKS),
    "split across blocks": (lambda w: jnp.split(w, [3]), M, BLOCKS),
    "rows within blocks": (
        lambda w, i: lax.dynamic_slice_in_dim(w, i, 8),
        M,
        BLOCKS,
    ),
    "lookup within blocks": (lambda w: w[IDS], M, BLOCKS),
    "lookup that fills in": (
        lambda w: jnp.take(w, IDS, axis=0, mode="fill"),
        (5, 16),
        (1, 16),
    ),
    "halves of blocks side by side": (
        lambda w: jnp.concatenate([w, w[:, :3].reshape(8, 12)[:, :6]]),
        M,
        BLOCKS,
    ),
    "with an array": (lambda w: jnp.concatenate([w, jnp.ones((2, 6))]), M, BLOCKS),
    "rows times a vector": (lambda w: w * jnp.arange(32.0)[:, None], M, BLOCKS),
    "times itself": (lambda w: w * w, M, BLOCKS),
    "one over it": (lambda w: 2 / (w + 100), M, BLOCKS),
    "padded": (lambda w: jnp.pad(w, 1), M, BLOCKS),
    "a sum": (lambda w: w + 1, M, BLOCKS),
    "no rows": (lambda w: w[8:8].reshape(0, 2, 3), M, BLOCKS),
    "no copies": (lambda w: jnp.broadcast_to(w, (0, 32, 6))[:, 1:], M, BLOCKS),
    "rounded, then twice": (
        lambda w: 0.7 * w.astype("bfloat16").astype("f4"),
        M,
        BLOCKS,
    ),
    "cast to integers": (lambda w: w.astype(jnp.int32), M, BLOCKS),
    "complex": (lambda w: lax.mul(w.astype(jnp.complex64), jnp.full(M, 1j)), M, BLOCKS),
}


def test_mul_by_a_float64_scalar_keeps_its_precision():
    with jax.enable_x64(True):
        q = drawn("int8", M, BLOCKS, ("float64",))
        got = on(lambda w: w * np.pi, q)
        assert is_quantized(got)
        np.testing.assert_allclose(dequantize(got), in_numpy(q) * np.pi, rtol=1e-15)


def viewed(how, case):
    fn, shape, sizes = case
    q = drawn(how, shape, sizes)
    more = [np.int32(1)][: fn.__code__.co_argcount - 1]
    got = jax.jit(lambda *args: on(fn, *args))(q, *more)
    return got, jax.jit(fn)(in_numpy(q), *more)


@pytest.mark.parametrize("name", KEPT)
def test_views_of_codes_and_scales(name):
    how = list(FORMATS)[len(name) % 3]
    got, want = viewed(how, KEPT[name])
    for x, y in zip(
        *(jax.tree.leaves(t, is_leaf=is_quantized) for t in (got, want)), strict=True
    ):
        assert is_quantized(x) and wrong(x) is None
        same(in_numpy(x), y)


@pytest.mark.parametrize("name", DEQUANTIZED)
def test_views_that_blocks_cannot_follow_are_dequantized(name):
    got, want = viewed("int4", DEQUANTIZED[name])
    for x, y in zip(
        *(jax.tree.leaves(t, is_leaf=is_quantized) for t in (got, want)), strict=True
    ):
        assert not is_quantized(x)
        same(x, y)


# Lookups never dequantize the entire table


@pytest.mark.parametrize("mode", ["clip", "fill", "wrap", None])
@each_format
def test_take_dequantizes_only_rows(how, mode):
    """Out-of-bounds rows too: the fill value is stored in the scale."""
    q, ids = drawn(how, (500, 16), (500, 2)), np.array([0, 499, 500, -501, -1])
    fn = lambda w, ids: jnp.take(w, ids, axis=0, mode=mode)
    got = on(fn, q, ids)
    assert is_quantized(got)
    np.testing.assert_array_equal(dequantize(got), fn(jnp.asarray(in_numpy(q)), ids))
    program = str(jax.make_jaxpr(lambda q: dequantize(on(fn, q, ids)))(q))
    assert "f32[500,16]" not in program and "bf16[500,16]" not in program


def test_take_stays_quantized_for_a_fill_value_of_zero_only():
    q = drawn("int8", (50, 16), (50, 1))
    for fill, kept in ((0, True), (7, False)):
        fn = lambda w, fill=fill: w.at[np.array([1, 99])].get(
            mode="fill", fill_value=fill
        )
        got = on(fn, q)
        assert is_quantized(got) == kept
        np.testing.assert_array_equal(dequantize(got), fn(jnp.asarray(in_numpy(q))))


# Meshes


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_quantize_array_shards_codes_and_scales_like_the_array(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    at = lambda *spec: NamedSharding(mesh, P(*spec))
    w = jax.device_put(normal(32, 16), at("x", "y"))
    q = quantize_array(w, "nf4", (4, 16))
    assert q.values.sharding.spec == q.scale.sharding.spec == P("x", "y")
    by_column = quantize_array(w, "int8", (1, 16))
    assert by_column.scale.sharding.spec == P(None, "y")
    abstract = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding)
    shapes = quantize_array(abstract, "nf4", (4, 16))
    assert shapes.values.sharding == q.values.sharding
    assert shapes.scale.sharding == q.scale.sharding
    if kind == AxisType.Auto:
        two = quantize_array(jax.device_put(w, at("y")), "nf4", (2, 16))
        assert two.scale.sharding.spec == P(None, None)  # fewer blocks than devices
    if kind == AxisType.Explicit:
        moved = on(lambda w: jax.sharding.reshard(w, at("y", None)), q)
        assert moved.values.sharding.spec == moved.scale.sharding.spec == P("y", None)
    else:
        moved = on(lambda w: lax.with_sharding_constraint(w, at("y")), q)
        assert moved.scale.sharding.spec[0] == "y"
    same(in_numpy(moved), in_numpy(q))
    put = on(lambda w: jax.device_put(w, at(None, "x")), q)
    assert put.values.sharding.spec == put.scale.sharding.spec == P(None, "x")


def test_part_specs_split_blocks_only_at_their_ends():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    q = drawn("int8", (32, 8), (2, 8))
    assert part_specs(q, P("x", "y"), mesh) == (P("x", "y"), P("x", "y"))
    assert part_specs(q, P("y"), mesh) is None  # two blocks over four devices
    assert part_specs(q, P(("x", "y")), mesh) is None
    by_column = drawn("int8", (32, 8), (1, 8))
    assert part_specs(by_column, P("y"), mesh) == (P("y"), P(None, None))


# Products


@pytest.mark.parametrize("looped", [False, True])
def test_through_saves_no_dequantized_weight(looped):
    q, x = drawn("nf4", (64, 32), (2, 32)), normal(3, 64)

    def loss(x):
        return jnp.sin(through(jnp.matmul, x, q, looped=looped)).sum()

    program = str(jax.make_jaxpr(loss)(x))
    assert f"prevent_cse={not looped}" in program
    _, back = jax.vjp(lambda x: through(jnp.matmul, x, q, looped=looped), x)
    floats = [y for y in jax.tree.leaves(back) if jnp.issubdtype(y.dtype, jnp.floating)]
    assert all(y.shape != q.shape for y in floats)
    plain = lambda x: jnp.sin(x @ dequantize(q)).sum()
    for how in (jax.grad, jax.hessian):
        np.testing.assert_allclose(how(loss)(x), how(plain)(x), atol=1e-4)
    along = jax.jvp(loss, (x,), (x,)), jax.jvp(plain, (x,), (x,))
    np.testing.assert_allclose(*along, rtol=1e-4)
    each = jax.vmap(lambda x: through(jnp.matmul, x, q, looped=looped))(x)
    np.testing.assert_allclose(each, x @ dequantize(q), atol=1e-5)
