"""A weight and its adapter as one array: `Factors`.

`Factors` stands for the array (w + scale * sum_r a * b) * gain without computing it;
`materialize` does. The low-rank factors are in aligned form: `a` and `b` have the
dimensions of `w`, then the rank, and size 1 along the dimensions of `w` that they lack.
A dimension of `a` alone is an input, one of `b` alone an output, one of both a batch
dimension: layers of a stack, experts. So factors, scale and gain are companions of `w`,
and every view of `w` is the same view of them (companions.py).

`w` may be `Quantized`; without an adapter it has rank 0. The gain is that of DoRA,
along the outputs.
"""

import dataclasses
import functools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import PartitionSpec

from lora_jax._engine.companions import CompanionRule, spec_of
from lora_jax._engine.dtypes import wider, x64
from lora_jax._engine.quantized import dequantize, is_quantized
from lora_jax._engine.quantized_views import part_specs
from lora_jax._engine.shapes import size


@dataclasses.dataclass(frozen=True)
class WeightName:
    """The names of the weights that an array is made of, for diagnostics.

    `Factors` has it as static data, so a jitted function is traced again for each
    different one. Names therefore do not count in a comparison: a function that is
    traced for one layer serves all equal layers. Its results and notes refer to its
    operands instead, by `operands`: pairs of the cached call and a position.
    """

    names: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    operands: frozenset[tuple[Hashable, int]] = frozenset()

    def __str__(self) -> str:
        return " + ".join(self.names)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """The array `(w + scale * sum_r a * b) * gain`, in parts.

    Attributes:
      w: The weight, an array or `Quantized`, of shape (n, ...).
      a, b: (n or 1, ..., r).
      scale: (n or 1, ..., r or 1), of size 1 except along batch dimensions and, if each
        rank has its own, along the rank.
      name: For diagnostics.
      gain: (n or 1, ...), of size 1 along the inputs; None without DoRA.
    """

    w: Any
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    name: WeightName = dataclasses.field(
        default=WeightName(), metadata={"static": True}
    )
    gain: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    @property
    def ndim(self) -> int:
        return self.w.ndim

    @property
    def dtype(self) -> Any:
        return self.w.dtype

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    @property
    def has_rank_scales(self) -> bool:
        """Whether each rank has a scale of its own."""
        return self.scale.shape[-1] != 1


def is_factors(x: Any) -> bool:
    return isinstance(x, Factors)


def align(
    w: Any, a: Any, b: Any, scale: Any, name: str = "", *, gates: bool = False
) -> Factors:
    """`Factors` from the leaves of a tree, in either of the two layouts.

    The scale is a setting, not a parameter: its gradient is zero whatever a filter
    trains, unless it holds gates, which are the output of a function.
    """
    a, b, scale = _aligned(a, b, scale, w.shape)
    scale = scale if gates else lax.stop_gradient(scale)
    return Factors(w, a, b, scale, WeightName((name,)))


def without_adapter(w: Any, name: WeightName | str = "") -> Factors:
    """A weight without an adapter: `Factors` of rank 0."""
    ones = (1,) * w.ndim
    name = name if isinstance(name, WeightName) else WeightName((name,))
    a, b = jnp.zeros((*w.shape, 0)), jnp.zeros((*ones, 0))
    return Factors(w, a, b, jnp.ones((*ones, 1)), name)


def unwrap(x: Any) -> Any:
    """The array itself, if `x` is a weight of rank 0 that is no longer quantized."""
    plain = isinstance(x, Factors) and not (x.rank or is_quantized(x.w))
    return x.w if plain else x


