"""Tests the leaves of adapters: names, shapes, values, dtypes, boxes and shardings."""

import contextlib
import math

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lj
from lora_jax._tree import flatten, path_name, unbox

AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]


def w(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def weight(*shape, dtype=np.float32, seed=0):
    return jax.device_put(
        np.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)
    )


def by_name(params):
    return {path_name(path): leaf for path, leaf in flatten(params).items()}


def shapes(params):
    return {name: unbox(leaf).shape for name, leaf in by_name(params).items()}


def zeros(key, shape, dtype):
    return jnp.zeros(shape, dtype)  # quick to compile, where values do not matter


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def in_boxes(box):
    kernel = box(weight(8, 2, 4), ("embed", "heads", "kv"))
    return {"query": {"kernel": kernel, "bias": box(weight(2, 4), ("heads", "kv"))}}


def in_state(kernel):
    return nnx.State({"m": {"kernel": nnx.Param(kernel), "bias": nnx.Param(weight(3))}})


# The leaves


@pytest.mark.parametrize(
    ("params", "new"),
    [
        ({"kernel": w(4, 3)}, {"lora_a": (4, 2), "lora_b": (2, 3), "lora_scale": ()}),
        (
            {"m": {"embedding": w(9, 3)}},
            {"m/lora_a": (9, 2), "m/lora_b": (2, 3), "m/lora_scale": ()},
        ),
        (
            {"moe": {"gate": w(4, 3), "up": w(4, 5), "bias": w(3)}},
            {
                "moe/gate_lora_a": (4, 2),
                "moe/gate_lora_b": (2, 3),
                "moe/gate_lora_scale": (),
                "moe/up_lora_a": (4, 2),
                "moe/up_lora_b": (2, 5),
                "moe/up_lora_scale": (),
            },
        ),
        (
            {"m": {"kernel": w(4, 3), "w": w(5, 3)}},
            {
                "m/lora_a": (4, 2),
                "m/lora_b": (2, 3),
                "m/lora_scale": (),
                "m/w_lora_a": (5, 2),
                "m/w_lora_b": (2, 3),
                "m/w_lora_scale": (),
            },
        ),
    ],
)
def test_lorafy_names_and_shapes(params, new):
    assert shapes(lj.lorafy(params, 2, targets="*")) == shapes(params) | new


def test_lorafy_default_adapts_every_kernel():
    params = {
        "embed": {"embedding": w(9, 4)},
        "dense": {"kernel": w(4, 3), "bias": w(3), "w": w(4, 3)},
        "norm": {"scale": w(4, 4), "kernel": w(4)},
        "steps": {"kernel": w(4, 4, dtype=jnp.int32)},
    }
    with pytest.warns(UserWarning, match="names are not kernel: 'dense/w'"):
        adapted = lj.lorafy(params, 2)
    added = by_name(adapted).keys() - by_name(params).keys()
    assert added == {"dense/lora_a", "dense/lora_b", "dense/lora_scale"}


@pytest.mark.parametrize(
    ("base", "dtype", "expected"),
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "float32"),
        ("float16", None, "float32"),
        ("float8_e4m3fn", None, "float32"),
        ("float32", jnp.bfloat16, "bfloat16"),
        ("bfloat16", "float16", "float16"),
    ],
)
@pytest.mark.parametrize("abstract", [False, True])
def test_lorafy_dtypes(base, dtype, expected, abstract):
    kernel = w(4, 3, dtype=base) if abstract else jnp.ones((4, 3), base)
    params = lj.lorafy({"kernel": kernel}, 2, dtype=dtype, init=zeros)
    assert {name: x.dtype.name for name, x in params.items()} == {
        "kernel": base,
        "lora_a": expected,
        "lora_b": expected,
        "lora_scale": "float32",
    }


def test_lorafy_makes_float64_factors_if_x64_is_enabled():
    numpy_params = {"kernel": np.ones((4, 3))}
    assert lj.lorafy(numpy_params, 2, init=zeros)["lora_a"].dtype == np.float32
    with jax.enable_x64(True):
        for params in (numpy_params, jax.tree.map(jnp.asarray, numpy_params)):
            adapted = lj.lorafy(params, 2, init=zeros)
            assert adapted["lora_a"].dtype == adapted["lora_b"].dtype == np.float64
            assert adapted["lora_scale"].dtype == np.float32
            assert lj.merge(adapted)["kernel"].dtype == np.float64


# The values


