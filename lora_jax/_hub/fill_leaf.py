"""One leaf, filled from the tensors of a checkpoint: layer by layer, on its devices.

For each layer every device gets the region that it holds: the parts of the tensors are
read, sent to it, and transposed, cast and quantized there by one compiled function. Its
part of the leaf is updated in place, so that there is never a second copy of a stack.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._engine.quantized import Quantized, is_quantized, quantize_array
from lora_jax._hub.checkpoint import CHUNK, BlockFormat, CheckpointTensor
from lora_jax._hub.leaf_layout import (
    Layout,
    Region,
    block_leaf,
    joined,
    layer_dims,
    layers_of,
    read_plan,
    region_of,
)
from lora_jax._hub.module_kinds import HEAD
from lora_jax._hub.modules import MappedLeaf
from lora_jax._hub.tensor_sources import Source
from lora_jax._tree import path_name


class Filling(NamedTuple):
    """How a leaf is filled.

    Attributes:
      leaf: The leaf, with the modules that it is read from.
      stacked: How many dimensions the names of its modules count.
      tensors: The tensor of each module.
      form: The format of the blocks that all tensors are stored in, or `None`.
      equal: Pairs of tensors that must be equal, as a table and its tied head.
    """

    leaf: MappedLeaf
    stacked: int
    tensors: dict[str, CheckpointTensor]
    form: BlockFormat | None
    equal: tuple[tuple[CheckpointTensor, CheckpointTensor], ...]


def as_filling(source: Source) -> Filling:
    """Returns how a leaf is filled from its tensors.

    A tied table and its head are read from one of them: checkpoints store the table, or
    both, or (rarely) the head.
    """
    leaf, tensors = source.leaf, source.tensors
    heads = [name for name, part in leaf.modules.items() if part.kind is HEAD]
    tables = [name for name in leaf.modules if name not in heads] if heads else []
    pairs = [*zip(tables, heads, strict=True)]
    left_out = {head if table in tensors else table for table, head in pairs}
    equal = tuple(
        (tensors[table], tensors[head])
        for table, head in pairs
        if table in tensors and head in tensors
    )
    modules = {
        name: part for name, part in leaf.modules.items() if name not in left_out
    }
    leaf = leaf._replace(modules=modules)
    # Unless all tensors have equal blocks, these are dequantized.
    formats = {tensors[name].format for name in modules}
    form = formats.pop() if len(formats) == 1 else None
    if form is not None and block_leaf(leaf, form.size) is None:
        form = None
    return Filling(leaf, source.stacked, tensors, form, equal)


def fill_leaf(filling: Filling, target: Any, tick: Callable[[], None]) -> Any:
    """Returns the value of a leaf.

    Args:
      filling: Its tensors, whose shapes fit.
      target: An abstract array or `Quantized`, with shardings or without.
      tick: Called for each tensor that was read.

    Raises:
      ValueError: If a value is not finite after the cast, or tied tensors differ.
    """
    for one, other in filling.equal:
        _check_equal(filling.leaf, one, other)
    filled = [
        _Filled(x, filling.leaf, filling.stacked) for x in jax.tree.leaves(target)
    ]
    fill = _floats if filling.form is None else _blocks
    finite: list[jax.Array] = []
    for at, leaf in layers_of(filling.leaf).items():
        finite += fill(filling._replace(leaf=leaf), target, filled, at)
        for array in filled:
            array.wait()  # or the tensors of all layers would be in memory at once
        for _ in leaf.modules:
            tick()
    if not all(map(bool, finite)):
        raise ValueError(
            f"{path_name(filling.leaf.path)!r} is not finite as {target.dtype}: its "
            "tensor is not, or has values that are too large. Write "
            "dtype=jnp.bfloat16, which has the range of float32, or correct the file."
        )
    arrays = [array.done() for array in filled]
    if not is_quantized(target):
        return arrays[0]
    values, scale = arrays
    return Quantized(values, scale, target.dtypes, target.format)


class _Filled:
    """An array that is filled layer by layer, with a part on each device."""

    def __init__(self, abstract: Any, leaf: MappedLeaf, stacked: int) -> None:
        self.abstract, self.sharding = abstract, abstract.sharding
        self.counted = leaf.axes.batch[:stacked]
        self.dims = layer_dims(leaf, stacked)
        whole = (slice(None),) * len(abstract.shape)
        places: Any = {None: whole}
        if self.sharding is not None:
            places = self.sharding.addressable_devices_indices_map(abstract.shape)
        self.bounds: dict[Any, Region] = {
            device: region_of(index, abstract.shape) for device, index in places.items()
        }
        self.parts: dict[Any, jax.Array] = {}

    def region(self, device: Any, layer: tuple[int, ...]) -> Region | None:
        """Returns what a device holds of a layer, or `None` if that is nothing."""
        bounds = self.bounds[device]
        for d, i in zip(self.counted, layer, strict=True):
            low, high = bounds[d]
            if not low <= i < high:
                return None
        return tuple(bounds[d] for d in self.dims)

    def write(self, device: Any, layer: tuple[int, ...], x: jax.Array) -> None:
        """Puts what a device holds of a layer in its place."""
        if not self.counted:
            self.parts[device] = x
            return
        bounds = self.bounds[device]
        if device not in self.parts:
            sizes = [high - low for low, high in bounds]
            self.parts[device] = jnp.zeros(sizes, self.abstract.dtype, device=device)
        starts = [0] * len(bounds)
        for d, i in zip(self.counted, layer, strict=True):
            starts[d] = i - bounds[d][0]
        self.parts[device] = _updated(self.parts[device], x, self.counted, starts)

    def wait(self) -> None:
        jax.block_until_ready([*self.parts.values()])

    def done(self) -> jax.Array:
        """Returns the array; a memory other than the devices' gets it only now."""
        if self.sharding is None:
            return self.parts[None]
        near = self.sharding.with_memory_kind(None)
        array = jax.make_array_from_single_device_arrays(
            self.abstract.shape, near, [self.parts[device] for device in self.bounds]
        )
        return array if near == self.sharding else jax.device_put(array, self.sharding)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _updated(x: jax.Array, part: jax.Array, dims: Any, starts: Any) -> jax.Array:
    return lax.dynamic_update_slice(x, jnp.expand_dims(part, sorted(dims)), starts)


