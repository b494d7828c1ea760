"""The tensors of a checkpoint that each leaf is, by the map of names.

Names decide which tensors, and shapes decide what names leave open: whether a matrix is
transposed, and which dimensions of a leaf are its inputs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax._adapters import Axes, Shape
from lora_jax._flax_names import axes_by_name, is_adaptable, own_names
from lora_jax._hub.checkpoint import CheckpointTensor
from lora_jax._hub.model_tensors import ModelTensors
from lora_jax._hub.module_kinds import CONV1D, EMBEDDING, EXPERTS, LINEAR, Linear
from lora_jax._hub.module_plan import module_kinds
from lora_jax._hub.modules import (
    MappedLeaf,
    map_vector,
    map_weight,
    of_stack,
    one_of_stack,
    tensor_shapes,
)
from lora_jax._hub.names import ModuleNames, each_index, similar_names
from lora_jax._hub.tensor_keys import TORCH_LEAVES
from lora_jax._tree import Path, leaf_name, path_name, unbox

# PyTorch's names for the statistics of a batch norm.
STATISTICS = {"mean": "running_mean", "var": "running_var"}


class Source(NamedTuple):
    """The tensors that a leaf is.

    Attributes:
      leaf: The leaf, with its modules.
      stacked: How many dimensions the names of its modules count.
      tensors: The tensor of each module; a tied table may lack one of its two.
    """

    leaf: MappedLeaf
    stacked: int
    tensors: dict[str, CheckpointTensor]


def find_sources(
    leaves: dict[Path, Any],
    named: Mapping[Path, ModuleNames],
    axes: Mapping[Path, Axes],
    kinds: Mapping[str, str] | None,
    tensors: ModelTensors,
) -> dict[Path, Source]:
    """Returns the source of each leaf that has a name.

    Args:
      leaves: All leaves of the tree, whose shapes are used.
      named: The names of the leaves to find.
      axes: Those of weights, where they are known.
      kinds: As in `import_weights`.
      tensors: The checkpoint.

    Raises:
      ValueError: If a tensor is missing or has another shape, or a layout is not known.
    """
    kind_of = module_kinds(kinds, leaves)
    sources = {
        path: _source(path, leaves, found, kind_of[path], axes.get(path), tensors)
        for path, found in named.items()
    }
    sources = _with_conv1d(sources)
    for source in sources.values():
        _check_shapes(source)
    _check_one_leaf_each(sources, named)
    return sources


def _source(
    path: Path,
    leaves: dict[Path, Any],
    named: ModuleNames,
    kind: Linear,
    axes: Axes | None,
    tensors: ModelTensors,
) -> Source:
    """Returns the tensors of a leaf, whose shapes fit it."""
    shape = unbox(leaves[path]).shape
    if own_names(path)[1].startswith("convtranspose"):
        raise ValueError(
            f"{path_name(path)!r} is of a transposed convolution, whose windows "
            "PyTorch flips: it cannot be imported. Convert it by hand."
        )
    found = _tensors_of(path, named, shape, kind, tensors)
    is_vector = len(shape) - named.stacked < 2 or not is_adaptable(path, leaves[path])
    if axes is None and not is_vector and kind is not EXPERTS:
        axes = _axes(path, leaves, named.stacked, [*found.values()])
        first = next(iter(found.values())).shape
        is_vector = axes is None and first == shape[named.stacked :]
    named = _with_sizes(named, kind, found, is_vector)
    if is_vector:
        leaf = map_vector(path, shape, named)
    else:
        leaf = map_weight(path, leaves, named, axes, kind)
    return Source(leaf, named.stacked, found)


def _axes(
    path: Path,
    leaves: Mapping[Path, Any],
    stacked: int,
    tensors: Sequence[CheckpointTensor],
) -> Axes | None:
    """Returns the axes by Flax's names for one layer, or by the shapes of matrices.

    Inputs come first, as in all layers of Flax: the dimensions of a kernel (d, heads,
    size) whose tensor is (heads * size, d) can be divided in one way only.
    """
    one = one_of_stack(path, leaves, stacked)
    axes = axes_by_name(path, one)
    if axes is None and all(len(tensor.shape) == 2 for tensor in tensors):
        shape, n_in = one[path].shape, tensors[0].shape[1]
        dims = tuple(range(len(shape)))
        cuts = [i for i in dims[1:] if math.prod(shape[:i]) == n_in]
        if len(cuts) == 1:
            axes = Axes((), dims[: cuts[0]], dims[cuts[0] :])
    return axes and of_stack(axes, stacked)


def _with_sizes(
    named: ModuleNames,
    kind: Linear,
    tensors: Mapping[str, CheckpointTensor],
    is_vector: bool,
) -> ModuleNames:
    """Returns the names with the outputs of each part of a fused weight or bias."""
    parts = len(named.templates)
    if parts < 2 or named.sizes is not None or kind is not LINEAR:
        return named
    shapes = [tensor.shape for tensor in [*tensors.values()][:parts]]
    size = math.prod if is_vector else lambda shape: shape[0]
    return named._replace(sizes=tuple(map(size, shapes)))


def _tensors_of(
    path: Path, named: ModuleNames, shape: Shape, kind: Linear, tensors: ModelTensors
) -> dict[str, CheckpointTensor]:
    """Returns the tensors of the modules of a leaf, by the names of the modules."""
    found: dict[str, CheckpointTensor] = {}
    for _, modules in each_index(path, named, shape[: named.stacked]):
        for module in modules:
            tensor = tensor_of(path, module, tensors)
            if tensor is not None:
                found[module] = tensor
                continue
            # A tied table has two names, and checkpoints store one of them.
            has_other = any(tensor_of(path, m, tensors) for m in modules)
            if not (kind is EMBEDDING and len(modules) == 2 and has_other):
                raise ValueError(_missing(path, module, shape, has_other, tensors))
    return found


def _missing(
    path: Path, module: str, shape: Shape, has_other: bool, tensors: ModelTensors
) -> str:
    """Returns the message for a module of a leaf that has no tensor."""
    name, (wanted, *others) = path_name(path), _candidates(path, module)
    advice = ""
    if tensors.is_tied_head([wanted, *others]):
        advice = "The model is tied: its head is the token embedding. "
        if has_other:
            advice += f"If this leaf is both, write kinds={{{name!r}: 'embedding'}}. "
        else:
            advice += "Give this leaf the name of that one. "
    return (
        f"The checkpoint has no tensor {wanted!r} for {name!r}, of shape {shape}. "
        f"Close: {similar_names(wanted, tensors.names)}. {advice}Correct names, or "
        "pass the checkpoint of this model."
    )


def _candidates(path: Path, module: str) -> list[str]:
    """Returns the names of tensors that a leaf of a module can have, in order."""
    leaf = leaf_name(path)
    if leaf in STATISTICS:
        others = [STATISTICS[leaf], leaf]
    else:
        others = [TORCH_LEAVES.get(leaf, leaf), *["weight"] * (leaf != "bias")]
    return list(dict.fromkeys([f"{module}.{name}" for name in others] + [module]))


def tensor_of(
    path: Path, module: str, tensors: ModelTensors
) -> CheckpointTensor | None:
    """Returns the tensor that a leaf of a module is, if the checkpoint has it."""
    names = (name for name in _candidates(path, module) if name in tensors.by_name)
    return next(map(tensors.by_name.__getitem__, names), None)


def _with_conv1d(sources: dict[Path, Source]) -> dict[Path, Source]:
    """Returns the sources with the layout of GPT-2's modules, where shapes show it.

    These store (inputs, outputs). The shape of a square matrix shows nothing, so it has
    the layout of the others in its checkpoint.
    """
    named = {
        path: source
        for path, source in sources.items()
        if source.leaf.has_conv1d_name
        and all(part.kind is LINEAR for part in source.leaf.modules.values())
    }
    fits = {path: _fitting_kinds(source) for path, source in named.items()}
    sure = {kinds[0] for kinds in fits.values() if len(kinds) == 1}
    new = dict(sources)
    for path, source in named.items():
        possible = [kind for kind in fits[path] if kind in sure] or fits[path]
        if len(possible) > 1:
            raise ValueError(
                f"{path_name(path)!r} is square, and layers like GPT-2's store it "
                f"either way. Write kinds={{{path_name(path)!r}: ...}}, 'conv1d' for "
                "(inputs, outputs) in PyTorch or 'linear' for (outputs, inputs)."
            )
        if possible:
            new[path] = source._replace(leaf=_of_kind(source.leaf, possible[0]))
    return new


def _of_kind(leaf: MappedLeaf, kind: Linear) -> MappedLeaf:
    modules = {name: p._replace(kind=kind) for name, p in leaf.modules.items()}
    return leaf._replace(modules=modules)


def _fitting_kinds(source: Source) -> list[Linear]:
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    fits = lambda kind: tensor_shapes(_of_kind(source.leaf, kind)) == shapes
    return [kind for kind in (LINEAR, CONV1D) if fits(kind)]


def _check_one_leaf_each(
    sources: Mapping[Path, Source], named: Mapping[Path, ModuleNames]
) -> None:
    """Checks that leaves of one module are different tensors.

    A leaf of any name may be a module's `weight`, but not next to its `kernel`. Leaves
    of the same name, or with the name of the tensor itself, may be one tied tensor.
    """
    owner: dict[tuple[int, str], Path] = {}
    for path, source in sources.items():
        order = named[path].order
        for module, tensor in source.tensors.items():
            if order is None or module == tensor.name:
                continue
            other = owner.setdefault((order, tensor.name), path)
            if leaf_name(other) != leaf_name(path):
                raise ValueError(
                    f"{path_name(other)!r} and {path_name(path)!r} are both the tensor "
                    f"{tensor.name!r}, by one pattern of names. Write a pattern for "
                    "each leaf, with the name of its tensor."
                )


def _check_shapes(source: Source) -> None:
    """Checks that each tensor has the shape that the leaf needs."""
    leaf, wanted = source.leaf, tensor_shapes(source.leaf)
    for module, tensor in source.tensors.items():
        part, found = leaf.modules[module], tensor.shape
        vector = not leaf.axes.inputs and math.prod(found) == math.prod(wanted[module])
        if found == wanted[module]:
            continue
        if vector and found == leaf.shape[source.stacked :]:
            continue
        hint = ""
        if found == wanted[module][::-1] and part.kind is LINEAR:
            hint = (
                " It is the transpose: if PyTorch stores (inputs, outputs), write "
                f"kinds={{{path_name(leaf.path)!r}: 'conv1d'}}, or 'embedding' for a "
                "table."
            )
        raise ValueError(
            f"{path_name(leaf.path)!r}, of shape {leaf.shape}, needs the tensor "
            f"{tensor.name!r} of shape {wanted[module]}, and the checkpoint has "
            f"{found}.{hint} Is it the checkpoint of another model?"
        )
