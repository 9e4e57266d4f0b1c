"""Every value and gradient that verl 0.9.1 returned on 604 recorded cases, in float64 at 1e-9.

The cases of one function and one shape are stacked and run as a single vmapped, jitted program, so this also shows
that the functions can be jitted with their hyper-parameters traced.
"""

import json
from collections import defaultdict
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.advantages import ADVANTAGES
from jaxrl.algorithms.aggregation import aggregate_loss, aggregation_weights
from jaxrl.algorithms.choose import bind
from jaxrl.algorithms.correction import importance_weights
from jaxrl.algorithms.kl import KL_ESTIMATORS, adaptive
from jaxrl.algorithms.losses import FIXED_AGGREGATIONS, POLICY_LOSSES, clipped_value
from jaxrl.algorithms.masked import masked_mean, masked_var, masked_whiten

DATA = Path(__file__).parent / "data" / "verl_parity"
# verl adds 1e-8 to token counts in its metrics; ours divide by the exact count. All else is rounding in float64.
TOLERANCE = 1e-9


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def recorded():
    """function name -> list of (kwargs, inputs and outputs by name)."""
    arrays = np.load(DATA / "cases.npz")
    cases = defaultdict(list)
    for case in json.loads((DATA / "cases.json").read_text())["cases"]:
        named = {name: arrays[f"{case['case']}/{name}"] for name in case["inputs"] + case["outputs"]}
        cases[case["function"]].append((case["kwargs"], named))
    assert sum(map(len, cases.values())) == 604
    return cases


def stacks(cases, *static):
    """Stack the cases that agree in shapes, in which arrays they have and in the `static` keywords.

    Yields (static values, other keywords as arrays [C], arrays [C, ...]).
    """
    together = defaultdict(list)
    for kwargs, arrays in cases:
        key = tuple(kwargs.get(name) for name in static)
        together[key, tuple((name, a.shape) for name, a in sorted(arrays.items()))].append((kwargs, arrays))
    for (key, shapes), members in together.items():
        traced = {name: value for name, value in members[0][0].items() if name not in static}
        traced = {name: jnp.array([kwargs[name] for kwargs, _ in members]) for name in traced}
        stacked = {name: jnp.array(np.stack([arrays[name] for _, arrays in members])) for name, _ in shapes}
        if "mask" in stacked:
            stacked["mask"] = stacked["mask"] > 0.5
        yield key, traced, stacked


