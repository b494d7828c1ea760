"""`import_weights` against NumPy, `quantize`, and what it must refuse."""

import itertools
import json
import struct

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj

LAYERS, WIDTH, HEADS, SIZE, MLP, VOCAB = 3, 64, 2, 32, 128, 10
NAMES = {
    "layers/q": "model.layers.{layer}.self_attn.q_proj",
    "layers/kv": tuple(f"model.layers.{{layer}}.self_attn.{n}_proj" for n in "kv"),
    "layers/o": "model.layers.{layer}.self_attn.o_proj",
    "layers/up": "model.layers.{layer}.mlp.up_proj",
    "layers/norm": "model.layers.{layer}.norm",
    "embed": ("model.embed_tokens", "lm_head"),
}
AXES = {
    "layers/q/kernel": lj.Axes((0,), (1,), (2, 3)),
    "layers/kv/kernel": lj.Axes((0,), (1,), (2,)),
    "layers/o/kernel": lj.Axes((0,), (1, 2), (3,)),
    "layers/up/kernel": lj.Axes((0,), (1,), (2,)),
}
SHAPES = {
    "q": {"kernel": (LAYERS, WIDTH, HEADS, SIZE), "bias": (LAYERS, HEADS, SIZE)},
    "kv": {"kernel": (LAYERS, WIDTH, 3 * SIZE)},
    "o": {"kernel": (LAYERS, HEADS, SIZE, WIDTH)},
    "up": {"kernel": (LAYERS, WIDTH, MLP)},
    "norm": {"scale": (LAYERS, WIDTH)},
}


