"""PEFT adapters of every kind: merged they are PEFT's merged model, and in our model they compute what PEFT's do."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import abstract_params, hidden_states, logits
from jaxrl.parallel import make_mesh, with_shardings
from jaxrl.weights.formats import open_checkpoint
from jaxrl.weights.load import load_hf_config, load_params
from jaxrl.weights.peft import base_path, merged, open_adapter
from jaxrl.weights.peft_tree import adapter_of, export_peft, load_lora, lora_settings, peft_tensors
from jaxrl.weights.safetensors_writer import TensorSpec, write_safetensors
from jaxrl.weights.stored import Checkpoint

DATA = Path(__file__).parent / "data" / "peft_lora"
LLAMA = ["lora", "rslora", "dora", "modules_to_save", "regex_patterns", "layer1_only", "all_linear", "embedding"]
GPT2 = ["gpt2_fan_in_fan_out", "gpt2_lora_bias", "gpt2_bias_lora_only"]
TRAINABLE = ["lora", "rslora", "regex_patterns", "layer1_only", "all_linear"]


def merge(name: str) -> tuple[Checkpoint, dict]:
    adapter = open_adapter(DATA / name)
    base = Path(base_path(adapter))
    return merged(open_checkpoint(base), adapter, load_hf_config(base))


@pytest.fixture
def copy(tmp_path):
    """A function that copies an adapter, with its tensors and its config changed."""

    def make(name: str, change=lambda tensors: None, **settings) -> Path:
        for part in (name, "base-gpt2" if name.startswith("gpt2") else "base-llama"):
            shutil.copytree(DATA / part, tmp_path / part)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        config = json.loads((DATA / name / "adapter_config.json").read_text()) | settings
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
        return tmp_path / name

    return make


def logits_of(config: ModelConfig, variables, tokens) -> jax.Array:
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    with jax.default_matmul_precision("highest"):
        hidden = hidden_states(config, variables, tokens, positions, jnp.ones_like(tokens), 0 * tokens)
        return logits(config, variables["params"], hidden)


def logits_of_peft(base: Path, adapter: Path, tokens: np.ndarray) -> np.ndarray:
    """Those of the libraries themselves."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(adapter)).eval()(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.mark.parametrize("name", LLAMA)
def test_merged_llama_has_the_logits_of_pefts_merge(name):
    checkpoint, hf_config = merge(name)
    config = ModelConfig.from_hf(hf_config)
    abstract, axes = abstract_params(config)
    target = with_shardings(make_mesh(2, 2, 2), abstract["params"], axes["params"])  # merged slice by slice
    params = load_params(checkpoint, config, target)
    expected = np.load(DATA / name / "expected_logits.npz")
    logits = logits_of(config, {"params": params}, expected["input_ids"])
    np.testing.assert_allclose(logits, expected["logits_merged"], atol=2e-5)  # float32, another order of sums
    assert np.abs(expected["logits_merged"] - expected["logits_base"]).max() > 0.05


