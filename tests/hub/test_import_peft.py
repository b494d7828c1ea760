"""import_peft, on files written here in the layout that PEFT writes."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import lora_jax as lj

NAMES = {"blocks/*": "m.{layer}.{}", "tokens": "m.tokens", "head": "score"}
LAYERS = 3
AXES = {f"blocks/{name}/kernel": lj.Axes((0,), (1,), (2,)) for name in "qo"}


def base():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jax.device_put(
        np.asarray(rng.standard_normal(shape), jnp.float32)
    )
    return {
        "tokens": {"embedding": draw(7, 4)},
        "blocks": {
            "q": {"kernel": draw(LAYERS, 4, 6), "bias": draw(LAYERS, 6)},
            "o": {"kernel": draw(LAYERS, 6, 4), "bias": draw(LAYERS, 4)},
        },
        "head": {"kernel": draw(4, 3), "bias": draw(3)},
    }


def peft_folder(folder, config=None, tensors=None, drop=()):
    """Three layers of two modules, a table and a head, with ranks of their own."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    full = {"m.tokens.lora_embedding_A": draw(2, 7)}
    full["m.tokens.lora_embedding_B"] = draw(4, 2)
    for i in range(LAYERS):
        r = 1 if i == 1 else 2
        full[f"m.{i}.q.lora_A.weight"] = draw(r, 4)
        full[f"m.{i}.q.lora_B.weight"] = draw(6, r)
    full["m.0.o.lora_A.weight"], full["m.0.o.lora_B.weight"] = draw(2, 6), draw(4, 2)
    full |= {"score.weight": draw(3, 4), "score.bias": draw(3)}
    full |= tensors or {}
    full = {k: x for k, x in full.items() if k not in drop and x is not None}
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(
        {k if k[:4] == "raw:" else f"base_model.model.{k}": x for k, x in full.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q", "0.o", "tokens"],
        "rank_pattern": {"1.q": 1},
        "alpha_pattern": {"m.2.q": 5},
        "modules_to_save": ["score"],
    } | (config or {})
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return full


def test_import_peft_uses_every_tensor(tmp_path, close):
    tensors = peft_folder(tmp_path)
    plain = base()
    params = lj.import_peft(tmp_path, plain, NAMES)
    moved = jax.tree.map(lambda x, y: np.asarray(x - y), lj.merge(params), plain)
    product = lambda n: (
        (tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"]).T
    )
    scales = {0: 3 / 2, 1: 3.0, 2: 5 / 2}
    for i, scale in scales.items():
        close(moved["blocks"]["q"]["kernel"][i], scale * product(f"m.{i}.q"))
    close(moved["blocks"]["o"]["kernel"][0], 1.5 * product("m.0.o"))
    assert not moved["blocks"]["o"]["kernel"][1:].any()
    a, b = (tensors[f"m.tokens.lora_embedding_{n}"] for n in "AB")
    close(moved["tokens"]["embedding"], 1.5 * (b @ a).T)
    head = params["head"]
    np.testing.assert_array_equal(head["lora_w"], tensors["score.weight"].T)
    np.testing.assert_array_equal(head["bias_lora_w"], tensors["score.bias"])
    old = {id(leaf) for leaf in jax.tree.leaves(plain)}
    assert {id(leaf) for leaf in jax.tree.leaves(lj.strip(params))} == old
    assert params["blocks"]["q"]["lora_scale"].tolist() == [1.5, 3.0, 2.5]
    # The padding of the smaller rank stays zero, because its gradients are zero.
    assert not params["blocks"]["q"]["lora_a"][1, :, 1].any()
    lj.export_peft(tmp_path / "out", params, NAMES)
    out = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sorted(out) == sorted(f"base_model.model.{name}" for name in tensors)
    for name, x in tensors.items():
        np.testing.assert_array_equal(out[f"base_model.model.{name}"], x)


def test_import_peft_dtypes(tmp_path):
    tensors = peft_folder(tmp_path)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base())
    params = lj.import_peft(tmp_path, half, NAMES)
    assert params["tokens"]["lora_a"].dtype == jnp.float32
    a = tensors["m.tokens.lora_embedding_A"].T
    np.testing.assert_array_equal(params["tokens"]["lora_a"], a)
    params = lj.import_peft(tmp_path, half, NAMES, dtype=jnp.bfloat16)
    assert params["tokens"]["lora_b"].dtype == jnp.bfloat16
    # A trained copy is never rounded to its leaf's dtype, nor to that of A.
    assert params["head"]["lora_w"].dtype == jnp.float32
    want = tensors["score.weight"].T
    np.testing.assert_array_equal(params["head"]["lora_w"], want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("container", ["dict", "boxes", "state", "shapes"])
def test_import_peft_restores_a_trained_head(
    tmp_path, randomized, close, container, dtype
):
    """Only also= in lorafy names it."""
    wrap = {
        "dict": lambda x: x,
        "boxes": lambda x: nn.Partitioned(x, ("a", "b", "c")[: x.ndim]),
        "state": nnx.Param,
        "shapes": lambda x: x,
    }[container]
    plain = jax.tree.map(lambda x: wrap(x.astype(dtype)), base())
    plain = nnx.State(plain) if container == "state" else plain
    also = ["head", "blocks/o"]
    params = randomized(
        lj.lorafy(plain, 2, targets=["q", "tokens"], axes=AXES, also=also)
    )
    lj.export_peft(tmp_path, params, NAMES)
    onto = jax.eval_shape(base) if container == "shapes" else plain
    back = lj.import_peft(tmp_path, onto, NAMES, axes=AXES)
    got, want = (jax.tree.leaves_with_path(lj.split(x)[0]) for x in (back, params))
    assert [path for path, _ in got] == [path for path, _ in want]
    for (_, x), (_, y) in zip(got, want, strict=True):
        assert x.dtype == y.dtype == jnp.float32
        np.testing.assert_array_equal(x, y)
    if container == "shapes":
        return
    assert jax.tree.structure(back) == jax.tree.structure(params)
    shared = zip(*map(jax.tree.leaves, (lj.strip(back), plain)), strict=True)
    assert all(x is y for x, y in shared)
    close(lj.merge(back), lj.merge(params))
    lj.export_peft(tmp_path / "again", back, NAMES)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        first, second = tmp_path / file, tmp_path / "again" / file
        assert first.read_bytes() == second.read_bytes()


def test_import_peft_of_a_sharded_head(tmp_path, randomized):
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    shard = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))
    draw = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
    plain = {
        "a": {"kernel": jax.device_put(draw(4, 8), shard("x", "y"))},
        "head": {
            "kernel": jax.device_put(draw(8, 4), shard(None, "y")),
            "bias": jax.device_put(draw(4), shard("y")),
        },
    }
    fresh = lj.lorafy(plain, 2, targets="a", also="head")
    params = randomized(fresh)
    names = {"a": "a", "head": "score"}
    lj.export_peft(tmp_path, params, names)
    back = lj.import_peft(tmp_path, plain, names)
    for name in ("lora_w", "bias_lora_w"):
        x = back["head"][name]
        assert x.sharding == fresh["head"][name].sharding and x.dtype == jnp.float32
        assert not x.sharding.is_fully_replicated
        np.testing.assert_array_equal(x, params["head"][name])


