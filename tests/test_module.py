"""A live module with adapters is that module with merged weights, in all it does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax as lj

pytestmark = pytest.mark.usefixtures("third_party")
TRAINS = nnx.DiffState(0, nnx.LoRAParam)


class Net(nnx.Module):
    """Most of what a module may keep: counts, statistics, lists, a table, a head."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def features(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.norm(x)

    def __call__(self, ids):
        self.calls[...] += 1
        return self.head(self.drop(self.features(ids)))


IDS = jnp.array([[0, 3, 6], [1, 1, 2]])


def net(seed=0):
    return Net(nnx.Rngs(seed))


def moved(module, seed=1):
    """The module with random factors, as after some training."""
    rng = np.random.default_rng(seed)
    state = nnx.state(module, nnx.LoRAParam)
    draw = lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), x.dtype)
    nnx.update(module, jax.tree.map(draw, state))
    return module


def adapted(rank=2, model=None, **options):
    options = {"targets": ["kernel", "embedding"], "alpha": 3.0} | options
    return moved(lj.LoRA(net() if model is None else model, rank, **options))


def by_hand(module, model):
    """The given model with W + scale A B, summed in NumPy."""
    model = nnx.clone(model)
    leaves = {
        "/".join(map(str, path)): np.asarray(x[...], np.float64)
        for path, x in nnx.to_flat_state(nnx.state(module.model))
        if jnp.issubdtype(getattr(x, "dtype", int), jnp.floating)
    }
    new = []
    for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        beside = "/".join(map(str, path[:-1]))
        if f"{beside}/lora_a" in leaves and path[-1] in ("kernel", "embedding"):
            a, b, s = (leaves[f"{beside}/lora_{n}"] for n in ("a", "b", "scale"))
            x = x.replace(jax.device_put(np.asarray(x[...]) + s * a @ b, x.dtype))
        new.append((path, x))
    nnx.update(model, nnx.from_flat_state(new))
    return model


def same(got, want, atol=1e-5):
    np.testing.assert_allclose(got, want, atol=atol, rtol=1e-5)


def kept(model):
    """What a model keeps as it runs, by path: not its weights."""
    flat = nnx.to_flat_state(nnx.state(model))
    other = [(p, x) for p, x in flat if not isinstance(x, nnx.Param)]
    other = [(p, x) for p, x in other if "lora" not in str(p[-1])]
    return {p: x[...] for p, x in other if not isinstance(x, nnx.RngKey)}


def test_starts_as_the_model_and_leaves_it_as_it_was():
    model = net()
    before = jax.tree.leaves(nnx.state(model))
    module = lj.LoRA(model, 2)
    same(module(IDS), nnx.clone(model)(IDS))
    after = jax.tree.leaves(nnx.state(model))
    assert all(x is y for x, y in zip(before, after, strict=True))
    assert type(module.model) is Net and module.model is not model


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_calls_are_those_of_merged_weights_with_all_that_they_keep(jit):
    model = net()
    module, plain = adapted(model=model), by_hand(adapted(model=model), model)
    run = (nnx.jit if jit else lambda f: f)(lambda module, x: module(x))
    for _ in range(2):  # another mask and other statistics each time
        same(run(module, IDS), run(plain, IDS))
    got, want = kept(module.model), kept(plain)
    assert got.keys() == want.keys()
    for path, x in want.items():
        same(got[path], x)
    assert got["calls",] == 2
    assert got["drop", "rngs", "count"] == 2


def test_eval_and_train_reach_the_model():
    module = adapted()
    plain = by_hand(module, net())
    module.eval(), plain.eval()
    assert module.deterministic
    same(module(IDS), plain(IDS))
    same(module(IDS), module(IDS))
    module.train()
    assert np.abs(module(IDS) - module(IDS)).max() > 1e-3


def test_other_methods_have_the_adapters_too():
    module = adapted()
    plain = by_hand(module, net())
    module.eval(), plain.eval()
    same(module.features(IDS), plain.features(IDS))
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'.*no method"):
        module.nothing  # noqa: B018
    with pytest.raises(AttributeError, match=r"module\.model\.layers, without"):
        module.layers  # noqa: B018


