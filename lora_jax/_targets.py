"""Which weights get an adapter, of which rank, alpha and dimensions: the plan.

Everything here reads paths and shapes alone and runs before any array work. A pattern
that matches nothing is an error, because an adapter that is not there fails in silence.
"""

import contextlib
import difflib
import inspect
import math
import operator
import os
import re
import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, NoReturn

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax._adapters import (
    Axes,
    adapter_of,
    check_own,
    copy_of,
    is_adapter,
)
from lora_jax._tree import (
    FLAT,
    Path,
    components,
    is_array,
    is_quantized,
    leaf_name,
    listed,
    path_name,
    quantized_leaves,
    sibling,
    unbox,
)

Patterns = str | Iterable[str]
Selector = Patterns | Callable[[str, Any], bool]

# What PEFT and PyTorch call modules that Flax names otherwise.
TORCH_NAMES = ("all-linear", "*_proj", "*.*", "c_attn", "c_fc", "c_proj", "fc[12]")

# Names of leaves that no product uses: biases, and what scales each feature.
BIAS = re.compile(r"(.*_)?(bias|scale|gamma|beta)", re.I)
# Names of leaves, and of modules, that are norms: "layernorm", "norm_1", "ln_f", ...
NORM = re.compile(r".*norm(alization)?(s|_?\d+|_[a-z])?|(.*_)?ln\d*(_.*)?", re.I)
# Names of leaves, and of modules, that are tables: "embedding", "pos_embed", "wte", ...
TABLE = re.compile(r"(?!.*patch).*embed.*|(.*_)?(wte|wpe)", re.I)
# Names of leaves that are tables or single rows: "positions", "cls_token", ...
ROWS = re.compile(r"(.*_)?(table|tokens?|class|cls|pos|positions?)(_.*)?", re.I)

# Frames of these packages are not the user's.
_LIBRARIES = tuple(
    os.path.join(os.path.dirname(path), "")
    for path in (__file__, jax.__file__, flax.__file__)
)


class Plan(NamedTuple):
    """What one weight gets."""

    rank: int
    alpha: Any  # a number, traced or not
    axes: Axes


def plan(
    leaves: dict[Path, Any],
    rank: int | Mapping[str, int],
    alpha: Any,
    targets: Selector | None,
    exclude: Selector,
    axes: Mapping[str, Axes] | None,
) -> dict[Path, Plan]:
    """The plan of every weight that gets factors.

    Raises:
      ValueError: If a pattern matches nothing, a number is out of range, the dimensions
        of a weight cannot be told, or there is nothing to adapt.
    """
    ranks, alphas = check_rank(rank), _check_alpha(alpha)
    axes = check_axes(axes or {}, leaves)
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
    if isinstance(alphas, Mapping):
        alphas = by_pattern(alphas, [*ranks], "alpha")
    else:
        alphas = {} if alphas is None else dict.fromkeys(ranks, alphas)

    found = {
        path: axes.get(path_name(path)) or _axes_by_name(path, leaves) for path in ranks
    }
    if unknown := [path for path, dims in found.items() if dims is None]:
        _undecided(unknown, leaves, bool(axes))
    for path in ranks:
        _check_room(path, leaves)
    return {
        path: Plan(r, alphas.get(path, float(r)), found[path])
        for path, r in ranks.items()
    }


