"""HTTP/2 frames and streams however their bytes are cut, and the tunnel with a real gRPC server behind it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knative.errors import Unavailable
from knative.network.tunnel import PREFACE_BYTES, Frames, Streams, Tunnel

DATA, HEADERS, RST_STREAM, SETTINGS = 0, 1, 3, 4
END_STREAM = 1
PREFACE = b"P" * PREFACE_BYTES

Frame = tuple[int, int, int, int]  # type, flags, stream, length
FRAMES = st.lists(
    st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 2**31 - 1), st.integers(0, 300)), max_size=12
)


def wire(frame: Frame) -> bytes:
    kind, flags, stream, length = frame
    # its content looks like a header, so that a wrong step would show
    content = (bytes([0, 0, 1, HEADERS, END_STREAM, 0, 0, 0, 1]) * 40)[:length]
    return length.to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + content


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(ends)]


@given(frames=FRAMES, places=st.lists(st.integers(0, 10_000), max_size=30), skip=st.sampled_from([0, PREFACE_BYTES]))
def test_any_cutting_of_the_bytes_gives_the_same_frames(frames: list[Frame], places: list[int], skip: int) -> None:
    data = PREFACE[:skip] + b"".join(map(wire, frames))
    reader = Frames(skip)
    found = [one for piece in cut(data, places) for one in reader.feed(piece)]
    assert found == [(kind, flags, stream) for kind, flags, stream, _ in frames]


def test_the_reserved_bit_is_not_part_of_the_stream() -> None:
    assert Frames().feed(bytes([0, 0, 0, DATA, 0, 0x80, 0, 0, 5])) == [(DATA, 0, 5)]


class Count:
    """Opened and ended streams; each may end once."""

    def __init__(self) -> None:
        self.open = self.most = self.total = 0

    def __call__(self) -> Callable[[], None]:
        self.open += 1
        self.total += 1
        self.most = max(self.most, self.open)
        ended = False

        def end() -> None:
            nonlocal ended
            assert not ended
            ended = True
            self.open -= 1

        return end


def test_a_stream_is_open_from_its_headers_to_the_servers_end() -> None:
    count = Count()
    streams = Streams(count)
    streams.from_client(PREFACE + wire((SETTINGS, 0, 0, 6)))
    assert count.open == 0
    streams.from_client(wire((HEADERS, 0, 1, 30)) + wire((DATA, END_STREAM, 1, 10)))
    streams.from_server(wire((HEADERS, 0, 1, 20)) + wire((DATA, 0, 1, 100)))
    assert count.open == 1  # the client has said all, the server has not
    streams.from_server(wire((HEADERS, END_STREAM, 1, 20)))
    assert count.open == 0


def test_trailers_of_the_client_open_nothing() -> None:
    count = Count()
    streams = Streams(count)
    streams.from_client(PREFACE + wire((HEADERS, 0, 1, 5)) + wire((HEADERS, END_STREAM, 1, 5)))
    assert count.total == 1
    streams.from_server(wire((HEADERS, END_STREAM, 1, 5)))
    streams.from_client(wire((HEADERS, END_STREAM, 1, 5)))  # they crossed
    assert (count.open, count.total) == (0, 1)


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_reset_by_either_side_ends_the_stream(side: str) -> None:
    count = Count()
    streams = Streams(count)
    streams.from_client(PREFACE + wire((HEADERS, 0, 1, 5)) + wire((HEADERS, 0, 3, 5)))
    feed = streams.from_client if side == "client" else streams.from_server
    feed(wire((RST_STREAM, 0, 1, 4)))
    assert count.open == 1
    streams.close()
    assert count.open == 0


EVENTS = st.lists(
    st.tuples(st.sampled_from(["client", "server"]), st.sampled_from([DATA, HEADERS, RST_STREAM]), st.integers(0, 1),
              st.sampled_from([1, 3, 5, 7])), max_size=40,
)  # fmt: skip


@given(events=EVENTS)
def test_whatever_comes_no_stream_ends_twice_and_none_stays_open(events: list[tuple[str, int, int, int]]) -> None:
    count = Count()
    streams = Streams(count)
    streams.from_client(PREFACE)
    for side, kind, flags, stream in events:
        (streams.from_client if side == "client" else streams.from_server)(wire((kind, flags, stream, 4)))
    assert 0 <= count.open <= count.total <= 4
    streams.close()
    assert count.open == 0


class Replica:
    """What a tunnel asks of a replica."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.count = Count()

    def opened(self) -> Callable[[], None]:
        return self.count()


