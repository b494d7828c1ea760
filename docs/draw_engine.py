"""Draws the figure of the page "How it works": python docs/draw_engine.py."""

from pathlib import Path
from xml.sax.saxutils import escape

INK, QUIET, BLUE, RED = "#1f2933", "#52606d", "#0b6e8f", "#b8503a"
WIDTH, HEIGHT = 860, 452
PALE = {BLUE: "#e3f1f5", RED: "#f8e6e1", QUIET: "#eef1f4"}


def box(x, y, w, h, color, *lines):
    """Returns a box with lines of text; the first is bold."""
    parts = [
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="7" fill="{PALE[color]}" '
        f'stroke="{color}" stroke-width="1.5"/>'
    ]
    top = y + h / 2 - 9 * (len(lines) - 1)
    for i, line in enumerate(lines):
        weight = 'font-weight="600"' if i == 0 else f'fill="{QUIET}"'
        parts.append(
            f'<text x="{x + w / 2}" y="{top + 18 * i}" {weight} text-anchor="middle" '
            f'dominant-baseline="central">{escape(line)}</text>'
        )
    return "\n".join(parts)


def arrow(*points):
    """Returns a line through points, with a head at the last."""
    path = " L".join(f"{x} {y}" for x, y in points)
    return (
        f'<path d="M{path}" fill="none" stroke="{QUIET}" stroke-width="1.5" '
        'marker-end="url(#head)"/>'
    )


def figure():
    """Returns the figure as SVG."""
    x = [16, 304, 592]
    parts = [
        box(x[0], 20, 252, 74, QUIET, "fn(params, x)", "your function, on the plain W"),
        box(x[1], 20, 252, 74, QUIET, "a jaxpr", "equations: primitive, operands"),
        box(x[2], 20, 252, 74, BLUE, "Factors(w, a, b, scale)", "stands for W + s A B"),
        arrow((268, 57), (300, 57)),
        f'<text x="284" y="14" fill="{QUIET}" text-anchor="middle">trace</text>',
        box(170, 148, 520, 56, BLUE, "evaluate each equation: RULES[primitive]"),
        arrow((430, 94), (430, 144)),
        arrow((718, 94), (718, 176), (694, 176)),
        box(
            x[0],
            262,
            190,
            84,
            BLUE,
            "a view",
            "reshape, transpose,",
            "slice, scan's slice",
        ),
        box(226, 262, 190, 84, BLUE, "a product", "dot, convolution,", "lookup"),
        box(
            436, 262, 190, 84, BLUE, "a call", "jit, remat, scan, cond,", "custom rules"
        ),
        box(646, 262, 198, 84, RED, "no rule", "tanh(W), a new primitive"),
    ]
    parts += [arrow((430, 204), (430, 232), (c, 232), (c, 258)) for c in (111, 321)]
    parts += [arrow((430, 204), (430, 232), (c, 232), (c, 258)) for c in (531, 745)]
    ends = [
        (111, BLUE, 190, "Factors again:", "the same view of W, A, B"),
        (321, BLUE, 190, "an array:", "x W + s (x A) B"),
        (531, BLUE, 190, "its own jaxpr,", "evaluated the same way"),
        (745, RED, 198, "W + s A B materialized,", "exact, with a warning"),
    ]
    for c, color, w, *lines in ends:
        parts += [arrow((c, 346), (c, 378)), box(c - w / 2, 382, w, 54, color, *lines)]
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{QUIET}"/>'
        "</marker>"
    )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="14" fill="{INK}">\n'
        f"<defs>{head}</defs>\n"
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    path = Path(__file__).parent / "pages/engine.svg"
    path.write_text(figure(), encoding="utf-8")
