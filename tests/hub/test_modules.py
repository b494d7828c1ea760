"""Modules: every layout goes to PyTorch's and comes back, and moves what it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax._adapters import adapter_of
from lora_jax._hub.tensor_keys import kinds_of, stems_of
from lora_jax._hub.modules import (
    factors_of,
    from_torch,
    leaf_from_torch,
    leaf_to_torch,
    modules_of,
    shapes_of,
    tensor_shapes,
    to_torch,
    weight_of,
)
from lora_jax._hub.names import Naming, naming_of

A = lj.Axes
CASES = {
    "dense": ((4, 3), A((), (0,), (1,)), "m", "linear"),
    "transposed": ((3, 4), A((), (1,), (0,)), "m", "linear"),
    "heads": ((4, 2, 3), A((), (0,), (1, 2)), "m", "linear"),
    "out": ((2, 3, 4), A((), (0, 1), (2,)), "m", "linear"),
    "one": ((1, 4), A((), (0,), (1,)), "m", "linear"),
    "one aligned": ((1, 3, 1, 4), A((), (2, 3), (0, 1)), "m", "linear"),
    "fused": ((3, 2, 4, 2), A((), (2,), (0, 1, 3)), ("q", "k", "v"), "linear"),
    "uneven": ((4, 9), A((), (0,), (1,)), {"q": 5, "k": 4}, "linear"),
    "table": ((7, 4), A((), (0,), (1,)), "m", "embedding"),
    "tied": ((7, 4), A((), (0,), (1,)), ("m", "head"), "embedding"),
    "conv": ((3, 2, 4, 5), A((), (0, 1, 2), (3,)), "m", "conv"),
    "conv1d": ((3, 4, 5), A((), (0, 1), (2,)), "m", "conv"),
    "stack": ((2, 4, 3), A((0,), (1,), (2,)), "m.{layer}", "linear"),
    "last": ((4, 3, 2), A((2,), (0,), (1,)), "m.{layer}", "linear"),
    "stack of convs": ((2, 3, 4, 5), A((0,), (1, 2), (3,)), "m.{layer}", "conv"),
    "experts": ((3, 4, 5), A((0,), (1,), (2,)), "m.w", "experts"),
    "layers of experts": (
        (2, 3, 5, 4),
        A((0, 1), (3,), (2,)),
        "m.{layer}.w",
        "experts",
    ),
    "each expert": (
        (2, 3, 4, 5),
        A((0, 1), (2,), (3,)),
        "m.{layer}.{expert}",
        "linear",
    ),
    "fused stack": (
        (2, 4, 6),
        A((0,), (1,), (2,)),
        ("q.{layer}", "k.{layer}"),
        "linear",
    ),
}


@pytest.fixture(params=CASES)
def case(request, randomized):
    """A weight with an adapter, and how PyTorch has it."""
    shape, axes, name, kind = CASES[request.param]
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    leaf = "embedding" if kind == "embedding" else "kernel"
    tree = {"m": {leaf: w}}
    given = {f"m/{leaf}": axes}
    r = 1 if 1 in (shape[0], shape[-1]) else 2
    params = randomized(lj.lorafy(tree, r, alpha=3, targets="*", axes=given))
    path = "m", leaf
    naming = naming_of({"m": name}, path)
    weight = weight_of(path, {path: w}, naming, axes, kind)
    factors = [np.asarray(params["m"][n[-1]]) for n in adapter_of(path)]
    delta = np.asarray(jax.jit(lj.merge)(params)["m"][leaf]) - w
    return weight, factors, delta, w


def product(kind, module):
    """The update as PyTorch has the weight: NumPy, by the rules of the format."""
    a, b = to_torch(kind, module)
    if kind == "experts":
        n, r = module.a.shape[0], module.a.shape[-1]
        b = b.reshape(len(b), r, n)
        return module.scale * np.einsum("ore,eri->eoi", b, a.reshape(n, r, -1))
    b = b.reshape(len(b), -1)
    return module.scale * np.einsum("or,r...->o...", b, a)


def test_each_module_moves_as_the_weight(case):
    weight, factors, delta, _ = case
    modules = modules_of(weight, *factors, fold=False)
    assert modules.keys() == weight.slots.keys()
    if next(iter(weight.slots.values())).kind == "experts":
        return
    for name, want in leaf_to_torch(weight, delta).items():
        kind = weight.slots[name].kind
        got = product(kind, modules[name])
        got = got.T if kind == "embedding" else got
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)


def test_experts_are_in_one_parameter(randomized):
    shape, axes, name, kind = CASES["layers of experts"]
    w = np.zeros(shape, np.float32)
    params = lj.lorafy({"m": {"kernel": w}}, 2, axes={"m/kernel": axes})
    params = randomized(params)
    path = "m", "kernel"
    weight = weight_of(path, {path: w}, naming_of({"m": name}, path), axes, kind)
    factors = [np.asarray(params["m"][n[-1]]) for n in adapter_of(path)]
    delta = np.asarray(lj.merge(params)["m"]["kernel"])
    for fold in (False, True):
        factors[2] = np.float32([[1, 2, 3], [4, 4, 4]])  # no two formats agree on it
        want = delta * factors[2][..., None, None]
        for i in range(2):
            module = modules_of(weight, *factors, fold=fold)[f"m.{i}.w"]
            assert module.scale == (4 if i == 1 and not fold else 1)
            np.testing.assert_allclose(product(kind, module), want[i], atol=1e-5)


def test_there_and_back(case):
    weight, factors, _, w = case
    modules = modules_of(weight, *factors, fold=False)
    through = {}
    for name, module in modules.items():
        kind = weight.slots[name].kind
        shapes = shapes_of(weight, name, module.a.shape[-1])
        assert [x.shape for x in module[:2]] == list(shapes)
        through[name] = from_torch(kind, *to_torch(kind, module), module.scale, shapes)
    for x, y in zip(factors_of(weight, through), factors, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    if not any(slot.kind == "experts" for slot in weight.slots.values()):
        tensors = leaf_to_torch(weight, w)
        shapes = {name: x.shape for name, x in tensors.items()}
        assert shapes == tensor_shapes(weight, w.shape)
        back = leaf_from_torch(weight, w.shape, tensors)
        np.testing.assert_array_equal(back, w)


def test_a_vector_there_and_back():
    naming = Naming(("m.{layer}",), None, 1, 0)
    x = np.arange(12.0).reshape(2, 3, 2)
    tensors = leaf_to_torch(naming, x)
    assert {k: v.tolist() for k, v in tensors.items()} == {
        "m.0": [0, 1, 2, 3, 4, 5],
        "m.1": [6, 7, 8, 9, 10, 11],
    }
    assert tensor_shapes(naming, x.shape) == {"m.0": (6,), "m.1": (6,)}
    np.testing.assert_array_equal(leaf_from_torch(naming, x.shape, tensors), x)


def fused(a, b):
    path = "m", "kernel"
    w, axes = np.zeros((4, 6), np.float32), A((), (0,), (1,))
    naming = naming_of({"m": ("q", "k", "v")}, path)
    weight = weight_of(path, {path: w}, naming, axes, "linear")
    return modules_of(weight, a, b, np.float32(1), fold=False)


def test_ranks_of_other_modules_are_left_out():
    """What PEFT trained apart, the fused weight has as blocks."""
    a, b = np.ones((4, 3), np.float32), np.zeros((3, 6), np.float32)
    assert {n: m.a.shape[-1] for n, m in fused(a, b).items()} == dict(q=3, k=3, v=3)
    b[0, :2] = b[1, 4:] = b[2, 4] = 1
    assert {n: m.a.shape[-1] for n, m in fused(a, b).items()} == dict(q=1, v=2)
    a[:, 0] = b[0] = 0  # padding of a stack, which cannot learn
    assert {n: m.a.shape[-1] for n, m in fused(a, b).items()} == dict(v=2)
    a[:], b[:] = 0, 0  # an adapter that does nothing at all is still one
    assert {n: m.a.shape[-1] for n, m in fused(a, b).items()} == dict(q=3, k=3, v=3)


def test_kinds():
    paths = [
        ("conv_in", "kernel"),
        ("Conv", "bias"),
        ("t", "embedding"),
        ("p", "kernel"),
    ]
    assert list(kinds_of(None, paths).values()) == [
        "conv",
        "linear",
        "embedding",
        "linear",
    ]
    kinds = kinds_of({"p": "conv", "*": "linear"}, paths)
    assert list(kinds.values()) == ["linear", "linear", "linear", "conv"]


def test_parameters_of_one_module_are_wrapped_in_its_order():
    orders = {"l.0.e.down": 1, "l.0.e.up": 0, "l.1.e.up": 0, "x.w": None}
    assert stems_of(orders) == {
        "l.0.e.down": "l.0.e",
        "l.0.e.up": "l.0.e.base_layer",
        "l.1.e.up": "l.1.e",
        "x.w": "x",
    }


def test_a_stack_is_told_by_its_name():
    """Behind the stacked dimension, Flax's names say what they always do."""
    leaves = {
        ("query", "kernel"): jnp.ones((2, 4, 2, 3)),
        ("query", "bias"): jnp.ones((2, 2, 3)),
        ("up", "kernel"): jnp.ones((2, 4, 5)),
        ("vectors", "w"): jnp.ones((2, 4)),
    }
    naming = lambda path: naming_of({"*": "{}.{layer}"}, path)
    find = lambda path: weight_of(path, leaves, naming(path), None, "linear").axes
    assert find(("query", "kernel")) == A((0,), (1,), (2, 3))
    assert find(("up", "kernel")) == A((0,), (1,), (2,))
    with pytest.raises(ValueError, match="too few dimensions for 1 stacked ones"):
        find(("vectors", "w"))
    with pytest.raises(ValueError, match=r"axes=find_axes\(fn, params"):
        weight_of(
            ("e", "up"),
            {("e", "up"): jnp.ones((2, 3, 4))},
            Naming(("m",), None, 0, 0),
            None,
            "linear",
        )
