"""The three limits, alone and on a running exchange. Only their order is asserted, no durations."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from knative.network.timeouts import Timeouts

Start = Callable[..., Awaitable[Any]]

pytestmark = pytest.mark.timeout(60)

_NEVER_S = 300
_SOON_S = 0.1


@pytest.mark.parametrize(
    ("timeouts", "last_write_s", "deadline_s"),
    [
        (Timeouts(0, 0, 0), None, None),
        (Timeouts(30, 0, 0), None, 130),
        (Timeouts(30, 0, 0), 125, 130),
        (Timeouts(30, 10, 0), None, 110),
        (Timeouts(30, 10, 0), 105, 130),
        (Timeouts(30, 40, 0), None, 130),
        (Timeouts(30, 0, 5), None, 105),
        (Timeouts(30, 0, 5), 103, 108),
        (Timeouts(30, 0, 5), 128, 130),
        (Timeouts(0, 10, 0), 105, None),
    ],
)
def test_the_next_limit(timeouts: Timeouts, last_write_s: float | None, deadline_s: float | None) -> None:
    assert timeouts.deadline_s(100, last_write_s) == deadline_s


async def sleepy(request: web.BaseRequest) -> web.StreamResponse:
    """Sleeps before its response, /stream after the first piece, /sized too, but with a length announced."""
    if request.raw_path == "/":
        await asyncio.sleep(60)
    response = web.StreamResponse()
    if request.raw_path == "/sized":
        response.content_length = 1 << 20
    await response.prepare(request)
    await response.write(b"first ")
    await asyncio.sleep(60)
    return response


@pytest.mark.parametrize(
    "timeouts", [Timeouts(_SOON_S), Timeouts(_NEVER_S, _SOON_S), Timeouts(_NEVER_S, 0, _SOON_S)], ids=str
)
async def test_nothing_sent_in_time_is_504(
    timeouts: Timeouts, upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession
) -> None:
    proxy = await queue_proxy(await upstream(sleepy), timeouts=timeouts)
    for _ in range(2):  # the connection stays of use
        async with client.get(f"http://{proxy.address}/") as answer:
            assert (answer.status, await answer.text()) == (504, "request timeout")
    assert proxy.in_flight == 0


@pytest.mark.parametrize("timeouts", [Timeouts(0.3), Timeouts(_NEVER_S, 0, 0.3)], ids=str)
async def test_a_stream_out_of_time_ends_regularly_with_the_text_appended(
    timeouts: Timeouts, upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession
) -> None:
    proxy = await queue_proxy(await upstream(sleepy), timeouts=timeouts)
    for _ in range(2):
        async with client.get(f"http://{proxy.address}/stream") as answer:
            assert (answer.status, await answer.text()) == (200, "first request timeout")


async def test_an_announced_length_that_is_not_reached_in_time_is_cut_off(
    upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession
) -> None:
    proxy = await queue_proxy(await upstream(sleepy), timeouts=Timeouts(0.3))
    async with client.get(f"http://{proxy.address}/sized") as answer:
        assert answer.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()


async def test_a_started_stream_is_not_bound_by_response_start_and_each_write_restarts_idle(
    upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession
) -> None:
    async def slow(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for number in range(8):
            await asyncio.sleep(0.2)
            await response.write(b"%d" % number)
        return response

    proxy = await queue_proxy(await upstream(slow), timeouts=Timeouts(_NEVER_S, 1.2, 1.2))
    async with client.get(f"http://{proxy.address}/") as answer:
        assert await answer.text() == "01234567"


async def test_time_in_the_queue_counts(upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession) -> None:
    reached: list[str] = []

    async def handler(request: web.BaseRequest) -> web.Response:
        reached.append(request.raw_path)
        await asyncio.sleep(60)
        return web.Response()

    proxy = await queue_proxy(await upstream(handler), container_concurrency=1, timeouts=Timeouts(0.3))
    url = f"http://{proxy.address}"

    async def ask(path: str) -> int:
        async with client.get(url + path) as answer:
            return answer.status

    assert await asyncio.gather(ask("/1"), ask("/2")) == [504, 504]
    assert len(reached) <= 2
    assert (proxy.in_flight, proxy.queued) == (0, 0)


async def test_a_request_out_of_time_stops_the_process(
    upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession
) -> None:
    stopped = asyncio.Event()

    async def handler(request: web.BaseRequest) -> web.Response:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            stopped.set()
            raise
        return web.Response()

    proxy = await queue_proxy(await upstream(handler), timeouts=Timeouts(_SOON_S))
    async with client.get(f"http://{proxy.address}/") as answer:
        assert answer.status == 504
    await asyncio.wait_for(stopped.wait(), 20)
