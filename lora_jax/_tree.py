"""Paths and containers: any parameter tree as `{path: leaf}`, and back again.

Knows trees, not LoRA. A leaf keeps its box (`nn.Partitioned`, `nnx.Param`, ...), and a
path is the tuple of the keys that lead to it, without the box. A weight in few bits,
`Quantized`, is one leaf.
"""

import copy
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core.meta import AxisMetadata

from lora_jax._engine.quantized import Quantized, is_quantized, values_of, wrong

PyTree = Any
Path = tuple[Any, ...]

# The components of a key that is itself a path: "dense/kernel", "layers.q.bias", and
# what `jax.tree_util.keystr` writes, ".layers[0].weight" or "['dense']['kernel']".
PART = re.compile(r"[^/.\[\]'\"]+")

# How to adapt a tree that is not made of mappings; error messages quote it.
FLAT = """adapt its leaves as one flat dict, where y = fn(params, *args):

    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    base = {name(path): leaf for path, leaf in flat}
    whole = lambda base: treedef.unflatten([base[name(path)] for path, _ in flat])
    flat_fn = lambda base, *args: fn(whole(base), *args)
    adapted = lj.lorafy(base, rank, axes=lj.find_axes(flat_fn, base, *args))
    y = lj.lora(flat_fn)(adapted, *args)

For an Equinox module, params, static = eqx.partition(model, eqx.is_array), and fn is
lambda params, *args: eqx.combine(params, static)(*args)."""


def is_box(x: Any) -> bool:
    return isinstance(x, AxisMetadata | nnx.Variable)


def is_counter(x: Any) -> bool:
    """Whether a leaf is a key, a count or an index that a live module keeps.

    It is no parameter: it differs between two runs of one model.
    """
    if not isinstance(x, nnx.Variable) or isinstance(x, nnx.Param):
        return False
    w = unbox(x)
    return is_array(w) and not jnp.issubdtype(w.dtype, jnp.inexact)


def is_array(x: Any) -> bool:
    plain = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
    return isinstance(x, plain | Quantized)


def is_abstract(x: Any) -> bool:
    """Whether an array has a shape and a dtype alone."""
    return isinstance(values_of(x), jax.ShapeDtypeStruct)


def is_traced(x: Any) -> bool:
    return isinstance(values_of(x), jax.core.Tracer)


def tree_leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=is_quantized)


def unbox(leaf: Any) -> Any:
    """The array in a box, or boxes; anything else is returned as it is."""
    while is_box(leaf):
        leaf = open_box(leaf)
    return leaf


def open_box(box: Any) -> Any:
    """What one box holds. Flax's own `unbox` would also constrain its sharding."""
    values = jax.tree.leaves(box, is_leaf=lambda x: x is not box)
    return values[0] if values else None


def rebox(like: Any, value: Any) -> Any:
    """The value in a box like that of `like`, if it has one."""
    if isinstance(like, AxisMetadata):
        return like.replace_boxed(rebox(open_box(like), value))
    if isinstance(like, nnx.Variable):
        return like.replace(value)
    return value


def path_name(path: Path) -> str:
    return "/".join(map(str, path))


def components(path: Path) -> tuple[str, ...]:
    """The components of a path; a key that is itself a path has several."""
    return tuple(part for key in path for part in _parts(str(key)))


@functools.lru_cache(maxsize=65536)
def _parts(key: str) -> tuple[str, ...]:
    return tuple(PART.findall(key)) or (key,)


def leaf_name(path: Path) -> str:
    """The last component of a path: "kernel" of ("dense", "kernel"), "dense/kernel"."""
    return _parts(str(path[-1]))[-1]


def sibling(path: Path, *names: str) -> Path:
    """The path with other last components, written with the same separators."""
    *parent, key = path
    spans = [part.span() for part in PART.finditer(str(key))] or [(0, len(str(key)))]
    own = min(len(names), len(spans))
    text = str(key)
    for (start, stop), name in zip(spans[-own:][::-1], names[::-1], strict=False):
        text = text[:start] + name + text[stop:]
    rest = names[: len(names) - own]
    if rest and parent:
        return (*sibling(tuple(parent), *rest), text)
    return (*parent, text)


