"""Tests of `LoRA` against models with merged weights, and of modules as trees."""

import copy
import functools
import inspect
import pickle

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
    """A model with most kinds of state: counts, statistics, lists, a table, a head."""

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


@functools.cache
def created(kind):
    """Returns a model from one program, not from one for each operation."""
    return nnx.jit(lambda: kind(nnx.Rngs(0)))()


def net():
    return nnx.clone(created(Net))


def as_trained(module, seed=1):
    """Sets random factors, as after some training, and returns the module."""
    rng = np.random.default_rng(seed)
    state = nnx.state(module, nnx.LoRAParam)
    values = lambda x: np.asarray(0.5 * rng.standard_normal(x.shape), x.dtype)
    draw = lambda x: jax.device_put(values(x))
    nnx.update(module, jax.tree.map(draw, state))
    return module


def adapted(rank=2, model=None, **options):
    options = {"targets": ["kernel", "embedding"], "alpha": 3.0} | options
    return as_trained(lj.LoRA(net() if model is None else model, rank, **options))


def by_hand(module, model):
    """Returns the given model with W + scale A B, summed in NumPy."""
    model = nnx.clone(model)
    leaves = {
        "/".join(map(str, path)): np.asarray(x[...], np.float64)
        for path, x in nnx.to_flat_state(nnx.state(module.model))
        if jnp.issubdtype(getattr(x, "dtype", int), jnp.floating)
    }
    new = []
    for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        layer = "/".join(map(str, path[:-1]))
        if f"{layer}/lora_a" in leaves and path[-1] in ("kernel", "embedding"):
            a, b, s = (leaves[f"{layer}/lora_{n}"] for n in ("a", "b", "scale"))
            total = np.asarray(x[...]) + s * a @ b
            x = x.replace(jax.device_put(total.astype(x.dtype)))
        new.append((path, x))
    nnx.update(model, nnx.from_flat_state(new))
    return model


@nnx.jit
def run(module, x):
    return module(x)


def same(got, want, atol=1e-5):
    np.testing.assert_allclose(got, want, atol=atol, rtol=1e-5)


def kept(model):
    """Returns a model's state other than its weights and keys, by path."""
    flat = nnx.to_flat_state(nnx.state(model))
    other = [(p, x) for p, x in flat if not isinstance(x, nnx.Param)]
    other = [(p, x) for p, x in other if "lora" not in str(p[-1])]
    return {p: x[...] for p, x in other if not isinstance(x, nnx.RngKey)}


def test_lora_starts_as_the_model_and_does_not_change_it():
    model = net()
    before = jax.tree.leaves(nnx.state(model))
    module = lj.LoRA(model, 2)
    same(module(IDS), nnx.clone(model)(IDS))
    after = jax.tree.leaves(nnx.state(model))
    assert all(x is y for x, y in zip(before, after, strict=True))
    assert type(module.model) is Net and module.model is not model


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_lora_call_and_state_are_those_of_merged_weights(jit):
    model = net()
    module, plain = adapted(model=model), by_hand(adapted(model=model), model)
    call = run if jit else lambda module, x: module(x)
    for _ in range(2):  # another mask and other statistics each time
        same(call(module, IDS), call(plain, IDS))
    got, want = kept(module.model), kept(plain)
    assert got.keys() == want.keys()
    for path, x in want.items():
        same(got[path], x)
    assert got["calls",] == 2
    assert got["drop", "rngs", "count"] == 2


def test_lora_eval_and_train_reach_the_model():
    module = adapted()
    plain = by_hand(module, net())
    module.eval(), plain.eval()
    assert module.deterministic
    same(module(IDS), plain(IDS))
    same(module(IDS), module(IDS))
    module.train()
    assert np.abs(module(IDS) - module(IDS)).max() > 1e-3


def test_lora_other_methods_use_the_adapters():
    module = adapted()
    plain = by_hand(module, net())
    module.eval(), plain.eval()
    same(module.features(IDS), plain.features(IDS))
    with pytest.raises(AttributeError, match=r"LoRA has no attribute 'nothing'.*'Net'"):
        module.nothing  # noqa: B018
    with pytest.raises(AttributeError, match=r"module\.model\.layers, which"):
        module.layers  # noqa: B018


