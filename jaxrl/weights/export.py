"""Export a model: our parameter tree -> a complete Hugging Face folder, tensor by tensor.

The rows of `hf_names.py` read backwards. A tensor leaves the devices one layer at a time and goes to disk before the
next one, so that a host holds one tensor. The publisher of weights uses the same stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..models.config import ModelConfig
from ..parallel import fetch
from .folder import both_spellings, copy_companions, load_hf_config, new_folder, refuse_existing, write_json
from .hf_names import CLASSES, EMBEDDING, axis_sizes, flatten, head_of, in_order
from .load import open_checkpoint
from .safetensors_writer import TensorSpec, dtype_named, write_safetensors

Tree = dict[str, Any]


def hf_tensors(params: Tree, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its Hugging Face name, whole, on the host, in the order of a forward pass.

    On several hosts each of them must run through the iterator, and each is given every tensor.
    """
    leaves = dict(flatten(params))
    for row, layer in in_order(config, head_of(params)):
        array = leaves[row.ours]
        yield row.hf.format(layer), row.to_hf(np.asarray(fetch(array[layer] if row.stacked else array)))


def export_hf(
    params: Tree,
    config: ModelConfig,
    out_dir: str | Path,
    *,
    source_folder: str | Path,
    dtype: str | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> None:
    """Write `params` as a Hugging Face folder: weights, config, tokenizer, chat template, generation settings.

    Everything but the weights comes from `source_folder`, the model that training began from; so does the dtype of
    each tensor, unless `dtype` names one for all. A tree with a `score` head is written as ForTokenClassification where
    the head has a bias (as verl keeps a critic), else as ForSequenceClassification. `out_dir` appears when it is
    complete; what is already there is refused, or with `overwrite` kept until then.
    """
    source, out_dir = Path(source_folder), Path(out_dir)
    if not overwrite:
        refuse_existing(out_dir)
    specs = _specs(config, head_of(params), source, dtype)
    dtypes = {spec.name: spec.dtype for spec in specs}
    stream = ((name, tensor.astype(dtypes[name], copy=False)) for name, tensor in hf_tensors(params, config))
    if jax.process_index() == 0:
        with new_folder(out_dir, overwrite=overwrite) as folder:
            copy_companions(source, folder)
            hf_config = _config_for_head(load_hf_config(source), config, head_of(params))
            write_json(folder / "config.json", both_spellings(hf_config, specs[0].dtype.name))
            _write_shards(folder, specs, stream, max_shard_bytes)
    else:
        for _ in stream:  # takes part in the gathering
            pass
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"exported {out_dir}")


def _specs(config: ModelConfig, head: str, source: Path, dtype: str | None) -> list[TensorSpec]:
    """Name, shape and dtype of what will be written; a tensor that the source lacks has its embedding's dtype."""
    sizes = axis_sizes(config)
    shapes = {row.hf.format(layer): row.hf_shape(sizes) for row, layer in in_order(config, head)}
    if dtype is not None:
        return [TensorSpec(name, shape, dtype_named(dtype)) for name, shape in shapes.items()]
    stored = open_checkpoint(source).tensors
    if stored.get(EMBEDDING) is None or stored[EMBEDDING].shape != shapes[EMBEDDING]:
        raise ValueError(f"{source} is not the model that is exported: its {EMBEDDING} is not {shapes[EMBEDDING]}")
    return [TensorSpec(name, shape, stored.get(name, stored[EMBEDDING]).dtype) for name, shape in shapes.items()]


def _config_for_head(hf_config: Mapping[str, Any], config: ModelConfig, head: str) -> dict[str, Any]:
    """The source's `config.json` with the class that reads this head, and for a score head its labels."""
    if head == "lm":
        return {**hf_config, "architectures": [f"{CLASSES[config.family]}ForCausalLM"]}
    kind = "ForTokenClassification" if config.score_bias else "ForSequenceClassification"
    out = {**hf_config, "architectures": [CLASSES[config.family] + kind]}
    out.pop("num_labels", None)  # transformers counts id2label
    if len(out.get("id2label") or ()) != config.num_labels:
        out["id2label"] = {str(label): f"LABEL_{label}" for label in range(config.num_labels)}
        out["label2id"] = {name: int(label) for label, name in out["id2label"].items()}
    return out


def _write_shards(
    folder: Path, specs: list[TensorSpec], stream: Iterator[tuple[str, np.ndarray]], max_shard_bytes: float
) -> None:
    """One file, or several of at most `max_shard_bytes` (a larger tensor has its own) and an index."""
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + spec.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", specs, stream)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, islice(stream, len(shard)))
        weight_map |= {spec.name: name for spec in shard}
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