# Jitted, so that JAX traces and differentiates the adapters of equal layers once.
@functools.partial(jax.jit, static_argnums=3, inline=True)
def _aligned(
    a: Any, b: Any, scale: Any, shape: tuple[int, ...]
) -> tuple[Any, Any, Any]:
    if a.ndim < len(shape) + 1:
        batch = a.ndim + b.ndim - 2 - len(shape)
        inputs = a.ndim - 1 - batch
        a = jnp.expand_dims(a, range(a.ndim - 1, len(shape)))
        b = jnp.moveaxis(b, batch, -1)  # (batch..., r, out...) -> (batch..., out..., r)
        b = jnp.expand_dims(b, range(batch, batch + inputs))
    sizes = [
        n if n == i == o else 1
        for n, i, o in zip(shape, a.shape[:-1], b.shape[:-1], strict=True)
    ]
    scales = a.shape[-1] if scale.size > size(sizes) else 1
    return a, b, jnp.reshape(scale, (*sizes, scales))


def delta(f: Factors) -> jax.Array:
    """`scale * sum_r a * b`, of the weight's shape, in float32 or wider."""
    a, b, scale = on_device((f.a, f.b, f.scale))
    dtype = wider(a.dtype, b.dtype)
    a, b, scale = a.astype(dtype), b.astype(dtype), scale.astype(dtype)
    # A mixed batch has the factors once, and the scales of ranks for each example: the
    # smaller factor is copied for them, such as the few rows of a lookup.
    if f.has_rank_scales and a.size < b.size:
        a = a * scale
    else:
        b = b * scale
    rank = f.ndim
    in_a, in_b = dims_of(a), dims_of(b)
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
    return 2 * size(f.shape[d] for d in adapted_dims(f)) * f.rank


def materialize(f: Factors) -> jax.Array:
    """The array itself: summed in float32 or wider, cast once to the weight's dtype.

    A weight in the host's memory is summed on the device, and goes back; a quantized
    one is dequantized on the device, and stays there.
    """
    if is_quantized(f.w):
        f = dataclasses.replace(f, w=dequantize(on_device(f.w)))
    if not f.rank:
        return f.w
    near = on_device(f.w)
    if near is not f.w:
        traced = isinstance(f.w, Tracer)
        back = jax.memory.Space.Host if traced else f.w.sharding
        total = materialize(dataclasses.replace(f, w=near))
        # The derivative has to move its cotangent back, and for a traced array JAX
        # does not know from where: `src` is that memory.
        return jax.device_put(total, back, src=jax.memory.Space.Device)
    # A NumPy weight can be float64 while x64 is off: enable x64 for JAX arrays only.
    with x64([f.dtype] if isinstance(f.w, jax.Array) else []):
        update = delta(f)
        wide = wider(f.dtype, update.dtype)
        dtype = jax.dtypes.canonicalize_dtype(f.dtype)
        total = f.w.astype(wide) + update.astype(wide)
        if f.gain is not None:
            total = total * on_device(f.gain).astype(wide)
        return total.astype(dtype)


def on_device(tree: Any) -> Any:
    """Moves arrays in the host's memory, where XLA cannot compute, to the device."""
    device = jax.memory.Space.Device
    move = lambda x: (
        x if jax.typeof(x).memory_space == device else jax.device_put(x, device)
    )
    return jax.tree.map(move, tree)


def dims_of(companion: jax.Array, ndim: int = -1) -> list[int]:
    """The weight's dimensions along which an aligned factor has more than size 1."""
    return [d for d, n in enumerate(companion.shape[:ndim]) if n != 1]


def gain_dims(f: Factors) -> list[int]:
    """The dimensions along which the gain differs."""
    return [] if f.gain is None else dims_of(f.gain, f.ndim)


def adapted_dims(f: Factors) -> set[int]:
    """The dimensions along which the update or the gain differs."""
    return {*dims_of(f.a), *dims_of(f.b), *gain_dims(f)}


def batch_dims(f: Factors) -> set[int]:
    """The batch dimensions: each of these layers or experts has factors of its own."""
    return {*dims_of(f.a)} & {*dims_of(f.b)}


