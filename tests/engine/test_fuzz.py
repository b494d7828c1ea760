"""Random programs on random weights: `lora(fn)` equals `fn` on the merged parameters.

A program is a function of its seed: at every trace it draws the same steps. A step
takes a weight through a few views to a use, or calls a shorter program in a loop, a
branch or a transformation. What is differentiated, and how, is drawn too.
`LORA_JAX_FUZZ=2000 pytest tests/engine/test_fuzz.py` runs that many, and a failure
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
LARGEST = 120  # a view of a weight that has grown beyond so many numbers is cut


class At(NamedTuple):
    """Where a program is: what it draws from, the weights, and the activations."""

    rng: np.random.Generator
    without: frozenset[str]  # constructs that JAX itself does not have here
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


# What programs are made of: arrays that depend on the activations.


def mixed(at, x, shape):
    """An array of any shape; each of its numbers mixes those of `x` in its own way."""
    mixing = at.rng.standard_normal((x.size, math.prod(shape))) / np.sqrt(x.size)
    return jnp.reshape(x.ravel() @ mixing.astype(x.dtype), shape)


def number(at):
    return 1 + jnp.sin(at.x.ravel()[0]) / 2


def coin(at):
    return at.x.ravel()[-1] > 0


def features(at, shape, dtype=np.float32):
    """Given ones, which no derivative reaches: exact in the shortest of dtypes."""
    either = at.rng.integers(-8, 9, size=(2, *shape)).astype(np.float32) / 4
    return jnp.where(coin(at), *either).astype(dtype)


def indices(at, shape, size):
    return jnp.where(coin(at), *at.rng.integers(size, size=(2, *shape)))


def other(at, w, shape):
    """Something to stand beside a weight: another one, or a plain array."""
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


# Views: `view(at, w, d)` is another array, `d` one of the dimensions.


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
    return lax.pad(w, lax.stop_gradient(number(at)), config)


def split(at, w, d):
    parts = jnp.split(w, [at.below(w.shape[d] - 1) + 1] if w.shape[d] > 1 else 1, d)
    return jnp.concatenate(parts[::-1], d) if at.chance(0.3) else parts[0]


def concatenate(at, w, d):
    n = at.choose([1, 2, w.shape[d]])
    arrays = [w, other(at, w, (*w.shape[:d], n, *w.shape[d + 1 :])), w]
    return lax.concatenate(arrays[at.below(2) :][: 2 + at.below(2)], d)


def scale(at, w, d):
    forms = [w * 0.7, number(at) * w, w / number(at), -w, 0.1 / (2 + w * w)]
    return at.choose(forms)


def shift(at, w, d):
    v = other(at, w, w.shape)
    v = jnp.broadcast_to(number(at), w.shape) if at.chance(0.3) else v
    return at.choose([lambda: w + v, lambda: w - v, lambda: v - w])()


def whole(at, w, d):
    """What no factors can follow."""
    forms = {
        "tanh": jnp.tanh,
        "square": lambda w: w * w,
        "times": lambda w: w * other(at, w, w.shape),
        "sort": lambda w: jnp.sort(w, d),
        "where": lambda w: jnp.where(w > 0.1, w, 0.5),
        "cumsum": lambda w: jnp.cumsum(w, d),
        "scatter": lambda w: w.at[0].add(1.0),
        "gram": lambda w: jnp.tensordot(w, w, (d, d)) / w.size,
    }
    return at.pick(forms)(w)


def called(at, w, d):
    """A view inside a call, which hands it out again."""
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
    """A custom rule that hands a weight out, with a derivative that is not its own."""
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
    "whole": whole,
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


# Roundings: `q(w)` is the nearest of few numbers. They are coarse, and come last: in
# front of a jump a sum that differs in its last bit may fall on either side, and the
# odds of that are those of two bits among the ones that are cut off. bfloat16 keeps too
# many of them: see `test_random_halves`.


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
    # JAX rounds derivatives as well, and these are never the same to the last digit.
    q = lambda w: lax.stop_gradient(cast(w))
    forms = {
        "rounded": q,
        "rounded_through": lambda w: w + q(w) - lax.stop_gradient(w),
        "rounding_error": lambda w: w - q(w),
    }
    return at.pick(forms)(w)


def viewed(at):
    w = at.choose(at.weights)
    for _ in range(at.choose([0, 1, 1, 2, 3])):
        w = jnp.atleast_1d(at.pick(VIEWS)(at, w, at.below(w.ndim)))
        while w.size > LARGEST:
            d = int(np.argmax(w.shape))
            w = lax.slice_in_dim(w, 0, w.shape[d] // 2, axis=d)
    return rounded(at, w) if at.chance(0.12) else w


# Uses: `use(at, w)` is an array of any shape.


def product(at, w, dtype=None):
    """Any `dot_general`, perhaps with given features of a shorter dtype."""
    roles = at.rng.integers(3, size=w.ndim)  # 0: free, 1: summed, 2: batch
    groups = [at.rng.permutation(np.flatnonzero(roles == n)).tolist() for n in (1, 2)]
    dims = [*groups[0], *groups[1], *[-1] * at.below(3)]  # -1: a free one of x
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
    """A product of two weights."""
    w, v = (z if z.ndim else z[None] for z in (w, viewed(at)))
    v = lax.slice(v, [0] * v.ndim, [min(3, n) for n in v.shape])
    n = v.shape[0]
    w = jnp.pad(w, [(0, max(0, n - w.shape[0]))] + [(0, 0)] * (w.ndim - 1))[:n]
    return jnp.tensordot(w, v, (0, 0))


def filled(w, rows, masked):
    """Rows, some out of bounds: there is a number, or none, and it is masked."""
    if not masked:
        return w.at[rows].get(mode="fill", fill_value=0.5)
    there = lax.expand_dims(rows < w.shape[0], range(rows.ndim, rows.ndim + w.ndim - 1))
    return jnp.where(there, jnp.sin(jnp.take(w, rows, axis=0)), 0.5)


def lookup(at, w):
    d, shape = at.below(w.ndim), at.choose([(2,), (2, 2), (1,)])
    first = jnp.moveaxis(w, d, 0)
    i, far = (indices(at, shape, n) for n in (w.shape[d], w.shape[d] + 3))
    forms = [
        lambda: jnp.take(w, i, axis=d),
        lambda: jnp.take(w, far - 1, axis=d, mode="clip"),
        lambda: jnp.take(w, far, axis=d, mode="wrap"),
        lambda: filled(first, far, masked=w.shape[d] % 2),
        lambda: first.at[jnp.sort(i.ravel())].get(indices_are_sorted=True),
        lambda: first[i, ..., i % first.shape[-1]] if w.ndim > 1 else w[i],
        lambda: first[at.rng.integers(w.shape[d], size=shape)],
    ]
    return at.choose(forms)()


def along_axis(at, w):
    d = at.below(w.ndim)
    shape = (*w.shape[:d], 2, *w.shape[d + 1 :])
    return jnp.take_along_axis(w, indices(at, shape, w.shape[d]), axis=d)


def windows(at, w):
    """The general lookup: a window of the weight at each index."""
    w = jnp.atleast_1d(w)
    place = [d for d in range(w.ndim) if at.chance()] or [0]
    gone = [d for d in place if at.chance()]
    at.rng.shuffle(place)
    sizes = [1 if d in gone else 1 + at.below(n) for d, n in enumerate(w.shape)]
    kept = w.ndim - len(gone)
    offsets = sorted(at.rng.choice(kept + 1, kept, replace=False).tolist())
    dims = lax.GatherDimensionNumbers(tuple(offsets), tuple(gone), tuple(place))
    return lax.gather(w, indices(at, (2, len(place)), 4), dims, sizes, mode="clip")


def convolution(at, w):
    w = w[(None,) * max(0, 3 - w.ndim)]
    w = w.reshape(*w.shape[:3], -1) if w.ndim > 4 else w
    specs = [tuple(at.rng.permutation(w.ndim).tolist()) for _ in range(3)]
    out, in_, *window = (w.shape[d] for d in specs[1])
    divisor = at.choose([n for n in range(1, out + 1) if out % n == 0])
    features, batches = (divisor, 1) if at.chance() else (1, divisor)
    strides, lhs, rhs = at.rng.integers(1, 3, size=(3, len(window))).tolist()
    low = at.rng.integers(-1, 3, size=len(window)).tolist()
    room = [(n - 1) * k for n, k in zip(window, rhs, strict=True)]  # for one window
    if jax.__version_info__ < (0, 10):
        # More at the low end makes padding of the slope by x that is negative there
        # and, at the high end, positive: XLA then read memory that was not its own.
        low = [*map(min, low, room)]
    sizes = [2 * batches, in_ * features, *[3] * len(window)]
    return lax.conv_general_dilated(
        mixed(at, at.x, tuple(sizes[specs[0].index(d)] for d in range(w.ndim))),
        w,
        strides,
        [(i, max(0, n - i)) for i, n in zip(low, room, strict=True)],
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
    """Random bits and a range, which depend on whether x64 is on."""
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


# Calls: `call(at, f)` uses `f(weights, x)`, a shorter program.


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
    """Those of one shape change places."""
    shapes = {}
    for w in weights:
        shapes.setdefault(w.shape, []).append(w)
    return [shapes[w.shape].pop() for w in weights]


def carried(at):
    """Constant weights, carried ones, and how these change from turn to turn."""
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
    """One jitted function, called again and again, on operands of which others move."""
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


# Custom rules halve the derivative, as no other rule would, and see an integer.


def with_jvp(at, f):
    g = jax.custom_jvp(lambda weights, n, x: f(weights, x) * n.astype(x.dtype))

    @g.defjvp
    def _(primals, tangents):
        y, dot = jax.jvp(f, primals[::2], tangents[::2])
        return y, dot / 2

    return lambda weights, x: g(weights, jnp.arange(3)[1], x)


def with_vjp(at, f):
    g = jax.custom_vjp(lambda weights, n, x: f(weights, x) * n.astype(x.dtype))
    if at.chance():  # the backward rule computes all over again, or from residuals
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


# Others read the weights in one direction only.


def only_forward(at, f):
    """The backward rule knows nothing but the weights' shapes."""
    types = jax.tree.map(jax.typeof, at.weights)
    g = jax.custom_vjp(f)

    def backward(_, ct):
        return [jnp.full(t.shape, ct.mean(), t.dtype) for t in types], ct / 2

    g.defvjp(lambda weights, x: (f(weights, x), None), backward)
    return g


