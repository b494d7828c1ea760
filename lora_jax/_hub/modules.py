"""The PyTorch modules that a leaf consists of, and the conversion of its values.

One leaf can be many modules: a stack of layers, a fused query, key and value, or a
table that is also the output head. Each of them is a `ModuleSlice` of the leaf.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax._adapters import Axes, Shape
from lora_jax._flax_names import axes_of, is_adaptable, paths_of_axes
from lora_jax._hub.module_kinds import (
    CONV1D_NAMES,
    EXPERTS,
    HEAD,
    VECTOR,
    Embedding,
    Linear,
)
from lora_jax._hub.names import ModuleNames, each_index
from lora_jax._tree import Path, is_array, path_name, unbox


class ModuleSlice(NamedTuple):
    """The slice of a leaf that is one PyTorch module."""

    kind: Linear
    stack_index: tuple[int, ...]  # along the stacked dimensions that the names count
    outputs: slice


class MappedLeaf(NamedTuple):
    """A leaf with the use of its dimensions, and its PyTorch modules by their names."""

    path: Path
    shape: Shape
    axes: Axes
    modules: dict[str, ModuleSlice]

    def sizes(self, dims: tuple[int, ...]) -> Shape:
        return tuple(self.shape[d] for d in dims)

    @property
    def matrix(self) -> tuple[Shape, int, int]:
        """The sizes of the stack, and the numbers of inputs and of outputs."""
        batch, inputs, outputs = map(self.sizes, self.axes)
        return batch, math.prod(inputs), math.prod(outputs)

    @property
    def is_tied(self) -> bool:
        """Whether it is a table and the head too."""
        return any(part.kind is HEAD for part in self.modules.values())

    @property
    def has_conv1d_name(self) -> bool:
        last = (name.removesuffix(".weight").split(".")[-1] for name in self.modules)
        return any(name in CONV1D_NAMES for name in last)


def map_weight(
    path: Path,
    leaves: dict[Path, Any],
    named: ModuleNames,
    axes: Axes | None,
    kind: Linear,
) -> MappedLeaf:
    """Returns the modules of a weight that can have an adapter.

    Raises:
      ValueError: If it can have none, or its names do not fit its dimensions.
    """
    name, w = path_name(path), unbox(leaves[path])
    if not is_adaptable(path, leaves[path]):
        raise ValueError(
            f"{name!r} cannot have an adapter: a weight is floating, has 2 or more "
            "dimensions and is no norm or bias by its name."
        )
    if axes is None:
        axes = _axes_by_name(path, leaves, named.stacked)
    weight = MappedLeaf(path, w.shape, axes, {})
    _check_stack(weight, named, kind)
    parts, n_out = len(named.templates), weight.matrix[2]
    is_table = isinstance(kind, Embedding)
    if is_table and not axes.standard:
        raise ValueError(
            f"{name!r} is an embedding by its name, and is used as a matrix, with "
            f"{axes}. Write kinds={{{name!r}: 'linear'}}."
        )
    if is_table and parts == 2 and named.sizes is None:
        slices = [(kind, slice(None)), (HEAD, slice(None))]
    elif is_table and parts > 1:
        raise ValueError(
            f"{name!r} is an embedding. Give it one name, or two: (embedding, tied "
            f"head). Found {named.templates}."
        )
    else:
        slices = [(kind, part) for part in _split_outputs(path, named, n_out)]
    counts = weight.sizes(axes.batch[: named.stacked])
    return weight._replace(modules=_named_slices(path, named, counts, slices))


def map_vector(path: Path, shape: Shape, named: ModuleNames) -> MappedLeaf:
    """Returns the modules of a leaf that each of them keeps as one dimension."""
    dims = tuple(range(len(shape)))
    axes = Axes(dims[: named.stacked], (), dims[named.stacked :])
    vector = MappedLeaf(path, shape, axes, {})
    parts = _split_outputs(path, named, vector.matrix[2])
    slices = [(VECTOR, part) for part in parts]
    counts = shape[: named.stacked]
    return vector._replace(modules=_named_slices(path, named, counts, slices))


def _split_outputs(path: Path, named: ModuleNames, n_out: int) -> list[slice]:
    """Returns the outputs of each of the names."""
    parts = len(named.templates)
    widths = named.sizes or (n_out // parts,) * parts
    if sum(widths) != n_out:
        raise ValueError(
            f"{path_name(path)!r} has {n_out} outputs, and its parts "
            f"{named.templates} have {widths}. Write {{name: outputs, ...}} for parts "
            "of unequal size."
        )
    ends = itertools.accumulate(widths)
    return [slice(end - n, end) for n, end in zip(widths, ends, strict=True)]


def _named_slices(
    path: Path,
    named: ModuleNames,
    counts: Shape,
    slices: Sequence[tuple[Linear, slice]],
) -> dict[str, ModuleSlice]:
    """Returns the modules of a leaf: the kind and the outputs of each of the names."""
    modules: dict[str, ModuleSlice] = {}
    for index, names in each_index(path, named, counts):
        for module, (kind, outputs) in zip(names, slices, strict=True):
            if module in modules:
                raise ValueError(
                    f"{path_name(path)!r} has the name {module!r} twice. Each module "
                    "has its own."
                )
            modules[module] = ModuleSlice(kind, index, outputs)
    return modules


def leaf_to_torch(leaf: MappedLeaf, x: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the values of a leaf as the tensors of its modules."""
    batch, n_in, n_out = leaf.matrix
    x = np.transpose(x, [d for dims in leaf.axes for d in dims])
    x, inputs = x.reshape(*batch, n_in, n_out), leaf.sizes(leaf.axes.inputs)
    return {
        name: part.kind.weight_to_torch(x[part.stack_index][..., part.outputs], inputs)
        for name, part in leaf.modules.items()
    }


