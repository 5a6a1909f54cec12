"""Two stages whose replicas come and go, and what tests do with them.

In front of each stage process stands a small server that behaves as Knative's queue-proxy does towards clients, and in
front of a stage's replicas another that behaves as its service does.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import httpx
import pytest
from aiohttp import web

from functions.contract import events
from functions.contract.sampling import SamplingParams
from orchestrator.chain import Chain
from orchestrator.generation import GenerationRequest

NEW_TOKENS = 20
LONG = 48
HALVES = ["0:2", "2:4"]
TIMEOUT_S = 60  # only reached by what would hang for ever


class Door(ABC):
    """An HTTP server that passes events on. `lanes` counts the steps that came, by lane; `kinds` events by type."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.lanes: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.targets: list[str] = []  # as the request line has them
        self.address = ""
        self._session = session
        self._runner = web.AppRunner(_application(self._answer), access_log=None, shutdown_timeout=0)

    async def open(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.address = f"{host}:{port}"

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        if request.method == "GET":
            return self._probe(request)
        body = await request.read()
        self.kinds[request.headers["ce-type"]] += 1
        self.targets.append(request.raw_path)
        if request.headers["ce-type"] == events.STEP:
            self.lanes[request.headers["ce-lane"]] += 1
        return await self._event(request, body)

    def _probe(self, request: web.Request) -> web.Response:
        """The answer to a GET, which only replicas get."""
        return web.Response(status=405)

    @abstractmethod
    async def _event(self, request: web.Request, body: bytes) -> web.Response:
        """The answer to an event."""

    async def _pass_on(self, url: str, request: web.Request, body: bytes) -> web.Response:
        async with self._session.post(url, data=body, headers=ours(request.headers)) as reply:
            return web.Response(body=await reply.read(), status=reply.status, headers=ours(reply.headers))


def _application(answer: Any) -> web.Application:
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", answer)
    return app


def ours(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower().startswith(("ce-", "content-type"))}


class Replica(Door):
    """A stage process behind its queue-proxy."""

    stage_url = ""
    draining = False
    full = False
    step_takes_s = 0.0
    stopped: asyncio.Event | None = None  # steps wait for it
    refuses = ""  # events of this type
    on_export: asyncio.Event | None = None  # exports wait for it

    def _probe(self, request: web.Request) -> web.Response:
        assert request.headers["K-Network-Probe"] == "queue"
        assert request.headers["User-Agent"].startswith("Knative-Activator-Probe")
        return web.Response(text="shutting down\n", status=503) if self.draining else web.Response(text="queue")

    async def _event(self, request: web.Request, body: bytes) -> web.Response:
        if self.full or request.headers["ce-type"] == self.refuses:
            return web.Response(text="pending request queue full\n", status=503)
        if request.headers["ce-type"] == events.EXPORT and self.on_export is not None:
            await self.on_export.wait()
        if request.headers["ce-type"] == events.STEP:
            await asyncio.sleep(self.step_takes_s)
            if self.stopped is not None:
                await self.stopped.wait()
        return await self._pass_on(self.stage_url, request, body)

    async def holds_nothing(self) -> bool:
        """By the stage's own count of its sequences."""
        async with httpx.AsyncClient() as client:
            return "stagecraft_stage_sequences 0.0" in (await client.get(f"{self.stage_url}/metrics")).text


class Service(Door):
    """A stage's service URL: the replicas in turn, without those that drain."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        super().__init__(session)
        self.replicas: list[Replica] = []
        self.before: Callable[[str], Any] | None = None  # called with each event's type; may answer itself
        self._turn = itertools.count()

    async def _event(self, request: web.Request, body: bytes) -> web.Response:
        if self.before is not None and (answer := await self.before(request.headers["ce-type"])) is not None:
            return answer  # type: ignore[no-any-return]  # Any: see `before`
        able = [replica for replica in self.replicas if not replica.draining]
        replica = able[next(self._turn) % len(able)]
        return await self._pass_on(f"http://{replica.address}/", request, body)


class Fleet:
    """Two stages with services and replicas."""

    def __init__(self, session: aiohttp.ClientSession, start_stages: Any) -> None:
        self.services = [Service(session) for _ in HALVES]
        self.doors: list[Door] = []
        self.architecture = "llama"
        self._session = session
        self._start_stages = start_stages

    @property
    def urls(self) -> list[str]:
        return [f"http://{service.address}" for service in self.services]

    async def add(self, stage: int, **environment: str) -> Replica:
        replica = Replica(self._session)
        await self._open(replica)
        environment = {"STAGE_INDEX": str(stage), "STAGE_COUNT": str(len(HALVES)), **environment}
        started = self._start_stages(self.architecture, [HALVES[stage]], STAGE_REPLICA=replica.address, **environment)
        replica.stage_url = started.urls[0]
        self.services[stage].replicas.append(replica)
        return replica

    async def start(self) -> None:
        for service in self.services:
            await self._open(service)

    async def _open(self, door: Door) -> None:
        await door.open()
        self.doors.append(door)


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(TIMEOUT_S * 100):
        result = condition()
        if await result if inspect.isawaitable(result) else result:
            return
        await asyncio.sleep(0.01)
    pytest.fail("what was waited for does not come")


async def disturbed(chain: Chain, prompt: list[int], disturb: Callable[[], Any]) -> list[int]:
    """A long answer during which `disturb` is called as the 5th token arrives."""
    tokens: list[int] = []
    async with asyncio.timeout(TIMEOUT_S):
        async for token in chain.generate(GenerationRequest(tuple(prompt), LONG)):
            tokens.append(token.id)
            if len(tokens) == 5:
                await disturb()
    return tokens


def used(replicas: list[Replica]) -> Replica:
    """The one replica that the only lane so far goes to."""
    (replica,) = (replica for replica in replicas if replica.lanes)
    return replica


def page_of(stage_url: str) -> str:
    return httpx.get(f"{stage_url}/metrics").text


def sample(page: str, name: str) -> float:
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"{name} "))


async def together(
    chain: Chain, prompts: Sequence[Sequence[int]], disturb: Callable[[], Any], params: SamplingParams | None = None
) -> list[list[int]]:
    """Long answers to several prompts, during which `disturb` is called once as some sequence gets its 5th token."""
    disturbed: list[int] = []

    async def one(prompt: Sequence[int]) -> list[int]:
        tokens: list[int] = []
        async for token in chain.generate(GenerationRequest(tuple(prompt), LONG, params or SamplingParams())):
            tokens.append(token.id)
            if len(tokens) == 5 and not disturbed:
                disturbed.append(len(tokens))
                await disturb()
        return tokens

    async with asyncio.timeout(TIMEOUT_S):
        return await asyncio.gather(*(one(prompt) for prompt in prompts))