def only_backward(at, f):
    """Synthetic gradients: the weights act, and learn, in the backward pass alone."""
    g = jax.custom_vjp(lambda weights, x: jnp.sin(x))
    g.defvjp(
        lambda weights, x: (jnp.sin(x), (weights, x)),
        lambda saved, ct: jax.vjp(f, *saved)[1](ct / 2),
    )
    return g


# Others close over an argument of the program: features, or labels.


def closing(at, f):
    """A function that closes over an argument, and what it is called on."""
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
    """Halves of the activations, and perhaps of one weight, on two devices."""
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
# What JAX does not do inside these: other derivatives of custom rules, derivatives of
# other modes, and rules that a transformation calls when what they close over is gone.
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
    # Devices that take different branches wait for each other's gradients for ever.
    "shard_map": {"shard_map", "constraint", "cond", "switch", "while_loop"},
}


def steps(seed, depth, without, first, given, weights, x):
    """The program of this seed, the same at every trace; `first` is its first call."""
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
        # All numbers stay of the order of one, and so do their derivatives.
        x, first = jnp.sin(x / 2 + mixed(at, y, x.shape)), None
    return x


class Program(NamedTuple):
    """A function of parameters, of activations, and perhaps of something given."""

    fn: Any
    params: dict[str, jax.Array]
    inputs: list[jax.Array]
    how: str = "grad"
    moving: Any = (("adapters", "x"),)


