"""AdamW with gradient clipping, as torch computes it, and the learning-rate schedules of verl.

`update.py` calls `Optimizer.update` at the end of every mini-batch, inside its compiled step. The learning rate is an
argument, not a part of the state: like verl's, it moves once an RL step, so the trainer reads the schedule on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Float

from .offload import HOST_KIND, by_layer, lies_on_host, to_device, to_host, waiting

Tree = Any


class OptState(NamedTuple):
    """How many updates were made, and Adam's two moments: trees like the parameters."""

    num_updates: Array
    mu: Tree
    nu: Tree


class Optimizer(NamedTuple):
    """Two pure functions, to be used within `jax.jit`."""

    init: Callable[[Tree], OptState]
    update: Callable[[Tree, OptState, Tree, Float[Array, ""] | float], tuple[Tree, OptState, Float[Array, ""]]]


def make_optimizer(
    *,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    clip_grad: float | None = 1.0,
    moments_dtype: str = "float32",
) -> Optimizer:
    """AdamW (arXiv:1711.05101), on float32 parameters equal to torch's `clip_grad_norm_` and `AdamW`.

        g <- g * min(1, clip_grad / (|g| + 1e-6))        |g| over all arrays, in float32; clip_grad=None: as it is
        p <- p - lr * (m / (sqrt(v) + eps) + weight_decay * p)         m, v: Adam's moments of g, bias-corrected

    `update(grads, opt_state, params, lr)` gives the new parameters, the new state and the norm before clipping. Where
    that norm is not finite, parameters and state stay as they were; the caller sees it by the norm.

    `moments_dtype="bfloat16"` halves the optimizer's memory. The second moment is then rounded stochastically: it moves
    by a thousandth a step, less than bfloat16 can show, and rounded to nearest it would stay where it is. So are
    parameters that come in bfloat16: updates that are smaller than their last bit move them in the mean.
    """
    if moments_dtype not in MOMENTS_DTYPES:
        raise ValueError(f"moments_dtype {moments_dtype!r} is not one of {', '.join(MOMENTS_DTYPES)}")
    beta1, beta2 = betas

    def init(params: Tree) -> OptState:
        _check_dtypes(params)
        mu, nu = (optax.tree.zeros_like(params, dtype=moments_dtype) for _ in range(2))
        return OptState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        grads: Tree, state: OptState, params: Tree, lr: Float[Array, ""] | float
    ) -> tuple[Tree, OptState, Float[Array, ""]]:
        grads = optax.tree.cast(grads, jnp.float32)
        norm = optax.tree.norm(grads)
        if clip_grad is not None:
            scale = jnp.minimum(1.0, clip_grad / (norm + 1e-6))
            grads = jax.tree.map(lambda g: g * scale, grads)

        # The step is computed from the moments that are kept, so that XLA updates them in place; choosing between whole
        # old and new states at the end costs a fourth more time and a copy of the parameters.
        finite = jnp.isfinite(norm)
        num_updates = state.num_updates + 1
        lr = jnp.where(finite, lr, 0.0)
        corrections = 1 - beta1**num_updates, 1 - beta2**num_updates

        def step(g: Array, p: Array, m: Array, v: Array, key: Array) -> tuple[Array, Array, Array]:
            """One array, or one layer of it."""
            kept_as, p = p.dtype, p.astype(jnp.float32)
            m, v = m.astype(jnp.float32), v.astype(jnp.float32)
            m = jnp.where(finite, (1 - beta1) * g + beta1 * m, m)
            v = jnp.where(finite, (1 - beta2) * g**2 + beta2 * v, v)
            m_hat, v_hat = (x / correction for x, correction in zip((m, v), corrections, strict=True))
            p = p - lr * (m_hat / (jnp.sqrt(v_hat) + eps) + weight_decay * p)
            if moments_dtype == "bfloat16":
                m, v = m.astype(jnp.bfloat16), _round_stochastically(v, key)
            if kept_as == jnp.bfloat16:
                p = _round_stochastically(p, jax.random.fold_in(key, 1))
            return p, m, v

        def of_leaf(path: tuple, *arrays: Array) -> tuple[Array, Array, Array]:
            if not lies_on_host(arrays[2]):
                return step(*arrays)
            return _layer_by_layer(step, *arrays) if by_layer(path) else _whole(step, *arrays)

        leaves, treedef = jax.tree.flatten(grads)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), num_updates), len(leaves))
        stepped = jax.tree.map_with_path(of_leaf, grads, params, state.mu, state.nu, treedef.unflatten(list(keys)))
        params, mu, nu = jax.tree.transpose(treedef, jax.tree.structure((0, 0, 0)), stepped)
        return params, OptState(jnp.where(finite, num_updates, state.num_updates), mu, nu), norm

    return Optimizer(init, update)


