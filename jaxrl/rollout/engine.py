"""What the trainer asks of an engine: take the weights of a version, and answer prompts with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..batch import Prompt, Rollout

# (finished sequences, tokens so far). An engine that answers while it loads begins with (0, 0), when it has the requests.
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature=0` is greedy; `top_k=-1` and `top_p=1` leave the distribution whole."""

    max_tokens: int
    n: int = 1  # responses a prompt
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()  # a response ends with the first of them, and keeps it
    # What not every engine can do:
    stop: tuple[str, ...] = ()  # a response ends with the first of these texts, and keeps it
    bad_words: tuple[str, ...] = ()  # texts that are not produced
    guided: Mapping[str, Any] = field(default_factory=dict)  # {"regex": ..}, {"choice": [..]}, {"json": schema} ...
    max_tokens_each: tuple[int, ...] = ()  # one a prompt, where they differ; none above `max_tokens`

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens}: a response has at least 1 token")
        if self.n < 1:
            raise ValueError(f"n {self.n}: a prompt is answered at least once")
        if not self.temperature >= 0:
            raise ValueError(f"temperature {self.temperature}: set 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: set it above 0 and at most 1 (the whole distribution)")
        if self.top_k != -1 and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k}: set 1 or more, or -1 for the whole vocabulary")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"n {self.n} at temperature 0 would give {self.n} times the same response: "
                "set n to 1 or the temperature above 0"
            )
        if not all(isinstance(stop, int) and stop >= 0 for stop in self.stop_ids):
            raise ValueError(f"stop_ids {self.stop_ids}: token ids are whole numbers from 0 on")
        if self.max_tokens_each and not 1 <= min(self.max_tokens_each) <= max(self.max_tokens_each) <= self.max_tokens:
            raise ValueError(
                f"max_tokens_each {self.max_tokens_each}: each lies between 1 and max_tokens {self.max_tokens}"
            )
        if len(self.guided) > 1:
            raise ValueError(f"guided {dict(self.guided)}: one grammar at a time, {', '.join(self.guided)} are several")

    def refuse(self, names: Iterable[str], engine: str) -> None:
        """Raises ValueError where one of the settings `names`, which `engine` does not know, is used."""
        for name in names:
            if value := getattr(self, name):
                raise ValueError(f"{name} {value!r}: the {engine} engine cannot do that, set rollout.engine to vllm")


def check_prompt(prompt: Prompt, max_tokens: int, *, context: int, vocab_size: int) -> None:
    """Raises ValueError for a prompt that a model of this context and vocabulary cannot answer."""
    ids = prompt.token_ids
    if not len(ids):
        raise ValueError(f"the prompt of row {prompt.index} is empty: there is nothing to continue")
    if len(ids) + max_tokens > context:
        raise ValueError(
            f"the prompt of row {prompt.index} has {len(ids)} tokens, and with a response of up to {max_tokens} it is "
            f"longer than the model's context of {context}: shorten one of the two"
        )
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(
            f"the prompt of row {prompt.index} holds token {max(ids) if min(ids) >= 0 else min(ids)}, and the model's "
            f"vocabulary is 0 to {vocab_size - 1}: use the model's own tokenizer"
        )


class EngineLost(RuntimeError):
    """The engine cannot go on, for a reason that lies outside of this program: the message says it."""


class Engine(Protocol):
    @property
    def answers_while_it_loads(self) -> bool:
        """Whether `update_weights` may come while another thread is in `generate`."""
        ...

    @property
    def waited_s(self) -> float:
        """For how long the last update of the weights waited for answers, and did nothing else."""
        ...

    @property
    def weights_gb(self) -> float:
        """What the last update of the weights brought to the engine, in 2**30 bytes."""
        ...

    def update_weights(self, variables: Any, version: int) -> None:
        """Answer with these weights from now on."""
        ...

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, report: Report | None = None
    ) -> list[Rollout]:
        """`n` responses a prompt, in order: all of the first prompt, then all of the second. The same seed and
        weights give the same responses.

        Logprobs are of the distribution that was sampled from: after temperature, top-k and top-p. Greedy responses
        come with those at temperature 1. Raises ValueError for a prompt that the model cannot answer.
        """
        ...

    def sleep(self) -> None:
        """Give back the memory that answering takes, until the next `update_weights`."""
        ...

    def close(self) -> None: ...
