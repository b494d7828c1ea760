"""Several processes of one JAX program, on several machines: what one does for all.

Each makes the same calls, as JAX demands of every computation that spans processes. In
one process all of this is nothing.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

ROOM = 1000  # bytes of an error that the other processes are told


def is_first() -> bool:
    """Whether this process writes what all have to say: files are written once."""
    return jax.process_index() == 0


@contextlib.contextmanager
def agreed(what: str) -> Iterator[None]:
    """Runs a block in every process; an error in one is an error in all.

    Nothing in the block may wait for other processes, so that all of them get to the
    end of it, where they tell each other.

    Raises:
      RuntimeError: If the block failed elsewhere; of the first of those processes.
    """
    if jax.process_count() == 1:
        yield
        return
    own = None
    try:
        yield
    except Exception as error:
        own = error
    said = b"" if own is None else f"{type(own).__name__}: {own}".encode()[:ROOM]
    row = np.zeros(1 + ROOM, np.uint8)
    row[0], row[1 : 1 + len(said)] = own is not None, np.frombuffer(said, np.uint8)
    rows = multihost_utils.process_allgather(row)
    if own is not None:
        raise own
    for i, (failed, *said) in enumerate(rows.tolist()):
        if failed:
            text = bytes(said).rstrip(b"\0").decode(errors="replace")
            raise RuntimeError(f"{what} failed in process {i}. There: {text}")


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
