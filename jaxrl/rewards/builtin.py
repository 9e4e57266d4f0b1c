"""The built-in rewards. Each entry of `REWARDS` makes, from a config's keyword arguments, the function that scores.

The arguments are checked when the function is made, which is before training. The rewards that evaluate what a model
wrote (`math_verify`, `reasoning_gym`) run in worker processes, because such an evaluation may never end.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, NamedTuple

from jaxrl.rewards.score import Sample

_GSM8K_TAIL_CHARS = 300
_GSM8K_NUMBER = r"(-?[0-9.,]+)"
# A minus counts as a sign unless it follows a number, a word or a bracket: "10-3" holds 10 and 3, "x=-3" holds -3.
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-\u2212])?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
_THINK_ANSWER = r"<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>"


def gsm8k(*, method: str = "strict", score: float = 1.0, format_score: float = 0.0) -> Callable[[Sample], float]:
    """GSM8K as verl scores it (`verl/utils/reward_score/gsm8k.py`), its narrowness included.

    Both methods read the last 300 characters. "strict" takes the last `#### number` and strips commas, "flexible" the
    last number as it stands. The number's text must equal the ground truth's: `72.` is not `72`, `#### $72` is no
    answer. Another number earns `format_score`, no number 0.
    """
    if method not in ("strict", "flexible"):
        raise ValueError(f"gsm8k knows the methods strict and flexible, not {method!r}.")
    pattern = re.compile(f"#### {_GSM8K_NUMBER}" if method == "strict" else _GSM8K_NUMBER)

    def reward(sample: Sample) -> float:
        numbers: list[str] = pattern.findall(sample.response[-_GSM8K_TAIL_CHARS:])
        if not numbers:
            return 0.0
        if method == "strict":
            answer = numbers[-1].replace(",", "")
        else:
            answer = next((number for number in reversed(numbers) if number != "."), ".")
        return score if answer == str(sample.ground_truth) else format_score

    return reward


def exact_number(*, pick: str = "first") -> Callable[[Sample], float]:
    """1.0 if the first (or last) number in the response has the value of the ground truth: `7`, `7.0` and `+7` agree.

    Thousands may have commas (`1,234`). A response without a number earns 0.0, a ground truth that is none is an error.
    """
    if pick not in ("first", "last"):
        raise ValueError(f"exact_number picks the first or the last number, not {pick!r}.")

    def reward(sample: Sample) -> float:
        truth = _decimal(sample.ground_truth)
        numbers = _NUMBER.findall(sample.response)
        return float(bool(numbers) and _decimal(numbers[0 if pick == "first" else -1]) == truth)

    return reward


def _decimal(number: Any) -> Decimal:
    try:
        return Decimal(str(number).strip().replace(",", "").replace("\u2212", "-"))
    except InvalidOperation:
        raise ValueError(f"the ground truth {number!r} is not a number") from None


def exact_match(
    *, ignore_case: bool = False, ignore_whitespace: bool = False, pattern: str | None = None
) -> Callable[[Sample], float]:
    """1.0 if the stripped response equals the stripped ground truth, or any of them where it is a list.

    `ignore_whitespace` compares without any white space. `pattern` is a regular expression with one group; the
    group's last match is compared instead of the whole response, and without a match the reward is 0.0.
    """
    expression = _compile("exact_match", pattern) if pattern is not None else None
    if expression is not None and expression.groups != 1:
        raise ValueError(f"exact_match needs a pattern with exactly one group, {pattern!r} has {expression.groups}.")

    def normal(text: str) -> str:
        text = "".join(text.split()) if ignore_whitespace else text.strip()
        return text.casefold() if ignore_case else text

    def reward(sample: Sample) -> float:
        answer = sample.response
        if expression is not None:
            matches: list[str] = expression.findall(answer)
            if not matches:
                return 0.0
            answer = matches[-1]
        truth = sample.ground_truth
        truths = truth if isinstance(truth, list | tuple) else [truth]
        return float(normal(answer) in {normal(str(accepted)) for accepted in truths})

    return reward


def length(*, mode: str = "soft_overlong", **kwargs: Any) -> Callable[[Sample], float]:
    """A reward for the length of the response, to be added to a task's reward; `mode` is a key of `LENGTH_MODES`."""
    if mode not in LENGTH_MODES:
        raise ValueError(f"length knows the modes {', '.join(LENGTH_MODES)}, not {mode!r}.")
    check_arguments(f"length with mode {mode}", LENGTH_MODES[mode], kwargs)
    return LENGTH_MODES[mode](**kwargs)


def soft_overlong(*, max_tokens: int, buffer_tokens: int, penalty: float = 1.0) -> Callable[[Sample], float]:
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13).

    0 up to `max_tokens - buffer_tokens`, from there falling in a straight line to -`penalty` at `max_tokens`.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(f"length needs 0 < buffer_tokens <= max_tokens, got {buffer_tokens} and {max_tokens}.")
    start = max_tokens - buffer_tokens
    return lambda sample: -penalty * min(max(sample.response_length - start, 0) / buffer_tokens, 1.0)


