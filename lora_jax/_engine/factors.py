"""A weight and its adapter as one array, and the views of it.

`Factors` stands for the array `w + scale * sum_r a * b`, which is never formed unless
`materialize` is called. It holds its factors in the aligned form: `a` and `b` have the
dimensions of `w`, then the rank, and size 1 where a dimension of `w` is not theirs. So
each dimension says itself what it is (an input: only in `a`; an output: only in `b`; a
batch: in both), and every view of `w` is the same view of `a` and `b`.

`w` may be stored in few bits, `Quantized`; without an adapter it has rank 0. With DoRA
the sum has a gain, along its outputs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax._engine import quantized
from lora_jax._engine.quantized import dequantize, is_quantized
from lora_jax._engine.shapes import segments, size

# The types of numbers that there are only under `jax.enable_x64`.
WIDE = {np.dtype(name) for name in ("int64", "uint64", "float64", "complex128")}

JOIN = " + "  # between the names of weights that have become one


class Label(str):
    """A weight's name, for messages. All are equal, so that no name ever recompiles.

    Within a jitted form, which other weights may share, `of` says from which of its
    operands the weight comes: what comes out of the form is named after those.
    """

    __slots__ = ("of",)
    of: frozenset[int]

    def __new__(cls, name: str = "", of: Iterable[int] = ()) -> "Label":
        label = super().__new__(cls, name)
        label.of = frozenset(of)
        return label

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Label)

    def __hash__(self) -> int:
        return 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """The array `(w + scale * sum_r a * b) * gain`, in parts. Shapes: as above."""

    w: Any  # an array, or `Quantized`
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    name: Label = dataclasses.field(default=Label(), metadata={"static": True})
    gain: jax.Array | None = None  # of DoRA: of size 1 along the inputs

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    @property
    def ndim(self) -> int:
        return self.w.ndim

    @property
    def dtype(self):
        return self.w.dtype

    @property
    def rank(self) -> int:
        return self.a.shape[-1]


def align(w: Any, a: Any, b: Any, scale: Any, name: str = "") -> Factors:
    """`Factors` from the leaves of a tree, whichever of the two layouts they have."""
    return Factors(w, *_aligned(a, b, scale, w.shape), Label(name))


def bare(w: Any, name: Label | str = "") -> Factors:
    """A weight without an adapter: one of rank 0."""
    ones = (1,) * w.ndim
    label = name if isinstance(name, Label) else Label(name)
    a, b = jnp.zeros((*w.shape, 0)), jnp.zeros((*ones, 0))
    return Factors(w, a, b, jnp.ones(ones), label)


def settled(x: Any) -> Any:
    """A weight, but for one of rank 0 that is a plain array by now: just that."""
    plain = isinstance(x, Factors) and not (x.rank or is_quantized(x.w))
    return x.w if plain else x


# Jitted, so that JAX traces and differentiates the adapters of equal layers once.
@functools.partial(jax.jit, static_argnums=3, inline=True)
def _aligned(a: Any, b: Any, scale: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    if a.ndim < len(shape) + 1:
        batch = a.ndim + b.ndim - 2 - len(shape)
        inputs = a.ndim - 1 - batch
        a = jnp.expand_dims(a, range(a.ndim - 1, len(shape)))
        b = jnp.moveaxis(b, batch, -1)  # (batch..., r, out...) -> (batch..., out..., r)
        b = jnp.expand_dims(b, range(batch, batch + inputs))
    sizes = (
        n if n == i == o else 1
        for n, i, o in zip(shape, a.shape[:-1], b.shape[:-1], strict=True)
    )
    # A setting, not a parameter: whatever filter chooses what is trained, its gradient
    # is zero.
    return a, b, lax.stop_gradient(jnp.reshape(scale, tuple(sizes)))


def delta(f: Factors) -> jax.Array:
    """`scale * sum_r a * b`, of the weight's shape, in float32 or wider."""
    a, b, scale = on_device((f.a, f.b, f.scale))
    dtype = wider(a.dtype, b.dtype)
    a, b = a.astype(dtype), b.astype(dtype) * scale.astype(dtype)[..., None]
    rank = f.ndim
    in_a, in_b = present(a), present(b)
    kept = sorted({*in_a, *in_b})
    product = jnp.einsum(
        squeeze_absent(a),
        [*in_a, rank],
        squeeze_absent(b),
        [*in_b, rank],
        kept,
        precision=lax.Precision.HIGHEST,
    )
    product = jnp.expand_dims(product, [d for d in range(f.ndim) if d not in kept])
    return jnp.broadcast_to(product, f.shape)


