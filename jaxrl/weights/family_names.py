"""What each family calls the modules of its models, where Llama calls them otherwise; `hf_names.py` makes rows of it.

A family that is not here has Llama's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# Ours -> Llama's; what is not here has one name on both sides. `{}` is the number of a layer, then of an expert.
_LLAMA = {
    "embed_tokens": "model.embed_tokens",
    "layers": "model.layers.{}",
    "norm": "model.norm",
    "mlp.router": "mlp.gate",
    "mlp.expert_gate": "mlp.experts.{}.gate_proj",
    "mlp.expert_up": "mlp.experts.{}.up_proj",
    "mlp.expert_down": "mlp.experts.{}.down_proj",
}
_QKV: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")


class FamilyNames(NamedTuple):
    """The names of a family.

    `fused` says of a module that it is a part of a tensor, and how the parts lie in it: in `rows` (all of one, then all
    of the next) or by `heads` (query, key and value of one head, then of the next).
    """

    renamed: Mapping[str, str] = {}
    fused: Mapping[str, str] = {}
    conv1d: bool = False  # matrices are stored [in, out]
    stacked_experts: bool = False  # all experts in one tensor
    token_head: str = "score"  # the head of its ForTokenClassification

    def of(self, module: str) -> str:
        return self.renamed.get(module) or _LLAMA.get(module, module)


_SANDWICH = {
    "attention_output_norm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}
_OLMO = {"attention_output_norm": "post_attention_layernorm", "mlp_output_norm": "post_feedforward_layernorm"}
_TRANSFORMER = {
    "embed_tokens": "transformer.wte",
    "embed_positions": "transformer.wpe",
    "layers": "transformer.h.{}",
    "norm": "transformer.ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
}
_PHI3_FUSED = {**{name: "self_attn.qkv_proj" for name in _QKV}, **{name: "mlp.gate_up_proj" for name in _GATE_UP}}

FAMILY_NAMES = {
    "mixtral": FamilyNames(
        {
            "mlp.router": "block_sparse_moe.gate",
            "mlp.expert_gate": "block_sparse_moe.experts.{}.w1",
            "mlp.expert_up": "block_sparse_moe.experts.{}.w3",
            "mlp.expert_down": "block_sparse_moe.experts.{}.w2",
        },
    ),
    "gemma2": FamilyNames(_SANDWICH),
    "gemma3_text": FamilyNames(_SANDWICH),
    "phi3": FamilyNames(_PHI3_FUSED, dict.fromkeys(_PHI3_FUSED, "rows")),
    "olmo2": FamilyNames(_OLMO),
    "olmo3": FamilyNames(_OLMO),
    "glm4": FamilyNames(
        {
            "attention_output_norm": "post_self_attn_layernorm",
            "mlp_output_norm": "post_mlp_layernorm",
            **dict.fromkeys(_GATE_UP, "mlp.gate_up_proj"),
        },
        dict.fromkeys(_GATE_UP, "rows"),
    ),
    "gpt_oss": FamilyNames(
        {
            "mlp.router": "mlp.router",
            "mlp.expert_gate": "mlp.experts.gate_up_proj",
            "mlp.expert_down": "mlp.experts.down_proj",
        },
        stacked_experts=True,
    ),
    "starcoder2": FamilyNames({"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}),
    "gpt_neox": FamilyNames(
        {
            "embed_tokens": "gpt_neox.embed_in",
            "layers": "gpt_neox.layers.{}",
            "norm": "gpt_neox.final_layer_norm",
            "lm_head": "embed_out",
            **dict.fromkeys(_QKV, "attention.query_key_value"),
            "self_attn.o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        dict.fromkeys(_QKV, "heads"),
        token_head="classifier",
    ),
    "phi": FamilyNames(
        {
            "norm": "model.final_layernorm",
            "self_attn.o_proj": "self_attn.dense",
            "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2",
        },
    ),
    "gptj": FamilyNames(
        {
            **_TRANSFORMER,
            **{f"self_attn.{x}_proj": f"attn.{x}_proj" for x in "qkv"},
            "self_attn.o_proj": "attn.out_proj",
            "mlp.up_proj": "mlp.fc_in",
            "mlp.down_proj": "mlp.fc_out",
        },
    ),
    "gpt2": FamilyNames(
        {
            **_TRANSFORMER,
            **dict.fromkeys(_QKV, "attn.c_attn"),
            "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        dict.fromkeys(_QKV, "rows"),
        conv1d=True,
        token_head="classifier",
    ),
    "gpt_neo": FamilyNames(
        {
            **_TRANSFORMER,
            **{f"self_attn.{x}_proj": f"attn.attention.{x}_proj" for x in "qkv"},
            "self_attn.o_proj": "attn.attention.out_proj",
            "mlp.up_proj": "mlp.c_fc",
            "mlp.down_proj": "mlp.c_proj",
        },
        token_head="classifier",
    ),
    "opt": FamilyNames(
        {
            "embed_tokens": "model.decoder.embed_tokens",
            "embed_positions": "model.decoder.embed_positions",
            "project_in": "model.decoder.project_in",
            "project_out": "model.decoder.project_out",
            "layers": "model.decoder.layers.{}",
            "norm": "model.decoder.final_layer_norm",
            "input_layernorm": "self_attn_layer_norm",
            "post_attention_layernorm": "final_layer_norm",
            "self_attn.o_proj": "self_attn.out_proj",
            "mlp.up_proj": "fc1",
            "mlp.down_proj": "fc2",
        },
    ),
    "bloom": FamilyNames(
        {
            "embed_tokens": "transformer.word_embeddings",
            "embed_norm": "transformer.word_embeddings_layernorm",
            "layers": "transformer.h.{}",
            "norm": "transformer.ln_f",
            **dict.fromkeys(_QKV, "self_attention.query_key_value"),
            "self_attn.o_proj": "self_attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
        dict.fromkeys(_QKV, "heads"),
        token_head="classifier",
    ),
}
