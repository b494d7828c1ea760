"""`find_names`: the map of names, found in the values of a checkpoint."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax._adapters import Adapters, Axes, find_adapters, is_adapter, of_rank
from lora_jax._flax_names import is_adaptable
from lora_jax._hub.checkpoint import open_checkpoint
from lora_jax._hub.closest_tensor import describe_closest
from lora_jax._hub.equal_tensors import WeightPart, choose_modules
from lora_jax._hub.match_tensors import (
    TensorIndex,
    TensorMatch,
    match_tensors,
    values_of_leaf,
)
from lora_jax._hub.model_class import TABLES, model_class
from lora_jax._hub.module_kinds import CONV1D_NAMES
from lora_jax._hub.name_patterns import stack_template, with_stars
from lora_jax._hub.names import Name, escape_braces
from lora_jax._hub.progress import progress
from lora_jax._hub.quantized_tensors import logical_tensors
from lora_jax._patterns import Selector
from lora_jax._processes import agreed, outline
from lora_jax._targets import choose
from lora_jax._tree import (
    Path,
    PyTree,
    flatten,
    is_abstract,
    is_traced,
    leaf_name,
    listed,
    path_name,
    unbox,
)

EMBEDDINGS = ("emb", "wte", "wpe")  # in the names of PyTorch's embedding modules
SHOWN = 3  # unmatched weights that a message describes


def find_names(
    params: PyTree,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    targets: Selector | None = None,
    exclude: Selector = (),
    prefix: str | None = None,
) -> dict[str, Name]:
    """Finds which PyTorch module each weight is, in the checkpoint they came from.

    Values decide: some order of the dimensions of a tensor, or of several, is the
    weight, in every value, up to the rounding of its dtype. This finds transposed and
    reshaped kernels, with heads apart or together, stacks of layers and of experts,
    weights fused along their outputs, embeddings, tied heads and convolutions; also if
    the weights are in another dtype than the checkpoint, quantized, or on several
    devices. Nothing is returned without this comparison.

    Args:
      params: The parameters, plain or from `lorafy`: of concrete arrays, not trained
        since. With adapters, their inputs and outputs must be PyTorch's.
      checkpoint: A `.safetensors` file, a folder of them, with their index if it has
        one, or `{name: array}`. It is read a tensor at a time.
      targets: Which weights, as in `lorafy`. Default: those with adapters or trained
        copies; if there are none, all of two or more dimensions.
      exclude: Which of them not.
      prefix: The module that holds the model without its head, such as "transformer",
        where the tensors lack it. Default: by the class in the checkpoint's
        config.json, by which the head may also share the token embedding.

    Returns:
      The map that `export_peft` and `import_peft` take, a plain dict: with patterns for
      layers that repeat, `{layer}` for a stack, several names for a fused weight. An
      embedding under another name than `embedding` also needs `kinds=` there.

    Raises:
      FileNotFoundError: If there is no checkpoint, or one of its files is missing.
      ValueError: If a weight is abstract, or no tensor: the message names the closest
        one and how it differs, such as the same rows in another order, or the tensor
        plus one; if tensors are equal and their names do not decide which one it is; if
        the input in PyTorch is the output of the adapter here; if a file is truncated;
        or if another process has other weights or tensors.
      RuntimeError: If the search failed in another process, whose error it quotes.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj, numpy as np
      >>> draw = np.random.default_rng(0).standard_normal
      >>> torch = {f"layers.{i}.q_proj.weight": draw((3, 4)) for i in range(2)}
      >>> kernel = lambda i: jnp.asarray(torch[f"layers.{i}.q_proj.weight"].T)
      >>> params = {f"block_{i}": {"query": {"kernel": kernel(i)}} for i in range(2)}
      >>> lj.find_names(params, torch)
      {'block_*/query/kernel': 'layers.{}.q_proj'}
    """
    with agreed("find_names") as same:
        leaves = flatten(params)
        adapters = find_adapters(leaves) if any(map(is_adapter, leaves)) else {}
        chosen = _chosen_weights(leaves, adapters, targets, exclude)
        _check_values(chosen, leaves)
        about = model_class(checkpoint)
        tensors = logical_tensors(open_checkpoint(checkpoint))
        modules = about.module_names((t.name for t in tensors), prefix)
        head = about.tied_head(modules.values())
        tensors = [
            t._replace(name=modules[t.name])
            for t in tensors
            if t.shape  # a scalar has no rows to compare
        ]
        same["weights"] = {path_name(p): outline(unbox(leaves[p])) for p in chosen}
        same["tensors"] = [[tensor.name, tensor.shape] for tensor in tensors]
    found: dict[Path, list[TensorMatch]] = {}
    lost: dict[Path, str] = {}
    with progress("find_names", len(chosen), "weights") as tick:
        index = TensorIndex(tensors)
        for path in chosen:
            weight = values_of_leaf(unbox(leaves[path]))
            if matches := match_tensors(weight, index):
                found[path] = matches
            else:
                close = len(lost) < SHOWN
                lost[path] = describe_closest(weight, tensors) if close else ""
            tick()
    if lost:
        raise ValueError(_lost_message(lost, len(chosen)))
    wanted = {path: adapter.axes for path, adapter in of_rank(adapters).items()}
    picked = {path: _pick(path, each, wanted.get(path)) for path, each in found.items()}
    return with_stars(_names_of_matches(picked, head))


def _chosen_weights(
    leaves: dict[Path, Any],
    adapters: Adapters,
    targets: Selector | None,
    exclude: Selector,
) -> list[Path]:
    if targets is None and adapters:
        weights = [path for path in leaves if path in adapters]
    else:
        weights = [path for path, leaf in leaves.items() if is_adaptable(path, leaf)]
    return [*choose(leaves, weights, 1, targets or "*", exclude, "rank")]


def _check_values(chosen: Sequence[Path], leaves: dict[Path, Any]) -> None:
    for path in chosen:
        w, name = unbox(leaves[path]), path_name(path)
        if is_abstract(w) or is_traced(w):
            raise ValueError(
                f"{name!r} has no values to compare: it is a {type(w).__name__}. Pass "
                "concrete parameters, outside jit; or see transformers_names, which "
                "goes by paths alone."
            )
        if not math.prod(w.shape):
            raise ValueError(
                f"{name!r} is empty, of shape {w.shape}, so that no tensor can be "
                f"found for it. Write exclude=[{name!r}]."
            )


def _pick(
    path: Path, matches: Sequence[TensorMatch], wanted: Axes | None
) -> TensorMatch:
    """Returns the match with the adapter's axes; without one, the largest stack."""
    # Two matrices in one weight can be a stack of two layers, or two parts of a fused
    # weight. Names that count from 0 show a stack.
    if wanted is None:
        order = sorted(matches, key=lambda match: -len(match.cut.batch))
        return next((match for match in order if _is_counted(match)), order[-1])
    for match in matches:
        wide = lambda dims, match=match: {d for d in dims if match.shape[d] > 1}
        batch, inputs, outputs = map(wide, wanted)
        stack, rows, columns = map(wide, match.cut)
        if stack == batch and (rows, columns) == (outputs, inputs):
            return match
        if stack == batch and (rows, columns) == (inputs, outputs):
            if _has_input_rows(path, match):
                return match
    first = matches[0]
    raise ValueError(
        f"{path_name(path)!r}, of shape {first.shape}, has an adapter with the inputs "
        f"{wanted.inputs}, the outputs {wanted.outputs} and the stacked dimensions "
        f"{wanted.batch}; as {_modules(first)[0]!r} its inputs are "
        f"{first.cut.columns}, its outputs {first.cut.rows} and its stacked dimensions "
        f"{first.cut.batch}. "
        "Write lorafy(..., axes=find_axes(fn, params, *args))."
    )


