"""Objects deleted, and waited for until they and their pods are gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import groupby

from orchestrator.cluster.apply import Applied, Placed
from orchestrator.cluster.client import POD, Cluster
from orchestrator.cluster.errors import ApiError, ClusterError
from orchestrator.cluster.watch import POLL_S, targets


def remove(cluster: Cluster, placed: Sequence[Placed], done: Callable[[Placed, bool], object]) -> list[Placed]:
    """Deletes the objects, the last one first; `done` gets each and whether there was one. Returns those there were.

    One that may not be deleted does not keep the others, of which some hold GPUs; only what services stand on
    (accounts, policy) stays while one of them does. Raises ClusterError for all that are left, at the end or when the
    cluster answers no more."""
    deleted: list[Placed] = []
    problems: list[str] = []
    service_stays = False
    for one in reversed(placed):
        if service_stays and not _is_served(one):
            continue
        try:
            found = cluster.delete(one.kind, one.namespace, one.object.name)
        except ClusterError as error:
            problems += [f"{one}: {problem}" for problem in error.problems]
            if not isinstance(error, ApiError) or error.heals or error.status == 401:  # not about this object
                break
            service_stays = service_stays or _is_served(one)
            continue
        if found:
            deleted.append(one)
        done(one, found)
    if problems:
        count = f"{len(deleted)} of {len(placed)}"
        raise ClusterError([*problems, f"deleted: {count}; run the same command again for what is left"])
    return deleted


def _is_served(one: Placed) -> bool:
    """Whether it is a service, or the runtime of services."""
    return one.object.group in ("serving.knative.dev", "serving.kserve.io")


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
