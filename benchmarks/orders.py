"""Compares the orders in which layers that read one x can be multiplied and adapted.

    python benchmarks/orders.py                      # times, on the device that is here
    python benchmarks/orders.py --device tpu-v5e     # bytes and bounds, compiled only

Query, key and value of one block: y = x W + s (x A) B for each, forward, and a step's
backward pass to x, A and B. The engine's order is first, and what it could be instead:

- formed: x (W + s A B), with JAX's own derivative, which computes that of W + s A B;
- formed, thin: the same with thin derivatives; the sum is made when x is there, and
  again in the backward pass, and is not kept;
- one x A: the layers' first products as one, x [A A A];
- [x h] [W; B]: the second products within those with W, h = x A beside x;
- [x h] [W; B], thin: the same with thin derivatives, dx = [dy dh] [W A]^T;
- x [W A]: the first product within that with W.

Each is checked against NumPy in float64. What W + s A B in bfloat16 hides of a small
update is printed too, and with --curve the losses of a transformer in bfloat16 that
trains by the first two. Writes the numbers into benchmarks/results. Takes about two
minutes on two CPU cores.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import files
import hlo
import jax
import jax.numpy as jnp
import memory
import numpy as np
import optax
import report
import roofline
import speed
import training
from readers import Defaults, folder, whole
from tqdm import tqdm

import lora_jax as lj

LAYERS = 3  # that read the same x
UPDATE = 1e-3  # how large s A B is beside W


class Shape(NamedTuple):
    """What is multiplied."""

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


HERE = [
    Shape(1024, 512, 512, 8),
    Shape(1024, 512, 2048, 8),
    Shape(4096, 512, 512, 8),
    Shape(1024, 512, 512, 64),
]
THERE = [
    Shape(tokens, 2048, out, rank, "bfloat16")
    for tokens in (4096, 16384)
    for out in (2048, 8192)
    for rank in (8, 64)
]


class Layer(NamedTuple):
    """A frozen weight and its adapter, scaled already."""

    w: jax.Array  # (width, out)
    a: jax.Array  # (width, r), float32
    b: jax.Array  # (r, out), float32


def main(argv: list[str] | None = None) -> None:
    """Runs what the command line asks for."""
    parser = options()
    args = parser.parse_args(argv)
    with files.stoppable(parser, args.output):
        with files.refusing(parser, RuntimeError):
            place = memory.devices(args.device)[0] if args.device else None
        here = args.device is None and jax.default_backend() == "cpu"
        shapes, results = HERE if here else THERE, []
        for shape in tqdm(shapes[: args.shapes], unit="shape", disable=None):
            found = planned(shape, place) if place else timed(shape, args.repeats)
            results.append({"shape": shape._asdict(), "orders": found})
            print(f"\n{shape}, {LAYERS} layers\n\n{table(found)}", flush=True)
        hidden = {str(s): hides(s) for s in shapes[: args.shapes]}
        curves = losses(args.curve) if args.curve else {}
        print(f"\n{words(hidden, curves)}")
        found = {"versions": training.versions(), "results": results}
        found |= {"hidden": hidden, "losses": curves}
        with files.written(args.output) as new:
            files.write_json(new / "orders.json", found)
    print(f"{found['versions']}\nThe file is in {args.output}")


def options() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Compares the orders of an adapted product.",
        formatter_class=Defaults,
    )
    add = parser.add_argument
    add("--repeats", type=whole(1), default=20, help="of each order")
    add("--shapes", type=whole(1), help="how many of them; default: all")
    add("--curve", type=whole(2), metavar="STEPS", help="of training, in both orders")
    # The bounds are of this chip.
    add(
        "--device",
        type=memory.device,
        choices=["tpu-v5e"],
        help="time nothing, and compile for it",
    )
    place = Path(__file__).parent / "results"
    add("--output", type=folder, default=place, help="where the file is written")
    return parser


# The orders: each gives the outputs of all layers for one x.


def plain(x: jax.Array, layers: list[Layer]) -> list[jax.Array]:
    """No adapter."""
    return [x @ w for w, _, _ in layers]


def engine(x: jax.Array, layers: list[Layer]) -> list[jax.Array]:
    """What `lora` makes of it."""
    products = lj.lora(lambda params, x: [x @ p["kernel"] for p in params])
    one = jnp.ones((), x.dtype)
    trees = [
        {"kernel": w, "lora_a": a, "lora_b": b, "lora_scale": one} for w, a, b in layers
    ]
    return products(trees, x)


def formed(x: jax.Array, layers: list[Layer]) -> list[jax.Array]:
    return [x @ total(layer) for layer in layers]


def formed_thin(x: jax.Array, layers: list[Layer]) -> list[jax.Array]:
    return [_formed_thin(x, *layer) for layer in layers]


@jax.custom_vjp
def _formed_thin(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    # Else XLA would make the sums of all layers at once, and keep them.
    x, a, b = jax.lax.optimization_barrier((x, a, b))
    return x @ total(Layer(w, a, b))


def _formed_thin_forward(x, w, a, b):
    return _formed_thin(x, w, a, b), (x, w, a, b)


def _formed_thin_backward(kept, dy):
    x, w, a, b = kept
    own, dy = jax.lax.optimization_barrier((Layer(w, a, b), dy))
    da = x.T @ (dy @ b.astype(x.dtype).T)
    db = (x @ a.astype(x.dtype)).T @ dy
    return dy @ total(own).T, None, da.astype(a.dtype), db.astype(b.dtype)


_formed_thin.defvjp(_formed_thin_forward, _formed_thin_backward)


def total(layer: Layer) -> jax.Array:
    """W + A B, added in float32 and rounded to W's dtype."""
    w, a, b = layer
    return (w.astype(jnp.float32) + a @ b).astype(w.dtype)


