"""The analyses of which inputs a result depends on, and which uses a value reaches."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._engine.liveness import look_ahead, passed_on, used_inputs

X = np.linspace(-1, 1, 4, dtype=np.float32)


def jaxpr_of(fn, *args):
    return jax.make_jaxpr(fn)(*args)


def test_passed_on():
    jaxpr = jaxpr_of(lambda x, y: (y, x + 1), X, X)
    assert passed_on(jaxpr, 0, 1) and not passed_on(jaxpr, 1, 0)


def test_used_inputs():
    def fn(used, shape, dead, inner, carried, index):
        jnp.sin(dead)
        jax.jit(lambda a, b: a)(used, inner)
        y = jax.checkpoint(lambda a, b: (a + 1, b))(used, inner)[0]
        y = lax.scan(lambda c, _: (c * carried, None), y, length=2)[0]
        return lax.switch(index, [lambda y: y, lambda y: y + used], y), shape.shape

    def flat(*args):
        return fn(*args)[0]

    got = used_inputs(jaxpr_of(flat, X, X, X, X, X, 1))
    assert got == [True, False, False, False, True, True]


def test_used_inputs_counts_effects_as_uses():
    fn = lambda x, y: (jax.debug.callback(lambda _: None, x), y + 1)[1]
    assert used_inputs(jaxpr_of(fn, X, X)) == [True, True]


def test_used_inputs_through_loops():
    """Inputs are used if a later iteration or the loop condition needs them."""

    def fn(x, y, n, idle):
        def body(_, carry):
            a, b, c = carry
            return a + b, b, c * 2

        return lax.fori_loop(0, n, body, (x, y, idle))[0]

    assert used_inputs(jaxpr_of(fn, X, X, 3, X)) == [True, True, True, False]
    assert used_inputs(jaxpr_of(lambda x, y, i: fn(x, y, 3, i), X, X, X)) == [
        *(True, True, False)
    ]


def test_passed_on_through_calls():
    body = lambda w, x: (jax.checkpoint(lambda w, x: (x * 2, w))(w, x), x)
    jaxpr = jaxpr_of(body, X, X)  # (2 x, w, x)
    assert [passed_on(jaxpr, i, 0) for i in range(3)] == [False, True, False]
    assert [passed_on(jaxpr, i, 1) for i in range(3)] == [False, False, True]


def test_look_ahead_finds_a_product_through_views_and_calls():
    passes = lambda eqn: eqn.primitive.name in ("transpose", "add")
    w = np.ones((4, 4), np.float32)
    goal = lambda eqn: eqn.primitive.name == "dot_general"

    def leads(fn, *how):
        """Returns whether the sum at the start of `fn` reaches the goal."""
        jaxpr = jaxpr_of(lambda w, x: fn(w + 1, x), w, X)
        return look_ahead(jaxpr)(jaxpr.eqns[0], goal, passes, *how)

    assert leads(lambda w, x: x @ w)
    assert leads(lambda w, x: jax.jit(lambda w, x: x @ (w.T + w))(w, x))
    assert leads(lambda w, x: lax.scan(lambda x, _: (x @ w, None), x, length=2)[0])
    assert leads(lambda w, x: lax.fori_loop(0, 2, lambda _, x: x @ w, x))
    assert leads(lambda w, x: lax.cond(True, lambda: x @ w, lambda: x))
    assert not leads(lambda w, x: x @ jnp.tanh(w))
    assert not leads(lambda w, x: lax.scan(lambda x, _: (x * 2, w), x, length=2))
    assert not leads(lambda w, x: w)
    assert leads(lambda w, x: w.T, True)
    assert not leads(lambda w, x: jnp.tanh(w), True)


def test_look_ahead_visits_each_equation_once():
    def many_sums(x):
        for _ in range(20):
            x = jnp.sin(x + 1)
        return x

    jaxpr, seen = jaxpr_of(many_sums, X), []
    leads_to = look_ahead(jaxpr)
    goal = lambda eqn: seen.append(eqn) or eqn.primitive.name == "sin"
    passes = lambda eqn: False
    found = [leads_to(eqn, goal, passes) for eqn in jaxpr.eqns]
    assert found == [eqn.primitive.name == "add" for eqn in jaxpr.eqns]
    assert len(seen) == len(jaxpr.eqns)
