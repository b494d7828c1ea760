"""Tests which weights patterns select, with which rank, alpha and axes.

All tests call `lorafy` on abstract trees, because planning needs no array.
"""

import inspect
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax._tree import flatten, path_name


def w(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def block():
    return {
        "attn": {
            "query": {"kernel": w(8, 2, 4), "bias": w(2, 4)},
            "out": {"kernel": w(2, 4, 8), "bias": w(8)},
        },
        "mlp": {"wi": {"kernel": w(8, 12), "bias": w(12)}, "gate": w(8, 12)},
        "norm": {"scale": w(8), "bias": w(8)},
    }


PARAMS = {
    "embed": {"embedding": w(16, 8)},
    "block_1": block(),
    "block_2": block(),
    "block_10": block(),
    "steps": w(2, 2, dtype=jnp.int32),
}
KERNELS = [
    f"block_{i}/{kernel}/kernel"
    for i in (1, 2, 10)
    for kernel in ("attn/query", "attn/out", "mlp/wi")
]


def weights(params):
    """Returns the paths of the adapted weights."""
    leaves = {path_name(path) for path in flatten(params)}
    found = set()
    for name in leaves:
        if name.endswith("/lora_a"):
            module = name.removesuffix("lora_a")
            found |= leaves & {f"{module}kernel", f"{module}embedding"}
        elif name.endswith("_lora_a"):
            found.add(name.removesuffix("_lora_a"))
    return found


def only(*parts):
    return {name for name in KERNELS if any(part in name for part in parts)}


PARTS = ("lora_a", "lora_b", "lora_scale")
GATES = {f"block_{i}/mlp/gate" for i in (1, 2, 10)}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("query", only("query")),
        ("/query/", only("query")),
        ("kernel", set(KERNELS)),
        ("quer", None),
        ("uery", None),
        ("block_1", only("block_1/") | {"block_1/mlp/gate"}),
        ("block_1*/attn", only("block_1/attn", "block_10/attn")),
        ("block_[12]/attn", only("block_1/attn", "block_2/attn")),
        ("block_?/attn/q*", only("block_1/attn/q", "block_2/attn/q")),
        ("attn/*/kernel", only("attn")),
        ("block_2/*/kernel", only("block_2")),
        ("mlp/*", only("mlp") | GATES),
        ("gate", GATES),
        ("embedding", {"embed/embedding"}),
        (["query", "embed"], only("query") | {"embed/embedding"}),
        (("out", "out/kernel"), only("out")),
        ("*", {*KERNELS, *GATES, "embed/embedding"}),
        (lambda path, x: path.endswith("mlp/wi/kernel"), only("wi")),
        (lambda path, x: x.shape == (16, 8), {"embed/embedding"}),
        (lambda path, x: True, {*KERNELS, *GATES, "embed/embedding"}),
    ],
)
def test_lorafy_targets_match_complete_components(targets, expected):
    if expected is None:
        with pytest.raises(ValueError, match=f"No weight matches '{targets}'"):
            lj.lorafy(PARAMS, 2, targets=targets)
    else:
        assert weights(lj.lorafy(PARAMS, 2, targets=targets)) == expected


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        ("attn", only("mlp")),
        (["query", "block_1*"], only("block_2/attn/out", "block_2/mlp")),
        (lambda path, x: len(x.shape) == 3, only("mlp")),
        ([], set(KERNELS)),
        ("embed", set(KERNELS)),
    ],
)
def test_lorafy_exclude_overrides_targets(exclude, expected):
    adapted = lj.lorafy(PARAMS, 2, targets="kernel", exclude=exclude)
    assert weights(adapted) == expected


def test_lorafy_targets_get_the_array_without_its_box():
    boxed = {"kernel": jax.ShapeDtypeStruct((4, 3), jnp.float32)}
    seen = []
    lj.lorafy(boxed, 1, targets=lambda path, x: not seen.append((path, x.shape)))
    assert seen == [("kernel", (4, 3))]


