"""Each leaf as PyTorch keeps it: its layout, and the keys of its tensors.

The keys: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax._factors import Axes
from lora_jax._modules import Weight, weight_of
from lora_jax._names import Naming
from lora_jax._targets import check_axes, is_adaptable, match_each
from lora_jax._tree import Path, path_name, unbox

KINDS = ("linear", "conv", "embedding", "experts")
PREFIX = "base_model.model."
TABLE = (".lora_embedding_A", ".lora_embedding_B")
LINEAR = (".lora_A.weight", ".lora_B.weight")
# What PyTorch calls the leaves of Flax's layers; other leaves keep their names.
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


def given_axes(
    axes: Mapping[str, Axes] | None, leaves: dict[Path, Any]
) -> dict[Path, Axes]:
    by_name = check_axes(axes or {}, leaves)
    return {p: by_name[path_name(p)] for p in leaves if path_name(p) in by_name}


def kinds_of(kinds: Mapping[str, str] | None, paths: Iterable[Path]) -> dict[Path, str]:
    """What each leaf is in PyTorch: by Flax's names, or as the caller says."""
    paths, found = list(paths), {}
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
) -> dict[Path, Weight | Naming]:
    """How each leaf is stored: a weight, or a vector, of which its naming says all."""
    layouts: dict[Path, Weight | Naming] = {}
    for path, naming in namings.items():
        vector = len(unbox(leaves[path]).shape) - naming.stacked < 2
        if vector or not is_adaptable(path, leaves[path]):
            layouts[path] = naming
        else:
            layouts[path] = weight_of(
                path, leaves, naming, axes.get(path), kind_of[path]
            )
    return layouts


def check_square(weights: Mapping[Path, Weight], told: Iterable[Path]) -> None:
    """GPT-2's kernels are (in, out) in PyTorch and (out, in) in transformers' Flax."""
    for path, weight in weights.items():
        n_in, n_out = (math.prod(weight.sizes(dims)) for dims in weight.axes[1:])
        if n_in == n_out and path not in told and path[-1] != "embedding":
            raise ValueError(
                f"{path_name(path)!r}, of shape {weight.shape}, is square, and with "
                "fan_in_fan_out its name does not say which dimension is the input. "
                "Write axes=find_axes(fn, params, *args)."
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
        if len(names) > 1 and None in map(orders.get, names):
            raise ValueError(
                f"{names} are parameters of one module: their order matters. Write "
                "names as a mapping, in the order in which the module defines them."
            )
        names.sort(key=lambda name: orders[name] or 0, reverse=True)
        for depth, name in enumerate(names):
            stems[name] = module + depth * ".base_layer"
    return stems
