"""The activator holds requests in the path until a replica is there, and tells the autoscaler at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from knative.network.activator import Activator
from knative.network.listener import Listener
from knative.network.timeouts import Timeouts

Start = Callable[..., Awaitable[Any]]
Until = Callable[[Callable[[], bool]], Awaitable[None]]

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def served() -> AsyncIterator[Callable[[Activator], Awaitable[str]]]:
    """`await served(activator)` is a URL that it answers."""
    listeners = []

    async def serve(activator: Activator) -> str:
        listener = Listener(activator.handle)
        listeners.append(listener)
        return f"http://{await listener.start('127.0.0.1', 0)}/"

    yield serve
    for listener in listeners:
        await listener.close()


def activator(**options: Any) -> Activator:
    settings = {"container_concurrency": 0, "timeouts": Timeouts(), "on_stat": lambda concurrency: None}
    return Activator(revision="demo-00001", **(settings | options))


async def headers_back(request: web.BaseRequest) -> web.Response:
    return web.json_response({"proxied": request.headers.getall("K-Proxy-Request"), "host": request.headers["Host"]})


async def test_requests_are_held_at_zero_and_answered_when_a_replica_is_there(
    served: Start, upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession, until: Until
) -> None:
    told: list[float] = []
    now_s = 100.0
    held = activator(on_stat=told.append, clock=lambda: now_s)
    url = await served(held)

    async def ask() -> dict[str, Any]:
        async with client.get(url, headers={"Host": "demo.default.localhost"}) as answer:
            assert answer.status == 200
            return await answer.json()

    asked = [asyncio.create_task(ask()) for _ in range(3)]
    await until(lambda: held.waiting == 3)
    assert told == [1.0]  # once, by the first
    now_s = 101.0
    report = held.report(now_s)
    assert report is not None
    assert (report.concurrency, report.requests) == (2, 2)  # the first is left out
    proxy = await queue_proxy(await upstream(headers_back))
    held.set_backends([proxy])
    for seen in await asyncio.gather(*asked):
        assert seen == {"proxied": ["activator"], "host": "demo.default.localhost"}
    assert held.waiting == 0
    assert proxy.report(0).proxied_requests == 3


async def test_a_hard_limit_spreads_a_burst_over_replicas_and_holds_the_rest(
    served: Start, upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession, until: Until
) -> None:
    opened = asyncio.Event()

    async def gate(request: web.BaseRequest) -> web.Response:
        await opened.wait()
        return web.Response()

    held = activator(container_concurrency=2)
    proxies = [await queue_proxy(await upstream(gate), container_concurrency=2) for _ in range(2)]
    held.set_backends(proxies)
    url = await served(held)

    async def ask() -> int:
        async with client.get(url) as answer:
            return answer.status

    asked = [asyncio.create_task(ask()) for _ in range(7)]
    await until(lambda: held.waiting == 3)
    assert [proxy.in_flight for proxy in proxies] == [2, 2]
    assert [proxy.queued for proxy in proxies] == [0, 0]
    opened.set()
    assert await asyncio.gather(*asked) == [200] * 7


@pytest.mark.parametrize("timeouts", [Timeouts(0.1), Timeouts(300, 0.1)], ids=str)
async def test_a_cold_start_that_takes_too_long_is_504(
    timeouts: Timeouts, served: Start, client: aiohttp.ClientSession
) -> None:
    held = activator(timeouts=timeouts)
    async with client.get(await served(held)) as answer:
        assert (answer.status, await answer.text()) == (504, "activator request timeout")
    assert held.waiting == 0


async def test_the_activators_limit_also_ends_a_stream(
    served: Start, upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession
) -> None:
    async def stream(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first ")
        await asyncio.sleep(60)
        return response

    held = activator(timeouts=Timeouts(0.3))
    proxy = await queue_proxy(await upstream(stream))
    held.set_backends([proxy])
    async with client.get(await served(held)) as answer:
        assert (answer.status, await answer.text()) == (200, "first activator request timeout")
    assert proxy.in_flight == 0


async def test_a_full_queue_is_503(served: Start, client: aiohttp.ClientSession, until: Until) -> None:
    held = activator(queue_depth=1, timeouts=Timeouts(5))
    url = await served(held)
    waiting = asyncio.create_task(client.get(url).__aenter__())
    await until(lambda: held.waiting == 1)
    async with client.get(url) as answer:
        assert (answer.status, await answer.text()) == (503, "pending request queue full\n")
    waiting.cancel()
    await until(lambda: held.waiting == 0)  # a client that goes away leaves the queue


@pytest.mark.parametrize(
    ("value", "status", "text"),
    [("activator", 200, "activator"), ("queue", 400, 'unexpected probe header value: "queue"\n')],
)
async def test_probes_wake_nothing(
    value: str, status: int, text: str, served: Start, client: aiohttp.ClientSession
) -> None:
    told: list[float] = []
    url = await served(activator(on_stat=told.append))
    async with client.get(url, headers={"K-Network-Probe": value}) as answer:
        assert (answer.status, await answer.text()) == (status, text)
    assert told == []
