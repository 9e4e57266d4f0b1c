"""What experts say of the tokens that were sent to them, a block of tokens of one expert at a time.

Pairs (token, expert) are sorted by expert, and a loop runs over as many blocks as there are: no expert has a capacity, no
token is dropped, the work is that of the chosen experts (rounded up to blocks), and nothing of the size of
[tokens x chosen, D] is ever made. Backward computes a block again. (`jax.lax.ragged_dot` would be the product for this;
on CPUs and NVIDIA GPUs jax 0.10 makes of it every expert on every token.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from .logprobs import platform_of_mesh
from .on_mesh import axes_along, compiler_axes

Tree = Any
Expert = Callable[[Tree, Float[Array, "N D"]], Float[Array, "N D"]]  # what one says; its weights are without the axis E

FEWEST_TOKENS = 16  # of a block
MOST_TOKENS = {"cpu": 256}  # for the cache; elsewhere a device wants much work at once
MOST_TOKENS_ELSEWHERE = 4096


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def routed(
    expert: Expert,
    weights: Tree,
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T C"],
    share: Float[Array, "B T C"],
) -> Float[Array, "B T D"]:
    """sum over c of share[b, t, c] * expert(weights of chosen[b, t, c], x[b, t]), added up in float32.

    The leaves of `weights` are [E, ...]; they travel and multiply in the dtype of x, and the gradient of kernels is summed
    in float32. On a mesh each device takes its own rows, and its share of the experts: see `Cut`.
    """
    return _forward(expert, weights, x, chosen, share)[0]


def _forward(expert, weights, x, chosen, share):
    cut = Cut.of_mesh(weights, x)
    outputs = partial(_outputs, expert, _num_experts(weights))
    (out,) = cut.run(outputs, _narrow(weights, x), (x, chosen, share), out=("rows",))
    return out.astype(x.dtype), (weights, x, chosen, share)


def _backward(expert, saved, g):
    weights, x, chosen, share = saved
    cut = Cut.of_mesh(weights, x)
    gradients = partial(_gradients, expert, _num_experts(weights))
    out = ("weights", "rows", "rows")
    d_weights, d_x, d_share = cut.run(gradients, _narrow(weights, x), (x, chosen, share, g), out=out)
    # The sum over devices is left to the compiler, which knows how its result is split.
    d_weights = jax.tree.map(lambda d, w: d.sum(axis=0).astype(w.dtype), d_weights, weights)
    return d_weights, d_x.astype(x.dtype), None, d_share.astype(share.dtype)


routed.defvjp(_forward, _backward)


class Blocks(NamedTuple):
    """The pairs (token, expert) of a device, sorted by expert and cut into blocks. A pair has the number t * C + c."""

    pairs: Int[Array, "pairs"]  # those of the first expert first
    pair_ends: Int[Array, "E"]  # how many pairs there are up to the end of each expert
    block_ends: Int[Array, "E"]  # how many blocks
    size: int

    @classmethod
    def of(cls, chosen: Int[Array, "B T C"], num_experts: int, size: int) -> Blocks:
        """Experts are numbered from 0; what other number a token chose is left out."""
        chosen = chosen.reshape(-1)
        chosen = jnp.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts)  # the rest: at the end
        counts = jnp.bincount(chosen, length=num_experts + 1)[:num_experts]
        return cls(jnp.argsort(chosen), jnp.cumsum(counts), jnp.cumsum(-(-counts // size)), size)

    def numbered(self, block: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, "size"]]:
        """The expert of a block, and its pairs; in empty slots a number that none has."""
        e = jnp.searchsorted(self.block_ends, block, side="right")
        first_pair, first_block = (jnp.where(e == 0, 0, ends[e - 1]) for ends in (self.pair_ends, self.block_ends))
        at = first_pair + (block - first_block) * self.size + jnp.arange(self.size)
        num = self.pairs.size
        return e, jnp.where(at < self.pair_ends[e], self.pairs[jnp.minimum(at, num - 1)], num)

    def loop(self, body: Callable, start: Tree) -> Tree:
        """`body(expert, pairs, carry)` over all of them."""
        return jax.lax.fori_loop(0, self.block_ends[-1], lambda i, carry: body(*self.numbered(i), carry), start)


def block_size(num_pairs: int, num_experts: int) -> int:
    """Half of what an expert gets on average, as a power of two: few slots of its last block are then empty."""
    half = max(1, num_pairs // (2 * num_experts))
    return max(
        FEWEST_TOKENS, min(1 << (half.bit_length() - 1), MOST_TOKENS.get(platform_of_mesh(), MOST_TOKENS_ELSEWHERE))
    )


# A token chooses an expert once, so the indices within a block are all different, and a sum has the order of the loop.
# Empty slots lie out of bounds: they read zeros, and what would be added to them is dropped.
def _take(x: Array, at: Int[Array, "size"]) -> Array:
    return x.at[at].get(mode="fill", fill_value=0)


def _add(x: Array, at: Int[Array, "size"], y: Array) -> Array:
    return x.at[at].add(y, mode="drop")


def _outputs(expert: Expert, num_experts: int, weights: Tree, x, chosen, share) -> tuple[Array]:
    """Of what one device has, in float32. `num_experts` are those of the layer."""
    C, tokens, shares = chosen.shape[-1], x.reshape(-1, x.shape[-1]), share.reshape(-1)
    blocks = Blocks.of(chosen, _num_experts(weights), block_size(chosen.size, num_experts))

    def body(e, pairs, out):
        y = expert(_weights_of(weights, e), _take(tokens, pairs // C))
        return _add(out, pairs // C, _take(shares, pairs)[:, None] * y)

    return (blocks.loop(body, jnp.zeros(tokens.shape, jnp.float32)).reshape(x.shape),)


def _gradients(expert: Expert, num_experts: int, weights: Tree, x, chosen, share, g) -> tuple[Tree, Array, Array]:
    """Of weights, as [1, E, ...], of x and of share; of what one device has, in float32."""
    C, tokens, shares = chosen.shape[-1], x.reshape(-1, x.shape[-1]), share.reshape(-1)
    blocks = Blocks.of(chosen, _num_experts(weights), block_size(chosen.size, num_experts))
    g = g.reshape(tokens.shape).astype(jnp.float32)

    def body(e, pairs, carry):
        d_weights, d_tokens, d_shares = carry
        # Weights in float32, so that their gradient is: `expert` multiplies in the dtype of x.
        wide = jax.tree.map(lambda w: w.astype(jnp.float32), _weights_of(weights, e))
        y, backward = jax.vjp(expert, wide, _take(tokens, pairs // C))
        g_y = _take(g, pairs // C)
        d_wide, d_x = backward((_take(shares, pairs)[:, None] * g_y).astype(y.dtype))
        d_weights = jax.tree.map(lambda total, d: total.at[e].add(d), d_weights, d_wide)
        return d_weights, _add(d_tokens, pairs // C, d_x), _add(d_shares, pairs, jnp.sum(g_y * y, axis=-1))

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (weights, tokens, shares))
    d_weights, d_tokens, d_shares = blocks.loop(body, zeros)
    return jax.tree.map(lambda d: d[None], d_weights), d_tokens.reshape(x.shape), d_shares.reshape(share.shape)


class Cut(NamedTuple):
    """How the work is cut over the mesh of the program: the mesh axes that split rows and experts.

    Where `tensor` does not divide the experts it splits the tokens of a row, if it can, and each device gets all weights.
    """

    rows: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()  # all that the compiler would split along; none: one device

    @classmethod
    def of_mesh(cls, weights: Tree, x: Float[Array, "B T D"]) -> Cut:
        axes = compiler_axes()
        if not axes:
            return cls()
        experts = axes_along("expert", _num_experts(weights))
        tokens = () if experts else axes_along("tokens", x.shape[1])
        return cls(axes_along("rows", x.shape[0]), tokens, experts, axes)

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

        of_rows = PartitionSpec(self.rows, self.tokens)
        specs = {"rows": of_rows, "weights": PartitionSpec((*self.rows, *self.tokens), self.experts)}
        return jax.shard_map(
            here, in_specs=(PartitionSpec(self.experts), *[of_rows] * len(by_rows)),
            out_specs=tuple(specs[word] for word in out), axis_names=set(self.axes), check_vma=False,
        )(weights, *by_rows)  # fmt: skip


def _num_experts(weights: Tree) -> int:
    return jax.tree.leaves(weights)[0].shape[0]


def _narrow(weights: Tree, x: Array) -> Tree:
    return jax.tree.map(lambda w: w.astype(x.dtype), weights)


def _weights_of(weights: Tree, e: Int[Array, ""]) -> Tree:
    return jax.tree.map(lambda w: w[e], weights)
