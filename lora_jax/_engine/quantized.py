"""Quantized arrays: integer codes, and one scale for each block of them.

`Quantized` takes the place of a plain array and has its shape and dtype. It stores each
element as a code of 4 or 8 bits, and one scale per block of elements; `dequantize`
gives the plain array. Views act on codes and scales where the blocks allow it. This
module knows nothing of adapters or trees.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey

from lora_jax._engine.per_layer import per_layer
from lora_jax._engine.shapes import segments

# The 16 values of NF4: Dettmers et al., QLoRA, 2023, appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
CODEBOOKS = {"nf4": NF4}  # what the codes -8 to 7 stand for, in this order
FORMATS = {"int8": jnp.int8, "int4": jnp.int4, "nf4": jnp.int4}
# What the largest magnitude of a block is divided by to give its scale.
BOUNDS = {"int8": 127.5, "int4": 7.5, "nf4": 1.0}
LEAST = 8  # a view that would leave smaller blocks materializes the array


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A floating array in a few bits per element: `values * scale`, block by block.

    A leaf of a tree of parameters, where the plain array was. `quantize` makes it. For
    values that are quantized already, make it yourself: `Quantized(q.qvalue, q.scale,
    (dtype,))` from qwix's `QArray`, blocks of 32 from GGUF's Q8_0 and Q4_0. NF4 codes
    that count from 0 to 15, as in qwix and bitsandbytes, are stored minus 8:
    `Quantized((codes.astype(jnp.int8) - 8).astype(jnp.int4), scale, (dtype,), "nf4")`.

    As a pytree it has two leaves, whose keys are the name of the format and "scale";
    the rest is static. Orbax, `flax.serialization` and pickle store it, and none
    restores it in another format. Restore with a target, `quantize(params, how)` of the
    same parameters, abstract or not: without one Orbax returns a dict of two arrays.

    Attributes:
      values: The codes, of the array's shape, `int8` or `int4`.
      scale: A floating array with as many dimensions. Each of its sizes divides that of
        `values`, and is the number of blocks along that dimension.
      dtypes: The dtype of the product `values * scale`, and those it is cast to in
        turn; the last is the array's dtype. Usually one.
      format: "int8", "int4" or "nf4", whose codes are `int4` and stand for 16 values.
        By default that of the dtype of `values`.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> values, scale = jnp.ones((64, 3), jnp.int8), jnp.full((2, 3), 0.5)
      >>> w = lj.Quantized(values, scale, (jnp.bfloat16,))
      >>> w.shape, w.dtype.name, lj.dequantize({"kernel": w})["kernel"].shape
      ((64, 3), 'bfloat16', (64, 3))

    Reference:
      Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023.
      https://arxiv.org/abs/2305.14314
    """

    values: Any
    scale: Any
    dtypes: tuple[Any, ...]
    format: str | None = None

    def __post_init__(self) -> None:
        # Equal trees need equal treedefs, so a dtype is stored in one form.
        object.__setattr__(self, "dtypes", tuple(map(jnp.dtype, self.dtypes)))
        if self.format is None and hasattr(self.values, "dtype"):
            name = str(self.values.dtype)
            object.__setattr__(self, "format", name if name in FORMATS else None)

    shape = property(lambda self: self.values.shape)
    ndim = property(lambda self: len(self.values.shape))
    size = property(lambda self: math.prod(self.values.shape))
    dtype = property(lambda self: self.dtypes[-1])


# Not `register_dataclass`, whose keys are the names of the fields. With the format as a
# key a checkpoint of another format does not fit a target: Orbax would cast int8 to
# int4, and could not tell the codes of NF4 from int4.
def _parts(x: Quantized) -> tuple[tuple[Any, Any], tuple[Any, ...]]:
    return (x.values, x.scale), (x.dtypes, x.format)


def _parts_with_keys(x: Quantized) -> tuple[Any, tuple[Any, ...]]:
    parts, static = _parts(x)
    keys = map(GetAttrKey, keys_of(x))
    return tuple(zip(keys, parts, strict=True)), static


def _from_parts(static: tuple[Any, ...], parts: Sequence[Any]) -> Quantized:
    # Without `__post_init__`: JAX puts any object in the places of the arrays.
    x = object.__new__(Quantized)
    names = ("values", "scale", "dtypes", "format")
    for name, part in zip(names, (*parts, *static), strict=True):
        object.__setattr__(x, name, part)
    return x


