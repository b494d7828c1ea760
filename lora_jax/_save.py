"""Saves adapters to one safetensors file and loads them: exactly, or with an error.

The header of the file has one entry, `lora_jax`. It is JSON: the format version; path,
shape, rank and scale of each adapted weight; path and shape of each leaf with a trained
copy; a sample of each adapted weight; and SHA-256 digests. Safetensors holds no code.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from lora_jax._adapters import (
    Adapters,
    LowRank,
    adapter_of,
    adapters_or_quantized,
    check_copy,
    copy_of,
    find_adapters,
    fits,
    of_copies,
    of_rank,
    with_axes,
)
from lora_jax._detach import attached
from lora_jax._leaves import adapter_leaves, trained_copy
from lora_jax._processes import agreed, is_first, outline
from lora_jax._sample import COUNT, differ, sample
from lora_jax._tree import Path, PyTree, flatten, path_name, unbox
from lora_jax._write import (
    check_finite,
    check_savable,
    check_target,
    in_memory,
    write,
)

VERSION = 2
StrPath = str | os.PathLike[str]


def save(path: StrPath, params: PyTree) -> None:
    """Saves the adapters, and nothing else, to one `.safetensors` file.

    The file contains the leaves of `detach(params)` (factors, scales, trained copies)
    and 32 values of each weight with factors, by which `load` recognizes the base. It
    is written next to its target, synced to disk and renamed: after a crash there is
    either the old file or the new one. In a program of several JAX processes, all of
    them call this with a path in a shared folder; the first one writes, and all return
    once the file exists.

    Args:
      path: The file. An existing one is replaced; its folder must exist.
      params: A tree from `lorafy`, trained or not, whose adapters are concrete arrays.

    Raises:
      ValueError: If `params` has no adapters or a broken one; if a leaf to save is
        abstract, not finite, or of a dtype that the format lacks; if `path` is no
        regular file; or if another process has other adapters. An existing file then
        stays as it was.
      OSError: If the file cannot be written.
      RuntimeError: If saving failed in another process, with that process's message.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj, os, tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "adapter.safetensors")
      >>> base = {"kernel": jnp.ones((4, 3))}
      >>> lj.save(path, lj.lorafy(base, rank=2))
      >>> sorted(lj.load(path, base))
      ['kernel', 'lora_a', 'lora_b', 'lora_scale']
    """
    with agreed("save") as same:
        if is_first():
            check_target(path)
        leaves = flatten(params)
        if not adapters_or_quantized(leaves, stacks=True):
            raise ValueError(
                "save stores only adapters, and these quantized parameters have none. "
                "Write orbax.checkpoint.StandardCheckpointer().save(path, params), or "
                "params = lorafy(params, rank) first."
            )
        adapters = find_adapters(leaves)
        parts = [part for adapter in adapters.values() for part in adapter]
        for part in parts:
            check_savable(part, leaves[part])
        needed = (*parts, *of_rank(adapters))  # weights with factors are sampled
        same["adapters"] = {path_name(p): outline(unbox(leaves[p])) for p in needed}
    found = in_memory(leaves, parts)
    samples = {path_name(p): sample(unbox(leaves[p])) for p in of_rank(adapters)}
    tensors = {path_name(part): x for part, x in found.items()}
    with agreed("save"):
        for name, x in tensors.items():
            check_finite(repr(name), x)
        if is_first():
            header = _header(leaves, adapters, tensors, samples)
            metadata = {"lora_jax": json.dumps(header, sort_keys=True)}
            write(path, safetensors.numpy.save(tensors, metadata=metadata))


def _header(
    leaves: dict[Path, Any],
    adapters: Adapters,
    tensors: dict[str, np.ndarray],
    samples: dict[str, np.ndarray | None],
) -> dict[str, Any]:
    """Returns the header's entry for adapters, their tensors and weight samples."""
    encoded = {name: x.tobytes().hex() for name, x in samples.items() if x is not None}
    shape = lambda path: list(unbox(leaves[path]).shape)
    return {
        "version": VERSION,
        "adapters": {
            path_name(weight): {
                "tensors": list(map(path_name, adapter)),
                "rank": shape(adapter.a)[-1],
                "scale": tensors[path_name(adapter.scale)].tolist(),
                "shape": shape(weight),
            }
            for weight, adapter in of_rank(adapters).items()
        },
        "copies": {
            path_name(leaf): {"tensors": [path_name(adapter.w)], "shape": shape(leaf)}
            for leaf, adapter in of_copies(adapters).items()
        },
        "samples": encoded,
        "sha256": {name: _tensor_digest(x) for name, x in tensors.items()},
        "samples_sha256": _samples_digest(encoded),
    }


