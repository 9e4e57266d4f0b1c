"""Prompts for the trainer: the first stage of a step.

`PromptDataset` turns the rows of `sources.load_rows` into `Prompt`s (chat template, tokens, length limit), and
`PromptLoader` hands out `prompts_per_step` of them at a time, in an order that a resumed run continues exactly.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from jinja2 import TemplateError

from jaxrl.batch import Prompt
from jaxrl.sources import Rows, load_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PromptDataset", "PromptLoader", "Rows", "load_rows"]

log = logging.getLogger(__name__)

Truncation = Literal["error", "left", "right", "middle"]
CHUNK = 1024  # rows tokenised together by the check of all lengths
_MISSING = object()
_MEANING = {
    "seed": "seed (data.seed)",
    "shuffle": "shuffling (data.shuffle)",
    "num_prompts": "number of prompts",
    "fingerprint": "content (a fingerprint of the rows)",
}


class PromptDataset(Sequence[Prompt]):
    """Rows as prompts, tokenised when asked for.

    A row in verl's schema is read as it is: `prompt` (a list of chat messages, or a text), `data_source`,
    `reward_model.ground_truth`, `extra_info`. Any other table is read by naming its columns; a dot goes into a column
    that holds dicts. Columns of a table without `extra_info` that are not used otherwise become the `extra_info`.

    Every row is read and measured once at the start, so whatever is wrong with one is said before training.

    Args:
        rows: from `load_rows`.
        tokenizer: of Hugging Face transformers.
        max_prompt_length: in tokens, the chat template's included.
        prompt_key: column of the prompt.
        ground_truth_key: column of the right answer. None: `reward_model.ground_truth`, or no answer where a row has none.
        data_source: the name of rows that have no column `data_source`; a reward is chosen by it.
        filter_overlong_prompts: leave out the rows that are longer than `max_prompt_length`.
        truncation: for those that are not left out. `error`, or which part is cut: `left`, `right` or `middle`.
        chat: whether a text becomes a user message in the chat template: `auto` (if there is a template), true or false.
        system_prompt: the system message of rows that do not bring one.
        apply_chat_template_kwargs: such as `{"enable_thinking": False}`.
        name: for messages about this dataset.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_length: int,
        prompt_key: str = "prompt",
        ground_truth_key: str | None = None,
        data_source: str = "default",
        filter_overlong_prompts: bool = False,
        truncation: Truncation = "error",
        chat: str | bool = "auto",
        system_prompt: str | None = None,
        apply_chat_template_kwargs: Mapping[str, Any] | None = None,
        name: str = "the dataset",
    ) -> None:
        if max_prompt_length < 1:
            raise ValueError(f"data.max_prompt_length is {max_prompt_length}: it must be 1 token or more")
        if truncation not in ("error", "left", "right", "middle"):
            raise ValueError(f"data.truncation is {truncation!r}: it must be error, left, right or middle")
        self.rows = rows
        self.tokenizer = tokenizer
        self.max_prompt_length = max_prompt_length
        self.prompt_key = prompt_key
        self.ground_truth_key = ground_truth_key
        self.data_source = data_source
        self.truncation: Truncation = truncation
        self.use_chat = _use_chat(chat, tokenizer)
        self.system_prompt = system_prompt
        self.apply_chat_template_kwargs = {"add_generation_prompt": True, **(apply_chat_template_kwargs or {})}
        self.name = name
        if system_prompt is not None and not self.use_chat:
            raise ValueError(
                "data.system_prompt is set, but prompts are not put into a chat template: unset one of them"
            )
        self.indices, self.fingerprint = self._measure(filter_overlong_prompts)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        prompt = self._read(int(self.indices[index]))
        token_ids = self._tokenize([prompt.text])[0]
        if len(token_ids) <= self.max_prompt_length:
            return replace(prompt, token_ids=token_ids)
        token_ids = truncate(token_ids, self.max_prompt_length, self.truncation)
        return replace(prompt, token_ids=token_ids, text=str(self.tokenizer.decode(token_ids)))

    def of_row(self, row_index: int) -> Prompt:
        """The prompt of a row, which is `Prompt.index`."""
        return self[int(np.searchsorted(self.indices, row_index))]

    def _read(self, row_index: int) -> Prompt:
        """The prompt of a row, not tokenised yet."""
        row = self.rows[row_index]
        messages, text = self._render(row, row_index)
        return Prompt(
            token_ids=[],
            text=text,
            data_source=str(row.get("data_source") or self.data_source),
            ground_truth=self._ground_truth(row, row_index),
            extra_info=self._extra_info(row, row_index),
            messages=messages,
            index=row_index,
        )

    def _measure(self, filter_overlong_prompts: bool) -> tuple[np.ndarray, int]:
        """Reads and tokenises every row once. Returns the rows that are kept and a fingerprint of what they say."""
        num_rows = len(self.rows)
        lengths = np.zeros(num_rows, np.int64)
        digests: list[bytes] = []
        num_without_truth = 0
        for start in range(0, num_rows, CHUNK):
            prompts = [self._read(row_index) for row_index in range(start, min(start + CHUNK, num_rows))]
            token_ids = self._tokenize([prompt.text for prompt in prompts])
            lengths[start : start + CHUNK] = [len(ids) for ids in token_ids]
            digests += [_digest(prompt) for prompt in prompts]
            num_without_truth += sum(prompt.ground_truth is None for prompt in prompts)
        if not lengths.all():
            raise ValueError(f"row {int(lengths.argmin())} of {self.name} has an empty prompt: leave the row out")
        if num_without_truth:
            log.warning(
                "%s: %d of %d rows have no ground truth; a reward that compares with it needs data.ground_truth_key",
                *(self.name, num_without_truth, num_rows),
            )
        kept = self._within_limit(lengths, filter_overlong_prompts)
        content = hashlib.sha256(b"".join(digests[i] for i in kept)).digest()
        return kept, int.from_bytes(content[:6], "big")  # 48 bits: also exact as a float64

    def _within_limit(self, lengths: np.ndarray, filter_overlong_prompts: bool) -> np.ndarray:
        """The rows to keep. Over-long ones are left out, refused or, with a word in the log, left to be cut."""
        over = np.flatnonzero(lengths > self.max_prompt_length)
        every = np.arange(len(lengths))
        if len(over) == 0:
            log.info("%s: %d prompts, the longest of %d tokens", self.name, len(lengths), lengths.max())
            return every
        longest = int(lengths.argmax())
        found = (
            f"{self.name}: {len(over)} of {len(lengths)} prompts are longer than data.max_prompt_length "
            f"{self.max_prompt_length} (first row {over[0]} with {lengths[over[0]]} tokens, longest row {longest} with "
            f"{lengths[longest]})"
        )
        if filter_overlong_prompts:
            if len(over) == len(lengths):
                raise ValueError(f"{found}: no prompt is left, raise data.max_prompt_length")
            log.info("%s; they are left out", found)
            return np.delete(every, over)
        if self.truncation == "error":
            raise ValueError(
                f"{found}: raise it to {lengths[longest]}, set data.filter_overlong_prompts to leave them out, or set "
                f"data.truncation to left, right or middle"
            )
        log.warning("%s; they are cut (data.truncation: %s)", found, self.truncation)
        return every

    def _render(self, row: Mapping[str, Any], row_index: int) -> tuple[list[dict[str, Any]] | None, str]:
        """The chat messages (None for a plain text) and the text that the model reads."""
        value = _lookup(row, self.prompt_key)
        if value is _MISSING:
            raise self._missing_column("prompt_key", self.prompt_key, row, row_index)
        if isinstance(value, str):
            if not self.use_chat:
                return None, value
            messages = [{"role": "user", "content": value}]
        elif _is_messages(value):
            # Arrow fills the keys that a message lacks with None; a template would take such a key as given.
            messages = [{key: part for key, part in message.items() if part is not None} for message in value]
        else:
            raise ValueError(
                f"row {row_index} of {self.name}: {self.prompt_key} is {_shorten(value)}, but it must be a text or a "
                f"list of messages with role and content"
            )
        if not self.use_chat:
            raise ValueError(
                f"row {row_index} of {self.name} holds chat messages, but the tokenizer "
                f"{'has no chat template' if self.tokenizer.chat_template is None else 'is used without (data.chat)'}: "
                f"give plain texts, or a model that has a template with data.chat auto"
            )
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, **self.apply_chat_template_kwargs)
        except TemplateError as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise ValueError(
                f"row {row_index} of {self.name}: the tokenizer's chat template refuses messages of the roles {roles}: "
                f"{error}"
            ) from error
        assert isinstance(text, str)
        return messages, text

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """A chat template writes its own special tokens; a plain text gets those that the tokenizer adds, such as BOS."""
        return self.tokenizer(texts, add_special_tokens=not self.use_chat, verbose=False)["input_ids"]  # type: ignore[return-value]

    def _ground_truth(self, row: Mapping[str, Any], row_index: int) -> Any:
        if self.ground_truth_key is None:
            value = _lookup(row, "reward_model.ground_truth")
            return None if value is _MISSING else value
        value = _lookup(row, self.ground_truth_key)
        if value is _MISSING:
            raise self._missing_column("ground_truth_key", self.ground_truth_key, row, row_index)
        if value is None:
            raise ValueError(
                f"row {row_index} of {self.name} has no value in {self.ground_truth_key}: leave the row out"
            )
        return value

    def _extra_info(self, row: Mapping[str, Any], row_index: int) -> dict[str, Any]:
        extra_info = row.get("extra_info")
        if extra_info is None:
            keys = (self.prompt_key, self.ground_truth_key or "reward_model", "data_source", "extra_info")
            used = {key if key in row else key.partition(".")[0] for key in keys}
            return {key: value for key, value in row.items() if key not in used}
        if not isinstance(extra_info, Mapping):
            raise ValueError(
                f"row {row_index} of {self.name}: extra_info is {_shorten(extra_info)}, but it must be a dict"
            )
        return dict(extra_info)

    def _missing_column(self, config_key: str, column: str, row: Mapping[str, Any], row_index: int) -> ValueError:
        return ValueError(
            f"row {row_index} of {self.name} has no column {column!r}; its columns are {', '.join(row)}: set "
            f"data.{config_key} to one of them"
        )


