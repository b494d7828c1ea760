"""The factored products equal the products with the materialized weight."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax._engine import ops
from lora_jax._engine.factors import Factors, align, materialize

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def factors(w, a, b, scale=()):
    return align(*(jnp.asarray(normal(*shape)) for shape in (w, a, b, scale)))


MATRIX = factors((4, 5), (4, 2), (2, 5))
HEADS = factors((4, 2, 3), (4, 2), (2, 2, 3))
STACK = factors((2, 4, 5), (2, 4, 3), (2, 3, 5), (2,))
ROW = factors((1, 5), (1, 1), (1, 5))
# The shape of x, the factors, and ((contracted of x, of w), (batch of x, of w)).
PRODUCTS = {
    "rows": ((3, 4), MATRIX, (((1,), (0,)), ((), ()))),
    "columns": ((3, 5), MATRIX, (((1,), (1,)), ((), ()))),
    "first of x": ((4, 3), MATRIX, (((0,), (0,)), ((), ()))),
    "middle of x": ((2, 4, 3), MATRIX, (((1,), (0,)), ((), ()))),
    "both": ((3, 5, 4), MATRIX, (((2, 1), (0, 1)), ((), ()))),
    "outer": ((3,), MATRIX, (((), ()), ((), ()))),
    "heads": ((3, 6, 4), HEADS, (((2,), (0,)), ((), ()))),
    "heads back": ((3, 2, 3), HEADS, (((1, 2), (1, 2)), ((), ()))),
    "one head dimension": ((5, 3), HEADS, (((1,), (2,)), ((), ()))),
    "in and head": ((5, 4, 2), HEADS, (((1, 2), (0, 1)), ((), ()))),
    "batch of heads": ((2, 5, 4), HEADS, (((2,), (0,)), ((0,), (1,)))),
    "batch of inputs": ((5, 4), HEADS, (((), ()), ((1,), (0,)))),
    "experts": ((2, 3, 4), STACK, (((2,), (1,)), ((0,), (0,)))),
    "experts back": ((2, 3, 5), STACK, (((2,), (2,)), ((0,), (0,)))),
    "all experts": ((3, 4), STACK, (((1,), (1,)), ((), ()))),
    "sum of experts": ((3, 2, 4), STACK, (((1, 2), (0, 1)), ((), ()))),
    "one row": ((3, 1), ROW, (((1,), (0,)), ((), ()))),
}


def with_rank_scales(f):
    """The same weight with a scale for each rank, and of each layer or expert."""
    scale = jnp.asarray(normal(*f.scale.shape[:-1], f.rank))
    return dataclasses.replace(f, scale=scale)


@pytest.fixture(params=[(name, own) for name in PRODUCTS for own in (False, True)])
def product(request):
    name, own = request.param
    shape, f, dims = PRODUCTS[name]
    return jnp.asarray(normal(*shape)), with_rank_scales(f) if own else f, dims


def check(got, want, atol=1e-5):
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, atol=atol, rtol=1e-5)


def test_dot_general_of_a_weight_on_the_right(product):
    x, f, dims = product
    check(ops.dot_general(x, f, dims), lax.dot_general(x, materialize(f), dims))


def test_dot_general_swapped(product):
    x, f, (contract, batch) = product
    dims = (contract[::-1], batch[::-1])
    got = ops.dot_general(x, f, dims, swap=True)
    check(got, lax.dot_general(materialize(f), x, dims))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("preferred", [None, "float32"])
def test_dot_general_has_the_plain_dtype(dtype, preferred):
    w, a, b = normal(4, 5), normal(4, 2), normal(2, 5)
    f = align(jnp.asarray(w, dtype), jnp.asarray(a), jnp.asarray(b), jnp.float32(0.5))
    x, dims = jnp.asarray(normal(3, 4), dtype), (((1,), (0,)), ((), ()))
    got = ops.dot_general(x, f, dims, preferred_element_type=preferred)
    assert got.dtype == (preferred or dtype)
    x, w = (np.asarray(y.astype(np.float32), np.float64) for y in (x, f.w))
    atol = {"bfloat16": 0.2, "float16": 0.02, "float32": 1e-5}[dtype]
    np.testing.assert_allclose(got.astype(np.float32), x @ (w + a @ b / 2), atol=atol)


@pytest.mark.parametrize("rank", [2, 17])
def test_dot_general_scales_low_precision_factors_in_float32(rank):
    w, a, b = normal(4, 5), normal(4, rank), normal(rank, 5)
    low = [jnp.asarray(z, jnp.bfloat16) for z in (a, b)]
    f, x = align(jnp.asarray(w), *low, jnp.float32(1 / 3)), normal(3, 4)
    a, b = (np.asarray(z, np.float64) for z in low)
    got = ops.dot_general(jnp.asarray(x), f, (((1,), (0,)), ((), ())))
    np.testing.assert_allclose(got, x @ (w + a @ b / 3), atol=1e-5)


CHANNELS_LAST = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
STANDARD = (3, 3, 4, 5), (3, 3, 4, 2), (2, 5)
SWAPPED = (3, 3, 4, 5), (3, 3, 1, 5, 2), (1, 1, 4, 1, 2)
CONVOLUTIONS = {
    "plain": (STANDARD, {"padding": "VALID"}),
    "strided": (STANDARD, {"window_strides": (2, 1), "padding": "SAME"}),
    "dilated": (
        STANDARD,
        {"padding": [(1, 2), (0, 1)], "lhs_dilation": (1, 2), "rhs_dilation": (2, 1)},
    ),
    "groups": (STANDARD, {"feature_group_count": 2}),
    "each channel by itself": (
        ((3, 3, 1, 6), (3, 3, 1, 2), (2, 6)),
        {"feature_group_count": 6},
    ),
    "1 x 1": (((1, 1, 4, 5), (1, 1, 4, 2), (2, 5)), {"padding": "VALID"}),
}
CONVOLUTIONS |= {
    "window with the outputs": (((3, 3, 4, 5), (1, 1, 4, 1, 2), (3, 3, 1, 5, 2)), {}),
    "outputs first": (SWAPPED, {}),
    "window with the outputs, strided": (
        ((3, 3, 4, 5), (1, 1, 4, 1, 2), (3, 3, 1, 5, 2)),
        {"window_strides": (2, 1), "padding": [(1, 2), (0, 1)], "lhs_dilation": (1, 2)},
    ),
}
APART = {
    "window on both sides": (((3, 3, 4, 5), (1, 3, 4, 1, 2), (3, 1, 1, 5, 2)), {}),
    "window with the outputs, in groups": (
        ((3, 3, 4, 6), (1, 1, 4, 1, 2), (3, 3, 1, 6, 2)),
        {"feature_group_count": 3},
    ),
}


def convolve(shapes, options):
    """Returns the factored convolution, and the plain one of the merged weight."""
    f = factors(*shapes)
    groups = options.get("feature_group_count", 1)
    x = jnp.asarray(normal(2, 7, 7, shapes[0][2] * groups))
    if groups == 2:
        f = factors((*shapes[0][:3], 6), shapes[1], (2, 6))
    options = {"window_strides": (1, 1), "padding": "VALID"} | CHANNELS_LAST | options
    plain = lambda x, w: lax.conv_general_dilated(x, w, **options)
    (eqn,) = jax.make_jaxpr(plain)(x, f.w).eqns
    return ops.conv_general_dilated(x, f, **eqn.params), plain(x, materialize(f))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv_general_dilated(name):
    got, want = convolve(*CONVOLUTIONS[name])
    check(got, want, atol=1e-4)


@pytest.mark.parametrize("name", APART)
def test_conv_general_dilated_returns_none_if_it_cannot_be_factored(name):
    got, _ = convolve(*APART[name])
    assert got is None


def dot_ranks(fn, platform, r):
    """Returns the ranks of the operands of each product in a platform's program."""
    f, dims = factors((4, 5, 6), (4, r), (r, 5, 6)), (((2,), (0,)), ((), ()))
    product = lambda x, w, a, b: ops.dot_general(x, Factors(w, a, b, f.scale), dims)
    args = jnp.ones((2, 3, 4)), f.w, f.a, f.b
    traced = jax.jit(fn(product)).trace(*args)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    dots = re.findall(r"dot_general .*: \(tensor<(.*)>, tensor<(.*)>\)", text)
    return [[shape.count("x") for shape in shapes] for shapes in dots]


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_dot_general_keeps_the_dimensions_of_low_rank_products(platform):
    """With merged dimensions XLA for TPU moves more bytes."""
    assert dot_ranks(lambda fn: fn, platform, 17) == [[3, 3], [3, 2], [3, 3]]
    # On a CPU the columns of a small rank are added one by one.
    second = [] if platform == "cpu" else [[3, 3]]
    assert dot_ranks(lambda fn: fn, platform, 2) == [[3, 3], [3, 2], *second]


