"""`mix` equals each adapter alone, in values and gradients, and gathers no factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lj

N, BATCH, TIME, WIDTH, VOCAB, LAYERS, EXPERTS = 5, 6, 4, 8, 11, 2, 3
IDS = np.array([3, 0, 3, 4, 1, 0])


def draw(rng, *shape):
    return jax.device_put(np.asarray(rng.standard_normal(shape) / 3, np.float32))


def base():
    rng = np.random.default_rng(0)
    return {
        "embed": {"embedding": draw(rng, VOCAB, WIDTH)},
        "heads": {"kernel": draw(rng, WIDTH, 2, 4)},
        "back": {"kernel": draw(rng, WIDTH, WIDTH)},  # stored as (out, in)
        "conv": {"kernel": draw(rng, 3, WIDTH, WIDTH)},
        "blocks": {"kernel": draw(rng, LAYERS, WIDTH, WIDTH)},
        "experts": {"kernel": draw(rng, EXPERTS, WIDTH, WIDTH)},
    }


def fn(params, ids):
    """Maps tokens (time,) to (time, vocab), with every kind of product."""
    x = jnp.take(params["embed"]["embedding"], ids, axis=0)
    x = jnp.einsum("ti,ihd->thd", x, params["heads"]["kernel"]).reshape(x.shape)
    x = jnp.tanh(x) @ params["back"]["kernel"].T
    x = jax.lax.conv_general_dilated(
        x[None],
        params["conv"]["kernel"],
        (1,),
        "SAME",
        dimension_numbers=("NTC", "TIO", "NTC"),
    )[0]
    x, _ = jax.lax.scan(
        lambda x, w: (jnp.tanh(x @ w), None), x, params["blocks"]["kernel"]
    )
    x = jnp.einsum("ti,eio->teo", x, params["experts"]["kernel"]).sum(1)
    return jnp.tanh(x) @ params["embed"]["embedding"].T


AXES = {
    "heads/kernel": lj.Axes((), (0,), (1, 2)),
    "back/kernel": lj.Axes((), (1,), (0,)),
    "conv/kernel": lj.Axes((), (0, 1), (2,)),
    "blocks/kernel": lj.Axes((0,), (1,), (2,)),
    "experts/kernel": lj.Axes((0,), (1,), (2,)),
}


def stacked(plain=None, targets="*", seed=1):
    plain = base() if plain is None else plain
    make = lambda plain: lj.lorafy(plain, 2, targets=targets, axes=AXES, stack=N)
    rng, start = np.random.default_rng(seed), jax.eval_shape(make, plain)
    adapters, _ = lj.split(start)
    drawn = jax.tree.map(lambda x: draw(rng, *x.shape), adapters)
    new = lj.combine(drawn, lj.split(make(plain))[1])
    for leaves in new.values():
        if "lora_scale" not in leaves:
            continue
        shape = leaves["lora_scale"].shape
        leaves["lora_scale"] = abs(draw(rng, *shape)) + 0.5
    return new


def tokens():
    return np.random.default_rng(2).integers(0, VOCAB, (BATCH, TIME))


def over(params):
    return jax.vmap(lj.lora(fn), in_axes=(lj.in_axes(params), 0))


def alone(params, ids, x):
    """Each example with the merged weights of its adapter."""
    each = [
        fn(lj.merge(lj.take(params, int(i))), row)
        for i, row in zip(ids, x, strict=True)
    ]
    return jnp.stack(each)


@pytest.mark.parametrize("most", [None, 4, 5])
def test_mix_equals_each_adapter_alone(most):
    params, x = stacked(), tokens()
    mixed = lj.mix(params, IDS, most=most)
    rank = 2 * (N if most is None else most)
    assert mixed["back"]["lora_a"].shape[-1] == rank
    assert mixed["blocks"]["lora_scale"].shape == (BATCH, LAYERS, rank)
    want = alone(params, IDS, x)
    np.testing.assert_allclose(over(mixed)(mixed, x), want, atol=2e-5)
    traced = jax.jit(lambda ids: over(mixed)(lj.mix(params, ids, most=most), x))
    np.testing.assert_allclose(traced(IDS), want, atol=2e-5)
    plain = fn(lj.strip(params), x[0])
    assert abs(plain - want[0]).max() > 0.1


def test_mix_copies_no_factors():
    """Only the scale has a dimension of examples."""
    mixed = lj.mix(stacked(), IDS)
    axes = lj.in_axes(mixed)
    mapped = {p for p, axis in jax.tree_util.tree_leaves_with_path(axes) if axis == 0}
    assert {p[-1].key for p in mapped} == {"lora_scale"} and len(mapped) == len(mixed)
    text = str(jax.make_jaxpr(over(mixed))(mixed, tokens()))
    for name in ("heads", "back", "blocks"):
        b = mixed[name]["lora_b"].shape
        assert "f32[" + ",".join(map(str, (BATCH, *b))) + "]" not in text, name


def test_mix_trains_each_adapter_with_its_own_examples():
    params, x = stacked(), tokens()
    adapters, rest = lj.split(params)

    def loss(adapters, mixed):
        params = lj.combine(adapters, rest)
        y = over(mixed(params))(mixed(params), x)
        return jnp.sum(jnp.sin(y))

    got = jax.grad(loss)(adapters, lambda params: lj.mix(params, IDS))
    few = jax.grad(loss)(adapters, lambda params: lj.mix(params, IDS, most=4))
    want = jax.grad(loss)(adapters, lambda params: lj.take(params, IDS))
    for one in (got, few):
        for path, x in jax.tree_util.tree_leaves_with_path(one):
            y = dict(jax.tree_util.tree_leaves_with_path(want))[path]
            np.testing.assert_allclose(x, y, atol=5e-4, err_msg=str(path))
    assert not np.asarray(got["back"]["lora_a"][2]).any()  # of no example


def test_mix_of_weights_and_their_gradient():
    params, x = stacked(targets=["heads", "blocks"]), tokens()
    weights = abs(np.random.default_rng(3).standard_normal((BATCH, N))).astype("f")

    def run(weights):
        mixed = lj.mix(params, weights)
        run = jax.vmap(lj.lora(fn, gates=True), in_axes=(lj.in_axes(mixed), 0))
        return run(mixed, x)

    def want(weights):
        def one(c, row):
            w = dict(lj.strip(params))
            for name in ("heads", "blocks"):
                p = params[name]
                rule = "nir,nrhd,n->ihd" if name == "heads" else "nlir,nlro,nl->lio"
                s = p["lora_scale"]
                s = s * (c if name == "heads" else c[:, None])
                update = jnp.einsum(rule, p["lora_a"], p["lora_b"], s)
                w[name] = {"kernel": p["kernel"] + update}
            return fn(w, row)

        return jax.vmap(one)(weights, x)

    np.testing.assert_allclose(run(weights), want(weights), atol=2e-5)
    grad = lambda run: jax.grad(lambda c: jnp.sum(jnp.sin(run(c))))(weights)
    assert abs(grad(run)).max() > 0.01
    np.testing.assert_allclose(grad(run), grad(want), atol=2e-4)


def test_mix_gives_no_gradient_to_weights_by_default():
    params, x = stacked(targets=["heads"]), tokens()

    def loss(weights):
        mixed = lj.mix(params, weights)
        return jnp.sum(over(mixed)(mixed, x))

    assert not np.asarray(jax.grad(loss)(jnp.ones((BATCH, N)))).any()


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_mix_over_a_quantized_base(how):
    plain = lj.quantize(base(), {"heads": how, "blocks": how, "back": how}, axes=AXES)
    params, x = stacked(plain, targets=["heads", "blocks", "back"]), tokens()
    mixed = lj.mix(params, IDS)
    want = alone(params, IDS, x)
    np.testing.assert_allclose(over(mixed)(mixed, x), want, atol=2e-5)


def test_mix_with_the_examples_over_a_mesh():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params, x = stacked(), tokens()
    rows = NamedSharding(mesh, PartitionSpec("data"))
    put = lambda x: jax.device_put(x, rows)

    @jax.jit
    def run(params, ids, x):
        mixed = lj.mix(params, ids, most=4)
        return over(mixed)(mixed, x)

    got = run(params, put(IDS), put(x))
    assert got.sharding.spec[:1] == ("data",)
    np.testing.assert_allclose(got, alone(params, IDS, x), atol=2e-5)


def test_mix_of_traced_ids_out_of_range():
    params, x = stacked(), tokens()
    ids = np.array([3, N, -1, 4, 1, 0])
    for most, gone in ((None, [1, 2]), (4, [1, 2]), (2, [0, 1, 2, 3])):

        @jax.jit
        def run(ids, most=most):
            mixed = lj.mix(params, ids, most=most)
            return over(mixed)(mixed, x)

        got = run(ids)
        kept = [i for i in range(BATCH) if i not in gone]
        want = alone(params, ids[kept], x[kept])
        np.testing.assert_allclose(got[np.array(kept)], want, atol=2e-5)
        plain = jnp.stack([fn(lj.strip(params), x[i]) for i in gone])
        np.testing.assert_allclose(got[np.array(gone)], plain, atol=2e-5)


def test_mix_of_one_index_is_one_adapter(close):
    params, x = stacked(), tokens()
    got = lj.lora(fn)(lj.mix(params, 3, most=1), x[0])
    close(got, fn(lj.merge(lj.take(params, 3)), x[0]))


def test_mix_of_stacks_with_scales_of_ranks(close):
    """As `add` makes them: the scales of ranks are multiplied by those of examples."""
    one, two = (lj.take(stacked(seed=i), 0) for i in (1, 2))
    both, x = lj.stack([lj.add(one, two, weights=[0.5, -1]), one]), tokens()
    ids = np.array([0, 1, 1, 0, 0, 1])
    mixed = lj.mix(both, ids)
    np.testing.assert_allclose(over(mixed)(mixed, x), alone(both, ids, x), atol=5e-5)


def test_mix_refuses(randomized):
    plain = {"a": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    both = lj.lorafy(plain, 2, stack=3)
    with pytest.raises(ValueError, match="belongs to one adapter, not to a stack"):
        lj.mix(lj.lorafy(plain, 2), [0, 1])
    dora = lj.lorafy(plain, 2, stack=3, dora=True)
    with pytest.raises(ValueError, match=r"'a/kernel' has magnitudes.*take\("):
        lj.mix(dora, [0, 1])
    copies = lj.lorafy(plain, 2, stack=3, also="bias")
    with pytest.raises(ValueError, match=r"'a/bias' has a trained copy.*take\("):
        lj.mix(copies, [0, 1])
    with pytest.raises(IndexError, match=r"ids .3. are out of range"):
        lj.mix(both, [0, 3])
    with pytest.raises(ValueError, match=r"has 3 different adapters, and most=2"):
        lj.mix(both, [0, 1, 2], most=2)
    with pytest.raises(ValueError, match="most must be a whole number above 0"):
        lj.mix(both, [0, 1], most=0)
    with pytest.raises(TypeError, match=r"shape \(batch, 3\).*found \(2, 4\)"):
        lj.mix(both, jnp.ones((2, 4)))
    with pytest.raises(TypeError, match="most= is for indices"):
        lj.mix(both, jnp.ones((2, 3)), most=1)
    with pytest.raises(ValueError, match=r"lora_scale \(2, 6\) make no update"):
        lj.lora(lambda p, x: x @ p["a"]["kernel"])(lj.mix(both, [0, 1]), jnp.ones(4))
