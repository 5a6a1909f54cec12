"""Sends the requests of a batch: read, checked against the journal, handed to the broker, noted in order."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from knative.eventing.event import CloudEvent
from orchestrator.batches.broker_client import BrokerClient
from orchestrator.batches.events import request_event, request_id
from orchestrator.batches.journal import Journal
from orchestrator.batches.lines import BadLine, Request
from orchestrator.batches.reader import Chunk, InputReader

CHUNKS_AT_ONCE = 4

T = TypeVar("T")
ToEvent = Callable[[str, Request], CloudEvent]
"""The event of a request of the batch named; its id is events.request_id, so that a refusal is found again."""


@dataclass(frozen=True, slots=True)
class _Sent:
    accepted: int
    bad: tuple[BadLine, ...]
    refused: tuple[str, ...]  # custom_ids that the broker does not take


def batch_event(batch: str, request: Request) -> CloudEvent:
    """The event of a line of a batch. Raises InvalidEvent."""
    return request_event(batch, request.custom_id, request.model, request.line)


async def send_all(
    journal: Journal,
    reader: InputReader,
    to_event: ToEvent,
    broker: BrokerClient,
    tell_bad: Callable[[BadLine], None],
) -> None:
    """Sends what the journal does not have as sent, until the input ends. Raises ServiceError, JournalError,
    InputChanged and OSError; whatever ends it, what the broker has is noted, up to the first chunk that it has not."""
    reading: asyncio.Future[Chunk | None] | None = None
    waiting: deque[tuple[Chunk, asyncio.Task[_Sent]]] = deque()
    at_end = False
    try:
        await in_thread(lambda: reader.skip_to(journal.state.mark))
        while True:
            if reading is None and not at_end and len(waiting) < CHUNKS_AT_ONCE:
                reading = in_thread(reader.chunk)
            # both: what is acknowledged is noted also while a slow input is waited for
            looked_at: list[asyncio.Future[Any]] = [task for _, task in list(waiting)[:1]]
            if not (looked_at := [*looked_at, *([reading] if reading else [])]):
                break
            await asyncio.wait(looked_at, return_when=asyncio.FIRST_COMPLETED)
            if reading and reading.done():
                chunk, reading = reading.result(), None
                at_end = chunk is None
                if chunk is not None:
                    waiting.append((chunk, _start(journal, chunk, to_event, broker)))
            while waiting and waiting[0][1].done():
                chunk, task = waiting.popleft()
                sent = task.result()
                journal.note_sent(chunk, sent.accepted, sent.bad, sent.refused)
                for line in sent.bad:
                    tell_bad(line)
        journal.note_all_sent()
    finally:
        for _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)


def _start(journal: Journal, chunk: Chunk, to_event: ToEvent, broker: BrokerClient) -> asyncio.Task[_Sent]:
    duplicates = journal.claim(chunk.requests)
    return asyncio.create_task(_send(journal.state.batch, chunk, duplicates, to_event, broker))


async def _send(
    batch: str, chunk: Chunk, duplicates: Sequence[BadLine], to_event: ToEvent, broker: BrokerClient
) -> _Sent:
    left_out = {line.number for line in duplicates}
    requests = {request_id(batch, one.custom_id): one for one in chunk.requests if one.number not in left_out}
    refusals = await broker.deliver([to_event(batch, one) for one in requests.values()])
    refused = {requests[id]: refusal for id, refusal in refusals.items()}
    bad = [BadLine(one.number, one.custom_id, "refused_by_broker", str(why)) for one, why in refused.items()]
    in_order = sorted((*chunk.bad, *duplicates, *bad), key=lambda line: line.number)
    return _Sent(len(requests) - len(refused), tuple(in_order), tuple(one.custom_id for one in refused))


def in_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """The result of a call that may block, such as a read of standard input; the program's end does not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # it is a T where there is no error

    def run() -> None:
        result, failure = None, None
        try:
            result = call()
        except Exception as error:
            failure = error
        with suppress(RuntimeError):  # the loop is closed: the program ends
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, daemon=True).start()
    return future