def linear(*, per_token: float, free_tokens: int = 0) -> Callable[[Sample], float]:
    """`per_token` for each token beyond `free_tokens`: negative punishes length, positive pays for it."""
    return lambda sample: per_token * max(sample.response_length - free_tokens, 0)


def unfinished(*, penalty: float = 1.0) -> Callable[[Sample], float]:
    """-`penalty` for a response that was cut at the length limit."""
    return lambda sample: 0.0 if sample.finished else -penalty


def response_format(
    *, pattern: str = _THINK_ANSWER, score: float = 1.0, format_score: float = 0.0
) -> Callable[[Sample], float]:
    """`score` if the whole stripped response matches the regular expression, else `format_score`.

    `.` matches newlines too. The default wants one `<think>..</think>` and then one `<answer>..</answer>`, with nothing
    around them.
    """
    expression = _compile("format", pattern)
    return lambda sample: score if expression.fullmatch(sample.response.strip()) else format_score


def _compile(reward: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{reward} cannot read the regular expression {pattern!r}: {error}.") from None


def math_verify() -> Callable[[Sample], float]:
    """1.0 if Math-Verify finds the last mathematical answer of the response equal to the ground truth.

    The ground truth is LaTeX or a plain expression: `72`, `\\frac{1}{2}`, `$\\{1, 2\\}$`. One that cannot be read is an
    error; an answer that cannot be read earns 0.0.
    """
    _require("math_verify", package="math-verify", reward="math_verify")
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off; ours are on

    def reward(sample: Sample) -> float:
        # Math-Verify's time limits (0: none) are SIGALRM handlers, which cannot interrupt a long operation inside C
        # code (10^10^10 as an integer); the worker pool kills the process instead.
        truth = str(sample.ground_truth)
        # Without a mark Math-Verify looks for plain numbers only, and reads no set, no interval, no sqrt(2).
        marked = any(mark in truth for mark in ("$", "\\boxed", "\\(", "\\["))
        gold = [] if marked else parse(f"\\boxed{{{truth}}}", parsing_timeout=0)
        gold = gold or parse(truth, parsing_timeout=0)
        if not gold:
            raise ValueError(f"Math-Verify cannot read the ground truth {truth!r}")
        return float(verify(gold, parse(sample.response, parsing_timeout=0), timeout_seconds=0))

    return reward


def reasoning_gym(*, answer_tag: str | None = None) -> Callable[[Sample], float]:
    """The score that a reasoning-gym data set gives to the response; may be a fraction.

    Reads `extra_info["metadata"]`, which is the entry's metadata as a dict or as JSON (`scripts/prepare_data.py` writes
    it) and names the data set as "source_dataset", and `ground_truth`, the entry's answer. With `answer_tag="answer"`
    only what stands in the last `<answer>..</answer>` is scored, else the whole stripped response.
    """
    _require("reasoning_gym", package="reasoning-gym", reward="reasoning_gym")
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    inside = re.compile(f"<{answer_tag}>(.*?)</{answer_tag}>", re.DOTALL) if answer_tag else None
    score_functions: dict[str, Callable[..., float]] = {}

    def reward(sample: Sample) -> float:
        metadata = sample.extra_info.get("metadata", {})
        metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
        name = metadata.get("source_dataset")
        if name not in DATASETS:
            raise ValueError(f'extra_info["metadata"] names {name!r}, which is no data set of reasoning-gym')
        if name not in score_functions:
            score_functions[name] = get_score_answer_fn(name)
        entry = {"question": sample.prompt, "answer": sample.ground_truth, "metadata": metadata}
        answer: str | None = sample.response.strip()
        if inside is not None:
            answers = inside.findall(answer)
            answer = answers[-1].strip() if answers else None
        return score_functions[name](answer=answer, entry=entry)

    return reward


def check_arguments(what: str, function: Callable[..., Any], kwargs: Mapping[str, Any], *given: str) -> None:
    """Raises a ValueError if `function` cannot be called with `kwargs` and the arguments named in `given`."""
    signature = inspect.signature(function)
    try:
        signature.bind(**dict.fromkeys(given), **kwargs)
    except TypeError as error:
        raise ValueError(f"{what}: {error} (its arguments: {', '.join(signature.parameters) or 'none'}).") from None


def _require(module: str, *, package: str, reward: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"the reward {reward} needs the package {package}: pip install {package}.")


def _remote(**kwargs: Any) -> Any:
    from jaxrl.rewards.remote import Remote  # here, so that worker processes do not wait for httpx to import

    check_arguments("reward remote", Remote, kwargs)
    return Remote(**kwargs)


class Builtin(NamedTuple):
    """A built-in reward: what makes it, and where it runs."""

    make: Callable[..., Any]
    runs: Literal["here", "workers", "service"]


LENGTH_MODES = {"soft_overlong": soft_overlong, "linear": linear, "unfinished": unfinished}

REWARDS = {
    "gsm8k": Builtin(gsm8k, "here"),
    "exact_number": Builtin(exact_number, "here"),
    "exact_match": Builtin(exact_match, "here"),
    "length": Builtin(length, "here"),
    "format": Builtin(response_format, "here"),
    "math_verify": Builtin(math_verify, "workers"),
    "reasoning_gym": Builtin(reasoning_gym, "workers"),
    "remote": Builtin(_remote, "service"),
}
