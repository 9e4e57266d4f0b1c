"""What a program has to compute and to move, by formula: XLA counts the body of a loop once, so it cannot be asked.

FLOPs are those of the products: with the weights, in attention, with the head. Bytes of memory are the least that the
program moves if nothing but the fastest caches is fused away: weights, optimizer state, activations at the products,
attention scores where the implementation writes them, logits, the KV cache. Both are per device, evenly divided.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from ..models.config import ModelConfig
from ..models.decoder import abstract_params
from ..offload import waits
from .programs import Work

SCORE_BYTES = 10  # of an attention score that goes through memory: float32 written and read, its weight written
LOGIT_BYTES = 12  # float32 written, read for the normaliser and for the word


class Sizes(NamedTuple):
    """Of a model: numbers of weights in products."""

    layers: int
    head: int
    widths: int  # what the products of one token in all layers read and write, in elements


class Cost(NamedTuple):
    flops: float
    memory_bytes: float


def sizes_of(model: ModelConfig, head: str) -> Sizes:
    params = abstract_params(model, head)[0]["params"]
    layers = [params[run.name] for run in model.runs]
    kernels = [leaf for path, leaf in jax.tree.leaves_with_path(layers) if getattr(path[-1], "key", "") == "kernel"]
    c = model
    heads = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    widths = 2 * c.hidden_size + heads + c.num_heads * c.head_dim + c.hidden_size + 2 * c.hidden_size
    widths += 3 * c.intermediate_size
    table = 0 if head == "score" else c.vocab_size * c.hidden_size
    return Sizes(sum(math.prod(kernel.shape) for kernel in kernels), table, c.num_layers * widths)


def cost(work: Work, mesh_shape: dict[str, int]) -> Cost:
    """Of one call on one device."""
    if work.kind == "move":  # what goes in and out; `report.py` knows it from XLA
        return Cost(0.0, 0.0)
    c = work.model
    sizes = sizes_of(c, "score" if c.score_bias else "lm")
    devices, tensor = math.prod(mesh_shape.values()), mesh_shape["tensor"]
    width = 2 if c.compute_dtype == "bfloat16" else 4
    count = 1 if work.kind == "decode" else work.columns
    tokens, targets = work.rows * count, work.rows * work.targets
    attended = c.num_layers * 4 * work.columns * c.num_heads * c.head_dim
    body, head = tokens * (2 * sizes.layers + attended), 2 * targets * sizes.head
    passes, head_passes = 1.0, 1.0
    if work.kind == "update":
        passes = (2.0 if c.lora_rank else 3.0) + (c.remat in ("full", "offload"))
        head_passes = 4.0  # forward, again for the gradient, and the two products of the gradient
    flops = work.micro_batches * (passes * body + head_passes * head) / devices

    weights = (sizes.layers + sizes.head) / tensor
    memory = passes * weights * width
    if work.kind == "decode":
        cache = 2 * c.num_layers * work.rows * work.columns * c.num_kv_heads * c.head_dim
        memory += width * cache / devices + LOGIT_BYTES * targets * c.vocab_size / devices
    else:
        scores = c.num_layers * tokens * work.columns * c.num_heads * SCORE_BYTES if c.attention == "xla" else 0
        logits = LOGIT_BYTES * targets * (c.vocab_size if sizes.head else 0)
        memory += (passes * (tokens * sizes.widths * width + scores) + head_passes * logits / 2) / devices
    memory *= work.micro_batches
    if work.kind == "update":
        shard = mesh_shape["fsdp"] * tensor
        trained = 0 if c.lora_rank else sizes.layers + 2 * sizes.head
        memory += work.micro_batches * 8 * trained / shard  # gradients added up in float32
        memory += 28 * trained / shard  # parameters and two moments read and written, gradients read
    return Cost(flops, memory)


def bytes_of(tree: Any) -> int:
    """Bytes on one device of arrays that know their sharding."""
    return sum(map(_shard_bytes, jax.tree.leaves(tree)))


def waiting_bytes(tree: Any) -> int:
    """Of them, those in host memory where the tree is offloaded."""
    return sum(_shard_bytes(leaf) for path, leaf in jax.tree.leaves_with_path(tree) if waits(path, leaf))


def _shard_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