def squeeze_absent(factor: jax.Array) -> jax.Array:
    """An aligned factor with only the dimensions it has (`dims_of`) and the rank."""
    return jnp.reshape(
        factor, [n for n in factor.shape[:-1] if n != 1] + [factor.shape[-1]]
    )


def parts(f: Factors) -> tuple[jax.Array, ...]:
    """The companions of `w`, in the order of the leaves of `f`."""
    return f.a, f.b, f.scale, *([] if f.gain is None else [f.gain])


def with_parts(f: Factors, w: Any, parts: Iterable[Any]) -> Factors:
    """The same adapter with another weight and these companions, as from `parts`."""
    a, b, scale, *gain = parts
    return Factors(w, a, b, scale, f.name, *gain)


def follow(
    f: Factors, views: Sequence[Any], rule: CompanionRule, *others: Any, **params: Any
) -> list[Any] | None:
    """Views of a weight, with the views of its factors, scale and gain.

    A view without elements is a plain array: nothing of it is adapted. None if a
    companion would not be of size 1 or n along each dimension, as factors have to be.
    """
    if all(0 in w.shape for w in views):
        return [*views]
    if not f.rank:
        return [without_adapter(w, f.name) for w in views]
    new = [w.shape for w in views]
    results_of = []
    for c in parts(f):
        results = rule(c, f.shape, new, *others, **params)
        if results is None or not all(map(_fits, results, new)):
            return None
        results_of.append(results)
    pairs = zip(views, zip(*results_of, strict=True), strict=True)
    return [w if 0 in w.shape else with_parts(f, w, c) for w, c in pairs]


def _fits(c: jax.Array, shape: tuple[int, ...]) -> bool:
    return all(m in (1, n) for m, n in zip(c.shape, shape, strict=False))


def renamed(x: Any, name: WeightName) -> Any:
    """`Factors` under another name; anything else as it is."""
    return dataclasses.replace(x, name=name) if isinstance(x, Factors) else x


def joined(names: Iterable[WeightName]) -> WeightName:
    """The name of an array that is made of several weights."""
    names = [*names]
    single = (name for one in names for name in one.names)
    operands = (one.operands for one in names)
    return WeightName(tuple(dict.fromkeys(single)), frozenset().union(*operands))


def device_put(f: Factors, w: jax.Array, to: Any) -> Factors:
    """The factors of a weight that `jax.device_put(weight, to)` has made `w`."""
    companions: Any = parts(f)
    if isinstance(to, jax.sharding.NamedSharding):
        to = _in_default_memory(to)
        places = [to.update(spec=s) for s in part_sharding(f, to.spec, to.mesh)]
        companions = [*map(jax.device_put, companions, places)]
    elif isinstance(to, jax.sharding.SingleDeviceSharding):
        companions = jax.device_put(companions, _in_default_memory(to))
    elif isinstance(to, jax.Device):
        companions = jax.device_put(companions, to)
    return with_parts(f, w, on_device(tuple(companions)))


def _in_default_memory(sharding: Any) -> Any:
    """The same sharding, in the memory of the devices rather than of the hosts."""
    return sharding.with_memory_kind(None)


def part_sharding(f: Factors, spec: PartitionSpec, mesh: Any) -> list[PartitionSpec]:
    """A weight's sharding for its companions."""
    return [spec_of(x.shape[: f.ndim], spec, mesh) for x in parts(f)]


def sharded(f: Factors, spec: PartitionSpec, mesh: Any) -> tuple[Factors, list[Any]]:
    """The weight, and the specs of all its leaves, if a mesh cuts it like `spec`.

    A quantized weight is dequantized if a cut would divide a block.
    """
    specs: Sequence[Any] | None = (spec,)
    if is_quantized(f.w):
        specs = part_specs(f.w, spec, mesh)
        if specs is None:
            specs, f = (spec,), dataclasses.replace(f, w=dequantize(f.w))
    return f, [*specs, *part_sharding(f, spec, mesh)]
