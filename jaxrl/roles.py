"""The models of a run and their weights: actor, critic, reference, reward model.

A role that trains has a `TrainState` (what the optimizer moves: "params", or "lora" where there are adapters) and
`frozen` collections beside it. Shapes come first, then shardings, then arrays: no weight exists unsharded.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .algorithms.choose import choose
from .algorithms.kl import KL_ESTIMATORS
from .algorithms.losses import POLICY_LOSSES
from .compression import abstract_residual
from .config import Config, MeshSection, Model, Optim, check_micro_batch
from .models import decoder
from .models.config import ModelConfig
from .offload import waiting
from .optimizer import Optimizer, abstract_state, lr_schedule, make_optimizer
from .parallel import mesh_of_role, use_mesh, with_shardings
from .prepare import ingredients
from .update import Compression, Critic, Policy, PolicyLoss, TrainState, merge
from .weights.bnb import dequantized, packed_tensors
from .weights.export import export_hf
from .weights.hf_names import flatten, head_of, in_order, rows, unflatten
from .weights.load import load_params
from .weights.packed import load_packed, packed_kernels
from .weights.peft_tree import export_peft, load_lora, lora_settings
from .weights.pretrained import Pretrained, open_pretrained, with_adapter_merged
from .weights.source import first_layers
from .weights.stored import Checkpoint

Tree = Any
log = logging.getLogger(__name__)


class Roles:
    """Actor, critic and reference of a run: weights, optimizers, schedules, and the programs over them.

    Made of shapes alone (`*_abstract`): a plan needs no more. `load` brings the weights (or `restore`, of what is
    trained). `critic*` and `ref*` exist where the run needs them; `find` opens the model of a path.
    """

    actor: TrainState
    actor_frozen: Tree
    critic_state: TrainState
    ref: Tree

    def __init__(
        self,
        c: Config,
        mesh: jax.sharding.Mesh,
        source: Pretrained,
        *,
        steps: int,
        find: Callable[[str], Pretrained] = open_pretrained,
    ):
        self.mesh, self.needs_ref, self.source = mesh, c.needs_ref, source
        self.needs_critic = "values" in ingredients(c.algorithm)
        self.critic_mesh, self.ref_mesh = own_mesh(mesh, c.critic.mesh, "critic"), own_mesh(mesh, c.ref.mesh, "ref")
        self.seed, self.critic_head_path = c.trainer.seed, c.critic.head.path
        self.exports_critic = self.needs_critic and c.critic.export
        self._describe_actor(c, steps)
        if c.needs_ref:
            self._describe_ref(c, find)
        if self.needs_critic:
            self._describe_critic(c, steps, find)

    def _describe_actor(self, c: Config, steps: int) -> None:
        self.model = dataclasses.replace(actor_config(c.model, self.source), max_length=c.max_length)
        self.actor_optimizer = optimizer_of(c.actor.optim)
        compression = compression_of(c.actor.optim)
        self.policy = Policy(self.mesh, self.model, self.actor_optimizer, policy_loss(c), compression)
        self.actor_lr = schedule_of(c.actor.optim, steps)
        trained_as = "float32" if self.model.lora_rank else c.actor.param_dtype
        abstract = abstract_variables(self.mesh, self.model, "lm", trained_as)
        self.has_adapters = "lora" in abstract
        if self.has_adapters:  # what does not train needs no float32
            frozen = abstract_variables(self.mesh, self.model, "lm", c.model.compute_dtype)["params"]
            abstract = {**abstract, "params": frozen}
        if "params" in c.actor.offload:
            abstract = {**abstract, "params": waiting(abstract["params"])}
        self.actor_abstract = abstract
        self.actor_state_abstract = abstract_train_state(self.actor_optimizer, abstract, c.actor.offload, c.actor.optim)

    def _describe_ref(self, c: Config, find: Callable[[str], Pretrained]) -> None:
        self.ref_policy = self.policy
        self.ref_is_base = self.has_adapters and c.ref.path is None  # the model without its adapters
        if self.ref_is_base:
            if c.ref.compute_dtype not in (None, c.model.compute_dtype):
                raise ValueError(
                    f"ref.compute_dtype {c.ref.compute_dtype}: the reference of adapters is the actor's base, whose dtype is "
                    f"model.compute_dtype {c.model.compute_dtype}: leave it out, or name a ref.path"
                )
            if self.ref_mesh != self.mesh:
                raise ValueError(
                    "ref.mesh: the reference of adapters is the actor's base, which lies as `mesh` says: leave it out, or "
                    "name a ref.path"
                )
            return
        model = computed(c.model, c.ref.compute_dtype)
        plain = model_config(model, self.source.hf_config)
        self.ref_source = self.source if c.ref.path is None else with_adapter_merged(find(c.ref.path))
        if model_config(model, self.ref_source.hf_config) != plain:
            raise ValueError(f"ref.path {c.ref.path} is not of the shape of model.path {self.source.name}")
        packed = self.model.packed
        if packed is not None and packed_kernels(self.ref_source.checkpoint, plain) != packed:
            raise ValueError(
                f"ref.path {c.ref.path} does not hold the same kernels in 4 bits as model.path {self.source.name}: leave "
                "it out, and the reference is the model without its adapters"
            )
        self.ref_model = dataclasses.replace(plain, packed=packed, max_length=c.max_length)
        if model != c.model or self.ref_mesh != self.mesh:
            self.ref_policy = Policy(self.ref_mesh, self.ref_model, None, self.policy.loss)
        self.ref_abstract = abstract_variables(self.ref_mesh, self.ref_model, "lm", model.compute_dtype)
        if "params" in c.ref.offload:
            self.ref_abstract = {**self.ref_abstract, "params": waiting(self.ref_abstract["params"])}

    def _describe_critic(self, c: Config, steps: int, find: Callable[[str], Pretrained]) -> None:
        check_micro_batch(c, "critic")
        self.critic_source = self.source if c.critic.path is None else with_adapter_merged(find(c.critic.path))
        layers = {} if c.critic.num_layers is None else {"num_layers": c.critic.num_layers}
        config = model_config(
            computed(c.model, c.critic.compute_dtype, c.critic.remat), self.critic_source.hf_config,
            score_bias=True, module=c.critic.head.module, max_length=c.max_length, **layers,
        )  # fmt: skip
        self.critic_optimizer = optimizer_of(c.critic.optim)
        self.critic = Critic(
            self.critic_mesh, config, self.critic_optimizer, c.critic.cliprange_value, compression_of(c.critic.optim)
        )
        self.critic_lr = schedule_of(c.critic.optim, steps)
        self.critic_abstract = abstract_variables(self.critic_mesh, config, "score", c.critic.param_dtype)
        if "params" in c.critic.offload:
            self.critic_abstract = {"params": waiting(self.critic_abstract["params"])}
        self.critic_state_abstract = abstract_train_state(
            self.critic_optimizer, self.critic_abstract, c.critic.offload, c.critic.optim
        )

    def load(self, *, resumed: bool) -> None:
        """The weights of every role, from the checkpoints of their paths; with `resumed`, not of what is trained."""
        self.actor_frozen = load_frozen(self.source, self.model, self.actor_abstract) if self.has_adapters else {}
        if self.needs_ref:
            self.ref = self.actor_frozen
            if not self.ref_is_base:
                self.ref = load_frozen(self.ref_source, self.ref_model, self.ref_abstract)
        if resumed:
            return
        if self.source.adapter is not None:
            trained = {"lora": load_lora(self.source.adapter, self.model, self.actor_abstract["lora"])}
        elif self.has_adapters:
            trained = {"lora": fresh_adapters(self.mesh, self.model, self.actor_abstract, self.seed)}
        else:
            trained = {"params": load_base(self.source, self.model, self.actor_abstract)}
        self.actor = new_train_state(self.mesh, self.actor_optimizer, trained, self.actor_state_abstract)
        if self.needs_critic:
            params = load_base(
                self.critic_source, self.critic.config, self.critic_abstract,
                new_head=True, head_path=self.critic_head_path,
            )  # fmt: skip
            trained = {"params": params}
            self.critic_state = new_train_state(
                self.critic_mesh, self.critic_optimizer, trained, self.critic_state_abstract
            )

    @property
    def abstract_frozen(self) -> Tree:
        """Shapes and shardings of `actor_frozen`."""
        return {name: x for name, x in self.actor_abstract.items() if name != "lora"} if self.has_adapters else {}

    def actor_variables(self) -> Tree:
        """All weights of the actor, trained and frozen: what `policy.logprobs` and an engine take."""
        return merge(self.actor.trained, self.actor_frozen)

    def export(self, folder: Path) -> None:
        """The actor as a Hugging Face folder `hf` in `folder`, adapters merged; and `adapter`, for PEFT, where it has any."""
        export_hf(
            **self.actor_variables(),
            config=self.model,
            out_dir=folder / "hf",
            source_folder=self.source,
            overwrite=True,
        )
        if self.has_adapters:
            export_peft(
                self.actor.trained["lora"], self.model, folder / "adapter",
                base=self.source.base, like=self.source.adapter, overwrite=True,
            )  # fmt: skip
        if self.exports_critic:
            export_hf(
                self.critic_state.trained["params"], self.critic.config, folder / "critic",
                source_folder=with_layers(self.critic_source, self.critic.config.num_layers), overwrite=True,
            )  # fmt: skip

    def state(self) -> Tree:
        """What a checkpoint holds of the roles."""
        return {"actor": self.actor} | ({"critic": self.critic_state} if self.needs_critic else {})

    def abstract_state(self) -> Tree:
        """Shapes and shardings of `state`: what a checkpoint is restored onto."""
        return {"actor": self.actor_state_abstract} | (
            {"critic": self.critic_state_abstract} if self.needs_critic else {}
        )

    def restore(self, state: Tree) -> None:
        self.actor = state["actor"]
        if self.needs_critic:
            self.critic_state = state["critic"]


def own_mesh(mesh: jax.sharding.Mesh, section: MeshSection | None, role: str) -> jax.sharding.Mesh:
    """The mesh of a role: `mesh`, or its devices in the shape that the role's section says."""
    if section is None:
        return mesh
    return mesh_of_role(mesh, section.data, section.fsdp, section.tensor, f"{role}.mesh")


