"""The embedded engine: prompts are read once, then a compiled loop draws tokens over a KV cache.

Here is the part on the host: which prompts go together, where a response ends, and when those that are not done move
into a smaller batch (as soon as they fit into it) or a longer cache. The programs themselves are in
`decoding.py`. Their shapes come from a closed set, so a warm engine compiles nothing:

    prompts    a power of two a shard, of a length that is a multiple of BUCKET
    sequences  a power of two a shard, from `max_num_seqs` down to SMALLEST in all; and three quarters of the first batch
               (where that is as many rows on every shard), as most time goes by before half of the responses are done
    columns    the prompt length + ROOM, twice that, four times ... up to max_tokens

A shard is what `data` and `fsdp` split sequences into; one device is one shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ..batch import Prompt, Rollout
from ..models.config import ModelConfig
from ..parallel import fetch, make_mesh, put_replicated, put_rows
from .decoding import CHUNK, Batch, Programs
from .engine import Report, Sampling, check_prompt
from .sampling import Rule

Tree = Any
BUCKET = 32  # columns
ROOM = 128  # columns that a cache begins with, for what is drawn
SMALLEST = 8  # sequences: fewer would save little time for one more program
PROMPT_TOKENS = 8192  # read at once on a device: what bounds the memory of reading long prompts


class Largest(NamedTuple):
    """The largest batch of a call of `generate`, as it is padded."""

    prompts: int
    at_once: int  # of the prompts, read together
    prompt_columns: int
    sequences: int
    room: int  # columns for what is drawn, when the cache is longest

    @property
    def columns(self) -> int:
        return self.prompt_columns + self.room


class JaxEngine:
    """Generates with the trainer's own arrays, on the trainer's own devices.

    `mesh` is the one that the weights lie on, or its devices in another layout, to which `update_weights` moves them in
    one compiled program; without it, one device. `max_num_seqs` sequences decode together (the
    next power of two below it, but at least one on every shard).
    """

    def __init__(self, config: ModelConfig, mesh: Mesh | None = None, *, max_num_seqs: int = 1024):
        self.config = config
        self.mesh = make_mesh(1, 1, 1) if mesh is None else mesh
        self.programs = Programs(config, self.mesh)
        self.shards = self.programs.shards
        self.max_num_seqs = self.shards << max(0, (max_num_seqs // self.shards).bit_length() - 1)
        self.version = -1
        self.weights: Tree = None

    @property
    def answers_while_it_loads(self) -> bool:
        return False

    @property
    def waited_s(self) -> float:
        return 0.0

    def update_weights(self, variables: Tree, version: int) -> None:
        self.weights = None  # before the new ones are made: never two copies
        self.weights = jax.block_until_ready(self.programs.unstack(variables))
        self.version = version

    @property
    def weights_gb(self) -> float:
        """What an update of the weights brings to each device, in 2**30 bytes."""
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(self.weights)) / 2**30

    def sleep(self) -> None:
        self.weights = None

    def close(self) -> None:
        self.sleep()

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int, report: Report | None = None
    ) -> list[Rollout]:
        assert self.weights is not None, "generate before the first update_weights"
        sampling.refuse(("stop", "bad_words", "guided"), "jax")
        limits = np.array(sampling.max_tokens_each or [sampling.max_tokens] * len(prompts), np.int64)
        for prompt, limit in zip(prompts, limits, strict=True):
            check_prompt(prompt, int(limit), context=self.config.context, vocab_size=self.config.vocab_size)
        responses = _Responses(np.repeat(limits, sampling.n))
        # Prompts of like length together: a batch is as long as its longest.
        order = sorted(range(len(prompts)), key=lambda p: len(prompts[p].token_ids))
        sequences = np.array([p * sampling.n + i for p in order for i in range(sampling.n)], np.int64)
        for start in range(0, len(sequences), self.max_num_seqs):
            self._generate(prompts, sequences[start : start + self.max_num_seqs], sampling, seed, responses, report)
        stops = set(sampling.stop_ids)
        rollouts = []
        for b in range(len(sequences)):
            ids, logprobs = responses[b]
            rollouts.append(Rollout(b // sampling.n, ids, logprobs, int(ids[-1]) in stops, self.version))
        return rollouts

    def _generate(self, prompts, sequences, sampling: Sampling, seed: int, responses: _Responses, report) -> None:
        """Draw the responses of `sequences`: at most `max_num_seqs` of them, by their number in the whole call."""
        rule = put_replicated(self.mesh, Rule.of(sampling))
        owner, inputs = self._inputs(prompts, sequences, sampling.n)
        room = min(ROOM, round_up(sampling.max_tokens, BUCKET))
        length = inputs[0].shape[2]
        batch, cache = self.programs.begin(self.weights, *inputs, np.uint32(seed % 2**32), rule, room=room)
        filled, begun_with = 0, len(owner)
        while True:
            taken, done = responses.add(owner, filled, batch)
            filled += taken
            if report is not None:
                report(int(responses.done.sum()), int(responses.lengths.sum()))
            if done.all():
                return
            while (rows := self._rows_that_fit(done, begun_with)) is not None:
                local, kept = rows
                batch, cache = self.programs.keep(batch, cache, put_rows(self.mesh, local))
                owner, done = owner[kept], done[kept]
            limit = min(CHUNK, sampling.max_tokens - filled)
            if filled + limit > room:
                room = min(2 * room, round_up(sampling.max_tokens, BUCKET))
                cache = self.programs.lengthen(cache, columns=length + room)
            leave = self.smaller(len(owner), begun_with) // self.shards
            batch, cache = self.programs.decode(self.weights, batch, cache, rule, length, filled, limit, leave)

    def _inputs(self, prompts: Sequence[Prompt], sequences: np.ndarray, n: int):
        """The first batch: the sequence in each of its rows (-1: none), and the arrays that `begin` takes."""
        owner = self.deal(sequences, n)
        read, source = prompts_of_rows(owner, n)
        T = self.prompt_columns(max(len(prompts[p].token_ids) for p in read[read >= 0]))
        tokens, lengths = np.zeros((*read.shape, T), np.int32), np.ones(read.shape, np.int32)
        for place in zip(*np.nonzero(read >= 0), strict=True):
            ids = prompts[int(read[place])].token_ids
            tokens[*place, T - len(ids) :] = ids
            lengths[place] = len(ids)
        at_once = self.prompts_at_once(read.size, T) // self.shards

        def in_turn(x: np.ndarray) -> np.ndarray:
            """[shards, prompts] -> [M, P]: each shard reads `at_once` of its own at a time."""
            x = x.reshape(self.shards, -1, at_once, *x.shape[2:]).swapaxes(0, 1)
            return x.reshape(x.shape[0], -1, *x.shape[3:])

        owner = owner.reshape(-1)
        # A sequence's random numbers follow from its prompt's place and its own number alone.
        uids = np.stack(np.divmod(np.maximum(owner, 0), n), axis=1).astype(np.uint32)
        per_row = put_rows(self.mesh, (source.reshape(-1), uids, owner < 0))
        return owner, (*put_rows(self.mesh, (in_turn(tokens), in_turn(lengths)), axis=1), *per_row)

    def largest(self, num_prompts: int | None, longest_prompt: int, sampling: Sampling) -> Largest:
        """Of `num_prompts` prompts (None: of any number) of at most `longest_prompt` tokens."""
        n, most = sampling.n, self.max_num_seqs
        count = n * most if num_prompts is None else num_prompts * n  # after n batches a prompt begins one again
        parts = [np.arange(start, min(start + most, count)) for start in range(0, count, most)]
        prompts = max(prompts_of_rows(self.deal(part, n), n)[0].size for part in parts)
        columns = self.prompt_columns(longest_prompt)
        sequences, room = self.padded(min(count, most)), round_up(sampling.max_tokens, BUCKET)
        return Largest(prompts, self.prompts_at_once(prompts, columns), columns, sequences, room)

    def smaller(self, sequences: int, begun_with: int) -> int:
        """The next smaller batch, of one that was `begun_with` at first; 0 where there is none."""
        rows = sequences // self.shards
        if sequences <= max(SMALLEST, self.shards):
            return 0
        if sequences == begun_with and rows % 4 == 0:
            return sequences // 4 * 3
        return self.shards * _power_of_two(rows) // 2

    def deal(self, sequences: np.ndarray, n: int) -> np.ndarray:
        """[shards, rows]: which sequence sits where; -1 fills up. Prompts are dealt round, so that every shard has its
        part of the long ones, and the sequences of a prompt stay together, so that few shards read it."""
        _, rank = np.unique(sequences // n, return_inverse=True)
        dealt = sequences[np.lexsort((rank // self.shards, rank % self.shards))]
        rows = self.padded(len(sequences)) // self.shards
        owner = np.full((self.shards, rows), -1, np.int64)
        for shard, part in enumerate(np.array_split(dealt, self.shards)):
            owner[shard, : len(part)] = part
        return owner

    def padded(self, count: int) -> int:
        """`count` or more: a power of two a shard."""
        return self.shards * _power_of_two(-(-count // self.shards))

    def prompt_columns(self, longest: int) -> int:
        """The columns of prompts of at most `longest` tokens."""
        return round_up(longest, 128 if self.config.attention == "splash" else BUCKET)

    def prompts_at_once(self, num_prompts: int, columns: int) -> int:
        return min(num_prompts, self.shards << max(0, (PROMPT_TOKENS // columns).bit_length() - 1))

    def _rows_that_fit(self, done: np.ndarray, begun_with: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The rows that go on in the next smaller batch: all that are not done, filled up with others; counted within the
        shard and in all. None where they do not fit, or there is no such batch."""
        done = done.reshape(self.shards, -1)
        rows = self.smaller(done.size, begun_with) // self.shards
        if rows == 0 or (~done).sum(axis=1).max() > rows:
            return None
        local = np.argsort(done, axis=1, kind="stable")[:, :rows]
        kept = local + np.arange(self.shards)[:, None] * done.shape[1]
        return local.reshape(-1).astype(np.int32), kept.reshape(-1)