def check_held(
    held: Mapping[Path, str], leaves: dict[Path, Any], chosen: Iterable[Path] | None
) -> None:
    """Checks that new leaves fit next to the chosen ones: only mappings gain leaves.

    Args:
      held: What holds each leaf that no mapping holds, from `fixed_leaves`.
      leaves: Of the tree.
      chosen: Those that get new leaves. `None`: any weight, so that a tree that has
        room for none is refused before the names in it are looked at.

    Raises:
      ValueError: If something else holds one of the chosen, or every weight.
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
    plans: Mapping[Path, Plan],
    *,
    held: Mapping[Path, str],
    copied: Sequence[Path],
    exclude: Selector,
    axes: Mapping[str, Axes],
) -> None:
    """Warns of weights that the default targets leave out because of their names."""
    weights = [path for path, leaf in leaves.items() if is_adaptable(path, leaf)]
    decided = {*plans, *_select(leaves, weights, exclude, "exclude")}
    gone = {*decided, *copied}
    left = [path for path in weights if path not in gone]
    silent = "to leave them out without this warning."
    if lists_all(axes, leaves):
        # No product uses weights that `find_axes` leaves out; a caller may forget some.
        if left := [path for path in left if leaf_name(path) == "kernel"]:
            found = listed(_collapsed(left))
            warn(
                f"{len(left)} weight(s) get no adapter because axes does not name "
                f"them: {found}. Add them to axes, or write exclude=[{found}] {silent}"
            )
        return
    # Statistics and caches of a model are no parameters.
    whole = any(path[0] == "params" for path in leaves)
    other = lambda x: isinstance(x, nnx.Variable) and not isinstance(x, nnx.Param)
    left = [p for p in left if p[0] == "params" or not whole]
    left = [p for p in left if not (is_table(p) or other(leaves[p]))]
    if not left:
        return
    own = _targets_of([*plans], weights, decided)
    targets = own + _targets_of(left, weights, {*decided, *left})
    silent = f"targets={own if own[1:] else own[0]!r} {silent}"
    if any(path in held for path in left):
        advice = f"Write {silent} To adapt them too, {FLAT}"
    elif len(targets) > 7 or not all(_axes_by_name(path, leaves) for path in left):
        advice = (
            "Write axes=find_axes(fn, params, *args) to adapt every weight that a "
            f"product uses, or {silent}"
        )
    else:
        advice = f"Write targets={targets} to adapt them too, or {silent}"
    warn(
        f"{len(left)} weight(s) get no adapter because their names are not kernel: "
        f"{listed(_collapsed(left))}. {advice}"
    )


def _targets_of(
    paths: list[Path], weights: list[Path], allowed: Container[Path]
) -> list[str]:
    """Short patterns of some weights that select no others than those allowed."""
    names = [*dict.fromkeys(map(leaf_name, paths))]
    exact = all(path in allowed for path in match_each(names, weights, "targets"))
    return names if exact else _collapsed(paths)


def _collapsed(paths: list[Path]) -> list[str]:
    """Patterns of some paths: those of layers that differ in numbers are one."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        parts = (re.sub(r"(^|_)\d+$", r"\1*", part) for part in components(path))
        groups.setdefault("/".join(parts), []).append(path)
    return [
        pattern if len(same) > 1 else path_name(same[0])
        for pattern, same in groups.items()
    ]


def warn(message: str) -> None:
    """Warns at the innermost line that is not of this package, JAX or Flax."""
    frame, level = inspect.currentframe(), 1
    while frame and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _chosen_by_axes(
    weights: list[Path], leaves: dict[Path, Any], axes: Mapping[str, Axes]
) -> list[Path]:
    """The default targets where the caller names axes: no table in either case."""
    named = lambda path: path_name(path) in axes and not is_table(path)
    if lists_all(axes, leaves):
        return [path for path in weights if named(path)]
    return [path for path in weights if named(path) or leaf_name(path) == "kernel"]


def lists_all(axes: Mapping[str, Axes], leaves: dict[Path, Any]) -> bool:
    """Whether axes list the weights that a function uses, as those of `find_axes` do.

    By hand one names only weights whose own names say nothing, or not what is right: so
    an entry that repeats what a name says is not written by hand.
    """
    return any(
        axes.get(path_name(path)) == _axes_by_name(path, leaves)
        for path, leaf in leaves.items()
        if path_name(path) in axes and is_array(unbox(leaf))
    )


def also_trained(
    leaves: dict[Path, Any], also: Patterns, plans: Mapping[Path, Plan]
) -> list[Path]:
    """The further leaves that train, whole.

    Raises:
      ValueError: If a pattern matches no floating leaf, or one that has an adapter.
    """
    patterns = as_patterns(also, "also")
    floating = [path for path, leaf in leaves.items() if is_floating(path, leaf)]
    found = match_each(patterns, floating, "also", leaves)
    for path, leaf in leaves.items():
        whole = is_array(unbox(leaf)) and not is_adapter(path) and path not in floating
        if whole and any(matches(pattern, path) for pattern in patterns):
            raise ValueError(
                f"also names {path_name(path)!r}, which is {unbox(leaf).dtype}: what "
                "trains is floating. Write a narrower pattern."
            )
    for path in found:
        if path in plans:
            raise ValueError(
                f"{path_name(path)!r} is named by also, and would get an adapter too. "
                f"Write exclude=[{path_name(path)!r}] to train it whole, or leave it "
                "out of also."
            )
        if is_quantized(unbox(leaves[path])):
            raise ValueError(
                f"also names {path_name(path)!r}, which is in few bits: what trains "
                "is in floats. Write quantize(params, how, "
                f"exclude=[{path_name(path)!r}])."
            )
        _check_room(path, leaves)
    return found


