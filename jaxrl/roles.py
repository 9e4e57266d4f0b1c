"""The models of a run and their weights: actor, critic, reference, reward model.

A role that trains has a `TrainState` (what the optimizer moves: "params", or "lora" where there are adapters) and
`frozen` collections beside it. Shapes come first, then shardings, then arrays: no weight exists unsharded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .algorithms.choose import choose
from .algorithms.kl import KL_ESTIMATORS
from .algorithms.losses import POLICY_LOSSES
from .config import Config, Model, Optim
from .models import decoder
from .models.config import ModelConfig
from .models.lora import merge_lora
from .optimizer import Optimizer, abstract_state, lr_schedule, make_optimizer
from .parallel import use_mesh, with_shardings
from .update import Critic, Policy, PolicyLoss, TrainState, merge
from .weights.folder import load_hf_config
from .weights.formats import open_checkpoint
from .weights.hf_names import rows
from .weights.load import load_params, resolve
from .weights.stored import Checkpoint

Tree = Any


class Roles:
    """Actor, critic and reference of a run: weights, optimizers, schedules, and the programs over them.

    What is trained is loaded from the checkpoint of `model.path`, or with `resumed` left to `restore`. `critic_state` and
    `ref` exist where the run needs them.
    """

    def __init__(
        self, c: Config, mesh: jax.sharding.Mesh, source: Path, *, steps: int, needs_critic: bool, resumed: bool
    ):
        self.mesh, self.needs_critic = mesh, needs_critic
        self._make_actor(c, source, steps, resumed)
        if c.needs_ref:
            self._make_ref(c, source)
        if needs_critic:
            self._make_critic(c, steps, resumed)

    def _make_actor(self, c: Config, source: Path, steps: int, resumed: bool) -> None:
        self.model = with_adapters(model_config(c.model, source), c.model)
        self.actor_optimizer = optimizer_of(c.actor.optim)
        self.policy = Policy(self.mesh, self.model, self.actor_optimizer, policy_loss(c))
        self.actor_lr = schedule_of(c.actor.optim, steps)
        self.actor_abstract = abstract_variables(self.mesh, self.model, "lm")
        self.has_adapters = "lora" in self.actor_abstract
        if self.has_adapters:  # what does not train needs no float32
            frozen = abstract_variables(self.mesh, self.model, "lm", c.model.compute_dtype)["params"]
            self.actor_abstract = {**self.actor_abstract, "params": frozen}
        base = None
        if self.has_adapters or not resumed:
            base = load_base(source, self.model, self.actor_abstract)
        self.actor_frozen = {"params": base} if self.has_adapters else {}
        if not resumed:
            trained = {"params": base}
            if self.has_adapters:
                trained = {"lora": fresh_adapters(self.mesh, self.model, self.actor_abstract, c.trainer.seed)}
            self.actor = new_train_state(self.mesh, self.actor_optimizer, trained)

    def _make_ref(self, c: Config, source: Path) -> None:
        self.ref = self.actor_frozen  # of adapters, the reference is the model without them
        if self.has_adapters and c.ref.path is None:
            return
        config, ref_source = model_config(c.model, source), source if c.ref.path is None else resolve(c.ref.path)
        if model_config(c.model, ref_source) != config:
            raise ValueError(f"ref.path {c.ref.path} is not of the shape of model.path {c.model.path}")
        abstract = abstract_variables(self.mesh, config, "lm", c.model.compute_dtype)
        self.ref = {"params": load_base(ref_source, config, abstract)}

    def _make_critic(self, c: Config, steps: int, resumed: bool) -> None:
        source = resolve(c.critic.path or c.model.path)
        layers = {} if c.critic.num_layers is None else {"num_layers": c.critic.num_layers}
        config = model_config(c.model, source, score_bias=True, **layers)
        optimizer = optimizer_of(c.critic.optim)
        self.critic = Critic(self.mesh, config, optimizer, c.critic.cliprange_value)
        self.critic_lr = schedule_of(c.critic.optim, steps)
        abstract = abstract_variables(self.mesh, config, "score")
        self.critic_abstract = abstract_train_state(optimizer, abstract)
        if not resumed:
            params = load_base(source, config, abstract, new_head=True)
            self.critic_state = new_train_state(self.mesh, optimizer, {"params": params})

    def actor_variables(self) -> Tree:
        """All weights of the actor, trained and frozen: what `policy.logprobs` and an engine take."""
        return merge(self.actor.trained, self.actor_frozen)

    def merged_params(self) -> Tree:
        """The actor's "params" with its adapters, if it has any, added to the weights."""
        if not self.has_adapters:
            return self.actor.trained["params"]
        return self.policy.jit(lambda variables: merge_lora(self.model, variables))(self.actor_variables())

    def state(self) -> Tree:
        """What a checkpoint holds of the roles."""
        return {"actor": self.actor} | ({"critic": self.critic_state} if self.needs_critic else {})

    def abstract_state(self) -> Tree:
        """Shapes and shardings of `state`: what a checkpoint is restored onto."""
        actor = abstract_train_state(self.actor_optimizer, self.actor_abstract)
        return {"actor": actor} | ({"critic": self.critic_abstract} if self.needs_critic else {})

    def restore(self, state: Tree) -> None:
        self.actor = state["actor"]
        if self.needs_critic:
            self.critic_state = state["critic"]