def test_gradients_are_those_of_the_formula():
    module = adapted(rank=2)
    module.eval()
    loss = lambda module: jnp.sum(module(IDS) ** 2)
    grads = nnx.grad(loss, argnums=TRAINS)(module)
    plain = by_hand(module, net())
    plain.eval()
    dense = nnx.grad(lambda m: jnp.sum(m(IDS) ** 2))(plain)
    for path, g in nnx.to_flat_state(dense):
        if path[-1] != "kernel":
            continue
        own = grads
        leaves = module.model
        for key in path[:-1]:
            own = own["model"] if own is grads else own
            own = own[key]
            leaves = leaves[key] if isinstance(key, int) else getattr(leaves, key)
        a, b, s = leaves.lora_a[...], leaves.lora_b[...], leaves.lora_scale[...]
        same(own["lora_a"][...], s * g[...] @ b.T, 1e-4)
        same(own["lora_b"][...], s * a.T @ g[...], 1e-4)
    trained = {type(x) for _, x in nnx.to_flat_state(grads)}
    assert trained == {nnx.LoRAParam}


def test_trains_with_nnx_optimizer_and_nothing_else_moves():
    module = adapted(also="head/bias")
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.LoRAParam)
    frozen = {
        path: np.asarray(x[...])
        for path, x in nnx.to_flat_state(nnx.state(module.model, nnx.Param))
        if not isinstance(x, nnx.LoRAParam)
    }
    traced = []

    @nnx.jit
    def step(module, optimizer, ids):
        traced.append(1)
        loss = lambda module: jnp.mean((module(ids) - 1) ** 2)
        value, grads = nnx.value_and_grad(loss, argnums=TRAINS)(module)
        optimizer.update(module, grads)
        return value

    losses = [float(step(module, optimizer, IDS)) for _ in range(40)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert len(traced) <= 2
    for path, x in nnx.to_flat_state(nnx.state(module.model, nnx.Param)):
        if not isinstance(x, nnx.LoRAParam):
            np.testing.assert_array_equal(x[...], frozen[path])
    assert module.model.head.bias_lora_w[...].any()
    assert module.model.calls[...] == 40


def test_frozen_gradients_are_not_computed():
    """A wide layer: a step with its gradient would take half as many FLOPs again."""
    wide = nnx.Sequential(*(nnx.Linear(64, 64, rngs=nnx.Rngs(i)) for i in range(3)))
    module = lj.LoRA(wide, 1)
    graph, state = nnx.split(module)
    x = jnp.ones((128, 64))

    def grads(state):
        module = nnx.merge(graph, state)
        return nnx.grad(lambda m: jnp.sum(m(x) ** 2), argnums=TRAINS)(module)

    flops = jax.jit(grads).lower(state).compile().cost_analysis()["flops"]
    products = 2 * 128 * 64 * 64
    assert flops < 1.25 * 5 * products  # 3 forward, 2 back: with those of W it were 8


def test_splits_merges_and_clones():
    module = adapted()
    module.eval()
    want = module(IDS)
    graph, state = nnx.split(module)
    same(nnx.merge(graph, state)(IDS), want)
    same(nnx.clone(module)(IDS), want)
    paths = {
        path[-1] for path, _ in nnx.to_flat_state(nnx.state(module, nnx.LoRAParam))
    }
    assert paths == {"lora_a", "lora_b"}


def test_merge_gives_a_plain_model():
    module = adapted()
    merged, plain = module.merge(), by_hand(module, net())
    assert type(merged) is Net
    assert jax.tree.structure(nnx.state(merged)) == jax.tree.structure(nnx.state(net()))
    merged.eval(), plain.eval(), module.eval()
    same(merged(IDS), plain(IDS))
    same(merged(IDS), module(IDS))
    merged.head.bias[...] += 1
    assert not module.model.head.bias[...].any()


def test_dropout_of_the_adapters():
    module = adapted(dropout=0.5, rngs=nnx.Rngs(5))
    module.eval()
    still = module(IDS)
    same(still, module(IDS))
    module.train()
    module.model.eval()  # so that the adapters' own dropout is all there is
    one, two = module(IDS), module(IDS)
    assert np.abs(one - two).max() > 1e-3
    assert module.rngs.dropout.count[...] == 2


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, decode=True, rngs=rngs)

    def start(self, shape):
        self.attention.init_cache(shape, dtype=jnp.float32)

    def __call__(self, x):
        return self.attention(x)


