"""Seconds from the start of the process to the first token: `stagecraft up` with its endpoints, the stages alone with
a chain before them, and a plain Transformers process. All with the demonstration model and files in the page cache.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import httpx

from benchmarks import checkpoints
from benchmarks.alternate import alternate
from benchmarks.bench import CORES, DEMO, Bench, MeasureError, fair_threads
from benchmarks.peers import program, transformers_peer
from benchmarks.prompts import random_prompts
from benchmarks.report import Figure, Section, beside
from benchmarks.stages import running_chain

PEER = "Transformers"
PROMPT_TOKENS = 16
ALONE = 2  # how many stages are also started without endpoints
REQUEST_TIMEOUT_S = 60.0
LOADING = re.compile(r"^stagecraft_stage_load_seconds (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Run:
    """Seconds from the start on. `loading_s` is the longest of the stages' own loading, part of `ready_s`."""

    first_token_s: float
    ready_s: float = 0.0
    loading_s: float = 0.0


async def measure(bench: Bench) -> list[Section]:
    runs: dict[str, Callable[[], Awaitable[Run]]] = {PEER: _transformers}
    runs |= {f"up, {_stages(stages)}": partial(_up, bench, stages) for stages in bench.stage_counts}
    runs[f"stages alone, {_stages(ALONE)}"] = partial(_chain, bench, ALONE)
    if not bench.quick:
        await _transformers()  # brings the libraries into the page cache
    results = await alternate(bench.rounds, runs, warm_up=False)
    theirs = [run.first_token_s for run in results.pop(PEER)]
    figures = [_figure(name, found, theirs) for name, found in results.items()]
    remarks = ["The peer: start Python, import, from_pretrained, one token from generate."]
    return [Section("Start to first token, demonstration model", figures, remarks)]


def _figure(name: str, runs: list[Run], theirs: list[float]) -> Figure:
    note = ""
    if runs[0].ready_s:
        middle = sorted(runs, key=lambda run: run.first_token_s)[len(runs) // 2]
        note = (
            f"all ready after {middle.ready_s:.2f} s (of it {middle.loading_s:.2f} s loading weights in the slowest "
            f"stage, the rest mostly imports), the request {middle.first_token_s - middle.ready_s:.2f} s"
        )
    return beside(f"first token, {name}", "s", [run.first_token_s for run in runs], PEER, theirs, note)


def _stages(count: int) -> str:
    return f"{count} stage{'s'[: count > 1]}"


def _prompt() -> list[int]:
    return random_prompts(1, PROMPT_TOKENS, checkpoints.vocab_size(DEMO))[0]


async def _transformers() -> Run:
    started_s = time.perf_counter()
    async with transformers_peer(DEMO, CORES) as peer:
        await peer.generate([_prompt()], 1)
        return Run(time.perf_counter() - started_s)


async def _chain(bench: Bench, stages: int) -> Run:
    started_s = time.perf_counter()
    async with running_chain(bench, DEMO, stages, fair_threads(stages)) as chain:
        ready_s = time.perf_counter() - started_s
        await chain.generate(_prompt(), 1)
        first_s = time.perf_counter() - started_s
        return Run(first_s, ready_s, await _loading_s([stage.url for stage in chain.stages]))


async def _up(bench: Bench, stages: int) -> Run:
    arguments = ["orchestrator.cli", "up", str(DEMO), "--stages", str(stages), "--threads", str(fair_threads(stages))]
    arguments += ["--port", "0", "--grpc-port", "0", "--json", "--name", "demo", "--log-dir", str(bench.log_dir)]
    started_s = time.perf_counter()
    async with program(arguments, fair_threads(stages)) as running:
        facts = await running.read_line()
        ready_s = time.perf_counter() - started_s
        await _first_token(facts["openai"])
        first_s = time.perf_counter() - started_s
        return Run(first_s, ready_s, await _loading_s([f"{stage['url']}/" for stage in facts["stages"]]))


async def _first_token(url: str) -> None:
    """Returns when the first event of the stream is there."""
    body = {"model": "demo", "prompt": "ROMEO:", "max_tokens": 2, "temperature": 0, "stream": True}
    async with (
        httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, trust_env=False) as client,
        client.stream("POST", f"{url}/completions", json=body) as response,
    ):
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                return
    raise MeasureError("the endpoint answered without a token")


async def _loading_s(urls: list[str]) -> float:
    """The longest time that a stage's own metrics give for its loading."""
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, trust_env=False) as client:
        pages = [(await client.get(f"{url}metrics")).text for url in urls]
    return max(float(value) for page in pages for value in LOADING.findall(page))
