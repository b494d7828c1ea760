"""A live `nnx.Module` with adapters, and live modules wherever a tree is taken."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from lora_jax._adapters import check_adapter, find_adapters, is_adapter
from lora_jax._live import at, call
from lora_jax._lora import check_options
from lora_jax._lorafy import lorafy
from lora_jax._merge import merge
from lora_jax._tree import (
    LiveModules,
    Path,
    flatten,
    is_array,
    is_box,
    is_quantized,
    path_name,
    register_live_modules,
    unbox,
    unflatten,
)

# In place of a rank: the model has its adapters already.
PRESENT: Any = object()


class _Call:
    """The `__call__` of `LoRA`: on a module, with the signature of its model's call.

    Trainers ask `inspect.signature(module.__call__)` which arguments a model takes, and
    a function has one signature for all modules; this descriptor returns one for each
    class of model. A subclass of LoRA for each class of model, the alternative, would
    be a class that no name leads to: neither pickle nor a second process finds it.
    `nnx` builds a module by `object.__new__` and sets what it holds one by one, so
    that everything here is computed when it is asked for, from `module.model`.
    """

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn
        functools.update_wrapper(self, fn)

    def __get__(self, module: Any, owner: type | None = None) -> Callable[..., Any]:
        return self.fn if module is None else _bound(module, "__call__")


class _Signature:
    """The `__signature__` of a module, for `inspect.signature(module)`."""

    def __get__(self, module: Any, owner: type | None = None) -> inspect.Signature:
        if module is None:  # that of the class is the one of `__init__`
            raise AttributeError("__signature__")
        return inspect.signature(module.__call__)


class LoRA(nnx.Module):
    """A live model with adapters, for training and running it as any `nnx.Module`.

    A call is the model's own call with x W + scale (x A) B for x W, and so is a call of
    any other method of the model's class; each has the signature of the model's own.
    What the model keeps as it runs (dropout counts, batch statistics, caches) is kept
    in `module.model`, a copy of the given model, which is not changed. Adapters are
    `nnx.LoRAParam`, next to their weights in there:
    `nnx.Optimizer(module, tx, wrt=nnx.LoRAParam)` trains them, with gradients of
    `nnx.DiffState(0, nnx.LoRAParam)`.

    Settings of the model, such as `module.config` and `module.num_layers`, are read and
    set there: whatever holds no array, variable or module. Variables and sub-modules
    raise an `AttributeError`, since by themselves they have no adapters; they are
    `module.model.layers`, ...

    A live module, with adapters or plain, may be passed to the functions of this
    package that take a tree: `count(module)`, `save(path, module)`,
    `find_axes(model, x)`, `explain(module, x)`, ... Paths are those of the model's
    state, `nnx.state(module.model)`. Where the result is a tree, it is a module of the
    same class, except that a plain model which gains adapters (`load(path, model)`,
    `attach`, `import_peft`, `extract`) becomes a `LoRA`, and that a `LoRA` which loses
    them (`merge`, `strip`) becomes a plain model. Where the result is no model
    (`split`, `detach`, `mask`, `labels`, `stack`), it is an `nnx.State`. `lorafy` and
    `lora` take no module: their counterpart is this class.

    A call is traced, as by `jax.jit`: Python's `if` and `while` on what the model
    computes, and `yield`, belong outside of it. Within it the model's own parameters
    are all there are, so that a penalty on them is not one on the adapters.

    Note that `nnx.jit` writes a new copy of every variable of its arguments in each
    call, the frozen base included. The second step below passes the base as an argument
    only, which copies nothing. `nnx.jit(step, graph_updates=False)`, with Flax 0.12.6
    or newer, copies nothing either. With `donate_argnums=(0, 1)` the copy takes the
    place of the base, but the given model, which shares its arrays, is deleted too.

    Not to be confused with `nnx.LoRA`, a layer that one writes around one product.

    Attributes:
      model: The copy, with the adapters in it.
      dropout, unused, materialize, rngs: As given. They can be set.
      deterministic: Whether the dropout of the adapters is off; `module.eval()` and
        `module.train()` set it, as for the model's own.

    Args:
      model: Any `nnx.Module`, also an abstract one, as `nnx.eval_shape` makes it. Its
        arrays are shared, not copied.
      rank: Rank of the updates, or `{pattern: rank}`, as in `lorafy`.
      dropout: Rate of the adapters' own dropout, as in `lora`.
      unused: What to do if the model's call does not use an adapter: "error", or
        "ignore". Other methods may leave some out.
      materialize: As in `lora`.
      rngs: Where dropout keys come from: `rngs.dropout()`; needed with `dropout`.
      **options: Those of `lorafy`: `alpha`, `targets`, `exclude`, `also`, `axes`,
        `init`, `rslora`, `dora`, `dtype`, `key`. Paths are those of the model's state.
        For `axes`: `find_axes(model, x)`.

    Raises:
      TypeError: If `model` is no live `nnx.Module`. When called, if it has no such
        method, or one that goes on after it returned (`yield`, `async`).
      ValueError: If it has no parameters, or adapters already, if `dropout` has no
        keys, or for `stack`; and what `lorafy` and, when called, `lora` raise.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj, optax
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

      The same step with the frozen base apart, for a base that is large:

      >>> frozen = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
      >>> graph, base, state = nnx.split((module, optimizer), frozen, ...)
      >>> @jax.jit
      ... def step(base, state, x):
      ...     module, optimizer = nnx.merge(graph, base, state)
      ...     grads = nnx.grad(loss, argnums=trains)(module, x)
      ...     optimizer.update(module, grads)
      ...     return nnx.state((module, optimizer), nnx.Not(frozen))
      >>> for _ in range(2):
      ...     state = step(base, state, jnp.ones((5, 4)))
      >>> nnx.update((module, optimizer), state)

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
        self.model = model if rank is PRESENT else _adapted(model, rank, options)
        self.dropout, self.unused, self.materialize = dropout, unused, materialize
        self.deterministic = False
        self.rngs = nnx.data(rngs)  # data also as None, so that it can be set later

    __signature__ = _Signature()

    @_Call
    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Calls the model with its adapters."""
        return self._run("__call__", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Python calls this only for what it does not find, also while nnx builds a
        # module anew, when there is no model yet.
        model = vars(self).get("model")
        if model is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        if _is_method(model, name):
            return _bound(self, name)
        try:
            value = getattr(model, name)
        except AttributeError as error:
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}: {error}"
            ) from error
        if name.startswith("_") or _leads_to_model(value):
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}: of the model, "
                f"{type(model).__name__}, it passes on methods and settings, not what "
                f"holds weights or is private. Write module.model.{name}, without "
                "adapters."
            )
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # A setting of the model is set there: as an attribute of this module it would
        # hide the model's, which the model would still go by.
        model = vars(self).get("model")
        own = name in OWN or name in vars(self) or hasattr(type(self), name)
        if own or name.startswith("_") or model is None or not hasattr(model, name):
            return super().__setattr__(name, value)
        if _is_method(model, name) or _leads_to_model(getattr(model, name)):
            raise AttributeError(
                f"{name!r} belongs to the model, {type(model).__name__}. Write "
                f"module.model.{name} = ..."
            )
        return setattr(model, name, value)

    def set_view(self, deterministic: bool | None = None) -> None:
        """For `nnx.view`: switches the dropout of the adapters off or on."""
        if deterministic is not None:
            self.deterministic = deterministic

    def merge(self, *, dtype: Any = None) -> nnx.Module:
        """Returns a plain model of the given class, with W + scale A B for each W.

        Its variables are its own; what is not adapted shares its arrays with `model`.
        `dtype` is that of the adapted weights, as in the function `merge`.
        """
        return merge(self, dtype=dtype)

    def _run(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        _check_method(type(self.model), name)
        drops = self.dropout and not self.deterministic
        key = self.rngs.dropout() if drops else None
        unused = self.unused if name == "__call__" else "ignore"
        options = dict(dropout=self.dropout, materialize=self.materialize)
        return call(self.model, name, args, kwargs, key, unused=unused, **options)


OWN = {"model", "dropout", "unused", "materialize", "deterministic", "rngs"}


# Methods and attributes of the model.


def _method(model: type, name: str) -> Any:
    """What a class says under a name, unbound; its metaclass, which is nnx's, aside."""
    return next((vars(c)[name] for c in model.__mro__ if name in vars(c)), None)