jax.tree_util.register_pytree_with_keys(
    Quantized, _parts_with_keys, _from_parts, _parts
)


def keys_of(x: Quantized) -> tuple[str, str]:
    """The names of the two arrays in a checkpoint."""
    return x.format or "values", "scale"


def is_quantized(x: Any) -> bool:
    return isinstance(x, Quantized)


def values_of(x: Any) -> Any:
    """The array whose sharding and kind (concrete, traced, abstract) are a weight's."""
    return x.values if isinstance(x, Quantized) else x


def like(x: Any) -> Any:
    """What a trace sees of a weight: the shape and dtype of the plain array."""
    return jax.eval_shape(dequantize, x) if isinstance(x, Quantized) else x


def wrong(x: Quantized) -> str | None:
    """What is wrong with the parts of a quantized array, if anything is."""
    values, scale = x.values, x.scale
    for name, part in (("values", values), ("scale", scale)):
        if not (hasattr(part, "shape") and hasattr(part, "dtype")):
            return f"its {name} is {part!r}, no array"
    if not x.dtypes:
        return "it names no dtype"
    if values.dtype == jnp.uint4:
        return (
            "its values are uint4, codes from 0 to 15. Store codes minus 8: "
            "Quantized((values.astype(jnp.int8) - 8).astype(jnp.int4), scale, dtypes, "
            "'nf4')"
        )
    if jnp.dtype(values.dtype) not in map(jnp.dtype, FORMATS.values()):
        return f"its values are {values.dtype}, and may be int8 or int4"
    if x.format not in FORMATS:
        return f"its format is {x.format!r}, and may be {', '.join(map(repr, FORMATS))}"
    if values.dtype != FORMATS[x.format]:
        needed = jnp.dtype(FORMATS[x.format]).name
        return f"its values are {values.dtype}, and those of {x.format!r} are {needed}"
    if not all(jnp.issubdtype(d, jnp.floating) for d in (scale.dtype, *x.dtypes)):
        return f"its scale and dtypes must be floating: {scale.dtype}, {x.dtypes}"
    pairs = zip(values.shape, scale.shape, strict=False)
    if len(values.shape) != len(scale.shape) or any(m < 1 or n % m for n, m in pairs):
        return f"a scale of shape {scale.shape} makes no blocks of {values.shape}"
    return None


def format_name(x: Quantized) -> str:
    """As "nf4/64": the format, and how many elements share a scale."""
    return f"{x.format}/{math.prod(_blocks(x))}"


