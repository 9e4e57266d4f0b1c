"""From rewards to what the losses need: KL in the reward, correction for the engine's probabilities, advantages.

The stage between the forward passes of `update.py` (old and reference logprobs, values) and its steps. One compiled
program on [B, T] arrays of the whole step, before packing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from .algorithms.advantages import ADVANTAGES, place_scores
from .algorithms.choose import bind, choose
from .algorithms.correction import (
    importance_weights,
    mismatch_metrics,
    parse_band,
    parse_rejection,
    rejection_mask,
)
from .algorithms.kl import KL_CONTROLLERS, KL_ESTIMATORS, mean_kl, penalise_rewards
from .config import Algorithm


def check_algorithm(a: Algorithm) -> None:
    """Raises ValueError for a name or a threshold of the section `algorithm` that is not known here."""
    ingredients(a)
    choose(KL_ESTIMATORS, a.kl_penalty, "algorithm.kl_penalty", takes=("logprobs", "ref_logprobs"))
    choose(KL_CONTROLLERS, a.kl_ctrl.type, "algorithm.kl_ctrl.type")
    correction = a.rollout_correction
    try:
        if correction.rollout_is is not None:
            parse_band(correction.rollout_is_threshold)
        if correction.rollout_rs is not None:
            parse_rejection(correction.rollout_rs, correction.rollout_rs_threshold)
    except ValueError as error:
        raise ValueError(f"algorithm.rollout_correction: {error}") from None


def ingredients(a: Algorithm) -> frozenset[str]:
    """What the estimator asks for by name: `values` of a critic, `baselines` of greedy responses, and numbers."""
    estimator = choose(ADVANTAGES, a.adv_estimator, "algorithm.adv_estimator", takes=("rewards", "mask"))
    return frozenset(inspect.signature(estimator).parameters)


class Inputs(NamedTuple):
    """Of the B sequences of a step. What a run does not have is None."""

    scores: Float[Any, "B"]
    group: Int[Any, "B"]
    mask: Bool[Any, "B T"]
    rollout_logprobs: Float[Any, "B T"]
    old_logprobs: Float[Any, "B T"]  # of the distribution that is sampled from, as the engine's are
    ref_logprobs: Float[Any, "B T"] | None
    values: Float[Any, "B T"] | None
    baselines: Float[Any, "B"] | None  # the scores of the greedy responses, for ReMax
    kl_coef: Float[Any, ""]
    log_kept: Float[Any, "B T"] | None = None  # log of the mass that top-k and top-p keep, where they are used


class Prepared(NamedTuple):
    """What the steps of actor and critic learn from."""

    mask: Bool[Any, "B T"]  # trained tokens: those of `Inputs.mask` that were not rejected
    advantages: Float[Any, "B T"]  # 0 outside the mask
    returns: Float[Any, "B T"]
    rollout_weights: Float[Any, "B T"]
    rewards_sum: Float[Any, "B"]  # the score after the KL penalty
    kl_coef: Float[Any, ""]  # for the next step


def make_prepare(a: Algorithm) -> Callable[[Inputs], tuple[Prepared, dict[str, float]]]:
    """The compiled stage: host arrays in, host arrays and metrics out. Raises ValueError as `check_algorithm` does."""
    check_algorithm(a)
    program = _program(a)

    def prepare(inputs: Inputs) -> tuple[Prepared, dict[str, float]]:
        prepared, metrics = jax.device_get(program(jax.tree.map(np.asarray, inputs)))
        return prepared, {name: float(value) for name, value in metrics.items()}

    return prepare


def lower_prepare(
    a: Algorithm, shape: tuple[int, int], sharding: jax.sharding.Sharding, given: Collection[str]
) -> jax.stages.Lowered:
    """The same program for sequences [B, T]; `given` are those of the inputs that may be None and are not."""

    def array(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    numbers, column = array(np.float32, *shape), array(np.float32, shape[0])
    optional = {"ref_logprobs": numbers, "values": numbers, "baselines": column, "log_kept": numbers}
    return _program(a).lower(Inputs(
        scores=column, group=array(np.int32, shape[0]), mask=array(np.bool_, *shape), rollout_logprobs=numbers,
        old_logprobs=numbers, kl_coef=array(np.float32),
        **{name: x if name in given else None for name, x in optional.items()},
    ))  # fmt: skip


def _program(a: Algorithm) -> Any:
    return jax.jit(lambda inputs: _prepare(a, inputs))


def _prepare(a: Algorithm, x: Inputs) -> tuple[Prepared, dict[str, Any]]:
    metrics: dict[str, Any] = {}
    correction = a.rollout_correction
    rewards, kl_coef = place_scores(x.scores, x.mask), x.kl_coef
    if a.use_kl_in_reward:
        assert x.ref_logprobs is not None
        # Between whole distributions: two truncated ones may have no token in common.
        whole = x.old_logprobs if x.log_kept is None else x.old_logprobs + x.log_kept
        kl = choose(KL_ESTIMATORS, a.kl_penalty, "algorithm.kl_penalty")(whole, x.ref_logprobs)
        rewards = penalise_rewards(rewards, kl, x.mask, coef=kl_coef)
        current = mean_kl(kl, x.mask)
        metrics |= {"actor/reward_kl_penalty": current, "actor/reward_kl_penalty_coeff": kl_coef}
        control = choose(KL_CONTROLLERS, a.kl_ctrl.type, "algorithm.kl_ctrl.type")
        control = bind(control, num_sequences=x.mask.shape[0], target_kl=a.kl_ctrl.target_kl, horizon=a.kl_ctrl.horizon)
        kl_coef = jnp.asarray(control(kl_coef, current), jnp.float32)
    rewards_sum = rewards.sum(axis=1)

    mask, weights = x.mask, jnp.ones(x.mask.shape, jnp.float32)
    if not correction.bypass_mode:  # with bypass the two are the same numbers
        metrics |= mismatch_metrics(x.old_logprobs, x.rollout_logprobs, mask)
    if correction.rollout_is and not correction.bypass_mode:
        weights, more = importance_weights(
            x.old_logprobs, x.rollout_logprobs, mask, level=correction.rollout_is, threshold=correction.rollout_is_threshold,
            batch_normalize=correction.rollout_is_batch_normalize,
        )  # fmt: skip
        metrics |= more
    if correction.rollout_rs and not correction.bypass_mode:
        mask, more = rejection_mask(
            x.old_logprobs,
            x.rollout_logprobs,
            mask,
            criteria=correction.rollout_rs,
            thresholds=correction.rollout_rs_threshold,
        )
        metrics |= more

        # The score moves with the last token that is trained: a rejected end must not take it along.
        rewards = rewards + place_scores(x.scores, mask) - place_scores(x.scores, x.mask)

    estimate = bind(
        choose(ADVANTAGES, a.adv_estimator, "algorithm.adv_estimator"),
        group=x.group, values=x.values, baselines=x.baselines, gamma=a.gamma, lam=a.lam,
        norm_by_std=a.norm_adv_by_std_in_grpo,
    )  # fmt: skip
    advantages, returns = estimate(rewards, mask)
    advantages, returns = (jnp.where(mask, y, 0.0).astype(jnp.float32) for y in (advantages, returns))
    return Prepared(mask, advantages, returns, weights, rewards_sum, kl_coef), metrics
