"""From one loss a token to the loss: a weight for every token, so that the loss is sum(token_loss * weight).

The weights depend on the mask and on two counts of the *whole* mini-batch, both known before any forward pass.
So the loss of a mini-batch is the plain sum of the losses of its micro-batches, and how tokens are split into
micro-batches, packed into rows or spread over devices cannot change it. One condition: a sequence stays in one row.

Entries of `AGGREGATIONS` are called through `choose.bind` as f(mask, **those it names of: lengths, num_tokens,
num_sequences, loss_scale_factor) -> weights, of the mask's shape; `aggregation_weights` zeroes them under the mask.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl.algorithms.choose import bind, choose
from jaxrl.algorithms.masked import COUNT_EPSILON, Scalar, count_sequences, sequence_lengths


def aggregation_weights(
    mask: Bool[Array, "W S"],
    mode: str | Callable,
    *,
    num_tokens: Scalar,
    num_sequences: Scalar,
    sequence_ids: Int[Array, "W S"] | None = None,
    loss_scale_factor: Scalar | None = None,
) -> Float[Array, "W S"]:
    """The weight of every token in the loss (verl's `loss_agg_mode`); zero where the mask is false.

    Args:
        mask: trained tokens of this micro-batch, padded [B, T] or packed slots [W, S].
        mode: a key of `AGGREGATIONS` or a function with the signature of its entries.
        num_tokens: trained tokens in the whole mini-batch, all micro-batches and devices together.
        num_sequences: sequences with a trained token in the whole mini-batch.
        sequence_ids: which sequence a packed slot belongs to; None when each row is one sequence.
        loss_scale_factor: divisor of "seq-mean-token-sum-norm"; a constant such as the longest allowed response.

    Raises:
        ValueError: unknown mode, or "seq-mean-token-sum-norm" without `loss_scale_factor`.
    """
    weigh = bind(
        choose(AGGREGATIONS, mode, "loss aggregation"),
        lengths=sequence_lengths(mask, sequence_ids),
        # A mini-batch without one trained token has the loss zero, not NaN.
        num_tokens=jnp.maximum(num_tokens, 1),
        num_sequences=jnp.maximum(num_sequences, 1),
        loss_scale_factor=loss_scale_factor,
    )
    return jnp.where(mask, weigh(mask), 0.0)


def aggregate_loss(
    token_loss: Float[Array, "W S"],
    mask: Bool[Array, "W S"],
    mode: str | Callable,
    *,
    sequence_ids: Int[Array, "W S"] | None = None,
    loss_scale_factor: Scalar | None = None,
) -> Float[Array, ""]:
    """The loss of a whole batch that is at hand at once, divided by its own counts.

    As in verl, "seq-mean-token-sum-norm" divides by the padded length T unless `loss_scale_factor` is given.
    """
    weights = aggregation_weights(
        mask,
        mode,
        num_tokens=jnp.sum(mask),
        num_sequences=count_sequences(mask, sequence_ids),
        sequence_ids=sequence_ids,
        loss_scale_factor=mask.shape[1] if loss_scale_factor is None else loss_scale_factor,
    )
    return jnp.sum(jnp.where(mask, token_loss, 0.0) * weights)


def token_mean(mask: Bool[Array, "W S"], *, num_tokens: Scalar) -> Float[Array, "W S"]:
    """Every token counts the same (DAPO, arXiv:2503.14476): 1 / N."""
    return mask / num_tokens


def token_sum(mask: Bool[Array, "W S"]) -> Float[Array, "W S"]:
    """The bare sum over tokens: 1."""
    return mask.astype(float)


def seq_mean_token_sum(mask: Bool[Array, "W S"], *, num_sequences: Scalar) -> Float[Array, "W S"]:
    """Token losses are summed in a sequence, sequences are averaged: 1 / B."""
    return mask / num_sequences


def seq_mean_token_sum_norm(
    mask: Bool[Array, "W S"], *, num_sequences: Scalar, loss_scale_factor: Scalar
) -> Float[Array, "W S"]:
    """As `seq_mean_token_sum`, divided by a constant length (Dr. GRPO, arXiv:2503.20783): 1 / (B * L)."""
    return mask / num_sequences / loss_scale_factor


def seq_mean_token_mean(
    mask: Bool[Array, "W S"], *, lengths: Float[Array, "W S"], num_sequences: Scalar
) -> Float[Array, "W S"]:
    """Every sequence counts the same (GRPO, arXiv:2402.03300): 1 / (B * |y_i|)."""
    return mask / (lengths + COUNT_EPSILON) / num_sequences


AGGREGATIONS = {
    "token-mean": token_mean,
    "token-sum": token_sum,
    "seq-mean-token-sum": seq_mean_token_sum,
    "seq-mean-token-sum-norm": seq_mean_token_sum_norm,
    "seq-mean-token-mean": seq_mean_token_mean,
}
