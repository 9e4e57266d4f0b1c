"""What a compiled program holds on a device, with all that lies beside it there."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax

from ..config import Config
from ..gpu_memory import kept_asleep, shares_gpus, takes_turns, vllm_share
from .costs import bytes_of, waiting_bytes
from .programs import Run, Work

VLLM = "vLLM"


class Memory(NamedTuple):
    """Bytes on one device."""

    arguments: int  # what is resident included
    outputs: int  # beyond what takes an argument's place
    temporaries: int
    host: int  # in the memory of the host: arguments and temporaries
    peak: int  # while the program runs, with everything that lies there and is not its own


def lying(run: Run) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of what is resident by name: on a device, and in host memory."""
    host = {name: waiting_bytes(tree) if name in run.offloaded else 0 for name, tree in run.resident.items()}
    return {name: bytes_of(tree) - host[name] for name, tree in run.resident.items()}, host


def compiled_or_refused(lowered: jax.stages.Lowered) -> jax.stages.Compiled | str:
    """The program, or what XLA for TPUs says where it does not compile what cannot fit."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        words = " ".join(str(error).split())
        if not words.startswith("RESOURCE_EXHAUSTED"):
            raise
        return words.removeprefix("RESOURCE_EXHAUSTED: ")


def memory_of(compiled: jax.stages.Compiled, work: Work, run: Run) -> Memory:
    """By XLA's own account."""
    found: Any = compiled.memory_analysis()
    assert found is not None, "this backend does not account for its programs"
    arguments, host, arriving = found.argument_size_in_bytes, found.host_argument_size_in_bytes, 0
    if not host:
        host, arriving = waiting(work, run)
        arguments -= host
    outputs, temporaries = found.output_size_in_bytes - found.alias_size_in_bytes, found.temp_size_in_bytes
    peak = beside(work, run) + arguments + outputs + temporaries + arriving
    return Memory(arguments, outputs, temporaries, host + found.host_temp_size_in_bytes, peak)


def memory_of_refused(words: str, work: Work, run: Run) -> Memory:
    """The least that a program needs which XLA did not compile: the largest number in its `words` is of temporaries."""
    numbers = re.findall(r"(\d+(?:\.\d+)?)([KMGT])", words)
    needed = max((int(float(number) * 2 ** (10 * " KMGT".index(unit))) for number, unit in numbers), default=0)
    arguments, (host, _) = sum(lying(run)[0][name] for name in work.uses), waiting(work, run)
    return Memory(arguments, 0, needed, host, beside(work, run) + arguments + needed)


def beside(work: Work, run: Run) -> int:
    """Bytes that lie on a device and are not the program's."""
    gone = {*work.uses, *work.frees, *(run.asleep if work.learns else ())}
    others = run.learning if work.learns else run.answering
    return sum(size for name, size in lying(run)[0].items() if name not in gone) + sum(others.values())


def with_vllm(run: Run, c: Config, gpu: float | None) -> Run:
    """The run beside a vLLM that shares its GPUs, which have so many bytes; None: there are none, or JAX has its share."""
    if gpu is not None and c.rollout.engine == "vllm" and shares_gpus(c.rollout.vllm):
        share = vllm_share(c, sum(lying(run)[0].values()), gpu)
        assert share is not None
        run.answering = {VLLM: int(share * gpu)}
        run.learning = {"vLLM asleep": kept_asleep(gpu)} if takes_turns(c) else run.answering
    return run


def waiting(work: Work, run: Run) -> tuple[int, int]:
    """Bytes in host memory that a program reads, and those of them that are on the device at once.

    Counted, for the compilers that know no host memory (XLA for described GPUs, and for CPUs, whose memory is one):
    what is streamed by layers needs room for two of them.
    """
    sizes = {name: waiting_bytes(run.resident[name]) for name in work.uses if name in run.offloaded}
    at_once = {name: size if name in work.whole else 2 * size // work.model.num_layers for name, size in sizes.items()}
    return sum(sizes.values()), sum(at_once.values())
