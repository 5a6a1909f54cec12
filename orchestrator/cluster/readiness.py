"""What the status of a Knative Service or InferenceService says: ready, failing or on its way. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["ready", "waiting", "failing"]
Tree = Mapping[str, Any]

# the order in which a condition says more than Ready does
_TELLING = (
    "PredictorReady", "PredictorConfigurationReady", "ConfigurationsReady", "RoutesReady", "PredictorRouteReady",
    "IngressReady",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Readiness:
    """`failing` may heal: a GPU becomes free, an image is pushed."""

    state: State
    reason: str = ""
    message: str = ""
    url: str = ""
    revision: str = ""  # the latest created one

    def __str__(self) -> str:
        text = ": ".join(part for part in (self.reason, self.message) if part)
        return self.url or "ready" if self.state == "ready" else text or "not yet looked at"


def service_readiness(service: Tree | None) -> Readiness:
    """Of a Knative Service. Its status counts when it speaks of what was applied last."""
    if service is None:
        return Readiness("waiting", message="not there yet")
    status = service.get("status") or {}
    if status.get("observedGeneration") != service["metadata"].get("generation"):
        return Readiness("waiting", message="the change is not looked at yet")
    return _readiness(status, str(status.get("latestCreatedRevisionName") or ""))


def inference_service_readiness(inference_service: Tree | None, predictor: Tree | None, *, settled: bool) -> Readiness:
    """Of an InferenceService with the Knative Service that KServe makes of it (None in Standard mode).

    Its own observedGeneration is that of the Knative Service (kserve/kserve#6081), so it tells nothing. `settled`
    says that KServe had time to see a change; then the Knative Service is asked as well."""
    if inference_service is None:
        return Readiness("waiting", message="not there yet")
    status = inference_service.get("status") or {}
    component = (status.get("components") or {}).get("predictor") or {}
    revision = str(component.get("latestCreatedRevision") or "")
    own = _readiness(status, revision)
    below = service_readiness(predictor) if predictor is not None else None
    if below is not None and below.revision:
        own = Readiness(own.state, own.reason, own.message, own.url, below.revision)
    if own.state != "ready":
        telling = below is not None and below.state == "failing" and below.message
        return Readiness(own.state, below.reason, below.message, own.url, own.revision) if telling and below else own
    if below is not None and below.state != "ready":
        return Readiness(below.state, below.reason, below.message, own.url, own.revision)
    return own if settled else Readiness("waiting", message="the change is not looked at yet", revision=own.revision)


def condition(tree: Tree, name: str = "Ready") -> Tree:
    """The condition called so; empty as long as there is none."""
    conditions = (tree.get("status") or {}).get("conditions") or ()
    return next((one for one in conditions if one.get("type") == name), {})


def _readiness(status: Tree, revision: str) -> Readiness:
    ready = condition({"status": status})
    url = str(status.get("url") or "")
    if ready.get("status") == "True":
        return Readiness("ready", url=url, revision=revision)
    state: State = "failing" if ready.get("status") == "False" else "waiting"
    telling = [ready, *(condition({"status": status}, name) for name in _TELLING)]
    said = next((one for one in telling if one.get("message") and one.get("status") != "True"), None)
    said = said or next((one for one in telling if one.get("reason") and one.get("status") != "True"), {})
    return Readiness(state, str(said.get("reason") or ""), str(said.get("message") or ""), url, revision)
