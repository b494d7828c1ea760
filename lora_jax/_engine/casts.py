"""Determines which casts of a weight must be applied to W + scale * A B.

A cast to fewer digits on the way to a product is applied to W alone: the factors keep
the digits that they have, and the result is right up to the rounding of the cast. That
is wrong where the rounded weight meets the weight itself again, as in `w - q(w)` or
`where(q(w) == w, ...)`: there the rounding is the result. Such casts are determined
before the evaluation begins, since by the time of the second use W is rounded already.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from lora_jax._engine.dtypes import digits
from lora_jax._engine.flow import flow
from lora_jax._engine.jaxpr import (
    CONTRACTIONS,
    CUSTOM,
    operand_dtypes,
    result_dtypes,
)

# Primitives of several operands whose result i is made of operand i alone.
ONE_TO_ONE = {"optimization_barrier", "device_put"}


class Origin(NamedTuple):
    """The weights that a value depends on, each with the last narrowing cast, or None.

    By way of `values` each element still depends on a few elements of the weight. By
    way of `products` it is a sum of many terms, and a rounding is one of them.
    """

    values: frozenset[tuple[Hashable, int | None]] = frozenset()
    products: frozenset[tuple[Hashable, int | None]] = frozenset()


def is_narrowing(eqn: Any) -> bool:
    """Whether an equation casts to a float of fewer digits, of two bytes or more."""
    if eqn.primitive.name != "convert_element_type":
        return False
    (old,), (new,) = operand_dtypes(eqn), result_dtypes(eqn)
    return 0 < digits(new) < digits(old) and new.itemsize > 1


def exact_casts(
    jaxpr: Any, names: Sequence[Iterable[Hashable]], leaving: Sequence[int] = ()
) -> frozenset[int]:
    """The `id`s of the narrowing casts that must be applied to W + scale * A B.

    Args:
      jaxpr: The program.
      names: The weights that each input holds.
      leaving: Outputs whose later use is unknown: no cast of a weight among them may be
        applied to W alone.
    """
    found: set[int] = set()

    def step(eqn, operands):
        name = eqn.primitive.name
        if is_narrowing(eqn):
            (x,) = operands
            here = lambda pairs: frozenset((w, id(eqn)) for w, _ in pairs)
            return [Origin(here(x.values), here(x.products))]
        if name in ONE_TO_ONE:
            return operands
        out = join(operands)
        if name in CONTRACTIONS:
            return [Origin(products=out.values | out.products)] * len(eqn.outvars)
        _note_meetings(operands, found)
        return [out] * len(eqn.outvars)

    def enter(eqn, operands):
        # A rule of `jax.custom_vjp` may combine what the function itself does not.
        if eqn.primitive.name in CUSTOM:
            _note_meetings(operands, found)

    inputs = [Origin(frozenset((name, None) for name in each)) for each in names]
    results = flow(jaxpr, inputs, step, join, Origin(), enter)
    for i in leaving:
        found |= {cast for _, cast in results[i].values if cast is not None}
    return frozenset(found)


def join(origins: Iterable[Origin]) -> Origin:
    origins = [x for x in origins if x != Origin()]
    if len(origins) == 1:
        return origins[0]
    pairs = zip(*origins, strict=True)
    return Origin(*(frozenset().union(*sets) for sets in pairs))


def _note_meetings(operands: Sequence[Origin], found: set[int]) -> None:
    """Adds the casts that meet their weight here on a way that bypasses them."""
    for i, x in enumerate(operands):
        for weight, cast in x.values:
            if cast is None or cast in found:
                continue
            others = (y for j, y in enumerate(operands) if j != i)
            pairs = (pair for y in others for pair in y.values | y.products)
            if any(w == weight and other != cast for w, other in pairs):
                found.add(cast)
