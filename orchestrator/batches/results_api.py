"""The results service over HTTP: events in, output lines out.

    POST /                             events of type result or cancel      202 after the commit
    POST /dead-letters                 any event: what the broker gave up   202 after the commit
    GET /batches                       {"batches": [{batch, completed, failed, cancelled, dead_letters, cancelling}]}
    GET /batches/ID                    one of these
    GET /batches/ID/results            output lines; ?after=N&limit=1000&wait_s=20, header x-next: the next N
    GET /batches/ID/dead-letters       JSON lines, in the same way
    DELETE /batches/ID                 204
    GET /healthz, /readyz, /metrics

An error is {"error": text} with a status that tells a broker whether to try again: 507 when there is no room.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from knative.errors import KnativeError, NotFound
from knative.eventing.event import CloudEvent, InvalidEvent
from knative.eventing.http_binding import EventTooLarge, Limits, parse
from orchestrator.batches.events import CANCEL, REQUEST, RESULT, SCORE
from orchestrator.batches.group_commit import GroupCommit
from orchestrator.batches.lines import OutputLineError, error_output, parse_output
from orchestrator.batches.results_store import Cancellation, DeadLetter, Item, Result, ResultsStore

LIMITS = Limits()
PAGE_LINES_MAX = 10_000
WAIT_S_MAX = 60.0
RETRY_AFTER_S = 5
NDJSON = "application/x-ndjson"
UNDELIVERABLE = "undeliverable"  # the code of a request that the broker gave up

Number = TypeVar("Number", int, float)
Page = tuple[list[bytes], int]


class Metrics:
    """What Prometheus sees of one service."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._results = self._counter("stagecraft_batch_results", "Results taken in", ["outcome"])
        self._repeated = self._counter("stagecraft_batch_repeated_events", "Events that had come before", [])
        self._dead_letters = self._counter("stagecraft_batch_dead_letters", "Events that the broker gave up", [])
        self._refused = self._counter("stagecraft_batch_refused_events", "Requests with events refused", ["status"])
        self.waiting = Gauge("stagecraft_batch_readers", "Readers that wait for results", registry=self.registry)

    def taken(self, items: Sequence[Item], is_new: Sequence[bool]) -> None:
        for item, new in zip(items, is_new, strict=True):
            if not new:
                self._repeated.inc()
            elif isinstance(item, Result):
                self._results.labels(item.kind).inc()
            elif isinstance(item, DeadLetter):
                self._dead_letters.inc()

    def refused(self, status: int) -> None:
        self._refused.labels(str(status)).inc()

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)


def results_app(store: GroupCommit, metrics: Metrics | None = None) -> Starlette:
    """The application over an opened store, which the caller closes."""
    measured = metrics or Metrics()

    async def take(request: Request, items_of: Callable[[CloudEvent], list[Item]]) -> Response:
        try:
            events = parse(dict(request.headers), await _body(request))
            items = [item for event in events for item in items_of(event)]
            measured.taken(items, await store.add(items))
        except KnativeError as error:
            measured.refused(error.status)
            raise
        return Response(status_code=202)

    async def page(request: Request, read: Callable[[str, int, int], Awaitable[Page]]) -> Response:
        after = _query(request, "after", 0, 2**62)
        limit = max(1, _query(request, "limit", 1000, PAGE_LINES_MAX))
        lines, last = await read(request.path_params["batch"], after, limit)
        body = b"".join(line + b"\n" for line in lines)
        return Response(body, media_type=NDJSON, headers={"x-next": str(last)})

    async def events(request: Request) -> Response:
        return await take(request, lambda event: [item_of(event)])

    async def dead_letters(request: Request) -> Response:
        return await take(request, items_of_dead_letter)

    async def results(request: Request) -> Response:
        wait_s = _query(request, "wait_s", 0.0, WAIT_S_MAX)
        with measured.waiting.track_inprogress():
            return await page(request, lambda batch, after, limit: store.page(batch, after, limit, wait_s))

    async def dead(request: Request) -> Response:
        def read(batch: str, after: int, limit: int) -> Awaitable[Page]:
            return store.call(lambda file: file.dead_letters(batch, after, limit))

        return await page(request, read)

    async def batches(request: Request) -> Response:
        return JSONResponse({"batches": await store.call(ResultsStore.batches)})

    async def batch(request: Request) -> Response:
        name = request.path_params["batch"]
        counts = await store.call(lambda file: file.counts(name))
        if counts is None:
            raise NotFound(f"nothing of batch {name} has come yet; check its id")
        return JSONResponse(counts)

    async def delete(request: Request) -> Response:
        name = request.path_params["batch"]
        while await store.call(lambda file: file.delete_some(name)):
            pass
        return Response(status_code=204)

    async def health(request: Request) -> Response:
        return Response("ok")

    async def show_metrics(request: Request) -> Response:
        return Response(generate_latest(measured.registry), media_type="text/plain; version=0.0.4")

    return Starlette(
        routes=[
            Route("/", events, methods=["POST"]),
            Route("/dead-letters", dead_letters, methods=["POST"]),
            Route("/batches", batches),
            Route("/batches/{batch}", batch),
            Route("/batches/{batch}", delete, methods=["DELETE"]),
            Route("/batches/{batch}/results", results),
            Route("/batches/{batch}/dead-letters", dead),
            Route("/healthz", health),
            Route("/readyz", health),
            Route("/metrics", show_metrics),
        ],
        exception_handlers={KnativeError: _on_error, ClientDisconnect: _on_disconnect},
    )


