"""The servers of a run, on one event loop: who lives, who has which weights, and what is done about one that fails.

A server is STARTING (until it has the current weights), SERVING, DRAINING (it answers what it was asked before new
weights come, and is asked no more), LOADING them (while others may still answer), ASLEEP (it has given its memory back
until new weights come), or DEAD (given up). It is lost when its process ends, a request breaks, an answer makes no sense,
or it gives no sign of life; it is then started again with the weights of now. A server that fails `max_restarts` times
in a row is dropped (one that is named by its URL is tried again with the next weights); when none is left the run ends,
with the reason. What servers are asked is in `vllm_requests.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ..config import VllmSection
from .engine import EngineLost
from .protocol import Manifest, Refused
from .vllm_adapter import KEEP_NOTHING, KEEP_WEIGHTS, untried
from .vllm_client import Client, ServerLost
from .vllm_process import ServerProcess

log = logging.getLogger(__name__)
T = TypeVar("T")

STARTING, SERVING, DRAINING, LOADING = "starting", "serving", "draining", "loading"
ASLEEP, DEAD = "asleep", "dead"
WATCHED = (SERVING, DRAINING, ASLEEP)  # starting and loading have time limits of their own
POLL_S = 0.25


class Publication(Protocol):
    """One version of the weights, as the pool brings it to servers."""

    label: str  # what a server stamps on every sample of this version
    manifest: Manifest
    probe_ids: list[int]
    probe_logprobs: list[float]  # of the trainer, for the tokens after the first
    is_adapter: bool

    async def place(self, server: Server) -> object:
        """Bring it as near to the server as it can be without a load. Refused, where it is followed by another."""
        ...

    async def load(self, server: Server) -> dict[str, Any]:
        """Put it in the place of the server's weights; what the server says of it."""
        ...

    def anew(self, server: Server) -> None:
        """The server has thrown it away, and is to be brought it again."""


class Channel(Protocol):
    """By what weights get from the trainer's devices to one start of a server."""

    async def end(self) -> None: ...


@dataclass(eq=False)
class Server:
    name: str
    key: str
    url: str | None  # None: it is started here
    process: ServerProcess | None
    client: Client | None = None
    channel: Channel | None = None
    state: str = STARTING
    label: str | None = None  # of the weights that it has
    content: str | None = None  # their digest
    live_digest: str | None = None  # what the server computed of its live parameters
    info: dict[str, Any] = field(default_factory=dict)
    in_flight: int = 0  # sequences
    failures: int = 0  # in a row
    has_started: bool = False
    reason: str = ""  # of the last loss
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # set when it is lost; a new one for each start

    def __str__(self) -> str:
        return f"vLLM {self.name}"

    def has(self, publication: Publication) -> bool:
        """Also the contents are compared: a version may be published again with others."""
        return (self.label, self.content) == (publication.label, publication.manifest.digest)

    def forget(self, reason: str) -> None:
        """Whatever weights it had, nobody knows that it has them still."""
        self.reason, self.label, self.content, self.live_digest = reason, None, None, None


