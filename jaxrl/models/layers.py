"""The pieces of a decoder layer: Dense, RMSNorm, rotary embedding, self-attention, MLP, and the layer itself.

A layer does not know whether it trains or decodes. It is handed `attend`, a function from this layer's queries, keys
and values to the attended values and whatever the caller wants back (nothing in training, the grown cache in decoding).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from .config import ModelConfig, Rope
from .nf4 import Part, packed_parts, packed_product

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]  # q [B T N H], k and v [B T K H] -> ([B T N H], extra)
Cossin = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]  # half the head size

INIT = nn.initializers.normal(0.02)
ADAPTER_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # +-1 / sqrt(fan in), as PEFT begins


def logical(init: Callable, axes: tuple[str | None, ...]) -> Callable:
    """An initialiser whose weight carries the names of its axes (`parallel.py` says what they mean on a mesh)."""
    return nn.with_logical_partitioning(init, axes)


class Dense(nn.Module):
    """A product written as an einsum over `bt...`, with an optional bias and an optional low-rank adapter.

    The adapter lives in the collection "lora" and is added where that collection is given:
    y = x W + lora_scale * (x A) B, as in LoRA (arXiv:2106.09685). A kernel that `config.packed` names lies in the
    collection "packed" in 4 bits (`nf4.py`), and is numbers in the product alone.
    """

    config: ModelConfig
    equation: str  # "btd,dnh->btnh"
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = False

    def setup(self):
        self.inputs, self.outputs = _split_equation(self.equation)
        num_in, packed = len(self.inputs), self.config.packed
        self.packed = packed if packed is not None and self.name in packed.modules else None
        if self.packed:
            sizes = math.prod(self.shape[num_in:]), math.prod(self.shape[:num_in])
            self.parts = {name: self._part(name, part) for name, part in packed_parts(self.packed, *sizes).items()}
        else:
            self.kernel = self.param("kernel", logical(INIT, self.axes), self.shape)
        if self.use_bias:
            zeros = nn.initializers.zeros_init()
            self.bias = self.param("bias", logical(zeros, self.axes[num_in:]), self.shape[num_in:])
        rank = self.config.lora_rank
        if self.is_initializing() and rank and self.name in self.config.lora_targets:
            make_a = logical(ADAPTER_INIT, (*self.axes[:num_in], None))
            make_b = logical(nn.initializers.zeros_init(), (None, *self.axes[num_in:]))
            self.variable("lora", "a", lambda: make_a(self.make_rng("params"), (*self.shape[:num_in], rank)))
            self.variable("lora", "b", lambda: make_b(self.make_rng("params"), (rank, *self.shape[num_in:])))

    def _part(self, name: str, part: Part) -> nn.Variable:
        zeros = logical(lambda key, shape, dtype: jnp.zeros(shape, dtype), part.axes)
        return self.variable("packed", name, lambda: zeros(None, part.shape, part.dtype))

    def __call__(self, x: Array) -> Array:
        dtype = x.dtype
        if self.packed:
            parts = {name: part.value for name, part in self.parts.items()}
            y = packed_product(x, parts, self.packed, self.shape, self.axes, len(self.inputs))
        else:
            y = _product(x, self.kernel, len(self.inputs))
        if self.has_variable("lora", "a"):
            # While the tree is made, Linen hands out the arrays in the box that holds their axis names.
            a, b = (nn.meta.unbox(self.get_variable("lora", name)).astype(dtype) for name in ("a", "b"))
            low = jnp.einsum(f"bt{self.inputs},{self.inputs}r->btr", x, a)
            y += self.config.lora_scale * jnp.einsum(f"btr,r{self.outputs}->bt{self.outputs}", low, b)
        y = y + self.bias.astype(dtype) if self.use_bias else y
        return checkpoint_name(y, "product")  # what remat "dots" keeps


def _split_equation(equation: str) -> tuple[str, str]:
    """'btd,dnh->btnh' -> ('d', 'nh'): the kernel's input and output letters."""
    x, rest = equation.split(",")
    return x[2:], rest.split("->")[1][2:]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, kernel: Array, num_in: int) -> Array:
    """x [B T in..] times kernel [in.. out..], in the dtype of x; the kernel's gradient is summed in float32.

    The gradient is written by hand for the order of its operands: XLA transposes the left one, so that is the narrower.
    Autodiff has the output's gradient there, and the transposition is then fused into its elementwise work (an update
    of a 135M model on two CPU cores took a fifth longer).
    """
    return jax.lax.dot_general(x, kernel.astype(x.dtype), ((_last(x, num_in), tuple(range(num_in))), ((), ())))


