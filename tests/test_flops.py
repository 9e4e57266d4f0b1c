"""FLOPs by formula: against numbers counted by hand, and the rate of them that a run reports."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxrl.metrics import mfu_metrics
from jaxrl.models.config import ModelConfig
from jaxrl.models.flops import generate_flops, layer_weights, update_flops
from jaxrl.topology import HARDWARE, hardware_named

SMOLLM2 = ModelConfig.from_hf({
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
})  # fmt: skip
LAYERS = 106_168_320  # 30 x (576 x 15 x 64 + 576 x 576 + 3 x 576 x 1536)
SIXTEEN = np.full(16, 64)


def test_flops_are_those_counted_by_hand():
    assert layer_weights(SMOLLM2) == LAYERS
    layers, head, attention = 6 * LAYERS * 2048, 6 * 49152 * 576 * 1024, 12 * 30 * 576 * 16 * 128 * 129 / 2
    assert update_flops(SMOLLM2, SIXTEEN, SIXTEEN) == layers + head + attention
    one_token = generate_flops(SMOLLM2, np.array([1]), np.array([1]))
    assert one_token == 2 * LAYERS + 2 * 49152 * 576 + 4 * 30 * 576


def test_a_critic_has_no_vocabulary_and_adapters_no_gradient_of_the_weights():
    attention = 12 * 30 * 576 * 16 * 128 * 129 / 2
    assert update_flops(SMOLLM2, SIXTEEN, SIXTEEN, head="score") == 6 * LAYERS * 2048 + attention
    assert update_flops(SMOLLM2, SIXTEEN, SIXTEEN, head="score", frozen=True) == 4 * LAYERS * 2048 + attention


def test_of_experts_those_that_a_token_chooses_count():
    folder = Path(__file__).parent / "data" / "hf_torch" / "mixtral"
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    attention = 2 * D * N * H + 2 * D * K * H
    mlp = D * config.num_experts + config.experts_per_token * 3 * D * config.expert_size
    assert layer_weights(config) == config.num_layers * (attention + mlp)


def test_mfu_is_the_rate_of_flops_over_the_peak_of_all_devices():
    seconds = {"update_actor": 2.0, "update_critic": 4.0}
    metrics = mfu_metrics({"actor": 8e12, "critic": 8e12, "unused": 1.0}, seconds=seconds, num_devices=4, peak=2e12)
    assert metrics == {"perf/mfu/actor": 0.5, "perf/mfu/critic": 0.25}


@pytest.mark.parametrize(
    "device, known",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("TPU v5 lite", "v5e"),
    ],
)
def test_a_device_is_known_by_the_name_that_jax_gives_it(device, known):
    assert hardware_named(device) is HARDWARE[known]


def test_a_device_without_known_numbers_has_no_peak():
    assert hardware_named("cpu") is None and hardware_named("NVIDIA H100 PCIe") is None
