"""Kinds of objects that a manifest made for a cluster may hold, and why one machine passes some of them over."""

from __future__ import annotations

from collections.abc import Mapping

TAKEN = (
    "Service (serving.knative.dev/v1)", "InferenceService (serving.kserve.io/v1beta1)",
    "ServingRuntime, ClusterServingRuntime (serving.kserve.io/v1alpha1)", "Broker, Trigger (eventing.knative.dev/v1)",
    "Sequence (flows.knative.dev/v1)", "ConfigMap (v1)", "List (v1)",
)  # fmt: skip

_NO_MEANING = "has no meaning on one machine"
_NOT_RUN = "only Knative Services run on one machine, those of InferenceServices included"
_EVENTING = "of eventing, one machine has Broker, Trigger (eventing.knative.dev/v1), Sequence (flows.knative.dev/v1)"

_EVENTING_GROUPS = (
    "eventing.knative.dev", "flows.knative.dev", "kafka.eventing.knative.dev", "messaging.knative.dev",
    "sinks.knative.dev", "sources.knative.dev",
)  # fmt: skip
_CLUSTER_GROUPS = (
    "admissionregistration.k8s.io", "apiextensions.k8s.io", "autoscaling", "autoscaling.internal.knative.dev",
    "caching.internal.knative.dev", "cert-manager.io", "discovery.k8s.io", "gateway.networking.k8s.io", "keda.sh",
    "kustomize.config.k8s.io", "monitoring.coreos.com", "networking.internal.knative.dev", "networking.istio.io",
    "networking.k8s.io", "node.k8s.io", "operator.knative.dev", "policy", "rbac.authorization.k8s.io",
    "resource.k8s.io", "scheduling.k8s.io", "security.istio.io", "storage.k8s.io", "telemetry.istio.io",
)  # fmt: skip

# API group -> kind -> reason; "*" is every other kind of the group
_PASSED_OVER: Mapping[str, Mapping[str, str]] = {
    "": {
        "Namespace": "a namespace is there as soon as something is in it",
        "Secret": "no process of one machine reads it",
        "Service": "a Knative Service has its own address",
        **dict.fromkeys(
            (
                "Endpoints", "Event", "LimitRange", "Node", "PersistentVolume", "PersistentVolumeClaim",
                "ResourceQuota", "ServiceAccount",
            ),
            _NO_MEANING,
        ),
        **dict.fromkeys(("Pod", "PodTemplate", "ReplicationController"), _NOT_RUN),
    },
    "apps": {"*": _NOT_RUN},
    "batch": {"*": _NOT_RUN},
    "serving.kserve.io": {
        **dict.fromkeys(
            ("InferenceGraph", "LLMInferenceService", "LLMInferenceServiceConfig", "TrainedModel"), _NOT_RUN
        ),
        **dict.fromkeys(
            (
                "ClusterStorageContainer", "LocalModelCache", "LocalModelNamespaceCache", "LocalModelNode",
                "LocalModelNodeGroup",
            ),
            "one machine does not download models",
        ),
    },
    "serving.knative.dev": {
        "DomainMapping": "the ingress of one machine serves every Service under its name",
        "Configuration": "apply a Service, which makes its Configuration",
        "Revision": "apply a Service, which makes its Revisions",
        "Route": "apply a Service, which makes its Route",
    },
    **{group: {"*": _EVENTING} for group in _EVENTING_GROUPS},
    **{group: {"*": _NO_MEANING} for group in _CLUSTER_GROUPS},
}  # fmt: skip


def reason_to_skip(api_version: str, kind: str) -> str:
    """Why an object of this kind is passed over; "" if the kind is not known for that."""
    group, slash, _ = api_version.rpartition("/")
    kinds = _PASSED_OVER.get(group if slash else "", {})
    return kinds.get(kind) or kinds.get("*", "")


def unknown_kind(api_version: str, kind: str) -> str:
    """The complaint about a kind that nothing here knows."""
    return (
        f'no matches for kind "{kind}" in version "{api_version}"\n'
        f"known are {', '.join(TAKEN)}; kinds that only a cluster needs are skipped"
    )
