"""Every program of a run, lowered for a mesh with shapes only: what `train.py` would compile, and how often it runs it.

The programs are those of training: `update.Policy` and `update.Critic`, `prepare`, and the engine's. No weight is read; a
model is its `config.json`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..collector import sampling_of
from ..config import Config
from ..gpu_memory import takes_turns
from ..learner import micro_batches_of
from ..models.config import ModelConfig
from ..models.logprobs import chunk_slots
from ..offload import to_device
from ..parallel import Program, generation_mesh, num_row_shards, replicated
from ..prepare import ingredients, lower_prepare
from ..reward_model import RewardModel
from ..roles import Roles
from ..rollout.engine import Sampling
from ..rollout.jax_engine import JaxEngine, Largest
from ..rollout.lowering import cache_bytes, lower_largest, lower_unstack, outputs
from ..update import Programs, TrainState, merge
from ..weights.hf_names import flatten, in_order
from ..weights.pretrained import Pretrained
from .sources import described_model

Tree = Any


@dataclass(frozen=True)
class Work:
    """One program of the run. Counts are of one RL step in which every sequence has its full length."""

    name: str
    lower: Callable[[], jax.stages.Lowered]
    model: ModelConfig
    kind: str  # forward, update, prefill, decode or move: `costs.py` counts by it
    calls: int = 1
    rows: int = 0  # of one micro-batch, over all devices, or sequences that are generated together
    columns: int = 0  # tokens of a row, each of which attends to all of them; in decoding, of the cache
    targets: int = 0  # of a row, those with logits or values
    loops: tuple[
        int, ...
    ] = ()  # trip counts that no program knows, the outermost first: micro-batches, chunks of logits
    mesh: Mesh | None = None  # where it is not that of the actor: of another role, or the layout of generation
    uses: tuple[str, ...] = ()  # what of `Run.resident` is among its arguments
    frees: tuple[str, ...] = ()  # and what is let go before it runs
    fetched: int = 0  # bytes that each host takes from its devices
    trains: TrainState | None = None  # of an update
    whole: tuple[str, ...] = ()  # of `uses`, what comes whole where it waits in host memory, and not layer by layer
    learns: bool = False  # the engine may be asleep then

    @property
    def micro_batches(self) -> int:
        """How often the whole of it is done in a call: micro-batches, or tokens of a response."""
        return self.loops[0] if self.loops else 1


@dataclass
class Run:
    """What lies on the devices throughout, by name, and the programs in the order of a step."""

    mesh: Mesh
    resident: dict[str, Tree] = field(default_factory=dict)  # shapes with shardings
    offloaded: frozenset[str] = frozenset()  # of their names, those that wait in host memory
    asleep: frozenset[str] = frozenset()  # and those that are let go while it learns
    # Bytes of what is no argument of a program: beside what learns, and beside the rest.
    learning: dict[str, int] = field(default_factory=dict)
    answering: dict[str, int] = field(default_factory=dict)
    work: list[Work] = field(default_factory=list)


def roles_of(c: Config, mesh: Mesh, find: Callable[[str], Pretrained] = described_model) -> Roles:
    """The roles of the run, without their weights. `find` opens the model of a path."""
    path = c.model.path
    assert path is not None, "a plan is of a config that names its model"
    return Roles(c, mesh, find(path), steps=1, find=find)


def programs_of(c: Config, roles: Roles, reward: RewardModel | None = None) -> Run:
    """Everything that a step of the run executes, in its order."""
    run = run_of(c, roles, reward)
    run.work = [*([] if reward is None else [_scoring(c, reward)]), *_training(c, roles)]
    if c.rollout.engine == "jax":  # another engine has its own devices or its own program
        generation, publication = _generation(run, c, roles)
        run.work = [*generation, *run.work, publication]
    run.work.append(_export(c, roles))
    return run


def updates_of(c: Config, roles: Roles, reward: RewardModel | None = None) -> Run:
    """The updates of critic and actor, with all that lies beside them; and what scores beside a vLLM that is awake."""
    run = run_of(c, roles, reward)
    if c.rollout.engine == "jax" and not c.engine_sleeps:
        engine = engine_of(c, roles)
        run.resident["engine"] = outputs(lowered_publication(engine, roles))
        run.learning = _overlapping(c, engine)
    run.work = [work for work in _training(c, roles) if work.kind == "update"]
    if reward is not None and takes_turns(c):
        run.work.append(_scoring(c, reward))
    return run


def run_of(c: Config, roles: Roles, reward: RewardModel | None = None) -> Run:
    """What lies there throughout, but for the engine's weights; no programs yet.

    Shardings say too what of it waits in host memory, but not where XLA knows no host of a GPU.
    """
    state = roles.abstract_state()
    resident = {"actor": state["actor"].trained, "actor optimizer": state["actor"].opt_state}
    if roles.has_adapters:
        resident["base"] = roles.abstract_frozen
    if roles.needs_ref and not roles.ref_is_base:
        resident["ref"] = roles.ref_abstract
    if roles.needs_critic:
        resident |= {"critic": state["critic"].trained, "critic optimizer": state["critic"].opt_state}
    if reward is not None:
        resident["reward model"] = reward.abstract
    of_actor = {"optimizer": "actor optimizer", "params": "base" if roles.has_adapters else "actor"}
    of_critic = {"optimizer": "critic optimizer", "params": "critic"}
    offloaded = {of_actor[what] for what in c.actor.offload} | {of_critic[what] for what in c.critic.offload}
    offloaded |= {"ref" for _ in c.ref.offload} | {"reward model" for _ in c.reward.model.offload}
    asleep = frozenset({"engine"} if c.engine_sleeps else ())
    return Run(roles.mesh, resident, frozenset(offloaded & resident.keys()), asleep)


def _scoring(c: Config, reward: RewardModel) -> Work:
    """The reward model on all responses of a step; its tokens are taken to be as many as the actor's."""
    M, R, T = shape = reward.micro_batches(c.data.train_batch_size * c.rollout.n, c.max_length + 1)
    lower = partial(reward.critic.lower_values, reward.abstract, shape)
    return Work("reward_model", lower, reward.config, "forward", 1, R, T, 0, (M,), reward.mesh, ("reward model",))


