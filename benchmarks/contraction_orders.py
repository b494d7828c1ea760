"""Compares contraction orders for adapted layers that read the same input.

    python benchmarks/contraction_orders.py                   # times on this machine
    python benchmarks/contraction_orders.py --device tpu-v5e  # bytes and bounds only

Query, key and value of one block: y = x W + s (x A) B for each, in the forward pass,
and in a step's backward pass to x, A and B. The engine's order comes first. The
alternatives:

- x (W + A B): with JAX's own derivative, which computes that of W + s A B;
- x (W + A B), low-rank derivatives: the sum is computed when x is available, computed
  again in the backward pass, and not kept;
- one x A for all: the layers' first products as one, x [A A A];
- [x h] [W; B]: the second products within those with W; h = x A is concatenated to x;
- [x h] [W; B], low-rank derivatives: dx = [dy dh] [W A]^T;
- x [W A]: the first product within that with W.

Each order is checked against NumPy in float64. Prints too how much of a small update
the rounding of W + s A B to bfloat16 loses, and with --curve the losses of a
transformer in bfloat16 that is trained with the first two orders. Writes the results
into benchmarks/results. Takes about two minutes on two CPU cores.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hlo
import jax
import jax.numpy as jnp
import memory
import numpy as np
import optax
import report
import roofline
import script
import speed
import training
from option_types import DefaultsFormatter, folder, integer_from
from tqdm import tqdm

import lora_jax as lj

LAYERS = 3  # all of them read the same x
UPDATE = 1e-3  # the size of s A B relative to W


class Shape(NamedTuple):
    """The sizes and the dtype of one product."""

    tokens: int
    width: int
    out: int
    rank: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} tokens, {self.width} to {self.out}, rank {self.rank}, "
            f"{self.dtype}"
        )


CPU_SHAPES = [
    Shape(1024, 512, 512, 8),
    Shape(1024, 512, 2048, 8),
    Shape(4096, 512, 512, 8),
    Shape(1024, 512, 512, 64),
]
ACCELERATOR_SHAPES = [
    Shape(tokens, 2048, out, rank, "bfloat16")
    for tokens in (4096, 16384)
    for out in (2048, 8192)
    for rank in (8, 64)
]


class Layer(NamedTuple):
    """A frozen weight and its adapter; the scale is already part of B."""

    w: jax.Array  # (width, out)
    a: jax.Array  # (width, r), float32
    b: jax.Array  # (r, out), float32


def main(argv: list[str] | None = None) -> None:
    """Runs the comparison with the options of the command line."""
    parser = options()
    args = parser.parse_args(argv)
    with script.exit_on_interrupt(parser, args.output):
        with script.exit_on_error(parser, RuntimeError):
            device = memory.devices(args.device)[0] if args.device else None
        on_cpu = args.device is None and jax.default_backend() == "cpu"
        shapes, results = CPU_SHAPES if on_cpu else ACCELERATOR_SHAPES, []
        for shape in tqdm(shapes[: args.shapes], unit="shape", disable=None):
            found = planned(shape, device) if device else timed(shape, args.repeats)
            results.append({"shape": shape._asdict(), "orders": found})
            print(f"\n{shape}, {LAYERS} layers\n\n{table(found)}", flush=True)
        lost = {str(s): rounding_loss(s) for s in shapes[: args.shapes]}
        curves = losses(args.curve) if args.curve else {}
        print(f"\n{summary(lost, curves)}")
        found = {"versions": training.versions(), "results": results}
        found |= {"rounding_loss": lost, "losses": curves}
        with script.staged(args.output) as new:
            script.write_json(new / "contraction_orders.json", found)
    print(f"{found['versions']}\nThe file is in {args.output}")


def options() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Compares contraction orders of adapted layers.",
        formatter_class=DefaultsFormatter,
    )
    add = parser.add_argument
    add("--repeats", type=integer_from(1), default=20, help="runs of each order")
    add("--shapes", type=integer_from(1), help="how many shapes; default: all")
    add(
        "--curve",
        type=integer_from(2),
        metavar="STEPS",
        help="training steps with each of the first two orders",
    )
    # The bounds of roofline.py are those of this chip.
    add(
        "--device",
        type=memory.device,
        choices=["tpu-v5e"],
        help="compile for this device instead of timing",
    )
    output = Path(__file__).parent / "results"
    add("--output", type=folder, default=output, help="where the file is written")
    return parser


# The orders. Each function returns the outputs of all layers for one x.


def plain(x: jax.Array, layers: list[Layer]) -> list[jax.Array]:
    """Computes x W, without adapters."""
    return [x @ w for w, _, _ in layers]


def engine(x: jax.Array, layers: list[Layer]) -> list[jax.Array]:
    """Computes x W + (x A) B with `lora`."""
    products = lj.lora(lambda params, x: [x @ p["kernel"] for p in params])
    one = jnp.ones((), x.dtype)
    trees = [
        {"kernel": w, "lora_a": a, "lora_b": b, "lora_scale": one} for w, a, b in layers
    ]
    return products(trees, x)


def materialized(x: jax.Array, layers: list[Layer]) -> list[jax.Array]:
    """Computes x (W + A B)."""
    return [x @ total(layer) for layer in layers]


def materialized_low_rank(x: jax.Array, layers: list[Layer]) -> list[jax.Array]:
    """Computes x (W + A B) with low-rank derivatives."""
    return [_materialized_low_rank(x, *layer) for layer in layers]


@jax.custom_vjp
def _materialized_low_rank(
    x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array
) -> jax.Array:
    # Without the barrier XLA would compute the sums of all layers first, and keep them.
    x, a, b = jax.lax.optimization_barrier((x, a, b))
    return x @ total(Layer(w, a, b))


def _materialized_low_rank_forward(x, w, a, b):
    return _materialized_low_rank(x, w, a, b), (x, w, a, b)


def _materialized_low_rank_backward(kept, dy):
    x, w, a, b = kept
    own, dy = jax.lax.optimization_barrier((Layer(w, a, b), dy))
    da = x.T @ (dy @ b.astype(x.dtype).T)
    db = (x @ a.astype(x.dtype)).T @ dy
    return dy @ total(own).T, None, da.astype(a.dtype), db.astype(b.dtype)


_materialized_low_rank.defvjp(
    _materialized_low_rank_forward, _materialized_low_rank_backward
)


def total(layer: Layer) -> jax.Array:
    """Returns W + A B, added in float32 and rounded to W's dtype."""
    w, a, b = layer
    return (w.astype(jnp.float32) + a @ b).astype(w.dtype)


