"""What training and generating have to compute, by formula: a multiplication and an addition count as two.

Padding, clipping and what remat computes again do not count, so that a rate of these FLOPs is comparable between
programs. Of experts, those that a token chooses count.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Int
from numpy import ndarray

from .config import ModelConfig
from .decoder import abstract_params


class Kernel(NamedTuple):
    """A matrix of a run of layers: shape and logical axes, and which part of it one token is multiplied with."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    part: float


@cache
def layer_kernels(config: ModelConfig) -> tuple[Kernel, ...]:
    """The matrices of all layers, stacked by layer: of experts, a token chooses a part."""
    params, axes = (tree["params"] for tree in abstract_params(replace(config, packed=None, module=None)))
    kernels = []
    for run in config.runs:
        words = jax.tree.leaves(axes[run.name], is_leaf=lambda x: isinstance(x, PartitionSpec))
        for (path, leaf), names in zip(jax.tree.leaves_with_path(params[run.name]), words, strict=True):
            *_, module, name = (str(getattr(key, "key", "")) for key in path)
            if name == "kernel":
                part = config.experts_per_token / config.num_experts if module.startswith("expert_") else 1.0
                kernels.append(Kernel(leaf.shape, tuple(names), part))
    return tuple(kernels)


def layer_weights(config: ModelConfig) -> int:
    """Weights in the matrices of all layers that one token is multiplied with."""
    return round(sum(kernel.part * math.prod(kernel.shape) for kernel in layer_kernels(config)))


def update_flops(
    config: ModelConfig,
    prompt_lengths: Int[ndarray, "B"],
    response_lengths: Int[ndarray, "B"],
    *,
    head: str = "lm",
    frozen: bool = False,
) -> float:
    """Of one pass of training over B sequences; `head` is "lm" or "score", `frozen` says that adapters alone train.

    6 a weight and token (2 forward, 4 backward, of which 2 are the weights' own gradient): the layers at every token,
    the head at response tokens. Causal attention over T tokens: 3 x 4 x L N H x T (T + 1) / 2. A prompt counts once for
    each of its responses.
    """
    lengths = prompt_lengths + response_lengths
    a_weight = 4 if frozen else 6
    table = config.vocab_size * config.hidden_size if head == "lm" else 0
    products = a_weight * (layer_weights(config) * lengths.sum() + table * response_lengths.sum())
    return float(products + 3 * _attention_flops(config, lengths))


def generate_flops(
    config: ModelConfig, prompt_lengths: Int[ndarray, "B"], response_lengths: Int[ndarray, "B"]
) -> float:
    """Of drawing the responses: every prompt is read for itself, and the token drawn last is not read any more."""
    lengths = prompt_lengths + response_lengths - 1
    head = config.vocab_size * config.hidden_size * response_lengths.sum()
    return float(2 * layer_weights(config) * lengths.sum() + 2 * head + _attention_flops(config, lengths))


def _attention_flops(config: ModelConfig, lengths: Int[ndarray, "B"]) -> float:
    """Forward: queries with keys and weights with values, of each token with those before it and itself."""
    return 4 * config.num_layers * config.num_heads * config.head_dim * float((lengths * (lengths + 1) / 2).sum())
