"""Adapters beside their weights in a tree: by names and shapes, without an array."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import jax.numpy as jnp

from lora_jax._tree import (
    Path,
    check_restored,
    components,
    is_array,
    leaf_name,
    listed,
    path_name,
    quantized_leaves,
    sibling,
    unbox,
)

FACTORS = ("lora_a", "lora_b", "lora_scale")
MAGNITUDE = "lora_magnitude"
COPY = "lora_w"
FROZEN = "frozen"

KERAS = re.compile(r"lora_(kernel|embeddings)_[ab]")


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
        """Whether the dimensions stand in the order (batch, inputs, outputs)."""
        order = (*self.batch, *self.inputs, *self.outputs)
        return order == tuple(range(len(order)))


UNKNOWN = Axes((), (), ())


@dataclasses.dataclass(frozen=True)
class LowRank(Generic[T]):
    """The low-rank adapter of one weight, as the paths, arrays or shapes of its leaves.

    Iterating yields the leaves that there are: only DoRA has a magnitude.

    Attributes:
      a: The factor with the weight's inputs.
      b: The factor with its outputs.
      scale: What multiplies the product of the factors.
      magnitude: The norms of the outputs in DoRA, or `None`.
      axes: The dimensions of the weight, which `find_adapters` reads from shapes.
        `UNKNOWN` in a record of paths that was not read from a tree.
      aligned: Whether both factors have every dimension of the weight, and the rank
        last: the layout for weights that are not stored as (batch, inputs, outputs).
    """

    a: T
    b: T
    scale: T
    magnitude: T | None = None
    _: dataclasses.KW_ONLY
    axes: Axes = UNKNOWN
    aligned: bool = False

    def __iter__(self) -> Iterator[T]:
        yield from (self.a, self.b, self.scale)
        if self.magnitude is not None:
            yield self.magnitude

    def map(self, fn: Callable[[T], U]) -> "LowRank[U]":
        """Applies a function to each leaf; the axes stay."""
        return LowRank(*map(fn, self), axes=self.axes, aligned=self.aligned)

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
    """The paths next to a weight where its adapter is, in DoRA with a magnitude."""
    names = (*FACTORS, MAGNITUDE) if magnitude else FACTORS
    return LowRank(*(_beside(weight, name) for name in names))


def copy_of(leaf: Path) -> FullCopy:
    """The path next to a leaf where its trained copy is."""
    return FullCopy(_beside(leaf, COPY))


def arrays_of(own: LowRank[Path], leaves: dict[Path, Any]) -> LowRank[Any]:
    """The arrays of an adapter, out of their boxes."""
    return own.map(lambda path: unbox(leaves[path]))


def with_axes(own: LowRank[T], w: Shape, shapes: LowRank[Shape]) -> LowRank[T]:
    """The record with the axes of a weight of shape `w`, which its shapes fit."""
    aligned = len(shapes.a) == len(w) + 1
    return dataclasses.replace(own, axes=axes_of_shapes(w, *shapes), aligned=aligned)


def is_adapter(path: Path) -> bool:
    return _stem(path[-1]) is not None


def label_of(path: Path) -> str:
    """The part of an adapter that a leaf is and trains as, or "frozen"."""
    for part in (*FACTORS[:2], MAGNITUDE, COPY):
        if path[-1] == part or str(path[-1]).endswith(f"_{part}"):
            return part
    return FROZEN


def find_adapters(leaves: dict[Path, Any], *, stacks: bool = False) -> Adapters:
    """Every adapted leaf and what adapts it, checked from names and shapes alone.

    Args:
      leaves: Of a tree.
      stacks: Whether each may be several in a stack, as `stack` makes them.

    Raises:
      ValueError: If there is no adapter, a broken one, or one of another library.
    """
    check_own(leaves)
    found: Adapters = {}
    for path in leaves:
        if is_adapter(path):
            weight = _weight_of(path, leaves)
            dora = _beside(weight, MAGNITUDE) in leaves
            factored, copied = adapter_of(weight, magnitude=dora), copy_of(weight)
            own = factored if path in factored else copied
            if path not in own:
                raise ValueError(
                    f"The adapter leaf {path_name(path)!r} has no name of ours: those "
                    f"of {path_name(weight)!r} are {listed([*factored, *copied])}. "
                    "Rename it, or remove it."
                )
            if found.setdefault(weight, own) != own:
                raise ValueError(
                    f"{path_name(weight)!r} has both an adapter and a trained copy, "
                    f"{path_name(copied.w)!r}, which would hide it. Remove one of them."
                )
    if not found:
        raise ValueError(
            "These parameters have no adapters. Write params = lorafy(params, rank), "
            "or LoRA(model, rank) for a live nnx.Module."
        )
    sizes = {
        weight: check_adapter(leaves, weight, own) for weight, own in found.items()
    }
    check_stack(sizes)
    if not stacks and (n := next(iter(sizes.values()))) is not None:
        raise ValueError(
            f"These parameters have {n} adapters in a stack. Run them at once, "
            "jax.vmap(lora(fn), in_axes=(in_axes(params), ...)), or take one: "
            "take(params, 0)."
        )
    for weight, own in found.items():
        if isinstance(own, LowRank):
            first = 0 if sizes[weight] is None else 1  # of a stack, that of one
            shapes = arrays_of(own, leaves).map(lambda x, first=first: x.shape[first:])
            found[weight] = with_axes(own, unbox(leaves[weight]).shape, shapes)
    return found


def check_own(leaves: dict[Path, Any]) -> None:
    """Checks that a tree holds no adapters that another library, or a restore, left.

    Raises:
      ValueError: If a leaf is an adapter of another library or one of ours in a tree
        whose keys were joined, or if a box or a quantized weight came back from a
        checkpoint as a dict.
    """
    check_restored(leaves)
    for path in leaves:
        named = "lora" in path_name(path[-2:])
        if named and (library := _library_of(path, leaves)):
            raise ValueError(
                f"{path_name(path)!r} is an adapter of {library}, which lora_jax does "
                "not read. Before lorafy(params, rank), remove such leaves to start "
                "from the base, or merge them first: add A @ B, times the scale they "
                "were trained with, to each weight."
            )
        name = leaf_name(path)
        if named and name != path[-1] and name in (*FACTORS, MAGNITUDE, COPY):
            raise ValueError(
                f"{path_name(path)!r} is an adapter in a nested tree; in one dict with "
                "path-like keys it has another name. Nest the keys again, "
                "flax.traverse_util.unflatten_dict(params, sep='/')."
            )
        if path[-1] == "value" and len(path) > 1 and _was_in_box(path, leaves):
            raise ValueError(
                f"{path_name(path[:-1])!r} is a dict of one 'value', as nnx.Param and "
                "nn.Partitioned come back from a checkpoint that is restored without a "
                "target. Restore it into a tree of the same structure, "
                "checkpointer.restore(path, target) in Orbax."
            )


def _library_of(path: Path, leaves: dict[Path, Any]) -> str | None:
    """The library whose adapter a leaf is, if it is no adapter of ours."""
    *parent, name = path
    beside = lambda *names: all((*parent, n) in leaves for n in names)
    if KERAS.fullmatch(leaf_name(path)):
        return "Keras (enable_lora)"
    if components(path)[-2:] == ("lora", "a") and sibling(path, "b") in leaves:
        return "gemma.peft"
    if name in ("kernel_lora_a", "embedding_lora_a") and beside(f"{name[:-1]}b"):
        return "qwix, as tunix and MaxText use it"
    if name != "lora_a" or not beside("lora_b") or beside("lora_scale"):
        return None
    if beside("kernel") or beside("embedding"):
        return None
    base = (*parent, "base_module")
    module = str(parent[-1]).lower() if parent else ""
    if "lora" in module or any(p[: len(base)] == base for p in leaves):
        return "flax.nnx (nnx.LoRA, nnx.LoRALinear)"
    return "openpi" if beside("w") else None


def _was_in_box(path: Path, leaves: dict[Path, Any]) -> bool:
    """Whether a leaf named `value` is all that a mapping named like a leaf holds."""
    parent = path[:-1]
    leaf = is_adapter(parent) or parent[-1] in ("kernel", "embedding", "bias")
    return leaf and not any(p[:-1] == parent and p != path for p in leaves)


def check_stack(sizes: dict[Path, int | None]) -> None:
    """Raises unless there are as many adapters of one leaf as of another."""
    if len({*sizes.values()}) > 1:
        told = listed([f"{path_name(path)}: {n or 1}" for path, n in sizes.items()])
        raise ValueError(
            f"The adapters are no stack: there are not as many of each, {told}. "
            "Stack whole trees: stack([one, two, ...])."
        )


def adapters_if_any(leaves: dict[Path, Any], *, stacks: bool = False) -> Adapters:
    """Those of `find_adapters`; none where there are weights in few bits instead.

    Raises:
      ValueError: If there are neither, or one of either is broken.
    """
    if quantized_leaves(leaves) and not any(map(is_adapter, leaves)):
        return {}
    return find_adapters(leaves, stacks=stacks)


def of_rank(adapters: Adapters) -> dict[Path, LowRank[Path]]:
    """Those that are low-rank updates, with magnitudes or without."""
    return {p: own for p, own in adapters.items() if isinstance(own, LowRank)}


def of_copies(adapters: Adapters) -> dict[Path, FullCopy]:
    """Those that are trained copies."""
    return {p: own for p, own in adapters.items() if isinstance(own, FullCopy)}


def without_adapters(leaves: dict[Path, Any], adapters: Adapters) -> dict[Path, Any]:
    """The plain tree's leaves: all but those that `find_adapters` found."""
    gone = {part for adapter in adapters.values() for part in adapter}
    return {path: leaf for path, leaf in leaves.items() if path not in gone}


