"""Quantizes frozen weights of a tree, and dequantizes them."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization

from lora_jax._adapters import Axes, adapter_of, find_adapters, of_rank
from lora_jax._engine.quantized import (
    FORMATS,
    Quantized,
    mesh_parts,
    quantize_array,
)
from lora_jax._engine.quantized import dequantize as dequantized
from lora_jax._flax_names import axes_of, check_axes, is_adaptable
from lora_jax._patterns import Selector
from lora_jax._state import from_state, to_state
from lora_jax._targets import check_each, choose
from lora_jax._tree import (
    Path,
    PyTree,
    flatten,
    is_abstract,
    is_traced,
    leaf_name,
    path_name,
    quantized_leaves,
    rebox,
    unbox,
    unflatten,
)

serialization.register_serialization_state(Quantized, to_state, from_state)

BLOCK = 64  # elements of 4 bits that share a scale


def quantize(
    params: PyTree,
    how: str | Mapping[str, str],
    *,
    targets: Selector | None = None,
    exclude: Selector = (),
    axes: Mapping[str, Axes] | None = None,
    block: int | None = None,
) -> PyTree:
    """Quantizes frozen weights, which `lora` then uses in that form.

    Each chosen weight becomes a `Quantized`: a code of 4 or 8 bits for each element,
    and a scale for each block of elements. `lora(fn)` dequantizes a weight for each of
    its uses, and stores no floats for the backward pass. A base of 16 GB in bfloat16
    takes 8 GB in int8 and 4.3 GB in NF4.

    Call it before `lorafy` or after it; adapters and trained copies are not quantized.
    Take gradients with respect to `split(params)[0]`, or with `allow_int=True`: JAX has
    none for integers ("grad requires real- or complex-valued inputs").

    A stack of layers is quantized one layer at a time, on each device its own layers,
    so that the floats of one layer at most are needed at once. Under `jit` this does
    not hold on a mesh with automatic axes, where shardings are unknown.

    Orbax, `flax.serialization` and pickle store the result. To restore it, pass them a
    target: `quantize` of the same parameters, which may be abstract.

    Args:
      params: A tree of parameters, as in `lorafy`: concrete, traced or abstract,
        sharded or not. Leaves are quantized one by one, on their devices. Or a live
        `nnx.Module`: the result is one of its class, for `LoRA(model, rank)`.
      how: "int8", "int4" or "nf4" (4 bits, the values of a normal distribution); or
        `{pattern: format}`, which also selects the weights.
      targets: Which weights, as in `lorafy`. Default: every leaf named `kernel` of two
        or more dimensions.
      exclude: Which weights to leave out, in the same form.
      axes: `{path: Axes(batch, inputs, outputs)}`, as `find_axes` returns it, for
        weights whose dimensions neither Flax's names nor an adapter determine.
      block: The number of elements that share a scale (in bfloat16), along the last
        input; in tables, along a row, so that lookups read rows. If it does not divide
        their number, the greatest common divisor is used. Default: 64 for 4 bits, so
        that an element takes 4.25 bits; for int8 all the inputs of an output.

    Returns:
      A tree with the same containers and boxes that shares all other leaves.

    Raises:
      TypeError: If `params` is no tree of parameters.
      ValueError: If a format is unknown, a pattern matches nothing, a weight is already
        quantized, empty, not finite or not floating, its dimensions are ambiguous, or
        no block divides them.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> params = {"kernel": jnp.ones((128, 3))}
      >>> params = lj.lorafy(lj.quantize(params, "nf4"), rank=2)
      >>> params["kernel"].values.dtype.name, params["kernel"].scale.shape
      ('int4', (2, 3))
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> lj.lora(fn)(params, jnp.ones((5, 128))).shape
      (5, 3)

    Reference:
      Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023.
      https://arxiv.org/abs/2305.14314
    """
    leaves = flatten(params)
    formats = _check_formats(how)
    _check_block(block)
    stored = quantized_leaves(leaves)
    weights = [path for path, leaf in leaves.items() if is_adaptable(path, leaf)]
    chosen = choose(leaves, weights, formats, targets, exclude, "how")
    known = check_axes(axes or {}, leaves)
    plans: dict[Path, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for path, name in chosen.items():
        w = unbox(leaves[path])
        if path in stored:
            raise ValueError(
                f"{path_name(path)!r} is quantized already. Write "
                f"exclude=[{path_name(path)!r}], or dequantize(params) first."
            )
        if 0 in w.shape:
            raise ValueError(
                f"{path_name(path)!r}, of shape {w.shape}, is empty. Write "
                f"exclude=[{path_name(path)!r}]."
            )
        dims = known.get(path_name(path)) or _axes(path, leaves, bool(known))
        plans[path] = _scale_shape(path, w, name, dims, block), dims.batch
    new = {}
    for path, plan in plans.items():
        q = quantize_array(unbox(leaves[path]), chosen[path], *plan)
        if not (is_abstract(q) or is_traced(q)) and not jnp.isfinite(q.scale).all():
            raise ValueError(
                f"{path_name(path)!r} is not finite, so a block has no scale. Restore "
                f"it, or write exclude=[{path_name(path)!r}]."
            )
        new[path] = rebox(leaves[path], q)
    return unflatten(params, leaves | new)


def dequantize(params: PyTree) -> PyTree:
    """Converts quantized weights to plain arrays.

    Args:
      params: A tree from `quantize`, with adapters or without.

    Returns:
      A tree with the same containers and boxes that shares all other leaves. It
      computes the same: these are the floats that `lora` computes with. (To
      also add the updates to the weights, use `merge`.)

    Raises:
      ValueError: If no leaf is quantized, or one is broken.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> params = {"kernel": jnp.ones((128, 3), jnp.bfloat16)}
      >>> lj.dequantize(lj.quantize(params, "nf4"))["kernel"].dtype.name
      'bfloat16'
    """
    leaves = flatten(params)
    stored = quantized_leaves(leaves)
    if not stored:
        raise ValueError(
            "No leaf of these parameters is quantized. Pass a tree from "
            "quantize(params, how)."
        )
    new = {path: rebox(leaves[path], _plain(w)) for path, w in stored.items()}
    return unflatten(params, leaves | new)


def _plain(w: Quantized) -> Any:
    return jax.eval_shape(dequantized, w) if is_abstract(w) else dequantized(w)


def _axes(path: Path, leaves: dict[Path, Any], others: bool) -> Axes:
    """Returns a weight's axes, from an adapter next to it or from its name."""
    parts = (path, *adapter_of(path))
    if all(part in leaves for part in parts):
        its_leaves = {part: leaves[part] for part in parts}
        return of_rank(find_adapters(its_leaves, stacks=True))[path].axes
    return axes_of(path, leaves, others)


