"""A checkpoint made to fit a model: its names as the model expects them, everything there, and nothing else.

What stands under another name (a head, a prefix) is renamed, what is packed is unpacked, what is stored twice or is
only a table of constants is left out. The rest must be exactly the tensors of the model, or the difference is named.
"""

from __future__ import annotations

import json
from collections.abc import Collection

import numpy as np

from ..models.config import ModelConfig
from .bnb import dequantized, packed_tensors
from .heads import OUTPUTS, find_head, unknown_head, with_head_as, without_the_other_head
from .hf_names import IGNORED, HfTensor, embedding_of, in_order, score_module
from .prefixes import with_expected_names
from .stored import Checkpoint

_ROWS_AT_ONCE = 4096  # of the two tables, when they are compared


def fitted(
    checkpoint: Checkpoint,
    config: ModelConfig,
    head: str,
    *,
    allow_missing: Collection[str] = (),
    head_path: str | None = None,
    dequantize: bool = False,
) -> Checkpoint:
    """The tensors of the model, in the order of a forward pass, under the names of `hf_names.py`.

    `allow_missing` are paths of ours ("score.kernel") that may be absent, `head_path` is the module of a score head in
    the checkpoint, `dequantize` asks for 4-bit weights as numbers. Raises ValueError, naming the tensor, what
    is expected and what is there, where checkpoint and model differ.
    """
    packed = packed_tensors(checkpoint)
    if packed and not dequantize:
        raise ValueError(
            f"{checkpoint.folder} holds {len(packed)} matrices in 4 bits of bitsandbytes: "
            "ask for dequantize=True to load them as numbers"
        )
    checkpoint = dequantized(checkpoint) if packed else checkpoint
    if config.num_layers > len(checkpoint.tensors):
        raise ValueError(
            f"{checkpoint.folder}: config.json says {config.num_layers} layers, and there are "
            f"{len(checkpoint.tensors)} tensors in all"
        )
    expected = {tensor.name: tensor for tensor in in_order(config, head)}
    if head == "score" and config.module is None:
        found = find_head(checkpoint, json.loads(config.hf_json or "{}"), path=head_path)
        checkpoint = with_head_as(checkpoint, found, score_module(config)) if found else checkpoint
    needed = {
        name for name, tensor in expected.items() if any(row.ours not in allow_missing for row, _ in tensor.parts)
    }
    checkpoint = with_expected_names(checkpoint, needed)
    _check_coverage(checkpoint, config, expected, head, needed)
    return checkpoint.with_tensors({name: checkpoint.stored(name) for name in expected if name in checkpoint.tensors})


def _check_coverage(
    checkpoint: Checkpoint, config: ModelConfig, expected: dict[str, HfTensor], head: str, needed: Collection[str]
) -> None:
    """Every tensor of the model is in the checkpoint, with the right shape, and nothing else is."""
    stored = checkpoint.tensors
    model = f"(family {config.family}, {config.num_layers} layers, head {head!r})"
    missing = [name for name in expected if name in needed and name not in stored]
    if missing:
        raise ValueError(f"{checkpoint.folder} lacks {_named('tensor', missing)} that this model needs {model}")
    extra = [name for name in stored if name not in expected and not IGNORED.search(name)]
    extra = without_the_other_head(checkpoint, extra, head)
    for output in [name for name in extra if name.removesuffix(".weight") in OUTPUTS]:
        extra.remove(output)  # a tied model may only repeat its embedding there
        if not _equal(checkpoint, output, embedding_of(config)):
            raise ValueError(
                f"{checkpoint.folder}: tensor {output} differs from {embedding_of(config)}, and config.json says that "
                "they are tied: set tie_word_embeddings to false there"
            )
    if extra:
        hint = unknown_head(checkpoint, extra)
        raise ValueError(
            f"{checkpoint.folder} holds {_named('tensor', extra)} that this model has no place for {model}"
            + (f"; {hint}" if hint else "")
        )
    for name, tensor in expected.items():
        if name in stored and stored[name].shape != tensor.shape:
            raise ValueError(
                f"{checkpoint.folder}: tensor {name} has shape {stored[name].shape}, expected {tensor.shape}"
            )


def _named(noun: str, names: list[str]) -> str:
    """ "tensor a", "tensors a, b", "tensors a, b, c and 40 more"."""
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{noun}{'s' if len(names) > 1 else ''} {shown}{more}"


def _equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    a, b = checkpoint.tensors[first], checkpoint.tensors[second]
    if a.shape != b.shape:
        return False
    cuts = [(slice(start, start + _ROWS_AT_ONCE), slice(None)) for start in range(0, a.shape[0], _ROWS_AT_ONCE)]
    return all(np.array_equal(checkpoint.read(first, cut), checkpoint.read(second, cut)) for cut in cuts)
