"""Advantage estimators: numbers worked by hand and what must not matter (order of responses, labels of groups)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms import advantages as estimators
from jaxrl.algorithms.advantages import ADVANTAGES
from jaxrl.algorithms.choose import bind

GROUPED = ["grpo", "rloo", "opo", "gpg", "reinforce_plus_plus_baseline"]

# Five responses to two prompts, scattered: prompt 7 scored 1, 0, 0.5; prompt 3 scored 2, 1. Lengths 1, 3, 2, 2, 1.
SCORES = jnp.array([1.0, 2.0, 0.0, 1.0, 0.5])
GROUP = jnp.array([7, 3, 7, 3, 7])
MASK = jnp.arange(3) < jnp.array([1, 3, 2, 2, 1])[:, None]


place_scores = jax.jit(estimators.place_scores)
grpo = jax.jit(estimators.grpo, static_argnames="norm_by_std")
gae, rloo, opo, gpg = (jax.jit(ADVANTAGES[name]) for name in ("gae", "rloo", "opo", "gpg"))
remax, reinforce_plus_plus = jax.jit(ADVANTAGES["remax"]), jax.jit(ADVANTAGES["reinforce_plus_plus"])


def per_response(advantages):
    """The advantage of each response's first token."""
    return np.asarray(advantages[:, 0])


def test_a_score_stands_on_the_last_trained_token():
    mask = jnp.array([[True, True, False], [True, False, True], [False, False, False]])
    rewards = place_scores(jnp.array([0.5, 1.7, -0.25]), mask)
    np.testing.assert_allclose(rewards, [[0, 0.5, 0], [0, 0, 1.7], [0, 0, -0.25]])


def test_fractional_scores_are_not_truncated_and_integer_scores_become_floats():
    assert place_scores(jnp.array([0.5] * 5), MASK).sum() == 2.5
    whole = place_scores(jnp.array([1, 2, 0, 1, 0]), MASK)
    assert whole.dtype == jnp.float32
    advantages, _ = grpo(whole.astype(jnp.int32), MASK, group=GROUP, norm_by_std=False)
    np.testing.assert_allclose(per_response(advantages), [2 / 3, 0.5, -1 / 3, -0.5, -1 / 3], atol=1e-6)


def test_gae_is_the_recursion_worked_by_hand():
    rewards = jnp.array([[0.0, 0.0, 1.0]])
    values = jnp.array([[0.5, 0.25, 0.5]])
    _, returns = gae(rewards, jnp.ones((1, 3), bool), values=values, gamma=0.5, lam=0.5)
    # A_3 = 1 - 0.5 = 0.5;  A_2 = 0.25 - 0.25 + 0.25 * 0.5 = 0.125;  A_1 = 0.125 - 0.5 + 0.25 * 0.125 = -0.34375
    np.testing.assert_allclose(returns, [[0.5 - 0.34375, 0.25 + 0.125, 0.5 + 0.5]], rtol=1e-6)


def test_gae_looks_across_tool_tokens_as_if_they_were_not_there():
    rewards, values = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.5, 0.25, 0.5]])
    _, dense = gae(rewards, jnp.ones((1, 3), bool), values=values, gamma=0.9, lam=0.8)
    with_hole = jnp.array([[True, False, False, True, True]])
    rewards, values = jnp.array([[0.0, 9.0, 9.0, 0.0, 1.0]]), jnp.array([[0.5, jnp.nan, 9.0, 0.25, 0.5]])
    advantages, returns = gae(rewards, with_hole, values=values, gamma=0.9, lam=0.8)
    np.testing.assert_allclose(returns[with_hole], dense[0], rtol=1e-6)
    np.testing.assert_allclose(advantages[with_hole].mean(), 0.0, atol=1e-6)


def test_grpo_standardises_within_the_group():
    rewards = place_scores(SCORES, MASK)
    advantages, _ = grpo(rewards, MASK, group=GROUP)
    deviation = np.sqrt(0.5)  # of 2 and 1, unbiased
    np.testing.assert_allclose(per_response(advantages), [1, 0.5 / deviation, -1, -0.5 / deviation, 0], atol=1e-5)
    centred, _ = grpo(rewards, MASK, group=GROUP, norm_by_std=False)
    np.testing.assert_allclose(per_response(centred), [0.5, 0.5, -0.5, -0.5, 0], atol=1e-6)


