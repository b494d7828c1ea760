"""Tests how arguments that hold parameters are named, and the errors about others."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj


def classifier(params, x):
    h = jnp.tanh(x @ params["m"]["kernel"])
    return h @ params["head"]["kernel"] + params["head"]["bias"][None]


def with_head():
    rng = np.random.default_rng(3)
    draw = lambda *shape: jax.device_put(
        np.asarray(rng.standard_normal(shape), jnp.float32)
    )
    return {
        "m": {"kernel": draw(8, 8)},
        "head": {"kernel": draw(8, 2), "bias": draw(2)},
    }


def test_lora_argnames_names_keywords():
    fn = lambda x, *, params, scale=1.0: classifier(params, x) * scale
    params, x = lj.lorafy(with_head(), 2, targets="m", also="head"), jnp.ones((3, 8))
    want = fn(x, params=lj.merge(params), scale=2.0)
    for names in ("params", ["params"]):
        got = lj.lora(fn, argnames=names)(x, params=params, scale=2.0)
        np.testing.assert_allclose(got, want, atol=1e-6)
    report = lj.explain(fn, x, params=params, argnames="params")
    assert [row.path for row in report.rows if row.used] == [
        *("m/kernel", "head/kernel", "head/bias")
    ]
    both = lambda p, x, *, q: classifier(p, x) + classifier(q, x)
    want = both(lj.merge(params), x, q=lj.merge(params))
    got = lj.lora(both, argnums=0, argnames="q")(params, x, q=params)
    np.testing.assert_allclose(got, want, atol=1e-6)
    turned = lambda q, x, p: both(p, x, q=q)
    got = lj.lora(turned, argnums=(2, 0))(params, x, params)
    np.testing.assert_allclose(got, want, atol=1e-6)
    report = lj.explain(both, params, x, q=params, argnums=0, argnames="q")
    paths = [row.path for row in report.rows]
    assert paths[0] == "0/m/kernel" and paths[-1].startswith("q/head/")


@pytest.mark.parametrize("use", [lj.lora, lambda fn, **k: partial(lj.explain, fn, **k)])
def test_leaves_of_names_an_argument_that_is_no_tree(use):
    fn = lambda x, params: classifier(params, x)
    params, x = lj.lorafy(with_head(), 2, targets="m"), jnp.ones((3, 8))
    match = r"Argument 0 of the function should hold .*argnums=1.*argnames='params'"
    with pytest.raises(TypeError, match=match):
        use(fn)(x, params)
    with pytest.raises(
        TypeError, match=r"argnames='p' names no argument.*\['params'\]"
    ):
        use(fn, argnames="p")(x, params=params)
    with pytest.raises(TypeError, match=r"argnums=0 names no argument.* 0 positional"):
        use(fn)(x=x, params=params)
    assert use(fn, argnums=1)(x, params) is not None


def test_check_elsewhere_refuses_adapters_in_an_unnamed_keyword():
    fn = lambda p, x, *, other: classifier(p, x)
    params = lj.lorafy(with_head(), 2, targets="m")
    with pytest.raises(
        ValueError, match=r"Argument 'other' has adapters.*argnames='other'"
    ):
        lj.lora(fn)(params, jnp.ones((3, 8)), other=params)


def boxed(params):
    return jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), params)


@pytest.mark.parametrize(
    "wrap", [boxed, lambda p: nnx.State(jax.tree.map(nnx.Param, p))]
)
def test_check_elsewhere_finds_adapters_in_boxes(wrap):
    fn = lambda p, x, other: classifier(p, x)
    params = lj.lorafy(with_head(), 2, targets="m")
    other = lj.lorafy(wrap(with_head()), 2, targets="m")
    with pytest.raises(
        ValueError, match=r"Argument 2 has adapters.*argnums=\(..., 2\)"
    ):
        lj.lora(fn)(params, jnp.ones((3, 8)), other)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"argnames": (0,)}, "argnames takes keywords, found 0. Write argnums"),
        ({"argnums": "params"}, "argnums takes positions, found 'params'. Write argn"),
    ],
)
def test_chosen_refuses_keywords_as_positions_and_the_reverse(options, match):
    with pytest.raises(TypeError, match=match):
        lj.lora(classifier, **options)


def test_pick_takes_an_argument_named_twice_once():
    params, x = lj.lorafy(with_head(), 2, targets="m"), jnp.ones((3, 8))
    report = lj.explain(classifier, params, x, argnums=(0, -2))
    assert [row.path for row in report.rows] == ["m/kernel"]
