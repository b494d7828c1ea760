"""Random programs on random weights: `lora(fn)` equals `fn` on the merged parameters.

A program depends only on its seed: every trace draws the same steps. A step applies
some views and a use to a weight, or calls a shorter program in a loop, a branch or a
transformation. The derivatives and their arguments are drawn too.
`LORA_JAX_FUZZ=2000 pytest tests/engine/test_fuzz.py` runs 2,000 programs, and a failure
names its seed.
"""

import contextlib
import dataclasses
import functools
import math
import operator
import os
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax._engine import evaluate, ops, views
from lora_jax._engine.quantized import FORMATS, quantize_array

PROGRAMS = int(os.environ.get("LORA_JAX_FUZZ", 17))
BATCH, D = 4, 3
LARGEST = 120  # a view of a weight with more elements is sliced


class At(NamedTuple):
    """The state of a program: the random generator, the weights and activations."""

    rng: np.random.Generator
    without: frozenset[str]  # constructs that JAX does not support here
    weights: list[jax.Array]
    x: jax.Array
    given: jax.Array | None  # an argument of the program that is never differentiated

    def below(self, n: int) -> int:
        return int(self.rng.integers(n))

    def chance(self, p: float = 0.5) -> bool:
        return bool(self.rng.random() < p)

    def choose(self, options: Any) -> Any:
        return options[self.below(len(options))]

    def pick(self, table: dict[str, Any]) -> Any:
        return table[self.choose([n for n in table if n not in self.without])]


# Building blocks: arrays that depend on the activations.


def mixed(at, x, shape):
    """Returns an array of any shape whose elements are random combinations of `x`."""
    mixing = at.rng.standard_normal((x.size, math.prod(shape))) / np.sqrt(x.size)
    return jnp.reshape(x.ravel() @ mixing.astype(x.dtype), shape)


def scalar(at):
    return 1 + jnp.sin(at.x.ravel()[0]) / 2


def coin(at):
    return at.x.ravel()[-1] > 0


def features(at, shape, dtype=np.float32):
    """Returns constants without derivatives, exact in every dtype of the tests."""
    either = at.rng.integers(-8, 9, size=(2, *shape)).astype(np.float32) / 4
    return jnp.where(coin(at), *either).astype(dtype)


def indices(at, shape, size):
    return jnp.where(coin(at), *at.rng.integers(size, size=(2, *shape)))


def other(at, w, shape):
    """Returns another weight, or a plain array, to combine with a weight."""
    others = [v for v in at.weights if v.ndim == len(shape)]
    if not others or at.chance(0.3):
        return mixed(at, at.x, shape)
    v = at.choose(others)
    v = lax.slice(v, [0] * v.ndim, np.minimum(v.shape, shape))
    missing = [n - m for n, m in zip(shape, v.shape, strict=True)]
    if not any(missing):
        return v
    return lax.pad(v, jnp.ones((), v.dtype), [(0, n, 0) for n in missing])


@functools.cache
def mesh():
    return jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))


# Views: `view(at, w, d)` returns another array; `d` is one of the dimensions.


