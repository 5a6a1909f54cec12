"""The soak's client: what it repeats, what it counts, and what it calls lost or hung."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.faults.client import Client, Expected, Line, Outcome

EXPECTED = Expected((5, 6, 7), "abc")
Answer = Callable[[web.StreamResponse], Awaitable[None]]


class Scene:
    """A server that gives the answers in turn, each as server-sent events, and a client that is told of the epoch."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.epoch = 0
        self.tokens: list[int] = []
        self.url = ""

    async def reply(self, request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        await self.answers.pop(0)(stream)
        return stream

    async def ask(self, graceful_ends: frozenset[int] = frozenset(), patience_s: float = 60) -> Outcome:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            client = Client(session, self.url, lambda: self.epoch, self.tokens.append, graceful_ends, patience_s)
            return await client.run({"stream": True}, "key", EXPECTED, Line())

    async def breaks(self, stream: web.StreamResponse) -> None:
        """Two tokens; then the connection goes with its orchestrator, and another one serves."""
        await send(stream, 0, 2)
        self.epoch += 2
        assert stream._req is not None
        assert stream._req.transport is not None
        stream._req.transport.abort()


async def send(stream: web.StreamResponse, start: int, end: int) -> None:
    for at in range(start, end):
        finish = "length" if at == 2 else None
        choice = {"text": "abc"[at], "token_ids": [5 + at], "finish_reason": finish}
        await stream.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())


async def whole(stream: web.StreamResponse) -> None:
    await send(stream, 0, 3)
    await stream.write(b"data: [DONE]\n\n")


async def silent(stream: web.StreamResponse) -> None:
    await send(stream, 0, 1)
    await asyncio.sleep(60)


async def told(stream: web.StreamResponse) -> None:
    await send(stream, 0, 1)
    error: dict[str, Any] = {"error": {"code": "shutting_down", "message": "send it again"}}
    await stream.write(f"data: {json.dumps(error)}\n\n".encode())


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    made = Scene()
    app = web.Application()
    app.router.add_post("/openai/v1/completions", made.reply)
    async with TestServer(app) as server:
        made.url = str(server.make_url("")).rstrip("/")
        yield made


async def test_tokens_that_come_again_after_a_loss_are_not_counted_again(scene: Scene) -> None:
    scene.answers = [scene.breaks, whole]
    outcome = await scene.ask()
    assert (outcome.verdict, outcome.attempts) == ("right", 2)
    assert sum(scene.tokens) == 3


async def test_a_stream_that_breaks_without_a_loss_is_lost(scene: Scene) -> None:
    async def breaks_alone(stream: web.StreamResponse) -> None:
        await scene.breaks(stream)
        scene.epoch = 0

    scene.answers = [breaks_alone]
    assert (await scene.ask()).verdict == "lost"


async def test_a_graceful_end_has_to_tell_its_streams(scene: Scene) -> None:
    scene.answers = [scene.breaks]
    outcome = await scene.ask(graceful_ends=frozenset({0}))
    assert outcome.verdict == "lost"
    assert "an error event was due" in outcome.note

    async def ends(stream: web.StreamResponse) -> None:
        scene.epoch += 2
        await told(stream)

    scene.epoch, scene.answers = 0, [ends, whole]
    assert (await scene.ask(graceful_ends=frozenset({0}))).verdict == "right"


async def test_a_stream_in_which_nothing_comes_any_more_hangs(scene: Scene) -> None:
    scene.answers = [silent]
    outcome = await scene.ask(patience_s=0.5)
    assert outcome.verdict == "hung"
    assert "nothing for 0.5 s" in outcome.note
