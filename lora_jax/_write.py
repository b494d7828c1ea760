"""One file, written whole or not at all, and the values that it may hold."""

import contextlib
import hashlib
import os
import stat
import uuid
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from lora_jax._processes import gathered
from lora_jax._tree import Path, path_name, unbox

try:
    import fcntl
except ImportError:  # on Windows, where an open file cannot be removed anyway
    fcntl = None

DTYPES = ("float64", "float32", "float16", "bfloat16")


def check_savable(path: Path, leaf: Any) -> None:
    """The leaf is an array with values, of a dtype that a file can hold."""
    x = unbox(leaf)
    if isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer):
        raise ValueError(
            f"{path_name(path)!r} has no values to save: it is a {type(x).__name__}. "
            "Save outside jit, and concrete parameters."
        )
    if x.dtype.name not in DTYPES:
        raise ValueError(
            f"{path_name(path)!r} has dtype {x.dtype}, which the file cannot hold. "
            f"Cast it to one of {', '.join(DTYPES)}."
        )


def in_memory(leaves: dict[Path, Any], parts: Iterable[Path]) -> dict[Path, np.ndarray]:
    """The values of leaves, wherever they are: all processes ask for the same."""
    return {path: _own(gathered(unbox(leaves[path]))) for path in parts}


def _own(x: Any) -> np.ndarray:
    # The file holds memory as it lies: in rows, in this machine's order of bytes.
    return np.array(x, x.dtype.newbyteorder("="), order="C")


def check_finite(what: str, x: np.ndarray) -> None:
    if not np.isfinite(x.astype(np.float64)).all():
        raise ValueError(f"{what} is not finite: training has diverged before it.")


def check_target(path: Any) -> None:
    """A file can be written there, or replaced; a device or a pipe cannot."""
    path = os.path.realpath(path)
    if os.path.lexists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        what = "a folder" if os.path.isdir(path) else "no regular file"
        raise ValueError(f"{path} is {what}. Give the name of a file.")


def write(path: Any, data: bytes) -> None:
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    _remove_abandoned(folder, name)
    temporary = os.path.join(folder, f"{_start(name)}{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            # Held until the new name is there. Where there are no locks, so be it.
            with contextlib.suppress(OSError):
                _lock(file)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:  # while it is locked
                os.replace(temporary, path)
        if fcntl is None:  # Windows renames no open file
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    # The rename itself is on the disk once the folder is; not every system can.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _lock(file: Any, *, wait: bool = True) -> None:
    """Marks a temporary file as in use, until it is closed; or raises if it is."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _start(name: str) -> str:
    """How the temporary names of a file begin: a name of 255 bytes has no room."""
    return f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}."


def _remove_abandoned(folder: str, name: str) -> None:
    """The temporary files of a save to this name that was killed."""
    for entry in os.listdir(folder):
        if not (entry.startswith(_start(name)) and entry.endswith(".tmp")):
            continue
        found = os.path.join(folder, entry)
        with contextlib.suppress(OSError), open(found, "rb") as file:
            _lock(file, wait=False)  # a living save holds it before its first byte
            if os.path.getsize(found):
                os.unlink(found)
