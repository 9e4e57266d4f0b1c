"""Top-k and top-p: which tokens a truncated distribution keeps, and how much of the whole one that is.

An engine draws from what is kept, q(token) = p(token) / mass, and its logprobs are those of q. The trainer's are of p,
the whole distribution; `log_kept_mass` is the difference, with its gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from .logprobs import chunk_slots, logits_of, platform_of_mesh

NO_TOP_K = 2**31 - 1  # more than any vocabulary has


def log_kept_mass(
    hidden: Float[Array, "W T D"],
    table: Float[Array, "V D"],
    columns: Int[Array, "W S"],
    ids: Int[Array, "W S"],
    num_slots: Int[Array, ""],
    *,
    temperature: float | Array,
    top_k: int | Array,
    top_p: float | Array,
    bias: Float[Array, "V"] | None = None,
    softcap: float = 0.0,
    chunk: int | None = None,
) -> Float[Array, "W S"]:
    """log of the mass, under softmax(logits / temperature), of the tokens that top-k and then top-p keep.

    log p(id) minus this is the logprob in the truncated distribution. The chosen id counts as kept: it was drawn, and a
    trainer whose logits are rounded otherwise, or have moved on since, must not find it impossible. Arguments as of
    `logprobs.target_logprobs`; `top_k=-1` and `top_p=1` keep all. Which tokens are kept has no gradient.
    """
    W, S = ids.shape
    chunk = chunk or chunk_slots(W, S, platform_of_mesh())
    padded = -(-S // chunk) * chunk
    columns, ids = (jnp.pad(x, ((0, 0), (0, padded - S))) for x in (columns, ids))
    table = nn.with_logical_constraint(table.astype(hidden.dtype), ("vocab", None))
    top_k = jnp.where(jnp.asarray(top_k) > 0, top_k, NO_TOP_K)

    def of_chunk(i: Array) -> Float[Array, "W C"]:
        column, token = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1) for x in (columns, ids))
        logits = logits_of(jnp.take_along_axis(hidden, column[..., None], axis=1), table, bias, softcap) / temperature
        fixed = jax.lax.stop_gradient(logits)
        kept = jnp.isfinite(keep_top_p(keep_top_k(fixed, top_k), jnp.asarray(top_p, jnp.float32)))
        kept |= jnp.arange(table.shape[0]) == token[..., None]
        inside = jnp.where(kept, logits, -1e30)  # not -inf, whose gradient is nan
        return jax.nn.logsumexp(inside, axis=-1) - jax.nn.logsumexp(logits, axis=-1)

    @jax.checkpoint
    def step(_: None, i: Array) -> tuple[None, Float[Array, "W C"]]:
        zeros = jnp.zeros((W, chunk), jnp.float32)
        return None, jax.lax.cond(i * chunk < num_slots, of_chunk, lambda i: zeros, i)

    _, mass = jax.lax.scan(step, None, jnp.arange(padded // chunk))
    return mass.swapaxes(0, 1).reshape(W, padded)[:, :S]


def keep_top_k(logits: Float[Array, "*B V"], k: Int[Array, ""]) -> Float[Array, "*B V"]:
    """-inf outside the `k` likeliest tokens; tokens as likely as the last of them stay too."""
    ranks = _ranks(logits)
    lowest = _largest_threshold(ranks, lambda kept: kept.sum(axis=-1) >= k)
    return jnp.where(ranks >= lowest[..., None], logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "*B V"], p: Float[Array, ""]) -> Float[Array, "*B V"]:
    """-inf outside the fewest likeliest tokens that hold the mass `p` (nucleus sampling, arXiv:1904.09751)."""
    ranks, probs = _ranks(logits), jax.nn.softmax(logits)
    lowest = _largest_threshold(ranks, lambda kept: jnp.where(kept, probs, 0.0).sum(axis=-1) >= p)
    return jnp.where(ranks >= lowest[..., None], logits, -jnp.inf)


def _ranks(x: Float[Array, "*B V"]) -> UInt32[Array, "*B V"]:
    """Whole numbers in the order of the floats: their bits, with the negative ones turned round."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _largest_threshold(
    ranks: UInt32[Array, "*B V"], enough: Callable[[Bool[Array, "*B V"]], Bool[Array, "*B"]]
) -> UInt32[Array, "*B"]:
    """The largest t for which `enough(ranks >= t)`, found bit by bit: 32 passes where a sort is many times slower."""

    def body(i, t):
        higher = t | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(ranks >= higher[..., None]), higher, t)

    return jax.lax.fori_loop(0, 32, body, jnp.zeros(ranks.shape[:-1], jnp.uint32))