def shared_first(x: jax.Array, layers: list[Layer]) -> list[jax.Array]:
    """Computes x [A A A] for all layers in one product."""
    ranks = [layer.a.shape[1] for layer in layers]
    h = x @ jnp.concatenate([layer.a for layer in layers], 1).astype(x.dtype)
    hs = jnp.split(h, np.cumsum(ranks)[:-1], 1)
    return [
        x @ w + h @ b.astype(x.dtype) for h, (w, _, b) in zip(hs, layers, strict=True)
    ]


def joined_second(x: jax.Array, layers: list[Layer]) -> list[jax.Array]:
    """Computes [x h] [W; B], h = x A."""
    ys = []
    for w, a, b in layers:
        wide = jnp.concatenate([x, x @ a.astype(x.dtype)], 1)
        ys.append(wide @ jnp.concatenate([w, b.astype(w.dtype)], 0))
    return ys


def joined_second_low_rank(x: jax.Array, layers: list[Layer]) -> list[jax.Array]:
    """Computes [x h] [W; B] with low-rank derivatives."""
    return [_joined_second_low_rank(x, *layer) for layer in layers]


@jax.custom_vjp
def _joined_second_low_rank(
    x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array
) -> jax.Array:
    return _joined_second_low_rank_forward(x, w, a, b)[0]


def _joined_second_low_rank_forward(x, w, a, b):
    h = x @ a.astype(x.dtype)
    wide = jnp.concatenate([x, h], 1)
    return wide @ jnp.concatenate([w, b.astype(w.dtype)], 0), (x, w, a, b, h)


def _joined_second_low_rank_backward(kept, dy):
    x, w, a, b, h = kept
    dh = dy @ b.astype(dy.dtype).T
    wide = jnp.concatenate([dy, dh], 1)
    dx = wide @ jnp.concatenate([w, a.astype(w.dtype)], 1).T
    return dx, None, (x.T @ dh).astype(a.dtype), (h.T @ dy).astype(b.dtype)


_joined_second_low_rank.defvjp(
    _joined_second_low_rank_forward, _joined_second_low_rank_backward
)


def joined_first(x: jax.Array, layers: list[Layer]) -> list[jax.Array]:
    """Computes x [W A]."""
    ys = []
    for w, a, b in layers:
        both = x @ jnp.concatenate([w, a.astype(w.dtype)], 1)
        y, h = jnp.split(both, [w.shape[1]], 1)
        ys.append(y + h @ b.astype(x.dtype))
    return ys


