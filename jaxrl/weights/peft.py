"""PEFT adapters: read from disk and merged into a base checkpoint, slice by slice.

Merging makes a checkpoint whose tensors are those of the base with the adapter added as they are read, so that load,
export and conversion see a plain model. `peft_tree.py` takes adapters into the model's "lora" collection instead.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..models.config import ModelConfig
from .formats import kind_of, open_checkpoint
from .heads import HEADS, OUTPUTS
from .peft_config import CONFIG_FILE, MERGE_WITH_PEFT, AdapterConfig, read_adapter_config
from .stored import Checkpoint, Index, StoredTensor

PREFIX = "base_model.model."  # what PEFT puts before every name
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_PARTS = re.compile(
    r"(?P<module>.+)\.(?:(?P<a>lora_A\.weight|lora_embedding_A)|(?P<b>lora_B\.weight|lora_embedding_B)"
    r"|(?P<bias>lora_B\.bias)|(?P<magnitude>lora_magnitude_vector(?:\.weight)?))"
)
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
_HEADS_TO_SAVE = ("classifier", "score")  # PEFT lists both for a classifier, which has one of them
_CONV1D = ("gpt2",)  # families whose matrices are stored [in, out]: what a square one does not say by its shape


@dataclass(frozen=True)
class LoraModule:
    """The adapter of one module: names of its tensors in the adapter's file. W' = W + scale * B A."""

    a: str  # [r, in], of an embedding [r, vocabulary]
    b: str  # [out, r], of an embedding [dim, r]
    rank: int
    scale: float
    bias: str | None = None  # added to the module's bias, times the scale
    magnitude: str | None = None  # DoRA (arXiv:2402.09353): the length of each row of W'

    @property
    def is_embedding(self) -> bool:
        return self.a.endswith("lora_embedding_A")


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk. `modules` by the module's name, `replaced` from a base tensor to the one in its place."""

    config: AdapterConfig
    checkpoint: Checkpoint
    modules: Mapping[str, LoraModule]
    replaced: Mapping[str, str]

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder


def is_adapter(path: Path) -> bool:
    """Whether this is an adapter and not a model with one beside it."""
    if path.is_file():
        beside = (path.parent / CONFIG_FILE).is_file() and kind_of(path) != "gguf"
        return beside and any(name.startswith(PREFIX) for name in open_checkpoint(path).tensors)
    if not (path / CONFIG_FILE).is_file():
        return False
    others = [file.name for pattern in ("model*.safetensors", "pytorch_model*.bin") for file in path.glob(pattern)]
    if others:
        raise ValueError(f"{path} holds an adapter and {min(others)}: name the file of the one that is meant")
    return True


def adapter_folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def open_adapter(folder: str | Path) -> Adapter:
    """Open the adapter of a folder and check that its tensors are what its config says."""
    folder = Path(folder)
    config = read_adapter_config(folder)
    file = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} holds neither {' nor '.join(ADAPTER_FILES)}: fetch the adapter again")
    return adapter_from(config, open_checkpoint(file), str(file))


