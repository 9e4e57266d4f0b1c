"""Export: the same bytes back, folders that transformers opens, and nothing half-written or overwritten."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import abstract_params
from jaxrl.models.families import FAMILIES, Family
from jaxrl.parallel import make_mesh, with_shardings
from jaxrl.weights.convert import convert
from jaxrl.weights.export import export_hf, hf_tensors
from jaxrl.weights.folder import both_spellings, new_folder
from jaxrl.weights.hf_names import flatten, score_module
from jaxrl.weights.live import from_hf
from jaxrl.weights.load import load_hf_config, load_params, open_checkpoint
from jaxrl.weights.verify import verify_logits

DATA = Path(__file__).parent / "data"
FOLDERS = sorted(path.name for path in (DATA / "hf_torch").iterdir())
OPENED = ["llama31", "qwen2", "qwen3-moe", "gemma3", "phi3", "gpt-oss", "olmo3", "gpt-neox"]
_OUTSIDE_ROPE = ("original_max_position_embeddings", "partial_rotary_factor")  # where early files have it
FLAX = ["llama", "mistral", "gemma", "gpt2", "opt", "opt-350m-style", "gptj", "gpt_neo", "bloom"]


def load(folder: Path, mesh_shape=(2, 2, 2), head: str = "lm", **run):
    """Config and parameters of a folder, float32, on a mesh of virtual devices."""
    config = ModelConfig.from_hf(load_hf_config(folder), **run)
    abstract, axes = abstract_params(config, head)
    target = with_shardings(make_mesh(*mesh_shape), abstract["params"], axes["params"])
    return load_params(folder, config, target), config


def round_trip(source: Path, out: Path, *, head: str = "lm", options: dict | None = None, **run) -> None:
    params, config = load(source, head=head, **run)
    export_hf(params, config, out, source_folder=source, **(options or {}))


def stored_tensors(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_identical(ours: Path, theirs: Path) -> None:
    a, b = stored_tensors(ours), stored_tensors(theirs)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name


def source_with_tokenizer(folder: Path, name: str, dtype=np.float32) -> Path:
    """A fixture as a real repository has it: companions beside the weights, and perhaps another dtype."""
    shutil.copytree(DATA / "hf_torch" / name, folder)
    tensors = {key: tensor.astype(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for companion in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / companion).write_text(json.dumps({"of": companion}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.mark.parametrize(
    "folder", [*(f"hf_torch/{name}" for name in FOLDERS), "peft_lora/base-llama", "peft_lora/base-gpt2"]
)
def test_export_then_load_returns_identical_bytes(tmp_path, folder):
    source = DATA / folder
    round_trip(source, tmp_path / "out")
    assert_identical(tmp_path / "out", source)
    written, read = load_hf_config(tmp_path / "out"), load_hf_config(source)
    assert written | read == written, "what config.json said, it still says"
    assert ModelConfig.from_hf(written) == ModelConfig.from_hf(read)


def test_a_family_that_is_shaped_like_llama_is_one_entry_of_one_table(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "llamoid", Family("Llamoid"))
    source = source_with_tokenizer(tmp_path / "source", "llama31")
    (source / "config.json").write_text(json.dumps(load_hf_config(source) | {"model_type": "llamoid"}))
    round_trip(source, tmp_path / "out")
    assert_identical(tmp_path / "out", source)
    (params, config), (expected, llama) = load(source), load(DATA / "hf_torch" / "llama31")
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert dataclasses.replace(config, family="llama", hf_json=llama.hf_json) == llama
    assert load_hf_config(tmp_path / "out")["architectures"] == ["LlamoidForCausalLM"]


@pytest.mark.parametrize("family", FLAX)
def test_a_flax_model_is_exported_as_its_torch_twin(tmp_path, family):
    import transformers

    round_trip(DATA / "hf_flax" / family, tmp_path / "out")
    assert_identical(tmp_path / "out", DATA / "hf_flax" / family / "torch")
    (architecture,) = load_hf_config(tmp_path / "out")["architectures"]
    assert hasattr(transformers, architecture), f"{architecture} is no class of transformers"


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_source_with_float32_master_weights_returns_identical_bytes(tmp_path, dtype):
    source = source_with_tokenizer(tmp_path / "source", "qwen3", dtype)
    round_trip(source, tmp_path / "out")
    assert_identical(tmp_path / "out", source)
    config = load_hf_config(tmp_path / "out")
    assert config["dtype"] == config["torch_dtype"] == np.dtype(dtype).name


def test_every_number_of_bfloat16_survives_float32_and_back(tmp_path):
    """All 65,536 patterns, subnormal numbers too (quiet NaNs: a signalling one has no float32 that casts back)."""
    source = source_with_tokenizer(tmp_path / "source", "llama32-tied", ml_dtypes.bfloat16)
    tensors = load_file(source / "model.safetensors")
    patterns = np.arange(65536, dtype=np.uint16)
    patterns = patterns[(patterns & 0x7FFF) <= 0x7F80].view(ml_dtypes.bfloat16)
    table = np.resize(patterns, (65536 // 32, 32))
    tensors["model.embed_tokens.weight"] = table
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = load_hf_config(source) | {"vocab_size": len(table)}
    (source / "config.json").write_text(json.dumps(config))
    round_trip(source, tmp_path / "out")
    assert_identical(tmp_path / "out", source)


@pytest.mark.parametrize("name", OPENED)
def test_exported_folder_opens_in_transformers_with_the_recorded_logits(tmp_path, name):
    import torch
    from transformers import AutoModelForCausalLM

    round_trip(DATA / "hf_torch" / name, tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    expected = np.load(DATA / "hf_torch" / name / "expected_logits.npz")
    with torch.no_grad():
        logits = model(torch.from_numpy(expected["input_ids"]).long()).logits
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-5, rtol=1e-5)  # float32, another attention kernel


@pytest.mark.parametrize(
    "name, head_class, labels, bias",
    [
        ("qwen2-tokencls-critic", "Qwen2ForTokenClassification", 1, True),
        ("llama-seqcls-reward", "LlamaForSequenceClassification", 1, False),
        ("qwen2-seqcls-3labels", "Qwen2ForSequenceClassification", 3, False),
        ("gemma2-seqcls-reward", "Gemma2ForSequenceClassification", 1, False),
        ("phi3-seqcls-reward", "Phi3ForSequenceClassification", 1, False),
        ("gpt2-seqcls-reward", "GPT2ForSequenceClassification", 1, False),
    ],
)
def test_critic_and_reward_heads_round_trip_under_their_class(tmp_path, name, head_class, labels, bias):
    import transformers

    source = DATA / "heads" / name
    round_trip(source, tmp_path / "out", head="score", num_labels=labels, score_bias=bias)
    assert_identical(tmp_path / "out", source)
    config = load_hf_config(tmp_path / "out")
    assert config["architectures"] == [head_class] and len(config["id2label"]) == labels
    _, report = getattr(transformers, head_class).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


def test_critic_that_began_as_a_language_model_is_exported_as_token_classification(tmp_path):
    from transformers import AutoModelForTokenClassification

    source = DATA / "hf_torch" / "qwen3"
    config = ModelConfig.from_hf(load_hf_config(source), score_bias=True)
    target = abstract_params(config, "score")[0]["params"]
    params = load_params(source, config, target, allow_missing={"score.kernel", "score.bias"})
    params["score"] = {"kernel": np.full((32, 1), 0.5, np.float32), "bias": np.full(1, 0.25, np.float32)}
    export_hf(params, config, tmp_path / "critic", source_folder=source)
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic")
    assert model.config.architectures == ["Qwen3ForTokenClassification"] and model.config.num_labels == 1
    assert model.score.weight.detach().numpy().tolist() == [[0.5] * 32] and model.score.bias.item() == 0.25


FAMILY_FOLDERS = {  # one folder of each family
    load_hf_config(folder)["model_type"]: folder
    for folder in [*sorted((DATA / "hf_torch").iterdir()), *(DATA / "hf_flax" / name for name in FLAX)]
}


@pytest.mark.parametrize("kind", ["ForTokenClassification", "ForSequenceClassification"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_trained_head_of_each_family_arrives_in_transformers_or_comes_back_here(tmp_path, caplog, family, kind):
    import transformers

    source, has_bias = FAMILY_FOLDERS[family], kind == "ForTokenClassification"
    config = ModelConfig.from_hf(load_hf_config(source), score_bias=has_bias)
    target = abstract_params(config, "score")[0]["params"]
    params = load_params(source, config, target, allow_missing={"score.kernel", "score.bias"})
    head = np.linspace(-1, 1, config.table_size, dtype=np.float32)
    params["score"] = {"kernel": head[:, None]} | ({"bias": np.array([0.25], np.float32)} if has_bias else {})
    export_hf(params, config, tmp_path / "out", source_folder=source)
    back, settings = from_hf(tmp_path / "out"), {"num_labels": 1, "score_bias": has_bias}
    assert back.config == ModelConfig.from_hf(load_hf_config(source), **settings)
    np.testing.assert_array_equal(back.params["score"]["kernel"][:, 0], head)

    architectures = load_hf_config(tmp_path / "out")["architectures"]
    has_class = any(name.startswith(FAMILIES[family].classes) and name.endswith(kind) for name in dir(transformers))
    if family == "gemma3_text":  # whose token classifier is that of the model with a vision tower
        has_class = kind == "ForSequenceClassification"
    assert bool(architectures) == has_class
    assert ("transformers has no class" in caplog.text) != has_class
    if not has_class:
        return
    model, report = getattr(transformers, architectures[0]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    theirs = model.get_submodule(score_module(config))
    np.testing.assert_array_equal(theirs.weight.detach()[0], head)
    assert not has_bias or theirs.bias.item() == 0.25
    assert verify_logits(tmp_path / "out") is not None


def test_a_critic_whose_head_has_the_name_of_other_families_is_read(tmp_path):
    source = DATA / "heads" / "gpt2-seqcls-reward"
    shutil.copytree(source, tmp_path / "old")
    tensors = load_file(source / "model.safetensors") | {"score.bias": np.array([0.5], np.float32)}
    save_file(tensors, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    round_trip(tmp_path / "old", tmp_path / "out", head="score", score_bias=True)
    written = stored_tensors(tmp_path / "out")
    assert written["classifier.bias"].item() == 0.5 and "score.weight" not in written
    np.testing.assert_array_equal(written["classifier.weight"], tensors["score.weight"])


def test_shards_are_bounded_and_their_index_is_complete(tmp_path):
    source = DATA / "hf_torch" / "llama31"
    round_trip(source, tmp_path / "out", options={"max_shard_bytes": 12_000})
    assert_identical(tmp_path / "out", source)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and {file.name for file in files} == set(index["weight_map"].values())
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    total = 0
    for file in files:
        size = sum(tensor.nbytes for tensor in load_file(file).values())
        assert size <= 12_000
        total += size
        with safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == total


def test_sharded_export_opens_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    round_trip(DATA / "hf_torch" / "llama31", tmp_path / "out", options={"max_shard_bytes": 12_000})
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_a_dtype_can_be_asked_for(tmp_path):
    source = DATA / "hf_torch" / "qwen2"
    round_trip(source, tmp_path / "out", options={"dtype": "bfloat16"})
    expected = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in stored_tensors(source).items()}
    for name, tensor in stored_tensors(tmp_path / "out").items():
        np.testing.assert_array_equal(tensor, expected[name])
    assert load_hf_config(tmp_path / "out")["torch_dtype"] == "bfloat16"
    with pytest.raises(ValueError, match=r"dtype 'fp16' is not one .*float32, float16, bfloat16"):
        round_trip(source, tmp_path / "other", options={"dtype": "fp16"})
    assert not (tmp_path / "other").exists()


def test_companions_are_carried_over(tmp_path):
    source = source_with_tokenizer(tmp_path / "source", "qwen2")
    round_trip(source, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_config_is_written_in_the_spellings_of_transformers_4_and_5(tmp_path):
    round_trip(DATA / "hf_torch" / "llama31", tmp_path / "new")
    new = load_hf_config(tmp_path / "new")
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 16
    assert new["rope_theta"] == 500_000.0 and new["rope_scaling"] == llama3
    assert new["rope_parameters"] == llama3 | {"rope_theta": 500_000.0}
    old = {"rope_theta": 10_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    both = both_spellings(old, "float32")
    assert both["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert both["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    assert both_spellings({"rope_theta": 1e6, "rope_scaling": None}, "float32")["rope_scaling"] is None
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf({k: v for k, v in new.items() if k != "rope_parameters"})


def with_another_rope(config: dict) -> dict:
    """The config with bases, and parts of a head that are rotated, that are no family's default."""
    ropes = config["rope_parameters"]
    for rope in [ropes] if "rope_theta" in ropes else ropes.values():
        rope["rope_theta"] *= 1.7
        if rope.get("partial_rotary_factor", 1) <= 0.5:
            rope["partial_rotary_factor"] *= 2
    return config


