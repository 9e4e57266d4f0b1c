"""Prompts for the servers of a pool: which server is asked which, and who else where one fails.

The pool (`vllm_pool.py`) says who serves, and starts again whom we find lost; here each prompt is asked until one server
has answered it, with one version of the weights.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from .engine import Report, Sampling
from .vllm_adapter import Answer
from .vllm_client import ServerLost
from .vllm_pool import SERVING, Pool, Server

SLOWEST_S = 5.0  # for a token: a response that takes longer was lost on its way, though its server gives signs of life
OVERBOOKED = 2  # sequences that wait at a server for each that it decodes, so that none of its places stays empty


@dataclass(frozen=True)
class Job:
    """A prompt, and which responses to it are wanted."""

    prompt: int
    token_ids: Sequence[int]
    n: int
    max_tokens: int
    seed: int


async def answer(
    pool: Pool, jobs: Sequence[Job], sampling: Sampling, report: Report | None
) -> list[tuple[Job, list[Answer], str]]:
    """The answers to every job, in order, with the label of the weights that gave them."""
    if pool.is_asleep:
        raise RuntimeError("the servers sleep: update_weights comes before generate")
    assert pool.current is not None, "generate before the first update_weights"
    waiting = deque(range(len(jobs)))
    pool.unasked += len(jobs)
    results: list[tuple[Job, list[Answer], str] | None] = [None] * len(jobs)
    finished = tokens = 0

    async def work() -> None:
        nonlocal finished, tokens
        while waiting:
            number = waiting.popleft()
            pool.unasked -= 1
            answers, label = await _ask(pool, jobs[number], sampling)
            results[number] = jobs[number], answers, label
            finished += len(answers)
            tokens += sum(len(answer.token_ids) for answer in answers)
            if report is not None:
                report(finished, tokens)

    places = sum(max(1, _places(pool) // jobs[0].n) for _ in pool.servers)
    workers = [asyncio.ensure_future(work()) for _ in range(min(len(jobs), places))]
    try:
        if report is not None:
            report(0, 0)
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        pool.unasked -= len(waiting)
        await pool.tell()
    return [result for result in results if result is not None]


async def _ask(pool: Pool, job: Job, sampling: Sampling) -> tuple[list[Answer], str]:
    """Answers of one server and one version, whatever number of servers fail on the way."""
    while True:
        server = await _pick(pool, job.n)
        gone, label = server.gone, server.label
        assert server.client is not None and label is not None and pool.current is not None
        try:
            answers = await pool.or_gone(server, server.client.generate(
                job.token_ids, sampling, n=job.n, max_tokens=job.max_tokens, seed=job.seed,
                adapter=pool.current.is_adapter,
                timeout_s=pool.settings.stall_timeout_s + OVERBOOKED * job.max_tokens * SLOWEST_S,
            ))  # fmt: skip
            if wrong := [answer.labels for answer in answers if answer.labels != {label}]:
                raise ServerLost(f"it answered with the weights {sorted(wrong[0])} where it has {label}")
            server.failures = 0
            return answers, label
        except ServerLost as lost:
            await pool.lost(server, gone, str(lost))
        finally:
            server.in_flight -= job.n
            await pool.tell()


async def _pick(pool: Pool, n: int) -> Server:
    """The server with the fewest sequences, among those that serve and have room."""

    def open_ones() -> list[Server]:
        return [
            s for s in pool.servers
            if s.state == SERVING and s.label and (not s.in_flight or s.in_flight + n <= _places(pool))
        ]  # fmt: skip

    pool.unasked += 1
    try:
        while not (ready := open_ones()):
            await pool.until(lambda: bool(open_ones()))
    finally:
        pool.unasked -= 1
    server = min(ready, key=lambda s: s.in_flight)
    server.in_flight += n
    return server


def _places(pool: Pool) -> int:
    """How many sequences one server is asked for at a time."""
    return OVERBOOKED * pool.max_num_seqs