def one_first(x: jax.Array, layers: list[Layer]) -> list[jax.Array]:
    ranks = [layer.a.shape[1] for layer in layers]
    h = x @ jnp.concatenate([layer.a for layer in layers], 1).astype(x.dtype)
    thin = jnp.split(h, np.cumsum(ranks)[:-1], 1)
    return [
        x @ w + h @ b.astype(x.dtype) for h, (w, _, b) in zip(thin, layers, strict=True)
    ]


def beside(x: jax.Array, layers: list[Layer]) -> list[jax.Array]:
    ys = []
    for w, a, b in layers:
        wide = jnp.concatenate([x, x @ a.astype(x.dtype)], 1)
        ys.append(wide @ jnp.concatenate([w, b.astype(w.dtype)], 0))
    return ys


def beside_thin(x: jax.Array, layers: list[Layer]) -> list[jax.Array]:
    return [_beside_thin(x, *layer) for layer in layers]


@jax.custom_vjp
def _beside_thin(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return _beside_thin_forward(x, w, a, b)[0]


def _beside_thin_forward(x, w, a, b):
    h = x @ a.astype(x.dtype)
    wide = jnp.concatenate([x, h], 1)
    return wide @ jnp.concatenate([w, b.astype(w.dtype)], 0), (x, w, a, b, h)


def _beside_thin_backward(kept, dy):
    x, w, a, b, h = kept
    dh = dy @ b.astype(dy.dtype).T
    wide = jnp.concatenate([dy, dh], 1)
    dx = wide @ jnp.concatenate([w, a.astype(w.dtype)], 1).T
    return dx, None, (x.T @ dh).astype(a.dtype), (h.T @ dy).astype(b.dtype)


_beside_thin.defvjp(_beside_thin_forward, _beside_thin_backward)


def within(x: jax.Array, layers: list[Layer]) -> list[jax.Array]:
    ys = []
    for w, a, b in layers:
        both = x @ jnp.concatenate([w, a.astype(w.dtype)], 1)
        y, h = jnp.split(both, [w.shape[1]], 1)
        ys.append(y + h @ b.astype(x.dtype))
    return ys


ORDERS: dict[str, Callable[..., list[jax.Array]]] = {
    "no adapter": plain,
    "x W + (x A) B": engine,
    "formed": formed,
    "formed, thin": formed_thin,
    "one x A": one_first,
    "[x h] [W; B]": beside,
    "[x h] [W; B], thin": beside_thin,
    "x [W A]": within,
}


def backward(order: Callable[..., list[jax.Array]]) -> Callable[..., Any]:
    """Returns the forward and backward pass: the outputs, and the gradients."""

    def step(x, layers, dys):
        def run(x, factors):
            own = [Layer(w, *f) for (w, _, _), f in zip(layers, factors, strict=True)]
            return order(x, own)

        ys, pull = jax.vjp(run, x, [(a, b) for _, a, b in layers])
        return ys, pull(dys)

    return step


# What is known of each.


def timed(shape: Shape, repeats: int) -> dict[str, dict[str, Any]]:
    """Returns the milliseconds of every order, taken in turns, and XLA's counts."""
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
    """Runs it often enough to be timed; what is launched goes on in the meantime."""
    for _ in range(1 if jax.default_backend() == "cpu" else 20):
        results = made(*args)
    jax.block_until_ready(results)


def planned(shape: Shape, place: Any) -> dict[str, dict[str, Any]]:
    """Returns XLA's counts of every order, and the bound of the operations' time."""
    here = jax.sharding.SingleDeviceSharding(place)
    put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
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
    """Returns the passes: name, what makes one of an order, and its arguments."""
    return [("forward", lambda order: order, given[:2]), ("step", backward, given)]


def counts(made: Any) -> dict[str, Any]:
    """Returns what XLA counts in a compiled function."""
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
        # A B has a thousandth of W's size.
        a, b = normal(width, rank) * width**-0.5, normal(rank, out)
        layers.append(Layer(w, a, b * (UPDATE * rank**-0.5)))
        dys.append(normal(tokens, out).astype(dtype))
    return x, layers, dys


def check(got: Any, x: Any, layers: Any, dys: Any, kind: str, name: str) -> None:
    """Compares some rows with NumPy in float64.

    Raises:
      RuntimeError: If they differ.
    """
    ys = got if kind == "forward" else got[0]
    double = lambda z: np.asarray(z, np.float64)
    rows = double(x[:4])
    eps = float(jnp.finfo(x.dtype).eps)
    if jax.default_backend() != "cpu":
        eps = max(eps, 2.0**-10)  # what a GPU's products of float32 have by default
    for y, (w, a, b) in zip(ys, layers, strict=True):
        own = 0 if name == "no adapter" else double(a) @ double(b)
        want = rows @ (double(w) + own)
        if not np.allclose(double(y[:4]), want, atol=20 * eps * np.abs(want).max()):
            raise RuntimeError(f"{name} computes something else.")
    if kind == "forward" or name == "no adapter":
        return
    dx, factors = got[1]
    want = sum(
        double(dy[:4]) @ (double(w) + double(a) @ double(b)).T
        for dy, (w, a, b) in zip(dys, layers, strict=True)
    )
    if not np.allclose(double(dx[:4]), want, atol=40 * eps * np.abs(want).max()):
        raise RuntimeError(f"{name}: the gradient of x is something else.")
    for (da, _), dy, (_, _, b) in zip(factors, dys, layers, strict=True):
        want = double(x).T @ (double(dy) @ double(b).T)
        if not np.allclose(double(da), want, atol=40 * eps * np.abs(want).max()):
            raise RuntimeError(f"{name}: the gradient of A is something else.")


def hides(shape: Shape) -> float:
    """Returns how much of an update is lost in W + s A B, rounded to W's dtype.

    The norm of what is lost over that of s A B; a thousandth of W is what training
    moves a weight by. x W + s (x A) B loses none of it in this way.
    """
    # Under `jit`, since nothing else of what is drawn is then made.
    w, a, b = jax.jit(lambda: arrays(shape)[1][0])()
    double = lambda z: np.asarray(z, np.float64)
    update = double(a) @ double(b)
    kept = double(jax.jit(total)(Layer(w, a, b))) - double(w)
    return float(np.linalg.norm(kept - update) / np.linalg.norm(update))


def losses(steps: int) -> dict[str, list[float]]:
    """Returns the loss of every step of speed.py's job in bfloat16, in two orders."""
    job, tx = speed.JOBS["bfloat16"], optax.adamw(1e-4)
    task = speed.task(job)
    params = lj.lorafy(task.plain, job.rank, targets=task.targets)
    found = {}
    for name, fn in {"x W + (x A) B": lj.lora, "formed": speed.materialised}.items():
        run, adapters, frozen = speed.halves(fn(task.apply), params)
        step = jax.jit(training.step(run, tx))
        state, found[name] = (adapters, tx.init(adapters)), []
        for _ in range(steps):
            state, loss = step(state, frozen, *task.batch)
            found[name].append(float(loss))
    return found


# What came of it.


def table(found: dict[str, dict[str, Any]]) -> str:
    """Returns the orders, one below the other, beside the engine's."""
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
    first = ["/ now", "ms"] if is_timed else ["bound / now", "XLA's / now", "HBM MB"]
    return [*first, "GFLOP", "MB held"]


def words(hidden: dict[str, float], curves: dict[str, list[float]]) -> str:
    """Says what the rounding of a formed sum hides, and what training makes of it."""
    lines = [f"  {lost:.2g}: {name}" for name, lost in hidden.items()]
    title = f"Of an update of {UPDATE:.1%} of the weight W + s A B loses, relatively,"
    if curves:
        one, other = curves.values()
        off = np.abs(np.subtract(one, other))
        lines.append(
            f"In {len(one)} steps in bfloat16 the loss falls from {one[0]:.3f} to "
            f"{one[-1]:.4f}, formed to {other[-1]:.4f}; the two differ most in step "
            f"{np.argmax(off) + 1}, by {max(off):.4f}."
        )
    return "\n".join([title, *lines])


if __name__ == "__main__":
    main()
