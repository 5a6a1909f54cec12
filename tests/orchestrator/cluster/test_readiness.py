"""What the status of a service means."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.cluster.readiness import Readiness, inference_service_readiness, service_readiness

DEADLINE = {
    "reason": "RevisionFailed",
    "message": 'Revision "toy-00002" failed with message: Unable to fetch image "stage:2".',
}


def condition(name: str, status: str, **said: str) -> dict[str, str]:
    return {"type": name, "status": status, **said}


def service(*conditions: dict[str, str], generation: int = 2, observed: int | None = 2) -> dict[str, Any]:
    status = {
        "observedGeneration": observed,
        "latestCreatedRevisionName": "toy-00002",
        "url": "http://toy",
        "conditions": list(conditions),
    }
    return {"metadata": {"name": "toy", "generation": generation}, "status": status}


READY = condition("Ready", "True")

SERVICES = {
    "ready_for_its_generation": (service(READY), "ready", "http://toy"),
    "ready_for_the_generation_before": (service(READY, observed=1), "waiting", "the change is not looked at yet"),
    "never_looked_at": ({"metadata": {"generation": 1}}, "waiting", "the change is not looked at yet"),
    "not_there": (None, "waiting", "not there yet"),
    "failing": (
        service(condition("Ready", "False", **DEADLINE)),
        "failing",
        f"RevisionFailed: {DEADLINE['message']}",
    ),
    "on_its_way": (
        service(condition("Ready", "Unknown", reason="Deploying", message="waiting")),
        "waiting",
        "Deploying: waiting",
    ),
    "the_route_tells_more_than_ready": (
        service(
            condition("Ready", "Unknown"),
            condition("ConfigurationsReady", "True", message="all is well"),
            condition("RoutesReady", "Unknown", reason="IngressNotConfigured", message="no gateway"),
        ),
        "waiting",
        "IngressNotConfigured: no gateway",
    ),
    "nothing_told": (service(condition("Ready", "Unknown")), "waiting", "not yet looked at"),
}


@pytest.mark.parametrize("case", SERVICES)
def test_knative_service(case: str) -> None:
    tree, state, text = SERVICES[case]
    seen = service_readiness(tree)
    assert (seen.state, str(seen)) == (state, text)


def isvc(*conditions: dict[str, str], revision: str = "toy-predictor-00001") -> dict[str, Any]:
    components = {"predictor": {"latestCreatedRevision": revision}}
    # observedGeneration is that of the Knative Service below, whatever the InferenceService's own is
    status = {"observedGeneration": 41, "url": "http://isvc", "conditions": list(conditions), "components": components}
    return {"metadata": {"name": "toy", "generation": 3}, "status": status}


INFERENCE_SERVICES = {
    "ready_whatever_it_observed": (isvc(READY), service(READY), True, "ready", "http://isvc"),
    "ready_without_a_knative_service": (isvc(READY), None, True, "ready", "http://isvc"),
    "ready_from_before_the_change": (isvc(READY), service(READY), False, "waiting", "the change is not looked at yet"),
    "the_service_below_still_changes": (
        isvc(READY),
        service(READY, observed=1),
        True,
        "waiting",
        "the change is not looked at yet",
    ),
    "the_predictor_tells_why": (
        isvc(condition("Ready", "False"), condition("PredictorReady", "False", reason="R", message="M")),
        None,
        True,
        "failing",
        "R: M",
    ),
    "the_service_below_tells_why": (
        isvc(condition("Ready", "False")),
        service(condition("Ready", "False", **DEADLINE)),
        True,
        "failing",
        f"RevisionFailed: {DEADLINE['message']}",
    ),
    "not_there": (None, None, True, "waiting", "not there yet"),
    "nothing_yet": ({"metadata": {}}, None, True, "waiting", "not yet looked at"),
}


@pytest.mark.parametrize("case", INFERENCE_SERVICES)
def test_inference_service(case: str) -> None:
    tree, below, settled, state, text = INFERENCE_SERVICES[case]
    seen = inference_service_readiness(tree, below, settled=settled)
    assert (seen.state, str(seen)) == (state, text)


def test_the_revision_is_the_newest_that_is_known() -> None:
    tree = isvc(condition("Ready", "Unknown"), revision="toy-predictor-00001")
    assert inference_service_readiness(tree, None, settled=True).revision == "toy-predictor-00001"
    assert inference_service_readiness(tree, service(), settled=True).revision == "toy-00002"


def test_nothing_known_is_not_ready() -> None:
    assert Readiness("waiting").state != "ready"
    assert service_readiness(service()).state == "waiting"
