"""Logprobs and entropy of the targets from hidden states, a few slots at a time.

The logits of a mini-batch in float32 are often larger than everything else together (16k targets x 152k words = 10 GB),
so they exist only a chunk at a time, in the forward and in the backward pass. The number of chunks follows the slots
that are in use, at run time: short responses cost little and compile nothing new.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from .truncation import keep_with

# Logits [about this many, V] live at once. On a CPU few over all parts, for the cache; elsewhere many on each device: its
# matrix units want them, and with every chunk the gradient of the whole table is read and written.
CHUNK_ROWS = {"cpu": 128}
MANY_CHUNK_ROWS = 1024


def target_logprobs(
    hidden: Float[Array, "W T D"],
    table: Float[Array, "V D"],
    columns: Int[Array, "W S"],
    ids: Int[Array, "W S"],
    num_slots: Int[Array, ""],
    *,
    bias: Float[Array, "V"] | None = None,
    softcap: float = 0.0,
    temperature: float | Array = 1.0,
    keep: tuple[ArrayLike, ArrayLike] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, "W S"], Float[Array, "W S"], Float[Array, "W S"]]:
    """log p(id) under softmax(hidden[column] . table / temperature), that softmax's entropy, in nats, and the log of the
    mass in it of the tokens that `keep`, a top-k and a top-p, keeps (None: of all, zeros).

    log p(id) minus the last is the logprob in the truncated distribution. Which tokens are kept has no gradient.
    `bias` is added to the logits, and `softcap` bounds them, cap * tanh(logit / cap), before the temperature.
    The chunks that lie beyond `num_slots` (the most that any part uses) are not computed and come back as 0.
    """
    W, S = ids.shape
    chunk = chunk or chunk_slots(W, S, platform_of_mesh())
    padded = -(-S // chunk) * chunk
    columns, ids = (jnp.pad(x, ((0, 0), (0, padded - S))) for x in (columns, ids))
    out: Any = _chunked(hidden, table, bias, columns, ids, num_slots, jnp.float32(temperature), keep, softcap, chunk)
    logprobs, entropy, *log_kept = (x[:, :S] for x in out)
    return logprobs, entropy, log_kept[0] if log_kept else jnp.zeros_like(logprobs)


def chunk_slots(num_parts: int, num_slots: int, platform: str) -> int:
    """Slots of each part whose logits live at once."""
    most = CHUNK_ROWS[platform] // num_parts if platform in CHUNK_ROWS else MANY_CHUNK_ROWS
    return max(8, min(num_slots, most))


def platform_of_mesh() -> str:
    """What the program is compiled for: the devices of the mesh, which need not be those that are here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _slice(x: Array, i: Array, chunk: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)


def _put(x: Array, value: Array, i: Array, chunk: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, value, i * chunk, axis=1)


def _take(hidden: Float[Array, "W T D"], columns: Int[Array, "W C"]) -> Float[Array, "W C D"]:
    return jnp.take_along_axis(hidden, columns[..., None], axis=1)


def _logits(hidden: Float[Array, "W C D"], table: Float[Array, "V D"], bias, softcap: float) -> Float[Array, "W C V"]:
    """Before the temperature."""
    logits = jnp.einsum("wcd,vd->wcv", hidden, table, preferred_element_type=jnp.float32)
    logits = nn.with_logical_constraint(logits, ("rows", None, "vocab"))
    logits = logits if bias is None else logits + bias.astype(jnp.float32)
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


@partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _chunked(hidden, table, bias, columns, ids, num_slots, temperature, keep, softcap, chunk):
    return _forward(hidden, table, bias, columns, ids, num_slots, temperature, keep, softcap, chunk)[0]


