"""Tests of `add` and `rescale` against sums and multiples of updates in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

Axes = lj.Axes
# A kernel, a table, a stack, heads, a kernel (out, in), and a fused one with heads.
SHAPES = {
    "m/kernel": ((6, 5), Axes((), (0,), (1,))),
    "t/embedding": ((7, 4), Axes((), (0,), (1,))),
    "s/kernel": ((3, 4, 5), Axes((0,), (1,), (2,))),
    "h/kernel": ((4, 2, 3), Axes((), (0,), (1, 2))),
    "o/kernel": ((5, 6), Axes((), (1,), (0,))),
    "f/kernel": ((3, 2, 4, 5), Axes((0,), (2,), (1, 3))),
}


def base(seed=0):
    rng = np.random.default_rng(seed)
    tree = {}
    for name, (shape, _) in SHAPES.items():
        module, leaf = name.split("/")
        tree[module] = {
            leaf: jax.device_put(np.asarray(rng.standard_normal(shape), np.float32))
        }
    return tree | {"b": {"bias": jax.device_put(np.ones(3, np.float32))}}


def adapted(plain, seed, rank=2, names=SHAPES, also=()):
    """Returns a tree with random factors and scales for the weights above."""
    axes = {name: SHAPES[name][1] for name in names}
    options = {"targets": [*names], "axes": axes, "also": also}
    # Only the shapes: each array that `lorafy` makes would be a program to compile.
    start = lambda plain: lj.detach(lj.lorafy(plain, rank, **options))
    rng = np.random.default_rng(seed)
    draw = lambda x: jax.device_put(np.asarray(rng.standard_normal(x.shape), x.dtype))
    return lj.attach(jax.tree.map(draw, jax.eval_shape(start, plain)), plain)


def update(params, name):
    """Returns scale * A B in float64, from the leaves and the axes alone."""
    shape, axes = SHAPES[name]
    leaves = params[name.split("/")[0]]
    a, b, scale = (
        np.asarray(leaves[n], np.float64) for n in ("lora_a", "lora_b", "lora_scale")
    )
    letters = "abcd"[: len(shape)]
    pick = lambda *groups: "".join(letters[d] for g in groups for d in g)
    if scale.ndim == len(axes.batch):  # one scale for all ranks
        scale = np.repeat(scale[..., None], a.shape[-1], -1)
    if a.ndim == len(shape) + 1:
        sizes = [n if d in axes.batch else 1 for d, n in enumerate(shape)]
        wide = np.sum(a * b * scale.reshape([*sizes, a.shape[-1]]), -1)
        return np.broadcast_to(wide, shape)
    rule = f"{pick(axes.batch, axes.inputs)}r,{pick(axes.batch)}r{pick(axes.outputs)}"
    return np.einsum(f"{rule},{pick(axes.batch)}r->{letters}", a, b, scale)


def weight(tree, name):
    module, leaf = name.split("/")
    return np.asarray(tree[module][leaf], np.float64)


def test_add_is_the_sum_of_the_updates():
    plain, weights = base(), [0.5, -2, 1.5]
    trees = [adapted(plain, i, rank=1 + i) for i in range(3)]

    @jax.jit  # one program for all kinds of weights; the tests below call `add` eagerly
    def both(*trees):
        got = lj.add(*trees, weights=weights)
        return got, lj.merge(got)

    got, merged = both(*trees)
    for name in SHAPES:
        total = sum(c * update(t, name) for c, t in zip(weights, trees, strict=True))
        np.testing.assert_allclose(update(got, name), total, atol=1e-5, err_msg=name)
        want = weight(plain, name) + total
        np.testing.assert_allclose(weight(merged, name), want, atol=1e-5, err_msg=name)


def test_add_differs_from_the_mean_of_factors():
    plain, names = base(), ["m/kernel", "f/kernel"]
    one, two = (adapted(plain, i, names=names) for i in (1, 2))
    mean = lj.add(one, two, weights=[0.5, 0.5])
    average = lambda x, y: (np.asarray(x) + np.asarray(y)) / 2
    wrong = jax.tree.map(average, one, two)
    for name in names:
        want = (update(one, name) + update(two, name)) / 2
        np.testing.assert_allclose(update(mean, name), want, atol=1e-5)
        assert np.abs(update(wrong, name) - want).max() > 0.1


def test_add_of_different_targets_shares_their_factors():
    plain = base()
    one, two = (adapted(plain, i, names=[n]) for i, n in enumerate([*SHAPES][:2]))
    got = lj.add(one, two, weights=[1, 3])
    assert got["m"]["lora_a"] is one["m"]["lora_a"]
    for tree, name, c in ((one, "m/kernel", 1), (two, "t/embedding", 3)):
        np.testing.assert_allclose(update(got, name), c * update(tree, name), atol=1e-5)
    assert got["b"]["bias"] is plain["b"]["bias"]


def test_add_of_trained_copies_includes_updates():
    plain = base()
    one = adapted(plain, 0, names=["m/kernel"], also="bias")
    two = adapted(plain, 1, names=["t/embedding"], also=["bias", "m/kernel"])
    got = lj.add(one, two, weights=[2, 3])
    w, bias = weight(plain, "m/kernel"), np.ones(3)
    change = np.asarray(two["m"]["lora_w"], np.float64) - w
    want = w + 2 * update(one, "m/kernel") + 3 * change
    np.testing.assert_allclose(got["m"]["lora_w"], want, atol=1e-5)
    changes = [np.asarray(t["b"]["bias_lora_w"], np.float64) - bias for t in (one, two)]
    np.testing.assert_allclose(
        got["b"]["bias_lora_w"], bias + 2 * changes[0] + 3 * changes[1], atol=1e-5
    )
    assert "lora_a" not in got["m"]


def test_add_over_a_quantized_base_and_under_jit():
    plain = lj.quantize(base(), "int8", targets="m")
    one, two = adapted(plain, 1), adapted(plain, 2)
    got = jax.jit(lambda x, y, c: lj.add(x, y, weights=[c, 1.0]))(one, two, 0.5)
    want = 0.5 * update(one, "m/kernel") + update(two, "m/kernel")
    np.testing.assert_allclose(update(got, "m/kernel"), want, atol=1e-5)
    assert isinstance(got["m"]["kernel"], lj.Quantized)


@pytest.mark.parametrize("factor", [-1, 0, 2.5])
def test_rescale_multiplies_the_updates(factor):
    params = adapted(base(), 0, also="bias")
    got = lj.rescale(params, factor)
    for name in SHAPES:
        want = factor * update(params, name)
        np.testing.assert_allclose(update(got, name), want, atol=1e-5)
    change = np.asarray(params["b"]["bias_lora_w"]) - 1
    np.testing.assert_allclose(got["b"]["bias_lora_w"], 1 + factor * change, atol=1e-5)
    assert got["m"]["lora_b"] is params["m"]["lora_b"]


def test_rescale_by_pattern_and_traced():
    params = adapted(base(), 0)
    got = jax.jit(lambda p, c: lj.rescale(p, {"m": c, "t": 0}))(params, 3.0)
    for name, factor in (("m/kernel", 3), ("t/embedding", 0), ("s/kernel", 1)):
        want = factor * update(params, name)
        np.testing.assert_allclose(update(got, name), want, atol=1e-5)


def broken(**leaves):
    params = adapted(base(), 0, names=["m/kernel"])
    return params | {"m": params["m"] | leaves}


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: lj.add(), "nothing to add"),
        (lambda: lj.add(broken(), weights=[1, 2]), "each of its 1 trees, found 2"),
        (lambda: lj.add(broken(), weights=[np.nan]), "weights must be finite"),
        (lambda: lj.add(broken(), base()), "no adapters"),
        (
            lambda: lj.add(broken(), adapted(base(1), 0)),
            "different bases: 'm/kernel' of tree 1",
        ),
        (
            lambda: lj.add(broken(), broken(kernel=jnp.zeros((6, 5)))),
            "different bases: 'm/kernel'",
        ),
        (
            lambda: lj.add(broken(lora_a=jnp.full((6, 2), np.nan))),
            "'m/lora_a' is not finite",
        ),
        (lambda: lj.add(broken(lora_a=jnp.ones((6, 3)))), "does not fit"),
        (lambda: lj.rescale(broken(), np.inf), "factor must be finite"),
        (lambda: lj.rescale(broken(), "2"), "factor must be finite"),
        (lambda: lj.rescale(broken(), {"n": 2}), "No weight matches 'n' of factor"),
        (lambda: lj.rescale(base(), 2), "no adapters"),
    ],
)
def test_add_and_rescale_refuse_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_add_refuses_adapters_with_different_axes():
    plain = {"kernel": jnp.ones((4, 4))}
    turned = {"kernel": Axes((), (1,), (0,))}
    one, two = lj.lorafy(plain, 2), lj.lorafy(plain, 2, axes=turned)
    with pytest.raises(ValueError, match="'kernel' have different axes"):
        lj.add(one, two)
