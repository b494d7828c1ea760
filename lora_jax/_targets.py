"""Plans which weights get an adapter, of which rank and alpha.

Everything here reads paths and shapes alone and runs before any array is made.
"""

import contextlib
import math
import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax._adapters import Axes, adapter_of, check_own, copy_of, is_adapter
from lora_jax._engine.source import warn_user
from lora_jax._flax_names import (
    axes_by_name,
    is_adaptable,
    is_floating,
    is_table,
    lists_all,
    undecided,
)
from lora_jax._patterns import (
    Patterns,
    Selector,
    as_patterns,
    by_pattern,
    collapsed,
    match_each,
    matches,
    select,
)
from lora_jax._tree import (
    FLAT,
    Path,
    is_array,
    is_quantized,
    is_traced,
    leaf_name,
    listed,
    path_name,
    quantized_leaves,
    unbox,
)


class AdapterPlan(NamedTuple):
    """The rank, alpha and axes of one weight's adapter."""

    rank: int
    alpha: float | jax.Array
    axes: Axes


def plan_adapters(
    leaves: dict[Path, Any],
    rank: int | Mapping[str, int],
    alpha: Any,
    targets: Selector | None,
    exclude: Selector,
    axes: Mapping[str, Axes],
) -> dict[Path, AdapterPlan]:
    """Plans the adapter of each weight that gets one.

    Raises:
      ValueError: If a pattern matches nothing, a number is out of range, the axes of a
        weight are ambiguous, or there is nothing to adapt.
    """
    ranks = check_rank(rank)
    alpha = None if alpha is None else check_each(alpha, _check_positive)
    check_own(leaves)
    quantized_leaves(leaves)  # raises if one is broken
    weights = [
        path
        for path, leaf in leaves.items()
        if is_adaptable(path, leaf)
        or (path_name(path) in axes and is_floating(path, leaf))
    ]
    if targets is None and axes and not isinstance(ranks, Mapping):
        named = {path_name(path) for path in _chosen_by_axes(weights, leaves, axes)}
        targets = lambda path, _: path in named
    ranks = choose(leaves, weights, ranks, targets, exclude, "rank")
    if isinstance(alpha, Mapping):
        alphas = by_pattern(alpha, [*ranks], "alpha")
    else:
        alphas = {} if alpha is None else {path: alpha for path in ranks}
    plans, unknown = {}, []
    for path, r in ranks.items():
        if dims := axes.get(path_name(path)) or axes_by_name(path, leaves):
            plans[path] = AdapterPlan(r, alphas.get(path, float(r)), dims)
        else:
            unknown.append(path)
    if unknown:
        raise ValueError(undecided(unknown, leaves, bool(axes)))
    for path in plans:
        _check_room(path, leaves)
    return plans


def check_held(
    held: Mapping[Path, str], leaves: dict[Path, Any], chosen: Iterable[Path] | None
) -> None:
    """Checks that the chosen leaves are in mappings, which alone can gain leaves.

    Args:
      held: The type of the container of each leaf in no mapping, from `fixed_leaves`.
      leaves: The leaves of the tree.
      chosen: The leaves that get new ones next to them. `None` stands for every weight
        if no mapping holds any: such a tree is refused before its names are read.

    Raises:
      ValueError: If one of the chosen leaves is in no mapping.
    """
    if chosen is None:
        weights = [path for path, leaf in leaves.items() if is_adaptable(path, leaf)]
        chosen = weights if all(path in held for path in weights) else ()
    for path in chosen:
        if path in held:
            raise ValueError(
                f"{path_name(path[:-1]) or 'The tree'} is a {held[path]}, which cannot "
                f"gain a leaf next to {path_name(path)!r}. Keep each weight in a "
                f"mapping of its own, or {FLAT}"
            )


