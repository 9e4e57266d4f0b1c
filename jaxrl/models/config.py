"""What an architecture is: sizes from the checkpoint's `config.json`, switches from the family.

`ModelConfig.from_hf` is the only reader of a Hugging Face config, in the spellings of transformers 4 and 5. A family
that is not in `FAMILIES` is refused by name: a guess would load, run and be wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal, NamedTuple

from .families import FAMILIES

Get = Callable[
    ..., Any
]  # a key of config.json, whatever the family calls it; else the family's default, else that given

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_ROPE_SYNONYMS = {"mrope": "default", "su": "longrope"}
_ROPE_EXAMPLE = '{"rope_type": "linear", "factor": 2.0}'
_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
_PATTERNS = {"sliding_window_pattern", "max_window_layers", "no_rope_layer_interval", "attention_types"}
_NULL_IS_NONE = {
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
}  # null: without, not the default
_MOST_LAYERS = 10_000
# What would change the numbers and is not built: the key, and the values that mean "not used".
_UNSUPPORTED = {
    "quantization_config": (None,),
    "use_bidirectional_attention": (None, False),
    "qk_layernorm": (None, False),
    "add_cross_attention": (None, False),
    "layer_norm_elementwise_affine": (None, True),
    "apply_residual_connection_post_layernorm": (None, False),
    "swiglu_alpha": (None, 1.702),
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: `theta` and, for long contexts, a rescaling of its frequencies (`models/rope.py`)."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position: int = 0  # of the model before it was stretched: llama3, yarn, longrope; dynamic: its context
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    short_factors: tuple[float, ...] = ()  # longrope
    long_factors: tuple[float, ...] = ()  # longrope
    attention_factor: float = 1.0  # cos and sin are multiplied by it: yarn, longrope
    fraction: float = 1.0  # of a head's features that are rotated, its first ones
    interleaved: bool = False  # feature 2i turns with 2i + 1, and not i with i + half


class Run(NamedTuple):
    """Layers one after the other that have the same parameters: they are stacked, and scanned together."""

    name: str  # in the tree of parameters
    layers: range
    is_sparse: bool  # experts instead of one MLP


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
    rope: Rope | None  # None: positions are learned, or ALiBi
    norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm of queries and keys before rope, of every head
    qk_norm_over_heads: bool = False  # or of all heads together
    # rms: Llama's, scaled in the compute dtype; rms_float32: scaled in float32; rms_offset: by 1 + weight (Gemma)
    norm: Literal["rms", "rms_float32", "rms_offset", "layer"] = "rms"
    # Around attention and MLP: before each; before, and on what it returns; only on that; after the residual sum
    norms: Literal["before", "both", "output", "after"] = "before"
    # Attention and MLP side by side, reading one norm of the layer's input or one each
    parallel: Literal["no", "one_norm", "two_norms"] = "no"
    gated: bool = True  # MLP: down(activation(gate(x)) * up(x)), else down(activation(up(x)))
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    positions: Literal["rope", "learned", "alibi"] = "rope"
    position_offset: int = 0  # rows of the table of learned positions before the first
    # Where layers differ by numbers: one entry a layer (of the whole model, also where fewer are used); else empty
    layer_ropes: tuple[Rope | None, ...] = ()  # None: no positions (NoPE)
    layer_windows: tuple[int, ...] = ()  # how many tokens a token sees, itself included; 0: all
    window: int = 0  # of every layer, where `layer_windows` is empty
    attention_scale: float = 0.0  # of queries times keys; 0: 1 / sqrt(head_dim)
    attention_scale_by_layer: bool = False  # and divided by the number of the layer
    attention_softcap: float = 0.0  # cap * tanh(score / cap); 0: none
    sinks: bool = False  # a learned score a head that takes part in the softmax and has no value
    embed_scale: float = 1.0
    embed_norm: bool = False
    embed_size: int = 0  # of the token table, where it is not hidden_size and is projected
    final_norm: bool = True
    residual_scale: float = 1.0  # of what attention and MLP add
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    lm_head_bias: bool = False
    # Mixture of experts
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0  # intermediate size of one
    norm_topk: bool = True  # weights of the chosen experts sum to 1
    expert_bias: bool = False  # of router and experts
    swiglu_limit: float = 0.0  # gpt-oss: gate and up are clipped, sigmoid(1.702 gate), up + 1
    dense_layers: tuple[int, ...] = ()  # layers of a mixture of experts that have one MLP
    # How to compute, not what: chosen by the run.
    max_length: int = 0  # the longest sequence of the run: dynamic and longrope choose by it; 0: max_position
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
    module: str | None = None  # path/to/file.py:Class of a user's own decoder with a score head
    hf_json: str = field(default="", compare=False, repr=False)  # the config.json that it was made from

    def __post_init__(self) -> None:
        lacks = [
            what
            for what, used in (
                ("layers of different windows", self.layer_windows and self.attention == "splash"),
                ("a softcap of scores", self.attention_softcap and self.attention == "cudnn"),
                ("attention sinks", self.sinks),
                ("ALiBi", self.positions == "alibi"),
            )
            if used
        ]
        if lacks and self.attention != "xla":
            raise ValueError(
                f"model.attention {self.attention} cannot compute {' and '.join(lacks)}, which family {self.family} "
                "has: set model.attention=xla"
            )
        dense = {"q_proj", "k_proj", "v_proj", "o_proj"}
        if not self.num_experts or self.dense_layers:
            dense |= {"up_proj", "down_proj", "gate_proj"} if self.gated else {"up_proj", "down_proj"}
        if self.lora_rank and self.lora_targets and dense.isdisjoint(self.lora_targets):
            raise ValueError(
                f"model.lora_targets {', '.join(self.lora_targets)} are no matrices that adapters can sit on in family "
                f"{self.family}: name some of {', '.join(sorted(dense))}"
            )

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank

    @property
    def table_size(self) -> int:
        """The width of the token table and of what the head reads."""
        return self.embed_size or self.hidden_size

    @property
    def context(self) -> int:
        """The most tokens of a sequence."""
        return self.max_length or self.max_position

    @property
    def runs(self) -> tuple[Run, ...]:
        """The layers in groups of equal structure; nearly always one, `layers`."""
        kinds = [bool(self.num_experts) and layer not in self.dense_layers for layer in range(self.num_layers)]
        groups = [(is_sparse, len(list(group))) for is_sparse, group in groupby(kinds)]
        names = ["layers"] if len(groups) == 1 else [f"layers_{number}" for number in range(len(groups))]
        runs, start = [], 0
        for name, (is_sparse, count) in zip(names, groups, strict=True):
            runs.append(Run(name, range(start, start + count), is_sparse))
            start += count
        return tuple(runs)

    @property
    def rope_interleaved(self) -> bool:
        return any(rope is not None and rope.interleaved for rope in (self.rope, *self.layer_ropes))

    def rope_of(self, layer: int) -> Rope | None:
        return self.layer_ropes[layer] if self.layer_ropes else self.rope

    def window_of(self, layer: int) -> int:
        return self.layer_windows[layer] if self.layer_windows else self.window

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **run: Any) -> ModelConfig:
        """The decoder that a `config.json` describes; `run` sets the fields that a run chooses.

        Raises ValueError for a family that is not known, for what is not built, and for values that make no model.
        """
        name = config.get("model_type")
        if name not in FAMILIES:
            raise ValueError(
                f"model_type {name!r} is not a family that jaxrl knows ({', '.join(sorted(FAMILIES))}); "
                f"config.json asks for architectures {config.get('architectures')}"
            )
        try:
            model = cls._of_family(name, config)
        except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise ValueError(f"config.json describes no {name} ({error!r}): fetch it again") from error
        return replace(model, **run)

    @classmethod
    def _of_family(cls, name: str, config: Mapping[str, Any]) -> ModelConfig:
        family = FAMILIES[name]

        def get(key: str, default: Any = None) -> Any:
            spelled = family.spelled.get(key, key)
            if key in _NULL_IS_NONE and spelled in config and config[spelled] is None:
                return default
            for where in (config, family.defaults):
                for spelling in (spelled, key):
                    if where.get(spelling) is not None:
                        return where[spelling]
            return default

        _refuse_unsupported(config)
        heads, hidden = _size(get, "num_attention_heads"), _size(get, "hidden_size")
        model = cls(
            family=name,
            vocab_size=_size(get, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_size(get, "intermediate_size", 4 * hidden),
            num_layers=_size(get, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=_size(get, "num_key_value_heads", heads),
            head_dim=_size(get, "head_dim", hidden // heads),
            max_position=_size(get, "max_position_embeddings", 2048),
            rope=None,
            norm_eps=get("norm_eps", get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(get("tie_word_embeddings", False)),
            qkv_bias=bool(get("attention_bias", False)),
            o_bias=bool(get("attention_bias", False)),
            mlp_bias=bool(get("mlp_bias", False)),
            qk_norm=False,
            activation=_activation(config, get),
            hf_json=json.dumps(config),
            **_numbers(get),
            **_experts(get, get("num_hidden_layers")),
        )
        switches = dict(family.switches)
        if switches.pop("embed_by_width", False):
            switches["embed_scale"] = math.sqrt(hidden)
        interleaved = switches.pop("rope_interleaved", False)
        model = replace(model, **switches)
        return _with_layers(model, config, get, interleaved)


def _size(get: Get, key: str, default: Any = None) -> int:
    size = get(key, default)
    if type(size) is not int or size < 1:
        raise ValueError(f"config.json says that {key} is {size!r}, and it must be a whole number above 0")
    return size


def _activation(config: Mapping[str, Any], get: Get) -> Any:
    name = get("hidden_act", "silu")
    if config["model_type"] == "gemma" and name == "gelu":  # in Gemma's first files, which mean the other one
        name = "gelu_pytorch_tanh"
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"hidden_act {name!r} is not one that family {config['model_type']!r} has here ({', '.join(_ACTIVATIONS)})"
        )
    return _ACTIVATIONS[name]


def _numbers(get: Get) -> dict[str, Any]:
    """The switches that are keys of `config.json`."""
    scalar, hidden = get("query_pre_attn_scalar"), get("hidden_size")
    embed_size = get("word_embed_proj_dim", hidden)
    before = get("do_layer_norm_before", True)
    return {
        "attention_scale": scalar**-0.5 if scalar else get("attention_multiplier", _unscaled(get)),
        "attention_scale_by_layer": bool(get("scale_attn_by_inverse_layer_idx", False)),
        "attention_softcap": get("attn_logit_softcapping", 0.0),
        "embed_scale": get("embedding_multiplier", 1.0),
        "embed_size": 0 if embed_size == hidden else embed_size,
        "residual_scale": get("residual_multiplier", 1.0),
        "logit_scale": 1 / get("logits_scaling", 1.0),
        "logit_softcap": get("final_logit_softcapping", 0.0),
        "parallel": "two_norms" if get("use_parallel_residual", False) else "no",
        "norms": "before" if before else "after",
        "final_norm": before and not get("_remove_final_layer_norm", False),
    }


def _unscaled(get: Get) -> float:
    return 0.0 if get("scale_attn_weights", True) else 1.0


def _experts(get: Get, num_layers: int) -> dict[str, Any]:
    num = get("num_local_experts") or get("num_experts", 0)  # files of transformers 5, and of the Hub
    if not num:
        return {}
    step, dense = get("decoder_sparse_step", 1), get("mlp_only_layers", [])
    return {
        "num_experts": num,
        "experts_per_token": get("num_experts_per_tok"),
        "expert_size": get("moe_intermediate_size", get("intermediate_size")),
        "norm_topk": bool(get("norm_topk_prob", True)),
        "swiglu_limit": get("swiglu_limit", 0.0),
        "dense_layers": tuple(layer for layer in range(num_layers) if layer in dense or (layer + 1) % step),
    }


def _with_layers(model: ModelConfig, config: Mapping[str, Any], get: Get, interleaved: bool) -> ModelConfig:
    """With window and rope of each layer."""
    L = model.num_layers
    if L > _MOST_LAYERS:
        raise ValueError(f"config.json says {L} layers, and no model has more than {_MOST_LAYERS}: it is damaged")
    windows = _windows(config, get, L)
    if model.positions != "rope":
        ropes: tuple[Rope | None, ...] = (None,) * L
    else:
        everywhere, in_windows = _ropes(model, config, get, interleaved)
        ropes = tuple(in_windows if window else everywhere for window in windows)
        ropes = tuple(rope if kept else None for rope, kept in zip(ropes, _has_rope(get, L), strict=True))
    stretch = max((rope.factor for rope in ropes if rope and rope.kind == "dynamic"), default=1.0)
    return replace(
        model,
        max_position=int(model.max_position * stretch),  # `dynamic` says the context before it is stretched
        rope=ropes[0] if len(set(ropes)) == 1 else None,
        layer_ropes=ropes if len(set(ropes)) > 1 else (),
        window=windows[0] if len(set(windows)) == 1 else 0,
        layer_windows=windows if len(set(windows)) > 1 else (),
    )


def _windows(config: Mapping[str, Any], get: Get, num_layers: int) -> tuple[int, ...]:
    """The sliding window of each layer, 0 where there is none."""
    known, size = FAMILIES[config["model_type"]].defaults, get("sliding_window")
    if not known.keys() & {"sliding_window", "window_size"} or not size or get("use_sliding_window") is False:
        return (0,) * num_layers
    kinds, types = get("layer_types"), get("attention_types")
    if types:  # GPT-Neo: [[["global", "local"], 12]]
        kinds = [kind for names, count in types for _ in range(count) for kind in names]
    if kinds and known.keys() & _PATTERNS:  # the other families have the window in every layer, whatever is listed
        if len(kinds) < num_layers:
            raise ValueError(f"config.json names the kind of {len(kinds)} layers, and there are {num_layers}")
        return tuple(size if kind in ("sliding_attention", "local") else 0 for kind in kinds[:num_layers])
    if pattern := get("sliding_window_pattern"):
        return tuple(size if (layer + 1) % pattern else 0 for layer in range(num_layers))
    if (full := get("max_window_layers")) is not None:
        return tuple(0 if layer < full else size for layer in range(num_layers))
    if get("no_rope_layer_interval"):
        return tuple(0 if has_rope else size for has_rope in _has_rope(get, num_layers))
    return (size,) * num_layers


def _has_rope(get: Get, num_layers: int) -> tuple[bool, ...]:
    """SmolLM3's layers without positions: every fourth, or those that a list says."""
    kept, interval = get("no_rope_layers"), get("no_rope_layer_interval")  # 1 in the list: rope
    if kept is None:
        return tuple(not interval or (layer + 1) % interval != 0 for layer in range(num_layers))
    return tuple(bool(has_rope) for has_rope in kept[:num_layers])


