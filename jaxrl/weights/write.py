"""Write a complete Hugging Face folder: weights in shards, config, companions, and `manifest.json`, which lists them.

Trainer, converter and GGUF reader all write here. A tensor is written before the next one is asked for.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .folder import both_spellings, new_folder, write_json
from .safetensors_writer import TensorSpec, write_safetensors

MANIFEST = "manifest.json"
_MANIFEST_VERSION = 1


def write_model(
    out_dir: Path,
    hf_config: Mapping[str, Any],
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    source: str,
    companions: Callable[[Path], None],
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """A folder with the `tensors`, which come one at a time and in the order of `specs`.

    `source` is what they were made from, for the manifest; `companions` adds tokenizer and the like. `check` looks at
    the finished folder before it takes its name: what it raises leaves nothing behind.
    """
    with new_folder(out_dir, overwrite=overwrite) as folder:
        companions(folder)
        write_json(folder / "config.json", both_spellings(hf_config, specs[0].dtype.name))
        manifest = Manifest(source, specs)
        _write_shards(folder, specs, manifest.recorded(tensors), max_shard_bytes)
        manifest.write(folder)
        check(folder)


class Manifest:
    """Name, shape, dtype and SHA-256 of every tensor of a folder, taken as they pass by."""

    def __init__(self, source: str, specs: Iterable[TensorSpec]):
        self._content: dict[str, Any] = {
            "manifest_version": _MANIFEST_VERSION,
            "jaxrl_version": _version(),
            "source": source,
            "tensors": {spec.name: {"shape": list(spec.shape), "dtype": spec.dtype.name} for spec in specs},
        }

    def recorded(self, tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
        for name, tensor in tensors:
            self.record(name, [tensor])
            yield name, tensor

    def record(self, name: str, parts: Iterable[np.ndarray]) -> None:
        """A tensor that comes in parts, one after the other in memory."""
        self._content["tensors"][name]["sha256"] = sha256(parts)

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, self._content)


def sha256(parts: Iterable[np.ndarray]) -> str:
    """The hash of a tensor's bytes as a file holds them."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _version() -> str:
    try:
        return importlib.metadata.version("jaxrl")
    except importlib.metadata.PackageNotFoundError:  # run from its source folder
        return "not installed"


def _write_shards(
    folder: Path, specs: Sequence[TensorSpec], tensors: Iterator[tuple[str, np.ndarray]], max_shard_bytes: float
) -> None:
    """One file, or several of at most `max_shard_bytes` (a larger tensor has its own) and an index."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", specs, tensors)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, islice(tensors, len(shard)))
        weight_map |= {spec.name: name for spec in shard}
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