@pytest.mark.parametrize(
    ("rank", "alpha", "targets", "expected"),
    [
        (2, None, "query", {"query": (2, 1.0)}),
        (4, 8, "query", {"query": (4, 2.0)}),
        (4, 0.5, "query", {"query": (4, 0.125)}),
        (np.int64(4), np.float32(8), "query", {"query": (4, 2.0)}),
        ({"query": 4, "out": 2}, None, None, {"query": (4, 1.0), "out": (2, 1.0)}),
        ({"query": 4, "attn": 2}, 8, None, {"query": (4, 2.0), "out": (2, 4.0)}),
        ({"attn": 4}, {"query": 8}, None, {"query": (4, 2.0), "out": (4, 1.0)}),
        (4, {"query": 8, "attn": 2}, "attn", {"query": (4, 2.0), "out": (4, 0.5)}),
        (4, {}, "query", {"query": (4, 1.0)}),
        ({"*": 2}, None, "out", {"out": (2, 1.0)}),
    ],
)
def test_lorafy_rank_and_alpha_of_the_first_matching_pattern(
    rank, alpha, targets, expected
):
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), block())
    params = lj.lorafy(zeros, rank, alpha=alpha, targets=targets)
    leaves = flatten(params)
    found = {}
    for path, scale in leaves.items():
        if path[-1] == "lora_scale":
            a, b = (leaves[*path[:-1], part] for part in ("lora_a", "lora_b"))
            assert a.shape[-1] == b.shape[0]
            found[path[-2]] = (a.shape[-1], float(scale))
    assert found == expected


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 8.0)])
def test_lorafy_rslora_divides_by_the_root_of_the_rank(rslora, scale):
    zeros = {"kernel": np.zeros((8, 8), np.float32)}
    params = lj.lorafy(zeros, 4, alpha=16, rslora=rslora)
    assert params["lora_scale"].shape == ()
    assert params["lora_scale"] == scale


NAMED = {  # name: (module, kernel, bias or None, inputs of A, outputs of B)
    "query": ("query", (8, 2, 4), None, (8,), (2, 4)),
    "key with a bias": ("Key", (8, 2, 4), (2, 4), (8,), (2, 4)),
    "value of 4": ("value", (8, 3, 2, 2), (3, 2, 2), (8,), (3, 2, 2)),
    "out": ("out", (2, 4, 8), None, (2, 4), (8,)),
    "out with a bias": ("out", (2, 4, 8), (8,), (2, 4), (8,)),
    "out of 4": ("out", (2, 2, 2, 8), (8,), (2, 2, 2), (8,)),
    "conv": ("Conv_0", (3, 3, 4, 8), (8,), (3, 3, 4), (8,)),
    "conv without a bias": ("conv1", (3, 3, 4, 8), None, (3, 3, 4), (8,)),
    "1-D conv": ("conv", (3, 4, 8), None, (3, 4), (8,)),
    "3-D conv": ("ConvTranspose_1", (2, 2, 2, 4, 8), None, (2, 2, 2, 4), (8,)),
}


@pytest.mark.parametrize("name", NAMED)
def test_axes_by_name_distinguishes_inputs_and_outputs(name):
    module, kernel, bias, inputs, outputs = NAMED[name]
    leaves = {"kernel": w(*kernel)} | ({"bias": w(*bias)} if bias else {})
    params = lj.lorafy({module: leaves}, 2)
    assert params[module]["lora_a"].shape == (*inputs, 2)
    assert params[module]["lora_b"].shape == (2, *outputs)


@pytest.mark.parametrize(
    ("module", "name", "shape", "bias"),
    [
        ("dense", "kernel", (3, 8, 8), None),  # heads, or a stack of layers?
        ("query", "kernel", (3, 8, 8), (3, 8)),  # a stack: its bias is one as well
        ("query", "kernel", (3, 8, 2, 4), None),
        ("out", "kernel", (3, 8, 8), (3, 8)),
        ("out", "kernel", (3, 2, 4, 8), None),
        ("Conv_0", "kernel", (3, 3, 3, 4, 8), (3, 8)),
        ("embed", "embedding", (3, 16, 8), None),
        ("experts", "w", (3, 8, 8), None),
    ],
)
def test_axes_by_name_of_ambiguous_dimensions_is_an_error(module, name, shape, bias):
    params = {module: {name: w(*shape)} | ({"bias": w(*bias)} if bias else {})}
    path = f"{module}/{name}"
    match = f"'{path}', of shape .*axes=find_axes.*axes={{'{path}': Axes.*exclude="
    with pytest.raises(ValueError, match=match):
        lj.lorafy(params, 2, targets="*")
    axes = {path: lj.Axes((0,), (1,), tuple(range(2, len(shape))))}
    assert weights(lj.lorafy(params, 2, targets="*", axes=axes)) == {path}


