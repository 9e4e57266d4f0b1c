"""Load a checkpoint: Hugging Face tensors on disk -> our parameter tree, straight into sharded arrays.

A host reads only the slices that its own devices hold, and has no more of them in memory than one array at a time.
What is stored and what the model wants are compared by name and shape before the first tensor is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..models.config import ModelConfig
from .fit import fitted
from .folder import load_hf_config
from .formats import open_checkpoint
from .hf_names import Row, axis_sizes, flatten, head_of, is_packed, rows, unflatten
from .locate import resolve
from .stored import Checkpoint, Index, StoredTensor, cast

Tree = dict[str, Any]


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
    turns the 4-bit weights of bitsandbytes into numbers, which are else refused (those that `config.packed` names stay
    as they are, and `packed.load_packed` loads them); `head_path` names the module of a
    score head that is under none of the usual names (`heads.py`).
    Raises ValueError, naming tensor, expected and found, where checkpoint and model differ.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else open_checkpoint(folder)
    head = head_of(abstract_params, config)
    checkpoint = fitted(
        checkpoint, config, head, allow_missing=allow_missing, head_path=head_path,
        dequantize=dequantize or config.packed is not None,
    )  # fmt: skip
    table = [row for row in rows(config, head=head) if not is_packed(row, config)]
    sizes = axis_sizes(config)
    wanted = dict(flatten(abstract_params))
    assert wanted.keys() == {row.ours for row in table}, wanted.keys() ^ {row.ours for row in table}
    params = {}
    for row in table:
        struct = wanted[row.ours]
        assert struct.shape == row.our_shape(sizes), f"{row.ours} is {struct.shape}, by its row {row.our_shape(sizes)}"
        present = all(name in checkpoint.tensors for name in row.hf_names(sizes))
        params[row.ours] = load_array(checkpoint, row, struct, sizes, check_finite) if present else None
    return unflatten(params)


def load_array(
    checkpoint: Checkpoint, row: Row, struct: jax.ShapeDtypeStruct, sizes: Mapping[str, int], check_finite: bool
) -> jax.Array:
    """One array of the tree by its row of the name table."""
    return fill(struct, lambda index: read_slice(checkpoint, row, index, struct.dtype, sizes, check_finite))


def fill(struct: jax.ShapeDtypeStruct, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """One array, each distinct slice of it read once for all devices that hold it."""
    sharding = struct.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    devices = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(struct.shape).items():
        assert index is not None  # the map is of devices that hold a part
        devices[tuple(cut.indices(size)[:2] for cut, size in zip(index, struct.shape, strict=True))].append(device)
    shards = []
    for bounds, holders in devices.items():
        piece = read(tuple(slice(*bound) for bound in bounds))
        places = [jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind) for device in holders]
        shards += [jax.device_put(piece, place) for place in places]
        jax.block_until_ready(shards)  # so that `piece` can go before the next one is read
    return jax.make_array_from_single_device_arrays(struct.shape, sharding, shards)


def read_slice(
    checkpoint: Checkpoint, row: Row, index: Index, dtype: Any, sizes: Mapping[str, int], check_finite: bool
) -> np.ndarray:
    """The slice `index` of our array, each cut with both ends, tensor by tensor (of layers, of experts)."""
    depth = len(row.stack)
    inner, where = index[depth:], row.hf_index(index[depth:], sizes)
    out = np.empty([cut.stop - cut.start for cut in index], dtype)
    for position in np.ndindex(out.shape[:depth]):
        name = row.hf_at(tuple(cut.start + at for cut, at in zip(index[:depth], position, strict=True)))
        piece = checkpoint.read(name, where)
        if check_finite and not np.isfinite(piece).all():
            count = np.count_nonzero(~np.isfinite(piece))
            raise ValueError(f"{checkpoint.folder}: tensor {name} holds {count} NaN or infinite numbers")
        ours = row.to_ours(piece, inner, sizes)
        out[position] = cast(ours, out.dtype, f"{checkpoint.folder}: tensor {name}") if check_finite else ours
    return out


__all__ = ["Checkpoint", "StoredTensor", "load_hf_config", "load_params", "open_checkpoint", "resolve"]
