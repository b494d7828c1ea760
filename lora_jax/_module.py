"""A live `nnx.Module` with adapters: its call is the model's, run by `lora`."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lora_jax._adapters import adapters_if_any, find_adapters, is_adapter
from lora_jax._lora import check_options, lora
from lora_jax._lorafy import lorafy
from lora_jax._merge import merge
from lora_jax._tree import Path, flatten, is_quantized, unbox, unflatten


class LoRA(nnx.Module):
    """A live model with adapters, for training and running it as any `nnx.Module`.

    A call is the model's own call with x W + scale (x A) B for x W, and so is a call of
    any other method of the model's class. What the model keeps as it runs, counts of
    dropout, batch statistics, caches, is kept in here as there. Adapters are
    `nnx.LoRAParam`, beside their weights in `module.model`, a copy of the given model,
    which is not changed: `nnx.Optimizer(module, tx, wrt=nnx.LoRAParam)` trains them,
    with gradients of `nnx.DiffState(0, nnx.LoRAParam)`.

    `nnx.state(module.model)` is a tree as from `lorafy`, with the paths of the model,
    for `save`, `export_peft`, `count`, ...; `nnx.update(module.model, state)` takes
    one, of `load` for example. A direct call of `module.model`, or of a part of it, is
    the model without its adapters.

    A call is traced, as by `jax.jit`: Python's `if` and `while` on what the model
    computes, and `yield`, belong outside of it. Within it the model's own parameters
    are all there are, so that a penalty on them is not one on the adapters.

    Not to be confused with `nnx.LoRA`, a layer that one writes around one product.

    Attributes:
      model: The copy, with the adapters in it.
      deterministic: Whether the dropout of the adapters is off; `module.eval()` and
        `module.train()` set it, as for the model's own.

    Args:
      model: Any `nnx.Module`. Its arrays are shared, not copied.
      rank: Rank of the updates, or `{pattern: rank}`, as in `lorafy`.
      dropout: Rate of the adapters' own dropout, as in `lora`.
      unused: What to do if the model's call does not use an adapter: "error", or
        "ignore". Other methods may leave some out.
      materialize: As in `lora`.
      rngs: Where dropout keys come from: `rngs.dropout()`; needed with `dropout`.
      **options: Those of `lorafy`: `alpha`, `targets`, `exclude`, `also`, `axes`,
        `init`, `rslora`, `dora`, `dtype`, `key`. Paths are those of the model's state.
        For `axes`, with `graph, state = nnx.split(model)`:
        `find_axes(lambda state, x: nnx.merge(graph, state)(x), state, x)`.

    Raises:
      TypeError: If `model` is no live `nnx.Module`. When called, if it has no such
        method, or one that goes on after it returned (`yield`, `async`).
      ValueError: If it has no parameters, or adapters already, if `dropout` has no
        keys, or for `stack`; and what `lorafy` and, when called, `lora` raise.

    Example:
      >>> import jax.numpy as jnp, lora_jax as lj, optax
      >>> from flax import nnx
      >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
      >>> module = lj.LoRA(model, rank=2)
      >>> optimizer = nnx.Optimizer(module, optax.sgd(1e-3), wrt=nnx.LoRAParam)
      >>> trains = nnx.DiffState(0, nnx.LoRAParam)
      >>> loss = lambda module, x: jnp.mean(module(x) ** 2)
      >>> @nnx.jit
      ... def step(module, optimizer, x):
      ...     grads = nnx.grad(loss, argnums=trains)(module, x)
      ...     optimizer.update(module, grads)
      >>> step(module, optimizer, jnp.ones((5, 4)))
      >>> module.merge()(jnp.ones((5, 4))).shape
      (5, 3)

    Reference:
      Hu et al., "LoRA", 2021. https://arxiv.org/abs/2106.09685
    """

    def __init__(
        self,
        model: nnx.Module,
        rank: int | dict[str, int],
        *,
        dropout: float = 0.0,
        unused: str = "error",
        materialize: str = "warn",
        rngs: nnx.Rngs | None = None,
        **options: Any,
    ):
        check_options(dropout, unused, materialize)
        if dropout and not (isinstance(rngs, nnx.Rngs) and hasattr(rngs, "dropout")):
            found = list(rngs) if isinstance(rngs, nnx.Rngs) else type(rngs).__name__
            raise ValueError(
                f"dropout needs keys, rngs with a stream of that name, found {found}: "
                "write LoRA(model, rank, dropout=..., rngs=nnx.Rngs(0))."
            )
        if options.get("stack") is not None:
            raise ValueError(
                f"LoRA holds one adapter, found stack={options['stack']!r}. Write "
                "lorafy(state, rank, stack=...) and jax.vmap(lora(fn), ...), where "
                "graph, state = nnx.split(model) and "
                "fn = lambda state, x: nnx.merge(graph, state)(x)."
            )
        self.model = _adapted(model, rank, options)
        self.dropout, self.unused, self.materialize = dropout, unused, materialize
        self.deterministic = False
        self.rngs = rngs

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Calls the model with its adapters."""
        return self._run("__call__", self.unused, *args, **kwargs)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # Asked only for what is not found, also while nnx builds a module anew.
        model = vars(self).get("model")
        method = None if name.startswith("__") else _method(type(model), name)
        if isinstance(method, staticmethod | classmethod):
            return getattr(model, name)
        # A function, or one in nnx.jit, functools.partialmethod, ...
        if isinstance(method, type) or not _is_method(method):
            raise AttributeError(
                f"LoRA has no attribute {name!r}, and {type(model).__name__} has no "
                f"method of that name. What the model holds is module.model.{name}, "
                "without adapters."
            )
        return functools.partial(self._run, name, "ignore")

    def merge(self) -> nnx.Module:
        """Returns a plain model of the given class, with W + scale A B for each W.

        Its variables are its own; what is not adapted shares its arrays with `model`.
        """
        model = nnx.clone(self.model)
        for path in filter(is_adapter, flatten(nnx.state(model))):
            parent = _at(model, path[:-1])
            if isinstance(parent, dict):
                del parent[path[-1]]
            else:
                delattr(parent, path[-1])
        nnx.update(model, merge(nnx.state(self.model)))
        return model

    def _run(self, name: str, unused: str, /, *args: Any, **kwargs: Any) -> Any:
        _check_method(type(self.model), name)
        drops = self.dropout and not self.deterministic
        key = self.rngs.dropout() if drops else None
        options = dict(dropout=self.dropout, materialize=self.materialize)
        return call(self.model, name, args, kwargs, key, unused=unused, **options)


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


