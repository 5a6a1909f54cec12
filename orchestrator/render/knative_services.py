"""Stages and orchestrator as Knative Services (serving.knative.dev/v1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.render.concurrency import Concurrency, concurrency
from orchestrator.render.deployment import Deployment
from orchestrator.render.noted import Noted, Tree
from orchestrator.render.pods import Pod, orchestrator_pod, stage_pod

AUTOSCALING = "autoscaling.knative.dev"
PROGRESS_DEADLINE = "serving.knative.dev/progress-deadline"
CLUSTER_LOCAL = {"networking.knative.dev/visibility": "cluster-local"}
PART_OF = {"app.kubernetes.io/part-of": "stagecraft"}
WAKES = "stagecraft.dev/wakes"  # annotation of the orchestrator's object; see knative/platform.py


def stage_service(what: Deployment, index: int) -> Tree:
    """One stage: reached only from inside the cluster, scaled by the steps that are in it at once."""
    one = concurrency(what)[index]
    pod = stage_pod(what, index)
    annotations = {**scale_annotations(what, one), **deadline(pod.progress_deadline_s)}
    return _service(
        what,
        what.stage_name(index),
        {**pod_labels(what, "stage"), "stagecraft.dev/stage": str(index)},
        Noted(
            CLUSTER_LOCAL["networking.knative.dev/visibility"], "no address outside: only the orchestrator speaks to it"
        ),
        annotations,
        {
            "containerConcurrency": Noted(
                one.limit, "so that a burst at zero spreads over pods instead of piling up in the first that is ready"
            ),
            **pod_spec(what, pod, "stage"),
        },
        {},
    )


def orchestrator_service(what: Deployment) -> Tree:
    """The way in. One replica at most: it counts the memory of the stages for itself."""
    pod = orchestrator_pod(what)
    annotations = {**orchestrator_scale_annotations(what), **deadline(pod.progress_deadline_s)}
    return _service(
        what,
        what.service_name,
        pod_labels(what, "orchestrator"),
        None,
        annotations,
        pod_spec(what, pod, "orchestrator"),
        wakes(what),
    )


def wakes(what: Deployment) -> Tree:
    names = [what.knative_name(index) for index in range(len(what.plan.stages))]
    note = (
        "for Knative on one machine: a request at zero starts these as well. On a cluster the orchestrator wakes them"
    )
    return {WAKES: Noted(",".join(names), note)}


def pod_labels(what: Deployment, role: str) -> dict[str, str]:
    """What NetworkPolicy and PodMonitor find pods by."""
    return {**PART_OF, "stagecraft.dev/model": what.service_name, "stagecraft.dev/role": role}


def scale_annotations(what: Deployment, one: Concurrency) -> Tree:
    scaling = what.scaling
    found: Tree = {
        f"{AUTOSCALING}/class": "kpa.autoscaling.knative.dev",
        f"{AUTOSCALING}/metric": Noted("concurrency", "a request is one step of one lane: bounded work, a true load"),
        f"{AUTOSCALING}/target": Noted(f"{one.target:g}", one.arithmetic),
        f"{AUTOSCALING}/window": f"{scaling.window_s}s",
        f"{AUTOSCALING}/min-scale": str(scaling.min_scale),
        f"{AUTOSCALING}/max-scale": str(scaling.max_scale),
        f"{AUTOSCALING}/initial-scale": str(initial_scale(what)),
        f"{AUTOSCALING}/scale-down-delay": Noted(
            f"{scaling.scale_down_delay_s}s", "a replica that goes takes KV caches with it, which are computed again"
        ),
        f"{AUTOSCALING}/target-burst-capacity": Noted(
            str(one.burst),
            "above what all replicas take: the activator stays in the path of the service's address, spreads new lanes "
            "over free slots, and lets the last pod go without the grace period. Never -1: pods, which are addressed "
            "directly, would not be asked for their load",
        ),
    }
    return found


def initial_scale(what: Deployment) -> int:
    return max(what.scaling.initial_scale, what.scaling.min_scale)


def orchestrator_scale_annotations(what: Deployment) -> Tree:
    return {
        f"{AUTOSCALING}/class": "kpa.autoscaling.knative.dev",
        f"{AUTOSCALING}/metric": "concurrency",
        f"{AUTOSCALING}/window": f"{what.scaling.window_s}s",
        f"{AUTOSCALING}/min-scale": str(min(1, what.scaling.min_scale)),
        f"{AUTOSCALING}/max-scale": Noted("1", "it counts the KV memory of the stages, which two could not share"),
        f"{AUTOSCALING}/initial-scale": str(min(1, initial_scale(what))),
    }


def deadline(seconds: int) -> Tree:
    return {
        PROGRESS_DEADLINE: Noted(
            f"{seconds}s",
            "600 s for the image, and twice the time that the weights take at 50 MB/s, count as no failure",
        )
    }


def pod_spec(what: Deployment, pod: Pod, account: str) -> Tree:
    """What Knative has for both kinds of pods: time limits, the container, volumes, scheduling."""
    accounts = {} if what.around is None else {"serviceAccountName": f"{what.service_name}-{account}"}
    return {
        "timeoutSeconds": Noted(
            what.timeout_s, "also the time that a replica gets to end, and that a request may wait for a start"
        ),
        "responseStartTimeoutSeconds": Noted(what.timeout_s, "would stay at 300 by itself, and cut a slow first token"),
        **accounts,
        **pod.fields,
        "containers": [pod.container],
        "volumes": pod.volumes,
    }


def knative_service(
    what: Deployment, name: str, labels: Mapping[str, str], annotations: Tree, pod: Pod, *, account: str
) -> Tree:
    """A Service that can be reached from everywhere, beside stages and orchestrator."""
    return _service(what, name, labels, None, annotations, pod_spec(what, pod, account), {})


def _service(
    what: Deployment,
    name: str,
    labels: Mapping[str, str],
    visibility: Noted | None,
    annotations: Tree,
    spec: Tree,
    own_annotations: Tree,
) -> Tree:
    own: dict[str, Any] = dict(labels)
    if visibility is not None:
        own["networking.knative.dev/visibility"] = visibility
    metadata: Tree = {"name": name, "namespace": what.namespace, "labels": own}
    if own_annotations:
        metadata["annotations"] = own_annotations
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {"template": {"metadata": {"labels": dict(labels), "annotations": annotations}, "spec": spec}},
    }
