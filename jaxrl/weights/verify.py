"""Is what was written what was read? Every tensor, and where torch is installed the logits, against transformers."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..models.config import ModelConfig
from ..models.decoder import abstract_params, hidden_states, logits, score
from .fit import fitted
from .folder import load_hf_config
from .formats import open_checkpoint
from .heads import find_head
from .hf_names import score_module
from .load import load_params
from .peft import Adapter, open_adapter
from .safetensors_writer import TensorSpec
from .source import Source
from .write import MANIFEST, sha256

_log = logging.getLogger(__name__)

# Of the largest logit, in float32: the two sum in another order, while a wrong tensor moves logits by their own size.
_TOLERANCE = 1e-3
_TOKENS = (2, 12)


def verify_tensors(folder: Path, model: Source, specs: Sequence[TensorSpec]) -> None:
    """Raises ValueError where a tensor of the written folder is not that of the source, cast to the written dtype."""
    written = fitted(open_checkpoint(folder), model.config, model.head)
    hashes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["tensors"]
    for spec in specs:
        stored, expected = written.read(spec.name), model.checkpoint.read(spec.name).astype(spec.dtype, copy=False)
        digest = sha256([stored])
        if stored.dtype != spec.dtype or digest != sha256([expected]):
            raise ValueError(
                f"{spec.name} was written and does not come back as it was: the disk or the file is damaged"
            )
        if hashes.get(spec.name, {}).get("sha256", digest) != digest:
            raise ValueError(
                f"{spec.name} does not have the hash that {MANIFEST} says: the disk or the file is damaged"
            )


def verify_adapter(folder: Path, adapter: Adapter) -> None:
    """Raises ValueError where the written adapter is not the one that was read, cast to the written dtype."""
    written = open_adapter(folder)
    for name in adapter.checkpoint.tensors:
        stored = written.checkpoint.read(name)
        if not np.array_equal(stored, adapter.checkpoint.read(name).astype(stored.dtype)):
            raise ValueError(f"{name} was written and does not come back as it was: the disk or the file is damaged")
    if written.modules != adapter.modules:
        raise ValueError("the written adapter does not adapt what was read: the disk or the file is damaged")


def verify_logits(folder: Path) -> float | None:
    """The largest difference of logits between jaxrl and transformers, both float32; None where torch is missing.

    Raises ValueError where it is more than rounding.
    """
    if importlib.util.find_spec("torch") is None:
        _log.warning("torch is not installed: the logits are not compared with transformers")
        return None
    hf_config = load_hf_config(folder)
    if not hf_config.get("architectures"):
        _log.warning("transformers has no class for this model: the logits are not compared with it")
        return None
    found = find_head(open_checkpoint(folder), hf_config)
    # transformers chooses the frequencies of some ropes by the longest position
    config = ModelConfig.from_hf(hf_config, max_length=_TOKENS[1], **(found.settings if found else {}))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, _TOKENS).astype(np.int32)
    ours = _our_outputs(folder, config, "score" if found else "lm", tokens)
    theirs = _their_outputs(folder, tokens, head=score_module(config) if found else None)
    difference, size = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    if not difference <= _TOLERANCE * size:
        raise ValueError(
            f"the logits of jaxrl and of transformers differ by {difference:.3g} where the largest is {size:.3g}: "
            "the model was not converted rightly"
        )
    _log.info("logits of jaxrl and of transformers differ by %.2g, the largest is %.3g", difference, size)
    return difference


def _our_outputs(folder: Path, config: ModelConfig, head: str, tokens: np.ndarray) -> np.ndarray:
    params = load_params(folder, config, abstract_params(config, head)[0]["params"])
    ids = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    with jax.default_matmul_precision("highest"):
        hidden: Any = hidden_states(config, {"params": params}, ids, positions, jnp.ones_like(ids), 0 * ids, head=head)
        return np.asarray(score(config, params, hidden) if head == "score" else logits(config, params, hidden))


def _their_outputs(folder: Path, tokens: np.ndarray, *, head: str | None) -> np.ndarray:
    import torch
    import transformers

    architecture = load_hf_config(folder)["architectures"][0]
    model: Any = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        if head is not None:  # at every token, where a sequence classifier itself gives the last one
            return getattr(model.eval(), head)(model.base_model(ids).last_hidden_state).numpy()
        return model.eval()(ids).logits.numpy()
