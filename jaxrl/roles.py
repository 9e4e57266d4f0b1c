"""The models of a run and their weights: actor, critic, reference, reward model.

A role that trains has a `TrainState` (what the optimizer moves: "params", or "lora" where there are adapters) and
`frozen` collections beside it. Shapes come first, then shardings, then arrays: no weight exists unsharded.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .config import Model, Optim
from .models import decoder
from .models.config import ModelConfig
from .optimizer import Optimizer, abstract_state, make_optimizer
from .parallel import use_mesh, with_shardings
from .update import TrainState
from .weights.folder import load_hf_config
from .weights.formats import open_checkpoint
from .weights.hf_names import rows
from .weights.load import load_params
from .weights.stored import Checkpoint

Tree = Any


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
