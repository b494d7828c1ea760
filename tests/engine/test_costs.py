"""`lora(fn)` takes at most about as many FLOPs as the merged function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj


def flops(fn, *args):
    """Returns the FLOPs of the products of a jaxpr, times the length of a `scan`."""

    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                shape = eqn.invars[0].aval.shape
                each = np.prod([shape[d] for d in contracted], dtype=int)
                total += 2 * eqn.outvars[0].aval.size * each
            if eqn.primitive.name == "conv_general_dilated":
                y, w = eqn.outvars[0].aval, eqn.invars[1].aval
                channel = eqn.params["dimension_numbers"].rhs_spec[0]
                total += 2 * y.size * w.size // w.shape[channel]
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            for value in eqn.params.values():
                for x in value if isinstance(value, tuple | list) else [value]:
                    x = getattr(x, "jaxpr", x)
                    total += times * count(x) if hasattr(x, "eqns") else 0
        return total

    return count(jax.make_jaxpr(fn)(*args).jaxpr)


def of(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def ratios(fn, weights, *args, axes=None):
    """Returns FLOPs of `lora(fn)` over those of the merged `fn`, forward and a step."""
    params = lj.lorafy(weights, 8, targets="*", axes=axes)
    adapters, base = lj.split(params)
    counts = []
    adapted = lj.lora(fn, materialize="allow")
    for f in (adapted, lambda params, *args: fn(lj.merge(params), *args)):

        def loss(adapters, base, *args, f=f):
            ys = f(lj.combine(adapters, base), *args)
            return sum(jnp.sum(y) for y in jax.tree.leaves(ys))

        counts.append([flops(f, params, *args)])
        counts[-1].append(flops(jax.grad(loss), adapters, base, *args))
    return np.divide(*counts)


def recurrent(act, wrap=lambda step: step):
    def fn(params, xs):
        def step(h, x):
            return (jnp.tanh(x + h @ act(params["w"])),) * 2

        return lax.scan(wrap(step), jnp.zeros(xs.shape[1:]), xs)[1]

    return fn


def masked_map(params, x):
    mask = jnp.tril(jnp.ones((256, 256)))
    return lax.map(lambda row: jnp.sin(row @ (params["w"] * mask)), x)


def weight_norm(w):
    return w / jnp.linalg.norm(w, axis=0, keepdims=True)


SQUARE = {"w": of(256, 256)}
LOOPS = {
    "tanh": (recurrent(jnp.tanh), SQUARE, of(64, 8, 256)),
    "weight norm": (recurrent(weight_norm), SQUARE, of(64, 8, 256)),
    "batch of one": (recurrent(jnp.tanh), SQUARE, of(64, 1, 256)),
    "remat": (recurrent(jnp.tanh, jax.checkpoint), SQUARE, of(64, 8, 256)),
    "around remat": (jax.checkpoint(recurrent(jnp.tanh)), SQUARE, of(64, 8, 256)),
    "mask": (masked_map, SQUARE, of(64, 256)),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_lora_materializes_a_constant_weight_of_a_loop_once(loop):
    assert (ratios(*LOOPS[loop]) <= 1.1).all()


@pytest.mark.parametrize("carried", [False, True])
def test_lora_materializes_a_constant_weight_outside_of_while(carried):
    def fn(params, x):
        turn = lambda w, h: jnp.sin(h @ jnp.tanh(w))
        state = params["w"], x, 0
        if carried:  # and passed on unchanged
            body = lambda state: (state[0], turn(*state[:2]), state[2] + 1)
            return lax.while_loop(lambda state: state[2] < 8, body, state)[1]
        body = lambda state: (turn(params["w"], state[0]), state[1] + 1)
        return lax.while_loop(lambda state: state[1] < 8, body, state[1:])[0]

    params = lj.lorafy(SQUARE, 8, targets="*")
    adapted = lj.lora(fn, materialize="allow")
    jaxpr = jax.make_jaxpr(adapted)(params, of(4, 256)).jaxpr
    (loop,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "while")
    shapes = [v.aval.shape for v in loop.invars]
    assert (256, 256) in shapes and not any(8 in shape for shape in shapes)


def test_lora_warns_of_the_line_in_the_body_of_a_loop():
    params = lj.lorafy({"w": jnp.ones((4, 4))}, 2, targets="*")
    for _ in range(2):
        with pytest.warns(UserWarning, match="'w' meets 'tanh' at .*test_costs.py:"):
            lj.lora(recurrent(jnp.tanh))(params, jnp.ones((3, 2, 4)))
    with pytest.raises(ValueError, match="meets 'tanh'"):
        fn = recurrent(jnp.tanh)
        lj.lora(fn, materialize="error")(params, jnp.ones((3, 2, 4)))


def dense(params, x):
    return x @ params["w"]


def averaged_experts(params, x, gates):
    w = jnp.einsum("te,edf->tdf", gates, params["w"])
    return jnp.einsum("td,tdf->tf", x, w)


def concatenated(params, x):
    return x @ jnp.concatenate([params[name] for name in sorted(params)], 1)


def convolution(params, x):
    return lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


EXPERTS, WINDOW = lj.Axes((0,), (1,), (2,)), lj.Axes((), (0, 1, 2), (3,))
HEADS = lj.Axes((), (0,), (1, 2))
PRODUCTS = {
    "3 to 512": (dense, {"w": of(3, 512)}, of(4096, 3)),
    "6 to 512": (dense, {"w": of(6, 512)}, of(4096, 6)),
    "30 to 512": (dense, {"w": of(30, 512)}, of(4096, 30)),
    "512 to 2": (dense, {"w": of(512, 2)}, of(4096, 512)),
    "512 to 8": (dense, {"w": of(512, 8)}, of(4096, 512)),
    "512 to 512": (dense, {"w": of(512, 512)}, of(4096, 512)),
    "concatenation": (
        concatenated,
        {f"w{i}": of(512, 64) for i in range(24)},
        of(512, 512),
    ),
    "colors": (convolution, {"w": of(3, 3, 3, 64)}, of(2, 32, 32, 3)),
    "sum over heads": (
        lambda params, x: jnp.einsum("td,dhk->tk", x, params["w"]),
        {"w": of(512, 2, 64)},
        of(512, 512),
    ),
    "experts": (averaged_experts, {"w": of(8, 64, 64)}, of(32, 64), of(32, 8)),
}
AXES = {"colors": WINDOW, "sum over heads": HEADS, "experts": EXPERTS}


@pytest.mark.parametrize("product", PRODUCTS)
def test_lora_of_a_product_costs_no_more_than_the_merged_weight(product):
    axes = {"w": AXES[product]} if product in AXES else None
    assert (ratios(*PRODUCTS[product], axes=axes) <= 1.25).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("r", [2, 12, 40])
def test_lora_of_a_sum_of_two_weights(randomized, close, sign, r):
    """It stays factored, is cheaper as an array, or has more elements in factors."""
    draw = np.random.default_rng(0).standard_normal
    w = {n: jnp.asarray(draw((96, 96)) / 10, jnp.float32) for n in "uv"}
    params, x = randomized(lj.lorafy(w, r, targets="*")), jnp.ones((4, 96))
    combine = jnp.add if sign > 0 else jnp.subtract
    fn = lambda params, x: x @ combine(params["u"], params["v"])
    lora = jax.jit(lj.lora(fn, materialize="allow"))
    close(lora(params, x), fn(lj.merge(params), x), atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_lora_keeps_an_update_that_the_weight_would_round_away(dtype):
    """W + scale * A B is cheaper here, but in low precision it rounds to W."""
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((512, 2), (256, 512)))
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((512, 8), (8, 2)))
    b /= 2**12
    zero = lj.lorafy({"w": w}, 8, targets="*")
    small = zero | {"w_lora_a": jnp.asarray(a), "w_lora_b": jnp.asarray(b)}
    product = lambda params, x: lax.dot(
        x, params["w"], preferred_element_type=jnp.float32
    )
    fn = lj.lora(product)
    update = np.asarray(fn(small, x) - fn(zero, x))
    want = np.asarray(x, np.float32) @ a @ b
    np.testing.assert_allclose(update, want, atol=0.02 * np.abs(want).max())
