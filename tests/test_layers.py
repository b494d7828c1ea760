"""Tests that the layers equal Flax's own with the adapters in their parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


MASK = (normal(3, 2, 4) > 0).astype(np.float32)
X, IMAGE, IDS = normal(5, 4), normal(2, 6, 6, 4), np.array([[0, 6], [3, 3]])
# Each layer's name, its arguments, an input, and whether it can stay factored.
LAYERS = {
    "Dense": ("Dense", {"features": 3}, X, True),
    "Dense without bias": ("Dense", {"features": 3, "use_bias": False}, X, True),
    "vector": ("Dense", {"features": 3}, X[0], True),
    "heads": ("DenseGeneral", {"features": (2, 3)}, X, True),
    "out": ("DenseGeneral", {"features": 4, "axis": (-2, -1)}, normal(5, 2, 3), True),
    "batched": (
        "DenseGeneral",
        {"features": (2, 3), "axis": (1, 3), "batch_dims": (0,)},
        normal(2, 3, 5, 4),
        True,
    ),
    "Embed": ("Embed", {"num_embeddings": 7, "features": 4}, IDS, True),
    "Conv": ("Conv", {"features": 5, "kernel_size": (3, 3)}, IMAGE, True),
    "strided": (
        "Conv",
        {
            "features": 5,
            "kernel_size": (3, 2),
            "strides": 2,
            "kernel_dilation": 2,
            "padding": "CIRCULAR",
            "use_bias": False,
        },
        IMAGE,
        True,
    ),
    "causal": (
        "Conv",
        {"features": 4, "kernel_size": 3, "padding": "CAUSAL"},
        normal(2, 2, 5, 2),
        True,
    ),
    "masked": (
        "Conv",
        {"features": 4, "kernel_size": 3, "mask": MASK},
        normal(5, 2),
        False,
    ),
    "grouped": (
        "Conv",
        {"features": 6, "kernel_size": (3, 3), "feature_group_count": 2},
        IMAGE,
        True,
    ),
    "Einsum": (
        "Einsum",
        {"shape": (3, 4, 2), "einsum_str": "bd,ndh->bnh"},
        X,
        True,
    ),
    "experts": (
        "Einsum",
        {"shape": (2, 4, 3), "einsum_str": "ebd,edf -> ebf", "use_bias": False},
        normal(2, 5, 4),
        True,
    ),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    name, options, x, factored = LAYERS[request.param]
    return getattr(lj, name), getattr(nn, name), options, x, factored


def quietly(layer, factored, *args, **kwargs):
    """Applies a layer; one that must materialize W + AB has to warn."""
    if factored:
        return layer.apply(*args, **kwargs)
    with pytest.warns(UserWarning, match="needs the whole weight"):
        return layer.apply(*args, **kwargs)


def test_layers_without_rank_are_those_of_flax(layer, close):
    ours, plain, options, x, _ = layer
    key, (ours, plain) = jax.random.key(0), (make(**options) for make in (ours, plain))
    variables = jax.jit(ours.init)(key, x)
    close(variables, jax.jit(plain.init)(key, x), atol=0)
    close(jax.jit(ours.apply)(variables, x), jax.jit(plain.apply)(variables, x), 0)


def test_layers_init_adds_an_adapter_without_effect(layer, close):
    ours, plain, options, x, factored = layer
    made = ours(**options, rank=2, alpha=6)
    y, variables = jax.jit(made.init_with_output)(jax.random.key(0), x)
    base = jax.jit(plain(**options).init)(jax.random.key(0), x)
    close(lj.strip(variables), base, atol=0)
    close(y, plain(**options).apply(base, x), atol=0)
    close(quietly(made, factored, variables, x), y, atol=0)
    params = variables["params"]
    assert not params["lora_b"].any() and params["lora_a"].any()
    assert (params["lora_scale"] == 3).all()
    assert (
        lj.count(variables).trainable == params["lora_a"].size + params["lora_b"].size
    )


def test_layers_equal_the_merged_layers_of_flax(layer, close, randomized):
    ours, plain, options, x, factored = layer
    made = ours(**options, rank=2, alpha=6)
    variables = randomized(jax.jit(made.init)(jax.random.key(0), x))
    merged = jax.jit(lj.merge)(variables)
    want = plain(**options).apply(merged, x)
    close(quietly(made, factored, variables, x), want)
    close(quietly(ours(**options), factored, variables, x), want)
    # The same model under `lora`, and on the merged parameters.
    allowed = lj.lora(made.apply, materialize="error" if factored else "allow")
    close(allowed(variables, x), want)
    close(made.apply(merged, x), want)


def test_dense_and_embed_equal_numpy(randomized):
    """The formula is y = x W + b + (alpha / r) x A B, and a lookup of the same."""
    for module, x in (
        (lj.Dense(3, rank=2, alpha=5), X),
        (lj.Embed(7, 4, rank=2, alpha=5), IDS),
    ):
        variables = randomized(module.init(jax.random.key(0), x))
        p = {name: np.asarray(v, np.float64) for name, v in variables["params"].items()}
        update = 5 / 2 * p["lora_a"] @ p["lora_b"]
        if "embedding" in p:
            want, plain = (p["embedding"] + update)[x], nn.Embed(7, 4)
        else:
            want, plain = x @ p["kernel"] + p["bias"] + x @ update, nn.Dense(3)
        np.testing.assert_allclose(module.apply(variables, x), want, atol=1e-5)
        np.testing.assert_allclose(lj.lora(plain.apply)(variables, x), want, atol=1e-5)


def test_embed_attend(close, randomized):
    layer = lj.Embed(7, 4, rank=2)
    variables = randomized(layer.init(jax.random.key(0), IDS))
    got = layer.apply(variables, X, method="attend")
    close(got, nn.Embed(7, 4).apply(lj.merge(variables), X, method="attend"))


def test_dense_rslora_scale():
    params = lj.Dense(4, rank=4, alpha=6, rslora=True).init(jax.random.key(0), X)[
        "params"
    ]
    assert params["lora_scale"] == 3


def test_dense_uses_trained_copies(randomized):
    layer = lj.Dense(3)
    variables = layer.init(jax.random.key(0), X)
    for options in ({"also": "bias"}, {"also": ["kernel", "bias"]}):
        options |= {"targets": "other"}
        base = variables | {"other": jnp.ones((2, 2))}
        params = randomized(lj.lorafy(base, 1, **options))
        del params["other"], params["other_lora_a"], params["other_lora_b"]
        del params["other_lora_scale"]
        want = nn.Dense(3).apply(lj.merge(params), X)
        assert jnp.abs(want - layer.apply(variables, X)).max() > 0.01
        np.testing.assert_allclose(layer.apply(params, X), want, atol=1e-6)


def test_dense_with_a_narrow_kernel_has_float32_factors(randomized):
    layer = lj.Dense(3, rank=2, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    x = jnp.asarray(X, jnp.bfloat16)
    variables = randomized(layer.init(jax.random.key(0), x))
    assert variables["params"]["lora_a"].dtype == jnp.float32
    y = layer.apply(variables, x)
    assert y.dtype == jnp.bfloat16
    want = nn.Dense(3).apply(lj.merge(variables), x).astype(jnp.float32)
    np.testing.assert_allclose(y.astype(jnp.float32), want, atol=0.1)


INIT = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(lj.Dense(4, rank=2, kernel_init=INIT, name="dense")(x)), None


class Model(nn.Module):
    """A scan of rematerialized layers with named axes."""

    @nn.compact
    def __call__(self, ids):
        embed = lj.Embed(7, 4, rank=2, name="embed")
        x = embed(ids)
        for _ in range(2):
            x = nn.tanh(lj.Dense(4, rank=2, kernel_init=INIT)(x))

        layers = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(name="layers")(x, None)
        return embed.attend(x)


def test_layers_under_scan_and_remat(close, randomized):
    variables = jax.jit(Model().init)(jax.random.key(0), IDS)
    scanned = variables["params"]["layers"]["dense"]
    assert scanned["lora_a"].value.shape == (3, 4, 2)
    assert scanned["lora_a"].names == ("layers", "in", None)
    assert scanned["lora_b"].names == ("layers", None, "out")
    assert scanned["lora_scale"].value.shape == (3,)
    a = np.asarray(scanned["lora_a"].value)
    assert not np.allclose(a[0], a[1])
    variables = randomized(variables)
    merged = lambda v, ids: Model().apply(lj.merge(v), ids)
    want = jax.jit(merged)(variables, IDS)
    close(jax.jit(Model().apply)(variables, IDS), want)
    close(lj.lora(Model().apply, materialize="error")(variables, IDS), want)

    def gradient(fn):
        adapters, base = lj.split(variables)
        total = lambda a: jnp.sin(fn(lj.combine(a, base), IDS)).sum()
        return jax.jit(jax.grad(total))(adapters)

    close(gradient(Model().apply), gradient(merged), atol=1e-4)
