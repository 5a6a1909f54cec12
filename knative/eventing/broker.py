"""Where producers send events: POST /NAMESPACE/BROKER, answered 202 once they are durable.

After pkg/broker/ingress/ingress_handler.go of knative/eventing, and batched mode besides. Knative's in-memory channel
answers only when all subscribers have, and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Protocol

import structlog
from aiohttp import HttpVersion11, hdrs, web

from knative.errors import KnativeError, NotFound, Unavailable
from knative.eventing.delivery import TTL_ATTRIBUTE, entering
from knative.eventing.event import CloudEvent, InvalidEvent
from knative.eventing.http_binding import EventTooLarge, Limits, parse
from knative.network.forward import TARGET

log = structlog.get_logger()

HOST = "broker-ingress.knative-eventing"  # NAME.NAMESPACE of the service in front of all Brokers
_ARRIVED = "knativearrivaltime"
_ALLOW = {"Allow": "POST, OPTIONS"}
_WEBHOOK = {"WebHook-Allowed-Origin": "*", "WebHook-Allowed-Rate": "*"}  # CloudEvents webhooks: anyone, at any rate
_RETRY_AFTER_S = "10"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_EXAMPLE = "expected /NAMESPACE/BROKER"


class Intake(Protocol):
    """What takes events in. `accept` returns once they are durable; raises NotFound, StoreError, StoreFull."""

    def has_broker(self, namespace: str, name: str) -> bool: ...
    async def accept(self, namespace: str, name: str, events: Sequence[CloudEvent]) -> None: ...
    def answered(self, namespace: str, name: str, status: int, events: int) -> None: ...


class BrokerIngress:
    """Takes requests for all Brokers; the path says which."""

    def __init__(self, intake: Intake, limits: Limits = Limits()) -> None:
        self._intake = intake
        self._limits = limits

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        """The answer of a Broker's ingress, with the reason in words where it refuses."""
        if request.method == hdrs.METH_OPTIONS:
            return web.Response(headers=_ALLOW | _WEBHOOK)
        if request.method != hdrs.METH_POST:
            return _refusal(405, f"a broker takes events by POST, not {request.method}")
        path = (request.get(TARGET) or request.path).partition("?")[0]
        if path == "/":
            return _refusal(404, f"no broker is named; {_EXAMPLE}")
        parts = path.removesuffix("/").split("/")
        if len(parts) != 3:
            return _refusal(400, f"the path {path[:200]} names no broker; {_EXAMPLE}")
        return await self._receive(request, parts[1], parts[2])

    async def _receive(self, request: web.BaseRequest, namespace: str, name: str) -> web.Response:
        if not self._intake.has_broker(namespace, name):
            return _refusal(404, str(no_broker(namespace, name)))
        if (encoding := request.headers.get(hdrs.CONTENT_ENCODING, "identity")).lower() != "identity":
            return _refusal(
                415, f"the body is encoded in {encoding}, which subscribers would not be told: send it plain"
            )
        count = 0
        try:
            events = parse(request.headers, await self._body(request), self._limits)
            count = len(events)
            await self._intake.accept(namespace, name, arrived(events))
            response = web.Response(status=202, headers=_ALLOW)
        except InvalidEvent as error:
            response = _refusal(error.status, str(error))
        except KnativeError as error:  # NotFound: the broker has gone since
            response = _refusal(error.status, str(error))
            if error.status in (Unavailable.status, 507):
                response.headers[hdrs.RETRY_AFTER] = _RETRY_AFTER_S
        self._intake.answered(namespace, name, response.status, count)
        return response

    async def _body(self, request: web.BaseRequest) -> bytes:
        """The whole body. Raises EventTooLarge without reading on."""
        most = self._limits.body_bytes
        if (request.content_length or 0) > most:
            raise EventTooLarge(f"the body has {request.content_length} bytes, at most {most} are taken")
        if request.headers.get(hdrs.EXPECT, "") and request.version >= HttpVersion11:
            await request.writer.write(_CONTINUE)
        pieces, size_bytes = [], 0
        async for piece in request.content.iter_any():
            size_bytes += len(piece)
            if size_bytes > most:
                raise EventTooLarge(f"the body has more than {most} bytes")
            pieces.append(piece)
        return b"".join(pieces)


def arrived(events: Sequence[CloudEvent]) -> list[CloudEvent]:
    """Events as they enter a Broker: with the time, and one pass less. Raises InvalidEvent if one has none left."""
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    entered = []
    for event in events:
        inside = entering(event)
        if inside is None:
            log.warning("event_passes_used_up", event_id=event.id, event_source=event.source)
            raise InvalidEvent(f"event {event.id} has passed through brokers too often: {TTL_ATTRIBUTE} is used up")
        entered.append(inside.changed({_ARRIVED: now}))
    return entered


def no_broker(namespace: str, name: str) -> NotFound:
    return NotFound(f"there is no broker {name!r} in namespace {namespace!r}")


def _refusal(status: int, text: str) -> web.Response:
    return web.Response(status=status, headers=_ALLOW, text=f"{text}\n")