def test_lora_gradients_are_those_of_the_formula():
    module = adapted(rank=2)
    module.eval()
    loss = lambda module: jnp.sum(module(IDS) ** 2)
    grads = nnx.grad(loss, argnums=TRAINS)(module)
    plain = by_hand(module, net())
    plain.eval()
    dense = nnx.jit(nnx.grad(loss))(plain)
    for path, g in nnx.to_flat_state(dense):
        if path[-1] != "kernel":
            continue
        own = grads
        leaves = module.model
        for key in path[:-1]:
            own = own["model"] if own is grads else own
            own = own[key]
            leaves = leaves[key] if isinstance(key, int) else getattr(leaves, key)
        a, b, s, g = (
            np.asarray(x[...])
            for x in (leaves.lora_a, leaves.lora_b, leaves.lora_scale, g)
        )
        same(own["lora_a"][...], s * g @ b.T, 1e-4)
        same(own["lora_b"][...], s * a.T @ g, 1e-4)
    trained = {type(x) for _, x in nnx.to_flat_state(grads)}
    assert trained == {nnx.LoRAParam}


def test_lora_trains_with_nnx_optimizer_and_the_base_stays():
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


def test_lora_computes_no_frozen_gradients():
    """The layers are wide: gradients of W would add half of the FLOPs."""
    wide = nnx.Sequential(*(nnx.Linear(64, 64, rngs=nnx.Rngs(i)) for i in range(3)))
    module = lj.LoRA(wide, 1)
    graph, state = nnx.split(module)
    x = jnp.ones((128, 64))

    def grads(state):
        module = nnx.merge(graph, state)
        return nnx.grad(lambda m: jnp.sum(m(x) ** 2), argnums=TRAINS)(module)

    flops = jax.jit(grads).lower(state).compile().cost_analysis()["flops"]
    products = 2 * 128 * 64 * 64
    assert flops < 1.25 * 5 * products  # 3 forward, 2 back; 8 with those of W


def test_lora_splits_merges_and_clones():
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


def test_lora_merge_returns_a_plain_model():
    module = adapted()
    merged, plain = module.merge(), by_hand(module, net())
    assert type(merged) is Net
    assert jax.tree.structure(nnx.state(merged)) == jax.tree.structure(nnx.state(net()))
    merged.eval(), plain.eval(), module.eval()
    same(merged(IDS), plain(IDS))
    same(merged(IDS), module(IDS))
    merged.head.bias[...] += 1
    assert not module.model.head.bias[...].any()


def test_lora_dropout_of_the_adapters():
    module = adapted(dropout=0.5, rngs=nnx.Rngs(5))
    module.eval()
    still = module(IDS)
    same(still, module(IDS))
    module.train()
    module.model.eval()  # so that only the adapters drop
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


def test_lora_creates_and_fills_caches():
    model = created(Decoder)
    axes = {
        f"attention/{name}/kernel": lj.Axes((), (0,), (1, 2))
        for name in ("query", "key", "value")
    } | {"attention/out/kernel": lj.Axes((), (0, 1), (2,))}
    module = as_trained(lj.LoRA(model, 2, axes=axes))
    plain = module.merge()
    x = np.random.default_rng(0).standard_normal((1, 3, 4)).astype(np.float32)
    module.start((1, 3, 4)), plain.start((1, 3, 4))
    for t in range(3):
        same(run(module, x[:, t : t + 1]), run(plain, x[:, t : t + 1]))
    assert module.model.attention.cache_index[...] == 3
    same(module.model.attention.cached_key[...], plain.attention.cached_key[...])


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x, rngs, scale=1.0, *, name="noise"):
        x = self.layer(x) + rngs.noise.normal(x.shape)
        return {name: x * scale, "weight": self.layer.kernel[...]}


def test_lora_updates_live_arguments_and_passes_others_through():
    module = as_trained(lj.LoRA(Noisy(nnx.Rngs(0)), 2))
    plain, x = module.merge(), jnp.ones((2, 4))
    ours, theirs = nnx.Rngs(noise=1), nnx.Rngs(noise=1)
    with pytest.warns(UserWarning, match="return"):  # it is materialized
        got = module(x, ours, name="sum")
    want = plain(x, theirs, name="sum")
    assert got.keys() == want.keys()
    same(got["sum"], want["sum"])
    same(got["weight"], want["weight"])
    assert ours.noise.count[...] == theirs.noise.count[...] == 1


