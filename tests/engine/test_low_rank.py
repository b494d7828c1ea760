"""The low-rank products, and their sum with a plain product."""

import re
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax._engine import low_rank

RNG = np.random.default_rng(0)
FUSED_LAST = pytest.mark.skipif(
    jax.__version_info__ < (0, 12),
    reason="XLA for CPU of an earlier jax removes barriers before it fuses",
)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def check(got, want):
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def test_einsum_against_numpy():
    """Draws labels in random orders: free, contracted, batch, and broadcast ones."""
    sizes = dict(zip(range(6), (2, 3, 4, 5, 2, 3), strict=True))
    labels_of, operands, wanted = [], [], []
    for _ in range(40):
        x_labels = RNG.permutation(5)[: RNG.integers(1, 5)].tolist()
        y_labels = RNG.permutation(5)[: RNG.integers(1, 5)].tolist()
        alone = [n for n in y_labels if n not in x_labels]
        out = [n for n in x_labels if RNG.random() < 0.6] + alone
        out = RNG.permutation(out).astype(int).tolist()
        x, y = (normal(*(sizes[n] for n in labels)) for labels in (x_labels, y_labels))
        letters = [
            "".join(string.ascii_letters[n] for n in g)
            for g in (x_labels, y_labels, out)
        ]
        want = np.einsum(f"{letters[0]},{letters[1]}->{letters[2]}", x, y)
        for result, value in ((out, want), ([5, *out], want[None])):
            labels_of.append((x_labels, y_labels, result))
            operands.append((x, y))
            wanted.append(value)

    @jax.jit  # compiles one program instead of eighty
    def products(operands):
        pairs = zip(operands, labels_of, strict=True)
        return [
            low_rank.einsum(x, of_x, y, of_y, out)
            for (x, y), (of_x, of_y, out) in pairs
        ]

    for got, want in zip(products(operands), wanted, strict=True):
        check(got, want)


ROWS_AND_COLUMNS = [((3,), (5,)), ((2, 3), (5,)), ((3,), (2, 5)), ((2, 3), (4, 5))]


@pytest.mark.parametrize("r", [1, 3, low_rank.COLUMNS, low_rank.COLUMNS + 1])
@pytest.mark.parametrize(("rows", "columns"), ROWS_AND_COLUMNS)
def test_add_of_any_dimensions(rows, columns, r):
    y, h, b = normal(*rows, *columns), normal(*rows, r), normal(*columns, r)
    want = y + np.tensordot(h, b, ([-1], [-1]))
    add = lambda *args: low_rank.add(*args, None)
    some = [np.stack([z, 2 * z]) for z in (y, h, b)]
    got, each = jax.jit(lambda one, some: (add(*one), jax.vmap(add)(*some)))(
        (y, h, b), some
    )
    check(got, want)
    check(each[1], 2 * y + 4 * (want - y))


FN = lambda p, x: jnp.tanh(x) @ p["kernel"]


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile()


def temporaries(fn, *args):
    return compiled(fn, *args).memory_analysis().temp_size_in_bytes


@FUSED_LAST
@pytest.mark.parametrize("shape", [(24, 64), (2, 12, 64), (2, 3, 4, 64)])
def test_lora_adds_to_a_product_in_place(shape):
    x, plain = jnp.ones(shape), {"kernel": jnp.ones((64, 512))}
    before = temporaries(FN, plain, x)
    assert temporaries(lj.lora(FN), lj.lorafy(plain, 4), x) - before < 24 * 512 * 4 / 2


@FUSED_LAST
@pytest.mark.parametrize("shape", [(8, 64), (1, 8, 64), (2, 4, 64)])
def test_lora_adds_to_a_product_in_place_in_a_mixed_batch(shape):
    plain = {"kernel": jnp.ones((64, 512))}
    params = lj.stack([lj.lorafy(plain, 4)] * 3)
    mixed = jax.vmap(lj.lora(FN), (lj.in_axes(params), 0))
    before = temporaries(FN, plain, jnp.ones((24, 64)))
    after = temporaries(mixed, params, jnp.ones((3, *shape)))
    assert after - before < 24 * 512 * 4 / 2


def test_lora_sums_once_in_a_step_with_dora():
    """The gradients of DoRA's magnitudes need the sum, so it is kept."""
    rows, k, n, r = 128, 64, 512, 4
    x, plain = jnp.ones((4, 32, k)), {"kernel": jnp.ones((k, n))}
    loss = lambda params, x: jnp.tanh(lj.lora(FN)(params, x)).sum()
    step = jax.value_and_grad(lambda some, rest, x: loss(lj.combine(some, rest), x))

    def flops(dora):
        args = *lj.split(lj.lorafy(plain, r, dora=dora)), x
        return compiled(step, *args).cost_analysis()["flops"]

    norms, gains, one_sum = 2 * k * n * (r + 1), 4 * rows * n, 2 * rows * n * r
    assert flops(True) - flops(False) < norms + gains + one_sum / 2


@FUSED_LAST
def test_lora_computes_the_input_of_a_mixed_batch_once():
    """Its two products read it in different shapes, which XLA would compute twice."""
    fn = lambda p, x: jax.nn.gelu(x + p["bias"][None, None]) @ p["kernel"]
    base = {"kernel": jnp.ones((64, 512)), "bias": jnp.ones(64)}
    params = lj.stack([lj.lorafy(base, 4, targets="kernel")] * 3)
    mixed = jax.vmap(lj.lora(fn), (lj.in_axes(params), 0))
    text = compiled(mixed, params, jnp.ones((3, 1, 8, 64))).as_text()
    readers = re.findall(r" fusion\([^)]*bias", text[text.index("ENTRY") :])
    assert len(readers) == 1
