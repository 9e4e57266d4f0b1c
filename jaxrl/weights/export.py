"""Export a model: our parameter tree -> a complete Hugging Face folder, tensor by tensor.

The rows of `hf_names.py` read backwards. A tensor leaves the devices one layer at a time and goes to disk before the
next one, so that a host holds one tensor. The publisher of weights uses the same stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..models.config import ModelConfig
from ..models.nf4 import dequantize
from ..offload import fetched
from ..parallel import fetch
from .bnb import dequantized
from .folder import refuse_existing
from .hf_names import Row, axis_sizes, class_of, embedding_of, flatten, head_of, in_order, is_packed
from .prefixes import with_expected_names
from .pretrained import Pretrained, open_pretrained
from .safetensors_writer import TensorSpec, dtype_named
from .stored import Checkpoint, cast
from .write import write_model

Tree = dict[str, Any]
_log = logging.getLogger(__name__)


def hf_tensors(
    params: Tree,
    config: ModelConfig,
    *,
    lora: Tree | None = None,
    packed: Tree | None = None,
    dtype: np.dtype | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor under its Hugging Face name, whole, on the host, in the order of a forward pass.

    `lora` is merged into the weights it adapts, and the 4-bit kernels `packed` become numbers, one layer at a time; a
    `dtype` is taken on before the tensor leaves the devices. On several hosts each of them must run through the
    iterator, and each is given every tensor.
    """
    piece = _piecewise(params, config, lora, packed, dtype)
    for tensor in in_order(config, head_of(params, config)):
        yield tensor.name, tensor.of([np.asarray(fetch(piece(row, place))) for row, place in tensor.parts])


def device_tensors(
    params: Tree, config: ModelConfig, *, dtype: np.dtype, lora: Tree | None = None, packed: Tree | None = None
) -> Iterator[tuple[str, jax.Array]]:
    """The same tensors on the devices, sharded as it comes."""
    piece = _piecewise(params, config, lora, packed, dtype)
    for tensor in in_order(config, head_of(params, config)):
        pieces = [jnp.asarray(piece(row, place)) for row, place in tensor.parts]
        if not tensor.is_fused:
            yield tensor.name, tensor.of(pieces)
            continue
        whole = jnp.zeros(tensor.shape, dtype)
        for (row, _), part in zip(tensor.parts, pieces, strict=True):
            shape, where, part = row.within(part)
            whole = whole.reshape(shape).at[where].set(part).reshape(tensor.shape)
        yield tensor.name, whole


def _piecewise(
    params: Tree, config: ModelConfig, lora: Tree | None, packed: Tree | None, dtype: np.dtype | None
) -> Callable[[Row, tuple[int, ...]], Any]:
    """What gives the array of a row at one place, merged, in `dtype`."""
    leaves, adapters, codes = (dict(flatten(tree or {})) for tree in (params, lora, packed))

    def piece(row: Row, place: tuple[int, ...]) -> Any:
        module = row.ours.removesuffix(".kernel")
        packed_here = is_packed(row, config)
        array = _numbers(codes, row, place[0], config) if packed_here else fetched(leaves[row.ours], place)
        if f"{module}.a" in adapters:
            a, b = (adapters[f"{module}.{part}"][place] for part in "ab")
            array = array + config.lora_scale * jnp.tensordot(a, b, axes=1, precision="highest")
        return array if dtype is None or array.dtype == dtype else array.astype(dtype)

    return piece


def _numbers(codes: Mapping[str, jax.Array], row: Row, layer: int, config: ModelConfig) -> jax.Array:
    """One layer's kernel, in our layout, of the 4-bit arrays in `codes`."""
    assert config.packed is not None
    sizes, module = axis_sizes(config), row.ours.removesuffix("kernel")
    parts = {name.removeprefix(module): array[layer] for name, array in codes.items() if name.startswith(module)}
    outputs, inputs = row.groups
    shape = tuple(sizes[letter] for letter in (*outputs, *inputs))
    kernel = dequantize(parts, config.packed, shape, (None,) * len(shape))
    return kernel.transpose(*range(len(outputs), kernel.ndim), *range(len(outputs)))


