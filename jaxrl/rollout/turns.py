"""Several turns: a user's function looks at what the model said, and may append text and ask for more.

`Turns.generate` stands in for an engine's. Each turn is one call of the engine over the responses that go on, whose
prompts are then prompt + response so far. What a function appends is tokenised once, by itself: no token of the model is
ever tokenised again. It is seen by the tokens after it and trained on by none (`Rollout.response_mask`).

The function runs in worker processes, as rewards do: it may hang or crash, and it keeps no state between calls.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from ..batch import Prompt, Rollout
from ..link import Link
from ..rewards.builtin import check_arguments
from ..rewards.custom import RewardFunction, concurrently, one_by_one
from ..rewards.score import Score, failed
from ..rewards.workers import WorkerPool
from ..user_code import import_function
from .engine import Engine, Report, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
MAX_REPORTS = 5  # failures that are logged one by one, for each turn
SEED_STRIDE = 1_000_000_007  # between the seeds of two turns
MARK = "jaxrl5f1c"  # what stands for the model's words where the chat template's are looked for


@dataclass(frozen=True)
class Turn:
    """What the function is given. It returns None (the response is over), a text, or one or more chat messages."""

    number: int  # how many times the model has spoken: 1, 2, ...
    text: str  # what it said last, without special tokens
    response: str  # the whole response so far, appended texts included
    token_ids: list[int]  # of the response so far
    prompt: str  # as rendered
    messages: list[dict[str, Any]] | None  # of the prompt, where it was a conversation
    ground_truth: Any
    data_source: str
    extra_info: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What it returned: `text` as it stands, or `messages` in the words of the chat template; both None: no more."""

    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    error: str | None = None  # why there is no reply


def load(name: str, kwargs: Mapping[str, Any], *, timeout_s: float, max_concurrent: int) -> RewardFunction:
    """The user's function as a worker process runs it. Raises ValueError in one sentence."""
    function = import_function(name, "rollout.multi_turn.function")
    first = next(iter(inspect.signature(function).parameters), None)
    if first is None:
        raise ValueError(f"rollout.multi_turn.function {name} must take the turn as its first argument")
    check_arguments(f"rollout.multi_turn.function {name}", function, kwargs, first)

    def call(turn: Turn) -> Any:
        return function(turn, **kwargs)

    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return concurrently(call, timeout_s, max_concurrent, reply_of)
    return one_by_one(call, reply_of)


def reply_of(result: Any) -> Reply | Score:
    """What a function's result means; a `Score` with the error where it means nothing."""
    if result is None or isinstance(result, str):
        return Reply(text=result)
    messages = [result] if isinstance(result, Mapping) else result
    if (
        isinstance(messages, list | tuple)
        and messages
        and all(isinstance(m, Mapping) and "role" in m for m in messages)
    ):
        return Reply(messages=[dict(m) for m in messages])
    return failed(f"it returned {result!r}, which is neither None, a text, nor messages with a role and content")


