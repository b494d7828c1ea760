"""`export_weights` against `merge`, and what must stay as it was."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lj
from lora_jax._hub import export_weights as module
from lora_jax._hub.folder_files import new_files

LAYERS, D, HEADS, SIZE, V = 2, 8, 2, 4, 10
NAMES = {
    "layers/q": "model.layers.{layer}.q_proj",
    "layers/kv": ("model.layers.{layer}.k_proj", "model.layers.{layer}.v_proj"),
    "layers/norm": "model.layers.{layer}.norm",
    "embed": ("model.embed_tokens", "lm_head"),
    "conv": "patches",
    "gpt": "h.0.c_fc",
    "experts": "moe.{expert}.up",
    "fused": "moe.fused",
    "bias": "h.0.c_fc.bias",
}
KINDS = {"fused": "experts"}
AXES = {
    "layers/q/kernel": lj.Axes((0,), (1,), (2, 3)),
    "layers/kv/kernel": lj.Axes((0,), (1,), (2,)),
    "experts/kernel": lj.Axes((0,), (1,), (2,)),
    "fused": lj.Axes((0,), (1,), (2,)),
    "conv/kernel": lj.Axes((), (0, 1, 2), (3,)),
}


def checkpoint(dtype=np.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(dtype)
    tensors = {
        "model.embed_tokens.weight": draw(V, D),
        "patches.weight": draw(6, 3, 2, 2),
        "h.0.c_fc.weight": draw(D, 3 * D),
        "h.0.c_fc.bias": draw(3 * D),
        "moe.fused": draw(3, D, 5),
        "steps": np.arange(3),
        "scalar": np.asarray(2.0, dtype),
    }
    for i in range(LAYERS):
        tensors[f"model.layers.{i}.q_proj.weight"] = draw(HEADS * SIZE, D)
        tensors[f"model.layers.{i}.k_proj.weight"] = draw(3, D)
        tensors[f"model.layers.{i}.v_proj.weight"] = draw(5, D)
        tensors[f"model.layers.{i}.norm.weight"] = draw(D)
    for i in range(3):
        tensors[f"moe.{i}.up.weight"] = draw(6, D)
    return tensors


def target(dtype=jnp.float32):
    s = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    return {
        "layers": {
            "q": {"kernel": s(LAYERS, D, HEADS, SIZE)},
            "kv": {"kernel": s(LAYERS, D, 8)},
            "norm": {"scale": s(LAYERS, D)},
        },
        "embed": {"embedding": s(V, D)},
        "conv": {"kernel": s(2, 2, 3, 6)},
        "gpt": {"kernel": s(D, 3 * D)},
        "experts": {"kernel": s(3, D, 6)},
        "fused": s(3, D, 5),
        "bias": s(3 * D),
    }


IGNORED = ("steps", "scalar")


def imported(source, dtype=jnp.float32, **options):
    options = {"axes": AXES, "kinds": KINDS, "ignore": IGNORED} | options
    return lj.import_weights(source, target(dtype), NAMES, **options)


def adapted(params, **options):
    options = {"targets": "*", "axes": AXES} | options
    return lj.lorafy(params, 2, **options)


EXPORT = {"axes": AXES, "kinds": KINDS}


@pytest.mark.parametrize("method", ["lora", "dora", "also"])
def test_export_weights_equals_the_merged_tree(tmp_path, randomized, close, method):
    options = {}
    if method == "dora":
        options = {"dora": True}
    if method == "also":
        options = {"also": ["norm", "bias"]}
    tensors = checkpoint()
    params = randomized(adapted(imported(tensors), **options))
    lj.export_weights(tmp_path / "out", params, NAMES, tensors, **EXPORT)
    got = imported(tmp_path / "out")
    close(got, lj.merge(params))
    new = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert new.keys() == tensors.keys()
    for name, x in tensors.items():
        assert (new[name].shape, new[name].dtype) == (x.shape, x.dtype)
    same = [n for n, x in tensors.items() if np.array_equal(new[n], x)]
    kept = {"steps", "scalar"}
    if method != "also":
        kept |= {n for n in tensors if "norm" in n or "bias" in n}
    assert {*same} == kept


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_export_weights_adds_to_the_checkpoint_not_to_a_quantized_base(
    tmp_path, randomized, how
):
    tensors = checkpoint()
    params = imported(tensors, how={"q": how})
    params = randomized(lj.lorafy(params, 2, targets="q", axes=AXES))
    lj.export_weights(tmp_path / "out", params, NAMES, tensors, **EXPORT)
    new = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    q = params["layers"]["q"]
    for i in range(LAYERS):
        name = f"model.layers.{i}.q_proj.weight"
        a, b = (np.asarray(q[f"lora_{n}"][i]) for n in "ab")
        update = a @ b.reshape(2, -1) * float(q["lora_scale"][i])
        np.testing.assert_allclose(new[name], tensors[name] + update.T, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_export_weights_rounds_once_to_the_dtype(tmp_path, randomized, dtype):
    """In bfloat16 the sum is computed in float32 and rounded once."""
    tensors = checkpoint(ml_dtypes.bfloat16)
    params = randomized(adapted(imported(tensors, jnp.bfloat16), targets="gpt"))
    lj.export_weights(tmp_path / "out", params, NAMES, tensors, dtype=dtype, **EXPORT)
    new = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    gpt = params["gpt"]
    a, b, s = (np.asarray(gpt[f"lora_{n}"], "f") for n in ("a", "b", "scale"))
    name = "h.0.c_fc.weight"
    want = (tensors[name].astype("f") + s * (a @ b)).astype(dtype or ml_dtypes.bfloat16)
    np.testing.assert_array_equal(new[name], want)
    assert {x.dtype.name for n, x in new.items() if n != "steps"} == {want.dtype.name}


def test_export_weights_warns_if_rounding_takes_the_update(tmp_path, randomized):
    tensors = checkpoint(ml_dtypes.bfloat16)
    params = adapted(imported(tensors, jnp.bfloat16), targets="gpt", alpha=1e-4)
    params = randomized(params)
    args = params, NAMES, tensors
    with pytest.warns(UserWarning, match=r"loses most .*'h.0.c_fc.weight'.*dtype="):
        lj.export_weights(tmp_path / "out", *args, **EXPORT)
    lj.export_weights(tmp_path / "wide", *args, dtype=jnp.float32, **EXPORT)


def written(folder, tensors):
    os.makedirs(folder)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "mine", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "generation_config.json", "merges.txt"):
        (folder / name).write_text(name)
    for name in ("pytorch_model.bin", "README.md", "training_args.bin"):
        (folder / name).write_text("not copied")
    return folder


def test_export_weights_writes_shards_and_copies_configs(tmp_path, randomized, close):
    tensors = checkpoint()
    source = written(tmp_path / "base", tensors)
    params = randomized(adapted(imported(source)))
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is taken
    lj.export_weights(out, params, NAMES, source, shard_bytes=700, **EXPORT)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 3
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    for file in files:
        with safetensors.safe_open(out / file, "numpy") as opened:
            names = opened.keys()
            assert opened.metadata() == {"format": "pt"}
        size = sum(tensors[name].nbytes for name in names)
        assert size <= 700 or len(names) == 1
    copied = {"config.json", "tokenizer.json", "generation_config.json", "merges.txt"}
    assert {*os.listdir(out)} == {*files, *copied, "model.safetensors.index.json"}
    for name in copied:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    close(imported(out), lj.merge(params))
    one = tmp_path / "one"
    lj.export_weights(one, params, NAMES, source, dtype=jnp.bfloat16, **EXPORT)
    assert json.loads((one / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_export_weights_of_an_untied_checkpoint_changes_both_tensors(
    tmp_path, randomized
):
    tensors = checkpoint()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    params = randomized(adapted(imported(tensors), targets="embed"))
    lj.export_weights(tmp_path / "out", params, NAMES, tensors, **EXPORT)
    new = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    table = np.asarray(lj.merge(params)["embed"]["embedding"])
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        np.testing.assert_allclose(new[name], table, atol=1e-6)


def test_export_weights_refuses_what_does_not_fit(tmp_path, randomized):
    tensors = checkpoint()
    params = randomized(adapted(imported(tensors)))
    out = tmp_path / "out"
    export = lambda params=params, names=NAMES, source=tensors, **options: (
        lj.export_weights(out, params, names, source, **EXPORT | options)
    )
    unnamed = {k: v for k, v in NAMES.items() if k != "gpt"}
    missing = {k: v for k, v in tensors.items() if "c_fc" not in k}
    other = tensors | {"h.0.c_fc.weight": -tensors["h.0.c_fc.weight"]}
    wide = tensors | {"h.0.c_fc.weight": np.ones((D, 4), np.float32)}
    abstract = jax.eval_shape(lambda: params)
    broken = params | {"gpt": params["gpt"] | {"lora_a": jnp.full((D, 2), jnp.nan)}}
    for message, bad in {
        r"names has no name for 'gpt/kernel'": {"names": unnamed},
        r"no tensor 'h.0.c_fc.weight' for 'gpt/kernel'": {"source": missing},
        r"'gpt/kernel' has other values than the tensor": {"source": other},
        r"'gpt/kernel'.*needs the tensor": {"source": wide},
        r"no values to save": {"params": abstract},
        r"'gpt/lora_a' is not finite": {"params": broken},
        r"base.gguf is a GGUF": {"source": "base.gguf"},
        r"dtype must be floating": {"dtype": jnp.int8},
        r"'z' is complex64": {"source": tensors | {"z": np.zeros(2, np.complex64)}},
        r"'z' is not finite in float16": {
            "dtype": jnp.float16,
            "source": tensors | {"z": np.full(2, 1e5, np.float32)},
        },
        r"not finite in float16": {"dtype": jnp.float16, "params": huge(params)},
    }.items():
        with pytest.raises(ValueError, match=message):
            export(**bad)
        assert os.listdir(tmp_path) == []
    out.mkdir()
    (out / "mine.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds files: 'mine.txt'"):
        export()
    (out / "mine.txt").unlink()
    out.rmdir()
    out.write_text("")
    with pytest.raises(ValueError, match=r"is a file"):
        export()


def test_export_weights_of_infinities_and_copies_out_of_range(tmp_path):
    """What is infinite in the checkpoint, like a mask, stays so in any dtype."""
    torch = {"up.weight": np.ones((3, 4), np.float32), "norm.weight": np.ones(4)}
    torch["mask"] = np.array([0, -np.inf], np.float32)
    plain = {"up": {"kernel": jnp.ones((4, 3))}, "norm": {"scale": jnp.ones(4)}}
    params = lj.lorafy(plain, rank=1, targets="up", also="norm")
    export = lambda name: lj.export_weights(
        tmp_path / name, params, {"up": "up", "norm": "norm"}, torch, dtype=jnp.float16
    )
    export("small")
    new = safetensors.numpy.load_file(tmp_path / "small" / "model.safetensors")
    np.testing.assert_array_equal(new["mask"], torch["mask"].astype(np.float16))
    params["norm"]["scale_lora_w"] = jnp.full(4, 1e5)
    with pytest.raises(ValueError, match=r"'norm.weight' is not finite in float16"):
        export("large")
    assert os.listdir(tmp_path) == ["small"]


def test_export_weights_refuses_to_change_a_leaf_without_an_update(tmp_path):
    """A tree with a head of its own, and a checkpoint in which it is the table."""
    table = np.ones((5, 3), np.float32)
    plain = {"embed": {"embedding": table}, "head": {"kernel": table.T}}
    params = lj.lorafy(plain, rank=1, targets="head")
    names = {"embed": "model.embed_tokens", "head": "model.embed_tokens"}
    with pytest.raises(ValueError, match=r"'head/kernel' has an update and 'embed/em"):
        lj.export_weights(
            tmp_path / "out", params, names, {"model.embed_tokens.weight": table}
        )
    names["head"] = "lm_head"
    untied = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    lj.export_weights(tmp_path / "out", params, names, untied)


def huge(params):
    gpt = params["gpt"] | {"lora_a": params["gpt"]["lora_a"] * 1e8}
    return params | {"gpt": gpt}


def test_export_weights_leaves_nothing_on_a_full_disk(tmp_path, randomized):
    tensors = checkpoint()
    params = randomized(adapted(imported(tensors)))

    def full(*args):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_index", full)
        with pytest.raises(OSError, match="No space left"):
            lj.export_weights(
                tmp_path / "out", params, NAMES, tensors, shard_bytes=99, **EXPORT
            )
    assert os.listdir(tmp_path) == []


def test_export_weights_into_an_empty_folder_keeps_it(tmp_path, randomized):
    """It may be a mount point, and its permissions are the user's."""
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o2750)
    before = out.stat()
    params = randomized(adapted(imported(checkpoint())))
    lj.export_weights(out, params, NAMES, checkpoint(), **EXPORT)
    assert os.listdir(out) == ["model.safetensors"]
    after = out.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_export_weights_removes_what_a_killed_export_left(tmp_path, randomized):
    script = """
import os, signal, sys
from lora_jax._hub.folder_files import new_files
with new_files(sys.argv[1]) as folder:
    open(os.path.join(folder, "model.safetensors"), "w").write("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", script, str(out)], check=False)
    (left,) = os.listdir(tmp_path)
    assert left.endswith(".partial")
    params = randomized(adapted(imported(checkpoint())))
    with new_files(str(tmp_path / "other")) as new:
        lj.export_weights(out, params, NAMES, checkpoint(), **EXPORT)
        assert {*os.listdir(tmp_path)} == {"out", os.path.basename(new)}
    assert {*os.listdir(tmp_path)} == {"out", "other"}