def delta_flops(f: Factors) -> int:
    """The FLOPs of `delta`."""
    return 2 * size(f.shape[d] for d in varying(f)) * f.rank


def materialize(f: Factors) -> jax.Array:
    """The plain array: summed in float32 or wider, cast once to the weight's dtype.

    A weight in the host's memory is summed on the device, and goes back; one in few
    bits is made there, and stays.
    """
    if is_quantized(f.w):
        f = dataclasses.replace(f, w=dequantize(on_device(f.w)))
    if not f.rank:
        return f.w
    near = on_device(f.w)
    if near is not f.w:
        traced = isinstance(f.w, jax.core.Tracer)
        back = jax.memory.Space.Host if traced else f.w.sharding
        whole = materialize(dataclasses.replace(f, w=near))
        # Of what is traced JAX does not know whence it came, as a derivative has to.
        return jax.device_put(whole, back, src=jax.memory.Space.Device)
    # NumPy has float64 everywhere, and JAX where it was asked to: maybe not here.
    with x64([f.dtype] if isinstance(f.w, jax.Array) else []):
        update = delta(f)
        wide = wider(f.dtype, update.dtype)
        dtype = jax.dtypes.canonicalize_dtype(f.dtype)
        total = f.w.astype(wide) + update.astype(wide)
        if f.gain is not None:
            total = total * on_device(f.gain).astype(wide)
        return total.astype(dtype)


def on_device(tree: Any) -> Any:
    """The arrays that are in the host's memory, and may not be computed with, moved."""
    device = jax.memory.Space.Device
    move = lambda x: (
        x if jax.typeof(x).memory_space == device else jax.device_put(x, device)
    )
    return jax.tree.map(move, tree)


def wider(*dtypes: Any) -> np.dtype:
    """The dtype that JAX holds all of these in, and float32 at the least."""
    wide = [dtype for dtype in dtypes if jnp.dtype(dtype).itemsize > 3]
    return jax.dtypes.canonicalize_dtype(np.result_type(np.float32, *wide))


def x64(dtypes: Iterable[Any]) -> AbstractContextManager:
    """`jax.enable_x64` where it was on, of which nothing but the types tells later."""
    return nullcontext() if WIDE.isdisjoint(dtypes) else jax.enable_x64(True)


def canonical(x: Any) -> Any:
    """An argument as JAX itself takes it: NumPy's float64 is float32 unless x64 is on.

    Without this a float64 NumPy weight would be traced under `jax.enable_x64`, where
    `jax.random` draws other bits and `jnp.arange` has another dtype. An array of JAX
    that has a wide dtype is different: it was made under x64 on purpose.
    """
    if not isinstance(x, np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return x
    dtype = jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True)
    if dtype == x.dtype:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=dtype)
    return x.astype(dtype)


def present(factor: jax.Array) -> list[int]:
    """The weight's dimensions that an aligned factor has; the others have size 1."""
    return [d for d, n in enumerate(factor.shape[:-1]) if n != 1]


def varying(f: Factors) -> set[int]:
    """The dimensions along which the update is not the same number again and again."""
    return {*present(f.a)} | {*present(f.b)} | {*gained(f)}


