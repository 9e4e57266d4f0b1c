"""Whether a run can fit on the devices that are here, said before a weight is loaded.

Nothing is compiled for it: what lies on a device throughout is known exactly from shapes and shardings, and a program
needs at least its gradients or its KV cache beside it. What passes may still run out by its activations; `scripts/plan.py`
compiles and tells.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ..config import Config
from ..models.config import ModelConfig
from ..parallel import generation_mesh, partition
from ..roles import Roles
from ..rollout.jax_engine import BUCKET, JaxEngine, round_up
from ..update import merge
from .costs import bytes_of, waiting_bytes
from .programs import offloaded_of, resident_of

GB = 1e9


class Need(NamedTuple):
    """The least that a device must hold at some point of a step, by what it is made of."""

    when: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def least_memory(c: Config, roles: Roles) -> list[Need]:
    """Of generation, and of the updates of critic and actor."""
    offloaded = offloaded_of(c, roles)
    resident = {
        name: bytes_of(tree) - (waiting_bytes(tree) if name in offloaded else 0)
        for name, tree in resident_of(roles).items()
    }
    needs = []
    if c.rollout.engine == "jax":
        mesh = generation_mesh(roles.mesh, c.rollout.tensor_model_parallel_size)
        engine = JaxEngine(roles.model, mesh, max_num_seqs=c.rollout.max_num_seqs)
        state = roles.abstract_state()["actor"]
        weights = engine.programs.unstack.lower(merge(state.trained, roles.abstract_frozen)).out_info
        resident["weights of the engine"] = bytes_of(weights)
        needs.append(Need("generation", resident | {"KV cache": _cache_bytes(c, engine, roles.model)}))
    for role in ("critic", "actor"):
        if role in resident:
            trained = roles.abstract_state()[role].trained
            needs.append(Need(f"the update of the {role}", resident | {"gradients": bytes_of(trained)}))
    return needs


def check_fits(c: Config, roles: Roles) -> None:
    """Raises ValueError, with what lies where and what to change, for a run that cannot fit on the mesh's devices."""
    limit, name = _memory_of(roles.mesh.local_devices[0])
    worst = max(least_memory(c, roles), key=lambda need: need.total)
    if limit is None or worst.total <= limit:
        return
    parts = sorted(worst.parts.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{part} {size / GB:.2f}" for part, size in parts if size)
    cures = ["a larger mesh.fsdp or mesh.tensor"]
    if any("optimizer" in part for part, _ in parts[:3]):
        cures.append("actor.offload=[optimizer] (and the critic's), or adapters (model.lora_rank)")
    if parts[0][0] == "KV cache":
        cures.insert(0, "a smaller rollout.max_num_seqs")
    raise ValueError(
        f"this run cannot fit: {worst.when} needs at least {worst.total / GB:.2f} GB on a device, and {name} has "
        f"{limit / GB:.2f} ({listed}). What helps: {'; '.join(cures)}. `scripts/plan.py --sweep` finds what fits"
    )


def _cache_bytes(c: Config, engine: JaxEngine, model: ModelConfig) -> int:
    sequences = engine.padded(min(c.data.train_batch_size * c.rollout.n, engine.max_num_seqs))
    columns = engine.prompt_columns(c.data.max_prompt_length) + round_up(c.data.max_response_length, BUCKET)
    shape = sequences, model.num_kv_heads, columns, model.head_dim
    spec = partition(engine.mesh, ("rows", "kv_heads", None, None), shape)
    held = jax.sharding.NamedSharding(engine.mesh, spec).shard_shape(shape)
    return 2 * model.num_layers * math.prod(held) * jax.numpy.dtype(model.compute_dtype).itemsize


def _memory_of(device: Any) -> tuple[float | None, str]:
    """What a program may use of a device. CPU devices share the memory of their host."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"], f"a {device.device_kind}"
    meminfo = Path("/proc/meminfo")  # Linux
    if device.platform != "cpu" or not meminfo.exists():
        return None, device.device_kind
    total = int(meminfo.read_text().split("MemTotal:")[1].split()[0]) * 1024
    return total / len(jax.local_devices()), f"each of {len(jax.local_devices())} CPU devices"
