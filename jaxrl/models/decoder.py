"""The decoder: tokens of packed rows -> hidden states, its layers scanned; and the heads that read them.

Linen used as a function: `hidden_states(config, variables, rows)`. Everything outside `models/` sees plain trees of
arrays under the collections "params", "lora" (adapters) and "packed" (kernels in 4 bits).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from ..offload import to_device
from ..user_code import import_function
from .attention import ALL, ATTENTION, Where, scoring_of
from .block import DecoderLayer
from .config import ModelConfig, Run
from .layers import INIT, Dense, logical, norm_of
from .rope import rope_cossin

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
    """The token table [V, D], looked up at the bottom (and multiplied with at the top where it is tied).

    With it whatever else an architecture does before its first layer: learned positions, a scale, a norm, a projection.
    """

    config: ModelConfig

    def setup(self):
        c = self.config
        self.embedding = self.param("embedding", logical(INIT, ("vocab", "embed")), (c.vocab_size, c.table_size))
        if c.embed_size:
            self.project_in = Dense(c, "bte,ed->btd", (c.embed_size, c.hidden_size), (None, "embed"))
        if c.positions == "learned":
            shape = (c.max_position + c.position_offset, c.hidden_size)
            self.positions = self.param("positions", logical(INIT, (None, "embed")), shape)
        if c.embed_norm:
            self.norm = norm_of(c)

    def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        c = self.config
        table = nn.with_logical_constraint(self.embedding.astype(c.compute_dtype), ("vocab", None))
        x = nn.with_logical_constraint(table[tokens], ("rows", None, None))
        if c.embed_scale != 1:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        if c.embed_size:
            x = self.project_in(x)
        if c.positions == "learned":
            x += nn.with_logical_constraint(self.positions.astype(x.dtype), (None, None))[positions + c.position_offset]
        return self.norm(x) if c.embed_norm else x


class Head(nn.Module):
    """A matrix on top of the hidden states, applied by `logprobs.py` (language model) or `score` (value, reward)."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = False
    bias_dim: int = 1  # the dimension of outputs

    def setup(self):
        self.kernel = self.param("kernel", logical(INIT, self.axes), self.shape)
        if self.use_bias:
            dim = slice(self.bias_dim, self.bias_dim + 1)
            self.bias = self.param("bias", logical(nn.initializers.zeros_init(), self.axes[dim]), self.shape[dim])

    def __call__(self) -> Array:
        return self.kernel