def test_caches_are_made_and_filled():
    model = Decoder(nnx.Rngs(0))
    axes = {
        f"attention/{name}/kernel": lj.Axes((), (0,), (1, 2))
        for name in ("query", "key", "value")
    } | {"attention/out/kernel": lj.Axes((), (0, 1), (2,))}
    module = moved(lj.LoRA(model, 2, axes=axes))
    plain = module.merge()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 4)), jnp.float32)
    module.start((1, 3, 4)), plain.start((1, 3, 4))
    for t in range(3):
        same(module(x[:, t : t + 1]), plain(x[:, t : t + 1]))
    assert module.model.attention.cache_index[...] == 3
    same(module.model.attention.cached_key[...], plain.attention.cached_key[...])


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x, rngs, scale=1.0, *, name="noise"):
        x = self.layer(x) + rngs.noise.normal(x.shape)
        return {name: x * scale, "weight": self.layer.kernel[...]}


def test_live_arguments_move_and_what_is_no_array_passes():
    module = moved(lj.LoRA(Noisy(nnx.Rngs(0)), 2))
    plain, x = module.merge(), jnp.ones((2, 4))
    ours, theirs = nnx.Rngs(noise=1), nnx.Rngs(noise=1)
    with pytest.warns(UserWarning, match="return"):  # a weight that leaves is formed
        got = module(x, ours, name="sum")
    want = plain(x, theirs, name="sum")
    assert got.keys() == want.keys()
    same(got["sum"], want["sum"])
    same(got["weight"], want["weight"])
    assert ours.noise.count[...] == theirs.noise.count[...] == 1