ones = lambda *shape: np.ones(shape, np.float32)


@pytest.mark.parametrize(
    "change, match",
    [
        (
            dict(drop=["m.2.q.lora_B.weight"]),
            r"'m.2.q'.*has the tensors \['.lora_A.weight'\]",
        ),
        (
            dict(drop=["m.2.q.lora_A.weight", "m.2.q.lora_B.weight"]),
            "lacks the tensors of 'm.2.q'.*truncated",
        ),
        (dict(drop=["score.bias"]), "lacks the tensors of 'score.bias'"),
        (dict(drop=["score.bias", "score.weight"]), "lacks the tensors of 'score"),
        (dict(config={"target_modules": ["q", "tokens"]}), "tensors of 'm.0.o', which"),
        (
            dict(config={"modules_to_save": None}),
            "'base_model.model.score.bias' is of no",
        ),
        (dict(config={"r": 3}), "of shape .*by rank 3 of the config"),
        (dict(config={"rank_pattern": {}}), "'m.1.q.lora_A.weight' must be .*rank 2"),
        (
            dict(tensors={"m.0.q.lora_A.weight": ones(4, 2)}),
            r"must be of shape \(2, 4\).*found \(4, 2\).*looks transposed",
        ),
        (dict(tensors={"m.0.q.lora_A.weight": ones(2, 5)}), r"found \(2, 5\)"),
        (
            dict(tensors={"m.0.q.lora_embedding_A": ones(2, 4)}),
            "has the tensors .*embedding_A",
        ),
        (
            dict(tensors={"m.0.x.lora_A.weight": ones(2, 4)}),
            "gives to no weight. Close",
        ),
        (dict(tensors={"m.0.q.lora_a.weight": ones(2, 4)}), "no part of a plain LoRA"),
        (
            dict(tensors={"m.0.q.lora_magnitude_vector": ones(6)}),
            r"'m.0.q'.*'.lora_magnitude_vector'\], and",
        ),
        (dict(tensors={"m.0.q.lora_B.bias": ones(6)}), "config has no lora_bias"),
        (dict(config={"lora_bias": True}), "lacks the tensors of 'm.0.o.lora_B.bias'"),
        (
            dict(tensors={"m.0.q.base_layer.out_proj.lora_A.weight": ones(2, 4)}),
            "adapter of 'm.0.q', an nn.MultiheadAttention",
        ),
        (dict(tensors={"raw:m.0.q.lora_A.weight": ones(2)}), "does not begin with"),
        (dict(tensors={"other.weight": ones(2)}), "has no leaf in base. Close"),
        (dict(tensors={"score.weight": ones(4, 3)}), r"must be \(3, 4\)"),
        (dict(tensors={"m.tokens.base_layer.weight": ones(7, 4)}), "not the weight of"),
        (dict(tensors={"m.tokens.base_layer.weight": ones(8, 4)}), "not the weight of"),
        (dict(tensors={"m.0.q.lora_A.weight": np.full((2, 4), np.inf, "f")}), "finite"),
        (dict(config={"use_dora": True}), "'.lora_magnitude_vector'] are needed"),
    ],
)
def test_import_peft_refuses_what_does_not_fit(tmp_path, change, match):
    peft_folder(tmp_path / "peft", **change)
    with pytest.raises(ValueError, match=match):
        lj.import_peft(tmp_path / "peft", base(), NAMES)


