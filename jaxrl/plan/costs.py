"""What a program has to compute and to move, by formula: XLA counts the body of a loop once, so it cannot be asked.

FLOPs are those of the products: with the weights, in attention, with the head. Bytes of memory are the least that the
program moves if nothing but the fastest caches is fused away: weights, optimizer state, activations at the products,
attention scores where the implementation writes them, logits, the KV cache. Both are of one device.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh

from ..models.config import ModelConfig
from ..models.flops import layer_kernels
from ..offload import waits
from ..parallel import partition
from .programs import Work

SCORE_BYTES = 10  # of an attention score that goes through memory: float32 written and read, its weight written
LOGIT_BYTES = 12  # float32 written, read for the normaliser and for the word


class Sizes(NamedTuple):
    """Of a model, on one device of the axis `tensor`: numbers of weights in products, and what these read and write."""

    layers: float  # that one token is multiplied with: of experts, those that it chooses
    stored: float  # of all layers
    head: float
    widths: float  # of the activations of one token in all layers, in elements


class Cost(NamedTuple):
    flops: float
    memory_bytes: float


def sizes_of(model: ModelConfig, head: str, mesh: AbstractMesh) -> Sizes:
    c, tensor, layers, stored = model, mesh.shape["tensor"], 0.0, 0.0
    for kernel in layer_kernels(c):
        split = any("tensor" in (names or ()) for names in partition(mesh, kernel.axes, kernel.shape))
        numbers = math.prod(kernel.shape) / (tensor if split else 1)
        layers, stored = layers + kernel.part * numbers, stored + numbers
    heads = (
        2 * c.num_heads / _ways(tensor, c.num_heads) + 2 * c.num_kv_heads / _ways(tensor, c.num_kv_heads)
    ) * c.head_dim
    widths = 5 * c.hidden_size * c.num_layers + heads * c.num_layers
    for run in c.runs:
        mlp = c.experts_per_token * c.expert_size if run.is_sparse else c.intermediate_size
        widths += len(run.layers) * 3 * mlp / tensor
    table = 0 if head == "score" else c.vocab_size * c.hidden_size / _ways(tensor, c.vocab_size)
    return Sizes(layers, stored, table, widths)


def _ways(tensor: int, size: int) -> int:
    """How often the axis `tensor` splits a dimension: one that it does not divide is whole on every device."""
    return tensor if size % tensor == 0 else 1


def cost(work: Work, mesh_shape: dict[str, int]) -> Cost:
    """Of one call on one device: rows are split over `data` and `fsdp`, and over `tensor` what it divides."""
    if work.kind == "move":  # what goes in and out; `report.py` knows it from XLA
        return Cost(0.0, 0.0)
    c, fsdp, tensor = work.model, mesh_shape["fsdp"], mesh_shape["tensor"]
    sizes = sizes_of(
        c, "score" if c.score_bias else "lm", AbstractMesh(tuple(mesh_shape.values()), tuple(mesh_shape.keys()))
    )
    width = 2 if c.compute_dtype == "bfloat16" else 4
    rows = work.rows / (mesh_shape["data"] * fsdp)
    count = 1 if work.kind == "decode" else work.columns
    tokens, targets = rows * count, rows * work.targets
    split = tensor if c.shard_tokens == "attention" else _ways(tensor, c.num_heads)
    attended = c.num_layers * 4 * work.columns * c.num_heads * c.head_dim / split
    body, head = tokens * (2 * sizes.layers + attended), 2 * targets * sizes.head
    passes, head_passes = 1.0, 1.0
    if work.kind == "update":
        passes = (2.0 if c.lora_rank else 3.0) + (c.remat in ("full", "offload"))
        head_passes = 4.0  # forward, again for the gradient, and the two products of the gradient
    flops = work.micro_batches * (passes * body + head_passes * head)

    memory = passes * (min(sizes.stored, tokens * sizes.layers) + sizes.head) * width
    words = c.vocab_size / _ways(tensor, c.vocab_size)
    if work.kind == "decode":
        cache = 2 * c.num_layers * rows * work.columns * c.num_kv_heads * c.head_dim / _ways(tensor, c.num_kv_heads)
        memory += width * cache + LOGIT_BYTES * targets * words
    else:
        scores = c.num_layers * tokens * work.columns * c.num_heads / split * SCORE_BYTES if c.attention == "xla" else 0
        logits = LOGIT_BYTES * targets * (words if sizes.head else 0)
        memory += passes * (tokens * sizes.widths * width + scores) + head_passes * logits / 2
    memory *= work.micro_batches
    if work.trains is not None:
        gradients = bytes_of(work.trains.trained)  # added up in the dtype of what trains
        memory += work.micro_batches * 2 * gradients
        memory += 2 * bytes_of(work.trains) + gradients  # weights and moments read and written, gradients read
    return Cost(flops, memory)


def bytes_of(tree: Any) -> int:
    """Bytes on one device of arrays that know their sharding."""
    return sum(map(_shard_bytes, jax.tree.leaves(tree)))


def waiting_bytes(tree: Any) -> int:
    """Of them, those in host memory where the tree is offloaded."""
    return sum(_shard_bytes(leaf) for path, leaf in jax.tree.leaves_with_path(tree) if waits(path, leaf))


def _shard_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
