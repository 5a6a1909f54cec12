"""Waits until services are Ready, and shows what they wait for. After `kn service apply --wait`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.cli.console import err, note
from orchestrator.cli.objects_view import ready_condition

if TYPE_CHECKING:
    from knative.client import Client

POLL_S = 0.2
FAILED_FOR_S = 2.0  # Ready may be False for a moment while a new revision comes up

Key = tuple[str, str]  # namespace, name
Waited = tuple[str, str, str]  # kind, namespace, name
Show = Callable[[list[str], list[str]], object]  # a line for each that is waited for; those of them that changed


def wait_ready(
    client: Client, services: Sequence[Key], timeout_s: float, *, inference_services: Sequence[Key] = ()
) -> bool:
    """Whether all of them became Ready in time; says of each one when it is, or why it is not. Raises KnativeError."""
    waited = [("service", *key) for key in services] + [("inferenceservice", *key) for key in inference_services]
    wait = _Wait(waited, time.monotonic() + timeout_s)
    if not err.is_terminal:
        return wait.run(client, lambda _waiting, changed: note("\n".join(changed)) if changed else None)
    with err.status("") as status:
        return wait.run(client, lambda waiting, _changed: status.update("\n".join(waiting)))


class _Wait:
    def __init__(self, services: Sequence[Waited], ends_s: float) -> None:
        self._left = dict.fromkeys(services, "")  # what each waits for
        self._failing_since_s: dict[Waited, float] = {}
        self._ends_s = ends_s
        self._all_ready = True

    def run(self, client: Client, show: Show) -> bool:
        while True:
            before = dict(self._left)
            kinds = dict.fromkeys(kind for kind, _, _ in before)
            items = {(kind, *_key(item)): item for kind in kinds for item in client.get(kind)}
            for key in before:
                self._look(key, items.get(key))
            if not self._left:
                return self._all_ready
            if time.monotonic() >= self._ends_s:
                for key, message in self._left.items():
                    note(f"{_shown(key)} is not ready in time: {message}")
                return False
            if self._left != before:
                lines = {key: f"{_shown(key)}: {message}" for key, message in self._left.items() if message}
                changed = [line for key, line in lines.items() if before[key] != self._left[key]]
                show(list(lines.values()), changed)
            time.sleep(POLL_S)

    def _look(self, key: Waited, item: Mapping[str, Any] | None) -> None:
        if item is None:
            self._finish(key, f"{_shown(key)} was deleted meanwhile", ready=False)
            return
        condition = ready_condition(item)
        if not _is_current(item):
            condition = {}
        status, message = condition.get("status"), _message(condition)
        self._left[key] = message or "not yet looked at"
        if status == "True":
            self._finish(key, f"{_shown(key)} is ready at {item['status'].get('url', '')}", ready=True)
        elif status != "False":
            self._failing_since_s.pop(key, None)
        elif time.monotonic() - self._failing_since_s.setdefault(key, time.monotonic()) >= FAILED_FOR_S:
            self._finish(key, f"{_shown(key)} failed: {message}", ready=False)

    def _finish(self, key: Waited, message: str, *, ready: bool) -> None:
        del self._left[key]
        self._all_ready &= ready
        note(message)


def _shown(key: Waited) -> str:
    kind, _, name = key
    return f"{kind} {name}"


def _is_current(item: Mapping[str, Any]) -> bool:
    """Whether the status speaks of what was applied last."""
    generation = item["metadata"].get("generation")
    return bool(item.get("status", {}).get("observedGeneration", generation) == generation)


def _message(condition: Mapping[str, Any]) -> str:
    return ": ".join(str(condition[field]) for field in ("reason", "message") if condition.get(field))


def _key(item: Mapping[str, Any]) -> Key:
    return str(item["metadata"]["namespace"]), str(item["metadata"]["name"])
