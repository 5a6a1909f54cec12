"""Seconds from the start of `stagecraft up` to the first token of a request that is sent as soon as it listens, beside
a plain Transformers process. `up` starts at zero and begins to import torch and KServe at once, so what is measured is
importing and a wake, one after the other. The demonstration model, files in the page cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from benchmarks import checkpoints
from benchmarks.alternate import alternate
from benchmarks.bench import CORES, DEMO, Bench, fair_threads
from benchmarks.peers import program, transformers_peer
from benchmarks.platforms import own_registry
from benchmarks.prompts import random_prompts
from benchmarks.report import Figure, Section, beside
from benchmarks.streams import first_text_s

PEER = "Transformers"
PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds from the start on."""

    first_token_s: float
    listens_s: float = 0.0


async def measure(bench: Bench) -> list[Section]:
    runs: dict[str, Callable[[], Awaitable[Run]]] = {PEER: _transformers}
    runs |= {f"up, {_stages(stages)}": partial(_up, bench, stages) for stages in bench.stage_counts}
    if not bench.quick:
        await _transformers()  # brings the libraries into the page cache
    results = await alternate(bench.rounds, runs, warm_up=False)
    theirs = [run.first_token_s for run in results.pop(PEER)]
    figures = [_figure(name, found, theirs) for name, found in results.items()]
    remarks = ["The peer: start Python, import, from_pretrained, one token from generate."]
    return [Section("Start to first token, demonstration model", figures, remarks)]


def _figure(name: str, runs: list[Run], theirs: list[float]) -> Figure:
    listens_s = statistics.median(run.listens_s for run in runs)
    note = f"it listens after {listens_s:.2f} s; the rest is the request, which waits for imports and weights"
    return beside(f"first token, {name}", "s", [run.first_token_s for run in runs], PEER, theirs, note)


def _stages(count: int) -> str:
    return f"{count} stage{'s'[: count > 1]}"


async def _transformers() -> Run:
    (prompt,) = random_prompts(1, PROMPT_TOKENS, checkpoints.vocab_size(DEMO))
    started_s = time.perf_counter()
    async with transformers_peer(DEMO, CORES) as peer:
        await peer.generate([prompt], 1)
        return Run(time.perf_counter() - started_s)


async def _up(bench: Bench, stages: int) -> Run:
    arguments = ["orchestrator.cli", "up", str(DEMO), "--stages", str(stages), "--threads", str(fair_threads(stages))]
    arguments += ["--port", "0", "--grpc-port", "0", "--json", "--name", "demo", "--log-dir", str(bench.log_dir)]
    started_s = time.perf_counter()
    async with program(arguments, fair_threads(stages), own_registry(bench)) as running:
        facts = await running.read_line()
        listens_s = time.perf_counter() - started_s
        body = {"model": "demo", "prompt": "ROMEO:", "max_tokens": 2, "temperature": 0}
        return Run(listens_s + await first_text_s(f"{facts['openai']}/completions", body), listens_s)
