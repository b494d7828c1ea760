"""Per-evaluation options (`Run`) and diagnostics (`Note`)."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from lora_jax._engine import factors
from lora_jax._engine.factors import Factors, WeightName, is_factors, materialize
from lora_jax._engine.flops import flops
from lora_jax._engine.jaxpr import bind, params_of, trace
from lora_jax._engine.shapes import size
from lora_jax._engine.source import source_line, warn_user


class Run(NamedTuple):
    """The options of one evaluation of a jaxpr, and where it is.

    Attributes:
      materialize: "warn", "error" or "allow", as in `lora`.
      rate, key: Those of dropout; without a key there is none.
      counting: Whether to note every product, with its FLOPs.
      looped: Whether this is the body of a loop.
      inputs: The tracers that the traced function got, each with its operand.
      exact: The casts that must be applied to W + scale * A B, as from `exact_casts`;
        None if not determined yet.
      known: Values of tracers of finished traces, as for `evaluate`.
      leads_to: What `look_ahead` returns for the jaxpr.
      eqn: The equation that is evaluated.
      trail: Its index, and how often it runs; before it, those of the calls and loops
        around it.
      within: The name of the jitted function that contains it, if one does.
      line: The line of the call of that function.
    """

    materialize: str
    rate: float = 0.0
    key: jax.Array | None = None
    counting: bool = False
    looped: bool = False
    inputs: tuple[tuple[Any, Any], ...] = ()
    exact: frozenset[int] | None = None
    known: Any = None
    leads_to: Callable[..., bool] = lambda *_, **__: False
    eqn: Any = None
    trail: tuple[tuple[int, int], ...] = ()
    within: str | None = None
    line: str = ""

    def bind(self, *operands: Any) -> list[Any]:
        """The results of the equation on other operands."""
        return bind(self.eqn, operands)


# A rule evaluates an equation with at least one operand of type `Factors`:
# `rule(run, *operands, **params)`, with the parameters of the equation, returns the
# results. None: the weights are materialized, and the equation is evaluated on arrays.
Rule = Callable[..., Sequence[Any] | None]


class Note(NamedTuple):
    """What one equation did with a weight."""

    name: WeightName
    primitive: str
    line: str  # file:line in the user's source, or ""
    materialized: bool  # W + scale * A B was computed, instead of a factored product
    flops: int = 0  # added by the adapter, if counted
    alone: bool = False  # a cast of W alone, which the update does not see
    cheaper: bool = False  # materialized because the factors would cost more
    adapted: bool = True  # False: a quantized weight without an adapter


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Notes:
    """The notes of one trace, as a static result of a jitted function.

    JAX returns static results again with every cached call, so that notes need no cache
    of their own.
    """

    each: tuple[Note, ...] = ()


# Where notes go: by equation and weight, so that an equation that JAX traces twice is
# noted once. A context variable rather than an argument, because JAX runs derivative
# rules later, when the evaluation that defined them may have ended.
_collected: contextvars.ContextVar[dict[Any, Note] | None] = contextvars.ContextVar(
    "collected", default=None
)


@contextlib.contextmanager
def collect_notes() -> Iterator[dict[Any, Note]]:
    """Collects the notes of evaluations in its context."""
    found: dict[Any, Note] = {}
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


def note(run: Run, what: Note) -> None:
    found = _collected.get()
    if found is None:
        # A derivative rule that JAX runs after `lora(fn)` has returned.
        if run.materialize == "warn":
            warn([what])
        return
    times = math.prod(n for _, n in run.trail)
    key = (run.trail, what.name.names, what.name.operands, *what[1:4])
    found[key] = what._replace(flops=times * what.flops)


def line_of(run: Run) -> str:
    """The user's line that is evaluated, or that of the call around it, or ""."""
    if run.eqn is None:
        return ""
    return source_line(run.eqn, run.within) or run.line


def materialize_all(run: Run, values: Iterable[Any], cause: str) -> list[Any]:
    """The values, with every `Factors` among them materialized and noted."""
    return [materialize_one(run, x, cause) if is_factors(x) else x for x in values]


def materialize_one(run: Run, f: Factors, cause: str) -> jax.Array:
    note_materialized(run, f, cause)
    return materialize(f)


def note_materialized(run: Run, f: Factors, cause: str) -> None:
    """Notes that a weight, or a gradient of its size, is materialized; or raises.

    Rows or columns of a weight are no more expensive than a product, and do not count.
    """
    if not f.rank:
        note(run, Note(f.name, cause, line_of(run), True, adapted=False))
        return
    dims, cost = factors.adapted_dims(f), factors.delta_flops(f)
    rows = dims in ({*factors.dims_of(f.a)}, {*factors.dims_of(f.b)})
    what = Note(f.name, cause, line_of(run), not rows, cost)
    if run.materialize == "error" and not rows:
        raise NeedsWeight(what)
    note(run, what)


class NeedsWeight(ValueError):
    """The error of `materialize="error"`, to which an outer call can add its line."""

    def __init__(self, what: Note) -> None:
        self.note = what
        super().__init__(
            f"{_met(what)}, which needs W + scale * A B itself, so it cannot stay "
            "factored. Write lora(fn, materialize='allow') to materialize it there, or "
            "leave the weight out: lorafy(params, rank, exclude=[...])."
        )


def count(run: Run, rule: Rule, operands: Sequence[Any]) -> None:
    """Notes a product that stayed factored, and what it adds to the plain one."""
    eqn = run.eqn
    # Of two weights the larger stays factored.
    f = max((x for x in operands if is_factors(x)), key=lambda x: size(x.shape))
    quiet = run._replace(materialize="allow", counting=False)
    factored = trace(lambda *xs: rule(quiet, *xs, **params_of(eqn)), *operands)
    base = trace(lambda *xs: bind(eqn, xs), *weights(operands))
    added = flops(factored.jaxpr) - flops(base.jaxpr)
    note(run, Note(f.name, eqn.primitive.name, line_of(run), False, added))


def by_weight(found: dict[Any, Note]) -> list[Note]:
    """The notes, each of a single weight."""
    return [
        n._replace(name=WeightName((name,)), flops=n.flops // len(n.name.names))
        for n in found.values()
        for name in n.name.names
    ]


def warn(notes: Iterable[Note]) -> None:
    """Warns once of all weights that were materialized."""
    met = list(
        dict.fromkeys(
            _met(n) for n in notes if n.materialized and n.adapted and not n.cheaper
        )
    )
    if met:
        listing = "; ".join(met[:6]) + ("; ..." if len(met) > 6 else "")
        warn_user(
            f"{listing}, which needs W + scale * A B itself, or in a derivative its "
            "gradient: it is materialized there, which is exact and takes more time "
            "and memory. Write lora(fn, materialize='allow') if that is intended."
        )


def _met(note: Note) -> str:
    at = f" at {note.line}" if note.line else ""
    return f"{str(note.name)!r} meets {note.primitive!r}{at}"


def weights(values: Iterable[Any]) -> list[Any]:
    """The values without their adapters, for a trace that needs their types alone."""
    return [x.w if is_factors(x) else x for x in values]