def _method(model: type, name: str) -> Any:
    """What a class says under a name, unbound; its metaclass, which is nnx's, aside."""
    return next((vars(c)[name] for c in model.__mro__ if name in vars(c)), None)


def _is_method(x: Any) -> bool:
    return callable(x) or isinstance(x, functools.partialmethod)


def _check_method(model: type, name: str) -> None:
    method = _method(model, name)
    if method is None:
        raise TypeError(
            f"{model.__name__} is no function: it has no {name}. Call one of its own "
            "methods, module.encode(x) for example."
        )
    lazy = inspect.isgeneratorfunction, inspect.iscoroutinefunction
    if any(f(method) for f in (*lazy, inspect.isasyncgenfunction)):
        raise TypeError(
            f"{model.__name__}.{name} goes on after it returned (yield, async), and "
            "lora traces a function that returns. Write the loop outside, around a "
            "method that does one step."
        )


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
    parent = _at(model, path[:-1])
    return parent if isinstance(parent, dict) else vars(parent)


def _by_path(tree: Any) -> dict[str, Any]:
    pairs = jax.tree.leaves_with_path(tree, is_leaf=is_quantized)
    return {jax.tree_util.keystr(path): x for path, x in pairs}


def _adapted(model: Any, rank: Any, options: dict[str, Any]) -> nnx.Module:
    """A copy of a model, with adapters beside its weights."""
    if not isinstance(model, nnx.Module):
        is_class = isinstance(model, type)
        found = f"the class {model.__name__}" if is_class else type(model).__name__
        raise TypeError(
            f"LoRA takes a live nnx.Module, found {found}. For a tree "
            "of parameters write lorafy(params, rank) and lora(fn)."
        )
    if isinstance(model, LoRA):
        raise ValueError(
            "The model already has adapters: it is a LoRA. Write "
            "LoRA(module.merge(), rank) to go on from merged weights."
        )
    state = nnx.state(model, nnx.Param)
    if not flatten(state):
        raise ValueError(
            f"{type(model).__name__} has no parameters to adapt: no nnx.Param is in it."
        )
    leaves = flatten(lorafy(state, rank, **options))
    model = nnx.clone(model)
    for own in find_adapters(leaves).values():
        for path in own:
            parent = _at(model, path[:-1])
            if isinstance(parent, dict):
                parent[path[-1]] = leaves[path]
            else:
                setattr(parent, path[-1], leaves[path])
    return model


def _at(node: Any, path: Path) -> Any:
    """What stands at a path of a model's state."""
    for key in path:
        keyed = isinstance(node, dict) or isinstance(key, int)
        node = node[key] if keyed else getattr(node, key)
    return node
