"""export_peft(for_=): what vLLM, SGLang and llama.cpp make of the folder, in NumPy.

The functions `vllm`, `sglang` and `llama_cpp` restate how these programs load a folder,
from their sources: the comments name the files and lines. With the packages in the
folder CONSUMERS, as `.ci/run hub` installs them, the first two are compared with the
programs' own functions, which need torch and no GPU.
"""

import contextlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lj
from lora_jax._hub.consumers import CONSUMERS, RULES, consumers_page, requirements

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = os.environ.get("CONSUMERS")
PREFIX = "base_model.model."
PARTS = ("gate_proj", "up_proj", "down_proj")
# The Llama of vLLM: its linear layers, packed ones by their parts, and its tables.
EXPECTED = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens", "lm_head"),
    *PARTS,
}
EXPECTED |= {f"experts.{i}.{part}" for i in range(3) for part in PARTS}


def read(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def vllm(folder):
    """Returns A, B and the scaling of each module, and what is loaded in full."""
    config, tensors = read(folder)
    # vllm/lora/peft_helper.py 51-92 and 183-202, vllm 0.33.0
    assert not {*(config["modules_to_save"] or ())} - {"classifier", "score"}
    assert not config["use_dora"] and not config.get("lora_bias")
    assert config["bias"] == "none" and config["init_lora_weights"] is True
    assert max(config["r"], *config["rank_pattern"].values(), 0) <= 512

    def pattern(field, default, name):  # peft_helper.py 116-124
        for key, value in config[field].items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        return config[default]

    modules, full = {}, {}
    for key, x in tensors.items():
        # vllm/lora/utils.py 164-219: names; lora_model.py 232-270: expected modules
        *parts, last = key.removeprefix(PREFIX).split(".")
        if parts[-1] in ("score", "classifier") and last in ("weight", "bias"):
            assert parts[-1] in config["modules_to_save"]
            full.setdefault(parts[-1], {})[last] = x
            continue
        if last == "weight":
            *parts, last = parts
        name = ".".join(parts)
        assert last in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"), key
        _, expert, rest = name.rpartition(".experts")
        assert ("experts" + rest if expert else parts[-1]) in EXPECTED
        modules.setdefault(name, {})[last[-1]] = x
    assert len(full) <= 1  # lora_model.py 175-188
    loaded = {}
    for name, each in modules.items():
        a, b = each["A"], each["B"]
        r = pattern("rank_pattern", "r", name)
        assert a.shape[0] == b.shape[1] == r
        loaded[name] = a, b, pattern("alpha_pattern", "lora_alpha", name) / r
    check_stacks(loaded)
    return loaded, full


def check_stacks(loaded):
    """Checks that experts can be stacked.

    vllm/lora/lora_weights.py 172-206, vllm 0.33.0; and of llama.cpp
    conversion/llama.py 263-292.
    """
    layers = {}
    for name in loaded:
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", name):
            layers.setdefault((found[1], found[3]), {})[int(found[2])] = loaded[name]
    for (layer, _), experts in layers.items():
        assert sorted(experts) == [0, 1, 2]
        assert {part for other, part in layers if other == layer} == {*PARTS}
        assert len({a.shape[0] for a, *_ in experts.values()}) == 1


def normalized(weights):
    """Returns the tensors of one layer as SGLang fuses them.

    sglang/srt/lora/lora.py 258-318 and 521-559, sglang 0.5.23.
    """
    weights, names = dict(weights), list(weights)
    seen = {part for part in ("q_proj", "k_proj", "v_proj") for n in names if part in n}
    for q in [name for name in names if "q_proj" in name]:
        k, v = q.replace("q_proj", "k_proj"), q.replace("q_proj", "v_proj")
        middle = weights[k] if "k_proj" in seen else np.zeros_like(weights[v])
        parts = weights[q], middle, weights[v]
        weights[q.replace("q_proj", "qkv_proj")] = np.concatenate(parts)
        for name in (q, v, *([k] if "k_proj" in seen else [])):
            del weights[name]
    for gate in [name for name in names if "gate_proj" in name]:
        up = gate.replace("gate_proj", "up_proj")
        parts = weights[gate], weights.get(up, np.zeros_like(weights[gate]))
        weights[gate.replace("gate_proj", "gate_up_proj")] = np.concatenate(parts)
        del weights[gate]
        weights.pop(up, None)
    return weights


def sglang(folder, layers=2):
    """Returns the tensors of each layer and of the tables, rank and scaling."""
    config, tensors = read(folder)
    assert not config["use_dora"]  # lora_manager.py 336-339
    # lora.py 151-198: what is in no layer and no table is skipped. Nothing may be.
    found, tables = [{} for _ in range(layers)], {}
    for key, x in tensors.items():
        layer = re.search(r"layers\.(\d+)\.", key)
        table = next((t for t in ("embed_tokens", "lm_head") if t in key), None)
        assert layer or table, key
        (found[int(layer[1])] if layer else tables)[key] = x
    r = config["r"]
    for x in (x for weights in found for x in weights.values()):
        assert r in x.shape  # mem_pool.py 861-875 asserts the shape of the buffer
    return list(map(normalized, found)), tables, r, config["lora_alpha"] / r


def sglang_updates(folder, outputs, loaded=None):
    """Returns the update of each module of the layers by SGLang's buffers.

    mem_pool.py 985-1045 and 1290-1345: one tensor of a name per layer and expert, whose
    A has one block of r rows for each of the fused modules. `loaded` are the layers as
    SGLang itself normalized them.
    """
    layers, tables, r, scaling = sglang(folder)
    layers = loaded or layers
    updates = {}
    for weights in layers:
        buffers = set()
        for key in weights:
            if "lora_A" not in key:
                continue
            name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            stem, _, last = name.rpartition(".")
            expert = re.search(r"experts\.(\d+)\.", name)
            buffer = expert and expert[1], last
            assert buffer not in buffers
            buffers.add(buffer)
            fused = {
                "qkv_proj": ("q_proj", "k_proj", "v_proj"),
                "gate_up_proj": ("gate_proj", "up_proj"),
            }
            parts = [f"{stem}.{part}" for part in fused.get(last, (last,))]
            assert all(part in outputs for part in parts), parts
            a, b = weights[key], weights[key.replace("lora_A", "lora_B")]
            assert a.shape[0] == len(parts) * r
            assert b.shape == (sum(outputs[part] for part in parts), r)
            ends = np.cumsum([outputs[part] for part in parts])
            rows = np.split(b, ends[:-1])
            for part, x, y in zip(parts, np.split(a, len(parts)), rows, strict=True):
                updates[part] = scaling * y @ x
    for key in tables:
        if "_A" in key:
            b = tables[key.replace("_A", "_B")]
            name = re.sub(r"\.lora_(embedding_)?A.*", "", key.removeprefix(PREFIX))
            assert tables[key].shape[0] == r
            updates[name] = scaling * b @ tables[key]
    return updates


def llama_cpp(folder):
    """Returns the update of each module.

    convert_lora_to_gguf.py 407-503 and src/llama-adapter.h 53-57, llama-cpp-python
    0.3.36: the one alpha is divided by the rank of each module, and zero means one.
    """
    config, tensors = read(folder)
    assert not config["use_dora"]
    loaded = {}
    for key, x in tensors.items():
        found = re.fullmatch(r"(.*)\.lora_(?:embedding_)?([AB])(?:\.weight)?", key)
        name, part = found.groups()
        loaded.setdefault(name.removeprefix(PREFIX), {})[part] = x
    pairs = {name: (each["A"], each["B"]) for name, each in loaded.items()}
    check_stacks(pairs)
    alpha = config["lora_alpha"]
    return {
        name: (alpha / len(a) if alpha else 1.0) * b @ a
        for name, (a, b) in pairs.items()
    }


def vllm_updates(folder):
    loaded, _ = vllm(folder)
    return {name: scaling * b @ a for name, (a, b, scaling) in loaded.items()}


def draw(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


def llama(**more):
    """A Llama of two layers, with grouped queries, and a head of its own."""
    kernel = lambda *shape: {"kernel": draw(*shape)}
    layer = {
        "attn": {"q": kernel(6, 8), "k": kernel(6, 4), "v": kernel(6, 4)},
        "mlp": {"gate": kernel(6, 10), "up": kernel(6, 10), "down": kernel(10, 6)},
    }
    layer["attn"]["o"] = kernel(8, 6)
    ends = {"tokens": {"embedding": draw(11, 6)}, "head": kernel(6, 11)}
    return {"layers_0": layer, "layers_1": layer, **ends, **more}


NAMES = {
    "layers_*/attn/*": "model.layers.{}.self_attn.{}_proj",
    "layers_*/mlp/*": "model.layers.{}.mlp.{}_proj",
    "tokens": "model.embed_tokens",
    "head": "lm_head",
}


def mixed(*targets):
    """Options of `lorafy` with ranks and alphas that differ, between layers too."""
    each = [
        f"layers_{i}/{target}" if "/" in target else target
        for target in targets
        for i in ((0, 1) if "/" in target else (0,))
    ]
    ranks = {target: 1 + i % 3 for i, target in enumerate(each)}
    alphas = {target: (5, 0.7, 5, 3)[i % 4] for i, target in enumerate(each)}
    return dict(rank=ranks, alpha=alphas, targets=each)


ATTN, MLP = ("attn/q", "attn/k", "attn/v", "attn/o"), ("mlp/gate", "mlp/up", "mlp/down")
EVERY = *ATTN, *MLP, "tokens", "head"
OUTPUTS = dict(q=8, k=4, v=4, o=6, gate=10, up=10, down=6)


def module(path):
    """The name of a kernel of `llama` in PyTorch."""
    layer, block, name = path.split("/")
    block = {"attn": "self_attn", "mlp": "mlp"}[block]
    return f"model.layers.{layer[-1]}.{block}.{name}_proj"


SIZES = {
    module(f"layers_{i}/{block}/{name}"): OUTPUTS[name]
    for i in (0, 1)
    for block, names in (("attn", "q k v o"), ("mlp", "gate up down"))
    for name in names.split()
}


def wanted(params):
    """Returns the updates of the adapted modules: sums of A, B and the scale."""
    found = {}

    def visit(tree, path):
        for name, x in tree.items():
            if name == "lora_a":
                a, b = np.asarray(x, np.float64), np.asarray(tree["lora_b"], np.float64)
                update = float(tree["lora_scale"]) * a @ b
                if path[0] == "tokens":
                    found["model.embed_tokens"] = update.T
                elif path[0] == "head":
                    found["lm_head"] = update.T
                else:
                    found[module("/".join(path))] = update.T
            elif isinstance(x, dict):
                visit(x, (*path, name))

    visit(params, ())
    return found


def assert_updates(got, want):
    """Asserts equal updates, and zeros for all others."""
    assert want.keys() <= got.keys()
    for name, update in got.items():
        expected = want.get(name, np.zeros_like(update))
        np.testing.assert_allclose(update, expected, atol=1e-5, err_msg=name)
    assert all(np.abs(x).max() > 1e-2 for x in want.values())


def lorafied(randomized, base=None, rank=2, **options):
    return randomized(lj.lorafy(base or llama(), rank, **options))


def test_export_peft_for_vllm_keeps_ranks_and_alphas(tmp_path, randomized):
    params = lorafied(randomized, **mixed(*EVERY))
    lj.export_peft(tmp_path / "peft", params, NAMES)
    lj.export_peft(tmp_path / "vllm", params, NAMES, for_="vllm")
    assert_updates(vllm_updates(tmp_path / "vllm"), wanted(params))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        both = [(tmp_path / to / name).read_bytes() for to in ("peft", "vllm")]
        assert both[0] == both[1]
    config, _ = read(tmp_path / "vllm")
    assert {*config["rank_pattern"].values(), config["r"]} == {1, 2, 3}
    assert len(config["alpha_pattern"]) > 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_export_peft_for_all_takes_narrow_dtypes(tmp_path, randomized, dtype):
    """All cast what they read: to their own dtype, or the one of the GGUF."""
    params = lorafied(randomized, **mixed(*EVERY))
    to = dict(for_=["vllm", "sglang", "llama.cpp"], dtype=dtype)
    lj.export_peft(tmp_path, params, NAMES, **to)
    _, tensors = read(tmp_path)
    assert {x.dtype.name for x in tensors.values()} == {dtype}


def test_export_peft_for_vllm_takes_one_head_in_full(tmp_path, randomized):
    base = llama(score={"kernel": draw(6, 3), "bias": draw(3)})
    params = lorafied(randomized, base, targets="attn", also="score")
    lj.export_peft(tmp_path, params, {**NAMES, "score": "score"}, for_="vllm")
    loaded, full = vllm(tmp_path)
    assert len(loaded) == 8
    got, want = full["score"], params["score"]
    np.testing.assert_array_equal(got["weight"], np.asarray(want["lora_w"]).T)
    np.testing.assert_array_equal(got["bias"], want["bias_lora_w"])


@pytest.mark.parametrize("for_", ["vllm", "sglang"])
def test_export_peft_of_a_tied_table_adapts_both_of_its_modules(
    tmp_path, randomized, for_
):
    base = llama()
    del base["head"]
    params = lorafied(randomized, base, targets=["tokens", "layers_0/attn/q"])
    names = {**NAMES, "tokens": ("model.embed_tokens", "lm_head")}
    names.pop("head")
    lj.export_peft(tmp_path, params, names, for_=for_)
    want = wanted(params)
    want["lm_head"] = want["model.embed_tokens"].T
    updates = vllm_updates if for_ == "vllm" else lambda x: sglang_updates(x, SIZES)
    assert_updates(updates(tmp_path), want)


@pytest.mark.parametrize(
    "targets",
    [
        *([target] for target in (*ATTN, *MLP)),
        ["attn/q", "attn/v"],
        ["attn/k", "attn/v", "mlp/up", "head"],
        EVERY,
    ],
)
def test_export_peft_for_sglang_completes_groups(tmp_path, randomized, targets):
    params = lorafied(randomized, **mixed(*targets))
    lj.export_peft(tmp_path, params, NAMES, for_="sglang")
    config, tensors = read(tmp_path)
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    ranks = {x.shape[0] for key, x in tensors.items() if "_A" in key}
    assert ranks == {config["r"]}
    assert_updates(sglang_updates(tmp_path, SIZES), wanted(params))
    # PEFT loads the zeros, too, and the tree reads them back.
    back = lj.import_peft(tmp_path, llama(), NAMES)
    got, want = (wanted(tree) for tree in (back, params))
    for name, update in got.items():
        expected = want.get(name, np.zeros_like(update))
        np.testing.assert_allclose(update, expected, atol=1e-5)


def test_export_peft_for_sglang_leaves_factors_of_one_scale_alone(tmp_path, randomized):
    params = lorafied(randomized, rank={"attn": 3, "*": 2}, alpha=None, rslora=False)
    lj.export_peft(tmp_path, params, NAMES, for_="sglang")
    config, tensors = read(tmp_path)
    assert config["r"] == config["lora_alpha"] == 3
    key = f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"
    want = np.asarray(params["layers_0"]["mlp"]["up"]["lora_b"]).T
    np.testing.assert_array_equal(tensors[key], np.pad(want, ((0, 0), (0, 1))))


def test_export_peft_for_sglang_completes_stacks_and_fused_weights(
    tmp_path, randomized
):
    """The sizes of weights without an adapter come from those of the group."""
    layers = {
        "q": {"kernel": draw(6, 2, 4, 2)},  # (in, layers, heads, size)
        "kv": {"kernel": draw(6, 2, 8)},  # k and v, fused
        "mlp": {"kernel": draw(6, 2, 20)},  # gate and up, fused
    }
    axes = {
        "q/kernel": lj.Axes((1,), (0,), (2, 3)),
        "mlp/kernel": lj.Axes((1,), (0,), (2,)),
    }
    attn = "model.layers.{layer}.self_attn."
    names = {
        "q": f"{attn}q_proj",
        "kv": (f"{attn}k_proj", f"{attn}v_proj"),
        "mlp": {f"model.layers.{{layer}}.mlp.{n}_proj": 10 for n in ("gate", "up")},
    }
    params = lj.lorafy(layers, 2, targets=["q", "mlp"], axes=axes)
    params = randomized(params)
    b = np.array(params["mlp"]["lora_b"])
    b[..., :10, :] = 0  # the adapter of PEFT's up_proj alone
    params["mlp"]["lora_b"] = jax.device_put(b)
    lj.export_peft(tmp_path, params, names, for_="sglang")
    got = sglang_updates(tmp_path, SIZES)
    update = lambda name: np.asarray(
        lj.merge(params)[name]["kernel"] - params[name]["kernel"]
    )
    want = {}
    for i in (0, 1):
        want[module(f"layers_{i}/attn/q")] = update("q")[:, i].reshape(6, 8).T
        want[module(f"layers_{i}/mlp/up")] = update("mlp")[:, i, 10:].T
    assert_updates(got, want)
    assert len(got) == 10


@pytest.mark.parametrize(
    "targets, names, match",
    [
        (
            "attn/q",
            {"layers_*/attn/q": "model.layers.{}.self_attn.q_proj"},
            r"is 'model.layers.0.self_attn.q_proj', which SGLang 0.5.23 loads only "
            "together with 'model.layers.0.self_attn.v_proj'.*Add the weight to names",
        ),
        (
            "mlp/up",
            {"layers_*/mlp/up": "model.layers.{}.mlp.up_proj"},
            "together with 'model.layers.0.mlp.gate_proj'.*has none, pass its modules=",
        ),
        (
            "attn/q",
            {
                "layers_*/attn/q": "model.layers.{}.self_attn.q_proj",
                "layers_*/attn/v": "model.layers.{}.self_attn.k_proj",
                "layers_*/mlp/down": "model.layers.{}.self_attn.v_proj",
                "head": "lm_head",
            },
            "shows that it has 7 inputs",
        ),
    ],
)
def test_export_peft_for_sglang_names_what_is_missing(
    tmp_path, randomized, targets, names, match
):
    base = llama()
    if "7" in match:
        base = {**base, "layers_0": {**base["layers_0"]}}
        base["layers_0"]["attn"] = {"q": {"kernel": draw(7, 8)}}
        targets = "layers_0/attn/q"
        names = {k.replace("*", "0"): v.format(0) for k, v in names.items()}
        names.pop("layers_0/attn/v")
    params = lorafied(randomized, base, targets=targets)
    with pytest.raises(ValueError, match=match):
        lj.export_peft(tmp_path / "out", params, names, for_="sglang")
    lj.export_peft(tmp_path / "peft", params, names)


def test_export_peft_for_sglang_needs_no_name_of_what_it_fills_itself(
    tmp_path, randomized
):
    """It makes zeros of k by v, and of up by gate."""
    names = {
        "layers_*/attn/q": "model.layers.{}.self_attn.q_proj",
        "layers_*/attn/v": "model.layers.{}.self_attn.v_proj",
        "layers_*/mlp/gate": "model.layers.{}.mlp.gate_proj",
    }
    params = lorafied(randomized, targets=["attn/q", "attn/v", "mlp/gate"])
    lj.export_peft(tmp_path, params, names, for_="sglang")
    assert len(read(tmp_path)[1]) == 2 * 2 * 3
    assert_updates(sglang_updates(tmp_path, SIZES), wanted(params))


def test_export_peft_for_sglang_of_a_model_without_a_gate(tmp_path, randomized):
    """The modules of the PyTorch model show that it has none."""
    names = {"layers_*/mlp/up": "model.layers.{}.mlp.up_proj"}
    params = lorafied(randomized, targets="mlp/up")
    known = [f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in PARTS[1:]]
    lj.export_peft(tmp_path, params, names, for_="sglang", modules=known)
    assert len(read(tmp_path)[1]) == 4


def test_export_peft_completes_groups_in_linear_time(tmp_path, calls):
    """Each leaf may have its own line of the map, and modules without an adapter."""

    def export(n):
        parts = ("gate_proj", "up_proj")
        leaf = lambda: {"kernel": np.ones((2, 2), np.float32)}
        tree = {f"layer_{i}": {part: leaf() for part in parts} for i in range(n)}
        names = {f"layer_{i}/{p}": f"layers.{i}.{p}" for i in range(n) for p in parts}
        params = lj.lorafy(tree, rank=1, targets="gate_proj")
        folder = tmp_path / str(n)
        return lambda: lj.export_peft(folder, params, names, for_="sglang")

    export(4)()
    assert calls(export(200)) < 2.2 * calls(export(100))


def test_export_peft_for_llama_cpp_has_one_alpha(tmp_path, randomized):
    params = lorafied(randomized, **mixed(*EVERY))
    lj.export_peft(tmp_path, params, NAMES, for_="llama.cpp")
    config, tensors = read(tmp_path)
    assert config["lora_alpha"] == 5 and not config["alpha_pattern"]
    assert {*config["rank_pattern"].values(), config["r"]} == {1, 2, 3}
    assert_updates(llama_cpp(tmp_path), wanted(params))
    # Only what has another alpha is multiplied, and rounded.
    key = f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"
    want = np.asarray(params["layers_0"]["mlp"]["up"]["lora_b"]).T
    np.testing.assert_array_equal(tensors[key], want)


def test_export_peft_for_llama_cpp_of_a_scale_of_zero(tmp_path, randomized):
    """It takes an alpha of zero for a scale of one."""
    params = lj.rescale(lorafied(randomized, targets="attn/q"), 0.0)
    lj.export_peft(tmp_path, params, NAMES, for_="llama.cpp")
    assert read(tmp_path)[0]["lora_alpha"] == 1
    updates = llama_cpp(tmp_path)
    assert len(updates) == 2 and not any(map(np.any, updates.values()))


def test_export_peft_multiplies_alphas_into_b_in_float32(tmp_path):
    """Narrow leaves keep their dtype, and are rounded only after the product."""
    base = {"a": {"kernel": jnp.ones((8, 8))}, "b": {"kernel": jnp.ones((8, 8))}}
    params = lj.lorafy(base, 8, alpha={"a": 0.7, "b": 8}, dtype=jnp.bfloat16)
    b = jax.random.normal(jax.random.key(0), (8, 8), jnp.bfloat16)
    params["a"]["lora_b"] = params["b"]["lora_b"] = b
    names = {"*/kernel": "layers.0.{}"}
    lj.export_peft(tmp_path, params, names, for_="llama.cpp")
    config, tensors = read(tmp_path)
    scale = np.float32(config["lora_alpha"] / 8)
    for name in "ab":
        stored = tensors[f"{PREFIX}layers.0.{name}.lora_B.weight"]
        assert stored.dtype == jnp.bfloat16
        factor = np.asarray(params[name]["lora_scale"]) / scale
        want = (np.asarray(b, np.float32) * factor).astype(stored.dtype)
        np.testing.assert_array_equal(stored, want.T)


def test_export_peft_for_several_takes_the_strictest_rules(tmp_path, randomized):
    params = lorafied(randomized, **mixed(*EVERY))
    every = ("vllm", "sglang", "llama.cpp", "peft")
    lj.export_peft(tmp_path, params, NAMES, for_=every)
    want = wanted(params)
    assert_updates(vllm_updates(tmp_path), want)
    assert_updates(sglang_updates(tmp_path, SIZES), want)
    assert_updates(llama_cpp(tmp_path), want)
    found = requirements(every)
    assert found.one_rank and found.one_alpha and len(found.consumers) == 4
    assert not requirements("vllm").one_rank


def experts(**ranks):
    """Three experts in a stack, with adapters of these projections and ranks."""
    sizes = {"gate": (6, 5), "up": (6, 5), "down": (5, 6)}
    base = {n: {"kernel": draw(3, *size)} for n, size in sizes.items()}
    axes = {f"{n}/kernel": lj.Axes((0,), (1,), (2,)) for n in sizes}
    names = {"*/kernel": "model.layers.0.mlp.experts.{expert}.{}_proj"}
    return lj.lorafy(base, ranks, targets=list(ranks), axes=axes), names


def expert_updates(params):
    plain = lj.merge(params)
    return {
        f"model.layers.0.mlp.experts.{i}.{name}_proj": np.asarray(
            plain[name]["kernel"][i] - params[name]["kernel"][i]
        ).T
        for name in ("gate", "up", "down")
        for i in range(3)
        if "lora_a" in params[name]
    }


EXPERT_SIZES = {
    f"model.layers.0.mlp.experts.{i}.{part}": 6 if part == "down_proj" else 5
    for i in range(3)
    for part in PARTS
}
LOADERS = {
    "vllm": vllm_updates,
    "sglang": lambda folder: sglang_updates(folder, EXPERT_SIZES),
    "llama.cpp": llama_cpp,
}


@pytest.mark.parametrize("for_", LOADERS)
@pytest.mark.parametrize(
    "ranks", [dict(gate=2, up=1, down=3), dict(up=2), dict(down=1)]
)
def test_export_peft_completes_experts(tmp_path, randomized, for_, ranks):
    """A layer has adapters of all its experts, each projection of one rank."""
    params, names = experts(**ranks)
    params = randomized(params)
    if "gate" in ranks:  # an expert with fewer ranks, and one without any
        a, b = (np.array(params["gate"][f"lora_{x}"]) for x in "ab")
        a[1, :, 1] = b[1, 1] = a[2] = b[2] = 0
        params["gate"] |= dict(lora_a=jax.device_put(a), lora_b=jax.device_put(b))
    lj.export_peft(tmp_path, params, names, for_=for_)
    got = LOADERS[for_](tmp_path)
    assert got.keys() == EXPERT_SIZES.keys()
    want = {k: x for k, x in expert_updates(params).items() if np.any(x)}
    assert_updates(got, want)


@pytest.mark.parametrize("for_", LOADERS)
@pytest.mark.parametrize("targets", ["1/up", "1"])
def test_export_peft_completes_experts_of_separate_leaves(
    tmp_path, randomized, for_, targets
):
    base = {f"{i}": {"up": {"kernel": draw(6, 5)}} for i in range(3)}
    for i in range(3):
        base[f"{i}"] |= {
            "gate": {"kernel": draw(6, 5)},
            "down": {"kernel": draw(5, 6)},
        }
    names = {"*/*/kernel": "model.layers.0.mlp.experts.{}.{}_proj"}
    params = randomized(lj.lorafy(base, 2, targets=targets))
    lj.export_peft(tmp_path, params, names, for_=for_)
    got = LOADERS[for_](tmp_path)
    assert got.keys() == EXPERT_SIZES.keys()
    if targets != "1/up":
        return
    update = (
        np.asarray(lj.merge(params)["1"]["up"]["kernel"]) - base["1"]["up"]["kernel"]
    )
    assert_updates(got, {"model.layers.0.mlp.experts.1.up_proj": update.T})
    names = {"*/up/kernel": "model.layers.0.mlp.experts.{}.up_proj"}
    match = r"together with 'model.layers.0.mlp.experts.\d.(gate|down)_proj'"
    with pytest.raises(ValueError, match=match):
        lj.export_peft(tmp_path, params, names, for_=for_)


def other(name, leaf):
    return lambda: ({**llama(), name: leaf}, dict(targets=[name, "attn/q"]))


conv = other("conv", {"kernel": draw(3, 3, 4, 5)})
table = other("places", {"embedding": draw(7, 6)})
plain = other("extra", {"kernel": draw(6, 6)})
stack = lambda: (
    llama(extra={"kernel": draw(2, 6, 6)}),
    dict(targets="extra", axes={"extra/kernel": lj.Axes((0,), (1,), (2,))}),
)
norm = {"norm": {"scale": draw(6)}}
score = {n: {"kernel": draw(6, 3)} for n in ("score", "classifier")}
also = lambda leaves, **options: (
    lambda: (
        llama(**leaves),
        dict(targets="attn", also=list(leaves), **options),
    )
)
bias = lambda: (
    llama(extra={"kernel": draw(6, 6), "bias": draw(6)}),
    dict(targets=["extra"], also="extra/bias"),
)
dora = lambda: (llama(), dict(targets="attn", dora=True))
tied = lambda: (llama(), dict(targets=["tokens", "attn/q"]))
rank = lambda: (
    llama(extra={"kernel": np.ones((600, 600), np.float32)}),
    dict(rank=513, targets="extra"),
)
TIED = {"tokens": ("model.embed_tokens", "lm_head")}
UP = "model.layers.2.mlp.up_proj"
# The rule, the program, the tree, further names and options, and the message.
REFUSED = {
    "DoRA": ("vllm sglang llama.cpp", dora, {}, {}, "it loads no DoRA.*export_weights"),
    "convolutions": (
        *("vllm sglang llama.cpp", conv, {"conv": "model.conv"}, {}),
        "'conv/kernel' cannot.*'model.conv' is a convolution. Leave it out with excl",
    ),
    "experts in one parameter": (
        *("vllm sglang llama.cpp", stack, {"extra": "model.layers.0.mlp.experts.up"}),
        {"kinds": {"extra": "experts"}},
        "'model.layers.0.mlp.experts.up' is a parameter of all experts. Name the",
    ),
    "copies": (
        *("vllm", also(norm), {"norm": "model.norm"}, {}),
        "'norm/scale' cannot.*only a linear classifier or score in full, and this",
    ),
    "a copy of another kind": (
        *("vllm", also({"score": {"kernel": draw(3, 3, 6, 4)}}), {"score": "score"}),
        {
            "kinds": {"score": "conv"},
            "axes": {"score/kernel": lj.Axes((), (0, 1, 2), (3,))},
        },
        "only a linear classifier or score in full, and this is 'score'",
    ),
    "two copies": (
        *("vllm", also(score), {"score": "score", "classifier": "classifier"}, {}),
        "it loads one module in full, and has 'score'.*also=",
    ),
    "any copy": (
        *("sglang llama.cpp", also(norm), {"norm": "model.norm"}, {}),
        "loads nothing in full, and this is 'model.norm'. Leave it out of also=",
    ),
    "biases": (
        *("vllm sglang llama.cpp", bias, {"extra": UP}, {}),
        "'extra/bias' cannot.*it loads no biases without their modules",
    ),
    "ranks": (
        "vllm",
        rank,
        {"extra": UP},
        {},
        r"not 513. Write params = resize\(params, {'extra/kernel': 512}\)",
    ),
    "tables": (
        *("vllm sglang llama.cpp", table, {"places": "model.places"}, {}),
        "adapts the tables embed_tokens.*, not 'model.places'",
    ),
    "a tied head": ("llama.cpp", tied, TIED, {}, "'lm_head' is a head of a tied table"),
    "names": (
        *("sglang", plain, {"extra": "model.layers.0.mlp.fc1"}, {}),
        "it adapts no module called 'fc1': 'model.layers.0.mlp.fc1'",
    ),
    "layers": (
        *("sglang", plain, {"extra": "model.visual.up_proj"}, {}),
        "it skips 'model.visual.up_proj', which is in no `layers.N`",
    ),
    "one of a name in a layer": (
        *("sglang", plain, {"extra": "model.layers.0.cross_attn.q_proj"}, {}),
        "it loads one 'q_proj' of a layer, and has 'model.layers.0.self_attn.q_proj'",
    ),
    "GPT-2's names": (
        *("llama.cpp", plain, {"extra": "h.0.attn.c_proj"}),
        {"axes": {"extra/kernel": lj.Axes((), (0,), (1,))}},
        r"'c_proj'.*If it is an nn.Linear.*kinds={'extra/kernel': 'linear'}",
    ),
    "Conv1D": (
        *("sglang llama.cpp", plain, {"extra": UP}, {"kinds": {"extra": "conv1d"}}),
        "is a module that stores .inputs, outputs.",
    ),
}


# What another rule refuses for others.
ALSO = {"any copy": "vllm", "copies": "llama.cpp", "two copies": "llama.cpp"}
ALSO["a copy of another kind"] = "llama.cpp"


@pytest.mark.parametrize("rule", REFUSED)
def test_export_peft_refuses_what_a_program_does_not_load(tmp_path, randomized, rule):
    programs, make, more, options, match = REFUSED[rule]
    base, settings = make()
    params = lorafied(randomized, base, **settings)
    names = {**more, **{k: v for k, v in NAMES.items() if k not in more}}
    if rule == "a tied head":
        names.pop("head")
    for for_ in programs.split():
        title = f"for {CONSUMERS[for_].title} {re.escape(CONSUMERS[for_].version)}: "
        with pytest.raises(ValueError, match=match) as error:
            lj.export_peft(tmp_path / "out", params, names, for_=for_, **options)
        assert re.search(title, str(error.value))
        assert f"leave {for_!r} out of for_" in str(error.value)
        assert not list(tmp_path.iterdir())
    lj.export_peft(tmp_path / "out", params, names, **options)  # PEFT loads it
    for for_ in {"vllm", "llama.cpp"} - {*programs.split(), ALSO.get(rule)}:
        lj.export_peft(tmp_path / "out", params, names, for_=for_, **options)


def test_export_peft_for_llama_cpp_takes_gpt2_names_of_linear_modules(
    tmp_path, randomized
):
    params = lorafied(randomized, plain()[0], targets="extra")
    names = {"extra": "h.0.attn.c_proj"}
    axes = {"extra/kernel": lj.Axes((), (0,), (1,))}
    options = dict(axes=axes, kinds={"extra": "linear"}, for_="llama.cpp")
    lj.export_peft(tmp_path, params, names, **options)
    assert list(llama_cpp(tmp_path)) == ["h.0.attn.c_proj"]


@pytest.mark.parametrize(
    "name, model, match",
    [
        ("tokens", "MistralForCausalLM", "no 'embed_tokens' of MistralForCausalLM"),
        ("head", "SmolLM3ForCausalLM", "no 'lm_head' of SmolLM3ForCausalLM"),
        ("tokens", "SmolLM3ForCausalLM", None),
        ("head", "LlamaForCausalLM", None),
    ],
)
def test_export_peft_for_vllm_reads_the_class_of_the_base_model(
    tmp_path, randomized, name, model, match
):
    params = lorafied(randomized, targets=name)
    config = {"architectures": [model], "model_type": "any"}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    export = lambda base: lj.export_peft(
        tmp_path / "out", params, NAMES, base_model=base, for_="vllm"
    )
    if match is None:
        export(tmp_path / "base")
    else:
        with pytest.raises(ValueError, match=match):
            export(tmp_path / "base")
        export("org/model")  # of which nothing is known


@pytest.mark.parametrize("for_", ["vLLM", (), ("vllm", "tgi"), "", [1]])
def test_export_peft_lists_the_programs_that_it_knows(tmp_path, for_):
    params = lj.lorafy({"a": {"kernel": np.ones((4, 4), np.float32)}}, 1)
    with pytest.raises(ValueError, match="one or several of peft, vllm, sglang, llama"):
        lj.export_peft(tmp_path / "out", params, {"a": "a"}, for_=for_)


def test_consumers_page_is_that_of_the_docs():
    page = (ROOT / "docs/pages/guides/consumers.md").read_text()
    assert consumers_page() in page
    for row in CONSUMERS.values():
        assert row.source and row.version in page
    assert len(RULES) == 14


class Stubs:
    """Imports some modules of a package from their files, and mocks all others."""

    def __init__(self, package, real):
        self.package, self.real = package, real

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != self.package:
            return None
        if name in self.real:
            file = pathlib.Path(SOURCES, *name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = self.attribute
        return module

    def exec_module(self, module):
        pass

    @staticmethod
    def attribute(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return False if name == "PIN_MEMORY" else mock.MagicMock()


@contextlib.contextmanager
def stubbed(package, *real):
    """Yields the modules of a package that run without a GPU."""
    if SOURCES is None or not pathlib.Path(SOURCES, package).is_dir():
        pytest.skip(f"set CONSUMERS to a folder with the package {package}")
    pytest.importorskip("torch")
    (installed,) = importlib.metadata.distributions(name=package, path=[SOURCES])
    assert installed.version == CONSUMERS[package].version
    finder = Stubs(package, [f"{package}.{name}" for name in real])
    sys.meta_path.insert(0, finder)
    try:
        yield [importlib.import_module(f"{package}.{name}") for name in real]
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.split(".")[0] == package]:
            del sys.modules[name]


CASES = {
    "llama": lambda: (llama(), dict(**mixed(*EVERY))),
    "q and up": lambda: (llama(), dict(targets=["attn/q", "mlp/up"])),
    "score": lambda: (
        llama(score={"kernel": draw(6, 3), "bias": draw(3)}),
        dict(targets="attn/q", also="score"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_vllm_itself_loads_what_is_exported_for_it(tmp_path, randomized, case):
    base, options = CASES[case]()
    params = lorafied(randomized, base, **options)
    lj.export_peft(
        tmp_path,
        params,
        {**NAMES, "score": "score"} if "score" in base else NAMES,
        for_="vllm",
    )
    with real_vllm() as load:
        model = load(tmp_path)
        updates = {
            name: (x.scaling * x.lora_b @ x.lora_a).numpy()
            for name, x in model.loras.items()
        }
    assert_updates(updates, wanted(params))
    if case == "score":
        full = model.modules_to_save["score"]
        np.testing.assert_array_equal(full.weight.numpy().T, params["score"]["lora_w"])
        np.testing.assert_array_equal(full.bias.numpy(), params["score"]["bias_lora_w"])


def test_vllm_itself_stacks_the_experts_of_an_export(tmp_path, randomized):
    params, names = experts(gate=2, down=3)
    params = randomized(params)
    lj.export_peft(tmp_path, params, names, for_="vllm")
    with real_vllm() as load:
        from vllm.lora.lora_weights import PackedLoRALayerWeights

        loras = load(tmp_path).loras
        layer = "model.layers.0.mlp.experts."
        order = "gate_proj", "down_proj", "up_proj"  # w1, w2, w3
        each = [loras[f"{layer}{i}.{part}"] for i in range(3) for part in order]
        packed = PackedLoRALayerWeights.pack_moe(each, layer).optimize()
    want = expert_updates(params)
    for part, a, b in zip(order, packed.lora_a, packed.lora_b, strict=True):
        for i in range(3):
            zeros = np.zeros((b.shape[1], a.shape[2]))
            expected = want.get(f"{layer}{i}.{part}", zeros)
            np.testing.assert_allclose((b[i] @ a[i]).numpy(), expected, atol=1e-5)


# Refused when the model gets the adapter, which needs a GPU.
LATER = ("experts in one parameter", "a copy of another kind")


@pytest.mark.parametrize(
    "rule", [r for r, x in REFUSED.items() if "vllm" in x[0] and r not in LATER]
)
def test_vllm_itself_refuses_what_is_refused_for_it(tmp_path, randomized, rule):
    _, make, more, options, _ = REFUSED[rule]
    base, settings = make()
    params = lorafied(randomized, base, **settings)
    names = {**more, **{k: v for k, v in NAMES.items() if k not in more}}
    lj.export_peft(tmp_path, params, names, **options)
    with (
        real_vllm() as load,
        pytest.raises(ValueError, match=r"(?i)lora|support|expect"),
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    "targets", [["attn/q"], ["attn/v"], ["attn/k", "mlp/up"], EVERY]
)
def test_sglang_itself_loads_what_is_exported_for_it(tmp_path, randomized, targets):
    params = lorafied(randomized, **mixed(*targets))
    lj.export_peft(tmp_path / "sglang", params, NAMES, for_="sglang")
    lj.export_peft(tmp_path / "peft", params, NAMES)
    with real_sglang() as load:
        layers = load(tmp_path / "sglang")
        assert_updates(
            sglang_updates(tmp_path / "sglang", SIZES, layers), wanted(params)
        )
        restated, *_ = sglang(tmp_path / "sglang")
        for got, want in zip(layers, restated, strict=True):
            assert got.keys() == want.keys()
            assert all(np.array_equal(got[key], want[key]) for key in got)
        with pytest.raises((KeyError, AssertionError, RuntimeError)):
            sglang_updates(tmp_path / "peft", SIZES, load(tmp_path / "peft"))


def test_sglang_itself_knows_the_modules_of_its_row():
    with stubbed("sglang", "srt.lora.utils") as (utils,):
        known = utils.get_normalized_target_modules(CONSUMERS["sglang"].modules)
        assert known <= utils._KNOWN_LORA_TARGET_MODULES


@contextlib.contextmanager
def real_vllm():
    """Yields a function that loads a folder by vLLM's own code."""
    names = "lora.peft_helper", "lora.lora_weights", "lora.utils", "lora.lora_model"
    with stubbed("vllm", *names) as (peft_helper, *_, lora_model):

        def load(folder):
            helper = peft_helper.PEFTHelper.from_local_dir(str(folder), None)
            helper.validate_legal(types.SimpleNamespace(max_lora_rank=512))
            return lora_model.LoRAModel.from_local_checkpoint(
                str(folder), EXPECTED, helper, device="cpu", lora_model_id=1
            )

        yield load


@contextlib.contextmanager
def real_sglang():
    """Yields a function that returns the tensors of layers, normalized by SGLang."""
    names = "lora.lora_config", "lora.utils", "layers.utils.common", "lora.lora"
    names = [f"srt.{name}" for name in names]
    with stubbed("sglang", *names) as (lora_config, _, common, lora):
        # The package of the last one is mocked, and its content is not.
        lora.get_layer_id = common.get_layer_id

        def load(folder):
            config = lora_config.LoRAConfig(str(folder))
            model = types.SimpleNamespace(num_hidden_layers=2)
            adapter = lora.LoRAAdapter("a", config, model, None, None)
            import torch

            tensors = {k: torch.tensor(x) for k, x in read(folder)[1].items()}
            adapter.initialize_weights_from_tensors(tensors)
            return [
                {key: x.numpy() for key, x in layer.weights.items()}
                for layer in adapter.layers
            ]

        yield load
