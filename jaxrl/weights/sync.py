"""Publishing weights: a version as a stream of bytes, tensor by tensor from the devices, into one or several sinks.

An export runs once, whatever number of servers want it: each piece goes to every sink before the next one leaves the
devices. A sink is a file (on tmpfs for servers on this host, on a shared disk for others), which takes its name when all
of it is there; an HTTP upload follows it as it grows, and may leave out what the file before has too.
`rollout/protocol.py` says what the bytes are and how they are checked.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import uuid
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..models.config import ModelConfig
from ..rollout.protocol import LAYOUT_FILE, PIECE, Manifest, Tensor, encode_header
from .export import config_for_head, hf_tensors
from .folder import both_spellings, write_json
from .hf_names import in_order
from .peft_tree import lora_tensors, peft_tensors
from .pretrained import Pretrained
from .safetensors_writer import dtype_named

Tree = Any
Stream = Callable[[], Iterator[tuple[str, np.ndarray]]]
SPELLINGS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
EXPONENTS = {
    "F32": (np.uint32, np.uint32(0x7F800000)),
    "F16": (np.uint16, np.uint16(0x7C00)),
    "BF16": (np.uint16, np.uint16(0x7F80)),
}
AT_ONCE = 4 << 20  # bytes that go to the sinks
LOOK = 1 << 18  # bytes that are looked at at once


class Sink(Protocol):
    def write(self, piece: memoryview) -> None: ...


class Export:
    """One version on its way out. `manifest` is complete when all of it has been sent."""

    def __init__(self, run: str, version: int, shapes: dict[str, tuple[int, ...]], dtype: str, stream: Stream):
        self.dtype = dtype_named(dtype)
        self._tensors = [Tensor(name, shape, SPELLINGS[dtype]) for name, shape in shapes.items()]
        self._stream = stream
        self.manifest = Manifest(run, version, tuple(self._tensors))
        self.not_finite: list[str] = []  # tensors with NaN or infinity, when all of it has been sent
        self._pieces = self._all_pieces()

    def _all_pieces(self) -> Iterator[memoryview]:
        m, done = self.manifest, []
        yield memoryview(encode_header(m.run, m.version, m.tensors))
        with ThreadPoolExecutor(1) as beside:  # it looks at a tensor while the sinks write it
            for announced, (name, array) in zip(m.tensors, self._stream(), strict=True):
                assert (name, array.shape, array.dtype) == (announced.name, announced.shape, self.dtype), name
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                looked_at = beside.submit(_look_at, data, announced.dtype)
                for start in range(0, len(data), AT_ONCE):
                    yield data[start : start + AT_ONCE]
                crc, is_finite = looked_at.result()
                done.append(Tensor(name, announced.shape, announced.dtype, crc))
                if not is_finite:
                    self.not_finite.append(name)
        self.manifest = Manifest(m.run, m.version, tuple(done))

    def send(self, sinks: Sequence[Sink]) -> None:
        """All of it to each of the sinks. On several hosts each must call this (or `finish`), and each is given everything."""
        for piece in self._pieces:
            for sink in sinks:
                sink.write(piece)

    def finish(self) -> None:
        """Run through what has not been sent, since other hosts gather it too."""
        self.send([])


def _look_at(data: memoryview, dtype: str) -> tuple[int, bool]:
    """Checksum of a tensor's bytes, and whether all of its numbers are finite: an exponent of ones is NaN or infinity."""
    word, exponent = EXPONENTS[dtype]
    crc, is_finite = 0, True
    for start in range(0, len(data), LOOK):  # what fits a cache: both read it
        part = data[start : start + LOOK]
        crc = zlib.crc32(part, crc)
        is_finite = is_finite and (np.frombuffer(part, word) & exponent).max() < exponent
    return crc, bool(is_finite)


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every tensor of a language model."""
    return {tensor.name: tensor.shape for tensor in in_order(config, "lm")}


def model_export(run: str, version: int, variables: Tree, config: ModelConfig, dtype: str) -> Export:
    """The whole model; adapters are merged."""
    lora, packed = variables.get("lora"), variables.get("packed")

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        return hf_tensors(variables["params"], config, lora=lora, packed=packed, dtype=dtype_named(dtype))

    return Export(run, version, model_shapes(config), dtype, stream)


def adapter_export(run: str, version: int, variables: Tree, config: ModelConfig) -> Export:
    """The adapters alone, under PEFT's names, in float32."""
    shapes = {tensor.name: tensor.shape for tensor in lora_tensors(config)}

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for name, array in peft_tensors(variables["lora"], config):
            yield name, array.astype(np.float32, copy=False)

    return Export(run, version, shapes, "float32", stream)


