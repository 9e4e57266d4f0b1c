"""What training and generating have to compute, by formula: a multiplication and an addition count as two.

Padding, clipping and what remat computes again do not count, so that a rate of these FLOPs is comparable between
programs. Of experts, those that a token chooses count.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import jax
from jaxtyping import Int
from numpy import ndarray

from .config import ModelConfig
from .decoder import abstract_params


@cache
def layer_weights(config: ModelConfig) -> int:
    """Weights in the matrices of all layers that one token is multiplied with."""
    params = abstract_params(replace(config, packed=None))[0]
    total = 0.0
    for path, leaf in jax.tree.leaves_with_path([params["params"][run.name] for run in config.runs]):
        *_, module, name = (str(getattr(key, "key", "")) for key in path)
        if name == "kernel":
            part = config.experts_per_token / config.num_experts if module.startswith("expert_") else 1
            total += part * math.prod(leaf.shape)
    return round(total)


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
