"""The wire between the processes of a run, beside JAX: who is there, small values exchanged, and news of the dead.

Process 0 listens on the coordinator's port, every other process holds one TCP connection to it. Once a second each says
that it lives, which step it finished last and what it is at. A process that dies closes its connection, one that is
stopped falls silent, one that hangs stays at what it is at, and each time all others end with its name: a collective of
JAX would hang, or abort with a message that names nobody. Without JAX, as it has to work before JAX starts and when JAX
no longer does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from .cluster import Place
from .wire import RETRY_S, Channel, pipe, when_it_listens

PEER_LOST = 75  # exit code of a process that ends because of another one (EX_TEMPFAIL: try again)
GRACE_S = 3.0  # an error may be the echo of another process's death: for so long we wait for the news of it
_HELLO_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


class Link:
    """This process among those of its run. Without a `place` it is alone, and every method does the obvious.

    `heartbeat_timeout_s`: after that long a silence a process counts as dead. `stall_timeout_s`: where for so long no process
    has begun or finished anything, the one that has stood still the longest counts as dead (None: nobody looks).
    `start_timeout_s`: for so long the processes wait for each other at the start. Raises ValueError where they do not
    come together.
    """

    def __init__(
        self, place: Place | None = None, *, heartbeat_timeout_s: float = 100, stall_timeout_s: float | None = None,
        start_timeout_s: float = 300,
    ):  # fmt: skip
        self.process_id, self.num_processes = (0, 1) if place is None else (place.process_id, place.num_processes)
        self._peers: list[dict[str, Any]] = [_myself()]
        if place is None:
            return
        self._place, self._timeout_s, self._stall_timeout_s = place, heartbeat_timeout_s, stall_timeout_s
        self._steps = [0] * place.num_processes  # finished last, by each process
        self._stages: list[tuple[str, float]] = [("the start", 0.0)] * place.num_processes  # and for how many seconds
        self._still_s = 0.0  # since any of them began or finished anything
        self._channels: dict[int, Channel] = {}  # process 0: to all others; the others: to process 0
        self._values: dict[int, asyncio.Queue[dict]] = {i: asyncio.Queue() for i in range(place.num_processes)}
        self._service_port = _free_port()  # of JAX's own coordinator, which listens to this host alone
        self._ended = False  # nothing is news any more
        self._failure: str | None = None  # what this process itself is ending with
        self._tasks: set[asyncio.Task] = set()  # asyncio itself would let them be collected
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="link", daemon=True).start()
        self._run(self._listen(start_timeout_s) if self.process_id == 0 else self._join(start_timeout_s))
        self._loop.call_soon_threadsafe(self._spawn, self._beat())

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which writes what the run leaves behind."""
        return self.process_id == 0

    @property
    def name(self) -> str:
        return self.name_of(self.process_id)

    def name_of(self, process_id: int) -> str:
        peer = self._peers[process_id]
        return f"process {process_id} (host {peer['host']}, pid {peer['pid']})"

    # What the processes tell each other. All of them call the same methods in the same order.

    def gather(self, what: str, value: Any) -> list[Any]:
        """The value of every process, in their order. `value` is anything JSON can hold; `what` names it in errors."""
        if self.num_processes == 1:
            return [value]
        return self._run(self._gather(what, value))

    def first(self, what: str, make: Callable[[], Any]) -> Any:
        """What `make` returns on process 0, where alone it is called; its ValueError is raised everywhere."""
        answer: Any = None
        if self.is_first:
            try:
                answer = {"value": make()}
            except ValueError as error:
                answer = {"error": str(error)}
        answer = self.gather(what, answer)[0]
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["value"]

    def finished(self, step: int) -> None:
        """Tell the others that this process has finished a step."""
        if self.num_processes > 1:
            self._loop.call_soon_threadsafe(self._say_alive, step)

    def at(self, stage: str) -> None:
        """Say what this process begins to do: if it never ends, that is where it stood still."""
        if self.num_processes > 1:
            self._loop.call_soon_threadsafe(self._note, stage)

    def relay(self) -> str:
        """The address at which JAX finds its coordinator.

        On process 0 that is the port for JAX to listen on. Elsewhere it is a port of this process, which passes on what
        it is told over the coordinator's port, and stays open when process 0 dies: JAX would abort this process at once,
        before it can say why it ends.
        """
        if self.is_first:
            return f"127.0.0.1:{self._service_port}"
        return f"127.0.0.1:{self._run(self._open_relay())}"

    # The end.

    def close(self) -> None:
        """Leave together: returns once every process has come here."""
        if self.num_processes > 1 and not self._ended:
            self.gather(_END, None)
            self._ended = True

    def __enter__(self) -> Link:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        code = error.code if isinstance(error, SystemExit) else None
        if self.num_processes > 1 and error is not None and not isinstance(code, int):
            self._fail(error)
        self.close()

    def _fail(self, error: BaseException) -> None:
        """End with an error of this process, unless another one's death turns out to be behind it."""
        is_message = isinstance(error, SystemExit)  # sys.exit("error: ..."): said in words already
        self._failure = str(error) if is_message else f"{type(error).__name__}: {error}".splitlines()[0]
        time.sleep(GRACE_S)  # meanwhile `_lose` may end this process
        news = {"lost": self.process_id, "reason": f"failed ({self._failure})"}
        for channel in self._channels.values():
            self._loop.call_soon_threadsafe(channel.send, news)
        text = self._failure if is_message else "".join(traceback.format_exception(error)).rstrip()
        log.error("%s", text)
        time.sleep(0.5)  # for the news to leave
        _leave(1)

    def _lose(self, process_id: int, reason: str) -> None:
        """Process `process_id` is gone: tell the others, say so, end."""
        if self._ended or (self._failure is not None and reason == f"failed ({self._failure})"):
            return
        self._ended = True
        if self.is_first:
            for i, channel in self._channels.items():
                if i != process_id:
                    channel.send({"lost": process_id, "reason": reason, "steps": self._steps})
        self._spawn(self._end(process_id, reason))

    async def _end(self, process_id: int, reason: str) -> None:
        text = (
            f"error: {self.name_of(process_id)} {reason}; the last step it finished was {self._steps[process_id]}. "
            f"This is {self.name}: it ends too. Give the same command again to go on from the last checkpoint."
        )
        log.error("%s", text)
        await asyncio.sleep(0.5)  # for the news to leave
        _leave(PEER_LOST)

    # The loop's side: everything below runs in the thread of the link.

    def _run(self, coroutine: Coroutine) -> Any:
        future: Future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result()

    async def _listen(self, timeout_s: float) -> None:
        """Process 0: wait for all others, then introduce them to each other."""
        arrivals: asyncio.Queue[tuple[dict, Channel]] = asyncio.Queue()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            channel = Channel(reader, writer)
            hello = None
            with contextlib.suppress(TimeoutError, ValueError):
                hello = await asyncio.wait_for(channel.receive(), _HELLO_TIMEOUT_S)
            if hello == _RELAY:
                await pipe(channel, *await when_it_listens(self._service_port, timeout_s))
            elif isinstance(hello, dict) and hello.keys() == {"process_id", "num_processes", *self._peers[0]}:
                arrivals.put_nowait((hello, channel))
            else:  # not one of ours
                writer.close()

        try:
            self._server = await asyncio.start_server(accept, None, self._place.port)
        except OSError as error:
            raise ValueError(
                f"process 0 cannot listen on port {self._place.port} of {socket.gethostname()} ({error.strerror}): is "
                "another run still there? Name another port in --coordinator"
            ) from None
        known: dict[int, dict] = {0: self._peers[0]}
        try:
            async with asyncio.timeout(timeout_s):
                while len(known) < self.num_processes:
                    hello, channel = await arrivals.get()
                    self._channels.setdefault(hello["process_id"], channel)
                    if problem := _refusal(hello, known, self.num_processes):
                        channel.send({"refused": problem})
                        raise ValueError(problem)
                    known[hello["process_id"]] = hello
        except TimeoutError:
            here = ", ".join(f"{i} on {hello['host']}" for i, hello in sorted(known.items()))
            missing = _listed([i for i in range(self.num_processes) if i not in known])
            problem = (
                f"of {self.num_processes} processes only {len(known)} came within {timeout_s:g} s ({here}): {missing} "
                "missing"
            )
            await self._refuse(problem)
            raise ValueError(problem) from None
        except ValueError as error:
            await self._refuse(str(error))
            raise
        self._peers = [known[i] for i in range(self.num_processes)]
        for i, channel in self._channels.items():
            channel.send({"welcome": self._peers})
            self._spawn(self._hear(i, channel))

    async def _refuse(self, problem: str) -> None:
        for channel in self._channels.values():
            channel.send({"refused": problem})
        await asyncio.sleep(0.5)

    async def _join(self, timeout_s: float) -> None:
        """Every other process: find process 0, and wait until it has found all."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                async with asyncio.timeout_at(self._loop.time() + max(0.01, deadline - time.monotonic())):
                    reader, writer = await asyncio.open_connection(self._place.host, self._place.port)
                break
            except (OSError, TimeoutError) as error:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"process {self.process_id} on {socket.gethostname()} could not reach the coordinator "
                        f"{self._place.coordinator} within {timeout_s:g} s ({_reason(error)}): does process 0 run there, "
                        "and is the port open to this host?"
                    ) from None
                await asyncio.sleep(RETRY_S)
        channel = Channel(reader, writer)
        channel.send({"process_id": self.process_id, "num_processes": self.num_processes, **self._peers[0]})
        try:  # process 0 waits as long, and may have begun later
            async with asyncio.timeout(timeout_s + _HELLO_TIMEOUT_S):
                answer = await channel.receive()
        except TimeoutError:
            answer = None
        if answer is None or "welcome" not in answer:
            problem = (answer or {}).get("refused", f"process 0 at {self._place.coordinator} ended before all had come")
            raise ValueError(problem)
        self._peers = answer["welcome"]
        self._channels = {0: channel}
        self._spawn(self._hear(0, channel))

    async def _hear(self, process_id: int, channel: Channel) -> None:
        """Take in what a process says until it falls silent."""
        while (message := await channel.receive()) is not None:
            channel.quiet_s = 0.0
            if "steps" in message:
                self._steps = [max(ours, theirs) for ours, theirs in zip(self._steps, message["steps"], strict=True)]
            if "lost" in message:
                self._lose(message["lost"], message["reason"])
            elif "step" in message:
                stage, still_s = message["at"]
                if message["step"] > self._steps[process_id] or still_s < self._stages[process_id][1]:
                    self._still_s = 0.0
                self._steps[process_id], self._stages[process_id] = message["step"], (stage, still_s)
            elif "what" in message:
                self._values[process_id].put_nowait(message)
                if not self.is_first and message["what"] == _END:
                    self._ended = True
        self._lose(process_id, "has died: its connection was closed")

    async def _beat(self) -> None:
        """Say that this process lives, and count how long the others have been silent.

        In ticks of our own, not by the clock: a process that was stopped itself must not blame the others.
        """
        tick_s = min(1.0, self._timeout_s / 5)
        while not self._ended:
            stage, still_s = self._stages[self.process_id]
            self._stages[self.process_id] = stage, still_s + tick_s
            self._still_s += tick_s
            self._say_alive()
            self._look_for_one_that_hangs()
            for process_id, channel in self._channels.items():
                channel.quiet_s += tick_s
                if channel.quiet_s > self._timeout_s:
                    self._lose(process_id, f"has not been heard of for {self._timeout_s:g} s")
            await asyncio.sleep(tick_s)

    def _look_for_one_that_hangs(self) -> None:
        limit = self._stall_timeout_s
        if not self.is_first or limit is None or self._still_s <= limit:
            return
        stood_still = [still_s for _, still_s in self._stages]
        hanging = stood_still.index(max(stood_still))  # the others went on to where they need it
        stage, still_s = self._stages[hanging]
        all_alike = len({stage for stage, _ in self._stages}) == 1
        alike = " (and so have all others, so it may be one of them)" if all_alike else ""
        self._lose(
            hanging,
            f"has been at {stage!r} for {still_s:.0f} s{alike}, and nobody began or finished anything for {limit:g} s "
            "(trainer.stall_timeout_s)",
        )

    def _note(self, stage: str) -> None:
        self._stages[self.process_id] = stage, 0.0
        self._still_s = 0.0

    def _say_alive(self, step: int | None = None) -> None:
        if step is not None:
            self._steps[self.process_id] = step
            self._still_s = 0.0
        mine = {"step": self._steps[self.process_id], "at": self._stages[self.process_id]}
        message = {"steps": self._steps} if self.is_first else mine
        for channel in self._channels.values():
            channel.send(message)

    def _spawn(self, coroutine: Coroutine) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _gather(self, what: str, value: Any) -> list[Any]:
        mine = {"what": what, "value": value}
        if not self.is_first:
            self._channels[0].send(mine)
            answer = await self._values[0].get()
            assert answer["what"] == what, f"process 0 is at {answer['what']!r}, {self.name} at {what!r}"
            return answer["value"]
        self._values[0].put_nowait(mine)
        messages = [await self._values[i].get() for i in range(self.num_processes)]
        for i, message in enumerate(messages):
            assert message["what"] == what, f"{self.name_of(i)} is at {message['what']!r}, process 0 at {what!r}"
        if what == _END:
            self._ended = True
        values = [message["value"] for message in messages]
        for channel in self._channels.values():
            channel.send({"what": what, "value": values})
        return values

    async def _open_relay(self) -> int:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            upstream = Channel(*await asyncio.open_connection(self._place.host, self._place.port))
            upstream.send(_RELAY)
            await pipe(upstream, reader, writer)

        self._relay = await asyncio.start_server(accept, "127.0.0.1", 0)
        return self._relay.sockets[0].getsockname()[1]


_RELAY = {"relay": True}
_END = "the end of the run"


def _refusal(hello: dict, known: dict[int, dict], num_processes: int) -> str | None:
    i, host = hello["process_id"], hello["host"]
    if hello["num_processes"] != num_processes:
        return f"process {i} on {host} counts {hello['num_processes']} processes, process 0 {num_processes}"
    if i in known:
        return f"two processes call themselves process {i}: one on {known[i]['host']}, one on {host}"
    return None


def _myself() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _reason(error: BaseException) -> str:
    return str(error) or "no answer"


def _listed(numbers: list[int]) -> str:
    text = ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")
    return f"process {text} is" if len(numbers) == 1 else f"processes {text} are"


def _leave(code: int) -> None:
    """End this process at once: the usual way out would wait for the others in JAX."""
    sys.stdout.flush()
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
