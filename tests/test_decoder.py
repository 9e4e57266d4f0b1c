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
from jaxrl.models.rope import rope_cossin, rope_frequencies
from jaxrl.weights.load import load_hf_config, load_params

DATA = Path(__file__).parent / "data"
TORCH = sorted(path.name for path in (DATA / "hf_torch").iterdir())
FLAX = ["llama", "mistral", "gemma", "gpt2", "opt", "opt-350m-style", "gptj", "gpt_neo", "bloom"]
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load(folder: str, head: str = "lm", **run):
    config = ModelConfig.from_hf(load_hf_config(DATA / folder), **run)
    params = load_params(DATA / folder, config, decoder.abstract_params(config, head)[0]["params"])
    return config, {"params": params}


hidden_states = jax.jit(decoder.hidden_states, static_argnames=("config", "head"))


@partial(jax.jit, static_argnums=0)
def logits_of(config, variables, tokens, positions, segments):
    hidden = decoder.hidden_states(config, variables, tokens, positions, segments, segments)
    return decoder.logits(config, variables["params"], hidden)


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


@pytest.mark.parametrize("folder", [f"hf_torch/{name}" for name in TORCH] + [f"hf_flax/{name}" for name in FLAX])
def test_logits_are_those_of_transformers(folder):
    expected = np.load(DATA / folder / "expected_logits.npz")
    ids, of_torch = expected["input_ids"], "_torch" if folder.startswith("hf_flax") else ""
    # transformers chooses the frequencies of some ropes by the longest sequence of the batch.
    config, variables = load(folder, max_length=ids.shape[1])
    got = logits_of(config, variables, *whole_rows(ids))
    np.testing.assert_allclose(
        got, expected[f"logits{of_torch}"], atol=5e-5
    )  # float32; measured: at most 2.3e-5, of logits up to 15
    # Padding on the left, as generation has it; a row's own positions begin where its tokens do.
    mask = expected["padded_attention_mask"]
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    got = logits_of(config, variables, expected["padded_input_ids"], positions, mask)
    real = mask > 0
    assert 0 < real.sum() < real.size
    np.testing.assert_allclose(got[real], expected[f"padded_logits{of_torch}"][real], atol=5e-5)


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
        ("gemma2-seqcls-reward", {}),
        ("phi3-seqcls-reward", {}),
        ("gpt2-seqcls-reward", {}),
    ],
)
def test_scores_are_those_of_transformers(name, run):
    config, variables = load(f"heads/{name}", "score", **run)
    expected = np.load(DATA / "heads" / name / "expected.npz")
    mask = expected["attention_mask"]  # rows padded on the right and on the left
    hidden = hidden_states(config, variables, expected["input_ids"], expected["position_ids"], mask, mask, head="score")
    got = decoder.score(config, variables["params"], hidden)
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
        ({"model_type": "mamba"}, "model_type 'mamba' is not a family that jaxrl knows .*bloom.*qwen3_moe"),
        ({"rope_parameters": {"rope_type": "proportional", "factor": 4.0}}, "rope type 'proportional'"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "longrope needs 4 of each"),
        (
            {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"]},
            "kind of 1 layers, and there are 2",
        ),
        ({"hidden_act": "selu"}, "hidden_act 'selu'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config"),
    ],
)
def test_an_architecture_that_would_be_computed_wrongly_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(load_hf_config(DATA / "hf_torch" / "qwen2") | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": None}, "vocab_size is None, and it must be a whole number above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_hidden_layers": 2.0}, r"num_hidden_layers is 2\.0"),
        ({"num_key_value_heads": -1}, "num_key_value_heads is -1"),
        ({"rope_parameters": "linear"}, "the rope is 'linear', and it must be an object such as"),
        ({"rope_parameters": None, "rope_scaling": ["linear"]}, r"the rope is \['linear'\]"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "config.json describes no qwen2"),
        ({"rope_parameters": {"rope_type": "linear", "factor": [2]}}, "config.json describes no qwen2"),
    ],
)
def test_a_config_that_describes_no_model_is_refused_in_one_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(load_hf_config(DATA / "hf_torch" / "qwen2") | change)


