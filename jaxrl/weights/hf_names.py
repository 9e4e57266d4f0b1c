"""Our names and the Hugging Face names, one row a tensor: read left to right to load, right to left to export.

The pattern is einops' notation: axes of the Hugging Face tensor -> axes of ours, without the leading layer axis that
our `layers.` arrays have. Letters are those of `batch.py` in lower case, c is a label of the score head. Loader,
exporter and publisher all read these rows; there is no other table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange

from ..models.config import ModelConfig
from .stored import Index

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Stored by old versions of transformers, computed by everyone: rotary frequencies and causal masks.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")

# `model_type` -> how its classes begin: LlamaForCausalLM, LlamaForTokenClassification ...
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@dataclass(frozen=True)
class Row:
    """One tensor, or one a layer: `ours` is its path in the parameter tree, `{}` in `hf` the number of the layer."""

    ours: str
    hf: str
    pattern: str

    @property
    def stacked(self) -> bool:
        """Whether ours has a leading layer axis."""
        return "{}" in self.hf

    @property
    def groups(self) -> list[list[str]]:
        """The letters of each axis of the Hugging Face tensor: "(n h) d" is [[n, h], [d]]."""
        left = self.pattern.split("->")[0]
        return [(merged or single).split() for merged, single in re.findall(r"\(([^)]*)\)|(\w+)", left)]

    @property
    def letters(self) -> list[str]:
        """The axes of ours."""
        return self.pattern.split("->")[1].split()

    def hf_names(self, num_layers: int) -> list[str]:
        return [self.hf.format(layer) for layer in range(num_layers)] if self.stacked else [self.hf]

    def hf_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.groups)

    def our_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        shape = tuple(sizes[letter] for letter in self.letters)
        return (sizes["l"], *shape) if self.stacked else shape

    def hf_index(self, index: Index, sizes: Mapping[str, int]) -> Index:
        """Where in the Hugging Face tensor the slice `index` of ours (without the layer axis) lies.

        Of merged axes the outermost is cut and the inner ones are taken whole: rows stay contiguous on disk.
        """
        ranges = dict(zip(self.letters, index, strict=True))
        where = []
        for outer, *inner in self.groups:
            block = math.prod(sizes[letter] for letter in inner)
            start, stop, _ = ranges[outer].indices(sizes[outer])
            where.append(slice(start * block, stop * block))
        return tuple(where)

    def to_ours(self, piece: np.ndarray, index: Index, sizes: Mapping[str, int]) -> np.ndarray:
        """What was read at `hf_index(index)`, with our axes: exactly the slice `index` of ours."""
        inner = {letter: sizes[letter] for group in self.groups for letter in group[1:]}
        whole = rearrange(piece, self.pattern, **inner)
        ranges = zip(self.letters, index, strict=True)
        return whole[tuple(cut if letter in inner else slice(None) for letter, cut in ranges)]

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Ours, of one layer -> the Hugging Face tensor."""
        left, right = self.pattern.split("->")
        return rearrange(array, f"{right} -> {left}")


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """What the letters of the patterns stand for."""
    return {
        "l": config.num_layers,
        "v": config.vocab_size,
        "d": config.hidden_size,
        "n": config.num_heads,
        "k": config.num_kv_heads,
        "h": config.head_dim,
        "f": config.intermediate_size,
        "c": config.num_labels,
    }


def rows(config: ModelConfig, *, head: str = "lm") -> list[Row]:
    """Every tensor of a model in the order of a forward pass; `head` is "lm", or "score" (critic, reward model)."""
    return [
        Row("embed_tokens.embedding", EMBEDDING, "v d -> v d"),
        *_layer_rows(config),
        Row("norm.scale", "model.norm.weight", "d -> d"),
        *HEADS[head](config),
    ]


