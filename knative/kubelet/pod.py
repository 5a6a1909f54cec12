"""A pod: one replica's process through all its runs, until it is terminated.

pending --> starting --> ready <--> unready        draining --> gone
               ^  |        |           |           (from any phase, by terminate)
               |  v        v           v
               +--backoff (not after the first crash)
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import aiohttp
import structlog

from knative.images import Command
from knative.kubelet import health, logs, ports
from knative.kubelet.agent import Start
from knative.kubelet.agents import AgentGone, Agents, Process, how_it_ended
from knative.kubelet.backoff import Backoff
from knative.kubelet.gpus import Gpus
from knative.kubelet.probes import Prober, describe
from knative.resources.objects import Probe

PodPhase = Literal["pending", "starting", "ready", "unready", "backoff", "draining", "gone"]
T = TypeVar("T")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class PodSpec:
    """What to run. `env` comes on top of the platform's own environment and the command's."""

    name: str  # unique among the pods of a kubelet
    command: Command
    env: Mapping[str, str]
    readiness: Probe
    liveness: Probe | None
    startup: Probe | None
    grace_s: float  # from SIGTERM to SIGKILL
    working_dir: str = ""  # "": the platform's
    gpus: int = 0
    cpus: float = 0.0  # 0: not said


@dataclass(frozen=True, slots=True)
class Machine:
    """What a pod needs of the machine it runs on."""

    agents: Agents
    gpus: Gpus
    session: aiohttp.ClientSession  # for probes
    logs: Path
    backoff_s: float


class Pod:
    """Made by `Kubelet.run`. Needs a running event loop; `on_change` is called at every change of phase.

    `message` says for people why the pod is not ready; `pid` is None while no process runs; `started_s` and `ready_s`
    are Unix times of the present run, 0 if not yet."""

    def __init__(self, spec: PodSpec, port: int, machine: Machine, on_change: Callable[[Pod], None]) -> None:
        self.spec = spec
        self.name = spec.name
        self.port = port
        self.phase: PodPhase = "pending"
        self.message = ""
        self.restarts = 0
        self.started_s = self.ready_s = 0.0
        self._machine = machine
        self._on_change = on_change
        self._folder = machine.logs / spec.name
        self._process: Process | None = None
        self._last_end = ""  # how the run before ended
        self._stop = asyncio.Event()
        self._grace_over = False
        self._life = asyncio.create_task(self._live(), name=f"pod {spec.name}")

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def logs(self) -> list[Path]:
        """What the present run and the one before printed, oldest first; a file is named after its restart number."""
        return logs.runs(self._folder)

    def kill(self, number: signal.Signals) -> None:
        """Signals the process, with SIGKILL its group too. No error if none runs; one that ends is restarted."""
        if self._process is not None:
            self._process.send(number)

    async def terminate(self, grace_s: float | None = None) -> None:
        """SIGTERM, after `grace_s` (the spec's if None) SIGKILL; returns when nothing of it is left.

        May be called again with less grace, and cancelled: the pod still ends."""
        grace_s = self.spec.grace_s if grace_s is None else grace_s
        self._stop.set()
        timer = asyncio.get_running_loop().call_later(grace_s, self._end_grace)
        if grace_s <= 0:
            self._end_grace()
        await asyncio.wait((self._life,))
        timer.cancel()

    def _end_grace(self) -> None:
        self._grace_over = True
        self.kill(signal.SIGKILL)

    # -- life

    async def _live(self) -> None:
        devices: tuple[str, ...] = ()
        backoff = Backoff(self._machine.backoff_s)
        try:
            devices = await self._devices()
            while True:
                began_s = time.monotonic()
                self._last_end = await self._run(devices)
                await self._back_off(backoff.after_run(time.monotonic() - began_s))
                self.restarts += 1
        except _Stopped:
            pass
        except Exception:  # a mistake of ours: the pod goes, the platform stays
            log.exception("pod_failed", pod=self.name)
        finally:
            self._machine.gpus.give_back(devices)
            self._change("gone", self._last_end)

    async def _devices(self) -> tuple[str, ...]:
        if not self.spec.gpus:
            return ()
        turn = self._machine.gpus.ask(self.spec.gpus)
        if not turn.done():
            self.message = self._machine.gpus.shortage(self.spec.gpus)
            log.info("pod_pending", pod=self.name, reason=self.message)
        return await self._or_stop(turn)

    async def _run(self, devices: tuple[str, ...]) -> str:
        """One run of the process. How it ended, for people."""
        self.started_s, self.ready_s = time.time(), 0.0
        self._change("starting", self._with_last_end(f"waiting for {describe(self.spec.readiness, self.port)}"))
        if not ports.is_free(self.port):  # whoever listens there would also answer our probes
            return f"was not started: port {self.port} is taken by another program"
        command = self.spec.command
        env = self._environment(devices)
        try:
            file = logs.start_log(self._folder, self.restarts)
            # an import may take long and is not to be waited for when the pod has to go; the start itself is short
            await self._or_stop(self._machine.agents.warm(command.preload))
            argv = () if command.module else command.argv
            start = Start(argv, command.module, command.args, env, self.spec.working_dir, str(file))
            self._process = process = await self._machine.agents.run(start, command.preload)
        except (AgentGone, OSError) as error:
            return f"could not be started: {error}"
        log.info("process_started", pod=self.name, pid=process.pid, port=self.port, restart=self.restarts)
        try:
            return await self._watch(process, env, file)
        finally:
            process.send(signal.SIGKILL)  # only if this task was cancelled does it still run
            self._process = None

    async def _watch(self, process: Process, env: Mapping[str, str], file: Path) -> str:
        prober = Prober(self._machine.session, self.port, lambda command: self._probe_command(command, env))
        watching = asyncio.create_task(
            health.watch(
                self.spec.readiness,
                self.spec.liveness,
                self.spec.startup,
                attempt=prober.attempt,
                report=self._report,
            )
        )
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((process.ended, watching, stop), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel((watching, stop))
        failed = "" if watching.cancelled() else watching.result()
        if self._stop.is_set():
            await self._end(process, math.inf)  # until the timer of `terminate`
            raise _Stopped
        if not process.ended.done():
            self._change("unready", failed)
            await self._end(process, self.spec.grace_s)
        return self._describe_end(process.ended.result(), failed, file)

    async def _end(self, process: Process, grace_s: float) -> None:
        """SIGTERM, `grace_s`, SIGKILL. Returns when the process has gone."""
        if self._stop.is_set():
            self._change("draining", "")
        process.send(signal.SIGKILL if self._grace_over else signal.SIGTERM)
        await asyncio.wait((process.ended,), timeout=None if grace_s == math.inf else grace_s)
        process.send(signal.SIGKILL)
        await asyncio.wait((process.ended,))

    async def _back_off(self, delay_s: float) -> None:
        log.warning("process_ended", pod=self.name, reason=self._last_end, restart_in_s=delay_s)
        if delay_s:
            at = time.strftime("%H:%M:%S", time.localtime(time.time() + delay_s))
            self._change("backoff", f"{self._last_end}; back-off of {delay_s:g} s until {at}")
            await self._or_stop(asyncio.sleep(delay_s))

    # -- details

    def _environment(self, devices: tuple[str, ...]) -> dict[str, str]:
        """A pod without GPUs of its own keeps the platform's CUDA_VISIBLE_DEVICES. Kubernetes would show it none; but
        on a laptop a manifest without a request would then silently run on the CPU."""
        said = {**self.spec.command.env, **self.spec.env}
        given = {"PORT": str(self.port)}
        if devices:
            given["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        if self.spec.cpus and "OMP_NUM_THREADS" not in said:
            given["OMP_NUM_THREADS"] = str(math.ceil(self.spec.cpus))
        return {**os.environ, "PYTHONUNBUFFERED": "1", **said, **given}

    async def _probe_command(
        self, command: tuple[str, ...], env: Mapping[str, str]
    ) -> tuple[Process, Callable[[], str]]:
        file = self._folder / "probe.log"
        start = Start(command, "", (), env, self.spec.working_dir, str(file))
        process = await self._machine.agents.run(start)
        return process, lambda: " ".join(logs.last_lines(file)) or "nothing printed"

    def _report(self, ready: bool, failure: str) -> None:
        if ready and self.phase != "ready":
            self.ready_s = self.ready_s or time.time()
            self._change("ready", "")
            log.info("process_ready", pod=self.name, took_s=round(self.ready_s - self.started_s, 3))
        elif self.phase == "ready" and not ready:
            self._change("unready", failure)
            log.warning("process_unready", pod=self.name, reason=failure)
        elif failure and not ready:
            self.message = self._with_last_end(failure) if self.phase == "starting" else failure

    def _with_last_end(self, text: str) -> str:
        return f"{text}; the run before: {self._last_end}" if self._last_end else text

    def _describe_end(self, code: int, failed_probe: str, file: Path) -> str:
        if failed_probe:
            return f"{failed_probe}; stopped with {how_it_ended(code)}"
        printed = " ".join(logs.last_lines(file)) or "nothing"
        return f"ended with {how_it_ended(code)}, last printed: {printed}"

    def _change(self, phase: PodPhase, message: str) -> None:
        self.message = message
        if phase != self.phase:
            self.phase = phase
            self._on_change(self)

    async def _or_stop(self, work: Awaitable[T]) -> T:
        """The result of `work`, unless the pod is to end before: then `work` is cancelled. Raises _Stopped."""
        task, stop = asyncio.ensure_future(work), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _Stopped
            return task.result()
        finally:
            await _cancel((task, stop))


class _Stopped(Exception):
    """The pod is to end."""


async def _cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
