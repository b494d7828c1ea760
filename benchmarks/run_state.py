"""Saves a stopped training run, and restores it to continue bit for bit.

The folder `checkpoint` holds the adapters (`lj.save`), the optimizer's state
(safetensors, by the paths of its leaves) and the run's settings and losses (JSON).
"""

import contextlib
import hashlib
import json
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import script

import lora_jax as lj

NAME = "checkpoint"
FILES = "adapter.safetensors", "optimizer.safetensors", "run.json"


def save(folder: Path, params: Any, optimizer: Any, run: Mapping[str, Any]) -> None:
    """Writes the checkpoint into a folder, in place of an older one."""
    with script.staged(folder) as new:
        made = new / NAME
        made.mkdir()
        lj.save(made / FILES[0], params)
        safetensors.numpy.save_file(flat(optimizer), made / FILES[1])
        script.write_json(made / FILES[2], run)


def exists(folder: Path) -> bool:
    """Returns whether a folder has a checkpoint."""
    return (folder / NAME / FILES[2]).is_file()


def read_run(folder: Path) -> dict[str, Any]:
    """Returns a checkpoint's settings and losses.

    Raises:
      ValueError: If there is none.
    """
    if not exists(folder):
        raise ValueError(
            f"{folder} has no checkpoint of a stopped run: write its --output, or "
            "leave out --resume."
        )
    return json.loads((folder / NAME / FILES[2]).read_text(encoding="utf-8"))


def restore(folder: Path, base: Any, like: Any) -> tuple[Any, Any]:
    """Returns the parameters with the saved adapters, and the optimizer's state.

    Args:
      folder: That of `save`.
      base: The plain parameters.
      like: An optimizer state, whose structure and shardings the result has.

    Raises:
      ValueError: If a file is damaged, or of another model or optimizer.
    """
    params = lj.load(folder / NAME / FILES[0], base)
    path = folder / NAME / FILES[1]
    try:
        found = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    shapes = lambda named: {name: (x.shape, x.dtype) for name, x in named.items()}
    if shapes(found) != shapes(flat(like)):
        raise ValueError(f"{path} is the state of another optimizer or model.")
    leaves = [
        jax.device_put(found[name(path)], x.sharding)
        for path, x in jax.tree.leaves_with_path(like)
    ]
    return params, jax.tree.structure(like).unflatten(leaves)


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Returns the leaves of a tree by their paths."""
    return {name(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


def name(path: Any) -> str:
    """Returns a path as the name of a tensor."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def difference(
    saved: Mapping[str, Any], given: Mapping[str, Any], names: Sequence[str]
) -> str | None:
    """Returns the first setting that two runs do not share, as an error message."""
    for key in names:
        if saved.get(key) != given[key]:
            option = f"--{key.replace('_', '-')}"
            return (
                f"The stopped run had {option} {saved.get(key)}, and this one has "
                f"{given[key]}. Write {option} {saved.get(key)}, or start anew in "
                "another --output."
            )
    return None


def digest(arrays: Sequence[np.ndarray]) -> str:
    """Returns a digest of the data, in hex."""
    made = hashlib.sha256()
    for x in arrays:
        made.update(f"{x.shape} {x.dtype} ".encode() + x.tobytes())
    return made.hexdigest()


@contextlib.contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C sets; the second one interrupts.

    An exception in the middle of a step would lose the state: the step has deleted the
    old one, and the new one has no name yet.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread can handle signals
        return

    def note(*_: Any) -> None:
        signal.signal(signal.SIGINT, before)
        stop.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def remove(folder: Path) -> None:
    """Removes the checkpoint of a run that is complete."""
    shutil.rmtree(folder / NAME, ignore_errors=True)
