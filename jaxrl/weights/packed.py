"""4-bit kernels on their way to the device: bitsandbytes' files -> the collection "packed" (QLoRA).

What is packed is found in the checkpoint, not chosen: a kernel stays packed where bitsandbytes packed it in every layer,
in the same way. Codes and scales pass through as they are stored, and a host reads the rows that its devices hold.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from ..models.config import ModelConfig, PackedKernels
from .bnb import Packed, dequantized, packed_tensors
from .fit import fitted
from .hf_names import Row, axis_sizes, flatten, is_packed, rows, unflatten
from .load import fill
from .stored import Checkpoint, Index

Tree = dict[str, Any]
_log = logging.getLogger(__name__)


def packed_kernels(checkpoint: Checkpoint, config: ModelConfig) -> PackedKernels | None:
    """What `ModelConfig.packed` must be for the model of a checkpoint; None where no kernel can stay packed.

    Kernels that are packed in some layers alone, or in another way than most, become numbers, and the log says so.
    """
    if not packed_tensors(checkpoint):
        return None
    tensors = fitted(dequantized(checkpoint), config, "lm").tensors
    sizes = axis_sizes(config)
    kernels = [
        (row, [tensors[name].packed for name in row.hf_names(sizes)])
        for row in rows(config) if row.ours.endswith(".kernel")
    ]  # fmt: skip
    ways: dict[str, set[PackedKernels | None]] = defaultdict(set)  # of a module's name, those of all its layers
    for row, layers in kernels:
        ways[_name(row)] |= {_way(row, packed, config) for packed in layers}
    alike = {name: way for name, (way, *others) in ways.items() if way is not None and not others}
    way = max(alike.values(), key=list(alike.values()).count, default=None)
    kept = tuple(name for name in alike if alike[name] == way)
    unpacked = [row.ours for row, layers in kernels if any(layers) and _name(row) not in kept]
    if unpacked:
        _log.warning(
            "%s: %s cannot stay in 4 bits (not packed alike in every layer), and take the memory of numbers",
            checkpoint.folder, ", ".join(unpacked),
        )  # fmt: skip
    return None if way is None else replace(way, modules=kept)


def load_packed(checkpoint: Checkpoint, config: ModelConfig, abstract_packed: Tree) -> Tree:
    """Fill a "packed" tree of `jax.ShapeDtypeStruct` from a checkpoint, slice by slice, without unpacking anything."""
    tensors = fitted(dequantized(checkpoint), config, "lm").tensors
    wanted, arrays = dict(flatten(abstract_packed)), {}
    for row in rows(config):
        if not is_packed(row, config):
            continue
        layers = [tensors[name].packed for name in row.hf_names(axis_sizes(config))]
        for path in [path for path in wanted if path.rpartition(".")[0] == row.ours.removesuffix(".kernel")]:
            arrays[path] = fill(wanted[path], partial(_read, layers, path.rpartition(".")[2], wanted[path]))
    assert arrays.keys() == wanted.keys(), arrays.keys() ^ wanted.keys()
    return unflatten(arrays)


def _name(row: Row) -> str:
    return row.ours.split(".")[-2]


def _way(row: Row, packed: Packed | None, config: ModelConfig) -> PackedKernels | None:
    """How a layer's kernel is packed, apart from which modules are; None where it is not, or cannot be read so."""
    if packed is None or not _fits(row, packed, config):
        return None
    return PackedKernels((), packed.dtype.name, packed.blocksize, packed.nested_blocksize if packed.is_double else 0)


def _fits(row: Row, packed: Packed, config: ModelConfig) -> bool:
    """Whether a kernel can be read packed: a matrix [out, in] of its own, a whole number of bytes a row."""
    if row.stack != "l" or row.parts or len(row.groups) != 2 or row.letters != [*row.groups[1], *row.groups[0]]:
        return False
    last = axis_sizes(config)[row.groups[1][-1]]  # two numbers of this axis share a byte
    return packed.shape == row.hf_shape(axis_sizes(config)) and last % 2 == 0


def _read(layers: list[Packed], name: str, struct: jax.ShapeDtypeStruct, index: Index) -> np.ndarray:
    """The slice `index` of an array [L, ...] of parts."""
    chosen = layers[index[0].start : index[0].stop]
    out = np.empty((len(chosen), *(cut.stop - cut.start for cut in index[1:])), struct.dtype)
    for position, packed in enumerate(chosen):
        out[position] = _part(packed, name, struct.shape[1:], index[1:])
    return out


def _part(packed: Packed, name: str, shape: tuple[int, ...], index: Index) -> np.ndarray | float:
    if name not in ("codes", "absmax"):
        table = getattr(packed, name)
        if not np.isfinite(table).all():
            raise ValueError(
                f"{packed.codes.file}: {name} of a 4-bit matrix holds NaN or infinity, the file is damaged"
            )
        return table
    rows, *columns = index  # of bytes, or of scales, in each row of the matrix
    width = math.prod(shape[1:])
    read = packed.read_codes if name == "codes" else packed.read_absmax
    part = read(rows.start * width, rows.stop * width).reshape(-1, *shape[1:])[:, *columns]
    if part.dtype.kind == "f" and not np.isfinite(part).all():
        raise ValueError(f"{packed.codes.file}: scales of a 4-bit matrix hold NaN or infinity, the file is damaged")
    return part
