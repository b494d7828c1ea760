"""Tests of `adopt` and `as_qwix` on trees made by hand, in the layouts of LAYOUTS.

The oracle is NumPy's version of the line of each library that computes with factors.
tests/test_adopt_interop.py has trees that the libraries themselves make and train.
"""

import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

import lora_jax as lj
from lora_jax._layouts import LAYOUTS, layout_table
from lora_jax._tree import flatten, path_name, unbox

RNG = np.random.default_rng(0)
R, ALPHA = 3, 7.0


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


# What each library adds to the product of x and the weight, apart from the scale.


def gemma(eqn):
    """gemma/peft/_lora.py: LoRAEinsumAdapter, LoRADenseGeneralAdapter."""
    return lambda x, w, a, b: np.einsum(eqn, x, a, b)


def nnx_lora(x, w, a, b):
    """flax/nnx/nn/lora.py: LoRA.__call__; also openpi's FeedForward._dot."""
    return x @ a @ b


def openpi(eqn):
    """openpi/models/lora.py: Einsum.__call__ and _make_lora_eqns."""
    x, rhs, out = eqn.replace("->", ",").split(",")
    rhs_a, out_a = rhs.replace(rhs[-1], "L"), out.replace(rhs[-1], "L")
    eqn_a, eqn_b = (
        f"{x},{rhs_a}->{out_a}",
        f"{out_a},{rhs.replace(rhs[-2], 'L')}->{out}",
    )
    return lambda x, w, a, b: np.einsum(eqn_b, np.einsum(eqn_a, x, a), b)


def keras(eqn):
    """keras/src/layers/core/einsum_dense.py: EinsumDense.kernel."""
    return lambda x, w, a, b: np.einsum(eqn, x, np.matmul(a, b))


def qwix(eqn, n_in):
    """qwix/_src/providers/lora.py: _compute_lora_delta, of joined dimensions."""

    def delta(x, w, a, b):
        a, b = a.reshape(*w.shape[:n_in], R), b.reshape(R, *w.shape[n_in:])
        return np.einsum(eqn, x, np.tensordot(a, b, 1))

    return delta


class Case(NamedTuple):
    """One adapted weight: its path, the first factor's, the shapes, the product."""

    weight: str
    a: str
    eqn: str
    x: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the weight and the factors
    formula: Any
    fixed: bool = False  # whether the scale is 1

    def path(self, part):
        *module, w = self.weight.split("/")
        name = {"w": w, "a": self.a, "b": f"{self.a[:-1]}b"}[part]
        return (*module, *name.split("/"))