def test_import_peft_takes_the_embedding_itself(tmp_path):
    table = np.asarray(base()["tokens"]["embedding"])
    peft_folder(tmp_path, tensors={"m.tokens.base_layer.weight": table})
    lj.import_peft(tmp_path, base(), NAMES)
    shapes = jax.eval_shape(base)
    peft_folder(tmp_path, tensors={"m.tokens.base_layer.weight": ones(8, 4)})
    with pytest.raises(ValueError, match="not the weight of base"):
        lj.import_peft(tmp_path, shapes, NAMES)


def test_import_peft_drops_untrained_embeddings(tmp_path):
    """PEFT saves all embeddings of a model if it takes its vocabulary to have grown."""
    table = np.asarray(base()["tokens"]["embedding"])
    drop = [f"m.tokens.lora_embedding_{n}" for n in "AB"]
    config = {"target_modules": ["q", "0.o"]}
    peft_folder(tmp_path, config, {"m.tokens.weight": table}, drop)
    params = lj.import_peft(tmp_path, base(), NAMES)
    assert params["tokens"].keys() == {"embedding"}


def test_import_peft_takes_entries_that_match_nothing(tmp_path):
    """PEFT's config may name absent modules, and those that it also excludes."""
    config = {
        "target_modules": ["q", "0.o", "1.o", "tokens", "W_pack"],
        "exclude_modules": ["1.o"],
        "modules_to_save": ["classifier", "score"],
    }
    peft_folder(tmp_path, config)
    params = lj.import_peft(tmp_path, base(), NAMES)
    assert params["blocks"]["o"]["lora_scale"].shape == (LAYERS,)


def test_import_peft_refuses_a_part_of_a_stack(tmp_path):
    whole = {"m.0.o.weight": ones(4, 6), "m.0.o.bias": ones(4)}
    drop = [f"m.0.o.lora_{n}.weight" for n in "AB"]
    config = {"target_modules": ["q", "tokens"], "modules_to_save": ["score", "0.o"]}
    peft_folder(tmp_path, config, whole, drop)
    with pytest.raises(ValueError, match=r"is a stack\. The folder has 'm.0.o'"):
        lj.import_peft(tmp_path, base(), NAMES)