class Kinds(nnx.Module):
    """What a class may call a method, and what such a method may look at."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 4, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.memo = nnx.Variable({"sum": jnp.zeros(4)})

    def times(self, x, factor):
        return self.layer(x) * factor

    twice = functools.partialmethod(times, factor=2.0)

    @nnx.jit
    def jitted(self, x):
        self.calls[...] += 1
        return self.layer(x)

    @staticmethod
    def static(x):
        return x + 1

    @classmethod
    def called(cls):
        return cls.__name__

    def remember(self, x):
        y = self.layer(x)
        self.memo["sum"] = self.memo["sum"] + y.sum(0)
        return y

    def penalty(self):
        return sum(jnp.sum(w**2) for w in jax.tree.leaves(nnx.state(self, nnx.Param)))

    def steps(self, x):
        yield self.layer(x)

    class Config:
        pass


X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)


def test_methods_of_every_kind():
    module = moved(lj.LoRA(Kinds(nnx.Rngs(0)), 2))
    plain = module.merge()
    same(module.twice(X), plain.twice(X))
    same(module.jitted(X), plain.jitted(X))
    assert module.model.calls[...] == 1
    assert module.static(1) == 2 and module.called() == "Kinds"
    for _ in range(2):
        same(module.remember(X), plain.remember(X))
    same(module.model.memo["sum"], plain.memo["sum"])
    with pytest.raises(TypeError, match=r"Kinds\.steps goes on after.*loop outside"):
        module.steps(X)
    with pytest.raises(TypeError, match=r"Kinds is no function.*module\.encode"):
        module(X)
    with pytest.raises(AttributeError, match="no attribute 'Config'"):
        module.Config  # noqa: B018


@pytest.mark.filterwarnings("ignore:'layer/kernel' meets")  # squared, it is formed
def test_the_model_finds_no_adapters_in_itself():
    module = moved(lj.LoRA(Kinds(nnx.Rngs(0)), 2))
    merged = by_hand(module, Kinds(nnx.Rngs(0)))
    weights = merged.layer.kernel, merged.layer.bias
    want = sum(np.sum(np.square(w[...])) for w in weights)
    same(module.penalty(), want)
    paths = [path[-1] for path, _ in nnx.to_flat_state(nnx.state(module))]
    assert paths.count("lora_a") == 1  # they are in it again


CLOSURES = {
    "jit": lambda f: jax.jit(lambda x, key: f(x, nnx.Rngs(noise=key))),
    "vmap": lambda f: jax.vmap(
        lambda x, key: f(x[None], nnx.Rngs(noise=key)), (0, None)
    ),
    "grad": lambda f: jax.grad(lambda x, key: f(x, nnx.Rngs(noise=key))["noise"].sum()),
    "scan": lambda f: (
        lambda x, key: jax.lax.scan(
            lambda x, _: (f(x, nnx.Rngs(noise=key))["noise"], None), x, length=2
        )
    ),
}


@pytest.mark.filterwarnings("ignore:'layer/kernel' meets")  # returned, it is formed
@pytest.mark.parametrize("how", CLOSURES)
def test_functions_of_jax_may_close_over_it(how):
    module = moved(lj.LoRA(Noisy(nnx.Rngs(0)), 2))
    plain, key = by_hand(module, Noisy(nnx.Rngs(0))), jax.random.key(1)
    got, want = (CLOSURES[how](model)(X, key) for model in (module, plain))
    jax.tree.map(same, got, want)


class Sows(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        y = self.layer(x)
        self.sow(nnx.Intermediate, "y", y)
        return y


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_what_the_model_sows():
    module = moved(lj.LoRA(Sows(nnx.Rngs(0)), 2))
    y = module(X), module(X)
    (sown,) = nnx.to_flat_state(nnx.pop(module, nnx.Intermediate))
    assert sown[0] == ("model", "y")
    jax.tree.map(same, jax.tree.leaves(sown[1]), list(y))
    if hasattr(nnx, "capture"):  # newer than the oldest Flax
        _, caught = nnx.capture(module, nnx.Intermediate)(X)
        same(jax.tree.leaves(caught)[0], y[0])


class Image(nnx.Module):
    def __init__(self, rngs):
        self.patches = nnx.Conv(2, 3, (2, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.heads = nnx.LinearGeneral(3, (2, 4), rngs=rngs)

    def __call__(self, x):
        return self.heads(self.norm(self.patches(x)))


def test_axes_are_read_off_the_call():
    model = Image(nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 2)), jnp.float32)
    with pytest.raises(ValueError, match="axes=find_axes"):
        lj.LoRA(model, 2)
    graph, state = nnx.split(model)
    call = lambda state, x: nnx.merge(graph, state)(x)
    module = moved(lj.LoRA(model, 2, axes=lj.find_axes(call, state, x)))
    assert module.model.heads.lora_b[...].shape == (2, 2, 4)
    kernel = np.asarray(model.patches.kernel[...])
    own = module.model.patches
    a, b = np.asarray(own.lora_a[...]), np.asarray(own.lora_b[...])
    plain = module.merge()
    same(plain.patches.kernel[...], kernel + a @ b)
    same(module(x), plain(x))
    same(module.model.norm.mean[...], plain.norm.mean[...])
    heads = lj.LoRA(nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0)), 2)
    assert heads.model.query.lora_b[...].shape == (2, 2, 2)  # by its name


class Twice(nnx.Module):
    """One layer in two places, layers in a scan, and remat."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.again = self.first
        keys = jax.random.split(rngs.params(), 3)
        make = nnx.vmap(lambda key: nnx.Linear(4, 4, rngs=nnx.Rngs(key)))
        self.stack = make(keys)

    def __call__(self, x):
        x = nnx.remat(lambda m, x: jnp.tanh(m(x)))(self.first, x)
        x = nnx.scan(
            lambda x, m: jnp.tanh(m(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )(x, self.stack)
        return self.again(x)


def test_shared_layers_scans_and_remat():
    axes = {"stack/kernel": lj.Axes((0,), (1,), (2,))}
    module = moved(lj.LoRA(Twice(nnx.Rngs(0)), 2, axes=axes))
    plain, x = module.merge(), jnp.ones((2, 4))
    state = nnx.state(module.model)
    assert state["stack"]["lora_a"].shape == (3, 4, 2)
    w, a, b = (
        np.asarray(state["again"][n][...]) for n in ("kernel", "lora_a", "lora_b")
    )
    same(plain.first.kernel[...], w + a @ b)
    assert plain.again is plain.first
    same(module(x), plain(x))
    grads = nnx.grad(lambda m: jnp.sum(m(x)), argnums=TRAINS)(module)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_on_a_base_in_few_bits(how):
    model = nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2)))
    nnx.update(model, lj.quantize(nnx.state(model), how, block=4))
    module = moved(lj.LoRA(model, 2))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 8)), jnp.float32)
    same(module(x), module.merge()(x), 1e-4)
    assert isinstance(module.model.layers[0].kernel.get_raw_value(), lj.Quantized)
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.LoRAParam)
    loss = lambda module: jnp.sum(module(x) ** 2)
    before = loss(module)
    optimizer.update(module, nnx.grad(loss, argnums=TRAINS)(module))
    assert loss(module) < before


