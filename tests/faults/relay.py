"""Servers that pass HTTP messages on: what the proxy before a replica and the service of a stage have in common."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from tests.faults.wire import Message, page, read_message

_BUFFER_BYTES = 8 << 20  # of a stream: the longest head, and how much is read ahead


@dataclass(frozen=True, slots=True)
class Reset:
    """The connection is reset after these bytes of a reply."""

    first: bytes = b""


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing ever comes back."""


Answer = Message | Reset | Silence


class Upstream:
    """Connections to one server on this machine, used again."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def exchange(self, message: Message, *, anew: bool = False, sent: asyncio.Event | None = None) -> Message:
        """Its reply; `sent` is set when the request is on its way. `anew`: over a connection that nobody else uses.

        Raises OSError and EOFError without a reply, ValueError for one that is no HTTP. Whoever stops waiting closes
        the connection, so that the server learns of it."""
        reader, writer = (None if anew else self._take()) or await _connect(self.port)
        kept = False
        try:
            writer.write(message.to_bytes())
            await writer.drain()
            if sent is not None:
                sent.set()
            reply = await read_message(reader)
            if reply is None:
                raise EOFError("the connection was closed before the reply")
            kept = not anew and reply.header("connection").lower() != "close"
            return reply
        finally:
            if kept:
                self._idle.append((reader, writer))
            else:
                writer.transport.abort()

    def close(self) -> None:
        for _, writer in self._idle:
            writer.transport.abort()
        self._idle.clear()

    def _take(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.transport.abort()
        return None


async def _connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port, limit=_BUFFER_BYTES)


class Relay(ABC):
    """A port of this machine whose requests are answered one after another on each connection."""

    def __init__(self) -> None:
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._serving: set[asyncio.Task[Any]] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def is_open(self) -> bool:
        return self._server is not None

    async def open(self, port: int = 0) -> None:
        """`port` 0: a free one."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=_BUFFER_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """As the machine's power goes: nobody listens any more, and every connection is reset."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            reset(writer)
        current = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not current]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._serving, return_exceptions=True)

    @abstractmethod
    async def answer(self, request: Message) -> Answer:
        """Whoever asked may go meanwhile: then it is cancelled."""

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Work that goes on when nobody waits for it any more, until the relay is closed."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # what becomes of it is in the replies

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            while (request := await read_message(reader)) is not None:
                reply = await self._while_asked(reader, request)
                if reply is None:
                    break
                if isinstance(reply, Silence):
                    await reader.read(1)
                    break
                writer.write(reply.first if isinstance(reply, Reset) else reply.to_bytes())
                if isinstance(reply, Reset):
                    await asyncio.sleep(0)  # what is to come before the reset leaves now
                    reset(writer)
                    break
                await writer.drain()
        except (OSError, EOFError, ValueError):
            pass  # whoever asked is gone, or speaks no HTTP
        finally:
            self._writers.discard(writer)
            self._serving.discard(task)
            writer.transport.abort()

    async def _while_asked(self, reader: asyncio.StreamReader, request: Message) -> Answer | None:
        """The answer; None if whoever asked has gone before it."""
        answer = self.spawn(self.answer(request))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() or answer.cancelled():
                return None  # or this relay is about to close
            try:
                return answer.result()  # type: ignore[no-any-return]  # an Answer, see above
            except (OSError, EOFError, ValueError) as error:
                return page(502, f"bad gateway: {error or type(error).__name__}\n")
        finally:
            for task in (answer, gone):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await asyncio.wait({task})


def reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection by RST, not FIN."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
