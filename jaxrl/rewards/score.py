"""The records of scoring: a `Sample` goes in, a `Score` comes out, and `combine` adds several scores up.

Plain host Python. The trainer makes samples of its rollouts, `scorer.py` turns them into scores, and the rewards of
the scores become the token rewards of the update.
"""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One response to be scored, with all that a reward may want to know about it."""

    prompt: str  # the rendered prompt, chat template included
    response: str  # the decoded response, without special tokens
    ground_truth: Any
    data_source: str
    extra_info: dict[str, Any]
    response_length: int  # in tokens
    finished: bool  # ended by a stop token; False: cut at the length limit
    messages: list[dict[str, Any]] | None = None  # the conversation, when the prompt was one


@dataclass(frozen=True)
class Score:
    """What one sample earned. `reward` is always a float, so that a fractional reward is never cut to an integer."""

    reward: float
    metrics: dict[str, float] = field(default_factory=dict)  # further numbers, logged as reward/<name>/mean
    error: str | None = None  # why scoring this sample failed; `reward` is then the scorer's `error_reward`
    pred: str | None = None  # the answer that was read from the response, for a vote among those of a prompt (maj@k)

    def __post_init__(self):
        object.__setattr__(self, "reward", float(self.reward))


def combine(
    parts: Mapping[str, Sequence[Score]], weights: Mapping[str, float], *, error_reward: float = 0.0
) -> list[Score]:
    """The weighted sum of several scores of the same samples, in the order of the samples.

    A score computed elsewhere (a reward model's) joins as one more part: `[Score(float(r)) for r in rewards]`. With
    one part its metrics keep their names; with several, each part's reward becomes the metric `<part>` and its own
    metrics become `<part>/<metric>`. A sample that failed in any part gets `error_reward` and the reasons.
    """
    if not parts or set(parts) != set(weights):
        raise ValueError(f"each score needs one weight: the scores are {sorted(parts)}, the weights {sorted(weights)}.")
    lengths = {name: len(scores) for name, scores in parts.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"scores to combine must be of the same samples, but their numbers differ: {lengths}.")
    return [
        _combine_one(dict(zip(parts, scores, strict=True)), weights, error_reward)
        for scores in zip(*parts.values(), strict=True)
    ]


def _combine_one(parts: dict[str, Score], weights: Mapping[str, float], error_reward: float) -> Score:
    pred = next((score.pred for score in parts.values() if score.pred is not None), None)
    if len(parts) == 1:
        metrics = dict(next(iter(parts.values())).metrics)
    else:
        metrics = {name: score.reward for name, score in parts.items() if score.error is None}
        metrics |= {f"{name}/{key}": value for name, score in parts.items() for key, value in score.metrics.items()}
    errors = [f"{name}: {score.error}" for name, score in parts.items() if score.error is not None]
    if errors:
        return Score(error_reward, metrics, "; ".join(errors), pred)
    return Score(math.fsum(weights[name] * score.reward for name, score in parts.items()), metrics, pred=pred)


def score_of(result: Any) -> Score:
    """A `Score` from what a reward function returned: a number, a bool, or a dict with "score" and further metrics.

    Of the dict's other values the finite numbers become metrics, the text "pred" is the answer that was found, and
    other texts and the like are left out. A result that is no finite number gives a score with an error.
    """
    metrics: dict[str, float] = {}
    pred = None
    reward = result
    if isinstance(result, Mapping):
        if "score" not in result:
            return failed(f'it returned a dict without the key "score" (its keys: {sorted(map(str, result))})')
        reward = result["score"]
        pred = result["pred"] if isinstance(result.get("pred"), str) else None
        metrics = {str(key): _number(value) for key, value in result.items() if key != "score"}
        metrics = {key: value for key, value in metrics.items() if math.isfinite(value)}
    number = _number(reward)
    if not math.isfinite(number):
        kind = type(reward).__name__
        return failed(f"it returned {_shorten(repr(reward), 80)} ({kind}) as the score, which is not a finite number")
    return Score(number, metrics, pred=pred)


def score_one(function: Callable[[Any], Any], sample: Any, result_of: Callable[[Any], Any] = score_of) -> Any:
    """The score that `function` gives to `sample`; what it raises becomes the score's error."""
    try:
        result = function(sample)
    except Exception as error:
        return failed(describe(error))
    return result_of(result)


def _number(value: Any) -> float:
    """`value` as a float; NaN when it is not a number. Digits in a string are not a number here."""
    if isinstance(value, str | bytes):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def failed(reason: str) -> Score:
    """The score of a sample that could not be scored; `combine` puts in the scorer's `error_reward`."""
    return Score(0.0, error=_shorten(reason, 500))


def describe(error: BaseException) -> str:
    """An exception in one line: its type, its message, and the file and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {_shorten(str(error), 400)}{where}"


def excerpt(sample: Sample) -> str:
    """The sample in a few words for a log line: data source, ground truth, beginning of the response."""
    return (
        f"data_source {sample.data_source!r}, ground truth {_shorten(repr(sample.ground_truth), 80)}, "
        f"response {_shorten(repr(sample.response), 120)}"
    )


def _shorten(text: str, max_chars: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."
