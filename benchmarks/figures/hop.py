"""What a hop costs: an event to a stage and its reply, beside the same bytes to and from a bare ASGI echo.

The stage is a real one in the middle of a chain: hidden states in, hidden states out. Its block is as small as a width
of 2,560 allows, and what the stage reports as time in its block (`computeus`) is taken off each single request. What
is left is HTTP, CloudEvents, safetensors, and the way into the stage's compute thread and back. The client side is the
project's own StageClient for the stage, bare aiohttp for the echo.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import aiohttp
import numpy as np

from benchmarks import checkpoints, copies
from benchmarks.alternate import alternate, percentile
from benchmarks.bench import Bench, MeasureError
from benchmarks.peers import echo_peer
from benchmarks.report import Figure, Section, alone, beside
from benchmarks.stages import PLAN, WAKE_TIMEOUT_S, running_stages
from functions.contract.frames import Frame
from functions.contract.messages import Opening, Slice, Step
from functions.contract.sampling import SamplingParams
from functions.contract.spans import BlockSpan
from orchestrator.stage_client import StageClient

INDEX, STAGES = 1, 3
STEP_TIMEOUT_S = 60.0
SEQUENCE = 1
PEER = "ASGI echo"
COPIED_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Size:
    name: str
    tokens: int  # each of them 10 KiB of hidden states
    requests: int  # in one run


FULL = (Size("10 KB", 1, 200), Size("16 MB", 1638, 20))
QUICK = (Size("10 KB", 1, 5), Size("16 MB", 1638, 1))


@dataclass(frozen=True, slots=True)
class Ways:
    """Both sides, warm: the stage by the address of its replica, as a lane asks it from its second step on."""

    session: aiohttp.ClientSession
    client: StageClient
    replica: str
    echo_url: str


async def measure(bench: Bench) -> list[Section]:
    model = await checkpoints.make(bench, "wide", checkpoints.WIDE)
    sizes = QUICK if bench.quick else FULL
    async with AsyncExitStack() as stack:
        echo_url = await stack.enter_async_context(echo_peer())
        spans = [BlockSpan(INDEX, INDEX + 1)]
        started = running_stages(bench, model, spans, threads=1, first=INDEX, count=STAGES)
        (stage,) = await stack.enter_async_context(started)
        session = await stack.enter_async_context(_session())
        client = StageClient(session, INDEX, stage.url, PLAN)
        stack.callback(client.close)
        replica = f"http://{(await client.wake(WAKE_TIMEOUT_S)).replica}/"
        ways = Ways(session, client, replica, echo_url)
        figures = [figure for size in sizes for figure in await _compare(bench, size, ways)]
        figures += await _copies(echo_url)
    remarks = ["Time in the stage's block is taken off. Loopback; one connection, one request at a time."]
    return [Section("Hop: one step event to a stage and its reply", figures, remarks)]


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=300))


async def _compare(bench: Bench, size: Size, ways: Ways) -> list[Figure]:
    body = step_body(size.tokens)
    if size.tokens == 1:  # a token of the answer, not the first of the prompt
        await ways.client.step(body, "bench", ways.replica, STEP_TIMEOUT_S)
        body = step_body(1, start=1)

    async def hop() -> float:
        started_s = time.perf_counter()
        reply = await ways.client.step(body, "bench", ways.replica, STEP_TIMEOUT_S)
        wall_s = time.perf_counter() - started_s
        if len(reply.data) < len(body) // 2:
            raise MeasureError(f"the stage answered {len(reply.data)} bytes to {len(body)}")
        return wall_s - int(reply.extensions["computeus"]) / 1e6

    async def echo() -> float:
        started_s = time.perf_counter()
        async with ways.session.post(ways.echo_url, data=body) as response:
            content = await response.read()
        wall_s = time.perf_counter() - started_s
        if len(content) != len(body):
            raise MeasureError(f"the echo answered {len(content)} bytes to {len(body)}")
        return wall_s

    runs = {"hop": lambda: _times(hop, size.requests), "echo": lambda: _times(echo, size.requests)}
    results = await alternate(bench.rounds, runs)
    return [_figure(size, percent, results["hop"], results["echo"]) for percent in (50, 99)]


async def _copies(echo_url: str) -> list[Figure]:
    """Of the larger body, at either end."""
    at_stage, at_client = await copies.at_stage(COPIED_BYTES), await copies.at_client(echo_url, COPIED_BYTES)
    note = "event and reply together, both 16 MB; tracemalloc"
    return [
        alone("hop 16 MB, at the stage", "copies", [at_stage], note),
        alone("hop 16 MB, at the client", "copies", [at_client]),
    ]


async def _times(request: Callable[[], Awaitable[float]], count: int) -> list[float]:
    return [await request() for _ in range(count)]


def _figure(size: Size, percent: int, hop_s: list[list[float]], echo_s: list[list[float]]) -> Figure:
    ours, theirs = ([percentile(run, percent) * 1e3 for run in runs] for runs in (hop_s, echo_s))
    note = f"each run {size.requests} requests" if percent == 50 else ""
    return beside(f"hop {size.name} p{percent}", "ms", ours, PEER, theirs, note)


def step_body(tokens: int, start: int = 0) -> bytes:
    """A step of one sequence, the same each time: stages compute repeated steps anew."""
    width = checkpoints.WIDE["hidden_size"]
    hidden = np.random.default_rng(0).standard_normal((tokens, width), dtype=np.float32)
    openings = {} if start else {SEQUENCE: Opening(SamplingParams(), tokens)}
    ids = np.zeros(tokens, dtype=np.int32)
    return b"".join(Step((Slice(SEQUENCE, start, tokens),), ids, Frame.of(hidden), openings).to_body())
