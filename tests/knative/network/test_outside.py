"""The ingress as the HTTP proxy that replicas have: other servers are reached through it, from this machine only."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from knative.network.forward import relay_session
from knative.network.ingress import Ingress


@pytest.fixture
async def server() -> AsyncIterator[str]:
    """HOST:PORT of a server that is no service, and answers with the target and Host it was asked for."""

    async def answer(request: web.BaseRequest) -> web.Response:
        return web.Response(text=f"{request.headers['Host']} {request.raw_path}")

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture
async def ingress() -> AsyncIterator[Ingress]:
    async with relay_session() as session:
        ingress = Ingress(session=session)
        await ingress.start()
        yield ingress
        await ingress.close()


async def test_another_server_is_reached_through_the_proxy(ingress: Ingress, server: str) -> None:
    async with aiohttp.ClientSession() as client:
        proxy = f"http://{ingress.address}"
        async with client.get(URL(f"http://{server}/weights?part=%2F1", encoded=True), proxy=proxy) as answer:
            assert (answer.status, await answer.text()) == (200, f"{server} /weights?part=%2F1")


async def test_a_service_that_does_not_exist_is_not_looked_for_elsewhere(ingress: Ingress) -> None:
    async with aiohttp.ClientSession() as client:
        proxy = f"http://{ingress.address}"
        async with client.get("http://none.default.svc.cluster.local/", proxy=proxy) as answer:
            assert answer.status == 404


async def test_a_server_that_is_not_there_is_a_502(ingress: Ingress) -> None:
    async with aiohttp.ClientSession() as client:
        proxy = f"http://{ingress.address}"
        async with client.get("http://127.0.0.1:1/", proxy=proxy) as answer:
            assert answer.status == 502
