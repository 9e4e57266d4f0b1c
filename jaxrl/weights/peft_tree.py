"""PEFT adapters as the model's own "lora" collection, and back: to train from an adapter and to export one.

The rows of adapters follow from those of the kernels they adapt (`hf_names.py`): `a` [in.., r] and `b` [r, out..]
beside a kernel [in.., out..]. The model has one rank and one scale. A module of a smaller rank is filled up with zeros,
which training leaves zero, and another scale is taken into its `b`; export takes both back.

Where the module of a family is several of our matrices (Phi-3's `qkv_proj`), each of these has an adapter of its own, and
PEFT's has the sum of their ranks: A is theirs one below the other, and B has a block for each and zeros elsewhere.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..models.config import ModelConfig
from ..parallel import fetch
from .folder import new_folder, refuse_existing, write_json
from .hf_names import HfTensor, Part, Row, axis_sizes, flatten, rows, tensors_of, unflatten
from .load import load_arrays
from .peft import PREFIX, Adapter, adapter_from
from .peft_config import CONFIG_FILE, AdapterConfig
from .safetensors_writer import TensorSpec, dtype_named, write_safetensors
from .stored import Checkpoint, Index, StoredTensor, cast
from .write import Manifest

Tree = dict[str, Any]


def lora_settings(adapter: Adapter, config: ModelConfig) -> dict[str, Any]:
    """`lora_rank`, `lora_alpha` and `lora_targets` with which a model, `config` without them, can hold an adapter.

    Raises ValueError for what "lora" has no place for: it can be merged.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(
            f"{adapter.folder} has {what}, which can be merged but not trained here: "
            f"`python scripts/convert_checkpoint.py {adapter.folder} OUT --merge-lora`"
        )

    for module, lora in adapter.modules.items():
        if lora.magnitude is not None:
            raise refuse(f"DoRA's magnitudes ({module})")
        if lora.is_embedding:
            raise refuse(f"an adapted embedding ({module})")
        if lora.bias is not None:
            raise refuse(f"a bias of the adapter ({module})")
    if adapter.replaced:
        raise refuse(f"a tensor in full ({min(adapter.replaced)}; modules_to_save or bias)")
    made_of = _modules(config)
    tensors = {name for row in rows(config) for name in row.hf_names(axis_sizes(config))}
    for module in adapter.modules:
        if module not in made_of and f"{module}.weight" in tensors:
            raise refuse(f"adapters of {module}, an expert or outside of the layers")
        if module not in made_of:
            raise ValueError(f"{adapter.folder} adapts {module}, which family {config.family} has not: another base?")
    counts = {module: len(made_of[module]) for module in adapter.modules}
    rank = max(lora.rank // counts[module] for module, lora in adapter.modules.items())
    for module, lora in adapter.modules.items():
        if counts[module] > 1 and lora.rank != counts[module] * rank:
            raise refuse(f"one matrix A of rank {lora.rank} for the {counts[module]} matrices that {module} is here")
    targets = sorted({name for module in adapter.modules for name in made_of[module]})
    return {"lora_rank": rank, "lora_alpha": _common_scale(adapter) * rank, "lora_targets": tuple(targets)}


def lora_rows(config: ModelConfig) -> list[Row]:
    """The rows of all adapters of a model, `a` and `b` of every kernel that `lora_targets` names."""
    table, adapted = [], _adapted(config)
    for row in adapted:
        outputs, inputs = row.groups[::-1] if _is_conv1d(row) else row.groups
        ours, name = row.ours.removesuffix(".kernel"), PREFIX + row.hf.removesuffix(".weight")
        a = f"r {_merged(inputs)} -> {' '.join(inputs)} r"
        b = f"{_merged(outputs)} r -> r {' '.join(letter for letter in outputs if letter in row.letters)}"
        together = [other for other in adapted if (other.hf, other.layers) == (row.hf, row.layers)]
        rank = config.lora_rank
        block = (Part("r", together.index(row) * rank, len(together) * rank),) if row.parts else ()
        table.append(Row(f"{ours}.a", f"{name}.lora_A.weight", a, row.layers, block))
        table.append(Row(f"{ours}.b", f"{name}.lora_B.weight", b, row.layers, (*row.parts, *block)))
    return table


def lora_tensors(config: ModelConfig) -> Iterator[HfTensor]:
    """The tensors of all adapters of a model under PEFT's names, layer by layer."""
    return tensors_of(lora_rows(config), {**axis_sizes(config), "r": config.lora_rank})


def load_lora(adapter: Adapter, config: ModelConfig, abstract_lora: Tree) -> Tree:
    """Fill a "lora" tree of `jax.ShapeDtypeStruct` from an adapter; `config` has its `lora_settings`.

    Modules and layers that are not adapted get zeros, under which the model computes what it does without them.
    """
    needed = lora_settings(adapter, config)
    assert needed["lora_rank"] <= config.lora_rank, "the model's rank is too small for the adapter"
    assert set(needed["lora_targets"]) <= set(config.lora_targets), "the model lacks matrices that the adapter adapts"
    table, sizes = lora_rows(config), {**axis_sizes(config), "r": config.lora_rank}
    _check_blocks(adapter, config)
    checkpoint = _filled_up(adapter, config, table, sizes)
    wanted = dict(flatten(abstract_lora))
    assert wanted.keys() == {row.ours for row in table}, wanted.keys() ^ {row.ours for row in table}
    arrays: dict[str, jax.Array] = {}
    for row in table:
        arrays |= load_arrays(checkpoint, [row], wanted, sizes, check_finite=False)
    return unflatten(arrays)


def peft_tensors(lora: Tree, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the adapters under its PEFT name, on the host, layer by layer.

    On several hosts each of them must run through the iterator, and each is given every tensor.
    """
    leaves = dict(flatten(lora))
    for tensor in lora_tensors(config):
        yield tensor.name, tensor.of([np.asarray(fetch(leaves[row.ours][place])) for row, place in tensor.parts])


def adapter_of(lora: Tree, config: ModelConfig, base: str, folder: Path) -> Adapter:
    """The "lora" collection of a model as an adapter on the model `base`, as if it had been exported to `folder`."""
    tensors = {name: StoredTensor.of(array, folder.name) for name, array in peft_tensors(lora, config)}
    adapter_config = AdapterConfig.from_json(_fresh_config(config, base), str(folder))
    return adapter_from(adapter_config, Checkpoint(folder, tensors, kind="lora"), str(folder))


def export_peft(
    lora: Tree,
    config: ModelConfig,
    out_dir: str | Path,
    *,
    base: str,
    like: Adapter | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Write the adapters as a folder that PEFT and vLLM load; `base` is the model that they adapt, a path or Hub id.

    `like` is the adapter that training began from: its config, ranks, scales and dtypes are kept, and its base.
    `out_dir` appears when it is complete.
    """
    out_dir = Path(out_dir)
    if not overwrite:
        refuse_existing(out_dir)
    tensors = {}
    for name, tensor in peft_tensors(lora, config):  # of all hosts, each takes part in the gathering
        tensor = tensor if like is None else _taken_back(tensor, name, like, config)
        if tensor is not None:
            wanted = dtype_named(dtype) if like is None else like.checkpoint.tensors[name].dtype
            tensors[name] = np.ascontiguousarray(cast(tensor, wanted, f"tensor {name}"))
    if jax.process_index() == 0:
        with new_folder(out_dir, overwrite=overwrite) as folder:
            if like is None:
                write_adapter_config(folder, config, base)
            else:
                carry_adapter_config(folder, like)
            write_adapter(folder, tensors, source=f"trained from {base}")
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"exported {out_dir}")


def carry_adapter_config(folder: Path, adapter: Adapter) -> None:
    """`adapter_config.json` as the adapter has it, byte for byte where it came from a folder."""
    if (adapter.folder / CONFIG_FILE).is_file():
        shutil.copyfile(adapter.folder / CONFIG_FILE, folder / CONFIG_FILE)
    else:
        write_json(folder / CONFIG_FILE, dict(adapter.config.raw))


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray], *, source: str) -> None:
    """`adapter_model.safetensors`, its tensors in the order of the safetensors library: wide dtypes first, by name."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    specs = [TensorSpec(name, tensors[name].shape, tensors[name].dtype) for name in names]
    manifest = Manifest(source, specs)
    stream = manifest.recorded((name, tensors[name]) for name in names)
    write_safetensors(folder / "adapter_model.safetensors", specs, stream)
    manifest.write(folder)


def write_adapter_config(folder: Path, config: ModelConfig, base: str) -> None:
    """`adapter_config.json` of this model's adapters, on the model `base`."""
    write_json(folder / CONFIG_FILE, _fresh_config(config, base))