def report_left_out(
    leaves: dict[Path, Any],
    plans: Mapping[Path, AdapterPlan],
    *,
    held: Mapping[Path, str],
    copied: Sequence[Path],
    exclude: Selector,
    axes: Mapping[str, Axes],
) -> None:
    """Warns of weights that the default targets leave out because of their names."""
    weights = [path for path, leaf in leaves.items() if is_adaptable(path, leaf)]
    decided = {*plans, *select(leaves, weights, exclude, "exclude")}
    gone = {*decided, *copied}
    left = [path for path in weights if path not in gone]
    silent = "to leave them out without this warning."
    if lists_all(axes, leaves):
        # `find_axes` leaves out weights that no product uses. A caller who edits its
        # result may leave out others by mistake.
        if left := [path for path in left if leaf_name(path) == "kernel"]:
            found = listed(collapsed(left))
            warn_user(
                f"{len(left)} weight(s) get no adapter because axes does not name "
                f"them: {found}. Add them to axes, or write exclude=[{found}] {silent}"
            )
        return
    # A model's statistics and caches are no parameters.
    has_params = any(path[0] == "params" for path in leaves)
    other = lambda x: isinstance(x, nnx.Variable) and not isinstance(x, nnx.Param)
    left = [p for p in left if p[0] == "params" or not has_params]
    left = [p for p in left if not (is_table(p) or other(leaves[p]))]
    if not left:
        return
    chosen = _targets_of([*plans], weights, decided)
    targets = chosen + _targets_of(left, weights, {*decided, *left})
    silent = f"targets={chosen if chosen[1:] else chosen[0]!r} {silent}"
    if any(path in held for path in left):
        advice = f"Write {silent} To adapt them too, {FLAT}"
    elif len(targets) > 7 or not all(axes_by_name(path, leaves) for path in left):
        advice = (
            "Write axes=find_axes(fn, params, *args) to adapt every weight that a "
            f"product uses, or {silent}"
        )
    else:
        advice = f"Write targets={targets} to adapt them too, or {silent}"
    warn_user(
        f"{len(left)} weight(s) get no adapter because their names are not kernel: "
        f"{listed(collapsed(left))}. {advice}"
    )


def _targets_of(
    paths: list[Path], weights: list[Path], allowed: Container[Path]
) -> list[str]:
    """Returns short patterns of some weights that select only allowed ones."""
    names = [*dict.fromkeys(map(leaf_name, paths))]
    exact = all(path in allowed for path in match_each(names, weights, "targets"))
    return names if exact else collapsed(paths)


def _chosen_by_axes(
    weights: list[Path], leaves: dict[Path, Any], axes: Mapping[str, Axes]
) -> list[Path]:
    """Returns the default targets if the caller gives axes; they include no table."""
    named = lambda path: path_name(path) in axes and not is_table(path)
    if lists_all(axes, leaves):
        return [path for path in weights if named(path)]
    return [path for path in weights if named(path) or leaf_name(path) == "kernel"]


def also_trained(
    leaves: dict[Path, Any], also: Patterns, plans: Mapping[Path, AdapterPlan]
) -> list[Path]:
    """Returns the leaves that are trained in full.

    Raises:
      ValueError: If a pattern matches no floating leaf, or one that has an adapter.
    """
    patterns = as_patterns(also, "also")
    floating = [path for path, leaf in leaves.items() if is_floating(path, leaf)]
    found = match_each(patterns, floating, "also", leaves)
    trainable = {*floating}
    for path, leaf in leaves.items():
        other = path not in trainable and is_array(unbox(leaf)) and not is_adapter(path)
        if other and any(matches(pattern, path) for pattern in patterns):
            raise ValueError(
                f"also names {path_name(path)!r}, which is {unbox(leaf).dtype}: a leaf "
                "that is trained must be floating. Write a narrower pattern."
            )
    for path in found:
        if path in plans:
            raise ValueError(
                f"{path_name(path)!r} is named by also, and would get an adapter too. "
                f"Write exclude=[{path_name(path)!r}] to train it in full, or leave it "
                "out of also."
            )
        if is_quantized(unbox(leaves[path])):
            raise ValueError(
                f"also names {path_name(path)!r}, which is quantized: a leaf that is "
                "trained must be floating. Write quantize(params, how, "
                f"exclude=[{path_name(path)!r}])."
            )
        _check_room(path, leaves)
    return found


