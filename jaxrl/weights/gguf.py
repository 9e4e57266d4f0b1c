"""GGUF files: converted once to a Hugging Face folder, which is what everything else reads.

Reads with the `gguf` package and builds config and tokenizer from the file's own metadata, without torch and without
transformers. The quickstart model is such a file (`quickstart.py`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..models.config import ModelConfig
from .folder import write_json
from .gguf_tokenizer import needed_keys, write_tokenizer
from .hf_names import axis_sizes, class_of, rows
from .safetensors_writer import TensorSpec, dtype_named
from .stored import Checkpoint, Index, StoredTensor, cast
from .write import write_model

_CACHE_VERSION = 1  # counts changes of what a conversion writes: folders of another version are not used

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # GGUF and Hugging Face have the same names for them

# GGUF module -> Hugging Face module; `.weight` and `.bias` are the same on both sides.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}

_LLAMA3_CONTEXT = 8192  # of Llama 3, before it was stretched
_ROPE_FACTORS = "rope_freqs.weight"  # what each rotary frequency is divided by

# Metadata without which there is no model, under the name of the architecture.
_NEEDED = (
    *("block_count", "embedding_length", "feed_forward_length", "context_length", "attention.head_count"),
    "attention.layer_norm_rms_epsilon",
)


def cache_root() -> Path:
    """Where converted models are kept: $JAXRL_CACHE, else $XDG_CACHE_HOME/jaxrl, else ~/.cache/jaxrl."""
    if os.environ.get("JAXRL_CACHE"):
        return Path(os.environ["JAXRL_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxrl"


def cached_hf_folder(path: str | Path) -> Path:
    """The Hugging Face folder of a GGUF file, converted on the first call and found by the file's content later."""
    path = Path(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    root = cache_root() / "gguf"
    folder = root / f"{path.stem}-{digest[:16]}-v{_CACHE_VERSION}"
    if folder.exists():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the system when its process dies
        if not folder.exists():
            for interrupted in root.glob(f".{folder.name}.*.partial"):
                shutil.rmtree(interrupted)
            convert_gguf(path, folder)
    return folder


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file under Hugging Face's names, its weights dequantised to float32 as they are read."""

    path: Path
    hf_config: dict[str, Any]
    metadata: Mapping[str, Any]
    checkpoint: Checkpoint

    def write_companions(self, folder: Path) -> None:
        """Tokenizer, chat template and generation settings."""
        token_ids = {key: self.hf_config[key] for key in _TOKEN_IDS if key in self.hf_config}
        write_json(folder / "generation_config.json", token_ids)
        write_tokenizer(self.metadata, folder, self.path)


def open_gguf(path: str | Path) -> GgufModel:
    """Open a GGUF file, build its config and check that its tensors are those of that model."""
    from gguf import GGUFReader

    path = Path(path)
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be read as GGUF ({error}): it is damaged or cut short, fetch it again"
        ) from error
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    quantised = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(size) for size in tensor.shape[::-1]) for name, tensor in quantised.items()}
    rope_factors = quantised.pop(_ROPE_FACTORS, None)
    shapes.pop(_ROPE_FACTORS, None)
    config = hf_config(metadata, shapes, path, None if rope_factors is None else np.asarray(rope_factors.data))
    _check_shapes(config, shapes, path)
    tensors = {}
    for name, shape in shapes.items():
        read = partial(_dequantized_slice, quantised[name], shape, config)
        tensors[_hf_name(name) or name] = StoredTensor(shape, np.dtype(np.float32), path.name, read)
    return GgufModel(path, config, metadata, Checkpoint(path.parent, tensors, kind="gguf"))


def convert_gguf(path: str | Path, out_dir: str | Path, *, dtype: str = "float32") -> None:
    """Write a GGUF file as a complete Hugging Face folder.

    `dtype` is float32 by default: a 4-bit weight is scale x code + offset with 11-bit scale and offset, which float32
    holds exactly and bfloat16 does not.
    """
    model = open_gguf(path)
    tensors = model.checkpoint.tensors
    specs = [TensorSpec(name, tensor.shape, dtype_named(dtype)) for name, tensor in tensors.items()]
    stream = (
        (spec.name, cast(model.checkpoint.read(spec.name), spec.dtype, f"{path}: tensor {spec.name}")) for spec in specs
    )
    write_model(
        Path(out_dir), model.hf_config, specs, stream, source=Path(path).name, companions=model.write_companions
    )


