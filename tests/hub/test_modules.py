"""Leaves and adapters as tensors of PyTorch's modules, and back, in every layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax._adapters import arrays_of, find_adapters, of_rank
from lora_jax._hub.module_adapters import factor_shapes, join_adapters, split_adapter
from lora_jax._hub.module_kinds import EXPERTS, KINDS, LINEAR
from lora_jax._hub.module_plan import module_kinds
from lora_jax._hub.modules import (
    leaf_from_torch,
    leaf_to_torch,
    map_vector,
    map_weight,
    tensor_shapes,
)
from lora_jax._hub.names import ModuleNames, module_names
from lora_jax._hub.tensor_keys import parameter_stems

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


def mapped(path, w, name, axes, kind):
    named = module_names({"m": name}, path)
    assert named is not None
    return map_weight(path, {path: w}, named, axes, KINDS[kind])


def numpy_adapter(params, path):
    """The adapter next to a weight, in NumPy."""
    leaves = {("m", name): np.asarray(x) for name, x in params["m"].items()}
    return arrays_of(of_rank(find_adapters(leaves))[path], leaves)


@pytest.fixture(params=CASES)
def case(request, randomized):
    """A weight with an adapter, the update of the weight, and the weight itself."""
    shape, axes, name, kind = CASES[request.param]
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    leaf = "embedding" if kind == "embedding" else "kernel"
    tree = {"m": {leaf: w}}
    given = {f"m/{leaf}": axes}
    r = 1 if 1 in (shape[0], shape[-1]) else 2
    params = randomized(lj.lorafy(tree, r, alpha=3, targets="*", axes=given))
    path = "m", leaf
    delta = np.asarray(jax.jit(lj.merge)(params)["m"][leaf]) - w
    weight = mapped(path, w, name, axes, kind)
    return weight, numpy_adapter(params, path), delta, w


def product(weight, name, module):
    """The update in PyTorch's layout, in NumPy, by the rules of the format."""
    kind = weight.modules[name].kind
    inputs = weight.sizes(weight.axes.inputs)
    a, b = kind.factors_to_torch(module.a, module.b, inputs)
    if kind is EXPERTS:
        n, r = module.a.shape[0], module.a.shape[-1]
        b = b.reshape(len(b), r, n)
        return module.scale * np.einsum("ore,eri->eoi", b, a.reshape(n, r, -1))
    b = b.reshape(len(b), -1)
    return module.scale * np.einsum("or,r...->o...", b, a)


def has_experts(weight):
    return any(part.kind is EXPERTS for part in weight.modules.values())


def test_split_adapter_gives_each_module_the_update_of_the_weight(case):
    weight, adapter, delta, _ = case
    modules = split_adapter(weight, adapter)
    assert modules.keys() == weight.modules.keys()
    if has_experts(weight):
        return
    for name, want in leaf_to_torch(weight, delta).items():
        got = product(weight, name, modules[name])
        got = got.T if weight.modules[name].kind is KINDS["embedding"] else got
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)


def test_split_adapter_of_experts_in_one_parameter(randomized):
    shape, axes, name, kind = CASES["layers of experts"]
    w = np.zeros(shape, np.float32)
    params = lj.lorafy({"m": {"kernel": w}}, 2, axes={"m/kernel": axes})
    params = randomized(params)
    path = "m", "kernel"
    weight = mapped(path, w, name, axes, kind)
    delta = np.asarray(lj.merge(params)["m"]["kernel"])
    scales = np.array([[1, 2, 3], [4, 4, 4]], np.float32)  # PEFT has one for each layer
    params["m"]["lora_scale"] = scales
    adapter = numpy_adapter(params, path)
    want = delta * scales.reshape(2, 3, 1, 1)
    for i, scale in enumerate((1, 4)):
        name = f"m.{i}.w"
        module = split_adapter(weight, adapter)[name]
        assert module.scale == scale
        got = product(weight, name, module)
        np.testing.assert_allclose(got, want[i], atol=1e-5)