def load(path: StrPath, base: PyTree, *, same_base: bool = True) -> PyTree:
    """Puts the adapters of a file next to the weights that they were trained for.

    This is `attach(adapters, base)` with a check of the base: the file contains some
    values of each weight with factors, and those of `base` must equal them up to a cast
    or a quantization to 4 bits or more. (Weights that were trained further, by less
    than quantization changes them, therefore pass too.)

    Args:
      path: A file from `save`.
      base: The plain parameters: the tree of `strip`, before `lorafy`. Adapters take
        their boxes and shardings from it, as in `lorafy`. Abstract weights are not
        compared. Or a plain live `nnx.Module`.
      same_base: `False` accepts a base with any values.

    Returns:
      A new tree that shares all leaves of `base`, with the adapters and the trained
      copies next to them. For a live module it is a `LoRA` around a copy of the module.

    Raises:
      ValueError: If the file is truncated, foreign, of another format version, corrupt
        or not finite; if `base` has no weight of the saved path and shape, or one with
        other values; or if another process has another file. The message names the file
        and the path.
      FileNotFoundError: If there is no file.
      RuntimeError: If loading failed in another process, with that process's message.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj, os, tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "adapter.safetensors")
      >>> params = lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2)
      >>> lj.save(path, params)
      >>> lj.load(path, lj.strip(params))["lora_a"].shape
      (4, 2)
    """
    with agreed("load") as same:
        header, tensors = _read(path)
        leaves = flatten(base)
        weights, copies = _matched(path, header, tensors, leaves)
        plain = {name: unbox(leaves[weight]) for name, (weight, _) in weights.items()}
        same["file"] = header
        same["base"] = {name: outline(w) for name, w in plain.items()}
    samples = {name: sample(w) for name, w in plain.items()} if same_base else {}
    with agreed("load"):
        for name, found in samples.items():
            _check_base(path, name, found, header["samples"].get(name))
    new: dict[Path, Any] = {}
    for weight, values in weights.values():
        new |= adapter_leaves(weight, leaves[weight], values)
    for leaf, copy in copies.items():
        new[copy_of(leaf).w] = trained_copy(leaves[leaf], copy)
    return attached(base, leaves, new)


def _matched(
    file: StrPath,
    header: dict[str, Any],
    tensors: dict[str, np.ndarray],
    leaves: dict[Path, Any],
) -> tuple[dict[str, tuple[Path, LowRank[np.ndarray]]], dict[Path, np.ndarray]]:
    """Finds the leaf of base for each adapter and each trained copy of a file.

    Returns:
      `{name of weight: (its path, its adapter)}`, and `{path of leaf: trained copy}`.

    Raises:
      ValueError: If a leaf is missing, or an adapter or copy does not fit it.
    """
    weights, copies = {}, {}
    paths = {path_name(path): path for path in leaves}
    for name, entry in header["adapters"].items():
        names = LowRank(*entry["tensors"])
        weight = _leaf_of(file, name, entry, paths, leaves)
        wanted = adapter_of(weight, magnitude=names.magnitude is not None)
        _check_names(file, name, entry, wanted)
        values = names.map(tensors.__getitem__)
        shape, shapes = unbox(leaves[weight]).shape, values.map(np.shape)
        if not fits(shape, *shapes):
            raise ValueError(
                f"{file} is corrupt: factors of shapes {[*shapes]} do not fit the "
                f"weight {name!r} of shape {shape}."
            )
        weights[name] = weight, with_axes(values, shape, shapes)
    for name, entry in header["copies"].items():
        leaf = _leaf_of(file, name, entry, paths, leaves)
        _check_names(file, name, entry, copy_of(leaf))
        (part,) = entry["tensors"]
        check_copy(f"{file}: {part}", tensors[part], leaves[leaf])
        copies[leaf] = tensors[part]
    return weights, copies


def _leaf_of(
    file: StrPath,
    name: str,
    entry: dict[str, Any],
    paths: dict[str, Path],
    leaves: dict[Path, Any],
) -> Path:
    """Returns the path of the leaf that an entry of the header belongs to."""
    path = paths.get(name)
    if path is None or (w := unbox(leaves[path])) is None:
        raise ValueError(
            f"{file}: base has no weight {name!r}. It has {sorted(paths)[:6]}. "
            "Pass the parameters that the adapter was trained for."
        )
    if list(w.shape) != entry["shape"]:
        raise ValueError(
            f"{file}: {name!r} was saved for the shape {tuple(entry['shape'])}, and "
            f"base has {w.shape}. Pass the parameters that the adapter was trained for."
        )
    if any(p in leaves for p in (*adapter_of(path, magnitude=True), *copy_of(path))):
        raise ValueError(
            f"{file}: {name!r} already has an adapter in base. Pass the plain "
            "parameters: load(path, strip(params))."
        )
    return path


def _check_names(
    file: StrPath, name: str, entry: dict[str, Any], parts: Iterable[Path]
) -> None:
    if entry["tensors"] != [path_name(part) for part in parts]:
        raise ValueError(
            f"{file} is corrupt: {entry['tensors']} are not the adapter leaves of "
            f"{name!r}."
        )