def test_transformers_4_and_5_read_the_same_rope_and_give_the_same_logits(tmp_path, transformers_4):
    """Of a config.json in either's spelling, what transformers 5 reads in its own before we have written anything."""
    for name in FOLDERS:
        source, first, old, second = (tmp_path / part / name for part in ("source", "first", "old", "second"))
        shutil.copytree(DATA / "hf_torch" / name, source)
        (source / "config.json").write_text(json.dumps(with_another_rope(load_hf_config(source))))
        convert(str(source), first)
        shutil.copytree(first, old)
        config = load_hf_config(old)
        del config["rope_parameters"], config["dtype"]  # so transformers 4 has it
        (old / "config.json").write_text(json.dumps(config))
        convert(str(old), second)
    recorded = {name: np.load(DATA / "hf_torch" / name / "expected_logits.npz") for name in FOLDERS}
    running = {}
    for version, python_path, parts in (
        (4, transformers_4, ("first", "second")),
        (5, "", ("source", "first", "second")),
    ):
        inputs = {f"{part}/{name}": recorded[name]["input_ids"] for part, name in product(parts, FOLDERS)}
        np.savez(tmp_path / f"inputs_{version}.npz", **inputs)
        running[version] = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("opened_by_transformers.py"), str(version)],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert [process.wait() for process in running.values()] == [0, 0]
    opened = {version: np.load(tmp_path / f"opened_by_{version}.npz") for version in running}
    for name in FOLDERS:
        expected = {key: opened[5][f"source/{name}/{key}"] for key in ("inv_freq", "logits")}
        assert np.abs(expected["logits"] - recorded[name]["logits"]).max() > 1e-3, "another rope than was recorded"
        for version, part, key in product(opened, ("first", "second"), expected):
            np.testing.assert_allclose(  # float32; each version adds up experts in another order
                opened[version][f"{part}/{name}/{key}"], expected[key], atol=1e-5, rtol=1e-5, err_msg=name
            )


