"""An ASGI application asked without a socket, as uvicorn would ask it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from tools.fuzzing.door import Violation
from tools.fuzzing.http_text import Request

App = Callable[[Any, Any, Any], Awaitable[None]]
CHUNK_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Reply:
    """Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


async def ask(app: App, request: Request) -> Reply | None:
    """The whole reply; None where uvicorn itself would refuse the request, or nobody is there to read one.

    A body that is shorter than its Content-Length ends as a client that has gone."""
    if not request.method.isalpha() or not request.target.startswith("/"):
        return None
    length = next((value for name, value in request.headers if name.lower() == "content-length"), "")
    announced = int(length) if length.isascii() and length.isdecimal() and len(length) < 19 else len(request.body)
    body, whole = request.body[:announced], announced <= len(request.body)
    arriving = [body[at : at + CHUNK_BYTES] for at in range(0, len(body), CHUNK_BYTES)] or [b""]
    answered = asyncio.Event()
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if arriving:
            part = arriving.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(arriving) or not whole}
        if whole:
            await answered.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            answered.set()

    await app(_scope(request), receive, send)
    if not sent:
        if whole:
            raise Violation("crash", "the application ended without an answer")
        return None
    return _reply(sent)


def _scope(request: Request) -> dict[str, Any]:
    path, _, query = request.target.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8080),
        "client": ("127.0.0.1", 50000),
        "scheme": "http",
        "method": request.method.upper(),
        "root_path": "",
        "path": unquote(path),
        "raw_path": path.encode("latin-1", "replace"),
        "query_string": query.encode("latin-1", "replace"),
        "headers": [
            (name.lower().encode("latin-1", "replace"), value.encode("latin-1", "replace"))
            for name, value in request.headers
        ],
        "state": {},
    }


def _reply(sent: list[MutableMapping[str, Any]]) -> Reply:
    starts = [message for message in sent if message["type"] == "http.response.start"]
    if len(starts) != 1 or sent[0] is not starts[0]:
        raise Violation("crash", f"the application sent {[message['type'] for message in sent]}")
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in starts[0]["headers"]}
    body = b"".join(bytes(message.get("body", b"")) for message in sent[1:])
    return Reply(starts[0]["status"], headers, body)
