"""`lora(fn)` on parameters with adapters equals `fn` on the merged parameters."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax._engine import loops
from lora_jax._engine.quantized import quantize_array

D, BATCH, VOCAB, LAYERS = 4, 3, 5, 2
X = np.random.default_rng(1).standard_normal((BATCH, D)).astype(np.float32)
IDS = np.array([[0, 4], [2, 2]])
STACK = {"stack": lj.Axes((0,), (1,), (2,))}
HEADS = {"heads": lj.Axes((), (0,), (1, 2))}
WINDOW = {"window": lj.Axes((), (0, 1), (2,))}


@functools.cache
def weights():
    """Returns one adapted weight of each kind, with random factors."""
    shapes = {
        "w": (D, D),
        "table": (VOCAB, D),
        "stack": (LAYERS, D, D),
        "heads": (D, 2, 3),
        "window": (3, D, D),
    }
    rng = np.random.default_rng(0)
    draw = lambda n: np.asarray(rng.standard_normal(n) / 2, np.float32)
    base = {name: jax.device_put(draw(shape)) for name, shape in shapes.items()}
    # Sums and concatenations of two weights add their ranks, which must stay small.
    ranks = dict.fromkeys(base, 2) | {"w": 1, "table": 1}
    options = {"axes": STACK | HEADS | WINDOW, "init": jax.nn.initializers.zeros}
    start = lambda base: lj.lorafy(base, ranks, alpha=3, **options)
    adapters, rest = lj.split(jax.jit(start)(base))
    drawn = jax.tree.map(lambda x: jax.device_put(draw(x.shape)), adapters)
    return lj.combine(drawn, rest)


@pytest.fixture
def params():
    return dict(weights())


@jax.custom_vjp
def straight_through(w, x):
    return jnp.round(x @ w, 1)


straight_through.defvjp(
    lambda w, x: (straight_through(w, x), (w, x)),
    lambda saved, g: (2 * saved[1].T @ g, g @ saved[0].T),
)


@jax.custom_vjp
def with_symbolic_zeros(w, x, t):
    return x @ w * t


def _forward(w, x, t):
    assert w.perturbed and not t.perturbed
    return with_symbolic_zeros(w.value, x.value, t.value), (w.value, x.value, t.value)


with_symbolic_zeros.defvjp(
    _forward,
    lambda saved, g: (
        saved[1].T @ g * saved[2],
        g @ saved[0].T * saved[2],
        jnp.zeros_like(saved[2]),
    ),
    symbolic_zeros=True,
)


@jax.custom_jvp
def tripled_gradient(w, x):
    return x @ w


@tripled_gradient.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return tripled_gradient(w, x), 3 * x @ dw + dx @ w


def scan_constant(p, x):
    return lax.scan(lambda c, _: (jnp.sin(c @ p["w"]), c.sum()), x, length=3)


def scan_stacked(p, x):
    return lax.scan(lambda c, w: (jnp.sin(c @ w), c.sum()), x, p["stack"], unroll=2)[0]


def scan_reversed(p, x):
    return lax.scan(lambda c, w: (c @ w, c @ w.T), x, p["stack"], reverse=True)


def scan_carried(p, x):
    return lax.scan(lambda c, _: ((c[0] @ c[1], c[1]), None), (x, p["w"]), length=2)[0][
        0
    ]


def scan_over_inputs(p, x):
    return lax.scan(lambda c, row: (c + x @ row, None), x[:, 0], p["w"].T)[0]


def remat_with_policy(p, x):
    policy = jax.checkpoint_policies.dots_saveable
    fn = jax.checkpoint(lambda w, x: jnp.sin(jnp.sin(x @ w) @ w), policy=policy)
    return fn(p["w"], x)


def loop(p, x):
    return lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c @ p["w"]), x)


def branch(p, x):
    return lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: x @ p["w"].T, x)


def attention(p, x):
    heads = jnp.einsum("bd,dnh->bnh", x, p["heads"])
    return jnp.einsum("bnh,dnh->bd", jnp.sin(heads), p["heads"])


def merged_heads(p, x):
    return x @ p["heads"].reshape(D, 6)


def split_heads(p, x):
    return jnp.einsum("bd,dnh->bhn", x, p["w"].reshape(D, 2, 2))


def layer_by_layer(p, x):
    for i in range(LAYERS):
        x = jnp.sin(x @ p["stack"][i])
    return x


def chosen_layer(p, x):
    return x @ lax.dynamic_index_in_dim(p["stack"], IDS[1, 0] - 1, keepdims=False)


def per_example_expert(p, x):
    return jnp.einsum("bd,bdh->bh", x, p["stack"][np.array([0, 1, 1])])


def experts(p, x):
    return jnp.einsum("bd,edh->beh", x, p["stack"])


def windows(p, x):
    """Gathers a window of the weight at each index."""
    dims = lax.GatherDimensionNumbers((1, 2), (), (1, 0))
    return lax.gather(p["w"], IDS % 2, dims, (2, 3))


def convolution(p, x):
    x = jnp.stack([x, 2 * x, x * x, x, x], axis=1)  # (batch, 5, D)
    dims = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        x, p["window"], (2,), [(1, 2)], (2,), (2,), dimension_numbers=dims
    )


def weight_and_array(p, x):
    return x @ (p["w"] + jnp.sin(x).T @ x) + x @ (1 - p["w"])


def fused_projections(p, x):
    fused = jnp.concatenate([p["w"], p["table"].T, jnp.ones((D, 2))], axis=1)
    y = x @ jnp.concatenate([fused, jnp.roll(fused, 3, axis=1)], axis=1)
    return y[:, :D] @ jnp.concatenate([p["w"][:1], p["table"][1:D]])


def stacked_here(p, x):
    step = lambda c, w: (jnp.sin(c @ w), None)
    return lax.scan(step, x, jnp.stack([p["w"], p["table"][:D]]))[0]


def unstacked(p, x):
    for w in jnp.unstack(p["stack"]):
        x = x @ w
    return x


def swapped_each_time(p, x):
    body = lambda c, _: ((jnp.sin(c[0] @ c[1]), c[2], c[1] / 2), None)
    return lax.scan(body, (x, p["w"], p["table"][:D]), length=3)[0][0]


def ragged_experts(p, x):
    return lax.ragged_dot(x, p["stack"], jnp.array([1, 2]))


def ragged_rows_of_many(p, x):
    """Multiplies a batch of rows; the weight's dimensions are in a permuted order."""
    dims = lax.RaggedDotDimensionNumbers((((2,), (2,)), ((0,), (1,))), (1,), (0,))
    x = jnp.stack([x, jnp.sin(x)])  # (2, BATCH, D)
    w = jnp.swapaxes(jnp.stack([p["stack"], p["stack"][::-1]]), 0, 1)
    return lax.ragged_dot_general(x, w, jnp.array([[1, 2], [2, 1]]), dims)


