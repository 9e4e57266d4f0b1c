"""Top-k and top-p: which tokens a truncated distribution keeps.

An engine draws from what is kept, q(token) = p(token) / mass, and its logprobs are those of q. The trainer's are of p,
the whole distribution; the log of the mass, which `logprobs.target_logprobs` gives beside them, is the difference.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, UInt32


def keep(logits: Float[Array, "*B V"], top_k: ArrayLike, top_p: ArrayLike) -> Float[Array, "*B V"]:
    """-inf outside of what top-k and then top-p keep; -1 and 1 keep all, and are not searched for."""
    logits = jax.lax.cond(jnp.greater(top_k, 0), keep_top_k, lambda x, _: x, logits, top_k)
    return jax.lax.cond(jnp.less(top_p, 1), keep_top_p, lambda x, _: x, logits, top_p)


def keep_with(
    ids: Int[Array, "*B"], logits: Float[Array, "*B V"], top_k: ArrayLike, top_p: ArrayLike
) -> Float[Array, "*B V"]:
    """The same, and the ids count as kept: they were drawn, and a trainer whose logits are rounded otherwise, or have
    moved on since, must not find them impossible."""
    return jnp.where(jnp.arange(logits.shape[-1]) == ids[..., None], logits, keep(logits, top_k, top_p))


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
