"""Frozen weights in few bits, and back to floats."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapters import (
    Axes,
    adapter_of,
    axes_of_shapes,
)
from lora_jax._engine.quantized import FORMATS, quantize_array, ways
from lora_jax._engine.quantized import dequantize as dequantized
from lora_jax._targets import Selector, axes_of, check_axes, choose, is_adaptable
from lora_jax._tree import (
    Path,
    flatten,
    is_abstract,
    is_traced,
    path_name,
    quantized_leaves,
    rebox,
    unbox,
    unflatten,
)

BLOCK = 64  # numbers of 4 bits to a scale


def quantize(
    params: Any,
    how: str | Mapping[str, str],
    *,
    targets: Selector | None = None,
    exclude: Selector = (),
    axes: Mapping[str, Axes] | None = None,
    block: int | None = None,
) -> Any:
    """Stores frozen weights in few bits, for `lora` to use as they are.

    Each chosen weight becomes a `Quantized`: whole numbers and their scales, in place
    of a float for each. `lora(fn)` makes each weight of floats for each use alone, and
    keeps none for the backward pass. A base of 16 GB in bfloat16 takes 8 in int8, and
    4.3 in NF4.

    Before `lorafy` or after it. What trains is in floats beside it, as ever; take
    gradients by `split(params)[0]`, or with `allow_int=True`, since JAX has none for
    whole numbers ("grad requires real- or complex-valued inputs", it says of uint4).

    Args:
      params: A tree of parameters, as in `lorafy`: concrete, traced or abstract,
        sharded or not. Leaves are taken one by one, and stay on their devices. Or a
        live `nnx.Module`: the result is one of its class, for `LoRA(model, rank)`.
      how: "int8", "int4" or "nf4" (4 bits, in places of a normal distribution); or
        `{pattern: format}`, which is its own targets.
      targets: Which weights, as in `lorafy`. Default: every leaf named `kernel` of two
        or more dimensions.
      exclude: What to leave out, in the same form.
      axes: `{path: Axes(batch, inputs, outputs)}`, as `find_axes` reads it off a
        function, where neither Flax's names nor an adapter tell a weight's dimensions.
      block: How many numbers share a scale (in bfloat16), along the last input; of
        tables, along a row, so that lookups read rows. Where it does not divide them,
        the greatest common divisor is taken. Default: 64 for 4 bits, so that a number
        takes 4.25; for int8 all the inputs of an output.

    Returns:
      A tree with the same containers and boxes that shares all other leaves.

    Raises:
      TypeError: If `params` is no tree of parameters.
      ValueError: If a format is unknown, a pattern matches nothing, a weight is already
        in few bits, empty, not finite or no array of floats, its dimensions cannot be
        told, or no block divides them.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> params = {"kernel": jnp.ones((128, 3))}
      >>> params = lj.lorafy(lj.quantize(params, "nf4"), rank=2)
      >>> params["kernel"].values.dtype.name, params["kernel"].scale.shape
      ('uint4', (2, 3))
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
    sizes: dict[Path, tuple[int, ...]] = {}
    for path, name in chosen.items():
        w = unbox(leaves[path])
        if path in stored:
            raise ValueError(
                f"{path_name(path)!r} is in few bits already. Write "
                f"exclude=[{path_name(path)!r}], or dequantize(params) first."
            )
        if 0 in w.shape:
            raise ValueError(
                f"{path_name(path)!r}, of shape {w.shape}, is empty. Write "
                f"exclude=[{path_name(path)!r}]."
            )
        dims = known.get(path_name(path)) or _axes(path, leaves, bool(known))
        sizes[path] = _scale_shape(path, w, name, dims, block)
    new = {}
    for path, shape in sizes.items():
        q = quantize_array(unbox(leaves[path]), chosen[path], shape)
        if not (is_abstract(q) or is_traced(q)) and not jnp.isfinite(q.scale).all():
            raise ValueError(
                f"{path_name(path)!r} is not finite: it has no scale. Restore it, or "
                f"write exclude=[{path_name(path)!r}]."
            )
        new[path] = rebox(leaves[path], q)
    return unflatten(params, leaves | new)


def dequantize(params: Any) -> Any:
    """Makes plain arrays of weights in few bits: floats, rounded as they are.

    Args:
      params: A tree from `quantize`, with adapters or without.

    Returns:
      A tree with the same containers and boxes that shares all other leaves, and
      computes the same. (For the update in the weights as well, use `merge`.)

    Raises:
      ValueError: If no leaf is in few bits, or one is broken.

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
            "No leaf of these parameters is in few bits. Pass a tree from "
            "quantize(params, how)."
        )
    new = {path: rebox(leaves[path], _plain(w)) for path, w in stored.items()}
    return unflatten(params, leaves | new)


def _plain(w: Any) -> Any:
    return jax.eval_shape(dequantized, w) if is_abstract(w) else dequantized(w)


def _axes(path: Path, leaves: dict[Path, Any], others: bool) -> Axes:
    """The dimensions of a weight, as an adapter beside it or its name tells them."""
    parts = (path, *adapter_of(path))
    if all(part in leaves for part in parts):
        return axes_of_shapes(*(unbox(leaves[part]).shape for part in parts))
    return axes_of(path, leaves, others)


def _scale_shape(
    path: Path, w: Any, name: str, axes: Axes, block: int | None
) -> tuple[int, ...]:
    """How many blocks there are along each dimension."""
    shared = axes.outputs if path[-1] == "embedding" else axes.inputs
    sizes = list(w.shape)
    if name == "int8" and block is None:
        return tuple(1 if d in shared else n for d, n in enumerate(sizes))
    axis = shared[-1]
    n = sizes[axis] // ways(w)[axis]  # of one device, so that none asks another
    own = math.gcd(block or BLOCK, n)
    if own == 1:
        raise ValueError(
            f"{path_name(path)!r}, of shape {w.shape}, has {n} numbers along dimension "
            f"{axis} (of one device), which blocks of {block or BLOCK} have no divisor "
            f"in common with: each number would have a scale. Write block={n}, or "
            f"exclude=[{path_name(path)!r}]."
        )
    sizes[axis] //= own
    return tuple(sizes)


def _check_formats(how: Any) -> Any:
    if isinstance(how, Mapping):
        if not how:
            raise ValueError("how is an empty mapping. Write how={pattern: format}.")
        return {pattern: _check_format(name) for pattern, name in how.items()}
    return _check_format(how)


def _check_format(name: Any) -> str:
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(
            f"how must be one of {', '.join(map(repr, FORMATS))}, found {name!r}."
        )
    return name


def _check_block(block: Any) -> None:
    whole = isinstance(block, int) and not isinstance(block, bool)
    if block is not None and not (whole and block > 1):
        raise ValueError(
            f"block must be a whole number of at least 2, found {block!r}."
        )
