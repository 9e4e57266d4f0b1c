"""Models in memory and models by name, one function each way: `jaxrl.from_hf` and `jaxrl.to_hf`.

A live `PreTrainedModel` or `PeftModel` of torch is a checkpoint like any other: tensors under their names on disk, read
by slice. torch, transformers' models and peft are imported only by whoever hands one over or asks for one back.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes
import numpy as np

from ..models.config import ModelConfig
from ..models.decoder import abstract_params
from ..parallel import make_mesh, with_shardings
from .bnb import dequantized, dequantized_config
from .export import config_for_head, hf_tensors
from .fit import fitted
from .folder import text_config, write_json
from .heads import which_head
from .hf_names import axis_sizes, flatten, head_of, in_order, is_packed, rows, unflatten
from .load import load_params
from .packed import load_packed, packed_kernels
from .peft import Adapter, adapter_from, with_head_of
from .peft_config import AdapterConfig
from .peft_tree import load_lora, lora_settings
from .prefixes import language_model_of
from .pretrained import Pretrained, open_pretrained
from .safetensors_writer import TensorSpec, dtype_named
from .stored import Checkpoint, Index, StoredTensor, cast
from .write import write_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tree = dict[str, Any]


@dataclass(frozen=True)
class LoadedModel:
    """A model in JAX: weights by collection, and the config that every function of `jaxrl.models` takes."""

    params: Tree
    config: ModelConfig
    lora: Tree | None = None  # adapters that are not merged
    packed: Tree | None = None  # kernels in 4 bits

    @property
    def variables(self) -> Tree:
        """What `jaxrl.models.decoder.hidden_states` takes."""
        collections = {"params": self.params, "lora": self.lora, "packed": self.packed}
        return {name: tree for name, tree in collections.items() if tree is not None}


def from_hf(
    source: Any,
    *,
    adapter: str | Path | None = None,
    head: str | None = None,
    head_path: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
) -> LoadedModel:
    """Load a model: a local path or Hub id of any kind that is read here (torch is not needed), or a live torch model.

    An adapter (a PEFT folder, a `PeftModel`, or `adapter` on top of `source`) comes back as `lora`, 4-bit kernels of
    bitsandbytes as `packed`. `head`, lm or score, says which is meant where the model has both; `head_path` is the module
    of a score head that is under none of the usual names. `dtype` is one for all numbers, by default each array has that
    of its tensor. `mesh` splits the arrays; without it they lie on one device.
    """
    opened = open_model(source, adapter)
    if opened.adapter is not None:
        checkpoint, rest = with_head_of(opened.checkpoint, opened.adapter)
        opened, head = replace(opened, checkpoint=checkpoint, adapter=rest), head or rest.config.head
    head, settings = which_head(opened.checkpoint, opened.hf_config, head=head, path=head_path)
    config = ModelConfig.from_hf(opened.hf_config, **settings)
    if opened.adapter is not None:
        config = replace(config, **lora_settings(opened.adapter, config))
    if head == "lm":
        config = replace(config, packed=packed_kernels(opened.checkpoint, config))
    shapes, axes = abstract_params(config, head)
    dtypes = _dtypes(opened.checkpoint, config, head, head_path, dtype)
    shapes["params"] = unflatten({
        ours: jax.ShapeDtypeStruct(struct.shape, dtypes[ours]) for ours, struct in flatten(shapes["params"])
    })  # fmt: skip
    mesh = make_mesh(1, 1, 1) if mesh is None else mesh
    wanted = {name: with_shardings(mesh, shapes[name], axes[name]) for name in shapes}
    return LoadedModel(
        params=load_params(opened.checkpoint, config, wanted["params"], dequantize=True, head_path=head_path),
        config=config,
        lora=None if opened.adapter is None else load_lora(opened.adapter, config, wanted["lora"]),
        packed=None if config.packed is None else load_packed(opened.checkpoint, config, wanted["packed"]),
    )


def to_hf(
    params: Tree,
    config: ModelConfig,
    out_dir: str | Path | None = None,
    *,
    lora: Tree | None = None,
    packed: Tree | None = None,
    dtype: str | None = None,
) -> Any:
    """A torch model of transformers with these weights; with `out_dir`, a Hugging Face folder instead, without torch.

    `config` is the one that `from_hf` gave. Adapters are merged and 4-bit kernels become numbers. Every tensor keeps
    the dtype of its array unless `dtype` names one for all.
    """
    if not config.hf_json:
        raise ValueError("this config does not know the config.json it was made from: take the one that from_hf gave")
    head, leaves, specs = head_of(params, config), dict(flatten(params)), []
    for tensor in in_order(config, head):
        row = tensor.parts[0][0]
        kept = config.packed.dtype if config.packed and is_packed(row, config) else leaves[row.ours].dtype
        specs.append(TensorSpec(tensor.name, tensor.shape, np.dtype(kept) if dtype is None else dtype_named(dtype)))
    hf_config = config_for_head(json.loads(config.hf_json), config, head)
    tensors = (
        (spec.name, np.ascontiguousarray(cast(tensor, spec.dtype, f"tensor {spec.name}")))
        for spec, (_, tensor) in zip(specs, hf_tensors(params, config, lora=lora, packed=packed), strict=True)
    )
    if out_dir is None and not hf_config["architectures"]:
        raise ValueError(
            f"transformers has no class for a {config.family} with this head: name out_dir, to have a folder that jaxrl reads"
        )
    if out_dir is None:
        return _torch_model(hf_config, tensors, specs[0].dtype.name)
    write_model(Path(out_dir), hf_config, specs, tensors, source="jaxrl.to_hf", companions=lambda folder: None)
    return None


def open_model(source: Any, adapter: str | Path | None = None) -> Pretrained:
    """A model to load or to train from: a path, a Hub id, or a live torch model."""
    if isinstance(source, str | Path):
        return open_pretrained(source, adapter)
    torch = sys.modules.get("torch")  # whoever holds a torch model has imported it
    if torch is None or not isinstance(source, torch.nn.Module):
        raise ValueError(f"a model is a path, a Hub id or a torch model, not a {type(source).__name__}")
    if adapter is not None:
        raise ValueError(f"the adapter {adapter} cannot go on a live model: load it there with PEFT")
    return _open_torch(source)


def with_tokenizer(source: Pretrained, tokenizer: PreTrainedTokenizerBase) -> Pretrained:
    """The model with another tokenizer beside its weights when it is written."""

    def write(folder: Path) -> None:
        source.write_companions(folder)
        tokenizer.save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":  # a name that transformers 4 does not know
            write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})

    return replace(source, write_companions=write)


def _dtypes(
    checkpoint: Checkpoint, config: ModelConfig, head: str, head_path: str | None, dtype: str | None
) -> dict[str, np.dtype]:
    """The dtype of each array of "params"."""
    if dtype is not None:
        return {row.ours: dtype_named(dtype) for row in rows(config, head=head)}
    tensors = fitted(dequantized(checkpoint), config, head, head_path=head_path).tensors
    return {row.ours: tensors[row.hf_names(axis_sizes(config))[0]].dtype for row in rows(config, head=head)}


def _open_torch(model: Any) -> Pretrained:
    from transformers import PreTrainedModel

    peft = sys.modules.get("peft")
    adapted = model if peft is not None and isinstance(model, peft.PeftModel) else None
    base = model.get_base_model() if adapted is not None else model
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"{type(base).__name__} is not a model of transformers, whose config says what it is: save its weights under "
            "the names of a known family, with a config.json"
        )
    name = f"the live {type(base).__name__}"
    generation = base.generation_config if base.can_generate() else None

    def write_companions(folder: Path) -> None:
        if generation is not None:
            generation.save_pretrained(folder)

    return Pretrained(
        name=name,
        checkpoint=language_model_of(_as_checkpoint(_state_dict(base), name)),
        hf_config=dequantized_config(text_config(json.loads(base.config.to_json_string(use_diff=False)))),
        generation_config={} if generation is None else generation.to_dict(),
        write_companions=write_companions,
        tokenizer=None,
        adapter=None if adapted is None else _adapter(adapted, name),
        base=base.config.name_or_path or name,
    )


def _state_dict(base: Any) -> Mapping[str, Any]:
    """The base model's tensors under their names on disk: without adapters, and without what transformers 5 fuses."""
    tensors = {}
    for name, tensor in base.state_dict().items():
        if ".lora_" not in name and ".modules_to_save." not in name:
            tensors[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = tensor
    if importlib.util.find_spec("transformers.core_model_loading") is None:  # transformers 4
        return tensors
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(base, tensors))