def program(seed, dora=False, but=frozenset()):
    """The program of a seed, and which of its derivatives to take.

    Args:
      seed: Of the program.
      dora: Whether its weights have magnitudes.
      but: Calls that it may not make.
    """
    rng = np.random.default_rng([seed, 1])
    base, ranks, axes, shape, like = {}, {}, {}, (), None
    for name in ("w", "v", "u")[: rng.integers(1, 4)]:
        if not shape or rng.random() < 0.6:  # else like the last one
            ndim = int(rng.choice([2, 2, 3, 3, 4]))
            least = 1 if rng.random() < 0.2 else 2
            shape = tuple(rng.integers(least, 5 if ndim < 4 else 4, ndim).tolist())
            like = None
        base[name] = jax.ShapeDtypeStruct(shape, np.float32)
        if like in ranks and rng.random() < 0.6:  # in every respect
            axes[name], ranks[name] = axes[like], ranks[like]
            continue
        roles = rng.permutation([1, 2, *rng.integers(3, size=len(shape) - 2)])
        roles = np.sort(roles) if rng.random() < 0.5 else roles  # the standard order
        axes[name] = lj.Axes(*(np.flatnonzero(roles == r).tolist() for r in range(3)))
        if name == "w" or rng.random() < 0.8:
            full = min(math.prod(shape[d] for d in dims) for dims in axes[name][1:])
            ranks[name] = int(rng.integers(1, min(3, full) + 1))
        like = name
    # Of shapes alone, and filled here: a tenth of the time of compiling each.
    params = {
        name: jnp.asarray(rng.standard_normal(leaf.shape) / 2, np.float32)
        for name, leaf in lj.lorafy(base, ranks, axes=axes, dora=dora).items()
    }
    for name in base:
        if np.random.default_rng([seed, 3]).random() < 0.1:  # as NumPy makes them
            params[name] = np.asarray(params[name], np.float64)
    # Every other program is straight, the others begin with one call after another.
    calls = [name for name in CALLS if name not in but]
    first = None if seed % 2 else calls[seed // 2 % len(calls)]
    forward = first == "while_loop" or (seed % 5 == 0 and first not in FORWARD)
    twice = rng.random() < 0.25 and first not in CLOSING
    depth = int(rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1])) if first else 0
    without = (FORWARD if forward else {"while_loop"}) | but
    # A rule that closes over an argument cannot leave the function's own `jit`.
    without = frozenset(without | CLOSING if twice else without)

    def fn(params, x, given):
        weights = [params[name] for name in base]
        return steps(seed, depth, without, first, given, weights, x)

    inputs = [*jnp.asarray(rng.standard_normal((2, BATCH, D)), np.float32)]
    how = ("linearize" if twice else "jvp") if forward else "vjp" if twice else "grad"
    moving = [MOVING[i] for i in rng.permutation(len(MOVING))]
    return Program(fn, params, inputs, how, moving)


