"""Whether a run folder holds this run: what may differ between a run and its continuation, and what may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from .load import to_dict
from .settings import Config

# What a run may change when it goes on, beside its meshes, validations and all of rollout.vllm: none of it changes the
# course of the steps by more than rounding (but a schedule that falls over the run follows its new length).
MAY_CHANGE = {
    "model.remat",
    "critic.remat",
    "model.attention",
    "model.shard_tokens",
    "actor.offload",
    "critic.offload",
    "ref.offload",
    "reward.model.offload",
    "actor.ppo_max_token_len_per_gpu",
    "critic.ppo_max_token_len_per_gpu",
    "rollout.free_cache_engine",
    "trainer.row_length",
    "trainer.share_prompt",
    "trainer.total_epochs",
    "trainer.total_training_steps",
    "trainer.save_freq",
    "trainer.max_ckpt_to_keep",
    "trainer.resume_mode",
    "trainer.resume_from_path",
    "trainer.test_freq",
    "trainer.val_before_train",
    "trainer.logger",
    "trainer.run_dir",
    "trainer.start_timeout_s",
    "trainer.heartbeat_timeout_s",
    "trainer.stall_timeout_s",
    "rollout.max_num_seqs",
    "rollout.max_probs_diff",
    "rollout.tensor_model_parallel_size",
}
MAY_CHANGE_WHOLLY = ("rollout.vllm", "rollout.val_kwargs", "mesh", "critic.mesh", "ref.mesh", "reward.model.mesh")  # fmt: skip


def differences(c: Config, saved: Path) -> list[str]:
    """The settings in which `c` is not the run that `saved` (its config.yaml) describes, but for what `MAY_CHANGE`."""
    theirs = _flat(_read(saved))
    for key, value in flat(Config()).items():  # a setting that is new since the run began had this value without saying
        if key not in theirs and not any(name.startswith(f"{key}.") for name in theirs):
            theirs[key] = value
    ours = flat(c)
    for settings in (theirs, ours):
        for name in ("ppo_epochs", "loss_agg_mode"):
            settings[f"critic.{name}"] = settings[f"critic.{name}"] or settings[f"actor.{name}"]
    return [
        f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and key not in MAY_CHANGE and not _within(key, MAY_CHANGE_WHOLLY)
    ]


def _read(saved: Path) -> dict[str, Any]:
    try:
        found = OmegaConf.to_container(OmegaConf.load(saved))
    except PermissionError as error:
        raise ValueError(
            f"{saved} cannot be read ({error.strerror}), so that nobody knows whose folder it is"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError):
        found = None
    if not isinstance(found, dict) or not found:
        raise ValueError(
            f"{saved} is not what a run has written, so that nobody knows whose folder it is: remove the file if this is "
            "the same run, or set trainer.run_dir to another folder"
        )
    return {str(key): value for key, value in found.items()}


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return key.startswith(tuple(f"{section}." for section in sections)) or key in sections


def flat(c: Config) -> dict[str, Any]:
    """Every setting by its dotted name, as a YAML file would give it back (it knows no tuples)."""
    return _flat(OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(to_dict(c))))))


def _flat(tree: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {where: tree}
    return {
        name: x for key, value in tree.items() for name, x in _flat(value, f"{where}.{key}" if where else key).items()
    }
