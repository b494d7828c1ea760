"""The evaluation of a jaxpr on `Factors`, and the rules of calls.

`run_jaxpr` evaluates each equation with a weight among its operands by the rule in
`RULES` for its primitive: a view returns `Factors`, a product an array, and a call
evaluates its own jaxpr. Without a rule, or if a rule returns None, the weights are
materialized for this one use, which is slower and never wrong.

views.py and products.py list their rules; those that evaluate a jaxpr themselves are
registered by `rule_for`, here and in derivatives.py and loops.py.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax._engine import factors
from lora_jax._engine.casts import exact_casts
from lora_jax._engine.factors import (
    WeightName,
    is_factors,
    joined,
    renamed,
    unwrap,
)
from lora_jax._engine.jaxpr import (
    bind,
    call_jaxpr,
    evaluate,
    ids_of,
    opened,
    params_of,
    repeats,
)
from lora_jax._engine.liveness import look_ahead
from lora_jax._engine.products import PRODUCTS
from lora_jax._engine.quantized_views import constrained
from lora_jax._engine.run import (
    NeedsWeight,
    Note,
    Notes,
    Rule,
    Run,
    collect_notes,
    count,
    line_of,
    materialize_all,
    note,
)
from lora_jax._engine.views import VIEWS, is_view

RULES: dict[str, Rule] = {**VIEWS, **PRODUCTS}


R = TypeVar("R", bound=Rule)


def rule_for(*primitives: str) -> Callable[[R], R]:
    """Registers the rule of these primitives."""

    def register(rule: R) -> R:
        assert RULES.keys().isdisjoint(primitives)
        RULES.update(dict.fromkeys(primitives, rule))
        return rule

    return register


def run_jaxpr(
    run: Run,
    jaxpr: Any,
    args: Sequence[Any],
    beyond: Callable[..., bool] | None = None,
    leaving: Sequence[int] = (),
) -> list[Any]:
    """The results of a jaxpr on arrays and `Factors`, which are such themselves.

    `beyond` is as for `look_ahead`, and `leaving` as for `exact_casts`.
    """
    leads_to = look_ahead(jaxpr, beyond)
    if run.exact is None:
        names = [x.name.names if is_factors(x) else () for x in args]
        run = run._replace(exact=exact_casts(jaxpr, names, leaving))

    def apply(index, eqn, operands):
        if not any(map(is_factors, operands)):
            return bind(eqn, operands)
        name = eqn.primitive.name
        trail = (*run.trail, (index, repeats(eqn)))
        key = _folded_in(run.key, index)
        here = run._replace(leads_to=leads_to, eqn=eqn, trail=trail, key=key)
        rule = RULES.get(name)
        results = rule and rule(here, *operands, **params_of(eqn))
        if results is None:
            return bind(eqn, materialize_all(here, operands, name))
        if rule and run.counting and name in PRODUCTS:
            count(here, rule, operands)
        return [*map(unwrap, results)]

    return evaluate(jaxpr, args, apply, run.known)


def _folded_in(key: jax.Array | None, index: int) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, index)


@rule_for("closed_call", "eval_jaxpr")
def _inline(run: Run, *operands: Any, **_: Any) -> list[Any]:
    return run_jaxpr(run, call_jaxpr(run.eqn), operands)


@rule_for("shard_map")
def _shard_map(
    run: Run,
    *operands: Any,
    mesh: Any,
    in_specs: Any,
    out_specs: Any,
    manual_axes: Any,
    check_vma: bool,
    **_: Any,
) -> list[Any]:
    specs: list[Any] = []
    args = []
    for x, spec in zip(operands, in_specs, strict=True):
        x, new_specs = factors.sharded(x, spec, mesh) if is_factors(x) else (x, [spec])
        args.append(x)
        specs += new_specs
    leaves, treedef = jax.tree.flatten(args)

    def call(key, leaves):
        if key is not None:  # each device drops elements of its own
            indices = map(lax.axis_index, manual_axes)
            key = functools.reduce(jax.random.fold_in, indices, key)
        here = run._replace(key=key)
        results = run_jaxpr(here, call_jaxpr(run.eqn), treedef.unflatten(leaves))
        return materialize_all(here, results, "shard_map")

    mapped = jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(None if run.key is None else PartitionSpec(), specs),
        out_specs=list(out_specs),
        axis_names={*manual_axes},
        check_vma=check_vma,
    )
    return mapped(run.key, leaves)


@rule_for("remat2")
def _remat(
    run: Run, *operands: Any, prevent_cse: Any, policy: Any, **_: Any
) -> list[Any]:
    def call(key, operands):
        return run_jaxpr(run._replace(key=key), call_jaxpr(run.eqn), operands)

    checkpointed = jax.checkpoint(call, prevent_cse=prevent_cse, policy=policy)
    return checkpointed(run.key, list(operands))


# A jitted function is evaluated by a jitted function of our own, so that calling it
# again compiles nothing, and a model that calls one layer twelve times compiles it
# once. That cached call serves other weights of equal shapes as well, in this and in
# later evaluations, so nothing in it may depend on which weights they are: within it,
# names refer to the operands by position, and its results and notes are given the names
# of this call's operands on return.


@rule_for("jit")
def _jit(
    run: Run,
    *operands: Any,
    name: str,
    in_shardings: Any,
    out_shardings: Any,
    **_: Any,
) -> list[Any]:
    inside = run._replace(within=name, line=line_of(run))
    places = any(
        isinstance(x, jax.sharding.Sharding) for x in (*in_shardings, *out_shardings)
    )
    if all(map(is_view, opened(call_jaxpr(run.eqn)).equations)) and not places:
        # A cached call returns new arrays. Evaluated here, views of one weight share a
        # factor, which a later concatenation or sum of them makes use of.
        beyond = lambda i, *how: run.leads_to(run.eqn, *how, result=i)
        return run_jaxpr(inside, call_jaxpr(run.eqn), operands, beyond)
    if run.counting:
        return _inline(inside, *operands)
    cached = _cached_call(run)
    marked = [
        renamed(x, WeightName(x.name.names, frozenset([(cached.token, i)])))
        if is_factors(x)
        else x
        for i, x in enumerate(operands)
    ]
    # The notes of the function come with its results. Those of derivative rules in it
    # come now, while JAX differentiates the cached call, and only once, since JAX keeps
    # derivatives as well.
    with collect_notes() as found:
        try:
            results, notes = cached.run(run.key, marked)
        except NeedsWeight as error:
            line = error.note.line or inside.line
            raise NeedsWeight(error.note._replace(line=line)) from None
    types = types_of(marked)
    late = cached.late[types] = [*found.values()] or cached.late.get(types, [])

    def name_here(name: WeightName) -> WeightName:
        places = sorted(i for call, i in name.operands if call is cached.token)
        return joined(operands[i].name for i in places) if places else name

    for i, one in enumerate((*notes.each, *late)):
        here = run._replace(trail=(*run.trail, (i, 1)))
        # A line inside the function is the same for every caller. Where there is none,
        # that of this call stands for it.
        note(here, one._replace(name=name_here(one.name), line=one.line or inside.line))
    return [renamed(x, name_here(x.name)) if is_factors(x) else x for x in results]


class CachedCall(NamedTuple):
    """The jitted evaluation of a jitted function.

    `run(key, operands)` returns the results, and the notes of the trace. `token` stands
    for the call in names: the function itself would be kept alive by JAX's own caches,
    which hold the names.
    """

    run: Callable[..., tuple[list[Any], Notes]]
    token: object
    late: dict[Any, list[Note]]  # notes of derivative rules, by the operands' types


# By the jaxpr of the jitted function, and by all that the evaluation depends on.
_cached: weakref.WeakKeyDictionary[Any, dict[Any, CachedCall]] = (
    weakref.WeakKeyDictionary()
)


def _cached_call(run: Run) -> CachedCall:
    jaxpr, params = call_jaxpr(run.eqn), params_of(run.eqn)
    shardings = params["in_shardings"], params["out_shardings"]
    options, inline = params["compiler_options_kvs"], params["inline"]
    exact = run.exact and run.exact & ids_of(jaxpr)
    kept = Run(
        run.materialize,
        run.rate,
        looped=run.looped,
        exact=exact,
        within=params["name"],
    )
    how = (kept, inline, shardings, options)
    calls = _cached.setdefault(jaxpr, {})
    if how not in calls:
        # Holding the jaxpr itself would keep its own entry alive for ever.
        held = weakref.ref(jaxpr)

        def call(key, operands):
            operands = list(map(_constrained, operands, shardings[0]))
            with collect_notes() as found:
                results = run_jaxpr(kept._replace(key=key), held(), operands)
            results = list(map(_constrained, results, shardings[1]))
            return results, Notes(tuple(found.values()))

        call.__name__ = params["name"]
        jitted = jax.jit(call, inline=inline, compiler_options=dict(options) or None)
        calls[how] = CachedCall(jitted, object(), {})
    return calls[how]


def types_of(x: Any) -> Any:
    """The structure of a tree, and the shapes and dtypes of its arrays."""
    leaves, treedef = jax.tree.flatten(x)
    return treedef, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)


def _constrained(x: Any, sharding: Any) -> Any:
    if not isinstance(sharding, jax.sharding.Sharding):
        return x
    if is_factors(x):
        return factors.with_parts(x, constrained(x.w, sharding), factors.parts(x))
    return constrained(x, sharding)
