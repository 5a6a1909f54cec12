"""A replica's process, clients and the parts under test, all on real sockets of this machine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from knative.network.forward import relay_session
from knative.network.queue_proxy import QueueProxy
from knative.network.timeouts import Timeouts

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    """`await until(condition)` for states of sockets and processes that nobody announces."""

    async def wait(condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  there is no event to wait for
                await asyncio.sleep(0.005)

    return wait


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """The session that relays."""
    async with relay_session() as made:
        yield made


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that takes answers as they come."""
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(auto_decompress=False, timeout=timeout) as made:
        yield made


@pytest.fixture
async def upstream() -> AsyncIterator[Callable[[Handler], Awaitable[int]]]:
    """`await upstream(handler)` serves on the returned port; a client that goes away cancels the handler."""
    async with contextlib.AsyncExitStack() as stack:

        async def serve(handler: Handler) -> int:
            server = web.Server(
                handler,
                handler_cancellation=True,
                access_log=None,
                auto_decompress=False,
                max_field_size=65536,
                max_headers=1000,
            )
            runner = web.ServerRunner(server, shutdown_timeout=0.1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            return int(runner.addresses[0][1])

        yield serve


@pytest.fixture
async def raw_upstream() -> AsyncIterator[Callable[..., Awaitable[int]]]:
    """`await raw_upstream(talk)` gives every connection to `talk(reader, writer)`, then closes it."""
    servers = []

    async def serve(talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> int:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await talk(reader, writer)
            finally:
                writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    yield serve
    for server in servers:
        server.close()


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]]:
    """`await connect(address, sent)` opens a connection and sends bytes as they are."""
    writers = []

    async def open_one(address: str, sent: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writers.append(writer)
        writer.write(sent)
        return reader, writer

    yield open_one
    for writer in writers:
        writer.close()


@pytest.fixture
async def queue_proxy(session: aiohttp.ClientSession) -> AsyncIterator[Callable[..., Awaitable[QueueProxy]]]:
    """`await queue_proxy(port, **options)` is a started queue-proxy before the process on `port`."""
    made = []

    async def start(port: int, **options: object) -> QueueProxy:
        settings: dict[str, object] = {
            "revision": "demo-00001",
            "pod": "demo-00001-abcde",
            "container_concurrency": 0,
            "timeouts": Timeouts(),
            "ready": lambda: True,
        }
        proxy = QueueProxy(target_port=port, session=session, **(settings | options))  # type: ignore[arg-type]  # options of a test
        made.append(proxy)
        await proxy.start()
        return proxy

    yield start
    for proxy in made:
        await proxy.close()
