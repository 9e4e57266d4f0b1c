"""Memory of GPUs that training and vLLM share.

Either takes turns: vLLM sleeps while the updates run (`rollout.free_cache_engine`), and JAX must give back what it frees,
which its usual allocator never does. Or each has a share of its own from the beginning. Tried on no GPU so far.
"""

from __future__ import annotations

import math
import os

from .config import Config, VllmSection

HALF = 0.5  # vLLM's share where nobody knows what training needs
MARGIN = 0.05  # of a GPU: CUDA's contexts, and what fragmentation loses
LEAST, MOST = 0.1, 0.9
SETTLED = {
    "XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_CLIENT_MEM_FRACTION",
}  # fmt: skip


def shares_gpus(v: VllmSection) -> bool:
    """Whether servers run on devices that this process sees too."""
    seen, theirs = os.environ.get("CUDA_VISIBLE_DEVICES"), {d for names in v.devices for d in names.split(",")}
    return not v.urls and (not theirs or seen is None or not theirs.isdisjoint(seen.split(",")))


def takes_turns(c: Config) -> bool:
    """Whether vLLM sleeps on the trainer's devices while the updates run."""
    return c.rollout.engine == "vllm" and c.engine_sleeps and shares_gpus(c.rollout.vllm)


def jax_environment(c: Config) -> dict[str, str]:
    """What JAX must find in its environment before it looks for devices. On a CPU or a TPU it means nothing."""
    v = c.rollout.vllm
    if c.rollout.engine != "vllm" or not shares_gpus(v):
        return {}
    if takes_turns(c):
        return {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    return {"XLA_CLIENT_MEM_FRACTION": f"{1 - (v.gpu_memory_utilization or HALF) - MARGIN:.2f}"}


def prepare_environment(c: Config) -> None:
    """Set it, unless the user has settled how JAX takes memory."""
    if not SETTLED & os.environ.keys():
        os.environ.update(jax_environment(c))


def vllm_share(c: Config, lying: int, total: float | None) -> float | None:
    """vLLM's `gpu_memory_utilization`: as the config says, else what is left of a GPU of `total` bytes while answers are
    generated, beside the `lying` bytes of training. None leaves it to vLLM, on GPUs of its own.
    """
    v = c.rollout.vllm
    if v.gpu_memory_utilization is not None or not shares_gpus(v):
        return v.gpu_memory_utilization
    if total is None or not takes_turns(c):
        return HALF
    return min(MOST, max(LEAST, math.floor(100 * (1 - MARGIN - lying / total)) / 100))