def _modules(config: ModelConfig) -> dict[str, list[str]]:
    """What every product of the model is called in PEFT, and the names of ours that it is made of."""
    made_of: dict[str, list[str]] = {}
    sizes = axis_sizes(config)
    for row in rows(config):
        if row.stack == "l" and row.ours.endswith(".kernel"):
            for name in row.hf_names(sizes):
                made_of.setdefault(name.removesuffix(".weight"), []).append(row.ours.split(".")[-2])
    return made_of


def _check_blocks(adapter: Adapter, config: ModelConfig) -> None:
    """Of modules that are several of our matrices, B has nothing outside of their blocks."""
    for tensor in lora_tensors(config):
        theirs = adapter.modules.get(_module(tensor.name))
        if theirs is None or len(tensor.parts) == 1 or ".lora_B." not in tensor.name:
            continue
        b = adapter.checkpoint.read(theirs.b)
        pieces, sizes = [], {**axis_sizes(config), "r": config.lora_rank}
        for row, _ in tensor.parts:
            whole = tuple(slice(0, size) for size in row.our_shape(sizes)[1:])
            pieces.append(row.to_ours(b[row.hf_index(whole, sizes)], whole, sizes))
        if not np.array_equal(tensor.of(pieces), b):
            raise ValueError(
                f"{adapter.folder} has one matrix A for all of {_module(tensor.name)}, which is several matrices here: "
                f"it can be merged, `python scripts/convert_checkpoint.py {adapter.folder} OUT --merge-lora`"
            )


