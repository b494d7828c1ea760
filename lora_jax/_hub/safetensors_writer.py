"""Writes safetensors files one tensor at a time, so that memory holds no whole file.

The library safetensors only writes tensors that are all in memory. The format, 8 bytes
for the length of a JSON header and then the data, is fixed:
https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax._hub.checkpoint import DTYPES, INDEX_FILE

FORMAT = {"format": "pt"}  # which transformers requires
SAFETENSORS_DTYPES = {name: code for code, name in DTYPES.items()}


class Entry(NamedTuple):
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as NumPy names it

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.itemsize


def shards(entries: Iterable[Entry], limit: float) -> list[list[Entry]]:
    """Returns the tensors of each file: as many as fit into `limit` bytes, in order."""
    files: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if files[-1] and size + entry.size > limit:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.size
    return files


def file_names(count: int) -> list[str]:
    """Returns the names of the files of a checkpoint, as transformers has them."""
    if count == 1:
        return ["model.safetensors"]
    each = range(1, count + 1)
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in each]


def write_tensors(
    path: str,
    entries: list[Entry],
    arrays: Iterator[np.ndarray],
    metadata: Mapping[str, str] = FORMAT,
) -> None:
    """Writes a file.

    Args:
      path: Its name.
      entries: Its tensors.
      arrays: Their values, in the same order. Each is dropped when it is written.
      metadata: What the header holds besides. The library safetensors would write
        several entries in a random order.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for entry in entries:
        start, end = end, end + entry.size
        header[entry.name] = {
            "dtype": SAFETENSORS_DTYPES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            x = np.asarray(next(arrays), order="C")
            assert (x.shape, x.dtype.name) == (entry.shape, entry.dtype), entry
            file.write(x.reshape(-1).view(np.uint8).data if x.size else b"")
            del x
        file.flush()
        os.fsync(file.fileno())


def write_index(folder: str, files: dict[str, list[Entry]]) -> None:
    """Writes the index of several files."""
    where = {entry.name: file for file, each in files.items() for entry in each}
    size = sum(entry.size for each in files.values() for entry in each)
    index = {"metadata": {"total_size": size}, "weight_map": where}
    with open(os.path.join(folder, INDEX_FILE), "x", encoding="utf-8") as file:
        file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