def test_lorafy_axes_override_names():
    params = {"query": {"kernel": w(3, 8, 6)}}
    axes = {"query/kernel": ((0,), [1], (2,))}
    assert lj.lorafy(params, 2, axes=axes)["query"]["lora_a"].shape == (3, 8, 2)


def test_lorafy_axes_may_name_more_than_the_targets():
    axes = {"block_1/attn/query/kernel": lj.Axes((), (0,), (1, 2))}
    assert weights(lj.lorafy(PARAMS, 2, targets="wi", axes=axes)) == only("wi")


@pytest.mark.parametrize(
    ("n_in", "n_out"), [(5, 5), (3, 7), (7, 3), (1, 4)], ids=lambda n: str(n)
)
def test_lorafy_accepts_wasteful_ranks_and_explain_lists_them(n_in, n_out):
    zeros, full = (
        {"m": {"kernel": np.zeros((n_in, n_out), np.float32)}},
        min(n_in, n_out),
    )
    fn = lambda params, x: x @ params["m"]["kernel"]
    for rank in (full, full + 3):
        params = lj.lorafy(zeros, rank)
        assert params["m"]["lora_a"].shape == (n_in, rank)
        report = lj.explain(fn, params, np.zeros((2, n_in), np.float32))
        wasteful = f"Wasteful ranks: m/kernel ({rank} above {full})." in str(report)
        assert wasteful == (rank > full)
        assert report.rows[0].full_rank == full


@pytest.mark.parametrize("name", ["targets", "exclude", "rank", "alpha"])
@pytest.mark.parametrize(
    ("typo", "close", "better"),
    [
        ("qury", "block_1/attn/query/kernel", "query"),
        ("atn/*/kernel", "block_1/attn/query/kernel", "attn/*/kernel"),
        ("Attn", "block_1/attn/query/kernel", "attn"),
        ("block_3/atn", "block_2/attn/query/kernel", "block_2/attn"),
        ("attn/block_1", "block_1/", None),
        ("zzz", "/", None),
    ],
)
def test_match_each_lists_close_names_for_a_pattern_without_match(
    name, typo, close, better
):
    options = {
        "targets": {"rank": 2, "targets": ["query", typo]},
        "exclude": {"rank": 2, "exclude": typo},
        "rank": {"rank": {"query": 2, typo: 2}},
        "alpha": {"rank": 2, "alpha": {typo: 2}},
    }[name]
    with pytest.raises(
        ValueError, match=f"No weight matches '{re.escape(typo)}' of {name}"
    ) as error:
        lj.lorafy(PARAMS, **options)
    message = str(error.value)
    near = re.findall("'(.*?)'", message.partition("Close: ")[2].partition(". ")[0])
    assert 1 <= len(near) <= 6
    assert set(near) <= {*KERNELS, *GATES, "embed/embedding"}
    assert close in near[0]
    if better is None:
        assert "A weight is floating, has 2 or more dimensions" in message
        assert "Their names end in " in message and "'query', " in message
    elif name in ("targets", "exclude"):
        assert f"Write {name}=['{better}']." in message
    else:
        assert f"Write {name}={{'{better}': ...}}." in message


@pytest.mark.parametrize(
    ("pattern", "what"),
    [("steps", r"'steps' is int32 of shape"), ("bias", r"bias' is float32 of shape")],
)
@pytest.mark.parametrize("name", ["targets", "exclude"])
def test_match_each_describes_a_match_that_is_no_weight(name, pattern, what):
    match = f"No weight matches '{pattern}' of {name}: .*{what}.*A weight is floating"
    with pytest.raises(ValueError, match=match):
        lj.lorafy(PARAMS, 2, **{name: pattern})


@pytest.mark.parametrize("pattern", ["q_proj", "all-linear", "self_attn.q_proj"])
def test_match_each_recognizes_names_of_pytorch(pattern):
    match = f"{pattern!r} is a name of PyTorch: .* Flax here, or no targets for all ker"
    with pytest.raises(ValueError, match=match):
        lj.lorafy(PARAMS, 2, targets=pattern)


