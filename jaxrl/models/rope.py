"""Rotary position embedding (arXiv:2104.09864) and the rescalings of its frequencies for long contexts.

`dynamic` and `longrope` have frequencies that depend on a length. transformers takes the longest position of each batch,
so that a text means something else beside a longer one. Here, as in vLLM, it is one length for a whole run,
`ModelConfig.max_length`: training and generation agree, whatever is batched with what.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .config import Rope

Cossin = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]  # half of the features that are rotated


def rope_frequencies(rope: Rope, head_dim: int, length: int = 0) -> Float[Array, "half"]:
    """Inverse wavelengths of the rotary embedding, in radians a token, rescaled as the checkpoint asks."""
    dim = int(head_dim * rope.fraction)
    theta = rope.theta
    if rope.kind == "dynamic":  # the base grows with the length, as in the code of LLaMA's long-context users ("NTK")
        longest = max(length, rope.original_max_position)
        theta *= (rope.factor * longest / rope.original_max_position - (rope.factor - 1)) ** (dim / (dim - 2))
    frequencies = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        # Short wavelengths stay, long ones are divided by `factor`, between them it is interpolated (Llama 3.1, rope).
        turns = rope.original_max_position * frequencies / (2 * jnp.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = jnp.clip(blend, 0.0, 1.0)
        return frequencies * (blend + (1 - blend) / rope.factor)
    if rope.kind == "yarn":
        low, high = _yarn_range(rope, dim)
        blend = 1 - jnp.clip((jnp.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
        return frequencies * (blend + (1 - blend) / rope.factor)
    if rope.kind == "longrope":
        factors = rope.long_factors if length > rope.original_max_position else rope.short_factors
        return frequencies / jnp.array(factors)
    return frequencies


def rope_cossin(rope: Rope, head_dim: int, positions: Int[Array, "B T"], length: int = 0) -> Cossin:
    """Cosine and sine by which the features at each position are turned."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(rope, head_dim, length)
    if rope.attention_factor == 1:
        return jnp.cos(angles), jnp.sin(angles)
    return rope.attention_factor * jnp.cos(angles), rope.attention_factor * jnp.sin(angles)


def rotate(x: Float[Array, "B T N H"], cossin: Cossin, *, interleaved: bool = False) -> Float[Array, "B T N H"]:
    """The first features of every head turned in pairs, and the rest as they are.

    In the layout of Llama feature i turns with feature i + half; interleaved, 2i with 2i + 1.
    """
    cos, sin = (c[:, :, None, :].astype(x.dtype) for c in cossin)
    half = cos.shape[-1]
    turned, rest = (x, None) if 2 * half == x.shape[-1] else jnp.split(x, [2 * half], axis=-1)
    if interleaved:
        left, right = turned[..., ::2], turned[..., 1::2]
        turned = jnp.stack([left * cos - right * sin, right * cos + left * sin], axis=-1).reshape(turned.shape)
    else:
        left, right = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned if rest is None else jnp.concatenate([turned, rest], axis=-1)


def _yarn_range(rope: Rope, dim: int) -> tuple[float, float]:
    """Between which pairs of features yarn goes over from kept to stretched wavelengths (arXiv:2309.00071)."""

    def pair_of(turns: float) -> float:  # the pair that turns so often within the original context
        return dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(float(low), 0.0), min(float(high), dim - 1.0)
    return low, high if high != low else high + 0.001
