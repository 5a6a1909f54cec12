"""Stages and orchestrator as KServe InferenceServices (serving.kserve.io/v1beta1), in KServe's Knative mode.

Stages share a ServingRuntime, which holds what is the same for all of them; the orchestrator is a custom predictor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.render.concurrency import concurrency
from orchestrator.render.deployment import Deployment
from orchestrator.render.knative_services import (
    AUTOSCALING,
    CLUSTER_LOCAL,
    deadline,
    orchestrator_scale_annotations,
    pod_labels,
    scale_annotations,
    wakes,
)
from orchestrator.render.noted import Noted, Tree
from orchestrator.render.pods import PORT, Pod, orchestrator_pod, stage_pod

KNATIVE_MODE = {"serving.kserve.io/deploymentMode": "Knative"}
FORMAT = "huggingface"  # of the checkpoint; the one format that KServe takes without storageUri
CONTAINER = "kserve-container"
_SHARED = ("image", "ports", "readinessProbe", "livenessProbe", "securityContext", "volumeMounts")
_FROM_FIELDS = tuple(f"{AUTOSCALING}/{name}" for name in ("class", "metric", "min-scale", "max-scale"))


def serving_runtime_name(what: Deployment) -> str:
    return f"{what.service_name}-stage"


def serving_runtime(what: Deployment) -> Tree:
    """What all stages have in common. No stage is chosen by it: each names it."""
    pod = stage_pod(what, 0)
    probes = {key: _with_port(pod.container[key]) for key in ("readinessProbe", "livenessProbe")}
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": {
            "name": serving_runtime_name(what),
            "namespace": what.namespace,
            "labels": pod_labels(what, "stage"),
        },
        "spec": {
            "supportedModelFormats": [
                {"name": FORMAT, "version": "1", "autoSelect": Noted(False, "other models of this namespace keep away")}
            ],
            "containers": [
                {"name": CONTAINER, **{key: pod.container[key] for key in _SHARED if key in pod.container}, **probes}
            ],
            "volumes": pod.volumes,
        },
    }


def _with_port(probe: Noted) -> Noted:
    """A ServingRuntime's schema wants the port that a Knative Service's probes take from the container."""
    asked = {**probe.value["httpGet"], "port": PORT}
    return Noted({**probe.value, "httpGet": asked}, probe.comment)


def stage_inference_service(what: Deployment, index: int) -> Tree:
    """One stage, by the ServingRuntime."""
    pod = stage_pod(what, index)
    model: Tree = {
        "modelFormat": {"name": FORMAT},
        "runtime": serving_runtime_name(what),
        **{key: value for key, value in pod.container.items() if key not in _SHARED},
    }
    if pod.weights.storage_uri:
        model["storageUri"] = Noted(pod.weights.storage_uri, pod.weights.why)
    one = concurrency(what)[index]
    predictor = {
        **_scale(what.scaling.min_scale, what.scaling.max_scale),
        "containerConcurrency": Noted(
            one.limit, "so that a burst at zero spreads over pods instead of piling up in the first that is ready"
        ),
        **_time_and_account(what, "stage"),
        **_pod_fields(pod),
        "model": model,
    }
    labels = {**pod_labels(what, "stage"), "stagecraft.dev/stage": str(index), **CLUSTER_LOCAL}
    annotations = {**KNATIVE_MODE, **_without_fields(scale_annotations(what, one)), **deadline(pod.progress_deadline_s)}
    return _inference_service(what, what.stage_name(index), labels, annotations, predictor)


def orchestrator_inference_service(what: Deployment) -> Tree:
    """The way in, as KServe users know it: /v1, /v2 and /openai/v1 at the InferenceService's address."""
    pod = orchestrator_pod(what)
    predictor = {
        **_scale(min(1, what.scaling.min_scale), 1),
        "containerConcurrency": Noted(0, "no limit here: the orchestrator itself refuses with 429 what it cannot take"),
        **_time_and_account(what, "orchestrator"),
        **_pod_fields(pod),
        "containers": [{"name": CONTAINER, **pod.container}],
        "volumes": pod.volumes,
    }
    annotations = {
        **KNATIVE_MODE,
        **_without_fields(orchestrator_scale_annotations(what)),
        **deadline(pod.progress_deadline_s),
        **wakes(what),
    }
    return _inference_service(what, what.service_name, pod_labels(what, "orchestrator"), annotations, predictor)


def _scale(least: int, most: int) -> Tree:
    limits = {} if most == 0 else {"maxReplicas": most}
    return {
        "minReplicas": Noted(least, "KServe's own default is 1, which would never go to zero"),
        **limits,
        "scaleMetric": "concurrency",
    }


def _time_and_account(what: Deployment, account: str) -> Tree:
    accounts = {} if what.around is None else {"serviceAccountName": f"{what.service_name}-{account}"}
    return {
        "timeout": Noted(what.timeout_s, "KServe sets timeoutSeconds and responseStartTimeoutSeconds by it"),
        **accounts,
    }


def _pod_fields(pod: Pod) -> Tree:
    return dict(pod.fields)


def _without_fields(annotations: Mapping[str, Any]) -> Tree:
    """KServe writes these itself, from the predictor's fields."""
    return {key: value for key, value in annotations.items() if key not in _FROM_FIELDS}


def _inference_service(
    what: Deployment, name: str, labels: Mapping[str, str], annotations: Tree, predictor: Tree
) -> Tree:
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": name,
            "namespace": what.namespace,
            "labels": dict(labels),
            "annotations": annotations,
        },
        "spec": {"predictor": predictor},
    }
