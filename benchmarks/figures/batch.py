"""Jobs per second of a batch, beside the same requests sent interactively at the best concurrency.

One platform runs two stages, the orchestrator and the results service, all of them warm. `stagecraft batch submit
--wait` sends the jobs as events, and they go through broker, Trigger, orchestrator and results service; its time is
that from when the batch was made, just before its first request is sent, until its last result was written. The peer
asks the same orchestrator for the same completions, over as many connections as served it best, by a client that costs
next to nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import checkpoints
from benchmarks.alternate import alternate, median_ratio
from benchmarks.bench import CORES, DEMO, ROOT, Bench, MeasureError, child_environment, fair_threads
from benchmarks.http_load import Target, answers
from benchmarks.platforms import RunningPlatform, deployable, running_platform
from benchmarks.report import Figure, Section, beside
from orchestrator.render.batch import results_name
from orchestrator.render.deployment import Batch, Deployment, Scaling
from orchestrator.render.local import local_manifests

STAGES = 2
CONCURRENCY = (8, 16, 32, 64, 128)
WAVES = 4  # of requests, while the best of them is looked for
FINALISTS = 2  # take part in the rounds; the better one is the peer
PEER, BATCH = "interactive", "batch"
GOAL = 0.95
ROUNDS_MAX = 3  # a run takes some 15 s
# long windows: nothing goes to zero between two rounds
SCALING = Scaling(target=1000.0, window_s=600, min_scale=1, max_scale=1)
# the vocabulary is that of the demonstration model, whose tokenizer goes with it
SPEAKING_82M = checkpoints.LLAMA_82M | {"vocab_size": checkpoints.vocab_size(DEMO)}
WORDS = ("thou", "art", "more", "lovely", "rough", "winds", "do", "shake", "the", "darling", "buds", "of", "may")

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Load:
    """So many jobs, each with an answer of `new_tokens`."""

    jobs: int
    new_tokens: int


FULL = {"demo": (Load(1000, 16), Load(256, 64)), "82M": (Load(200, 16),)}
QUICK = {"demo": (Load(8, 16),)}


@dataclass(frozen=True, slots=True)
class Run:
    """`texts` in the order of the jobs."""

    jobs_per_s: float
    texts: list[str]


async def measure(bench: Bench) -> list[Section]:
    loads, models = (QUICK if bench.quick else FULL), {"demo": DEMO}
    if "82M" in loads:
        models["82M"] = await checkpoints.speaking(bench, "llama-82m-speaking", SPEAKING_82M)
    figures = [figure for name, some in loads.items() for figure in await _model(bench, name, models[name], some)]
    remarks = [
        "Some 10 tokens in. All processes and the clients share two cores. The number at once is the best of "
        f"{', '.join(map(str, CONCURRENCY))}: the better of the two that won a short run, by their rounds."
    ]
    return [Section(f"Batch: jobs through broker and results service, {STAGES} stages", figures, remarks)]


async def _model(bench: Bench, name: str, model: Path, loads: Sequence[Load]) -> list[Figure]:
    what = deployable(model, name.lower(), STAGES, fair_threads(STAGES), SCALING)
    what = replace(what, batch=Batch(results_file=str(bench.folder / f"{name}-results.sqlite")))
    async with running_platform(bench, {}) as platform:
        await platform.apply(local_manifests(what))
        await _interactive(platform, what, _jobs(Load(2, 2), what.plan.name), 1)  # once all stages are up
        return [await _compare(bench, f"batch {name}", platform, what, load) for load in loads]


async def _compare(bench: Bench, name: str, platform: RunningPlatform, what: Deployment, load: Load) -> Figure:
    jobs = _jobs(load, what.plan.name)
    runs = {
        f"{PEER}, {connections} at once": partial(_interactive, platform, what, jobs, connections)
        for connections in await _best(platform, what, jobs)
    }
    results = await alternate(
        min(bench.rounds, ROUNDS_MAX), {**runs, BATCH: partial(_batch, bench, platform, what, jobs)}
    )
    rates = {way: [run.jobs_per_s for run in found] for way, found in results.items()}
    peer = max(runs, key=lambda way: statistics.median(rates[way]))
    ours, theirs = rates[BATCH], rates[peer]
    note = f"{load.jobs} jobs, goal {GOAL} x {'kept' if median_ratio(ours, theirs) >= GOAL else 'MISSED'}"
    full = f"{name}, {load.new_tokens} tokens out"
    return beside(full, "jobs/s", ours, peer, theirs, note + _differing(results[peer][0], results))


def _jobs(load: Load, model: str) -> list[dict[str, Any]]:
    """Bodies of completions; the same ones each time."""
    same = {"model": model, "max_tokens": load.new_tokens, "temperature": 0}
    return [{**same, "prompt": _prompt(number)} for number in range(load.jobs)]


def _prompt(number: int) -> str:
    words = [WORDS[number // len(WORDS) ** place % len(WORDS)] for place in range(3)]
    return f"{' '.join(words).capitalize()}, "


async def _best(platform: RunningPlatform, what: Deployment, jobs: Sequence[dict[str, Any]]) -> list[int]:
    """The concurrencies with the most jobs per second, of one short run each: too rough to choose the very best."""
    found = {}
    for connections in (count for count in CONCURRENCY if count <= len(jobs)):
        some = jobs[: WAVES * connections]
        found[connections] = (await _interactive(platform, what, some, connections)).jobs_per_s
    return sorted(found, key=lambda connections: -found[connections])[:FINALISTS]


async def _interactive(
    platform: RunningPlatform, what: Deployment, jobs: Sequence[dict[str, Any]], connections: int
) -> Run:
    path = f"/{what.namespace}/{what.service_name}/openai/v1/completions"
    headers = {"content-type": "application/json"}
    targets = [Target(platform.address, path, json.dumps(job).encode(), headers) for job in jobs]
    started_s = time.perf_counter()
    found = await answers(targets, connections)
    wall_s = time.perf_counter() - started_s
    return Run(len(jobs) / wall_s, [json.loads(answer)["choices"][0]["text"] for answer in found])


async def _batch(bench: Bench, platform: RunningPlatform, what: Deployment, jobs: Sequence[dict[str, Any]]) -> Run:
    name = f"batch-{next(_numbers)}"
    requests, output = bench.folder / f"{name}.jsonl", bench.folder / f"{name}.results.jsonl"
    requests.write_text("".join(json.dumps(_line(number, job)) + "\n" for number, job in enumerate(jobs)))
    facts = await _submit(bench, requests, output, platform, what)
    wall_s = output.stat().st_mtime - facts["created_s"]
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    texts = {line["custom_id"]: _text(line) for line in lines}
    if len(lines) != len(jobs) or len(texts) != len(jobs):
        raise MeasureError(f"{len(jobs)} jobs have {len(lines)} results for {len(texts)} of them")
    return Run(len(jobs) / wall_s, [texts[str(number)] for number in range(len(jobs))])


def _line(number: int, job: dict[str, Any]) -> dict[str, Any]:
    return {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": job}


def _text(line: dict[str, Any]) -> str:
    if line["error"] or line["response"]["status_code"] != 200:
        raise MeasureError(f"a job failed: {json.dumps(line)[:500]}")
    text: str = line["response"]["body"]["choices"][0]["text"]
    return text


async def _submit(
    bench: Bench, requests: Path, output: Path, platform: RunningPlatform, what: Deployment
) -> dict[str, Any]:
    """What `stagecraft batch submit --json` prints."""
    assert what.batch is not None
    argv = [sys.executable, "-m", "orchestrator.cli", "batch", "submit", str(requests), "-o", str(output), "--wait"]
    argv += ["--json", "--broker", platform.service_url(what.batch.broker)]
    argv += ["--results", platform.service_url(results_name(what)), "--model", what.plan.name]
    log = bench.log_dir / f"{output.stem}.log"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *argv,
            cwd=ROOT,
            env={**child_environment(CORES), "XDG_STATE_HOME": str(bench.folder / "state")},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
        )
        printed, _ = await process.communicate()
    if process.returncode != 0:
        raise MeasureError(f"`stagecraft batch submit` ended with {process.returncode}: {log.read_text()[-2000:]}")
    facts: dict[str, Any] = json.loads(printed)
    return facts


def _differing(expected: Run, results: Mapping[str, Sequence[Run]]) -> str:
    texts = [one for runs in results.values() for run in runs for one in zip(run.texts, expected.texts, strict=True)]
    same = sum(ours == theirs for ours, theirs in texts)
    return "" if same == len(texts) else f"; {same} of {len(texts)} texts are those of the peer's first run"
