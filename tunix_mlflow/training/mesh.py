"""The device mesh: axis `data` replicates the parameters, axis `fsdp` shards them.

With the parameters, gradients and optimizer state are sharded (Rajbhandari et al. 2020, ZeRO). Both
axes split the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tunix_mlflow.config.schema import MeshConfig

ROWS = PartitionSpec(("data", "fsdp"))
"""The partition of a batch."""
_T = TypeVar("_T")


def build(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh | None:
    """Return a mesh of the first devices; None for one device, which needs no mesh."""
    if config.size == 1:
        return None
    grid = np.asarray(devices[: config.size]).reshape(config.data, config.fsdp)
    return Mesh(grid, ("data", "fsdp"))


def specs(tree: _T, mesh: Mesh) -> _T:
    """Return the partition of each array of a tree: along its longest axis that `fsdp` divides.

    It depends on the shape alone, so parameters, gradients and moments are partitioned alike.
    """
    partitions: _T = jax.tree.map(lambda leaf: _spec(leaf.shape, mesh.shape["fsdp"]), tree)
    return partitions


def shardings(tree: _T, mesh: Mesh) -> _T:
    """Return the same as shardings, for jit and device_put."""
    named: _T = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh))
    return named


def device_index(mesh: Mesh) -> jax.Array:
    """Return, inside shard_map, the index of this device, from 0."""
    index: jax.Array = jax.lax.axis_index("data") * mesh.shape["fsdp"] + jax.lax.axis_index("fsdp")
    return index


def gathered(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Return, inside shard_map, the whole array from this device's shard."""
    axis = _axis(spec)
    if axis is not None:
        leaf = jax.lax.all_gather(leaf, "fsdp", axis=axis, tiled=True)
    return leaf


def reduced(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Return, inside shard_map, this device's shard of the sum over all devices."""
    axis = _axis(spec)
    if axis is None:
        leaf = jax.lax.psum(leaf, ("data", "fsdp"))
        return leaf
    leaf = jax.lax.psum_scatter(leaf, "fsdp", scatter_dimension=axis, tiled=True)
    if jax.lax.axis_size("data") > 1:
        leaf = jax.lax.psum(leaf, "data")
    return leaf


def _axis(spec: PartitionSpec) -> int | None:
    return next((axis for axis, name in enumerate(spec) if name == "fsdp"), None)


def _spec(shape: tuple[int, ...], parts: int) -> PartitionSpec:
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not axes:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*("fsdp" if axis == longest else None for axis in range(len(shape))))
