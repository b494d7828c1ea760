"""Adapters to one small file and back: all of it, exactly, or an error.

The file is safetensors: no code can hide in it. Its header's one entry, `lora_jax`, is
JSON: the format's version, each adapter's weight path, rank, scale and weight shape,
the trained copies, a sample of each adapted weight, and digests.
"""

import functools
import hashlib
import json
import os
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
    adapters_if_any,
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
from lora_jax._tree import Path, flatten, path_name, unbox
from lora_jax._write import (
    check_finite,
    check_savable,
    check_target,
    in_memory,
    write,
)

VERSION = 2


def save(path: str | os.PathLike[str], params: Any) -> None:
    """Saves the adapters, and nothing else, to one `.safetensors` file.

    That is `detach(params)`: factors, scales and trained copies. The file also knows
    its base, by 32 values of each weight that has factors. It appears whole or not at
    all: it is written beside its target, synced to the disk and renamed, so that a
    crash leaves the old file or the new one. Where JAX runs as several processes, all
    of them call this, with a path in a folder that all see; the first writes, and all
    return when the file is there.

    Args:
      path: The file. An old one is replaced; its folder must exist.
      params: A tree from `lorafy`, trained or not, whose adapters are concrete arrays.

    Raises:
      ValueError: If `params` has no adapters or a broken one, a leaf to save is
        abstract, not finite, or of a dtype the format lacks, `path` is no regular
        file, or another process has other adapters. What was there is then untouched.
      OSError: If the file cannot be written.
      RuntimeError: If it failed in another process, of which it tells.

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
        if not adapters_if_any(leaves, stacks=True):
            raise ValueError(
                "These parameters are quantized and have no adapters, and save stores "
                "adapters alone. Write orbax.checkpoint.StandardCheckpointer().save("
                "path, params), or params = lorafy(params, rank) first."
            )
        adapters = find_adapters(leaves)
        parts = [part for own in adapters.values() for part in own]
        for part in parts:
            check_savable(part, leaves[part])
        needed = (*parts, *of_rank(adapters))  # of these weights there are samples
        same["adapters"] = {path_name(p): outline(unbox(leaves[p])) for p in needed}
    found = in_memory(leaves, parts)
    samples = {path_name(p): sample(unbox(leaves[p])) for p in of_rank(adapters)}
    tensors = {path_name(part): x for part, x in found.items()}
    with agreed("save"):
        for name, x in tensors.items():
            check_finite(repr(name), x)
        if is_first():
            header = _said(leaves, adapters, tensors, samples)
            metadata = {"lora_jax": json.dumps(header, sort_keys=True)}
            write(path, safetensors.numpy.save(tensors, metadata=metadata))


def _said(
    leaves: dict[Path, Any],
    adapters: Adapters,
    tensors: dict[str, np.ndarray],
    samples: dict[str, np.ndarray | None],
) -> dict[str, Any]:
    """The header of a file."""
    said = {name: x.tobytes().hex() for name, x in samples.items() if x is not None}
    shape = lambda path: list(unbox(leaves[path]).shape)
    return {
        "version": VERSION,
        "adapters": {
            path_name(weight): {
                "tensors": list(map(path_name, own)),
                "rank": shape(own.a)[-1],
                "scale": tensors[path_name(own.scale)].tolist(),
                "shape": shape(weight),
            }
            for weight, own in of_rank(adapters).items()
        },
        "copies": {
            path_name(leaf): {"tensors": [path_name(own.w)], "shape": shape(leaf)}
            for leaf, own in of_copies(adapters).items()
        },
        "samples": said,
        "sha256": {name: _digest(x) for name, x in tensors.items()},
        "samples_sha256": _digest_of(said),
    }


def load(path: str | os.PathLike[str], base: Any, *, same_base: bool = True) -> Any:
    """Puts the adapters of a file beside the weights they were trained for.

    That is `attach(adapters, base)`, and more: the file knows its base. Of each adapted
    weight it has some values, and those of `base` must be the same up to a cast or a
    quantisation to four bits or more. (So weights that were trained further a little,
    by less than quantising changes them, pass too.)

    Args:
      path: A file from `save`.
      base: The plain parameters: the tree of `strip`, before `lorafy`. Adapters take
        their boxes and shardings from it, as in `lorafy`. Abstract weights are not
        compared. Or a plain live `nnx.Module`.
      same_base: `False` allows a base of any values.

    Returns:
      A new tree that shares all leaves of `base`, with the adapters and the trained
      copies beside them. For a live module it is a `LoRA` around a copy of it.

    Raises:
      ValueError: If the file is truncated, foreign, written by a newer version,
        tampered with or not finite, an adapter finds no weight of its shape, or the
        weight is another than that it was trained for, or another process has another
        file; the message names the file and the path. Nothing is loaded then.
      FileNotFoundError: If there is no file.
      RuntimeError: If it failed in another process, of which it tells.

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
        paths = {path_name(p): p for p in leaves}
        weights, copies = _placed(path, header, tensors, paths, leaves)
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