def grouped_convolution(p, x, groups=2):
    x = jnp.stack([x, 2 * x, x * x, x, x], axis=1)  # (batch, 5, D)
    dims = ("NWC", "WIO", "NWC")
    w = p["window"][:, : D // groups]
    return lax.conv_general_dilated(
        *(x, w, (1,), "SAME"), dimension_numbers=dims, feature_group_count=groups
    )


def on_devices(p, x):
    """Splits one weight by rows, another by columns, and replicates the layers."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))

    def local(x, columns, rows, stack):
        y = lax.psum(jnp.sin(x @ columns) @ rows, "d")
        return lax.scan(lambda c, w: (jnp.sin(c @ w), None), y, stack)[0]

    specs = P(), P(None, "d"), P("d"), P()
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    return mapped(x, p["w"], p["table"][:D], p["stack"])


def on_each_device(p, x):
    return jax.pmap(lambda x, w: jnp.sin(x @ w), in_axes=(0, None))(x[:2, None], p["w"])


def per_example(p, x):
    return jax.vmap(lambda x: jnp.sin(x @ p["w"]))(x)


def inner_gradient(p, x):
    return jax.grad(lambda x: jnp.sin(x @ p["w"]).sum())(x)


def stopped(p, x):
    return jnp.sin(x @ lax.stop_gradient(p["w"])) + x @ p["w"]


FACTORED = {
    "product": lambda p, x: x @ p["w"],
    "transposed": lambda p, x: x @ p["w"].T,
    "weight on the left": lambda p, x: p["w"] @ x.T,
    "vector": lambda p, x: x[0] @ p["w"],
    "more dimensions": lambda p, x: jnp.stack([x, x]) @ p["w"],
    "attention": attention,
    "full contraction": lambda p, x: jnp.einsum("bd,dnh->b", x, p["heads"]),
    "double contraction": lambda p, x: jnp.einsum("dn,dn", x[:, :3].T @ x, p["w"][:3]),
    "experts": experts,
    "batched experts": lambda p, x: jnp.einsum(
        "ebd,edh->ebh", jnp.stack([x, x]), p["stack"]
    ),
    "merged heads": merged_heads,
    "read in another order": lambda p, x: (
        x @ lax.reshape(p["heads"], (D, 6), (0, 2, 1))
    ),
    "split heads": split_heads,
    "scalars": lambda p, x: x @ (-2.0 * p["w"] / 3.0),
    "broadcast": lambda p, x: jnp.stack([x, x]) @ jnp.broadcast_to(p["w"], (2, D, D)),
    "lookup": lambda p, x: jnp.take(p["table"], IDS, axis=0),
    "indexing": lambda p, x: p["table"][IDS],
    "row": lambda p, x: p["table"][2],
    "column lookup": lambda p, x: jnp.take(p["w"], IDS % D, axis=1),
    "out of bounds": lambda p, x: jnp.take(p["table"], IDS + 3, axis=0, mode="clip"),
    "filled": lambda p, x: p["table"].at[IDS + 3].get(mode="fill", fill_value=7.0),
    "tied head": lambda p, x: jnp.sin(p["table"][IDS]) @ p["table"].T,
    "windows": windows,
    "along an axis": lambda p, x: jnp.take_along_axis(p["w"][:2], IDS % D, axis=1),
    "along layers": lambda p, x: jnp.take_along_axis(
        p["stack"], IDS[:, :, None] % D, 1
    ),
    "row of a layer": lambda p, x: p["stack"][1, IDS % D],
    "layer by layer": layer_by_layer,
    "chosen layer": chosen_layer,
    "expert of each example": per_example_expert,
    "fused": lambda p, x: (x @ jnp.split(p["w"], [1], axis=1)[1]) * 2.0,
    "slices": lambda p, x: x[:, 1:] @ p["w"][1:, ::2],
    "weight and array": weight_and_array,
    "scaled by a traced scalar": lambda p, x: x @ (p["w"] * x.sum() / x[0, 0]),
    "two weights summed": lambda p, x: x @ (p["w"] - p["table"][:D]),
    "fused projections": fused_projections,
    "stacked here": stacked_here,
    "unstacked": unstacked,
    "turned round": lambda p, x: x @ p["w"][::-1],
    "padded": lambda p, x: x[:, :3] @ jnp.pad(p["w"], ((1, 0), (2, 1)))[1:4],
    "tiled": lambda p, x: x @ jnp.tile(p["w"], (2, 3))[D:],
    "repeated": lambda p, x: x @ jnp.repeat(p["w"], 3, axis=1),
    "ragged experts": ragged_experts,
    "ragged rows of many": ragged_rows_of_many,
    "convolution": convolution,
    "grouped convolution": grouped_convolution,
    "each channel by itself": functools.partial(grouped_convolution, groups=D),
    "jit": jax.jit(lambda p, x: jnp.sin(x @ p["w"])),
    "jitted view": lambda p, x: x @ jax.jit(lambda w: w.T)(p["w"]),
    "remat": remat_with_policy,
    "scan over nothing": scan_constant,
    "scan over layers": scan_stacked,
    "scan in reverse": scan_reversed,
    "scan over rows": scan_over_inputs,
    "carried": scan_carried,
    "swapped each time": swapped_each_time,
    "loop": loop,
    "carried by a loop": lambda p, x: lax.fori_loop(
        0, 3, lambda i, c: (jnp.tanh(c[0] @ c[1]), -c[1]), (x, p["w"])
    )[0],
    "on devices": on_devices,
    "on each device": on_each_device,
    "scaled by inputs": lambda p, x: lax.scan(
        lambda c, t: ((jnp.sin(c[0] @ c[1]), c[1] * t), None),
        (x, p["w"]),
        jnp.arange(3.0),
    )[0][0],
    "no steps": lambda p, x: (
        x @ lax.scan(lambda w, t: (w, t), p["w"], jnp.zeros((0, 2)))[0]
    ),
    "branch": branch,
    "branch of a platform": lambda p, x: lax.platform_dependent(
        x, p["w"], tpu=lambda x, w: x @ w.T, default=lambda x, w: x @ w
    ),
    "no rows": lambda p, x: x[:, :0] @ lax.pad(p["w"], 0.0, [(-D, 0, 0), (0, 0, 0)]),
    "vmap": per_example,
    "inner gradient": inner_gradient,
    "slope of a convolution": lambda p, x: jax.grad(
        lambda x: jnp.sin(convolution(p, x)).sum()
    )(x),
    "stop_gradient": stopped,
}
# These stay factored except in their derivative rules, which take materialized weights.
CUSTOM = {
    "custom_vjp": lambda p, x: jnp.sin(straight_through(p["w"], x)),
    "custom_vjp with symbolic zeros": lambda p, x: jnp.sin(
        with_symbolic_zeros(p["w"], x, lax.stop_gradient(jnp.cos(x[0, 0])))
    ),
    "custom_jvp": lambda p, x: jnp.sin(tripled_gradient(p["w"], x)),
}
NO_GRADIENT = {"loop", "carried by a loop"}
MATERIALIZED = {
    "norm": lambda p, x: jnp.sqrt((p["w"] ** 2).sum()),
    "elementwise": lambda p, x: x @ jnp.tanh(p["w"]),
    "sorted": lambda p, x: jnp.sort(p["w"], axis=0),
    "two weights": lambda p, x: x @ (p["w"] @ p["table"].T),
    "squared": lambda p, x: x @ (p["w"] @ p["w"]),
    "changed by inputs": lambda p, x: lax.scan(
        lambda c, t: ((jnp.sin(c[0] @ c[1]), jnp.tanh(c[1] * t)), None),
        (x, p["w"]),
        jnp.arange(3.0),
    )[0][0],
    "positions": lambda p, x: jnp.sin(x + p["table"][:BATCH]),
    "changed by a loop": lambda p, x: lax.scan(
        lambda c, _: ((x @ c[1], jnp.tanh(c[1])), None), (x, p["w"]), length=3
    )[0][0],
    "in and out merged": lambda p, x: p["w"].reshape(-1),
    "returned": lambda p, x: p["w"],
    "scanned out": lambda p, x: lax.scan(lambda c, w: (c, w), 0, p["stack"])[1],
}


def lora(fn, **options):
    """Returns `lj.lora(fn)` for a program that uses only some of the weights."""
    return lj.lora(fn, unused="ignore", **options)


def loss(fn):
    """Returns a scalar function of every array that `fn` returns."""

    def total(params, x):
        leaves = jax.tree.leaves(fn(params, x))
        return sum(
            jnp.cos(y + i).sum() for i, y in enumerate(leaves) if jnp.ndim(y) >= 0
        )

    return total


def gradients(fn, params, x):
    """Returns the gradients of the adapters and the input."""
    adapters, base = lj.split(params)
    return jax.grad(lambda a, x: fn(lj.combine(a, base), x), argnums=(0, 1))(
        adapters, x
    )


def on_merged(fn):
    """Returns the oracle as one program; its fifty operations would compile slowly."""
    return jax.jit(lambda params, x: fn(lj.merge(params), x))


@pytest.mark.parametrize("name", FACTORED)
def test_lora_equals_merged_without_materializing(name, params, close):
    """Compares values, and gradients if the program has them, in one compilation."""
    fn = FACTORED[name]
    adapted = lora(fn, materialize="error")

    @jax.jit
    def both(params, x):
        values = adapted(params, x), fn(lj.merge(params), x)
        if name in NO_GRADIENT:
            return values, ({}, {})
        return values, tuple(
            gradients(loss(f), params, x) for f in (adapted, on_merged(fn))
        )

    values, grads = both(params, X)
    close(*values)
    close(*grads, atol=1e-4)


@pytest.mark.parametrize("name", MATERIALIZED)
def test_lora_materializes_exactly_with_a_warning(name, params, close):
    fn = MATERIALIZED[name]
    with pytest.warns(UserWarning, match=r"which needs W . scale"):
        jax.eval_shape(lora(fn), params, X)
    allowed = lora(fn, materialize="allow")

    @jax.jit
    def both(params, x):
        fns = allowed, on_merged(fn)
        values = [f(params, x) for f in fns]
        return values, [gradients(loss(f), params, x) for f in fns]

    values, grads = both(params, X)
    close(*values)
    close(*grads, atol=1e-4)
    with pytest.raises(ValueError, match=r"^'\w+' meets .* so it cannot stay factored"):
        lora(fn, materialize="error")(params, X)


@pytest.mark.parametrize("name", CUSTOM)
def test_lora_materializes_only_in_derivatives_of_custom_rules(name, params, close):
    fn = CUSTOM[name]
    strict, merged = lora(fn, materialize="error"), on_merged(fn)
    close(strict(params, X), merged(params, X))
    want = jax.jit(functools.partial(gradients, loss(merged)))(params, X)
    with pytest.raises(ValueError, match="'w' meets 'derivative of custom_"):
        gradients(loss(strict), params, X)
    for adapted in (lora(fn), jax.jit(lora(fn))):  # `jit` warns after tracing
        with pytest.warns(UserWarning, match="'w' meets 'derivative of custom_.*py:"):
            got = gradients(loss(adapted), params, X)
        close(got, want, atol=1e-4)


def test_lora_on_a_jitted_custom_rule_with_varying_perturbed_operands(
    randomized, close
):
    """Calls the rule first on a perturbed hidden state, then on a constant."""
    base = {name: jnp.eye(D) / (i + 1) for i, name in enumerate("uwv")}
    params = randomized(lj.lorafy(base, 2, targets="*"))
    layer = jax.jit(straight_through)

    def fn(p, x):
        return layer(p["w"], jnp.sin(x @ p["u"])) + layer(p["v"], jnp.cos(X))

    f = loss(lora(fn, materialize="allow"))
    want = jax.jit(jax.grad(loss(on_merged(fn))))(params, X)
    close(jax.grad(f)(params, X), want, atol=1e-4)


def test_lora_with_two_pullbacks_of_one_jitted_function(params, close):
    def two(f):
        y, back = jax.vjp(f, params, X)
        _, other = jax.vjp(lambda x: f(params, x), X)
        return back(y)[0]["w_lora_a"], other(y)

    fn = CUSTOM["custom_vjp"]
    got = two(jax.jit(lora(fn, materialize="allow")))
    close(got, jax.jit(lambda: two(on_merged(fn)))(), atol=1e-4)


def residuals_by_perturbed_operands():
    """Returns a rule whose residual tree depends on which operands are perturbed."""
    f = jax.custom_vjp(lambda w, x: jnp.sin(x @ w))

    def forward(w, x):
        saved = {"w": w.value} if x.perturbed else {}
        saved |= {"x": x.value} if w.perturbed else {}
        return f(w.value, x.value), (jnp.cos(x.value @ w.value), saved)

    def backward(residuals, g):
        slope, saved = residuals
        by_w = saved["x"].T @ (g * slope) if "x" in saved else None
        return by_w, (g * slope) @ saved["w"].T if "w" in saved else None

    f.defvjp(forward, backward, symbolic_zeros=True)
    return lambda p, x: f(p["w"], x)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda fn: lora(fn, materialize="allow"),
        lambda fn: lora(jax.jit(fn), materialize="allow"),
        lambda fn: jax.jit(lora(fn, materialize="allow")),
        lambda fn: jax.jit(lora(jax.jit(fn), materialize="allow")),
    ],
)
def test_lora_on_a_rule_whose_residuals_depend_on_what_is_perturbed(
    wrap, late, params, close
):
    """Linearizes one function in its parameters, in its inputs, and in both."""

    def ways(f):
        yield jax.vjp(lambda x: f(params, x), X)
        yield jax.vjp(lambda p: f(p, X), params)
        yield jax.vjp(f, params, X)
        yield jax.vjp(lambda x: f(params, x), X)

    made = ways(wrap(residuals_by_perturbed_operands()))
    made = list(made) if late else made
    got = [pullback(y) for y, pullback in made]
    fn = lambda p, x: jnp.sin(x @ p["w"])
    want = jax.jit(lambda: [back(y) for y, back in ways(on_merged(fn))])()
    close(got, want, atol=1e-4)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_lora_on_a_custom_rule_that_closes_over_an_argument(wrap, params, close):
    def fn(p, x, labels):
        @jax.custom_vjp
        def error(logits):
            return ((logits - labels) ** 2).sum()

        error.defvjp(lambda z: (error(z), z), lambda z, g: (g * (z - labels) * p["s"],))
        return error(x @ p["w"])

    tree = params | {"s": jnp.full((D,), 3.0)}
    merged = lambda p, x, labels: fn(lj.merge(p), x, labels)
    with jax.numpy_rank_promotion("allow"):
        got = wrap(jax.grad(lambda a: lora(fn)(a | rest(tree), X, X + 1)))(own(tree))
        want = jax.grad(lambda a: merged(a | rest(tree), X, X + 1))(own(tree))
    close(got, want, atol=1e-4)


def own(tree):
    return {name: tree[name] for name in ("w_lora_a", "w_lora_b")}


def rest(tree):
    return {name: x for name, x in tree.items() if name not in own(tree)}


def test_lora_counts_a_weight_as_used_that_only_a_derivative_reads(params, close):
    f = jax.custom_vjp(lambda w, x: jnp.sin(x))
    f.defvjp(lambda w, x: (f(w, x), (w, x)), lambda s, g: (s[1].T @ g, g @ s[0].T))
    tree = {name: x for name, x in params.items() if name.split("_")[0] == "w"}
    fn = lambda p, x: f(p["w"], x).sum()
    adapted = lj.lora(fn, materialize="allow")
    got = jax.grad(adapted, argnums=(0, 1))(tree, X)
    close(got, jax.grad(on_merged(fn), argnums=(0, 1))(tree, X), atol=1e-4)


def test_lora_warns_of_the_right_weight_in_a_shared_jitted_view(randomized):
    """A cached call names the operand of each call, not that of the first one."""
    base = {name: jnp.eye(D) for name in "uw"}
    params = randomized(lj.lorafy(base, 2, targets="*"))
    view = jax.jit(lambda v: v.T)
    inner = jax.jit(lambda v: jnp.tanh(view(v)))
    fn = lambda p, x: x @ view(p["u"]) + x @ jnp.tanh(view(p["w"])) + x @ inner(p["w"])
    for _ in range(2):
        with pytest.warns(UserWarning) as caught:
            lj.lora(fn)(params, X)
        (message,) = (str(w.message) for w in caught)
        assert "'w' meets 'tanh'" in message and "'u'" not in message


def test_lora_evaluates_nested_loops_once_each(params):
    def nest(depth, x, w):
        if depth:
            step = lambda i, s: nest(depth - 1, *s)
            return lax.fori_loop(0, 2, step, (x, w))
        return jnp.sin(x @ w), w * 0.9

    def steps(depth):
        calls = 0

        def counted(*args):
            nonlocal calls
            calls += 1
            return original(*args)

        original, loops.run_jaxpr = loops.run_jaxpr, counted
        try:
            fn = lambda p, x: nest(depth, x, p["w"])[0]
            jax.eval_shape(lora(fn, materialize="error"), params, X)
        finally:
            loops.run_jaxpr = original
        return calls

    assert steps(6) < 6 * steps(2)


def test_lora_applies_no_dropout_in_custom_rules(params, close):
    """A custom derivative rule cannot apply the mask, so no pass applies it."""
    fn = lambda p, x: CUSTOM["custom_vjp"](p, x)
    dropped = lora(fn, dropout=0.5, materialize="allow")
    key = jax.random.key(0)
    with_key = loss(lambda p, x: dropped(p, x, dropout_key=key))
    got = gradients(with_key, params, X)
    close(got, gradients(loss(on_merged(fn)), params, X), atol=1e-4)
    close(dropped(params, X, dropout_key=key), fn(lj.merge(params), X))


def test_lora_keeps_casts_factored(params):
    low = lambda x: x.astype(jnp.bfloat16)
    fn = lambda p, x: low(x) @ low(p["w"]) + low(p["table"])[IDS[:, :1]].sum(0)
    got, want = lora(fn, materialize="error")(params, X), fn(lj.merge(params), X)
    assert got.dtype == want.dtype == jnp.bfloat16
    np.testing.assert_allclose(*(y.astype(np.float32) for y in (got, want)), atol=0.1)


def rounded(dtype):
    return lambda w: w.astype(dtype).astype(jnp.float32)


HALF, BYTE = rounded("bfloat16"), rounded("float8_e4m3fn")
ROUNDED = {
    "float8": lambda p, x: x @ BYTE(p["w"]),
    "reduce_precision": lambda p, x: x @ lax.reduce_precision(p["w"], 5, 2),
    "straight through": lambda p, x: (
        x @ (p["w"] + lax.stop_gradient(HALF(p["w"]) - p["w"]))
    ),
    "rounding error": lambda p, x: 100 * x @ (p["w"] - jax.jit(HALF)(p["w"])),
    "one step in a call": lambda p, x: (
        100 * x @ (p["w"] - jax.jit(lambda w: w.astype("float16"))(p["w"]).astype("f4"))
    ),
    "rounding error of some columns": lambda p, x: (
        100 * x @ (p["w"] - jnp.where(x[0] < 9, HALF(p["w"]), 0.0))
    ),
    "rounded rounding error": lambda p, x: 100 * x @ HALF(p["w"] - HALF(p["w"])),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_lora_materializes_a_weight_whose_rounding_is_observable(name, params):
    fn = ROUNDED[name]
    with pytest.warns(UserWarning, match="'w' meets 'convert_|'w' meets 'reduce_"):
        got = lora(fn)(params, X)
    # Not in one program, in which XLA may leave out casts to a narrower dtype.
    np.testing.assert_allclose(got, fn(lj.merge(params), X), atol=2e-4)
    gradient = lambda fn: jax.grad(lambda p: fn(p, X).sum())(params)["w_lora_b"]
    got, want = gradient(lora(fn, materialize="allow")), gradient(on_merged(fn))
    np.testing.assert_allclose(got, want, atol=1e-2)


def on_two_devices(fn):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(fn, mesh=mesh, in_specs=(P(), P()), out_specs=(P(), P()))


def in_a_scan(fn):
    step = lambda w: lambda carry, x: (carry, fn(w, x))
    return lambda w, x: [y[0] for y in lax.scan(step(w), 0, jnp.stack([x]))[1]]


RETURNED_FROM = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "scan": in_a_scan,
    "carry": lambda fn: (
        lambda w, x: lax.scan(
            lambda carry, _: (fn(w, x), None), fn(jnp.zeros_like(w), x), length=2
        )[0]
    ),
    "cond": lambda fn: lambda w, x: lax.cond(x[0, 0] > 0, fn, fn, w, x),
    "shard_map": on_two_devices,
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize("name", RETURNED_FROM)
def test_lora_rounds_a_weight_exactly_that_a_call_returns(name, wrap, params, close):
    """Inside a call the uses of a returned weight are unknown."""
    call, byte = RETURNED_FROM[name], lambda w: lax.stop_gradient(BYTE(w))

    def step(p, x):
        y, q = call(lambda w, x: (x @ w, w.astype("bfloat16")))(p["w"], x)
        return y + 100 * x @ (p["w"] - lax.stop_gradient(q.astype("float32")))

    def difference(p, x):
        y, error = call(lambda w, x: (x @ w, w - byte(w)))(p["w"], x)
        return y + 100 * x @ lax.stop_gradient(HALF(error))

    def results(params, x, run):
        fns = run(step), run(difference)
        values = [f(params, x) for f in fns]
        return values, [gradients(loss(f), params, x) for f in fns]

    adapted = functools.partial(lora, materialize="allow")
    values, grads = wrap(functools.partial(results, run=adapted))(params, X)
    want = jax.jit(functools.partial(results, run=on_merged))(params, X)
    close(values, want[0], atol=2e-4)
    close(grads, want[1], atol=1e-2)


def test_lora_computes_an_update_in_the_precision_of_its_product(params):
    """The activation is bfloat16, the weight and the result are float32."""
    x = X.astype(jnp.bfloat16)
    fn = lambda p, x: jnp.matmul(x, p["w"], preferred_element_type=jnp.float32)
    value = lambda fn: lambda p: jnp.sum(fn(p, x) ** 2)
    got = jax.value_and_grad(value(lora(fn)))(params)
    want = jax.value_and_grad(value(on_merged(fn)))(params)
    check = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    jax.tree.map(check, got, want)


@jax.custom_vjp
def product(w, x):
    return x @ w


product.defvjp(
    lambda w, x: (product(w, x), (w, x)),
    lambda saved, g: (saved[1].T @ g, g @ saved[0].T),
)


@jax.jit
def in_float64(w, x):
    w, x = w.astype(jnp.float64), x.astype(jnp.float64)
    return (jax.nn.relu(x @ w) + product(w, x)).astype(jnp.float32)


# JAX warns in the derivatives of plain products too.
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype:UserWarning")
def test_lora_on_float64_within_a_function(params, close):
    def wide(p, x):
        with jax.enable_x64(True):
            w, x = p["w"].astype(jnp.float64), x.astype(jnp.float64)
            return jnp.sin(x @ w), in_float64(p["w"], x)

    got, want = lora(wide)(params, X), wide(lj.merge(params), X)
    assert got[0].dtype == want[0].dtype == jnp.float64
    close(got, want)
    narrow = lambda p, x: wide(p, x)[1]
    got = gradients(loss(lora(narrow, materialize="allow")), params, X)
    close(got, gradients(loss(on_merged(narrow)), params, X), atol=1e-4)


@pytest.mark.parametrize("moved", ["device", "sharding", "space", "sharded"])
def test_lora_moves_factors_with_their_weight(moved, close):
    """Moves a weight from the host's memory, or from another device."""
    here, there = jax.devices()[:2]
    sharding = jax.sharding.SingleDeviceSharding(here)
    if moved == "sharded":
        mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, P(None, "x"))
    start = sharding.with_memory_kind("pinned_host")
    start, end = {
        "device": (here, there),
        "sharding": (start, sharding),
        "space": (start, jax.memory.Space.Device),
        "sharded": (start, sharding),
    }[moved]
    w = jax.device_put(np.eye(D, dtype=np.float32), start)
    params = lj.lorafy({"w": w}, 2, targets="*")
    params["w_lora_b"] = params["w_lora_b"] + 1
    at = NamedSharding(mesh, P()) if moved == "sharded" else here
    x = jax.device_put(X, there if moved == "device" else at)
    fn = lambda p, x: x @ jax.device_put(p["w"], end)
    merged = np.eye(D) + params["w_lora_a"] @ params["w_lora_b"] / 2 * 2
    adapted = lora(fn, materialize="error")
    for run in (adapted,) if moved == "device" else (adapted, jax.jit(adapted)):
        np.testing.assert_allclose(run(params, x), X @ merged, atol=1e-5)


HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
OFFLOADED = {
    "product": lambda w, x: x @ jax.device_put(w, DEVICE),
    "materialized": lambda w, x: x @ jnp.tanh(jax.device_put(w, DEVICE)),
    "returned": lambda w, x: w,
    "there and back": lambda w, x: (
        x @ jax.device_put(jax.device_put(2 * jax.device_put(w, DEVICE), HOST), DEVICE)
    ),
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
@pytest.mark.parametrize("name", OFFLOADED)
def test_lora_gradients_of_an_offloaded_weight(name, wrap, randomized, close):
    if name == "there and back" and wrap is jax.jit:
        pytest.skip("JAX has no derivative of it under jit")
    host = jax.sharding.SingleDeviceSharding(
        jax.devices()[0], memory_kind="pinned_host"
    )
    w = jax.device_put(np.eye(D, dtype=np.float32), host)
    params = randomized(lj.lorafy({"w": w}, 2, targets="*"))
    fn = lambda p, x: OFFLOADED[name](p["w"], x)

    def gradient(f):
        value = lambda p: jnp.sin(jax.device_put(f(p, X), DEVICE)).sum()
        return wrap(jax.grad(value))(params)

    # Not under `jit`, where JAX loses the memory space of the derivatives.
    merged = lambda p, x: fn(lj.merge(p), x)
    got, want = gradient(lora(fn, materialize="allow")), gradient(merged)
    assert got["w"].sharding.memory_kind == want["w"].sharding.memory_kind
    close(got, want)


def rolls(w, n):
    for _ in range(n):
        w = jnp.roll(w, 1, 0)
        w = w + jnp.flip(w, 1)
    return w


def folds(w, n):
    for _ in range(n):
        w = w + w.T
    return w


@pytest.mark.parametrize(
    ("fn", "warns"),
    [
        (lambda w, x: x @ rolls(w, 4), False),
        (lambda w, x: x @ sum(k * jnp.roll(w, k, 1) for k in range(3)), False),
        (lambda w, x: x @ (w - w.mean(0, keepdims=True)), False),
        (lambda w, x: w[jnp.arange(64) % 16], False),
        (lambda w, x: jnp.tensordot(x[0], w, 0), False),
        (lambda w, x: x @ folds(w, 6), True),
    ],
)
def test_lora_costs_no_more_than_the_materialized_weight(fn, warns, close, randomized):
    """Views of one weight share a factor; a sum with a large rank is materialized."""
    x = np.ones((64, 16), np.float32)
    params = randomized(lj.lorafy({"w": jnp.ones((16, 16)) / 8}, 4, targets="*"))
    fn = functools.partial(lambda fn, p, x: fn(p["w"], x), fn)
    runs = [
        jax.jit(run).lower(params, x).compile()
        for run in (lora(fn, materialize="allow"), on_merged(fn))
    ]
    flops, most = (run.cost_analysis()["flops"] for run in runs)
    assert flops <= 2 * most
    close(*(run(params, x) for run in runs), 1e-4)
    if warns:
        with pytest.warns(UserWarning, match="'w' meets 'add'"):
            jax.eval_shape(lora(fn), params, x)
    else:
        jax.eval_shape(lora(fn, materialize="error"), params, x)


def test_lora_exports_with_a_symbolic_batch_and_vocabulary(randomized, close):
    batch, vocab = jax.export.symbolic_shape("batch, vocab")
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    tree = {
        "w": struct(D, vocab),
        "w_lora_a": struct(D, 2),
        "w_lora_b": struct(2, vocab),
        "w_lora_scale": struct(),
    }
    fn = lambda p, x: jnp.sin(x @ p["w"]) @ p["w"].T
    step = jax.value_and_grad(lambda p, x: lora(fn, materialize="error")(p, x).sum())
    run = jax.export.export(jax.jit(step))(tree, struct(batch, D))
    params = randomized(lj.lorafy({"w": jnp.ones((D, 5))}, 2, targets="*"))
    want = jax.value_and_grad(lambda p, x: fn(lj.merge(p), x).sum())(params, X)
    got = run.call(params, X)
    close(got, want)


def model(p, x):
    h = jnp.sin(x @ p["w"])
    h = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), h, p["stack"])[0]
    return h @ p["table"].T


