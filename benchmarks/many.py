"""Compares a batch of many adapters by `take` and by `mix`: time, memory and FLOPs.

    pip install -e ".[demo]" && python benchmarks/many.py
    pip install -e ".[demo,tpu]" && python benchmarks/many.py --device tpu-v5e

Each example of a batch uses one of 64 adapters. `take` copies the factors of its own
for each example; `mix` puts all adapters side by side as one, with a scale for each
example and rank; and with `most=8` only those that the batch uses. Three batches are
timed: decoding, 256 examples of one token, as vectors or with a dimension of tokens;
and prefill, 32 of 128 tokens. The contenders take turns in one process: compare the
ratios. FLOPs, temporaries and bytes are XLA's own counts. Takes about a minute on two
CPU cores. (many_adapters.py compares `take` with the plain model and with PEFT, and
trains adapters at once.)

With --device nothing is timed: XLA's compiler for the chip, which may be absent,
computes the memory of decoding a published model. A compilation takes some minutes.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import many_adapters
import memory
import numpy as np
import script
import speed
import training
from models.architectures import ARCHITECTURES, Model
from option_types import DefaultsFormatter, folder, integer_from

import lora_jax as lj

BATCHES = {  # the dimensions of examples and of the tokens of each
    "decoding": (256,),
    "decoding, sequences of 1": (256, 1),
    "prefill": (32, 128),
}
AIMS = {  # of `mix` with the adapters of the batch alone, relative to `take`
    "temporaries in decoding": ("decoding", "temporaries", 1 / 10),
    "bytes accessed in decoding": ("decoding", "bytes accessed", 1 / 2.5),
    "time in decoding": ("decoding", "ms", 1.0),
    "time in prefill": ("prefill", "ms", 1.0),
}
EXACT = 1e-6  # the aim of the difference from `take`
Apply = Callable[[Any, jax.Array], jax.Array]


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark with the options of the command line."""
    parser = options()
    args = parser.parse_args(argv)
    with script.exit_on_interrupt(parser, args.output):
        with script.exit_on_error(parser, ValueError):
            check(args)
        if args.device is None:
            return run(args)
        with script.exit_on_error(parser, RuntimeError):
            device = memory.devices(args.device)[0]
        plan(args, device)


def options() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Compares a batch of many adapters by take and by mix.",
        formatter_class=DefaultsFormatter,
    )
    add, whole = parser.add_argument, integer_from(1)
    add("--adapters", type=whole, default=64, help="adapters of the stack")
    add("--distinct", type=whole, default=8, help="different adapters of a batch")
    add("--width", type=whole, default=512, help="of the layers that are timed")
    add("--layers", type=whole, default=2, help="number of the layers")
    add("--rank", type=whole, default=8, help="rank of each adapter")
    add("--repeats", type=whole, default=20, help="runs of each contender")
    output = Path(__file__).parent / "results"
    add("--output", type=folder, default=output, help="where the files are written")
    chip = "compute the memory on this device instead of timing: tpu-v5e, cpu..."
    add("--device", type=many_adapters.chip, help=chip)
    models = [name for name, arch in ARCHITECTURES.items() if not arch.patch]
    add("--model", choices=models, default="llama-3-8b", help="with --device")
    add("--examples", type=whole, default=256, help="with --device: of one token")
    return parser


def check(args: argparse.Namespace) -> None:
    """Checks that the options fit.

    Raises:
      ValueError: If a batch would have more different adapters than there are.
    """
    if args.distinct > args.adapters:
        raise ValueError(
            f"--distinct {args.distinct} is more than --adapters {args.adapters}"
        )


def contenders(fn: Apply, most: int) -> dict[str, Callable[..., jax.Array]]:
    """Returns `run(stacked, ids, examples)` by each way to choose the adapters."""

    def over(choose: Callable[..., Any]) -> Callable[..., jax.Array]:
        def run(stacked, ids, x):
            chosen = choose(stacked, ids)
            axes = lj.in_axes(chosen), 0
            return jax.vmap(lj.lora(fn), in_axes=axes)(chosen, x)

        return run

    return {
        "take": over(lj.take),
        "mix": over(lj.mix),
        f"mix, most={most}": over(functools.partial(lj.mix, most=most)),
    }


# Timed contenders.


def run(args: argparse.Namespace) -> None:
    """Times both batches, and writes the files, all of them or none."""
    args.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"versions": training.versions(), "batches": {}}
    for name, shape in BATCHES.items():
        found["batches"][name] = compare(args, shape)
    text = report_text(args, found["batches"])
    with script.staged(args.output) as new:
        (new / "many.md").write_text(text + "\n", encoding="utf-8")
        script.write_json(new / "many.json", found)
    print(f"{text}\n{found['versions']}\nThe files are in {args.output}")


def layers(params: Any, x: jax.Array) -> jax.Array:
    """Applies the layers to one example, (width,) or (tokens, width)."""
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"])
    return x


