"""Tests of `resize`, `extract` and `principal` against NumPy's SVD in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import _matrices

Axes = lj.Axes
LAYOUTS = [
    ((12, 9), Axes((), (0,), (1,))),
    ((9, 12), Axes((), (1,), (0,))),
    ((2, 3, 8, 7), Axes((0, 1), (2,), (3,))),
    ((8, 2, 5), Axes((), (0,), (1, 2))),
    ((3, 2, 8, 5), Axes((0,), (2,), (1, 3))),
]


def matrices(w, axes):
    w = np.asarray(w, np.float64)
    w = np.transpose(w, (*axes.batch, *axes.inputs, *axes.outputs))
    count = lambda dims, at: int(np.prod(w.shape[at : at + len(dims)]))
    n, i = len(axes.batch), len(axes.inputs)
    sizes = count(axes.batch, 0), count(axes.inputs, n), count(axes.outputs, n + i)
    return w.reshape(sizes)


def truncated(m, r):
    u, s, v = np.linalg.svd(m, full_matrices=False)
    return (u[..., :r] * s[..., None, :r]) @ v[..., :r, :]


def adapted(shape, axes, rank, seed=0, **options):
    rng = np.random.default_rng(seed)
    w = jax.device_put(np.asarray(rng.standard_normal(shape), np.float32))
    params = lj.lorafy({"kernel": w}, rank, axes={"kernel": axes}, **options)
    draw = lambda x: jax.device_put(np.asarray(rng.standard_normal(x.shape), x.dtype))
    return params | {name: draw(params[name]) for name in ("lora_a", "lora_b")}


merge = jax.jit(lj.merge)  # one compilation for all of its operations


def change(params):
    merged, w = (np.asarray(x["kernel"], np.float64) for x in (merge(params), params))
    return merged - w


@pytest.mark.parametrize(("shape", "axes"), LAYOUTS)
def test_resize_to_a_smaller_rank_is_the_truncated_svd(shape, axes):
    params = adapted(shape, axes, 5, alpha=2.0)
    got = jax.jit(lambda p: lj.resize(p, 2))(params)
    want = truncated(matrices(change(params), axes), 2)
    np.testing.assert_allclose(matrices(change(got), axes), want, atol=1e-5)
    assert got["lora_a"].shape[-1] == 2


@pytest.mark.parametrize(("shape", "axes"), LAYOUTS)
def test_resize_to_a_larger_rank_is_exact_and_trainable(shape, axes):
    params = adapted(shape, axes, 2)
    got = lj.resize(params, 4)
    np.testing.assert_allclose(change(got), change(params), atol=1e-6)
    assert got["lora_a"].shape[-1] == 4 and got["lora_a"][..., 2:].all()
    assert got["kernel"] is params["kernel"]


def test_resize_draws_other_columns_for_each_weight():
    base = {name: {"kernel": jnp.ones((6, 6))} for name in "ab"}
    got = lj.resize(lj.lorafy(base, 2), 4)
    assert not np.allclose(got["a"]["lora_a"], got["b"]["lora_a"])


def test_resize_by_pattern():
    base = {name: {"kernel": jnp.ones((6, 6))} for name in "ab"}
    params = lj.lorafy(base, 3)
    got = lj.resize(params, {"a": 1})
    assert got["a"]["lora_b"].shape == (1, 6) and got["b"] == params["b"]


def test_resize_makes_no_array_of_the_weights_size():
    n, r = 4096, 8
    w = jax.ShapeDtypeStruct((n, n), jnp.float32)
    shapes = lj.lorafy({"kernel": w}, r)
    small = jax.jit(lambda p: lj.detach(lj.resize(p, 4)))
    stats = small.lower(shapes).compile().memory_analysis()
    factors = 2 * n * r * 4  # bytes
    peak = stats.temp_size_in_bytes + stats.output_size_in_bytes
    assert 0 < peak < 2 * factors


@pytest.mark.parametrize(("shape", "axes"), LAYOUTS)
def test_extract_is_the_truncated_svd_and_kept_its_share(shape, axes):
    rng = np.random.default_rng(1)
    base, tuned = (
        {"kernel": jax.device_put(np.asarray(rng.standard_normal(shape), np.float32))}
        for _ in "ab"
    )
    params = lj.extract(tuned, base, 2, axes={"kernel": axes})
    moved = matrices(tuned["kernel"], axes) - matrices(base["kernel"], axes)
    want = truncated(moved, 2)
    np.testing.assert_allclose(matrices(change(params), axes), want, atol=1e-5)
    ((path, rank, share),) = lj.kept(tuned, params).rows
    left = np.sum((moved - want) ** 2) / np.sum(moved**2)
    assert (path, rank) == ("kernel", 2) and abs(share - (1 - left)) < 1e-5


def test_extract_of_a_change_of_low_rank_is_exact():
    params = adapted((12, 9), Axes((), (0,), (1,)), 2)
    tuned, base = merge(params), lj.strip(params)
    got = lj.extract(tuned, base, 4)
    np.testing.assert_allclose(merge(got)["kernel"], tuned["kernel"], atol=1e-5)
    same = lj.extract(base, base, 2)
    assert same["lora_a"].all() and not same["lora_b"].any()


def test_extract_by_random_projections_is_nearly_exact(monkeypatch):
    monkeypatch.setattr(_matrices, "LARGE", 64)
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((200, 200)))[0] for _ in "uv")
    for spectrum in (np.ones(200), 1 / np.arange(1, 201)):  # flat: the worst case
        m = (u * spectrum) @ v.T
        tuned = {"kernel": jax.device_put(m.astype(np.float32))}
        base = {"kernel": jnp.zeros((200, 200))}
        got = change(lj.extract(tuned, base, 8))
        exact, found = (np.linalg.norm(m - x) for x in (truncated(m, 8), got))
        assert exact * (1 - 1e-6) <= found < 1.01 * exact


def test_extract_copies_also_and_names_other_changed_leaves():
    base = {"m": {"kernel": jnp.ones((6, 5)), "bias": jnp.zeros(5)}}
    tuned = jax.tree.map(lambda x: x + 1, base)
    with pytest.raises(ValueError, match="No adapter covers the changes of 'm/bias'"):
        lj.extract(tuned, base, 2)
    got = lj.merge(lj.extract(tuned, base, 2, also="bias"))
    np.testing.assert_allclose(got["m"]["bias"], 1)
    np.testing.assert_allclose(got["m"]["kernel"], 2, atol=1e-6)


@pytest.mark.parametrize(("shape", "axes"), LAYOUTS)
def test_principal_leaves_the_merged_weight_unchanged(shape, axes):
    rng = np.random.default_rng(0)
    base = {
        "kernel": jax.device_put(np.asarray(rng.standard_normal(shape), np.float32))
    }
    start = lj.principal(lj.lorafy(base, 2, alpha=3.0, axes={"kernel": axes}))
    np.testing.assert_allclose(merge(start)["kernel"], base["kernel"], atol=1e-5)
    want = truncated(matrices(base["kernel"], axes), 2)
    np.testing.assert_allclose(matrices(change(start), axes), want, atol=1e-5)


def test_principal_adapters_can_return_to_the_original_base():
    base = {"kernel": adapted((12, 9), Axes((), (0,), (1,)), 2)["kernel"]}
    start = lj.principal(lj.lorafy(base, 2))
    trained = start | {"lora_a": start["lora_a"] + 1, "lora_b": start["lora_b"] - 1}
    plain = lj.detach(lj.add(trained, lj.rescale(start, -1)))
    got = merge(lj.attach(plain, base))["kernel"]
    np.testing.assert_allclose(got, merge(trained)["kernel"], atol=1e-5)


def test_resize_keeps_shardings():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    place = jax.sharding.NamedSharding(mesh, spec)
    w = jax.device_put(jnp.ones((8, 6)), place)
    params = lj.resize(lj.lorafy({"kernel": w}, 3), 2)
    assert params["lora_a"].sharding.spec[0] == "x"


TRAINED = adapted((6, 5), Axes((), (0,), (1,)), 2)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: lj.resize(TRAINED, 0), "rank must be a whole number of at least 1"),
        (lambda: lj.resize(TRAINED, 6), "'kernel' has at most rank 5, found rank=6"),
        (lambda: lj.resize(TRAINED, {"x": 1}), "No weight matches 'x' of rank"),
        (
            lambda: lj.resize(TRAINED | {"lora_b": jnp.full((2, 5), np.inf)}, 1),
            "'lora_b' is not finite",
        ),
        (lambda: lj.resize({"kernel": jnp.ones((6, 5))}, 1), "no adapters"),
        (lambda: lj.principal(TRAINED), "'kernel' is trained: its B is not zero"),
        (
            lambda: lj.principal(
                lj.lorafy(lj.quantize({"kernel": jnp.ones((8, 8))}, "nf4"), 2)
            ),
            "'kernel' is quantized, and",
        ),
        (
            lambda: lj.principal(lj.lorafy({"kernel": jnp.full((4, 4), np.nan)}, 2)),
            "'kernel' is not finite",
        ),
        (
            lambda: lj.extract(
                {"kernel": jnp.ones((5, 6))}, {"kernel": jnp.ones((6, 5))}, 1
            ),
            r"'kernel' has shape \(5, 6\) in tuned and \(6, 5\) in base",
        ),
        (
            lambda: lj.extract(
                {"kernel": jnp.full((6, 5), np.nan)}, {"kernel": jnp.ones((6, 5))}, 1
            ),
            "change of 'kernel' is not finite",
        ),
        (
            lambda: lj.kept({"other": jnp.ones(3)}, TRAINED),
            "Pass two trees of one model",
        ),
    ],
)
def test_resize_extract_kept_and_principal_refuse_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()
