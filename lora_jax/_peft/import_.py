"""A folder of Hugging Face PEFT in: its adapters beside the weights of a tree."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapters import Axes, adapter_of, is_adapter
from lora_jax._engine.factors import wider
from lora_jax._lorafy import beside, place
from lora_jax._peft.config import (
    rank_and_scale,
    read_config,
    saves,
    targets,
    targets_parameter,
    unfilled,
)
from lora_jax._peft.folder import read_tensors
from lora_jax._peft.layouts import (
    LINEAR,
    PREFIX,
    TABLE,
    check_inputs,
    given_axes,
    kinds_of,
    layouts_of,
    stems_of,
    suffixes,
    tensor_name,
)
from lora_jax._peft.modules import (
    Module,
    Weight,
    factors_of,
    from_torch,
    leaf_from_torch,
    leaf_to_torch,
    shapes_of,
    tensor_shapes,
    to_torch,
    weight_of,
)
from lora_jax._peft.names import Names, Naming, check_names, naming_of, near, numbered
from lora_jax._save import check_finite
from lora_jax._targets import is_adaptable
from lora_jax._tree import (
    Path,
    flatten,
    is_array,
    listed,
    path_name,
    rebox,
    unbox,
    unflatten,
)


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
      base: The plain parameters, before `lorafy`. Adapters take their boxes and
        shardings from it.
      names: As in `export_peft`.
      axes: As in `export_peft`: `{path: Axes}` where Flax's names do not tell which
        dimensions are which, as in Flax GPT-2, which stores (outputs, inputs).
      kinds: As in `export_peft`.
      dtype: Of A and B. Default: float32 beside a narrower weight, else the weight's.

    Returns:
      A new tree with the adapters, and with the folder's `modules_to_save` in place of
      its own leaves; it shares all other leaves with `base`.

    Raises:
      FileNotFoundError: If a file is missing.
      ValueError: If the folder is no plain LoRA (DoRA, aLoRA, biases and other methods
        are refused), is truncated, or does not fit `base` and `names` exactly.

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
    config, tensors = read_config(source), read_tensors(source)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is floating, found {dtype}.")
    leaves = flatten(base)
    if old := [path for path in leaves if is_adapter(path)]:
        raise ValueError(
            f"base has adapters already: {listed(old)}. Pass the plain parameters: "
            "import_peft(folder, strip(params), names)."
        )
    check_names(names, leaves)
    given = given_axes(axes, leaves)
    arrays = (path for path, x in leaves.items() if is_array(unbox(x)))
    found = {path: naming_of(names, path) for path in arrays}
    namings = {path: naming for path, naming in found.items() if naming is not None}
    known = _known(namings, leaves, given)
    orders = {
        name: namings[path].order
        for name, path in known.items()
        if targets_parameter(config, name)
    }
    factors, others = _parted(source, tensors, stems_of(orders), known)
    used = {known[name] for name in factors}
    kind_of = kinds_of(kinds, namings)
    weights = {
        path: weight_of(path, leaves, namings[path], given.get(path), kind_of[path])
        for path in leaves
        if path in used
    }
    check_inputs(weights, given, leaves, bool(config.get("fan_in_fan_out")))
    modules = {
        name: _module(source, config, name, weights[known[name]], parts)
        for name, parts in factors.items()
    }
    _check_base(source, others, weights, leaves)
    keys = _keys(namings, leaves)
    others = _without_tables(config, others, keys, leaves)
    whole = _whole(source, config, others, keys)
    _check_complete(source, config, known, factors, keys, whole)

    new: dict[Path, Any] = {}
    for path, weight in weights.items():
        kept = wider(unbox(leaves[path]).dtype) if dtype is None else dtype
        own = {
            name: Module(_cast(name, x, kept), _cast(name, y, kept), scale)
            for name, (x, y, scale) in modules.items()
            if name in weight.slots
        }
        factors = factors_of(weight, own)
        new |= beside(leaves[path], adapter_of(path), factors, weight.axes)
    rest = {path: namings[path] for path in whole}
    layouts = layouts_of(rest, leaves, given, kind_of, kinds)
    for path, own in whole.items():
        x = _leaf(source, path, unbox(leaves[path]), layouts[path], own)
        w = unbox(leaves[path])
        x = place(jnp.asarray(x), tuple(range(len(w.shape))), w)
        new[path] = rebox(leaves[path], x)
    return unflatten(base, leaves | new)


def _known(
    namings: Mapping[Path, Naming], leaves: dict[Path, Any], axes: Mapping[Path, Axes]
) -> dict[str, Path]:
    """The weight that each module is, of all that names speaks of."""
    known: dict[str, Path] = {}
    for path, naming in namings.items():
        shape = unbox(leaves[path]).shape
        if not is_adaptable(path, leaves[path]) or len(shape) < naming.stacked:
            continue
        stacked = axes[path].batch if path in axes else range(len(shape))
        counts = [shape[d] for d in stacked[: naming.stacked]]
        for _, modules in numbered(naming, counts):
            for name in modules:
                if name in known:
                    raise ValueError(
                        f"{path_name(known[name])!r} and {path_name(path)!r} have one "
                        f"name, {name!r}. Correct names: each weight has its own."
                    )
                known[name] = path
    return known


def _parted(
    source: str,
    tensors: Mapping[str, np.ndarray],
    stems: Mapping[str, str],
    known: Mapping[str, Path],
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """The tensors of each module's adapter, and all others, by their PyTorch names."""
    by_stem = {stem: name for name, stem in stems.items()}
    factors: dict[str, dict[str, np.ndarray]] = {}
    others = {}
    for key, x in tensors.items():
        name = key.removeprefix(PREFIX)
        if name == key:
            raise ValueError(
                f"{source}: the tensor {key!r} does not begin with {PREFIX!r}: "
                "PEFT would ignore it."
            )
        suffix = next((end for end in (*LINEAR, *TABLE) if name.endswith(end)), None)
        if suffix is not None:
            stem = name.removesuffix(suffix)
            module = by_stem.get(stem, stem)
            if module not in known:
                raise ValueError(
                    f"{source}: the tensor {key!r} is of the module {module!r}, which "
                    f"names gives to no weight. Close: {listed(near(module, known))}."
                )
            factors.setdefault(module, {})[suffix] = x
        elif ".lora_" in name.lower():
            raise ValueError(
                f"{source}: the tensor {key!r} is no part of a plain LoRA. Only "
                f"{', '.join(end[1:] for end in (*LINEAR, *TABLE))} are."
            )
        else:
            others[name] = x
    if not factors:
        raise ValueError(f"{source} holds no adapter.")
    return factors, others