@pytest.mark.parametrize("name", GPT2)
def test_merged_gpt2_has_the_logits_of_pefts_merge(name, tmp_path):
    import torch
    from transformers import GPT2LMHeadModel

    checkpoint, _ = merge(name)
    specs = [TensorSpec(key, tensor.shape, tensor.dtype) for key, tensor in checkpoint.tensors.items()]
    write_safetensors(
        tmp_path / "model.safetensors", specs, ((spec.name, checkpoint.read(spec.name)) for spec in specs)
    )
    shutil.copy(DATA / "base-gpt2" / "config.json", tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    expected = np.load(DATA / name / "expected_logits.npz")
    with torch.no_grad():
        logits = model(torch.from_numpy(expected["input_ids"]).long()).logits.numpy()
    np.testing.assert_allclose(logits, expected["logits_merged"], atol=2e-5)
    assert np.abs(expected["logits_merged"] - expected["logits_base"]).max() > 0.05


@pytest.mark.parametrize("name", LLAMA + GPT2)
def test_slices_of_a_merged_tensor_are_those_of_the_whole(name):
    checkpoint, _ = merge(name)
    for tensor in checkpoint.tensors:
        whole = checkpoint.read(tensor)
        cut = tuple(slice(size // 4, size - 3) for size in whole.shape)
        np.testing.assert_allclose(checkpoint.read(tensor, cut), whole[cut], atol=1e-6, err_msg=tensor)


def test_only_what_the_adapter_names_is_changed_by_a_merge():
    checkpoint, _ = merge("layer1_only")
    base = open_checkpoint(DATA / "base-llama")
    changed = {name for name in base.tensors if not np.array_equal(base.read(name), checkpoint.read(name))}
    assert changed == {f"model.layers.1.{module}.weight" for module in ("mlp.gate_proj", "self_attn.q_proj")}


def test_bfloat16_base_is_merged_in_float32_and_rounded_once(tmp_path):
    import ml_dtypes

    tensors = load_file(DATA / "base-llama" / "model.safetensors")
    save_file({k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}, tmp_path / "model.safetensors")
    adapter, name = open_adapter(DATA / "lora"), "model.layers.0.mlp.up_proj"
    checkpoint, _ = merged(open_checkpoint(tmp_path), adapter, load_hf_config(DATA / "base-llama"))
    stored = load_file(DATA / "lora" / "adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{name}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    exact = tensors[f"{name}.weight"].astype(ml_dtypes.bfloat16).astype(np.float64) + 8 / 4 * (b @ a)
    np.testing.assert_array_equal(
        checkpoint.read(f"{name}.weight"), exact.astype(np.float32).astype(ml_dtypes.bfloat16)
    )


def trainable(name: str, mesh=(1, 2, 2), folder: Path = DATA):
    """Config, parameters and adapters of a fixture, in our model."""
    adapter = open_adapter(folder / name)
    base = Path(base_path(adapter))
    plain = ModelConfig.from_hf(load_hf_config(base))
    config = dataclasses.replace(plain, **lora_settings(adapter, plain))
    abstract, axes = abstract_params(config)
    target = {part: with_shardings(make_mesh(*mesh), abstract[part], axes[part]) for part in ("params", "lora")}
    return adapter, config, load_params(base, config, target["params"]), load_lora(adapter, config, target["lora"])


@pytest.mark.parametrize("name", TRAINABLE)
def test_adapter_in_our_model_has_pefts_logits_and_merging_changes_nothing(name):
    _, config, params, lora = trainable(name)
    expected = np.load(DATA / name / "expected_logits.npz")
    logits = logits_of(config, {"params": params, "lora": lora}, expected["input_ids"])
    np.testing.assert_allclose(logits, expected["logits_adapter"], atol=2e-5)
    np.testing.assert_allclose(logits, expected["logits_merged"], atol=2e-5)
    zero = jax.tree.map(jnp.zeros_like, lora)
    base = logits_of(config, {"params": params, "lora": zero}, expected["input_ids"])
    np.testing.assert_allclose(base, expected["logits_base"], atol=2e-5)


@pytest.mark.parametrize("name", TRAINABLE)
def test_adapter_in_and_out_again_is_the_same_file(name, tmp_path):
    adapter, config, _, lora = trainable(name)
    export_peft(lora, config, tmp_path / "out", base="unused", like=adapter)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (DATA / name / file).read_bytes()
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}


@pytest.mark.parametrize("name", ["regex_patterns", "layer1_only"])
def test_what_fills_up_an_adapter_stays_zero_in_training(name, tmp_path):
    adapter, config, params, lora = trainable(name)
    tokens = np.load(DATA / name / "expected_logits.npz")["input_ids"]

    def loss(lora):
        return (logits_of(config, {"params": params, "lora": lora}, tokens) ** 2).mean()

    trained = jax.tree.map(lambda x, g: x - 0.1 * g, lora, jax.grad(loss)(lora))
    export_peft(trained, config, tmp_path / "out", base="unused", like=adapter)
    before, after = open_adapter(DATA / name), open_adapter(tmp_path / "out")
    assert before.modules == after.modules
    moved = [name for name in before.checkpoint.tensors
             if not np.array_equal(before.checkpoint.read(name), after.checkpoint.read(name))]  # fmt: skip
    assert len(moved) == len(before.checkpoint.tensors)


def test_adapter_that_was_made_here_has_the_same_logits_in_peft_and_is_read_back(tmp_path):
    hf_config = load_hf_config(DATA / "base-llama")
    config = ModelConfig.from_hf(hf_config, lora_rank=3, lora_alpha=6.0, lora_targets=("q_proj", "o_proj", "up_proj"))
    abstract, _ = abstract_params(config)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), abstract["lora"])
    export_peft(lora, config, tmp_path / "out", base=str(DATA / "base-llama"))
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["target_modules"]) == (
        3,
        6,
        ["o_proj", "q_proj", "up_proj"],
    )
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_{}.weight"
    assert stored[name.format("A")].shape == (3, 32) and stored[name.format("B")].shape == (32, 3)
    np.testing.assert_array_equal(
        stored[name.format("A")], lora["layers"]["self_attn"]["o_proj"]["a"][1].reshape(32, 3).T
    )
    assert {key for key, _ in peft_tensors(lora, config)} == stored.keys() and len(stored) == 2 * 3 * 2
    adapter, again, params, read = trainable("out", folder=tmp_path)
    tokens = rng.integers(1, 60, (2, 12))
    expected = logits_of(config, {"params": params, "lora": lora}, tokens)
    np.testing.assert_allclose(logits_of_peft(DATA / "base-llama", tmp_path / "out", tokens), expected, atol=5e-5)
    assert (again.lora_rank, again.lora_alpha, set(again.lora_targets)) == (3, 6.0, {"q_proj", "o_proj", "up_proj"})
    jax.tree.map(np.testing.assert_array_equal, lora, read)


