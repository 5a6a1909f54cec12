"""Connections to replicas: HTTP/1.1 with no more than an event and its reply need.

aiohttp serves every other request. By it a hop of 10 KB took 0.48 ms in place of 0.28 ms (2026-11-28, 2 CPU cores), and
its read() and whole bodies cost a copy each. Here the reply is received into its final place, and the request is
written from where it lies. What is left out is what a replica (a stage, or the queue-proxy before it) has no use for:
TLS, proxies, redirects, cookies, compression, and replies without Content-Length, which are refused. Spec: RFC 9112.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import numpy as np

from functions.contract.frames import Buffer

IDLE_S_MAX = 300.0  # longer than that a connection is not used again; a stage closes idle ones after an hour
CONNECT_TIMEOUT_S = 5.0  # for a replica whose machine is gone
HEAD_BYTES_MAX = 64 << 10
BODY_BYTES_MAX = 4 << 30  # of a reply; a stage takes events of 1 GiB, and answers what is as large
WRITE_BYTES = 1 << 20  # handed to the transport at once: whatever it cannot send, asyncio's own loop copies


class ReplyError(OSError):
    """The connection brought no reply, or none that can be read."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: Buffer


class ReplicaConnections:
    """Open connections to replicas, used again and again, one request at a time each. Not for several event loops."""

    def __init__(self) -> None:
        self._idle: dict[str, list[_Connection]] = {}

    async def post(self, url: str, headers: str, body: Buffer, timeout_s: float) -> Reply:
        """The reply to `body`, sent with the lines of `headers` (each ended by CRLF) and what HTTP needs besides.

        `url` is http://HOST:PORT/PATH. Raises TimeoutError and OSError; the connection is closed then, as it is when
        the caller is cancelled."""
        async with asyncio.timeout(timeout_s):
            connection = self._take(url) or await _connect(url)
            try:
                reply = await connection.ask(f"{_first_lines(url)}{headers}content-length: {len(body)}\r\n\r\n", body)
            except BaseException:
                connection.abort()
                raise
        self._put_back(url, connection)
        return reply

    def close(self) -> None:
        """Closes those that nobody uses."""
        for connection in [connection for idle in self._idle.values() for connection in idle]:
            connection.abort()
        self._idle.clear()

    def _take(self, url: str) -> _Connection | None:
        """The one that was used last, if any can be used again."""
        idle = self._idle.get(url)
        while idle:
            connection = idle.pop()
            connection.wake()
            if connection.usable:
                return connection
        return None

    def _put_back(self, url: str, connection: _Connection) -> None:
        if connection.usable:
            self._idle.setdefault(url, []).append(connection)
            connection.rest(lambda: self._forget(url, connection))
        else:
            connection.abort()

    def _forget(self, url: str, connection: _Connection) -> None:
        """Replicas come and go: what was lost is not kept."""
        idle = self._idle.get(url, [])
        if connection in idle:
            idle.remove(connection)
        if not idle:
            self._idle.pop(url, None)


