"""The dtypes that results are computed in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax._engine.dtypes import canonical, digits, promoted, rounded, wider


@pytest.mark.parametrize(
    ("dtypes", "want"),
    [
        (["bfloat16"], "float32"),
        (["float16", "float32"], "float32"),
        (["float8_e4m3fn"], "float32"),
        (["float64", "bfloat16"], "float64"),
        (["complex64"], "complex64"),
    ],
)
def test_wider(dtypes, want):
    with jax.enable_x64(True):
        assert wider(*map(jnp.dtype, dtypes)) == want


def test_promoted_as_without_strict_promotion():
    assert promoted(jnp.bfloat16, jnp.float16) == jnp.float32


def test_digits_of_floats_and_integers():
    assert [*map(digits, ("bfloat16", "float32", "int8"))] == [7, 23, 0]


def test_canonical_casts_a_wide_numpy_array_and_no_jax_array():
    wide = np.ones(2, np.float64)
    assert canonical(wide).dtype == np.float32
    assert canonical(jax.ShapeDtypeStruct((2,), np.int64)).dtype == np.int32
    with jax.enable_x64(True):
        x = jnp.asarray(wide)
    assert canonical(x) is x and canonical("name") == "name"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_rounded_stays_rounded_before_a_sum(dtype):
    x = np.linspace(1, 2, 64, dtype=np.float32)
    got = jax.jit(lambda x: rounded(x, dtype).astype(np.float32).sum())(x)
    np.testing.assert_allclose(got, x.astype(dtype).astype(np.float32).sum())
