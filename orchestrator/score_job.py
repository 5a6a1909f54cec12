"""Sends texts to score and collects what comes back, with a journal so that it can go on after any end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp

from orchestrator.batches.broker_client import BrokerClient, ServiceError
from orchestrator.batches.collect import ResultsClient, collect
from orchestrator.batches.job import LOOK_EVERY_S, Teller, open_input, session
from orchestrator.batches.journal import Journal
from orchestrator.batches.lines import BadLine
from orchestrator.batches.reader import Chunk, InputChanged
from orchestrator.batches.submit import in_thread
from orchestrator.score_lines import TextReader, score_event

MakeReader = Callable[..., TextReader]


async def work(journal: Journal, make_reader: MakeReader, teller: Teller, *, wait: bool) -> None:
    """Sends what is not sent yet and, with `wait`, writes results until there is one for every text.

    `make_reader` gets the opened input. Raises ServiceError, JournalError and InputChanged; then the journal says how
    far it was and it can be called again."""
    async with session() as http:
        doing = [asyncio.create_task(_send(journal, make_reader, http, teller))]
        if wait:
            doing.append(asyncio.create_task(_collect(journal, http, teller)))
        try:
            while pending := [one for one in doing if not one.done()]:
                teller.look(journal.state)
                done, _ = await asyncio.wait(pending, timeout=LOOK_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
                for one in done:
                    one.result()
            teller.look(journal.state)
        finally:
            for one in doing:
                one.cancel()
            await asyncio.gather(*doing, return_exceptions=True)


async def _collect(journal: Journal, http: aiohttp.ClientSession, teller: Teller) -> None:
    if journal.state.results is None:
        raise ServiceError("nobody said where the results are; name the results service with --results")
    await collect(journal, ResultsClient(http, journal.state.results, teller.trouble), teller.failed)


async def _send(journal: Journal, make_reader: MakeReader, http: aiohttp.ClientSession, teller: Teller) -> None:
    if journal.state.all_sent:
        return
    broker = BrokerClient(http, journal.state.broker, teller.trouble)
    try:
        stream = open_input(journal.state)
        try:
            reader = make_reader(stream)
            await in_thread(lambda: reader.skip_to(journal.state.mark))
            while (chunk := await in_thread(reader.chunk)) is not None:
                await _send_chunk(journal, chunk, broker, teller)
            journal.note_all_sent()
        finally:
            if journal.state.input_bytes is not None:  # closing a pipe would wait for the read that is blocked
                stream.close()
    except OSError as error:
        raise InputChanged(f"it cannot be read: {error.strerror or error}") from None


async def _send_chunk(journal: Journal, chunk: Chunk, broker: BrokerClient, teller: Teller) -> None:
    duplicates = journal.claim(chunk.requests)
    left_out = {line.number for line in duplicates}
    events = {one.number: score_event(journal.state.batch, one) for one in chunk.requests if one.number not in left_out}
    refusals = await broker.deliver(list(events.values()))
    refused = [one for one in chunk.requests if one.number in events and events[one.number].id in refusals]
    bad = [
        BadLine(one.number, one.custom_id, "refused_by_broker", str(refusals[events[one.number].id])) for one in refused
    ]
    in_order = sorted((*chunk.bad, *duplicates, *bad), key=lambda line: line.number)
    journal.note_sent(chunk, len(events) - len(refused), in_order, [one.custom_id for one in refused])
    for line in in_order:
        teller.bad_line(line)
