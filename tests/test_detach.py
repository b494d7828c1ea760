"""Tests of `detach` and `attach`: inverse of each other, and strict."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax._tree import flatten, path_name

RNG = np.random.default_rng(0)


def normal(*shape):
    return jax.device_put(np.asarray(RNG.standard_normal(shape), jnp.float32))


def base():
    return {"m": {"kernel": normal(4, 3), "bias": normal(3)}, "head": normal(3, 2)}


def adapted(**options):
    return lj.lorafy(base(), 2, **{"targets": "m/kernel", "also": "head"} | options)


def fn(params, x):
    return (x @ params["m"]["kernel"] + params["m"]["bias"][None]) @ params["head"]


def test_detach_takes_all_leaves_of_an_adapter_and_nothing_else():
    params = adapted()
    found = {path_name(p): x for p, x in flatten(lj.detach(params)).items()}
    assert {name for name, x in found.items() if x is not None} == {
        *("m/lora_a", "m/lora_b", "m/lora_scale", "head_lora_w")
    }
    assert found["m/lora_scale"] is params["m"]["lora_scale"]
    back = lj.attach(lj.detach(params), lj.strip(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    pairs = zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True)
    assert all(x is y for x, y in pairs)


def test_attach_inverts_detach_in_a_state_abstract_and_jitted():
    state = nnx.State(jax.tree.map(nnx.Param, base()))
    for params in (
        lj.lorafy(state, 2, targets="m/kernel"),
        jax.eval_shape(adapted),
        jax.jit(lambda params: lj.attach(lj.detach(params), lj.strip(params)))(
            adapted()
        ),
    ):
        back = lj.attach(lj.detach(params), lj.strip(params))
        assert type(back) is type(params)
        assert jax.tree.structure(back) == jax.tree.structure(params)
        pairs = zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True)
        assert all(x is y for x, y in pairs)


def test_attach_of_other_adapters_compiles_nothing():
    first, second = adapted(), adapted(key=jax.random.key(1), alpha=7)
    plain, x, traces = lj.strip(first), normal(5, 4), []

    @jax.jit
    def serve(adapters, x):
        traces.append(1)
        return lj.lora(fn)(lj.attach(adapters, plain), x)

    for params in (first, second):
        trained = jax.tree.map(lambda x: x + 1, lj.detach(params))
        want = fn(lj.merge(lj.attach(trained, plain)), x)
        np.testing.assert_allclose(serve(trained, x), want, atol=1e-3)
    assert len(traces) == 1


def test_attach_of_a_running_average(optax_promotion):
    params = adapted()
    average = start = lj.detach(params)
    for _ in range(2):
        params = jax.tree.map(lambda x: x + 1, params)
        average = optax.incremental_update(lj.detach(params), average, 0.5)
    a = average["m"]["lora_a"]
    np.testing.assert_allclose(a, start["m"]["lora_a"] + 1.25, atol=1e-6)
    assert lj.count(lj.attach(average, lj.strip(params))) == lj.count(params)


def without(tree, *names):
    def keep(node):
        if not isinstance(node, dict):
            return node
        return {k: keep(x) for k, x in node.items() if k not in names}

    return keep(tree)


@pytest.mark.parametrize(
    ("adapters", "plain", "match"),
    [
        (
            lambda p: without(lj.detach(p), "lora_scale"),
            lj.strip,
            "'m/kernel' is broken: 'm/lora_scale' is missing",
        ),
        (
            lambda p: lj.split(p)[0],
            lj.strip,
            r"adapters lacks 'm/lora_scale'. Pass detach.*not a half of split",
        ),
        (
            lj.detach,
            lambda p: without(lj.strip(p), "kernel"),
            "base lacks 'm/kernel', which the tree of the adapters has",
        ),
        (
            lambda p: without(lj.detach(p), "kernel"),
            lambda p: without(lj.strip(p), "kernel"),
            "'m/lora_a' belongs to no weight",
        ),
        (
            lj.detach,
            lambda p: p,
            r"already has the adapter leaf 'm/lora_a'.*strip\(params\)",
        ),
        (
            lambda p: p,
            lj.strip,
            r"contains 'm/kernel', which is no leaf.*detach\(params\)",
        ),
        (lambda p: lj.strip(p), lj.strip, "adapters contains 'm/kernel'"),
        (
            lj.detach,
            lambda p: lj.strip(p) | {"head": normal(3, 5)},
            r"'head_lora_w', float32 \(3, 2\), is no trained copy",
        ),
        (
            lj.detach,
            lambda p: lj.strip(p) | {"m": {"kernel": normal(5, 3), "bias": normal(3)}},
            "'m/kernel' does not fit",
        ),
        (lambda p: without(p, "m", "head", "head_lora_w"), lj.strip, "no adapters"),
        (
            lambda p: {"m": lj.detach(p)["m"]},
            lj.strip,
            r"base has 'head', which the tree of the adapters lacks.*all of detach",
        ),
    ],
)
def test_attach_refuses_what_does_not_fit(adapters, plain, match):
    params = adapted()
    with pytest.raises(ValueError, match=match):
        lj.attach(adapters(params), plain(params))


def test_attach_refuses_plain_arrays_next_to_variables():
    """A checkpointer may return plain arrays, which no filter of nnx would select."""
    state = nnx.State(jax.tree.map(nnx.Param, base()))
    params = lj.lorafy(state, 2, targets="m/kernel")
    own = {path: x for path, x in flatten(lj.detach(params)).items() if x is not None}
    bare = {"m": {path[-1]: x[...] for path, x in own.items()}}
    with pytest.raises(
        ValueError, match=r"'m/lora_a' is a plain array.*in a Param: no"
    ):
        lj.attach(bare, state)


@pytest.mark.parametrize("use", [lj.detach, lambda x: lj.attach(x, base())])
def test_detach_and_attach_refuse_an_array(use):
    with pytest.raises(TypeError, match="Expected a tree of parameters"):
        use(jnp.ones(3))
