"""The decoder: tokens of packed rows -> hidden states, its layers scanned; and the heads that read them.

Linen used as a function: `hidden_states(config, variables, rows)`. Everything outside `models/` sees plain trees of
arrays under the collections "params", "lora" (adapters) and "packed" (kernels in 4 bits).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ..offload import to_device
from .attention import ATTENTION
from .config import ModelConfig
from .layers import INIT, DecoderLayer, RMSNorm, logical, rope_cossin

Tree = dict[str, Any]

# What backward keeps of a layer: everything, the products with weights, or nothing but the layer's input.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names("product"),  # `Dense` names what it returns
    "full": jax.checkpoint_policies.nothing_saveable,
    # As "full", and the inputs wait in host memory.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Embedding(nn.Module):
    """The token table [V, D]: looked up at the bottom, and multiplied with at the top where it is tied."""

    config: ModelConfig

    def setup(self):
        c = self.config
        self.embedding = self.param("embedding", logical(INIT, ("vocab", "embed")), (c.vocab_size, c.hidden_size))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table = nn.with_logical_constraint(self.embedding.astype(self.config.compute_dtype), ("vocab", None))
        return nn.with_logical_constraint(table[tokens], ("rows", None, None))


class Head(nn.Module):
    """A matrix on top of the hidden states, applied by `logprobs.py` (language model) or `score` (value, reward)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = False

    def setup(self):
        self.kernel = self.param("kernel", logical(INIT, self.axes), self.shape)
        if self.use_bias:
            self.bias = self.param("bias", logical(nn.initializers.zeros_init(), self.axes[1:]), self.shape[1:])

    def __call__(self) -> Array:
        return self.kernel


class Decoder(nn.Module):
    """Embedding, L layers, final norm. `head` names what sits on top: "lm", or "score" for a critic or reward model."""

    config: ModelConfig
    head: str = "lm"

    def setup(self):
        c = self.config
        self.embed_tokens = Embedding(c)
        self.layers = DecoderLayer(c)
        self.norm = RMSNorm(c.hidden_size, c.norm_eps)
        if self.head == "score":
            self.score = Head((c.hidden_size, c.num_labels), ("embed", None), use_bias=c.score_bias)
        elif not c.tie_embeddings:
            self.lm_head = Head((c.vocab_size, c.hidden_size), ("vocab", "embed"))

    def __call__(
        self,
        tokens: Int[Array, "R T"],
        positions: Int[Array, "R T"],
        segments: Int[Array, "R T"],
        prefixes: Int[Array, "R T"],
    ) -> Float[Array, "R T D"]:
        c = self.config
        cossin = rope_cossin(c.rope, c.head_dim, positions)

        def attend(q, k, v):
            if c.shard_tokens == "attention":  # each device its own queries, against the keys of the whole row
                q = nn.with_logical_constraint(q, ("rows", "tokens", None, None))
                k, v = (nn.with_logical_constraint(x, ("rows", None, None, None)) for x in (k, v))
            return ATTENTION[c.attention](q, k, v, segments, prefixes), None

        def body(layer, x, _):
            x = nn.with_logical_constraint(x, ("rows", None if c.shard_tokens == "none" else "tokens", None))
            return layer(checkpoint_name(x, "layer_input"), cossin, attend)

        if not self.is_initializing():  # weights may wait in host memory: a layer's come when it is computed
            body = nn.map_variables(body, "params", trans_in_fn=to_device)
        if c.remat != "none":
            body = nn.remat(body, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        scan = nn.scan(
            body,
            variable_axes={"params": 0, "lora": 0, "packed": 0},
            split_rngs={"params": True},
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        if self.is_initializing() and (self.head == "score" or not c.tie_embeddings):
            (self.score if self.head == "score" else self.lm_head)()  # used outside; Linen makes what is touched
        x, _ = scan(self.layers, self.embed_tokens(tokens), None)
        return self.norm(x)


def abstract_params(config: ModelConfig, head: str = "lm") -> tuple[Tree, Tree]:
    """Shapes and logical axes of every weight, without making one: {"params", "lora", "packed"}, and the same of axes."""
    boxed = jax.eval_shape(lambda key: _init(config, head, key), jax.random.key(0))
    axes = nn.get_partition_spec(boxed)
    return nn.meta.unbox(boxed), axes


def init_params(config: ModelConfig, head: str, key: Array) -> Tree:
    """Fresh weights (normal, 0.02), for tests and for heads that a checkpoint does not hold."""
    return nn.meta.unbox(_init(config, head, key))


def _init(config: ModelConfig, head: str, key: Array) -> Tree:
    tokens = jnp.ones((1, 2), jnp.int32)
    return Decoder(config, head).init(key, tokens, tokens, tokens, tokens)


def hidden_states(config: ModelConfig, variables: Tree, tokens, positions, segments, prefixes, head: str = "lm"):
    """[R, T] tokens -> [R, T, D] hidden states after the final norm."""
    params = {name: part if name == "layers" else to_device(part) for name, part in variables["params"].items()}
    return Decoder(config, head).apply({**variables, "params": params}, tokens, positions, segments, prefixes)


def head_table(config: ModelConfig, params: Tree) -> Float[Array, "V D"]:
    """The matrix that turns hidden states into logits: the language-model head, or the token table where tied."""
    return to_device(params["embed_tokens"]["embedding"] if config.tie_embeddings else params["lm_head"]["kernel"])


def score(params: Tree, hidden: Float[Array, "... D"]) -> Float[Array, "... C"]:
    """The score head of a critic or reward model, in float32."""
    head = to_device(params["score"])
    scores = hidden.astype(jnp.float32) @ head["kernel"].astype(jnp.float32)
    return scores + head["bias"] if "bias" in head else scores
