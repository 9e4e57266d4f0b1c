"""Orbax checkpoints of this project: arrays read by slice under Hugging Face names, and a model written array by array.

There are two kinds: a converted model (a folder with config.json and `params/`) and a checkpoint of a run
(`runs/<name>/checkpoints/global_step_<n>`, with optimizer states). Orbax would load whole arrays onto devices;
tensorstore, which it keeps them in, reads parts of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..models.config import ModelConfig
from .folder import load_hf_config
from .hf_names import Row, axis_sizes, in_order
from .stored import Checkpoint, Index, StoredTensor

PARAMS = "params"  # the folder of a converted model that orbax wrote
_COMPLETE_FILE = "commit_success.txt"  # orbax writes it last
_METADATA_FILE = "_CHECKPOINT_METADATA"


def is_orbax(folder: Path) -> bool:
    return (folder / _METADATA_FILE).is_file()


def open_arrays(folder: Path) -> dict[str, Any]:
    """The arrays of an orbax checkpoint by dotted name, as tensorstores: numpy's indexing, then `.read().result()`."""
    import tensorstore

    if not (folder / _COMPLETE_FILE).is_file():
        raise ValueError(f"{folder} is a checkpoint that was not finished: name an older one")
    kvstore = {"driver": "ocdbt", "base": f"file://{(folder / 'state').resolve()}/"}
    try:
        keys = tensorstore.KvStore.open(kvstore).result().list().result()
        names = sorted({key.decode().removesuffix("/zarr.json") for key in keys if key.endswith(b"/zarr.json")})
        specs = [{"driver": "zarr3", "kvstore": {**kvstore, "path": f"{name}/"}} for name in names]
        opening = [tensorstore.open(spec, open=True, read=True) for spec in specs]
        return {name: future.result() for name, future in zip(names, opening, strict=True)}
    except ValueError as error:
        raise ValueError(f"{folder} cannot be read ({str(error)[:200]}): it is damaged") from error


def arrays_under(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def as_checkpoint(folder: Path, arrays: Mapping[str, Any], config: ModelConfig, head: str) -> Checkpoint:
    """The arrays of a tree of parameters under their Hugging Face names. Raises ValueError where they do not fit."""
    sizes = axis_sizes(config)
    tensors = {}
    rows = set()
    for row, layer in in_order(config, head):
        array = arrays.get(row.ours)
        if array is None or tuple(array.shape) != row.our_shape(sizes):
            found = "missing" if array is None else f"of shape {tuple(array.shape)}"
            raise ValueError(f"{folder}: array {row.ours} is {found}, expected {row.our_shape(sizes)}")
        tensors[row.hf.format(layer)] = _tensor(folder, array, row, layer, sizes)
        rows.add(row.ours)
    if arrays.keys() - rows:
        raise ValueError(
            f"{folder} holds {min(arrays.keys() - rows)}, which this model ({config.family}) has no place for"
        )
    return Checkpoint(folder, tensors, kind="orbax")


def head_settings(arrays: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The head of a tree of parameters, and what `ModelConfig` must hold for it."""
    if "score.kernel" not in arrays:
        return "lm", {}
    return "score", {"num_labels": int(arrays["score.kernel"].shape[1]), "score_bias": "score.bias" in arrays}


def open_converted(folder: Path) -> Checkpoint:
    """A model that the converter wrote: config.json, and arrays in `params/`."""
    arrays = open_arrays(folder / PARAMS)
    head, settings = head_settings(arrays)
    return as_checkpoint(folder, arrays, ModelConfig.from_hf(load_hf_config(folder), **settings), head)


def save_arrays(path: Path, arrays: Iterator[tuple[str, Any]]) -> None:
    """Write arrays, which come one at a time under dotted names, as an orbax checkpoint; no more than one is held."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False  # as in checkpoint.py: it costs more time than it saves space
    with context:
        for name, array in arrays:
            tree: Any = array
            for part in reversed(name.split(".")):
                tree = {part: tree}
            ocp.partial.save(str(path), tree)
        ocp.partial.finalize(str(path))


def _tensor(folder: Path, array: Any, row: Row, layer: int | None, sizes: Mapping[str, int]) -> StoredTensor:
    def read(index: Index) -> np.ndarray:
        piece = array if layer is None else array[layer]
        return row.to_hf(np.asarray(piece.read().result()))[index]

    return StoredTensor(row.hf_shape(sizes), np.dtype(array.dtype.numpy_dtype), folder.name, read)