class Pool:
    def __init__(self, servers: list[Server], settings: VllmSection, *, max_num_seqs: int):
        self.servers, self.settings = servers, settings
        self.max_num_seqs = max_num_seqs
        self.current: Publication | None = None
        self.restarts = self.loads = 0
        self.is_asleep = False  # the servers that are started here, as there is no memory for them
        self.unasked = 0  # requests that wait for a server
        self.waited_s = 0.0  # of the last `install`, in which answers were waited for and nothing else was done
        self._num_busy, self._idle_since = 0, 0.0  # with bringing weights or loading them
        self._changed = asyncio.Condition()
        self._installing = asyncio.Lock()  # until it is known whether the servers take the weights
        self._may_catch_up = asyncio.Event()
        self._may_catch_up.set()
        self._catching_up = 0
        self._tasks: set[asyncio.Task] = set()

    # Life and death.

    async def open(self) -> None:
        for server in self.servers:
            self._spawn(self._bring_up(server))
            self._spawn(self._watch(server))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for server in self.servers:  # whoever still waits hears of it
            server.reason = "the engine was closed"
            server.gone.set()
            await self._set(server, DEAD)
        await asyncio.gather(*(self._end(server) for server in self.servers))

    async def ready(self) -> dict[str, Any]:
        """What the first server that has started says of itself. Raises ValueError where none can be started."""
        try:
            await self.until(lambda: any(server.info for server in self.servers))
        except EngineLost as error:
            raise ValueError(str(error)) from None
        return next(server.info for server in self.servers if server.info)

    async def _end(self, server: Server) -> None:
        if server.client is not None:
            await server.client.close()
        if server.process is not None:
            await asyncio.to_thread(server.process.end)
        if server.channel is not None:
            channel, server.channel = server.channel, None
            await channel.end()

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _set(self, server: Server, state: str) -> None:
        server.state = state
        await self.tell()

    async def tell(self) -> None:
        """Whoever waits `until` something looks again."""
        async with self._changed:
            self._changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a change after which `condition` holds; every state has a time limit of its own."""
        async with self._changed:
            await self._changed.wait_for(lambda: condition() or all(s.state == DEAD for s in self.servers))
        if not condition():
            raise EngineLost("; ".join(f"{server}: {server.reason}" for server in self.servers))

    async def lost(self, server: Server, gone: asyncio.Event, reason: str) -> None:
        """Start a server again, once for all who saw it fail. `gone` tells of which start they speak."""
        if gone is not server.gone or gone.is_set() or server.state == DEAD:
            return
        log.warning("%s: %s; it is started again", server, reason)
        server.forget(reason)
        gone.set()
        await self._set(server, STARTING)
        self._spawn(self._bring_up(server, failed=True))

    async def _bring_up(self, server: Server, *, failed: bool = False) -> None:
        """Start, and load the weights of now; again and again, up to the limit."""
        while True:
            if failed:
                server.failures += 1
                if server.failures > self.settings.max_restarts or not server.has_started:
                    break
                self.restarts += 1
            server.gone = asyncio.Event()
            try:
                if self.is_asleep and server.process is not None:
                    await self._end(server)  # what is left of it holds memory that is another's now
                    await self.until(lambda: not self.is_asleep)
                await self._start(server)
                while not await self._serves(server):
                    await self._catch_up(server)
                return
            except ServerLost as lost:
                failed = True
                server.forget(str(lost))
                log.warning("%s: %s", server, lost)
            except ValueError as error:  # what another start will not mend
                server.reason = str(error)
                break
            except Exception as error:  # nobody foresaw it; untold, it would leave others waiting for ever
                server.reason = f"{type(error).__name__}: {error}"
                break
        await self._give_up(server)

    async def _give_up(self, server: Server) -> None:
        if (process := server.process) is not None:
            if (why := process.explained()) and why not in server.reason:
                server.reason += f" ({why})"
            if str(process.log) not in server.reason:
                server.reason += f"; its log is {process.log}"
        if any(other is not server and other.state != DEAD for other in self.servers):
            log.warning("%s is given up, the others go on: %s", server, server.reason)
        try:
            await self._end(server)
        finally:
            server.gone.set()
            await self._set(server, DEAD)

    async def _catch_up(self, server: Server) -> None:
        """Load the weights of now. Raises Refused for those that it alone refuses."""
        while True:
            await self._may_catch_up.wait()
            await self._answers(server)  # else `hold` would wait for one that hangs
            if self._may_catch_up.is_set():
                break
        publication = self.current
        assert publication is not None
        self._catching_up += 1
        try:
            await self.tell()
            await self._load(server, publication)
        except Refused:
            async with self._installing:
                if self.current is publication:
                    raise
        finally:
            self._catching_up -= 1
            await self.tell()

    async def _answers(self, server: Server) -> None:
        """Raises ServerLost where its workers give no sign of life."""
        assert server.client is not None
        limit_s = self.settings.stall_timeout_s
        try:
            await asyncio.wait_for(server.client.ping(), limit_s)
        except TimeoutError:
            raise ServerLost(f"it has started and gave no sign of life for {limit_s:.0f} s") from None

    async def _serves(self, server: Server) -> bool:
        """SERVING from now on, if it has the current weights."""
        if self.current is not None and not server.has(self.current):
            return False
        await self._set(server, SERVING)
        return True

    async def _start(self, server: Server) -> None:
        """Until it answers for the first time."""
        await self._launch(server)
        process, limit_s = server.process, self.settings.start_timeout_s
        deadline = asyncio.get_running_loop().time() + limit_s
        while True:
            assert server.client is not None
            try:
                server.info = await server.client.info()
                break
            except ServerLost as lost:
                ended = None if process is None else process.ended()
                is_late = asyncio.get_running_loop().time() > deadline
                if process is not None and process.port_was_taken() and not is_late:
                    await self._launch(server)  # another program was quicker: at another port
                elif ended is not None:
                    raise ServerLost(f"it did not start: {ended}") from None
                elif is_late:
                    where = f"it is {server.url}" if process is None else f"its log is {process.log}"
                    raise ServerLost(
                        f"it was waited for {limit_s:.0f} s (rollout.vllm.start_timeout_s) to start, and {lost}; {where}"
                    ) from None
                await asyncio.sleep(POLL_S)
        server.has_started = True
        if warning := untried(server.info["vllm"]):
            log.warning("%s: %s", server, warning)
        await self.tell()

    async def _launch(self, server: Server) -> None:
        """A client for it, and where it is started here its process."""
        await self._end(server)
        if server.process is not None:
            await asyncio.to_thread(server.process.start)
        url = server.url if server.process is None else server.process.url
        assert url is not None
        server.client = Client(url, server.key, timeout_s=self.settings.load_timeout_s)

    async def _watch(self, server: Server) -> None:
        """Notices a process that has ended, and a server that stands still."""
        pause = min(5.0, self.settings.stall_timeout_s / 4)
        while True:
            await asyncio.sleep(POLL_S)
            gone = server.gone
            if server.state not in WATCHED:
                continue
            if server.process is not None and (ended := server.process.ended()):
                await self.lost(server, gone, ended)
            elif server.client is not None:
                try:
                    await asyncio.wait_for(self.or_gone(server, server.client.ping()), self.settings.stall_timeout_s)
                    await asyncio.sleep(pause - POLL_S)
                    continue
                except TimeoutError:
                    reason = f"it gave no sign of life for {self.settings.stall_timeout_s:.0f} s"
                except Exception as lost:  # whatever it is: nobody else watches this server
                    reason = str(lost) or repr(lost)
                if server.state in WATCHED:  # and has not begun to load meanwhile, for which a sign of life waits
                    await self.lost(server, gone, reason)

    async def or_gone(self, server: Server, work: Awaitable[T]) -> T:
        """What `work` returns, unless the server is lost before."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(server.gone.wait())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ServerLost(server.reason)
        finally:
            for pending in (task, gone):
                pending.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    # Weights.

    async def lend(self) -> None:
        """The weights of now lie where they lie until `hold`: servers that have started may load them."""
        self._may_catch_up.set()

    async def hold(self) -> None:
        """When this returns no server loads the weights of now, and none will before `lend` or `install`."""
        self._may_catch_up.clear()
        async with self._changed:
            await self._changed.wait_for(lambda: not self._catching_up)

    async def sleep(self) -> None:
        """The servers that were started here give their memory back until `install`. They have answered everything."""
        own = [server for server in self.servers if server.process is not None]
        await self.until(lambda: all(server.state in (SERVING, DEAD) for server in own))  # one may have been lost
        self.is_asleep = True
        await asyncio.gather(*(self._put_to_sleep(server) for server in own if server.state == SERVING))

    async def _put_to_sleep(self, server: Server) -> None:
        gone, client = server.gone, server.client
        assert client is not None and not server.in_flight
        await self._set(server, ASLEEP)
        server.label = server.content = server.live_digest = None
        try:
            # An adapter's base is not published again.
            await client.sleep(KEEP_WEIGHTS if self.settings.publish == "adapter" else KEEP_NOTHING)
        except Exception as error:
            await self.lost(server, gone, str(error) or repr(error))

    async def install(self, publication: Publication) -> None:
        """Every server that serves has these weights when this returns; those that start take them by themselves.

        What is under way is answered with the weights before; each server takes the new ones as soon as it is idle.
        Raises Refused where a server does not take them; the weights before go on answering, on all of them.
        """
        self.waited_s, self._idle_since = 0.0, time.perf_counter()
        await self.until(lambda: not self.unasked)
        async with self._installing:
            before, self.current = self.current, publication
            await self.lend()
            self.is_asleep = False
            await self.tell()
            for server in self.servers:
                if server.state == DEAD and server.process is None:  # whoever started it may have started it again
                    server.failures = 0
                    await self._set(server, STARTING)
                    self._spawn(self._bring_up(server))
            # What is uploaded is there before a server stops to answer.
            ready = [server for server in self.servers if server.state in (SERVING, ASLEEP)]
            with self._busy():
                await asyncio.gather(*(self._bring(server) for server in ready))
            ready = [server for server in self.servers if server.state in (SERVING, ASLEEP)]
            results = await asyncio.gather(*(self._replace(server) for server in ready), return_exceptions=True)
            if any(isinstance(error, Refused) for error in results):
                self.current = before
                await asyncio.gather(*(self._take_back(server) for server in ready))
        for error in results:
            if error is not None:
                raise error
        await self.until(lambda: any(s.state == SERVING and s.has(publication) for s in self.servers))

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """Something is done for the weights; where nothing was done before, `install` had to wait."""
        if not self._num_busy:
            self.waited_s += time.perf_counter() - self._idle_since
        self._num_busy += 1
        try:
            yield
        finally:
            self._num_busy -= 1
            self._idle_since = time.perf_counter()

    async def _bring(self, server: Server) -> None:
        gone, publication = server.gone, self.current
        assert publication is not None
        if server.content == publication.manifest.digest:
            return
        try:
            await publication.place(server)
        except Exception as error:
            await self.lost(server, gone, str(error) or repr(error))

    async def _replace(self, server: Server) -> None:
        gone, wakes = server.gone, server.state == ASLEEP
        if server.state not in (SERVING, ASLEEP):
            return  # it was lost a moment ago
        await self._set(server, DRAINING)
        async with self._changed:
            await self._changed.wait_for(lambda: server.in_flight == 0 or gone.is_set())
        if gone.is_set():
            return  # it is being started again, and loads these weights then
        try:
            await self._set(server, LOADING)
            assert self.current is not None
            with self._busy():
                await self._load(server, self.current, wakes=wakes)
            await self._set(server, SERVING)
        except ServerLost as lost:
            await self.lost(server, gone, str(lost))
        except Refused:
            await self._set(server, SERVING)
            raise
        except Exception as error:  # whatever it is, nobody knows what the server has now
            await self.lost(server, gone, str(error) or repr(error))

    async def _take_back(self, server: Server) -> None:
        """The weights before, on a server that took those that another one refused, or has slept and has none."""
        if self.current is None:
            server.label = None  # it answers nothing until there are weights that all take
            return
        if server.state != SERVING or server.has(self.current):
            return
        gone = server.gone
        self.current.anew(server)
        try:
            await self._replace(server)
        except Refused as error:
            await self.lost(server, gone, str(error))

    async def _load(self, server: Server, publication: Publication, *, wakes: bool = False) -> None:
        """Load, name the version, forget the prefixes, and look whether it answers with these weights."""
        client, manifest = server.client, publication.manifest
        assert client is not None
        if wakes:
            await client.wake_up("weights")
        try:
            if server.content != manifest.digest:  # else only the version is another: the weights have not changed
                await self._replace_weights(server, publication)
        except Refused:
            if wakes:
                await client.wake_up("kv_cache")
            raise
        if wakes:  # after the load, which needs memory of its own for a moment
            await client.wake_up("kv_cache")
        await client.set_version(publication.label)
        await client.reset_cache()
        await self._probe(server, publication)
        server.label, server.content = publication.label, manifest.digest

    async def _replace_weights(self, server: Server, publication: Publication) -> None:
        self.loads += 1
        version, answer = publication.manifest.version, await publication.load(server)
        log.info("%s has version %d: %s", server, version, answer)
        if answer["digest"] is not None and answer["digest"] == server.live_digest:
            raise ServerLost(f"version {version} of the weights left its parameters as they were")
        server.live_digest = answer["digest"]

    async def _probe(self, server: Server, publication: Publication) -> None:
        """A fixed prompt's logprobs, against the trainer's: the one proof that holds whatever a server keeps where."""
        assert server.client is not None
        manifest = publication.manifest
        logprobs, labels = await server.client.probe(publication.probe_ids, adapter=publication.is_adapter)
        if labels != {publication.label}:
            raise ServerLost(f"it names its weights {sorted(labels)} after loading {publication.label}")
        gaps = [abs(a - b) for a, b in zip(logprobs, publication.probe_logprobs, strict=True)]
        gap, bound = sum(gaps) / len(gaps), self._tolerance(server)
        if not gap <= bound:
            raise ServerLost(
                f"after loading version {manifest.version} it does not answer with these weights: a fixed prompt's "
                f"logprobs are {gap:.2g} from the trainer's in the mean, and rollout.vllm.probe_tolerance is {bound:g}"
            )

    def _tolerance(self, server: Server) -> float:
        if self.settings.probe_tolerance is not None:
            return self.settings.probe_tolerance
        return 1e-3 if server.info["dtype"] == "float32" else 0.15
