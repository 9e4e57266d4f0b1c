"""Sequences into packed rows, and per-token numbers back and forth between [B, T_response] and the slots [.., W, S].

Where several responses answer one prompt, the prompt is laid down once and each response sees it as its prefix
(`batch.PackedRows`): the model's work on a group of G is prompt + G responses instead of G x (prompt + response), with
the same hidden states and the same gradient to rounding.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from .batch import PackedRows, Prompt, Rollout


@dataclass(frozen=True)
class Sequences:
    """The sequences of a step on the host: prompts, and B responses padded to [B, T] on the right."""

    prompts: list[list[int]]  # token ids of the P prompts
    group: Int[np.ndarray, "B"]  # the prompt of each response
    tokens: Int[np.ndarray, "B T"]
    present: Bool[np.ndarray, "B T"]  # there is a token
    mask: Bool[np.ndarray, "B T"]  # the model produced it (tool text is present but not masked in)

    @property
    def lengths(self) -> Int[np.ndarray, "B"]:
        return self.present.sum(axis=1)

    @classmethod
    def of(cls, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], max_response_length: int) -> Sequences:
        shape = (len(rollouts), max_response_length)
        tokens, present, mask = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)
        for b, rollout in enumerate(rollouts):
            length = len(rollout.token_ids)
            tokens[b, :length] = rollout.token_ids
            present[b, :length] = True
            mask[b, :length] = rollout.response_mask
        group = np.array([rollout.group for rollout in rollouts], np.int32)
        return cls([prompt.token_ids for prompt in prompts], group, tokens, present, mask)


@dataclass(frozen=True)
class Layout:
    """Rows in micro-batches, and where each response token went."""

    rows: PackedRows  # arrays [M, R, T], and of targets [M, W, S]
    num_micro_batches: int  # in use; the rest of M is padding that is never computed
    num_slots: Int[np.ndarray, "M"]  # the most slots that any part of a micro-batch uses
    slot: Int[np.ndarray, "B T"]  # flat index into [M, W, S]; -1 where there is no token or the sequence is not in it

    def to_slots(self, values: np.ndarray) -> np.ndarray:
        """[B, T] -> [M, W, S], zero in empty slots."""
        out = np.zeros(self.rows.target_ids.shape, values.dtype)
        used = self.slot >= 0
        out.reshape(-1)[self.slot[used]] = values[used]
        return out

    def from_slots(self, values: np.ndarray) -> np.ndarray:
        """[M, W, S] -> [B, T], zero where this layout holds no token."""
        used = self.slot >= 0
        out = np.zeros(self.slot.shape, values.dtype)
        out[used] = values.reshape(-1)[self.slot[used]]
        return out


Unit = tuple[int, int, list[int]]  # what must lie together: (tokens, prompt, its responses)


def pack(
    sequences: Sequences,
    chosen: Sequence[int] | np.ndarray,
    *,
    row_length: int,
    rows_per_micro_batch: int,
    max_micro_batches: int,
    ways: int = 1,
    share_prompt: bool = True,
) -> Layout:
    """Lay the `chosen` sequences into rows of `row_length` tokens, and the rows into micro-batches.

    `ways` is how many parts the mesh splits rows into: it divides `rows_per_micro_batch`.

    Longest first into the fullest row that has room (best fit): within a few percent of the fewest rows. Rows are then
    dealt to micro-batches in turn, and within each to parts in turn, so that each gets its share of the well-filled ones.
    Deterministic.
    """
    rows = _best_fit(_units(sequences, chosen, row_length, share=False), row_length)
    if share_prompt:
        # Usually fewer rows; but a group of a little more than half a row takes one for itself, and its sequences, each
        # with the prompt, may fit better.
        shared = _best_fit(_units(sequences, chosen, row_length, share=True), row_length)
        rows = shared if len(shared) <= len(rows) else rows
    num = -(-len(rows) // rows_per_micro_batch)
    if num > max_micro_batches:
        raise ValueError(
            f"{len(rows)} packed rows of {row_length} tokens need {num} micro-batches of {rows_per_micro_batch} rows, "
            f"and the program was compiled for at most {max_micro_batches}"
        )
    rows_of_part = rows_per_micro_batch // ways
    places = [(m, i % ways * rows_of_part + i // ways, row) for m in range(num) for i, row in enumerate(rows[m::num])]
    return _fill(sequences, places, (max_micro_batches, rows_per_micro_batch, row_length), ways, num)


def max_micro_batches(num_sequences: int, longest_sequence: int, row_length: int, rows_per_micro_batch: int) -> int:
    """Micro-batches that any `num_sequences` sequences of at most `longest_sequence` tokens, prompt included, fit in.

    With room for k of the longest in a row, best fit opens a new row only when every other holds at least k sequences.
    """
    per_row = max(1, row_length // longest_sequence)
    return -(-num_sequences // (per_row * rows_per_micro_batch))


def _best_fit(units: list[Unit], row_length: int) -> list[list[Unit]]:
    """The units of each row."""
    rows: list[list[Unit]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for unit in sorted(units, key=lambda unit: -unit[0]):
        at = bisect_left(rooms, (unit[0], -1))
        if at == len(rooms):
            rows.append([])
            room, row = row_length, len(rows) - 1
        else:
            room, row = rooms.pop(at)
        rows[row].append(unit)
        insort(rooms, (room - unit[0], row))
    return rows


def _units(sequences: Sequences, chosen: Sequence[int] | np.ndarray, row_length: int, *, share: bool) -> list[Unit]:
    """Each response with its prompt; with `share` a group with its prompt, cut where it outgrows a row."""
    lengths = sequences.lengths
    units: list[Unit] = []
    groups: dict[int, list[int]] = {}
    for b in chosen:
        groups.setdefault(int(sequences.group[b]), []).append(int(b))
    for prompt, members in groups.items():
        start = len(sequences.prompts[prompt])
        current: list[int] = []
        used = start
        for b in members:
            if start + lengths[b] > row_length:
                raise ValueError(
                    f"a sequence of {start} prompt and {lengths[b]} response tokens does not fit into a packed row of "
                    f"{row_length} tokens: raise trainer.row_length"
                )
            if current and (not share or used + lengths[b] > row_length):
                units.append((used, prompt, current))
                current, used = [], start
            current.append(b)
            used += int(lengths[b])
        units.append((used, prompt, current))
    return units


def _fill(
    sequences: Sequences, places: list[tuple[int, int, list[Unit]]], shape: tuple[int, int, int], ways: int,
    num_micro: int,
) -> Layout:  # fmt: skip
    """Write the units of the row at each place (micro-batch, row) into arrays of `shape` [M, R, T]."""
    B, T_response = sequences.tokens.shape
    M, R, T = shape
    assert R % ways == 0, "a mesh splits rows evenly"
    rows_of_part = R // ways
    tokens, positions, segments, prefixes = (np.zeros(shape, np.int32) for _ in range(4))
    S = rows_of_part * T
    ids, columns = np.zeros((M, ways, S), np.int32), np.zeros((M, ways, S), np.int32)
    mask, owner = np.zeros((M, ways, S), bool), np.full((M, ways, S), B, np.int32)
    slot = np.full((B, T_response), -1, np.int64)
    num_slots = np.zeros((M, ways), np.int32)
    for m, r, units in places:
        column = segment = 0
        w, row_in_part = divmod(r, rows_of_part)
        start, next_slot = row_in_part * T, num_slots[m, w]
        for _, prompt, responses in units:
            prompt_ids = sequences.prompts[prompt]
            shared = len(responses) > 1
            segment += 1
            prompt_segment, last = segment, column + len(prompt_ids) - 1
            here = slice(column, column + len(prompt_ids))
            tokens[m, r, here] = prompt_ids
            positions[m, r, here] = np.arange(len(prompt_ids))
            segments[m, r, here] = prefixes[m, r, here] = prompt_segment
            column = here.stop
            for b in responses:
                length = int(sequences.present[b].sum())
                response = sequences.tokens[b, :length]
                segment += shared
                here, slots = slice(column, column + length), slice(next_slot, next_slot + length)
                tokens[m, r, here] = response
                positions[m, r, here] = len(prompt_ids) + np.arange(length)
                segments[m, r, here], prefixes[m, r, here] = segment, prompt_segment
                ids[m, w, slots] = response
                # The first token is predicted by the prompt's last hidden state, the others by the token before them.
                before = np.concatenate([[last], np.arange(column, column + length - 1)])[:length]
                columns[m, w, slots] = start + before
                mask[m, w, slots] = sequences.mask[b, :length]
                owner[m, w, slots] = b
                slot[b, :length] = (m * ways + w) * S + np.arange(next_slot, next_slot + length)
                column, next_slot = here.stop, slots.stop
        num_slots[m, w] = next_slot
    packed = PackedRows(tokens, positions, segments, prefixes, ids, columns, mask, owner)
    return Layout(packed, num_micro, num_slots.max(axis=1), slot)