def test_the_early_name_of_longrope_is_exported_under_the_one_that_transformers_knows(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    source = tmp_path / "source"
    shutil.copytree(DATA / "hf_torch" / "phi3-longrope-partial", source)
    config = load_hf_config(source)
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"]} | {key: rope[key] for key in _OUTSIDE_ROPE}
    config["rope_scaling"] = {"type": "su"} | {key: rope[key] for key in ("short_factor", "long_factor")}
    (source / "config.json").write_text(json.dumps(config))
    round_trip(source, tmp_path / "out")
    written = load_hf_config(tmp_path / "out")
    assert (written["rope_scaling"]["type"], written["rope_parameters"]["rope_type"]) == ("longrope", "longrope")
    expected = np.load(source / "expected_logits.npz")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = model(torch.from_numpy(expected["input_ids"]).long()).logits
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-5, rtol=1e-5)  # float32


def test_the_base_that_olmo3_leaves_out_is_the_same_in_every_spelling():
    config = load_hf_config(DATA / "hf_torch" / "olmo3")
    scaling = {key: x for key, x in config["rope_parameters"]["full_attention"].items() if key != "rope_theta"}
    old = {key: value for key, value in config.items() if key != "rope_parameters"} | {"rope_scaling": scaling}
    both = both_spellings(old, "float32")
    assert both["rope_theta"] == both["rope_parameters"]["sliding_attention"]["rope_theta"] == 500_000.0
    assert ModelConfig.from_hf(both) == ModelConfig.from_hf(old)