def _scale_shape(
    path: Path, w: Any, name: str, axes: Axes, block: int | None
) -> tuple[int, ...]:
    """Returns the number of blocks along each dimension."""
    shared = axes.outputs if leaf_name(path) == "embedding" else axes.inputs
    sizes = list(w.shape)
    if name == "int8" and block is None:
        return tuple(1 if d in shared else n for d, n in enumerate(sizes))
    axis = shared[-1]
    n = sizes[axis] // mesh_parts(w)[axis]  # of one device, which then needs no other
    elements = math.gcd(block or BLOCK, n)
    if elements == 1:
        raise ValueError(
            f"{path_name(path)!r}, of shape {w.shape}, has {n} elements along "
            f"dimension {axis} (on one device). They have no divisor in common with "
            f"blocks of {block or BLOCK}, so each element would have a scale. Write "
            f"block={n}, or exclude=[{path_name(path)!r}]."
        )
    sizes[axis] //= elements
    return tuple(sizes)


def _check_formats(how: Any) -> str | dict[str, str]:
    if isinstance(how, Mapping) and not how:
        raise ValueError("how is an empty mapping. Write how={pattern: format}.")
    return check_each(how, _check_format)


def _check_format(name: Any) -> str:
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(
            f"how must be one of {', '.join(map(repr, FORMATS))}, found {name!r}."
        )
    return name


def _check_block(block: Any) -> None:
    integer = isinstance(block, int) and not isinstance(block, bool)
    if block is not None and not (integer and block > 1):
        raise ValueError(f"block must be an integer of at least 2, found {block!r}.")
