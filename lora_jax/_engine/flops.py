"""The FLOPs of a program, counted from its jaxpr."""

import math
from typing import Any

from lora_jax._engine.jaxpr import CALLS, CONTRACTIONS, call_jaxpr, opened, shapes


def flops(jaxpr: Any) -> int:
    """The FLOPs of a jaxpr's products: two for each multiplication and addition.

    The body of a `scan` counts as often as it runs, that of a `while` once, and of the
    branches of a `cond` the most expensive.
    """
    return sum(map(_flops, opened(jaxpr).equations))


def _flops(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        return flops(call_jaxpr(eqn))
    if name == "scan":
        return params["length"] * flops(params["jaxpr"])
    if name == "while":
        return flops(params["cond_jaxpr"]) + flops(params["body_jaxpr"])
    if name == "cond":
        return max(map(flops, params["branches"]))
    if name not in CONTRACTIONS:
        return 0
    (lhs, rhs, *_), (out,) = shapes(eqn)
    if name == "conv_general_dilated":
        out_channel = params["dimension_numbers"].rhs_spec[0]
        return 2 * math.prod(out) * math.prod(rhs) // max(rhs[out_channel], 1)
    if name == "ragged_dot_general":
        dims = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    else:
        dims = params["dimension_numbers"]
    (contracted, _), _ = dims
    return 2 * math.prod(out) * math.prod(lhs[d] for d in contracted)
