"""Orbax, which Flax brings along, keeps the adapters of `split`, sharded or not."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj


@pytest.mark.filterwarnings("ignore")  # Orbax's own
@pytest.mark.parametrize("sharded", [False, True])
def test_adapters_come_back(tmp_path, randomized, sharded):
    base = {
        "params": {"up": {"kernel": jnp.ones((4, 8))}, "norm": {"scale": jnp.ones(8)}}
    }
    if sharded:
        mesh = jax.make_mesh((2, 4), ("x", "y"))
        place = lambda x: NamedSharding(mesh, P("x", "y") if x.ndim == 2 else P())
        base = jax.tree.map(lambda x: jax.device_put(x, place(x)), base)
    params = lj.lorafy(base, 2)
    adapters, _ = lj.split(params)
    shardings = jax.tree.map(lambda x: x.sharding, adapters)
    adapters, frozen = lj.split(randomized(params))
    adapters = jax.tree.map(jax.device_put, adapters, shardings)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "adapters", adapters)
    size = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert size < 40_000
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), adapters
    )
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "adapters", like)
    assert jax.tree.structure(found) == jax.tree.structure(adapters)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(adapters), strict=True):
        assert x.sharding == y.sharding
        np.testing.assert_array_equal(x, y)
    merged = lj.merge(lj.combine(found, frozen))
    np.testing.assert_array_equal(
        merged["params"]["up"]["kernel"],
        lj.merge(lj.combine(adapters, frozen))["params"]["up"]["kernel"],
    )
