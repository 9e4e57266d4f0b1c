"""Whether a run can fit on the devices that are here, said before a weight is loaded.

`check_fits` compiles nothing: what lies on a device throughout is known exactly from shapes and shardings, and a program
needs at least its gradients or its KV cache beside it. `check_updates_fit` compiles the updates, whose activations
decide: the first step finds them compiled. The other programs are `scripts/plan.py`'s to compile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax

from ..config import Config
from ..gpu_memory import OWN_DEVICES, takes_turns, vllm_share
from ..reward_model import RewardModel
from ..roles import Roles
from ..rollout.lowering import cache_bytes
from ..topology import hardware_named
from .costs import bytes_of
from .memory import VLLM, compiled_or_refused, lying, memory_of, with_vllm
from .programs import batches_of, engine_of, lowered_publication, run_of, updates_of

GB = 1e9
SWEEP = "`scripts/plan.py --sweep` finds what fits"
WORK = "activations and gradients"


class Need(NamedTuple):
    """The least that a device must hold at some point of a step, by what it is made of."""

    when: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def least_memory(c: Config, roles: Roles, reward: RewardModel | None = None, *, gpu: float | None = None) -> list[Need]:
    """Of generation in training, and of the updates of critic and actor. `gpu`: bytes of each device, if they are GPUs.

    Validation and later turns may ask for more, or for less: answers are shorter than they may be, and a cache grows as
    it is needed. A plan has them at their largest.
    """
    run = with_vllm(run_of(c, roles, reward), c, gpu)
    learning = resident = lying(run)[0]
    needs = []
    if run.answering:
        needs.append(Need("generation", resident | run.answering))
    if c.rollout.engine == "jax":
        engine = engine_of(c, roles)
        answering = resident | {"weights of the engine": bytes_of(lowered_publication(engine, roles).out_info)}
        answering["KV cache"] = cache_bytes(engine, batches_of(c)["gen"].largest(engine))
        needs.append(Need("generation", answering))
        if c.trainer.trainer_mode != "sync":
            learning = answering
        elif not c.engine_sleeps:
            learning = {name: size for name, size in answering.items() if name != "KV cache"}
    for role in ("critic", "actor"):
        if role in resident:
            trained = roles.abstract_state()[role].trained
            parts = learning | run.learning | {"gradients": bytes_of(trained)}
            needs.append(Need(f"the update of the {role}", parts))
    return needs


def vllm_share_of(c: Config, roles: Roles, reward: RewardModel | None = None) -> float | None:
    """`rollout.vllm.gpu_memory_utilization` of this run, on the devices that are here."""
    return vllm_share(c, sum(lying(run_of(c, roles, reward))[0].values()), _memory_of_gpu(c, roles))


def check_fits(c: Config, roles: Roles, reward: RewardModel | None = None) -> None:
    """Raises ValueError, with what lies where and what to change, for a run that cannot fit on the mesh's devices."""
    _refuse(roles, least_memory(c, roles, reward, gpu=_memory_of_gpu(c, roles)))


def check_updates_fit(c: Config, roles: Roles, reward: RewardModel | None = None) -> None:
    """The same by XLA's account of the updates of critic and actor, which are compiled here and not again."""
    run, needs = with_vllm(updates_of(c, roles, reward), c, _memory_of_gpu(c, roles)), []
    for work in run.work:
        when = (
            f"the update of the {work.name.removeprefix('update_')}" if work.learns else "scoring by the reward model"
        )
        compiled = compiled_or_refused(work.lower())
        if isinstance(compiled, str):
            raise ValueError(f"this run cannot fit: XLA does not compile {when} ({compiled}): {SWEEP}")
        parts = lying(run)[0] | (run.learning if work.learns else run.answering)
        needs.append(Need(when, parts | {WORK: memory_of(compiled, work, run).peak - sum(parts.values())}))
    _refuse(roles, needs)


def _refuse(roles: Roles, needs: list[Need]) -> None:
    limit, name = _memory_of(roles.mesh.local_devices[0])
    worst = max(needs, key=lambda need: need.total)
    if limit is None or worst.total <= limit:
        return
    parts = sorted(worst.parts.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{part} {size / GB:.2f}" for part, size in parts if size)
    cures = ["a larger mesh.fsdp or mesh.tensor"]
    if any("optimizer" in part for part, _ in parts[:3]):
        cures.append("actor.offload=[optimizer] (and the critic's), or adapters (model.lora_rank)")
    if parts[0][0] == "KV cache":
        cures.insert(0, "a smaller rollout.max_num_seqs")
    if VLLM in worst.parts:
        cures.insert(0, f"a smaller rollout.vllm.gpu_memory_utilization, or {OWN_DEVICES}")
    if parts[0][0] == WORK:
        cures.insert(0, "a smaller ppo_max_token_len_per_gpu of that role, or model.remat=full")
    raise ValueError(
        f"this run cannot fit: {worst.when} needs at least {worst.total / GB:.2f} GB on a device, and {name} has "
        f"{limit / GB:.2f} ({listed}). What helps: {'; '.join(cures)}. {SWEEP}"
    )


def _memory_of_gpu(c: Config, roles: Roles) -> float | None:
    """Of a GPU on which vLLM takes turns with us; where each has its share, ours is all that JAX sees."""
    device = roles.mesh.local_devices[0]
    return _memory_of(device)[0] if device.platform == "gpu" and takes_turns(c) else None


def _memory_of(device: Any) -> tuple[float | None, str]:
    """What a program may use of a device. CPU devices share the memory of their host."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"], f"a {device.device_kind}"
    if device.platform == "gpu" and (hardware := hardware_named(device.device_kind)):
        return hardware.memory, f"a {device.device_kind}"  # JAX keeps no account of an allocator that gives back
    meminfo = Path("/proc/meminfo")  # Linux
    if device.platform != "cpu" or not meminfo.exists():
        return None, device.device_kind
    total = int(meminfo.read_text().split("MemTotal:")[1].split()[0]) * 1024
    return total / len(jax.local_devices()), f"each of {len(jax.local_devices())} CPU devices"
