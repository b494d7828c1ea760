"""export_peft: the tensors, in NumPy, are the updates of the merged weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from flax.core import freeze

import lora_jax as lj


def tree():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jax.device_put(
        np.asarray(rng.standard_normal(shape), jnp.float32)
    )
    return {
        "tokens": {"embedding": draw(7, 4)},
        "conv": {"kernel": draw(3, 2, 4, 5), "bias": draw(5)},
        "blocks": {
            "query": {"kernel": draw(2, 4, 2, 3), "bias": draw(2, 2, 3)},
            "out": {"kernel": draw(2, 2, 3, 4), "bias": draw(2, 4)},
            "qkv": {"kernel": draw(2, 4, 9)},
        },
        "head": {"kernel": draw(4, 3), "bias": draw(3)},
    }


AXES = {
    "blocks/query/kernel": lj.Axes((0,), (1,), (2, 3)),
    "blocks/out/kernel": lj.Axes((0,), (1, 2), (3,)),
    "blocks/qkv/kernel": lj.Axes((0,), (1,), (2,)),
}
NAMES = {
    "tokens": ("model.tokens", "lm_head"),
    "blocks/qkv": {
        f"model.layers.{{layer}}.{n}": k for n, k in dict(a=3, b=2, c=4).items()
    },
    "blocks/*": "model.layers.{layer}.{}_proj",
    "conv": "model.conv",
    "head": "score",
}


def adapted(randomized, **options):
    ranks, alphas = {"query": 2, "tokens": 3, "*/kernel": 1}, {"out": 3, "*": 0.5}
    return randomized(lj.lorafy(tree(), ranks, alpha=alphas, axes=AXES, **options))


def read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def update(folder, name, table=False):
    """The matrix scale * B A of one module, by the format's own rules."""
    config, tensors = read(folder)
    ends = (".lora_embedding_A", ".lora_embedding_B")
    ends = ends if table else (".lora_A.weight", ".lora_B.weight")
    a, b = (tensors[f"base_model.model.{name}{end}"] for end in ends)
    r = config["rank_pattern"].get(name, config["r"])
    assert a.shape[0] == b.shape[1] == r
    scale = config["alpha_pattern"].get(name, config["lora_alpha"]) / r
    return scale * np.einsum("or...,r...->o...", b.reshape(len(b), r), a)


merge = jax.jit(lj.merge)  # one program; its operations alone would be fifty


def moved(params):
    return jax.tree.map(
        lambda x, y: np.asarray(x) - np.asarray(y), merge(params), tree()
    )


@pytest.mark.parametrize("container", ["dict", "frozen", "params", "state"])
def test_export_peft_gives_each_module_the_update_of_the_merged_weight(
    tmp_path, randomized, close, container
):
    params = adapted(randomized)
    want = moved(params)
    wrapped = {
        "dict": params,
        "frozen": freeze(params),
        "params": {"params": params, "batch_stats": {"mean": jnp.ones(3)}},
        "state": nnx.State(jax.tree.map(nnx.Param, params)),
    }
    lj.export_peft(tmp_path / "out", wrapped[container], NAMES)
    got = lambda *args: update(tmp_path / "out", *args)
    close(got("model.tokens", True).T, want["tokens"]["embedding"])
    close(got("lm_head"), want["tokens"]["embedding"])
    close(got("model.conv").transpose(2, 3, 1, 0), want["conv"]["kernel"])
    close(got("score").T, want["head"]["kernel"])
    for i in range(2):
        block = jax.tree.map(lambda x, i=i: x[i], want["blocks"])
        layer = f"model.layers.{i}."
        close(got(f"{layer}query_proj").T.reshape(4, 2, 3), block["query"]["kernel"])
        close(got(f"{layer}out_proj").T.reshape(2, 3, 4), block["out"]["kernel"])
        parts = [got(layer + name).T for name in "abc"]
        assert [x.shape[1] for x in parts] == [3, 2, 4]
        close(np.concatenate(parts, 1), block["qkv"]["kernel"])
    config, tensors = read(tmp_path / "out")
    assert len(tensors) == 2 * len(config["target_modules"]) == 2 * 14
    assert all(x.dtype == np.float32 for x in tensors.values())


