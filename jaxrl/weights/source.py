"""A model that is to be converted, whatever it is: found by content, opened, and made to fit its family.

The result has everything that a folder of the same model needs: the tensors under Hugging Face names, the config, and
tokenizer and companions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from ..models.config import ModelConfig
from ..models.families import FAMILIES
from .bnb import dequantized, dequantized_config, packed_tensors
from .export import config_for_head, stored_dtypes
from .fit import fitted
from .folder import copy_companions, load_hf_config
from .formats import kind_of, open_checkpoint
from .gguf import open_gguf
from .heads import which_head
from .hf_names import axis_sizes, rows, unflatten
from .locate import fetch_model, resolve
from .orbax_folder import arrays_under, as_checkpoint, head_settings, is_orbax, open_arrays
from .peft import Adapter, adapter_folder, base_path, is_adapter, merged, open_adapter
from .peft_tree import adapter_of, lora_settings
from .pretrained import as_flax_reads_it, open_pretrained
from .stored import Checkpoint


@dataclass(frozen=True)
class Options:
    """How to read a source: what its files do not say, or say twice."""

    merge_lora: bool = False
    dequantize: bool = False  # turn 4-bit weights into numbers
    head: str | None = None  # lm or score, where a checkpoint holds both
    head_path: str | None = None  # the module of a head that is under none of the usual names
    role: str = "actor"  # actor or critic, of the checkpoint of a run
    base: str | None = None  # the model that an adapter adapts, or that a run began from


@dataclass(frozen=True)
class Source:
    """A model that fits its family. `checkpoint` holds its tensors in the order of a forward pass."""

    name: str
    checkpoint: Checkpoint
    hf_config: Mapping[str, Any]
    config: ModelConfig
    head: str
    write_companions: Callable[[Path], None]
    dtypes: Mapping[str, np.dtype] | None = None  # what a tensor is written as, where that is not what it is read as


def open_source(name: str, options: Options) -> Source:
    """A local folder, file or Hub id of any kind. Raises ValueError where it is no model that is known here."""
    path = fetch_model(name)
    if is_adapter(path):
        if not options.merge_lora:
            raise ValueError(f"{name} is an adapter: ask for --merge-lora to add it to its base, or for --to peft")
        return _merged_source(name, open_adapter(adapter_folder(path)), options)
    if is_orbax(path):
        return _run_source(name, path, options)
    if options.merge_lora:
        raise ValueError(f"{name} is no adapter: --merge-lora adds one to its base")
    if path.is_file() and kind_of(path) == "gguf":
        model = open_gguf(path)
        return _fit(name, model.checkpoint, model.hf_config, options, model.write_companions)
    folder = path if path.is_dir() else path.parent
    if (folder / "checkpoints").is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{name} is the folder of a run: name {name}/hf, or one of {name}/checkpoints/global_step_<n>")
    return _fit(name, open_checkpoint(path), load_hf_config(folder), options, partial(copy_companions, folder))


def open_adapter_source(name: str, options: Options) -> Adapter:
    """An adapter: a folder or Hub id of PEFT, or what a run with LoRA has trained."""
    path = fetch_model(name)
    if is_adapter(path):
        return open_adapter(adapter_folder(path))
    if is_orbax(path):
        adapter = _Run(path, options).adapter()
        if adapter is not None:
            return adapter
    raise ValueError(f"{name} holds no adapter: --to peft takes a PEFT adapter, or a run that trained with lora_rank")


def _merged_source(name: str, adapter: Adapter, options: Options) -> Source:
    base = fetch_model(options.base or base_path(adapter))
    if is_orbax(base) or is_adapter(base):
        raise ValueError(f"{base}, the base of {name}, is not a model to merge into: name another by --base")
    if base.is_file() and kind_of(base) == "gguf":
        model = open_gguf(base)
        checkpoint, hf_config, companions = model.checkpoint, model.hf_config, model.write_companions
    else:
        checkpoint, hf_config = _unpacked(open_checkpoint(base), load_hf_config(base), options)
        hf_config = as_flax_reads_it(checkpoint, hf_config)
        companions = partial(copy_companions, base)
    checkpoint, hf_config = merged(checkpoint, adapter, hf_config)
    options = replace(options, head=options.head or adapter.config.head)
    if (adapter.folder / "tokenizer.json").is_file():
        companions = partial(copy_companions, adapter.folder)
    return _fit(name, checkpoint, hf_config, options, companions)


class _Run:
    """The checkpoint of a run, beside whose folder its config.yaml lies."""

    def __init__(self, folder: Path, options: Options):
        self.folder = folder
        self.arrays = open_arrays(folder)
        config_file = folder.resolve().parent.parent / "config.yaml"
        settings: Any = OmegaConf.load(config_file) if config_file.is_file() else None
        if settings is None and options.base is None:
            raise ValueError(f"{folder} has no config.yaml of its run beside it: name the run's model by --base")
        model = options.base or _model_of(settings, options.role)
        if model is None:
            raise ValueError(f"{folder} is of a run whose model was handed over in Python: name that model by --base")
        opened = open_pretrained(model)
        self.base_name = model if opened.adapter is None else opened.base
        self.base = resolve(self.base_name)
        self.hf_config = opened.hf_config
        self.params = arrays_under(self.arrays, f"{options.role}.trained.params.")
        self._lora = arrays_under(self.arrays, f"{options.role}.trained.lora.")
        self._settings = settings
        if not self.params and not self._lora:
            raise ValueError(f"{folder} holds no weights of {options.role!r}: --role takes actor or critic")

    def adapter(self) -> Adapter | None:
        """What was trained of a model with LoRA."""
        if not self._lora:
            return None
        if self._settings is None or self._settings.model.path is None:
            raise ValueError(
                f"{self.folder} has no config.yaml of its run beside it that says what lora_alpha was: take the folder "
                "`adapter` that the run left"
            )
        began = open_pretrained(self._settings.model.path, self._settings.model.get("lora_adapter_path")).adapter
        plain = ModelConfig.from_hf(dequantized_config(self.hf_config))
        alpha = self._settings.model.lora_alpha if began is None else lora_settings(began, plain)["lora_alpha"]
        targets = sorted({name.split(".")[-2] for name in self._lora})
        rank = next(array.shape[-1] for name, array in self._lora.items() if name.endswith(".a"))
        config = replace(plain, lora_rank=int(rank), lora_alpha=float(alpha), lora_targets=tuple(targets))
        lora = unflatten({name: np.asarray(array.read().result()) for name, array in self._lora.items()})
        return adapter_of(lora, config, self.base_name, self.folder)


def _model_of(settings: Any, role: str) -> str | None:
    """The model that a role of a run began from, by the run's config."""
    return (settings.critic.path if role == "critic" else None) or settings.model.path