def is_floating(path: Path, leaf: Any) -> bool:
    """Whether a leaf is a floating array, and no part of an adapter."""
    w = unbox(leaf)
    floating = is_array(w) and jnp.issubdtype(w.dtype, jnp.floating)
    return floating and not is_adapter(path)


def is_adaptable(path: Path, leaf: Any) -> bool:
    """Whether a leaf is a floating array of 2 or more dimensions, no norm or bias.

    Norms and biases that `scan` stacks, or that have a value for each head, have two
    dimensions, too: their names tell them from weights of products.
    """
    return (
        is_floating(path, leaf)
        and len(unbox(leaf).shape) >= 2
        and not is_norm_or_bias(path)
    )


def is_norm_or_bias(path: Path) -> bool:
    """Whether a leaf is a norm or a bias by its own name, or a norm by its module's."""
    name, module = own_names(path)
    return bool(BIAS.fullmatch(name)) or any(map(NORM.fullmatch, (name, module)))


def is_table(path: Path) -> bool:
    """Whether a leaf is a table by its own name, or by its module's; no `kernel` is."""
    name, module = own_names(path)
    if name == "kernel":
        return False
    return any(map(TABLE.fullmatch, (name, module))) or bool(ROWS.fullmatch(name))


def own_names(path: Path) -> tuple[str, str]:
    """A leaf's name, the last component of its path, and its module's in lower case."""
    *_, module, name = ("", *components(path[-2:]))
    return name, module.lower()


def matches(pattern: str, path: Path) -> bool:
    """Whether a pattern matches a run of whole components; `*` may cross slashes.

    A key that is itself a path, "layers.q.kernel", has the components of the nested
    tree, and a pattern may be written with its separators, or with slashes.
    """
    name = path_name(path)  # which may itself have a bracket in it, as "w[0,1]"
    if name == pattern or fnmatchcase(f"/{name}/", f"*/{pattern}/*"):
        return True
    nested = "/".join(components(path))
    if nested == name:
        return False
    written = {pattern, pattern.replace(".", "/"), "/".join(components((pattern,)))}
    return any(fnmatchcase(f"/{nested}/", f"*/{p}/*") for p in written)


def as_patterns(patterns: Patterns, name: str) -> tuple[str, ...]:
    """One pattern or several, as a tuple of non-empty strings."""
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        patterns = (patterns,)
    patterns = tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.strip("/"):
            raise ValueError(f"{name} takes patterns of paths, found {pattern!r}.")
    patterns = tuple(pattern.strip("/") for pattern in patterns)
    if len(set(patterns)) < len(patterns):
        raise ValueError(f"{name} has one pattern twice, in {listed(patterns)}.")
    return patterns


def match_each(
    patterns: Sequence[str],
    paths: Sequence[Path],
    name: str,
    leaves: Mapping[Path, Any] | None = None,
) -> list[Path]:
    """The paths that any of the patterns matches; each pattern must match one.

    The `leaves` of the tree tell whether a pattern is right and its leaf is not.
    """
    for pattern in patterns:
        if not any(matches(pattern, path) for path in paths):
            raise ValueError(_no_match(pattern, paths, name, leaves or {}))
    return [path for path in paths if any(matches(p, path) for p in patterns)]


def axes_of(path: Path, leaves: dict[Path, Any], others: bool = False) -> Axes:
    """The dimensions of a weight by Flax's names, where they leave no doubt.

    Args:
      path: Of the weight.
      leaves: Of the tree.
      others: Whether the caller named the dimensions of other weights.

    Raises:
      ValueError: If the names leave a doubt.
    """
    return _axes_by_name(path, leaves) or _undecided([path], leaves, others)


def _axes_by_name(path: Path, leaves: dict[Path, Any]) -> Axes | None:
    shape = unbox(leaves[path]).shape
    n = len(shape)
    if n == 2:
        return Axes((), (0,), (1,))
    name, module = leaf_name(path), own_names(path)[1]
    if name == "kernel":
        # A bias has the shape of the outputs, and tells a stack of layers from heads.
        bias = unbox(leaves.get(sibling(path, "bias")))
        first = module in ("query", "key", "value")
        last = module == "out" or module.startswith("conv")
        known = module.startswith("conv") or (n == 3 and _has_heads(path, leaves))
        if first and (known if bias is None else bias.shape == shape[1:]):
            return Axes((), (0,), tuple(range(1, n)))
        if last and (known if bias is None else bias.shape == shape[-1:]):
            return Axes((), tuple(range(n - 1)), (n - 1,))
    return None