def _training(c: Config, roles: Roles) -> list[Work]:
    """Forward passes over all sequences of a step, and the updates of critic and actor."""
    d, sequences, state = c.data, c.data.train_batch_size * c.rollout.n, roles.abstract_state()
    mini_batch = c.actor.ppo_mini_batch_size * c.rollout.n
    platform = roles.mesh.devices.flat[0].platform

    def work(
        name: str, kind: str, programs: Programs, lower: Callable, num: int, max_tokens: int, uses: tuple[str, ...],
        **more: Any,
    ) -> Work:  # fmt: skip
        M, R, T = shape = micro_batches_of(c, programs.mesh, num, max_tokens)
        ways = num_row_shards(programs.mesh)
        targets = T // c.max_length * d.max_response_length
        chunks = -(-targets * (R // ways) // chunk_slots(ways, R // ways * T, platform))
        return Work(
            name, lambda: lower(shape), programs.config, kind, rows=R, columns=T, targets=targets, loops=(M, chunks),
            mesh=programs.mesh, uses=uses, learns=True, **more,
        )  # fmt: skip

    def update(
        role: str, programs: Programs, frozen: Tree, max_tokens: int, epochs: int, base: tuple[str, ...] = ()
    ) -> Work:
        lower, calls = partial(programs.lower_step, state[role], frozen), max(1, epochs * sequences // mini_batch)
        return work(
            f"update_{role}", "update", programs, lower, mini_batch, max_tokens, (role, f"{role} optimizer", *base),
            calls=calls, trains=state[role], whole=(role,),
        )  # fmt: skip

    policy, frozen, tokens = roles.policy, roles.abstract_frozen, c.actor.ppo_max_token_len_per_gpu
    base, critic_tokens = ("base",) if roles.has_adapters else (), c.critic.ppo_max_token_len_per_gpu
    works = []
    if not c.algorithm.rollout_correction.bypass_mode:
        lower = partial(policy.lower_logprobs, merge(state["actor"].trained, frozen))
        works.append(work("old_log_prob", "forward", policy, lower, sequences, tokens, ("actor", *base)))
    if roles.needs_ref:
        lower = partial(roles.ref_policy.lower_logprobs, frozen if roles.ref_is_base else roles.ref_abstract)
        uses = base if roles.ref_is_base else ("ref",)
        works.append(work("ref", "forward", roles.ref_policy, lower, sequences, tokens, uses))
    if roles.needs_critic:
        lower = partial(roles.critic.lower_values, state["critic"].trained)
        works.append(work("values", "forward", roles.critic, lower, sequences, critic_tokens, ("critic",)))
    works.append(_preparation(c, roles))
    if roles.needs_critic:
        works.append(update("critic", roles.critic, {}, critic_tokens, c.critic_ppo_epochs))
    return [*works, update("actor", policy, frozen, tokens, c.actor.ppo_epochs, base)]


def _preparation(c: Config, roles: Roles) -> Work:
    given = {"ref_logprobs": roles.needs_ref, "values": roles.needs_critic, "log_kept": roles.policy.loss.truncates}
    given["baselines"] = "baselines" in ingredients(c.algorithm)
    shape = c.data.train_batch_size * c.rollout.n, c.data.max_response_length
    lower = partial(lower_prepare, c.algorithm, shape, replicated(roles.mesh), [n for n in given if given[n]])
    return Work("prepare", lower, roles.model, "move", learns=True)


def _export(c: Config, roles: Roles) -> Work:
    """The actor as whole tensors on each host: when the run ends, and for vLLM after every step.

    They come one after the other; the program is that of the largest, as several processes gather it.
    """
    variables = merge(roles.abstract_state()["actor"].trained, roles.abstract_frozen)
    published = c.rollout.engine == "vllm" and c.rollout.vllm.publish == "merged"
    leaves, tensors = dict(flatten(variables["params"])), list(in_order(roles.model, "lm"))
    whole = [tensor for tensor in tensors if tensor.parts[0][0].ours in leaves]  # not those in 4 bits
    row, place = max(whole, key=lambda tensor: math.prod(tensor.shape)).parts[0]
    dtype = jnp.dtype(roles.model.compute_dtype if published else "float32")

    def gather(variables: Tree) -> jax.Array:
        return to_device(dict(flatten(variables["params"]))[row.ours])[place].astype(dtype)

    program = Program(roles.mesh, gather, keep_unused=True, out_shardings=replicated(roles.mesh))
    fetched = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
    uses = ("actor", "base") if roles.has_adapters else ("actor",)
    return Work(
        "export", lambda: program.lower(variables), roles.model, "move", calls=int(published), uses=uses,
        frees=("engine",), fetched=fetched, learns=True,
    )  # fmt: skip


BATCHES = ("gen", "val", "val_greedy", "turns")  # what the engine may be asked: see `batches_of`


class Batch(NamedTuple):
    """Prompts that the engine is asked to answer in one call."""

    num_prompts: int | None  # None: nobody knows
    longest_prompt: int
    sampling: Sampling

    def largest(self, engine: JaxEngine) -> Largest:
        return engine.largest(*self)


def batches_of(c: Config) -> dict[str, Batch]:
    """What the engine is asked in training (`gen`), in validation (`val`, `val_greedy`) and in later turns (`turns`).

    How many prompts there are to validate nobody knows: as many as decode together.
    """
    d, most = c.data, c.data.max_response_length
    batches = {
        "gen": Batch(d.train_batch_size, d.max_prompt_length, sampling_of(c.rollout, max_tokens=most, stop_ids=()))
    }
    if d.val_files is not None:
        for name, greedy in c.validations.items():
            sampling = sampling_of(c.rollout.val_kwargs, max_tokens=most, stop_ids=(), greedy=greedy)
            batches[name] = Batch(None, d.max_prompt_length, sampling)
    if c.rollout.multi_turn.function is not None:  # every response is a prompt of its own there
        counts = [b.num_prompts * b.sampling.n for b in batches.values() if b.num_prompts is not None]
        count = max(counts) if len(counts) == len(batches) else None
        batches["turns"] = Batch(count, c.max_length - 1, dataclasses.replace(batches["gen"].sampling, n=1))
    return batches


def engine_of(c: Config, roles: Roles) -> JaxEngine:
    mesh = generation_mesh(roles.mesh, c.rollout.tensor_model_parallel_size)
    return JaxEngine(roles.model, mesh, max_num_seqs=c.rollout.max_num_seqs)


def lowered_publication(engine: JaxEngine, roles: Roles) -> jax.stages.Lowered:
    """The program that gives the engine the weights of the actor."""
    return lower_unstack(engine, merge(roles.abstract_state()["actor"].trained, roles.abstract_frozen))


def _overlapping(c: Config, engine: JaxEngine) -> dict[str, int]:
    """What lies beside an update because the next step's responses are generated meanwhile."""
    if c.trainer.trainer_mode == "sync":
        return {}
    return {"KV cache": cache_bytes(engine, batches_of(c)["gen"].largest(engine))}


def _generation(run: Run, c: Config, roles: Roles) -> tuple[list[Work], Work]:
    """The engine's programs, and the one that gives it new weights. What it holds joins `run.resident`.

    Programs of validation and of later turns are there where they are larger than those of training; they count no time.
    """
    engine = engine_of(c, roles)
    unstack = lowered_publication(engine, roles)
    run.resident["engine"] = weights = outputs(unstack)
    if not c.engine_sleeps:
        run.learning = _overlapping(c, engine)
    batches = batches_of(c)
    training, generation = batches["gen"].largest(engine), []
    for name, batch in batches.items():
        largest = batch.largest(engine)
        if name == "gen" or any(x > y for x, y in zip(largest, training, strict=True)):
            generation += _decoding(name, engine, weights, batch, largest)
    uses = ("actor", "base") if roles.has_adapters else ("actor",)
    publish = Work("update_weights", lambda: unstack, roles.model, "move", uses=uses, frees=("engine",), whole=uses)
    return generation, publish


def _decoding(name: str, engine: JaxEngine, weights: Tree, batch: Batch, largest: Largest) -> list[Work]:
    """The engine's programs for a batch; those of training run for as many as there are in a step."""
    lowered = lower_largest(engine, weights, largest, batch.sampling)
    calls = 0
    if name == "gen":
        assert batch.num_prompts is not None
        calls = -(-batch.num_prompts * batch.sampling.n // engine.max_num_seqs)
    columns, tokens = largest.prompt_columns, batch.sampling.max_tokens

    def work(program: str, kind: str, rows: int, columns: int, loops: tuple[int, ...], uses: tuple[str, ...]) -> Work:
        lower = lambda: lowered[program]  # noqa: E731
        return Work(f"{name}/{program}", lower, engine.config, kind, calls, rows, columns, 1, loops, engine.mesh, uses)

    works = [work("begin", "prefill", largest.prompts, columns, (), ("engine",))]
    works += [
        work(p, "move", largest.sequences, columns + tokens, (), ()) for p in ("lengthen", "keep") if p in lowered
    ]
    return [*works, work("decode", "decode", largest.sequences, columns + tokens, (tokens,), ("engine",))]
