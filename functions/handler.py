"""HTTP to events and back: the only module of a stage that knows about requests and status codes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from functions import metrics
from functions.contract import events
from functions.contract.errors import EventTooLarge, InvalidEvent, StageError, Unauthorized
from functions.contract.events import Event
from functions.contract.frames import Buffer
from functions.contract.scoring import RESULT, SCORE
from functions.contract.seals import Arriving, Seals
from functions.service import TAKEN_TYPES, StageService

_KNOWN_TYPES = frozenset(TAKEN_TYPES)
_BROKERED = frozenset((SCORE, RESULT))  # brokers add attributes on the way and have no key: not sealed, either way
_JOIN_BYTES_MAX = 64 << 10  # of a body whose parts are joined, which then takes less than to send them one by one
_PROBE = "k-network-probe"  # of a chain (orchestrator/replica_watch.py), where no queue-proxy answers it
_QUEUE_PROXY_PORT = 8012  # pkg/networking/constants.go
# addresses for documentation (RFC 5737, RFC 3849): nobody has them, so the default route is chosen for them
_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


@dataclass(frozen=True, slots=True)
class Answer:
    """What an event is answered with; an ASGI app, as every response is. Large parts of the body are sent from
    where they lie. Status 499 is for nobody: who asked is gone."""

    status: int
    headers: Sequence[tuple[bytes, bytes]] = ()
    parts: Sequence[Buffer] = ()

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return sum(map(len, self.parts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = self.size
        headers = [*self.headers, (b"content-length", b"%d" % size)]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        *others, last = self.parts if size > _JOIN_BYTES_MAX else (b"".join(self.parts),)
        for part in others:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": last, "more_body": False})


class Handler:
    """Answers every request of a stage's process: events by POST, health and metrics by GET."""

    def __init__(self, service: StageService, seals: Seals | None = None) -> None:
        self._service = service
        self._seals = seals or Seals()

    async def __call__(self, request: Request) -> Response | Answer:
        self._service.start()  # in this process, which need not be the one that imported the function
        if request.method == "POST":
            return await self.event(request.scope, request.receive)
        if request.method not in ("GET", "HEAD"):
            return JSONResponse({"error": f"{request.method} is not supported; POST an event"}, 405)
        if _PROBE in request.headers:
            self._service.probed()
        return self._page(request.url.path)

    def _page(self, path: str) -> Response:
        if path == "/healthz":
            if self._service.leaving:  # in the words of a queue-proxy: so the chain finds out where there is none
                return Response("shutting down\n", 503, media_type="text/plain")
            return JSONResponse({"status": "alive"})
        if path == "/readyz":
            return self._readiness()
        if path == "/metrics":
            return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
        return JSONResponse({"error": f"no page {path}; there are /healthz, /readyz and /metrics"}, 404)

    def _readiness(self) -> Response:
        if self._service.failure is not None:
            return JSONResponse({"error": self._service.failure}, 500)
        if self._service.leaving or not self._service.ready:
            return JSONResponse({"status": "leaving" if self._service.leaving else "loading"}, 503)
        return JSONResponse({"status": "ready", "blocks": str(self._service.settings.blocks)})

    async def event(self, scope: Scope, receive: Receive) -> Answer:
        """The answer to a POST, told by ASGI's own words: this is the hot path."""
        self._service.start()
        replica = replica_address(self._service.settings.replica, scope.get("server"))
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        kind = headers.get("ce-type", "")
        kind = kind if kind in _KNOWN_TYPES else "unknown"  # a label must not grow with what people send
        event, brokered = None, kind in _BROKERED
        try:
            self._check_head(headers, brokered)
            arriving = Arriving({} if brokered else headers)
            body = await _read_body(headers, receive, self._service.settings.body_bytes_max, arriving)
            event = events.from_lower_case(headers, body)
            reply = await self._service.answer(event, replica, scope["path"], lambda: _has_left(receive))
            status = 200
            metrics.EVENTS.labels(kind, "ok").inc()
        except StageError as error:
            reply, status = _error_event(error, event, replica), error.status
            metrics.EVENTS.labels(kind, error.code).inc()
        except _Disconnected:
            return Answer(499)
        if reply is None:
            return Answer(200)  # to a broker: done, and there is no event to go on with
        told, parts = events.to_http(reply)[0], (reply.data, *reply.rest)
        if not brokered:
            await self._seals.seal_reply(told, parts, headers)
        raw = events.raw_headers(told)
        if status in (429, 503):
            raw.append((b"retry-after", b"1"))
        answer = Answer(status, raw, parts)
        metrics.BODY_BYTES.labels("out").inc(answer.size)
        return answer

    def _check_head(self, headers: Mapping[str, str], brokered: bool) -> None:
        """What can be refused before the body is read. Raises StageError."""
        if not brokered:
            self._seals.check_request_head(headers)
        elif self._seals.signed and self._service.settings.unsigned_scores == "refuse":
            raise Unauthorized(
                "this stage takes signed events only, and those that come through a broker are not: set "
                "STAGE_UNSIGNED_SCORES=allow where only the broker can reach the stages"
            )