def test_existing_folder_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"out exists already: name another folder \(or from Python overwrite=True\)"):
        round_trip(DATA / "hf_torch" / "qwen2", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/out cannot be made \(.*\): name a folder that you may write"):
        round_trip(DATA / "hf_torch" / "qwen2", tmp_path / "file" / "out")


def test_overwriting_keeps_the_old_folder_until_the_new_one_is_complete(tmp_path):
    source = DATA / "hf_torch" / "qwen2"
    params, config = load(source)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    broken = jax.tree.map(lambda x: x, params)
    broken["norm"]["scale"] = params["norm"]["scale"][:-1]  # an error after most of the file is written
    with pytest.raises(AssertionError):
        export_hf(broken, config, tmp_path / "out", source_folder=source, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "old.txt").read_text() == "old"
    export_hf(params, config, tmp_path / "out", source_folder=source, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "old.txt").exists()
    assert_identical(tmp_path / "out", source)


def test_what_a_killed_export_left_is_removed_by_the_next_and_what_is_being_written_is_not(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from jaxrl.weights.folder import new_folder\n"
        "with new_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'model.safetensors').write_bytes(bytes(1000))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")])
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out.of")])  # of another folder
    killed, other = sorted(tmp_path.iterdir())
    assert [path.suffix for path in (killed, other)] == [".partial"] * 2
    with new_folder(tmp_path / "out") as first:
        assert not killed.exists() and other.exists()
        (first / "a").touch()
        with new_folder(tmp_path / "out", overwrite=True) as second:
            assert first.exists() and first != second
        assert (first / "a").exists()
        (tmp_path / "out").rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "out"]


