"""Converts any parameter tree to `{path: leaf}` and back.

A path is the tuple of keys that leads to a leaf. A leaf keeps its box, such as
`nnx.Param`, which adds no key to the path. A quantized weight is one leaf.
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
from jax.core import Tracer

from lora_jax._engine.quantized import (
    FORMATS,
    Quantized,
    is_quantized,
    values_of,
    wrong,
)

# A tree of parameters: nested mappings, or any other pytree, whose leaves are arrays in
# boxes or not, `Quantized` or `None`; or a live `nnx.Module`. Typing cannot express it.
PyTree = Any
Path = tuple[Any, ...]

# A component of a key that is itself a path: of "dense/kernel", "layers.q.bias", or of
# what `jax.tree_util.keystr` writes, ".layers[0].weight" or "['dense']['kernel']".
PART = re.compile(r"[^/.\[\]'\"]+")

# How to adapt a tree that is not made of mappings. Error messages quote it.
FLAT = """adapt its leaves as one flat dict, where y = fn(params, *args):

    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    base = {name(path): leaf for path, leaf in flat}
    nested = lambda base: treedef.unflatten([base[name(path)] for path, _ in flat])
    flat_fn = lambda base, *args: fn(nested(base), *args)
    adapted = lj.lorafy(base, rank, axes=lj.find_axes(flat_fn, base, *args))
    y = lj.lora(flat_fn)(adapted, *args)

For an Equinox module, params, static = eqx.partition(model, eqx.is_array), and fn is
lambda params, *args: eqx.combine(params, static)(*args)."""


def is_box(x: Any) -> bool:
    """Whether a leaf is an array with metadata, by `flax.linen` or `flax.nnx`."""
    return not _is_concrete(type(x)) and isinstance(x, AxisMetadata | nnx.Variable)


@functools.cache
def _is_concrete(kind: type) -> bool:
    """Whether a type is that of arrays with values, which are in no box.

    The answer is kept, because the instance checks of Flax and JAX are slow, and trees
    can have thousands of leaves. A tracer can be a variable: its type does not decide.
    """
    concrete = issubclass(kind, np.ndarray | jax.Array)
    return concrete and not issubclass(kind, Tracer)


def is_counter(x: Any) -> bool:
    """Whether a leaf is a random key, a count or an index of a live module.

    Such a variable is no parameter: it differs between two runs of the same model.
    """
    if not isinstance(x, nnx.Variable) or isinstance(x, nnx.Param):
        return False
    w = unbox(x)
    return is_array(w) and not jnp.issubdtype(w.dtype, jnp.inexact)


def is_array(x: Any) -> bool:
    """Whether a leaf is an array: of JAX or NumPy, abstract, traced or quantized."""
    plain = jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct
    return isinstance(x, plain | Quantized)


def is_abstract(x: Any) -> bool:
    """Whether an array has a shape and a dtype and no values."""
    return isinstance(values_of(x), jax.ShapeDtypeStruct)


def is_traced(x: Any) -> bool:
    """Whether an array is a tracer, whose values are not known yet."""
    return isinstance(values_of(x), Tracer)


def tree_leaves(tree: PyTree) -> list[Any]:
    """Returns what `jax.tree.leaves` does, with a quantized weight as one leaf."""
    return jax.tree.leaves(tree, is_leaf=is_quantized)


def unbox(leaf: Any) -> Any:
    """Returns the array in a box, or in several; returns anything else unchanged."""
    while is_box(leaf):
        leaf = open_box(leaf)
    return leaf


def open_box(box: Any) -> Any:
    """Returns the content of one box.

    Not Flax's own `unbox`, which would also constrain the sharding of the array.
    """
    values = jax.tree.leaves(box, is_leaf=lambda x: x is not box)
    return values[0] if values else None


def rebox(like: Any, value: Any) -> Any:
    """Puts a value in a box like that of `like`, if it has one."""
    if isinstance(like, AxisMetadata):
        return like.replace_boxed(rebox(open_box(like), value))
    if isinstance(like, nnx.Variable):
        return like.replace(value)
    return value


def path_name(path: Path) -> str:
    """Returns a path as text, "dense/kernel"."""
    return "/".join(map(str, path))


def components(path: Path) -> tuple[str, ...]:
    """Returns the components of a path; a key that is itself a path has several."""
    return tuple(part for key in path for part in _parts(str(key)))


@functools.lru_cache(maxsize=65536)
def _parts(key: str) -> tuple[str, ...]:
    return tuple(PART.findall(key)) or (key,)


def leaf_name(path: Path) -> str:
    """Returns the last component of a path, "kernel" of ("dense/kernel",)."""
    return _parts(str(path[-1]))[-1]


def sibling(path: Path, *names: str) -> Path:
    """Replaces the last components of a path, and keeps its separators."""
    *parent, key = path
    spans = [part.span() for part in PART.finditer(str(key))] or [(0, len(str(key)))]
    common = min(len(names), len(spans))
    text = str(key)
    for (start, stop), name in zip(spans[-common:][::-1], names[::-1], strict=False):
        text = text[:start] + name + text[stop:]
    rest = names[: len(names) - common]
    if rest and parent:
        return (*sibling(tuple(parent), *rest), text)
    return (*parent, text)


def listed(names: Sequence[Any]) -> str:
    """Lists names or paths for a message: the first six, then an ellipsis."""
    names = [path_name(n) if isinstance(n, tuple) else n for n in names]
    text = ", ".join(map(repr, names[:6])) + (", ..." if len(names) > 6 else "")
    return text or "there is none"


class LiveModules(NamedTuple):
    """How to treat a live `nnx.Module` as a tree: flatten it, and rebuild it.

    Registered by the file that defines `LoRA`, like a pytree node with JAX, because
    rebuilding depends on `LoRA`: a module that gains adapters becomes one.
    """

    state: Callable[[nnx.Module], nnx.State]
    rebuild: Callable[[nnx.Module, dict[Path, Any]], Any]


_live_modules: list[LiveModules] = []


def register_live_modules(live: LiveModules) -> None:
    """Registers how live modules are treated; later calls do nothing.

    The public `LoRA` is the class of the first call. Reloading the file, as pytest does
    to collect doctests, defines a second class of that name.
    """
    if not _live_modules:
        _live_modules.append(live)


def is_live(x: Any) -> bool:
    """Whether a tree of parameters is a live module."""
    return isinstance(x, nnx.Module)


def as_tree(params: PyTree) -> PyTree:
    """Returns a live module's `nnx.State`; returns any other tree unchanged."""
    return _live_modules[0].state(params) if is_live(params) else params


