"""Which mesh, remat and micro-batch fit on a topology, the fastest first.

Each way to lay the devices out is tried with the cheapest remat and the largest micro-batch first; the updates and the
generation are compiled, and what does not fit is tried again with less. What cannot fit by its weights alone is not
compiled at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..config import Config
from ..parallel import make_mesh
from ..topology import Topology
from .check import least_memory
from .programs import roles_of
from .report import Plan, make_plan

REMATS = ("none", "dots", "full")
LARGEST_PROGRAMS = ("gen/begin", "gen/decode", "update_critic", "update_actor", "update_weights")


class Choice(NamedTuple):
    """Settings that fit, as overrides, with what the programs that decide take and need."""

    overrides: tuple[str, ...]
    plan: Plan

    def to_dict(self) -> dict[str, Any]:
        return {"overrides": list(self.overrides)} | self.plan.to_dict()


def sweep(c: Config, topology: Topology, *, say: Callable[[str], None] = lambda line: None) -> list[Choice]:
    """What fits, by predicted time (if nothing overlaps). `say` hears of every try."""
    found = []
    for mesh in meshes(topology):
        base = dataclasses.replace(c, mesh=dataclasses.replace(c.mesh, **mesh))
        roles = roles_of(base, make_mesh(**mesh, devices=topology.devices))
        least = max(need.total for need in least_memory(base, roles))
        shape = "x".join(map(str, mesh.values()))
        if least > topology.hardware.memory:
            say(f"mesh {shape}: {least / 1e9:.1f} GB without activations")
            continue
        for remat, tokens in _settings(c):
            tried = dataclasses.replace(
                base, model=dataclasses.replace(base.model, remat=remat),
                actor=dataclasses.replace(base.actor, ppo_max_token_len_per_gpu=tokens),
                critic=dataclasses.replace(base.critic, ppo_max_token_len_per_gpu=tokens),
            )  # fmt: skip
            plan = make_plan(tried, topology, only=lambda name: name in LARGEST_PROGRAMS)
            say(f"mesh {shape} remat {remat} tokens {tokens}: {plan.peak / 1e9:.1f} GB")
            if plan.fits:
                overrides = (
                    *(f"mesh.{axis}={size}" for axis, size in mesh.items()), f"model.remat={remat}",
                    f"actor.ppo_max_token_len_per_gpu={tokens}", f"critic.ppo_max_token_len_per_gpu={tokens}",
                )  # fmt: skip
                found.append(Choice(overrides, plan))
                break
            if not any(p.name.startswith("update_a") and p.peak > plan.memory for p in plan.programs) and not any(
                p.name.startswith("update_c") and p.peak > plan.memory for p in plan.programs
            ):
                break  # what is too large does not depend on remat and micro-batches
    return sorted(found, key=lambda choice: choice.plan.step_seconds_one_by_one)


def meshes(topology: Topology) -> Iterator[dict[str, int]]:
    """Every data x fsdp x tensor of all devices, `tensor` within a node."""
    devices = len(topology.devices)
    for tensor in (n for n in range(1, topology.per_node + 1) if devices % n == 0 and topology.per_node % n == 0):
        rest = devices // tensor
        for fsdp in (n for n in range(1, rest + 1) if rest % n == 0):
            yield {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor}


def _settings(c: Config) -> Iterator[tuple[str, int]]:
    """Remat and micro-batch tokens, what is fastest first: a smaller micro-batch costs less than computing again."""
    most = max(c.actor.ppo_max_token_len_per_gpu, c.row_length)
    sizes = sorted({most, max(c.row_length, most // 4), c.row_length}, reverse=True)
    return ((remat, tokens) for remat in REMATS for tokens in sizes)


def sweep_table(found: list[Choice]) -> str:
    if not found:
        return "nothing fits: take more devices, adapters (model.lora_rank) or a smaller rollout.max_num_seqs"
    lines = ["step, s: at best  one by one  peak GB  settings"]
    lines += [
        f"{choice.plan.step_seconds:16.1f} {choice.plan.step_seconds_one_by_one:11.1f} {choice.plan.peak / 1e9:8.1f}  "
        + " ".join(choice.overrides)
        for choice in found
    ]
    return "\n".join(lines)