class Kinds(nnx.Module):
    """A model with methods of every kind."""

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


def test_lora_methods_of_every_kind():
    module = as_trained(lj.LoRA(Kinds(nnx.Rngs(0)), 2))
    plain = module.merge()
    same(module.twice(X), plain.twice(X))
    same(module.jitted(X), plain.jitted(X))
    assert module.model.calls[...] == 1
    assert module.static(1) == 2 and module.called() == "Kinds"
    for _ in range(2):
        same(module.remember(X), plain.remember(X))
    same(module.model.memo["sum"], plain.memo["sum"])
    with pytest.raises(TypeError, match=r"Kinds\.steps is a generator.*loop outside"):
        module.steps(X)
    with pytest.raises(
        TypeError, match=r"Kinds has no method __call__.*module\.encode"
    ):
        module(X)
    assert module.Config is Kinds.Config  # a setting


@pytest.mark.filterwarnings("ignore:'layer/kernel' meets")  # materialized
def test_lora_hides_the_adapters_from_the_model():
    module = as_trained(lj.LoRA(Kinds(nnx.Rngs(0)), 2))
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


@pytest.mark.filterwarnings("ignore:'layer/kernel' meets")  # materialized
@pytest.mark.parametrize("how", CLOSURES)
def test_lora_may_be_closed_over_by_jax_functions(how):
    module = as_trained(lj.LoRA(Noisy(nnx.Rngs(0)), 2))
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
def test_lora_keeps_what_the_model_sows():
    module = as_trained(lj.LoRA(Sows(nnx.Rngs(0)), 2))
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


def test_lora_takes_axes_from_find_axes():
    model = created(Image)
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 2)).astype(np.float32)
    with pytest.raises(ValueError, match="axes=find_axes"):
        lj.LoRA(model, 2)
    graph, state = nnx.split(model)
    call = lambda state, x: nnx.merge(graph, state)(x)
    axes = lj.find_axes(model, x)
    assert axes == lj.find_axes(call, state, x)
    module = as_trained(lj.LoRA(model, 2, axes=axes))
    assert lj.find_axes(module, x) == axes
    assert module.model.heads.lora_b[...].shape == (2, 2, 4)
    kernel = np.asarray(model.patches.kernel[...])
    own = module.model.patches
    a, b = np.asarray(own.lora_a[...]), np.asarray(own.lora_b[...])
    plain = module.merge()
    same(plain.patches.kernel[...], kernel + a @ b)
    same(run(module, x), run(plain, x))
    same(module.model.norm.mean[...], plain.norm.mean[...])
    heads = lj.LoRA(nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0)), 2)
    assert heads.model.query.lora_b[...].shape == (2, 2, 2)  # by its name


class Twice(nnx.Module):
    """A model with a shared layer, layers in a scan, and remat."""

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


def test_lora_with_shared_layers_scans_and_remat():
    axes = {"stack/kernel": lj.Axes((0,), (1,), (2,))}
    module = as_trained(lj.LoRA(created(Twice), 2, axes=axes))
    plain, x = module.merge(), jnp.ones((2, 4))
    state = nnx.state(module.model)
    assert state["stack"]["lora_a"].shape == (3, 4, 2)
    w, a, b = (
        np.asarray(state["again"][n][...]) for n in ("kernel", "lora_a", "lora_b")
    )
    same(plain.first.kernel[...], w + a @ b)
    assert plain.again is plain.first
    same(run(module, x), run(plain, x))
    grads = nnx.jit(nnx.grad(lambda m: jnp.sum(m(x)), argnums=TRAINS))(module)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_lora_on_a_quantized_base(how):
    model = nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2)))
    nnx.update(model, lj.quantize(nnx.state(model), how, block=4))
    module = as_trained(lj.LoRA(model, 2))
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    same(module(x), module.merge()(x), 1e-4)
    assert isinstance(module.model.layers[0].kernel.get_raw_value(), lj.Quantized)
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(module, optimizer):
        loss = lambda module: jnp.sum(module(x) ** 2)
        value, grads = nnx.value_and_grad(loss, argnums=TRAINS)(module)
        optimizer.update(module, grads)
        return value

    before = step(module, optimizer)
    assert step(module, optimizer) < before


