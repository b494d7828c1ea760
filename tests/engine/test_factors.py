"""Layouts follow from shapes, and every view of a weight is a view of its factors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax._adapters import axes_of_shapes, fits
from lora_jax._engine import companions
from lora_jax._engine.factors import (
    Factors,
    align,
    batch_dims,
    delta,
    follow,
    materialize,
)
from lora_jax._engine.joins import add, concatenate

RNG = np.random.default_rng(0)
# Shapes of w, a, b and the scale, and the einsum equation of scale * A B.
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
    "scales of ranks": ((4, 2, 3), (4, 2), (2, 2, 3), (2,), "ir,rhd,r->ihd"),
    "stack, scales of ranks": (
        (3, 4, 5),
        (3, 4, 2),
        (3, 2, 5),
        (3, 2),
        "lir,lro,lr->lio",
    ),
    "aligned, scales of ranks": (
        (4, 3, 5),
        (4, 3, 1, 2),
        (1, 3, 5, 2),
        (3, 2),
        "ilxr,ylor,lr->ilo",
    ),
}


def normal(shape):
    return jax.device_put(np.asarray(RNG.standard_normal(shape), np.float32))


def viewed(f, w, name, **params):
    """Returns the view `w` with factors, or None if the factors cannot follow."""
    (view,) = follow(f, [w], companions.RULES[name], **params) or [None]
    return view


def turned(f, order):
    return viewed(f, f.w.transpose(order), "transpose", permutation=order)


def widened(f, shape, dims):
    w = jax.lax.broadcast_in_dim(f.w, shape, dims)
    return viewed(f, w, "broadcast_in_dim", broadcast_dimensions=dims)


materialized = jax.jit(materialize)  # compiles one program instead of ten


@pytest.fixture(params=LAYOUTS)
def layout(request):
    *shapes, equation = LAYOUTS[request.param]
    return [normal(shape) for shape in shapes], equation


def test_delta_against_numpy(layout):
    (w, a, b, scale), equation = layout
    assert fits(w.shape, a.shape, b.shape, scale.shape)
    want = np.einsum(equation, *(np.asarray(x, np.float64) for x in (a, b, scale)))
    f = align(w, a, b, scale)
    np.testing.assert_allclose(jax.jit(delta)(f), want, atol=1e-5)
    np.testing.assert_allclose(materialized(f), np.asarray(w) + want, atol=1e-5)


def test_axes_of_shapes_agrees_with_the_equation(layout):
    (w, a, b, scale), equation = layout
    axes = axes_of_shapes(w.shape, a.shape, b.shape, scale.shape)
    assert sorted((*axes.batch, *axes.inputs, *axes.outputs)) == list(range(w.ndim))
    if 1 not in w.shape:
        operands, result = equation.split("->")
        in_a, in_b, _ = operands.split(",")
        letters = list(enumerate(result))
        assert axes.batch == tuple(d for d, n in letters if n in in_a and n in in_b)
        assert axes.inputs == tuple(d for d, n in letters if n not in in_b)


def test_follow_views_the_factors_like_the_weight(layout):
    (w, a, b, scale), _ = layout
    orders = [*itertools.islice(itertools.permutations(range(w.ndim)), 6)]
    shape, dims = (2, *w.shape), tuple(range(1, w.ndim + 1))

    @jax.jit
    def views(w, a, b, scale):
        f = align(w, a, b, scale)
        in_orders = [turned(f, order) for order in orders]
        wide = widened(f, shape, dims)
        assert wide.a.size == a.size and wide.b.size == b.size
        return materialize(f), [*map(materialize, in_orders)], materialize(wide)

    full, in_orders, wide = jax.device_get(views(w, a, b, scale))
    for got, order in zip(in_orders, orders, strict=True):
        np.testing.assert_allclose(got, full.transpose(order), atol=1e-6)
    np.testing.assert_allclose(wide, np.broadcast_to(full, shape), atol=1e-6)


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
def test_follow_a_reshape_only_within_inputs_or_outputs(name, shape, follows):
    *shapes, _ = LAYOUTS[name]

    @jax.jit
    def both(*parts):
        f = align(*parts)
        got = viewed(f, f.w.reshape(shape), "reshape")
        assert (got is not None) == follows
        return (materialize(got), materialize(f).reshape(shape)) if follows else None

    if pair := both(*map(normal, shapes)):
        np.testing.assert_allclose(*pair, atol=1e-6)


def test_follow_to_an_empty_view_gives_a_plain_array():
    f = align(*map(normal, ((0, 5), (0, 2), (2, 5), ())))
    assert viewed(f, f.w.reshape((5, 0)), "reshape").shape == (5, 0)
    ((f,), _) = pieces(((4, 3), (4, 2), (2, 3), ()), axes=(0, 1))
    assert viewed(f, f.w[4:], "reshape").shape == (0, 3)


def test_materialize_sums_low_precision_in_float32_and_casts_once():
    w, a, b = (normal(shape).astype(jnp.bfloat16) for shape in ((4, 5), (4, 2), (2, 5)))
    got = materialize(align(w, a, b, jnp.float32(0.3)))
    exact = [np.asarray(x, np.float64) for x in (w, a, b)]
    want = exact[0] + np.float32(0.3) * exact[1] @ exact[2]
    assert got.dtype == jnp.bfloat16
    assert (got == want.astype(np.float32).astype(jnp.bfloat16)).all()


def pieces(*shapes, axes):
    """Returns weights with factors, and the same weights materialized."""
    made = []
    for w, a, b, scale in shapes:
        f = align(normal(w), normal(a), normal(b), normal(scale), "w")
        made.append(turned(f, axes))
    return made, [np.asarray(materialized(f)) for f in made]


@pytest.mark.parametrize("axes", [(0, 1), (1, 0)])
@pytest.mark.parametrize("axis", [0, 1])
def test_concatenate_adds_up_the_ranks(axis, axes):
    """Concatenates weights of several ranks and a plain array."""
    n = [(4, 3), (4, 3)]
    n[1] = (4, 2) if axes[axis] == 1 else (2, 3)
    fs, plain = pieces(
        *((w, (w[0], r), (r, w[1]), ()) for w, r in zip(n, (1, 2), strict=True)),
        axes=axes,
    )
    array = normal(plain[0].shape)
    parts = [fs[0], array, fs[1]]
    weights = [x.w if isinstance(x, Factors) else x for x in parts]
    f = concatenate(parts, jnp.concatenate(weights, axis), axis)
    want = np.concatenate([plain[0], array, plain[1]], axis)
    np.testing.assert_allclose(materialized(f), want, atol=1e-5)
    assert f.a.shape[-1] == 3  # the ranks add up


def test_concatenate_along_a_stack_keeps_the_rank():
    shapes = (((4, 3), (4, r), (r, 3), ()) for r in (1, 2))
    fs, plain = pieces(*shapes, axes=(0, 1))
    ones = [widened(f, (1, *f.shape), (1, 2)) for f in fs]
    f = concatenate(ones, jnp.stack([x.w for x in fs]), 0)
    np.testing.assert_allclose(materialize(f), np.stack(plain), atol=1e-5)
    assert f.a.shape == (2, 4, 1, 2) and f.b.shape == (2, 1, 3, 2)
    assert batch_dims(f) == {0}


def test_concatenate_pieces_of_one_weight_keeps_the_rank():
    ((f,), (plain,)) = pieces(((4, 3), (4, 2), (2, 3), ()), axes=(0, 1))

    def piece(low, high):
        cut = {"start_indices": (low, 0), "limit_indices": (high, 3)}
        return viewed(f, f.w[low:high], "slice", strides=None, **cut)

    rolled = concatenate([piece(3, 4), piece(0, 3)], jnp.roll(f.w, 1, 0), 0)
    np.testing.assert_allclose(materialize(rolled), np.roll(plain, 1, 0), atol=1e-5)
    assert rolled.a.shape[-1] == 2


def test_concatenate_a_matrix_and_a_stack_has_no_factors():
    ((f,), (plain,)) = pieces(((4, 3), (4, 2), (2, 3), ()), axes=(0, 1))
    stack = align(*map(normal, ((4, 3), (4, 3, 2), (1, 3, 2), (3,))))
    assert concatenate([f, stack], jnp.zeros((4, 6)), 1) is None
    want = plain + materialize(stack)  # their sum has factors
    np.testing.assert_allclose(
        materialize(add(f, stack, f.w + stack.w)), want, atol=1e-5
    )


def test_add_adds_up_the_ranks():
    shapes = [((4, 3), (4, 1), (1, 3), ()), ((3, 4), (3, 2), (2, 4), ())]
    ((f,), (x,)) = pieces(shapes[0], axes=(0, 1))
    ((g,), (y,)) = pieces(shapes[1], axes=(1, 0))  # with swapped factors
    h = add(f, g, f.w + g.w)
    np.testing.assert_allclose(materialize(h), x + y, atol=1e-5)
    assert h.a.shape == (4, 1, 3) and h.b.shape == (1, 3, 3)


def test_add_views_that_share_a_factor_keeps_the_rank():
    ((f,), (x,)) = pieces(((4, 3), (4, 2), (2, 3), ()), axes=(0, 1))
    mean = np.asarray(x).mean(0, keepdims=True)
    g = Factors(f.w.mean(0), f.a.mean(0, keepdims=True), f.b, -f.scale)
    h = add(f, g, f.w - f.w.mean(0, keepdims=True))
    np.testing.assert_allclose(materialize(h), x - mean, atol=1e-5)
    assert h.a.shape == (4, 1, 2) and h.b is f.b


def test_concatenate_factors_of_different_dtypes():
    ((f, g), (x, y)) = pieces(*[((4, 3), (4, 2), (2, 3), ())] * 2, axes=(0, 1))
    low = Factors(g.w, *(x.astype(jnp.bfloat16) for x in (g.a, g.b)), g.scale)
    h = concatenate([f, low], jnp.concatenate([f.w, g.w], 1), 1)
    assert h.a.dtype == h.b.dtype == jnp.float32
    np.testing.assert_allclose(materialize(h), np.concatenate([x, y], 1), atol=0.1)
