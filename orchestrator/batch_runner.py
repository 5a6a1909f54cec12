"""Requests of batches at work: each (source, id) once at a time, however often it is delivered.

    deliveries of one request ──┬──> one generation ──> one result event for all of them
                                └──> the result of a while ago, where a broker asks again because it was cut off

A generation goes on when the connection that asked for it is gone: the broker delivers again what it got no answer to.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import structlog

from knative.eventing.event import CloudEvent
from orchestrator import metrics
from orchestrator.batch_requests import BatchRequest, answered, cancelled, is_result, question
from orchestrator.batches.lines import COMPLETIONS
from orchestrator.choices import Service, as_generation_error, collect
from orchestrator.generation import GenerationError
from orchestrator.openai_api import Origin, chat_replies, completion_replies
from orchestrator.openai_replies import error_body

RESULTS_BYTES_MAX = 16 << 20  # kept for those that ask again
CANCELLED_MAX = 10_000  # batches

_log = structlog.get_logger("orchestrator")
_Key = tuple[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class _Running:
    batch: str
    task: asyncio.Task[CloudEvent]


class BatchRunner:
    """What was cancelled is known until the process ends: a batch that is still being sent is computed by the next."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._running: dict[_Key, _Running] = {}
        self._results: OrderedDict[_Key, CloudEvent] = OrderedDict()
        self._results_bytes = 0
        self._cancelled: OrderedDict[str, None] = OrderedDict()
        metrics.BATCH_IN_FLIGHT.labels(service.name).set_function(lambda: len(self._running))

    async def result(self, request: BatchRequest) -> CloudEvent:
        """The result event. Raises GenerationError where the request should be delivered again later."""
        if request.key in self._results:
            self.count("duplicate")
            return self._results[request.key]
        if request.key in self._running:
            self.count("duplicate")
        else:
            task = asyncio.create_task(self._run(request))
            self._running[request.key] = _Running(request.batch, task)
            task.add_done_callback(lambda done: self._ended(request.key, done))
        task = self._running[request.key].task
        await asyncio.wait([task])  # which leaves it alone when this delivery is cut off
        if task.cancelled():
            raise GenerationError("the server is shutting down", status=503, code="shutting_down", retry_after_s=5)
        return task.result()

    def cancel(self, batch: str) -> None:
        """Its requests, those at work too, get results that say so."""
        self._cancelled[batch] = None
        self._cancelled.move_to_end(batch)
        if len(self._cancelled) > CANCELLED_MAX:
            self._cancelled.popitem(last=False)
        mine = [running for running in self._running.values() if running.batch == batch]
        for running in mine:
            running.task.cancel()
        _log.info("batch_cancelled", batch=batch, at_work=len(mine))

    @property
    def model(self) -> str:
        return self._service.name

    def count(self, outcome: str) -> None:
        metrics.BATCH_REQUESTS.labels(self._service.name, outcome).inc()

    async def close(self) -> None:
        tasks = [running.task for running in self._running.values()]
        self._cancelled.clear()  # what ends now was not cancelled by its owner
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, request: BatchRequest) -> CloudEvent:
        model = self._service.name
        try:
            if request.batch not in self._cancelled:
                result = answered(request, model, 200, await self._answer(request))
                self.count("ok")
                return result
        except asyncio.CancelledError:
            if request.batch not in self._cancelled:
                raise
        except Exception as error:
            return self._refused(request, as_generation_error(error))
        self.count("cancelled")
        return cancelled(request, model)

    async def _answer(self, request: BatchRequest) -> dict[str, Any]:
        """The body that the endpoint would answer."""
        url, body = question(request)
        make = completion_replies if url == COMPLETIONS else chat_replies
        replies = make(self._service, body, Origin(request.digest, request.created_s, "batch"))
        pieces = self._service.generate(
            replies.work.choices,
            endpoint="batch",
            request_id=request.request_id,
            prompt_tokens=replies.work.prompt_tokens,
            about=_about(request),
        )
        answers = await collect(pieces, len(replies.work.choices))
        return replies.whole(answers).model_dump(mode="json", exclude_unset=True, warnings=False)

    def _refused(self, request: BatchRequest, error: GenerationError) -> CloudEvent:
        final = is_result(error)
        self.count("failed" if final else "later")
        if not final:
            raise error
        _log.info("batch_request_refused", **_about(request), outcome=error.code, error=str(error))
        return answered(request, self._service.name, error.status, error_body(error))

    def _ended(self, key: _Key, task: asyncio.Task[CloudEvent]) -> None:
        del self._running[key]
        # asking for the error also tells asyncio that somebody has seen it, where nobody waits any more
        if task.cancelled() or task.exception() is not None:
            return
        self._results[key] = task.result()
        self._results_bytes += _size_bytes(task.result())
        while self._results_bytes > RESULTS_BYTES_MAX:
            self._results_bytes -= _size_bytes(self._results.popitem(last=False)[1])


def _about(request: BatchRequest) -> dict[str, str]:
    return {"event_id": request.id, "batch": request.batch, "custom_id": request.custom_id}


def _size_bytes(event: CloudEvent) -> int:
    return len(event.data or b"") + sum(len(name) + len(text) for name, text in event.attributes.items())
