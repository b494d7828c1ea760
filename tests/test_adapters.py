"""Tests that adapters are found by name and checked against their weights."""

import dataclasses

import jax.numpy as jnp
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax._adapters import Axes, adapter_of, find_adapters, fits
from lora_jax._tree import flatten


@pytest.mark.parametrize(
    "shapes",
    [
        ((4, 5), (4, 2), (3, 5), ()),
        ((4, 5), (5, 2), (2, 4), ()),
        ((4, 5), (4, 2), (2, 5), (1,)),
        ((4, 5), (4,), (5,), ()),
        ((4, 5), (), (2, 5), ()),
        ((3, 4, 5), (4, 2), (2, 5), ()),
        ((3, 4, 5), (3, 4, 2), (2, 2, 5), (3,)),
        ((5, 4), (1, 4, 2), (5, 4, 2), ()),
        ((5, 4), (1, 1, 2), (5, 1, 2), ()),
        ((5, 4), (1, 4, 2), (5, 1, 3), ()),
    ],
)
def test_fits_refuses_misfits(shapes):
    assert not fits(*shapes)


def leaves(**arrays):
    return {("m", name): x for name, x in arrays.items()}


def test_find_adapters_goes_by_names():
    assert adapter_of(("m", "kernel")).a == ("m", "lora_a")
    assert adapter_of(("m", "w")).scale == ("m", "w_lora_scale")
    x, a, b, s = jnp.ones((4, 5)), jnp.ones((4, 2)), jnp.ones((2, 5)), jnp.ones(())
    tree = leaves(w=x, w_lora_a=a, w_lora_b=b, w_lora_scale=s, v=x)
    want = dataclasses.replace(adapter_of(("m", "w")), axes=Axes((), (0,), (1,)))
    assert find_adapters(tree) == {("m", "w"): want}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_b": None},
            "The adapter of 'm/kernel' is broken: 'm/lora_b' is missing",
        ),
        (
            {"kernel": None},
            "'m/kernel' is missing, or no array. Pass the whole tree, or combine",
        ),
        ({"lora_a": jnp.ones((5, 2))}, r"'m/kernel' does not fit: lora_a \(5, 2\)"),
        (
            {"embedding": jnp.ones((4, 5))},
            "'m/lora_a' belongs to no weight: found 2 of",
        ),
        (
            {"w_lora_a": jnp.ones((4, 2))},
            "'m/w_lora_a' belongs to no weight: found 0 of",
        ),
    ],
)
def test_find_adapters_names_the_path_of_a_broken_adapter(changes, message):
    x, a, b, s = jnp.ones((4, 5)), jnp.ones((4, 2)), jnp.ones((2, 5)), jnp.ones(())
    tree = leaves(kernel=x, lora_a=a, lora_b=b, lora_scale=s) | leaves(**changes)
    with pytest.raises(ValueError, match=message):
        find_adapters(tree)


def test_find_adapters_needs_an_adapter():
    with pytest.raises(ValueError, match="These parameters have no adapters"):
        find_adapters(leaves(kernel=jnp.ones((4, 5))))


def test_axes_standard_order():
    assert Axes((0,), (1,), (2, 3)).standard and not Axes((), (1,), (0,)).standard


# Adapters of other libraries, and ours after a restore

W, A, B = jnp.ones((4, 5)), jnp.ones((4, 2)), jnp.ones((2, 5))
KERNEL = {"kernel": W, "bias": jnp.ones(5)}
FOREIGN = {
    "qwix": {"m": KERNEL | {"kernel_lora_a": A, "kernel_lora_b": B}},
    "gemma.peft": {"m": {"w": W, "lora": {"a": A, "b": B}}, "n": KERNEL},
    "openpi": {"m": {"w": W, "lora_a": A, "lora_b": B}, "n": KERNEL},
    "qwix of w": {"m": {"w": W, "w_lora_a": A, "w_lora_b": B}, "n": KERNEL},
    "Keras": {"m": KERNEL | {"lora_kernel_a": A, "lora_kernel_b": B}},
    "flax.nnx": {"m": KERNEL | {"lora": {"lora_a": A, "lora_b": B}}},
}
FLAT = {
    "gemma.peft": {"m/w": W, "m/lora/a": A, "m/lora/b": B, "n/kernel": W},
    "Keras": {"m/kernel": W, "m/lora_kernel_a": A, "m/lora_kernel_b": B},
}
AROUND = {"m": {"base_module": KERNEL, "lora_a": A, "lora_b": B}}
ALL = [*FOREIGN.items(), *FLAT.items(), ("flax.nnx", AROUND)]


