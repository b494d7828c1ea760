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

    Raises:
      TypeError: If `model` is no live `nnx.Module`.
      ValueError: If it has no parameters, or `dropout` has no keys; and what `lorafy`
        and, when called, `lora` raise.

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
        if dropout and rngs is None:
            raise ValueError(
                "dropout needs keys: write LoRA(model, rank, dropout=..., "
                "rngs=nnx.Rngs(0))."
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
        method = getattr(type(model), name, None)
        if model is None or name.startswith("__") or not inspect.isfunction(method):
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
        leaves = flatten(nnx.state(model))
        for path in filter(is_adapter, leaves):
            parent = _at(model, path[:-1])
            if isinstance(parent, dict):
                del parent[path[-1]]
            else:
                delattr(parent, path[-1])
        nnx.update(model, merge(nnx.state(self.model)))
        return model

    def _run(self, name: str, unused: str, /, *args: Any, **kwargs: Any) -> Any:
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
    few bits stay what they were: what leaves the function is formed for it.
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
            objects = nnx.from_tree(inner, ctxtag=tag, is_inner=True)
            live = _live(given, objects)
            values = [v.get_raw_value() for v in _variables(live)]
            graph, arrays = nnx.graphdef(live), _arrays(live)
            called = getattr(type(objects[0]), name)
            result = called(objects[0], *objects[1], **objects[2])
            *held, result = nnx.to_tree((*objects, result), ctxtag=tag)
            same = graph == nnx.graphdef(live) and arrays == _arrays(live)
            if same and not any(map(_is_split, _nodes(result))):
                after = [v.get_raw_value() for v in _variables(live)]
                pairs = enumerate(zip(values, after, strict=True))
                new = {i: y for i, (x, y) in pairs if y is not x and i not in still}
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


def _by_path(tree: Any) -> dict[str, Any]:
    pairs = jax.tree.leaves_with_path(tree, is_leaf=is_quantized)
    return {jax.tree_util.keystr(path): x for path, x in pairs}


def _adapted(model: Any, rank: Any, options: dict[str, Any]) -> nnx.Module:
    """A copy of a model, with adapters beside its weights."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"LoRA takes a live nnx.Module, found {type(model).__name__}. For a tree "
            "of parameters write lorafy(params, rank) and lora(fn)."
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
