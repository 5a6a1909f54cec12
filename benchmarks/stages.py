"""Chains of real stage processes on this machine, as `stagecraft up` starts them, without the endpoints before them.

This process stands for the orchestrator: it runs the chain, and HTTP on loopback takes its steps to the stages.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from benchmarks import processes
from benchmarks.bench import Bench, child_environment, layout_of
from benchmarks.processes import Child
from functions.contract.checkpoint import open_checkpoint
from functions.contract.spans import BlockSpan
from orchestrator.chain import Chain, ChainSettings
from orchestrator.generation import GenerationRequest
from orchestrator.layout import Layout
from orchestrator.planner import plan_by_stages

PLAN = "benchmark"
STAGE_HOST = "127.0.0.1"
STAGE_GRACE_S = 3.0
WAKE_TIMEOUT_S = 180.0

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class StageProcess:
    child: Child
    url: str

    def peak_bytes(self) -> int:
        """The most memory the process has held so far (VmHWM of proc(5): its own and shared pages)."""
        lines = Path(f"/proc/{self.child.pid}/status").read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM:"))
        return int(peak.split()[1]) << 10

    def cpu_s(self) -> float:
        """CPU time so far, user and system."""
        return cpu_s(self.child.pid)


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, user and system."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@dataclass(frozen=True, slots=True)
class RunningChain:
    chain: Chain
    stages: tuple[StageProcess, ...]

    async def generate(self, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], list[float]]:
        """Greedy tokens, and when each of them came: seconds from the request on."""
        request = GenerationRequest(tuple(prompt), new_tokens)
        tokens, stamps_s = [], []
        started_s = time.perf_counter()
        async for token in self.chain.generate(request):
            tokens.append(token.id)
            stamps_s.append(time.perf_counter() - started_s)
        return tokens, stamps_s


def planned_spans(model: Path, stages: int) -> list[BlockSpan]:
    """Where `stagecraft up` would cut the model."""
    plan = plan_by_stages(open_checkpoint(str(model)), stages, dtype="float32")
    return [stage.blocks for stage in plan.stages]


@asynccontextmanager
async def running_chain(
    bench: Bench, model: Path, stages: int, layout: Layout | None = None
) -> AsyncIterator[RunningChain]:
    """A chain that is awake, by default in the layout that `stagecraft up` gives so many stages. Its processes end with
    the context, or with this process."""
    layout = layout or layout_of(stages)
    async with (
        laid_out_stages(bench, model, planned_spans(model, stages), layout) as running,
        chain_over(running, ChainSettings(spread=layout.spread)) as chain,
    ):
        yield chain


def laid_out_stages(
    bench: Bench, model: Path, spans: Sequence[BlockSpan], layout: Layout
) -> AbstractAsyncContextManager[list[StageProcess]]:
    """Stages that share the cores as `layout` says."""
    lock = str(bench.folder / f"cores-{next(_numbers)}.lock") if layout.in_turn else ""
    return running_stages(bench, model, spans, threads=layout.threads, cores_lock=lock)


@asynccontextmanager
async def chain_over(
    stages: Sequence[StageProcess], settings: ChainSettings | None = None
) -> AsyncIterator[RunningChain]:
    """A chain of stages that run already, awake. Several may share them, in turns."""
    settings = replace(settings or ChainSettings(), wake_timeout_s=WAKE_TIMEOUT_S)
    chain = Chain(PLAN, [stage.url for stage in stages], settings)
    try:
        await chain.start()
        yield RunningChain(chain, tuple(stages))
    finally:
        await chain.close()


@asynccontextmanager
async def running_stages(
    bench: Bench,
    model: Path,
    spans: Sequence[BlockSpan],
    *,
    threads: int,
    first: int = 0,
    count: int | None = None,
    apart: bool = False,
    cores_lock: str = "",
) -> AsyncIterator[list[StageProcess]]:
    """One process for each span, numbered from `first` of `count` stages. They may still be loading.

    `apart`: each on a core of its own (or on all of them, where there are too few)."""
    started: list[StageProcess] = []
    try:
        for index, span in enumerate(spans, first):
            started.append(await _start(bench, model, span, index, count or len(spans), threads, cores_lock))
        if apart:
            _keep_apart(started)
        yield started
    finally:
        await processes.stop([stage.child for stage in started], STAGE_GRACE_S)


def _keep_apart(stages: Sequence[StageProcess]) -> None:
    """What a process starts later, threads too, stays on the core that it is given now."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= len(stages):
        for stage, core in zip(stages, cores, strict=False):
            os.sched_setaffinity(stage.child.pid, {core})


async def _start(
    bench: Bench, model: Path, span: BlockSpan, index: int, count: int, threads: int, cores_lock: str
) -> StageProcess:
    env = {
        **child_environment(threads),
        "STAGE_MODEL": str(model),
        "STAGE_MODEL_NAME": model.name,
        "STAGE_BLOCKS": str(span),
        "STAGE_INDEX": str(index),
        "STAGE_COUNT": str(count),
        "STAGE_PLAN": PLAN,
        "STAGE_DTYPE": "float32",
        "STAGE_DEVICE": "cpu",
        "STAGE_THREADS": str(threads),
        "STAGE_CORES_LOCK": cores_lock,
        "STAGE_KV_BYTES_MAX": str(1 << 30),
    }
    with socket.create_server((STAGE_HOST, 0), backlog=1024) as sock:
        argv = [sys.executable, "-m", "functions", "--fd", str(sock.fileno())]
        log = bench.log_dir / f"stage-{next(_numbers)}.log"
        child = await Child.start(f"stage {index}", argv, env=env, log=log, pass_fds=(sock.fileno(),))
        return StageProcess(child, f"http://{STAGE_HOST}:{sock.getsockname()[1]}/")