ORDERS: dict[str, Callable[..., list[jax.Array]]] = {
    "no adapter": plain,
    "x W + (x A) B": engine,
    "x (W + A B)": materialized,
    "x (W + A B), low-rank derivatives": materialized_low_rank,
    "one x A for all": shared_first,
    "[x h] [W; B]": joined_second,
    "[x h] [W; B], low-rank derivatives": joined_second_low_rank,
    "x [W A]": joined_first,
}


def backward(order: Callable[..., list[jax.Array]]) -> Callable[..., Any]:
    """Returns the forward and backward pass of an order: outputs and gradients."""

    def step(x, layers, dys):
        def run(x, factors):
            own = [Layer(w, *f) for (w, _, _), f in zip(layers, factors, strict=True)]
            return order(x, own)

        ys, pull = jax.vjp(run, x, [(a, b) for _, a, b in layers])
        return ys, pull(dys)

    return step


# Measurements.


def timed(shape: Shape, repeats: int) -> dict[str, dict[str, Any]]:
    """Returns the milliseconds of every order, timed in turns, and XLA's counts."""
    given = arrays(shape)
    found: dict[str, Any] = {name: {} for name in ORDERS}
    for kind, wrap, args in kinds(given):
        runs = {}
        for name, order in ORDERS.items():
            made = jax.jit(wrap(order)).lower(*args).compile()
            check(made(*args), *given, kind, name)
            found[name][kind] = counts(made)
            runs[name] = functools.partial(go, made, args)
        for name, seconds in speed.take_turns(runs, repeats).items():
            found[name][kind]["ms"] = [1000 * s for s in seconds]
    return found


def go(made: Callable[..., Any], args: Any) -> None:
    """Runs a compiled order, on an accelerator 20 times, and waits for the end."""
    for _ in range(1 if jax.default_backend() == "cpu" else 20):
        results = made(*args)
    jax.block_until_ready(results)


def planned(shape: Shape, device: Any) -> dict[str, dict[str, Any]]:
    """Returns XLA's counts of every order, and the bound of the operations' time."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    given = jax.tree.map(put, jax.eval_shape(functools.partial(arrays, shape)))
    found: dict[str, Any] = {name: {} for name in ORDERS}
    for kind, wrap, args in kinds(given):
        for name, order in ORDERS.items():
            made = jax.jit(wrap(order)).lower(*args).compile()
            operations = hlo.operations(made.as_text())
            found[name][kind] = counts(made) | {
                "hbm": sum(x.nbytes + x.moved for x in operations),
                "bound": sum(roofline.bound_of(x.flops, x.nbytes) for x in operations),
                "estimate": sum(x.cycles for x in operations) / roofline.CLOCK,
            }
    return found


def kinds(given: Any) -> list[tuple[str, Callable[..., Any], Any]]:
    """Returns for each pass its name, its transform of an order, and its arguments."""
    return [("forward", lambda order: order, given[:2]), ("step", backward, given)]


def counts(made: Any) -> dict[str, Any]:
    """Returns XLA's FLOPs and bytes of a compiled function."""
    cost = made.cost_analysis()
    return {
        "flops": cost["flops"],
        "accessed": cost["bytes accessed"],
        "bytes": training.allocated(made),
    }


def arrays(shape: Shape) -> tuple[jax.Array, list[Layer], list[jax.Array]]:
    """Returns x, the layers, and the outputs' cotangents."""
    tokens, width, out, rank, dtype = shape
    keys = iter(jax.random.split(jax.random.key(0), 1 + 4 * LAYERS))
    normal = lambda *size: jax.random.normal(next(keys), size)
    x = normal(tokens, width).astype(dtype)
    layers, dys = [], []
    for _ in range(LAYERS):
        w = (normal(width, out) * width**-0.5).astype(dtype)
        # The size of A B is a thousandth of W's.
        a, b = normal(width, rank) * width**-0.5, normal(rank, out)
        layers.append(Layer(w, a, b * (UPDATE * rank**-0.5)))
        dys.append(normal(tokens, out).astype(dtype))
    return x, layers, dys


