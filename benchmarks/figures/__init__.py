"""The figures, one module each. A figure is `async def measure(bench: Bench) -> list[Section]`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from benchmarks.bench import Bench
from benchmarks.figures import (
    batch,
    events,
    hop,
    latency,
    memory,
    mixed,
    path,
    prefill,
    quantize,
    slow,
    startup,
    throughput,
    wake,
)
from benchmarks.report import Section

Measure = Callable[[Bench], Awaitable[list[Section]]]

FIGURES: dict[str, Measure] = {
    "hop": hop.measure,
    "latency": latency.measure,
    "throughput": throughput.measure,
    "mixed": mixed.measure,
    "prefill": prefill.measure,
    "path": path.measure,
    "wake": wake.measure,
    "startup": startup.measure,
    "slow": slow.measure,
    "events": events.measure,
    "batch": batch.measure,
    "memory": memory.measure,
    "quantize": quantize.measure,
}
