"""Adapters from singular values: of another rank, a fine-tune, or the weight."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapters import (
    Axes,
    LowRank,
    arrays_of,
    find_adapters,
    of_rank,
    without_adapters,
)
from lora_jax._arithmetic import check_values
from lora_jax._engine.dora import weight
from lora_jax._engine.factors import align, delta, materialize, wider
from lora_jax._engine.quantized import dequantize
from lora_jax._leaves import (
    adapter_leaves,
    gaussian,
    path_key,
    put_like,
    trained_copy,
)
from lora_jax._lorafy import lorafy
from lora_jax._patterns import Patterns, Selector, by_pattern
from lora_jax._targets import check_rank
from lora_jax._tree import (
    Path,
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

# Of a weight whose smaller side is larger, only as many directions are looked for as
# are asked for, by random ones (Halko et al., 2011).
LARGE = 1024
MORE, ROUNDS = 16, 4  # directions beyond the rank, and passes over the weight


class Thin(NamedTuple):
    """An adapter's factors as matrices, one pair for each layer of a stack."""

    a: jax.Array  # (batch, in, r)
    b: jax.Array  # (batch, r, out)


def resize(
    params: Any, rank: int | Mapping[str, int], *, key: jax.Array | None = None
) -> Any:
    """Gives adapters another rank: exactly if larger, as near as can be if smaller.

    A larger one computes the same: the new rows of B are zero, and the new columns of A
    are drawn as `lorafy` draws them, so that they learn. A smaller one has the nearest
    update in the Frobenius norm, that of the largest singular values (Eckart and Young,
    1936), by QR and SVD of the thin factors: nothing of the weight's size is made.
    Scales stay as they are, DoRA's magnitudes, and trained copies.

    Args:
      params: A tree from `lorafy`, trained or not.
      rank: The new rank, or `{pattern: rank}` for some weights.
      key: Random key for new columns of A, as in `lorafy`.

    Returns:
      A tree that shares all leaves but the factors whose rank changes.

    Raises:
      ValueError: If a rank is below 1 or above the inputs or outputs of a weight, which
        hold no more directions; if a pattern matches no adapter, or an adapter is
        broken or not finite.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> params = lj.resize(lj.lorafy({"kernel": jnp.ones((4, 3))}, 3), 2)
      >>> params["lora_a"].shape, params["lora_b"].shape
      ((4, 2), (2, 3))

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
        full = min(_sizes(unbox(leaves[path]).shape, adapters[path].axes)[1:])
        if r > max(full, unbox(leaves[adapters[path].a]).shape[-1]):
            raise ValueError(
                f"{path_name(path)!r} holds at most {full} directions, and rank {r} is "
                f"more. Write resize(params, {{...: {full}}})."
            )
    new: dict[Path, Any] = {}
    for path, r in ranks.items():
        w, own = unbox(leaves[path]), arrays_of(adapters[path], leaves)
        if r < own.a.shape[-1]:
            thin = _truncated(_thin(w.shape, own), r)
        elif r > own.a.shape[-1]:
            thin = _padded(w.shape, own, r, path_key(key, path))
        else:
            continue
        new |= adapter_leaves(path, leaves[path], _like(own, thin))
    return unflatten(params, leaves | new)


def extract(
    tuned: Any,
    base: Any,
    rank: int | Mapping[str, int],
    *,
    targets: Selector | None = None,
    exclude: Selector = (),
    also: Patterns = (),
    axes: Mapping[str, Axes] | None = None,
) -> Any:
    """Finds the adapters that come nearest to a full fine-tune.

    Of each weight's change, tuned - base, they are the directions of the largest
    singular values: no other update of that rank is nearer in the Frobenius norm. (Of a
    weight with both sides above 1,024 nearly so: by random projections, as in Halko et
    al., 2011.) How much of the change they hold, `kept` says.

    Args:
      tuned: The parameters after the fine-tune.
      base: Those before it, the tree of the same leaves; some may be in few bits.
      rank: The rank, or `{pattern: rank}`, as in `lorafy`.
      targets: Which weights, as in `lorafy`.
      exclude: Which not, as in `lorafy`.
      also: Patterns of leaves that are taken over whole, as trained copies.
      axes: Dimensions of weights, as in `lorafy`.

    Returns:
      The tree of `lorafy(base, rank, ...)`, its scales 1, with these adapters.

    Raises:
      ValueError: If the trees differ in a path or a shape, a leaf has moved that gets
        neither adapter nor copy, or a change is not finite; and as `lorafy`.

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
        targets = "kernel"  # no warning: what is left out has not moved, or raises
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
    moved = [
        path for path in before if path not in adapters and _moved(before, after, path)
    ]
    if moved:
        raise ValueError(
            f"{listed(moved)} moved, and would get no adapter: the result would not be "
            "near the fine-tune. Add them to targets, or to also."
        )
    new: dict[Path, Any] = {}
    for path, own in adapters.items():
        if not isinstance(own, LowRank):
            new[own.w] = trained_copy(before[path], unbox(after[path]))
            continue
        w, own = unbox(start[path]), arrays_of(own, start)
        change = _change(unbox(after[path]), w)
        if not (is_traced(change) or jnp.isfinite(change).all()):
            raise ValueError(f"The change of {path_name(path)!r} is not finite.")
        thin = _nearest(_matrices(change, own.axes), _thin(w.shape, own))
        values = dataclasses.replace(_like(own, thin), scale=jnp.ones_like(own.scale))
        new |= adapter_leaves(path, start[path], values)
    return unflatten(base, start | new)


