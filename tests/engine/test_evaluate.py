"""A primitive without a rule materializes the weight, exactly and with a warning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive, primitives
from jax.interpreters import ad, mlir

import lora_jax as lj
from lora_jax._engine import evaluate

cube_p = Primitive("cube_of_a_user")
cube_p.def_impl(lambda x: x**3)
cube_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(cube_p, mlir.lower_fun(lambda x: x**3, multiple_results=False))
ad.primitive_jvps[cube_p] = lambda x, dx: (cube_p.bind(*x), 3 * x[0] ** 2 * dx[0])
X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


def test_rules_are_for_primitives_of_jax():
    known = {p.name for n, p in vars(primitives).items() if n.endswith("_p")}
    # jax.extend does not list these; one of them is a call that was renamed.
    rest = {
        *("optimization_barrier", "split", "reshard", "closed_call", "eval_jaxpr"),
        *("device_put", "pvary", "ragged_dot_general", "shard_map"),
        *("stack", "tile", "unstack"),  # new in 0.12
    }
    assert set(evaluate.RULES) - known <= rest


@pytest.fixture
def params(randomized):
    base = {name: {"kernel": jnp.ones((4, 4)) / 4} for name in ("a", "b")}
    return randomized(lj.lorafy(base, 2))


def use(p, x):
    return x @ cube_p.bind(p["a"]["kernel"]) + x @ p["a"]["kernel"] @ p["b"]["kernel"]


def test_lora_is_exact_on_an_unknown_primitive_and_names_it(params, close):
    with pytest.warns(
        UserWarning, match="'a/kernel' meets 'cube_of_a_user' at .*test_evaluate.py:"
    ) as caught:
        got = lj.lora(use)(params, X)
    assert len(caught) == 1  # the other uses stay factored
    close(got, use(lj.merge(params), X))
    adapters, base = lj.split(params)
    quiet = lj.lora(use, materialize="allow")
    got = jax.grad(lambda a: quiet(lj.combine(a, base), X).sum())(adapters)
    merged = lambda a: use(lj.merge(lj.combine(a, base)), X).sum()
    close(got, jax.grad(merged)(adapters))


@pytest.mark.parametrize("name", ["scan", "jit", "dot_general", "transpose"])
def test_lora_is_exact_without_a_rule(name, params, close, monkeypatch):
    """Removes a rule, as if a new version of JAX had renamed the primitive."""
    monkeypatch.delitem(evaluate.RULES, name)

    def fn(p, x):
        body = lambda c, _: (jnp.sin(c @ p["a"]["kernel"].T), None)
        return jax.jit(lambda w, x: x @ w)(
            p["b"]["kernel"], jax.lax.scan(body, x, length=2)[0]
        )

    with pytest.warns(UserWarning, match=f"meets '{name}' at .*which needs W . scale"):
        got = lj.lora(fn)(params, X)
    close(got, fn(lj.merge(params), X))


@jax.custom_vjp
def squared_product(w, x):
    return (x @ w) ** 2


squared_product.defvjp(
    lambda w, x: (squared_product(w, x), (w, x)),
    lambda saved, y: jax.vjp(lambda w, x: (x @ w) ** 2, *saved)[1](y),
)


def layers(p, x):
    """Calls one jitted function for two layers: one cached call serves both."""
    layer = jax.jit(squared_product)
    return layer(p["b"]["kernel"], layer(p["a"]["kernel"], x)).sum()


def test_cached_calls_note_the_weights_of_each_call(params):
    """Derivative rules run at the first call, and their notes come with every call."""
    take = jax.grad(lj.lora(layers))
    for _ in range(2):
        with pytest.warns(UserWarning, match="derivative of custom_vjp_call") as caught:
            take(params, X)
        (text,) = {str(w.message) for w in caught}
        assert "'a/kernel' meets" in text and "'b/kernel' meets" in text


def test_cached_calls_raise_for_the_weight_and_line_of_each_call(params):
    take = jax.grad(lj.lora(layers, materialize="error"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'a/kernel' meets .*test_evaluate.py:"):
            take(params, X)
    fn = lambda p, x: jnp.sort(p["b"]["kernel"]) @ x.T
    strict = lj.lora(fn, materialize="error", unused="ignore")
    with pytest.raises(ValueError, match=r"'b/kernel' meets 'sort' at .*evaluate.py:"):
        strict(params, X)