def gained(f: Factors) -> list[int]:
    """The dimensions along which the gain differs."""
    return [] if f.gain is None else [d for d, n in enumerate(f.gain.shape) if n != 1]


def device_put(f: Factors, w: jax.Array, to: Any) -> Factors:
    """The factors of a weight that `jax.device_put(weight, to)` has made `w`."""
    thin = thin_parts(f)
    if isinstance(to, jax.sharding.NamedSharding):
        to = to.with_memory_kind(None)  # that of the device
        places = [to.update(spec=spec) for spec in thin_specs(f, to.spec)]
        thin = map(jax.device_put, thin, places)
    elif isinstance(to, jax.sharding.SingleDeviceSharding):
        thin = jax.device_put(thin, to.with_memory_kind(None))
    elif isinstance(to, jax.Device):
        thin = jax.device_put(thin, to)
    return with_thin(f, w, on_device(tuple(thin)))


def thin_parts(f: Factors) -> tuple[jax.Array, ...]:
    """All of a weight but `w`, in the order in which `jax.tree` has them."""
    return f.a, f.b, f.scale, *([] if f.gain is None else [f.gain])


def with_thin(f: Factors, w: Any, parts: Iterable[Any]) -> Factors:
    """Another weight `w` with these parts, in that order."""
    a, b, scale, *gain = parts
    return Factors(w, a, b, scale, f.name, *gain)


def thin_specs(f: Factors, spec: PartitionSpec) -> list[PartitionSpec]:
    """A weight's sharding for its thin parts, along the dimensions they share."""
    names = (*spec, *(None,) * (f.ndim - len(spec)))
    return [
        PartitionSpec(*(n if x.shape[d] != 1 else None for d, n in enumerate(names)))
        for x in thin_parts(f)
    ]


def cut_for(f: Factors, spec: PartitionSpec, mesh: Any) -> tuple[Factors, list[Any]]:
    """The weight, and the specs of all its leaves, to be cut so over a mesh."""
    own: tuple[Any, ...] | None = (spec,)
    if is_quantized(f.w):
        own = quantized.part_specs(f.w, spec, mesh)
        if own is None:
            own, f = (spec,), dataclasses.replace(f, w=dequantize(f.w))
    return f, [*own, *thin_specs(f, spec)]


def stacked(f: Factors) -> set[int]:
    """The dimensions along which each has a product of its own: layers, experts."""
    return {*present(f.a)} & {*present(f.b)}


def squeeze_absent(factor: jax.Array) -> jax.Array:
    """An aligned factor with the dimensions `present` and the rank alone."""
    return jnp.reshape(
        factor, [n for n in factor.shape[:-1] if n != 1] + [factor.shape[-1]]
    )


# Views: each takes the weight's own view `w` and gives the factors the same one. That
# costs no arithmetic, or thin one, and is None where the factors cannot follow.


def view(f: Factors, w: jax.Array, fn: Callable[[jax.Array], jax.Array]) -> Factors:
    """The view whose factors, scale and gain are `fn` of those, the rank last."""
    scale, *gain = (fn(x[..., None])[..., 0] for x in thin_parts(f)[2:])
    return Factors(w, fn(f.a), fn(f.b), scale, f.name, *gain)


def transpose(f: Factors, w: jax.Array, permutation: tuple[int, ...]) -> Factors:
    return view(f, w, lambda x: lax.transpose(x, (*permutation, f.ndim)))


def broadcast(f: Factors, w: jax.Array, dims: tuple[int, ...]) -> Factors:
    """Where the weight repeats itself, the factors do not: they get size 1."""

    def place(x):
        sizes = [1] * w.ndim
        for d, n in zip(dims, x.shape, strict=False):
            sizes[d] = n
        return jnp.reshape(x, (*sizes, x.shape[-1]))

    return view(f, w, place)


