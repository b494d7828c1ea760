"""Says what bounds the time of a training step on a TPU v5e that need not be there.

    python benchmarks/roofline.py --model gpt-0.87b --batch 4 --rank 8 64

XLA's own compiler for the chip makes the program of one step, layer by layer, since
the body of a loop would count once. Each operation of it takes at least the greater of
FLOPs / 197e12 and bytes / 819e9 seconds, by the chip's published peaks. The bound is
the sum over all operations, and stands beside XLA's own estimate, by what it is spent
on: for full fine-tuning, LoRA, W + A B materialised, and a floor. At the floor all
weights are frozen, there are no adapters, and the gradient flows as far as LoRA needs
it: to the outputs of the first block's query, key and value.

These are bounds and estimates, not measurements. Bytes are those of operands and
results in HBM: an array that XLA keeps in VMEM takes none, and the copies that bring
arrays there are told apart, as they run while other operations do. XLA's estimate
is good for large products alone: how far it is from the bound for single operations,
whose bound is known, is printed too (--no-alone leaves it out).

Prints tables; writes the numbers, a figure and the text of XLA's programs into
benchmarks/results. A compilation takes about a minute on two CPU cores.
"""

import argparse
import copy
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import files
import hlo
import jax
import jax.numpy as jnp
import memory
import numpy as np
import report
import training
from flax import traverse_util
from matplotlib.figure import Figure
from models.architectures import ARCHITECTURES
from readers import Defaults, folder, whole
from tqdm import tqdm

# https://cloud.google.com/tpu/docs/v5e: of one chip, in bfloat16
FLOPS, BANDWIDTH = 197e12, 819e9
CLOCK = 1.5e9  # cycles of a second, of four units of 128 x 128: 196.6e12 FLOPs
METHODS = {"full": "full", "lora": "LoRA", "merged": "W + AB", "floor": "floor"}
KINDS = {
    "weights": ("products with W", "#0b6e8f"),
    "thin": ("thin products", "#c8553d"),
    "attention": ("attention", "#7b5aa6"),
    "loss": ("logits, loss,\nembedding", "#7f8c99"),
    "rest": ("the rest", "#c08a1e"),
}
LAYER = r"blocks(?:_\d+)?/(?:attention|mlp)/(?:query|key|value|out|up|gate|down)\b"
FIRST = ("query", "key", "value")  # what reads the first block's input


def main(argv: list[str] | None = None) -> None:
    """Runs the job that the command line asks for."""
    began = time.perf_counter()
    parser = options()
    args = parser.parse_args(argv)
    with files.stoppable(parser, args.output):
        with files.refusing(parser, RuntimeError):
            lowered = steps(args)
        found, texts = {"steps": {}, "alone": []}, {}
        with tqdm(lowered.items(), unit=" compiled", disable=None) as bar:
            for name, lower in bar:
                bar.set_description(name)
                found["steps"][name], texts[name] = measure(*lower())
        if args.alone:
            found["alone"] = alone(4096, 2048, 8192, args.rank)
        found |= about(args)
        with files.written(args.output) as new:
            files.write_json(new / "roofline.json", found)
            figure(new / "roofline.png", found)
            (new / "programs").mkdir()
            for name, text in texts.items():
                file = name.replace(" ", "_").replace(",", "") + ".txt"
                (new / "programs" / file).write_text(text, encoding="utf-8")
            print(f"{heading(found)}\n\n{table(found)}\n\n{words(found)}")
    count = len(found["steps"]) + len(found["alone"])
    seconds = time.perf_counter() - began
    print(f"{count} compilations, {seconds:.0f} s; the files are in {args.output}")


def options() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Says what bounds the time of a training step on a TPU v5e.",
        formatter_class=Defaults,
    )
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", choices=list(ARCHITECTURES), default="gpt-0.87b", help="its sizes")
    add("--layers", type=whole(1), default=2, help="instead of the model's own number")
    add("--batch", type=whole(1), default=4, help="sequences, or images")
    add("--sequence", type=whole(1), help="tokens; default: 1024, an image's patches")
    add("--rank", type=whole(1), nargs="+", default=[8], help="of every adapter")
    add(
        "--dtype",
        choices=memory.FLOATS,
        default="bfloat16",
        help="of all but the adapters, which are float32",
    )
    add("--remat", action=switch, default=False, help="keep only each block's input")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="to compare",
    )
    add("--alone", action=switch, default=True, help="single operations too")
    place = Path(__file__).parent / "results"
    add("--output", type=folder, default=place, help="where the files are written")
    # What memory.py can be asked and this cannot.
    parser.set_defaults(device="tpu-v5e", targets=["blocks*/*/kernel"], scan=False)
    parser.set_defaults(base=None, table=None, chunk=None)
    return parser


# The steps, from shapes alone.


