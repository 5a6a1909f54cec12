"""One revision of a service: replicas, activator and autoscaler, kept in step.

    every second   what queue-proxies and activator counted goes into the autoscaler's windows
    every 2 s      the autoscaler decides, the scaler bounds the decision, replicas are started or stopped
    at once        a request held at zero makes it decide now; a replica that becomes ready gets the held requests

After pkg/reconciler/autoscaling/kpa/kpa.go, pkg/autoscaler/scaling/multiscaler.go and pkg/reconciler/revision.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from knative.autoscaler.config import AutoscalerConfig, ScalerSpec, scaler_spec
from knative.autoscaler.kpa import Autoscaler, Decision
from knative.autoscaler.scale import PodScaler, Scaled
from knative.errors import KnativeError, Unavailable
from knative.images import Command
from knative.kubelet.pod import Pod
from knative.network.activator import Activator
from knative.node import Node, RevisionName
from knative.replica import Replica, start_replica, timeouts_of
from knative.resources.objects import RevisionTemplate

if TYPE_CHECKING:
    from aiohttp import web

log = structlog.get_logger()

_CLOSE_GRACE_S = 3.0  # from SIGTERM to SIGKILL, when all has to end
_GONE_LOGS_KEPT = 3
_RETRY_S = 5.0  # after a replica could not even be started
_TICK_S = 2  # the autoscaler decides every 2 s (pkg/autoscaler/scaling/multiscaler.go)


@dataclass(frozen=True, slots=True)
class LogFile:
    """What one run of a replica's process printed; `restart` counts the runs from 0."""

    pod: str
    restart: int
    path: Path


