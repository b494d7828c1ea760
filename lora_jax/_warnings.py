"""Warns at the user's line."""

import inspect
import os
import warnings

import flax
import jax

# Frames of these packages are not the user's.
_LIBRARIES = tuple(
    os.path.join(os.path.dirname(path), "")
    for path in map(str, (__file__, jax.__file__, flax.__file__))
)


def warn_user(message: str) -> None:
    """Warns at the innermost line that is not of this package, JAX or Flax."""
    frame, level = inspect.currentframe(), 1
    while frame and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