def computed(m: Model, compute_dtype: str | None, remat: str | None = None) -> Model:
    """The section `model` with what a role says of its own computing; None: as `model` says."""
    return dataclasses.replace(m, compute_dtype=compute_dtype or m.compute_dtype, remat=remat or m.remat)


def model_config(m: Model, hf_config: Mapping[str, Any], **changes: Any) -> ModelConfig:
    """The decoder of a Hugging Face config, computed as the section `model` says."""
    config = ModelConfig.from_hf(
        hf_config, compute_dtype=m.compute_dtype, remat=m.remat, attention=m.attention, shard_tokens=m.shard_tokens
    )
    layers = changes.get("num_layers")
    if layers is not None and not 1 <= layers <= config.num_layers:
        raise ValueError(
            f"critic.num_layers {layers} must lie between 1 and the {config.num_layers} layers of its model"
        )
    return dataclasses.replace(config, **changes)


def actor_config(m: Model, source: Pretrained) -> ModelConfig:
    """The actor's decoder: what the checkpoint keeps in 4 bits stays so, and adapters are those to begin from or new.

    Raises ValueError for 4-bit weights without adapters, and where the settings contradict the adapter.
    """
    config = model_config(m, source.hf_config)
    lora = {"lora_rank": m.lora_rank, "lora_alpha": m.lora_alpha, "lora_targets": tuple(m.lora_targets)}
    if source.adapter is not None:
        lora = lora_settings(source.adapter, config)
        if m.lora_rank not in (0, lora["lora_rank"]):
            raise ValueError(
                f"model.lora_rank is {m.lora_rank}, and the adapter {source.adapter.folder} has rank "
                f"{lora['lora_rank']}: leave lora_rank out, it is taken from the adapter"
            )
    if packed_tensors(source.checkpoint) and not lora["lora_rank"]:
        raise ValueError(
            f"model.path {source.name} holds weights in 4 bits, which cannot be trained: set model.lora_rank to train "
            f"adapters on them, or unpack them, `python scripts/convert_checkpoint.py {source.name} OUT --dequantize`"
        )
    return dataclasses.replace(config, packed=packed_kernels(source.checkpoint, config), **lora)