def test_dot_general_computes_the_gradient_of_b_from_matrices():
    """With more dimensions XLA for CPU makes a transposed copy of the cotangent."""
    grad = lambda fn: jax.grad(lambda *args: jnp.sum(jnp.sin(fn(*args))), 3)
    *_, by_b = dot_ranks(grad, "cpu", 2)
    assert by_b == [2, 2]


def test_dot_general_has_derivatives_of_every_mode_with_added_columns():
    """Compares forward, backward and second derivatives."""
    x, (f, dims) = jnp.asarray(normal(2, 3, 4)), (HEADS, (((2,), (0,)), ((), ())))
    both = [
        lambda x, a, b: jnp.sin(ops.dot_general(x, Factors(f.w, a, b, f.scale), dims)),
        lambda x, a, b: jnp.sin(
            lax.dot_general(x, materialize(Factors(f.w, a, b, f.scale)), dims)
        ),
    ]
    derivatives = lambda fn, *args: (
        jax.jvp(fn, args, args),
        jax.grad(lambda *args: jnp.sum(fn(*args)), (0, 1, 2))(*args),
        jax.hessian(lambda *args: jnp.sum(fn(*args)), (1, 2))(*args),
    )
    got, want = (jax.jit(derivatives, static_argnums=0)(fn, x, f.a, f.b) for fn in both)
    jax.tree.map(lambda got, want: check(got, want, atol=2e-4), got, want)


def test_lora_copies_no_weight():
    """The program has no transposed and no merged copy, forward or backward."""
    fn = lambda p, x: jnp.sum(jnp.sin(jnp.sin(x @ p["w"]) @ p["w"].T))
    params = lj.lorafy({"w": jnp.ones((96, 160))}, 4, targets="w")
    adapters, base = lj.split(params)
    loss = lambda a, base, x: lj.lora(fn)(lj.combine(a, base), x)
    step = jax.jit(jax.value_and_grad(loss, (0, 2)))
    text = step.lower(adapters, base, jnp.ones((2, 24, 96))).compile().as_text()
    text = text[text.index("ENTRY") :]
    weights = re.findall(r"= f32\[(?:96,160|160,96)\]\S* (\w+)\(", text)
    assert weights == ["parameter"]
