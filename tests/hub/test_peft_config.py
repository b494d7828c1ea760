"""adapter_config.json: exact patterns when written, strict checks when read."""

import json
import math

import pytest

from lora_jax._hub.peft_config import (
    is_target,
    new_config,
    rank_and_scale,
    read_config,
)

SMALLEST = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q"]}


def read(folder, config):
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "adapter_config.json").write_text(text)
    return read_config(str(folder))


def test_new_config_gives_each_module_its_own_rank_and_alpha():
    ranks = {"q": 2, "a.q": 4, "b.a.q": 4, "axq": 4, "v": 4, "wide": 1}
    alphas = {"q": 1.0, "a.q": 3.0, "b.a.q": 0.1, "axq": 3.0, "v": 3.0, "wide": 3.0}
    config = new_config(ranks, alphas, [])
    assert (config["r"], config["lora_alpha"]) == (4, 3)
    # A key is an expression for the end of a name: "q" would match "a.q" too.
    assert config["rank_pattern"] == {"^q": 2, "wide": 1}
    for name in ranks:
        assert rank_and_scale(config, name) == (ranks[name], alphas[name] / ranks[name])


def test_new_config_lists_parameters_apart():
    ranks = {"q": 2, "k": 2, "mlp.up": 4}
    config = new_config(ranks, ranks, ["mlp.up"])
    assert config["target_modules"] == ["k", "q"]
    assert config["target_parameters"] == ["mlp.up"]
    assert config["r"] == 4 and config["rank_pattern"] == {"q": 2, "k": 2}
    assert "target_parameters" not in new_config({"q": 2}, {"q": 2}, [])


def test_rank_and_scale_with_rslora_and_patterns():
    config = SMALLEST | {
        "use_rslora": True,
        "rank_pattern": {"layers.1.q": 4, r"layers\.\d\.v": 2},
        "alpha_pattern": {"v": 3},
    }
    assert rank_and_scale(config, "q") == (8, 16 / math.sqrt(8))
    assert rank_and_scale(config, "model.layers.1.q") == (4, 8.0)
    assert rank_and_scale(config, "layers.3.v") == (2, 3 / math.sqrt(2))


@pytest.mark.parametrize(
    "more, chosen, not_chosen",
    [
        ({}, ["q", "a.q"], ["aq", "q.a", "k"]),
        ({"target_modules": "a.*q|k"}, ["a.b.q", "aq", "k"], ["q", "b.k"]),
        ({"exclude_modules": ["a.q"]}, ["q", "b.q"], ["a.q", "b.a.q"]),
        ({"exclude_modules": "b.*"}, ["q", "a.q"], ["b.q"]),
        ({"modules_to_save": ["b"]}, ["q", "a.q"], ["b.q", "a.b.q"]),
        ({"layers_to_transform": [1]}, ["m.h.1.q", "q"], ["m.h.0.q", "h.1.q", "m.q"]),
        ({"layers_to_transform": 1}, ["m.h.1.q"], ["m.h.0.q"]),
        (
            {"layers_to_transform": [1], "layers_pattern": "h"},
            ["m.h.1.q", "h.1.q"],
            ["m.h.0.q", "m.b.1.q"],
        ),
    ],
)
def test_is_target(more, chosen, not_chosen):
    config = SMALLEST | more
    assert [n for n in chosen + not_chosen if is_target(config, n)] == chosen


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_dora": False, "lora_bias": False, "alora_invocation_tokens": None},
        {"bias": "none", "peft_version": "0.21.2", "qalora_group_size": 16},
        {"init_lora_weights": "gaussian", "a_field_of_the_future": None},
        {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
        {"init_lora_weights": "mica", "velora_config": {"num_groups": 4}},
        {"target_modules": "all-linear", "bias": "all", "lora_bias": True},
        {"trainable_token_indices": [1], "ensure_weight_tying": True},
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
        ({"layers_to_transform": "1"}, "layers_to_transform '1'"),
        ({"use_qalora": True}, "use_qalora True.*no plain LoRA"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens \[1\]"),
        ({"bias": "some"}, "bias 'some': one of none, lora_only, all is needed"),
        ({"trainable_token_indices": "1"}, "trainable_token_indices '1': a list"),
        ({"trainable_token_indices": {"e": 1}}, "trainable_token_indices .*a list"),
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
        read_config(str(tmp_path))
    with pytest.raises(ValueError, match="is no JSON"):
        read(tmp_path, json.dumps(SMALLEST)[:-1])
    with pytest.raises(ValueError, match="is no config: found list"):
        read(tmp_path, "[]")
    without = {k: v for k, v in SMALLEST.items() if k != "r"}
    with pytest.raises(ValueError, match="r None"):
        read(tmp_path, without)