def optimizer_of(o: Optim) -> Optimizer:
    return make_optimizer(
        weight_decay=o.weight_decay,
        betas=(o.betas[0], o.betas[1]),
        clip_grad=o.clip_grad,
        moments_dtype=o.moments_dtype,
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
    arguments = ("logprobs", "old_logprobs", "advantages", "mask")
    choose(POLICY_LOSSES, a.policy_loss.loss_mode, "actor.policy_loss.loss_mode", takes=arguments)
    choose(KL_ESTIMATORS, a.kl_loss_type, "actor.kl_loss_type", takes=("logprobs", "ref_logprobs"))
    return PolicyLoss(
        name=a.policy_loss.loss_mode, clip_low=a.clip_ratio_low, clip_high=a.clip_ratio_high, clip_c=a.clip_ratio_c,
        tau_pos=a.policy_loss.tau_pos, tau_neg=a.policy_loss.tau_neg, dro_beta=a.policy_loss.dro_beta,
        entropy_coeff=a.entropy_coeff, kl_loss_coef=a.kl_loss_coef if a.use_kl_loss else None,
        kl_loss_type=a.kl_loss_type, temperature=c.rollout.temperature, top_k=c.rollout.top_k, top_p=c.rollout.top_p,
        measure_gap=c.algorithm.rollout_correction.bypass_mode,
    )  # fmt: skip


def abstract_variables(mesh: jax.sharding.Mesh, config: ModelConfig, head: str, dtype: str = "float32") -> Tree:
    """Shape, dtype and sharding of every weight: {"params": .., "lora": .., "packed": ..}, the last as it is stored."""
    shapes, axes = decoder.abstract_params(config, head)
    for name in shapes.keys() - {"packed"}:
        shapes[name] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes[name])
    return {name: with_shardings(mesh, shapes[name], axes[name]) for name in shapes if shapes[name]}


