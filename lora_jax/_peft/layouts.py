"""Each leaf as PyTorch keeps it: its layout, and the keys of its tensors.

The keys: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax._adapters import Axes
from lora_jax._flax_names import is_adaptable, own_names
from lora_jax._patterns import match_each, matches
from lora_jax._peft.modules import Weight, weight_of
from lora_jax._peft.names import Naming
from lora_jax._tree import Path, leaf_name, path_name, unbox

KINDS = ("linear", "conv", "embedding", "experts")
PREFIX = "base_model.model."
TABLE = (".lora_embedding_A", ".lora_embedding_B")
LINEAR = (".lora_A.weight", ".lora_B.weight")
# What PyTorch calls the leaves of Flax's layers; other leaves keep their names.
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
# Modules of GPT-2 and its kin, whose kernels are (in, out) in PyTorch, and (out, in) or
# (in, out) in Flax: where a kernel is square, nothing but its use tells which.
CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")


def kinds_of(kinds: Mapping[str, str] | None, paths: Iterable[Path]) -> dict[Path, str]:
    """What each leaf is in PyTorch: by Flax's names, or as the caller says."""
    paths, found = list(paths), {}
    if not isinstance(kinds or {}, Mapping):
        raise TypeError(f"kinds is {{pattern: kind}}, found {type(kinds).__name__}.")
    for path in paths:
        name, module = own_names(path)
        conv = name == "kernel" and module.startswith("conv")
        found[path] = "embedding" if name == "embedding" else "linear"
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
    first = all(dims.batch == tuple(range(len(dims.batch))) for dims in axes.values())
    layouts: dict[Path, Weight | Naming] = {}
    for path, naming in namings.items():
        vector = len(unbox(leaves[path]).shape) - naming.stacked < 2
        if vector or not is_adaptable(path, leaves[path]):
            _check_vector(path, naming, first)
            layouts[path] = naming
        else:
            own = weight_of(path, leaves, naming, axes.get(path), kind_of[path])
            _check_matrix(own, any(matches(pattern, path) for pattern in kinds or ()))
            layouts[path] = own
    return layouts


def _check_vector(path: Path, naming: Naming, first: bool) -> None:
    if naming.stacked and not first:
        raise _unknown(path, "which of its dimensions is the stack is not known")
    if leaf_name(path) in ("mean", "var"):
        raise _unknown(path, "PyTorch has more of such statistics than Flax")


def _check_matrix(weight: Weight, told: bool) -> None:
    path = weight.path
    name, module = own_names(path)
    if module.startswith("convtranspose"):
        raise _unknown(path, "PyTorch turns the windows of such layers around")
    if any(name.split(".")[-1] in CONV1D for name in weight.slots):
        raise _unknown(path, "PyTorch's layer of that name may store (in, out)")
    if name not in ("kernel", "embedding") and not told:
        raise ValueError(
            f"{path_name(path)!r} would be saved whole, and its name does not say "
            f"what it is. Write kinds={{{path_name(path)!r}: ...}}, one of "
            f"{', '.join(KINDS[:3])}."
        )


def _unknown(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path_name(path)!r} would be saved whole, and {why}. Leave it out of also= "
        "in lorafy, or of PEFT's modules_to_save: it can have an adapter, or stay as "
        "it was."
    )


MAGNITUDE = ".lora_magnitude_vector"  # of DoRA, beside both


def suffixes(kind: str) -> tuple[str, str]:
    return TABLE if kind == "embedding" else LINEAR


def tensor_name(module: str, path: Path) -> str:
    """What PyTorch calls a leaf of a module."""
    name = leaf_name(path)
    return f"{module}.{LEAVES.get(name, name)}"


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
