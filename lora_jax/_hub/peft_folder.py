"""A folder in PEFT's format: two files, written together or not at all."""

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from lora_jax._hub.peft_config import read_config
from lora_jax._write import check_finite, write

CONFIG_FILE, TENSORS_FILE = FILES = "adapter_config.json", "adapter_model.safetensors"
TORCH_DTYPES = ("float32", "bfloat16", "float16")  # in which PyTorch keeps adapters
STORED_DTYPES = ("F32", "BF16", "F16")  # safetensors' names for them


class PeftFolder(NamedTuple):
    """The contents of a folder."""

    path: str
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


def write_folder(
    path: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Writes both files to a temporary folder, and renames it to `path`.

    An old folder is renamed first, because no system replaces a folder that holds
    files; it is renamed back if the new one cannot take its place.
    """
    data = {
        CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        TENSORS_FILE: safetensors.numpy.save(dict(tensors), metadata={"format": "pt"}),
    }
    temporary = os.path.join(os.path.dirname(path), f".{uuid.uuid4().hex}")
    new, old = f"{temporary}.new", f"{temporary}.old"
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


def read_folder(folder: str | os.PathLike[str]) -> PeftFolder:
    """Returns the contents of a folder, checked as `read_config` and `read_tensors` do.

    Raises:
      FileNotFoundError: If a file is missing.
      ValueError: If a file is truncated, or holds no adapter that can be imported.
    """
    path = os.fspath(folder)
    if not os.path.isfile(os.path.join(path, CONFIG_FILE)):
        raise FileNotFoundError(f"There is no {CONFIG_FILE} in {path}. {_advice(path)}")
    return PeftFolder(path, read_config(path), read_tensors(path))


def _advice(path: str) -> str:
    """Returns what to do about a path that is no PEFT folder."""
    if os.path.isfile(path):
        return "Pass the folder that PEFT's save_pretrained wrote, not a file in it."
    if os.path.isdir(path):
        below = sorted(
            name
            for name in os.listdir(path)
            if os.path.isfile(os.path.join(path, name, CONFIG_FILE))
        )
        if below:
            choice = os.path.join(path, below[0])
            return f"It has the adapters {', '.join(below)}: pass {choice!r}."
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        return (
            "If it is the name of a repository on the Hugging Face hub, download it "
            f"first: folder = huggingface_hub.snapshot_download({path!r})."
        )
    return "Pass the folder that PEFT's save_pretrained wrote."


def read_tensors(folder: str) -> dict[str, np.ndarray]:
    """Returns the tensors in a folder, each floating and finite.

    Raises:
      FileNotFoundError: If there are none.
      ValueError: If the file is truncated, or holds what no adapter does.
    """
    path = os.path.join(folder, TENSORS_FILE)
    if not os.path.isfile(path):
        advice = "Pass the folder that PEFT's save_pretrained wrote."
        if os.path.isfile(os.path.join(folder, "adapter_model.bin")):
            advice = (
                "Its adapter_model.bin is a pickle, which can run code when it is "
                "read: save it again with PEFT, save_pretrained(..., "
                "safe_serialization=True)."
            )
        raise FileNotFoundError(f"There is no file {path}. {advice}")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():  # NumPy lacks some dtypes
                if (dtype := file.get_slice(name).get_dtype()) not in STORED_DTYPES:
                    raise ValueError(
                        f"{path}: tensor {name!r} is {dtype}. Only "
                        f"{', '.join(TORCH_DTYPES)} can be imported: cast it in "
                        "PyTorch, and save the adapter again."
                    )
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (safetensors.SafetensorError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no complete safetensors file: {error}. It may be truncated."
        ) from error
    for name, x in tensors.items():
        check_finite(f"{path}: tensor {name!r}", x)
    return tensors


def as_dtype(name: str, x: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns a tensor as the file will hold it, in this dtype or its own.

    Raises:
      ValueError: If PyTorch trains in no such dtype, or the values leave its range.
    """
    with np.errstate(over="ignore"):  # check_finite below reports it with the name
        x = np.ascontiguousarray(x, x.dtype if dtype is None else dtype)
    if x.dtype.name not in TORCH_DTYPES:
        raise ValueError(
            f"{name!r} is {x.dtype}, in which PyTorch keeps no adapter. Write "
            "dtype=jnp.float32."
        )
    check_finite(f"{name!r} in {x.dtype}", x)
    return x
