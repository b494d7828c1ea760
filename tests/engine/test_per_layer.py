"""`per_layer` maps a function over stacked layers: values, meshes and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax._engine.per_layer import per_layer

RNG = np.random.default_rng(0)
COLLECTIVES = "all-gather", "all-to-all", "collective-permute", "all-reduce"


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    ("shape", "layers"),
    [
        ((4, 3, 5), {0: 1}),
        ((3, 4, 5), {1: 1}),
        ((3, 5, 4), {2: 1}),
        ((4, 3, 2), {1: 1, 0: 1}),
        ((3, 4, 2, 5), {1: 1, 3: 1}),
        ((8, 3, 6), {0: 2}),
        ((3, 8, 6), {1: 4, 2: 3}),
        ((4, 3, 6), {0: 4, 2: 2}),
        ((4, 3), {0: 4}),
        ((1, 3), {0: 1}),
        ((4, 3), {}),
    ],
)
def test_per_layer_computes_the_function_of_each_layer(shape, layers):
    """An array of size 1 along the layers is broadcast to all of them."""
    x, shared = (
        normal(*shape),
        normal(*(1 if d in layers else n for d, n in enumerate(shape))),
    )
    own = tuple(d for d in range(len(shape)) if d not in layers)
    sizes = {d: shape[d] // parts for d, parts in layers.items()}
    seen = []

    def fn(x, y):
        seen.append(x.shape)
        total = jnp.sum(x * y, own, keepdims=True)
        return x * total, (total.astype(jnp.int4), x + y)

    got = per_layer(fn, [x, shared], layers)
    a, b = np.asarray(x), np.asarray(shared)
    total = np.sum(a * b, own, keepdims=True)
    np.testing.assert_allclose(got[0], a * total, rtol=1e-5)
    np.testing.assert_array_equal(got[1][0], jnp.asarray(total).astype(jnp.int4))
    np.testing.assert_array_equal(got[1][1], a + b)
    wanted = tuple(layers.get(d, n) for d, n in enumerate(shape))
    if np.prod([*sizes.values()], dtype=int) > 1:
        assert {*seen} == {wanted}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        (P("x", None, "y"), {0: 2}),
        (P("y", "x"), {0: 4}),
        (P(("x", "y")), {0: 8}),
        (P(None, "x", "y"), {0: 1}),
        (P("x", "y"), {0: 2, 1: 4}),
    ],
)
def test_per_layer_gathers_no_sharded_stack(kind, spec, layers):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    at = NamedSharding(mesh, spec)
    x = jax.device_put(normal(16, 8, 4), at)

    def fn(x):
        return jnp.sin(x), jnp.max(x, 2, keepdims=True)

    last = NamedSharding(mesh, P(*(*spec, None, None)[:2]))
    mapped = jax.jit(lambda x: per_layer(fn, [x], layers), out_shardings=(at, last))
    for got, want in zip(mapped(x), fn(np.asarray(x)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)
    text = mapped.lower(x).compile().as_text()
    crossed = [name for name in COLLECTIVES if f" {name}(" in text]
    assert crossed == (["all-reduce"] if spec[2:] == ("y",) else [])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_per_layer_holds_floats_of_one_layer(dtype):
    def fn(x):
        wide = x.astype(jnp.float32)
        return jnp.round(wide / jnp.max(jnp.abs(wide), 0, keepdims=True)).astype(
            jnp.int8
        )

    temporaries = {}
    for layers in (1, 16):
        x = jax.ShapeDtypeStruct((layers, 64, 64), dtype)
        mapped = jax.jit(lambda x: per_layer(jax.vmap(fn), [x], {0: 1}))
        compiled = mapped.lower(x).compile()
        temporaries[layers] = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries[16] < temporaries[1] + 2 * 64 * 64 * 4
