"""The short way of events into a stage gives the answers of the way through Functions Framework."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from functions_framework.aio import create_asgi_app_from_module
from starlette.requests import Request

from functions.contract import events
from functions.contract.errors import InvalidEvent, KvExhausted, NotReady
from functions.contract.events import Event
from functions.contract.scoring import RESULT
from functions.handler import Handler
from functions.server import _EventsFirst

BYTES_MAX = 1 << 20
LARGE = bytes(range(256)) * 1024


class Stand:
    """Answers in the place of a StageService: what the event's `wanted` says."""

    settings = SimpleNamespace(replica="10.0.0.1:8012", body_bytes_max=BYTES_MAX, blocks="0:2")
    ready, failure, leaving = True, None, False

    def start(self) -> None:
        """There is nothing to load."""

    async def answer(self, event: Event, replica: str, path: str, gone: object) -> Event | None:
        wanted = event.extensions.get("wanted")
        if wanted == "nothing":
            return None
        if wanted in ERRORS:
            raise ERRORS[wanted]
        extensions = {"replica": replica, "computeus": "5"}
        rest = [b"more", LARGE]
        return Event(events.STEPPED, f"/s{path}", f"{event.id}.reply", events.TENSORS, event.data, extensions, rest)


ERRORS = {"invalid": InvalidEvent("no"), "exhausted": KvExhausted("full"), "not ready": NotReady("not yet")}


@pytest.fixture
def apps() -> tuple[Any, Any]:
    """(events first, the framework alone)."""
    handler = Handler(cast(Any, Stand()))

    async def stage(request: Request) -> Any:
        return await handler(request)

    framework = create_asgi_app_from_module("stage", __file__, "http", SimpleNamespace(stage=stage), None)
    return _EventsFirst(handler, framework), framework


def asked(**changed: str | None) -> dict[str, str]:
    headers = {**events.to_http(Event(events.STEP, "/me", "a b", events.TENSORS, b""))[0], **changed}
    return {name.replace("_", "-"): value for name, value in headers.items() if value is not None}


async def in_chunks() -> AsyncIterator[bytes]:
    for at in range(0, len(LARGE), 1000):
        yield LARGE[at : at + 1000]


async def too_much() -> AsyncIterator[bytes]:
    for _ in range(BYTES_MAX // len(LARGE) + 1):
        yield LARGE


REQUESTS: dict[str, tuple[str, str, dict[str, str], Any]] = {
    "a step": ("POST", "/", asked(), lambda: b"body"),
    "on another path": ("POST", "/a%20b/robots.txt?x=1", asked(), lambda: b"body"),
    "large": ("POST", "/", asked(), lambda: LARGE),
    "in chunks": ("POST", "/", asked(), in_chunks),
    "in chunks with a length": ("POST", "/", {**asked(), "content-length": str(len(LARGE))}, in_chunks),
    "too large": ("POST", "/", asked(), lambda: bytes(BYTES_MAX + 1)),
    "too large in chunks": ("POST", "/", asked(), too_much),
    "no data": ("POST", "/", asked(), lambda: b""),
    "a wake without data": ("POST", "/", asked(**{"ce-type": events.WAKE}), lambda: b""),
    "no event": ("POST", "/", {}, lambda: b"{}"),
    "an unknown type": ("POST", "/", asked(**{"ce-type": "x"}), lambda: b"{}"),
    "nothing to answer": ("POST", "/", asked(**{"ce-type": RESULT, "ce-wanted": "nothing"}), lambda: b"{}"),
    **{name: ("POST", "/", asked(**{"ce-wanted": name.replace(" ", "%20")}), lambda: b"{}") for name in ERRORS},
    **{path: ("GET", path, {}, lambda: b"") for path in ("/healthz", "/readyz", "/robots.txt", "/nowhere")},
    "another method": ("DELETE", "/", {}, lambda: b""),
    "HEAD": ("HEAD", "/healthz", {}, lambda: b""),
}


@pytest.mark.parametrize(("method", "path", "headers", "body"), REQUESTS.values(), ids=REQUESTS)
async def test_both_ways_give_the_same_answer(
    apps: tuple[Any, Any], method: str, path: str, headers: dict[str, str], body: Any
) -> None:
    answers = []
    for app in apps:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://stage:80") as client:
            got = await client.request(method, path, headers=headers, content=body())
            answers.append((got.status_code, dict(got.headers), got.content))
    assert answers[0] == answers[1]


async def test_a_reply_in_parts_is_sent_whole(apps: tuple[Any, Any]) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(apps[0]), base_url="http://stage:80") as client:
        got = await client.post("/x", headers=asked(), content=b"body")
    reply = events.from_http_request(got.headers, got.content)
    assert (reply.source, reply.id, reply.data) == ("/s/x", "a b.reply", b"body" + b"more" + LARGE)
    assert got.headers["content-length"] == str(len(got.content))


@pytest.mark.parametrize("name", ERRORS)
async def test_who_may_try_again_is_told_when(apps: tuple[Any, Any], name: str) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(apps[0]), base_url="http://stage:80") as client:
        got = await client.post("/", headers=asked(**{"ce-wanted": name.replace(" ", "%20")}), content=b"{}")
    assert got.status_code == json.loads(got.content).get("status", ERRORS[name].status)
    assert got.headers.get("retry-after") == ("1" if got.status_code in (429, 503) else None)


async def test_who_goes_while_the_body_comes_in_is_answered_499(apps: tuple[Any, Any]) -> None:
    messages = [{"type": "http.request", "body": b"ha", "more_body": True}, {"type": "http.disconnect"}]
    headers = [(name.encode(), value.encode()) for name, value in {**asked(), "content-length": "4"}.items()]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "server": ("h", 1), "query_string": b""}
    for app in apps:
        left, sent = list(messages), []

        async def receive(left: list[Any] = left) -> Any:
            await asyncio.sleep(0)
            return left.pop(0)

        async def send(message: Any, sent: list[Any] = sent) -> None:
            sent.append(message)

        await app({**scope}, receive, send)
        assert sent[0]["status"] == 499