def steps(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Returns what lowers each step; what the options get wrong is found before that.

    Raises:
      RuntimeError: If there is nothing to compile with.
      ValueError: If an option does not fit the model.
    """
    found = {}
    for name in METHODS:
        if name not in args.methods:
            continue
        # W + A B takes hardly more for a greater rank.
        for rank in args.rank if name == "lora" else args.rank[:1]:
            own = copy.copy(args)
            own.rank = rank
            if name == "floor":
                own.methods = ["full"]  # without adapters
                # The biases are where the gradient arrives; they cost next to nothing.
                job = memory.prepare(own, bias=True)
                lower = lambda job=job: (floor(job), 0)
            else:
                own.methods = [name]
                job, thin = memory.prepare(own), 0 if name == "full" else rank
                lower = lambda job=job, name=name, thin=thin: (
                    memory.lower(job, name, job.args.batch)[0],
                    thin,
                )
            ranked = f", rank {rank}" if name in ("lora", "merged") else ""
            found[METHODS[name] + ranked] = lower
    return found


def floor(job: memory.Job) -> Any:
    """Returns the step that trains nothing but the first biases, lowered."""
    flat = traverse_util.flatten_dict(job.params, sep="/")
    first = [f"blocks_0/attention/{name}/bias" for name in FIRST]
    trainable = {name: flat.pop(name) for name in first}

    def loss(trainable, frozen, *batch):
        params = traverse_util.unflatten_dict(trainable | frozen, sep="/")
        return job.loss(params, *batch)

    return memory.lower_step(job, loss, trainable, flat, job.args.batch)[0]


def measure(lowered: Any, rank: int) -> tuple[dict[str, Any], str]:
    """Returns what XLA's program of a step takes, in sum and by kind, and its text.

    The rank is 0 where there are no adapters, and so no thin products.
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
    """Returns the sums over operations, the bound and XLA's estimate by kind too."""
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
    """Returns the seconds that an operation takes at least."""
    return max(flops / FLOPS, nbytes / BANDWIDTH)


def kind_of(operation: hlo.Operation, rank: int) -> str:
    """Returns what an operation is for; a fusion is for the product within it.

    Thin products have the rank on one side.
    """
    largest = max(operation.products, key=lambda x: x.flops, default=None)
    name = largest.op_name if largest else operation.op_name
    if re.search(LAYER, name):
        if not largest:
            return "rest"
        return "thin" if largest.shortest <= rank else "weights"
    if re.search(r"blocks(_\d+)?/attention\b", name):
        return "attention"
    if re.search(r"blocks|/norm\b", name):
        return "rest"
    if largest and largest.shortest <= rank:
        return "thin"  # as A B, which is made outside of the model
    return "loss" if "jvp(" in name else "rest"


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Returns what the numbers depend on."""
    return {
        "settings": training.settings(args),
        "sequence": memory.tokens(args, ARCHITECTURES[args.model]),
        "peaks": {"flops": FLOPS, "bandwidth": BANDWIDTH, "clock": CLOCK},
        "versions": training.versions() | {"device": "TPU v5e, absent"},
    }


# Single operations, whose bound is known.


def alone(rows: int, width: int, wide: int, ranks: list[int]) -> list[dict[str, Any]]:
    """Returns XLA's estimate for single operations beside the bound of each.

    Operands and results are in HBM, as they would be alone, each once.
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
    """Compiles an operation of bfloat16 arrays, and adds what is known of it."""
    place = jax.sharding.SingleDeviceSharding(memory.devices("tpu-v5e")[0])
    put = lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
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


# What came of it.


def heading(results: dict[str, Any]) -> str:
    """Returns what was compiled, in a line."""
    given = results["settings"]
    remat = "remat" if given["remat"] else "no remat"
    return (
        f"{given['model']}, {given['layers']} layers, on a TPU v5e that is not there: "
        f"batch {given['batch']} x {results['sequence']:,}, {given['dtype']}, {remat}"
    )


def table(results: dict[str, Any]) -> str:
    """Returns the steps side by side, and single operations below them."""
    found = results["steps"]
    cells = lambda form, of: [form.format(of(x)) for x in found.values()]
    lines = [
        ["one training step", *found],
        ["GFLOP", *cells("{:,.0f}", lambda x: x["flops"] / 1e9)],
        ["GB accessed, VMEM included", *cells("{:.2f}", lambda x: x["accessed"] / 1e9)],
        ["GB of HBM", *cells("{:.2f}", lambda x: sum(x["hbm"].values()) / 1e9)],
        ["GB copied beside", *cells("{:.2f}", lambda x: x["moved"] / 1e9)],
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
        numbers = x["flop_bound"], x["byte_bound"], x["estimate"]
        micro = [f"{1e6 * n:,.1f}" for n in numbers]
        lines.append([f"{x['name']}  {shapes}", *micro, f"{x['estimate'] / bound:.2f}"])
    return text + "\n\n" + "\n".join(report.aligned(lines))


def words(results: dict[str, Any]) -> str:
    """Says what the numbers are, and what they are not."""
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
                    f"Where {name} bound, XLA estimates {min(some):.2f} to "
                    f"{max(some):.2f} of the bound of an operation alone."
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
        report.beside(axes, name, place, color)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks([])
    first, _, second = heading(results).partition(", on a TPU v5e that is not there: ")
    note = (
        f"ms on one TPU v5e, {second}\nleft: the bound, each operation at the chip's "
        "peaks; right, pale: XLA's estimate. Nothing was run."
    )
    report.title(axes, f"One training step of {first}", note)
    made.savefig(path)


if __name__ == "__main__":
    main()
