"""Writes a file atomically, and checks the values that it may hold."""

import contextlib
import hashlib
import os
import stat
import uuid
from collections.abc import Iterable
from typing import Any

import numpy as np

from lora_jax._processes import gathered
from lora_jax._tree import Path, is_abstract, is_traced, path_name, unbox

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed anyway
    fcntl = None

DTYPES = ("float64", "float32", "float16", "bfloat16")


def check_savable(path: Path, leaf: Any) -> None:
    """Raises unless a leaf has values of a dtype that the file format has."""
    x = unbox(leaf)
    if is_abstract(x) or is_traced(x):
        raise ValueError(
            f"{path_name(path)!r} has no values to save: it is a {type(x).__name__}. "
            "Save concrete parameters, outside jit."
        )
    if x.dtype.name not in DTYPES:
        raise ValueError(
            f"{path_name(path)!r} has dtype {x.dtype}, which the file format lacks. "
            f"Cast it to one of {', '.join(DTYPES)}."
        )


def in_memory(leaves: dict[Path, Any], parts: Iterable[Path]) -> dict[Path, np.ndarray]:
    """Copies leaves into this process's memory.

    All processes must call this with the same leaves: a leaf that spans processes is
    gathered from all of them.
    """
    return {path: _native(gathered(unbox(leaves[path]))) for path in parts}


def _native(x: Any) -> np.ndarray:
    # safetensors stores the buffer as it is, so it must be row-major and native-endian.
    return np.array(x, x.dtype.newbyteorder("="), order="C")


def check_finite(what: str, x: np.ndarray) -> None:
    if not np.isfinite(x.astype(np.float64)).all():
        raise ValueError(f"{what} is not finite: the training had diverged.")


def check_target(path: str | os.PathLike[str]) -> None:
    """Raises if a path is a folder, a device, a pipe, ...: only files are replaced."""
    path = os.path.realpath(path)
    if os.path.lexists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        what = "a folder" if os.path.isdir(path) else "not a regular file"
        raise ValueError(f"{path} is {what}. Pass the name of a file.")


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file so that at any time the path has its old content or the new one.

    The data goes to a temporary file in the same folder, which is synced to disk and
    renamed. It is locked until then, since a later call removes the temporary files of
    saves that were killed, and must not remove that of a save in progress.
    """
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    _remove_abandoned(folder, name)
    temporary = os.path.join(folder, f"{temporary_prefix(name)}{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            with contextlib.suppress(OSError):  # some file systems have no locks
                lock(file)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:  # while the lock is held
                os.replace(temporary, path)
        if fcntl is None:  # Windows cannot rename an open file
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(folder)


def sync_folder(folder: str) -> None:
    """Makes the renames in a folder durable, which not every system supports."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def lock(file: Any, *, wait: bool = True) -> None:
    """Locks a file or a folder until it is closed.

    Without `wait`, raises BlockingIOError if it is locked.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def temporary_prefix(name: str) -> str:
    """Returns how the names of temporary files for this name start."""
    # A digest, since a name may have 255 bytes, the most that a file system allows.
    return f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}."


def _remove_abandoned(folder: str, name: str) -> None:
    """Removes the temporary files of killed saves to this name."""
    for entry in os.listdir(folder):
        if not (entry.startswith(temporary_prefix(name)) and entry.endswith(".tmp")):
            continue
        found = os.path.join(folder, entry)
        with contextlib.suppress(OSError), open(found, "rb") as file:
            lock(file, wait=False)
            # A save in progress locks its file before the first byte: an empty file
            # may be one that is not locked yet.
            if os.path.getsize(found):
                os.unlink(found)
