"""Tests `split`, `combine`, `mask` and `count` in every container."""

import re

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax._tree import flatten, path_name, unbox


def layer(wrap=lambda x, names: x):
    kernel = wrap(jnp.arange(12.0).reshape(4, 3), ("in", "out"))
    return {"kernel": kernel, "bias": wrap(jnp.ones(3), ("out",))}


CONTAINERS = {
    "dict": lambda: {"m": layer(), "head": layer()},
    "frozen": lambda: flax.core.freeze({"m": layer(), "head": layer()}),
    "state": lambda: nnx.State(
        jax.tree.map(nnx.Param, {"m": layer(), "head": layer()})
    ),
    "list": lambda: {"m": [layer(), layer()], "head": layer()},
    "partitioned": lambda: {"m": layer(nn.Partitioned), "head": layer(nn.Partitioned)},
    "logical": lambda: {
        "m": layer(nn.LogicallyPartitioned),
        "head": layer(nn.LogicallyPartitioned),
    },
    "abstract": lambda: jax.eval_shape(lambda: {"m": layer(), "head": layer()}),
    "others": lambda: {
        "params": {"m": layer(), "head": layer()},
        "stats": {"n": np.int32(3), "mean": np.zeros(3, np.float32), "none": None},
        "key": jax.random.key(0),
    },
}

each_container = pytest.mark.parametrize("kind", CONTAINERS)
each_also = pytest.mark.parametrize("also", [(), "head", ["head/bias", "bias"]])


def adapted(kind, also=()):
    return lj.lorafy(CONTAINERS[kind](), 2, targets="m", also=also, init=normal)


def normal(key, shape, dtype):
    return jax.device_put(
        np.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
    )


def names(tree):
    return {path_name(path): leaf for path, leaf in flatten(tree).items()}


def expected(params):
    """Returns the trainable paths, from their names alone."""
    return {n for n in names(params) if n.endswith(("lora_a", "lora_b", "lora_w"))}


@each_also
@each_container
def test_combine_inverts_split(kind, also):
    params = adapted(kind, also)
    adapters, base = lj.split(params)
    first, second = names(adapters), names(base)
    assert any(name.endswith("lora_w") for name in first) == bool(also)
    for name, leaf in names(params).items():
        if name in expected(params):
            assert first[name] is leaf and second[name] is None
        else:
            assert first[name] is None and second[name] is leaf
    joined = lj.combine(adapters, base)
    assert type(joined) is type(params)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(names(joined)[n] is leaf for n, leaf in names(params).items())


@each_container
def test_split_fills_in_none_which_is_no_leaf(kind):
    params = adapted(kind)
    adapters, base = lj.split(params)
    n = len(jax.tree.leaves(params))
    assert len(jax.tree.leaves(adapters)) == len(expected(params)) > 0
    assert len(jax.tree.leaves(base)) == n - len(jax.tree.leaves(adapters))
    for half in (adapters, base):
        visited = []
        mapped = jax.tree.map(lambda x, seen=visited: seen.append(x) or x, half)
        assert len(visited) == len(jax.tree.leaves(half))
        assert jax.tree.structure(mapped) == jax.tree.structure(half)


@each_also
@each_container
def test_mask_is_true_at_trainable_leaves(kind, also):
    params = adapted(kind, also)
    mask = lj.mask(params)
    trains = {name for name, flag in names(mask).items() if flag is True}
    assert trains == expected(params)
    assert {type(x) for x in names(mask).values()} == {bool}


@pytest.mark.parametrize("kind", ["dict", "frozen", "state", "list", "partitioned"])
def test_mask_works_in_optax(kind):
    params = adapted(kind)
    frozen = jax.tree.map(lambda x: not x, lj.mask(params))
    tx = optax.chain(optax.sgd(1.0), optax.masked(optax.set_to_zero(), frozen))
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    for name, update in names(updates).items():
        value = -1.0 if name in expected(params) else 0.0
        np.testing.assert_array_equal(
            unbox(update), np.full(unbox(update).shape, value)
        )


@each_also
@each_container
def test_count_counts_elements_except_scales(kind, also):
    params = adapted(kind, also)
    sizes = {
        name: unbox(leaf).size
        for name, leaf in names(params).items()
        if leaf is not None and not name.endswith("lora_scale")
    }
    trains = sum(sizes[name] for name in expected(params))
    base = {name: unbox(leaf) for name, leaf in names(lj.strip(params)).items()}
    frozen = sum(x.size * x.dtype.itemsize for x in base.values() if x is not None)
    assert lj.count(params) == (trains, sum(sizes.values()), frozen)


def test_count_prints_one_line():
    params = lj.lorafy({"kernel": jax.ShapeDtypeStruct((1000, 2000), jnp.float32)}, 1)
    count = lj.count(params)
    assert isinstance(count, tuple)
    assert (count.trainable, count.total) == (3000, 2_003_000)
    assert count.base_bytes == 8_000_000
    printed = "trainable 3,000 of 2,003,000 (0.15 %), base 8 MB"
    assert str(count) == f"{count}" == printed