class PromptLoader(Iterator[list[Prompt]]):
    """Batches of prompts without end, epoch after epoch, each epoch in an order of its own when shuffled.

    The order of an epoch depends on the seed and the number of the epoch alone, so `state` is a few numbers and `restore`
    is exact. The prompts that do not fill a batch are left out of an epoch. `epoch` is the one that the last batch was
    taken from.
    """

    def __init__(
        self,
        dataset: PromptDataset,
        *,
        prompts_per_step: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        if prompts_per_step < 1:
            raise ValueError(f"{prompts_per_step} prompts a step: it must be 1 or more")
        if seed < 0:
            raise ValueError(f"data.seed is {seed}: it must be 0 or more")
        if len(dataset) < prompts_per_step:
            raise ValueError(
                f"{dataset.name} has {len(dataset)} prompts, fewer than the {prompts_per_step} of a step: lower "
                "data.train_batch_size or use more data"
            )
        self.dataset = dataset
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.position = 0  # prompts of this epoch handed out
        self._order = self._order_of(0)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.dataset) // self.prompts_per_step

    def __next__(self) -> list[Prompt]:
        if len(self.dataset) - self.position < self.prompts_per_step:
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._order_of(self.epoch)
        chosen = self._order[self.position : self.position + self.prompts_per_step]
        self.position += len(chosen)
        return [self.dataset[int(i)] for i in chosen]

    def state(self) -> dict[str, int]:
        """What `restore` needs: the position, and what the order depends on."""
        return {"epoch": self.epoch, "position": self.position, **self._order_depends_on()}

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes to a position saved by `state`; the next batch is the one that followed it.

        Raises ValueError if the data or its order are not those of the saved run. Another number of prompts a step is fine.
        """
        for key, now in self._order_depends_on().items():
            if int(state[key]) != now:
                raise ValueError(
                    f"the checkpoint's position in {self.dataset.name} does not fit: its {_MEANING[key]} was {state[key]} and "
                    f"is {now} now; resume with the data settings of the checkpoint's run or start a new one"
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._order = self._order_of(self.epoch)

    def _order_depends_on(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "shuffle": int(self.shuffle),
            "num_prompts": len(self.dataset),
            "fingerprint": self.dataset.fingerprint,
        }

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.dataset))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder; raises ValueError where none can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many kinds, by what is missing; of a broken file it is an `Exception` itself
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if "trust_remote_code" in reason:
            fix = "one that brings code of its own is not run"
        elif isinstance(error, ImportError):
            fix = "install what it names"
        else:
            fix = "fetch its tokenizer and config.json again"
        raise ValueError(f"{folder} holds no tokenizer that can be read ({reason}): {fix}") from error


def truncate(token_ids: list[int], max_length: int, side: Truncation) -> list[int]:
    """Cuts to `max_length` tokens: `left` keeps the end, `right` the beginning, `middle` both, the odd token at the end."""
    if len(token_ids) <= max_length:
        return token_ids
    if side == "left":
        return token_ids[-max_length:]
    if side == "right":
        return token_ids[:max_length]
    assert side == "middle", "over-long prompts were refused when the dataset was made"
    num_head = max_length // 2
    return token_ids[:num_head] + token_ids[num_head - max_length :]


def _use_chat(chat: str | bool, tokenizer: PreTrainedTokenizerBase) -> bool:
    choice = str(chat).lower()  # YAML reads true and false as booleans
    if choice not in ("auto", "true", "false"):
        raise ValueError(f"data.chat is {chat!r}: it must be auto, true or false")
    if choice == "true" and tokenizer.chat_template is None:
        raise ValueError("data.chat is true, but the tokenizer has no chat template: use auto or a chat model")
    return choice != "false" and tokenizer.chat_template is not None


def _digest(prompt: Prompt) -> bytes:
    """A hash of what a prompt says and of its answer; not of the rendered text, as some templates write today's date."""
    said = [prompt.messages or prompt.text, prompt.data_source, prompt.ground_truth]
    return hashlib.sha256(json.dumps(said, default=str, sort_keys=True).encode()).digest()


def _lookup(row: Mapping[str, Any], key: str) -> Any:
    """`row[key]`, else `row["a"]["b"]` for the key `a.b`, else `_MISSING`."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value)
    )


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
