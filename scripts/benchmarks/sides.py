"""The two sides that a benchmark compares: each in a process of its own, taking turns, checked to have done the same work."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from jaxrl.batch import Prompt
from jaxrl.models.config import ModelConfig

SEED = 0
SPREAD = 4  # ragged: the longest is this many times the shortest

# Dense TFLOP/s of tensor cores by the vendor's data sheets: (float32, which XLA multiplies as TF32, and bfloat16).
PEAK_TFLOPS = {
    "B200": (1125, 2250),
    "H200": (494, 989),
    "H100 PCIe": (378, 756),
    "H100": (494, 989),
    "A100": (156, 312),
    "L40S": (183, 366),
}


@dataclass(frozen=True)
class Setup:
    """What both sides are built from."""

    source: Path  # a Hugging Face folder
    num_layers: int
    dtype: str
    row_length: int
    micro_batch_tokens: int


class Call(NamedTuple):
    seconds: float
    result: float  # what both sides must agree on: the loss, or how many tokens were drawn


class Device(NamedTuple):
    backend: str  # cpu, gpu, tpu
    name: str


class Side:
    """One side in a process of its own: memory, threads and allocator are not the other's."""

    def __init__(self, stack: ExitStack, name: str, kind: type, *args: Any):
        self.name, self.kind = name, kind
        self._pool = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
        self._pool.submit(_build, kind, *args).result()

    def __call__(self, method: Callable, *args: Any) -> Any:
        return self._pool.submit(_call, method, *args).result()


_built: Any = None  # in the process of a side: the side


def _build(kind: type, *args: Any) -> None:
    global _built
    _built = kind(*args)


def _call(method: Callable, *args: Any) -> Any:
    return method(_built, *args)


def start_sides(
    stack: ExitStack, setup: Setup, jaxrl_kind: type, torch_kind: type
) -> tuple[ModelConfig, Device, Side, Side | None]:
    """The model, jaxrl's device and the two sides; None where there is no torch to compare with."""
    from jaxrl.config import Model
    from jaxrl.roles import model_config
    from jaxrl.weights.folder import load_hf_config

    config = model_config(Model(path=str(setup.source)), load_hf_config(setup.source), num_layers=setup.num_layers)
    ours = Side(stack, "jaxrl", jaxrl_kind, setup)
    device = ours(jaxrl_kind.device)
    if importlib.util.find_spec("torch") is None:
        print("torch is not installed, so there is nothing to compare with (pip install torch): jaxrl alone is timed")
        return config, device, ours, None
    place = {"cpu": "cpu", "gpu": "cuda"}.get(device.backend)
    if place is None or (place == "cuda" and not torch_sees_a_gpu()):
        print(f"jaxrl runs on {device.name} and this torch cannot: install one that does; jaxrl alone is timed")
        return config, device, ours, None
    return config, device, ours, Side(stack, "torch", torch_kind, setup, place)