def in_order(config: ModelConfig, head: str) -> Iterator[tuple[Row, int | None]]:
    """The rows of a model as they come in a forward pass: those of layers once a layer."""
    table = rows(config, head=head)
    stacked = [row for row in table if row.stacked]
    first = table.index(stacked[0])
    yield from ((row, None) for row in table[:first])
    yield from ((row, layer) for layer in range(config.num_layers) for row in stacked)
    yield from ((row, None) for row in table[first + len(stacked) :])


def is_packed(row: Row, config: ModelConfig) -> bool:
    """Whether a row's array is not among the parameters, because the model keeps it in 4 bits."""
    *_, module, leaf = ["", *row.ours.split(".")]
    return config.packed is not None and leaf == "kernel" and module in config.packed.modules


def embedding_of(config: ModelConfig) -> str:
    """The Hugging Face name of the token table."""
    return next(row.hf for row in rows(config) if row.ours == "embed_tokens.embedding")


def head_of(params: Mapping[str, Any]) -> str:
    """Which head a tree of parameters carries."""
    return "score" if "score" in params else "lm"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested dict with their paths, "layers.mlp.up_proj.kernel"."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict that `flatten` gives these paths of."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _layer_rows(config: ModelConfig) -> list[Row]:
    """Llama's block; families that rewire it bring rows of their own."""
    table = [
        ("input_layernorm.scale", "input_layernorm.weight", "d -> d", True),
        ("self_attn.q_proj.kernel", "self_attn.q_proj.weight", "(n h) d -> d n h", True),
        ("self_attn.q_proj.bias", "self_attn.q_proj.bias", "(n h) -> n h", config.qkv_bias),
        ("self_attn.k_proj.kernel", "self_attn.k_proj.weight", "(k h) d -> d k h", True),
        ("self_attn.k_proj.bias", "self_attn.k_proj.bias", "(k h) -> k h", config.qkv_bias),
        ("self_attn.v_proj.kernel", "self_attn.v_proj.weight", "(k h) d -> d k h", True),
        ("self_attn.v_proj.bias", "self_attn.v_proj.bias", "(k h) -> k h", config.qkv_bias),
        ("self_attn.q_norm.scale", "self_attn.q_norm.weight", "h -> h", config.qk_norm),
        ("self_attn.k_norm.scale", "self_attn.k_norm.weight", "h -> h", config.qk_norm),
        ("self_attn.o_proj.kernel", "self_attn.o_proj.weight", "d (n h) -> n h d", True),
        ("self_attn.o_proj.bias", "self_attn.o_proj.bias", "d -> d", config.o_bias),
        ("post_attention_layernorm.scale", "post_attention_layernorm.weight", "d -> d", True),
        ("mlp.gate_proj.kernel", "mlp.gate_proj.weight", "f d -> d f", True),
        ("mlp.gate_proj.bias", "mlp.gate_proj.bias", "f -> f", config.mlp_bias),
        ("mlp.up_proj.kernel", "mlp.up_proj.weight", "f d -> d f", True),
        ("mlp.up_proj.bias", "mlp.up_proj.bias", "f -> f", config.mlp_bias),
        ("mlp.down_proj.kernel", "mlp.down_proj.weight", "d f -> f d", True),
        ("mlp.down_proj.bias", "mlp.down_proj.bias", "d -> d", config.mlp_bias),
    ]
    return [
        Row(f"layers.{ours}", f"model.layers.{{}}.{hf}", pattern) for ours, hf, pattern, present in table if present
    ]


def _lm_rows(config: ModelConfig) -> list[Row]:
    return [] if config.tie_embeddings else [Row("lm_head.kernel", LM_HEAD, "v d -> v d")]


def _score_rows(config: ModelConfig) -> list[Row]:
    kernel = Row("score.kernel", "score.weight", "c d -> d c")
    return [kernel, Row("score.bias", "score.bias", "c -> c")] if config.score_bias else [kernel]


HEADS = {"lm": _lm_rows, "score": _score_rows}
