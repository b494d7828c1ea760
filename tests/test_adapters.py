"""Adapters are found beside their weights by name, and must fit them."""

import jax.numpy as jnp
import pytest

from lora_jax._adapters import Axes, adapter_of, find_adapters, fits


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
def test_misfits(shapes):
    assert not fits(*shapes)


def leaves(**arrays):
    return {("m", name): x for name, x in arrays.items()}


def test_adapters_are_found_by_name():
    assert adapter_of(("m", "kernel")).a == ("m", "lora_a")
    assert adapter_of(("m", "w")).scale == ("m", "w_lora_scale")
    x, a, b, s = jnp.ones((4, 5)), jnp.ones((4, 2)), jnp.ones((2, 5)), jnp.ones(())
    tree = leaves(w=x, w_lora_a=a, w_lora_b=b, w_lora_scale=s, v=x)
    assert find_adapters(tree) == {("m", "w"): adapter_of(("m", "w"))}


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
def test_broken_adapters_are_errors_by_path(changes, message):
    x, a, b, s = jnp.ones((4, 5)), jnp.ones((4, 2)), jnp.ones((2, 5)), jnp.ones(())
    tree = leaves(kernel=x, lora_a=a, lora_b=b, lora_scale=s) | leaves(**changes)
    with pytest.raises(ValueError, match=message):
        find_adapters(tree)


def test_no_adapter_is_an_error():
    with pytest.raises(ValueError, match="These parameters have no adapters"):
        find_adapters(leaves(kernel=jnp.ones((4, 5))))


def test_axes_know_their_standard_order():
    assert Axes((0,), (1,), (2, 3)).standard and not Axes((), (1,), (0,)).standard
