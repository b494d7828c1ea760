"""Factored products: `w + scale * a b` times an array, without materializing the sum.

Each function takes the arguments of its namesake in `jax.lax` and adds the product with
the low-rank factors to the product with the weight: first with the factor that holds
more of the contracted dimensions, then with the other. Derivatives of every order, in
both modes, are JAX's own, except for one rule in low_rank.py that chooses the order of
their products.

`x (w + a b)` would save a pass over the output, but its derivative is that of full
fine-tuning: a step takes 1.17 instead of 0.63 of the full step's time, even with many
tokens and a small weight, and a batch of adapters would hold a weight each.

A quantized weight is dequantized for its product alone, and again in the derivative.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._engine import companions, low_rank, quantized_views
from lora_jax._engine.dtypes import wider
from lora_jax._engine.factors import (
    Factors,
    delta_flops,
    dims_of,
    follow,
    gain_dims,
    materialize,
    squeeze_absent,
)
from lora_jax._engine.low_rank import RANK, Labels
from lora_jax._engine.quantized import is_quantized, through
from lora_jax._engine.shapes import size

GROUP = -2  # the label of a group of channels, as RANK is that of the rank
# The FLOPs that W + scale * A B as one array must save. With fewer, starting an
# operation takes longer than the operation.
WORTHWHILE = 2**17


def dot_general(
    x: jax.Array,
    f: Factors,
    dimension_numbers: Any,
    *,
    swap: bool = False,
    drop: Callable[[jax.Array], jax.Array] | None = None,
    looped: bool = False,
    **params: Any,
) -> jax.Array:
    """`lax.dot_general(x, (w + scale * a b) * gain)`, any dimensions contracted.

    The gain is along outputs or along contracted dimensions, not along both.

    Args:
      x: The plain operand.
      f: The adapted operand.
      dimension_numbers: Those of the call: for (x, f), or for (f, x) with `swap`.
      swap: Whether the adapted operand is the left one.
      drop: Dropout, applied to `x` on its way to the factors.
      looped: Whether this is the body of a loop.
      **params: The other parameters of `lax.dot_general`.
    """
    dropped = None if drop is None else drop(x)
    options = tuple(params.items())
    return _dot_general(x, dropped, f, dimension_numbers, swap, looped, options)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6), inline=True)
def _dot_general(
    x: jax.Array,
    dropped: jax.Array | None,
    f: Factors,
    dimension_numbers: Any,
    swap: bool,
    looped: bool,
    options: tuple[tuple[str, Any], ...],
) -> jax.Array:
    """Jitted, so that JAX traces and differentiates the products of equal layers once.

    This saves a fifth to a third of the time to trace a step of twelve layers.
    """
    params = dict(options)

    def product(x, w):
        operands = (w, x) if swap else (x, w)
        return lax.dot_general(*operands, dimension_numbers, **params)

    (x_sum, f_sum), (x_batch, f_batch) = _by_operand(dimension_numbers, swap)
    f_labels = list(range(f.ndim))
    x_labels = list(range(f.ndim, f.ndim + x.ndim))
    for i, j in zip((*x_sum, *x_batch), (*f_sum, *f_batch), strict=True):
        x_labels[i] = f_labels[j]
    paired = {*f_sum, *f_batch}
    x_free = [n for n in x_labels if n not in paired]
    f_free = [n for n in f_labels if n not in paired]
    out = [*f_batch, *f_free, *x_free] if swap else [*f_batch, *x_free, *f_free]

    if {*gain_dims(f)}.intersection(f_sum):
        # In the dtype of the product: x may have fewer digits.
        dtype = _compute_dtype(x, f, x)
        x = _times_gain(x.astype(dtype), f, x_labels)
        if dropped is not None:
            dropped = _times_gain(dropped.astype(dtype), f, x_labels)
        f = dataclasses.replace(f, gain=None)
    if not f.rank:
        return through(product, x, f.w, looped=looped)
    x = low_rank.made_once(x)
    y = through(product, x, f.w, looped=looped)

    dtype = _compute_dtype(x, f, y)
    parts = []
    for factor in (f.a, f.b if f.has_rank_scales else scaled(f)):
        labels = [f_labels[d] for d in dims_of(factor)]
        summed = size(factor.shape[d] for d in dims_of(factor) if d not in out)
        parts.append((summed, squeeze_absent(factor).astype(dtype), [*labels, RANK]))
    (_, first, of_first), (_, second, of_second) = sorted(parts, key=lambda p: -p[0])
    # The first product keeps the dimensions that the second factor or the output has.
    needed = {*out, *of_second}
    kept = list(dict.fromkeys(n for n in (*x_labels, *of_first) if n in needed))
    precision = params.get("precision")
    x = x if dropped is None else dropped
    h = low_rank.einsum(x.astype(dtype), x_labels, first, of_first, kept, precision)
    if f.has_rank_scales:
        h = _times_companion(h, f.scale, [*dims_of(f.scale), RANK], kept)
    rows, columns = [*x_free, RANK], [*f_free, RANK]
    in_order = [*x_free, *f_free] == out and (kept, of_second) == (rows, columns)
    if in_order and not low_rank.is_explicit(y):
        y = low_rank.add(y, h, second, precision)
    else:
        update = low_rank.einsum(h, kept, second, of_second, out, precision, y.dtype)
        y = y + _like(y, update.astype(y.dtype))
    return _times_gain(y, f, out)


def is_dearer(base: int, extra: int, f: Factors) -> bool:
    """Whether the factors of a product cost more than the array W + scale * A B would.

    Both are compared in a step of training. The factors add `extra` FLOPs to the `base`
    of the plain product, and about as many again for each of two derivatives. The array
    takes the FLOPs of `delta` as often, and its gradient is one more product of `base`
    FLOPs. `extra` counts four times rather than three, so that a forward pass alone
    takes at most 5/4 of the plain one.
    """
    array = delta_flops(f)
    return extra - array > WORTHWHILE and 4 * extra > base + 4 * array


def dot_general_flops(
    x: Any, f: Factors, dimension_numbers: Any, swap: bool
) -> tuple[int, int]:
    """The FLOPs of `lax.dot_general` with the plain weight, and what factors add."""
    (x_sum, f_sum), (x_batch, f_batch) = _by_operand(dimension_numbers, swap)
    paired = dict(zip((*x_sum, *x_batch), (*f_sum, *f_batch), strict=True))
    sizes = dict(enumerate(f.shape))
    sizes |= {f.ndim + d: n for d, n in enumerate(x.shape) if d not in paired}
    of_x = {paired.get(d, f.ndim + d) for d in range(x.ndim)}
    out = {*sizes} - {*f_sum}
    flops = lambda dims: 2 * size(sizes[d] for d in dims)
    parts = [{*dims_of(f.a)}, {*dims_of(f.b)}]
    first, second = sorted(parts, key=lambda dims: -size(sizes[d] for d in dims - out))
    first_met = (of_x & (out | first | second)) | first
    kept = (of_x | first) & (out | second)
    return flops(sizes), f.rank * (flops(first_met) + flops(kept | second))


def _by_operand(dimension_numbers: Any, swap: bool) -> Any:
    """The contracted and the batch dimensions, each as those of x and of the weight."""
    return ((pair[::-1] if swap else pair) for pair in dimension_numbers)


def _times_gain(x: jax.Array, f: Factors, labels: Labels) -> jax.Array:
    """An array times the gain of a weight, whose dimensions it has in `labels`."""
    return x if f.gain is None else _times_companion(x, f.gain, gain_dims(f), labels)


def _times_companion(
    x: jax.Array, c: jax.Array, c_labels: Labels, labels: Labels
) -> jax.Array:
    """An array times a companion, whose dimensions above size 1 are `c_labels`."""
    sizes = dict(zip(c_labels, (n for n in c.shape if n != 1), strict=True))
    order = [n for n in labels if n in sizes]
    c = jnp.reshape(c, [sizes[n] for n in c_labels])
    c = jnp.transpose(c, [c_labels.index(n) for n in order])
    c = jnp.reshape(c, [sizes.get(n, 1) for n in labels])
    wide = wider(x.dtype, c.dtype)
    return (x.astype(wide) * c.astype(wide)).astype(x.dtype)


def _like(y: jax.Array, product: jax.Array) -> jax.Array:
    """The product with the sharding of the plain one, on a mesh with explicit axes."""
    if not low_rank.is_explicit(y):
        return product
    sizes = zip(product.shape, y.shape, jax.typeof(y).sharding.spec, strict=True)
    spec = (names if n == full else None for n, full, names in sizes)
    mesh = jax.typeof(y).sharding.mesh
    return jax.sharding.reshard(product, NamedSharding(mesh, PartitionSpec(*spec)))


def conv_general_dilated(
    x: jax.Array,
    f: Factors,
    *,
    dimension_numbers: Any,
    drop: Callable[[jax.Array], jax.Array] | None = None,
    looped: bool = False,
    **params: Any,
) -> jax.Array | None:
    """`lax.conv_general_dilated(x, w + scale * a b)`; None if it cannot be factored.

    One factor convolves over the window, the other mixes channels at each position: the
    output channels afterwards or, in a derivative by x, the input channels before.
    """
    convolve = functools.partial(
        lax.conv_general_dilated, dimension_numbers=dimension_numbers, **params
    )
    if not f.rank:
        return through(convolve, x, f.w, looped=looped)
    out_channel, in_channel, *window = dimension_numbers.rhs_spec
    order = _in_order(f, [in_channel], [out_channel])
    if order is None or params["batch_group_count"] != 1:
        return None
    first, second = order
    groups = params["feature_group_count"]
    before = not {*window}.isdisjoint(dims_of(second))
    if before and (groups > 1 or not {*window}.isdisjoint(dims_of(first))):
        return None
    if gain_dims(f) not in ([], [out_channel]):
        return None

    out, r = f.shape[out_channel], first.shape[-1]
    if drop is None and groups * r > size([out]):
        # As in a depthwise convolution: the factors would compute r times as many
        # elements as the output has, and the kernel is small.
        return convolve(x, materialize(f))
    if drop is None and not is_quantized(f.w) and f.dtype.itemsize > 3 and not before:
        rows = size(jax.eval_shape(convolve, x, f.w).shape) // size([out])
        inputs = size(n for d, n in enumerate(f.shape) if d != out_channel)
        base = 2 * rows * inputs * size([out])
        if is_dearer(base, 2 * rows * r * (groups * inputs + size([out])), f):
            return convolve(x, materialize(f))
    y = through(convolve, x, f.w, looped=looped)
    dtype = _compute_dtype(x, f, y)
    precision = params.get("precision")
    x = (x if drop is None else drop(x)).astype(dtype)
    at = dimension_numbers.out_spec[1]
    labels = [out_channel if d == at else f.ndim + d for d in range(y.ndim)]
    if before:
        channel = dimension_numbers.lhs_spec[1]
        matrix = _matrix(first, f.shape[in_channel])
        h = _mix(x, matrix, channel, 1, precision, into_rank=True)
        h = _times_rank_scales(h, f, channel, 1)
        product = convolve(h, _window(f, second, in_channel, 1, dtype))
    else:
        h = convolve(x, _window(f, first, out_channel, groups, dtype))
        channel, matrix = dimension_numbers.out_spec[1], _matrix(second, out)
        h = _times_rank_scales(h, f, channel, groups)
        if groups == 1 and channel == y.ndim - 1 and not low_rank.is_explicit(y):
            y = low_rank.add(y, h, matrix.astype(dtype), precision)
            return _times_gain(y, f, labels)
        product = _mix(h, matrix, channel, groups, precision)
    return _times_gain(y + product.astype(y.dtype), f, labels)


def _times_rank_scales(
    h: jax.Array, f: Factors, channel: int, groups: int
) -> jax.Array:
    """The product with the first factor times the scale of each rank, if it has one.

    The ranks are the channels, in each of the groups.
    """
    if not _has_only_rank_scales(f):
        return h
    scale = jnp.tile(jnp.reshape(f.scale, (-1,)), groups)
    return _times_companion(h, scale, [channel], list(range(h.ndim)))


def _has_only_rank_scales(f: Factors) -> bool:
    """Whether the scale differs between ranks, and not between layers or experts."""
    return f.has_rank_scales and not dims_of(f.scale)


def _window(
    f: Factors, factor: jax.Array, channel: int, groups: int, dtype: Any
) -> jax.Array:
    """The factor as a kernel: its rank, for each group, is the missing `channel`."""
    sizes = [1 if d == channel else n for d, n in enumerate(f.shape)]
    kernel = jnp.broadcast_to(factor, (*sizes, factor.shape[-1])).astype(dtype)
    kernel = lax.concatenate([lax.squeeze(kernel, [channel])] * groups, f.ndim - 1)
    return jnp.moveaxis(kernel, -1, channel)


def _matrix(factor: jax.Array, channels: int) -> jax.Array:
    """A factor of channels alone: (channels, r)."""
    r = factor.shape[-1]
    return jnp.broadcast_to(jnp.reshape(factor, (-1, r)), (channels, r))


def _mix(
    x: jax.Array,
    matrix: jax.Array,
    channel: int,
    groups: int,
    precision: Any,
    *,
    into_rank: bool = False,
) -> jax.Array:
    """Maps the channels of x from the rank to channels, or back, in each group."""
    channels, r = matrix.shape
    # The channels are (groups, r) on one side, and (groups, channels of a group) on the
    # other.
    group = [GROUP] if groups > 1 else []
    matrix = jnp.reshape(matrix, (*(groups for _ in group), channels // groups, r))
    old, new = (channel, RANK) if into_rank else (RANK, channel)
    split = lambda label: [
        n for d in range(x.ndim) for n in ([*group, label] if d == channel else [d])
    ]
    sizes = dict(enumerate(x.shape)) | {GROUP: groups, old: x.shape[channel] // groups}
    y = low_rank.einsum(
        *(jnp.reshape(x, [sizes[n] for n in split(old)]), split(old)),
        *(matrix.astype(x.dtype), [*group, channel, RANK], split(new), precision),
    )
    shape = list(x.shape)
    shape[channel] = r if into_rank else channels
    return jnp.reshape(y, shape)


def ragged_dot_general(
    x: jax.Array,
    f: Factors,
    group_sizes: jax.Array,
    *,
    ragged_dot_dimension_numbers: lax.RaggedDotDimensionNumbers,
    drop: Callable[[jax.Array], jax.Array] | None = None,
    looped: bool = False,
    **params: Any,
) -> jax.Array | None:
    """`lax.ragged_dot_general(x, w + scale * a b, sizes)`: rows of x in groups.

    None unless each group has a matrix of its own, as experts have.
    """
    numbers = ragged_dot_dimension_numbers
    product = functools.partial(
        lax.ragged_dot_general, group_sizes=group_sizes, **params
    )
    with_weight = functools.partial(product, ragged_dot_dimension_numbers=numbers)
    if not f.rank:
        return through(with_weight, x, f.w, looped=looped)
    (x_sum, f_sum), (x_batch, f_batch) = numbers.dot_dimension_numbers
    (row,), groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    free = {*range(f.ndim)} - {*f_sum, *f_batch, *groups}
    order = _in_order(f, f_sum, free)
    if order is None or not groups or row in (*x_sum, *x_batch):
        return None
    if f.gain is not None:
        return None
    first, second = order

    y = through(with_weight, x, f.w, looped=looped)
    dtype = _compute_dtype(x, f, y)

    def multiply(x, factor, x_dims, absent, summed, row):
        """The product with a factor that lacks the `absent` dimensions."""
        kept = [d for d in range(f.ndim) if d not in absent]
        sizes = [f.shape[d] if d in kept else 1 for d in range(f.ndim)]
        factor = jnp.broadcast_to(factor, (*sizes, factor.shape[-1]))
        factor = lax.squeeze(factor, absent).astype(dtype)
        at = {d: i for i, d in enumerate([*kept, RANK])}
        x_sum, x_batch = x_dims
        dims = lax.RaggedDotDimensionNumbers(
            (
                (x_sum, [at[d] for d in summed]),
                (x_batch, [at[d] for d in f_batch]),
            ),
            [row],
            [at[d] for d in groups],
        )
        return product(x.astype(dtype), factor, ragged_dot_dimension_numbers=dims)

    h = multiply(
        x if drop is None else drop(x),
        first,
        (x_sum, x_batch),
        sorted(free),
        f_sum,
        row,
    )
    h = _times_rank_scales(h, f, h.ndim - 1, 1)
    # (batch..., rows and other dimensions of x..., r)
    order = [*x_batch, *(d for d in range(x.ndim) if d not in (*x_sum, *x_batch))]
    dims = [h.ndim - 1], list(range(len(x_batch)))
    delta = multiply(h, second, dims, sorted(f_sum), [RANK], order.index(row))
    return y + delta.astype(y.dtype)


def gather(
    f: Factors,
    indices: jax.Array,
    *,
    dimension_numbers: lax.GatherDimensionNumbers,
    slice_sizes: Sequence[int],
    **params: Any,
) -> Factors:
    """`lax.gather(w + scale * a b, indices)` in factors: each is gathered by itself.

    Out of bounds the weight is the fill value, and the factors are 0.
    """
    options = {
        "dimension_numbers": dimension_numbers,
        "slice_sizes": slice_sizes,
        **params,
    }
    plain = lambda operands: [lax.gather(*operands, **options)]
    (w,) = quantized_views.bind("gather", options, [f.w, indices], plain)
    zeros = options | {"fill_value": 0}
    (found,) = follow(f, [w], companions.gather, indices, **zeros) or [None]
    assert found is not None  # the sizes of a factor are 1 or n
    if f.gain is None or params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return found
    # Out-of-bounds rows get gain 1, so neither the fill value nor its gradient is
    # scaled.
    there = inside(f, indices, dimension_numbers, slice_sizes)
    gain = jnp.where(there, found.gain, jnp.ones_like(found.gain))
    return dataclasses.replace(found, gain=gain)


def inside(
    f: Factors, indices: jax.Array, dnums: lax.GatherDimensionNumbers, sizes: Any
) -> jax.Array:
    """Which results of a lookup are in bounds, of size 1 along its windows."""
    if indices.dtype.itemsize < 4:
        indices = indices.astype(jnp.int32)
    limits = [f.shape[d] - sizes[d] for d in dnums.start_index_map]
    limits = jnp.asarray(limits, indices.dtype)
    limits = jnp.reshape(limits, (1,) * (indices.ndim - 1) + limits.shape)
    there = jnp.all((indices >= 0) & (indices <= limits), -1)
    return lax.expand_dims(there, dnums.offset_dims)


def _in_order(f: Factors, inputs: Any, outputs: Any) -> Any:
    """The factor without these outputs and the one without these inputs, or None.

    The scale is in one of them, unless it has to be applied between the two.
    """
    pair = f.a, f.b if _has_only_rank_scales(f) else scaled(f)
    for first, second in (pair, pair[::-1]):
        if {*outputs}.isdisjoint(dims_of(first)):
            if {*inputs}.isdisjoint(dims_of(second)):
                return first, second
    return None


def scaled(f: Factors) -> jax.Array:
    """`scale * b`, which is small, and right for adapters with different scales."""
    dtype = wider(f.b.dtype, f.scale.dtype)
    return f.b.astype(dtype) * f.scale.astype(dtype)


def _compute_dtype(x: jax.Array, f: Factors, y: jax.Array) -> Any:
    """The dtype of the factors in a product `y`: the wider of its operands'.

    Integers and floats of one byte do not count: they have too few digits.
    """
    dtypes = [
        z.dtype
        for z in (x, f)
        if jnp.issubdtype(z.dtype, jnp.inexact) and z.dtype.itemsize > 1
    ]
    return dtypes[0] if len({*dtypes}) == 1 else wider(*dtypes or [y.dtype])
