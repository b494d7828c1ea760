"""A call of a live `nnx.Module` as a pure function, and what it changed put back."""

from typing import Any

import jax
from flax import nnx

from lora_jax._adapters import adapters_if_any, is_adapter
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
    """Calls a method of a model that has adapters in it, with them.

    The live objects among model and arguments go into the function as their arrays, and
    those arrays that the method changed, or made, come out and into the objects again,
    as with nnx's own transformations. What it left alone is not written: a function
    that JAX traces may close over the model, as over any. Weights that have adapters or
    few bits stay what they were: what leaves the function is formed for it. The method
    finds no adapters: the sum of squares of its parameters is that of merged ones.
    """
    tag = object()  # by which nnx knows the objects again
    with nnx.update_context(tag):
        whole = (model, args, kwargs)
        given = nnx.to_tree(whole, ctxtag=tag)
        variables = _variables(_live(given, whole))
        (state,) = given[0].states
        leaves, old = flatten(state), _by_path(given)
        weights = {id(unbox(leaves[path])) for path in adapters_if_any(leaves)}
        # nnx's own transformations within the model give all variables new values.
        is_fixed = lambda x: is_quantized(x) or id(x) in weights
        fixed = {p for p, x in old.items() if is_fixed(x)}
        still = {i for i, v in enumerate(variables) if is_fixed(v.get_raw_value())}
        structures: list[Any] = []  # of what comes out, as the one trace finds them

        def method(plain: nnx.State) -> tuple[dict[Any, Any], Any]:
            full = unflatten(state, leaves | flatten(plain))
            inner = (given[0].replace(states=(full,)), *given[1:])
            # New containers: what a variable holds may be changed in place.
            inner = jax.tree.map(lambda x: x, inner, is_leaf=is_quantized)
            objects = nnx.from_tree(inner, ctxtag=tag, is_inner=True)
            live = _live(given, objects)
            values = [_parts(v) for v in _variables(live)]
            graph, arrays = nnx.graphdef(live), _arrays(live)
            holders = [(_holder(objects[0], p), p[-1]) for p in leaves if is_adapter(p)]
            taken = [holder.pop(key) for holder, key in holders]
            called = getattr(type(objects[0]), name)
            result = called(objects[0], *objects[1], **objects[2])
            for (holder, key), adapter in zip(holders, taken, strict=True):
                holder[key] = adapter
            *held, result = nnx.to_tree((*objects, result), ctxtag=tag)
            same = graph == nnx.graphdef(live) and arrays == _arrays(live)
            if same and not any(map(_is_split, _nodes(result))):
                pairs = enumerate(zip(values, _variables(live), strict=True))
                moved = {i: v for i, (was, v) in pairs if _parts(v) != was}
                new = {i: v.get_raw_value() for i, v in moved.items() if i not in still}
                return new, result
            before, after = _by_path(inner), _by_path(tuple(held))
            new = {p: x for p, x in after.items() if before.get(p) is not x}
            new = {p: x for p, x in new.items() if p not in fixed}
            structures[:] = jax.tree.structure(tuple(held), is_leaf=is_quantized), after
            return new, result

        new, result = lora(method, **options)(state, dropout_key=key)
        if not structures:  # the objects are made as they were
            for i, value in new.items():
                variables[i].set_raw_value(value)
            return result
        structure, after = structures
        held = structure.unflatten([new[p] if p in new else old[p] for p in after])
        return nnx.from_tree((*held, result), ctxtag=tag, is_inner=False)[3]


def _is_split(x: Any) -> bool:
    return isinstance(x, nnx.NodeStates)


def _nodes(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_split)


def _live(given: Any, whole: Any) -> list[Any]:
    """The live objects of a tree, where `given` has what they were split into."""
    parts = jax.tree.structure(given, is_leaf=_is_split).flatten_up_to(whole)
    pairs = zip(_nodes(given), parts, strict=True)
    return [part for node, part in pairs if _is_split(node)]


def _variables(live: list[Any]) -> list[nnx.Variable]:
    return [x for _, x in nnx.iter_graph(live) if isinstance(x, nnx.Variable)]


def _arrays(live: list[Any]) -> list[int]:
    """Which arrays the objects hold themselves, in no variable."""
    return [id(x) for _, x in nnx.iter_graph(live) if isinstance(x, jax.Array)]


def _parts(variable: nnx.Variable) -> tuple[Any, list[int]]:
    """What tells whether a variable has another value: its structure and arrays."""
    value = variable.get_raw_value()
    parts, structure = jax.tree.flatten(value, is_leaf=is_quantized)
    return structure, [id(x) for x in parts]


def _holder(model: nnx.Module, path: Path) -> dict[Any, Any]:
    """The dict that holds what is at a path: Flax's own `del` also changes copies."""
    parent = at(model, path[:-1])
    return parent if isinstance(parent, dict) else vars(parent)


def _by_path(tree: Any) -> dict[str, Any]:
    pairs = jax.tree.leaves_with_path(tree, is_leaf=is_quantized)
    return {jax.tree_util.keystr(path): x for path, x in pairs}


def at(node: Any, path: Path) -> Any:
    """What stands at a path of a model's state."""
    for key in path:
        keyed = isinstance(node, dict) or isinstance(key, int)
        node = node[key] if keyed else getattr(node, key)
    return node