def listed(names: Sequence[Any]) -> str:
    """Some names or paths for a message: six of them, then an ellipsis."""
    names = [path_name(n) if isinstance(n, tuple) else n for n in names]
    text = ", ".join(map(repr, names[:6])) + (", ..." if len(names) > 6 else "")
    return text or "there is none"


class LiveModules(NamedTuple):
    """How a live `nnx.Module` is a tree: the state it has, and a module of new leaves.

    `_module.py` fills this in, as one registers a pytree node with JAX: which module
    has adapters, and what becomes of one that gains or loses them, only LoRA knows.
    """

    state: Callable[[nnx.Module], nnx.State]
    rebuild: Callable[[nnx.Module, dict[Path, Any]], Any]


_live_modules: list[LiveModules] = []


def register_live_modules(live: LiveModules) -> None:
    # The first stays: the public LoRA belongs to it. A reload, or pytest collecting
    # doctests, runs the file a second time, with another class of that name.
    if not _live_modules:
        _live_modules.append(live)


def is_live(x: Any) -> bool:
    return isinstance(x, nnx.Module)


def as_tree(params: Any) -> Any:
    """The parameters as a tree of containers: of a live module, its `nnx.State`."""
    return _live_modules[0].state(params) if is_live(params) else params


def flatten(tree: Any) -> dict[Path, Any]:
    """Every leaf by its path: boxes, arrays, `None` and whatever else is no container.

    A live `nnx.Module` has the leaves and paths of its state.

    Raises:
      TypeError: If `tree` is no container.
      ValueError: If two leaves have one path, as in {"a/b": x, "a": {"b": y}}.
    """
    tree = as_tree(tree)
    if _children(tree) is None:
        raise TypeError(
            f"Expected a tree of parameters, found {type(tree).__name__}. "
            "Pass a mapping of names to arrays, such as variables['params']."
        )
    leaves: dict[Path, Any] = {}
    _collect(tree, (), leaves)
    seen: set[str] = set()
    for name in map(path_name, leaves):
        if name in seen:
            raise ValueError(f"Two leaves have the path {name!r}. Rename one of them.")
        seen.add(name)
    return leaves


def unflatten(like: Any, leaves: dict[Path, Any]) -> Any:
    """The containers of `like` around `leaves`; a mapping takes new and missing ones.

    Nothing is copied or mutated: leaves are shared, containers are new. For a live
    module the result is one, too, wherever the leaves make one: see `_module.py`.
    """
    if is_live(like):
        return _live_modules[0].rebuild(like, leaves)
    by_parent: dict[Path, dict[Any, Any]] = {}
    for path, leaf in leaves.items():
        by_parent.setdefault(path[:-1], {})[path[-1]] = leaf
    return _rebuild(like, (), by_parent)


def quantized_leaves(leaves: dict[Path, Any]) -> dict[Path, Quantized]:
    """Those in few bits, out of their boxes.

    Raises:
      ValueError: If the parts of one make no array, or came back from a checkpoint as
        a plain dict.
    """
    check_restored(leaves)
    found = {p: w for p, x in leaves.items() if is_quantized(w := unbox(x))}
    for path, w in found.items():
        if why := wrong(w):
            raise ValueError(
                f"{path_name(path)!r} is no quantised array: {why}. Write "
                "quantize(params, how), or see Quantized."
            )
    return found


def check_restored(leaves: dict[Path, Any]) -> None:
    """Checks that no quantized weight came back from a checkpoint as a plain dict.

    Raises:
      ValueError: If one did.
    """
    for path, leaf in leaves.items():
        if path[-1] != "values":
            continue
        if _are_parts(unbox(leaf), unbox(leaves.get((*path[:-1], "scale")))):
            raise ValueError(
                f"{path_name(path[:-1])!r} is a dict of 'values' and 'scale', as a "
                "Quantized comes back from a checkpoint that is restored without a "
                "target. Restore it into a tree of the same structure, "
                "checkpointer.restore(path, target) in Orbax, or write "
                "Quantized(values, scale, (dtype,)) in its place."
            )


