"""One version of the weights on its way to the servers: a file, which they read where they see it, and get over HTTP
where they do not.

The file stays until the next version is everywhere: a server that is started again gets these weights from it, also when
training has gone on from the arrays that they came from. A server that has the file of the version before is sent what
differs from it, and nothing where nothing does.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ..models.config import ModelConfig
from ..weights.peft_tree import write_adapter_config
from ..weights.sync import Export, FileSink
from .protocol import Manifest, Refused, not_finite
from .vllm_pool import DEAD, STARTING, Server

_numbers = itertools.count()


class Publication:
    """`adapter_of` is the model that an adapter adapts; None: the export is a whole model.

    `manifest` is without its contents until it has been sent. `before` is the publication that the servers have now.
    """

    def __init__(
        self, manifest: Manifest, probe_ids: list[int], probe_logprobs: list[float],
        loop: asyncio.AbstractEventLoop, config: ModelConfig, *,
        adapter_of: str | None, transports: Callable[[Server], Awaitable[str]], timeout_s: float,
        before: Publication | None = None,
    ):  # fmt: skip
        self.manifest, self.label = manifest, manifest.label
        self.probe_ids, self.probe_logprobs = probe_ids, probe_logprobs
        self.is_adapter = adapter_of is not None
        self._loop, self._config, self._adapter_of = loop, config, adapter_of
        self._transports, self._timeout_s = transports, timeout_s
        # Of its own, also where a version is published again or another trainer uploads to the same server.
        folder = f"v{manifest.version}-{next(_numbers)}-{manifest.run}"
        self.name = f"{folder}/{'adapter_model' if self.is_adapter else 'model'}.safetensors"
        self._files: dict[str, FileSink] = {}  # by transport
        # By the start of the server that gets it.
        self._uploads: dict[asyncio.Event, asyncio.Task[str]] = {}
        self._num_bytes: dict[asyncio.Event, int] = {}
        self._is_forgotten = threading.Event()
        self._before: tuple[str, Path] | None = None  # what a server may have, and a copy of it
        if before is not None and before.manifest.shapes == manifest.shapes:
            self._before = before.name, before._file.path

    @property
    def _file(self) -> FileSink:
        return next(iter(self._files.values()))

    @property
    def num_bytes(self) -> int:
        """What all servers together were sent of it, or have read where it lies."""
        return sum(self._num_bytes.values())

    def send(self, export: Export, parents: Mapping[str, Path], servers: Sequence[Server]) -> None:
        """Write it to a folder in each of `parents`, by transport; `servers` are sent the first file as it grows."""

        def upload() -> None:
            for server in servers:
                self._loop.call_soon_threadsafe(self._begin, server)

        try:
            for transport, parent in parents.items():
                path = parent / self.name
                if servers and not self._files:
                    file = FileSink(path, self._before and self._before[1], on_change=upload)
                else:
                    file = FileSink(path)
                self._files[transport] = file
                if self._adapter_of is not None:
                    write_adapter_config(path.parent, self._config, self._adapter_of)
            export.send(list(self._files.values()))
            if export.not_finite:
                raise not_finite(self.manifest.version, export.not_finite[0])
        except BaseException:
            for file in self._files.values():
                file.abandon()
            if jax.process_count() > 1:
                export.finish()
            raise
        for file in self._files.values():
            file.close()
        self.manifest = export.manifest

    def named(self, other: Publication) -> Publication:
        """As the same weights of another version, which are probed again."""
        same = copy.copy(self)
        same.label, same.probe_logprobs, same._num_bytes = other.label, other.probe_logprobs, {}
        return same

    async def place(self, server: Server) -> str:
        """Where the server has it, whenever it was started."""
        transport = await self._transports(server)
        if transport in self._files:
            self._num_bytes[server.gone] = self.manifest.nbytes
            return str(self._files[transport].path)
        try:
            return await asyncio.shield(self._upload(server))
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if not self._is_forgotten.is_set() or (task is not None and task.cancelling()):
                raise
            raise Refused(f"version {self.manifest.version} of the weights has been followed by another") from error

    async def load(self, server: Server) -> dict[str, Any]:
        """Put it in the place of the server's weights; what the server says of it."""
        path, client = await self.place(server), server.client
        assert client is not None
        if not self.is_adapter:
            return await client.load(path, self.manifest, timeout_s=self._timeout_s)
        await client.load_adapter(path, self.manifest, timeout_s=self._timeout_s)
        return {"digest": None}

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
        client, file, base = server.client, self._file, None
        assert client is not None
        self._num_bytes[server.gone] = 0
        if self._before is not None and await client.sees(self._before[0]):
            base = self._before[0]
        pieces = self._counted(file.follow(changes=base is not None), server.gone)
        path = await client.upload(self.name, pieces, base=base, timeout_s=self._timeout_s)
        for other in sorted(file.path.parent.glob("*.json")):  # of an adapter
            name = f"{file.path.parent.name}/{other.name}"
            await client.upload(name, self._counted(_whole(other), server.gone), timeout_s=self._timeout_s)
        return path

    async def _counted(self, pieces: AsyncIterator[bytes], start: asyncio.Event) -> AsyncIterator[bytes]:
        async for piece in pieces:
            self._num_bytes[start] += len(piece)
            yield piece

    def forget(self) -> None:
        self._is_forgotten.set()
        for upload in list(self._uploads.values()):
            self._loop.call_soon_threadsafe(upload.cancel)
        for file in self._files.values():
            shutil.rmtree(file.path.parent, ignore_errors=True)


async def _whole(path: Path) -> AsyncIterator[bytes]:
    yield path.read_bytes()
