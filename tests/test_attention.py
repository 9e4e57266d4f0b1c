"""Attention of packed rows: who sees whom, the plain formula, and that the fused kernels mean the same."""

import typing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.models.attention import (
    ATTENTION,
    Scoring,
    Where,
    alibi_slopes,
    attention_cudnn,
    attention_splash,
    attention_xla,
    softmax_weights,
    visible,
)  # fmt: skip
from jaxrl.models.config import ModelConfig
from jaxrl.models.decoder import abstract_params
from jaxrl.optimizer import make_optimizer
from jaxrl.parallel import make_mesh, use_mesh
from jaxrl.roles import abstract_train_state, abstract_variables
from jaxrl.topology import described
from jaxrl.update import Policy, PolicyLoss


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def packed(segments, prefixes=None) -> Where:
    """Rows of segments, each counted from the end of its prefix on."""
    segments = np.asarray(segments)
    prefixes = segments if prefixes is None else np.asarray(prefixes)
    positions = np.zeros_like(segments)
    for r, t in np.ndindex(segments.shape):
        before = segments[r, :t] == segments[r, t]
        if prefixes[r, t] != segments[r, t]:
            before |= segments[r, :t] == prefixes[r, t]
        positions[r, t] = before.sum()
    return Where(*map(jnp.asarray, (positions, segments, prefixes)))


def plain(head_dim: int) -> Scoring:
    return Scoring(scale=head_dim**-0.5)


xla = jax.jit(ATTENTION["xla"], static_argnames="scoring")


def test_a_token_sees_its_own_segment_its_prefix_and_nothing_ahead():
    # prompt a b, its responses c and d e, a lone f, padding
    segments = jnp.array([[1, 1, 2, 3, 3, 4, 0]])
    prefixes = jnp.array([[1, 1, 1, 1, 1, 4, 0]])
    expected = """
        1 0 0 0 0 0 0
        1 1 0 0 0 0 0
        1 1 1 0 0 0 0
        1 1 0 1 0 0 0
        1 1 0 1 1 0 0
        0 0 0 0 0 1 0
        0 0 0 0 0 0 0"""
    np.testing.assert_array_equal(visible(segments, prefixes)[0], np.array(expected.split(), int).reshape(7, 7))


def test_where_every_token_is_its_own_prefix_attention_is_causal_within_segments():
    segments = jnp.array([[1, 1, 1, 2, 2]])
    expected = np.tril(np.ones((5, 5), bool))
    expected[3:, :3] = False
    np.testing.assert_array_equal(visible(segments, segments)[0], expected)


def test_xla_attention_is_the_formula_with_query_heads_in_groups():
    R, T, N, K, H = 2, 6, 6, 2, 4
    q, k, v = draw(R, T, N, H), draw(R, T, K, H, seed=1), draw(R, T, K, H, seed=2)
    where = packed([[1] * 6, [1, 1, 1, 2, 2, 2]])
    mask = np.asarray(visible(where.segments, where.prefixes))
    out = xla(q, k, v, where, plain(H))
    for n in range(N):
        head = n // (N // K)  # query heads 0-2 read key-value head 0, 3-5 head 1
        scores = np.einsum("rth,rsh->rts", q[:, :, n], k[:, :, head]) / np.sqrt(H)
        weights = np.exp(scores) * mask
        weights /= weights.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(out[:, :, n], weights @ np.asarray(v)[:, :, head], atol=1e-6)


