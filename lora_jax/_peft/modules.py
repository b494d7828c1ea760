"""One weight's adapter as the adapters of PyTorch modules, and back: shapes, in NumPy.

A weight of ours can be many modules: a stack of layers, a fused query, key and value, a
table that is the head too. Each is a `Slot` of it. Between the two worlds an adapter is
a `Module`: plain factors, whatever order either side stores them in.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax._adapters import ABSENT, RANK, Axes, LowRank, factor_dims
from lora_jax._flax_names import axes_of, is_adaptable
from lora_jax._peft.names import Naming, numbered
from lora_jax._tree import Path, is_array, path_name, unbox


class Module(NamedTuple):
    """The adapter of one PyTorch module, whose update is scale * a @ b."""

    a: np.ndarray  # (in, r); of a convolution (window..., in, r), of experts with each
    b: np.ndarray  # (r, out); of experts (experts, r, out)
    scale: float
    magnitude: np.ndarray | None = None  # (out,): of DoRA


class Slot(NamedTuple):
    """The part of a weight that is one module."""

    kind: str  # linear, conv, embedding, head, experts
    index: tuple[int, ...]  # along the stacked dimensions that names count
    outputs: slice


class Weight(NamedTuple):
    """A weight of ours: how its dimensions are used, and which modules it is."""

    path: Path
    shape: tuple[int, ...]
    axes: Axes
    slots: dict[str, Slot]

    def sizes(self, dims: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[d] for d in dims)


def weight_of(
    path: Path, leaves: dict[Path, Any], naming: Naming, axes: Axes | None, kind: str
) -> Weight:
    """The modules of a weight, from names and shapes alone.

    Raises:
      ValueError: If the leaf cannot be adapted, its dimensions cannot be told, or they
        are not those that its name speaks of.
    """
    name, w = path_name(path), unbox(leaves[path])
    if not is_adaptable(path, leaves[path]):
        raise ValueError(
            f"{name!r} cannot have an adapter: a weight is floating, has 2 or more "
            "dimensions and is no norm or bias by its name."
        )
    if axes is None:
        axes = _axes_of_layer(path, leaves, naming.stacked)
    parts, batch = len(naming.templates), axes.batch
    if naming.stacked > len(batch):
        raise ValueError(
            f"The name {naming.templates[0]!r} counts {naming.stacked} stacked "
            f"dimensions, and {name!r}, of shape {w.shape}, has {len(batch)}. Take "
            "{layer} or {expert} out of it."
        )
    if len(batch) > naming.stacked + (kind == "experts"):
        raise ValueError(
            f"{name!r}, of shape {w.shape}, stacks more than the name "
            f"{naming.templates[0]!r} counts. Write {{layer}} or {{expert}} into it, "
            "where the number of each stands; or, where PyTorch has all experts in one "
            f"parameter of three dimensions, kinds={{{name!r}: 'experts'}}."
        )
    if kind == "experts" and (parts > 1 or len(batch) == naming.stacked):
        raise ValueError(
            f"{name!r}, of shape {w.shape}, is no parameter of experts: it needs one "
            "stacked dimension that its one name does not count."
        )
    n_out = math.prod(w.shape[d] for d in axes.outputs)
    if kind == "embedding" and not axes.standard:
        raise ValueError(
            f"{name!r} is named as a table, whose rows are looked up, and is used as a "
            f"matrix, by {axes}. Write kinds={{{name!r}: 'linear'}}."
        )
    tied = kind == "embedding" and parts == 2 and naming.sizes is None
    widths = naming.sizes or (n_out // parts,) * parts
    if kind == "embedding" and parts > 1 and not tied:
        raise ValueError(
            f"{name!r} is a table: it has one name, or two, (lookup, tied head). Found "
            f"{naming.templates}."
        )
    if not tied and sum(widths) != n_out:
        raise ValueError(
            f"{name!r} has {n_out} outputs, and the parts {naming.templates} have "
            f"{widths}. Write {{name: outputs, ...}} for parts of unequal size."
        )
    slots: dict[str, Slot] = {}
    counts = tuple(w.shape[d] for d in batch[: naming.stacked])
    for index, names in numbered(naming, counts):
        low = 0
        for i, (module, width) in enumerate(zip(names, widths, strict=True)):
            own = "head" if tied and i else kind
            outputs = slice(None) if tied else slice(low, low + width)
            if module in slots:
                raise ValueError(
                    f"{name!r} has the name {module!r} twice. Each module has its own."
                )
            slots[module] = Slot(own, index, outputs)
            low += width
    return Weight(path, w.shape, axes, slots)


def turned(path: Path, shape: tuple[int, ...], own: Axes, axes: Axes) -> bool:
    """Whether an adapter with its `own` axes has `lora_b` on the inputs.

    So it is where `lorafy` went by the order of dimensions and the function does not.

    Raises:
      ValueError: If its dimensions are neither those of `axes` nor the reverse.
    """
    wide = lambda dims: [d for d in dims if shape[d] > 1]
    found, wanted = (list(map(wide, axes)) for axes in (own, axes))
    if found == wanted:
        return False
    if found == [wanted[0], wanted[2], wanted[1]]:
        return True
    raise ValueError(
        f"The adapter of {path_name(path)!r} was made for {own}, and axes says {axes}. "
        "Build it with lorafy(..., axes=...) of this very function."
    )


def modules_of(
    weight: Weight, adapter: LowRank[np.ndarray], *, fold: bool
) -> dict[str, Module]:
    """The adapter of each of a weight's modules, from ours.

    A rank with which a module does nothing, and cannot learn to, is left out: one of a
    stack's padding, or one that only another module of a fused weight uses. So is a
    module to which no rank is left. `fold` multiplies the scale into b. With magnitudes
    all are kept: they change a module whose ranks do nothing.
    """
    m = _magnitudes(weight, adapter)
    a, b, scale = _matrices(weight, adapter)
    unused = not (a.any() or b.any()) or m is not None
    modules = {}
    for name, slot in weight.slots.items():
        x, whole, s = a[slot.index], b[slot.index], scale[slot.index]
        y = whole[..., slot.outputs]
        over = tuple(range(x.ndim - 2))  # experts share their ranks
        in_a, in_b, in_y = (
            z.any((*over, axis)) for z, axis in ((x, -2), (whole, -1), (y, -1))
        )
        live = (in_a | in_b) & (in_y | ~in_b) | unused
        if not live.any():
            continue
        x, y = x[..., live], y[..., live, :]
        if fold or np.ptp(s):  # experts have one scale on the other side
            wide = np.result_type(y.dtype, np.float32)
            y = y.astype(wide) * s[..., None, None].astype(wide)
            s = np.ones_like(s)
        if slot.kind == "head":
            x, y = y.T, x.T
        elif slot.kind == "conv":
            x = x.reshape(*weight.sizes(weight.axes.inputs), -1)
        own = None if m is None else m[slot.index][slot.outputs]
        modules[name] = Module(x, y, float(s.flat[0]), own)
    return modules


def factors_of(weight: Weight, modules: Mapping[str, Module]) -> LowRank[np.ndarray]:
    """A weight's adapter, from those of its modules that have one.

    Raises:
      ValueError: If a table and its tied head have different updates, or only some of
        the modules have magnitudes.
    """
    batch, inputs, outputs = map(weight.sizes, weight.axes)
    n_in, n_out = math.prod(inputs), math.prod(outputs)
    layers: dict[tuple[int, ...], Module] = {}
    for index in dict.fromkeys(slot.index for slot in weight.slots.values()):
        found = {
            name: (slot, modules[name])
            for name, slot in weight.slots.items()
            if slot.index == index and name in modules
        }
        if found:
            layers[index] = _joined(weight, found, n_in, n_out)
    r = max(module.a.shape[-1] for module in layers.values())
    first = next(iter(layers.values()))
    a = np.zeros((*batch, n_in, r), first.a.dtype)
    b = np.zeros((*batch, r, n_out), first.b.dtype)
    scale = np.full(batch, first.scale, np.float32)
    for index, module in layers.items():
        own = slice(module.a.shape[-1])
        a[(*index, ..., own)] = module.a
        b[(*index, ..., own, slice(None))] = module.b
        scale[index] = module.scale
    aligned = not weight.axes.standard
    dims = factor_dims(weight.axes, weight.shape, aligned=aligned)
    values = zip((a, b, scale), _orders(weight.axes), dims, strict=False)
    leaves = (_to_leaf(x, order, own, weight.shape, r) for x, order, own in values)
    adapter = LowRank(*leaves, axes=weight.axes, aligned=aligned)
    if all(module.magnitude is None for module in modules.values()):
        return adapter
    m = np.zeros((*batch, n_out), np.float32)
    for name, slot in weight.slots.items():
        if name not in modules:
            raise ValueError(
                f"{path_name(weight.path)!r} has DoRA's magnitudes for a part of it, "
                f"and not for {name!r}. Adapt all of its modules, or none of them."
            )
        m[slot.index][..., slot.outputs] = modules[name].magnitude
    order = (*weight.axes.batch, *weight.axes.outputs)
    m = _to_leaf(m, order, dims.magnitude, weight.shape, r)
    return dataclasses.replace(adapter, magnitude=m)


def magnitude_shape(kind: str, magnitude: Any, a: Any) -> tuple[int, ...]:
    """The shape in which PEFT stores magnitudes, beside a module's own `a`."""
    ones = (1,) * (a.ndim - 2)
    return (1, *magnitude.shape, *ones) if kind == "conv" else magnitude.shape


