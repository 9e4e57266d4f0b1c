"""What the trainer asks of an engine: take the weights of a version, and answer prompts with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..batch import Prompt, Rollout

Report = Callable[[int, int], None]  # (finished sequences, tokens so far)


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature=0` is greedy; `top_k=-1` and `top_p=1` leave the distribution whole."""

    max_tokens: int
    n: int = 1  # responses a prompt
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()


class Engine(Protocol):
    def update_weights(self, variables: Any, version: int) -> None:
        """Answer with these weights from now on."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, report: Report | None = None
    ) -> list[Rollout]:
        """`n` responses a prompt, in order: all of the first prompt, then all of the second. The same seed and
        weights give the same responses."""
        ...

    def close(self) -> None: ...
