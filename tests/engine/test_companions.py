"""The rules of views apply to companions of an array, such as factors and scales."""

import math
import os

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax._engine import companions
from lora_jax._engine.jaxpr import bind, opened, params_of

CASES = int(os.environ.get("LORA_JAX_FUZZ", 24))


def repeated(c, shape):
    """Repeats the elements of a companion up to the shape of its array."""
    for d, n in enumerate(shape):
        c = np.repeat(c, n // max(c.shape[d], 1), d)
    return c


def sizes(rng, n):
    """Draws sizes whose product is n."""
    out = []
    while n > 1:
        out.append(int(rng.choice([k for k in range(2, n + 1) if n % k == 0])))
        n //= out[-1]
    return (*out, 1)[: None if rng.random() < 0.5 else len(out)] or (1,)


def below(rng, limits):
    return [int(rng.integers(n)) for n in limits]


def transpose(rng, x):
    order = rng.permutation(x.ndim)
    return lambda x: lax.transpose(x, order), []


def reshape(rng, x):
    order = rng.permutation(x.ndim) if rng.random() < 0.5 else None
    shape = sizes(rng, x.size)
    return lambda x: lax.reshape(x, shape, order), []


def squeeze(rng, x):
    dims = [d for d, n in enumerate(x.shape) if n == 1]
    return lambda x: lax.squeeze(x, dims), []


def broadcast_in_dim(rng, x):
    d = int(rng.integers(x.ndim + 1))
    dims = [i + (i >= d) for i in range(x.ndim)]
    shape = [*x.shape[:d], 2, *x.shape[d:]]
    ones = [i + (i >= d) for i, n in enumerate(x.shape) if n == 1]
    for i in ones:
        shape[i] = int(rng.choice([1, 3]))
    return lambda x: lax.broadcast_in_dim(x, shape, dims), []


def slice_(rng, x):
    low = below(rng, x.shape)
    high = [i + 1 + int(rng.integers(n - i)) for i, n in zip(low, x.shape, strict=True)]
    strides = [int(rng.choice([1, 1, 2])) for _ in low]
    return lambda x: lax.slice(x, low, high, strides), []


def split(rng, x):
    axis = int(rng.integers(x.ndim))
    n = int(rng.integers(x.shape[axis] + 1))
    return lambda x: lax.split(x, (n, x.shape[axis] - n), axis), []


def unstack(rng, x):
    axis = int(rng.integers(x.ndim))
    return lambda x: lax.unstack_p.bind(x, axis=axis), []


def rev(rng, x):
    dims = [d for d in range(x.ndim) if rng.random() < 0.5]
    return lambda x: lax.rev(x, dims), []


def tile(rng, x):
    reps = tuple(int(n) for n in rng.integers(1, 4, x.ndim))
    return lambda x: lax.tile_p.bind(x, reps=reps), []


def dynamic_slice(rng, x):
    low = below(rng, x.shape)
    ns = [1 + int(rng.integers(n - i)) for i, n in zip(low, x.shape, strict=True)]
    # `lax.dynamic_slice` also wraps negative starts, in equations of their own.
    cut = lambda x, *low: lax.dynamic_slice_p.bind(x, *low, slice_sizes=tuple(ns))
    return cut, [*map(np.int32, low)]


def gather(rng, x):
    """Draws windows of x with some indexed and some collapsed dimensions."""
    indexed = [d for d in range(x.ndim) if rng.random() < 0.6]
    collapsed = [d for d in indexed if rng.random() < 0.6]
    ns = [
        1 if d in collapsed else int(rng.choice([n, max(n // 2, 1)]))
        for d, n in enumerate(x.shape)
    ]
    rows = rng.integers(-1, 7, (3, len(indexed))).astype(np.int32)
    numbers = lax.GatherDimensionNumbers(
        tuple(range(1, 1 + x.ndim - len(collapsed))), tuple(collapsed), tuple(indexed)
    )
    return lambda x, i: lax.gather(x, i, numbers, ns, mode="clip"), [rows]


VIEWS = {
    "transpose": transpose,
    "reshape": reshape,
    "squeeze": squeeze,
    "broadcast_in_dim": broadcast_in_dim,
    "slice": slice_,
    "split": split,
    "rev": rev,
    "dynamic_slice": dynamic_slice,
    "gather": gather,
}
if hasattr(lax, "unstack_p"):  # new in 0.12
    VIEWS |= {"unstack": unstack, "tile": tile}


def equation(name, rng, shape):
    """Draws an equation and its other operands; None if the view is the identity."""
    x = np.empty(shape, np.float32)
    fn, others = VIEWS[name](rng, x)
    equations = opened(jax.make_jaxpr(fn)(x, *others)).equations
    if not equations:
        return None
    assert [eqn.primitive.name for eqn in equations] == [name]
    return equations[0], others


def test_rules_are_all_tested():
    assert companions.RULES.keys() - VIEWS.keys() <= {"copy", "unstack", "tile"}


@pytest.mark.parametrize("name", VIEWS)
def test_rules_are_views_of_the_repeated_companion(name):
    rng, cases = np.random.default_rng(0), []
    for _ in range(CASES):
        shape = tuple(
            int(n) for n in rng.choice([1, 2, 3, 4, 6, 16], rng.integers(1, 4))
        )
        of_factor = rng.random() < 0.5
        divisors = lambda n: [m for m in range(1, n + 1) if n % m == 0]
        own = [int(rng.choice([1, n] if of_factor else divisors(n))) for n in shape]
        rank = [2] * int(rng.integers(2))
        c = rng.standard_normal((*own, *rank)).astype(np.float32)
        if found := equation(name, rng, shape):
            cases.append((*found, shape, c))

    def views(all_of):
        for (eqn, _, shape, _), (c, full, others) in zip(cases, all_of, strict=True):
            columns = (
                [full] if full.ndim == len(shape) else [full[..., r] for r in (0, 1)]
            )
            want = [bind(eqn, [x, *others]) for x in columns]
            new = [x.shape for x in want[0]]
            got = companions.RULES[name](c, shape, new, *others, **params_of(eqn))
            yield got, want

    given = [(c, repeated(c, shape), others) for _, others, shape, c in cases]
    followed = 0
    for got, want in jax.device_get(jax.jit(lambda x: [*views(x)])(given)):
        if got is None:
            continue
        followed += 1
        for i, one in enumerate(got):
            for r, column in enumerate(want):
                y = column[i]
                part = one if one.ndim == y.ndim else one[..., r]
                assert all(
                    n % max(m, 1) == 0 for m, n in zip(part.shape, y.shape, strict=True)
                )
                np.testing.assert_array_equal(repeated(part, y.shape), y)
    assert followed > len(cases) / 4


def sizes_after(name, eqn, others, shape, own):
    x, c = np.empty(shape, np.float32), np.empty((*own, 2), np.float32)
    new = [y.shape for y in jax.eval_shape(lambda *xs: bind(eqn, xs), x, *others)]
    rule = lambda c, *others: companions.RULES[name](
        c, shape, new, *others, **params_of(eqn)
    )
    return jax.eval_shape(rule, c, *others), new


@pytest.mark.parametrize("name", sorted(VIEWS.keys() - {"reshape"}))
def test_rules_support_every_view_of_a_factor(name):
    """Factors have sizes of 1 or n, so these views never materialize a weight."""
    rng = np.random.default_rng(1)
    for _ in range(CASES):
        shape = tuple(int(n) for n in rng.choice([1, 2, 3, 6], 3))
        own = [int(rng.choice([1, n])) for n in shape]
        if (found := equation(name, rng, shape)) is None:
            continue
        got, new = sizes_after(name, *found, shape, own)
        for c, n in zip(got, new, strict=True):
            assert all(m in (1, k) for m, k in zip(c.shape, n, strict=False))


@pytest.mark.parametrize(
    ("own", "spec", "want", "within"),
    [
        ((8, 4), P("x", "y"), P("x", "y"), False),
        ((1, 4), P("x", "y"), P(None, "y"), False),
        ((8, 4), P("x"), P("x", None), False),
        ((3, 4), P(("x", "y"), None), P(None, None), True),
        ((8, 2), P(("x", "y"), P.UNCONSTRAINED), P(("x", "y"), P.UNCONSTRAINED), False),
    ],
)
def test_spec_of_shards_only_evenly_split_dimensions(own, spec, want, within):
    mesh = AbstractMesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    assert companions.spec_of(own, spec, mesh) == want
    assert companions.is_cut_within_blocks(own, spec, mesh) == within
    sharding = NamedSharding(mesh, spec)
    assert companions.sharding_of(own, sharding).spec == want
    assert companions.sharding_of(own, None) is None


def test_slice_never_divides_a_block():
    c = np.ones((2,), np.float32)
    cut = {"start_indices": (0,), "limit_indices": (4,), "strides": None}
    assert companions.slice_(c, (32,), [(4,)], **cut) is None
    (got,) = companions.slice_(c, (32,), [(8,)], **cut | {"limit_indices": (8,)})
    assert got.shape == (1,) and math.prod(got.shape) == 1