def _placed(
    path: Any,
    header: dict[str, Any],
    tensors: dict[str, np.ndarray],
    paths: dict[str, Path],
    leaves: dict[Path, Any],
) -> tuple[dict[str, tuple[Path, LowRank[np.ndarray]]], dict[Path, np.ndarray]]:
    """Each weight's adapter and each leaf's copy in the file, which fit base."""
    weights, copies = {}, {}
    for name, adapter in header["adapters"].items():
        names = LowRank(*adapter["tensors"])
        dora = names.magnitude is not None
        parts_of = functools.partial(adapter_of, magnitude=dora)
        weight = _find(path, name, paths, leaves, adapter, parts_of)
        values = names.map(tensors.__getitem__)
        shape, shapes = unbox(leaves[weight]).shape, values.map(np.shape)
        if not fits(shape, *shapes):
            raise ValueError(
                f"{path} was tampered with: the factors of {name!r}, of shapes "
                f"{[*shapes]}, make no update of its weight {shape}."
            )
        weights[name] = weight, with_axes(values, shape, shapes)
    for name, copy in header["copies"].items():
        (part,) = copy["tensors"]
        leaf = _find(path, name, paths, leaves, copy, copy_of)
        check_copy(f"{path}: {part}", tensors[part], leaves[leaf])
        copies[leaf] = tensors[part]
    return weights, copies


def _find(
    path: Any,
    name: str,
    paths: dict[str, Path],
    leaves: dict[Path, Any],
    said: dict[str, Any],
    parts_of: Any,
) -> Path:
    """The leaf of base that an entry of the header speaks of."""
    w = unbox(leaves[paths[name]]) if name in paths else None
    if w is None:
        raise ValueError(
            f"{path}: base has no weight {name!r}. It has {sorted(paths)[:6]}. "
            "Pass the parameters that the adapter was trained for."
        )
    if list(w.shape) != said["shape"]:
        raise ValueError(
            f"{path}: {name!r} was saved for the shape {tuple(said['shape'])}, and "
            f"base has {w.shape}. Pass the parameters that the adapter was trained for."
        )
    parts = parts_of(paths[name])
    if said["tensors"] not in (list(map(path_name, parts)), said.get("old")):
        raise ValueError(
            f"{path} was tampered with: {said['tensors']} are not the adapter's "
            f"leaves of {name!r}."
        )
    own = adapter_of(paths[name], magnitude=True)
    if any(part in leaves for part in (*own, *copy_of(paths[name]))):
        raise ValueError(
            f"{path}: {name!r} has an adapter in base already. Pass the plain "
            "parameters: load(path, strip(params))."
        )
    return paths[name]


def _check_base(
    path: Any, name: str, found: np.ndarray | None, known: np.ndarray | None
) -> None:
    if known is None or found is None:
        return
    if off := differ(found, known):
        far = f"{off:.0%} off it" if np.isfinite(off) else "nothing like it"
        raise ValueError(
            f"{path} was trained on another base: {name!r} is not the weight that its "
            f"adapter stood beside, but {far} in the values compared. Pass "
            "the parameters that the adapter was trained for, or write "
            "load(path, base, same_base=False) if any will do."
        )


