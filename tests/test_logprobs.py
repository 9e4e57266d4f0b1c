"""Chunked logprobs and entropy: equal to the plain formula in value and gradient, and never all logits at once."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.models.logprobs import target_logprobs

R, T, D, V, S = 3, 12, 8, 21, 10  # S is no multiple of the chunks below
NUM_SLOTS = 7


def draw(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


HIDDEN, TABLE = draw(R, T, D, seed=0), draw(V, D, seed=1)
COLUMNS = np.random.default_rng(2).integers(0, T, (R, S))  # with repeats: two targets may be predicted from one state
IDS = np.random.default_rng(3).integers(0, V, (R, S))
TARGETS = jnp.asarray(COLUMNS), jnp.asarray(IDS)
WEIGHTS = draw(2, R, S, seed=4) * (np.arange(S) < NUM_SLOTS)  # of logprobs and entropies in the loss


def evaluate(run, hidden, table, num_slots, weights):
    """((logprobs, entropy), gradients of their weighted sum)."""
    values, pullback = jax.vjp(partial(run, num_slots=num_slots), hidden, table)
    return values, pullback(tuple(weights.astype(values[0].dtype)))


@partial(jax.jit, static_argnums=4)
def _plain(hidden, table, num_slots, weights, temperature):
    def run(hidden, table, num_slots):
        picked = jnp.take_along_axis(hidden, COLUMNS[..., None], axis=1)
        logp = jax.nn.log_softmax(picked @ table.T / temperature)
        logprobs = jnp.take_along_axis(logp, IDS[..., None], axis=-1)[..., 0]
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        return tuple(jnp.where(jnp.arange(S) < num_slots, x, 0.0) for x in (logprobs, entropy))

    return evaluate(run, hidden, table, num_slots, weights)


@partial(jax.jit, static_argnums=(4, 5))
def _chunked(hidden, table, num_slots, weights, temperature, chunk):
    def run(hidden, table, num_slots):
        return target_logprobs(hidden, table, *TARGETS, num_slots, temperature=temperature, chunk=chunk)[:2]

    return evaluate(run, hidden, table, num_slots, weights)


def plain(hidden, table, num_slots=NUM_SLOTS, weights=WEIGHTS, temperature=1.0):
    """By the formula, all logits at once."""
    return _plain(hidden, table, num_slots, weights, temperature)


def chunked(hidden, table, num_slots=NUM_SLOTS, weights=WEIGHTS, temperature=1.0, chunk=4):
    """As the training step does it."""
    return _chunked(hidden, table, num_slots, weights, temperature, chunk)


def check(got, expected, num_slots: int = NUM_SLOTS) -> None:
    """Compare the slots in use and the gradients, to float32 rounding: 2e-6 in logits of 20, added up in gradients."""
    for ours, theirs in zip(got[0], expected[0], strict=True):
        np.testing.assert_allclose(ours[:, :num_slots], theirs[:, :num_slots], rtol=5e-6, atol=1e-5)
    for ours, theirs in zip(got[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=5e-6, atol=3e-5)


@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_a_bias_of_the_head_and_a_softcap_of_its_logits_have_the_gradient_of_the_plain_formula(softcap):
    bias = draw(V, seed=5)

    def plain(hidden, table, bias):
        logits = jnp.take_along_axis(hidden, COLUMNS[..., None], axis=1) @ table.T + bias
        logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
        logp = jax.nn.log_softmax(logits / 0.6)
        used = jnp.arange(S) < NUM_SLOTS
        logprobs = jnp.take_along_axis(logp, IDS[..., None], axis=-1)[..., 0]
        return tuple(jnp.where(used, x, 0.0) for x in (logprobs, -jnp.sum(jnp.exp(logp) * logp, axis=-1)))

    def chunked(hidden, table, bias):
        return target_logprobs(
            hidden, table, *TARGETS, jnp.int32(NUM_SLOTS), bias=bias, softcap=softcap, temperature=0.6, chunk=4
        )[:2]

    @partial(jax.jit, static_argnums=0)
    def evaluate(run, *arrays):
        values, pullback = jax.vjp(run, *arrays)
        return values, pullback(tuple(WEIGHTS))

    got, expected = evaluate(chunked, HIDDEN, TABLE, bias), evaluate(plain, HIDDEN, TABLE, bias)
    assert len(got[1]) == 3 and abs(got[1][2]).max() > 0.1
    check(got, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_equal_the_plain_formula_in_float64(temperature):
    with jax.enable_x64(True):
        expected = plain(HIDDEN.astype(np.float64), TABLE.astype(np.float64), temperature=temperature)
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(expected))
    got = chunked(HIDDEN, TABLE, temperature=temperature)
    check(got, expected)


@pytest.mark.parametrize("only", [0, 1], ids=["logprobs", "entropy"])
def test_each_of_the_two_outputs_has_its_own_gradient(only):
    weights = WEIGHTS * (np.arange(2) == only)[:, None, None]
    check(chunked(HIDDEN, TABLE, weights=weights), plain(HIDDEN, TABLE, weights=weights))


@pytest.mark.parametrize("chunk", [1, 3, 64, None])
def test_the_size_of_the_chunks_changes_nothing(chunk):
    check(chunked(HIDDEN, TABLE, chunk=chunk), chunked(HIDDEN, TABLE, chunk=4))


@pytest.mark.parametrize("num_slots", [0, 4, 8])
def test_chunks_of_slots_that_are_not_in_use_are_zero_and_give_no_gradient(num_slots):
    weights = np.ones_like(WEIGHTS)  # of the slots behind, too: they must not be used
    got = chunked(HIDDEN, TABLE, num_slots, weights)
    assert not any(values[:, num_slots:].any() for values in got[0])
    check(got, plain(HIDDEN, TABLE, num_slots, weights), num_slots=S)


def test_huge_logits_stay_finite():
    (logprobs, entropy), gradients = chunked(1e3 * HIDDEN, 10 * TABLE)
    assert all(np.isfinite(x).all() for x in (logprobs, entropy, *gradients))
    assert (logprobs <= 0).all() and (entropy >= 0).all()


def test_from_bfloat16_hidden_states_come_float32_logprobs():
    hidden = jnp.asarray(HIDDEN, jnp.bfloat16)
    (logprobs, entropy), gradients = chunked(hidden, TABLE)
    assert logprobs.dtype == entropy.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]
    of_table = jnp.asarray(gradients[1])  # summed in float32, and not rounded before micro-batches are added
    assert np.mean(of_table == of_table.astype(jnp.bfloat16).astype(jnp.float32)) < 0.5
    # Products of bfloat16 numbers are exact in float32: the values are those of the rounded inputs.
    expected, _ = plain(hidden.astype(jnp.float32), jnp.asarray(TABLE, jnp.bfloat16).astype(jnp.float32))
    check(((logprobs, entropy), ()), (expected, ()))


def test_never_are_all_logits_in_memory_forward_or_backward():
    # A real size, of which nothing is computed here. All logits in float32 would be 10 GB.
    W, T, D, V = 1, 16_384, 896, 151_936
    hidden = jax.ShapeDtypeStruct((W, T, D), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((V, D), jnp.float32)
    slots = jax.ShapeDtypeStruct((W, T), jnp.int32)

    def loss(hidden, table, columns, ids, num_slots):
        keep = (50, 0.9)
        logprobs, entropy, log_kept = target_logprobs(hidden, table, columns, ids, num_slots, keep=keep)
        return jnp.sum(logprobs + entropy + log_kept)

    program = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, table, slots, slots, jnp.int32(0)))
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\[(\d+(?:,\d+)*)\]", program)}
    assert any(shape[-1] == V and len(shape) > 1 for shape in shapes), "no logits: the program is not read right"
    assert max(map(math.prod, shapes)) <= W * T * V // 16
