"""The converter: every kind of source to every kind of result, verified; and everything that is wrong with a source."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from jaxrl.checkpoint import Checkpoints
from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import abstract_params
from jaxrl.parallel import make_mesh, with_shardings
from jaxrl.update import TrainState
from jaxrl.weights import verify
from jaxrl.weights.convert import convert, name_map, specs_of
from jaxrl.weights.folder import load_hf_config
from jaxrl.weights.formats import open_checkpoint
from jaxrl.weights.load import load_params
from jaxrl.weights.peft import base_path, open_adapter
from jaxrl.weights.peft_tree import load_lora, lora_settings
from jaxrl.weights.source import Options, open_source
from jaxrl.weights.verify import verify_logits, verify_tensors

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_same(folder: Path, other: Path) -> None:
    ours, theirs = tensors_of(folder), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name].dtype, ours[name].tobytes()) == (theirs[name].dtype, theirs[name].tobytes()), name


def nothing_but(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def as_bin(source: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    state = {name: torch.from_numpy(array) for name, array in load_file(source / "model.safetensors").items()}
    torch.save(state, folder / "pytorch_model.bin")
    return folder


# What goes in.


@pytest.mark.parametrize("name", ["llama31", "llama32-tied", "llama-linear-rope", "qwen2", "qwen3"])
def test_safetensors_come_out_byte_for_byte_and_verified(tmp_path, name):
    source = DATA / "hf_torch" / name
    convert(str(source), tmp_path / "out", verify=True)
    assert_same(tmp_path / "out", source)
    assert ModelConfig.from_hf(load_hf_config(tmp_path / "out")) == ModelConfig.from_hf(load_hf_config(source))


@pytest.mark.parametrize("name", ["llama", "llama-sharded", "llama-flax-safetensors", "llama-bf16"])
def test_flax_of_every_form_becomes_its_torch_twin(tmp_path, name):
    convert(str(DATA / "hf_flax" / name), tmp_path / "out", verify=True)
    if name == "llama-bf16":
        expected = {
            k: v.astype(ml_dtypes.bfloat16) for k, v in tensors_of(DATA / "hf_flax" / "llama" / "torch").items()
        }
        ours = tensors_of(tmp_path / "out")
        assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in expected.items()}
    else:
        assert_same(tmp_path / "out", DATA / "hf_flax" / "llama" / "torch")


def test_head_that_flax_used_though_the_config_ties_it_is_kept(tmp_path, caplog):
    shutil.copytree(DATA / "hf_flax" / "llama", tmp_path / "source")
    config = load_hf_config(tmp_path / "source") | {"tie_word_embeddings": True}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    convert(str(tmp_path / "source"), tmp_path / "out")
    assert load_hf_config(tmp_path / "out")["tie_word_embeddings"] is False
    assert_same(tmp_path / "out", DATA / "hf_flax" / "llama" / "torch")
    assert "tie_word_embeddings is set to false" in caplog.text


def test_pytorch_bin_and_a_single_file_are_converted(tmp_path):
    source = as_bin(DATA / "hf_torch" / "qwen3", tmp_path / "source")
    convert(str(source), tmp_path / "out")
    convert(str(source / "pytorch_model.bin"), tmp_path / "again")
    for folder in ("out", "again"):
        assert_same(tmp_path / folder, DATA / "hf_torch" / "qwen3")


@pytest.mark.parametrize("name", ["llama-nf4-double", "llama-fp4-double"])
def test_4_bit_model_is_written_as_numbers_when_that_is_asked_for(tmp_path, name):
    source = DATA / "bnb_nf4" / name
    with pytest.raises(ValueError, match="holds 7 matrices in 4 bits of bitsandbytes: ask for --dequantize"):
        convert(str(source), tmp_path / "out")
    assert nothing_but(tmp_path)
    convert(str(source), tmp_path / "out", options=Options(dequantize=True), verify=True)
    ours, expected = tensors_of(tmp_path / "out"), load_file(source / "expected_dequant.safetensors")
    for weight, numbers in expected.items():
        assert ours[weight].tobytes() == numbers.tobytes()
    assert "quantization_config" not in load_hf_config(tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["lora", "rslora", "dora", "modules_to_save", "regex_patterns", "layer1_only", "embedding"]
)
def test_adapter_is_merged_into_its_base(tmp_path, name):
    from transformers import LlamaForCausalLM

    source = DATA / "peft_lora" / name
    convert(str(source), tmp_path / "out", options=Options(merge_lora=True), verify=True)
    expected = np.load(source / "expected_logits.npz")
    with torch.no_grad():
        model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
        logits = model(torch.from_numpy(expected["input_ids"]).long()).logits.numpy()
    np.testing.assert_allclose(logits, expected["logits_merged"], atol=2e-5)  # float32, another order of sums


def test_adapter_on_a_4_bit_base_is_merged_when_numbers_are_asked_for(tmp_path):
    shutil.copytree(DATA / "peft_lora" / "rslora", tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rng = np.random.default_rng(0)
    for name in list(stored):
        size = {"q_proj": 64, "v_proj": 32}[name.split(".")[-3]]
        shape = (4, 64) if "lora_A" in name else (size, 4)
        stored[name] = rng.normal(size=shape).astype(np.float32)
        if ".layers.1." in name:
            del stored[name]
    save_file(stored, tmp_path / "adapter" / "adapter_model.safetensors")
    options = Options(merge_lora=True, base=str(DATA / "bnb_nf4" / "llama-nf4-double"))
    with pytest.raises(ValueError, match="ask for --dequantize"):
        convert(str(tmp_path / "adapter"), tmp_path / "out", options=options)
    convert(str(tmp_path / "adapter"), tmp_path / "out", options=Options(**vars(options) | {"dequantize": True}))
    base = load_file(DATA / "bnb_nf4" / "llama-nf4-double" / "expected_dequant.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (stored[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = (base[f"{name}.weight"].astype(np.float32) + np.float32(8 / 2) * (b @ a)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(tensors_of(tmp_path / "out")[f"{name}.weight"], expected)


@pytest.mark.parametrize(
    "name", sorted(path.parent.name for path in (DATA / "peft_lora").glob("*/adapter_config.json"))
)
def test_adapter_to_adapter_is_byte_identical(tmp_path, name):
    source = DATA / "peft_lora" / name
    convert(str(source), tmp_path / "out", to="peft", verify=True)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()
    convert(str(source), tmp_path / "half", to="peft", dtype="bfloat16", verify=True)
    half = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert all(array.dtype == ml_dtypes.bfloat16 for array in half.values())


@pytest.mark.parametrize(
    "name, architecture, options",
    [
        ("llama-seqcls-reward", "LlamaForSequenceClassification", Options()),
        ("qwen2-seqcls-3labels", "Qwen2ForSequenceClassification", Options()),
        ("qwen2-tokencls-critic", "Qwen2ForTokenClassification", Options()),
        ("trl-valuehead-llama", "LlamaForTokenClassification", Options(head="score")),
        ("trl-valuehead-llama", "LlamaForCausalLM", Options(head="lm")),
    ],
)
def test_heads_come_out_under_the_class_that_reads_them(tmp_path, name, architecture, options):
    convert(str(DATA / "heads" / name), tmp_path / "out", options=options, verify=True)
    assert load_hf_config(tmp_path / "out")["architectures"] == [architecture]


def test_language_model_with_a_value_head_is_not_guessed_at(tmp_path):
    with pytest.raises(ValueError, match=r"holds a language model and the head v_head\.summary: say which is meant"):
        convert(str(DATA / "heads" / "trl-valuehead-llama"), tmp_path / "out")


def test_language_model_that_is_tied_by_default_is_not_taken_for_a_critic(tmp_path):
    shutil.copytree(DATA / "peft_lora" / "base-gpt2", tmp_path / "policy")
    tensors = load_file(tmp_path / "policy" / "model.safetensors")
    head = {"v_head.summary.weight": np.ones((1, 32), np.float32), "v_head.summary.bias": np.ones(1, np.float32)}
    save_file(tensors | head, tmp_path / "policy" / "model.safetensors", metadata={"format": "pt"})
    config = load_hf_config(tmp_path / "policy")
    del config["tie_word_embeddings"]
    (tmp_path / "policy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"holds a language model and the head v_head\.summary: say which is meant"):
        convert(str(tmp_path / "policy"), tmp_path / "out")
    convert(str(tmp_path / "policy"), tmp_path / "out", options=Options(head="lm"), verify=True)


_MEASURE = """
import sys, threading, time
from pathlib import Path
from jaxrl.weights.convert import convert

