"""The head of a reward model or critic: found under the names that people give it, exported under transformers' name.

transformers' classification models call it `score` or `classifier`, TRL `v_head.summary`, OpenRLHF whatever
`value_head_prefix` of `config.json` says. A head under another name is reported with its shape, to be named by
`head.path`. A checkpoint may hold a language model, a score head or both: `which_head` says which is meant, and what
belongs to the other one is left out when it is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..models.config import ModelConfig
from .stored import Checkpoint

# Their names, in the order in which they are looked for.
HEADS = ("score", "value_head", "v_head.summary", "v_head", "reward_head", "regression_head", "classifier")
OUTPUTS = ("lm_head", "embed_out")  # of language models
_VALUE_HEADS = ("v_head.", "value_head.")  # which stand beside a language model that is whole without them
_CLASSES = ("ForSequenceClassification", "ForTokenClassification")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundHead:
    """A linear head on the hidden states, [num_labels, D], in a checkpoint: `path` is its module's name there."""

    path: str
    num_labels: int
    has_bias: bool

    @property
    def settings(self) -> dict[str, Any]:
        """What `ModelConfig` must hold for it."""
        return {"num_labels": self.num_labels, "score_bias": self.has_bias}


def which_head(
    checkpoint: Checkpoint, hf_config: Mapping[str, Any], *, head: str | None, path: str | None
) -> tuple[str, dict[str, Any]]:
    """Which head is meant, "lm" or "score", and what `ModelConfig` must hold for it.

    `head` and `path` are what was asked for, if anything. Raises ValueError where a checkpoint holds both and nothing
    says which, or has not the head that is asked for.
    """
    if head not in (None, "lm", "score"):
        raise ValueError(f"head {head!r} is not one of lm, score")
    if head == "lm":
        return "lm", {}
    found = find_head(checkpoint, hf_config, path=path)
    architectures = hf_config.get("architectures")
    is_classifier = str((architectures or [""])[0]).endswith(_CLASSES)
    if found is None:
        if head == "score" or is_classifier:
            raise ValueError(
                f"{checkpoint.folder} has no head under any of the usual names ({', '.join(HEADS)}): "
                "name it by head_path (--head-path)"
            )
        return "lm", {}
    if architectures == [] and found.path in ("score", "classifier"):  # of a family that has no such class
        is_classifier = True
    is_tied = ModelConfig.from_hf(hf_config).tie_embeddings
    has_output = is_tied or any(name.startswith(OUTPUTS) for name in checkpoint.tensors)
    if has_output and not is_classifier and head is None and path is None:
        raise ValueError(
            f"{checkpoint.folder} holds a language model and the head {found.path}: say which is meant by head (--head), "
            "lm or score"
        )
    return "score", found.settings


def find_head(checkpoint: Checkpoint, hf_config: Mapping[str, Any], *, path: str | None = None) -> FoundHead | None:
    """The score head of a checkpoint, or None where it is a language model without one.

    `path` is what `head.path` of the config says, the full name of a module; without it the usual names are tried,
    the one in `value_head_prefix` first. Raises ValueError where several are there, or one that is not linear.
    """
    modules = {name.rpartition(".")[0] for name in checkpoint.tensors}
    if path is not None:
        if f"{path}.weight" not in checkpoint.tensors:
            raise ValueError(f"head.path is {path!r}, and {checkpoint.folder} has no tensor {path}.weight")
        return _linear(checkpoint, path, hf_config)
    named = hf_config.get("value_head_prefix")
    candidates = dict.fromkeys(([named] if named else []) + list(HEADS))
    found = [name for name in candidates if any(module == name or module.startswith(f"{name}.") for module in modules)]
    found = [name for name in found if not any(other != name and other.startswith(f"{name}.") for other in found)]
    if len(found) > 1:
        raise ValueError(
            f"{checkpoint.folder} holds several heads, {' and '.join(found)}: name one of them by head.path"
        )
    return _linear(checkpoint, found[0], hf_config) if found else None


def with_head_as(checkpoint: Checkpoint, head: FoundHead, module: str) -> Checkpoint:
    """The checkpoint with its head under the name `module`."""
    return checkpoint.renamed({f"{head.path}.{part}": f"{module}.{part}" for part in ("weight", "bias")})


def without_the_other_head(checkpoint: Checkpoint, extra: list[str], head: str) -> list[str]:
    """Of the tensors that a model has no place for, those that are not of a head which it does without."""
    if head == "score":  # a critic drops the output of its language model
        return [name for name in extra if name.rpartition(".")[0] not in OUTPUTS]
    kept = [name for name in extra if not name.startswith(_VALUE_HEADS)]
    if len(kept) < len(extra):
        _log.warning("%s: the value head beside the language model is left out", checkpoint.folder)
    return kept


def unknown_head(checkpoint: Checkpoint, extra: list[str]) -> str | None:
    """What to say of a tensor that no model has a place for, if it looks like a head of one output."""
    for name in extra:
        shape = checkpoint.tensors[name].shape
        if len(shape) == 2 and shape[0] == 1 and name.endswith(".weight"):
            module = name.removesuffix(".weight")
            return f"{name} of shape {shape} looks like the head of a reward model or critic: set head.path to {module}"
    return None


def _linear(checkpoint: Checkpoint, path: str, hf_config: Mapping[str, Any]) -> FoundHead:
    own = {name: tensor.shape for name, tensor in checkpoint.tensors.items() if name.startswith(f"{path}.")}
    weight, bias = own.get(f"{path}.weight"), own.get(f"{path}.bias")
    hidden = hf_config.get("word_embed_proj_dim") or hf_config.get("hidden_size") or (weight[-1] if weight else None)
    is_linear = weight is not None and len(weight) == 2 and weight[1] == hidden and bias in (None, weight[:1])
    if weight is None or not is_linear or own.keys() - {f"{path}.weight", f"{path}.bias"}:
        parts = ", ".join(f"{name} {list(shape)}" for name, shape in own.items())
        raise ValueError(
            f"{checkpoint.folder} has a head {path} of {parts}, and a head here is one matrix on {hidden} hidden "
            "features: write it as a module of your own and name that in the config"
        )
    return FoundHead(path, weight[0], bias is not None)
