"""A folder in PEFT's format: two files, written together or not at all."""

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors

from lora_jax._hub.checkpoint import hub_advice
from lora_jax._hub.folder_files import (
    check_regular,
    file_now,
    new_files,
    open_folder,
)
from lora_jax._hub.module_rules import ModuleRules, module_rules
from lora_jax._hub.peft_config import CONFIG_FILE, read_config
from lora_jax._hub.safetensors_writer import FORMAT, Entry, write_tensors
from lora_jax._tree import listed
from lora_jax._write import check_finite

TENSORS_FILE = "adapter_model.safetensors"
FILES = CONFIG_FILE, TENSORS_FILE
METADATA = FORMAT | {"writer": "lora_jax"}  # the mark by which exports are known
# The files of a model. transformers looks for an adapter before it looks for them.
MODEL_FILES = [
    f"{name}{end}"
    for name in ("model.safetensors", "pytorch_model.bin")
    for end in ("", ".index.json")
]
ATTEMPTS = 5  # to read a folder that an export is writing
TORCH_DTYPES = ("float32", "bfloat16", "float16")  # in which PyTorch keeps adapters
STORED_DTYPES = ("F32", "BF16", "F16")  # safetensors' names for them


class PeftFolder(NamedTuple):
    """The contents of a folder."""

    path: str
    config: dict[str, Any]
    rules: ModuleRules
    tensors: dict[str, np.ndarray]


def adapter_folder(folder: str | os.PathLike[str], overwrite: bool) -> str:
    """Returns the full path of a folder that may get an adapter.

    Files of other names may be in it, such as a tokenizer, and stay.

    Args:
      folder: The folder, which exists or does not.
      overwrite: Whether an adapter of another program may be replaced.

    Raises:
      ValueError: If it is a file, holds an adapter of another program or a model, or
        something that is no file has the name of one of the files.
      FileNotFoundError: If its parent is missing.
    """
    path = open_folder(folder)
    for name in FILES:
        check_regular(os.path.join(path, name))
    for name in MODEL_FILES:
        if os.path.lexists(os.path.join(path, name)):
            raise ValueError(
                f"{path} holds a model, {name}, and transformers would load the "
                "adapter instead of it. Export to another folder."
            )
    there = [name for name in FILES if os.path.lexists(os.path.join(path, name))]
    if there and not overwrite and not _is_own(os.path.join(path, TENSORS_FILE)):
        raise ValueError(
            f"{path} holds an adapter that export_peft did not write: "
            f"{listed(there)}. Export to another folder, or write overwrite=True."
        )
    return path


def _is_own(tensors: str) -> bool:
    """Whether `write_folder` wrote a file of tensors."""
    try:
        with safetensors.safe_open(tensors, framework="numpy") as file:
            return (file.metadata() or {}).items() >= METADATA.items()
    except (OSError, safetensors.SafetensorError):
        return False


def write_folder(
    path: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Writes both files of an adapter into a folder from `adapter_folder`."""
    with new_files(path) as folder:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        with open(os.path.join(folder, CONFIG_FILE), "xb") as file:
            file.write(text.encode())
        # In the order of the library safetensors, in which all data are aligned.
        order = lambda entry: (-entry.itemsize, entry.name)
        entries = [Entry(name, x.shape, x.dtype.name) for name, x in tensors.items()]
        entries.sort(key=order)
        arrays = (tensors[entry.name] for entry in entries)
        write_tensors(os.path.join(folder, TENSORS_FILE), entries, arrays, METADATA)


def read_folder(folder: str | os.PathLike[str]) -> PeftFolder:
    """Returns the contents of a folder, checked as `read_config` and `read_tensors` do.

    Both files are of one adapter, also if an export is writing the folder.

    Raises:
      FileNotFoundError: If a file is missing.
      ValueError: If a file is truncated, or holds no adapter that can be imported; or
        if the files change whenever they are read.
    """
    path = os.fspath(folder)
    if not os.path.exists(file_now(path, CONFIG_FILE)):
        raise FileNotFoundError(f"There is no {CONFIG_FILE} in {path}. {_advice(path)}")
    for _ in range(ATTEMPTS):
        before = _versions(path)
        try:
            config = read_config(file_now(path, CONFIG_FILE))
            tensors = read_tensors(file_now(path, TENSORS_FILE))
        except (FileNotFoundError, ValueError):
            if _versions(path) == before:
                raise
            continue
        if _versions(path) == before:
            return PeftFolder(path, config, module_rules(config), tensors)
    raise ValueError(f"{path} changes while it is read. Import it when it is complete.")


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
    elif advice := hub_advice(path):
        return advice.lstrip()
    return "Pass the folder that PEFT's save_pretrained wrote."


def _versions(folder: str) -> list[tuple[int, ...]]:
    """Returns what differs between versions of the files, where they are there."""
    found = []
    for name in FILES:
        with contextlib.suppress(OSError):
            status = os.stat(file_now(folder, name))
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return found


def read_tensors(path: str) -> dict[str, np.ndarray]:
    """Returns the tensors in a file, each floating and finite.

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If the file is truncated, or holds what no adapter does.
    """
    check_regular(path)
    if not os.path.isfile(path):
        advice = "Pass the folder that PEFT's save_pretrained wrote."
        if os.path.isfile(os.path.join(os.path.dirname(path), "adapter_model.bin")):
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
