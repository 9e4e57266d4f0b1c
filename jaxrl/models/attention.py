"""Attention of packed rows behind one function; the implementation is a word in the config.

`xla` runs everywhere and is the reference. `cudnn` is NVIDIA's fused kernel, `splash` the TPU's: neither ever holds the
scores [R, N, T, T] in memory.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def visible(segments: Int[Array, "R T"], prefixes: Int[Array, "R T"]) -> Bool[Array, "R T T"]:
    """True where the token of a column (axis 1) sees the token of another (axis 2): see `batch.PackedRows`."""
    own = segments[:, :, None] == segments[:, None, :]
    prefix = prefixes[:, :, None] == segments[:, None, :]
    causal = jnp.tril(jnp.ones((segments.shape[1],) * 2, bool))
    return causal & (own | prefix) & (segments > 0)[:, None, :]


def attention_xla(
    q: Float[Array, "R T N H"], k: Float[Array, "R S K H"], v: Float[Array, "R S K H"], mask: Bool[Array, "R T S"]
) -> Float[Array, "R T N H"]:
    """softmax(q k' / sqrt(H)) v with the softmax in float32. Rows that see nothing (padding) attend evenly."""
    R, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(R, T, K, N // K, H)
    scores = jnp.einsum("rtkgh,rskh->rkgts", q, k, preferred_element_type=jnp.float32) / math.sqrt(H)
    scores = jnp.where(mask[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("rkgts,rskh->rtkgh", weights, v).reshape(R, T, N, H)


def attention_cudnn(q, k, v, segments, prefixes):
    """cuDNN's fused attention: bf16 or fp16, head size a multiple of 8 up to 128, T even."""
    mask = visible(segments, prefixes)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


def attention_splash(q, k, v, segments, prefixes, interpret: bool = False):
    """Splash attention (Pallas, TPU): T a multiple of 128, head size a multiple of 128 on the chip.

    It knows segments but not prefixes: the config refuses `share_prompt` with it.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    del prefixes
    T, N = q.shape[1], q.shape[2]
    causal = masks.MultiHeadMask([masks.CausalMask((T, T))] * N)
    kernel = splash.make_splash_mha(causal, head_shards=1, q_seq_shards=1, interpret=interpret)
    k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    q = q / math.sqrt(q.shape[-1])
    heads_first = [x.swapaxes(1, 2) for x in (q, k, v)]
    attended = jax.vmap(kernel)(*heads_first, segment_ids=splash.SegmentIds(segments, segments))
    return attended.swapaxes(1, 2)


def _xla(q, k, v, segments, prefixes):
    return attention_xla(q, k, v, visible(segments, prefixes))


ATTENTION = {"xla": _xla, "cudnn": attention_cudnn, "splash": attention_splash}
