"""A mixture of experts in place of the MLP: a router picks a few for every token, and weighs what they say.

Every expert computes every token, and what the router did not choose has weight 0. That is exact, drops no token, and
splits over a mesh by itself: over experts, or within each of them (`parallel.RULES`).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .config import ModelConfig
from .layers import INIT, Dense, gated, logical

_SWIGLU_ALPHA = 1.702  # of gpt-oss


class MixtureOfExperts(nn.Module):
    """Qwen3-MoE, Mixtral, gpt-oss: down_e(act(gate_e(x)) * up_e(x)), summed over the experts that a token is sent to."""

    config: ModelConfig

    def setup(self):
        c = self.config
        E, D, F = c.num_experts, c.hidden_size, c.expert_size
        self.router = Dense(c, "btd,de->bte", (D, E), ("embed", None), c.expert_bias)
        self.expert_gate = Experts("btd,edf->ebtf", (E, D, F), ("expert", "embed", "mlp"), c.expert_bias)
        self.expert_up = Experts("btd,edf->ebtf", (E, D, F), ("expert", "embed", "mlp"), c.expert_bias)
        self.expert_down = Experts("ebtf,efd->ebtd", (E, F, D), ("expert", "mlp", "embed"), c.expert_bias)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up = self.expert_gate(x), self.expert_up(x)
        limit = self.config.swiglu_limit
        if limit:
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
            hidden = (up + 1) * gate * nn.sigmoid(_SWIGLU_ALPHA * gate)
        else:
            hidden = gated(nn.silu, gate, up)
        weights = self._weights(self.router(x)).astype(x.dtype)
        return jnp.einsum("ebtd,bte->btd", self.expert_down(hidden), weights)

    def _weights(self, logits: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """How much of each expert a token takes: softmax over the chosen ones, or their part of that over all."""
        c = self.config
        logits = logits.astype(jnp.float32)
        top, chosen = jax.lax.top_k(logits, c.experts_per_token)
        weights = (
            jax.nn.softmax(top) if c.norm_topk else jnp.exp(top - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        )
        return jnp.einsum("btk,btke->bte", weights, jax.nn.one_hot(chosen, c.num_experts))


class Experts(nn.Module):
    """One matrix of every expert, [E, in, out]."""

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = False

    def setup(self):
        self.kernel = self.param("kernel", logical(INIT, self.axes), self.shape)
        if self.use_bias:
            bias_axes, shape = (self.axes[0], self.axes[2]), (self.shape[0], self.shape[2])
            self.bias = self.param("bias", logical(nn.initializers.zeros_init(), bias_axes), shape)

    def __call__(self, x: Array) -> Array:
        y = jnp.einsum(self.equation, x, self.kernel.astype(x.dtype))
        return y + self.bias.astype(x.dtype)[:, None, None] if self.use_bias else y