class FileSink:
    """`path` appears when all has been written and `close` is called.

    `before` is a file of the same length; `on_change` is called when the first piece after the header is written that it
    does not have at the same place.
    """

    def __init__(self, path: Path, before: Path | None = None, on_change: Callable[[], None] = lambda: None):
        self.path, self._partial = path, path.with_suffix(".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("wb")
        self._before = None if before is None else np.memmap(before, np.uint8, "r")
        self._on_change, self._has_changed = on_change, False
        self._pieces: list[tuple[int, int, bool]] = []  # place, length, and whether `before` lacks it
        self._size = 0
        self._is_whole = self._is_abandoned = False

    def write(self, piece: memoryview) -> None:
        self._file.write(piece)
        self._file.flush()  # for those who follow
        start, self._size = self._size, self._size + len(piece)
        is_new = self._before is None or not _are_equal(piece, self._before[start : self._size])
        self._pieces.append((start, len(piece), is_new))
        if is_new and start > 0 and not self._has_changed:
            self._has_changed = True
            self._on_change()

    def close(self) -> None:
        self._before = None
        self._file.close()
        self._partial.replace(self.path)
        self._is_whole = True

    def abandon(self) -> None:
        self._before, self._is_abandoned = None, True
        self._file.close()
        self._partial.unlink(missing_ok=True)

    async def follow(self, *, changes: bool = False) -> AsyncIterator[bytes]:
        """Its pieces, also while another thread still writes them. `changes`: those alone that `before` lacks, and ahead
        of each where it lies."""
        try:
            file = self._partial.open("rb", buffering=0)
        except FileNotFoundError:
            file = self.path.open("rb", buffering=0)
        num = 0
        with file:
            while True:
                is_whole = self._is_whole  # asked before the look at the pieces, which may be the last ones
                for start, length, is_new in self._pieces[num:]:
                    num += 1
                    if changes and not is_new:
                        continue
                    if changes:
                        yield PIECE.pack(start, length)
                    yield os.pread(file.fileno(), length, start)
                if is_whole:
                    return
                if self._is_abandoned:
                    raise OSError(f"{self.path.name} was never written to its end")
                await asyncio.sleep(0.005)


def _are_equal(piece: memoryview, other: np.ndarray) -> bool:
    """Looks no further than the first difference."""
    ours = np.frombuffer(piece, np.uint8)
    return all(np.array_equal(ours[i : i + LOOK], other[i : i + LOOK]) for i in range(0, len(ours), LOOK))


class SharedFolder:
    """A folder on tmpfs for this process, removed when the process ends, also by SIGKILL.

    A shell waits at the other end of a pipe for that; nothing else would remove shared memory then.
    """

    def __init__(self, parent: Path = Path("/dev/shm")):
        if not os.access(parent, os.W_OK):
            raise ValueError(f"{parent} cannot be written to: set rollout.vllm.transport to file or http")
        self.path = parent / f"jaxrl-{uuid.uuid4().hex[:12]}"
        self.path.mkdir()
        self._guard = subprocess.Popen(
            ["sh", "-c", 'read -r _; rm -rf -- "$1"', "sh", str(self.path)],
            stdin=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def close(self) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()


def served_folder(config: ModelConfig, source: Pretrained, folder: Path) -> Path:
    """A Hugging Face folder without weights, for a server that gets them from us: config, tokenizer, and the layout."""
    folder.mkdir(parents=True, exist_ok=True)
    source.write_companions(folder)
    hf_config = config_for_head(source.hf_config, config, "lm")
    write_json(folder / "config.json", both_spellings(hf_config, config.compute_dtype))
    write_json(folder / LAYOUT_FILE, {name: list(shape) for name, shape in model_shapes(config).items()})
    return folder
