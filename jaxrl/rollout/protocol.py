"""What trainer and vLLM sidecar say to each other about weights. Standard library only: both environments import it.

An export is one safetensors file. Its `Manifest` travels beside it, with the CRC-32 of every tensor, and is checked in
this order before the model is touched: the file is whole, it is of the run and version that were announced, names and
shapes are those of the model that is served, the bytes are those that the trainer wrote. To a server that has the file
of the version before, only the pieces that differ are uploaded, each after its `PIECE`.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAYOUT_FILE = "jaxrl_layout.json"  # beside config.json: name -> shape of every tensor that an export must hold
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # what weights are served in, as safetensors spells it
PIECE = struct.Struct("<QQ")  # where in the file it lies, and how many bytes it has
VERSION_DIGITS = 20


class Refused(ValueError):
    """An export that must not be loaded. Nothing has been touched: the version before goes on answering."""


def not_finite(version: int, name: str) -> Refused:
    return Refused(f"version {version} of the weights has NaN or infinity in {name}: training went wrong")


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: str  # F32, F16, BF16
    checksum: int = 0  # CRC-32 of the bytes; of what goes through no file, what `vllm_transfer` computes on the devices

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Manifest:
    """One version of the weights, in the order of the file."""

    run: str  # a name of its own for every engine, so that two trainers cannot take each other's weights for theirs
    version: int
    tensors: tuple[Tensor, ...]

    @property
    def label(self) -> str:
        """The name of this version among those of all runs."""
        return f"{self.run}:{self.version}"

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Where they are equal, so is the place of every tensor in the file."""
        return [(t.name, t.shape, t.dtype) for t in self.tensors]

    @property
    def digest(self) -> str:
        """Of names, shapes, dtypes and contents: equal for equal weights, whatever their version."""
        return hashlib.sha256(repr(self.tensors).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        tensors = [[t.name, list(t.shape), t.dtype, t.checksum] for t in self.tensors]
        return {"run": self.run, "version": self.version, "tensors": tensors}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Manifest:
        tensors = tuple(Tensor(name, tuple(shape), *rest) for name, shape, *rest in given["tensors"])
        return cls(given["run"], given["version"], tensors)


def encode_header(run: str, version: int, tensors: tuple[Tensor, ...]) -> bytes:
    """How the file of an export begins: safetensors' header, with run and version as its metadata.

    As long for every version of a run, so that a tensor lies at the same place in the files of all of them.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "run": run, "version": str(version)}}
    offset = 0
    for t in tensors:
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (VERSION_DIGITS - len(str(version)))
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def check_export(path: Path, manifest: Manifest, layout: Mapping[str, list[int]] | None) -> None:
    """Raises Refused, in words, unless the file is the export that `manifest` announces and fits `layout`."""
    what = f"version {manifest.version} of the weights ({path.name})"
    header = encode_header(manifest.run, manifest.version, manifest.tensors)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            found = file.read(len(header))
    except OSError as error:
        raise Refused(f"{what} cannot be read on the server's host: {error.strerror}") from None
    if found != header:
        raise Refused(f"{what} is not the file that was announced: {_difference(found, manifest)}")
    if size != len(header) + manifest.nbytes:
        raise Refused(f"{what} is truncated: it has {size} bytes of {len(header) + manifest.nbytes}")
    if layout is not None:
        check_layout(what, manifest, layout)
    _check_bytes(what, path, len(header), manifest)


def _difference(found: bytes, manifest: Manifest) -> str:
    """What a header says that `manifest` does not."""
    try:
        length = int.from_bytes(found[:8], "little")
        header = json.loads(found[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
    except (ValueError, AttributeError):
        return "its header cannot be read"
    theirs = metadata.get("run"), metadata.get("version")
    if theirs != (manifest.run, str(manifest.version)):
        return f"it holds version {theirs[1]} of run {theirs[0]}, and the run is {manifest.run}"
    for t in manifest.tensors:
        entry = header.get(t.name)
        if entry is None:
            return f"tensor {t.name} is missing"
        if entry.get("shape") != list(t.shape) or entry.get("dtype") != t.dtype:
            return f"tensor {t.name} is {entry.get('dtype')} {entry.get('shape')}, not {t.dtype} {list(t.shape)}"
    return "its header lists other tensors"


def check_layout(what: str, manifest: Manifest, layout: Mapping[str, list[int]]) -> None:
    """Raises Refused, in words, unless the tensors are those of the model that is served."""
    ours = {t.name: list(t.shape) for t in manifest.tensors}
    if missing := sorted(layout.keys() - ours.keys()):
        raise Refused(f"{what} lacks {len(missing)} tensors of the model that is served, the first is {missing[0]}")
    if extra := sorted(ours.keys() - layout.keys()):
        raise Refused(f"{what} is of another model than the one that is served, which has no tensor {extra[0]}")
    for name, shape in ours.items():
        if shape != layout[name]:
            raise Refused(f"{what}: tensor {name} has shape {shape}, and the model that is served {layout[name]}")


def _check_bytes(what: str, path: Path, start: int, manifest: Manifest) -> None:
    offsets, offset = [], start
    for t in manifest.tensors:
        offsets.append(offset)
        offset += t.nbytes
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        with memoryview(mapped) as view, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

            def crc(i: int) -> int:
                return zlib.crc32(view[offsets[i] : offsets[i] + manifest.tensors[i].nbytes])

            for t, found in zip(manifest.tensors, pool.map(crc, range(len(offsets))), strict=True):
                if found != t.checksum:
                    raise Refused(f"{what} was damaged on its way: the bytes of {t.name} are not those that were sent")


def read_layout(folder: Path) -> dict[str, list[int]] | None:
    """Names and shapes of the model in a folder: its layout file, else the headers of its weights; None without both."""
    if (folder / LAYOUT_FILE).is_file():
        return json.loads((folder / LAYOUT_FILE).read_text())
    layout: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        layout |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    if not layout:
        return None
    if json.loads((folder / "config.json").read_text()).get("tie_word_embeddings"):
        layout.pop("lm_head.weight", None)  # some files keep a copy, which no export has
    return {name: shape for name, shape in layout.items() if not name.endswith(".rotary_emb.inv_freq")}