def check(got: Any, x: Any, layers: Any, dys: Any, kind: str, name: str) -> None:
    """Compares some rows of the results with NumPy in float64.

    Raises:
      RuntimeError: If they differ.
    """
    ys = got if kind == "forward" else got[0]
    double = lambda z: np.asarray(z, np.float64)
    rows = double(x[:4])
    eps = float(jnp.finfo(x.dtype).eps)
    if jax.default_backend() != "cpu":
        eps = max(eps, 2.0**-10)  # the default precision of float32 products on a GPU
    for y, (w, a, b) in zip(ys, layers, strict=True):
        own = 0 if name == "no adapter" else double(a) @ double(b)
        want = rows @ (double(w) + own)
        if not np.allclose(double(y[:4]), want, atol=20 * eps * np.abs(want).max()):
            raise RuntimeError(f"{name}: the outputs differ from NumPy's.")
    if kind == "forward" or name == "no adapter":
        return
    dx, factors = got[1]
    want = sum(
        double(dy[:4]) @ (double(w) + double(a) @ double(b)).T
        for dy, (w, a, b) in zip(dys, layers, strict=True)
    )
    if not np.allclose(double(dx[:4]), want, atol=40 * eps * np.abs(want).max()):
        raise RuntimeError(f"{name}: the gradient of x differs from NumPy's.")
    for (da, _), dy, (_, _, b) in zip(factors, dys, layers, strict=True):
        want = double(x).T @ (double(dy) @ double(b).T)
        if not np.allclose(double(da), want, atol=40 * eps * np.abs(want).max()):
            raise RuntimeError(f"{name}: the gradient of A differs from NumPy's.")


def rounding_loss(shape: Shape) -> float:
    """Returns how much of an update is lost when W + s A B is rounded to W's dtype.

    The result is the norm of the error over the norm of s A B. Training moves a weight
    by about a thousandth of its size. x W + s (x A) B does not round the sum, and so
    loses nothing.
    """
    # Under `jit` XLA computes only the first layer of all the arrays.
    w, a, b = jax.jit(lambda: arrays(shape)[1][0])()
    double = lambda z: np.asarray(z, np.float64)
    update = double(a) @ double(b)
    kept = double(jax.jit(total)(Layer(w, a, b))) - double(w)
    return float(np.linalg.norm(kept - update) / np.linalg.norm(update))


def losses(steps: int) -> dict[str, list[float]]:
    """Trains speed.py's job in bfloat16 with two orders, and returns their losses."""
    job, tx = speed.JOBS["bfloat16"], optax.adamw(1e-4)
    task = speed.task(job)
    params = lj.lorafy(task.plain, job.rank, targets=task.targets)
    found = {}
    orders = {"x W + (x A) B": lj.lora, "x (W + A B)": speed.materialized}
    for name, fn in orders.items():
        run, adapters, frozen = speed.split(fn(task.apply), params)
        step = jax.jit(training.step(run, tx))
        state, found[name] = (adapters, tx.init(adapters)), []
        for _ in range(steps):
            state, loss = step(state, frozen, *task.batch)
            found[name].append(float(loss))
    return found


# Results.


def table(found: dict[str, dict[str, Any]]) -> str:
    """Returns a table with a row for each order, relative to the engine's."""
    now = found["x W + (x A) B"]
    is_timed = "ms" in now["step"]
    lines = [["", *(f"{kind}, {what}" for kind in now for what in heads(is_timed))]]
    for name, kinds in found.items():
        cells = []
        for kind, x in kinds.items():
            own = now[kind]
            if is_timed:
                median = np.median(x["ms"])
                cells += [f"{median / np.median(own['ms']):.3f}", f"{median:.2f}"]
            else:
                cells += [
                    f"{x['bound'] / own['bound']:.3f}",
                    f"{x['estimate'] / own['estimate']:.3f}",
                    f"{x['hbm'] / 1e6:,.0f}",
                ]
            cells += [f"{x['flops'] / 1e9:.2f}", f"{x['bytes'] / 1e6:,.0f}"]
        lines.append([name, *cells])
    return "\n".join(report.aligned(lines))


def heads(is_timed: bool) -> list[str]:
    first = ["/ engine", "ms"]
    if not is_timed:
        first = ["bound / engine", "XLA's / engine", "HBM MB"]
    return [*first, "GFLOP", "MB"]


def summary(lost: dict[str, float], curves: dict[str, list[float]]) -> str:
    """Returns sentences on the rounding of W + s A B, and on its effect in training."""
    lines = [f"  {part:.2g}: {name}" for name, part in lost.items()]
    title = (
        f"Part of an update, {UPDATE:.1%} of the weight, that rounding W + s A B loses:"
    )
    if curves:
        one, other = curves.values()
        off = np.abs(np.subtract(one, other))
        lines.append(
            f"In {len(one)} steps in bfloat16 the loss falls from {one[0]:.3f} to "
            f"{one[-1]:.4f}, and with x (W + A B) to {other[-1]:.4f}; the two differ "
            f"most in step {np.argmax(off) + 1}, by {max(off):.4f}."
        )
    return "\n".join([title, *lines])


if __name__ == "__main__":
    main()
