"""Raw bytes over a socket to ingress, activator and queue-proxies, and to uvicorn as stages and orchestrator serve.

The two replicas behind the proxies have other parsers than these (httptools and h11), so that disagreement shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Coroutine, Sequence
from random import Random
from typing import Any, TypeVar

import aiohttp

from functions.contract.http_limits import HttpLimits, limited_protocol
from knative.network.forward import relay_session
from knative.network.ingress import Ingress, Route
from tools.fuzzing.door import Verdict, Violation, judged
from tools.fuzzing.proxied import OneName, Replica, Revision, is_same, loopback_only
from tools.fuzzing.raw_http import OUTSIDE, RawReply, good_requests, hostile_bytes, read_replies
from tools.fuzzing.served import Served, listening, serve

_QUIET_TURNS = 12  # of the event loop, in which nothing comes: all is said
_QUIET_S = 0.001  # and then for what the kernel may still hold
_SETTLE_S = 10.0  # for exchanges to end once their client has gone
_HANDLES_MAX = 64  # tasks and files above those of the beginning, after which something is not let go
_NOT_IMPLEMENTED = frozenset({501, 505})  # Upgrade, transfer codings other than chunked, HTTP/0.9 and HTTP/2
T = TypeVar("T")
# a request with a body for the outside: it may be an open one, and nobody counts it
_OUTSIDE_BODY = re.compile(rb"://.*(content-length|transfer-encoding)", re.IGNORECASE | re.DOTALL)
_LOGGERS = ("knative.network.listener", "uvicorn.error", "asyncio")


class _Client(asyncio.Protocol):
    """A connection to a server under test, and what came over it."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.ended = False

    def data_received(self, data: bytes) -> None:
        self.received += data

    def eof_received(self) -> None:
        self.ended = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = True