@pytest.mark.parametrize(
    ("size", "printed"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (6_360_000_000, "6.36 GB")],
)
def test_count_prints_bytes_in_a_suitable_unit(size, printed):
    assert str(lj.Count(1, 2, size)) == f"trainable 1 of 2 (50.00 %), base {printed}"


def test_count_leaves_out_stacked_scales():
    params = {"w": jax.ShapeDtypeStruct((5, 4, 3), jnp.float32)}
    axes = {"w": lj.Axes((0,), (1,), (2,))}
    adapted = lj.lorafy(params, 2, targets="w", axes=axes)
    assert lj.count(adapted) == (5 * (8 + 6), 5 * (8 + 6 + 12), 5 * 12 * 4)


def test_split_under_jit_and_grad():
    params = adapted("dict")
    adapters, base = lj.split(params)

    @jax.jit
    def loss(adapters):
        joined = lj.combine(adapters, base)
        return sum(jnp.sum(x) for x in jax.tree.leaves(joined))

    grads = jax.grad(loss)(adapters)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)
    assert all((g == 1).all() for g in jax.tree.leaves(grads))


# Errors

USES = {
    "merge": lj.merge,
    "strip": lj.strip,
    "split": lj.split,
    "mask": lj.mask,
    "count": lj.count,
    "save": lambda params: lj.save("never-written.safetensors", params),
    "detach": lj.detach,
    "lora": lambda params: lj.lora(lambda p: p)(params),
    "adapters_only": lambda params: lj.adapters_only(optax.sgd(1.0)).init(params),
}
GOOD = {"kernel": (4, 3), "lora_a": (4, 2), "lora_b": (2, 3), "lora_scale": ()}


def tree(**changes):
    shapes = {name: s for name, s in (GOOD | changes).items() if s is not None}
    leaves = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    return {"m": leaves, "ok": {"kernel": jax.ShapeDtypeStruct((2,), jnp.float32)}}


def refuse(params, match):
    """Asserts that each use of the tree that `params` makes raises the same error."""
    for name, use in USES.items():
        try:
            use(params())
        except ValueError as error:
            assert re.search(match, str(error)), (name, str(error))
        else:
            pytest.fail(f"{name} takes it")


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (lambda: CONTAINERS["dict"](), r"no adapters. Write params = lorafy\(params"),
        (lambda: {}, "no adapters"),
        (lambda: tree(lora_a=None), "'m/kernel' is broken: 'm/lora_a' is .*combine"),
        (lambda: tree(lora_scale=None), "'m/kernel' is broken: 'm/lora_scale' is "),
        (
            lambda: tree(kernel=None),
            "'m/lora_a' belongs to no weight: found 0 of .*Rem",
        ),
        (lambda: tree(embedding=(4, 3)), "'m/lora_a' belongs to no weight: found 2"),
        (lambda: tree(w_lora_b=(2, 3)), "'m/w_lora_b' belongs to no weight"),
        (
            lambda: tree(kernel_lora_b=(2, 3)),
            "'m/kernel_lora_b' is named like an adapter.*'m/lora_a'.*Rename it",
        ),
        (
            lambda: tree(lora_a=(4, 5)),
            r"'m/kernel' does not fit: lora_a \(4, 5\), lora_b \(2, 3\) and lora_scale "
            r"\(\) make no update of a weight \(4, 3\).*lorafy on these",
        ),
        (lambda: lj.split(tree())[0], "'m/kernel' is broken: 'm/kernel' is .*combine"),
        (lambda: lj.split(tree())[1], "'m/kernel' is broken: 'm/lora_a' is .*combine"),
        (lambda: tree() | {"m": tree()["m"] | {"lora_scale": 2.0}}, "'m/lora_scale'"),
    ],
)
def test_find_adapters_errors_in_every_verb(params, match):
    refuse(params, match)


