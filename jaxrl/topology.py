"""Accelerators that may not be here: what they can do, and their devices for ahead-of-time compilation.

`described("h100:2x8")` gives devices that XLA compiles for on a machine that has none of them. The numbers of
`HARDWARE` are the makers' own, per device, each with its source; of links both ways together, half is counted.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax

GB = 1e9


@dataclass(frozen=True)
class Hardware:
    """One kind of device. Bandwidths are bytes a second that one device sends; `flops` are dense bfloat16."""

    name: str
    platform: str  # of XLA
    flops: float
    memory: float  # bytes that a program may use
    memory_bandwidth: float
    link: float  # to the other devices of its node, or of its slice
    network: float  # its share of the node's way to other nodes
    host_link: float  # to the memory of its host
    source: str
    target: str = ""  # the GPU as XLA wants it described

    @property
    def gpu_memory(self) -> float | None:
        """`memory` of a GPU, which vLLM may share."""
        return self.memory if self.platform == "cuda" else None


# fmt: off
_CUDA_DEVICE = (
    "gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 "
    "shared_memory_per_core: {shared} threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {fpus} "
    "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} "
    "l2_cache_size: {l2} clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {optin} "
    "cuda_compute_capability {{ major: {major} }} registers_per_core_limit: 65536 registers_per_block_limit: 65536 }} "
    'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 patch: 0 }} '
    'device_description_str: "{description}" runtime_version {{ major: 13 }}'
)
_HOPPER = {"shared": 233472, "cores": 132, "fpus": 128, "l2": 52428800, "clock": 1.98, "optin": 232448, "major": 9}
_AMPERE = {"shared": 167936, "cores": 108, "fpus": 64, "l2": 41943040, "clock": 1.41, "optin": 166912, "major": 8}


def _cuda(description: str, bandwidth: float, memory: float, chip: dict[str, Any]) -> str:
    return _CUDA_DEVICE.format(description=description, bandwidth=int(bandwidth), memory=int(memory), **chip)


HARDWARE = {
    "a100": Hardware(
        "a100", "cuda", 312e12, 79.5e9, 2039e9, 300e9, 25e9, 32e9,
        "NVIDIA A100 SXM 80 GB datasheet (bf16, HBM, NVLink 600 GB/s, PCIe 4 x16); DGX A100: 200 Gb/s a GPU",
        _cuda("NVIDIA A100-SXM4-80GB", 2039e9, 79.5e9, _AMPERE),
    ),
    "h100": Hardware(
        "h100", "cuda", 989e12, 79.5e9, 3352e9, 450e9, 50e9, 64e9,
        "NVIDIA H100 SXM 80 GB datasheet (bf16 dense, HBM3, NVLink 900 GB/s, PCIe 5 x16); DGX H100: 400 Gb/s a GPU",
        _cuda("NVIDIA H100 80GB HBM3", 3352e9, 79.5e9, _HOPPER),
    ),
    "h200": Hardware(
        "h200", "cuda", 989e12, 140e9, 4800e9, 450e9, 50e9, 64e9,
        "NVIDIA H200 SXM 141 GB datasheet (bf16 dense, HBM3e, NVLink 900 GB/s, PCIe 5 x16); 400 Gb/s a GPU, as in a DGX",
        _cuda("NVIDIA H200", 4800e9, 140e9, _HOPPER),
    ),
    "v5e": Hardware(
        "v5e", "tpu", 197e12, 16e9, 819e9, 100e9, 3.1e9, 8e9,
        "Google Cloud TPU v5e page (bf16, HBM, ICI 1600 Gb/s a chip of which half each way); "
        "network and host link: assumed 25 Gb/s and PCIe 3 x8 a chip",
    ),
    "v5p": Hardware(
        "v5p", "tpu", 459e12, 95e9, 2765e9, 300e9, 6.25e9, 16e9,
        "Google Cloud TPU v5p page (bf16, HBM, ICI 4800 Gb/s a chip of which half each way); "
        "network and host link: assumed 50 Gb/s and PCIe 3 x16 a chip",
    ),
    "cpu": Hardware(
        "cpu", "cpu", 110e9, 8e9, 10e9, 10e9, 1e9, 10e9,
        "no maker's numbers: the virtual devices of this machine, for trying a plan out; its times mean nothing",
    ),
}
# fmt: on


# How jax calls the devices that are here: the beginning of `device_kind`.
_KINDS = {
    "NVIDIA A100": "a100", "NVIDIA H100 80GB": "h100", "NVIDIA H200": "h200", "TPU v5 lite": "v5e", "TPU v5p": "v5p",
}  # fmt: skip


def hardware_named(device_kind: str) -> Hardware | None:
    """The numbers of a device by the name that jax gives it, or None where they are not known."""
    return next((HARDWARE[name] for start, name in _KINDS.items() if device_kind.startswith(start)), None)


@dataclass(frozen=True)
class Topology:
    """Devices to compile for, and how many of them share a node (a slice of TPUs is one node: its links are alike)."""

    name: str
    hardware: Hardware
    devices: tuple[Any, ...]
    per_node: int


def described(topology: str) -> Topology:
    """The devices of `h100:2x8` (nodes x devices), `v5e:4x4` (chips of a slice; of two: `v5e:2:4x4`) or `cpu:8`.

    Raises ValueError for a topology that nobody knows, and where the plugin that compiles for it is not installed.
    """
    kind, _, shape = topology.partition(":")
    slices, several, shape = shape.rpartition(":")
    sizes = [int(size) for size in shape.split("x")] if re.fullmatch(r"\d+(x\d+)*", shape) else []
    of_tpus = kind in HARDWARE and HARDWARE[kind].platform == "tpu"
    if (
        kind not in HARDWARE
        or not sizes
        or 0 in sizes
        or (several and not (of_tpus and re.fullmatch("[1-9]\\d*", slices)))
    ):
        raise ValueError(
            f"topology {topology!r} is not known: give kind:shape, with nodes x devices for GPUs (h100:2x8), the chips "
            f"of a slice for TPUs (v5e:4x4, v5p:4x4x4; of two slices v5e:2:4x4) or cpu:8. Kinds: {', '.join(HARDWARE)}"
        )
    hardware = HARDWARE[kind]
    if of_tpus:
        return _tpus(topology, hardware, sizes, int(slices or 1))
    return {"cuda": _gpus, "cpu": _cpus}[hardware.platform](topology, hardware, sizes)


def _gpus(name: str, hardware: Hardware, sizes: list[int]) -> Topology:
    if len(sizes) > 2:
        raise ValueError(f"topology {name!r}: GPUs are nodes x devices, for example {hardware.name}:2x8")
    nodes, per_node = sizes if len(sizes) == 2 else (1, sizes[0])
    # The plugin would look for a driver; compiling needs none.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    devices = _topology_devices(
        name, "cuda", "plan-gpu", ("jax_cuda13_plugin", "jax_cuda12_plugin"),
        topology_name=hardware.name, topology=f"1x{nodes}x{per_node}", target_config=hardware.target,
    )  # fmt: skip
    return Topology(name, hardware, devices, per_node)


def _tpus(name: str, hardware: Hardware, sizes: list[int], slices: int) -> Topology:
    # Compiling needs no chip: it neither waits for who has those that are here, nor asks a cloud about them.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    shape = f"{hardware.name}:{'x'.join(map(str, sizes))}"
    several: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    devices = _topology_devices(name, "tpu", "plan-tpu", ("libtpu",), topology_name=shape, **several)
    return Topology(name, hardware, devices, math.prod(sizes))


def _topology_devices(
    name: str, platform: str, extra: str, plugins: tuple[str, ...], **description: str
) -> tuple[Any, ...]:
    from jax.experimental import topologies

    # What is compiled for absent devices cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return tuple(topologies.get_topology_desc(platform=platform, **description).devices)
    except Exception as error:  # plugins raise what they like: not installed, or a shape that they do not build
        first = " ".join(str(error).split())[:200]
    if any(importlib.util.find_spec(plugin) for plugin in plugins):
        raise ValueError(f"topology {name!r} is none that its compiler knows ({first}): give it another shape")
    raise ValueError(
        f"topology {name!r} cannot be compiled for here ({first}): pip install -e '.[{extra}]' brings the compiler "
        "for it, which needs no such device"
    )


def _cpus(name: str, hardware: Hardware, sizes: list[int]) -> Topology:
    wanted, here = math.prod(sizes), jax.devices("cpu")
    if wanted > len(here):
        raise ValueError(
            f"topology {name!r} wants {wanted} CPU devices and there are {len(here)}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted}"
        )
    return Topology(name, hardware, tuple(here[:wanted]), sizes[-1])
