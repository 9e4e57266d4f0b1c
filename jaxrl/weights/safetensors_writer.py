"""Write a safetensors file tensor by tensor: the header from the shapes alone, then the bytes in the same order.

The safetensors library wants every tensor of a file in memory at once; an exporter that fetches from devices must not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {  # how safetensors spells what a checkpoint may hold
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_SPELLINGS = {dtype: name for name, dtype in DTYPES.items()}


def dtype_named(name: str) -> np.dtype:
    """The dtype that weights can be written in under the name that config.json has for it."""
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype {name!r} is not one that weights are written in (float32, float16, bfloat16)")
    return np.dtype(name)


class TensorSpec(NamedTuple):
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, specs: Sequence[TensorSpec], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write `tensors`, which come one at a time and in the order of `specs`; no more than one is held."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers 4 refuses a file that does not say it
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": _SPELLINGS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start on a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for spec, (name, tensor) in zip(specs, tensors, strict=True):
            assert (name, tensor.shape, tensor.dtype) == spec, f"{name} {tensor.shape} {tensor.dtype} is not {spec}"
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