def test_failed_export_leaves_nothing(tmp_path):
    source = DATA / "hf_torch" / "qwen2"
    params, config = load(source)
    params["norm"]["scale"] = params["norm"]["scale"][:-1]
    with pytest.raises(AssertionError):
        export_hf(params, config, tmp_path / "out", source_folder=source)
    with pytest.raises(ValueError, match=r"is not the model that is exported: its model\.embed_tokens\.weight"):
        export_hf(params, config, tmp_path / "out", source_folder=DATA / "heads" / "qwen2-tokencls-critic")
    assert not list(tmp_path.iterdir())


def test_stream_of_tensors_is_lazy_and_in_the_order_of_a_forward_pass():
    params, config = load(DATA / "hf_torch" / "llama31")
    names = [name for name, _ in hf_tensors(params, config)]
    assert names[0] == "model.embed_tokens.weight" and names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layer_of = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layer_of == sorted(layer_of)
    stream = hf_tensors(params, config)
    next(stream)
    for _, array in flatten(params["layers"]):
        array.delete()
    with pytest.raises(RuntimeError, match="deleted"):  # nothing of the layers had been fetched ahead
        next(stream)


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (  # Gemma 3 as transformers 5 has it
            {"model_type": "gemma3_text", "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}},
            {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
        (  # and as transformers 4 has it, its usual bases left out
            {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        ),
        (
            {"model_type": "olmo3", "rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
            {"rope_parameters": {
                "full_attention": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}},
        ),
        (
            {"model_type": "gpt_neox", "rope_parameters": {
                "rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}},
            {"rotary_pct": 0.5, "rotary_emb_base": 2e4, "rope_scaling": None},
        ),
        ({"model_type": "gpt2", "n_embd": 8},
         {"model_type": "gpt2", "n_embd": 8, "dtype": "float32", "torch_dtype": "float32"}),
        ({"model_type": "qwen3_moe", "num_local_experts": 4}, {"num_experts": 4, "num_local_experts": 4}),
        (
            {"model_type": "phi3", "rope_parameters": {
                "rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "rope_theta": 1e4,
                "original_max_position_embeddings": 8, "partial_rotary_factor": 0.75}},
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, "rope_theta": 1e4,
             "original_max_position_embeddings": 8, "partial_rotary_factor": 0.75},
        ),
    ],
)  # fmt: skip
def test_what_transformers_4_and_5_spell_differently_is_written_in_both(given, written):
    config = both_spellings(given, "float32")
    assert {key: config[key] for key in written} == written
    assert given["model_type"] != "gpt2" or config == written, "no rope is written where there is none"
    assert both_spellings(config, "float32") == config