class Revision:
    """A revision's whole life, from `open` to `close`; between them `tick` is to be called every second."""

    def __init__(
        self,
        name: RevisionName,
        template: RevisionTemplate,
        node: Node,
        config: AutoscalerConfig,
        *,
        wakes: Callable[[], None] = lambda: None,
        changed: Callable[[Revision], None] = lambda revision: None,
        refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.id = name
        self.template = template
        self.replicas: list[Replica] = []
        self.created = datetime.now(UTC)
        self.failure = ""  # why it cannot serve, for people
        self.failure_reason = ""  # the same as Knative's word for it
        self.was_ready = False
        self._node = node
        self._config = config
        self._reachable = True
        self._wakes = wakes
        self._changed = changed
        self._refused = refused
        self._command: Command | None = None
        self._closed = False
        self._starting = 0
        self._retry_at_s = 0.0
        self._unready_since_s: float | None = None  # replicas have been wanted since then, and none was ready
        self._gone: deque[Pod] = deque(maxlen=_GONE_LOGS_KEPT)
        self._some_ready = asyncio.Event()
        self._at_activator = 0.0  # mean concurrency in the last second
        self._tasks: set[asyncio.Task[None]] = set()
        now_s = node.clock()
        self._spec = self._make_spec()
        self._scaler = PodScaler(self._spec, now_s)
        self._autoscaler = Autoscaler(self._spec, now_s, 0)
        self.decision: Decision | None = None
        self.scaled: Scaled | None = None
        self.wanted = 0
        self.activator = Activator(
            revision=name.name,
            container_concurrency=template.container_concurrency,
            timeouts=timeouts_of(template),
            on_stat=self._on_activator_stat,
            clock=node.clock,
        )
        self._resolve()

    # -- what the controllers above use

    @property
    def ready_replicas(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.ready]

    @property
    def _living(self) -> list[Replica]:
        return [replica for replica in self.replicas if not replica.draining]

    @property
    def idle(self) -> bool:
        """Nothing of it runs, or is about to."""
        return not self.replicas and not self._starting

    @property
    def proxied(self) -> bool:
        """The activator is in the request path."""
        return self.scaled is None or self.scaled.mode == "proxy"

    def configure(self, config: AutoscalerConfig, *, reachable: bool) -> None:
        """Takes over a changed config-autoscaler, or that a route has come or gone."""
        if (config, reachable) == (self._config, self._reachable):
            return
        self._config, self._reachable = config, reachable
        self._spec = self._make_spec()
        self._autoscaler.update(self._spec)
        self._scaler.update(self._spec)
        self._reconcile()

    @property
    def usable(self) -> bool:
        """It has had as many ready replicas as min and initial scale ask for, once; with 0 it needs none."""
        return self._scaler.initialized and (self.was_ready or not self.failure)

    @property
    def failing(self) -> bool:
        return bool(self.failure) and not self.ready_replicas

    def open(self) -> None:
        """Starts the first replicas, as many as the initial scale says."""
        if self._command is not None and self._command.preload:
            self._spawn(self._node.kubelet.warm(self._command.preload))
        self.wanted = max(self._spec.min_scale, self._scaler.initial_pods)
        self._scale_to(self.wanted, 0, "initial scale")
        self._reconcile()

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers a request that the ingress has routed here: straight to a replica when there is capacity to spare,
        through the activator when not (knative-serving: SKS modes Serve and Proxy)."""
        if not self.proxied:
            replica = min(self.ready_replicas, key=lambda one: one.proxy.in_flight, default=None)
            if replica is not None:
                return await replica.proxy.handle(request, proxied=False)
        return await self.activator.handle(request)

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Replica]:
        """A ready replica for a connection that is no HTTP/1.1, woken if need be. Raises Unavailable."""
        started_s = self._node.clock()
        while not self.ready_replicas:
            self.wake()  # first: a new replica may do what the last one could not
            if self._closed or self.failing:
                raise Unavailable(self.failure or f"{self.id.service} has been deleted")
            if self._node.clock() - started_s > self.template.response_start_timeout_s:
                raise Unavailable(f"no replica of {self.id.name} became ready in time")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._some_ready.wait(), 1.0)
        fewest = min(replica.proxy.in_flight for replica in self.ready_replicas)
        yield random.choice([one for one in self.ready_replicas if one.proxy.in_flight == fewest])

    def wake(self) -> None:
        """As if a request had come to the activator, for those who know that one will."""
        if self._asleep:
            self.activator.poke()

    @property
    def _asleep(self) -> bool:
        """Nothing runs, or is about to, that could take a request."""
        return not self._closed and not self._starting and not self._living

    def tick(self) -> None:
        """Once a second, on the whole second. In a cluster this is the scraping of the pods (collector.go)."""
        now_s = self._node.clock()
        self._record(now_s)
        self._check_progress(now_s)
        if int(now_s) % _TICK_S == 0:
            self._decide(now_s)

    @property
    def in_flight(self) -> int:
        """Requests in the replicas."""
        return sum(replica.proxy.in_flight for replica in self.replicas)

    async def close(self, *, gently: bool = False) -> None:
        """Ends all replicas, soon or once they have answered what they have. What no replica has is refused."""
        self._closed = True
        self.activator.refuse(f"{self.id.service} is being deleted")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if gently:
            self._stop_replicas(len(self.replicas))
            await asyncio.gather(*(replica.stopped() for replica in list(self.replicas)))
        grace_s = min(_CLOSE_GRACE_S, self.template.timeout_s)
        await asyncio.gather(*(replica.close(grace_s) for replica in list(self.replicas)))
        self.replicas.clear()

    # -- statistics in, decision out

    def _record(self, now_s: float) -> None:
        reports = [(replica, replica.proxy.report(now_s)) for replica in self.replicas]
        ready = [report for replica, report in reports if replica.ready]
        if ready and self._spec.scraping:
            concurrency = sum(report.concurrency - report.proxied_concurrency for report in ready)
            requests = sum(report.requests - report.proxied_requests for report in ready)
            self._autoscaler.record(now_s, max(0.0, concurrency), max(0.0, requests))
        held = self.activator.report(now_s)
        self._at_activator = 0.0 if held is None else held.concurrency
        if held is None:
            return
        self._autoscaler.record(now_s, held.concurrency, held.requests)
        if held.concurrency > 0 and (self.decision is None or not self.decision.desired):
            self._decide(now_s)  # a decision of 0 was taken while somebody waits (cmd/autoscaler/main.go, accept)

    def _on_activator_stat(self, concurrency: float) -> None:
        """The first request after a pause: with nothing running there is no time to lose (multiscaler.go, Poke)."""
        now_s = self._node.clock()
        self._autoscaler.record(now_s, concurrency, concurrency)
        if self.decision is None or not self.decision.desired:
            if self._asleep:  # min-scale keeps replicas whatever is decided
                self._node.metrics.count_cold_start(self.id)
            self._wakes()
            self._decide(now_s)

    def _decide(self, now_s: float) -> None:
        decision = self._autoscaler.decide(now_s, len(self.ready_replicas))
        if decision.valid:
            before, self.decision = self.decision, decision
            if before is None or before.desired != decision.desired or before.panic != decision.panic:
                self._say(decision, None if before is None else before.desired)
        self._reconcile()

    def _reconcile(self) -> None:
        """Brings the replicas to what is wanted."""
        if self._closed:
            return
        now_s = self._node.clock()
        ready = len(self.ready_replicas)
        have = len(self._living) + self._starting
        self.scaled = self._scaler.reconcile(self.decision, ready_pods=ready, pods=have, probed=True, now_s=now_s)
        if self.scaled.want is not None:
            self.wanted = self.scaled.want
            self._scale_to(self.scaled.want, have, self.scaled.reason)
        backends = [replica.proxy for replica in self.ready_replicas]
        self.activator.set_backends(backends)
        if backends:
            self._some_ready.set()
        else:
            self._some_ready.clear()
        if self.scaled.recheck_after_s is not None:
            self._later(self.scaled.recheck_after_s)
        self._changed(self)

    def _later(self, delay_s: float) -> None:
        if delay_s < _TICK_S / 2:
            asyncio.get_running_loop().call_later(delay_s, self._reconcile)

    def _say(self, decision: Decision, before: int | None) -> None:
        log.info(
            "scale",
            revision=self.id.name,
            desired=decision.desired,
            was=before,
            ready=len(self.ready_replicas),
            stable=round(decision.stable or 0.0, 3),
            panic=round(decision.panic_average or 0.0, 3),
            target=round(self._spec.target_value, 3),
            panic_mode=decision.panic,
            excess_burst_capacity=decision.excess_burst_capacity,
            reason=decision.reason,
        )

    # -- replicas

    def _scale_to(self, want: int, have: int, reason: str) -> None:
        if want > have:
            if self._node.clock() < self._retry_at_s:
                return
            log.info("scale_up", revision=self.id.name, replicas=want, had=have, reason=reason)
            for _ in range(want - have):
                self._start_replica()
        elif want < have:
            log.info("scale_down", revision=self.id.name, replicas=want, had=have, reason=reason)
            # those about to exist cannot be stopped yet: the next look does that
            self._stop_replicas(max(0, have - self._starting - want))

    def _stop_replicas(self, count: int) -> None:
        """Those that are not ready go first, then the youngest (as the ReplicaSet controller ranks them)."""
        for replica in sorted(self._living, key=lambda one: (one.ready, -one.created_s))[:count]:
            log.info("replica_stopping", revision=self.id.name, replica=replica.name)
            replica.stop(quiet_s=self._node.drain_quiet_s, grace_s=self.template.timeout_s, gone=self._replica_gone)

    def _replica_gone(self, replica: Replica) -> None:
        if replica in self.replicas:
            self.replicas.remove(replica)
            self._gone.append(replica.pod)
        if replica.port:
            self._node.kubelet.give_back(replica.port)
        log.info("replica_gone", revision=self.id.name, replica=replica.name)
        self._reconcile()

    def _start_replica(self) -> None:
        if self._command is None:
            return  # `failure` says why
        self._starting += 1
        self.failure = self.failure_reason = ""  # of what crashed before
        self.refuse("")
        self._spawn(self._run_replica(self._command))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_replica(self, command: Command) -> None:
        try:
            self.replicas.append(await start_replica(self._node, self.id, self.template, command))
        except (OSError, ValueError, KnativeError) as error:
            self.failure, self.failure_reason = f"cannot start a replica: {error}", "FailedCreate"
            self._retry_at_s = self._node.clock() + _RETRY_S
            log.error("replica_failed", revision=self.id.name, error=str(error))
        finally:
            self._starting -= 1
        self._changed(self)

    def pod_changed(self, pod: Pod) -> None:
        """The kubelet says that a replica's process has started, become ready, crashed or ended."""
        replica = next((one for one in self.replicas if one.pod is pod), None)
        if replica is None or replica.draining:
            return
        if pod.phase == "ready":
            self.was_ready, self.failure, self.failure_reason = True, "", ""
            self.refuse("")
        elif pod.phase == "gone":  # not by us: another takes its place
            self._retry_at_s = self._node.clock() + _RETRY_S
            replica.stop(quiet_s=0.0, grace_s=0.0, gone=self._replica_gone)
        elif pod.phase == "backoff" and self._all_crash:
            self._fail("ExitCode", pod.message)
        elif pod.phase == "starting":
            self.refuse("")
        self._reconcile()

    def refuse(self, reason: str) -> None:
        """Answers 503 with `reason` to whoever waits or comes, until it is called with "". A cluster would let them
        wait until they time out; here somebody sits before the terminal."""
        self.activator.refuse(reason)
        self._refused(reason)

    def refuse_along(self, reason: str) -> None:
        """Another service, without which this one cannot become ready, refuses."""
        if not reason or not self.ready_replicas:
            self.activator.refuse(reason)

    def _fail(self, reason: str, message: str) -> None:
        self.failure, self.failure_reason = message, reason
        self.refuse(f"{self.id.service} cannot start: {message}")

    def _check_progress(self, now_s: float) -> None:
        """A replica that starts for ever (pkg/deployment, progress deadline)."""
        if self.ready_replicas or not self._living:
            self._unready_since_s = None
            return
        if self._unready_since_s is None:
            self._unready_since_s = now_s
        deadline_s = self._spec.progress_deadline_s
        if now_s - self._unready_since_s >= deadline_s and not self.failure:
            self._fail("ProgressDeadlineExceeded", f"no replica became ready within {deadline_s:g} s; {self.waits_for}")

    @property
    def waits_for(self) -> str:
        """Why a replica is not ready yet, "" if there is nothing to say."""
        return next((one.pod.message for one in self._living if not one.ready and one.pod.message), "")

    @property
    def _all_crash(self) -> bool:
        """None of the replicas is ready, or may become so before it is started once more."""
        phases = {replica.pod.phase for replica in self.replicas if not replica.draining}
        return phases == {"backoff"} and not self._starting

    def _resolve(self) -> None:
        """Finds the command of the image. Not found is like an image that cannot be pulled: applied, but not ready."""
        try:
            self._command = self._node.images.resolve(self.template.container)
        except KnativeError as error:
            self.failure, self.failure_reason = str(error), "ContainerMissing"
            self.activator.refuse(self.failure)

    def _make_spec(self) -> ScalerSpec:
        return scaler_spec(
            self._config, self.template.annotations, self.template.container_concurrency, reachable=self._reachable
        )

    # -- what is shown

    def status(self) -> dict[str, Any]:
        """One entry of `Platform.status`."""
        stages = [replica.stage for replica in self.replicas]
        decision, scaled, spec = self.decision, self.scaled, self._spec
        now_s = self._node.clock()
        return {
            "namespace": self.id.namespace,
            "service": self.id.service,
            "revision": self.id.name,
            "generation": self.id.generation,
            "state": self.state,
            "recommended": None if decision is None else decision.desired,
            "desired": self.wanted,
            "ready": stages.count("ready"),
            "starting": stages.count("starting") + self._starting,
            "draining": stages.count("draining"),
            "failed": stages.count("failed"),
            "not_ready": len(stages) - stages.count("ready") + self._starting,
            "stable": None if decision is None else decision.stable,
            "panic": None if decision is None else decision.panic_average,
            "target": spec.target_value,
            "metric": spec.scaling_metric,
            "panic_mode": decision is not None and decision.panic,
            "mode": "proxy" if scaled is None else scaled.mode,
            "excess_burst_capacity": None if decision is None else decision.excess_burst_capacity,
            "waiting": self.activator.waiting,
            "at_activator": self._at_activator,
            "in_flight": self.in_flight,
            "min_scale": spec.min_scale,
            "max_scale": spec.max_scale,
            "message": self.failure or self.waits_for,
            "pods": [self._pod_status(replica, now_s) for replica in self.replicas],
        }

    def conditions(self) -> list[dict[str, str]]:
        """As `kubectl get revision` shows them."""
        ready = "True" if self.usable and not self.failing else ("False" if self.failing else "Unknown")
        condition = {"type": "Ready", "status": ready}
        if self.failing:
            condition |= {"reason": self.failure_reason, "message": self.failure}
        elif ready == "Unknown":
            condition |= {"reason": "Deploying", "message": self.waits_for}
        active = "True" if self.state == "Active" else "False" if self.state == "Inactive" else "Unknown"
        return [condition, {"type": "Active", "status": active}]

    def log_files(self) -> list[LogFile]:
        """What its replicas have printed, the last ones that are gone too; those of the oldest first."""
        pods = [*self._gone, *(replica.pod for replica in sorted(self.replicas, key=lambda one: one.created_s))]
        return [LogFile(pod.name, int(path.stem), path) for pod in pods for path in pod.logs()]

    @property
    def state(self) -> str:
        if self.failing:
            return "Failed"
        return (self.scaled.state if self.scaled is not None else "activating").capitalize()

    @staticmethod
    def _pod_status(replica: Replica, now_s: float) -> dict[str, Any]:
        pod = replica.pod
        return {
            "name": replica.name,
            "phase": "draining" if replica.draining else pod.phase,
            "address": replica.proxy.address,
            "pid": pod.pid,
            "restarts": pod.restarts,
            "age_s": round(now_s - replica.created_s, 1),
            "message": pod.message,
            "in_flight": replica.proxy.in_flight,
        }