def _ropes(model: ModelConfig, config: Mapping[str, Any], get: Get, interleaved: bool) -> tuple[Rope, Rope]:
    """The rope of layers that see everything, and of those with a window.

    Read from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4). Gemma 3 and
    OLMo 3 have two, and only the first is rescaled.
    """
    found = config.get("rope_parameters") or get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise ValueError(
            f"config.json says that the rope is {found!r}, and it must be an object such as {_ROPE_EXAMPLE}"
        )
    settings = [found, found]
    if any(isinstance(value, Mapping) for value in found.values()):
        settings = [found["full_attention"], found["sliding_attention"]]
    elif FAMILIES[config["model_type"]].two_ropes:
        theta = get("rope_local_base_freq", found.get("rope_theta", get("rope_theta", 10_000.0)))
        settings = [found, {"rope_theta": theta}]
    everywhere, in_windows = (_rope(dict(s), model, config, get, interleaved) for s in settings)
    return everywhere, in_windows


def rope_kind(name: str, family: str) -> str:
    """What a rope is called now: early files have other names."""
    if family == "phi3" and name == "yarn":
        return "longrope"
    return _ROPE_SYNONYMS.get(name, name)


def _rope(settings: dict[str, Any], model: ModelConfig, config: Mapping[str, Any], get: Get, interleaved: bool) -> Rope:
    kind = rope_kind(settings.get("rope_type", settings.get("type", "default")), model.family)
    if kind not in ROPE_KINDS:
        raise ValueError(f"rope type {kind!r} is not one that jaxrl knows ({', '.join(ROPE_KINDS)})")
    rotary_dim = get("rotary_dim")
    fraction = settings.get("partial_rotary_factor", get("partial_rotary_factor", 1.0))
    stretched_from = settings.get("original_max_position_embeddings", get("original_max_position_embeddings"))
    original = model.max_position if kind == "dynamic" or stretched_from is None else stretched_from
    factor = settings.get("factor")
    if factor is None:
        factor = model.max_position / original if kind in ("yarn", "longrope") else 1.0
    rope = Rope(
        theta=float(settings.get("rope_theta", get("rope_theta", 10_000.0))),
        kind=kind,
        factor=float(factor),
        fraction=rotary_dim / model.head_dim if rotary_dim else fraction,
        interleaved=interleaved,
    )
    if kind == "llama3":
        return replace(
            rope,
            low_freq_factor=float(settings.get("low_freq_factor", 1.0)),
            high_freq_factor=float(settings.get("high_freq_factor", 4.0)),
            original_max_position=int(original),
        )
    if kind in ("dynamic", "yarn", "longrope"):
        rope = replace(rope, original_max_position=int(original))
    if kind == "yarn":
        return replace(
            rope,
            beta_fast=float(settings.get("beta_fast") or 32),
            beta_slow=float(settings.get("beta_slow") or 1),
            truncate=bool(settings.get("truncate", True)),
            attention_factor=_yarn_attention_factor(settings, rope.factor),
        )
    if kind == "longrope":
        rope = replace(
            rope, short_factors=_tuple(settings, "short_factor"), long_factors=_tuple(settings, "long_factor")
        )
        num = int(model.head_dim * rope.fraction) // 2
        if {len(rope.short_factors), len(rope.long_factors)} != {num}:
            raise ValueError(
                f"rope_scaling has {len(rope.short_factors)} short and {len(rope.long_factors)} long factors, and "
                f"longrope needs {num} of each, one for every pair of rotated features"
            )
        stretch = max(rope.factor, 1.0)
        computed = math.sqrt(1 + math.log(stretch) / math.log(original))
        return replace(rope, attention_factor=float(settings.get("attention_factor") or computed))
    return rope


def _yarn_attention_factor(settings: Mapping[str, Any], factor: float) -> float:
    """What the paper suggests, 0.1 ln(factor) + 1, or DeepSeek's ratio of two of these (arXiv:2309.00071)."""

    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if settings.get("attention_factor") is not None:
        return float(settings["attention_factor"])
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return of(settings["mscale"]) / of(settings["mscale_all_dim"])
    return of(1.0)


def _tuple(settings: Mapping[str, Any], key: str) -> tuple[float, ...]:
    return tuple(float(factor) for factor in settings.get(key) or ())


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for key, unused in _UNSUPPORTED.items():
        if config.get(key) not in unused:
            what = "quantised checkpoints are" if key == "quantization_config" else "it is"
            raise ValueError(f"{key} is set, and {what} not built: refusing to ignore it")
