"""Splits the adapter of a weight into those of its PyTorch modules, and joins them.

`LowRank` is the adapter of a weight, in the order of its dimensions; `ModuleAdapter` is
that of one module, as matrices. All arrays are NumPy's.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from lora_jax._adapters import ABSENT, RANK, Axes, LowRank, Shape, factor_dims
from lora_jax._hub.module_kinds import ModuleAdapter
from lora_jax._hub.modules import MappedLeaf
from lora_jax._tree import Path, path_name


def is_reversed(path: Path, shape: Shape, stored: Axes, axes: Axes) -> bool:
    """Whether an adapter with the axes `stored` has `lora_b` on the inputs.

    This happens if `lorafy` took the axes from the order of the dimensions, and the
    function uses them in the other order.

    Raises:
      ValueError: If its dimensions are neither those of `axes` nor the reverse.
    """
    found, wanted = (
        [[d for d in dims if shape[d] > 1] for dims in each] for each in (stored, axes)
    )
    if found == wanted:
        return False
    if found == [wanted[0], wanted[2], wanted[1]]:
        return True
    raise ValueError(
        f"The adapter of {path_name(path)!r} is for {stored}, and axes has {axes}. "
        "Build it with lorafy(..., axes=...) of this very function."
    )


def factor_shapes(weight: MappedLeaf, name: str, r: int) -> tuple[Shape, Shape]:
    """Returns the shapes of a and b in a module's adapter of rank r."""
    batch, n_in, n_out = weight.matrix
    part = weight.modules[name]
    experts = batch[len(part.stack_index) :]
    width = len(range(n_out)[part.outputs])
    return (*experts, n_in, r), (*experts, r, width)


def split_adapter(
    weight: MappedLeaf, adapter: LowRank[np.ndarray]
) -> dict[str, ModuleAdapter]:
    """Returns the adapter of each module of a weight.

    A rank that does nothing for a module, and cannot learn to, is left out: the padding
    of a stack, or a rank that only another module of a fused weight uses. A module
    without any rank is left out, too. With DoRA all ranks stay, because the magnitude
    changes a module even where its ranks do nothing.
    """
    a, b, scale, *magnitude = _as_matrices(weight, adapter)
    keep_all = bool(magnitude) or not (a.any() or b.any())
    modules = {}
    for name, part in weight.modules.items():
        x, full, s = (leaf[part.stack_index] for leaf in (a, b, scale))
        y = full[..., part.outputs]
        experts = tuple(range(x.ndim - 2))  # they share their ranks
        in_a, in_b, in_own = (
            z.any((*experts, axis)) for z, axis in ((x, -2), (full, -1), (y, -1))
        )
        # A rank that is zero in both a and b has no gradient, and never learns. A rank
        # that is zero in this module's part of b, and not in all of b, belongs to other
        # modules. One that is zero in all of b has not been trained yet.
        used = (in_a | in_b) & (in_own | ~in_b) | keep_all
        if not used.any():
            continue
        x, y = x[..., used], y[..., used, :]
        if np.ptp(s):  # PEFT has one scale for all experts of a parameter
            wide = np.result_type(y.dtype, np.float32)
            y = y.astype(wide) * s[..., None, None].astype(wide)
            s = np.ones_like(s)
        magnitudes = [m[part.stack_index][part.outputs] for m in magnitude]
        modules[name] = ModuleAdapter(x, y, float(s.flat[0]), *magnitudes)
    return modules


def join_adapters(
    weight: MappedLeaf, modules: Mapping[str, ModuleAdapter]
) -> LowRank[np.ndarray]:
    """Returns the adapter of a weight from those of its modules that have one.

    Raises:
      ValueError: If an embedding and its tied head have different adapters, or only
        some of the modules have magnitudes.
    """
    batch, n_in, n_out = weight.matrix
    by_layer: dict[tuple[int, ...], dict[str, ModuleAdapter]] = {}
    for name, part in weight.modules.items():
        if name in modules:
            by_layer.setdefault(part.stack_index, {})[name] = modules[name]
    layers = {
        index: _join_layer(weight, modules) for index, modules in by_layer.items()
    }
    r = max(layer.a.shape[-1] for layer in layers.values())
    first = next(iter(layers.values()))
    a = np.zeros((*batch, n_in, r), first.a.dtype)
    b = np.zeros((*batch, r, n_out), first.b.dtype)
    scale = np.full(batch, first.scale, np.float32)
    for index, layer in layers.items():
        ranks = slice(layer.a.shape[-1])
        a[(*index, ..., ranks)] = layer.a
        b[(*index, ..., ranks, slice(None))] = layer.b
        scale[index] = layer.scale
    adapter = LowRank(a, b, scale)
    if any(module.magnitude is not None for module in modules.values()):
        m = np.zeros((*batch, n_out), np.float32)
        for name, part in weight.modules.items():
            if name not in modules:
                raise ValueError(
                    f"{path_name(weight.path)!r} has DoRA's magnitudes for a part of "
                    f"it, and none for {name!r}. Adapt all of its modules, or none."
                )
            m[part.stack_index][..., part.outputs] = modules[name].magnitude
        adapter = dataclasses.replace(adapter, magnitude=m)
    return _as_leaves(weight, adapter, r)