def test_export_peft_writes_the_config(tmp_path, randomized):
    lj.export_peft(
        tmp_path,
        adapted(randomized),
        NAMES,
        base_model="org/model",
        task_type="CAUSAL_LM",
    )
    config, _ = read(tmp_path)
    assert config["r"] == 1 and config["lora_alpha"] == 0.5
    assert config["rank_pattern"] == {
        "model.tokens": 3,
        "lm_head": 3,
        "model.layers.0.query_proj": 2,
        "model.layers.1.query_proj": 2,
    }
    assert config["alpha_pattern"] == {
        "model.layers.0.out_proj": 3,
        "model.layers.1.out_proj": 3,
    }
    assert config["base_model_name_or_path"] == "org/model"
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert config["modules_to_save"] is None and config["bias"] == "none"
    assert config["inference_mode"] is True and config["use_rslora"] is False


def test_export_peft_keeps_scales_exactly(tmp_path):
    params = lj.lorafy({"a": {"kernel": jnp.ones((4, 4))}}, 3, alpha=0.7, rslora=True)
    lj.export_peft(tmp_path, params, {"a": "m.a"})
    config, _ = read(tmp_path)
    scale = config["lora_alpha"] / config["r"]
    assert np.float32(scale) == params["a"]["lora_scale"]
    whole = lj.lorafy({"a": {"kernel": jnp.ones((9, 9))}}, 7, alpha=16)
    lj.export_peft(tmp_path, whole, {"a": "m.a"})
    assert read(tmp_path)[0]["lora_alpha"] == 16


def test_export_peft_of_copies(tmp_path, randomized, close):
    rest = {"exclude": ["head", "conv"]}
    params = adapted(randomized, also="head/kernel", **rest)
    with pytest.raises(ValueError, match="saves whole modules: add 'head/bias' to"):
        lj.export_peft(tmp_path / "out", params, NAMES)
    params = adapted(randomized, also=["head", "conv"], **rest)
    lj.export_peft(tmp_path / "out", params, NAMES)
    config, tensors = read(tmp_path / "out")
    assert config["modules_to_save"] == ["model.conv", "score"]
    get = lambda name: tensors[f"base_model.model.{name}"]
    head, conv = params["head"], params["conv"]
    close(get("score.weight"), np.asarray(head["lora_w"]).T)
    close(get("score.bias"), np.asarray(head["bias_lora_w"]))
    want = np.asarray(conv["lora_w"]).transpose(3, 2, 0, 1)
    close(get("model.conv.weight"), want)
    close(get("model.conv.bias"), np.asarray(conv["bias_lora_w"]))
    assert np.abs(np.asarray(head["lora_w"] - head["kernel"])).max() > 1


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_export_peft_writes_copies_in_their_own_dtype(tmp_path, randomized, dtype):
    """A copy of a narrow leaf is float32: rounding would lose small updates."""
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree())
    params = randomized(lj.lorafy(base, 1, targets="tokens", also="head"))
    lj.export_peft(tmp_path, params, NAMES, dtype=dtype)
    config, tensors = read(tmp_path)
    assert config["modules_to_save"] == ["score"]
    assert {x.dtype.name for x in tensors.values()} == {dtype or "float32"}
    want = np.asarray(params["head"]["lora_w"]).T
    got = tensors["base_model.model.score.weight"]
    np.testing.assert_array_equal(got, want.astype(got.dtype))
    assert (want.astype(jnp.bfloat16) != want).any()


