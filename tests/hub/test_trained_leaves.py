"""What PEFT trains in full becomes trained copies: biases, rows, tables."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lj

RNG = np.random.default_rng(0)
DRAW = lambda *shape: RNG.standard_normal(shape).astype(np.float32)
TABLE, KERNEL, BIAS, HEAD = DRAW(9, 4), DRAW(2, 4, 6), DRAW(2, 6), DRAW(4, 9)
A, B = [DRAW(2, 4) for _ in "01"], [DRAW(6, 2) for _ in "01"]
FACTORS = {
    f"m.{i}.q.lora_{n}.weight": x[i] for i in (0, 1) for n, x in (("A", A), ("B", B))
}
NAMES = {"embed": "m.embed_tokens", "q": "m.{layer}.q", "head": "lm_head"}
TIED_NAMES = {"embed": ("m.embed_tokens", "lm_head"), "q": "m.{layer}.q"}
AXES = {"q/kernel": lj.Axes((0,), (1,), (2,))}
ROWS = "m.embed_tokens.token_adapter.trainable_tokens_delta"


def base(tied=False):
    tree = {
        "embed": {"embedding": jnp.asarray(TABLE)},
        "q": {"kernel": jnp.asarray(KERNEL), "bias": jnp.asarray(BIAS)},
    }
    return tree if tied else tree | {"head": {"kernel": jnp.asarray(HEAD)}}


def write(folder, tensors=None, **config):
    folder.mkdir(exist_ok=True)
    tensors = FACTORS | (tensors or {})
    tensors = {
        f"base_model.model.{k}": np.ascontiguousarray(x) for k, x in tensors.items()
    }
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 3, "target_modules": ["q"], **config}
    text = json.dumps({"peft_type": "LORA", **config})
    (folder / "adapter_config.json").write_text(text)
    return folder


def imported(folder, tied=False, tree=None):
    names = TIED_NAMES if tied else NAMES
    return lj.import_peft(
        folder, base(tied) if tree is None else tree, names, axes=AXES
    )


def copies(params):
    found = {}
    for module, leaves in params.items():
        for name in leaves:
            if name.endswith("lora_w"):
                found[f"{module}/{name}"] = np.asarray(leaves[name])
    return found


# Tables that are stored, and not trained.


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_peft_drops_the_tables_of_the_base(tmp_path, tied, dtype):
    """`save_embedding_layers=True`, of a base in either dtype."""
    head = TABLE if tied else HEAD.T
    stored = {"m.embed_tokens.weight": TABLE, "lm_head.weight": head}
    stored = {name: x.astype(dtype) for name, x in stored.items()}
    params = imported(write(tmp_path, stored), tied)
    assert copies(params) == {}


def test_import_peft_takes_other_tables_as_trained(tmp_path, close):
    """PEFT loads them, too: a vocabulary that was resized and trained."""
    stored = {"m.embed_tokens.weight": TABLE + 1, "lm_head.weight": HEAD.T + 2}
    found = copies(imported(write(tmp_path, stored)))
    close(found, {"embed/lora_w": TABLE + 1, "head/lora_w": HEAD + 2})
    stored = {"m.embed_tokens.weight": TABLE + 1, "lm_head.weight": TABLE + 1}
    found = copies(imported(write(tmp_path, stored), tied=True))
    close(found, {"embed/lora_w": TABLE + 1})


def test_import_peft_refuses_tables_that_no_leaf_can_hold(tmp_path):
    folder = write(tmp_path, {"m.embed_tokens.weight": DRAW(11, 4)})
    with pytest.raises(ValueError, match=r"must be \(9, 4\).*vocabulary was resized"):
        imported(folder)
    folder = write(tmp_path, {"m.embed_tokens.weight": TABLE + 1})
    with pytest.raises(
        ValueError, match=r"'m.embed_tokens' in full, and not 'lm_head'"
    ):
        imported(folder, tied=True)
    both = {"m.embed_tokens.weight": TABLE + 1, "lm_head.weight": TABLE}
    with pytest.raises(ValueError, match=r"has different 'lm_head', 'm.embed_tokens'"):
        imported(write(tmp_path, both), tied=True)
    quantized = base()
    quantized["embed"] = lj.quantize({"embed": quantized["embed"]}, {"embed": "int8"})[
        "embed"
    ]
    folder = write(tmp_path, {"m.embed_tokens.weight": TABLE + 1})
    with pytest.raises(ValueError, match=r"embed/embedding.*quantized"):
        imported(folder, tree=quantized)
    # A norm that the config does not name is no table.
    folder = write(tmp_path, {"m.0.q.bias": BIAS[0] + 1})
    with pytest.raises(
        ValueError, match=r"'base_model.model.m.0.q.bias' is of no module"
    ):
        imported(folder)


# Tables that are tied to the head.


def test_import_peft_of_tied_adapters(tmp_path, close):
    """The head's factors are the table's, transposed; the config names the table."""
    a, b = DRAW(2, 9), DRAW(4, 2)
    table = {"lora_embedding_A": a, "lora_embedding_B": b}
    table = {f"m.embed_tokens.{name}": x for name, x in table.items()}
    head = {"lm_head.lora_A.weight": b.T, "lm_head.lora_B.weight": a.T}
    config = dict(target_modules=["q", "embed_tokens"], ensure_weight_tying=True)
    params = imported(write(tmp_path, table | head, **config), tied=True)
    close(lj.merge(params)["embed"]["embedding"], TABLE + 1.5 * (b @ a).T)
    head["lm_head.lora_B.weight"] = a.T + 1
    with pytest.raises(ValueError, match=r"and its tied head.*differ"):
        imported(write(tmp_path, table | head, **config), tied=True)
    config["ensure_weight_tying"] = False
    with pytest.raises(ValueError, match="'lm_head', which its config does not target"):
        imported(write(tmp_path, table | head, **config), tied=True)


def test_export_peft_of_a_tied_table(tmp_path, close, randomized):
    """Both modules are written, and the flag that keeps them equal in training."""
    params = lj.lorafy(base(True), 2, targets=["q", "embed"], axes=AXES)
    params = randomized(params)
    lj.export_peft(tmp_path / "low", params, TIED_NAMES)
    config = json.loads((tmp_path / "low" / "adapter_config.json").read_text())
    assert config["ensure_weight_tying"] is True
    close(imported(tmp_path / "low", tied=True), params)

    params = lj.lorafy(base(True), 2, targets="q", also="embed", axes=AXES)
    params["embed"]["lora_w"] = jnp.asarray(TABLE + 1)
    lj.export_peft(tmp_path / "whole", params, TIED_NAMES)
    config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["m.embed_tokens"]
    assert config["ensure_weight_tying"] is True
    stored = safetensors.numpy.load_file(tmp_path / "whole/adapter_model.safetensors")
    for name in ("m.embed_tokens.weight", "lm_head.weight"):
        close(stored[f"base_model.model.{name}"], TABLE + 1)
    close(copies(imported(tmp_path / "whole", tied=True)), {"embed/lora_w": TABLE + 1})


@pytest.mark.parametrize("options", [{}, {"also": "embed"}])
def test_export_peft_of_a_tied_table_that_peft_does_not_know(
    tmp_path, close, randomized, options
):
    """PEFT ties by two names, and warns where a model has neither: BERT's, say."""
    names = TIED_NAMES | {"embed": ("m.word_embeddings", "cls.decoder")}
    targets = "q" if options else ["q", "embed"]
    params = randomized(lj.lorafy(base(True), 2, targets=targets, axes=AXES, **options))
    lj.export_peft(tmp_path / "out", params, names)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "ensure_weight_tying" not in config
    close(lj.import_peft(tmp_path / "out", base(True), names, axes=AXES), params)