def test_import_peft_refuses_a_copy_of_an_integer_leaf(tmp_path):
    peft_folder(tmp_path)
    plain = base()
    plain["head"]["bias"] = jnp.zeros(3, int)
    match = "holds 'head/bias', which is int32 in base, and only floating leaves"
    with pytest.raises(ValueError, match=match):
        lj.import_peft(tmp_path, plain, NAMES)


def test_import_peft_refuses_two_adapters_of_one_name(tmp_path):
    tensors = {f"m.k.lora_{n}.weight": ones(2, 2) for n in "AB"}
    config = {"target_modules": ["q", "0.o", "tokens", "k"]}
    peft_folder(tmp_path, config, tensors)
    plain = base()
    plain["tokens"]["kernel"] = jnp.ones((2, 2))
    names = {**NAMES, "tokens/embedding": "m.tokens", "tokens/kernel": "m.k"}
    del names["tokens"]
    with pytest.raises(ValueError, match=r"tokens/.* belongs to no weight: found 2"):
        lj.import_peft(tmp_path, plain, names)


def test_import_peft_refuses_a_folder_without_an_adapter(tmp_path):
    tensors = peft_folder(tmp_path)
    drop = [name for name in tensors if ".lora_" in name]
    peft_folder(tmp_path, drop=drop)
    with pytest.raises(ValueError, match="holds no adapter"):
        lj.import_peft(tmp_path, base(), NAMES)


def test_import_peft_refuses_a_copy_of_unknown_layout(tmp_path):
    """PyTorch's layout of a leaf that is trained in full must be known."""
    peft_folder(tmp_path)
    plain, names = base(), {**NAMES, "ConvTranspose_0": "score"}
    plain["ConvTranspose_0"] = plain.pop("head")
    del names["head"]
    with pytest.raises(ValueError, match=r"flips the windows.*PEFT's modules_to_save"):
        lj.import_peft(tmp_path, plain, names)


def test_import_peft_gives_the_function_a_trained_head(tmp_path):
    """The imported copy is in the place of its leaf, and can be trained."""
    tensors = peft_folder(tmp_path)
    fn = lambda params, x: x @ params["head"]["kernel"] + params["head"]["bias"][None]
    params = lj.import_peft(tmp_path, base(), NAMES)
    x, head = jnp.ones((2, 4)), {"head": params["head"]}
    want = np.ones((2, 4)) @ tensors["score.weight"].T + tensors["score.bias"]
    np.testing.assert_allclose(lj.lora(fn)(head, x), want, atol=1e-5)
    assert lj.mask(params)["head"] == {
        "kernel": False,
        "bias": False,
        "lora_w": True,
        "bias_lora_w": True,
    }


def test_import_peft_refuses_a_cast_out_of_range(tmp_path):
    peft_folder(tmp_path, tensors={"m.0.q.lora_A.weight": 1e6 * ones(2, 4)})
    with pytest.raises(ValueError, match=r"'m.0.q' in float16.*not finite"):
        lj.import_peft(tmp_path, base(), NAMES, dtype=jnp.float16)


def test_import_peft_refuses_bad_input(tmp_path):
    peft_folder(tmp_path)
    params = lj.import_peft(tmp_path, base(), NAMES)
    with pytest.raises(
        ValueError, match=r"import_peft\(folder, strip\(params\), names"
    ):
        lj.import_peft(tmp_path, params, NAMES)
    with pytest.raises(ValueError, match="dtype must be floating, found"):
        lj.import_peft(tmp_path, base(), NAMES, dtype=jnp.int8)
    wide = base()
    wide["tokens"]["embedding"] = jnp.ones((7, 5))
    with pytest.raises(ValueError, match=r"'m.tokens.lora_embedding_B' must be .*5, 2"):
        lj.import_peft(tmp_path, wide, NAMES)
    with pytest.raises(ValueError, match="No leaf matches 'block/"):
        lj.import_peft(tmp_path, base(), {"block/*": "m.{layer}.{}"})
    twice = NAMES | {"blocks/o": "m.{layer}.q", "blocks/q": "m.{layer}.q"}
    del twice["blocks/*"]
    with pytest.raises(ValueError, match=r"have one name, 'm\.0\.q'"):
        lj.import_peft(tmp_path, base(), twice)
    with pytest.raises(FileNotFoundError):
        lj.import_peft(tmp_path / "not", base(), NAMES)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="truncated"):
        lj.import_peft(tmp_path, base(), NAMES)


