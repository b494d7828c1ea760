"""The rules of a config give what PEFT's own loops over its entries do."""

import math
import random
import re

import pytest

from lora_jax._hub.module_rules import (
    check_expressions,
    module_rules,
    saved_by,
    unique_keys,
    unmatched_rows,
)

SMALLEST = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q"]}


def is_target(config, module):
    return module_rules(config).is_target(module)


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
        (
            {"layers_to_transform": [1], "layers_pattern": "(layers|h)"},
            ["m.h.1.q", "layers.1.q"],
            ["m.h.0.q", "m.b.1.q"],
        ),
    ],
)
def test_module_rules_target(more, chosen, not_chosen):
    config = SMALLEST | more
    assert [n for n in chosen + not_chosen if is_target(config, n)] == chosen


def test_module_rules_rank_and_scale_with_rslora_and_patterns():
    config = SMALLEST | {
        "use_rslora": True,
        "rank_pattern": {"layers.1.q": 4, r"layers\.\d\.v": 2},
        "alpha_pattern": {"v": 3},
    }
    rank_and_scale = module_rules(config).rank_and_scale
    assert rank_and_scale("q") == (8, 16 / math.sqrt(8))
    assert rank_and_scale("model.layers.1.q") == (4, 8.0)
    assert rank_and_scale("layers.3.v") == (2, 3 / math.sqrt(2))


def test_module_rules_of_a_router_and_of_all_linear_modules():
    rules = module_rules(SMALLEST | {"target_parameters": ["mlp.gate.weight"]})
    assert rules.is_target_parameter("m.1.mlp.gate")
    assert not rules.is_target_parameter("m.1.mlp.gates")
    assert not rules.has_all_linear
    assert module_rules(SMALLEST | {"target_modules": "All-Linear"}).has_all_linear


def test_trained_rows_and_unmatched_rows():
    config = SMALLEST | {"trainable_token_indices": {"embed": [1], "m.head": [2]}}
    rows = module_rules(config).trained_rows
    assert (rows("m.embed"), rows("m.head"), rows("head")) == ([1], [2], None)
    assert unmatched_rows(config, ["m.embed", "head"]) == [
        "trainable_token_indices 'm.head'"
    ]
    config = SMALLEST | {"trainable_token_indices": [1, 2]}
    assert module_rules(config).trained_rows("embed") == [1, 2]
    assert unmatched_rows(config, []) == ["trainable_token_indices"]
    assert not unmatched_rows(config, ["embed"])


@pytest.mark.parametrize(
    "config, match",
    [
        ({"rank_pattern": {"q": 1, "(": 1}}, "rank_pattern that is no pattern"),
        ({"alpha_pattern": {r"(q)\1": 1}}, r"alpha_pattern that has .*not supported"),
        ({"exclude_modules": "(?i)q"}, "exclude_modules that has the group"),
        (
            {"rank_pattern": dict.fromkeys(map("{}.*".format, range(1001)), 1)},
            "more than",
        ),
        ({"modules_to_save": ["["]}, "modules_to_save that is no pattern"),
        ({"layers_pattern": ["h", "(a+)+"]}, r"layers_pattern '\(a\+\)\+', and"),
    ],
)
def test_check_expressions_refuses(config, match):
    with pytest.raises(ValueError, match=match):
        check_expressions(SMALLEST | config)


# What PEFT 0.21 does with each module, in `check_target_module_exists` of
# tuners_utils.py, `get_pattern_key` of utils/other.py and `ModulesToSaveWrapper`.


def peft_saves(entries, name):
    return any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in entries)


def peft_names(entries, name):
    if isinstance(entries, str):
        return re.fullmatch(entries, name) is not None
    return name in entries or any(name.endswith(f".{e}") for e in entries)


