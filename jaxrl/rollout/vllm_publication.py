"""One version of the weights on its way to the servers: a file, which they read where they see it, and get over HTTP
where they do not.

The file stays until the next version is everywhere: a server that is started again gets these weights from it, also when
training has gone on from the arrays that they came from.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import jax

from ..models.config import ModelConfig
from ..weights.peft_tree import write_adapter_config
from ..weights.sync import PIECE, Export, FileSink
from .protocol import Refused
from .vllm_pool import DEAD, STARTING, Server

_numbers = itertools.count()


class Publication:
    """`adapter_of` is the model that an adapter adapts; None: the export is a whole model."""

    def __init__(
        self, make: Callable[[], Export], probe_ids: list[int], probe_logprobs: list[float],
        loop: asyncio.AbstractEventLoop, config: ModelConfig, *,
        adapter_of: str | None, transports: Callable[[Server], Awaitable[str]], timeout_s: float,
    ):  # fmt: skip
        self.probe_ids, self.probe_logprobs = probe_ids, probe_logprobs
        self.is_adapter = adapter_of is not None
        self.manifest = make().manifest  # without its contents, until it has been sent
        self._make, self._loop, self._config, self._adapter_of = make, loop, config, adapter_of
        self._transports, self._timeout_s = transports, timeout_s
        self._name = f"v{self.manifest.version}"
        self._folder = f"{self._name}-{next(_numbers)}"  # of its own, also where a version is published again
        self._is_forgotten = False
        self._files: dict[str, FileSink] = {}  # by transport
        self._uploads: dict[asyncio.Event, asyncio.Task[str]] = {}  # by the start of the server that is sent it

    def send(self, parents: Mapping[str, Path], servers: Sequence[Server]) -> None:
        """Write it to a folder in each of `parents`, by transport; `servers` are sent the first file as it grows."""
        export = self._make()
        try:
            for transport, parent in parents.items():
                folder = parent / self._folder
                name = "adapter_model.safetensors" if self.is_adapter else "model.safetensors"
                self._files[transport] = FileSink(folder / name)
                if self._adapter_of is not None:
                    write_adapter_config(folder, self._config, self._adapter_of)
            for server in servers:
                self._loop.call_soon_threadsafe(self._begin, server)
            export.send(list(self._files.values()))
            if export.not_finite:
                raise Refused(
                    f"version {self.manifest.version} of the weights has NaN or infinity in {export.not_finite[0]}: training "
                    "went wrong"
                )
        except BaseException:
            for file in self._files.values():
                file.abandon()
            if jax.process_count() > 1:
                export.finish()
            raise
        for file in self._files.values():
            file.close()
        self.manifest = export.manifest

    async def place(self, server: Server) -> str:
        """Where the server has it, whenever it was started."""
        transport = await self._transports(server)
        if transport in self._files:
            return str(self._files[transport].path)
        try:
            return await asyncio.shield(self._upload(server))
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if not self._is_forgotten or (task is not None and task.cancelling()):
                raise
            raise Refused(f"version {self.manifest.version} of the weights has been followed by another") from error

    def anew(self, server: Server) -> None:
        """The server has taken another version since, and has thrown this one away."""
        self._uploads.pop(server.gone, None)

    def _begin(self, server: Server) -> None:
        if server.state not in (STARTING, DEAD):  # one that was lost meanwhile gets it when it has started again
            self._upload(server)

    def _upload(self, server: Server) -> asyncio.Task[str]:
        """The path on the server, when all of it is there; one upload for each start of a server."""
        if server.gone not in self._uploads:
            upload = asyncio.ensure_future(self._uploaded(server))
            upload.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever asks gets it
            self._uploads[server.gone] = upload
        return self._uploads[server.gone]

    async def _uploaded(self, server: Server) -> str:
        client, file = server.client, next(iter(self._files.values()))
        assert client is not None
        for other in sorted(file.path.parent.glob("*.json")):  # of an adapter
            await client.upload(f"{self._name}/{other.name}", _whole(other), timeout_s=self._timeout_s)
        return await client.upload(f"{self._name}/{file.path.name}", file.follow(PIECE), timeout_s=self._timeout_s)

    def forget(self) -> None:
        self._is_forgotten = True
        for upload in list(self._uploads.values()):
            self._loop.call_soon_threadsafe(upload.cancel)
        for file in self._files.values():
            shutil.rmtree(file.path.parent, ignore_errors=True)


async def _whole(path: Path) -> AsyncIterator[bytes]:
    yield path.read_bytes()