def _has_left(receive: Receive) -> bool:
    """Whether whoever sent a request has gone, as uvicorn notes it in what its `receive` belongs to. ASGI's own way is
    to wait for a message: a task more for each event, for what happens once in a long time."""
    return bool(getattr(getattr(receive, "__self__", None), "disconnected", False))


class _Disconnected(Exception):
    """The client has gone before its event was whole."""


async def _read_body(headers: Mapping[str, str], receive: Receive, bytes_max: int, arriving: Arriving) -> Buffer:
    """The whole body, refused as soon as it is known to be too large. Raises EventTooLarge, InvalidEvent,
    CorruptEvent, _Disconnected."""
    announced = headers.get("content-length", "")
    size = int(announced) if announced.isdecimal() else None
    if size is not None and size > bytes_max:
        raise EventTooLarge(f"the event has {size} bytes, this stage takes {bytes_max} (STAGE_BODY_BYTES_MAX)")
    chunk, more = await _next_chunk(receive)
    if more and size is not None:
        body: Buffer = await _collect(chunk, receive, size, arriving)
    else:
        body = await _stream(chunk, more, receive, bytes_max, arriving)
    arriving.check()
    if not body and headers.get("ce-type") != events.WAKE and "ce-dataref" not in headers:
        raise InvalidEvent("the event has no data")
    metrics.BODY_BYTES.labels("in").inc(len(body))
    return body


async def _collect(chunk: bytes, receive: Receive, size: int, arriving: Arriving) -> Buffer:
    """`size` bytes, each put where it stays. The memory is not filled with zeros before, as a bytearray's would be."""
    body, at, more = np.empty(size, dtype=np.uint8).data, 0, True
    while True:
        body[at : at + len(chunk)] = chunk
        arriving.add(chunk)
        at += len(chunk)
        if not more:
            return body[:at]
        chunk, more = await _next_chunk(receive)


async def _stream(chunk: bytes, more: bool, receive: Receive, bytes_max: int, arriving: Arriving) -> Buffer:
    """As many bytes as come; not as `bytes`, since torch wants what it could write to. Raises EventTooLarge."""
    body = bytearray()
    while True:
        body += chunk
        arriving.add(chunk)
        if len(body) > bytes_max:
            raise EventTooLarge(f"the event is over {bytes_max} bytes (STAGE_BODY_BYTES_MAX)")
        if not more:
            return body
        chunk, more = await _next_chunk(receive)


async def _next_chunk(receive: Receive) -> tuple[bytes, bool]:
    """(bytes, whether there are more). Raises _Disconnected."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise _Disconnected
    return message.get("body", b""), message.get("more_body", False)


def _error_event(error: StageError, event: Event | None, replica: str) -> Event:
    identity = f"{event.id}.reply" if event else "unread.reply"
    data = json.dumps(error.to_json()).encode()
    return Event(events.ERROR, f"/stagecraft/{replica}", identity, events.JSON, data, {"replica": replica})


def replica_address(given: str, server: tuple[str, int | None] | None) -> str:
    """HOST:PORT by which clients reach this very replica: what was set, else the queue-proxy of our pod, else the
    socket `server` that listens. In a pod that socket is of no use: queue-proxy speaks to it by 127.0.0.1."""
    if given:
        return given
    if "K_REVISION" in os.environ and (pod := _pod_ip()) is not None:
        return _joined(pod, _QUEUE_PROXY_PORT)
    return _joined(*(server or ("127.0.0.1", 0)))


@functools.cache
def _pod_ip() -> str | None:
    """The address of the interface of the default route; fieldRef status.podIP is not allowed by Knative's defaults."""
    for family, elsewhere in _ELSEWHERE:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))  # of a datagram socket: chooses the route and sends nothing
            return str(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return None


def _joined(host: str, port: int | None) -> str:
    return f"[{host}]:{port or 0}" if ":" in host else f"{host}:{port or 0}"
