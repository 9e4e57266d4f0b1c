"""The records that cross stages: Prompt -> Rollout -> packed rows on the device.

The axis letters used everywhere:

    P prompts of a step     G responses a prompt (the group)     B = P x G sequences
    R packed rows           T tokens of a row                    W parts into which a mesh splits rows
    M micro-batches         S target slots of a part (tokens that are predicted)
    L layers                V vocabulary
    D hidden size           N query heads                        K key-value heads
    H head size             F mlp size

A *target* is a response token: slot s of part w says which token was produced (`target_ids`) and in which column the
hidden state sits that predicts it (`target_columns`), the rows of a part lying end to end. So the targets of a device are
dense, however unevenly they are spread over its rows. Logprobs, values, advantages and losses live on [W, S]; between
stages they are kept as [B, T_response] and moved by `to_slots` and `from_slots` of `packing.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Prompt:
    """One problem, ready to be sampled from."""

    token_ids: list[int]  # chat template applied
    text: str  # the rendered prompt
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any]
    messages: list[dict[str, Any]] | None
    index: int  # its row in the dataset


@dataclass(frozen=True)
class Rollout:
    """One response to one prompt, as the engine sampled it."""

    group: int  # position of its prompt in the list that was sampled from
    token_ids: np.ndarray  # int32 [T], the stop token included
    logprobs: np.ndarray  # float32 [T], of the distribution that was sampled from
    finished: bool  # False: cut at the length limit
    weights_version: int
    response_mask: np.ndarray = field(default=None)  # type: ignore[assignment]  # bool [T], False: tool or environment text
    num_turns: int = 1  # how many times the model spoke

    def __post_init__(self) -> None:
        if self.response_mask is None:
            object.__setattr__(self, "response_mask", np.ones(len(self.token_ids), bool))


class PackedRows(NamedTuple):
    """Sequences laid end to end in rows of one length. Leading axes may precede R and W (micro-batches).

    As with all records of this kind, the fields are numpy arrays on the host, jax arrays on devices, shapes in a plan.

    A token sees the tokens at or before its own column whose segment is its own or its prefix. Where several responses
    share one prompt, the prompt is a segment of its own and the prefix of each response; elsewhere prefix = segment.
    """

    tokens: Int[Any, "R T"]
    positions: Int[Any, "R T"]  # of the token in its sequence, for rotary embeddings
    segments: Int[Any, "R T"]  # 0 = padding
    prefixes: Int[Any, "R T"]
    target_ids: Int[Any, "W S"]
    target_columns: Int[Any, "W S"]  # among the R/W x T of the rows of its part
    target_mask: Bool[Any, "W S"]  # produced by the model, and trained on
    target_sequences: Int[Any, "W S"]  # the sequence a slot belongs to; B where the slot is empty


class PolicyTargets(NamedTuple):
    """What the policy loss needs at each target."""

    old_logprobs: Float[Any, "W S"]
    advantages: Float[Any, "W S"]
    ref_logprobs: Float[Any, "W S"]  # zeros where no reference is used
    rollout_weights: Float[Any, "W S"]  # importance weights old/rollout; ones where not corrected
    # What the aggregation mode gives a token: loss = sum(token_loss * loss_weights).
    loss_weights: Float[Any, "W S"]
    # The same for the entropy and KL terms: of `actor.loss_agg_mode`, also where the loss has an aggregation of its own.
    term_weights: Float[Any, "W S"]


class ValueTargets(NamedTuple):
    """What the value loss needs at each target."""

    old_values: Float[Any, "W S"]
    returns: Float[Any, "W S"]
    loss_weights: Float[Any, "W S"]
