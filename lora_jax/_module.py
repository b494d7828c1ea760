"""`LoRA`, a live `nnx.Module` with adapters, and live modules in place of trees.

`LoRA` wraps a model and forwards its methods and settings. The last part of this file
registers with `_tree.py` how any live module, wrapped or not, is flattened to a tree of
parameters and rebuilt from other leaves.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from lora_jax._adapters import check_adapter, find_adapters, is_adapter
from lora_jax._live import call, copied, fill
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

# Passed in place of a rank: the model already contains its adapters.
PRESENT: Any = object()


class _Call:
    """Descriptor of `LoRA.__call__`, which presents the signature of the model's call.

    Trainers inspect `inspect.signature(module.__call__)` to see which arguments a model
    takes. A plain method has one signature for all instances; this descriptor returns a
    function for the class of `module.model`. The alternative, a subclass of LoRA per
    class of model, has no importable name, so that it cannot be pickled. And since
    `nnx` builds modules by `object.__new__`, setting attributes one by one, nothing is
    prepared in `__init__`: everything is computed on access.
    """

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn
        self.__doc__ = fn.__doc__

    def __get__(self, module: Any, owner: type | None = None) -> Callable[..., Any]:
        return self.fn if module is None else _bound(module, "__call__")


def _presents_model(fn: Callable[..., Any]) -> Any:
    return _Call(fn)  # `Any`, since the base class declares a plain method


class _Signature:
    """Descriptor of `LoRA.__signature__`, for `inspect.signature(module)`."""

    def __get__(self, module: Any, owner: type | None = None) -> inspect.Signature:
        if module is None:  # the signature of the class is that of `__init__`
            raise AttributeError("__signature__")
        return inspect.signature(module.__call__)


class LoRA(nnx.Module):
    """Wraps a live model with adapters, to train and run it like any `nnx.Module`.

    A call of the module is the model's own call with x W + scale (x A) B for x W, and
    so is a call of any other method of the model's class. Each has the signature of the
    model's method. State that changes as the model runs (dropout counts, batch
    statistics, caches) is updated in `module.model`, a copy of the given model, which
    does not change. The copy contains the adapters, `nnx.LoRAParam`, next to their
    weights: `nnx.Optimizer(module, tx, wrt=nnx.LoRAParam)` trains them, with gradients
    of `nnx.DiffState(0, nnx.LoRAParam)`.

    Attributes of the model that hold no array, variable or module, such as
    `module.config` and `module.num_layers`, can be read and set on the module. Others
    raise an `AttributeError`, because a variable or a sub-module alone would run
    without its adapters; they are `module.model.layers`, ...

    Functions of this package that take a tree also take a live module, with adapters or
    plain: `count(module)`, `save(path, module)`, `find_axes(model, x)`,
    `explain(module, x)`, ... Paths are those of the model's state,
    `nnx.state(module.model)`. Where the result is a tree, it is a module of the same
    class, except that a plain model that gains adapters (`load(path, model)`, `attach`,
    `import_peft`, `extract`) becomes a `LoRA`, and that a `LoRA` that loses them
    (`merge`, `strip`) becomes a plain model. Where the leaves make no model (`split`,
    `detach`, `mask`, `labels`, `stack`), the result is an `nnx.State`. Only `lorafy`
    and `lora` take no module: this class is their counterpart.

    Calls are traced, as by `jax.jit`: in the model, Python's `if` and `while` cannot
    depend on computed values, and methods cannot `yield`. The model's methods find only
    its own parameters, so that a penalty on those does not include the adapters.

    Note that `nnx.jit` writes a new copy of every variable of its arguments in each
    call, the frozen base included. The second step below passes the base as an argument
    only, which copies nothing. `nnx.jit(step, graph_updates=False)`, with Flax 0.12.6
    or newer, copies nothing either. With `donate_argnums=(0, 1)` the copy replaces the
    base, but then the given model, which shares its arrays, is deleted too.

    This class is unrelated to `nnx.LoRA`, a layer that replaces one linear layer.

    Attributes:
      model: The copy of the model, with the adapters in it.
      dropout: As given, as the next three are. They can be set.
      unused: As given.
      materialize: As given.
      rngs: As given.
      deterministic: Whether the dropout of the adapters is off; `module.eval()` and
        `module.train()` set it, as they do in the model.

    Args:
      model: Any `nnx.Module`, also an abstract one from `nnx.eval_shape`. Its arrays
        are shared, not copied.
      rank: Rank of the updates, or `{pattern: rank}`, as in `lorafy`.
      dropout: Rate of the dropout of the adapters, as in `lora`.
      unused: What to do if the model's call does not use an adapter: "error", or
        "ignore". Other methods may leave adapters unused.
      materialize: As in `lora`.
      rngs: The source of dropout keys, `rngs.dropout()`; required with `dropout`.
      **options: Those of `lorafy`: `alpha`, `targets`, `exclude`, `also`, `axes`,
        `init`, `rslora`, `dora`, `dtype`, `key`. Paths are those of the model's state.
        For `axes`: `find_axes(model, x)`.

    Raises:
      TypeError: If `model` is no live `nnx.Module`. When called: if the model has no
        such method, or one that is a generator or a coroutine.
      ValueError: If `model` has no parameters, or already has adapters; if `dropout`
        has no keys; if `stack` is given; and as `lorafy` and, when called, `lora`.

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

      The same step for a large base, which is passed separately and not copied:

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
                f"dropout needs rngs with a stream 'dropout', found {found}. Write "
                "LoRA(model, rank, dropout=..., rngs=nnx.Rngs(0))."
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
        # As data even if it is None, so that it can be set later.
        self.rngs: Any = nnx.data(rngs)

    __signature__ = _Signature()

    @_presents_model
    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Calls the model with its adapters."""
        return self._run("__call__", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Python calls this only for names that it does not find, which includes names
        # that nnx reads while it rebuilds a module, before `model` is set.
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
                f"{type(self).__name__} has no attribute {name!r}: it forwards the "
                f"methods and settings of {type(model).__name__}, not its private "
                "attributes or those that hold weights. Write "
                f"module.model.{name}, which ignores the adapters."
            )
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # A setting of the model is set on the model: as an attribute of this module it
        # would only hide the one that the model reads.
        model = vars(self).get("model")
        of_module = name in OWN or name in vars(self) or hasattr(type(self), name)
        if (
            of_module
            or name.startswith("_")
            or model is None
            or not hasattr(model, name)
        ):
            return super().__setattr__(name, value)
        if _is_method(model, name) or _leads_to_model(getattr(model, name)):
            raise AttributeError(
                f"{name!r} belongs to the model, {type(model).__name__}. Write "
                f"module.model.{name} = ..."
            )
        return setattr(model, name, value)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Switches the dropout of the adapters off or on, for `nnx.view`."""
        if deterministic is not None:
            self.deterministic = deterministic

    def merge(self, *, dtype: DTypeLike | None = None) -> nnx.Module:
        """Returns a plain model of the given class, with W + scale A B for each W.

        Its variables are new; those without an adapter share their arrays with `model`.
        `dtype` is the dtype of the adapted weights, as in the function `merge`.
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
    """Returns an attribute of a class, unbound, or `None`.

    `getattr` would also find attributes of the metaclass, which nnx defines.
    """
    return next((vars(c)[name] for c in model.__mro__ if name in vars(c)), None)


def _is_method(model: nnx.Module, name: str) -> bool:
    """Whether a name is a method of a model, plain or wrapped (`nnx.jit`, ...)."""
    if name in vars(model):
        return False
    x = _method(type(model), name)
    if isinstance(x, type | staticmethod | classmethod):  # without a model to run
        return False
    return callable(x) or isinstance(x, functools.partialmethod)


def _bound(module: LoRA, name: str) -> Callable[..., Any]:
    """Returns a method of the model, bound to the module that runs it with adapters."""
    return types.MethodType(_presented(type(vars(module).get("model")), name), module)


# Cached so that two accesses give equal methods: `jax.jit` compares static arguments.
@functools.lru_cache(maxsize=1024)
def _presented(model: type, name: str) -> Callable[..., Any]:
    """Returns a method of a model's class as a function of the module around it."""

    def method(self: LoRA, /, *args: Any, **kwargs: Any) -> Any:
        return self._run(name, *args, **kwargs)

    original = getattr(model, name, None) if _method(model, name) is not None else None
    if original is not None:
        functools.update_wrapper(method, original, updated=())
        try:
            vars(method)["__signature__"] = inspect.signature(original)
        except (TypeError, ValueError):  # some callables have no signature
            del vars(method)["__wrapped__"]
    method.__name__ = name  # pickle looks a bound method up by its name
    return method


