"""Limits, counts, probes and draining of one replica's queue-proxy, over its own port."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

Start = Callable[..., Awaitable[Any]]
Until = Callable[[Callable[[], bool]], Awaitable[None]]

pytestmark = pytest.mark.timeout(60)


class Gate:
    """A process that holds its requests until it is opened."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.inside = self.most = 0

    async def __call__(self, request: web.BaseRequest) -> web.Response:
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await self.opened.wait()
        finally:
            self.inside -= 1
        return web.Response(text="ok")


async def seen_headers(request: web.BaseRequest) -> web.Response:
    return web.json_response(dict(request.headers))


async def test_of_26_at_once_with_concurrency_2_four_are_refused(
    upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession, until: Until
) -> None:
    gate, observed = Gate(), []
    proxy = await queue_proxy(
        await upstream(gate),
        container_concurrency=2,
        observe=lambda code, latency_s: observed.append((code, latency_s)),
    )

    async def ask() -> tuple[int, str]:
        async with client.get(f"http://{proxy.address}/") as answer:
            return answer.status, await answer.text()

    asked = [asyncio.create_task(ask()) for _ in range(26)]
    await until(lambda: sum(task.done() for task in asked) == 4 and (proxy.queued, gate.inside) == (20, 2))
    assert proxy.in_flight == 22
    gate.opened.set()
    outcomes = Counter(await asyncio.gather(*asked))
    assert outcomes == {(200, "ok"): 22, (503, "pending request queue full\n"): 4}
    assert gate.most == 2
    assert Counter(code for code, _ in observed) == {200: 22, 503: 4}
    assert all(latency_s >= 0 for _, latency_s in observed)


async def test_queued_and_proxied_requests_are_counted_and_probes_are_not(
    upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession, until: Until
) -> None:
    gate, now_s = Gate(), 100.0
    proxy = await queue_proxy(await upstream(gate), container_concurrency=1, clock=lambda: now_s)

    async def ask(**headers: str) -> None:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        async with client.get(f"http://{proxy.address}/", headers=sent) as answer:
            await answer.read()

    asked = [asyncio.create_task(ask()) for _ in range(3)]
    asked.append(asyncio.create_task(ask(K_Proxy_Request="activator")))
    asked.append(asyncio.create_task(ask(K_Proxy_Request="other")))
    await until(lambda: proxy.in_flight == 5)
    await ask(User_Agent="kube-probe/1.30", K_Network_Probe="queue")
    now_s = 101.0
    report = proxy.report(now_s)
    assert (report.concurrency, report.proxied_concurrency) == (5, 1)
    assert (report.requests, report.proxied_requests) == (5, 1)
    gate.opened.set()
    await asyncio.gather(*asked)
    now_s = 102.0
    assert proxy.report(now_s).concurrency == 0


@pytest.mark.parametrize(
    ("headers", "ready", "status", "text"),
    [
        ({"User-Agent": "kube-probe/1.30", "K-Network-Probe": "queue"}, True, 200, "queue"),
        ({"User-Agent": "kube-probe/1.30", "K-Network-Probe": "queue"}, False, 503, ""),
        ({"User-Agent": "Knative-Activator-Probe", "K-Network-Probe": "queue"}, True, 200, "queue"),
        (
            {"User-Agent": "Knative-Autoscaling-Probe", "K-Network-Probe": "x"},
            True,
            400,
            'unexpected probe header value: "x"\n',
        ),
        ({"K-Kubelet-Probe": "queue"}, True, 400, 'unexpected probe header value: ""\n'),
        ({"K-Network-Probe": "probe", "K-Network-Hash": "abc"}, False, 200, ""),
        ({"K-Network-Probe": "probe"}, True, 400, 'a probe request must contain a non-empty "K-Network-Hash" header\n'),
        ({"K-Network-Probe": "queue"}, True, 200, "from the process"),
    ],
)
async def test_probes(
    headers: dict[str, str],
    ready: bool,
    status: int,
    text: str,
    upstream: Start,
    queue_proxy: Start,
    client: aiohttp.ClientSession,
) -> None:
    async def process(request: web.BaseRequest) -> web.Response:
        return web.Response(text="from the process")

    proxy = await queue_proxy(await upstream(process), ready=lambda: ready)
    async with client.get(f"http://{proxy.address}/healthz", headers=headers) as answer:
        assert (answer.status, await answer.text()) == (status, text)
        assert answer.headers.get("K-Network-Hash") == headers.get("K-Network-Hash")


