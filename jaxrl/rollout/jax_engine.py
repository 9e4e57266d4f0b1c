"""The embedded engine: prefill once a prompt, then a compiled decode loop over a KV cache.

Prompts are padded on the left, so that every sequence writes its next token into the same column. Every few tokens the
host looks which sequences have ended; when half of them have, the others move into a smaller batch. Shapes come from a
closed set (powers of two and multiples of `BUCKET`), so a warm engine compiles nothing.

The layers are those of training (`models/layers.py`), called one by one with another `attend`. Decoding reads a separate
array for each layer: a slice of the stacked weights would be copied for every token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..batch import Prompt, Rollout
from ..models.attention import attention_xla
from ..models.config import ModelConfig
from ..models.layers import DecoderLayer, RMSNorm, rope_cossin
from .engine import Report, Sampling
from .sampling import sample

Tree = Any
BUCKET = 32  # prompt lengths and cache lengths are multiples of it
CHUNK = 16  # tokens between two looks from the host


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _power_of_two(x: int) -> int:
    return 1 << max(0, x - 1).bit_length()


class JaxEngine:
    """Generates with the trainer's own arrays, on the trainer's own devices."""

    def __init__(self, config: ModelConfig, *, max_num_seqs: int = 1024):
        self.config = config
        self.max_num_seqs = max_num_seqs
        self.version = -1
        self.weights: Tree = None
        self._unstack = jax.jit(partial(_unstack, config))
        self._begin = jax.jit(partial(_begin, config), static_argnames=("sampling", "cache_length"))
        self._decode = jax.jit(partial(_decode, config), static_argnames=("sampling",), donate_argnames=("cache",))
        self._compact = jax.jit(_compact)

    def update_weights(self, variables: Tree, version: int) -> None:
        self.weights = None  # before the new ones are made: never two copies
        self.weights = self._unstack(variables)
        self.version = version

    def close(self) -> None:
        self.weights = None

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, report: Report | None = None
    ) -> list[Rollout]:
        assert self.weights is not None, "generate before the first update_weights"
        report = report or (lambda finished, tokens: None)
        width = max(1, self.max_num_seqs // sampling.n)
        # Prompts of like length together: a batch is as long as its longest.
        order = sorted(range(len(prompts)), key=lambda p: len(prompts[p].token_ids))
        done: dict[int, list[Rollout]] = {}
        for start in range(0, len(order), width):
            chosen = order[start : start + width]
            finished = sum(map(len, done.values()))
            tokens = sum(len(r.token_ids) for group in done.values() for r in group)
            done |= self._generate_batch(
                prompts, chosen, sampling, seed, lambda f, t, f0=finished, t0=tokens: report(f0 + f, t0 + t)
            )
        return [rollout for p in range(len(prompts)) for rollout in done[p]]

    def _generate_batch(self, prompts, chosen: list[int], sampling: Sampling, seed: int, report: Report):
        num_prompts = _power_of_two(len(chosen))
        length = _round_up(max(len(prompts[p].token_ids) for p in chosen), BUCKET)
        tokens = np.zeros((num_prompts, length), np.int32)
        lengths = np.ones(num_prompts, np.int32)  # rows beyond the chosen hold one token and are done from the start
        for row, p in enumerate(chosen):
            ids = prompts[p].token_ids
            tokens[row, length - len(ids) :] = ids
            lengths[row] = len(ids)
        n, B = sampling.n, len(chosen) * sampling.n
        size = num_prompts * n
        # The random numbers of a sequence depend on its prompt's place and its own number, not on the batch around it.
        uids = np.array([p * n + i for p in chosen for i in range(n)] + [0] * (size - B), np.uint32)
        out_ids, out_logprobs = np.zeros((B, sampling.max_tokens), np.int32), np.zeros((B, sampling.max_tokens), np.float32)
        out_length = np.zeros(B, np.int32)
        cache_length = length + _round_up(sampling.max_tokens, BUCKET)
        key = jax.random.key(seed)
        state, cache = self._begin(self.weights, tokens, lengths, uids, np.arange(size) >= B, key, sampling, cache_length)
        owner = np.arange(size)  # the sequence in each slot; those from B on are empty
        filled = 0
        while True:
            ids, logprobs, counts, done, taken = jax.device_get(
                (state["ids"], state["logprobs"], state["counts"], state["done"], state["taken"])
            )
            real = owner < B
            here = slice(filled, filled + int(taken))
            out_ids[owner[real], here] = ids[real, : int(taken)]
            out_logprobs[owner[real], here] = logprobs[real, : int(taken)]
            out_length[owner[real]] += counts[real]
            filled += int(taken)
            live = np.flatnonzero(~done)
            report(B - int((~done[real]).sum()), int(out_length.sum()))
            if not len(live) or filled >= sampling.max_tokens:
                break
            smaller = max(_power_of_two(len(live)), min(8, size))
            if smaller < len(owner):
                keep = np.concatenate([live, np.flatnonzero(done)[: smaller - len(live)]])
                state, cache = self._compact(state, cache, keep)
                owner = np.where(done[keep], B, owner[keep])
            limit = min(CHUNK, sampling.max_tokens - filled)
            state, cache = self._decode(self.weights, state, cache, key, length + filled - 1, filled, limit, sampling=sampling)
        stops = set(sampling.stop_ids)
        rollouts: dict[int, list[Rollout]] = {p: [] for p in chosen}
        for b in range(B):
            ids = out_ids[b, : out_length[b]].copy()
            finished = len(ids) > 0 and int(ids[-1]) in stops
            p = chosen[b // n]
            rollouts[p].append(Rollout(p, ids, out_logprobs[b, : len(ids)].copy(), finished, self.version))
        return rollouts


def _unstack(config: ModelConfig, variables: Tree) -> Tree:
    """Per-layer arrays in the compute dtype; norms and the rest as they are."""

    def cast(x: Array) -> Array:
        return x.astype(config.compute_dtype) if x.ndim > 1 else x

    trees = {name: tree["layers"] for name, tree in variables.items() if tree}
    layers = [jax.tree.map(lambda x, i=i: cast(x[i]), trees) for i in range(config.num_layers)]
    params = variables["params"]
    weights = {"layers": layers, "norm": params["norm"], "embedding": cast(params["embed_tokens"]["embedding"])}
    if not config.tie_embeddings:
        weights["head"] = cast(params["lm_head"]["kernel"])
    return weights


def _logits(config: ModelConfig, weights: Tree, hidden: Array) -> Array:
    hidden = RMSNorm(config.hidden_size, config.norm_eps).apply({"params": weights["norm"]}, hidden)
    table = weights["embedding"] if config.tie_embeddings else weights["head"]
    return jnp.einsum("bd,vd->bv", hidden, table, preferred_element_type=jnp.float32)


def _uniform(key: Array, uids: Array, step: Array) -> Array:
    """A number in [0, 1) for every sequence and token, whatever batch it sits in."""
    return jax.vmap(lambda uid: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, uid), step)))(uids)


def _begin(config, weights, tokens, lengths, uids, done, key, sampling: Sampling, cache_length: int):
    """Prefill [P, T] prompts, repeat their caches n times, and draw the first token."""
    T = tokens.shape[1]
    start = T - lengths
    columns = jnp.arange(T)
    positions = jnp.maximum(columns - start[:, None], 0)
    real = columns >= start[:, None]
    mask = real[:, None, :] & (columns[:, None] >= columns)[None]
    cossin = rope_cossin(config.rope, config.head_dim, positions)

    def attend(q, k, v):
        return attention_xla(q, k, v, mask), (k, v)

    x = weights["embedding"][tokens]
    layer, cache = DecoderLayer(config), []
    for params in weights["layers"]:
        x, (k, v) = layer.apply(params, x, cossin, attend)
        grown = ((0, 0), (0, 0), (0, cache_length - T), (0, 0))
        cache.append(tuple(jnp.repeat(jnp.pad(c.swapaxes(1, 2), grown), sampling.n, axis=0) for c in (k, v)))
    logits = jnp.repeat(_logits(config, weights, x[:, -1]), sampling.n, axis=0)
    ids, logprobs = sample(logits, _uniform(key, uids, 0), sampling)
    size = ids.shape[0]
    blank = jnp.zeros((size, CHUNK))
    state = {
        "start": jnp.repeat(start, sampling.n),
        "uids": uids,
        "done": done | _is_stop(ids, sampling),
        "last": ids,
        "ids": blank.astype(jnp.int32).at[:, 0].set(ids),
        "logprobs": blank.at[:, 0].set(logprobs),
        "counts": (~done).astype(jnp.int32),
        "taken": jnp.int32(1),
    }
    return state, cache


def _is_stop(ids: Array, sampling: Sampling) -> Array:
    return jnp.isin(ids, jnp.array(sampling.stop_ids or (-1,), jnp.int32))


def _decode(config, weights, state, cache, key, column, step, limit, *, sampling: Sampling):
    """Up to `limit` (at most CHUNK) more tokens; `column` is that of the last token drawn, `step` the next one's number."""
    state = state | {"counts": jnp.zeros_like(state["counts"]), "taken": jnp.int32(0)}
    columns = jnp.arange(cache[0][0].shape[2])
    layer = DecoderLayer(config)

    def more(carry):
        state, _ = carry
        return (state["taken"] < limit) & ~jnp.all(state["done"])

    def one_token(carry):
        state, cache = carry
        here = column + state["taken"]
        cossin = rope_cossin(config.rope, config.head_dim, (here - state["start"])[:, None])
        mask = (columns >= state["start"][:, None]) & (columns <= here)
        x = weights["embedding"][state["last"]][:, None]
        grown = []
        for params, (keys, values) in zip(weights["layers"], cache, strict=True):
            x, kv = layer.apply(params, x, cossin, partial(_attend_cache, keys, values, mask, here))
            grown.append(kv)
        uniform = _uniform(key, state["uids"], step + state["taken"])
        ids, logprobs = sample(_logits(config, weights, x[:, 0]), uniform, sampling)
        live = ~state["done"]
        i = state["taken"]
        return state | {
            "done": state["done"] | _is_stop(ids, sampling),
            "last": jnp.where(live, ids, state["last"]),
            "ids": state["ids"].at[:, i].set(ids),
            "logprobs": state["logprobs"].at[:, i].set(logprobs),
            "counts": state["counts"] + live,
            "taken": i + 1,
        }, grown

    return jax.lax.while_loop(more, one_token, (state, cache))


def _attend_cache(keys, values, mask, column, q, k, v):
    """One query a sequence against its cache [B, K, S, H], its own key and value written into `column` first."""
    B, _, N, H = q.shape
    K = keys.shape[1]
    keys = jax.lax.dynamic_update_slice_in_dim(keys, k.swapaxes(1, 2), column, axis=2)
    values = jax.lax.dynamic_update_slice_in_dim(values, v.swapaxes(1, 2), column, axis=2)
    q = q.reshape(B, K, N // K, H)
    scores = jnp.einsum("bkgh,bksh->bkgs", q, keys, preferred_element_type=jnp.float32) / math.sqrt(H)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1).astype(values.dtype)
    return jnp.einsum("bkgs,bksh->bkgh", weights, values).reshape(B, 1, N, H), (keys, values)


def _compact(state, cache, keep):
    """The sequences `keep` in a batch of their own."""
    rows = {name: x if name == "taken" else x[keep] for name, x in state.items()}
    return rows, jax.tree.map(lambda c: c[keep], cache)
