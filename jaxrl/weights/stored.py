"""Named tensors that have not been read: what every kind of checkpoint looks like to the rest of the border.

Names and layouts are those of transformers' torch models, whatever the files are; `formats.py` opens the files. What
changes a checkpoint on its way in (an adapter that is merged, 4-bit weights that are unpacked, a head under another
name) is a checkpoint again, whose tensors read those of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

Index = tuple[slice, ...]


def cast(array: np.ndarray, dtype: np.dtype, what: str) -> np.ndarray:
    """The numbers as another dtype. Raises ValueError, which begins with `what`, where one is too large for it."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    if np.isinf(out).any() and np.isinf(out).sum() > np.isinf(array).sum():
        largest = np.abs(np.where(np.isfinite(array), array, 0).astype(np.float64)).max()
        wider = "bfloat16 or float32" if dtype == np.float16 else "float32"
        raise ValueError(f"{what} holds numbers up to {largest:.3g}, which {dtype.name} cannot: ask for {wider}")
    return out


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint that has not been read. `read` is given a slice for each dimension, with both ends.

    `packed` is the `bnb.Packed` of numbers that are kept in 4 bits.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    file: str
    read: Callable[[Index], np.ndarray] = field(repr=False, compare=False)
    packed: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, array: np.ndarray, file: str) -> StoredTensor:
        """An array that may be in memory or mapped to it."""
        return cls(array.shape, array.dtype, file, lambda index: array[(*index, ...)])

    @property
    def whole(self) -> Index:
        return tuple(slice(0, size) for size in self.shape)


class Checkpoint:
    """The tensors of a model by name, read by slice. `bytes_read` counts what was; `layout` is "torch" or "flax"."""

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor], *, kind: str, layout: str = "torch"):
        self.folder = folder
        self.tensors = tensors
        self.kind = kind
        self.layout = layout
        self.bytes_read = 0

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """The slice `index` of a tensor, or all of it."""
        tensor = self.tensors[name]
        if index is None:
            index = tensor.whole
        else:
            cuts = zip(index, tensor.shape, strict=True)
            index = tuple(slice(*cut.indices(size)[:2]) for cut, size in cuts)
        if any(cut.start >= cut.stop for cut in index):  # safetensors refuses a slice of nothing
            return np.empty([max(cut.stop - cut.start, 0) for cut in index], tensor.dtype)
        array = tensor.read(index)
        self.bytes_read += array.nbytes
        return array

    def stored(self, name: str) -> StoredTensor:
        """A tensor for another checkpoint that reads from this one, and is counted here too."""
        return replace(self.tensors[name], read=lambda index: self.read(name, index))

    def with_tensors(self, tensors: Mapping[str, StoredTensor]) -> Checkpoint:
        """The same folder with other tensors, which read from this one."""
        return Checkpoint(self.folder, tensors, kind=self.kind, layout=self.layout)

    def renamed(self, name_of: Mapping[str, str]) -> Checkpoint:
        """With `name_of[name]` for the tensors that it holds; the others keep their names."""
        return self.with_tensors({name_of.get(name, name): self.stored(name) for name in self.tensors})
