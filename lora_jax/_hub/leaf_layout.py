"""The layers of a leaf: which parts of which tensors they are, and how to join them.

A layer is the part of a leaf at one index of the stacked dimensions that its names
count; a leaf that is no stack is one layer. `read_plan` chooses the rows and columns to
read for some region of it, and `joined` makes that region of what was read. The latter
works on JAX's arrays, so that the device transposes, casts and quantizes.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from lora_jax._hub.module_kinds import (
    CONV1D,
    EMBEDDING,
    HEAD,
    LINEAR,
    Linear,
)
from lora_jax._hub.modules import MappedLeaf, ModuleSlice

Region = tuple[tuple[int, int], ...]  # (start, stop) along each dimension of a layer

# Kinds whose tensors are matrices, so that rows and columns can be read apart.
MATRICES = (LINEAR, CONV1D, EMBEDDING, HEAD)


class Layout(NamedTuple):
    """How tensors become a region of a layer; static under `jit`."""

    kinds: tuple[Linear, ...]  # of each tensor
    sizes: tuple[int, ...]  # of the dimensions, in the order batch, inputs, outputs
    n_batch: int
    n_inputs: int
    order: tuple[int, ...]  # the position there of each dimension of the layer
    cut: Region  # the region in what was read, which may be more


class Read(NamedTuple):
    """A part of a tensor of one module."""

    module: str
    bounds: Region  # of rows and columns; all of the tensor if it is empty

    @property
    def part(self) -> tuple[slice, ...]:
        return tuple(slice(*each) for each in self.bounds)


def layer_dims(leaf: MappedLeaf, stacked: int) -> tuple[int, ...]:
    """Returns the dimensions of a layer, in the order of the leaf."""
    counted = {*leaf.axes.batch[:stacked]}
    return tuple(d for d in range(len(leaf.shape)) if d not in counted)


def layers_of(leaf: MappedLeaf) -> dict[tuple[int, ...], MappedLeaf]:
    """Returns the leaf with the modules of one layer only, for each layer in order."""
    modules: dict[tuple[int, ...], dict[str, ModuleSlice]] = {}
    for name, part in leaf.modules.items():
        modules.setdefault(part.stack_index, {})[name] = part
    return {at: leaf._replace(modules=modules[at]) for at in sorted(modules)}


def read_plan(
    leaf: MappedLeaf, stacked: int, region: Region
) -> tuple[list[Read], Layout]:
    """Returns what to read for a region of a layer, and how to join it.

    Several inputs of the leaf are one dimension of the tensor, and so are several
    outputs. A cut of the first of them is a range there; another cut is made after
    reading.

    Args:
      leaf: The leaf, with the modules of this layer only.
      stacked: How many dimensions the names of its modules count.
      region: The region of the layer.
    """
    batch, inputs, outputs = leaf.axes.batch[stacked:], *leaf.axes[1:]
    dims = layer_dims(leaf, stacked)
    bounds = dict(zip(dims, region, strict=True))
    modules = sorted(
        (
            (part.outputs.start or 0, name, part.kind)
            for name, part in leaf.modules.items()
        ),
        key=lambda module: module[0],
    )
    ends = [low for low, *_ in modules[1:]] + [leaf.matrix[2]]
    by_range = not batch and all(kind in MATRICES for *_, kind in modules)
    rows, read_in = _range(leaf, inputs, bounds, by_range)
    columns, read_out = _range(leaf, outputs, bounds, by_range)
    reads, kinds = [], []
    for (low, name, kind), end in zip(modules, ends, strict=True):
        start, stop = max(low, columns.start), min(end, columns.stop)
        if start >= stop:
            continue
        each: Region = ()
        if by_range:
            each = (rows.start, rows.stop), (start - low, stop - low)
            each = each[::-1] if kind.inputs_last else each
        reads.append(Read(name, each))
        kinds.append(kind)
    read = {d: (0, leaf.shape[d]) for d in batch} | read_in | read_out
    order = (*batch, *inputs, *outputs)
    cut = tuple((bounds[d][0] - read[d][0], bounds[d][1] - read[d][0]) for d in dims)
    sizes = tuple(read[d][1] - read[d][0] for d in order)
    positions = tuple(order.index(d) for d in dims)
    counts = len(batch), len(inputs)
    return reads, Layout(tuple(kinds), sizes, *counts, positions, cut)


def _range(
    leaf: MappedLeaf, dims: tuple[int, ...], bounds: dict[int, Any], by_range: bool
) -> tuple[slice, dict[int, tuple[int, int]]]:
    """Returns the range of the dimensions as one, and what it has of each."""
    read = {d: (0, leaf.shape[d]) for d in dims}
    if by_range and dims:
        read[dims[0]] = bounds[dims[0]]
    rest = math.prod(leaf.shape[d] for d in dims[1:])
    start, stop = read[dims[0]] if dims else (0, 1)
    return slice(start * rest, stop * rest), read


def joined(layout: Layout, tensors: Sequence[Any]) -> Any:
    """Returns the region of a layer whose modules have these tensors."""
    batch = layout.sizes[: layout.n_batch]
    n_in = math.prod(layout.sizes[layout.n_batch :][: layout.n_inputs])
    parts = [
        kind.weight_from_torch(x).reshape(*batch, n_in, -1)
        for kind, x in zip(layout.kinds, tensors, strict=True)
    ]
    x = parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)
    x = x.reshape(layout.sizes).transpose(layout.order)
    return x[tuple(slice(*bounds) for bounds in layout.cut)]


def block_counts(sizes: Sequence[int], block: int) -> tuple[int, ...] | None:
    """Returns the blocks along each dimension, of blocks along all of them as one.

    `None` if a block does not consist of entire rows of the inner dimensions, or of a
    part of one row.
    """
    counts = list(sizes)
    for d, n in reversed([*enumerate(sizes)]):
        if n % block == 0:
            counts[d] = n // block
            return tuple(counts)
        if block % n:
            return None
        counts[d], block = 1, block // n
    return None


def block_leaf(leaf: MappedLeaf, block: int) -> MappedLeaf | None:
    """Returns the leaf of the scales of a quantized leaf, or `None` if none has them.

    Args:
      leaf: The leaf, whose tensors have blocks along their last dimension.
      block: The elements of a block.
    """
    kinds = {part.kind for part in leaf.modules.values()}
    on_inputs = {kind.inputs_last for kind in kinds}
    if len(on_inputs) > 1 or not kinds <= {*MATRICES}:
        return None
    dims = leaf.axes.inputs if on_inputs.pop() else leaf.axes.outputs
    counts = block_counts(leaf.sizes(dims), block)
    if counts is None:
        return None
    shape = list(leaf.shape)
    for d, n in zip(dims, counts, strict=True):
        shape[d] = n
    modules = leaf.modules
    if dims == leaf.axes.outputs:
        split = lambda at: None if at is None else at // block
        modules = {
            name: part._replace(
                outputs=slice(split(part.outputs.start), split(part.outputs.stop))
            )
            for name, part in modules.items()
        }
    return leaf._replace(shape=tuple(shape), modules=modules)


def region_of(index: Sequence[slice], shape: Sequence[int]) -> Region:
    """Returns a sharding's index of an array as a region."""
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