@pytest.mark.parametrize(
    "names, options, match",
    [
        ({"head": None}, {}, "names has no name for 'head/kernel'.*Write names="),
        ({"head": "model.conv"}, {}, "have one name, 'model.conv'"),
        (
            {"blocks/*": "layers.{}"},
            {},
            "has 1 stacked dimensions, and the name .* counts 0",
        ),
        ({"head": "s.{layer}"}, {}, "counts 1 stacked .* have 0.*axes=find_axes"),
        ({"blocks/qkv": {"a.{layer}": 3}}, {}, "has 9 outputs, and its parts"),
        ({"blocks/qkv": ("a.{layer}", "b.{layer}")}, {}, "has 9 outputs"),
        ({"tokens": ("a", "b", "c")}, {}, "is an embedding. Give it one name, or two"),
        ({"hed": "score"}, {}, "No leaf matches 'hed' of names"),
        ({}, {"modules": ["model.tokens", "lm_head"]}, "which is not in modules"),
        ({}, {"kinds": {"hed": "conv"}}, "No weight matches 'hed' of kinds"),
        ({}, {"kinds": {"head": "dense"}}, "one of linear, conv1d, conv, embedding"),
        ({}, {"axes": {"head/kernel": ((), (1,), ())}}, "must name each of its 2"),
        ({}, {"axes": {"conv/kernel": ((0,), (1, 2), (3,))}}, "and axes has"),
        ({}, {"dtype": jnp.int8}, "dtype is one of float32, bfloat16, float16"),
    ],
)
def test_export_peft_with_bad_input_leaves_the_folder_alone(
    tmp_path, names, options, match
):
    params = lj.lorafy(tree(), 1, targets="*", axes=AXES)
    names = {k: v for k, v in (NAMES | names).items() if v is not None}
    lj.export_peft(tmp_path / "out", lj.lorafy(tree(), 1, targets="head"), NAMES)
    before = [p.read_bytes() for p in sorted((tmp_path / "out").iterdir())]
    with pytest.raises(ValueError, match=match):
        lj.export_peft(tmp_path / "out", params, names, **options)
    assert [p.read_bytes() for p in sorted((tmp_path / "out").iterdir())] == before


