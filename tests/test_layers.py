"""Tests that the layers equal Flax's own with the adapters in their parameters."""

import functools

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


def quietly(layer, factored, *args, **kwargs):
    """Applies a layer; one that must materialize W + AB has to warn."""
    if factored:
        return layer.apply(*args, **kwargs)
    with pytest.warns(UserWarning, match="needs W . scale"):
        return layer.apply(*args, **kwargs)


def initialized(layer, x):
    """Initializes a layer in one program, not in one for each operation."""
    return jax.jit(layer.init)(jax.random.key(0), x)


def layers(name):
    """Returns a layer with an adapter, without one, and Flax's own."""
    kind, options, _, _ = LAYERS[name]
    ours, flaxs = getattr(lj, kind), getattr(nn, kind)
    return ours(**options, rank=2, alpha=6), ours(**options), flaxs(**options)


@functools.cache
def started(name):
    """Returns variables and outputs of the three layers, from one program."""
    made, bare, plain = layers(name)
    _, _, x, factored = LAYERS[name]

    @jax.jit
    def start(key):
        y, adapted = made.init_with_output(key, x)
        again = quietly(made, factored, adapted, x)
        ours, flaxs = bare.init(key, x), plain.init(key, x)
        pairs = (ours, bare.apply(ours, x)), (flaxs, plain.apply(flaxs, x))
        return (adapted, y, again), *pairs

    return start(jax.random.key(0))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_without_rank_are_those_of_flax(name, close):
    _, (variables, y), (plain, want) = started(name)
    close(variables, plain, atol=0)
    close(y, want, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_init_adds_an_adapter_without_effect(name, close):
    (variables, y, again), _, (base, want) = started(name)
    close(lj.strip(variables), base, atol=0)
    close(y, want, atol=0)
    close(again, y, atol=0)
    a, b, scale = (
        np.asarray(variables["params"][f"lora_{part}"]) for part in ("a", "b", "scale")
    )
    assert not b.any() and a.any() and (scale == 3).all()
    assert lj.count(variables).trainable == a.size + b.size


@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_the_merged_layers_of_flax(name, close, randomized):
    made, bare, plain = layers(name)
    _, _, x, factored = LAYERS[name]
    allowed = lj.lora(made.apply, materialize="error" if factored else "allow")

    @jax.jit
    def results(variables):
        merged = lj.merge(variables)
        return plain.apply(merged, x), (
            quietly(made, factored, variables, x),
            quietly(bare, factored, variables, x),
            # The same model under `lora`, and on the merged parameters.
            allowed(variables, x),
            made.apply(merged, x),
        )

    want, results_of_ours = results(randomized(started(name)[0][0]))
    for got in results_of_ours:
        close(got, want)


def test_dense_and_embed_equal_numpy(randomized):
    """The formula is y = x W + b + (alpha / r) x A B, and a lookup of the same."""
    for module, x in (
        (lj.Dense(3, rank=2, alpha=5), X),
        (lj.Embed(7, 4, rank=2, alpha=5), IDS),
    ):
        variables = randomized(initialized(module, x))
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
    variables = randomized(initialized(layer, IDS))
    got = layer.apply(variables, X, method="attend")
    close(got, nn.Embed(7, 4).apply(lj.merge(variables), X, method="attend"))


def test_dense_rslora_scale():
    layer = lj.Dense(4, rank=4, alpha=6, rslora=True)
    assert initialized(layer, X)["params"]["lora_scale"] == 3


def test_dense_uses_trained_copies(randomized):
    layer = lj.Dense(3)
    variables = initialized(layer, X)
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
    variables = randomized(initialized(layer, x))
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
    variables = initialized(Model(), IDS)
    scanned = variables["params"]["layers"]["dense"]
    assert scanned["lora_a"].value.shape == (3, 4, 2)
    assert scanned["lora_a"].names == ("layers", "in", None)
    assert scanned["lora_b"].names == ("layers", None, "out")
    assert scanned["lora_scale"].value.shape == (3,)
    a = np.asarray(scanned["lora_a"].value)
    assert not np.allclose(a[0], a[1])
    merged = lambda v, ids: Model().apply(lj.merge(v), ids)
    strict = lj.lora(Model().apply, materialize="error")

    @jax.jit
    def gradients(variables):
        adapters, base = lj.split(variables)

        def total(adapters, fn):
            y = fn(lj.combine(adapters, base), IDS)
            return jnp.sin(y).sum(), y

        grad = jax.grad(total, has_aux=True)
        return [grad(adapters, fn) for fn in (merged, Model().apply, strict)]

    (want, y), *results = gradients(randomized(variables))
    for got, y_got in results:
        close(y_got, y)
        close(got, want, atol=1e-4)
