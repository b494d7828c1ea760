"""Coordinates the processes of one JAX program, which may run on several machines.

Every process makes the same calls, as JAX requires of computations that span processes.
In a program of one process these functions do nothing.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

ERROR_BYTES = 1000  # of an error message, sent to the other processes
DIGEST_BYTES = hashlib.sha256().digest_size


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


@contextlib.contextmanager
def agreed(what: str) -> Iterator[dict[str, Any]]:
    """Runs a block in every process, and raises in all of them if it fails in one.

    The processes exchange errors at the end of the block. So nothing in it may wait for
    other processes: one that has failed would never arrive.

    Args:
      what: The function that is called, for messages.

    Yields:
      A dict to fill with values that must be equal in all processes. If they differed,
      processes would later wait for each other in different computations.

    Raises:
      RuntimeError: If the block failed in another process.
      ValueError: If the values in the dict differ.
    """
    same: dict[str, Any] = {}
    if jax.process_count() == 1:
        yield same
        return
    local, digest = None, bytes(DIGEST_BYTES)
    try:
        yield same
        digest = _digest(same)
    except BaseException as error:  # Ctrl-C too: the others are waiting for this one
        local = error
    text = "" if local is None else f"{type(local).__name__}: {local}"
    error = text.encode()[:ERROR_BYTES].ljust(ERROR_BYTES, b"\0")
    row = bytes([local is not None]) + digest + error
    rows = multihost_utils.process_allgather(np.frombuffer(row, np.uint8))
    if local is not None:
        raise local
    rows = [bytes(row) for row in rows]
    for i, row in enumerate(rows):
        if row[0]:
            text = row[1 + DIGEST_BYTES :].rstrip(b"\0").decode(errors="replace")
            raise RuntimeError(f"{what} failed in process {i}. There: {text}")
    digests = [row[1 : 1 + DIGEST_BYTES] for row in rows]
    if other := [i for i, x in enumerate(digests) if x != digests[0]]:
        raise ValueError(
            f"{what} has other {' or '.join(same)} in process {other[0]} than in "
            "process 0. Call it with the same arguments in every process."
        )


def outline(x: Any) -> list[Any]:
    """Returns the properties of an array that processes must share to gather it."""
    spans = lambda x: isinstance(x, jax.Array) and not x.is_fully_addressable
    return [[x.shape, str(x.dtype), spans(x)] for x in jax.tree.leaves(x)]


def _digest(tree: Any) -> bytes:
    """Hashes the values of arrays, and the `repr` of other leaves."""
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        head = [*x.shape, x.dtype] if isinstance(x, np.ndarray) else x
        digest.update(f"{jax.tree_util.keystr(path)} {head!r}\n".encode())
        if isinstance(x, np.ndarray):
            digest.update(np.ascontiguousarray(x).tobytes())
    return digest.digest()


def gathered(x: Any) -> Any:
    """Returns an array that spans processes as a NumPy array; any other unchanged.

    All processes must call this, for the same arrays in the same order.
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return x
    if x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def put(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns what `jax.device_put` does, also if the sharding spans processes.

    Every process must have all of `x`, unless `x` itself spans processes.
    """
    here = not isinstance(x, jax.Array) or x.is_fully_addressable
    if sharding.is_fully_addressable or not here:
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def first_found(values: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each element from a process that has found it, and whether one has."""
    every = multihost_utils.process_allgather((values, found))
    values, found = (np.asarray(x) for x in every)  # (process, element)
    process = found.argmax(0)
    return values[process, np.arange(values.shape[1])], found.any(0)
