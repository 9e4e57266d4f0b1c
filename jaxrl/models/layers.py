"""The pieces of a decoder layer: Dense, norms, self-attention, MLP. `block.py` puts them together.

A layer does not know whether it trains or decodes. It is handed `attend`, a function from this layer's queries, keys
and values to the attended values and whatever the caller wants back (nothing in training, the grown cache in decoding).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from .config import ModelConfig
from .nf4 import Part, packed_parts, packed_product
from .rope import Cossin, rotate

# q [B T N H], k and v [B T K H], sinks [N] or None -> ([B T N H], or of the last tokens alone, extra)
Attend = Callable[[Array, Array, Array, Array | None], tuple[Array, Any]]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": nn.gelu,
    "relu": nn.relu,
}

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
            y = cast(Array, product(x, self.kernel, len(self.inputs)))
        if self.has_variable("lora", "a"):
            # While the tree is made, Linen hands out the arrays in the box that holds their axis names.
            a, b = (nn.meta.unbox(self.get_variable("lora", name)).astype(dtype) for name in ("a", "b"))
            low = jnp.einsum(f"bt{self.inputs},{self.inputs}r->btr", x, a)
            y = y + self.config.lora_scale * jnp.einsum(f"btr,r{self.outputs}->bt{self.outputs}", low, b)
        y = y + self.bias.astype(dtype) if self.use_bias else y
        return checkpoint_name(y, "product")  # what remat "dots" keeps


def _split_equation(equation: str) -> tuple[str, str]:
    """'btd,dnh->btnh' -> ('d', 'nh'): the kernel's input and output letters."""
    x, rest = equation.split(",")
    return x[2:], rest.split("->")[1][2:]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Array, kernel: Array, num_in: int) -> Array:
    """x [.. in..] times kernel [in.. out..], in the dtype of x; the kernel's gradient is summed in float32.

    The gradient is written by hand for the order of its operands: XLA transposes the left one. Autodiff has the output's
    gradient there, and the transposition is then fused into its elementwise work (an update of a 135M model on two CPU
    cores took a fifth longer).
    """
    return jax.lax.dot_general(x, kernel.astype(x.dtype), ((_last(x, num_in), tuple(range(num_in))), ((), ())))


def _product_forward(x, kernel, num_in):
    return product(x, kernel, num_in), (x, kernel)


def _product_backward(num_in, saved, g):
    x, kernel = saved
    num_out = kernel.ndim - num_in
    tokens = tuple(range(x.ndim - num_in))
    dx = jax.lax.dot_general(g, kernel.astype(x.dtype), ((_last(g, num_out), _last(kernel, num_out)), ((), ())))
    return dx, jax.lax.dot_general(x, g, ((tokens, tokens), ((), ())), preferred_element_type=kernel.dtype)


def _last(x: Array, num: int) -> tuple[int, ...]:
    return tuple(range(x.ndim - num, x.ndim))


product.defvjp(_product_forward, _product_backward)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 (arXiv:1910.07467).

    `kind` says where it is scaled, as in `ModelConfig.norm`; the difference is one of rounding, but for `rms_offset`.
    """

    size: int
    eps: float
    kind: str = "rms"

    def setup(self):
        init = nn.initializers.zeros_init() if self.kind == "rms_offset" else nn.initializers.ones_init()
        self.scale = self.param("scale", logical(init, (None,)), (self.size,))

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        if self.kind == "rms":
            return self.scale.astype(x.dtype) * x32.astype(x.dtype)
        scale = self.scale.astype(jnp.float32)
        return (x32 * (1 + scale if self.kind == "rms_offset" else scale)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Mean and variance over the last axis, computed in float32 (arXiv:1607.06450)."""

    size: int
    eps: float

    def setup(self):
        self.scale = self.param("scale", logical(nn.initializers.ones_init(), (None,)), (self.size,))
        self.bias = self.param("bias", logical(nn.initializers.zeros_init(), (None,)), (self.size,))

    def __call__(self, x: Array) -> Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale.astype(jnp.float32) + self.bias.astype(jnp.float32)).astype(x.dtype)


def norm_of(config: ModelConfig, size: int | None = None) -> RMSNorm | LayerNorm:
    """The norm of an architecture, over `size` features (by default the hidden size)."""
    size = config.hidden_size if size is None else size
    if config.norm == "layer":
        return LayerNorm(size, config.norm_eps)
    return RMSNorm(size, config.norm_eps, config.norm)


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
            self.q_norm = norm_of(c, N * H if c.qk_norm_over_heads else H)
            self.k_norm = norm_of(c, K * H if c.qk_norm_over_heads else H)
        if c.sinks:
            self.sinks = self.param("sinks", logical(nn.initializers.zeros_init(), ("heads",)), (N,))

    def __call__(self, x: Array, cossin: Cossin | None, attend: Attend) -> tuple[Array, Any]:
        c = self.config
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if c.qk_norm and c.qk_norm_over_heads:
            q, k = (
                norm(y.reshape(*y.shape[:2], -1)).reshape(y.shape) for norm, y in ((self.q_norm, q), (self.k_norm, k))
            )
        elif c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if cossin is not None:
            q, k = (rotate(y, cossin, interleaved=c.rope_interleaved) for y in (q, k))
        attended, extra = attend(q, k, v, self.sinks if c.sinks else None)
        return self.o_proj(attended), extra


class MLP(nn.Module):
    config: ModelConfig

    def setup(self):
        c = self.config
        D, F = c.hidden_size, c.intermediate_size
        if c.gated:
            self.gate_proj = Dense(c, "btd,df->btf", (D, F), ("embed", "mlp"), c.mlp_bias)
        self.up_proj = Dense(c, "btd,df->btf", (D, F), ("embed", "mlp"), c.mlp_bias)
        self.down_proj = Dense(c, "btf,fd->btd", (F, D), ("mlp", "embed"), c.mlp_bias)

    def __call__(self, x: Array) -> Array:
        activation = ACTIVATIONS[self.config.activation]
        if self.config.gated:
            return self.down_proj(gated(activation, self.gate_proj(x), self.up_proj(x)))
        return self.down_proj(activation(self.up_proj(x)))


@partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def gated(activation: Callable[[Array], Array], gate: Array, up: Array) -> Array:
    """Backward computes the activation again: cheaper than to keep what its derivative is made of, three arrays more."""
    return activation(gate) * up
