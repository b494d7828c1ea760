"""The user's line: that an equation stands for, and that a warning is for."""

import inspect
import linecache
import os
import sysconfig
import textwrap
import warnings
from typing import Any

import flax
import jax

# The folders of libraries, whose frames no user would call a place in the model.
_LIBRARIES = tuple(os.path.join(m.__path__[0], "") for m in (jax, flax))
_STANDARD = os.path.join(sysconfig.get_paths()["stdlib"], "")
_HERE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")


def source_line(eqn: Any, within: str | None = None) -> str:
    """The line that an equation stands for, as `file:line`, or "" if there is none.

    It is that of the innermost frame of the traced function that is in no library: not
    in JAX or Flax, nor in Python's own. Next best is the innermost frame of Flax.

    Args:
      eqn: The equation.
      within: The jitted function that contains it, if one does. JAX keeps the traceback
        of the first call of that function, and the frames of that caller would mislead:
        only those of the function count.
    """
    inside = []
    for frame in getattr(eqn.source_info.traceback, "frames", ()):
        if frame.file_name.startswith(_HERE):
            break
        inside.append(frame)
    if within is not None:
        depths = [i for i, f in enumerate(inside) if f.function_name == within]
        inside = inside[: depths[-1] + 1] if depths else []
    of_user = [frame for frame in inside if not _in_library(frame.file_name)]
    of_flax = [frame for frame in inside if frame.file_name.startswith(_LIBRARIES[1:])]
    for frame in (*of_user, *of_flax):
        return _shown(frame.file_name, frame.line_num)
    return ""


def _shown(file: str, line: int) -> str:
    # A cell of a notebook has a number for a file name, so its text is shown instead.
    folder = os.path.basename(os.path.dirname(file))
    if folder.startswith("ipykernel_") or file.startswith("<ipython-input-"):
        text = textwrap.shorten(linecache.getline(file, line), 50)
        return f"line {line} of a cell, {text}"
    path = os.path.relpath(file)
    if path.startswith(os.pardir):
        path = os.path.basename(path)
    return f"{path}:{line}"


def _in_library(file: str) -> bool:
    standard = file.startswith(_STANDARD) and "site-packages" not in file
    return standard or file.startswith((*_LIBRARIES, "<frozen"))


def warn_user(message: str) -> None:
    """Warns at the innermost line that is not of this package, JAX or Flax."""
    frame, level = inspect.currentframe(), 1
    while frame and frame.f_code.co_filename.startswith((_HERE, *_LIBRARIES)):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