def _module(
    source: str,
    config: Mapping[str, Any],
    name: str,
    weight: Weight,
    parts: Mapping[str, np.ndarray],
) -> Module:
    """One module's adapter, whose tensors must be those of its kind and rank."""
    kind = weight.slots[name].kind
    ends = suffixes(kind)
    if parts.keys() != {*ends}:
        raise ValueError(
            f"{source}: {name!r}, of the weight {path_name(weight.path)!r}, has the "
            f"tensors {sorted(parts)}, and {list(ends)} are needed."
        )
    r, scale = rank_and_scale(config, name)
    shapes = shapes_of(weight, name, r)
    blank = (np.broadcast_to(np.int8(0), shape) for shape in shapes)
    wanted = [x.shape for x in to_torch(kind, Module(*blank, scale))]
    for end, shape in zip(ends, wanted, strict=True):
        found = parts[end].shape
        if found != shape:
            hint = " It looks transposed." if found == shape[::-1] else ""
            raise ValueError(
                f"{source}: {name + end!r} must be of shape {shape}, by rank {r} of "
                f"the config and the weight {path_name(weight.path)!r} {weight.shape}; "
                f"found {found}.{hint}"
            )
    a, b = (parts[end] for end in ends)
    return from_torch(kind, a, b, scale, shapes)


def _check_base(
    source: str,
    others: dict[str, np.ndarray],
    weights: Mapping[Path, Weight],
    leaves: dict[Path, Any],
) -> None:
    """Takes out the tables that PEFT saves beside their adapters: base's very own."""
    slots = {name: path for path, weight in weights.items() for name in weight.slots}
    for key in [key for key in others if key.endswith(".base_layer.weight")]:
        name, x = key.removesuffix(".base_layer.weight"), others.pop(key)
        same = False
        if name in slots:
            w, weight = unbox(leaves[slots[name]]), weights[slots[name]]
            same = x.shape == tensor_shapes(weight, w.shape)[name]
            if same and not isinstance(w, jax.ShapeDtypeStruct):
                same = _same(leaf_to_torch(weight, np.asarray(w))[name], x)
        if not same:
            raise ValueError(
                f"{source}: the tensor {PREFIX + key!r} is not the weight of base, but "
                "that of a model which was resized or trained. Pass those parameters."
            )