# Some rows of a table.


@pytest.mark.parametrize("indices", [[7, 2], {"embed_tokens": [7, 2]}])
@pytest.mark.parametrize("tied", [False, True])
def test_import_peft_of_trained_rows(tmp_path, close, indices, tied):
    new = DRAW(2, 4)
    folder = write(tmp_path / "in", {ROWS: new}, trainable_token_indices=indices)
    params = imported(folder, tied)
    want = TABLE.copy()
    want[[7, 2]] = new
    close(copies(params), {"embed/lora_w": want})
    lj.export_peft(tmp_path / "out", params, TIED_NAMES if tied else NAMES)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"m.embed_tokens": [2, 7]}
    assert config["modules_to_save"] is None
    stored = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    close(stored[f"base_model.model.{ROWS}"], new[::-1])
    assert not any("embed_tokens.weight" in name for name in stored)
    close(imported(tmp_path / "out", tied), params)


def test_import_peft_refuses_rows_that_do_not_fit(tmp_path):
    new = {ROWS: DRAW(2, 4)}
    for config, match in (
        ({}, "its config no trainable_token_indices of 'm.embed_tokens'"),
        (
            {"trainable_token_indices": [1, 9]},
            "has 9, and 'embed/embedding' has 9 rows",
        ),
        ({"trainable_token_indices": [1]}, r"of shape \(2, 4\), and \(1, 4\)"),
    ):
        with pytest.raises(ValueError, match=match):
            imported(write(tmp_path, new, **config))
    with pytest.raises(
        ValueError, match=r"lacks the tensors of .trainable_token_indices 'embed"
    ):
        imported(write(tmp_path, trainable_token_indices={"embed_tokens": [1]}))
    tree = base()
    tree["embed"] = lj.quantize({"embed": tree["embed"]}, {"embed": "int8"})["embed"]
    folder = write(tmp_path, new, trainable_token_indices=[1, 2])
    with pytest.raises(ValueError, match="'embed/embedding', which is quantized"):
        imported(folder, tree=tree)


