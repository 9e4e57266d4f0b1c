"""Hugging Face's Flax checkpoints: `flax_model.msgpack`, and how Flax names and layouts become torch's.

A msgpack file has no table of contents, but every value in it says how long it is: one walk over the memory-mapped
file, which skips the numbers, finds where each array lies. The rule for names holds for every family (transformers
4.57, the last with Flax classes): a `kernel` is the torch `weight` transposed, `embedding` and `scale` are `weight`.
"""

from __future__ import annotations

import math
import mmap
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .safetensors_writer import DTYPES
from .stored import Index, StoredTensor

_DEEPEST = 64  # levels of nesting; models have about six
_ARRAY, _SCALAR = 1, 3  # flax's extension types for an array and for a numpy scalar; 2 is a complex number
_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}
_CHUNKED = "__msgpack_chunked_array__"  # flax cuts arrays of more than 2**30 bytes


class _Array(NamedTuple):
    """An array inside a file: its numbers, in C order, start at byte `start`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int


class _Walk:
    """A position in a msgpack file. Only what flax writes is known: maps, strings, numbers, arrays as extensions."""

    def __init__(self, data: mmap.mmap | bytes, path: Path):
        self.data = data
        self.path = path
        self.at = 0

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise ValueError(f"{self.path} cannot be read (it ends too early): it is cut short, fetch it again")
        taken, self.at = self.data[self.at : end], end
        return bytes(taken)

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "big")

    def value(self, depth: int = 0) -> Any:
        """The next value: a dict, an `_Array`, a string, a number, a list, or the place of a byte string."""
        if depth > _DEEPEST:
            raise ValueError(f"{self.path} is nested more than {_DEEPEST} deep: it is not a Flax model")
        code = self.number(1)
        if code < 0x80 or code >= 0xE0:
            return code if code < 0x80 else code - 256
        if code < 0x90 or code in (0xDE, 0xDF):
            return self._map(code & 0xF if code < 0x90 else self.number(2 if code == 0xDE else 4), depth)
        if code < 0xA0 or code in (0xDC, 0xDD):
            count = code & 0xF if code < 0xA0 else self.number(2 if code == 0xDC else 4)
            return [self.value(depth + 1) for _ in range(count)]
        if code < 0xC0 or code in (0xD9, 0xDA, 0xDB):
            length = code & 0x1F if code < 0xC0 else self.number(1 << code - 0xD9)
            return self.take(length).decode(errors="replace")
        if code in (0xC4, 0xC5, 0xC6):  # bytes: skipped, and where they lie is the value
            length, start = self.number(1 << code - 0xC4), self.at
            self.skip(length)
            return range(start, start + length)
        if code in (0xCC, 0xCD, 0xCE, 0xCF):
            return self.number(1 << code - 0xCC)
        if 0xC7 <= code <= 0xC9:
            return self._extension(self.number(1 << code - 0xC7), depth)
        if 0xD4 <= code <= 0xD8:
            return self._extension(1 << code - 0xD4, depth)
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code]
        raise ValueError(f"{self.path} holds a value of msgpack type {code:#x}, which no Flax model has")

    def skip(self, count: int) -> None:
        if self.at + count > len(self.data):
            raise ValueError(f"{self.path} cannot be read (it ends too early): it is cut short, fetch it again")
        self.at += count

    def _map(self, count: int, depth: int) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in tree:
                raise ValueError(
                    f"{self.path} has the key {str(key)[:80]!r} where a new name is expected: it is damaged"
                )
            tree[key] = self.value(depth + 1)
        return tree

    def _extension(self, length: int, depth: int) -> _Array:
        kind = self.number(1)
        end = self.at + length
        if kind not in (_ARRAY, _SCALAR):
            raise ValueError(f"{self.path} holds a value of extension type {kind}, which is no array of real numbers")
        content = self.value(depth + 1)
        if not (isinstance(content, list) and len(content) == 3 and self.at == end):
            raise ValueError(f"{self.path} holds an array that is not (shape, dtype, bytes): it is damaged")
        shape, name, where = content
        dtype = _DTYPES.get(name)
        if dtype is None:
            raise ValueError(f"{self.path} holds an array of dtype {name!r}, which is not read here")
        sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        if not (sizes and isinstance(where, range) and math.prod(shape) * dtype.itemsize == len(where)):
            raise ValueError(f"{self.path} holds an array whose shape {shape} does not fit its bytes: it is damaged")
        return _Array(tuple(shape), dtype, where.start)


def open_msgpack(path: Path) -> dict[str, StoredTensor]:
    """The arrays of a msgpack file under Flax's names ("model/norm/weight"), none of them read."""
    with open(path, "rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise ValueError(f"{path} is empty: fetch it again") from error
    walk = _Walk(mapped, path)
    tree = walk.value()
    if walk.at != len(mapped):
        raise ValueError(f"{path} goes on after its end: it is damaged, fetch it again")
    if isinstance(tree, dict) and list(tree) == ["params"]:  # saved with the collection around it
        tree = tree["params"]
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no tree of arrays: it is not a Flax model")
    return {name: _stored(mapped, leaf, f"{path}: {name}", path.name) for name, leaf in _leaves(tree)}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and _CHUNKED not in value:
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _stored(mapped: mmap.mmap, leaf: Any, what: str, file: str) -> StoredTensor:
    if isinstance(leaf, _Array):
        return StoredTensor.of(np.ndarray(leaf.shape, leaf.dtype, mapped, leaf.start), file)
    if not isinstance(leaf, dict):
        raise ValueError(f"{what} is no array but {str(leaf)[:80]!r}: it is not a parameter of a model")
    try:
        shape = tuple(leaf["shape"][str(axis)] for axis in range(len(leaf["shape"])))
        chunks = [leaf["chunks"][str(part)] for part in range(len(leaf["chunks"]))]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{what} is an array in parts of which some are missing: the file is damaged") from error
    if not chunks or not all(isinstance(chunk, _Array) and len(chunk.shape) == 1 for chunk in chunks):
        raise ValueError(f"{what} is an array in parts that are no arrays: the file is damaged")
    parts = [np.ndarray(chunk.shape, chunk.dtype, mapped, chunk.start) for chunk in chunks]
    if len({part.dtype for part in parts}) > 1 or sum(part.size for part in parts) != math.prod(shape):
        raise ValueError(f"{what} is an array in parts that do not make up its shape {shape}: the file is damaged")
    return StoredTensor(shape, parts[0].dtype, file, lambda index: _read_parts(parts, shape, index))


def _read_parts(parts: list[np.ndarray], shape: tuple[int, ...], index: Index) -> np.ndarray:
    """A slice of an array that lies in the file in flat parts: the rows are put together, then cut."""
    row = math.prod(shape[1:])
    first, last = index[0].start * row, index[0].stop * row
    ends = list(accumulate(part.size for part in parts))
    pieces = []
    for number in range(bisect_right(ends, first), len(parts)):
        begin = ends[number] - parts[number].size
        if begin >= last:
            break
        pieces.append(parts[number][max(first - begin, 0) : last - begin])
    rows = np.concatenate(pieces) if pieces else np.empty(0, parts[0].dtype)
    return rows.reshape(-1, *shape[1:])[:, *index[1:]]


def torch_name(name: str) -> str:
    """The name that torch has for a Flax parameter: "model/layers/0/mlp/up_proj/kernel" -> "....up_proj.weight"."""
    module, _, leaf = name.replace("/", ".").rpartition(".")
    return f"{module}.{'weight' if leaf in ('kernel', 'embedding', 'scale') else leaf}"


def is_flax_layout(names: Mapping[str, StoredTensor]) -> bool:
    """Whether the tensors carry Flax's names: every model has a product, and Flax calls its matrix `kernel`."""
    return any(name.replace("/", ".").endswith(".kernel") for name in names)


def to_torch_layout(tensors: Mapping[str, StoredTensor], where: Path) -> dict[str, StoredTensor]:
    """Flax tensors under torch's names and with its layouts."""
    out = {}
    for name, tensor in tensors.items():
        renamed = torch_name(name)
        if renamed in out:
            raise ValueError(f"{where}: two parameters would be {renamed} in torch, {name} is one: it is not a model")
        if name.endswith("kernel"):
            if len(tensor.shape) != 2:
                raise ValueError(
                    f"{where}: {name} has shape {tensor.shape}, and only kernels of two dimensions are read from Flax"
                )
            out[renamed] = _transposed(tensor)
        else:
            out[renamed] = tensor
    return out


def _transposed(tensor: StoredTensor) -> StoredTensor:
    return StoredTensor(tensor.shape[::-1], tensor.dtype, tensor.file, lambda index: tensor.read(index[::-1]).T)
