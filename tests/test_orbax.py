"""Orbax, which Flax brings along, keeps what `detach` gives, sharded or not."""

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
