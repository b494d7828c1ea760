"""The keys of tensors in a PEFT file.

The format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from collections.abc import Mapping

from lora_jax._tree import Path, leaf_name

PREFIX = "base_model.model."
MAGNITUDE_SUFFIX = ".lora_magnitude_vector"  # DoRA's, next to A and B
LORA_BIAS_SUFFIX = ".lora_B.bias"  # times the scale, added to the module's own bias
BASE_SUFFIX = ".base_layer.weight"  # an adapted module's own weight
BASE_BIAS_SUFFIX = ".base_layer.bias"
ROWS_SUFFIX = ".token_adapter.trainable_tokens_delta"  # new values of a table's rows
# PyTorch's names for the leaves of Flax's layers; other leaves keep their names.
TORCH_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


def tensor_name(module: str, path: Path) -> str:
    """Returns PyTorch's name for a leaf of a module."""
    name = leaf_name(path)
    return f"{module}.{TORCH_LEAVES.get(name, name)}"


def parameter_stems(orders: Mapping[str, int | None]) -> dict[str, str]:
    """Returns the start of the keys of each adapted parameter, such as experts.

    PEFT wraps a module once for each of its parameters, in the order in which the
    module defines them, so that the last one is the outermost. Each wrapper adds
    `.base_layer` to the keys of those inside.

    Args:
      orders: The position in the map of each parameter's pattern, by its name.

    Raises:
      ValueError: If a module has several parameters, and the map does not order them.
    """
    by_module: dict[str, list[str]] = {}
    for name in orders:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    stems = {}
    for module, names in by_module.items():
        positions = {orders[name] for name in names}
        if len(names) > 1 and (None in positions or len(positions) < len(names)):
            raise ValueError(
                f"{names} are parameters of one module: their order matters. Write "
                "names as a mapping with a pattern for each, in the order in which the "
                "module defines them."
            )
        names.sort(key=lambda name: orders[name] or 0, reverse=True)
        for depth, name in enumerate(names):
            stems[name] = module + depth * ".base_layer"
    return stems
