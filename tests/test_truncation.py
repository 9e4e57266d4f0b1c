"""What top-k and top-p leave of a distribution, as the trainer counts it: against the definition, autodiff, the engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_jax_engine import DATA, load, prompts_of

from jaxrl.metrics import gap_metrics
from jaxrl.models.logprobs import target_logprobs
from jaxrl.packing import Sequences, pack
from jaxrl.parallel import make_mesh
from jaxrl.rollout.engine import Sampling
from jaxrl.rollout.jax_engine import JaxEngine
from jaxrl.update import Policy, PolicyLoss, _gap

R, T, D, V, S, USED = 2, 6, 5, 23, 9, 7
RNG = np.random.default_rng(0)
HIDDEN, TABLE = RNG.normal(size=(R, T, D)).astype(np.float32), RNG.normal(size=(V, D)).astype(np.float32)
COLUMNS, IDS = RNG.integers(0, T, (R, S)), RNG.integers(0, V, (R, S))
WEIGHTS = RNG.normal(size=(3, R, S)).astype(np.float32) * (np.arange(S) < USED)  # of logprobs, entropies, log masses


def kept_by_definition(logits: np.ndarray, chosen: int, top_k: int, top_p: float) -> np.ndarray:
    """One row: top-k, then of what that leaves the fewest likeliest that hold `top_p`; and the chosen one."""
    order = np.argsort(-logits)[: top_k if top_k > 0 else None]
    probs = np.exp(logits[order].astype(np.float64))
    before = np.cumsum(probs) - probs
    kept = np.zeros(V, bool)
    kept[order[before < top_p * probs.sum()]] = True
    kept[chosen] = True
    return kept


@pytest.mark.parametrize(("top_k", "top_p"), [(4, 1.0), (-1, 0.8), (6, 0.7)])
def test_the_mass_and_its_gradient_are_those_of_the_definition(top_k, top_p):
    logits = np.einsum("rsd,vd->rsv", np.take_along_axis(HIDDEN, COLUMNS[..., None], axis=1), TABLE) / 0.7
    kept = np.array([[kept_by_definition(logits[r, s], IDS[r, s], top_k, top_p) for s in range(S)] for r in range(R)])

    def plain(hidden, table):
        picked = jnp.take_along_axis(hidden, COLUMNS[..., None], axis=1)
        logits = jnp.einsum("rsd,vd->rsv", picked, table) / 0.7
        log_p = jax.nn.log_softmax(logits)
        logprobs = jnp.take_along_axis(log_p, IDS[..., None], axis=-1)[..., 0]
        log_kept = jax.nn.logsumexp(jnp.where(kept, log_p, -1e30), axis=-1)  # not -inf, whose gradient is nan
        return jnp.sum(WEIGHTS * jnp.stack([logprobs, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1), log_kept]))

    def ours(hidden, table):
        out = target_logprobs(
            hidden, table, COLUMNS, IDS, jnp.int32(USED), temperature=0.7, keep=(top_k, top_p), chunk=4
        )
        return jnp.sum(WEIGHTS * jnp.stack(out))

    expected, got = (jax.value_and_grad(f, argnums=(0, 1))(HIDDEN, TABLE) for f in (plain, ours))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, expected)  # float32 sums


@pytest.fixture(scope="module")
def tiny():
    config, variables = load(DATA / "qwen3", compute_dtype="float32")
    engine = JaxEngine(config)
    engine.update_weights(variables, 0)
    return engine, Policy(make_mesh(1, 1, 1), config, None, PolicyLoss(temperature=0.8)), variables


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 0.6), (7, 1.0), (9, 0.8)])
def test_the_trainer_has_the_engines_logprobs_of_the_truncated_distribution(tiny, top_k, top_p):
    engine, policy, variables = tiny
    prompts = prompts_of(5, 9, 7)
    rollouts = engine.generate(prompts, Sampling(12, n=4, temperature=0.8, top_k=top_k, top_p=top_p), seed=1)
    layout = pack(
        Sequences.of(prompts, rollouts, 12), range(12), row_length=64, rows_per_micro_batch=4, max_micro_batches=1
    )
    ours, engines = policy.logprobs(variables, layout, (0.8, top_k, top_p)), np.stack([r.logprobs for r in rollouts])
    np.testing.assert_allclose(ours.sampled, engines, atol=1e-4)  # float32
    assert (engines - ours.logprobs).mean() > 0.1  # what is not accounted for otherwise


def test_the_gap_from_sums_is_that_of_the_definition():
    rng = np.random.default_rng(3)
    ours = np.log(rng.uniform(0.05, 1, (3, 40)))
    rollout, mask = ours + rng.normal(size=ours.shape) * 0.01, rng.random(ours.shape) < 0.8
    sums, largest = _gap(jnp.asarray(rollout, jnp.float32), jnp.asarray(ours, jnp.float32), jnp.asarray(mask))
    x, y = np.exp(rollout[mask]), np.exp(ours[mask])
    gap = np.abs(x - y)
    expected = {
        "training/rollout_probs_diff_mean": gap.mean(), "training/rollout_probs_diff_max": gap.max(),
        "training/rollout_probs_diff_std": gap.std(ddof=1),
        "training/rollout_actor_probs_pearson_corr": np.corrcoef(x, y)[0, 1],
    }  # fmt: skip
    assert gap_metrics(sums, largest, int(mask.sum())) == pytest.approx(expected, rel=1e-4)