def like(dtype=jnp.float32, place=lambda path, shape: None):
    tree = {"layers": SHAPES, "embed": {"embedding": (VOCAB, WIDTH)}}
    return jax.tree_util.tree_map_with_path(
        lambda path, s: jax.ShapeDtypeStruct(s, dtype, sharding=place(path, s)),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@pytest.fixture(scope="module")
def torch():
    """The tensors of a small model, and the tree that NumPy makes of them."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    tensors, layers = {"model.embed_tokens.weight": draw(VOCAB, WIDTH)}, []
    for i in range(LAYERS):
        q, bias = draw(HEADS * SIZE, WIDTH), draw(HEADS * SIZE)
        k, v = draw(SIZE, WIDTH), draw(2 * SIZE, WIDTH)
        o, up, norm = draw(WIDTH, HEADS * SIZE), draw(MLP, WIDTH), draw(WIDTH)
        names = "self_attn.q_proj.weight self_attn.q_proj.bias self_attn.k_proj.weight"
        names += " self_attn.v_proj.weight self_attn.o_proj.weight mlp.up_proj.weight"
        for name, x in zip(
            [*names.split(), "norm.weight"], (q, bias, k, v, o, up, norm), strict=True
        ):
            tensors[f"model.layers.{i}.{name}"] = x
        layers.append(
            {
                "q": {
                    "kernel": q.T.reshape(WIDTH, HEADS, SIZE),
                    "bias": bias.reshape(HEADS, SIZE),
                },
                "kv": {"kernel": np.concatenate([k.T, v.T], 1)},
                "o": {"kernel": o.T.reshape(HEADS, SIZE, WIDTH)},
                "up": {"kernel": up.T},
                "norm": {"scale": norm},
            }
        )
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *layers)
    embed = {"embedding": tensors["model.embed_tokens.weight"]}
    return tensors, {"layers": stacked, "embed": embed}


def written(folder, tensors, shards=1, **config):
    """Writes a checkpoint as a folder, in one file or in several with an index."""
    names = sorted(tensors)
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    else:
        where = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in names[i::shards]}
            safetensors.numpy.save_file(part, folder / file)
            where |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("source", ["mapping", "file", "folder", "shards"])
def test_import_weights_has_the_values_of_the_tensors(torch, tmp_path, source):
    tensors, want = torch
    checkpoint = tensors
    if source != "mapping":
        checkpoint = written(tmp_path, tensors, 3 if source == "shards" else 1)
    if source == "file":
        checkpoint = tmp_path / "model.safetensors"
    assert_equal(lj.import_weights(checkpoint, like(), NAMES), want)


@pytest.mark.parametrize("how", ["int8", "nf4", {"kernel": "nf4", "embed": "int8"}])
def test_import_weights_quantizes_as_quantize_does(torch, how):
    tensors, want = torch
    # The tensors show which dimensions are inputs.
    got = lj.import_weights(tensors, like(), NAMES, how=how)
    want = jax.tree.map(jnp.asarray, want)
    assert_equal(got, lj.quantize(want, how, axes=AXES))


@pytest.mark.parametrize("how", [None, "nf4", "int8"])
@pytest.mark.parametrize("dim", range(4))
def test_import_weights_fills_each_device_with_its_part(torch, dim, how):
    """Each dimension is cut in turn, where the size of the mesh divides it."""
    tensors, want = torch
    mesh = jax.make_mesh((2,), ("x",))

    def place(path, shape):
        spec = [None] * len(shape)
        if dim < len(shape) and shape[dim] % 2 == 0:
            spec[dim] = "x"
        return NamedSharding(mesh, P(*spec))

    target = like(place=place)
    got = lj.import_weights(tensors, target, NAMES, how=how, axes=AXES)
    want = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), want, target)
    want = want if how is None else lj.quantize(want, how, axes=AXES)
    assert_equal(got, want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_import_weights_reads_only_what_its_devices_hold(torch):
    """As with several processes: the rows of one device of two."""
    tensors, want = torch
    read = []

    class Logged(np.ndarray):
        def __getitem__(self, index):
            found = np.asarray(super().__getitem__(index))
            read.append((self.shape, found.shape))
            return found

    mesh = jax.make_mesh((2,), ("x",))
    place = lambda path, shape: NamedSharding(mesh, P(*[None] * (len(shape) - 1), "x"))
    up = {"layers": {"up": like(place=place)["layers"]["up"]}}
    from lora_jax._hub import checkpoint

    def in_memory(name, x):
        view = x.view(Logged)
        return checkpoint.CheckpointTensor(
            name, x.shape, x.dtype.name, lambda index: view[index]
        )

    tensors = {n: x for n, x in tensors.items() if "up_proj" in n}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_in_memory", in_memory)
        got = lj.import_weights(tensors, up, {"layers/up": NAMES["layers/up"]})
        assert_equal(got, {"layers": {"up": want["layers"]["up"]}})
        assert set(read) == {((MLP, WIDTH), (MLP // 2, WIDTH))}
        # Devices with equal parts share what is read.
        read.clear()
        replicated = lambda path, shape: NamedSharding(mesh, P())
        up = {"layers": {"up": like(place=replicated)["layers"]["up"]}}
        lj.import_weights(tensors, up, {"layers/up": NAMES["layers/up"]})
        assert read == [((MLP, WIDTH), (MLP, WIDTH))] * LAYERS


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, None])
def test_import_weights_casts_from_the_dtype_of_the_file(torch, tmp_path, dtype):
    tensors, want = torch
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    folder = written(tmp_path, tensors)
    got = lj.import_weights(folder, like(), NAMES, dtype=dtype)
    cast = lambda x: x.astype(ml_dtypes.bfloat16).astype(dtype or np.float32)
    assert_equal(got, jax.tree.map(cast, want))


def test_import_weights_keeps_boxes_and_containers(torch):
    tensors, want = torch

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.ones, (None, "x"))
            return nn.Dense(MLP, use_bias=False, kernel_init=init, name="up")(x)

    abstract = jax.eval_shape(Model().init, jax.random.key(0), jnp.ones((1, WIDTH)))
    one = {"up_proj.weight": tensors["model.layers.1.mlp.up_proj.weight"]}
    got = lj.import_weights(one, abstract, {"up": "up_proj"})
    assert isinstance(got["params"]["up"]["kernel"], nn.Partitioned)
    np.testing.assert_array_equal(
        nn.unbox(got)["params"]["up"]["kernel"], want["layers"]["up"]["kernel"][1]
    )


def test_import_weights_fills_an_abstract_module(torch):
    """A random key has no name and keeps its value; an abstract one is an error."""
    tensors, want = torch
    kernel = "model.layers.1.mlp.up_proj.weight"

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(WIDTH, MLP, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.up(x)

    abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    one = {kernel: tensors[kernel]}
    names = {"up": "model.layers.1.mlp.up_proj"}
    model = lj.import_weights(one, abstract, names)
    assert isinstance(model, Model)
    x = np.ones((2, WIDTH), np.float32)
    y = x @ want["layers"]["up"]["kernel"][1]
    np.testing.assert_allclose(model(x), y, atol=1e-4)
    state = lj.import_weights(one, nnx.state(abstract), names)
    assert isinstance(state, nnx.State)


def test_import_weights_takes_the_layout_of_gpt2_from_its_other_modules():
    """A square matrix has the layout that the others in the checkpoint show."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    tensors = {
        "h.0.attn.c_attn.weight": draw(8, 24),
        "h.0.attn.c_proj.weight": draw(8, 8),
    }
    abstract = lambda *s: {"kernel": jax.ShapeDtypeStruct(s, jnp.float32)}
    names = {"attn": "h.0.attn.c_attn", "proj": "h.0.attn.c_proj"}
    for transposed in (False, True):  # Flax's GPT-2 stores (outputs, inputs)
        target = {
            "attn": abstract(*(24, 8) if transposed else (8, 24)),
            "proj": abstract(8, 8),
        }
        got = lj.import_weights(tensors, target, names)
        for here, there in names.items():
            x = tensors[f"{there}.weight"]
            x = x.T if transposed else x
            np.testing.assert_array_equal(got[here]["kernel"], x)
    alone = {"h.0.attn.c_proj.weight": tensors["h.0.attn.c_proj.weight"]}
    with pytest.raises(ValueError, match=r"'proj/kernel' is square.*'conv1d'"):
        lj.import_weights(alone, {"proj": abstract(8, 8)}, {"proj": names["proj"]})
    got = lj.import_weights(
        alone,
        {"proj": abstract(8, 8)},
        {"proj": names["proj"]},
        kinds={"proj": "conv1d"},
    )
    np.testing.assert_array_equal(got["proj"]["kernel"], *alone.values())


