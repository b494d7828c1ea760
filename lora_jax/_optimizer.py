"""Any optax optimizer, for the adapters alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax._split import combine, split


def adapters_only(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that trains the adapters and leaves all other leaves as they are.

    `tx` sees the adapters alone: it holds no state for a frozen leaf, clips by the norm
    of the adapters' gradients, and decays no frozen weight. Under one `jit`, with the
    gradient taken there too, XLA removes the frozen weights' gradients, for the FLOPs
    and the memory of `split`. Fits `flax.training.train_state.TrainState` unchanged.

    Args:
      tx: Any optax transformation: schedules, clipping, decay and `optax.MultiSteps`
        included. Put them inside: what is chained outside sees the frozen leaves again,
        and `MultiSteps`, for one, would keep a gradient of each.

    Returns:
      A transformation of the whole tree. The update of a frozen leaf is -0.0, which
      `optax.apply_updates` adds without changing a bit. (Outside of one `jit`, XLA for
      CPU takes a subnormal number for zero there, as in any sum.) Of optax's extra
      arguments, a tree like the parameters (`grad`) is cut to the adapters, `value_fn`
      is asked of the whole tree, and numbers and keys (`value`) pass as they are. (A
      state in which optax keeps gradients has those of the adapters alone: with
      `optax.value_and_grad_from_state`, train the half of `split`.)

    Raises:
      ValueError: When initialised or applied, as `split`.
      TypeError: When applied with an extra argument that is a function, other than
        `value_fn`: of what, it does not say.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj, optax
      >>> params = lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2)
      >>> state = lj.adapters_only(optax.sgd(0.1, momentum=0.9)).init(params)
      >>> [x.shape for x in jax.tree.leaves(state)]
      [(4, 2), (2, 3)]
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        adapters, _ = split(params)
        return tx.init(adapters)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any):
        trained, frozen = split(updates)
        adapters = None
        if params is not None:
            adapters, frozen = split(params)
        whole = jax.tree.structure(updates)
        own = {name: _own(name, x, whole, frozen) for name, x in extra.items()}
        trained, state = tx.update(trained, state, adapters, **own)
        return combine(trained, jax.tree.map(_nothing, frozen)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _own(name: str, x: Any, whole: Any, frozen: Any) -> Any:
    """An extra argument of `update` as the optimizer of the adapters needs it."""
    if name == "value_fn":

        @functools.wraps(x)  # optax looks for further arguments in its signature
        def of_adapters(adapters: Any, *args: Any, **kwargs: Any) -> Any:
            return x(combine(adapters, frozen), *args, **kwargs)

        return of_adapters
    if callable(x):
        raise TypeError(
            f"adapters_only cannot pass {name!r} on: it is a function, and only "
            "value_fn is known to be one of the parameters. Train the half of "
            "split(params), which any optimizer takes."
        )
    return split(x)[0] if jax.tree.structure(x) == whole else x


def _nothing(x: Any) -> Any:
    """What to add to a leaf, or to its gradient's like, to leave it as it is."""
    shape, dtype = jnp.shape(x), jnp.result_type(x)
    if dtype == jax.dtypes.float0:  # the gradient of a whole number
        return jnp.zeros(shape, bool)
    # x + 0.0 would turn -0.0 into 0.0; x + -0.0 is x.
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.full(shape, complex(-0.0, -0.0), dtype)
    return jnp.full(shape, -0.0 if jnp.issubdtype(dtype, jnp.floating) else 0, dtype)
