"""PyTorch's `pytorch_model.bin` without PyTorch: a zip of a pickle and of one raw file a storage.

The pickle is read by an unpickler that knows how to describe a tensor and nothing else, so that a file which asks for
anything more is refused by name and runs nothing. Storages are memory-mapped: a tensor costs memory when it is read.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .safetensors_writer import DTYPES
from .stored import StoredTensor

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began before torch 1.6

_DTYPES = {dtype.name: dtype for dtype in DTYPES.values()}  # torch and numpy have the same names for them
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype | None  # None: bytes, whose dtype the tensor says


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # in elements, as are the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


def open_torch_bin(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a `.bin` file by name, none of them read."""
    with open(path, "rb") as file:
        if file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC:
            return _open_legacy(path)
        try:
            with zipfile.ZipFile(file) as archive:
                entries = {entry.filename: entry for entry in archive.infolist()}
                root = _root(entries, path)
                description = archive.read(f"{root}/data.pkl")
                order = archive.read(f"{root}/byteorder") if f"{root}/byteorder" in entries else b"little"
                offsets = _storage_offsets(file, entries, f"{root}/data/", path)
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
            raise ValueError(f"{path} cannot be read ({error}): it is damaged or cut short, fetch it again") from error
        if order.strip() != b"little":
            raise ValueError(f"{path} was saved on a {order.decode(errors='replace')}-endian machine: save it again")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = {}
    for name, tensor in dict.items(_state_dict(description, path)):
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise ValueError(
                f"{path} holds {name!r}, which is not a tensor but of type {type(tensor).__name__}: save the model's "
                "state_dict alone"
            )
        tensors[name] = StoredTensor.of(_view(mapped, offsets, tensor, f"{path}: tensor {name}"), path.name)
    return tensors


def _root(entries: Mapping[str, zipfile.ZipInfo], path: Path) -> str:
    """The folder inside the zip that everything lies in."""
    roots = [name.removesuffix("/data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"{path} is a zip file and not one that torch.save wrote: it holds no data.pkl")
    return roots[0]


def _storage_offsets(
    file: Any, entries: Mapping[str, zipfile.ZipInfo], prefix: str, path: Path
) -> dict[str, tuple[int, int]]:
    """Where in the file each storage lies: key -> (first byte, number of bytes)."""
    offsets = {}
    for name, entry in entries.items():
        if not name.startswith(prefix):
            continue
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{path}: {name} is compressed, and torch.save compresses nothing: save the model again")
        file.seek(entry.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile(f"no header of {name}")
        name_length, extra_length = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        start = entry.header_offset + 30 + name_length + extra_length
        offsets[name.removeprefix(prefix)] = (start, entry.file_size)
    return offsets


class _Refused(ValueError):
    """The file is sound and asks for what it must not."""


class _Unpickler(pickle.Unpickler):
    """Knows what a state dict of tensors is made of. Everything else is refused, before it is even looked up."""

    def __init__(self, description: bytes, path: Path):
        super().__init__(io.BytesIO(description))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _Kind(_DTYPES[_STORAGES[name]])
        if module == "torch" and name in _DTYPES:
            return _Kind(_DTYPES[name])
        raise _Refused(
            f"{self._path} asks for {module}.{name}, which is no part of a dictionary of tensors: it may be an attack, "
            "take the model from another source, or save its state_dict alone"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _Kind)):
            raise _Refused(f"{self._path} refers to {str(pid)[:80]!r}, which is no storage of a tensor")
        return _Storage(str(pid[2]), pid[1].dtype)


class _Kind(NamedTuple):
    """A storage type or a dtype of torch."""

    dtype: np.dtype | None


# Instances without attributes rather than functions: a pickle can set those of whatever it is given.
class _TensorV2:
    __slots__ = ()

    def __call__(self, storage: _Storage, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        return _Tensor(storage, offset, tuple(shape), tuple(strides), storage.dtype or _DTYPES["uint8"])


class _TensorV3:
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, kind: Any, *_: Any):
        return _Tensor(storage, offset, tuple(shape), tuple(strides), kind.dtype)


class _Parameter:
    __slots__ = ()

    def __call__(self, tensor: _Tensor, *_: Any) -> _Tensor:
        return tensor


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _TensorV2(),
    ("torch._utils", "_rebuild_tensor_v3"): _TensorV3(),
    ("torch._utils", "_rebuild_parameter"): _Parameter(),
    ("torch.storage", "UntypedStorage"): _Kind(None),
}


def _state_dict(description: bytes, path: Path) -> dict[Any, Any]:
    try:
        state = _Unpickler(description, path).load()
    except _Refused:
        raise
    except Exception as error:  # a damaged pickle raises whatever its damaged bytes ask for
        raise ValueError(f"{path} cannot be read ({error!r}): it is damaged, fetch it again") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__} where a state dict of tensors is expected")
    return state


def _view(mapped: mmap.mmap, offsets: Mapping[str, tuple[int, int]], tensor: _Tensor, what: str) -> np.ndarray:
    """A tensor as a view of the mapped file, once it is certain that it lies inside its storage."""
    start, nbytes = offsets.get(tensor.storage.key, (0, -1))
    counts = (tensor.offset, *tensor.shape, *tensor.strides)
    sound = len(tensor.shape) == len(tensor.strides) and all(type(count) is int and count >= 0 for count in counts)
    if sound:
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
        needed = tensor.offset + reach + 1 if math.prod(tensor.shape) else tensor.offset
        sound = needed * tensor.dtype.itemsize <= nbytes and start + nbytes <= len(mapped)
    if not sound:
        raise ValueError(f"{what} does not lie inside its storage: the file is damaged or cut short, fetch it again")
    size = tensor.dtype.itemsize
    strides = tuple(stride * size for stride in tensor.strides)
    return np.ndarray(tensor.shape, tensor.dtype, mapped, start + tensor.offset * size, strides)


def _open_legacy(path: Path) -> dict[str, StoredTensor]:
    """The form before torch 1.6, which only torch reads, and only whole."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is in PyTorch's format from before version 1.6, which only PyTorch reads: "
            "pip install torch, or save the model as safetensors"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path} cannot be read ({reason}): it is damaged, or holds more than tensors") from error
    tensors = {}
    for name, tensor in state.items():
        tensor = tensor.detach().contiguous()
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        array = tensor.reshape(-1).view(torch.uint8).numpy().view(dtype).reshape(tuple(tensor.shape))
        tensors[name] = StoredTensor.of(array, path.name)
    return tensors
