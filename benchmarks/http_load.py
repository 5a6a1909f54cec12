"""Requests over keep-alive connections by a client that does next to nothing: bytes that are ready are written, and
the answer is read by its Content-Length. What is measured is the server, not a client library.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from benchmarks.bench import MeasureError

_LENGTH = b"content-length:"


@dataclass(frozen=True, slots=True)
class Target:
    """A POST of `body` to a path of HOST:PORT; the answer must be `body` again."""

    address: str
    path: str
    body: bytes

    @property
    def request(self) -> bytes:
        head = f"POST {self.path} HTTP/1.1\r\nHost: {self.address}\r\nContent-Length: {len(self.body)}\r\n\r\n"
        return head.encode() + self.body


async def latencies_s(target: Target, count: int) -> list[float]:
    """Of `count` requests one after another over one connection. Raises MeasureError."""
    found = []
    async with _connection(target) as connection:
        for _ in range(count):
            started_s = time.perf_counter()
            await connection.exchange()
            found.append(time.perf_counter() - started_s)
    return found


async def requests_per_s(target: Target, connections: int, duration_s: float) -> float:
    """Of all connections together, each with its next request as soon as it has the answer. Raises MeasureError."""
    started_s = time.perf_counter()
    ends_s = started_s + duration_s

    async def one() -> int:
        count = 0
        async with _connection(target) as connection:
            while time.perf_counter() < ends_s:
                await connection.exchange()
                count += 1
        return count

    counts = await asyncio.gather(*(one() for _ in range(connections)))
    return sum(counts) / (time.perf_counter() - started_s)


class _Connection:
    def __init__(self, target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._target = target
        self._request = target.request
        self._reader, self._writer = reader, writer

    async def exchange(self) -> None:
        self._writer.write(self._request)
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
            body = await self._reader.readexactly(_content_length(head))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise MeasureError(f"{self._target.address} closed the connection: {error}") from None
        if not head.startswith(b"HTTP/1.1 200 ") or body != self._target.body:
            raise MeasureError(f"{self._target.address} answered {head.splitlines()[0].decode()}: {body[:200]!r}")


@asynccontextmanager
async def _connection(target: Target) -> AsyncIterator[_Connection]:
    host, _, port = target.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield _Connection(target, reader, writer)
    finally:
        writer.close()


def _content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(_LENGTH):
            return int(line[len(_LENGTH) :])
    raise MeasureError(f"an answer without Content-Length: {head!r}")
