"""The probes of one run of a pod: startup first, then readiness and liveness beside each other.

After pkg/kubelet/prober/worker.go (thresholds) and pkg/queue/readiness/probe.go (aggressive readiness).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from knative.kubelet import probes
from knative.resources.objects import Probe

Attempt = Callable[[Probe, float], Awaitable[str]]  # probe and time-out in seconds to failure, "" for success
Report = Callable[[bool, str], None]  # whether ready, and if not, why

RECOVERY_PERIOD_S = 1.0  # aggressive readiness, once it has been lost


class Readiness:
    """Counts results against the thresholds, and says when and how patiently to try next."""

    def __init__(self, probe: Probe) -> None:
        self.ready = False
        self._probe = probe
        self._was_ready = False
        self._successes = self._failures = 0

    def add(self, succeeded: bool) -> None:
        self._successes, self._failures = (self._successes + 1, 0) if succeeded else (0, self._failures + 1)
        if self._successes >= self._probe.success_threshold:
            self.ready = self._was_ready = True
        elif self._failures >= self._probe.failure_threshold:
            self.ready = False

    @property
    def period_s(self) -> float:
        if self._probe.period_s:
            return self._probe.period_s
        if self.ready:
            return probes.DEFAULT_PERIOD_S
        if self._was_ready:
            return RECOVERY_PERIOD_S
        return probes.EXEC_PERIOD_S if self._probe.kind == "exec" else probes.AGGRESSIVE_PERIOD_S

    @property
    def timeout_s(self) -> float:
        aggressive = self._probe.period_s == 0 and self._probe.kind != "exec" and not self._was_ready
        return probes.AGGRESSIVE_TIMEOUT_S if aggressive else self._probe.timeout_s


async def watch(
    readiness: Probe, liveness: Probe | None, startup: Probe | None, *, attempt: Attempt, report: Report
) -> str:
    """Returns why the process has to be restarted. `report` is called after every readiness result."""
    if startup is not None and (failure := await _failed_often(startup, attempt, once_is_enough=True)):
        return f"startup probe failed: {failure}"
    ready = asyncio.create_task(_watch_readiness(readiness, attempt, report))
    try:
        if liveness is None:
            await ready  # for ever
            raise AssertionError("readiness is watched until cancelled")
        alive = asyncio.create_task(_failed_often(liveness, attempt, once_is_enough=False))
        try:
            await asyncio.wait((ready, alive), return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
            return f"liveness probe failed: {alive.result()}"
        finally:
            await _cancel(alive)
    finally:
        await _cancel(ready)


async def _watch_readiness(probe: Probe, attempt: Attempt, report: Report) -> None:
    state = Readiness(probe)
    await asyncio.sleep(probe.initial_delay_s)
    while True:
        failure = await attempt(probe, state.timeout_s)
        state.add(not failure)
        report(state.ready, f"readiness probe failed: {failure}" if failure else "")
        await asyncio.sleep(state.period_s)


async def _failed_often(probe: Probe, attempt: Attempt, *, once_is_enough: bool) -> str:
    """The last of `failure_threshold` failures in a row; "" after a success, if that is enough."""
    failures = 0
    await asyncio.sleep(probe.initial_delay_s)
    while True:
        failure = await attempt(probe, probe.timeout_s)
        if not failure and once_is_enough:
            return ""
        failures = failures + 1 if failure else 0
        if failures >= probe.failure_threshold:
            return failure
        await asyncio.sleep(probe.period_s or probes.DEFAULT_PERIOD_S)


async def _cancel(task: asyncio.Task[object]) -> None:
    task.cancel()
    await asyncio.wait((task,))
