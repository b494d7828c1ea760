"""adapter_config.json: exact patterns when written, strict checks when read."""

import json
import os

import pytest

from lora_jax._hub.module_rules import module_rules
from lora_jax._hub.peft_config import new_config, read_config

SMALLEST = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q"]}


def read(folder, config):
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "adapter_config.json").write_text(text)
    return read_config(str(folder / "adapter_config.json"))


def test_new_config_gives_each_module_its_own_rank_and_alpha():
    ranks = {"q": 2, "a.q": 4, "b.a.q": 4, "axq": 4, "v": 4, "wide": 1}
    alphas = {"q": 1.0, "a.q": 3.0, "b.a.q": 0.1, "axq": 3.0, "v": 3.0, "wide": 3.0}
    config = new_config(ranks, alphas, [])
    assert (config["r"], config["lora_alpha"]) == (4, 3)
    # A key is an expression for the end of a name: "q" would match "a.q" too.
    assert config["rank_pattern"] == {"^q": 2, "wide": 1}
    rank_and_scale = module_rules(config).rank_and_scale
    for name in ranks:
        assert rank_and_scale(name) == (ranks[name], alphas[name] / ranks[name])


def test_new_config_lists_parameters_apart():
    ranks = {"q": 2, "k": 2, "mlp.up": 4}
    config = new_config(ranks, ranks, ["mlp.up"])
    assert config["target_modules"] == ["k", "q"]
    assert config["target_parameters"] == ["mlp.up"]
    assert config["r"] == 4 and config["rank_pattern"] == {"q": 2, "k": 2}
    assert "target_parameters" not in new_config({"q": 2}, {"q": 2}, [])


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_dora": False, "lora_bias": False, "alora_invocation_tokens": None},
        {"bias": "none", "peft_version": "0.21.2", "qalora_group_size": 16},
        {"init_lora_weights": "gaussian", "a_field_of_the_future": None},
        {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
    ],
)
def test_read_config_of_a_plain_lora(tmp_path, more):
    assert read(tmp_path, SMALLEST | more) == SMALLEST | more


@pytest.mark.parametrize(
    "change, match",
    [
        ({"peft_type": "LOHA"}, "PEFT method 'LOHA'"),
        ({"peft_type": None}, "PEFT method None"),
        ({"r": None}, "r None: a whole number above 0"),
        ({"r": 0}, "r 0: a whole number"),
        ({"r": 8.5}, "r 8.5: a whole number"),
        ({"lora_alpha": "16"}, "lora_alpha '16': a number"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern that is no pattern"),
        ({"alpha_pattern": {"q": None}}, "alpha_pattern"),
        ({"target_modules": [1]}, r"target_modules \[1\]"),
        ({"target_modules": "("}, "target_modules that is no pattern"),
        ({"target_modules": "all-linear"}, "which only the PyTorch model can resolve"),
        ({"layers_to_transform": "1"}, "layers_to_transform '1'"),
        ({"use_qalora": True}, "use_qalora True.*no plain LoRA"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens \[1\]"),
        ({"bias": "all"}, "bias 'all'. Only 'none'"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"a_field_of_the_future": 1}, "a_field_of_the_future 1.*unknown here"),
        ({"init_lora_weights": "pissa"}, "'pissa', which also changes the base"),
        ({"init_lora_weights": "olora"}, "'olora', which also changes the base"),
    ],
)
def test_read_config_refuses(tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        read(tmp_path, SMALLEST | change)


def test_read_config_refuses_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        read_config(str(tmp_path / "adapter_config.json"))
    with pytest.raises(ValueError, match="is no JSON"):
        read(tmp_path, json.dumps(SMALLEST)[:-1])
    with pytest.raises(ValueError, match="is no config: found list"):
        read(tmp_path, "[]")
    without = {k: v for k, v in SMALLEST.items() if k != "r"}
    with pytest.raises(ValueError, match="r None"):
        read(tmp_path, without)
    twice = json.dumps(SMALLEST)[:-1] + ', "r": 4}'
    with pytest.raises(ValueError, match="has 'r' more than once"):
        read(tmp_path, twice)
    inner = '{"rank_pattern": {"q": 1, "q": 2}}'
    with pytest.raises(ValueError, match="has 'q' more than once"):
        read(tmp_path, inner)


@pytest.mark.parametrize("start, end", [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("depth", [500, 50_000])
def test_read_config_refuses_deep_json(tmp_path, start, end, depth):
    """Python's json reads the first depth, and raises RecursionError at the second."""
    text = json.dumps(SMALLEST | {"rank_pattern": "here"})
    deep = start * depth + "1" + end * depth
    with pytest.raises(ValueError, match=r"rank_pattern|too many levels"):
        read(tmp_path, text.replace('"here"', deep))


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_read_config_refuses_expressions_without_a_bound(tmp_path, field):
    for expression, match in {
        "(" * 5000 + "q" + ")" * 5000: f"has a {field} that.*Write the names of",
        r"(q)\1": f"has a {field} that has .*not supported. Write the names",
    }.items():
        with pytest.raises(ValueError, match=match):
            read(tmp_path, SMALLEST | {field: expression})
    assert read(tmp_path, SMALLEST | {field: "(q+)+$"})[field] == "(q+)+$"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_read_config_refuses_what_is_no_file(tmp_path):
    """Opening a pipe would wait until another process opens it to write."""
    path = tmp_path / "adapter_config.json"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"adapter_config.json is no regular file"):
        read_config(str(path))
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="is no regular file"):
        read_config(str(path))
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        read_config(str(path))