def anonymous():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("RssAnon")) * 1024

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

peak = [0]
threading.Thread(target=watch, daemon=True).start()
small, source, out = sys.argv[1:]
for to in ("hf", "orbax"):
    convert(small, f"{out}-small-{to}", to=to, mesh=(1, 2, 1))  # everything is imported and compiled
    before = peak[0] = anonymous()
    convert(source, f"{out}-{to}", to=to, mesh=(1, 2, 1))
    print(to, peak[0] - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
def test_a_conversion_holds_a_tensor_three_times_at_most_and_never_an_array_of_all_layers(tmp_path):
    D, F, L = 256, 8192, 8
    config = load_hf_config(DATA / "hf_torch" / "llama32-tied") | {
        "vocab_size": 8, "hidden_size": D, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    for name, F_here in (("small", 8), ("large", F)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(
            json.dumps(config | {"num_hidden_layers": L, "intermediate_size": F_here})
        )
        tensors = {
            "model.embed_tokens.weight": np.ones((8, D), np.float32),
            "model.norm.weight": np.ones(D, np.float32),
        }
        shapes = {
            "input_layernorm": (D,), "post_attention_layernorm": (D,), "self_attn.q_proj": (16, D),
            "self_attn.k_proj": (8, D), "self_attn.v_proj": (8, D), "self_attn.o_proj": (D, 16),
            "mlp.gate_proj": (F_here, D), "mlp.up_proj": (F_here, D), "mlp.down_proj": (D, F_here),
        }  # fmt: skip
        for layer in range(L):
            for module, shape in shapes.items():
                tensors[f"model.layers.{layer}.{module}.weight"] = np.full(shape, layer + 0.5, np.float32)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    flags = "--xla_force_host_platform_device_count=2"
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, *(str(tmp_path / name) for name in ("small", "large", "out"))],
        # Below this size glibc keeps what each thread has freed; layers of a real model are above its highest.
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    peaks = dict(line.split() for line in run.stdout.splitlines())
    for to in ("hf", "orbax"):  # as it is stored, as it is written, and the one before
        assert int(peaks[to]) < 4 * D * F * 4, to
    convert(str(tmp_path / "out-orbax"), tmp_path / "back")
    for folder in ("back", "out-hf"):
        assert_same(tmp_path / folder, tmp_path / "large")


@pytest.mark.parametrize("to", ["hf", "orbax", "peft"])
def test_numbers_that_a_dtype_cannot_hold_are_refused_by_name(tmp_path, to):
    source = tmp_path / "source"
    shutil.copytree(DATA / ("peft_lora/lora" if to == "peft" else "hf_torch/qwen3"), source)
    file = source / ("adapter_model.safetensors" if to == "peft" else "model.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.1.mlp.up_proj" in name)
    tensors[name][0, 0] = -1e5
    save_file(tensors, file, metadata={"format": "pt"})
    message = rf"tensor {re.escape(name)} holds numbers up to 1e\+05, which float16 cannot: ask for bfloat16 or float32"
    with pytest.raises(ValueError, match=message):
        convert(str(source), tmp_path / "out", to=to, dtype="float16")
    assert not (tmp_path / "out").exists()
    convert(str(source), tmp_path / "out", to=to, dtype="bfloat16", verify=True)


# Orbax.


@pytest.mark.parametrize(
    "name",
    [
        "hf_torch/qwen3",
        "hf_torch/llama32-tied",
        "hf_torch/gpt-oss",
        "heads/qwen2-tokencls-critic",
        "hf_flax/llama-bf16",
    ],
)
def test_to_orbax_and_back_is_byte_identical(tmp_path, name):
    convert(str(DATA / name), tmp_path / "hf")
    convert(str(DATA / name), tmp_path / "orbax", to="orbax", mesh=(1, 2, 2), verify=True)
    convert(str(tmp_path / "orbax"), tmp_path / "back", verify=True)
    assert_same(tmp_path / "back", tmp_path / "hf")
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()


def test_converted_orbax_folder_is_a_model_that_loads_onto_any_mesh(tmp_path):
    source = DATA / "hf_torch" / "llama31"
    convert(str(source), tmp_path / "orbax", to="orbax", mesh=(2, 2, 2))
    config = ModelConfig.from_hf(load_hf_config(tmp_path / "orbax"))
    abstract, axes = abstract_params(config)
    expected = load_params(source, config, abstract["params"])
    target = with_shardings(make_mesh(1, 8, 1), abstract["params"], axes["params"])
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "orbax", config, target), expected)


