"""Why a service is not Ready: asks the cluster about its pods, the events about them, and their logs."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.cluster.client import EVENT, POD, Cluster, Tree
from orchestrator.cluster.errors import ApiError
from orchestrator.cluster.troubles import logs_to_read, pod_troubles, warnings_about

LOG_LINES = 8
PODS_MAX = 2  # the others of a revision seldom fail in another way


def diagnosis(cluster: Cluster, namespace: str, names: Sequence[str], revision: str) -> list[str]:
    """Why the service whose objects are called `names` is not ready; `revision` is its latest one, "" before there is.

    Lines for people, none if nothing is known. Whoever may not read pods is told so instead of an error. Raises
    Unreachable."""
    try:
        return _diagnosis(cluster, namespace, names, revision)
    except ApiError as error:
        return [f"why is not known: {error}"]


def _diagnosis(cluster: Cluster, namespace: str, names: Sequence[str], revision: str) -> list[str]:
    pods = cluster.select(POD, namespace, labels=f"serving.knative.dev/revision={revision}") if revision else []
    failing = [pod for pod in pods if pod_troubles(pod) or logs_to_read(pod)][:PODS_MAX]
    lines = [str(trouble) for pod in failing for trouble in pod_troubles(pod)]
    events = cluster.select(EVENT, namespace, fields="type=Warning")
    lines += [f"event of {text}" for text in warnings_about(events, names=names, revision=revision)]
    for pod in failing:
        lines += _logs(cluster, namespace, pod)
    return lines


def _logs(cluster: Cluster, namespace: str, pod: Tree) -> list[str]:
    name = str(pod["metadata"]["name"])
    found: list[str] = []
    for container, previous in logs_to_read(pod):
        lines = cluster.log(namespace, name, container, lines=LOG_LINES, previous=previous)
        if lines:
            found.append(f"the last lines of pod {name}, {container}{' (the run before)' if previous else ''}:")
            found += [f"  {line}" for line in lines]
    return found