@pytest.mark.parametrize(("library", "params"), ALL, ids=lambda x: str(x)[:12])
@pytest.mark.parametrize(
    "call",
    [
        lambda params: lj.lorafy(params, 2),
        lambda params: lj.lorafy(params, 2, targets="*"),
        lambda params: lj.lorafy(nnx.State(params), 2, targets="kernel"),
        lj.merge,
        lj.strip,
        lambda params: lj.lora(lambda params, x: x)(params, jnp.ones(3)),
    ],
)
def test_check_own_names_the_library_of_other_adapters(library, params, call):
    library = library.removesuffix(" of w")
    match = rf"' is an adapter of {library}.*write adopt\(params.* remove them"
    with pytest.raises(ValueError, match=match):
        call(params)


def test_check_own_names_adapters_of_flax_in_a_live_model():
    rngs = nnx.Rngs(0)
    linear = nnx.LoRALinear(4, 5, lora_rank=2, rngs=rngs)
    around = nnx.LoRA(4, 2, 5, base_module=nnx.Linear(4, 5, rngs=rngs), rngs=rngs)
    for model in (linear, around):
        with pytest.raises(
            ValueError, match=r"adapter of flax.nnx\. .* adopt\(params\)"
        ):
            lj.LoRA(model, 2)


@pytest.mark.parametrize("name", ["w", "gating_einsum", "dense/kernel"])
def test_check_own_names_libraries_that_store_no_scale(name):
    params = {name: W, f"{name}_lora_a": A, f"{name}_lora_b": B}
    match = (
        rf"'{name}_lora_a' is an adapter of qwix.*adopt\(params, alpha=\.\.\.\) with"
    )
    for call in (lambda params: lj.lorafy(params, 2, targets="*"), lj.merge):
        with pytest.raises(ValueError, match=match):
            call(params)
    params = {"kernel": W, "lora_a": A, "lora_b": B}
    with pytest.raises(ValueError, match="'lora_scale' is missing"):
        lj.merge(params)


def test_check_own_accepts_leaves_with_similar_names():
    base = {"lora": {"kernel": W}, "m": {"w": W, "a": W, "b": W}, "lora/a": W}
    adapted = lj.lorafy(base, 2, targets="*")
    assert len(find_adapters(flatten(adapted))) == 5
    half, rest = lj.split(adapted)
    assert lj.count(lj.combine(half, rest)).trainable == 5 * 2 * (4 + 5)


def test_check_own_refuses_adapters_in_a_tree_with_joined_keys():
    adapted = lj.lorafy({"m": {"kernel": W}}, 2)
    joined = {f"m/{name}": x for name, x in adapted["m"].items()}
    for call in (lambda p: lj.lorafy(p, 2), lj.merge):
        match = "'m/lora_a' is an adapter in a nested tree.*unflatten_dict"
        with pytest.raises(ValueError, match=match):
            call(joined)


RESTORED = {  # what Orbax restores without a target
    "nnx.Param": lambda tree: {
        m: {n: {"value": x} for n, x in leaves.items()} for m, leaves in tree.items()
    },
    "Quantized": lambda tree: {
        m: leaves | {"kernel": {"values": W.astype(jnp.int8), "scale": W[:1]}}
        for m, leaves in tree.items()
    },
}


@pytest.mark.parametrize("kind", RESTORED)
@pytest.mark.parametrize("adapted", [True, False])
def test_check_own_refuses_a_tree_restored_without_a_target(kind, adapted):
    tree = {"m": dict(KERNEL)}
    restored = RESTORED[kind](lj.lorafy(tree, 2) if adapted else tree)
    calls = [
        lambda: lj.lorafy(restored, 2),
        lambda: lj.lorafy(restored, 2, targets="*"),
    ]
    if adapted:
        calls += [lambda f=f: f(restored) for f in (lj.merge, lj.count, lj.detach)]
    for call in calls:
        match = f"'m/kernel' is a dict of .*{kind}.* comes? back .*restore\\(path, tar"
        with pytest.raises(ValueError, match=match):
            call()


def test_attach_refuses_adapters_restored_without_a_target():
    adapters = lj.detach(lj.lorafy({"m": dict(KERNEL)}, 2))["m"]
    restored = {name: {"value": x} for name, x in adapters.items() if x is not None}
    with pytest.raises(ValueError, match="'m/lora_a' is a dict of one 'value', as nnx"):
        lj.attach({"m": restored}, {"m": KERNEL})


def test_check_own_accepts_a_leaf_named_value():
    params = {"attn": {"query": W, "value": W, "kernel": {"value": W, "width": W}}}
    adapted = lj.lorafy(params, 2, targets="value")
    assert adapted["attn"]["value_lora_a"].shape == (4, 2)
    assert adapted["attn"]["kernel"]["value_lora_a"].shape == (4, 2)
