"""What an architecture is: sizes from the checkpoint's `config.json`, switches from the family.

`ModelConfig.from_hf` is the only reader of a Hugging Face config, in the spellings of transformers 4 and 5. A family
that is not in `FAMILIES` is refused by name: a guess would load, run and be wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .families import FAMILIES

ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: `theta` and, for long contexts, a rescaling of its frequencies."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position: int = 0  # llama3


@dataclass(frozen=True)
class PackedKernels:
    """Which kernels stay in the 4 bits of bitsandbytes, and how they are packed: see `nf4.py`."""

    modules: tuple[str, ...]  # names of Dense layers, packed in every layer of the model
    dtype: str = "bfloat16"  # that of the numbers they stand for
    blocksize: int = 64
    nested_blocksize: int = 0  # scales in a block of scales; 0: the scales are float32

    @property
    def is_double(self) -> bool:
        return self.nested_blocksize > 0


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one decoder. Hashable: it is static under jit."""

    family: str  # `model_type` of config.json
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope: Rope
    norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm of every query and key head before rope
    # How to compute, not what: chosen by the run.
    compute_dtype: str = "float32"
    remat: Literal["none", "dots", "full", "offload"] = "none"
    shard_tokens: Literal["none", "blocks", "attention"] = "none"
    attention: Literal["xla", "cudnn", "splash"] = "xla"
    lora_rank: int = 0  # 0: no adapters
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ()  # names of Dense layers: q_proj, up_proj ...
    packed: PackedKernels | None = None  # None: every kernel is numbers
    num_labels: int = 1  # outputs of a score head
    score_bias: bool = False
    hf_json: str = field(default="", compare=False, repr=False)  # the config.json that it was made from

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **run: Any) -> ModelConfig:
        """The decoder that a `config.json` describes; `run` sets the fields that a run chooses."""
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(
                f"model_type {family!r} is not a family that jaxrl knows ({', '.join(sorted(FAMILIES))}); "
                f"config.json asks for architectures {config.get('architectures')}"
            )
        defaults = FAMILIES[family]

        def get(key: str, default: Any = None) -> Any:
            value = config.get(key)
            return defaults.get(key, default) if value is None else value

        heads = config["num_attention_heads"]
        _refuse_unsupported(config, get)
        attention_bias = bool(get("attention_bias", False))
        return cls(
            family=family,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=get("num_key_value_heads", heads),
            head_dim=get("head_dim", config["hidden_size"] // heads),
            max_position=get("max_position_embeddings", 2048),
            rope=_rope(config, get),
            norm_eps=get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(get("tie_word_embeddings", False)),
            qkv_bias=defaults.get("qkv_bias", attention_bias),
            o_bias=defaults.get("o_bias", attention_bias),
            mlp_bias=bool(get("mlp_bias", False)),
            qk_norm=defaults.get("qk_norm", False),
            hf_json=json.dumps(config),
            **run,
        )


def _rope(config: Mapping[str, Any], get) -> Rope:
    """Rope settings from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ValueError(f"rope type {kind!r} is not one that jaxrl knows ({', '.join(ROPE_KINDS)})")
    return Rope(
        theta=float(settings.get("rope_theta", get("rope_theta", 10_000.0))),
        kind=kind,
        factor=float(settings.get("factor", 1.0)),
        low_freq_factor=float(settings.get("low_freq_factor", 1.0)),
        high_freq_factor=float(settings.get("high_freq_factor", 4.0)),
        original_max_position=int(settings.get("original_max_position_embeddings", 0)),
    )


def _refuse_unsupported(config: Mapping[str, Any], get) -> None:
    activation = get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act {activation!r} is not one that family {config['model_type']!r} has here (silu)")
    if config.get("use_sliding_window"):
        raise ValueError("use_sliding_window is set, and sliding-window attention is not built: refusing to ignore it")
    if config.get("quantization_config"):
        raise ValueError("quantization_config is set, and quantised checkpoints are not built: refusing to ignore it")
