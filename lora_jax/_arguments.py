"""Finds the arguments of a call that hold the parameters, and replaces them."""

import inspect
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from flax import nnx
from jax.tree_util import DictKey

from lora_jax._adapters import is_adapter
from lora_jax._tree import (
    Path,
    as_tree,
    flatten,
    is_live,
    is_quantized,
    path_name,
    tree_leaves,
    unflatten,
)

Where = tuple[int | str, ...]


def chosen(argnums: int | Sequence[int] | None, argnames: str | Sequence[str]) -> Where:
    """Returns the positions, then the keywords, that a caller names; by default 0."""
    names = (argnames,) if isinstance(argnames, str) else tuple(argnames)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"argnames takes keywords, found {name!r}. Write argnums.")
    if isinstance(argnums, str):
        raise TypeError(f"argnums takes positions, found {argnums!r}. Write argnames.")
    if argnums is None:
        argnums = () if names else 0
    several = isinstance(argnums, Sequence)
    where = (*map(operator.index, argnums if several else [argnums]), *names)
    if not where:
        raise ValueError("argnums is empty. Name the parameters' position: argnums=0.")
    return where


def pick(args: Sequence[Any], kwargs: dict[str, Any], where: Where) -> dict[Any, Any]:
    """Returns the arguments that hold parameters, by non-negative position or keyword.

    Raises:
      TypeError: If the call has no such argument.
    """
    found: dict[Any, Any] = {}
    for key in where:
        if isinstance(key, str):
            if key not in kwargs:
                raise TypeError(
                    f"argnames={key!r} names no argument: the call has the keywords "
                    f"{sorted(kwargs)}. Pass the parameters by keyword, {key}=params, "
                    "or name their position: argnums=0."
                )
            found[key] = kwargs[key]
        elif -len(args) <= key < len(args):
            found[key % len(args)] = args[key]
        else:
            raise TypeError(
                f"argnums={key} names no argument: the call has {len(args)} "
                "positional. Pass the parameters by position, or name their keyword: "
                "argnames='params'."
            )
    return found


def on_states(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    where: Where,
    *,
    adapters: bool,
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], set[int | str]]:
    """Replaces each live `nnx.Module` that holds parameters by its state.

    If the function is such a module itself, or a method of one, the module becomes its
    first argument. The returned function rebuilds the modules from states without
    adapters, because that is how `lora` calls it. The returned arguments have their
    adapters if `adapters` is true.

    Returns:
      The function, its arguments, and the keys of those that were modules.
    """
    if is_live(fn):
        fn, args = _called("__call__"), (fn, *args)
    elif inspect.ismethod(fn) and is_live(fn.__self__):
        fn, args = _called(fn.__name__), (fn.__self__, *args)
    given = pick(args, kwargs, where)
    live = {key: params for key, params in given.items() if is_live(params)}
    if not live:
        return fn, args, kwargs, set()
    plain = {key: _without_adapters(module) for key, module in live.items()}
    graphs = {key: nnx.graphdef(module) for key, module in plain.items()}

    def on_state(*args: Any, **kwargs: Any) -> Any:
        states = pick(args, kwargs, tuple(graphs))
        live = {key: nnx.merge(graph, states[key]) for key, graph in graphs.items()}
        args, kwargs = replaced(args, kwargs, live)
        return fn(*args, **kwargs)

    states = {key: as_tree(x) for key, x in (live if adapters else plain).items()}
    args, kwargs = replaced(args, kwargs, states)
    return on_state, args, kwargs, {*live}


def _called(name: str) -> Callable[..., Any]:
    return lambda module, /, *args, **kwargs: getattr(module, name)(*args, **kwargs)


def _without_adapters(module: Any) -> Any:
    leaves = flatten(module)
    return unflatten(module, {p: x for p, x in leaves.items() if not is_adapter(p)})


def leaves_of(key: int | str, params: Any) -> dict[Path, Any]:
    """Flattens an argument that holds parameters.

    Raises:
      TypeError: If it is no tree, or a live `nnx.Module`.
    """
    if is_live(params):
        raise TypeError(
            f"Argument {key!r} of the function should hold the parameters, a tree, "
            f"and is the live module {type(params).__name__}. lora needs no module: "
            "write module = LoRA(model, rank), and pass it to the function itself."
        )
    try:
        return flatten(params)
    except TypeError as error:
        raise TypeError(
            f"Argument {key!r} of the function should hold the parameters. {error} If "
            "they are another argument, name its position, argnums=1, or its keyword, "
            "argnames='params'."
        ) from error


def named(key: int | str, path: Path, given: Collection[Any]) -> str:
    """Returns a path as text, with its argument in front if several hold parameters."""
    return path_name(path if len(given) < 2 else (key, *path))


def replaced(
    args: Sequence[Any], kwargs: dict[str, Any], new: dict[Any, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replaces arguments by their position or keyword."""
    return (
        tuple(new.get(i, x) for i, x in enumerate(args)),
        {name: new.get(name, x) for name, x in kwargs.items()},
    )


def leaf_offset(args: Sequence[Any], kwargs: dict[str, Any], key: int | str) -> int:
    """Returns where an argument's leaves start in `tree_leaves((args, kwargs))`."""
    if isinstance(key, str):
        before = (args, {name: x for name, x in kwargs.items() if name < key})
    else:
        before = (args[:key], {})
    return len(tree_leaves(before))


def adapters_elsewhere(
    args: Sequence[Any], kwargs: dict[str, Any]
) -> dict[int, tuple[int | str, str]]:
    """Returns the leaves of arguments that are named like adapters.

    Called with arguments whose known adapters are removed, so that it finds adapters in
    arguments that the caller did not name. By the leaf's index in
    `tree_leaves((args, kwargs))`: the argument's position or keyword, and the leaf's
    name.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        (tuple(args), kwargs), is_leaf=is_quantized
    )
    found = {}
    for i, ((_, argument, *path), _) in enumerate(leaves):
        while path and not isinstance(path[-1], DictKey):
            path.pop()  # a key inside the leaf's box
        name = path[-1].key if path else ""
        if is_adapter((name,)):
            key = argument.key if isinstance(argument, DictKey) else argument.idx
            found[i] = key, name
    return found


def check_elsewhere(
    found: dict[int, tuple[int | str, str]], used: dict[int, bool]
) -> None:
    """Raises ValueError if the function never reads adapters in another argument."""
    for i, (key, name) in found.items():
        if not used.get(i, True):
            by_keyword = isinstance(key, str)
            how = f"..., argnames={key!r}" if by_keyword else f"argnums=(..., {key})"
            raise ValueError(
                f"Argument {key!r} has adapters too, such as {name!r}, and the "
                "function never reads them: they would do nothing. Name both, "
                f"lora(fn, {how}), or pass strip(params)."
            )