def model_config(m: Model, source: Path, **changes: Any) -> ModelConfig:
    """The decoder of a Hugging Face folder, computed as the section `model` says."""
    config = ModelConfig.from_hf(
        load_hf_config(source), compute_dtype=m.compute_dtype, remat=m.remat, attention=m.attention
    )
    layers = changes.get("num_layers")
    if layers is not None and not 1 <= layers <= config.num_layers:
        raise ValueError(
            f"critic.num_layers {layers} must lie between 1 and the {config.num_layers} layers of {source}"
        )
    return dataclasses.replace(config, **changes)


def with_adapters(config: ModelConfig, m: Model) -> ModelConfig:
    return dataclasses.replace(
        config, lora_rank=m.lora_rank, lora_alpha=m.lora_alpha, lora_targets=tuple(m.lora_targets)
    )


def optimizer_of(o: Optim) -> Optimizer:
    return make_optimizer(
        weight_decay=o.weight_decay, betas=tuple(o.betas), clip_grad=o.clip_grad, moments_dtype=o.moments_dtype
    )


def schedule_of(o: Optim, steps: int) -> Callable[[int], float]:
    """The learning rate by the number of the step, counted from 0."""
    return lr_schedule(
        o.lr_scheduler_type, lr=o.lr, total_steps=steps, warmup_steps=o.lr_warmup_steps,
        warmup_ratio=o.lr_warmup_steps_ratio, min_lr_ratio=o.min_lr_ratio, num_cycles=o.num_cycles,
    )  # fmt: skip


def policy_loss(c: Config) -> PolicyLoss:
    """The actor's objective. Raises ValueError where it names a loss or a KL estimator that is unknown."""
    a = c.actor
    choose(POLICY_LOSSES, a.policy_loss.loss_mode, "actor.policy_loss.loss_mode")
    choose(KL_ESTIMATORS, a.kl_loss_type, "actor.kl_loss_type")
    return PolicyLoss(
        name=a.policy_loss.loss_mode, clip_low=a.clip_ratio_low, clip_high=a.clip_ratio_high, clip_c=a.clip_ratio_c,
        tau_pos=a.policy_loss.tau_pos, tau_neg=a.policy_loss.tau_neg, dro_beta=a.policy_loss.dro_beta,
        entropy_coeff=a.entropy_coeff, kl_loss_coef=a.kl_loss_coef if a.use_kl_loss else 0.0,
        kl_loss_type=a.kl_loss_type, temperature=c.rollout.temperature,
    )  # fmt: skip


def abstract_variables(mesh: jax.sharding.Mesh, config: ModelConfig, head: str, dtype: str = "float32") -> Tree:
    """Shape, dtype and sharding of every weight: {"params": .., "lora": ..}."""
    shapes, axes = decoder.abstract_params(config, head)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    return {name: with_shardings(mesh, shapes[name], axes[name]) for name in shapes if shapes[name]}


def load_base(source: Path, config: ModelConfig, abstract: Tree, *, new_head: bool = False) -> Tree:
    """The "params" of a checkpoint. With `new_head`, a score head that it does not hold begins at zero.

    Zero, because a critic begins by knowing nothing, and no random value moves the first advantages.
    """
    head = "score" if "score" in abstract["params"] else "lm"
    fresh = {"score.kernel", "score.bias"} if new_head else set()
    params = load_params(_lower_layers(source, config, head), config, abstract["params"], allow_missing=fresh)
    if new_head:
        structs = abstract["params"]["score"]
        params["score"] = {
            name: jnp.zeros(structs[name].shape, structs[name].dtype, device=structs[name].sharding) if x is None else x
            for name, x in params["score"].items()
        }
    return params


def fresh_adapters(mesh: jax.sharding.Mesh, config: ModelConfig, abstract: Tree, seed: int) -> Tree:
    """New "lora" arrays: A random, B zero, so that the model is as it was."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract["lora"])
    make = jax.jit(lambda key: decoder.init_params(config, "lm", key)["lora"], out_shardings=shardings)
    with use_mesh(mesh):
        return make(jax.random.key(seed))


def abstract_train_state(optimizer: Optimizer, abstract: Tree) -> TrainState:
    """What is trained of `abstract`, with its optimizer state: what a checkpoint restores onto."""
    trained = {"lora": abstract["lora"]} if "lora" in abstract else {"params": abstract["params"]}
    return TrainState(trained, abstract_state(optimizer, trained))


def new_train_state(mesh: jax.sharding.Mesh, optimizer: Optimizer, trained: Tree) -> TrainState:
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(optimizer, trained))
    with use_mesh(mesh):
        return TrainState(trained, jax.jit(optimizer.init, out_shardings=shardings)(trained))


def _lower_layers(source: Path, config: ModelConfig, head: str) -> Checkpoint:
    """The checkpoint without the layers above those of `config`: for a critic that is shallower than its model."""
    checkpoint = open_checkpoint(source)
    num_stored = ModelConfig.from_hf(load_hf_config(source)).num_layers
    above = {
        name for row in rows(config, head=head) if row.stacked for name in row.hf_names(num_stored)[config.num_layers :]
    }
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in above}
    return Checkpoint(checkpoint.folder, tensors, kind=checkpoint.kind, layout=checkpoint.layout)
