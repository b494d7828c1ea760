"""`export_weights`: a checkpoint of PyTorch again, with the updates in its weights."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax._adapters import (
    Adapters,
    Axes,
    copy_of,
    find_adapters,
    is_adapter,
    of_copies,
    of_rank,
)
from lora_jax._engine.source import warn_user
from lora_jax._hub.checkpoint import CheckpointTensor, check_dtype, check_floating
from lora_jax._hub.folder_files import new_files, open_folder
from lora_jax._hub.merge_tensors import merged
from lora_jax._hub.model_class import MODEL_CONFIG
from lora_jax._hub.model_tensors import ModelTensors, open_model
from lora_jax._hub.module_adapters import split_adapter
from lora_jax._hub.module_kinds import Linear, ModuleAdapter
from lora_jax._hub.module_plan import trained_axes, trained_names
from lora_jax._hub.modules import MappedLeaf, ModuleSlice, leaf_to_torch
from lora_jax._hub.names import Names, each_index, name_finder
from lora_jax._hub.progress import progress
from lora_jax._hub.safetensors_writer import (
    Entry,
    file_names,
    shards,
    write_index,
    write_tensors,
)
from lora_jax._hub.tensor_sources import Source, find_sources, tensor_of
from lora_jax._merge import MOST
from lora_jax._processes import agreed, is_first, outline
from lora_jax._sample import COUNT, differ, values_at
from lora_jax._tree import (
    Path,
    PyTree,
    flatten,
    is_abstract,
    is_array,
    listed,
    path_name,
    unbox,
)
from lora_jax._write import (
    check_finite,
    check_savable,
    in_memory,
)

# The files of a checkpoint besides its weights: configs, tokenizers, code, licences.
COPIED = (
    "config.json generation_config.json *processor_config.json tokenizer* "
    "special_tokens_map.json added_tokens.json vocab.* merges.txt *.model *.tiktoken "
    "chat_template.* *.jinja *.py LICENSE* NOTICE*"
).split()


def export_weights(
    folder: str | os.PathLike[str],
    params: PyTree,
    names: Names,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    *,
    axes: Mapping[str, Axes] | None = None,
    kinds: Mapping[str, str] | None = None,
    dtype: DTypeLike | None = None,
    shard_bytes: float = 5e9,
) -> None:
    """Writes a Hugging Face checkpoint again, with the updates in its weights.

    Each adapted weight becomes W + scale * A B, with W of the checkpoint itself: also
    where the tree has it quantized, the result is exact. Magnitudes of DoRA and trained
    copies are applied too; all other tensors are copied byte for byte. Configs and
    tokenizer files are copied. transformers, vLLM and the converters of llama.cpp load
    the folder like any checkpoint.

    One tensor at a time is in memory. The folder is written completely or not at all.
    If JAX runs as several processes, all of them call this, with a folder that all of
    them see; the first one writes.

    Args:
      folder: The folder to write, which is new or empty.
      params: A tree from `lorafy`, of concrete arrays.
      names: The modules of the PyTorch model that the weights are, as in `export_peft`
        and `import_weights`: one map serves all of them.
      checkpoint: The checkpoint of the base: a folder, a `.safetensors` file, or
        `{name: array}`. Tensors in 4 bits are written as floats. Not a `.gguf` file,
        whose names nothing loads from a folder.
      axes: `{path: Axes}`, as in `import_weights`, unless `lorafy` was given them.
      kinds: `{pattern: kind}`, as in `import_weights`.
      dtype: Of all floating tensors. Default: each tensor's own.
      shard_bytes: The largest size of a file, if no tensor is larger.

    Raises:
      FileNotFoundError: If there is no checkpoint, or the folder's parent is missing.
      ValueError: If the folder holds files, a weight has no name or no tensor of its
        shape, the tensor has other values than the tree's base, or a leaf is abstract
        or not finite.
      OSError: If the folder cannot be written.
      RuntimeError: If another process failed, whose error it quotes.

    Warns:
      UserWarning: If rounding to a tensor's dtype loses most of an update.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj, numpy as np, os, tempfile
      >>> torch = {"layers.0.q_proj.weight": np.ones((3, 4), np.float32)}
      >>> params = lj.lorafy({"query": {"kernel": jnp.ones((4, 3))}}, rank=2)
      >>> folder = os.path.join(tempfile.mkdtemp(), "merged")
      >>> lj.export_weights(folder, params, {"query": "layers.0.q_proj"}, torch)
      >>> os.listdir(folder)
      ['model.safetensors']
    """
    with agreed("export_weights") as same:
        target = _empty_folder(folder) if is_first() else ""
        check_floating(dtype)
        leaves = flatten(params)
        adapters = find_adapters(leaves)
        parts = [part for adapter in adapters.values() for part in adapter]
        for part in parts:
            check_savable(part, leaves[part])
        tensors = open_model(checkpoint, gguf=False)
        for tensor in tensors.each:
            check_dtype(tensor)
        named = trained_names(leaves, adapters, names)
        known_axes = trained_axes(leaves, adapters, axes)
        sources = find_sources(leaves, named, known_axes, kinds, tensors)
        _check_frozen(leaves, adapters, names, sources, tensors)
        same["adapters"] = {path_name(p): outline(unbox(leaves[p])) for p in parts}
        same["tensors"] = [[tensor.name, tensor.shape] for tensor in tensors.each]
    leaves |= in_memory(leaves, parts)
    known = {path: _known_values(sources[path], leaves) for path in of_rank(adapters)}
    with agreed("export_weights"):
        for part in parts:
            check_finite(repr(path_name(part)), leaves[part])
        if is_first():
            changes = _changes(leaves, adapters, sources, known)
            to = None if dtype is None else jnp.dtype(dtype)
            lost = _write(target, tensors.each, changes, to, shard_bytes, checkpoint)
            if lost:
                warn_user(
                    f"Rounding loses most of the updates of {listed(lost)}. To keep "
                    "them, write export_weights(..., dtype=jnp.float32)."
                )


def _check_frozen(
    leaves: dict[Path, Any],
    adapters: Adapters,
    names: Names,
    sources: Mapping[Path, Source],
    tensors: ModelTensors,
) -> None:
    """Checks that no leaf without an update is a tensor that changes.

    A tree can have a table and a head of their own where the checkpoint has one tensor.
    """
    owner = {t.name: p for p, s in sources.items() for t in s.tensors.values()}
    find = name_finder(names)
    for path, leaf in leaves.items():
        if path in adapters or is_adapter(path) or not is_array(unbox(leaf)):
            continue
        named, shape = find(path), unbox(leaf).shape
        if named is None or len(shape) < named.stacked:
            continue
        for _, modules in each_index(path, named, shape[: named.stacked]):
            for module in modules:
                tensor = tensor_of(path, module, tensors)
                if tensor is not None and tensor.name in owner:
                    raise ValueError(
                        f"{path_name(owner[tensor.name])!r} has an update and "
                        f"{path_name(path)!r} has none, and both are the tensor "
                        f"{tensor.name!r}, so that both would change. Pass a "
                        "checkpoint that is not tied, or leave the update out."
                    )


def _empty_folder(folder: str | os.PathLike[str]) -> str:
    """Returns the full path of a folder that is new or empty."""
    path = open_folder(folder)
    if os.path.isdir(path) and (files := os.listdir(path)):
        raise ValueError(
            f"{path} holds files: {listed(sorted(files))}. Export to a new folder."
        )
    return path


class Change(NamedTuple):
    """What becomes of a tensor: an update, or other values."""

    leaf: MappedLeaf
    kind: Linear
    known: np.ndarray | None  # values of the tree's own weight
    places: tuple[np.ndarray, ...]  # where these are in the matrix of the module
    adapter: ModuleAdapter | None = None
    values: np.ndarray | None = None


def _known_values(
    source: Source, leaves: dict[Path, Any]
) -> dict[str, tuple[np.ndarray | None, tuple[np.ndarray, ...]]]:
    """Returns some values of each module, and their places in its matrix.

    If the leaf spans processes, all of them must call this.
    """
    leaf = source.leaf
    w = unbox(leaves[leaf.path])
    found = {}
    for name, part in leaf.modules.items():
        places, index = _places(leaf, part)
        values = None if is_abstract(w) else values_at(w, index)
        found[name] = values, places
    return found


def _places(
    leaf: MappedLeaf, part: ModuleSlice
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Returns places in the matrix of a module, and those in its leaf."""
    batch, n_in, n_out = leaf.matrix
    start, stop, _ = part.outputs.indices(n_out)
    inner = batch[len(part.stack_index) :]
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(n, size=COUNT)
    each = [draw(n) for n in (*inner, n_in, stop - start)]
    *experts, i, o = each
    index: list[Any] = [None] * len(leaf.shape)
    at = [*(np.full(COUNT, k) for k in part.stack_index), *experts]
    for d, k in zip(leaf.axes.batch, at, strict=True):
        index[d] = k
    for dims, k in ((leaf.axes.inputs, i), (leaf.axes.outputs, o + start)):
        for d, x in zip(dims, np.unravel_index(k, leaf.sizes(dims)), strict=True):
            index[d] = x
    return tuple(each), tuple(index)


