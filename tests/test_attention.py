"""Attention of packed rows: who sees whom, the plain formula, and that the fused kernels mean the same."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.models.attention import ATTENTION, attention_cudnn, attention_splash, attention_xla, visible
from jaxrl.models.config import ModelConfig


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


xla = jax.jit(ATTENTION["xla"])


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
    mask = np.tril(np.ones((R, T, T), bool))
    mask[1, 3:, :2] = False
    out = jax.jit(attention_xla)(q, k, v, mask)
    for n in range(N):
        head = n // (N // K)  # query heads 0-2 read key-value head 0, 3-5 head 1
        scores = np.einsum("rth,rsh->rts", q[:, :, n], k[:, :, head]) / np.sqrt(H)
        weights = np.exp(scores) * mask
        weights /= weights.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(out[:, :, n], weights @ np.asarray(v)[:, :, head], atol=1e-6)


def test_padding_is_finite_and_gives_no_gradient_to_the_rest():
    segments = jnp.array([[1, 1, 0, 0]])
    q, k, v = draw(1, 4, 2, 4), draw(1, 4, 2, 4, seed=1), draw(1, 4, 2, 4, seed=2)

    def real_tokens(q, k, v):
        attended = ATTENTION["xla"](q, k, v, segments, segments)
        return attended[:, :2].sum(), attended

    gradients, attended = jax.jit(jax.grad(real_tokens, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    assert np.isfinite(attended).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all() and not gradient[:, 2:].any()


def test_softmax_is_taken_in_float32_also_where_the_model_computes_in_bfloat16():
    q, k, v = (np.asarray(10 * draw(1, 32, 2, 8, seed=i), jnp.bfloat16) for i in range(3))
    segments = np.ones((1, 32), np.int32)
    out, exact = xla(q, k, v, segments, segments), xla(*map(np.float32, (q, k, v)), segments, segments)
    assert out.dtype == jnp.bfloat16
    # The rounding of weights and output, 2^-8 of values up to 30; with scores in bfloat16 it would be several.
    np.testing.assert_allclose(np.float32(out), exact, atol=0.25)


def test_splash_equals_xla_on_segments():
    R, T, N, K, H = 2, 128, 4, 2, 128
    q, k, v = draw(R, T, N, H), draw(R, T, K, H, seed=1), draw(R, T, K, H, seed=2)
    segments = jnp.array([[1] * 50 + [2] * 60 + [0] * 18, [1] * 128])
    out = attention_splash(q, k, v, segments, segments, interpret=True)
    expected = xla(q, k, v, segments, segments)
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=5e-6)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN is here")
def test_cudnn_without_an_nvidia_gpu_is_refused_in_words():
    x = draw(1, 4, 2, 8).astype(jnp.bfloat16)
    segments = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(RuntimeError, match="(?i)cudnn"):
        jax.block_until_ready(attention_cudnn(x, x, x, segments, segments))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
def test_cudnn_equals_xla_on_packed_rows():
    q, k, v = (draw(2, 64, n, 64, seed=i).astype(jnp.bfloat16) for i, n in enumerate((4, 2, 2)))
    segments = jnp.array([[1] * 20 + [2] * 10 + [3] * 20 + [0] * 14, [1] * 64])
    prefixes = jnp.array([[1] * 50 + [0] * 14, [1] * 64])
    out, expected = (ATTENTION[name](q, k, v, segments, prefixes) for name in ("cudnn", "xla"))
    real = np.asarray(segments) > 0
    np.testing.assert_allclose(np.float32(out)[real], np.float32(expected)[real], atol=0.03)  # bfloat16, values up to 3


def test_the_config_names_exactly_the_attentions_that_exist():
    assert set(typing.get_args(typing.get_type_hints(ModelConfig)["attention"])) == ATTENTION.keys()
