"""One token from logits, and the logprob of the distribution that it was drawn from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .engine import Sampling

BLOCK = 256


def sample(
    logits: Float[Array, "B V"], uniform: Float[Array, "B"], sampling: Sampling
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Token ids and their logprobs. `uniform` in [0, 1) decides; greedy logprobs are those at temperature 1."""
    logits = logits.astype(jnp.float32)
    if sampling.temperature == 0:
        logprobs = jax.nn.log_softmax(logits)
        ids = jnp.argmax(logits, axis=-1)
    else:
        logits = truncate(logits / sampling.temperature, sampling.top_k, sampling.top_p)
        logprobs = jax.nn.log_softmax(logits)
        ids = inverse_cdf(jnp.exp(logprobs), uniform)
    return ids.astype(jnp.int32), jnp.take_along_axis(logprobs, ids[:, None], axis=1)[:, 0]


def truncate(logits: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
    """-inf outside the `top_k` likeliest tokens and outside the fewest likeliest that hold `top_p` of the mass."""
    if top_k <= 0 and top_p >= 1.0:
        return logits
    k = top_k if top_k > 0 else logits.shape[1]
    best, _ = jax.lax.top_k(logits, min(k, logits.shape[1]))  # descending
    keep = jnp.ones(best.shape, bool)
    if top_p < 1.0:
        mass = jax.nn.softmax(best)
        keep = jnp.cumsum(mass, axis=-1) - mass < top_p
    lowest = jnp.min(jnp.where(keep, best, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def inverse_cdf(probs: Float[Array, "B V"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """The token in whose stretch of the cumulative distribution `uniform` falls: one random number a draw.

    In two levels, blocks and then words: a running sum over the whole vocabulary is the slowest part of sampling.
    """
    B, V = probs.shape
    blocks = jnp.pad(probs, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    block_ends = jnp.cumsum(blocks.sum(axis=-1), axis=-1)
    # Below the rounded total, so that the draw always lands on a word of positive probability.
    aim = (uniform * block_ends[:, -1])[:, None]
    block = jnp.minimum((block_ends <= aim).sum(axis=-1), blocks.shape[1] - 1)
    before = jnp.where(block > 0, jnp.take_along_axis(block_ends, jnp.maximum(block - 1, 0)[:, None], axis=1)[:, 0], 0)
    words = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    ends = before[:, None] + jnp.cumsum(words, axis=-1)
    last = BLOCK - 1 - jnp.argmax((words > 0)[:, ::-1], axis=-1)  # rounding may carry the aim past the block's end
    word = jnp.minimum((ends <= aim).sum(axis=-1), last)
    return block * BLOCK + word
