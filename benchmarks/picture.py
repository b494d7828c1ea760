"""Draws the figure of the project's README from results of memory.py and finetune.py.

    memory="python benchmarks/memory.py --model llama-3-8b --device tpu-v5e"
    $memory --methods lora full --output benchmarks/results/bfloat16
    $memory --methods lora --base int8 --table int8 --output benchmarks/results/int8
    $memory --methods lora --base nf4 --table int8 --output benchmarks/results/nf4
    python benchmarks/finetune.py
    python benchmarks/picture.py benchmarks/results/{bfloat16,int8,nf4}

The figure has its own background color, so that it is readable on light and dark pages.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import script
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from option_types import DefaultsFormatter, existing_file, positive
from report import INK, LINES, UNITS

BACKGROUND, QUIET = "#f6f8fa", "#6b7480"
HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> None:
    """Draws the figure with the options of the command line."""
    parser = options()
    args = parser.parse_args(argv)
    try:
        plans = [read(folder / "memory.json") for folder in args.plans]
        job = read(args.job)
        bars = steps(plans)
        pairs = compared(job)
    except ValueError as error:
        parser.error(str(error))
    with script.staged(args.output.parent) as new:
        draw(new / args.output.name, title(plans), bars, args.chip, pairs)
    print(f"{args.output}: {args.output.stat().st_size / 1e3:.0f} kB")


def options() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        description="Draws the README's figure.", formatter_class=DefaultsFormatter
    )
    add, results = parser.add_argument, HERE / "results"
    add("plans", nargs="+", type=Path, help="folders that memory.py wrote")
    job = results / "finetune.json"
    add("--job", type=existing_file, default=job, help="results of finetune.py")
    add("--chip", type=positive, default=16.0, help="GB of a chip, drawn as a line")
    add("--output", type=Path, default=HERE / "picture.png", help="the PNG to write")
    return parser


def read(path: Path) -> dict[str, Any]:
    """Reads a file of results.

    Raises:
      ValueError: If the file cannot be read as JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} contains no results: {error}.") from None


def steps(plans: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, str]]:
    """Returns the label of each bar with its peak in GB and its color.

    The first bar is full fine-tuning, from the first plan; each plan adds one of LoRA.

    Raises:
      ValueError: If the plans are of different jobs, or one has no step with LoRA.
    """
    jobs = {json.dumps(shared_settings(plan), sort_keys=True) for plan in plans}
    if len(jobs) > 1:
        raise ValueError(f"The plans are of different jobs: {', '.join(sorted(jobs))}.")
    if "full" not in plans[0]["methods"]:
        raise ValueError(
            "The first plan has no full fine-tuning: run it with --methods lora full."
        )
    bars = {"full fine-tuning": (peak(plans[0], "full"), LINES["full"])}
    for plan in plans:
        base = plan["settings"]["base"] or plan["settings"]["dtype"]
        name = {"nf4": "NF4"}.get(base, base)
        bars[f"LoRA, base in {name}"] = (peak(plan, "lora"), LINES["lora"])
    return bars


