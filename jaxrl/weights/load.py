"""Load a checkpoint: Hugging Face tensors on disk -> our parameter tree, straight into sharded arrays.

A host reads only the slices that its own devices hold, and has no more of them in memory than those of one array, or of
the arrays whose parts alternate in one tensor.
What is stored and what the model wants are compared by name and shape before the first tensor is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
    for together in _read_together(table, wanted):
        for row in together:
            shape = wanted[row.ours].shape
            assert shape == row.our_shape(sizes), f"{row.ours} is {shape}, by its row {row.our_shape(sizes)}"
        if all(name in checkpoint.tensors for name in together[0].hf_names(sizes)):
            params |= load_arrays(checkpoint, together, wanted, sizes, check_finite)
        else:
            params |= {row.ours: None for row in together}
    return unflatten(params)


def load_arrays(
    checkpoint: Checkpoint,
    together: Sequence[Row],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    sizes: Mapping[str, int],
    check_finite: bool,
) -> dict[str, jax.Array]:
    """Arrays of the tree by their rows of the name table, which are read together."""
    structs = [wanted[row.ours] for row in together]
    dtypes = [np.dtype(struct.dtype) for struct in structs]
    arrays = _fill_alike(structs, lambda index: read_slices(checkpoint, together, index, dtypes, sizes, check_finite))
    return {row.ours: array for row, array in zip(together, arrays, strict=True)}


def fill(struct: jax.ShapeDtypeStruct, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """One array, each distinct slice of it read once for all devices that hold it."""
    (array,) = _fill_alike([struct], lambda index: [read(index)])
    return array


def read_slices(
    checkpoint: Checkpoint,
    together: Sequence[Row],
    index: Index,
    dtypes: Sequence[np.dtype],
    sizes: Mapping[str, int],
    check_finite: bool,
) -> list[np.ndarray]:
    """The slice `index`, each cut with both ends, of arrays that lie in the same tensors (of layers, of experts)."""
    depth = len(together[0].stack)
    inner = index[depth:]
    where = together[0].hf_index(inner, sizes)
    assert all((row.hf, row.hf_index(inner, sizes)) == (together[0].hf, where) for row in together)
    arrays = [np.empty([cut.stop - cut.start for cut in index], dtype) for dtype in dtypes]
    for position in np.ndindex(arrays[0].shape[:depth]):
        name = together[0].hf_at(tuple(cut.start + at for cut, at in zip(index[:depth], position, strict=True)))
        piece = checkpoint.read(name, where)
        if check_finite and not np.isfinite(piece).all():
            count = np.count_nonzero(~np.isfinite(piece))
            raise ValueError(f"{checkpoint.folder}: tensor {name} holds {count} NaN or infinite numbers")
        for row, array in zip(together, arrays, strict=True):
            ours = row.to_ours(piece, inner, sizes)
            array[position] = cast(ours, array.dtype, f"{checkpoint.folder}: tensor {name}") if check_finite else ours
    return arrays


def _read_together(table: list[Row], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterable[list[Row]]:
    """The rows, those together whose parts of a tensor are interleaved: its bytes are read once for all of them."""
    groups = defaultdict(list)
    for row in table:
        struct = wanted[row.ours]
        key = (row.hf, row.layers, struct.shape, struct.sharding) if row.is_interleaved else row.ours
        groups[key].append(row)
    return groups.values()


def _fill_alike(
    structs: Sequence[jax.ShapeDtypeStruct], read: Callable[[Index], Sequence[np.ndarray]]
) -> list[jax.Array]:
    """Arrays of one shape and sharding; `read` gives the same slice of each."""
    shape, sharding = structs[0].shape, structs[0].sharding
    assert all((struct.shape, struct.sharding) == (shape, sharding) for struct in structs)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    devices = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None  # the map is of devices that hold a part
        devices[tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))].append(device)
    shards = [[] for _ in structs]
    for bounds, holders in devices.items():
        pieces = read(tuple(slice(*bound) for bound in bounds))
        places = [jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind) for device in holders]
        for own, piece in zip(shards, pieces, strict=True):
            own += [jax.device_put(piece, place) for place in places]
        jax.block_until_ready(shards)  # so that `pieces` can go before the next ones are read
    return [jax.make_array_from_single_device_arrays(shape, sharding, own) for own in shards]


__all__ = ["Checkpoint", "StoredTensor", "load_hf_config", "load_params", "open_checkpoint", "resolve"]