AXES = {  # weight's shape, its Axes, A's and B's shapes, the update by einsum
    "matrix": ((4, 3), ((), (0,), (1,)), (4, 2), (2, 3), "ir,ro->io"),
    "stack": ((5, 4, 3), ((0,), (1,), (2,)), (5, 4, 2), (5, 2, 3), "lir,lro->lio"),
    "grid of stacks": (
        (2, 3, 4, 3),
        ((0, 1), (2,), (3,)),
        (2, 3, 4, 2),
        (2, 3, 2, 3),
        "lkir,lkro->lkio",
    ),
    "heads": ((4, 2, 3), ((), (0,), (1, 2)), (4, 2), (2, 2, 3), "ir,rhd->ihd"),
    "stack of heads": (
        (5, 2, 3, 4),
        ((0,), (1, 2), (3,)),
        (5, 2, 3, 2),
        (5, 2, 4),
        "lhdr,lro->lhdo",
    ),
    "out first": ((3, 4), ((), (1,), (0,)), (1, 4, 2), (3, 1, 2), "xir,oyr->oi"),
    "stack, out first": (
        (5, 3, 4),
        ((0,), (2,), (1,)),
        (5, 1, 4, 2),
        (5, 3, 1, 2),
        "lxir,loyr->loi",
    ),
    "fused": (
        (3, 2, 5, 4),
        ((), (2,), (0, 1, 3)),
        (1, 1, 5, 1, 2),
        (3, 2, 1, 4, 2),
        "xyizr,qhwdr->qhid",
    ),
    "stack last": (
        (4, 3, 5),
        ((2,), (0,), (1,)),
        (4, 1, 5, 2),
        (1, 3, 5, 2),
        "ixlr,yolr->iol",
    ),
    "size 1": (
        (2, 1, 4, 5),
        ((0,), (2,), (1, 3)),
        (2, 1, 4, 1, 2),
        (2, 1, 1, 5, 2),
        "qkizr,qkwdr->qkid",
    ),
}


@pytest.mark.parametrize("name", AXES)
def test_lorafy_axes_give_each_layout_and_its_update(name, randomized):
    shape, axes, a_shape, b_shape, equation = AXES[name]
    params = {"w": weight(*shape)}
    axes = lj.Axes(*axes)
    options = {"targets": "w", "axes": {"w": axes}, "init": zeros}
    adapted = lj.lorafy(params, 2, alpha=3, **options)
    n_batch = tuple(shape[d] for d in axes.batch)
    assert shapes(adapted) == {
        "w": shape,
        "w_lora_a": a_shape,
        "w_lora_b": b_shape,
        "w_lora_scale": n_batch,
    }
    np.testing.assert_array_equal(adapted["w_lora_scale"], np.full(n_batch, 1.5))
    np.testing.assert_array_equal(lj.merge(adapted)["w"], params["w"])
    adapted = randomized(adapted)
    scale = np.arange(1.0, 1.0 + np.prod(n_batch)).reshape(n_batch)
    adapted["w_lora_scale"] = jnp.asarray(scale, jnp.float32)
    sizes = [n if d in axes.batch else 1 for d, n in enumerate(shape)]
    a, b = (np.asarray(adapted[f"w_lora_{x}"], np.float64) for x in "ab")
    update = scale.reshape(sizes) * np.einsum(equation, a, b)
    assert np.abs(update).min() > 0
    got = np.asarray(lj.merge(adapted)["w"], np.float64)
    np.testing.assert_allclose(got, params["w"] + update, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "axes", "n_in"),
    [
        ((128, 96), ((), (0,), (1,)), 128),
        ((96, 128), ((), (1,), (0,)), 128),
        ((8, 16, 96), ((), (0, 1), (2,)), 128),
        ((3, 128, 96), ((0,), (1,), (2,)), 128),
        ((96, 3, 128), ((1,), (2,), (0,)), 128),
    ],
)
def test_lorafy_draws_a_with_variance_1_over_inputs_and_zeros_b(shape, axes, n_in):
    params = {"w": np.zeros(shape, np.float32)}
    adapted = lj.lorafy(params, 64, targets="w", axes={"w": lj.Axes(*axes)})
    a = np.asarray(adapted["w_lora_a"], np.float64).reshape(-1) * np.sqrt(n_in)
    noise = 1 / np.sqrt(a.size)
    assert abs(a.mean()) < 5 * noise
    assert abs(a.var() - 1) < 5 * np.sqrt(2) * noise
    assert abs((a**4).mean() - 3) < 5 * np.sqrt(96) * noise  # no uniform, no truncation
    assert len(np.unique(a)) > 0.99 * a.size, "each adapter of a stack has its own"
    assert not adapted["w_lora_b"].any()