def reshape(at, w, d):
    shape = list(w.shape)
    kind = at.choose(["split", "merge", "any"])
    if kind == "split":
        first = at.choose([n for n in range(1, shape[d] + 1) if shape[d] % n == 0])
        shape[d : d + 1] = [first, shape[d] // first]
    elif kind == "merge":
        shape[d : d + 2] = [math.prod(shape[d : d + 2])]
    else:
        at.rng.shuffle(shape)
    return jnp.reshape(w, shape)


def broadcast(at, w, d):
    if at.chance(0.2):
        return jnp.tile(w, 2)
    kept = [i + (i >= d) for i in range(w.ndim)]
    return lax.broadcast_in_dim(w, (*w.shape[:d], 2, *w.shape[d:]), kept)


def strided(at, w, d):
    starts = [at.below(n) for n in w.shape]
    limits = [i + 1 + at.below(n - i) for i, n in zip(starts, w.shape, strict=True)]
    return lax.slice(w, starts, limits, [1 + at.below(3) for _ in w.shape])


def dynamic_slice(at, w, d):
    starts = indices(at, (w.ndim,), 8) - 2  # some out of bounds
    return lax.dynamic_slice(w, list(starts), [1 + at.below(n) for n in w.shape])


def layer(at, w, d):
    i, fixed = indices(at, (), w.shape[d]), at.below(w.shape[d])
    return at.choose(
        [
            lambda: lax.index_in_dim(w, fixed, d, keepdims=w.ndim == 1),
            lambda: lax.dynamic_index_in_dim(w, i, d, keepdims=w.ndim == 1),
            lambda: jnp.moveaxis(w, d, 0)[i[None]],
        ]
    )()


def pad(at, w, d):
    config = [(0, 0, 0)] * w.ndim
    config[d] = (1 - at.below(min(w.shape[d], 3)), at.below(2), at.below(2))
    return lax.pad(w, lax.stop_gradient(scalar(at)), config)


def split(at, w, d):
    parts = jnp.split(w, [at.below(w.shape[d] - 1) + 1] if w.shape[d] > 1 else 1, d)
    return jnp.concatenate(parts[::-1], d) if at.chance(0.3) else parts[0]


def concatenate(at, w, d):
    n = at.choose([1, 2, w.shape[d]])
    arrays = [w, other(at, w, (*w.shape[:d], n, *w.shape[d + 1 :])), w]
    return lax.concatenate(arrays[at.below(2) :][: 2 + at.below(2)], d)


def scale(at, w, d):
    variants = [w * 0.7, scalar(at) * w, w / scalar(at), -w, 0.1 / (2 + w * w)]
    return at.choose(variants)


def shift(at, w, d):
    v = other(at, w, w.shape)
    v = jnp.broadcast_to(scalar(at), w.shape) if at.chance(0.3) else v
    return at.choose([lambda: w + v, lambda: w - v, lambda: v - w])()


def materialized(at, w, d):
    """Applies an operation that materializes the weight."""
    variants = {
        "tanh": jnp.tanh,
        "square": lambda w: w * w,
        "times": lambda w: w * other(at, w, w.shape),
        "sort": lambda w: jnp.sort(w, d),
        "where": lambda w: jnp.where(w > 0.1, w, 0.5),
        "cumsum": lambda w: jnp.cumsum(w, d),
        "scatter": lambda w: w.at[0].add(1.0),
        "gram": lambda w: jnp.tensordot(w, w, (d, d)) / w.size,
    }
    return at.pick(variants)(w)


def called(at, w, d):
    """Applies a view inside a call that returns it."""
    seed, view = at.below(2**31), at.pick(VIEWS)

    def f(w, x):
        here = at._replace(rng=np.random.default_rng(seed), weights=[], x=x, given=None)
        return view(here, w, here.below(w.ndim))

    jvp, vjp = jax.custom_jvp(f), jax.custom_vjp(f)
    jvp.defjvp(lambda xs, dots: jax.jvp(f, xs, dots))
    vjp.defvjp(lambda *xs: jax.vjp(f, *xs), lambda pullback, ct: pullback(ct))
    ways = {
        "jit": jax.jit(f),
        "remat": jax.checkpoint(f),
        "cond": lambda w, x: lax.cond(coin(at), f, lambda *xs: -f(*xs), w, x),
        "custom_jvp": jvp,
        "custom_vjp": vjp,
    }
    if w.ndim > 1:
        ways["scan"] = lambda w, x: lax.scan(lambda _, w: (_, f(w, x)), 0, w)[1]
        ways["vmap"] = lambda w, x: jax.vmap(f, (d, None), 1)(w, x)
    return at.pick(ways)(w, at.x)


def straight_through(at, w, d):
    """Applies a custom rule that returns a weight, with another derivative."""
    view = at.choose([lambda w: w, lambda w: -w, jnp.tanh, lambda w: lax.rev(w, [d])])
    jvp, vjp = jax.custom_jvp(view), jax.custom_vjp(view)
    jvp.defjvp(lambda xs, dots: (view(*xs), dots[0] / 2))
    vjp.defvjp(lambda w: (view(w), None), lambda _, ct: (ct / 2,))
    rule = at.pick({"custom_jvp": jvp, "custom_vjp": vjp})
    return jax.jit(rule)(w) if at.chance() else rule(w)


VIEWS = {
    "straight_through": straight_through,
    "reshape": reshape,
    "broadcast": broadcast,
    "strided": strided,
    "dynamic_slice": dynamic_slice,
    "layer": layer,
    "pad": pad,
    "split": split,
    "concatenate": concatenate,
    "scale": scale,
    "shift": shift,
    "materialized": materialized,
    "called": called,
    "transpose": lambda at, w, d: jnp.transpose(w, at.rng.permutation(w.ndim)),
    "expand": lambda at, w, d: jnp.expand_dims(w, d),
    "flip": lambda at, w, d: jnp.flip(w, d),
    "stack": lambda at, w, d: jnp.stack([other(at, w, w.shape), w], d),
    "stop_gradient": lambda at, w, d: lax.stop_gradient(w),
    "barrier": lambda at, w, d: lax.optimization_barrier((-w, w))[1],
    "copy": lambda at, w, d: jnp.copy(w),
    "device_put": lambda at, w, d: jax.device_put(w),
    "unstack": lambda at, w, d: jnp.unstack(w, axis=d)[-1] if w.ndim > 1 else w,
    "precision": lambda at, w, d: lax.reduce_precision(w, 8, 23),  # float32's own
    "name": lambda at, w, d: checkpoint_name(w, "kept"),
    "sum": lambda at, w, d: jnp.sum(w, d, keepdims=w.ndim == 1),
    "constraint": lambda at, w, d: lax.with_sharding_constraint(
        w, NamedSharding(mesh(), P())
    ),
}


# Roundings: `q(w)` is the nearest value on a coarse grid. They come last: two sums that
# differ in their last bit can round differently, and the probability of that is the
# ratio of this bit to the step of the grid. The step of bfloat16 is too small for this
# test: see `test_lora_on_random_halves`.


def cast(dtype):
    return lambda w: w.astype(dtype).astype(w.dtype)


def reduced(exponent, mantissa):
    return lambda w: lax.reduce_precision(w, exponent, mantissa)


ROUNDINGS = {
    "float8_e4m3fn": cast(jnp.float8_e4m3fn),
    "float8_e5m2": cast(jnp.float8_e5m2),
    "float4_e2m1fn": cast(jnp.float4_e2m1fn),
    "reduced_e4m3": reduced(4, 3),
    "reduced_e8m1": reduced(8, 1),
}


def rounded(at, w):
    cast = at.pick(ROUNDINGS)
    # JAX rounds derivatives as well, and these never agree in their last digit.
    q = lambda w: lax.stop_gradient(cast(w))
    variants = {
        "rounded": q,
        "rounded_through": lambda w: w + q(w) - lax.stop_gradient(w),
        "rounding_error": lambda w: w - q(w),
    }
    return at.pick(variants)(w)


def viewed(at):
    w = at.choose(at.weights)
    for _ in range(at.choose([0, 1, 1, 2, 3])):
        w = jnp.atleast_1d(at.pick(VIEWS)(at, w, at.below(w.ndim)))
        while w.size > LARGEST:
            d = int(np.argmax(w.shape))
            w = lax.slice_in_dim(w, 0, w.shape[d] // 2, axis=d)
    return rounded(at, w) if at.chance(0.12) else w


# Uses: `use(at, w)` returns an array of any shape.


def product(at, w, dtype=None):
    """Draws any `dot_general`; with `dtype`, of constant features of that dtype."""
    roles = at.rng.integers(3, size=w.ndim)  # 0: free, 1: contracted, 2: batch
    groups = [at.rng.permutation(np.flatnonzero(roles == n)).tolist() for n in (1, 2)]
    dims = [*groups[0], *groups[1], *[-1] * at.below(3)]  # -1: a free dimension of x
    at.rng.shuffle(dims)
    shape = tuple(w.shape[d] if d >= 0 else 2 for d in dims)
    x = features(at, shape, dtype) if dtype else mixed(at, at.x, shape)
    pairs = [([dims.index(d) for d in group], group) for group in groups]
    options = {"precision": at.choose([None, "highest"])}
    options["preferred_element_type"] = w.dtype if dtype else at.choose([None, x.dtype])
    if at.chance():
        return lax.dot_general(x, w, pairs, **options)
    return lax.dot_general(w, x, [pair[::-1] for pair in pairs], **options)


def einsum(at, w):
    labels = list(range(w.ndim))
    own = [n for n in labels if at.chance(0.6)] + [w.ndim] * at.below(2)
    out = [n for n in {*labels, *own} if at.chance(0.6)]
    at.rng.shuffle(own)
    at.rng.shuffle(out)
    x = mixed(at, at.x, tuple([*w.shape, 2][n] for n in own))
    operands = [w, labels, x, own] if at.chance() else [x, own, w, labels]
    return jnp.einsum(*operands, out)


def pair(at, w):
    """Multiplies two weights."""
    w, v = (z if z.ndim else z[None] for z in (w, viewed(at)))
    v = lax.slice(v, [0] * v.ndim, [min(3, n) for n in v.shape])
    n = v.shape[0]
    w = jnp.pad(w, [(0, max(0, n - w.shape[0]))] + [(0, 0)] * (w.ndim - 1))[:n]
    return jnp.tensordot(w, v, (0, 0))


def filled(w, rows, masked):
    """Looks up rows, some out of bounds, with a fill value or with a mask."""
    if not masked:
        return w.at[rows].get(mode="fill", fill_value=0.5)
    valid = lax.expand_dims(rows < w.shape[0], range(rows.ndim, rows.ndim + w.ndim - 1))
    return jnp.where(valid, jnp.sin(jnp.take(w, rows, axis=0)), 0.5)


def lookup(at, w):
    d, shape = at.below(w.ndim), at.choose([(2,), (2, 2), (1,)])
    first = jnp.moveaxis(w, d, 0)
    i, far = (indices(at, shape, n) for n in (w.shape[d], w.shape[d] + 3))
    variants = [
        lambda: jnp.take(w, i, axis=d),
        lambda: jnp.take(w, far - 1, axis=d, mode="clip"),
        lambda: jnp.take(w, far, axis=d, mode="wrap"),
        lambda: filled(first, far, masked=w.shape[d] % 2),
        lambda: first.at[jnp.sort(i.ravel())].get(indices_are_sorted=True),
        lambda: first[i, ..., i % first.shape[-1]] if w.ndim > 1 else w[i],
        lambda: first[at.rng.integers(w.shape[d], size=shape)],
    ]
    return at.choose(variants)()


def along_axis(at, w):
    d = at.below(w.ndim)
    shape = (*w.shape[:d], 2, *w.shape[d + 1 :])
    return jnp.take_along_axis(w, indices(at, shape, w.shape[d]), axis=d)


def windows(at, w):
    """Gathers a window of the weight at each index."""
    w = jnp.atleast_1d(w)
    indexed = [d for d in range(w.ndim) if at.chance()] or [0]
    collapsed = [d for d in indexed if at.chance()]
    at.rng.shuffle(indexed)
    sizes = [1 if d in collapsed else 1 + at.below(n) for d, n in enumerate(w.shape)]
    kept = w.ndim - len(collapsed)
    offsets = sorted(at.rng.choice(kept + 1, kept, replace=False).tolist())
    dims = lax.GatherDimensionNumbers(tuple(offsets), tuple(collapsed), tuple(indexed))
    return lax.gather(w, indices(at, (2, len(indexed)), 4), dims, sizes, mode="clip")


def convolution(at, w):
    w = w[(None,) * max(0, 3 - w.ndim)]
    w = w.reshape(*w.shape[:3], -1) if w.ndim > 4 else w
    specs = [tuple(at.rng.permutation(w.ndim).tolist()) for _ in range(3)]
    out, in_, *window = (w.shape[d] for d in specs[1])
    divisor = at.choose([n for n in range(1, out + 1) if out % n == 0])
    features, batches = (divisor, 1) if at.chance() else (1, divisor)
    strides, lhs, rhs = at.rng.integers(1, 3, size=(3, len(window))).tolist()
    low = at.rng.integers(-1, 3, size=len(window)).tolist()
    most = [(n - 1) * k for n, k in zip(window, rhs, strict=True)]
    if jax.__version_info__ < (0, 10):
        # With more low padding, the gradient by x is a convolution with negative low
        # and positive high padding, in which XLA read memory out of bounds.
        low = [*map(min, low, most)]
    sizes = [2 * batches, in_ * features, *[3] * len(window)]
    return lax.conv_general_dilated(
        mixed(at, at.x, tuple(sizes[specs[0].index(d)] for d in range(w.ndim))),
        w,
        strides,
        [(i, max(0, n - i)) for i, n in zip(low, most, strict=True)],
        lhs,
        rhs,
        lax.ConvDimensionNumbers(*specs),
        features,
        batches,
    )


def ragged(at, w):
    w = w[(None,) * max(0, 3 - w.ndim)]
    w = w.reshape(*w.shape[:2], -1)
    sizes = at.rng.multinomial(5, np.ones(len(w)) / len(w)).astype(np.int32)
    x = mixed(at, at.x, (5, w.shape[1]))
    return lax.ragged_dot(x, w, jnp.where(coin(at), sizes, sizes[::-1]))


def callback(at, w):
    jax.debug.callback(lambda _: None, w)
    return w[0]


def noise(at, w):
    """Uses random bits and a range, which depend on whether x64 is enabled."""
    bits = jax.random.bernoulli(jax.random.key(at.below(9)), 0.7, w.shape)
    return jnp.where(bits, w, 0.5) * (1 + jnp.arange(w.size).size / w.size) / 2


USES = {
    "product": product,
    "bfloat16": lambda at, w: product(at, w, jnp.bfloat16),
    "float16": lambda at, w: product(at, w, jnp.float16),
    "einsum": einsum,
    "pair": pair,
    "lookup": lookup,
    "along_axis": along_axis,
    "windows": windows,
    "convolution": convolution,
    "ragged": ragged,
    "callback": callback,
    "itself": lambda at, w: w,
    "noise": noise,
}


# Calls: `call(at, f)` calls `f(weights, x)`, a shorter program.


def flat(*arrays):
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(arrays)])


