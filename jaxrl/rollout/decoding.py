"""The compiled programs of the JAX engine: read the prompts, draw tokens, move a batch into a smaller or longer cache.

The layers are those of training (`models/block.py`), called one by one with another `attend`. Decoding reads a separate
array for each layer: a slice of the stacked weights would be copied for every token.

On a mesh the sequences are split over `data` and `fsdp`, heads and vocabulary over `tensor`. The weights are whole on
every replica but for `tensor`: gathering them over `fsdp` for every token would cost more than all the rest.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from ..models import decoder
from ..models.attention import ATTENTION, Scoring, Where, scoring_of, softmax_weights
from ..models.block import DecoderLayer
from ..models.config import ModelConfig, Rope
from ..models.rope import Cossin, rope_cossin
from ..offload import to_device
from ..parallel import Program, num_row_shards, partition, replicated, rows_sharding, shardings
from .sampling import Rule, sample

Tree = Any
CHUNK = 16  # the most tokens between two looks from the host
Cache = list[tuple[Array, Array]]  # of every layer: keys [B K H C] and values [B K C H] of C columns


class Batch(NamedTuple):
    """B sequences under way. Prompts end in the same column, so every sequence draws into the same one."""

    keys: Any  # [B] random keys, each sequence's own
    starts: Int[Any, "B"]  # the column of the prompt's first token
    last: Int[Any, "B"]  # the token drawn last
    done: Bool[Any, "B"]
    ids: Int[Any, "B CHUNK"]  # drawn since the host last looked
    logprobs: Float[Any, "B CHUNK"]
    counts: Int[Any, "B"]  # how many of them a sequence drew before it was done
    taken: Int[Any, ""]  # columns of `ids` in use


class Programs:
    """What the engine runs, for one model on one mesh. A program is compiled for each shape that it meets."""

    def __init__(self, config: ModelConfig, mesh: Mesh):
        self.config, self.mesh, self.shards = config, mesh, num_row_shards(mesh)
        rows, head_shape = rows_sharding(mesh), (self.shards, config.num_kv_heads, 1, 1)
        self.rows = rows
        self.layers = [DecoderLayer(config, run.is_sparse) for run in config.runs for _ in run.layers]
        self.heads = NamedSharding(mesh, partition(mesh, ("rows", "kv_heads", None, None), head_shape))
        batch = Batch(*[rows] * 7, taken=replicated(mesh))
        cache = [(self.heads, self.heads)] * config.num_layers
        self.unstack = jax.jit(partial(_unstack, config), out_shardings=_weight_shardings(config, mesh))
        self.begin = Program(mesh, self._begin, static_argnames=("room",), out_shardings=(batch, cache))
        self.decode = Program(mesh, self._decode, donate_argnames=("cache",), out_shardings=(batch, cache))
        self.keep = jax.jit(self._keep, out_shardings=(batch, cache))
        self.lengthen = jax.jit(_lengthen, static_argnames=("columns",), out_shardings=cache)

    def _begin(
        self,
        weights: Tree,
        tokens: Int[Array, "M P T"],  # prompts, padded on the left, M times P of them
        lengths: Int[Array, "M P"],
        source: Int[Array, "B"],  # the prompt of each sequence, counted over M and P within its shard of the mesh
        uids: Int[Array, "B 2"],
        done: Bool[Array, "B"],
        seed: Int[Array, ""],
        rule: Rule,
        *,
        room: int,  # columns of the cache for what will be drawn
    ) -> tuple[Batch, Cache]:
        """Read every prompt once, hand its cache to all its sequences, and draw their first token."""
        T = tokens.shape[2]
        hidden, prompt_cache = jax.lax.map(lambda prompts: self._read(weights, *prompts), (tokens, lengths))

        def of_sequences(x: Array, spec: PartitionSpec = self.rows.spec) -> Array:
            """From prompts to sequences. On each device from its own: else all would be gathered everywhere."""
            take = lambda x, source: x.reshape(-1, *x.shape[2:])[source]  # noqa: E731
            specs = (PartitionSpec(None, *spec), self.rows.spec)
            return jax.shard_map(take, mesh=self.mesh, in_specs=specs, out_specs=spec)(x, source)

        of_heads = partial(of_sequences, spec=self.heads.spec)
        cache = _lengthen([(of_heads(k), of_heads(v)) for k, v in prompt_cache], columns=T + room)
        key = jax.random.key(seed)
        B = source.shape[0]
        batch = Batch(
            keys=jax.vmap(lambda uid: jax.random.fold_in(jax.random.fold_in(key, uid[0]), uid[1]))(uids),
            starts=T - of_sequences(lengths),
            last=jnp.zeros(B, jnp.int32),
            done=done,
            ids=jnp.zeros((B, CHUNK), jnp.int32),
            logprobs=jnp.zeros((B, CHUNK)),
            counts=jnp.zeros(B, jnp.int32),
            taken=jnp.int32(0),
        )
        return self._draw(weights, batch, of_sequences(hidden), jnp.int32(0), rule), cache

    def _read(self, weights: Tree, tokens: Int[Array, "P T"], lengths: Int[Array, "P"]):
        """The hidden state [P, D] after each prompt, and the keys and values of its tokens."""
        c, T = self.config, tokens.shape[1]
        positions = jnp.arange(T) - (T - lengths)[:, None]
        segments = (positions >= 0).astype(jnp.int32)
        positions = jnp.maximum(positions, 0)
        where, cossins = Where(positions, segments, segments), _cossins(c, weights, positions)

        def attend(layer: int, q, k, v, sinks):
            scoring = scoring_of(c, layer)._replace(sinks=sinks)
            attended = ATTENTION[c.attention](q, k, v, where, scoring)
            # Of the last layer nobody reads the other tokens: its MLP need not either.
            return attended[:, -1:] if layer == c.num_layers - 1 else attended, (k, v)

        x, cache = self._embed(weights, tokens, positions), []
        for number, params in enumerate(weights["layers"]):
            out: Any = self.layers[number].apply(params, x, cossins[number], partial(attend, number))
            x, (k, v) = out
            cache.append((k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)))
        return x[:, -1], cache

    def _embed(self, weights: Tree, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return jax.lax.with_sharding_constraint(
            decoder.embed(self.config, weights["params"], tokens, positions), self.rows
        )

    def _draw(self, weights: Tree, batch: Batch, hidden: Float[Array, "B D"], step: Array, rule: Rule) -> Batch:
        """The next token of every sequence, number `step` of its response, from the last layer's output."""
        c, params = self.config, weights["params"]
        hidden = decoder.finish(c, params, hidden[:, None])[:, 0]
        logits = decoder.logits(c, params, hidden)
        # A sequence's random numbers are its own, whatever batch it sits in.
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, step)))(batch.keys)
        # Sampling walks along the vocabulary: each device has the whole of it, for its own sequences and for no others.
        rows = self.rows.spec
        local = jax.shard_map(
            sample, mesh=self.mesh, in_specs=(rows, rows, PartitionSpec()), out_specs=(rows, rows), check_vma=False
        )
        ids, logprobs = local(logits, uniform, rule)
        return batch._replace(
            last=ids,
            done=batch.done | jnp.isin(ids, rule.stop_ids),
            ids=batch.ids.at[:, batch.taken].set(ids),
            logprobs=batch.logprobs.at[:, batch.taken].set(logprobs),
            counts=batch.counts + ~batch.done,
            taken=batch.taken + 1,
        )

    def _decode(self, weights, batch: Batch, cache: Cache, rule: Rule, prompt_length, step, limit, leave):
        """Up to `limit` (at most CHUNK) more tokens, the first of them number `step` of the responses.

        Ends sooner when no shard of the mesh has more than `leave` sequences that are not done.
        """
        c = self.config
        batch = batch._replace(counts=jnp.zeros_like(batch.counts), taken=jnp.int32(0))
        columns, scorings = jnp.arange(cache[0][1].shape[2]), [scoring_of(c, n) for n in range(c.num_layers)]

        def more(carry):
            batch, _ = carry
            live = jnp.sum(~batch.done.reshape(self.shards, -1), axis=1).max()
            return (batch.taken < limit) & (live > leave)

        def one_token(carry):
            batch, cache = carry
            here = prompt_length + step + batch.taken - 1  # the column of the token drawn last
            positions = (here - batch.starts)[:, None]
            cossins = _cossins(c, weights, positions)
            mask = (columns >= batch.starts[:, None]) & (columns <= here)
            x, grown = self._embed(weights, batch.last[:, None], positions), []
            layers = zip(self.layers, weights["layers"], cossins, scorings, cache, strict=True)
            for layer, params, cossin, scoring, kv in layers:
                x, kv = layer.apply(params, x, cossin, partial(_attend_cache, *kv, scoring, mask, here - columns, here))
                grown.append(jax.lax.with_sharding_constraint(kv, self.heads))
            return self._draw(weights, batch, x[:, 0], step + batch.taken, rule), grown

        return jax.lax.while_loop(more, one_token, (batch, cache))

    def _keep(self, batch: Batch, cache: Cache, keep: Int[Array, "B"]) -> tuple[Batch, Cache]:
        """The sequences `keep`, counted within their shard of the mesh: none moves to another device."""
        rows, heads = self.rows.spec, self.heads.spec
        specs = (Batch(*[rows] * 7, taken=PartitionSpec()), [(heads, heads)] * self.config.num_layers)

        def local(batch, cache, keep):
            taken = batch.taken
            batch, cache = jax.tree.map(lambda x: x[keep], (batch._replace(taken=keep), cache))
            return batch._replace(taken=taken), cache

        return jax.shard_map(local, mesh=self.mesh, in_specs=(*specs, rows), out_specs=specs)(batch, cache, keep)