def test_lorafy_draws_from_the_key_and_the_weights_path():
    params = {name: {"kernel": weight(6, 5)} for name in ("query", "value", "out")}
    one = lj.lorafy(params, 2, targets="query")
    both = lj.lorafy(params, 2, targets=["value", "query"])
    nested = lj.lorafy({"model": params}, 2)["model"]
    a, b, c = (tree["query"]["lora_a"] for tree in (one, both, nested))
    assert bits(a) == bits(b), "a further target leaves the others alone"
    assert bits(b) != bits(c), "another path, other values"
    assert bits(both["query"]["lora_a"]) != bits(both["value"]["lora_a"])
    assert bits(lj.lorafy(params, 2, key=jax.random.key(0), targets="query")) == bits(
        one
    )
    assert bits(lj.lorafy(params, 2, key=jax.random.key(1), targets="query")) != bits(
        one
    )
    old_key = lj.lorafy(params, 2, key=jax.random.PRNGKey(0), targets="query")
    assert bits(old_key) == bits(one)


def test_lorafy_init_gets_a_matrix_of_inputs_and_rank():
    calls = []

    def init(key, shape, dtype):
        calls.append((shape, dtype))
        return jnp.arange(np.prod(shape), dtype=dtype).reshape(shape)

    params = {
        "out": {"kernel": weight(2, 3, 4)},
        "out_first": {"w": weight(5, 4)},
        "stack_last": {"w": weight(4, 5, 3)},
    }
    axes = {
        "out_first/w": lj.Axes((), (1,), (0,)),
        "stack_last/w": lj.Axes((2,), (0,), (1,)),
    }
    options = {"targets": "*", "axes": axes, "init": init, "dtype": "float16"}
    adapted = lj.lorafy(params, 2, **options)
    assert calls == [((6, 2), "float16"), ((4, 2), "float16"), ((4, 2), "float16")]
    drawn = lambda *shape: np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(adapted["out"]["lora_a"], drawn(2, 3, 2))
    np.testing.assert_array_equal(adapted["out_first"]["w_lora_a"][0], drawn(4, 2))
    for layer in range(3):
        a = adapted["stack_last"]["w_lora_a"][:, 0, layer]
        np.testing.assert_array_equal(a, drawn(4, 2))


@pytest.mark.parametrize("wrap", [dict, flax.core.freeze, "variables", in_state])
def test_lorafy_keeps_what_the_model_computes(wrap):
    kernel, bias, x = weight(4, 3), weight(3), weight(5, 4, seed=1)
    params, apply = {"kernel": kernel, "bias": bias}, nn.Dense(3).apply
    if wrap == "variables":
        tree, fn = {"params": params, "stats": {"mean": weight(3)}}, apply
        fn = lambda v, x: apply({"params": v["params"]}, x) + v["stats"]["mean"][None]
    elif wrap is in_state:
        graph, tree = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
        fn = lambda state, x: nnx.merge(graph, state)(x)
    else:
        tree, fn = wrap(params), lambda params, x: apply({"params": params}, x)
    adapted = lj.lorafy(tree, 2)
    np.testing.assert_array_equal(lj.lora(fn)(adapted, x), fn(tree, x))


# The containers


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Embed(7, 4)(x))
        return nn.Dense(3, param_dtype=jnp.bfloat16, dtype=jnp.float32)(x)


def linear_state():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    return nnx.state(model, nnx.Param)