def test_converted_orbax_folder_is_read_by_orbax_itself(tmp_path):
    from orbax.checkpoint import v1 as ocp

    source = DATA / "hf_torch" / "llama31"
    convert(str(source), tmp_path / "orbax", to="orbax", mesh=(1, 2, 2), dtype="bfloat16")
    abstract, axes = abstract_params(ModelConfig.from_hf(load_hf_config(source)))
    as_bf16 = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), abstract["params"])
    expected = load_params(source, ModelConfig.from_hf(load_hf_config(source)), as_bf16)
    on_the_host = ocp.load(str(tmp_path / "orbax" / "params"))
    on_a_mesh = ocp.load(
        str(tmp_path / "orbax" / "params"), with_shardings(make_mesh(1, 8, 1), as_bf16, axes["params"])
    )
    for loaded in (on_the_host, on_a_mesh):
        jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def save_run(folder: Path, trained: dict, model: Path, **settings) -> str:
    """What the trainer leaves of step 3: a checkpoint, and the config of the run."""
    checkpoints = Checkpoints(folder / "checkpoints")
    state = TrainState(trained, {"mu": jnp.zeros(3)})
    checkpoints.save(3, {"actor": state, "critic": state} if settings.pop("critic", False) else {"actor": state}, {})
    checkpoints.wait()
    model_settings = {"path": str(model), "lora_alpha": 6.0} | settings
    (folder / "config.yaml").write_text(json.dumps({"model": model_settings, "critic": {"path": None}}))
    return str(folder / "checkpoints" / "global_step_3")


