"""One loss for every token: the policy losses and the clipped value loss.

The contract, which makes micro-batches, packing and the mesh invisible in the result:

    token_loss, sums = loss(logprobs, old_logprobs, advantages, mask, **those it names of: clip_low, clip_high, clip_c,
                            tau_pos, tau_neg, dro_beta, rollout_weights, sequence_ids)     called through `choose.bind`
    loss    = sum over micro-batches of sum(token_loss * aggregation_weights(mask, mode, ...))
    metrics = sum over micro-batches of sums[name], divided by the number of trained tokens in the mini-batch

- Arrays are aligned and of one shape, padded [B, T] or packed slots [W, S]; a loss over whole sequences also takes
  `sequence_ids` (see `masked.sequence_sum`). No other loss looks beyond its own token.
- `token_loss` has the same shape, at least float32, and is zero, with zero gradient, where the mask is false.
- `sums` holds verl's metrics by name (the caller puts "actor/" or "critic/" before it) as sums over trained tokens,
  carrying no gradient. No loss divides by a count of its own micro-batch.
- Only `logprobs` (or `values`) carries gradients. `rollout_weights` [like mask] multiplies each token's loss.
- Entropy and KL terms belong to the caller: they are token losses too, under the same weights.

A user's own loss with this signature can stand in for an entry of `POLICY_LOSSES`.
Below, d = logprobs - old_logprobs, rho = e^d, A = advantages; d is kept to +-20 unless said otherwise.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl.algorithms.masked import (
    COUNT_EPSILON,
    Scalar,
    as_float,
    masked_sum,
    sequence_lengths,
    sequence_mean,
    sequence_sum,
)

Tokens = Float[Array, "*shape"]
Mask = Bool[Array, "*shape"]
Sums = dict[str, Float[Array, ""]]


def vanilla(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens,
    mask: Mask,
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    clip_c: Scalar = 3.0,
    rollout_weights: Tokens | None = None,
) -> tuple[Tokens, Sums]:
    """PPO (Schulman et al., arXiv:1707.06347, eq. 7) with dual clip (arXiv:1912.09729) and clip-higher (DAPO).

    M = max(-A * rho, -A * clip(rho, 1 - clip_low, 1 + clip_high))
    loss = min(M, -A * clip_c) if A < 0 else M
    """
    d = _log_ratio(logprobs, old_logprobs, mask)
    ratio = jnp.exp(d)
    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    ceiling = -advantages * clip_c
    is_negative = advantages < 0
    pessimistic = jnp.maximum(unclipped, clipped)
    loss = jnp.where(is_negative, jnp.minimum(pessimistic, ceiling), pessimistic)
    sums = _sums(
        mask,
        pg_clipfrac=clipped > unclipped,
        pg_clipfrac_lower=is_negative & (pessimistic > ceiling),
        ppo_kl=-d,
    )
    return _finish(loss, mask, rollout_weights), sums


def gspo(
    logprobs: Float[Array, "W S"],
    old_logprobs: Float[Array, "W S"],
    advantages: Float[Array, "W S"],
    mask: Bool[Array, "W S"],
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    rollout_weights: Float[Array, "W S"] | None = None,
    sequence_ids: Int[Array, "W S"] | None = None,
) -> tuple[Float[Array, "W S"], Sums]:
    """Group sequence policy optimisation, token form (GSPO, arXiv:2507.18071, section 4.3).

        s_t = stop(exp(mean of d over the sequence)) * p_t / stop(p_t),   log s_t at most 10
        loss = max(-A * s_t, -A * clip(s_t, 1 - clip_low, 1 + clip_high))

    d is not limited here. The paper's clips are much smaller than PPO's (3e-4, 4e-4).
    """
    d = _log_ratio(logprobs, old_logprobs, mask, limit=None)
    lengths = jnp.maximum(sequence_lengths(mask, sequence_ids), 1.0)
    sequence_d = sequence_sum(jax.lax.stop_gradient(d), mask, sequence_ids) / lengths
    ratio = jnp.exp(jnp.minimum(sequence_d + d - jax.lax.stop_gradient(d), 10.0))
    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    sums = _sums(mask, pg_clipfrac=clipped > unclipped, pg_clipfrac_lower=jnp.zeros_like(d), ppo_kl=-d)
    return _finish(jnp.maximum(unclipped, clipped), mask, rollout_weights), sums


def geo_mean(
    logprobs: Float[Array, "W S"],
    old_logprobs: Float[Array, "W S"],
    advantages: Float[Array, "W S"],
    mask: Bool[Array, "W S"],
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    rollout_weights: Float[Array, "W S"] | None = None,
    sequence_ids: Int[Array, "W S"] | None = None,
) -> tuple[Float[Array, "W S"], Sums]:
    """Geometric-mean policy optimisation (GMPO, arXiv:2507.20673): one loss a sequence.

        e_t = sign(A) * min(sign(A) * d, sign(A) * clip(d, -clip_low, clip_high)),   d not limited
        loss = -mean(A) * exp(mean of e over the sequence) * geometric mean of the rollout weights

    The clips bound log rho (0.4 in the paper). Every token is given the loss of its sequence, so that
    "seq-mean-token-mean" (see `FIXED_AGGREGATIONS`) averages it over sequences. verl counts sequences without a
    trained token in that average; a caller who wants that passes the number of all sequences as `num_sequences`.
    """
    d = _log_ratio(logprobs, old_logprobs, mask, limit=None)
    limited = jnp.clip(d, -clip_low, clip_high)
    sign = jnp.sign(advantages)
    pessimistic = sign * jnp.minimum(sign * d, sign * limited)
    ratio = jnp.exp(sequence_mean(pessimistic, mask, sequence_ids))
    loss = -sequence_mean(advantages, mask, sequence_ids) * ratio
    if rollout_weights is not None:
        loss = loss * jnp.exp(sequence_mean(jnp.log(as_float(rollout_weights) + 1e-10), mask, sequence_ids))
    lengths = sequence_lengths(mask, sequence_ids)
    # The inverse of the mean over tokens that the aggregation will take, its epsilon included.
    loss = loss * (lengths + COUNT_EPSILON) / jnp.maximum(lengths, 1.0)
    was_limited = d != limited
    sums = _sums(
        mask,
        pg_clipfrac=was_limited & (advantages > 0),
        pg_clipfrac_lower=was_limited & (advantages < 0),
        ppo_kl=-d,
    )
    return _finish(loss, mask, None), sums


def cispo(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens,
    mask: Mask,
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    rollout_weights: Tokens | None = None,
) -> tuple[Tokens, Sums]:
    """Clipped importance weights, every token keeps its gradient (MiniMax-M1, arXiv:2506.13585).

    loss = -stop(clip(rho, 1 - clip_low, 1 + clip_high)) * A * logprobs
    """
    d = _log_ratio(logprobs, old_logprobs, mask)
    ratio = jax.lax.stop_gradient(jnp.exp(d))
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    loss = -clipped * advantages * _trained(logprobs, mask)
    sums = _sums(mask, pg_clipfrac=ratio != clipped, pg_clipfrac_lower=jnp.zeros_like(d), ppo_kl=-d)
    return _finish(loss, mask, rollout_weights), sums


def dppo_tv(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens,
    mask: Mask,
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    clip_c: Scalar = 20.0,
    rollout_weights: Tokens | None = None,
) -> tuple[Tokens, Sums]:
    """Divergence PPO with binary total variation (DPPO, arXiv:2602.04879): a trust region on probabilities.

    keep = p - p_old <= clip_high if A > 0 else p - p_old >= -clip_low
    loss = -A * stop(min(rho, clip_c)) * logprobs * keep
    """
    change = jnp.exp(_trained(logprobs, mask)) - jnp.exp(_trained(old_logprobs, mask))
    keep = jnp.where(advantages > 0, change <= clip_high, change >= -clip_low)
    return _dppo(logprobs, old_logprobs, advantages, mask, keep, clip_c, rollout_weights)


def dppo_kl(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens,
    mask: Mask,
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    clip_c: Scalar = 20.0,
    rollout_weights: Tokens | None = None,
) -> tuple[Tokens, Sums]:
    """Divergence PPO with binary KL (DPPO, arXiv:2602.04879): as `dppo_tv`, the trust region being

    KL = p_old * log(p_old / p) + (1 - p_old) * log((1 - p_old) / (1 - p))
    keep = KL <= clip_high or p <= p_old if A > 0 else KL <= clip_low or p >= p_old
    """
    log_p, log_q = _trained(logprobs, mask), _trained(old_logprobs, mask)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    divergence = q * (log_q - log_p) + (1.0 - q) * jnp.log((1.0 - q + 1e-8) / (1.0 - p + 1e-8))
    keep_up = (divergence <= clip_high) | (p <= q)
    keep_down = (divergence <= clip_low) | (p >= q)
    keep = jnp.where(advantages > 0, keep_up, keep_down)
    return _dppo(logprobs, old_logprobs, advantages, mask, keep, clip_c, rollout_weights)


def sapo(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens,
    mask: Mask,
    *,
    tau_pos: Scalar = 1.0,
    tau_neg: Scalar = 1.05,
    rollout_weights: Tokens | None = None,
) -> tuple[Tokens, Sums]:
    """Soft adaptive policy optimisation (SAPO, arXiv:2511.20347): a sigmoid gate in place of the clip.

    loss = -A * sigmoid(tau * (rho - 1)) * 4 / tau, tau = tau_pos if A > 0 else tau_neg
    """
    d = _log_ratio(logprobs, old_logprobs, mask)
    tau = jnp.where(advantages > 0, tau_pos, tau_neg)
    loss = -advantages * jax.nn.sigmoid(tau * (jnp.exp(d) - 1.0)) * (4.0 / tau)
    sums = _sums(mask, pg_clipfrac=jnp.zeros_like(d), pg_clipfrac_lower=jnp.zeros_like(d), ppo_kl=-d)
    return _finish(loss, mask, rollout_weights), sums


def gpg(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens,
    mask: Mask,
    *,
    rollout_weights: Tokens | None = None,
) -> tuple[Tokens, Sums]:
    """The plain policy gradient (GPG, arXiv:2504.02546): -A * logprobs. `old_logprobs` is not used; no metrics."""
    loss = -advantages * _trained(logprobs, mask)
    return _finish(loss, mask, rollout_weights), {}


def dro(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens,
    mask: Mask,
    *,
    dro_beta: Scalar,
    rollout_weights: Tokens | None = None,
) -> tuple[Tokens, Sums]:
    """Direct reward optimisation (DRO, arXiv:2405.19107): -(A * logprobs - dro_beta / 2 * d^2)."""
    d = _log_ratio(logprobs, old_logprobs, mask, limit=None)
    loss = -(advantages * _trained(logprobs, mask) - 0.5 * dro_beta * jnp.square(d))
    return _finish(loss, mask, rollout_weights), _sums(mask, ppo_kl=-d)


def clipped_value(
    values: Tokens, old_values: Tokens, returns: Tokens, mask: Mask, *, clip: Scalar = 0.5
) -> tuple[Tokens, Sums]:
    """The critic's loss (Schulman's PPO code; verl's `value_loss`): max((V - R)^2, (V_clipped - R)^2) / 2.

    V_clipped is V kept within `clip` of `old_values`. The sum is named `vf_clipfrac`.
    """
    values, old_values, returns = (_trained(x, mask) for x in (values, old_values, returns))
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    error, clipped_error = jnp.square(values - returns), jnp.square(clipped - returns)
    loss = 0.5 * jnp.maximum(error, clipped_error)
    return _finish(loss, mask, None), _sums(mask, vf_clipfrac=clipped_error > error)


def _dppo(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Tokens,
    mask: Mask,
    keep: Bool[Array, "*shape"],
    clip_c: Scalar,
    rollout_weights: Tokens | None,
) -> tuple[Tokens, Sums]:
    """What both DPPO losses share once the tokens inside the trust region are known."""
    d = _log_ratio(logprobs, old_logprobs, mask)
    ratio = jax.lax.stop_gradient(jnp.exp(d))
    loss = jnp.where(keep, -advantages * jnp.minimum(ratio, clip_c) * _trained(logprobs, mask), 0.0)
    sums = _sums(mask, pg_clipfrac=~keep, pg_clipfrac_lower=keep & (ratio > clip_c), ppo_kl=-d)
    return _finish(loss, mask, rollout_weights), sums


def _trained(x: Tokens, mask: Mask) -> Tokens:
    """`x` in float32 or wider, zero where untrained, so that no rubbish from padding meets an exponential."""
    return jnp.where(mask, as_float(x), 0.0)


def _log_ratio(logprobs: Tokens, old_logprobs: Tokens, mask: Mask, *, limit: float | None = 20.0) -> Tokens:
    """d = logprobs - old_logprobs, kept to +-limit; zero where untrained."""
    d = _trained(logprobs, mask) - _trained(old_logprobs, mask)
    return d if limit is None else jnp.clip(d, -limit, limit)


def _sums(mask: Mask, **per_token: Array) -> Sums:
    """Each quantity summed over trained tokens, cut off from the gradient."""
    return {name: masked_sum(jax.lax.stop_gradient(x), mask) for name, x in per_token.items()}


def _finish(loss: Tokens, mask: Mask, rollout_weights: Tokens | None) -> Tokens:
    """Apply the rollout correction, then zero what is not trained."""
    if rollout_weights is not None:
        loss = loss * jax.lax.stop_gradient(rollout_weights)
    return jnp.where(mask, loss, 0.0)


POLICY_LOSSES = {
    "vanilla": vanilla,
    "gspo": gspo,
    "geo_mean": geo_mean,
    "cispo": cispo,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "sapo": sapo,
    "gpg": gpg,
    "dro": dro,
}

# The losses that verl aggregates in one way whatever `loss_agg_mode` says: use FIXED_AGGREGATIONS.get(name, mode).
FIXED_AGGREGATIONS = {"geo_mean": "seq-mean-token-mean", "sapo": "seq-mean-token-mean"}
