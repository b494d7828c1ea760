"""Bounds the time of a training step on a TPU v5e, without running it.

    python benchmarks/roofline.py --model gpt-0.87b --batch 4 --rank 8 64

XLA's own compiler for the chip makes the program of one step, with unrolled layers,
because XLA's counts include the body of a loop only once. Each operation of the
program takes at least the greater of FLOPs / 197e12 and bytes / 819e9 seconds, by the
chip's published peaks. The bound is the sum over all operations. It is printed next to
XLA's own estimate, split by purpose, for full fine-tuning, LoRA, W + A B materialized,
and a floor. At the floor all weights are frozen, there are no adapters, and the
gradient flows as far as LoRA needs it: to the outputs of the first block's query, key
and value.

These are bounds and estimates, not measurements. Bytes are those of operands and
results in HBM: an array that XLA keeps in VMEM costs none, and the copies between HBM
and VMEM are listed separately, because they overlap with other operations. XLA's
estimate is accurate for large products only. How far it is from the bound for single
operations, whose bound is known, is printed too (--no-alone omits it).

Prints tables; writes the results, a figure and the text of XLA's programs into
benchmarks/results. A compilation takes about a minute on two CPU cores.
"""

import argparse
import copy
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hlo
import jax
import jax.numpy as jnp
import memory
import numpy as np
import report
import script
import training
from flax import traverse_util
from matplotlib.figure import Figure
from models.architectures import ARCHITECTURES
from option_types import DefaultsFormatter, folder, integer_from
from tqdm import tqdm

# The peaks of one chip in bfloat16: https://cloud.google.com/tpu/docs/v5e
FLOPS, BANDWIDTH = 197e12, 819e9
CLOCK = 1.5e9  # cycles per second; with four units of 128 x 128, 196.6e12 FLOPs
METHODS = {"full": "full", "lora": "LoRA", "merged": "W + AB", "floor": "floor"}
KINDS = {
    "weights": ("products with W", "#0b6e8f"),
    "low_rank": ("low-rank products", "#c8553d"),
    "attention": ("attention", "#7b5aa6"),
    "loss": ("logits, loss,\nembedding", "#7f8c99"),
    "rest": ("the rest", "#c08a1e"),
}
LAYER = r"blocks(?:_\d+)?/(?:attention|mlp)/(?:query|key|value|out|up|gate|down)\b"
FIRST = ("query", "key", "value")  # the layers that read the first block's input


def main(argv: list[str] | None = None) -> None:
    """Runs the job with the options of the command line."""
    began = time.perf_counter()
    parser = options()
    args = parser.parse_args(argv)
    with script.exit_on_interrupt(parser, args.output):
        with script.exit_on_error(parser, RuntimeError):
            lowered = steps(args)
        found, texts = {"steps": {}, "alone": []}, {}
        with tqdm(lowered.items(), unit=" compiled", disable=None) as bar:
            for name, lower in bar:
                bar.set_description(name)
                found["steps"][name], texts[name] = measure(*lower())
        if args.alone:
            found["alone"] = alone(4096, 2048, 8192, args.rank)
        found |= about(args)
        with script.staged(args.output) as new:
            script.write_json(new / "roofline.json", found)
            figure(new / "roofline.png", found)
            (new / "programs").mkdir()
            for name, text in texts.items():
                file = name.replace(" ", "_").replace(",", "") + ".txt"
                (new / "programs" / file).write_text(text, encoding="utf-8")
            print(f"{heading(found)}\n\n{table(found)}\n\n{summary(found)}")
    count = len(found["steps"]) + len(found["alone"])
    seconds = time.perf_counter() - began
    print(f"{count} compilations, {seconds:.0f} s; the files are in {args.output}")