def _as_matrices(weight: MappedLeaf, adapter: LowRank[np.ndarray]) -> list[np.ndarray]:
    """Returns a (batch..., in, r), b, the scale and the magnitude, if there is one."""
    axes, r = adapter.axes, adapter.a.shape[-1]
    stored = factor_dims(weight.shape, **adapter.layout)
    unaligned = dataclasses.replace(adapter, aligned=False)
    ordered = factor_dims(weight.shape, **unaligned.layout)
    arrays = zip(adapter, stored, ordered, strict=False)
    a, b, scale, *magnitude = (_reordered(x, dims, order) for x, dims, order in arrays)
    batch = weight.sizes(axes.batch)
    a, b = a.reshape(*batch, -1, r), b.reshape(*batch, r, -1)
    if adapter.rank_scales:  # PyTorch has one scale for all ranks
        wide = np.result_type(b.dtype, np.float32)
        b = b.astype(wide) * scale.reshape(*batch, r, 1).astype(wide)
        scale = np.ones(batch, scale.dtype)
    if is_reversed(weight.path, weight.shape, axes, weight.axes):
        if magnitude:
            raise ValueError(
                f"The magnitudes of {path_name(weight.path)!r} are along the inputs of "
                "PyTorch's layer. Build them with lorafy(..., dora=True, axes=...)."
            )
        a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
    return [a, b, scale.reshape(batch), *(m.reshape(*batch, -1) for m in magnitude)]


def _reordered(x: np.ndarray, stored: Shape, order: Shape) -> np.ndarray:
    """Returns a leaf with dimensions `stored` in an order, without those it lacks."""
    kept = [d for d in stored if d != ABSENT]
    x = x.reshape([n for n, d in zip(x.shape, stored, strict=True) if d != ABSENT])
    return x.transpose([kept.index(d) for d in order if d in kept])


def _as_leaves(
    weight: MappedLeaf, adapter: LowRank[np.ndarray], r: int
) -> LowRank[np.ndarray]:
    """Returns the leaves of an adapter of matrices: the inverse of `_as_matrices`."""
    axes, aligned = weight.axes, not weight.axes.standard
    stored = factor_dims(weight.shape, axes, aligned=aligned)
    ordered = factor_dims(weight.shape, axes, aligned=False)
    sizes = dict(enumerate(weight.shape)) | {RANK: r, ABSENT: 1}
    leaves = []
    for x, dims, order in zip(adapter, stored, ordered, strict=False):
        # Dimensions that the aligned layout lacks have size 1, and can come first.
        in_order = sorted(order, key=lambda d: dims.index(d) if d in dims else -1)
        x = x.reshape([sizes[d] for d in order])
        x = x.transpose([order.index(d) for d in in_order])
        leaves.append(x.reshape([sizes[d] for d in dims]))
    return LowRank(*leaves, axes=axes, aligned=aligned)


def _join_layer(
    weight: MappedLeaf, modules: Mapping[str, ModuleAdapter]
) -> ModuleAdapter:
    """Returns the one adapter of a layer from those of the modules in it.

    Modules with the same A share its ranks. Otherwise each module has ranks of its own,
    whose part of B is zero for the outputs of all others.
    """
    if weight.is_tied:
        return _join_tied(weight, modules)
    each = list(modules.values())
    if len({module.scale for module in each}) > 1:
        each = [
            ModuleAdapter(x.a, x.b * np.asarray(x.scale, x.b.dtype), 1.0) for x in each
        ]
    a, n_out = each[0].a, weight.matrix[2]
    shared = all(np.array_equal(module.a, a) for module in each)
    if not shared:
        a = np.concatenate([module.a for module in each], -1)
    b = np.zeros((*a.shape[:-2], a.shape[-1], n_out), each[0].b.dtype)
    low = 0
    for name, module in zip(modules, each, strict=True):
        r = module.a.shape[-1]
        b[..., low : low + r, weight.modules[name].outputs] = module.b
        low += 0 if shared else r
    return ModuleAdapter(a, b, each[0].scale)


def _join_tied(
    weight: MappedLeaf, modules: Mapping[str, ModuleAdapter]
) -> ModuleAdapter:
    """Returns the adapter of an embedding and its tied head, which must be the same."""
    first, *others = modules.values()
    same = all(
        other.scale == first.scale
        and np.array_equal(other.a, first.a)
        and np.array_equal(other.b, first.b)
        for other in others
    )
    if not others or not same:
        raise ValueError(
            f"{path_name(weight.path)!r} is an embedding and its tied head, and one "
            f"adapter serves both. Those of {list(weight.modules)} "
            f"{'differ' if others else 'are not both there'}. Train the two as one, or "
            "give the model a head of its own, with a copy of the embedding."
        )
    return first
