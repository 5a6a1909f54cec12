"""One exchange passes unchanged, at once, and ends with the side that breaks off."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

Start = Callable[..., Awaitable[Any]]
Until = Callable[[Callable[[], bool]], Awaitable[None]]

pytestmark = pytest.mark.timeout(60)


async def echo(request: web.BaseRequest) -> web.Response:
    """What the process saw, as JSON."""
    body = await request.content.read()
    seen = {
        "method": request.method,
        "target": request.raw_path,
        "headers": [[key, value] for key, value in request.headers.items()],
        "body": body.decode("latin-1"),
    }
    return web.json_response(seen)


def seen_in(answer: bytes) -> dict[str, Any]:
    """What `echo` told in a whole response."""
    return dict(json.loads(answer.partition(b"\r\n\r\n")[2]))


def named(seen: dict[str, Any], name: str) -> list[str]:
    return [value for key, value in seen["headers"] if key.lower() == name]


@pytest.mark.parametrize(
    "target",
    ["/", "/a%2Fb/%7Euser/%C3%A4%20x", "/a/../b//c/./d", "/x?", "/x?q=%26&q=a+b&c=%zz&d=?", "/x;y=1,2?a=b#no", "*"],
)
async def test_the_request_target_passes_byte_by_byte(
    target: str, upstream: Start, queue_proxy: Start, connect: Start
) -> None:
    proxy = await queue_proxy(await upstream(echo))
    method = "OPTIONS" if target == "*" else "GET"
    request = f"{method} {target} HTTP/1.1\r\nHost: demo.default\r\nConnection: close\r\n\r\n"
    reader, _ = await connect(proxy.address, request.encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert json.loads(body)["target"] == target


async def test_headers_for_one_hop_stay_behind_and_all_others_pass(
    upstream: Start, queue_proxy: Start, connect: Start
) -> None:
    proxy = await queue_proxy(await upstream(echo))
    reader, _ = await connect(
        proxy.address,
        b"GET / HTTP/1.1\r\nHost: demo.default\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\n"
        b"TE: trailers\r\nTrailer: X-Sum\r\nUpgrade: h2c\r\nProxy-Authorization: secret\r\nProxy-Connection: close\r\n"
        b"X-Twice: 1\r\nX-Twice: 2\r\nX-Forwarded-For: 10.0.0.9\r\nCookie: a=1; b=2\r\nX-Big: "
        + b"x" * 32768
        + b"\r\n\r\n",
    )
    seen = seen_in(await reader.read())
    names = {key.lower() for key, _ in seen["headers"]}
    assert names == {"host", "x-twice", "x-forwarded-for", "cookie", "x-big"}  # none is added either
    assert named(seen, "host") == ["demo.default"]
    assert named(seen, "x-twice") == ["1", "2"]
    assert named(seen, "x-forwarded-for") == ["10.0.0.9, 127.0.0.1"]
    assert len(named(seen, "x-big")[0]) == 32768


async def test_repeated_headers_pass_however_they_are_spelt(
    upstream: Start, queue_proxy: Start, connect: Start
) -> None:
    proxy = await queue_proxy(await upstream(echo))
    head = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Twice: 1\r\nX-TWICE: 2\r\nx-twice: 3\r\n\r\n"
    reader, _ = await connect(proxy.address, head)
    seen = seen_in(await reader.read())
    assert named(seen, "x-twice") == ["1", "2", "3"]


async def test_no_client_takes_the_host_away(upstream: Start, queue_proxy: Start, connect: Start) -> None:
    proxy = await queue_proxy(await upstream(echo))
    head = b"GET / HTTP/1.1\r\nHost: demo.default\r\nConnection: close, Host, X-A\r\nX-A: 1\r\n\r\n"
    reader, _ = await connect(proxy.address, head)
    seen = seen_in(await reader.read())
    assert (named(seen, "host"), named(seen, "x-a")) == (["demo.default"], [])


@pytest.mark.parametrize(
    ("target", "path"), [("http://demo.default/a%2Fb?c", "/a%2Fb?c"), ("HTTP://demo.default", "/")]
)
async def test_the_host_of_an_absolute_target_is_the_one_that_counts(
    target: str, path: str, upstream: Start, queue_proxy: Start, connect: Start
) -> None:
    proxy = await queue_proxy(await upstream(echo))
    reader, _ = await connect(
        proxy.address, f"GET {target} HTTP/1.1\r\nHost: other\r\nConnection: close\r\n\r\n".encode()
    )
    seen = seen_in(await reader.read())
    assert (seen["target"], named(seen, "host")) == (path, ["demo.default"])


async def test_many_headers_pass(upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession) -> None:
    proxy = await queue_proxy(await upstream(echo))
    async with client.get(f"http://{proxy.address}/", headers={f"X-{number}": "1" for number in range(500)}) as answer:
        assert len((await answer.json())["headers"]) > 500


async def test_the_response_passes_with_repeated_headers_and_without_those_of_the_hop(
    raw_upstream: Start, queue_proxy: Start, connect: Start
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 418 Short And Stout\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nConnection: close, X-Hop\r\n"
            b"X-Hop: 1\r\nKeep-Alive: timeout=3\r\nContent-Type: text/tea\r\nContent-Length: 3\r\nServer: pot\r\n"
            b"Date: today\r\nX-Big: " + b"x" * 32768 + b"\r\n\r\ntea"
        )

    proxy = await queue_proxy(await raw_upstream(talk))
    reader, _ = await connect(proxy.address, b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 418 Short And Stout"
    assert sorted(lines[1:]) == sorted(
        [
            "Set-Cookie: a=1",
            "Set-Cookie: b=2",
            "Content-Type: text/tea",
            "Content-Length: 3",
            "Server: pot",
            "Date: today",
            "X-Big: " + "x" * 32768,
            "Connection: close",  # ours to this client, as it asked
        ]
    )
    assert body == b"tea"


async def test_redirects_cookies_and_compressed_bodies_are_left_alone(
    upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession
) -> None:
    packed = gzip.compress(b"hello")
    cookies: list[str | None] = []

    async def handler(request: web.BaseRequest) -> web.Response:
        cookies.append(request.headers.get("Cookie"))
        assert await request.content.read() in (packed, b"")
        return web.Response(
            status=302,
            body=packed,
            headers={"Location": "/elsewhere", "Content-Encoding": "gzip", "Set-Cookie": "sid=1"},
        )

    proxy = await queue_proxy(await upstream(handler))
    async with aiohttp.ClientSession(auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()) as plain:
        for _ in range(2):
            async with plain.post(
                f"http://{proxy.address}/", data=packed, headers={"Content-Encoding": "gzip"}, allow_redirects=False
            ) as answer:
                assert (answer.status, answer.headers["Location"]) == (302, "/elsewhere")
                assert await answer.read() == packed
    assert cookies == [None, None]


async def test_each_event_of_a_stream_passes_before_the_next_is_made(
    upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession
) -> None:
    seen = asyncio.Event()

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(5):
            await response.write(f"data: {number}\n\n".encode())
            await seen.wait()  # the client has to have it before there is another
            seen.clear()
        await response.write_eof()
        return response

    proxy = await queue_proxy(await upstream(handler))
    async with client.get(f"http://{proxy.address}/") as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        for number in range(5):
            assert await answer.content.readany() == f"data: {number}\n\n".encode()
            seen.set()
        assert await answer.content.readany() == b""


async def test_a_chunked_request_passes_piece_by_piece(
    upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession
) -> None:
    arrived: asyncio.Queue[bytes] = asyncio.Queue()

    async def handler(request: web.BaseRequest) -> web.Response:
        assert request.headers.get("Transfer-Encoding") == "chunked"
        assert "Content-Length" not in request.headers
        while piece := await request.content.readany():
            arrived.put_nowait(piece)
        return web.Response(text="done")

    async def pieces() -> Any:
        for number in range(4):
            piece = f"piece {number}".encode()
            yield piece
            assert await arrived.get() == piece

    proxy = await queue_proxy(await upstream(handler))
    async with client.post(f"http://{proxy.address}/", data=pieces()) as answer:
        assert await answer.text() == "done"


@pytest.mark.parametrize(
    ("method", "status", "length"),
    [("HEAD", 200, "1234"), ("GET", 204, None), ("GET", 304, None), ("POST", 200, "0")],
)
async def test_responses_without_a_body_keep_the_connection_in_step(
    method: str, status: int, length: str | None, raw_upstream: Start, queue_proxy: Start, connect: Start
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            await reader.readuntil(b"\r\n\r\n")
            announced = f"Content-Length: {length}\r\n" if length else ""
            writer.write(f"HTTP/1.1 {status} Fine\r\nX-Mark: 1\r\n{announced}\r\n".encode())

    proxy = await queue_proxy(await raw_upstream(talk))
    request = f"{method} / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
    reader, _ = await connect(proxy.address, request * 2)  # pipelined
    for _ in range(2):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert head.startswith(f"HTTP/1.1 {status} Fine\r\n")
        assert "X-Mark: 1\r\n" in head
        assert "Transfer-Encoding" not in head
        assert ("Content-Length: " + str(length) in head) == (length is not None)


async def test_pipelined_requests_are_answered_in_order_on_one_connection(
    upstream: Start, queue_proxy: Start, connect: Start
) -> None:
    async def handler(request: web.BaseRequest) -> web.Response:
        return web.Response(body=request.raw_path.encode() + await request.content.read())

    proxy = await queue_proxy(await upstream(handler))
    sent = b"".join(
        b"POST /%d HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nbody%d" % (number, number) for number in range(9)
    )
    reader, _ = await connect(proxy.address, sent)
    for number in range(9):
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(7) == b"/%dbody%d" % (number, number)


async def test_a_client_that_expects_100_continue_gets_it_before_its_body(
    upstream: Start, queue_proxy: Start, connect: Start
) -> None:
    proxy = await queue_proxy(await upstream(echo))
    head = b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\nConnection: close\r\n\r\n"
    reader, writer = await connect(proxy.address, head)
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"body")
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 200 OK")
    seen = seen_in(answer)
    assert seen["body"] == "body"
    assert named(seen, "expect") == []


async def test_an_old_client_gets_a_stream_that_ends_with_the_connection(
    upstream: Start, queue_proxy: Start, connect: Start
) -> None:
    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"no length")
        return response

    proxy = await queue_proxy(await upstream(handler))
    reader, _ = await connect(proxy.address, b"GET / HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n\r\n")
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert body == b"no length"


async def test_the_request_side_may_go_on_while_the_response_comes(
    upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession
) -> None:
    answers: asyncio.Queue[bytes] = asyncio.Queue()

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while piece := await request.content.readany():
            await response.write(piece.upper())
        await response.write_eof()
        return response

    async def pieces() -> Any:
        yield b"one"
        assert await answers.get() == b"ONE"
        yield b"two"

    proxy = await queue_proxy(await upstream(handler))
    async with client.post(f"http://{proxy.address}/", data=pieces()) as answer:
        answers.put_nowait(await answer.content.readany())
        assert await answer.content.readany() == b"TWO"


async def test_an_answer_before_the_body_was_taken_reaches_the_client(
    raw_upstream: Start, queue_proxy: Start, connect: Start
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
        await writer.drain()
        await reader.read()  # until the queue-proxy gives this exchange up

    proxy = await queue_proxy(await raw_upstream(talk))
    reader, _ = await connect(
        proxy.address, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n" + b"x" * 9999
    )
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 Too Large\r\n")
    assert await reader.readexactly(3) == b"big"


@pytest.mark.parametrize("started", [False, True])
async def test_a_client_that_goes_away_stops_the_process(
    started: bool, upstream: Start, queue_proxy: Start, connect: Start, until: Until
) -> None:
    running, stopped = asyncio.Event(), asyncio.Event()

    async def handler(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        if started:
            await response.prepare(request)
            await response.write(b"first")
        running.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            stopped.set()
            raise
        return response

    proxy = await queue_proxy(await upstream(handler))
    reader, writer = await connect(proxy.address, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await running.wait()
    if started:
        await reader.readuntil(b"first")
    writer.close()
    await asyncio.wait_for(stopped.wait(), 20)
    await until(lambda: not proxy.in_flight)


async def test_a_client_that_breaks_off_its_body_stops_the_process(
    upstream: Start, queue_proxy: Start, connect: Start
) -> None:
    outcome: asyncio.Queue[str] = asyncio.Queue()

    async def handler(request: web.BaseRequest) -> web.Response:
        try:
            outcome.put_nowait("first" if await request.content.readany() else "")
            await request.content.read()
            outcome.put_nowait("whole body")
        except BaseException:
            outcome.put_nowait("broken")
            raise
        return web.Response()

    proxy = await queue_proxy(await upstream(handler))
    _, writer = await connect(
        proxy.address, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
    )
    assert await asyncio.wait_for(outcome.get(), 20) == "first"
    writer.close()
    assert await asyncio.wait_for(outcome.get(), 20) == "broken"


async def test_a_process_that_does_not_listen_is_502(queue_proxy: Start, client: aiohttp.ClientSession) -> None:
    proxy = await queue_proxy(1)
    async with client.get(f"http://{proxy.address}/") as answer:
        assert answer.status == 502
        assert "no answer from 127.0.0.1:1: " in await answer.text()


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Le", b"no http at all\r\n\r\n"])
async def test_a_process_that_breaks_off_before_its_response_is_502(
    sent: bytes, raw_upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)

    proxy = await queue_proxy(await raw_upstream(talk))
    async with client.post(f"http://{proxy.address}/", data=b"x") as answer:
        assert answer.status == 502
        text = await answer.text()
        assert text.startswith("no answer from")
        assert "Traceback" not in text


@pytest.mark.parametrize(
    "head", ["Transfer-Encoding: chunked\r\n\r\n4\r\npart\r\n", "Content-Length: 9999999\r\n\r\npart"]
)
async def test_a_process_that_breaks_off_in_its_response_gives_no_clean_end(
    head: str, raw_upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\n{head}".encode())

    proxy = await queue_proxy(await raw_upstream(talk))
    async with client.get(f"http://{proxy.address}/") as answer:
        assert await answer.content.readexactly(4) == b"part"
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.content.read()


async def test_a_replica_that_closes_idle_connections_early_does_no_harm(
    raw_upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")  # and closes without having said so

    proxy = await queue_proxy(await raw_upstream(talk))
    for _ in range(5):
        async with client.post(f"http://{proxy.address}/") as answer:
            assert (answer.status, await answer.text()) == (200, "ok")
        await asyncio.sleep(0.02)
