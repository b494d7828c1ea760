"""Orbax, which Flax installs, stores adapters and quantized bases, sharded or not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj


def fn(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"]) * params["norm"]["scale"][None]
    return h @ params["head"]


def start(alpha, sharded=False):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    base = {
        "up": {"kernel": draw(4, 8)},
        "norm": {"scale": draw(8)},
        "head": draw(8, 2),
    }
    if sharded:
        mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
        place = lambda x: NamedSharding(
            mesh, P("x", "y") if x.shape[1:] == (8,) else P()
        )
        base = jax.tree.map(lambda x: jax.device_put(x, place(x)), base)
    return lj.lorafy(base, 2, alpha=alpha, also="head")


@pytest.mark.filterwarnings("ignore")  # Orbax's own
@pytest.mark.parametrize("sharded", [False, True])
def test_training_goes_on_with_the_very_same_step(tmp_path, sharded, optax_promotion):
    tx, x = lj.adapters_only(optax.adam(0.1)), jnp.ones((3, 4))

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.sum(lj.lora(fn)(p, x) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = start(alpha=6, sharded=sharded)
    places = jax.tree.map(lambda x: x.sharding, params)
    params, state = step(params, tx.init(params))
    params = jax.device_put(params, places)  # where they were; the compiler may differ
    kept = {"adapters": lj.detach(params), "optimizer": state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", kept)
    size = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert size < 60_000
    want = step(params, state)

    # In a new process: another alpha, which the checkpoint knows better.
    fresh = start(alpha=1, sharded=sharded)
    # After a step the optimizer's counter too is on all devices.
    _, running = step(fresh, tx.init(fresh))
    like = {"adapters": lj.detach(fresh), "optimizer": running}
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "step", like)
    params = lj.attach(found["adapters"], lj.strip(fresh))
    assert params["up"]["lora_scale"] == 3
    got = step(params, found["optimizer"])
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        np.testing.assert_array_equal(x, y)


# Quantized bases

AXES = {"stack/kernel": lj.Axes((0,), (1,), (2,))}


def base_of(sharded):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    base = {
        "up": {"kernel": draw(16, 8), "bias": draw(8)},
        "stack": {"kernel": draw(4, 16, 8)},
    }
    if sharded:
        mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
        spec = {1: P(), 2: P("x", "y"), 3: P("y", None, "x")}
        place = lambda x: NamedSharding(mesh, spec[x.ndim])
        base = jax.tree.map(lambda x: jax.device_put(x, place(x)), base)
    return base


def shapes(tree):
    sharding = lambda x: getattr(x, "sharding", None)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), tree
    )


def stored_in(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "base", tree)
    return folder / "base"


def restored(path, *target):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, *target)


@pytest.mark.filterwarnings("ignore")  # Orbax's own
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("how", ["int8", "int4", "nf4"])
def test_a_quantized_base_is_restored_bit_for_bit(tmp_path, how, sharded):
    """Into shapes, which no weight has been made for, and on the same devices."""
    base = base_of(sharded)
    quantized = lj.quantize(base, how, axes=AXES, block=4)
    path = stored_in(tmp_path, quantized)
    target = lj.quantize(shapes(base), how, axes=AXES, block=4)
    got = restored(path, target)
    assert jax.tree.structure(got) == jax.tree.structure(quantized)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(quantized), strict=True)
    for x, y in pairs:
        assert x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim)
        np.testing.assert_array_equal(x, y)
    params = lj.lorafy(got, 2, axes=AXES)
    assert params["up"]["kernel"] is got["up"]["kernel"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["int8", "int4", "nf4"])
def test_a_quantized_base_is_restored_in_no_other_format(tmp_path, how):
    base = base_of(False)
    path = stored_in(tmp_path, lj.quantize(base, how, axes=AXES, block=4))
    for other in {"int8", "int4", "nf4"} - {how}:
        target = lj.quantize(shapes(base), other, axes=AXES, block=4)
        with pytest.raises(ValueError, match=f"kernel.{other}"):
            restored(path, target)


@pytest.mark.filterwarnings("ignore")
def test_a_base_that_was_restored_without_a_target_is_refused(tmp_path):
    base = base_of(False)
    quantized = lj.quantize(base, "nf4", axes=AXES, block=4)
    loose = restored(stored_in(tmp_path, quantized))
    match = (
        r"'(up|stack)/kernel' is a mapping with 'nf4' and 'scale'.*Restore with a tar"
    )
    for use in (lj.dequantize, lambda p: lj.quantize(p, "nf4")):
        with pytest.raises(ValueError, match=match):
            use(loose)
    parts = loose["up"]["kernel"]
    made = lj.Quantized(parts["nf4"], parts["scale"], (jnp.bfloat16,), "nf4")
    assert jax.tree.structure(made) == jax.tree.structure(quantized["up"]["kernel"])