def shapes_of(weight: Weight, name: str, r: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of a and b that a module's adapter of rank r has."""
    slot = weight.slots[name]
    batch, inputs, outputs = map(weight.sizes, weight.axes)
    n_in, n_out = math.prod(inputs), math.prod(outputs)
    width = len(range(n_out)[slot.outputs])
    if slot.kind == "head":
        return (n_out, r), (r, n_in)
    if slot.kind == "conv":
        return (*inputs, r), (r, width)
    experts = batch[len(slot.index) :]
    return (*experts, n_in, r), (*experts, r, width)


def to_torch(kind: str, module: Module) -> tuple[np.ndarray, np.ndarray]:
    """The tensors A and B as PEFT stores them."""
    a, b = module.a, module.b
    if kind == "conv":  # A (r, in, window...), B (out, r, 1...)
        n = a.ndim - 2
        return np.transpose(a, (n + 1, n, *range(n))), b.T.reshape(*b.T.shape, *[1] * n)
    if kind == "experts":  # A (experts r, in), B (out, r experts)
        n_out = b.shape[-1]
        rows = a.swapaxes(1, 2)
        return rows.reshape(-1, a.shape[1]), b.transpose(2, 1, 0).reshape(n_out, -1)
    return a.T, b.T  # A (r, in), B (out, r)


def from_torch(
    kind: str, a: np.ndarray, b: np.ndarray, scale: float, shapes: Any
) -> Module:
    """The module whose tensors these are; `shapes` are those of its a and b."""
    if kind == "conv":
        n = a.ndim - 2
        return Module(
            np.transpose(a, (*range(2, n + 2), 1, 0)), b.reshape(b.shape[:2]).T, scale
        )
    if kind == "experts":
        (experts, n_in, r), (_, _, n_out) = shapes
        rows = a.reshape(experts, r, n_in).swapaxes(1, 2)
        return Module(rows, b.reshape(n_out, r, experts).transpose(2, 1, 0), scale)
    return Module(a.T, b.T, scale)


def leaf_to_torch(layout: Weight | Naming, x: np.ndarray) -> dict[str, np.ndarray]:
    """A leaf itself as the tensors of its modules; a `Naming` is that of a vector."""
    if isinstance(layout, Naming):
        counts = x.shape[: layout.stacked]
        return {n: x[i].reshape(-1) for i, (n, *_) in numbered(layout, counts)}
    batch, inputs, outputs = layout.axes
    x = np.transpose(x, (*batch, *inputs, *outputs))
    tensors = {}
    for name, slot in layout.slots.items():
        y = x[slot.index].reshape(*layout.sizes(inputs), -1)
        n = len(inputs)
        if slot.kind == "conv":  # (window..., in, out) to (out, in, window...)
            tensors[name] = np.transpose(y, (n, n - 1, *range(n - 1)))
        elif slot.kind in ("embedding", "head"):
            tensors[name] = y.reshape(-1, y.shape[-1])
        else:
            tensors[name] = y.reshape(-1, y.shape[-1])[:, slot.outputs].T
    return tensors


def leaf_from_torch(
    layout: Weight | Naming, shape: tuple[int, ...], tensors: Mapping[str, np.ndarray]
) -> np.ndarray:
    """The leaf whose modules have these tensors: the inverse."""
    dtype = next(iter(tensors.values())).dtype
    if isinstance(layout, Naming):
        x = np.empty(shape, dtype)
        for index, (name, *_) in numbered(layout, shape[: layout.stacked]):
            x[index] = tensors[name].reshape(shape[layout.stacked :])
        return x
    batch, inputs, outputs = map(layout.sizes, layout.axes)
    x = np.empty((*batch, math.prod(inputs), math.prod(outputs)), dtype)
    for name, slot in layout.slots.items():
        y = tensors[name]
        if slot.kind == "conv":
            y = np.transpose(y, (*range(2, y.ndim), 1, 0)).reshape(x.shape[-2], -1)
        elif slot.kind == "linear":
            y = y.T
        x[(*slot.index, ..., slot.outputs)] = y
    order = [d for dims in layout.axes for d in dims]
    return x.reshape(*batch, *inputs, *outputs).transpose(np.argsort(order))


def tensor_shapes(
    layout: Weight | Naming, shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """The shapes that `leaf_to_torch` gives, by the names of the modules."""
    if isinstance(layout, Naming):
        counts, size = shape[: layout.stacked], math.prod(shape[layout.stacked :])
        return {name: (size,) for _, (name, *_) in numbered(layout, counts)}
    inputs, outputs = map(layout.sizes, layout.axes[1:])
    n_in, n_out = math.prod(inputs), math.prod(outputs)
    shapes = {}
    for name, slot in layout.slots.items():
        width = len(range(n_out)[slot.outputs])
        if slot.kind == "conv":
            shapes[name] = (width, inputs[-1], *inputs[:-1])
        elif slot.kind in ("embedding", "head"):
            shapes[name] = (n_in, n_out)
        else:
            shapes[name] = (width, n_in)
    return shapes


def _matrices(weight: Weight, adapter: LowRank[np.ndarray]) -> tuple[np.ndarray, ...]:
    """The leaves of an adapter as (batch..., in, r), (batch..., r, out), (batch...)."""
    own, r = adapter.axes, adapter.a.shape[-1]
    dims = factor_dims(own, weight.shape, aligned=adapter.aligned)
    batch = weight.sizes(own.batch)
    order_a, order_b, _ = _orders(own)
    a = _from_leaf(adapter.a, dims.a, order_a).reshape(*batch, -1, r)
    b = _from_leaf(adapter.b, dims.b, order_b).reshape(*batch, r, -1)
    if turned(weight.path, weight.shape, own, weight.axes):
        a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
    return a, b, adapter.scale.reshape(batch)


def _magnitudes(weight: Weight, adapter: LowRank[np.ndarray]) -> np.ndarray | None:
    """The leaf of magnitudes as (batch..., out), if there is one."""
    own = adapter.axes
    if adapter.magnitude is None:
        return None
    if turned(weight.path, weight.shape, own, weight.axes):
        raise ValueError(
            f"The magnitudes of {path_name(weight.path)!r} are of what PyTorch's layer "
            "has for inputs. Build them with lorafy(..., dora=True, axes=...)."
        )
    dims = factor_dims(own, weight.shape, aligned=adapter.aligned)
    order = (*own.batch, *own.outputs)
    m = _from_leaf(adapter.magnitude, dims.magnitude, order)
    return m.reshape(*weight.sizes(own.batch), -1)


def _orders(axes: Axes) -> tuple[tuple[int, ...], ...]:
    batch, inputs, outputs = axes
    return (*batch, *inputs, RANK), (*batch, RANK, *outputs), batch


def _from_leaf(x: np.ndarray, dims: tuple[int, ...], order: tuple[int, ...]) -> Any:
    """A leaf with the dimensions that it has in a given order."""
    own = [d for d in dims if d != ABSENT]
    x = x.reshape([n for n, d in zip(x.shape, dims, strict=True) if d != ABSENT])
    return x.transpose([own.index(d) for d in order if d in own])


def _to_leaf(
    x: np.ndarray,
    order: tuple[int, ...],
    dims: tuple[int, ...],
    shape: tuple[int, ...],
    r: int,
) -> np.ndarray:
    """The leaf with dimensions `dims`, from an array with those of `order`."""
    sizes = dict(enumerate(shape)) | {RANK: r, ABSENT: 1}
    # What the leaf does not have, the aligned form leaves out, has size 1.
    own = sorted(order, key=lambda d: dims.index(d) if d in dims else -1)
    x = x.reshape([sizes[d] for d in order])
    return x.transpose([order.index(d) for d in own]).reshape([sizes[d] for d in dims])


def _joined(
    weight: Weight,
    found: dict[str, tuple[Slot, Module]],
    n_in: int,
    n_out: int,
) -> Module:
    """The one adapter of a layer from those of the modules that it is made of."""
    kinds = {slot.kind: module for slot, module in found.values()}
    if any(slot.kind == "head" for slot in weight.slots.values()):
        return _untied(weight, kinds)
    modules = [
        module._replace(a=module.a.reshape(n_in, -1)) if slot.kind == "conv" else module
        for slot, module in found.values()
    ]
    scales = {module.scale for module in modules}
    if len(scales) > 1:
        modules = [Module(x, y * np.asarray(s, y.dtype), 1.0) for x, y, s, _ in modules]
    first = modules[0].a
    shared = all(np.array_equal(module.a, first) for module in modules)
    ranks = [0 if shared else module.a.shape[-1] for module in modules]
    r = sum(ranks) or first.shape[-1]
    b = np.zeros((*first.shape[:-2], r, n_out), modules[0].b.dtype)
    low = 0
    for (slot, _), module, rank in zip(found.values(), modules, ranks, strict=True):
        b[..., low : low + module.a.shape[-1], slot.outputs] = module.b
        low += rank
    a = first if shared else np.concatenate([module.a for module in modules], -1)
    return Module(a, b, modules[0].scale)


def _untied(weight: Weight, kinds: dict[str, Module]) -> Module:
    """The adapter of a table and its tied head, which must be one."""
    table, head = kinds.get("embedding"), kinds.get("head")
    same = (
        table is not None
        and head is not None
        and table.scale == head.scale
        and np.array_equal(table.a, head.b.T)
        and np.array_equal(table.b, head.a.T)
    )
    if not same:
        what = (
            "differ" if table is not None and head is not None else "are not both there"
        )
        raise ValueError(
            f"{path_name(weight.path)!r} is a table and its tied head, so that one "
            f"adapter serves both: those of {list(weight.slots)} {what}. Train the two "
            "as one, or give the model a head of its own, with a copy of the table."
        )
    return table


def _axes_of_layer(path: Path, leaves: dict[Path, Any], stacked: int) -> Axes:
    """The dimensions of a weight, by its name, behind those that are stacked."""
    one = {
        other: np.broadcast_to(np.float32(0), unbox(x).shape[stacked:])
        for other, x in leaves.items()
        if is_array(unbox(x))
    }
    if len(one[path].shape) < 2:
        raise ValueError(
            f"{path_name(path)!r}, of shape {unbox(leaves[path]).shape}, has too few "
            f"dimensions for {stacked} stacked ones. Take {{layer}} or {{expert}} out "
            "of its name."
        )
    axes = axes_of(path, one)
    shift = lambda dims: tuple(d + stacked for d in dims)
    return Axes(tuple(range(stacked)), shift(axes.inputs), shift(axes.outputs))