def remat(at, f):
    policies = jax.checkpoint_policies
    names = "nothing_saveable everything_saveable dots_saveable".split()
    options = [None, policies.save_only_these_names("kept")]
    options += [getattr(policies, name) for name in names]
    options += [policies.dots_with_no_batch_dims_saveable]
    policy, prevent = at.choose(options), at.chance()
    return jax.checkpoint(f, policy=policy, prevent_cse=prevent)(at.weights, at.x)


def swap(weights):
    """Permutes the weights of equal shapes."""
    shapes = {}
    for w in weights:
        shapes.setdefault(w.shape, []).append(w)
    return [shapes[w.shape].pop() for w in weights]


def carried(at):
    """Returns constant weights, carried ones, and a function that changes these."""
    ways = [
        lambda weights: weights,
        lambda weights: [0.9 * w for w in weights],
        lambda weights: [lax.rev(w, [0]) for w in weights],
        lambda weights: [w - jnp.full_like(w, 0.1) for w in weights],
        swap,
    ]
    n = at.below(len(at.weights) + 1)
    return at.weights[:n], at.weights[n:], at.choose(ways)


def scan(at, f):
    constants, weights, change = carried(at)

    def body(carry, _):
        weights, x = carry
        y = f([*weights, *constants], x)
        return (change(weights), y), y.sum()

    options = {"reverse": at.chance(), "unroll": 1 + at.chance(0.2)}
    out = lax.scan(body, (weights, at.x), length=1 + at.below(3), **options)
    return flat(*out) if at.chance() else out[0][1]


