"""Mode `later` of /events: requests and results in one file, until the one is computed and the other delivered.

put ──> [requests] ──> generate ──> [results] ──POST──> sink
                          │ the result comes in as the request goes: one transaction
                          └ what was not ended when the process died is begun again at the next start
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import aiohttp

from knative.eventing.delivery import DeliverySpec, parse_retry_after_s
from knative.eventing.dispatcher import Dispatcher, Route
from knative.eventing.event import CloudEvent
from knative.eventing.http_binding import to_binary
from knative.eventing.store import Delivery, EventStore, NewEvent
from knative.eventing.stored import from_store, to_store
from knative.eventing.subscribers import ATTEMPT_S_MAX, Answer, Sender
from orchestrator import metrics
from orchestrator.batch_requests import BatchRequest, read_request, unanswered
from orchestrator.batch_runner import BatchRunner
from orchestrator.choices import as_generation_error
from orchestrator.generation import GenerationError
from orchestrator.stage_client import proxy_for

REQUESTS, RESULTS, UNDELIVERED = "requests", "results", "undelivered"
SINK_REQUESTS_MAX = 16
RETRY_AFTER_S = 5
_PAUSES_S = (1, 5, 25)  # between attempts to answer a request that fails; then its result is an error
# for ever: each attempt waits a second longer than the one before, so after a day six minutes
_TO_SINK = DeliverySpec(retry=2**31 - 1, backoff_policy="linear", backoff_delay_s=1)
_RECALLED_AT_ONCE = 64
_CONNECT_TIMEOUT_S = 5.0
_SAID_BYTES_MAX = 1024

_Key = tuple[str, str]


class BatchQueue:
    """`open`, then `put`; requests are computed and results sent as long as it is not closed.

    A result that the sink refuses for good (400, say) stays in the file as `undelivered`, and the log says why."""

    def __init__(self, store: EventStore, runner: BatchRunner, requests_max: int) -> None:
        self._store = store
        self._runner = runner
        self._requests_max = requests_max
        self._queued: dict[_Key, asyncio.Future[None]] = {}  # done once durable
        self._dispatchers: dict[str, Dispatcher] = {}
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    async def open(cls, path: Path, sink: str, runner: BatchRunner, *, workers: int, requests_max: int) -> Self:
        """Goes on with what the file holds. `requests_max` bounds requests and results in the file together. Raises
        StoreError."""
        queue = cls(await EventStore.open(path), runner, requests_max)
        await queue._recall()
        queue._session = aiohttp.ClientSession()
        here = Route("here", "", DeliverySpec(), workers)
        there = Route(sink, "", _TO_SINK, SINK_REQUESTS_MAX, wants_reply=False, dead_letters=UNDELIVERED)
        queue._dispatch(REQUESTS, here, _Generating(runner))
        queue._dispatch(RESULTS, there, _Posting(queue._session))
        return queue

    async def put(self, event: CloudEvent, request: BatchRequest) -> None:
        """Returns once the request is durable, whichever of its deliveries did it. Raises GenerationError (429) and
        StoreError."""
        if request.key in self._queued:
            self._runner.count("duplicate")
        else:
            self._expect_room()
            self._queued[request.key] = asyncio.ensure_future(self._accept(event, request))
        # the work of one delivery must not end with the connection of another
        await asyncio.shield(self._queued[request.key])

    async def close(self) -> None:
        """What has not ended is begun again at the next start."""
        for dispatcher in self._dispatchers.values():
            await dispatcher.close()
        if self._session is not None:
            await self._session.close()
        await self._store.close()

    def _expect_room(self) -> None:
        held = len(self._queued) + self._store.depth(RESULTS)
        if held >= self._requests_max:
            raise GenerationError(
                f"{held} requests and results lie in the file, the limit is {self._requests_max}; try again later",
                status=429,
                code="queue_full",
                retry_after_s=RETRY_AFTER_S,
            )

    async def _accept(self, event: CloudEvent, request: BatchRequest) -> None:
        # with its time, so that a later attempt makes the same result
        time_ = datetime.fromtimestamp(request.created_s, UTC).isoformat()
        try:
            await self._store.accept([to_store(event.changed({"time": time_}), "", [REQUESTS])])
        except BaseException:
            del self._queued[request.key]
            raise
        self._dispatchers[REQUESTS].wake()

    async def _recall(self) -> None:
        """Learns which requests lie in the file, so that they are not taken in again."""
        known: list[Delivery] = []
        while some := await self._store.take(REQUESTS, _RECALLED_AT_ONCE, time.time()):
            known += [replace(delivery, event=replace(delivery.event, data=None)) for delivery in some]
        await self._store.release(known)
        for delivery in known:
            durable = asyncio.get_running_loop().create_future()
            durable.set_result(None)
            self._queued[_key(delivery)] = durable

    def _dispatch(self, target: str, route: Route, sender: Sender) -> None:
        gauge = metrics.BATCH_QUEUE.labels(self._runner.model, target)
        gauge.set_function(lambda: self._store.depth(target))
        self._dispatchers[target] = Dispatcher(
            target,
            self._store,
            sender,
            route=lambda: route,
            intake=self._answered,
            arrived=self._arrived,
            observe=lambda status, seconds: None,
        )

    def _answered(self, delivery: Delivery, results: Sequence[CloudEvent]) -> list[NewEvent]:
        self._queued.pop(_key(delivery), None)
        return [to_store(result, "", [RESULTS]) for result in results]

    def _arrived(self, new: Sequence[NewEvent]) -> None:
        if new:
            self._dispatchers[RESULTS].wake()


class _Generating(Sender):
    """Sends requests nowhere: the answer is the result event, or when to try again."""

    def __init__(self, runner: BatchRunner) -> None:
        self._runner = runner

    async def send(self, event: CloudEvent, url: str, **how: object) -> Answer:
        request = read_request(event, time.time())
        pauses_s = iter(_PAUSES_S)
        while True:
            try:
                return Answer(200, events=(await self._runner.result(request),))
            except Exception as caught:
                error = as_generation_error(caught)
            if error.status in (429, 503):
                return Answer(error.status, str(error).encode(), retry_after_s=error.retry_after_s or RETRY_AFTER_S)
            pause_s = next(pauses_s, None)
            if pause_s is None:
                return Answer(200, events=(unanswered(request, self._runner.model, error.code, str(error)),))
            await asyncio.sleep(pause_s)


class _Posting(Sender):
    """Sends results to the sink, by the proxy that the environment names, as stages are reached."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def send(self, event: CloudEvent, url: str, **how: object) -> Answer:
        headers, body = to_binary(event)
        timeout = aiohttp.ClientTimeout(total=ATTEMPT_S_MAX, sock_connect=_CONNECT_TIMEOUT_S)
        try:
            async with self._session.post(
                url, data=body, headers=headers, timeout=timeout, proxy=proxy_for(url), allow_redirects=False
            ) as answer:
                said = await answer.content.read(_SAID_BYTES_MAX)
                retry_after_s = parse_retry_after_s(answer.status, answer.headers.get("retry-after"), time.time())
                return Answer(answer.status, said, retry_after_s=retry_after_s)
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            return Answer(None, f"{url} gave no answer: {error or type(error).__name__}".encode())


def _key(delivery: Delivery) -> _Key:
    event = from_store(delivery.event)
    return event.source, event.id