def options() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Bounds the time of a training step on a TPU v5e.",
        formatter_class=DefaultsFormatter,
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    models = list(ARCHITECTURES)
    add("--model", choices=models, default="gpt-0.87b", help="the architecture")
    add(
        "--layers",
        type=integer_from(1),
        default=2,
        help="instead of the model's own number",
    )
    add("--batch", type=integer_from(1), default=4, help="sequences, or images")
    add(
        "--sequence",
        type=integer_from(1),
        help="tokens; default: 1024, or an image's patches",
    )
    add(
        "--rank",
        type=integer_from(1),
        nargs="+",
        default=[8],
        help="ranks of the adapters to compare",
    )
    add(
        "--dtype",
        choices=memory.FLOATS,
        default="bfloat16",
        help="of everything except the adapters, which are float32",
    )
    add("--remat", action=switch, default=False, help="keep only each block's input")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="the methods to compare",
    )
    add("--alone", action=switch, default=True, help="single operations too")
    output = Path(__file__).parent / "results"
    add("--output", type=folder, default=output, help="where the files are written")
    # Options of memory.py that are fixed here.
    parser.set_defaults(device="tpu-v5e", targets=["blocks*/*/kernel"], scan=False)
    parser.set_defaults(base=None, table=None, chunk=None)
    return parser


# The steps, from shapes alone.