# What is differentiated: what moves is what custom rules see.
MOVING = [
    ("adapters",),
    ("x",),
    ("adapters", "x"),
    ("adapters", "weights", "x"),
    ("weights",),
]


# Derivatives of `f(arguments)`, a dict, by those of some names, and its values: once,
# or twice, of a function jitted once, where both are made before either is used.


def along(f, arguments, names):
    some = {name: arguments[name] for name in names}
    return lambda some: f(arguments | some), some


def grad(f, arguments, moving):
    f, some = along(f, arguments, moving[0])
    loss = lambda some: (jnp.cos(y := f(some)).sum(), y)
    return [jax.grad(loss, has_aux=True)(some)]


def vjp(f, arguments, moving):
    f = jax.jit(f)
    made = [jax.vjp(*along(f, arguments, names)) for names in moving[:2]]
    return [(*pullback(-jnp.sin(y)), y) for y, pullback in made]


def jvp(f, arguments, moving):
    f, some = along(f, arguments, moving[0])
    return [jax.jvp(f, [some], [jax.tree.map(jnp.ones_like, some)])]


def linearize(f, arguments, moving):
    f = jax.jit(f)
    sides = [along(f, arguments, names) for names in moving[:2]]
    made = [jax.linearize(*side) for side in sides]
    ones = [jax.tree.map(jnp.ones_like, some) for _, some in sides]
    return [(y, dot(dots)) for (y, dot), dots in zip(made, ones, strict=True)]


