"""The batch arithmetic of a run in words, printed before any weight is loaded."""

from __future__ import annotations

from .settings import Config


def describe(c: Config, *, num_rows: int, steps: int, num_prompts: int) -> str:
    """The batch arithmetic in words; `num_rows` is the packed rows of a micro-batch over all devices."""
    sequences = c.data.train_batch_size * c.rollout.n
    minis = c.data.train_batch_size // c.actor.ppo_mini_batch_size
    updates = minis * c.actor.ppo_epochs
    actor_steps = max(0, steps - max(0, c.trainer.critic_warmup - 1))
    critic = "" if c.critic_ppo_epochs == c.actor.ppo_epochs else f" (a critic's: {minis * c.critic_ppo_epochs})"
    return (
        f"{steps} steps over {num_prompts} prompts. A step samples {c.rollout.n} responses to each of "
        f"{c.data.train_batch_size} prompts: {sequences} sequences. They are trained on in {minis} mini-batches of "
        f"{sequences // minis} sequences, {c.actor.ppo_epochs} times over: {updates} updates a step{critic}, "
        f"{updates * actor_steps} in all. A micro-batch is at most {num_rows} packed rows of "
        f"{c.row_length} tokens. The learning rate moves once a step: {steps} learning-rate steps."
    )