def test_checkpoint_of_a_run_becomes_the_folder_that_the_run_would_export(tmp_path):
    source = DATA / "hf_flax" / "llama-bf16"
    config = ModelConfig.from_hf(load_hf_config(source))
    params = load_params(source, config, abstract_params(config)[0]["params"])  # float32, as training has it
    checkpoint = save_run(tmp_path / "run", {"params": params}, source)
    convert(checkpoint, tmp_path / "out", verify=True)
    convert(str(source), tmp_path / "expected")
    assert_same(tmp_path / "out", tmp_path / "expected")  # in the dtype of the model that the run began from
    convert(checkpoint, tmp_path / "wide", dtype="float32")
    assert {array.dtype for array in tensors_of(tmp_path / "wide").values()} == {np.dtype(np.float32)}
    with pytest.raises(ValueError, match="holds no weights of 'critic'"):
        convert(checkpoint, tmp_path / "critic", options=Options(role="critic"))
    with pytest.raises(ValueError, match=r"is the folder of a run: name .*/hf, or one of .*global_step_<n>"):
        convert(str(tmp_path / "run"), tmp_path / "x")


def test_critic_of_a_run_is_exported_as_token_classification_even_if_it_is_shallow(tmp_path):
    source = DATA / "hf_torch" / "qwen2"
    config = ModelConfig.from_hf(load_hf_config(source) | {"num_hidden_layers": 1}, score_bias=True)
    target = abstract_params(config, "score")[0]["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) / 8, s.dtype), target)
    checkpoint = save_run(tmp_path / "run", {"params": params}, source, critic=True)
    convert(checkpoint, tmp_path / "out", options=Options(role="critic"), verify=True)
    written = load_hf_config(tmp_path / "out")
    assert (written["architectures"], written["num_hidden_layers"]) == (["Qwen2ForTokenClassification"], 1)


def test_adapters_of_a_run_are_merged_or_exported(tmp_path):
    adapter = open_adapter(DATA / "peft_lora" / "rslora")
    base = Path(base_path(adapter))
    plain = ModelConfig.from_hf(load_hf_config(base))
    settings = lora_settings(adapter, plain)
    config = dataclasses.replace(plain, **settings)
    lora = load_lora(adapter, config, abstract_params(config)[0]["lora"])
    checkpoint = save_run(tmp_path / "run", {"lora": lora}, base, lora_alpha=settings["lora_alpha"])
    with pytest.raises(ValueError, match="holds adapters: ask for --merge-lora .* or for --to peft"):
        convert(checkpoint, tmp_path / "out")
    convert(checkpoint, tmp_path / "out", options=Options(merge_lora=True), verify=True)
    convert(str(adapter.folder), tmp_path / "expected", options=Options(merge_lora=True))
    assert_same(tmp_path / "out", tmp_path / "expected")
    convert(checkpoint, tmp_path / "adapter", to="peft", verify=True)
    theirs, ours = (
        load_file(folder / "adapter_model.safetensors") for folder in (adapter.folder, tmp_path / "adapter")
    )
    assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in theirs.items()}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )


