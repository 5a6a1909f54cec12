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