def _is_method(model: nnx.Module, name: str) -> bool:
    """Whether a name is a method of a model: a function, or one in `nnx.jit`, ..."""
    if name in vars(model):
        return False
    x = _method(type(model), name)
    if isinstance(x, type | staticmethod | classmethod):  # these have no model to run
        return False
    return callable(x) or isinstance(x, functools.partialmethod)


def _bound(module: LoRA, name: str) -> Callable[..., Any]:
    """A method of the model, bound to the module that runs it with adapters."""
    return types.MethodType(_presented(type(vars(module).get("model")), name), module)


@functools.lru_cache(maxsize=1024)  # so that a method is equal to itself, for jax.jit
def _presented(model: type, name: str) -> Callable[..., Any]:
    """A method of a class of models, as a function of the module around the model."""

    def method(self: LoRA, /, *args: Any, **kwargs: Any) -> Any:
        return self._run(name, *args, **kwargs)

    own = getattr(model, name, None) if _method(model, name) is not None else None
    if own is not None:
        functools.update_wrapper(method, own, updated=())
        try:
            method.__signature__ = inspect.signature(own)  # pyright: ignore
        except (TypeError, ValueError):  # some callables have none
            del method.__wrapped__  # pyright: ignore
    method.__name__ = name  # by which pickle finds it again
    return method


