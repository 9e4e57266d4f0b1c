"""Every kind of attention, position and MLP that the families have, end to end: engine, trainer, packing, mesh, LoRA."""

import dataclasses
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.batch import PolicyTargets, Prompt, Rollout
from jaxrl.models import decoder
from jaxrl.models.config import ModelConfig
from jaxrl.optimizer import abstract_state, make_optimizer
from jaxrl.packing import Sequences, pack
from jaxrl.parallel import make_mesh, num_row_shards, with_shardings
from jaxrl.rollout.engine import Sampling
from jaxrl.rollout.jax_engine import JaxEngine
from jaxrl.update import Compression, Policy, PolicyLoss, TrainState
from jaxrl.weights.export import hf_tensors
from jaxrl.weights.load import load_hf_config, load_params
from jaxrl.weights.stored import Checkpoint, StoredTensor

DATA = Path(__file__).parent / "data"
KINDS = {
    "hf_torch/gemma2": "windows in every second layer, two softcaps",
    "hf_torch/gemma3": "two ropes, by kind of layer",
    "hf_torch/glm4": "neighbouring features of half a head turn",
    "hf_torch/gpt-oss": "sinks, experts with biases",
    "hf_torch/granite": "scales of embeddings, residuals and logits",
    "hf_torch/phi": "attention and MLP side by side, a bias of the head",
    "hf_torch/qwen3-moe": "experts, and one layer without",
    "hf_torch/smollm3": "layers without positions",
    "hf_flax/bloom": "ALiBi",
    "hf_flax/opt-350m-style": "learned positions, norms after the sum, a narrow token table",
}


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Without LLVM's passes, which take half the time of compiling. What XLA does to a program stays."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def load(folder: str, mesh=None, **run):
    config = ModelConfig.from_hf(load_hf_config(DATA / folder), **run)
    abstract, axes = decoder.abstract_params(config)
    wanted = with_shardings(mesh or make_mesh(1, 1, 1), abstract["params"], axes["params"])
    return config, {"params": load_params(DATA / folder, config, wanted)}


def prompt_of(token_ids, index=0) -> Prompt:
    return Prompt(list(token_ids), "", "", None, {}, None, index)


@partial(jax.jit, static_argnums=0)
def all_logits(config, variables, text):
    """[T, V] what the model says after each token of one text."""
    ones, positions = jnp.ones_like(text)[None], jnp.arange(len(text))[None]
    hidden = decoder.hidden_states(config, variables, text[None], positions, ones, ones)
    return decoder.logits(config, variables["params"], hidden)[0]


@pytest.mark.parametrize("folder", KINDS)
def test_the_engine_says_what_a_forward_pass_says_and_its_logprobs_are_the_trainers(folder):
    config, variables = load(folder)
    random = np.random.default_rng(0)
    prompts = [prompt_of(random.integers(3, 80, length).tolist(), i) for i, length in enumerate((9, 5))]
    engine = JaxEngine(config)
    engine.update_weights(variables, 0)

    likeliest = engine.generate(prompts, Sampling(12, n=2, temperature=0.7, top_k=1), seed=0)
    for rollout in likeliest[::2]:
        prompt = prompts[rollout.group].token_ids
        text = np.zeros(32, np.int32)  # no token sees what comes after it
        text[: len(prompt) + 12] = [*prompt, *rollout.token_ids]
        said = np.asarray(all_logits(config, variables, text))[len(prompt) - 1 : len(prompt) + 11]
        np.testing.assert_array_equal(rollout.token_ids, said.argmax(axis=-1))

    # The trainer packs the sequences into rows, each prompt once for its responses.
    sampled = engine.generate(prompts, Sampling(12, n=2, temperature=0.7), seed=1)
    sequences = Sequences.of(prompts, sampled, 12)
    layout = pack(sequences, range(4), row_length=40, rows_per_micro_batch=2, max_micro_batches=1)
    assert (layout.rows.segments != layout.rows.prefixes).any()
    policy = Policy(make_mesh(1, 1, 1), config, None, PolicyLoss(temperature=0.7))
    trainers = policy.logprobs(variables, layout).logprobs
    np.testing.assert_allclose(trainers, [rollout.logprobs for rollout in sampled], atol=3e-5)