class Decoder(nn.Module):
    """Embedding, L layers, final norm. `head` names what sits on top: "lm", or "score" for a critic or reward model.

    A user's own head or forward pass is a subclass, named by `config.module`: `setup_head` makes the modules on top,
    `touch_head` calls each of them once, `scores` is what they say of a hidden state, `__call__` is the way there, and
    `rows` and `axis_sizes` say under which names and in which shapes a checkpoint keeps the weights.
    """

    config: ModelConfig
    head: str = "lm"

    def setup(self):
        c = self.config
        self.embed_tokens = Embedding(c)
        for run in c.runs:
            setattr(self, run.name, DecoderLayer(c, run.is_sparse))
        if c.final_norm:
            self.norm = norm_of(c)
        if c.embed_size:
            self.project_out = Dense(c, "btd,de->bte", (c.hidden_size, c.embed_size), ("embed", None))
        self.setup_head()

    def setup_head(self):
        """The modules on top of the hidden states."""
        c = self.config
        if self.head == "score":
            self.score = Head((c.table_size, c.num_labels), ("embed", None), use_bias=c.score_bias)
        elif not c.tie_embeddings:
            self.lm_head = Head((c.vocab_size, c.table_size), ("vocab", "embed"), use_bias=c.lm_head_bias, bias_dim=0)

    def scores(self, hidden: Float[Array, "... D"]) -> Float[Array, "... C"]:
        """What the score head says of each hidden state, in float32."""
        scores = hidden.astype(jnp.float32) @ self.score().astype(jnp.float32)
        return scores + self.score.bias if self.config.score_bias else scores

    def touch_head(self) -> None:
        """Linen makes the weights of a module when it is first called, and heads are called outside."""
        if self.head == "score":
            self.scores(jnp.zeros((1, self.config.table_size)))
        elif not self.config.tie_embeddings:
            self.lm_head()

    @classmethod
    def rows(cls, config: ModelConfig, language_model: list) -> list:
        """Of a user's subclass: its rows of the name table (`weights.hf_names.Row`), given those of the language model."""
        raise ValueError(
            f"module {config.module} has no rows: say in it under which names a checkpoint has its weights"
        )

    @classmethod
    def axis_sizes(cls, config: ModelConfig) -> dict[str, int]:
        """What letters of its rows stand for that `weights.hf_names.axis_sizes` does not know."""
        return {}

    def __call__(
        self,
        tokens: Int[Array, "R T"],
        positions: Int[Array, "R T"],
        segments: Int[Array, "R T"],
        prefixes: Int[Array, "R T"],
    ) -> Float[Array, "R T D"]:
        if self.is_initializing():
            self.touch_head()
        x, where = self.embed(tokens, positions), Where(positions, segments, prefixes)
        for run in self.config.runs:
            x = self._layers(run, x, where)
        return self.finish(x)

    def embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.embed_tokens(tokens, positions)

    def finish(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The last layer's output as its head reads it."""
        c = self.config
        x = self.norm(x) if c.final_norm else x
        x = self.project_out(x) if c.embed_size else x
        return x * jnp.asarray(c.logit_scale, x.dtype) if self.head == "lm" and c.logit_scale != 1 else x

    def _layers(self, run: Run, x: Float[Array, "R T D"], where: Where) -> Float[Array, "R T D"]:
        """The layers of a run, scanned. Where they differ by numbers, these are inputs of the scan."""
        c = self.config
        ropes = list(dict.fromkeys(c.rope_of(layer) for layer in run.layers))
        cossins = [
            None if rope is None else rope_cossin(rope, c.head_dim, where.positions, c.context) for rope in ropes
        ]
        differing = _differing(c, run, ropes)
        if "rope" in differing:
            cossin = _stacked(cossins)
        else:
            (cossin,) = cossins
        scoring = scoring_of(c, run.layers[0])

        def body(layer, x, numbers):
            x = nn.with_logical_constraint(x, ("rows", None if c.shard_tokens == "none" else "tokens", None))
            own = jax.tree.map(lambda angles: angles[numbers["rope"]], cossin) if "rope" in numbers else cossin
            scores = scoring._replace(**{name: numbers[name] for name in ("window", "scale") if name in numbers})

            def attend(q, k, v, sinks):
                if c.shard_tokens == "attention":  # each device its own queries, against the keys of the whole row
                    q = nn.with_logical_constraint(q, ("rows", "tokens", None, None))
                    k, v = (nn.with_logical_constraint(x, ("rows", None, None, None)) for x in (k, v))
                return ATTENTION[c.attention](q, k, v, where, scores._replace(sinks=sinks)), None

            return layer(checkpoint_name(x, "layer_input"), own, attend)

        if not self.is_initializing():  # weights may wait in host memory: a layer's come when it is computed
            body = nn.map_variables(body, "params", trans_in_fn=to_device)
        if c.remat != "none":
            body = nn.remat(body, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        scan = nn.scan(
            body,
            variable_axes={"params": 0, "lora": 0, "packed": 0},
            split_rngs={"params": True},
            length=len(run.layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(getattr(self, run.name), x, differing)[0]


def _differing(config: ModelConfig, run: Run, ropes: list) -> dict[str, Array]:
    """The numbers by which the layers of a run differ, an entry a layer; those that are alike are left out."""
    scorings = [scoring_of(config, layer) for layer in run.layers]
    numbers = {
        "rope": [ropes.index(config.rope_of(layer)) for layer in run.layers],
        "window": [scoring.window or ALL for scoring in scorings],
        "scale": [scoring.scale for scoring in scorings],
    }
    return {name: jnp.array(values) for name, values in numbers.items() if len(set(values)) > 1}


def _stacked(cossins: list) -> tuple[Array, Array]:
    """The cosines and sines of several ropes; a layer without positions turns nothing."""
    cos, sin = next(cossin for cossin in cossins if cossin is not None)
    still = jnp.ones_like(cos), jnp.zeros_like(sin)
    cosines, sines = zip(*[cossin or still for cossin in cossins], strict=True)
    return jnp.stack(cosines), jnp.stack(sines)


@cache
def _user_class(name: str) -> type[Decoder]:
    found = import_function(name, "module")
    if not (isinstance(found, type) and issubclass(found, Decoder)):
        raise ValueError(f"module {name} is not a subclass of jaxrl.models.decoder.Decoder")
    return found


def decoder_class(config: ModelConfig) -> type[Decoder]:
    """`Decoder`, or the user's subclass that the config names."""
    return Decoder if config.module is None else _user_class(config.module)


def abstract_params(config: ModelConfig, head: str = "lm") -> tuple[Tree, Tree]:
    """Shapes and logical axes of every weight, without making one: {"params", "lora", "packed"}, and the same of axes."""
    boxed = jax.eval_shape(lambda key: _init(config, head, key), jax.random.key(0))
    axes = nn.get_partition_spec(boxed)
    return nn.meta.unbox(boxed), axes


def init_params(config: ModelConfig, head: str, key: Array) -> Tree:
    """Fresh weights (normal, 0.02), for tests and for heads that a checkpoint does not hold."""
    return nn.meta.unbox(_init(config, head, key))


def _init(config: ModelConfig, head: str, key: Array) -> Any:
    tokens = jnp.ones((1, 2), jnp.int32)
    config = replace(
        config, attention="xla"
    )  # no weight depends on it, and a kernel wants its hardware and more tokens
    return decoder_class(config)(config, head).init(key, tokens, tokens, tokens, tokens)


def hidden_states(config: ModelConfig, variables: Tree, tokens, positions, segments, prefixes, head: str = "lm") -> Any:
    """[R, T] tokens -> [R, T, D] hidden states after the final norm."""
    params = variables["params"]
    own = {**_outside(config, params), **{run.name: params[run.name] for run in config.runs}}
    module = decoder_class(config)(config, head)
    return module.apply({**variables, "params": own}, tokens, positions, segments, prefixes)


def embed(config: ModelConfig, params: Tree, tokens, positions) -> Any:
    """[B, T, D], what the first layer reads; `params` may lack the layers."""
    return Decoder(config).apply({"params": params}, tokens, positions, method="embed")


def finish(config: ModelConfig, params: Tree, x: Float[Array, "B T D"]) -> Any:
    """[B, T, D], the last layer's output as the language-model head reads it; `params` may lack the layers."""
    return Decoder(config).apply({"params": params}, x, method="finish")


def logits(config: ModelConfig, params: Tree, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """All logits at once, in float32: for a few tokens. `logprobs.py` makes them in chunks."""
    table = head_table(config, params).astype(hidden.dtype)
    out = jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
    bias, cap = head_bias(config, params), config.logit_softcap
    out = out if bias is None else out + bias
    return cap * jnp.tanh(out / cap) if cap else out


def head_bias(config: ModelConfig, params: Tree) -> Float[Array, "V"] | None:
    """The bias of the language-model head, where the architecture has one."""
    return to_device(params["lm_head"]["bias"]) if config.lm_head_bias else None


def head_table(config: ModelConfig, params: Tree) -> Float[Array, "V D"]:
    """The matrix that turns hidden states into logits: the language-model head, or the token table where tied."""
    return to_device(params["embed_tokens"]["embedding"] if config.tie_embeddings else params["lm_head"]["kernel"])


def score(config: ModelConfig, params: Tree, hidden: Float[Array, "... D"]) -> Any:
    """[..., C], the scores of a critic or reward model, in float32."""
    return decoder_class(config)(config, "score").apply({"params": _outside(config, params)}, hidden, method="scores")


def _outside(config: ModelConfig, params: Tree) -> Tree:
    """The weights outside of the layers, which bring their own to the device."""
    runs = [run.name for run in config.runs]
    return {name: to_device(part) for name, part in params.items() if name not in runs}
