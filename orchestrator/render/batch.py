"""What a batch needs beside stages and orchestrator: a broker, the service that keeps results, and who gets what.

batch CLI ──request──► Broker ──Trigger──► orchestrator /events
                         ▲                      │ reply: the result
                         └──────────────────────┘
                         Broker ──Trigger──► results service ◄── batch CLI asks
"""

from __future__ import annotations

from typing import Any

from orchestrator.batches.events import CANCEL, REQUEST, RESULT
from orchestrator.render.deployment import Batch, Deployment
from orchestrator.render.knative_services import AUTOSCALING, PART_OF, knative_service, pod_labels
from orchestrator.render.noted import Noted, Tree
from orchestrator.render.pods import results_pod

IN_FLIGHT = "stagecraft.dev/max-in-flight"
IN_FLIGHT_MAX = 1000  # that a Trigger may say
DEAD_LETTERS = "/dead-letters"
_RETRIES = 12  # 1 s, 2 s, 4 s, ... over an hour in all


def results_name(what: Deployment) -> str:
    return f"{what.service_name}-results"


def broker(what: Deployment, batch: Batch) -> Tree:
    """Of the cluster's default class."""
    return {
        "apiVersion": "eventing.knative.dev/v1",
        "kind": "Broker",
        "metadata": {"name": batch.broker, "namespace": what.namespace, "labels": dict(PART_OF)},
    }


def results_service(what: Deployment, batch: Batch) -> Tree:
    """Keeps results until they are fetched. One replica: its file has one writer."""
    kept = bool(batch.results_claim or batch.results_file)
    annotations: Tree = {
        f"{AUTOSCALING}/class": "kpa.autoscaling.knative.dev",
        f"{AUTOSCALING}/metric": "concurrency",
        f"{AUTOSCALING}/window": f"{what.scaling.window_s}s",
        f"{AUTOSCALING}/min-scale": "0"
        if kept
        else Noted("1", "without a claim (--results-claim) results are lost with the pod, so it never goes to zero"),
        f"{AUTOSCALING}/max-scale": Noted("1", "its file has one writer"),
        f"{AUTOSCALING}/initial-scale": str(min(what.scaling.initial_scale, 1) if kept else 1),
    }
    return knative_service(
        what,
        results_name(what),
        pod_labels(what, "results"),
        annotations,
        results_pod(what, batch),
        account="orchestrator",
    )


def triggers(what: Deployment, batch: Batch) -> list[Tree]:
    """By name: requests and cancellations to the orchestrator, results and cancellations to the results service."""
    orchestrator = _service(what.orchestrator_knative_name, "/events")
    results = _service(results_name(what), "/")
    of_model = {"model": what.plan.name}
    requests = _trigger(what, batch, "requests", {"type": REQUEST, **of_model}, orchestrator)
    note = "sequences of a full chain, and a lane more to take their places. For Knative on one machine"
    requests["metadata"]["annotations"] = {IN_FLIGHT: Noted(str(_in_flight(what, batch)), note)}
    requests["spec"]["delivery"] = {
        "retry": Noted(_RETRIES, "a busy orchestrator answers 429; brokers that ignore Retry-After count it as a try"),
        "backoffPolicy": "exponential",
        "backoffDelay": "PT1S",
        "timeout": Noted(f"PT{what.timeout_s}S", "the answer is the result, so it takes as long as the generation"),
        "deadLetterSink": _service(results_name(what), DEAD_LETTERS),
    }
    kept = _trigger(what, batch, "results", {"type": RESULT}, results)
    kept["spec"]["delivery"] = {"retry": _RETRIES, "backoffPolicy": "exponential", "backoffDelay": "PT1S"}
    cancels = [
        _trigger(what, batch, "cancels", {"type": CANCEL}, orchestrator),
        _trigger(what, batch, "cancelled", {"type": CANCEL}, results),
    ]
    return [requests, kept, *cancels]


def _trigger(what: Deployment, batch: Batch, name: str, attributes: dict[str, str], subscriber: Tree) -> Tree:
    return {
        "apiVersion": "eventing.knative.dev/v1",
        "kind": "Trigger",
        "metadata": {
            "name": f"{what.service_name}-batch-{name}",
            "namespace": what.namespace,
            "labels": {**PART_OF, "stagecraft.dev/model": what.service_name},
        },
        "spec": {"broker": batch.broker, "filter": {"attributes": attributes}, "subscriber": subscriber},
    }


def _in_flight(what: Deployment, batch: Batch) -> int:
    """As many as the orchestrator takes (ORCHESTRATOR_BATCH_REQUESTS_MAX): with fewer its lanes are not full."""
    return batch.max_in_flight or min(IN_FLIGHT_MAX, what.workload.lane_width * (len(what.plan.stages) + 1))


def _service(name: str, path: str) -> dict[str, Any]:
    return {"ref": {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": name}, "uri": path}