ADAPTED = functools.partial(lora(model, materialize="error"))


def test_lora_under_jit_and_vmap(params, close):
    want = on_merged(model)(params, X)
    close(jax.jit(ADAPTED)(params, X), want)
    close(jax.vmap(ADAPTED, in_axes=(None, 0))(params, X), want)
    halved = jax.tree.map(lambda x: np.asarray(x) / np.float32(2), params)
    both = jax.tree.map(lambda *x: np.stack(x), params, halved)
    got = jax.jit(jax.vmap(ADAPTED, in_axes=(0, None)))(both, X)
    close(got[1], on_merged(model)(halved, X))


def test_lora_in_forward_mode_and_second_derivatives(params, close):
    adapters, base = lj.split(params)
    direction = jax.tree.map(jnp.ones_like, adapters)

    def derivatives(fn):
        scalar = lambda a: fn(lj.combine(a, base), X).sum()
        slope = lambda a: jax.jvp(scalar, (a,), (direction,))[1]
        return (
            slope(adapters),
            jax.grad(slope)(adapters),
            jax.jvp(jax.grad(scalar), (adapters,), (direction,)),
        )

    fns = ADAPTED, on_merged(model)
    close(*jax.jit(lambda: [derivatives(fn) for fn in fns])(), atol=1e-3)


