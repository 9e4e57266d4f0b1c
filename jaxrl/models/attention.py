"""Attention of packed rows behind one function; the implementation is a word in the config.

`xla` runs everywhere and is the reference. `cudnn` is NVIDIA's fused kernel, `splash` the TPU's: neither ever holds the
scores [R, N, T, T] in memory.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from .config import ModelConfig
from .on_mesh import axes_along, compiler_axes

ALL = 1 << 30  # a window that holds every token, where windows are numbers of the program


class Where(NamedTuple):
    """Where the tokens of packed rows stand: see `batch.PackedRows`."""

    positions: Int[Array, "R T"]
    segments: Int[Array, "R T"]
    prefixes: Int[Array, "R T"]


class Scoring(NamedTuple):
    """How a layer makes weights from queries times keys."""

    scale: float | Array
    window: int | Array = 0  # how many tokens back one sees, itself included; 0: all
    softcap: float = 0.0  # cap * tanh(score / cap); 0: none
    slopes: Float[np.ndarray, "N"] | None = None  # ALiBi: what a score loses with every token of distance
    sinks: Float[Array, "N"] | None = None  # scores that take part in the softmax and have no value


def scoring_of(config: ModelConfig, layer: int) -> Scoring:
    """What the architecture says of a layer, but for the sinks, which are weights."""
    scale = config.attention_scale or 1 / math.sqrt(config.head_dim)
    return Scoring(
        scale=scale / (layer + 1) if config.attention_scale_by_layer else scale,
        window=config.window_of(layer),
        softcap=config.attention_softcap,
        slopes=alibi_slopes(config.num_heads) if config.positions == "alibi" else None,
    )


def alibi_slopes(num_heads: int) -> Float[np.ndarray, "N"]:
    """2^(-8/n), 2^(-16/n) ... for n heads where n is a power of two (arXiv:2108.12409).

    Another number of heads takes the slopes of the power below it, and the rest from the power above it, every second.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    between = [2.0 ** (-4.0 * (head + 1) / power) for head in range(0, 2 * (num_heads - power), 2)]
    return np.array(slopes + between, np.float32)


def visible(segments: Int[Array, "R T"], prefixes: Int[Array, "R T"]) -> Bool[Array, "R T T"]:
    """True where the token of a column (axis 1) sees the token of another (axis 2): see `batch.PackedRows`."""
    own = segments[:, :, None] == segments[:, None, :]
    prefix = prefixes[:, :, None] == segments[:, None, :]
    causal = jnp.tril(jnp.ones((segments.shape[1],) * 2, bool))
    return causal & (own | prefix) & (segments > 0)[:, None, :]


def distances(positions: Int[Array, "R T"]) -> Int[Array, "R T T"]:
    """How many tokens back another one is in the same sequence: by positions, as a prefix lies elsewhere in the row."""
    return positions[:, :, None] - positions[:, None, :]


def softmax_weights(
    scores: Float[Array, "B K G *T S"], mask: Bool[Array, "B *T S"], distance: Int[Array, "B *T S"], s: Scoring
) -> Float[Array, "B K G *T S"]:
    """The weights of each query's keys, in float32. Rows that see nothing (padding) attend evenly."""

    def of_heads(x) -> Array:  # [N] beside the scores
        return jnp.asarray(x, jnp.float32).reshape(*scores.shape[1:3], *[1] * (scores.ndim - 3))

    scores = scores * s.scale
    if s.softcap:
        scores = s.softcap * jnp.tanh(scores / s.softcap)
    if s.slopes is not None:
        scores -= of_heads(s.slopes) * distance[:, None, None]
    if not isinstance(s.window, int) or s.window:
        mask &= distance < s.window
    scores = jnp.where(mask[:, None, None], scores, -1e30)
    if s.sinks is None:
        return _softmax(scores)
    sinks = of_heads(s.sinks)
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), sinks))
    exp = jnp.exp(scores - top)
    return exp / (exp.sum(axis=-1, keepdims=True) + jnp.exp(sinks - top))


