"""The plan of a run: memory, work and traffic of every program on every device, and what a step will take at best.

`make_plan` compiles the programs of `programs.py` and puts what XLA says of each beside the formulas of `costs.py`;
`table` says it in words, `Plan.to_dict` as JSON.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import jax

from ..config import Config
from ..gpu_memory import OWN_DEVICES
from ..parallel import make_mesh
from ..reward_model import reward_model_of
from ..topology import Hardware, Topology
from .costs import cost
from .hlo import Facts, facts
from .memory import VLLM, compiled_or_refused, lying, memory_of, memory_of_refused, with_vllm
from .programs import BATCHES, Run, Work, programs_of, roles_of
from .sources import described_model


@dataclass(frozen=True)
class Program:
    """One program on one device. Bytes are of one call; seconds and traffic of all calls of a step."""

    name: str
    calls: int
    arguments: int  # on the device, what is resident included
    outputs: int  # beyond what takes an argument's place
    temporaries: int
    host: int  # in the memory of the host: arguments and temporaries
    fetched: int  # bytes that each host takes from its devices
    peak: int  # on the device while it runs, with everything that lies there and is not its own
    largest: str  # the largest array of one device in it
    largest_bytes: int
    flops: float
    memory_bytes: float
    traffic: dict[str, float]  # bytes sent, by collective and mesh axes: "all-gather fsdp"
    link_bytes: float  # of them, within a node
    network_bytes: float  # and between nodes
    seconds: dict[str, float]  # that compute, memory, link, network and host would each take alone
    compile_seconds: float
    refused: str  # what XLA says where it does not compile what cannot fit; then numbers are the least, without traffic

    @property
    def bound(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def at_best(self) -> float:
        """Seconds if all of it overlapped."""
        return max(self.seconds.values())

    @property
    def one_by_one(self) -> float:
        """Seconds if nothing overlapped."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Plan:
    """A run on described or real devices."""

    topology: str
    hardware: str
    source: str  # of the hardware's numbers
    memory: float  # of a device, bytes
    mesh: dict[str, int]
    meshes: dict[str, dict[str, int]]  # of what is resident, by name: a role and the engine may have their own
    resident: dict[str, int]  # bytes on a device throughout, by name
    resident_host: dict[str, int]
    asleep: tuple[str, ...] = ()  # of `resident`, what is let go while the updates run
    vllm: int = 0  # bytes on a device of a vLLM that generates while nothing trains, where they take turns
    programs: list[Program] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return max(p.peak for p in self.programs)

    @property
    def fits(self) -> bool:
        return max(self.peak, self.generating) <= self.memory and not any(p.refused for p in self.programs)

    @property
    def generating(self) -> int:
        """Bytes on a device while a vLLM answers there."""
        return sum(self.resident.values()) + self.vllm

    @property
    def step_seconds(self) -> float:
        return sum(p.at_best for p in self.programs)

    @property
    def step_seconds_one_by_one(self) -> float:
        return sum(p.one_by_one for p in self.programs)

    def to_dict(self) -> dict[str, Any]:
        programs = [
            dataclasses.asdict(p) | {"bound": p.bound, "at_best": p.at_best, "one_by_one": p.one_by_one}
            for p in self.programs
        ]
        return dataclasses.asdict(self) | {
            "programs": programs, "peak": self.peak, "fits": self.fits, "step_seconds": self.step_seconds,
            "step_seconds_one_by_one": self.step_seconds_one_by_one,
        }  # fmt: skip


