"""Tables and figures of the benchmarks: those of finetune.py, and shared parts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

NAMES = {
    "lora": "LoRA",
    "full": "full",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "lora+": "LoRA+",
}
LINES = {
    "lora": "#0b6e8f",
    "full": "#c8553d",
    "dora": "#7b5aa6",
    "pissa": "#3c9a5f",
    "lora+": "#c08a1e",
}
PARTS = {
    "parameters": ("parameters", "#7f8c99"),
    "optimizer": ("optimizer state", "#e0a030"),
    "temporaries": (
        "temporaries:\nactivations and\ngradients (hatched,\nat most)",
        "#4d8f80",
    ),
}
UNITS = {"MB": 1e6, "GB": 1e9}
INK = "#333333"
WIDTH = 21
HATCH = dict(color="none", edgecolor="white", hatch="////", linewidth=0)
INSIDE = dict(color="white", ha="center", va="center")
TOTAL = dict(color=INK, ha="center", fontweight="bold")


def table(results: Mapping[str, Any]) -> str:
    """Returns a column for each method, and their ratio if there are two."""
    found = {name: x for name, x in results.items() if name in NAMES}
    megabytes = {
        "parameters": "parameters, MB",
        "optimizer": "optimizer state, MB",
        "temporaries": "temporaries, MB",
        "gradients": "  including gradients, at most, MB",
        "peak": "all memory of a step, MB",
    }
    rows = [
        ("held-out accuracy", "{:.3f}", [x["accuracy"] for x in found.values()]),
        ("trainable parameters", "{:,}", [x["trainable"] for x in found.values()]),
        ("all parameters", "{:,}", [x["total"] for x in found.values()]),
        ("median step, ms", "{:.0f}", [x["step_ms"] for x in found.values()]),
        *(
            (label, "{:.1f}", [x["memory"][part] / 1e6 for x in found.values()])
            for part, label in megabytes.items()
        ),
        (
            "saved file, MB",
            "{:.2f}",
            [x["adapter_bytes"] / 1e6 for x in found.values()],
        ),
    ]
    lines = [["", *(NAMES[name] for name in found)]]
    lines += [[label, *map(cell.format, values)] for label, cell, values in rows]
    if len(found) == 2:
        lines[0].append(" / ".join(lines[0][1:]))
        for line, (_, _, (one, other)) in zip(lines[1:], rows, strict=True):
            line.append(f"{one / other:.3f}" if other else "")
    text = aligned(lines)
    adapted = {name: x for name, x in found.items() if "merged_accuracy" in x}
    if adapted:
        text += [
            "",
            f"held-out accuracy merged into the plain model: "
            f"{each(adapted, 'merged_accuracy')}",
            f"held-out accuracy reloaded from the saved file: "
            f"{each(adapted, 'reloaded_accuracy')}",
        ]
    return "\n".join(text)


def each(found: Mapping[str, Mapping[str, Any]], what: str) -> str:
    """Returns one result of every method, with its name if there are several."""
    names = [f"{NAMES[name]} " if len(found) > 1 else "" for name in found]
    values = [f"{x[what]:.3f}" for x in found.values()]
    return ", ".join(map(str.__add__, names, values))


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Returns lines of cells as aligned text, with a rule below the first line."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        line[0].ljust(widths[0])
        + "".join(
            f"   {cell:>{width}}"
            for cell, width in zip(line[1:], widths[1:], strict=True)
        )
        for line in lines
    ]
    return [text[0], "-" * len(text[0]), *text[1:]]


def figure(
    path: Path, results: Mapping[str, Any], losses: Mapping[str, Sequence[float]]
) -> None:
    """Draws the losses and the memory of one training step into a PNG."""
    more = max(0, len(losses) - 2)  # each bar beyond two widens the figure
    size = (10.5 + 1.7 * more, 4.6)
    made = Figure(figsize=size, dpi=160, layout="constrained")
    left, right = made.subplots(1, 2, width_ratios=[1.25, 1 + 0.3 * more])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, length=3)
    draw_losses(left, results, losses)
    draw_memory(right, {name: results[name] for name in losses})
    made.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.06)
    made.savefig(path)


def draw_losses(
    axes: Axes, results: Mapping[str, Any], losses: Mapping[str, Sequence[float]]
) -> None:
    """Draws every step's loss as a faint line, and its running mean as a bold one.

    The label stands at the end of the line. With more than two methods only the means
    are drawn: all methods see the same batches, so the faint lines would overlap.
    """
    many = len(losses) > 2
    ends = {}
    for name, raw in losses.items():
        steps = np.arange(1, len(raw) + 1)
        mean = smooth(np.asarray(raw))
        if not many:
            axes.plot(steps, raw, color=LINES[name], alpha=0.22, linewidth=0.8)
        axes.plot(steps, mean, color=LINES[name], linewidth=2.2)
        ends[name] = mean[-1]
    bottom, top = axes.get_ylim()
    gap = (0.07 if many else 0.18) * (top - bottom)
    places = spread(list(ends.values()), gap)
    if many:  # keep the labels above those of the x axis
        places += max(0, bottom + gap / 2 - min(places))
    for name, y in zip(ends, places, strict=True):
        right = f"{results[name]['accuracy']:.1%}"
        text = f"{right} {NAMES[name]}" if many else f"{NAMES[name]}\n{right} right"
        label_right(axes, text if many else f"{text}\non held-out", y, LINES[name])
    axes.set_xlim(0, max(map(len, losses.values())))
    axes.set_xlabel("step", color=INK)
    around = f"the mean of the {WIDTH} steps around it"
    note = f"faint: every step; bold: {around}"
    if many:
        note = f"at every step {around}; next to the names: right on held-out"
    title(axes, "Training loss", note)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def token_losses(losses: Sequence[float]) -> tuple[Figure, Axes, float]:
    """Draws the losses of a decoder's steps and their running mean.

    Returns:
      The figure, its axes, and the mean at the last step.
    """
    width = len(losses) // 5 | 1
    mean = smooth(np.asarray(losses), width)
    made = Figure(figsize=(7.2, 4.4), dpi=160, layout="constrained")
    axes = made.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, length=3)
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=LINES["lora"], alpha=0.3, linewidth=0.9)
    axes.plot(steps, mean, color=LINES["lora"], linewidth=2.2)
    axes.set_xlim(0, len(losses))
    axes.set_xlabel("step", color=INK)
    note = f"faint: every step; bold: the mean of the {width} steps around it"
    title(axes, "Loss of the next token, nats", note)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return made, axes, mean[-1]


def held_losses(path: Path, losses: Sequence[float], held: Mapping[int, float]) -> None:
    """Draws the losses of all steps, their running mean, and held-out ones by step."""
    ink, other = LINES["lora"], LINES["full"]
    made, axes, end = token_losses(losses)
    ends = {"training": (end, ink)}
    if held:
        at, values = zip(*sorted(held.items()), strict=True)
        axes.plot(at, values, "o-", color=other, clip_on=False, zorder=3)
        ends[f"held-out {values[-1]:.2f}"] = values[-1], other
    bottom, top = axes.get_ylim()
    places = spread([y for y, _ in ends.values()], 0.06 * (top - bottom))
    for (text, (_, color)), y in zip(ends.items(), places, strict=True):
        label_right(axes, text, y, color)
    made.savefig(path)


def draw_memory(axes: Axes, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Draws one bar of stacked parts for every method, with labels at the last bar."""
    stack(axes, [x["memory"] for x in found.values()], "MB", 0)
    labels = [
        f"{NAMES[name]}\n{x['trainable']:,} trainable" for name, x in found.items()
    ]
    below(axes, labels, [LINES[name] for name in found])
    title(axes, "Memory of one training step, MB", "what XLA allocates for it")


