"""Policy and value losses: packed against padded, micro-batches against the whole, where gradients stop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.aggregation import aggregation_weights
from jaxrl.algorithms.choose import bind
from jaxrl.algorithms.losses import POLICY_LOSSES, clipped_value

B, T = 5, 6
LENGTHS = [6, 2, 4, 0, 3]
NUM_TOKENS, NUM_SEQUENCES = sum(LENGTHS) - 1, 4  # one hole
HYPER = {"clip_low": 0.1, "clip_high": 0.15, "clip_c": 1.5, "tau_pos": 1.0, "tau_neg": 1.05, "dro_beta": 0.05}
TOKEN_NAMES = ("logprobs", "old_logprobs", "advantages", "rollout_weights")


@pytest.fixture(scope="module")
def padded():
    """Five padded sequences: different lengths, a hole in the first, the fourth empty; NaN wherever untrained."""
    rng = np.random.default_rng(0)
    mask = np.arange(T) < np.array(LENGTHS)[:, None]
    mask[0, 2] = False
    old_logprobs = -rng.exponential(1.0, (B, T))
    batch = {
        "logprobs": old_logprobs + 0.3 * rng.normal(size=(B, T)),
        "old_logprobs": old_logprobs,
        "advantages": np.broadcast_to(rng.normal(size=(B, 1)), (B, T)),
        "rollout_weights": rng.uniform(0.5, 2.0, (B, T)),
    }
    batch = {name: jnp.array(np.where(mask, x, np.nan), jnp.float32) for name, x in batch.items()}
    return batch | {"mask": jnp.array(mask), "sequence_ids": jnp.broadcast_to(jnp.arange(B)[:, None], (B, T))}


@pytest.fixture(scope="module")
def packed(padded):
    """The same sequences end to end in two rows of nine slots, in another order; and where each slot came from."""
    layout = [
        [(1, t) for t in range(2)] + [(0, t) for t in range(6)],
        [(4, t) for t in range(3)] + [(2, t) for t in range(4)],
    ]
    source = np.full((2, 9, 2), -1)
    for row, slots in enumerate(layout):
        source[row, : len(slots)] = slots
    sequence, token = source[..., 0], source[..., 1]
    is_filled = sequence >= 0
    rows = {name: jnp.where(is_filled, padded[name][sequence, token], jnp.nan) for name in TOKEN_NAMES}
    rows["mask"] = is_filled & padded["mask"][sequence, token]
    rows["sequence_ids"] = jnp.where(is_filled, sequence, B)
    return rows, sequence, token


@partial(jax.jit, static_argnames="name")
def loss_and_grad(name, batch):
    """A micro-batch's part in the loss of the mini-batch of all five sequences, its gradient and its metric sums."""
    loss = bind(
        POLICY_LOSSES[name], **HYPER, rollout_weights=batch["rollout_weights"], sequence_ids=batch["sequence_ids"]
    )
    weights = aggregation_weights(
        batch["mask"],
        "seq-mean-token-mean",
        num_tokens=NUM_TOKENS,
        num_sequences=NUM_SEQUENCES,
        sequence_ids=batch["sequence_ids"],
        loss_scale_factor=T,
    )

    def scalar(logprobs):
        token_loss, sums = loss(logprobs, batch["old_logprobs"], batch["advantages"], batch["mask"])
        return jnp.sum(token_loss * weights), sums

    (value, sums), grad = jax.value_and_grad(scalar, has_aux=True)(batch["logprobs"])
    return value, grad, sums


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_packed_loss_equals_padded_loss_in_value_gradient_and_metrics(name, padded, packed):
    value, grad, sums = loss_and_grad(name, padded)
    rows, sequence, token = packed
    packed_value, packed_grad, packed_sums = loss_and_grad(name, rows)
    assert jnp.isfinite(value) and jnp.abs(grad).max() > 0
    np.testing.assert_allclose(packed_value, value, rtol=1e-5)
    in_rows = np.asarray(rows["mask"])
    np.testing.assert_allclose(packed_grad[in_rows], grad[sequence, token][in_rows], rtol=1e-5, atol=1e-7)
    for key, total in sums.items():
        np.testing.assert_allclose(packed_sums[key], total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_micro_batches_add_up_to_the_whole_in_value_gradient_and_metrics(name, padded):
    value, grad, sums = loss_and_grad(name, padded)
    parts = [loss_and_grad(name, {key: x[b : b + 1] for key, x in padded.items()}) for b in range(B)]
    np.testing.assert_allclose(sum(part[0] for part in parts), value, rtol=1e-5)
    np.testing.assert_allclose(jnp.concatenate([part[1] for part in parts]), grad, rtol=1e-5, atol=1e-7)
    for key, total in sums.items():
        np.testing.assert_allclose(sum(part[2][key] for part in parts), total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_untrained_tokens_have_no_loss_and_no_gradient_whatever_they_hold(name, padded):
    loss = bind(POLICY_LOSSES[name], **HYPER, rollout_weights=padded["rollout_weights"])

    def token_loss(logprobs):
        return loss(logprobs, padded["old_logprobs"], padded["advantages"], padded["mask"])[0]

    @jax.jit
    def losses_and_grad(logprobs):
        losses, pull_back = jax.vjp(token_loss, logprobs)
        return losses, pull_back(jnp.ones_like(losses))[0]

    losses, grad = losses_and_grad(padded["logprobs"])
    assert jnp.all(losses[~padded["mask"]] == 0)
    assert jnp.all(grad[~padded["mask"]] == 0)
    assert jnp.all(jnp.isfinite(grad))


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_half_precision_logprobs_give_a_float32_loss(name, padded):
    logprobs, old_logprobs, advantages, _ = (padded[key].astype(jnp.bfloat16) for key in TOKEN_NAMES)
    loss = bind(POLICY_LOSSES[name], **HYPER)
    token_loss, sums = jax.eval_shape(loss, logprobs, old_logprobs, advantages, padded["mask"])
    assert token_loss.dtype == jnp.float32
    assert all(total.dtype == jnp.float32 for total in sums.values())


def slope(name, ratio, advantage, **hyper):
    """Token loss and its gradient for one token with the given probability ratio and advantage."""
    old = jnp.array([[-1.0]])
    value, grad = value_and_slope(old + jnp.log(ratio), old, jnp.array([[advantage]]), hyper, name)
    return float(value), float(grad[0, 0])


@partial(jax.jit, static_argnames="name")
@jax.value_and_grad
def value_and_slope(logprobs, old_logprobs, advantages, hyper, name):
    mask = jnp.ones_like(logprobs, bool)
    return bind(POLICY_LOSSES[name], **hyper)(logprobs, old_logprobs, advantages, mask)[0][0, 0]


@pytest.mark.parametrize(
    "ratio, advantage, value, gradient",
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),  # inside: -A * rho
        (1.5, 2.0, -2.0 * 1.28, 0.0),  # above the upper clip, good token: stopped
        (0.5, -2.0, 2.0 * 0.8, 0.0),  # below the lower clip, bad token: stopped
        (0.5, 2.0, -1.0, -1.0),  # outside, but on the side that still needs learning
        (1.5, -2.0, 3.0, 3.0),
        (4.0, -2.0, 6.0, 0.0),  # dual clip: a bad token at more than three times its old probability
    ],
)
def test_clipped_policy_loss_stops_the_gradient_outside_the_clip(ratio, advantage, value, gradient):
    clips = {"clip_low": 0.2, "clip_high": 0.28, "clip_c": 3.0}
    np.testing.assert_allclose(slope("vanilla", ratio, advantage, **clips), (value, gradient), rtol=1e-5, atol=1e-6)


