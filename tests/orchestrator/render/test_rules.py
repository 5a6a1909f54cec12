"""The readers of the rules complain when a rule is broken: without this, the matrix would prove nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.render.deployment import Batch, Deployment, Gpu, Scaling, Scheduling, Surroundings, WeightSource

Tree = dict[str, Any]
Complaints = Callable[..., list[str]]
Make = Callable[..., Deployment]
Trees = Callable[[Deployment], list[Tree]]

SPEC = "Service/m-stage-0>spec>template>spec"
CONTAINER = f"{SPEC}>containers>0"
NOTES = "Service/m-stage-0>spec>template>metadata>annotations"
ISVC = "InferenceService/m-stage-0"
FRONT = "InferenceService/m>spec>predictor"
GONE = object()


def changed(objects: list[Tree], path: str, value: Any) -> list[Tree]:
    """The objects with `value` at KIND/NAME>member>0>member; GONE takes it away."""
    found = copy.deepcopy(objects)
    head, *members = path.split(">")
    kind, name = head.split("/")
    at: Any = next(one for one in found if one["kind"] == kind and one["metadata"]["name"] == name)
    for member in members[:-1]:
        at = at[int(member) if member.isdigit() else member]
    last = int(members[-1]) if members[-1].isdigit() else members[-1]
    if value is GONE:
        del at[last]
    elif isinstance(at, list) and last == len(at):
        at.append(value)
    else:
        at[last] = value
    return found


@pytest.fixture(scope="module")
def as_knative(deployment: Make) -> Deployment:
    around = Surroundings(deployer="jo")
    return deployment(2, "pvc://claim/x", Gpu(), name="m", orchestrator_as="knative", around=around)


@pytest.fixture(scope="module")
def as_kserve(deployment: Make) -> Deployment:
    return deployment(2, "s3://bucket/x", name="m", stages_as="kserve")


KNATIVE_CASES = [
    # fields
    (f"{SPEC}>terminationGracePeriodSeconds", 30, "unknown field"),
    (f"{SPEC}>affinity", {}, "podspec-affinity"),
    (f"{SPEC}>nodeSelector", {"a": "b"}, "podspec-nodeselector"),
    (f"{SPEC}>runtimeClassName", "x", "podspec-runtimeclassname"),
    (f"{SPEC}>hostIPC", True, "podspec-hostipc"),
    (f"{SPEC}>automountServiceAccountToken", True, "not taken"),
    (f"{SPEC}>tolerations", [{"key": "a", "operator": "exists"}], "none of"),
    (f"{SPEC}>securityContext", {"fsGroup": 2**31}, "not in"),
    (f"{SPEC}>securityContext", {"sysctls": []}, "unknown field"),
    (f"{SPEC}>timeoutSeconds", 601, "differs"),
    ("Service/m>spec>template>spec>timeoutSeconds", 598, "gives requests 599 s"),
    (f"{SPEC}>responseStartTimeoutSeconds", GONE, "differs"),
    (f"{SPEC}>containerConcurrency", 1001, "0..1000"),
    (f"{SPEC}>containerConcurrency", "3", "no integer"),
    (f"{SPEC}>containerConcurrency", 1, "above containerConcurrency"),
    (f"{SPEC}>serviceAccountName", "other", "no ServiceAccount"),
    (f"{SPEC}>serviceAccountName", GONE, "no ServiceAccount"),
    (f"{SPEC}>containers>1", {"image": "x"}, "2 containers"),
    (f"{SPEC}>containers", [], "0 items"),
    # volumes
    (f"{SPEC}>volumes>0>emptyDir>sizeLimit", "1 GB", "does not look like"),
    (f"{SPEC}>volumes>0>emptyDir>size", "1Gi", "unknown field"),
    (f"{SPEC}>volumes>0>name", "other", "not mounted"),
    (f"{SPEC}>volumes>2>persistentVolumeClaim>readOnly", False, "persistent-volume-write"),
    (f"{SPEC}>volumes>2>persistentVolumeClaim>claimName", "A", "bad claim"),
    (f"{SPEC}>volumes>2", {"name": "weights", "hostPath": {}}, "podspec-volumes-hostpath"),
    (f"{SPEC}>volumes>2", {"name": "weights", "image": {"reference": "x"}}, "podspec-volumes-image"),
    (f"{CONTAINER}>volumeMounts>2>readOnly", GONE, "must be readOnly"),
    (f"{CONTAINER}>volumeMounts>2>subPath", "../x", "out of the volume"),
    (f"{CONTAINER}>volumeMounts>1>mountPath", "/dev", "cannot be mounted"),
    (f"{CONTAINER}>volumeMounts>1>mountPath", "/tmp", "the same"),
    (f"{CONTAINER}>volumeMounts>2>mountPath", "/models", "not mounted"),
    # the container
    (f"{CONTAINER}>name", "queue-proxy", "may not be called"),
    (f"{CONTAINER}>image", "ghcr.io/Acme/x", "bad image"),
    (f"{CONTAINER}>lifecycle", {}, "unknown field"),
    (f"{CONTAINER}>ports>0>containerPort", 8012, "reserved"),
    (f"{CONTAINER}>ports>0>name", "http", "a port called"),
    (f"{CONTAINER}>ports>0>hostPort", 80, "unknown field"),
    (f"{CONTAINER}>ports>1", {"containerPort": 81}, "2 ports"),
    (f"{CONTAINER}>env>0>name", "PORT", "is reserved"),
    (f"{CONTAINER}>env>0>name", "K_SERVICE", "is reserved"),
    (f"{CONTAINER}>env>0>name", "A B", "no name of a variable"),
    (f"{CONTAINER}>env>0>name", "STAGE_INDEX", "the same"),
    (f"{CONTAINER}>env>0>value", 3, "no string"),
    (f"{CONTAINER}>env>0", {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}, "unknown field"),
    (f"{CONTAINER}>env>2>value", "1:20", "with blocks"),
    (f"{CONTAINER}>env>5>value", "f" * 16, "several plans"),
    (f"{CONTAINER}>resources>limits>memory", GONE, "no limits of memory"),
    (f"{CONTAINER}>resources>requests>cpu", "3", "more cpu"),
    (f"{CONTAINER}>resources>requests>cpu", "1.0001", "finer"),
    (f"{CONTAINER}>resources>limits>memory", "8GB", "does not look like"),
    (f"{CONTAINER}>resources>limits>memory", "100Ei", "no amount"),
    (f"{CONTAINER}>resources>requests>nvidia.com/gpu", GONE, "differ"),
    (f"{CONTAINER}>resources>limits>nvidia.com/gpu", "2", "differ"),
    (f"{CONTAINER}>resources>limits>nvidia.com/gpu", "0.5", "not whole"),
    (f"{CONTAINER}>resources>limits>gpu", "1", "no extended resource"),
    (f"{CONTAINER}>resources>claims", [{"name": "x"}], "unknown field"),
    (f"{CONTAINER}>securityContext>privileged", False, "privileged"),
    (f"{CONTAINER}>securityContext>runAsNonRoot", GONE, "runAsNonRoot"),
    (f"{CONTAINER}>securityContext>runAsUser", 0, "as root"),
    (f"{CONTAINER}>securityContext>capabilities", {"drop": ["ALL"], "add": ["SYS_PTRACE"]}, "capabilities"),
    (f"{CONTAINER}>readinessProbe", GONE, "readinessProbe: is missing"),
    (f"{CONTAINER}>readinessProbe>timeoutSeconds", 2, "without periodSeconds"),
    (f"{CONTAINER}>livenessProbe>httpGet>port", 8022, "multi-container-probing"),
    (f"{CONTAINER}>livenessProbe>httpGet>path", GONE, "tells the truth"),
    # annotations and labels
    (f"{NOTES}>autoscaling.knative.dev/minScale", "1", "unknown annotation"),
    (f"{NOTES}>autoscaling.knative.dev/class", "hpa.autoscaling.knative.dev", "out of bounds"),
    (f"{NOTES}>autoscaling.knative.dev/metric", "rps", "out of bounds"),
    (f"{NOTES}>autoscaling.knative.dev/metric", GONE, "no annotation"),
    (f"{NOTES}>autoscaling.knative.dev/min-scale", "5", "below min-scale"),
    (f"{NOTES}>autoscaling.knative.dev/max-scale", "-1", "out of bounds"),
    (f"{NOTES}>autoscaling.knative.dev/max-scale", str(2**31), "out of bounds"),
    (f"{NOTES}>autoscaling.knative.dev/initial-scale", "0", "allow-zero-initial-scale"),
    (f"{NOTES}>autoscaling.knative.dev/target", "0.001", "out of bounds"),
    (f"{NOTES}>autoscaling.knative.dev/target", "nan", "out of bounds"),
    (f"{NOTES}>autoscaling.knative.dev/window", "5s", "out of bounds"),
    (f"{NOTES}>autoscaling.knative.dev/window", "6500ms", "out of bounds"),
    (f"{NOTES}>autoscaling.knative.dev/scale-down-delay", "61m", "out of bounds"),
    (f"{NOTES}>autoscaling.knative.dev/target-burst-capacity", "-1", "out of bounds"),
    (f"{NOTES}>serving.knative.dev/progress-deadline", "0s", "whole seconds"),
    (f"{NOTES}>serving.knative.dev/progress-deadline", GONE, "no annotation"),
    (f"{NOTES}>example.org/x", "y", "unknown annotation"),
    ("Service/m-stage-0>metadata>annotations", {"autoscaling.knative.dev/min-scale": "1"}, "no effect"),
    ("Service/m-stage-0>metadata>labels>networking.knative.dev/visibility", GONE, "visibility"),
    ("Service/m>metadata>labels>networking.knative.dev/visibility", "cluster-local", "visibility"),
    ("Service/m-stage-0>spec>template>metadata>labels>networking.knative.dev/visibility", "cluster-local", "no place"),
    ("Service/m-stage-0>metadata>labels>x", "y" * 64, "bad value of label"),
    ("Service/m-stage-0>metadata>name", "M", "bad name"),
    ("Service/m-stage-0>metadata>namespace", "other", "several namespaces"),
    ("Service/m-stage-0>spec>traffic", [{"percent": "x"}], "no integer"),
    # what stands around
    ("Service/m>spec>template>spec>containers>0>env>2>value", "http://m-stage-0.default.svc", "the stages are"),
    ("NetworkPolicy/m-stages>spec>podSelector>matchLabels>stagecraft.dev/role", "stages", "leaves stages open"),
    ("NetworkPolicy/m-stages>spec>podSelector", {"matchLabels": {}}, "closes the orchestrator"),
    ("NetworkPolicy/m-stages>spec>ingress>0>from", [], "lets everybody in"),
    ("NetworkPolicy/m-stages>spec>ingress>0>from>0>podSelector>matchLabels>x", "y", "keeps the orchestrator"),
    ("NetworkPolicy/m-stages>spec>ingress>2>ports", [{"port": 8012}], "autoscaler out"),
    ("NetworkPolicy/m-stages>spec>ingress>1>ports>0>protocol", "HTTP", "none of"),
    ("PodMonitor/m>spec>selector>matchLabels>x", "y", "does not select"),
    ("PodMonitor/m>spec>podTargetLabels>0", "nope", "no pod has"),
    ("ServiceAccount/m-stage>automountToken", True, "unknown field"),
    ("Role/m-deployer>rules>2>verbs", ["get"], "does not let"),
    ("Role/m-deployer>rules>0>verbs>0", "*", "everything"),
    ("RoleBinding/m-deployer>subjects>0>kind", "Person", "none of"),
    ("EventType/m-wake-v1>spec>broker", 7, "no string"),
    ("ConfigMap/m-plan>data>plan.yaml", {}, "no string"),
]
KSERVE_CASES = [
    (f"{ISVC}>spec>predictor>minReplicas", GONE, "minReplicas is missing"),
    (f"{ISVC}>spec>predictor>minReplicas", 5, "below minReplicas"),
    (f"{ISVC}>spec>predictor>maxReplicas", 2**31, "is not in"),
    (f"{ISVC}>spec>predictor>scaleMetric", "rps", "not concurrency"),
    (f"{ISVC}>spec>predictor>scaleTarget", 2, "no fractions"),
    (f"{ISVC}>spec>predictor>timeout", GONE, "timeout is missing"),
    (f"{ISVC}>spec>predictor>deploymentStrategy", {}, "no place here"),
    (f"{ISVC}>spec>predictor>containerConcurency", 3, "unknown field"),
    (f"{ISVC}>spec>predictor>serviceAccountName", "x", "no ServiceAccount"),
    (f"{ISVC}>spec>predictor>model>runtime", "x", "no ServingRuntime"),
    (f"{ISVC}>spec>predictor>model>modelFormat>name", "pytorch", "multi-model"),
    (f"{ISVC}>spec>predictor>model>storageUri", "gcs://b/x", "does not know the storage"),
    (f"{ISVC}>spec>predictor>model>storageUri", "hf://a/b/c", "not hf://"),
    (f"{ISVC}>spec>predictor>model>resources>limits", GONE, "no limits of cpu"),
    (f"{ISVC}>spec>predictor>model>env>0", {"name": "PYTHONPATH", "value": "/x"}, "refused or overwritten"),
    (f"{ISVC}>spec>predictor>model>env>0", {"name": "MULTI_MODEL_SERVER", "value": "true"}, "multi-model"),
    (f"{ISVC}>metadata>annotations>serving.kserve.io/deploymentMode", GONE, "Knative mode"),
    (f"{ISVC}>metadata>annotations>serving.kserve.io/autoscalerClass", "kpa", "refused or dropped"),
    (f"{ISVC}>metadata>annotations>autoscaling.knative.dev/min-scale", "0", "refused or dropped"),
    (f"{ISVC}>metadata>annotations>autoscaling.knative.dev/target", "9", "above containerConcurrency"),
    (f"{ISVC}>metadata>labels>networking.knative.dev/visibility", GONE, "visibility"),
    (f"{ISVC}>metadata>labels>stagecraft.dev/role", "x", "leaves stages open"),
    (f"{ISVC}>metadata>name", "m-predictor-stage-0", "cuts"),
    (f"{ISVC}>metadata>name", "m" * 54, "must fit 63"),
    (f"{FRONT}>containers>0>name", "main", "must be kserve-container"),
    (f"{FRONT}>containers>0>env>0", {"name": "PROTOCOL", "value": "v3"}, "PROTOCOL"),
    (f"{FRONT}>volumes>1", {"name": "x", "emptyDir": {}}, "not mounted"),
    (f"{FRONT}>nodeSelector", {"a": "b"}, "podspec-nodeselector"),
    ("ServingRuntime/m-stage>spec>containers>0>name", "main", "must be kserve-container"),
    ("ServingRuntime/m-stage>spec>containers>0>readinessProbe>httpGet>port", GONE, "is required"),
    ("ServingRuntime/m-stage>spec>supportedModelFormats>0>autoSelect", True, "models of others"),
    ("ServingRuntime/m-stage>spec>volumes>0>name", "x", "not mounted"),
]

KEEPER = "Service/small-1b-results>spec>template"
REQUESTS = "Trigger/small-1b-batch-requests>spec"
BATCH_CASES = [
    (f"{KEEPER}>metadata>annotations>autoscaling.knative.dev/max-scale", "2", "write to one file"),
    (f"{KEEPER}>metadata>annotations>autoscaling.knative.dev/min-scale", "0", "end with their replica"),
    (f"{REQUESTS}>broker", "other", "no Broker 'other'"),
    (f"{REQUESTS}>subscriber>uri", "/", "events of batches go elsewhere"),
    (f"{REQUESTS}>subscriber>ref>name", "x", "no Service 'x'"),
    (f"{REQUESTS}>delivery>timeout", "600s", "no ISO 8601 duration"),
    (f"{REQUESTS}>delivery>retries", 3, "retries"),
    (f"{REQUESTS}>delivery>retry", "3", "retry"),
    (f"{REQUESTS}>filters", [{"exakt": {"type": "x"}}], "exakt"),
    ("Broker/default>spec", {"delivery": {"backoffPolice": "linear"}}, "backoffPolice"),
]


@pytest.mark.parametrize(("path", "value", "expected"), BATCH_CASES)
def test_a_broken_batch_is_seen(
    deployment: Make, trees: Trees, complaints: Complaints, path: str, value: Any, expected: str
) -> None:
    what = deployment(2, "s3://b/x", batch=Batch())
    check(complaints(what, changed(trees(what), path, value)), expected)


@pytest.mark.parametrize(("path", "value", "expected"), KNATIVE_CASES)
def test_a_broken_knative_service_is_seen(
    as_knative: Deployment, trees: Trees, complaints: Complaints, path: str, value: Any, expected: str
) -> None:
    check(complaints(as_knative, changed(trees(as_knative), path, value)), expected)


@pytest.mark.parametrize(("path", "value", "expected"), KSERVE_CASES)
def test_a_broken_inference_service_is_seen(
    as_kserve: Deployment, trees: Trees, complaints: Complaints, path: str, value: Any, expected: str
) -> None:
    check(complaints(as_kserve, changed(trees(as_kserve), path, value)), expected)


def check(found: list[str], expected: str) -> None:
    assert any(expected in text for text in found), found


def test_what_is_whole_is_not_complained_about(
    as_knative: Deployment, as_kserve: Deployment, complaints: Complaints
) -> None:
    assert complaints(as_knative) == []
    assert complaints(as_kserve) == []


def test_no_place_of_the_schemas_lets_unknown_members_through(
    schemas: Any, open_places: Callable[[Any], list[str]]
) -> None:
    assert open_places(schemas) == []


def test_a_lost_object_is_missed(as_knative: Deployment, trees: Trees, complaints: Complaints) -> None:
    objects = trees(as_knative)
    for kind, name, expected in (
        ("ServiceAccount", "m-stage", "no ServiceAccount"),
        ("Service", "m-stage-1", "the stages are"),
        ("Service", "m", "0 orchestrators"),
    ):
        left = [one for one in objects if (one["kind"], one["metadata"]["name"]) != (kind, name)]
        check(complaints(as_knative, left), expected)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"scheduling": Scheduling(node_selector={"a": "b"})}, "kubernetes.podspec-nodeselector"),
        ({"scaling": Scaling(initial_scale=0)}, "allow-zero-initial-scale"),
        ({"timeout_s": 601}, "max-revision-timeout-seconds"),
        ({"weights": WeightSource("pvc://c/x")}, "kubernetes.podspec-persistent-volume-claim"),
    ],
)
def test_a_setting_that_is_not_told_is_missed_and_one_told_for_nothing_too(
    deployment: Make, complaints: Complaints, trees: Trees, changes: dict[str, Any], key: str
) -> None:
    usual = deployment(2, "s3://b/x")
    special = replace(usual, **changes)
    check(complaints(usual, trees(special)), f"needs {key}")
    check(complaints(special, trees(usual)), "nothing needs it")
