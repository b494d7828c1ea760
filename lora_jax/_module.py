"""A live `nnx.Module` with adapters: its call is the model's, run by `lora`."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from flax import nnx

from lora_jax._adapters import find_adapters, is_adapter
from lora_jax._live import at, call
from lora_jax._lora import check_options
from lora_jax._lorafy import lorafy
from lora_jax._merge import merge
from lora_jax._tree import flatten


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
            parent = at(model, path[:-1])
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
            parent = at(model, path[:-1])
            if isinstance(parent, dict):
                parent[path[-1]] = leaves[path]
            else:
                setattr(parent, path[-1], leaves[path])
    return model