def _is_counted(match: TensorMatch) -> bool:
    """Whether the names of a stack's modules count it, or are not decided yet."""
    parts = [*match.parts.values()]
    if not match.cut.batch or any(len(equals) > 1 for part in parts for equals in part):
        return True
    if len({len(part) for part in parts}) > 1:
        return False
    counts = [match.shape[d] for d in match.cut.batch]
    columns = zip(
        *([equals[0].module for equals in part] for part in parts), strict=True
    )
    return all(
        stack_template(dict(zip(match.parts, names, strict=True)), counts)
        for names in columns
    )


def _has_input_rows(path: Path, match: TensorMatch) -> bool:
    """Whether the rows in PyTorch are inputs: for embeddings and GPT-2's layers."""
    last = [name.split(".")[-1].lower() for name in _modules(match)]
    named = any(word in name for name in last for word in EMBEDDINGS)
    is_embedding = leaf_name(path) == "embedding" or named
    return is_embedding or any(name in CONV1D_NAMES for name in last)


def _modules(match: TensorMatch) -> list[str]:
    return [
        t.module for part in match.parts.values() for equals in part for t in equals
    ]


def _names_of_matches(
    matches: Mapping[Path, TensorMatch], head: str | None
) -> dict[Path, Name]:
    """Returns the name of each weight in the map, after the choice of equal tensors.

    A tied table also has the name of the head, which the checkpoint does not store.
    """
    chosen = choose_modules(
        {
            WeightPart(path, at, i): equals
            for path, match in matches.items()
            for at, part in match.parts.items()
            for i, equals in enumerate(part)
        }
    )
    if head is not None:
        for part, modules in chosen.items():
            if modules[0].split(".")[-1] in TABLES and len(modules) == 1:
                chosen[part] = (*modules, head)
    return {path: _name(path, match, chosen) for path, match in matches.items()}