def scan_over(at, f):
    w = at.choose(at.weights)
    w = jnp.moveaxis(w, at.below(w.ndim), 0) if w.ndim > 1 else w[None]
    returned = at.chance()

    def body(x, slices):
        _, w = slices
        x = f([*at.weights, w], x)
        return x, w if returned else x

    options = {"reverse": at.chance(), "unroll": 1 + at.chance(0.2)}
    return flat(*lax.scan(body, at.x, (np.arange(len(w)), w), **options))


def while_loop(at, f):
    constants, weights, change = carried(at)
    turns = jnp.where(coin(at), 1, 3)

    def go(state):
        i, weights, _ = state
        return (i < turns) & (jnp.sum([*constants, *weights][0]) < 1e6)

    def body(state):
        i, weights, x = state
        return i + 1, change(weights), f([*weights, *constants], x)

    return flat(*lax.while_loop(go, body, (0, weights, at.x))[1:])


def cond(at, f):
    turned = lambda weights, x: f(weights[::-1], x) / 2
    return lax.cond(coin(at), f, turned, at.weights, at.x)


def switch(at, f):
    branches = [f, lambda weights, x: x, lambda weights, x: f(weights, -x)]
    return lax.switch(indices(at, (), 3), branches, at.weights, at.x)


def again(at, f):
    """Calls one jitted function several times, with varying perturbed operands."""
    g, still, given = jax.jit(f), lax.stop_gradient, features(at, at.x.shape)
    first = {w.shape: w for w in at.weights[::-1]}
    calls = {
        "hidden": lambda x: g(at.weights, x),
        "given": lambda x: g(at.weights, given),
        "constant": lambda x: g(at.weights, np.ones(x.shape, x.dtype)),
        "stopped": lambda x: g(at.weights, still(x)),
        "frozen": lambda x: g(still(at.weights), x),
        "twice": lambda x: g([first[w.shape] for w in at.weights], x),
        "swapped": lambda x: g(swap(at.weights), x),
    }
    ys = [at.x]
    for _ in range(2 + at.chance(0.3)):
        ys.append(jnp.sin(at.pick(calls)(ys[-1])))
    return flat(ys)


# Custom rules halve the derivative, so that no other rule can replace them, and take an
# integer operand.


def with_jvp(at, f):
    g = jax.custom_jvp(lambda weights, n, x: f(weights, x) * n.astype(x.dtype))

    @g.defjvp
    def _(primals, tangents):
        y, dot = jax.jvp(f, primals[::2], tangents[::2])
        return y, dot / 2

    return lambda weights, x: g(weights, jnp.arange(3)[1], x)


def with_vjp(at, f):
    g = jax.custom_vjp(lambda weights, n, x: f(weights, x) * n.astype(x.dtype))
    if at.chance():  # the backward rule recomputes everything, or uses residuals
        forward = lambda weights, n, x: (g(weights, n, x), (weights, x))
        pull = lambda saved, ct: jax.vjp(f, *saved)[1](ct / 2)
    else:
        forward = lambda weights, n, x: jax.vjp(f, weights, x)
        pull = lambda pullback, ct: pullback(ct / 2)

    def backward(saved, ct):
        weights, x = pull(saved, ct)
        return weights, None, x

    g.defvjp(forward, backward)
    return lambda weights, x: g(weights, jnp.arange(3)[1], x)


# Custom rules that read the weights in one direction only.


def only_forward(at, f):
    """Returns a function whose backward rule uses only the weights' shapes."""
    types = jax.tree.map(jax.typeof, at.weights)
    g = jax.custom_vjp(f)

    def backward(_, ct):
        return [jnp.full(t.shape, ct.mean(), t.dtype) for t in types], ct / 2

    g.defvjp(lambda weights, x: (f(weights, x), None), backward)
    return g


def only_backward(at, f):
    """Returns a function that uses the weights in its backward rule only."""
    g = jax.custom_vjp(lambda weights, x: jnp.sin(x))
    g.defvjp(
        lambda weights, x: (jnp.sin(x), (weights, x)),
        lambda saved, ct: jax.vjp(f, *saved)[1](ct / 2),
    )
    return g


# Custom rules that close over an argument of the program: features, or labels.


def closing(at, f):
    """Returns a function that closes over an argument, and its operands."""
    if at.chance():
        return lambda weights: f(weights, at.given), at.weights
    return lambda y: jnp.sin(y - at.given), f(at.weights, at.x)


def closing_jvp(at, f):
    f, z = closing(at, f)
    g = jax.custom_jvp(f)
    g.defjvp(lambda zs, dots: (f(*zs), jax.jvp(f, zs, dots)[1] / 2))
    return g(z)


def closing_vjp(at, f):
    f, z = closing(at, f)
    g = jax.custom_vjp(f)
    g.defvjp(lambda z: (f(z), z), lambda z, ct: jax.vjp(f, z)[1](ct / 2))
    return g(z)


def vmap_over(at, f):
    w = at.choose(at.weights)
    w, d = (w, at.below(w.ndim)) if w.ndim > 1 else (w[None], 0)
    each = lambda w: f([w, *at.weights], at.x)
    return jax.vmap(each, d, at.below(at.x.ndim + 1))(w)


def grad_weights(at, f):
    return flat(jax.grad(lambda weights: f(weights, at.x).sum())(at.weights))


def shard_map(at, f):
    """Splits the activations, and perhaps one weight, over two devices."""
    specs = [P()] * len(at.weights)
    i = at.below(len(specs))
    even = [d for d, n in enumerate(at.weights[i].shape) if n % 2 == 0]
    if even and at.chance():
        specs[i] = P(*[None] * at.choose(even), "data")
    closed = at.chance(0.3)

    def g(weights, x):
        n = 1 + lax.axis_index("data").astype(x.dtype)
        return f(at.weights if closed else weights, n * x / 2)

    spec = P("data") if at.x.shape[0] % 2 == 0 else P()
    g = jax.shard_map(g, mesh=mesh(), in_specs=(specs, spec), out_specs=P("data"))
    return g(at.weights, at.x)


