"""Several processes of one JAX program, on several machines: what one does for all.

Each makes the same calls, as JAX demands of every computation that spans processes. In
one process all of this is nothing.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

ROOM = 1000  # bytes of an error that the other processes are told
SIZE = hashlib.sha256().digest_size


def is_first() -> bool:
    """Whether this process writes what all have to say: files are written once."""
    return jax.process_index() == 0


@contextlib.contextmanager
def agreed(what: str) -> Iterator[dict[str, Any]]:
    """Runs a block in every process; an error in one is an error in all.

    Nothing in the block may wait for other processes, so that all of them get to the
    end of it, where they tell each other. It gets a dict for what must be the same in
    all of them: processes that go on with other things would wait for each other.

    Raises:
      RuntimeError: If the block failed elsewhere; of the first of those processes.
      ValueError: If what must be the same is not.
    """
    same: dict[str, Any] = {}
    if jax.process_count() == 1:
        yield same
        return
    own, digest = None, bytes(SIZE)
    try:
        yield same
        digest = _digest(same)
    except BaseException as error:  # Ctrl-C too: the others are waiting for this one
        own = error
    said = b"" if own is None else f"{type(own).__name__}: {own}".encode()[:ROOM]
    row = bytes([own is not None]) + digest + said.ljust(ROOM, b"\0")
    rows = multihost_utils.process_allgather(np.frombuffer(row, np.uint8))
    if own is not None:
        raise own
    for i, told in enumerate(map(bytes, rows)):
        if told[0]:
            text = told[1 + SIZE :].rstrip(b"\0").decode(errors="replace")
            raise RuntimeError(f"{what} failed in process {i}. There: {text}")
    digests = [bytes(told)[1 : 1 + SIZE] for told in rows]
    if other := [i for i, x in enumerate(digests) if x != digests[0]]:
        raise ValueError(
            f"{what} has other {' or '.join(same)} in process {other[0]} than in "
            "process 0. Call it with the same in every process."
        )


def outline(x: Any) -> list[Any]:
    """What processes must have in common of an array to gather it together."""
    spans = lambda x: isinstance(x, jax.Array) and not x.is_fully_addressable
    return [[x.shape, str(x.dtype), spans(x)] for x in jax.tree.leaves(x)]


def _digest(said: Any) -> bytes:
    """Of lists and dicts: of arrays the values, of all else how it prints."""
    digest = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(said):
        head = [*x.shape, x.dtype] if isinstance(x, np.ndarray) else x
        digest.update(f"{jax.tree_util.keystr(path)} {head!r}\n".encode())
        if isinstance(x, np.ndarray):
            digest.update(np.ascontiguousarray(x).tobytes())
    return digest.digest()


def whole(x: Any) -> Any:
    """The array, in this process's memory if other processes have some of it.

    All processes must ask for it, each for the same arrays in the same order.
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return x
    if x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def placed(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """The array where the sharding says, each process giving what is its own.

    All processes have the whole of `x`, or, where it spans them, a part.
    """
    here = not isinstance(x, jax.Array) or x.is_fully_addressable
    if sharding.is_fully_addressable or not here:
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def first_found(values: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each place the value of a process that has it, and whether one does."""
    every = multihost_utils.process_allgather((values, found))
    values, found = (np.asarray(x) for x in every)
    which = found.argmax(0)  # (process, place) to (place,)
    return values[which, np.arange(values.shape[1])], found.any(0)