def check_adapter(
    leaves: dict[Path, Any], weight: Path, adapter: LowRank[Path] | FullCopy
) -> int | None:
    """Raises if an adapter is broken; gives how many there are in a stack, if it is."""
    for path in (weight, *adapter):
        if not is_array(unbox(leaves.get(path))):
            no_scale = path == adapter_of(weight).scale
            others = " qwix, tunix and openpi store no scale: merge or remove theirs."
            raise ValueError(
                f"The adapter of {path_name(weight)!r} is broken: "
                f"{path_name(path)!r} is missing, or no array. Pass the whole tree, or "
                "combine(adapters, base) if it was split." + others * no_scale
            )
    shapes = [unbox(leaves[path]).shape for path in (weight, *adapter)]
    fit = fits if isinstance(adapter, LowRank) else lambda w, copy: w == copy
    own = [shape[1:] for shape in shapes[1:]]
    first = {shape[:1] for shape in shapes[1:]}
    n = None
    if len(first) == 1 and not fit(*shapes) and fit(shapes[0], *own):
        ((n,),) = first
    if isinstance(adapter, FullCopy):
        check_copy(path_name(adapter.w), leaves[adapter.w], leaves[weight], stacks=n)
    elif n is None and not fits(*shapes):
        w, a, b, scale, *magnitude = shapes
        more = f", with {MAGNITUDE} {magnitude[0]}," if magnitude else ""
        raise ValueError(
            f"The adapter of {path_name(weight)!r} does not fit: lora_a {a}, lora_b "
            f"{b} and lora_scale {scale}{more} make no update of a weight {w}. Build "
            "the adapter with lorafy on these very parameters."
        )
    return n


