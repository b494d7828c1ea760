"""Tests DoRA against m (W + s A B) / |W + s A B| in NumPy."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj

Axes = lj.Axes
SHAPES = {
    "m/kernel": ((6, 5), Axes((), (0,), (1,))),
    "t/embedding": ((7, 4), Axes((), (0,), (1,))),
    "s/kernel": ((3, 4, 5), Axes((0,), (1,), (2,))),
    "h/kernel": ((4, 2, 3), Axes((), (0,), (1, 2))),
    "o/kernel": ((5, 6), Axes((), (1,), (0,))),
    "f/kernel": ((3, 2, 4, 5), Axes((0,), (2,), (1, 3))),
}
AXES = {name: axes for name, (_, axes) in SHAPES.items()}


@functools.cache
def adapted(how=None):
    """Returns random weights and trained adapters, over a quantized base or not."""
    rng = np.random.default_rng(0)
    draw = lambda x: jax.device_put(np.asarray(rng.standard_normal(x.shape), x.dtype))
    base = {}
    for name, (shape, _) in SHAPES.items():
        module, leaf = name.split("/")
        base[module] = {leaf: draw(jax.ShapeDtypeStruct(shape, np.float32))}
    options = {"targets": "*", "axes": AXES}
    if how:  # in one program, not in one for each weight
        base = jax.jit(lambda base: lj.quantize(base, how, block=2, **options))(base)
    start = lambda base: lj.detach(lj.lorafy(base, 2, alpha=3.0, dora=True, **options))
    return lj.attach(jax.tree.map(draw, jax.eval_shape(start, base)), base)


@functools.cache
def dequantized(how):
    """Returns the weights of `adapted(how)` as floats, from one program."""
    base = lj.strip(adapted(how))
    return jax.jit(lj.dequantize)(base) if how else base


def written_out(how, name):
    """Returns a weight of `adapted(how)` in float64, and |W + s A B|."""
    shape, axes = SHAPES[name]
    module, leaf = name.split("/")
    leaves = adapted(how)[module]
    w, a, b, scale = (
        np.asarray(x, np.float64)
        for x in (
            dequantized(how)[module][leaf],
            *(leaves[n] for n in ("lora_a", "lora_b", "lora_scale")),
        )
    )
    letters = "abcd"[: len(shape)]
    pick = lambda *groups: "".join(letters[d] for g in groups for d in g)
    if a.ndim == len(shape) + 1:
        sizes = [n if d in axes.batch else 1 for d, n in enumerate(shape)]
        delta = np.sum(a * b, -1) * scale.reshape(sizes)
    else:
        left = (
            f"{pick(axes.batch, axes.inputs)}r,{pick(axes.batch)}r{pick(axes.outputs)}"
        )
        delta = np.einsum(f"{left},{pick(axes.batch)}->{letters}", a, b, scale)
    total = w + delta
    norm = np.sqrt(np.sum(total**2, axis=axes.inputs, keepdims=True))
    m = np.asarray(leaves["lora_magnitude"], np.float64)
    return m.reshape(norm.shape) * total / norm, norm


@pytest.mark.parametrize("how", [None, "int8", "nf4"])
def test_merge_of_dora_equals_the_formula(how):
    params = adapted(how)
    merged = lj.merge(params) if how is None else jax.jit(lj.merge)(params)
    for name in SHAPES:
        module, leaf = name.split("/")
        got, (want, _) = merged[module][leaf], written_out(how, name)
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("how", [None, "nf4"])
def test_lorafy_dora_keeps_what_the_model_computes(how):
    base = {"m": lj.strip(adapted())["m"]}
    base = lj.quantize(base, how, block=2) if how else base
    params = lj.lorafy(base, 2, dora=True)
    assert params["m"]["lora_magnitude"].shape == (5,)
    plain = lj.dequantize(base) if how else base
    want = plain["m"]["kernel"]
    np.testing.assert_allclose(lj.merge(params)["m"]["kernel"], want, atol=1e-6)


def model(params, x):
    """Uses each weight: products, both directions of a table, a scan, and views."""
    h = x @ params["m"]["kernel"]  # (2, 5)
    h = h @ params["o"]["kernel"] + h @ jnp.reshape(params["o"]["kernel"], (5, 6))
    rows = params["t"]["embedding"][jnp.array([1, 6])]  # (2, 4)
    logits = rows @ params["t"]["embedding"].T  # (2, 7)
    heads = jnp.einsum("bi,inh->bnh", rows, params["h"]["kernel"])
    out = jnp.einsum("bnh,inh->bi", heads, params["h"]["kernel"])
    step = lambda c, w: (c, jnp.sin(c @ w))
    _, layers = lax.scan(step, rows, params["s"]["kernel"])
    fused = jnp.einsum("bi,knif->kbnf", rows, params["f"]["kernel"])
    both = jnp.concatenate([params["m"]["kernel"], params["m"]["kernel"] * 2], 1)
    parts = (h, logits, out, layers, fused, x @ both)
    return sum(jnp.sum(jnp.sin(part)) for part in parts)


def formula(params, constants):
    """Returns the merged tree by the formula in JAX, with the norm as a constant."""
    merged = {}
    for name, (_, axes) in SHAPES.items():
        module, leaf = name.split("/")
        plain = {n: x for n, x in params[module].items() if n != "lora_magnitude"}
        total = lj.merge({"x": plain})["x"][leaf]
        norm = constants[name].astype(np.float32)
        m = jnp.reshape(params[module]["lora_magnitude"], norm.shape)
        merged[module] = {leaf: m * total / norm}
        assert norm.shape == tuple(
            1 if d in axes.inputs else n for d, n in enumerate(total.shape)
        )
    return merged


@pytest.mark.parametrize("how", [None, "int8"])
def test_lora_of_dora_equals_the_formula_with_gradients(how):
    params, x = adapted(how), jnp.asarray([[1.0] * 6, [0.5] * 6])
    norms = {name: written_out(how, name)[1] for name in SHAPES}
    adapters, base = lj.split(params)
    chex.clear_trace_counter()
    fn = chex.assert_max_traces(lj.lora(model, materialize="error"), n=1)
    got = lambda a: fn(lj.combine(a, base), x)
    want = lambda a: model(formula(lj.combine(a, base), norms), x)
    values, grads = jax.jit(jax.value_and_grad(got))(adapters)
    want_values, want_grads = jax.jit(jax.value_and_grad(want))(adapters)
    np.testing.assert_allclose(values, want_values, atol=1e-4)
    for got, want in zip(*map(jax.tree.leaves, (grads, want_grads)), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4)


def fill(params, ids):
    """Out-of-bounds rows are 7, or masked: neither has a gradient or a magnitude."""
    table = params["t"]["embedding"]
    sevens = table.at[ids].get(mode="fill", fill_value=7.0)
    columns = table.T.at[:, ids].get(mode="fill", fill_value=7.0)
    masked = jnp.where((ids < 7)[:, None], jnp.take(table, ids, axis=0), 0.0)
    return jnp.sin(sevens).sum() + jnp.sin(columns).sum() + jnp.sin(masked).sum()


def one_output(params, ids):
    stack = params["s"]["kernel"][:1, :, 2:3]
    return jnp.sin(lax.ragged_dot(jnp.ones((2, 4)), stack, ids[:1])).sum()


@pytest.mark.parametrize("fn", [fill, one_output])
def test_lora_of_dora_applies_the_gain_in_every_product(fn):
    params, ids = adapted(), np.array([2, 9, 6])
    adapters, base = lj.split(params)
    lora = lj.lora(fn, unused="ignore", materialize="allow")
    run = lambda a: lora(lj.combine(a, base), ids)
    merged = lambda a: fn(lj.merge(lj.combine(a, base)), ids)
    got, want = (jax.jit(jax.value_and_grad(f))(adapters) for f in (run, merged))
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


def test_lora_of_dora_materializes_with_a_warning():
    params, x = adapted(), np.ones((2, 6), np.float32)
    fn = lambda params, x: x @ (params["m"]["kernel"] + 1)
    own = {"m": params["m"]}
    with pytest.warns(UserWarning, match="'m/kernel' meets 'add'"):
        got = jax.jit(lj.lora(fn))(own, x)
    want = x @ (written_out(None, "m/kernel")[0] + 1)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lj.Dense(5, rank=2, dora=True), jnp.ones((2, 6))),
        (lj.DenseGeneral((2, 3), rank=2, dora=True), jnp.ones((2, 6))),
        (lj.Embed(7, 4, rank=2, dora=True), jnp.array([1, 6])),
        (lj.Conv(5, (3,), rank=2, dora=True), jnp.ones((1, 6, 4))),
        (lj.Einsum((3, 4, 5), "btd,ndh->btnh", rank=2, dora=True), jnp.ones((1, 2, 4))),
    ],
)
def test_layers_with_dora(layer, x):
    params = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    params = dict(params) | {
        name: np.asarray(params[name]) + np.float32(0.3)
        for name in ("lora_a", "lora_b", "lora_magnitude")
    }
    kinds = {lj.Dense: nn.Dense, lj.DenseGeneral: nn.DenseGeneral, lj.Embed: nn.Embed}
    plain = kinds | {lj.Conv: nn.Conv, lj.Einsum: nn.Einsum}
    own = {
        f: getattr(layer, f)
        for f in ("features", "kernel_size", "num_embeddings", "shape", "einsum_str")
        if hasattr(layer, f)
    }
    apply = plain[type(layer)](**own).apply

    @jax.jit
    def both(p, x):
        return layer.apply({"params": p}, x), apply({"params": lj.merge(p)}, x)

    got, want = both(params, x)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_lorafy_dora_warns_of_zero_outputs_and_keeps_them_zero():
    w = jax.device_put(np.tile(np.float32([1, 0, 1]), (4, 1)))
    with pytest.warns(
        UserWarning, match="1 outputs of 'kernel' have only zero weights"
    ):
        params = lj.lorafy({"kernel": w}, 2, dora=True)
    adapters, base = lj.split(params)
    fn = lj.lora(lambda params, x: x @ params["kernel"])
    loss = lambda a: jnp.sum(fn(lj.combine(a, base), jnp.ones((2, 4))) ** 2)
    grads = jax.jit(jax.grad(loss))(adapters)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    assert not lj.merge(params)["kernel"][:, 1].any()


def test_lorafy_dora_works_with_every_verb(tmp_path):
    params = adapted()
    base = lj.strip(params)
    assert "lora_magnitude" not in base["m"]
    lj.save(tmp_path / "a.safetensors", params)
    back = lj.load(tmp_path / "a.safetensors", base)
    chex.assert_trees_all_equal(back, params)
    chex.assert_trees_all_equal(lj.attach(lj.detach(params), base), params)
    assert lj.mask(params)["m"]["lora_magnitude"]
    assert lj.labels(params)["m"]["lora_magnitude"] == "lora_magnitude"
    trained = sum(x.size for x in jax.tree.leaves(lj.split(params)[0]))
    assert lj.count(params).trainable == trained
    shapes = jax.eval_shape(
        lambda: lj.lorafy(base, 2, targets="*", axes=AXES, dora=True)
    )
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)


def test_lorafy_dora_shards_magnitudes_like_the_outputs():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    w = jax.device_put(np.ones((4, 6), np.float32), place)
    params = lj.lorafy({"kernel": w}, 2, dora=True)
    assert params["lora_magnitude"].sharding.spec == jax.sharding.PartitionSpec("x")


@pytest.mark.parametrize("spec", [("x", None), (None, "x")])
def test_lora_of_dora_on_a_mesh_of_explicit_axes(spec):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    at = lambda *spec: jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(*spec)
    )
    w = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    params = lj.lorafy({"kernel": jax.device_put(w, at(*spec))}, 2, dora=True)
    params |= {name: params[name] + 1 for name in ("lora_b", "lora_magnitude")}
    x = jax.device_put(np.ones((4, 8), np.float32), at(None, None))
    fn = lambda p, x: jnp.matmul(x, p["kernel"], out_sharding=at(None, spec[1]))
    got = jax.jit(lj.lora(fn))(params, x)
    alone = jax.device_put(jax.device_get(params))
    want = np.ones((4, 8)) @ np.asarray(lj.merge(alone)["kernel"])
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_add_and_rescale_refuse_dora_and_resize_does_not():
    params = {"m": adapted()["m"]}
    for call in (lambda: lj.add(params, params), lambda: lj.rescale(params, 2)):
        with pytest.raises(ValueError, match=r"cannot be exact for 'm/kernel'.*DoRA"):
            call()
    want, _ = written_out(None, "m/kernel")
    options = {"targets": "*", "axes": {"m/kernel": AXES["m/kernel"]}, "dora": True}

    @jax.jit
    def merged(params):
        start = lj.principal(lj.lorafy(lj.strip(params), 2, **options))
        return lj.merge(lj.resize(params, 3)), lj.merge(start)

    resized, start = merged(params)
    np.testing.assert_allclose(resized["m"]["kernel"], want, atol=1e-5)
    np.testing.assert_allclose(start["m"]["kernel"], params["m"]["kernel"], atol=1e-5)


def test_kept_of_dora_includes_magnitudes():
    params = {"m": adapted()["m"]}
    ((_, _, share),) = lj.kept(lj.merge(params), params).rows
    assert abs(share - 1) < 1e-5


def test_check_adapter_names_a_broken_magnitude():
    params = adapted()
    broken = params | {"m": params["m"] | {"lora_magnitude": jnp.ones(4)}}
    with pytest.raises(
        ValueError, match=r"'m/kernel' does not fit.*lora_magnitude \(4,\)"
    ):
        lj.merge(broken)
