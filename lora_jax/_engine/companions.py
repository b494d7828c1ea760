"""What accompanies an array through its views: one rule per view.

A companion of an array has the array's dimensions, each of the same size n, of size 1
(one element for all n), or of size n / block (one element per block). Companions are
the low-rank factors of a weight, its scale, the gain of DoRA, and the block scales of a
quantized array. Dimensions beyond the array's, such as the rank, stay last.

A rule gives the companion of a view: `rule(c, old, new, *operands, **params)` returns a
companion per result of the equation, or None if there is none of these sizes.

  c         the companion
  old, new  the shape of the array, and those of the equation's results
  operands  what the equation takes besides the array, as the starts of `dynamic_slice`
  params    the parameters of the equation

To add a view, add its rule here, to `RULES`. If it moves dimensions, add it to
`origins`; if it changes their sizes in place, to `IN_PLACE`; and if it never returns
None for sizes 1 and n, to `ALWAYS` in views.py.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._engine.shapes import segments

Shape = tuple[int, ...]
LEAST = 8  # a view never divides blocks into smaller ones than this


def copy(c: jax.Array, old: Shape, new: Sequence[Shape], **_: Any) -> list[jax.Array]:
    return [c]


def transpose(
    c: jax.Array, old: Shape, new: Sequence[Shape], *, permutation: Sequence[int]
) -> list[jax.Array]:
    return [lax.transpose(c, (*permutation, *range(len(old), c.ndim)))]


def reshape(
    c: jax.Array,
    old: Shape,
    new: Sequence[Shape],
    *,
    dimensions: Sequence[int] | None = None,
    **_: Any,
) -> list[jax.Array] | None:
    """`lax.reshape`, which can read the dimensions in another order."""
    if dimensions is not None:
        (c,) = transpose(c, old, new, permutation=dimensions)
        old = tuple(old[d] for d in dimensions)
    sizes: list[int] = []
    for olds, news in segments(old, new[0]):
        of_old, of_companion = ([shape[d] for d in olds] for shape in (old, c.shape))
        run = _reshaped(of_old, of_companion, [new[0][d] for d in news])
        if run is None:
            return None
        sizes += run
    return [jnp.reshape(c, (*sizes, *c.shape[len(old) :]))]


def _reshaped(old: list[int], companion: list[int], new: list[int]) -> list[int] | None:
    """The companion's sizes after dimensions of sizes `old` become those of `new`.

    In row-major order the blocks of these dimensions are runs of equal length only if
    all dimensions after the first divided one have size 1 in the companion.
    """
    pairs = zip(old, companion, strict=True)
    cut = next((i for i, (n, m) in enumerate(pairs) if n != m), len(old))
    if any(m != 1 for m in companion[cut + 1 :]):
        return None
    left = math.prod(old[cut:]) // math.prod(companion[cut:])  # elements in a run
    sizes = []
    for n in reversed(new):
        if left % n and n % left:
            return None
        sizes.append(max(n // left, 1))
        left = max(left // n, 1)
    return sizes[::-1] if left == 1 else None


def squeeze(
    c: jax.Array, old: Shape, new: Sequence[Shape], *, dimensions: Sequence[int]
) -> list[jax.Array]:
    return [lax.squeeze(c, dimensions)]


def broadcast_in_dim(
    c: jax.Array,
    old: Shape,
    new: Sequence[Shape],
    *dynamic_shape: Any,
    broadcast_dimensions: Sequence[int],
    **_: Any,
) -> list[jax.Array] | None:
    """Where the array repeats itself the companion has size 1."""
    if dynamic_shape:
        return None
    sizes = [1] * len(new[0])
    for d, m in zip(broadcast_dimensions, c.shape, strict=False):
        sizes[d] = m
    return [jnp.reshape(c, (*sizes, *c.shape[len(old) :]))]


def slice_(
    c: jax.Array,
    old: Shape,
    new: Sequence[Shape],
    *,
    start_indices: Sequence[int],
    limit_indices: Sequence[int],
    strides: Sequence[int] | None,
) -> list[jax.Array] | None:
    every = strides or (1,) * len(old)
    cuts = zip(start_indices, limit_indices, every, strict=True)
    for d, cut in enumerate(cuts):
        part = _sliced(c, d, old[d], *cut)
        if part is None:
            return None
        c = part
    return [c]


def _sliced(
    c: jax.Array, d: int, n: int, start: int, limit: int, stride: int = 1
) -> jax.Array | None:
    """A slice along one of the array's dimensions, of size n."""
    if c.shape[d] == 1 or (start, limit, stride) == (0, n, 1):
        return c  # the same array: pieces of a weight share a factor
    block = n // c.shape[d]
    if block > 1:
        common = math.gcd(block, start, limit)
        if stride > 1 or common < min(block, LEAST):
            return None
        c, block = jnp.repeat(c, block // common, d), common
    return lax.slice_in_dim(c, start // block, limit // block, stride, axis=d)


def split(
    c: jax.Array, old: Shape, new: Sequence[Shape], *, axis: int, sizes: Sequence[int]
) -> list[jax.Array] | None:
    parts, low = [], 0
    for n in sizes:
        part = _sliced(c, axis, old[axis], low, low + n)
        if part is None:
            return None
        parts.append(part)
        low += n
    return parts


def unstack(
    c: jax.Array, old: Shape, new: Sequence[Shape], *, axis: int
) -> list[jax.Array]:
    n, m = old[axis], c.shape[axis]
    return [lax.index_in_dim(c, i * m // n, axis, keepdims=False) for i in range(n)]


def rev(
    c: jax.Array, old: Shape, new: Sequence[Shape], *, dimensions: Sequence[int]
) -> list[jax.Array]:
    reversed_dims = [d for d in dimensions if c.shape[d] > 1]
    return [lax.rev(c, reversed_dims) if reversed_dims else c]


def tile(
    c: jax.Array, old: Shape, new: Sequence[Shape], *, reps: Sequence[int]
) -> list[jax.Array]:
    repeats = [n if c.shape[d] > 1 else 1 for d, n in enumerate(reps)]
    return [jnp.tile(c, repeats + [1] * (c.ndim - len(old)))]


def dynamic_slice(
    c: jax.Array,
    old: Shape,
    new: Sequence[Shape],
    *starts: jax.Array,
    slice_sizes: Sequence[int],
) -> list[jax.Array] | None:
    for d, (n, size) in enumerate(zip(old, slice_sizes, strict=True)):
        if size == n or c.shape[d] == 1:
            continue
        if c.shape[d] != n:
            return None  # where a block begins is known at run time only
        c = lax.dynamic_slice_in_dim(c, starts[d], size, axis=d)
    return [c]


def gather(
    c: jax.Array,
    old: Shape,
    new: Sequence[Shape],
    indices: jax.Array,
    *,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    **params: Any,
) -> list[jax.Array] | None:
    """`lax.gather`, by the indices into the dimensions that the companion has."""
    dnums, extra = dimension_numbers, c.shape[len(old) :]
    pairs = (dnums.operand_batching_dims, dnums.start_indices_batching_dims)
    batching = dict(zip(*pairs, strict=True))
    gone = {*dnums.collapsed_slice_dims, *batching}
    dims = {d for d in range(len(old)) if c.shape[d] != 1}
    blocked = {d for d in dims if c.shape[d] != old[d]}
    if not blocked.isdisjoint((*dnums.start_index_map, *batching)):
        return None
    if any(slice_sizes[d] != old[d] for d in blocked):
        return None
    kept = [d for d in range(len(old)) if d in dims or d not in gone]
    place = {d: i for i, d in enumerate(kept)}
    c = jnp.squeeze(c, [d for d in range(len(old)) if d not in kept])
    size = lambda d: c.shape[place[d]] if d in blocked else slice_sizes[d]
    sizes = [size(d) if d in dims else 1 for d in kept]
    columns = [i for i, d in enumerate(dnums.start_index_map) if d in dims]
    if not columns and dims.isdisjoint(gone):
        window = lax.slice(c, [0] * c.ndim, (*sizes, *extra))
        shape = [1] * len(new[0])
        for d, n in zip(dnums.offset_dims, sizes, strict=True):
            shape[d] = n
        return [jnp.reshape(window, (*shape, *extra))]
    # Some columns of sorted or unique indices need be neither.
    every = len(columns) == indices.shape[-1]
    hints = {} if every else {"unique_indices": False, "indices_are_sorted": False}
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(*dnums.offset_dims, *range(len(new[0]), len(new[0]) + len(extra))),
        collapsed_slice_dims=tuple(
            place[d] for d in dnums.collapsed_slice_dims if d in dims
        ),
        start_index_map=tuple(place[dnums.start_index_map[i]] for i in columns),
        operand_batching_dims=tuple(place[d] for d in batching if d in dims),
        start_indices_batching_dims=tuple(i for d, i in batching.items() if d in dims),
    )
    indices = indices if every else indices[..., np.array(columns, int)]
    options: dict[str, Any] = params | hints
    return [lax.gather(c, indices, numbers, (*sizes, *extra), **options)]


CompanionRule = Callable[..., list[jax.Array] | None]

RULES: dict[str, CompanionRule] = {
    "copy": copy,
    "transpose": transpose,
    "reshape": reshape,
    "squeeze": squeeze,
    "broadcast_in_dim": broadcast_in_dim,
    "slice": slice_,
    "split": split,
    "unstack": unstack,
    "rev": rev,
    "tile": tile,
    "dynamic_slice": dynamic_slice,
    "gather": gather,
}

# Primitives that shorten, lengthen or reverse dimensions, and move none.
IN_PLACE = {"slice", "dynamic_slice", "split", "pad", "concatenate", "tile", "rev"}


def origins(
    name: str, params: Any, old: Shape, new: Shape
) -> list[tuple[int, ...]] | None:
    """The dimensions of an operand behind each dimension of a result.

    None if the equation is no view and no elementwise function of the operand.
    """
    dims = [(d,) for d in range(len(old))]
    if name == "transpose":
        return [dims[d] for d in params["permutation"]]
    if name == "broadcast_in_dim":
        moved: list[tuple[int, ...]] = [()] * len(new)
        for i, d in enumerate(params["broadcast_dimensions"]):
            moved[d] = dims[i] if old[i] == new[d] else ()
        return moved
    if name in ("reshape", "squeeze"):
        order = params["dimensions"] if name == "reshape" else None
        order = range(len(old)) if order is None else order
        moved = [()] * len(new)
        for olds, news in segments(tuple(old[d] for d in order), new):
            for d in news:
                moved[d] = tuple(order[i] for i in olds)
        return moved
    if name == "stack":
        return [*dims[: params["axis"]], (), *dims[params["axis"] :]]
    if name == "unstack":
        return dims[: params["axis"]] + dims[params["axis"] + 1 :]
    if name == "gather":
        numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
        gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        window = [d for d in range(len(old)) if d not in gone]
        moved = [()] * len(new)
        for i, d in zip(numbers.offset_dims, window, strict=True):
            moved[i] = dims[d] if sizes[d] == old[d] else ()
        return moved
    if name.startswith("reduce_") and "axes" in params:
        return [x for d, x in enumerate(dims) if d not in params["axes"]]
    return dims if name in IN_PLACE or old == new else None


def sharding_of(shape: Sequence[int], sharding: Any) -> Any:
    """The array's sharding, for a companion of these sizes."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return sharding.update(spec=spec_of(shape, sharding.spec, sharding.mesh))


def spec_of(shape: Sequence[int], spec: PartitionSpec, mesh: Any) -> PartitionSpec:
    """The array's spec, for a companion of these sizes.

    The companion is replicated along a dimension that the mesh would cut within a
    block.
    """
    names = (*spec, *(None,) * (len(shape) - len(spec)))
    cut = lambda m, name: m > 1 and m % ways(name, mesh) == 0
    pairs = zip(shape, names, strict=True)
    return PartitionSpec(*(name if cut(m, name) else None for m, name in pairs))


def is_cut_within_blocks(shape: Sequence[int], spec: PartitionSpec, mesh: Any) -> bool:
    """Whether the parts of an array on a mesh would end within blocks."""
    pairs = zip(shape, spec, strict=False)
    return any(m > 1 and m % ways(name, mesh) != 0 for m, name in pairs)


def ways(name: Any, mesh: Any) -> int:
    """The number of parts into which an entry of a spec cuts a dimension."""
    if name is None or name is PartitionSpec.UNCONSTRAINED:
        return 1
    names = name if isinstance(name, tuple) else (name,)
    return math.prod(mesh.shape[n] for n in names)
