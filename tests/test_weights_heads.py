"""Heads of reward models and critics under every name that people give them, and names under other prefixes."""

import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import abstract_params, hidden_states, score
from jaxrl.weights.export import export_hf
from jaxrl.weights.formats import open_checkpoint
from jaxrl.weights.heads import FoundHead, find_head
from jaxrl.weights.load import load_hf_config, load_params

DATA = Path(__file__).parent / "data"


@pytest.fixture
def copy(tmp_path):
    """A function that copies a fixture and changes its tensors and config."""

    def make(name: str, change=lambda tensors: None, **settings) -> Path:
        folder = tmp_path / Path(name).name
        shutil.copytree(DATA / name, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(load_hf_config(folder) | settings))
        return folder

    return make


def load(folder: Path, head: str = "score", **options):
    """Config and parameters of a folder, its head as it was found."""
    hf_config = load_hf_config(folder)
    found = find_head(open_checkpoint(folder), hf_config, path=options.get("head_path"))
    config = ModelConfig.from_hf(hf_config, **(found.settings if head == "score" and found else {}))
    return load_params(folder, config, abstract_params(config, head)[0]["params"], **options), config


@pytest.mark.parametrize(
    "name, found",
    [
        ("llama-seqcls-reward", FoundHead("score", 1, False)),
        ("qwen2-seqcls-3labels", FoundHead("score", 3, False)),
        ("qwen2-tokencls-critic", FoundHead("score", 1, True)),
        ("trl-valuehead-llama", FoundHead("v_head.summary", 1, True)),
    ],
)
def test_head_of_each_kind_is_found_with_its_labels_and_bias(name, found):
    assert find_head(open_checkpoint(DATA / "heads" / name), load_hf_config(DATA / "heads" / name)) == found


def test_language_model_has_no_head():
    assert find_head(open_checkpoint(DATA / "hf_torch" / "qwen3"), {}) is None


def test_values_of_a_trl_value_head_are_the_recorded_ones():
    params, config = load(DATA / "heads" / "trl-valuehead-llama")
    expected = np.load(DATA / "heads" / "trl-valuehead-llama" / "expected.npz")
    tokens, mask, positions = (jnp.asarray(expected[key]) for key in ("input_ids", "attention_mask", "position_ids"))
    with jax.default_matmul_precision("highest"):
        hidden = hidden_states(config, {"params": params}, tokens, positions, mask, 0 * tokens, head="score")
        values = score(config, params, hidden)[..., 0]
    shown = expected["attention_mask"] == 1
    np.testing.assert_allclose(np.asarray(values)[shown], expected["values"][shown], atol=2e-4)  # float32


def test_trl_value_head_is_exported_as_token_classification(tmp_path):
    from transformers import AutoModelForTokenClassification

    source = DATA / "heads" / "trl-valuehead-llama"
    params, config = load(source)
    export_hf(params, config, tmp_path / "out", source_folder=source)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    stored = load_file(source / "model.safetensors")
    np.testing.assert_array_equal(model.score.weight.detach(), stored["v_head.summary.weight"])
    np.testing.assert_array_equal(model.score.bias.detach(), stored["v_head.summary.bias"])


def test_policy_is_loaded_from_a_checkpoint_with_a_value_head_and_says_what_it_leaves_out(caplog):
    with caplog.at_level(logging.WARNING):
        params, _ = load(DATA / "heads" / "trl-valuehead-llama", head="lm")
    assert "lm_head" in params and "score" not in params
    assert "the value head beside the language model is left out" in caplog.text


@pytest.mark.parametrize("name", ["value_head", "v_head", "reward_head", "regression_head", "classifier", "my_head"])
@pytest.mark.parametrize("bias", [False, True])
def test_head_under_each_known_name_is_loaded(copy, name, bias):
    def rename(tensors):
        tensors[f"{name}.weight"] = tensors.pop("score.weight")
        if bias:
            tensors[f"{name}.bias"] = np.array([0.5], np.float32)

    settings = {"value_head_prefix": name} if name == "my_head" else {}
    params, config = load(copy("heads/llama-seqcls-reward", rename, **settings))
    expected, _ = load(DATA / "heads" / "llama-seqcls-reward")
    np.testing.assert_array_equal(params["score"]["kernel"], expected["score"]["kernel"])
    assert config.score_bias == bias and ("bias" in params["score"]) == bias


def test_unknown_head_is_reported_with_its_shape_and_loaded_when_it_is_named(copy):
    def rename(tensors):
        tensors["verdict.proj.weight"] = tensors.pop("score.weight")

    folder = copy("heads/llama-seqcls-reward", rename)
    config = ModelConfig.from_hf(load_hf_config(folder))
    target = abstract_params(config, "score")[0]["params"]
    with pytest.raises(
        ValueError,
        match=r"verdict\.proj\.weight of shape \(1, 32\) looks like the head .* set head\.path to verdict\.proj",
    ):
        load_params(folder, config, target, allow_missing={"score.kernel"})
    params, _ = load(folder, head_path="verdict.proj")
    expected, _ = load(DATA / "heads" / "llama-seqcls-reward")
    np.testing.assert_array_equal(params["score"]["kernel"], expected["score"]["kernel"])
    with pytest.raises(ValueError, match=r"head\.path is 'verdict', and .* has no tensor verdict\.weight"):
        load(folder, head_path="verdict")


def test_two_heads_are_not_chosen_between(copy):
    folder = copy("heads/llama-seqcls-reward", lambda t: t.update({"v_head.weight": t["score.weight"] + 1}))
    with pytest.raises(ValueError, match="holds several heads, score and v_head: name one of them by head.path"):
        load(folder)


def test_head_of_two_layers_is_refused_with_its_parts(copy):
    def deepen(tensors):
        del tensors["score.weight"]
        tensors["score.dense.weight"] = np.zeros((8, 32), np.float32)
        tensors["score.out_proj.weight"] = np.zeros((1, 8), np.float32)

    with pytest.raises(
        ValueError, match=r"a head score of score\.dense\.weight \[8, 32\], score\.out_proj\.weight \[1, 8\]"
    ):
        load(copy("heads/llama-seqcls-reward", deepen))


def strip(name: str) -> str:
    return name.removeprefix("model.")


def wrap(name: str) -> str:
    return f"language_model.{name}"


def wrap_inside(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


@pytest.mark.parametrize("rename", [strip, wrap, wrap_inside])
def test_old_files_without_a_prefix_and_wrapped_models_are_read(copy, rename):
    def change(tensors):
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    params, _ = load(copy("hf_torch/qwen3", change), head="lm")
    expected, _ = load(DATA / "hf_torch" / "qwen3", head="lm")
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_causal_masks_of_old_files_are_ignored(copy):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["model.layers.0.attn.bias"] = np.ones((1, 1, 4, 4), np.uint8)
        tensors["model.layers.0.attn.masked_bias"] = np.array(-1e4, np.float32)

    load(copy("hf_torch/qwen3", add), head="lm")
