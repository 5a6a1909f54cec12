"""What the broker takes in and gives out, and what a million waiting events cost.

Events are accepted durably: 202 comes once they are on the disk (SQLite, synchronous FULL), with a delivery for a
Trigger whose subscriber is not there. The peer is the same HTTP server without a broker behind it: it reads the same
requests and answers 202. Delivery is measured on its own, from a backlog to a process that answers 202.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import aiohttp
import psutil

from benchmarks import brokers
from benchmarks.alternate import alternate
from benchmarks.bench import Bench, MeasureError
from benchmarks.http_load import Target, answers, requests_per_s
from benchmarks.peers import program
from benchmarks.platforms import LOOK_EVERY_S, RunningPlatform, running_platform
from benchmarks.report import Figure, Section, alone, beside

SIZE_BYTES, SMALL_BYTES = 1000, 200  # of data; attributes come on top
CONNECTIONS = (8, 64)
BATCH_EVENTS, BATCH_CONNECTIONS = 100, 8
BACKLOG_BATCH_EVENTS = 1000
LOAD_S, QUICK_LOAD_S = 2.0, 0.1
DELIVERED, QUICK_DELIVERED = 5000, 200
QUEUED, QUICK_QUEUED = 1_000_000, 2000
IN_FLIGHT = (16, 64)
DELIVER_TIMEOUT_S = 120.0
KEPT, SENT = "benchmark.kept", "benchmark.sent"  # types of events
PEER = "202, not stored"
MIB = 1 << 20


async def measure(bench: Bench) -> list[Section]:
    async with running_platform(bench, {}) as platform, _peer() as peer:
        await platform.apply([brokers.broker(), brokers.trigger("kept", KEPT, brokers.nobody())])
        accepted = await _accepted(bench, platform, peer)
        delivered = await _delivered(bench, platform, peer)
    async with running_platform(bench, {}) as platform:
        queued = await _queued(bench, platform)
    return [
        Section(
            f"Events: accepted durably, {SIZE_BYTES:,} bytes of data",
            accepted,
            ["Each answer comes after an fsync, shared by what waits at the time. Client and server share two cores."],
        ),
        Section(
            f"Events: delivered from a backlog, {SIZE_BYTES:,} bytes of data",
            delivered,
            ["The subscriber is a plain process that answers 202; nothing is accepted meanwhile."],
        ),
        Section(f"Events: a backlog, {SMALL_BYTES} bytes of data", queued),
    ]


@asynccontextmanager
async def _peer() -> AsyncIterator[str]:
    """HOST:PORT."""
    async with program(["benchmarks.peer_accept"], 1) as running:
        yield f"127.0.0.1:{(await running.read_line())['port']}"


async def _accepted(bench: Bench, platform: RunningPlatform, peer: str) -> list[Figure]:
    duration_s = QUICK_LOAD_S if bench.quick else LOAD_S
    single = partial(brokers.single, event_type=KEPT, size_bytes=SIZE_BYTES)
    batched = partial(brokers.batched, event_type=KEPT, size_bytes=SIZE_BYTES, count=BATCH_EVENTS)
    ways: list[tuple[str, Callable[[str], Target], int, int]] = [
        *(("single", single, connections, 1) for connections in CONNECTIONS),
        (f"batches of {BATCH_EVENTS}", batched, BATCH_CONNECTIONS, BATCH_EVENTS),
    ]
    figures = []
    for name, make, connections, events in ways:
        runs: dict[str, Callable[[], Awaitable[float]]] = {
            where: partial(requests_per_s, make(address), connections, duration_s)
            for where, address in ((PEER, peer), ("broker", platform.address))
        }
        results = await alternate(bench.rounds, runs)
        ours, theirs = ([rate * events for rate in results[where]] for where in ("broker", PEER))
        figures.append(beside(f"accepted, {name}, {connections} connections", "events/s", ours, PEER, theirs))
    return figures


async def _delivered(bench: Bench, platform: RunningPlatform, subscriber: str) -> list[Figure]:
    runs = {str(count): partial(_deliver, bench, platform, subscriber, count) for count in IN_FLIGHT}
    results = await alternate(bench.rounds, runs)
    return [alone(f"delivered, {count} in flight", "events/s", rates) for count, rates in results.items()]


async def _deliver(bench: Bench, platform: RunningPlatform, subscriber: str, in_flight: int) -> float:
    """Events per second, from the first to the last that the subscriber gets out of a backlog."""
    count = QUICK_DELIVERED if bench.quick else DELIVERED
    make = partial(brokers.trigger, "sent", SENT, in_flight=in_flight)
    await platform.apply([make(subscriber=brokers.nobody())])
    batch = brokers.batched(platform.address, SENT, SIZE_BYTES, BATCH_EVENTS)
    await answers([batch] * (count // BATCH_EVENTS), BATCH_CONNECTIONS)
    await _counted(subscriber)  # from here on
    await platform.apply([make(subscriber={"uri": f"http://{subscriber}/"})])
    started_s = time.monotonic()
    while (await platform.triggers())["sent"]["waiting"]:
        if time.monotonic() - started_s > DELIVER_TIMEOUT_S:
            raise MeasureError(f"{count} events were not delivered in {DELIVER_TIMEOUT_S:.0f} s")
        await asyncio.sleep(LOOK_EVERY_S)
    got = await _counted(subscriber)
    if got["count"] != count:
        raise MeasureError(f"of {count} events, the subscriber got {got['count']:.0f}")
    return (count - 1) / (got["last_s"] - got["first_s"])


async def _counted(subscriber: str) -> dict[str, float]:
    """What the subscriber got since it was asked last."""
    async with aiohttp.ClientSession() as session, session.get(f"http://{subscriber}/") as answer:
        counted: dict[str, float] = json.loads(await answer.read())
        return counted


async def _queued(bench: Bench, platform: RunningPlatform) -> list[Figure]:
    """One run: a million events take a minute."""
    count = QUICK_QUEUED if bench.quick else QUEUED
    await platform.apply([brokers.broker(), brokers.trigger("kept", KEPT, brokers.nobody())])
    process = psutil.Process(platform.pid)
    batch = brokers.batched(platform.address, KEPT, SMALL_BYTES, BACKLOG_BATCH_EVENTS)
    await answers([batch], 1)
    empty_mib = process.memory_info().rss / MIB
    started_s = time.perf_counter()
    await answers([batch] * (count // BACKLOG_BATCH_EVENTS - 1), BATCH_CONNECTIONS)
    rate = (count - BACKLOG_BATCH_EVENTS) / (time.perf_counter() - started_s)
    waiting = (await platform.triggers())["kept"]["waiting"]
    if waiting != count:
        raise MeasureError(f"{waiting} events wait, {count} were accepted")
    file_mib = sum(path.stat().st_size for path in platform.data_folder.glob("events.sqlite*")) / MIB
    before = f"{BACKLOG_BATCH_EVENTS:,} queued"
    name = f"{count:,} queued"
    return [
        alone(f"{name}, accepted in batches of {BACKLOG_BATCH_EVENTS:,}", "events/s", [rate]),
        beside(f"{name}, memory of the platform", "MiB", [process.memory_info().rss / MIB], before, [empty_mib]),
        alone(f"{name}, files", "MiB", [file_mib], "with the reserve of 16 MiB"),
    ]