def test_lora_inside_scan_and_remat(params, close):
    def repeated(fn):
        step = jax.checkpoint(lambda x, _: (fn(params, x)[:, :D], None))
        return lambda params, x: lax.scan(step, x, length=2)[0]

    got = jax.grad(lambda x: repeated(ADAPTED)(params, x).sum())(X)
    close(got, jax.grad(lambda x: repeated(on_merged(model))(params, x).sum())(X))


def test_lora_traces_the_function_once(params):
    counted = chex.assert_max_traces(model, n=1)
    step = jax.jit(jax.grad(lambda p, x: lora(counted)(p, x).sum()))
    step(params, X)
    step(lj.combine(*lj.split(params)), X + 1)
    new_scale = params | {"w_lora_scale": jnp.float32(0.1)}
    step(new_scale, X)


def test_lora_of_a_jitted_function_compiles_once(params):
    compiled = []
    adapted = lora(jax.jit(model))
    adapted(params, X)
    name = "/jax/core/compile/backend_compile_duration"
    listener = lambda event, *_, **__: compiled.append(event == name)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        adapted(params, X)
        assert not any(compiled)
        adapted(params, X[:2])
        assert any(compiled)  # a new shape compiles, so the listener works
    finally:
        jax.monitoring.clear_event_listeners()


def test_lora_never_multiplies_the_factors():
    """XLA counts the FLOPs of two low-rank products, not those of A times B."""
    tokens, d_in, d_out, r = 8, 64, 96, 2
    base = {"kernel": jnp.ones((d_in, d_out))}
    params, x = lj.lorafy(base, r), jnp.ones((tokens, d_in))
    fn = lambda p, x: x @ p["kernel"]
    flops = lambda fn, p: jax.jit(fn).lower(p, x).compile().cost_analysis()["flops"]
    added = flops(lj.lora(fn), params) - flops(fn, base)
    low_rank = 2 * tokens * r * (d_in + d_out)
    most = 1.2 * low_rank + r * d_out + tokens * d_out
    assert low_rank <= added < most < 2 * d_in * r * d_out


def test_lora_passes_other_arguments_and_results_through(randomized, close):
    class Tag:
        pass

    tag = Tag()

    def fn(p, x, *, flag, scale, method=None, nothing=None, seed):
        assert flag is True and isinstance(scale, float) and nothing is None
        y = scale * (x @ p["kernel"]) + jax.random.normal(seed, ())
        return {"y": y, "tag": method, "n": 3, "host": np.arange(2), "none": None}

    params = randomized(lj.lorafy({"kernel": jnp.ones((D, D))}, 2))
    options = {"flag": True, "scale": 2.0, "method": tag, "seed": jax.random.key(0)}
    got, want = lj.lora(fn)(params, X, **options), fn(lj.merge(params), X, **options)
    assert got["tag"] is tag and got["n"] == 3 and got["none"] is None
    assert isinstance(got["host"], np.ndarray)
    close(got["y"], want["y"])


def test_lora_with_argnums(randomized, close):
    base = {"kernel": jnp.ones((D, D))}
    p, q = (randomized(lj.lorafy(base, 2), seed) for seed in (1, 2))
    fn = lambda x, p, q: x @ p["kernel"] @ q["kernel"]
    want = fn(X, lj.merge(p), lj.merge(q))
    close(lj.lora(fn, argnums=(1, 2))(X, p, q), want)
    close(lj.lora(fn, argnums=np.array([1, 2])[0])(X, p, lj.merge(q)), want)
    close(lj.lora(fn, argnums=-1)(X, lj.merge(p), q), want)
    with pytest.raises(TypeError, match="argnums=3 names no argument: the call has 3"):
        lj.lora(fn, argnums=3)(X, p, q)
    with pytest.raises(ValueError, match="argnums is empty"):
        lj.lora(fn, argnums=())


def test_lora_refuses_adapters_in_another_argument(randomized, close):
    p = randomized(lj.lorafy({"kernel": jnp.ones((D, D))}, 2))
    fn = lambda policy, reference, x: x @ policy["kernel"] - x @ reference["kernel"]
    with pytest.raises(
        ValueError, match=r"Argument 1 has adapters too.*argnums=\(..., 1"
    ):
        lj.lora(fn)(p, p, X)
    close(lj.lora(fn, argnums=(0, 1))(p, p, X), jnp.zeros((BATCH, D)))
    base = lj.strip(p)
    close(lj.lora(fn)(p, base, X), fn(lj.merge(p), base, X))


def test_lora_refuses_an_unused_adapter(params):
    fn = jax.jit(lambda p, x: (x @ p["w"], p["heads"].shape))
    with pytest.raises(ValueError, match=r"never uses 4 .* 'heads', 'stack', 'table'"):
        lj.lora(fn)(params, X)
    lj.lora(fn, unused="ignore")(params, X)