Q, KV, OUT = "btd,ndh->btnh", "bsd,ckdh->cbskh", "btnh,nhd->btd"
UP, MIX, DENSE, HEADS = "bsf,nhf->bsnh", "ebd,edf->ebf", "bd,df->bf", "btd,dnh->btnh"
GATE, X, H = "bsf,nfh->bsnh", (2, 5, 8), (2, 5, 2, 4)
WQ, WKV, WO, W = (2, 8, 4), (2, 1, 8, 4), (2, 4, 8), (8, 6)
EIN, IN_A = "_LoRAEinsum_0/lora/a", "kernel_lora_a"
SQUARE = ((8, 8), (8, R), (R, 8))
CASES = {
    "openpi": [
        Case("q_einsum/w", "lora_a", Q, X, (WQ, (2, 8, R), (2, R, 4)), openpi(Q)),
        Case(
            *("kv_einsum_1/w", "lora_a", KV, X),
            *((WKV, (2, 1, 8, R), (2, 1, R, 4)), openpi(KV)),
        ),
        Case(
            "attn_vec_einsum/w",
            "lora_a",
            OUT,
            H,
            (WO, (2, 4, R), (2, R, 8)),
            openpi(OUT),
        ),
        Case(
            *("mlp/gating_einsum", "gating_einsum_lora_a", GATE, X),
            *(((2, 8, 6), (2, 8, R), (2, R, 6)), gemma("bsf,nfr,nrh->bsnh"), True),
        ),
        Case(
            *("mlp/linear", "linear_lora_a", DENSE, (5, 6)),
            *(((6, 8), (6, R), (R, 8)), nnx_lora, True),
        ),
    ],
    "gemma.peft": [
        Case(
            "q/w", EIN, Q, X, (WQ, (8, R), (R, 2, 4)), gemma("btd,dr,rnh->btnh"), True
        ),
        Case(
            *("kv/w", EIN, KV, X),
            *((WKV, (8, R), (R, 2, 1, 4)), gemma("bsd,dr,rckh->cbskh"), True),
        ),
        Case(
            "o/w", EIN, OUT, H, (WO, (2, 4, R), (R, 8)), gemma("btnh,nhr,rd->btd"), True
        ),
        Case(
            *("mlp/gating_einsum", "_LoRAEinsum_gating_einsum/lora/a", UP, X),
            *(((2, 6, 8), (8, R), (R, 2, 6)), gemma("bsf,fr,rnh->bsnh"), True),
        ),
        Case(
            *("mlp/linear", "_LoRAEinsum_linear/lora/a", DENSE, (5, 6)),
            *(((6, 8), (6, R), (R, 8)), nnx_lora, True),
        ),
        Case("head/kernel", "lora/a", DENSE, (5, 8), SQUARE, nnx_lora, True),
        Case(
            *("general/kernel", "lora/a", HEADS, X),
            *(((8, 2, 3), (8, R), (R, 2, 3)), gemma("btd,dr,rnh->btnh"), True),
        ),
        Case(
            *("experts/w", "lora/a", MIX, X),
            *(((2, 8, 6), (2, 8, R), (R, 6)), gemma("ebd,edr,rf->ebf"), True),
        ),
    ],
    "flax.nnx": [
        Case("m/kernel", "lora/lora_a", DENSE, (5, 8), SQUARE, nnx_lora, True)
    ],
    "Keras": [
        Case(
            *("m/kernel", "lora_kernel_a", DENSE, (5, 8)),
            *((W, (8, R), (R, 6)), keras(DENSE)),
        ),
        Case(
            *("query/kernel", "lora_kernel_a", HEADS, X),
            *(((8, 2, 4), (8, 2, R), (R, 4)), keras(HEADS)),
        ),
        Case(
            *("table/embeddings", "lora_embeddings_a", DENSE, (5, 8)),
            *((W, (8, R), (R, 6)), keras(DENSE)),
        ),
    ],
    "qwix": [
        Case("m/kernel", IN_A, DENSE, (5, 8), SQUARE, qwix(DENSE, 1)),
        Case("k/kernel", IN_A, HEADS, X, ((8, 2, 4), (8, R), (R, 8)), qwix(HEADS, 1)),
        Case("o/kernel", IN_A, OUT, H, (WO, (8, R), (R, 8)), qwix(OUT, 2)),
        Case(
            "q/w", "w_lora_a", Q, X, (WQ, (8, R), (R, 2, 4)), gemma("btd,dr,rnh->btnh")
        ),
        Case(
            *("kv/w", "w_lora_a", KV, X),
            *((WKV, (8, R), (R, 2, 1, 4)), gemma("bsd,dr,rckh->cbskh")),
        ),
    ],
}


def leaves_of(cases):
    """The leaves of a tree in a library's layout, with a bias for each weight."""
    flat = {}
    for case in cases:
        shapes = dict(zip("wab", case.shapes, strict=True))
        flat |= {case.path(part): normal(*shape) for part, shape in shapes.items()}
        flat[(*case.path("w")[:-1], "bias")] = normal(3)
    return flat


