"""QLoRA: the base stays in 4 bits on the device, and computes what its numbers compute; adapters alone are trained."""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from letters import add_tokenizer, metrics_of, settings
from safetensors.numpy import load_file, save_file

from jaxrl.batch import Prompt
from jaxrl.config import from_dict
from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import abstract_params, head_table, hidden_states
from jaxrl.models.nf4 import dequantize
from jaxrl.parallel import make_mesh, use_mesh, with_shardings
from jaxrl.rollout.engine import Sampling
from jaxrl.rollout.jax_engine import JaxEngine
from jaxrl.trainer import Trainer
from jaxrl.weights.bnb import dequantized, dequantized_config, packed_tensors
from jaxrl.weights.export import hf_tensors
from jaxrl.weights.folder import load_hf_config
from jaxrl.weights.formats import open_checkpoint
from jaxrl.weights.hf_names import flatten
from jaxrl.weights.load import load_params
from jaxrl.weights.packed import _part, load_packed, packed_kernels
from jaxrl.weights.peft import open_adapter
from jaxrl.weights.stored import Checkpoint

DATA = Path(__file__).parent / "data" / "bnb_nf4"  # one layer; D 64, F 320, N 4, K 2, H 16, V 64
FOLDERS = ["llama-nf4-double", "llama-nf4-single", "llama-fp4-double"]
TARGETS = ("q_proj", "down_proj")


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory) -> Path:
    """The NF4 fixture with a second layer: the first one's, some of its matrices turned about."""
    folder = tmp_path_factory.mktemp("two-layers")
    tensors = load_file(DATA / "llama-nf4-double" / "model.safetensors")
    for name in [name for name in tensors if ".layers.0." in name]:
        second = tensors[name]
        tensors[name.replace(".0.", ".1.")] = second[::-1].copy() if second.ndim == 2 else second
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    hf_config = load_hf_config(DATA / "llama-nf4-double") | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(hf_config))
    return folder


def load(folder: Path, mesh=(1, 1, 1), **run) -> tuple[ModelConfig, dict, Checkpoint]:
    """The model with its base packed; and the checkpoint, which counts what was read."""
    checkpoint = open_checkpoint(folder)
    config = ModelConfig.from_hf(dequantized_config(load_hf_config(folder)), **run)
    config = ModelConfig.from_hf(
        dequantized_config(load_hf_config(folder)), packed=packed_kernels(checkpoint, config), **run
    )
    shapes, axes = abstract_params(config)
    wanted = {name: with_shardings(make_mesh(*mesh), shapes[name], axes[name]) for name in shapes}
    variables = {"params": load_params(checkpoint, config, wanted["params"])}
    checkpoint.bytes_read = 0
    return config, variables | {"packed": load_packed(checkpoint, config, wanted["packed"])}, checkpoint


def logits_of(config: ModelConfig, variables, tokens):
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    with jax.default_matmul_precision("highest"):
        hidden = hidden_states(config, variables, tokens, positions, jnp.ones_like(tokens), 0 * tokens)
        return hidden @ head_table(config, variables["params"]).T


@pytest.mark.parametrize("name", FOLDERS)
def test_numbers_on_the_device_equal_those_of_bitsandbytes_bit_for_bit(name):
    config, variables, _ = load(DATA / name)
    expected = load_file(DATA / name / "expected_dequant.safetensors")
    assert config.packed is not None and config.packed.is_double == ("double" in name) and len(expected) == 7
    for hf_name, numbers in expected.items():
        *_, block, module, _ = hf_name.split(".")
        parts = jax.tree.map(lambda x: x[0], variables["packed"]["layers"][block][module])
        ours = jax.jit(lambda parts, shape=numbers.shape: dequantize(parts, config.packed, shape, (None, None)))(parts)
        assert ours.dtype == ml_dtypes.bfloat16 and np.asarray(ours).tobytes() == numbers.tobytes(), hf_name
    exported = dict(hf_tensors(variables["params"], config, packed=variables["packed"]))
    for hf_name, numbers in expected.items():
        assert exported[hf_name].tobytes() == numbers.tobytes(), hf_name


@pytest.mark.parametrize("name", FOLDERS)
def test_packed_forward_is_the_dequantised_one_and_has_the_recorded_logits(name):
    config, variables, _ = load(DATA / name)
    expected = np.load(DATA / name / "expected_logits.npz")
    logits = logits_of(config, variables, expected["input_ids"])
    np.testing.assert_allclose(logits, expected["logits_dequant_f32"], atol=2e-4)  # float32, another order of sums
    plain = ModelConfig.from_hf(dequantized_config(load_hf_config(DATA / name)))
    params = load_params(DATA / name, plain, abstract_params(plain)[0]["params"], dequantize=True)
    np.testing.assert_allclose(logits, logits_of(plain, {"params": params}, expected["input_ids"]), atol=1e-6)