def test_lora_refuses_an_adapter_that_is_unused_inside_calls(randomized):
    base = {"a": {"kernel": jnp.ones((D, D))}, "b": {"kernel": jnp.ones((D, D))}}
    params = randomized(lj.lorafy(base, 2))

    def fn(p, x):
        body = lambda c, _: (c @ p["a"]["kernel"], (c @ p["b"]["kernel"]).shape)
        ignored = jax.checkpoint(lambda w: w.sum())(p["b"]["kernel"])
        del ignored
        return lax.cond(True, lambda x: x, lambda x: lax.scan(body, x, length=2)[0], x)

    with pytest.raises(ValueError, match=r"never uses 1 adapted weight.* 'b/kernel'"):
        lj.lora(fn)(params, X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), found 1.0"),
        ({"unused": "warn"}, "unused must be 'error' or 'ignore', found 'warn'"),
        ({"materialize": True}, "materialize must be 'warn', 'error' or 'allow'"),
    ],
)
def test_lora_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        lj.lora(model, **options)


def test_lora_passes_the_key_to_a_function_with_that_argument(params):
    fn = lambda p, x, *, dropout_key=None: (x @ p["w"], dropout_key)
    key = jax.random.key(0)
    assert lora(fn)(params, X, dropout_key=key)[1] == key
    assert lora(fn, dropout=0.5)(params, X)[1] is None


def test_lora_keeps_the_names_of_scopes(params):
    def fn(p, x):
        with jax.named_scope("a_layer"):
            return x @ p["w"]

    text = jax.jit(lora(fn)).lower(params, X).as_text(debug_info=True)
    # Newer releases of JAX insert the name of the product's own jit.
    assert re.search(r"a_layer/(jit\(_dot_general\)/)?dot_general", text)


def test_lora_shares_one_compiled_function_for_equal_layers(params):
    layer = jax.jit(lambda w, x: jnp.sin(x @ w))
    fn = lambda p, x: layer(p["w"], layer(p["v"], x))
    params = lj.lorafy({"w": jnp.ones((D, D)), "v": jnp.ones((D, D))}, 2, targets="*")
    text = jax.jit(lj.lora(fn)).lower(params, X).as_text()
    assert text.count("func.func") == jax.jit(fn).lower(
        lj.strip(params), X
    ).as_text().count("func.func")


def test_lora_warns_once_for_a_call_with_all_source_lines(params):
    def fn(p, x):
        y = jnp.tanh(p["w"]).sum() + jnp.sort(p["w"], axis=0).sum()
        return y + sum(jnp.exp(w).sum() for w in p["stack"]) + p["table"].max()

    with pytest.warns(UserWarning, match="needs W . scale") as caught:
        lora(fn)(params, X)
    (warning,) = caught
    line = fn.__code__.co_firstlineno + 1
    text = str(warning.message)
    assert warning.filename == __file__
    for cause in ("'tanh'", "'sort'"):
        assert f"'w' meets {cause} at tests/test_lora.py:{line}; " in text
    assert f"'stack' meets 'exp' at tests/test_lora.py:{line + 1}; " in text
    assert "'table' meets 'reduce_max'" in text


def test_lora_keeps_the_order_and_count_of_effects(params):
    seen = []

    def fn(p, x):
        def body(c, w):
            jax.debug.callback(
                lambda n: seen.append(int(n)), jnp.int32(2), ordered=True
            )
            return jnp.sin(c @ w), None

        jax.debug.callback(lambda n: seen.append(int(n)), jnp.int32(1), ordered=True)
        x = lax.scan(body, jnp.sin(x @ p["w"]), p["stack"])[0]
        jax.debug.callback(lambda n: seen.append(int(n)), jnp.int32(3), ordered=True)
        return x

    for call in (lora(fn), jax.jit(lora(fn))):
        seen.clear()
        jax.block_until_ready(call(params, X))
        jax.effects_barrier()
        assert seen == [1, *[2] * LAYERS, 3]


def test_lora_of_a_function_without_adapted_weights_is_the_same_program(params):
    """XLA compiles the same program for `fn` and `lora(fn)`."""

    def fn(p, x):
        step = jax.checkpoint(lambda c, w: (jnp.sin(c @ w), c.sum()))
        y, sums = lax.scan(step, x, jnp.stack([p["plain"]] * 2))
        y = lax.cond(sums.sum() > 0, jax.nn.gelu, jax.nn.relu, y)
        return y, jnp.sort(y), jnp.where(y > 0, y, 0.0)

    tree = params | {"plain": jnp.ones((D, D))}
    base = {"plain": jnp.ones((D, D))}
    program = lambda f, p: jax.jit(f).lower(p, X).compile().as_text()
    strip = lambda text: re.sub(r", metadata=\{[^}]*\}|HloModule \S+", "", text)
    body = lambda text: strip(text).partition("\n\nFileNames")[0]
    assert body(program(lora(fn), tree)) == body(program(fn, base))


def test_lora_returns_materialized_weights_and_keeps_its_argument(params, close):
    """A function that changes its parameters changes only its own copy of the tree."""

    def fn(p, x):
        p["w"] = p["w"] * 2
        p["new"] = 1
        return x @ p["w"], {"w": p.pop("w"), "bias": p["bias"]}

    tree = params | {"bias": jnp.ones(D)}
    before = dict(tree)
    with pytest.warns(UserWarning, match=r"'w' meets 'return', which needs W . scale"):
        got = lora(fn)(tree, X)
    assert tree.keys() == before.keys()
    assert all(tree[name] is before[name] for name in tree)
    close(got, fn(lj.merge(tree), X))
    with pytest.raises(ValueError, match=r"'w' meets 'return', which needs W . scale"):
        lora(fn, materialize="error")(tree, X)


def test_lora_with_parameters_that_are_no_arrays(params, close):
    marks = {"name": "model", "depth": 3, "act": jnp.sin, "none": None, "rate": 0.5}

    def fn(p, x):
        assert p["name"] == "model" and isinstance(p["depth"], int)
        assert p["none"] is None
        for _ in range(p["depth"]):
            x = p["act"](x @ p["w"]) * p["rate"]
        return x

    tree = params | marks
    close(lora(fn)(tree, X), fn(lj.merge(tree), X))


def test_lora_of_an_impure_function_traces_once_per_call(params, close):
    calls = []

    def fn(p, x):
        calls.append(0)
        return x @ p["w"] if len(calls) % 2 else x @ p["w"].T

    w = lj.merge(params)["w"]
    close(lora(fn)(params, X), X @ w)
    close(lora(fn)(params, X), X @ w.T)
    assert len(calls) == 2


def test_lora_refuses_adapters_that_do_not_fit(params):
    broken = params | {"w_lora_a": jnp.ones((D + 1, 2))}
    with pytest.raises(ValueError, match="adapter of 'w' does not fit"):
        lora(model)(broken, X)
    with pytest.raises(ValueError, match="adapter of 'w' is broken: 'w_lora_b'"):
        lora(model)({k: x for k, x in params.items() if k != "w_lora_b"}, X)


def test_lora_refuses_parameters_without_adapters():
    with pytest.raises(ValueError, match=r"no adapters. Write params = lorafy"):
        lj.lora(model)({"w": jnp.ones((D, D))}, X)


def test_lora_applies_dropout_to_the_adapter_if_given_a_key(params, close):
    dropped = lora(model, dropout=0.5)
    close(dropped(params, X), ADAPTED(params, X))
    first, second = (dropped(params, X, dropout_key=jax.random.key(i)) for i in (0, 1))
    assert not np.allclose(first, second)
    close(dropped(params, X, dropout_key=jax.random.key(0)), first)
    silent = params | {n: jnp.zeros_like(x) for n, x in params.items() if "lora_b" in n}
    close(dropped(silent, X, dropout_key=jax.random.key(0)), ADAPTED(silent, X))
    none = lora(model)(params, X, dropout_key=jax.random.key(0))
    close(none, ADAPTED(params, X))


def test_lora_dropout_keeps_the_mean(params):
    fn = lambda p, x: x @ p["w"]
    dropped = lora(fn, dropout=0.3)
    keys = jax.random.split(jax.random.key(0), 4000)
    ys = jax.jit(jax.vmap(lambda key: dropped(params, X, dropout_key=key)))(keys)
    error = np.abs(ys.mean(0) - fn(lj.merge(params), X))
    assert (error < 5 * ys.std(0) / np.sqrt(len(keys)) + 1e-6).all()


