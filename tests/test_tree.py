"""Any container is flattened by path and rebuilt around the very same leaves."""

import collections
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from lora_jax._tree import flatten, leaf_order, path_name, rebox, unbox, unflatten


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
def test_paths(kind):
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
def test_a_mapping_gains_and_loses_leaves_in_a_new_container(kind):
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
def test_no_other_container_gains_or_loses_a_leaf(tree, change, match):
    leaves = flatten(tree)
    new = leaves | change if change else dict(list(leaves.items())[:-1])
    match = f"{match}, which cannot gain or lose a leaf.*in a mapping of its own"
    with pytest.raises(ValueError, match=match):
        unflatten(tree, new)


@pytest.mark.parametrize("tree", [jnp.ones(3), None, 1.5, nnx.Param(jnp.ones(3))])
def test_a_leaf_is_no_tree(tree):
    with pytest.raises(TypeError, match=rf"found {type(tree).__name__}\. Pass a mapp"):
        flatten(tree)


def test_a_live_module_has_the_leaves_of_its_state():
    module = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    leaves = flatten(module)
    assert leaves == flatten(nnx.state(module))
    new = unflatten(module, leaves | {("bias",): nnx.Param(x(3))})
    assert type(new) is nnx.Linear and new is not module
    assert new.kernel[...] is module.kernel[...]
    np.testing.assert_array_equal(new.bias[...], x(3))
    holes = unflatten(module, leaves | {("bias",): None})
    assert type(holes) is nnx.State and holes["bias"] is None


def test_two_leaves_cannot_have_one_path():
    with pytest.raises(ValueError, match="'a/b/w'"):
        flatten({"a/b": {"w": x()}, "a": {"b": {"w": x()}}})


@pytest.mark.parametrize("kind", ["partitioned", "logical", "nested boxes", "state"])
def test_boxes_open_and_close(kind):
    leaf = next(iter(flatten(TREES[kind][0]()).values()))
    closed = rebox(leaf, value := x(5))
    assert unbox(closed) is value
    assert jax.tree.structure(closed) == jax.tree.structure(leaf)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
def test_boxes_open_and_close_without_moving_their_arrays(box, axis_type):
    # Flax's own `unbox` constrains the sharding under a mesh: it moves an array, and
    # refuses an abstract one, and one that the mesh does not divide.
    mesh = jax.make_mesh((8,), ("a",), axis_types=(axis_type,))
    for value in (jnp.ones((3, 5)), jax.ShapeDtypeStruct((8, 8), jnp.float32)):
        boxes = [box(value, ("a", None), mesh=mesh), box(value, ("a", None))]
        with jax.set_mesh(mesh), nn.logical_axis_rules([("a", "a")]):
            for leaf in boxes:
                assert unbox(leaf) is value
                assert unbox(rebox(leaf, value)) is value
