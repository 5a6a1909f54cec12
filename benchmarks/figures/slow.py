"""One stage of three takes twice as long for each step: it should get more replicas than the others.

Clients ask for short texts all the time, each in a lane of its own. Steps of every stage are padded to a fixed time by
sleeping, twice as long in the middle, so that what is compared is scaling and not two cores. Replicas are looked at
every second, while there is load and after it.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.bench import DEMO, Bench, MeasureError
from benchmarks.platforms import RunningPlatform, deployable, running_platform
from benchmarks.report import Figure, Section, beside
from benchmarks.slow_stage import STEP_MS
from knative.images import BUILTIN
from orchestrator.render.deployment import Deployment, Scaling
from orchestrator.render.local import local_manifests
from orchestrator.render.pods import STAGE_IMAGE

IMAGE = "bench/slow-stage"
IMAGES = {IMAGE: {"module": "benchmarks.slow_stage", "preload": list(BUILTIN[STAGE_IMAGE].preload),
                  "env": dict(BUILTIN[STAGE_IMAGE].env)}}  # fmt: skip
STAGES, SLOW = 3, 1
FACTOR = 2
SCALING = Scaling(target=2.0, window_s=10, max_scale=8, initial_scale=0, grace_s=3.0)
PROMPTS = ("ROMEO:", "JULIET:", "First Citizen:", "KING HENRY:")
LOOK_EVERY_S = 1.0
REQUEST_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Size:
    step_ms: int  # of the stages that are not slow
    new_tokens: int
    clients: int
    load_s: float
    after_s: float  # looked at when there is no load any more
    prompts: int


FULL = Size(60, 16, 16, 90.0, 30.0, len(PROMPTS))
QUICK = Size(10, 3, 3, 2.0, 0.0, 1)


@dataclass(slots=True)
class Seen:
    """Ready replicas of each stage at each look; seconds count from the first request of the load."""

    times_s: list[float] = field(default_factory=list)
    replicas: list[list[int]] = field(default_factory=lambda: [[] for _ in range(STAGES)])

    def between(self, start_s: float, end_s: float, stage: int) -> list[int]:
        found = zip(self.times_s, self.replicas[stage], strict=True)
        return [count for seen_s, count in found if start_s <= seen_s <= end_s]


async def measure(bench: Bench) -> list[Section]:
    size = QUICK if bench.quick else FULL
    what = deployable(DEMO, "slow", STAGES, 1, SCALING, lane_width=1, kv_bytes_max=64 << 20)
    async with running_platform(bench, IMAGES) as platform, _session() as session:
        await platform.apply(_padded(what, size))
        ask = _Asker(session, f"{platform.service_url(what.service_name)}/openai/v1/completions", what.plan.name, size)
        # one after another, so by one replica of each stage
        expected = {prompt: await ask(prompt) for prompt in PROMPTS[: size.prompts]}
        seen = Seen()
        started_s = time.monotonic()
        watch = asyncio.create_task(_watch(platform, what, seen, started_s))
        try:
            answers = await _load(ask, expected, started_s + size.load_s, size.clients)
            load_s = time.monotonic() - started_s
            await asyncio.sleep(size.after_s)
        finally:
            watch.cancel()
            await asyncio.wait([watch])
    return [_section(size, seen, load_s, answers)]


def _padded(what: Deployment, size: Size) -> list[dict[str, Any]]:
    """The manifests of the plan, with the padded stage for the product's."""
    changed = local_manifests(what)
    for manifest in changed:
        name = manifest["metadata"]["name"]
        if name in what.stage_names:
            (container,) = manifest["spec"]["template"]["spec"]["containers"]
            container["image"] = IMAGE
            container["env"].append({"name": STEP_MS, "value": str(_step_ms(size, what.stage_names.index(name)))})
    return changed


def _step_ms(size: Size, stage: int) -> int:
    return size.step_ms * (FACTOR if stage == SLOW else 1)


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    )


@dataclass(frozen=True, slots=True)
class _Asker:
    session: aiohttp.ClientSession
    url: str
    model: str
    size: Size

    async def __call__(self, prompt: str) -> str:
        """The greedy text. Raises MeasureError."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": self.size.new_tokens, "temperature": 0}
        try:
            async with self.session.post(self.url, json=body) as response:
                if response.status != 200:
                    raise MeasureError(f"a completion failed with {response.status}: {(await response.text())[:500]}")
                answer = await response.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise MeasureError(f"a completion failed: {type(error).__name__} {error}") from None
        return str(answer["choices"][0]["text"])


async def _load(ask: _Asker, expected: Mapping[str, str], ends_s: float, clients: int) -> int:
    """How many texts were asked for, all of them as expected. Raises MeasureError."""

    async def client(prompts: Sequence[str]) -> int:
        count = 0
        for prompt in itertools.cycle(prompts):
            if time.monotonic() >= ends_s:
                break
            text = await ask(prompt)
            if text != expected[prompt]:
                raise MeasureError(f"to {prompt!r} a single replica answered {expected[prompt]!r}, several {text!r}")
            count += 1
        return count

    prompts = list(expected)
    turns = [prompts[index % len(prompts) :] + prompts[: index % len(prompts)] for index in range(clients)]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(client(turn)) for turn in turns]
    except* MeasureError as failed:
        raise failed.exceptions[0] from None
    return sum(task.result() for task in tasks)


async def _watch(platform: RunningPlatform, what: Deployment, seen: Seen, started_s: float) -> None:
    for look in itertools.count():
        await asyncio.sleep(started_s + look * LOOK_EVERY_S - time.monotonic())
        revisions = await platform.revisions()
        seen.times_s.append(time.monotonic() - started_s)
        for counts, name in zip(seen.replicas, what.stage_names, strict=True):
            counts.append(revisions[name]["ready"])


def _section(size: Size, seen: Seen, load_s: float, answers: int) -> Section:
    under_load = [seen.between(0, load_s, stage) for stage in range(STAGES)]
    figures = [_of_stage(size, stage, counts) for stage, counts in enumerate(under_load)]
    means = [statistics.fmean(counts) for counts in under_load]
    others = statistics.fmean(mean for stage, mean in enumerate(means) if stage != SLOW)
    note = f"{answers} texts in {load_s:.0f} s, all the same as from single replicas"
    figures.append(beside("replicas, slow stage", "mean", [means[SLOW]], "other stages", [others], note))
    remarks = [f"{size.clients} clients for {load_s:.0f} s; target {SCALING.target:g}, window {SCALING.window_s} s."]
    series = {
        _label(size, stage): list(zip(seen.times_s, map(float, seen.replicas[stage]), strict=True))
        for stage in range(STAGES)
    }
    return Section("Slow: ready replicas of each stage", figures, remarks, series)


def _of_stage(size: Size, stage: int, counts: Sequence[int]) -> Figure:
    """The mean over the time; the range is that over the time too."""
    return Figure(
        f"replicas, {_label(size, stage)}", statistics.fmean(counts), "mean", 1, float(min(counts)), float(max(counts))
    )


def _label(size: Size, stage: int) -> str:
    return f"stage {stage}, {_step_ms(size, stage)} ms a step"
