"""Expressions match what Python's re matches, in bounded time."""

import random
import re
import time

import pytest

from lora_jax._hub.name_expressions import compile_expression

# As Unsloth writes them into target_modules.
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
    r".*?(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj)"
    r".*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|"
    r"ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|"
    r"down_proj)))"
)
NAMES = [
    "model.layers.12.self_attn.q_proj",
    "model.language_model.layers.0.mlp.experts.127.down_proj",
    "model.visual.blocks.3.attn.qkv",
    "visual.q_proj",
    "lm_head",
    "language_model.q_proj.",
]


@pytest.mark.parametrize(
    "expression",
    [
        UNSLOTH,
        r".*\.(q|k|v)_proj",
        r"^(?!.*visual).*(?:q_proj|down_proj).*",
        r"^(language_model|model)(?=\.).*\.(q_proj|down_proj)$",
        r"model\.layers\.(?:1[0-5]|[0-9])\..*",
        r".*(?<!visual\.)q_proj",
        r"(?P<first>\w+)(\.\w+)*",
    ],
)
def test_compile_expression_that_users_write(expression):
    for whole, match in ((True, re.fullmatch), (False, re.match)):
        test = compile_expression(expression, whole=whole)
        for name in NAMES:
            assert test(name) == (match(expression, name) is not None), name


ITEMS = (
    r"a b ab . \. \d \w \W [ab] [^a] []a] [\d.] ^ $ \b \B \A \Z { } {} {a \- \x61 _ 1 "
    r"\n (?<=a) (?<!ab) (?<=a|b)"
).split()
QUANTIFIERS = "* + ? *? +? ?? {2} {0,2} {1,} {,2} {,} {2,3}?".split()
GROUPS = "( (?: (?= (?! (?P<name>".split()


def drawn_expression(rng, depth):
    text = ""
    for _ in range(rng.randint(0, 4)):
        if depth and rng.random() < 0.4:
            text += rng.choice(GROUPS) + drawn_expression(rng, depth - 1) + ")"
        else:
            text += rng.choice(ITEMS)
        text += rng.choice(QUANTIFIERS) if rng.random() < 0.4 else ""
        text += "|" if rng.random() < 0.12 else ""
    return text


@pytest.mark.parametrize("seed", range(10))
def test_compile_expression_agrees_with_re(seed):
    rng = random.Random(seed)
    count = 0
    while count < 100:
        expression = drawn_expression(rng, 3)
        try:
            known = re.compile(expression)
        except re.error:
            continue
        count += 1
        for _ in range(8):
            name = "".join(rng.choices("ab.x1_-{}\n", k=rng.randint(0, 9)))
            for whole, match in ((True, known.fullmatch), (False, known.match)):
                found = compile_expression(expression, whole=whole)(name)
                assert found == (match(name) is not None), (expression, name)


@pytest.mark.parametrize(
    "expression",
    [
        "(a+)+$",
        "(.*)*(.*)*(.*)*x",
        r"(([\w.]*)*)*x",
        r"(\w|\w)*x",
        ".*" * 30 + "x",
        "(.*.)*" * 2000 + "x",
        "(" * 40 + "(.+)+" + ")+" * 40 + "x",
        "(.{0,900}){0,900}x",
        "(?=.*(?=.*(?=.*x)))" * 100,
        "|".join([".*.*x"] * 1000),
    ],
)
def test_compile_expression_is_bounded(expression):
    name = "model.layers.12.mlp." + "a" * 80 + ".!"
    start = time.process_time()
    test = compile_expression(expression, whole=True)
    try:
        assert not test(name)
    except ValueError as error:
        assert "takes too long" in str(error)
    assert time.process_time() - start < 2  # most of it to parse the longest


@pytest.mark.parametrize(
    "expression, match",
    [
        ("(", "is no pattern: missing"),
        ("a{2", None),
        ("(" * 5000 + "a" + ")" * 5000, "parentheses|cannot be read"),
        ("(" * 60 + "a" + ")" * 60, "more than 50 parentheses within each other"),
        ("a" * 200_000, "has 200000 characters"),
        ("a{99999999999999999999}", "cannot be read by Python's re"),
        ("a{2000}", "more than 1000 repeats"),
        (r"(a)\1", "is not supported"),
        ("(?i:a)", "is not supported"),
        ("(?>a+)", "is not supported"),
        ("a++", "possessive"),
    ],
)
def test_compile_expression_refuses(expression, match):
    if match is None:  # re takes a brace that is no quantifier literally
        assert compile_expression(expression, whole=True)(expression)
        return
    with pytest.raises(ValueError, match=match):
        compile_expression(expression, whole=True)
