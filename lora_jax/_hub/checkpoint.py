"""A PyTorch checkpoint, read tensor by tensor: a file, a folder or a mapping."""

import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
from jax.typing import DTypeLike

from lora_jax._tree import listed

INDEX_FILE = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth")  # the ends of their names
# The dtypes of safetensors files that NumPy has, with JAX's extensions.
DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
    "BOOL": "bool",
}

CHUNK = 1 << 24  # elements that are computed with at a time
KEPT = 1 << 26  # bytes that are read before a file is closed

Checkpoint = str | os.PathLike[str] | Mapping[str, Any]


class Blocks(NamedTuple):
    """A tensor that is stored quantized, as `Quantized` stores it.

    Blocks of elements with one scale lie along the last dimension.
    """

    values: np.ndarray  # int8, of the tensor's shape: codes of 8 bits, or -8 to 7
    scale: np.ndarray  # the same dimensions, with one element for each block


class BlockFormat(NamedTuple):
    """The static part of a `Quantized` made of `Blocks`."""

    name: str  # "int8", "int4" or "nf4"
    size: int  # elements of a block
    scale_dtype: str
    dtypes: tuple[str, ...]


class CheckpointTensor(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
      name: Its name in the file.
      shape: Its sizes.
      dtype: Its dtype as NumPy names it, or the file's own name of one that it lacks.
      read: `read((slice, ...))` reads a part of it: a slice for each of some dimensions
        from the first, all of the others. Blocks are dequantized.
      file: The file that holds it, or `None`.
      format: The format of its blocks, if it is stored quantized.
      blocks: Reads all blocks, without dequantizing them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[tuple[slice, ...]], np.ndarray]
    file: str | None = None
    format: BlockFormat | None = None
    blocks: Callable[[], Blocks] | None = None

    def rows(self, low: int, high: int) -> np.ndarray:
        return self.read((slice(low, high),))

    @property
    def module(self) -> str:
        """The module that has the tensor, or the name of a bare parameter."""
        stem, _, leaf = self.name.rpartition(".")
        return stem if stem and leaf in ("weight", "bias") else self.name


def check_floating(dtype: DTypeLike | None) -> None:
    """Checks the dtype that floating tensors are cast to, if there is one."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be floating, found {jnp.dtype(dtype).name}.")


def open_checkpoint(checkpoint: Checkpoint) -> list[CheckpointTensor]:
    """Returns the tensors of a checkpoint, without reading a value.

    Raises:
      FileNotFoundError: If there is none, or one of its files is missing.
      ValueError: If a file is truncated, two files hold the same tensor, or the folder
        holds no file of this format.
    """
    if isinstance(checkpoint, Mapping):
        if not checkpoint:
            raise ValueError("The checkpoint is empty: it has no tensor.")
        return [_in_memory(name, x) for name, x in checkpoint.items()]
    files, reader = checkpoint_files(os.fspath(checkpoint)), FileReader()
    found: dict[str, CheckpointTensor] = {}
    for path, names in files.items():
        for tensor in _in_file(path, names, reader):
            other = found.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise ValueError(
                    f"{other.file} and {path} both hold {tensor.name!r}. Pass the file "
                    "that belongs to the model, or remove the other one."
                )
    return [*found.values()]


def check_dtype(tensor: CheckpointTensor) -> None:
    """Checks that NumPy, with JAX's extensions, has the dtype of a tensor."""
    if tensor.dtype not in DTYPES.values():
        where = f"{tensor.file}: " if tensor.file else ""
        raise ValueError(
            f"{where}{tensor.name!r} is {tensor.dtype}, which is not supported. "
            f"Convert it to one of {', '.join(DTYPES.values())}."
        )


def _in_memory(name: str, x: Any) -> CheckpointTensor:
    if hasattr(x, "detach"):
        dtype = str(x.dtype).removeprefix("torch.")
        read = lambda index: _from_torch(x[index] if index else x)
        return CheckpointTensor(name, tuple(x.shape), dtype, read)
    x = np.asarray(x)
    return CheckpointTensor(name, x.shape, x.dtype.name, lambda index: x[index])


def _from_torch(x: Any) -> np.ndarray:
    """Returns a tensor of PyTorch, with its own memory if that is on the CPU."""
    x = x.detach().cpu()
    if str(x.dtype) != "torch.bfloat16":  # which PyTorch does not give to NumPy
        return x.numpy()
    import torch  # pyright: ignore[reportMissingImports]

    return x.view(torch.int16).numpy().view(jnp.bfloat16)