@pytest.mark.parametrize("score", [0.1, 0.7, 1 / 3])
def test_a_group_of_equal_scores_teaches_nothing(score):
    """Float32 rounding of the group mean must not come back as an advantage after division by a deviation of zero."""
    mask = jnp.ones((7, 1), bool)
    advantages, _ = grpo(jnp.full((7, 1), score), mask, group=jnp.zeros(7, int))
    np.testing.assert_allclose(advantages, 0.0, atol=1e-6)


def test_rloo_subtracts_the_mean_of_the_other_responses():
    advantages, _ = rloo(place_scores(SCORES, MASK), MASK, group=GROUP)
    np.testing.assert_allclose(per_response(advantages), [1 - 0.25, 2 - 1, 0 - 0.75, 1 - 2, 0.5 - 0.5], atol=1e-6)


def test_opo_weighs_its_baseline_by_length():
    advantages, _ = opo(place_scores(SCORES, MASK), MASK, group=GROUP)
    seven, three = (1 * 1 + 2 * 0 + 1 * 0.5) / 4, (3 * 2 + 2 * 1) / 5
    np.testing.assert_allclose(per_response(advantages), SCORES - np.array([seven, three, seven, three, seven]))


def test_gpg_makes_up_for_responses_without_a_score():
    advantages, _ = gpg(place_scores(SCORES, MASK), MASK, group=GROUP)
    np.testing.assert_allclose(per_response(advantages), 5 / 4 * np.array([0.5, 0.5, -0.5, -0.5, 0]), atol=1e-6)


def test_remax_subtracts_the_greedy_score():
    advantages, returns = remax(place_scores(SCORES, MASK), MASK, baselines=jnp.full(5, 0.25))
    np.testing.assert_allclose(per_response(advantages), SCORES - 0.25)
    np.testing.assert_allclose(per_response(returns), SCORES)


def test_reinforce_plus_plus_discounts_towards_the_score():
    _, returns = reinforce_plus_plus(place_scores(SCORES, MASK), MASK, gamma=0.5)
    np.testing.assert_allclose(returns, [[1, 0, 0], [0.5, 1, 2], [0, 0, 0], [0.5, 1, 0], [0.5, 0, 0]])


@pytest.mark.parametrize("name", ["grpo", "rloo", "opo", "gpg"])
def test_a_response_alone_in_its_group_keeps_its_score(name):
    advantages, _ = jax.jit(ADVANTAGES[name])(jnp.array([[0.0, 3.0]]), jnp.array([[True, True]]), group=jnp.array([4]))
    np.testing.assert_allclose(advantages, [[3.0, 3.0]], rtol=1e-5)


@pytest.mark.parametrize("name", GROUPED)
def test_neither_the_order_of_responses_nor_the_labels_of_groups_matter(name):
    estimate = jax.jit(ADVANTAGES[name])
    rewards = place_scores(SCORES, MASK)
    expected, _ = estimate(rewards, MASK, group=GROUP)
    order = jnp.array([4, 2, 0, 3, 1])
    shuffled, _ = estimate(rewards[order], MASK[order], group=GROUP[order])
    np.testing.assert_allclose(shuffled, expected[order], atol=1e-6)
    relabelled, _ = estimate(rewards, MASK, group=jnp.where(GROUP == 7, -2_000_000, 40))
    np.testing.assert_allclose(relabelled, expected, atol=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_every_estimator_is_called_the_same_way(name):
    """The trainer offers everything it has; each estimator takes what it names."""
    values = jnp.zeros_like(MASK, jnp.float32)
    estimator = bind(ADVANTAGES[name], group=GROUP, values=values, baselines=SCORES, gamma=1.0, lam=0.95)
    advantages, returns = jax.jit(estimator)(place_scores(SCORES, MASK), MASK)
    assert advantages.shape == returns.shape == MASK.shape
    assert advantages.dtype == jnp.float32
    assert jnp.all(jnp.isfinite(advantages[MASK]))
