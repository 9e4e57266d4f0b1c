"""jaxrl: reinforcement learning of language models on JAX.

`import jaxrl` loads nothing else: what stands here is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import Config, from_dict, load
    from .trainer import Trainer
    from .weights.live import LoadedModel, from_hf, to_hf

# Name -> the module that has it.
_EXPORTS = {
    "Config": "config",
    "LoadedModel": "weights.live",
    "Trainer": "trainer",
    "from_dict": "config",
    "from_hf": "weights.live",
    "load": "config",
    "to_hf": "weights.live",
}

__all__ = ["Config", "LoadedModel", "Trainer", "from_dict", "from_hf", "load", "to_hf"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'jaxrl' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxrl.{_EXPORTS[name]}"), name)