def reshape(f: Factors, w: jax.Array) -> Factors | None:
    """A reshape that merges and splits dimensions of one kind."""
    if 0 in f.shape:
        return None
    runs = list(segments(f.shape, w.shape))
    own = varying(f)

    def long(x) -> list[int]:  # a factor repeats what the whole weight repeats
        sizes = list(x.shape)
        for old, _ in runs:
            if any(x.shape[d] != 1 for d in old):
                repeated = [d for d in old if d not in own]
                sizes = [
                    f.shape[d] if d in repeated else n for d, n in enumerate(sizes)
                ]
        return sizes

    def sizes(x) -> list[int] | None:
        new_sizes, have = [], long(x)
        for old, new in runs:
            if all(have[d] == f.shape[d] for d in old):
                new_sizes += [w.shape[d] for d in new]
            elif all(have[d] == 1 for d in old):
                new_sizes += [1] * len(new)
            else:
                return None
        return new_sizes

    def repeat(x):
        whole = jnp.broadcast_to(x, (*long(x)[: f.ndim], x.shape[-1]))
        return jnp.reshape(whole, (*sizes(whole), x.shape[-1]))

    if None in map(sizes, thin_parts(f)):
        return None
    return view(f, w, repeat)


def cut(f: Factors, w: jax.Array, fn: Callable[[jax.Array, list[int]], jax.Array]):
    """A slice: `fn(factor, present)` cuts a factor along its own dimensions alone."""
    if 0 in w.shape:
        return w  # as `jnp.roll` by nothing cuts off: no number is adapted
    return view(f, w, lambda x: fn(x, present(x)))


def concatenate(parts: list[Any], w: jax.Array, axis: int) -> Factors | None:
    """Weights, and plain arrays, side by side as the one weight `w`.

    Along an input, outputs stay apart: `a` becomes block diagonal and the ranks add up,
    but for pieces of one weight, which share their `b`. Along an output likewise. Along
    a stack both are stacked.
    """
    if not any(isinstance(x, Factors) and x.rank for x in parts):
        return bare(w, joined([x for x in parts if isinstance(x, Factors)]))
    parts = [x.w if isinstance(x, Factors) and not x.rank else x for x in parts]
    first = next(x for x in parts if isinstance(x, Factors))
    parts = [_turned(x, first, axis) if isinstance(x, Factors) else x for x in parts]
    weights = [x for x in parts if isinstance(x, Factors)]
    roles = {_roles(f, axis) for f in weights}
    owned = [(axis in present(f.a), axis in present(f.b)) for f in weights]
    in_a, in_b = map(any, zip(*owned, strict=True))
    stack = in_a == in_b
    if 0 in w.shape or len(roles) > 1 or (stack and any(i != o for i, o in owned)):
        return None
    if any(f.gain is not None and axis not in gained(f) for f in weights):
        return None  # side by side along the inputs, each output would have two gains
    owner, other = ("a", "b") if in_a and not in_b else ("b", "a")
    dtype = wider(*(getattr(f, n).dtype for f in weights for n in "ab"))
    others = [getattr(f, other) for f in weights]
    together = stack or all(x is others[0] for x in others)
    ranks = [x.a.shape[-1] if isinstance(x, Factors) else 0 for x in parts]
    rank = max(ranks) if together else sum(ranks)

    def side_by_side(name):
        pieces, low = [], 0
        for x, r in zip(parts, ranks, strict=True):
            long = lambda shape, n=x.shape[axis]: (*shape[:axis], n, *shape[axis + 1 :])
            if isinstance(x, Factors):
                factor = getattr(_folded(x, owner), name).astype(dtype)
                factor = jnp.broadcast_to(factor, long(factor.shape))
                edges = [(0, 0, 0)] * w.ndim + [(low, rank - low - r, 0)]
                pieces.append(lax.pad(factor, jnp.zeros((), dtype), edges))
            else:
                shape = getattr(weights[0], name).shape[:-1]
                pieces.append(jnp.zeros((*long(shape), rank), dtype))
            low += 0 if together else r
        return lax.concatenate(pieces, axis)

    new = {owner: side_by_side(owner)}
    if stack:
        new[other] = side_by_side(other)
    elif together:
        new[other] = others[0]
    else:
        new[other] = lax.concatenate([x.astype(dtype) for x in others], w.ndim)
    gain = _gains(parts, w, axis)
    return Factors(w, **new, scale=_one(w), name=joined(weights), gain=gain)


