"""Read a config: one YAML and `a.b=c` overrides, merged into `settings.Config` and checked.

An unknown key is refused with a did-you-mean, a value of the wrong type with its full name.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .check import check, check_sources
from .settings import Config, RewardFunction
from .verl_names import VERL_NAMES

# What types that are no word of YAML look like there.
_IN_YAML = {
    "tuple[str, ...]": "a list of texts, as [a, b]", "tuple[float, float]": "two numbers, as [0.9, 0.999]",
    "list[RewardFunction]": "a list, as [{name: exact_number}]", "dict[str, Any]": "keys and values, as {a: 1}",
    "dict[str, str]": "keys and texts, as {A: b}", "MeshSection | None": "keys and values, as {fsdp: 2}",
}  # fmt: skip


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file with `a.b=c` overrides on top. Raises ValueError in words."""
    path = Path(path)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is not there"
        raise ValueError(f"{path} {found}: --config takes a YAML file such as configs/quickstart.yaml")
    try:
        given = OmegaConf.load(StringIO(_with_bands_as_text(path.read_text(encoding="utf-8"))))
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:  # OSError: the file holds one number or word
        raise ValueError(f"{path} is not a YAML file of sections: {' '.join(str(error).split())}") from None
    if not isinstance(given, DictConfig):
        raise ValueError(f"{path} holds a list, and a config is sections with keys, as in configs/quickstart.yaml")
    for override in overrides:
        given = _with_override(given, override)
    try:
        config = from_dict(given)
        check_sources(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _with_bands_as_text(text: str) -> str:
    """`..._threshold: 0.5_2` means a band, and YAML reads the number 0.52 (an underscore may group its digits)."""
    band = r"[\d.]+_[\d.]+"
    return re.sub(rf"(_threshold\s*[:=]\s*)({band}(?:,{band})*)", r'\1"\2"', text)


def _with_override(given: Any, override: str) -> Any:
    key, equals, _ = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"override {override!r} is not of the form a.b=c, for example actor.optim.lr=1e-6")
    try:
        return OmegaConf.merge(given, OmegaConf.from_dotlist([_with_bands_as_text(override)]))
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"override {override!r} has no value that YAML can read: {problem}") from None
    except TypeError:
        raise ValueError(
            f"override {override!r} does not fit what the file has there: a list is set as a whole, for example "
            "reward.functions=[{name: exact_number}]"
        ) from None


def from_dict(given: Any) -> Config:
    """The config of a mapping: what `load` does with a file, for use from Python.

    Model, data and reward may be left out, where `Trainer` is handed the objects themselves.
    """
    given = OmegaConf.create(given)
    _check_keys_and_types(Config, OmegaConf.to_container(given), "")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), given)
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise ValueError(f"{', '.join(missing)} must be set")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, Config)
    check(config)
    return config


def to_dict(c: Config) -> dict[str, Any]:
    return dataclasses.asdict(c)


def save(c: Config, path: Path) -> None:
    """Whole or not at all: a run that is killed meanwhile goes on by what stands there."""
    partial = path.with_name(f".{path.name}")
    OmegaConf.save(OmegaConf.create(to_dict(c)), partial)
    partial.replace(path)


def _check_keys_and_types(cls: type, given: Any, where: str) -> None:
    """Refuses, by its full name, a key that `cls` has not or a value that is not of its type."""
    if not isinstance(given, dict):
        raise ValueError(f"{where.rstrip('.') or 'the config'} must be a section with keys, and is {given!r}")
    types = typing.get_type_hints(cls)
    for key, value in given.items():
        if key not in types and f"{where}{key}" in VERL_NAMES:
            raise ValueError(f"{where}{key} is a name of verl's. Here it is {VERL_NAMES[f'{where}{key}']}.")
        if key not in types:
            close = difflib.get_close_matches(str(key), types, n=1)
            hint = f" Did you mean {where}{close[0]}?" if close else f" Known: {', '.join(types)}."
            raise ValueError(f"{where}{key} is not a key of the config.{hint}")
        if dataclasses.is_dataclass(types[key]):
            _check_keys_and_types(typing.cast(type, types[key]), value, f"{where}{key}.")
        elif types[key] == list[RewardFunction] and isinstance(value, list):
            for i, item in enumerate(value):
                _check_keys_and_types(RewardFunction, item, f"{where}{key}[{i}].")
        elif not (isinstance(value, str) and value.startswith("${")):  # a reference is judged where it leads
            try:
                OmegaConf.merge(OmegaConf.structured(cls), {key: value})
            except (OmegaConfBaseException, TypeError):
                wanted = str(cls.__annotations__[key])
                wanted = (_IN_YAML.get(wanted) or wanted).replace(" | None", " or null")
                raise ValueError(f"{where}{key} is {value!r} and must be {wanted}") from None
