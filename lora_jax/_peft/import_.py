"""A folder of Hugging Face PEFT in: its adapters beside the weights of a tree."""

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapters import Axes, copy_of, is_adapter
from lora_jax._detach import attached
from lora_jax._engine.factors import wider
from lora_jax._flax_names import is_floating
from lora_jax._leaves import adapter_leaves, trained_copy
from lora_jax._peft.config import rank_and_scale, read_config
from lora_jax._peft.folder import read_tensors
from lora_jax._peft.layouts import MAGNITUDE, suffixes, tensor_name
from lora_jax._peft.modules import (
    Module,
    Weight,
    factors_of,
    from_torch,
    leaf_from_torch,
    magnitude_shape,
    shapes_of,
    tensor_shapes,
    to_torch,
)
from lora_jax._peft.names import Names, Naming
from lora_jax._peft.parts import (
    Index,
    Parts,
    check_complete,
    check_originals,
    index_of,
    parts_of,
)
from lora_jax._peft.plan import Plan, check_inputs, given_axes, plan_of
from lora_jax._processes import agreed, outline
from lora_jax._tree import Path, flatten, listed, path_name, unbox
from lora_jax._write import check_finite


def import_peft(
    folder: str | os.PathLike[str],
    base: Any,
    names: Names,
    *,
    axes: Mapping[str, Axes] | None = None,
    kinds: Mapping[str, str] | None = None,
    dtype: Any = None,
) -> Any:
    """Puts the adapters of a PEFT folder beside the weights of a plain tree.

    `lora(fn)` computes on it what the PyTorch model does with the folder, up to
    rounding. Every tensor must find its weight, and every module that the folder's
    config names must find its tensors.

    Args:
      folder: What PEFT's `save_pretrained`, or `export_peft`, wrote.
      base: The plain parameters, before `lorafy`. Adapters and copies take their boxes
        and shardings from it.
      names: As in `export_peft`.
      axes: As in `export_peft`: `{path: Axes}` where Flax's names do not tell which
        dimensions are which, as in Flax GPT-2, which stores (outputs, inputs).
      kinds: As in `export_peft`.
      dtype: Of A and B. Default: float32 beside a narrower weight, else the weight's.

    Returns:
      A new tree that shares every leaf of `base`, with the adapters beside them, and
      with the folder's `modules_to_save` as trained copies, in float32 beside a
      narrower leaf: what `also=` in `lorafy` would have made and trained.

    Raises:
      FileNotFoundError: If a file is missing.
      ValueError: If the folder is no LoRA or DoRA (aLoRA, biases and other methods are
        refused), is truncated, or does not fit `base` and `names` exactly; or another
        process has another folder, base or names.
      RuntimeError: If it failed in another process, of which it tells.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj, os, tempfile
      >>> base = {"layer_0": {"query": {"kernel": jnp.ones((4, 3))}}}
      >>> folder = os.path.join(tempfile.mkdtemp(), "adapter")
      >>> names = {"layer_*/query": "model.layers.{}.self_attn.q_proj"}
      >>> lj.export_peft(folder, lj.lorafy(base, rank=2), names)
      >>> lj.import_peft(folder, base, names)["layer_0"]["query"]["lora_a"].shape
      (4, 2)
    """
    source = os.fspath(folder)
    with agreed("import_peft") as same:
        config, tensors = read_config(source), read_tensors(source)
        leaves = _plain(base, dtype)
        given = given_axes(axes, leaves)
        index = index_of(names, leaves, given)
        named = {path_name(p): naming for p, naming in index.namings.items()}
        same["folder"] = [config, tensors]
        same["names"] = [named, axes and dict(axes), kinds and dict(kinds), str(dtype)]
        same["base"] = {path_name(p): outline(unbox(leaves[p])) for p in index.namings}
    parts = parts_of(source, config, tensors, index, leaves)
    plan = _plan(leaves, index, parts, given, kinds)
    check_inputs(plan, leaves, bool(config.get("fan_in_fan_out")))
    check_originals(source, parts.originals, plan, leaves)
    modules = _modules(source, config, plan, parts)
    values = _values(source, plan, parts, leaves)
    check_complete(source, config, index, parts)
    new = _adapters(plan, modules, leaves, dtype) | _copies(values, leaves)
    return attached(base, leaves, new)


def _plain(base: Any, dtype: Any) -> dict[Path, Any]:
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is floating, found {dtype}.")
    leaves = flatten(base)
    if old := [path for path in leaves if is_adapter(path)]:
        raise ValueError(
            f"base has adapters already: {listed(old)}. Pass the plain parameters: "
            "import_peft(folder, strip(params), names)."
        )
    return leaves


def _plan(
    leaves: dict[Path, Any],
    index: Index,
    parts: Parts,
    axes: Mapping[Path, Axes],
    kinds: Mapping[str, str] | None,
) -> Plan:
    """The plan of the leaves for which the folder has tensors."""
    used = {index.modules[name] for name in parts.factors}
    return plan_of(
        leaves,
        index.namings,
        adapted=[path for path in leaves if path in used],
        copied=parts.copies,
        axes=axes,
        told=axes,
        kinds=kinds,
    )