def _read(path: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and tensors of a file, checked against each other."""
    path = os.fspath(path)
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder. Pass the file in it.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = _header(path, file.metadata())
            names, expected = set(file.keys()), set()
            for entry in (*header["adapters"].values(), *header["copies"].values()):
                expected.update(entry["tensors"])
            for name in sorted(names ^ expected):
                what = "is missing" if name in expected else "belongs to no adapter"
                raise ValueError(f"{path} was tampered with: tensor {name!r} {what}.")
            for name in sorted(header["sha256"].keys() - names):
                raise ValueError(f"{path} was tampered with: {name!r} was cut out.")
            tensors = {name: file.get_tensor(name) for name in sorted(names)}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file: {error}. "
            "It may be truncated; save the adapter again."
        ) from error
    for name, x in tensors.items():
        if header["sha256"].get(name) != _digest(x):
            raise ValueError(f"{path} was tampered with: tensor {name!r} has changed.")
        check_finite(f"{path}: tensor {name!r}", x)
        if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
            raise ValueError(
                f"{path}: tensor {name!r} is {x.dtype}, which JAX would cut short now. "
                "Write jax.config.update('jax_enable_x64', True)."
            )
    for name, adapter in header["adapters"].items():
        parts = LowRank(*adapter["tensors"])
        rank, scale = tensors[parts.a].shape[-1:], tensors[parts.scale].tolist()
        if rank != (adapter["rank"],) or scale != adapter["scale"]:
            raise ValueError(
                f"{path} was tampered with: its header and its tensors differ in the "
                f"rank or scale of {name!r}."
            )
    for name, copy in header["copies"].items():
        # Version 1 keeps no shape of a leaf, but the leaf itself under its own name.
        copy.setdefault("shape", list(tensors[copy["tensors"][0]].shape))
        copy.setdefault("old", copy["tensors"] if copy["tensors"] == [name] else None)
    return header, tensors


def _header(path: str, metadata: dict[str, str] | None) -> dict[str, Any]:
    if "lora_jax" not in (metadata or {}):
        raise ValueError(
            f"{path} was not written by lora_jax.save: its header does not say so."
        )
    try:
        said = json.loads(metadata["lora_jax"])
        version = said["version"]
        sound = type(version) is int and version > 0
        if sound and version <= VERSION:
            fields = ("tensors", "rank", "scale", "shape")
            adapters = _entries(said["adapters"], fields, (3, 4))
            if version == 1:
                copies = {str(name): {"tensors": [str(name)]} for name in said["also"]}
                samples = {}
            else:
                copies = _entries(said["copies"], ("tensors", "shape"), (1,))
                samples = _samples(said)
                sound = samples is not None
            sound = sound and bool(adapters or copies)
            digests = dict(said["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} was tampered with: its header cannot be read ({error!r})."
        ) from error
    if sound and version > VERSION:
        raise ValueError(
            f"{path} has format version {version}, and this lora_jax reads up to "
            f"{VERSION}. Upgrade: pip install -U lora_jax."
        )
    if not sound:
        raise ValueError(f"{path} was tampered with: its header cannot be read.")
    return {
        "adapters": adapters,
        "copies": copies,
        "samples": samples,
        "sha256": digests,
    }


def _entries(
    said: dict[str, Any], fields: tuple[str, ...], counts: tuple[int, ...]
) -> dict[str, dict[str, Any]]:
    """The header's word on each adapter, or copy; raises if it is none."""
    entries = {str(n): {field: x[field] for field in fields} for n, x in said.items()}
    for entry in entries.values():
        names = entry["tensors"]
        if len(names) not in counts or any(type(part) is not str for part in names):
            raise TypeError(entry["tensors"])
        if any(type(n) is not int for n in entry["shape"]):
            raise TypeError(entry["shape"])
    return entries


def _samples(said: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """The values of each weight; `None` if they have been changed."""
    given = said["samples"]
    if said["samples_sha256"] != _digest_of(given):
        return None
    samples = {
        str(name): np.frombuffer(bytes.fromhex(text), jnp.bfloat16)
        for name, text in given.items()
    }
    whole = all(x.size in (0, COUNT) for x in samples.values())
    return samples if whole and given.keys() <= said["adapters"].keys() else None


def _digest_of(samples: Any) -> str:
    return hashlib.sha256(json.dumps(samples, sort_keys=True).encode()).hexdigest()


def _digest(x: np.ndarray) -> str:
    said = f"{x.dtype.name} {x.shape}".encode()
    return hashlib.sha256(said + np.ascontiguousarray(x).tobytes()).hexdigest()
