"""Which files of a folder are the model, what they are, and whether they agree.

Folders are searched by the names that Hugging Face gives to weights; what a file is, its first bytes say. Whatever it
is, the result is one `Checkpoint` with torch's names and layouts. `load.py` and the converter open everything here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # numpy knows bfloat16 once this is imported; safetensors needs it to
import numpy as np
from safetensors import SafetensorError, safe_open

from .block_scaled import as_bfloat16
from .flax_msgpack import is_flax_layout, open_msgpack, to_torch_layout
from .heads import OUTPUTS
from .hf_names import IGNORED
from .orbax_folder import PARAMS, is_orbax, open_converted
from .prefixes import language_model_of, with_expected_names
from .safetensors_writer import DTYPES
from .stored import Checkpoint, StoredTensor
from .torch_bin import LEGACY_MAGIC, open_torch_bin

# What a folder may hold, the first being preferred: its weights in several files (by the index) or in one.
SOURCES = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")

_log = logging.getLogger(__name__)

_ROWS_COMPARED = 4  # of each tensor, where a folder holds the same model twice

_OTHERS = {  # what else lies in such folders, and is not read from there
    "consolidated*": "Mistral's and Meta's own format, with other names and another rotary layout",
    "tf_model.h5": "TensorFlow's format",
    "*.ckpt*": "TensorFlow's format",
    "*.onnx": "ONNX",
}

_NO_WEIGHTS = {
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself: run `git lfs pull` where it lies",
    b"\x89HDF": "in TensorFlow's format (HDF5): save the model as safetensors",
    b"\x80": "a bare pickle, which is not read: save the model as safetensors",
    b"<": "a page of a web site and not the file itself: fetch it again",
}


def kind_of(path: Path) -> str:
    """What a file is, from its first bytes: a key of `_OPENERS`, "gguf", or ValueError."""
    with open(path, "rb") as file:
        start = file.read(64)
    if start[:4] == b"GGUF":
        return "gguf"
    if start[:4] == b"PK\x03\x04" or start.startswith(LEGACY_MAGIC):
        return "torch"
    if start[8:9] == b"{" and start[5:8] == bytes(3):  # a header's length of eight bytes, and a header in JSON
        return "safetensors"
    for magic, what in _NO_WEIGHTS.items():
        if start.startswith(magic):
            raise ValueError(f"{path} is {what}")
    if start and (0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF)):  # a map that is not empty
        return "msgpack"
    raise ValueError(
        f"{path} cannot be read (it begins like no kind of weights that is known here): name a file of weights, or, where "
        "it is one, fetch it again, as it is damaged or cut short"
    )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the weights of a folder, or of one file, and check that files, index and headers agree. Nothing is read.

    Of a model that sees too, the tensors are those of its language model. Raises ValueError where a folder holds the
    model twice and the two differ.
    """
    path = Path(path)
    if path.is_file():
        return language_model_of(_open_files(path.parent, [path.name], None))
    if is_orbax(path / PARAMS):
        return open_converted(path)
    found = [name for name in SOURCES for name in (f"{name}.index.json", name) if (path / name).is_file()]
    if not found:
        return language_model_of(_open_files(path, [_only_file(path)], None))
    if len(found) > 1:  # of a repository that has several kinds, often one is fetched, and the index of another with it
        found = [name for name in found if not _is_index_alone(path / name)] or found
        found = [name for name in found if not _is_for_torch_alone(path / name)] or found
    opened = [_open_source(path / name) for name in found]
    for name, other in zip(found[1:], opened[1:], strict=True):
        _check_same_model(opened[0], other, found[0], name)
    return language_model_of(opened[0])


def _open_source(path: Path) -> Checkpoint:
    if path.suffix != ".json":
        return _open_files(path.parent, [path.name], None)
    weight_map = _weight_map(path)
    return _open_files(path.parent, sorted(set(weight_map.values())), path, weight_map)


def _open_files(
    folder: Path, names: list[str], index: Path | None, weight_map: Mapping[str, str] | None = None
) -> Checkpoint:
    tensors: dict[str, StoredTensor] = {}
    kinds, claims = [], set()
    for name in names:
        kind = kind_of(folder / name)
        if kind not in _OPENERS:
            raise ValueError(f"{folder / name} is a GGUF file: name it alone, not as a part of a checkpoint")
        opened, claim = _OPENERS[kind](folder / name)
        for tensor, stored in opened.items():
            if tensor in tensors:
                raise ValueError(f"{folder}: tensor {tensor} stands in {tensors[tensor].file} and again in {name}")
            tensors[tensor] = stored
        kinds.append(kind)
        claims.add(claim)
    for tensor, name in (weight_map or {}).items():
        stored = tensors.get(tensor)
        if stored is None or stored.file != name:
            raise ValueError(
                f"{index} says that tensor {tensor} is in {name}, and it is not: fetch the checkpoint again"
            )
    layout = "flax" if is_flax_layout(tensors) else "torch"
    for claim in claims & {"pt", "flax", "tf"} - {"pt" if layout == "torch" else "flax"}:
        raise ValueError(
            f"{folder / names[0]} says that it holds weights in {claim!r} layout, and its names are those of {layout}: "
            "export the model again"
        )
    if layout == "flax":
        tensors = to_torch_layout(tensors, folder)
    return Checkpoint(folder, as_bfloat16(tensors, folder), kind=kinds[0], layout=layout)