def test_import_weights_of_convolutions_experts_and_full_names():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    tensors = {
        "patches.weight": draw(6, 3, 2, 4),
        "class_token": draw(1, 1, 6),
        "experts.up": draw(4, 5, 6),
        "steps": np.asarray(7, np.int32),
        **{f"moe.{e}.up.weight": draw(6, 5) for e in range(4)},
    }
    s = jax.ShapeDtypeStruct
    target = {
        "conv": {"kernel": s((2, 4, 3, 6), jnp.float32)},
        "cls": s((1, 1, 6), jnp.float32),
        "fused": s((4, 5, 6), jnp.float32),
        "moe": {"kernel": s((4, 5, 6), jnp.float32)},
        "steps": s((), jnp.int32),
    }
    names = {
        "conv": "patches",
        "cls": "class_token",
        "fused": "experts.up",
        "moe": "moe.{expert}.up",
        "steps": "steps",
    }
    got = lj.import_weights(tensors, target, names)
    want = {
        "conv": {"kernel": tensors["patches.weight"].transpose(2, 3, 1, 0)},
        "cls": tensors["class_token"],
        "fused": tensors["experts.up"],
        "moe": {
            "kernel": np.stack([tensors[f"moe.{e}.up.weight"].T for e in range(4)])
        },
        "steps": tensors["steps"],
    }
    assert_equal(got, want)


