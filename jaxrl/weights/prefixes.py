"""The same model under other prefixes: old files that lack one, and wrappers that put one more before every name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Set

from .heads import HEADS, OUTPUTS
from .stored import Checkpoint

_OUTSIDE = (*OUTPUTS, *HEADS)  # beside the base model and not in it
_VISION = tuple(
    f"{prefix}{module}." for prefix in ("", "model.") for module in ("vision_tower", "multi_modal_projector")
)
_log = logging.getLogger(__name__)


def language_model_of(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without what a model that sees has beside its language model; any other as it is."""
    kept = {name: checkpoint.stored(name) for name in checkpoint.tensors if not name.startswith(_VISION)}
    num_left_out = len(checkpoint.tensors) - len(kept)
    if not num_left_out:
        return checkpoint
    _log.info(
        "%s: %d tensors of vision are left out, the language model alone is read", checkpoint.folder, num_left_out
    )
    return checkpoint.with_tensors(kept)


def with_expected_names(checkpoint: Checkpoint, expected: Set[str]) -> Checkpoint:
    """The checkpoint with the prefixes that the model expects, if that gives it every tensor; else as it is.

    GPT-2's and OPT's first files are those of the base model alone ("h.0.ln_1.weight"); models with a vision tower keep
    their language model under "language_model.model." or, since transformers 5, "model.language_model.".
    """
    if not expected or expected <= checkpoint.tensors.keys():
        return checkpoint
    base = next(iter(sorted(name.split(".")[0] for name in expected if not name.startswith(_OUTSIDE))))
    renamings: list[Callable[[str], str]] = [
        lambda name: name.removeprefix("language_model."),
        lambda name: name.replace("model.language_model.", "model.", 1),
        lambda name: name if name.startswith(_OUTSIDE) else f"{base}.{name}",
    ]
    for rename in renamings:
        names = {name: rename(name) for name in checkpoint.tensors}
        if expected <= set(names.values()) and len(set(names.values())) == len(names):
            return checkpoint.renamed(names)
    return checkpoint