def test_a_host_reads_only_the_rows_of_its_own_devices(two_layers):
    """One device of eight, as a host of eight would see it."""
    config, _, checkpoint = load(two_layers)
    stored = packed_tensors(checkpoint)["model.layers.0.mlp.up_proj.weight"]
    checkpoint.bytes_read = 0
    codes = _part(stored, "codes", (320, 32), np.s_[40:80, 0:32])
    scales = _part(stored, "absmax", (320, 1), np.s_[40:80, 0:1])
    assert checkpoint.bytes_read == 320 * 64 // 8 // 2 + 320 // 8
    np.testing.assert_array_equal(codes.reshape(-1), stored.read_codes()[40 * 32 : 80 * 32])
    np.testing.assert_array_equal(scales.reshape(-1), stored.read_absmax()[40:80])


def test_scale_that_is_no_number_is_refused(tmp_path):
    shutil.copytree(DATA / "llama-nf4-single", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight.absmax"][3] = np.nan
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="scales of a 4-bit matrix hold NaN or infinity"):
        load(tmp_path / "model")


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2)])
def test_rows_of_codes_are_split_over_the_mesh_and_the_logits_are_those_of_one_device(two_layers, mesh):
    tokens = np.load(DATA / "llama-nf4-double" / "expected_logits.npz")["input_ids"]
    config, variables, _ = load(two_layers)
    one = logits_of(config, variables, tokens)
    config, variables, checkpoint = load(two_layers, mesh)
    codes = variables["packed"]["layers"]["mlp"]["up_proj"]["codes"]
    ways = mesh[1] * mesh[2]
    assert codes.shape == (2, 320, 32) and codes.sharding.shard_shape(codes.shape) == (2, 320 // ways, 32)
    stored = load_file(two_layers / "model.safetensors").items()
    assert checkpoint.bytes_read == sum(x.nbytes for name, x in stored if ".weight." in name or x.dtype == np.uint8)
    with use_mesh(make_mesh(*mesh)):
        np.testing.assert_allclose(jax.jit(logits_of, static_argnums=0)(config, variables, tokens), one, atol=1e-5)


def test_packed_base_takes_a_quarter_of_the_bytes_of_bfloat16(two_layers):
    """Four bits and the scales: 8 bits a block of 64, a float32 a block of blocks, and a kilobyte of tables a kernel."""
    config, variables, _ = load(two_layers)
    sizes = {part: sum(x.nbytes for x in jax.tree.leaves(variables[part])) for part in ("params", "packed")}
    numbers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 320 * 64)
    assert config.packed is not None and len(config.packed.modules) == 7
    tables = 14 * 4 * (16 + 256 + 1) + 2 * 4 * (3 * 2 + 4)  # and the scales of scales
    assert sizes["packed"] == numbers // 2 + numbers // 64 + tables
    assert sizes["packed"] - tables < 0.26 * 2 * numbers
    assert not any("kernel" in path and "lm_head" not in path for path, _ in flatten(variables["params"]))


def test_no_more_than_one_kernel_is_ever_numbers_not_even_for_the_gradient(two_layers):
    config, variables, _ = load(two_layers, lora_rank=2, lora_targets=TARGETS)
    lora = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), abstract_params(config)[0]["lora"])
    tokens = jnp.ones((1, 3), jnp.int32)

    def loss(lora):
        return hidden_states(config, variables | {"lora": lora}, tokens, tokens, tokens, tokens).sum()

    gradient = jax.grad(loss)
    shapes = {shape for eqn in equations(jax.make_jaxpr(gradient)(lora).jaxpr) for shape in float_shapes(eqn)}
    assert (64, 320) in shapes or (320, 64) in shapes  # one kernel
    assert not [shape for shape in shapes if len(shape) == 3 and shape[0] == 2 and math.prod(shape) >= 2 * 64 * 320]
    grads = jax.jit(gradient)(lora)
    assert jax.tree.structure(grads) == jax.tree.structure(lora)
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(grads))