def test_import_peft_of_square_transposed_weights_needs_axes(tmp_path):
    """PyTorch's GPT-2 stores (in, out), and Flax either: a square does not show it."""
    plain, names = {"c": {"kernel": jnp.ones((4, 4))}}, {"c": "h.c"}
    axes = {"c/kernel": lj.Axes((), (1,), (0,))}
    params = lj.lorafy(plain, 2, axes=axes)
    params["c"]["lora_b"] += 1
    lj.export_peft(tmp_path, params, names, fan_in_fan_out=True)
    with pytest.raises(ValueError, match=r"is square.*axes=find_axes\(fn"):
        lj.import_peft(tmp_path, plain, names)
    back = lj.import_peft(tmp_path, plain, names, axes=axes)
    np.testing.assert_array_equal(
        lj.merge(back)["c"]["kernel"], lj.merge(params)["c"]["kernel"]
    )
    # An adapter made without axes has lora_a on the outputs: it is transposed.
    turned = lj.lorafy(plain, 2)
    turned["c"]["lora_b"] += 1
    lj.export_peft(tmp_path, turned, names, axes=axes, fan_in_fan_out=True)
    back = lj.import_peft(tmp_path, plain, names, axes=axes)
    np.testing.assert_allclose(
        lj.merge(back)["c"]["kernel"], lj.merge(turned)["c"]["kernel"], rtol=1e-6
    )


def test_import_peft_says_what_to_do_about_a_missing_folder(tmp_path):
    read = lambda path: lj.import_peft(path, base(), NAMES)
    with pytest.raises(FileNotFoundError, match=r"snapshot_download\('org/an-adapter"):
        read("org/an-adapter.v1")
    peft_folder(tmp_path / "b")
    peft_folder(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match=r"has the adapters a, b: pass '.*/a'"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a file in it"):
        read(tmp_path / "a" / "adapter_config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json in"):
        read(tmp_path / "empty")


def test_import_peft_names_a_dtype_that_it_cannot_read(tmp_path):
    peft_folder(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    size, header = 0, {}
    for name, x in tensors.items():  # one byte for each element
        header[name] = {"dtype": "F8_E4M3", "shape": x.shape}
        header[name]["data_offsets"] = [size, size := size + x.size]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(ValueError, match=r"is F8_E4M3\. Only .*cast it in PyTorch"):
        lj.import_peft(tmp_path, base(), NAMES)


@pytest.mark.parametrize("layers, experts", [(16, 64), (192, 1)], ids=["stack", "own"])
def test_import_peft_of_many_modules(tmp_path, layers, experts):
    """Experts with scales of their own, stacked or each with its own line of the map.

    Comparing each module with each entry of the config, as PEFT does, takes minutes.
    """
    parts = ("up", "down", "gate")
    stack = (experts,) if experts > 1 else ()
    axes = lj.Axes((0,), (1,), (2,)) if stack else lj.Axes((), (0,), (1,))
    base, names, all_axes, scale = {}, {}, {}, np.arange(experts, dtype=np.float32) + 2
    adapted = {}
    for i in range(layers):
        base[f"layer_{i}"] = {p: {"kernel": np.ones((*stack, 2, 2))} for p in parts}
        adapted[f"layer_{i}"] = {
            part: {
                "kernel": base[f"layer_{i}"][part]["kernel"],
                "lora_a": np.ones((*stack, 2, 1), np.float32),
                "lora_b": np.full((*stack, 1, 2), i + 1, np.float32),
                "lora_scale": (scale * (i + 1)).reshape(stack),
            }
            for part in parts
        }
        for part in parts:
            path = f"layer_{i}/{part}/kernel"
            all_axes[path] = axes
            names[path] = f"m.layers.{i}.{part}" + ".{expert}" * len(stack)
    lj.export_peft(tmp_path / "out", adapted, names, axes=all_axes)
    found = lj.import_peft(tmp_path / "out", base, names, axes=all_axes)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert len(config["alpha_pattern"]) > 0.9 * layers * experts * 3
    same = jax.tree.map(lambda x, y: np.array_equal(x, y), found, adapted)
    assert all(jax.tree.leaves(same))
