"""Connections to replicas, against servers that answer as told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from orchestrator import stage_connection
from orchestrator.stage_connection import HEAD_BYTES_MAX, WRITE_BYTES, ReplicaConnections

Answer = Callable[[bytes, bytes], bytes]  # (head, body) -> what is written


def reply(body: bytes, headers: bytes = b"", status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n%s\r\n%s" % (status, len(body), headers, body)


class Server:
    """`requests` are (head, body) of what came; `connections` how many were opened."""

    def __init__(self, answer: Answer, piece: int = 1 << 30) -> None:
        self.requests: list[tuple[bytes, bytes]] = []
        self.connections = 0
        self.closed = asyncio.Event()
        self.url = ""
        self._answer, self._piece = answer, piece

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                body = await reader.readexactly(size)
                self.requests.append((head, body))
                answer = self._answer(head, body)
                for at in range(0, len(answer), self._piece):
                    writer.write(answer[at : at + self._piece])
                    await writer.drain()
                    await asyncio.sleep(0)
                if not answer:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            self.closed.set()
        finally:
            writer.close()


@asynccontextmanager
async def serving(answer: Answer, piece: int = 1 << 30) -> AsyncIterator[Server]:
    server = Server(answer, piece)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, limit=1 << 20)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/"
    try:
        yield server
    finally:
        listening.close()


@pytest.fixture
def connections() -> Iterator[ReplicaConnections]:
    made = ReplicaConnections()
    yield made
    made.close()


def echo(head: bytes, body: bytes) -> bytes:
    return reply(body, b"CE-Type: t\r\nX-Blank:  a b \r\n")


@pytest.mark.parametrize("size", [0, 1, HEAD_BYTES_MAX - 1, HEAD_BYTES_MAX, HEAD_BYTES_MAX + 1, 3 * WRITE_BYTES + 7])
@pytest.mark.parametrize("piece", [1 << 30, 4093], ids=["at once", "in pieces"])
async def test_a_body_of_any_size_comes_back_whole(connections: ReplicaConnections, size: int, piece: int) -> None:
    body = bytes(i % 251 for i in range(size))
    async with serving(echo, piece) as server:
        for _ in range(2):
            answer = await connections.post(server.url, "ce-type: step\r\n", body, 30)
            assert (answer.status, bytes(answer.body)) == (200, body)
            assert answer.headers["ce-type"] == "t"
            assert answer.headers["x-blank"] == "a b"
        connections.close()
    assert server.connections == 1
    assert [sent for _, sent in server.requests] == [body, body]


async def test_the_request_is_what_http_asks_for(connections: ReplicaConnections) -> None:
    async with serving(echo) as server:
        await connections.post(server.url, "ce-type: step\r\nce-id: 1\r\n", b"four", 30)
        connections.close()
    host = server.url.split("/")[2]
    head = f"POST / HTTP/1.1\r\nhost: {host}\r\nce-type: step\r\nce-id: 1\r\ncontent-length: 4\r\n\r\n"
    assert server.requests == [(head.encode(), b"four")]


async def test_a_reply_that_comes_byte_by_byte_is_read(connections: ReplicaConnections) -> None:
    async with serving(echo, piece=1) as server:
        assert bytes((await connections.post(server.url, "", b"slow", 30)).body) == b"slow"
        connections.close()


async def test_requests_at_once_have_connections_of_their_own(connections: ReplicaConnections) -> None:
    async with serving(echo) as server:
        bodies = [bytes([i]) * 1000 for i in range(5)]
        for _ in range(2):
            answers = await asyncio.gather(*(connections.post(server.url, "", body, 30) for body in bodies))
            assert [bytes(answer.body) for answer in answers] == bodies
        assert server.connections == 5
        connections.close()


UNREADABLE = {
    "no HTTP": b"SSH-2.0-x\r\n\r\n",
    "another version": b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "no status": b"HTTP/1.1 OK\r\nContent-Length: 0\r\n\r\n",
    "no length": b"HTTP/1.1 200 OK\r\n\r\n",
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "length in words": b"HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\n",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    "more than there is memory": b"HTTP/1.1 200 OK\r\nContent-Length: 9223372036854775807\r\n\r\n",
    "a length of 5000 digits": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"1" * 5000 + b"\r\n\r\n",
    "more than the length": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab",
    "endless headers": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * (HEAD_BYTES_MAX // 6 + 1),
    "nothing": b"",
}


@pytest.mark.parametrize("answer", UNREADABLE.values(), ids=UNREADABLE)
async def test_what_is_no_reply_is_an_error_and_the_next_request_goes_on(
    connections: ReplicaConnections, answer: bytes
) -> None:
    answers = iter([answer])
    async with serving(lambda head, body: next(answers, reply(b"good"))) as server:
        with pytest.raises(OSError, match=r"."):
            await connections.post(server.url, "", b"x", 30)
        assert bytes((await connections.post(server.url, "", b"x", 30)).body) == b"good"
        assert server.connections == 2
        connections.close()


async def test_a_reply_that_breaks_off_is_an_error(connections: ReplicaConnections) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        writer.close()

    with pytest.raises(OSError, match="closed before the reply"):
        await _asked(half, connections)


async def _asked(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], connections: ReplicaConnections
) -> None:
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        await connections.post(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", "", b"", 30)


async def test_what_follows_a_large_reply_is_not_taken_for_another(connections: ReplicaConnections) -> None:
    """It comes where the end of the body was received, of which no buffer is left."""
    told: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(str(context)))
    body, rest = bytes(2 * HEAD_BYTES_MAX), b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    async with serving(lambda head, asked: reply(body) + rest, piece=HEAD_BYTES_MAX) as server:
        for _ in range(2):
            assert bytes((await connections.post(server.url, "", b"x", 30)).body) == body
            await asyncio.sleep(0.05)  # for what follows
        connections.close()
    assert told == []


async def test_connection_close_is_obeyed(connections: ReplicaConnections) -> None:
    async with serving(lambda head, body: reply(body, b"Connection: close\r\n")) as server:
        for _ in range(2):
            assert bytes((await connections.post(server.url, "", b"x", 30)).body) == b"x"
        assert server.connections == 2


async def test_an_early_refusal_of_a_large_body_is_read(connections: ReplicaConnections) -> None:
    """A stage that announces 413 does not read the rest; the connection is not used again."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply(b"too large", status=b"413 Content Too Large"))
        await writer.drain()
        await gone.wait()
        writer.close()

    gone = asyncio.Event()
    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        answer = await connections.post(url, "", bytes(64 << 20), 30)
        assert (answer.status, bytes(answer.body)) == (413, b"too large")
        gone.set()
    assert connections._idle == {}


