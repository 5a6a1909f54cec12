"""Requests over keep-alive connections by a client that does next to nothing: bytes that are ready are written, and
the answer is read by its Content-Length. What is measured is the server, not a client library.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from benchmarks.bench import MeasureError

_LENGTH = b"content-length:"
_CHUNKED = b"transfer-encoding: chunked"


@dataclass(frozen=True, slots=True)
class Target:
    """A POST of `body` to a path of HOST:PORT; the answer must have this status and be `answer` (None: anything)."""

    address: str
    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 200
    answer: bytes | None = None

    @classmethod
    def echo(cls, address: str, path: str, body: bytes) -> Target:
        """One that answers with what it got."""
        return cls(address, path, body, answer=body)

    @property
    def request(self) -> bytes:
        headers = {"Host": self.address, **self.headers, "Content-Length": str(len(self.body))}
        lines = [f"POST {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + self.body


async def latencies_s(target: Target, count: int) -> list[float]:
    """Of `count` requests one after another over one connection. Raises MeasureError."""
    found = []
    request = target.request
    async with _connection(target.address) as connection:
        for _ in range(count):
            started_s = time.perf_counter()
            await connection.exchange(target, request)
            found.append(time.perf_counter() - started_s)
    return found


async def requests_per_s(target: Target, connections: int, duration_s: float) -> float:
    """Of all connections together, each with its next request as soon as it has the answer. Raises MeasureError."""
    request = target.request
    started_s = time.perf_counter()
    ends_s = started_s + duration_s

    async def one() -> int:
        count = 0
        async with _connection(target.address) as connection:
            while time.perf_counter() < ends_s:
                await connection.exchange(target, request)
                count += 1
        return count

    counts = await asyncio.gather(*(one() for _ in range(connections)))
    return sum(counts) / (time.perf_counter() - started_s)


async def answers(targets: Sequence[Target], connections: int) -> list[bytes]:
    """Of one request to each of the targets, which are at one address; each connection takes the next one as soon as
    it has an answer. Raises MeasureError."""
    found = [b""] * len(targets)
    left = iter(enumerate(targets))

    async def some() -> None:
        async with _connection(targets[0].address) as connection:
            for index, target in left:
                found[index] = await connection.exchange(target, target.request)

    await asyncio.gather(*(some() for _ in range(connections)))
    return found


async def streamed(target: Target) -> bytes:
    """The body of an answer that comes in chunks, by a connection of its own which the server then closes: it is taken
    apart only after its end. Raises MeasureError."""
    asking = replace(target, headers={**target.headers, "Connection": "close"})
    host, _, port = target.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(asking.request)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    except OSError as error:
        raise MeasureError(f"{target.address} closed the connection: {error}") from None
    finally:
        writer.close()
    if not head.startswith(b"HTTP/1.1 %d " % target.status) or _CHUNKED not in head.lower():
        raise MeasureError(f"{target.address} answered {head[:100]!r}: {body[:200]!r}")
    return _joined(body)


def _joined(chunks: bytes) -> bytes:
    """What the chunks hold (RFC 9112, section 7.1). Raises MeasureError where the last one is missing."""
    parts: list[bytes] = []
    at = 0
    while (line_end := chunks.find(b"\r\n", at)) >= 0:
        size = int(chunks[at:line_end], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(chunks[line_end + 2 : line_end + 2 + size])
        at = line_end + 2 + size + 2
    raise MeasureError(f"a stream broke off after {sum(map(len, parts))} bytes")


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def exchange(self, target: Target, request: bytes) -> bytes:
        """The body of the answer; `request` is that of `target`, which costs something to make."""
        self._writer.write(request)
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
            body = await self._reader.readexactly(_content_length(head))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise MeasureError(f"{target.address} closed the connection: {error}") from None
        if not head.startswith(b"HTTP/1.1 %d " % target.status) or target.answer not in (None, body):
            raise MeasureError(f"{target.address} answered {head.splitlines()[0].decode()}: {body[:200]!r}")
        return body


@asynccontextmanager
async def _connection(address: str) -> AsyncIterator[_Connection]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield _Connection(reader, writer)
    finally:
        writer.close()


def _content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(_LENGTH):
            return int(line[len(_LENGTH) :])
    raise MeasureError(f"an answer without Content-Length: {head!r}")