def _open_safetensors(path: Path) -> tuple[dict[str, StoredTensor], str | None]:
    try:
        file = safe_open(path, "np")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): it is damaged or cut short, fetch it again") from error
    tensors = {}
    for name in file.keys():
        view = file.get_slice(name)
        if view.get_dtype() not in DTYPES:
            raise ValueError(f"{path}: tensor {name} has dtype {view.get_dtype()}, which is not read here")
        dtype, shape = DTYPES[view.get_dtype()], tuple(view.get_shape())
        if view.get_dtype().startswith("F8"):  # safetensors' own reader looks for these in numpy, which has them not
            tensors[name] = StoredTensor.of(_mapped(path, name, dtype, shape), path.name)
        else:
            tensors[name] = StoredTensor(shape, dtype, path.name, _reader(file, name, shape))
    return tensors, (file.metadata() or {}).get("format")


def _mapped(path: Path, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a safetensors file whose header has been checked: eight bytes of its length, the header, the numbers."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length + json.loads(file.read(length))[name]["data_offsets"][0]
    return np.memmap(path, dtype, "r", start, shape)


def _reader(file: Any, name: str, shape: tuple[int, ...]) -> Callable[[tuple[slice, ...]], np.ndarray]:
    if not shape:  # a number alone has nothing to slice
        return lambda index: file.get_tensor(name)
    return lambda index: file.get_slice(name)[index]


_OPENERS: dict[str, Callable[[Path], tuple[dict[str, StoredTensor], str | None]]] = {
    "safetensors": _open_safetensors,
    "torch": lambda path: (open_torch_bin(path), None),
    "msgpack": lambda path: (open_msgpack(path), None),
}


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a checkpoint in several files."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        entries = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not an index of weights ({error!r}): fetch the checkpoint again") from error
    for tensor, name in entries:
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise ValueError(f"{path} places tensor {tensor} in {name!r}: a shard must be a file beside the index")
        if not (path.parent / name).is_file():
            raise ValueError(
                f"{path} places tensor {tensor} in {name}, which does not exist: fetch the checkpoint again"
            )
    return weight_map


def _is_index_alone(path: Path) -> bool:
    """Whether this is an index and none of its files is there."""
    if path.suffix != ".json":
        return False
    stem, suffix = path.name.removesuffix(".index.json").split(".")
    return not any(path.parent.glob(f"{stem}-*.{suffix}"))


def _is_for_torch_alone(path: Path) -> bool:
    """Whether this is PyTorch's format from before its version 1.6: no reason to need torch, where another is there."""
    files = [path] if path.suffix != ".json" else [path.parent / name for name in set(_weight_map(path).values())]
    for file in files:
        with open(file, "rb") as opened:
            if opened.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC:
                _log.info("%s is in PyTorch's format from before version 1.6, and is left aside for another", file)
                return True
    return False


def _only_file(folder: Path) -> str:
    """The one file of weights in a folder that has none under a usual name."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is neither a folder nor a file")
    others = {name.name: why for pattern, why in _OTHERS.items() for name in folder.glob(pattern)}
    found = sorted(
        path.name
        for pattern in ("*.safetensors", "*.msgpack", "*.gguf", "*.bin", "*.pt", "*.pth")
        for path in folder.glob(pattern)
        if path.name not in others and not path.name.startswith(("adapter_", "training_args", "optimizer", "scheduler"))
    )
    if len(found) == 1 and not found[0].endswith(".gguf"):
        return found[0]
    if found:
        raise ValueError(
            f"{folder} holds no model.safetensors but {', '.join(found)}: name the one file that is the model"
        )
    if others:
        name, why = min(others.items())
        raise ValueError(f"{folder} holds {name}, {why}: save the model with transformers' save_pretrained")
    raise ValueError(
        f"{folder} holds neither model.safetensors nor model.safetensors.index.json, nor weights of another kind that "
        "is read here (pytorch_model.bin, flax_model.msgpack)"
    )


def _check_same_model(first: Checkpoint, second: Checkpoint, name: str, other: str) -> None:
    """The same model twice in a folder must be the same: names, shapes and, of each tensor, the first and last rows.

    What loading ignores is ignored here too: buffers that some files have, an output that repeats the embedding, prefixes.
    """
    first, second = _compared(first), _compared(second)
    second = with_expected_names(second, _inside(first))
    first = with_expected_names(first, _inside(second))

    def differ(what: str) -> ValueError:
        return ValueError(f"{first.folder} holds {name} and {other}, which differ: {what}; remove the wrong one")

    for tensor in sorted(first.tensors.keys() ^ second.tensors.keys()):
        if not tensor.startswith(OUTPUTS):  # stored by some, though tied
            raise differ(f"tensor {tensor} is only in {name if tensor in first.tensors else other}")
    shared = [tensor for tensor in first.tensors if tensor in second.tensors]
    for tensor in shared:
        one, two = first.tensors[tensor], second.tensors[tensor]
        if one.shape != two.shape:
            raise differ(f"tensor {tensor} has shape {one.shape} in {name} and {two.shape} in {other}")
    for tensor in shared:
        one, two = first.tensors[tensor], second.tensors[tensor]
        if not one.shape or min(one.shape) == 0:
            continue
        for rows in (slice(0, _ROWS_COMPARED), slice(max(one.shape[0] - _ROWS_COMPARED, 0), one.shape[0])):
            index = (rows, *one.whole[1:])
            a, b = (checkpoint.read(tensor, index).astype(np.float32) for checkpoint in (first, second))
            rounding = 0.0 if one.dtype == two.dtype else 2.0**-7  # bfloat16 has 8 bits
            if not np.allclose(a, b, rtol=rounding, atol=rounding / 128, equal_nan=True):
                raise differ(f"tensor {tensor} has other numbers")


def _compared(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint.with_tensors({
        name: checkpoint.stored(name) for name in checkpoint.tensors if not IGNORED.search(name)
    })  # fmt: skip


def _inside(checkpoint: Checkpoint) -> set[str]:
    """The names that a model must have, whether it stores its output or not."""
    return {name for name in checkpoint.tensors if not name.startswith(OUTPUTS)}
