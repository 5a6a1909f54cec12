"""What a listener refuses, and how it says so."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from knative.errors import Unavailable
from knative.network.listener import Listener


async def hello(request: web.BaseRequest) -> web.Response:
    return web.Response(text="hello")


async def test_an_occupied_port_is_a_clear_error() -> None:
    first, second = Listener(hello), Listener(hello)
    address = await first.start("127.0.0.1", 0)
    with pytest.raises(Unavailable, match=f"cannot listen on {address}: .*in use.*choose another"):
        await second.start("127.0.0.1", int(address.rpartition(":")[2]))
    await first.close()
    await second.close()


async def test_ipv6_addresses_are_shown_in_brackets() -> None:
    listener = Listener(hello)
    try:
        assert (await listener.start("::1", 0)).startswith("[::1]:")
    except Unavailable:
        pytest.skip("this machine has no IPv6")
    finally:
        await listener.close()


async def test_a_refusal_does_not_repeat_a_long_line(connect: Callable[..., Awaitable[Any]]) -> None:
    listener = Listener(hello)
    address = await listener.start("127.0.0.1", 0)
    reader, _ = await connect(address, b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a" * 60_000 + b"\r\n\r\n")
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 400 ")
    assert b"Invalid header" in body
    assert len(body) < 1000
    await listener.close()


@pytest.mark.parametrize(
    ("request_head", "status", "text"),
    [
        ("GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket", "501", "server-sent events"),
        ("CONNECT example.org:443 HTTP/1.1", "405", "CONNECT is not supported"),
        ("POST / HTTP/1.1\r\nExpect: a-miracle\r\nContent-Length: 0", "417", "a-miracle is unknown"),
        ("GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c", "200", "hello"),
        ("NONSENSE\r\n", "400", ""),
    ],
)
async def test_what_one_exchange_cannot_carry_is_refused_with_a_reason(
    request_head: str, status: str, text: str, connect: Callable[..., Awaitable[Any]]
) -> None:
    listener = Listener(hello)
    address = await listener.start("127.0.0.1", 0)
    reader, writer = await connect(address, f"{request_head}\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    assert head.split()[1] == status
    writer.write_eof()
    assert text in (await reader.read()).decode()
    await listener.close()


@pytest.mark.parametrize(
    ("request_head", "status", "text"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-A: \xff", b"400", b"the header X-A has bytes that are no UTF-8"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: \xff", b"400", b"the header Expect has"),
        (b"GET / HTTP/1.1\r\nHost: \xff", b"400", b"the header Host has"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-A: \xc3\xa9", b"200", b"hello"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-A: a\x01b", b"400", b"Invalid header value char"),
        (b"GET /\xff HTTP/1.1\r\nHost: x", b"400", b"Invalid char in url path"),
        (b"GET / HTTP/1.1\r\nX-A: b", b"400", b"Missing 'Host' header"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y", b"400", b"Duplicate 'Host' header"),
        (b"GET / HTTP/1.0", b"200", b"hello"),
        (b"GET /", b"505", b"only HTTP/1.0 and HTTP/1.1"),
        (b"GET ftp://x/ HTTP/1.1\r\nHost: x", b"400", b"a path, * or http://HOST/PATH"),
        (b"GET http://a:b@x/ HTTP/1.1\r\nHost: x", b"400", b"a path, * or http://HOST/PATH"),
        (b"GET http://xn--a/ HTTP/1.1\r\nHost: x", b"400", b"a path, * or http://HOST/PATH"),
        (b"GET HTTP://x HTTP/1.1\r\nHost: x", b"200", b"hello"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked", b"501", b"gzip, chunked is not supported"),
        (b"POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked", b"400", b"HTTP/1.0 has no Transfer-Encoding"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked", b"400", b""),
    ],
)
async def test_what_servers_may_read_in_two_ways_is_not_passed_on(
    request_head: bytes, status: bytes, text: bytes, connect: Callable[..., Awaitable[Any]]
) -> None:
    listener = Listener(hello)
    address = await listener.start("127.0.0.1", 0)
    reader, writer = await connect(address, request_head + b"\r\nConnection: close\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.split()[1] == status
    writer.write_eof()
    assert text in await reader.read()
    await listener.close()
