"""Tests leaves that are trained in full, `also=` in `lorafy`, with every verb."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj


def classifier(params, x):
    h = jnp.tanh(x @ params["m"]["kernel"])
    return h @ params["head"]["kernel"] + params["head"]["bias"][None]


def with_head(dtype=jnp.float32):
    rng = np.random.default_rng(3)
    draw = lambda *shape: jax.device_put(np.asarray(rng.standard_normal(shape), dtype))
    head = {"kernel": draw(8, 2), "bias": draw(2)}
    return {"m": {"kernel": draw(8, 8)}, "head": head}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_uses_a_trained_copy_in_place_of_its_leaf(dtype, randomized, close):
    base, x = with_head(dtype), jnp.ones((3, 8), dtype)
    adapted = lj.lorafy(base, 2, targets="m", also="head")
    apply = jax.jit(lj.lora(classifier))
    np.testing.assert_array_equal(apply(adapted, x), jax.jit(classifier)(base, x))
    params = randomized(adapted)
    assert jnp.abs(apply(params, x) - apply(adapted, x)).max() > 0.1
    atol = 1e-5 if dtype == "float32" else 0.1
    merged = jax.jit(lambda p: classifier(lj.merge(p), x))
    close(apply(params, x), merged(params), atol=atol)
    assert lj.merge(params)["head"]["kernel"].dtype == dtype
    loss = lambda fn: lambda params: jnp.sum(jnp.sin(fn(params).astype(jnp.float32)))
    got = jax.jit(jax.grad(loss(lambda p: apply(p, x))))(params)
    want = jax.jit(jax.grad(loss(merged)))(params)
    for name in ("lora_w", "bias_lora_w"):
        assert got["head"][name].dtype == jnp.float32
        close(got["head"][name], want["head"][name], atol=atol)
    assert not got["head"]["kernel"].any(), "the leaf itself is not read"


def test_lorafy_also_keeps_small_updates_of_a_narrow_head():
    params = lj.lorafy(with_head("bfloat16"), 2, targets="m", also="head")
    moved = params["head"]["bias"].astype(jnp.float32)
    copy = params["head"]["bias_lora_w"]
    for _ in range(300):
        copy = copy + jnp.float32(1e-4)
    params["head"]["bias_lora_w"] = copy
    merged = lj.merge(params)["head"]["bias"].astype(jnp.float32)
    np.testing.assert_allclose(merged - moved, 0.03, atol=0.01)


def test_lora_computes_nothing_with_a_replaced_leaf():
    base, x = with_head(), jnp.ones((64, 8))
    loss = lambda params: jnp.sum(lj.lora(classifier)(params, x) ** 2)

    def compiled(trained, frozen, join):
        grads = jax.grad(lambda trained, frozen: loss(join(trained, frozen)))
        return jax.jit(grads).lower(trained, frozen).compile()

    halves = lj.split(lj.lorafy(base, 2, targets="m", also="head"))
    found = compiled(*halves, lj.combine)
    # The same training of the head itself, without a copy.
    adapters, frozen = lj.split(lj.lorafy(base, 2, targets="m"))
    wanted = compiled(
        adapters | {"head": base["head"]},
        frozen | {"head": {"kernel": None, "bias": None}},
        lj.combine,
    )
    assert found.cost_analysis()["flops"] == wanted.cost_analysis()["flops"]
    temporaries = lambda c: c.memory_analysis().temp_size_in_bytes
    assert temporaries(found) <= temporaries(wanted)


def test_lora_refuses_an_unused_trained_copy():
    params = lj.lorafy(with_head(), 2, targets="m", also="head")
    fn = lambda params, x: x @ params["m"]["kernel"] @ params["head"]["kernel"]
    with pytest.raises(ValueError, match=r"never uses 1 adapted .*'head/bias'"):
        lj.lora(fn)(params, jnp.ones((3, 8)))
    assert lj.lora(fn, unused="ignore")(params, jnp.ones((3, 8))).shape == (3, 2)


WAYS = {
    "save and load": lambda params, path: (
        lj.save(path / "file", params) or lj.load(path / "file", lj.strip(params))
    ),
    "detach and attach": lambda params, path: lj.attach(
        lj.detach(params), lj.strip(params)
    ),
    "split and combine": lambda params, path: lj.combine(*lj.split(params)),
    "to PEFT and back": lambda params, path: (
        lj.export_peft(path / "folder", params, {"*": "model.{}"})
        or lj.import_peft(path / "folder", lj.strip(params), {"*": "model.{}"})
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_lorafy_also_survives_every_verb(way, dtype, tmp_path, randomized):
    params = randomized(lj.lorafy(with_head(dtype), 2, targets="m", also="head"))
    back = WAYS[way](params, tmp_path)
    x = jnp.ones((3, 8), dtype)
    want, got = (jax.jit(lj.lora(classifier))(tree, x) for tree in (params, back))
    np.testing.assert_array_equal(got, want)
    for name, copy in params["head"].items():
        np.testing.assert_array_equal(back["head"][name], copy)
    assert lj.count(back) == lj.count(params)