def _check_base(
    file: StrPath, name: str, found: np.ndarray | None, saved: np.ndarray | None
) -> None:
    if found is None or saved is None:
        return
    if off := differ(found, saved):
        far = f" by {off:.0%}" if np.isfinite(off) else ""
        raise ValueError(
            f"{file} was trained on another base: the values compared of {name!r} "
            f"differ{far}. Pass the parameters that the adapter was trained for, or "
            "write load(path, base, same_base=False) to accept any values."
        )


def _read(path: StrPath) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the header and the tensors of a file, checked against each other."""
    path = os.fspath(path)
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder. Pass the file in it.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = _read_header(path, file.metadata())
            names, expected = set(file.keys()), set()
            for entry in (*header["adapters"].values(), *header["copies"].values()):
                expected.update(entry["tensors"])
            for name in sorted(names ^ expected):
                what = "is missing" if name in expected else "belongs to no adapter"
                raise ValueError(f"{path} is corrupt: tensor {name!r} {what}.")
            for name in sorted(header["sha256"].keys() - names):
                raise ValueError(f"{path} is corrupt: tensor {name!r} was removed.")
            tensors = {name: file.get_tensor(name) for name in sorted(names)}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file: {error}. "
            "It may be truncated; save the adapter again."
        ) from error
    for name, x in tensors.items():
        if header["sha256"].get(name) != _tensor_digest(x):
            raise ValueError(f"{path} is corrupt: tensor {name!r} has changed.")
        check_finite(f"{path}: tensor {name!r}", x)
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
            raise ValueError(
                f"{path}: tensor {name!r} is {x.dtype}, which JAX would truncate now. "
                "Write jax.config.update('jax_enable_x64', True)."
            )
    for name, entry in header["adapters"].items():
        adapter = LowRank(*entry["tensors"]).map(tensors.__getitem__)
        if (
            adapter.a.shape[-1:] != (entry["rank"],)
            or adapter.scale.tolist() != entry["scale"]
        ):
            raise ValueError(
                f"{path} is corrupt: its header and its tensors differ in the rank or "
                f"scale of {name!r}."
            )
    return header, tensors


def _read_header(path: str, metadata: dict[str, str] | None) -> dict[str, Any]:
    """Returns the header's entry, with arrays for samples; checks its types and digest.

    A header is never partly used: whatever JSON it is, it parses or raises here.
    """
    if metadata is None or "lora_jax" not in metadata:
        raise ValueError(
            f"{path} was not written by lora_jax.save: its header has no entry of it."
        )
    try:
        header = json.loads(metadata["lora_jax"])
        version = header["version"]
        if version == VERSION:
            header = {
                "adapters": _entries(header["adapters"], ("rank", "scale"), (3, 4)),
                "copies": _entries(header["copies"], (), (1,)),
                "samples": _samples(header),
                "sha256": dict(header["sha256"]),
            }
            if not (header["adapters"] or header["copies"]):
                raise ValueError("no adapters")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is corrupt: its header cannot be read ({error!r})."
        ) from error
    if version != VERSION:
        raise ValueError(
            f"{path} has format version {version}, and this lora_jax reads version "
            f"{VERSION}. Upgrade, pip install -U lora_jax, or save the adapter again."
        )
    return header


def _entries(
    given: dict[str, Any], fields: tuple[str, ...], counts: tuple[int, ...]
) -> dict[str, dict[str, Any]]:
    """Returns the header's entries for adapters, or for copies.

    Raises:
      Any error of a wrong type or a missing field, which `_read_header` converts.
    """
    fields = ("tensors", "shape", *fields)
    entries = {str(n): {field: x[field] for field in fields} for n, x in given.items()}
    for entry in entries.values():
        names = entry["tensors"]
        if len(names) not in counts or any(type(part) is not str for part in names):
            raise TypeError(names)
        if any(type(n) is not int for n in entry["shape"]):
            raise TypeError(entry["shape"])
    return entries


def _samples(header: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the sample of each weight, (COUNT,) in bfloat16; empty weights have (0,).

    Raises:
      ValueError: If the samples have changed since they were written.
    """
    given = header["samples"]
    samples = {
        name: np.frombuffer(bytes.fromhex(text), jnp.bfloat16)
        for name, text in given.items()
    }
    sizes = {x.size for x in samples.values()}
    known = given.keys() <= header["adapters"].keys()
    if header["samples_sha256"] != _samples_digest(given) or not (
        known and sizes <= {0, COUNT}
    ):
        raise ValueError("samples have changed")
    return samples


def _samples_digest(samples: Any) -> str:
    return hashlib.sha256(json.dumps(samples, sort_keys=True).encode()).hexdigest()


def _tensor_digest(x: np.ndarray) -> str:
    head = f"{x.dtype.name} {x.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(x).tobytes()).hexdigest()
