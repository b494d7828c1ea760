"""Finds and checks adapters in a tree, from names and shapes alone."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from lora_jax._layouts import find_foreign
from lora_jax._tree import (
    Path,
    check_restored,
    is_array,
    leaf_name,
    listed,
    path_name,
    quantized_leaves,
    unbox,
)

FACTORS = ("lora_a", "lora_b", "lora_scale")
MAGNITUDE = "lora_magnitude"
COPY = "lora_w"
FROZEN = "frozen"

# A dimension of a factor is a dimension of the weight, the rank, or of size 1.
RANK, ABSENT = -1, -2

Shape = tuple[int, ...]
T = TypeVar("T")
U = TypeVar("U")


class Axes(NamedTuple):
    """The dimensions of a weight: stacked layers or experts, inputs, outputs."""

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def standard(self) -> bool:
        """Whether the weight is stored in the order (batch, inputs, outputs)."""
        order = (*self.batch, *self.inputs, *self.outputs)
        return order == tuple(range(len(order)))


UNKNOWN = Axes((), (), ())


@dataclasses.dataclass(frozen=True)
class LowRank(Generic[T]):
    """The low-rank adapter of one weight: the paths, arrays or shapes of its leaves.

    Iterating yields the leaves that exist. Only DoRA has a magnitude.

    Attributes:
      a: The factor with the weight's inputs.
      b: The factor with its outputs.
      scale: What multiplies the product of the factors.
      magnitude: DoRA's norm of each output, or `None`.
      axes: The dimensions of the weight, which `find_adapters` infers from shapes.
        `UNKNOWN` in a record of paths that does not come from a tree.
      aligned: Whether both factors have every dimension of the weight, and the rank
        last: the layout for weights that are not stored as (batch, inputs, outputs).
      rank_scales: Whether the scale has the rank as its last dimension.
    """

    a: T
    b: T
    scale: T
    magnitude: T | None = None
    _: dataclasses.KW_ONLY
    axes: Axes = UNKNOWN
    aligned: bool = False
    rank_scales: bool = False

    def __iter__(self) -> Iterator[T]:
        yield from (self.a, self.b, self.scale)
        if self.magnitude is not None:
            yield self.magnitude

    def map(self, fn: Callable[[T], U]) -> "LowRank[U]":
        """Applies a function to each leaf, and keeps the axes."""
        return LowRank(*map(fn, self), **self.layout)

    @property
    def layout(self) -> dict[str, Any]:
        """What the shapes of the leaves say, by the names of the fields."""
        fields = "axes", "aligned", "rank_scales"
        return {name: getattr(self, name) for name in fields}

    @property
    def trained(self) -> tuple[T, ...]:
        """The leaves that are trained: all except the scale."""
        return self.a, self.b, *(() if self.magnitude is None else (self.magnitude,))


class FullCopy(NamedTuple):
    """The path of a leaf that is trained in the place of the leaf next to it."""

    w: Path

    @property
    def trained(self) -> tuple[Path, ...]:
        return (self.w,)


Adapters = dict[Path, LowRank[Path] | FullCopy]  # by the path of the adapted leaf


def adapter_of(weight: Path, *, magnitude: bool = False) -> LowRank[Path]:
    """Returns the paths of a weight's adapter, with DoRA's magnitude if asked."""
    names = (*FACTORS, MAGNITUDE) if magnitude else FACTORS
    return LowRank(*(_next_to(weight, name) for name in names))


def copy_of(leaf: Path) -> FullCopy:
    """Returns the path of a leaf's trained copy."""
    return FullCopy(_next_to(leaf, COPY))


def arrays_of(adapter: LowRank[Path], leaves: Mapping[Path, Any]) -> LowRank[Any]:
    """Returns the arrays of an adapter, out of their boxes."""
    return adapter.map(lambda path: unbox(leaves[path]))


def scale_of_ranks(adapter: LowRank[Any]) -> jax.Array:
    """Returns the scale of each rank, (batch..., r)."""
    if adapter.rank_scales:
        return adapter.scale
    scale, r = jnp.asarray(adapter.scale), adapter.a.shape[-1]
    return jnp.broadcast_to(scale[..., None], (*scale.shape, r))