def _forward(hidden, stored_table, bias, columns, ids, num_slots, temperature, keep, softcap, chunk):
    table = nn.with_logical_constraint(stored_table.astype(hidden.dtype), ("vocab", None))

    def body(i, out):
        token = _slice(ids, i, chunk)
        logits = _logits(_take(hidden, _slice(columns, i, chunk)), table, bias, softcap) / temperature
        largest = logits.max(axis=-1)
        weights = jnp.exp(logits - largest[..., None])
        mass = weights.sum(axis=-1)
        lse = largest + jnp.log(mass)
        entropy = lse - (weights * logits).sum(axis=-1) / mass
        # A sum over the word axis rather than a gather: on a mesh that axis is split over `tensor`.
        chosen = jnp.arange(table.shape[0]) == token[..., None]
        logprob = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1) - lse
        found = [lse, logprob, entropy]
        if keep is not None:
            found.append(jax.nn.logsumexp(keep_with(token, logits, *keep), axis=-1) - lse)
        return [_put(x, y, i, chunk) for x, y in zip(out, found, strict=True)]

    start = [jnp.zeros(ids.shape, jnp.float32)] * (3 if keep is None else 4)
    lse, *out = jax.lax.fori_loop(0, -(-num_slots // chunk), body, start)
    return tuple(out), (hidden, table, stored_table, bias, columns, ids, num_slots, temperature, keep, lse, out)


def _backward(softcap, chunk, saved, grads):
    hidden, table, stored_table, bias, columns, ids, num_slots, temperature, keep, lse, (_, entropy, *log_kept) = saved
    # Part by part: indexed with their numbers, the parts of a mesh would be gathered on every device.
    add_at = jax.vmap(lambda x, columns, g: x.at[columns].add(g))

    def body(i, carry):
        d_hidden, table_by_part, bias_by_part = carry
        column, token = _slice(columns, i, chunk), _slice(ids, i, chunk)
        h = _take(hidden, column)
        logits = _logits(h, table, bias, softcap)
        scaled, log_mass = logits / temperature, _slice(lse, i, chunk)[..., None]
        log_p = scaled - log_mass
        g_logprob, g_entropy, *g_kept = (_slice(g, i, chunk)[..., None] for g in grads)
        # d logprob / d logits = [chosen] - p;   d entropy / d logits = -p (log p + entropy)
        d_logits = -jnp.exp(log_p) * (g_logprob + g_entropy * (log_p + _slice(entropy, i, chunk)[..., None]))
        chosen = jnp.arange(table.shape[0]) == token[..., None]
        d_logits = jnp.where(chosen, d_logits + g_logprob, d_logits)
        if keep is not None:  # d log_kept / d logits = [kept] p / mass - p
            log_mass += _slice(log_kept[0], i, chunk)[..., None]
            log_q = keep_with(token, scaled, *keep) - log_mass
            d_logits += g_kept[0] * (jnp.exp(log_q) - jnp.exp(log_p))
        d_logits /= temperature
        if softcap:
            d_logits *= 1 - (logits / softcap) ** 2
        if bias is not None:
            bias_by_part += d_logits.sum(axis=1)
        d_logits = d_logits.astype(table.dtype)
        d_h = jnp.einsum("wcv,vd->wcd", d_logits, table, preferred_element_type=jnp.float32)
        table_by_part += jnp.einsum("wcd,wcv->wdv", h, d_logits, preferred_element_type=jnp.float32)
        return add_at(d_hidden, column, d_h), table_by_part, bias_by_part

    # The table's gradient of each part by itself, and transposed: added up over a mesh once, not with every chunk, and the
    # wide operand of its product is not the one that XLA transposes.
    W, (V, D) = len(ids), table.shape
    table_by_part = nn.with_logical_constraint(jnp.zeros((W, D, V), jnp.float32), ("rows", None, "vocab"))
    bias_by_part = None if bias is None else jnp.zeros((W, V), jnp.float32)
    start = jnp.zeros(hidden.shape, jnp.float32), table_by_part, bias_by_part
    d_hidden, table_by_part, bias_by_part = jax.lax.fori_loop(0, -(-num_slots // chunk), body, start)
    d_table = table_by_part.sum(axis=0).T.astype(stored_table.dtype)
    d_bias = None if bias is None else bias_by_part.sum(axis=0).astype(bias.dtype)
    return d_hidden.astype(hidden.dtype), d_table, d_bias, None, None, None, None, None


_chunked.defvjp(_forward, _backward)
