"""The config of a run: `load` reads one YAML with overrides; `settings.py` is the reference of every name.

Reading a config starts no JAX.
"""

from .check import CHOICES, check, check_micro_batch, check_sources
from .describe import describe
from .load import from_dict, load, save, to_dict
from .resume import MAY_CHANGE, differences, flat
from .settings import (
    Actor,
    Algorithm,
    Config,
    CriticSection,
    Data,
    FilterGroups,
    Head,
    KLCtrl,
    MeshSection,
    Model,
    MultiTurn,
    Optim,
    PolicyLossSection,
    Ref,
    Reward,
    RewardFunction,
    RewardModelSection,
    RolloutCorrection,
    RolloutSection,
    TrainerSection,
    ValKwargs,
    VllmSection,
)

__all__ = [
    "CHOICES", "MAY_CHANGE", "Actor", "Algorithm", "Config", "CriticSection", "Data", "FilterGroups", "Head", "KLCtrl",
    "MeshSection", "Model", "MultiTurn", "Optim", "PolicyLossSection", "Ref", "Reward", "RewardFunction",
    "RewardModelSection", "RolloutCorrection", "RolloutSection", "TrainerSection", "ValKwargs", "VllmSection", "check",
    "check_micro_batch",
    "check_sources", "describe", "differences", "flat", "from_dict", "load", "save", "to_dict",
]  # fmt: skip
