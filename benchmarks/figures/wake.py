"""Seconds from a request at zero to its first token: nothing of the model runs, the platform does.

Stages and orchestrator of 1, 2 and 4 stages are started by the platform, from interpreters that have torch imported
already (the fork server) and without. Beside them the whole model in one process, a bare HTTP server around `generate`,
and `transformers serve`, started by the very same platform from its image table. Between two runs the services are
deleted and applied anew, so each request finds no process; files are in the page cache.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import checkpoints
from benchmarks.alternate import alternate, median_ratio
from benchmarks.bench import DEMO, Bench, MeasureError
from benchmarks.platforms import RunningPlatform, deployable, running_platform, service
from benchmarks.report import Figure, Section, beside
from benchmarks.streams import first_text_s
from orchestrator.render.deployment import Scaling
from orchestrator.render.local import local_manifests

PEER = "monolith"
MONOLITH, FORKED, SERVE = "bench/monolith", "bench/monolith-forked", "bench/transformers-serve"
NEW_TOKENS = 8
PROMPT = "ROMEO:\nBut soft, what light through yonder window breaks?"
ROUNDS_MAX = 3  # a round takes most of a minute
# for everything: given two on a busy machine, one stage took seconds longer, and more stages looked faster than one
THREADS = 1
SCALING = Scaling(target=2.0, window_s=60, max_scale=1, initial_scale=0)
ASLEEP = {"initial-scale": "0", "max-scale": "1"}
GOAL = 1.15
# transformers serve gives every model a device map, for which Transformers needs this package
SERVE_NEEDS = "accelerate"


@dataclass(frozen=True, slots=True)
class Wake:
    """What is applied at zero, and where its completions are. `name` is the service that the request goes to."""

    name: str
    manifests: list[dict[str, Any]]
    path: str
    model: str

    @property
    def services(self) -> list[str]:
        return [one["metadata"]["name"] for one in self.manifests if one["kind"] == "Service"]


async def measure(bench: Bench) -> list[Section]:
    models = {"demo": DEMO}
    if not bench.quick:
        models["129M"] = await checkpoints.speaking(bench, "llama-129m", checkpoints.LLAMA_129M)
    async with AsyncExitStack() as stack:
        forking = await stack.enter_async_context(running_platform(bench, _images()))
        plain = None
        if not bench.quick:
            plain = await stack.enter_async_context(running_platform(bench, _images(), fork=False))
        return [await _model(bench, name, model, forking, plain) for name, model in models.items()]


def _images() -> dict[str, dict[str, Any]]:
    program = {"module": "benchmarks.peer_serve"}
    serve = [sys.executable, "-m", "transformers.cli.transformers", "serve", "$(MODEL)", "--device", "cpu"]
    return {
        MONOLITH: program,
        FORKED: {**program, "preload": ["benchmarks.peer_serve", "transformers.models.llama.modeling_llama"]},
        SERVE: {"command": [*serve, "--dtype", "float32", "--host", "127.0.0.1", "--port", "$(PORT)"]},
    }


async def _model(
    bench: Bench, name: str, model: Path, forking: RunningPlatform, plain: RunningPlatform | None
) -> Section:
    runs: dict[str, Callable[[], Awaitable[float]]] = {PEER: partial(_wake, forking, _process(name, model, MONOLITH))}
    for stages in bench.stage_counts:
        runs[_stages(stages)] = partial(_wake, forking, _staged(name, model, stages))
        if plain is not None:
            runs[f"{_stages(stages)}, no fork"] = partial(_wake, plain, _staged(name, model, stages))
    if not bench.quick:
        runs["monolith, fork"] = partial(_wake, forking, _process(name, model, FORKED))
    if find_spec(SERVE_NEEDS) is not None:
        runs["transformers serve"] = partial(_wake, forking, _process(name, model, SERVE))
    results = await alternate(min(bench.rounds, ROUNDS_MAX), runs, warm_up=not bench.quick)
    return Section(f"Wake: a request at zero to its first token, {name} model", _figures(name, results), _remarks())


def _figures(name: str, results: Mapping[str, list[float]]) -> list[Figure]:
    theirs = results[PEER]
    figures = [beside(f"wake {name}, {run}", "s", ours, PEER, theirs) for run, ours in results.items() if run != PEER]
    one = results.get(_stages(1))
    for run, ours in results.items():
        if one is not None and run.endswith(" stages"):
            figures.append(beside(f"wake {name}, {run} over 1", "s", ours, _stages(1), one, _verdict(ours, one)))
    return figures


def _verdict(ours: Sequence[float], one: Sequence[float]) -> str:
    return f"goal {GOAL} x {'kept' if median_ratio(ours, one) <= GOAL else 'MISSED'}"


def _remarks() -> list[str]:
    remarks = [
        "monolith: the whole model in one process, imports included; fork: from an interpreter that has imported "
        "torch. The platform starts all of them, and holds the request meanwhile. One thread for each process."
    ]
    if find_spec(SERVE_NEEDS) is None:
        remarks.append(f"transformers serve is left out: it needs the package {SERVE_NEEDS}, which is not installed.")
    return remarks


def _stages(count: int) -> str:
    return f"{count} stage{'s'[: count > 1]}"


def _staged(name: str, model: Path, stages: int) -> Wake:
    what = deployable(model, f"{name}-in-{stages}", stages, THREADS, SCALING)
    return Wake(what.service_name, local_manifests(what), "/openai/v1/completions", what.plan.name)


def _process(name: str, model: Path, image: str) -> Wake:
    env = {"MODEL": str(model), "OMP_NUM_THREADS": str(THREADS)}
    own = service(f"{image.partition('/')[2]}-{name}".lower(), image, ASLEEP, env)
    return Wake(own["metadata"]["name"], [own], "/v1/completions", str(model))


async def _wake(platform: RunningPlatform, what: Wake) -> float:
    await platform.apply(what.manifests)
    revisions = await platform.revisions()
    if any(revisions[name]["pods"] for name in what.services):
        raise MeasureError(f"{what.name} has replicas before its first request")
    body = {"model": what.model, "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0}
    try:
        return await first_text_s(platform.service_url(what.name) + what.path, body)
    finally:
        await platform.delete(what.services)
