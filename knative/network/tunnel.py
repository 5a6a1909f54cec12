"""Passes HTTP/2 connections on to a replica, unopened: gRPC, which the ingress (HTTP/1.1) cannot relay.

A connection alone keeps nothing awake; what counts for the autoscaler is its open streams, one a call. They are found
by looking at the frames that pass: each has 9 bytes of header with length, type, flags and stream (RFC 9113 section
4.1), and nothing else needs to be understood.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import structlog

from knative.errors import KnativeError, Unavailable

log = structlog.get_logger()

CHUNK_BYTES = 64 << 10
PREFACE_TIMEOUT_S = 10.0
PREFACE_BYTES = len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")  # RFC 9113 section 3.4
_HEADER_BYTES = 9
_DATA, _HEADERS, _RST_STREAM = 0x0, 0x1, 0x3
_END_STREAM = 0x1


class Frames:
    """Frame headers in one direction of a connection, however its bytes are cut."""

    def __init__(self, skip_bytes: int = 0) -> None:
        self._skip_bytes = skip_bytes  # until the next header
        self._header = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, int, int]]:
        """(type, flags, stream) of the frames whose header ends in `data`."""
        found = []
        at = 0
        while at < len(data):
            if self._skip_bytes:
                step = min(self._skip_bytes, len(data) - at)
                self._skip_bytes -= step
                at += step
                continue
            step = min(_HEADER_BYTES - len(self._header), len(data) - at)
            self._header += data[at : at + step]
            at += step
            if len(self._header) == _HEADER_BYTES:
                header = self._header
                self._skip_bytes = int.from_bytes(header[:3])
                found.append((header[3], header[4], int.from_bytes(header[5:]) & 0x7FFFFFFF))
                self._header = bytearray()
        return found


class Streams:
    """The open streams of one connection: from the client's HEADERS to the server's END_STREAM, or a RST_STREAM."""

    def __init__(self, opened: Callable[[], Callable[[], None]]) -> None:
        self._opened = opened  # called for each new stream; what it returns is called at the stream's end
        self._open: dict[int, Callable[[], None]] = {}
        self._newest = 0
        self._client, self._server = Frames(PREFACE_BYTES), Frames()

    def from_client(self, data: bytes) -> None:
        for kind, _, stream in self._client.feed(data):
            if kind == _HEADERS and stream > self._newest:  # a second HEADERS of a stream are trailers
                self._newest = stream
                self._open[stream] = self._opened()
            elif kind == _RST_STREAM:
                self._end(stream)

    def from_server(self, data: bytes) -> None:
        for kind, flags, stream in self._server.feed(data):
            if kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
                self._end(stream)

    def close(self) -> None:
        """The connection has ended, and its streams with it."""
        for stream in list(self._open):
            self._end(stream)

    def _end(self, stream: int) -> None:
        ended = self._open.pop(stream, None)
        if ended is not None:
            ended()


class Target(Protocol):
    """A replica that takes connections."""

    @property
    def port(self) -> int: ...
    def opened(self) -> Callable[[], None]: ...


class Tunnel:
    """Listens for connections. `connect` gives a replica for one, as soon as there is one."""

    def __init__(self, connect: Callable[[], AbstractAsyncContextManager[Target]]) -> None:
        self._connect = connect
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.address = ""  # HOST:PORT, once started

    async def start(self, host: str, port: int) -> None:
        """Listens; port 0 takes a free one. Raises Unavailable if it cannot have the port."""
        try:
            self._server = await asyncio.start_server(self._accept, host, port)
        except OSError as error:
            raise Unavailable(
                # asyncio's own text says where once more
                f"cannot listen on {host}:{port}: {os.strerror(error.errno) if error.errno else error}; "
                "choose another address or port, or port 0 for a free one"
            ) from error
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # asyncio runs it as one
        self._connections.add(task)
        try:
            # whoever only tries whether somebody listens wakes nothing
            async with asyncio.timeout(PREFACE_TIMEOUT_S):
                preface = await reader.readexactly(PREFACE_BYTES)
            async with self._connect() as target:
                await self._pass_on(preface, reader, writer, target)
        except (TimeoutError, asyncio.IncompleteReadError):
            pass
        except (KnativeError, OSError) as error:
            log.warning("tunnel_failed", error=str(error))
        except asyncio.CancelledError:
            pass  # asyncio would log the end of the task as a mistake
        finally:
            self._connections.discard(task)
            writer.close()

    async def _pass_on(
        self, preface: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: Target
    ) -> None:
        streams = Streams(target.opened)
        async with _connection(target.port) as (their_reader, their_writer):
            streams.from_client(preface)
            their_writer.write(preface)
            ways = (
                asyncio.create_task(_pump(reader, their_writer, streams.from_client)),
                asyncio.create_task(_pump(their_reader, writer, streams.from_server)),
            )
            try:
                # when either side closes, an HTTP/2 connection is over
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
                streams.close()


@asynccontextmanager
async def _connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, look: Callable[[bytes], None]) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            look(data)
            writer.write(data)
            await writer.drain()
