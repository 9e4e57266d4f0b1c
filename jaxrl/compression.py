"""Gradients summed over the mesh axis `data` in fewer bytes: that axis may be the slow one, between hosts.

They are added up over all micro-batches first and travel once an update, where the compiler would send every
micro-batch's. What the other axes sum stays in float32. `update.py` hands over the gradient of each replica and gets
back their sum.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, UInt16

Tree = Any


def sum_over_replicas(
    mesh: Mesh, method: str, grads: Tree, specs: Tree, residual: Tree, *, kept: float
) -> tuple[Tree, Tree]:
    """The sum of `grads` [data, ...] over replicas, and what was not sent.

    `specs` are the partition specs of the parameters. `fp32` sends numbers as they are; `bf16` and `fp16` send halves
    of them and add in float32.
    `topk` sends of each device's part the share `kept` that is largest, and keeps the rest in `residual`
    [data, ...] for the next time (error feedback, arXiv:1809.07599); the others have no residual.
    """
    stacked = jax.tree.map(lambda spec: PartitionSpec("data", *spec), specs, is_leaf=_is_spec)

    def local(grads: Tree, residual: Tree) -> tuple[Tree, Tree]:
        flat, treedef = jax.tree.flatten(grads)
        if method == "fp32":
            return treedef.unflatten([jax.lax.psum(g[0], "data") for g in flat]), residual
        if method in HALVES:
            return treedef.unflatten([_halved(method, g[0]) for g in flat]), residual
        pairs = [_largest(g[0] + r[0], kept) for g, r in zip(flat, treedef.flatten_up_to(residual), strict=True)]
        return treedef.unflatten([g for g, _ in pairs]), treedef.unflatten([r[None] for _, r in pairs])

    left = stacked if method == "topk" else PartitionSpec()
    run = jax.shard_map(local, mesh=mesh, in_specs=(stacked, left), out_specs=(specs, left), check_vma=False)
    return run(grads, residual)


def abstract_residual(mesh: Mesh, method: str, trained: Tree) -> Tree:
    """Shapes and shardings of the residual: one a replica with `topk`, else nothing."""
    if method != "topk":
        return ()

    def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("data", *x.sharding.spec))
        return jax.ShapeDtypeStruct((mesh.shape["data"], *x.shape), jnp.float32, sharding=sharding)

    return jax.tree.map(one, trained)


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _halved(method: str, g: Float[Array, "..."]) -> Float[Array, "..."]:
    """A ring's all-reduce written out, so that 16 bits travel and float32 adds: each device sums a part, then shares it."""
    dtype, replicas = HALVES[method], jax.lax.axis_size("data")
    scale = jnp.float32(1.0)
    if dtype == jnp.float16:  # its range is short: the largest of all becomes 1
        largest = jax.lax.pmax(jnp.max(jnp.abs(g)), "data")
        scale = jnp.where(largest > 0, largest, 1.0)
    width = -(-g.size // replicas)
    parts = jnp.pad((g / scale).reshape(-1), (0, width * replicas - g.size)).reshape(replicas, width)
    arrived = jax.lax.all_to_all(_bits(parts, dtype), "data", 0, 0, tiled=True)
    mine = _numbers(arrived, dtype).sum(axis=0) / replicas  # the mean: within the range of float16
    shared = jax.lax.all_gather(_bits(mine, dtype), "data")
    return (_numbers(shared, dtype).reshape(-1)[: g.size] * (scale * replicas)).reshape(g.shape)


def _bits(x: Float[Array, "..."], dtype: Any) -> UInt16[Array, "..."]:
    """As whole numbers: XLA would widen 16-bit floats on their way on a CPU."""
    return jax.lax.bitcast_convert_type(x.astype(dtype), jnp.uint16)


def _numbers(bits: UInt16[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    return jax.lax.bitcast_convert_type(bits, dtype).astype(jnp.float32)


def _largest(g: Float[Array, "..."], kept: float) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The sum over replicas of what each sends, and what this one keeps back."""
    flat = g.reshape(-1)
    _, chosen = jax.lax.top_k(jnp.abs(flat), max(1, math.ceil(kept * g.size)))
    values, places = (jax.lax.all_gather(x, "data").reshape(-1) for x in (flat[chosen], chosen))
    total = jnp.zeros_like(flat).at[places].add(values)
    return total.reshape(g.shape), flat.at[chosen].set(0.0).reshape(g.shape)


HALVES = {"bf16": jnp.bfloat16, "fp16": jnp.float16}
