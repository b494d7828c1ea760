"""Adds adapters to a tree of parameters."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapters import (
    ABSENT,
    RANK,
    Axes,
    LowRank,
    Shape,
    adapter_of,
    copy_of,
    factor_dims,
)
from lora_jax._engine.dtypes import wider
from lora_jax._engine.quantized import is_quantized
from lora_jax._engine.source import warn_user
from lora_jax._flax_names import check_axes
from lora_jax._leaves import (
    adapter_leaves,
    gaussian,
    input_norms,
    path_key,
    trained_copy,
)
from lora_jax._patterns import Patterns, Selector
from lora_jax._targets import (
    AdapterPlan,
    also_trained,
    check_held,
    plan_adapters,
    report_left_out,
)
from lora_jax._tree import (
    Path,
    PyTree,
    fixed_leaves,
    flatten,
    is_abstract,
    is_live,
    is_traced,
    path_name,
    unbox,
    unflatten,
)


def lorafy(
    params: PyTree,
    rank: int | Mapping[str, int],
    *,
    alpha: float | jax.Array | Mapping[str, float | jax.Array] | None = None,
    targets: Selector | None = None,
    exclude: Selector = (),
    also: Patterns = (),
    axes: Mapping[str, Axes] | None = None,
    init: Callable[..., jax.Array] = gaussian,
    rslora: bool = False,
    dora: bool = False,
    dtype: Any = None,
    stack: int | None = None,
    key: jax.Array | None = None,
) -> PyTree:
    """Adds a low-rank adapter next to each chosen weight.

    `lora(fn)` computes on the new tree exactly what `fn` does on the old one, because A
    is Gaussian of variance 1 / inputs and B is zero. Next to `kernel` or `embedding`
    the new leaves are `lora_a` of shape (batch..., in..., rank), `lora_b` (batch...,
    rank, out...) and `lora_scale` (batch...) in float32; next to any other key `w` they
    are `w_lora_a`, and so on. A leaf that is trained in full gets a copy next to it,
    `lora_w` or `bias_lora_w`, which takes its place. These leaves are trained, except
    for the scales; all others are frozen.

    One dict with path-like keys ("dense/kernel", "layers.q.bias", ".layers[0].weight")
    is treated like the nested tree: the last component of a key is the leaf's name, and
    patterns match components. Its new keys are "dense/kernel_lora_a", and so on. Trees
    of lists, tuples or dataclasses (Equinox) cannot gain leaves: the error shows how to
    adapt their leaves in such a dict.

    Args:
      params: A tree of mappings: nested dict, `FrozenDict`, `nnx.State`, or all of
        `{"params": ...}`; boxed leaves or not; arrays, tracers or `ShapeDtypeStruct`.
      rank: The rank r of the update, or `{pattern: rank}`, which is its own targets. A
        rank above the inputs or the outputs of a weight, as for a head of two classes,
        is allowed but wasteful; `explain` lists such ranks. Where a token uses k of
        many experts, a kth of the rank for them spends as much of it on a token:
        `rank={"experts": 32 // k, "attention": 32}` (Schulman et al., "LoRA Without
        Regret", 2025. https://thinkingmachines.ai/blog/lora/).
      alpha: The update is scaled by alpha / rank; `{pattern: alpha}` for some. A number
        above 0, or a JAX scalar, which may be traced. Default: the rank, for a scale
        of 1.
      targets: A pattern, several, or `callable(path, array) -> bool`. A pattern matches
        a run of whole path components, `*` may cross slashes: "query", "attn/*/kernel".
        Norms and biases are no weights: leaves named `bias`, `scale`, `gamma`, `beta`
        or `..._bias`, and leaves whose own or module's name is `..norm`, `norm_1`,
        `ln_f` or the like. Default: every leaf named `kernel` of two or more
        dimensions, with a warning that lists other weights that are no tables
        (`embedding`, `wte`, `positions`, ...). If `axes` are from `find_axes`: every
        weight in them that is no table.
      exclude: Which weights to leave out, in the same form.
      also: Patterns of leaves to train in full, such as a new head, norms or biases:
        floating, of any shape. Each gets a copy, in float32 for a narrower leaf, so
        that small updates are not rounded away.
      axes: `{path: Axes(batch, inputs, outputs)}`, as `find_axes` returns it for a
        function, or entries for those weights whose names in Flax do not determine
        which dimensions are which. With `targets` it may name other weights too.
      init: The initial values of A: `init(key, (inputs, rank), dtype)`.
      rslora: Scale by alpha / sqrt(rank) instead.
      dora: Decompose each weight into magnitudes and directions: it becomes
        m (W + scale A B) / |W + scale A B|, where the norm over the inputs is a
        constant in derivatives. `lora_magnitude`, m, of shape (batch..., out...) in
        float32 or wider, starts as |W| and is trained. An output with only zero weights
        has no direction: it stays zero, with a warning.
      dtype: The dtype of A and B. Default: float32 for a narrower or quantized weight,
        else the weight's.
      stack: The number of adapters over this one base, to run at once by `jax.vmap`:
        each new leaf has them along a first dimension. To stack trees that differ, see
        `stack`. Default: one adapter, without that dimension.
      key: The random key for A. Each weight folds its own path into it, and each
        adapter of a stack has a key of `jax.random.split(key, stack)`. Default:
        `jax.random.key(0)`.

    Returns:
      A tree with the same containers, boxes and shardings that shares every old leaf.
      Adapters are sharded like their weights: by the weight's sharding, or, under `jit`
      and a mesh of automatic axes, by the names in its box.

    Raises:
      TypeError: If `params` is no tree of parameters.
      ValueError: If a pattern matches nothing, a rank is below 1, alpha is no number
        above 0, a weight has an adapter already, of this or of another library, or is
        also trained in full, its dimensions are ambiguous, or nothing is left to adapt;
        if a weight is held by a list, a tuple or a dataclass; if `also` names a
        quantized weight; or if `stack` is no whole number above 0.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj
      >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
      >>> adapted = lj.lorafy(params, rank=2)
      >>> jax.tree.map(jnp.shape, adapted)["dense"]["lora_a"]
      (4, 2)

    Reference:
      Hu et al., "LoRA", 2021. https://arxiv.org/abs/2106.09685
      Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024.
      https://arxiv.org/abs/2402.09353
      Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
      2023. https://arxiv.org/abs/2312.03732
    """
    if is_live(params):
        raise TypeError(
            f"lorafy takes a tree of parameters, found the live module "
            f"{type(params).__name__}. Write LoRA(model, rank), with the same options."
        )
    leaves, held = flatten(params), fixed_leaves(params)
    check_held(held, leaves, None)
    known = check_axes(axes or {}, leaves)
    plans = plan_adapters(leaves, rank, alpha, targets, exclude, known)
    copied = also_trained(leaves, also, plans)
    check_held(held, leaves, (*plans, *copied))
    key = jax.random.key(0) if key is None else key
    if stack is not None and (not isinstance(stack, int) or stack < 1):
        raise ValueError(f"stack must be a whole number above 0, found {stack!r}.")
    if targets is None and not isinstance(rank, Mapping):
        report_left_out(
            leaves, plans, held=held, copied=copied, exclude=exclude, axes=known
        )
    # Raises if a container has no room for a new leaf, before any array is made.
    parts_of = functools.partial(adapter_of, magnitude=dora)
    trial = {part: leaves[path] for path in plans for part in parts_of(path)}
    trial |= {copy_of(path).w: leaves[path] for path in copied}
    unflatten(params, leaves | trial)
    new: dict[Path, Any] = {
        copy_of(path).w: trained_copy(leaves[path], stack=stack) for path in copied
    }
    for path, plan in plans.items():
        scale = plan.alpha / (math.sqrt(plan.rank) if rslora else plan.rank)
        draw = functools.partial(_draw, path, plan, init, key, stack)
        values = _initial(path, leaves[path], plan, scale, draw, dtype, dora, stack)
        new |= adapter_leaves(path, leaves[path], values, stacked=stack is not None)
    return unflatten(params, leaves | new)


def _initial(
    path: Path,
    leaf: Any,
    plan: AdapterPlan,
    scale: float | jax.Array,
    draw: Callable[..., jax.Array],
    dtype: Any,
    dora: bool,
    stack: int | None,
) -> LowRank[Any]:
    """Returns the initial values of an adapter, abstract if the weight is abstract.

    B is zero, so that the adapted model starts as the base.
    """
    w, axes = unbox(leaf), plan.axes
    wide = jnp.float32 if is_quantized(w) else wider(w.dtype)
    dtype = wide if dtype is None else dtype
    fills = [
        (dtype, functools.partial(draw, w.shape, dtype)),
        (dtype, functools.partial(jnp.zeros, dtype=dtype)),
        (jnp.float32, functools.partial(jnp.full, fill_value=scale, dtype=jnp.float32)),
    ]
    if dora:
        fills.append((wide, functools.partial(_magnitude, path, w, axes)))
    aligned = not axes.standard
    sizes = dict(enumerate(w.shape)) | {RANK: plan.rank, ABSENT: 1}
    values = []
    dims = factor_dims(w.shape, axes, aligned=aligned)
    for kept, (kind, fill) in zip(dims, fills, strict=False):
        shape = tuple(sizes[d] for d in kept)
        stacked = shape if stack is None else (stack, *shape)
        if is_abstract(w):
            values.append(jax.ShapeDtypeStruct(stacked, kind))
        else:
            values.append(jnp.broadcast_to(fill(shape), stacked))
    return LowRank(*values, axes=axes, aligned=aligned)


def _draw(
    path: Path,
    plan: AdapterPlan,
    init: Callable[..., jax.Array],
    key: jax.Array,
    stack: int | None,
    w_shape: Shape,
    dtype: Any,
    shape: Shape,
) -> jax.Array:
    """Returns A's initial values, each adapter of a batch drawn as a matrix (in, r)."""
    r, axes = plan.rank, plan.axes
    n_in = math.prod(w_shape[d] for d in axes.inputs)
    stored = (*axes.batch, *axes.inputs)

    def one(key: jax.Array) -> jax.Array:
        key = path_key(key, path)
        if axes.batch:
            keys = jax.random.split(key, math.prod(w_shape[d] for d in axes.batch))
            a = jax.vmap(lambda key: init(key, (n_in, r), dtype))(keys)
        else:
            a = init(key, (n_in, r), dtype)
        # `init` has drawn them in the order (batch, inputs, rank).
        a = jnp.reshape(a, (*(w_shape[d] for d in stored), r))
        a = jnp.transpose(a, [*map(int, np.argsort(stored)), len(stored)])
        return jnp.reshape(a, shape)

    return one(key) if stack is None else jax.vmap(one)(jax.random.split(key, stack))


def _magnitude(path: Path, w: Any, axes: Axes, shape: Shape) -> jax.Array:
    """Returns |W|, the norm over the inputs, for each output."""
    norm = input_norms(w, axes.inputs)
    if not is_traced(norm) and (zero := int(jnp.sum(norm == 0))):
        warn_user(
            f"{zero} outputs of {path_name(path)!r} have only zero weights and so no "
            "direction: DoRA leaves them zero. Write dora=False, or "
            f"exclude=[{path_name(path)!r}]."
        )
    return jnp.reshape(norm, shape)
