"""The scorer: all the rewards of a config, weighted and added up, between generation and the update.

Rewards are checked and started when the scorer is made, before training. While training, a reward that raises, hangs
or returns nonsense costs its sample, not the run: it is reported in the log and counted, unless `on_error="raise"`.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from jaxrl.link import Link
from jaxrl.rewards.builtin import REWARDS, check_arguments
from jaxrl.rewards.score import Sample, Score, combine, excerpt, score_one
from jaxrl.rewards.shared import Reward, shared
from jaxrl.rewards.workers import WorkerPool

_logger = logging.getLogger(__name__)
_MAX_REPORTS = 5  # failures of one reward that are logged with their sample, for each batch


class RewardError(RuntimeError):
    """A reward failed on a sample, and the scorer was told `on_error="raise"`."""


def make_scorer(
    specs: Sequence[tuple[str, float, Mapping[str, Any]]],
    *,
    error_reward: float = 0.0,
    on_error: str = "report",  # or raise
    timeout_s: float = 10.0,
    num_workers: int | None = None,
    max_concurrent: int = 64,
    started: Mapping[str, tuple[Reward, float]] | None = None,
    link: Link | None = None,
) -> Scorer:
    """The scorer of `specs`: for each reward its name, its weight, and its keyword arguments.

    A name is a key of `REWARDS` or `path/to/file.py:function`. Rewards in worker processes have `timeout_s` for each
    sample (a function of whole batches: for each call) and `num_workers` processes (by default one a core, at most 4);
    async functions score `max_concurrent` samples at once. `started` adds rewards that run already, each with its
    weight, under their names (a reward model). With a `link`, the processes of the run divide the samples of all but
    those among them. Raises a ValueError for a reward that is unknown, does not
    import, or does not take its arguments.
    """
    if not specs and not started:
        raise ValueError(f"there is no reward to score with; name one of {', '.join(REWARDS)}, or file.py:function.")
    if on_error not in ("report", "raise"):
        raise ValueError(f"on_error must be report or raise, not {on_error!r}.")
    if not timeout_s > 0 or not math.isfinite(error_reward):
        raise ValueError(f"timeout_s must be > 0 and error_reward finite, got {timeout_s} and {error_reward}.")
    if num_workers is None:
        num_workers = min(4, os.cpu_count() or 1)
    if num_workers < 1 or max_concurrent < 1:
        raise ValueError(f"num_workers and max_concurrent must be >= 1, got {num_workers} and {max_concurrent}.")
    for name, weight, _ in specs:
        if not math.isfinite(weight):
            raise ValueError(f"the weight of reward {name} must be a finite number, not {weight}.")

    rewards: dict[str, Reward] = {}
    weights: dict[str, float] = {}
    with ExitStack() as stack:  # closes the rewards before it if one does not start
        for name, weight, kwargs in specs:
            reward = _start(name, kwargs, timeout_s=timeout_s, num_workers=num_workers, max_concurrent=max_concurrent)
            stack.callback(reward.close)
            label = _label(name, rewards)
            rewards[label], weights[label] = shared(label, reward, link), weight
        stack.pop_all()
    for name, (reward, weight) in (started or {}).items():
        label = _label(name, rewards)
        rewards[label], weights[label] = reward, weight
    return Scorer(rewards, weights, error_reward=error_reward, on_error=on_error)


class Scorer:
    """Scores batches of samples; made by `make_scorer`, closed by `close` or at the end of a `with` block."""

    def __init__(
        self, rewards: Mapping[str, Reward], weights: Mapping[str, float], *, error_reward: float, on_error: str
    ):
        self._rewards, self._weights = rewards, weights
        self._error_reward, self._on_error = error_reward, on_error
        self.error_counts = dict.fromkeys(rewards, 0)  # failed samples of each reward since the start

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        """One score for each sample, in their order: the weighted sum of the rewards."""
        parts: dict[str, list[Score]] = {}
        for label, reward in self._rewards.items():
            parts[label] = reward.score(samples)
            self._report_failures(label, samples, parts[label])
        return combine(parts, self._weights, error_reward=self._error_reward)

    def close(self) -> None:
        """Ends worker processes and connections."""
        for reward in self._rewards.values():
            reward.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _report_failures(self, label: str, samples: Sequence[Sample], scores: list[Score]) -> None:
        failures = [number for number, score in enumerate(scores) if score.error is not None]
        self.error_counts[label] += len(failures)
        for number in failures[:_MAX_REPORTS]:
            report = f"reward {label} failed on sample {number} ({excerpt(samples[number])}): {scores[number].error}"
            if self._on_error == "raise":
                raise RewardError(report)
            _logger.warning("%s", report)
        if len(failures) > _MAX_REPORTS:
            _logger.warning("reward %s failed on %d of these %d samples", label, len(failures), len(samples))


class _Here:
    """A quick built-in, called in this process."""

    whole_batch = False

    def __init__(self, function: Callable[[Sample], Any]):
        self._function = function

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [score_one(self._function, sample) for sample in samples]

    def close(self) -> None:
        """Nothing to end."""


def _start(name: str, kwargs: Mapping[str, Any], **workers: Any) -> Reward:
    if name not in REWARDS:
        if ".py:" not in name:
            close = difflib.get_close_matches(name, REWARDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the built-in ones are {', '.join(REWARDS)}."
            raise ValueError(f"there is no reward {name}; {hint} Your own is named path/to/file.py:function.")
        return WorkerPool(name, kwargs, **workers)
    make, runs = REWARDS[name]
    if runs == "workers":
        return WorkerPool(name, kwargs, **workers)
    check_arguments(f"reward {name}", make, kwargs)
    return make(**kwargs) if runs == "service" else _Here(make(**kwargs))


def _label(name: str, taken: Mapping[str, Any]) -> str:
    """A short name for metrics: `function` of `path/to/file.py:function`, with a number if it is there already."""
    stem = name.rpartition(":")[2]
    label, number = stem, 1
    while label in taken:
        number += 1
        label = f"{stem}_{number}"
    return label