# Biases.


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("key", ["base_layer.bias", "bias"])
def test_import_peft_of_trained_biases(tmp_path, close, bias, key):
    new = DRAW(2, 6)
    tensors = {f"m.{i}.q.{key}": new[i] for i in (0, 1)}
    params = imported(write(tmp_path / "in", tensors, bias=bias))
    close(copies(params), {"q/bias_lora_w": new})
    lj.export_peft(tmp_path / "out", params, NAMES)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["bias"], config["modules_to_save"]) == ("lora_only", None)
    stored = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    for i in (0, 1):
        close(stored[f"base_model.model.m.{i}.q.base_layer.bias"], new[i])
    close(imported(tmp_path / "out"), params)


def test_import_peft_adds_the_bias_of_b(tmp_path, close):
    """`lora_bias`: B has a bias, which is scaled and added to the module's own."""
    more = DRAW(2, 6)
    tensors = {f"m.{i}.q.lora_B.bias": more[i] for i in (0, 1)}
    folder = write(tmp_path, tensors, lora_bias=True)
    close(copies(imported(folder)), {"q/bias_lora_w": BIAS + 1.5 * more})
    tree = base()
    del tree["q"]["bias"]
    with pytest.raises(
        ValueError, match=r"changes the bias of 'm.0.q', and names gives"
    ):
        imported(folder, tree=tree)


def test_export_peft_of_biases_of_other_modules(tmp_path, close):
    """A bias whose module has no adapter needs PEFT's bias="all"."""
    tree = base() | {"norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    params = lj.lorafy(tree, 2, targets="q", also="norm/bias", axes=AXES)
    params["norm"]["bias_lora_w"] = jnp.arange(4.0)
    names = NAMES | {"norm": "m.norm"}
    lj.export_peft(tmp_path / "out", params, names)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["bias"] == "all"
    stored = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    close(stored["base_model.model.m.norm.bias"], np.arange(4.0))
    got = lj.import_peft(tmp_path / "out", tree, names, axes=AXES)
    close(copies(got), {"norm/bias_lora_w": np.arange(4.0)})


def test_peft_has_a_bias_for_each_part_of_a_fused_one(tmp_path):
    names = {"qkv": {"m.q": 4, "m.k": 2, "m.v": 2}}
    plain = {"qkv": {"kernel": jnp.ones((3, 8)), "bias": jnp.zeros(8)}}
    params = lj.lorafy(plain, rank=2, also="*/bias")
    params["qkv"]["bias_lora_w"] = jnp.arange(8.0)
    lj.export_peft(tmp_path / "out", params, names)
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    for name, part in zip("qkv", np.split(np.arange(8.0), (4, 6)), strict=True):
        bias = tensors[f"base_model.model.m.{name}.base_layer.bias"]
        np.testing.assert_array_equal(bias, part)
    found = lj.import_peft(tmp_path / "out", plain, names)
    np.testing.assert_array_equal(found["qkv"]["bias_lora_w"], np.arange(8.0))
    torch = {f"m.{n}.bias": np.zeros(k) for n, k in (("q", 4), ("k", 2), ("v", 2))}
    torch |= {f"m.{n}.weight": np.ones((len(torch[f"m.{n}.bias"]), 3)) for n in "qkv"}
    lj.export_weights(tmp_path / "merged", params, names, torch)
    new = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    both = np.concatenate([new[f"m.{n}.bias"] for n in "qkv"])
    np.testing.assert_array_equal(both, np.arange(8.0))