def _undecided(paths: list[Path], leaves: dict[Path, Any], others: bool) -> NoReturn:
    """Raises for the weights whose dimensions neither `axes` nor their names tell."""
    name, shape = path_name(paths[0]), unbox(leaves[paths[0]]).shape
    exclude = f"exclude=[{listed(_collapsed(paths))}]"
    if others:
        raise ValueError(
            f"axes does not name {name!r}, of shape {shape}, and its own name does not "
            "say which dimensions are inputs and which outputs. If axes is from "
            "find_axes, no product and no lookup of the function uses this weight: "
            f"leave it out, {exclude}."
        )
    raise ValueError(
        f"Which dimensions of {name!r}, of shape {shape}, are inputs and which outputs "
        "cannot be told from its name. Say how it is used, axes=find_axes(fn, params, "
        "*args), or directly, "
        f"axes={{{name!r}: Axes(batch, inputs, outputs)}}, or leave it out: {exclude}."
    )


def _has_heads(path: Path, leaves: dict[Path, Any]) -> bool:
    """Whether query and out, if both are there, agree on heads: a stack's do not."""
    query, out = (
        unbox(leaves.get(sibling(path, name, "kernel"))) for name in ("query", "out")
    )
    return query is None or out is None or query.shape[1:] == out.shape[:-1]


def choose(
    leaves: dict[Path, Any],
    weights: list[Path],
    values: Any,
    targets: Selector | None,
    exclude: Selector,
    name: str,
) -> dict[Path, Any]:
    """The chosen weights, each with the one value, or that of its pattern.

    Args:
      leaves: Of the tree.
      weights: Those that may be chosen.
      values: One for all, or `{pattern: value}`, which is its own targets.
      targets: Which weights. Default: those named `kernel`.
      exclude: Which of them not.
      name: What the caller calls `values`.

    Raises:
      ValueError: If a pattern matches nothing, or nothing is chosen.
    """
    if targets is None and isinstance(values, Mapping):
        chosen = _select(leaves, weights, tuple(values), name)
    elif targets is None:
        chosen = [path for path in weights if leaf_name(path) == "kernel"]
    else:
        chosen = _select(leaves, weights, targets, "targets")
    gone = set(_select(leaves, weights, exclude, "exclude"))
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


def _select(
    leaves: dict[Path, Any], weights: list[Path], selector: Selector, name: str
) -> list[Path]:
    if callable(selector):
        return [p for p in weights if selector(path_name(p), unbox(leaves[p]))]
    return match_each(as_patterns(selector, name), weights, name, leaves)


def by_pattern(
    values: Mapping[str, Any], chosen: list[Path], name: str
) -> dict[Path, Any]:
    """The value of the first pattern that matches each path; each must decide one."""
    patterns = as_patterns(values, name)
    numbers = dict(zip(patterns, values.values(), strict=True))
    first = {
        path: next(p for p in patterns if matches(p, path))
        for path in match_each(patterns, chosen, name)
    }
    for pattern in patterns:
        if pattern not in first.values():
            raise ValueError(
                f"The {name} of {pattern!r} is never used: earlier patterns match all "
                "that it does, and the first wins. Put it before them."
            )
    return {path: numbers[pattern] for path, pattern in first.items()}


def check_rank(rank: Any) -> int | dict[str, int]:
    if isinstance(rank, Mapping):
        if not rank:
            raise ValueError("rank is an empty mapping. Write rank={pattern: number}.")
        return {pattern: _check_whole(r) for pattern, r in rank.items()}
    return _check_whole(rank)


def _check_whole(rank: Any) -> int:
    try:
        r = operator.index(rank)
    except TypeError:
        r = 0
    if r < 1 or isinstance(rank, bool):
        raise ValueError(f"rank must be a whole number of at least 1, found {rank!r}.")
    return r


def _check_alpha(alpha: Any) -> Any:
    if alpha is None:
        return None
    if isinstance(alpha, Mapping):
        return {pattern: _check_positive(a) for pattern, a in alpha.items()}
    return _check_positive(alpha)


def _check_positive(alpha: Any) -> Any:
    """The number, which may be traced: then its value is not known."""
    kind = getattr(alpha, "dtype", None) or np.result_type(type(alpha))
    real = any(jnp.issubdtype(kind, k) for k in (jnp.integer, jnp.floating))
    if real and np.shape(alpha) == ():
        if isinstance(alpha, jax.core.Tracer):
            return alpha
        with contextlib.suppress(OverflowError):
            if math.isfinite(float(alpha)) and alpha > 0:
                return float(alpha)
    raise ValueError(
        f"alpha must be a finite number above 0, found {alpha!r}: the adapter's output "
        "is scaled by alpha / rank."
    )