def leaf_from_torch(leaf: MappedLeaf, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the values of the leaf whose modules have these tensors."""
    batch, n_in, n_out = leaf.matrix
    x = np.empty((*batch, n_in, n_out), next(iter(tensors.values())).dtype)
    for name, part in leaf.modules.items():
        w = part.kind.weight_from_torch(tensors[name])
        x[(*part.stack_index, ..., part.outputs)] = w
    order = [d for dims in leaf.axes for d in dims]
    return x.reshape(leaf.sizes(tuple(order))).transpose(np.argsort(order))


def tensor_shapes(leaf: MappedLeaf) -> dict[str, Shape]:
    """Returns the shapes of the tensors of `leaf_to_torch`."""
    one = np.broadcast_to(np.int8(0), leaf.shape)  # a view that takes no memory
    return {name: x.shape for name, x in leaf_to_torch(leaf, one).items()}


def _check_stack(weight: MappedLeaf, named: ModuleNames, kind: Linear) -> None:
    """Checks that the names count all stacked dimensions, except one of experts."""
    name, found, counted = path_name(weight.path), len(weight.axes.batch), named.stacked
    if found > counted + (kind is EXPERTS):
        raise ValueError(
            f"{name!r}, of shape {weight.shape}, has {found} stacked dimensions, and "
            f"the name {named.templates[0]!r} counts {counted}. Write {{layer}} or "
            "{expert} where the name has its number; or, if PyTorch has all experts in "
            f"one parameter of three dimensions, kinds={{{name!r}: 'experts'}}."
        )
    if found < counted:
        inputs, outputs = weight.axes.inputs, weight.axes.outputs
        raise ValueError(
            f"The name {named.templates[0]!r} of {name!r}, of shape {weight.shape}, "
            f"counts {counted} stacked dimensions, and its axes have {found}: its "
            f"dimensions {inputs} are inputs and {outputs} outputs. If it is a stack "
            "of layers, write axes=find_axes(fn, params, *args), in lorafy too; if "
            "not, remove {layer} or {expert} from the name."
        )
    if kind is EXPERTS and (len(named.templates) > 1 or found <= counted):
        raise ValueError(
            f"{name!r}, of shape {weight.shape}, is no parameter of experts: it needs "
            "one name, and one stacked dimension that the name does not count."
        )


def _axes_by_name(path: Path, leaves: Mapping[Path, Any], stacked: int) -> Axes:
    """Returns the axes of a stacked weight, by Flax's names for one of the stack."""
    one = one_of_stack(path, leaves, stacked)
    if one[path].ndim < 2:
        raise ValueError(
            f"{path_name(path)!r}, of shape {unbox(leaves[path]).shape}, has too few "
            f"dimensions for {stacked} stacked ones. Remove {{layer}} or {{expert}} "
            "from its name."
        )
    return of_stack(axes_of(path, one), stacked)


def one_of_stack(
    path: Path, leaves: Mapping[Path, Any], stacked: int
) -> dict[Path, np.ndarray]:
    """Returns one of a stack, with the leaves that show the axes of one weight.

    The arrays are views that take no memory. Only their shapes are those of the leaves.
    """
    # The names of others matter only beyond two dimensions.
    needs_others = len(unbox(leaves[path]).shape) > stacked + 2
    near = {
        other: unbox(leaves.get(other))
        for other in (paths_of_axes(path) if needs_others else [path])
    }
    return {
        other: np.broadcast_to(np.float32(0), x.shape[stacked:])
        for other, x in near.items()
        if is_array(x)
    }


def of_stack(axes: Axes, stacked: int) -> Axes:
    """Returns the axes of a stack along the first dimensions, by those of one of it."""
    _, inputs, outputs = (tuple(d + stacked for d in dims) for dims in axes)
    return Axes(tuple(range(stacked)), inputs, outputs)
