"""The half of a step that collects: the next prompts, their responses, and what these earned.

`Collector.collect` needs of the run nothing but the weights that the engine has. So it can be asked for the next step's
experience while this one's trains (`ahead.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from .batch import Prompt, Rollout
from .config import Config, RolloutSection, ValKwargs
from .data import PromptLoader
from .metrics import Timer
from .prepare import ingredients
from .progress import Progress
from .rewards import Sample, Score, Scorer
from .rollout.engine import Sampling
from .rollout.turns import SEED_STRIDE

MAX_FRUITLESS = 500  # prompts in a row without a group that teaches anything: it is the reward then, not chance
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experience:
    """What a step learns from."""

    prompts: list[Prompt]  # P of them
    rollouts: list[Rollout]  # B = P x G, in the order of the prompts
    scores: list[Score]  # [B]
    texts: list[str]  # [B] responses without special tokens
    epoch: int
    baselines: np.ndarray | None = None  # float32 [P], scores of greedy responses, where the estimator asks for them
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # by phase


def sampling_of(
    settings: RolloutSection | ValKwargs, *, max_tokens: int, stop_ids: tuple[int, ...], greedy: bool = False
) -> Sampling:
    """How the section `rollout`, or its `val_kwargs`, says to sample."""
    if greedy or settings.temperature == 0:
        return Sampling(max_tokens=max_tokens, temperature=0.0, stop_ids=stop_ids)
    return Sampling(
        max_tokens=max_tokens, n=settings.n, temperature=settings.temperature, top_k=settings.top_k,
        top_p=settings.top_p, stop_ids=stop_ids,
    )  # fmt: skip


class Collector:
    """`generate` is an engine's, or that of `turns.Turns`."""

    def __init__(
        self, config: Config, generate: Callable[..., list[Rollout]], scorer: Scorer, loader: PromptLoader,
        tokenizer: PreTrainedTokenizerBase, *, stop_ids: tuple[int, ...],
        begins: Callable[[str], None] = lambda stage: None,
    ):  # fmt: skip
        self.config, self.generate, self.scorer, self.loader, self.tokenizer = (
            config, generate, scorer, loader, tokenizer
        )  # fmt: skip
        self.stop_ids, self.begins = stop_ids, begins
        self.needs_baselines = "baselines" in ingredients(config.algorithm)

    def collect(self, step: int, progress: Progress, asked: Callable[[], None]) -> Experience:
        """The experience of a step: the same for the same weights and position in the data, whenever it is asked for.

        `asked` is called, perhaps often, as soon as the engine reports anything: then it has the first requests.
        """
        c, timer, seed = self.config, Timer(self.begins), self.config.trainer.seed * 1_000_003 + step
        sampling = self.sampling(c.rollout)
        with timer("collect"):
            e = self._answered(next(self.loader), sampling, seed, progress, timer, asked)
            if c.algorithm.filter_groups.enable:
                e = self._fill_up(e, sampling, seed, progress, timer)
            if self.needs_baselines:
                with timer("gen"):
                    greedy = self.generate(e.prompts, self.sampling(c.rollout, greedy=True), seed=0)
                with timer("reward"):
                    rewards = [score.reward for score in self.score(e.prompts, greedy)[1]]
                e = replace(e, baselines=np.array(rewards, np.float32))
        return replace(e, seconds=timer.seconds)

    def held_out(self, prompts: list[Prompt], *, greedy: bool) -> Experience:
        """The answers to a validation set: greedy ones, or as `rollout.val_kwargs` says."""
        sampling = self.sampling(self.config.rollout.val_kwargs, greedy=greedy)
        rollouts = self.generate(prompts, sampling, seed=self.config.trainer.seed)
        texts, scores = self.score(prompts, rollouts)
        return Experience(prompts, rollouts, scores, texts, self.loader.epoch)

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> tuple[list[str], list[Score]]:
        """The text of each rollout, without special tokens, and what it earned."""
        texts = [self.text_of(rollout) for rollout in rollouts]
        owners = [prompts[r.group] for r in rollouts]
        return texts, self.scorer([
            Sample(prompt=p.text, response=text, ground_truth=p.ground_truth, data_source=p.data_source,
                   extra_info=p.extra_info, response_length=len(r.token_ids), finished=r.finished, messages=p.messages)
            for p, r, text in zip(owners, rollouts, texts, strict=True)
        ])  # fmt: skip

    def text_of(self, rollout: Rollout) -> str:
        return str(self.tokenizer.decode(rollout.token_ids, skip_special_tokens=True))

    def sampling(self, settings: RolloutSection | ValKwargs, *, greedy: bool = False) -> Sampling:
        """How to answer, as a section says or greedily, and with what the run says of texts and of the stop."""
        r, most = self.config.rollout, self.config.data.max_response_length
        sampling = sampling_of(settings, max_tokens=most, stop_ids=self.stop_ids, greedy=greedy)
        return replace(sampling, stop=r.stop, bad_words=r.bad_words, guided=r.guided)

    def _answered(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        seed: int,
        progress: Progress,
        timer: Timer,
        asked: Callable[[], None] = lambda: None,
    ) -> Experience:
        with timer("gen"), progress.generation(len(prompts) * sampling.n) as show:

            def report(num_finished: int, num_tokens: int) -> None:
                asked()
                show(num_finished, num_tokens)

            rollouts = self.generate(prompts, sampling, seed=seed, report=report)
        with timer("reward"):
            texts, scores = self.score(prompts, rollouts)
        return Experience(prompts, rollouts, scores, texts, self.loader.epoch)

    def _fill_up(self, e: Experience, sampling: Sampling, seed: int, progress: Progress, timer: Timer) -> Experience:
        """DAPO's dynamic sampling (arXiv:2503.14476, section 3.2): groups whose responses all earned the same teach
        nothing. They are left out, and more prompts are answered until there are enough for a step."""
        f, wanted = self.config.algorithm.filter_groups, self.config.data.train_batch_size
        prompts, rollouts, texts, scores = [], [], [], []
        num_batches = num_seen = fruitless = 0
        while True:
            num_batches, num_seen = num_batches + 1, num_seen + len(e.prompts)
            usable = _groups_that_differ(e.rollouts, e.scores, f.metric)
            for group in usable:
                if len(prompts) < wanted:
                    prompts.append(e.prompts[e.rollouts[group[0]].group])
                    rollouts += [replace(e.rollouts[b], group=len(prompts) - 1) for b in group]
                    texts += [e.texts[b] for b in group]
                    scores += [e.scores[b] for b in group]
            if len(prompts) == wanted:
                break
            fruitless = 0 if usable else fruitless + len(e.prompts)
            if f.max_num_gen_batches == 0 and fruitless >= MAX_FRUITLESS:
                raise ValueError(
                    f"algorithm.filter_groups: of {fruitless} prompts in a row all responses to each had the same {f.metric}, "
                    "so that there is nothing to learn from: look at the reward, or take easier or harder problems"
                )
            log.info("%d of %d groups after %d batches of prompts", len(prompts), wanted, num_batches)
            if num_batches == f.max_num_gen_batches:
                raise ValueError(
                    f"after {num_batches} batches of prompts only {len(prompts)} of {wanted} groups have responses that "
                    f"differ in {f.metric}: the problems are too easy or too hard for the model, or raise "
                    "algorithm.filter_groups.max_num_gen_batches (0: no limit)"
                )
            again = seed + num_batches * SEED_STRIDE * 1009  # other numbers than those of a later turn
            e = self._answered(next(self.loader), sampling, again, progress, timer)
        metrics = {"train/num_gen_batches": float(num_batches), "train/num_prompts_sampled": float(num_seen)}
        return replace(e, prompts=prompts, rollouts=rollouts, texts=texts, scores=scores, metrics=metrics)


def _groups_that_differ(rollouts: Sequence[Rollout], scores: Sequence[Score], metric: str) -> list[list[int]]:
    """The responses, by group, of the groups in which not all have the same value of `metric`."""
    groups: dict[int, list[int]] = {}
    for b, rollout in enumerate(rollouts):
        groups.setdefault(rollout.group, []).append(b)
    values = [_value(score, metric) for score in scores]
    return [group for group in groups.values() if len({values[b] for b in group}) > 1]


def _value(score: Score, metric: str) -> float:
    if metric == "score" or (metric == "reward" and metric not in score.metrics):  # the latter is verl's word
        return score.reward
    if metric not in score.metrics:
        known = ", ".join(["score", *score.metrics])
        raise ValueError(f"algorithm.filter_groups.metric {metric!r} is not among what the reward returns: {known}")
    return score.metrics[metric]
