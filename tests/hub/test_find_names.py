"""find_names: the map is found in a checkpoint's values, or there is an error."""

import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax._hub.checkpoint import CheckpointTensor
from lora_jax._hub.equal_tensors import WeightPart, choose_modules
from lora_jax._hub.names import module_names

L, D, H, K, F, V = 3, 8, 2, 4, 12, 20  # layers, width, heads, head width, mlp, words


def torch_model(seed=0, dtype: Any = np.float32, layers=L):
    """The tensors of a Llama in PyTorch, with one norm in each layer."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    t = {"model.embed_tokens.weight": draw(V, D), "lm_head.weight": draw(V, D)}
    for i in range(layers):
        at = f"model.layers.{i}"
        for name, shape in {
            "self_attn.q_proj": (D, D),
            "self_attn.k_proj": (K, D),
            "self_attn.v_proj": (K, D),
            "self_attn.o_proj": (D, D),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }.items():
            t[f"{at}.{name}.weight"] = draw(*shape)
        t[f"{at}.norm.weight"] = draw(D)
    return t


def layer(t, i):
    """One layer as a converter for Flax may write it, with separate heads."""
    w = lambda name: t[f"model.layers.{i}.{name}.weight"].T
    return {
        "attn": {
            "q": {"kernel": w("self_attn.q_proj").reshape(D, H, K)},
            "k": {"kernel": w("self_attn.k_proj")},
            "v": {"kernel": w("self_attn.v_proj")},
            "o": {"kernel": w("self_attn.o_proj").reshape(H, K, D)},
        },
        "mlp": {
            "gate": {"kernel": w("mlp.gate_proj")},
            "up": {"kernel": w("mlp.up_proj")},
            "down": {"kernel": w("mlp.down_proj")},
        },
        "norm": {"scale": t[f"model.layers.{i}.norm.weight"]},
    }


def unrolled(t, layers=L):
    return {
        "tokens": {"embedding": t["model.embed_tokens.weight"]},
        "layers": {str(i): layer(t, i) for i in range(layers)},
        "head": {"kernel": t["lm_head.weight"].T},
    }


def scanned(t):
    own = [layer(t, i) for i in range(L)]
    params = unrolled(t)
    params["layers"] = jax.tree.map(lambda *xs: np.stack(xs), *own)
    return params


UNROLLED = {
    "tokens/embedding": "model.embed_tokens",
    "layers/*/attn/q/kernel": "model.layers.{}.self_attn.q_proj",
    "layers/*/attn/k/kernel": "model.layers.{}.self_attn.k_proj",
    "layers/*/attn/v/kernel": "model.layers.{}.self_attn.v_proj",
    "layers/*/attn/o/kernel": "model.layers.{}.self_attn.o_proj",
    "layers/*/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj",
    "layers/*/mlp/up/kernel": "model.layers.{}.mlp.up_proj",
    "layers/*/mlp/down/kernel": "model.layers.{}.mlp.down_proj",
    "head/kernel": "lm_head",
}
SCANNED = {
    path.replace("*/", ""): name.replace("{}", "{layer}")
    for path, name in UNROLLED.items()
}


def arrays(tree, dtype=None):
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x, dtype)), tree)


def test_find_names_of_an_unrolled_model_has_nine_lines():
    t = torch_model()
    assert lj.find_names(arrays(unrolled(t)), t) == UNROLLED


def test_find_names_of_a_scanned_model():
    t = torch_model()
    params = arrays(scanned(t))
    assert lj.find_names(params, t) == SCANNED
    assert lj.find_names({"params": params}, t) == SCANNED


@pytest.mark.parametrize("ours", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("theirs", ["float32", "bfloat16", "float16"])
def test_find_names_in_other_dtypes(ours, theirs):
    t = torch_model(dtype=jnp.dtype(theirs))
    assert lj.find_names(arrays(unrolled(t), ours), t) == UNROLLED


def test_find_names_of_rounded_weights():
    """float32 to bfloat16 to float32."""
    t = torch_model()
    params = arrays(arrays(unrolled(t), jnp.bfloat16), np.float32)
    assert lj.find_names(params, t) == UNROLLED


def test_find_names_of_fused_weights(tmp_path):
    t = torch_model()
    w = lambda i, name: t[f"model.layers.{i}.{name}.weight"].T
    qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    both = ["mlp.gate_proj", "mlp.up_proj"]
    fuse = lambda i, names: np.concatenate([w(i, n) for n in names], 1)
    params = {
        "qkv": {"kernel": np.stack([fuse(i, qkv) for i in range(L)])},
        "gate_up": {"kernel": np.stack([fuse(i, both) for i in range(L)])},
        "pair": {"kernel": np.stack([w(0, n) for n in both])},  # (2, D, F)
    }
    names = lj.find_names(arrays(params), t, exclude="pair")
    name = lambda n: f"model.layers.{{layer}}.{n}"
    widths = dict(zip(map(name, qkv), (D, K, K), strict=True))
    assert names == {
        "qkv/kernel": widths,
        "gate_up/kernel": tuple(map(name, both)),
    }
    # (2, D, F) is a fused weight and no stack, because gate and up are not numbers.
    axes = {"pair/kernel": lj.Axes((), (1,), (0, 2))}
    one = lj.lorafy(arrays({"pair": params["pair"]}), 2, axes=axes)
    found = lj.find_names(one, t)
    assert found == {"pair/kernel": tuple(f"model.layers.0.{n}" for n in both)}
    lj.export_peft(tmp_path / "a", one, found)


def test_find_names_of_experts():
    rng = np.random.default_rng(0)
    t = {
        f"model.layers.{i}.mlp.experts.{e}.up.weight": rng.standard_normal((F, D))
        for i in range(L)
        for e in range(2)
    }
    w = lambda i, e: t[f"model.layers.{i}.mlp.experts.{e}.up.weight"].T
    every = np.stack([[w(i, e) for e in range(2)] for i in range(L)])
    apart = {f"layer_{i}": {"up": {"kernel": every[i]}} for i in range(L)}
    with jax.enable_x64(True):
        whole = lj.find_names(arrays({"up": {"kernel": every}}), t)
        some = lj.find_names(arrays(apart), t)
    assert whole == {"up/kernel": "model.layers.{layer}.mlp.experts.{expert}.up"}
    assert some == {"layer_*/up/kernel": "model.layers.{}.mlp.experts.{expert}.up"}


def test_find_names_of_convolutions(tmp_path):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    t = {"conv.weight": draw(5, 3, 2, 4), "patches.weight": draw(6, 3, 2, 2)}
    params = {
        "conv": {"kernel": t["conv.weight"].transpose(2, 3, 1, 0)},
        "conv_patches": {"kernel": t["patches.weight"].transpose(2, 3, 1, 0)},
    }
    names = lj.find_names(arrays(params), t)
    assert names == {"conv/kernel": "conv", "conv_patches/kernel": "patches"}
    adapted = lj.lorafy(arrays(params), 2)
    assert lj.find_names(adapted, t) == names
    lj.export_peft(tmp_path / "a", adapted, names)


def test_find_names_of_gpt2_with_transposed_kernels():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    t = {f"h.{i}.attn.c_attn.weight": draw(D, 3 * D) for i in range(2)}  # (in, out)
    ours = {
        str(i): {"c": {"kernel": t[f"h.{i}.attn.c_attn.weight"].T}} for i in range(2)
    }
    axes = {f"{i}/c/kernel": lj.Axes((), (1,), (0,)) for i in range(2)}
    adapted = lj.lorafy(arrays(ours), 2, axes=axes)
    found = lj.find_names(adapted, t, prefix="")
    assert found == {"*/c/kernel": "h.{}.attn.c_attn"}
    # Whether PyTorch's modules have these names depends on the class.
    with pytest.raises(ValueError, match=r"'h.0.attn.c_attn.weight'.*prefix="):
        lj.find_names(adapted, t)
    found = lj.find_names(adapted, t, prefix="transformer")
    assert found == {"*/c/kernel": "transformer.h.{}.attn.c_attn"}


def folder_of(path, tensors, **config):
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "stem"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "transformer.h"),
        ({"architectures": ["GPT2Model"], "model_type": "gpt2"}, "h"),
        (
            {"architectures": ["BloomForCausalLM"], "model_type": "bloom"},
            "transformer.h",
        ),
        ({"architectures": ["MyForCausalLM"], "model_type": "mine"}, "h"),
    ],
)
def test_find_names_has_the_modules_of_the_class(tmp_path, config, stem):
    t = {"h.0.mlp.c_fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    params = arrays({"fc": {"kernel": t["h.0.mlp.c_fc.weight"].T}})
    found = lj.find_names(params, folder_of(tmp_path, t, **config))
    assert found == {"fc/kernel": f"{stem}.0.mlp.c_fc"}


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_find_names_has_the_names_that_transformers_gives(tmp_path, kind):
    """The checkpoints of these models have other names than their modules."""
    name = "language_model.model.layers.0.q_proj.weight"
    t = {name: np.arange(6, dtype=np.float32).reshape(2, 3)}
    config = {"architectures": ["ForConditionalGeneration"], "model_type": kind}
    params = arrays({"q": {"kernel": t[name].T}})
    found = lj.find_names(params, folder_of(tmp_path, t, **config))
    assert found == {"q/kernel": "model.language_model.layers.0.q_proj"}
    like = {"q": {"kernel": jax.ShapeDtypeStruct((3, 2), np.float32)}}
    for names in (found, {"q": name.removesuffix(".weight")}):
        got = lj.import_weights(tmp_path, like, names)
        np.testing.assert_array_equal(got["q"]["kernel"], t[name].T)


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"architectures": ["LlamaForCausalLM"]}, True),  # no head in the file
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}, False),
        ({"architectures": ["LlamaModel"], "tie_word_embeddings": True}, False),
        ({}, False),
    ],
)
def test_find_names_of_a_tied_table_names_the_head_too(tmp_path, config, tied):
    t = {"model.embed_tokens.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    params = arrays({"tokens": {"embedding": t["model.embed_tokens.weight"]}})
    found = lj.find_names(params, folder_of(tmp_path, t, **config))
    table = "model.embed_tokens"
    assert found == {"tokens/embedding": (table, "lm_head") if tied else table}


def test_find_names_of_tied_embeddings():
    t = torch_model()
    t["lm_head.weight"] = t["model.embed_tokens.weight"]
    params = unrolled(t)
    del params["head"]
    found = lj.find_names(arrays(params), t)
    assert found["tokens/embedding"] == ("model.embed_tokens", "lm_head")
    # A separate head here that is tied in PyTorch: one module cannot be two weights.
    del t["lm_head.weight"]
    params["head"] = {"kernel": params["tokens"]["embedding"].T}
    with pytest.raises(ValueError, match=r"are both 'model.embed_tokens'.*exclude"):
        lj.find_names(arrays(params), t)
    found = lj.find_names(arrays(params), t, exclude="head")
    assert found["tokens/embedding"] == "model.embed_tokens"


def test_find_names_chooses_equal_tensors_by_their_neighbours():
    t = torch_model()
    for i in range(L):  # as a new projection may be initialized
        t[f"model.layers.{i}.self_attn.o_proj.weight"] = np.zeros((D, D), np.float32)
    assert lj.find_names(arrays(unrolled(t)), t) == UNROLLED
    assert lj.find_names(arrays(scanned(t)), t) == SCANNED
    for name in ("k_proj", "v_proj"):
        t[f"model.layers.1.self_attn.{name}.weight"] = np.ones((K, D), np.float32)
    assert lj.find_names(arrays(unrolled(t)), t) == UNROLLED  # by their names
    params = {"first": {"kernel": np.ones((D, K), np.float32)}}
    with pytest.raises(ValueError, match=r"'first/kernel' may be any of.*k_proj.*v_pr"):
        lj.find_names(arrays(params), t)


def test_choose_modules_leaves_out_tensors_of_other_weights():
    """Values decide for x, so that only b is left for y."""
    read = lambda index: np.zeros((2, 2))[index]
    a, b = (CheckpointTensor(f"{n}.weight", (2, 2), "float64", read) for n in "ab")
    x, y = (WeightPart((n,), (), 0) for n in "xy")
    assert choose_modules({x: [a], y: [a, b]}) == {x: ("a",), y: ("b",)}


@pytest.mark.parametrize("how", ["int8", "int4", "nf4"])
def test_find_names_of_quantized_weights(how):
    t = torch_model()
    params = lj.quantize(
        arrays(scanned(t)), how, targets="kernel", block=4, exclude="head", axes=AXES
    )
    assert lj.find_names(params, t) == SCANNED


AXES = {
    "layers/attn/q/kernel": lj.Axes((0,), (1,), (2, 3)),
    "layers/attn/o/kernel": lj.Axes((0,), (1, 2), (3,)),
} | {
    f"layers/{name}/kernel": lj.Axes((0,), (1,), (2,))
    for name in ("attn/k", "attn/v", "mlp/gate", "mlp/up", "mlp/down")
}


def test_find_names_of_sharded_weights():
    t = torch_model()
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda x: jax.device_put(
        x, NamedSharding(mesh, P(*[None] * (x.ndim - 1), "x"))
    )
    params = jax.tree.map(place, arrays(scanned(t)))
    assert lj.find_names(params, t) == SCANNED


def test_find_names_reads_files_and_folders(tmp_path):
    t = torch_model(dtype=jnp.bfloat16)
    params = arrays(unrolled(t))
    save = safetensors.numpy.save_file
    save(t, tmp_path / "model.safetensors")
    assert lj.find_names(params, tmp_path / "model.safetensors") == UNROLLED
    assert lj.find_names(params, str(tmp_path)) == UNROLLED
    parts = tmp_path / "parts"
    parts.mkdir()
    names = sorted(t)
    where = {n: f"model-{i % 2 + 1}-of-2.safetensors" for i, n in enumerate(names)}
    for file in {*where.values()}:
        save({n: t[n] for n in names if where[n] == file}, parts / file)
    index = parts / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert lj.find_names(params, parts) == UNROLLED
    assert lj.find_names(params, index) == UNROLLED
    os.unlink(parts / "model-2-of-2.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"1 are missing.*model-2-of-2.*Download"
    ):
        lj.find_names(params, parts)


def test_find_names_of_an_adapted_tree_needs_only_adapted_weights(tmp_path):
    t = torch_model()
    params = arrays(unrolled(t))
    params["new"] = {"kernel": jnp.ones((D, 2))}
    axes = {f"layers/{i}/attn/q/kernel": lj.Axes((), (0,), (1, 2)) for i in range(L)}
    adapted = lj.lorafy(params, 2, targets=["q", "mlp"], also="norm", axes=axes)
    names = lj.find_names(adapted, t)
    want = {k: n for k, n in UNROLLED.items() if "/q/" in k or "mlp" in k}
    assert names == want | {"layers/*/norm/scale": "model.layers.{}.norm"}
    lj.export_peft(tmp_path / "a", adapted, names)
    base = lj.strip(adapted)
    back = lj.import_peft(tmp_path / "a", base, names, axes=axes)
    assert jax.tree.structure(back) == jax.tree.structure(adapted)


def test_find_names_of_targets():
    t = torch_model()
    params = arrays(unrolled(t))
    assert lj.find_names(params, t, targets="down") == {
        "layers/*/mlp/down/kernel": "model.layers.{}.mlp.down_proj"
    }
    with pytest.raises(ValueError, match="No weight matches 'zz' of exclude"):
        lj.find_names(params, t, exclude="zz")


# Errors.


def changed(t, change):
    params = arrays(unrolled(t))
    leaf = params["layers"]["1"]["mlp"]["up"]
    leaf["kernel"] = jnp.asarray(change(np.asarray(leaf["kernel"])))
    return params


UP = "'model.layers.1.mlp.up_proj.weight'"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: 2 * w, rf"it is 2 times {UP}"),
        (lambda w: w + 1, rf"it is {UP} plus 1"),
        (
            lambda w: w.reshape(D, 2, F // 2).swapaxes(1, 2).reshape(D, F),
            rf"rows of {UP} in another order \(0, 6, 1, 7, ...\).*rotary",
        ),
        (lambda w: w[::-1], rf"columns of {UP} in another order"),
        (lambda w: w * (1 + 1e-3 * np.cos(w)), rf"close to {UP}, 0.\d+ off: trained"),
        (lambda w: w[:, :4], rf"it is the rows 0 to 4 of {UP}, which is one module"),
        (lambda w: w * 0 + np.arange(F), "no tensor of its size is close"),
    ],
)
def test_find_names_describes_the_tensor_closest_to_a_changed_weight(change, match):
    t = torch_model()
    with pytest.raises(ValueError, match=match) as error:
        lj.find_names(changed(t, change), t)
    text = str(error.value)
    assert "'layers/1/mlp/up/kernel'" in text
    assert "1 of 23 weights are no tensors of the checkpoint, and 22 are" in text


def test_find_names_refuses_the_checkpoint_of_another_model():
    with pytest.raises(
        ValueError, match=r"none of the weights.*Is it the checkpoint of another model"
    ):
        lj.find_names(arrays(unrolled(torch_model())), torch_model(1))


def test_find_names_refuses_an_adapter_with_other_axes():
    t = torch_model()
    params = arrays({"mlp": layer(t, 0)["mlp"]})
    axes = {f"mlp/{n}/kernel": lj.Axes((), (1,), (0,)) for n in ("gate", "up", "down")}
    with pytest.raises(
        ValueError,
        match=r"'mlp/down/kernel'.*the inputs \(1,\), the outputs \(0,\).*as "
        r"'model.layers.0.mlp.down_proj' its inputs are \(0,\).*find_axes",
    ):
        lj.find_names(lj.lorafy(params, 2, axes=axes), t)


def test_find_names_refuses_a_stack_out_of_order():
    t = torch_model()
    order = [2, 0, 1]
    w = np.stack([layer(t, i)["mlp"]["up"]["kernel"] for i in order])
    with pytest.raises(ValueError, match=r"do not count it from 0.*by hand"):
        lj.find_names(
            lj.lorafy(
                arrays({"up": {"kernel": w}}),
                2,
                axes={"up/kernel": lj.Axes((0,), (1,), (2,))},
            ),
            t,
        )


def test_find_names_refuses_bad_files(tmp_path):
    t = torch_model()
    params = arrays(unrolled(t))
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(t, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"no complete safetensors file.*truncated"):
        lj.find_names(params, path)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        lj.find_names(params, tmp_path / "none")
    old = tmp_path / "old"
    old.mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"has no \.safetensors file\. It holds"
    ):
        lj.find_names(params, old)
    (old / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"pickles.*safe_serialization=True"):
        lj.find_names(params, old)
    (old / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="is no index of a checkpoint"):
        lj.find_names(params, old)
    with pytest.raises(ValueError, match="The checkpoint is empty"):
        lj.find_names(params, {})


def test_find_names_needs_values():
    t = torch_model()
    shapes = jax.eval_shape(lambda: arrays(unrolled(t)))
    with pytest.raises(ValueError, match=r"'head/kernel' has no values.*outside"):
        lj.find_names(shapes, t)
    with pytest.raises(ValueError, match="is empty, of shape"):
        lj.find_names({"kernel": jnp.ones((0, 3))}, t)


# Random damage to a checkpoint never leads to a wrong map.


def damage(t, rng):
    """Returns the kind of damage, and a checkpoint with it."""
    names = [n for n in t if t[n].ndim == 2]
    one, other = rng.choice(names, 2, replace=False)
    kind = rng.choice(
        ["swap", "rows", "columns", "value", "copy", "add", "scale", "lost"]
    )
    t = dict(t)
    if kind == "swap":
        same = [n for n in names if t[n].shape == t[one].shape and n != one]
        other = rng.choice(same)
        t[one], t[other] = t[other], t[one]
    elif kind == "rows":
        t[one] = t[one][rng.permutation(len(t[one]))]
    elif kind == "columns":
        t[one] = t[one][:, rng.permutation(t[one].shape[1])]
    elif kind == "value":
        t[one] = t[one].copy()
        at = tuple(rng.integers(n) for n in t[one].shape)
        t[one][at] += abs(t[one]).max() * 10.0 ** -rng.integers(1, 5)
    elif kind == "copy":
        t[other] = t[one].copy()
    elif kind == "add":
        t[f"copy.{one}"] = t[one].copy()
    elif kind == "scale":
        t[one] = t[one] * np.float32(1 + 10.0 ** -rng.integers(1, 5))
    else:
        del t[one]
    return kind, t


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_find_names_never_returns_a_wrong_map(first):
    for seed in range(first, first + 25):
        try:
            check_damaged(seed)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise


def check_damaged(seed):
    """A damaged checkpoint gives an error, or a map that is right in every value."""
    rng = np.random.default_rng(seed)
    t = torch_model(seed, layers=2)
    kind, bad = damage(t, rng)
    build = lambda t: unrolled(t, 2)
    params = arrays(build(t))
    try:
        names = lj.find_names(params, bad)
    except ValueError:
        return
    # Each weight must have all values of the tensor that the map gives it.
    leaves = jax.tree.leaves_with_path(params)
    paths = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}
    seen = set()
    for path, x in paths.items():
        named = module_names(names, tuple(path.split("/")))
        if named is None:
            assert x.ndim < 2
            continue
        (module,) = named.templates
        tensor = bad[f"{module}.weight"]
        want = tensor if path.endswith("embedding") else tensor.T
        np.testing.assert_array_equal(np.asarray(x).reshape(want.shape), want)
        assert module not in seen
        seen.add(module)
    assert kind in ("swap", "rows", "columns", "add") or names == UNROLLED


@pytest.mark.parametrize(
    "name, match",
    {
        "model.gguf": r"is a GGUF, which only import_weights reads",
        "pytorch_model.bin": r"is a pickle, .*safe_serialization=True",
        "google/gemma-2b": r"snapshot_download\('google/gemma-2b'\)",
    }.items(),
)
def test_find_names_explains_what_is_no_checkpoint(tmp_path, monkeypatch, name, match):
    monkeypatch.chdir(tmp_path)
    if "/" not in name:
        (tmp_path / name).write_bytes(bytes(100))
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        lj.find_names({"up": {"kernel": np.ones((2, 3), np.float32)}}, name)