CONTAINERS = {
    "dict": lambda: {
        "a": {"m": {"kernel": weight(4, 3)}},
        "b": {"kernel": weight(4, 3)},
    },
    "frozen": lambda: flax.core.freeze({"m": {"kernel": weight(4, 3)}, "n": weight(2)}),
    "variables": lambda: jax.eval_shape(
        Block().init, jax.random.key(0), jnp.ones(5, jnp.int32)
    ),
    "state": linear_state,
    "state of modules": lambda: nnx.State({"m": {0: in_state(weight(4, 3))["m"]}}),
    "list": lambda: [{"kernel": weight(4, 3)}, {"kernel": weight(4, 3)}],
    "tuple": lambda: {
        "layers": ({"kernel": weight(4, 3)}, {"bias": weight(3)}),
        "n": None,
    },
    "partitioned": lambda: in_boxes(nn.Partitioned),
    "logical": lambda: in_boxes(nn.LogicallyPartitioned),
    "abstract": lambda: {"m": {"kernel": w(4, 3)}},
    "numpy": lambda: {"m": {"kernel": np.ones((4, 3), np.float32), "n": np.float32(1)}},
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_lorafy_keeps_containers_and_shares_old_leaves(kind):
    params = CONTAINERS[kind]()
    structure, leaves = jax.tree.structure(params), by_name(params)
    adapted = lj.lorafy(params, 2)
    assert type(adapted) is type(params)
    new = by_name(adapted)
    assert all(new.pop(name) is leaf for name, leaf in leaves.items())
    assert new and {name.rpartition("/")[2] for name in new} == {
        "lora_a",
        "lora_b",
        "lora_scale",
    }
    assert jax.tree.structure(params) == structure, "nothing is mutated"
    assert by_name(params).keys() == leaves.keys()
    assert jax.tree.structure(lj.strip(adapted)) == structure


@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
@pytest.mark.parametrize("scope", ["alone", "mesh in the box", *AXIS_TYPES])
def test_lorafy_boxes_name_each_dimension(box, scope):
    params = in_boxes(box)
    if scope == "mesh in the box":
        mesh = jax.make_mesh((8,), ("embed",), axis_types=(AxisType.Explicit,))
        params = jax.tree.map(
            lambda x: x.replace(mesh=mesh), params, is_leaf=lambda x: isinstance(x, box)
        )
    if isinstance(scope, AxisType):
        mesh = jax.make_mesh((8,), ("embed",), axis_types=(scope,))
        with jax.set_mesh(mesh), nn.logical_axis_rules([("embed", "embed")]):
            query = lj.lorafy(params, 2, init=zeros)["query"]
    else:
        query = lj.lorafy(params, 2, init=zeros)["query"]
    assert {name: type(leaf) for name, leaf in query.items()} == dict.fromkeys(
        ("kernel", "bias", "lora_a", "lora_b", "lora_scale"), box
    )
    assert query["lora_a"].names == ("embed", None)
    assert query["lora_b"].names == (None, "heads", "kv")
    assert query["lora_scale"].names == ()
    assert query["lora_a"].mesh is params["query"]["kernel"].mesh


def test_lorafy_boxes_name_each_dimension_of_aligned_factors():
    names = ("qkv", "heads", "embed", "kv")
    params = {"w": nn.Partitioned(w(3, 2, 5, 4), names)}
    axes = {"w": lj.Axes((0,), (2,), (1, 3))}
    adapted = lj.lorafy(params, 2, targets="w", axes=axes)
    assert adapted["w_lora_a"].names == ("qkv", None, "embed", None, None)
    assert adapted["w_lora_b"].names == ("qkv", "heads", None, "kv", None)
    assert adapted["w_lora_scale"].names == ("qkv",)


def test_lorafy_adds_lora_params_to_a_state():
    adapted = lj.lorafy(linear_state(), 2)
    kinds = {name: type(leaf) for name, leaf in by_name(adapted).items()}
    scale = kinds.pop("lora_scale")
    new = dict.fromkeys(("lora_a", "lora_b"), nnx.LoRAParam)
    assert kinds == {"kernel": nnx.Param, "bias": nnx.Param} | new
    assert issubclass(scale, nnx.Variable)
    assert not issubclass(scale, nnx.Param), "what no filter of nnx trains"


def test_lorafy_scale_is_selected_by_no_filter_of_nnx(optax_promotion):
    state = lj.lorafy(linear_state(), 2, also="bias", alpha=3)
    x, plain = jnp.ones((3, 4)), by_name(linear_state())

    def loss(state):
        fn = lambda p: jnp.sum((x @ p["kernel"][...] + p["bias"][...][None]) ** 2)
        return lj.lora(fn)(state)

    class Model(nnx.Module):
        def __init__(self, state):
            self.params = nnx.data(dict(state.raw_mapping))

    model = Model(state)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.LoRAParam)
    grads = nnx.grad(
        lambda model: loss(nnx.State(dict(model.params))),
        argnums=nnx.DiffState(0, nnx.LoRAParam),
    )(model)
    found = {path[-1] for path, _ in nnx.to_flat_state(grads)}
    assert found == {"lora_a", "lora_b", "bias_lora_w"}
    optimizer.update(model, grads)
    after = {name: x[...] for name, x in model.params.items()}
    assert after["lora_scale"] == 1.5
    assert jnp.abs(after["lora_b"]).max() > 0
    assert jnp.abs(after["bias_lora_w"] - plain["bias"][...]).max() > 0
    np.testing.assert_array_equal(after["bias"], plain["bias"][...])


# Leaves that are trained in full


ALSO = {
    "head": {"head/lora_w", "head/bias_lora_w"},
    "head/kernel": {"head/lora_w"},
    ("bias", "norm"): {"m/bias_lora_w", "head/bias_lora_w", "norm/scale_lora_w"},
}


