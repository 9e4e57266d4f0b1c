"""A Hugging Face folder on disk: its `config.json`, its companion files, and how a new one comes into being whole."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import shutil
import socket
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..models.config import rope_kind
from ..models.families import FAMILIES, LANGUAGE_MODELS

_LIBC = ctypes.CDLL(None)
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD and a flag, of Linux

# What transformers 4 has outside of `rope_scaling`, and transformers 5 within its parameters.
_ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_emb_base", "rope_local_base_freq")
_OUTSIDE_LONGROPE = ("original_max_position_embeddings", "partial_rotary_factor")

# What a nested config leaves out where it is the default, and what stands beside it and is true of it.
_SIZES = (
    *(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ),
    *("head_dim", "max_position_embeddings"),
)
_OF_BOTH = (
    *("architectures", "tie_word_embeddings", "quantization_config", "dtype", "torch_dtype", "value_head_prefix"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "num_labels", "id2label", "label2id", "transformers_version"),
)

# What stands beside the weights and is carried over unchanged by an export.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "generation_config.json",
)


def load_hf_config(folder: str | Path) -> dict[str, Any]:
    """The `config.json` of a folder, as it stands there; of a model that sees too, that of its language model."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json: name a Hugging Face folder or a .gguf file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch the checkpoint again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__} where an object is expected")
    return text_config(config)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the language model in a model that sees too, complete by itself; any other config as it is."""
    family = LANGUAGE_MODELS.get(str(config.get("model_type")))
    if family is None:
        return dict(config)
    sizes = {key: FAMILIES[family].defaults[key] for key in _SIZES if key in FAMILIES[family].defaults}
    outside = {key: value for key, value in config.items() if key in _OF_BOTH}
    return {**sizes, **(config.get("text_config") or {}), **outside, "model_type": family}


def both_spellings(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """`config` as transformers 4 (rope_theta, rope_scaling, torch_dtype) and 5 (rope_parameters, dtype) read it."""
    config = {**config, "dtype": dtype, "torch_dtype": dtype}
    if config.get("model_type") == "qwen3_moe" and "num_local_experts" in config:
        config["num_experts"] = config["num_local_experts"]
    if config.keys().isdisjoint(_ROPE_KEYS):  # no rope (GPT-2, OPT, Bloom), or the defaults of its class
        return config
    parameters = config.get("rope_parameters") or _from_version_4(config)
    config["rope_parameters"] = parameters
    local = parameters.get("sliding_attention")
    if local is not None:  # a set for each kind of layer: transformers 4 scales those with full attention alone
        parameters = parameters["full_attention"]
        config["rope_local_base_freq"] = local["rope_theta"]
    kind = parameters.get("rope_type", "default")
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    if kind == "longrope":  # of which Phi-3 takes three fields; the others stand outside
        config |= {key: value for key, value in scaling.items() if key in _OUTSIDE_LONGROPE}
        scaling = {"type": kind} | {key: scaling[key] for key in ("short_factor", "long_factor")}
    config["rope_scaling"] = None if kind == "default" else scaling
    if "rope_theta" in parameters:
        config["rope_theta"] = parameters["rope_theta"]
    if "partial_rotary_factor" in parameters:
        config["partial_rotary_factor"] = parameters["partial_rotary_factor"]
    if config.get("model_type") == "gpt_neox":  # which has names of its own in transformers 4
        config["rotary_pct"] = parameters.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
        config["rotary_emb_base"] = parameters.get("rope_theta", config.get("rotary_emb_base", 10_000))
    return config


def _from_version_4(config: Mapping[str, Any]) -> dict[str, Any]:
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    parameters = {**scaling, "rope_type": rope_kind(kind, str(config.get("model_type")))}
    if config.get("rope_theta") is not None:
        parameters["rope_theta"] = config["rope_theta"]
    family = str(config.get("model_type"))
    if family not in FAMILIES or not FAMILIES[family].two_ropes:
        return parameters
    defaults = FAMILIES[family].defaults
    theta = parameters.setdefault("rope_theta", defaults["rope_theta"])
    local = config.get("rope_local_base_freq", defaults.get("rope_local_base_freq", theta))
    return {"full_attention": parameters, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, chat template and generation settings."""
    for name in COMPANIONS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def refuse_existing(folder: Path) -> None:
    """An error where something is in the way; an empty folder is not."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: name another folder (or from Python overwrite=True)")


@contextmanager
def new_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that takes its name, `folder`, when all of it is there; on an error nothing is left.

    With `overwrite`, what stood there before survives until the new folder is complete. What a process that was killed on
    this host has left of the same folder is removed.
    """
    folder = Path(folder)
    if not overwrite:
        refuse_existing(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        partial, lock = _locked_partial(folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made ({error}): name a folder that you may write") from error
    try:
        yield partial
        if overwrite and folder.exists():
            _exchange(partial, folder)  # what stood there goes where the new one came from, and from there away
        else:
            refuse_existing(folder)  # another process may have finished first
            partial.rename(folder)
    finally:
        os.close(lock)
        shutil.rmtree(partial, ignore_errors=True)


def _locked_partial(folder: Path) -> tuple[Path, int]:
    """A new folder beside `folder`, and a lock on it that the system frees when this process ends."""
    while True:
        partial = folder.parent / f".{folder.name}.{_host()}-{uuid.uuid4().hex[:8]}.partial"
        partial.mkdir()
        try:
            lock = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:  # another process has taken it for a leftover
            continue
        if _lock(lock) is not False and partial.is_dir():
            return partial, lock
        os.close(lock)


def _remove_leftovers(folder: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.{_host()}-[0-9a-f]{{8}}\.partial")
    for partial in folder.parent.iterdir():
        if not pattern.fullmatch(partial.name):
            continue
        try:
            lock = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:  # its process has just finished
            continue
        if _lock(lock):
            shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _lock(file: int) -> bool | None:
    """Whether the file could be locked; None where the disk has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _host() -> str:
    """This host in eight letters: on a shared disk a lock may be seen on the host alone that holds it."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _exchange(first: Path, second: Path) -> None:
    """Swap the names of two folders at one stroke: whoever is killed has swapped both or none."""
    names = _HERE, bytes(first), _HERE, bytes(second)
    if hasattr(_LIBC, "renameat2") and _LIBC.renameat2(*names, _RENAME_EXCHANGE) == 0:
        return
    # Without that system call (macOS, some network disks) there is a moment in which `second` is under another name.
    old = first.with_suffix(".old")
    second.rename(old)
    try:
        first.rename(second)
    except OSError:
        old.rename(second)
        raise
    old.rename(first)