def test_window_softcap_slopes_and_sinks_are_their_formulas_in_this_order():
    N, K, T = 4, 2, 5
    scores = draw(1, K, N // K, T, T)
    segments = jnp.ones((1, T), int)
    where = packed(segments)
    distance = where.positions[:, :, None] - where.positions[:, None, :]
    slopes, sinks = np.array([0.5, 0.25, 0.125, 1.0], np.float32), draw(N, seed=1)
    scoring = Scoring(scale=0.7, window=3, softcap=1.5, slopes=slopes, sinks=jnp.asarray(sinks))
    got = softmax_weights(jnp.asarray(scores), visible(segments, segments), distance, scoring)
    for n in range(N):
        for t in range(T):
            seen = range(max(0, t - 2), t + 1)  # itself and two before it
            raw = 1.5 * np.tanh(0.7 * scores[0, n // 2, n % 2, t, seen] / 1.5)
            exp = np.exp(raw - slopes[n] * np.array([t - s for s in seen]))
            expected = np.zeros(T)
            expected[list(seen)] = exp / (exp.sum() + np.exp(sinks[n]))  # the sink takes its part and gives no value
            np.testing.assert_allclose(got[0, n // 2, n % 2, t], expected, rtol=1e-5, atol=1e-7)


def test_a_window_counts_the_tokens_of_a_sequence_and_not_the_columns_of_its_row():
    # A prompt of three tokens and two answers of two: the second answer lies far from its prompt in the row.
    where = packed([[1, 1, 1, 2, 2, 3, 3]], [[1, 1, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(where.positions[0], [0, 1, 2, 3, 4, 3, 4])
    scores, window = jnp.zeros((1, 1, 1, 7, 7)), Scoring(scale=1.0, window=3)
    distance = where.positions[:, :, None] - where.positions[:, None, :]
    weights = softmax_weights(scores, visible(where.segments, where.prefixes), distance, window)[0, 0, 0]
    expected = """
        1 0 0 0 0 0 0
        1 1 0 0 0 0 0
        1 1 1 0 0 0 0
        0 1 1 1 0 0 0
        0 0 1 1 1 0 0
        0 1 1 0 0 1 0
        0 0 1 0 0 1 1"""
    np.testing.assert_array_equal(weights > 0, np.array(expected.split(), int).reshape(7, 7))


def test_slopes_of_alibi_are_those_of_its_authors():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    # Twelve heads: the eight of a power of two, and every second of sixteen.
    expected = [2.0**-i for i in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    np.testing.assert_allclose(alibi_slopes(12), expected, rtol=1e-6)


def test_padding_is_finite_and_gives_no_gradient_to_the_rest():
    where = packed([[1, 1, 0, 0]])
    q, k, v = draw(1, 4, 2, 4), draw(1, 4, 2, 4, seed=1), draw(1, 4, 2, 4, seed=2)
    sinks = draw(2, seed=3)

    def real_tokens(q, k, v):
        attended = attention_xla(q, k, v, where, plain(4)._replace(sinks=sinks))
        return attended[:, :2].sum(), attended

    gradients, attended = jax.jit(jax.grad(real_tokens, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    assert np.isfinite(attended).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all() and not gradient[:, 2:].any()


def test_softmax_is_taken_in_float32_also_where_the_model_computes_in_bfloat16():
    q, k, v = (np.asarray(10 * draw(1, 32, 2, 8, seed=i), jnp.bfloat16) for i in range(3))
    where = packed(np.ones((1, 32), int))
    out, exact = xla(q, k, v, where, plain(8)), xla(*map(np.float32, (q, k, v)), where, plain(8))
    assert out.dtype == jnp.bfloat16
    # The rounding of weights and output, 2^-8 of values up to 30; with scores in bfloat16 it would be several.
    np.testing.assert_allclose(np.float32(out), exact, atol=0.25)


@pytest.mark.parametrize("scoring", [plain(128), Scoring(scale=0.1, window=20, softcap=3.0)])
def test_splash_equals_xla_on_segments(scoring):
    R, T, N, K, H = 2, 128, 4, 2, 128
    q, k, v = draw(R, T, N, H), draw(R, T, K, H, seed=1), draw(R, T, K, H, seed=2)
    where = packed([[1] * 50 + [2] * 60 + [0] * 18, [1] * 128])
    out = attention_splash(q, k, v, where, scoring, interpret=True)
    expected = xla(q, k, v, where, scoring)
    real = np.asarray(where.segments) > 0
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=5e-6)


@pytest.mark.parametrize(
    "mesh", [(2, 2, 2), (1, 2, 4), (1, 1, 3)]
)  # kv heads split, fewer than devices; no head splits
def test_splash_on_a_mesh_equals_xla_with_its_gradients(mesh):
    R, T, N, K, H = 4, 128, 4, 2, 32
    q, k, v, g = draw(R, T, N, H), draw(R, T, K, H, seed=1), draw(R, T, K, H, seed=2), draw(R, T, N, H, seed=3)
    where = packed([[1] * 50 + [2] * 78] * R)
    mesh = make_mesh(*mesh, devices=jax.devices()[: np.prod(mesh)])

    def loss(attention, q, k, v):
        return jnp.sum(attention(q, k, v, where, plain(H)) * g)

    def run(attention):
        return jax.jit(jax.value_and_grad(partial(loss, attention), argnums=(0, 1, 2)))(q, k, v)

    with use_mesh(mesh):
        got = run(partial(attention_splash, interpret=True))
    # Sums of up to 128 numbers in float32, in another order.
    jax.tree.map(partial(np.testing.assert_allclose, atol=3e-4), got, run(attention_xla))


@pytest.mark.parametrize("attention", ["splash", "cudnn"])
def test_weights_are_described_where_their_kernel_could_not_run(attention):
    sizes = {
        "vocab_size": 8,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    plain, fused = (ModelConfig.from_hf({"model_type": "llama", **sizes}, attention=a) for a in ("xla", attention))
    assert abstract_params(fused) == abstract_params(plain)


def test_an_update_with_splash_compiles_for_tpus_on_a_mesh():
    pytest.importorskip("libtpu", reason="the extra plan-tpu is not installed")
    model = ModelConfig.from_hf({
        "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 256,
    }, attention="splash", compute_dtype="bfloat16")  # fmt: skip
    devices = described("v5e:2x2").devices
    for shape in ((1, 4, 1), (2, 2, 1), (1, 2, 2)):
        mesh = make_mesh(*shape, devices=devices)
        optimizer = make_optimizer()
        policy = Policy(mesh, model, optimizer, PolicyLoss())
        state = abstract_train_state(optimizer, abstract_variables(mesh, model, "lm"))
        text = policy.lower_step(state, {}, (2, 8, 256)).compile().as_text()
        assert text is not None and "splash" in text


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN is here")
def test_cudnn_without_an_nvidia_gpu_is_refused_in_words():
    x = draw(1, 4, 2, 8).astype(jnp.bfloat16)
    with pytest.raises(RuntimeError, match="(?i)cudnn"):
        jax.block_until_ready(attention_cudnn(x, x, x, packed(np.ones((1, 4), int)), plain(8)))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
def test_cudnn_equals_xla_on_packed_rows():
    q, k, v = (draw(2, 64, n, 64, seed=i).astype(jnp.bfloat16) for i, n in enumerate((4, 2, 2)))
    where = packed([[1] * 20 + [2] * 10 + [3] * 20 + [0] * 14, [1] * 64], [[1] * 50 + [0] * 14, [1] * 64])
    for scoring in (plain(64), Scoring(scale=0.2, window=7)):
        out, expected = (ATTENTION[name](q, k, v, where, scoring) for name in ("cudnn", "xla"))
        real = np.asarray(where.segments) > 0  # bfloat16, values up to 3
        np.testing.assert_allclose(np.float32(out)[real], np.float32(expected)[real], atol=0.03)


@pytest.mark.parametrize(
    "family, attention, lacking",
    [("gpt_oss", "cudnn", "attention sinks"), ("bloom", "splash", "ALiBi"), ("gemma2", "cudnn", "softcap"),
     ("gemma2", "splash", "different windows")],
)  # fmt: skip
def test_a_kernel_that_cannot_compute_a_family_is_refused_by_name(family, attention, lacking):
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"n_layer": 2, "n_head": 2, "intermediate_size": 8}
    with pytest.raises(ValueError, match=f"model.attention {attention} cannot compute .*{lacking}.*xla"):
        ModelConfig.from_hf({"model_type": family, **sizes}, attention=attention)


def test_the_config_names_exactly_the_attentions_that_exist():
    assert set(typing.get_args(typing.get_type_hints(ModelConfig)["attention"])) == ATTENTION.keys()
