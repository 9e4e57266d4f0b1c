"""The folder of a run: whether it may be this run's, and where the run starts."""

from __future__ import annotations

import os
import re
from pathlib import Path

from . import config as config_module
from .config import Config

_OTHER_NAME = "set trainer.experiment_name or trainer.run_dir to another name"
_RESULTS = ("checkpoints", "metrics.jsonl", "samples.jsonl", "hf")


def where_to_start(config: Config, latest: int | None) -> tuple[str, int] | None:
    """The checkpoint to go on from: its folder's folder, and its step. `latest` is the last of the run's own.

    Raises ValueError where the folder holds another run or cannot be written, and where there is no such checkpoint.
    """
    t, folder = config.trainer, config.run_dir
    _check_can_be_written(folder)
    saved = folder / "config.yaml"
    if saved.exists() and (changed := config_module.differences(config, saved)):
        raise ValueError(f"{folder} holds a run with other settings ({'; '.join(changed[:3])}): {_OTHER_NAME}")
    own, path = folder / "checkpoints", _resume_path(config)
    goes_back = path is not None and path.parent.resolve() == own.resolve() and not _went_back_to(folder, path)
    if t.resume_mode != "disable" and latest is not None and not goes_back:
        return str(own), latest  # of a run that began from a path or went back to it, too
    left = [name for name in _RESULTS if (folder / name).exists()]
    if left and not goes_back and (t.resume_mode == "disable" or "hf" in left):
        why = "trainer.resume_mode is disable" if latest is not None else "there is no checkpoint to go on from"
        raise ValueError(f"{folder} already holds a run ({', '.join(left)}), and {why}: {_OTHER_NAME}")
    return None if path is None else _checkpoint_named(path)


def claim(config: Config) -> None:
    """Make the folder this run's: from now on it knows the settings, and the checkpoint that it went back to."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    config_module.save(config, config.run_dir / "config.yaml")
    if (path := _resume_path(config)) is not None:
        _back_file(config.run_dir).write_text(str(path.resolve()))


def _resume_path(config: Config) -> Path | None:
    t = config.trainer
    return Path(str(t.resume_from_path)).expanduser() if t.resume_mode == "resume_path" else None


def _back_file(folder: Path) -> Path:
    """Holds the checkpoint of this run that it went back to: the same command goes on from there, not back again."""
    return folder / "went_back_to.txt"


def _went_back_to(folder: Path, path: Path) -> bool:
    return _back_file(folder).exists() and _back_file(folder).read_text() == str(path.resolve())


def _check_can_be_written(folder: Path) -> None:
    """Raises ValueError where the run's folder, which need not be there yet, could not be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "you may not write there" if there.is_dir() else "that is no folder"
        where = "" if there == folder.absolute() else f" would be in {there}, and"
        raise ValueError(f"the run's folder {folder}{where or ':'} {what}: set trainer.run_dir to another one")


def _checkpoint_named(folder: Path) -> tuple[str, int]:
    """The folder's folder and the step of trainer.resume_from_path."""
    match = re.fullmatch(r"global_step_(\d+)", folder.name)
    if not match or not folder.is_dir():
        raise ValueError(f"trainer.resume_from_path {folder} is not a checkpoint folder global_step_<n>")
    return str(folder.parent), int(match[1])
