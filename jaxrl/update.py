"""Every compiled program of training: logprobs, values, and the steps of actor and critic.

A mini-batch arrives as micro-batches stacked on a leading axis [M, R, ...]; a loop with a trip count known at run time
adds up their gradients, so one program serves any number of micro-batches. Losses carry global normalisers
(`algorithms/losses.py`), so sums over micro-batches, rows and devices are the loss of the whole mini-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from .algorithms.choose import bind, choose
from .algorithms.kl import KL_ESTIMATORS
from .algorithms.losses import POLICY_LOSSES, clipped_value
from .batch import PackedRows, PolicyTargets, ValueTargets
from .compression import sum_over_replicas
from .models import decoder
from .models.config import ModelConfig
from .models.logprobs import target_logprobs
from .offload import to_device
from .optimizer import Optimizer, OptState
from .packing import Layout
from .parallel import (
    Program,
    fetch,
    num_row_shards,
    put_replicated,
    put_rows,
    replicated,
    rows_sharding,
    within_replica,
)

Tree = Any


class TrainState(NamedTuple):
    """What a role trains: the arrays its optimizer moves ("lora" where there are adapters, else "params")."""

    trained: Tree
    opt_state: OptState
    residual: Tree = ()  # of gradients that were compressed: what each replica has not sent yet


@dataclass(frozen=True)
class PolicyLoss:
    """The actor's objective (verl's names)."""

    name: str | Callable = "vanilla"
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_c: float | None = None  # None: the loss's own default
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    dro_beta: float = 0.05
    entropy_coeff: float = 0.0
    kl_loss_coef: float | None = None  # None: no KL to the reference; 0: measured and not in the loss
    kl_loss_type: str = "low_var_kl"
    temperature: float = 1.0  # how the engine samples: what is trained is the distribution that it draws from
    top_k: int = -1
    top_p: float = 1.0
    measure_gap: bool = False  # between old logprobs, which are the engine's, and those of this model

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


class TokenLogprobs(NamedTuple):
    """Of the targets."""

    logprobs: Float[np.ndarray, "B T"]  # in the whole distribution, after temperature
    entropy: Float[np.ndarray, "B T"]  # of that
    log_kept: Float[np.ndarray, "B T"]  # log of its mass that top-k and top-p keep; zeros where there are none

    @property
    def sampled(self) -> Float[np.ndarray, "B T"]:
        """In the distribution that an engine draws from."""
        return self.logprobs - self.log_kept


class Measured(NamedTuple):
    """What a step measures, by name: sums over trained tokens, losses as they are, and the gap to the engine."""

    sums: Tree
    losses: Tree
    gap_sums: Tree = {}  # noqa: RUF012 (never changed)
    gap_max: Tree = {}  # noqa: RUF012


class Compression(NamedTuple):
    """How gradients travel between replicas, the axis `data` of the mesh (`compression.py`)."""

    method: str = "none"
    kept: float = 0.01


NO_COMPRESSION = Compression()

# XLA for GPUs and TPUs would add up the gradients of the layers in a second copy, to sum them over replicas after the
# last layer: about as many bytes sent, the gradients twice on a device, and once more on the host that compiles. (The
# option takes the place of one of the same name in XLA_FLAGS.)
IN_PLACE = {"xla_disable_hlo_passes": "while-loop-all-reduce-code-motion"}


def _micro(tree: Tree, i: Array) -> Tree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _hidden(config: ModelConfig, variables: Tree, rows: PackedRows, head: str) -> Any:
    """[W, R/W x T, D]: where `target_columns` finds them."""
    with jax.named_scope("decoder"):
        hidden = decoder.hidden_states(
            config, variables, rows.tokens, rows.positions, rows.segments, rows.prefixes, head=head
        )
    return hidden.reshape(len(rows.target_columns), -1, hidden.shape[-1])


def _logprobs(
    config: ModelConfig, variables: Tree, rows: PackedRows, num_slots: Array, sampling: tuple, truncates: bool
):
    """(logprobs, entropy, log_kept) of the targets; `sampling` is (temperature, top_k, top_p)."""
    temperature, *keep = sampling
    hidden, params = _hidden(config, variables, rows, "lm"), variables["params"]
    with jax.named_scope("logprobs"):
        return target_logprobs(
            hidden, decoder.head_table(config, params), rows.target_columns, rows.target_ids, num_slots,
            bias=decoder.head_bias(config, params), softcap=config.logit_softcap, temperature=temperature,
            keep=tuple(keep) if truncates else None,
        )  # fmt: skip


def _values(config: ModelConfig, variables: Tree, rows: PackedRows) -> Array:
    hidden = _hidden(config, variables, rows, "score")
    picked = jnp.take_along_axis(hidden, rows.target_columns[..., None], axis=1)
    return decoder.score(config, variables["params"], picked)[..., 0]


class Programs(ABC):
    """The compiled programs of one role on one mesh: what actor and critic have in common."""

    Targets: type  # what its loss needs at each target

    def __init__(
        self, mesh: jax.sharding.Mesh, config: ModelConfig, optimizer: Optimizer | None, compression: Compression
    ):
        self.mesh, self.config, self.optimizer, self.compression = mesh, config, optimizer, compression
        self._compiled_step: Program | None = None

    def jit(self, function: Callable, **kwargs: Any) -> Program:
        return Program(self.mesh, function, **kwargs)

    def put(self, layout: Layout, extra: Tree = ()) -> tuple:
        """A layout and per-target arrays [M, W, S] on the device: (rows, extra, num_slots, num_micro_batches)."""
        rows, extra = put_rows(self.mesh, (layout.rows, extra), axis=1)
        counts = put_replicated(self.mesh, (layout.num_slots, np.int32(layout.num_micro_batches)))
        return rows, extra, *counts

    def abstract_put(self, shape: tuple[int, int, int]) -> tuple:
        """Shapes and shardings of what `put` gives for micro-batches [M, R, T] with this role's targets."""
        by_rows, whole = rows_sharding(self.mesh, axis=1), replicated(self.mesh)

        M, R, T = shape
        ways = num_row_shards(self.mesh)

        def per_token(dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=by_rows)

        def per_target(dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((M, ways, R // ways * T), dtype, sharding=by_rows)

        rows = PackedRows(*[per_token(np.int32)] * 4, *[per_target(np.int32)] * 4)
        rows = rows._replace(target_mask=per_target(np.bool_))
        targets = self.Targets(*[per_target(np.float32)] * len(self.Targets._fields))
        num_slots = jax.ShapeDtypeStruct(shape[:1], np.int32, sharding=whole)
        return rows, targets, num_slots, jax.ShapeDtypeStruct((), np.int32, sharding=whole)

    def step_program(self, state: TrainState) -> Program:
        """One optimizer update, in place of a state of these shapes and shardings."""
        if self._compiled_step is None:
            shardings = jax.tree.map(lambda x: x.sharding, state)  # comes back as it came, so that it compiles once
            is_compressed = self.compression.method != "none"
            specs = jax.tree.map(lambda x: x.spec, shardings.trained) if is_compressed else None
            self._compiled_step = self.jit(
                partial(self._step, specs), donate_argnums=0, out_shardings=(shardings, None),
                compiler_options=IN_PLACE if self.mesh.shape["data"] > 1 else None,
            )  # fmt: skip
        return self._compiled_step

    def lower_step(self, state: TrainState, frozen: Tree, shape: tuple[int, int, int]) -> jax.stages.Lowered:
        """`step` for states and weights of these shapes on micro-batches [M, R, T]."""
        lr = jax.ShapeDtypeStruct((), np.float32, sharding=replicated(self.mesh))
        return self.step_program(state).lower(state, frozen, *self.abstract_put(shape), lr)

    def step(
        self, state: TrainState, frozen: Tree, layout: Layout, targets: Tree, lr: float
    ) -> tuple[TrainState, Tree]:
        """One optimizer update on one mini-batch, in place of the old state.

        The metrics are those of `Measured`, and `grad_norm` before clipping; they stay on the device until they are
        asked for.
        """
        inputs = self.put(layout, targets)
        return self.step_program(state)(state, frozen, *inputs, put_replicated(self.mesh, np.float32(lr)))

    def _step(self, specs: Tree, state: TrainState, frozen, rows, targets, num_slots, num_micro, lr):
        trained = to_device(state.trained)  # whole: their gradients would else be added up in host memory
        compute, residual = partial(accumulate, self._token_losses), state.residual
        if self.compression.method == "none" or self.mesh.shape["data"] == 1:
            grads, measured = compute(trained, frozen, rows, targets, num_slots, num_micro)
        else:
            by_replica = of_each_replica(self.mesh, compute)
            grads, measured = by_replica(trained, frozen, rows, targets, num_slots, num_micro)
            grads, residual = sum_over_replicas(
                self.mesh, self.compression.method, grads, specs, residual, kept=self.compression.kept
            )
        assert self.optimizer is not None, "a role without an optimizer takes no steps"
        with jax.named_scope("optimizer"):
            trained, opt_state, grad_norm = self.optimizer.update(grads, state.opt_state, trained, lr)
        # An update of infinities is left out by the optimizer, and must not be sent the next time either.
        finite = jnp.isfinite(grad_norm)
        residual = jax.tree.map(lambda new, old: jnp.where(finite, new, old), residual, state.residual)
        return TrainState(trained, opt_state, residual), measured._asdict() | {"grad_norm": grad_norm}

    @abstractmethod
    def _token_losses(self, trained, frozen, rows, targets, num_slots) -> tuple[Array, Measured]:
        """The loss of a micro-batch, and what it measures."""


class Policy(Programs):
    """Logprobs and policy steps of the actor; logprobs of a reference are the same program with other variables."""

    Targets = PolicyTargets

    def __init__(
        self, mesh, config: ModelConfig, optimizer: Optimizer | None, loss: PolicyLoss,
        compression: Compression = NO_COMPRESSION,
    ):  # fmt: skip
        super().__init__(mesh, config, optimizer, compression)
        self.loss = loss
        self._logprobs = {truncates: self.jit(partial(self._all_logprobs, truncates)) for truncates in (False, True)}

    def logprobs(
        self, variables: Tree, layout: Layout, sampling: tuple[float, int, float] | None = None
    ) -> TokenLogprobs:
        """Of the targets, sampled as `loss` says or with another (temperature, top_k, top_p)."""
        c = self.loss
        temperature, top_k, top_p = (c.temperature, c.top_k, c.top_p) if sampling is None else sampling
        rows, _, num_slots, num_micro = self.put(layout)
        numbers = put_replicated(self.mesh, (np.float32(temperature), np.int32(top_k), np.float32(top_p)))
        truncates = top_k > 0 or top_p < 1
        out = fetch(self._logprobs[truncates](variables, rows, num_slots, num_micro, numbers))
        return TokenLogprobs(*map(layout.from_slots, out))

    def lower_logprobs(self, variables: Tree, shape: tuple[int, int, int]) -> jax.stages.Lowered:
        """The program of old logprobs."""
        rows, _, num_slots, num_micro = self.abstract_put(shape)
        whole, dtypes = replicated(self.mesh), (np.float32, np.int32, np.float32)
        sampling = tuple(jax.ShapeDtypeStruct((), dtype, sharding=whole) for dtype in dtypes)
        return self._logprobs[self.loss.truncates].lower(variables, rows, num_slots, num_micro, sampling)

    def _all_logprobs(self, truncates: bool, variables, rows, num_slots, num_micro, sampling):
        def body(i, out):
            result = _logprobs(self.config, variables, _micro(rows, i), num_slots[i], sampling, truncates)
            return tuple(o.at[i].set(r) for o, r in zip(out, result, strict=True))

        zeros = jnp.zeros(rows.target_ids.shape, jnp.float32)
        return jax.lax.fori_loop(0, num_micro, body, (zeros, zeros, zeros))

    def _token_losses(self, trained, frozen, rows: PackedRows, targets: PolicyTargets, num_slots):
        c = self.loss
        variables = merge(trained, frozen)
        sampling = (c.temperature, c.top_k, c.top_p)
        logprobs, entropy, log_kept = _logprobs(self.config, variables, rows, num_slots, sampling, c.truncates)
        sampled = logprobs - log_kept  # of the distribution that the engine draws from
        mask = rows.target_mask
        loss = bind(
            choose(POLICY_LOSSES, c.name, "policy loss"),
            clip_low=c.clip_low, clip_high=c.clip_high, clip_c=c.clip_c, tau_pos=c.tau_pos, tau_neg=c.tau_neg,
            dro_beta=c.dro_beta, rollout_weights=targets.rollout_weights, sequence_ids=rows.target_sequences,
        )  # fmt: skip
        token_loss, sums = loss(sampled, targets.old_logprobs, targets.advantages, mask)
        pg_loss = total = jnp.sum(token_loss * targets.loss_weights)
        entropy_loss = jnp.sum(jnp.where(mask, entropy, 0.0) * targets.term_weights)
        if c.entropy_coeff:
            total -= c.entropy_coeff * entropy_loss
        metrics = {**sums, "entropy": jnp.sum(jnp.where(mask, entropy, 0.0))}
        losses = {"pg_loss": pg_loss, "entropy_loss": entropy_loss}
        if c.kl_loss_coef is not None:
            kl = choose(KL_ESTIMATORS, c.kl_loss_type, "actor.kl_loss_type")(logprobs, targets.ref_logprobs)
            losses["kl_loss"] = jnp.sum(jnp.where(mask, kl, 0.0) * targets.term_weights)
            total += c.kl_loss_coef * losses["kl_loss"]
        gap = _gap(targets.old_logprobs, sampled, mask) if c.measure_gap else ({}, {})
        return total, Measured(metrics, losses, *gap)


class Critic(Programs):
    """Values and value steps."""

    Targets = ValueTargets

    def __init__(
        self, mesh, config: ModelConfig, optimizer: Optimizer | None, cliprange_value: float,
        compression: Compression = NO_COMPRESSION,
    ):  # fmt: skip
        super().__init__(mesh, config, optimizer, compression)
        self.cliprange_value = cliprange_value
        self._values = self.jit(self._all_values)

    def values(self, variables: Tree, layout: Layout) -> np.ndarray:
        """[B, T] values of the targets."""
        rows, _, _, num_micro = self.put(layout)
        return layout.from_slots(fetch(self._values(variables, rows, num_micro)))

    def lower_values(self, variables: Tree, shape: tuple[int, int, int]) -> jax.stages.Lowered:
        rows, _, _, num_micro = self.abstract_put(shape)
        return self._values.lower(variables, rows, num_micro)

    def _all_values(self, variables, rows, num_micro):
        def body(i, out):
            return out.at[i].set(_values(self.config, variables, _micro(rows, i)))

        return jax.lax.fori_loop(0, num_micro, body, jnp.zeros(rows.target_ids.shape, jnp.float32))

    def _token_losses(self, trained, frozen, rows: PackedRows, targets: ValueTargets, num_slots):
        del num_slots
        values = _values(self.config, merge(trained, frozen), rows)
        token_loss, sums = clipped_value(
            values, targets.old_values, targets.returns, rows.target_mask, clip=self.cliprange_value
        )
        loss = jnp.sum(token_loss * targets.loss_weights)
        sums = {**sums, "vpred_mean": jnp.sum(jnp.where(rows.target_mask, values, 0.0))}
        return loss, Measured(sums, {"vf_loss": loss})


def of_each_replica(mesh: jax.sharding.Mesh, compute: Callable) -> Callable:
    """`compute` (gradients and metrics of rows) by replica: gradients [data, ...], and the metrics of all together.

    Only the axis `data` is cut by hand; the compiler splits along the others as ever.
    """

    def local(trained, frozen, rows, targets, num_slots, num_micro):
        with within_replica():
            grads, measured = compute(trained, frozen, rows, targets, num_slots, num_micro)
        added = jax.lax.psum(measured, "data")._replace(gap_max=jax.lax.pmax(measured.gap_max, "data"))
        return jax.tree.map(lambda g: g[None], grads), added

    by_rows, whole, replicas = PartitionSpec(None, "data"), PartitionSpec(), PartitionSpec("data")
    return jax.shard_map(
        local, mesh=mesh, in_specs=(whole, whole, by_rows, by_rows, whole, whole), out_specs=(replicas, whole),
        axis_names={"data"}, check_vma=False,
    )  # fmt: skip


def merge(trained: Tree, frozen: Tree) -> Tree:
    """The variables of a model from what is trained and what is not: collections side by side."""
    return {**frozen, **trained}


def _gap(rollout_logprobs: Array, logprobs: Array, mask: Array) -> tuple[Tree, Tree]:
    """Sums, and the maximum, from which `metrics.gap_metrics` makes how far two models' probabilities lie apart."""
    rollout, ours = (jnp.where(mask, jnp.exp(x), 0.0) for x in (rollout_logprobs, jax.lax.stop_gradient(logprobs)))
    difference = jnp.abs(rollout - ours)
    columns = {"rollout": rollout, "ours": ours, "signed": rollout - ours, "gap": difference}
    sums = {name: x.sum() for name, x in columns.items()} | {f"{name}2": (x * x).sum() for name, x in columns.items()}
    return sums, {"gap": difference.max()}


def accumulate(loss: Callable, trained: Tree, frozen: Tree, rows, targets, num_slots, num_micro):
    """Gradients and `Measured`, added (of the maxima, the largest) over the first `num_micro` micro-batches.

    The gradients are added up where they lie (`jax.new_ref`): backward adds to the slice of a layer as soon as it has it.
    A gradient of each micro-batch by itself would be a second copy, written, read and added.
    """
    grads = jax.tree.map(lambda x: jax.new_ref(jnp.zeros_like(x)), trained)

    def part_of(i, trained):
        return loss(trained, frozen, _micro(rows, i), _micro(targets, i), num_slots[i])

    def body(i, before):
        part, backward, now = jax.vjp(partial(part_of, i), trained, has_aux=True)
        cast(Any, backward).with_refs(grads)(jnp.ones_like(part))
        added = jax.tree.map(jnp.add, before, now)
        return added._replace(gap_max=jax.tree.map(jnp.maximum, before.gap_max, now.gap_max))

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part_of, jnp.int32(0), trained)[1])
    measured = jax.lax.fori_loop(0, num_micro, body, nothing)
    return jax.tree.map(jax.freeze, grads), measured
