"""A folder in PEFT's format: written whole or not at all, and read whole."""

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from lora_jax._tree import listed
from lora_jax._write import check_finite, write

CONFIG, TENSORS = FILES = "adapter_config.json", "adapter_model.safetensors"
DTYPES = ("float32", "bfloat16", "float16")


def free_folder(folder: str | os.PathLike[str]) -> str:
    """The full path of a folder that an export may write, or write again.

    Raises:
      ValueError: If it holds anything else, or is a file.
      FileNotFoundError: If there is nothing to make it in.
    """
    path = os.path.realpath(folder)
    if not os.path.isdir(os.path.dirname(path)):
        raise FileNotFoundError(f"There is no folder {os.path.dirname(path)}.")
    if path == os.path.realpath(os.curdir):
        raise ValueError(f"{path} is where you are. Give the name of a folder in it.")
    if os.path.lexists(path):
        if not os.path.isdir(path):
            raise ValueError(f"{path} is a file. Give the name of a folder.")
        if others := sorted(set(os.listdir(path)) - set(FILES)):
            raise ValueError(
                f"{path} holds other files: {listed(others)}. Export to a new folder."
            )
    return path


def write_folder(
    path: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Writes both files beside the folder's place, and moves them there at once."""
    data = {
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        TENSORS: safetensors.numpy.save(dict(tensors), metadata={"format": "pt"}),
    }
    beside = os.path.join(os.path.dirname(path), f".{uuid.uuid4().hex}")
    new, old = f"{beside}.new", f"{beside}.old"
    try:
        os.mkdir(new)
        for name, content in data.items():
            write(os.path.join(new, name), content)
        if os.path.isdir(path):
            os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            if os.path.isdir(old):
                os.rename(old, path)
            raise
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_tensors(folder: str) -> dict[str, np.ndarray]:
    """The tensors in a folder, each floating and finite.

    Raises:
      FileNotFoundError: If there are none.
      ValueError: If the file is truncated, or holds what no adapter does.
    """
    path = os.path.join(folder, TENSORS)
    if not os.path.isfile(path):
        advice = "Pass the folder that PEFT's save_pretrained wrote."
        if os.path.isfile(os.path.join(folder, "adapter_model.bin")):
            advice = (
                "Its adapter_model.bin is a pickle, in which code can hide: save it "
                "again with PEFT, save_pretrained(..., safe_serialization=True)."
            )
        raise FileNotFoundError(f"There is no file {path}. {advice}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (safetensors.SafetensorError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no whole safetensors file: {error}. It may be truncated."
        ) from error
    for name, x in tensors.items():
        if x.dtype.name not in DTYPES:
            raise ValueError(
                f"{path}: tensor {name!r} is {x.dtype}; {', '.join(DTYPES)} are known."
            )
        check_finite(f"{path}: tensor {name!r}", x)
    return tensors


def as_dtype(name: str, x: np.ndarray, dtype: Any) -> np.ndarray:
    """A tensor as the file will hold it.

    Raises:
      ValueError: If PyTorch trains in no such dtype, or the values leave its range.
    """
    with np.errstate(over="ignore"):  # the check below says it with the name
        x = np.ascontiguousarray(x, x.dtype if dtype is None else dtype)
    if x.dtype.name not in DTYPES:
        raise ValueError(
            f"{name!r} is {x.dtype}, in which no adapter is kept. Write "
            "dtype=jnp.float32."
        )
    check_finite(f"{name!r} in {x.dtype}", x)
    return x