def test_cispo_keeps_the_gradient_that_ppo_drops():
    value, gradient = slope("cispo", 1.5, 2.0, clip_low=0.2, clip_high=0.28)
    np.testing.assert_allclose(gradient, -2.0 * 1.28, rtol=1e-5)


def test_dppo_drops_a_token_by_the_change_of_its_probability():
    # p_old = e^-1 = 0.368; at rho = 1.5 the probability has risen by 0.184.
    assert slope("dppo_tv", 1.5, 2.0, clip_high=0.19)[1] != 0.0
    assert slope("dppo_tv", 1.5, 2.0, clip_high=0.18)[1] == 0.0
    assert slope("dppo_tv", 1.5, -2.0, clip_low=0.0)[1] != 0.0  # it has to fall: not held back


def test_gspo_and_gmpo_use_the_geometric_mean_ratio_of_the_sequence():
    mask = jnp.array([[True, False, True]])
    old, new = jnp.array([[-1.0, 5.0, -2.0]]), jnp.array([[-0.9, 9.0, -1.8]])
    ones = jnp.ones((1, 3))
    ratio = np.exp((0.1 + 0.2) / 2)
    for name in ("gspo", "geo_mean"):
        token_loss, sums = bind(POLICY_LOSSES[name], clip_low=0.5, clip_high=0.5)(new, old, ones, mask)
        np.testing.assert_allclose(token_loss, [[-ratio, 0.0, -ratio]], rtol=1e-6)
        np.testing.assert_allclose(sums["ppo_kl"], -0.3, rtol=1e-5)