def check_copy(name: str, copy: Any, leaf: Any, *, stacks: int | None = None) -> None:
    """A trained copy, or each of several, is floating and has the shape of its leaf."""
    x, w = unbox(copy), unbox(leaf)
    floating = all(jnp.issubdtype(y.dtype, jnp.floating) for y in (x, w))
    shape = w.shape if stacks is None else (stacks, *w.shape)
    if x.shape != shape or not floating:
        raise ValueError(
            f"{name!r}, {x.dtype} {x.shape}, is no trained copy of its leaf, "
            f"{w.dtype} {w.shape}: both are floating, of one shape. Write "
            "lorafy(..., also=...) on these very parameters."
        )


def fits(
    w: tuple, a: tuple, b: tuple, scale: tuple, magnitude: tuple | None = None
) -> bool:
    """Whether factors of these shapes update a weight of shape `w`, in some layout."""
    if not a or not b:
        return False
    if magnitude is not None:
        return fits(w, a, b, scale) and magnitude == _magnitude_shape(w, a, b)
    if len(a) == len(b) == len(w) + 1:  # aligned
        pairs = list(zip(w, a[:-1], b[:-1], strict=True))
        batch = [n for n, i, o in pairs if i == o == n and n != 1]
        whole = all(n in (i, o) and {i, o} <= {1, n} for n, i, o in pairs)
        return whole and a[-1] == b[-1] and [n for n in scale if n != 1] == batch
    batch = len(a) + len(b) - 2 - len(w)
    inputs, outputs = len(a) - 1 - batch, len(b) - 1 - batch
    if min(batch, inputs - 1, outputs - 1) < 0:
        return False
    split = batch + inputs
    return (
        a[:-1] == w[:split]
        and b[:batch] == scale == w[:batch]
        and b[batch + 1 :] == w[split:]
        and a[-1] == b[batch]
    )