RULES = [with_vjp, only_forward, only_backward]
CALLS = {
    "remat": remat,
    "scan": scan,
    "scan_over": scan_over,
    "while_loop": while_loop,
    "cond": cond,
    "switch": switch,
    "custom_jvp": lambda at, f: with_jvp(at, f)(at.weights, at.x),
    "custom_vjp": lambda at, f: with_vjp(at, f)(at.weights, at.x),
    "only_forward": lambda at, f: only_forward(at, f)(at.weights, at.x),
    "only_backward": lambda at, f: only_backward(at, f)(at.weights, at.x),
    "closing_jvp": closing_jvp,
    "closing_vjp": closing_vjp,
    "again": again,
    "again_jvp": lambda at, f: again(at, with_jvp(at, f)),
    "again_vjp": lambda at, f: again(at, at.choose(RULES)(at, f)),
    "vmap_over": vmap_over,
    "grad_weights": grad_weights,
    "shard_map": shard_map,
    "jit": lambda at, f: jax.jit(f, inline=at.chance(0.3))(at.weights, at.x),
    "closure": lambda at, f: jax.jit(lambda x: f(at.weights, x))(at.x),
    "fori_loop": lambda at, f: lax.fori_loop(0, 2, lambda _, x: f(at.weights, x), at.x),
    "vmap": lambda at, f: jax.vmap(functools.partial(f, at.weights))(at.x),
    "grad": lambda at, f: jax.grad(lambda x: f(at.weights, x).sum())(at.x),
    "jvp": lambda at, f: jax.jvp(f, (at.weights, at.x), (at.weights, at.x))[1],
}
# JAX does not support inside these calls: the other mode of a custom rule, derivatives
# in the other mode, and rules that close over values of a finished trace.
FORWARD = {"custom_vjp", "again_vjp", "only_forward", "only_backward", "closing_vjp"}
REVERSE = {"while_loop", "ragged"}
CLOSING = {"closing_jvp", "closing_vjp"}
WITHOUT = {
    "jvp": FORWARD,
    "custom_jvp": FORWARD,
    "closing_jvp": FORWARD,
    "again_jvp": FORWARD,
    "grad": REVERSE,
    "grad_weights": REVERSE,
    "custom_vjp": REVERSE,
    "only_backward": REVERSE,
    "closing_vjp": REVERSE,
    "again_vjp": REVERSE,
    "vmap": {"ragged"},
    "vmap_over": {"ragged"},
    # Devices that take different branches wait for each other's gradients forever.
    "shard_map": {"shard_map", "constraint", "cond", "switch", "while_loop"},
}


def steps(seed, depth, without, first, given, weights, x):
    """Runs the program of a seed; `first` is the name of its first call."""
    rng = np.random.default_rng(seed)
    for _ in range(rng.choice([1, 1, 1, 2])):
        at = At(rng, without, weights, x, given)
        if first or (depth and at.chance(0.6)):
            name = first or at.choose([n for n in CALLS if n not in without])
            inner = without | CLOSING | WITHOUT.get(name, set())
            shorter = at.below(2**31), depth - 1, inner, None, None
            y = CALLS[name](at, functools.partial(steps, *shorter))
        else:
            y = at.pick(USES)(at, viewed(at))
        # Keeps all values and their derivatives near one.
        x, first = jnp.sin(x / 2 + mixed(at, y, x.shape)), None
    return x


class Program(NamedTuple):
    """A function of parameters and activations, and the derivatives to take."""

    fn: Any
    params: dict[str, jax.Array]
    inputs: list[jax.Array]
    how: str = "grad"
    perturbed: Any = (("adapters", "x"),)


def program(seed, dora=False, excluded=frozenset()):
    """Returns the program of a seed, and the derivatives to take.

    Args:
      seed: The seed of the program.
      dora: Whether its weights have magnitudes.
      excluded: Calls that the program must not make.
    """
    rng = np.random.default_rng([seed, 1])
    base, ranks, axes, shape, like = {}, {}, {}, (), None
    for name in ("w", "v", "u")[: rng.integers(1, 4)]:
        if not shape or rng.random() < 0.6:  # otherwise the shape of the last weight
            ndim = int(rng.choice([2, 2, 3, 3, 4]))
            least = 1 if rng.random() < 0.2 else 2
            shape = tuple(rng.integers(least, 5 if ndim < 4 else 4, ndim).tolist())
            like = None
        base[name] = jax.ShapeDtypeStruct(shape, np.float32)
        if like in ranks and rng.random() < 0.6:  # equal axes and rank too
            axes[name], ranks[name] = axes[like], ranks[like]
            continue
        roles = rng.permutation([1, 2, *rng.integers(3, size=len(shape) - 2)])
        roles = np.sort(roles) if rng.random() < 0.5 else roles  # the standard order
        axes[name] = lj.Axes(*(np.flatnonzero(roles == r).tolist() for r in range(3)))
        if name == "w" or rng.random() < 0.8:
            full = min(math.prod(shape[d] for d in dims) for dims in axes[name][1:])
            ranks[name] = int(rng.integers(1, min(3, full) + 1))
        like = name
    # `lorafy` on shapes, with values from NumPy, takes a tenth of the time.
    params = {
        name: jnp.asarray(rng.standard_normal(leaf.shape) / 2, np.float32)
        for name, leaf in lj.lorafy(base, ranks, axes=axes, dora=dora).items()
    }
    drawn = np.random.default_rng([seed, 4])
    for name in ranks:
        if drawn.random() < 0.4:  # a scale for each rank
            sizes = *params[f"{name}_lora_scale"].shape, ranks[name]
            scales = jnp.asarray(drawn.standard_normal(sizes) / 2, np.float32)
            params[f"{name}_lora_scale"] = scales
    for name in base:
        if np.random.default_rng([seed, 3]).random() < 0.1:  # NumPy's default dtype
            params[name] = np.asarray(params[name], np.float64)
    # Odd seeds make no calls; even seeds begin with each call in turn.
    calls = [name for name in CALLS if name not in excluded]
    first = None if seed % 2 else calls[seed // 2 % len(calls)]
    forward = first == "while_loop" or (seed % 5 == 0 and first not in FORWARD)
    twice = rng.random() < 0.25 and first not in CLOSING
    depth = int(rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1])) if first else 0
    without = (FORWARD if forward else {"while_loop"}) | excluded
    # A rule that closes over an argument cannot be differentiated outside of its `jit`.
    without = frozenset(without | CLOSING if twice else without)

    def fn(params, x, given):
        weights = [params[name] for name in base]
        return steps(seed, depth, without, first, given, weights, x)

    inputs = [*jnp.asarray(rng.standard_normal((2, BATCH, D)), np.float32)]
    how = ("linearize" if twice else "jvp") if forward else "vjp" if twice else "grad"
    perturbed = [PERTURBED[i] for i in rng.permutation(len(PERTURBED))]
    return Program(fn, params, inputs, how, perturbed)