# What comes out.


def test_manifest_lists_every_tensor_with_its_hash(tmp_path):
    import hashlib

    convert(str(DATA / "hf_flax" / "llama"), tmp_path / "out", max_shard_bytes=20_000, dtype="bfloat16")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"].endswith("hf_flax/llama (msgpack)") and "jaxrl_version" in manifest
    stored = tensors_of(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert manifest["tensors"] == {
        name: {"shape": list(array.shape), "dtype": "bfloat16", "sha256": hashlib.sha256(array.tobytes()).hexdigest()}
        for name, array in stored.items()
    }


def test_one_tensor_at_a_time_is_read_and_progress_ends_at_the_whole(tmp_path):
    steps = []
    convert(str(DATA / "hf_torch" / "qwen3"), tmp_path / "out", progress=lambda *step: steps.append(step))
    size = sum(array.nbytes for array in load_file(DATA / "hf_torch" / "qwen3" / "model.safetensors").values())
    assert len(steps) == 25 and steps[0][0] == "model.embed_tokens.weight" and steps[-1][0] == "lm_head.weight"
    assert steps[-1][1:] == (size, size)


def test_dry_run_prints_every_name_and_writes_nothing(tmp_path):
    lines = list(name_map(str(DATA / "hf_flax" / "llama"), dtype="bfloat16"))
    assert len(lines) == 21
    q = next(line for line in lines if "layers.1.self_attn.q_proj" in line)
    assert q == (
        "layers.self_attn.q_proj.kernel[1]  <-  model.layers.1.self_attn.q_proj.weight  [32, 32]  float32 -> bfloat16"
        "  in flax_model.msgpack  ((n h) d -> d n h)"
    )
    assert len(list(name_map(str(DATA / "peft_lora" / "dora"), to="peft"))) == 12


def test_command_line_converts_says_so_and_reports_errors_in_one_line(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "convert_checkpoint.py"), *arguments]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)

    done = run(str(DATA / "hf_flax" / "llama"), "out", "--to", "orbax", "--mesh", "1x2x2", "--dtype", "bfloat16")
    assert done.returncode == 0 and done.stdout == "out is complete\n", done.stderr
    assert nothing_but(tmp_path / "out", "config.json", "manifest.json", "params")
    shown = run("out", "--dry-run")
    assert shown.returncode == 0 and len(shown.stdout.splitlines()) == 21
    failed = run(str(DATA / "hf_flax" / "gpt2" / "nothing"), "x")
    assert failed.returncode == 1 and "does not exist" in failed.stderr and "Traceback" not in failed.stderr
    assert run("out").returncode == 2 and nothing_but(tmp_path, "out")
    for option, value, sentence in (
        ("--mesh", "0x1x1", "--mesh '0x1x1' is not data x fsdp x tensor"),
        ("--max-shard-size", "-1", "--max-shard-size -1 must be above 0"),
    ):
        assert run("out", "other", option, value).stderr.startswith(f"error: {sentence}")


