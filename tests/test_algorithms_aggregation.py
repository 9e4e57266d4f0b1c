"""The five aggregations: worked numbers, micro-batches against the whole, packed against padded, one's own mode."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.aggregation import AGGREGATIONS, aggregate_loss, aggregation_weights

LOSS = jnp.array([[1.0, 2.0, 3.0, 100.0], [4.0, 100.0, 6.0, 100.0], [100.0, 100.0, 100.0, 100.0]])
MASK = jnp.array([[True, True, True, False], [True, False, True, False], [False] * 4])  # a tail, a hole, an empty row

PACKED_LOSS = jnp.array([[1.0, 2.0, 3.0, 4.0, 100.0, 6.0, 100.0]])
PACKED_MASK = jnp.array([[True, True, True, True, False, True, False]])
PACKED_IDS = jnp.array([[8, 8, 8, 5, 5, 5, 9]])

WORKED = {
    "token-mean": 16.0 / 5,
    "token-sum": 16.0,
    "seq-mean-token-sum": (6.0 + 10.0) / 2,
    "seq-mean-token-sum-norm": (6.0 + 10.0) / 2 / 4,
    "seq-mean-token-mean": (2.0 + 5.0) / 2,
}


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_aggregated_loss_is_the_number_worked_by_hand(mode):
    np.testing.assert_allclose(aggregate_loss(LOSS, MASK, mode), WORKED[mode], rtol=1e-6)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_packed_loss_equals_padded_loss(mode):
    packed = aggregate_loss(PACKED_LOSS, PACKED_MASK, mode, sequence_ids=PACKED_IDS, loss_scale_factor=4)
    np.testing.assert_allclose(packed, WORKED[mode], rtol=1e-6)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_losses_of_micro_batches_add_up_to_the_loss_of_the_mini_batch(mode):
    total = 0.0
    for rows in ([1], [2, 0]):
        rows = jnp.array(rows)
        weights = aggregation_weights(MASK[rows], mode, num_tokens=5, num_sequences=2, loss_scale_factor=4)
        total += jnp.sum(LOSS[rows] * weights)
    np.testing.assert_allclose(total, WORKED[mode], rtol=1e-6)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_a_mini_batch_without_trained_tokens_has_the_loss_zero(mode):
    assert aggregate_loss(LOSS, jnp.zeros_like(MASK), mode) == 0.0


def test_a_function_of_ones_own_can_take_the_place_of_a_mode():
    def by_square_root_of_length(mask, *, lengths, num_sequences):
        return mask / jnp.sqrt(lengths) / num_sequences

    worked = (6.0 / np.sqrt(3.0) + 10.0 / np.sqrt(2.0)) / 2
    np.testing.assert_allclose(aggregate_loss(LOSS, MASK, by_square_root_of_length), worked, rtol=1e-6)


def test_an_unknown_mode_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="Did you mean 'token-mean'.*seq-mean-token-sum-norm"):
        aggregate_loss(LOSS, MASK, "token_mean")


def test_the_constant_length_mode_asks_for_its_constant():
    with pytest.raises(ValueError, match="loss_scale_factor"):
        aggregation_weights(MASK, "seq-mean-token-sum-norm", num_tokens=5, num_sequences=2)