def test_dora():
    module = moved(lj.LoRA(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), 2, dora=True))
    state = {k: np.asarray(x[...]) for k, x in nnx.state(module.model).items()}
    v = state["kernel"] + state["lora_a"] @ state["lora_b"]
    w = state["lora_magnitude"] * v / np.linalg.norm(v, axis=0)
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    same(module(jnp.asarray(x)), x @ w)


def test_the_state_is_a_tree_from_lorafy(tmp_path):
    module = adapted()
    module.eval()
    state = nnx.state(module.model)
    assert (
        lj.count(state).trainable == 2 * (4 * 2 + 2 * 4) + 7 * 2 + 2 * 4 + 4 * 2 + 2 * 2
    )
    lj.save(tmp_path / "a.safetensors", state)
    fresh = lj.LoRA(net(), 2, targets=["kernel", "embedding"])
    plain = nnx.state(net(), nnx.Param)
    nnx.update(fresh.model, lj.load(tmp_path / "a.safetensors", plain))
    fresh.eval()
    same(fresh(IDS), module(IDS))
    names = {"embed/embedding": "embed", "layers/*/kernel": "layers.{}"}
    names["head/kernel"] = "head"
    lj.export_peft(tmp_path / "peft", state, names)
    back = lj.import_peft(tmp_path / "peft", plain, names)
    same(back["head"]["lora_a"][...], state["head"]["lora_a"][...])
    model = net()
    model.eval()
    graph, plain = nnx.split(model)
    fn = lambda state, ids: nnx.merge(graph, state).features(ids)
    report = lj.explain(fn, lj.attach(lj.detach(state), plain), IDS)
    assert "head/kernel" in str(report) and "NEVER USED" in str(report)


