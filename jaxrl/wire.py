"""What goes over the TCP connections of `link.py`: messages, and, for JAX, the bytes of another connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct

RETRY_S = 0.2  # between two attempts to connect
_LENGTH = struct.Struct(">Q")


class Channel:
    """JSON messages over a stream, each with its length before it. `send` never waits."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader, self.writer = reader, writer
        self.quiet_s = 0.0  # since something was heard

    def send(self, message: dict) -> None:
        content = json.dumps(message).encode()
        self.writer.write(_LENGTH.pack(len(content)) + content)

    async def receive(self) -> dict | None:
        """None when the other end is gone."""
        try:
            (length,) = _LENGTH.unpack(await self.reader.readexactly(_LENGTH.size))
            return json.loads(await self.reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):
            return None


async def when_it_listens(port: int, timeout_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to a port of this host. Another process may be here before the JAX of this one has begun to listen."""
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                return await asyncio.open_connection("127.0.0.1", port)
            except ConnectionRefusedError:
                await asyncio.sleep(RETRY_S)


async def pipe(channel: Channel, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Bytes both ways. That `channel` has ended is not passed on: see `Link.relay`."""

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(2**16):
                target.write(data)
                await target.drain()

    inwards = asyncio.create_task(copy(channel.reader, writer))
    await copy(reader, channel.writer)
    channel.writer.close()
    await inwards