def with_head(dtype=jnp.float32):
    ones = lambda *shape: jnp.arange(1.0, 1 + math.prod(shape)).reshape(shape)
    layer = lambda n, m: {"kernel": ones(n, m), "bias": ones(m)}
    base = {"m": layer(4, 3), "head": layer(3, 2), "norm": {"scale": ones(3)}}
    return jax.tree.map(lambda x: x.astype(dtype), base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("also", ALSO)
def test_lorafy_also_adds_a_copy_of_each_leaf(also, dtype):
    base = with_head(dtype)
    adapted = lj.lorafy(base, 2, targets="m", also=also)
    old, new = by_name(base), by_name(adapted)
    assert {name for name in new if name.endswith("lora_w")} == ALSO[also]
    assert all(new[name] is leaf for name, leaf in old.items())
    for name in ALSO[also]:
        leaf = old[name.replace("/lora_w", "/kernel").replace("_lora_w", "")]
        assert new[name].dtype == jnp.float32
        np.testing.assert_array_equal(new[name], leaf)


def test_trained_copy_can_be_donated_with_its_leaf():
    params = lj.lorafy(with_head(), 2, targets="m", also="head")
    step = jax.jit(
        lambda params: jax.tree.map(lambda x: x + 1, params), donate_argnums=0
    )
    after = step(params)
    np.testing.assert_array_equal(after["head"]["lora_w"], after["head"]["kernel"])


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_trained_copy_has_the_box_and_sharding_of_its_leaf(axis_type):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("y", "x"))
    head = jax.device_put(jnp.ones((8, 4), jnp.bfloat16), sharding)
    for leaf in (head, nn.Partitioned(head, ("a", "b"), mesh=mesh)):
        params = {"m": {"kernel": jnp.ones((4, 3))}, "head": leaf}
        copy = lj.lorafy(params, 2, also="head")["head_lora_w"]
        assert type(copy) is type(leaf)
        assert unbox(copy).sharding == sharding and unbox(copy).dtype == jnp.float32
    shapes = jax.eval_shape(lambda: {"m": {"kernel": jnp.ones((4, 3))}, "b": head})
    assert lj.lorafy(shapes, 2, also="b")["b_lora_w"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("also", "match"),
    [
        ("haed", r"No weight matches 'haed' of also. Close: 'head/.*also=\['head'\]"),
        (["head", "lora_scale"], "No weight matches 'lora_scale' of also"),
        (
            "steps",
            r"'steps' of also: 'steps' is int32 of shape \(\). A leaf that",
        ),
        ("q_proj", "Their names end in .*'q_proj' is a name of PyTorch: write those"),
        ("", "also takes patterns of paths, found ''"),
        ([3], "also takes patterns of paths, found 3"),
        (
            "norm",
            "also names 'norm/count', which is int32: a leaf that is tra",
        ),
        ("m", r"'m/kernel' is named by also, and would get .*exclude=\['m/kernel'\]"),
    ],
)
def test_lorafy_also_is_strict(also, match):
    params = with_head() | {"steps": jnp.int32(3)}
    params["norm"]["count"] = jnp.zeros(3, int)
    with pytest.raises(ValueError, match=match):
        lj.lorafy(params, 2, targets="m", also=also)


def test_lorafy_also_refuses_an_adapted_leaf():
    once = lj.lorafy(with_head(), 2, targets="m", also="head")
    with pytest.raises(ValueError, match="'m/kernel' already has an adapter"):
        lj.lorafy(once | {"new": jnp.ones((2, 2))}, 2, targets="new", also="m/kernel")
    with pytest.raises(ValueError, match="'head/kernel' already has an adapter"):
        lj.lorafy(once, 2, targets="head")


# Alpha