def _gains(parts: list[Any], w: jax.Array, axis: int) -> jax.Array | None:
    """The gains of weights and plain arrays side by side, 1 where there is none."""
    own = {d for x in parts if isinstance(x, Factors) for d in gained(x)}
    if not own:
        return None
    pieces = []
    for x in parts:
        sizes = [n if d in own else 1 for d, n in enumerate(w.shape)]
        sizes[axis] = x.shape[axis]
        gain = x.gain if isinstance(x, Factors) else None
        gain = jnp.ones((1,) * w.ndim) if gain is None else gain
        pieces.append(jnp.broadcast_to(gain, sizes))
    dtype = wider(*(x.dtype for x in pieces))
    return lax.concatenate([x.astype(dtype) for x in pieces], axis)


def add(f: Factors, g: Factors, w: jax.Array) -> Factors | None:
    """The sum `w` of two weights: their ranks add up, unless they share a factor."""
    if f.gain is not None or g.gain is not None:
        return None
    if not (f.rank and g.rank):
        return dataclasses.replace(f if f.rank else g, w=w)
    for own, shared in (("a", "b"), ("b", "a")):
        if getattr(f, shared) is getattr(g, shared):
            f, g = _folded(f, own), _folded(g, own)
            total = getattr(f, own) + getattr(g, own)
            same = dataclasses.replace(f, w=w, name=joined([f, g]))
            return dataclasses.replace(same, **{own: total})
    g = _turned(g, f)
    a, b = ({*present(x)} | {*present(y)} for x, y in ((f.a, g.a), (f.b, g.b)))
    if a & b != stacked(f) | stacked(g):
        return None
    f, g = _folded(f, "b"), _folded(g, "b")
    dtype = wider(*(x.dtype for x in (f.a, f.b, g.a, g.b)))

    def both(x, y, own):
        sizes = [n if d in own else 1 for d, n in enumerate(w.shape)]
        wide = [
            jnp.broadcast_to(z, (*sizes, z.shape[-1])).astype(dtype) for z in (x, y)
        ]
        return lax.concatenate(wide, w.ndim)

    return Factors(w, both(f.a, g.a, a), both(f.b, g.b, b), _one(w), joined([f, g]))


def _roles(f: Factors, but: int | None = None) -> tuple[frozenset[int], ...]:
    """The dimensions that each factor has, but for one."""
    return tuple(frozenset(present(x)) - {but} for x in (f.a, f.b))


def _turned(f: Factors, like: Factors, but: int | None = None) -> Factors:
    """The same weight, its factors in the order of another's."""
    turned = dataclasses.replace(f, a=f.b, b=f.a)
    same = _roles(f, but) != _roles(like, but) == _roles(turned, but)
    return turned if same else f


def _folded(f: Factors, name: str) -> Factors:
    """The same weight with its scale multiplied into `a` or `b`, in float32."""
    x, scale = getattr(f, name), f.scale[..., None]
    dtype = wider(x.dtype, scale.dtype)
    x = x.astype(dtype) * scale.astype(dtype)
    return dataclasses.replace(f, **{name: x}, scale=_one(f.w))


def joined(weights: list[Factors]) -> Label:
    """The name of what is made of several weights."""
    names = (name for f in weights for name in str(f.name).split(JOIN))
    of = frozenset().union(*(f.name.of for f in weights))
    return Label(JOIN.join(dict.fromkeys(names)), of)


def _one(w: jax.Array) -> jax.Array:
    return jnp.ones((1,) * w.ndim, jnp.float32)
