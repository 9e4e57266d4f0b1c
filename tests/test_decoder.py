"""The decoder against what transformers computes from the same checkpoints, and its switches against each other."""

import dataclasses
import math
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.models import decoder
from jaxrl.models.config import ModelConfig, Rope
from jaxrl.models.layers import rope_frequencies
from jaxrl.weights.load import load_hf_config, load_params

DATA = Path(__file__).parent / "data"
FAMILIES = ["llama31", "llama32-tied", "llama-linear-rope", "qwen2", "qwen3"]
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load(folder: str, head: str = "lm", **run):
    config = ModelConfig.from_hf(load_hf_config(DATA / folder), **run)
    params = load_params(DATA / folder, config, decoder.abstract_params(config, head)[0]["params"])
    return config, {"params": params}


hidden_states = jax.jit(decoder.hidden_states, static_argnames=("config", "head"))


@partial(jax.jit, static_argnums=0)
def logits_of(config, variables, tokens, positions, segments):
    hidden = decoder.hidden_states(config, variables, tokens, positions, segments, segments)
    return hidden @ decoder.head_table(config, variables["params"]).T


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Without LLVM's passes, which take half the time of compiling. What XLA does to a program stays."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def whole_rows(ids: np.ndarray):
    """(tokens, positions, segments) of rows that hold one sequence each and nothing else."""
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return jnp.asarray(ids), jnp.asarray(positions), jnp.ones(ids.shape, int)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name):
    config, variables = load(f"hf_torch/{name}")
    expected = np.load(DATA / "hf_torch" / name / "expected_logits.npz")
    got = logits_of(config, variables, *whole_rows(expected["input_ids"]))
    np.testing.assert_allclose(
        got, expected["logits"], atol=2e-5
    )  # float32; measured: at most 1e-5, of logits up to 15
    # Padding on the left, as generation has it; a row's own positions begin where its tokens do.
    mask = expected["padded_attention_mask"]
    got = logits_of(config, variables, expected["padded_input_ids"], expected["padded_position_ids"], mask)
    real = mask > 0
    assert 0 < real.sum() < real.size
    np.testing.assert_allclose(got[real], expected["padded_logits"][real], atol=2e-5)


def test_two_of_the_checkpoints_have_no_two_sizes_alike_so_that_a_wrong_transpose_shows():
    for name in ("llama32-tied", "qwen3"):
        c = ModelConfig.from_hf(load_hf_config(DATA / "hf_torch" / name))
        assert len({c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim}) >= 3
        assert c.hidden_size not in (c.num_heads * c.head_dim, c.intermediate_size)


@pytest.mark.parametrize(
    "name, run",
    [
        ("llama-seqcls-reward", {}),
        ("qwen2-seqcls-3labels", {"num_labels": 3}),
        ("qwen2-tokencls-critic", {"score_bias": True}),
    ],
)
def test_scores_are_those_of_transformers(name, run):
    config, variables = load(f"heads/{name}", "score", **run)
    expected = np.load(DATA / "heads" / name / "expected.npz")
    mask = expected["attention_mask"]  # rows padded on the right and on the left
    hidden = hidden_states(config, variables, expected["input_ids"], expected["position_ids"], mask, mask, head="score")
    got = decoder.score(variables["params"], hidden)
    per_token = expected["token_scores" if "token_scores" in expected else "logits"]
    np.testing.assert_allclose(got[mask > 0], per_token[mask > 0], atol=5e-6)  # measured: 1e-6 of scores up to 4


def test_llama3_rope_keeps_short_waves_stretches_long_ones_and_blends_between():
    # The numbers of Llama 3.1; the formula as Meta published it, by wavelength, in float64.
    rope = Rope(theta=500_000.0, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position=8192)  # fmt: skip
    expected, regimes = [], []
    for i in range(64):
        frequency = 500_000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            regime, value = "short", frequency
        elif wavelength > 8192 / 1:
            regime, value = "long", frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            regime, value = "between", (1 - smooth) * frequency / 8 + smooth * frequency
        expected.append(value)
        regimes.append(regime)
    assert [regimes.count(r) for r in ("short", "between", "long")] == [29, 6, 29]
    np.testing.assert_allclose(rope_frequencies(rope, 128), expected, rtol=5e-6)


def test_linear_rope_divides_every_frequency():
    plain = rope_frequencies(Rope(theta=1e4), 8)
    np.testing.assert_allclose(plain, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    np.testing.assert_allclose(rope_frequencies(Rope(theta=1e4, kind="linear", factor=4.0), 8), plain / 4, rtol=1e-6)


IDS = np.random.default_rng(0).integers(1, 80, (2, 12))
PROBE = np.random.default_rng(1).normal(size=(2, 12, 32)).astype(np.float32)  # weights of the hidden states in a loss


def loss_of(config, trained, frozen=None):
    tokens, positions, segments = whole_rows(IDS)
    hidden = decoder.hidden_states(config, {**(frozen or {}), **trained}, tokens, positions, segments, segments)
    return jnp.sum(hidden.astype(jnp.float32) * PROBE)


gradient = jax.jit(jax.value_and_grad(loss_of, argnums=1), static_argnums=0)


def test_what_remat_throws_away_comes_back_in_the_same_gradient():
    config, variables = load("hf_torch/qwen3")
    kept, gradients = {}, {}
    for remat in ("none", "dots", "full"):
        c = dataclasses.replace(config, remat=remat)
        pullback = jax.eval_shape(lambda v, c=c: jax.vjp(partial(loss_of, c), v)[1], variables)
        kept[remat] = sum(math.prod(x.shape) for x in jax.tree.leaves(pullback))
        gradients[remat] = gradient(c, variables)
    assert kept["full"] < kept["dots"] < kept["none"]
    for remat in ("dots", "full"):
        for a, b in zip(jax.tree.leaves(gradients[remat]), jax.tree.leaves(gradients["none"]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)  # float32 rounding of gradients up to 1e2


def test_bfloat16_compute_leaves_the_weights_and_their_gradient_in_float32():
    config, variables = load("hf_torch/qwen3")
    half = dataclasses.replace(config, compute_dtype="bfloat16")
    tokens, positions, segments = whole_rows(IDS)
    exact, rounded = (
        hidden_states(c, variables, tokens, positions, segments, segments).astype(jnp.float32) for c in (config, half)
    )
    assert hidden_states(half, variables, tokens, positions, segments, segments).dtype == jnp.bfloat16
    gradients = jax.eval_shape(lambda v: gradient(half, v)[1], variables)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradients))
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 2e-2  # two layers of roundings of 2^-8