def test_match_each_recognizes_random_keys():
    params = {"m": {"kernel": w(4, 4)}, "rng": jax.random.key(0)}
    for options in ({"targets": "rng"}, {"targets": "m", "also": "rng"}):
        with pytest.raises(ValueError, match=r"'rng' is a random key of shape \(\)"):
            lj.lorafy(params, 2, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, found 0"),
        ({"rank": -3}, "at least 1, found -3"),
        ({"rank": 2.0}, "whole number of at least 1, found 2.0"),
        ({"rank": True}, "found True"),
        ({"rank": None}, "found None"),
        ({"rank": "8"}, "found '8'"),
        ({"rank": {"query": 0}}, "rank must be .* found 0"),
        ({"rank": {"query": {"query": 2}}}, "rank must be .* found {'query': 2}"),
        ({"rank": {}}, "rank is an empty mapping. Write rank={pattern: number}"),
        ({"rank": {"query": 2}, "targets": "attn"}, "target 'block_1/attn/out/kernel'"),
        ({"rank": {"attn": 2, "query": 4}}, "rank of 'query' is never used.*before"),
        ({"rank": {"query": 2, "/query/": 4}}, "rank has one pattern twice"),
        ({"rank": {"": 2}}, "rank takes patterns of paths, found ''"),
        ({"alpha": 0}, "alpha must be a finite number above 0, found 0"),
        ({"alpha": -1.0}, "above 0, found -1.0"),
        ({"alpha": math.nan}, "finite number above 0, found nan"),
        ({"alpha": math.inf}, "found inf"),
        ({"alpha": True}, "found True"),
        ({"alpha": "16"}, "found '16'"),
        ({"alpha": {"query": 0}}, "alpha must be .* found 0"),
        ({"alpha": {"query": None}}, "alpha must be .* found None"),
        ({"alpha": {"query": {"query": 2}}}, "alpha must be .* found {'query': 2}"),
        ({"alpha": {"attn": 2, "query": 4}}, "alpha of 'query' is never used"),
        ({"targets": ""}, "targets takes patterns of paths, found ''"),
        ({"targets": ["query", "/"]}, "targets takes patterns of paths, found '/'"),
        ({"targets": [None]}, "targets takes patterns of paths, found None"),
        ({"exclude": ""}, "exclude takes patterns of paths, found ''"),
        ({"targets": []}, "nothing to adapt.*selected"),
        ({"targets": lambda path, x: False}, "nothing to adapt.*selected"),
        ({"exclude": "*"}, "nothing to adapt.*named kernel and not excluded"),
        ({"axes": {"attn": ((), (0,), (1,))}}, "'attn', which is no path.*Close: 'bl"),
        ({"axes": {"embed/embedding": ((), (0,), (0,))}}, "each of its 2 dim.*once"),
        ({"axes": {"embed/embedding": ((), (0,), (2,))}}, "each of its 2 dimensions"),
        ({"axes": {"embed/embedding": ((0,), (1,), ())}}, "an input and one an output"),
        ({"axes": {"embed/embedding": ((0,), (), (1,))}}, "an input and one an output"),
        ({"axes": {"embed/embedding": ((0,), (1,))}}, "each of its 2 dimensions"),
    ],
    ids=lambda x: str(x).split(" at 0x")[0] if isinstance(x, dict) else "",
)
def test_lorafy_refuses_options_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        lj.lorafy(PARAMS, **{"rank": 2} | options)


@pytest.mark.parametrize(
    ("params", "targets", "match"),
    [
        ({"m": {"w": w(4, 4)}}, None, r"named kernel.*Weights: 'm/w'.*targets=\["),
        ({"m": {"bias": w(4, 4)}}, lambda *_: True, "nothing to adapt"),
        ({"m": {"scale": w(4, 4)}}, lambda *_: True, "nothing to adapt"),
        ({}, None, "nothing to adapt"),
        ({"m": {"kernel": w(4)}}, None, "nothing to adapt"),
        ({"m": {"kernel": w(4, 4, dtype=jnp.int8)}}, None, "nothing to adapt"),
        (
            {"m": {"kernel": w(4, 4), "embedding": w(4, 4)}},
            "m",
            "'m' holds a kernel an",
        ),
        ({"m": {"kernel": w(4, 4), "embedding": w(4, 4)}}, "embedding", "'m' holds a"),
        ({"m": {0: w(4, 4)}}, "m", "'m/0'"),
        ({"m": [w(4, 4)]}, "m", "m is a list, which cannot gain a leaf next to 'm/0'"),
    ],
)
def test_lorafy_refuses_trees_that_it_cannot_adapt(params, targets, match):
    with pytest.raises(ValueError, match=match):
        lj.lorafy(params, 2, targets=targets)


