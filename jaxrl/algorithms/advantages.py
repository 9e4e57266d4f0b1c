"""From rewards to advantages, on padded [B, T] arrays, once a step and before packing.

B sequences of at most T response tokens. Rewards are per token; a score of the whole response sits on its last
trained token (`place_scores`). `group` [B] holds any integers, equal for the responses to one prompt; groups may be
scattered and of different sizes.

Every entry of `ADVANTAGES` is called through `choose.bind` as f(rewards, mask, **those it names of: group, values,
baselines, gamma, lam, norm_by_std, epsilon, f_norm) -> (advantages, returns), both [B, T]; a user's function likewise.
Only `gae` has returns in the sense of a critic's target. Advantages under a false mask are unspecified: mask them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real

from jaxrl.algorithms.masked import Scalar, as_float, masked_whiten

Rewards = Real[Array, "B T"]
Mask = Bool[Array, "B T"]
Advantages = Float[Array, "B T"]
Returns = Float[Array, "B T"]


def place_scores(scores: Real[Array, " B"], mask: Mask) -> Rewards:
    """Token rewards from one score a response: the score on the last trained token, zero elsewhere.

    The result is floating point whatever the scores are, so that 0.5 stays 0.5. A response without a trained token
    carries its score in the last column: it trains nothing, but counts in the mean of its group.
    """
    T = mask.shape[1]
    last = T - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.where(jnp.arange(T) == last[:, None], as_float(scores)[:, None], 0.0)


def gae(
    rewards: Rewards, mask: Mask, *, values: Float[Array, "B T"], gamma: Scalar = 1.0, lam: Scalar = 1.0
) -> tuple[Advantages, Returns]:
    """Generalised advantage estimation (Schulman et al., arXiv:1506.02438, eq. 16), whitened over the batch.

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lam * A_{t+1}
        return_t = A_t + V_t, taken before A is whitened

    "t + 1" is the next *trained* token: values and advantages are carried unchanged over holes in the mask.
    """
    rewards, values = as_float(rewards), as_float(values)
    value_from_here = _recur_backward(jnp.where(mask, values, 0.0), 1.0 - mask)
    next_values = jnp.pad(value_from_here[:, 1:], ((0, 0), (0, 1)))
    delta = rewards + gamma * next_values - values
    advantages = _recur_backward(jnp.where(mask, delta, 0.0), jnp.where(mask, gamma * lam, 1.0))
    return masked_whiten(advantages, mask), advantages + values


def grpo(
    rewards: Rewards, mask: Mask, *, group: Int[Array, " B"], norm_by_std: bool = True, epsilon: Scalar = 1e-6
) -> tuple[Advantages, Returns]:
    """Group-relative advantages (DeepSeekMath, arXiv:2402.03300, section 4.1.2): (s - mean_g) / (std_g + epsilon).

    The deviation is unbiased. `norm_by_std=False` leaves it out (Dr. GRPO, arXiv:2503.20783). As in verl, a response
    alone in its group has mean 0 and deviation 1.
    """
    scores = _scores(rewards)
    count, mean = _group_count_and_mean(scores, group)
    centred = scores - mean
    if norm_by_std:
        variance = _group_sum(jnp.square(scores - mean), group) / jnp.maximum(count - 1, 1)
        deviation = jnp.where(count > 1, jnp.sqrt(variance), 1.0)
        centred = centred / (deviation + epsilon)
    return _spread(centred, mask)


def rloo(rewards: Rewards, mask: Mask, *, group: Int[Array, " B"]) -> tuple[Advantages, Returns]:
    """Leave-one-out baseline (Ahmadian et al., arXiv:2402.14740): s minus the mean of the others in the group.

    Equals n / (n - 1) * (s - mean_g). As in verl, a response alone in its group keeps its score.
    """
    scores = _scores(rewards)
    count, mean = _group_count_and_mean(scores, group)
    return _spread((scores - mean) * count / jnp.maximum(count - 1, 1), mask)


def opo(rewards: Rewards, mask: Mask, *, group: Int[Array, " B"]) -> tuple[Advantages, Returns]:
    """The variance-optimal baseline (OPO, arXiv:2505.23585): s minus the length-weighted mean of its group.

    b_g = sum(length * s) / sum(length). As in verl, a response alone in its group has baseline 0.
    """
    scores = _scores(rewards)
    length = jnp.sum(mask, axis=1).astype(scores.dtype)
    total_length = _group_sum(length, group)
    baseline = _group_sum(length * scores, group) / jnp.maximum(total_length, 1)
    is_alone = _group_sum(jnp.ones_like(scores), group) == 1
    return _spread(scores - jnp.where(is_alone, 0.0, baseline), mask)


def gpg(rewards: Rewards, mask: Mask, *, group: Int[Array, " B"], f_norm: Scalar = 1.0) -> tuple[Advantages, Returns]:
    """Group policy gradient (GPG, arXiv:2504.02546): alpha * (s - mean_g) / f_norm.

    alpha = B / (number of responses with a score other than 0) makes up for groups that give no gradient.
    """
    scores = _scores(rewards)
    alpha = scores.shape[0] / jnp.maximum(jnp.count_nonzero(scores), 1)
    _, mean = _group_count_and_mean(scores, group)
    return _spread(alpha * (scores - mean) / f_norm, mask)


def reinforce_plus_plus(rewards: Rewards, mask: Mask, *, gamma: Scalar = 1.0) -> tuple[Advantages, Returns]:
    """REINFORCE++ (arXiv:2501.03262): the discounted return, whitened over the batch.

    return_t = r_t + gamma * return_{t+1}, "t + 1" being the next trained token, as in `gae`; zero in holes.
    """
    returns = _recur_backward(jnp.where(mask, as_float(rewards), 0.0), jnp.where(mask, gamma, 1.0)) * mask
    return masked_whiten(returns, mask) * mask, returns


def reinforce_plus_plus_baseline(
    rewards: Rewards, mask: Mask, *, group: Int[Array, " B"]
) -> tuple[Advantages, Returns]:
    """REINFORCE++ with a baseline (arXiv:2501.03262): s - mean_g, then whitened over all tokens of the batch.

    As in verl, a response alone in its group has mean 0.
    """
    scores = _scores(rewards)
    _, mean = _group_count_and_mean(scores, group)
    centred, _ = _spread(scores - mean, mask)
    advantages = masked_whiten(centred, mask) * mask
    return advantages, advantages


def remax(rewards: Rewards, mask: Mask, *, baselines: Real[Array, " B"]) -> tuple[Advantages, Returns]:
    """ReMax (Li et al., arXiv:2310.10505): the return minus the score of the greedy response to the same prompt.

    `baselines` holds that score; the return of a token is the sum of the rewards from it on.
    """
    rewards = jnp.where(mask, as_float(rewards), 0.0)
    returns = jnp.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    return returns - as_float(baselines)[:, None] * mask, returns


def _scores(rewards: Rewards) -> Float[Array, " B"]:
    """One score a response: the sum of its token rewards."""
    return jnp.sum(as_float(rewards), axis=1)


def _spread(per_sequence: Float[Array, " B"], mask: Mask) -> tuple[Advantages, Returns]:
    """One number a response to its trained tokens, as advantages and as returns."""
    advantages = jnp.where(mask, per_sequence[:, None], 0.0)
    return advantages, advantages


def _group_sum(x: Float[Array, " B"], group: Int[Array, " B"]) -> Float[Array, " B"]:
    """The sum of `x` over each response's group, handed to each response."""
    _, position = jnp.unique(group, size=group.shape[0], return_inverse=True)
    return jax.ops.segment_sum(x, position, num_segments=group.shape[0])[position]


def _group_count_and_mean(
    scores: Float[Array, " B"], group: Int[Array, " B"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Group size and group mean of every response; the mean of a group of one is 0, as in verl."""
    count = _group_sum(jnp.ones_like(scores), group)
    mean = _group_sum(scores, group) / count
    # In float32 the mean of equal scores can be off by a bit, which GRPO's division by a deviation of about zero would
    # blow up into an advantage; a second pass takes that bit away.
    mean = mean + _group_sum(scores - mean, group) / count
    return count, jnp.where(count > 1, mean, 0.0)


def _recur_backward(add: Float[Array, "B T"], decay: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """y_t = add_t + decay_t * y_{t+1} with y_T = 0, in log(T) steps instead of T."""

    def compose(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        return earlier[0] + earlier[1] * later[0], earlier[1] * later[1]

    return jax.lax.associative_scan(compose, (add, jnp.broadcast_to(decay, add.shape)), reverse=True, axis=1)[0]


ADVANTAGES = {
    "gae": gae,
    "grpo": grpo,
    "rloo": rloo,
    "opo": opo,
    "gpg": gpg,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "remax": remax,
}
