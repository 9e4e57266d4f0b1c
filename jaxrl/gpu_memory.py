"""Memory of GPUs that training and vLLM share.

Either takes turns: vLLM sleeps while the updates run (`rollout.free_cache_engine`), and JAX must give back what it frees,
which its usual allocator never does. Or each has a share of its own from the beginning. Tried on no GPU so far.
"""

from __future__ import annotations

import math
import os

from .config import Config, VllmSection

HALF = 0.5  # vLLM's share where nobody knows what training needs
LEAST, MOST = 0.1, 0.9
OWN_DEVICES = "GPUs of its own (rollout.vllm.devices, and the others alone in the trainer's CUDA_VISIBLE_DEVICES)"
SETTLED = {
    "XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_CLIENT_MEM_FRACTION",
}  # fmt: skip


def shares_gpus(v: VllmSection) -> bool:
    """Whether servers run on devices that this process sees too."""
    names = [v.env["CUDA_VISIBLE_DEVICES"]] if "CUDA_VISIBLE_DEVICES" in v.env else v.devices
    seen, theirs = os.environ.get("CUDA_VISIBLE_DEVICES"), {d for each in names for d in _listed(each)}
    return not v.urls and (not theirs or seen is None or not theirs.isdisjoint(_listed(seen)))


def _are_on_the_first_gpu(v: VllmSection) -> bool:
    """Whether the first device of every server is the first one that this process sees."""
    names = [v.env["CUDA_VISIBLE_DEVICES"]] if "CUDA_VISIBLE_DEVICES" in v.env else v.devices
    first = _listed(os.environ.get("CUDA_VISIBLE_DEVICES", "0"))[0]
    return all(_listed(each)[0] == first for each in names)


def _listed(devices: str) -> list[str]:
    return [device.strip() for device in devices.split(",")]


def takes_turns(c: Config) -> bool:
    """Whether vLLM sleeps on the trainer's devices while the updates run."""
    return c.rollout.engine == "vllm" and c.engine_sleeps and shares_gpus(c.rollout.vllm)


def jax_environment(c: Config) -> dict[str, str]:
    """What JAX must find in its environment before it looks for devices. On a CPU or a TPU it means nothing.

    Raises ValueError where vLLM's share leaves it nothing.
    """
    v = c.rollout.vllm
    if c.rollout.engine != "vllm" or not shares_gpus(v):
        return {}
    if takes_turns(c):
        return {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    left = 0.95 - (v.gpu_memory_utilization or HALF)  # of the rest, CUDA's contexts
    if left < LEAST:
        raise ValueError(
            f"rollout.vllm.gpu_memory_utilization {v.gpu_memory_utilization} leaves training nothing of a GPU that it "
            f"shares with vLLM all the time: set it to {HALF:g}, or give vLLM {OWN_DEVICES}"
        )
    return {"XLA_CLIENT_MEM_FRACTION": f"{left:.2f}"}


def prepare_environment(c: Config) -> None:
    """Set it, unless the user has settled how JAX takes memory.

    Raises ValueError where weights would go from a GPU to itself by NCCL, or to another one by CUDA IPC.
    """
    v = c.rollout.vllm
    if c.rollout.engine == "vllm" and v.transport == "nccl" and shares_gpus(v):
        raise ValueError(
            f"rollout.vllm.transport nccl wants vLLM on {OWN_DEVICES}: give it some, or set transport to ipc"
        )
    if c.rollout.engine == "vllm" and v.transport == "ipc" and not _are_on_the_first_gpu(v):
        raise ValueError(
            "rollout.vllm.transport ipc wants each vLLM on the trainer's first GPU, and one has another: set it to nccl, or "
            "to auto"
        )
    if not SETTLED & os.environ.keys():
        os.environ.update(jax_environment(c))


def kept_asleep(total: float) -> int:
    """Of `total` bytes, what a sleeping vLLM keeps (its CUDA context, its graphs) and JAX's own context. Not measured."""
    return int(max(0.05 * total, 2e9))


def vllm_share(c: Config, lying: int, total: float | None) -> float | None:
    """vLLM's `gpu_memory_utilization`: as the config says, else what is left of a GPU of `total` bytes while answers are
    generated, beside the `lying` bytes of training. None leaves it to vLLM, on GPUs of its own.
    """
    v = c.rollout.vllm
    if v.gpu_memory_utilization is not None or not shares_gpus(v):
        return v.gpu_memory_utilization
    if total is None or not takes_turns(c):
        return HALF
    return min(MOST, max(LEAST, math.floor(100 * (1 - (kept_asleep(total) + lying) / total)) / 100))