@pytest.mark.parametrize("leaf", ["kernel", "w"])
def test_lorafy_refuses_an_adapted_weight_by_path(leaf):
    once = lj.lorafy({"m": {leaf: w(4, 4)}, "n": {leaf: w(4, 4)}}, 2, targets="m")
    match = f"'m/{leaf}' already has an adapter. .*strip.*merge.*exclude="
    with pytest.raises(ValueError, match=match):
        lj.lorafy(once, 2, targets=leaf)
    assert weights(lj.lorafy(once, 2, targets="n")) == {f"m/{leaf}", f"n/{leaf}"}


def test_lorafy_checks_before_it_makes_an_array():
    def init(*_):
        raise AssertionError("an array was drawn")

    params = {"a": {"kernel": w(4, 4)}, "b": {"kernel": w(4, 2, 3)}}
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
    match = r"'b/kernel', of shape .* has ambiguous dimensions"
    with pytest.raises(ValueError, match=match):
        lj.lorafy(params, 3, init=init)
    with pytest.raises(ValueError, match="'haed' of also"):
        lj.lorafy({"a": params["a"]}, 3, also="haed", init=init)


def test_axes_by_name_takes_no_stack_for_heads():
    # Scanned layers of nn.Dense(use_bias=False): (layers, in, out), not (in, heads, d).
    stack = {n: {"kernel": w(3, 4, 4)} for n in ("query", "key", "value", "out")}
    with pytest.raises(ValueError, match=r"'attn/query/kernel', of shape .*axes=find"):
        lj.lorafy({"attn": stack}, 2)
    heads = {n: {"kernel": w(4, 3, 2)} for n in ("query", "key", "value")}
    adapted = lj.lorafy({"attn": heads | {"out": {"kernel": w(3, 2, 4)}}}, 2)
    assert adapted["attn"]["out"]["lora_a"].shape == (3, 2, 2)


def test_as_patterns_refuses_other_types():
    with pytest.raises(ValueError, match="targets takes patterns of paths, found 3"):
        lj.lorafy(PARAMS, 2, targets=3)
    with pytest.raises(
        ValueError, match=r"No weight matches 'w' of targets.*there is no"
    ):
        lj.lorafy({"bias": w(4)}, 2, targets="w")


def test_matches_takes_brackets_in_a_path_literally():
    params = {name: {"w": jnp.ones((4, 4))} for name in ("a[0,1]", "b")}
    adapted = lj.lorafy(params, 1, targets="a[0,1]/w")
    assert "w_lora_a" in adapted["a[0,1]"] and "w_lora_a" not in adapted["b"]


# Weights that the default leaves out


def left_out(params, rank=2, **options):
    """Returns the one warning of a call, and the weights that it adapts."""
    with pytest.warns(UserWarning) as caught:
        adapted = lj.lorafy(params, rank, **options)
    (warning,) = caught
    return str(warning.message), weights(adapted), warning


def test_lorafy_default_adapts_kernels_and_reports_other_weights():
    message, adapted, _ = left_out(PARAMS)
    assert adapted == set(KERNELS)
    assert message == (
        "3 weight(s) get no adapter because their names are not kernel: "
        "'block_*/mlp/gate'. Write targets=['kernel', 'gate'] to adapt them too, or "
        "targets='kernel' to leave them out without this warning."
    )
    assert weights(lj.lorafy(PARAMS, 2, targets=["kernel", "gate"])) == adapted | GATES
    assert weights(lj.lorafy(PARAMS, 2, targets="kernel")) == adapted


