"""POST /events: requests of batches as CloudEvents, answered with result events.

Mode `reply` answers with the result. Mode `later` answers 202 once the request lies in a file, and sends the result
to a sink (`orchestrator.batch_queue`): for channels that hold their sender until the reply.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from knative.eventing.event import CloudEvent, InvalidEvent
from knative.eventing.http_binding import parse, to_binary
from knative.eventing.store_errors import StoreError
from orchestrator.batch_requests import BatchRequest, check_known, read_cancel, read_request
from orchestrator.batch_runner import BatchRunner
from orchestrator.batches.events import CANCEL
from orchestrator.choices import Service, as_generation_error
from orchestrator.generation import GenerationError

PATH = "/events"
RETRY_AFTER_S = 5  # where an error that may heal does not say when

_log = structlog.get_logger("orchestrator")


class Queue(Protocol):
    """Where requests lie in mode `later`."""

    async def put(self, event: CloudEvent, request: BatchRequest) -> None:
        """Returns once the request is durable. Raises GenerationError and StoreError."""
        ...

    async def close(self) -> None: ...


class EventsDoor:
    """`open_queue` is given in mode `later` only."""

    def __init__(self, service: Service, open_queue: Callable[[BatchRunner], Awaitable[Queue]] | None = None) -> None:
        self.route = Route(PATH, self._answer, methods=["POST"])
        self._runner = BatchRunner(service)
        self._open_queue = open_queue
        self._queue: Queue | None = None

    async def start(self) -> None:
        """Raises StoreError where the queue's file cannot be used."""
        if self._open_queue is not None:
            self._queue = await self._open_queue(self._runner)

    async def close(self) -> None:
        if self._queue is not None:
            await self._queue.close()
        await self._runner.close()

    async def _answer(self, request: Request) -> Response:
        try:
            return await self._take(_event(request.headers, await request.body()))
        except InvalidEvent as error:
            self._runner.count("invalid")
            _log.info("event_refused", error=str(error))
            return JSONResponse({"error": str(error)}, error.status)
        except StoreError as error:
            return _later(str(error), error.status, None)
        except Exception as caught:
            told = as_generation_error(caught)
            return _later(str(told), told.status, told.retry_after_s)

    async def _take(self, event: CloudEvent) -> Response:
        check_known(event)
        if event.type == CANCEL:
            self._runner.cancel(read_cancel(event))
            return Response(status_code=202)
        request = read_request(event, time.time())
        if self._open_queue is None:
            headers, body = to_binary(await self._runner.result(request))
            return Response(body, headers=headers)
        if self._queue is None:
            raise GenerationError("the queue is being opened", status=503, code="not_ready", retry_after_s=1)
        await self._queue.put(event, request)
        return Response(status_code=202)


def _event(headers: Mapping[str, str], body: bytes) -> CloudEvent:
    events = parse(headers, body)
    if len(events) != 1:
        raise InvalidEvent(f"the batch holds {len(events)} events; send them one by one, each has an answer of its own")
    return events[0]


def _later(message: str, status: int, retry_after_s: int | None) -> Response:
    """The broker delivers again; with Retry-After it knows when, and takes nothing for broken."""
    headers = {}
    if status in (429, 503):
        headers["retry-after"] = str(retry_after_s or RETRY_AFTER_S)
    return JSONResponse({"error": message}, status, headers)
