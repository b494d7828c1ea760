"""Tests of `stack`, `take` and `in_axes` against each adapter alone, merged."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj

Axes = lj.Axes
# A kernel, a table, scanned layers, a kernel (out, in), and a fused one with heads.
SHAPES = {
    "m/kernel": ((4, 4), Axes((), (0,), (1,))),
    "t/embedding": ((7, 4), Axes((), (0,), (1,))),
    "s/kernel": ((3, 4, 4), Axes((0,), (1,), (2,))),
    "o/kernel": ((5, 4), Axes((), (1,), (0,))),
    "f/kernel": ((3, 2, 4, 5), Axes((0,), (2,), (1, 3))),
}
AXES = {name: axes for name, (_, axes) in SHAPES.items()}
IDS = np.array([2, 0, 6])


def ones(*shape):
    return jax.device_put(np.ones(shape, np.float32))


def base(how=None):
    rng = np.random.default_rng(0)
    tree = {"b": {"bias": ones(4)}}
    for name, (shape, _) in SHAPES.items():
        module, leaf = name.split("/")
        tree[module] = {
            leaf: jax.device_put(np.asarray(rng.standard_normal(shape) / 2, np.float32))
        }
    return lj.quantize(tree, how, targets="*", axes=AXES, block=4) if how else tree


def adapted(plain, seed, rank=2, names=SHAPES, alpha=None, **options):
    """Returns adapters as after some training, of which nothing was compiled."""
    axes = {name: AXES[name] for name in names}
    options = {"targets": [*names], "axes": axes} | options
    alpha = 1.0 + seed if alpha is None else alpha
    rng = np.random.default_rng(seed)

    def draw(path, x):
        scaled = path[-1].key == "lora_scale"
        value = alpha / rank if scaled else rng.standard_normal(x.shape) / 3
        return jax.device_put(np.asarray(np.broadcast_to(value, x.shape), x.dtype))

    start = lambda plain: lj.detach(lj.lorafy(plain, rank, **options))
    shapes = jax.eval_shape(start, plain)
    return lj.attach(jax.tree.map_with_path(draw, shapes), plain)


def as_trained(params, seed):
    """Changes all that is trained, as after some training."""
    adapters, rest = lj.split(params)
    rng = np.random.default_rng(seed)
    by = lambda x: np.asarray(rng.standard_normal(x.shape) / 3, x.dtype)
    move = lambda x: jax.device_put(np.asarray(x) + by(x))
    return lj.combine(jax.tree.map(move, adapters), rest)


def model(params, x, ids=IDS):
    x = jnp.sin(x @ params["m"]["kernel"] + params["b"]["bias"][None])
    x = x + jnp.take(params["t"]["embedding"], ids, axis=0)
    x, _ = lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, params["s"]["kernel"])
    y = jnp.einsum("bi,oi->bo", x, params["o"]["kernel"])
    return y + jnp.einsum("bi,lhio->blho", x, params["f"]["kernel"]).sum((1, 2))


@jax.jit  # one compilation per structure of tree, not one per operation
def alone(tree, x):
    return model(lj.merge(tree), x)


@jax.jit
def merged_one(stacked, i):
    return lj.merge(lj.take(stacked, i))


def rescaled(tree, factor):
    """Applies `rescale` in one compiled program; the result shares the base."""
    new = jax.jit(lambda tree: lj.detach(lj.rescale(tree, factor)))(tree)
    return lj.attach(new, lj.strip(tree))


def inputs(n=None, seed=9):
    shape = (3, 4) if n is None else (n, 3, 4)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def at_once(stacked, x, fn=model):
    run = jax.vmap(lj.lora(fn, unused="ignore"), in_axes=(lj.in_axes(stacked), 0))
    return jax.jit(run)(stacked, x)


KINDS = {
    "ranks": lambda plain: [adapted(plain, i, rank=1 + i) for i in range(2)],
    "targets": lambda plain: [
        adapted(plain, 0, names=["m/kernel", "f/kernel"]),
        adapted(plain, 1, names=["t/embedding", "o/kernel"], rank=3),
        adapted(plain, 2, names=["s/kernel"]),
    ],
    "copies": lambda plain: [
        adapted(plain, 0, names=["m/kernel"], also="bias"),
        adapted(plain, 1, names=["s/kernel"], also="o"),
    ],
    "dora": lambda plain: [
        adapted(plain, 0, dora=True, rank=1),
        adapted(plain, 1, dora=True, names=["m/kernel", "f/kernel", "t/embedding"]),
    ],
    "dtypes": lambda plain: [
        adapted(plain, i, names=["m/kernel", "f/kernel"], dtype=dtype)
        for i, dtype in enumerate((jnp.bfloat16, jnp.float32))
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_stack_and_take_compute_what_each_adapter_does_alone(kind):
    plain = base()
    trees = KINDS[kind](plain)
    stacked, x = lj.stack(trees), inputs(len(trees))
    got = np.asarray(at_once(stacked, x))
    for i, tree in enumerate(trees):
        want, one = alone(tree, x[i]), lj.take(stacked, i)
        np.testing.assert_allclose(got[i], want, atol=1e-5)
        assert lj.strip(one)["m"]["kernel"] is plain["m"]["kernel"]
        np.testing.assert_allclose(alone(one, x[i]), want, atol=1e-5)


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_stack_over_a_quantized_base(how):
    plain = base(how)
    trees = [adapted(plain, i) for i in range(2)]
    stacked, x = lj.stack(trees), inputs(2)
    assert stacked["m"]["kernel"] is plain["m"]["kernel"]
    got = np.asarray(at_once(stacked, x))
    for i, tree in enumerate(trees):
        np.testing.assert_allclose(got[i], alone(tree, x[i]), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_take_of_many_ids_and_of_ids_out_of_range(kind):
    plain = base()
    trees = KINDS[kind](plain)
    stacked = lj.stack(trees)
    n, ids = len(trees), np.array([1, 0, 1, len(trees), -1])
    x = inputs(5)

    @jax.jit
    def serve(stacked, ids, x):
        own = lj.take(stacked, ids)
        run = lj.lora(model, unused="ignore")
        return jax.vmap(run, in_axes=(lj.in_axes(own), 0))(own, x)

    got, run = np.asarray(serve(stacked, ids, x)), jax.jit(model)
    for i, id in enumerate(ids.tolist()):
        want = alone(trees[id], x[i]) if 0 <= id < n else run(plain, x[i])
        np.testing.assert_allclose(got[i], want, atol=1e-5)
    serve(stacked, ids[::-1], x)  # other ids, another adapter, other scales
    trees[1] = rescaled(trees[0], 0.5) if kind != "dora" else trees[0]
    swapped = lj.stack([lj.take(stacked, 0), *trees[1:]])
    if jax.tree.map(jnp.shape, swapped) == jax.tree.map(jnp.shape, stacked):
        serve(swapped, ids, x)
    assert serve._cache_size() == 1


def test_stack_trains_a_sweep_like_each_run_alone(optax_promotion):
    """Different rates, alphas, ranks and factors, in one compiled step."""
    plain, x, y = base(), inputs(), inputs(seed=8)
    rates = np.array([0.03, 0.01, 0.1], np.float32)
    sides = [(1, 1.0), (2, 4.0), (2, 1.0)]
    names = ["m/kernel", "s/kernel"]
    trees = [adapted(plain, i, r, names, a) for i, (r, a) in enumerate(sides)]
    tx = lj.adapters_only(optax.inject_hyperparams(optax.adamw)(learning_rate=0.0))

    def start(params, rate):
        state = tx.init(params)
        state.hyperparams["learning_rate"] = rate
        return state

    def step(params, state):
        loss = lambda params: jnp.mean((lj.lora(deep)(params, x) - y) ** 2)
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    stacked = lj.stack(trees)
    axes = lj.in_axes(stacked)
    states = jax.jit(jax.vmap(start, in_axes=(axes, 0)))(stacked, rates)
    once = chex.assert_max_traces(step, n=1)
    many = jax.jit(jax.vmap(once, in_axes=(axes, 0), out_axes=(axes, 0, 0)))
    params = stacked
    for _ in range(3):
        params, states, losses = many(params, states)
    assert params["m"]["kernel"].shape == (4, 4)
    np.testing.assert_array_equal(params["m"]["kernel"], plain["m"]["kernel"])
    losses = np.asarray(losses)
    one, start_one, merge = jax.jit(step), jax.jit(start), jax.jit(lj.merge)
    for i, tree in enumerate(trees):
        state = start_one(tree, rates[i])
        for _ in range(3):
            tree, state, loss = one(tree, state)
        np.testing.assert_allclose(losses[i], loss, rtol=1e-5)
        pair = merged_one(params, i), merge(tree)
        for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_stack_halves_have_the_gradients_of_each_alone():
    plain, x = base(), inputs(2)
    trees = [adapted(plain, i) for i in range(2)]
    adapters, frozen = lj.split(lj.stack(trees))
    loss = lambda adapters, frozen, x: jnp.sum(
        lj.lora(model, unused="ignore")(lj.combine(adapters, frozen), x) ** 2
    )
    axes = lj.in_axes(adapters), lj.in_axes(frozen), 0
    got = jax.device_get(jax.jit(jax.vmap(jax.grad(loss), axes))(adapters, frozen, x))
    merged = lambda half, rest, x: jnp.sum(alone(lj.combine(half, rest), x) ** 2)
    grad = jax.jit(jax.grad(merged))
    for i, tree in enumerate(trees):
        want = grad(*lj.split(tree), x[i])
        for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4)


def test_stack_with_another_adapter_compiles_nothing():
    plain, x = base(), inputs(4)
    trees = [adapted(plain, i, rank=rank) for i, rank in enumerate((1, 2, 2))]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def serve(stacked, ids, x):
        own = lj.take(stacked, ids)
        return jax.vmap(lj.lora(model), in_axes=(lj.in_axes(own), 0))(own, x)

    def check(stacked, ids):
        got = np.asarray(serve(stacked, np.array(ids), x))
        for i, id in enumerate(ids):  # an alpha of 9 makes values of 10
            np.testing.assert_allclose(got[i], alone(trees[id], x[i]), atol=3e-5)

    check(lj.stack(trees), [0, 1, 2, 1])
    trees[1] = adapted(plain, 7, rank=1)  # of another rank, alpha and targets
    check(lj.stack(trees), [1, 1, 0, 2])
    trees[0] = adapted(plain, 8, names=["m/kernel"], alpha=9.0)
    check(lj.stack(trees), [2, 0, 0, 1])
    trees[2] = rescaled(trees[2], -0.5)
    check(lj.stack(trees), [2, 1, 0, 2])


def test_lorafy_under_vmap_equals_stack(close):
    plain, keys, alphas = base(), jax.random.split(jax.random.key(1), 3), [1, 2.5, 8]
    start = lambda key, alpha: lj.detach(
        lj.lorafy(plain, 2, alpha=alpha, key=key, axes=AXES, targets="*")
    )
    got = lj.attach(jax.jit(jax.vmap(start))(keys, jnp.array(alphas)), plain)
    options = {"axes": AXES, "targets": "*"}
    pairs = zip(keys, alphas, strict=True)
    trees = [lj.lorafy(plain, 2, alpha=a, key=key, **options) for key, a in pairs]
    close(got, lj.stack(trees))


def deep(params, x):
    """Runs scanned layers under remat."""
    layer = jax.checkpoint(lambda x, w: (jnp.sin(x @ w), None), prevent_cse=False)
    x, _ = lax.scan(layer, jnp.sin(x @ params["m"]["kernel"]), params["s"]["kernel"])
    return x


@pytest.mark.parametrize("how", [None, "int8", "nf4"])
def test_stack_trains_scanned_and_quantized_layers(how):
    plain, x = base(how), inputs(2)
    trees = [
        adapted(plain, 0, names=["m/kernel"], rank=1),
        adapted(plain, 1, names=["m/kernel", "s/kernel"], rank=3),
    ]
    adapters, frozen = lj.split(lj.stack(trees))
    loss = lambda adapters, frozen, x: jnp.sum(
        lj.lora(deep)(lj.combine(adapters, frozen), x) ** 2
    )
    axes = lj.in_axes(adapters), lj.in_axes(frozen), 0
    got = jax.device_get(jax.jit(jax.vmap(jax.grad(loss), axes))(adapters, frozen, x))
    merged = lambda half, rest, x: jnp.sum(
        deep(lj.merge(lj.combine(half, rest)), x) ** 2
    )
    grad = jax.jit(jax.grad(merged))
    for i, tree in enumerate(trees):
        want = grad(*lj.split(tree), x[i])
        for name in ("m", "s"):
            a, b = got[name]["lora_a"][i], got[name]["lora_b"][i]
            r = 0
            if "lora_a" in want[name]:
                r = want[name]["lora_a"].shape[-1]
                for x_got, x_want in (
                    (a[..., :r], want[name]["lora_a"]),
                    (b[..., :r, :], want[name]["lora_b"]),
                ):
                    np.testing.assert_allclose(x_got, x_want, rtol=1e-4, atol=1e-4)
            # The padding has no gradient, so that it stays zero.
            assert not a[..., r:].any() and not b[..., r:, :].any()


@pytest.mark.parametrize("shape", [(2, 3), (4, 3), (3, 8)])
def test_stack_trains_with_few_rows_and_columns(shape):
    """XLA for CPU, up to jax 0.11, crashes in some batched products of this size.

    They have two or three rows, and an operand is a gradient behind a barrier.
    """
    x = np.cos(np.arange(2 * shape[0] * shape[1], dtype=np.float32))
    x = x.reshape(2, *shape)
    kernel = np.full((shape[1], 2), 0.25, np.float32)
    stacked = lj.lorafy({"kernel": jax.device_put(kernel)}, 2, stack=2)
    loss = lambda params, x: jnp.sum(jnp.sin(lj.lora(linear)(params, x)))
    grads = jax.vmap(jax.grad(loss), (lj.in_axes(stacked), 0))
    got = jax.device_get(jax.jit(grads)(stacked, x))
    merged = lambda one, x: jnp.sum(jnp.sin(linear(lj.merge(one), x)))
    grad = jax.jit(jax.grad(merged))
    for i in range(2):
        want = grad(lj.take(stacked, i), x[i])
        np.testing.assert_allclose(got["lora_b"][i], want["lora_b"], atol=1e-5)


def linear(params, x):
    return x @ params["kernel"]


@pytest.mark.parametrize("dora", [False, True])
def test_lorafy_stack_equals_stack_of_split_keys(dora, close):
    plain, key = base(), jax.random.key(3)
    options = {"axes": AXES, "targets": "*", "also": "bias", "dora": dora}
    got = lj.lorafy(plain, 2, stack=3, key=key, **options)
    keys = jax.random.split(key, 3)
    close(got, lj.stack([lj.lorafy(plain, 2, key=k, **options) for k in keys]))
    assert not np.allclose(got["m"]["lora_a"][0], got["m"]["lora_a"][1])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), plain)
    abstract = lj.lorafy(shapes, 2, stack=3, **options)
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, got)


def test_stack_is_accepted_by_functions_of_trees():
    plain = base()
    stacked = lj.lorafy(plain, 2, stack=3, axes=AXES, targets="*")
    one = lj.lorafy(plain, 2, axes=AXES, targets="*")
    assert lj.count(stacked).trainable == 3 * lj.count(one).trainable
    assert lj.mask(stacked) == lj.mask(one)
    assert lj.labels(stacked) == lj.labels(one)
    again = lj.attach(lj.detach(stacked), lj.strip(stacked))
    assert jax.tree.structure(again) == jax.tree.structure(stacked)


def frozen(params):
    return FrozenDict(params)


def partitioned(params):
    names = {2: ("in", "out"), 1: ("out",), 3: ("layers", "in", "out")}
    boxed = lambda x: nn.Partitioned(x, names.get(x.ndim, (None,) * x.ndim))
    return jax.tree.map(boxed, params)


def state(params):
    return nnx.State(jax.tree.map(nnx.Param, params))


@pytest.mark.parametrize("container", [frozen, partitioned, state])
def test_stack_in_containers_and_boxes(container):
    plain = container(base())
    value = lambda leaf: leaf.unbox() if isinstance(leaf, nn.Partitioned) else leaf

    def fn(params, x):
        leaf = params["m"]["kernel"]
        return x @ (leaf[...] if isinstance(leaf, nnx.Variable) else value(leaf))

    trees = [
        as_trained(lj.lorafy(plain, r, targets="m", key=jax.random.key(r)), r)
        for r in (1, 2)
    ]
    stacked, x = lj.stack(trees), inputs(2)
    got = at_once(stacked, x, fn)
    for i, tree in enumerate(trees):
        np.testing.assert_allclose(got[i], fn(lj.merge(tree), x[i]), atol=1e-5)
    a = stacked["m"]["lora_a"]
    if container is partitioned:
        assert a.names == (None, "in", None)
        assert lj.take(stacked, 1)["m"]["lora_a"].names == ("in", None)
    assert type(a) is type(trees[0]["m"]["lora_a"])


def test_stack_over_the_devices_of_a_task_axis():
    mesh = jax.make_mesh((4, 2), ("task", "data"))
    plain = base()
    trees = [adapted(plain, i) for i in range(4)]
    stacked, x = lj.stack(trees), inputs(4)
    place = NamedSharding(mesh, P("task"))
    adapters = jax.device_put(lj.detach(stacked), place)
    here = jax.device_put(plain, NamedSharding(mesh, P()))
    got = at_once(lj.attach(adapters, here), jax.device_put(x, place))
    assert got.sharding.spec[0] == "task"
    got = np.asarray(got)
    for i, tree in enumerate(trees):
        np.testing.assert_allclose(got[i], alone(tree, x[i]), atol=1e-5)


ADAM = optax.adam(0.01)


def train(adapters, state, frozen, x):
    fn = lambda half: lj.lora(deep)(lj.combine(half, frozen), x)
    value, grads = jax.value_and_grad(lambda half: jnp.mean(fn(half) ** 2))(adapters)
    updates, state = ADAM.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, value


@functools.cache
def trained_alone():
    """Returns four adapters, and each after two steps without the others."""
    plain, x = base(), inputs(4)
    trees = [adapted(plain, i, names=["m/kernel", "s/kernel"]) for i in range(4)]
    one, init, ends = jax.jit(train), jax.jit(ADAM.init), []
    for i, tree in enumerate(trees):
        half, rest = lj.split(tree)
        state = init(half)
        for _ in range(2):
            half, state, value = one(half, state, rest, x[i])
        ends.append((half, value))
    return trees, ends


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_stack_trains_over_a_task_axis_like_each_run_alone(kind, optax_promotion):
    """Each device has its own adapters and their state; all devices have the base."""
    mesh = jax.make_mesh((4, 2), ("task", "data"), axis_types=(kind, kind))
    plain, (trees, ends) = base(), trained_alone()
    traced = []

    def step(*args):
        traced.append(step)
        return train(*args)

    stacked = lj.stack(trees)
    place = lambda tree, *names: jax.device_put(tree, NamedSharding(mesh, P(*names)))
    params = lj.attach(place(lj.detach(stacked), "task"), place(plain))
    adapters, frozen = lj.split(params)
    start = jax.jit(jax.vmap(ADAM.init))
    state = place(start(lj.split(stacked)[0]), "task")
    many = jax.jit(jax.vmap(step, (0, 0, lj.in_axes(frozen), 0)))
    batch = place(inputs(4), "task")
    for _ in range(2):
        adapters, state, losses = many(adapters, state, frozen, batch)
    assert len(traced) == 1
    for leaf in jax.tree.leaves((adapters, losses)):
        assert leaf.sharding.spec[0] == "task"
    adapters, losses = jax.device_get((adapters, losses))
    for i, (half, value) in enumerate(ends):
        np.testing.assert_allclose(losses[i], value, rtol=1e-5)
        for a, b in zip(*map(jax.tree.leaves, (adapters, half)), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-5)


def test_stack_places_adapters_like_a_sharded_weight():
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    w = jax.device_put(ones(4, 4), NamedSharding(mesh, P(None, "model")))
    trees = [lj.lorafy({"kernel": w}, 2) for _ in range(2)]
    for stacked in (lj.stack(trees), lj.lorafy({"kernel": w}, 2, stack=2)):
        assert stacked["lora_b"].sharding.spec == P(None, None, "model")
        assert lj.take(stacked, 0)["lora_b"].sharding.spec == P(None, "model")


def one_adapter(**leaves):
    return lj.lorafy(one_base() | leaves, 2)


def one_base():
    return {"kernel": ones(4, 3)}


STACKED = lj.lorafy(one_base(), 2, stack=3)
OTHER = {"kernel": jax.device_put(np.zeros((4, 3), np.float32))}
RUN = lj.lora(linear)
WRONG = [
    (lambda: lj.stack([]), ValueError, "nothing to stack"),
    (lambda: lj.stack(one_adapter()), TypeError, "list of trees"),
    (lambda: lj.stack([one_adapter(), OTHER]), ValueError, "no adapters"),
    (
        lambda: lj.stack([one_adapter(), lj.lorafy(OTHER, 2)]),
        ValueError,
        "'kernel' of tree 1",
    ),
    (
        lambda: lj.stack([one_adapter(), lj.lorafy(OTHER | one_base(), 2, dora=True)]),
        ValueError,
        "'kernel' has adapters of different kinds",
    ),
    (lambda: lj.stack([STACKED, STACKED]), ValueError, "3 adapters in a stack"),
    (lambda: RUN(STACKED, jnp.ones((2, 4))), ValueError, r"jax.vmap\(lora"),
    (lambda: lj.merge(STACKED), ValueError, r"take\(params, 0\)"),
    (lambda: lj.take(one_adapter(), 0), ValueError, "one adapter, not to a stack"),
    (lambda: lj.take(STACKED, 3), IndexError, r"ids \[3\] are out of range"),
    (lambda: lj.take(STACKED, -1), IndexError, "0 to 2"),
    (lambda: lj.take(STACKED, jnp.array([0, 5])), IndexError, r"ids \[5\]"),
    (lambda: lj.take(STACKED, 1.0), TypeError, "float64"),
    (lambda: lj.take(STACKED, True), TypeError, "bool"),
    (lambda: lj.take(STACKED, jnp.zeros((2, 2), int)), TypeError, "one-dimensional"),
    (lambda: lj.in_axes(OTHER), ValueError, "no adapters"),
    (lambda: lj.in_axes(one_adapter()), ValueError, "not to a stack"),
    (
        lambda: lj.in_axes(STACKED | {"lora_a": jnp.ones((2, 4, 2))}),
        ValueError,
        "different numbers of adapters",
    ),
    (lambda: lj.lorafy(OTHER, 2, stack=0), ValueError, "above 0"),
    (lambda: lj.lorafy(OTHER, 2, stack=2.0), ValueError, "whole number"),
]


@pytest.mark.parametrize(("call", "kind", "message"), WRONG)
def test_stack_take_and_in_axes_refuse_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
