"""Which mesh, offload, remat and micro-batch fit on a topology, the fastest first.

For each mesh, what is left on the device is tried first, then the optimizer's state in host memory, then weights too.
Remat and micro-batch go from the fastest to the smallest, after a look whether the smallest fits at all. What cannot fit
by what lies there throughout is not compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..config import Config
from ..parallel import make_mesh
from ..reward_model import reward_model_of
from ..topology import Topology
from .check import least_memory
from .programs import BATCHES, programs_of, roles_of
from .report import Plan, make_plan
from .sources import described_model

Say = Callable[[str], None]
REMATS = ("none", "dots", "full")
OFFLOADS = ((), ("optimizer",), ("optimizer", "params"))
UPDATES = ("update_critic", "update_actor")
# With the updates, those whose peak decides. `keep` holds up to three quarters of a cache more than `decode`, which says
# the time.
OTHERS = tuple(f"{batch}/{program}" for batch in BATCHES for program in ("begin", "keep", "decode"))
OTHERS += ("reward_model", "update_weights")


class Choice(NamedTuple):
    """Settings that fit, as overrides, with the plan of the programs that decide."""

    overrides: tuple[str, ...]
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        return {"overrides": list(self.overrides)} | self.plan.to_dict()


def sweep(c: Config, topology: Topology, *, say: Say = lambda line: None) -> list[Choice]:
    """What fits of every mesh, by predicted time where nothing overlaps. `say` hears of every try."""
    found = []
    for mesh in meshes(topology):
        on_mesh = dataclasses.replace(c, mesh=dataclasses.replace(c.mesh, **mesh))
        for offload in OFFLOADS:
            choice = _first_that_fits(_offloaded(on_mesh, offload), topology, mesh, offload, say)
            if choice is not None:
                found.append(choice)
                break
    return sorted(found, key=lambda choice: choice.plan.step_seconds_one_by_one)


def meshes(topology: Topology) -> Iterator[dict[str, int]]:
    """Every data x fsdp x tensor of all devices, `tensor` within a node; between slices of TPUs, replicas alone."""
    devices = len(topology.devices)
    slices = devices // topology.per_node if topology.hardware.platform == "tpu" else 1
    for tensor in (n for n in range(1, topology.per_node + 1) if devices % n == 0 and topology.per_node % n == 0):
        rest = devices // tensor
        for fsdp in (n for n in range(1, rest // slices + 1) if rest % (n * slices) == 0):
            yield {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor}


def _first_that_fits(
    c: Config, topology: Topology, mesh: dict[str, int], offload: tuple[str, ...], say: Say
) -> Choice | None:
    where = f"mesh {'x'.join(map(str, mesh.values()))}, in host memory {' and '.join(offload) or 'nothing'}"
    devices = make_mesh(**mesh, devices=topology.devices)
    roles, reward = roles_of(c, devices), reward_model_of(c, devices, described_model)
    least = max(need.total for need in least_memory(c, roles, reward, gpu=topology.hardware.gpu_memory))
    if least > topology.hardware.memory:
        say(f"{where}: {least / 1e9:.1f} GB without activations")
        return None
    names = {work.name for work in programs_of(c, roles, reward).work}
    settings = _settings(c)

    def plan(remat: str, tokens: int, programs: tuple[str, ...]) -> Plan:
        made = make_plan(_computed(c, remat, tokens), topology, only=[name for name in programs if name in names])
        say(f"{where}, remat {remat}, {tokens} tokens: {made.peak / 1e9:.1f} GB in {', '.join(programs)}")
        return made

    smallest = plan(*settings[-1], (*UPDATES, *OTHERS))
    if not smallest.fits:
        return None
    for remat, tokens in settings:
        made = smallest if (remat, tokens) == settings[-1] else plan(remat, tokens, UPDATES)
        if made.fits:
            others = [p for p in smallest.programs if p.name in OTHERS]
            updates = [p for p in made.programs if p.name in UPDATES]
            overrides = _overrides(c, mesh, offload, remat, tokens)
            return Choice(overrides, dataclasses.replace(made, programs=[*others, *updates]))
    return None


def _settings(c: Config) -> list[tuple[str, int]]:
    """Remat and micro-batch tokens, what is fastest first: a smaller micro-batch costs less than computing again."""
    most = max(c.actor.ppo_max_token_len_per_gpu, c.row_length)
    sizes = sorted({most, max(c.row_length, most // 4), c.row_length}, reverse=True)
    return [(remat, tokens) for remat in REMATS for tokens in sizes]


def _computed(c: Config, remat: str, tokens: int) -> Config:
    return dataclasses.replace(
        c,
        model=dataclasses.replace(c.model, remat=remat),
        actor=dataclasses.replace(c.actor, ppo_max_token_len_per_gpu=tokens),
        critic=dataclasses.replace(c.critic, ppo_max_token_len_per_gpu=tokens),
    )


def _offloaded(c: Config, offload: tuple[str, ...]) -> Config:
    params = tuple(what for what in offload if what == "params")
    return dataclasses.replace(
        c,
        actor=dataclasses.replace(c.actor, offload=offload),
        critic=dataclasses.replace(c.critic, offload=offload),
        ref=dataclasses.replace(c.ref, offload=params),
        reward=dataclasses.replace(c.reward, model=dataclasses.replace(c.reward.model, offload=params)),
    )


def _overrides(c: Config, mesh: dict[str, int], offload: tuple[str, ...], remat: str, tokens: int) -> tuple[str, ...]:
    given = [f"mesh.{axis}={size}" for axis, size in mesh.items()] + [f"model.remat={remat}"]
    given += [f"{role}.ppo_max_token_len_per_gpu={tokens}" for role in ("actor", "critic")]
    if offload:
        given += [f"{role}.offload=[{','.join(offload)}]" for role in ("actor", "critic")]
    if "params" in offload and c.needs_ref:
        given.append("ref.offload=[params]")
    if "params" in offload and c.reward.model.path is not None:
        given.append("reward.model.offload=[params]")
    return tuple(given)


def sweep_table(found: list[Choice]) -> str:
    """One line a choice, the fastest first; seconds are of the updates and of generation."""
    if not found:
        return "nothing fits: take more devices, adapters (model.lora_rank) or a smaller rollout.max_num_seqs"
    lines = ["step, s: at best  one by one  peak GB  settings"]
    lines += [
        f"{choice.plan.step_seconds:16.1f} {choice.plan.step_seconds_one_by_one:11.1f} {choice.plan.peak / 1e9:8.1f}  "
        + " ".join(choice.overrides)
        for choice in found
    ]
    return "\n".join(lines)
