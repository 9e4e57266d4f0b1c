"""One token from logits: the frequencies are those of the distribution, and its logprob is the one reported."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from jaxrl.models.truncation import keep_top_k, keep_top_p
from jaxrl.rollout.engine import Sampling
from jaxrl.rollout.sampling import Rule, inverse_cdf, sample

LOGITS = np.array([0.3, -1.0, 2.0, 0.9, -0.2, 1.4, -3.0, 0.0], np.float32)
DRAWS = 40_000


def draw(logits: np.ndarray, *, seed: int = 0, draws: int = DRAWS, **settings) -> tuple[np.ndarray, np.ndarray]:
    """Many draws from one distribution: ids and logprobs."""
    uniform = jax.random.uniform(jax.random.key(seed), (draws,))
    rule = Rule.of(Sampling(1, **settings))
    return jax.tree.map(np.asarray, jax.jit(sample)(jnp.tile(logits, (draws, 1)), uniform, rule))


def expected(logits: np.ndarray, temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0) -> np.ndarray:
    """The distribution, the slow way in float64: temperature, then top-k, then top-p of what is left."""
    logits = logits.astype(np.float64) / temperature
    order = np.argsort(-logits, kind="stable")
    probs = np.exp(logits - logits.max())
    if top_k > 0:
        probs[order[top_k:]] = 0
    probs /= probs.sum()
    before = np.cumsum(probs[order]) - probs[order]
    probs[order[before >= top_p]] = 0
    return probs / probs.sum()


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 3},
    {"top_p": 0.8},
    {"temperature": 1.3, "top_k": 6, "top_p": 0.85},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sampled_frequencies_match_the_distribution(settings):
    probs = expected(LOGITS, **settings)
    ids, _ = draw(LOGITS, **settings)
    counts = np.bincount(ids, minlength=len(LOGITS))
    assert (counts[probs == 0] == 0).all()
    # One fixed seed: this fails for 1 in 1000 seeds, and for a wrong temperature or cut with certainty.
    assert chisquare(counts[probs > 0], DRAWS * probs[probs > 0]).pvalue > 1e-3


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_logprobs_are_those_of_the_distribution_that_was_sampled_from(settings):
    ids, logprobs = draw(LOGITS, draws=500, **settings)
    np.testing.assert_allclose(logprobs, np.log(expected(LOGITS, **settings)[ids]), atol=2e-6)


def test_the_chi_square_test_would_see_a_wrong_temperature():
    ids, _ = draw(LOGITS, temperature=0.95)
    counts = np.bincount(ids, minlength=len(LOGITS))
    assert chisquare(counts, DRAWS * expected(LOGITS)).pvalue < 1e-6


def test_a_vocabulary_of_many_blocks_is_sampled_evenly():
    """1000 words are three whole blocks and a part of one."""
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    ids, _ = draw(logits)
    counts, probs = np.bincount(ids, minlength=1000), expected(logits)
    assert chisquare(counts, DRAWS * probs).pvalue > 1e-3


def test_greedy_takes_the_first_of_the_likeliest_with_logprobs_at_temperature_1():
    logits = np.array([[0.0, 2.0, 2.0, 1.0], [-5.0, -4.0, -3.0, -3.5]], np.float32)
    ids, logprobs = sample(jnp.asarray(logits), jnp.zeros(2), Rule.of(Sampling(1, temperature=0)))
    assert ids.tolist() == [1, 2]
    np.testing.assert_allclose(logprobs, np.asarray(jax.nn.log_softmax(logits))[[0, 1], [1, 2]], atol=1e-6)


def test_top_k_of_1_is_greedy():
    logits = np.random.default_rng(0).normal(size=(64, 700)).astype(np.float32)
    uniform = jax.random.uniform(jax.random.key(0), (64,))
    ids, logprobs = sample(jnp.asarray(logits), uniform, Rule.of(Sampling(1, top_k=1)))
    assert (np.asarray(ids) == logits.argmax(axis=1)).all()
    assert (np.asarray(logprobs) == 0).all()


def test_top_k_keeps_exactly_k_of_different_tokens_and_all_equals_of_the_last():
    logits = jnp.array([[3.0, 1.0, 2.0, -1.0, 0.0], [2.0, 1.0, 1.0, 1.0, -jnp.inf]])
    kept = jnp.isfinite(keep_top_k(logits, jnp.int32(2)))
    assert kept.tolist() == [[True, False, True, False, False], [True, True, True, True, False]]
    assert (keep_top_k(logits, jnp.int32(99)) == logits).all()


def test_top_p_keeps_the_fewest_likeliest_that_hold_the_mass():
    probs = jnp.array([[0.125, 0.5, 0.25, 0.125]])
    for p, kept in ((0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 4)):  # at 0.8 the two of 0.125 are equals
        assert jnp.isfinite(keep_top_p(jnp.log(probs), jnp.float32(p))).sum() == kept, p


def test_top_p_on_a_large_vocabulary_agrees_with_a_sort():
    rng = np.random.default_rng(1)
    logits = (rng.normal(size=(4, 5000)) * 3).astype(np.float32)
    for p in (0.1, 0.9, 0.999):
        kept = np.isfinite(np.asarray(keep_top_p(jnp.asarray(logits), jnp.float32(p)))).sum(axis=1)
        probs = -np.sort(-np.exp(logits.astype(np.float64)), axis=1)
        before = np.cumsum(probs, axis=1) / probs.sum(axis=1, keepdims=True) - probs / probs.sum(axis=1, keepdims=True)
        assert (np.abs(kept - (before < p).sum(axis=1)) <= 1).all()  # sums in float32 may round over the edge


def test_a_token_without_probability_is_never_drawn():
    """However the running sums round: a logprob of -inf would spoil the whole update."""
    rng = np.random.default_rng(2)
    probs = rng.random((2000, 1500)).astype(np.float32) ** 8
    probs[:, 256:512] = 0  # a whole block
    probs[rng.random(probs.shape) < 0.9] = 0
    probs /= probs.sum(axis=1, keepdims=True)
    for uniform in (0.0, np.nextafter(np.float32(1), np.float32(0)), rng.random(2000).astype(np.float32)):
        ids, _ = inverse_cdf(jnp.asarray(probs), jnp.broadcast_to(uniform, 2000).astype(jnp.float32))
        assert (probs[np.arange(2000), np.asarray(ids)] > 0).all()


def test_other_settings_are_not_another_program():
    compiled = jax.jit(lambda *args: sample(*args))
    for settings in (*SETTINGS, {"temperature": 0}):
        compiled(jnp.tile(LOGITS, (4, 1)), jnp.zeros(4), Rule.of(Sampling(1, stop_ids=(1, 2), **settings)))
    assert compiled._cache_size() == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"n": 0}, "n 0"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"top_k": 0}, "top_k 0"),
        ({"top_k": -2}, "top_k -2"),
        ({"temperature": 0.0, "n": 4}, "4 times the same response"),
        ({"stop_ids": (-1,)}, "stop_ids"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_words(settings, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**{"max_tokens": 8} | settings)