def _leads_to_model(x: Any) -> bool:
    """Whether a value holds arrays, variables or modules, or a method of a module.

    It would give access to the model without adapters. What a Python function refers to
    is not checked.
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
            f"{model.__name__} has no method {name}. Call one of its own methods, for "
            "example module.encode(x)."
        )
    lazy = inspect.isgeneratorfunction, inspect.iscoroutinefunction
    if any(f(method) for f in (*lazy, inspect.isasyncgenfunction)):
        raise TypeError(
            f"{model.__name__}.{name} is a generator or a coroutine (yield, async), "
            "which cannot be traced. Write the loop outside, around a method that does "
            "one step."
        )


# Live modules as trees.


def _adapted(model: Any, rank: Any, options: dict[str, Any]) -> nnx.Module:
    """Returns a copy of a model, with adapters next to its weights."""
    if not isinstance(model, nnx.Module):
        is_class = isinstance(model, type)
        found = f"the class {model.__name__}" if is_class else type(model).__name__
        raise TypeError(
            f"LoRA takes a live nnx.Module, found {found}. For a tree "
            "of parameters write lorafy(params, rank) and lora(fn)."
        )
    if isinstance(model, LoRA):
        raise ValueError(
            "The model already has adapters: it is a LoRA. To continue from merged "
            "weights, write LoRA(module.merge(), rank)."
        )
    state = nnx.state(model, nnx.Param)
    if not flatten(state):
        raise ValueError(
            f"{type(model).__name__} has no parameters to adapt: it holds no nnx.Param."
        )
    adapted = flatten(lorafy(state, rank, **options))
    return _fill(nnx.clone(model), flatten(model) | adapted)


def _state(module: nnx.Module) -> nnx.State:
    return nnx.state(module.model if isinstance(module, LoRA) else module)


def _rebuild(like: nnx.Module, leaves: dict[Path, Any]) -> Any:
    """Returns a live module, or a state, like the given module with other leaves.

    - Leaves that make no model (`None`, masks, labels, stacks of adapters): an
      `nnx.State`.
    - A plain model that gains adapters: a `LoRA` around it, because the model's own
      methods would silently ignore them.
    - A `LoRA` that loses its adapters: the plain model.
    - Anything else: a module of the same class.

    The given module does not change, and the result has its own variables.
    """
    state = _state(like)
    old = flatten(state)
    if not _make_model(old, leaves):
        return unflatten(state, {path: copied(x) for path, x in leaves.items()})
    had, has = (any(map(is_adapter, each)) for each in (old, leaves))
    if isinstance(like, LoRA) and has:
        module = nnx.clone(like)
        _fill(module.model, leaves)
        return module
    model = nnx.clone(like.model if isinstance(like, LoRA) else like)
    _fill(model, leaves)
    return LoRA(model, PRESENT) if has and not had else model


def _make_model(old: dict[Path, Any], new: dict[Path, Any]) -> bool:
    """Whether new leaves have the kinds of the old ones, with at most one adapter."""
    for path, leaf in new.items():
        was = old.get(path, leaf)
        lost = is_array(unbox(was)) and not is_array(unbox(leaf))
        if lost or is_box(was) != is_box(leaf):
            return False
    if not any(map(is_adapter, new)):
        return True
    found = find_adapters(new, stacks=True)
    return check_adapter(new, *next(iter(found.items()))) is None


def _fill(model: nnx.Module, leaves: dict[Path, Any]) -> nnx.Module:
    """Gives a model other leaves, in place, and returns it.

    Raises:
      ValueError: If adapters are added or removed in a model that contains a `LoRA`.
    """
    inner = [path for path, node in nnx.iter_graph(model) if isinstance(node, LoRA)]
    if inner and flatten(model).keys() != leaves.keys():
        raise ValueError(
            f"{type(model).__name__} holds a LoRA at {path_name(inner[0])!r}. Pass "
            "that module itself."
        )
    return fill(model, leaves)


register_live_modules(LiveModules(_state, _rebuild))
