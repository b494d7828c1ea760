"""Dtypes: which one a result is computed in, and how a cast stays a rounding."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The dtypes that exist only under `jax.enable_x64`.
WIDE = {np.dtype(name) for name in ("int64", "uint64", "float64", "complex128")}


def wider(*dtypes: Any) -> np.dtype:
    """The dtype that JAX promotes these and float32 to; float8 promotes to float32."""
    wide = [dtype for dtype in dtypes if jnp.dtype(dtype).itemsize > 3]
    return jax.dtypes.canonicalize_dtype(np.result_type(np.float32, *wide))


def promoted(*dtypes: Any) -> np.dtype:
    """The dtype that JAX promotes these to, also under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.dtypes.canonicalize_dtype(jnp.result_type(*dtypes))


def digits(dtype: Any) -> int:
    """The bits of a float's mantissa; 0 for any other type."""
    return jnp.finfo(dtype).nmant if jnp.issubdtype(dtype, jnp.inexact) else 0


def x64(dtypes: Iterable[Any]) -> AbstractContextManager[Any]:
    """`jax.enable_x64` if a dtype requires it.

    An array may have been made under `jax.enable_x64` and used after it: nothing but
    its dtype shows that later.
    """
    return nullcontext() if WIDE.isdisjoint(dtypes) else jax.enable_x64(True)


def canonical(x: Any) -> Any:
    """An argument as JAX itself takes it: NumPy's float64 is float32 unless x64 is on.

    Without this a float64 NumPy weight would be traced under `jax.enable_x64`, where
    `jax.random` draws other bits and `jnp.arange` has another dtype. An array of JAX
    that has a wide dtype is different: it was made under x64 on purpose.
    """
    if not isinstance(x, np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return x
    dtype: Any = jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True)
    if dtype == x.dtype:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=dtype)
    return x.astype(dtype)


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """`x.astype(dtype)`, which stays rounded if it is cast back.

    XLA may drop a cast to fewer digits and back, since it may keep more digits than the
    program asks for (`xla_allow_excess_precision`). Before a reduction it does so, on
    CPUs, from jaxlib 0.10 on. It respects only `reduce_precision` and barriers.
    """
    if dtype == jnp.bfloat16:
        return lax.reduce_precision(x, 8, 7).astype(dtype)
    # `reduce_precision` flushes float16's small numbers to zero, and has no float8.
    return lax.optimization_barrier(x.astype(dtype))
