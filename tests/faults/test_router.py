"""The stand-in for a stage's service: whom it gives an event to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from tests.faults.relay import Answer, Relay, Upstream
from tests.faults.router import ServiceRouter
from tests.faults.wire import Message, page

EVENT = Message(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n", b"{}")


class Named(Relay):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    async def answer(self, request: Message) -> Answer:
        return page(200, self._name)


@dataclass
class Place:
    port: int
    takes_new: bool = True


class Scene:
    def __init__(self) -> None:
        self.servers = [Named("a"), Named("b")]
        self.places: list[Place] = []
        self.router = ServiceRouter(lambda: self.places)

    async def ask(self) -> str:
        return (await Upstream(self.router.port).exchange(EVENT, anew=True)).body.decode()


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene()
    for server in scene.servers:
        await server.open()
    scene.places = [Place(server.port) for server in scene.servers]
    await scene.router.open()
    yield scene
    for relay in (scene.router, *scene.servers):
        await relay.close()


async def test_replicas_take_turns(scene: Scene) -> None:
    assert [await scene.ask() for _ in range(4)] == ["a", "b", "a", "b"]


async def test_one_that_is_not_ready_is_left_out(scene: Scene) -> None:
    scene.places[0].takes_new = False
    assert [await scene.ask() for _ in range(3)] == ["b", "b", "b"]


async def test_an_event_waits_until_a_replica_is_ready(scene: Scene) -> None:
    for place in scene.places:
        place.takes_new = False
    waiting = asyncio.ensure_future(scene.ask())
    await asyncio.sleep(0.1)
    assert not waiting.done()
    scene.places[1].takes_new = True
    assert await waiting == "b"


async def test_a_replica_that_has_just_gone_is_passed_over(scene: Scene) -> None:
    await scene.servers[0].close()
    assert [await scene.ask() for _ in range(2)] == ["b", "b"]
