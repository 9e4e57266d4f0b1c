"""One decoder layer: attention and MLP, the norms around them, and how their outputs join the residual stream."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from .config import ModelConfig
from .layers import MLP, Attend, SelfAttention, norm_of
from .moe import MixtureOfExperts
from .rope import Cossin


class DecoderLayer(nn.Module):
    """Llama's layer and its relatives; `is_sparse` is a layer of experts.

    Where `attend` answers for the last tokens alone, the rest of the layer goes on with these.
    """

    config: ModelConfig
    is_sparse: bool = False

    def setup(self):
        c = self.config
        if c.norms != "output":
            self.input_layernorm = norm_of(c)
        self.self_attn = SelfAttention(c)
        if c.norms != "output" and c.parallel != "one_norm":
            self.post_attention_layernorm = norm_of(c)  # what the MLP reads, as Llama calls it
        self.mlp = MixtureOfExperts(c) if self.is_sparse else MLP(c)
        if c.norms in ("both", "output"):
            self.attention_output_norm = norm_of(c)
            self.mlp_output_norm = norm_of(c)

    def __call__(self, x: Float[Array, "B T D"], cossin: Cossin | None, attend: Attend) -> tuple[Array, Any]:
        c = self.config
        if c.parallel != "no":
            normed = self.input_layernorm(x)
            attended, extra = self.self_attn(normed, cossin, attend)
            x, normed = _tail(x, attended), _tail(normed, attended)
            return x + attended + self.mlp(
                normed if c.parallel == "one_norm" else self.post_attention_layernorm(x)
            ), extra
        if c.norms == "after":
            attended, extra = self.self_attn(x, cossin, attend)
            x = self.input_layernorm(_tail(x, attended) + attended)
            return self.post_attention_layernorm(x + self.mlp(x)), extra
        attended, extra = self.self_attn(x if c.norms == "output" else self.input_layernorm(x), cossin, attend)
        x = self._add(_tail(x, attended), attended, "attention_output_norm")
        out = self.mlp(x if c.norms == "output" else self.post_attention_layernorm(x))
        return self._add(x, out, "mlp_output_norm"), extra

    def _add(self, x: Array, out: Array, norm: str) -> Array:
        """The residual sum, with what the architecture does to the output before it."""
        c = self.config
        if c.norms in ("both", "output"):
            out = getattr(self, norm)(out)
        return x + (out if c.residual_scale == 1 else c.residual_scale * out)


def _tail(x: Array, attended: Array) -> Array:
    return x[:, -attended.shape[1] :]