def test_lora_with_dora():
    module = as_trained(lj.LoRA(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), 2, dora=True))
    state = {k: np.asarray(x[...]) for k, x in nnx.state(module.model).items()}
    v = state["kernel"] + state["lora_a"] @ state["lora_b"]
    w = state["lora_magnitude"] * v / np.linalg.norm(v, axis=0)
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    same(module(jnp.asarray(x)), x @ w)


def test_lora_state_is_a_tree_from_lorafy(tmp_path):
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


def test_lora_with_parameters_in_a_dict():
    class Named(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Dict(kernel=nnx.Param(jnp.eye(4)))

        def __call__(self, x):
            return x @ self.w["kernel"]

    module = as_trained(lj.LoRA(Named(nnx.Rngs(0)), 2))
    same(module(jnp.ones((2, 4))), module.merge()(jnp.ones((2, 4))))


class Items(nnx.Module):
    def __init__(self):
        self.ws = nnx.List([nnx.Param(jnp.ones((4, 4)))])


def test_lora_refuses_bad_input():
    with pytest.raises(TypeError, match=r"live nnx\.Module, found dict.*lorafy"):
        lj.LoRA({"kernel": jnp.ones((3, 3))}, 2)
    with pytest.raises(ValueError, match="Dropout has no parameters"):
        lj.LoRA(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), 2)
    with pytest.raises(ValueError, match=r"'ws/0' cannot have an adapter"):
        lj.LoRA(Items(), 2, targets="*")
    with pytest.raises(TypeError, match=r"found the class Linear"):
        lj.LoRA(nnx.Linear, 2)
    wrong = [(None, "NoneType"), (0, "int"), (nnx.Rngs(params=0), r"\['params'\]")]
    for rngs, found in wrong:
        with pytest.raises(ValueError, match=rf"found {found}\. .*rngs=nnx\.Rngs\(0\)"):
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


def test_lora_state_is_unchanged_after_an_error_in_the_model():
    module = adapted()
    with pytest.raises(Exception, match=r"embed|shape|dtype|integer"):
        module(jnp.ones((2, 3)))  # no ids
    assert module.model.calls[...] == 0
    module(IDS)
    assert module.model.calls[...] == 1


def test_lora_writes_nothing_inside_a_trace_in_inference():
    """In inference no state changes, so that no tracer may be written to the module."""
    module = adapted()
    module.eval()
    want = module.features(IDS)
    same(jax.jit(lambda ids: module.features(ids))(IDS), want)
    each = jax.vmap(lambda ids: module.features(ids[None])[0])(IDS)
    same(each, want)
    last = jax.lax.map(lambda ids: module.features(ids[None])[0], IDS)
    same(last, want)


def act(x):
    return x


class Signed(nnx.Module):
    """A model with settings and with signatures."""

    kind = "decoder"

    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 4, rngs=rngs)
        self.config = {"layers": 1}
        self.decode = False
        self.act = act
        self.table = nnx.data(jnp.ones(3))
        self.first = nnx.static((self.layer.__call__,))
        self._seed = 3

    @property
    def num_embed(self):
        return self.layer.in_features

    @property
    def weights(self):
        return {"layer": self.layer.kernel}

    def __call__(self, x, positions=None, *, segment_ids: int = 0):
        """Runs the layer."""
        return self.layer(x) * (2 if self.decode else 1)

    def encode(self, x, /, scale=1.0):
        """Scales the output of the layer."""
        return self.layer(x) * scale

    half = functools.partialmethod(encode, scale=0.5)

    @nnx.jit
    def jitted(self, x, positions=None):
        return self.layer(x)


def signed(**options):
    return as_trained(lj.LoRA(Signed(nnx.Rngs(0)), 2, **options))


