"""A user's own reward, named `path/to/file.py:function`: found, checked against the forms it may have, and called.

This is what a worker process of `workers.py` runs; a built-in that runs in workers passes through here too.
The form is told by the parameter names:

    f(sample)                                                          one jaxrl `Sample`
    f(data_source, solution_str, ground_truth, extra_info=None)        one sample, verl's way
    f(samples)                                                         the whole batch
    f(data_sources, solution_strs, ground_truths, extra_infos)         the whole batch, verl's way

each as `def` or `async def`, with further keyword arguments from the config. A function may leave out those of verl's
parameters that it does not use. It returns, for a sample, a number, a bool, or a dict with "score" and metrics.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxrl.rewards.builtin import REWARDS, check_arguments
from jaxrl.rewards.score import Sample, Score, describe, failed, score_of, score_one
from jaxrl.user_code import import_function

Emit = Callable[[int, Score], None]  # called once for each sample: its place in the batch, its score
Kind = Literal["sample", "batch", "concurrent"]

_OF_SAMPLE: dict[str, Callable[[Sample], Any]] = {
    "sample": lambda sample: sample,
    "data_source": lambda sample: sample.data_source,
    "solution_str": lambda sample: sample.response,
    "ground_truth": lambda sample: sample.ground_truth,
    "extra_info": lambda sample: sample.extra_info,
}
_OF_BATCH: dict[str, Callable[[list[Sample]], Any]] = {
    "samples": lambda samples: samples,
    "data_sources": lambda samples: [sample.data_source for sample in samples],
    "solution_strs": lambda samples: [sample.response for sample in samples],
    "ground_truths": lambda samples: [sample.ground_truth for sample in samples],
    "extra_infos": lambda samples: [sample.extra_info for sample in samples],
}


@dataclass(frozen=True)
class RewardFunction:
    """A reward ready to run. `kind` says what may share a call: one sample, a batch, or samples on an event loop."""

    kind: Kind
    run: Callable[[list[Sample], Emit], None]


def load(name: str, kwargs: Mapping[str, Any], *, timeout_s: float, max_concurrent: int) -> RewardFunction:
    """The reward `name` with its configured arguments; a ValueError says what is wrong with it."""
    if name in REWARDS:
        make = REWARDS[name].make
        check_arguments(f"reward {name}", make, kwargs)
        return one_by_one(make(**kwargs))
    return bind(import_function(name, "reward"), name, kwargs, timeout_s=timeout_s, max_concurrent=max_concurrent)


def bind(
    function: Callable[..., Any], name: str, kwargs: Mapping[str, Any], *, timeout_s: float, max_concurrent: int
) -> RewardFunction:
    """A function as a reward, its form told by its parameters; `name` is for messages."""
    parameters = inspect.signature(function).parameters
    of_batch = [key for key in _OF_BATCH if key in parameters]
    of_sample = [key for key in _OF_SAMPLE if key in parameters]
    if not of_batch and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        of_sample = [key for key in _OF_SAMPLE if key != "sample" or key in parameters]  # as verl passes them: all
    if bool(of_batch) == bool(of_sample):
        raise ValueError(
            f"reward function {name}{inspect.signature(function)} must take either `sample` or verl's `solution_str`, "
            "`ground_truth`, ..., or for whole batches `samples` or verl's `solution_strs`, `ground_truths`, ...."
        )
    check_arguments(f"reward function {name}", function, kwargs, *of_batch, *of_sample)

    def call_sample(sample: Sample) -> Any:
        return function(**{key: _OF_SAMPLE[key](sample) for key in of_sample}, **kwargs)

    def call_batch(samples: list[Sample]) -> Any:
        return function(**{key: _OF_BATCH[key](samples) for key in of_batch}, **kwargs)

    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    if of_batch:
        loop = asyncio.Runner() if is_async else None
        return _whole_batch(lambda samples: loop.run(call_batch(samples)) if loop else call_batch(samples))
    if is_async:
        return concurrently(call_sample, timeout_s, max_concurrent)
    return one_by_one(call_sample)


class InThisProcess:
    """A function that was handed over in Python, called here: what it hangs on, the run hangs on."""

    def __init__(self, function: Callable[..., Any], *, timeout_s: float, max_concurrent: int):
        name = getattr(function, "__name__", type(function).__name__)
        self._function = bind(function, name, {}, timeout_s=timeout_s, max_concurrent=max_concurrent)
        self.whole_batch = self._function.kind == "batch"

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score for each sample, in their order."""
        scores: dict[int, Score] = {}
        self._function.run(list(samples), scores.__setitem__)
        return [scores[place] for place in range(len(samples))]

    def close(self) -> None:
        """Nothing to end."""


def one_by_one(call: Callable[[Any], Any], result_of: Callable[[Any], Any] = score_of) -> RewardFunction:
    def run(samples: list[Any], emit: Emit) -> None:
        for place, sample in enumerate(samples):
            emit(place, score_one(call, sample, result_of))

    return RewardFunction("sample", run)


def _whole_batch(call: Callable[[list[Sample]], Any]) -> RewardFunction:
    def scores(samples: list[Sample]) -> list[Score]:
        try:
            results = list(call(samples))
        except Exception as error:
            return [failed(describe(error))] * len(samples)
        if len(results) != len(samples):
            return [failed(f"it returned {len(results)} results for {len(samples)} samples")] * len(samples)
        return [score_of(result) for result in results]

    def run(samples: list[Sample], emit: Emit) -> None:
        for place, score in enumerate(scores(samples)):
            emit(place, score)

    return RewardFunction("batch", run)


def concurrently(
    call: Callable[[Any], Any], timeout_s: float, max_concurrent: int, result_of: Callable[[Any], Any] = score_of
) -> RewardFunction:
    loop = asyncio.Runner()  # one loop for the life of the worker, so that a user's HTTP client may live as long

    async def score(sample: Any) -> Any:
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                result = await call(sample)
        except (Exception, asyncio.CancelledError) as error:
            return timed_out(timeout_s) if limit.expired() else failed(describe(error))
        return result_of(result)

    async def score_all(samples: list[Any], emit: Emit) -> None:
        slots = asyncio.Semaphore(max_concurrent)

        async def score_in_turn(place: int, sample: Any) -> None:
            async with slots:
                emit(place, await score(sample))

        await asyncio.gather(*(score_in_turn(place, sample) for place, sample in enumerate(samples)))

    return RewardFunction("concurrent", lambda samples, emit: loop.run(score_all(samples, emit)))


def timed_out(timeout_s: float) -> Score:
    """The score of a sample whose reward gave no answer in time."""
    return failed(f"no answer within {timeout_s:g} s")