def compare(args: argparse.Namespace, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns the times and counts of each contender on one batch.

    Raises:
      RuntimeError: If the contenders' results differ.
    """
    rng, width = np.random.default_rng(0), args.width
    draw = lambda *shape: np.asarray(rng.standard_normal(shape), np.float32)
    base = {
        f"layer_{i}": {"kernel": jnp.asarray(draw(width, width) / width**0.5)}
        for i in range(args.layers)
    }
    stacked = lj.lorafy(base, args.rank, stack=args.adapters)
    for layer in stacked.values():
        layer["lora_b"] = jnp.asarray(draw(*layer["lora_b"].shape) / 10)
    some = rng.choice(args.adapters, args.distinct, replace=False)
    ids = jnp.asarray(some[rng.integers(0, args.distinct, shape[0])])
    x = jnp.asarray(draw(*shape, width))

    def plain(stacked, ids, x):
        return layers(lj.strip(stacked), x)

    ready = {
        name: jax.jit(fn).lower(stacked, ids, x).compile()
        for name, fn in ({"plain": plain} | contenders(layers, args.distinct)).items()
    }
    results = {name: np.asarray(made(stacked, ids, x)) for name, made in ready.items()}
    # The outputs are those of `tanh`, at most 1.
    off = {name: float(abs(y - results["take"]).max()) for name, y in results.items()}
    if (most := max(off[name] for name in off if name != "plain")) > 10 * EXACT:
        raise RuntimeError(f"mix differs from take by {most:.1e}.")
    go = lambda made: jax.block_until_ready(made(stacked, ids, x))
    runs = {name: functools.partial(go, made) for name, made in ready.items()}
    seconds = speed.take_turns(runs, args.repeats)
    return {
        name: {
            "ms": [1000 * s for s in seconds[name]],
            "temporaries": made.memory_analysis().temp_size_in_bytes,
            "bytes accessed": made.cost_analysis()["bytes accessed"],
            "flops": made.cost_analysis()["flops"],
            "off": off[name],
        }
        for name, made in ready.items()
    }


def report_text(args: argparse.Namespace, batches: dict[str, Any]) -> str:
    """Returns the printed report: a table of both batches, and the aims."""
    lines = [
        f"{args.adapters} adapters of rank {args.rank} over {args.layers} layers of "
        f"width {args.width}, {args.distinct} different ones in a batch\n",
        "| batch | by | / take | median, ms | temporaries, MB | accessed, MB | GFLOP |",
        "|---|---|---|---|---|---|---|",
    ]
    for batch, found in batches.items():
        for name, x in found.items():
            ratio = np.median(x["ms"]) / np.median(found["take"]["ms"])
            lines.append(
                f"| {batch}, {' x '.join(map(str, BATCHES[batch]))} | {name} | "
                f"{ratio:.2f} | {np.median(x['ms']):.1f} | "
                f"{x['temporaries'] / 1e6:.2f} | {x['bytes accessed'] / 1e6:.1f} | "
                f"{x['flops'] / 1e9:.3f} |"
            )
    few = [*batches["decoding"]][-1]
    lines += ["", f"| aim of {few} | / take | at most | |", "|---|---|---|---|"]
    for what, (batch, key, most) in AIMS.items():
        one, other = (np.median(batches[batch][name][key]) for name in (few, "take"))
        lines.append(speed.verdict(what, one / other, most))
    for batch in dict.fromkeys(batch for batch, *_ in AIMS.values()):
        off = batches[batch][few]["off"]
        met = "met" if off <= EXACT else "not met"
        lines.append(f"| difference in {batch} | {off:.1e} | {EXACT:.0e} | {met} |")
    return "\n".join(lines)


# The memory on a chip, from compilation alone.


def plan(args: argparse.Namespace, device: Any) -> None:
    """Compiles decoding for the chip, and prints and writes the memory."""
    arch = ARCHITECTURES[args.model]
    model = Model(arch)
    sharding = jax.sharding.SingleDeviceSharding(device)
    put = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    fn = lambda params, x: model.apply({"params": params}, x)
    base = jax.eval_shape(model.init, jax.random.key(0), token)["params"]
    axes = lj.find_axes(fn, base, token)
    base = lj.quantize(base, "nf4", axes=axes)
    targets = ["blocks*/*/kernel"]
    adapt = lambda base: lj.lorafy(
        base, args.rank, targets=targets, axes=axes, stack=args.adapters
    )
    stacked = put(jax.eval_shape(adapt, base))
    ids = put(jax.ShapeDtypeStruct((args.examples,), jnp.int32))
    x = put(jax.ShapeDtypeStruct((args.examples, 1, 1), jnp.int32))
    rows = {}
    for name, run in contenders(fn, args.distinct).items():
        lowered = jax.jit(run).lower(stacked, ids, x)
        sizes = {"parameters": training.nbytes(stacked), "optimizer": 0}
        on_tpu = device.platform == "tpu"
        rows[name] = many_adapters.measure(lowered, sizes, on_tpu)
    text = plan_table(args, device.device_kind, rows)
    with script.staged(args.output) as new:
        found = {"device": device.device_kind, "versions": training.versions()}
        script.write_json(new / "many_plan.json", found | {"rows": rows})
    print(f"{text}\nThe file is in {args.output}")


def plan_table(args: argparse.Namespace, kind: str, rows: dict[str, Any]) -> str:
    """Returns the table of a plan, in GB."""
    lines = [
        f"{args.model} in NF4 on {kind}: one token of {args.examples} examples, "
        f"{args.adapters} adapters of rank {args.rank} in float32\n",
        "| by | peak, GB | parameters | the rest |",
        "|---|---|---|---|",
    ]
    for name, x in rows.items():
        known, peak = x["parameters"] / 1e9, x["peak"]
        cells = ["unknown", "unknown"]
        if peak is not None:
            cells = [f"{peak / 1e9:.2f}", f"{peak / 1e9 - known:.2f}"]
        if x.get("refused"):
            cells[0] += f", more than the limit of {x['limit'] / 1e9:.2f}"
        lines.append(f"| {name} | {cells[0]} | {known:.2f} | {cells[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
