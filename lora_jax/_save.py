"""Adapters to one small file and back: all of it, exactly, or an error.

The file is safetensors: no code can hide in it. Its header's one entry, `lora_jax`, is
JSON: the format's version, each adapter's weight path, rank, scale and weight shape,
and a digest of each tensor.
"""

import contextlib
import hashlib
import json
import os
import uuid
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from lora_jax._adapters import Adapter, adapter_of, axes_of_shapes, find_adapters, fits
from lora_jax._lorafy import beside, place
from lora_jax._split import trainable
from lora_jax._targets import Patterns
from lora_jax._tree import Path, flatten, path_name, rebox, unbox, unflatten

VERSION = 1
DTYPES = ("float64", "float32", "float16", "bfloat16")


def save(path: str | os.PathLike[str], params: Any, *, also: Patterns = ()) -> None:
    """Saves the adapters, and nothing else, to one `.safetensors` file.

    The file appears whole or not at all: it is written beside its target, synced to the
    disk and renamed, so that a crash leaves the old file or the new one.

    Args:
      path: The file. An old one is replaced; its folder must exist.
      params: A tree from `lorafy`, trained or not, of concrete arrays.
      also: Patterns of further leaves to save, as in `split`.

    Raises:
      ValueError: If `params` has no adapters or a broken one, a pattern of `also`
        matches nothing, or a leaf to save is abstract, not finite, or of a dtype the
        format lacks. The old file is then untouched.
      OSError: If the file cannot be written.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj, os, tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "adapter.safetensors")
      >>> base = {"kernel": jnp.ones((4, 3))}
      >>> lj.save(path, lj.lorafy(base, rank=2))
      >>> sorted(lj.load(path, base))
      ['kernel', 'lora_a', 'lora_b', 'lora_scale']
    """
    leaves = flatten(params)
    adapters = find_adapters(leaves)
    parts = {part for adapter in adapters.values() for part in adapter}
    more = sorted(map(path_name, trainable(leaves, also) - parts))
    tensors = {
        path_name(part): concrete(part, leaves[part])
        for part in leaves
        if part in parts or path_name(part) in more
    }
    header = {
        "version": VERSION,
        "adapters": {
            path_name(weight): {
                "tensors": list(map(path_name, adapter)),
                "rank": unbox(leaves[adapter.a]).shape[-1],
                "scale": tensors[path_name(adapter.scale)].tolist(),
                "shape": list(unbox(leaves[weight]).shape),
            }
            for weight, adapter in adapters.items()
        },
        "also": more,
        "sha256": {name: _digest(x) for name, x in tensors.items()},
    }
    metadata = {"lora_jax": json.dumps(header, sort_keys=True)}
    write(path, safetensors.numpy.save(tensors, metadata=metadata))


def load(path: str | os.PathLike[str], base: Any) -> Any:
    """Puts the adapters of a file beside the weights they were trained for.

    Args:
      path: A file from `save`.
      base: The plain parameters: the tree of `strip`, before `lorafy`. Adapters take
        their boxes and shardings from it, as in `lorafy`.

    Returns:
      A new tree with the adapters, and with the saved `also` leaves in place of its
      own; it shares all other leaves with `base`.

    Raises:
      ValueError: If the file is truncated, foreign, written by a newer version,
        tampered with or not finite, or an adapter finds no weight of its shape; the
        message names the file and the path. Nothing is loaded then.
      FileNotFoundError: If there is no file.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj, os, tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "adapter.safetensors")
      >>> params = lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2)
      >>> lj.save(path, params)
      >>> lj.load(path, lj.strip(params))["lora_a"].shape
      (4, 2)
    """
    header, tensors = _read(path)
    leaves = flatten(base)
    paths = {path_name(p): p for p in leaves}
    new: dict[Path, Any] = {}
    for name, adapter in header["adapters"].items():
        weight = _find(path, name, paths, leaves, tuple(adapter["shape"]))
        parts = adapter_of(weight)
        if any(part in leaves for part in parts):
            raise ValueError(
                f"{path}: {name!r} has an adapter in base already. Pass the plain "
                "parameters: load(path, strip(params))."
            )
        if adapter["tensors"] != list(map(path_name, parts)):
            raise ValueError(
                f"{path} was tampered with: {adapter['tensors']} are not the adapter's "
                f"leaves of {name!r}."
            )
        values = [tensors[part] for part in adapter["tensors"]]
        new |= _beside(path, leaves[weight], name, parts, values)
    for name in header["also"]:
        value = tensors[name]
        leaf = leaves[_find(path, name, paths, leaves, value.shape)]
        w = unbox(leaf)
        if value.dtype != w.dtype:
            raise ValueError(
                f"{path}: {name!r} was saved as {value.dtype}, and base has {w.dtype}. "
                "Cast the base to the dtype that was trained."
            )
        x = place(jnp.asarray(value), tuple(range(w.ndim)), w)
        new[paths[name]] = rebox(leaf, x)
    return unflatten(base, leaves | new)


