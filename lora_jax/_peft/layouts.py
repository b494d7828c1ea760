"""Each leaf as PyTorch keeps it: its layout, and the keys of its tensors.

The keys: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax._adapters import Axes
from lora_jax._peft.modules import Weight, weight_of
from lora_jax._peft.names import Naming
from lora_jax._targets import check_axes, is_adaptable, match_each, matches
from lora_jax._tree import Path, is_array, path_name, unbox

KINDS = ("linear", "conv", "embedding", "experts")
PREFIX = "base_model.model."
TABLE = (".lora_embedding_A", ".lora_embedding_B")
LINEAR = (".lora_A.weight", ".lora_B.weight")
# What PyTorch calls the leaves of Flax's layers; other leaves keep their names.
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
# Modules of GPT-2 and its kin, whose kernels are (in, out) in PyTorch, and (out, in) or
# (in, out) in Flax: where a kernel is square, nothing but its use tells which.
CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")


def given_axes(
    axes: Mapping[str, Axes] | None, leaves: dict[Path, Any]
) -> dict[Path, Axes]:
    by_name = check_axes(axes or {}, leaves)
    return {p: by_name[path_name(p)] for p in leaves if path_name(p) in by_name}


def kinds_of(kinds: Mapping[str, str] | None, paths: Iterable[Path]) -> dict[Path, str]:
    """What each leaf is in PyTorch: by Flax's names, or as the caller says."""
    paths, found = list(paths), {}
    if not isinstance(kinds or {}, Mapping):
        raise TypeError(f"kinds is {{pattern: kind}}, found {type(kinds).__name__}.")
    for path in paths:
        module = str(path[-2]).lower() if len(path) > 1 else ""
        conv = path[-1] == "kernel" and module.startswith("conv")
        found[path] = "embedding" if path[-1] == "embedding" else "linear"
        if conv:
            found[path] = "conv"
    for pattern, kind in reversed((kinds or {}).items()):  # the first one wins
        if kind not in KINDS:
            raise ValueError(
                f"kinds of {pattern!r} is one of {', '.join(KINDS)}, found {kind!r}."
            )
        found |= dict.fromkeys(match_each([pattern], paths, "kinds"), kind)
    return found


def layouts_of(
    namings: Mapping[Path, Naming],
    leaves: dict[Path, Any],
    axes: Mapping[Path, Axes],
    kind_of: Mapping[Path, str],
    kinds: Mapping[str, str] | None,
) -> dict[Path, Weight | Naming]:
    """How leaves that are saved whole are stored.

    That is a weight, or a vector, of which its naming says all.

    Raises:
      ValueError: If PyTorch's own layout of a leaf is not known.
    """
    refuse = lambda path, why: ValueError(
        f"{path_name(path)!r} would be saved whole, and {why}. Leave it out of also: "
        "it can have an adapter, or stay as it was."
    )
    first = all(dims.batch == tuple(range(len(dims.batch))) for dims in axes.values())
    layouts: dict[Path, Weight | Naming] = {}
    for path, naming in namings.items():
        vector = len(unbox(leaves[path]).shape) - naming.stacked < 2
        if vector or not is_adaptable(path, leaves[path]):
            if naming.stacked and not first:
                raise refuse(path, "which of its dimensions is the stack is not known")
            if path[-1] in ("mean", "var"):
                raise refuse(path, "PyTorch has more of such statistics than Flax")
            layouts[path] = naming
            continue
        module = str(path[-2]).lower() if len(path) > 1 else ""
        told = any(matches(pattern, path) for pattern in kinds or ())
        layout = weight_of(path, leaves, naming, axes.get(path), kind_of[path])
        if module.startswith("convtranspose"):
            raise refuse(path, "PyTorch turns the windows of such layers around")
        if any(name.split(".")[-1] in CONV1D for name in layout.slots):
            raise refuse(path, "PyTorch's layer of that name may store (in, out)")
        if path[-1] not in ("kernel", "embedding") and not told:
            raise ValueError(
                f"{path_name(path)!r} would be saved whole, and its name does not say "
                f"what it is. Write kinds={{{path_name(path)!r}: ...}}, one of "
                f"{', '.join(KINDS[:3])}."
            )
        layouts[path] = layout
    return layouts


def check_inputs(
    weights: Mapping[Path, Weight],
    told: Iterable[Path],
    leaves: Mapping[Path, Any],
    fan_in_fan_out: bool,
) -> None:
    """A kernel of GPT-2 does not say by itself which dimension is the input.

    A bias beside it does, with a number for each output, unless the kernel is square.
    """
    for path, weight in weights.items():
        if path in told or path[-1] == "embedding":
            continue
        n, n_in, n_out = (math.prod(weight.sizes(dims)) for dims in weight.axes)
        like = any(name.split(".")[-1] in CONV1D for name in weight.slots)
        bias = unbox(leaves.get((*path[:-1], "bias")))
        size = math.prod(bias.shape) if is_array(bias) else 0
        why = ""
        if n_in == n_out and (fan_in_fan_out or like):
            why = "is square, and a name like GPT-2's says nothing: which"
        elif n_in != n_out and size == n * n_in:
            why = f"has {n_out} outputs by its name, and its bias has {n_in}: which"
        if why:
            raise ValueError(
                f"{path_name(path)!r}, of shape {weight.shape}, {why} dimension is the "
                "input must be told. Write axes=find_axes(fn, params, *args)."
            )


def suffixes(kind: str) -> tuple[str, str]:
    return TABLE if kind == "embedding" else LINEAR


def tensor_name(module: str, path: Path) -> str:
    """What PyTorch calls a leaf of a module."""
    return f"{module}.{LEAVES.get(path[-1], path[-1])}"


def stems_of(orders: Mapping[str, int | None]) -> dict[str, str]:
    """The start of the keys of each bare parameter.

    PEFT wraps a module once for each of its parameters, in the order in which the
    module defines them: the last is the outermost.
    """
    by_module: dict[str, list[str]] = {}
    for name in orders:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    stems = {}
    for module, names in by_module.items():
        places = {orders[name] for name in names}
        if len(names) > 1 and (None in places or len(places) < len(names)):
            raise ValueError(
                f"{names} are parameters of one module: their order matters. Write "
                "names as a mapping with a pattern for each, in the order in which the "
                "module defines them."
            )
        names.sort(key=lambda name: orders[name] or 0, reverse=True)
        for depth, name in enumerate(names):
            stems[name] = module + depth * ".base_layer"
    return stems