@cache
def with_adapters():
    """The fixture, and adapters beside it as training begins: A random, B zero."""
    config, variables = load("hf_torch/qwen3")
    config = dataclasses.replace(config, lora_rank=3, lora_alpha=6.0, lora_targets=ALL_LINEAR)
    fresh = jax.jit(decoder.init_params, static_argnums=(0, 1))(config, "lm", jax.random.key(0))
    return config, variables, {"lora": fresh["lora"]}


def random_b(lora):
    """The adapters as they are after training."""
    random = np.random.default_rng(2)
    return jax.tree.map_with_path(
        lambda path, x: random.normal(scale=0.1, size=x.shape).astype(np.float32) if path[-1].key == "b" else x, lora
    )


def test_fresh_adapters_are_those_of_peft():
    config, _, lora = with_adapters()
    D, F, NH = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    for block, names in lora["lora"]["layers"].items():
        for name, ab in names.items():
            fan_in = {"o_proj": NH, "down_proj": F}.get(name, D)
            largest = abs(ab["a"]).max() * math.sqrt(fan_in)  # torch's kaiming_uniform_(a=sqrt(5)): 1 / sqrt(fan in)
            assert 0.9 < largest <= 1.0 and not ab["b"].any(), (block, name)


def test_adapters_at_zero_are_the_base_and_without_them_the_same_call_is():
    config, base, lora = with_adapters()
    tokens, positions, segments = whole_rows(IDS)
    expected = hidden_states(dataclasses.replace(config, lora_rank=0), base, tokens, positions, segments, segments)
    for variables in ({**base, **lora}, base):
        got = hidden_states(config, variables, tokens, positions, segments, segments)
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_gradient_of_adapters_reaches_every_b_and_at_zero_b_no_a():
    config, base, lora = with_adapters()
    _, at_zero = gradient(config, lora, base)
    _, later = gradient(config, random_b(lora), base)
    assert at_zero.keys() == {"lora"}
    names = {path[-2].key for path, _ in jax.tree.leaves_with_path(at_zero)}
    assert names == set(ALL_LINEAR)
    for (path, g), g_later in zip(jax.tree.leaves_with_path(at_zero), jax.tree.leaves(later), strict=True):
        for layer in range(config.num_layers):
            assert g[layer].any() == (path[-1].key == "b"), path
            assert g_later[layer].any(), path


def test_trained_adapters_equal_weights_with_their_product_added():
    config, base, lora = with_adapters()
    lora = random_b(lora)
    params = jax.tree.map(lambda x: x, base["params"])
    for block, names in lora["lora"]["layers"].items():
        for name, ab in names.items():
            product = jax.vmap(lambda a, b: jnp.tensordot(a, b, axes=1))(ab["a"], ab["b"])
            kernel = params["layers"][block][name]["kernel"]
            params["layers"][block][name]["kernel"] = kernel + 6.0 / 3 * product  # lora_alpha / lora_rank
    tokens, positions, segments = whole_rows(IDS)
    merged = hidden_states(config, {"params": params}, tokens, positions, segments, segments)
    got = hidden_states(config, {**base, **lora}, tokens, positions, segments, segments)
    np.testing.assert_allclose(got, merged, atol=2e-5)
    unchanged = hidden_states(config, base, tokens, positions, segments, segments)
    assert abs(np.asarray(merged) - unchanged).max() > 0.1


def test_only_the_named_layers_get_adapters():
    config, _, _ = with_adapters()
    config = dataclasses.replace(config, lora_targets=("q_proj", "down_proj"))
    lora = decoder.abstract_params(config)[0]["lora"]["layers"]
    assert {block: set(names) for block, names in lora.items()} == {"self_attn": {"q_proj"}, "mlp": {"down_proj"}}
    assert lora["self_attn"]["q_proj"]["a"].shape == (2, 32, 3)
    assert lora["self_attn"]["q_proj"]["b"].shape == (2, 3, 4, 16)


def test_both_spellings_of_the_rope_settings_mean_the_same():
    new = load_hf_config(DATA / "hf_torch" / "llama31")
    scaling = dict(new["rope_parameters"])
    theta = scaling.pop("rope_theta")
    old = {**new, "rope_parameters": None, "rope_scaling": scaling, "rope_theta": theta}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not a family that jaxrl knows"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
    ],
)
def test_an_architecture_that_would_be_computed_wrongly_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(load_hf_config(DATA / "hf_torch" / "qwen2") | change)
