"""ASGI middleware: bounds request bodies while they are read, and cancels the work of clients that have gone.

Cancelling closes the generator's iterators, which frees the sequences' KV in every stage. Plain handlers would notice
a lost client only when they next write, which a waiting or non-streamed answer does not do.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from orchestrator.generation import GenerationError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
SEND = "stagecraft.send"  # in the scope: the way out that leaves aside the middlewares behind this one
ErrorBody = Callable[[str, GenerationError], dict[str, Any]]  # path, error -> JSON body


class HttpGuard:
    """Requests with a body are read whole (at most `body_bytes_max`) before the application sees them. What is nested
    deeper than `json_depth_max` is refused before anybody parses it."""

    def __init__(self, app: App, *, body_bytes_max: int, json_depth_max: int, error_body: ErrorBody) -> None:
        self._app = app
        self._body_bytes_max = body_bytes_max
        self._json_depth_max = json_depth_max
        self._error_body = error_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except GenerationError as error:
            await refuse(send, error, self._error_body(scope["path"], error))
            return
        if body is not None:
            await self._run(scope, body, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """None when the client left before the end of the body."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._body_bytes_max:
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._body_bytes_max:
                raise self._too_large()
            if not message.get("more_body", False):
                if nests_deeper(body, self._json_depth_max):
                    raise GenerationError(
                        f"the JSON of the request is nested deeper than {self._json_depth_max}",
                        status=400,
                        code="nested_too_deeply",
                    )
                return bytes(body)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        gone = asyncio.Event()
        parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if parts:
                return parts.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        scope[SEND] = send
        work = asyncio.ensure_future(self._app(scope, replay, send))
        watcher = asyncio.create_task(watch())
        try:
            await asyncio.wait((work, watcher), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                gone.set()
                work.cancel()
                await asyncio.wait((work,))
            if not work.cancelled():
                work.result()
        finally:
            watcher.cancel()
            if not work.done():  # this task itself was cancelled: the server stops
                work.cancel()
                await asyncio.wait((work,))

    def _too_large(self) -> GenerationError:
        return GenerationError(
            f"the request body is over the limit of {self._body_bytes_max} bytes", status=413, code="body_too_large"
        )


_JSON_MARKS = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[{]+|[\]}]+', re.DOTALL)


def nests_deeper(body: bytes | bytearray, depth_max: int) -> bool:
    """Whether arrays and objects in a JSON text go deeper; of anything else it may be either. Strings are passed over.

    Most bodies have fewer brackets than that in all, which is found at 4 GB/s."""
    if body.count(b"[") + body.count(b"{") <= depth_max:
        return False
    depth = 0
    for mark in _JSON_MARKS.finditer(body):
        first, count = body[mark.start()], mark.end() - mark.start()
        if first in b"[{":
            depth += count
            if depth > depth_max:
                return True
        elif first in b"]}":
            depth -= count
    return False


async def refuse(
    send: Send, error: GenerationError, content: Mapping[str, Any], more: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """Answers with an error, and `more` headers, before the request's body has been read. The connection is closed, as
    the rest of the body may still be on its way."""
    body = json.dumps(content).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *more,
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
