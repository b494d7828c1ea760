"""The checks that the programs an export is for load it as intended."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lora_jax._adapters import adapter_of
from lora_jax._hub.consumers import Consumer
from lora_jax._hub.export_checks import has_magnitude
from lora_jax._hub.model_class import model_class
from lora_jax._hub.module_kinds import EMBEDDING, EXPERTS, HEAD, LINEAR, VECTOR
from lora_jax._hub.module_plan import ModulePlan
from lora_jax._hub.names import last_part
from lora_jax._patterns import matches
from lora_jax._tree import Path, path_name, unbox

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
EXPERT = re.compile(r"\.experts\.\d+\.")
KIND_WORDS = {
    "conv": "convolution",
    "conv1d": "module that stores (inputs, outputs)",
    "embedding": "table",
    "head": "head of a tied table",
    "experts": "parameter of all experts",
}
NAME_EXPERTS = "Name the modules of each expert, with {expert}"
MERGE = "Write the merged model with export_weights"
EXCLUDE = "Leave it out with exclude= in lorafy"

# A path, why the program does not load its leaf as it was meant, and what to write.
Problems = Iterator[tuple[Path, str, str]]


def check_consumers(
    consumers: Iterable[Consumer],
    plan: ModulePlan,
    leaves: Mapping[Path, Any],
    kinds: Mapping[str, str] | None,
    base_model: str | os.PathLike[str] | None,
) -> None:
    """Checks that each of these programs loads the plan.

    The class of the model is known if `base_model` is a folder with a config.json.

    Raises:
      ValueError: If a program would refuse a module, skip it or load it otherwise.
    """
    is_folder = base_model is not None and os.path.isdir(base_model)
    model = model_class(base_model).name if is_folder and base_model else ""
    for row in consumers:
        for problems in (
            _copies(row, plan),
            _magnitudes(row, plan, leaves),
            _kinds(row, plan),
            _unsure_names(row, plan, kinds or {}),
            _tables(row, plan, model),
            _names(row, plan),
            _ranks(row, plan, leaves),
        ):
            for path, why, advice in problems:
                raise ValueError(
                    f"{path_name(path)!r} cannot be exported for {row.title} "
                    f"{row.version}: {why}. {advice}, or leave {row.name!r} out of "
                    "for_."
                )


def _copies(row: Consumer, plan: ModulePlan) -> Problems:
    """Yields what is trained in full, unless it is the one module that is loaded."""
    advice = (
        "Leave it out of also= in lorafy, write the merged model with export_weights"
    )
    for path in plan.biases:
        if not row.biases:
            yield path, "it loads no biases without their modules", advice
    if row.copies is None:
        return
    first = None
    for path, leaf in plan.copied.items():
        for name, part in leaf.modules.items():
            first = first or name
            if name not in row.copies or part.kind not in (LINEAR, VECTOR):
                loaded = " or ".join(row.copies)
                loaded = f"only a linear {loaded}" if loaded else "nothing"
                yield path, f"it loads {loaded} in full, and this is {name!r}", advice
            if name != first:
                yield path, f"it loads one module in full, and has {first!r}", advice


def _magnitudes(
    row: Consumer, plan: ModulePlan, leaves: Mapping[Path, Any]
) -> Problems:
    for path in plan.adapted:
        if not row.dora and has_magnitude(path, leaves):
            yield path, "it loads no DoRA", MERGE


def _kinds(row: Consumer, plan: ModulePlan) -> Problems:
    for path, weight in plan.adapted.items():
        for name, part in weight.modules.items():
            if part.kind.name not in row.kinds:
                why = f"{name!r} is a {KIND_WORDS[part.kind.name]}"
                yield path, why, NAME_EXPERTS if part.kind is EXPERTS else EXCLUDE


def _unsure_names(
    row: Consumer, plan: ModulePlan, kinds: Mapping[str, str]
) -> Problems:
    """Yields modules that may be GPT-2's, unless the caller gave their kind."""
    for path, weight in plan.adapted.items():
        for name in weight.modules:
            if last_part(name) not in row.unsure or any(
                matches(pattern, path) for pattern in kinds
            ):
                continue
            why = f"it transposes GPT-2's {last_part(name)!r}, and {name!r} may be one"
            line = f"kinds={{{path_name(path)!r}: 'linear'}}"
            yield path, why, f"If it is an nn.Linear in PyTorch, write {line}"


def _tables(row: Consumer, plan: ModulePlan, model: str) -> Problems:
    """Yields tables and heads that the program, or the class of model, has not."""
    if row.tables is None:
        return
    for path, weight in plan.adapted.items():
        for name, part in weight.modules.items():
            last = last_part(name)
            if part.kind in (EMBEDDING, HEAD) and last not in row.tables:
                why = f"it adapts the tables {', '.join(row.tables)}, not {name!r}"
                yield path, why, EXCLUDE
            models = row.tables.get(last)
            if model and models is not None and model not in models:
                yield path, f"it adapts no {last!r} of {model}", EXCLUDE


def _names(row: Consumer, plan: ModulePlan) -> Problems:
    """Yields modules whose names the program does not know, or takes for another's."""
    seen: dict[tuple[str, str], str] = {}
    for path, weight in plan.adapted.items():
        for name in weight.modules:
            last, layer = last_part(name), LAYER.search(name)
            if row.modules is not None and last not in row.modules:
                yield path, f"it adapts no module called {last!r}: {name!r}", EXCLUDE
            if not row.in_layers or last in (row.tables or ()):
                continue
            if layer is None:
                yield path, f"it skips {name!r}, which is in no `layers.N`", EXCLUDE
                continue
            expert = EXPERT.search(name)
            key = layer[1], f"{expert[0] if expert else ''}{last}"
            if (other := seen.setdefault(key, name)) != name:
                why = f"it loads one {last!r} of a layer, and has {other!r}"
                yield path, why, EXCLUDE


def _ranks(row: Consumer, plan: ModulePlan, leaves: Mapping[Path, Any]) -> Problems:
    for path in plan.adapted:
        r = unbox(leaves[adapter_of(path).a]).shape[-1]
        if row.max_rank is not None and r > row.max_rank:
            why = f"it loads ranks up to {row.max_rank}, not {r}"
            smaller = f"{{{path_name(path)!r}: {row.max_rank}}}"
            yield path, why, f"Write params = resize(params, {smaller})"