def check(adopted, cases, flat):
    """Checks the results of `merge` and of `lora`, and that the plain tree is left."""
    inputs = {case.weight: normal(*case.x) for case in cases}
    want = {}
    for case in cases:
        x, arrays = inputs[case.weight], [flat[case.path(part)] for part in "wab"]
        scale = 1.0 if case.fixed else ALPHA / R
        want[case.weight] = np.einsum(case.eqn, x, arrays[0])
        want[case.weight] += scale * case.formula(x, *arrays)

    def fn(params, inputs):
        leaves = {path_name(path): unbox(x) for path, x in flatten(params).items()}
        return {
            case.weight: jnp.einsum(case.eqn, inputs[case.weight], leaves[case.weight])
            for case in cases
        }

    plain = {path for path in flat if path[-1] in ("w", "kernel", "bias")}
    plain |= {case.path("w") for case in cases}
    names = {path_name(path) for path in flatten(lj.strip(adopted))}
    assert names == {path_name(path) for path in plain}
    for got in (
        jax.jit(lambda params: fn(lj.merge(params), inputs))(adopted),
        jax.jit(lj.lora(fn, materialize="allow"))(adopted, inputs),
    ):
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5)


def alpha_of(cases):
    return None if all(case.fixed for case in cases) else ALPHA


@pytest.mark.parametrize("library", CASES)
def test_adopt_computes_like_the_library(library):
    cases = CASES[library]
    flat = leaves_of(cases)
    adopted = lj.adopt(unflatten_dict(flat), alpha=alpha_of(cases))
    check(adopted, cases, flat)
    for case in cases:
        assert flatten_dict(adopted)[case.path("w")] is flat[case.path("w")]


def test_layouts_have_a_case_each():
    tested = {
        (case.path("w")[-1], case.a) for cases in CASES.values() for case in cases
    }
    named = {(x.weight, x.a) for x in LAYOUTS if "{w}" not in x.a}
    assert (
        named - tested == {("base_module/kernel", "lora_a"), ("w", "lora/a")} - tested
    )


def test_adopt_docstring_has_the_table_of_layouts():
    assert textwrap.indent(layout_table(), " " * 8) in lj.adopt.__doc__


# Containers, boxes, stacked layers


@pytest.mark.parametrize("library", CASES)
def test_adopt_of_stacked_layers(library):
    """`nn.scan` and `nnx.vmap` stack weights and factors along the first dimension."""
    stacked = []
    for case in CASES[library]:
        one, *rest = case.eqn.replace("->", ",").split(",")
        eqn = f"L{one},L{rest[0]}->L{rest[1]}"

        def layers(x, w, a, b, formula=case.formula):
            return np.stack([formula(*each) for each in zip(x, w, a, b, strict=True)])

        shapes = tuple((R, *shape) for shape in case.shapes)
        stacked.append(
            case._replace(eqn=eqn, x=(R, *case.x), shapes=shapes, formula=layers)
        )
    flat = leaves_of(stacked)
    check(lj.adopt(unflatten_dict(flat), alpha=alpha_of(stacked)), stacked, flat)


@pytest.mark.parametrize("library", CASES)
def test_adopt_keeps_containers_and_boxes(library):
    cases = CASES[library]
    flat, alpha = leaves_of(cases), alpha_of(cases)
    tree = unflatten_dict(flat)
    want = lj.adopt(tree, alpha=alpha)
    frozen = lj.adopt(freeze(tree), alpha=alpha)
    assert isinstance(frozen, FrozenDict)
    joined = lj.adopt({"/".join(path): x for path, x in flat.items()}, alpha=alpha)
    state = lj.adopt(nnx.State(jax.tree.map(nnx.Param, tree)), alpha=alpha)
    assert isinstance(state, nnx.State)
    for path, x in flatten(state).items():
        factor = path[-1].endswith(("lora_a", "lora_b"))
        scale = path[-1].endswith("lora_scale")
        assert (type(x) is nnx.LoRAParam) == factor
        assert (type(x) is nnx.Param) == (not factor and not scale)
    values = jax.tree.leaves(want)
    pure = jax.tree.leaves(jax.tree.map(lambda x: x, nnx.to_pure_dict(state)))
    for x, y, z in zip(values, jax.tree.leaves(unfreeze(frozen)), pure, strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)
    assert len(jax.tree.leaves(joined)) == len(values)
    lj.merge(joined)