def stack(
    axes: Axes, bars: Sequence[Mapping[str, int]], unit: str, digits: int
) -> None:
    """Draws a bar of stacked parts for each step, with labels next to the last bar."""
    colors = [color for _, color in PARTS.values()]
    sizes = [[x[part] / UNITS[unit] for part in PARTS] for x in bars]
    top = max(map(sum, sizes))
    axes.set_ylim(0, 1.08 * top)
    axes.set_xlim(-0.45, len(sizes) - 0.62)
    for x, (bar, parts) in enumerate(zip(sizes, bars, strict=True)):
        ends = np.cumsum(bar)
        middles = ends - np.array(bar) / 2
        axes.bar(x, bar, 0.56, ends - bar, color=colors)
        axes.text(x, ends[-1] + 0.015 * top, f"{ends[-1]:,.{digits}f} {unit}", **TOTAL)
        outside = []
        for y, size, color in zip(middles, bar, colors, strict=True):
            inside, more = f"{size:,.{digits}f}", f"{size:,.{digits + 1}f}"
            if size > 0.05 * top:
                axes.text(x, y, inside, **INSIDE, bbox=dict(color=color, pad=1.5))
            else:
                outside.append((y, more, color))
        heights = [y for y, *_ in outside]
        apart = spread(heights, 0.04 * top) if outside else []
        for y, (_, more, color) in zip(apart, outside, strict=True):
            axes.text(x + 0.31, y, more, color=color, va="center")
        # XLA reports only the sum of the temporaries, which include the gradients.
        gradients = min(parts["gradients"] / UNITS[unit], bar[-1])
        axes.bar(x, gradients, 0.56, ends[-2], **HATCH)
    places = spread(middles, 0.13 * top)  # one name has four lines
    for (name, color), place in zip(PARTS.values(), places, strict=True):
        label_right(axes, name, place, color)


def below(axes: Axes, labels: Sequence[str], colors: Sequence[str]) -> None:
    """Labels the bars below them and removes the y axis: values stand on the bars."""
    axes.set_xticks(range(len(labels)), labels)
    for tick, color in zip(axes.get_xticklabels(), colors, strict=True):
        tick.set(color=color, fontweight="bold")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="x", length=0)


def label_right(axes: Axes, text: str, y: float, color: str) -> None:
    """Writes a bold text to the right of the axes, at the height of `y`."""
    axes.annotate(
        text,
        (1.02, y),
        xycoords=("axes fraction", "data"),
        color=color,
        va="center",
        fontweight="bold",
        annotation_clip=False,
    )


def title(axes: Axes, text: str, note: str) -> None:
    """Writes a title, and below it in gray a note on how to read the axes."""
    below = "\n" * (1 + note.count("\n"))
    axes.set_title(text + below, loc="left", color=INK, fontweight="bold")
    axes.text(0, 1.02, note, color="#777777", transform=axes.transAxes, fontsize=9)


def smooth(raw: np.ndarray, width: int = WIDTH) -> np.ndarray:
    """Averages the `width` steps around each step; fewer at the two ends."""
    ends = np.arange(len(raw))[:, None] + [-(width // 2), width // 2 + 1]
    return np.array([raw[max(0, first) : last].mean() for first, last in ends])


def spread(values: Sequence[float], gap: float) -> np.ndarray:
    """Moves values apart by at least `gap`, keeping their order and their mean."""
    order = np.argsort(values, kind="stable")
    placed = np.sort(np.asarray(values, float))
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    out = np.empty(len(placed))
    out[order] = placed - (placed - np.sort(values)).mean()
    return out
