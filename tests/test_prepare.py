"""From rewards to advantages: the stage as a whole on arrays small enough to be worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from jaxrl.config import Algorithm, KLCtrl, RolloutCorrection
from jaxrl.prepare import Inputs, check_algorithm, make_prepare

MASK = np.array([[1, 1, 1], [1, 1, 0]], bool)
LOGPROBS = np.array([[-1.0, -2.0, -0.5], [-0.7, -1.5, -9.0]], np.float32)  # -9 and the like stand outside the mask
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # float32


def inputs(scores=(1.0, 0.0), group=(0, 1), mask=MASK, old=LOGPROBS, rollout=LOGPROBS, kl_coef=0.1, **others):
    arrays = {name: np.asarray(x, np.float32) for name, x in others.items() if x is not None}
    absent = dict.fromkeys(("ref_logprobs", "values", "baselines"))
    return Inputs(
        scores=np.asarray(scores, np.float32), group=np.asarray(group, np.int32), mask=np.asarray(mask, bool),
        rollout_logprobs=np.asarray(rollout, np.float32), old_logprobs=np.asarray(old, np.float32),
        kl_coef=np.float32(kl_coef), **(absent | arrays),
    )  # fmt: skip


def corrected(estimator: str, **settings) -> Algorithm:
    return Algorithm(estimator, rollout_correction=RolloutCorrection(**settings))


def whiten(x, mask):
    kept = x[mask]
    return np.where(mask, (x - kept.mean()) / np.sqrt(kept.var(ddof=1) + 1e-8), 0.0)


def test_gae_looks_ahead_through_values_and_whitens_over_the_trained_tokens():
    values = [[0.1, 0.2, 0.3], [0.5, 0.4, 9.0]]
    prepared, _ = make_prepare(Algorithm("gae", gamma=1.0, lam=0.5))(inputs(values=values))
    # Deltas .1 .1 .7 and -.1 -.4; each advantage is its delta and half of the next advantage.
    advantages = np.array([[0.325, 0.45, 0.7], [-0.3, -0.4, 0.0]])
    np.testing.assert_allclose(prepared.advantages, whiten(advantages, MASK), **CLOSE)
    np.testing.assert_allclose(prepared.returns, [[0.425, 0.65, 1.0], [0.2, 0.0, 0.0]], **CLOSE)
    np.testing.assert_array_equal(prepared.mask, MASK)
    np.testing.assert_array_equal(prepared.rollout_weights, np.ones((2, 3)))
    np.testing.assert_allclose(prepared.rewards_sum, [1.0, 0.0])


GROUPS = {"scores": (1.0, 0.5, 0.0, 0.5), "group": (7, 3, 7, 3), "mask": np.vstack([MASK, MASK])}
FOUR = {"old": np.vstack([LOGPROBS, LOGPROBS]), "rollout": np.vstack([LOGPROBS, LOGPROBS])}


@pytest.mark.parametrize(("by_std", "size"), [(True, 0.5 / (0.5**0.5 + 1e-6)), (False, 0.5)])
def test_grpo_compares_within_groups_that_may_be_scattered(by_std, size):
    p = Algorithm("grpo", norm_adv_by_std_in_grpo=by_std)
    prepared, _ = make_prepare(p)(inputs(**GROUPS, **FOUR))
    expected = np.array([size, 0.0, -size, 0.0])[:, None] * GROUPS["mask"]
    np.testing.assert_allclose(prepared.advantages, expected, **CLOSE)


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "opo", "gpg", "reinforce_plus_plus_baseline"])
def test_equal_scores_in_a_group_give_no_advantage(estimator):
    mask = np.ones((6, 3), bool)  # of one length, so that a mean by length is no other
    logprobs = np.full((6, 3), -1.0)
    given = inputs(scores=[0.1] * 3 + [0.7] * 3, group=[0] * 3 + [1] * 3, mask=mask, old=logprobs, rollout=logprobs)
    prepared, _ = make_prepare(Algorithm(estimator))(given)
    np.testing.assert_allclose(prepared.advantages, 0.0, atol=1e-6)


def test_remax_subtracts_the_score_of_the_greedy_response():
    prepared, _ = make_prepare(Algorithm("remax"))(inputs(scores=(1.0, 0.0), baselines=(0.25, 0.5)))
    np.testing.assert_allclose(prepared.advantages, [[0.75, 0.75, 0.75], [-0.5, -0.5, 0.0]], **CLOSE)


def test_an_estimator_that_misses_its_ingredient_says_which():
    with pytest.raises(ValueError, match="'remax' needs `baselines`"):
        make_prepare(Algorithm("remax"))(inputs())


# The log-ratios of policy to reference: means .4 and .2 over the trained tokens of each sequence, .3 over sequences.
KL = np.array([[0.4, 0.6, 0.2], [0.1, 0.3, 50.0]], np.float32)


def test_kl_in_the_reward_is_taken_from_every_trained_token():
    p = Algorithm("reinforce_plus_plus", use_kl_in_reward=True, kl_penalty="kl")
    prepared, metrics = make_prepare(p)(inputs(ref_logprobs=LOGPROBS - KL))
    np.testing.assert_allclose(prepared.rewards_sum, [1.0 - 0.12, 0.0 - 0.04], **CLOSE)
    np.testing.assert_allclose(prepared.returns, [[0.88, 0.92, 0.98], [-0.04, -0.03, 0.0]], **CLOSE)
    assert metrics["actor/reward_kl_penalty"] == pytest.approx(0.3, rel=1e-5)
    assert metrics["actor/reward_kl_penalty_coeff"] == pytest.approx(0.1)
    assert float(prepared.kl_coef) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("target_kl", "next_coef"),
    [
        (0.1, 0.104),  # three times the target: the error is clipped to .2, and .1 * (1 + .2 * 2 sequences / 10)
        (0.25, 0.104),  # .3 / .25 - 1 = .2
        (0.3 / 1.1, 0.102),  # .1 above the target
        (1.0, 0.096),  # far below: clipped to -.2
    ],
)
def test_an_adaptive_coefficient_moves_towards_the_target_after_it_was_used(target_kl, next_coef):
    p = Algorithm(
        "grpo", use_kl_in_reward=True, kl_penalty="kl",
        kl_ctrl=KLCtrl("adaptive", target_kl=target_kl, horizon=10),
    )  # fmt: skip
    prepared, metrics = make_prepare(p)(inputs(ref_logprobs=LOGPROBS - KL))
    assert float(prepared.kl_coef) == pytest.approx(next_coef, rel=1e-5)
    assert metrics["actor/reward_kl_penalty_coeff"] == pytest.approx(0.1)
    np.testing.assert_allclose(prepared.rewards_sum, [0.88, -0.04], **CLOSE)


def test_without_kl_in_the_reward_the_coefficient_stays():
    prepared, metrics = make_prepare(Algorithm("grpo", kl_ctrl=KLCtrl("adaptive")))(inputs())
    assert float(prepared.kl_coef) == pytest.approx(0.1)
    assert not any(name.startswith("actor/") for name in metrics)


# The trainer gives these tokens 3, 1/2, 1 and 1, 8 times the probability that the engine gave them.
RATIO = np.array([[3.0, 0.5, 1.0], [1.0, 8.0, 40.0]])
APART = {"rollout": LOGPROBS - np.log(RATIO)}


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"rollout_is": "token"}, [[2.0, 0.5, 1.0], [1.0, 2.0, 0.0]]),
        ({"rollout_is": "token", "rollout_is_threshold": 4.0}, [[3.0, 0.5, 1.0], [1.0, 4.0, 0.0]]),
        ({"rollout_is": "token", "rollout_is_threshold": "0.8_4"}, [[3.0, 0.0, 1.0], [1.0, 0.0, 0.0]]),
        ({"rollout_is": "sequence", "rollout_is_threshold": 5.0}, [[1.5, 1.5, 1.5], [5.0, 5.0, 0.0]]),
        (
            {"rollout_is": "token", "rollout_is_batch_normalize": True},  # the mean weight is 6.5 / 5
            [[2.0 / 1.3, 0.5 / 1.3, 1.0 / 1.3], [1.0 / 1.3, 2.0 / 1.3, 0.0]],
        ),
    ],
)
def test_importance_weights_are_truncated_or_cut_to_the_band(settings, weights):
    prepared, metrics = make_prepare(corrected("grpo", **settings))(inputs(**APART))
    np.testing.assert_allclose(prepared.rollout_weights, weights, **CLOSE)
    np.testing.assert_array_equal(prepared.mask, MASK)
    assert metrics["rollout_corr/rollout_is_mean"] > 0


def test_rejected_tokens_leave_the_mask_and_have_no_advantage():
    p = corrected("rloo", rollout_rs="token_k1", rollout_rs_threshold="0.4_2.5")
    given = inputs(scores=(1.0, 0.0), group=(0, 0), **APART)
    prepared, metrics = make_prepare(p)(given)
    np.testing.assert_array_equal(prepared.mask, [[False, True, True], [True, False, False]])
    np.testing.assert_allclose(prepared.advantages, [[0.0, 1.0, 1.0], [-1.0, 0.0, 0.0]], **CLOSE)
    np.testing.assert_allclose(prepared.returns, prepared.advantages)
    np.testing.assert_allclose(prepared.rewards_sum, [1.0, 0.0])
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(2 / 5)
    np.testing.assert_array_equal(given.mask, MASK)


def test_a_rejected_sequence_still_counts_in_the_mean_of_its_group():
    p = replace(corrected("grpo", rollout_rs="seq_max_k2", rollout_rs_threshold=1.0), norm_adv_by_std_in_grpo=False)
    prepared, _ = make_prepare(p)(inputs(scores=(1.0, 0.0), group=(0, 0), **APART))
    np.testing.assert_allclose(prepared.advantages, [[0.5, 0.5, 0.5], [0.0, 0.0, 0.0]], **CLOSE)


def test_with_bypass_nothing_is_compared_and_nothing_corrected():
    p = corrected("grpo", rollout_is="token", rollout_rs="token_k1", rollout_rs_threshold=1.5, bypass_mode=True)
    prepared, metrics = make_prepare(p)(inputs())
    np.testing.assert_array_equal(prepared.mask, MASK)
    np.testing.assert_array_equal(prepared.rollout_weights, np.ones((2, 3)))
    assert metrics == {}


def test_the_gap_to_the_engine_is_measured_even_where_it_is_not_corrected():
    _, metrics = make_prepare(Algorithm("grpo"))(inputs(**APART))
    assert {
        "rollout_corr/kl", "rollout_corr/k3_kl", "rollout_corr/training_ppl", "rollout_corr/rollout_ppl",
        "training/rollout_probs_diff_mean", "training/rollout_probs_diff_max",
        "training/rollout_actor_probs_pearson_corr",
    } <= metrics.keys()  # fmt: skip
    assert metrics["rollout_corr/kl"] == pytest.approx(-np.log(RATIO[MASK]).mean(), rel=1e-4)
    assert all(type(value) is float and np.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize(
    ("algorithm", "sentence"),
    [
        (Algorithm("grop"), "Unknown algorithm.adv_estimator 'grop'. Did you mean 'grpo'?"),
        (Algorithm(kl_penalty="low_var"), "Unknown algorithm.kl_penalty 'low_var'. Did you mean 'low_var_kl'?"),
        (
            Algorithm(kl_ctrl=KLCtrl("adaptiv")),
            "Unknown algorithm.kl_ctrl.type 'adaptiv'. Did you mean 'adaptive'?",
        ),
        (Algorithm("/nowhere/mine.py:f"), "algorithm.adv_estimator /nowhere/mine.py:f: there is no file"),
        (
            corrected("grpo", rollout_is="token", rollout_is_threshold="2_1"),
            "rollout_correction: Threshold '2_1' must be",
        ),
        (
            corrected("grpo", rollout_rs="tokenk1", rollout_rs_threshold=2),
            "rollout_correction: Unknown rejection criterion 'tokenk1'",
        ),
    ],
)
def test_what_is_unknown_is_refused_before_any_step(algorithm, sentence):
    with pytest.raises(ValueError) as caught:
        check_algorithm(algorithm)
    assert sentence in str(caught.value)
