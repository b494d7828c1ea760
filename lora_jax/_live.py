"""Runs methods of live `nnx.Module`s as pure functions, and replaces their leaves."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import nnx

from lora_jax._adapters import adapters_or_quantized, is_adapter
from lora_jax._lora import lora
from lora_jax._tree import Path, flatten, is_quantized, unbox, unflatten


def call(
    model: nnx.Module,
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    key: jax.Array | None,
    **options: Any,
) -> Any:
    """Calls a method of a model with the adapters that the model contains.

    Like nnx's own transformations, this splits the live objects among the model and the
    arguments into arrays. A pure function rebuilds the objects from them, runs the
    method, and returns the arrays that the method changed or created; those are then
    written to the given objects. Three points differ:

    1. Arrays that the method left alone are not written. So a function that JAX traces
       may close over the model: nothing of the trace leaks into it.
    2. Weights that are adapted or quantized are never written. As results of the pure
       function they would be materialized.
    3. The adapters are removed from the model while its method runs, so that the
       method's own parameters, such as those of a penalty, are those of a merged model.

    Args:
      model: The model, with adapters next to its weights.
      name: The name of the method.
      args: Its positional arguments.
      kwargs: Its keyword arguments.
      key: The `dropout_key` of `lora`.
      **options: Other options of `lora`.
    """
    tag = object()  # by which nnx recognizes the objects in and out of the function
    with nnx.update_context(tag):
        outer = (model, args, kwargs)
        given = nnx.to_tree(outer, ctxtag=tag)
        variables = _variables(_live(given, outer))
        (state,) = given[0].states
        leaves, old = flatten(state), _by_path(given)
        weights = {id(unbox(leaves[path])) for path in adapters_or_quantized(leaves)}
        # By identity or type, since nnx's transformations inside the model give every
        # variable a new value, changed or not.
        is_fixed = lambda x: is_quantized(x) or id(x) in weights
        fixed_paths = {p for p, x in old.items() if is_fixed(x)}
        fixed = {i for i, v in enumerate(variables) if is_fixed(v.get_raw_value())}
        # `method` sets this if objects gained or lost parts: the structure of the
        # objects after the call, and the paths of their arrays.
        changed_structure: list[Any] = []

        def method(plain: nnx.State) -> tuple[dict[Any, Any], Any]:
            everything = unflatten(state, leaves | flatten(plain))
            inner = (given[0].replace(states=(everything,)), *given[1:])
            # New containers, since the method may change the value of a variable in
            # place.
            inner = jax.tree.map(lambda x: x, inner, is_leaf=is_quantized)
            objects = nnx.from_tree(inner, ctxtag=tag, is_inner=True)
            live = _live(given, objects)
            before = [_parts(v) for v in _variables(live)]
            graph, arrays = nnx.graphdef(live), _arrays(live)
            with _hidden(objects[0], filter(is_adapter, leaves)):
                unbound = getattr(type(objects[0]), name)
                result = unbound(objects[0], *objects[1], **objects[2])
            *held, result = nnx.to_tree((*objects, result), ctxtag=tag)
            same = graph == nnx.graphdef(live) and arrays == _arrays(live)
            if same and not any(map(_is_split, _nodes(result))):
                pairs = zip(before, _variables(live), strict=True)
                moved = {i: v for i, (was, v) in enumerate(pairs) if _parts(v) != was}
                new = {i: v.get_raw_value() for i, v in moved.items() if i not in fixed}
                return new, result
            start, end = _by_path(inner), _by_path(tuple(held))
            new = {p: x for p, x in end.items() if start.get(p) is not x}
            new = {p: x for p, x in new.items() if p not in fixed_paths}
            structure = jax.tree.structure(tuple(held), is_leaf=is_quantized)
            changed_structure[:] = structure, list(end)
            return new, result

        adapted: Callable[..., Any] = lora(method, **options)
        new, result = adapted(state, dropout_key=key)
        if not changed_structure:
            for i, value in new.items():
                variables[i].set_raw_value(value)
            return result
        structure, paths = changed_structure
        held = structure.unflatten([new[p] if p in new else old[p] for p in paths])
        return nnx.from_tree((*held, result), ctxtag=tag, is_inner=False)[3]


@contextlib.contextmanager
def _hidden(model: nnx.Module, paths: Iterable[Path]) -> Iterator[None]:
    """Removes leaves from a model for the time of a block."""
    # The dicts that hold the leaves: Flax's own `del` would also change copies.
    parents = [(at(model, path[:-1]), path[-1]) for path in paths]
    holders = [(x if isinstance(x, dict) else vars(x), key) for x, key in parents]
    removed = [holder.pop(key) for holder, key in holders]
    yield
    for (holder, key), leaf in zip(holders, removed, strict=True):
        holder[key] = leaf


def _is_split(x: Any) -> bool:
    return isinstance(x, nnx.NodeStates)


def _nodes(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_split)


def _live(given: Any, objects: Any) -> list[Any]:
    """Returns the live objects in a tree, where `given` is its `nnx.to_tree`."""
    parts = jax.tree.structure(given, is_leaf=_is_split).flatten_up_to(objects)
    pairs = zip(_nodes(given), parts, strict=True)
    return [part for node, part in pairs if _is_split(node)]


def _variables(live: list[Any]) -> list[nnx.Variable]:
    return [x for _, x in nnx.iter_graph(live) if isinstance(x, nnx.Variable)]


def _arrays(live: list[Any]) -> list[int]:
    """Identifies the arrays that objects hold directly, in no variable."""
    return [id(x) for _, x in nnx.iter_graph(live) if isinstance(x, jax.Array)]


def _parts(variable: nnx.Variable) -> tuple[Any, list[int]]:
    """Identifies the value of a variable: its structure, and which arrays it has."""
    value = variable.get_raw_value()
    parts, structure = jax.tree.flatten(value, is_leaf=is_quantized)
    return structure, [id(x) for x in parts]


def _by_path(tree: Any) -> dict[str, Any]:
    pairs = jax.tree.leaves_with_path(tree, is_leaf=is_quantized)
    return {jax.tree_util.keystr(path): x for path, x in pairs}


def at(node: Any, path: Path) -> Any:
    """Returns the part of a model at a path of its state."""
    for key in path:
        if isinstance(node, dict) or isinstance(key, int):
            node = node[key]
        else:
            node = getattr(node, key)
    return node


def fill(model: nnx.Module, leaves: dict[Path, Any]) -> nnx.Module:
    """Gives a model other leaves, in place, and returns it."""
    old = flatten(model)
    for path in [path for path in old if path not in leaves]:
        parent = at(model, path[:-1])
        if isinstance(parent, dict):
            del parent[path[-1]]
        else:
            delattr(parent, path[-1])
    for path in [path for path in leaves if path not in old]:
        parent = at(model, path[:-1])
        if isinstance(parent, dict):
            parent[path[-1]] = copied(leaves[path])
        else:
            setattr(parent, path[-1], copied(leaves[path]))
    # Only what changed, since a variable may have a hook that runs when it is set.
    changed = [
        (path, leaves[path])
        for path, x in old.items()
        if path in leaves and _raw(leaves[path]) is not _raw(x)
    ]
    nnx.update(model, nnx.from_flat_state(changed))
    return model


def without_foreign(model: nnx.Module, factors: Iterable[Path]) -> nnx.Module:
    """Returns a copy of a model without the adapters of Flax or qwix.

    Deleting the factors is not enough, because the layers would still use them:
    an `nnx.LoRA` becomes the layer that it wraps, an `nnx.LoRALinear` an `nnx.Linear`,
    and a model of qwix has the class that the model had before.

    Args:
      model: The model. Its arrays are shared with the copy.
      factors: The paths of the factors.

    Raises:
      ValueError: If a layer is of a subclass, whose methods may use the factors.
    """
    name = type(model).__name__
    model = nnx.clone(model)
    for path in factors:
        parent = at(model, path[:-1])
        if isinstance(parent, dict):
            del parent[path[-1]]
        else:
            delattr(parent, path[-1])
    # qwix makes a subclass for each model, with this attribute (qwix/_src/model.py).
    _set_class(model, vars(type(model)).get("_unquantized_type", type(model)))
    while type(model) is nnx.LoRA and model.base_module is not None:
        model = model.base_module
    # A layer that two modules share is found at one path, and then at the other.
    while wrapped := _first_wrapped(model):
        path, layer = wrapped
        parent = at(model, path[:-1])
        if isinstance(parent, dict) or isinstance(path[-1], int):
            parent[path[-1]] = layer.base_module
        else:
            setattr(parent, path[-1], layer.base_module)
    for _, layer in nnx.iter_graph(model):
        if type(layer) is nnx.LoRALinear:
            del layer.lora
            _set_class(layer, nnx.Linear)
    kinds = nnx.LoRA, nnx.LoRALinear
    left = [type(x) for _, x in nnx.iter_graph(model) if isinstance(x, kinds)]
    if left:
        own = next((kind for kind in left if kind not in kinds), left[0])
        raise ValueError(
            f"{name} has a layer of a class of its own, {own.__name__}, which may use "
            "its factors in another way. If it only adds x A B, write "
            "adopt(nnx.state(model)), for the tree."
        )
    return model


def _set_class(module: nnx.Module, kind: type) -> None:
    """Makes a module one of a class that it inherits from."""
    object.__setattr__(module, "__class__", kind)


def _first_wrapped(model: nnx.Module) -> tuple[Path, nnx.LoRA] | None:
    """Returns the path of an `nnx.LoRA` around a layer, and the `nnx.LoRA`."""
    found = (
        (path, x)
        for path, x in nnx.iter_graph(model)
        if type(x) is nnx.LoRA and x.base_module is not None
    )
    return next(found, None)


def copied(leaf: Any) -> Any:
    """Returns a new variable with the value of the given one; another leaf as it is."""
    return leaf.replace(_raw(leaf)) if isinstance(leaf, nnx.Variable) else leaf


def _raw(leaf: Any) -> Any:
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
