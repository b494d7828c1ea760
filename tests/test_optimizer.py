"""Tests that any optimizer trains the adapters and no bit of any other leaf changes."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lj

pytestmark = pytest.mark.usefixtures("optax_promotion")

RNG = np.random.default_rng(0)
D, RANK = 256, 2


def normal(*shape, scale=1.0):
    return jnp.asarray(scale * RNG.standard_normal(shape), jnp.float32)


# A small tree with values that an addition could change, such as -0.0. All leaves have
# the same shape, because eager JAX compiles for each shape.


def small(dtype=jnp.float32, also=()):
    kernel = np.array([[-0.0, 0.0, 1e-30], [1, -2, 3], [4, 5, 6]], dtype)
    base = {"m": {"kernel": kernel, "bias": normal(3, 3)}, "head": normal(3, 3)}
    base = jax.tree.map(lambda x: jnp.asarray(x, dtype), base)
    return lj.lorafy(base, 3, targets="kernel", also=also)


def adapters_of(tree, *more):
    """Returns the trainable leaves as a plain tree, from their names alone."""
    only = {name: tree["m"][name] for name in ("lora_a", "lora_b")}
    return {"m": only} | {name: tree[name] for name in more}


def random_like(tree):
    return jax.tree.map(lambda x: normal(*x.shape).astype(x.dtype), tree)


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def dtype_of(x):
    return x.dtype


def only_b(params):
    is_b = lambda path, _: "lora_b" in jax.tree_util.keystr(path)
    return jax.tree.map_with_path(is_b, params)


OPTIMIZERS = {
    "adamw, clipped": lambda: optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(0.1, weight_decay=0.5)
    ),
    "decay by a mask": lambda: optax.adamw(0.1, weight_decay=0.5, mask=only_b),
    "momentum on a schedule": lambda: optax.sgd(
        optax.linear_schedule(1.0, 0.0, 5), momentum=0.9
    ),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(
        learning_rate=optax.exponential_decay(0.1, 1, 0.5)
    ),
    "accumulated": lambda: optax.MultiSteps(optax.adam(0.1), every_k_schedule=2),
    "plateau": lambda: optax.chain(
        optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)
    ),
    "lion": lambda: optax.lion(0.1),
    "factored": lambda: optax.adafactor(0.1),
}


@pytest.mark.parametrize(
    ("name", "also"),
    [*((name, ()) for name in OPTIMIZERS), ("adamw, clipped", ("head",))],
)
def test_adapters_only_equals_the_optimizer_on_the_adapters(name, also):
    plain, tx = OPTIMIZERS[name](), lj.adapters_only(OPTIMIZERS[name]())
    params = small(also=also)
    copies = [f"{leaf}_lora_w" for leaf in also]
    trained = adapters_of(params, *copies)
    state, plain_state = tx.init(params), plain.init(trained)
    extra = {"value": jnp.float32(1.0)} if name == "plateau" else {}
    frozen = jax.tree.map(lambda x: x, params)
    for _ in range(3):
        grads = random_like(params)
        updates, state = tx.update(grads, state, params, **extra)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        params = optax.apply_updates(params, updates)
        wanted, plain_state = plain.update(
            adapters_of(grads, *copies), plain_state, trained, **extra
        )
        trained = optax.apply_updates(trained, wanted)
    assert bits(adapters_of(params, *copies)) == bits(trained)
    assert bits(state) == bits(plain_state), "no state but the adapters'"
    for tree in (params, frozen):
        del tree["m"]["lora_a"], tree["m"]["lora_b"]
        for key in copies:
            del tree[key]
    assert bits(params) == bits(frozen)


def test_adapters_only_state_of_adam_is_twice_the_adapters():
    params = lj.lorafy({"w": {"kernel": np.zeros((500, 400), np.float32)}}, 2)
    state = lj.adapters_only(optax.adam(1.0)).init(params)
    sizes = sorted(x.nbytes for x in jax.tree.leaves(state))
    assert sizes == [4, 3200, 3200, 4000, 4000]


def test_adapters_only_needs_no_parameters_if_the_optimizer_needs_none():
    params, tx = small(), lj.adapters_only(optax.sgd(0.5))
    grads = random_like(params)
    updates, _ = tx.update(grads, tx.init(params))
    np.testing.assert_array_equal(updates["m"]["lora_a"], -0.5 * grads["m"]["lora_a"])
    assert not updates["m"]["kernel"].any()


def test_adapters_only_ignores_unknown_extra_arguments():
    strict = optax.GradientTransformation(
        lambda params: (), lambda updates, state, params=None: (updates, state)
    )
    params, tx = small(), lj.adapters_only(strict)
    tx.update(random_like(params), tx.init(params), params, value=1.0, anything=None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_adapters_only_outside_jit_leaves_frozen_bits(dtype):
    params, tx = small(dtype), lj.adapters_only(optax.adamw(0.1, weight_decay=0.5))
    updates, _ = tx.update(random_like(params), tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert bits(lj.strip(after)) == bits(lj.strip(params))
    assert bits(after["m"]["lora_scale"]) == bits(params["m"]["lora_scale"])
    assert bits(after["m"]["lora_a"]) != bits(params["m"]["lora_a"])
    assert {x.dtype for x in jax.tree.leaves(lj.strip(after))} == {jnp.dtype(dtype)}


CONTAINERS = {
    "frozen": flax.core.freeze,
    "state": lambda tree: nnx.State(jax.tree.map(nnx.Param, tree)),
    "boxes": lambda tree: jax.tree.map(lambda x: nn.Partitioned(x, ("a", "b")), tree),
    "sequence": lambda tree: [{"m": tree["m"]}, tree["head"], None],
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_adapters_only_trains_in_every_container(kind):
    params = lj.lorafy(CONTAINERS[kind](lj.strip(small())), 3, targets="kernel")
    tx = lj.adapters_only(optax.adamw(0.1, weight_decay=0.5))
    updates, state = tx.update(random_like(params), tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    assert bits(lj.strip(after)) == bits(lj.strip(params))
    trained, start = lj.split(after)[0], lj.split(params)[0]
    pairs = zip(bits(trained), bits(start), strict=True)
    assert [x != y for x, y in pairs] == [True, True]
    assert len(jax.tree.leaves(state)) == 5


def test_adapters_only_leaves_integers():
    params = small() | {"table": jnp.arange(6, dtype=jnp.int8), "on": jnp.array(True)}
    tx = lj.adapters_only(optax.adamw(0.1))
    loss = lambda params: jnp.sum(params["m"]["lora_a"]) + jnp.sum(params["head"])
    grads = jax.grad(loss, allow_int=True)(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert jax.tree.map(dtype_of, after) == jax.tree.map(dtype_of, params)
    assert bits(lj.strip(after)) == bits(lj.strip(params))


def test_adapters_only_trains_copies_and_not_their_leaves():
    params, tx = small(also="head"), lj.adapters_only(optax.sgd(0.5))
    updates, _ = tx.update(random_like(params), tx.init(params), params)
    assert updates["head_lora_w"].any() and not updates["head"].any()
    assert updates["m"]["lora_b"].any() and not updates["m"]["kernel"].any()
    assert not updates["m"]["lora_scale"].any()


def test_adapters_only_refuses_a_tree_without_adapters():
    params, tx = small(), lj.adapters_only(optax.sgd(1.0))
    with pytest.raises(ValueError, match=r"no adapters. Write params = lorafy"):
        tx.init(lj.strip(params))
    with pytest.raises(ValueError, match="no adapters"):
        tx.update(lj.strip(params), tx.init(params), lj.strip(params))


def test_adapters_only_value_fn_gets_the_full_tree(optax_promotion):
    params, target = small(also="head"), random_like(small(also="head"))
    loss_of = lambda params: sum(
        jnp.sum((x - y) ** 2) * (1 + 0 * jnp.sum(params["m"]["kernel"]))
        for x, y in zip(
            jax.tree.leaves(lj.split(params)[0]),
            jax.tree.leaves(lj.split(target)[0]),
            strict=True,
        )
    )
    tx = lj.adapters_only(optax.lbfgs())
    state, before = tx.init(params), bits(lj.strip(params))
    for _ in range(4):
        value, grad = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=loss_of
        )
        params = optax.apply_updates(params, updates)
    assert loss_of(params) < 1e-6
    assert bits(lj.strip(params)) == before


def test_adapters_only_value_fn_may_take_more_arguments(optax_promotion):
    params, search = small(also="head"), optax.scale_by_backtracking_linesearch
    tx = lj.adapters_only(search(max_backtracking_steps=3))

    def value_fn(params, *, target):
        return jnp.sum((params["head_lora_w"] - target) ** 2)

    target = params["head"] + 1
    value, grad = jax.value_and_grad(value_fn)(params, target=target)
    updates = jax.tree.map(jnp.negative, grad)
    updates, _ = tx.update(
        *(updates, tx.init(params), params),
        **{"value": value, "grad": grad, "value_fn": value_fn, "target": target},
    )
    assert value_fn(optax.apply_updates(params, updates), target=target) < value


def test_adapters_only_leaves_leaves_of_any_type():
    params = small() | {"step": 3.5, "phase": jnp.array([complex(-0.0, -0.0)])}
    tx = lj.adapters_only(optax.sgd(0.5))
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert bits(lj.strip(after)) == bits(jax.tree.map(jnp.asarray, lj.strip(params)))


def test_adapters_only_refuses_other_functions_by_name():
    params, tx = small(), lj.adapters_only(optax.sgd(0.5))
    with pytest.raises(TypeError, match=r"cannot pass 'obj_fn' on.*split\(params\)"):
        tx.update(random_like(params), tx.init(params), params, obj_fn=lambda x: x)


def test_adapters_only_accumulates_gradients_of_adapters_alone():
    params, tx = small(), optax.adam(0.1)
    every = lambda tx: optax.MultiSteps(tx, every_k_schedule=2)
    size = lambda tx: sum(x.size for x in jax.tree.leaves(tx.init(params)))
    inside, outside = (
        size(lj.adapters_only(every(tx))),
        size(every(lj.adapters_only(tx))),
    )
    adapters, total, _ = lj.count(params)
    scales = 1
    assert outside - inside == total + scales - adapters


# A transformer, under one jit


def transformer(params, x):
    for layer in params["layers"]:
        q, k, v = (x @ layer[name]["kernel"] for name in ("query", "key", "value"))
        x = x + jax.nn.softmax(q @ k.mT) @ v @ layer["out"]["kernel"]
        x = x + jax.nn.relu(x @ layer["up"]["kernel"]) @ layer["down"]["kernel"]
    return x


def weights():
    sizes = dict.fromkeys(("query", "key", "value", "out"), (D, D))
    sizes |= {"up": (D, 2 * D), "down": (2 * D, D)}
    layer = lambda: {
        name: {"kernel": normal(*s, scale=s[0] ** -0.5)} for name, s in sizes.items()
    }
    params = {"layers": [layer()]}
    special = np.array([-0.0, 0.0, 1e-40, -1e-45, 1e-38], np.float32)  # 2 subnormal
    kernel = np.array(params["layers"][0]["query"]["kernel"])
    kernel[0, : len(special)] = special
    params["layers"][0]["query"]["kernel"] = jnp.asarray(kernel)
    return params


@functools.cache
def compiled():
    """Returns the compiled step of each way to train, and its arguments."""
    base, (x, y) = weights(), normal(2, 16, 8, D)
    params = lj.lorafy(base, RANK)
    adapters, frozen = lj.split(params)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1)
    )
    only = lj.adapters_only(tx)

    def loss(params):
        return jnp.mean((lj.lora(transformer)(params, x) - y) ** 2)

    def full_loss(params, _):
        return jnp.mean((transformer(params, x) - y) ** 2)

    def step(tx, loss, params, state, frozen):
        updates, state = tx.update(jax.grad(loss)(params, frozen), state, params)
        return optax.apply_updates(params, updates), state

    ways = {
        "full": (tx, full_loss, base, None),
        "adapters_only": (only, lambda params, _: loss(params), params, None),
        "split": (tx, lambda a, b: loss(lj.combine(a, b)), adapters, frozen),
    }
    steps = {}
    for name, (tx, fn, start, rest) in ways.items():
        jitted = jax.jit(functools.partial(step, tx, fn), donate_argnums=(0, 1))
        args = start, tx.init(start), rest
        steps[name] = jitted.lower(*args).compile(), args
    return steps


def flops(name):
    return compiled()[name][0].cost_analysis()["flops"]


def train(name, steps=3):
    step, (params, state, frozen) = compiled()[name]
    params, state = jax.tree.map(jnp.copy, (params, state))
    for _ in range(steps):
        donated = jax.tree.leaves(params)[0]
        params, state = step(params, state, frozen)
        assert donated.is_deleted()
    return params


def test_adapters_only_step_has_the_flops_of_split():
    assert flops("adapters_only") == flops("split")
    # The floor is two thirds, plus the adapters, less the first layer's inputs.
    assert flops("adapters_only") < 0.69 * flops("full")


def test_adapters_only_step_has_the_memory_of_split():
    ours, split, full = (
        compiled()[name][0].memory_analysis()
        for name in ("adapters_only", "split", "full")
    )
    assert ours.temp_size_in_bytes <= split.temp_size_in_bytes
    assert ours.argument_size_in_bytes <= split.argument_size_in_bytes
    assert ours.argument_size_in_bytes < 0.36 * full.argument_size_in_bytes
    # Donated in, donated out: no second copy of the frozen weights.
    assert ours.alias_size_in_bytes == ours.argument_size_in_bytes


def test_adapters_only_changes_every_adapter_and_no_frozen_bit():
    _, (before, *_) = compiled()["adapters_only"]
    after = train("adapters_only")
    assert bits(lj.strip(after)) == bits(lj.strip(before))
    start, _ = lj.split(before)
    end, _ = lj.split(after)
    pairs = zip(jax.tree.leaves(start), jax.tree.leaves(end), strict=True)
    assert all((x != y).any() for x, y in pairs)


def test_adapters_only_and_split_train_alike(close):
    adapters, _ = lj.split(train("adapters_only"))
    close(adapters, train("split"), atol=1e-6)


def test_adapters_only_in_a_train_state():
    _, (params, *_) = compiled()["adapters_only"]
    tx = lj.adapters_only(optax.adamw(1e-2, weight_decay=0.1))
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    x = normal(4, D)

    @jax.jit
    def step(state):
        loss = lambda params: jnp.sum(lj.lora(transformer)(params, x) ** 2)
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    state = step(step(state))
    assert state.step == 2
    assert bits(lj.strip(state.params)) == bits(lj.strip(params))
    moved = state.params["layers"][0]["down"]["lora_a"]
    assert (moved != params["layers"][0]["down"]["lora_a"]).any()


# Donation


def trained_by(tx, loss):
    """Returns one step of the documentation, which donates its arguments."""

    @jax.jit(donate_argnums=(0, 1))
    def step(params, state, *rest):
        updates, state = tx.update(jax.grad(loss)(params, *rest), state, params)
        return optax.apply_updates(params, updates), state

    return step


def product(params, x):
    return x @ params["m"]["kernel"] @ params["head"]


def test_adapters_only_donation_deletes_shared_arrays():
    # `device_put` may share the memory of a NumPy array, which JAX cannot donate.
    base = jax.tree.map(jnp.copy, lj.strip(small()))
    params, other = (lj.lorafy(base, 2, targets="kernel") for _ in range(2))
    tx = lj.adapters_only(optax.sgd(0.5))
    loss = lambda params: jnp.sum(lj.lora(product)(params, jnp.ones((2, 3))))
    buffer = params["m"]["kernel"].unsafe_buffer_pointer()
    params, _ = trained_by(tx, loss)(params, tx.init(params))
    assert params["m"]["kernel"].unsafe_buffer_pointer() == buffer
    assert np.isfinite(lj.merge(params)["m"]["kernel"]).all()
    for lost in (base, other):
        with pytest.raises(RuntimeError, match="Array has been deleted"):
            product(lost, jnp.ones((2, 3)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(lj.split(other)[0]))


def test_split_donation_keeps_the_base():
    # `device_put` may share the memory of a NumPy array, which JAX cannot donate.
    base = jax.tree.map(jnp.copy, lj.strip(small()))
    params, other = (lj.lorafy(base, 2, targets="kernel") for _ in range(2))
    tx, run = optax.sgd(0.5), lj.lora(product)
    loss = lambda a, b: jnp.sum(run(lj.combine(a, b), jnp.ones((2, 3))))
    adapters, frozen = lj.split(params)
    adapters, _ = trained_by(tx, loss)(adapters, tx.init(adapters), frozen)
    assert not any(x.is_deleted() for x in jax.tree.leaves((base, other)))
    params = lj.combine(adapters, frozen)
    assert params["m"]["kernel"] is base["m"]["kernel"]
    assert (run(params, jnp.ones((2, 3))) != run(other, jnp.ones((2, 3)))).any()


def test_split_trains_a_tree_with_an_array_twice():
    table = jnp.copy(normal(3, 3))
    params = lj.lorafy({"m": {"kernel": table}, "head": table}, 2, targets="kernel")
    x = jnp.ones((2, 3))
    tx, loss_of = optax.sgd(0.5), lambda params: jnp.sum(lj.lora(product)(params, x))
    only = lj.adapters_only(tx)
    twice = "donate the same buffer twice"
    with pytest.raises(jax.errors.JaxRuntimeError, match=twice):
        trained_by(only, loss_of)(params, only.init(params))
    adapters, frozen = lj.split(params)
    step = trained_by(tx, lambda a, b: loss_of(lj.combine(a, b)))
    adapters, _ = step(adapters, tx.init(adapters), frozen)
    assert np.isfinite(adapters["m"]["lora_b"]).all() and not table.is_deleted()


# Reading gradients outside the optimizer


def clipped(tx):
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


SGD = optax.sgd(0.1)
READERS = {
    "nothing": (lj.adapters_only(SGD), lambda grads: 0.0),
    "the norm of the adapters": (
        lj.adapters_only(SGD),
        lambda grads: optax.tree.norm(lj.split(grads)[0]),
    ),
    "a clip inside": (lj.adapters_only(clipped(SGD)), lambda grads: 0.0),
    "a finite check inside": (
        lj.adapters_only(optax.apply_if_finite(SGD, 3)),
        lambda grads: 0.0,
    ),
    "the norm of all": (lj.adapters_only(SGD), optax.tree.norm),
    "a clip outside": (clipped(lj.adapters_only(SGD)), lambda grads: 0.0),
}


@functools.cache
def flops_with(name):
    tx, log = READERS[name]
    kernels = {str(i): {"kernel": np.ones((64, 64), np.float32)} for i in range(3)}
    params, x = lj.lorafy(kernels, 2), np.ones((32, 64), np.float32)

    def fn(params, x):
        for name in params:
            x = jnp.tanh(x @ params[name]["kernel"])
        return x

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean(lj.lora(fn)(p, x) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, log(grads)

    state = jax.eval_shape(tx.init, params)
    return step.lower(params, state).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("name", list(READERS)[1:4])
def test_adapters_only_reading_adapter_gradients_costs_nothing(name):
    # Some operations for each of the adapters' elements, and no product.
    assert flops_with(name) < 1.01 * flops_with("nothing")


@pytest.mark.parametrize("name", list(READERS)[4:])
def test_adapters_only_reading_all_gradients_computes_them(name):
    assert flops_with(name) > 1.3 * flops_with("nothing")


# Devices of the state


def on_mesh(kind):
    devices = jax.devices()[:4]
    if kind == "one device":
        return jax.device_put(lj.strip(small()), devices[3])
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,), devices=devices)
    shape = {"m": {"kernel": (4, 8)}, "head": (8, 4)}
    place = NamedSharding(mesh, PartitionSpec(None, "x"))
    put = lambda shape: jax.device_put(np.ones(shape, np.float32), place)
    return jax.tree.map(put, shape, is_leaf=lambda x: isinstance(x, tuple))


STATES = {
    "adamw": lambda: optax.adamw(0.1),
    "a rate in the state": lambda: optax.inject_hyperparams(optax.sgd)(0.1),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
    "L-BFGS": lambda: optax.scale_by_lbfgs(2),
    "noise from a key": lambda: optax.add_noise(0.1, 0.1, jax.random.key(0)),
}


KINDS = [(name, AxisType.Auto) for name in STATES]
KINDS += [("adamw", "one device"), ("adamw", AxisType.Explicit)]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_adapters_only_state_is_on_the_devices_of_the_adapters(name, kind):
    params, tx = lj.lorafy(on_mesh(kind), 2, targets="kernel"), STATES[name]()
    devices = params["m"]["kernel"].sharding.device_set
    state = lj.adapters_only(tx).init(params)
    plain = tx.init(lj.split(params)[0])
    assert jax.tree.structure(state) == jax.tree.structure(plain)
    for x, want in zip(jax.tree.leaves(state), jax.tree.leaves(plain), strict=True):
        assert x.committed and x.sharding.device_set == devices
        weak, want_weak = (jax.typeof(y).weak_type for y in (x, want))
        assert x.dtype == want.dtype and weak == want_weak
        assert (x == want).all()
        if want.committed:
            assert x.sharding == want.sharding


def test_adapters_only_keeps_an_uncommitted_state():
    params, tx = small(), lj.adapters_only(optax.adam(0.1))
    assert not any(x.committed for x in jax.tree.leaves(tx.init(params)))
    apart = jax.device_put(params["m"]["lora_a"], jax.devices()[1])
    params["m"]["lora_b"] = jax.device_put(params["m"]["lora_b"], jax.devices()[2])
    state = tx.init(params | {"m": params["m"] | {"lora_a": apart}})
    assert not state[0].count.committed
    shapes = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
