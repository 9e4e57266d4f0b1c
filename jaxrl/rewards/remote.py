"""Scores from an HTTP service: a reward model, a judge, a sandbox that runs somewhere else.

A batch of samples goes out as the JSON `{"samples": [{"prompt": .., "response": .., "ground_truth": .., ...}, ..]}`,
with all fields of `Sample`; `{"scores": [0.5, {"score": 1.0, "some_metric": 3}, ..]}` comes back, one for each sample.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import tenacity

from jaxrl.rewards.score import Sample, Score, describe, failed, score_of

_logger = logging.getLogger(__name__)
_BUSY = 429


class Remote:
    """The reward of an HTTP service.

    Up to `concurrency` batches of `batch_size` samples are under way at once. A batch that meets a network error, no
    answer for `timeout_s`, or a status of 429 or 500 and above is sent again, at most `retries` times, after
    `backoff_s`, 2 `backoff_s`, 4 `backoff_s`, ...; any other answer that is not as above is an error at once.
    `token_env` names an environment variable that holds a bearer token, so that no config has to hold it.
    """

    whole_batch = False

    def __init__(
        self,
        *,
        url: str,
        batch_size: int = 64,
        concurrency: int = 4,
        timeout_s: float = 60.0,
        retries: int = 3,
        backoff_s: float = 1.0,
        token_env: str | None = None,
    ):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the reward remote needs a url that begins with http:// or https://, not {url!r}.")
        if batch_size < 1 or concurrency < 1 or retries < 0 or timeout_s <= 0 or backoff_s < 0:
            raise ValueError(
                "the reward remote needs batch_size >= 1, concurrency >= 1, retries >= 0, timeout_s > 0 and "
                f"backoff_s >= 0, got {batch_size}, {concurrency}, {retries}, {timeout_s} and {backoff_s}."
            )
        if token_env is not None and token_env not in os.environ:
            raise ValueError(f"the reward remote needs the environment variable {token_env} to hold its token.")
        headers = {"Content-Type": "application/json"}
        if token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[token_env]}"
        self._url, self._batch_size = url, batch_size
        self._client = httpx.Client(headers=headers, timeout=timeout_s)
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="remote-reward")
        self._post = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(retries + 1),
            wait=tenacity.wait_exponential(multiplier=backoff_s, max=60.0),
            retry=tenacity.retry_if_exception(_is_passing),
            before_sleep=self._log_retry,
            reraise=True,
        ).wraps(self._post_once)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score for each sample, in their order."""
        batches = [samples[i : i + self._batch_size] for i in range(0, len(samples), self._batch_size)]
        return [score for scores in self._threads.map(self._score_batch, batches) for score in scores]

    def close(self) -> None:
        """Ends the threads and the connections."""
        self._threads.shutdown()
        self._client.close()

    def _score_batch(self, samples: Sequence[Sample]) -> list[Score]:
        try:
            results = self._post(_to_json(samples), len(samples))
        except (httpx.HTTPError, ValueError) as error:
            return [failed(f"{self._url}: {describe(error)}")] * len(samples)
        return [score_of(result) for result in results]

    def _post_once(self, body: str, num_samples: int) -> list[Any]:
        response = self._client.post(self._url, content=body)
        if not response.is_success:
            response.raise_for_status()
        return _results(response.text, num_samples)

    def _log_retry(self, state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None
        error = state.outcome.exception()
        _logger.warning(
            "reward service %s: %s: %s; trying again in %.1f s",
            self._url, type(error).__name__, error, state.next_action.sleep,
        )  # fmt: skip


def _is_passing(error: BaseException) -> bool:
    """Whether the same request may well succeed later."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code == _BUSY or error.response.is_server_error
    return isinstance(error, httpx.TransportError)


def _results(text: str, num_samples: int) -> list[Any]:
    """The scores in the service's answer; a ValueError says how the answer is not what it should be."""
    beginning = repr(text[:100])
    try:
        answer = json.loads(text)
    except ValueError:
        raise ValueError(f"the service answered {beginning}, which is not JSON") from None
    if not isinstance(answer, Mapping) or not isinstance(answer.get("scores"), list):
        raise ValueError(f'the service answered {beginning} instead of {{"scores": [..]}}')
    if len(answer["scores"]) != num_samples:
        raise ValueError(f"the service answered {len(answer['scores'])} scores to {num_samples} samples")
    return answer["scores"]


def _to_json(samples: Sequence[Sample]) -> str:
    return json.dumps({"samples": [dataclasses.asdict(sample) for sample in samples]}, default=_plain, allow_nan=False)


def _plain(value: Any) -> Any:
    """What JSON has no word for: the NumPy values that a parquet file's columns hold."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise ValueError(f"a sample holds a {type(value).__name__}, which JSON cannot express")