ROUTES = {
    "as built": lambda module: module,
    "merged": lambda module: nnx.merge(*nnx.split(module)),
    "cloned": nnx.clone,
    "copied": copy.copy,
    "deeply": copy.deepcopy,
    "pickled": lambda module: pickle.loads(pickle.dumps(module)),
    "of shapes": lambda module: nnx.eval_shape(lambda: module),
    "as a pytree": lambda module: jax.tree.map(lambda x: x, module),
}


@pytest.mark.parametrize("route", ROUTES)
def test_lora_methods_have_the_signatures_of_the_model(route):
    module, plain = ROUTES[route](signed()), Signed(nnx.Rngs(0))
    for name in ("__call__", "encode", "half", "jitted"):
        want = inspect.signature(getattr(plain, name))
        assert inspect.signature(getattr(module, name)) == want
    assert inspect.signature(module) == inspect.signature(plain)
    assert module.__call__.__doc__ == "Runs the layer."
    assert (module.encode.__name__, module.encode.__doc__) == (
        "encode",
        "Scales the output of the layer.",
    )


def test_lora_signatures_inside_a_jitted_function():
    found = []

    @nnx.jit
    def run(module, x):
        found.append(inspect.signature(module.__call__))
        return module(x)

    same(run(signed(), X), signed()(X))
    assert found == [inspect.signature(Signed(nnx.Rngs(0)).__call__)]


def test_lora_methods_are_equal_to_themselves_and_survive_pickle():
    module = signed()
    assert module.encode == module.encode and module.__call__ == module.__call__
    traced = []
    run = jax.jit(lambda method, x: traced.append(1) or method(x), static_argnums=0)
    for _ in range(2):
        same(run(module.encode, X), module.encode(X))
    assert len(traced) == 1
    again = pickle.loads(pickle.dumps(module.encode))
    same(again(X, scale=2.0), 2 * module(X))


def test_lora_subclass_may_override_the_call():
    class Twice(lj.LoRA):
        factor = 1

        def __call__(self, x):
            return self.factor * super().__call__(x, segment_ids=1)

    model = Signed(nnx.Rngs(0))
    model.factor = 3  # the subclass has an attribute of that name, too
    module = as_trained(Twice(model, 2))
    module.factor = 2
    assert module.model.factor == 3
    assert str(inspect.signature(module.__call__)) == "(x)"
    assert list(inspect.signature(module.encode).parameters) == ["x", "scale"]
    same(module(X), 2 * signed()(X))


def test_lora_call_without_a_signature():
    class Opaque(Signed):
        def __call__(self, *args):
            return self.layer(*args)

    Opaque.__call__.__signature__ = "none"  # so that inspect refuses
    module = as_trained(lj.LoRA(Opaque(nnx.Rngs(0)), 2))
    kinds = [
        p.kind.name for p in inspect.signature(module.__call__).parameters.values()
    ]
    assert kinds == ["VAR_POSITIONAL", "VAR_KEYWORD"]
    same(module(X), module.merge()(X))


def test_lora_settings_are_those_of_the_model():
    given = Signed(nnx.Rngs(0))
    module = as_trained(lj.LoRA(given, 2))
    assert module.config is module.model.config
    assert (module.kind, module.num_embed, module.act) == ("decoder", 4, act)
    for name in ("layer", "table", "first", "weights", "_seed"):
        with pytest.raises(AttributeError, match=rf"module\.model\.{name}, which"):
            getattr(module, name)
        assert not hasattr(module, name)
    before = module(X)
    module.decode = True
    assert module.model.decode and not given.decode
    assert "decode" not in vars(module)
    same(module(X), 2 * before)
    module.set_attributes(decode=False)
    same(module(X), before)
    with pytest.raises(AttributeError, match=r"Write module\.model\.layer = "):
        module.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    module.step = 7  # set on the module, since the model has no such attribute
    assert module.step == 7 and not hasattr(module.model, "step")


def test_lora_options_can_be_set_later():
    module = signed()
    plain = module(X)
    module.dropout, module.rngs = 0.5, nnx.Rngs(5)
    assert np.abs(module(X) - plain).max() > 1e-3
    if hasattr(nnx, "view"):  # newer than the oldest Flax
        same(nnx.view(module, deterministic=True)(X), plain)
        assert not module.deterministic
    module.eval()
    same(module(X), plain)


