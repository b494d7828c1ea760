"""Tests that `find_axes` infers a weight's dimensions from how a function uses it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj

D = 4
X = jax.ShapeDtypeStruct((6, D), jnp.float32)
IDS = np.array([0, 2, 1, 1, 0, 2])
MATRIX, TURNED = lj.Axes((), (0,), (1,)), lj.Axes((), (1,), (0,))
STACK = lj.Axes((0,), (1,), (2,))


def attention(w, x):
    heads = jnp.einsum("td,cdnh->ctnh", x, w)  # queries, keys and values at once
    return jnp.einsum("tnh,snh->nts", heads[0], heads[1])


def conv(w, x, **options):
    dims = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        x[None], w, (1,), "SAME", dimension_numbers=dims, **options
    )


def scan(step):
    return lambda w, x: lax.scan(lambda c, w: (jnp.sin(step(c, w)), None), x, w)[0]


# A function of a weight of some shape, and the axes that it implies.
USES = {
    "product": ((D, 3), lambda w, x: x @ w, MATRIX),
    "stored (out, in)": ((3, D), lambda w, x: x @ w.T, TURNED),
    "weight on the left": ((3, D), lambda w, x: w @ x.T, TURNED),
    "heads": (
        (D, 2, 3),
        lambda w, x: jnp.einsum("td,dnh->tnh", x, w),
        ((), (0,), (1, 2)),
    ),
    "heads back": (
        (2, 2, 3),
        lambda w, x: jnp.einsum("tnh,nhd->td", x.reshape(6, 2, 2), w),
        ((), (0, 1), (2,)),
    ),
    "fused": ((3, D, 2, 5), attention, ((), (1,), (0, 2, 3))),
    "fused, head by head": (
        (2, 3, D, 5),
        lambda w, x: [jnp.einsum("td,ndh->tnh", x, w[i]) for i in range(2)],
        ((0,), (2,), (1, 3)),
    ),
    "convolution": ((3, D, 5), conv, ((), (0, 1), (2,))),
    "slope of a convolution": (
        (3, D, 5),
        lambda w, x: jax.grad(lambda x: jnp.sin(conv(w, x)).sum())(x),
        ((), (0, 1), (2,)),
    ),
    "grouped": (
        (3, 2, 6),
        lambda w, x: conv(w, x, feature_group_count=2),
        ((), (0, 1), (2,)),
    ),
    "transposed convolution": (
        (3, D, 5),
        lambda w, x: lax.conv_transpose(
            *(x[None], w, (2,), "SAME"), dimension_numbers=("NWC", "WIO", "NWC")
        ),
        ((), (0, 1), (2,)),
    ),
    "embedding": ((7, 3), lambda w, x: w[IDS], MATRIX),
    "embedding, then a product": ((7, 3), lambda w, x: w[IDS].T @ x, MATRIX),
    "tied head": ((7, D), lambda w, x: jnp.sin(w[IDS] + x) @ w.T, MATRIX),
    "tied head first": ((7, D), lambda w, x: (jnp.sin(x @ w.T), w[IDS]), MATRIX),
    "a row at a time": (
        (7, 3),
        lambda w, x: lax.fori_loop(
            0, 6, lambda i, c: c + lax.dynamic_index_in_dim(w, i), jnp.zeros((1, 3))
        ),
        MATRIX,
    ),
    "layers": ((3, D, D), scan(lambda c, w: c @ w), STACK),
    "layers stored (out, in)": (
        (3, D, D),
        scan(lambda c, w: c @ w.T),
        ((0,), (2,), (1,)),
    ),
    "layers one by one": (
        (3, D, D),
        lambda w, x: jnp.sin(jnp.sin(x @ w[0]) @ w[1]) @ w[2],
        STACK,
    ),
    "layers by number": (
        (3, D, D),
        lambda w, x: lax.fori_loop(0, 3, lambda i, c: jnp.sin(c @ w[i]), x),
        STACK,
    ),
    "layers of embeddings": (
        (2, 7, 3),
        lambda w, x: lax.map(lambda w: w[IDS], w),
        ((0,), (1,), (2,)),
    ),
    "experts": (
        (3, D, 2),
        lambda w, x: jax.vmap(lambda w: x @ w)(w),
        ((), (1,), (0, 2)),
    ),
    "experts, each its own rows": (
        (2, D, 3),
        lambda w, x: jnp.einsum("etd,edh->eth", x.reshape(2, 3, D), w),
        STACK,
    ),
    "expert of each row": (
        (3, D, 2),
        lambda w, x: jnp.einsum("td,tdh->th", x, w[IDS]),
        STACK,
    ),
    "ragged experts": (
        (2, D, 3),
        lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 4])),
        STACK,
    ),
    "one by one convolution": ((1, D, 5), conv, ((), (0, 1), (2,))),
    "masked": ((D, D), lambda w, x: x @ (w * jnp.tril(jnp.ones((D, D)))), MATRIX),
    "masked by an argument": (
        (D, D),
        lambda w, x: x @ (w * jnp.tril(x[:D])),
        MATRIX,
    ),
    "with a sum": ((D, D), lambda w, x: x @ (w + jnp.eye(D)), MATRIX),
    "with a product": (
        (D, 3),
        lambda w, x: x @ (w + jnp.ones((D, 2)) @ jnp.ones((2, 3))),
        MATRIX,
    ),
    "squashed": ((D, 3), lambda w, x: x @ jnp.tanh(w), MATRIX),
    "standardized": ((3, D, 5), lambda w, x: conv(w - w.mean(), x), ((), (0, 1), (2,))),
    "padded, turned, cast": (
        (3, 3),
        lambda w, x: x @ jnp.flip(jnp.pad(w.T.astype(jnp.float32), 1)[1:]),
        TURNED,
    ),
    "read in another order": (
        (2, 3, D),
        lambda w, x: x @ lax.reshape(w, (D, 6), (2, 1, 0)),
        ((), (2,), (0, 1)),
    ),
    "product, and a determinant": (
        (D, D),
        lambda w, x: (x @ w, jnp.linalg.slogdet(w)[1]),
        MATRIX,
    ),
    "heads, and a number of one": (
        (D, 2, 3),
        lambda w, x: (jnp.einsum("td,dnh->tnh", x, w), w[:, :, :1].sum()),
        ((), (0,), (1, 2)),
    ),
    "merged and split": (
        (2, 2, 6),
        lambda w, x: jnp.einsum("td,dnh->tnh", x, w.reshape(4, 2, 3)),
        ((), (0, 1), (2,)),
    ),
    "inner gradient": (
        (D, 3),
        lambda w, x: jax.grad(lambda x: jnp.sin(x @ w).sum())(x),
        MATRIX,
    ),
    "remat, jit, cond": (
        (3, D),
        lambda w, x: lax.cond(
            x.sum() > 0,
            jax.checkpoint(lambda x: x @ w.T),
            jax.jit(lambda x: x @ w.T),
            x,
        ),
        TURNED,
    ),
}


@pytest.mark.parametrize("name", USES)
def test_find_axes(name, randomized, close):
    """The axes are as expected, and an adapter with them is exact."""
    shape, fn, want = USES[name]
    own = lambda params, x: fn(params["block"]["w"], x)
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    axes = lj.find_axes(own, {"block": {"w": w}}, X)
    assert axes == {"block/w": lj.Axes(*want)}
    rng = np.random.default_rng(0)
    x, w = (np.asarray(rng.standard_normal(s), np.float32) for s in (X.shape, shape))
    w = jax.device_put(w)
    params = lj.lorafy({"block": {"w": w}}, 1, targets="w", axes=axes)
    params = randomized(params)
    lora = lj.lora(own, materialize="allow")
    both = jax.jit(lambda p, x: (lora(p, x), own(lj.merge(p), x)))
    close(*both(params, x))


def concat(w, x):
    return jnp.concatenate([jnp.broadcast_to(w, (1, D)), x])


# Weights that no product and no lookup uses.
ELEMENTWISE = {
    "norms of layers": ((3, D), scan(lambda c, w: c * w[None])),
    "norms of layers, then a product": (
        (3, D),
        scan(lambda c, w: (c * w[None]) @ jnp.ones((D, D))),
    ),
    "biases of layers": ((3, D), scan(lambda c, w: c @ jnp.ones((D, D)) + w[None])),
    "norms of layers one by one": ((2, D), lambda w, x: (x * w[:1]) * w[1:]),
    "norms of heads": (
        (2, 2),
        lambda w, x: jnp.einsum("thd,shd->hts", *[x.reshape(6, 2, 2) * w[None]] * 2),
    ),
    "biases of heads": (
        (2, 2),
        lambda w, x: (x.reshape(6, 2, 2) + w[None]).reshape(6, D) @ jnp.ones((D, D)),
    ),
    "positions": ((8, D), lambda w, x: jnp.tanh(x + w[:6])),
    "positions of a batch": ((1, 8, D), lambda w, x: x + w[0, :6]),
    "positions, then a product": ((6, D), lambda w, x: (x + w) @ jnp.ones((D, 2))),
    "positions of tokens, then a product": (
        (6, D),
        lambda w, x: (jnp.take(x, jnp.argsort(x[:, 0]), 0) + w) @ jnp.ones((D, 2)),
    ),
    "positions in a loop": (
        (6, D),
        lambda w, x: lax.fori_loop(0, 2, lambda _, c: (c + w) @ jnp.ones((D, D)), x),
    ),
    "a token in front": ((1, D), lambda w, x: concat(w, x) @ jnp.ones((D, 2))),
    "a query of each head": (
        (2, 2),
        lambda w, x: jnp.einsum("thd,hd->th", x.reshape(6, 2, 2), w),
    ),
    "a penalty": ((3, D), lambda w, x: x * (w**2).sum()),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_find_axes_leaves_out_weights_without_product_and_lookup(name):
    shape, fn = ELEMENTWISE[name]
    own = lambda p, x: fn(p["w"], x @ p["first"])
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32), "first": jnp.ones((D, D))}
    assert lj.find_axes(own, params, X) == {"first": MATRIX}
    adapted = lj.lorafy(params, 2, axes=lj.find_axes(own, params, X))
    assert adapted.keys() - params.keys() == {
        "first_lora_a",
        "first_lora_b",
        "first_lora_scale",
    }


def test_find_axes_agrees_with_flax_names():
    model = nn.Sequential(
        [
            nn.Embed(11, D),
            nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6),
            nn.Dense(7),
        ]
    )
    ids = jnp.zeros((2, 3), int)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    axes = lj.find_axes(model.apply, params, ids)
    assert len(axes) == 6
    kernels = {path: dims for path, dims in axes.items() if path.endswith("kernel")}
    own = lj.lorafy(params, 2)
    found = lj.lorafy(params, 2, axes=kernels)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, found)


def test_find_axes_passes_other_arguments():
    fn = lambda x, p, *, turn: x @ (p["w"].T if turn else p["w"])
    params = {"w": jnp.ones((D, D)), "unused": jnp.ones((D, D)), "bias": jnp.ones(D)}
    assert lj.find_axes(fn, X, params, argnums=1, turn=True) == {"w": TURNED}
    assert lj.find_axes(fn, X, params, argnums=-1, turn=False) == {"w": MATRIX}
    by_name = lambda x, *, p, turn: fn(x, p, turn=turn)
    found = lj.find_axes(by_name, X, argnames="p", p=params, turn=True)
    assert found == {"w": TURNED}
    with pytest.raises(TypeError, match=r"argnums=2 names no argument.* 2 positional"):
        lj.find_axes(fn, X, params, argnums=2, turn=False)
    with pytest.raises(TypeError, match=r"argnames='q' names no.*\['p', 'turn'\]"):
        lj.find_axes(by_name, X, argnames="q", p=params, turn=True)
    with pytest.raises(TypeError, match=r"Argument 0 .* should hold the parameters"):
        lj.find_axes(fn, X, params, turn=True)


def test_find_axes_of_parameters_in_two_arguments():
    fn = lambda p, x, *, q: x @ p["w"] @ q["w"].T
    w = {"w": jnp.ones((D, D))}
    found = lj.find_axes(fn, w, X, argnums=0, argnames=["q"], q=w)
    assert found == ({"w": MATRIX}, {"w": TURNED})


def test_find_axes_refuses_two_incompatible_uses_with_both_lines():
    def fn(params, x):
        y = x @ params["w"].reshape(D, 6)
        return y, jnp.ones((3, 8)) @ params["w"].reshape(8, 3)

    first = fn.__code__.co_firstlineno + 1
    with pytest.raises(ValueError, match="'w' is used in two ways") as error:
        lj.find_axes(fn, {"w": jnp.ones((D, 2, 3))}, X)
    for line, sides in enumerate(
        ["(0,) and outputs (1, 2)", "(0, 1) and outputs (2,)"]
    ):
        assert f"inputs {sides} at tests/test_find_axes.py:{first + line}" in str(
            error.value
        )


def test_find_axes_of_products_in_both_directions():
    fn = lambda p, x: jnp.sin(x @ p["w"]) @ p["w"].T
    assert lj.find_axes(fn, {"w": jnp.ones((D, 3))}, X) == {"w": MATRIX}