def equations(jaxpr):
    """Those of a program and of all programs within it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                yield from equations(getattr(value, "jaxpr", value))


def float_shapes(eqn):
    return [v.aval.shape for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating)]


def test_gradient_of_adapters_on_the_packed_base_is_that_on_its_numbers(two_layers):
    run = {"lora_rank": 2, "lora_targets": TARGETS}
    config, variables, _ = load(two_layers, **run)
    plain = ModelConfig.from_hf(dequantized_config(load_hf_config(two_layers)), **run)
    params = load_params(two_layers, plain, abstract_params(plain)[0]["params"], dequantize=True)
    rng = np.random.default_rng(0)
    lora = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), abstract_params(config)[0]["lora"])
    tokens = rng.integers(0, 64, (2, 5))

    def gradient(config, variables):
        return jax.jit(jax.grad(lambda lora: (logits_of(config, variables | {"lora": lora}, tokens) ** 2).mean()))(lora)

    ours, theirs = gradient(config, variables), gradient(plain, {"params": params})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


def test_kernel_that_is_packed_in_some_layers_alone_becomes_numbers_and_the_log_says_so(two_layers, tmp_path, caplog):
    tensors = load_file(two_layers / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    numbers = dequantized(open_checkpoint(two_layers)).read(name)
    tensors = {key: x for key, x in tensors.items() if not key.startswith(name)} | {name: numbers}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(two_layers / "config.json", tmp_path)
    config, variables, _ = load(tmp_path)
    assert config.packed is not None and "up_proj" not in config.packed.modules and len(config.packed.modules) == 6
    assert "layers.mlp.up_proj.kernel cannot stay in 4 bits" in caplog.text
    same, expected, _ = load(two_layers)
    tokens = np.arange(6).reshape(1, 6)
    np.testing.assert_allclose(logits_of(config, variables, tokens), logits_of(same, expected, tokens), atol=1e-6)


@pytest.fixture(scope="module")
def run(two_layers, tmp_path_factory) -> Path:
    """A run of GRPO with a KL term that trains adapters on the packed base."""
    folder = tmp_path_factory.mktemp("qlora") / "run"
    add_tokenizer(two_layers)
    model = {"path": str(two_layers), "compute_dtype": "float32", "lora_rank": 4, "lora_alpha": 8.0}
    tree = settings(folder, model=model, trainer={
        "experiment_name": "qlora", "run_dir": str(folder), "row_length": 32, "total_training_steps": 12,
    })  # fmt: skip
    tree["actor"] |= {"use_kl_loss": True, "optim": {"lr": 2e-2}}
    Trainer(from_dict(tree)).fit()
    return folder


def test_policy_on_a_packed_base_learns_and_its_engine_and_reference_are_that_base(run):
    rows = metrics_of(run)
    rewards = [row["critic/score/mean"] for row in rows]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.2, rewards
    assert all(row["training/rollout_probs_diff_max"] < 1e-4 for row in rows)  # the engine unpacks the same numbers
    assert rows[0]["actor/kl_loss"] < rows[-1]["actor/kl_loss"]  # the reference has no adapters
    assert rows[-1]["perf/recompiles"] == 0


def test_run_on_a_packed_base_leaves_a_merged_model_in_numbers_and_its_adapter(run, two_layers):
    base, merged = (dict(dequantized(open_checkpoint(folder)).tensors) for folder in (two_layers, run / "hf"))
    assert "quantization_config" not in load_hf_config(run / "hf") and base.keys() == merged.keys()
    adapter = open_adapter(run / "adapter")
    assert adapter.config.base == str(two_layers.resolve()) and len(adapter.modules) == 14
    for module, lora in adapter.modules.items():
        a, b = (adapter.checkpoint.read(name) for name in (lora.a, lora.b))
        weight = base[f"{module}.weight"]
        expected = weight.read(weight.whole).astype(np.float32) + np.float32(2.0) * (b @ a)
        stored = merged[f"{module}.weight"]
        assert stored.dtype == ml_dtypes.bfloat16
        # Two bfloat16 numbers apart: a sum in another order may fall on the other side of a half.
        np.testing.assert_allclose(stored.read(stored.whole).astype(np.float32), expected, rtol=2**-7, atol=1e-5)


def test_weights_in_four_bits_without_adapters_are_refused_with_the_fix(two_layers, tmp_path):
    tree = settings(tmp_path / "run", model={"path": str(two_layers)})
    with pytest.raises(ValueError, match=r"holds weights in 4 bits.*set model\.lora_rank.*--dequantize"):
        Trainer(from_dict(tree))
    assert not (tmp_path / "run").exists()


def test_engine_on_a_mesh_generates_from_the_packed_base_what_one_device_generates(two_layers):
    prompts = [Prompt([3, 4, 5], "", "test", None, {}, None, 0), Prompt([6, 7], "", "test", None, {}, None, 1)]
    answers = []
    for mesh in ((1, 1, 1), (1, 1, 2)):
        config, variables, _ = load(two_layers, mesh)
        engine = JaxEngine(config, make_mesh(*mesh), max_num_seqs=2)
        engine.update_weights(variables, 0)
        packed = engine.weights["layers"][1]["packed"]["mlp"]["up_proj"]["codes"]
        assert packed.dtype == np.uint8 and packed.sharding.shard_shape(packed.shape) == (320 // mesh[2], 32)
        answers.append(engine.generate(prompts, Sampling(max_tokens=4, temperature=0.0), seed=0))
    for one, other in zip(*answers, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