# The perturbed arguments of a derivative, which custom rules can observe.
PERTURBED = [
    ("adapters",),
    ("x",),
    ("adapters", "x"),
    ("adapters", "weights", "x"),
    ("weights",),
]


# Derivatives of `f(arguments)`, a dict, in the arguments of some names, and its values.
# `vjp` and `linearize` take two derivatives of one jitted function, and make both
# before they use either.


def along(f, arguments, names):
    some = {name: arguments[name] for name in names}
    return lambda some: f(arguments | some), some


def grad(f, arguments, perturbed):
    f, some = along(f, arguments, perturbed[0])
    loss = lambda some: (jnp.cos(y := f(some)).sum(), y)
    return [jax.grad(loss, has_aux=True)(some)]


def vjp(f, arguments, perturbed):
    f = jax.jit(f)
    made = [jax.vjp(*along(f, arguments, names)) for names in perturbed[:2]]
    return [(*pullback(-jnp.sin(y)), y) for y, pullback in made]


def jvp(f, arguments, perturbed):
    f, some = along(f, arguments, perturbed[0])
    return [jax.jvp(f, [some], [jax.tree.map(jnp.ones_like, some)])]


def linearize(f, arguments, perturbed):
    f = jax.jit(f)
    sides = [along(f, arguments, names) for names in perturbed[:2]]
    made = [jax.linearize(*side) for side in sides]
    ones = [jax.tree.map(jnp.ones_like, some) for _, some in sides]
    return [(y, dot(dots)) for (y, dot), dots in zip(made, ones, strict=True)]


DERIVATIVES = {"grad": grad, "vjp": vjp, "jvp": jvp, "linearize": linearize}


def quantized_program(seed):
    """Returns the program of a seed on quantized weights of drawn formats and blocks.

    Programs of odd seeds have DoRA's magnitudes too.
    """
    plain, rng = program(seed, seed % 2 == 1), np.random.default_rng([seed, 2])
    params = dict(plain.params)
    for name in ("w", "v", "u"):
        if name in params:
            w, how = params[name], str(rng.choice([*FORMATS]))
            divisors = [[m for m in range(1, n + 1) if n % m == 0] for n in w.shape]
            q = quantize_array(w, how, [int(rng.choice(some)) for some in divisors])
            params[name] = dataclasses.replace(q, scale=q.scale.astype(np.float32))
    return plain._replace(params=params)


def adapted(fn, unused="ignore"):
    return lj.lora(fn, unused=unused, materialize="allow")


def worst_gap(fn, params, inputs, how="grad", perturbed=(("adapters", "x"),)):
    """Returns the largest difference of `lora(fn)` and the merged `fn`, relatively.

    Compares values and derivatives.
    """
    adapters, base = lj.split(params)
    x, *given = inputs
    # The codes of quantized weights are integers, so only the scales are perturbed.
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    floats = jax.tree.map(lambda x: x if floating(x) else None, base)
    arguments = {"adapters": adapters, "weights": floats, "x": x}

    def derivatives(f):
        def combined(p):
            other = lambda x, y: y if x is None else x
            is_leaf = lambda x: x is None
            weights = jax.tree.map(other, p["weights"], base, is_leaf=is_leaf)
            return f(lj.combine(p["adapters"], weights), p["x"], *given)

        return DERIVATIVES[how](combined, arguments, perturbed)

    def both(unused):
        merged = lambda params, *inputs: fn(lj.merge(params), *inputs)
        run = lambda: (derivatives(adapted(fn, unused)), derivatives(merged))
        return jax.jit(run)()

    idle = []
    try:
        got, want = both("error")
    except ValueError as error:
        if "never uses" not in str(error):
            raise
        idle = re.findall(r"'(\w+)'", str(error).split("What is trained")[0])
        got, want = both("ignore")
    for grads, _ in want if how in ("grad", "vjp") else ():
        for name, grad in grads.get("adapters", {}).items():
            assert not (name.split("_")[0] in idle and np.any(grad)), f"{name} learns"

    def gap(got, want):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert np.isfinite(want).all() and np.isfinite(got).all()
        return np.abs(got - want).max() / max(1, np.abs(want).max())

    return max(jax.tree.leaves(jax.tree.map(gap, got, want)))


@contextlib.contextmanager
def materialize_if_cheaper(yes):
    """Removes the size limits below which W + scale * A B is never materialized."""
    with pytest.MonkeyPatch.context() as patch:
        if yes:
            patch.setattr(ops, "WORTHWHILE", 0)
            patch.setattr(views, "LARGE", 0)
        yield


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_lora_on_a_random_program(seed):
    with materialize_if_cheaper(seed % 3 == 2):
        assert worst_gap(*program(seed)) < 1e-4
    if seed % 50 == 49:  # thousands of compiled programs would fill the memory
        jax.clear_caches()