@pytest.mark.parametrize(
    "base, names, ranks",
    [("hf_torch/phi3", ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"], {"gate_up_proj": 6, "qkv_proj": 9}),
     ("hf_flax/gpt2/torch", ["c_attn", "c_fc", "c_proj"], {"c_attn": 9}),
     ("hf_torch/gpt-neox", ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"], {"query_key_value": 9})],
)  # fmt: skip
def test_adapters_of_matrices_that_are_one_module_of_a_family_are_blocks_of_a_larger_rank(tmp_path, base, names, ranks):
    source, stored_at = tmp_path / "base", DATA.parent / base
    shutil.copytree(stored_at, source)
    if stored_at.name == "torch":
        shutil.copy(stored_at.parent / "config.json", source)
    hf_config = load_hf_config(source)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    plain = ModelConfig.from_hf(hf_config)
    config = dataclasses.replace(plain, lora_rank=3, lora_alpha=6.0, lora_targets=targets)
    abstract, _ = abstract_params(config)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda s: (0.2 * rng.normal(size=s.shape)).astype(np.float32), abstract["lora"])
    export_peft(lora, config, tmp_path / "out", base=str(source))
    adapter = open_adapter(tmp_path / "out")
    settings = adapter.config.raw
    assert (settings["target_modules"], settings["rank_pattern"]) == (names, ranks)
    assert settings["alpha_pattern"] == {name: 2 * rank for name, rank in ranks.items()}  # the same scale

    # Merged as PEFT merges it, by its file alone, it is what the model computes.
    params = load_params(source, plain, abstract["params"])
    checkpoint, _ = merged(open_checkpoint(source), adapter, hf_config)
    tokens = rng.integers(1, 80, (2, 12))
    expected = logits_of(plain, {"params": load_params(checkpoint, plain, abstract["params"])}, tokens)
    np.testing.assert_allclose(logits_of(config, {"params": params, "lora": lora}, tokens), expected, atol=5e-5)
    np.testing.assert_allclose(logits_of_peft(source, tmp_path / "out", tokens), expected, atol=5e-5)

    # And it is read back as it was, but for what is not on the diagonal.
    again = dataclasses.replace(plain, **lora_settings(adapter, plain))
    assert (again.lora_rank, again.lora_alpha) == (3, 6.0)
    read = load_lora(adapter, again, abstract_params(again)[0]["lora"])
    jax.tree.map(np.testing.assert_array_equal, lora, jax.device_get(read))
    path = tmp_path / "out" / "adapter_model.safetensors"
    stored = {name: tensor + 1 if "lora_B" in name else tensor for name, tensor in load_file(path).items()}
    save_file(stored, path)
    with pytest.raises(ValueError, match="has one matrix A for all of .*it can be merged"):
        load_lora(open_adapter(tmp_path / "out"), again, abstract_params(again)[0]["lora"])


def test_an_adapter_names_no_more_modules_than_it_has_where_a_family_calls_two_of_them_alike():
    config = ModelConfig.from_hf(load_hf_config(DATA / "base-gpt2"), lora_rank=2, lora_targets=("o_proj",))
    adapter = adapter_of(abstract_zeros(config), config, "base", Path("unused"))
    assert adapter.config.raw["target_modules"] == ["attn.c_proj"]


def abstract_zeros(config: ModelConfig):
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), abstract_params(config)[0]["lora"])