DERIVATIVES = {"grad": grad, "vjp": vjp, "jvp": jvp, "linearize": linearize}


def in_few_bits(seed):
    """The program of a seed on quantised weights, a format and blocks for each.

    Every other one has DoRA's magnitudes too.
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


def worst_gap(fn, params, inputs, how="grad", moving=(("adapters", "x"),)):
    """Between the values, and the derivatives, of `lora(fn)` and of the merged `fn`."""
    adapters, base = lj.split(params)
    x, *given = inputs
    # Of weights in few bits only the scales can move: the numbers are whole.
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    floats = jax.tree.map(lambda x: x if floating(x) else None, base)
    arguments = {"adapters": adapters, "weights": floats, "x": x}

    def derivatives(f):
        def whole(p):
            other = lambda x, y: y if x is None else x
            is_leaf = lambda x: x is None
            weights = jax.tree.map(other, p["weights"], base, is_leaf=is_leaf)
            return f(lj.combine(p["adapters"], weights), p["x"], *given)

        return DERIVATIVES[how](whole, arguments, moving)

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
        idle = re.findall(r"'(\w+)'", str(error).split("What trains")[0])
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
def arrays_where_cheaper(yes):
    """Products as cheap as those of real shapes: W + scale * A B where that pays."""
    with pytest.MonkeyPatch.context() as patch:
        if yes:
            patch.setattr(ops, "WORTHWHILE", 0)
            patch.setattr(views, "LARGE", 0)
        yield


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_random_program(seed):
    with arrays_where_cheaper(seed % 3 == 2):
        assert worst_gap(*program(seed)) < 1e-4
    if seed % 50 == 49:  # thousands of compiled programs would fill the memory
        jax.clear_caches()


# Two JAX refuses on the merged weights too: what `shard_map` hands to a rule of another
# makes its gradient vary over devices; and, from 0.12, a rule under `vmap` of which one
# output is the same for all.
OF_DORA = [seed for seed in range(-(-PROGRAMS // 4)) if seed not in (74, 382)]


@pytest.mark.parametrize("seed", OF_DORA)
def test_random_program_of_dora(seed):
    assert worst_gap(*program(2 * 10**6 + seed, dora=True)) < 1e-4
    if seed % 50 == 49:
        jax.clear_caches()


# Up to 0.9 XLA for CPU rounds to float8 by way of float16, in some programs under jit
# alone: 0.14843 is then a tie, and the merged function is not the eager one either.
OLD = jax.__version_info__ < (0, 10)
OF_FEW_BITS = [s for s in range(-(-PROGRAMS // 2)) if not (OLD and s == 376)]


@pytest.mark.parametrize("seed", OF_FEW_BITS)
def test_random_program_on_weights_in_few_bits(seed):
    assert worst_gap(*in_few_bits(10**6 + seed)) < 1e-4
    if seed % 50 == 49:
        jax.clear_caches()


@pytest.mark.parametrize("seed", [370])
def test_a_program_that_once_failed(seed):
    """A linearised rule, cut over devices, of which one operand does not move."""
    assert worst_gap(*program(seed)) < 1e-4


# Of halves no two functions agree to more than two or three digits. So that of `lora`
# has to come as near to float64 as the merged one does: where that rounds nothing but
# the numbers that all are given, to all digits of float32.


@pytest.mark.parametrize("seed", range(1 + PROGRAMS // 20))
def test_random_halves(seed):
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
    form, use, swap = draw.below(4), draw.chance(0.8), draw.chance()

    def fn(params, x, half, full):
        w = jnp.transpose(params["w"], order)
        q = lambda w: w.astype(half).astype(w.dtype)
        forms = [
            lambda: w,
            lambda: w.astype(half),
            lambda: w + lax.stop_gradient(q(w) - w),
            lambda: w - q(w),
        ]
        w = forms[form]()
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

    exact = form == 0 and stored == jnp.float32
    slack = 1e-5 if exact else float(jnp.finfo(half).eps)

    def check(got, near, want):
        got_far, near_far = (
            np.abs(np.asarray(y, float) - want).max() for y in (got, near)
        )
        assert got.dtype == near.dtype
        assert got_far <= 4 * near_far + slack * max(1, np.abs(want).max())

    jax.tree.map(check, got, near, jax.tree.map(np.asarray, want))


# Sums of few binary digits are exact in float32, in whatever order. So both functions
# round the very same numbers, and even a difference of roundings has to be equal.


def of_few_digits(rng, *shape):
    return jnp.asarray(rng.integers(-8, 9, shape) / 8, jnp.float32)


def meeting(at, q, w):
    """A rounded weight and the weight itself, in one expression."""

    def ruled(w):
        rule = jax.custom_vjp(q)
        rule.defvjp(
            lambda w: (q(w), (q(w), w)),
            lambda saved, ct: (ct * (1 + jnp.sign(saved[0] - saved[1])),),
        )
        return jax.grad(lambda w: rule(w).sum())(w)

    constant = of_few_digits(at.rng, *w.shape)
    rows = at.rng.integers(w.shape[0], size=BATCH)
    forms = {
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
    return at.pick(forms)()


@pytest.mark.parametrize("seed", range(1 + PROGRAMS // 8))
def test_random_meeting_of_a_weight_and_its_rounding(seed):
    rng = np.random.default_rng([seed, 4])
    at = At(rng, frozenset(), [], None, None)
    half = at.choose([jnp.bfloat16, jnp.float16])
    n = 64 if half == jnp.float16 else 8  # more digits than half has
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

# Other devices wait for a collective that one of them does not reach.
ON_DEVICES = frozenset(WITHOUT["shard_map"])


@pytest.mark.parametrize("seed", range(1 + PROGRAMS // 10))
def test_random_program_with_an_adapter_on_each_device(seed):
    fn, params, (x, given), *_ = program(3 * 10**6 + 2 * seed + 1, but=ON_DEVICES)
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


# What once failed, in a few lines. Seeds change their meaning with the generator.


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


def masked_where_nothing_is(p, x):
    rows = jnp.array([1, D + 2])
    found = jnp.sin(jnp.take(p["w"], rows, axis=0, mode="fill"))
    return jnp.where((rows < D)[:, None], found, 0.0) + x.sum()


def moved_beside_a_constraint(p, x):
    moved = jax.device_put(p["w"])
    place = NamedSharding(mesh(), P("data"))
    return lax.with_sharding_constraint(x, place) @ moved


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
    masked_where_nothing_is,
    mapped_over_devices,
]


@pytest.mark.parametrize("fn", REGRESSIONS, ids=lambda fn: fn.__name__)
def test_regression(fn):
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


def test_a_stored_weight_goes_nowhere_beside_a_constraint():
    """Where its scales move alone: of numbers closed over JAX says where they are."""
    rng = np.random.default_rng(0)
    w, x = jnp.asarray(rng.standard_normal((2, D, D)), np.float32)
    params = lj.lorafy({"w": quantize_array(w, "nf4", (1, D))}, 1, targets="*")
    moving = [("weights", "x")]
    assert worst_gap(moved_beside_a_constraint, params, [x], moving=moving) < 1e-4


def test_effects_keep_their_order_and_number():
    seen = []

    def fn(p, x):
        note = lambda n, w: jax.debug.callback(
            lambda n, w: seen.append((int(n), float(w))), n, w[0, 0], ordered=True
        )
        note(0, p["w"])
        jax.jit(lambda w: note(1, w))(p["w"])
        lax.cond(x[0, 0] > 0, lambda w: note(2, w), lambda w: note(3, -w), p["w"])
        body = lambda i, w: (note(i, w), w)[1]
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


# Reached by other tests: of explicit meshes, of some JAX alone.
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
    # Straight programs trace fast, and bring most rules to bear.
    for seed in [*range(0, 2 * len(CALLS), 2), *range(1, 240, 2)]:
        fn, params, inputs, *_ = program(seed)
        jax.eval_shape(adapted(fn), params, *inputs)
    assert not {*VIEWS, *USES, *ROUNDINGS} - drawn
    assert not {*evaluate.RULES} - ELSEWHERE - met
