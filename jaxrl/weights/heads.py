"""The head of a reward model or critic: found under the names that people give it, exported under transformers' name.

transformers' classification models call it `score` or `classifier`, TRL `v_head.summary`, OpenRLHF whatever
`value_head_prefix` of `config.json` says. A head under another name is reported with its shape, to be named by
`head.path`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .stored import Checkpoint

# Their names, in the order in which they are looked for.
HEADS = ("score", "value_head", "v_head.summary", "v_head", "reward_head", "regression_head", "classifier")
OUTPUTS = ("lm_head", "embed_out")  # of language models
VALUE_HEADS = ("v_head.", "value_head.")  # which stand beside a language model that is whole without them


@dataclass(frozen=True)
class FoundHead:
    """A linear head on the hidden states, [num_labels, D], in a checkpoint: `path` is its module's name there."""

    path: str
    num_labels: int
    has_bias: bool


def find_head(checkpoint: Checkpoint, hf_config: Mapping[str, Any], *, path: str | None = None) -> FoundHead | None:
    """The score head of a checkpoint, or None where it is a language model without one: what `ModelConfig` must hold.

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