def test_lora_dropout_differs_between_uses(params):
    def fn(p, x):
        first, second = x @ p["w"], x @ p["w"]
        steps = lax.scan(lambda c, _: (c, x @ p["w"]), 0, length=3)[1]
        return jnp.stack([first, second, *steps])

    ys = lora(fn, dropout=0.5)(params, jnp.ones((2, D)), dropout_key=jax.random.key(0))
    assert len({y.tobytes() for y in np.asarray(ys)}) == len(ys)
    assert len({y.tobytes() for y in np.asarray(ADAPTED(params, X))}) == BATCH


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(D, name="dense")(x)), None


class Stacked(nn.Module):
    """An embedding, scanned and rematerialized layers, and a tied head."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(VOCAB, D, name="embed")
        layers = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = layers(name="layers")(embed(ids), None)
        return embed.attend(x)


def test_lora_of_a_scanned_rematerialized_linen_model(randomized, close):
    base = jax.jit(Stacked().init)(jax.random.key(0), IDS)
    axes = {"params/layers/dense/kernel": lj.Axes((0,), (1,), (2,))}
    with pytest.raises(
        ValueError, match=r"'params/layers/dense/kernel'.*axes=find_axes"
    ):
        lj.lorafy(base, 2, targets=["kernel", "embedding"])
    params = lj.lorafy(base, 2, targets=["kernel", "embedding"], axes=axes)
    apply = lj.lora(Stacked().apply, materialize="error")
    close(apply(params, IDS), Stacked().apply(base, IDS), atol=0)
    params = randomized(params)
    close(apply(params, IDS), on_merged(Stacked().apply)(params, IDS))
    scalar = lambda fn: lambda p, ids: jnp.sin(fn(p, ids)).sum()
    adapters, half = lj.split(params)
    grad = lambda fn: jax.grad(lambda a: scalar(fn)(lj.combine(a, half), IDS))(adapters)
    close(grad(apply), grad(on_merged(Stacked().apply)), atol=1e-4)


def test_lora_with_boxed_parameters(close, randomized):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    dense = nn.Dense(D, kernel_init=init)
    params = randomized(lj.lorafy(dense.init(jax.random.key(0), X), 2))
    assert params["params"]["lora_a"].names == ("in", None)
    close(lj.lora(dense.apply)(params, X), dense.apply(lj.merge(params), X))


def test_lora_of_an_nnx_model(close, randomized):
    graph, state = nnx.split(nnx.Linear(D, D, rngs=nnx.Rngs(0)))
    fn = lambda state, x: nnx.merge(graph, state)(x)
    params = randomized(lj.lorafy(state, 2))
    assert isinstance(params["lora_a"], nnx.LoRAParam)
    close(lj.lora(fn)(params, X), fn(lj.merge(params), X))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_lora_with_sharded_parameters(kind, close):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((2, 8, 16)).astype(np.float32) / 4
    plain = {"up": jnp.asarray(up), "down": jnp.asarray(down.T)}
    sharded = {"up": put(up, None, "model"), "down": put(down.T, "model", None)}
    x = rng.standard_normal((4, 3, 8)).astype(np.float32)

    def fn(p, x):
        explicit = kind == AxisType.Explicit and jax.typeof(x).sharding.spec[0]
        h = jnp.sin(jnp.einsum("btd,dh->bth", x, p["up"]))
        out = NamedSharding(mesh, P("data")) if explicit else None
        return jnp.einsum("bth,hd->btd", h, p["down"], out_sharding=out)

    params = lj.lorafy(sharded, 2, targets="*")
    specs = {n: tuple(x.sharding.spec) for n, x in params.items() if n in lora_names(n)}
    assert specs["up_lora_a"] == (None, None) and specs["up_lora_b"] == (None, "model")
    assert specs["down_lora_a"] == ("model", None)
    assert specs["down_lora_b"] == (None, None)

    def gradient(params, x):
        adapters, base = lj.split(params)
        value = lambda a: jnp.sin(lj.lora(fn)(lj.combine(a, base), x)).sum()
        return jax.jit(jax.value_and_grad(value))(adapters)

    want = gradient(lj.lorafy(plain, 2, targets="*"), x)
    with jax.set_mesh(mesh):
        got = gradient(params, put(x, "data"))
    close(got, want)


def lora_names(name):
    return [name] if "lora" in name and "scale" not in name else []


def test_lora_on_a_mesh_of_explicit_axes_needs_no_context(randomized):
    """As for the plain function, the types contain all shardings."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    base = {"w": put(jnp.ones((4, 8)), None, "y")}
    params, fn = randomized(lj.lorafy(base, 2, targets="*")), lambda p, x: x @ p["w"]
    for x in (put(jnp.ones((6, 4)), "x", None), jnp.ones((6, 4))):
        got, want = lj.lora(fn)(params, x), fn(lj.merge(params), x)
        assert got.sharding == fn(base, x).sharding
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_lora_on_a_barrier_with_parts_that_vary_along_other_axes(randomized):
    """A weight is split along its outputs, so its `lora_a` is not split."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    cut = P(None, "x")

    def fn(p, x):
        local = lambda w, x: x @ lax.optimization_barrier((w, 2 * w))[0]
        specs = {"in_specs": (cut, P()), "out_specs": cut}
        return jax.shard_map(local, mesh=mesh, **specs)(p["w"], x)

    params = randomized(lj.lorafy({"w": jnp.eye(4)}, 2, targets="*"))
    got, want = jax.jit(lj.lora(fn))(params, X), fn(lj.merge(params), X)
    np.testing.assert_allclose(got, want, atol=1e-5)


# Quantized weights: each kind in another format, in blocks of its inputs.

BLOCKS = {"w": (2, D), "table": (VOCAB, 2), "stack": (LAYERS, 2, D)}
BLOCKS |= {"heads": (1, 2, 3), "window": (3, 2, D)}
# Weights of two formats that alternate in a loop's carry are dequantized.
MIXED = {"swapped each time"}
# A selection of programs in which the storage matters; the fuzzer draws the rest.
QUANTIZED = [
    *("product", "attention", "merged heads", "split heads", "scalars", "filled"),
    *("tied head", "chosen layer", "expert of each example", "fused projections"),
    *("read in another order", "two weights summed", "ragged experts", "convolution"),
    *("jit", "remat", "scan over layers", "carried", "swapped each time", "loop"),
    *("carried by a loop", "scaled by inputs", "branch", "on devices", "stop_gradient"),
    *CUSTOM,
    *("elementwise", "squared", "returned", "scanned out"),
]


@functools.cache
def quantized_weights():
    kinds = dict(zip(BLOCKS, ["nf4", "int8", "int4", "nf4", "int8"], strict=True))
    quantize = lambda params: {
        n: quantize_array(params[n], kinds[n], BLOCKS[n]) for n in BLOCKS
    }
    return jax.jit(quantize)(weights())


@pytest.fixture
def stored(params):
    return params | quantized_weights()


@pytest.mark.parametrize("name", QUANTIZED)
def test_lora_on_quantized_weights_equals_merged(name, stored, close):
    """Compares values and gradients, with adapters and without, in one compilation."""
    fn = (FACTORED | CUSTOM | MATERIALIZED)[name]
    strict = name in FACTORED and name not in MIXED
    adapted = lora(fn, materialize="error" if strict else "allow")
    without_adapters = {n: stored[n] for n in BLOCKS}

    @jax.jit
    def both(params, base, x):
        values = adapted(params, x), fn(lj.merge(params), x)
        if name in NO_GRADIENT:
            return values, (lora(fn)(base, x), fn(lj.merge(base), x))
        fns = adapted, on_merged(fn)
        return values, tuple(gradients(loss(f), params, x) for f in fns)

    for pair in both(stored, without_adapters, X):
        close(*pair, atol=2e-4)


def quantized_model(p, x):
    x = jnp.sin(p["table"][IDS[0]] @ p["w"] + x[:2] @ p["w"])
    layer = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None))
    return lax.scan(layer, x, p["stack"])[0] @ p["table"].T


def test_lora_on_quantized_weights_equals_dequantized(stored):
    """Compares values and the adapters' gradients, with adapters and without."""

    def both(params):
        fn = lora(quantized_model)
        total = lambda a: jnp.sin(fn(lj.combine(a, lj.split(params)[1]), X)).sum()
        return fn(params, X), jax.grad(total)(lj.split(params)[0])

    quantized, floats = jax.jit(both)(stored), jax.jit(both)(lj.dequantize(stored))
    for x, y in zip(jax.tree.leaves(quantized), jax.tree.leaves(floats), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    base = {n: stored[n] for n in BLOCKS}
    got = jax.jit(lora(quantized_model))(base, X)
    np.testing.assert_allclose(got, quantized_model(lj.dequantize(base), X), atol=1e-5)
    with pytest.raises(ValueError, match="no adapters"):
        lora(quantized_model)(lj.dequantize(base), X)


def test_lora_on_quantized_weights_in_forward_mode_vmap_and_second_derivatives(
    stored, close
):
    adapters, base = lj.split(stored)
    direction = jax.tree.map(jnp.ones_like, adapters)
    both = jax.tree.map(lambda x: jnp.stack([x, x / 2]), adapters)

    @jax.jit
    def compared():
        def derivatives(fn):
            run = lambda a: fn(lj.combine(a, base), X)
            scalar = lambda a: jnp.sin(run(a)).sum()
            slope = lambda a: jax.jvp(scalar, (a,), (direction,))[1]
            return slope(adapters), jax.grad(slope)(adapters), jax.vmap(run)(both)

        fns = lora(quantized_model), on_merged(quantized_model)
        return [derivatives(fn) for fn in fns]

    close(*compared(), atol=1e-3)


def test_lora_on_quantized_weights_traces_once_and_saves_no_dequantized_weight(stored):
    """A float residual of a weight's size would be a dequantized weight or a stack."""
    counted = chex.assert_max_traces(quantized_model, n=1)
    run = lambda a: lora(counted)(lj.combine(a, base), X).sum()
    adapters, base = lj.split(stored)
    program = str(jax.make_jaxpr(jax.grad(run))(adapters))
    assert "prevent_cse=True" in program and "prevent_cse=False" in program

    sizes = {"w": (128, 64), "stack": (LAYERS, 64, 64)}
    base = {n: jnp.ones(s) for n, s in sizes.items()}
    base = lj.quantize(base, "nf4", targets="*", axes=STACK)
    params = lj.lorafy(base, 2, targets="*", axes=STACK)

    def fn(p, x):
        step = lambda c, w: (jnp.tanh(c @ w), None)
        return lax.scan(step, jnp.sin(x @ p["w"]), p["stack"])[0]

    adapters, base = lj.split(params)
    run = lambda a: lj.lora(fn)(lj.combine(a, base), jnp.ones((3, 128)))
    residuals = jax.tree.leaves(jax.vjp(run, adapters)[1])
    floats = [x for x in residuals if jnp.issubdtype(x.dtype, jnp.floating)]
    assert max(x.size for x in floats) < 64 * 64


def test_lora_returns_constants_as_arrays():
    """In a jaxpr constants are literals, of NumPy's types or of JAX's own."""
    params = lj.lorafy({"kernel": jnp.ones((3, 3))}, 1)

    def fn(params):
        number, row = jnp.array(0), jnp.zeros(2)
        return params["kernel"] @ jnp.ones(3), number, jnp.float32(2), row, 3, None

    got, want = lj.lora(fn)(params), fn(params)
    assert [type(x) for x in got] == [type(x) for x in want]
    for x, y in zip(got[:4], want[:4], strict=True):
        assert x.dtype == y.dtype and jnp.shape(x) == jnp.shape(y)


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit])
def test_lora_takes_float64_of_numpy_as_jax_does(wrap, close):
    """Under x64, random bits, ranges and results would have other values and dtypes."""

    def fn(params, x):
        y = x @ params["w"]
        noise = jax.random.normal(jax.random.key(0), y.shape)
        kept = jax.random.bernoulli(jax.random.key(1), 0.5, y.shape)
        return jnp.where(kept, y + noise, 0.0), jnp.arange(3), params["b"]

    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal((D, D)), "b": np.float64(1.5)}
    assert base["w"].dtype == np.float64
    params = lj.lorafy(base, 2, targets="w")
    params["w_lora_b"] = jax.device_put(
        np.asarray(rng.standard_normal((2, D)), jnp.float32)
    )
    got, want = wrap(lj.lora(fn))(params, X), wrap(fn)(lj.merge(params), X)
    dtypes = lambda tree: [jnp.result_type(x) for x in tree]
    assert dtypes(got) == dtypes(want)
    close(got, want)
    with jax.enable_x64(True):  # if x64 is enabled, the result is float64
        run = lj.lora(lambda p: p["w"] * 2.0, materialize="allow")
        assert run(params).dtype == np.float64