def test_lorafy_alpha_may_be_traced():
    base = {"m": {"kernel": jnp.ones((4, 3))}}
    for alpha in (3, np.float16(3), jnp.float32(3), jnp.bfloat16(3), np.int8(3)):
        assert lj.lorafy(base, 2, alpha=alpha)["m"]["lora_scale"] == 1.5
    scale = lambda alpha: lj.lorafy(base, 2, alpha=alpha)["m"]["lora_scale"]
    alphas = jnp.array([1.0, 4.0, 16.0])
    np.testing.assert_array_equal(jax.vmap(scale)(alphas), alphas / 2)
    by_pattern = jax.jit(lambda alpha: lj.lorafy(base, 2, alpha={"m": alpha}))
    assert by_pattern(jnp.int32(8))["m"]["lora_scale"] == 4
    for bad in (
        10**400,
        jnp.ones(2),
        jnp.array(True),
        jnp.float32(-1),
        jnp.float32(jnp.nan),
    ):
        with pytest.raises(ValueError, match="alpha must be a finite number above 0"):
            lj.lorafy(base, 2, alpha=bad)
    with pytest.raises(ValueError, match="alpha must be a finite number above 0"):
        jax.vmap(lambda alpha: lj.lorafy(base, 2, alpha=alpha[None]))(alphas)


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("abstract", [False, True])
def test_lorafy_keeps_the_sharding_of_each_dimension_in_a_state(axis_type, abstract):
    def build():
        init = nnx.with_partitioning(nnx.initializers.ones_init(), ("x", "y"))
        return nnx.Linear(4, 8, kernel_init=init, rngs=nnx.Rngs(0))

    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        state = nnx.state(nnx.eval_shape(build) if abstract else build(), nnx.Param)
        adapted = lj.lorafy(state, 2, init=zeros)
        plain = lj.strip(adapted)
    assert jax.tree.structure(plain) == jax.tree.structure(state)
    names = [
        metadata.get("out_sharding", metadata.get("sharding_names"))
        for metadata in (
            by_name(adapted)[name].get_metadata()
            for name in ("lora_a", "lora_b", "lora_scale")
        )
    ]
    assert names == [("x", None), (None, "y"), ()]
    if not abstract:
        arrays = map(unbox, by_name(adapted).values())
        specs = {x.shape: x.sharding.spec for x in arrays}
        found = [specs[4, 2], specs[2, 8]]
        assert found == [PartitionSpec("x", None), PartitionSpec(None, "y")]


# Shardings and devices


P = PartitionSpec
SHARDED = {  # weight, its Axes, its spec, and the specs of A, B and the scale
    "matrix": ((4, 8), ((), (0,), (1,)), P("x", "y"), P("x", None), P(None, "y"), P()),
    "inputs on two axes": (
        (8, 3),
        ((), (0,), (1,)),
        P(("x", "y")),
        P(("x", "y"), None),
        P(None, None),
        P(),
    ),
    "stack": (
        (2, 8, 4),
        ((0,), (1,), (2,)),
        P("x", None, "y"),
        P("x", None, None),
        P("x", None, "y"),
        P("x"),
    ),
    "heads": (
        (3, 4, 2),
        ((), (0,), (1, 2)),
        P(None, "y", "x"),
        P(None, None),
        P(None, "y", "x"),
        P(),
    ),
    "fused": (
        (8, 4, 3, 2),
        ((0,), (2,), (1, 3)),
        P("y", None, None, "x"),
        P("y", None, None, None, None),
        P("y", None, None, "x", None),
        P("y"),
    ),
    "replicated": ((4, 8), ((), (0,), (1,)), P(), P(None, None), P(None, None), P()),
}


def placed(name, axis_type, abstract=False):
    shape, axes, spec, *expected = SHARDED[name]
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, spec)
    if abstract:
        kernel = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    else:
        kernel = jax.device_put(weight(*shape), sharding)
    parts = ("lora_a", "lora_b", "lora_scale")
    expected = {
        part: NamedSharding(mesh, spec)
        for part, spec in zip(parts, expected, strict=True)
    }
    options = {"rank": 2, "axes": {"kernel": lj.Axes(*axes)}, "init": zeros}
    return {"kernel": kernel}, options, expected


def assert_placed(adapted, expected):
    for part, sharding in expected.items():
        x = adapted[part]
        assert x.sharding.is_equivalent_to(sharding, len(x.shape)), part
        assert x.sharding.mesh.axis_names == ("x", "y")


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("name", SHARDED)
def test_lorafy_shards_each_dimension_like_the_weight(name, axis_type):
    abstract, options, expected = placed(name, axis_type, abstract=True)
    assert_placed(lj.lorafy(abstract, **options), expected)
    params, options, expected = placed(name, axis_type)
    adapted = lj.lorafy(params, **options)
    assert_placed(adapted, expected)
    assert adapted["kernel"] is params["kernel"]


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("name", ["matrix", "fused"])
def test_merge_keeps_the_sharding_of_a_weight(name, axis_type):
    params, options, _ = placed(name, axis_type)
    kernel = lj.merge(lj.lorafy(params, **options))["kernel"]
    assert kernel.sharding.is_equivalent_to(params["kernel"].sharding, kernel.ndim)


RULES = [("in", "x"), ("out", "y"), ("odd", "y")]


