"""The clients of the benchmarks take nothing for an answer that is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from benchmarks.bench import MeasureError
from benchmarks.http_load import Target, answers, latencies_s, requests_per_s, streamed
from benchmarks.peers import echo_peer, program
from benchmarks.streams import first_text_s

EVENT = b'data: {"choices": [{"text": "%s"}]}\n\n'


@asynccontextmanager
async def answering(content: bytes, status: bytes = b"200 OK") -> AsyncIterator[str]:
    """HOST:PORT of a server that answers every connection's first request with the same bytes and closes it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(content)) + content
        )
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_load_client_gets_its_answers_from_a_real_server() -> None:
    async with echo_peer() as url:
        target = Target.echo(url.removeprefix("http://").rstrip("/"), "/", b"x" * 10_000)
        assert len(await latencies_s(target, 3)) == 3
        assert await requests_per_s(target, 2, 0.05) > 0


@pytest.mark.parametrize(("content", "status"), [(b"other", b"200 OK"), (b"body", b"503 Service Unavailable")])
async def test_another_body_or_status_is_no_answer(content: bytes, status: bytes) -> None:
    async with answering(content, status) as address:
        with pytest.raises(MeasureError, match="answered"):
            await latencies_s(Target.echo(address, "/", b"body"), 1)


async def test_answers_come_in_the_order_of_the_requests() -> None:
    async with echo_peer() as url:
        address = url.removeprefix("http://").rstrip("/")
        bodies = [b"%d" % number for number in range(20)]
        assert await answers([Target.echo(address, "/", body) for body in bodies], 3) == bodies


async def test_headers_are_sent_and_another_status_can_be_expected() -> None:
    async with program(["benchmarks.peer_accept"], 1) as accept:
        address = f"127.0.0.1:{(await accept.read_line())['port']}"
        target = Target(address, "/", b"{}", {"ce-id": "1"}, 202)
        assert b"ce-id: 1\r\n" in target.request
        assert await answers([target], 1) == [b""]


async def test_a_connection_that_closes_is_told() -> None:
    async with answering(b"body") as address:
        with pytest.raises(MeasureError, match="closed the connection"):
            await latencies_s(Target.echo(address, "/", b"body"), 2)


@asynccontextmanager
async def streaming(content: bytes) -> AsyncIterator[str]:
    """As `answering`, for an answer in chunks."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + content)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_chunks_of_a_stream_are_joined() -> None:
    async with streaming(b"3\r\na\r\n\r\nb\r\n0123456789\n\r\n0\r\n\r\n") as address:
        assert await streamed(Target(address, "/", b"")) == b"a\r\n0123456789\n"


@pytest.mark.parametrize("content", [b"", b"3\r\nabc\r\n", b"3\r\nab"])
async def test_a_stream_that_breaks_off_is_told(content: bytes) -> None:
    async with streaming(content) as address:
        with pytest.raises(MeasureError, match="broke off"):
            await streamed(Target(address, "/", b""))


async def test_an_answer_that_is_no_stream_is_told() -> None:
    async with answering(b"busy", b"503 Service Unavailable") as address:
        with pytest.raises(MeasureError, match="busy"):
            await streamed(Target(address, "/", b""))


async def test_first_text_is_not_the_first_event() -> None:
    async with answering(EVENT % b"" + EVENT % b"To be" + b"data: [DONE]\n\n") as address:
        assert await first_text_s(f"http://{address}/", {}) > 0


@pytest.mark.parametrize(
    ("content", "status", "complaint"),
    [
        (EVENT % b"" + b"data: [DONE]\n\n", b"200 OK", "without any text"),
        (b'data: {"error": {"message": "no memory"}}\n\n', b"200 OK", "no memory"),
        (b"asleep", b"503 Service Unavailable", "answered 503: asleep"),
    ],
)
async def test_a_stream_without_text_is_told(content: bytes, status: bytes, complaint: str) -> None:
    async with answering(content, status) as address:
        with pytest.raises(MeasureError, match=complaint):
            await first_text_s(f"http://{address}/", {})
