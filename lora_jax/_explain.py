"""`explain`: which adapters stay factored under `lora(fn)`, and at what cost."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from lora_jax._adapters import LowRank, adapters_or_quantized, without_adapters
from lora_jax._arguments import (
    chosen,
    leaf_offset,
    leaves_of,
    named,
    on_states,
    pick,
    replaced,
)
from lora_jax._engine.flops import flops
from lora_jax._engine.jaxpr import trace_call
from lora_jax._engine.liveness import used_inputs
from lora_jax._engine.quantized import format_name
from lora_jax._engine.run import Run, by_weight, collect_notes
from lora_jax._lora import call
from lora_jax._tree import (
    Path,
    is_quantized,
    leaf_order,
    quantized_leaves,
    unbox,
    unflatten,
)

CAST = "cast before the update"
TITLES = ("weight", "shape", "stored", "rank", "factored", "FLOPs")
TITLES += ("materialized by", CAST)
RIGHT = {"rank", "factored", "FLOPs"}  # columns of numbers


class Row(NamedTuple):
    """What becomes of one weight: adapted, quantized, or trained in full.

    Attributes:
      path: Of the weight in the tree.
      shape: Of the weight.
      stored: "nf4/64" for NF4 with a scale per 64 elements, or the dtype.
      rank: Of the adapter; 0 for a quantized weight without one, None for a leaf that
        is trained in full.
      full_rank: The largest useful rank; None for a leaf that is trained in full.
      factored: In how many places of the program the weight stays factored, or is
        materialized only because that takes fewer FLOPs.
      materialized: The primitives that need W + scale * A B itself, and the custom
        rules whose derivative needs it or a gradient of its size.
      places: Their lines in the user's source.
      flops: What the adapter adds.
      used: False if no result depends on the weight.
      casts: The lines where W alone is cast to fewer digits, and the update is added to
        the product.
    """

    path: str
    shape: tuple[int, ...]
    stored: str
    rank: int | None
    full_rank: int | None
    factored: int
    materialized: tuple[str, ...]
    places: tuple[str, ...]
    flops: int
    used: bool
    casts: tuple[str, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether the weight is stored in 4 or 8 bits per element."""
        return "/" in self.stored


class Report(NamedTuple):
    """A row for each adapter, and the FLOPs of the function itself. Prints a table."""

    rows: tuple[Row, ...]
    flops: int

    def __str__(self) -> str:
        columns = dict(
            zip(TITLES, zip(*map(_cells, self.rows), strict=True), strict=True)
        )
        if not any(row.quantized for row in self.rows):
            del columns["stored"]  # each weight is stored in its dtype
        if not any(row.casts for row in self.rows):
            del columns[CAST]
        padded = []
        for title, cells in columns.items():
            n = max(map(len, (title, *cells)))
            pad = str.rjust if title in RIGHT else str.ljust
            padded.append([pad(cell, n) for cell in (title, *cells)])
        table = ("  ".join(line).rstrip() for line in zip(*padded, strict=True))
        return "\n".join((*table, _totals(self)))


def explain(
    fn: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] | None = None,
    argnames: str | Sequence[str] = (),
    **kwargs: Any,
) -> Report:
    """Explains what `lora(fn)` does with each adapter.

    The function is traced; nothing runs and nothing is allocated.

    Args:
      fn: The function that `lora` would get, such as `model.apply`. Or a module from
        `LoRA`, or a method of one: `explain(module, x)`, `explain(module.encode, x)`.
      *args: Its arguments, arrays or `ShapeDtypeStruct`; the parameters among them are
        a tree from `lorafy`.
      argnums: Which positional argument holds the parameters, as in `lora`. Default: 0.
      argnames: Which keyword argument holds them, as in `lora`.
      **kwargs: Its keyword arguments.

    Returns:
      A `Report`, which prints as a table. `.rows` has one row per adapter and per
      quantized weight, with the attributes `path`, `shape`, `stored` ("nf4/64" for NF4
      with a scale per 64 elements, or a dtype), `rank` (0 without an adapter, None for
      a leaf that is trained in full), `full_rank` (a higher rank is wasteful, and the
      table shows that), `factored` (in how many places of the program the weight stays
      factored), `materialized` (the primitives that need W + scale * A B itself;
      "derivative of custom_vjp_call" if only the derivative needs it, or a gradient of
      its size), `places` (their lines in the source of `fn`), `flops` (what the adapter
      adds), `used` (whether a result depends on it) and `casts` (the lines where W
      alone is cast to fewer digits: see `lora`). `.flops` are those of the function
      itself. FLOPs are those of products in the forward pass, two for a multiplication
      and an addition, in all steps of a `scan`, and in one of a `while` loop.

    Raises:
      ValueError: If the parameters have broken adapters, or neither adapters nor
        quantized weights.
      TypeError: If `argnums` or `argnames` names no argument, or one that is no tree.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj
      >>> fn = lambda params, x: jnp.tanh(x @ params["kernel"])
      >>> params = lj.lorafy({"kernel": jnp.ones((512, 512))}, 8)
      >>> print(lj.explain(fn, params, jnp.ones((4, 512))))
      weight  shape       rank  factored   FLOPs  materialized by
      kernel  (512, 512)     8         1  +65.5k
      Adapters: 1. Uses in factors: 1. FLOPs: +65.5k to 2.1M (3.12 %).

    Reference:
      Hu et al., "LoRA", 2021. https://arxiv.org/abs/2106.09685
    """
    where = chosen(argnums, argnames)
    fn, args, kwargs, _ = on_states(fn, args, kwargs, where, adapters=True)
    given = pick(args, kwargs, where)
    leaves = {key: leaves_of(key, params) for key, params in given.items()}
    adapters = {key: adapters_or_quantized(each) for key, each in leaves.items()}
    base = {
        key: unflatten(params, without_adapters(leaves[key], adapters[key]))
        for key, params in given.items()
    }
    plain_args, plain_kwargs = replaced(args, kwargs, base)
    plain, dynamic = trace_call(fn, plain_args, plain_kwargs)
    use = dict(zip(dynamic, used_inputs(plain.jaxpr), strict=True))
    used = {
        (key, path)
        for key in given
        for i, path in enumerate(
            leaf_order(base[key]), leaf_offset(plain_args, plain_kwargs, key)
        )
        if use.get(i)
    }

    # Traced over the arrays of quantized weights: `adapted` takes those as they are.
    parts, treedef = jax.tree.flatten((args, kwargs))

    def adapted(*parts):
        args, kwargs = treedef.unflatten(parts)
        run = Run("allow", counting=True)
        return call(fn, args, kwargs, where, "ignore", run)

    with collect_notes() as found:
        trace_call(adapted, parts, {})
    single = by_weight(found)
    rows = []
    for key in given:
        for path, adapter in (quantized_leaves(leaves[key]) | adapters[key]).items():
            name = named(key, path, given)
            notes = [n for n in single if str(n.name) == name]
            is_used = (key, path) in used
            rows.append(
                _row(name, leaves[key], path, adapter, notes * is_used, is_used)
            )
    return Report(tuple(rows), flops(plain.jaxpr))


