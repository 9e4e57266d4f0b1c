"""Rollout correction: weights, rejection and the metrics of the gap between engine and trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.correction import (
    REJECTION_CRITERIA,
    importance_weights,
    mismatch_metrics,
    parse_band,
    parse_rejection,
    rejection_mask,
)

# Ratios p_old / p_rollout of three sequences; the last one has no trained token, and NaN lies under the mask.
RATIOS = np.array([[1.0, 4.0, 0.25, 9.9], [1.5, 9.9, 1.2, 9.9], [9.9, 9.9, 9.9, 9.9]])
MASK = jnp.array([[True, True, True, False], [True, False, True, False], [False] * 4])
ROLLOUT = jnp.where(MASK, -3.0, jnp.nan)
OLD = ROLLOUT + jnp.log(jnp.array(RATIOS, jnp.float32))


def test_token_weights_are_truncated_ratios():
    weights, metrics = importance_weights(OLD, ROLLOUT, MASK, level="token", threshold=2.0)
    np.testing.assert_allclose(weights, [[1, 2, 0.25, 0], [1.5, 0, 1.2, 0], [0] * 4], rtol=1e-5)
    applied = np.array([1, 2, 0.25, 1.5, 1.2])
    np.testing.assert_allclose(metrics["rollout_corr/rollout_is_mean"], applied.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["rollout_corr/rollout_is_std"], applied.std(), rtol=1e-5)
    np.testing.assert_allclose(metrics["rollout_corr/rollout_is_max"], 2.0, rtol=1e-5)
    np.testing.assert_allclose(metrics["rollout_corr/rollout_is_min"], 0.25, rtol=1e-5)
    np.testing.assert_allclose(metrics["rollout_corr/rollout_is_ratio_fraction_high"], 1 / 5, rtol=1e-5)
    np.testing.assert_allclose(metrics["rollout_corr/rollout_is_ratio_fraction_low"], 1 / 5, rtol=1e-5)
    effective = applied.mean() ** 2 / (applied**2).mean()
    np.testing.assert_allclose(metrics["rollout_corr/rollout_is_eff_sample_size"], effective, rtol=1e-5)


def test_a_band_drops_the_tokens_outside_it():
    weights, metrics = importance_weights(OLD, ROLLOUT, MASK, level="token", threshold="0.5_2.0")
    np.testing.assert_allclose(weights, [[1, 0, 0, 0], [1.5, 0, 1.2, 0], [0] * 4], rtol=1e-5)
    np.testing.assert_allclose(metrics["rollout_corr/rollout_is_oob_ratio"], 2 / 5, rtol=1e-5)


def test_sequence_weights_are_products_of_token_ratios():
    weights, _ = importance_weights(OLD, ROLLOUT, MASK, level="sequence", threshold=1.5)
    np.testing.assert_allclose(weights, [[1, 1, 1, 0], [1.5, 0, 1.5, 0], [0] * 4], rtol=1e-5)


@pytest.mark.parametrize("level, mean", [("token", 5.95 / 5), ("sequence", (1 + 1.8) / 2)])
def test_normalised_weights_have_mean_one(level, mean):
    weights, metrics = importance_weights(OLD, ROLLOUT, MASK, level=level, threshold=2.0, batch_normalize=True)
    plain, _ = importance_weights(OLD, ROLLOUT, MASK, level=level, threshold=2.0)
    np.testing.assert_allclose(metrics["rollout_corr/rollout_is_batch_norm_factor"], mean, rtol=1e-5)
    np.testing.assert_allclose(weights, plain / mean, rtol=1e-5)


def test_weights_carry_no_gradient():
    gradient = jax.grad(lambda old: importance_weights(old, ROLLOUT, MASK)[0].sum())(OLD)
    assert jnp.all(gradient == 0)


@pytest.mark.parametrize(
    "criteria, thresholds, kept",
    [
        ("token_k1", "0.5_2.0", [[1, 0, 0], [1, 0, 1]]),
        ("token_k1", 5.0, [[1, 1, 1], [1, 0, 1]]),
        ("token_k2", 0.5, [[1, 0, 0], [1, 0, 1]]),  # ln(4)^2 / 2 = 0.96
        ("token_k3", 1.0, [[1, 0, 1], [1, 0, 1]]),  # 4 - 1 - ln 4 = 1.61; 0.25 - 1 + ln 4 = 0.64
        ("seq_sum_k1", "0.6_1.5", [[1, 1, 1], [0, 0, 0]]),  # on p_rollout / p_old: 1 and 1 / 1.8
        ("seq_mean_k1", "0.7_1.5", [[1, 1, 1], [1, 0, 1]]),
        ("seq_sum_k2", 1.0, [[0, 0, 0], [1, 0, 1]]),
        ("seq_mean_k2", 0.7, [[1, 1, 1], [1, 0, 1]]),
        ("seq_max_k2", 0.7, [[0, 0, 0], [1, 0, 1]]),
        ("seq_max_k3", 1.0, [[0, 0, 0], [1, 0, 1]]),
        ("token_k2,seq_sum_k1", "0.5,0.6_1.5", [[1, 0, 0], [0, 0, 0]]),
    ],
)
def test_rejection_keeps_what_passes_every_criterion(criteria, thresholds, kept):
    mask, metrics = rejection_mask(OLD, ROLLOUT, MASK, criteria=criteria, thresholds=thresholds)
    expected = np.zeros((3, 4), bool)
    expected[:2, :3] = kept
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_allclose(
        metrics["rollout_corr/rollout_rs_masked_fraction"], 1 - expected.sum() / 5, rtol=1e-5, atol=1e-6
    )
    touched = np.any(np.asarray(MASK) & ~expected, axis=1)[:2].mean()
    np.testing.assert_allclose(metrics["rollout_corr/rollout_rs_seq_masked_fraction"], touched, rtol=1e-5)


@pytest.mark.parametrize("criterion", REJECTION_CRITERIA)
def test_nothing_is_rejected_when_engine_and_trainer_agree(criterion):
    mask, metrics = rejection_mask(ROLLOUT, ROLLOUT, MASK, criteria=criterion, thresholds=1.001)
    np.testing.assert_array_equal(mask, MASK)
    assert metrics[f"rollout_corr/rollout_rs_{criterion}_masked_fraction"] == 0.0


def test_mismatch_metrics_are_the_numbers_of_numpy():
    rng = np.random.default_rng(0)
    rollout = -rng.exponential(1.0, (4, 6))
    old = rollout + 0.2 * rng.normal(size=(4, 6))
    mask = np.arange(6) < np.array([6, 3, 1, 0])[:, None]
    metrics = jax.jit(mismatch_metrics)(
        *(jnp.array(np.where(mask, x, np.nan), jnp.float32) for x in (old, rollout)), mask=jnp.array(mask)
    )

    p, q, x = np.exp(old[mask]), np.exp(rollout[mask]), (old - rollout)[mask]
    rows = [(old[b][mask[b]], rollout[b][mask[b]]) for b in range(3)]
    expected = {
        "training/rollout_probs_diff_mean": np.abs(p - q).mean(),
        "training/rollout_probs_diff_max": np.abs(p - q).max(),
        "training/rollout_probs_diff_std": np.abs(p - q).std(ddof=1),
        "training/rollout_actor_probs_pearson_corr": np.corrcoef(p, q)[0, 1],
        "rollout_corr/kl": -x.mean(),
        "rollout_corr/k3_kl": (np.exp(x) - x - 1).mean(),
        "rollout_corr/chi2_token": (np.exp(x) ** 2).mean() - 1,
        "rollout_corr/chi2_seq": np.mean([np.exp((o - r).sum()) ** 2 for o, r in rows]) - 1,
        "rollout_corr/training_ppl": np.mean([np.exp(-o.mean()) for o, _ in rows]),
        "rollout_corr/training_log_ppl": np.mean([-o.mean() for o, _ in rows]),
        "rollout_corr/rollout_ppl": np.mean([np.exp(-r.mean()) for _, r in rows]),
        "rollout_corr/rollout_log_ppl": np.mean([-r.mean() for _, r in rows]),
        "rollout_corr/log_ppl_diff": np.mean([r.mean() - o.mean() for o, r in rows]),
        "rollout_corr/log_ppl_abs_diff": np.mean([abs(r.mean() - o.mean()) for o, r in rows]),
        "rollout_corr/log_ppl_diff_max": np.max([r.mean() - o.mean() for o, r in rows]),
        "rollout_corr/log_ppl_diff_min": np.min([r.mean() - o.mean() for o, r in rows]),
        "rollout_corr/ppl_ratio": np.mean([np.exp(r.mean() - o.mean()) for o, r in rows]),
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_thresholds_are_read_as_verl_writes_them():
    assert parse_band(2) == parse_band(2.0) == parse_band("2.0") == (None, 2.0)
    assert parse_band("0.5_2.0") == (0.5, 2.0)
    low, high = parse_rejection("token_k1", 2.0)["token_k1"]
    np.testing.assert_allclose((low, high), (-np.log(2), np.log(2)))
    assert parse_rejection("token_k2, seq_max_k3", "0.1,0.2") == {"token_k2": (None, 0.1), "seq_max_k3": (None, 0.2)}


@pytest.mark.parametrize("threshold", [0.0, -1.0, "two", "2.0_0.5", "0_2", "1_2_3", "True", "nan"])
def test_a_threshold_that_makes_no_sense_is_an_error(threshold):
    with pytest.raises(ValueError, match="positive number or a band"):
        parse_band(threshold)


@pytest.mark.parametrize(
    "criteria, thresholds, message",
    [
        ("token_k4", 1.0, "Unknown rejection criterion 'token_k4'. Known: token_k1"),
        ("", 1.0, "No rejection criterion"),
        ("token_k1,token_k2,token_k3", "1,2", "2 rejection thresholds for 3 criteria"),
        ("token_k2", "0.5_2.0", "takes one upper bound"),
    ],
)
def test_a_rejection_that_makes_no_sense_is_an_error(criteria, thresholds, message):
    with pytest.raises(ValueError, match=message):
        parse_rejection(criteria, thresholds)


def test_an_unknown_level_is_an_error():
    with pytest.raises(ValueError, match="Unknown rollout correction level 'word'. Known: token, sequence"):
        importance_weights(OLD, ROLLOUT, MASK, level="word")