def test_import_weights_of_a_fused_bias():
    """Its parts are as wide as their tensors, which may differ."""
    rng = np.random.default_rng(0)
    widths = {"q": 4, "k": 2, "v": 2}
    torch = {
        f"{i}.{n}.bias": rng.standard_normal(w)
        for i in range(2)
        for n, w in widths.items()
    }
    torch |= {
        f"{i}.{n}.weight": rng.standard_normal((w, 3))
        for i in range(2)
        for n, w in widths.items()
    }
    s = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    target = {"qkv": {"kernel": s(2, 3, 8), "bias": s(2, 8)}}
    found = lj.import_weights(
        torch, target, {"qkv": [f"{{layer}}.{n}" for n in widths]}
    )
    for i in range(2):
        for leaf, name in (("kernel", "weight"), ("bias", "bias")):
            parts = [torch[f"{i}.{n}.{name}"].T for n in widths]
            want = np.concatenate(parts, -1).astype(np.float32)
            np.testing.assert_array_equal(found["qkv"][leaf][i], want)


def test_import_weights_of_a_batch_norm_reads_its_statistics():
    """Not the weight, which has their shape."""
    values = dict(
        zip(("weight", "bias", "running_mean", "running_var"), np.eye(4), strict=True)
    )
    torch = {f"bn.{name}": x for name, x in values.items()}
    s = jax.ShapeDtypeStruct((4,), jnp.float32)
    target = {
        "params": {"norm": {"scale": s, "bias": s}},
        "batch_stats": {"norm": {"mean": s, "var": s}},
    }
    found = lj.import_weights(torch, target, {"norm": "bn"})
    got = {**found["params"]["norm"], **found["batch_stats"]["norm"]}
    for leaf, row in zip(("scale", "bias", "mean", "var"), np.eye(4), strict=True):
        np.testing.assert_array_equal(got[leaf], row)
    with pytest.raises(ValueError, match=r"'norm/gamma' and 'norm/beta' are both the"):
        target = {"norm": {"gamma": s, "beta": s}}
        lj.import_weights(torch, target, {"norm": "bn"}, ignore=["bn.*"])


def test_import_weights_keeps_leaves_that_are_no_arrays():
    target = {"up": {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.float32)}, "step": 3}
    found = lj.import_weights({"up.weight": np.ones((3, 4))}, target, {"*": "{}"})
    assert found["step"] == 3


@pytest.mark.parametrize("leaf", ["embedding", "input_embedding"])
def test_import_weights_of_a_tied_table_takes_either_tensor(torch, leaf):
    tensors, _ = torch
    table = tensors["model.embed_tokens.weight"]
    target = {"embed": {leaf: like()["embed"]["embedding"]}}
    # Only Flax's own name shows that a leaf is a table.
    kinds = None if leaf == "embedding" else {leaf: "embedding"}
    names = {"embed": NAMES["embed"]}
    both = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    for keys in ([0], [1], [0, 1]):
        some = dict([*both.items()][i] for i in keys)
        got = lj.import_weights(some, target, names, kinds=kinds)
        np.testing.assert_array_equal(got["embed"][leaf], table)
    both["lm_head.weight"] = table + 1
    with pytest.raises(ValueError, match=rf"'embed/{leaf}' is both .*they differ"):
        lj.import_weights(both, target, names, kinds=kinds)


def test_import_weights_explains_a_tied_head_without_a_tensor(torch, tmp_path):
    table = {"model.embed_tokens.weight": torch[0]["model.embed_tokens.weight"]}
    config = dict(architectures=["LlamaForCausalLM"], tie_word_embeddings=True)
    folder = written(tmp_path, table, **config)
    one = like()["embed"]["embedding"]
    # As in Tunix, where leaves are not named after PyTorch's tensors.
    names = {"table/w": "model.embed_tokens", "head/w": "lm_head"}
    kinds = {"table/w": "embedding"}
    with pytest.raises(ValueError, match=r"The model is tied.*Give this leaf the name"):
        head = jax.ShapeDtypeStruct(one.shape[::-1], one.dtype)
        both = {"table": {"w": one}, "head": {"w": head}}
        lj.import_weights(folder, both, names, kinds=kinds)
    with pytest.raises(ValueError, match=r"write kinds=\{'table/w': 'embedding'\}"):
        lj.import_weights(folder, {"table": {"w": one}}, {"table": NAMES["embed"]})


