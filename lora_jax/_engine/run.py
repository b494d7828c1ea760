"""One evaluation of a function on factors: what it is told, and what it has to tell."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from lora_jax._engine import factors
from lora_jax._engine.factors import JOIN, Factors, materialize
from lora_jax._engine.jaxpr import (
    bind,
    flops,
    place,
    trace,
)


class Run(NamedTuple):
    """One evaluation of a jaxpr: how to treat what cannot be factored, and dropout."""

    materialize: str  # "warn", "error" or "allow"
    rate: float = 0.0
    key: jax.Array | None = None  # None: no dropout
    counting: bool = False  # whether to note every product, with its FLOPs
    jaxpr: Any = None  # where the evaluation stands: the jaxpr, the equation in it,
    eqn: Any = None
    trail: tuple[tuple[int, int], ...] = ()  # and (its index, how often it runs) ...


Rule = Callable[[Run, Any, list[Any]], list[Any] | None]


class Note(NamedTuple):
    """What became of a weight in one equation."""

    name: str  # the weight's
    primitive: str
    place: str  # file:line in the user's source
    formed: bool  # W + scale * A B was formed, instead of a factored product
    flops: int = 0  # added by the adapter, if they were counted


# What an evaluation has to tell its caller, by equation and weight: an equation that
# JAX traces twice is told once. A context, because the jitted forms below are shared.
notes: contextvars.ContextVar[dict[Any, Note] | None] = contextvars.ContextVar(
    "notes", default=None
)


# The calls of jitted functions that an evaluation is in; a context for the same reason.
calls: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar(
    "calls", default=()
)


def plain(run: Run, values: Sequence[Any], cause: str) -> list[Any]:
    """The values with every `Factors` among them materialised."""
    return [plain_one(run, x, cause) if isinstance(x, Factors) else x for x in values]


def plain_one(run: Run, f: Factors, cause: str) -> jax.Array:
    where, own = place_of(run), factors.varying(f)
    cost = 2 * math.prod(f.shape[d] for d in own) * f.a.shape[-1]
    if own in ({*factors.present(f.a)}, {*factors.present(f.b)}):
        # A row, a column, or some: no dearer than a product.
        note(run, Note(str(f.name), cause, where, False, cost))
        return materialize(f)
    if run.materialize == "error":
        at = f" at {where}" if where else ""
        raise ValueError(
            f"{f.name!r} meets {cause!r}{at}, which needs the whole weight, so it "
            "cannot stay factored. Write lora(fn, materialize='allow') to form "
            "W + scale * A B there, or leave the weight out: "
            "lorafy(params, rank, exclude=[...])."
        )
    note(run, Note(str(f.name), cause, where, True, cost))
    return materialize(f)


def count(run: Run, rule: Callable[..., Any], operands: Sequence[Any]) -> None:
    """Notes a product that stayed factored, and what it adds to the plain one."""
    eqn = run.eqn
    # Of two weights the larger stays factored.
    f = max((x for x in operands if isinstance(x, Factors)), key=lambda x: x.w.size)
    quiet = run._replace(materialize="allow", counting=False)
    whole = trace(lambda *xs: rule(quiet, eqn, list(xs)), *operands)
    base = trace(lambda *xs: bind(eqn, xs), *weights(operands))
    added = flops(whole.jaxpr) - flops(base.jaxpr)
    note(run, Note(str(f.name), eqn.primitive.name, place_of(run), False, added))


@contextlib.contextmanager
def noting() -> Iterator[dict[Any, Note]]:
    """Collects what evaluations within it have to tell."""
    found: dict[Any, Note] = {}
    token = notes.set(found)
    try:
        yield found
    finally:
        notes.reset(token)


def place_of(run: Run) -> str:
    """Where in the user's source an evaluation stands, or ""."""
    if run.eqn is None:
        return ""
    chain = [*calls.get(), run.eqn]
    names = [None, *(call.params["name"] for call in chain[:-1])]
    places = map(place, reversed(chain), reversed(names))
    return next(filter(None, places), "")


def note(run: Run, what: Note) -> None:
    found = notes.get()
    if found is None:
        return
    times, names = math.prod(n for _, n in run.trail), what.name.split(JOIN)
    for name in names:
        key = (run.trail, name, what.primitive, what.place, what.formed)
        found[key] = what._replace(name=name, flops=times * what.flops // len(names))


def weights(values: Sequence[Any]) -> list[Any]:
    """The plain arrays, without the factors, from which a trace takes the types."""
    return [x.w if isinstance(x, Factors) else x for x in values]