@pytest.mark.parametrize("dora", [False, True])
def test_lora_stops_the_gradient_of_the_scale(dora, randomized):
    base = {"w": jnp.asarray(X[:, :3])}
    params = randomized(lj.lorafy(base, 2, targets="w", dora=dora))
    loss = lambda params: jnp.sin(X.T @ lj.lora(lambda p: p["w"])(params)).sum()
    with pytest.warns(UserWarning, match="return"):
        grads = jax.grad(loss)(params)
    assert grads["w_lora_scale"] == 0
    assert np.abs(grads["w_lora_a"]).max() > 0


def test_lora_on_adapters_that_vary_over_a_mesh_and_a_weight_that_does_not(close):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    w, xs = rng.standard_normal((D, D)), rng.standard_normal((2, BATCH, D))
    w, xs = jnp.asarray(w, jnp.float32), jnp.asarray(xs, jnp.float32)
    rule = jax.custom_vjp(jnp.sin)
    rule.defvjp(lambda w: (jnp.sin(w), w), lambda w, ct: (ct * jnp.cos(w),))
    step = lambda w, x: jnp.tanh(x @ jnp.cos(w))
    fns = [
        lambda p, x: x @ p["w"],
        lambda p, x: x @ jnp.tanh(p["w"]),
        lambda p, x: x @ jax.nn.relu(p["w"]),
        lambda p, x: x @ rule(p["w"]),
        lambda p, x: lax.scan(lambda h, _: (step(h, p["w"]), None), p["w"], None, 2)[0],
        lambda p, x: jnp.tanh(p["w"]) + lax.psum(p["w"].sum(), "i"),
    ]
    trees = [lj.lorafy({"w": w}, 2, targets="w") for _ in range(2)]
    for tree in trees:
        tree["w_lora_b"] = jax.device_put(
            np.asarray(rng.standard_normal((2, D)), jnp.float32)
        )
    many = lj.stack(trees)
    specs = {name: P() if name == "w" else P("i") for name in many}

    def values(run):
        def device(many, xs):
            own = {k: v if k == "w" else v[0] for k, v in many.items()}
            return [run(fn)(own, xs[0])[None] for fn in fns]

        sizes = {"mesh": mesh, "in_specs": (specs, P("i")), "out_specs": P("i")}
        return jax.jit(jax.shard_map(device, **sizes))(many, xs)

    merged = lambda fn: (
        lambda p, x: fn(
            {"w": p["w"] + p["w_lora_scale"] * p["w_lora_a"] @ p["w_lora_b"]}, x
        )
    )
    close(values(lambda fn: lj.lora(fn, materialize="allow")), values(merged))


def closing_over_a_weight(params, x):
    w = params["w"]

    @jax.custom_jvp
    def f(x):
        return jnp.sin(x @ w)

    f.defjvp(lambda xs, dots: (f(*xs), jnp.cos(xs[0] @ w) * (dots[0] @ w)))
    return f(x)


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit])
def test_lora_on_a_rule_that_closes_over_a_weight(wrap, params, close):
    params = {name: params[name] for name in params if name[0] == "w"}
    params = {k: v for k, v in params.items() if not k.startswith("window")}
    total = lambda run: wrap(jax.value_and_grad(lambda x: run(x).sum()))
    run = lj.lora(closing_over_a_weight, materialize="allow")
    got = total(lambda x: run(params, x))(X)
    close(got, total(lambda x: jnp.sin(x @ lj.merge(params)["w"]))(X))
    with pytest.raises(ValueError, match=r"closes over 'w'.*Pass it as an argument"):
        wrap(jax.grad(lambda params: run(params, X).sum()))(params)


def test_lora_refuses_jet(params):
    from jax.experimental import jet

    run = lambda x: lj.lora(lambda p, x: x @ p["w"], unused="ignore")(params, x)
    with pytest.raises(ValueError, match=r"jet has no rule.*merge\(params\)"):
        jet.jet(run, (X,), ((X, X),))


def test_lora_warns_of_the_same_line_at_each_call():
    helper = jax.jit(lambda w: jnp.tanh(w))
    params = lj.lorafy({"w": jnp.ones((D, D))}, 2, targets="w")
    lines = set()
    for _ in range(3):
        with pytest.warns(UserWarning) as caught:
            lj.lora(lambda params, x: x @ helper(params["w"]))(params, X)
        lines.add(str(caught[0].message))
    assert len(lines) == 1