def test_tied_base_is_told_apart_where_the_adapter_changes_one_of_the_two_tables(copy):
    folder = copy("embedding")
    base = folder.parent / "base-llama"
    tensors = load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors")
    hf_config = load_hf_config(base) | {"tie_word_embeddings": True}
    checkpoint, config = merged(open_checkpoint(base), open_adapter(folder), hf_config)
    assert config["tie_word_embeddings"] is False
    table = tensors["model.embed_tokens.weight"]
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), table)
    assert not np.array_equal(checkpoint.read("model.embed_tokens.weight"), table)
    plain, config = merged(open_checkpoint(base), open_adapter(DATA / "lora"), hf_config)
    assert config["tie_word_embeddings"] is True and "lm_head.weight" not in plain.tensors


def test_base_that_is_tied_by_default_and_stores_its_output_too_is_told_apart(copy):
    def adapt_the_embedding(tensors):
        tensors.clear()
        tensors["base_model.model.transformer.wte.lora_embedding_A"] = np.full((4, 64), 0.5, np.float32)
        tensors["base_model.model.transformer.wte.lora_embedding_B"] = np.full((32, 4), 0.5, np.float32)

    folder = copy("gpt2_fan_in_fan_out", adapt_the_embedding, target_modules=["wte"], r=4)
    base = folder.parent / "base-gpt2"
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, base / "model.safetensors")
    hf_config = load_hf_config(base)
    del hf_config["tie_word_embeddings"]
    checkpoint, config = merged(open_checkpoint(base), open_adapter(folder), hf_config)
    assert config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), tensors["transformer.wte.weight"])


@pytest.mark.parametrize("target", ["all-linear", r".*_proj", ["self_attn.q_proj", "k_proj", "v_proj", "o_proj",
                                                               "gate_proj", "up_proj", "down_proj"]])  # fmt: skip
def test_targets_may_be_a_word_a_pattern_or_a_list(copy, target):
    folder = copy("all_linear", target_modules=target)
    base = folder.parent / "base-llama"
    ours, _ = merged(open_checkpoint(base), open_adapter(folder), load_hf_config(base))
    theirs, _ = merge("all_linear")
    for name in theirs.tensors:
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))


def test_excluded_modules_are_no_targets(copy):
    def without_gate(tensors):
        for name in [name for name in tensors if "gate_proj" in name]:
            del tensors[name]

    folder = copy("all_linear", without_gate, target_modules="all-linear", exclude_modules=["gate_proj"])
    base = folder.parent / "base-llama"
    merged(open_checkpoint(base), open_adapter(folder), load_hf_config(base))


def test_old_adapter_saved_as_a_pickle_is_read(copy):
    import torch

    folder = copy("lora")
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert open_adapter(folder).modules == open_adapter(DATA / "lora").modules


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"peft_type": "IA3"}, "an adapter of type 'IA3': LORA is read here"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights to 'pissa_niter_4', which changes the base"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"alora_invocation_tokens": [1, 2]}, "sets alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "sets layer_replication"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "sets target_parameters"),
        ({"use_qalora": True}, "sets use_qalora"),
        ({"trainable_token_indices": [3]}, "sets trainable_token_indices"),
        ({"invented_in_2027": {"x": 1}}, "sets invented_in_2027"),
        ({"bias": "some"}, "sets bias to 'some'"),
        ({"r": None}, "is not the config of a LoRA adapter"),
        ({"target_modules": "layers.(["}, "is not the config of a LoRA adapter"),
        ({"rank_pattern": {"[": 3}}, "is not the config of a LoRA adapter"),
        ({"rank_pattern": [3]}, "is not the config of a LoRA adapter"),
        ({"r": 8}, r"has matrices of rank \(4, 4\), and its config says 8"),
        ({"use_dora": True}, "lacks lora_magnitude_vector of"),
        ({"modules_to_save": ["score"]}, "lacks the tensors of score"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused_by_name(copy, settings, message):
    with pytest.raises(ValueError, match=message):
        open_adapter(copy("lora", **settings))


NAME = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"


@pytest.mark.parametrize(
    "change, settings, message",
    [
        (lambda t: t.pop(NAME.format("B")), {}, r"lacks lora_B of model\.layers\.0\.mlp\.up_proj"),
        (lambda t: [t.pop(NAME.format(x)) for x in "AB"], {}, r"asks for model\.layers\.0\.mlp\.up_proj and the file"),
        (lambda t: None, {"target_modules": ["q_proj"]}, "the config does not ask for model"),
        (lambda t: None, {"layers_to_transform": 1}, "the config does not ask for model.layers.0"),
        (lambda t: t.update({NAME.format("A"): np.zeros((4, 31), np.float32)}), {}, "48 outputs and 31 inputs"),
        (lambda t: t.update({"x.lora_A.weight": np.zeros((4, 4))}), {}, "does not begin with base_model"),
        (lambda t: t.update({"base_model.model.x.lora_C": np.zeros((4, 4))}), {}, "a kind of adapter that is not read"),
        (lambda t: t.update({"base_model.model.model.extra.weight": np.zeros(4)}), {}, "has no place in"),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": np.zeros((65, 32))}),
            {},
            r"shape \(65, 32\), and lm_head",
        ),
        (lambda t: t.update({NAME.format("B").replace("weight", "bias"): np.zeros(48)}), {}, "adds a bias to model"),
    ],
)
def test_adapter_that_does_not_fit_is_refused_by_name(copy, change, settings, message):
    folder = copy("lora", change, **settings)
    base = folder.parent / "base-llama"
    with pytest.raises(ValueError, match=message):
        merged(open_checkpoint(base), open_adapter(folder), load_hf_config(base))


