"""The strictest JAX there is: no promotion of dtypes or ranks, warnings are errors."""

import os

# Most of the time goes to compiling: a quarter of it to make tiny programs fast.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    + os.environ.get("XLA_FLAGS", "")
)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def optax_promotion():
    """Optax itself multiplies floats and ints; a test that steps it may, too."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def third_party():
    """Models of other people, which were not written for the strictest JAX."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def randomized():
    """Gives each adapter of a tree random factors: B = 0 would hide every mistake."""

    def randomize(params, seed=0):
        adapters, base = lj.split(params)
        leaves, treedef = jax.tree.flatten(adapters)
        rng = np.random.default_rng(seed)
        drawn = [
            jnp.asarray(0.5 * rng.standard_normal(x.shape), x.dtype) for x in leaves
        ]
        return lj.combine(treedef.unflatten(drawn), base)

    return randomize


@pytest.fixture
def close():
    """Asserts that two trees are equal to rounding, leaf by leaf."""

    def check(got, want, atol=1e-5):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert jnp.shape(x) == jnp.shape(y)
            np.testing.assert_allclose(
                np.asarray(x, np.float64),
                np.asarray(y, np.float64),
                atol=atol,
                rtol=1e-5,
            )

    return check