@pytest.mark.parametrize(
    "options",
    [
        {"targets": "kernel"},
        {"rank": {"kernel": 2}},
        {"exclude": "gate"},
        {"also": "gate"},
        {"targets": lambda path, x: path.endswith("kernel")},
    ],
    ids=["targets", "ranks", "exclude", "also", "function"],
)
def test_report_left_out_is_silent_about_the_callers_choice(options):
    adapted = lj.lorafy(PARAMS, **{"rank": 2} | options)
    assert weights(adapted) == set(KERNELS)


EVERYDAY = {  # trees whose other leaves nobody expects an adapter for
    "tables": {
        "wte": {"embedding": w(9, 4)},
        "pos_embed": w(1, 9, 4),
        "embedder": {"input_embedding": w(9, 4)},
        "wpe": w(9, 4),
        "positions": w(9, 4),
        "cls_token": w(1, 1, 4),
        "relative_position_bias_table": w(9, 2),
        "tok_embed": {"weight": w(9, 4)},
    },
    "norms and biases": {
        "norm": {"scale": w(3, 4), "bias": w(3, 4)},
        "LayerNorm_0": {"weight": w(3, 4)},
        "ln_f": {"g": w(3, 4)},
        "attn": {"in_bias": w(3, 4), "q_norm": w(2, 4), "gamma": w(3, 4)},
        "input_layernorm": {"w": w(3, 4)},
        "layer_normalization_1": {"weight": w(3, 4)},
    },
    "vectors, counts and keys": {
        "gate": w(4),
        "steps": w(4, 4, dtype=jnp.int32),
        "rng": jax.random.key(0),
        "none": None,
    },
    "convolutions": {"Conv_0": {"kernel": w(3, 3, 4, 8), "bias": w(8)}},
}


@pytest.mark.parametrize("kind", EVERYDAY)
def test_report_left_out_ignores_tables_norms_and_biases(kind):
    dense = {"dense": {"kernel": w(4, 4), "bias": w(4)}}
    adapted = weights(lj.lorafy(EVERYDAY[kind] | dense, 2))
    assert adapted - {"Conv_0/kernel"} == {"dense/kernel"}


def test_report_left_out_ignores_collections_other_than_params():
    kernel, cache = w(4, 4), {"attn": {"cached_key": w(1, 9, 2, 2)}}
    variables = {"params": {"m": {"kernel": kernel}}, "cache": cache}
    assert weights(lj.lorafy(variables, 2)) == {"params/m/kernel"}
    state = nnx.State(
        {"m": {"kernel": nnx.Param(kernel), "key": nnx.Cache(w(1, 9, 2, 2))}}
    )
    assert weights(lj.lorafy(state, 2)) == {"m/kernel"}
    variables["params"]["m"]["gate"] = w(4, 4)
    assert "get no adapter" in left_out(variables)[0]


def test_report_left_out_lists_six_patterns_and_suggests_find_axes():
    names = [f"w{chr(ord('a') + i)}" for i in range(8)]
    params = {"m": {"kernel": w(4, 4)} | {name: w(4, 4) for name in names}}
    message, *_ = left_out(params)
    assert "8 weight(s)" in message and "'m/wf', ...." in message
    assert "'m/wg'" not in message
    assert "Write axes=find_axes(fn, params, *args) to adapt every weight" in message


def test_report_left_out_suggests_axes_for_ambiguous_names():
    layer = {"attn": {"q": {"w": w(4, 2, 2)}}, "mlp": {"kernel": w(4, 4)}}
    message, *_ = left_out({"layers": {str(i): layer for i in range(12)}})
    assert "'layers/*/attn/q/w'. Write axes=find_axes(" in message
    axes = {f"layers/{i}/attn/q/w": lj.Axes((), (0,), (1, 2)) for i in range(12)}
    axes |= {f"layers/{i}/mlp/kernel": lj.Axes((), (0,), (1,)) for i in range(12)}
    adapted = lj.lorafy({"layers": {str(i): layer for i in range(12)}}, 2, axes=axes)
    assert weights(adapted) == set(axes)


def test_report_left_out_suggests_targets_that_select_no_more():
    params = {"a": {"kernel": w(4, 4), "w": w(4, 4)}, "embed": {"w": w(9, 4)}}
    message, adapted, _ = left_out(params)
    assert "Write targets=['kernel', 'a/w'] to adapt" in message
    both = lj.lorafy(params, 2, targets=["kernel", "a/w"])
    assert weights(both) == adapted | {"a/w"}


