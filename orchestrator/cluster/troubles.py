"""What keeps pods from running, from their status and the events about them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Tree = Mapping[str, Any]

EVENTS_MAX = 3
_NORMAL_WAITS = ("ContainerCreating", "PodInitializing")
_KNATIVES = ("queue-proxy",)  # the containers that Knative adds


@dataclass(frozen=True, slots=True)
class Trouble:
    """Of a pod or one of its containers. `container` is "" for the pod as a whole."""

    pod: str
    container: str
    reason: str
    message: str = ""

    def __str__(self) -> str:
        where = f"pod {self.pod}, {self.container}" if self.container else f"pod {self.pod}"
        return f"{where}: {': '.join(part for part in (self.reason, self.message) if part)}"


def pod_troubles(pod: Tree) -> list[Trouble]:
    """What is wrong with a pod; empty for one that is as it should be."""
    name = str(pod["metadata"]["name"])
    status = pod.get("status") or {}
    found = list(_unscheduled(name, status))
    for container in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
        found += _container_troubles(name, container)
    if not found and status.get("reason"):  # such as Evicted
        found.append(Trouble(name, "", str(status["reason"]), str(status.get("message") or "")))
    return found


def logs_to_read(pod: Tree) -> list[tuple[str, bool]]:
    """Containers whose logs may tell why the pod is not ready, and whether to read that of the run before."""
    status = pod.get("status") or {}
    found = []
    for container in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
        state, before = container.get("state") or {}, (container.get("lastState") or {}).get("terminated")
        ended_well = (state.get("terminated") or {}).get("exitCode") == 0
        if container["name"] in _KNATIVES or container.get("ready") or ended_well:
            continue
        if "running" in state or "terminated" in state or before:
            found.append((str(container["name"]), bool(before) and "running" not in state))
    return found


def warnings_about(events: Iterable[Tree], *, names: Sequence[str], revision: str) -> list[str]:
    """The newest warnings about objects called so and about what belongs to the revision, oldest first; repeated ones
    once."""
    about = [event for event in events if _is_about(_subject(event), names, revision)]
    texts = [f"{_subject(event)}: {event.get('reason')}: {event.get('message')}" for event in sorted(about, key=_when)]
    newest = list(dict.fromkeys(reversed(texts)))[:EVENTS_MAX]
    return newest[::-1]


def _is_about(subject: str, names: Sequence[str], revision: str) -> bool:
    """A revision's deployment, replica sets and pods are called after it."""
    return subject in names or (bool(revision) and (subject == revision or subject.startswith(f"{revision}-")))


def _unscheduled(name: str, status: Tree) -> Iterator[Trouble]:
    for one in status.get("conditions") or ():
        if one.get("type") == "PodScheduled" and one.get("status") == "False":
            yield Trouble(name, "", str(one.get("reason") or "Unschedulable"), str(one.get("message") or ""))


def _container_troubles(pod: str, container: Tree) -> Iterator[Trouble]:
    name = str(container["name"])
    state = container.get("state") or {}
    ended = state.get("terminated") or (container.get("lastState") or {}).get("terminated") or {}
    waiting = state.get("waiting") or {}
    crashed = bool(ended) and ended.get("exitCode") != 0
    if crashed and not container.get("ready"):
        count = int(container.get("restartCount") or 0)
        again = f"{count} restart{'s'[: count != 1]}" if count else ""
        detail = ", ".join(part for part in (f"exit code {ended.get('exitCode')}", again, _text(ended)) if part)
        reason = str(waiting.get("reason") or ended.get("reason") or "Error")
        yield Trouble(pod, name, reason, _because(ended, detail))
    elif waiting.get("reason") and waiting["reason"] not in _NORMAL_WAITS:
        yield Trouble(pod, name, str(waiting["reason"]), _text(waiting))


def _because(ended: Tree, detail: str) -> str:
    """OOMKilled must not hide behind the CrashLoopBackOff that follows it."""
    reason = str(ended.get("reason") or "")
    return f"{reason} ({detail})" if reason not in ("", "Error") else detail


def _text(state: Tree) -> str:
    return " ".join(str(state.get("message") or "").split())


def _subject(event: Tree) -> str:
    return str((event.get("involvedObject") or {}).get("name") or "")


def _when(event: Tree) -> str:
    """Times are RFC 3339 in UTC, so that they sort as texts."""
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")