def choose(
    leaves: dict[Path, Any],
    weights: list[Path],
    values: Any,
    targets: Selector | None,
    exclude: Selector,
    name: str,
) -> dict[Path, Any]:
    """Returns the chosen weights, each with its value.

    Args:
      leaves: The leaves of the tree.
      weights: The paths of the weights to choose from.
      values: One value for all, or `{pattern: value}`, which is its own targets.
      targets: Which weights to choose. Default: those named `kernel`.
      exclude: Which weights to leave out.
      name: The argument that holds `values`, for messages.

    Raises:
      ValueError: If a pattern matches nothing, or nothing is chosen.
    """
    if targets is None and isinstance(values, Mapping):
        chosen = select(leaves, weights, tuple(values), name)
    elif targets is None:
        chosen = [path for path in weights if leaf_name(path) == "kernel"]
    else:
        chosen = select(leaves, weights, targets, "targets")
    gone = set(select(leaves, weights, exclude, "exclude"))
    chosen = [path for path in chosen if path not in gone]
    if not chosen:
        advice = "Write targets=[...]"
        if name == "rank" and targets is None and weights:
            advice += (
                ", or axes=find_axes(fn, params, *args) to adapt every weight that a "
                "product uses"
            )
        raise ValueError(
            f"There is nothing to {'adapt' if name == 'rank' else 'quantize'}: no "
            "floating weight of 2 or more dimensions is "
            f"{'named kernel' if targets is None else 'selected'} and not excluded. "
            f"Weights: {listed(weights)}. {advice}."
        )
    if not isinstance(values, Mapping):
        return dict.fromkeys(chosen, values)
    values = by_pattern(values, chosen, name)
    for path in chosen:
        if path not in values:
            raise ValueError(
                f"No pattern of {name} matches the target {path_name(path)!r}. "
                f"Add one, or leave targets out: a {name} mapping is its own targets."
            )
    return values


def check_each(values: Any, check: Callable[[Any], Any]) -> Any:
    """Checks one value, or each of `{pattern: value}`."""
    if isinstance(values, Mapping):
        return {pattern: check(value) for pattern, value in values.items()}
    return check(values)


def check_rank(rank: Any) -> int | dict[str, int]:
    """Returns a rank, or `{pattern: rank}`, of whole numbers above 0."""
    if isinstance(rank, Mapping) and not rank:
        raise ValueError("rank is an empty mapping. Write rank={pattern: number}.")
    return check_each(rank, _check_integer)


def _check_integer(rank: Any) -> int:
    try:
        r = operator.index(rank)
    except TypeError:
        r = 0
    if r < 1 or isinstance(rank, bool):
        raise ValueError(f"rank must be a whole number of at least 1, found {rank!r}.")
    return r


def _check_positive(alpha: Any) -> float | jax.Array:
    """Returns a positive number, or a traced one, whose value is unknown."""
    kind = getattr(alpha, "dtype", None) or np.result_type(type(alpha))
    real = any(jnp.issubdtype(kind, k) for k in (jnp.integer, jnp.floating))
    if real and np.shape(alpha) == ():
        if is_traced(alpha):
            return alpha
        with contextlib.suppress(OverflowError):
            if math.isfinite(float(alpha)) and alpha > 0:
                return float(alpha)
    raise ValueError(
        f"alpha must be a finite number above 0, found {alpha!r}: the adapter's output "
        "is scaled by alpha / rank."
    )


def _check_room(path: Path, leaves: dict[Path, Any]) -> None:
    """Raises ValueError if no adapter and no copy can be added next to a leaf."""
    adapter = adapter_of(path, magnitude=True)
    if any(part in leaves for part in (*adapter, *copy_of(path))):
        if adapter.a in leaves and adapter.scale not in leaves:
            raise ValueError(
                f"{path_name(path)!r} already has an adapter without a scale, as qwix, "
                "tunix and openpi store them. Remove it to start from the base, or "
                "merge it first: add A @ B, times the scale it was trained with."
            )
        raise ValueError(
            f"{path_name(path)!r} already has an adapter. Start from "
            "strip(params) or merge(params), or leave it out: exclude=[...]."
        )
    if not isinstance(path[-1], str):
        raise ValueError(
            f"{path_name(path)!r} cannot have an adapter: its key is the "
            f"{type(path[-1]).__name__} {path[-1]!r}. Make the key a str."
        )
    others = ((*path[:-1], name) for name in ("kernel", "embedding"))
    if path in (pair := [other for other in others if other in leaves]) and pair[1:]:
        raise ValueError(
            f"{path_name(path[:-1])!r} holds a kernel and an embedding, whose adapters "
            "would have the same names. Move one of them to a mapping of its own."
        )