def test_adopt_shards_factors_like_their_weight():
    box = lambda x, names: nn.Partitioned(x, names)
    params = {
        "kernel": box(normal(8, 6), ("in", "out")),
        "kernel_lora_a": box(normal(8, R), ("in", None)),
        "kernel_lora_b": box(normal(R, 6), (None, "out")),
    }
    adopted = lj.adopt(params, alpha=ALPHA)
    names = {name: x.names for name, x in adopted.items()}
    assert names["lora_a"] == ("in", None) and names["lora_b"] == (None, "out")
    assert adopted["kernel"] is params["kernel"]


def test_adopt_of_shapes_and_tracers():
    for cases in CASES.values():
        tree, alpha = unflatten_dict(leaves_of(cases)), alpha_of(cases)
        want = lj.adopt(tree, alpha=alpha)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert kinds(lj.adopt(shapes, alpha=alpha)) == kinds(want)
        adopt = lambda tree, alpha=alpha: lj.adopt(tree, alpha=alpha)
        assert kinds(jax.eval_shape(adopt, tree)) == kinds(want)


def test_adopt_keeps_the_dtype_of_factors_and_takes_a_traced_alpha():
    params = {"kernel": normal(8, 6), "kernel_lora_a": normal(8, R)}
    params["kernel_lora_b"] = jnp.asarray(normal(R, 6), jnp.bfloat16)
    adopted = jax.jit(lambda alpha: lj.adopt(params, alpha=alpha))(6)
    assert adopted["lora_b"].dtype == jnp.bfloat16
    assert adopted["lora_scale"].dtype == jnp.float32
    assert float(adopted["lora_scale"]) == 2.0


# Alpha


def qwix_tree():
    return unflatten_dict(leaves_of(CASES["qwix"]))


def scales_of(params):
    names = {path_name(path): unbox(x) for path, x in flatten(params).items()}
    return {
        name: np.unique(x).item() for name, x in names.items() if name.endswith("scale")
    }


def test_adopt_takes_alphas_by_pattern():
    alpha = {"*/w": 6, "m": 3, "*": 9}
    assert scales_of(lj.adopt(qwix_tree(), alpha=alpha)) == {
        **{"q/w_lora_scale": 2.0, "kv/w_lora_scale": 2.0, "m/lora_scale": 1.0},
        **{"k/lora_scale": 3.0, "o/lora_scale": 3.0},
    }
    tree = unflatten_dict(leaves_of(CASES["openpi"]))
    scales = scales_of(lj.adopt(tree, alpha={"kv_einsum_1": 3, "*/w": 6}))
    assert sorted(scales.values()) == [1.0, 1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("library", "alpha", "match"),
    [
        (
            "qwix",
            None,
            r"no scale of 'm/kernel', .*alpha=\.\.\.\) with its LoraProvider",
        ),
        ("Keras", None, "alpha elsewhere.*layer.lora_alpha"),
        ("openpi", None, "no scale of 'q_einsum/w', .*LoRAConfig.alpha"),
        ("qwix", {"*/w": 6}, r"no scale of 'm/kernel'.*\{\.\.\., 'm/kernel': \.\.\.\}"),
        ("qwix", {"*/w": 6, "*/kernle": 6}, "No weight matches '\\*/kernle' of alpha"),
        ("qwix", {"*": 6, "q": 6}, "alpha of 'q' is never used"),
        ("qwix", 0, "alpha must be a finite number above 0"),
        ("gemma.peft", 3, "gemma.peft scales these updates by 1.*without alpha"),
        ("flax.nnx", 3, "flax.nnx scales these updates by 1"),
        ("openpi", {"*/w": 3, "mlp": 3}, "'mlp/gating_einsum', .*openpi scales by 1"),
    ],
)
def test_adopt_needs_the_scale_that_the_layout_does_not_fix(library, alpha, match):
    with pytest.raises(ValueError, match=match):
        lj.adopt(unflatten_dict(leaves_of(CASES[library])), alpha=alpha)


# Which dimensions are inputs