class _Connection(asyncio.BufferedProtocol):
    """One TCP connection, which is given one request at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end_of_rest: asyncio.TimerHandle | None = None  # while nobody uses it
        self._on_lost: Callable[[], None] | None = None
        self._transport: asyncio.Transport | None = None  # None once it is lost
        self._reusable = True
        self._reply: asyncio.Future[Reply] | None = None  # while one is awaited
        self._writable: asyncio.Future[None] | None = None  # while the transport takes no more
        self._head = memoryview(bytearray(HEAD_BYTES_MAX))
        self._received = 0  # bytes in _head, or in _body where there is one
        self._body: memoryview | None = None  # where a body is received that is not whole with the head
        self._status, self._headers = 0, cast(Mapping[str, str], {})

    @property
    def usable(self) -> bool:
        return self._reusable and self._transport is not None and not self._transport.is_closing()

    async def ask(self, head: str, body: Buffer) -> Reply:
        """Raises OSError. Whoever stops to wait for the reply must abort the connection."""
        if self._transport is None:
            raise ReplyError("the connection was lost")
        reply: asyncio.Future[Reply] = self._loop.create_future()
        self._reply, self._received = reply, 0
        start = head.encode("latin-1")
        try:
            if len(body) <= HEAD_BYTES_MAX:
                self._transport.write(b"".join((start, body)))
            else:
                self._transport.write(start)
                await self._write(body, reply)
            return await reply
        finally:
            reply.cancel()  # of one that was not awaited to the end
            self._reply = None  # it may be large, and the connection may rest for long

    async def _write(self, body: Buffer, reply: asyncio.Future[Reply]) -> None:
        """Piece by piece, until the reply is there: a stage refuses what is too large before it has read it."""
        view = memoryview(body)
        for at in range(0, len(view), WRITE_BYTES):
            if self._writable is not None:
                await self._writable
            if reply.done() or self._transport is None:
                self._reusable = False  # the rest is never sent
                return
            self._transport.write(view[at : at + WRITE_BYTES])

    def rest(self, on_lost: Callable[[], None]) -> None:
        """Nobody uses it for now: it closes itself after some time, and says so when it is lost."""
        self._on_lost = on_lost
        self._end_of_rest = self._loop.call_later(IDLE_S_MAX, self.abort)

    def wake(self) -> None:
        self._on_lost = None
        if self._end_of_rest is not None:
            self._end_of_rest.cancel()

    def abort(self) -> None:
        """Closes at once."""
        self._reusable = False
        if self._end_of_rest is not None:
            self._end_of_rest.cancel()
        if self._transport is not None:
            self._transport.abort()

    # -- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._head[self._received :] if self._body is None else self._body[self._received :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._reply is None or self._reply.done():
            self.abort()  # nobody asked for this
            return
        self._received += nbytes
        try:
            if self._body is None:
                self._read_head(nbytes)
            elif self._received == len(self._body):
                self._end(self._body)
        except (ValueError, MemoryError) as error:
            self._fail(ReplyError(f"the reply cannot be read: {error}"))

    def eof_received(self) -> None:
        """The transport closes itself then."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._on_lost is not None:
            self._on_lost()
        self._fail(exc or ReplyError("the connection was closed before the reply"))

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    # -- a reply

    def _read_head(self, nbytes: int) -> None:
        """Raises ValueError for what is no reply with Content-Length."""
        received = bytes(self._head[: self._received])
        end = received.find(b"\r\n\r\n", max(0, self._received - nbytes - 3))
        if end < 0:
            if self._received == HEAD_BYTES_MAX:
                raise ValueError(f"its headers take more than {HEAD_BYTES_MAX} bytes")
            return
        self._status, self._headers, size, keep = _parse_head(received[:end].decode("latin-1"))
        self._reusable = self._reusable and keep
        rest = received[end + 4 :]
        if len(rest) > size:
            raise ValueError(f"{len(rest) - size} bytes came after it")
        if len(rest) == size:
            self._end(rest)
            return
        self._body = np.empty(size, dtype=np.uint8).data  # not filled with zeros, as a bytearray would be
        self._body[: len(rest)] = rest
        self._received = len(rest)

    def _end(self, body: Buffer) -> None:
        self._body, self._received = None, 0
        if self._reply is not None and not self._reply.done():
            self._reply.set_result(Reply(self._status, self._headers, body))
        self.resume_writing()

    def _fail(self, error: Exception) -> None:
        self.abort()
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(error)
        self.resume_writing()


def _parse_head(head: str) -> tuple[int, Mapping[str, str], int, bool]:
    """(status, headers, bytes of the body, whether the connection stays open). Raises ValueError."""
    first, *lines = head.split("\r\n")
    version, _, status = first.partition(" ")
    if version not in ("HTTP/1.1", "HTTP/1.0") or not status[:3].isdecimal():
        raise ValueError(f"it begins with {first[:80]!r}")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip(" \t")
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdecimal()) or "transfer-encoding" in headers:
        raise ValueError(f"status {status[:3]} without Content-Length")
    if len(length) > 19 or int(length) > BODY_BYTES_MAX:
        raise ValueError(f"its body is said to have {length[:20]} bytes, at most {BODY_BYTES_MAX} are taken")
    keep = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    return int(status[:3]), headers, int(length), keep


async def _connect(url: str) -> _Connection:
    """Raises OSError, TimeoutError."""
    host, port = _address(url)
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, host, port)
    return connection


@functools.lru_cache(maxsize=256)
def _address(url: str) -> tuple[str, int]:
    """(host, port). Raises ReplyError for what is no URL of a replica."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port = None, 0
    if not host or not url.isascii() or parts.scheme != "http":
        raise ReplyError(f"a replica's URL is http://HOST:PORT/, got {url[:80]!r}")
    return host, port


@functools.lru_cache(maxsize=256)
def _first_lines(url: str) -> str:
    parts = urlsplit(url)
    return f"POST {parts.path or '/'} HTTP/1.1\r\nhost: {parts.netloc}\r\n"