class _Unhandled(logging.Handler):
    """Keeps the errors that a server only tells its log."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else ""
        self.errors.append(f"{record.getMessage()}\n{trace}")


class ProxyDoor:
    """How an input is sent, and to which of the servers, follows from its bytes."""

    name = "proxies"

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._failures: list[str] = []
        self._loop.set_exception_handler(lambda loop, context: self._failures.append(str(context)))
        self._log = _Unhandled()
        logging.disable(logging.NOTSET)
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(self._log)
        self._good = good_requests()
        self._controls = 0
        self._loop.run_until_complete(self._open())
        self._handles = self._open_handles()

    def make(self, random: Random) -> bytes:
        return hostile_bytes(random, self._good)

    def take(self, data: bytes) -> Verdict:
        return self._run(self._take(data))

    def check(self) -> None:
        self._run(self._check())

    def close(self) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self._log)
        self._loop.run_until_complete(self._close())
        self._loop.close()

    # -- one input

    async def _take(self, data: bytes) -> Verdict:
        for part in (*self._revisions, *self._replicas):
            part.forget()
        mark = zlib.crc32(data)
        port = self._ports[mark % len(self._ports)]
        client, half_closed = await self._send(data, port, mark >> 8)
        await self._settle()
        # a server that gives up its side loses what it has not said to a client that has given up its own
        replies, rest = read_replies(bytes(client.received), ended=client.ended, heads=b"HEAD" in data)
        if rest and not half_closed:
            raise Violation("crash", f"a reply that is not whole: {rest[:300]!r}")
        verdicts = [judged(reply.status, reply.headers, reply.body, allowed=_allowed(reply)) for reply in replies]
        if port == self._direct:
            self._expect_in_order(replies)
        else:
            self._expect_nothing_smuggled(entered=port == self._front)
        await self._expect_control()
        return "accepted" if "accepted" in verdicts else "refused"

    async def _send(self, data: bytes, port: int, how: int) -> tuple[_Client, bool]:
        """Sends the input in one to four pieces, and closes: one side or both, at once or after the answers."""
        transport, client = await self._loop.create_connection(_Client, "127.0.0.1", port)
        pieces = 1 + how % 4 if how % 3 == 0 else 1
        size = len(data) // pieces + 1
        for at in range(0, len(data), size):
            transport.write(data[at : at + size])
            await _turns(2)
        half_closed = how % 5 == 0
        if half_closed:
            with contextlib.suppress(OSError):  # the server has closed already
                transport.write_eof()
        if how % 7:
            await self._until_quiet(client)
            if not half_closed and not _OUTSIDE_BODY.search(data):
                await self._expect_answer(transport, client)
        transport.close() if how % 11 else transport.abort()
        return client, half_closed or not how % 7

    async def _expect_answer(self, transport: asyncio.Transport, client: _Client) -> None:
        """Once another request has come, something is answered, unless the input left a body open."""
        if client.received or client.ended or self._in_flight():
            return
        transport.write(b"\r\n\r\n" + self._good[0].to_bytes())
        until_s = time.monotonic() + _SETTLE_S
        while not (client.received or client.ended or self._in_flight()):
            if time.monotonic() > until_s:
                raise Violation("crash", "neither an answer nor an end of the connection")
            await asyncio.sleep(_QUIET_S)

    async def _until_quiet(self, client: _Client) -> None:
        for wait_s in (0.0, _QUIET_S):
            await asyncio.sleep(wait_s)
            size, quiet = len(client.received), 0
            while quiet < _QUIET_TURNS and not client.ended:
                await asyncio.sleep(0)
                quiet = quiet + 1 if len(client.received) == size else 0
                size = len(client.received)

    async def _settle(self) -> None:
        until_s = time.monotonic() + _SETTLE_S
        await _turns(4)
        while self._in_flight():
            if time.monotonic() > until_s:
                raise Violation("harm", f"the client has gone, and there are still {self._in_flight()}")
            await asyncio.sleep(0)
        await _turns(4)

    def _in_flight(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for revision in self._revisions:
            found["in flight"] += revision.proxy.in_flight
            found["queued"] += revision.proxy.queued
            found["waiting"] += revision.activator.waiting
        for replica in self._replicas:
            found["at a replica"] += replica.running
        return {name: count for name, count in found.items() if count}

    def _expect_nothing_smuggled(self, *, entered: bool) -> None:
        """Each request that a replica has read is one that its proxy has read, with the same headers."""
        for revision, replica in zip(self._revisions, self._replicas, strict=False):
            if len(replica.seen) > revision.answered:
                raise Violation("harm", f"{revision.answered} requests were relayed, and {replica.seen} seen")
            left = iter(revision.entered)
            for seen in replica.seen if entered else ():
                if not any(is_same(seen, one) for one in left):
                    raise Violation("harm", f"{replica.name} has read {seen}, and the ingress {revision.entered}")

    def _expect_in_order(self, replies: Sequence[RawReply]) -> None:
        """No refusal by the server stands where the client expects what the application has answered before."""
        good = next((at for at, reply in enumerate(replies) if reply.status != 200), len(replies))
        if good < min(self._limited.answered, len(replies)):
            raise Violation("harm", f"{self._limited.answered} answers, and on the wire are {replies}")

    async def _expect_control(self) -> None:
        """A good request gets its own answer, over the connections that were there before."""
        self._controls += 1
        mark = str(self._controls)
        name = self._replicas[self._controls % 2].name
        body = mark * (self._controls % 3)
        target = f"/{mark}?n={mark}"
        async with self._client.post(
            f"http://127.0.0.1:{self._front}{target}",
            data=body.encode(),
            headers={"Host": f"{name}.default", "X-Mark": mark},
        ) as answer:
            status, text = answer.status, await answer.text()
        seen = json.loads(text) if status == 200 else {}
        wanted = (name, "POST", target, [mark], hashlib.sha256(body.encode()).hexdigest())
        marks = [value for key, value in seen.get("headers", ()) if key == "x-mark"]
        got = (seen.get("replica"), seen.get("method"), seen.get("target"), marks, seen.get("sha256"))
        if got != wanted:
            raise Violation("harm", f"the control {wanted} was answered {status}: {text[:300]}")

    async def _check(self) -> None:
        for _ in range(20):
            await self._expect_control()
        await self._settle()
        until_s = time.monotonic() + _SETTLE_S
        while self._open_handles() > self._handles + _HANDLES_MAX:
            if time.monotonic() > until_s:
                raise Violation("harm", f"{self._handles} tasks and files were open, and now {self._open_handles()}")
            await asyncio.sleep(0.02)

    def _open_handles(self) -> int:
        return len(asyncio.all_tasks(self._loop)) + len(os.listdir("/proc/self/fd"))

    def _run(self, doing: Coroutine[Any, Any, T]) -> T:
        try:
            result = self._loop.run_until_complete(doing)
        finally:
            errors = [*self._failures, *self._log.errors]
            self._failures.clear()
            self._log.errors.clear()
        if errors:
            raise Violation("crash", f"left to the event loop or told a log: {errors[-1]}")
        return result

    # -- life

    async def _open(self) -> None:
        self._client = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_SETTLE_S))
        self._session = relay_session()
        self._replicas = [Replica("one"), Replica("two"), Replica("outside")]
        self._limited = self._replicas[0]
        protocols: tuple[Any, ...] = (limited_protocol(HttpLimits()), "h11", "httptools")
        self._servers: list[Served] = []
        ports = [await self._serve(replica, http) for replica, http in zip(self._replicas, protocols, strict=True)]
        self._revisions = [
            Revision(replica, port, self._session, concurrency)
            for replica, port, concurrency in zip(self._replicas, ports, (0, 2), strict=False)
        ]
        outside = OneName(OUTSIDE, ports[2])
        self._outside = relay_session(
            aiohttp.TCPConnector(resolver=outside, socket_factory=loopback_only, use_dns_cache=False)
        )
        self._ingress = Ingress(Random(1), self._outside)
        one, two = (Route(((100, revision),)) for revision in self._revisions)
        self._ingress.set_routes({"one.default": one, "two.default": two}, default=one)
        await self._ingress.start()
        for revision in self._revisions:
            await revision.proxy.start()
        proxies = [_port(revision.proxy.address) for revision in self._revisions]
        self._front, self._direct = _port(self._ingress.address), ports[0]
        self._ports = (*[self._front] * 5, *proxies, self._direct)

    async def _serve(self, replica: Replica, http: Any) -> int:
        listener = listening()
        self._servers.append(await serve(replica, listener, http=http))
        return int(listener.getsockname()[1])

    async def _close(self) -> None:
        await self._ingress.close()
        for revision in self._revisions:
            await revision.proxy.close()
        for session in (self._client, self._outside, self._session):
            await session.close()
        for server in self._servers:
            await server.stop()


def _allowed(reply: RawReply) -> frozenset[int]:
    """Which errors of a server are none: a server of the outside may be one that nobody reaches."""
    unreached = reply.status == 502 and not reply.body.startswith(b"no answer from 127.0.0.1:")
    return _NOT_IMPLEMENTED | {502} if unreached else _NOT_IMPLEMENTED


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)
