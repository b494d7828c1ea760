"""Any optax optimizer, for the adapters alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._split import combine, split
from lora_jax._tree import is_traced


def adapters_only(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Makes an optimizer that trains the adapters and leaves all other leaves alone.

    `tx` sees the adapters alone: it holds no state for a frozen leaf, clips by the norm
    of the adapters' gradients, and decays no frozen weight. Under one `jit`, with the
    gradient taken there too, XLA removes the frozen weights' gradients, for the FLOPs
    and the memory of `split`. Fits `flax.training.train_state.TrainState` unchanged.

    Donate the tree and the state to the step: `@jax.jit(donate_argnums=(0, 1))`.
    Without it each step writes a second copy of the frozen leaves. Donation deletes an
    array in every tree that shares it, and `lorafy` copies no weight: the tree that it
    was given, and other adapters on that tree, then raise "Array has been deleted".
    JAX refuses to donate an array that is in the tree twice, such as a tied table. To
    keep the base, train the half of `split`: it costs the same and copies nothing.

    Whatever else reads the gradients of the whole tree, such as a norm to log, a clip
    or a finite check, makes XLA compute those of the frozen weights again, for the
    FLOPs of full fine-tuning. Log `optax.tree.norm(split(grads)[0])`, and clip inside
    of `adapters_only`, as below.

    Args:
      tx: Any optax transformation: schedules, clipping, decay, `optax.apply_if_finite`
        and `optax.MultiSteps` included. Put them inside: what is chained outside sees
        the frozen leaves again, and `MultiSteps`, for one, would keep a gradient of
        each.

    Returns:
      A transformation of the whole tree. The update of a frozen leaf is -0.0, which
      `optax.apply_updates` adds without changing a bit. (Outside of one `jit`, XLA for
      CPU takes a subnormal number for zero there, as in any sum.) Of optax's extra
      arguments, a tree like the parameters (`grad`) is cut to the adapters, `value_fn`
      is called with the whole tree, and numbers and keys (`value`) pass as they are.
      (A state in which optax keeps gradients has those of the adapters alone: with
      `optax.value_and_grad_from_state`, train the half of `split`.) The state is on the
      devices of the adapters: on a mesh, its scalars are replicated, so that
      `out_shardings` and the target of a checkpoint can be read off it.

    Raises:
      ValueError: When initialised or applied, as `split`.
      TypeError: When applied with an extra argument that is a function, other than
        `value_fn`: nothing says which tree it takes.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj, optax
      >>> apply, x = lj.lora(lambda params, x: x @ params["kernel"]), jnp.ones((5, 4))
      >>> clip, sgd = optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)
      >>> tx = lj.adapters_only(optax.chain(clip, sgd))
      >>> @jax.jit(donate_argnums=(0, 1))
      ... def step(params, state):
      ...     grads = jax.grad(lambda params: jnp.mean(apply(params, x) ** 2))(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     norm = optax.tree.norm(lj.split(grads)[0])
      ...     return optax.apply_updates(params, updates), state, norm
      >>> params = lj.lorafy({"kernel": jnp.ones((4, 3))}, rank=2)
      >>> params, state, norm = step(params, tx.init(params))
      >>> [x.shape for x in jax.tree.leaves(state)]
      [(4, 2), (2, 3)]
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        adapters, _ = split(params)
        return _placed_like(adapters, tx.init(adapters))

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


def _placed_like(adapters: Any, state: Any) -> Any:
    """Commits the rest of a fresh state to the devices that the adapters are on.

    Moments lie where their adapters do, but a count or a hyperparameter starts as an
    uncommitted array on the default device. `jit` moves such an array freely, so the
    first step works. Orbax, however, restores it committed to that one device, and
    `jit` then refuses it next to adapters on a mesh; nor can it be in `out_shardings`.
    Not only scalars: so start the vectors of adafactor and the memory of L-BFGS.
    """
    leaves = jax.tree.leaves(adapters)
    if any(map(is_traced, leaves)):
        return state
    places = [x.sharding for x in leaves if getattr(x, "committed", False)]
    if len({frozenset(place.device_set) for place in places}) != 1:
        return state  # uncommitted, or layers on devices of their own
    place = places[0]
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec())
    elif not place.is_fully_replicated:
        return state
    # Not `device_put`: it refuses a random key where the mesh spans processes.
    put = jax.jit(lambda x: x, out_shardings=place)

    def placed(x: Any) -> Any:
        free = isinstance(x, jax.Array) and not is_traced(x) and not x.committed
        return put(x) if free else x

    return jax.tree.map(placed, state)


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