def test_adapter_of_another_model_is_refused():
    with pytest.raises(
        ValueError, match=r"adapts model\.layers.*, which .*base-gpt2 does not have: is it the right base"
    ):
        merged(open_checkpoint(DATA / "base-gpt2"), open_adapter(DATA / "lora"), load_hf_config(DATA / "base-gpt2"))


@pytest.mark.parametrize(
    "name, what",
    [("dora", "DoRA's magnitudes"), ("embedding", "an adapted embedding"), ("modules_to_save", "a tensor in full"),
     ("gpt2_lora_bias", "a bias of the adapter"), ("gpt2_bias_lora_only", "a tensor in full"),
     ("gpt2_fan_in_fan_out", r"one matrix A of rank 4 for the 3 matrices that transformer\.h\.0\.attn\.c_attn is")],
)  # fmt: skip
def test_what_cannot_be_trained_here_says_so_and_how_to_merge_it(name, what):
    with pytest.raises(ValueError, match=rf"{what}.*can be merged but not trained here: .*--merge-lora"):
        adapter = open_adapter(DATA / name)
        lora_settings(adapter, ModelConfig.from_hf(load_hf_config(base_path(adapter))))


def test_adapters_of_experts_and_of_the_output_are_merged_exactly_and_not_trained(tmp_path):
    """Each expert a Linear, as transformers 4 has them and PEFT adapts them there."""
    base = DATA.parent / "hf_torch" / "mixtral"
    stored, rng = load_file(base / "model.safetensors"), np.random.default_rng(0)
    settings = json.loads((DATA / "lora" / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    for targets in (["w1", "w2", "w3"], ["lm_head"]):
        folder, tensors, expected = tmp_path / targets[0], {}, dict(stored)
        for name, weight in stored.items():
            module = name.removesuffix(".weight")
            if module.split(".")[-1] in targets:
                a, b = (
                    rng.normal(size=size).astype(np.float32) for size in ((4, weight.shape[1]), (weight.shape[0], 4))
                )
                tensors |= {f"base_model.model.{module}.lora_{x}.weight": part for x, part in (("A", a), ("B", b))}
                expected[name] = weight + np.float32(settings["lora_alpha"] / 4) * (b @ a)
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": targets}))
        merged_model, hf_config = merged(open_checkpoint(base), open_adapter(folder), load_hf_config(base))
        assert len(tensors) > 1 and merged_model.tensors.keys() == expected.keys()
        for name, weight in expected.items():
            np.testing.assert_array_equal(merged_model.read(name), weight, err_msg=name)
        with pytest.raises(
            ValueError, match=r"an expert or outside of the layers, which can be merged but not trained"
        ):
            lora_settings(open_adapter(folder), ModelConfig.from_hf(hf_config))


def test_adapter_of_another_family_is_not_trained():
    with pytest.raises(ValueError, match=r"adapts model\.layers\.0\S+, which family gpt2 has not: another base"):
        lora_settings(open_adapter(DATA / "lora"), ModelConfig.from_hf(load_hf_config(DATA / "base-gpt2")))


def test_folder_without_an_adapter_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="holds no adapter_config.json: name the folder of a PEFT adapter"):
        open_adapter(tmp_path)
    shutil.copy(DATA / "lora" / "adapter_config.json", tmp_path)
    with pytest.raises(ValueError, match="holds neither adapter_model.safetensors nor adapter_model.bin"):
        open_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        open_adapter(tmp_path)