def test_join_adapters_inverts_split_adapter(case):
    weight, adapter, _, _ = case
    inputs = weight.sizes(weight.axes.inputs)
    through = {}
    for name, module in split_adapter(weight, adapter).items():
        kind = weight.modules[name].kind
        shapes = factor_shapes(weight, name, module.a.shape[-1])
        assert (module.a.shape, module.b.shape) == shapes
        tensors = kind.factors_to_torch(module.a, module.b, inputs)
        a, b = kind.factors_from_torch(*tensors, shapes[0])
        through[name] = module._replace(a=a, b=b)
    joined = join_adapters(weight, through)
    assert joined.axes == weight.axes
    for x, y in zip(joined, adapter, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_leaf_from_torch_inverts_leaf_to_torch(case):
    weight, _, _, w = case
    if has_experts(weight):
        return
    tensors = leaf_to_torch(weight, w)
    assert {n: x.shape for n, x in tensors.items()} == tensor_shapes(weight)
    np.testing.assert_array_equal(leaf_from_torch(weight, tensors), w)


def test_map_vector_there_and_back():
    x = np.arange(12.0).reshape(2, 3, 2)
    leaf = map_vector(("m", "bias"), x.shape, ModuleNames(("m.{layer}",), None, 1, 0))
    tensors = leaf_to_torch(leaf, x)
    assert {k: v.tolist() for k, v in tensors.items()} == {
        "m.0": [0, 1, 2, 3, 4, 5],
        "m.1": [6, 7, 8, 9, 10, 11],
    }
    assert tensor_shapes(leaf) == {"m.0": (6,), "m.1": (6,)}
    np.testing.assert_array_equal(leaf_from_torch(leaf, tensors), x)


def test_split_adapter_leaves_out_ranks_of_other_modules():
    """The adapters that PEFT trained for parts of a fused weight are blocks of it."""

    def ranks(a, b):
        kernel = np.zeros((4, 6), np.float32)
        scale = np.ones((), np.float32)
        leaves = {"kernel": kernel, "lora_a": a, "lora_b": b, "lora_scale": scale}
        axes, path = A((), (0,), (1,)), ("m", "kernel")
        weight = mapped(path, kernel, ("q", "k", "v"), axes, "linear")
        modules = split_adapter(weight, numpy_adapter({"m": leaves}, path))
        return {name: module.a.shape[-1] for name, module in modules.items()}

    a, b = np.ones((4, 3), np.float32), np.zeros((3, 6), np.float32)
    assert ranks(a, b) == dict(q=3, k=3, v=3)
    b[0, :2] = b[1, 4:] = b[2, 4] = 1
    assert ranks(a, b) == dict(q=1, v=2)
    a[:, 0] = b[0] = 0  # the padding of a stack, which cannot learn
    assert ranks(a, b) == dict(v=2)
    a[:], b[:] = 0, 0  # an adapter of zeros alone is still one
    assert ranks(a, b) == dict(q=3, k=3, v=3)


def test_module_kinds():
    paths = [
        ("conv_in", "kernel"),
        ("Conv", "bias"),
        ("t", "embedding"),
        ("p", "kernel"),
    ]
    names = lambda kinds: [kind.name for kind in module_kinds(kinds, paths).values()]
    assert names(None) == ["conv", "linear", "embedding", "linear"]
    assert names({"p": "conv", "*": "linear"}) == ["linear", "linear", "linear", "conv"]


def test_parameter_stems_wrap_a_module_in_the_order_of_its_parameters():
    orders = {"l.0.e.down": 1, "l.0.e.up": 0, "l.1.e.up": 0, "x.w": None}
    assert parameter_stems(orders) == {
        "l.0.e.down": "l.0.e",
        "l.0.e.up": "l.0.e.base_layer",
        "l.1.e.up": "l.1.e",
        "x.w": "x",
    }


def test_map_weight_reads_axes_from_flax_names_after_the_stacked_dimensions():
    leaves = {
        ("query", "kernel"): jnp.ones((2, 4, 2, 3)),
        ("query", "bias"): jnp.ones((2, 2, 3)),
        ("up", "kernel"): jnp.ones((2, 4, 5)),
        ("vectors", "w"): jnp.ones((2, 4)),
    }

    def axes(path):
        named = module_names({"*": "{}.{layer}"}, path)
        assert named is not None
        return map_weight(path, leaves, named, None, LINEAR).axes

    assert axes(("query", "kernel")) == A((0,), (1,), (2, 3))
    assert axes(("up", "kernel")) == A((0,), (1,), (2,))
    with pytest.raises(ValueError, match="too few dimensions for 1 stacked ones"):
        axes(("vectors", "w"))
    path, named = ("e", "up"), ModuleNames(("m",), None, 0, 0)
    with pytest.raises(ValueError, match=r"axes=find_axes\(fn, params"):
        map_weight(path, {path: jnp.ones((2, 3, 4))}, named, None, LINEAR)
