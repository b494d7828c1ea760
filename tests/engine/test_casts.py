"""Casts of a weight are moved past its update only if the rounding stays invisible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax._engine.casts import exact_casts

rng = np.random.default_rng(0)
W, A, B = (
    (scale * rng.standard_normal(shape)).astype(np.float32)
    for scale, shape in ((1, (8, 8)), (0.3, (8, 2)), (0.3, (2, 8)))
)
W = np.asarray(jnp.asarray(W, jnp.bfloat16), np.float32)  # a checkpoint in bfloat16
X = rng.standard_normal((3, 8)).astype(np.float32)
ROWS = np.array([1, 3, 7])
SUM = W + A @ B


def q(w):
    return w.astype(jnp.bfloat16).astype(w.dtype)


def with_a_rule(w):
    rule = jax.custom_vjp(q)
    rule.defvjp(
        lambda w: (q(w), (q(w), w)),
        lambda saved, ct: (ct * jnp.where(saved[0] > saved[1], 1.0, 2.0),),
    )
    return jax.grad(lambda w: rule(w).sum())(w)


MEETINGS = {
    "where": lambda w: X @ jnp.where(q(w) == w, w, 1.0),
    "greater": lambda w: X @ (q(w) > w).astype(w.dtype),
    "quotient": lambda w: X @ (q(w) / w),
    "difference": lambda w: X @ (w - q(w)),
    "stack": lambda w: jnp.einsum(
        "kij,k->ij", jnp.stack([q(w), w]), np.array([1.0, -1.0])
    ),
    "lookup": lambda w: q(w)[ROWS] - w[ROWS],
    "scaled": lambda w: X @ (q(w / jnp.abs(w).max()) * jnp.abs(w).max()),
    "rounded sum": lambda w: X @ q(-w + 1.001 * SUM),
    "rounded difference": lambda w: X @ q(1.001 * SUM - w),
    "rule": with_a_rule,
    "jitted cast": lambda w: w - jax.jit(q)(w),
    "within jit": jax.jit(lambda w: w - q(w)),
    "scan": lambda w: lax.scan(lambda c, _: (c + (w - q(w)), None), 0 * w, None, 2)[0],
    "branch": lambda w: lax.cond(w[0, 0] > 9, lambda w: w, lambda w: w - q(w), w),
}


@pytest.mark.parametrize("meeting", MEETINGS)
def test_lora_rounds_the_sum_if_an_operation_compares_it_with_the_weight(meeting):
    fn = lambda params: MEETINGS[meeting](params["w"])
    params = lj.lorafy({"w": W}, 2, targets="*") | {"w_lora_a": A, "w_lora_b": B}
    params = jax.tree.map(jnp.asarray, params)
    got = jax.jit(lj.lora(fn, materialize="allow"))(params)
    want = jax.jit(fn)(lj.merge(params))
    assert np.abs(want).max() > 0
    np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-5)


APART = {
    "product": lambda w, v, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
    "two products": lambda w, v, x: x @ q(w) - x @ w,
    "sum with another weight": lambda w, v, x: x @ (q(w) * 2.0).astype(x.dtype) + v,
    "norm of rows": lambda w, v, x: (r := q(w)[ROWS]) - r.mean(),
    "tied table": lambda w, v, x: q(w)[ROWS] @ q(w).T,
}


@pytest.mark.parametrize("use", APART)
def test_exact_casts_ignores_casts_before_products(use):
    jaxpr = jax.make_jaxpr(APART[use])(W, X, X)
    assert exact_casts(jaxpr, [["w"], ["v"], []]) == frozenset()


def test_exact_casts_finds_casts_that_are_returned():
    jaxpr = jax.make_jaxpr(lambda w: (w.astype(jnp.bfloat16), 2 * w))(W)
    assert len(exact_casts(jaxpr, [["w"]], leaving=[0])) == 1
    assert exact_casts(jaxpr, [["w"]], leaving=[1]) == frozenset()


def test_explain_lists_a_cast_that_precedes_the_update():
    params = lj.lorafy({"v": W, "w": W}, 2, targets="*")
    fn = lambda p, x: x @ p["v"] + x @ q(p["w"])
    report = lj.explain(fn, params, X)
    v, w = report.rows
    assert v.casts == () and len(w.casts) == 1 and w.casts[0].startswith("tests")
    assert (v.factored, w.factored) == (1, 1)
    assert "cast before the update" in str(report)