class _Responses:
    """What has been drawn, on the host, by the number of the sequence, of which each ends at its limit."""

    def __init__(self, limits: np.ndarray):
        num, max_tokens = len(limits), int(limits.max(initial=1))
        self.limits = limits
        self.ids, self.logprobs = np.zeros((num, max_tokens), np.int32), np.zeros((num, max_tokens), np.float32)
        self.lengths, self.done = np.zeros(num, np.int64), np.zeros(num, bool)

    def add(self, owner: np.ndarray, filled: int, batch: Batch) -> tuple[int, np.ndarray]:
        """Take over what `batch` drew from token `filled` on: how many tokens, and which rows are done by now."""
        batch = fetch(batch._replace(keys=()))
        taken, real = int(batch.taken), owner >= 0
        here, rows = slice(filled, filled + taken), owner[real]
        self.ids[rows, here] = batch.ids[real, :taken]
        self.logprobs[rows, here] = batch.logprobs[real, :taken]
        self.lengths[rows] = np.minimum(self.lengths[rows] + batch.counts[real], self.limits[rows])
        done = batch.done | (filled + taken >= np.where(real, self.limits[owner], 0))
        self.done[rows] = done[real]
        return taken, done

    def __getitem__(self, b: int) -> tuple[np.ndarray, np.ndarray]:
        length = self.lengths[b]
        return self.ids[b, :length].copy(), self.logprobs[b, :length].copy()


def prompts_of_rows(owner: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompts that each shard reads [shards, a power of two] (-1 fills up), and which of them a row answers."""
    own = [np.unique(part[part >= 0] // n) for part in owner]
    read = np.full((len(owner), _power_of_two(max(map(len, own)))), -1, np.int64)
    source = np.zeros(owner.shape, np.int32)
    for shard, chosen in enumerate(own):
        read[shard, : len(chosen)] = chosen
        source[shard] = np.where(owner[shard] >= 0, np.searchsorted(chosen, owner[shard] // n), 0)
    return read, source


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _power_of_two(x: int) -> int:
    return 1 << max(0, x - 1).bit_length()