def export_hf(
    params: Tree,
    config: ModelConfig,
    out_dir: str | Path,
    *,
    source_folder: str | Path | Pretrained,
    lora: Tree | None = None,
    packed: Tree | None = None,
    dtype: str | None = None,
    max_shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> None:
    """Write `params` as a Hugging Face folder: weights, config, tokenizer, chat template, generation settings.

    Adapters `lora` are merged, and the 4-bit kernels `packed` become numbers: the result is a plain model.

    Everything but the weights comes from `source_folder`, the model that training began from (a folder, or opened); so
    does the dtype of each tensor, unless `dtype` names one for all. A tree with a `score` head is written as
    ForTokenClassification where the head has a bias (as verl keeps a critic), else as ForSequenceClassification; where
    transformers has no such class, config.json names none and the log says so.
    `out_dir` appears when it is complete; what is already there is refused, or with `overwrite` kept until then.
    """
    source = source_folder if isinstance(source_folder, Pretrained) else open_pretrained(source_folder)
    out_dir = Path(out_dir)
    if not overwrite:
        refuse_existing(out_dir)
    specs = _specs(config, head_of(params, config), source, dtype)
    dtypes = {spec.name: spec.dtype for spec in specs}
    tensors = hf_tensors(params, config, lora=lora, packed=packed)
    stream = ((name, cast(tensor, dtypes[name], f"the trained tensor {name}")) for name, tensor in tensors)
    if jax.process_index() == 0:
        hf_config = config_for_head(source.hf_config, config, head_of(params, config))
        write_model(
            out_dir, hf_config, specs, stream, source=f"trained from {source.name}",
            companions=source.write_companions, max_shard_bytes=max_shard_bytes, overwrite=overwrite,
        )  # fmt: skip
    else:
        for _ in stream:  # takes part in the gathering
            pass
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"exported {out_dir}")


def _specs(config: ModelConfig, head: str, source: Pretrained, dtype: str | None) -> list[TensorSpec]:
    """Name, shape and dtype of what will be written."""
    shapes = {tensor.name: tensor.shape for tensor in in_order(config, head)}
    if dtype is None:
        dtypes = stored_dtypes(source.checkpoint, config, shapes)
        return [TensorSpec(name, shape, dtypes[name]) for name, shape in shapes.items()]
    return [TensorSpec(name, shape, dtype_named(dtype)) for name, shape in shapes.items()]


def stored_dtypes(checkpoint: Checkpoint, config: ModelConfig, names: Iterable[str]) -> dict[str, np.dtype]:
    """The dtype of each tensor in the model that training began from; one that it lacks has its embedding's.

    Raises ValueError where that model has another vocabulary or width.
    """
    table, sizes = embedding_of(config), axis_sizes(config)
    stored = with_expected_names(dequantized(checkpoint), {table}).tensors
    shape = sizes["v"], sizes["w"]
    if stored.get(table) is None or stored[table].shape != shape:
        raise ValueError(f"{checkpoint.folder} is not the model that is exported: its {table} is not {shape}")
    return {name: stored.get(name, stored[table]).dtype for name in names}


def config_for_head(hf_config: Mapping[str, Any], config: ModelConfig, head: str) -> dict[str, Any]:
    """The source's `config.json` with the class that reads this head, and for a score head its labels."""
    if config.module is not None:  # whose class is the user's
        return dict(hf_config)
    if head == "lm":
        return {**hf_config, "architectures": [class_of(config.family, "ForCausalLM")]}
    kind = "ForTokenClassification" if config.score_bias else "ForSequenceClassification"
    name = class_of(config.family, kind)
    if name is None:
        _log.warning(
            "transformers has no class %s of family %s: config.json names none, and jaxrl alone reads this head",
            kind, config.family,
        )  # fmt: skip
    out = {**hf_config, "architectures": [] if name is None else [name]}
    out.pop("num_labels", None)  # transformers counts id2label
    if len(out.get("id2label") or ()) != config.num_labels:
        out["id2label"] = {str(label): f"LABEL_{label}" for label in range(config.num_labels)}
        out["label2id"] = {name: int(label) for label, name in out["id2label"].items()}
    return out
