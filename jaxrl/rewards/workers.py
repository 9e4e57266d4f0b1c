"""Worker processes for functions that may hang or crash: a user's own, and the rewards that evaluate mathematics.

A pool hands samples to its processes and collects their scores. A process that gives no answer in time is killed, with
whatever it started, and replaced; so is one that dies. Its samples get an error, all others their score.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from jaxrl.rewards.custom import Kind, RewardFunction, load, timed_out
from jaxrl.rewards.score import Score, describe, failed

_START_TIMEOUT_S = 300.0  # for importing a user's file, which may load a model
_SLACK_S = 1.0  # an event loop's own time limit acts first, and only a blocked loop runs into ours

# Not multiprocessing: its spawn imports the main script anew in every child (here: JAX, and perhaps the accelerator),
# and its fork copies a process full of JAX's threads.
_CHILD = "import sys; sys.path[:] = sys.argv[2:]; from jaxrl.rewards.workers import serve; serve(int(sys.argv[1]))"


class WorkerPool:
    """Scores samples with one reward in `num_workers` processes.

    `timeout_s` is the time for one sample; for a function that takes whole batches, for one call. Functions of whole
    batches and async functions (`max_concurrent` samples at once) need one process only. With another `load`, a function
    of a module, samples and results are what that makes of them; a sample that failed has a `Score` with the error.
    """

    def __init__(
        self, name: str, kwargs: Mapping[str, Any], *, timeout_s: float, num_workers: int, max_concurrent: int,
        load: Callable[..., RewardFunction] = load, what: str = "reward",
    ):  # fmt: skip
        self._timeout_s, self._what = timeout_s, what
        self._setup = (load, name, dict(kwargs), timeout_s, max_concurrent)
        self._workers = [_Worker(self._setup)]
        try:
            while not self._workers[0].ready:  # it tells whether the reward loads at all, and what kind it is
                self._collect()
        except BaseException:
            self.close()
            raise
        self._kind: Kind = self._workers[0].kind
        self.whole_batch = self._kind == "batch"
        if self._kind == "sample":
            self._workers += [_Worker(self._setup) for _ in range(num_workers - 1)]

    def score(self, samples: Sequence[Any]) -> list[Any]:
        """One score for each sample, in their order."""
        assert self._workers, "this scorer is closed"
        numbers = list(range(len(samples)))
        jobs = deque([number] for number in numbers) if self._kind == "sample" else deque([numbers])
        scores: dict[int, Score] = {}
        try:
            while len(scores) < len(samples):
                for worker in self._workers:
                    if jobs and worker.ready and not worker.pending:
                        job = jobs.popleft()
                        scores |= worker.give(job, [samples[number] for number in job])
                scores |= self._collect()
        except BaseException:
            for worker in [worker for worker in self._workers if worker.pending]:
                worker.end(patience_s=0.0)
                self._replace(worker)  # its late answers must not be taken for answers to the next batch
            raise
        return [scores[number] for number in numbers]

    def close(self) -> None:
        """Ends all processes."""
        for worker in self._workers:
            worker.connection.close()  # an idle process ends by itself when it sees this
        for worker in self._workers:
            worker.end(patience_s=1.0)
        self._workers = []

    def _collect(self) -> dict[int, Score]:
        """Waits for the next event (a message, a death, the end of a worker's time); the scores it brings."""
        waiting = [worker for worker in self._workers if worker.pending or not worker.ready]
        if not waiting:
            return {}
        remaining_s = min(worker.deadline for worker in waiting) - time.monotonic()
        heard = wait([worker.connection for worker in waiting], timeout=max(0.0, remaining_s))
        scores: dict[int, Score] = {}
        for worker in waiting:
            if worker.connection in heard:
                try:
                    scores |= worker.receive()
                except (EOFError, ConnectionResetError):
                    exit_code = worker.end(patience_s=1.0)
                    scores |= self._give_up(worker, failed(f"its worker process died (exit code {exit_code})"))
            elif time.monotonic() >= worker.deadline:
                worker.end(patience_s=0.0)
                scores |= self._give_up(worker, timed_out(self._timeout_s if worker.ready else _START_TIMEOUT_S))
        return scores

    def _give_up(self, worker: _Worker, score: Score) -> dict[int, Score]:
        if not worker.ready:
            raise ValueError(f"{self._what} {self._setup[1]} could not be started: {score.error}.")
        self._replace(worker)
        return dict.fromkeys(worker.pending, score)

    def _replace(self, worker: _Worker) -> None:
        self._workers[self._workers.index(worker)] = _Worker(self._setup)


class _Worker:
    """One process and the job it is at: the numbers of its samples, and which of them have no answer yet."""

    kind: Kind  # known once it is ready

    def __init__(self, setup: tuple[Callable[..., RewardFunction], str, dict[str, Any], float, int]):
        self.connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(theirs.fileno()), *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the trainer; and a group of its own can be killed as a whole
                # The trainer owns the accelerator; and the order of sets, on which sympy's path may depend, is fixed.
                env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": "0"},
            )
        self._timeout_s = setup[3]
        self.ready = False
        self.deadline = time.monotonic() + _START_TIMEOUT_S
        self._job: list[int] = []
        self.pending: set[int] = set()
        with contextlib.suppress(BrokenPipeError):  # a process that is already dead shows as such when we wait for it
            self.connection.send(setup)

    def give(self, job: list[int], samples: list[Any]) -> dict[int, Score]:
        """Starts the process on `samples`; the scores of those that cannot be sent to it."""
        try:
            message = pickle.dumps(samples)
        except Exception as error:
            return dict.fromkeys(job, failed(f"the sample cannot be sent to a worker process: {describe(error)}"))
        self._job, self.pending = job, set(job)
        self._set_deadline()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(message)
        return {}

    def receive(self) -> dict[int, Score]:
        """Reads one message: that the process is ready (or why it cannot be), or the score of a sample."""
        message = self.connection.recv()
        if not self.ready:
            self.kind, problem, details = message
            if problem is not None:
                error = ValueError(problem)
                error.add_note(details)
                raise error
            self.ready = True
            return {}
        place, score = message
        self.pending.discard(self._job[place])
        self._set_deadline()
        return {self._job[place]: score}

    def end(self, *, patience_s: float) -> int:
        """Kills the process, and what it started, unless it ends by itself in time; its exit code."""
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=patience_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left in the group
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def _set_deadline(self) -> None:
        slack_s = _SLACK_S if self.kind == "concurrent" else 0.0
        self.deadline = time.monotonic() + self._timeout_s + slack_s


def serve(fd: int) -> None:
    """The life of a worker process: load the reward, then score job after job until the pool hangs up."""
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the pool hung up
        _serve(Connection(fd))


def _serve(connection: Connection) -> None:
    load, name, kwargs, timeout_s, max_concurrent = connection.recv()
    try:
        function = load(name, kwargs, timeout_s=timeout_s, max_concurrent=max_concurrent)
    except Exception as error:
        problem = str(error) if isinstance(error, ValueError) else f"{name}: {describe(error)}."
        connection.send((None, problem, traceback.format_exc()))
        return
    connection.send((function.kind, None, None))

    def emit(place: int, score: Score) -> None:
        # Should the trainer be gone when a sample is stuck, the alarm ends this process, even inside C code.
        signal.setitimer(signal.ITIMER_REAL, 10.0 + 2 * timeout_s)
        connection.send((place, score))

    while True:
        samples = connection.recv()
        signal.setitimer(signal.ITIMER_REAL, 10.0 + 2 * timeout_s)
        function.run(samples, emit)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