def _changes(
    leaves: dict[Path, Any],
    adapters: Adapters,
    sources: Mapping[Path, Source],
    known: Mapping[Path, Any],
) -> dict[str, Change]:
    """Returns the changes of tensors by their names in the file."""
    changes: dict[str, Change] = {}
    for path, adapter in of_rank(adapters).items():
        leaf, tensors = sources[path].leaf, sources[path].tensors
        arrays = adapter.map(leaves.__getitem__)
        modules = split_adapter(leaf, arrays)
        for name, part in leaf.modules.items():
            if name in tensors and name in modules:
                values, places = known[path][name]
                change = Change(leaf, part.kind, values, places, modules[name])
                _add(changes, tensors[name].name, change)
    for path in of_copies(adapters):
        leaf, tensors = sources[path].leaf, sources[path].tensors
        for name, x in leaf_to_torch(leaf, leaves[copy_of(path).w]).items():
            if name in tensors:
                x = x.reshape(tensors[name].shape)
                change = Change(leaf, leaf.modules[name].kind, None, (), values=x)
                _add(changes, tensors[name].name, change)
    return changes


def _add(changes: dict[str, Change], tensor: str, change: Change) -> None:
    other = changes.setdefault(tensor, change)
    if other is not change and other.leaf.path != change.leaf.path:
        raise ValueError(
            f"{path_name(other.leaf.path)!r} and {path_name(change.leaf.path)!r} are "
            f"both the tensor {tensor!r}, and each has an adapter. The checkpoint is "
            "tied: it has room for one. Leave one of them out."
        )


