"""A batch at work: sending, collecting and cancelling side by side, until all is done or somebody stops it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import aiohttp

from orchestrator.batches.broker_client import BrokerClient, ServiceError
from orchestrator.batches.collect import ResultsClient, collect, collect_present
from orchestrator.batches.events import cancel_event
from orchestrator.batches.journal import Journal, State
from orchestrator.batches.lines import BadLine
from orchestrator.batches.patience import Tell
from orchestrator.batches.reader import InputChanged, InputReader
from orchestrator.batches.submit import ToEvent, batch_event, send_all

LOOK_EVERY_S = 0.25
CANCEL_TIMEOUT_S = 30.0  # for the broker, and for the results service
STANDARD_INPUT = "-"


@dataclass(frozen=True, slots=True)
class Teller:
    """Who is told what happens meanwhile."""

    trouble: Tell
    bad_line: Callable[[BadLine], None]  # one that is left out
    failed: Callable[[BadLine], None]  # one whose result is an error
    look: Callable[[State], None]  # called several times a second


@dataclass(frozen=True, slots=True)
class Kind:
    """What the lines of an input are."""

    reader: Callable[[BinaryIO, State], InputReader]
    to_event: ToEvent


BATCH = Kind(lambda stream, state: InputReader(stream, state.model), batch_event)


async def work(
    journal: Journal, teller: Teller, *, wait: bool, cancel_wanted: Callable[[], bool], kind: Kind = BATCH
) -> None:
    """Sends what is not sent yet and, with `wait`, writes results until the batch is over.

    Raises ServiceError, JournalError and InputChanged; then, and when it is cancelled, the journal says how far it was
    and it can be called again."""
    async with session() as http:
        doing = [asyncio.create_task(_send(journal, kind, http, teller))]
        if wait:
            doing.append(asyncio.create_task(collect(journal, _results(journal, http, teller), teller.failed)))
        try:
            while not (journal.state.is_over if wait else journal.state.all_sent):
                _raise_first(doing)
                if cancel_wanted():
                    await _stop(doing)
                    await cancel(journal, teller)
                    return
                teller.look(journal.state)
                await asyncio.wait(
                    [one for one in doing if not one.done()], timeout=LOOK_EVERY_S, return_when=asyncio.FIRST_COMPLETED
                )
            teller.look(journal.state)
        finally:
            await _stop(doing)


async def cancel(journal: Journal, teller: Teller) -> None:
    """Nothing more is sent; the broker is told; results that are there are kept, all others are lines that say
    "cancelled". A broker or service that cannot be reached is told to the caller. Raises JournalError."""
    journal.note_cancelling()
    state = journal.state
    async with session() as http:
        broker = BrokerClient(http, state.broker, teller.trouble)
        if not await _in_time(broker.deliver([cancel_event(state.batch)]), teller):
            teller.trouble("the broker was not told, so what it has may still be computed")
        if state.results and not await _in_time(collect_present(journal, _results(journal, http, teller)), teller):
            teller.trouble("results that came meanwhile are left to `stagecraft batch results`")
    journal.cancel_open()


async def _in_time(call: Awaitable[object], teller: Teller) -> bool:
    try:
        async with asyncio.timeout(CANCEL_TIMEOUT_S):
            await call
    except ServiceError as error:
        teller.trouble(str(error))
        return False
    except TimeoutError:
        return False
    return True


def session() -> aiohttp.ClientSession:
    """Without a limit of connections: senders have their own."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), skip_auto_headers=("content-type",))


async def _send(journal: Journal, kind: Kind, http: aiohttp.ClientSession, teller: Teller) -> None:
    if journal.state.all_sent or journal.state.cancelling:
        return
    broker = BrokerClient(http, journal.state.broker, teller.trouble, is_known=journal.state.sent > 0)
    try:
        stream = open_input(journal.state)
        try:
            await send_all(journal, kind.reader(stream, journal.state), kind.to_event, broker, teller.bad_line)
        finally:
            if journal.state.input_bytes is not None:  # closing a pipe would wait for the read that is blocked
                stream.close()
    except OSError as error:
        raise InputChanged(f"it cannot be read: {error.strerror or error}") from None


def open_input(state: State) -> BinaryIO:
    """Raises OSError, and InputChanged when the file has another size than when the batch was begun."""
    if state.input == STANDARD_INPUT:
        # not sys.stdin: its lock would be waited for at the end, while a read is blocked
        return os.fdopen(sys.stdin.fileno(), "rb", closefd=False)
    stream = Path(state.input).open("rb")  # noqa: SIM115  for the caller
    if state.input_bytes is not None and (size_bytes := os.fstat(stream.fileno()).st_size) != state.input_bytes:
        stream.close()
        raise InputChanged(f"it has {size_bytes} bytes now; it had {state.input_bytes} when the batch was begun")
    return stream


def _results(journal: Journal, http: aiohttp.ClientSession, teller: Teller) -> ResultsClient:
    if journal.state.results is None:
        raise ServiceError("nobody said where the results are; name the results service with --results")
    return ResultsClient(http, journal.state.results, teller.trouble, is_known=journal.state.finished > 0)


def _raise_first(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()


async def _stop(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