def with_axes(adapter: LowRank[T], w: Shape, shapes: LowRank[Shape]) -> LowRank[T]:
    """Infers the axes of a weight of shape `w` from the shapes of its adapter."""
    axes = axes_of_shapes(w, *shapes)
    return dataclasses.replace(
        adapter,
        axes=axes,
        aligned=len(shapes.a) == len(w) + 1,
        rank_scales=len(shapes.scale) > len(axes.batch),
    )


def is_adapter(path: Path) -> bool:
    """Whether a leaf belongs to an adapter, or is a trained copy, by its name."""
    return _split_name(path[-1]) is not None


def label_of(path: Path) -> str:
    """Returns the kind of a trained leaf, such as "lora_a", or "frozen"."""
    _, part = _split_name(path[-1]) or ("", FROZEN)
    return FROZEN if part == FACTORS[2] else part


def find_adapters(leaves: Mapping[Path, Any], *, stacks: bool = False) -> Adapters:
    """Returns the adapter or the trained copy of each adapted leaf, with its axes.

    Args:
      leaves: The leaves of a tree.
      stacks: Whether stacks of several adapters, as from `stack`, are allowed.

    Raises:
      ValueError: If there is no adapter, a broken one, or one of another library.
    """
    check_own(leaves)
    found: Adapters = {}
    for path in filter(is_adapter, leaves):
        weight = _weight_of(path, leaves)
        dora = _next_to(weight, MAGNITUDE) in leaves
        factored, copied = adapter_of(weight, magnitude=dora), copy_of(weight)
        group = factored if path in factored else copied
        if path not in group:
            raise ValueError(
                f"{path_name(path)!r} is named like an adapter, but the adapter of "
                f"{path_name(weight)!r} has the leaves "
                f"{listed([*factored, *copied])}. Rename it, or remove it."
            )
        if found.setdefault(weight, group) != group:
            raise ValueError(
                f"{path_name(weight)!r} has both an adapter and a trained copy, "
                f"{path_name(copied.w)!r}, which would hide it. Remove one of them."
            )
    if not found:
        raise ValueError(
            "These parameters have no adapters. Write params = lorafy(params, rank), "
            "or LoRA(model, rank) for a live nnx.Module."
        )
    sizes = {weight: check_adapter(leaves, weight, x) for weight, x in found.items()}
    check_stack(sizes)
    n = next(iter(sizes.values()))
    if n is not None and not stacks:
        raise ValueError(
            f"These parameters have {n} adapters in a stack. Run them at once, "
            "jax.vmap(lora(fn), in_axes=(in_axes(params), ...)), or take one: "
            "take(params, 0)."
        )
    first = 0 if n is None else 1  # the dimension of a stack is none of the weight's
    for weight, adapter in found.items():
        if isinstance(adapter, LowRank):
            shapes = arrays_of(adapter, leaves).map(lambda x: x.shape[first:])
            found[weight] = with_axes(adapter, unbox(leaves[weight]).shape, shapes)
    return found


def check_own(leaves: Mapping[Path, Any]) -> None:
    """Checks that a tree has no adapters of another library or of a failed restore.

    Raises:
      ValueError: If a leaf is an adapter of another library or one of ours in a tree
        whose keys were joined, or if a box or a quantized weight came back from a
        checkpoint as a dict.
    """
    check_boxes(leaves)
    for library, (adapter, *_) in find_foreign(leaves).items():
        alpha = adapter.layout.alpha
        call = "adopt(params)" if alpha is None else "adopt(params, alpha=...)"
        hint = "" if alpha is None else f" with its {alpha}"
        raise ValueError(
            f"{path_name(adapter.a)!r} is an adapter of {library}. To make such "
            f"adapters ours, write {call}{hint}. To start from the base, remove them."
        )
    for path in leaves:
        if "lora" not in str(path[-1]):
            continue
        name = leaf_name(path)
        if name != path[-1] and name in (*FACTORS, MAGNITUDE, COPY):
            raise ValueError(
                f"{path_name(path)!r} is an adapter in a nested tree; in one dict with "
                "path-like keys it has another name. Nest the keys again, "
                "flax.traverse_util.unflatten_dict(params, sep='/')."
            )