def _name(
    path: Path, match: TensorMatch, chosen: Mapping[WeightPart, tuple[str, ...]]
) -> Name:
    counts = [match.shape[d] for d in match.cut.batch]
    names = {  # at each index of the stack: a tied embedding has two for its one part
        at: [
            name for i in range(len(parts)) for name in chosen[WeightPart(path, at, i)]
        ]
        for at, parts in match.parts.items()
    }
    sizes = {
        tuple(part[0].shape[0] for part in parts) for parts in match.parts.values()
    }
    templates: list[str] = []
    for column in zip(*names.values(), strict=False):
        by_index = dict(zip(names, column, strict=True))
        template = (
            stack_template(by_index, counts) if counts else escape_braces(column[0])
        )
        if template is None or len(sizes) > 1:
            raise ValueError(
                f"{path_name(path)!r} is a stack, and the names of its modules do not "
                f"count it from 0: {listed(column)}. Write the map by hand, a function "
                "of the path, or keep these layers apart."
            )
        templates.append(template)
    (widths,) = sizes
    if len(templates) == 1:
        return templates[0]
    if len({*widths}) > 1:
        return dict(zip(templates, widths, strict=True))
    return tuple(templates)


def _lost_message(lost: Mapping[Path, str], count: int) -> str:
    found = count - len(lost)
    each = "; ".join(f"{path_name(p)!r}: {why}" for p, why in lost.items() if why)
    more = f"; and {listed([*lost][SHOWN:])}" if len(lost) > SHOWN else ""
    if not found:
        share = "none of the weights is a tensor of the checkpoint"
        advice = "Is it the checkpoint of another model?"
    else:
        share = f"{len(lost)} of {count} weights are no tensors of the checkpoint, and "
        share += f"{found} are"
        advice = (
            "Pass the parameters as they came from it, or leave these out: "
            f"exclude=[{path_name(next(iter(lost)))!r}]."
        )
    return f"No map is found: {share}. {each}{more}. {advice}"