# What is wrong.


def llama(tmp_path: Path, change=lambda tensors: None, **settings) -> str:
    """A copy of a llama with its tensors and config changed."""
    shutil.copytree(DATA / "hf_torch" / "llama31", tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "source" / "config.json").write_text(json.dumps(load_hf_config(tmp_path / "source") | settings))
    return str(tmp_path / "source")


def poison(tensors):
    tensors["model.layers.1.mlp.down_proj.weight"][2, 3] = np.nan


@pytest.mark.parametrize(
    "change, settings, message",
    [
        (poison, {}, r"model\.layers\.1\.mlp\.down_proj\.weight holds 1 NaN"),
        (lambda t: t.pop("model.norm.weight"), {}, r"lacks tensor model\.norm\.weight"),
        (lambda t: t.update({"model.extra.weight": np.ones(3)}), {}, r"holds tensor model\.extra\.weight"),
        (lambda t: None, {"num_hidden_layers": 3}, r"lacks tensors model\.layers\.2\.\S+"),
        (
            lambda t: None,
            {"num_hidden_layers": 5000},
            "config.json says 5000 layers, and there are 21 tensors",
        ),
        (lambda t: None, {"num_hidden_layers": 10**12}, "config.json says 1000000000000 layers, and no model has more"),
        (lambda t: None, {"num_hidden_layers": 1}, r"holds tensors model\.layers\.1\.\S+"),
        (lambda t: None, {"num_attention_heads": 8}, r"q_proj\.weight has shape \(32, 32\), expected \(64, 32\)"),
        (lambda t: None, {"num_key_value_heads": 1}, r"k_proj\.weight has shape \(16, 32\), expected \(8, 32\)"),
        (lambda t: None, {"vocab_size": 81}, r"embed_tokens\.weight has shape \(80, 32\), expected \(81, 32\)"),
        (lambda t: None, {"model_type": "llamma"}, r"model_type 'llamma' is not a family that jaxrl knows"),
        (lambda t: None, {"quantization_config": {"quant_method": "awq"}}, "asks for 'awq'"),
        (
            lambda t: None,
            {"architectures": ["LlamaForSequenceClassification"]},
            "has no head under any of the usual names",
        ),
    ],
)
@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_bad_model_is_a_clear_error_and_nothing_is_written(tmp_path, to, change, settings, message):
    source = llama(tmp_path, change, **settings)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", to=to)
    assert nothing_but(tmp_path, "source")