def steps(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Returns a function for each step that lowers it, once all options are checked.

    Raises:
      RuntimeError: If there is no compiler for the chip.
      ValueError: If an option does not fit the model.
    """
    found = {}
    for name in METHODS:
        if name not in args.methods:
            continue
        # The cost of W + A B hardly depends on the rank.
        for rank in args.rank if name == "lora" else args.rank[:1]:
            own = copy.copy(args)
            own.rank = rank
            if name == "floor":
                own.methods = ["full"]  # without adapters
                # Training the first biases makes the gradient flow to these outputs;
                # the biases themselves cost next to nothing.
                job = memory.prepare(own, bias=True)
                lower = lambda job=job: (floor(job), 0)
            else:
                own.methods = [name]
                job, used = memory.prepare(own), 0 if name == "full" else rank
                lower = lambda job=job, name=name, used=used: (
                    memory.lower(job, name, job.args.batch)[0],
                    used,
                )
            ranked = f", rank {rank}" if name in ("lora", "merged") else ""
            found[METHODS[name] + ranked] = lower
    return found


def floor(job: memory.Job) -> Any:
    """Returns the lowered step that trains only the first biases."""
    flat = traverse_util.flatten_dict(job.params, sep="/")
    first = [f"blocks_0/attention/{name}/bias" for name in FIRST]
    trainable = {name: flat.pop(name) for name in first}

    def loss(trainable, frozen, *batch):
        params = traverse_util.unflatten_dict(trainable | frozen, sep="/")
        return job.loss(params, *batch)

    return memory.lower_step(job, loss, trainable, flat, job.args.batch)[0]


def measure(lowered: Any, rank: int) -> tuple[dict[str, Any], str]:
    """Compiles a step, and returns its counts, in total and by kind, and its text.

    `rank` is 0 for a step without adapters, which has no low-rank products.
    """
    compiled = lowered.compile()
    cost = compiled.cost_analysis()
    found = {
        "flops": cost["flops"],
        "accessed": cost["bytes accessed"],
        "peak": compiled.memory_analysis().peak_memory_in_bytes,
    }
    text = compiled.as_text()
    return found | summed(hlo.operations(text), rank), text


def summed(operations: list[hlo.Operation], rank: int) -> dict[str, Any]:
    """Sums operations: FLOPs, and by kind bytes, the bound and XLA's estimate."""
    bound, estimate = ({kind: 0.0 for kind in KINDS} for _ in range(2))
    nbytes = {kind: 0 for kind in KINDS}
    for x in operations:
        kind = kind_of(x, rank)
        bound[kind] += bound_of(x.flops, x.nbytes)
        estimate[kind] += x.cycles / CLOCK
        nbytes[kind] += x.nbytes
    return {
        "products": sum(x.flops for x in operations),
        "hbm": nbytes,
        "moved": sum(x.moved for x in operations),
        "bound": bound,  # seconds
        "estimate": estimate,
    }


def bound_of(flops: float, nbytes: float) -> float:
    """Returns the least number of seconds that an operation takes."""
    return max(flops / FLOPS, nbytes / BANDWIDTH)


def kind_of(operation: hlo.Operation, rank: int) -> str:
    """Returns the kind of an operation; a fusion has the kind of its largest product.

    A low-rank product has a dimension of at most `rank`.
    """
    largest = max(operation.products, key=lambda x: x.flops, default=None)
    name = largest.op_name if largest else operation.op_name
    if re.search(LAYER, name):
        if not largest:
            return "rest"
        return "low_rank" if largest.shortest <= rank else "weights"
    if re.search(r"blocks(_\d+)?/attention\b", name):
        return "attention"
    if re.search(r"blocks|/norm\b", name):
        return "rest"
    if largest and largest.shortest <= rank:
        return "low_rank"  # such as A B, which is computed outside of the model
    return "loss" if "jvp(" in name else "rest"


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings and versions that the results depend on."""
    return {
        "settings": training.settings(args),
        "sequence": memory.tokens(args, ARCHITECTURES[args.model]),
        "peaks": {"flops": FLOPS, "bandwidth": BANDWIDTH, "clock": CLOCK},
        "versions": training.versions() | {"device": "TPU v5e, absent"},
    }


# Single operations, whose bound is known.


def alone(rows: int, width: int, wide: int, ranks: list[int]) -> list[dict[str, Any]]:
    """Returns XLA's estimate and the bound of single operations.

    The byte bound counts every operand and result once, all in HBM.
    """
    found = []
    x, h = (rows, width), (rows, wide)
    product, transposed = (lambda x, w: x @ w), (lambda x, y: x.T @ y)
    add(found, "x W", product, x, (width, width))
    add(found, "x W", product, x, (width, wide))
    add(found, "x W", product, h, (wide, width))
    for r in ranks:
        add(found, "x A", product, x, (width, r))
        add(found, "x^T dh", transposed, x, (rows, r))
        add(found, "h B", product, (rows, r), (r, width))
        total = lambda y, h, b: y + h @ b
        add(found, "y + h B", total, x, (rows, r), (r, width))
    add(found, "x + y", lambda x, y: x + y, x, x)
    return found


def add(
    found: list[dict[str, Any]],
    name: str,
    fn: Callable[..., jax.Array],
    *shapes: tuple[int, ...],
) -> None:
    """Compiles an operation on bfloat16 arrays, and appends its bounds and estimate."""
    device = jax.sharding.SingleDeviceSharding(memory.devices("tpu-v5e")[0])
    put = lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=device)
    given = [put(shape) for shape in shapes]
    text = jax.jit(fn).lower(*given).compile().as_text()
    operations = hlo.operations(text)
    flops = sum(x.flops for x in operations)
    out = jax.eval_shape(fn, *given)
    nbytes = sum(2 * x.size for x in (*given, out))
    found.append(
        {
            "name": name,
            "shapes": [*shapes],
            "flop_bound": flops / FLOPS,
            "byte_bound": nbytes / BANDWIDTH,
            "estimate": sum(x.cycles for x in operations) / CLOCK,
        }
    )


# Results.


def heading(results: dict[str, Any]) -> str:
    """Returns one line that describes the compiled steps."""
    given = results["settings"]
    remat = "remat" if given["remat"] else "no remat"
    return (
        f"{given['model']}, {given['layers']} layers, compiled for a TPU v5e: "
        f"batch {given['batch']} x {results['sequence']:,}, {given['dtype']}, {remat}"
    )


def table(results: dict[str, Any]) -> str:
    """Returns a table with a column for each step, and below it single operations."""
    found = results["steps"]
    cells = lambda template, of: [template.format(of(x)) for x in found.values()]
    lines = [
        ["one training step", *found],
        ["GFLOP", *cells("{:,.0f}", lambda x: x["flops"] / 1e9)],
        ["GB accessed, VMEM included", *cells("{:.2f}", lambda x: x["accessed"] / 1e9)],
        ["GB of HBM", *cells("{:.2f}", lambda x: sum(x["hbm"].values()) / 1e9)],
        ["GB copied in parallel", *cells("{:.2f}", lambda x: x["moved"] / 1e9)],
        ["peak of memory, GB", *cells("{:.3f}", lambda x: x["peak"] / 1e9)],
    ]
    for what, title in {"bound": "bound", "estimate": "XLA's estimate"}.items():
        total = lambda x, what=what: sum(x[what].values())
        lines.append(
            [f"{title}, ms", *cells("{:.2f}", lambda x, total=total: 1e3 * total(x))]
        )
        for kind, (name, _) in KINDS.items():
            part = lambda x, what=what, kind=kind: 1e3 * x[what][kind]
            lines.append(["  " + name.replace("\n", " "), *cells("{:.2f}", part)])
        for other in ("full", "floor"):
            if other in found:
                least = total(found[other])
                share = lambda x, total=total, least=least: total(x) / least
                lines.append([f"{title} / {other}", *cells("{:.3f}", share)])
    text = "\n".join(report.aligned(lines))
    if not results["alone"]:
        return text
    lines = [
        ["alone, from HBM to HBM", "FLOPs, us", "bytes, us", "XLA's, us", "/ bound"]
    ]
    for x in results["alone"]:
        bound = max(x["flop_bound"], x["byte_bound"])
        shapes = " ".join("x".join(map(str, shape)) for shape in x["shapes"])
        seconds = x["flop_bound"], x["byte_bound"], x["estimate"]
        micro = [f"{1e6 * s:,.1f}" for s in seconds]
        lines.append([f"{x['name']}  {shapes}", *micro, f"{x['estimate'] / bound:.2f}"])
    return text + "\n\n" + "\n".join(report.aligned(lines))


def summary(results: dict[str, Any]) -> str:
    """Returns sentences on what the numbers mean, and how far XLA's estimate is off."""
    text = ["Bounds and estimates: nothing was run."]
    if results["alone"]:
        ratios = [
            x["estimate"] / max(x["flop_bound"], x["byte_bound"])
            for x in results["alone"]
        ]
        flops = [x["flop_bound"] > x["byte_bound"] for x in results["alone"]]
        those = lambda yes: [r for r, x in zip(ratios, flops, strict=True) if x == yes]
        for name, some in (("FLOPs", those(True)), ("bytes", those(False))):
            if some:
                text.append(
                    f"For single operations bound by {name}, XLA estimates "
                    f"{min(some):.2f} to {max(some):.2f} times the bound."
                )
    return "\n".join(text)


def figure(path: Path, results: dict[str, Any]) -> None:
    """Draws the bound and XLA's estimate of every step, in parts, into a PNG."""
    found = results["steps"]
    names = list(found)
    made = Figure(figsize=(4.2 + 1.75 * len(names), 5.2), dpi=160, layout="constrained")
    axes = made.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=report.INK, length=0)
    sums = lambda x: (sum(x["bound"].values()), sum(x["estimate"].values()))
    top = 1e3 * max(max(sums(x)) for x in found.values())
    axes.set_ylim(0, 1.1 * top)
    axes.set_xlim(-0.5, len(names) - 0.5)
    for i, x in enumerate(found.values()):
        for at, what, alpha in ((i - 0.2, "bound", 1.0), (i + 0.2, "estimate", 0.45)):
            sizes = np.array([1e3 * x[what][kind] for kind in KINDS])
            ends = np.cumsum(sizes)
            for size, end, (_, color) in zip(sizes, ends, KINDS.values(), strict=True):
                axes.bar(at, size, 0.36, end - size, color=color, alpha=alpha)
                if size > 0.035 * top:
                    style = (
                        report.INSIDE
                        if alpha == 1
                        else dict(color=report.INK, ha="center", va="center")
                    )
                    axes.text(at, end - size / 2, f"{size:.1f}", **style, fontsize=8)
            total = f"{ends[-1]:.1f}"
            axes.text(at, ends[-1] + 0.012 * top, total, **report.TOTAL)
    if "floor" in found:
        least = 1e3 * sums(found["floor"])[0]
        axes.axhline(least, color=report.INK, linestyle="--", linewidth=0.8, zorder=0)
        for i, x in enumerate(found.values()):
            names[i] += f"\n{1e3 * sums(x)[0] / least:.3f} of the floor"
    last = list(found.values())[-1]["estimate"]
    ends = np.cumsum([1e3 * last[kind] for kind in KINDS])
    middles = ends - [500 * last[kind] for kind in KINDS]
    places = report.spread(list(middles), 0.075 * top)
    for (name, color), place in zip(KINDS.values(), places, strict=True):
        report.label_right(axes, name, place, color)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks([])
    first, _, second = heading(results).partition(", compiled for a TPU v5e: ")
    note = (
        f"ms on one TPU v5e, {second}\nleft: the bound, each operation at the chip's "
        "peaks; right, pale: XLA's estimate. Nothing was run."
    )
    report.title(axes, f"One training step of {first}", note)
    made.savefig(path)


if __name__ == "__main__":
    main()