def test_adopt_needs_axes_where_shapes_allow_several():
    w, a, b = normal(4, 4), normal(4, R), normal(R, 4)
    params = {"m": {"w": w, "w_lora_a": a, "w_lora_b": b}}
    match = r"different updates, .*'Axes\(batch=\(\), inputs=\(0,\).*axes=\{'m/w': Axes"
    with pytest.raises(ValueError, match=match):
        lj.adopt(params, alpha=R)
    for axes, want in (
        (lj.Axes((), (0,), (1,)), w + a @ b),
        (lj.Axes((), (1,), (0,)), w + (a @ b).T),
    ):
        adopted = lj.adopt(params, alpha=R, axes={"m/w": axes})
        np.testing.assert_allclose(lj.merge(adopted)["m"]["w"], want, rtol=1e-5)
    x = jnp.ones((5, 4))
    found = lj.find_axes(lambda p, x: x @ p["m"]["w"].T, {"m": {"w": w}}, x)
    merged = lj.merge(lj.adopt(params, alpha=R, axes=found))
    np.testing.assert_allclose(merged["m"]["w"], w + (a @ b).T, rtol=1e-5)


def test_adopt_needs_axes_for_an_einsum_that_openpi_does_not_have():
    """For a head the factors of one shape can mean two things: see `openpi`."""
    shapes = {"w": (2, 4, 8), "lora_a": (2, 4, R), "lora_b": (2, R, 8)}
    params = {name: normal(*shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match="make different updates"):
        lj.adopt(params, alpha=R)
    w, a, b = params.values()
    for axes, want in (
        (lj.Axes((), (0, 1), (2,)), np.einsum("nhr,rd->nhd", a, b.sum(0))),
        (lj.Axes((), (1,), (0, 2)), np.einsum("nhr,nrd->nhd", a, b)),
    ):
        merged = lj.merge(lj.adopt(params, alpha=R, axes={"w": axes}))["w"]
        np.testing.assert_allclose(merged, w + want, rtol=1e-5, atol=1e-5)


def test_adopt_refuses_a_table_of_qwix():
    """A head's adapter there does not adapt the lookup, as one of ours does."""
    params = {"embedding": normal(9, 4), "embedding_lora_a": normal(4, R)}
    params["embedding_lora_b"] = normal(R, 9)
    with pytest.raises(ValueError, match=r"'embedding' is a table.*axes=\{'embedding'"):
        lj.adopt(params, alpha=R)
    axes = {"embedding": lj.Axes((), (1,), (0,))}
    merged = lj.merge(lj.adopt(params, alpha=R, axes=axes))["embedding"]
    w, a, b = params.values()
    np.testing.assert_allclose(merged, w + (a @ b).T, rtol=1e-5)


# What is not recognized

KERNEL = {"kernel": np.ones((4, 5), np.float32)}
LORA_A, LORA_B = np.ones((4, 2), np.float32), np.ones((2, 5), np.float32)
THEIRS = KERNEL | {"kernel_lora_a": LORA_A, "kernel_lora_b": LORA_B}


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"m": KERNEL}, r"no adapters of another library\.(.|\n)*openpi +w +lora_a"),
        (
            lj.lorafy({"m": KERNEL}, 2),
            "'m/lora_scale' belongs to an adapter of lora_jax",
        ),
        (
            {"m": THEIRS, "n": KERNEL | {"lora": {"a": LORA_A, "b": LORA_B}}},
            "of several libraries, 'gemma.peft: n/lora/a', 'qwix, tunix, MaxText: m/k",
        ),
        (
            {"m": THEIRS | {"kernel_lora_c": LORA_A}},
            r"'m/kernel_lora_c': no layout (.|\n)*qwix, tunix, MaxText  \{w\}",
        ),
        ({"m": {"kernel": KERNEL["kernel"], "kernel_lora_a": LORA_A}}, "no layout has"),
        (
            {"m": {"kernel_lora_a": LORA_A, "kernel_lora_b": LORA_B}},
            "'m/kernel_lora_a', .*factors without their weights. .*nnx.merge_state",
        ),
        (
            {"m": THEIRS | {"kernel": {"array": {"qvalue": LORA_A, "scale": LORA_A}}}},
            "'m/kernel', the weight of 'm/kernel_lora_a', is several leaves, as qwix",
        ),
        (
            {"m": THEIRS | {"kernel": np.ones((4, 5), np.int8)}},
            "'m/kernel', which has an adapter of qwix.*, is int8, not floating",
        ),
        (
            {"m": THEIRS | {"kernel_lora_a": np.ones((5, 2), np.float32)}},
            r"'m/kernel_lora_a' \(5, 2\) and .*\(2, 5\) for 'm/kernel' \(4, 5\) make",
        ),
        (
            {"m": {n: x if n == "kernel" else {"value": x} for n, x in THEIRS.items()}},
            "'m/kernel_lora_a' is a dict of one 'value'.*restore",
        ),
        (
            {"m": {"w": KERNEL["kernel"], "lora": {"a": LORA_A, "b": LORA_B}}}
            | {
                "m": {"w": KERNEL["kernel"], "lora": {"a": LORA_A, "b": LORA_B}}
                | {"_LoRAEinsum_0": {"lora": {"a": LORA_A, "b": LORA_B}}}
            },
            "'m/w' has two adapters, 'm/lora/a' and 'm/_LoRAEinsum_0/lora/a'",
        ),
        (
            {"m/base_module/kernel": LORA_A @ LORA_B, "m/lora_a": LORA_A}
            | {"m/lora_b": LORA_B},
            "the weight of a layer in an nnx.LoRA, in a tree with path-like keys. Nest",
        ),
        (
            {
                "base_module": KERNEL | {"norm": KERNEL},
                "lora_a": LORA_A,
                "lora_b": LORA_B,
            },
            "'base_module' holds more than one layer",
        ),
    ],
)
def test_adopt_refuses_what_no_layout_explains(params, match):
    with pytest.raises(ValueError, match=match):
        lj.adopt(params, alpha=2)