def test_wrong_wishes_are_refused_before_anything_is_read(tmp_path):
    source = str(DATA / "hf_torch" / "qwen3")
    for wish, message in (
        ({"to": "onnx"}, "--to 'onnx' is not one of hf, orbax, peft"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"to": "peft"}, "holds no adapter: --to peft takes a PEFT adapter, or a run"),
        ({"options": Options(merge_lora=True)}, "is no adapter: --merge-lora adds one"),
        ({"options": Options(head="score")}, "has no head under any of the usual names"),
        ({"options": Options(head_path="x")}, r"head\.path is 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "out", **wish)
    with pytest.raises(ValueError, match="is an adapter: ask for --merge-lora .* or for --to peft"):
        convert(str(DATA / "peft_lora" / "lora"), tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(ValueError, match="out exists already"):
        convert(source, tmp_path / "out")


def test_unfinished_or_damaged_orbax_is_refused(tmp_path):
    convert(str(DATA / "hf_torch" / "qwen3"), tmp_path / "orbax", to="orbax")
    marker = tmp_path / "orbax" / "params" / "commit_success.txt"
    marker.rename(tmp_path / "marker")
    with pytest.raises(ValueError, match="is a checkpoint that was not finished"):
        convert(str(tmp_path / "orbax"), tmp_path / "out")
    (tmp_path / "marker").rename(marker)
    (tmp_path / "orbax" / "params" / "state" / "manifest.ocdbt").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be read .*damaged"):
        convert(str(tmp_path / "orbax"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verification_sees_a_wrong_tensor_a_wrong_hash_and_wrong_logits(tmp_path, monkeypatch):
    source = open_source(str(DATA / "hf_torch" / "qwen3"), Options())
    specs = specs_of(source, None)
    convert(source.name, tmp_path / "out")
    verify_tensors(tmp_path / "out", source, specs)
    path = tmp_path / "out" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"lm_head\.weight was written and does not come back as it was"):
        verify_tensors(tmp_path / "out", source, specs)
    path.write_bytes(whole)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["tensors"]["model.norm.weight"]["sha256"] = "0"
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"model\.norm\.weight does not have the hash that manifest\.json says"):
        verify_tensors(tmp_path / "out", source, specs)
    assert verify_logits(tmp_path / "out") < 1e-4
    monkeypatch.setattr(verify, "_TOLERANCE", 1e-12)
    with pytest.raises(ValueError, match="the logits of jaxrl and of transformers differ by"):
        verify_logits(tmp_path / "out")


_WRITER = """
import os, sys
from pathlib import Path
import numpy as np
from jaxrl.weights.safetensors_writer import TensorSpec
from jaxrl.weights.write import write_model

out, number, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
seen = 0

def count(event, arguments):
    global seen
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.call_function"):
        seen += 1
        if seen == last:
            os._exit(9)

sys.addaudithook(count)
specs = [TensorSpec(f"t{i}", (100,), np.dtype(np.float32)) for i in range(4)]
tensors = ((spec.name, np.full(100, number, np.float32)) for spec in specs)
write_model(out, {"n": number}, specs, tensors, source="test", companions=lambda folder: None,
            max_shard_bytes=900, overwrite=True)
"""


def test_writer_that_is_killed_at_any_write_leaves_the_last_good_folder(tmp_path):
    def write(number: int, last: int) -> int:
        command = [sys.executable, "-c", _WRITER, str(tmp_path / "out"), str(number), str(last)]
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode

    assert write(0, -1) == 0
    good, kills = 0, 0
    for last in range(1, 200):
        code = write(last, last)
        assert code in (0, 9)
        config, stored = load_hf_config(tmp_path / "out"), tensors_of(tmp_path / "out")
        assert config["n"] in (good, last)  # what was there, or all of the new one
        assert {number for array in stored.values() for number in array} == {config["n"]} and len(stored) == 4
        good = config["n"]
        kills += code == 9
        if code == 0:
            break
    assert code == 0 and kills > 8 and good == last
