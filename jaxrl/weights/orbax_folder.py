"""Orbax checkpoints of this project: arrays read by slice under Hugging Face names, and a model written slice by slice.

There are two kinds: a converted model (a folder with config.json and `params/`) and a checkpoint of a run
(`runs/<name>/checkpoints/global_step_<n>`, with optimizer states). Orbax would load and save whole arrays; tensorstore,
which it keeps them in, reads and writes parts of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..models.config import ModelConfig
from .folder import load_hf_config
from .hf_names import HfTensor, Row, axis_sizes, in_order, rows, unflatten
from .safetensors_writer import TensorSpec
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
    try:
        keys = tensorstore.KvStore.open(_kvstore(folder)).result().list().result()
        names = sorted({key.decode().removesuffix("/zarr.json") for key in keys if key.endswith(b"/zarr.json")})
        specs = [{"driver": "zarr3", "kvstore": _kvstore(folder, name)} for name in names]
        opening = [tensorstore.open(spec, open=True, read=True) for spec in specs]
        return {name: future.result() for name, future in zip(names, opening, strict=True)}
    except ValueError as error:
        raise ValueError(f"{folder} cannot be read ({str(error)[:200]}): it is damaged") from error


def arrays_under(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def as_checkpoint(folder: Path, arrays: Mapping[str, Any], config: ModelConfig, head: str) -> Checkpoint:
    """The arrays of a tree of parameters under their Hugging Face names. Raises ValueError where they do not fit."""
    sizes, reader, table = axis_sizes(config), _Reader(arrays), rows(config, head=head)
    for row in table:
        array = arrays.get(row.ours)
        if array is None or tuple(array.shape) != row.our_shape(sizes):
            found = "missing" if array is None else f"of shape {tuple(array.shape)}"
            raise ValueError(f"{folder}: array {row.ours} is {found}, expected {row.our_shape(sizes)}")
    if odd := arrays.keys() - {row.ours for row in table}:
        raise ValueError(f"{folder} holds {min(odd)}, which this model ({config.family}) has no place for")
    tensors = {}
    for tensor in in_order(config, head):
        dtype = np.dtype(arrays[tensor.parts[0][0].ours].dtype.numpy_dtype)
        tensors[tensor.name] = StoredTensor(tensor.shape, dtype, folder.name, partial(_hf_slice, reader, tensor))
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


def create_arrays(folder: Path, specs: Sequence[TensorSpec], chunks: Sequence[tuple[int, ...]]) -> list[Any]:
    """A new orbax checkpoint of arrays under dotted names, as tensorstores in which the caller writes the numbers.

    A chunk is what is written, and read, at once.
    """
    import tensorstore
    from orbax.checkpoint import v1 as ocp

    # Orbax would hold an array three times. What it notes of one of numpy is its name: shape and dtype are those of the
    # array that lies there, so each is made anew, as large as it is to be.
    ocp.save(str(folder.resolve()), unflatten({spec.name: np.zeros(1, spec.dtype) for spec in specs}))
    arrays = []
    for spec, chunk in zip(specs, chunks, strict=True):
        place = {"driver": "zarr3", "kvstore": _kvstore(folder, spec.name), "store_data_equal_to_fill_value": True}
        arrays.append(
            tensorstore.open(
                place, create=True, delete_existing=True, dtype=spec.dtype, shape=spec.shape,
                chunk_layout=tensorstore.ChunkLayout(chunk_shape=chunk),
            ).result()
        )  # fmt: skip
    return arrays


def _kvstore(folder: Path, name: str = "") -> dict[str, str]:
    """Where tensorstore finds an array, or all of them."""
    return {"driver": "ocdbt", "base": f"file://{(folder / 'state').resolve()}/", "path": f"{name}/" if name else ""}


class _Reader:
    """Reads arrays a layer at a time, or whole where one was not cut by layers.

    What was read is kept for the next call: a whole array has the next layer too, and a layer the next expert.
    """

    def __init__(self, arrays: Mapping[str, Any]):
        self._arrays = arrays
        self._kept: dict[tuple[str, int | None], np.ndarray] = {}

    def read(self, parts: Sequence[tuple[Row, tuple[int, ...]]]) -> list[np.ndarray]:
        """The pieces of ours that a tensor is made of."""
        blocks = [self._block(row.ours, place) for row, place in parts]
        self._kept = {block: array for block, array in self._kept.items() if block in blocks}
        for ours, layer in blocks:
            if (ours, layer) not in self._kept:
                array = self._arrays[ours] if layer is None else self._arrays[ours][layer]
                self._kept[ours, layer] = np.asarray(array.read().result())
        return [
            self._kept[block][place if block[1] is None else place[1:]]
            for block, (_, place) in zip(blocks, parts, strict=True)
        ]

    def _block(self, ours: str, place: tuple[int, ...]) -> tuple[str, int | None]:
        cut = place and self._arrays[ours].chunk_layout.read_chunk.shape[0] == 1
        return ours, place[0] if cut else None


def _hf_slice(reader: _Reader, tensor: HfTensor, index: Index) -> np.ndarray:
    return tensor.of(reader.read(tensor.parts))[index]