def peft_adapts(config, name):
    if peft_names(config["exclude_modules"], name):
        return False
    if peft_saves(config["modules_to_save"], name):
        return False
    chosen, layers = config["target_modules"], config["layers_to_transform"]
    if not peft_names(chosen, name):
        return False
    if isinstance(chosen, str) or name in chosen or not layers:
        return True
    if config["layers_pattern"]:
        lead = r"(?:^|.*?\.)"
        tests = [rf"{lead}{p}\.(?P<idx>\d+)\." for p in config["layers_pattern"]]
    else:
        tests = [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    found = next((m for test in tests if (m := re.match(test, name))), None)
    return found is not None and int(found["idx"]) in layers


def peft_value(values, name, default):
    keys = (key for key in values if re.match(rf"(.*\.)?({key})$", name))
    return values.get(next(keys, None), default)


def drawn_name(rng):
    parts = ["q", "v", "aq", "h", "0", "1", "10", "q_proj", "up-1"]
    joints = [".", ".", ".", ".", "x", "-"]
    name = rng.choice(parts)
    for _ in range(rng.randint(0, 4)):
        name += rng.choice(joints) + rng.choice(parts)
    return name


def drawn_end(rng):
    return drawn_name(rng).split(".", rng.randint(0, 2))[-1]


def drawn_key(rng):
    """Returns the key of a pattern field: a name, an escaped one or an expression."""
    end = drawn_end(rng)
    escaped = re.escape(end)
    more = [
        f"^{escaped}",
        f"^{end}",
        rf"{escaped}|h\.\d+",
        r"(q|v)(_proj)?",
        "h.*q",
        "",
    ]
    return rng.choice([end, end, escaped, *more])


@pytest.mark.parametrize("seed", range(40))
def test_module_rules_agree_with_pefts_loops(seed):
    rng = random.Random(seed)
    several = lambda draw, most: [draw(rng) for _ in range(rng.randint(0, most))]
    config = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": rng.choice([several(drawn_end, 8), drawn_key(rng)]),
        "exclude_modules": rng.choice([[], several(drawn_end, 2), drawn_key(rng)]),
        "modules_to_save": rng.choice([[], several(drawn_key, 2)]),
        "layers_to_transform": rng.choice([None, [], [0], [1, 10]]),
        "layers_pattern": rng.choice([[], ["h"], ["v", "h"], ["(v|h)"]]),
        "rank_pattern": {key: i + 1 for i, key in enumerate(several(drawn_key, 8))},
        "alpha_pattern": {key: i + 9 for i, key in enumerate(several(drawn_key, 3))},
        "target_parameters": several(drawn_end, 3),
    }
    check_expressions(config)
    rules = module_rules(config)
    names = [drawn_name(rng) for _ in range(40)]
    for name in names:
        r = peft_value(config["rank_pattern"], name, 8)
        alpha = peft_value(config["alpha_pattern"], name, 16)
        assert rules.rank_and_scale(name) == (r, alpha / r), (config, name)
        wanted = (
            peft_adapts(config, name),
            any(
                peft_names(config["target_parameters"], each)
                for each in (name, f"{name}.weight")
            ),
            peft_saves(config["modules_to_save"], name),
        )
        found = tuple(test(name) for test in rules[:3])
        assert found == wanted, (config, name)


@pytest.mark.parametrize("seed", range(40))
def test_unique_keys_match_one_name_each(seed):
    rng = random.Random(seed)
    values = {drawn_name(rng): rng.randint(1, 3) for _ in range(30)}
    keys = unique_keys(values, 1)
    for name, value in values.items():
        assert peft_value(keys, name, 1) == value
        # A name is its own key unless that, an expression, matches another name.
        if value != 1:
            others = [n for n in values if n != name]
            plain = re.fullmatch(r"[\w.-]+", name)
            alone = not any(
                re.match(rf"(.*\.)?({re.escape(name)})$", n) for n in others
            )
            assert name not in keys or (plain and alone)
    assert len(keys) == sum(value != 1 for value in values.values())


def test_saved_by_an_expression_and_a_start():
    test = saved_by([r"score|h\.\d", "^lm"])
    names = ["score", "a.score", "h.1", "a.h.1.b", "lm", "lm.q", "a.lm", "b.h"]
    assert [n for n in names if test(n)] == [
        n for n in names if peft_saves([r"score|h\.\d", "^lm"], n)
    ]