def without(tensors, name):
    return {n: x for n, x in tensors.items() if n != name}


Q = "model.layers.1.self_attn.q_proj.weight"
BAD = {
    "missing": (
        lambda t: without(t, Q),
        {},
        r"no tensor 'model.layers.1.self_attn.q_proj.weight' for 'layers/q/kernel'",
    ),
    "extra": (
        lambda t: t | {"model.extra.weight": np.ones(2, np.float32)},
        {},
        r"No leaf takes 1 tensors.*'model.extra.weight'.*ignore=",
    ),
    "shape": (
        lambda t: t | {Q: np.ones((WIDTH, 8), np.float32)},
        {},
        r"'layers/q/kernel'.*needs the tensor.*found|checkpoint has \(64, 8\)",
    ),
    "transposed": (
        lambda t: t | {"model.embed_tokens.weight": np.ones((WIDTH, VOCAB), "f")},
        {},
        r"'embed/embedding'.*needs.*\(10, 64\).*has \(64, 10\)",
    ),
    "integers": (
        lambda t: t | {Q: np.ones((WIDTH, WIDTH), np.int32)},
        {},
        r"'layers/q/kernel' is float32, and the tensor .* is int32",
    ),
    "ignore": (lambda t: t, {"ignore": "rotary.*"}, r"No tensor.*'rotary.\*'.*ignore"),
    "how": (lambda t: t, {"how": {"gate": "nf4"}}, r"'gate'"),
    "range": (lambda t: t | {Q: t[Q] * 1e6}, {"dtype": jnp.float16}, r"not finite"),
    "infinite": (
        lambda t: t | {Q: t[Q] * np.inf},
        {"how": "int8", "axes": AXES},
        r"'layers/q/kernel' is not finite",
    ),
    "unnamed": (
        lambda t: t,
        {"names": {k: v for k, v in NAMES.items() if k != "embed"}},
        r"names has no name for 'embed/embedding'",
    ),
    "pattern": (
        lambda t: t,
        {"names": NAMES | {"gate": "x"}},
        r"No leaf matches 'gate'",
    ),
    "adapters": (lambda t: t, {"like": "lorafy"}, r"like has adapters"),
    "quantized": (lambda t: t, {"like": "quantize"}, r"like is quantized"),
    "dtype": (lambda t: t, {"dtype": jnp.int8}, r"dtype must be floating"),
}


@pytest.mark.parametrize("case", BAD)
def test_import_weights_refuses_what_does_not_fit(torch, case):
    change, options, message = BAD[case]
    target, options = like(), dict(options)
    made = options.pop("like", None)
    if made == "lorafy":
        target = lj.lorafy(target, 2, axes=AXES)
    elif made:
        target = lj.quantize(target, "int8", axes=AXES)
    names = options.pop("names", NAMES)
    with pytest.raises(ValueError, match=message):
        lj.import_weights(change(torch[0]), target, names, **options)


def test_import_weights_ignores_tensors_by_name(torch):
    tensors, want = torch
    more = {f"rotary.{i}.inv_freq": np.ones(2, np.float32) for i in range(2)}
    got = lj.import_weights(tensors | more, like(), NAMES, ignore="rotary.*")
    assert_equal(got, want)


