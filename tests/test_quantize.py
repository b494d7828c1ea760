"""Tests `quantize`: which weights, their shardings, and their use by every verb."""

import dataclasses
import re

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax._engine.quantized import is_quantized
from lora_jax._tree import flatten, path_name, unbox

RNG = np.random.default_rng(0)
AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]


def weight(*shape, dtype=jnp.float32):
    return jax.device_put(np.asarray(RNG.standard_normal(shape), dtype))


def w(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def by_name(params):
    return {path_name(path): unbox(leaf) for path, leaf in flatten(params).items()}


def stored(params):
    """Returns the shapes of the scales, and the formats, by name."""
    return {
        name: (q.format, q.scale.shape)
        for name, q in by_name(params).items()
        if is_quantized(q)
    }


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def model():
    """A table, two kernels, one of them of heads, a bias and a head."""
    return {
        "tokens": {"embedding": weight(9, 32)},
        "query": {"kernel": weight(32, 2, 16), "bias": weight(2, 16)},
        "out": {"kernel": weight(2, 16, 32)},
        "head": {"kernel": weight(32, 9)},
    }


def apply(p, ids):
    x = p["tokens"]["embedding"][ids]
    q = (
        jnp.einsum("btd,dnh->btnh", x, p["query"]["kernel"])
        + p["query"]["bias"][None, None]
    )
    x = x + jnp.einsum("btnh,nhd->btd", jnp.sin(q), p["out"]["kernel"])
    return x @ p["head"]["kernel"]


IDS = np.array([[0, 8, 3], [1, 1, 2]])
HOW = {"head": "int4", "*/kernel": "nf4", "tokens": "int8"}


def small():
    return lj.quantize(model(), HOW, block=16)


# Which weights, in which format


def test_quantize_default_is_every_kernel():
    q = lj.quantize(model(), "nf4", block=16)
    assert stored(q) == {
        "query/kernel": ("nf4", (2, 2, 16)),
        "out/kernel": ("nf4", (2, 1, 32)),
        "head/kernel": ("nf4", (2, 9)),
    }


@pytest.mark.parametrize(
    ("how", "options", "want"),
    [
        ("int8", {"targets": "head"}, {"head/kernel": ("int8", (1, 9))}),
        (
            "int8",
            {"exclude": "query"},
            {"out/kernel": ("int8", (1, 1, 32)), "head/kernel": ("int8", (1, 9))},
        ),
        ("int8", {"targets": "tokens"}, {"tokens/embedding": ("int8", (9, 1))}),
        ("int4", {"targets": "tokens"}, {"tokens/embedding": ("int4", (9, 1))}),
        (
            "int8",
            {"targets": "tokens", "block": 8},
            {"tokens/embedding": ("int8", (9, 4))},
        ),
        (
            {"head": "int8", "*/kernel": "nf4"},
            {},
            {
                "query/kernel": ("nf4", (1, 2, 16)),
                "out/kernel": ("nf4", (2, 1, 32)),
                "head/kernel": ("int8", (1, 9)),
            },
        ),
        (
            {"*": "nf4"},
            {"targets": lambda name, w: name.startswith("h"), "block": 4},
            {"head/kernel": ("nf4", (8, 9))},
        ),
    ],
)
def test_quantize_takes_the_patterns_of_lorafy(how, options, want):
    params = model()
    q = lj.quantize(params, how, **options)
    assert stored(q) == want
    for name, leaf in by_name(params).items():
        assert name in want or by_name(q)[name] is leaf
    assert (
        stored(jax.eval_shape(lambda p: lj.quantize(p, how, **options), params)) == want
    )


@pytest.mark.parametrize(
    ("n", "block", "blocks"),
    [
        (128, None, 2),
        (96, None, 3),
        (80, None, 5),
        (6, None, 3),
        (64, 7, None),
        (8, 8, 1),
    ],
)
def test_quantize_block_is_a_common_divisor(n, block, blocks):
    params = {"kernel": w(n, 3)}
    if blocks is None:
        match = r"\(64, 3\), has 64 elements along dimension 0 .*of 7, so.*block=64"
        with pytest.raises(ValueError, match=match):
            lj.quantize(params, "nf4", block=block)
    else:
        q = lj.quantize(params, "nf4", block=block)
        assert q["kernel"].scale.shape == (blocks, 3)


def test_quantize_axes_determine_ambiguous_dimensions():
    params = {"qkv": w(3, 2, 8, 64)}
    with pytest.raises(ValueError, match=r"'qkv'.*axes=find_axes"):
        lj.quantize(params, "nf4", targets="qkv")
    axes = {"qkv": lj.Axes((0,), (3,), (1, 2))}
    q = lj.quantize(params, "int8", targets="qkv", axes=axes)
    assert q["qkv"].scale.shape == (3, 2, 8, 1)
    q = lj.quantize(params, "nf4", targets="qkv", axes=axes)
    assert q["qkv"].scale.shape == (3, 2, 8, 1) and q["qkv"].dtype == jnp.float32
    fn = lambda p, x: jnp.einsum("bd,fnhd->bfnh", x, p["qkv"])
    found = lj.find_axes(fn, params, w(5, 64))
    assert lj.find_axes(fn, q, w(5, 64)) == found


def test_quantize_before_or_after_lorafy():
    axes = {"heads/w": lj.Axes((), (1,), (0, 2))}
    params = model() | {"heads": {"w": weight(2, 32, 4)}}
    both = {"targets": ["kernel", "embedding", "w"]}
    first = lj.lorafy(
        lj.quantize(params, "nf4", axes=axes, **both), 2, axes=axes, **both
    )
    second = lj.quantize(lj.lorafy(params, 2, axes=axes, **both), "nf4", **both)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert bits(first) == bits(second) and len(stored(first)) == 5
    assert first["head"]["lora_a"].dtype == jnp.float32


def test_lorafy_adapters_of_a_quantized_weight_are_float32():
    params = lj.quantize({"kernel": weight(64, 3, dtype=jnp.bfloat16)}, "nf4")
    for options, dtype in (({}, "float32"), ({"dtype": jnp.bfloat16}, "bfloat16")):
        assert lj.lorafy(params, 2, **options)["lora_a"].dtype == dtype


# Shardings


KINDS = {
    "concrete": lambda x: x,
    "numpy": np.asarray,
    "abstract": lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["int8", "int4", "nf4"])
def test_quantize_concrete_numpy_abstract_and_traced(kind, how):
    plain = {"kernel": weight(64, 3), "bias": weight(3)}
    params = jax.tree.map(KINDS[kind], plain)
    q, want = (
        lj.quantize(params, how),
        jax.jit(lj.quantize, static_argnums=1)(plain, how),
    )
    assert jax.tree.structure(q) == jax.tree.structure(want)
    back = lj.dequantize(q)
    assert (back["kernel"].shape, back["kernel"].dtype) == ((64, 3), jnp.float32)
    assert back["bias"] is params["bias"] is q["bias"]
    if kind == "abstract":
        assert all(
            isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((q, back))
        )
    else:
        np.testing.assert_array_equal(q["kernel"].values, want["kernel"].values)
        np.testing.assert_allclose(back["kernel"], plain["kernel"], atol=0.4)


@pytest.mark.parametrize("kind", AXIS_TYPES)
def test_quantize_keeps_shardings_without_collectives(kind, close):
    """Like tensor parallelism: columns, rows, and the rows of a table."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    params = {
        "tokens": {"embedding": put(weight(16, 32), "model", None)},
        "up": {"kernel": put(weight(32, 64), None, "model")},
        "down": {"kernel": put(weight(64, 32), "model", None)},
    }
    how = {"tokens": "int8", "kernel": "nf4"}
    q = lj.quantize(params, how)
    spec = lambda name: tuple(by_name(q)[name].scale.sharding.spec)
    assert spec("tokens/embedding") == ("model", None)
    assert spec("up/kernel") == (None, "model")
    assert spec("down/kernel") == ("model", None)
    assert q["down"]["kernel"].scale.shape == (4, 32)  # a block on each device
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    abstract = lj.quantize(shapes, how)
    assert [x.sharding for x in jax.tree.leaves(abstract)] == [
        x.sharding for x in jax.tree.leaves(q)
    ]
    q = lj.lorafy(q, 2, targets="*")
    assert tuple(q["down"]["lora_a"].sharding.spec) == ("model", None)
    x = put(weight(4, 32), "data", None)

    def fn(p, x):
        explicit = kind == AxisType.Explicit
        out = {"out_sharding": P("data", None)} if explicit else {}
        h = jnp.sin(x @ p["up"]["kernel"])
        return jnp.einsum("bh,hd->bd", h, p["down"]["kernel"], **out)

    @jax.jit
    def step(params, x):
        adapters, base = lj.split(params)
        run = lambda a: jnp.sin(
            lj.lora(fn, unused="ignore")(lj.combine(a, base), x)
        ).sum()
        return jax.value_and_grad(run)(adapters)

    with jax.set_mesh(mesh):
        plain = lj.dequantize(q)
        assert plain["down"]["kernel"].sharding.spec[0] == "model"
        # JAX 0.9 cannot call what it compiles here: int4 arrays have other layouts.
        texts = [step.lower(p, x).compile().as_text() for p in (q, plain)]
        close(step(q, x), step(plain, x))
    for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        own, floats = (text.count(f" {name}(") for text in texts)
        assert own <= floats, name


def test_lora_in_shard_map_splits_quantized_weights_between_blocks(close):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    x = weight(3, 16)

    def fn(p, x):
        local = lambda x, w: jax.lax.psum(jnp.sin(x @ w), "d")
        specs = P(None, "d"), P("d")
        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
        return mapped(x, p["kernel"])

    for block in (8, 16):  # two blocks, and one, over two devices
        q = lj.quantize({"kernel": weight(16, 4)}, "nf4", block=block)
        close(jax.jit(lj.lora(fn))(q, x), fn(lj.dequantize(q), x))


# Errors


def broken(**changes):
    q = lj.quantize({"kernel": weight(64, 3)}, "nf4")
    return {"m": {"kernel": dataclasses.replace(q["kernel"], **changes)}}


@pytest.mark.parametrize(
    ("params", "how", "options", "match"),
    [
        (model, "fp4", {}, "one of 'int8', 'int4', 'nf4', found 'fp4'"),
        (model, 4, {}, "found 4"),
        (model, ["nf4"], {}, r"found \['nf4'\]"),
        (model, {"query": "int3"}, {}, "found 'int3'"),
        (model, {}, {}, "how is an empty mapping"),
        (model, {"qery": "nf4"}, {}, "'qery'.*'query/kernel'"),
        (model, "nf4", {"targets": "nothing"}, "No weight matches 'nothing'"),
        (model, "nf4", {"exclude": "kernel"}, "nothing to quantize.*Write targets"),
        (
            model,
            {"head": "nf4"},
            {"targets": "kernel"},
            "No pattern of how matches the target 'query/kernel'",
        ),
        (model, "nf4", {"targets": "bias"}, "'query/bias' is float32 of shape"),
        (model, "nf4", {"block": 0}, "at least 2, found 0"),
        (model, "nf4", {"block": 1}, "at least 2, found 1"),
        (model, "nf4", {"block": 2.0}, "found 2.0"),
        (model, "nf4", {"block": True}, "found True"),
        (lambda: {"kernel": w(65, 3)}, "nf4", {}, "each element would have a scale"),
        (lambda: {"kernel": w(64, 3)}, "nf4", {"block": 63}, "Write block=64"),
        (
            lambda: {"a": {"kernel": w(64, 3)}, "b": {"kernel": w(0, 3)}},
            "int8",
            {},
            r"'b/kernel', of shape \(0, 3\), is empty. Write exclude=\['b/kernel'\]",
        ),
        (
            lambda: {"m": {"kernel": weight(64, 3).at[5, 1].set(jnp.nan)}},
            "nf4",
            {},
            "'m/kernel' is not finite.*exclude=",
        ),
        (
            lambda: {"m": {"kernel": weight(64, 3).at[5, 1].set(-jnp.inf)}},
            "int8",
            {},
            "'m/kernel' is not finite",
        ),
        (
            lambda: {"m": {"kernel": w(64, 3, dtype=jnp.int32)}},
            "nf4",
            {"targets": "m"},
            "'m' of targets: 'm/kernel' is int32",
        ),
        (
            small,
            "nf4",
            {},
            "'query/kernel' is quantized already. Write exclude=",
        ),
        (lambda: broken(scale=jnp.ones((5, 3))), "nf4", {}, "'m/kernel' is no quan"),
        (lambda: {}, "nf4", {}, "nothing to quantize"),
    ],
)
def test_quantize_refuses_bad_input(params, how, options, match):
    with pytest.raises(ValueError, match=match):
        lj.quantize(params(), how, **options)


def test_quantize_refuses_what_is_no_tree():
    with pytest.raises(TypeError, match="params"):
        lj.quantize(weight(64, 3), "nf4")


def test_dequantize_needs_a_quantized_leaf():
    with pytest.raises(
        ValueError, match=r"No leaf .* is quantized. Pass a tree from q"
    ):
        lj.dequantize(model())


USES = {
    "lorafy": lambda p: lj.lorafy(p, 2),
    "dequantize": lj.dequantize,
    "lora": lambda p: lj.lora(lambda p: p)(p),
    "merge": lj.merge,
    "count": lj.count,
    "explain": lambda p: lj.explain(lambda p: p, p),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scale": jnp.ones((5, 3))}, r"scale of shape \(5, 3\) makes no blocks"),
        ({"scale": jnp.ones((2, 3), jnp.int32)}, "must be floating"),
        ({"values": jnp.ones((64, 3))}, "its values are float32"),
        ({"scale": None}, "its scale is None"),
    ],
)
def test_quantized_leaves_refuses_a_broken_one_by_path(use, changes, match):
    with pytest.raises(
        ValueError, match=f"'m/kernel' is no quantized array: .*{match}"
    ):
        USES[use](broken(**changes))


def test_lorafy_also_refuses_quantized_leaves():
    match = r"also names 'head/kernel', which is quantized: .*exclude=\['head/kernel'"
    with pytest.raises(ValueError, match=match):
        lj.lorafy(small(), 2, targets="query", also="head")


def test_quantize_leaves_gradients_of_adapters_alone():
    params, x = lj.lorafy({"kernel": small()["head"]["kernel"]}, 2), weight(3, 32)
    loss = lambda p: lj.lora(lambda p, x: x @ p["kernel"])(p, x).sum()
    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
        jax.grad(loss)(params)
    adapters, base = lj.split(params)
    grads = jax.grad(lambda a: loss(lj.combine(a, base)))(adapters)
    allowed = jax.grad(loss, allow_int=True)(params)
    np.testing.assert_array_equal(grads["lora_b"], allowed["lora_b"])


# Every container


def layer(wrap=lambda x, names: x):
    kernel = wrap(weight(32, 3), ("in", "out"))
    return {"kernel": kernel, "bias": wrap(weight(3), ("out",))}


CONTAINERS = {
    "dict": lambda: {"m": layer(), "head": layer()},
    "frozen": lambda: flax.core.freeze({"m": layer(), "head": layer()}),
    "state": lambda: nnx.State(
        jax.tree.map(nnx.Param, {"m": layer(), "head": layer()})
    ),
    "list": lambda: {"m": [layer(), layer()], "head": layer()},
    "partitioned": lambda: {"m": layer(nn.Partitioned), "head": layer(nn.Partitioned)},
    "others": lambda: {
        "params": {"m": layer(), "head": layer()},
        "stats": {"n": np.int32(3), "mean": np.zeros(3, np.float32), "none": None},
        "key": jax.random.key(0),
    },
}


def leaf_bits(params):
    return {
        name: [np.asarray(part).tobytes() for part in jax.tree.leaves(x)]
        for name, x in by_name(params).items()
        if x is not None and name != "key"
    }


@pytest.mark.parametrize("kind", CONTAINERS)
def test_quantize_result_is_accepted_by_every_verb(kind, tmp_path, randomized, close):
    plain = CONTAINERS[kind]()
    base = lj.quantize(plain, "nf4", targets="m")
    assert type(base) is type(plain)
    params = randomized(lj.lorafy(base, 2))
    names = {n for n in by_name(params) if n.endswith(("lora_a", "lora_b"))}

    adapters, frozen = lj.split(params)
    assert {n for n, x in by_name(adapters).items() if x is not None} == names
    joined = lj.combine(adapters, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(by_name(joined)[n] is x for n, x in by_name(params).items())

    trains = {n for n, x in by_name(lj.mask(params)).items() if x is True}
    assert trains == names
    labels = {name for name in by_name(lj.labels(params)).values() if name}
    assert labels == {"lora_a", "lora_b", "frozen"}

    unquantized = lj.lorafy(lj.dequantize(base), 2)
    quantized, floats = lj.count(params), lj.count(unquantized)
    assert quantized[:2] == floats[:2] and quantized.base_bytes < floats.base_bytes
    assert lj.count(base)[:2] == (0, quantized.total - quantized.trainable)

    stripped = lj.strip(params)
    assert jax.tree.structure(stripped) == jax.tree.structure(base)
    assert leaf_bits(stripped) == leaf_bits(base)

    merged = lj.merge(params)
    assert jax.tree.structure(merged) == jax.tree.structure(plain)
    again = lj.merge(lj.dequantize(params))
    assert leaf_bits(merged) == leaf_bits(again)
    assert leaf_bits(lj.merge(base)) == leaf_bits(lj.dequantize(base))

    held = lj.detach(params)
    assert not any(map(is_quantized, by_name(held).values()))
    assert leaf_bits(lj.attach(held, base)) == leaf_bits(params)
    file = tmp_path / "adapter.safetensors"
    lj.save(file, params)
    for to in (base, plain, lj.dequantize(base)):
        loaded = lj.load(file, to)
        assert leaf_bits(lj.detach(loaded)) == leaf_bits(held)
    other = jax.tree.map(
        lambda x: -x if jnp.issubdtype(x.dtype, jnp.floating) else x, plain
    )
    match = "same_base=False"
    with pytest.raises(ValueError, match=match):
        lj.load(file, lj.quantize(other, "nf4", targets="m"))
    lj.load(file, other, same_base=False)


def test_load_puts_an_adapter_of_the_plain_base_on_a_quantized_one(
    tmp_path, randomized
):
    plain = {"kernel": weight(128, 64)}
    lj.save(tmp_path / "a.safetensors", randomized(lj.lorafy(plain, 2)))
    for how in ("int8", "int4", "nf4"):
        lj.load(tmp_path / "a.safetensors", lj.quantize(plain, how))
        with pytest.raises(ValueError, match="same_base=False"):
            lj.load(
                tmp_path / "a.safetensors",
                lj.quantize({"kernel": weight(128, 64)}, how),
            )


def test_export_peft_and_import_peft_on_a_quantized_base(tmp_path, randomized):
    base = lj.quantize(
        {"q": {"kernel": weight(32, 8)}, "o": {"kernel": weight(8, 32)}}, "nf4"
    )
    params = randomized(lj.lorafy(base, 2))
    lj.export_peft(tmp_path / "peft", params, names={"*": "model.{}_proj"})
    back = lj.import_peft(tmp_path / "peft", base, names={"*": "model.{}_proj"})
    assert leaf_bits(back) == leaf_bits(params)


def test_quantize_result_is_unchanged_by_a_training_step(optax_promotion):
    params, tx = (
        lj.lorafy(small(), 2, targets=["kernel", "tokens"]),
        lj.adapters_only(optax.adamw(0.1)),
    )

    @jax.jit
    def step(params, state):
        loss = lambda p: jnp.sin(lj.lora(apply)(p, IDS)).sum()
        grads = jax.grad(loss, allow_int=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    assert (
        sum(x.size for x in jax.tree.leaves(state) if x.ndim)
        == 2 * lj.count(params).trainable
    )
    after, state = step(params, state)
    after, state = step(after, state)
    assert leaf_bits(lj.strip(after)) == leaf_bits(lj.strip(params))
    moved = lj.split(after)[0]["head"]["lora_b"]
    assert np.abs(moved).max() > 0
    assert jax.tree.structure(after) == jax.tree.structure(params)


# Flax's layers

X, IMAGE = weight(5, 16), weight(2, 6, 6, 16)
LAYERS = {
    "Dense": ({"features": 3}, X),
    "DenseGeneral": ({"features": (2, 3)}, X),
    "Conv": ({"features": 5, "kernel_size": (3, 3)}, IMAGE),
    "Einsum": (
        {"shape": (3, 16, 2), "einsum_str": "bd,ndh->bnh"},
        X,
    ),
    "Embed": ({"num_embeddings": 7, "features": 16}, IDS % 7),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_use_quantized_weights(name, randomized, close):
    options, x = LAYERS[name]
    ours, flaxs = getattr(lj, name)(**options), getattr(nn, name)(**options)
    plain = jax.jit(flaxs.init)(jax.random.key(0), x)
    axes = lj.find_axes(flaxs.apply, plain, x)
    options = {"targets": ["kernel", "embedding"][name == "Embed"], "axes": axes}
    base = lj.quantize(plain, "nf4", block=8, **options)
    assert len(stored(base)) == 1
    params = randomized(lj.lorafy(base, 2, **options))

    @jax.jit
    def results(p):
        merged = lj.merge(p)
        got, want = [ours.apply(p, x)], [flaxs.apply(merged, x)]
        if name == "Embed":
            got.append(ours.apply(p, X, method="attend"))
            want.append(flaxs.apply(merged, X, method="attend"))
        return got, want

    for p in (base, params):
        close(*results(p), atol=1e-4)


# Reports of explain


def test_explain_lists_how_each_weight_is_stored():
    params = lj.lorafy(
        lj.quantize(model(), HOW, block=16, exclude="out"), 2, targets=["head", "out"]
    )
    report = lj.explain(apply, params, IDS)
    rows = {row.path: row for row in report.rows}
    stored = {name: (row.stored, row.rank) for name, row in rows.items()}
    assert stored == {
        "tokens/embedding": ("int8/16", 0),
        "query/kernel": ("nf4/16", 0),
        "head/kernel": ("int4/16", 2),
        "out/kernel": ("float32", 2),
    }
    assert all(row.used and not row.materialized for row in report.rows)
    assert rows["query/kernel"].flops == 0 and rows["query/kernel"].factored == 1
    assert rows["head/kernel"].flops > 0
    lines = str(report).splitlines()
    assert lines[0].split()[:4] == ["weight", "shape", "stored", "rank"]
    assert re.search(r"query/kernel .* nf4/16 +none +1 +\+0", str(report))
    assert "Adapters: 2" in lines[-1] and "Quantized: 3" in lines[-1]


def test_explain_of_quantized_weights_without_adapters():
    fn = lambda p, x: x @ jnp.tanh(p["kernel"])
    base = lj.quantize(
        {"kernel": weight(16, 4), "idle": {"kernel": weight(16, 4)}}, "nf4"
    )
    report = lj.explain(fn, base, X)
    rows = {row.path: row for row in report.rows}
    assert rows["kernel"].materialized == ("tanh",) and not rows["idle/kernel"].used
    assert "never used" in str(report) and "NEVER" not in str(report)
    plain = lj.explain(fn, lj.lorafy({"kernel": weight(16, 4)}, 2), X)
    assert "stored" not in str(plain)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_lora_on_empty_slices_of_quantized_weights(wrap, randomized, close):
    """`jnp.roll` by 0 makes such slices. With an adapter or without."""
    base = {name: {"kernel": np.ones((16, 16), np.float32)} for name in "ab"}
    params = randomized(lj.lorafy(lj.quantize(base, "nf4", block=8), 2, targets="a"))

    def fn(p, x):
        a, b = p["a"]["kernel"], p["b"]["kernel"]
        return x @ jnp.roll(a, 0, 0) @ jnp.roll(b, 0, 1), a[:0], b[8:8].reshape(0, 2, 8)

    x = np.ones((2, 16), np.float32)
    want = jax.jit(lambda params: fn(lj.merge(params), x))(params)
    close(wrap(lj.lora(fn))(params, x), want)


def test_quantize_of_a_table_with_path_like_keys_shares_scales_along_rows():
    table = jnp.asarray(np.random.default_rng(0).standard_normal((6, 8)), jnp.float32)
    flat = lj.quantize({"tokens/embedding": table}, "int8", targets="tokens")
    deep = lj.quantize({"tokens": {"embedding": table}}, "int8", targets="tokens")
    scale = flat["tokens/embedding"].scale
    assert scale.shape == (6, 1)
    np.testing.assert_array_equal(scale, deep["tokens"]["embedding"].scale)