def _floats(
    filling: Filling, target: Any, filled: Sequence[_Filled], layer: tuple[int, ...]
) -> list[jax.Array]:
    """Fills a layer, the only one that `filling` has, from plain tensors.

    Returns whether the values are finite, for each device.
    """
    leaf, stacked = filling.leaf, filling.stacked
    values, *scale = filled
    how = target.format if is_quantized(target) else None
    dtype = jnp.dtype(target.dtypes[0] if is_quantized(target) else target.dtype)
    counts = (scale or filled)[0].abstract.shape
    blocks = [leaf.shape[d] // counts[d] for d in values.dims]
    # Devices with the same region share what is read for it.
    read_once = functools.cache(lambda r: filling.tensors[r.module].read(r.part))
    finite = []
    for device in values.bounds:
        region = values.region(device, layer)
        if region is None:
            continue
        # A block has one scale, so all of it is read, even if other devices hold some.
        wide = tuple(
            (low // n * n, -(-high // n) * n)
            for (low, high), n in zip(region, blocks, strict=True)
        )
        reads, layout = read_plan(leaf, stacked, wide)
        tensors = [jax.device_put(read_once(read), device) for read in reads]
        cuts = [
            tuple(
                ((low - start) // n, -(-(high - start) // n))
                for (low, high), (start, _), n in zip(region, wide, unit, strict=True)
            )
            for unit in ([1] * len(blocks), blocks)
        ]
        sizes = tuple(
            (high - low) // n for (low, high), n in zip(wide, blocks, strict=True)
        )
        *arrays, ok = _made(tensors, layout, dtype, how, sizes, tuple(cuts))
        finite.append(ok)
        for array, x in zip(filled, arrays, strict=True):
            array.write(device, layer, x)
    return finite


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _made(
    tensors: Sequence[jax.Array],
    layout: Layout,
    dtype: Any,
    how: str | None,
    sizes: tuple[int, ...],
    cuts: tuple[Region, Region],
) -> list[jax.Array]:
    """Returns a region of a layer, quantized with scales of `sizes` if `how` is given.

    The last result is whether it is finite, where tensors that are finite may not be.
    """
    x = joined(layout, tensors)
    before, x = x.dtype, x.astype(dtype)
    cut = lambda x, bounds: x[tuple(slice(*b) for b in bounds)]
    if how is not None:
        q = quantize_array(x, how, sizes)
        pairs = zip((q.values, q.scale), cuts, strict=True)
        return [*(cut(x, bounds) for x, bounds in pairs), jnp.isfinite(q.scale).all()]
    ok = jnp.asarray(True)
    floats = all(jnp.issubdtype(x, jnp.floating) for x in (before, dtype))
    if floats and jnp.finfo(dtype).max < jnp.finfo(before).max:
        ok = jnp.isfinite(x).all()
    return [cut(x, cuts[0]), ok]


def _blocks(
    filling: Filling, target: Any, filled: Sequence[_Filled], layer: tuple[int, ...]
) -> list[jax.Array]:
    """Fills a layer as `_floats` does, from the blocks of tensors, without a change."""
    leaf, form = filling.leaf, filling.form
    assert form is not None
    read = {name: filling.tensors[name].blocks for name in leaf.modules}
    blocks = {name: get() for name, get in read.items() if get is not None}
    for i, array in enumerate(filled):
        part = block_leaf(leaf, form.size) if i else leaf
        assert part is not None
        for device in array.bounds:
            region = array.region(device, layer)
            if region is None:
                continue
            reads, layout = read_plan(part, filling.stacked, region)
            tensors = [
                jax.device_put(blocks[read.module][i][read.part], device)
                for read in reads
            ]
            x = _joined(tensors, layout, array.abstract.dtype)
            array.write(device, layer, x)
    return []


@functools.partial(jax.jit, static_argnums=(1, 2))
def _joined(tensors: Sequence[jax.Array], layout: Layout, dtype: Any) -> jax.Array:
    return joined(layout, tensors).astype(dtype)


def _check_equal(
    leaf: MappedLeaf, one: CheckpointTensor, other: CheckpointTensor
) -> None:
    """Checks that two tensors of one leaf are equal, some rows at a time."""
    step = max(1, CHUNK // max(1, int(np.prod(one.shape[1:]))))
    for low in range(0, one.shape[0], step):
        if not np.array_equal(one.rows(low, low + step), other.rows(low, low + step)):
            raise ValueError(
                f"{path_name(leaf.path)!r} is both {one.name!r} and {other.name!r}, "
                "and they differ: the checkpoint is not tied. Give the model a head "
                "of its own, or name only one of them."
            )
