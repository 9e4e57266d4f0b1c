"""Rewards of a run of several processes: every sample is scored once, by one of them, and all learn every score."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from jaxrl.link import Link
from jaxrl.rewards.score import Sample, Score


class Reward(Protocol):
    """One started reward, wherever it runs."""

    whole_batch: bool  # it looks at all samples of a call together, so they cannot be divided

    def score(self, samples: Sequence[Sample]) -> list[Score]: ...

    def close(self) -> None: ...


def shared(name: str, reward: Reward, link: Link | None) -> Reward:
    """`reward` itself in a run of one process."""
    return reward if link is None or link.num_processes == 1 else Shared(name, reward, link)


class Shared:
    """A reward whose samples are dealt out to the processes; one that wants the whole batch runs on process 0."""

    def __init__(self, name: str, reward: Reward, link: Link):
        self._name, self._reward, self._link = name, reward, link
        self.whole_batch = reward.whole_batch
        if self.whole_batch and not link.is_first:
            reward.close()

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        if self.whole_batch:
            mine = list(samples) if self._link.is_first else []
        else:
            mine = list(samples[self._link.process_id :: self._link.num_processes])
        scores = [dataclasses.asdict(score) for score in self._reward.score(mine)] if mine else []
        parts = self._link.gather(f"scores of {self._name}", scores)
        step = 1 if self.whole_batch else self._link.num_processes
        dealt = [parts[number % step][number // step] for number in range(len(samples))]
        return [Score(**score) for score in dealt]

    def close(self) -> None:
        if not self.whole_batch or self._link.is_first:
            self._reward.close()
