"""Which service a request goes to, and what its replica gets to see of the target."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from knative.network.forward import TARGET
from knative.network.ingress import Ingress, Route

Start = Callable[..., Awaitable[Any]]

pytestmark = pytest.mark.timeout(60)


class Entry:
    """A revision that says its name and the target it got."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def serve(self, request: web.BaseRequest) -> web.Response:
        return web.Response(text=f"{self.name} {request.get(TARGET) or request.raw_path}")


def route(name: str) -> Route:
    return Route(((100, Entry(name)),))


@pytest.fixture
async def ingress() -> AsyncIterator[Ingress]:
    made = Ingress(random.Random(1))
    await made.start()
    names = ("demo.default", "blue-demo.default", "stage-0.team", "www.example.org")
    made.set_routes({name: route(name) for name in names}, route("the-default"))
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("target", "host", "answer"),
    [
        ("/x", "demo.default.localhost", "demo.default /x"),
        ("/x", "demo.default.localhost:8080", "demo.default /x"),
        ("/x", "DEMO.Default.LOCALHOST", "demo.default /x"),
        ("/x", "demo.default.svc.cluster.local", "demo.default /x"),
        ("/x", "demo.default.svc.cluster.local.", "demo.default /x"),
        ("/x", "demo.default.svc", "demo.default /x"),
        ("/x", "demo.default", "demo.default /x"),
        ("/x", "blue-demo.default.localhost", "blue-demo.default /x"),
        ("/x", "www.example.org:80", "www.example.org /x"),
        ("/team/stage-0/x%2Fy?q=%20", "demo.default", "demo.default /team/stage-0/x%2Fy?q=%20"),  # the host goes first
        ("/team/stage-0/x%2Fy?q=%20", "127.0.0.1:8080", "stage-0.team /x%2Fy?q=%20"),
        ("/team/stage-0", "localhost", "stage-0.team /"),
        ("/team/stage-0?a=/b/c", "localhost", "stage-0.team /?a=/b/c"),
        ("/team/stage-0/", "[::1]:8080", "stage-0.team /"),
        ("/team/other/x", "localhost", "the-default /team/other/x"),
        ("/", "localhost", "the-default /"),
        ("/v1/models", "unknown.example.org", "the-default /v1/models"),
        ("http://stage-0.team.svc.cluster.local/x%2Fy?q=%20", "ignored", "stage-0.team /x%2Fy?q=%20"),
        ("http://stage-0.team.svc.cluster.local:80", "stage-0.team", "stage-0.team /"),
        ("http://stage-0.team?a=b", "stage-0.team", "stage-0.team /?a=b"),
    ],
)
async def test_routes(target: str, host: str, answer: str, ingress: Ingress, connect: Start) -> None:
    reader, _ = await connect(
        ingress.address, f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    )
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200")
    assert body == answer


async def test_its_own_address_in_an_absolute_target_is_itself(ingress: Ingress, connect: Start) -> None:
    reader, _ = await connect(
        ingress.address,
        f"GET http://{ingress.address}/team/stage-0/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode(),
    )
    assert (await reader.read()).endswith(b"stage-0.team /x")


@pytest.mark.parametrize(
    ("target", "host", "hint"),
    [
        ("/x", "gone.default.svc.cluster.local", "no service for gone.default.svc.cluster.local/x"),
        ("/x", "gone.default.localhost", "demo.default, stage-0.team"),
        ("http://gone.team.svc/x", "x", "no service for http://gone.team.svc/x"),
        ("http://127.0.0.1:1/x", "x", "no service for"),
        ("http://example.com/x", "x", "no service for"),
    ],
)
async def test_a_service_that_does_not_exist_is_404_and_not_the_default(
    target: str, host: str, hint: str, ingress: Ingress, connect: Start
) -> None:
    reader, _ = await connect(
        ingress.address, f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    )
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 404")
    assert hint in body


async def test_without_services_the_answer_says_what_to_do(ingress: Ingress, client: aiohttp.ClientSession) -> None:
    ingress.set_routes({})
    async with client.get(f"http://{ingress.address}/") as answer:
        assert answer.status == 404
        assert "stagecraft local apply" in await answer.text()


async def test_the_tag_header_chooses_a_tagged_route(ingress: Ingress, client: aiohttp.ClientSession) -> None:
    for tag, name in (("blue", "blue-demo.default"), ("green", "demo.default")):
        headers = {"Host": "demo.default.localhost", "Knative-Serving-Tag": tag}
        async with client.get(f"http://{ingress.address}/", headers=headers) as answer:
            assert await answer.text() == f"{name} /"


async def test_requests_are_split_by_weight(ingress: Ingress, client: aiohttp.ClientSession) -> None:
    ingress.set_routes({"demo.default": Route(((80, Entry("old")), (20, Entry("new")), (0, Entry("none"))))})
    seen: Counter[str] = Counter()
    for _ in range(300):
        async with client.get(f"http://{ingress.address}/", headers={"Host": "demo.default"}) as answer:
            seen[(await answer.text()).split()[0]] += 1
    assert 210 < seen["old"] < 270
    assert seen["none"] == 0


@pytest.mark.parametrize("targets", [(), ((0, Entry("none")),)])
async def test_a_service_without_a_revision_is_503(
    targets: tuple[tuple[int, Entry], ...], ingress: Ingress, client: aiohttp.ClientSession
) -> None:
    ingress.set_routes({"demo.default": Route(targets)})
    async with client.get(f"http://{ingress.address}/", headers={"Host": "demo.default"}) as answer:
        assert answer.status == 503
        assert "no revision" in await answer.text()


async def test_a_stripped_prefix_reaches_the_process_stripped(
    ingress: Ingress, upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession, connect: Start
) -> None:
    async def process(request: web.BaseRequest) -> web.Response:
        return web.Response(text=f"{request.raw_path} {request.headers['Host']}")

    proxy = await queue_proxy(await upstream(process))

    class Direct:
        async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
            return await proxy.handle(request, proxied=False)

    ingress.set_routes({"demo.default": Route(((100, Direct()),))})
    async with client.get(f"http://{ingress.address}/default/demo/v1/models?x=1") as answer:
        assert await answer.text() == f"/v1/models?x=1 {ingress.address}"
    reader, _ = await connect(
        ingress.address,
        b"GET http://demo.default.svc.cluster.local/x HTTP/1.1\r\nHost: demo.default.svc.cluster.local\r\n"
        b"Connection: close\r\n\r\n",
    )
    assert (await reader.read()).endswith(b"/x demo.default.svc.cluster.local")