class Turns:
    """`function` (`path/to/file.py:function`) between an engine and who asks for responses.

    A response ends when the function returns None, after `max_assistant_turns` turns of the model (None: no limit),
    or where no room is left for another token. `template_kwargs` go to the chat template. Raises ValueError where the
    function cannot be loaded.
    """

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, function: str, *, kwargs: Mapping[str, Any],
        max_assistant_turns: int | None, timeout_s: float, template_kwargs: Mapping[str, Any],
        link: Link | None = None,
    ):  # fmt: skip
        self.engine, self.tokenizer, self.function = engine, tokenizer, function
        self.max_turns, self.template_kwargs = max_assistant_turns, dict(template_kwargs)
        workers = min(4, os.cpu_count() or 1)
        self.pool = WorkerPool(
            function, kwargs, timeout_s=timeout_s, num_workers=workers, max_concurrent=64,
            load=load, what="rollout.multi_turn.function",
        )  # fmt: skip
        self.link = Link() if link is None else link
        self.errors = 0  # calls of the function that failed and have not been counted yet

    def take_errors(self) -> int:
        """How many calls of the function have failed since this was asked last."""
        errors, self.errors = self.errors, 0
        return errors

    def close(self) -> None:
        self.pool.close()

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, report: Report | None = None
    ) -> list[Rollout]:
        """As `Engine.generate`; `sampling.max_tokens` bounds the whole response, appended texts included."""
        rollouts = self.engine.generate(prompts, sampling, seed=seed, report=report)
        going, number = range(len(rollouts)), 1
        while going := self._more(prompts, rollouts, going, number, sampling.max_tokens):
            number += 1
            so_far = [_continued(prompts[rollouts[b].group], rollouts[b]) for b in going]
            room = [sampling.max_tokens - len(rollouts[b].token_ids) for b in going]
            answers = self.engine.generate(
                so_far, replace(sampling, n=1, max_tokens=max(room), max_tokens_each=tuple(room)),
                seed=seed + (number - 1) * SEED_STRIDE, report=_offset(report, rollouts, len(going)),
            )  # fmt: skip
            for b, answer in zip(going, answers, strict=True):
                rollouts[b] = _joined(rollouts[b], answer)
        return rollouts

    def _more(
        self, prompts: Sequence[Prompt], rollouts: list[Rollout], going: Sequence[int], number: int, max_tokens: int
    ) -> list[int]:
        """Which of `going` speak again; what the function appends to them is in `rollouts` then."""
        if self.max_turns is not None and number >= self.max_turns:
            return []
        asked = [b for b in going if rollouts[b].finished]  # the others have used up their tokens
        turns = [self._turn(prompts[rollouts[b].group], rollouts[b], number) for b in asked]
        # Asked once, so that all processes of a run go on with the same.
        replies = [Reply(**r) for r in self.link.first("replies", lambda: [asdict(r) for r in self._ask(turns)])]
        self._report_failures(asked, replies)
        more = []
        for b, reply in zip(asked, replies, strict=True):
            if reply.text is None and reply.messages is None:
                continue
            ids = self._tokenize(reply, int(rollouts[b].token_ids[-1]))
            if len(rollouts[b].token_ids) + len(ids) < max_tokens:
                rollouts[b] = _appended(rollouts[b], ids)
                more.append(b)
            else:
                rollouts[b] = replace(rollouts[b], finished=False)  # it was to go on, and has no room
        return more

    def _ask(self, turns: list[Turn]) -> list[Reply]:
        answers = self.pool.score(turns)
        return [Reply(error=answer.error) if isinstance(answer, Score) else answer for answer in answers]

    def _turn(self, prompt: Prompt, rollout: Rollout, number: int) -> Turn:
        produced = np.flatnonzero(~rollout.response_mask)
        start = produced[-1] + 1 if len(produced) else 0  # after what was appended last

        def decode(ids: np.ndarray) -> str:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))

        return Turn(
            number, decode(rollout.token_ids[start:]), decode(rollout.token_ids), rollout.token_ids.tolist(),
            prompt.text, prompt.messages, prompt.ground_truth, prompt.data_source, prompt.extra_info,
        )  # fmt: skip

    def _tokenize(self, reply: Reply, last_id: int) -> list[int]:
        text = reply.text if reply.messages is None else self._rendered(reply.messages, last_id)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    def _rendered(self, messages: list[dict[str, Any]], last_id: int) -> str:
        """What the chat template writes between the model's words, which ended with the token `last_id`, and its next."""
        dialogue = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}, *messages]
        kwargs = {"add_generation_prompt": True, **self.template_kwargs}
        try:
            text = str(self.tokenizer.apply_chat_template(dialogue, tokenize=False, **kwargs))
        except (TemplateError, ValueError) as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise ValueError(
                f"rollout.multi_turn.function {self.function} returned messages ({roles}) that the chat template of the "
                f"model does not take ({error}): return a text instead"
            ) from None
        return text.rpartition(MARK)[2].removeprefix(str(self.tokenizer.decode([last_id])))

    def _report_failures(self, asked: list[int], replies: list[Reply]) -> None:
        failures = [(b, reply) for b, reply in zip(asked, replies, strict=True) if reply.error is not None]
        self.errors += len(failures)
        for b, reply in failures[:MAX_REPORTS]:
            log.warning("rollout.multi_turn.function failed on response %d, which ends here: %s", b, reply.error)
        if len(failures) > MAX_REPORTS:
            log.warning("rollout.multi_turn.function failed on %d of %d responses", len(failures), len(asked))


def _continued(prompt: Prompt, rollout: Rollout) -> Prompt:
    return replace(prompt, token_ids=[*prompt.token_ids, *rollout.token_ids.tolist()])


def _appended(rollout: Rollout, ids: list[int]) -> Rollout:
    """With `ids`, which the model did not produce, behind it."""
    return replace(
        rollout,
        token_ids=np.concatenate([rollout.token_ids, np.array(ids, np.int32)]),
        logprobs=np.concatenate([rollout.logprobs, np.zeros(len(ids), np.float32)]),
        response_mask=np.concatenate([rollout.response_mask, np.zeros(len(ids), bool)]),
    )


def _joined(rollout: Rollout, answer: Rollout) -> Rollout:
    """One response of the two. Its version is the older one's, where the engine was given new weights in between."""
    return replace(
        rollout,
        token_ids=np.concatenate([rollout.token_ids, answer.token_ids]),
        logprobs=np.concatenate([rollout.logprobs, answer.logprobs]),
        response_mask=np.concatenate([rollout.response_mask, answer.response_mask]),
        finished=answer.finished,
        weights_version=min(rollout.weights_version, answer.weights_version),
        num_turns=rollout.num_turns + 1,
    )


def _offset(report: Report | None, rollouts: list[Rollout], num_going: int) -> Report | None:
    if report is None:
        return None
    done, tokens = len(rollouts) - num_going, sum(int(r.response_mask.sum()) for r in rollouts)
    return lambda num_finished, num_tokens: report(done + num_finished, tokens + num_tokens)