def nbytes(x: Any) -> int:
    """The bytes of an array in XLA, where JAX and NumPy count one for 4-bit types."""
    if isinstance(x, Quantized):
        return nbytes(x.values) + nbytes(x.scale)
    bits = 8 * x.dtype.itemsize
    for kind, info in ((jnp.integer, jnp.iinfo), (jnp.floating, jnp.finfo)):
        if jnp.issubdtype(x.dtype, kind):
            bits = info(x.dtype).bits
    return -(-math.prod(x.shape) * bits // 8)


def quantize_array(
    w: Any, how: str, sizes: Sequence[int], batch: Sequence[int] = ()
) -> Quantized:
    """An array in a format of `FORMATS`, with a scale of the shape `sizes`.

    The array may be concrete, traced or abstract, and stays sharded as it is: no device
    gathers it. A block that is not finite gets a scale that is not.

    Args:
      w: A floating array.
      how: A key of `FORMATS`.
      sizes: The number of blocks along each dimension.
      batch: The dimensions of stacked layers. One layer is quantized at a time, so that
        the intermediate floats are those of one layer.
    """
    # NumPy's float64 is float32 unless x64 is on, as everywhere in JAX.
    sizes, dtypes = tuple(sizes), (jax.dtypes.canonicalize_dtype(w.dtype),)
    own = [d for d in batch if sizes[d] == w.shape[d]]  # where each layer has scales
    loops = tuple(loops_over(w, own).items())
    if isinstance(w, jax.core.Tracer):
        return Quantized(*_make(w, how, sizes, loops), dtypes, how)
    sharding = getattr(w, "sharding", None)
    places = None
    if isinstance(sharding, NamedSharding):
        places = sharding, _of_scale(sharding, w.shape, sizes)
    if isinstance(w, jax.ShapeDtypeStruct):
        put = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
        plain = jax.ShapeDtypeStruct(w.shape, w.dtype)
        parts = jax.eval_shape(lambda w: _make(w, how, sizes, ()), plain)
        parts = map(put, parts, places or (sharding, sharding))
    else:
        make = jax.jit(_make, static_argnums=(1, 2, 3), out_shardings=places)
        parts = make(w, how, sizes, loops)  # compiled once for equal weights
    return Quantized(*parts, dtypes, how)


def _make(
    w: jax.Array, how: str, sizes: tuple[int, ...], loops: tuple[tuple[int, int], ...]
) -> tuple[jax.Array, jax.Array]:
    """The codes and the scales."""
    parts = dict(loops)
    own = [parts.get(d, m) for d, m in enumerate(sizes)]
    return per_layer(lambda w: _make_one(w, how, own), [w], parts)


def _make_one(w: jax.Array, how: str, sizes: list[int]) -> tuple[jax.Array, jax.Array]:
    split, shared, bound = [], [], BOUNDS[how]
    for n, m in zip(w.shape, sizes, strict=True):
        split += [n] if m in (1, n) else [m, n // m]
        shared += [len(split) - 1] if m < n else []
    x = jnp.reshape(w, split)
    # A maximum in two bytes is exact, and needs no copy in float32.
    x = x.astype(jnp.float32) if x.dtype.itemsize == 1 else x
    most = jnp.max(jnp.abs(x), shared, keepdims=True).astype(jnp.float32)
    # The codes belong to the scale as it is stored, so it is rounded before the
    # division. A cast to bfloat16 and back is not enough: after a reduction XLA for
    # CPUs drops it (jaxlib 0.10.2), and int8 codes are off by one.
    scale = lax.reduce_precision(most / bound, 8, 7)
    scale = jnp.where(scale != 0, scale, jnp.ones_like(scale))
    x = x.astype(jnp.float32) / scale
    if how in CODEBOOKS:
        edges = [(a + b) / 2 for a, b in itertools.pairwise(CODEBOOKS[how])]
        values = sum((x > edge).astype(jnp.int8) for edge in edges) - jnp.int8(8)
    else:
        values = jnp.clip(jnp.round(x), -bound - 0.5, bound - 0.5).astype(jnp.int8)
    values = jnp.reshape(values, w.shape).astype(FORMATS[how])
    return values, jnp.reshape(scale.astype(jnp.bfloat16), sizes)


def dequantize(x: Any) -> Any:
    """The plain array; a plain array is returned as it is.

    Elementwise apart from reshapes, so that any sharding stays as it is. The codes are
    reshaped before they become floats: XLA for TPU then fuses all steps into one.
    """
    return _dequantize(x) if isinstance(x, Quantized) else x


# Jitted, because each step would be an array in memory where nothing else is jitted.
@functools.partial(jax.jit, inline=True)
def _dequantize(x: Quantized) -> jax.Array:
    split, scales = [], []
    for n, m in zip(x.shape, x.scale.shape, strict=True):
        split += [n] if m in (1, n) else [m, n // m]
        scales += [m] if m in (1, n) else [m, 1]
    dtypes = [*map(jax.dtypes.canonicalize_dtype, x.dtypes)]
    dtype = dtypes[0]
    # Small scales would lose digits in a dtype with fewer exponents than bfloat16.
    if dtype.itemsize < 4 and dtype != jnp.bfloat16:
        dtype = jnp.dtype(jnp.float32)
    values = jnp.reshape(x.values, split)
    convert = _selected if x.format in CODEBOOKS else lax.convert_element_type
    values, scale = convert(values, dtype), jnp.reshape(x.scale, scales).astype(dtype)
    if _comes_back(dtypes) and dtype == jnp.bfloat16:
        # Products of bfloat16 are exact in float32, and `rounded` rounds them once.
        exact = lambda x: lax.reduce_precision(x.astype(jnp.float32), 8, 7)
        values, scale = exact(values), exact(scale)
    w = jnp.reshape(values * scale, x.shape)
    for i, dtype in enumerate(dtypes):
        w = rounded(w, dtype) if _comes_back(dtypes[i:]) else w.astype(dtype)
    return w


def _comes_back(dtypes: Sequence[Any]) -> bool:
    """Whether a cast to the first dtype is followed by one to more digits."""
    digits = [jnp.finfo(dtype).nmant for dtype in dtypes]
    return max(digits) > digits[0]


def _selected(codes: jax.Array, dtype: Any) -> jax.Array:
    """The values of NF4 for codes from -8 to 7, selected by one bit after the other.

    A gather is no view of its operand on an explicit mesh, and XLA for TPU does not
    fuse it with the product by the scales. The bits are those of the two's complement,
    in which the codes from 0 on come first.
    """
    table = [jnp.asarray(x, dtype) for x in (*NF4[8:], *NF4[:8])]
    codes = codes.astype(jnp.int32)
    for bit in range(4):
        high = (codes >> bit) & 1 == 1
        pairs = zip(table[::2], table[1::2], strict=True)
        table = [jnp.where(high, b, a) for a, b in pairs]
    return table[0]


# XLA may drop a cast to a dtype of fewer digits and back, since it may keep more digits
# than the program asks for (`xla_allow_excess_precision`). Before a reduction it does,
# on CPUs, from jaxlib 0.10 on. These two are for results that depend on the rounding.


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """`x.astype(dtype)`, which stays rounded if it is cast back."""
    if dtype == jnp.bfloat16:
        return lax.reduce_precision(x, 8, 7).astype(dtype)
    # `reduce_precision` flushes float16's small numbers to zero, and has no float8.
    return lax.optimization_barrier(x.astype(dtype))


def widened(x: Any, dtype: Any) -> jax.Array:
    """`dequantize(x).astype(dtype)`, with no more digits than the plain array has."""
    w = dequantize(x)
    if not is_quantized(x) or jnp.finfo(w.dtype).nmant >= jnp.finfo(dtype).nmant:
        return w.astype(dtype)
    if w.dtype == jnp.bfloat16:
        return lax.reduce_precision(w.astype(dtype), jnp.finfo(dtype).nexp, 7)
    return lax.optimization_barrier(w).astype(dtype)


def through(
    fn: Callable[[Any, Any], Any], x: jax.Array, w: Any, *, looped: bool
) -> jax.Array:
    """`fn(x, w)`, whose derivative dequantizes the weight again and keeps no floats.

    This is `jax.checkpoint` rather than a derivative rule of our own, so that forward
    mode, `vmap` and second derivatives work. `prevent_cse` stops XLA from using the
    floats of the forward pass in the backward pass, which would keep those of all
    weights at once. In the body of a loop XLA cannot do that anyway, and `prevent_cse`
    would cost one more pass over the weight (v5e, scan and remat: 21.0 GB accessed
    instead of 18.5).
    """
    if not isinstance(w, Quantized):
        return fn(x, w)
    plain = lambda x, w: fn(x, dequantize(w))
    return jax.checkpoint(plain, prevent_cse=not looped)(x, w)


def part_specs(x: Quantized, spec: PartitionSpec, mesh: Any) -> tuple[Any, Any] | None:
    """An array's sharding for both parts, or `None` if it would cut a block."""
    names = (*spec, *(None,) * (x.ndim - len(spec)))
    sides = [*zip(names, x.shape, x.scale.shape, strict=True)]
    if any(m > 1 and m % _ways(name, mesh) for name, _, m in sides):
        return None
    return spec, PartitionSpec(*(name if m > 1 else None for name, _, m in sides))


def spread(x: Quantized, axis: int, block: int = 1) -> Quantized:
    """The same array, with a scale for each `block` elements along a dimension."""
    times = x.shape[axis] // block // x.scale.shape[axis]
    if times == 1:
        return x
    return dataclasses.replace(x, scale=jnp.repeat(x.scale, times, axis))


def wide_scaled(x: Quantized) -> Quantized:
    """The same array, with scales as wide as those of its product with a number."""
    dtype = _wider(x.scale.dtype, jnp.float32, x.dtype)
    return dataclasses.replace(x, scale=x.scale.astype(dtype))


def constrained(x: Any, sharding: Any) -> Any:
    """`lax.with_sharding_constraint` for both parts."""
    if not isinstance(x, Quantized):
        return lax.with_sharding_constraint(x, sharding)
    at = sharding, _of_scale(sharding, x.shape, x.scale.shape)
    parts = map(lax.with_sharding_constraint, (x.values, x.scale), at)
    return _with(x, *parts)[0]


def _of_scale(sharding: Any, shape: Sequence[int], sizes: Sequence[int]) -> Any:
    """The sharding of a scale: its array's, along dimensions with enough blocks."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    names = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    spec = (
        name if m > 1 and m % _ways(name, sharding.mesh) == 0 else None
        for name, m in zip(names, sizes, strict=True)
    )
    return sharding.update(spec=PartitionSpec(*spec))


def _ways(name: Any, mesh: Any) -> int:
    """The number of parts into which an entry of a spec cuts a dimension."""
    if name is None or name is PartitionSpec.UNCONSTRAINED:
        return 1
    names = name if isinstance(name, tuple) else (name,)
    return math.prod(mesh.shape[n] for n in names)


def ways(w: Any) -> list[int]:
    """The number of parts into which each dimension is cut, 1 where it is unknown."""
    traced = isinstance(w, jax.core.Tracer)
    sharding = jax.typeof(w).sharding if traced else getattr(w, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return [1] * len(w.shape)
    names = (*sharding.spec, *(None,) * (len(w.shape) - len(sharding.spec)))
    return [_ways(name, sharding.mesh) for name in names]


def loops_over(w: Any, batch: Sequence[int]) -> dict[int, int]:
    """The dimensions of `batch` to loop over, and the parts that a mesh cuts each into.

    Those of more than one layer; none where the sharding is unknown, since a loop over
    a sharded dimension would gather the stack on each device. It is unknown for traced
    arrays on a mesh with automatic axes.
    """
    w = values_of(w)
    if isinstance(w, jax.core.Tracer):
        mesh = jax.typeof(w).sharding.mesh
        unknown = AxisType.Auto in mesh.axis_types and mesh.size > 1
    else:
        sharding = getattr(w, "sharding", None)
        known = sharding is None or isinstance(sharding, NamedSharding)
        unknown = not (known or len(sharding.device_set) == 1)
    parts = ways(w)
    return {} if unknown else {d: parts[d] for d in batch if w.shape[d] > parts[d]}


# Views. A rule takes an equation's parameters and operands, and `plain`, the equation
# as a function of plain operands. It returns the results, or `None` to dequantize the
# array for this one use.


def bind(
    primitive: str, params: dict[str, Any], args: list[Any], plain: Any
) -> list[Any]:
    """Evaluates an equation on quantized operands: as a view, or on plain arrays.

    Only the first operand of a rule is quantized, except in `SEVERAL`. Empty arrays
    have no blocks, and are plain.
    """
    rule = VIEWS.get(primitive)
    args = [_plain_if_empty(x) for x in args]
    first = is_quantized(args[0]) and not any(map(is_quantized, args[1:]))
    results = None
    if rule and (first or (primitive in SEVERAL and any(map(is_quantized, args)))):
        results = rule(params, *args, plain=plain)
    if results is None:
        results = plain([dequantize(x) for x in args])
    return [_plain_if_empty(x) for x in results]


def _plain_if_empty(x: Any) -> Any:
    return dequantize(x) if is_quantized(x) and 0 in x.shape else x


def _blocks(x: Quantized) -> list[int]:
    """How many elements share a scale, along each dimension."""
    return [n // m for n, m in zip(x.shape, x.scale.shape, strict=True)]


def _with(x: Quantized, values: Any, scale: Any) -> list[Quantized]:
    return [dataclasses.replace(x, values=values, scale=scale)]


def _convert(params: Any, x: Any, *, plain: Any) -> list[Any] | None:
    dtype = jnp.dtype(params["new_dtype"])
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    return [dataclasses.replace(x, dtypes=(*x.dtypes, dtype))]


def _same(params: Any, x: Any, *, plain: Any) -> list[Any]:
    return _with(x, *(plain([part])[0] for part in (x.values, x.scale)))


def _reshape(params: Any, x: Any, *, plain: Any) -> list[Any] | None:
    if params.get("dimensions") is not None and "new_sizes" in params:
        return None
    (values,) = plain([x.values])
    sizes: list[int] = []
    for old, new in segments(x.shape, values.shape):
        of_old = ([s[d] for d in old] for s in (x.shape, x.scale.shape))
        run = _run(*of_old, [values.shape[d] for d in new])
        if run is None:
            return None
        sizes += run
    return _with(x, values, jnp.reshape(x.scale, sizes))


def _run(old: list[int], scale: list[int], new: list[int]) -> list[int] | None:
    """The scale's sizes after a reshape of some dimensions, or `None`.

    In row-major order the blocks of these dimensions are runs of equal length only if
    nothing after the first divided dimension has more than one scale.
    """
    pairs = zip(old, scale, strict=True)
    cut = next((i for i, (n, m) in enumerate(pairs) if n != m), len(old))
    if any(m != 1 for m in scale[cut + 1 :]):
        return None
    left = math.prod(old[cut:]) // math.prod(scale[cut:])  # elements to a scale
    sizes = []
    for n in reversed(new):
        if left % n and n % left:
            return None
        sizes.append(max(n // left, 1))
        left = max(left // n, 1)
    return sizes[::-1] if left == 1 else None


def _broadcast(params: Any, x: Any, *dynamic: Any, plain: Any) -> list[Any] | None:
    if dynamic:
        return None
    sizes = [1] * len(params["shape"])
    for d, m in zip(params["broadcast_dimensions"], x.scale.shape, strict=True):
        sizes[d] = m
    return _with(x, *plain([x.values]), jnp.reshape(x.scale, sizes))


def _cut(x: Quantized, axis: int, edges: Sequence[int]) -> Quantized | None:
    """The same array, in blocks that end at these edges, or `None`."""
    block = _blocks(x)[axis]
    if x.scale.shape[axis] == 1 or block == 1:
        return x
    own = math.gcd(block, *edges)
    return spread(x, axis, own) if own >= min(block, LEAST) else None


def _slice(params: Any, x: Any, *, plain: Any) -> list[Any] | None:
    cut, cuts = x, []
    starts, limits = params["start_indices"], params["limit_indices"]
    for d, stride in enumerate(params["strides"] or (1,) * x.ndim):
        start, limit = starts[d], limits[d]
        cut = _cut(cut, d, [start, limit])
        if cut is None:
            return None
        block = _blocks(cut)[d]
        if cut.scale.shape[d] == 1:
            start, limit, stride = 0, 1, 1
        elif block > 1:
            if stride > 1:
                return None
            start, limit = start // block, limit // block
        cuts.append((start, limit, stride))
    scale = lax.slice(cut.scale, *zip(*cuts, strict=True))
    return _with(x, *plain([x.values]), scale)


def _split(params: Any, x: Any, *, plain: Any) -> list[Any] | None:
    axis, sizes = params["axis"], params["sizes"]
    cut = _cut(x, axis, sizes)
    if cut is None:
        return None
    scales = [cut.scale] * len(sizes)
    if cut.scale.shape[axis] > 1:
        block = _blocks(cut)[axis]
        scales = lax.split(cut.scale, [n // block for n in sizes], axis)
    return [
        part
        for pair in zip(plain([x.values]), scales, strict=True)
        for part in _with(x, *pair)
    ]


def _unstack(params: Any, x: Any, *, plain: Any) -> list[Any]:
    axis = params["axis"]
    block = _blocks(x)[axis]
    return [
        part
        for i, values in enumerate(plain([x.values]))
        for part in _with(
            x, values, lax.index_in_dim(x.scale, i // block, axis, keepdims=False)
        )
    ]


def _rev(params: Any, x: Any, *, plain: Any) -> list[Any]:
    own = [d for d in params["dimensions"] if x.scale.shape[d] > 1]
    return _with(x, *plain([x.values]), lax.rev(x.scale, own))


def _dynamic_slice(params: Any, x: Any, *starts: Any, plain: Any) -> list[Any] | None:
    places, sizes = [], []
    taken = zip(starts, params["slice_sizes"], _blocks(x), strict=True)
    for d, (start, size, block) in enumerate(taken):
        if block > 1 and x.scale.shape[d] > 1 and size != x.shape[d]:
            return None
        places.append(start if block == 1 else jnp.zeros_like(start))
        sizes.append(size if block == 1 else x.scale.shape[d])
    scale = lax.dynamic_slice(x.scale, places, sizes)
    return _with(x, *plain([x.values, *starts]), scale)


def _gather(params: Any, x: Any, indices: Any, *, plain: Any) -> list[Any] | None:
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    named = (*numbers.start_index_map, *numbers.operand_batching_dims)
    blocks, fill = _blocks(x), params["fill_value"]
    part = any(sizes[d] != n and blocks[d] > 1 for d, n in enumerate(x.shape))
    odd = fill not in (None, 0) and not np.isnan(fill)
    if part or odd or any(blocks[d] > 1 for d in named):
        return None
    # Out of bounds the scale is the fill value, 0 or NaN, and so is the product.
    values = lax.gather(x.values, indices, **params | {"fill_value": 0})
    sides = zip(x.scale.shape, blocks, sizes, strict=True)
    some = [m if block > 1 else n for m, block, n in sides]
    options = params | {"slice_sizes": tuple(some)}
    return _with(x, values, lax.gather(x.scale, indices, **options))


def _concatenate(params: Any, *xs: Any, plain: Any) -> list[Any] | None:
    return _side_by_side(xs, params["dimension"], plain)


def _stack(params: Any, *xs: Any, plain: Any) -> list[Any] | None:
    axis = params["axis"]
    if not all(map(is_quantized, xs)):
        return None
    rows = [jax.tree.map(lambda y: lax.expand_dims(y, [axis]), x) for x in xs]
    return _side_by_side(rows, axis, lambda values: [lax.concatenate(values, axis)])


def _side_by_side(xs: Sequence[Any], axis: int, plain: Any) -> list[Any] | None:
    first = xs[0]
    if not all(map(is_quantized, xs)):
        return None
    if len({(x.format, x.dtypes) for x in xs}) > 1:
        return None
    # Along each dimension the blocks of the result divide those of all operands.
    for d in range(first.ndim):
        block = math.gcd(*(_blocks(x)[d] for x in xs))
        if block < min(LEAST, *(_blocks(x)[d] for x in xs)):
            return None
        xs = [spread(x, d, block) for x in xs]
    wide = _wider(*(x.scale.dtype for x in xs))
    scale = lax.concatenate([x.scale.astype(wide) for x in xs], axis)
    return _with(first, *plain([x.values for x in xs]), scale)


def _wider(*dtypes: Any) -> Any:
    """The dtype that JAX promotes these to, also under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.dtypes.canonicalize_dtype(jnp.result_type(*dtypes))


def _scaled(params: Any, *args: Any, plain: Any, by: Any) -> list[Any] | None:
    """Negation, or a product with a number, or with one number per scale."""
    x, *others = sorted(args, key=lambda y: not is_quantized(y))
    if x is not args[0] and by is jnp.divide:
        return None
    if others and len({jnp.finfo(dtype).nmant for dtype in x.dtypes}) > 1:
        return None  # the product of a rounded array is another one rounded later

    def fits(y):
        sizes = zip(jnp.shape(y), x.scale.shape, strict=False)
        own = jnp.ndim(y) in (0, x.ndim) and all(n in (1, m) for n, m in sizes)
        return own and not is_quantized(y) and not jnp.iscomplexobj(y)

    if not all(map(fits, others)):
        return None
    dtype = _wider(x.scale.dtype, *[jnp.float32, x.dtype] * len(others))
    others = [jnp.asarray(y, dtype) for y in others]
    return _with(x, x.values, by(x.scale.astype(dtype), *others))


def _constrained(params: Any, x: Any, *, plain: Any) -> list[Any]:
    return [constrained(x, params["sharding"])]


def _reshard(params: Any, x: Any, *, plain: Any) -> list[Any]:
    to = _of_scale(params["dst_sharding"], x.shape, x.scale.shape)
    return _with(x, *plain([x.values]), jax.sharding.reshard(x.scale, to))


def _device_put(params: Any, *xs: Any, plain: Any) -> list[Any]:
    def move(x, to):
        if to is None:
            # `device_put` would commit a concrete array to its current device, which
            # can conflict with a sharding constraint later.
            return x if isinstance(x, Quantized) else jnp.asarray(x)
        if not isinstance(x, Quantized):
            return jax.device_put(x, to)
        at = _of_scale(to, x.shape, x.scale.shape)
        return _with(x, jax.device_put(x.values, to), jax.device_put(x.scale, at))[0]

    return list(map(move, xs, params["devices"]))


VIEWS: dict[str, Callable[..., list[Any] | None]] = {
    "convert_element_type": _convert,
    "copy": _same,
    "transpose": _same,
    "reshape": _reshape,
    "squeeze": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "unstack": _unstack,
    "rev": _rev,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "concatenate": _concatenate,
    "stack": _stack,
    "neg": functools.partial(_scaled, by=jnp.negative),
    "mul": functools.partial(_scaled, by=jnp.multiply),
    "div": functools.partial(_scaled, by=jnp.divide),
    "sharding_constraint": _constrained,
    "reshard": _reshard,
    "device_put": _device_put,
}
# The primitives of which any operand may be quantized.
SEVERAL = {"concatenate", "stack", "neg", "mul", "div", "device_put"}