def _unstack(config: ModelConfig, variables: Tree) -> Tree:
    """Per-layer arrays in the compute dtype; norms and the rest as they are. Copies all, the engine's own.

    With them go cosines and sines of every position, 8 bytes for each pair of features that turns (67 MB for 131,072
    positions and heads of 128): where a program computes them, XLA on a CPU does so anew in every layer for every head.
    """

    variables = to_device(variables)

    def own(x: Array) -> Array:
        # Explicitly a copy: jit would hand back an array that does not change, and training donates it.
        return x.astype(config.compute_dtype) if x.ndim > 1 and x.dtype != config.compute_dtype else jnp.copy(x)

    layers = []
    for run in config.runs:
        trees = {name: tree[run.name] for name, tree in variables.items() if run.name in tree}
        packed = trees.pop("packed", None)  # stays in 4 bits: a layer turns its kernels into numbers at every use
        for i in range(len(run.layers)):
            layer = jax.tree.map(lambda x, i=i: own(x[i]), trees)
            layers.append(
                layer if packed is None else {**layer, "packed": jax.tree.map(lambda x, i=i: jnp.copy(x[i]), packed)}
            )
    positions = jnp.arange(config.context)[None]
    turns = partial(rope_cossin, head_dim=config.head_dim, positions=positions, length=config.context)
    cossins = [rope and tuple(x[0] for x in turns(rope)) for rope in _ropes_once(config)]
    outside = jax.tree.map(own, _outside_layers(config, variables["params"]))
    return {"layers": layers, "params": outside, "cossins": cossins}


