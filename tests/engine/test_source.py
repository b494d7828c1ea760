"""The line of the user's source behind an equation."""

import linecache

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._engine.source import source_line

X = np.linspace(-1, 1, 4, dtype=np.float32)


def jaxpr_of(fn, *args):
    return jax.make_jaxpr(fn)(*args)


def test_source_line_in_a_notebook_is_its_text():
    file, text = "/tmp/ipykernel_7/3141592653.py", "def f(x):\n    return jnp.sort(x)\n"
    linecache.cache[file] = len(text), None, text.splitlines(True), file
    cell = {"jnp": jnp}
    exec(compile(text, file, "exec"), cell)
    (eqn,) = jax.make_jaxpr(cell["f"])(jnp.ones(3)).eqns
    assert source_line(eqn) == "line 2 of a cell, return jnp.sort(x)"


def test_source_line_is_one_of_the_user():
    def fn(x):
        return jnp.sort(jnp.cos(x))

    line = fn.__code__.co_firstlineno + 1
    cos, sort = jaxpr_of(fn, X).eqns
    assert (
        source_line(cos) == source_line(sort) == f"tests/engine/test_source.py:{line}"
    )
    (inner,) = sort.params["jaxpr"].eqns
    assert source_line(inner, sort.params["name"]) == ""  # it has only lines of JAX
