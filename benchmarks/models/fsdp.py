"""Fully sharded data parallelism: weights and batches split over all devices."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def distribute(params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Splits each kernel and embedding over a mesh of one axis, as shapes.

    All other leaves are replicated.
    """
    (axis,) = mesh.axis_names

    def shard(path, x):
        names = [None] * x.ndim
        # Stacked layers are not split along the stack, so that each layer is gathered
        # in its own loop iteration. Embeddings are not split along tokens, because
        # XLA would then sum each lookup over the devices.
        first = x.ndim - 1 if path[-1].key == "embedding" else path[0].key == "blocks"
        even = [d for d in range(first, x.ndim) if x.shape[d] % mesh.size == 0]
        if path[-1].key in ("kernel", "embedding") and even:
            names[max(even, key=lambda d: x.shape[d])] = axis
        place = NamedSharding(mesh, PartitionSpec(*names))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree_util.tree_map_with_path(shard, params)


def by_batch(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Returns a function that splits activations by examples, if they divide evenly."""
    place = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))

    def keep(x: jax.Array) -> jax.Array:
        even = x.shape[0] % mesh.size == 0
        return jax.lax.with_sharding_constraint(x, place) if even else x

    return keep
