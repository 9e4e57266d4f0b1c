"""The numbers of a step under verl's names, from host arrays.

`trainer.py` gathers what these functions return and hands it to `Metrics.log` of `loggers.py`, once a step.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

NUM_BOOTSTRAPS = 1000
GIB = 1024**3  # verl's "gb"


def data_metrics(
    *,
    scores: Float[np.ndarray, "B"],
    rewards_sum: Float[np.ndarray, "B"],
    advantages: Float[np.ndarray, "B T"],
    returns: Float[np.ndarray, "B T"],
    values: Float[np.ndarray, "B T"] | None,
    response_mask: Bool[np.ndarray, "B T"],
    prompt_lengths: Int[np.ndarray, "B"],
    response_lengths: Int[np.ndarray, "B"],
    max_prompt_length: int,
    finished: Bool[np.ndarray, "B"],
) -> dict[str, float]:
    """What a batch of rollouts looks like. `scores` are the rewards as given, `rewards_sum` after the KL penalty.

    An aborted response has no tokens; it counts in the lengths and nowhere else. `response_length/clip_ratio` is the
    share that was cut at the length limit. `values` is None where there is no critic.
    """
    ran = response_lengths > 0
    metrics = {
        **_mean_max_min("critic/score", scores[ran]),
        **_mean_max_min("critic/rewards", rewards_sum[ran]),
        **_mean_max_min("critic/advantages", advantages[response_mask]),
        **_mean_max_min("critic/returns", returns[response_mask]),
        **_mean_max_min("response_length", response_lengths),
        "response_length/clip_ratio": float(np.mean(~finished)),
        **_mean_max_min("response_length_non_aborted", response_lengths[ran]),
        "response/aborted_ratio": float(np.mean(~ran)),
        **_mean_max_min("prompt_length", prompt_lengths),
        "prompt_length/clip_ratio": float(np.mean(prompt_lengths == max_prompt_length)),
    }
    if values is not None:
        metrics |= _mean_max_min("critic/values", values[response_mask])
        if response_mask.sum() > 1:
            metrics["critic/vf_explained_var"] = explained_variance(returns[response_mask], values[response_mask])
    return metrics


def explained_variance(returns: Float[np.ndarray, "N"], values: Float[np.ndarray, "N"]) -> float:
    """1 - var(returns - values) / (var(returns) + 1e-5), unbiased variances: 1 if perfect, 0 if constant."""
    returns, values = returns.astype(np.float64), values.astype(np.float64)
    return float(1.0 - np.var(returns - values, ddof=1) / (np.var(returns, ddof=1) + 1e-5))


def throughput_metrics(
    prompt_lengths: Int[np.ndarray, "B"],
    response_lengths: Int[np.ndarray, "B"],
    *,
    seconds: Mapping[str, float],
    num_devices: int,
) -> dict[str, int | float]:
    """Tokens a second and device, and milliseconds a token for each stage, from `Timer.seconds` of a whole step.

    `gen` is divided by the response tokens, every other stage by prompt and response tokens.
    """
    num_response = int(response_lengths.sum())
    num_tokens = num_response + int(prompt_lengths.sum())
    metrics = {
        "perf/total_num_tokens": num_tokens,
        "perf/time_per_step": seconds["step"],
        "perf/throughput": num_tokens / (seconds["step"] * num_devices),
    }
    for stage in ("gen", "ref", "values", "adv", "update_critic", "update_actor"):
        if stage in seconds:
            divisor = num_response if stage == "gen" else num_tokens
            metrics[f"timing_per_token_ms/{stage}"] = seconds[stage] * 1000 / divisor
    return metrics


def mfu_metrics(
    flops: Mapping[str, float], *, seconds: Mapping[str, float], num_devices: int, peak: float
) -> dict[str, float]:
    """Model FLOPs utilisation of each role's updates: `flops` (`models/flops.py`) a second, over the `peak` of a device."""
    updates = {role: seconds.get(f"update_{role}") for role in flops}
    return {f"perf/mfu/{role}": flops[role] / (s * num_devices * peak) for role, s in updates.items() if s}


def gap_metrics(sums: Mapping[str, Any], largest: Mapping[str, Any], num_tokens: int) -> dict[str, float]:
    """What `correction.mismatch_metrics` says of probabilities, from the sums of `update._gap` over `num_tokens`."""
    n = max(num_tokens, 1)
    mean = {name: float(x) / n for name, x in sums.items()}
    var = {name: max(0.0, mean[f"{name}2"] - mean[name] ** 2) for name in ("rollout", "ours", "signed", "gap")}
    # From the variance of the difference: the covariance itself would drown in rounding where the two are close.
    scale = 2 * math.sqrt(var["rollout"] * var["ours"])
    return {
        "training/rollout_probs_diff_mean": mean["gap"],
        "training/rollout_probs_diff_max": float(largest["gap"]),
        "training/rollout_probs_diff_std": math.sqrt(var["gap"] * n / max(n - 1, 1)),
        "training/rollout_actor_probs_pearson_corr": (var["rollout"] + var["ours"] - var["signed"]) / scale
        if scale
        else 0.0,
    }


def turn_metrics(num_turns: Sequence[int], num_errors: int) -> dict[str, float]:
    """How often the model spoke in a response, and how many calls of the user's function failed."""
    return {**_mean_max_min("num_turns", np.asarray(num_turns)), "num_turns/errors": num_errors}


