"""The loop of RL: prompts -> rollouts -> rewards -> advantages -> critic and actor steps -> new weights for the engine.

`Trainer(config).fit()` is the whole run. `step` reads straight down in the order of the data; what the stages compute
lives in `rollout/`, `rewards/`, `prepare.py` and `update.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from . import config as config_module
from .algorithms.advantages import ADVANTAGES
from .algorithms.aggregation import AGGREGATIONS, aggregation_weights
from .algorithms.choose import choose
from .algorithms.kl import KL_ESTIMATORS
from .algorithms.losses import FIXED_AGGREGATIONS, POLICY_LOSSES
from .batch import PolicyTargets, Prompt, Rollout, ValueTargets
from .checkpoint import Checkpoints
from .config import Config, Optim
from .data import PromptDataset, PromptLoader
from .loggers import LOGGERS, Metrics, Run, Samples
from .metrics import CompileCounter, Timer, data_metrics, memory_metrics, throughput_metrics, validation_metrics
from .models.lora import merge_lora
from .optimizer import lr_schedule
from .packing import Layout, Sequences, max_micro_batches, pack
from .parallel import make_mesh, num_row_shards
from .prepare import Inputs, Preparation, Prepared, make_prepare
from .progress import Progress, plot_rewards
from .reward_model import RewardModel
from .rewards import Sample, Score, make_scorer
from .roles import (
    abstract_train_state,
    abstract_variables,
    fresh_adapters,
    load_base,
    model_config,
    new_train_state,
    optimizer_of,
    with_adapters,
)
from .rollout.engine import Sampling
from .rollout.jax_engine import JaxEngine
from .sources import load_rows
from .update import Critic, Policy, PolicyLoss, merge
from .weights.export import export_hf
from .weights.load import resolve

Tree = Any
log = logging.getLogger(__name__)


class Trainer:
    """One run, from a config to `runs/<name>/hf`. What is wrong with the config or the data raises ValueError here."""

    def __init__(self, config: Config):
        c = self.config = config
        self.folder = c.run_dir
        self.checkpoints = Checkpoints(self.folder / "checkpoints", max_to_keep=c.trainer.max_ckpt_to_keep)
        self.start = self._where_to_start()
        self.source = resolve(c.model.path)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.source)
        self.mesh = make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
        train = self._dataset("train")
        self.loader = PromptLoader(
            train, prompts_per_step=c.data.train_batch_size, seed=c.data.seed, shuffle=c.data.shuffle
        )
        self.val = self._dataset("val") if c.data.val_files is not None else None
        self.steps = c.trainer.total_training_steps or c.trainer.total_epochs * self.loader.steps_per_epoch
        if jax.process_index() == 0:
            rows = self._rows(c.actor.ppo_max_token_len_per_gpu)
            print(config_module.describe(c, num_rows=rows, steps=self.steps, num_prompts=len(train)))
        self._check_choices()
        self.prepare = make_prepare(_preparation(c))
        self.scorer = self._make_scorer()
        self.compiles = CompileCounter()
        self._make_roles()
        self.engine = JaxEngine(self.model, self.mesh, max_num_seqs=c.rollout.max_num_seqs)
        self.kl_coef = c.algorithm.kl_ctrl.kl_coef
        if self.start is not None:
            self._restore(*self.start)

    # What is made at the start.

    def _where_to_start(self) -> tuple[Checkpoints, int] | None:
        """The checkpoint to go on from. Refuses a folder that holds another run."""
        t = self.config.trainer
        saved = self.folder / "config.yaml"
        other_name = "set trainer.experiment_name or trainer.run_dir to another name"
        if saved.exists() and (changed := config_module.differences(self.config, saved)):
            raise ValueError(f"{self.folder} holds a run with other settings ({'; '.join(changed[:3])}): {other_name}")
        latest = self.checkpoints.latest()
        if t.resume_mode == "auto" and latest is not None:
            return self.checkpoints, latest
        held = latest is not None or any((self.folder / name).exists() for name in ("metrics.jsonl", "samples.jsonl", "hf"))
        if held and (t.resume_mode != "auto" or (self.folder / "hf").exists()):
            raise ValueError(
                f"{self.folder} already holds a run, and there is no checkpoint to go on from: {other_name}"
            )
        if t.resume_mode == "resume_path":
            path = Path(str(t.resume_from_path)).expanduser()
            match = re.fullmatch(r"global_step_(\d+)", path.name)
            if not match or not path.is_dir():
                raise ValueError(f"trainer.resume_from_path {path} is not a checkpoint folder global_step_<n>")
            return Checkpoints(path.parent), int(match[1])
        return None

    def _dataset(self, split: str) -> PromptDataset:
        d = self.config.data
        files, kwargs = (d.train_files, d.train_kwargs) if split == "train" else (d.val_files, d.val_kwargs)
        kwargs = dict(kwargs)
        is_task = isinstance(files, str) and files.startswith("task:")
        rows_split = kwargs.pop("split", {"train": "train", "val": "test"}[split] if is_task else None)
        rows = load_rows(files, split=rows_split, kwargs=kwargs)
        return PromptDataset(
            rows, self.tokenizer, max_prompt_length=d.max_prompt_length, prompt_key=d.prompt_key,
            ground_truth_key=d.ground_truth_key, filter_overlong_prompts=d.filter_overlong_prompts,
            truncation=d.truncation, system_prompt=d.system_prompt, chat=d.chat,
            apply_chat_template_kwargs=dict(d.apply_chat_template_kwargs), name=f"data.{split}_files",
        )  # fmt: skip

    def _check_choices(self) -> None:
        """What names mean is known to modules that the config does not import: asked here, before weights are loaded."""
        c = self.config
        estimator = choose(ADVANTAGES, c.algorithm.adv_estimator, "algorithm.adv_estimator")
        wanted = inspect.signature(estimator).parameters
        self.needs_critic, self.needs_baselines = "values" in wanted, "baselines" in wanted
        choose(AGGREGATIONS, c.actor.loss_agg_mode, "actor.loss_agg_mode")
        choose(AGGREGATIONS, c.critic.loss_agg_mode, "critic.loss_agg_mode")
        for name in c.trainer.logger:
            choose(LOGGERS, name, "trainer.logger")
        self._sampling(c.rollout)
        self._sampling(c.rollout.val_kwargs)
        longest = c.data.max_prompt_length + c.data.max_response_length
        if longest > (most := model_config(c.model, self.source).max_position):
            raise ValueError(
                f"data.max_prompt_length + data.max_response_length = {longest} is more than the {most} tokens of the "
                f"context of {c.model.path}: lower one of them"
            )

    def _make_scorer(self):
        r = self.config.reward
        started = {}
        if r.model.path is not None:
            tokens = self.config.critic.ppo_max_token_len_per_gpu
            started["model"] = (
                RewardModel(r.model.path, self.mesh, self.config.model, max_tokens=tokens), r.model.weight
            )  # fmt: skip
        return make_scorer(
            [(f.name, f.weight, dict(f.kwargs)) for f in r.functions], error_reward=r.error_reward,
            on_error=r.on_error, timeout_s=r.timeout_s, started=started,
        )  # fmt: skip

    def _make_roles(self) -> None:
        """Weights of every role; trained ones are left to `_restore` where a checkpoint has them."""
        c, m = self.config, self.config.model
        plain = model_config(m, self.source)
        self.model = with_adapters(plain, m)
        self.actor_optimizer = optimizer_of(c.actor.optim)
        self.policy = Policy(self.mesh, self.model, self.actor_optimizer, _policy_loss(c))
        self.actor_lr = _schedule(c.actor.optim, self.steps)
        self.actor_abstract = abstract_variables(self.mesh, self.model, "lm")
        adapters = "lora" in self.actor_abstract
        if adapters:  # what does not train needs no float32
            frozen = abstract_variables(self.mesh, self.model, "lm", m.compute_dtype)["params"]
            self.actor_abstract = {**self.actor_abstract, "params": frozen}
        base = None
        if adapters or self.start is None:
            base = load_base(self.source, self.model, self.actor_abstract)
        self.actor_frozen = {"params": base} if adapters else {}
        self.actor = None
        if self.start is None:
            trained = {"params": base}
            if adapters:
                trained = {"lora": fresh_adapters(self.mesh, self.model, self.actor_abstract, c.trainer.seed)}
            self.actor = new_train_state(self.mesh, self.actor_optimizer, trained)
        if c.needs_ref:
            self.ref = self.actor_frozen  # of adapters, the reference is the model without them
            if not adapters or c.ref.path is not None:
                source = resolve(c.ref.path or c.model.path)
                config = model_config(m, source)
                if config != plain:
                    raise ValueError(f"ref.path {c.ref.path} is not of the shape of model.path {c.model.path}")
                abstract = abstract_variables(self.mesh, config, "lm", m.compute_dtype)
                self.ref = {"params": load_base(source, config, abstract)}
        if self.needs_critic:
            source = resolve(c.critic.path or c.model.path)
            layers = {} if c.critic.num_layers is None else {"num_layers": c.critic.num_layers}
            config = model_config(m, source, score_bias=True, **layers)
            optimizer = optimizer_of(c.critic.optim)
            self.critic = Critic(self.mesh, config, optimizer, c.critic.cliprange_value)
            self.critic_lr = _schedule(c.critic.optim, self.steps)
            abstract = abstract_variables(self.mesh, config, "score")
            self.critic_abstract = abstract_train_state(optimizer, abstract)
            if self.start is None:
                params = load_base(source, config, abstract, new_head=True)
                self.critic_state = new_train_state(self.mesh, optimizer, {"params": params})

    # Checkpoints: all that the steps after this one depend on.

    def _save(self, step: int) -> None:
        state = {"actor": self.actor} | ({"critic": self.critic_state} if self.needs_critic else {})
        self.checkpoints.save(step, state, {"step": step, "loader": self.loader.state(), "kl_coef": self.kl_coef})

    def _restore(self, checkpoints: Checkpoints, step: int) -> None:
        abstract = {"actor": abstract_train_state(self.actor_optimizer, self.actor_abstract)}
        if self.needs_critic:
            abstract["critic"] = self.critic_abstract
        state, meta = checkpoints.restore(step, abstract)
        self.actor, self.critic_state = state["actor"], state.get("critic")
        self.loader.restore(meta["loader"])
        if self.config.algorithm.kl_ctrl.type != "fixed":
            self.kl_coef = meta["kl_coef"]
        log.info("going on from step %d", step)

    # The run.

    def fit(self) -> dict[str, float]:
        """Train, validate, export. Returns the metrics of the last step that was run."""
        c = self.config
        first = 0 if self.start is None else self.start[1]
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            config_module.save(c, self.folder / "config.yaml")
        run = Run(self.folder, c.trainer.project_name, c.trainer.experiment_name, config_module.to_dict(c),
                  c.trainer.total_epochs, self.steps, first + 1 if first else 0)  # fmt: skip
        values: dict[str, float] = {}
        shown = jax.process_index() == 0
        with Progress(self.steps, completed=first, shown=shown) as progress, self.scorer:
            metrics, samples = Metrics(run, c.trainer.logger, print_line=progress.print), Samples(run)
            self.engine.update_weights(self._actor_variables(), first)
            if self.val is not None and c.trainer.val_before_train and first == 0:
                metrics.log(0, self.validate(0, samples))
            for step in range(first + 1, self.steps + 1):
                values = self.step(step, samples, progress)
                metrics.log(step, values)
                # After the log: a run that goes on from this checkpoint has the step in its files.
                if c.trainer.save_freq > 0 and (step == self.steps or step % c.trainer.save_freq == 0):
                    self._save(step)
                progress.completed(step)
            self.checkpoints.wait()
            metrics.close()
            samples.close()
        self.engine.close()  # before the export: merging adapters makes a copy
        self.export(self.folder / "hf")
        if jax.process_index() == 0:
            print(f"Done: {self.folder / 'hf'} is the trained model.")
            if "jsonl" in c.trainer.logger:
                print(f"{plot_rewards(self.folder)} is its reward by step.")
        return values

    def step(self, step: int, samples: Samples, progress: Progress) -> dict[str, float]:
        """One RL step: from the next prompts to new weights in the engine, and a validation when it is due."""
        c, timer, compiled = self.config, Timer(), self.compiles.count
        is_last = step == self.steps
        with timer("step"):
            prompts = next(self.loader)
            with timer("gen"), progress.generation(len(prompts) * c.rollout.n) as report:
                rollouts = self.engine.generate(
                    prompts, self._sampling(c.rollout), seed=self._seed(step), report=report
                )
            baselines = None
            if self.needs_baselines:
                with timer("gen"):
                    greedy = self.engine.generate(prompts, self._sampling(c.rollout, greedy=True), seed=0)
                baselines = np.array([s.reward for s in self._score(prompts, greedy)], np.float32)
            with timer("reward"):
                scores = self._score(prompts, rollouts, samples, step, "train")
            metrics = self._learn(step, prompts, rollouts, scores, baselines, timer)
            with timer("update_weights"):
                self.engine.update_weights(self._actor_variables(), step)
        if self.val is not None and (is_last or (c.trainer.test_freq > 0 and step % c.trainer.test_freq == 0)):
            with timer("testing"):
                metrics |= self.validate(step, samples)
        lengths = {
            "prompt_lengths": np.array([len(prompts[r.group].token_ids) for r in rollouts]),
            "response_lengths": np.array([len(r.token_ids) for r in rollouts]),
        }
        metrics |= throughput_metrics(**lengths, seconds=timer.seconds, num_devices=self.mesh.size)
        metrics |= timer.metrics() | memory_metrics() | _reward_metrics(scores)
        return metrics | {
            "training/global_step": step,
            "training/epoch": self.loader.epoch,
            "perf/recompiles": self.compiles.count - compiled,
        }

    def _learn(
        self,
        step: int,
        prompts: list[Prompt],
        rollouts: list[Rollout],
        scores: list[Score],
        baselines: np.ndarray | None,
        timer: Timer,
    ) -> dict[str, float]:
        """From scored rollouts to the next actor and critic."""
        c, a = self.config, self.config.algorithm
        sequences = Sequences.of(prompts, rollouts, c.data.max_response_length)
        everything = self._pack(sequences, range(len(rollouts)), c.actor.ppo_max_token_len_per_gpu)
        rollout_logprobs = _padded([r.logprobs for r in rollouts], sequences.mask.shape)
        old_logprobs, ref_logprobs, values = rollout_logprobs, None, None
        if not a.rollout_correction.bypass_mode:
            with timer("old_log_prob"):
                old_logprobs, _ = self.policy.logprobs(self._actor_variables(), everything)
        if c.needs_ref:
            with timer("ref"):
                ref_logprobs, _ = self.policy.logprobs(self.ref, everything)
        if self.needs_critic:
            with timer("values"):
                layout = self._pack(sequences, range(len(rollouts)), c.critic.ppo_max_token_len_per_gpu)
                values = self.critic.values(self.critic_state.trained, layout)
        with timer("adv"):
            reward = np.array([s.reward for s in scores], np.float32)
            prepared, metrics = self.prepare(Inputs(
                reward, sequences.group, sequences.mask, rollout_logprobs, old_logprobs, ref_logprobs, values,
                None if baselines is None else baselines[sequences.group], np.float32(self.kl_coef),
            ))  # fmt: skip
            self.kl_coef = float(prepared.kl_coef)
            sequences = dataclasses.replace(sequences, mask=prepared.mask)
        if self.needs_critic:
            with timer("update_critic"):
                metrics |= self._update_critic(step, sequences, prepared, values)
        if step > c.trainer.critic_warmup:
            with timer("update_actor"):
                metrics |= self._update_actor(step, sequences, prepared, old_logprobs, ref_logprobs)
        return metrics | data_metrics(
            scores=reward, rewards_sum=prepared.rewards_sum, advantages=prepared.advantages, returns=prepared.returns,
            values=values, response_mask=prepared.mask, max_prompt_length=c.data.max_prompt_length,
            prompt_lengths=np.array([len(prompts[g].token_ids) for g in sequences.group]),
            response_lengths=sequences.lengths, finished=np.array([r.finished for r in rollouts]),
        )  # fmt: skip

    def _update_critic(self, step: int, sequences: Sequences, prepared: Prepared, values) -> dict[str, float]:
        c, lr, outs, counts = self.config.critic, self.critic_lr(step - 1), [], []
        for chosen in self._mini_batches(sequences, c.ppo_epochs):
            layout = self._pack(sequences, chosen, c.ppo_max_token_len_per_gpu)
            weights = self._loss_weights(sequences.mask, chosen, c.loss_agg_mode)
            targets = ValueTargets(*map(layout.to_slots, (values, prepared.returns, weights)))
            self.critic_state, out = self.critic.step(self.critic_state, {}, layout, targets, lr)
            outs.append(out)
            counts.append(sequences.mask[chosen].sum())
        return _update_metrics("critic", outs, counts) | {"critic/lr": lr}

    def _update_actor(
        self, step: int, sequences: Sequences, prepared: Prepared, old_logprobs, ref_logprobs
    ) -> dict[str, float]:
        c, lr, outs, counts = self.config.actor, self.actor_lr(step - 1), [], []
        mode = FIXED_AGGREGATIONS.get(c.policy_loss.loss_mode, c.loss_agg_mode)
        if ref_logprobs is None:
            ref_logprobs = np.zeros_like(old_logprobs)
        for chosen in self._mini_batches(sequences, c.ppo_epochs):
            layout = self._pack(sequences, chosen, c.ppo_max_token_len_per_gpu)
            columns = PolicyTargets(
                old_logprobs, prepared.advantages, ref_logprobs, prepared.rollout_weights,
                self._loss_weights(sequences.mask, chosen, mode),
            )  # fmt: skip
            targets = PolicyTargets(*map(layout.to_slots, columns))
            self.actor, out = self.policy.step(self.actor, self.actor_frozen, layout, targets, lr)
            outs.append(out)
            counts.append(sequences.mask[chosen].sum())
        metrics = _update_metrics("actor", outs, counts) | {"actor/lr": lr}
        if c.use_kl_loss:
            metrics["actor/kl_coef"] = c.kl_loss_coef
        return metrics

    def validate(self, step: int, samples: Samples) -> dict[str, float]:
        """Rewards on the held-out problems with the weights that the engine has."""
        assert self.val is not None
        prompts = list(self.val)
        sampling = self._sampling(self.config.rollout.val_kwargs)
        rollouts = self.engine.generate(prompts, sampling, seed=self.config.trainer.seed)
        scores = self._score(prompts, rollouts, samples, step, "val")
        names = sorted({name for score in scores for name in score.metrics})
        return validation_metrics(
            [prompts[r.group].data_source for r in rollouts], [r.group for r in rollouts], [s.reward for s in scores],
            {name: [s.metrics.get(name) for s in scores] for name in names},
        )  # fmt: skip

    def export(self, folder: Path) -> None:
        """The actor as a Hugging Face folder; adapters are merged."""
        params = self._actor_variables()["params"]
        if "lora" in self.actor.trained:
            params = self.policy.jit(lambda variables: merge_lora(self.model, variables))(self._actor_variables())
        export_hf(params, self.model, folder, source_folder=self.source, overwrite=True)

    # Small things that several stages ask for.

    def _actor_variables(self) -> Tree:
        return merge(self.actor.trained, self.actor_frozen)

    def _seed(self, step: int) -> int:
        return self.config.trainer.seed * 1_000_003 + step

    def _rows(self, max_tokens: int) -> int:
        """Packed rows of a micro-batch over all devices."""
        return max(1, max_tokens // self.config.row_length) * num_row_shards(self.mesh)

    def _pack(self, sequences: Sequences, chosen: Sequence[int] | np.ndarray, max_tokens: int) -> Layout:
        """The chosen sequences in rows. Shapes depend on the config alone, so that nothing is compiled twice."""
        c = self.config
        longest = c.data.max_prompt_length + c.data.max_response_length
        most_rows = max_micro_batches(len(chosen), longest, c.row_length, num_row_shards(self.mesh))
        rows = min(self._rows(max_tokens), most_rows * num_row_shards(self.mesh))
        return pack(
            sequences, chosen, row_length=c.row_length, rows_per_micro_batch=rows, share_prompt=c.trainer.share_prompt,
            max_micro_batches=max_micro_batches(len(chosen), longest, c.row_length, rows),
        )  # fmt: skip

    def _mini_batches(self, sequences: Sequences, epochs: int) -> list[np.ndarray]:
        """The sequences of each update: whole groups, in the order of the prompts, once an epoch."""
        size = self.config.actor.ppo_mini_batch_size
        minis = [np.flatnonzero(sequences.group // size == i) for i in range(len(sequences.prompts) // size)]
        return minis * epochs

    def _loss_weights(self, mask: np.ndarray, chosen: np.ndarray, mode: str) -> np.ndarray:
        inside = np.zeros_like(mask)
        inside[chosen] = mask[chosen]
        factor = self.config.actor.loss_scale_factor or mask.shape[1]
        return np.asarray(aggregation_weights(
            jnp.asarray(inside), mode, num_tokens=int(inside.sum()), num_sequences=int(inside.any(axis=1).sum()),
            loss_scale_factor=factor,
        ), np.float32)  # fmt: skip

    def _sampling(self, settings: Any, *, greedy: bool = False) -> Sampling:
        """`settings`: the section `rollout`, or its `val_kwargs`."""
        greedy = greedy or settings.temperature == 0
        return Sampling(
            max_tokens=self.config.data.max_response_length, n=1 if greedy else settings.n,
            temperature=0.0 if greedy else settings.temperature, top_k=-1 if greedy else settings.top_k,
            top_p=1.0 if greedy else settings.top_p, stop_ids=_stop_ids(self.tokenizer, self.source),
        )  # fmt: skip

    def _score(
        self,
        prompts: list[Prompt],
        rollouts: list[Rollout],
        samples: Samples | None = None,
        step: int = 0,
        split: str = "",
    ) -> list[Score]:
        """The score of each rollout; what was said goes to `samples`."""
        texts = [self.tokenizer.decode(r.token_ids, skip_special_tokens=True) for r in rollouts]
        owners = [prompts[r.group] for r in rollouts]
        scores = self.scorer([
            Sample(prompt=p.text, response=text, ground_truth=p.ground_truth, data_source=p.data_source,
                   extra_info=p.extra_info, response_length=len(r.token_ids), finished=r.finished, messages=p.messages)
            for p, r, text in zip(owners, rollouts, texts, strict=True)
        ])  # fmt: skip
        if samples is not None:
            samples.log(step, split=split, prompts=[p.text for p in owners], responses=texts,
                        ground_truths=[p.ground_truth for p in owners], rewards=[s.reward for s in scores],
                        data_sources=[p.data_source for p in owners])  # fmt: skip
        return scores


def _preparation(c: Config) -> Preparation:
    a, correction = c.algorithm, c.algorithm.rollout_correction
    return Preparation(
        adv_estimator=a.adv_estimator, gamma=a.gamma, lam=a.lam, norm_adv_by_std_in_grpo=a.norm_adv_by_std_in_grpo,
        use_kl_in_reward=a.use_kl_in_reward, kl_penalty=a.kl_penalty, kl_ctrl_type=a.kl_ctrl.type,
        horizon=a.kl_ctrl.horizon, target_kl=a.kl_ctrl.target_kl, rollout_is=correction.rollout_is,
        rollout_is_threshold=correction.rollout_is_threshold,
        rollout_is_batch_normalize=correction.rollout_is_batch_normalize, rollout_rs=correction.rollout_rs,
        rollout_rs_threshold=correction.rollout_rs_threshold, bypass_mode=correction.bypass_mode,
    )  # fmt: skip


def _policy_loss(c: Config) -> PolicyLoss:
    a = c.actor
    choose(POLICY_LOSSES, a.policy_loss.loss_mode, "actor.policy_loss.loss_mode")
    choose(KL_ESTIMATORS, a.kl_loss_type, "actor.kl_loss_type")
    return PolicyLoss(
        name=a.policy_loss.loss_mode, clip_low=a.clip_ratio_low, clip_high=a.clip_ratio_high, clip_c=a.clip_ratio_c,
        tau_pos=a.policy_loss.tau_pos, tau_neg=a.policy_loss.tau_neg, dro_beta=a.policy_loss.dro_beta,
        entropy_coeff=a.entropy_coeff, kl_loss_coef=a.kl_loss_coef if a.use_kl_loss else 0.0,
        kl_loss_type=a.kl_loss_type, temperature=c.rollout.temperature,
    )  # fmt: skip


def _schedule(o: Optim, steps: int):
    return lr_schedule(
        o.lr_scheduler_type, lr=o.lr, total_steps=steps, warmup_steps=o.lr_warmup_steps,
        warmup_ratio=o.lr_warmup_steps_ratio, min_lr_ratio=o.min_lr_ratio, num_cycles=o.num_cycles,
    )  # fmt: skip


def _stop_ids(tokenizer: PreTrainedTokenizerBase, source: Path) -> tuple[int, ...]:
    """Where a response ends: the tokenizer's end, and those that the model's generation config names."""
    stops = {tokenizer.eos_token_id} - {None}
    settings = source / "generation_config.json"
    if settings.exists():
        named = config_module.OmegaConf.load(settings).get("eos_token_id") or []
        stops |= {named} if isinstance(named, int) else set(named)
    return tuple(sorted(stops))


def _padded(rows: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    out = np.zeros(shape, np.float32)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out


def _update_metrics(role: str, outs: list[Tree], num_tokens: list[int]) -> dict[str, float]:
    """The means over the updates of a step; sums over trained tokens become means over tokens first."""
    updates = []
    for out, count in zip(jax.device_get(outs), num_tokens, strict=True):
        means = {name: x / max(int(count), 1) for name, x in out["sums"].items()}
        updates.append(means | out["losses"] | {"grad_norm": out["grad_norm"]})
    return {f"{role}/{name}": float(np.mean([u[name] for u in updates])) for name in updates[0]}


def _reward_metrics(scores: list[Score]) -> dict[str, float]:
    names = sorted({name for score in scores for name in score.metrics})
    means = {n: float(np.mean([s.metrics[n] for s in scores if n in s.metrics])) for n in names}
    failed = sum(score.error is not None for score in scores)
    return {f"reward/{name}/mean": mean for name, mean in means.items()} | {"reward/errors": failed}