# JAX refuses two programs on the merged weights too. In one, the gradient of a custom
# rule's operand varies over the devices of a `shard_map`. In the other, from 0.12 on,
# an output of a rule under `vmap` is not batched.
DORA_SEEDS = [seed for seed in range(-(-PROGRAMS // 4)) if seed not in (74, 382)]


@pytest.mark.parametrize("seed", DORA_SEEDS)
def test_lora_on_a_random_program_with_dora(seed):
    assert worst_gap(*program(2 * 10**6 + seed, dora=True)) < 1e-4
    if seed % 50 == 49:
        jax.clear_caches()


# Up to JAX 0.9, XLA for CPU rounds to float8 through float16 in some programs under
# `jit`: 0.14843 is then a tie, and the merged function differs from the eager one too.
OLD = jax.__version_info__ < (0, 10)
QUANTIZED_SEEDS = [s for s in range(-(-PROGRAMS // 2)) if not (OLD and s == 376)]


@pytest.mark.parametrize("seed", QUANTIZED_SEEDS)
def test_lora_on_a_random_program_with_quantized_weights(seed):
    assert worst_gap(*quantized_program(10**6 + seed)) < 1e-4
    if seed % 50 == 49:
        jax.clear_caches()


# The first linearizes a rule on several devices, with one operand that is not
# perturbed. The second subtracts two weights that are cheaper as arrays.
@pytest.mark.parametrize(("seed", "materialized"), [(370, False), (1463, True)])
def test_lora_on_a_program_that_once_failed(seed, materialized):
    with materialize_if_cheaper(materialized):
        assert worst_gap(*program(seed)) < 1e-4


# In half precision two functions agree only to two or three digits. So `lora(fn)` has
# to be about as close to float64 as the merged function: to all digits of float32 if
# the function rounds only its inputs.


@pytest.mark.parametrize("seed", range(1 + PROGRAMS // 20))
def test_lora_on_random_halves(seed):
    draw = At(np.random.default_rng([seed, 2]), frozenset(), [], None, None)
    half, stored = draw.choose([jnp.bfloat16, jnp.float16]), jnp.float32
    stored = half if draw.chance(0.3) else stored
    params = program(2 * seed + 1).params
    params = {
        name: leaf if "_lora_" in name else leaf.astype(stored)
        for name, leaf in params.items()
        if name.startswith("w")
    }
    order = draw.rng.permutation(params["w"].ndim)
    n = params["w"].shape[order[0]]
    rows, x = draw.rng.integers(n, size=BATCH), draw.rng.integers(-8, 9, (BATCH, n)) / 4
    variant, use, swap = draw.below(4), draw.chance(0.8), draw.chance()

    def fn(params, x, half, full):
        w = jnp.transpose(params["w"], order)
        q = lambda w: w.astype(half).astype(w.dtype)
        variants = [
            lambda: w,
            lambda: w.astype(half),
            lambda: w + lax.stop_gradient(q(w) - w),
            lambda: w - q(w),
        ]
        w = variants[variant]()
        if not use:
            return w[rows].astype(full)
        pair, dims = (x.astype(half), w), ([1], [0])
        if swap:
            pair, dims = pair[::-1], dims[::-1]
        return lax.dot_general(*pair, (dims, ([], [])), preferred_element_type=full)

    def derivatives(f, params, x, half, full):
        loss = lambda *xs: (jnp.cos(y := f(*xs, half, full)).sum(), y)
        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)

    merged = lambda params, *xs: fn(lj.merge(params), *xs)
    x = jnp.asarray(x, jnp.float32)
    got = derivatives(adapted(fn), params, x, half, jnp.float32)
    near = derivatives(merged, params, x, half, jnp.float32)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64), (params, x))
        want = derivatives(merged, *wide, np.float64, np.float64)

    exact = variant == 0 and stored == jnp.float32
    slack = 1e-5 if exact else float(jnp.finfo(half).eps)

    def check(got, near, want):
        got_far, near_far = (
            np.abs(np.asarray(y, float) - want).max() for y in (got, near)
        )
        assert got.dtype == near.dtype
        assert got_far <= 4 * near_far + slack * max(1, np.abs(want).max())

    jax.tree.map(check, got, near, jax.tree.map(np.asarray, want))


# Sums of values with few binary digits are exact in float32, in any order. So both
# functions round the same values, and even differences of roundings must be equal.


def of_few_digits(rng, *shape):
    return jnp.asarray(rng.integers(-8, 9, shape) / 8, jnp.float32)


def meeting(at, q, w):
    """Returns an expression of a rounded weight and the weight itself."""

    def ruled(w):
        rule = jax.custom_vjp(q)
        rule.defvjp(
            lambda w: (q(w), (q(w), w)),
            lambda saved, ct: (ct * (1 + jnp.sign(saved[0] - saved[1])),),
        )
        return jax.grad(lambda w: rule(w).sum())(w)

    constant = of_few_digits(at.rng, *w.shape)
    rows = at.rng.integers(w.shape[0], size=BATCH)
    variants = {
        "difference": lambda: w - q(w),
        "where": lambda: jnp.where(q(w) == w, w, 0.0),
        "greater": lambda: jnp.where(q(w) > w, w, 0.5),
        "quotient": lambda: q(w) / jnp.where(w == 0, 1.0, w),
        "stack": lambda: jnp.einsum(
            "kij,k->ij", jnp.stack([q(w), w]), jnp.asarray([1.0, -1.0])
        ),
        "lookup": lambda: q(w)[rows] - w[rows],
        "scaled": lambda: q(w / jnp.abs(w).max()) * jnp.abs(w).max(),
        "rounded_sum": lambda: q(-w + constant),
        "rounded_difference": lambda: q(constant - w),
        "rule": lambda: ruled(w),
        "of_a_view": lambda: jnp.flip(q(w.T), 0) - jnp.flip(w.T, 0),
    }
    return at.pick(variants)()


@pytest.mark.parametrize("seed", range(1 + PROGRAMS // 8))
def test_lora_on_a_random_expression_of_a_weight_and_its_rounding(seed):
    rng = np.random.default_rng([seed, 4])
    at = At(rng, frozenset(), [], None, None)
    half = at.choose([jnp.bfloat16, jnp.float16])
    n = 64 if half == jnp.float16 else 8  # more digits than the half type has
    params = lj.lorafy({"w": of_few_digits(rng, 4, 4)}, 2, targets="*")
    params |= {"w_lora_a": of_few_digits(rng, 4, 2) + 1 / n}
    params |= {"w_lora_b": of_few_digits(rng, 2, 4) + 1 / (4 * n)}
    q = lambda w: w.astype(half).astype(w.dtype)
    q = at.choose([q, jax.jit(q), jax.checkpoint(q)])
    way, x, seed = at.below(4), of_few_digits(rng, 3, 4), at.below(2**31)

    def fn(params, x):
        here = at._replace(rng=np.random.default_rng(seed))
        f = lambda w: meeting(here, q, w)
        ways = [
            f,
            jax.jit(f),
            lambda w: lax.scan(lambda c, _: (c, f(w)), 0, None, 2)[1][1],
            lambda w: lax.cond(x[0, 0] > 2, lambda w: f(w) * 0, f, w),
        ]
        return ways[way](params["w"])

    got = jax.jit(adapted(fn))(params, x)
    want = jax.jit(fn)(lj.merge(params), x)
    np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-6)


# One adapter for each device, next to one weight for all.

# If one device does not reach a collective, the others wait for it forever.
ON_DEVICES = frozenset(WITHOUT["shard_map"])


@pytest.mark.parametrize("seed", range(1 + PROGRAMS // 10))
def test_lora_on_a_random_program_with_an_adapter_on_each_device(seed):
    fn, params, (x, given), *_ = program(3 * 10**6 + 2 * seed + 1, excluded=ON_DEVICES)
    adapters, base = lj.split(params)
    rng = np.random.default_rng([seed, 5])
    draw = lambda x: jnp.asarray(rng.standard_normal((2, *x.shape)) / 2, x.dtype)
    many = jax.tree.map(draw, adapters)

    def slopes(f, adapters, x):
        loss = lambda adapters: jnp.cos(f(lj.combine(adapters, base), x, given)).sum()
        return jax.value_and_grad(loss)(adapters)

    def device(many, xs):
        own = jax.tree.map(lambda y: y[0], (many, xs))
        return jax.tree.map(lambda y: y[None], slopes(adapted(fn), *own))

    xs = jnp.stack([x, -x])
    mapped = jax.shard_map(device, mesh=mesh(), in_specs=P("data"), out_specs=P("data"))
    got = jax.jit(mapped)(many, xs)
    merged = lambda params, *xs: fn(lj.merge(params), *xs)
    for i in range(2):
        own, here = (jax.tree.map(operator.itemgetter(i), tree) for tree in (many, got))
        want = jax.jit(functools.partial(slopes, merged))(own, xs[i])
        for y, z in zip(jax.tree.leaves(here), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(y, z, atol=1e-4 * max(1, np.abs(z).max()))


# Programs that once failed, in a few lines: a change of the generator changes the
# programs of all seeds.


def custom_rule(w, x):
    f = lambda w, x: jnp.sin(x @ w) @ np.ones((D, D), np.float32)  # a constant
    g = jax.custom_vjp(f)
    g.defvjp(lambda *xs: jax.vjp(f, *xs), lambda pullback, ct: pullback(ct / 2))
    return g(w, x)


def custom_rule_with_a_constant(p, x):
    return custom_rule(p["w"], x)


def custom_rule_jitted_and_mapped(p, x):
    return jax.vmap(jax.jit(custom_rule), (None, 0))(p["w"], x)


def custom_rule_on_devices(p, x):
    specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
    return jax.shard_map(custom_rule, mesh=mesh(), **specs)(p["w"], x)


def custom_rule_with_a_loop(p, x):
    f = lambda w, x: lax.fori_loop(0, 2, lambda _, x: jnp.sin(x @ w), x)
    g = jax.custom_jvp(f)
    g.defjvp(lambda xs, dots: jax.jvp(f, xs, dots))
    return g(p["w"], x)


def loops_of_different_lengths(p, x):
    go, body = lambda x: (x * x).sum() < 5, lambda x: 2 * x + x @ p["w"]
    return jax.vmap(lambda x: lax.while_loop(go, body, x))(x)


def filled_where_a_weight_repeats(p, x):
    stack = jnp.broadcast_to(p["w"], (2, D, D))
    return x @ stack.at[jnp.array([0, 5])].get(mode="fill", fill_value=0.5)


def masked_out_of_bounds(p, x):
    rows = jnp.array([1, D + 2])
    found = jnp.sin(jnp.take(p["w"], rows, axis=0, mode="fill"))
    return jnp.where((rows < D)[:, None], found, 0.0) + x.sum()


def device_put_next_to_a_constraint(p, x):
    moved = jax.device_put(p["w"])
    sharding = NamedSharding(mesh(), P("data"))
    return lax.with_sharding_constraint(x, sharding) @ moved


def mapped_over_devices(p, x):
    f = lambda w, x: lax.psum(jnp.cumsum(jnp.sin(x @ w), 0), "data")
    return jax.shard_map(f, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P())(
        p["w"], x
    )


REGRESSIONS = [
    custom_rule_with_a_constant,
    custom_rule_jitted_and_mapped,
    custom_rule_on_devices,
    custom_rule_with_a_loop,
    loops_of_different_lengths,
    filled_where_a_weight_repeats,
    masked_out_of_bounds,
    mapped_over_devices,
]


@pytest.mark.parametrize("fn", REGRESSIONS, ids=lambda fn: fn.__name__)
def test_lora_regression(fn):
    rng = np.random.default_rng(0)
    w, a, b, x = jnp.asarray(rng.standard_normal((4, D + 1, D)), np.float32)
    params = lj.lorafy({"w": w[:D]}, D, targets="*")
    params |= {"w_lora_a": a[:D], "w_lora_b": b[:D] / 2}
    assert (
        worst_gap(
            fn, params, [x], "jvp" if fn is loops_of_different_lengths else "grad"
        )
        < 1e-4
    )


def test_lora_device_put_of_a_quantized_weight_next_to_a_constraint():
    """Only the scales are perturbed; JAX commits closed-over codes to a device."""
    rng = np.random.default_rng(0)
    w, x = jnp.asarray(rng.standard_normal((2, D, D)), np.float32)
    params = lj.lorafy({"w": quantize_array(w, "nf4", (1, D))}, 1, targets="*")
    fn, perturbed = device_put_next_to_a_constraint, [("weights", "x")]
    assert worst_gap(fn, params, [x], perturbed=perturbed) < 1e-4


def test_lora_keeps_the_order_and_number_of_effects():
    seen = []

    def fn(p, x):
        log = lambda n, w: jax.debug.callback(
            lambda n, w: seen.append((int(n), float(w))), n, w[0, 0], ordered=True
        )
        log(0, p["w"])
        jax.jit(lambda w: log(1, w))(p["w"])
        lax.cond(x[0, 0] > 0, lambda w: log(2, w), lambda w: log(3, -w), p["w"])
        body = lambda i, w: (log(i, w), w)[1]
        lax.fori_loop(4, 7, body, p["w"])
        return x @ p["w"]

    params = lj.lorafy({"w": jnp.eye(D)}, 1, targets="*")
    params["w_lora_b"] += 1.0
    x = jnp.ones((BATCH, D))
    lj.lora(fn, materialize="allow")(params, x)
    jax.effects_barrier()
    got = seen.copy()
    seen.clear()
    fn(lj.merge(params), x)
    jax.effects_barrier()
    assert [n for n, _ in got] == [0, 1, 2, 4, 5, 6]
    np.testing.assert_allclose(got, seen, rtol=1e-6)


# Other tests cover these, on explicit meshes or on some versions of JAX only.
ELSEWHERE = {"reshard", "pvary", "unstack"}
ELSEWHERE |= {"stack", "closed_call", "eval_jaxpr"}


@pytest.mark.slow
def test_programs_cover_every_construct_and_rule(monkeypatch):
    drawn, met = set(), set()

    class Recorded(dict):
        def get(self, name):
            met.add(name)
            return super().get(name)

    def recorded(at, table):
        name = at.choose([n for n in table if n not in at.without])
        drawn.add(name)
        return table[name]

    monkeypatch.setattr(At, "pick", recorded)
    monkeypatch.setattr(evaluate, "RULES", Recorded(evaluate.RULES))
    # Programs without calls trace fast, and cover most rules.
    for seed in [*range(0, 2 * len(CALLS), 2), *range(1, 240, 2)]:
        fn, params, inputs, *_ = program(seed)
        jax.eval_shape(adapted(fn), params, *inputs)
    assert not {*VIEWS, *USES, *ROUNDINGS} - drawn
    assert not {*evaluate.RULES} - ELSEWHERE - met
