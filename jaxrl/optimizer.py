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
    """AdamW (arXiv:1711.05101) on float32 master parameters, equal to torch's `clip_grad_norm_` and `AdamW`.

        g <- g * min(1, clip_grad / (|g| + 1e-6))        |g| over all arrays, in float32; clip_grad=None: as it is
        p <- p - lr * (m / (sqrt(v) + eps) + weight_decay * p)         m, v: Adam's moments of g, bias-corrected

    `update(grads, opt_state, params, lr)` gives the new parameters, the new state and the norm before clipping. Where
    that norm is not finite, parameters and state stay as they were; the caller sees it by the norm.

    `moments_dtype="bfloat16"` halves the optimizer's memory. The second moment is then rounded stochastically: it moves
    by a thousandth a step, less than bfloat16 can show, and rounded to nearest it would stay where it is.
    """
    if moments_dtype not in MOMENTS_DTYPES:
        raise ValueError(f"moments_dtype {moments_dtype!r} is not one of {', '.join(MOMENTS_DTYPES)}")
    beta1, beta2 = betas

    def init(params: Tree) -> OptState:
        _check_float32(params)
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

        def moment(decay: float, power: int, old: Tree) -> Tree:
            old = optax.tree.cast(old, jnp.float32)
            new = optax.tree.update_moment(grads, old, decay, power)
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        mu, nu = moment(beta1, 1, state.mu), moment(beta2, 2, state.nu)
        num_updates = state.num_updates + 1
        mu_hat, nu_hat = (optax.tree.bias_correction(m, beta, num_updates) for m, beta in ((mu, beta1), (nu, beta2)))
        lr = jnp.where(finite, lr, 0.0)
        new_params = jax.tree.map(
            lambda p, m, v: p - lr * (m / (jnp.sqrt(v) + eps) + weight_decay * p), params, mu_hat, nu_hat
        )
        if moments_dtype == "bfloat16":
            mu, nu = optax.tree.cast(mu, jnp.bfloat16), _round_stochastically(nu, num_updates)
        return new_params, OptState(jnp.where(finite, num_updates, state.num_updates), mu, nu), norm

    return Optimizer(init, update)


def abstract_state(optimizer: Optimizer, params: Tree) -> OptState:
    """Shapes and shardings of the state, from those of the parameters: moments live where their parameter lives.

    `params` holds `jax.ShapeDtypeStruct`s with shardings (or arrays). What this returns is what checkpoints restore
    onto, and its shardings are the `out_shardings` of `jax.jit(optimizer.init)`.
    """
    state = jax.eval_shape(optimizer.init, params)
    shardings = jax.tree.map(lambda p: p.sharding, params)
    first = jax.tree.leaves(shardings)[0]
    everywhere = NamedSharding(first.mesh, PartitionSpec()) if isinstance(first, NamedSharding) else first

    def place(leaf: Tree, sharding: Sharding) -> Tree:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return OptState(
        num_updates=place(state.num_updates, everywhere),
        mu=jax.tree.map(place, state.mu, shardings),
        nu=jax.tree.map(place, state.nu, shardings),
    )


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


def _check_float32(params: Tree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.dtype != jnp.float32:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"parameter {name} is {leaf.dtype}: trained parameters are kept in float32 (smaller types round small "
                "updates away), load it as float32 and let the model compute in bfloat16"
            )


def _round_stochastically(moments: Tree, num_updates: Array) -> Tree:
    """float32 -> bfloat16, up or down with the probability that keeps the expectation."""
    leaves, treedef = jax.tree.flatten(moments)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), num_updates), len(leaves))

    def one(x: Array, key: Array) -> Array:
        # bfloat16 is the upper half of float32: noise below the cut carries into it in proportion to what is cut off.
        noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
        upper = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
        return jax.lax.bitcast_convert_type(upper, jnp.float32).astype(jnp.bfloat16)

    return treedef.unflatten([one(x, key) for x, key in zip(leaves, keys, strict=True)])


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
