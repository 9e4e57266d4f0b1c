"""One token from logits, and the logprob of the distribution that it was drawn from.

The settings are arrays, not constants: another temperature or another top-p is not another compiled program.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..models.truncation import keep
from .engine import Sampling

BLOCK = 256  # words of a block of the vocabulary


class Rule(NamedTuple):
    """`Sampling` as the compiled programs take it."""

    temperature: Float[np.ndarray, ""]
    top_k: Int[np.ndarray, ""]
    top_p: Float[np.ndarray, ""]
    stop_ids: Int[np.ndarray, "stops"]  # filled up with -1 to a power of two

    @classmethod
    def of(cls, sampling: Sampling) -> Rule:
        stop_ids = np.full(1 << max(2, len(sampling.stop_ids) - 1).bit_length(), -1, np.int32)
        stop_ids[: len(sampling.stop_ids)] = sampling.stop_ids
        return cls(
            np.asarray(sampling.temperature, np.float32), np.asarray(sampling.top_k, np.int32),
            np.asarray(sampling.top_p, np.float32), stop_ids,
        )  # fmt: skip


def sample(
    logits: Float[Array, "B V"], uniform: Float[Array, "B"], rule: Rule
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Token ids and their logprobs. `uniform` in [0, 1) decides; greedy logprobs are those at temperature 1."""
    logits = logits.astype(jnp.float32)
    return jax.lax.cond(rule.temperature > 0, _draw, _most_likely, logits, uniform, rule)


def _draw(logits, uniform, rule: Rule):
    logits = keep(logits / rule.temperature, rule.top_k, rule.top_p)
    largest = logits.max(axis=-1)
    ids, mass = inverse_cdf(jnp.exp(logits - largest[:, None]), uniform)
    return ids, jnp.take_along_axis(logits, ids[:, None], axis=1)[:, 0] - largest - jnp.log(mass)


def _most_likely(logits, uniform, rule: Rule):
    del uniform, rule
    # The first of the largest. Two plain reductions: on a CPU they take a third of the time of an argmax.
    largest, words = logits.max(axis=-1), logits.shape[1]
    ids = jnp.where(logits == largest[:, None], jnp.arange(words, dtype=jnp.int32), words - 1).min(axis=-1)
    return ids, largest - jax.nn.logsumexp(logits, axis=-1)


def inverse_cdf(weights: Float[Array, "B V"], uniform: Float[Array, "B"]) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """The token in whose stretch of the running sum of `weights` `uniform` falls, and the whole sum: one random number
    a draw.

    In two levels, blocks and then words: a running sum over the whole vocabulary is the slowest part of sampling.
    """
    B, V = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    mass = blocks.sum(axis=-1)
    total = mass.sum(axis=-1)
    aim = uniform * total
    block, before = _pick(mass, aim)
    words = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    word, _ = _pick(words, aim - before)
    return block * BLOCK + word, total


def _pick(mass: Float[Array, "B X"], aim: Float[Array, "B"]) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """The first place whose running sum passes `aim`, and the sum before it. Never a place without mass: running sums
    are rounded, and a token of probability 0 has no logprob to train on."""
    ends = jnp.cumsum(mass, axis=-1)
    places = jnp.arange(mass.shape[1], dtype=jnp.int32)
    last = jnp.where(mass > 0, places, 0).max(axis=-1)
    place = jnp.where((ends > aim[:, None]) & (mass > 0), places, last[:, None]).min(axis=-1)
    before = jnp.take_along_axis(ends, jnp.maximum(place - 1, 0)[:, None], axis=1)[:, 0]
    return place, jnp.where(place > 0, before, 0.0)