@pytest.mark.parametrize("how", ["timed out", "cancelled"])
async def test_who_stops_waiting_closes_the_connection(connections: ReplicaConnections, how: str) -> None:
    """The stage must see that nobody waits, and a late reply must not be taken for the next one's."""
    asked = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()
        closed.set()
        writer.close()

    closed = asyncio.Event()
    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        waiting = asyncio.create_task(connections.post(url, "", b"x", 0.05 if how == "timed out" else 60))
        await asyncio.wait_for(asked.wait(), 30)
        if how == "cancelled":
            waiting.cancel()
        with pytest.raises((TimeoutError, asyncio.CancelledError)):
            await waiting
        await asyncio.wait_for(closed.wait(), 30)


async def test_a_connection_that_the_replica_closed_is_not_used_again(connections: ReplicaConnections) -> None:
    async with serving(echo) as server:
        await connections.post(server.url, "", b"x", 30)
        (idle,) = connections._idle[server.url]
        idle.connection_lost(None)
        assert connections._idle == {}
        await connections.post(server.url, "", b"x", 30)
        assert server.connections == 2
        connections.close()


async def test_an_idle_connection_closes_itself(
    connections: ReplicaConnections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_connection, "IDLE_S_MAX", 0.01)
    async with serving(echo) as server:
        await connections.post(server.url, "", b"x", 30)
        await asyncio.wait_for(server.closed.wait(), 30)
        assert connections._idle == {}


@pytest.mark.parametrize("url", ["https://127.0.0.1:1/", "http://:1/", "http://a:b/", "http://[::1/", "stage"])
async def test_what_is_no_url_of_a_replica_is_an_error(connections: ReplicaConnections, url: str) -> None:
    with pytest.raises(OSError, match="a replica's URL is"):
        await connections.post(url, "", b"", 1)


async def test_nobody_listens(connections: ReplicaConnections) -> None:
    async with serving(echo) as server:
        url = server.url
    with pytest.raises(OSError, match=r"."):
        await connections.post(url, "", b"", 5)