class Kept(NamedTuple):
    """How much of each weight's change its adapter holds. Prints a table.

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


def kept(tuned: Any, params: Any) -> Kept:
    """Says how much of a fine-tune's change adapters hold, weight by weight.

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
    for path, own in of_rank(found).items():
        w, arrays = unbox(leaves[path]), arrays_of(own, leaves)
        change = _change(unbox(after[path]), w)
        if own.magnitude is None:
            update = delta(align(w, *arrays)).astype(change.dtype)
        else:  # with DoRA's magnitudes the update is no product
            update = _change(materialize(weight(w, *arrays)), w)
        left = change - update
        whole = jnp.sum(change**2)
        share = 1 - float(jnp.sum(left**2) / whole) if whole else 1.0
        rows.append((path_name(path), arrays.a.shape[-1], share))
    return Kept(tuple(rows))


def principal(params: Any) -> Any:
    """Starts each adapter on the largest singular directions of its weight (PiSSA).

    A and B become those directions, and the base W minus them: all computes what it did
    before, to rounding, and the adapters train what matters most in a weight.

    The base is another one from now on. To have adapters of the first one again, take
    off what was put in: `add(trained, rescale(start, -1))`, where `start` is what this
    returned, adapts it, at twice the rank.

    Args:
      params: A tree from `lorafy`, not yet trained: B is zero.

    Returns:
      A tree of the same leaves; those of weights without an adapter are shared.

    Raises:
      ValueError: If an adapter is trained, a weight is in few bits or not finite, or
        an adapter is broken.

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
    for path, own in adapters.items():
        w, b = unbox(leaves[path]), unbox(leaves[own.b])
        if is_quantized(w):
            raise ValueError(
                f"{path_name(path)!r} is in few bits, and what is left of it would be "
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
    for path, own in adapters.items():
        w, old = unbox(leaves[path]), arrays_of(own, leaves)
        wide = jnp.asarray(w, wider(w.dtype))
        thin = _nearest(_matrices(wide, own.axes), _thin(w.shape, old))
        each = jnp.sqrt(jnp.reshape(old.scale, (-1, 1, 1)).astype(thin.a.dtype))
        values = _like(old, Thin(thin.a / each, thin.b / each))
        rest = wide - delta(align(w, *values)).astype(wide.dtype)
        rest = put_like(rest.astype(w.dtype), tuple(range(w.ndim)), w)
        new |= {path: rebox(leaves[path], rest)}
        new |= adapter_leaves(path, leaves[path], values)
    return unflatten(params, leaves | new)


# Factors as matrices, and back.


def _thin(shape: tuple[int, ...], own: LowRank[Any]) -> Thin:
    """The factors of a weight as matrices, in float32 or wider."""
    a, b = own.a, own.b
    dtype, r = wider(a.dtype, b.dtype), a.shape[-1]
    n, n_in, n_out = _sizes(shape, own.axes)
    if own.aligned:  # the rank last, and size 1 elsewhere
        a, b = (jnp.transpose(x, _order(own.axes, x)) for x in (a, b))
        b = jnp.swapaxes(jnp.reshape(b, (n, n_out, r)), 1, 2)
    return Thin(
        jnp.reshape(a, (n, n_in, r)).astype(dtype),
        jnp.reshape(b, (n, r, n_out)).astype(dtype),
    )


def _like(own: LowRank[Any], thin: Thin) -> LowRank[Any]:
    """An adapter with matrices for factors, of another rank perhaps.

    Without its magnitude, which stays in the tree as it is.
    """
    a, b, r = own.a, own.b, thin.a.shape[-1]
    if not own.aligned:
        n = len(own.axes.batch)
        sizes = (*a.shape[:-1], r), (*b.shape[:n], r, *b.shape[n + 1 :])
        new = [jnp.reshape(x, size) for x, size in zip(thin, sizes, strict=True)]
    else:
        new = []
        for x, old in ((thin.a, a), (jnp.swapaxes(thin.b, 1, 2), b)):
            order = _order(own.axes, old)
            sizes = [(*old.shape[:-1], r)[d] for d in order]
            new.append(jnp.transpose(jnp.reshape(x, sizes), np.argsort(order)))
    a, b = (x.astype(old.dtype) for x, old in zip(new, (a, b), strict=True))
    return dataclasses.replace(own, a=a, b=b, magnitude=None)


def _order(axes: Axes, x: Any) -> tuple[int, ...]:
    return (*axes.batch, *axes.inputs, *axes.outputs, x.ndim - 1)


def _sizes(shape: tuple[int, ...], axes: Axes) -> list[int]:
    return [math.prod(shape[d] for d in dims) for dims in axes]


def _matrices(w: jax.Array, axes: Axes) -> jax.Array:
    """A weight as matrices: (batch, in, out)."""
    w_order = (*axes.batch, *axes.inputs, *axes.outputs)
    return jnp.reshape(jnp.transpose(w, w_order), _sizes(w.shape, axes))


# Singular values.


def _highest(fn: Callable[..., Any]) -> Callable[..., Any]:
    """With all digits in each product, on any device."""

    def precise(*args):
        with jax.default_matmul_precision("highest"):
            return fn(*args)

    return precise


def _truncated(thin: Thin, r: int) -> Thin:
    """The nearest product of rank r, from the thin factors alone.

    With A = Q R and B^T = P T, and U S V^T of R T^T, the nearest A B is the product of
    Q U S^1/2 = A T^T V S^-1/2 and S^1/2 V^T P^T = S^-1/2 U^T R B: neither Q nor P is
    made.
    """

    @_highest
    def one(a, b):
        r_a, r_b = (jnp.linalg.qr(x, mode="r") for x in (a, b.T))
        u, s, v = jnp.linalg.svd(r_a @ r_b.T, full_matrices=False)
        u, s, v = u[:, :r], s[:r], v[:r]
        live = s > s[0] * jnp.finfo(s.dtype).eps
        root = jnp.where(live, 1 / jnp.sqrt(jnp.where(live, s, 1)), 0)
        return a @ (r_b.T @ v.T * root[None]), (root[:, None] * (u.T @ r_a)) @ b

    a, b = jax.vmap(one)(*thin)
    missing = r - a.shape[-1]  # above the full rank: no direction is left
    return Thin(
        jnp.pad(a, ((0, 0), (0, 0), (0, missing))),
        jnp.pad(b, ((0, 0), (0, missing), (0, 0))),
    )


def _padded(shape: tuple[int, ...], own: LowRank[Any], r: int, key: jax.Array) -> Thin:
    """The same product of a larger rank: zeros in B, new directions in A."""
    old = _thin(shape, own)
    n, n_in, r_old = old.a.shape
    keys = jax.random.split(key, n)
    more = jax.vmap(lambda key: gaussian(key, (n_in, r - r_old), old.a.dtype))(keys)
    zeros = jnp.zeros((n, r - r_old, old.b.shape[-1]), old.b.dtype)
    return Thin(jnp.concatenate([old.a, more], 2), jnp.concatenate([old.b, zeros], 1))


def _nearest(matrices: jax.Array, start: Thin) -> Thin:
    """The nearest products to matrices (batch, in, out), of the rank of `start`.

    Directions that a matrix does not have stay as they start: A drawn, B zero.
    """
    r = start.a.shape[-1]
    least = min(matrices.shape[1:])
    few = least > LARGE and r + MORE < least // 2

    @_highest
    def one(m, a, b):
        u, s, v = (
            _largest(m, r + MORE) if few else jnp.linalg.svd(m, full_matrices=False)
        )
        k = min(r, least)
        u, s, v = u[:, :k], s[:k], v[:k]
        live = s > s[0] * jnp.finfo(s.dtype).eps * least
        root = jnp.sqrt(s)
        a = a.at[:, :k].set(jnp.where(live[None], u * root[None], a[:, :k]))
        b = b.at[:k].set(jnp.where(live[:, None], root[:, None] * v, 0))
        return a, b

    a, b = jax.vmap(one)(matrices.astype(start.a.dtype), *start)
    return Thin(a, jnp.where(jnp.arange(r)[None, :, None] < least, b, 0))


def _largest(m: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """About the k largest singular values and vectors (Halko et al., algorithm 4.4)."""
    q = jax.random.normal(jax.random.key(0), (m.shape[1], k), m.dtype)
    q, _ = jnp.linalg.qr(m @ q)
    for _ in range(ROUNDS):
        q, _ = jnp.linalg.qr(m.T @ q)
        q, _ = jnp.linalg.qr(m @ q)
    u, s, v = jnp.linalg.svd(q.T @ m, full_matrices=False)
    return q @ u, s, v


# Trees of a fine-tune.


def _change(after: Any, before: Any) -> jax.Array:
    """How far a weight moved, in float32 or wider."""
    after, before = dequantize(after), dequantize(before)
    dtype = wider(after.dtype, before.dtype)
    return jnp.asarray(after, dtype) - jnp.asarray(before, dtype)


def _moved(before: dict[Path, Any], after: dict[Path, Any], path: Path) -> bool:
    x, y = unbox(before[path]), unbox(after[path])
    if is_counter(before[path]) or not is_array(x) or is_traced(x) or is_traced(y):
        return False
    return not bool(jnp.array_equal(dequantize(x), dequantize(y)))


def _check_alike(before: dict[Path, Any], after: dict[Path, Any]) -> None:
    for path in before | after:
        found = [getattr(unbox(x.get(path)), "shape", None) for x in (before, after)]
        if (path in before) != (path in after) or found[0] != found[1]:
            raise ValueError(
                f"{path_name(path)!r} is {found[1]} in tuned and {found[0]} in base: "
                "pass two trees of one model, without adapters."
            )