def _leads_to_model(x: Any) -> bool:
    """Whether a value holds arrays, variables or modules: the model without adapters.

    A method of a module does, too; what a function of Python refers to is not seen.
    """
    kinds = nnx.Pytree | nnx.Variable | jax.Array | np.ndarray | jax.ShapeDtypeStruct
    leads = lambda x: isinstance(x, kinds) or is_quantized(x)
    for leaf in jax.tree.leaves(x, is_leaf=leads):
        while isinstance(leaf, functools.partial):
            if _leads_to_model((leaf.args, leaf.keywords)):
                return True
            leaf = leaf.func
        if leads(leaf) or leads(getattr(leaf, "__self__", None)):
            return True
    return False


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


# A live module as a tree.


def _adapted(model: Any, rank: Any, options: dict[str, Any]) -> nnx.Module:
    """A copy of a model, with adapters next to its weights."""
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
    adapted = flatten(lorafy(state, rank, **options))
    return _filled(nnx.clone(model), flatten(model) | adapted)


def _state(module: nnx.Module) -> nnx.State:
    return nnx.state(module.model if isinstance(module, LoRA) else module)


def _rebuild(like: nnx.Module, leaves: dict[Path, Any]) -> Any:
    """What has the leaves of a live module's state changed into others.

    A module of the same class. A plain model that gains adapters becomes a LoRA, since
    its own class would leave them out without a word, and a LoRA that loses all becomes
    a plain model. Where leaves make no model (`None`, masks, labels, stacks of
    adapters), it is the state.
    """
    state = _state(like)
    old = flatten(state)
    if not _make_model(old, leaves):
        # With variables of its own: those of the module change as it trains.
        return unflatten(state, {path: _copied(x) for path, x in leaves.items()})
    had, has = (any(map(is_adapter, own)) for own in (old, leaves))
    if isinstance(like, LoRA) and has:
        module = nnx.clone(like)
        _filled(module.model, leaves)
        return module
    model = _filled(nnx.clone(like.model if isinstance(like, LoRA) else like), leaves)
    return LoRA(model, PRESENT) if has and not had else model


def _make_model(old: dict[Path, Any], new: dict[Path, Any]) -> bool:
    """Whether leaves are such as the old ones were, with one adapter or none."""
    for path, leaf in new.items():
        was = old.get(path, leaf)
        lost = is_array(unbox(was)) and not is_array(unbox(leaf))
        if lost or is_box(was) != is_box(leaf):
            return False
    if not any(map(is_adapter, new)):
        return True
    found = find_adapters(new, stacks=True)
    return check_adapter(new, *next(iter(found.items()))) is None


def _filled(model: nnx.Module, leaves: dict[Path, Any]) -> nnx.Module:
    """A model, a clone that nobody else has, with other leaves in it."""
    old = flatten(model)
    gone = [path for path in old if path not in leaves]
    new = [path for path in leaves if path not in old]
    for inner, node in nnx.iter_graph(model):
        if isinstance(node, LoRA) and (gone or new):
            raise ValueError(
                f"{type(model).__name__} holds a LoRA at {path_name(inner)!r}. Pass "
                "that module itself."
            )
    for path in gone:
        parent = at(model, path[:-1])
        if isinstance(parent, dict):
            del parent[path[-1]]
        else:
            delattr(parent, path[-1])
    for path in new:
        parent = at(model, path[:-1])
        if isinstance(parent, dict):
            parent[path[-1]] = _copied(leaves[path])
        else:
            setattr(parent, path[-1], _copied(leaves[path]))
    # Only what changed: a variable may have a hook for when it is set.
    changed = [
        (path, leaves[path])
        for path, x in old.items()
        if path in leaves and _raw(leaves[path]) is not _raw(x)
    ]
    nnx.update(model, nnx.from_flat_state(changed))
    return model


def _raw(leaf: Any) -> Any:
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf


def _copied(leaf: Any) -> Any:
    return leaf.replace(_raw(leaf)) if isinstance(leaf, nnx.Variable) else leaf


register_live_modules(LiveModules(_state, _rebuild))