def memory_metrics() -> dict[str, float]:
    """The peak on the fullest device of this process (on CPU nobody counts it), and the memory in use on the host."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    metrics = {}
    for name, key in (("allocated", "peak_bytes_in_use"), ("reserved", "peak_pool_bytes")):
        if peaks := [s[key] for s in stats if key in s]:
            metrics[f"perf/max_memory_{name}_gb"] = max(peaks) / GIB
    meminfo = Path("/proc/meminfo")  # Linux
    if meminfo.exists():
        kib = {line.split(":")[0]: int(line.split()[1]) for line in meminfo.read_text().splitlines()}
        metrics["perf/cpu_memory_used_gb"] = (kib["MemTotal"] - kib["MemAvailable"]) * 1024 / GIB
    return metrics


def validation_metrics(
    data_sources: Sequence[str],
    prompt_ids: Sequence[Hashable],
    scores: Sequence[int | float],
    extra: Mapping[str, Sequence[int | float | str | None]],
    *,
    seed: int = 42,
) -> dict[str, float]:
    """verl's `val-core|val-aux/<source>/<variable>/<metric>`, all arguments one entry a sample.

    The variables are `reward` (`scores`, whatever `extra` has under that name) and the numbers in `extra` (None: this
    sample has none). For the k samples of
    a prompt: `mean@k`, and with k > 1 `std@k`, `best@n/mean|std` and `worst@n/mean|std` for n = 2, 4, 8, ..., k, by
    1000 draws of n samples with replacement; with the strings `extra["pred"]` (the answers given) also `maj@n`, the
    value of the commonest answer. Then the mean over the prompts of a source. Core are mean, best and maj at the
    largest k of the variable `acc`, or of `reward` where there is no `acc`.
    """
    samples_of: dict[tuple[str, Hashable], list[int]] = defaultdict(list)
    for i, key in enumerate(zip(data_sources, prompt_ids, strict=True)):
        samples_of[key].append(i)
    answers = extra.get("pred")
    columns = {name: x for name, x in extra.items() if name != "pred"} | {"reward": scores}
    of_prompts: dict[tuple[str, str], dict[_Metric, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (source, _), samples in samples_of.items():
        for variable, column in columns.items():
            if measured := [i for i in samples if column[i] is not None]:
                values = np.asarray([column[i] for i in measured], np.float64)
                votes = None if answers is None else [answers[i] for i in measured]
                for metric, value in _metrics_of_a_prompt(values, votes, seed).items():
                    of_prompts[source, variable][metric].append(value)

    result = {}
    for (source, variable), metrics in of_prompts.items():
        core = "acc" if (source, "acc") in of_prompts else "reward"
        most = max(metric.n for metric in metrics)
        for metric, values in metrics.items():
            is_core = variable == core and metric.n == most and metric.kind in ("mean", "best", "maj")
            section = "val-core" if is_core else "val-aux"
            result[f"{section}/{source}/{variable}/{metric.name}"] = float(np.mean(values))
    return result


class _Metric(NamedTuple):
    """Of the samples of a prompt: `mean@4`, `best@2/std`."""

    kind: str
    n: int
    statistic: str | None = None  # of many draws of n

    @property
    def name(self) -> str:
        return f"{self.kind}@{self.n}" + (f"/{self.statistic}" if self.statistic else "")


class Timer:
    """Wall-clock seconds by stage: `with timer("gen"): ...`. A stage that is entered again adds up.

    Devices run behind the host: what is timed must fetch a result, or it times the dispatch. `begins` hears of every
    stage that begins.
    """

    def __init__(self, begins: Callable[[str], None] = lambda stage: None) -> None:
        self.seconds: dict[str, float] = {}
        self._begins = begins

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._begins(stage)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        return {f"timing_s/{stage}": seconds for stage, seconds in self.seconds.items()}


class CompileCounter:
    """How many programs XLA has compiled in this process since this was made (`perf/recompiles` counts them by step).

    After warm-up a step compiles nothing; where it does, a shape or a sharding has changed.
    """

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def _mean_max_min(name: str, x: np.ndarray) -> dict[str, float]:
    if x.size == 0:
        return {}
    return {
        f"{name}/mean": float(np.mean(x, dtype=np.float64)),
        f"{name}/max": float(x.max()),
        f"{name}/min": float(x.min()),
    }


def _metrics_of_a_prompt(values: np.ndarray, answers: list[Any] | None, seed: int) -> dict[_Metric, float]:
    k = len(values)
    metrics = {_Metric("mean", k): float(values.mean())}
    if k == 1:
        return metrics
    metrics[_Metric("std", k)] = float(values.std())
    for n in [*(2**i for i in range(1, k.bit_length()) if 2**i < k), k]:
        draws = _draws(k, n, seed)
        drawn = {"best": values[draws].max(axis=1), "worst": values[draws].min(axis=1)}
        if answers is not None:
            drawn["maj"] = _of_the_commonest(values, answers, draws)
        for kind, result in drawn.items():
            metrics[_Metric(kind, n, "mean")] = float(result.mean())
            metrics[_Metric(kind, n, "std")] = float(result.std())
    return metrics


@lru_cache(maxsize=64)
def _draws(k: int, n: int, seed: int) -> np.ndarray:
    """[1000, n] of 0..k-1. RandomState and this order because verl has them: the same samples give the same numbers."""
    return np.random.RandomState(seed).choice(k, size=(NUM_BOOTSTRAPS, n), replace=True)


def _of_the_commonest(values: np.ndarray, answers: list[Any], draws: np.ndarray) -> np.ndarray:
    """For each draw, the value of the first sample whose answer is the commonest; of equally common ones the first."""
    number_of: dict[Any, int] = {}
    codes = np.asarray([number_of.setdefault(answer, len(number_of)) for answer in answers])[draws]
    votes = (codes[:, :, None] == codes[:, None, :]).sum(axis=2)
    return values[draws[np.arange(len(draws)), votes.argmax(axis=1)]]
