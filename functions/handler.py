"""HTTP to events and back: the only module of a stage that knows about requests and status codes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
from collections.abc import Mapping

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from functions import metrics
from functions.contract import events
from functions.contract.errors import EventTooLarge, InvalidEvent, StageError
from functions.contract.events import Event
from functions.service import TAKEN_TYPES, StageService

_KNOWN_TYPES = frozenset(TAKEN_TYPES)
_QUEUE_PROXY_PORT = 8012  # pkg/networking/constants.go
# addresses for documentation (RFC 5737, RFC 3849): nobody has them, so the default route is chosen for them
_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


class Handler:
    """Answers every request of a stage's process: events by POST, health and metrics by GET."""

    def __init__(self, service: StageService) -> None:
        self._service = service

    async def __call__(self, request: Request) -> Response:
        self._service.start()  # in this process, which need not be the one that imported the function
        if request.method == "POST":
            return await self._event(request)
        if request.method not in ("GET", "HEAD"):
            return JSONResponse({"error": f"{request.method} is not supported; POST an event"}, 405)
        return self._page(request.url.path)

    def _page(self, path: str) -> Response:
        if path == "/healthz":
            return JSONResponse({"status": "alive"})
        if path == "/readyz":
            return self._readiness()
        if path == "/metrics":
            return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
        return JSONResponse({"error": f"no page {path}; there are /healthz, /readyz and /metrics"}, 404)

    def _readiness(self) -> Response:
        if self._service.failure is not None:
            return JSONResponse({"error": self._service.failure}, 500)
        if not self._service.ready:
            return JSONResponse({"status": "loading"}, 503)
        return JSONResponse({"status": "ready", "blocks": str(self._service.settings.blocks)})

    async def _event(self, request: Request) -> Response:
        replica = replica_address(self._service.settings.replica, request)
        kind = request.headers.get("ce-type", "")
        kind = kind if kind in _KNOWN_TYPES else "unknown"  # a label must not grow with what people send
        event = None
        try:
            body = await _read_body(request, self._service.settings.body_bytes_max)
            event = events.from_http_request(request.headers, body)
            reply, status = await self._service.answer(event, replica, request.url.path), 200
            metrics.EVENTS.labels(kind, "ok").inc()
        except StageError as error:
            reply, status = _error_event(error, event, replica), error.status
            metrics.EVENTS.labels(kind, error.code).inc()
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        if reply is None:
            return Response()  # to a broker: done, and there is no event to go on with
        headers, data = events.to_http(reply)
        metrics.BODY_BYTES.labels("out").inc(len(data))
        return Response(bytes(data), status, _with_retry(headers, status))


async def _read_body(request: Request, bytes_max: int) -> bytearray:
    """The whole body, refused as soon as it is known to be too large. Raises EventTooLarge, InvalidEvent."""
    announced = request.headers.get("content-length")
    if announced is not None and announced.isdecimal() and int(announced) > bytes_max:
        raise EventTooLarge(f"the event has {announced} bytes, this stage takes {bytes_max} (STAGE_BODY_BYTES_MAX)")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > bytes_max:
            raise EventTooLarge(f"the event is over {bytes_max} bytes (STAGE_BODY_BYTES_MAX)")
    if not body and request.headers.get("ce-type") != events.WAKE and "ce-dataref" not in request.headers:
        raise InvalidEvent("the event has no data")
    metrics.BODY_BYTES.labels("in").inc(len(body))
    return body


def _error_event(error: StageError, event: Event | None, replica: str) -> Event:
    identity = f"{event.id}.reply" if event else "unread.reply"
    data = json.dumps(error.to_json()).encode()
    return Event(events.ERROR, f"/stagecraft/{replica}", identity, events.JSON, data, {"replica": replica})


def _with_retry(headers: Mapping[str, str], status: int) -> dict[str, str]:
    return {**headers, "retry-after": "1"} if status in (429, 503) else dict(headers)


def replica_address(given: str, request: Request) -> str:
    """HOST:PORT by which clients reach this very replica: what was set, else the queue-proxy of our pod, else the
    socket that listens. In a pod that socket is of no use: queue-proxy speaks to it by 127.0.0.1."""
    if given:
        return given
    if "K_REVISION" in os.environ and (pod := _pod_ip()) is not None:
        return _joined(pod, _QUEUE_PROXY_PORT)
    host, port = request.scope.get("server") or ("127.0.0.1", 0)
    return _joined(host, port)


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
