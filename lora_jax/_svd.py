"""Adapters from singular values of their product, of a fine-tune, or of the weight."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax._adapters import (
    Axes,
    LowRank,
    arrays_of,
    find_adapters,
    of_rank,
    scale_of_ranks,
    without_adapters,
)
from lora_jax._checks import check_values
from lora_jax._engine.dora import from_leaves
from lora_jax._engine.dtypes import wider
from lora_jax._engine.factors import align, delta, materialize
from lora_jax._engine.quantized import dequantize
from lora_jax._leaves import adapter_leaves, path_key, put_like, trained_copy
from lora_jax._lorafy import lorafy
from lora_jax._matrices import (
    Matrices,
    factor_matrices,
    matrix_sizes,
    nearest,
    padded,
    truncated,
    weight_matrices,
    with_matrices,
    with_scale_in_b,
)
from lora_jax._patterns import Patterns, Selector, by_pattern
from lora_jax._targets import check_rank
from lora_jax._tree import (
    Path,
    PyTree,
    as_tree,
    flatten,
    is_array,
    is_counter,
    is_quantized,
    is_traced,
    listed,
    path_name,
    rebox,
    unbox,
    unflatten,
)


def resize(
    params: PyTree, rank: int | Mapping[str, int], *, key: jax.Array | None = None
) -> PyTree:
    """Returns adapters of another rank: exact if it is larger, the nearest if smaller.

    An adapter of larger rank computes the same: the new rows of B are zero, and the new
    columns of A are drawn as in `lorafy`, so that they can be trained. An adapter of
    smaller rank has the nearest update in the Frobenius norm, that of the largest
    singular values (Eckart and Young, 1936). It is computed from the factors alone, and
    no array of the weight's size is made. DoRA's magnitudes, trained copies and scales
    stay as they are, except that scales of single ranks are multiplied into B.

    Args:
      params: A tree from `lorafy`, trained or not.
      rank: The new rank, or `{pattern: rank}` for some weights.
      key: Random key for new columns of A, as in `lorafy`.

    Returns:
      A tree that shares all leaves except the factors whose rank changes.

    Raises:
      ValueError: If a rank is below 1, or above both the old rank and the number of
        inputs or outputs of a weight; if a pattern matches no adapter; or if an adapter
        is broken or not finite.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> params = lj.resize(lj.lorafy({"kernel": jnp.ones((4, 3))}, 3), 2)
      >>> params["lora_a"].shape, params["lora_b"].shape
      ((4, 2), (2, 3))

      A rank whose scale is zero adds nothing and learns nothing. So pruning ranks by
      scores, as AdaLoRA does, sets scales to zero; a smaller rank is then exact.

      >>> params = lj.lorafy({"kernel": jnp.ones((4, 3))}, 3)
      >>> keep = jnp.array([0.9, 0.1, 0.7]) > 0.5  # by scores of your own
      >>> pruned = params | {"lora_scale": jnp.where(keep, params["lora_scale"], 0.0)}
      >>> pruned["lora_scale"].shape, lj.resize(pruned, 2)["lora_a"].shape
      ((3,), (4, 2))

    Reference:
      Eckart and Young, "The approximation of one matrix by another of lower rank",
      1936.
    """
    leaves = flatten(params)
    found = find_adapters(leaves)
    check_values(leaves, found)
    adapters = of_rank(found)
    ranks = check_rank(rank)
    if isinstance(ranks, Mapping):
        ranks = by_pattern(ranks, [*adapters], "rank")
    else:
        ranks = dict.fromkeys(adapters, ranks)
    key = jax.random.key(0) if key is None else key
    for path, r in ranks.items():
        full = min(matrix_sizes(unbox(leaves[path]).shape, adapters[path].axes)[1:])
        if r > max(full, unbox(leaves[adapters[path].a]).shape[-1]):
            raise ValueError(
                f"{path_name(path)!r} has at most rank {full}, found rank={r}. Write "
                f"resize(params, {{{path_name(path)!r}: {full}}})."
            )
    new: dict[Path, Any] = {}
    for path, r in ranks.items():
        adapter = arrays_of(adapters[path], leaves)
        if r == adapter.a.shape[-1]:
            continue
        factors = factor_matrices(unbox(leaves[path]).shape, adapter)
        adapter, factors = with_scale_in_b(adapter, factors)
        if r < adapter.a.shape[-1]:
            factors = truncated(factors, r)
        else:
            factors = padded(factors, r, path_key(key, path))
        new |= adapter_leaves(path, leaves[path], with_matrices(adapter, factors))
    return unflatten(params, leaves | new)


def extract(
    tuned: PyTree,
    base: PyTree,
    rank: int | Mapping[str, int],
    *,
    targets: Selector | None = None,
    exclude: Selector = (),
    also: Patterns = (),
    axes: Mapping[str, Axes] | None = None,
) -> PyTree:
    """Returns the adapters that come nearest to a full fine-tune.

    The update of each weight has the largest singular values of the weight's change,
    tuned - base: no other update of that rank is nearer in the Frobenius norm. (If both
    sides of a weight are above 1,024, random projections as in Halko et al., 2011, come
    close to it.) `kept` returns how much of the change the adapters keep.

    Args:
      tuned: The parameters after the fine-tune.
      base: The parameters before it, with the same paths and shapes; weights may be
        quantized.
      rank: The rank, or `{pattern: rank}`, as in `lorafy`.
      targets: Which weights, as in `lorafy`.
      exclude: What to leave out, as in `lorafy`.
      also: Patterns of leaves that are copied from `tuned`, as trained copies.
      axes: Dimensions of weights, as in `lorafy`.

    Returns:
      The tree of `lorafy(base, rank, ...)` with these adapters, of scale 1.

    Raises:
      ValueError: If the trees differ in a path or a shape, if a leaf changed that gets
        neither an adapter nor a copy, or if a change is not finite; and as `lorafy`.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> base = {"kernel": jnp.zeros((4, 3))}
      >>> tuned = {"kernel": jnp.ones((4, 3))}
      >>> params = lj.extract(tuned, base, rank=1)
      >>> print(lj.kept(tuned, params))
      weight  rank    kept
      kernel     1  100.0%

    Reference:
      Halko et al., "Finding structure with randomness", 2011.
      https://arxiv.org/abs/0909.4061
    """
    if targets is None and not axes and not isinstance(rank, Mapping):
        # The default without its warning: a leaf that changed and is left out raises.
        targets = "kernel"
    start = flatten(
        lorafy(
            as_tree(base),
            rank,
            targets=targets,
            exclude=exclude,
            also=also,
            axes=axes,
        )
    )
    after = flatten(tuned)
    adapters = find_adapters(start)
    before = without_adapters(start, adapters)
    _check_alike(before, after)
    changed = [
        path
        for path in before
        if path not in adapters and _differs(before[path], after[path])
    ]
    if changed:
        raise ValueError(
            f"No adapter covers the changes of {listed(changed)}. Add them to targets, "
            "or to also."
        )
    new: dict[Path, Any] = {}
    for path, adapter in adapters.items():
        if not isinstance(adapter, LowRank):
            new[adapter.w] = trained_copy(before[path], unbox(after[path]))
            continue
        w, adapter = unbox(start[path]), arrays_of(adapter, start)
        change = _change(unbox(after[path]), w)
        if not (is_traced(change) or jnp.isfinite(change).all()):
            raise ValueError(f"The change of {path_name(path)!r} is not finite.")
        factors = factor_matrices(w.shape, adapter)
        factors = nearest(weight_matrices(change, adapter.axes), factors)
        adapter = dataclasses.replace(adapter, scale=jnp.ones_like(adapter.scale))
        new |= adapter_leaves(path, start[path], with_matrices(adapter, factors))
    return unflatten(base, start | new)


class Kept(NamedTuple):
    """How much of each weight's change its adapter keeps. Prints as a table.

    `rows` has `(path, rank, share)`: 1 - |change - update|^2 / |change|^2.
    """

    rows: tuple[tuple[str, int, float], ...]

    def __str__(self) -> str:
        cells = [("weight", "rank", "kept")]
        cells += [(path, str(r), f"{share:.1%}") for path, r, share in self.rows]
        first, second, third = (
            max(map(len, column)) for column in zip(*cells, strict=True)
        )
        return "\n".join(
            f"{a.ljust(first)}  {b.rjust(second)}  {c.rjust(third)}"
            for a, b, c in cells
        )


def kept(tuned: PyTree, params: PyTree) -> Kept:
    """Returns how much of a fine-tune's change the adapters keep, for each weight.

    Args:
      tuned: The parameters after the fine-tune.
      params: A tree from `extract`, or from `lorafy` on the parameters before it.

    Returns:
      `Kept(rows)`, which prints as a table.

    Raises:
      ValueError: If the trees differ in a path or a shape, or an adapter is broken.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> params = lj.lorafy({"kernel": jnp.zeros((4, 3))}, rank=1)
      >>> lj.kept({"kernel": jnp.ones((4, 3))}, params).rows
      (('kernel', 1, 0.0),)
    """
    leaves, after = flatten(params), flatten(tuned)
    found = find_adapters(leaves)
    check_values(leaves, found)
    _check_alike(without_adapters(leaves, found), after)
    rows = []
    for path, adapter in of_rank(found).items():
        w, arrays = unbox(leaves[path]), arrays_of(adapter, leaves)
        change = _change(unbox(after[path]), w)
        if adapter.magnitude is None:
            update = delta(align(w, *arrays)).astype(change.dtype)
        else:  # the update of DoRA is no product of factors
            update = _change(materialize(from_leaves(w, *arrays)), w)
        total, rest = jnp.sum(change**2), jnp.sum((change - update) ** 2)
        share = 1 - float(rest / total) if total else 1.0
        rows.append((path_name(path), arrays.a.shape[-1], share))
    return Kept(tuple(rows))


def principal(params: PyTree) -> PyTree:
    """Initializes each adapter to the largest singular values of its weight (PiSSA).

    The product of A and B becomes the part of the weight W with the largest singular
    values, and that part is subtracted from W: the model computes the same, up to
    rounding, and training changes the principal part of each weight.

    The result has a new base. To get adapters of the original base, subtract the
    initial ones: `add(trained, rescale(start, -1))`, where `start` is the tree that
    this function returned, adapts the original base, at twice the rank.

    Args:
      params: A tree from `lorafy`, not yet trained: B is zero.

    Returns:
      A tree with the same structure; it shares the leaves of weights without adapters.

    Raises:
      ValueError: If an adapter is trained or broken, or if its weight is quantized or
        not finite.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj
      >>> base = {"kernel": jnp.arange(12.0).reshape(4, 3)}
      >>> start = lj.principal(lj.lorafy(base, 2))
      >>> trained = start | {"lora_b": 2 * start["lora_b"]}
      >>> plain = lj.detach(lj.add(trained, lj.rescale(start, -1)))
      >>> merged = lj.merge(lj.attach(plain, base))["kernel"]
      >>> bool(jnp.allclose(merged, lj.merge(trained)["kernel"], atol=1e-4))
      True

    Reference:
      Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of
      Large Language Models", 2024. https://arxiv.org/abs/2404.02948
    """
    leaves = flatten(params)
    found = find_adapters(leaves)
    check_values(leaves, found)
    adapters = of_rank(found)
    for path, adapter in adapters.items():
        w, b = unbox(leaves[path]), unbox(leaves[adapter.b])
        if is_quantized(w):
            raise ValueError(
                f"{path_name(path)!r} is quantized, and what remains of it would be "
                "rounded again. Write quantize(principal(lorafy(params, rank)), how)."
            )
        if not is_traced(b) and b.any():
            raise ValueError(
                f"The adapter of {path_name(path)!r} is trained: its B is not zero. "
                "Start from lorafy(strip(params), rank)."
            )
        if not is_traced(w) and not jnp.isfinite(jnp.asarray(w)).all():
            raise ValueError(f"{path_name(path)!r} is not finite. Restore it.")
    new: dict[Path, Any] = {}
    for path, adapter in adapters.items():
        w, adapter = unbox(leaves[path]), arrays_of(adapter, leaves)
        wide = jnp.asarray(w, wider(w.dtype))
        factors = factor_matrices(w.shape, adapter)
        a, b = nearest(weight_matrices(wide, adapter.axes), factors)
        # The scale stays, and multiplies the product: divide each factor by its root. A
        # rank whose scale is zero gets nothing.
        scale = jnp.reshape(scale_of_ranks(adapter), (len(a), 1, -1)).astype(a.dtype)
        root = jnp.sqrt(jnp.where(scale == 0, 1, jnp.abs(scale)))
        b = b / jnp.swapaxes(root, 1, 2) * jnp.swapaxes(jnp.sign(scale), 1, 2)
        adapter = with_matrices(adapter, Matrices(a / root, b))
        rest = wide - delta(align(w, *adapter)).astype(wide.dtype)
        rest = put_like(rest.astype(w.dtype), tuple(range(w.ndim)), w)
        new |= {path: rebox(leaves[path], rest)}
        new |= adapter_leaves(path, leaves[path], adapter)
    return unflatten(params, leaves | new)


def _change(after: Any, before: Any) -> jax.Array:
    """Returns the change of a weight, in float32 or wider."""
    after, before = dequantize(after), dequantize(before)
    dtype = wider(after.dtype, before.dtype)
    return jnp.asarray(after, dtype) - jnp.asarray(before, dtype)


def _differs(before: Any, after: Any) -> bool:
    """Whether two leaves are known to differ; counters and tracers are not compared."""
    x, y = unbox(before), unbox(after)
    if is_counter(before) or not is_array(x) or is_traced(x) or is_traced(y):
        return False
    return not bool(jnp.array_equal(dequantize(x), dequantize(y)))


def _check_alike(before: dict[Path, Any], after: dict[Path, Any]) -> None:
    for path in before | after:
        found = [getattr(unbox(x.get(path)), "shape", None) for x in (before, after)]
        if (path in before) != (path in after) or found[0] != found[1]:
            raise ValueError(
                f"{path_name(path)!r} has shape {found[1]} in tuned and {found[0]} in "
                "base. Pass two trees of one model, without adapters."
            )