@pytest.fixture
async def go() -> asyncio.Event:
    """Set: the calls of the server answer."""
    return asyncio.Event()


@pytest.fixture
async def replica(go: asyncio.Event) -> AsyncIterator[Replica]:
    """A gRPC server: /t/Call answers "done" when `go` is set, /t/Stream says a word before that."""

    async def call(request: bytes, _context: Any) -> bytes:
        await go.wait()
        return b"done " + request

    async def stream(request: bytes, _context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        await go.wait()
        yield b"last"

    handlers = {
        "Call": grpc.unary_unary_rpc_method_handler(call),
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield Replica(port)
    await server.stop(None)


@pytest.fixture
async def tunnel() -> AsyncIterator[Callable[..., Awaitable[Tunnel]]]:
    opened: list[Tunnel] = []

    async def start(connect: Callable[[], Any]) -> Tunnel:
        opened.append(Tunnel(connect))
        await opened[-1].start("127.0.0.1", 0)
        return opened[-1]

    yield start
    for one in opened:
        await one.close()


def to(replica: Replica) -> Callable[[], Any]:
    @asynccontextmanager
    async def connect() -> AsyncIterator[Replica]:
        yield replica

    return connect


async def test_open_calls_are_counted_and_idle_connections_are_not(
    replica: Replica, tunnel: Callable[..., Any], go: asyncio.Event, until: Callable[..., Any]
) -> None:
    way = await tunnel(to(replica))
    async with grpc.aio.insecure_channel(way.address) as channel:
        await channel.channel_ready()
        assert replica.count.total == 0
        calls = [asyncio.ensure_future(channel.unary_unary("/t/Call")(b"%d" % number)) for number in range(10)]
        await until(lambda: replica.count.open == 10)
        go.set()
        assert sorted(await asyncio.gather(*calls)) == [b"done %d" % number for number in range(10)]
        await until(lambda: replica.count.open == 0)
        assert (await channel.unary_unary("/t/Call")(b"x" * 200_000))[-3:] == b"xxx"
        await until(lambda: replica.count.open == 0)
    assert replica.count.total == 11


async def test_streams_pass_as_they_come_and_a_cancelled_one_is_over(
    replica: Replica, tunnel: Callable[..., Any], until: Callable[..., Any]
) -> None:
    way = await tunnel(to(replica))
    async with grpc.aio.insecure_channel(way.address) as channel:
        call = channel.unary_stream("/t/Stream")(b"")
        assert await call.read() == b"first"
        assert replica.count.open == 1
        call.cancel()
        await until(lambda: replica.count.open == 0)


async def test_the_end_of_the_tunnel_ends_its_connections(
    replica: Replica, tunnel: Callable[..., Any], until: Callable[..., Any]
) -> None:
    way = await tunnel(to(replica))
    async with grpc.aio.insecure_channel(way.address) as channel:
        call = channel.unary_unary("/t/Call")(b"")
        await until(lambda: replica.count.open == 1)
        await way.close()
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call
        assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
    assert replica.count.open == 0


async def test_a_replica_that_cannot_be_had_closes_the_connection_only(tunnel: Callable[..., Any]) -> None:
    @asynccontextmanager
    async def connect() -> AsyncIterator[Replica]:
        raise Unavailable("nobody is there")
        yield

    way = await tunnel(connect)
    host, _, port = way.address.rpartition(":")
    for _ in range(2):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(PREFACE)
        assert await reader.read() == b""
        writer.close()


async def test_a_connection_that_says_nothing_asks_for_no_replica(tunnel: Callable[..., Any]) -> None:
    asked = 0

    @asynccontextmanager
    async def connect() -> AsyncIterator[Replica]:
        nonlocal asked
        asked += 1
        raise Unavailable("nobody is there")
        yield

    way = await tunnel(connect)
    host, _, port = way.address.rpartition(":")
    for said in (b"", PREFACE[:-1]):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(said)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
    assert asked == 0


async def test_a_taken_port_is_named(tunnel: Callable[..., Any]) -> None:
    way = await tunnel(lambda: None)
    port = int(way.address.rpartition(":")[2])
    with pytest.raises(Unavailable, match=f"cannot listen on 127.0.0.1:{port}"):
        await Tunnel(lambda: None).start("127.0.0.1", port)  # type: ignore[arg-type,return-value]  # never called