@jax.custom_vjp
def _softmax(scores: Array) -> Array:
    """Over the last axis. Backward keeps the weights alone, where jax keeps the exponentials too.

    (Its own rule would do the same under `jax_softmax_custom_jvp`, which is off. In bfloat16 it saves nothing large.)
    """
    return jax.nn.softmax(scores, axis=-1)


def _softmax_forward(scores):
    weights = jax.nn.softmax(scores, axis=-1)
    return weights, weights


def _softmax_backward(weights, g):
    return (weights * (g - (weights * g).sum(axis=-1, keepdims=True)),)


_softmax.defvjp(_softmax_forward, _softmax_backward)


def attention_xla(
    q: Float[Array, "R T N H"], k: Float[Array, "R T K H"], v: Float[Array, "R T K H"], where: Where, scoring: Scoring
) -> Float[Array, "R T N H"]:
    """softmax(scale q k') v with the softmax in float32."""
    R, T, N, H = q.shape
    K = k.shape[2]
    # Heads first, in so many words: left to itself, XLA on a CPU transposes the scores.
    q = q.reshape(R, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("rkgth,rksh->rkgts", q, k, preferred_element_type=jnp.float32)
    mask = visible(where.segments, where.prefixes)
    weights = softmax_weights(scores, mask, distances(where.positions), scoring).astype(v.dtype)
    return jnp.einsum("rkgts,rksh->rkgth", weights, v).transpose(0, 3, 1, 2, 4).reshape(R, T, N, H)


def attention_cudnn(q, k, v, where: Where, scoring: Scoring):
    """cuDNN's fused attention: bf16 or fp16, head size a multiple of 8 up to 128, T even; no softcap, ALiBi, sinks."""
    mask = visible(where.segments, where.prefixes)
    if not isinstance(scoring.window, int) or scoring.window:
        mask &= distances(where.positions) < scoring.window
    if not isinstance(scoring.scale, float):
        q, scoring = (q * scoring.scale).astype(q.dtype), scoring._replace(scale=1.0)
    scale: Any = scoring.scale
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation="cudnn")


def attention_splash(q, k, v, where: Where, scoring: Scoring, interpret: bool = False):
    """Splash attention (Pallas, TPU): T a multiple of 128, head size a multiple of 128 on the chip.

    It knows segments but not prefixes: the config refuses `share_prompt` with it. A window counts columns, which within
    a segment are positions; it is the same in every layer. No ALiBi, no sinks. On a mesh each device takes its rows and
    heads: the compiler cannot split a kernel.
    """
    q = (q * scoring.scale).astype(q.dtype)
    local = partial(_splash, window=scoring.window, softcap=scoring.softcap, interpret=interpret)
    axes = compiler_axes()
    if not axes:
        return local(q, k, v, where.segments)
    rows, heads = axes_along("rows", q.shape[0]), axes_along("heads", q.shape[2])
    if axes_along("kv_heads", k.shape[2]) != heads:  # too few to split as the queries are: one for each query's head
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    of_heads, of_rows = PartitionSpec(rows, None, heads), PartitionSpec(rows)
    return jax.shard_map(
        local,
        in_specs=(of_heads, of_heads, of_heads, of_rows),
        out_specs=of_heads,
        axis_names=set(axes),
        check_vma=False,
    )(q, k, v, where.segments)


def _splash(q, k, v, segments, *, window: Any, softcap: float, interpret: bool):
    """Of rows and heads on one device; queries are scaled."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N = q.shape[1], q.shape[2]
    one = masks.LocalMask((T, T), (window - 1, 0), 0) if window else masks.CausalMask((T, T))
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([one] * N), head_shards=1, q_seq_shards=1, interpret=interpret,
        attn_logits_soft_cap=softcap or None,
    )  # fmt: skip
    k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    heads_first = [x.swapaxes(1, 2) for x in (q, k, v)]
    attended: Any = jax.vmap(kernel)(*heads_first, segment_ids=splash.SegmentIds(segments, segments))
    return attended.swapaxes(1, 2)


ATTENTION = {"xla": attention_xla, "cudnn": attention_cudnn, "splash": attention_splash}
