"""Reductions over the trained tokens of a batch, per batch and per sequence; used by everything else in this folder.

A mask is true where a token was produced by the model and is trained on; it may have holes (tool output) and empty
rows. Values under a false mask never reach a result, not even as NaN. Sums are taken in float32, or in float64 when
the inputs are float64; booleans and integers count as numbers.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real, Shaped

# A hyper-parameter: a number, or a scalar array, so that a schedule can change it without a recompile.
Scalar = int | float | Real[Array, ""]

# verl adds this to the token count of a mean; kept so that its recorded numbers come out.
COUNT_EPSILON = 1e-8


def as_float(x: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` in float32, or in float64 if it already is. Integer rewards pass through here, so that none is truncated."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x.astype(float)


def masked_sum(x: Shaped[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Sum of `x` where the mask is true; zero for an empty mask."""
    return jnp.sum(as_float(x), where=mask)


def masked_mean(x: Shaped[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Mean of `x` where the mask is true; zero for an empty mask."""
    return masked_sum(x, mask) / (jnp.sum(mask) + COUNT_EPSILON)


def masked_var(x: Shaped[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Unbiased variance (Bessel's n / (n - 1)) of `x` where the mask is true; zero for fewer than two tokens."""
    count = jnp.sum(mask)
    centred = as_float(x) - masked_mean(x, mask)
    return masked_mean(jnp.square(centred), mask) * count / jnp.maximum(count - 1, 1)


def masked_whiten(
    x: Shaped[Array, "*shape"], mask: Bool[Array, "*shape"], *, shift_mean: bool = True
) -> Float[Array, "*shape"]:
    """`x` shifted and scaled to mean 0 and variance 1 over the trained tokens: (x - mean) / sqrt(var + 1e-8).

    `shift_mean=False` scales only. Masked positions are transformed like all others, not zeroed (as verl does).
    """
    mean = masked_mean(x, mask)
    whitened = (as_float(x) - mean) * jax.lax.rsqrt(masked_var(x, mask) + 1e-8)
    return whitened if shift_mean else whitened + mean


def sequence_sum(
    x: Shaped[Array, "W S"], mask: Bool[Array, "W S"], sequence_ids: Int[Array, "W S"] | None = None
) -> Float[Array, "W S"]:
    """The sum of `x` over the trained tokens of a sequence, handed to every token of that sequence.

    Without `sequence_ids` a row is a sequence (the padded layout). With them, each run of equal ids within a row is one
    (the packed layout); any integers will do. A sum never leaves its row, whichever device holds it.
    """
    x = jnp.where(mask, as_float(x), 0.0)
    if sequence_ids is None:
        return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True), x.shape)
    runs = _runs(sequence_ids)
    sums = jax.vmap(partial(jax.ops.segment_sum, num_segments=x.shape[1]))(x, runs)
    return jnp.take_along_axis(sums, runs, axis=1)


def sequence_lengths(mask: Bool[Array, "W S"], sequence_ids: Int[Array, "W S"] | None = None) -> Float[Array, "W S"]:
    """The number of trained tokens in each token's sequence, handed to every token like `sequence_sum`."""
    return sequence_sum(mask.astype(float), mask, sequence_ids)


def sequence_mean(
    x: Shaped[Array, "W S"], mask: Bool[Array, "W S"], sequence_ids: Int[Array, "W S"] | None = None
) -> Float[Array, "W S"]:
    """The mean of `x` over the trained tokens of a sequence, handed to every token; zero where there are none."""
    return sequence_sum(x, mask, sequence_ids) / (sequence_lengths(mask, sequence_ids) + COUNT_EPSILON)


def count_sequences(mask: Bool[Array, "W S"], sequence_ids: Int[Array, "W S"] | None = None) -> Int[Array, ""]:
    """The number of sequences with at least one trained token."""
    if sequence_ids is None:
        return jnp.sum(jnp.any(mask, axis=1))
    runs = _runs(sequence_ids)
    rows = jnp.arange(mask.shape[0])[:, None]
    return jnp.sum(jnp.zeros_like(mask).at[rows, runs].max(mask))


def _runs(sequence_ids: Int[Array, "W S"]) -> Int[Array, "W S"]:
    """Number the runs of equal ids in each row 0, 1, 2, ..., so that S bounds them whatever the ids are."""
    is_new = jnp.pad(sequence_ids[:, 1:] != sequence_ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.cumsum(is_new, axis=1, dtype=jnp.int32)
