"""What does not fit together is said here, in words that hold the fix, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from .settings import LORA_TARGETS, Config, VllmSection

# The names that a setting may have. Tables of functions (advantages, losses, ...) are asked by the trainer at its start:
# they live with JAX, which a config does not start.
CHOICES: dict[str, tuple[str | None, ...]] = {
    "model.remat": ("none", "dots", "full", "offload"),
    "model.shard_tokens": ("none", "blocks", "attention"),
    "model.attention": ("xla", "cudnn", "splash"),
    "model.compute_dtype": ("bfloat16", "float32"),
    "actor.param_dtype": ("float32", "bfloat16"),
    "critic.param_dtype": ("float32", "bfloat16"),
    "critic.remat": (None, "none", "dots", "full", "offload"),
    "critic.compute_dtype": (None, "bfloat16", "float32"),
    "ref.compute_dtype": (None, "bfloat16", "float32"),
    "reward.model.compute_dtype": (None, "bfloat16", "float32"),
    "actor.optim.lr_scheduler_type": ("constant", "linear", "cosine"),
    "critic.optim.lr_scheduler_type": ("constant", "linear", "cosine"),
    "actor.optim.moments_dtype": ("float32", "bfloat16"),
    "critic.optim.moments_dtype": ("float32", "bfloat16"),
    "actor.optim.grad_compression": ("none", "fp32", "bf16", "fp16", "topk"),
    "critic.optim.grad_compression": ("none", "fp32", "bf16", "fp16", "topk"),
    "data.truncation": ("error", "left", "right", "middle"),
    "rollout.engine": ("jax", "vllm"),
    "rollout.vllm.dtype": ("auto", "float32", "bfloat16", "float16"),
    "rollout.vllm.transport": ("auto", "shm", "file", "http", "nccl", "ipc"),
    "rollout.vllm.publish": ("merged", "adapter"),
    "reward.on_error": ("report", "raise"),
    "algorithm.rollout_correction.rollout_is": (None, "token", "sequence"),
    "trainer.trainer_mode": ("sync", "one_step_off"),
    "trainer.resume_mode": ("auto", "disable", "resume_path"),
}


# What a number may be; None is none. (nan is within no range.)
POSITIVE = "above 0"
NOT_NEGATIVE = "0 or above"
SHARE = "from 0 to 1"
BELOW_ONE = "from 0 to below 1"
FINITE = "a finite number"
RANGES: dict[str, dict[str, tuple[str, ...]]] = {
    "data": {POSITIVE: ("max_prompt_length", "max_response_length", "train_batch_size")},
    "rollout": {
        POSITIVE: ("n", "max_num_seqs", "tensor_model_parallel_size", "max_probs_diff", "val_kwargs.n", "temperature",
                   "multi_turn.max_assistant_turns", "multi_turn.timeout_s"),
    },
    "rollout.vllm": {
        POSITIVE: ("num_servers", "probe_tolerance", "start_timeout_s", "load_timeout_s", "stall_timeout_s"),
        NOT_NEGATIVE: ("max_restarts",),
    },
    "reward": {POSITIVE: ("timeout_s",), FINITE: ("error_reward", "model.weight")},
    "algorithm": {
        SHARE: ("gamma", "lam"), NOT_NEGATIVE: ("kl_ctrl.kl_coef",), POSITIVE: ("kl_ctrl.horizon", "kl_ctrl.target_kl"),
    },
    "actor": {
        POSITIVE: ("ppo_epochs", "ppo_mini_batch_size", "ppo_max_token_len_per_gpu", "loss_scale_factor", "clip_ratio_c",
                   "policy_loss.tau_pos", "policy_loss.tau_neg"),
        NOT_NEGATIVE: ("clip_ratio_low", "clip_ratio_high", "kl_loss_coef", "policy_loss.dro_beta"),
        FINITE: ("entropy_coeff",),
    },
    "critic": {POSITIVE: ("ppo_epochs", "ppo_max_token_len_per_gpu", "num_layers", "cliprange_value")},
    "trainer": {
        POSITIVE: ("total_epochs", "total_training_steps", "max_ckpt_to_keep", "row_length", "start_timeout_s",
                   "heartbeat_timeout_s", "stall_timeout_s"),
        NOT_NEGATIVE: ("critic_warmup",),
    },
}  # fmt: skip
_OPTIM = {
    POSITIVE: ("clip_grad", "grad_topk"), NOT_NEGATIVE: ("lr", "weight_decay", "num_cycles"),
    SHARE: ("lr_warmup_steps_ratio", "min_lr_ratio"),
}  # fmt: skip
RANGES |= {"actor.optim": _OPTIM, "critic.optim": _OPTIM}
_WITHIN: dict[str, Callable[[float], bool]] = {
    POSITIVE: lambda x: 0 < x < math.inf,
    NOT_NEGATIVE: lambda x: 0 <= x < math.inf,
    SHARE: lambda x: 0 <= x <= 1,
    BELOW_ONE: lambda x: 0 <= x < 1,
    FINITE: math.isfinite,
}


def value_of(c: Config, key: str) -> Any:
    """The value of a setting by its dotted name."""
    value: Any = c
    for name in key.split("."):
        value = getattr(value, name)
    return value


def check(c: Config) -> None:
    """Raises ValueError, with the fix, for what cannot be or does not fit together."""
    for key, choices in CHOICES.items():
        if (value := value_of(c, key)) not in choices:
            raise ValueError(f"{key} is {value!r} and must be one of {', '.join(map(str, choices))}")
    for section, ranges in RANGES.items():
        for words, names in ranges.items():
            for name in names:
                _check_range(f"{section}.{name}", value_of(c, f"{section}.{name}"), words)
    for role in ("actor", "critic"):
        for beta in value_of(c, f"{role}.optim.betas"):
            _check_range(f"{role}.optim.betas", beta, BELOW_ONE)
    if c.rollout.engine == "vllm":
        _check_vllm(c)
    _check_texts(c)
    _check_placement(c)
    if c.data.train_batch_size % c.actor.ppo_mini_batch_size:
        raise ValueError(
            f"actor.ppo_mini_batch_size {c.actor.ppo_mini_batch_size} must divide data.train_batch_size "
            f"{c.data.train_batch_size}: both count prompts"
        )
    if c.row_length < c.max_length:
        raise ValueError(
            f"trainer.row_length {c.row_length} is shorter than data.max_prompt_length + data.max_response_length = "
            f"{c.max_length}: raise it or leave it out"
        )
    check_micro_batch(c, "actor")
    if c.model.attention == "splash" and c.trainer.share_prompt and c.rollout.n > 1:
        raise ValueError(
            "model.attention splash cannot share a prompt between responses: set trainer.share_prompt=false"
        )
    if c.model.attention == "splash" and c.row_length % 128:
        raise ValueError(
            f"model.attention splash computes blocks of 128 tokens, and trainer.row_length {c.row_length} is no multiple "
            "of that: set it to one, or leave it out"
        )
    correction = c.algorithm.rollout_correction
    if (correction.rollout_rs is None) != (correction.rollout_rs_threshold is None):
        raise ValueError(
            "algorithm.rollout_correction.rollout_rs and rollout_rs_threshold belong together: set both or neither"
        )
    if c.trainer.resume_mode == "resume_path" and c.trainer.resume_from_path is None:
        raise ValueError("trainer.resume_mode resume_path needs trainer.resume_from_path, a folder global_step_<n>")
    if c.trainer.resume_mode != "resume_path" and c.trainer.resume_from_path is not None:
        raise ValueError(
            "trainer.resume_from_path is of trainer.resume_mode resume_path: set it too, or leave both out"
        )
    if len(set(c.trainer.logger)) < len(c.trainer.logger):
        raise ValueError(f"trainer.logger {list(c.trainer.logger)} names one twice: name each once")
    if c.model.lora_rank < 0:
        raise ValueError(f"model.lora_rank {c.model.lora_rank} must be 0, which trains all weights, or above")
    if correction.bypass_mode and (correction.rollout_is or correction.rollout_rs):
        raise ValueError(
            "algorithm.rollout_correction.bypass_mode leaves nothing to correct: unset it, or rollout_is and rollout_rs"
        )
    _check_sampling(c)
    if c.rollout.val_kwargs.temperature == 0 and c.rollout.val_kwargs.n > 1:
        raise ValueError("rollout.val_kwargs.n above 1 needs rollout.val_kwargs.temperature above 0")
    if c.rollout.val_kwargs.greedy and c.rollout.val_kwargs.n == 1:
        raise ValueError(
            "rollout.val_kwargs.greedy is a greedy answer (mean@1) beside n samples (mean@n): set rollout.val_kwargs.n above "
            "1, or for greedy answers alone rollout.val_kwargs.temperature=0 without it"
        )
    wrong = [name for name in c.model.lora_targets if name not in LORA_TARGETS]
    if c.model.lora_rank and (wrong or not c.model.lora_targets):
        raise ValueError(f"model.lora_targets {list(c.model.lora_targets)} must be some of {', '.join(LORA_TARGETS)}")
    if c.model.lora_rank and c.model.lora_alpha <= 0:
        raise ValueError(f"model.lora_alpha {c.model.lora_alpha} must be above 0")


def check_micro_batch(c: Config, role: str) -> None:
    """Raises ValueError where no packed row fits a micro-batch of the role: the critic is asked where there is one."""
    if (most := value_of(c, f"{role}.ppo_max_token_len_per_gpu")) < c.row_length:
        raise ValueError(
            f"{role}.ppo_max_token_len_per_gpu {most} is less than a packed row, of {c.row_length} tokens: raise it, or "
            f"lower trainer.row_length (at least {c.max_length}, the longest sequence)"
        )


def _check_range(key: str, value: float | None, words: str) -> None:
    if value is not None and not _WITHIN[words](value):
        raise ValueError(f"{key} is {value} and must be {words}")


def check_sources(c: Config, *, model: bool = False, train_dataset: bool = False, reward: bool = False) -> None:
    """Raises ValueError unless model, training data and reward each come from the config or are handed over in Python."""
    needed = {"data.train_files": (c.data.train_files, train_dataset), "model.path": (c.model.path, model)}
    if missing := [key for key, (value, is_given) in needed.items() if value is None and not is_given]:
        raise ValueError(f"{', '.join(missing)} must be set")
    if twice := [key for key, (value, is_given) in needed.items() if value is not None and is_given]:
        raise ValueError(f"{twice[0]} is set, and the trainer was handed an object in its place: leave one of them out")
    if not (reward or c.reward.functions or c.reward.model.path):
        raise ValueError(
            "there is no reward: set reward.functions, for example [{name: exact_number}], or reward.model.path"
        )


def _check_placement(c: Config) -> None:
    trains, computes = ("optimizer", "params"), ("params",)
    for role, known in {"actor": trains, "critic": trains, "ref": computes, "reward.model": computes}.items():
        if wrong := set(value_of(c, f"{role}.offload")) - set(known):
            raise ValueError(f"{role}.offload holds {', '.join(sorted(wrong))}: it may hold {' and '.join(known)}")
    for name, role in (("actor", c.actor), ("critic", c.critic)):
        if role.optim.grad_topk > 1:
            raise ValueError(f"{name}.optim.grad_topk {role.optim.grad_topk} is a share: above 0, at most 1")
        if role.param_dtype == "bfloat16" and role.optim.grad_compression != "none":
            raise ValueError(
                f"{name}.optim.grad_compression {role.optim.grad_compression} is of float32 gradients, and with "
                f"{name}.param_dtype bfloat16 they are halved already: set it to none"
            )
    if c.actor.param_dtype == "bfloat16" and c.model.lora_rank:
        raise ValueError("actor.param_dtype bfloat16 is for weights: adapters (model.lora_rank) are small, and float32")
    meshes = {
        "mesh": c.mesh,
        "critic.mesh": c.critic.mesh,
        "ref.mesh": c.ref.mesh,
        "reward.model.mesh": c.reward.model.mesh,
    }
    for key, mesh in meshes.items():
        if mesh is not None and c.model.shard_tokens != "none" and c.row_length % max(1, mesh.tensor):
            raise ValueError(
                f"model.shard_tokens splits rows of {c.row_length} tokens over {key}.tensor {mesh.tensor}, which does not "
                "divide it: set trainer.row_length to a multiple"
            )
    if c.model.shard_tokens == "attention" and c.model.attention != "xla":
        raise ValueError("model.shard_tokens attention needs model.attention xla: a fused kernel wants whole rows")


def _check_vllm(c: Config) -> None:
    v = c.rollout.vllm
    if (v.python is None) == (not v.urls):
        raise ValueError(
            "rollout.engine vllm needs either rollout.vllm.python, the environment that `scripts/setup_vllm.sh DIR` "
            "makes, or rollout.vllm.urls, servers that scripts/serve_vllm.py started"
        )
    _check_vllm_places(v)
    if v.devices and len(v.devices) != v.num_servers:
        raise ValueError(
            f"rollout.vllm.devices names the devices of {len(v.devices)} servers, and rollout.vllm.num_servers is "
            f"{v.num_servers}: name those of each"
        )
    if (v.transport == "file") != (v.file_dir is not None):
        raise ValueError("rollout.vllm.transport file and rollout.vllm.file_dir belong together: set both or neither")
    if v.transport in ("nccl", "ipc"):
        _check_from_devices(c)
    if v.publish == "adapter" and not c.model.lora_rank:
        raise ValueError("rollout.vllm.publish adapter needs adapters: set model.lora_rank, or publish merged")
    if v.gpu_memory_utilization is not None and not 0 < v.gpu_memory_utilization <= 1:
        raise ValueError(
            f"rollout.vllm.gpu_memory_utilization {v.gpu_memory_utilization} is a share: above 0, at most 1"
        )


def _check_from_devices(c: Config) -> None:
    v = c.rollout.vllm
    if v.publish == "adapter":
        raise ValueError(
            f"rollout.vllm.transport {v.transport} sends whole models: set rollout.vllm.publish to merged, or transport to auto"
        )
    if c.trainer.trainer_mode != "sync":
        raise ValueError(
            f"rollout.vllm.transport {v.transport} sends from the trainer's arrays, which one_step_off changes while servers "
            "answer with them: set trainer.trainer_mode to sync, or transport to auto"
        )
    if v.transport == "ipc" and v.urls:
        raise ValueError(
            "rollout.vllm.transport ipc is for servers that are started here, on the trainer's GPU: leave rollout.vllm.urls "
            "out, or set transport to auto"
        )


def _check_vllm_places(v: VllmSection) -> None:
    for url in v.urls:
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
        except ValueError:  # its port is no number
            good = False
        if not good:
            raise ValueError(f"rollout.vllm.urls has {url!r}, which is no address of a server: write http://HOST:PORT")
    if taken := sorted({"host", "port", "model", "served_model_name"} & {name.replace("-", "_") for name in v.args}):
        raise ValueError(f"rollout.vllm.args sets {taken[0]}, which the trainer sets itself: leave it out")


def _check_texts(c: Config) -> None:
    r = c.rollout
    for key, texts in (("stop", list(r.stop)), ("bad_words", list(r.bad_words)), ("guided", dict(r.guided))):
        if texts and r.engine == "jax":
            raise ValueError(
                f"rollout.{key} {texts}: the jax engine knows tokens and no texts, set rollout.engine to vllm"
            )
        if "" in texts:
            raise ValueError(f"rollout.{key} {texts} has an empty text: leave it out")
    if len(r.guided) > 1:
        raise ValueError(f"rollout.guided has {', '.join(r.guided)}: one grammar at a time")


def _check_sampling(c: Config) -> None:
    correction, filtered = c.algorithm.rollout_correction, c.algorithm.filter_groups
    if c.trainer.trainer_mode == "one_step_off" and not (
        correction.bypass_mode or correction.rollout_is or correction.rollout_rs
    ):
        raise ValueError(
            "trainer.trainer_mode one_step_off learns from samples of the weights before: set "
            "algorithm.rollout_correction.rollout_is, for example token, or bypass_mode"
        )
    if correction.bypass_mode and c.algorithm.use_kl_in_reward and (c.rollout.top_p < 1 or c.rollout.top_k > 0):
        raise ValueError(
            "algorithm.use_kl_in_reward needs logprobs of the whole distribution, and with rollout.top_p or top_k an "
            "engine has those of the truncated one: set algorithm.rollout_correction.bypass_mode=false"
        )
    if filtered.enable and c.rollout.n == 1:
        raise ValueError("algorithm.filter_groups compares the responses of a group: set rollout.n above 1")
    if filtered.max_num_gen_batches < 0:
        raise ValueError(
            f"algorithm.filter_groups.max_num_gen_batches {filtered.max_num_gen_batches} must be 0 (no limit) or above"
        )
