"""What `lora` makes of a function: which adapters stay factored, and at what cost."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from lora_jax._adapters import find_adapters, without_adapters
from lora_jax._engine.jaxpr import flops, trace_call, used_inputs
from lora_jax._engine.run import Run, noting
from lora_jax._lora import call
from lora_jax._tree import flatten, leaf_order, path_name, unbox, unflatten

TITLES = ("weight", "shape", "rank", "factored", "FLOPs", "formed whole by")


class Row(NamedTuple):
    """What becomes of one adapter.

    `factored` counts the places in the program where it stays in factors;
    `materialized` names the primitives that need W + scale * A B, at the `places` in
    the user's source; `flops` is what it adds. `used` is False for an adapter that no
    result depends on.
    """

    path: str
    shape: tuple[int, ...]
    rank: int
    factored: int
    materialized: tuple[str, ...]
    places: tuple[str, ...]
    flops: int
    used: bool


class Report(NamedTuple):
    """A row for each adapter, and the FLOPs of the function itself. Prints a table."""

    rows: tuple[Row, ...]
    flops: int

    def __str__(self) -> str:
        lines = [TITLES, *map(_cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = {0, 1, 5}
        table = (
            "  ".join(
                cell.ljust(n) if i in left else cell.rjust(n)
                for i, (cell, n) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )
        return "\n".join((*table, _totals(self)))


def explain(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Report:
    """Explains what `lora(fn)` does with each adapter, by tracing alone.

    Nothing runs and nothing is allocated.

    Args:
      fn: The function that `lora` would get, such as `model.apply`.
      params: A tree from `lorafy`, of arrays or `ShapeDtypeStruct`.
      *args: The other arguments of `fn`, arrays or `ShapeDtypeStruct`.
      **kwargs: Its keyword arguments.

    Returns:
      A `Report`, which prints as a table. `.rows` has one row per adapter: `path`,
      `shape`, `rank`, `factored` (in how many places of the program it stays in
      factors), `materialized` (the primitives that need the whole weight, so that
      W + scale * A B is formed), `places` (their files and lines in the source of
      `fn`), `flops` (what it adds), `used` (whether a result depends on it). `.flops`
      is the function's own. FLOPs are of products, forward: two for each number
      multiplied and added, in each step of a `scan`, in one of a `while` loop.

    Raises:
      ValueError: If `params` has no adapters or broken ones.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> fn = lambda params, x: jnp.tanh(x @ params["kernel"])
      >>> params = lj.lorafy({"kernel": jnp.ones((512, 512))}, 8)
      >>> print(lj.explain(fn, params, jnp.ones((4, 512))))
      weight  shape       rank  factored   FLOPs  formed whole by
      kernel  (512, 512)     8         1  +65.5k
      Adapters: 1. Uses in factors: 1. FLOPs: +65.5k to 2.1M (3.12 %).

    Reference:
      Hu et al., "LoRA", 2021. https://arxiv.org/abs/2106.09685
    """
    leaves = flatten(params)
    adapters = find_adapters(leaves)
    base = unflatten(params, without_adapters(leaves, adapters))
    plain, dynamic = trace_call(fn, (base, *args), kwargs)
    order = [path_name(path) for path in leaf_order(base)]
    used = zip(dynamic, used_inputs(plain.jaxpr), strict=True)
    used = {order[i] for i, use in used if use and i < len(order)}

    def adapted(*args, **kwargs):
        run = Run("allow", counting=True)
        return call(fn, args, kwargs, (0,), "ignore", run)

    with noting() as found:
        trace_call(adapted, (params, *args), kwargs)
    rows = []
    for path, adapter in adapters.items():
        name = path_name(path)
        notes = [n for n in found.values() if n.name == name and name in used]
        formed = dict.fromkeys((n.primitive, n.place) for n in notes if n.formed)
        rows.append(
            Row(
                path=name,
                shape=tuple(unbox(leaves[path]).shape),
                rank=unbox(leaves[adapter.a]).shape[-1],
                factored=sum(not n.formed for n in notes),
                materialized=tuple(primitive for primitive, _ in formed),
                places=tuple(place for _, place in formed),
                flops=sum(n.flops for n in notes),
                used=name in used,
            )
        )
    return Report(tuple(rows), flops(plain.jaxpr))


def _cells(row: Row) -> tuple[str, ...]:
    pairs = zip(row.materialized, row.places, strict=True)
    causes = ", ".join(f"{name} at {place}" if place else name for name, place in pairs)
    return (
        row.path,
        str(row.shape),
        str(row.rank),
        str(row.factored),
        f"+{_short(row.flops)}",
        causes if row.used else "NEVER USED: it would learn nothing",
    )


def _totals(report: Report) -> str:
    formed = sum(len(row.materialized) for row in report.rows)
    idle = sum(not row.used for row in report.rows)
    added = sum(row.flops for row in report.rows)
    share = f" ({100 * added / report.flops:.3g} %)" if report.flops else ""
    parts = (
        f"Adapters: {len(report.rows)}",
        f"Uses in factors: {sum(row.factored for row in report.rows)}",
        *([f"Uses formed whole: {formed}"] if formed else []),
        *([f"NEVER USED: {idle}"] if idle else []),
        f"FLOPs: +{_short(added)} to {_short(report.flops)}{share}",
    )
    return ". ".join(parts) + "."


def _short(n: float) -> str:
    """As 1.23G: three digits and a unit."""
    unit = max(min(int(math.log10(max(n, 1))) // 3, 5), 0)
    return f"{n / 1000**unit:.3g}{'kMGTP'[unit - 1] if unit else ''}"
