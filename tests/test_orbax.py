"""Orbax saves and restores adapters, optimizer states and quantized bases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # warnings of Orbax
    pytest.mark.usefixtures("optax_promotion"),
]


def fn(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"]) * params["norm"]["scale"][None]
    return h @ params["head"]


def on_mesh(*sizes):
    """Returns the sharding of each weight of the base, on a mesh of some devices."""
    devices = jax.devices()[: np.prod(sizes)]
    auto = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh(sizes, ("x", "y"), axis_types=auto, devices=devices)
    sharding = lambda *axes: NamedSharding(mesh, P(*axes))
    scale = {"scale": sharding("y")}
    return {"up": {"kernel": sharding("x", "y")}, "norm": scale, "head": sharding()}


def start(alpha, shardings=None):
    """Returns the base with new adapters, as a new process loads it."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    base = {
        "up": {"kernel": draw(4, 8)},
        "norm": {"scale": draw(8)},
        "head": draw(8, 2),
    }
    base = jax.device_put(base, shardings)
    return lj.lorafy(base, 2, alpha=alpha, also="head")


X = np.ones((3, 4), np.float32)
TX = lj.adapters_only(optax.adam(0.1))


def make_step(**options):
    @jax.jit(donate_argnums=(0, 1), **options)
    def step(params, state):
        loss = lambda params: jnp.sum(lj.lora(fn)(params, X) ** 2)
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = TX.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def save(path, params, state):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"adapters": lj.detach(params), "optimizer": state})


def restore(path, *like):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, *like)


WHERE = {
    "one device": (None, False),
    "a mesh, XLA's choice": ((2, 4), False),
    "a mesh, out_shardings": ((2, 4), True),
}


@pytest.mark.parametrize("name", WHERE)
def test_detach_and_attach_resume_training_with_the_same_step(tmp_path, name, close):
    sizes, pinned = WHERE[name]
    shardings = on_mesh(*sizes) if sizes else None
    params = start(alpha=6, shardings=shardings)
    state = TX.init(params)
    out = jax.tree.map(lambda x: x.sharding, (params, state))
    step = make_step(out_shardings=(*out, None)) if pinned else make_step()
    params, state, _ = step(params, state)
    save(tmp_path / "step", params, state)
    size = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert size < 60_000
    *want, _ = step(params, state)

    # In a new process: another alpha, which the checkpoint overrides.
    params = start(alpha=1, shardings=shardings)
    like = {"adapters": lj.detach(params), "optimizer": TX.init(params)}
    found = restore(tmp_path / "step", like)
    params = lj.attach(found["adapters"], lj.strip(params))
    assert params["up"]["lora_scale"] == 3
    *got, _ = step(params, found["optimizer"])
    close(got, want, atol=1e-6)
    if name == "a mesh, XLA's choice":
        return  # XLA may sum over the devices in another order after the first step
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        np.testing.assert_array_equal(x, y)


def test_detach_and_attach_resume_training_on_another_mesh(tmp_path):
    params = start(alpha=6, shardings=on_mesh(2, 4))
    params, state, _ = make_step()(params, TX.init(params))
    save(tmp_path / "step", params, state)
    *_, want = make_step()(params, state)

    params = start(alpha=6, shardings=on_mesh(1, 2))
    like = {"adapters": lj.detach(params), "optimizer": TX.init(params)}
    found = restore(tmp_path / "step", like)
    params = lj.attach(found["adapters"], lj.strip(params))
    *_, got = make_step()(params, found["optimizer"])
    assert len(got.sharding.device_set) == 2
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_split_adapters_resume_if_scalars_are_on_the_mesh(tmp_path, close):
    params, tx = start(alpha=6, shardings=on_mesh(2, 4)), optax.adam(0.1)
    adapters, base = lj.split(params)
    everywhere = params["head"].sharding

    def init(adapters):
        put = lambda x: x if x.ndim else jax.device_put(x, everywhere)
        return jax.tree.map(put, tx.init(adapters))

    @jax.jit
    def step(adapters, state):
        run = lambda adapters: lj.lora(fn)(lj.combine(adapters, base), X)
        grads = jax.grad(lambda adapters: jnp.sum(run(adapters) ** 2))(adapters)
        updates, state = tx.update(grads, state, adapters)
        return optax.apply_updates(adapters, updates), state

    kept = step(adapters, init(adapters))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", kept)
    found = restore(tmp_path / "step", (adapters, init(adapters)))
    close(step(*found), step(*kept), atol=1e-6)


def test_attach_what_orbax_restores_without_a_target(tmp_path):
    params = start(alpha=6)
    state = TX.init(params)
    save(tmp_path / "step", params, state)
    found = restore(tmp_path / "step")
    attached = lj.attach(found["adapters"], lj.strip(params))
    assert jax.tree.structure(attached) == jax.tree.structure(params)
    for x, y in zip(jax.tree.leaves(attached), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(AttributeError, match="'dict' object has no attribute 'mu'"):
        TX.update(params, found["optimizer"], params)


# Quantized bases

AXES = {"stack/kernel": lj.Axes((0,), (1,), (2,))}


def make_base(sharded):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    base = {
        "up": {"kernel": draw(16, 8), "bias": draw(8)},
        "stack": {"kernel": draw(4, 16, 8)},
    }
    if sharded:
        mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
        spec = {1: P(), 2: P("x", "y"), 3: P("y", None, "x")}
        sharding = lambda x: NamedSharding(mesh, spec[x.ndim])
        base = jax.tree.map(lambda x: jax.device_put(x, sharding(x)), base)
    return base


def shapes(tree):
    sharding = lambda x: getattr(x, "sharding", None)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), tree
    )


def save_base(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "base", tree)
    return folder / "base"


def restored(path, *target):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, *target)


@pytest.mark.filterwarnings("ignore")  # warnings of Orbax
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("how", ["int8", "int4", "nf4"])
def test_quantize_of_shapes_is_a_target_to_restore_a_base(tmp_path, how, sharded):
    """Restores the same bits on the same devices; the target contains no arrays."""
    base = make_base(sharded)
    quantized = lj.quantize(base, how, axes=AXES, block=4)
    path = save_base(tmp_path, quantized)
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
def test_quantize_in_another_format_is_no_target(tmp_path, how):
    base = make_base(False)
    path = save_base(tmp_path, lj.quantize(base, how, axes=AXES, block=4))
    for other in {"int8", "int4", "nf4"} - {how}:
        target = lj.quantize(shapes(base), other, axes=AXES, block=4)
        with pytest.raises(ValueError, match=f"kernel.{other}"):
            restored(path, target)


@pytest.mark.filterwarnings("ignore")
def test_dequantize_refuses_a_base_restored_without_a_target(tmp_path):
    base = make_base(False)
    quantized = lj.quantize(base, "nf4", axes=AXES, block=4)
    loose = restored(save_base(tmp_path, quantized))
    match = r"'(up|stack)/kernel' is a dict of 'nf4' and 'scale'.*Restore with a tar"
    for use in (lj.dequantize, lambda p: lj.quantize(p, "nf4")):
        with pytest.raises(ValueError, match=match):
            use(loose)
    parts = loose["up"]["kernel"]
    made = lj.Quantized(parts["nf4"], parts["scale"], (jnp.bfloat16,), "nf4")
    assert jax.tree.structure(made) == jax.tree.structure(quantized["up"]["kernel"])