def _product_forward(x, kernel, num_in):
    return _product(x, kernel, num_in), (x, kernel)


def _product_backward(num_in, saved, g):
    x, kernel = saved
    num_out = kernel.ndim - num_in
    dx = jax.lax.dot_general(g, kernel.astype(x.dtype), ((_last(g, num_out), _last(kernel, num_out)), ((), ())))
    tokens = (((0, 1), (0, 1)), ((), ()))
    if x.size <= g.size:
        return dx, jax.lax.dot_general(x, g, tokens, preferred_element_type=kernel.dtype)
    swapped = jax.lax.dot_general(g, x, tokens, preferred_element_type=kernel.dtype)
    return dx, swapped.transpose(*range(num_out, kernel.ndim), *range(num_out))


def _last(x: Array, num: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - num, x.ndim))


_product.defvjp(_product_forward, _product_backward)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 (arXiv:1910.07467)."""

    size: int
    eps: float

    def setup(self):
        self.scale = self.param("scale", logical(nn.initializers.ones_init(), (None,)), (self.size,))

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return self.scale.astype(x.dtype) * x32.astype(x.dtype)


def rope_frequencies(rope: Rope, head_dim: int) -> Float[Array, "half"]:
    """Inverse wavelengths of the rotary embedding, in radians a token, rescaled as the checkpoint asks."""
    frequencies = rope.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        # Short wavelengths stay, long ones are divided by `factor`, between them it is interpolated (Llama 3.1, rope).
        turns = rope.original_max_position * frequencies / (2 * jnp.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = jnp.clip(blend, 0.0, 1.0)
        return frequencies * (blend + (1 - blend) / rope.factor)
    return frequencies


def rope_cossin(rope: Rope, head_dim: int, positions: Int[Array, "B T"]) -> Cossin:
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(rope, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N H"], cossin: Cossin) -> Float[Array, "B T N H"]:
    """Rotary embedding in the half-rotation layout of Hugging Face: feature i turns with feature i + H/2."""
    cos, sin = (c[:, :, None, :].astype(x.dtype) for c in cossin)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class SelfAttention(nn.Module):
    config: ModelConfig

    def setup(self):
        c = self.config
        D, N, K, H = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        self.q_proj = Dense(c, "btd,dnh->btnh", (D, N, H), ("embed", "heads", "head_dim"), c.qkv_bias)
        self.k_proj = Dense(c, "btd,dnh->btnh", (D, K, H), ("embed", "kv_heads", "head_dim"), c.qkv_bias)
        self.v_proj = Dense(c, "btd,dnh->btnh", (D, K, H), ("embed", "kv_heads", "head_dim"), c.qkv_bias)
        self.o_proj = Dense(c, "btnh,nhd->btd", (N, H, D), ("heads", "head_dim", "embed"), c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(H, c.norm_eps), RMSNorm(H, c.norm_eps)

    def __call__(self, x: Array, cossin: Cossin, attend: Attend) -> tuple[Array, Any]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        attended, extra = attend(rotate(q, cossin), rotate(k, cossin), v)
        return self.o_proj(attended), extra


class MLP(nn.Module):
    config: ModelConfig

    def setup(self):
        c = self.config
        D, F = c.hidden_size, c.intermediate_size
        self.gate_proj = Dense(c, "btd,df->btf", (D, F), ("embed", "mlp"), c.mlp_bias)
        self.up_proj = Dense(c, "btd,df->btf", (D, F), ("embed", "mlp"), c.mlp_bias)
        self.down_proj = Dense(c, "btf,fd->btd", (F, D), ("mlp", "embed"), c.mlp_bias)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    config: ModelConfig

    def setup(self):
        c = self.config
        self.input_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.self_attn = SelfAttention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = MLP(c)

    def __call__(self, x: Float[Array, "B T D"], cossin: Cossin, attend: Attend) -> tuple[Array, Any]:
        attended, extra = self.self_attn(self.input_layernorm(x), cossin, attend)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), extra