def make_plan(c: Config, topology: Topology, *, only: Collection[str] | None = None) -> Plan:
    """Compile the programs of a run, or those that `only` names, with shapes alone.

    Raises ValueError for a mesh that the topology cannot hold, and for a program that the run has not.
    """
    mesh = make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor, devices=topology.devices)
    run = programs_of(c, roles_of(c, mesh), reward_model_of(c, mesh, described_model))
    hardware = topology.hardware
    run, (device, host) = with_vllm(run, c, hardware.gpu_memory), lying(run)
    plan = Plan(
        topology=topology.name, hardware=hardware.name, source=hardware.source, memory=hardware.memory,
        mesh=dict(mesh.shape), meshes={name: _mesh_shape(tree) for name, tree in run.resident.items()},
        resident=device, resident_host=host, asleep=tuple(run.asleep), vllm=run.answering.get(VLLM, 0),
    )  # fmt: skip
    names = [work.name for work in run.work]
    if unknown := set(only or ()) - set(names):
        raise ValueError(f"the run has no program {', '.join(sorted(unknown))}: it has {', '.join(names)}")
    plan.programs.extend(_compile(work, run, topology) for work in run.work if not only or work.name in only)
    return plan


def _mesh_shape(tree: Any) -> dict[str, int]:
    return dict(jax.tree.leaves(tree)[0].sharding.mesh.shape)


def _compile(work: Work, run: Run, topology: Topology) -> Program:
    start = time.perf_counter()
    compiled = compiled_or_refused(work.lower())
    seconds = time.perf_counter() - start
    if isinstance(compiled, str):
        refused, memory, found = compiled, memory_of_refused(compiled, work, run), Facts((), 0, "")
    else:
        text = compiled.as_text()
        assert text is not None, "this backend does not show its programs"
        refused, memory, found = "", memory_of(compiled, work, run), facts(text, run.mesh.size, work.loops)
    mesh_shape = dict((work.mesh or run.mesh).shape)
    traffic, between = defaultdict(float), 0.0
    for collective in found.collectives:
        sent = collective.bytes * collective.times * work.calls
        traffic[f"{collective.kind} {'+'.join(collective.axes(mesh_shape)) or 'none'}"] += sent
        between += collective.bytes_between_nodes(topology.per_node) * collective.times * work.calls
    flops, memory_bytes = (work.calls * x for x in cost(work, mesh_shape))
    if work.kind == "move":
        memory_bytes = float(work.calls * (memory.arguments + memory.host + memory.outputs))
    within = sum(traffic.values()) - between
    return Program(
        name=work.name, calls=work.calls, **memory._asdict(), fetched=work.fetched,
        largest=found.largest, largest_bytes=found.largest_bytes, flops=flops, memory_bytes=memory_bytes,
        traffic=dict(traffic), link_bytes=within, network_bytes=between, compile_seconds=seconds,
        seconds=_seconds(work, topology.hardware, flops, memory_bytes, within, between, memory.host), refused=refused,
    )  # fmt: skip


def _seconds(
    work: Work, hardware: Hardware, flops: float, memory_bytes: float, within: float, between: float, host: int
) -> dict[str, float]:
    """What each part of a device would take for all calls of a step, alone."""
    times = 2 if work.kind == "update" else 1  # there and back
    return {
        "compute": flops / hardware.flops,
        "memory": memory_bytes / hardware.memory_bandwidth,
        "link": within / hardware.link,
        "network": between / hardware.network,
        "host": work.calls * (times * host + work.fetched) / hardware.host_link,
    }