def _beside(
    path: Any, leaf: Any, name: str, parts: Adapter, values: list[np.ndarray]
) -> dict[Path, Any]:
    w = unbox(leaf)
    shapes = [value.shape for value in values]
    if not fits(w.shape, *shapes):
        raise ValueError(
            f"{path} was tampered with: the factors of {name!r}, of shapes {shapes}, "
            f"make no update of its weight {w.shape}."
        )
    return beside(leaf, parts, values, axes_of_shapes(w.shape, *shapes))


def _find(
    path: Any,
    name: str,
    paths: dict[str, Path],
    leaves: dict[Path, Any],
    shape: tuple[int, ...],
) -> Path:
    w = unbox(leaves[paths[name]]) if name in paths else None
    if w is None:
        raise ValueError(
            f"{path}: base has no weight {name!r}. It has {sorted(paths)[:6]}. "
            "Pass the parameters that the adapter was trained for."
        )
    if w.shape != shape:
        raise ValueError(
            f"{path}: {name!r} was saved for the shape {shape}, and base has "
            f"{w.shape}. Pass the parameters that the adapter was trained for."
        )
    return paths[name]


def _read(path: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and tensors of a file, checked against each other."""
    path = os.fspath(path)
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder. Pass the file in it.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = _header(path, file.metadata())
            names = set(file.keys())
            expected = set(header["also"])
            for adapter in header["adapters"].values():
                expected.update(adapter["tensors"])
            for name in sorted(names ^ expected):
                what = "is missing" if name in expected else "belongs to no adapter"
                raise ValueError(f"{path} was tampered with: tensor {name!r} {what}.")
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
        parts = Adapter(*adapter["tensors"])
        rank, scale = tensors[parts.a].shape[-1:], tensors[parts.scale].tolist()
        if rank != (adapter["rank"],) or scale != adapter["scale"]:
            raise ValueError(
                f"{path} was tampered with: its header and its tensors differ in the "
                f"rank or scale of {name!r}."
            )
    return header, tensors


def _header(path: str, metadata: dict[str, str] | None) -> dict[str, Any]:
    if "lora_jax" not in (metadata or {}):
        raise ValueError(
            f"{path} was not written by lora_jax.save: its header does not say so."
        )
    try:
        header = json.loads(metadata["lora_jax"])
        version = header["version"]
        sound = type(version) is int and version > 0
        if sound and version <= VERSION:
            fields = ("tensors", "rank", "scale", "shape")
            adapters = {
                str(name): {field: adapter[field] for field in fields}
                for name, adapter in header["adapters"].items()
            }
            sound = bool(adapters) and all(
                all(type(n) is int for n in adapter["shape"])
                and [type(part) for part in adapter["tensors"]] == [str] * 3
                for adapter in adapters.values()
            )
            digests, also = dict(header["sha256"]), [str(n) for n in header["also"]]
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
    return {"adapters": adapters, "also": also, "sha256": digests}


def concrete(path: Path, leaf: Any) -> np.ndarray:
    x = unbox(leaf)
    if isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer):
        raise ValueError(
            f"{path_name(path)!r} has no values to save: it is a {type(x).__name__}. "
            "Save outside jit, and concrete parameters."
        )
    if x.dtype.name not in DTYPES:
        raise ValueError(
            f"{path_name(path)!r} has dtype {x.dtype}, which the file cannot hold. "
            f"Cast it to one of {', '.join(DTYPES)}."
        )
    # The file holds memory as it lies: in rows, in this machine's order of bytes.
    x = np.array(x, x.dtype.newbyteorder("="), order="C")
    check_finite(repr(path_name(path)), x)
    return x


def check_finite(what: str, x: np.ndarray) -> None:
    if not np.isfinite(x.astype(np.float64)).all():
        raise ValueError(f"{what} is not finite: training has diverged before it.")


def _digest(x: np.ndarray) -> str:
    said = f"{x.dtype.name} {x.shape}".encode()
    return hashlib.sha256(said + np.ascontiguousarray(x).tobytes()).hexdigest()


def write(path: Any, data: bytes) -> None:
    path = os.path.realpath(path)
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    # The rename itself is on the disk once the folder is; not every system can.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
