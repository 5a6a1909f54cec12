"""The services of stagecraft in a namespace, each with what its newest revision has and wants."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.cluster.client import INFERENCE_SERVICE, REVISION, SERVICE, Cluster, Kind, Tree
from orchestrator.cluster.readiness import Readiness, condition, inference_service_readiness, service_readiness

LABELS = "app.kubernetes.io/part-of=stagecraft"
_OWNER = "serving.kserve.io/inferenceservice"  # label of what KServe makes of an InferenceService


@dataclass(frozen=True, slots=True)
class Row:
    """A service. `replicas` and `desired` are of its latest created revision; None where that does not tell."""

    namespace: str
    name: str
    kind: str
    ready: str  # True, False or Unknown, of what was applied last
    reason: str
    message: str
    revision: str
    replicas: int | None
    desired: int | None
    url: str
    created: str  # RFC 3339


def overview(cluster: Cluster, namespace: str) -> list[Row]:
    """By name; an InferenceService stands for the Knative Service that KServe makes of it. Raises ClusterError."""
    services = {str(one["metadata"]["name"]): one for one in cluster.select(SERVICE, namespace, labels=LABELS)}
    inference_services = cluster.select(INFERENCE_SERVICE, namespace, labels=LABELS)
    names = {str(one["metadata"]["name"]) for one in inference_services}
    revisions = {str(one["metadata"]["name"]): one for one in cluster.select(REVISION, namespace)}
    rows = [_inference_row(cluster, one, services, revisions) for one in inference_services]
    rows += [_service_row(one, revisions) for one in services.values() if _owner(one) not in names]
    return sorted(rows, key=lambda row: row.name)


def _service_row(service: Tree, revisions: dict[str, Tree]) -> Row:
    return _row(SERVICE, service, service_readiness(service), revisions)


def _inference_row(cluster: Cluster, one: Tree, services: dict[str, Tree], revisions: dict[str, Tree]) -> Row:
    name = f"{one['metadata']['name']}-predictor"
    predictor = services.get(name) or cluster.get(SERVICE, str(one["metadata"]["namespace"]), name)
    return _row(INFERENCE_SERVICE, one, inference_service_readiness(one, predictor, settled=True), revisions)


def _row(kind: Kind, service: Tree, seen: Readiness, revisions: dict[str, Tree]) -> Row:
    metadata = service["metadata"]
    status = (revisions.get(seen.revision) or {}).get("status") or {}
    known = condition(service).get("status") or "Unknown"
    ready = {"ready": "True", "failing": "False"}.get(seen.state, known if known != "True" else "Unknown")
    return Row(
        namespace=str(metadata["namespace"]),
        name=str(metadata["name"]),
        kind=kind.kind,
        ready=ready,
        reason=seen.reason,
        message=seen.message,
        revision=seen.revision,
        replicas=status.get("actualReplicas"),
        desired=status.get("desiredReplicas"),
        url=seen.url,
        created=str(metadata.get("creationTimestamp") or ""),
    )


def _owner(service: Tree) -> str:
    return str((service["metadata"].get("labels") or {}).get(_OWNER) or "")


def unready(rows: Iterable[Row]) -> list[Row]:
    """Those with something to say below the table."""
    return [row for row in rows if row.ready != "True" and row.message]
