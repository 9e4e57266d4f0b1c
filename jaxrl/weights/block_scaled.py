"""Weights in MXFP4 (gpt-oss) and in FP8 by blocks (DeepSeek, Qwen3-FP8): a few bits a number, and a scale for each block.

There is no training in these formats, so they are read as bfloat16, slice by slice and exactly as transformers does.
MXFP4 is that of the OCP Microscaling Formats specification 1.0: 32 numbers of 4 bits share a power of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from .stored import Index, StoredTensor

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

_GROUP = 32  # numbers of MXFP4 that share a scale, in 16 bytes
_FP8_BLOCK = 128  # rows, and columns, that share a scale where their number is not a multiple of the scales'


def as_bfloat16(tensors: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """The same tensors, with one of bfloat16 in place of each pair of codes and scales.

    Raises ValueError where the two parts of a pair do not belong together.
    """
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks") and tensor.dtype == np.uint8:
            whole = name.removesuffix("_blocks")
            out[whole] = _mxfp4(tensor, _scales(tensors, folder, name, f"{whole}_scales"), f"{folder}: {name}")
        elif tensor.dtype == ml_dtypes.float8_e4m3fn and name.endswith(".weight"):
            out[name] = _fp8(tensor, _scales(tensors, folder, name, f"{name}_scale_inv"), f"{folder}: {name}")
        elif not _is_scale(name, tensors):
            out[name] = tensor
    return out


def _is_scale(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    if name.endswith(".weight_scale_inv"):
        return name.removesuffix("_scale_inv") in tensors
    return name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in tensors


def _scales(tensors: Mapping[str, StoredTensor], folder: Path, name: str, scales: str) -> StoredTensor:
    if f"{name}_scale" in tensors:
        raise ValueError(
            f"{folder} holds {name} in FP8 with its scales under {name}_scale, a format that is not read: take the model's "
            "original weights"
        )
    if scales not in tensors:
        raise ValueError(f"{folder} holds {name} and not its scales {scales}: fetch the checkpoint again")
    return tensors[scales]


def _mxfp4(blocks: StoredTensor, scales: StoredTensor, where: str) -> StoredTensor:
    """Blocks uint8 [..., out, groups, 16], low half of a byte first, and exponents [..., out, groups] -> [..., in, out]."""
    if blocks.shape[:-1] != scales.shape or blocks.shape[-1:] != (_GROUP // 2,) or scales.dtype != np.uint8:
        raise ValueError(
            f"{where} of shape {blocks.shape} has scales of shape {scales.shape} and dtype {scales.dtype}, where "
            f"one byte for each {_GROUP // 2} bytes is expected: the file is damaged"
        )
    *lead, num_out, num_groups = scales.shape

    def read(index: Index) -> np.ndarray:
        *outer, into, out = index
        first, last = into.start // _GROUP, -(-into.stop // _GROUP)
        cut = (*outer, out, slice(first, last))
        codes = blocks.read((*cut, slice(0, _GROUP // 2)))
        values = FP4_VALUES[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(*codes.shape[:-1], _GROUP)
        values = np.ldexp(values, scales.read(cut).astype(np.int32)[..., None] - 127)
        values = values.reshape(*values.shape[:-2], -1)[..., into.start - first * _GROUP : into.stop - first * _GROUP]
        return values.swapaxes(-1, -2).astype(BFLOAT16)

    return StoredTensor((*lead, num_groups * _GROUP, num_out), BFLOAT16, blocks.file, read)


def _fp8(codes: StoredTensor, scales: StoredTensor, where: str) -> StoredTensor:
    """Numbers float8_e4m3 [rows, columns], multiplied by one scale for each block of them, or by one for all."""
    grid = scales.shape if len(scales.shape) == 2 else (1, 1)
    if len(codes.shape) != 2 or np.prod(scales.shape) != np.prod(grid):
        raise ValueError(f"{where} of shape {codes.shape} has scales of shape {scales.shape}: the file is damaged")
    sizes = [_block_size(size, number, where) for size, number in zip(codes.shape, grid, strict=True)]
    table = None

    def read(index: Index) -> np.ndarray:
        nonlocal table
        if table is None:  # small: a number for each 128 x 128
            table = scales.read(scales.whole).astype(np.float32).reshape(grid)
        rows, columns = (np.arange(cut.start, cut.stop) // size for cut, size in zip(index, sizes, strict=True))
        return (codes.read(index).astype(np.float32) * table[np.ix_(rows, columns)]).astype(BFLOAT16)

    return StoredTensor(codes.shape, BFLOAT16, codes.file, read)


def _block_size(size: int, number: int, where: str) -> int:
    if -(-size // _FP8_BLOCK) == number:
        return _FP8_BLOCK
    if size % number == 0:
        return size // number
    raise ValueError(f"{where}: {size} rows or columns cannot be cut into {number} blocks: the file is damaged")