def names_of(tree):
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(tree)}


def test_rebuild_functions_of_trees_take_modules(tmp_path):
    """Results equal those for the state, and are modules where there is a model."""
    model = net()
    module = adapted(model=model)
    module.eval(), model.eval()
    state, want = nnx.state(module.model), module(IDS)
    assert lj.count(module) == lj.count(state) == lj.count(module.model)
    path = tmp_path / "a.safetensors"
    lj.save(path, module)
    data = path.read_bytes()
    lj.save(path, state)
    assert path.read_bytes() == data
    names = {"embed/embedding": "embed", "layers/*/kernel": "layers.{}"}
    names["head/kernel"] = "head"
    lj.export_peft(tmp_path / "peft", module, names)

    loaded = lj.load(path, model)
    back = lj.import_peft(tmp_path / "peft", model, names)
    joined = lj.attach(lj.detach(module), model)
    for new in (loaded, back, joined):
        assert type(new) is lj.LoRA and type(new.model) is Net
        new.eval()
        same(new(IDS), want)
    with pytest.raises(ValueError, match=r"already has an adapter in base.*strip"):
        lj.load(path, module)
    assert type(lj.load(path, lj.strip(module))) is lj.LoRA

    for plain in (lj.merge(module), lj.merge(module.model)):
        assert type(plain) is Net and names_of(nnx.state(plain)) == names_of(
            nnx.state(model)
        )
        same(plain(IDS), want)
    plain = lj.strip(module)
    assert type(plain) is Net
    same(plain(IDS), model(IDS))
    head = {"head.weight": np.asarray(model.head.kernel[...]).T}
    assert lj.find_names(module, head, targets="head") == {"head/kernel": "head"}


def test_rebuild_functions_of_trees_return_modules():
    model = net()
    module, other = adapted(model=model), as_trained(adapted(model=model), seed=2)
    for each in (model, module, other):
        each.eval()
    plain, want = model(IDS), module(IDS)
    off = lj.rescale(module, 0.0)
    same(off(IDS), plain)
    same(module(IDS), want)  # which is not changed
    both = lj.add(
        module, other
    )  # one has run more often than the other, which does not matter
    assert type(both) is lj.LoRA and both.model.head.lora_a.shape == (4, 4)
    want_kernel = sum(np.asarray(lj.merge(m).head.kernel[...]) for m in (module, other))
    same(
        lj.merge(both).head.kernel[...],
        want_kernel - np.asarray(model.head.kernel[...]),
    )
    wider = lj.resize(module, {"layers/0": 4})
    assert wider.model.layers[0].lora_a.shape == (4, 4)
    same(wider(IDS), want)
    start = lj.LoRA(model, 2)
    start.eval()
    same(lj.principal(start)(IDS), plain)
    tuned = lj.merge(module)
    found = lj.extract(tuned, model, 2, targets=["kernel", "embedding"])
    assert type(found) is lj.LoRA
    found.eval()
    same(found(IDS), want, 1e-4)
    assert dict((p, r) for p, r, _ in lj.kept(tuned, found).rows)["head/kernel"] == 2


def test_rebuild_keeps_the_options_of_a_module():
    module = adapted(dropout=0.5, rngs=nnx.Rngs(5), unused="ignore")
    new = lj.rescale(module, 2.0)
    assert (new.dropout, new.unused) == (0.5, "ignore")
    module.model.eval(), new.model.eval()
    one, two = new(IDS), new(IDS)
    assert np.abs(one - two).max() > 1e-3
    assert new.rngs.dropout.count[...] == 2 and module.rngs.dropout.count[...] == 0


def test_rebuild_of_quantized_models():
    model = nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2)))
    stored = lj.quantize(model, "nf4", block=4)
    assert type(stored) is nnx.Sequential
    assert isinstance(stored.layers[0].kernel.get_raw_value(), lj.Quantized)
    assert isinstance(model.layers[0].kernel[...], jax.Array)
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    floats = lj.dequantize(stored)
    module = as_trained(lj.LoRA(stored, 2))
    kept = lj.strip(module).layers[0].kernel.get_raw_value()
    assert kept.values is stored.layers[0].kernel.get_raw_value().values
    same(module(x), lj.dequantize(module)(x))
    after = lj.quantize(as_trained(lj.LoRA(model, 2)), "nf4", block=4)
    same(after(x), module(x))
    same(lj.merge(stored)(x), floats(x))
    assert "nf4" in str(lj.explain(stored, x))


