"""Fine-tunes a language model with quantized frozen weights, compared with float32.

    pip install -e ".[demo]" && python benchmarks/quantized_base.py

SmolLM2-135M-Instruct learns to write like the Rotten Tomatoes sentences, as in
to_peft.py, once for each format of its base: float32, int8, int4 and NF4. The token
embedding is int8 in the three quantized bases. All runs start with the same adapters,
see the same rows, and take their steps in turn. Prints the bytes of each base, its
held-out loss before and after training, and a sample of its text; writes the results
and a figure into benchmarks/results. Takes some minutes on two CPU cores.
"""

import argparse
import statistics
import textwrap
import time
from pathlib import Path
from typing import Any

import finetune
import report
import script
import to_peft
import training
from matplotlib.figure import Figure
from option_types import DefaultsFormatter, folder

import lora_jax as lj

FORMATS = {"float32": "float32", "int8": "int8", "int4": "int4", "nf4": "NF4"}
TABLE = "int8"  # format of the token embedding in every quantized base


def main(argv: list[str] | None = None) -> None:
    """Runs the job with the options of the command line."""
    began = time.perf_counter()
    parser = options()
    args = parser.parse_args(argv)
    with script.exit_on_interrupt(parser, args.output):
        with script.exit_on_error(parser, OSError):
            with script.phase("before training"):
                job = to_peft.prepare(args)
                plain = to_peft.function(job.model)
                bases = {how: base(plain, job.params, how) for how in args.bases}
                trees = {
                    how: to_peft.adapt(plain, params, args)
                    for how, params in bases.items()
                }
        run(job, plain, trees, args)
    print(f"{time.perf_counter() - began:.0f} s in all; the files are in {args.output}")


def run(
    job: to_peft.Job,
    plain: to_peft.Apply,
    trees: dict[str, dict],
    args: argparse.Namespace,
) -> None:
    """Trains on each base and writes the files, all of them or none."""
    adapted = lj.lora(plain)

    def apply(adapters, base, ids):
        return adapted(lj.combine(adapters, base), ids)

    found: dict[str, dict[str, Any]] = {}
    methods = {}
    with script.phase("before training"):
        for how, params in trees.items():
            before = to_peft.evaluate(adapted, params, job, args)
            found[how] = {"base_bytes": lj.count(params).base_bytes, "before": before}
            adapters, frozen = lj.split(params)
            methods[how] = finetune.compile_method(
                apply, adapters, frozen, args.lr, job.train, args
            )
    fitted = finetune.fit(methods, job.train, args)
    done = f"after all {args.steps} steps, during the tests"
    with script.phase(done), script.staged(args.output) as new:
        for how, method in methods.items():
            params = lj.combine(fitted[how].trainable, method.frozen)
            found[how] |= {
                "after": to_peft.evaluate(adapted, params, job, args),
                "losses": fitted[how].losses,
                "step_ms": 1000 * statistics.median(fitted[how].seconds),
                "memory": method.memory,
            }
        about = {"settings": training.settings(args), "versions": training.versions()}
        script.write_json(new / "quantized_base.json", {"bases": found} | about)
        figure(new / "quantized_base.png", found, args.steps)
        print(f"{table(found)}\n\n{samples(found)}")


def options() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes SmolLM2 on quantized frozen weights.",
        formatter_class=DefaultsFormatter,
    )
    to_peft.add_training(parser)
    add = parser.add_argument
    add(
        "--bases",
        nargs="+",
        choices=FORMATS,
        default=[*FORMATS],
        help="formats of the frozen kernels",
    )
    output = Path(__file__).parent / "results"
    add("--output", type=folder, default=output, help="where the files are written")
    parser.set_defaults(check=False)
    return parser


def base(apply: to_peft.Apply, params: dict, how: str) -> dict:
    """Returns the parameters with every kernel in the given format of FORMATS."""
    if how == "float32":
        return params
    formats = {"kernel": how, "tokens/embedding": TABLE}
    return lj.quantize(params, formats, axes=to_peft.axes(apply, params))


# Results.


def table(found: dict[str, dict[str, Any]]) -> str:
    """Returns a table with a row for each base."""
    lines = [["base", "MB", "held-out loss before", "after", "step, ms", "peak, MB"]]
    for how, x in found.items():
        cells = [
            f"{x['base_bytes'] / 1e6:.1f}",
            *(f"{x[when]['loss']:.3f}" for when in ("before", "after")),
            f"{x['step_ms']:.0f}",
            f"{x['memory']['peak'] / 1e6:.0f}",
        ]
        lines.append([FORMATS[how], *cells])
    return "\n".join(report.aligned(lines))


def samples(found: dict[str, dict[str, Any]]) -> str:
    """Returns the text that the model on each base writes after training."""
    return "\n".join(
        textwrap.fill(
            f"{FORMATS[how]}: {x['after']['text']}", 80, subsequent_indent="  "
        )
        for how, x in found.items()
    )


def figure(path: Path, found: dict[str, dict[str, Any]], steps: int) -> None:
    """Draws the loss of each base before and after training into a PNG."""
    made = Figure(figsize=(7.2, 1.4 + 0.7 * len(found)), dpi=160, layout="constrained")
    axes = made.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=report.INK, length=0)
    rows = range(len(found))
    ends = {
        when: [x[when]["loss"] for x in found.values()] for when in ("before", "after")
    }
    axes.hlines(rows, ends["after"], ends["before"], color="#cccccc", linewidth=3)
    for losses, name in zip(ends.values(), ("full", "lora"), strict=True):
        color = report.LINES[name]
        axes.plot(losses, rows, "o", color=color, markersize=9)
        for loss, row in zip(losses, rows, strict=True):
            above = dict(xytext=(0, 9), textcoords="offset points", ha="center")
            axes.annotate(f"{loss:.3f}", (loss, row), **above, color=color)
    sizes = [x["base_bytes"] / 1e6 for x in found.values()]
    names = [f"{FORMATS[how]}\n{n:.0f} MB" for how, n in zip(found, sizes, strict=True)]
    axes.set_yticks(rows, names)
    axes.set_ylim(len(found) - 0.6, -0.7)
    axes.margins(x=0.08)
    note = f"red: before training; blue: after {steps} steps of adapters on that base"
    report.title(axes, "Held-out loss of the next token, nats, by base", note)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    made.savefig(path)


if __name__ == "__main__":
    main()
