"""The functions that read jaxprs work on every supported version of JAX."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._engine.jaxpr import bind, contains, evaluate, scan_counts, trace

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


def test_contains():
    jaxpr = jaxpr_of(lambda x: lax.cond(True, jax.jit(jnp.sin), jnp.cos, x), X)
    assert contains(jaxpr, "sin") and contains(jaxpr, "cond")
    assert not contains(jaxpr, "tan")
