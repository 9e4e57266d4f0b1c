"""The arithmetic of `scripts/benchmark.py` and what is behind it. Nothing is timed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks import generation, sides, update

from jaxrl.models.config import ModelConfig, Rope

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"
SMOLLM2 = ModelConfig(
    family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
    num_kv_heads=3, head_dim=64, max_position=8192, rope=Rope(), norm_eps=1e-5, tie_embeddings=True, qkv_bias=False,
    o_bias=False, mlp_bias=False, qk_norm=False,
)  # fmt: skip


def run(*args: str) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": str(SCRIPT.parents[1]), "PATH": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True, env=environment)


def test_ragged_lengths_are_spread_fourfold_and_equal_ones_are_not():
    rng = np.random.default_rng(0)
    lengths = sides.make_lengths(rng, 16, 64, ragged=True)
    assert (lengths.min(), lengths.max(), len(lengths)) == (16, 64, 16)
    assert abs(lengths.mean() - 40) < 0.5
    assert set(sides.make_lengths(rng, 16, 64, ragged=False)) == {64}
    assert sides.make_lengths(rng, 1, 64, ragged=True).tolist() == [64]


def test_padding_keeps_every_token_in_the_column_after_the_one_that_predicts_it():
    rng = np.random.default_rng(0)
    sequences = update.make_sequences(rng, 1000, 6, 12, 8, ragged=True, group_size=2)
    assert sequences.group.tolist() == [0, 0, 1, 1, 2, 2]
    tokens, columns = update.padded(sequences)
    for b in range(6):
        length = sequences.lengths[b]
        np.testing.assert_array_equal(tokens[b, columns[b, :length] + 1], sequences.tokens[b, :length])
        assert tokens[b, columns[b, 0]] == sequences.prompts[sequences.group[b]][-1]


def test_stop_ids_cut_where_they_are_wanted_and_no_response_earlier():
    responses = np.array([[1, 2, 3, 4], [5, 6, 1, 7], [8, 2, 9, 3]])
    stops, lengths = generation.stops_for(responses, np.array([2, 1, 4]))
    # Of the first response 2 is taken (the third has it before its end): 3 occurs nowhere too early.
    assert stops == (3, 5)
    assert lengths.tolist() == [3, 1, 4]
    assert generation.stops_for(responses, np.array([4, 4, 4]))[0] == ()


def test_random_responses_are_cut_close_to_the_lengths_wanted():
    rng = np.random.default_rng(0)
    wanted = sides.make_lengths(rng, 32, 64, ragged=True)
    _, lengths = generation.stops_for(rng.integers(0, 49152, (32, 64)), wanted)
    assert (lengths >= wanted).all()
    assert abs(lengths.mean() - 40) < 3


def test_the_ratio_is_of_medians_and_leaves_the_first_call_out():
    ours, theirs = ([sides.Call(s, 0.0) for s in seconds] for seconds in ([99, 1, 2, 4], [1, 4, 6, 4]))
    assert sides.speed_ratio(ours, theirs) == (4 / 2, 1.0, 4.0)


def test_sides_take_turns_and_the_first_changes():
    order = []
    runs = {name: lambda name=name: order.append(name) or sides.Call(1.0, 0.0) for name in ("jaxrl", "torch")}
    calls = sides.take_turns(runs, 2)
    assert order == ["torch", "jaxrl", "jaxrl", "torch", "torch", "jaxrl"]
    assert {name: len(of) for name, of in calls.items()} == {"jaxrl": 3, "torch": 3}


def test_sides_that_disagree_are_refused():
    with pytest.raises(ValueError, match="did not do the same work"):
        sides.check_equal("loss", 1.0, 1.1, tolerance=1e-4)
    with pytest.raises(ValueError, match="did not do the same work"):
        sides.check_equal("loss", float("nan"), 1.0, tolerance=1e-4)


def test_a_gpu_without_a_known_peak_is_named():
    assert sides.peak_flops(sides.Device("cpu", "cpu"), "float32") is None
    assert sides.peak_flops(sides.Device("gpu", "NVIDIA H200"), "bfloat16") == 989e12
    with pytest.raises(ValueError, match="Unheard Of.*PEAK_TFLOPS"):
        sides.peak_flops(sides.Device("gpu", "Unheard Of"), "float32")


def test_help_names_the_tasks_and_a_wrong_case_is_refused():
    shown = run("--help")
    assert shown.returncode == 0 and "update" in shown.stdout and "generate" in shown.stdout
    refused = run("generate", "--cases", "grouped")
    assert refused.returncode != 0 and "'grouped' is not one of equal, ragged" in refused.stderr
