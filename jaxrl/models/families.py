"""The families of decoders: what `config.json` leaves out, because it is a default or because the architecture implies it.

Adding a Llama-shaped family is adding a row here; one whose tensors have other names has these in
`weights/family_names.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Family(NamedTuple):
    """One architecture. What a row does not say is as in Llama.

    `classes` is how its classes in transformers begin: LlamaForCausalLM, LlamaForTokenClassification ... `defaults` are
    keys of `config.json` that its files may leave out. `spelled` says under which other key a file of this family keeps
    one ("hidden_size" -> "n_embd"). `switches` are fields of `ModelConfig` that it fixes.
    """

    classes: str
    defaults: Mapping[str, Any] = {}
    switches: Mapping[str, Any] = {}
    spelled: Mapping[str, str] = {}
    odd_classes: Mapping[str, str] = {}  # those that transformers calls otherwise
    two_ropes: bool = False  # layers with a window have a rope of their own, which is not rescaled
    lacks: tuple[str, ...] = ()  # kinds of classes that transformers does not have


_GEMMA: dict[str, Any] = {
    "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
}  # fmt: skip
_GEMMA_SPELLED = {"hidden_act": "hidden_activation"}
_GEMMA2 = {"norm": "rms_offset", "embed_by_width": True, "norms": "both"}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_position_embeddings": 32768}
_GPT2_SPELLED = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "hidden_act": "activation_function",
    "norm_eps": "layer_norm_epsilon",
}  # fmt: skip
_GPT2 = {"hidden_act": "gelu_new", "norm_eps": 1e-5, "tie_word_embeddings": True}
_GPT2_SWITCHES = {"norm": "layer", "gated": False, "mlp_bias": True}
_NO_TOKEN_CLASS = ("ForTokenClassification",)

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral", {"sliding_window": 4096, "max_position_embeddings": 131_072}),
    "qwen2": Family("Qwen2", {**_QWEN, "max_window_layers": 28}, {"qkv_bias": True, "o_bias": False}),
    "qwen3": Family("Qwen3", {**_QWEN, "max_window_layers": 28, "head_dim": 128}, {"qk_norm": True}),
    "qwen3_moe": Family(
        "Qwen3Moe",
        {**_QWEN, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False},
        {"qk_norm": True},
    ),
    "mixtral": Family(
        "Mixtral",
        {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True,
         "sliding_window": None, "max_position_embeddings": 131_072}
    ),
    "gemma": Family("Gemma", _GEMMA, {"norm": "rms_offset", "embed_by_width": True}, _GEMMA_SPELLED),
    "gemma2": Family(
        "Gemma2",
        {**_GEMMA, "sliding_window": 4096, "sliding_window_pattern": 2, "query_pre_attn_scalar": 256,
         "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _GEMMA2, _GEMMA_SPELLED,
    ),
    "gemma3_text": Family(
        "Gemma3",
        {**_GEMMA, "sliding_window": 4096, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
         "rope_theta": 1e6, "rope_local_base_freq": 10_000.0, "max_position_embeddings": 131_072,
         "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
         "num_attention_heads": 8, "num_key_value_heads": 4},
        {**_GEMMA2, "qk_norm": True}, _GEMMA_SPELLED,
        {"Gemma3ForSequenceClassification": "Gemma3TextForSequenceClassification"}, two_ropes=True, lacks=_NO_TOKEN_CLASS,
    ),
    "phi3": Family("Phi3", {"sliding_window": None, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}),
    "smollm3": Family(
        "SmolLM3",
        {"rope_theta": 2e6, "use_sliding_window": False, "sliding_window": None, "no_rope_layer_interval": 4,
         "tie_word_embeddings": True, "max_position_embeddings": 32768}
    ),
    "olmo2": Family(
        "Olmo2",
        {"rms_norm_eps": 1e-5}, {"norm": "rms_float32", "norms": "output", "qk_norm": True, "qk_norm_over_heads": True},
        lacks=_NO_TOKEN_CLASS,
    ),
    "olmo3": Family(
        "Olmo3",
        {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "sliding_window": 4096, "sliding_window_pattern": 4,
         "max_position_embeddings": 2048},
        {"norm": "rms_float32", "norms": "output", "qk_norm": True, "qk_norm_over_heads": True},
        two_ropes=True, lacks=_NO_TOKEN_CLASS,
    ),
    "glm4": Family(
        "Glm4",
        {"attention_bias": True, "head_dim": 128, "rms_norm_eps": 1.5625e-7, "partial_rotary_factor": 0.5,
         "max_position_embeddings": 131_072},
        {"norms": "both", "o_bias": False, "rope_interleaved": True},
    ),
    "gpt_oss": Family(
        "GptOss",
        {"attention_bias": True, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 150_000.0, "sliding_window": 128,
         "sliding_window_pattern": 2, "num_experts": 128, "num_experts_per_tok": 4, "norm_topk_prob": True,
         "swiglu_limit": 7.0, "max_position_embeddings": 131_072,
         "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "truncate": False,
                          "original_max_position_embeddings": 4096}},
        {"norm": "rms_float32", "sinks": True, "expert_bias": True},
    ),
    "granite": Family("Granite", {"attention_multiplier": 1.0}, lacks=(*_NO_TOKEN_CLASS, "ForSequenceClassification")),
    "starcoder2": Family(
        "Starcoder2",
        {"use_bias": True, "sliding_window": None, "norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh",
         "tie_word_embeddings": True, "max_position_embeddings": 4096},
        {"norm": "layer", "gated": False},
        {"attention_bias": "use_bias", "mlp_bias": "use_bias", "norm_eps": "norm_epsilon"},
    ),
    "gpt_neox": Family(
        "GPTNeoX",
        {"attention_bias": True, "hidden_act": "gelu", "norm_eps": 1e-5, "rotary_pct": 0.25,
         "use_parallel_residual": True},
        {"norm": "layer", "gated": False, "mlp_bias": True},
        {"num_key_value_heads": "num_attention_heads", "rope_theta": "rotary_emb_base",
         "partial_rotary_factor": "rotary_pct", "norm_eps": "layer_norm_eps"},
    ),
    "phi": Family(
        "Phi",
        {"attention_bias": True, "hidden_act": "gelu_new", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
        {"norm": "layer", "gated": False, "mlp_bias": True, "parallel": "one_norm", "lm_head_bias": True},
        {"norm_eps": "layer_norm_eps"},
    ),
    "gptj": Family(
        "GPTJ",
        {**_GPT2, "tie_word_embeddings": False, "rotary_dim": 64, "max_position_embeddings": 2048},
        {**_GPT2_SWITCHES, "parallel": "one_norm", "lm_head_bias": True, "rope_interleaved": True}, _GPT2_SPELLED,
        lacks=_NO_TOKEN_CLASS,
    ),
    "gpt2": Family(
        "GPT2",
        {**_GPT2, "max_position_embeddings": 1024},
        {**_GPT2_SWITCHES, "qkv_bias": True, "o_bias": True, "positions": "learned"}, _GPT2_SPELLED,
        {"GPT2ForCausalLM": "GPT2LMHeadModel"},
    ),
    "gpt_neo": Family(
        "GPTNeo",
        {**_GPT2, "window_size": 256, "attention_types": [[["global", "local"], 12]]},
        {**_GPT2_SWITCHES, "o_bias": True, "positions": "learned", "attention_scale": 1.0},
        {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "norm_eps": "layer_norm_epsilon",
         "hidden_act": "activation_function", "sliding_window": "window_size"},
    ),
    "opt": Family(
        "OPT",
        {"hidden_act": "relu", "tie_word_embeddings": True, "norm_eps": 1e-5, "enable_bias": True},
        {"norm": "layer", "gated": False, "positions": "learned", "position_offset": 2},
        {"intermediate_size": "ffn_dim", "attention_bias": "enable_bias", "mlp_bias": "enable_bias",
         "hidden_act": "activation_function"},
        lacks=_NO_TOKEN_CLASS,
    ),
    "bloom": Family(
        "Bloom",
        {"hidden_act": "gelu_new", "norm_eps": 1e-5, "tie_word_embeddings": True},
        {**_GPT2_SWITCHES, "qkv_bias": True, "o_bias": True, "positions": "alibi", "embed_norm": True},
        {"hidden_size": "n_embed", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
         "norm_eps": "layer_norm_epsilon", "max_position_embeddings": "seq_length"},
    ),
}  # fmt: skip

# Models that see too -> the family of their language model, whose config stands in `text_config`.
LANGUAGE_MODELS = {"gemma3": "gemma3_text"}
