"""Subscribers in this process that answer as a test says, and manifests of Brokers and Triggers."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from knative.eventing.event import CloudEvent
from knative.eventing.http_binding import parse

Reaction = Callable[[CloudEvent], "web.Response | Awaitable[web.Response]"]


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    event: CloudEvent
    at_s: float


@dataclass
class Subscriber:
    """`react` gives the answer to an event, 202 by default."""

    port: int = 0
    react: Reaction = lambda _: web.Response(status=202)
    seen: list[Request] = field(default_factory=list)
    busiest: int = 0  # requests at once
    _inside: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ids(self) -> list[str]:
        return [one.event.id for one in self.seen]

    async def handle(self, request: web.Request) -> web.Response:
        (event,) = parse(request.headers, await request.read())
        self.seen.append(Request(request.path, dict(request.headers), event, time.monotonic()))
        self._inside += 1
        self.busiest = max(self.busiest, self._inside)
        try:
            answer = self.react(event)
            return await answer if inspect.isawaitable(answer) else answer
        finally:
            self._inside -= 1

    async def has(self, count: int) -> list[str]:
        """The ids of the events that came, once there are so many."""
        async with asyncio.timeout(30):
            while len(self.seen) < count:  # noqa: ASYNC110 (requests set no events)
                await asyncio.sleep(0.005)
        return self.ids


@pytest.fixture
async def subscriber() -> AsyncIterator[Callable[..., Awaitable[Subscriber]]]:
    """`await subscriber(react)` -> one that listens."""
    runners = []

    async def start(react: Reaction | None = None) -> Subscriber:
        made = Subscriber()
        if react is not None:
            made.react = react
        app = web.Application()
        app.router.add_post("/{path:.*}", made.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        made.port = runner.addresses[0][1]
        return made

    yield start
    for runner in runners:
        await runner.cleanup()


def _broker(name: str = "default", **delivery: Any) -> dict[str, Any]:
    return {
        "apiVersion": "eventing.knative.dev/v1",
        "kind": "Broker",
        "metadata": {"name": name},
        "spec": {"delivery": delivery} if delivery else {},
    }


def _trigger(
    name: str, subscriber: str | dict[str, Any], *, broker: str = "default", in_flight: int | None = None, **spec: Any
) -> dict[str, Any]:
    annotations = {} if in_flight is None else {"stagecraft.dev/max-in-flight": str(in_flight)}
    to = {"uri": subscriber} if isinstance(subscriber, str) else subscriber
    return {
        "apiVersion": "eventing.knative.dev/v1",
        "kind": "Trigger",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {"broker": broker, "subscriber": to, **spec},
    }


@pytest.fixture(scope="session")
def broker() -> Callable[..., dict[str, Any]]:
    """broker(retry=1) -> a manifest."""
    return _broker


@pytest.fixture(scope="session")
def trigger() -> Callable[..., dict[str, Any]]:
    """trigger("name", url, filter={...}, delivery={...}) -> a manifest."""
    return _trigger


@pytest.fixture
def send() -> Callable[..., Awaitable[int]]:
    """`await send(cluster, "id", type="a", extension="x")` -> the status that the Broker `default` answers."""

    async def send_one(cluster: Any, event_id: str, *, data: bytes = b"{}", **attributes: str) -> int:
        values = {"type": "test", "source": "/tests", "specversion": "1.0", "id": event_id, **attributes}
        headers = {f"ce-{name}": value for name, value in values.items()}
        headers["content-type"] = "application/json"
        request: aiohttp.ClientResponse
        async with cluster.client.post(
            f"{cluster.platform.url}/default/default", headers=headers, data=data
        ) as request:
            return request.status

    return send_one