def _modules(
    source: str, config: Mapping[str, Any], plan: Plan, parts: Parts
) -> dict[str, Module]:
    """The adapter of each module of which the folder has one."""
    return {
        name: _checked(source, config, name, weight, parts.factors[name])
        for weight in plan.adapted.values()
        for name in weight.slots
        if name in parts.factors
    }


def _checked(
    source: str,
    config: Mapping[str, Any],
    name: str,
    weight: Weight,
    parts: Mapping[str, np.ndarray],
) -> Module:
    """One module's adapter, whose tensors must be those of its kind and rank."""
    kind = weight.slots[name].kind
    ends = suffixes(kind)
    if config.get("use_dora"):
        ends = (*ends, MAGNITUDE)
        if kind in ("head", "experts"):
            raise ValueError(
                f"{source}: DoRA of {path_name(weight.path)!r}, {kind} {name!r}, "
                "cannot be imported: there one update would have two norms."
            )
    if parts.keys() != {*ends}:
        raise ValueError(
            f"{source}: {name!r}, of the weight {path_name(weight.path)!r}, has the "
            f"tensors {sorted(parts)}, and {list(ends)} are needed."
        )
    r, scale = rank_and_scale(config, name)
    shapes = shapes_of(weight, name, r)
    a, b = (np.broadcast_to(np.int8(0), shape) for shape in shapes)
    wanted = [x.shape for x in to_torch(kind, Module(a, b, scale))]
    wanted.append(magnitude_shape(kind, b[0], a))
    for end, shape in zip(ends, wanted, strict=False):  # the last is of DoRA alone
        found = parts[end].shape
        if found != shape:
            hint = " It looks transposed." if found == shape[::-1] else ""
            raise ValueError(
                f"{source}: {name + end!r} must be of shape {shape}, by rank {r} of "
                f"the config and the weight {path_name(weight.path)!r} {weight.shape}; "
                f"found {found}.{hint}"
            )
    a, b = (parts[end] for end in ends[:2])
    module = from_torch(kind, a, b, scale, shapes)
    if MAGNITUDE in parts:
        return module._replace(magnitude=parts[MAGNITUDE].reshape(-1))
    return module


def _values(
    source: str, plan: Plan, parts: Parts, leaves: dict[Path, Any]
) -> dict[Path, np.ndarray]:
    """The leaves that the folder holds whole, in the shapes of base's own."""
    values = {}
    for path, layout in plan.copied.items():
        _check_whole(source, path, leaves[path], layout, parts.copies[path])
        shape = unbox(leaves[path]).shape
        values[path] = leaf_from_torch(layout, shape, parts.copies[path])
    return values


def _check_whole(
    source: str,
    path: Path,
    leaf: Any,
    layout: Weight | Naming,
    tensors: Mapping[str, np.ndarray],
) -> None:
    w = unbox(leaf)
    if not is_floating(path, leaf):
        raise ValueError(
            f"{source} holds {path_name(path)!r}, which is {w.dtype} in base, and what "
            "trains is floating. Cast it in base."
        )
    for name, shape in tensor_shapes(layout, w.shape).items():
        if name not in tensors:
            raise ValueError(
                f"{source}: {path_name(path)!r} of base is a stack, of which it "
                f"has {listed(sorted(tensors))}, and not {name!r}."
            )
        if tensors[name].shape != shape:
            raise ValueError(
                f"{source}: {tensor_name(name, path)!r}, of shape "
                f"{tensors[name].shape}, must be {shape} for {path_name(path)!r} of "
                f"base, {w.shape}."
            )


def _adapters(
    plan: Plan, modules: Mapping[str, Module], leaves: dict[Path, Any], dtype: Any
) -> dict[Path, Any]:
    new: dict[Path, Any] = {}
    for path, weight in plan.adapted.items():
        kept = wider(unbox(leaves[path]).dtype) if dtype is None else dtype
        own = {
            name: Module(
                _cast(name, x, kept), _cast(name, y, kept), scale, _magnitude(name, m)
            )
            for name, (x, y, scale, m) in modules.items()
            if name in weight.slots
        }
        new |= adapter_leaves(path, leaves[path], factors_of(weight, own))
    return new


def _magnitude(name: str, m: np.ndarray | None) -> np.ndarray | None:
    return None if m is None else _cast(name, m, np.float32)


def _copies(
    values: Mapping[Path, np.ndarray], leaves: dict[Path, Any]
) -> dict[Path, Any]:
    return {copy_of(p).w: trained_copy(leaves[p], x) for p, x in values.items()}


def _cast(name: str, x: np.ndarray, dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # the check says it with the name
        x = x.astype(dtype)
    check_finite(f"The adapter of {name!r} in {x.dtype}", x)
    return x
