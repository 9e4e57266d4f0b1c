"""What experts say of the tokens that were sent to them, a block of tokens of one expert at a time.

Pairs (token, expert) are sorted by expert, and a loop runs over as many blocks as there are: no expert has a capacity, no
token is dropped, the work is that of the chosen experts, and nothing of the size of [tokens x chosen, D] is ever made.
Backward computes a block again. (`jax.lax.ragged_dot` would be the product for this; on CPUs and NVIDIA GPUs XLA 0.10
makes of it every expert on every token.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from .logprobs import platform_of_mesh

Tree = Any
Expert = Callable[[Tree, Float[Array, "N D"]], Float[Array, "N D"]]  # what one says; its weights are without the axis E

MOST_TOKENS, FEWEST_TOKENS = 256, 16  # of a block
BLOCKS_AT_ONCE = {"cpu": 1}
MANY_BLOCKS_AT_ONCE = 16  # elsewhere, where one block is too little for a device


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def routed(
    expert: Expert,
    weights: Tree,
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T C"],
    share: Float[Array, "B T C"],
) -> Float[Array, "B T D"]:
    """sum over c of share[b, t, c] * expert(weights of chosen[b, t, c], x[b, t]), added up in float32.

    The leaves of `weights` are [E, ...]; they travel and multiply in the dtype of x, and their gradient is summed in
    float32. On a mesh each device takes its own rows, and of the experts its share where `tensor` divides their number.
    """
    return _forward(expert, weights, x, chosen, share)[0]


def _forward(expert, weights, x, chosen, share):
    narrow = jax.tree.map(lambda w: w.astype(x.dtype), weights)
    (out,) = Cut.of_mesh(weights, x).run(partial(_outputs, expert), narrow, (x, chosen, share), out=("rows",))
    return out.astype(x.dtype), (weights, narrow, x, chosen, share)


def _backward(expert, saved, g):
    weights, narrow, x, chosen, share = saved
    d_weights, d_x, d_share = Cut.of_mesh(weights, x).run(
        partial(_gradients, expert), narrow, (x, chosen, share, g), out=("weights", "rows", "rows")
    )
    # The sum over devices is left to the compiler, which knows how its result is split.
    d_weights = jax.tree.map(lambda d, w: d.sum(axis=0).astype(w.dtype), d_weights, weights)
    return d_weights, d_x.astype(x.dtype), None, d_share.astype(share.dtype)


routed.defvjp(_forward, _backward)


class Blocks(NamedTuple):
    """The pairs (token, expert) of a device, sorted by expert and cut into blocks. A pair has the number t * C + c."""

    pairs: Int[Array, "P"]  # those of the first expert first
    ends: Int[Array, "E"]  # where the pairs of each expert end
    last: Int[Array, "E"]  # how many blocks there are up to the end of each expert
    size: int

    @classmethod
    def of(cls, chosen: Int[Array, "B T C"], num_experts: int) -> Blocks:
        """Experts are numbered from 0; what other number a token chose is left out."""
        P = chosen.size
        size = min(MOST_TOKENS, max(FEWEST_TOKENS, 1 << (P // num_experts).bit_length()))
        known = jnp.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts).reshape(
            -1
        )  # the rest: at the end
        counts = jnp.bincount(known, length=num_experts + 1)[:num_experts]
        return cls(jnp.argsort(known), jnp.cumsum(counts), jnp.cumsum(-(-counts // size)), size)

    def numbered(self, m: Int[Array, "G"]) -> tuple[Int[Array, "G"], Int[Array, "G N"], Bool[Array, "G N"]]:
        """The expert of each of the blocks `m`, its pairs, and which of these it holds."""
        e = jnp.minimum(jnp.searchsorted(self.last, m, side="right"), len(self.last) - 1)
        pairs_before, blocks_before = (jnp.where(e == 0, 0, x[e - 1]) for x in (self.ends, self.last))
        at = (pairs_before + (m - blocks_before) * self.size)[:, None] + jnp.arange(self.size)
        inside = (at < self.ends[e][:, None]) & (m < self.last[-1])[:, None]
        return e, self.pairs[jnp.minimum(at, self.pairs.size - 1)], inside

    def loop(self, body: Callable, start: Tree) -> Tree:
        """`body(experts, pairs, inside, carry)` over all of them, a few at once."""
        few = BLOCKS_AT_ONCE.get(platform_of_mesh(), MANY_BLOCKS_AT_ONCE)

        def step(i, carry):
            return body(*self.numbered(i * few + jnp.arange(few)), carry)

        return jax.lax.fori_loop(0, -(-self.last[-1] // few), step, start)


def _outputs(expert: Expert, weights: Tree, x, chosen, share) -> tuple[Array]:
    """On one device, in float32."""
    C, tokens, shares = chosen.shape[-1], x.reshape(-1, x.shape[-1]), share.reshape(-1)

    def body(e, pairs, inside, out):
        y = jax.vmap(expert)(_of(weights, e), tokens[pairs // C])
        return out.at[pairs // C].add(jnp.where(inside, shares[pairs], 0.0)[..., None] * y)

    out = Blocks.of(chosen, _num_experts(weights)).loop(body, jnp.zeros(tokens.shape, jnp.float32))
    return (out.reshape(x.shape),)


def _gradients(expert: Expert, weights: Tree, x, chosen, share, g) -> tuple[Tree, Array, Array]:
    """Of weights, as [1, E, ...], of x and of share; on one device, in float32."""
    C, tokens, shares = chosen.shape[-1], x.reshape(-1, x.shape[-1]), share.reshape(-1)
    g = g.reshape(tokens.shape).astype(jnp.float32)

    def body(e, pairs, inside, carry):
        d_weights, d_tokens, d_shares = carry
        # Weights in float32, so that their gradient is: `expert` multiplies in the dtype of x.
        wide = jax.tree.map(lambda w: w.astype(jnp.float32), _of(weights, e))
        y, backward = jax.vjp(jax.vmap(expert), wide, tokens[pairs // C])
        g_y = g[pairs // C]
        d_wide, d_x = backward((jnp.where(inside, shares[pairs], 0.0)[..., None] * g_y).astype(y.dtype))
        d_share = jnp.where(inside, jnp.sum(g_y * y, axis=-1), 0.0)
        d_weights = jax.tree.map(lambda total, d: total.at[e].add(d), d_weights, d_wide)
        return d_weights, d_tokens.at[pairs // C].add(d_x), d_shares.at[pairs].add(d_share)

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (weights, tokens, shares))
    d_weights, d_tokens, d_shares = Blocks.of(chosen, _num_experts(weights)).loop(body, zeros)
    return jax.tree.map(lambda d: d[None], d_weights), d_tokens.reshape(x.shape), d_shares.reshape(share.shape)


class Cut(NamedTuple):
    """How the work is cut over the mesh of the program: the mesh axes that split rows, and experts."""

    rows: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()  # all that the compiler would split along; none: one device

    @classmethod
    def of_mesh(cls, weights: Tree, x: Float[Array, "B T D"]) -> Cut:
        mesh = jax.sharding.get_abstract_mesh()
        axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)
        if not axes:
            return cls()

        def along(word: str, size: int) -> tuple[str, ...]:
            names = tuple(name for name in _mesh_axes(word) if name in axes)
            return names if size % math.prod(mesh.shape[name] for name in names) == 0 else ()

        return cls(along("rows", len(x)), along("expert", _num_experts(weights)), axes)

    def run(self, function: Callable, weights: Tree, by_rows: tuple, *, out: tuple[str, ...]) -> tuple:
        """`function(weights, *by_rows)` on each device. `out` says of what it gives whether it is of rows or of weights."""
        if not self.axes:
            return function(weights, *by_rows)

        def here(weights, x, chosen, *more):
            first = jax.lax.axis_index(self.experts) * _num_experts(weights) if self.experts else 0
            given = function(weights, x, chosen - first, *more)
            parts = [word == "rows" and bool(self.experts) for word in out]  # what each expert adds to a row
            return tuple(
                jax.lax.psum(y, self.experts) if is_part else y for is_part, y in zip(parts, given, strict=True)
            )

        specs = {"rows": PartitionSpec(self.rows), "weights": PartitionSpec(self.rows, self.experts)}
        return jax.shard_map(
            here, in_specs=(PartitionSpec(self.experts), *[specs["rows"]] * len(by_rows)),
            out_specs=tuple(specs[word] for word in out), axis_names=set(self.axes), check_vma=False,
        )(weights, *by_rows)  # fmt: skip


def _mesh_axes(word: str) -> tuple[str, ...]:
    """What a word on an axis means here (`parallel.RULES`)."""
    axes: Any = nn.logical_to_mesh_axes((word,))
    return (axes[0],) if isinstance(axes[0], str) else axes[0] or ()


def _num_experts(weights: Tree) -> int:
    return jax.tree.leaves(weights)[0].shape[0]


def _of(weights: Tree, e: Int[Array, "G"]) -> Tree:
    return jax.tree.map(lambda w: w[e], weights)
