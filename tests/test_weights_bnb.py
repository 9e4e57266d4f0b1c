"""4-bit weights: bitsandbytes' own numbers, bit for bit, whole and by slice; what is packed can be read packed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import abstract_params, head_table, hidden_states
from jaxrl.parallel import make_mesh, with_shardings
from jaxrl.weights.bnb import dequantized, dequantized_config, packed_tensors
from jaxrl.weights.formats import open_checkpoint
from jaxrl.weights.load import load_hf_config, load_params

DATA = Path(__file__).parent / "data" / "bnb_nf4"
FOLDERS = ["llama-nf4-double", "llama-nf4-single", "llama-fp4-double"]


NO_BLOCKS = np.frombuffer(b'{"shape": [320, 64], "blocksize": 0, "dtype": "bfloat16"}', np.uint8)


@pytest.mark.parametrize("name", FOLDERS)
def test_dequantised_weights_equal_those_of_bitsandbytes_bit_for_bit(name):
    checkpoint = dequantized(open_checkpoint(DATA / name))
    expected = load_file(DATA / name / "expected_dequant.safetensors")
    assert len(expected) == 7
    for weight, numbers in expected.items():
        read = checkpoint.read(weight)
        assert read.dtype == numbers.dtype == ml_dtypes.bfloat16 and checkpoint.tensors[weight].shape == read.shape
        assert read.tobytes() == numbers.tobytes(), weight
    assert not [name for name in checkpoint.tensors if "quant" in name or "absmax" in name]
    assert len(checkpoint.tensors) == len(expected) + 5  # two norms of the layer, the last, embedding and head


def test_shapes_that_do_not_fill_blocks_are_dequantised_bit_for_bit_whole_and_by_slice():
    checkpoint = dequantized(open_checkpoint(DATA / "edge_shapes.safetensors"))
    expected = load_file(DATA / "edge_shapes_expected_f32.safetensors")
    assert checkpoint.tensors.keys() == expected.keys()
    for weight, numbers in expected.items():
        assert checkpoint.read(weight).tobytes() == numbers.tobytes(), weight
        for rows in ((0, 1), (1, 2), (1, 3), (2, 3), (3, 99), (0, 0)):
            for columns in ((0, 999), (3, 17)):
                index = (slice(*rows), slice(*columns))
                np.testing.assert_array_equal(
                    checkpoint.read(weight, index), numbers[index], err_msg=f"{weight} {index}"
                )


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_of_the_dequantised_model_are_the_recorded_ones(name):
    folder = DATA / name
    config = ModelConfig.from_hf(dequantized_config(load_hf_config(folder)))
    abstract, axes = abstract_params(config)
    target = with_shardings(make_mesh(1, 2, 2), abstract["params"], axes["params"])
    params = load_params(folder, config, target, dequantize=True)
    expected = np.load(folder / "expected_logits.npz")
    tokens = jnp.asarray(expected["input_ids"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    with jax.default_matmul_precision("highest"):
        hidden = hidden_states(config, {"params": params}, tokens, positions, jnp.ones_like(tokens), 0 * tokens)
        logits = hidden @ head_table(config, params).T
    np.testing.assert_allclose(logits, expected["logits_dequant_f32"], atol=2e-4)  # float32, another order of sums


def test_only_the_blocks_of_a_slice_are_read():
    checkpoint = open_checkpoint(DATA / "llama-nf4-double")
    numbers = dequantized(checkpoint)
    checkpoint.bytes_read = 0
    numbers.read("model.layers.0.mlp.up_proj.weight", np.s_[8:16, 0:64])
    assert checkpoint.bytes_read == 8 * 64 // 2 + 8  # codes, and one byte of scale a block


def test_packed_weights_are_given_as_they_are_stored():
    checkpoint = open_checkpoint(DATA / "llama-nf4-double")
    packed = packed_tensors(checkpoint)
    stored = load_file(DATA / "llama-nf4-double" / "model.safetensors")
    assert len(packed) == 7
    for name, weight in packed.items():
        assert (weight.quant_type, weight.blocksize, weight.is_double) == ("nf4", 64, True)
        np.testing.assert_array_equal(weight.read_codes(), stored[name].reshape(-1))
        np.testing.assert_array_equal(weight.read_absmax(), stored[f"{name}.absmax"])
        np.testing.assert_array_equal(weight.nested_absmax, stored[f"{name}.nested_absmax"])
        np.testing.assert_array_equal(weight.read_codes(10, 20), stored[name].reshape(-1)[10:20])
        codes = weight.read_codes()
        values = weight.quant_map[np.stack([codes >> 4, codes & 15], 1)].reshape(-1, 64) * weight.scales()[:, None]
        np.testing.assert_array_equal(values.reshape(weight.shape).astype(weight.dtype), weight.dequantize())
    single = packed_tensors(open_checkpoint(DATA / "llama-nf4-single"))
    assert not any(weight.is_double or weight.read_absmax().dtype != np.float32 for weight in single.values())


def test_codes_kept_as_numbers_of_another_type_are_the_same_codes(tmp_path):
    """bnb_4bit_quant_storage=bfloat16, which FSDP needs, writes the same bytes."""
    tensors = load_file(DATA / "llama-nf4-double" / "model.safetensors")
    for name in [name for name in tensors if tensors[name].dtype == np.uint8 and tensors[name].ndim == 2]:
        tensors[name] = tensors[name].reshape(-1).view(ml_dtypes.bfloat16)[:, None]
    save_file(tensors, tmp_path / "model.safetensors")
    ours, expected = (dequantized(open_checkpoint(folder)) for folder in (tmp_path, DATA / "llama-nf4-double"))
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(ours.read(name), expected.read(name))
    np.testing.assert_array_equal(ours.read(name, np.s_[3:7, 1:9]), expected.read(name, np.s_[3:7, 1:9]))


def test_packed_model_is_not_loaded_as_numbers_unless_it_is_asked_for():
    folder = DATA / "llama-nf4-double"
    config = ModelConfig.from_hf(dequantized_config(load_hf_config(folder)))
    with pytest.raises(ValueError, match=r"holds 7 matrices in 4 bits .*dequantize=True"):
        load_params(folder, config, abstract_params(config)[0]["params"])


def test_other_quantisations_are_refused_by_name():
    for known in (
        {},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"quantization_config": {"quant_method": "fp8"}},
    ):
        assert dequantized_config({"a": 1, **known}) == {"a": 1}
    for settings, message in (
        ({"quant_method": "gptq", "bits": 4}, "asks for 'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "'bitsandbytes' in 8 bits"),
        ({"quant_method": "awq"}, "'awq'"),
    ):
        with pytest.raises(ValueError, match=message):
            dequantized_config({"quantization_config": settings})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, w: t.pop(f"{w}.absmax"), r"lacks \S+up_proj\.weight\.absmax"),
        (lambda t, w: t.pop(f"{w}.nested_quant_map"), r"lacks \S+up_proj\.weight\.nested_quant_map"),
        (lambda t, w: t.pop(w), r"lacks \S+up_proj\.weight, without"),
        (lambda t, w: t.update({w: t[w][:-1]}), "is damaged"),
        (lambda t, w: t.update({f"{w}.absmax": t[f"{w}.absmax"][:-1]}), "is damaged"),
        (lambda t, w: t.update({f"{w}.absmax": t[f"{w}.absmax"].astype(np.float32)}), "is damaged"),
        (
            lambda t, w: t.update({f"{w}.quant_state.bitsandbytes__nf4": np.zeros(5, np.uint8)}),
            "quant_state that cannot",
        ),
        (lambda t, w: t.update({f"{w}.quant_state.bitsandbytes__nf4": NO_BLOCKS}), "quant_state that cannot be read"),
    ],
)
def test_damaged_4_bit_weight_is_refused_by_name(tmp_path, change, message):
    tensors = load_file(DATA / "llama-nf4-double" / "model.safetensors")
    change(tensors, "model.layers.0.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=message):
        dequantized(open_checkpoint(tmp_path))
