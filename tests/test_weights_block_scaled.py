"""MXFP4 and FP8 by blocks: the numbers are transformers' own, whole and by slice, and such a folder is a model."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import abstract_params, head_table, hidden_states
from jaxrl.weights.convert import convert
from jaxrl.weights.formats import open_checkpoint
from jaxrl.weights.load import load_params
from jaxrl.weights.pretrained import open_pretrained

torch = pytest.importorskip("torch")
DATA = Path(__file__).parent / "data" / "hf_torch"
RNG = np.random.default_rng(0)
SLICES = (np.s_[0:1, 0:96, 0:5], np.s_[1:3, 31:33, 2:5], np.s_[0:3, 5:17, 0:1], np.s_[2:3, 64:96, 1:4])


def mxfp4_of(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Random codes of a weight [E, in, out], and scales of which some make numbers tiny."""
    experts, into, out = shape
    blocks = RNG.integers(0, 256, (experts, out, into // 32, 16)).astype(np.uint8)
    return {"x_blocks": blocks, "x_scales": RNG.integers(110, 128, blocks.shape[:-1]).astype(np.uint8)}


def transformers_mxfp4(tensors: dict[str, np.ndarray]) -> np.ndarray:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    pair = (torch.from_numpy(tensors[name]) for name in ("x_blocks", "x_scales"))
    return convert_moe_packed_tensors(*pair).float().numpy()


def test_mxfp4_is_read_as_transformers_does_whole_and_by_slice(tmp_path):
    tensors = mxfp4_of((3, 96, 5))
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint, expected = open_checkpoint(tmp_path), transformers_mxfp4(tensors)
    assert list(checkpoint.tensors) == ["x"] and checkpoint.tensors["x"].shape == (3, 96, 5)
    assert checkpoint.read("x").dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(checkpoint.read("x").astype(np.float32), expected)
    for index in SLICES:
        np.testing.assert_array_equal(checkpoint.read("x", index).astype(np.float32), expected[index])


@pytest.mark.parametrize("grid", [(2, 3), (3, 2)])
def test_fp8_is_read_as_transformers_does_whole_and_by_slice(tmp_path, grid):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = RNG.normal(size=(6, 12)).astype(ml_dtypes.float8_e4m3fn)
    scales = RNG.uniform(0.1, 2, grid).astype(np.float32)
    save_file({"x.weight": codes, "x.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    expected = Fp8Dequantize(None)._dequantize_one(
        torch.from_numpy(codes.astype(np.float32)), torch.from_numpy(scales), output_dtype=torch.bfloat16
    )
    assert list(checkpoint.tensors) == ["x.weight"]
    np.testing.assert_array_equal(checkpoint.read("x.weight").astype(np.float32), expected.float().numpy())
    part = checkpoint.read("x.weight", np.s_[1:5, 3:11]).astype(np.float32)
    np.testing.assert_array_equal(part, expected.float().numpy()[1:5, 3:11])


def test_fp8_blocks_at_the_edge_are_smaller(tmp_path):
    codes = np.ones((130, 200), ml_dtypes.float8_e4m3fn)
    scales = np.array([[1, 2], [4, 8]], np.float32)
    save_file({"x.weight": codes, "x.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    read = open_checkpoint(tmp_path).read("x.weight").astype(np.float32)
    assert [read[127, 127], read[127, 128], read[128, 127], read[129, 199]] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("x_scales"), r"holds x_blocks and not its scales x_scales"),
        (lambda t: t.update(x_scales=t["x_scales"][:, :, :2]), r"x_blocks of shape .* is damaged"),
        (lambda t: t.update(x_blocks=t["x_blocks"][..., :8]), r"x_blocks of shape .* is damaged"),
        (lambda t: t.update({"y.weight": np.ones((6, 6), ml_dtypes.float8_e4m3fn)}), r"not its scales y\.weight_scale"),
        (
            lambda t: t.update({
                "y.weight": np.ones((6, 6), ml_dtypes.float8_e4m3fn), "y.weight_scale": np.ones(6, np.float32),
            }),
            r"y\.weight in FP8 with its scales under y\.weight_scale, a format that is not read",
        ),
        (
            lambda t: t.update({
                "y.weight": np.ones((6, 6), ml_dtypes.float8_e4m3fn), "y.weight_scale_inv": np.ones((4, 1), np.float32),
            }),
            r"y\.weight: 6 rows or columns cannot be cut into 4 blocks",
        ),
    ],
)  # fmt: skip
def test_codes_and_scales_that_do_not_belong_together_are_refused(tmp_path, change, message):
    tensors = mxfp4_of((3, 96, 5))
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> Path:
    """The gpt-oss fixture with experts of random MXFP4 codes, of width 32 since a block is no smaller."""
    folder = tmp_path_factory.mktemp("gpt-oss") / "mxfp4"
    shutil.copytree(DATA / "gpt-oss", folder)
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    config |= {"intermediate_size": 32, "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, array in load_file(DATA / "gpt-oss" / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            packed = mxfp4_of((4, 32, 64 if name.endswith("gate_up_proj") else 32))
            tensors |= {name + part.removeprefix("x"): stored for part, stored in packed.items()}
        elif name.endswith("gate_up_proj_bias"):
            tensors[name] = np.tile(array, (1, 2))
        else:
            tensors[name] = array
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def transformers_logits(folder: Path, ids: np.ndarray, **settings) -> np.ndarray:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    with torch.inference_mode():
        return model(torch.from_numpy(ids)).logits.numpy()


def test_gpt_oss_as_it_is_published_has_the_logits_of_transformers_and_converts_to_numbers(gpt_oss, tmp_path):
    from transformers import Mxfp4Config

    ids = RNG.integers(0, 80, (2, 12))
    # Experts are dequantised to bfloat16 there too; the rest computes in float32 on both sides.
    expected = transformers_logits(gpt_oss, ids, quantization_config=Mxfp4Config(dequantize=True))
    model = open_pretrained(gpt_oss)
    config = ModelConfig.from_hf(model.hf_config)
    params = load_params(gpt_oss, config, abstract_params(config)[0]["params"])
    positions = jnp.broadcast_to(jnp.arange(12), ids.shape)
    tokens = jnp.asarray(ids)
    with jax.default_matmul_precision("highest"):
        hidden = hidden_states(config, {"params": params}, tokens, positions, jnp.ones_like(tokens), 0 * tokens)
        logits = hidden @ head_table(config, params).T
    np.testing.assert_allclose(logits, expected, atol=2e-4)

    convert(str(gpt_oss), tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    np.testing.assert_allclose(transformers_logits(tmp_path / "out", ids), expected, atol=2e-4)
