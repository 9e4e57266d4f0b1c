"""A mixture of experts in place of the MLP: a router picks a few for every token, and weighs what they say.

The chosen experts alone compute, and no token is dropped: see `routed.py`.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .config import ModelConfig
from .layers import ACTIVATIONS, INIT, Dense, gated, logical, product
from .routed import Tree, routed

_SWIGLU_ALPHA = 1.702  # of gpt-oss


class MixtureOfExperts(nn.Module):
    """Qwen3-MoE, Mixtral, gpt-oss: down_e(act(gate_e(x)) * up_e(x)), summed over the experts that a token is sent to."""

    config: ModelConfig

    def setup(self):
        c = self.config
        E, D, F = c.num_experts, c.hidden_size, c.expert_size
        self.router = Dense(c, "btd,de->bte", (D, E), ("embed", None), c.expert_bias)
        self.expert_gate = Experts((E, D, F), ("expert", "embed", "mlp"), c.expert_bias)
        self.expert_up = Experts((E, D, F), ("expert", "embed", "mlp"), c.expert_bias)
        self.expert_down = Experts((E, F, D), ("expert", "mlp", "embed"), c.expert_bias)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        weights = {"gate": self.expert_gate(), "up": self.expert_up(), "down": self.expert_down()}
        chosen, share = self._choose(self.router(x))
        c = self.config
        return routed(partial(expert, c.activation, c.swiglu_limit), weights, x, chosen, share)

    def _choose(self, logits: Float[Array, "B T E"]) -> tuple[Int[Array, "B T C"], Float[Array, "B T C"]]:
        """The experts of each token, and how much of each it takes: softmax over these, or their part of that over all."""
        c = self.config
        logits = logits.astype(jnp.float32)
        top, chosen = jax.lax.top_k(logits, c.experts_per_token)
        if c.norm_topk:
            return chosen, jax.nn.softmax(top)
        return chosen, jnp.exp(top - jax.nn.logsumexp(logits, axis=-1, keepdims=True))


class Experts(nn.Module):
    """One matrix of every expert, [E, in, out], and biases [E, out]."""

    shape: tuple[int, int, int]
    axes: tuple[str, str, str]
    use_bias: bool = False

    def setup(self):
        self.kernel = self.param("kernel", logical(INIT, self.axes), self.shape)
        if self.use_bias:
            bias_axes, shape = (self.axes[0], self.axes[2]), (self.shape[0], self.shape[2])
            self.bias = self.param("bias", logical(nn.initializers.zeros_init(), bias_axes), shape)

    def __call__(self) -> Tree:
        return {"kernel": self.kernel, "bias": self.bias} if self.use_bias else {"kernel": self.kernel}


def expert(activation: str, swiglu_limit: float, weights: Tree, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """What one expert says; its weights are without the axis E. `swiglu_limit` is gpt-oss's, which has an activation of
    its own; 0: none.
    """

    def through(name: str, x: Array) -> Array:
        y = cast(Array, product(x, weights[name]["kernel"], 1))
        return y + weights[name]["bias"].astype(y.dtype) if "bias" in weights[name] else y

    gate, up = through("gate", x), through("up", x)
    if swiglu_limit:
        gate, up = jnp.minimum(gate, swiglu_limit), jnp.clip(up, -swiglu_limit, swiglu_limit)
        return through("down", (up + 1) * gate * nn.sigmoid(_SWIGLU_ALPHA * gate))
    return through("down", gated(ACTIVATIONS[activation], gate, up))