def _outside_layers(config: ModelConfig, params: Tree) -> Tree:
    """What is below the first layer and above the last."""
    return {name: tree for name, tree in params.items() if name not in [run.name for run in config.runs]}


def _weight_shardings(config: ModelConfig, mesh: Mesh) -> Tree:
    """Where `_unstack` puts the weights: split as in training, but over the axis `tensor` alone."""

    def of_layer(sharding: NamedSharding) -> NamedSharding:
        return over_tensor(PartitionSpec(*sharding.spec[1:]))

    def over_tensor(spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*["tensor" if axes and "tensor" in axes else None for axes in spec]))

    trees = shardings(mesh, *decoder.abstract_params(config))
    layers = []
    for run in config.runs:
        layer = {name: jax.tree.map(of_layer, tree[run.name]) for name, tree in trees.items() if run.name in tree}
        layers += [layer] * len(run.layers)
    outside = _outside_layers(config, trees["params"])
    cossins = [rope and (replicated(mesh), replicated(mesh)) for rope in _ropes_once(config)]
    return {"layers": layers, "params": jax.tree.map(lambda s: over_tensor(s.spec), outside), "cossins": cossins}


def _cossins(config: ModelConfig, weights: Tree, positions: Int[Array, "B T"]) -> list[Cossin | None]:
    """The angles of each layer; layers that are alike share them."""
    tables = dict(zip(_ropes_once(config), weights["cossins"], strict=True))
    cossins = {rope: jax.tree.map(lambda table: table[positions], pair) for rope, pair in tables.items()}
    return [cossins[config.rope_of(layer)] for layer in range(config.num_layers)]


def _ropes_once(config: ModelConfig) -> list[Rope | None]:
    """Those of the layers, each once."""
    return list(dict.fromkeys(config.rope_of(layer) for layer in range(config.num_layers)))


def _attend_cache(keys, values, scoring: Scoring, mask, distance, column, q, k, v, sinks):
    """One query a sequence against its cache, its own key and value written into `column` first.

    `mask` [B C] says which columns are of the sequence, `distance` [C] how many tokens back each of them is.
    """
    B, _, N, H = q.shape
    K = keys.shape[1]
    # Keys lie with their columns last: on a CPU the products with the queries then take half the time.
    keys = jax.lax.dynamic_update_slice_in_dim(keys, k.transpose(0, 2, 3, 1), column, axis=3)
    values = jax.lax.dynamic_update_slice_in_dim(values, v.swapaxes(1, 2), column, axis=2)
    q = q.reshape(B, K, N // K, H)
    scores = jnp.einsum("bkgh,bkhc->bkgc", q, keys, preferred_element_type=jnp.float32)
    weights = softmax_weights(scores, mask, distance[None], scoring._replace(sinks=sinks)).astype(values.dtype)
    return jnp.einsum("bkgc,bkch->bkgh", weights, values).reshape(B, 1, N, H), (keys, values)


def _lengthen(cache: Cache, *, columns: int) -> Cache:
    """The same cache with room for `columns`."""
    more = (0, columns - cache[0][1].shape[2])
    none = (0, 0)
    return [(jnp.pad(k, (none, none, none, more)), jnp.pad(v, (none, none, more, none))) for k, v in cache]
