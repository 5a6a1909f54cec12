"""Objects deleted, and waited for until they and their pods are gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import groupby

from orchestrator.cluster.apply import Applied, Placed
from orchestrator.cluster.client import POD, Cluster
from orchestrator.cluster.errors import ClusterError
from orchestrator.cluster.watch import POLL_S, targets


def remove(cluster: Cluster, placed: Sequence[Placed], done: Callable[[Placed, bool], object]) -> list[Placed]:
    """Deletes the objects, the last one first; `done` gets each and whether there was one. Returns those there were.

    Raises ClusterError at the first that cannot be deleted."""
    deleted: list[Placed] = []
    for one in reversed(placed):
        try:
            found = cluster.delete(one.kind, one.namespace, one.object.name)
        except ClusterError as error:
            count = f"{len(deleted)} of {len(placed)}"
            problems = [f"{one}: {problem}" for problem in error.problems]
            raise ClusterError([*problems, f"deleted before that: {count}; run the same command again"]) from None
        if found:
            deleted.append(one)
        done(one, found)
    return deleted


def wait_gone(
    cluster: Cluster,
    deleted: Sequence[Placed],
    timeout_s: float,
    left: Callable[[Sequence[str]], object],
    *,
    poll_s: float = POLL_S,
) -> list[str]:
    """Until the objects are gone, and the pods of the services among them: those hold GPUs while they drain.

    `left` gets what is still there, after every look. Returns what is there when the time is over. Raises ClusterError.
    """
    ends_s = time.monotonic() + timeout_s
    while True:
        found = [str(one) for one in deleted if cluster.get(one.kind, one.namespace, one.object.name) is not None]
        found += [f"pod/{name}" for name in _pods(cluster, deleted)]
        left(found)
        remaining_s = ends_s - time.monotonic()
        if not found or remaining_s <= 0:
            return found
        time.sleep(min(poll_s, remaining_s))


def _pods(cluster: Cluster, deleted: Sequence[Placed]) -> list[str]:
    services = sorted(targets(Applied(one, "configured") for one in deleted), key=lambda target: target.namespace)
    return [
        str(pod["metadata"]["name"])
        for namespace, here in groupby(services, key=lambda target: target.namespace)
        for pod in cluster.select(
            POD, namespace, labels=f"serving.knative.dev/service in ({','.join(target.service for target in here)})"
        )
    ]