def load_frozen(source: Pretrained, config: ModelConfig, abstract: Tree) -> Tree:
    """All of a language model that does not train, by collection: kernels in 4 bits stay as they are."""
    frozen = {"params": load_base(source, config, abstract)}
    if config.packed is not None:
        frozen["packed"] = load_packed(source.checkpoint, config, abstract["packed"])
    return frozen


def load_base(
    source: Pretrained,
    config: ModelConfig,
    abstract: Tree,
    *,
    new_head: bool = False,
    head_path: str | None = None,
) -> Tree:
    """The "params" of a model. With `new_head`, a score head that it does not hold begins at zero.

    Zero, because a critic begins by knowing nothing, and no random value moves the first advantages; a user's own head
    begins as its module says. `head_path` names a head in the checkpoint. Weights in 4 bits that `config.packed` does
    not name become numbers.
    """
    head = head_of(abstract["params"], config)
    language_model = {row.ours for row in rows(dataclasses.replace(config, module=None))}
    fresh = {row.ours for row in rows(config, head=head)} - language_model if new_head else set()
    if config.packed is None and packed_tensors(source.checkpoint):
        log.warning("%s: its weights in 4 bits become numbers here, four times the memory or more", source.name)
    checkpoint = _lower_layers(source, config, head)
    params = load_params(
        checkpoint, config, abstract["params"], allow_missing=fresh, check_finite=True, dequantize=True,
        head_path=head_path,
    )  # fmt: skip
    missing = {path: struct for path, struct in flatten(abstract["params"]) if dict(flatten(params))[path] is None}
    return unflatten(dict(flatten(params)) | _new_head(config, missing)) if missing else params