def test_adopt_accepts_other_leaves_with_similar_names():
    other = {"flora": KERNEL, "explorer": {"a": LORA_A, "b": LORA_B}}
    adopted = lj.adopt({"m": dict(THEIRS), "n": other}, alpha=2)
    assert adopted["n"]["explorer"]["a"] is LORA_A


# Live modules of Flax


class Model(nnx.Module):
    """Layers of `nnx.LoRA` as attributes, in a list, and shared by two modules."""

    def __init__(self, rngs):
        linear = lambda: nnx.Linear(4, 4, rngs=rngs)
        around = lambda: nnx.LoRA(4, 2, 4, base_module=linear(), rngs=rngs)
        self.first = nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs)
        self.layers = nnx.List([around(), linear()])
        self.shared = nnx.Dict(a=around())
        self.again = self.shared["a"]

    def __call__(self, x):
        for layer in (self.first, *self.layers, self.shared["a"], self.again):
            x = jnp.tanh(layer(x))
        return x


def randomized(model):
    draw = lambda x: jnp.asarray(normal(*x.shape))
    nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.LoRAParam)))
    return model


ROOTS = {
    "model": lambda rngs: Model(rngs),
    "LoRALinear": lambda rngs: nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs),
    "LoRA": lambda rngs: nnx.LoRA(
        4, 2, 4, base_module=nnx.Linear(4, 4, rngs=rngs), rngs=rngs
    ),
}


@pytest.mark.parametrize("root", ROOTS)
def test_adopt_of_a_live_module_calls_the_plain_layers(root, third_party):
    model = randomized(ROOTS[root](nnx.Rngs(0)))
    x, before = jnp.asarray(normal(5, 4)), nnx.state(model)
    want = nnx.jit(lambda model, x: model(x))(model, x)
    module = lj.adopt(model)
    assert isinstance(module, lj.LoRA)
    plain = module.merge()
    for name, got in (("lora", module(x)), ("merge", plain(x))):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=name)
    kinds = {type(node) for _, node in nnx.iter_graph(plain)}
    assert nnx.Linear in kinds and not kinds & {nnx.LoRA, nnx.LoRALinear}
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(before)
    tree = lj.adopt(nnx.state(model))
    assert jax.tree.structure(tree) == jax.tree.structure(nnx.state(module.model))