def test_bloom_says_its_width_under_either_key():
    new = load_hf_config(DATA / "hf_flax" / "bloom")
    old = {key: value for key, value in new.items() if key != "hidden_size"} | {"n_embed": new["hidden_size"]}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)


def test_adapters_that_would_sit_on_nothing_are_refused_by_name():
    for name, targets in (("mixtral", ("up_proj", "gate_proj")), ("starcoder2", ("gate_proj",))):
        hf_config = load_hf_config(DATA / "hf_torch" / name)
        with pytest.raises(
            ValueError, match="lora_targets .* are no matrices that adapters can sit on in family .*q_proj"
        ):
            ModelConfig.from_hf(hf_config, lora_rank=2, lora_targets=targets)
        ModelConfig.from_hf(hf_config, lora_rank=2, lora_targets=(*targets, "q_proj"))


def test_null_is_without_and_a_key_that_is_left_out_is_the_default_of_its_class():
    def read(name, drop=(), **change):
        given = load_hf_config(DATA / "hf_torch" / name) | change
        return ModelConfig.from_hf({key: value for key, value in given.items() if key not in drop})

    assert read("mistral-swa", sliding_window=None).window == 0  # Mistral 7B v0.2 and later
    assert read("mistral-swa", drop=["sliding_window"]).window == 4096
    without = read("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (without.attention_softcap, without.logit_softcap) == (0.0, 0.0)
    default = read("gemma2", drop=["attn_logit_softcapping", "final_logit_softcapping"])
    assert (default.attention_softcap, default.logit_softcap) == (50.0, 30.0)
    assert read("granite", drop=["attention_multiplier"]).attention_scale == 1.0
    assert read("gemma2", drop=["tie_word_embeddings"]).tie_embeddings
    assert not read("phi3", drop=["tie_word_embeddings"]).tie_embeddings


def test_files_of_transformers_4_mean_what_those_of_transformers_5_say():
    def same(name, drop, **old):
        new = load_hf_config(DATA / "hf_torch" / name)
        written = {key: value for key, value in new.items() if key not in drop} | old
        assert ModelConfig.from_hf(written) == ModelConfig.from_hf(new), name

    same("gemma2", ["rope_parameters", "layer_types"], rope_theta=10_000.0)
    # Two ropes, by kind of layer; one layer of six sees everything, of three none would.
    scaling = {"rope_type": "linear", "factor": 8.0}
    same("gemma3", ["rope_parameters"], rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=scaling)
    yarn = load_hf_config(DATA / "hf_torch" / "olmo3")["rope_parameters"]["full_attention"]
    same(
        "olmo3", ["rope_parameters"], rope_theta=5e5, rope_scaling={k: v for k, v in yarn.items() if k != "rope_theta"}
    )
    same("qwen2-swa", ["rope_parameters", "layer_types"], rope_theta=1e4)
    same("qwen3-moe", ["num_local_experts"], num_experts=4)
    same("smollm3", ["no_rope_layers"])
    same("phi", ["rope_parameters"], partial_rotary_factor=0.5)
    same("gpt-neox", ["rope_parameters"], rotary_pct=0.25, rotary_emb_base=10_000)
    longrope = dict(load_hf_config(DATA / "hf_torch" / "phi3-longrope-partial")["rope_parameters"])
    early = {"type": "su", "short_factor": longrope["short_factor"], "long_factor": longrope["long_factor"]}
    same("phi3-longrope-partial", ["rope_parameters"], rope_scaling=early)


def test_layers_that_are_alike_are_one_scan_without_inputs_and_others_take_only_what_differs():
    def differing(name):
        config = ModelConfig.from_hf(load_hf_config(DATA / "hf_torch" / name))
        (run,) = config.runs
        ropes = list(dict.fromkeys(config.rope_of(layer) for layer in run.layers))
        return {key: x.tolist() for key, x in decoder._differing(config, run, ropes).items()}

    everything = decoder.ALL
    assert differing("qwen3") == differing("llama31") == differing("mistral-swa") == {}
    assert differing("qwen2-swa") == {"window": [everything, 4, 4]}
    assert differing("gemma3") == {"window": [4, everything, 4], "rope": [0, 1, 0]}
    assert differing("smollm3") == {"rope": [0, 1, 0, 1]}


def test_layers_of_another_structure_are_a_run_of_their_own():
    config, variables = load("hf_torch/qwen3-moe")
    assert [(run.name, run.layers, run.is_sparse) for run in config.runs] == [
        ("layers_0", range(0, 1), True), ("layers_1", range(1, 2), False), ("layers_2", range(2, 3), True),
    ]  # fmt: skip
    assert variables["params"]["layers_2"]["mlp"]["expert_up"]["kernel"].shape == (1, 4, 32, 16)
    assert variables["params"]["layers_1"]["mlp"]["up_proj"]["kernel"].shape == (1, 32, 40)


def test_a_run_chooses_the_frequencies_of_dynamic_and_longrope_by_its_longest_sequence():
    dynamic = Rope(kind="dynamic", factor=2.0, original_max_position=8)
    np.testing.assert_array_equal(rope_frequencies(dynamic, 8, 8), rope_frequencies(Rope(), 8))
    theta = 10_000.0 * (2.0 * 14 / 8 - 1) ** (8 / 6)
    np.testing.assert_allclose(rope_frequencies(dynamic, 8, 14), rope_frequencies(Rope(theta=theta), 8), rtol=1e-6)
    long = Rope(kind="longrope", original_max_position=8, short_factors=(1.0, 2.0), long_factors=(4.0, 5.0))
    plain = rope_frequencies(Rope(), 4)
    np.testing.assert_allclose(rope_frequencies(long, 4, 8), plain / np.array([1.0, 2.0]), rtol=1e-6)
    np.testing.assert_allclose(rope_frequencies(long, 4, 9), plain / np.array([4.0, 5.0]), rtol=1e-6)


def test_yarn_keeps_short_waves_stretches_long_ones_and_sharpens_attention():
    # Qwen2.5: 32k stretched by four. The numbers of the paper, in float64.
    config = ModelConfig.from_hf(load_hf_config(DATA / "hf_torch" / "qwen2-yarn"))
    rope = dataclasses.replace(config.rope, original_max_position=32768)
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    pair = [128 * math.log(32768 / (turns * 2 * math.pi)) / (2 * math.log(1e6)) for turns in (32, 1)]
    low, high = math.floor(pair[0]), math.ceil(pair[1])
    expected = []
    for i in range(64):
        kept = 1 - min(max((i - low) / (high - low), 0), 1)
        expected.append(1e6 ** (-2 * i / 128) * (kept + (1 - kept) / 4))
    np.testing.assert_allclose(rope_frequencies(rope, 128), expected, rtol=5e-6)
    cos, _ = rope_cossin(rope, 128, jnp.zeros((1, 1), int))
    np.testing.assert_allclose(cos, rope.attention_factor, rtol=1e-6)


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_a_router_that_chooses_all_experts_sums_them_and_its_gradient_is_that_of_the_sum(name):
    """Where every expert is chosen the layer is smooth, and its gradient is checked by finite differences."""
    config, variables = load(f"hf_torch/{name}")
    config = dataclasses.replace(config, experts_per_token=config.num_experts)

    def loss(scale):
        params = jax.tree.map_with_path(
            lambda path, x: x * scale if "expert_up" in jax.tree_util.keystr(path) else x, variables["params"]
        )
        return loss_of(config, {"params": params}) / 100

    value, slope = jax.jit(jax.value_and_grad(loss))(1.0)
    upper, lower = jax.jit(loss)(1.01), jax.jit(loss)(0.99)
    assert value and abs(slope) > 1e-2
    np.testing.assert_allclose(slope, (upper - lower) / 0.02, rtol=2e-2)  # float32 and a step of a hundredth