def _are_parts(values: Any, scale: Any) -> bool:
    """Whether two arrays look like the parts of a `Quantized`."""
    kinds = zip((values, scale), (np.integer, np.floating), strict=True)
    return (
        all(is_array(x) and jax.dtypes.issubdtype(x.dtype, kind) for x, kind in kinds)
        and len(values.shape) == len(scale.shape) >= 2
    )


def fixed_leaves(tree: Any) -> dict[Path, str]:
    """The leaves held by no mapping, and what holds each: no leaf fits next to them."""
    found: dict[Path, str] = {}
    for key, child in _children(tree) or ():
        if _children(child) is not None:
            inner = fixed_leaves(child).items()
            found |= {(key, *path): holder for path, holder in inner}
        elif not isinstance(tree, Mapping):
            found[(key,)] = type(tree).__name__
    return found


def leaf_order(tree: Any) -> list[Path]:
    """The path of each of `tree_leaves(tree)`, in their order."""
    if _children(tree) is None:
        return [()] if tree_leaves(tree) else []
    return [
        (key, *path) for key, child in _in_order(tree) for path in leaf_order(child)
    ]


def _in_order(node: Any) -> list[tuple[Any, Any]]:
    """The (key, child) pairs of a container, in the order in which JAX takes them."""
    pairs = _children(node)
    if not isinstance(node, Mapping):
        return pairs
    # The mapping decides the order, so ask it: a number stands for each child.
    numbered = _filled(node, {key: i for i, (key, _) in enumerate(pairs)})
    return [pairs[i] for i in jax.tree.leaves(numbered)]


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    """The (key, child) pairs of a container; `None` for a leaf."""
    if node is None or is_box(node) or is_quantized(node):
        return None
    if isinstance(node, nnx.State):
        # Its own items would wrap each nested dict in one more State.
        return list(node.raw_mapping.items())
    if isinstance(node, Mapping):
        return list(node.items())
    pairs, _ = _one_level(node)
    if pairs and not pairs[0][0]:  # its only child is itself
        return None
    return [(jax.tree_util.keystr(keys, simple=True), child) for keys, child in pairs]


def _one_level(node: Any):
    is_leaf = lambda x: x is not node
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=is_leaf)


def _collect(node: Any, path: Path, leaves: dict[Path, Any]) -> None:
    for key, child in _children(node) or ():
        if _children(child) is None:
            leaves[(*path, key)] = child
        else:
            _collect(child, (*path, key), leaves)


def _rebuild(node: Any, path: Path, by_parent: dict[Path, dict[Any, Any]]) -> Any:
    new = by_parent.get(path, {})
    children = {}
    for key, child in _children(node) or ():
        if _children(child) is not None:
            children[key] = _rebuild(child, (*path, key), by_parent)
        elif key in new:
            children[key] = new[key]
    if isinstance(node, Mapping):
        return _filled(node, children | new)
    _, treedef = _one_level(node)
    if len(children) != treedef.num_leaves or new.keys() - children.keys():
        raise ValueError(
            f"{path_name(path) or 'The tree'} is a {type(node).__name__}, which "
            "cannot gain or lose a leaf. Keep each weight in a mapping of its own."
        )
    try:
        return treedef.unflatten(children.values())
    except Exception:
        if not any(x is None or isinstance(x, bool) for x in children.values()):
            raise
        # A class that checks its fields, in whatever way, may take no hole and no mask:
        # in JAX's hands it would not either. A half has the same paths in a dict.
        return children


def _filled(node: Mapping, children: dict[Any, Any]) -> Mapping:
    """A mapping like this one, of other children."""
    if not isinstance(node, dict):
        return type(node)(children)
    filled = copy.copy(node)  # which keeps a subclass's own state
    filled.clear()
    filled.update(children)
    return filled
