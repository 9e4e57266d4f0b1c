"""KL estimators, the KL term in the reward and the controllers of its coefficient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.choose import bind
from jaxrl.algorithms.kl import KL_CONTROLLERS, KL_ESTIMATORS, mean_kl, penalise_rewards

LOGPROBS = jnp.array([-1.0, -2.0, -0.5])
REF_LOGPROBS = jnp.array([-1.0, -1.5, -1.5])  # d = 0, -0.5, 1


def test_estimates_are_the_numbers_worked_by_hand():
    worked = {
        "k1": [0.0, -0.5, 1.0],
        "abs": [0.0, 0.5, 1.0],
        "k2": [0.0, 0.125, 0.5],
        "k3": [0.0, np.exp(0.5) - 0.5 - 1, np.exp(-1.0) + 1 - 1],
    }
    for name, values in worked.items():
        np.testing.assert_allclose(KL_ESTIMATORS[name](LOGPROBS, REF_LOGPROBS), values, atol=1e-6)
        np.testing.assert_allclose(KL_ESTIMATORS[f"{name}+"](LOGPROBS, REF_LOGPROBS), values, atol=1e-6)


def test_verls_other_names_mean_the_same():
    for alias, name in (("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3")):
        assert KL_ESTIMATORS[alias] is KL_ESTIMATORS[name]


@pytest.mark.parametrize("name", [name for name in KL_ESTIMATORS if name.endswith("+")])
def test_straight_through_estimates_have_the_gradient_of_k2(name):
    gradient = jax.grad(lambda x: KL_ESTIMATORS[name](x, REF_LOGPROBS).sum())(LOGPROBS)
    np.testing.assert_allclose(gradient, LOGPROBS - REF_LOGPROBS, atol=1e-6)


def test_k3_stays_finite_for_hopeless_tokens():
    value, gradient = jax.value_and_grad(lambda x: KL_ESTIMATORS["k3"](x, jnp.zeros(1)).sum())(jnp.array([-1e4]))
    assert value == 10.0
    assert gradient == 0.0


def test_the_mean_kl_counts_every_sequence_the_same():
    kl = jnp.array([[1.0, 3.0, 9.0], [5.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = jnp.array([[True, True, False], [True, False, False], [False, False, False]])
    np.testing.assert_allclose(mean_kl(kl, mask), (2.0 + 5.0) / 2, rtol=1e-6)


def test_kl_in_the_reward_is_charged_on_trained_tokens_only():
    rewards = jnp.array([[0, 0, 1]])
    kl, mask = jnp.array([[0.5, jnp.nan, 0.25]]), jnp.array([[True, False, True]])
    np.testing.assert_allclose(penalise_rewards(rewards, kl, mask, coef=0.1), [[-0.05, 0.0, 0.975]], rtol=1e-6)


def test_the_adaptive_coefficient_moves_towards_the_target_and_by_at_most_a_fifth():
    update = bind(KL_CONTROLLERS["adaptive"], num_sequences=100, target_kl=0.1, horizon=1000)
    np.testing.assert_allclose(update(0.5, 0.11), 0.5 * (1 + 0.1 * 0.1), rtol=1e-6)
    np.testing.assert_allclose(update(0.5, 100.0), 0.5 * (1 + 0.2 * 0.1), rtol=1e-6)
    np.testing.assert_allclose(update(0.5, 0.0), 0.5 * (1 - 0.2 * 0.1), rtol=1e-6)


def test_the_fixed_coefficient_stays():
    assert bind(KL_CONTROLLERS["fixed"], num_sequences=100, target_kl=0.1)(0.5, 100.0) == 0.5


def test_a_run_resumed_from_the_saved_coefficient_goes_on_bit_for_bit():
    update = jax.jit(bind(KL_CONTROLLERS["adaptive"], num_sequences=64))
    measured = [0.02, 0.5, 0.13, 0.09]
    uninterrupted = jnp.float32(0.001)
    for kl in measured:
        uninterrupted = update(uninterrupted, kl)
    saved = update(update(jnp.float32(0.001), measured[0]), measured[1])
    restored = jnp.asarray(np.frombuffer(np.asarray(saved).tobytes(), np.float32)[0])
    assert update(update(restored, measured[2]), measured[3]) == uninterrupted