def _keys(
    namings: Mapping[Path, Naming], leaves: dict[Path, Any]
) -> dict[str, tuple[str, Path]]:
    """The module and the leaf of each tensor of the PyTorch model that is one leaf."""
    keys = {}
    for path, naming in namings.items():
        counts = unbox(leaves[path]).shape[: naming.stacked]
        if len(counts) < naming.stacked:
            continue
        for _, (name, *more) in numbered(naming, counts):
            if not more:
                keys[tensor_name(name, path)] = name, path
    return keys


def _without_tables(
    config: Mapping[str, Any],
    others: Mapping[str, np.ndarray],
    keys: Mapping[str, tuple[str, Path]],
    leaves: dict[Path, Any],
) -> dict[str, np.ndarray]:
    """Without tables that PEFT saved though nothing trained them: base's very own."""

    def is_base(key: str) -> bool:
        name, path = keys.get(key, ("", ()))
        if not path or path[-1] != "embedding" or saves(config, name):
            return False
        return _same(unbox(leaves[path]), others[key])

    return {key: x for key, x in others.items() if not is_base(key)}


def _same(w: Any, x: np.ndarray) -> bool:
    """Whether a tensor is base's array, which may be of another dtype, or a shape."""
    if w.shape != x.shape or isinstance(w, jax.ShapeDtypeStruct):
        return w.shape == x.shape
    w = np.asarray(w)
    return np.array_equal(w.astype(x.dtype), x) or np.array_equal(w, x.astype(w.dtype))


def _cast(name: str, x: np.ndarray, dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # the check says it with the name
        x = x.astype(dtype)
    check_finite(f"The adapter of {name!r} in {x.dtype}", x)
    return x


def _whole(
    source: str,
    config: Mapping[str, Any],
    others: Mapping[str, np.ndarray],
    keys: Mapping[str, tuple[str, Path]],
) -> dict[Path, dict[str, np.ndarray]]:
    """The tensors of modules that are saved whole, by the leaf and the module."""
    whole: dict[Path, dict[str, np.ndarray]] = {}
    for key, x in others.items():
        if key not in keys:
            raise ValueError(
                f"{source}: the tensor {PREFIX + key!r} finds no leaf of base. Close: "
                f"{listed(near(key, keys))}. Add a name for it to names."
            )
        name, path = keys[key]
        if not saves(config, name):
            raise ValueError(
                f"{source}: the tensor {PREFIX + key!r} is of no module that the "
                "config's modules_to_save names."
            )
        whole.setdefault(path, {})[name] = x
    return whole


def _check_complete(
    source: str,
    config: Mapping[str, Any],
    known: Mapping[str, Path],
    factors: Mapping[str, Any],
    keys: Mapping[str, tuple[str, Path]],
    whole: Mapping[Path, Mapping[str, Any]],
) -> None:
    """Every tensor is of a target, and every target has its tensors."""
    chosen = lambda name: targets(config, name) or targets_parameter(config, name)
    if stray := [name for name in factors if not chosen(name)]:
        raise ValueError(
            f"{source} has tensors of {listed(stray)}, which its config does not "
            "target: PEFT would ignore them."
        )
    kept = {name for own in whole.values() for name in own}
    missing = [name for name in known if chosen(name) and name not in factors]
    missing += [
        key
        for key, (name, path) in keys.items()
        if saves(config, name) and name not in whole.get(path, {})
    ]
    # An entry may speak of nothing but modules that another one excludes.
    excluded = {name for name in known if not chosen(name)}
    missing += unfilled(config, {*factors, *kept, *excluded})
    if missing:
        raise ValueError(
            f"{source} lacks the tensors of {listed(missing)}, which its config "
            "targets. It may be truncated, or names may speak of other modules."
        )


def _leaf(
    source: str,
    path: Path,
    w: Any,
    layout: Weight | Naming,
    tensors: Mapping[str, np.ndarray],
) -> np.ndarray:
    """A leaf saved whole, in the shape and the dtype of base's own."""
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
    x = leaf_from_torch(layout, w.shape, tensors)
    kept = x.astype(w.dtype)
    if not np.array_equal(kept.astype(x.dtype), x):
        raise ValueError(
            f"{source}: {path_name(path)!r} is {x.dtype}, which the {w.dtype} of base "
            "would round. Cast the base to the dtype that was trained."
        )
    return kept