def _write(
    target: str,
    tensors: list[CheckpointTensor],
    changes: Mapping[str, Change],
    dtype: Any,
    shard_bytes: float,
    checkpoint: Any,
) -> list[str]:
    """Writes the folder, and returns the names of tensors that lost their update."""
    lost: list[str] = []
    cast = lambda t: dtype is not None and jnp.issubdtype(t.dtype, jnp.floating)
    by_name = {t.name: t for t in tensors}
    entries = [
        Entry(t.name, t.shape, dtype.name if cast(t) else t.dtype) for t in tensors
    ]
    each = shards(entries, shard_bytes)
    files = dict(zip(file_names(len(each)), each, strict=True))

    def arrays(part: list[Entry], tick: Callable[[], None]) -> Iterator[np.ndarray]:
        for entry in part:
            x = by_name[entry.name].read(())
            change, to = changes.get(entry.name), jnp.dtype(entry.dtype)
            if change is not None:
                x = _changed(entry.name, x, change, to, lost)
            yield _cast(entry.name, np.asarray(x), to)
            tick()

    with (
        new_files(target) as folder,
        progress("export_weights", len(entries), "tensors") as tick,
    ):
        for file, part in files.items():
            write_tensors(os.path.join(folder, file), part, arrays(part, tick))
        if len(files) > 1:
            write_index(folder, files)
        quantized = any(t.format is not None for t in tensors)
        _copy_files(folder, checkpoint, dtype, quantized)
    return lost


def _changed(
    name: str, x: np.ndarray, change: Change, dtype: Any, lost: list[str]
) -> np.ndarray:
    if change.values is not None:
        return _cast(name, change.values, dtype)
    assert change.adapter is not None
    matrix = change.kind.weight_from_torch(x)
    found = np.asarray(matrix[change.places])
    if change.known is not None and (error := differ(found, change.known)):
        raise ValueError(
            f"{path_name(change.leaf.path)!r} has other values than the tensor "
            f"{name!r} (relative error {error:.2g}): the adapter was trained on "
            "another checkpoint. Pass that one."
        )
    leaf = change.leaf
    inputs = leaf.sizes(leaf.axes.inputs)
    y, off, update = merged(x, change.adapter, change.kind, inputs, dtype)
    if not np.isfinite(y).all():
        raise ValueError(_out_of_range(f"The merged tensor {name!r}", dtype))
    if update and math.sqrt(off / update) > MOST:
        lost.append(name)
    return y


def _cast(name: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a tensor in a dtype, in which all that is finite must stay so."""
    if x.dtype == dtype or not jnp.issubdtype(dtype, jnp.floating):
        return x.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        y = x.astype(dtype)
    if not np.array_equal(np.isfinite(x), np.isfinite(y)):
        raise ValueError(_out_of_range(f"The tensor {name!r}", dtype))
    return y


def _out_of_range(what: str, dtype: np.dtype) -> str:
    return (
        f"{what} is not finite in {dtype.name}. Write dtype=jnp.float32, or "
        "jnp.bfloat16, which has the same range."
    )


def _copy_files(folder: str, checkpoint: Any, dtype: Any, quantized: bool) -> None:
    """Copies the files next to the weights, with a config of the new tensors."""
    if isinstance(checkpoint, Mapping):
        return
    path = os.fspath(checkpoint)
    source = path if os.path.isdir(path) else os.path.dirname(path)
    for name in sorted(os.listdir(source)):
        wanted = any(fnmatchcase(name, pattern) for pattern in COPIED)
        if wanted and os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))
    config = os.path.join(folder, MODEL_CONFIG)
    if not os.path.isfile(config) or (dtype is None and not quantized):
        return
    with open(config, encoding="utf-8") as file:
        fields = json.load(file)
    if quantized:
        fields.pop("quantization_config", None)
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in fields else "dtype"
        fields[key] = dtype.name
    with open(config, "w", encoding="utf-8") as file:
        file.write(json.dumps(fields, indent=2) + "\n")
