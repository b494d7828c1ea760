"""Maps of names: patterns with stars, stacks, parts, and errors in them."""

import random

import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax._hub.names import (
    ModuleNames,
    check_names,
    each_index,
    match_stars,
    module_names,
    name_finder,
)

PATHS = [
    ("layers_0", "attn", "query", "kernel"),
    ("layers_10", "attn", "query", "kernel"),
    ("head", "kernel"),
    ("head", "bias"),
]


@pytest.mark.parametrize(
    "pattern, path, found",
    [
        ("layers_*/attn/query", "layers_10/attn/query/kernel", ["10"]),
        ("layers_*/*/query/kernel", "layers_0/attn/query/kernel", ["0", "attn"]),
        ("*/kernel", "model/layers/0/mlp/up/kernel", ["model/layers/0/mlp/up"]),
        ("*/kernel", "params/model/up/kernel", ["model/up"]),
        ("params/*/kernel", "params/model/up/kernel", ["model/up"]),
        ("mlp/*", "a/mlp/up/kernel", ["up"]),
        ("mlp/*", "a/mlp/q/kernel", ["q"]),
        ("head", "head/kernel", []),
        ("head/kernel", "params/head/kernel", []),
        ("h*d", "head/kernel", ["ea"]),
        ("w[0]", "m/w[0]", []),
        ("ead", "head/kernel", None),
        ("head*", "head/kernel", None),
        ("layers_*", "layers_/kernel", None),
    ],
)
def test_match_stars(pattern, path, found):
    assert match_stars(pattern, tuple(path.split("/"))) == found


def test_module_names_uses_the_first_pattern_that_matches():
    names = {"layers_0/attn/*": "first.{}", "layers_*/*/query": "l.{1}.{0}.q"}
    check_names(names, PATHS)
    assert module_names(names, PATHS[0]) == ModuleNames(("first.query",), None, 0, 0)
    assert module_names(names, PATHS[1]) == ModuleNames(("l.attn.10.q",), None, 0, 1)
    assert module_names(names, PATHS[2]) is None


@pytest.mark.parametrize("seed", range(20))
def test_name_finder_takes_the_first_pattern_that_match_stars_does(seed):
    rng = random.Random(seed)
    parts = ["params", "layers", "0", "1", "q", "kernel", "a.b"]
    draw = lambda: [rng.choice(parts) for _ in range(rng.randint(1, 4))]
    paths = [tuple(draw()) for _ in range(40)]
    texts = ["/".join(draw()) for _ in range(30)]
    patterns = [
        t.replace(rng.choice("01qk"), "*") if i % 3 else t for i, t in enumerate(texts)
    ]
    names = {pattern: "m" for pattern in patterns}
    find = name_finder(names)
    for path in paths:
        matched = [match_stars(pattern, path) is not None for pattern in names]
        named = find(path)
        assert (named is not None) == any(matched)
        assert named is None or named.order == matched.index(True)


def test_module_names_from_a_function_of_the_path():
    dotted = lambda path: None if "head" in path else path.replace("/", ".")
    named = module_names(dotted, ("params", "a", "kernel"))
    assert named is not None and named.templates == ("a.kernel",)
    assert module_names(dotted, PATHS[2]) is None


def test_each_index_fills_in_layers_and_experts():
    names = {"w": {"l.{layer}.e.{expert}.q": 4, "l.{layer}.e.{expert}.k": 2}}
    named = module_names(names, ("w",))
    assert named is not None
    assert named.sizes == (4, 2) and named.stacked == 2
    found = dict(each_index(("w",), named, (2, 3)))
    assert len(found) == 6
    assert found[1, 2] == ("l.1.e.2.q", "l.1.e.2.k")


@pytest.mark.parametrize(
    "names, error, match",
    [
        ({"layers_*/attn/qurey": "q"}, ValueError, "No leaf matches.*Close: 'layers"),
        ({"head": "a", "head/": "b"}, ValueError, "one pattern twice"),
        ({"": "a"}, ValueError, "names takes patterns"),
        (["head"], TypeError, "names is {pattern"),
    ],
)
def test_check_names_refuses(names, error, match):
    with pytest.raises(error, match=match):
        check_names(names, PATHS)


@pytest.mark.parametrize(
    "name, error, match",
    [
        ("a.{}.{}", ValueError, r"more places {} than its pattern has stars: 1"),
        ("a.{block}", ValueError, r"has a place {block}.*{layer} or {expert}"),
        ("a.{", ValueError, "is no template"),
        (("a.{layer}", "b"), ValueError, "in some of its parts only"),
        ({"a": 0}, ValueError, "each part's outputs"),
        ({"a": 1.5}, ValueError, "each part's outputs"),
        ((), TypeError, "is no module name"),
        ("", TypeError, "is no module name"),
        (3, TypeError, "is no module name"),
        ((1, 2), TypeError, "is no module name"),
    ],
)
def test_module_names_refuses(name, error, match):
    with pytest.raises(error, match=match):
        module_names({"*/kernel": name}, PATHS[2])


def transformer(root, *leaves):
    marks = {
        "bert": "encoder/layer/0/attention/self/query/kernel",
        "transformer": "h/0/attn/c_attn/kernel",
        "model": "layers/0/self_attn/q_proj/kernel",
    }
    tree = {}
    for path in (f"{root}/{marks[root]}", *leaves):
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.ones((2, 2))
    return tree


def test_transformers_names():
    tied = {"transformer/wte/embedding": ("transformer.wte", "lm_head")}
    gpt = transformer("transformer", "transformer/wte/embedding")
    rest = {"*/kernel": "{}", "*/embedding": "{}"}
    assert lj.transformers_names(gpt) == tied | rest
    assert lj.transformers_names({"params": gpt}) == tied | rest
    assert lj.transformers_names(lj.lorafy(gpt, 1)) == tied | rest
    own = transformer("transformer", "transformer/wte/embedding", "lm_head/kernel")
    assert lj.transformers_names(own) == rest
    words = "bert/embeddings/word_embeddings/embedding"
    assert lj.transformers_names(transformer("bert", words)) == rest
    found = lj.transformers_names(transformer("bert", words, "cls/predictions/bias"))
    head = "bert.embeddings.word_embeddings", "cls.predictions.decoder"
    assert found == {words: head, **rest, "*/bias": "{}"}
    bare = transformer("model")["model"]
    assert lj.transformers_names(bare) == {"*/kernel": "{}"}
    with pytest.raises(ValueError, match="not the parameters of a Flax BERT, GPT-2"):
        lj.transformers_names({"layer_0": {"kernel": jnp.ones((2, 2))}})