def _magnitude_shape(w: tuple, a: tuple, b: tuple) -> tuple:
    if len(a) == len(w) + 1:
        return tuple(n for n, o in zip(w, b[:-1], strict=True) if n == o != 1)
    batch = len(a) + len(b) - 2 - len(w)
    return (*b[:batch], *b[batch + 1 :])


def axes_of_shapes(w: tuple, a: tuple, b: tuple, scale: tuple, *_: tuple) -> Axes:
    """The dimensions that factors of fitting shapes say a weight has."""
    if len(a) == len(w) + 1:
        batch: tuple[int, ...] = ()
        for d, (n, i, o) in enumerate(zip(w, a[:-1], b[:-1], strict=True)):
            # One layer looks like one input or output, but that a scale counts it.
            if n == i == o and scale[len(batch) :][:1] == (n,):
                batch += (d,)
        inputs = tuple(d for d, n in enumerate(w) if d not in batch and n == a[d])
        outputs = tuple(d for d in range(len(w)) if d not in (*batch, *inputs))
        return Axes(batch, inputs, outputs)
    batch = len(a) + len(b) - 2 - len(w)
    dims = tuple(range(len(w)))
    return Axes(dims[:batch], dims[batch : len(a) - 1], dims[len(a) - 1 :])


def _beside(weight: Path, part: str) -> Path:
    *parent, name = weight
    prefix = "" if name in ("kernel", "embedding") else f"{name}_"
    return (*parent, prefix + part)


def _stem(name: Any) -> str | None:
    """What stands before `lora_a`, `lora_b`, ... in a leaf's name."""
    for part in (*FACTORS, MAGNITUDE, COPY):
        if name == part:
            return ""
        if isinstance(name, str) and name.endswith(f"_{part}"):
            return name.removesuffix(f"_{part}")
    return None


def _weight_of(path: Path, leaves: dict[Path, Any]) -> Path:
    *parent, name = path
    stem = _stem(name)
    names = [stem] if stem else ["kernel", "embedding"]
    weights = [(*parent, n) for n in names if (*parent, n) in leaves]
    if len(weights) != 1:
        raise ValueError(
            f"The adapter leaf {path_name(path)!r} belongs to no weight: found "
            f"{len(weights)} of {names} beside it, needed one. "
            "Remove the leaf, or restore its weight."
        )
    return weights[0]