def check_axes(axes: Mapping[str, Any], leaves: dict[Path, Any]) -> dict[str, Axes]:
    names = {path_name(p): p for p, leaf in leaves.items() if is_array(unbox(leaf))}
    checked = {}
    for name, dims in axes.items():
        if name not in names:
            close = difflib.get_close_matches(name, names, n=6, cutoff=0.0)
            raise ValueError(
                f"axes names {name!r}, which is no path of the parameters. Close: "
                f"{listed(close)}. Pass the same tree to find_axes."
            )
        groups = [tuple(group) for group in dims]
        n = len(unbox(leaves[names[name]]).shape)
        once = sorted(d for group in groups for d in group) == list(range(n))
        if not once or len(groups) != 3 or not (groups[1] and groups[2]):
            raise ValueError(
                f"axes of {name!r} must name each of its {n} dimensions once, at least "
                "one of them an input and one an output; found (batch, inputs, "
                f"outputs) = {tuple(groups)}."
            )
        if any(list(group) != sorted(group) for group in groups):
            raise ValueError(
                f"axes of {name!r} must name each group of dimensions in their order; "
                f"found (batch, inputs, outputs) = {tuple(groups)}."
            )
        checked[name] = Axes(*groups)
    return checked


def _check_room(path: Path, leaves: dict[Path, Any]) -> None:
    """The mapping of a leaf has room for an adapter, or a copy, beside it."""
    own = adapter_of(path, magnitude=True)
    if any(part in leaves for part in (*own, *copy_of(path))):
        if own.a in leaves and own.scale not in leaves:
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
            f"{path_name(path)!r} has no name for an adapter to stand beside: its key "
            f"is the {type(path[-1]).__name__} {path[-1]!r}. Give it a str for a name."
        )
    others = ((*path[:-1], name) for name in ("kernel", "embedding"))
    if path in (pair := [other for other in others if other in leaves]) and pair[1:]:
        raise ValueError(
            f"{path_name(path[:-1])!r} holds a kernel and an embedding, whose adapters "
            "would have the same names. Move one of them to a mapping of its own."
        )


def _no_match(
    pattern: str, paths: Sequence[Path], name: str, leaves: Mapping[Path, Any]
) -> str:
    for path, leaf in leaves.items():
        w = unbox(leaf)
        if matches(pattern, path) and is_array(w) and not is_adapter(path):
            is_key = jax.dtypes.issubdtype(w.dtype, jax.dtypes.prng_key)
            return (
                f"No weight matches {pattern!r} of {name}: {path_name(path)!r} is "
                f"{'a random key' if is_key else w.dtype} of shape {w.shape}. "
                f"{_advice(name)}"
            )
    names = [path_name(path) for path in paths]
    parts = sorted({part for path in paths for part in components(path)})
    dotted = any("." in name for name in names)
    pieces = (pattern.replace(".", "/") if dotted else pattern).split("/")
    closest = (difflib.get_close_matches(p, parts, n=1) or [p] for p in pieces)
    better = "/".join(match for match, *_ in closest)
    close = [n for n, path in zip(names, paths, strict=True) if matches(better, path)]
    if close:
        by_pattern = name in ("rank", "alpha", "kinds")
        write = f"{{{better!r}: ...}}" if by_pattern else f"[{better!r}]"
        advice = f"Write {name}={write}."
    else:
        close = difflib.get_close_matches(pattern, names, n=6, cutoff=0.0)
        modules = dict.fromkeys(_module(path) for path in paths)
        advice = f"Their names end in {listed(list(modules))}. {_advice(name)}"
        torch = (known for known in TORCH_NAMES if known != "*.*" or not dotted)
        if any(fnmatchcase(pattern, known) for known in torch):
            advice += f" {pattern!r} is a name of PyTorch: write those of Flax here"
            advice += ", or no targets for all kernels." if name == "targets" else "."
    found = f"No weight matches {pattern!r} of {name}. Close: {listed(close)}. "
    return found + advice


def _module(path: Path) -> str:
    """The last component that tells weights apart."""
    *_, module, name = (None, *components(path[-2:]))
    return module if module and name in ("kernel", "embedding") else name


def _advice(name: str) -> str:
    if name == "also":
        return "A leaf that trains is floating."
    return (
        "A weight is floating, has 2 or more dimensions and is no norm or bias by its "
        "name."
    )