async def test_headers_between_knatives_parts_are_rewritten(
    upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession
) -> None:
    proxy = await queue_proxy(await upstream(seen_headers))
    sent = {
        "Host": "10.0.0.1:8012",
        "K-Original-Host": "demo.default.svc",
        "Knative-Serving-Revision": "demo-00001",
        "Knative-Serving-Namespace": "default",
        "Knative-Serving-Tag": "blue",
        "K-Proxy-Request": "activator",
    }
    async with client.get(f"http://{proxy.address}/", headers=sent) as answer:
        seen = json.loads(await answer.text())
    assert seen["Host"] == "demo.default.svc"
    assert (seen["Knative-Serving-Tag"], seen["K-Proxy-Request"]) == ("blue", "activator")
    assert not {"K-Original-Host", "Knative-Serving-Revision", "Knative-Serving-Namespace"} & set(seen)


async def test_a_draining_replica_fails_probes_but_serves_until_it_is_quiet(
    upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession, until: Until
) -> None:
    gate = Gate()
    proxy = await queue_proxy(await upstream(gate))

    async def ask() -> str:
        async with client.get(f"http://{proxy.address}/") as answer:
            return await answer.text()

    first = asyncio.create_task(ask())
    await until(lambda: gate.inside == 1)
    draining = asyncio.create_task(proxy.drain(0.05))
    await until(lambda: proxy.draining)
    probe = {"User-Agent": "kube-probe/1.30", "K-Network-Probe": "queue"}
    async with client.get(f"http://{proxy.address}/", headers=probe) as answer:
        assert (answer.status, await answer.text()) == (503, "shutting down\n")
    async with client.get(f"http://{proxy.address}/", headers={"K-Network-Probe": "probe"}) as answer:
        assert (answer.status, await answer.text()) == (503, "shutting down\n")
    second = asyncio.create_task(ask())
    await until(lambda: gate.inside == 2)
    done, _ = await asyncio.wait([draining], timeout=0.3)
    assert not done  # long quiet, but two are still inside
    gate.opened.set()
    assert await asyncio.gather(first, second) == ["ok", "ok"]
    await asyncio.wait_for(draining, 20)


async def test_each_request_restarts_the_quiet_time(
    upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession
) -> None:
    gate = Gate()
    gate.opened.set()
    proxy = await queue_proxy(await upstream(gate))
    draining = asyncio.create_task(proxy.drain(1.5))
    for _ in range(9):
        await asyncio.sleep(0.2)  # longer than the quiet time in all, much less each
        async with client.get(f"http://{proxy.address}/") as answer:
            assert answer.status == 200
        assert not draining.done()
    await asyncio.wait_for(draining, 20)


async def test_closing_ends_what_runs_and_leaves_nothing_listening(
    upstream: Start, queue_proxy: Start, client: aiohttp.ClientSession, connect: Start, until: Until
) -> None:
    gate, streaming = Gate(), asyncio.Event()

    async def process(request: web.BaseRequest) -> web.StreamResponse:
        if request.raw_path == "/held":
            return await gate(request)
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun")
        streaming.set()
        await asyncio.sleep(60)
        return response

    proxy = await queue_proxy(await upstream(process))
    idle_reader, _ = await connect(proxy.address)
    held = asyncio.create_task(client.get(f"http://{proxy.address}/held").__aenter__())
    async with client.get(f"http://{proxy.address}/stream") as stream:
        assert await stream.content.readexactly(5) == b"begun"
        await until(lambda: gate.inside == 1 and proxy.in_flight == 2)
        await asyncio.wait_for(proxy.close(), 20)
        with pytest.raises(aiohttp.ClientPayloadError):
            await stream.content.read()
    answer = await held
    assert (answer.status, await answer.text()) == (503, "the replica demo-00001-abcde has ended; try again\n")
    answer.release()
    assert await idle_reader.read() == b""
    with pytest.raises(ConnectionRefusedError):
        await connect(proxy.address)
    assert proxy.in_flight == 0
