"""The functions that read jaxprs work on every supported version of JAX."""

import linecache
import weakref

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._engine.jaxpr import (
    bind,
    contains,
    evaluate,
    flops,
    look_ahead,
    passed_on,
    place,
    scan_counts,
    trace,
    used_inputs,
)

X = np.linspace(-1, 1, 4, dtype=np.float32)


def jaxpr_of(fn, *args):
    return jax.make_jaxpr(fn)(*args)


def test_evaluate_computes_the_function():
    table = jnp.arange(4.0)  # a constant of the jaxpr

    def fn(x, y):
        z = jnp.sin(x) * table
        return z, jax.jit(lambda z: z + y)(z), y, 2.0 * jnp.ones(())

    got = evaluate(jaxpr_of(fn, X, X), [X, X + 1], lambda i, eqn, xs: bind(eqn, xs))
    for a, b in zip(got, fn(X, X + 1), strict=True):
        np.testing.assert_allclose(a, b)


def test_evaluate_visits_each_equation_in_order():
    seen = []

    def apply(i, eqn, operands):
        seen.append((i, eqn.primitive.name))
        return bind(eqn, operands)

    evaluate(jaxpr_of(lambda x: jnp.sin(jnp.cos(x) + 1), X), [X], apply)
    assert seen == [(0, "cos"), (1, "add"), (2, "sin")]


def test_evaluate_frees_intermediate_results():
    made = []

    def apply(i, eqn, operands):
        assert all(ref() is None for ref in made[: max(0, i - 1)])
        (result,) = bind(eqn, operands)
        made.append(weakref.ref(result))
        return [result]

    jaxpr = jaxpr_of(lambda x: jnp.sin(jnp.cos(jnp.tanh(jnp.exp(x)))), X)
    (out,) = evaluate(jaxpr, [jnp.asarray(X)], apply)
    assert len(made) == 4 and made[-1]() is out


def test_trace_restores_results_that_are_no_arrays():
    traced = trace(
        lambda x: {"y": 2 * x, "n": 3, "name": "a", "host": X}, jnp.asarray(X)
    )
    out = traced.restore([7])
    assert out["y"] == 7 and out["n"] == 3 and out["name"] == "a" and out["host"] is X


def test_scan_counts():
    c = jnp.ones(4)
    fn = lambda x, xs: lax.scan(
        lambda s, y: ((s[0] + y + c, s[1] + x), s[0]), (x, x), xs
    )
    jaxpr = jaxpr_of(fn, X, np.stack([X, X]))
    (eqn,) = (e for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan")
    consts, carry = scan_counts(eqn)
    assert carry == 2 and consts == len(eqn.invars) - 3


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


def test_flops_by_hand():
    w = np.ones((4, 6), np.float32)
    count = lambda fn, *args: flops(jaxpr_of(fn, *args))
    product = 2 * 3 * 4 * 6
    x = np.ones((3, 4), np.float32)
    assert count(lambda x, w: jnp.sin(x @ w), x, w) == product
    step = jax.checkpoint(lambda c, _: (c, (c @ w).sum()))
    assert count(lambda x: lax.scan(step, x, length=5), x) == 5 * product
    branch = lambda x: lax.cond(True, lambda: (x @ w).sum(), lambda: 0.0)
    assert count(branch, x) == product
    loop = lambda x: lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ w[:, :4], x)
    assert count(loop, x) == 2 * 3 * 4 * 4
    image, kernel = np.ones((1, 8, 8, 4), np.float32), np.ones((3, 3, 2, 6), np.float32)
    dims = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w: lax.conv_general_dilated(
        *(x, w, (1, 1), "SAME"), dimension_numbers=dims, feature_group_count=2
    )
    assert count(conv, image, kernel) == 2 * (8 * 8 * 6) * (3 * 3 * 2)
    experts = np.ones((2, 4, 6), np.float32)
    assert count(lax.ragged_dot, x, experts, np.array([1, 2])) == product


def test_place_in_a_notebook_is_the_text_of_the_line():
    file, text = "/tmp/ipykernel_7/3141592653.py", "def f(x):\n    return jnp.sort(x)\n"
    linecache.cache[file] = len(text), None, text.splitlines(True), file
    cell = {"jnp": jnp}
    exec(compile(text, file, "exec"), cell)
    (eqn,) = jax.make_jaxpr(cell["f"])(jnp.ones(3)).eqns
    assert place(eqn) == "line 2 of a cell, return jnp.sort(x)"


def test_place_is_a_line_of_the_user():
    def fn(x):
        return jnp.sort(jnp.cos(x))

    line = fn.__code__.co_firstlineno + 1
    cos, sort = jaxpr_of(fn, X).eqns
    assert place(cos) == place(sort) == f"tests/engine/test_jaxpr.py:{line}"
    (inner,) = sort.params["jaxpr"].eqns
    assert place(inner, sort.params["name"]) == ""  # it has only lines of JAX


def test_contains():
    jaxpr = jaxpr_of(lambda x: lax.cond(True, jax.jit(jnp.sin), jnp.cos, x), X)
    assert contains(jaxpr, "sin") and contains(jaxpr, "cond")
    assert not contains(jaxpr, "tan")
