"""4-bit weights of bitsandbytes (NF4 and FP4, scales quantised too or not): kept packed, or turned back to numbers.

A matrix is flattened row by row and cut into blocks of 64. A block has one scale, its largest absolute value; a number
is a 4-bit code, looked up in a table of 16 and multiplied by that scale (QLoRA, arXiv:2305.14314). Scales may be 8-bit
codes themselves, in blocks of 256 (double quantisation). The result equals bitsandbytes' bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .safetensors_writer import dtype_named
from .stored import Checkpoint, Index, StoredTensor

_STATE = ".quant_state.bitsandbytes__"  # what stands between the weight's name and its quant type
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class Packed:
    """A matrix of 4-bit codes that has not been read. All of it is as stored, nothing is recomputed.

    `codes` are numel / 2 bytes, the earlier of two numbers in the high half of a byte; `absmax` is float32 [blocks],
    or uint8 [blocks] where the scales are quantised too: block b then has the scale
    nested_quant_map[absmax[b]] * nested_absmax[b // nested_blocksize] + nested_offset.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    quant_type: str  # nf4 or fp4
    blocksize: int
    codes: StoredTensor
    absmax: StoredTensor
    quant_map: np.ndarray  # float32 [16]
    nested_absmax: np.ndarray | None = None  # float32 [blocks / nested_blocksize]
    nested_quant_map: np.ndarray | None = None  # float32 [256]
    nested_blocksize: int = 256
    nested_offset: float = 0.0

    @property
    def is_double(self) -> bool:
        """Whether the scales are quantised too."""
        return self.nested_absmax is not None

    def read_codes(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Bytes `start` to `stop` of the codes, as they are stored."""
        stop = math.prod(self.shape) + 1 >> 1 if stop is None else stop
        width = self.codes.dtype.itemsize  # bytes may be kept as numbers of another type (bnb_4bit_quant_storage)
        first = start // width
        index = (slice(first, -(-stop // width)), *self.codes.whole[1:])
        stored = np.ascontiguousarray(self.codes.read(index)).reshape(-1).view(np.uint8)
        return stored[start - first * width : stop - first * width]

    def read_absmax(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The stored scales of blocks `start` to `stop`: float32, or their codes where they are quantised."""
        return np.asarray(self.absmax.read((slice(start, self.absmax.shape[0] if stop is None else stop),)))

    def scales(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The scales of blocks `start` to `stop`, float32."""
        absmax = self.read_absmax(start, stop)
        if self.nested_absmax is None or self.nested_quant_map is None:
            return absmax.astype(np.float32, copy=False)
        outer = self.nested_absmax[np.arange(start, start + len(absmax)) // self.nested_blocksize]
        return self.nested_quant_map[absmax] * outer + np.float32(self.nested_offset)

    def dequantize(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` (all of them by default) as numbers of the original dtype."""
        stop = self.shape[0] if stop is None else stop
        row = math.prod(self.shape[1:])
        first, last = start * row, stop * row
        codes = self.read_codes(first // 2, last + 1 >> 1)
        values = self.quant_map[np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)]
        values = values[first % 2 : first % 2 + last - first]
        block = first // self.blocksize
        scales = np.repeat(self.scales(block, -(-last // self.blocksize)), self.blocksize)
        values *= scales[first - block * self.blocksize : last - block * self.blocksize]
        return values.reshape(stop - start, *self.shape[1:]).astype(self.dtype, copy=False)


def packed_tensors(checkpoint: Checkpoint) -> dict[str, Packed]:
    """The 4-bit matrices of a checkpoint by name; empty where it has none."""
    states = {}
    for name in checkpoint.tensors:
        weight, found, quant_type = name.partition(_STATE)
        if found:
            states[weight] = (name, quant_type)
    return {weight: _packed(checkpoint, weight, *state) for weight, state in states.items()}


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with numbers in place of 4-bit codes; a slice that is read is dequantised alone."""
    packed = packed_tensors(checkpoint)
    parts = {f"{weight}.{part}" for weight in packed for part in _PARTS}
    parts |= {name for name in checkpoint.tensors if _STATE in name}
    tensors = {
        name: _as_numbers(packed[name], checkpoint.tensors[name].file) if name in packed else checkpoint.stored(name)
        for name in checkpoint.tensors
        if name not in parts
    }
    return checkpoint.with_tensors(tensors)


def dequantized_config(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of the same model with numbers in place of codes. Refuses quantisation that is not read here."""
    config = dict(hf_config)
    settings = config.pop("quantization_config", None)
    if settings:
        method = _method(settings)
        if not is_in_four_bits(hf_config) and method not in ("mxfp4", "fp8"):  # the last two: block_scaled.py
            bits = " in 8 bits" if settings.get("load_in_8bit") else ""
            raise ValueError(
                f"quantization_config asks for {method!r}{bits}, and what is read here is bitsandbytes in 4 bits, mxfp4 "
                "and fp8: take the model's original weights"
            )
    return config


def is_in_four_bits(hf_config: Mapping[str, Any]) -> bool:
    """Whether `config.json` says that the weights are in 4 bits of bitsandbytes."""
    settings = hf_config.get("quantization_config") or {}
    return _method(settings) == "bitsandbytes" and bool(settings.get("load_in_4bit"))


def _method(settings: Mapping[str, Any]) -> str | None:
    return settings.get("quant_method", "bitsandbytes" if "load_in_4bit" in settings else None)


def _as_numbers(packed: Packed, file: str) -> StoredTensor:
    def read(index: Index) -> np.ndarray:
        return packed.dequantize(index[0].start, index[0].stop)[:, *index[1:]]

    return StoredTensor(packed.shape, packed.dtype, file, read, packed)


def _packed(checkpoint: Checkpoint, weight: str, state_name: str, quant_type: str) -> Packed:
    where = f"{checkpoint.folder}: {weight}"
    try:
        state = json.loads(checkpoint.read(state_name).tobytes())
        shape = tuple(int(size) for size in state["shape"])
        blocksize, dtype = int(state["blocksize"]), dtype_named(state["dtype"])
        nested = {key: state[key] for key in ("nested_blocksize", "nested_offset") if key in state}
        if min(blocksize, nested.get("nested_blocksize", 1), *shape) < 1:
            raise ValueError("a size below 1")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} has a quant_state that cannot be read ({error!r}): fetch the model again") from error
    parts = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
    lost = [name for name in (weight, *(f"{weight}.{part}" for part in parts)) if name not in checkpoint.tensors]
    if lost:
        raise ValueError(f"{checkpoint.folder} lacks {lost[0]}, without which the 4-bit weight {weight} cannot be read")
    tables = {part: checkpoint.read(f"{weight}.{part}").astype(np.float32) for part in parts[1:]}
    absmax = checkpoint.stored(f"{weight}.absmax")
    packed = Packed(shape, dtype, quant_type, blocksize, checkpoint.stored(weight), absmax, **tables, **nested)
    _check_sizes(packed, where)
    return packed


def _check_sizes(packed: Packed, where: str) -> None:
    numbers, width = math.prod(packed.shape), packed.codes.dtype.itemsize
    blocks = -(-numbers // packed.blocksize)
    found = [math.prod(packed.codes.shape), packed.absmax.shape, packed.absmax.dtype.name, packed.quant_map.shape]
    wanted = [-(-(numbers + 1 >> 1) // width), (blocks,), "uint8" if packed.is_double else "float32", (16,)]
    if packed.nested_absmax is not None and packed.nested_quant_map is not None:
        found += [packed.nested_absmax.shape, packed.nested_quant_map.shape]
        wanted += [(-(-blocks // packed.nested_blocksize),), (256,)]
    if found != wanted:
        raise ValueError(
            f"{where} of shape {packed.shape} in blocks of {packed.blocksize} has codes, scales and tables of {found} "
            f"where {wanted} is expected: the file is damaged"
        )
