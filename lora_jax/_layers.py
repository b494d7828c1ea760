"""Drop-in `flax.linen` layers that use the adapters in their own parameters.

Each one calls Flax's own layer under `lora`, so it keeps every option of that layer.
Without adapters it only calls Flax's own layer. A layer uses no adapters of other
layers in a model; `lora(model.apply)` uses all of them.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from lora_jax._adapters import FACTORS, MAGNITUDE, Axes, is_adapter
from lora_jax._engine.quantized import is_quantized
from lora_jax._lora import lora
from lora_jax._lorafy import lorafy
from lora_jax._tree import unbox


class Dense(nn.Dense):
    """Applies `flax.linen.Dense` with an adapter: y = x W + b + scale * (x A) B.

    It uses the adapters, trained copies and quantized weights in its own parameters,
    whether from `init`, `lorafy`, `quantize` or `load`. Flax's own layers in the same
    model silently ignore theirs: if those have any, for example by `lorafy(also=...)`,
    call the model as `lora(model.apply)`.

    Attributes:
      rank: If given, `init` creates `lora_a` (in, rank), `lora_b` (rank, features),
        zero at the start, and `lora_scale` () next to the kernel.
      alpha: The update is scaled by alpha / rank. Default: the rank.
      rslora: Scale by alpha / sqrt(rank) instead.
      dora: Also train a magnitude of each output, `lora_magnitude` (features,), as in
        `lorafy`.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj
      >>> layer, x = lj.Dense(3, rank=2), jnp.ones((5, 4))
      >>> params = layer.init(jax.random.key(0), x)["params"]
      >>> params["lora_a"].shape, layer.apply({"params": params}, x).shape
      ((4, 2), (5, 3))

    Reference:
      Hu et al., "LoRA", 2021. https://arxiv.org/abs/2106.09685
    """

    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    dora: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        if not _is_plain(self):
            return _adapted(self, nn.Dense, "__call__", inputs)
        y = super().__call__(inputs)
        _create(self, Axes((), (0,), (1,)))
        return y


class DenseGeneral(nn.DenseGeneral):
    """Applies `flax.linen.DenseGeneral` with an adapter; attributes as `Dense`.

    `lora_a` has shape (batch..., in..., rank), `lora_b` (batch..., rank, out...) and
    `lora_scale` (batch...), according to `batch_dims`, `axis` and `features`.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj
      >>> layer, x = lj.DenseGeneral((2, 3), rank=2), jnp.ones((5, 4))
      >>> layer.init(jax.random.key(0), x)["params"]["lora_b"].shape
      (2, 2, 3)
    """

    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    dora: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        if not _is_plain(self):
            return _adapted(self, nn.DenseGeneral, "__call__", inputs)
        y = super().__call__(inputs)
        n_batch, n_out = _length(self.batch_dims), _length(self.features)
        n_in = _length(self.axis)
        dims = tuple(range(n_batch + n_in + n_out))
        inner = n_batch + n_in
        _create(self, Axes(dims[:n_batch], dims[n_batch:inner], dims[inner:]))
        return y


class Embed(nn.Embed):
    """Applies `flax.linen.Embed` with an adapter, in lookups and in `attend`.

    `lora_a` has shape (num_embeddings, rank), `lora_b` (rank, features). A lookup
    gathers rows of `lora_a`. Attributes as `Dense`.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj
      >>> layer, ids = lj.Embed(10, 4, rank=2), jnp.array([1, 7])
      >>> variables = layer.init(jax.random.key(0), ids)
      >>> layer.apply(variables, jnp.ones((5, 4)), method="attend").shape
      (5, 10)
    """

    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    dora: bool = False

    def setup(self) -> None:
        super().setup()
        _create(self, Axes((), (0,), (1,)), "embedding")

    def __call__(self, inputs: jax.Array) -> jax.Array:
        if not _is_plain(self):
            return _adapted(self, nn.Embed, "__call__", inputs)
        return super().__call__(inputs)

    def attend(self, query: jax.Array) -> jax.Array:
        if not _is_plain(self):
            return _adapted(self, nn.Embed, "attend", query)
        return super().attend(query)


class Conv(nn.Conv):
    """Applies `flax.linen.Conv` with an adapter; attributes as `Dense`.

    `lora_a` is a convolution to `rank` channels, of shape (window..., in, rank), and
    `lora_b` (rank, features) mixes them at each position.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj
      >>> layer, x = lj.Conv(6, (3, 3), rank=2), jnp.ones((1, 8, 8, 3))
      >>> layer.init(jax.random.key(0), x)["params"]["lora_a"].shape
      (3, 3, 3, 2)
    """

    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    dora: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        if not _is_plain(self):
            return _adapted(self, nn.Conv, "__call__", inputs)
        y = super().__call__(inputs)
        n = _length(self.kernel_size)
        _create(self, Axes((), tuple(range(n + 1)), (n + 1,)))
        return y


class Einsum(nn.Einsum):
    """Applies `flax.linen.Einsum` with an adapter; attributes as `Dense`.

    The equation determines the axes of the kernel: dimensions that are only in the
    result are outputs, those in the input and the result a batch, the others inputs.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lj
      >>> layer = lj.Einsum((3, 4, 5), "btd,ndh->btnh", use_bias=False, rank=2)
      >>> layer.init(jax.random.key(0), jnp.ones((1, 2, 4)))["params"]["lora_a"].shape
      (1, 4, 1, 2)
    """

    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    dora: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array, einsum_str: str | None = None) -> jax.Array:
        if not _is_plain(self):
            return _adapted(self, nn.Einsum, "__call__", inputs, einsum_str)
        y = super().__call__(inputs, einsum_str)
        equation = einsum_str or self.einsum_str
        assert equation is not None, "Flax has checked it"
        operands, result = equation.replace(" ", "").split("->")
        x, kernel = operands.split(",")
        kinds = [(n in x, n in result) for n in kernel]
        batch = tuple(d for d, kind in enumerate(kinds) if kind == (True, True))
        outputs = tuple(d for d, kind in enumerate(kinds) if kind == (False, True))
        inputs_ = tuple(d for d, (_, kept) in enumerate(kinds) if not kept)
        _create(self, Axes(batch, inputs_, outputs))
        return y


def _has_adapter(layer: nn.Module) -> bool:
    """Whether the layer has an adapter or a trained copy."""
    return any(is_adapter((name,)) for name in layer.variables.get("params", ()))


def _is_plain(layer: nn.Module) -> bool:
    """Whether the layer has no adapter and no quantized weight."""
    leaves = layer.variables.get("params", {}).values()
    return not (_has_adapter(layer) or any(is_quantized(unbox(x)) for x in leaves))


def _create(layer: nn.Module, axes: Axes, name: str = "kernel") -> None:
    """Creates the adapter's leaves during `init`."""
    if layer.rank is None or _has_adapter(layer) or not layer.is_initializing():
        return
    adapted = lorafy(
        {name: layer.variables["params"][name]},
        layer.rank,
        alpha=layer.alpha,
        targets=name,
        axes={name: axes},
        rslora=layer.rslora,
        dora=layer.dora,
        key=layer.make_rng("params"),
    )
    for part in (*FACTORS, MAGNITUDE)[: 3 + layer.dora]:
        layer.param(part, lambda _, part=part: adapted[part])


def _adapted(layer: nn.Module, plain: type, method: str, *args: Any) -> jax.Array:
    """Calls Flax's own layer, with the same options, under `lora`."""
    names = {f.name for f in dataclasses.fields(plain) if f.init} - {"parent", "name"}
    fields = {name: getattr(layer, name) for name in names}
    apply = lora(plain(**fields, parent=None).apply)
    return apply({"params": layer.variables["params"]}, *args, method=method)


def _length(dims: Any) -> int:
    return 1 if isinstance(dims, int) else len(dims)
