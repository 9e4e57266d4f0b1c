"""The loop of RL: prompts -> rollouts -> rewards -> advantages -> critic and actor steps -> new weights for the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .algorithms.advantages import ADVANTAGES, place_scores
from .algorithms.aggregation import aggregation_weights
from .algorithms.choose import bind, choose
from .algorithms.correction import mismatch_metrics
from .batch import PolicyTargets, Prompt, Rollout, ValueTargets
from .config import Config, Optim, describe, save
from .data import PromptDataset, PromptLoader, load_rows
from .loggers import Metrics, Run, Samples
from .metrics import Timer, data_metrics, memory_metrics, throughput_metrics, validation_metrics
from .models import decoder
from .models.config import ModelConfig
from .optimizer import Optimizer, lr_schedule, make_optimizer
from .packing import Layout, Sequences, max_micro_batches, pack
from .parallel import make_mesh, num_row_shards, use_mesh, with_shardings
from .progress import Progress, plot_rewards
from .rewards import Sample, Score, make_scorer
from .rollout.engine import Sampling
from .rollout.jax_engine import JaxEngine
from .update import Critic, Policy, PolicyLoss, TrainState
from .weights.export import export_hf
from .weights.load import load_hf_config, load_params, resolve

Tree = Any


class Trainer:
    """One run, from a config to `runs/<name>/hf`."""

    def __init__(self, config: Config):
        c = self.config = config
        self.folder = Path(c.trainer.run_dir or f"runs/{c.trainer.experiment_name}")
        if (self.folder / "metrics.jsonl").exists():
            raise ValueError(
                f"{self.folder} already holds a run: set trainer.experiment_name or trainer.run_dir to another name"
            )
        self.source = resolve(c.model.path)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.source)
        self.mesh = make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
        self.rows = c.trainer.rows_per_device * num_row_shards(self.mesh)
        print(describe(c, self.rows))
        self.loader = PromptLoader(self._dataset("train"), prompts_per_step=c.data.train_batch_size, seed=c.data.seed,
                                   shuffle=c.data.shuffle)  # fmt: skip
        self.val = self._dataset("val") if c.data.val is not None else None
        specs = [(f.name, f.weight, dict(f.kwargs)) for f in c.reward.functions]
        self.scorer = make_scorer(
            specs, error_reward=c.reward.error_reward, on_error=c.reward.on_error, timeout_s=c.reward.timeout_s
        )
        self.steps = c.trainer.total_training_steps or c.trainer.total_epochs * self.loader.steps_per_epoch
        self._make_roles()

    def _dataset(self, split: str) -> PromptDataset:
        d = self.config.data
        source, kwargs = (d.train, d.train_kwargs) if split == "train" else (d.val, d.val_kwargs)
        is_task = str(source).startswith("task:")
        rows = load_rows(source, split=("train" if split == "train" else "test") if is_task else None, kwargs=dict(kwargs))
        return PromptDataset(
            rows, self.tokenizer, max_prompt_length=d.max_prompt_length, prompt_key=d.prompt_key,
            ground_truth_key=d.ground_truth_key, filter_overlong_prompts=d.filter_overlong_prompts,
            truncation=d.truncation, system_prompt=d.system_prompt, name=f"data.{split}",
        )  # fmt: skip

    def _make_roles(self) -> None:
        c, m = self.config, self.config.model
        hf_config = load_hf_config(self.source)
        run = dict(compute_dtype=m.compute_dtype, remat=m.remat, attention=m.attention)
        self.model = ModelConfig.from_hf(hf_config, **run)
        optimizer = _optimizer(c.actor.optim)
        self.policy = Policy(self.mesh, self.model, optimizer, PolicyLoss(
            name=c.actor.policy_loss, clip_low=c.actor.clip_ratio_low, clip_high=c.actor.clip_ratio_high,
            clip_c=c.actor.clip_ratio_c, entropy_coeff=c.actor.entropy_coeff, temperature=c.rollout.temperature,
        ))  # fmt: skip
        self.actor = self._state(self.model, "lm", optimizer)
        self.actor_lr = _schedule(c.actor.optim, self.steps)
        if c.needs_critic:
            layers = c.critic.num_layers or self.model.num_layers
            model = dataclasses.replace(self.model, num_layers=layers, score_bias=True)
            optimizer = _optimizer(c.critic.optim)
            self.critic = Critic(self.mesh, model, optimizer, c.critic.cliprange_value)
            self.critic_state = self._state(model, "score", optimizer)
            self.critic_lr = _schedule(c.critic.optim, self.steps)
        self.engine = JaxEngine(self.model, max_num_seqs=c.rollout.max_num_seqs)

    def _state(self, model: ModelConfig, head: str, optimizer: Optimizer) -> TrainState:
        abstract, axes = decoder.abstract_params(model, head)
        abstract = with_shardings(self.mesh, abstract["params"], axes["params"])
        wanted = abstract
        full = ModelConfig.from_hf(load_hf_config(self.source)).num_layers
        if model.num_layers < full:  # a shallow critic: the layers above are loaded and dropped
            deep, deep_axes = decoder.abstract_params(dataclasses.replace(model, num_layers=full), head)
            wanted = with_shardings(self.mesh, deep["params"], deep_axes["params"])
        fresh = {"score.kernel", "score.bias"} if head == "score" else set()
        params = load_params(
            self.source, dataclasses.replace(model, num_layers=full), wanted, allow_missing=fresh
        )
        if model.num_layers < full:
            params["layers"] = jax.tree.map(lambda x: x[: model.num_layers], params["layers"])
        if head == "score" and params["score"]["kernel"] is None:
            # Zero: the critic begins by knowing nothing, and no random value moves the first advantages.
            params["score"] = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), abstract["score"])
        trained = {"params": params}
        with use_mesh(self.mesh):
            return TrainState(trained, jax.jit(optimizer.init)(trained))

    def fit(self) -> None:
        """Train, validate, export."""
        c = self.config
        self.folder.mkdir(parents=True, exist_ok=True)
        save(c, self.folder / "config.yaml")
        run = Run(self.folder, c.trainer.project_name, c.trainer.experiment_name, dataclasses.asdict(c),
                  c.trainer.total_epochs, self.steps, 0)  # fmt: skip
        with Progress(self.steps, shown=jax.process_index() == 0) as progress, self.scorer:
            metrics, samples = Metrics(run, c.trainer.logger, print_line=progress.print), Samples(run)
            self.engine.update_weights(self.actor.trained, 0)
            if self.val is not None and c.trainer.val_before_train:
                metrics.log(0, self.validate(0, samples))
            for step in range(1, self.steps + 1):
                values = self.step(step, samples, progress)
                last = step == self.steps
                if self.val is not None and (last or (c.trainer.test_freq > 0 and step % c.trainer.test_freq == 0)):
                    values |= self.validate(step, samples)
                metrics.log(step, values)
                progress.completed(step)
            metrics.close()
            samples.close()
        export_hf(self.actor.trained["params"], self.model, self.folder / "hf", source_folder=self.source)
        plot_rewards(self.folder)
        self.engine.close()

    def step(self, step: int, samples: Samples, progress: Progress) -> dict[str, float]:
        """One RL step."""
        c, timer = self.config, Timer()
        with timer("step"):
            prompts = next(self.loader)
            with timer("gen"), progress.generation(len(prompts) * c.rollout.n) as report:
                seed = c.trainer.seed * 1_000_003 + step
                rollouts = self.engine.generate(prompts, self._sampling(c.rollout.n, c.rollout.temperature), seed=seed,
                                                report=report)  # fmt: skip
            with timer("reward"):
                scores = self._score(prompts, rollouts, samples, step, "train")
            metrics, lengths = self._learn(step, prompts, rollouts, scores, timer)
            with timer("update_weights"):
                self.engine.update_weights(self.actor.trained, step)
                jax.block_until_ready(self.engine.weights)
        return metrics | timer.metrics() | memory_metrics() | throughput_metrics(
            **lengths, seconds=timer.seconds, num_devices=self.mesh.size
        ) | {
            "training/global_step": step,
            "training/epoch": self.loader.epoch,
            "perf/recompiles": self.policy.num_compiled + (self.critic.num_compiled if c.needs_critic else 0),
        }  # fmt: skip

    def _learn(self, step: int, prompts: list[Prompt], rollouts: list[Rollout], scores: list[Score], timer: Timer):
        c = self.config
        sequences = Sequences.of(prompts, rollouts, c.data.max_response_length)
        mask, B = sequences.mask, len(rollouts)
        everything = self._pack(sequences, range(B))
        rollout_logprobs = _padded([r.logprobs for r in rollouts], mask.shape)
        with timer("old_log_prob"):
            if c.algorithm.bypass_old_logprobs:
                old_logprobs = rollout_logprobs
            else:
                old_logprobs, _ = self.policy.logprobs(self.actor.trained, everything)
        values = None
        if c.needs_critic:
            with timer("values"):
                values = self.critic.values(self.critic_state.trained, everything)
        with timer("adv"):
            reward = np.array([s.reward for s in scores], np.float32)
            estimate = bind(
                choose(ADVANTAGES, c.algorithm.adv_estimator, "advantage estimator"),
                group=jnp.asarray(sequences.group), values=None if values is None else jnp.asarray(values),
                gamma=c.algorithm.gamma, lam=c.algorithm.lam, norm_by_std=c.algorithm.norm_adv_by_std_in_grpo,
            )  # fmt: skip
            token_rewards = place_scores(jnp.asarray(reward), jnp.asarray(mask))
            advantages, returns = map(np.asarray, estimate(token_rewards, jnp.asarray(mask)))
        metrics: dict[str, float] = {}
        minis = self._mini_batches(sequences)
        if c.needs_critic:
            with timer("update_critic"):
                for b in [b for _ in range(c.critic.ppo_epochs) for b in minis]:
                    layout = everything if len(minis) == 1 else self._pack(sequences, b)
                    weights = self._loss_weights(mask, b)
                    targets = ValueTargets(*map(layout.to_slots, (values, returns.astype(np.float32), weights)))
                    self.critic_state, out = self.critic.step(
                        self.critic_state, {}, layout, targets, self.critic_lr(step - 1)
                    )
                metrics |= _last(out, "critic", mask[b].sum()) | {"critic/lr": self.critic_lr(step - 1)}
        if step > c.trainer.critic_warmup:
            with timer("update_actor"):
                for b in [b for _ in range(c.actor.ppo_epochs) for b in minis]:
                    layout = everything if len(minis) == 1 else self._pack(sequences, b)
                    weights, ones = self._loss_weights(mask, b), np.ones(mask.shape, np.float32)
                    columns = (old_logprobs, advantages.astype(np.float32), 0 * ones, ones, weights)
                    self.actor, out = self.policy.step(
                        self.actor, {}, layout, PolicyTargets(*map(layout.to_slots, columns)), self.actor_lr(step - 1)
                    )
                metrics |= _last(out, "actor", mask[b].sum()) | {"actor/lr": self.actor_lr(step - 1)}
        lengths = {"prompt_lengths": np.array([len(prompts[g].token_ids) for g in sequences.group]),
                   "response_lengths": sequences.lengths}  # fmt: skip
        if not c.algorithm.bypass_old_logprobs:
            diff = mismatch_metrics(*map(jnp.asarray, (old_logprobs, rollout_logprobs, mask)))
            metrics |= {k: float(v) for k, v in diff.items()}
        metrics |= data_metrics(
            scores=reward, rewards_sum=reward, advantages=advantages, returns=returns, values=values,
            response_mask=mask, max_prompt_length=c.data.max_prompt_length,
            finished=np.array([r.finished for r in rollouts]), **lengths,
        )  # fmt: skip
        return metrics, lengths

    def _mini_batches(self, sequences: Sequences) -> list[np.ndarray]:
        """The sequences of each mini-batch: whole groups, in the order of the prompts."""
        size = self.config.actor.ppo_mini_batch_size
        return [np.flatnonzero(sequences.group // size == i) for i in range(len(sequences.prompts) // size)]

    def _loss_weights(self, mask: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        inside = np.zeros_like(mask)
        inside[chosen] = mask[chosen]
        return np.asarray(aggregation_weights(
            jnp.asarray(inside), self.config.actor.loss_agg_mode, num_tokens=int(inside.sum()),
            num_sequences=int(inside.any(axis=1).sum()), loss_scale_factor=mask.shape[1],
        )).astype(np.float32)  # fmt: skip

    def _pack(self, sequences: Sequences, chosen: Sequence[int]) -> Layout:
        c = self.config
        longest = c.data.max_prompt_length + c.data.max_response_length
        sizes = dict(row_length=c.row_length, rows_per_micro_batch=self.rows)
        most = max_micro_batches(c.data.train_batch_size * c.rollout.n, longest, **sizes)
        return pack(sequences, chosen, **sizes, max_micro_batches=most, share_prompt=c.trainer.share_prompt)

    def _sampling(self, n: int, temperature: float) -> Sampling:
        r = self.config.rollout
        whole = temperature == 0
        return Sampling(
            max_tokens=self.config.data.max_response_length, n=n, temperature=temperature,
            top_k=-1 if whole else r.top_k, top_p=1.0 if whole else r.top_p, stop_ids=(self.tokenizer.eos_token_id,),
        )  # fmt: skip

    def _score(self, prompts, rollouts, samples: Samples, step: int, split: str) -> list[Score]:
        texts = [self.tokenizer.decode(r.token_ids, skip_special_tokens=True) for r in rollouts]
        owners = [prompts[r.group] for r in rollouts]
        scores = self.scorer([
            Sample(prompt=p.text, response=text, ground_truth=p.ground_truth, data_source=p.data_source,
                   extra_info=p.extra_info, response_length=len(r.token_ids), finished=r.finished, messages=p.messages)
            for p, r, text in zip(owners, rollouts, texts, strict=True)
        ])  # fmt: skip
        samples.log(step, split=split, prompts=[p.text for p in owners], responses=texts,
                    ground_truths=[p.ground_truth for p in owners], rewards=[s.reward for s in scores],
                    data_sources=[p.data_source for p in owners])  # fmt: skip
        return scores

    def validate(self, step: int, samples: Samples) -> dict[str, float]:
        """Mean reward on the held-out problems with the current weights."""
        assert self.val is not None
        v, prompts = self.config.rollout.val, list(self.val)
        rollouts = self.engine.generate(prompts, self._sampling(v.n, v.temperature), seed=self.config.trainer.seed)
        scores = self._score(prompts, rollouts, samples, step, "val")
        sources = [prompts[r.group].data_source for r in rollouts]
        return validation_metrics(sources, [r.group for r in rollouts], [s.reward for s in scores], {})


def _optimizer(o: Optim) -> Optimizer:
    return make_optimizer(weight_decay=o.weight_decay, clip_grad=o.clip_grad)


def _schedule(o: Optim, steps: int):
    return lr_schedule(o.lr_scheduler_type, lr=o.lr, total_steps=steps, warmup_steps=o.lr_warmup_steps,
                       warmup_ratio=o.lr_warmup_steps_ratio, min_lr_ratio=o.min_lr_ratio)  # fmt: skip


def _padded(rows: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    out = np.zeros(shape, np.float32)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out


def _last(out: Tree, role: str, num_tokens: int) -> dict[str, float]:
    """Metrics of the last update of a step, its sums as means over trained tokens."""
    out = jax.device_get(out)
    return {
        **{f"{role}/{name}": float(x) / max(int(num_tokens), 1) for name, x in out["sums"].items()},
        **{f"{role}/{name}": float(x) for name, x in out["losses"].items()},
        f"{role}/grad_norm": float(out["grad_norm"]),
    }