def test_rebuild_returns_a_state_if_leaves_make_no_model():
    module = adapted()
    state = nnx.state(module.model)
    halves = lj.split(module)
    for got, want in zip(halves, lj.split(state), strict=True):
        assert jax.tree.structure(got) == jax.tree.structure(want)
    joined = lj.combine(*halves)
    assert jax.tree.structure(joined) == jax.tree.structure(state)
    for f in (lj.mask, lj.labels):
        assert f(module) == f(state)
    both = lj.stack([module, module])
    assert both["head"]["lora_a"].shape == (2, 4, 2)
    assert lj.in_axes(both)["head"]["lora_a"] == 0
    assert type(lj.take(both, 1)) is nnx.State
    kept = lj.detach(module)
    before = np.asarray(kept["head"]["lora_a"][...])
    as_trained(module, seed=3)
    np.testing.assert_array_equal(kept["head"]["lora_a"][...], before)
    for state in (*halves, both, kept):
        assert type(state) is nnx.State


def test_explain_and_find_axes_take_modules():
    module = adapted()
    module.eval()
    plain = nnx.clone(lj.strip(module))
    graph, state = nnx.graphdef(plain), nnx.state(module.model)
    fn = lambda state, ids: nnx.merge(graph, state)(ids)
    report = lj.explain(module, IDS)
    assert [row[:7] for row in report.rows] == [
        row[:7] for row in lj.explain(fn, state, IDS).rows
    ]
    assert all(row.used for row in report.rows)
    idle = [row.path for row in lj.explain(module.features, IDS).rows if not row.used]
    assert idle == ["head/kernel"]
    total = lambda ids, model: model(ids).sum()
    report = lj.explain(total, IDS, model=module, argnames="model")
    assert len(report.rows) == 4
    axes = lj.find_axes(plain, IDS)
    assert axes["head/kernel"] == lj.Axes((), (0,), (1,))
    assert lj.find_axes(total, IDS, model=plain, argnames="model") == axes
    assert "head/kernel" not in lj.find_axes(plain.features, IDS)
    noisy = Noisy(nnx.Rngs(0))
    axes = lj.find_axes(noisy, X, nnx.Rngs(noise=1), name="sum")
    assert axes == {"layer/kernel": lj.Axes((), (0,), (1,))}


