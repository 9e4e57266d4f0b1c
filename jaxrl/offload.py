"""Arrays that wait in the memory of the host (`pinned_host`), and their way to the device within a compiled program.

Where an array lies is a part of its sharding, and of its type under `jax.jit`: nothing here is told twice.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Tree = Any
Space = jax.memory.Space
HOST_KIND = "pinned_host"


def lies_on_host(x: Any) -> bool:
    """Whether an array of a program being traced lies in host memory."""
    return jax.typeof(x).memory_space == Space.Host


def to_device(tree: Tree) -> Tree:
    """Within a program: what lies in host memory comes to the device, the rest stays as it is."""
    return jax.tree.map(lambda x: jax.device_put(x, Space.Device) if lies_on_host(x) else x, tree)


def to_host(x: jax.Array) -> jax.Array:
    return jax.device_put(x, Space.Host)


def fetched(x: jax.Array | np.ndarray, place: tuple[int, ...]) -> Any:
    """Outside of programs: x[place] on the device, also of an array in host memory. `place` begins with the layer."""
    if isinstance(x, np.ndarray) or x.sharding.memory_kind != HOST_KIND:
        return x[place]
    assert isinstance(x.sharding, NamedSharding)
    layer = place[:1]  # of a dimension that no mesh axis splits
    parts = [jax.device_put(np.asarray(shard.data)[layer], shard.device) for shard in x.addressable_shards]
    sharding = NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[len(layer) :]))
    whole = jax.make_array_from_single_device_arrays(x.shape[len(layer) :], sharding, parts)
    return whole[place[1:]]


def waiting(abstract: Tree) -> Tree:
    """The same shapes and shardings, in host memory what `waits`."""

    def one(path: tuple, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not waits(path, x):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind(HOST_KIND))

    return jax.tree.map_with_path(one, abstract)


def waits(path: tuple, x: Any) -> bool:
    """Whether an array of a tree is worth moving: not scales and biases [L, D], which a TPU cannot slice by layer."""
    return x.ndim > (2 if by_layer(path) else 1)


def by_layer(path: tuple) -> bool:
    """Whether the array at a path of a tree of weights is [L, ...]: in `layers`, or in a run of them (`layers_0`)."""
    return any(str(getattr(entry, "key", "")).startswith("layers") for entry in path)
