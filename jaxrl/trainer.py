"""The loop of RL: prompts -> rollouts -> rewards -> advantages -> critic and actor steps -> new weights for the engine.

`Trainer(config).fit()` is the whole run. `step` reads straight down in the order of the data; what the stages compute
lives in `collector.py` and `learner.py`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from typing import Any, cast

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from . import config as config_module
from . import preemption, run_folder
from .ahead import Ahead, empty_arrays
from .algorithms.aggregation import AGGREGATIONS
from .algorithms.choose import choose
from .checkpoint import Checkpoints
from .collector import Collector, Experience, sampling_of
from .config import Config
from .data import PromptDataset, PromptLoader, Truncation, tokenizer_of
from .distributed import check_same
from .doctor import NUM_PROMPTS, Doctor
from .gpu_memory import prepare_environment, takes_turns
from .learner import Learner, rows_of
from .link import Link
from .loggers import Metrics, Run, Samples, check_logger, process_log
from .metrics import (
    CompileCounter,
    Timer,
    memory_metrics,
    mfu_metrics,
    throughput_metrics,
    turn_metrics,
    validation_metrics,
)
from .models.flops import update_flops
from .parallel import generation_mesh, make_mesh, put_replicated
from .plan.check import check_fits, check_updates_fit, vllm_share_of
from .prepare import check_algorithm
from .progress import Progress, plot_rewards
from .reward_model import reward_model_of
from .rewards import Score, Scorer, make_scorer
from .rewards.custom import InThisProcess
from .rewards.shared import shared
from .roles import Roles, model_config, policy_loss
from .rollout.engine import Engine
from .rollout.jax_engine import JaxEngine
from .rollout.turns import Turns
from .rollout.vllm_engine import VllmEngine
from .sources import load_rows
from .topology import hardware_named
from .weights.live import open_model, with_tokenizer

Tree = Any
KERNELS = {"cudnn": "gpu", "splash": "tpu"}  # of model.attention, and where they run
log = logging.getLogger(__name__)


class Trainer:
    """One run, from a config to `runs/<name>/hf`. What is wrong with the config or the data raises ValueError here.

    `link` is that of `distributed.start`, where the run has several processes. All of them do the same; what must be
    decided or done once goes over `link`.

    Objects may stand in for what the config names: `model`, a live torch model of transformers or PEFT (or a path);
    `tokenizer`; `train_dataset` and `val_dataset`, a `datasets.Dataset` or a list of dicts; `reward`, a function in any
    form of `rewards/custom.py`, called in this process and added to the rewards of the config. `trains=False` is for who
    looks at engine and policy alone (`doctor`), and spares the updates' compilation.
    """

    def __init__(
        self,
        config: Config,
        link: Link | None = None,
        *,
        model: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        train_dataset: Any = None,
        val_dataset: Any = None,
        reward: Callable[..., Any] | None = None,
        trains: bool = True,
    ):
        config_module.check_sources(
            config, model=model is not None, train_dataset=train_dataset is not None, reward=reward is not None
        )
        prepare_environment(config)
        c = self.config = config
        self.link = Link() if link is None else link
        self.folder = c.run_dir
        self.checkpoints = Checkpoints(self.folder / "checkpoints", max_to_keep=c.trainer.max_ckpt_to_keep)
        # Decided once: process 0 may begin to write before another one looks.
        self.start: tuple[str, int] | None = self.link.first(
            "where to start", lambda: run_folder.where_to_start(c, self.checkpoints.latest())
        )
        self.source = open_model(c.model.path if model is None else model, c.model.lora_adapter_path)
        self.tokenizer = self._tokenizer(tokenizer)
        self.stop_ids = _stop_ids(self.tokenizer, self.source.generation_config)
        self.mesh = make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
        train = self._dataset("train", train_dataset)
        self.loader = PromptLoader(
            train, prompts_per_step=c.data.train_batch_size, seed=c.data.seed, shuffle=c.data.shuffle
        )
        has_val = val_dataset is not None or c.data.val_files is not None
        self.val = self._dataset("val", val_dataset) if has_val else None
        check_same(self.link, "the data", {
            "data.train_files": f"data of fingerprint {train.fingerprint}",
            "data.val_files": self.val and f"data of fingerprint {self.val.fingerprint}",
        })  # fmt: skip
        self.steps = c.trainer.total_training_steps or c.trainer.total_epochs * self.loader.steps_per_epoch
        if self.link.is_first:
            rows = rows_of(c, self.mesh, c.actor.ppo_max_token_len_per_gpu)
            print(config_module.describe(c, num_rows=rows, steps=self.steps, num_prompts=len(train)), flush=True)
        self._check_choices()
        self.reward_model = reward_model_of(c, self.mesh)
        self.scorer = self._make_scorer(reward)
        self.compiles = CompileCounter()
        self.roles = Roles(c, self.mesh, self.source, steps=self.steps)
        check_fits(c, self.roles, self.reward_model)
        if trains and (self.start is None or self.start[1] < self.steps):
            check_updates_fit(c, self.roles, self.reward_model)
        if self.reward_model is not None:
            self.reward_model.load()
        self.roles.load(resumed=self.start is not None)
        self.learner = Learner(c, self.roles)
        waiting = None
        if self.start is not None:
            waiting = self._restore(*self.start)
            self._say_where_it_goes_on(self.start[1])
        self.engine = self._make_engine()
        with ExitStack() as undo:  # the servers of a run that cannot begin end now, and not with this process
            undo.enter_context(closing(self.engine))
            undo.enter_context(self.scorer)
            self.turns = self._make_turns()
            if self.turns is not None:
                undo.enter_context(closing(self.turns))
            self.collector = Collector(
                c, self.engine.generate if self.turns is None else self.turns.generate, self.scorer, self.loader,
                self.tokenizer, stop_ids=self.stop_ids, begins=self.link.at,
            )  # fmt: skip
            self.ahead = Ahead(self.collector.collect, ahead=c.trainer.trainer_mode == "one_step_off", last=self.steps)
            if waiting is not None:
                self.ahead.restore(*waiting, prompt_of=train.of_row, text_of=self.collector.text_of)
            if c.rollout.max_probs_diff is not None:
                self._check_agreement(c.rollout.max_probs_diff)
            undo.pop_all()

    # What is made at the start.

    def _tokenizer(self, given: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
        """The tokenizer that was handed over, which is then exported too, or the model's own."""
        if given is not None:
            self.source = with_tokenizer(self.source, given)
            return given
        if self.source.tokenizer is None:
            raise ValueError(f"{self.source.name} brings no tokenizer: hand it over too, Trainer(..., tokenizer=...)")
        return tokenizer_of(self.source.tokenizer)

    def _dataset(self, split: str, given: Any) -> PromptDataset:
        d = self.config.data
        files, kwargs = (d.train_files, d.train_kwargs) if split == "train" else (d.val_files, d.val_kwargs)
        files, kwargs = files if given is None else given, dict(kwargs)
        is_task = isinstance(files, str) and files.startswith("task:")
        rows_split = kwargs.pop("split", {"train": "train", "val": "test"}[split] if is_task else None)
        rows = load_rows(files, split=rows_split, kwargs=kwargs)
        return PromptDataset(
            rows, self.tokenizer, max_prompt_length=d.max_prompt_length, prompt_key=d.prompt_key,
            ground_truth_key=d.ground_truth_key, filter_overlong_prompts=d.filter_overlong_prompts,
            truncation=cast(Truncation, d.truncation), system_prompt=d.system_prompt, chat=d.chat,
            apply_chat_template_kwargs=dict(d.apply_chat_template_kwargs), name=f"data.{split}_files",
        )  # fmt: skip

    def _check_choices(self) -> None:
        """What names mean is known to modules that the config does not import: asked here, before weights are loaded."""
        c = self.config
        choose(AGGREGATIONS, c.actor.loss_agg_mode, "actor.loss_agg_mode")
        choose(AGGREGATIONS, c.critic_loss_agg_mode, "critic.loss_agg_mode")
        policy_loss(c)
        check_algorithm(c.algorithm)  # both raise where a name is not known
        for name in c.trainer.logger:
            check_logger(name)
        for section, settings in (("rollout", c.rollout), ("rollout.val_kwargs", c.rollout.val_kwargs)):
            try:
                sampling_of(settings, max_tokens=c.data.max_response_length, stop_ids=self.stop_ids)
            except ValueError as error:  # it begins with the name of the setting
                raise ValueError(f"{section}.{error}") from None
        platform, kernel = jax.default_backend(), KERNELS.get(c.model.attention)
        if kernel not in (None, platform):
            raise ValueError(
                f"model.attention {c.model.attention} is a kernel of a {kernel}, and the devices here are of kind {platform}: "
                "set model.attention=xla"
            )
        if c.trainer.trainer_mode == "one_step_off":
            self._check_ahead()
        if c.max_length > (most := model_config(c.model, self.source.hf_config).max_position):
            raise ValueError(
                f"data.max_prompt_length + data.max_response_length = {c.max_length} is more than the {most} tokens of the "
                f"context of {self.source.name}: lower one of them"
            )

    def _check_ahead(self) -> None:
        """Refuses to collect in a thread of its own what takes part in collectives, which then come in any order."""
        c, what = self.config, None
        if c.rollout.engine == "jax":
            what = "rollout.engine jax"
        elif c.reward.model.path is not None:
            what = "a reward model"
        if self.mesh.size > 1 and what is not None:
            raise ValueError(
                f"trainer.trainer_mode one_step_off is not for {what} on the {self.mesh.size} devices of training: two "
                "programs at a time could wait for each other for ever, set trainer.trainer_mode=sync, or let servers "
                "answer (rollout.engine=vllm, reward.functions)"
            )

    def _make_scorer(self, given: Callable[..., Any] | None) -> Scorer:
        r = self.config.reward
        started = {}
        if given is not None:
            here = InThisProcess(given, timeout_s=r.timeout_s, max_concurrent=64)
            started["reward"] = shared("reward", here, self.link), 1.0
        if self.reward_model is not None:
            started["model"] = self.reward_model, r.model.weight
        return make_scorer(
            [(f.name, f.weight, dict(f.kwargs)) for f in r.functions], error_reward=r.error_reward,
            on_error=r.on_error, timeout_s=r.timeout_s, started=started, link=self.link,
        )  # fmt: skip

    def _make_engine(self) -> Engine:
        c, model = self.config, self.roles.model
        if c.rollout.engine == "jax":
            mesh = generation_mesh(self.mesh, c.rollout.tensor_model_parallel_size)
            return JaxEngine(model, mesh, max_num_seqs=c.rollout.max_num_seqs)
        share = vllm_share_of(c, self.roles, self.reward_model)
        settings = dataclasses.replace(c.rollout.vllm, gpu_memory_utilization=share)
        return VllmEngine(
            model, self.mesh, settings, source=self.source, folder=self.folder / "vllm",
            max_model_len=c.max_length, max_num_seqs=c.rollout.max_num_seqs, link=self.link, sleeps=takes_turns(c),
        )  # fmt: skip

    def _make_turns(self) -> Turns | None:
        m = self.config.rollout.multi_turn
        if m.function is None:
            return None
        return Turns(
            self.engine, self.tokenizer, m.function, kwargs=m.kwargs, max_assistant_turns=m.max_assistant_turns,
            timeout_s=m.timeout_s, template_kwargs=self.config.data.apply_chat_template_kwargs, link=self.link,
        )  # fmt: skip

    def doctor(self) -> Doctor:
        """Who tells whether the engine and the trainer agree, on the first prompts of the data."""
        prompts = [self.loader.dataset[i] for i in range(min(NUM_PROMPTS, len(self.loader.dataset)))]
        return Doctor(
            self.config, self.roles.policy, self.engine, self.tokenizer, prompts,
            generation_config=self.source.generation_config, sampling=self.collector.sampling(self.config.rollout),
        )  # fmt: skip

    def _check_agreement(self, bound: float) -> None:
        variables = self.roles.actor_variables()
        self.engine.update_weights(variables, 0 if self.start is None else self.start[1])
        found = self.doctor().examine(variables)
        if not found.probs_mean <= bound:
            raise ValueError(
                f"engine and trainer differ by {found.probs_mean:.2g} in the mean probability of a sampled token, more "
                f"than rollout.max_probs_diff {bound:g}. {found.sentence}"
            )

    # Checkpoints: all that the steps after this one depend on.

    def _save(self, step: int) -> None:
        arrays, waiting = self.ahead.state(self._empty_arrays())
        meta = {"step": step, "loader": self.loader.state(), "kl_coef": self.learner.kl_coef, "waiting": waiting}
        self.checkpoints.save(step, self.roles.state() | put_replicated(self.mesh, arrays), meta)

    def _restore(self, folder: str, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Also gives back the samples that waited for the next step, as `Ahead.state` gave them."""
        empty = put_replicated(self.mesh, self._empty_arrays())
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), empty)
        state, meta = Checkpoints(folder).restore(step, self.roles.abstract_state() | abstract)
        arrays = {name: np.asarray(state.pop(name).addressable_data(0)) for name in empty}
        self.roles.restore(state)
        self.loader.restore(meta["loader"])
        if self.config.algorithm.kl_ctrl.type != "fixed":
            self.learner.kl_coef = meta["kl_coef"]
        return (arrays, meta["waiting"]) if meta.get("waiting") else None

    def _say_where_it_goes_on(self, step: int) -> None:
        log.info("going on from step %d", step)
        if not self.link.is_first:
            return
        print(f"Going on after step {step} of {self.steps}, from a checkpoint.")
        if step >= self.steps:
            print(
                f"All {self.steps} steps were taken before: nothing is left to train, and hf/ is written again. Raise "
                "trainer.total_training_steps or total_epochs to go on, or name another trainer.experiment_name to begin anew."
            )

    def _empty_arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint holds of the samples that wait for the next step: nothing where none ever do."""
        c = self.config
        if c.trainer.trainer_mode == "sync":
            return {}
        return empty_arrays(c.data.train_batch_size * c.rollout.n, c.data.max_response_length)

    # The run.

    def fit(self) -> dict[str, float]:
        """Train, validate, export. Returns the metrics of the last step that was run.

        After SIGTERM it saves a checkpoint at the end of the step and raises SystemExit.
        """
        with preemption.Preemption() as sigterm, process_log(self.folder, self.link.process_id):
            log.info("%s of %d, with %d of %d devices", self.link.name, self.link.num_processes,
                     jax.local_device_count(), jax.device_count())  # fmt: skip
            values = self._train(sigterm)
            self.roles.export(self.folder)
        if self.link.is_first:
            print(f"Done: {self.folder / 'hf'} is the trained model.")
            if "jsonl" in self.config.trainer.logger:
                print(f"{plot_rewards(self.folder)} is its reward by step.")
        return values

    def _train(self, sigterm: preemption.Preemption) -> dict[str, float]:
        """All steps, with their validations and checkpoints."""
        c = self.config
        first = 0 if self.start is None else self.start[1]
        if self.link.is_first:
            run_folder.claim(c)
        run = Run(self.folder, c.trainer.project_name, c.trainer.experiment_name, config_module.to_dict(c),
                  c.trainer.total_epochs, self.steps, first + 1 if first else 0)  # fmt: skip
        values, step, stop, saving = {}, first, False, Timer(self.link.at)
        shown = self.link.is_first
        with ExitStack() as ends:
            ends.enter_context(closing(self.checkpoints))
            # The engine ends before the export, which makes a copy where it merges adapters.
            ends.enter_context(closing(self.engine))
            ends.enter_context(self.scorer)
            if self.turns is not None:
                ends.enter_context(closing(self.turns))
            progress = ends.enter_context(Progress(self.steps, completed=first, shown=shown))
            ends.enter_context(closing(self.ahead))  # the first to end: it may be using the others
            metrics, samples = Metrics(run, c.trainer.logger, print_line=progress.print), Samples(run)
            self.engine.update_weights(self.roles.actor_variables(), first)
            if self.val is not None and c.trainer.val_before_train and first == 0:
                metrics.log(0, self.validate(0, samples))
            for step in range(first + 1, self.steps + 1):
                values = self.step(step, samples, progress) | saving.metrics()  # of the save after the step before
                metrics.log(step, values)
                saving = Timer(self.link.at)
                stop = any(self.link.gather("whether SIGTERM came", sigterm.noticed)) and step < self.steps
                # After the log: a run that goes on from this checkpoint has the step in its files.
                if stop or c.trainer.save_freq > 0 and (step == self.steps or step % c.trainer.save_freq == 0):
                    with saving("save_checkpoint"):
                        self._save(step)
                progress.completed(step)
                self.link.finished(step)
                log.info("step %d of %d took %.1f s", step, self.steps, values["timing_s/step"])
                self.checkpoints.check()  # a disk that is full is news now, not with the next save
                if stop:
                    break
            self.checkpoints.wait()
            metrics.close()
            samples.close()
        if stop:
            log.warning("SIGTERM: saved step %d; the same command goes on from there", step)
            raise SystemExit(preemption.EXIT_CODE)
        return values

    def step(self, step: int, samples: Samples, progress: Progress) -> dict[str, float]:
        """One RL step: from the next prompts to new weights in the engine, and a validation when it is due."""
        c, timer, compiled = self.config, Timer(self.link.at), self.compiles.count
        is_last = step == self.steps
        with timer("step"):
            e = self.ahead.take(step, progress, timer.seconds)
            staleness = self._staleness(step, e)
            self._log(samples, step, "train", e)
            if c.engine_sleeps:
                with timer("sleep"):
                    self.engine.sleep()
            metrics = self.learner.step(step, e.prompts, e.rollouts, e.scores, e.baselines, timer)
            asked_s = 0.0
            if self.engine.answers_while_it_loads:
                asked_s = self.ahead.wait_until_asked()
            else:
                metrics |= self.ahead.wait(timer.seconds)
            with timer("update_weights"):
                self.engine.update_weights(self.roles.actor_variables(), step)
            timer.seconds["update_weights"] -= self.engine.waited_s
            metrics |= self.ahead.wait(timer.seconds, asked_s + self.engine.waited_s)
        if self.val is not None and (is_last or (c.trainer.test_freq > 0 and step % c.trainer.test_freq == 0)):
            with timer("testing"):
                metrics |= self.validate(step, samples)
        metrics |= self._speed_metrics(e, timer.seconds) | timer.metrics() | memory_metrics()
        metrics |= _reward_metrics(e.scores) | e.metrics
        if self.turns is not None:
            metrics |= turn_metrics([r.num_turns for r in e.rollouts], self.turns.take_errors())
        return metrics | {
            "training/global_step": step,
            "training/epoch": e.epoch,
            "training/staleness": staleness,
            "perf/recompiles": self.compiles.count - compiled,
            "perf/update_weights_gb": self.engine.weights_gb,
        }

    def _speed_metrics(self, e: Experience, seconds: Mapping[str, float]) -> dict[str, float]:
        """Tokens a second; and how much of its peak the hardware reached in the updates, in bfloat16 on a known device."""
        c, roles, hardware = self.config, self.roles, hardware_named(jax.devices()[0].device_kind)
        prompt_lengths = np.array([len(e.prompts[r.group].token_ids) for r in e.rollouts])
        lengths = prompt_lengths, np.array([len(r.token_ids) for r in e.rollouts])
        throughput = throughput_metrics(*lengths, seconds=seconds, num_devices=self.mesh.size)
        if hardware is None or c.model.compute_dtype != "bfloat16":
            return throughput
        flops = {"actor": c.actor.ppo_epochs * update_flops(roles.model, *lengths, frozen=roles.has_adapters)}
        if self.roles.needs_critic:
            flops["critic"] = c.critic_ppo_epochs * update_flops(roles.critic.config, *lengths, head="score")
        return throughput | mfu_metrics(flops, seconds=seconds, num_devices=self.mesh.size, peak=hardware.flops)

    def validate(self, step: int, samples: Samples) -> dict[str, float]:
        """Rewards on the held-out problems with the weights that the engine has."""
        assert self.val is not None
        prompts, errors = list(self.val), 0
        metrics: dict[str, float] = {}
        validations = self.config.validations
        for name, greedy in validations.items():
            e = self.collector.held_out(prompts, greedy=greedy)
            self._log(samples, step, name, e)
            found = _validation_metrics(e)
            if len(validations) > 1 and not greedy:  # of samples, mean@1 is of prompts where one alone has that number
                found = {key: x for key, x in found.items() if not key.endswith("/mean@1")}
            metrics |= found
            errors += sum(score.error is not None for score in e.scores)
        return metrics | {"val-aux/reward_errors": errors}

    def _staleness(self, step: int, e: Experience) -> int:
        """How many updates the weights that sampled are behind; samples of any other weights enter no batch."""
        behind = {step - 1 - rollout.weights_version for rollout in e.rollouts}
        if not behind <= {0, 1 if self.config.trainer.trainer_mode == "one_step_off" else 0}:
            raise RuntimeError(
                f"step {step} was given samples of the weights of version {sorted(step - 1 - n for n in behind)}, and "
                f"the policy is version {step - 1}: the engine does not answer with the weights that it was given"
            )
        return max(behind)

    def _log(self, samples: Samples, step: int, split: str, e: Experience) -> None:
        owners = [e.prompts[r.group] for r in e.rollouts]
        samples.log(step, split=split, prompts=[p.text for p in owners], responses=e.texts,
                    ground_truths=[p.ground_truth for p in owners], rewards=[s.reward for s in e.scores],
                    data_sources=[p.data_source for p in owners])  # fmt: skip


def _stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    """Where a response ends: the tokenizer's end, and those that the model's generation config names."""
    own: Any = tokenizer.eos_token_id
    named = generation_config.get("eos_token_id") or []
    stops = {named} if isinstance(named, int) else set(named)
    return tuple(sorted(stops if own is None else stops | {own}))


def _validation_metrics(e: Experience) -> dict[str, float]:
    names = sorted({name for score in e.scores for name in score.metrics})
    columns: dict[str, list] = {name: [_measured(s, name) for s in e.scores] for name in names}
    if any(s.pred is not None for s in e.scores):
        columns["pred"] = [s.pred for s in e.scores]
    return validation_metrics(
        [e.prompts[r.group].data_source for r in e.rollouts], [r.group for r in e.rollouts],
        [s.reward for s in e.scores], columns,
    )  # fmt: skip


def _measured(score: Score, name: str) -> float | None:
    """A number of a sample that was scored. Where scoring failed the answer counts as wrong, and not as never given."""
    return score.metrics.get(name, 0.0 if name == "acc" and score.error is not None else None)


def _reward_metrics(scores: list[Score]) -> dict[str, float]:
    names = sorted({name for score in scores for name in score.metrics})
    means = {n: float(np.mean([s.metrics[n] for s in scores if n in s.metrics])) for n in names}
    failed = sum(score.error is not None for score in scores)
    return {f"reward/{name}/mean": mean for name, mean in means.items()} | {"reward/errors": failed}
