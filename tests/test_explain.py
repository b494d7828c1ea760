"""`explain` tells what `lora` does, where, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj

D, LAYERS, TOKENS, R = 8, 3, 5, 2
X = jax.ShapeDtypeStruct((TOKENS, D), jnp.float32)
STACK = lj.Axes((0,), (1,), (2,))


def abstract(**shapes):
    base = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    axes = {name: STACK for name, shape in shapes.items() if len(shape) == 3}
    return lj.lorafy(base, R, targets="*", axes=axes)


def rows(fn, params, *args, **kwargs):
    return {row.path: row for row in lj.explain(fn, params, *args, **kwargs).rows}


def test_counts_uses_and_flops():
    def fn(p, x):
        h = jnp.sin(x @ p["w"]) @ p["w"]
        return jax.jit(lambda h: h @ p["v"])(h)

    report = lj.explain(fn, abstract(w=(D, D), v=(D, 3), idle=(D, D)), X)
    by_path = {row.path: row for row in report.rows}
    w, v, idle = (by_path[name] for name in ("w", "v", "idle"))
    assert (w.shape, w.rank, w.factored, w.materialized) == ((D, D), R, 2, ())
    assert w.flops == 2 * (2 * TOKENS * R * (D + D))
    assert v.flops == 2 * TOKENS * R * (D + 3)
    assert (idle.factored, idle.materialized, idle.flops) == (0, (), 0)
    assert report.flops == 2 * TOKENS * D * (D + D + 3)


def test_says_what_forms_a_weight_and_where():
    def fn(p, x):
        y = x @ jnp.tanh(p["w"])
        return y @ jnp.sort(p["w"], axis=0) + x @ p["w"]

    first = fn.__code__.co_firstlineno + 1
    row = rows(fn, abstract(w=(D, D)), X)["w"]
    assert row.materialized == ("tanh", "sort")
    assert row.places == tuple(f"tests/test_explain.py:{first + i}" for i in (0, 1))
    assert row.factored == 1
    assert row.flops == 2 * (2 * D * D * R) + 2 * TOKENS * R * (D + D)


def test_of_two_weights_one_is_formed():
    fn = lambda p, x: x @ (p["w"] @ p["w"].T)
    (row,) = lj.explain(fn, abstract(w=(D, D)), X).rows
    assert (row.factored, row.materialized) == (1, ("dot_general",))


def test_a_loop_counts_each_of_its_steps():
    step = lambda c, w: (jnp.sin(c @ w), None)
    fn = lambda p, x: lax.scan(jax.checkpoint(step), x, p["stack"])[0]
    report = lj.explain(fn, abstract(stack=(LAYERS, D, D)), X)
    (row,) = report.rows
    assert row.factored == 1  # one place, however often it runs
    assert row.flops == LAYERS * 2 * TOKENS * R * (D + D)
    assert report.flops == LAYERS * 2 * TOKENS * D * D


def test_layers_that_share_a_jitted_function_are_told_apart():
    layer = jax.jit(lambda w, x: jnp.sin(x @ w))
    fn = lambda p, x: layer(p["w"], layer(p["v"], layer(p["v"], x)))
    found = rows(fn, abstract(w=(D, D), v=(D, D)), X)
    assert (found["w"].factored, found["v"].factored) == (1, 2)


@pytest.mark.parametrize("changed", [False, True])
def test_agrees_with_what_lora_warns_of(changed):
    def fn(p, x):
        turn = jnp.tanh if changed else jnp.negative
        body = lambda c, _: ((jnp.sin(c[0] @ c[1]), turn(c[1])), None)
        return lax.scan(body, (x, p["w"]), length=2)[0][0]

    params = abstract(w=(D, D))
    row = rows(fn, params, X)["w"]
    adapted = lj.lora(fn, materialize="error")
    assert bool(row.materialized) == changed
    if changed:
        with pytest.raises(ValueError, match=f"meets '{row.materialized[0]}' at"):
            jax.eval_shape(adapted, params, X)
    else:
        jax.eval_shape(adapted, params, X)


def test_prints_a_table():
    fn = lambda p, x: x @ jnp.tanh(p["block"]["w"]) + x @ p["v"]
    base = {
        "block": {"w": jnp.ones((D, D))},
        "v": jnp.ones((D, D)),
        "u": jnp.ones((D, D)),
    }
    text = str(lj.explain(fn, lj.lorafy(base, R, targets="*"), X))
    line = fn.__code__.co_firstlineno
    title, w, v, u, totals = text.splitlines()
    assert title.split() == "weight shape rank factored FLOPs materialized by".split()
    assert w.startswith("block/w  (8, 8)") or u.startswith("block/w  (8, 8)")
    assert f"tanh at tests/test_explain.py:{line}" in text
    assert "u        (8, 8)     2         0     +0  NEVER USED" in text
    assert totals == (
        "Adapters: 3. Uses in factors: 1. Uses materialized: 1. NEVER USED: 1. "
        "FLOPs: +576 to 1.28k (45 %)."
    )
    del v


def test_flags_pass_and_abstract_arguments_suffice():
    fn = lambda p, x, n, *, turn: (x @ (p["w"].T if turn else p["w"])) * n
    assert rows(fn, abstract(w=(D, D)), X, 3.0, turn=True)["w"].factored == 1
    concrete = lj.lorafy({"w": np.ones((D, D), np.float32)}, R, targets="w")
    x = np.ones((TOKENS, D), np.float32)
    assert rows(fn, concrete, x, 3.0, turn=True)["w"].factored == 1


def test_no_adapters_is_an_error():
    with pytest.raises(ValueError, match="no adapters"):
        lj.explain(lambda p, x: x @ p["w"], {"w": jnp.ones((D, D))}, X)
