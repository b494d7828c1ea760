"""Every function takes a scale per rank: it equals B with these scales in its rows.

The oracle is NumPy's W + A diag(scale) B, and the same tree with the scales in B.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj

RNG = np.random.default_rng(0)
R = 3
AXES = {
    "stack/kernel": lj.Axes((0,), (1,), (2,)),
    "experts/kernel": lj.Axes((0, 1), (2,), (3,)),
    "heads/kernel": lj.Axes((), (0,), (1, 2)),
    "fused/kernel": lj.Axes((0,), (2,), (1, 3)),
}
SHAPES = {  # the shape of the weight, and the einsum of the update
    "m/kernel": ((6, 5), "ir,ro,r->io"),
    "table/embedding": ((7, 6), "ir,ro,r->io"),
    "stack/kernel": ((2, 6, 5), "lir,lro,lr->lio"),
    "experts/kernel": ((2, 3, 6, 5), "leir,lero,ler->leio"),
    "heads/kernel": ((6, 2, 4), "ir,rhd,r->ihd"),
    "fused/kernel": ((2, 3, 6, 4), "lxizr,lnxor,lr->lnio"),  # aligned
}


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def nested(flat):
    tree = {}
    for name, x in flat.items():
        module, leaf = name.split("/")
        tree[module] = {leaf: jax.device_put(x)}
    return tree


def adapted(names=SHAPES, **options):
    """Returns a tree with random factors, and a random scale for each rank."""
    base = nested({name: normal(*SHAPES[name][0]) for name in names})
    axes = {name: AXES[name] for name in names if name in AXES}
    make = lambda base: lj.lorafy(base, R, targets=[*names], axes=axes, **options)
    return with_rank_scales(lj.attach(drawn(lj.detach(make(base))), base))


def drawn(tree):
    return jax.tree.map(lambda x: jax.device_put(normal(*x.shape)), tree)


def with_rank_scales(params):
    """Returns the tree with scales (batch..., R); the last of each weight is zero."""
    new = {}
    for name, leaves in params.items():
        new[name] = dict(leaves)
        if "lora_scale" in leaves:
            scale = normal(*leaves["lora_scale"].shape, leaves["lora_a"].shape[-1])
            scale[..., -1] = 0
            new[name]["lora_scale"] = jax.device_put(scale)
    return new


def updates(params):
    """Returns A diag(scale) B of each weight, in float64."""
    found = {}
    for name, (shape, rule) in SHAPES.items():
        if (leaves := params.get(name.split("/")[0])) is None:
            continue
        parts = (leaves[f"lora_{part}"] for part in ("a", "b", "scale"))
        a, b, scale = (np.asarray(x, np.float64) for x in parts)
        assert scale.shape[-1] == a.shape[-1] and scale.any()
        found[name] = np.einsum(rule, a, b, scale).reshape(shape)
    return found


def weight(tree, name):
    module, leaf = name.split("/")
    return np.asarray(tree[module][leaf], np.float64)


def check(params, want, atol=1e-5):
    """Asserts that a tree of adapters, over the same base, has these updates."""
    merged = jax.jit(lj.merge)(params)
    for name, update in want.items():
        got = weight(merged, name) - weight(lj.strip(params), name)
        np.testing.assert_allclose(got, update, atol=atol, err_msg=name)


def test_merge_multiplies_each_rank_by_its_scale():
    params = adapted()
    check(params, updates(params))
    assert lj.count(params).trainable == lj.count(adapted()).trainable
    mask = lj.mask(params)
    assert not any(leaves["lora_scale"] for leaves in mask.values())


def test_merge_of_dora_with_rank_scales():
    params = adapted(dora=True)
    merged = jax.jit(lj.merge)(params)
    for name, update in updates(params).items():
        inputs = AXES[name].inputs if name in AXES else (0,)
        v = weight(params, name) + update
        norm = np.sqrt(np.sum(v**2, inputs, keepdims=True))
        m = np.asarray(params[name.split("/")[0]]["lora_magnitude"], np.float64)
        want = m.reshape(norm.shape) * v / norm
        np.testing.assert_allclose(weight(merged, name), want, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("dora", [False, True])
def test_lora_with_rank_scales_equals_the_merged_weights(dora, close):
    params = adapted(["m/kernel", "table/embedding", "stack/kernel"], dora=dora)
    ids = jnp.array([1, 6, 3, 1])

    def fn(params, ids):
        x = params["table"]["embedding"][ids]
        y = jnp.einsum("bi,lio->lbo", x, params["stack"]["kernel"])
        step = lambda c, w: (c + jnp.sin(x @ w), None)
        z, _ = jax.lax.scan(step, y[0], params["stack"]["kernel"])
        return x @ params["m"]["kernel"] + z + y[1], x @ params["table"]["embedding"].T

    got = jax.jit(lj.lora(fn, materialize="error"))(params, ids)
    close(got, jax.jit(fn)(lj.merge(params), ids))


def test_lora_learns_nothing_in_a_rank_whose_scale_is_zero():
    """Pruning a rank is setting its scale to zero."""
    base = {"kernel": jax.device_put(normal(6, 5))}
    params = lj.lorafy(base, 4)
    params |= drawn({name: params[name] for name in ("lora_a", "lora_b")})
    keep = jnp.array([0.3, 0.1, 0.9, 0.2]) > 0.25
    pruned = params | {"lora_scale": jnp.where(keep, params["lora_scale"], 0)}
    some = np.flatnonzero(keep)
    small = params | {
        "lora_a": params["lora_a"][:, some],
        "lora_b": params["lora_b"][some],
    }
    x = jax.device_put(normal(2, 6))
    loss = lambda p: jnp.sum(jnp.sin(lj.lora(lambda p, x: x @ p["kernel"])(p, x)))
    (got, grads), (want, others) = (
        jax.value_and_grad(loss)(p) for p in (pruned, small)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(grads["lora_a"][:, some], others["lora_a"], atol=1e-5)
    np.testing.assert_allclose(grads["lora_b"][some], others["lora_b"], atol=1e-5)
    gone = np.flatnonzero(~keep)
    assert not grads["lora_a"][:, gone].any() and not grads["lora_b"][gone].any()
    # The exact adapter without these ranks, for a file.
    resized = lj.resize(pruned, 2)
    np.testing.assert_allclose(
        lj.merge(resized)["kernel"], lj.merge(small)["kernel"], atol=1e-5
    )


def test_save_and_load_keep_rank_scales(tmp_path, close):
    params = adapted()
    lj.save(tmp_path / "a.safetensors", params)
    close(lj.load(tmp_path / "a.safetensors", lj.strip(params)), params, atol=0)
    halves = lj.split(params)
    close(lj.combine(*halves), params, atol=0)


def test_rescale_and_add_of_rank_scales():
    params = adapted()
    want = updates(params)
    check(lj.rescale(params, -2.0), {name: -2 * x for name, x in want.items()})
    one = lj.attach(drawn(lj.detach(params)), lj.strip(params))
    check(
        lj.add(params, one, weights=[0.5, 2]),
        {name: x / 2 + 2 * updates(one)[name] for name, x in want.items()},
        atol=5e-5,
    )


def test_stack_and_take_of_rank_scales_and_of_one_scale():
    params = adapted()
    want = updates(params)
    plain = {
        name: leaves | {"lora_scale": jnp.ones(leaves["lora_scale"].shape[:-1])}
        for name, leaves in params.items()
    }
    both = lj.stack([plain, params])
    check(lj.take(both, 1), want)
    ones = {
        name: leaves | {"lora_scale": jnp.ones_like(leaves["lora_scale"])}
        for name, leaves in params.items()
    }
    check(lj.take(both, 0), updates(ones))


def test_resize_of_rank_scales():
    params = adapted()
    want = updates(params)
    # One scale of each weight is zero, so that a smaller rank loses nothing.
    for rank in (R - 1, R + 2):
        got = jax.jit(lambda p, rank=rank: lj.resize(p, rank))(params)
        assert got["m"]["lora_a"].shape == (6, rank)
        check(got, want, atol=5e-5)


def test_kept_and_principal_of_rank_scales():
    params = adapted()
    for path, _, share in lj.kept(lj.merge(params), params).rows:
        assert abs(share - 1) < 1e-5, path
    new = {
        name: leaves | {"lora_b": jnp.zeros_like(leaves["lora_b"])}
        for name, leaves in params.items()
    }
    merged, want = lj.merge(lj.principal(new)), lj.strip(params)
    for name in SHAPES:
        x, y = (weight(tree, name) for tree in (merged, want))
        np.testing.assert_allclose(x, y, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("layer", "plain", "x"),
    [
        (lj.Dense(5, rank=R), nn.Dense(5), normal(4, 6)),
        (lj.Embed(7, 6, rank=R), nn.Embed(7, 6), np.array([0, 6, 2])),
    ],
)
def test_layers_with_rank_scales(layer, plain, x, close):
    leaves = drawn(layer.init(jax.random.key(0), x)["params"])
    (variables,) = with_rank_scales({"params": leaves}).values()
    variables = {"params": variables}
    want = plain.apply(lj.merge(variables), x)
    close(layer.apply(variables, x), want)


@pytest.mark.usefixtures("third_party")
def test_lora_module_with_rank_scales(close):
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    one, two = (
        lj.LoRA(model, R, alpha=alpha, rngs=nnx.Rngs(i))
        for i, alpha in enumerate((2.0, 5.0))
    )
    for module in (one, two):
        module.model.lora_b[...] = jax.device_put(normal(R, 5))
    both, x = lj.add(one, two, weights=[1, -0.5]), jax.device_put(normal(4, 6))
    assert both.model.lora_scale.shape == (2 * R,)
    close(both(x), one(x) - 0.5 * (two(x) - model(x)))
    close(both(x), both.merge()(x))


NAMES = {
    "m/kernel": "m",
    "table/embedding": "table",
    "stack/kernel": "layers.{layer}.up",
}


@pytest.mark.parametrize("dora", [False, True])
def test_export_peft_and_import_peft_of_rank_scales(tmp_path, dora):
    params = adapted(NAMES, dora=dora)
    lj.export_peft(tmp_path, params, NAMES)
    back = lj.import_peft(tmp_path, lj.strip(params), NAMES)
    merged, want = lj.merge(back), lj.merge(params)
    for name in NAMES:
        x, y = (weight(tree, name) for tree in (merged, want))
        np.testing.assert_allclose(x, y, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("alpha", [None, 6])
def test_as_qwix_of_rank_scales(alpha):
    params = adapted(["m/kernel"])
    theirs = lj.as_qwix(params, alpha=alpha)["m"]
    a, b = (np.asarray(theirs[f"kernel_lora_{part}"], np.float64) for part in "ab")
    want = updates(params)["m/kernel"]
    np.testing.assert_allclose((alpha or R) / R * a @ b, want, atol=1e-5)
