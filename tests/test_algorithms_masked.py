"""Reductions over trained tokens: worked numbers, indifference to what lies under the mask, packed against padded."""

import jax.numpy as jnp
import numpy as np

from jaxrl.algorithms import masked

MASK = jnp.array([[True, True, False], [True, False, False], [False, False, False]])
X = jnp.array([[1.0, 3.0, jnp.nan], [5.0, jnp.inf, jnp.nan], [jnp.nan, 7.0, 7.0]])

# The trained tokens of MASK in two packed rows, in another order: sequence 1, then 0 with its hole kept, then 2.
PACKED_X = jnp.array([[5.0, 1.0, 3.0, jnp.nan], [jnp.nan, 7.0, 7.0, jnp.nan]])
PACKED_MASK = jnp.array([[True, True, True, False], [False, False, False, False]])
PACKED_IDS = jnp.array([[1, 0, 0, 0], [2, 2, 2, 3]])


def test_sum_mean_and_variance_see_only_trained_tokens():
    np.testing.assert_allclose(masked.masked_sum(X, MASK), 9.0)
    np.testing.assert_allclose(masked.masked_mean(X, MASK), 3.0)
    np.testing.assert_allclose(masked.masked_var(X, MASK), 4.0)  # ((1-3)^2 + 0 + (5-3)^2) / (3 - 1)


def test_reductions_of_an_empty_mask_are_zero():
    nothing = jnp.zeros_like(MASK)
    for reduce in (masked.masked_sum, masked.masked_mean, masked.masked_var):
        assert reduce(X, nothing) == 0.0


def test_whitened_tokens_have_mean_zero_and_unit_variance():
    whitened = masked.masked_whiten(X, MASK)
    np.testing.assert_allclose(whitened[MASK], [-1.0, 0.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(masked.masked_whiten(X, MASK, shift_mean=False)[MASK], [2.0, 3.0, 4.0], atol=1e-6)


def test_integers_and_booleans_are_reduced_as_floating_point():
    assert masked.masked_mean(jnp.array([1, 2]), jnp.array([True, True])) == 1.5
    assert masked.masked_mean(jnp.array([True, False]), jnp.array([True, True])) == 0.5


def test_half_precision_is_summed_in_float32():
    ones = jnp.ones(4096, jnp.bfloat16)
    total = masked.masked_sum(ones, jnp.ones(4096, bool))
    assert total.dtype == jnp.float32
    assert total == 4096.0


def test_a_sequence_sum_is_handed_to_every_token_of_its_row():
    np.testing.assert_allclose(masked.sequence_sum(X, MASK), [[4.0] * 3, [5.0] * 3, [0.0] * 3])
    np.testing.assert_allclose(masked.sequence_mean(X, MASK), [[2.0] * 3, [5.0] * 3, [0.0] * 3])


def test_sequence_sums_of_packed_rows_equal_those_of_padded_rows():
    np.testing.assert_allclose(
        masked.sequence_sum(PACKED_X, PACKED_MASK, PACKED_IDS), [[5.0, 4.0, 4.0, 4.0], [0.0, 0.0, 0.0, 0.0]]
    )
    np.testing.assert_allclose(masked.sequence_lengths(PACKED_MASK, PACKED_IDS), [[1.0, 2.0, 2.0, 2.0], [0.0] * 4])


def test_sequence_ids_may_be_any_integers():
    sums = masked.sequence_sum(PACKED_X, PACKED_MASK, PACKED_IDS * 1_000_003 - 7)
    np.testing.assert_allclose(sums, masked.sequence_sum(PACKED_X, PACKED_MASK, PACKED_IDS))


def test_sequences_without_a_trained_token_are_not_counted():
    assert masked.count_sequences(MASK) == 2
    assert masked.count_sequences(PACKED_MASK, PACKED_IDS) == 2
