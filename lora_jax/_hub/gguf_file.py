"""A GGUF file as the checkpoint that it was converted from.

The package gguf reads the file and knows the names. llama.cpp's converter also changes
values of some architectures, which is undone here:
https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from lora_jax._hub.checkpoint import BlockFormat, Blocks, CheckpointTensor
from lora_jax._hub.quantized_tensors import dequantized

# The bytes of a block, and its format here: a float16 scale, then 32 codes.
BLOCKS = {"Q8_0": (34, "int8"), "Q4_0": (18, "int4")}
BLOCK = 32
# Architectures whose tensors the converter changes in no way, or in one that is known.
UNCHANGED = ("qwen2", "qwen3", "phi2", "starcoder2", "gpt2")
PAIRED = ("llama",)  # rows of queries and keys: the two of a rotated pair are adjacent
SHIFTED = ("gemma", "gemma2", "gemma3")  # 1 is added to the scales of norms


def open_gguf(path: str) -> tuple[list[CheckpointTensor], dict[str, str]]:
    """Returns the tensors of a file, and their names by those in PyTorch.

    Raises:
      ImportError: If the package gguf is missing.
      ValueError: If the file is no GGUF or truncated, or its architecture is not known.
    """
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"Reading {path} needs the package gguf: pip install gguf."
        ) from error
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        kind = fields["general.architecture"]
        layers = fields[f"{kind}.block_count"]
    # gguf raises these for another format, a truncated file and a duplicate field.
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is no complete GGUF file: {error}.") from error
    if kind not in (*UNCHANGED, *PAIRED, *SHIFTED):
        raise ValueError(
            f"{path} holds a {kind}, and whether its tensors are those of PyTorch is "
            f"known for {', '.join((*UNCHANGED, *PAIRED, *SHIFTED))} only. Pass the "
            "checkpoint that it was converted from."
        )
    tensors = [
        _tensor(path, tensor, *_change(tensor.name, kind, fields))
        for tensor in reader.tensors
    ]
    (arch,) = (a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    known = gguf.get_tensor_name_map(arch, layers).mapping
    held = {tensor.name for tensor in tensors}
    names = {
        alias + end: name + end
        for alias, (_, name) in known.items()
        for end in (".weight", ".bias")
        if name + end in held
    }
    return tensors, names


def _change(name: str, kind: str, fields: dict[str, Any]) -> tuple[int | None, float]:
    """Returns the heads whose rows are paired, and what was added to a tensor."""
    part = name.split(".")[-2]
    if kind in PAIRED and part in ("attn_q", "attn_k"):
        heads = fields[f"{kind}.attention.head_count"]
        kv_heads = fields.get(f"{kind}.attention.head_count_kv", heads)
        return (heads if part == "attn_q" else kv_heads), 0.0
    return None, 1.0 if kind in SHIFTED and part.endswith("norm") else 0.0


def _tensor(
    path: str, tensor: Any, heads: int | None, added: float
) -> CheckpointTensor:
    import gguf

    shape = tuple(int(n) for n in reversed(tensor.shape))
    kind = tensor.tensor_type.name

    def unpaired(x: np.ndarray) -> np.ndarray:
        if heads is None:
            return x
        pairs = x.reshape(heads, -1, 2, *x.shape[1:])
        return pairs.swapaxes(1, 2).reshape(x.shape)

    if kind in BLOCKS and len(shape) == 2 and not added:
        form = BlockFormat(BLOCKS[kind][1], BLOCK, "float16", ("float32",))
        read_blocks: Callable[[], Blocks] = lambda: Blocks(
            *map(unpaired, _blocks(tensor.data, kind, shape))
        )
        read = lambda index: dequantized(read_blocks(), form)[index]
        args = tensor.name, shape, "float32", read, path
        return CheckpointTensor(*args, form, read_blocks)

    def read_floats(index: tuple[slice, ...]) -> np.ndarray:
        try:
            x = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(
                f"{path}: {tensor.name!r} is {kind}, which gguf cannot dequantize."
            ) from error
        return unpaired(x.reshape(shape) - np.float32(added))[index]

    return CheckpointTensor(tensor.name, shape, "float32", read_floats, path)


def _blocks(data: np.ndarray, kind: str, shape: tuple[int, ...]) -> Blocks:
    """Returns the codes and scales of a matrix in Q8_0 or Q4_0.

    In Q4_0 a byte holds one of the first 16 codes of a block in its lower half, and one
    of the last 16 in its upper half, each of them plus 8.
    """
    blocks = np.asarray(data).reshape(shape[0], -1, BLOCKS[kind][0])
    scale = blocks[..., :2].copy().view(np.float16)[..., 0]
    codes = blocks[..., 2:].copy()
    if kind == "Q8_0":
        values = codes.view(np.int8)
    else:
        values = np.concatenate([codes & 15, codes >> 4], -1).astype(np.int8) - 8
    return Blocks(values.reshape(shape), scale)