def _adapter(model: Any, name: str) -> Adapter:
    from peft import get_peft_model_state_dict  # pyright: ignore[reportAttributeAccessIssue]

    active = model.active_adapter
    raw = json.loads(json.dumps(model.peft_config[active].to_dict(), default=sorted))  # sets of names become lists
    tensors = get_peft_model_state_dict(model, adapter_name=active, save_embedding_layers=False)
    return adapter_from(AdapterConfig.from_json(raw, name), _as_checkpoint(tensors, name), name)


def _as_checkpoint(tensors: Mapping[str, Any], name: str) -> Checkpoint:
    stored = {key: _stored(tensor) for key, tensor in tensors.items()}
    return Checkpoint(Path(name), stored, kind="live")


def _stored(tensor: Any) -> StoredTensor:
    import torch

    dtypes = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16)}  # numpy does not know it by itself

    def read(index: Index) -> np.ndarray:
        part = tensor.detach()[index].cpu() if tensor.ndim else tensor.detach().cpu()
        if tensor.dtype not in dtypes:
            return part.numpy()
        as_bits, dtype = dtypes[tensor.dtype]
        return part.contiguous().view(as_bits).numpy().view(dtype)

    is_known = tensor.dtype in dtypes
    dtype = np.dtype(dtypes[tensor.dtype][1]) if is_known else torch.empty(0, dtype=tensor.dtype).numpy().dtype
    return StoredTensor(tuple(tensor.shape), dtype, "memory", read)


def _torch_model(hf_config: Mapping[str, Any], tensors: Any, dtype: str) -> Any:
    import torch
    import transformers

    state_dict = {}
    for name, tensor in tensors:
        if tensor.dtype == ml_dtypes.bfloat16:
            state_dict[name] = torch.from_numpy(tensor.view(np.int16).copy()).view(torch.bfloat16)
        else:
            state_dict[name] = torch.from_numpy(tensor.copy())
    settings = {key: value for key, value in hf_config.items() if key not in ("model_type", "torch_dtype")}
    config = transformers.AutoConfig.for_model(hf_config["model_type"], **settings | {"dtype": dtype})
    model_class: Any = getattr(transformers, hf_config["architectures"][0])
    model = model_class.from_pretrained(None, config=config, state_dict=state_dict, dtype=getattr(torch, dtype))
    return model.eval()


__all__ = ["LoadedModel", "from_hf", "open_model", "to_hf", "with_tokenizer"]
