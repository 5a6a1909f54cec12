"""Waits until services are Ready."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from knative.autoscaler.durations import parse_duration_s
from orchestrator.cluster.apply import Applied
from orchestrator.cluster.client import INFERENCE_SERVICE, SERVICE, Cluster, Kind, Tree
from orchestrator.cluster.diagnosis import diagnosis
from orchestrator.cluster.readiness import Readiness, inference_service_readiness, service_readiness

POLL_S = 1.0
SETTLE_S = 5.0  # KServe's controller has seen a change by then; its status does not tell
_PATIENCE_S_MIN = 600.0
_MARGIN_S = 60.0  # Knative tells a missed deadline a little later
_DEADLINE = "serving.knative.dev/progress-deadline"  # of a revision's template; KServe passes an InferenceService's on
_PREDICTOR = "-predictor"  # what KServe calls the Knative Service of an InferenceService


@dataclass(frozen=True, slots=True)
class Target:
    """A service that is waited for. `changed`: what it says of itself may still be from before."""

    kind: Kind
    namespace: str
    name: str
    changed: bool
    deadline_s: float = 0.0  # its progress deadline, 0 where it sets none

    @property
    def service(self) -> str:
        """The name of its Knative Service."""
        return f"{self.name}{_PREDICTOR}" if self.kind.kind == "InferenceService" else self.name

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Progress:
    """What to show meanwhile. `changed` and `failing` get one service, `looked` all of them after every look."""

    changed: Callable[[Target, Readiness], object] = lambda _target, _seen: None
    failing: Callable[[Target, Readiness, Sequence[str]], object] = lambda _target, _seen, _why: None
    looked: Callable[[Mapping[Target, Readiness]], object] = lambda _seen: None


@dataclass
class _Wait:
    cluster: Cluster
    progress: Progress
    ends_s: float
    settled_s: float
    seen: dict[Target, Readiness]
    explained: dict[Target, tuple[str, str]] = field(default_factory=dict)

    def look(self) -> None:
        """At all that are not ready yet."""
        for target, before in list(self.seen.items()):
            if before.state == "ready":
                continue
            now = self._readiness(target)
            self.seen[target] = now
            if now != before:
                self.progress.changed(target, now)
            if now.state == "failing" and self.explained.get(target) != (now.reason, now.revision):
                self.explained[target] = (now.reason, now.revision)
                self.progress.failing(target, now, self.why(target))
        self.progress.looked(self.seen)

    def why(self, target: Target) -> list[str]:
        names = (target.name, target.service)
        return diagnosis(self.cluster, target.namespace, names, self.seen[target].revision)

    def _readiness(self, target: Target) -> Readiness:
        found = self.cluster.get(target.kind, target.namespace, target.name)
        if target.kind.kind != "InferenceService":
            return service_readiness(found)
        predictor = self.cluster.get(SERVICE, target.namespace, target.service)
        settled = not target.changed or time.monotonic() >= self.settled_s
        return inference_service_readiness(found, predictor, settled=settled)


def targets(applied: Iterable[Applied]) -> list[Target]:
    """The services among the objects."""
    return [
        Target(
            one.placed.kind,
            one.placed.namespace,
            one.placed.object.name,
            one.action == "configured",
            _deadline_s(one.placed.object.tree),
        )
        for one in applied
        if (one.placed.object.group, one.placed.object.kind) in _SERVICES
    ]


def patience_s(waited_for: Iterable[Target]) -> float:
    """How long Knative itself waits for the slowest of the services, and at least ten minutes."""
    return max([_PATIENCE_S_MIN, *(target.deadline_s + _MARGIN_S for target in waited_for)])


def wait_ready(
    cluster: Cluster,
    waited_for: Sequence[Target],
    timeout_s: float,
    progress: Progress,
    *,
    poll_s: float = POLL_S,
    settle_s: float = SETTLE_S,
) -> dict[Target, tuple[Readiness, list[str]]]:
    """Looks every `poll_s` until all are ready or the time is over. What each came to, and why if it is not ready.

    One that fails is told at once and waited for all the same: it may heal. Raises ClusterError."""
    now_s = time.monotonic()
    seen = dict.fromkeys(waited_for, Readiness("waiting"))
    wait = _Wait(cluster, progress, now_s + timeout_s, now_s + settle_s, seen)
    while True:
        wait.look()
        left_s = wait.ends_s - time.monotonic()
        if left_s <= 0 or all(readiness.state == "ready" for readiness in seen.values()):
            break
        time.sleep(min(poll_s, left_s))
    return {target: (found, [] if found.state == "ready" else wait.why(target)) for target, found in seen.items()}


def _deadline_s(tree: Tree) -> float:
    template = (tree.get("spec") or {}).get("template") or {}
    for one in (template, tree):
        written = ((one.get("metadata") or {}).get("annotations") or {}).get(_DEADLINE)
        if written:
            return _seconds(str(written))
    return 0.0


def _seconds(duration: str) -> float:
    """KServe takes what is no duration; the Knative Service then tells it."""
    try:
        return parse_duration_s(duration)
    except ValueError:
        return 0.0


_SERVICES = {(kind.api_version.rpartition("/")[0], kind.kind) for kind in (SERVICE, INFERENCE_SERVICE)}