@cache
def batch() -> Sequences:
    """Eight responses to four prompts, longer than the fixtures' windows."""
    random = np.random.default_rng(3)
    draw = lambda low, high: random.integers(3, 80, random.integers(low, high)).astype(np.int32)  # noqa: E731
    prompts = [prompt_of(draw(5, 10).tolist(), i) for i in range(4)]
    rollouts = [Rollout(b // 2, tokens := draw(4, 9), np.zeros(len(tokens), np.float32), True, 0) for b in range(8)]
    return Sequences.of(prompts, rollouts, 8)


@pytest.mark.parametrize("folder", ["hf_torch/mistral-swa", "hf_torch/gemma3", "hf_flax/bloom"])
def test_prompts_that_are_shared_in_a_row_change_no_logprob_of_windows_and_alibi(folder):
    config, variables = load(folder)
    policy = Policy(make_mesh(1, 1, 1), config, None, PolicyLoss())
    rows = {"row_length": 32, "rows_per_micro_batch": 8, "max_micro_batches": 1}
    shared = pack(batch(), range(8), **rows)
    assert (shared.rows.segments != shared.rows.prefixes).any()
    packed = policy.logprobs(variables, shared).logprobs
    for b in range(8):  # alone in a row, as padded batches are
        alone = policy.logprobs(variables, pack(batch(), [b], **rows)).logprobs
        length = batch().lengths[b]
        np.testing.assert_allclose(packed[b, :length], alone[b, :length], atol=1e-5)
        assert (alone[b, :length] < -0.01).any()


def gradients_on(shape, folder, compression="none"):
    """Loss and gradient of a step on a mesh (the first moment of Adam is a tenth of the gradient), on the host."""
    mesh = make_mesh(*shape)
    config, variables = load(folder, mesh)
    optimizer = make_optimizer(clip_grad=None, weight_decay=0.0)
    policy = Policy(mesh, config, optimizer, PolicyLoss(entropy_coeff=0.01), Compression(compression))
    ways = num_row_shards(mesh)
    layout = pack(batch(), range(8), row_length=32, rows_per_micro_batch=4, max_micro_batches=1, ways=ways)
    random, mask = np.random.default_rng(5), batch().mask.astype(np.float32)
    noise = [random.normal(size=mask.shape).astype(np.float32) for _ in range(2)]
    weights = mask / mask.sum()
    targets = PolicyTargets(*map(layout.to_slots, (noise[0] - 4, noise[1], 0 * mask, 1 + 0 * mask, weights, weights)))
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(optimizer, variables))
    state = TrainState(variables, jax.jit(optimizer.init, out_shardings=shardings)(variables))
    splits = {
        jax.tree_util.keystr(path): leaf.sharding.spec for path, leaf in jax.tree.leaves_with_path(variables["params"])
    }
    state, metrics = policy.step(state, {}, layout, targets, 1e-3)
    return jax.device_get((metrics["losses"], state.opt_state.mu)), splits


@pytest.mark.parametrize(
    "folder, compression", [("hf_torch/mixtral", "none"), ("hf_torch/mixtral", "fp32"), ("hf_torch/phi3", "none")]
)
def test_a_step_of_experts_and_of_fused_tensors_on_a_mesh_is_that_of_one_device(folder, compression):
    """With gradients that travel once, each replica's by itself (`grad_compression: fp32`), too."""
    (losses, expected), _ = gradients_on((1, 1, 1), folder)
    (on_mesh, got), splits = gradients_on((2, 2, 2), folder, compression)
    for name, loss in losses.items():
        np.testing.assert_allclose(on_mesh[name], loss, rtol=1e-5, err_msg=name)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6, err_msg=jax.tree_util.keystr(path))
    if folder.endswith("mixtral"):  # a device has half of the experts, and half of each of them over fsdp
        assert splits["['layers']['mlp']['expert_up']['kernel']"][1:3] == ("tensor", "fsdp")


@pytest.mark.parametrize("folder", ["hf_torch/phi3", "hf_torch/qwen3-moe", "hf_flax/gpt2"])
def test_adapters_sit_on_every_dense_layer_and_their_merged_export_computes_what_they_do(folder):
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    config, base = load(folder, lora_rank=3, lora_alpha=6.0, lora_targets=targets)
    random = np.random.default_rng(2)
    abstract = decoder.abstract_params(config)[0]["lora"]
    lora = jax.tree.map(lambda x: (0.2 * random.normal(size=x.shape)).astype(np.float32), abstract)
    adapted = {path[-2].key for path, _ in jax.tree.leaves_with_path(lora)}
    assert adapted == set(targets) - (set() if config.gated else {"gate_proj"})
    text = random.integers(3, 80, 16)
    with_adapters = all_logits(config, {**base, "lora": lora}, text)

    merged = {name: StoredTensor.of(tensor, "") for name, tensor in hf_tensors(base["params"], config, lora=lora)}
    plain = dataclasses.replace(config, lora_rank=0, lora_targets=())
    wanted = decoder.abstract_params(plain)[0]["params"]
    params = load_params(Checkpoint(DATA / folder, merged, kind="safetensors"), plain, wanted)
    got = all_logits(plain, {"params": params}, text)
    assert abs(np.asarray(with_adapters) - all_logits(plain, base, text)).max() > 0.1
    np.testing.assert_allclose(got, with_adapters, atol=5e-5)  # float32, of logits up to 20