def boxed(kind, kernel, bias, mesh=None):
    """Returns a tree whose boxes name the mesh axes x and y for inputs and outputs."""
    if kind == "nnx":
        named = nnx.with_partitioning(lambda: kernel, ("x", "y"), mesh=mesh)
        return nnx.State({"m": {"kernel": nnx.Param(named()), "bias": nnx.Param(bias)}})
    names = ("in", "out") if kind is nn.LogicallyPartitioned else ("x", "y")
    box = lambda x, names: kind(x, names, mesh=mesh)
    return {"m": {"kernel": box(kernel, names), "bias": box(bias, names[1:])}}


@pytest.mark.parametrize("where", ["context", "box"])
@pytest.mark.parametrize("kind", [nn.Partitioned, nn.LogicallyPartitioned, "nnx"])
def test_lorafy_under_jit_uses_the_names_of_boxes_on_automatic_axes(kind, where):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    own = mesh if where == "box" else None
    options = {"init": zeros, "dora": True, "also": "bias"}

    @jax.jit
    def adapt(kernel, bias):
        return lj.lorafy(boxed(kind, kernel, bias, own), 2, **options)

    context = jax.set_mesh(mesh) if where == "context" else contextlib.nullcontext()
    with context, nn.logical_axis_rules(RULES):
        adapted = by_name(adapt(jnp.ones((4, 8)), jnp.ones(8)))
    expected = {
        "m/lora_a": P("x", None),
        "m/lora_b": P(None, "y"),
        "m/lora_magnitude": P("y"),
    }
    if kind != "nnx":  # whose bias has no names here
        expected["m/bias_lora_w"] = P("y")
    for name, spec in expected.items():
        x = unbox(adapted[name])
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), name
    assert unbox(adapted["m/lora_scale"]).sharding.is_fully_replicated


def test_lorafy_of_a_model_made_under_jit_is_sharded_as_outside():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    init = nnx.with_partitioning(nnx.initializers.ones_init(), ("x", "y"))
    make = lambda: nnx.Linear(4, 8, kernel_init=init, rngs=nnx.Rngs(0))
    with jax.set_mesh(mesh):
        models = lj.LoRA(nnx.jit(make)(), 2), nnx.jit(lambda: lj.LoRA(make(), 2))()
    outside, inside = (by_name(nnx.state(model.model)) for model in models)
    assert inside.keys() == outside.keys()
    for name, x in inside.items():
        x, like = unbox(x), unbox(outside[name])
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim), name


def test_lorafy_ignores_names_of_other_axes_in_boxes():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    kernel = jnp.ones((4, 6))  # 6 is no multiple of 4
    adapt = jax.jit(
        lambda w: lj.lorafy({"kernel": nn.Partitioned(w, ("embed", "y"))}, 2)
    )
    with jax.set_mesh(mesh):
        adapted = adapt(kernel)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(adapted))
    assert adapted["lora_a"].names == ("embed", None)
    # Without a mesh the names are not checked: one may even occur twice.
    twice = lambda w: lj.lorafy({"kernel": nn.LogicallyPartitioned(w, ("a", "a"))}, 2)
    assert jax.jit(twice)(kernel)["lora_b"].names == (None, "a")


def test_lorafy_accepts_one_sharding_in_a_variables_metadata():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    box = nnx.Param(jnp.ones((4, 8)), out_sharding=sharding, eager_sharding=False)

    def adapt(kernel):
        state = nnx.State({"kernel": box.replace(kernel)})
        return lj.lorafy(state, 2, init=zeros)

    adapted = jax.jit(adapt)(jnp.ones((4, 8)))
    metadata = adapted["lora_b"].get_metadata()["out_sharding"]
    assert metadata == NamedSharding(mesh, PartitionSpec(None, "y"))
    assert adapted["lora_b"].get_raw_value().sharding.is_equivalent_to(metadata, 2)


@pytest.mark.parametrize("context", [True, False])
def test_lorafy_under_jit_keeps_explicit_shardings(context):
    params, options, expected = placed("matrix", AxisType.Explicit)
    adapt = jax.jit(lambda params: lj.lorafy(params, **options))
    if context:
        with jax.set_mesh(params["kernel"].sharding.mesh):
            adapted = adapt(params)
    else:
        adapted = adapt(params)
    assert_placed(adapted, expected)


def test_lorafy_under_jit_and_eval_shape(close):
    params = {"m": {"kernel": weight(4, 3)}, "n": {"kernel": weight(4, 3)}}
    adapt = lambda params: lj.lorafy(params, 2, key=jax.random.key(3))
    close(jax.jit(adapt)(params), adapt(params))
    assert shapes(jax.eval_shape(adapt, params)) == shapes(adapt(params))


