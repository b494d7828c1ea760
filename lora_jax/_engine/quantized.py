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
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding
from jax.tree_util import GetAttrKey

from lora_jax._engine.companions import sharding_of, ways
from lora_jax._engine.dtypes import digits, rounded
from lora_jax._engine.per_layer import per_layer

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


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A floating array in 4 or 8 bits per element: `values * scale`, block by block.

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


def _from_parts(static: tuple[Any, ...], parts: Iterable[Any]) -> Quantized:
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


def blocks(x: Quantized) -> list[int]:
    """The number of elements that share a scale, along each dimension."""
    return [n // m for n, m in zip(x.shape, x.scale.shape, strict=True)]


def format_name(x: Quantized) -> str:
    """As "nf4/64": the format, and how many elements share a scale."""
    return f"{x.format}/{math.prod(blocks(x))}"


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
    layers = [d for d in batch if sizes[d] == w.shape[d]]  # where each layer has scales
    loops = tuple(loops_over(w, layers).items())
    if isinstance(w, Tracer):
        return Quantized(*_make(w, how, sizes, loops), dtypes, how)
    sharding = getattr(w, "sharding", None)
    places = None
    if isinstance(sharding, NamedSharding):
        places = sharding, sharding_of(sizes, sharding)
    if isinstance(w, jax.ShapeDtypeStruct):
        put = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
        plain = jax.ShapeDtypeStruct(w.shape, w.dtype)
        parts = jax.eval_shape(lambda w: _make(w, how, sizes, ()), plain)
        parts = map(put, parts, places or (sharding, sharding))
    else:
        make = jax.jit(_make, static_argnums=(1, 2, 3), out_shardings=places)
        parts = make(w, how, sizes, loops)  # compiled once for equal weights
    values, scale = parts
    return Quantized(values, scale, dtypes, how)


def _make(
    w: jax.Array, how: str, sizes: tuple[int, ...], loops: tuple[tuple[int, int], ...]
) -> tuple[jax.Array, jax.Array]:
    """The codes and the scales."""
    parts = dict(loops)
    of_layer = [parts.get(d, m) for d, m in enumerate(sizes)]
    return per_layer(lambda w: _make_one(w, how, of_layer), [w], parts)


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
    first, *rest = map(digits, dtypes)
    return any(n > first for n in rest)


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


def widened(x: Any, dtype: Any) -> jax.Array:
    """`dequantize(x).astype(dtype)`, with no more digits than the plain array has."""
    w = dequantize(x)
    if not is_quantized(x) or digits(w.dtype) >= digits(dtype):
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


def spread(x: Quantized, axis: int, block: int = 1) -> Quantized:
    """The same array, with a scale for each `block` elements along a dimension."""
    times = x.shape[axis] // block // x.scale.shape[axis]
    if times == 1:
        return x
    return dataclasses.replace(x, scale=jnp.repeat(x.scale, times, axis))


def mesh_parts(w: Any) -> list[int]:
    """The number of parts into which each dimension is cut, 1 where it is unknown."""
    traced = isinstance(w, Tracer)
    sharding = jax.typeof(w).sharding if traced else getattr(w, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return [1] * len(w.shape)
    names = (*sharding.spec, *(None,) * (len(w.shape) - len(sharding.spec)))
    return [ways(name, sharding.mesh) for name in names]


def loops_over(w: Any, batch: Sequence[int]) -> dict[int, int]:
    """The dimensions of `batch` to loop over, and the parts that a mesh cuts each into.

    Those of more than one layer; none where the sharding is unknown, since a loop over
    a sharded dimension would gather the stack on each device. It is unknown for traced
    arrays on a mesh with automatic axes.
    """
    w = values_of(w)
    if isinstance(w, Tracer):
        mesh = jax.typeof(w).sharding.mesh
        unknown = AxisType.Auto in mesh.axis_types and mesh.size > 1
    else:
        at = getattr(w, "sharding", None)
        unknown = not (
            at is None or isinstance(at, NamedSharding) or len(at.device_set) == 1
        )
    parts = mesh_parts(w)
    return {} if unknown else {d: parts[d] for d in batch if w.shape[d] > parts[d]}
