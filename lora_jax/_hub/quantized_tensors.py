"""Tensors that a checkpoint stores quantized: read as they are, or refused by name.

bitsandbytes stores a 4-bit weight as several tensors, which are one here. The layout:
https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/functional.py
(`QuantState.as_dict`). Its codes are those of `Quantized` plus 8, two in a byte with
the first in the higher bits, and a block is 64 elements of a row.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax._engine.quantized import CODEBOOKS
from lora_jax._hub.checkpoint import BlockFormat, Blocks, CheckpointTensor

STATE = ".quant_state.bitsandbytes__"  # the end of a name, before the kind of codes
# What belongs to a weight in 4 bits besides its codes.
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
# Formats that are not read, by the end of a tensor's name.
REFUSED = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".SCB": "bitsandbytes in 8 bits",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8",
    ".weight_scale_inv": "FP8",
    "_blocks": "MXFP4",
}
# Dtypes of such formats, by the start of their names in files, NumPy and PyTorch.
NARROW = ("F8", "F6", "F4", "FLOAT8_", "FLOAT6_", "FLOAT4_")


def logical_tensors(tensors: Iterable[CheckpointTensor]) -> list[CheckpointTensor]:
    """Returns the tensors with each 4-bit weight of bitsandbytes as one.

    Raises:
      ValueError: If some are stored in a format that is not supported.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    for name, tensor in by_name.items():
        _check_format(name, tensor)
    states = {name.rpartition(STATE)[0]: name for name in by_name if STATE in name}
    merged = dict(by_name)
    for weight, state in states.items():
        for part in (weight, state, *(weight + part for part in PARTS)):
            merged.pop(part, None)
        merged[weight] = _bitsandbytes(weight, state, by_name)
    return [*merged.values()]


def dequantized(blocks: Blocks, form: BlockFormat) -> np.ndarray:
    """Returns the floats of blocks, as `dequantize` computes them."""
    dtype, *casts = map(np.dtype, form.dtypes)
    values = blocks.values
    if form.name in CODEBOOKS:
        values = np.array(CODEBOOKS[form.name], np.float32)[values.astype(np.intp) + 8]
    *rows, n = blocks.values.shape
    x = values.astype(dtype).reshape(*rows, n // form.size, form.size)
    x = x * blocks.scale.astype(dtype)[..., None]
    return functools.reduce(np.ndarray.astype, casts, x.reshape(blocks.values.shape))


def _check_format(name: str, tensor: CheckpointTensor) -> None:
    found = next((REFUSED[end] for end in REFUSED if name.endswith(end)), None)
    if found is None and tensor.dtype.upper().startswith(NARROW):
        found = tensor.dtype
    if found is not None:
        raise ValueError(
            f"The checkpoint stores {name!r} in {found}, which is not supported. Pass "
            "the checkpoint that it was quantized from, with how='nf4' or how='int8' "
            "to quantize it here; or in PyTorch write "
            "model.dequantize().save_pretrained(folder)."
        )


class _State(NamedTuple):
    """The tensors of a 4-bit weight, and what describes them."""

    name: str
    parts: dict[str, CheckpointTensor]
    shape: tuple[int, int]
    nested: Mapping[str, Any]  # empty, unless the scales are quantized too


def _bitsandbytes(
    name: str, state: str, tensors: Mapping[str, CheckpointTensor]
) -> CheckpointTensor:
    kind = state.rpartition(STATE)[2]
    where = f"The 4-bit weight {name!r} of bitsandbytes"
    if kind != "nf4":
        raise ValueError(f"{where} is {kind}, and only nf4 is supported.")
    wanted = ["", ".absmax", ".quant_map"]
    try:
        about = json.loads(tensors[state].read(()).tobytes())
        wanted += [".nested_absmax", ".nested_quant_map"] * ("nested_offset" in about)
        parts = {part: tensors[name + part] for part in wanted}
        shape, size, dtype = tuple(about["shape"]), about["blocksize"], about["dtype"]
        rows, columns = map(int, shape)
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{where} is incomplete: {error!r}. Download the complete checkpoint."
        ) from error
    if columns % size:
        raise ValueError(
            f"{where}, of shape {shape}, has blocks of {size} elements that begin in "
            "one row and end in the next, which is not supported. Pass the checkpoint "
            "that it was quantized from."
        )
    codes = parts[""].shape
    if codes != (rows * columns // 2, 1):
        raise ValueError(f"{where}, of shape {shape}, has codes of shape {codes}.")
    nested = about if "nested_offset" in about else {}
    found = _State(name, parts, (rows, columns), nested)
    # bitsandbytes multiplies in float32, and casts the product.
    dtypes = tuple(dict.fromkeys(("float32", dtype)))
    form = BlockFormat("nf4", size, "float32", dtypes)
    blocks = functools.partial(_read_blocks, found, size)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        rows, *columns = index or (slice(None),)
        return dequantized(blocks(rows), form)[(slice(None), *columns)]

    file = parts[""].file
    return CheckpointTensor(name, found.shape, dtype, read, file, form, blocks)


def _read_blocks(state: _State, size: int, rows: slice = slice(None)) -> Blocks:
    """Returns the blocks of some rows."""
    read = lambda part, index=(): state.parts[part].read(index)
    codes = np.asarray(CODEBOOKS["nf4"], np.float32)
    if not np.allclose(read(".quant_map"), codes, atol=1e-6):
        raise ValueError(
            f"{state.name!r} has other values than those of NF4 in its quant_map."
        )
    n, columns = state.shape
    low, high, _ = rows.indices(n)
    # The codes and the scales are flat; codes are (bytes, 1).
    packed = read("", (slice(low * columns // 2, high * columns // 2),)).reshape(-1)
    pairs = np.empty((packed.size, 2), np.int8)
    pairs[:, 0], pairs[:, 1] = packed >> 4, packed & 15
    pairs -= 8
    first, last = low * columns // size, high * columns // size
    scale = read(".absmax", (slice(first, last),))
    if state.nested:
        nested = read(".nested_quant_map").astype(np.float32)
        of_block = np.arange(first, last) // state.nested["nested_blocksize"]
        scale = nested[scale] * read(".nested_absmax").astype(np.float32)[of_block]
        scale += np.float32(state.nested["nested_offset"])
    return Blocks(
        pairs.reshape(high - low, columns),
        scale.astype(np.float32).reshape(high - low, columns // size),
    )