def test_lorafy_under_vmap():
    stacked = {"kernel": weight(3, 4, 5)}
    keys = jax.random.split(jax.random.key(0), 3)
    adapted = jax.vmap(lambda p, key: lj.lorafy(p, 2, key=key))(stacked, keys)
    assert adapted["lora_a"].shape == (3, 4, 2)
    one = lj.lorafy({"kernel": stacked["kernel"][1]}, 2, key=keys[1])
    np.testing.assert_allclose(adapted["lora_a"][1], one["lora_a"], rtol=1e-6)


@pytest.mark.parametrize("committed", [True, False])
def test_lorafy_puts_adapters_on_the_device_of_their_weight(committed):
    kernel = weight(4, 3)
    if committed:
        kernel = jax.device_put(kernel, jax.devices()[3])
    adapted = lj.lorafy({"kernel": kernel}, 2)
    assert {x.device for x in adapted.values()} == {kernel.device}
    assert {x.committed for x in adapted.values()} == {committed}


def test_lorafy_puts_adapters_of_a_weight_in_host_memory_on_the_device():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    host = sharding.with_memory_kind("pinned_host")
    params = lj.lorafy({"kernel": jax.device_put(jnp.ones((4, 3)), host)}, 2)
    kinds = {name: x.sharding.memory_kind for name, x in params.items()}
    assert kinds.pop("kernel") == "pinned_host"
    assert {*kinds.values()} == {sharding.memory_kind}
    assert {*params["lora_a"].devices()} == {jax.devices()[1]}


def test_lorafy_leaves_numpy_weights_unchanged():
    kernel = np.ones((4, 3), np.float32)
    adapted = lj.lorafy({"kernel": kernel}, 2)
    assert adapted["kernel"] is kernel
    assert all(isinstance(adapted[f"lora_{x}"], jax.Array) for x in ("a", "b", "scale"))
    y = lj.lora(lambda p, x: x @ p["kernel"])(adapted, jnp.ones((2, 4)))
    np.testing.assert_array_equal(y, np.full((2, 3), 4.0))


# The paper's numbers


def transformer(layers, d, kv=None):
    """Returns the abstract kernels of a decoder's attention."""
    kv = kv or d
    attention = {"query": {"kernel": w(d, d)}, "value": {"kernel": w(d, kv)}}
    rest = {"key": {"kernel": w(d, kv)}, "out": {"kernel": w(d, d)}}
    return {f"layer_{i}": attention | rest for i in range(layers)}


@pytest.mark.parametrize(
    ("layers", "d", "kv", "rank", "trainable"),
    [
        pytest.param(12, 768, None, 8, 294_912, id="RoBERTa-base"),
        pytest.param(24, 1024, None, 8, 786_432, id="RoBERTa-large"),
        pytest.param(24, 1024, None, 4, 393_216, id="GPT-2 medium"),
        pytest.param(96, 12288, None, 1, 4_718_592, id="GPT-3 r 1"),
        pytest.param(96, 12288, None, 8, 37_748_736, id="GPT-3 r 8"),
        pytest.param(28, 3072, 1024, 32, 9_175_040, id="Llama-3.2-3B"),
    ],
)
def test_count_matches_the_paper(layers, d, kv, rank, trainable):
    params = transformer(layers, d, kv)
    adapted = lj.lorafy(params, rank, targets=["query", "value"])
    plain = sum(x.size for x in jax.tree.leaves(params))
    assert lj.count(adapted) == (trainable, plain + trainable, 4 * plain)


def test_count_prints_roberta_base():
    d, mlp = 768, 3072
    dense = lambda n, k: {"kernel": w(n, k), "bias": w(k)}
    norm = {"scale": w(d), "bias": w(d)}
    layer = {
        **{name: dense(d, d) for name in ("query", "key", "value", "attention_out")},
        "up": dense(d, mlp),
        "down": dense(mlp, d),
        "norm_1": norm,
        "norm_2": norm,
    }
    params = {
        "words": {"embedding": w(50265, d)},
        "positions": {"embedding": w(514, d)},
        "types": {"embedding": w(1, d)},
        "norm": norm,
        "layers": {str(i): layer for i in range(12)},
        "pooler": dense(d, d),
    }
    adapted = lj.lorafy(params, 8, targets=["query", "value"])
    printed = "trainable 294,912 of 124,940,544 (0.24 %), base 499 MB"
    assert str(lj.count(adapted)) == printed
