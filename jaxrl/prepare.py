"""From rewards to what the losses need: KL in the reward, correction for the engine's probabilities, advantages.

The stage between the forward passes of `update.py` (old and reference logprobs, values) and its steps. One compiled
program on [B, T] arrays of the whole step, before packing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from .algorithms.advantages import ADVANTAGES, place_scores
from .algorithms.choose import bind, choose
from .algorithms.correction import (
    IMPORTANCE_LEVELS,
    importance_weights,
    mismatch_metrics,
    parse_band,
    parse_rejection,
    rejection_mask,
)
from .algorithms.kl import KL_CONTROLLERS, KL_ESTIMATORS, mean_kl, penalise_rewards


@dataclass(frozen=True)
class Preparation:
    """The choices of this stage (verl's names); names and thresholds are looked at when it is made."""

    adv_estimator: str = "gae"
    gamma: float = 1.0
    lam: float = 1.0
    norm_adv_by_std_in_grpo: bool = True
    use_kl_in_reward: bool = False
    kl_penalty: str = "kl"
    kl_ctrl_type: str = "fixed"
    horizon: int = 10_000
    target_kl: float = 0.1
    rollout_is: str | None = None
    rollout_is_threshold: float | str = 2.0
    rollout_is_batch_normalize: bool = False
    rollout_rs: str | None = None
    rollout_rs_threshold: float | str | None = None
    bypass_mode: bool = False

    def __post_init__(self) -> None:
        choose(ADVANTAGES, self.adv_estimator, "algorithm.adv_estimator")
        choose(KL_ESTIMATORS, self.kl_penalty, "algorithm.kl_penalty")
        choose(KL_CONTROLLERS, self.kl_ctrl_type, "algorithm.kl_ctrl.type")
        key = "algorithm.rollout_correction"
        if self.rollout_is not in (None, *IMPORTANCE_LEVELS):
            known = ", ".join(IMPORTANCE_LEVELS)
            raise ValueError(f"{key}.rollout_is is {self.rollout_is!r} and must be None or one of {known}")
        if (self.rollout_rs is None) != (self.rollout_rs_threshold is None):
            raise ValueError(f"{key}.rollout_rs and rollout_rs_threshold belong together: set both or neither")
        try:
            if self.rollout_is is not None:
                parse_band(self.rollout_is_threshold)
            if self.rollout_rs is not None and self.rollout_rs_threshold is not None:
                parse_rejection(self.rollout_rs, self.rollout_rs_threshold)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None


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


def make_prepare(p: Preparation) -> Callable[[Inputs], tuple[Prepared, dict[str, float]]]:
    """The compiled stage: host arrays in, host arrays and metrics out."""
    program = _program(p)

    def prepare(inputs: Inputs) -> tuple[Prepared, dict[str, float]]:
        prepared, metrics = jax.device_get(program(jax.tree.map(np.asarray, inputs)))
        return prepared, {name: float(value) for name, value in metrics.items()}

    return prepare


def lower_prepare(
    p: Preparation, shape: tuple[int, int], sharding: jax.sharding.Sharding, given: Collection[str]
) -> jax.stages.Lowered:
    """The same program for sequences [B, T]; `given` are those of the inputs that may be None and are not."""

    def array(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    numbers, column = array(np.float32, *shape), array(np.float32, shape[0])
    optional = {"ref_logprobs": numbers, "values": numbers, "baselines": column, "log_kept": numbers}
    return _program(p).lower(Inputs(
        scores=column, group=array(np.int32, shape[0]), mask=array(np.bool_, *shape), rollout_logprobs=numbers,
        old_logprobs=numbers, kl_coef=array(np.float32),
        **{name: x if name in given else None for name, x in optional.items()},
    ))  # fmt: skip


def _program(p: Preparation) -> Any:
    return jax.jit(lambda inputs: _prepare(p, inputs))


def _prepare(p: Preparation, x: Inputs) -> tuple[Prepared, dict[str, Any]]:
    metrics: dict[str, Any] = {}
    rewards, kl_coef = place_scores(x.scores, x.mask), x.kl_coef
    if p.use_kl_in_reward:
        assert x.ref_logprobs is not None
        # Between whole distributions: two truncated ones may have no token in common.
        whole = x.old_logprobs if x.log_kept is None else x.old_logprobs + x.log_kept
        kl = choose(KL_ESTIMATORS, p.kl_penalty, "algorithm.kl_penalty")(whole, x.ref_logprobs)
        rewards = penalise_rewards(rewards, kl, x.mask, coef=kl_coef)
        current = mean_kl(kl, x.mask)
        metrics |= {"actor/reward_kl_penalty": current, "actor/reward_kl_penalty_coeff": kl_coef}
        control = choose(KL_CONTROLLERS, p.kl_ctrl_type, "algorithm.kl_ctrl.type")
        control = bind(control, num_sequences=x.mask.shape[0], target_kl=p.target_kl, horizon=p.horizon)
        kl_coef = jnp.asarray(control(kl_coef, current), jnp.float32)
    rewards_sum = rewards.sum(axis=1)

    mask, weights = x.mask, jnp.ones(x.mask.shape, jnp.float32)
    if not p.bypass_mode:  # with bypass the two are the same numbers
        metrics |= mismatch_metrics(x.old_logprobs, x.rollout_logprobs, mask)
    if p.rollout_is and not p.bypass_mode:
        weights, more = importance_weights(
            x.old_logprobs, x.rollout_logprobs, mask, level=p.rollout_is, threshold=p.rollout_is_threshold,
            batch_normalize=p.rollout_is_batch_normalize,
        )  # fmt: skip
        metrics |= more
    if p.rollout_rs and not p.bypass_mode:
        assert p.rollout_rs_threshold is not None
        mask, more = rejection_mask(
            x.old_logprobs, x.rollout_logprobs, mask, criteria=p.rollout_rs, thresholds=p.rollout_rs_threshold
        )
        metrics |= more

        # The score moves with the last token that is trained: a rejected end must not take it along.
        rewards = rewards + place_scores(x.scores, mask) - place_scores(x.scores, x.mask)

    estimate = bind(
        choose(ADVANTAGES, p.adv_estimator, "algorithm.adv_estimator"),
        group=x.group, values=x.values, baselines=x.baselines, gamma=p.gamma, lam=p.lam,
        norm_by_std=p.norm_adv_by_std_in_grpo,
    )  # fmt: skip
    advantages, returns = estimate(rewards, mask)
    advantages, returns = (jnp.where(mask, y, 0.0).astype(jnp.float32) for y in (advantages, returns))
    return Prepared(mask, advantages, returns, weights, rewards_sum, kl_coef), metrics
