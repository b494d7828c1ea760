"""Tests that any container is flattened, and rebuilt around the same leaves."""

import collections
import dataclasses
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import lora_jax as lj
from lora_jax._tree import (
    components,
    fixed_leaves,
    flatten,
    leaf_name,
    leaf_order,
    path_name,
    rebox,
    sibling,
    unbox,
    unflatten,
)


class Pair(NamedTuple):
    first: Any
    second: Any


@flax.struct.dataclass
class Record:
    weights: Any
    step: Any


def x(n=2):
    return jnp.full(n, n, jnp.float32)


def default_dict():
    tree = collections.defaultdict(dict)
    tree["m"]["w"] = x()
    return tree


TREES = {
    "dict": (lambda: {"b": {"w": x(3)}, "a": {"w": x()}}, "b/w a/w"),
    "frozen": (lambda: flax.core.freeze({"b": {"w": x(3)}, "a": x()}), "b/w a"),
    "ordered": (lambda: collections.OrderedDict(b={"w": x(3)}, a=x()), "b/w a"),
    "default": (default_dict, "m/w"),
    "list": (lambda: [{"w": x()}, {"w": x(3)}], "0/w 1/w"),
    "tuple": (lambda: {"layers": ({"w": x()}, {"w": x(3)})}, "layers/0/w layers/1/w"),
    "named": (lambda: Pair({"w": x()}, {"w": x(3)}), "first/w second/w"),
    "record": (lambda: Record({"w": x()}, x(3)), "weights/w step"),
    "none": (lambda: {"b": None, "a": [None, {"w": x()}]}, "b a/0 a/1/w"),
    "empty": (lambda: {"b": {}, "a": [(), {"w": x()}], "c": {"d": {}}}, "a/1/w"),
    "numpy": (lambda: {"a": np.ones(2), "b": np.float32(1)}, "a b"),
    "abstract": (lambda: {"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, "a"),
    "other leaves": (lambda: {"a": 1.5, "k": jax.random.key(0)}, "a k"),
    "integer keys": (lambda: {"b": {0: {"w": x()}, 10: x()}}, "b/0/w b/10"),
    "state": (
        lambda: nnx.State({"m": {"w": nnx.Param(x()), "v": nnx.BatchStat(x(3))}}),
        "m/w m/v",
    ),
    "partitioned": (lambda: {"w": nn.Partitioned(x(), ("a",)), "b": x(3)}, "w b"),
    "logical": (lambda: [{"w": nn.LogicallyPartitioned(x(), ("a",))}], "0/w"),
    "nested boxes": (
        lambda: {"w": nn.Partitioned(nn.LogicallyPartitioned(x(), ("a",)), ("b",))},
        "w",
    ),
}  # fmt: skip

each_tree = pytest.mark.parametrize("kind", TREES)


@each_tree
def test_flatten_paths(kind):
    build, names = TREES[kind]
    assert sorted(map(path_name, flatten(build()))) == sorted(names.split())


@each_tree
def test_unflatten_inverts_flatten_and_shares_the_leaves(kind):
    tree = TREES[kind][0]()
    leaves = flatten(tree)
    again = unflatten(tree, leaves)
    assert type(again) is type(tree)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert flatten(again).keys() == leaves.keys()
    assert all(flatten(again)[path] is leaf for path, leaf in leaves.items())


@each_tree
def test_leaf_order_is_that_of_jax(kind):
    tree = TREES[kind][0]()
    paths = leaf_order(tree)
    leaves = jax.tree.leaves(tree)
    by_path = flatten(tree)
    assert len(paths) == len(leaves)
    assert all(
        unbox(by_path[path]) is leaf for path, leaf in zip(paths, leaves, strict=True)
    )


@pytest.mark.parametrize("kind", ["dict", "frozen", "ordered", "default", "state"])
def test_unflatten_adds_and_removes_leaves_of_a_mapping(kind):
    tree = TREES[kind][0]()
    before = jax.tree.structure(tree)
    path, leaf = next(iter(flatten(tree).items()))
    new = unflatten(tree, {(*path[:-1], "new"): leaf})
    assert set(flatten(new)) == {(*path[:-1], "new")}
    assert jax.tree.leaves(new)[0] is unbox(leaf)
    assert jax.tree.structure(tree) == before


@pytest.mark.parametrize(
    ("tree", "change", "match"),
    [
        ({"m": [x(), x()]}, {("m", "2"): x()}, "m is a list"),
        ({"m": [x(), x()]}, None, "m is a list"),
        (Pair(x(), x()), {("third",): x()}, "The tree is a Pair"),
        (Record(x(), x()), None, "The tree is a Record"),
    ],
)
def test_unflatten_refuses_new_and_missing_leaves_of_other_containers(
    tree, change, match
):
    leaves = flatten(tree)
    new = leaves | change if change else dict(list(leaves.items())[:-1])
    match = f"{match}, which cannot gain or lose a leaf.*in a mapping of its own"
    with pytest.raises(ValueError, match=match):
        unflatten(tree, new)


@pytest.mark.parametrize("tree", [jnp.ones(3), None, 1.5, nnx.Param(jnp.ones(3))])
def test_flatten_refuses_a_leaf(tree):
    with pytest.raises(TypeError, match=rf"found {type(tree).__name__}\. Pass a mapp"):
        flatten(tree)


def test_flatten_of_a_live_module_is_that_of_its_state():
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    leaves = flatten(module)
    assert leaves == flatten(nnx.state(module))
    new = unflatten(module, leaves | {("bias",): nnx.Param(x(3))})
    assert type(new) is nnx.Linear and new is not module
    assert new.kernel[...] is module.kernel[...]
    np.testing.assert_array_equal(new.bias[...], x(3))
    holes = unflatten(module, leaves | {("bias",): None})
    assert type(holes) is nnx.State and holes["bias"] is None


def test_flatten_refuses_two_leaves_with_one_path():
    with pytest.raises(ValueError, match="'a/b/w'"):
        flatten({"a/b": {"w": x()}, "a": {"b": {"w": x()}}})


@pytest.mark.parametrize("kind", ["partitioned", "logical", "nested boxes", "state"])
def test_rebox_inverts_unbox(kind):
    leaf = next(iter(flatten(TREES[kind][0]()).values()))
    closed = rebox(leaf, value := x(5))
    assert unbox(closed) is value
    assert jax.tree.structure(closed) == jax.tree.structure(leaf)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
def test_rebox_and_unbox_move_no_array(box, axis_type):
    # Flax's own `unbox` constrains the sharding under a mesh: it moves an array, and
    # raises for an abstract one and for one that the mesh does not divide.
    mesh = jax.make_mesh((8,), ("a",), axis_types=(axis_type,))
    for value in (jnp.ones((3, 5)), jax.ShapeDtypeStruct((8, 8), jnp.float32)):
        boxes = [box(value, ("a", None), mesh=mesh), box(value, ("a", None))]
        with jax.set_mesh(mesh), nn.logical_axis_rules([("a", "a")]):
            for leaf in boxes:
                assert unbox(leaf) is value
                assert unbox(rebox(leaf, value)) is value


# Keys that are paths


@pytest.mark.parametrize(
    ("path", "parts", "bias"),
    [
        (("m", "kernel"), ("m", "kernel"), ("m", "bias")),
        (("m", 0, "kernel"), ("m", "0", "kernel"), ("m", 0, "bias")),
        (("m/q/kernel",), ("m", "q", "kernel"), ("m/q/bias",)),
        (("m", "q.kernel"), ("m", "q", "kernel"), ("m", "q.bias")),
        ((".m[0].kernel",), ("m", "0", "kernel"), (".m[0].bias",)),
        (("['m']['kernel']",), ("m", "kernel"), ("['m']['bias']",)),
        (("kernel",), ("kernel",), ("bias",)),
        ((3,), ("3",), ("bias",)),
        (("/",), ("/",), ("bias",)),
    ],
)
def test_components_of_a_key_that_is_a_path(path, parts, bias):
    assert components(path) == parts
    assert leaf_name(path) == parts[-1]
    assert sibling(path, "bias") == bias


@pytest.mark.parametrize(
    ("path", "other"),
    [
        (("m", "q", "kernel"), ("m", "out", "w")),
        (("m/q/kernel",), ("m/out/w",)),
        (("m/q", "kernel"), ("m/out", "w")),
        (("m.q", "x/kernel"), ("m.q", "out/w")),
    ],
)
def test_sibling_in_another_module(path, other):
    assert sibling(path, "out", "w") == other


def test_fixed_leaves_are_those_in_no_mapping():
    tree = {"a": [x(), {"w": x()}], "b": Pair(x(), x()), "c": {"d": Record(x(), None)}}
    assert {path_name(p): kind for p, kind in fixed_leaves(tree).items()} == {
        "a/0": "list",
        "b/first": "Pair",
        "b/second": "Pair",
        "c/d/weights": "Record",
        "c/d/step": "Record",
    }
    assert fixed_leaves({"a": {"w": x()}, "b": nn.Partitioned(x(), ("a",))}) == {}


# Trees that cannot gain a leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """A layer like those of Equinox: a dataclass of arrays, weights (out, in)."""

    weight: Any
    bias: Any

    def __call__(self, x):
        return x @ self.weight.T + self.bias[None]


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


W1, B1, W2, B2, X = arrays((5, 4), (5,), (3, 5), (3,), (2, 4))
FIXED = {  # trees without one mapping, and a function of each
    "list": ([W1.T, W2.T], lambda params, x: jnp.tanh(x @ params[0]) @ params[1]),
    "tuple": ((W1.T, W2.T), lambda params, x: jnp.tanh(x @ params[0]) @ params[1]),
    "namedtuple": (
        Pair(W1.T, W2.T),
        lambda params, x: jnp.tanh(x @ params.first) @ params.second,
    ),
    "modules": (
        [Linear(W1, B1), Linear(W2, B2)],
        lambda params, x: params[1](jnp.tanh(params[0](x))),
    ),
    "modules in a dict": (
        {"layers": (Linear(W1, B1), Linear(W2, B2))},
        lambda params, x: params["layers"][1](jnp.tanh(params["layers"][0](x))),
    ),
}


@pytest.mark.parametrize("options", [{}, {"targets": "*"}, {"targets": "nothing"}])
@pytest.mark.parametrize("kind", FIXED)
def test_lorafy_of_other_containers_prints_code_that_adapts_them(
    kind, options, randomized, close
):
    params, fn = FIXED[kind]
    match = r"which cannot gain a leaf next to '.*a mapping of its own, or adapt its"
    with pytest.raises(ValueError, match=match) as error:
        lj.lorafy(params, 2, **options)
    lines = str(error.value).splitlines()
    code = "\n".join(line.strip() for line in lines if line.startswith("    "))
    names = {"params": params, "fn": fn, "args": (X,), "rank": 2, "lj": lj, "jax": jax}
    exec(code, names)
    close(names["y"], fn(params, X))
    adapted = randomized(names["adapted"])
    assert lj.count(adapted).trainable == 2 * (4 + 5) + 2 * (5 + 3)
    merged = names["nested"](lj.merge(adapted))
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    # Also after a transformation, which sorts the keys of a dict.
    step = jax.jit(lambda adapted: (adapted, lj.lora(names["flat_fn"])(adapted, X)))
    close(step(step(adapted)[0])[1], fn(merged, X))


def test_lorafy_refuses_only_weights_in_no_mapping():
    params = {"m": {"kernel": W1}, "heads": [W2, W2]}
    match = r"'heads/\*'. Write targets='kernel' .* To adapt them too, adapt its leaves"
    with pytest.warns(UserWarning, match=match):
        adapted = lj.lorafy(params, 2)
    assert sorted(adapted["m"]) == ["kernel", "lora_a", "lora_b", "lora_scale"]
    for options in ({"targets": "heads"}, {"targets": "m", "also": "heads"}):
        with pytest.raises(ValueError, match="heads is a list, which cannot gain"):
            lj.lorafy(params, 2, **options)