class Kept(nnx.Module):
    """A model with a matrix that is no parameter, so that it gets no adapter."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 4, rngs=rngs)
        self.mixing = nnx.BatchStat(jnp.eye(4))

    def __call__(self, x):
        return self.layer(x @ self.mixing[...])


def test_find_axes_of_a_model_finds_only_its_parameters():
    axes = lj.find_axes(Kept(nnx.Rngs(0)), X)
    assert [*axes] == ["layer/kernel"]
    module = lj.LoRA(Kept(nnx.Rngs(0)), 2, targets="*", axes=axes)
    same(module(X), module.merge()(X))


def test_rebuild_of_abstract_models(tmp_path):
    path = tmp_path / "a.safetensors"
    module = adapted()
    lj.save(path, module)
    shapes = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    ids = jax.ShapeDtypeStruct(IDS.shape, IDS.dtype)
    assert lj.find_axes(shapes, ids) == lj.find_axes(net(), IDS)
    whole = lj.LoRA(shapes, 2, targets=["kernel", "embedding"])
    assert lj.count(whole) == lj.count(module)
    assert len(lj.explain(whole, ids).rows) == 4
    loaded = lj.load(path, shapes)
    same(loaded.model.head.lora_b[...], module.model.head.lora_b[...])
    assert isinstance(loaded.model.head.kernel.get_raw_value(), jax.ShapeDtypeStruct)
    stored = lj.quantize(shapes, "int8")
    assert lj.count(stored).base_bytes < lj.count(module).base_bytes


def test_rebuild_ignores_keys_and_counts():
    model = net()
    weights = jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    module = lj.LoRA(model, 2)
    assert lj.count(module).total - lj.count(module).trainable == sum(
        x.size for x in weights
    )
    other = lj.LoRA(model, 2)
    other.model.drop(jnp.ones(3))  # counts
    assert type(lj.add(module, other)) is lj.LoRA
    other.model.norm.mean[...] += 1
    with pytest.raises(ValueError, match=r"'norm/mean' of tree 1.*attach"):
        lj.add(module, other)
    tuned = nnx.clone(model)
    tuned.drop(jnp.ones(3))
    tuned.head.kernel[...] += 1
    assert type(lj.extract(tuned, model, 2, targets="head")) is lj.LoRA


def test_rebuild_of_a_model_with_a_lora_inside():
    class Outer(nnx.Module):
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, x):
            return self.inner(x)

    outer = Outer(signed())
    assert lj.count(outer) == lj.count(outer.inner)
    twice = lj.rescale(outer, 2.0)
    assert type(twice) is Outer and twice.inner.model.layer.lora_scale[...] == 2
    with pytest.raises(ValueError, match=r"Outer holds a LoRA at 'inner'"):
        lj.merge(outer)


def test_lorafy_and_lora_refuse_modules():
    model = Half(nnx.Rngs(0))
    with pytest.raises(
        TypeError, match=r"live module Half\. Write LoRA\(model, rank\)"
    ):
        lj.lorafy(model, 2)
    with pytest.raises(
        TypeError, match=r"live module Half\. Write LoRA\(model, rank\)"
    ):
        lj.lora(model)
    call = lj.lora(lambda model, x: model(x))
    with pytest.raises(TypeError, match=r"live module LoRA.*function itself"):
        call(lj.LoRA(model, 2), X)
    with pytest.raises(ValueError, match=r"no adapters.*LoRA\(model, rank\)"):
        lj.count(model)


FROZEN = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))


def update(module, optimizer, x):
    loss = lambda module: jnp.mean(module(x) ** 2)
    optimizer.update(module, nnx.grad(loss, argnums=TRAINS)(module))


def apart(module, optimizer, x, steps, traced):
    graph, base, state = nnx.split((module, optimizer), FROZEN, ...)

    @jax.jit
    def step(base, state, x):
        traced.append(1)
        module, optimizer = nnx.merge(graph, base, state)
        update(module, optimizer, x)
        return nnx.state((module, optimizer), nnx.Not(FROZEN))

    for _ in range(steps):
        state = step(base, state, x)
    nnx.update((module, optimizer), state)


def no_updates(module, optimizer, x, steps, traced):
    step = nnx.jit(lambda *args: traced.append(1) or update(*args), graph_updates=False)
    for _ in range(steps):
        step(module, optimizer, x)


@pytest.mark.parametrize("run", [apart, no_updates])
def test_lora_step_copies_no_frozen_weight(run):
    if (
        run is no_updates
        and "graph_updates" not in inspect.signature(nnx.jit).parameters
    ):
        pytest.skip("Flax before 0.12.6")
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(64, 4, rngs=rngs),
        nnx.Dropout(0.5, rngs=rngs),
        nnx.BatchNorm(4, rngs=rngs),
    )
    module = lj.LoRA(model, 2)
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.LoRAParam)
    weights = lambda: jax.tree.leaves(nnx.state(module, FROZEN))
    pointers = [x.unsafe_buffer_pointer() for x in weights()]
    mean, traced = module.model.layers[2].mean[...], []
    run(module, optimizer, jnp.ones((3, 64)), 3, traced)
    assert [x.unsafe_buffer_pointer() for x in weights()] == pointers
    assert len(traced) == 1
    assert np.abs(module.model.layers[0].lora_b[...]).max() > 1e-3
    assert module.model.layers[1].rngs.count[...] == 3
    assert np.abs(module.model.layers[2].mean[...] - mean).max() > 0
    assert optimizer.step[...] == 3


def test_lora_merge_takes_a_dtype():
    model = nnx.Linear(4, 3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    merged = lj.LoRA(model, 2).merge(dtype=jnp.float32)
    assert merged.kernel[...].dtype == jnp.float32
    assert merged.bias[...].dtype == jnp.bfloat16