def _row(
    name: str,
    leaves: dict[Path, Any],
    path: Path,
    adapter: Any,
    notes: Sequence[Any],
    used: bool,
) -> Row:
    w, rank, full = unbox(leaves[path]), None, None
    if adapter is w:
        rank, full = 0, 0
    elif isinstance(adapter, LowRank):
        rank = unbox(leaves[adapter.a]).shape[-1]
        full = min(math.prod(w.shape[d] for d in dims) for dims in adapter.axes[1:])
    met = dict.fromkeys((n.primitive, n.line) for n in notes if n.materialized)
    return Row(
        path=name,
        shape=tuple(w.shape),
        stored=format_name(w) if is_quantized(w) else str(w.dtype),
        rank=rank,
        full_rank=full,
        factored=sum(not (n.materialized or n.alone) for n in notes),
        materialized=tuple(primitive for primitive, _ in met),
        places=tuple(line for _, line in met),
        flops=sum(n.flops for n in notes),
        used=used,
        casts=tuple(dict.fromkeys(n.line for n in notes if n.alone)),
    )


def _cells(row: Row) -> tuple[str, ...]:
    pairs = zip(row.materialized, row.places, strict=True)
    causes = ", ".join(f"{name} at {place}" if place else name for name, place in pairs)
    return (
        row.path,
        str(row.shape),
        row.stored,
        {None: "full", 0: "none"}.get(row.rank, str(row.rank)),
        str(row.factored),
        f"+{_short(row.flops)}",
        causes if row.used else _IDLE[row.rank == 0],
        ", ".join(row.casts),
    )


_IDLE = ("NEVER USED: it would learn nothing", "never used")


def _totals(report: Report) -> str:
    adapted = [row for row in report.rows if row.rank != 0]
    materialized = sum(len(row.materialized) for row in adapted)
    idle = sum(not row.used for row in adapted)
    quantized = sum(row.quantized for row in report.rows)
    full = sum(row.rank is None for row in report.rows)
    added = sum(row.flops for row in report.rows)
    wasteful = [
        f"{row.path} ({row.rank} above {row.full_rank})"
        for row in report.rows
        if row.rank is not None and row.rank > (row.full_rank or 0)
    ]
    share = f" ({100 * added / report.flops:.3g} %)" if report.flops else ""
    parts = (
        f"Adapters: {sum(row.rank is not None for row in adapted)}",
        *([f"Trained in full: {full}"] if full else []),
        *([f"Quantized: {quantized}"] if quantized else []),
        f"Uses in factors: {sum(row.factored for row in adapted)}",
        *([f"Uses materialized: {materialized}"] if materialized else []),
        *([f"NEVER USED: {idle}"] if idle else []),
        *([f"Wasteful ranks: {', '.join(wasteful)}"] if wasteful else []),
        f"FLOPs: +{_short(added)} to {_short(report.flops)}{share}",
    )
    return ". ".join(parts) + "."


def _short(n: float) -> str:
    """A number in three digits and a unit, such as 1.23G."""
    unit = max(min(int(math.log10(max(n, 1))) // 3, 5), 0)
    return f"{n / 1000**unit:.3g}{'kMGTP'[unit - 1] if unit else ''}"