def _run_source(name: str, path: Path, options: Options) -> Source:
    run = _Run(path, options)
    adapter = run.adapter()
    if adapter is not None:
        if not options.merge_lora:
            raise ValueError(f"{name} holds adapters: ask for --merge-lora to add them to the base, or for --to peft")
        return _merged_source(name, adapter, replace(options, base=str(run.base)))
    head, settings = head_settings(run.params)
    groups = {ours.split(".")[0]: array.shape[0] for ours, array in run.params.items() if ours.startswith("layers")}
    num_layers = sum(groups.values())
    hf_config = first_layers(dequantized_config(run.hf_config), num_layers)
    checkpoint = as_checkpoint(path, run.params, ModelConfig.from_hf(hf_config, **settings), head)
    source = _fit(name, checkpoint, hf_config, replace(options, head=head), partial(copy_companions, run.base))
    # Array by array and not layer by layer: a run does not cut its arrays by layers.
    sizes = axis_sizes(source.config)
    table = rows(source.config, head=head)
    names = list(dict.fromkeys(tensor for row in table for tensor in row.hf_names(sizes)))
    by_array = source.checkpoint.with_tensors({tensor: source.checkpoint.stored(tensor) for tensor in names})
    return replace(source, checkpoint=by_array, dtypes=stored_dtypes(open_checkpoint(run.base), source.config, names))


def first_layers(hf_config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The config of the same model with its first layers only: a critic may be shallower than its model."""
    spelled = FAMILIES[hf_config["model_type"]].spelled.get("num_hidden_layers", "num_hidden_layers")
    out = {**hf_config, spelled: int(num_layers)}
    if hf_config.get("layer_types"):
        out["layer_types"] = hf_config["layer_types"][:num_layers]
    return out


def _unpacked(
    checkpoint: Checkpoint, hf_config: Mapping[str, Any], options: Options
) -> tuple[Checkpoint, dict[str, Any]]:
    packed = packed_tensors(checkpoint)
    if packed and not options.dequantize:
        raise ValueError(
            f"{checkpoint.folder} holds {len(packed)} matrices in 4 bits of bitsandbytes: ask for --dequantize to "
            "write them as numbers"
        )
    return (dequantized(checkpoint) if packed else checkpoint), dequantized_config(hf_config)


def _fit(
    name: str,
    checkpoint: Checkpoint,
    hf_config: Mapping[str, Any],
    options: Options,
    companions: Callable[[Path], None],
) -> Source:
    checkpoint, hf_config = _unpacked(checkpoint, hf_config, options)
    hf_config = as_flax_reads_it(checkpoint, hf_config)
    head, settings = which_head(checkpoint, hf_config, head=options.head, path=options.head_path)
    config = ModelConfig.from_hf(hf_config, **settings)
    checkpoint = fitted(checkpoint, config, head, head_path=options.head_path)
    return Source(name, checkpoint, config_for_head(hf_config, config, head), config, head, companions)
