"""Convert a model of any kind that is read here into a Hugging Face folder, an orbax checkpoint or a PEFT adapter.

What `scripts/convert_checkpoint.py` calls. Tensors pass through one at a time; the result takes its name when all of it
is there and, if asked, verified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..models.decoder import abstract_params
from ..parallel import make_mesh, with_shardings
from .folder import both_spellings, new_folder, refuse_existing, write_json
from .hf_names import Row, axis_sizes, flatten, in_order, rows
from .load import read_slices
from .orbax_folder import PARAMS, create_arrays
from .peft import Adapter
from .peft_tree import carry_adapter_config, write_adapter
from .safetensors_writer import TensorSpec, dtype_named
from .source import Options, Source, open_adapter_source, open_source
from .stored import cast
from .verify import verify_adapter, verify_logits, verify_tensors
from .write import Manifest, write_model

_SMALL = 1 << 20  # bytes of layers that go to disk at once: every write there costs some ten milliseconds

FORMATS = ("hf", "orbax", "peft")
Progress = Callable[[str, int, int], None]  # name of the tensor, bytes until now, bytes in all


def convert(
    source: str,
    out: str | Path,
    *,
    to: str = "hf",
    options: Options | None = None,
    dtype: str | None = None,
    mesh: tuple[int, int, int] = (1, 1, 1),
    verify: bool = False,
    max_shard_bytes: float = 5e9,
    progress: Progress = lambda name, done, total: None,
) -> None:
    """Write the model `source` (a folder, a file, an id on the Hub) to the new folder `out`.

    `dtype` is one for all tensors, by default each keeps its own. `mesh` is how an orbax checkpoint is cut, data x fsdp
    x tensor; it loads onto any other. `verify` reads the result again and compares every tensor, and where torch is
    installed the logits with transformers. Raises ValueError, and leaves nothing, where something is wrong.
    """
    options, out = options or Options(), Path(out)
    if to not in FORMATS:
        raise ValueError(f"--to {to!r} is not one of {', '.join(FORMATS)}")
    if dtype is not None:
        dtype_named(dtype)
    refuse_existing(out)
    if to == "peft":
        _write_peft(open_adapter_source(source, options), source, out, dtype, verify)
        return
    model = open_source(source, options)
    specs = specs_of(model, dtype)
    if to == "orbax":
        _write_orbax(model, specs, out, mesh, verify, progress)
        return

    def check(folder: Path) -> None:
        if verify:
            verify_tensors(folder, model, specs)
            verify_logits(folder)

    write_model(
        out, model.hf_config, specs, _stream(model, specs, progress), source=described(model),
        companions=model.write_companions, max_shard_bytes=max_shard_bytes, check=check,
    )  # fmt: skip


def specs_of(model: Source, dtype: str | None) -> list[TensorSpec]:
    """What will be written: name, shape and dtype of every tensor."""
    wanted = None if dtype is None else dtype_named(dtype)
    return [
        TensorSpec(name, tensor.shape, wanted or (model.dtypes or {}).get(name, tensor.dtype))
        for name, tensor in model.checkpoint.tensors.items()
    ]


def described(model: Source) -> str:
    return f"{model.name} ({model.checkpoint.kind})"


def name_map(source: str, *, to: str = "hf", options: Options | None = None, dtype: str | None = None) -> Iterator[str]:
    """A line for each tensor: ours, the Hugging Face name, shape, dtypes, the file it is in, the pattern of axes."""
    options = options or Options()
    if to == "peft":
        adapter = open_adapter_source(source, options)
        for name, tensor in adapter.checkpoint.tensors.items():
            yield f"{name}  {list(tensor.shape)}  {_dtypes(tensor.dtype, dtype)}  in {tensor.file}"
        return
    model = open_source(source, options)
    specs = {spec.name: spec for spec in specs_of(model, dtype)}
    for tensor in in_order(model.config, model.head):
        stored = model.checkpoint.tensors[tensor.name]
        dtypes = _dtypes(stored.dtype, specs[tensor.name].dtype.name)
        for row, place in tensor.parts:
            ours = row.ours + "".join(f"[{at}]" for at in place)
            part = "".join(f", {letter} from {start} of {size}" for letter, start, size in row.parts)
            yield (
                f"{ours}  <-  {tensor.name}  {list(stored.shape)}  {dtypes}  in {stored.file}  ({row.pattern}{part})"
            )


def _dtypes(stored: np.dtype, written: str | None) -> str:
    return stored.name if written in (None, stored.name) else f"{stored.name} -> {written}"


def _stream(model: Source, specs: list[TensorSpec], progress: Progress) -> Iterator[tuple[str, np.ndarray]]:
    done, total = 0, sum(spec.nbytes for spec in specs)
    for spec in specs:
        tensor = model.checkpoint.read(spec.name)
        _check_finite(tensor, spec.name, model)
        yield spec.name, cast(tensor, spec.dtype, f"{model.name}: tensor {spec.name}")
        done += spec.nbytes
        progress(spec.name, done, total)


def _check_finite(tensor: np.ndarray, name: str, model: Source) -> None:
    if not np.isfinite(tensor).all():
        count = np.count_nonzero(~np.isfinite(tensor))
        raise ValueError(f"{model.name}: tensor {name} holds {count} NaN or infinite numbers")


def _write_orbax(
    model: Source,
    specs: list[TensorSpec],
    out: Path,
    mesh: tuple[int, int, int],
    verify: bool,
    progress: Progress,
) -> None:
    """config.json and companions as in a Hugging Face folder, and the arrays of our tree in `params/`."""
    dtypes = {spec.name: spec.dtype for spec in specs}
    abstract, axes = abstract_params(model.config, model.head)
    shapes = dict(flatten(with_shardings(make_mesh(*mesh), abstract["params"], axes["params"])))
    sizes, table = axis_sizes(model.config), rows(model.config, head=model.head)
    wanted = [TensorSpec(row.ours, shapes[row.ours].shape, dtypes[row.hf_names(sizes)[0]]) for row in table]
    done, total = 0, sum(spec.nbytes for spec in wanted)

    def written(row: Row, spec: TensorSpec, array: Any) -> Iterator[np.ndarray]:
        """The parts of an array, each after it was written: layer by layer, or all of one that has no layers."""
        nonlocal done
        length = spec.shape[0]
        at_once = max(1, length * _SMALL // spec.nbytes) if row.stacked else length
        for start in range(0, length, at_once):
            index = (slice(start, min(start + at_once, length)), *(slice(0, size) for size in spec.shape[1:]))
            (part,) = read_slices(model.checkpoint, [row], index, [spec.dtype], sizes, True)
            array[index].write(part).result()
            yield part
            done += part.nbytes
            progress(row.ours, done, total)

    with new_folder(out) as folder:
        model.write_companions(folder)
        write_json(folder / "config.json", both_spellings(model.hf_config, specs[0].dtype.name))
        manifest = Manifest(described(model), wanted)
        chunks = [shapes[row.ours].sharding.shard_shape(shapes[row.ours].shape) for row in table]
        chunks = [(1, *chunk[1:]) if row.stacked else chunk for row, chunk in zip(table, chunks, strict=True)]
        arrays = create_arrays(folder / PARAMS, wanted, chunks)
        for row, spec, array in zip(table, wanted, arrays, strict=True):
            manifest.record(row.ours, written(row, spec, array))
        manifest.write(folder)
        if verify:
            verify_tensors(folder, model, specs)


def _write_peft(adapter: Adapter, source: str, out: Path, dtype: str | None, verify: bool) -> None:
    checkpoint, tensors = adapter.checkpoint, {}
    for name, stored in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        if not np.isfinite(tensor).all():
            raise ValueError(f"{source}: tensor {name} holds NaN or infinite numbers")
        wanted = stored.dtype if dtype is None else dtype_named(dtype)
        tensors[name] = np.ascontiguousarray(cast(tensor, wanted, f"{source}: tensor {name}"))
    with new_folder(out) as folder:
        carry_adapter_config(folder, adapter)
        write_adapter(folder, tensors, source=source)
        if verify:
            verify_adapter(folder, adapter)