def table(plan: Plan) -> str:
    """The plan as lines of text, in GB of 10^9 bytes."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    lines = [f"{plan.topology}: mesh {mesh}, {plan.memory / 1e9:.1f} GB a device ({plan.hardware})", ""]
    lines.append(f"lies there throughout  GB on a device  GB in host memory  {' x '.join(plan.mesh)}")
    for name, size in plan.resident.items():
        where = " x ".join(map(str, plan.meshes[name].values()))
        shown = f"{name} (asleep in updates)" if name in plan.asleep else name
        lines.append(f"  {shown:<26} {size / 1e9:>8.2f} {plan.resident_host[name] / 1e9:>18.2f}  {where}")
    lines.append(
        f"  {'all':<26} {sum(plan.resident.values()) / 1e9:>8.2f} {sum(plan.resident_host.values()) / 1e9:>18.2f}"
    )
    if plan.vllm:
        lines.append(
            f"  {'vLLM':<26} {plan.vllm / 1e9:>8.2f} beside these, while it generates: "
            f"rollout.vllm.gpu_memory_utilization is {plan.vllm / plan.memory:.2f}"
        )
    lines += [
        "",
        "program           calls  args   out  temp  host  peak GB | TFLOP   GB sent  (nodes) | s at best  bound by",
    ]
    for p in plan.programs:
        numbers = " ".join(f"{x / 1e9:5.1f}" for x in (p.arguments, p.outputs, p.temporaries, p.host))
        lines.append(
            f"{p.name:<19} {p.calls:>5} {numbers} {p.peak / 1e9:8.2f} |{p.flops / 1e12:6.0f} "
            f"{(p.link_bytes + p.network_bytes) / 1e9:9.1f} {p.network_bytes / 1e9:8.1f} | {p.at_best:9.2f}  {p.bound}"
        )
    lines += ["", "sent by one device in a step, GB"]
    for p in plan.programs:
        sent = ", ".join(
            f"{name} {size / 1e9:.1f}" for name, size in sorted(p.traffic.items(), key=lambda t: -t[1]) if size
        )
        if sent:
            lines.append(f"  {p.name:<19} {sent}")
    lines += [
        f"{p.name} takes {p.fetched / 1e9:.1f} GB to each host, a tensor at a time, the largest of {p.outputs / 1e9:.2f} GB"
        for p in plan.programs
        if p.fetched
    ]
    lines += [
        "",
        f"a step at best {plan.step_seconds:.1f} s, {plan.step_seconds_one_by_one:.1f} s if nothing overlaps "
        "(every sequence at full length)",
        f"by {plan.source}",
        verdict(plan),
    ]
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """Whether it fits, and by how much; where it does not, what to change."""
    worst = max(plan.programs, key=lambda p: p.peak)
    left = (plan.memory - worst.peak) / 1e9
    if plan.generating > plan.memory:
        lying = sum(plan.resident.values()) / 1e9
        return (
            f"does not fit: while vLLM generates, {lying:.1f} GB of training lie on a device of {plan.memory / 1e9:.1f}, and "
            f"vLLM has {plan.vllm / 1e9:.1f}. Lower rollout.vllm.gpu_memory_utilization, raise mesh.fsdp or mesh.tensor, let "
            f"more wait in host memory (actor.offload, critic.offload, ref.offload), or give vLLM {OWN_DEVICES}"
        )
    if plan.fits:
        return f"fits: {left:.1f} GB of {plan.memory / 1e9:.1f} left at the peak, in {worst.name}"
    refused = "".join(f" XLA says of {p.name}: {p.refused.rstrip('.')}." for p in plan.programs if p.refused)
    if worst.peak <= plan.memory:  # what lies beside the refused is not in XLA's number
        worst = next(p for p in plan.programs if p.refused)
        return f"does not fit:{refused} {advice(plan, worst)}"
    return f"does not fit: {worst.name} needs {worst.peak / 1e9:.1f} GB, {-left:.1f} too many.{refused} {advice(plan, worst)}"


def advice(plan: Plan, worst: Program) -> str:
    lying = sum(plan.resident.values())
    optimizer = sum(size for name, size in plan.resident.items() if "optimizer" in name)
    if lying > plan.memory or optimizer > worst.temporaries:
        return (
            f"{lying / 1e9:.1f} GB lie on a device throughout ({optimizer / 1e9:.1f} of them optimizer state): raise "
            "mesh.fsdp or mesh.tensor, let them wait in host memory (actor.offload and critic.offload, [optimizer] or "
            "[optimizer, params]), or train adapters (model.lora_rank)"
        )
    if worst.name.partition("/")[0] in BATCHES:
        return "Lower rollout.max_num_seqs, or raise mesh.tensor"
    role = "critic" if "critic" in worst.name or worst.name == "values" else "actor"
    return f"Raise mesh.fsdp or mesh.tensor, lower {role}.ppo_max_token_len_per_gpu, or remat more (model.remat)"
