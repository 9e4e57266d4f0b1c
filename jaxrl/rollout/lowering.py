"""The programs of the JAX engine at the largest shapes that a run gives them, lowered but not compiled: for `plan/`."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from ..parallel import replicated, rows_sharding
from .decoding import CHUNK, Cache
from .engine import Sampling
from .jax_engine import ROOM, JaxEngine, Largest
from .sampling import Rule

Tree = Any


def lower_unstack(engine: JaxEngine, variables: Tree) -> jax.stages.Lowered:
    """What `update_weights` runs on `variables` of these shapes and shardings. Its output are the engine's weights."""
    return engine.programs.unstack.lower(variables)


def lower_largest(
    engine: JaxEngine, weights: Tree, largest: Largest, sampling: Sampling
) -> dict[str, jax.stages.Lowered]:
    """`begin`, `lengthen` (where the cache grows), `keep` (where the batch shrinks) and `decode` by name.

    `weights` are the shapes and shardings of what `unstack` gives back; no array is made.
    """
    programs, mesh = engine.programs, engine.mesh
    prompts, at_once, T, sequences, longest = largest

    def by_rows(*shape: int, dtype: Any, axis: int = 0) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows_sharding(mesh, axis))

    def whole(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))

    rule = jax.tree.map(whole, Rule.of(sampling))
    begin = programs.begin.lower(
        weights,
        by_rows(prompts // at_once, at_once, T, dtype=np.int32, axis=1),
        by_rows(prompts // at_once, at_once, dtype=np.int32, axis=1),
        by_rows(sequences, dtype=np.int32),
        by_rows(sequences, 2, dtype=np.uint32),
        by_rows(sequences, dtype=np.bool_),
        np.uint32(0), rule, room=min(ROOM, longest),
    )  # fmt: skip
    lowered = {"begin": begin}
    batch, cache = outputs(begin)
    if longest > ROOM:
        before = ROOM
        while 2 * before < longest:
            before *= 2
        lowered["lengthen"] = programs.lengthen.lower(_with_columns(cache, T + before), columns=T + longest)
        cache = _with_columns(cache, T + longest)
    if smaller := engine.smaller(sequences, sequences):
        lowered["keep"] = programs.keep.lower(batch, cache, by_rows(smaller, dtype=np.int32))
    lowered["decode"] = programs.decode.lower(weights, batch, cache, rule, T, 1, CHUNK, 0)
    return lowered


def cache_bytes(engine: JaxEngine, largest: Largest) -> int:
    """Of keys and values on one device, when the cache of the largest batch is longest."""
    c = engine.config
    shape = largest.sequences, c.num_kv_heads, largest.columns, c.head_dim
    held = math.prod(engine.programs.heads.shard_shape(shape))
    return 2 * c.num_layers * held * jax.numpy.dtype(c.compute_dtype).itemsize


def outputs(lowered: jax.stages.Lowered) -> Tree:
    """Shapes and shardings of what a program gives back."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), lowered.out_info)


def _with_columns(cache: Cache, columns: int) -> Tree:
    """Keys [B K H C] and values [B K C H] of so many columns."""

    def one(x: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)

    return [(one(k, (*k.shape[:3], columns)), one(v, (*v.shape[:2], columns, v.shape[3]))) for k, v in cache]
