"""One version of the weights on its way to the servers: a folder where they see one, an HTTP upload to each of the others."""

from __future__ import annotations

import asyncio
import queue
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import jax

from ..models.config import ModelConfig
from ..weights.peft_tree import write_adapter_config
from ..weights.sync import Export, FileSink
from .vllm_client import ServerLost
from .vllm_pool import Server


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
        self._file = "adapter_model.safetensors" if self.is_adapter else "model.safetensors"
        self._folders: dict[str, Path] = {}  # by transport
        self._uploaded: dict[asyncio.Event, str] = {}  # path on the server, by the start of it that took it in

    def send(self, servers: Sequence[Server], parents: Mapping[str, Path]) -> None:
        """Stream it once: an upload to each of `servers`, and a file in a folder in each of `parents`, by transport."""
        export, files, uploads = self._make(), [], []
        try:
            for transport, parent in parents.items():
                self._folders[transport] = parent / self._name
                files.append(FileSink(self._folders[transport] / self._file))
                if self._adapter_of is not None:
                    write_adapter_config(self._folders[transport], self._config, self._adapter_of)
            uploads += [Upload(self._loop, server, f"{self._name}/{self._file}", self._timeout_s) for server in servers]
            export.send([*files, *uploads])
        except BaseException:
            for sink in (*files, *uploads):
                sink.abandon()
            if jax.process_count() > 1:
                export.finish()
            raise
        for file in files:
            file.close()
        for upload in uploads:
            path = upload.close()
            if path is not None:
                self._uploaded[upload.gone] = path
        self.manifest = export.manifest

    async def place(self, server: Server) -> str:
        """Where the server has the export; one that started after the stream had passed is sent it anew."""
        transport = await self._transports(server)
        if transport in self._folders:
            return str(self._folders[transport] / self._file)
        if server.gone not in self._uploaded:
            await asyncio.to_thread(self._send_again, server)
        if server.gone not in self._uploaded:
            raise ServerLost(f"version {self.manifest.version} of the weights could not be sent to it")
        return self._uploaded[server.gone]

    def _send_again(self, server: Server) -> None:
        later = "it gets weights with the next version"
        if jax.process_count() > 1:
            raise ServerLost(f"{later}: all hosts would have to gather those of now")
        try:
            self.send([server], {})
        except RuntimeError as error:  # of JAX: a deleted array
            raise ServerLost(f"{later}: training has gone on from those of now ({error})") from None

    def forget(self) -> None:
        for folder in self._folders.values():
            shutil.rmtree(folder, ignore_errors=True)


class Upload:
    """A sink that is an HTTP request under way. Where that breaks, the rest is thrown away: the server is lost."""

    def __init__(self, loop: asyncio.AbstractEventLoop, server: Server, name: str, timeout_s: float):
        assert server.client is not None
        self.gone = server.gone
        self._loop = loop
        self._pieces: queue.Queue[memoryview | None] = queue.Queue(maxsize=4)
        request = server.client.upload(name, self._stream(), timeout_s=timeout_s)
        self._request = asyncio.run_coroutine_threadsafe(request, loop)

    async def _stream(self) -> AsyncIterator[bytes]:
        while (piece := await self._loop.run_in_executor(None, self._pieces.get)) is not None:
            yield bytes(piece)

    def write(self, piece: memoryview | None) -> None:
        while not self._request.done():
            try:
                return self._pieces.put(piece, timeout=0.5)
            except queue.Full:
                continue

    def close(self) -> str | None:
        """The path under which the server has it; None where it was lost."""
        self.write(None)
        try:
            return self._request.result()
        except ServerLost:
            return None

    def abandon(self) -> None:
        self._request.cancel()
        while not self._pieces.empty():
            self._pieces.get()
        self._pieces.put(None)  # ends the thread that waits for a piece