def test_import_weights_refuses_damaged_folders(torch, tmp_path):
    tensors, _ = torch
    folder = written(tmp_path, tensors, 3)
    read = lambda: lj.import_weights(folder, like(), NAMES)
    shard = folder / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"00002.*truncated"):
        read()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"1 are missing.*00002"):
        read()
    shard.write_bytes(data)
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    for outside in ("../other.safetensors", "/etc/other.safetensors", "a/../../b"):
        changed = where["weight_map"] | {Q: outside}
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ValueError, match=r"outside of its folder"):
            read()
    index.unlink()
    # Without its index two files may hold one tensor.
    safetensors.numpy.save_file({Q: tensors[Q]}, folder / "consolidated.safetensors")
    with pytest.raises(ValueError, match=r"both hold 'model.layers.1.self_attn.q_proj"):
        read()


def test_import_weights_refuses_formats_by_name(tmp_path):
    target = {"up": {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32)}}
    read = lambda checkpoint: lj.import_weights(checkpoint, target, {"up": "up"})
    codes = np.zeros((4, 8), np.uint8)
    for name, found in {
        "up.qweight": "GPTQ or AWQ",
        "up.SCB": "bitsandbytes in 8 bits",
        "up.weight_packed": "compressed-tensors",
        "up_blocks": "MXFP4",
    }.items():
        with pytest.raises(ValueError, match=rf"'{name}' in {found}.*how='nf4'"):
            read({name: codes})
    entry = {"dtype": "F8_E4M3", "shape": [4, 8], "data_offsets": [0, 32]}
    header = json.dumps({"up.weight": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(32))
    with pytest.raises(ValueError, match=r"'up.weight' in F8_E4M3"):
        read(file)


def test_import_weights_is_linear_in_the_modules(calls):
    def load(n):
        torch = {f"m.{i}.up.weight": np.full((3, 4), i, np.float32) for i in range(n)}
        kernel = {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.float32)}
        target = {f"m_{i}": {"up": kernel} for i in range(n)}
        lj.import_weights(torch, target, {"m_*/up": "m.{}.up"})

    load(100), load(200)  # what is compiled is not counted
    assert calls(lambda: load(200)) < 2.2 * calls(lambda: load(100))


def test_import_weights_opens_a_file_once_for_many_tensors(tmp_path, monkeypatch):
    """Each time its header would be parsed, with all of its names."""
    from lora_jax._hub import checkpoint as module

    torch = {f"m.{i}.up.weight": np.full((3, 4), i, np.float32) for i in range(50)}
    target = {"up": {"kernel": jax.ShapeDtypeStruct((50, 4, 3), jnp.float32)}}
    opened, paths = module._opened, []
    monkeypatch.setattr(module, "_opened", lambda p: paths.append(p) or opened(p))
    folder = written(tmp_path, torch, shards=2)
    lj.import_weights(folder, target, {"up": "m.{layer}.up"})
    assert len(paths) <= 4 + 50
    (folder / "model.safetensors.index.json").unlink()
    safetensors.numpy.save_file(torch, folder / "one.safetensors")
    paths.clear()
    found = lj.import_weights(
        folder / "one.safetensors", target, {"up": "m.{layer}.up"}
    )
    assert len(paths) == 2
    np.testing.assert_array_equal(found["up"]["kernel"][:, 0, 0], np.arange(50.0))
    monkeypatch.setattr(module, "KEPT", 10 * 48)  # bytes; a tensor has 48
    paths.clear()
    lj.import_weights(folder / "one.safetensors", target, {"up": "m.{layer}.up"})
    assert len(paths) == 1 + 5


def test_import_weights_leaves_nothing_behind_if_a_read_fails(torch, tmp_path):
    """A file that is cut while it is read: no tree is returned, no memory is kept."""
    tensors, _ = torch
    folder = written(tmp_path, tensors)
    file = folder / "model.safetensors"
    before = len(jax.live_arrays())
    count = itertools.count()

    from lora_jax._hub import import_weights as module

    def broken(*args):
        if next(count) == 3:
            file.write_bytes(b"")
        return fill(*args)

    fill = module.fill_leaf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fill_leaf", broken)
        with pytest.raises(Exception, match=r"(?i)header|empty|truncated|mmap"):
            lj.import_weights(folder, like(), NAMES)
    assert len(jax.live_arrays()) == before