def assert_equal(ours, verls, name):
    np.testing.assert_allclose(ours, verls, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_and_returns_equal_verls(recorded, name):
    assert recorded[name]
    for (norm_by_std,), hyper, a in stacks(recorded[name], "norm_by_std"):

        def estimate(hyper, a, norm_by_std=norm_by_std):
            available = {"group": a.get("group"), "values": a.get("values"), "baselines": a.get("baseline")}
            estimator = bind(ADVANTAGES[name], norm_by_std=norm_by_std, **available, **hyper)
            return estimator(a["rewards"], a["mask"])

        advantages, returns = jax.jit(jax.vmap(estimate))(hyper, a)
        assert_equal(advantages, a["advantages"], name)
        if "returns" in a:
            assert_equal(returns, a["returns"], name)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_loss_its_gradient_and_its_metrics_equal_verls(recorded, name):
    cases = recorded[f"policy_loss:{name}"]
    assert cases

    @jax.jit
    @jax.vmap
    def value_and_grad(hyper, a, weights):
        loss = bind(POLICY_LOSSES[name], rollout_weights=a.get("is_weights"), **hyper)

        def scalar(logprobs):
            token_loss, sums = loss(logprobs, a["old_logprobs"], a["advantages"], a["mask"])
            return jnp.sum(token_loss * weights), sums

        (value, sums), grad = jax.value_and_grad(scalar, has_aux=True)(a["logprobs"])
        return value, grad, {key: total / jnp.sum(a["mask"]) for key, total in sums.items()}

    for (mode,), hyper, a in stacks(cases, "mode"):
        assert mode == FIXED_AGGREGATIONS.get(name, mode)
        # verl's geo_mean averages over all sequences, those without a trained token included.
        weights = weights_of_whole_batch(a["mask"], mode, count_empty=name == "geo_mean")
        value, grad, metrics = value_and_grad(hyper, a, weights)
        assert_equal(value, a["loss"], f"{name} {mode} loss")
        assert_equal(grad, a["grad"], f"{name} {mode} gradient")
        assert set(metrics) == {"pg_clipfrac", "pg_clipfrac_lower", "ppo_kl"} & set(a)
        for key, metric in metrics.items():
            assert_equal(metric, a[key], f"{name} {key}")


@partial(jax.jit, static_argnames=("mode", "count_empty"))
def weights_of_whole_batch(masks, mode, count_empty):
    def weights(mask):
        num_sequences = mask.shape[0] if count_empty else jnp.sum(jnp.any(mask, axis=1))
        return aggregation_weights(
            mask, mode, num_tokens=jnp.sum(mask), num_sequences=num_sequences, loss_scale_factor=mask.shape[1]
        )

    return jax.vmap(weights)(masks)


def test_value_loss_its_gradient_and_its_clip_fraction_equal_verls(recorded):
    for (mode,), hyper, a in stacks(recorded["value_loss"], "mode"):

        def scalar(values, hyper, a, mode=mode):
            token_loss, sums = clipped_value(values, a["old_values"], a["returns"], a["mask"], **hyper)
            return aggregate_loss(token_loss, a["mask"], mode), sums["vf_clipfrac"] / jnp.sum(a["mask"])

        (value, clipfrac), grad = jax.jit(jax.vmap(jax.value_and_grad(scalar, has_aux=True)))(a["values"], hyper, a)
        assert_equal(value, a["loss"], mode)
        assert_equal(grad, a["grad"], mode)
        assert_equal(clipfrac, a["clipfrac"], mode)


def test_aggregations_equal_verls(recorded):
    for (mode,), _, a in stacks(recorded["aggregate_loss"], "mode"):
        ours = jax.jit(jax.vmap(partial(aggregate_loss, mode=mode)))(a["loss"], a["mask"])
        assert_equal(ours, a["value"], mode)


def test_kl_estimates_and_their_gradients_equal_verls(recorded):
    for (kind,), _, a in stacks(recorded["kl_penalty"], "kind"):

        def masked_sum(logprobs, a, kind=kind):
            kl = KL_ESTIMATORS[kind](logprobs, a["ref_logprobs"])
            return jnp.sum(jnp.where(a["mask"], kl, 0.0)), kl

        grad, kl = jax.jit(jax.vmap(jax.grad(masked_sum, has_aux=True)))(a["logprobs"], a)
        assert_equal(kl, a["kl"], kind)
        assert_equal(grad, a["grad_of_masked_sum"], kind)


def test_whitening_equals_verls(recorded):
    for _, _, a in stacks(recorded["masked_whiten"]):
        for function, output in ((masked_mean, "mean"), (masked_var, "var"), (masked_whiten, "whitened")):
            assert_equal(jax.jit(jax.vmap(function))(a["x"], a["mask"]), a[output], output)


def test_rollout_weights_equal_verls(recorded):
    for (level, threshold), _, a in stacks(recorded["rollout_is_weights"], "level", "threshold"):
        function = jax.vmap(partial(importance_weights, level=level, threshold=threshold))
        weights = jax.jit(lambda *arrays, function=function: function(*arrays)[0])(
            a["old_logprobs"], a["rollout_logprobs"], a["mask"]
        )
        assert_equal(weights, a["weights"], f"{level} {threshold}")


def test_adaptive_kl_coefficient_follows_verls(recorded):
    for kwargs, a in recorded["adaptive_kl"]:

        def update(coef, kl, kwargs=kwargs):
            steer = {"target_kl": kwargs["target"], "horizon": kwargs["horizon"]}
            coef = adaptive(coef, kl, num_sequences=kwargs["n_steps"], **steer)
            return coef, coef

        _, trajectory = jax.lax.scan(update, jnp.array(kwargs["init"]), jnp.array(a["kl"]))
        assert_equal(trajectory, a["beta_after"], "beta")