def item_of(event: CloudEvent) -> Item:
    """Raises InvalidEvent for what is neither a result nor a cancellation."""
    batch = event.attributes.get("batch", "")
    if not batch:
        raise InvalidEvent(f"event {event.id} has no extension batch, so nobody could ask for it")
    if event.type == CANCEL:
        return Cancellation(batch)
    if event.type != RESULT:
        raise InvalidEvent(f"event {event.id} has type {event.type[:80]}; this service takes {RESULT} and {CANCEL}")
    try:
        outcome = parse_output(event.data or b"")
    except OutputLineError as error:
        raise InvalidEvent(f"event {event.id}: {error}") from None
    if event.attributes.get("customid", outcome.custom_id) != outcome.custom_id:
        raise InvalidEvent(f"event {event.id}: customid is not the custom_id of its data, {outcome.custom_id!r}")
    # one line in the output, whatever space the JSON has
    return Result(batch, outcome.custom_id, outcome.kind, (event.data or b"").replace(b"\r", b" ").replace(b"\n", b" "))


def items_of_dead_letter(event: CloudEvent) -> list[Item]:
    """The dead letter, and the result of its request: the one that was in it, or a line that says why there is none.

    So nobody waits for ever for a request that the broker has given up."""
    batch, custom_id = event.attributes.get("batch", ""), event.attributes.get("customid", "")
    facts = _facts(event)
    items: list[Item] = [DeadLetter(batch, f"{event.source}\n{event.id}", facts, event.data or b"")]
    if event.type == RESULT:
        with suppress(InvalidEvent):  # then it was given up for a reason
            items.append(item_of(event))
    elif event.type in (REQUEST, SCORE) and batch and custom_id:
        message = f"The broker gave this request up: {facts['error_dest']} answered {facts['error_code']}."
        if facts["error_data"]:
            message += f" {facts['error_data']}"
        items.append(Result(batch, custom_id, "failed", error_output(event.id, custom_id, UNDELIVERABLE, message)))
    return items


def _facts(event: CloudEvent) -> dict[str, Any]:
    """What people want to know of a dead letter; error_* are Knative's extensions."""
    attributes = event.attributes
    return {
        "custom_id": attributes.get("customid"),
        "type": event.type,
        "source": event.source,
        "id": event.id,
        "error_code": attributes.get("knativeerrorcode", "nothing that is known"),
        "error_dest": attributes.get("knativeerrordest", "its subscriber"),
        "error_data": _decoded(attributes.get("knativeerrordata", "")),
    }


def _decoded(data: str) -> str:
    """The body of the last answer, which Knative gives in base64 and cuts at 1,024 characters of that."""
    try:
        text = base64.b64decode(data[: len(data) // 4 * 4], validate=True).decode(errors="replace")
    except (binascii.Error, ValueError):
        text = data
    return " ".join(text.split())


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LIMITS.body_bytes:
            raise EventTooLarge(f"the body is over the limit of {LIMITS.body_bytes} bytes; send fewer events at once")
    return bytes(body)


def _query(request: Request, name: str, default: Number, most: Number) -> Number:
    """A number that is not negative, at most `most`. Raises InvalidEvent (400)."""
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = type(default)(text)
    except ValueError:
        value = type(default)(-1)
    if not value >= 0:
        raise InvalidEvent(f"{name} must be a number of at least 0, got {text[:40]!r}")
    return min(value, most)


async def _on_error(request: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, KnativeError) else 500
    headers: Mapping[str, str] = {"retry-after": str(RETRY_AFTER_S)} if status in (503, 507) else {}
    return JSONResponse({"error": str(error)}, status, headers)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it
