"""`adapter_config.json` of PEFT: which modules a LoRA adapter adapts, and with what rank and scale.

The rules of names are PEFT's own (0.21). A setting that would change the result and is not known is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "adapter_config.json"
MERGE_WITH_PEFT = "merge the adapter with PEFT's merge_and_unload and convert the result"

# Settings that matter while an adapter is made or trained, and not for what it computes.
_HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
})  # fmt: skip

_READ = frozenset({
    "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "r", "rank_pattern", "target_modules",
    "use_dora", "use_rslora",
})  # fmt: skip

# Ways to begin that leave the base weights alone; the others (PiSSA, OLoRA, LoftQ, CorDA ...) adapt a changed base.
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")

_SUPPORTED_BIAS = ("none", "all", "lora_only")


@dataclass(frozen=True)
class AdapterConfig:
    """What a LoRA adapter adapts. `raw` is the file as it stands."""

    raw: Mapping[str, Any]
    rank: int
    alpha: float
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def base(self) -> str | None:
        """The model that was adapted: a Hub id, or a path that may be relative to the adapter's folder."""
        return self.raw.get("base_model_name_or_path") or None

    @property
    def head(self) -> str | None:
        """The head of the adapted model, "score" of a reward model or critic; None where the task does not say."""
        return "score" if self.raw.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else None

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> AdapterConfig:
        """Reads the settings and refuses, by name, those that cannot be followed here."""
        if raw.get("peft_type") != "LORA":
            raise ValueError(f"{where} describes an adapter of type {raw.get('peft_type')!r}: LORA is read here")
        strange = [key for key, value in raw.items() if key not in _HARMLESS | _READ and value]
        if strange:
            raise ValueError(
                f"{where} sets {strange[0]} to {raw[strange[0]]!r}, which is not supported here: {MERGE_WITH_PEFT}"
            )
        if raw.get("init_lora_weights", True) not in _INITS:
            raise ValueError(
                f"{where} sets init_lora_weights to {raw['init_lora_weights']!r}, which changes the base weights: save "
                "it as plain LoRA with PEFT's path_initial_model_for_weight_conversion"
            )
        if raw.get("bias", "none") not in _SUPPORTED_BIAS:
            raise ValueError(f"{where} sets bias to {raw['bias']!r}: {', '.join(_SUPPORTED_BIAS)} are read here")
        try:
            _check_patterns(raw)
            return cls(
                raw=dict(raw),
                rank=int(raw["r"]),
                alpha=float(raw["lora_alpha"]),
                target_modules=_names(raw["target_modules"]),
                exclude_modules=_names(raw.get("exclude_modules")),
                layers_to_transform=_layers(raw.get("layers_to_transform")),
                layers_pattern=_list(raw.get("layers_pattern")),
                rank_pattern={key: int(value) for key, value in (raw.get("rank_pattern") or {}).items()},
                alpha_pattern={key: float(value) for key, value in (raw.get("alpha_pattern") or {}).items()},
                modules_to_save=_list(raw.get("modules_to_save")),
                use_rslora=bool(raw.get("use_rslora")),
                use_dora=bool(raw.get("use_dora")),
            )
        except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
            raise ValueError(f"{where} is not the config of a LoRA adapter ({error!r})") from error

    def targets(self, module: str, is_linear: Callable[[str], bool]) -> bool:
        """Whether a module ("model.layers.0.mlp.up_proj") is adapted; `is_linear` answers for "all-linear"."""
        if self._matches(self.exclude_modules, module) or _ends_with(module, self.modules_to_save):
            return False
        if self.target_modules == "all-linear":
            return is_linear(module)
        if isinstance(self.target_modules, str) or module in self.target_modules:
            return self._matches(self.target_modules, module)
        return _ends_with(module, self.target_modules) and self._in_layer(module)

    def rank_of(self, module: str) -> int:
        return int(_first_match(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA (arXiv:2312.03732)."""
        rank, alpha = self.rank_of(module), _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @staticmethod
    def _matches(names: str | tuple[str, ...], module: str) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return _ends_with(module, names)

    def _in_layer(self, module: str) -> bool:
        if self.layers_to_transform is None:
            return True
        patterns = [rf".*\.{pattern}\.(\d+)\." for pattern in self.layers_pattern] or [r".*\.[^.]*\.(\d+)\."]
        found = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
        return found is not None and int(found[1]) in self.layers_to_transform


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {CONFIG_FILE}: name the folder of a PEFT adapter")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch the adapter again") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__} where an object is expected")
    return AdapterConfig.from_json(raw, str(path))


def _check_patterns(raw: Mapping[str, Any]) -> None:
    """Raises re.error where a setting is no regular expression and PEFT takes it as one."""
    names = [raw.get("target_modules"), raw.get("exclude_modules")]
    for pattern in [
        *(name for name in names if isinstance(name, str)),
        *(raw.get("rank_pattern") or {}),
        *(raw.get("alpha_pattern") or {}),
        *_list(raw.get("layers_pattern")),
    ]:
        re.compile(pattern)


def _first_match(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _ends_with(module: str, names: tuple[str, ...] | str) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value or ())


def _list(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    return (int(value),) if isinstance(value, int) else tuple(int(layer) for layer in value)