def hf_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    path: Path,
    rope_factors: np.ndarray | None = None,
) -> dict[str, Any]:
    """What `config.json` says about the model that a GGUF file's metadata describes.

    `rope_factors` is what the file divides each rotary frequency by, where it does.
    """
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"{path} holds a model of architecture {arch!r}; jaxrl reads {', '.join(ARCHITECTURES)} from GGUF"
        )
    absent = [key for key in _NEEDED if f"{arch}.{key}" not in metadata]
    absent += [key for key in needed_keys(metadata) if key not in metadata]
    absent += [name for name in ("token_embd.weight",) if name not in shapes]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}: it is not a complete model")
    if metadata.get(f"{arch}.rope.scaling.type", "none") not in ("none", "linear"):
        raise ValueError(
            f"{path} rescales its rotary frequencies by {metadata[f'{arch}.rope.scaling.type']!r}, which is not read from "
            "GGUF: use the model's safetensors folder"
        )

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{arch}.{key}", default)

    heads, hidden = get("attention.head_count"), get("embedding_length")
    config = {
        "architectures": [class_of(arch, "ForCausalLM")],
        "model_type": arch,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", get("rope.dimension_count", hidden // heads)),
        "max_position_embeddings": get("context_length"),
        "hidden_act": "silu",
        "rms_norm_eps": _decimal(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(get("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": "output.weight" not in shapes,
        "use_cache": True,
    }
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    if get("rope.scaling.type") == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": get("rope.scaling.factor")}
    if rope_factors is not None and (rope_factors != 1).any():
        config["rope_scaling"] = _llama3_scaling(rope_factors, config, path)
    for name in ("bos", "eos", "padding"):
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None:
            config[f"{name.replace('padding', 'pad')}_token_id"] = token_id
    return config


def _llama3_scaling(factors: np.ndarray, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The settings of Llama 3.1 to 3.3 whose factors these are. Raises ValueError where it is no such model."""
    settings = {"factor": round(float(factors.max()), 3), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    settings["original_max_position_embeddings"] = _LLAMA3_CONTEXT
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(0, config["head_dim"], 2) / config["head_dim"])
    smooth = np.clip((_LLAMA3_CONTEXT / wavelengths - 1.0) / (4.0 - 1.0), 0, 1)
    expected = 1 / ((1 - smooth) / settings["factor"] + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-5):
        raise ValueError(
            f"{path}: {_ROPE_FACTORS} does not hold the factors of Llama 3.1 to 3.3, and what else they may be config.json "
            "cannot say: use the model's safetensors folder"
        )
    return {"rope_type": "llama3", **settings}


def _decimal(value: float) -> float:
    """The decimal number that was meant by a float32: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _hf_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor, None where there is none."""
    module, _, kind = name.rpartition(".")
    layer = re.match(r"blk\.(\d+)\.", module)
    pattern = NAMES.get(re.sub(r"^blk\.\d+\.", "blk.{}.", module))
    return f"{pattern.format(layer and layer[1])}.{kind}" if pattern else None


def _check_shapes(config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """The tensors are what the config asks for."""
    model = ModelConfig.from_hf(config)
    sizes = axis_sizes(model)
    wanted = {name: row.hf_shape(sizes) for row in rows(model) for name in row.hf_names(sizes)}
    found = {_hf_name(name) or name: shape for name, shape in shapes.items()}
    for name, shape in found.items():
        if wanted.get(name) != shape:
            raise ValueError(f"{path}: tensor {name} has shape {shape}, expected {wanted.get(name, 'none')}")
    missing = wanted.keys() - found.keys()
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} tensors that its metadata asks for, {min(missing)} among them")


def _dequantized_slice(tensor: Any, shape: tuple[int, ...], config: Mapping[str, Any], index: Index) -> np.ndarray:
    """A part of a tensor as numbers, queries and keys in the order of rows that Hugging Face has."""
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    module = tensor.name.split(".")[-2]
    if config["model_type"] == "llama" and module in heads:
        weights = _undo_rope_order(weights, heads[module])
    return weights[index]


def _undo_rope_order(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a head, (0, 1), (2, 3); Hugging Face the first half with the second."""
    pairs = weights.reshape(heads, -1, 2, *weights.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weights.shape)
