"""What the way through the platform adds to a warm request, and how many requests it lets through.

The same echo answers on four ways: asked directly; through the queue-proxy's own port, as a lane asks the replica that
has its caches; through ingress and queue-proxy, as when there is burst capacity to spare (mode serve); and through
ingress, activator and queue-proxy (mode proxy).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial

import psutil

from benchmarks.alternate import alternate, percentile
from benchmarks.bench import Bench
from benchmarks.http_load import Target, latencies_s, requests_per_s
from benchmarks.platforms import RunningPlatform, running_platform, service
from benchmarks.report import Figure, Section, beside

IMAGE = "bench/echo"
IMAGES = {IMAGE: {"module": "benchmarks.peer_echo"}}
ALWAYS_ONE = {"min-scale": "1", "max-scale": "1"}
MODES = {"served": "serve", "proxied": "proxy"}  # service -> where its activator is
BURST = {"serve": "0", "proxy": "-1"}  # target-burst-capacity: none to keep free, and never enough
BODY = b"\x5a" * 10_000
REQUESTS, QUICK_REQUESTS = 500, 5
CONNECTIONS = (1, 8, 32)
LOAD_S, QUICK_LOAD_S = 1.5, 0.1
RATE_REMARKS = (
    "10 KB there and back. Client, platform and upstream share two cores.",
    "The client spends as much CPU time on a request as the echo: with several connections, direct is what the client "
    "can ask for, and it is halved when another program runs. The ratio is as uncertain; the value is not.",
)

PEER = "direct"
QUEUE_PROXY = "queue-proxy"
SERVE = "ingress, queue-proxy"
PROXY = "ingress, activator, queue-proxy"


async def measure(bench: Bench) -> list[Section]:
    async with running_platform(bench, IMAGES) as platform:
        await platform.apply(
            [service(name, IMAGE, {**ALWAYS_ONE, "target-burst-capacity": BURST[mode]}) for name, mode in MODES.items()]
        )
        ways = await _ways(platform)
        added = await _latency(bench, ways)
        rates = await _rates(bench, ways)
        await platform.settled(MODES)  # nothing has changed its mode meanwhile
    return [
        Section(
            "Path: one warm request of 10 KB and its answer of 10 KB",
            added,
            ["One connection, one request at a time, loopback. Upstream: raw ASGI echo under uvicorn."],
        ),
        Section("Path: requests per second", rates, RATE_REMARKS),
    ]


async def _ways(platform: RunningPlatform) -> dict[str, Target]:
    revisions = await platform.settled(MODES)
    (pod,) = revisions["served"]["pods"]
    port = psutil.Process(pod["pid"]).environ()["PORT"]
    ingress = platform.url.removeprefix("http://")
    return {
        PEER: Target.echo(f"127.0.0.1:{port}", "/", BODY),
        QUEUE_PROXY: Target.echo(pod["address"], "/", BODY),
        SERVE: Target.echo(ingress, "/default/served/", BODY),
        PROXY: Target.echo(ingress, "/default/proxied/", BODY),
    }


async def _latency(bench: Bench, ways: Mapping[str, Target]) -> list[Figure]:
    count = QUICK_REQUESTS if bench.quick else REQUESTS
    results = await alternate(bench.rounds, {name: partial(latencies_s, way, count) for name, way in ways.items()})
    theirs = results.pop(PEER)
    return [_added(name, percent, ours, theirs) for percent in (50, 99) for name, ours in results.items()]


def _added(name: str, percent: int, ours_s: list[list[float]], theirs_s: list[list[float]]) -> Figure:
    ours, theirs = ([percentile(run, percent) * 1e3 for run in runs] for runs in (ours_s, theirs_s))
    figure = beside(f"{name}, p{percent}", "ms", ours, PEER, theirs)
    adds = sorted(a - b for a, b in zip(ours, theirs, strict=True))[len(ours) // 2]
    return replace(figure, note=f"adds {adds:.2f} ms")


async def _rates(bench: Bench, ways: Mapping[str, Target]) -> list[Figure]:
    duration_s = QUICK_LOAD_S if bench.quick else LOAD_S
    figures = []
    for connections in (2,) if bench.quick else CONNECTIONS:
        runs: dict[str, Callable[[], Awaitable[float]]] = {
            name: partial(requests_per_s, ways[name], connections, duration_s) for name in (PEER, SERVE, PROXY)
        }
        results = await alternate(bench.rounds, runs)
        theirs = results.pop(PEER)
        label = f"{connections} connection{'s'[: connections > 1]}"
        figures += [beside(f"{name}, {label}", "requests/s", ours, PEER, theirs) for name, ours in results.items()]
    return figures
