"""A reward model: a Hugging Face sequence classifier with one label, run here, one more part of the reward.

The conversation goes through the reward model's own chat template and tokenizer, so that it may be another model than
the actor. Its score is what the head says at the last token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from .config import Config, Head, Model
from .data import tokenizer_of
from .offload import waiting
from .packing import Sequences, max_micro_batches, pack
from .parallel import num_row_shards
from .rewards import Sample, Score
from .rewards.score import failed, score_of
from .roles import abstract_variables, computed, load_base, model_config, own_mesh
from .update import Critic
from .weights.heads import FoundHead, find_head
from .weights.pretrained import Pretrained, open_pretrained, with_adapter_merged

ROWS = 128  # packed rows are a multiple of it long


def reward_model_of(
    c: Config, mesh: jax.sharding.Mesh, find: Callable[[str], Pretrained] = open_pretrained
) -> RewardModel | None:
    """That of a run, not loaded; None where it has none."""
    m = c.reward.model
    if m.path is None:
        return None
    return RewardModel(
        m.path, own_mesh(mesh, m.mesh, "reward.model"), computed(c.model, m.compute_dtype),
        max_tokens=c.critic.ppo_max_token_len_per_gpu, head=m.head, offload=m.offload, find=find,
    )  # fmt: skip


class RewardModel:
    """Scores samples; stands beside the reward functions in a `Scorer`.

    Made of shapes alone, as `Roles`; `load` brings the weights. `find` opens the model of a path.
    """

    whole_batch = True
    tokenizer: PreTrainedTokenizerBase
    variables: Any

    def __init__(
        self,
        path: str,
        mesh: jax.sharding.Mesh,
        model: Model,
        *,
        max_tokens: int,
        head: Head | None = None,
        offload: Collection[str] = (),
        find: Callable[[str], Pretrained] = open_pretrained,
    ):
        self.source, head = with_adapter_merged(find(path)), head or Head()
        config = model_config(model, self.source.hf_config, module=head.module)
        if head.module is None and self.source.checkpoint.tensors:  # of which a plan may know nothing
            config = dataclasses.replace(config, score_bias=_head_of_one_label(self.source, head.path).has_bias)
        self.mesh, self.config, self.head_path = mesh, config, head.path
        self.rows = max(1, max_tokens // ROWS)  # of ROWS tokens in a micro-batch on one device
        self.critic = Critic(mesh, config, None, 0.0)
        self.abstract = abstract_variables(mesh, config, "score", model.compute_dtype)
        if "params" in offload:
            self.abstract = {"params": waiting(self.abstract["params"])}

    def load(self) -> None:
        assert self.source.tokenizer is not None, "a model of a path has a folder"
        self.tokenizer = tokenizer_of(self.source.tokenizer)
        params = load_base(self.source, self.config, self.abstract, head_path=self.head_path)
        self.variables = {"params": params}

    def micro_batches(self, num_sequences: int, longest: int) -> tuple[int, int, int]:
        """[M, R, T]: the shape in which sequences of at most `longest` tokens are scored."""
        row_length = ROWS << max(0, -(-longest // ROWS) - 1).bit_length()
        rows = max(1, self.rows * ROWS // row_length) * num_row_shards(self.mesh)
        return max_micro_batches(num_sequences, row_length, row_length, rows), rows, row_length

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        token_ids = [self._tokenize(sample) for sample in samples]
        # One token more: its value is read where the last real token stands.
        column = np.ones((len(samples), 1))
        sequences = Sequences(
            token_ids, np.arange(len(samples), dtype=np.int32), column.astype(np.int32) * 0,
            column.astype(bool), column.astype(bool),
        )  # fmt: skip
        M, R, T = self.micro_batches(len(samples), max(map(len, token_ids)) + 1)
        layout = pack(
            sequences, range(len(samples)), row_length=T, rows_per_micro_batch=R, max_micro_batches=M,
            ways=num_row_shards(self.mesh), share_prompt=False,
        )  # fmt: skip
        values = self.critic.values(self.variables, layout)
        return [
            score_of(float(value)) if len(ids) <= self.config.max_position
            else failed(f"{len(ids)} tokens are more than the {self.config.max_position} of the reward model's context")
            for ids, value in zip(token_ids, values[:, 0], strict=True)
        ]  # fmt: skip

    def close(self) -> None:
        self.variables = None

    def _tokenize(self, sample: Sample) -> list[int]:
        if sample.messages is None or self.tokenizer.chat_template is None:
            return self.tokenizer(sample.prompt + sample.response)["input_ids"]
        conversation = [*sample.messages, {"role": "assistant", "content": sample.response}]
        text: Any = self.tokenizer.apply_chat_template(conversation, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _head_of_one_label(source: Pretrained, path: str | None) -> FoundHead:
    """The head of a model that says one number. Raises ValueError where it has none, or another."""
    head = find_head(source.checkpoint, source.hf_config, path=path)
    if head is None or head.num_labels != 1:
        found = "no score head" if head is None else f"a score head of {head.num_labels} labels"
        raise ValueError(
            f"reward.model.path {source.name} has {found}: give a sequence-classification model with one label"
        )
    return head
