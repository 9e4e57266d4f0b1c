"""The programs of the JAX engine at the largest shapes that a run gives them, lowered but not compiled: for `plan/`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ..parallel import replicated, rows_sharding
from .decoding import CHUNK, Cache
from .engine import Sampling
from .jax_engine import BUCKET, ROOM, JaxEngine, prompts_of_rows, round_up
from .sampling import Rule

Tree = Any


def lower_largest(
    engine: JaxEngine, variables: Tree, *, num_prompts: int, longest_prompt: int, sampling: Sampling
) -> dict[str, jax.stages.Lowered]:
    """`unstack`, `begin`, `lengthen` (where the cache grows) and `decode` by name.

    `variables` are the shapes and shardings of what `update_weights` takes; no array is made.
    """
    programs, mesh = engine.programs, engine.mesh
    unstack = programs.unstack.lower(variables)
    weights = _outputs(unstack)
    owner = engine.deal(np.arange(min(num_prompts * sampling.n, engine.max_num_seqs)), sampling.n)
    sequences, prompts = owner.size, prompts_of_rows(owner, sampling.n)[0].size
    T = engine.prompt_columns(longest_prompt)
    at_once = engine.prompts_at_once(prompts, T)

    def by_rows(*shape: int, dtype: Any, axis: int = 0) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows_sharding(mesh, axis))

    def whole(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))

    rule = jax.tree.map(whole, Rule.of(sampling))
    longest = round_up(sampling.max_tokens, BUCKET)
    begin = programs.begin.lower(
        weights,
        by_rows(prompts // at_once, at_once, T, dtype=np.int32, axis=1),
        by_rows(prompts // at_once, at_once, dtype=np.int32, axis=1),
        by_rows(sequences, dtype=np.int32),
        by_rows(sequences, 2, dtype=np.uint32),
        by_rows(sequences, dtype=np.bool_),
        np.uint32(0), rule, room=min(ROOM, longest),
    )  # fmt: skip
    lowered = {"unstack": unstack, "begin": begin}
    batch, cache = _outputs(begin)
    if longest > ROOM:
        before = ROOM
        while 2 * before < longest:
            before *= 2
        lowered["lengthen"] = programs.lengthen.lower(_with_columns(cache, T + before), columns=T + longest)
        cache = _with_columns(cache, T + longest)
    lowered["decode"] = programs.decode.lower(weights, batch, cache, rule, T, 1, CHUNK, 0)
    return lowered


def _outputs(lowered: jax.stages.Lowered) -> Tree:
    """Shapes and shardings of what a program gives back."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), lowered.out_info)


def _with_columns(cache: Cache, columns: int) -> Tree:
    """Keys [B K H C] and values [B K C H] of so many columns."""

    def one(x: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)

    return [(one(k, (*k.shape[:3], columns)), one(v, (*v.shape[:2], columns, v.shape[3]))) for k, v in cache]
