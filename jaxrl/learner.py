"""From scored rollouts to the next actor and critic: the half of a step that learns.

`Learner.step` reads down in the order of the data: pack, old and reference logprobs, values, advantages, then the updates
of critic and actor, each `ppo_epochs` times over the mini-batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from .algorithms.aggregation import aggregation_weights
from .algorithms.losses import FIXED_AGGREGATIONS
from .batch import PolicyTargets, Prompt, Rollout, ValueTargets
from .config import Config
from .metrics import Timer, data_metrics, gap_metrics
from .packing import Layout, Sequences, max_micro_batches, pack
from .parallel import num_row_shards
from .prepare import Inputs, Prepared, make_prepare
from .rewards import Score
from .roles import Roles

Tree = Any


class Learner:
    """Trains the roles of a run on one step's rollouts after another. `kl_coef` is what the KL controller has come to."""

    def __init__(self, config: Config, roles: Roles):
        self.config, self.roles = config, roles
        self.prepare = make_prepare(config.algorithm)
        self.kl_coef = config.algorithm.kl_ctrl.kl_coef

    def step(
        self,
        step: int,
        prompts: list[Prompt],
        rollouts: list[Rollout],
        scores: list[Score],
        baselines: np.ndarray | None,
        timer: Timer,
    ) -> dict[str, float]:
        """The metrics of one step, after which the actor and the critic of `roles` are the next ones.

        `baselines` [P] are the scores of greedy responses, where the estimator asks for them.
        """
        c, roles, correction = self.config, self.roles, self.config.algorithm.rollout_correction
        sequences = Sequences.of(prompts, rollouts, c.data.max_response_length)
        everything = range(len(rollouts))
        rollout_logprobs = _padded([r.logprobs for r in rollouts], sequences.mask.shape)
        old_logprobs, log_kept, ref_logprobs, values = rollout_logprobs, None, None, None
        if not correction.bypass_mode:
            with timer("old_log_prob"):
                layout = self._pack(sequences, everything, roles.mesh, c.actor.ppo_max_token_len_per_gpu)
                old = roles.policy.logprobs(roles.actor_variables(), layout)
                old_logprobs, log_kept = old.sampled, old.log_kept
        if c.needs_ref:
            with timer("ref"):
                layout = self._pack(sequences, everything, roles.ref_mesh, c.actor.ppo_max_token_len_per_gpu)
                sampling = (c.rollout.temperature, -1, 1.0)
                ref_logprobs = roles.ref_policy.logprobs(roles.ref, layout, sampling).logprobs
        if roles.needs_critic:
            with timer("values"):
                layout = self._pack(sequences, everything, roles.critic_mesh, c.critic.ppo_max_token_len_per_gpu)
                values = roles.critic.values(roles.critic_state.trained, layout)
        with timer("adv"):
            reward = np.array([s.reward for s in scores], np.float32)
            prepared, metrics = self.prepare(Inputs(
                reward, sequences.group, sequences.mask, rollout_logprobs, old_logprobs, ref_logprobs, values,
                None if baselines is None else baselines[sequences.group], np.float32(self.kl_coef),
                log_kept,
            ))  # fmt: skip
            self.kl_coef = float(prepared.kl_coef)
            sequences = dataclasses.replace(sequences, mask=prepared.mask)
        if roles.needs_critic:
            with timer("update_critic"):
                metrics |= self._update_critic(step, sequences, prepared, values)
        if step >= c.trainer.critic_warmup:
            with timer("update_actor"):
                metrics |= self._update_actor(step, sequences, prepared, old_logprobs, ref_logprobs)
        return metrics | data_metrics(
            scores=reward, rewards_sum=prepared.rewards_sum, advantages=prepared.advantages, returns=prepared.returns,
            values=values, response_mask=prepared.mask, max_prompt_length=c.data.max_prompt_length,
            prompt_lengths=np.array([len(prompts[g].token_ids) for g in sequences.group]),
            response_lengths=sequences.lengths, finished=np.array([r.finished for r in rollouts]),
        )  # fmt: skip

    def _update_critic(self, step: int, sequences: Sequences, prepared: Prepared, values) -> dict[str, float]:
        c, roles, outs, counts = self.config.critic, self.roles, [], []
        lr = roles.critic_lr(step - 1)
        for chosen in self._mini_batches(sequences, self.config.critic_ppo_epochs):
            layout = self._pack(sequences, chosen, roles.critic_mesh, c.ppo_max_token_len_per_gpu)
            weights = self._loss_weights(sequences.mask, chosen, self.config.critic_loss_agg_mode)
            targets = ValueTargets(*map(layout.to_slots, (values, prepared.returns, weights)))
            roles.critic_state, out = roles.critic.step(roles.critic_state, {}, layout, targets, lr)
            outs.append(out)
            counts.append(sequences.mask[chosen].sum())
        return _update_metrics("critic", outs, counts) | {"critic/lr": lr}

    def _update_actor(
        self, step: int, sequences: Sequences, prepared: Prepared, old_logprobs, ref_logprobs
    ) -> dict[str, float]:
        c, roles, outs, counts = self.config.actor, self.roles, [], []
        lr = roles.actor_lr(step - max(1, self.config.trainer.critic_warmup))  # its schedule begins with its updates
        mode = FIXED_AGGREGATIONS.get(c.policy_loss.loss_mode, c.loss_agg_mode)
        if ref_logprobs is None:
            ref_logprobs = np.zeros_like(old_logprobs)
        for chosen in self._mini_batches(sequences, c.ppo_epochs):
            layout = self._pack(sequences, chosen, roles.mesh, c.ppo_max_token_len_per_gpu)
            columns = PolicyTargets(
                old_logprobs, prepared.advantages, ref_logprobs, prepared.rollout_weights,
                self._loss_weights(sequences.mask, chosen, mode),
                self._loss_weights(sequences.mask, chosen, c.loss_agg_mode),
            )  # fmt: skip
            targets = PolicyTargets(*map(layout.to_slots, columns))
            roles.actor, out = roles.policy.step(roles.actor, roles.actor_frozen, layout, targets, lr)
            outs.append(out)
            counts.append(sequences.mask[chosen].sum())
        metrics = _update_metrics("actor", outs, counts) | {"actor/lr": lr}
        if roles.policy.loss.measure_gap:  # before the first update the policy is still the one before this step
            first = jax.device_get(outs[0])
            metrics |= gap_metrics(first["gap_sums"], first["gap_max"], int(counts[0]))
        if c.use_kl_loss:
            metrics["actor/kl_coef"] = c.kl_loss_coef
        return metrics

    # Mini-batches and their layout.

    def _pack(self, sequences: Sequences, chosen: Sequence[int] | np.ndarray, mesh: Mesh, max_tokens: int) -> Layout:
        """The chosen sequences in rows for a mesh. Shapes depend on the config alone, so that nothing is compiled twice."""
        c = self.config
        M, R, T = micro_batches_of(c, mesh, len(chosen), max_tokens)
        return pack(
            sequences, chosen, row_length=T, rows_per_micro_batch=R, max_micro_batches=M,
            ways=num_row_shards(mesh), share_prompt=c.trainer.share_prompt,
        )  # fmt: skip

    def _mini_batches(self, sequences: Sequences, epochs: int) -> list[np.ndarray]:
        """The sequences of each update: whole groups, in the order of the prompts, once an epoch."""
        size = self.config.actor.ppo_mini_batch_size
        minis = [np.flatnonzero(sequences.group // size == i) for i in range(len(sequences.prompts) // size)]
        return minis * epochs

    def _loss_weights(self, mask: np.ndarray, chosen: np.ndarray, mode: str) -> np.ndarray:
        inside = np.zeros_like(mask)
        inside[chosen] = mask[chosen]
        factor = self.config.actor.loss_scale_factor or mask.shape[1]
        return np.asarray(aggregation_weights(
            jnp.asarray(inside), mode, num_tokens=int(inside.sum()), num_sequences=int(inside.any(axis=1).sum()),
            loss_scale_factor=factor,
        ), np.float32)  # fmt: skip


def rows_of(c: Config, mesh: Mesh, max_tokens: int) -> int:
    """Packed rows of a micro-batch over all devices, of at most `max_tokens` on each."""
    return max(1, max_tokens // c.row_length) * num_row_shards(mesh)


def micro_batches_of(c: Config, mesh: Mesh, num_sequences: int, max_tokens: int) -> tuple[int, int, int]:
    """[M, R, T]: the shape in which any `num_sequences` sequences are trained on."""
    ways = num_row_shards(mesh)
    most_rows = ways * max_micro_batches(num_sequences, c.max_length, c.row_length, ways)
    rows = min(rows_of(c, mesh, max_tokens), most_rows)
    return max_micro_batches(num_sequences, c.max_length, c.row_length, rows), rows, c.row_length


def _padded(rows: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    out = np.zeros(shape, np.float32)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out


def _update_metrics(role: str, outs: list[Tree], num_tokens: list[int]) -> dict[str, float]:
    """The means over the updates of a step; sums over trained tokens become means over tokens first."""
    updates = []
    for out, count in zip(jax.device_get(outs), num_tokens, strict=True):
        means = {name: x / max(int(count), 1) for name, x in out["sums"].items()}
        updates.append(means | out["losses"] | {"grad_norm": out["grad_norm"]})
    return {f"{role}/{name}": float(np.mean([u[name] for u in updates])) for name in updates[0]}