def test_metrics_are_sums_over_trained_tokens():
    mask = jnp.array([[True, True, True, False]])
    old = jnp.zeros((1, 4))
    new = jnp.log(jnp.array([[1.5, 1.1, 4.0, 9.0]]))
    advantages = jnp.array([[1.0, 1.0, -1.0, 1.0]])
    _, sums = POLICY_LOSSES["vanilla"](new, old, advantages, mask)
    np.testing.assert_allclose(sums["pg_clipfrac"], 1.0)
    np.testing.assert_allclose(sums["pg_clipfrac_lower"], 1.0)
    np.testing.assert_allclose(sums["ppo_kl"], -np.log(1.5 * 1.1 * 4.0), rtol=1e-6)


def test_rollout_weights_scale_each_token_and_get_no_gradient(padded):
    def loss(weights):
        arrays = (padded["logprobs"], padded["old_logprobs"], padded["advantages"], padded["mask"])
        return POLICY_LOSSES["vanilla"](*arrays, rollout_weights=weights)[0]

    np.testing.assert_allclose(loss(jnp.full((B, T), 2.0)), 2 * loss(jnp.ones((B, T))), rtol=1e-6)
    assert jnp.all(jax.grad(lambda weights: loss(weights).sum())(jnp.ones((B, T))) == 0)


def test_dro_asks_for_its_beta():
    with pytest.raises(ValueError, match="'dro' needs `dro_beta`"):
        bind(POLICY_LOSSES["dro"], dro_beta=None)


def test_clipped_value_loss_stops_the_gradient_of_values_that_ran_ahead():
    old, returns, mask = jnp.zeros((1, 4)), jnp.full((1, 4), 2.0), jnp.array([[True, True, True, False]])
    values = jnp.array([[0.3, 1.0, -1.0, jnp.nan]])

    def loss(values):
        token_loss, sums = clipped_value(values, old, returns, mask, clip=0.5)
        return token_loss.sum(), (token_loss, sums)

    grad, (token_loss, sums) = jax.grad(loss, has_aux=True)(values)
    # inside; ahead of the clip and better for it: clipped, stopped; the wrong way: not clipped
    np.testing.assert_allclose(token_loss, [[0.5 * 1.7**2, 0.5 * 1.5**2, 0.5 * 3.0**2, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(grad, [[-1.7, 0.0, -3.0, 0.0]], rtol=1e-6)
    assert sums["vf_clipfrac"] == 1.0