def test_adopt_refuses_a_live_subclass_that_uses_the_factors():
    class Own(nnx.LoRALinear):
        pass

    with pytest.raises(
        ValueError, match=r"a class of its own, Own,.*adopt\(nnx.state\(model"
    ):
        lj.adopt(Own(4, 4, lora_rank=2, rngs=nnx.Rngs(0)))


# as_qwix


def adapted():
    base = {case.path("w"): normal(*case.shapes[0]) for case in CASES["qwix"]}
    axes = {
        "q/w": lj.Axes((), (1,), (0, 2)),
        "kv/w": lj.Axes((), (2,), (0, 1, 3)),
        "k/kernel": lj.Axes((), (0,), (1, 2)),
        "o/kernel": lj.Axes((), (0, 1), (2,)),
    }
    params = lj.lorafy(unflatten_dict(base), R, alpha=5, targets="*", axes=axes)
    draw = lambda x: jnp.asarray(normal(*x.shape))
    half, rest = lj.split(params)
    return lj.combine(jax.tree.map(draw, half), rest)


@pytest.mark.parametrize("alpha", [None, 5, 14, {"*/w": 14, "*": 5}])
def test_as_qwix_computes_the_same_in_qwix(alpha):
    params = adapted()
    theirs = lj.as_qwix(params, alpha=alpha)
    flat, merged = flatten_dict(theirs), flatten_dict(lj.merge(params))
    for case in CASES["qwix"]:
        x, (w, a, b) = normal(*case.x), (np.asarray(flat[case.path(p)]) for p in "wab")
        number = alpha
        if isinstance(alpha, dict):
            number = alpha["*/w" if case.weight.endswith("w") else "*"]
        got = np.einsum(case.eqn, x, w) + (number or R) / R * case.formula(x, w, a, b)
        want = np.einsum(case.eqn, x, merged[case.path("w")])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    again = lj.adopt(theirs, alpha=R if alpha is None else alpha)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    same = jax.tree.map(lambda x, y: x.shape == y.shape, again, params)
    assert all(jax.tree.leaves(same))
    if alpha == 5:  # nothing to multiply by
        assert theirs["m"]["kernel_lora_b"] is params["m"]["lora_b"]


def test_as_qwix_of_shapes_states_and_copies():
    params = lj.lorafy(
        {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, 2, also="bias"
    )
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    want = kinds(lj.as_qwix(params))
    assert sorted(want) == ["bias", "kernel", "kernel_lora_a", "kernel_lora_b"]
    assert kinds(jax.eval_shape(lj.as_qwix, params)) == want
    assert kinds(lj.as_qwix(jax.eval_shape(lambda: params))) == want
    module = lj.LoRA(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), 2)
    state = lj.as_qwix(module)
    assert isinstance(state, nnx.State)
    assert {path for path, x in flatten(state).items() if type(x) is nnx.LoRAParam} == {
        ("kernel_lora_a",),
        ("kernel_lora_b",),
    }


@pytest.mark.parametrize(
    ("params", "alpha", "match"),
    [
        ({"kernel": np.ones((4, 3), np.float32)}, None, "have no adapters"),
        (lj.lorafy(KERNEL, 2, dora=True), None, "'kernel' has DoRA's magnitudes"),
        (lj.lorafy(KERNEL, 2), {"w": 2}, "No weight matches 'w' of alpha"),
        (
            lj.lorafy(lj.quantize({"kernel": jnp.ones((64, 4))}, "int8"), 2),
            None,
            r"'kernel' is quantized .*as_qwix\(dequantize\(params\)\)",
        ),
        (lj.lorafy(KERNEL, 2, stack=3), None, "3 adapters in a stack"),
    ],
)
def test_as_qwix_refuses_what_qwix_does_not_read(params, alpha, match):
    with pytest.raises(ValueError, match=match):
        lj.as_qwix(params, alpha=alpha)