def adapter_from(config: AdapterConfig, checkpoint: Checkpoint, where: str) -> Adapter:
    """An adapter of tensors under PEFT's names."""
    found: dict[str, dict[str, str]] = {}
    replaced = {}
    for name in checkpoint.tensors:
        if not name.startswith(PREFIX):
            raise ValueError(f"{where}: tensor {name} does not begin with {PREFIX}, as every tensor of an adapter does")
        bare = name.removeprefix(PREFIX)
        part = _PARTS.fullmatch(bare)
        if part is not None and part.lastgroup is not None:
            found.setdefault(part["module"], {})[part.lastgroup] = name
        elif ".lora_" in bare:
            raise ValueError(f"{where}: tensor {name} is of a kind of adapter that is not read here")
        else:
            replaced[bare.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = name
    modules = {module: _lora_module(config, checkpoint, where, module, parts) for module, parts in found.items()}
    saved = {
        module for module in config.modules_to_save if any(_in(name.rpartition(".")[0], [module]) for name in replaced)
    }
    for module in config.modules_to_save:
        is_found = module in saved or (module in _HEADS_TO_SAVE and not saved.isdisjoint(_HEADS_TO_SAVE))
        if not is_found:
            raise ValueError(f"{where} lacks the tensors of {module}, which its config lists in modules_to_save")
    return Adapter(config, checkpoint, modules, replaced)


def base_path(adapter: Adapter) -> str:
    """The model that an adapter names as its base: a path beside it where there is one, else as it stands."""
    base = adapter.config.base
    if base is None:
        raise ValueError(
            f"{adapter.folder} does not say what model it adapts: set base_model_name_or_path in its config"
        )
    beside = adapter.folder / base
    return str(beside) if beside.is_dir() else base


def merged(base: Checkpoint, adapter: Adapter, hf_config: Mapping[str, Any]) -> tuple[Checkpoint, dict[str, Any]]:
    """The base with the adapter added to its weights, in float32 and rounded to the base's dtype; and its config.

    Raises ValueError where the adapter does not fit: a module that the base lacks or that only one of adapter and
    config names, another shape, a bias where the base has none.
    """
    base, hf_config = _untied(base, adapter, hf_config)
    _check_targets(base, adapter)
    tensors = {name: base.stored(name) for name in base.tensors}
    for name, theirs in adapter.replaced.items():
        stored = adapter.checkpoint.stored(theirs)
        if name in tensors and tensors[name].shape != stored.shape:
            raise ValueError(
                f"{adapter.folder}: tensor {theirs} has shape {stored.shape}, and {name} of {base.folder} has "
                f"{tensors[name].shape}"
            )
        if name not in tensors and not _in(name.rpartition(".")[0], adapter.config.modules_to_save):
            raise ValueError(f"{adapter.folder}: tensor {theirs} has no place in {base.folder}, which has no {name}")
        tensors[name] = stored
    is_conv1d = hf_config.get("model_type") in _CONV1D
    for module, lora in adapter.modules.items():
        weight, bias = f"{module}.weight", f"{module}.bias"
        tensors[weight] = _with_lora(tensors[weight], adapter, module, lora, is_conv1d)
        if lora.bias is not None:
            if bias not in tensors:
                raise ValueError(f"{adapter.folder} adds a bias to {module}, which has none in {base.folder}")
            tensors[bias] = _with_bias(tensors[bias], adapter.checkpoint, lora)
    return base.with_tensors(tensors), dict(hf_config)


def with_head_of(base: Checkpoint, adapter: Adapter) -> tuple[Checkpoint, Adapter]:
    """The base with the score head that an adapter of a classifier holds in full, and the adapter without it."""
    heads = {name: theirs for name, theirs in adapter.replaced.items() if name.rpartition(".")[0] in HEADS}
    if adapter.config.head is None or not heads:
        return base, adapter
    tensors = {name: base.stored(name) for name in base.tensors if name.rpartition(".")[0] not in HEADS}
    tensors |= {name: adapter.checkpoint.stored(theirs) for name, theirs in heads.items()}
    others = {name: theirs for name, theirs in adapter.replaced.items() if name not in heads}
    return base.with_tensors(tensors), replace(adapter, replaced=others)


def _lora_module(
    config: AdapterConfig, checkpoint: Checkpoint, where: str, module: str, parts: Mapping[str, str]
) -> LoraModule:
    for part in ("a", "b", *(["magnitude"] if config.use_dora else [])):
        if part not in parts:
            lost = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector"}[part]
            raise ValueError(f"{where} lacks {lost} of {module}: fetch the adapter again")
    lora = LoraModule(rank=config.rank_of(module), scale=config.scale_of(module), **parts)
    ranks = checkpoint.tensors[lora.a].shape[0], checkpoint.tensors[lora.b].shape[-1]
    if ranks != (lora.rank, lora.rank):
        raise ValueError(f"{where}: {module} has matrices of rank {ranks}, and its config says {lora.rank}")
    if lora.magnitude and not config.use_dora:
        raise ValueError(f"{where} holds a DoRA magnitude of {module}, and its config does not set use_dora")
    if lora.magnitude and lora.is_embedding:
        raise ValueError(
            f"{where} adapts the embedding {module} with DoRA, which is not supported here: {MERGE_WITH_PEFT}"
        )
    return lora


def _in(module: str, names: Collection[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _untied(base: Checkpoint, adapter: Adapter, hf_config: Mapping[str, Any]) -> tuple[Checkpoint, Mapping[str, Any]]:
    """Where one table serves as embedding and as output and the adapter changes what only one of them sees: two tables.

    PEFT adapts the module and not the table that it shares: the other one keeps the numbers of the base.
    """
    table = next((name for name in base.tensors if _in(name.removesuffix(".weight"), _EMBEDDINGS)), None)
    has_output = any(_in(name.removesuffix(".weight"), (*OUTPUTS, *HEADS)) for name in base.tensors)
    if table is None or (has_output and not ModelConfig.from_hf(hf_config).tie_embeddings):
        return base, hf_config
    touched = [module for module in adapter.modules if _in(module, (*_EMBEDDINGS, *OUTPUTS))]
    touched += [
        name
        for name, theirs in adapter.replaced.items()
        if _in(name.removesuffix(".weight"), (*_EMBEDDINGS, *OUTPUTS))
        and not _equal(base, name if name in base.tensors else table, adapter.checkpoint, theirs)
    ]
    if not touched:
        return base, hf_config
    if adapter.config.raw.get("ensure_weight_tying"):
        raise ValueError(
            f"{adapter.folder} adapts {touched[0]} of a model with tied embeddings under ensure_weight_tying, which is "
            f"not supported here: {MERGE_WITH_PEFT}"
        )
    tensors = {**{name: base.stored(name) for name in base.tensors}, "lm_head.weight": base.stored(table)}
    return base.with_tensors(tensors), {**hf_config, "tie_word_embeddings": False}


def _equal(base: Checkpoint, name: str, other: Checkpoint, theirs: str) -> bool:
    if base.tensors[name].shape != other.tensors[theirs].shape:
        return False
    ours, new = base.read(name), other.read(theirs)
    return np.array_equal(ours, new.astype(ours.dtype))


def _check_targets(base: Checkpoint, adapter: Adapter) -> None:
    """The modules that the config asks for are those that the file has tensors for, and the base has all of them."""
    weights = {
        name.removesuffix(".weight"): tensor for name, tensor in base.tensors.items() if name.endswith(".weight")
    }

    def is_linear(module: str) -> bool:
        tables = (*_EMBEDDINGS, *OUTPUTS, *HEADS, "wpe", "embed_positions")
        return len(weights[module].shape) == 2 and not _in(module, tables)

    lost = [module for module in adapter.modules if module not in weights]
    if lost:
        raise ValueError(f"{adapter.folder} adapts {lost[0]}, which {base.folder} does not have: is it the right base?")
    wanted = {module for module in weights if adapter.config.targets(module, is_linear)}
    if wanted != adapter.modules.keys():
        odd = min(wanted ^ adapter.modules.keys())
        what = (
            "asks for {} and the file has no tensors for it"
            if odd in wanted
            else "does not ask for {}, which the file adapts"
        )
        raise ValueError(f"{adapter.folder}: the config {what.format(odd)}")


def _with_lora(weight: StoredTensor, adapter: Adapter, module: str, lora: LoraModule, is_conv1d: bool) -> StoredTensor:
    """W + scale * B A, or what DoRA makes of it, for any slice that is asked for."""
    checkpoint = adapter.checkpoint
    outputs, inputs = checkpoint.tensors[lora.b].shape[0], checkpoint.tensors[lora.a].shape[1]
    square = inputs == outputs
    is_transposed = lora.is_embedding or (is_conv1d if square else weight.shape == (inputs, outputs))
    if weight.shape != ((inputs, outputs) if is_transposed else (outputs, inputs)):
        raise ValueError(
            f"{adapter.folder} adapts {module} with {outputs} outputs and {inputs} inputs, and its weight has shape "
            f"{weight.shape}: is it the right base?"
        )

    def turned(index: Index) -> Index:
        return index[::-1] if is_transposed else index

    def read(index: Index) -> np.ndarray:
        rows, columns = turned(index)  # of the matrix [out, in]
        if lora.magnitude is not None:
            columns = slice(0, inputs)  # the length of a row needs all of it
        base = weight.read(turned((rows, columns)))
        b = checkpoint.read(lora.b, (rows, slice(0, lora.rank))).astype(np.float32)
        a = checkpoint.read(lora.a, (slice(0, lora.rank), columns)).astype(np.float32)
        out = (base.T if is_transposed else base).astype(np.float32) + np.float32(lora.scale) * (b @ a)
        if lora.magnitude is not None:
            length = checkpoint.read(lora.magnitude, (rows,)).astype(np.float32)
            out *= (length / np.linalg.norm(out, axis=1))[:, None]
            out = out[:, turned(index)[1]]
        return (out.T if is_transposed else out).astype(weight.dtype)

    return StoredTensor(weight.shape, weight.dtype, weight.file, read)


def _with_bias(bias: StoredTensor, checkpoint: Checkpoint, lora: LoraModule) -> StoredTensor:
    assert lora.bias is not None  # the caller has looked
    added = lora.bias

    def read(index: Index) -> np.ndarray:
        delta = checkpoint.read(added, index).astype(np.float32)
        return (bias.read(index).astype(np.float32) + np.float32(lora.scale) * delta).astype(bias.dtype)

    return StoredTensor(bias.shape, bias.dtype, bias.file, read)
