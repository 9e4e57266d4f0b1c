"""The device mesh, and what the words on weights and activations mean on it.

Three axes: `data` (replicas of the model, the axis that may cross slow links), `fsdp` (parameters and batch are split
along it), `tensor` (heads, mlp and vocabulary are split along it). Rows of a batch are split over `data` and `fsdp`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Tree = Any
MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis of a weight or activation -> mesh axes. A logical axis that is not here is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),
    "tokens": ("tensor",),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "expert": ("tensor",),
    "mlp": ("tensor",),
    "packed_rows": ("fsdp", "tensor"),  # of a matrix in 4 bits: a row holds whole blocks
}


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `data` x `fsdp` x `tensor` devices; one of the three may be -1: whatever is left."""
    devices = list(jax.devices() if devices is None else devices)
    shape = [data, fsdp, tensor]
    if any(n < 1 and n != -1 for n in shape):
        raise ValueError(f"mesh {data}x{fsdp}x{tensor}: an axis counts devices, 1 or more, or is -1: whatever is left")
    if shape.count(-1) > 1:
        raise ValueError(f"mesh {data}x{fsdp}x{tensor}: only one axis may be -1")
    if -1 in shape:
        known = int(np.prod([n for n in shape if n != -1]))
        if len(devices) % known:
            raise ValueError(f"mesh {data}x{fsdp}x{tensor}: {known} does not divide the {len(devices)} devices")
        shape[shape.index(-1)] = len(devices) // known
    wanted = int(np.prod(shape))
    if wanted > len(devices):
        raise ValueError(
            f"mesh {shape[0]}x{shape[1]}x{shape[2]} needs {wanted} devices and there are {len(devices)}: "
            "set mesh.data, mesh.fsdp and mesh.tensor to a product of at most that"
        )
    if wanted < len(devices) and len({device.process_index for device in devices}) > 1:
        raise ValueError(
            f"mesh {shape[0]}x{shape[1]}x{shape[2]} takes {wanted} of the {len(devices)} devices, and of several processes "
            "each must take part with all of its own: raise mesh.data, or set one axis to -1"
        )
    return Mesh(_arranged(shape, devices[:wanted]), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _arranged(shape: list[int], devices: list[Any]) -> np.ndarray:
    """Devices [data, fsdp, tensor] so that neighbours are near; of several slices of TPUs, each has replicas of its own."""
    slices = Counter(d.slice_index for d in devices if d.platform == "tpu" and hasattr(d, "slice_index"))
    # On a torus of TPUs an axis of the mesh may be a part of a physical axis.
    if len(slices) < 2:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, fsdp, tensor = shape
    if data % len(slices) or len(set(slices.values())) > 1:
        raise ValueError(
            f"mesh {data}x{fsdp}x{tensor} is on {len(slices)} slices of TPUs of {', '.join(map(str, slices.values()))} "
            f"chips, between which only replicas may lie: set mesh.data to a multiple of {len(slices)} and take all chips"
        )
    within = [data // len(slices), fsdp, tensor]
    return mesh_utils.create_hybrid_device_mesh(within, [len(slices), 1, 1], devices, allow_split_physical_axes=True)


def mesh_of_role(mesh: Mesh, data: int, fsdp: int, tensor: int, key: str) -> Mesh:
    """The devices of a mesh, all of them, in a shape that a role has to itself. `key` names the setting in an error."""
    try:
        own = make_mesh(data, fsdp, tensor, devices=list(mesh.devices.flat))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    if own.size != mesh.size:
        raise ValueError(
            f"{key} {data}x{fsdp}x{tensor} takes {own.size} of the {mesh.size} devices, and the roles take turns on all of "
            "them: set one axis to -1"
        )
    return own


def generation_mesh(mesh: Mesh, tensor: int | None) -> Mesh:
    """The devices of a mesh in the layout of generation: `tensor` ways, and as many replicas; None: as they are.

    The devices keep their order, so that one compiled program can move weights from one layout to the other.
    """
    if tensor is None or tensor == mesh.shape["tensor"]:
        return mesh
    if mesh.size % tensor:
        raise ValueError(
            f"rollout.tensor_model_parallel_size {tensor} does not divide the {mesh.size} devices of the mesh: set one of "
            f"{', '.join(str(n) for n in range(1, mesh.size + 1) if mesh.size % n == 0)}"
        )
    devices = mesh.devices.reshape(mesh.size // tensor, 1, tensor)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Within it, the axis words in `models/` mean this mesh."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(list(RULES.items())):
        yield


class Program:
    """A compiled function in which the axis words of the model mean `mesh`."""

    def __init__(self, mesh: Mesh, function: Callable, **kwargs: Any):
        self.mesh, self.jitted = mesh, jax.jit(function, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with use_mesh(self.mesh):
            return self.jitted(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """The program for arguments of these shapes and shardings (`jax.ShapeDtypeStruct`), not yet compiled."""
        with use_mesh(self.mesh):
            return self.jitted.lower(*args, **kwargs)


@contextmanager
def within_replica() -> Iterator[None]:
    """Within it, the axis words leave `data` alone: a program that is cut along it by hand."""
    rules = {name: tuple(axis for axis in axes if axis != "data") for name, axes in RULES.items()}
    with nn.logical_axis_rules(list(rules.items())):
        yield


def partition(mesh: Mesh | AbstractMesh, axes: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """The split of one array; a dimension that its mesh axes do not divide is replicated (here and nowhere else).

    A mesh axis splits one dimension of an array, the first that it can: experts, or else what is inside each of them.
    """
    spec, used = [], set()
    for name, size in zip(axes, shape, strict=True):
        names = RULES.get(name, ()) if name else ()
        ways = int(np.prod([mesh.shape[n] for n in names]))
        splits = bool(names) and size % ways == 0 and used.isdisjoint(names)
        spec.append(names if splits else None)
        used.update(names if splits else ())
    return PartitionSpec(*spec)


def shardings(mesh: Mesh, abstract: Tree, axes: Tree) -> Tree:
    """NamedSharding of every array of a tree, from its shape and the names of its axes."""

    def one(leaf: jax.ShapeDtypeStruct, names: PartitionSpec) -> NamedSharding:
        words: tuple[Any, ...] = (*names, *(None,) * (leaf.ndim - len(names)))
        return NamedSharding(mesh, partition(mesh, words, leaf.shape))

    return jax.tree.map(one, abstract, axes)


def with_shardings(mesh: Mesh, abstract: Tree, axes: Tree) -> Tree:
    """The same shapes, each knowing where it will live: what loaders fill."""

    def one(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, abstract, shardings(mesh, abstract, axes))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def rows_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """For arrays whose dimension `axis` is packed rows, parts of them, or sequences."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, RULES["rows"]))


def num_row_shards(mesh: Mesh) -> int:
    """How many ways rows are split: a batch has a multiple of this many."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def put_rows(mesh: Mesh, tree: Tree, axis: int = 0) -> Tree:
    """Host arrays, the same on every process, to the devices, split by rows."""
    sharding = rows_sharding(mesh, axis)

    def one(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def put_replicated(mesh: Mesh, tree: Tree) -> Tree:
    sharding = replicated(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda i: np.asarray(x)[i]), tree)


def fetch(tree: Tree) -> Tree:
    """Device arrays to host numpy arrays, whole, on every process."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)
    return jax.device_get(tree)