def test_a_container_of_parameters_by_name():
    class Named(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Dict(kernel=nnx.Param(jnp.eye(4)))

        def __call__(self, x):
            return x @ self.w["kernel"]

    module = moved(lj.LoRA(Named(nnx.Rngs(0)), 2))
    same(module(jnp.ones((2, 4))), module.merge()(jnp.ones((2, 4))))


class Items(nnx.Module):
    def __init__(self):
        self.ws = nnx.List([nnx.Param(jnp.ones((4, 4)))])


def test_bad_input():
    with pytest.raises(TypeError, match=r"live nnx\.Module, found dict.*lorafy"):
        lj.LoRA({"kernel": jnp.ones((3, 3))}, 2)
    with pytest.raises(ValueError, match="Dropout has no parameters"):
        lj.LoRA(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), 2)
    with pytest.raises(ValueError, match=r"'ws/0' has no name for an adapter"):
        lj.LoRA(Items(), 2, targets="*")
    with pytest.raises(TypeError, match=r"found the class Linear"):
        lj.LoRA(nnx.Linear, 2)
    wrong = [(None, "NoneType"), (0, "int"), (nnx.Rngs(params=0), r"\['params'\]")]
    for rngs, found in wrong:
        with pytest.raises(ValueError, match=rf"found {found}: .*rngs=nnx\.Rngs\(0\)"):
            lj.LoRA(net(), 2, dropout=0.1, rngs=rngs)
    with pytest.raises(ValueError, match=r"one adapter, found stack=3.*jax\.vmap"):
        lj.LoRA(net(), 2, stack=3)
    with pytest.raises(ValueError, match=r"it is a LoRA.*module\.merge\(\)"):
        lj.LoRA(lj.LoRA(net(), 2), 2)
    with pytest.raises(ValueError, match="unused must be"):
        lj.LoRA(net(), 2, unused="no")
    with pytest.raises(ValueError, match="No weight matches 'zz'"):
        lj.LoRA(net(), 2, targets="zz")
    module = lj.LoRA(Half(nnx.Rngs(0)), 2)
    with pytest.raises(ValueError, match=r"never uses 1 adapted.*'idle/kernel'"):
        module(jnp.ones((2, 4)))
    ignored = lj.LoRA(Half(nnx.Rngs(0)), 2, unused="ignore")
    assert ignored(jnp.ones((2, 4))).shape == (2, 4)
    twice = lj.LoRA(net(), 2)
    with pytest.raises(ValueError, match="adapter"):
        lj.LoRA(twice.model, 2)


class Half(nnx.Module):
    def __init__(self, rngs):
        self.used, self.idle = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return self.used(x)


def test_an_error_in_the_model_leaves_the_module_as_it_was():
    module = adapted()
    with pytest.raises(Exception, match=r"embed|shape|dtype|integer"):
        module(jnp.ones((2, 3)))  # no ids
    assert module.model.calls[...] == 0
    module(IDS)
    assert module.model.calls[...] == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs
def test_a_model_of_another_package():
    """Tunix's Qwen3, as it is: with google-tunix 0.1.7."""
    qwen3 = pytest.importorskip("tunix.models.qwen3.model")
    sizes = dict(num_layers=2, vocab_size=30, embed_dim=16, hidden_dim=24, num_heads=2)
    sizes |= dict(head_dim=8, num_kv_heads=1, rope_theta=10_000, norm_eps=1e-6)
    model = qwen3.Qwen3(qwen3.ModelConfig(**sizes), rngs=nnx.Rngs(0))
    ids, places = jnp.array([[3, 7, 1, 2]]), jnp.arange(4)[None]
    mask = jnp.tril(jnp.ones((1, 4, 4), bool))

    graph, params, rest = nnx.split(model, nnx.Param, ...)
    call = lambda params: nnx.merge(graph, params, rest)(ids, places, None, mask)[0]
    axes = lj.find_axes(call, params)
    module = lj.LoRA(model, 2, targets=["attn", "mlp"], axes=axes)
    moved(module)
    got, _ = module(ids, places, None, mask)
    want, _ = module.merge()(ids, places, None, mask)
    plain, _ = model(ids, places, None, mask)
    same(got, want, 1e-4)
    assert np.abs(got - plain).max() > 0.1

    @nnx.jit
    def step(module, optimizer):
        def loss(module):
            return -jax.nn.log_softmax(module(ids, places, None, mask)[0])[
                ..., 5
            ].mean()

        value, grads = nnx.value_and_grad(loss, argnums=TRAINS)(module)
        optimizer.update(module, grads)
        return value

    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.LoRAParam)
    losses = [float(step(module, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_a_function_that_jax_traces_may_close_over_the_module():
    """In inference nothing is kept, so nothing may be written from inside the trace."""
    module = adapted()
    module.eval()
    want = module.features(IDS)
    same(jax.jit(lambda ids: module.features(ids))(IDS), want)
    each = jax.vmap(lambda ids: module.features(ids[None])[0])(IDS)
    same(each, want)
    last = jax.lax.map(lambda ids: module.features(ids[None])[0], IDS)
    same(last, want)
