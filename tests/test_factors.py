"""Layouts are read from shapes, and every view of a weight is a view of its factors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax._factors import (
    Axes,
    adapter_of,
    align,
    axes_of_shapes,
    broadcast,
    delta,
    find_adapters,
    fits,
    materialize,
    reshape,
    transpose,
    wider,
)

RNG = np.random.default_rng(0)
# Shapes of w, a, b and the scale, and how NumPy writes scale * A B for them.
LAYOUTS = {
    "matrix": ((4, 5), (4, 2), (2, 5), (), "ir,ro,->io"),
    "heads": ((4, 2, 3), (4, 2), (2, 2, 3), (), "ir,rhd,->ihd"),
    "out": ((2, 3, 4), (2, 3, 2), (2, 4), (), "hdr,ro,->hdo"),
    "stack": ((3, 4, 5), (3, 4, 2), (3, 2, 5), (3,), "lir,lro,l->lio"),
    "experts": ((2, 3, 4, 5), (2, 3, 4, 2), (2, 3, 2, 5), (2, 3), "leir,lero,le->leio"),
    "one row": ((1, 5), (1, 2), (2, 5), (), "ir,ro,->io"),
    "one layer": ((1, 4, 5), (1, 4, 2), (1, 2, 5), (1,), "lir,lro,l->lio"),
    "aligned": ((5, 4), (1, 4, 2), (5, 1, 2), (), "xir,oyr,->oi"),
    "aligned fused": (
        (3, 2, 4, 5),
        (1, 1, 4, 1, 2),
        (3, 2, 1, 5, 2),
        (),
        "xyizr,fhwdr,->fhid",
    ),
    "aligned batch": ((4, 3, 5), (4, 3, 1, 2), (1, 3, 5, 2), (3,), "ilxr,ylor,l->ilo"),
}


def normal(shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


@pytest.fixture(params=LAYOUTS)
def layout(request):
    *shapes, equation = LAYOUTS[request.param]
    return [normal(shape) for shape in shapes], equation


def test_delta_against_numpy(layout):
    (w, a, b, scale), equation = layout
    assert fits(w.shape, a.shape, b.shape, scale.shape)
    want = np.einsum(equation, *(np.asarray(x, np.float64) for x in (a, b, scale)))
    f = align(w, a, b, scale)
    np.testing.assert_allclose(delta(f), want, atol=1e-5)
    np.testing.assert_allclose(materialize(f), w + want.astype(np.float32), atol=1e-5)


def test_axes_are_those_of_the_equation(layout):
    (w, a, b, scale), equation = layout
    axes = axes_of_shapes(w.shape, a.shape, b.shape, scale.shape)
    assert sorted((*axes.batch, *axes.inputs, *axes.outputs)) == list(range(w.ndim))
    if 1 not in w.shape:
        operands, result = equation.split("->")
        in_a, in_b, _ = operands.split(",")
        letters = list(enumerate(result))
        assert axes.batch == tuple(d for d, n in letters if n in in_a and n in in_b)
        assert axes.inputs == tuple(d for d, n in letters if n not in in_b)


@pytest.mark.parametrize(
    "shapes",
    [
        ((4, 5), (4, 2), (3, 5), ()),
        ((4, 5), (5, 2), (2, 4), ()),
        ((4, 5), (4, 2), (2, 5), (1,)),
        ((4, 5), (4,), (5,), ()),
        ((4, 5), (), (2, 5), ()),
        ((3, 4, 5), (4, 2), (2, 5), ()),
        ((3, 4, 5), (3, 4, 2), (2, 2, 5), (3,)),
        ((5, 4), (1, 4, 2), (5, 4, 2), ()),
        ((5, 4), (1, 1, 2), (5, 1, 2), ()),
        ((5, 4), (1, 4, 2), (5, 1, 3), ()),
    ],
)
def test_misfits(shapes):
    assert not fits(*shapes)


def test_views_of_the_factors_are_views_of_the_weight(layout):
    (w, a, b, scale), _ = layout
    f, whole = align(w, a, b, scale), materialize(align(w, a, b, scale))
    for permutation in itertools.islice(itertools.permutations(range(w.ndim)), 6):
        got = transpose(f, w.transpose(permutation), permutation)
        np.testing.assert_allclose(
            materialize(got), whole.transpose(permutation), atol=1e-6
        )
    shape = (2, *w.shape)
    dims = tuple(range(1, w.ndim + 1))
    got = broadcast(f, jnp.broadcast_to(w, shape), dims)
    np.testing.assert_allclose(
        materialize(got), jnp.broadcast_to(whole, shape), atol=1e-6
    )
    assert got.a.size == a.size and got.b.size == b.size


@pytest.mark.parametrize(
    ("name", "shape", "follows"),
    [
        ("matrix", (2, 2, 5), True),
        ("matrix", (4, 1, 5, 1), True),
        ("matrix", (1, 4, 5), True),
        ("matrix", (20,), False),
        ("matrix", (2, 10), False),
        ("heads", (4, 6), True),
        ("heads", (8, 3), False),
        ("heads", (4, 3, 2), True),
        ("out", (6, 4), True),
        ("out", (6, 2, 2), True),
        ("stack", (12, 5), False),
        ("experts", (6, 4, 5), True),
        ("one row", (5,), True),
        ("one row", (1, 1, 5, 1), True),
        ("one layer", (4, 5), True),
        ("aligned", (5, 2, 2), True),
        ("aligned fused", (6, 4, 5), True),
        ("aligned fused", (3, 8, 5), False),
    ],
)
def test_reshape_respects_the_split(name, shape, follows):
    *shapes, _ = LAYOUTS[name]
    f = align(*map(normal, shapes))
    got = reshape(f, f.w.reshape(shape))
    assert (got is not None) == follows
    if follows:
        want = materialize(f).reshape(shape)
        np.testing.assert_allclose(materialize(got), want, atol=1e-6)


def test_reshape_of_nothing_is_materialized():
    f = align(*map(normal, ((0, 5), (0, 2), (2, 5), ())))
    assert reshape(f, f.w.reshape((5, 0))) is None


@pytest.mark.parametrize(
    ("dtypes", "want"),
    [
        (["bfloat16"], "float32"),
        (["float16", "float32"], "float32"),
        (["float8_e4m3fn"], "float32"),
        (["float64", "bfloat16"], "float64"),
        (["complex64"], "complex64"),
    ],
)
def test_wider(dtypes, want):
    with jax.enable_x64(True):
        assert wider(*map(jnp.dtype, dtypes)) == want


def test_low_precision_is_summed_in_float32_and_cast_once():
    w, a, b = (normal(shape).astype(jnp.bfloat16) for shape in ((4, 5), (4, 2), (2, 5)))
    got = materialize(align(w, a, b, jnp.float32(0.3)))
    exact = [np.asarray(x, np.float64) for x in (w, a, b)]
    want = exact[0] + np.float32(0.3) * exact[1] @ exact[2]
    assert got.dtype == jnp.bfloat16
    assert (got == want.astype(np.float32).astype(jnp.bfloat16)).all()


def leaves(**arrays):
    return {("m", name): x for name, x in arrays.items()}


def test_adapters_are_found_by_name():
    assert adapter_of(("m", "kernel")).a == ("m", "lora_a")
    assert adapter_of(("m", "w")).scale == ("m", "w_lora_scale")
    x, a, b, s = normal((4, 5)), normal((4, 2)), normal((2, 5)), normal(())
    tree = leaves(w=x, w_lora_a=a, w_lora_b=b, w_lora_scale=s, v=x)
    assert find_adapters(tree) == {("m", "w"): adapter_of(("m", "w"))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_b": None},
            "The adapter of 'm/kernel' is broken: 'm/lora_b' is missing",
        ),
        (
            {"kernel": None},
            "'m/kernel' is missing, or no array. Pass the whole tree, or combine",
        ),
        ({"lora_a": normal((5, 2))}, r"'m/kernel' does not fit: lora_a \(5, 2\)"),
        ({"embedding": normal((4, 5))}, "'m/lora_a' belongs to no weight: found 2 of"),
        ({"w_lora_a": normal((4, 2))}, "'m/w_lora_a' belongs to no weight: found 0 of"),
    ],
)
def test_broken_adapters_are_errors_by_path(changes, message):
    x, a, b, s = normal((4, 5)), normal((4, 2)), normal((2, 5)), normal(())
    tree = leaves(kernel=x, lora_a=a, lora_b=b, lora_scale=s) | leaves(**changes)
    with pytest.raises(ValueError, match=message):
        find_adapters(tree)


def test_no_adapter_is_an_error():
    with pytest.raises(ValueError, match="These parameters have no adapters"):
        find_adapters(leaves(kernel=normal((4, 5))))


def test_axes_know_their_standard_order():
    assert Axes((0,), (1,), (2, 3)).standard and not Axes((), (1,), (0,)).standard