def _adapted(config: ModelConfig) -> list[Row]:
    """The rows of the kernels that have adapters."""
    kernels = [row for row in rows(config) if row.ours.endswith(".kernel")]
    return [row for row in kernels if row.ours.split(".")[-2] in config.lora_targets]


def _is_conv1d(row: Row) -> bool:
    """Whether the Hugging Face matrix is [in, out], as ours is, and not [out, in]."""
    first, second = ([letter for letter in group if letter in row.letters] for group in row.groups)
    return row.letters == [*first, *second]


def _merged(letters: list[str]) -> str:
    return letters[0] if len(letters) == 1 else f"({' '.join(letters)})"


def _module(name: str) -> str:
    """The module that a tensor of an adapter belongs to."""
    return name.removeprefix(PREFIX).rpartition(".lora_")[0]


def _common_scale(adapter: Adapter) -> float:
    """The scale of the most modules: that of the others is taken into their B."""
    scales = [lora.scale for lora in adapter.modules.values()]
    return max(sorted(set(scales)), key=scales.count)


def _ratio(adapter: Adapter, module: str, config: ModelConfig) -> float:
    """What B of a module is multiplied by, so that the model's one scale serves it."""
    return adapter.modules[module].scale / config.lora_scale


def _filled_up(adapter: Adapter, config: ModelConfig, table: list[Row], sizes: Mapping[str, int]) -> Checkpoint:
    """The adapter as if every module of every layer had one, all of one rank and one scale."""
    tensors = {}
    for row in table:
        for name in row.hf_names(sizes):
            tensors[name] = _filled(adapter, config, name, row.hf_shape(sizes))
    return adapter.checkpoint.with_tensors(tensors)


def _filled(adapter: Adapter, config: ModelConfig, name: str, shape: tuple[int, ...]) -> StoredTensor:
    module = _module(name)
    lora = adapter.modules.get(module)
    dtype = np.dtype(np.float32)
    if lora is None:
        return StoredTensor(shape, dtype, "", lambda index: np.zeros([c.stop - c.start for c in index], dtype))
    theirs, axis = (lora.a, 0) if ".lora_A." in name else (lora.b, 1)
    ratio = 1.0 if axis == 0 else _ratio(adapter, module, config)
    stored = adapter.checkpoint.tensors[theirs]
    if stored.shape[1 - axis] != shape[1 - axis]:
        raise ValueError(
            f"{adapter.folder}: {theirs} has shape {stored.shape}, and {module} of this model has {shape[1 - axis]} "
            f"{'inputs' if axis == 0 else 'outputs'}: is it the right base?"
        )

    def read(index: Index) -> np.ndarray:
        out = np.zeros([cut.stop - cut.start for cut in index], dtype)
        cuts = list(index)
        cuts[axis] = slice(index[axis].start, min(index[axis].stop, lora.rank))
        piece = adapter.checkpoint.read(theirs, tuple(cuts))
        out[tuple(slice(0, size) for size in piece.shape)] = piece.astype(np.float32) * np.float32(ratio)
        return out

    return StoredTensor(shape, dtype, stored.file, read)


def _taken_back(tensor: np.ndarray, name: str, like: Adapter, config: ModelConfig) -> np.ndarray | None:
    """What `_filled` did, undone; None for a module that the adapter does not have."""
    module = _module(name)
    lora = like.modules.get(module)
    is_a = ".lora_A." in name
    rank = 0 if lora is None else lora.rank
    beyond = tensor[rank:] if is_a else tensor[:, rank:]
    if beyond.any():
        raise ValueError(f"the adapter of {module} has grown beyond the rank {rank} that it has in {like.folder}")
    if lora is None:
        return None
    return tensor[:rank] if is_a else tensor[:, :rank] / np.float32(_ratio(like, module, config))


def _fresh_config(config: ModelConfig, base: str) -> dict[str, Any]:
    """The settings that PEFT and vLLM need, of an adapter that was made here."""
    adapted = _adapted(config)
    names = {_suffix(config, row): sum(other.hf == row.hf for other in adapted) if row.parts else 1 for row in adapted}
    alpha = int(config.lora_alpha) if math.floor(config.lora_alpha) == config.lora_alpha else config.lora_alpha
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": any(map(_is_conv1d, adapted)),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.lora_rank,
        "rank_pattern": {name: count * config.lora_rank for name, count in names.items() if count > 1},
        "alpha_pattern": {name: count * alpha for name, count in names.items() if count > 1},
        "revision": None,
        "target_modules": sorted(names),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _suffix(config: ModelConfig, row: Row) -> str:
    """The end of a module's name that no module has which is not adapted: GPT-2 calls two of them `c_proj`."""
    *_, parent, module, _ = row.hf.split(".")
    others = {other.hf for other in rows(config) if other.ours.endswith(".kernel")} - {r.hf for r in _adapted(config)}
    return f"{parent}.{module}" if any(other.endswith(f".{module}.weight") for other in others) else module
