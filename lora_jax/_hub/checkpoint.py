"""A PyTorch checkpoint, read tensor by tensor: a file, a folder or a mapping."""

import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors

from lora_jax._tree import listed

INDEX_FILE = "model.safetensors.index.json"

Checkpoint = str | os.PathLike[str] | Mapping[str, Any]


class CheckpointTensor(NamedTuple):
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    rows: Callable[[int, int], np.ndarray]  # reads those from one index to another

    @property
    def module(self) -> str:
        """The module that has the tensor, or the name of a bare parameter."""
        stem, _, leaf = self.name.rpartition(".")
        return stem if stem and leaf in ("weight", "bias") else self.name


def open_checkpoint(checkpoint: Checkpoint) -> list[CheckpointTensor]:
    """Returns the tensors of a checkpoint that have rows, without reading a value.

    Raises:
      FileNotFoundError: If there is none, or one of its files is missing.
      ValueError: If a file is truncated, or the folder holds none of this format.
    """
    if isinstance(checkpoint, Mapping):
        if not checkpoint:
            raise ValueError("The checkpoint is empty: it has no tensor.")
        return [_in_memory(name, x) for name, x in checkpoint.items()]
    files = _files(os.fspath(checkpoint))
    return [t for path, names in files.items() for t in _in_file(path, names)]


def _in_memory(name: str, x: Any) -> CheckpointTensor:
    # NumPy has no bfloat16 for PyTorch's own tensors: they are read as float32.
    if hasattr(x, "detach"):
        x = x.detach().float().numpy()
    x = np.asarray(x)
    return CheckpointTensor(name, x.shape, lambda low, high: x[low:high])


def _files(path: str) -> dict[str, set[str] | None]:
    """Returns the files of a checkpoint, with their tensors if an index has them."""
    if os.path.isfile(path) and not path.endswith(".index.json"):
        return {path: None}
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    index = os.path.join(path, INDEX_FILE) if os.path.isdir(path) else path
    if os.path.isfile(index):
        return {**_indexed(folder, index)}
    if not os.path.isdir(path):
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    held = sorted(os.listdir(path))
    files = [name for name in held if name.endswith(".safetensors")]
    if found := [name for name in files if not name.startswith("adapter_")]:
        return {os.path.join(path, name): None for name in found}
    if pickles := [name for name in held if name.endswith((".bin", ".pt", ".pth"))]:
        raise FileNotFoundError(
            f"{path} has no .safetensors file, and {listed(pickles)} are pickles, "
            "which can run code when they are read. Convert them: from_pretrained("
            "folder).save_pretrained(new, safe_serialization=True), in PyTorch."
        )
    raise FileNotFoundError(
        f"{path} has no .safetensors file. It holds {listed(held)}. Pass the folder or "
        "the file of the checkpoint that the model was made from."
    )


def _indexed(folder: str, index: str) -> dict[str, set[str]]:
    try:
        with open(index, encoding="utf-8") as file:
            file_of = dict(json.load(file)["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of a checkpoint: {error!r}.") from error
    files: dict[str, set[str]] = {}
    for name, file_name in file_of.items():
        files.setdefault(os.path.join(folder, file_name), set()).add(name)
    if missing := [path for path in files if not os.path.isfile(path)]:
        raise FileNotFoundError(
            f"{index} names {len(files)} files, and {len(missing)} are missing: "
            f"{listed(missing)}. Download the complete checkpoint."
        )
    return files


def _in_file(path: str, names: set[str] | None) -> list[CheckpointTensor]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            held = set(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in held}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is no complete safetensors file: {error}. It may be truncated."
        ) from error
    if names is not None and (lost := sorted(names - held)):
        raise ValueError(f"{path} lacks {listed(lost)}, which its index has in it.")

    def rows(name: str, low: int, high: int) -> np.ndarray:
        # Opened each time: an open file keeps all that was read from it in memory.
        with safetensors.safe_open(path, framework="numpy") as file:
            return file.get_slice(name)[low:high]

    return [
        CheckpointTensor(name, shapes[name], functools.partial(rows, name))
        for name in sorted(held if names is None else names)
        if shapes[name]  # a scalar has no rows
    ]