def check_boxes(leaves: Mapping[Path, Any]) -> None:
    """Raises ValueError if boxes or quantized weights came back as dicts.

    That is what a checkpoint that is restored without a target contains.
    """
    check_restored(leaves)
    for path in leaves:
        if path[-1] == "value" and len(path) > 1 and _was_in_box(path, leaves):
            raise ValueError(
                f"{path_name(path[:-1])!r} is a dict of one 'value', as nnx.Param and "
                "nn.Partitioned come back from a checkpoint that is restored without a "
                "target. Restore it into a tree of the same structure, "
                "checkpointer.restore(path, target) in Orbax."
            )


def _was_in_box(path: Path, leaves: Mapping[Path, Any]) -> bool:
    """Whether `value` is the only leaf of a mapping that is named like a leaf."""
    parent = path[:-1]
    leaf = is_adapter(parent) or parent[-1] in ("kernel", "embedding", "bias")
    return leaf and not any(p[:-1] == parent and p != path for p in leaves)


def check_stack(sizes: Mapping[Path, int | None]) -> None:
    """Raises ValueError unless all leaves have the same number of adapters."""
    if len({*sizes.values()}) > 1:
        counts = listed([f"{path_name(path)}: {n or 1}" for path, n in sizes.items()])
        raise ValueError(
            f"The leaves have different numbers of adapters, {counts}. "
            "Stack whole trees: stack([one, two, ...])."
        )


def adapters_or_quantized(
    leaves: Mapping[Path, Any], *, stacks: bool = False
) -> Adapters:
    """Returns what `find_adapters` does, or `{}` for a quantized tree without any.

    Raises:
      ValueError: If there are neither adapters nor quantized weights, or broken ones.
    """
    if quantized_leaves(leaves) and not any(map(is_adapter, leaves)):
        return {}
    return find_adapters(leaves, stacks=stacks)


def of_rank(adapters: Adapters) -> dict[Path, LowRank[Path]]:
    """Returns the low-rank adapters, with and without magnitudes."""
    return {
        p: adapter for p, adapter in adapters.items() if isinstance(adapter, LowRank)
    }


def of_copies(adapters: Adapters) -> dict[Path, FullCopy]:
    """Returns the trained copies."""
    return {
        p: adapter for p, adapter in adapters.items() if isinstance(adapter, FullCopy)
    }


def without_adapters(leaves: Mapping[Path, Any], adapters: Adapters) -> dict[Path, Any]:
    """Returns the leaves of the plain tree: all except those of the adapters."""
    gone = {part for adapter in adapters.values() for part in adapter}
    return {path: leaf for path, leaf in leaves.items() if path not in gone}


def check_adapter(
    leaves: Mapping[Path, Any], weight: Path, adapter: LowRank[Path] | FullCopy
) -> int | None:
    """Checks an adapter, and returns the size of its stack, or `None` for a single one.

    Raises:
      ValueError: If a leaf is missing or does not fit the weight.
    """
    for path in (weight, *adapter):
        if not is_array(unbox(leaves.get(path))):
            raise ValueError(
                f"The adapter of {path_name(weight)!r} is broken: "
                f"{path_name(path)!r} is missing, or no array. Pass the whole tree, or "
                "combine(adapters, base) if it was split."
            )
    w, *shapes = (unbox(leaves[path]).shape for path in (weight, *adapter))
    is_fit = fits if isinstance(adapter, LowRank) else lambda w, copy: w == copy
    first = {shape[:1] for shape in shapes}
    n, one = None, (shape[1:] for shape in shapes)
    if len(first) == 1 and not is_fit(w, *shapes) and is_fit(w, *one):
        ((n,),) = first
    if isinstance(adapter, FullCopy):
        check_copy(path_name(adapter.w), leaves[adapter.w], leaves[weight], stacks=n)
    elif n is None and not fits(w, *shapes):
        a, b, scale, *magnitude = shapes
        more = f", with {MAGNITUDE} {magnitude[0]}," if magnitude else ""
        raise ValueError(
            f"The adapter of {path_name(weight)!r} does not fit: lora_a {a}, lora_b "
            f"{b} and lora_scale {scale}{more} make no update of a weight {w}. Build "
            "the adapter with lorafy on these very parameters."
        )
    return n


