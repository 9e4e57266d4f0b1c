"""The families of decoders: what `config.json` leaves out because the architecture implies it.

Keys are those of `config.json` where it has them (its class defaults, which old files omit), and the switches of
`ModelConfig` where an architecture fixes them. Adding a Llama-shaped family is adding a row.
"""

from __future__ import annotations

from typing import Any

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6},
    "qwen2": {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "qkv_bias": True, "o_bias": False},
    "qwen3": {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "head_dim": 128, "qk_norm": True},
}
