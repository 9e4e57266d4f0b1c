"""One step ahead: the experience of the next step is collected in a thread while this one's trains.

What is collected during step k is learned from in step k + 1. It comes from the weights that step k began with, so its
samples are one version old, and never more: the engine takes new weights only between two steps. It does so after
`wait`, or, where it can, when it has the requests and none of them waits any more: what is asked after that, as another
turn, is answered with the new weights.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from .batch import Prompt, Rollout
from .collector import Experience
from .progress import Progress
from .rewards import Score

Arrays = dict[str, np.ndarray]
Collect = Callable[[int, Progress, Callable[[], None]], Experience]  # `Collector.collect`


class Ahead:
    """Hands out the experience of each step up to `last`: with `ahead` before it is asked for, else when it is."""

    def __init__(self, collect: Collect, *, ahead: bool, last: int):
        self._collect, self._ahead, self._last = collect, ahead, last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="collect")
        self._pending: Future[Experience] | None = None
        self._asked = threading.Event()  # set when the engine has the requests of what is pending
        self.ready: Experience | None = None  # of the next step, if it is there

    def take(self, step: int, progress: Progress, seconds: dict[str, float]) -> Experience:
        """The experience of `step`; begins with the next one's. What was collected here and now is added to `seconds`."""
        assert self._pending is None, "take before wait"
        experience, self.ready = self.ready, None
        if experience is None:
            experience = self._collect(step, progress, lambda: None)
            _add(seconds, experience.seconds)
        if self._ahead and step < self._last:
            self._asked = asked = threading.Event()
            self._pending = self._thread.submit(self._collect, step + 1, progress, asked.set)
            self._pending.add_done_callback(lambda _: asked.set())
        return experience

    def wait_until_asked(self) -> float:
        """Until the engine has the requests of what is collected: before it takes new weights, as they are for the old.
        Returns the seconds that it took."""
        start = time.perf_counter()
        if self._pending is not None:
            self._asked.wait()
        return time.perf_counter() - start

    def wait(self, seconds: dict[str, float], waited_s: float = 0.0) -> dict[str, float]:
        """Until the engine is idle, which was waited for `waited_s` before. `perf/overlap_s` is how long it worked while
        something else did."""
        if self._pending is None:
            return {}
        start = time.perf_counter()
        pending, self._pending = self._pending, None
        self.ready = pending.result()
        waited = waited_s + time.perf_counter() - start
        _add(seconds, self.ready.seconds | {"wait": waited})
        return {"perf/overlap_s": max(0.0, self.ready.seconds["collect"] - waited)}

    def close(self) -> None:
        """Waits for what is under way, and forgets it."""
        self._thread.shutdown()
        self._pending = None

    # What a checkpoint holds, so that a run goes on with the very samples that were waiting.

    def state(self, shapes: dict[str, np.ndarray]) -> tuple[Arrays, dict[str, Any] | None]:
        """Arrays of the shapes and dtypes of `array_shapes`, and the rest as JSON; zeros and None where nothing waits."""
        if (e := self.ready) is None:
            return shapes, None
        arrays = {name: x.copy() for name, x in shapes.items()}
        for b, rollout in enumerate(e.rollouts):
            length = len(rollout.token_ids)
            arrays["token_ids"][b, :length] = rollout.token_ids
            arrays["logprobs"][b, :length] = rollout.logprobs
            arrays["response_mask"][b, :length] = rollout.response_mask
        return arrays, {
            "prompts": [prompt.index for prompt in e.prompts],
            "rollouts": [[r.group, len(r.token_ids), r.finished, r.weights_version, r.num_turns] for r in e.rollouts],
            "scores": [[score.reward, score.metrics, score.error, score.pred] for score in e.scores],
            "baselines": None if e.baselines is None else e.baselines.tolist(), "epoch": e.epoch,
            "metrics": e.metrics,
        }  # fmt: skip

    def restore(
        self, arrays: Arrays, meta: dict[str, Any], *, prompt_of: Callable[[int], Prompt],
        text_of: Callable[[Rollout], str],
    ) -> None:  # fmt: skip
        """Makes what `state` gave ready again. `prompt_of` gives the prompt of a row of the dataset."""
        rollouts = [
            Rollout(
                group, arrays["token_ids"][b, :length], arrays["logprobs"][b, :length], finished, version,
                arrays["response_mask"][b, :length], num_turns,
            )
            for b, (group, length, finished, version, num_turns) in enumerate(meta["rollouts"])
        ]  # fmt: skip
        scores = [Score(*fields) for fields in meta["scores"]]
        baselines = None if meta["baselines"] is None else np.array(meta["baselines"], np.float32)
        prompts = [prompt_of(index) for index in meta["prompts"]]
        texts = [text_of(rollout) for rollout in rollouts]
        self.ready = Experience(prompts, rollouts, scores, texts, meta["epoch"], baselines, meta["metrics"])


def empty_arrays(num_sequences: int, max_tokens: int) -> Arrays:
    """What `Ahead.state` fills: of these shapes and dtypes is a checkpoint."""
    shape = (num_sequences, max_tokens)
    return {
        "token_ids": np.zeros(shape, np.int32), "logprobs": np.zeros(shape, np.float32),
        "response_mask": np.zeros(shape, bool),
    }  # fmt: skip


def _add(seconds: dict[str, float], more: dict[str, float]) -> None:
    for phase, s in more.items():
        seconds[phase] = seconds.get(phase, 0.0) + s