def torch_sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def load_jaxrl(setup: Setup) -> tuple[ModelConfig, Any, Any]:
    """Model, mesh of one device and parameters."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # torch shares the GPU
    from jaxrl.config import Model
    from jaxrl.host_memory import keep_freed_memory
    from jaxrl.parallel import make_mesh
    from jaxrl.roles import abstract_variables, load_base, model_config
    from jaxrl.weights.pretrained import open_pretrained

    keep_freed_memory()
    model, source = Model(path=str(setup.source), compute_dtype=setup.dtype), open_pretrained(setup.source)
    config = model_config(model, source.hf_config, num_layers=setup.num_layers)
    mesh = make_mesh(1, 1, 1)
    return config, mesh, load_base(source, config, abstract_variables(mesh, config, "lm"))


def load_torch(setup: Setup, device: str) -> Any:
    """The same weights in transformers, float32."""
    import torch
    import transformers

    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")  # as XLA does on a GPU: TF32
    torch.manual_seed(SEED)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        setup.source, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.model.layers = model.model.layers[: setup.num_layers]
    model.config.num_hidden_layers = setup.num_layers
    return model.to(device)


def take_turns(runs: Mapping[str, Callable[[], Call]], rounds: int) -> dict[str, list[Call]]:
    """Every side once and then `rounds` times, who goes first alternating."""
    calls: dict[str, list[Call]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            calls[name].append(runs[name]())
    return calls


def check_equal(what: str, ours: float, theirs: float, *, tolerance: float) -> None:
    if not abs(ours - theirs) <= tolerance:
        raise ValueError(
            f"{what} is {ours:.6f} in jaxrl and {theirs:.6f} in torch, further apart than {tolerance:g}: the two did "
            "not do the same work, so their times say nothing"
        )


def print_heading(args: argparse.Namespace, setup: Setup, device: Device) -> None:
    print(
        f"{args.task}: {args.model}, {setup.num_layers} layers, {setup.dtype}, {args.sequences} sequences of up to "
        f"{args.prompt_tokens}+{args.response_tokens} tokens, {args.rounds} rounds, {device.name}"
    )


def print_case(
    case: str, calls: dict[str, list[Call]], *, what: str, tolerance: float, num_tokens: int, flops: float,
    peak: float | None,
) -> None:  # fmt: skip
    """A line for each side and one for the ratio. Raises ValueError where the sides disagree."""
    for name, side in calls.items():
        seconds = median(call.seconds for call in side[1:])
        line = f"{case:8} {name:6} {seconds:9.3f} s {num_tokens / seconds:10.0f} tokens/s   {what} {side[0].result:.7g}"
        print(line + (f"   MFU {100 * flops / seconds / peak:.1f} %" if peak else ""), flush=True)
    if len(calls) == 2:
        ours, theirs = calls.values()
        for our_call, their_call in zip(ours, theirs, strict=True):
            check_equal(f"{case}: {what}", our_call.result, their_call.result, tolerance=tolerance)
        ratio, lowest, highest = speed_ratio(ours, theirs)
        print(f"{case:8} jaxrl / torch: {ratio:.2f} (rounds: {lowest:.2f} to {highest:.2f})", flush=True)


def speed_ratio(ours: Sequence[Call], theirs: Sequence[Call]) -> tuple[float, float, float]:
    """How many times as fast ours is: by medians, and the lowest and highest of a single round. The first is left out."""
    rounds = [t.seconds / o.seconds for o, t in zip(ours[1:], theirs[1:], strict=True)]
    by_medians = median(t.seconds for t in theirs[1:]) / median(o.seconds for o in ours[1:])
    return by_medians, min(rounds), max(rounds)


def print_memory(device: Device, ours: Side, theirs: Side | None) -> None:
    if device.backend == "gpu":
        for side in filter(None, (ours, theirs)):
            print(f"memory high-water of {side.name}: {side(side.kind.memory_gb):.2f} GiB")


def is_exact(setup: Setup, device: Device) -> bool:
    """Are products those of float32? A GPU rounds their factors to TF32."""
    return setup.dtype == "float32" and device.backend == "cpu"


def peak_flops(device: Device, dtype: str) -> float | None:
    """FLOP/s that the device could do at most; None on a CPU, where the data sheet says little."""
    if device.backend != "gpu":
        return None
    for name, (float32, bfloat16) in PEAK_TFLOPS.items():
        if name in device.name:
            return 1e12 * (bfloat16 if dtype == "bfloat16" else float32)
    raise ValueError(f"MFU needs the peak of {device.name}: add it to PEAK_TFLOPS in {Path(__file__).name}")


class OnJax:
    """What every side of jaxrl's can say of its device."""

    def device(self) -> Device:
        import jax

        return Device(jax.default_backend(), jax.devices()[0].device_kind)

    def memory_gb(self) -> float:
        from jaxrl.metrics import memory_metrics

        return memory_metrics()["perf/max_memory_allocated_gb"]


class OnTorch:
    """The same of torch's."""

    def memory_gb(self) -> float:
        import torch

        return torch.cuda.max_memory_allocated() / 2**30


def bare_prompt(ids: list[int]) -> Prompt:
    return Prompt(ids, "", "benchmark", None, {}, None, 0)


def make_lengths(rng: np.random.Generator, num: int, longest: int, *, ragged: bool) -> np.ndarray:
    """`num` lengths: all `longest`, or evenly spread from a fourth of it up to it, in random order."""
    shortest = -(-longest // SPREAD) if ragged else longest
    return rng.permutation(np.linspace(longest, shortest, num).round().astype(int))