def check_copy(name: str, copy: Any, leaf: Any, *, stacks: int | None = None) -> None:
    """Raises ValueError unless a trained copy, or each of a stack, fits its leaf."""
    x, w = unbox(copy), unbox(leaf)
    floating = all(jnp.issubdtype(y.dtype, jnp.floating) for y in (x, w))
    shape = w.shape if stacks is None else (stacks, *w.shape)
    if x.shape != shape or not floating:
        raise ValueError(
            f"{name!r}, {x.dtype} {x.shape}, is no trained copy of its leaf, "
            f"{w.dtype} {w.shape}: both must be floating and have the same shape. "
            "Write lorafy(..., also=...) on these very parameters."
        )


def fits(w: Shape, *shapes: Shape) -> bool:
    """Whether leaves of these shapes make an adapter of a weight of shape `w`."""
    adapter = LowRank(*shapes)
    n = len(w) + 1
    if not adapter.a or not adapter.b or (len(adapter.a) == n) != (len(adapter.b) == n):
        return False
    adapter = with_axes(adapter, w, adapter)
    if not (adapter.aligned or (adapter.axes.inputs and adapter.axes.outputs)):
        return False
    sizes = dict(enumerate(w)) | {RANK: adapter.a[-1], ABSENT: 1}
    dims = factor_dims(w, **adapter.layout)
    pairs = zip(adapter, dims, strict=False)
    return all(shape == tuple(sizes[d] for d in found) for shape, found in pairs)


def axes_of_shapes(w: Shape, a: Shape, b: Shape, scale: Shape, *_: Shape) -> Axes:
    """Infers the dimensions of a weight from the shapes of factors that fit it."""
    dims = tuple(range(len(w)))
    if len(a) == len(w) + 1:
        batch: tuple[int, ...] = ()
        for d, (n, i, o) in enumerate(zip(w, a[:-1], b[:-1], strict=True)):
            # A single layer has size 1, like an input or output that a factor lacks.
            # The scale decides: it has a dimension for each of the batch.
            if n == i == o and scale[len(batch) :][:1] == (n,):
                batch += (d,)
        inputs = tuple(d for d in dims if d not in batch and w[d] == a[d])
        return Axes(batch, inputs, tuple(d for d in dims if d not in (*batch, *inputs)))
    n_batch = len(a) + len(b) - 2 - len(w)
    return Axes(dims[:n_batch], dims[n_batch : len(a) - 1], dims[len(a) - 1 :])


def factor_dims(
    shape: Shape, axes: Axes, *, aligned: bool, rank_scales: bool = False
) -> LowRank[Shape]:
    """Returns the weight's dimension for each dimension of an adapter's leaves."""
    batch, inputs, outputs = axes
    ranks = (RANK,) * rank_scales
    if not aligned:
        a, b = (*batch, *inputs, RANK), (*batch, RANK, *outputs)
        return LowRank(a, b, (*batch, *ranks), (*batch, *outputs))
    # A dimension of size 1 is in neither factor: shapes could not show in which.
    a, b = (
        [d if d in kept and n > 1 else ABSENT for d, n in enumerate(shape)]
        for kept in ((*batch, *inputs), (*batch, *outputs))
    )
    scale = (*(d if shape[d] > 1 else ABSENT for d in batch), *ranks)
    return LowRank((*a, RANK), (*b, RANK), scale, tuple(d for d in b if d != ABSENT))


def _next_to(weight: Path, part: str) -> Path:
    """Returns the path of a part of an adapter, in the mapping of its weight."""
    *parent, name = weight
    prefix = "" if name in ("kernel", "embedding") else f"{name}_"
    return (*parent, prefix + part)


def _split_name(name: Any) -> tuple[str, str] | None:
    """Splits "bias_lora_w" into "bias" and "lora_w"; `None` for other names."""
    if not isinstance(name, str) or "lora_" not in name:
        return None
    for part in (*FACTORS, MAGNITUDE, COPY):
        if name == part or name.endswith(f"_{part}"):
            return name[: -len(part) - 1], part
    return None


def _weight_of(path: Path, leaves: Mapping[Path, Any]) -> Path:
    *parent, name = path
    stem, _ = _split_name(name) or ("", "")
    names = [stem] if stem else ["kernel", "embedding"]
    weights = [(*parent, n) for n in names if (*parent, n) in leaves]
    if len(weights) != 1:
        raise ValueError(
            f"The adapter leaf {path_name(path)!r} belongs to no weight: found "
            f"{len(weights)} of {names} next to it, expected one. "
            "Remove the leaf, or restore its weight."
        )
    return weights[0]