def test_report_left_out_points_to_the_callers_line():
    here = inspect.currentframe
    state = nnx.State({"m": {"kernel": nnx.Param(jnp.ones((4, 4)))}})
    state["m"]["w"] = nnx.Param(jnp.ones((4, 4)))

    class Model(nnx.Module):
        def __init__(self):
            self.m = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.w = nnx.Param(jnp.ones((4, 4)))

    calls = [
        lambda: (lj.lorafy(state, 2), here().f_lineno)[1],
        lambda: (lj.LoRA(Model(), 2), here().f_lineno)[1],
        lambda: (nnx.jit(lambda: lj.LoRA(Model(), 2))(), here().f_lineno)[1],
    ]
    for call in calls:
        with pytest.warns(UserWarning, match="get no adapter because") as caught:
            line = call()
        (warning,) = caught
        assert (warning.filename, warning.lineno) == (__file__, line)


# With axes alone


def test_lorafy_axes_adapt_what_they_name_except_tables():
    params = {
        "q": {"w": w(4, 2, 2)},
        "up": {"kernel": w(4, 4)},
        "wte": {"embedding": w(9, 4)},
        "norm": {"kernel": w(3, 4)},
        "gain": w(3, 4),
    }
    axes = {
        "q/w": lj.Axes((), (0,), (1, 2)),
        "up/kernel": lj.Axes((), (0,), (1,)),
        "wte/embedding": lj.Axes((), (0,), (1,)),
    }
    assert weights(lj.lorafy(params, 2, axes=axes)) == {"q/w", "up/kernel"}
    assert weights(lj.lorafy(params, 2, targets="embedding", axes=axes)) == {
        "wte/embedding"
    }
    # A norm that the caller names is a weight.
    norm = {"norm/kernel": lj.Axes((), (0,), (1,))}
    assert weights(lj.lorafy(params, 2, axes=norm | axes)) == {
        "norm/kernel",
        "q/w",
        "up/kernel",
    }


def test_lorafy_axes_of_ambiguous_names_add_to_the_kernels():
    params = {"a": {"kernel": w(3, 4, 4)}, "b": {"kernel": w(4, 4)}, "v": w(4, 2, 2)}
    stack, turned = lj.Axes((0,), (1,), (2,)), lj.Axes((), (1,), (0,))
    axes = {"a/kernel": stack, "b/kernel": turned, "v": lj.Axes((), (0,), (1, 2))}
    kernels = {"a/kernel", "b/kernel"}
    assert weights(lj.lorafy(params, 2, axes=axes)) == kernels | {"v"}
    message, adapted, _ = left_out(params, axes={"a/kernel": stack})
    assert adapted == kernels
    assert "because their names are not kernel: 'v'. Write axes=" in message
    more = params | {"u": w(4, 4)}
    message, adapted, _ = left_out(more, axes=axes)
    assert adapted == kernels | {"v"}
    assert "Write targets=['kernel', 'v', 'u'] to adapt" in message
    assert "or targets=['kernel', 'v'] to leave" in message
    assert weights(lj.lorafy(more, 2, targets=["kernel", "v"], axes=axes)) == adapted
    plain = {"a": params["a"], "b": params["b"]}
    for names in ({"a/kernel"}, {"a/kernel", "b/kernel"}):
        few = {name: axes[name] for name in names}
        assert weights(lj.lorafy(plain, 2, axes=few)) == kernels


def test_report_left_out_lists_kernels_missing_in_axes():
    params = {
        "a": {"kernel": w(3, 4, 4)},
        "b": {"kernel": w(4, 4)},
        "c": {"kernel": w(4, 4)},
        "w": w(4, 4),
    }
    axes = {
        "a/kernel": lj.Axes((0,), (1,), (2,)),
        "c/kernel": lj.Axes((), (0,), (1,)),
    }
    message, adapted, _ = left_out(params, axes=axes)
    assert adapted == {"a/kernel", "c/kernel"}
    assert "because axes does not name them: 'b/kernel'. Add them to axes" in message
    assert "or write exclude=['b/kernel'] to leave" in message
    again = lj.lorafy(params, 2, axes=axes, exclude=["b/kernel"])
    assert weights(again) == adapted


