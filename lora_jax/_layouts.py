"""The layouts of other JAX libraries: which leaves are the factors of which weight.

A row of `LAYOUTS` is all that is known of a layout. `adopt` reads adapters by it, and
all other functions name the library of adapters that are not ours by it.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lora_jax._tree import Path, components, path_name


class Layout(NamedTuple):
    """The names of a weight and of its first factor, relative to their module.

    The second factor has the name of the first, with b as its last letter.

    Attributes:
      library: The library that creates these names.
      weight: The weight; `{w}` stands for any name.
      a: The factor with the weight's inputs.
      shapes: How the shapes of the factors follow from that of the weight:
        "dense": the weight is stored as (stacked..., inputs..., outputs...).
        "dense first": so too wherever the shapes allow it, and otherwise as "einsum".
        "einsum": in any order, which the shapes have to prove.
        "heads": openpi's einsums, where both factors have the dimension of the heads.
      alpha: Where the library keeps alpha if the scale is alpha / rank, as it is not in
        the tree; `None` if the scale is 1.
      beside: Another weight that the module must have.
    """

    library: str
    weight: str
    a: str
    shapes: str
    alpha: str | None = None
    beside: str | None = None

    @property
    def b(self) -> str:
        return f"{self.a[:-1]}b"


OPENPI, GEMMA, FLAX, KERAS = "openpi", "gemma.peft", "flax.nnx", "Keras"
QWIX = "qwix, tunix, MaxText"
CONFIG, LAYER, PROVIDER = "LoRAConfig.alpha", "layer.lora_alpha", "LoraProvider.alpha"

# The adapters of a tree belong to the first library whose rows explain every leaf, so
# fixed names come before those that accept any weight. The sources:
#   openpi      src/openpi/models/lora.py. `Einsum` multiplies by `scaling_value`, but
#               `FeedForward` does not.
#   gemma.peft  gemma/peft/_lora.py. Around the einsums of the Gemma models
#               gemma/gm/nn/_lora.py adds a module, in `FeedForward` one for each.
#   flax.nnx    flax/nnx/nn/lora.py. `LoRALinear`, and `LoRA` around a layer.
#   Keras       keras/src/layers: `Dense`, `EinsumDense`, convolutions; `Embedding`. The
#               first factor has all dimensions of the weight except the last.
#   qwix        qwix/_src/providers/lora.py. `dot_general` joins the inputs to one
#               dimension, and the outputs to another; `einsum` keeps them all.
LAYOUTS = (
    Layout(OPENPI, "w", "lora_a", "heads", CONFIG),
    Layout(OPENPI, "gating_einsum", "gating_einsum_lora_a", "dense", beside="linear"),
    Layout(OPENPI, "linear", "linear_lora_a", "dense", beside="gating_einsum"),
    Layout(GEMMA, "kernel", "lora/a", "dense first"),
    Layout(GEMMA, "w", "lora/a", "einsum"),
    Layout(GEMMA, "w", "_LoRAEinsum_0/lora/a", "einsum"),
    Layout(GEMMA, "{w}", "_LoRAEinsum_{w}/lora/a", "einsum"),
    Layout(FLAX, "kernel", "lora/lora_a", "dense"),
    Layout(FLAX, "base_module/kernel", "lora_a", "dense"),
    Layout(KERAS, "kernel", "lora_kernel_a", "dense", LAYER),
    Layout(KERAS, "embeddings", "lora_embeddings_a", "dense", LAYER),
    Layout(QWIX, "kernel", "kernel_lora_a", "dense first", PROVIDER),
    Layout(QWIX, "{w}", "{w}_lora_a", "einsum", PROVIDER),
)

# What holds the layer in an `nnx.LoRA`. Without the adapter the layer stands alone.
WRAPPER = "base_module"

LORA = re.compile(r"(.*_)?lora(_.*)?|.*LoRA.*")


class Foreign(NamedTuple):
    """An adapter of another library: its layout, and the paths of its leaves."""

    layout: Layout
    weight: Path
    a: Path
    b: Path


def find_foreign(leaves: Mapping[Path, Any]) -> dict[str, list[Foreign]]:
    """Returns the adapters of other libraries, by library, in the order of the rows.

    Only names are compared, so a leaf can belong to adapters of several libraries.
    Within a library it belongs to that of the first row.
    """
    factors = [path for path in leaves if _may_be_factor(path, leaves)]
    if not factors:
        return {}
    names = {path: "/".join(components(path)) for path in leaves}
    paths = {name: path for path, name in names.items()}
    found: dict[str, dict[Path, Foreign]] = {}
    for layout in LAYOUTS:
        for a in factors:
            match = _pattern(layout.a).fullmatch(names[a])
            if match is None:
                continue
            w = match.groupdict().get("w") or ""
            near = (layout.weight, layout.b, layout.beside or layout.weight)
            weight, b, beside = (
                paths.get(match["module"] + name.replace("{w}", w)) for name in near
            )
            if weight and b and beside:
                adapter = Foreign(layout, weight, a, b)
                found.setdefault(layout.library, {}).setdefault(a, adapter)
    return {library: [*adapters.values()] for library, adapters in found.items()}


def looks_foreign(path: Path) -> bool:
    """Whether a leaf is named like a part of an adapter, in any library."""
    *_, module, name = ("", *components(path))
    named = name in ("a", "b") and LORA.fullmatch(module)
    return bool(named or LORA.fullmatch(name))


def layout_table() -> str:
    """Returns the rows as a table, for messages and the documentation of `adopt`."""
    rows: Iterable[tuple[str, ...]] = (
        (x.library, x.weight, x.a, "1" if x.alpha is None else "alpha / rank")
        for x in LAYOUTS
    )
    rows = [("library", "weight", "first factor", "scale"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = ([x.ljust(n) for x, n in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in cells)


def _may_be_factor(path: Path, leaves: Mapping[Path, Any]) -> bool:
    """Whether a leaf may be a first factor that is not ours: ours have a scale."""
    name = str(path[-1])
    if not name.endswith("a") or "lora" not in path_name(path[-2:]).lower():
        return False
    return (*path[:-1], f"{name[:-1]}scale") not in leaves


@functools.lru_cache(maxsize=64)
def _pattern(template: str) -> re.Pattern[str]:
    """Returns the pattern of a factor's path, with its module and the weight's name."""
    name = re.escape(template).replace(re.escape("{w}"), "(?P<w>[^/]+)")
    return re.compile(f"(?P<module>(?:.*/)?){name}")