def shared_settings(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that must be equal in all plans of one figure."""
    names = "model", "device", "batch", "sequence", "rank", "layers", "chunk"
    return {name: plan["settings"][name] for name in names}


def peak(plan: Mapping[str, Any], method: str) -> float:
    """Returns the peak of a method's step in GB."""
    found = plan["methods"].get(method, {}).get("peak")
    if found is None:
        raise ValueError(f"A plan has no peak of {method!r}: {shared_settings(plan)}.")
    return found / UNITS["GB"]


def title(plans: Sequence[Mapping[str, Any]]) -> str:
    """Returns the title of the bars: the model, the tokens and the unit."""
    given = plans[0]["settings"]
    tokens = f"{given['batch']} x {plans[0]['sequence']:,} tokens"
    return f"A training step of {given['model']}, {tokens}: memory, GB"


def compared(job: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Returns the results of finetune.py, as texts for LoRA and for full fine-tuning.

    Raises:
      ValueError: If one of the two did not run.
    """
    if not {"lora", "full"} <= job.keys():
        raise ValueError(
            "The job lacks 'lora' or 'full': run finetune.py with --method lora full."
        )
    pair = [job["lora"], job["full"]]
    words = {
        "held-out accuracy": [f"{x['accuracy']:.1%}" for x in pair],
        "trainable parameters": [f"{x['trainable'] / 1e6:.2f} million" for x in pair],
        "optimizer state": [f"{x['memory']['optimizer'] / 1e6:.1f} MB" for x in pair],
        "saved file": [f"{x['adapter_bytes'] / 1e6:.1f} MB" for x in pair],
    }
    return {name: (lora, full) for name, (lora, full) in words.items()}


def draw(
    path: Path,
    heading: str,
    bars: Mapping[str, tuple[float, str]],
    chip: float,
    pairs: Mapping[str, tuple[str, str]],
) -> None:
    """Draws the bars, and below them the table of finetune.py's results."""
    heights = [0.62 * len(bars) + 0.7, 0.34 * len(pairs) + 0.75]
    made = Figure(figsize=(8.4, sum(heights)), dpi=130, layout="constrained")
    made.set_facecolor(BACKGROUND)
    made.get_layout_engine().set(w_pad=0.16, h_pad=0.12)
    above, below = made.subplots(2, 1, height_ratios=heights)
    for axes in (above, below):
        axes.set_facecolor(BACKGROUND)
        axes.spines[:].set_visible(False)
        axes.set_yticks([])
        axes.set_xticks([])
    memory(above, heading, bars, chip)
    quality(below, pairs)
    made.savefig(path, facecolor=BACKGROUND)


def memory(
    axes: Axes, heading: str, bars: Mapping[str, tuple[float, str]], chip: float
) -> None:
    """Draws a bar for each step, pale if it does not fit the chip."""
    most = max(size for size, _ in bars.values())
    for y, (name, (size, color)) in enumerate(bars.items()):
        fits = size <= chip
        axes.barh(-y, size, 0.56, color=color, alpha=1 if fits else 0.45)
        note = "" if fits else ", does not fit"
        words = dict(va="center", color=INK, fontsize=12)
        axes.text(size + 0.01 * most, -y, f"{size:.1f}{note}", **words)
        bold = dict(words, color=color, fontweight="bold", ha="right")
        axes.text(-0.015 * most, -y, name, **bold)
    axes.axvline(chip, color=INK, linestyle="--", linewidth=1.2)
    low = 0.55 - len(bars)
    words = dict(color=INK, fontsize=11, va="bottom")
    axes.text(chip + 0.01 * most, low, f"one chip of {chip:g} GB", **words)
    axes.set_xlim(-0.36 * most, 1.2 * most)
    axes.set_title(heading, loc="left", color=INK, fontsize=13, fontweight="bold")


def quality(axes: Axes, pairs: Mapping[str, tuple[str, str]]) -> None:
    """Writes the table of finetune.py's results, with a column for each method."""
    axes.set(xlim=(0, 1), ylim=(-len(pairs) - 0.1, 0.7))
    heading = "all-MiniLM-L6-v2 learns sentiment: the same, for a fraction"
    axes.set_title(heading, loc="left", color=INK, fontsize=13, fontweight="bold")
    columns = {"LoRA": (0.5, LINES["lora"]), "full fine-tuning": (0.78, LINES["full"])}
    for name, (x, color) in columns.items():
        axes.text(x, 0, name, color=color, fontsize=12, fontweight="bold")
    for y, (name, words) in enumerate(pairs.items(), 1):
        axes.text(0, -y, name, color=QUIET, fontsize=12)
        for word, (x, _) in zip(words, columns.values(), strict=True):
            axes.text(x, -y, word, color=INK, fontsize=12)


if __name__ == "__main__":
    main()