def test_lorafy_names_all_weights_with_ambiguous_axes():
    params = {"q": w(4, 2, 2), "cls": w(1, 1, 4), "pos": w(1, 9, 4)}
    axes = {"q": lj.Axes((), (0,), (1, 2))}
    match = r"'cls', of shape .* no product and no lookup .*exclude=\['cls', 'pos'\]"
    with pytest.raises(ValueError, match=match):
        lj.lorafy(params, 2, targets="*", axes=axes)
    assert weights(lj.lorafy(params, 2, axes=axes)) == {"q"}


# One dict with path-like keys


def nested():
    return {
        "attn": {
            "query": {"kernel": w(8, 2, 4), "bias": w(2, 4)},
            "out": {"kernel": w(2, 4, 8), "bias": w(8)},
        },
        "mlp": {"wi": {"kernel": w(8, 12), "bias": w(3, 12)}},
        "norm": {"scale": w(3, 8), "kernel": w(3, 8)},
        "wte": {"embedding": w(9, 8)},
    }


def joined(tree, style):
    """Returns one dict with the leaves of a tree under joined keys."""
    names = {
        "slashes": "/".join,
        "dots": ".".join,
        "keystr": lambda path: "".join(f"['{part}']" for part in path),
        "attributes": lambda path: "".join(f".{part}" for part in path),
    }
    return {names[style](path): leaf for path, leaf in flatten(tree).items()}


@pytest.mark.parametrize("style", ["slashes", "dots", "keystr", "attributes"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"targets": "kernel"},
        {"targets": "*"},
        {"targets": "query"},
        {"targets": "attn/*/kernel"},
        {"targets": ["wi", "wte"]},
        {"targets": "mlp/wi/kernel", "also": ["bias", "norm"]},
        {"exclude": "attn"},
        {"rank": {"query": 3, "*": 2}},
    ],
    ids=str,
)
def test_lorafy_treats_path_like_keys_like_the_nested_tree(style, options):
    options = {"rank": 2} | options
    deep, flat = (
        {
            path_name(path): leaf.shape
            for path, leaf in flatten(lj.lorafy(tree, **options)).items()
        }
        for tree in (nested(), joined(nested(), style))
    )
    plain = [shape for name, shape in deep.items() if "lora" in name]
    same = [shape for name, shape in flat.items() if "lora" in name]
    assert sorted(plain) == sorted(same) and plain


def test_matches_accepts_the_separators_of_the_keys():
    attributes = {".layers[0].q.weight": w(4, 4), ".layers[1].q.weight": w(4, 4)}
    dots = {"layers.0.q.kernel": w(4, 4), "layers.1.q.kernel": w(4, 4)}
    for pattern in (".layers[1].q.weight", "layers/1", "[1]", "layers.1.q"):
        adapted = lj.lorafy(attributes, 2, targets=pattern)
        assert weights(adapted) == {".layers[1].q.weight"}
    for pattern in ("layers.1.q.kernel", "layers/1/q", "1.q", "layers.[!0]"):
        assert weights(lj.lorafy(dots, 2, targets=pattern)) == {"layers.1.q.kernel"}
    with pytest.raises(ValueError, match=r"Write targets=\['layers/1/q'\]"):
        lj.lorafy(dots, 2, targets="layers.1.qq")


def test_lorafy_gives_adapters_in_one_dict_unambiguous_names(randomized):
    ones = {"a/kernel": jnp.ones((4, 3)), "b/kernel": jnp.ones((4, 3))}
    adapted = randomized(lj.lorafy(ones, 2))
    new = {f"{m}/kernel_{part}" for m in "ab" for part in PARTS}
    assert adapted.keys() - ones.keys() == new
    labels = lj.labels(adapted)
    assert labels["a/kernel_lora_a"] == "lora_a" and labels["b/kernel"] == "frozen"
    merged = lj.merge(adapted)
    for m in "ab":
        a, b, scale = (adapted[f"{m}/kernel_{part}"] for part in PARTS)
        update = float(scale) * np.asarray(a) @ np.asarray(b)
        np.testing.assert_allclose(merged[f"{m}/kernel"], 1 + update, rtol=1e-5)
