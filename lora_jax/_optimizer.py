"""Applies any optax optimizer to the adapters only."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._split import combine, split
from lora_jax._tree import PyTree, is_traced


def adapters_only(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Makes an optimizer that trains the adapters and leaves all other leaves alone.

    `tx` gets only the adapters: it holds no state for a frozen leaf, clips by the norm
    of the adapters' gradients, and decays no frozen weight. If one `jit` contains the
    step and its gradient, XLA removes the frozen weights' gradients, so that FLOPs and
    memory are those of `split`. Fits `flax.training.train_state.TrainState`.

    Donate the tree and the state to the step: `@jax.jit(donate_argnums=(0, 1))`.
    Otherwise each step writes a second copy of the frozen leaves. Donation deletes an
    array in every tree that shares it, and `lorafy` copies no weight: the tree that it
    was given, and other adapters on that tree, then raise "Array has been deleted".
    JAX refuses to donate an array that is in the tree twice, such as a tied table. To
    keep the base, train the first tree of `split`: it costs the same and copies
    nothing.

    If anything else reads the gradients of the whole tree, such as a norm to log, a
    clip or a check that they are finite, XLA computes those of the frozen weights too,
    for the FLOPs of full fine-tuning. Log `optax.tree.norm(split(grads)[0])`, and clip
    inside `adapters_only`, as below.

    Args:
      tx: Any optax transformation: schedules, clipping, decay, `optax.apply_if_finite`
        and `optax.MultiSteps` included. Put them inside: a transformation that is
        chained outside gets the frozen leaves too, and `MultiSteps` would hold a
        gradient of each.

    Returns:
      A transformation of the whole tree. The update of a frozen leaf is -0.0, which
      `optax.apply_updates` adds without changing a bit. (Outside of one `jit`, XLA for
      CPU flushes a subnormal number to zero there, as in any sum.) Of optax's extra
      arguments, a tree like the parameters (`grad`) is reduced to the adapters,
      `value_fn` is called with the whole tree, and scalars and keys (`value`) are
      passed unchanged. (A state in which optax keeps gradients has only those of the
      adapters: with `optax.value_and_grad_from_state`, train the first tree of
      `split`.) The state is on the devices of the adapters: on a mesh its scalars are
      replicated, so that its shardings can serve as `out_shardings` and as the target
      of a checkpoint.

    Raises:
      ValueError: When initialized or applied, as `split`.
      TypeError: When applied with an extra argument that is a function, other than
        `value_fn`: it is unknown which tree it takes.

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

    def init(params: PyTree) -> Any:
        adapters, _ = split(params)
        return _on_devices_of(adapters, tx.init(adapters))

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        trained, frozen = split(updates)
        adapters = None
        if params is not None:
            adapters, frozen = split(params)
        structure = jax.tree.structure(updates)
        given = {name: _own(name, x, structure, frozen) for name, x in extra.items()}
        trained, state = tx.update(trained, state, adapters, **given)
        return combine(trained, jax.tree.map(_zero_update, frozen)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _on_devices_of(adapters: PyTree, state: Any) -> Any:
    """Commits the rest of a fresh state to the devices of the adapters.

    Moments have the shardings of their adapters, but a count or a hyperparameter starts
    as an uncommitted array on the default device. `jit` moves such an array freely, so
    the first step works. Orbax, however, restores it committed to that one device, and
    `jit` then refuses it next to adapters on a mesh; nor can it be in `out_shardings`.
    This is not limited to scalars: the vectors of adafactor and the memory of L-BFGS
    start the same way.
    """
    leaves = jax.tree.leaves(adapters)
    if any(map(is_traced, leaves)):
        return state
    shardings = [x.sharding for x in leaves if getattr(x, "committed", False)]
    if len({frozenset(sharding.device_set) for sharding in shardings}) != 1:
        return state  # uncommitted, or layers on different devices
    sharding = shardings[0]
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    elif not sharding.is_fully_replicated:
        return state
    # `device_put` would refuse a random key if the mesh spans processes.
    put = jax.jit(lambda x: x, out_shardings=sharding)

    def committed(x: Any) -> Any:
        free = isinstance(x, jax.Array) and not is_traced(x) and not x.committed
        return put(x) if free else x

    return jax.tree.map(committed, state)


def _own(name: str, x: Any, structure: Any, frozen: PyTree) -> Any:
    """Converts an extra argument of `update` for the optimizer of the adapters."""
    if name == "value_fn":

        @functools.wraps(x)  # optax looks for further arguments in its signature
        def of_adapters(adapters: PyTree, *args: Any, **kwargs: Any) -> Any:
            return x(combine(adapters, frozen), *args, **kwargs)

        return of_adapters
    if callable(x):
        raise TypeError(
            f"adapters_only cannot pass {name!r} on: it is a function, and only "
            "value_fn is known to take the parameters. Train the adapters of "
            "split(params), with which any optimizer works."
        )
    return split(x)[0] if jax.tree.structure(x) == structure else x


def _zero_update(x: Any) -> Any:
    """Returns the update that leaves a leaf unchanged in every bit."""
    shape, dtype = jnp.shape(x), jnp.result_type(x)
    if dtype == jax.dtypes.float0:  # the gradient of an integer
        return jnp.zeros(shape, bool)
    # x + 0.0 would turn -0.0 into 0.0; x + -0.0 is x.
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.full(shape, complex(-0.0, -0.0), dtype)
    return jnp.full(shape, -0.0 if jnp.issubdtype(dtype, jnp.floating) else 0, dtype)