def test_export_peft_next_to_other_files(tmp_path):
    """A README and a tokenizer stay; the adapter of another program is not replaced."""
    params, others = lj.lorafy(tree(), 1, targets="head"), {"README.md", "vocab.txt"}
    lj.export_peft(tmp_path, params, NAMES)
    for name in others:
        (tmp_path / name).write_text(name)
    lj.export_peft(tmp_path, params, NAMES, task_type="CAUSAL_LM")
    config, tensors = read(tmp_path)
    assert config["task_type"] == "CAUSAL_LM"
    assert all((tmp_path / name).read_text() == name for name in others)
    # As PEFT writes the file, without our mark.
    file = tmp_path / "adapter_model.safetensors"
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="overwrite=True"):
        lj.export_peft(tmp_path, params, NAMES)
    assert safetensors.safe_open(file, "numpy").metadata() == {"format": "pt"}
    lj.export_peft(tmp_path, params, NAMES, overwrite=True)
    lj.export_peft(tmp_path, params, NAMES)
    assert {p.name for p in tmp_path.iterdir()} == {
        *others,
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_export_peft_refuses_bad_input(tmp_path):
    base = {"a": {"kernel": jnp.ones((4, 4))}}
    with pytest.raises(ValueError, match="have no adapters"):
        lj.export_peft(tmp_path, base, {"a": "a"})
    params = lj.lorafy(base, 1)
    with pytest.raises(ValueError, match=r"axes=find_axes\(fn, params"):
        lj.export_peft(tmp_path, params, {"a": "a"}, fan_in_fan_out=True)
    with pytest.raises(TypeError, match="modules is a list"):
        lj.export_peft(tmp_path, params, {"a": "a"}, modules="a")
    shapes = jax.eval_shape(lambda: params)
    with pytest.raises(ValueError, match="no values to save"):
        lj.export_peft(tmp_path, shapes, {"a": "a"})
    params["a"]["lora_a"] = params["a"]["lora_a"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="not finite"):
        lj.export_peft(tmp_path, params, {"a": "a"})
    two = lj.lorafy(
        {"up": jnp.ones((2, 3, 4)), "down": jnp.ones((2, 4, 3))},
        1,
        targets="*",
        axes={n: lj.Axes((0,), (1,), (2,)) for n in ("up", "down")},
    )
    for names in (lambda path: f"m.{path}", {"*": "m.{}"}):
        with pytest.raises(ValueError, match="their order matters"):
            lj.export_peft(tmp_path, two, names, kinds={"*": "experts"})
    assert not list(tmp_path.iterdir())


one = lambda *shape: {"kernel": jnp.ones(shape)}


@pytest.mark.parametrize(
    "also, path, leaf, name, match",
    [
        ("head", "up", one(4, 3), "m.my_head", "ignores the adapter of 'm.my_head'"),
        ("head", "up", one(4, 3), "head.up", "ignores the adapter of 'head.up'"),
        ("head", "bottom", one(4, 3), "head.up", "'bottom/kernel' is in one that also"),
        ("up", "up", one(4, 3), "h.0.c_fc", "layer of that name may store .in, out"),
        ("up", "up", {"w": jnp.ones((4, 3))}, "up", "does not show its kind.*kinds="),
        ("up", "up", {"scale": jnp.ones(())}, "up.{layer}", "counts 1 stacked dim"),
        ("norm", "norm", {"mean": jnp.ones(3)}, "norm", "more of such statistics"),
        ("Conv*", "ConvTranspose_0", one(3, 4, 3), "c", "flips the windows"),
        ("head", "seen", {"mean": jnp.ones(3)}, "head", "'seen/mean' is in one that"),
        (
            "head/scale",
            "head",
            {"scale": jnp.ones(3), "n": jnp.ones(3, int)},
            "head",
            "leave it out of also= in lorafy, since 'head/n', of dtype int32, cannot",
        ),
    ],
)
def test_export_peft_refuses_copies_that_peft_cannot_save(
    tmp_path, also, path, leaf, name, match
):
    """PEFT would load each without a warning, and lose an adapter or a leaf."""
    base = {"a": one(4, 4), "head": {"scale": jnp.ones(4)}, path: leaf}
    names = {"a": "m.a", path: name, "head": "head"}
    targets = ["a", "up"] if "ignores" in match else "a"
    params = lj.lorafy(base, 1, targets=targets, also=also)
    with pytest.raises(ValueError, match=match):
        lj.export_peft(tmp_path / "out", params, names)
    assert not list(tmp_path.iterdir())


def test_export_peft_refuses_names_that_end_in_that_of_a_copy(tmp_path):
    base = {"a": one(4, 4), "head": one(4, 2), "other": one(4, 2)}
    params = lj.lorafy(base, 1, targets="a", also=["head", "other"])
    names = {"a": "a", "head": "head", "other": "my_head"}
    with pytest.raises(ValueError, match=r"takes 'my_head' for it.*also= in lorafy"):
        lj.export_peft(tmp_path / "out", params, names)


def test_export_peft_refuses_copies_of_parts_of_modules(tmp_path):
    """Such as a stack of experts in one parameter."""
    params = lj.lorafy(tree(), 1, targets="head", also="blocks/qkv", axes=AXES)
    names = NAMES | {"blocks/qkv": "m.experts"}
    options = {"axes": AXES, "kinds": {"qkv": "experts"}}
    with pytest.raises(ValueError, match=r"no module of its own: 'm.experts'"):
        lj.export_peft(tmp_path / "out", params, names, **options)
    # An adapter of the tied embedding and a copied head of another name both fit.
    params = lj.lorafy(tree(), 1, targets="tokens", also="head")
    lj.export_peft(tmp_path / "out", params, NAMES)
    with pytest.raises(ValueError, match="PEFT ignores the adapter of 'lm_head'"):
        lj.export_peft(tmp_path / "out", params, NAMES | {"head": "lm_head"})


def test_export_peft_checks_the_head_of_a_task(tmp_path):
    base = {"a": one(4, 4), "classifier": {**one(4, 2), "fn": print, "none": None}}
    names, task = {"*/kernel": "m.{}"}, "SEQ_CLS"
    with pytest.raises(ValueError, match="called classifier or score: train it"):
        plain = lj.lorafy(base, 1, targets="a")
        lj.export_peft(tmp_path, plain, names, task_type=task)
    params = lj.lorafy(base, 1, targets="a", also="classifier/kernel")
    lj.export_peft(tmp_path, params, names, task_type=task)
    config, _ = read(tmp_path)
    assert config["modules_to_save"] == ["m.classifier"]
    base["score"] = one(4, 2)
    with pytest.raises(ValueError, match=r"saves 'm.score' as a whole, and it has"):
        params = lj.lorafy(base, 1, targets=["a", "score"], also="classifier/kernel")
        lj.export_peft(tmp_path, params, names, task_type=task)


def test_export_peft_refuses_copies_stacked_along_an_unknown_dimension(tmp_path):
    base = {"a": {"kernel": jnp.ones((4, 2, 3)), "b": jnp.ones((3, 2))}}
    axes = {"a/kernel": lj.Axes((1,), (0,), (2,))}
    params = lj.lorafy(base, 1, axes=axes, also="a/b")
    names = {"a/kernel": "m.{layer}.a", "a/b": "m.{layer}.b"}
    with pytest.raises(ValueError, match="which of its dimensions is the stack"):
        lj.export_peft(tmp_path / "out", params, names)


def test_export_peft_of_square_gpt2_kernels_needs_axes(tmp_path):
    params = lj.lorafy({"attn": {"out": one(4, 4)}}, 1)
    with pytest.raises(ValueError, match=r"is square.*axes=find_axes\(fn"):
        lj.export_peft(tmp_path / "out", params, {"attn/out": "h.0.attn.c_proj"})
    axes = {"attn/out/kernel": lj.Axes((), (0,), (1,))}
    names = {"attn/out": "h.0.attn.c_proj"}
    lj.export_peft(tmp_path / "out", params, names, axes=axes)
    assert read(tmp_path / "out")[0]["target_modules"] == ["h.0.attn.c_proj"]


def test_export_peft_sees_a_transposed_kernel_by_its_bias(tmp_path):
    """The kernels of Flax GPT-2 are (outputs, inputs)."""
    base = {"c_fc": {"kernel": jnp.ones((2, 6, 4)), "bias": jnp.ones((2, 6))}}
    axes = {"c_fc/kernel": lj.Axes((0,), (1,), (2,))}
    params = lj.lorafy(base, 1, axes=axes)
    with pytest.raises(ValueError, match="4 outputs by its name, and its bias has 6"):
        lj.export_peft(tmp_path / "out", params, {"c_fc": "h.{layer}.mlp.c_fc"})
    axes = {"c_fc/kernel": lj.Axes((0,), (2,), (1,))}
    names = {"c_fc": "h.{layer}.mlp.c_fc"}
    lj.export_peft(tmp_path / "out", params, names, axes=axes)
    assert update(tmp_path / "out", "h.1.mlp.c_fc").shape == (6, 4)


def test_export_peft_of_an_embedding_used_as_a_matrix(tmp_path):
    axes = {"head/embedding": lj.Axes((), (1,), (0,))}
    base = {"head": {"embedding": jnp.ones((5, 3))}}
    params = lj.lorafy(base, 1, targets="*", axes=axes)
    with pytest.raises(ValueError, match=r"kinds={'head/embedding': 'linear'}"):
        lj.export_peft(tmp_path, params, {"head": "lm_head"})
    lj.export_peft(tmp_path, params, {"head": "lm_head"}, kinds={"head": "linear"})
    assert update(tmp_path, "lm_head").shape == (5, 3)


def test_kinds_may_be_those_of_weights_without_adapters(tmp_path):
    """Reading the model, writing the adapter and reading it take the same options."""
    kinds = {"table": "embedding", "head": "linear"}
    base = {"table": {"w": jnp.ones((5, 3))}, "head": {"w": jnp.ones((3, 4))}}
    names, axes = {"head": "lm_head"}, {"head/w": lj.Axes((), (0,), (1,))}
    params = lj.lorafy(base, 1, targets="head", axes=axes)
    lj.export_peft(tmp_path, params, names, kinds=kinds)
    lj.import_peft(tmp_path, base, names, axes=axes, kinds=kinds)
    for each in ({"tables": "embedding"}, {"head/w_lora_a": "linear"}):
        with pytest.raises(ValueError, match=r"No .* matches '.*' of kinds"):
            lj.export_peft(tmp_path, params, names, kinds=each, overwrite=True)
        with pytest.raises(ValueError, match=r"No .* matches '.*' of kinds"):
            lj.import_peft(tmp_path, base, names, axes=axes, kinds=each)


def test_export_peft_writes_the_base_model_as_a_string(tmp_path):
    params = lj.lorafy({"a": one(8, 8)}, 1)
    lj.export_peft(tmp_path, params, {"a": "a"}, base_model=tmp_path)
    assert read(tmp_path)[0]["base_model_name_or_path"] == str(tmp_path)


def test_export_peft_takes_names_of_tensors_as_modules(tmp_path):
    params = lj.lorafy({"a": {"kernel": jnp.ones((4, 4))}}, 1)
    lj.export_peft(tmp_path, params, {"a": "m.a"}, modules=["m.a.weight", "m.b.bias"])
    assert read(tmp_path)[0]["target_modules"] == ["m.a"]
    axes = {"up": lj.Axes((0,), (1,), (2,))}
    params = lj.lorafy({"up": jnp.ones((2, 3, 4))}, 1, targets="*", axes=axes)
    options = {"kinds": {"up": "experts"}, "modules": ["m.experts"]}
    lj.export_peft(tmp_path, params, {"up": "m.experts.up"}, **options)
    assert read(tmp_path)[0]["target_parameters"] == ["m.experts.up"]


def test_export_peft_of_sharded_weights(tmp_path, randomized):
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    base = {"a": {"kernel": jax.device_put(jnp.ones((4, 8)), spec)}}
    params = randomized(lj.lorafy(base, 2))
    lj.export_peft(tmp_path, params, {"a": "a"})
    want = np.asarray(lj.merge(params)["a"]["kernel"]) - 1
    np.testing.assert_allclose(update(tmp_path, "a").T, want, atol=1e-5)
    back = lj.import_peft(tmp_path, base, {"a": "a"})
    for name in ("lora_a", "lora_b"):
        assert back["a"][name].sharding == lj.lorafy(base, 2)["a"][name].sharding
        np.testing.assert_array_equal(back["a"][name], params["a"][name])


def stacked_dora(randomized):
    base = {
        "blocks": {"qkv": {"kernel": jnp.ones((2, 4, 6))}},
        "table": {"embedding": jnp.ones((5, 4))},
    }
    axes = {"blocks/qkv/kernel": lj.Axes((0,), (1,), (2,))}
    params = lj.lorafy(base, 2, targets="*", axes=axes, dora=True)
    return base, randomized(params)


def test_export_peft_of_magnitudes(tmp_path, randomized, close):
    base, params = stacked_dora(randomized)
    names = {
        "blocks/qkv": ("layers.{layer}.q", "layers.{layer}.k", "layers.{layer}.v"),
        "table": "tokens",
    }
    lj.export_peft(tmp_path, params, names)
    config, tensors = read(tmp_path)
    assert config["use_dora"] is True
    key = "base_model.model.layers.1.k.lora_magnitude_vector"
    want = params["blocks"]["qkv"]["lora_magnitude"][1, 2:4]
    np.testing.assert_array_equal(tensors[key], want)
    back = lj.import_peft(tmp_path, base, names)
    close(lj.merge(back), lj.merge(params))
    np.testing.assert_array_equal(
        back["table"]["lora_magnitude"], params["table"]["lora_magnitude"]
    )


@pytest.mark.parametrize(
    ("change", "names", "options", "match"),
    [
        (
            {},
            {"table": "t"},
            {"for_": "vllm"},
            "cannot be exported for vLLM 0.33.0: it loads no DoRA",
        ),
        ({"lora_magnitude": None}, {"table": "t"}, {}, "do not: PEFT has use_dora"),
        ({}, {"table": ("t", "head")}, {}, "is the head 'head', for which PEFT has no"),
    ],
)
def test_export_peft_refuses_magnitudes_that_peft_lacks(
    tmp_path, randomized, change, names, options, match
):
    _, params = stacked_dora(randomized)
    qkv = {n: x for n, x in (params["blocks"]["qkv"] | change).items() if x is not None}
    params = params | {"blocks": {"qkv": qkv}}
    with pytest.raises(ValueError, match=match):
        lj.export_peft(
            tmp_path / "a", params, {"blocks/qkv": "l.{layer}"} | names, **options
        )