def abstract_state(optimizer: Optimizer, params: Tree, *, on_host: bool = False) -> OptState:
    """Shapes and shardings of the state, from those of the parameters: moments are split as their parameter is.

    They live on the device, or with `on_host` wait in the memory of its host.

    `params` holds `jax.ShapeDtypeStruct`s with shardings (or arrays). What this returns is what checkpoints restore
    onto, and its shardings are the `out_shardings` of `jax.jit(optimizer.init)`.
    """
    state = jax.eval_shape(optimizer.init, params)
    shardings = jax.tree.map(lambda p: p.sharding, params)
    shardings = jax.tree.map(lambda s: s.with_memory_kind("device") if s.memory_kind == HOST_KIND else s, shardings)
    first = jax.tree.leaves(shardings)[0]
    everywhere = NamedSharding(first.mesh, PartitionSpec()) if isinstance(first, NamedSharding) else first

    def place(leaf: Tree, sharding: Sharding) -> Tree:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    mu, nu = (jax.tree.map(place, moments, shardings) for moments in (state.mu, state.nu))
    if on_host:
        mu, nu = waiting(mu), waiting(nu)
    return OptState(place(state.num_updates, everywhere), mu, nu)


def lr_schedule(
    kind: str,
    *,
    lr: float,
    total_steps: int,
    warmup_steps: int = -1,
    warmup_ratio: float = 0.0,
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Callable[[int], float]:
    """The learning rate of RL step 0, 1, ...: a linear warm-up from 0 to `lr`, then the shape that `kind` names.

    `constant` stays, `linear` and `cosine` end at `lr * min_lr_ratio` when `total_steps` are over and stay there.
    `num_cycles` counts cosine waves: 0.5 only falls. As in verl, a negative `warmup_steps` means that
    `warmup_ratio` of all steps are warm-up, and the first step of a warm-up has learning rate 0.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"lr_scheduler_type {kind!r} is not one of {', '.join(SCHEDULES)}")
    if not 0.0 <= min_lr_ratio <= 1.0:
        raise ValueError(f"min_lr_ratio {min_lr_ratio} must lie between 0 and 1")
    warmup = warmup_steps if warmup_steps >= 0 else int(warmup_ratio * total_steps)
    shape = SCHEDULES[kind]

    def at(step: int) -> float:
        if step < warmup:
            return lr * step / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return lr * shape(progress, min_lr_ratio, num_cycles)

    return at


def _check_dtypes(params: Tree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype not in (jnp.float32, jnp.bfloat16):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"parameter {name} is {leaf.dtype}: trained parameters are kept in float32, or in bfloat16, which is rounded "
                "stochastically"
            )


def _round_stochastically(x: Array, key: Array) -> Array:
    """float32 -> bfloat16, up or down with the probability that keeps the expectation."""
    # bfloat16 is the upper half of float32: noise below the cut carries into it in proportion to what is cut off.
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(upper, jnp.float32).astype(jnp.bfloat16)


def _whole(step: Callable, g: Array, p: Array, m: Array, v: Array, key: Array) -> tuple[Array, Array, Array]:
    """A step on moments that come from host memory and go back to it."""
    p, m, v = step(g, p, to_device(m), to_device(v), key)
    return p, to_host(m), to_host(v)


def _layer_by_layer(step: Callable, g: Array, p: Array, m: Array, v: Array, key: Array) -> tuple[Array, Array, Array]:
    """The same for arrays [L, ...], so that no more than a layer's moments are on the device."""

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        at = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)  # noqa: E731
        p, m, v = carry
        new = _whole(step, at(g), at(p), at(m), at(v), jax.random.fold_in(key, i))
        p, m, v = (jax.lax.dynamic_update_index_in_dim(x, n, i, 0) for x, n in zip(carry, new, strict=True))
        return p, m, v

    return jax.lax.fori_loop(0, g.shape[0], body, (p, m, v))


def _constant(progress: float, min_lr_ratio: float, num_cycles: float) -> float:
    return 1.0


def _linear(progress: float, min_lr_ratio: float, num_cycles: float) -> float:
    return 1.0 - (1.0 - min_lr_ratio) * progress


def _cosine(progress: float, min_lr_ratio: float, num_cycles: float) -> float:
    wave = 0.5 * (1.0 + math.cos(2.0 * math.pi * num_cycles * progress))
    return min_lr_ratio + (1.0 - min_lr_ratio) * wave


MOMENTS_DTYPES = ("float32", "bfloat16")
SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}
