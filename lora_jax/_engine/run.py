"""One evaluation of a function on factors: what it is told, and what it has to tell."""

import contextlib
import contextvars
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from lora_jax._engine import factors
from lora_jax._engine.factors import JOIN, Factors, Label, materialize
from lora_jax._engine.jaxpr import (
    bind,
    flops,
    place,
    trace,
)
from lora_jax._engine.shapes import size


class Run(NamedTuple):
    """One evaluation of a jaxpr: how to treat what cannot be factored, and dropout."""

    materialize: str  # "warn", "error" or "allow"
    rate: float = 0.0
    key: jax.Array | None = None  # None: no dropout
    counting: bool = False  # whether to note every product, with its FLOPs
    looped: bool = False  # in the body of a loop
    inputs: tuple[tuple[Any, Any], ...] = ()  # tracers of `fn`, each with its operand
    exact: frozenset[int] | None = None  # casts of the whole sum; None: not yet known
    known: Any = None  # the same for a derivative rule: `evaluate`
    leads_to: Callable[..., bool] | None = None  # of a jaxpr's equations: `look_ahead`
    eqn: Any = None  # where the evaluation stands in it,
    trail: tuple[tuple[int, int], ...] = ()  # and (its index, how often it runs) ...


Rule = Callable[[Run, Any, list[Any]], list[Any] | None]


class Note(NamedTuple):
    """What became of a weight in one equation."""

    name: Label  # the weight's
    primitive: str
    place: str  # file:line in the user's source
    formed: bool  # W + scale * A B was formed, instead of a factored product
    flops: int = 0  # added by the adapter, if they were counted
    alone: bool = False  # a cast of W alone, which the update does not see
    cheaper: bool = False  # formed because the factors would cost more
    adapted: bool = True  # False: in few bits, and without an adapter


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
    form(run, f, cause)
    return materialize(f)


def form(run: Run, f: Factors, cause: str) -> None:
    """Says that an array of a weight's size is formed, itself or a gradient of it."""
    if not f.rank:
        note(run, Note(f.name, cause, place_of(run), True, adapted=False))
        return
    own, cost = factors.varying(f), factors.delta_flops(f)
    # A row, a column, or some: no dearer than a product.
    thin = own in ({*factors.present(f.a)}, {*factors.present(f.b)})
    what = Note(f.name, cause, place_of(run), not thin, cost)
    if run.materialize == "error" and not thin:
        raise ValueError(
            f"{_met(what)}, which needs the whole weight, so it "
            "cannot stay factored. Write lora(fn, materialize='allow') to form "
            "W + scale * A B there, or leave the weight out: "
            "lorafy(params, rank, exclude=[...])."
        )
    note(run, what)


def count(run: Run, rule: Callable[..., Any], operands: Sequence[Any]) -> None:
    """Notes a product that stayed factored, and what it adds to the plain one."""
    eqn = run.eqn
    # Of two weights the larger stays factored.
    weighty = (x for x in operands if isinstance(x, Factors))
    f = max(weighty, key=lambda x: size(x.shape))
    quiet = run._replace(materialize="allow", counting=False)
    whole = trace(lambda *xs: rule(quiet, eqn, list(xs)), *operands)
    base = trace(lambda *xs: bind(eqn, xs), *weights(operands))
    added = flops(whole.jaxpr) - flops(base.jaxpr)
    note(run, Note(f.name, eqn.primitive.name, place_of(run), False, added))


@contextlib.contextmanager
def noting() -> Iterator[dict[Any, Note]]:
    """Collects what evaluations within it have to tell."""
    found: dict[Any, Note] = {}
    token = notes.set(found)
    try:
        yield found
    finally:
        notes.reset(token)


def listener() -> int:
    """Who listens to what an evaluation tells, as a number to tell others from it."""
    return id(notes.get())


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
        # A derivative, which JAX takes after the function has returned.
        if run.materialize == "warn":
            warn([what])
        return
    times = math.prod(n for _, n in run.trail)
    key = (run.trail, str(what.name), what.name.of, *what[1:4])
    found[key] = what._replace(flops=times * what.flops)


def by_weight(found: dict[Any, Note]) -> list[Note]:
    """What was told, of each weight for itself."""
    single = []
    for told in found.values():
        names = told.name.split(JOIN)
        flops = told.flops // len(names)
        single += [told._replace(name=Label(n), flops=flops) for n in names]
    return single


def warn(told: Sequence[Note]) -> None:
    """Warns of the weights that were formed, once for all of them."""
    formed = list(
        dict.fromkeys(_met(n) for n in told if n.formed and n.adapted and not n.cheaper)
    )
    if formed:
        listing = "; ".join(formed[:6]) + ("; ..." if len(formed) > 6 else "")
        warnings.warn(
            f"{listing}, which needs the whole weight: W + scale * A B, or in a "
            "derivative the whole gradient of it, is formed there, exactly, for more "
            "time and memory. Write lora(fn, materialize='allow') if that is meant.",
            stacklevel=3,
        )


def _met(note: Note) -> str:
    at = f" at {note.place}" if note.place else ""
    return f"{str(note.name)!r} meets {note.primitive!r}{at}"


def weights(values: Sequence[Any]) -> list[Any]:
    """The plain arrays, without the factors, from which a trace takes the types."""
    return [x.w if isinstance(x, Factors) else x for x in values]