def _new_head(config: ModelConfig, missing: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays of a score head that no checkpoint holds, by path."""
    if config.module is None:
        # Not by jnp.zeros, which refuses the host memory of a single device.
        return {path: _zeros(x) for path, x in missing.items()}
    make = jax.jit(
        lambda key: {
            path: x.astype(missing[path].dtype)
            for path, x in flatten(decoder.init_params(config, "score", key)["params"])
            if path in missing
        },
        out_shardings={path: x.sharding for path, x in missing.items()},
    )
    return make(jax.random.key(0))


def _zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback(x.shape, x.sharding, lambda index: np.zeros(x.shape, x.dtype)[index])


def fresh_adapters(mesh: jax.sharding.Mesh, config: ModelConfig, abstract: Tree, seed: int) -> Tree:
    """New "lora" arrays: A random, B zero, so that the model is as it was."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract["lora"])
    make = jax.jit(lambda key: decoder.init_params(config, "lm", key)["lora"], out_shardings=shardings)
    with use_mesh(mesh):
        return make(jax.random.key(seed))


def abstract_train_state(
    optimizer: Optimizer, abstract: Tree, offload: Collection[str] = (), optim: Optim | None = None
) -> TrainState:
    """What is trained of `abstract`, with its optimizer state: what a checkpoint restores onto."""
    trained = {"lora": abstract["lora"]} if "lora" in abstract else {"params": abstract["params"]}
    state = TrainState(trained, abstract_state(optimizer, trained, on_host="optimizer" in offload))
    if optim is None:
        return state
    mesh = jax.tree.leaves(trained)[0].sharding.mesh
    return state._replace(residual=abstract_residual(mesh, optim.grad_compression, trained))


def new_train_state(
    mesh: jax.sharding.Mesh, optimizer: Optimizer, trained: Tree, abstract: TrainState | None = None
) -> TrainState:
    """`trained` with a fresh rest of the state, placed as `abstract` says (else beside the weights)."""
    wanted = TrainState(trained, abstract_state(optimizer, trained)) if abstract is None else abstract

    def fresh(trained: Tree) -> tuple[Tree, Tree]:
        return optimizer.init(trained), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), wanted.residual)

    shardings = jax.tree.map(lambda x: x.sharding, (wanted.opt_state, wanted.residual))
    with use_mesh(mesh):
        return TrainState(trained, *jax.jit(fresh, out_shardings=shardings)(trained))


def compression_of(o: Optim) -> Compression:
    return Compression(o.grad_compression, o.grad_topk)


def with_layers(source: Pretrained, num_layers: int) -> Pretrained:
    """The model with a config of its first layers only."""
    hf_config = dict(source.hf_config)
    if ModelConfig.from_hf(hf_config).num_layers != num_layers:
        hf_config = first_layers(hf_config, num_layers)
    return dataclasses.replace(source, hf_config=hf_config)


def _lower_layers(source: Pretrained, config: ModelConfig, head: str) -> Checkpoint:
    """The checkpoint without the layers above those of `config`: for a critic that is shallower than its model."""
    num_stored = ModelConfig.from_hf(source.hf_config).num_layers
    if num_stored == config.num_layers:
        return source.checkpoint
    checkpoint = dequantized(source.checkpoint)
    whole = {tensor.name for tensor in in_order(dataclasses.replace(config, num_layers=num_stored), head)}
    above = whole - {tensor.name for tensor in in_order(config, head)}
    return checkpoint.with_tensors({name: checkpoint.stored(name) for name in checkpoint.tensors if name not in above})