LAYOUTS = {  # weight, A, B, scale
    "matrix": ((4, 3), (4, 2), (2, 3), ()),
    "stack": ((5, 4, 3), (5, 4, 2), (5, 2, 3), (5,)),
    "heads": ((4, 2, 3), (4, 2), (2, 2, 3), ()),
    "aligned": ((3, 2, 5, 4), (3, 1, 5, 1, 2), (3, 2, 1, 4, 2), (3,)),
    "matrix, scales of ranks": ((4, 3), (4, 2), (2, 3), (2,)),
    "stack, scales of ranks": ((5, 4, 3), (5, 4, 2), (5, 2, 3), (5, 2)),
    "aligned, scales of ranks": (
        (3, 2, 5, 4),
        (3, 1, 5, 1, 6),
        (3, 2, 1, 4, 6),
        (3, 6),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fits_refuses_every_other_size(layout):
    shapes = dict(zip(GOOD, LAYOUTS[layout], strict=True))
    assert lj.count(tree(**shapes)).trainable > 0
    for name, shape in shapes.items():
        changed = [(*shape[:d], n + 1, *shape[d + 1 :]) for d, n in enumerate(shape)]
        changed += [shape[:d] + shape[d + 1 :] for d in range(len(shape))]
        for wrong in [*changed, (7, *shape), (*shape, 7)]:
            if name == "kernel" and wrong == shape[1:] and shapes["lora_scale"]:
                continue  # several adapters in a stack, over one layer
            if name == "lora_scale" and "ranks" in layout and wrong == shape[:-1]:
                continue  # one scale for all ranks
            with pytest.raises(ValueError, match="'m/kernel' does not fit"):
                lj.count(tree(**shapes | {name: wrong}))


def copied(**changes):
    """Returns a tree with a broken trained copy."""
    leaves = {"kernel": (4, 3), "lora_w": (4, 3), "bias": (3,), "bias_lora_w": (3,)}
    shapes = {name: s for name, s in (leaves | changes).items() if s is not None}
    arrays = {
        name: s if isinstance(s, np.ndarray) else np.zeros(s, np.float32)
        for name, s in shapes.items()
    }
    return {"m": arrays}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lora_w": (3, 4)}, r"'m/lora_w', float32 \(3, 4\), is no trained copy"),
        ({"bias_lora_w": ()}, r"'m/bias_lora_w', float32 \(\), is no trained copy"),
        (
            {"lora_w": np.zeros((4, 3), int)},
            "'m/lora_w', int64 .*both must be floating",
        ),
        ({"bias": np.zeros(3, int)}, "'m/bias_lora_w', .*its leaf, int64"),
        ({"kernel": None}, "'m/lora_w' belongs to no weight"),
        ({"bias": None}, "'m/bias_lora_w' belongs to no weight: found 0"),
        (
            {"lora_a": (4, 2), "lora_b": (2, 3), "lora_scale": ()},
            "'m/kernel' has both an adapter and a trained copy, 'm/lora_w'.*Remove one",
        ),
    ],
)
def test_check_copy_errors_in_every_verb(changes, match):
    assert lj.count(copied()) == (15, 30, 60)
    refuse(lambda: copied(**changes), match)


def test_find_adapters_refuses_an_adapter_and_a_copy_of_one_leaf():
    params = {"m": {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, "f")}}
    adapted = lj.lorafy(params, 2, also="bias")
    assert set(adapted["m"]) == {
        *("kernel", "bias", "lora_a", "lora_b", "lora_scale", "bias_lora_w")
    }
    assert lj.count(adapted) == (8 + 6 + 3, 12 + 3 + 8 + 6 + 3, 60)


@flax.struct.dataclass
class Checked:
    """A model that refuses fields of other types."""

    layers: dict
    bias: jax.Array

    def __post_init__(self):
        assert self.bias.ndim == 1


def test_split_of_a_class_that_checks_its_fields():
    model = Checked({"w": jnp.ones((4, 4))}, jnp.ones(4))
    params, x = lj.lorafy(model, 2, targets="*"), jnp.ones((3, 4))
    fn = lambda model, x: x @ model.layers["w"] + model.bias[None]
    assert isinstance(lj.merge(params), Checked)
    np.testing.assert_array_equal(lj.lora(fn)(params, x), fn(model, x))
    assert lj.find_axes(fn, model, x) == {"layers/w": lj.Axes((), (0,), (1,))}
    assert lj.explain(fn, params, x).rows[0].factored == 1
    adapters, base = lj.split(params)
    assert isinstance(lj.combine(adapters, base), Checked)
    loss = lambda adapters: lj.lora(fn)(lj.combine(adapters, base), x).sum()
    grads = jax.jit(jax.grad(loss))(adapters)
    assert jnp.abs(grads["layers"]["w_lora_b"]).max() > 0 and grads["bias"] is None
    assert isinstance(lj.attach(lj.detach(params), model), Checked)
    tx = lj.adapters_only(optax.sgd(1.0))
    grads = jax.grad(lambda params: lj.lora(fn)(params, x).sum())(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert isinstance(optax.apply_updates(params, updates), Checked)
    assert names(lj.mask(params))["layers/w_lora_a"] is True


def test_split_raises_the_error_of_a_broken_class():
    @flax.struct.dataclass
    class Broken:
        layers: dict

        def __post_init__(self):
            if "w_lora_a" in self.layers:
                raise KeyError("no adapters here")

    with pytest.raises(KeyError, match="no adapters here"):
        lj.lorafy(Broken({"w": jnp.ones((4, 4))}), 2, targets="*")


def test_combine_refuses_trees_that_are_no_pair():
    params = adapted("dict")
    adapters, base = lj.split(params)
    one_split = r"Pass the two trees of one split\(params\)"
    with pytest.raises(
        ValueError, match=f"'m/kernel' is in adapters and in.*{one_split}"
    ):
        lj.combine(params, base)
    with pytest.raises(ValueError, match="'m/lora_a' is in adapters and in base"):
        lj.combine(adapters, params)
    without = {"m": adapters["m"]}
    with pytest.raises(
        ValueError, match=f"'head/.*' is missing in adapters.*{one_split}"
    ):
        lj.combine(without, base)
    with pytest.raises(ValueError, match=f"'head/.*' is missing in base.*{one_split}"):
        lj.combine(adapters, {"m": base["m"]})