def flatten(tree: PyTree) -> dict[Path, Any]:
    """Returns each leaf by its path.

    A leaf is whatever is no container: a box, an array, `None`, ... A live `nnx.Module`
    has the leaves and paths of its state.

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


def unflatten(like: PyTree, leaves: dict[Path, Any]) -> PyTree:
    """Rebuilds the containers of `like` around other leaves.

    A mapping may gain and lose leaves. Leaves are shared and containers are new:
    nothing is copied or mutated. For a live module the result is a module too, if the
    leaves can make one, and its state otherwise.

    Raises:
      ValueError: If a container other than a mapping would gain or lose a leaf.
    """
    if is_live(like):
        return _live_modules[0].rebuild(like, leaves)
    by_parent: dict[Path, dict[Any, Any]] = {}
    for path, leaf in leaves.items():
        by_parent.setdefault(path[:-1], {})[path[-1]] = leaf
    return _rebuild(like, (), by_parent)


def quantized_leaves(leaves: Mapping[Path, Any]) -> dict[Path, Quantized]:
    """Returns the quantized weights by path, out of their boxes.

    Raises:
      ValueError: If the codes and scales of one do not fit each other, or if one came
        back from a checkpoint as a plain dict.
    """
    check_restored(leaves)
    found = {p: w for p, x in leaves.items() if is_quantized(w := unbox(x))}
    for path, w in found.items():
        if why := wrong(w):
            raise ValueError(
                f"{path_name(path)!r} is no quantized array: {why}. Write "
                "quantize(params, how), or see Quantized."
            )
    return found


def check_restored(leaves: Mapping[Path, Any]) -> None:
    """Raises ValueError if a quantized weight came back from a checkpoint as a dict."""
    for path, leaf in leaves.items():
        name = path[-1]
        if name not in ("values", *FORMATS):
            continue
        codes, scale = unbox(leaf), unbox(leaves.get((*path[:-1], "scale")))
        kinds = (codes, np.integer), (scale, np.floating)
        if not all(is_array(x) and jnp.issubdtype(x.dtype, kind) for x, kind in kinds):
            continue
        # "values" may also be the name of a user's own leaf.
        if name == "values" and not len(codes.shape) == len(scale.shape) >= 2:
            continue
        line = f"Quantized(x[{name!r}], x['scale'], (dtype,)"
        line += ")" if name == "values" else f", {name!r})"
        packed = codes.dtype == jnp.uint8  # two codes in each byte
        raise ValueError(
            f"{path_name(path[:-1])!r} is a dict of {name!r} and 'scale', as a "
            "Quantized comes back from a checkpoint that is restored without a "
            "target. Restore with a target of the same structure, such as "
            "quantize(params, how); in Orbax, checkpointer.restore(path, target)"
            f"{'' if packed else f'. Or write {line} for each such dict x'}."
        )


def fixed_leaves(tree: PyTree) -> dict[Path, str]:
    """Returns the type of the container of each leaf that is in no mapping.

    No leaf can be added next to those: only a mapping can gain a key.
    """
    found: dict[Path, str] = {}
    for key, child in _children(tree) or ():
        if _children(child) is not None:
            inner = fixed_leaves(child).items()
            found |= {(key, *path): holder for path, holder in inner}
        elif not isinstance(tree, Mapping):
            found[(key,)] = type(tree).__name__
    return found


def leaf_order(tree: PyTree) -> list[Path]:
    """Returns the path of each of `tree_leaves(tree)`, in their order."""
    if _children(tree) is None:
        return [()] if tree_leaves(tree) else []
    return [
        (key, *path) for key, child in _in_order(tree) for path in leaf_order(child)
    ]


def _in_order(node: Any) -> list[tuple[Any, Any]]:
    """Returns the (key, child) pairs of a container in the order of JAX's leaves.

    JAX sorts the keys of a dict, and a registered mapping has an order of its own. So
    this flattens a mapping of the same type with the positions of the children in it.
    """
    pairs = _children(node) or []
    if not isinstance(node, Mapping):
        return pairs
    numbered = _filled(node, {key: i for i, (key, _) in enumerate(pairs)})
    return [pairs[i] for i in jax.tree.leaves(numbered)]


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    """Returns the (key, child) pairs of a container; `None` for a leaf."""
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


def _one_level(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Flattens the outermost container alone."""
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
        # A class that checks its fields may refuse `None` or a bool in the place of an
        # array: it could not hold JAX's own placeholders either. Halves and masks of
        # such a class are dicts, in which the leaves have the same paths.
        return children


def _filled(node: Mapping, children: dict[Any, Any]) -> Mapping:
    """Returns a mapping like this one with other children."""
    if not isinstance(node, dict):
        like: Any = type(node)
        return like(children)
    filled = copy.copy(node)  # keeps the attributes of a subclass
    filled.clear()
    filled.update(children)
    return filled