def checkpoint_files(path: str) -> dict[str, set[str] | None]:
    """Returns the files of a checkpoint, with their tensors if an index has them."""
    if not os.path.isdir(path):
        _check_format(path)
    if os.path.isfile(path) and not path.endswith(".index.json"):
        return {path: None}
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    index = os.path.join(path, INDEX_FILE) if os.path.isdir(path) else path
    if os.path.isfile(index):
        return {**_indexed(folder, index)}
    if not os.path.isdir(path):
        raise FileNotFoundError(f"There is no checkpoint {path}.{hub_advice(path)}")
    held = sorted(os.listdir(path))
    files = [name for name in held if name.endswith(".safetensors")]
    if found := [name for name in files if not name.startswith("adapter_")]:
        return {os.path.join(path, name): None for name in found}
    if pickles := [name for name in held if name.endswith(PICKLES)]:
        raise FileNotFoundError(
            f"{path} has no .safetensors file, and {listed(pickles)} are pickles, "
            "which can run code when they are read. Convert them: from_pretrained("
            "folder).save_pretrained(new, safe_serialization=True), in PyTorch."
        )
    raise FileNotFoundError(
        f"{path} has no .safetensors file. It holds {listed(held)}. Pass the folder or "
        "the file of the checkpoint that the model was made from."
    )


def _check_format(path: str) -> None:
    """Checks that the name of a file is not that of another format."""
    if path.endswith(".gguf"):
        raise ValueError(
            f"{path} is a GGUF, which only import_weights reads: its tensors have "
            "other names. Pass the checkpoint that it was converted from."
        )
    if path.endswith(PICKLES):
        raise ValueError(
            f"{path} is a pickle, which can run code when it is read. Convert it: "
            "from_pretrained(folder).save_pretrained(new, safe_serialization=True), in "
            "PyTorch."
        )


def hub_advice(path: str) -> str:
    """Returns what to do if a path may be the name of a repository on the hub."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        return ""
    return (
        " If it is the name of a repository on the Hugging Face hub, download it "
        f"first: folder = huggingface_hub.snapshot_download({path!r})."
    )


def _indexed(folder: str, index: str) -> dict[str, set[str]]:
    try:
        with open(index, encoding="utf-8") as file:
            file_of = dict(json.load(file)["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of a checkpoint: {error!r}.") from error
    files: dict[str, set[str]] = {}
    for name, file_name in file_of.items():
        parts = os.path.normpath(str(file_name)).split(os.sep)
        if os.path.isabs(str(file_name)) or os.pardir in parts:
            raise ValueError(
                f"{index} names the file {file_name!r}, which is outside of its "
                "folder. Such an index could read any file: it is refused."
            )
        files.setdefault(os.path.join(folder, file_name), set()).add(name)
    if missing := [path for path in files if not os.path.isfile(path)]:
        raise FileNotFoundError(
            f"{index} names {len(files)} files, and {len(missing)} are missing: "
            f"{listed(missing)}. Download the complete checkpoint."
        )
    return files


class FileReader:
    """Reads safetensors files, of which it keeps one open for a while.

    Opening a file parses its header, which has an entry for each tensor, maybe for
    thousands. An open file keeps in memory all that was read from it, so it is closed
    after KEPT bytes. It is mapped into memory, and reading from a mapped file that was
    truncated kills the process: a file that has changed is opened again.
    """

    def __init__(self) -> None:
        self._close()

    def read(self, path: str, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a tensor, or a slice of it along each of the first dimensions."""
        status = os.stat(path)
        version = path, status.st_ino, status.st_size, status.st_mtime_ns
        if version != self.version:
            self._close()
            self.file, self.version = _opened(path), version
        assert self.file is not None
        x = self.file.get_slice(name)[index] if index else self.file.get_tensor(name)
        self.size += x.nbytes
        if self.size > KEPT:
            self._close()
        return x

    def _close(self) -> None:
        self.file: safetensors.safe_open | None = None
        self.version: tuple[Any, ...] | None = None
        self.size = 0


def _opened(path: str) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is no complete safetensors file: {error}. It may be truncated."
        ) from error


def _in_file(
    path: str, names: set[str] | None, reader: FileReader
) -> list[CheckpointTensor]:
    with _opened(path) as file:
        held = {name: file.get_slice(name) for name in file.keys()}
        shapes = {name: tuple(x.get_shape()) for name, x in held.items()}
        dtypes = {name: str(x.get_dtype()) for name, x in held.items()}
    if names is not None and (lost := sorted(names - held.keys())):
        raise ValueError(f"{path} lacks {listed(lost)}, which its index has in it.")

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        check_dtype(tensors[name])
        return reader.read(path, name, index)

    tensors = {
        name: CheckpointTensor(
            name,
            shapes[name],
            DTYPES.get(dtypes[name], dtypes[name]),
            functools.partial(read, name),
            path,
        )
        for name in sorted(held if names is None else names)
    }
    return [*tensors.values()]
