"""InferenceServices as KServe makes Knative Services of them, what it refuses, and where complaints point.

The expectations are those of the project's KServe fact sheet, sections (a) to (c).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from knative.autoscaler.config import AutoscalerConfig
from knative.errors import ValidationError
from knative.resources.check import check_documents
from knative.resources.config_maps import DefaultsConfig, FeaturesConfig
from knative.resources.documents import Parsed, parse, parse_documents
from knative.resources.objects import InferenceService, Service

Tree = dict[str, Any]
ABSENT = object()
KPA = "kpa.autoscaling.knative.dev"
FIRST = "spec.predictor.containers[0]"


def custom(**predictor: Any) -> Tree:
    """An orchestrator as a custom predictor."""
    container = {"name": "kserve-container", "image": "stagecraft/orchestrator", "ports": [{"containerPort": 8080}]}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": "bard"},
        "spec": {"predictor": {"containers": [container], **predictor}},
    }


def by_runtime(**model: Any) -> Tree:
    """A stage as a model of the runtime below."""
    tree = custom()
    given = {"modelFormat": {"name": "huggingface"}, "runtime": "stage", **model}
    tree["spec"]["predictor"] = {"model": {key: value for key, value in given.items() if value is not ABSENT}}
    tree["metadata"]["labels"] = {"part": "two"}
    return tree


def runtime(name: str = "stage", kind: str = "ServingRuntime", **spec: Any) -> Tree:
    container = {
        "name": "kserve-container",
        "image": "registry.example/stage:1.2",
        "args": ["--name", "{{.Name}}.{{ .Namespace }}", "--part={{.Labels.part}}{{.Annotations.none}}"],
        "command": ["serve"],
        "env": [{"name": "A", "value": "runtime"}, {"name": "B", "value": "runtime"}],
        "resources": {"limits": {"cpu": "4", "memory": "8Gi"}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
        "readinessProbe": {"httpGet": {"path": "/ready"}, "failureThreshold": 9, "periodSeconds": 1},
    }
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": {
            "supportedModelFormats": [{"name": "huggingface", "version": "1", "autoSelect": True}],
            "containers": [container],
            "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
            **spec,
        },
    }


def parsed(*trees: Tree, autoscaler: AutoscalerConfig | None = None, flags: dict[str, str] | None = None) -> Parsed:
    documents = parse_documents(yaml.safe_dump_all(trees), "f.yaml")
    features = FeaturesConfig.from_data(flags or {})
    return parse(documents, autoscaler=autoscaler or AutoscalerConfig(), defaults=DefaultsConfig(), features=features)


def made(*trees: Tree, **options: Any) -> Tree:
    """The Knative Service of the one InferenceService."""
    (service,) = (one for one in parsed(*trees, **options).resources if isinstance(one, InferenceService))
    return dict(service.service.manifest)


def problems(*trees: Tree) -> list[str]:
    """Without the file and line."""
    with pytest.raises(ValidationError) as caught:
        parsed(*trees)
    return [problem.split(": ", 1)[1] for problem in caught.value.problems]


def refused_by_a_cluster(*trees: Tree) -> list[str]:
    documents = parse_documents(yaml.safe_dump_all(trees), "f.yaml")
    found = check_documents(documents, autoscaler=AutoscalerConfig(), defaults=DefaultsConfig())
    return [problem.split(": ", 1)[1] for problem in found]


def changed(tree: Tree, path: str, value: object) -> Tree:
    """With `value` at "spec.predictor.containers[0].env"."""
    tree = copy.deepcopy(tree)
    *way, last = path.replace("[", "|[").replace(".", "|").split("|")
    here: Any = tree
    for part in way:
        here = here[int(part[1:-1])] if part.startswith("[") else here.setdefault(part, {})
    if value is ABSENT:
        del here[last]
    else:
        here[last] = value
    return tree


# -- translation


def test_a_custom_predictor_becomes_this_service() -> None:
    tree = custom(minReplicas=0, maxReplicas=3, scaleTarget=4, scaleMetric="rps", containerConcurrency=8, timeout=500)
    tree["metadata"] |= {
        "namespace": "models",
        "labels": {"app": "bard", "networking.knative.dev/visibility": "cluster-local"},
        "annotations": {
            "autoscaling.knative.dev/window": "30s",
            "autoscaling.knative.dev/min-scale": "7",
            "serving.knative.dev/rollout-duration": "20s",
            "kubectl.kubernetes.io/last-applied-configuration": "{}",
        },
    }
    tree["spec"]["predictor"] |= {
        "labels": {"app": "own"},
        "annotations": {"note": "x"},
        "serviceAccountName": "reader",
    }
    own = {"app": "own", "serving.kserve.io/inferenceservice": "bard", "component": "predictor"}
    assert made(tree) == {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {
            "name": "bard-predictor",
            "namespace": "models",
            "labels": {**own, "networking.knative.dev/visibility": "cluster-local"},
            "annotations": {"serving.knative.dev/rollout-duration": "20s"},
        },
        "spec": {
            "template": {
                "metadata": {
                    "labels": own,
                    "annotations": {
                        "autoscaling.knative.dev/class": KPA,
                        "autoscaling.knative.dev/window": "30s",
                        "autoscaling.knative.dev/min-scale": "0",
                        "autoscaling.knative.dev/max-scale": "3",
                        "autoscaling.knative.dev/target": "4",
                        "autoscaling.knative.dev/metric": "rps",
                        "note": "x",
                    },
                },
                "spec": {
                    "serviceAccountName": "reader",
                    "containerConcurrency": 8,
                    "timeoutSeconds": 500,
                    "responseStartTimeoutSeconds": 500,
                    "enableServiceLinks": False,
                    "containers": [
                        {
                            "name": "kserve-container",
                            "image": "stagecraft/orchestrator",
                            "ports": [{"containerPort": 8080}],
                            "env": [{"name": "INFERENCE_SERVICE_NAME", "value": "bard"}],
                            "resources": {
                                "requests": {"cpu": "1", "memory": "2Gi"},
                                "limits": {"cpu": "1", "memory": "2Gi"},
                            },
                            "readinessProbe": {"tcpSocket": {}, "successThreshold": 1},
                        }
                    ],
                },
            },
            "traffic": [{"latestRevision": True, "percent": 100}],
        },
    }


def test_a_model_is_merged_over_its_runtime() -> None:
    tree = by_runtime(
        args=["--more"],
        env=[{"name": "C", "value": "model"}, {"name": "B", "value": "model"}],
        resources={"limits": {"memory": "16Gi", "nvidia.com/gpu": "1"}},
        readinessProbe={"failureThreshold": 50},
    )
    tree["spec"]["predictor"]["volumes"] = [{"name": "tmp", "emptyDir": {}}]
    tree["spec"]["predictor"]["model"]["volumeMounts"] = [{"name": "tmp", "mountPath": "/tmp"}]
    pod = made(runtime(annotations={"of": "runtime"}, labels={"part": "one"}), tree)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container == {
        "name": "kserve-container",
        "image": "registry.example/stage:1.2",
        "command": ["serve"],
        "args": ["--name", "bard.default", "--part=two", "--more"],
        "env": [
            {"name": "A", "value": "runtime"},
            {"name": "B", "value": "model"},
            {"name": "C", "value": "model"},
            {"name": "INFERENCE_SERVICE_NAME", "value": "bard"},
        ],
        "resources": {"limits": {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}},  # and no defaults
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "tmp", "mountPath": "/tmp"}],
        "readinessProbe": {
            "httpGet": {"path": "/ready"}, "failureThreshold": 50, "periodSeconds": 1, "successThreshold": 1,
            "timeoutSeconds": 1,
        },
    }  # fmt: skip
    assert [volume["name"] for volume in pod["volumes"]] == ["shm", "tmp"]


def test_labels_and_annotations_of_the_runtime_give_way() -> None:
    tree = by_runtime()
    tree["metadata"]["annotations"] = {"a": "service", "b": "service"}
    tree["spec"]["predictor"]["annotations"] = {"b": "predictor"}
    service = made(runtime(annotations={"a": "runtime", "c": "runtime"}, labels={"part": "one", "of": "rt"}), tree)
    metadata = service["spec"]["template"]["metadata"]
    assert metadata["annotations"].items() >= {"a": "service", "b": "predictor", "c": "runtime"}.items()
    assert metadata["labels"].items() >= {"part": "two", "of": "rt"}.items()


SAID = {  # case: (path in the InferenceService, value) -> (path in the Knative Service, value)
    "never_to_zero_by_default": (
        ("spec.predictor.maxReplicas", 2), ("annotations", {"autoscaling.knative.dev/min-scale": "1"}),
    ),
    "no_maximum": (("spec.predictor.maxReplicas", 0), ("annotations", {"autoscaling.knative.dev/max-scale": ABSENT})),
    "another_class_stays": (
        ("metadata.annotations", {"autoscaling.knative.dev/class": "hpa.autoscaling.knative.dev"}),
        ("annotations", {"autoscaling.knative.dev/class": "hpa.autoscaling.knative.dev"}),
    ),
    "a_fraction_as_annotation": (
        ("metadata.annotations", {"autoscaling.knative.dev/target": "1.5"}),
        ("annotations", {"autoscaling.knative.dev/target": "1.5"}),
    ),
    "wakes_reach_the_template": (
        ("metadata.annotations", {"stagecraft.dev/wakes": "a,b"}), ("annotations", {"stagecraft.dev/wakes": "a,b"}),
    ),
    "initial_scale_zero_is_taken_out": (
        ("metadata.annotations", {"autoscaling.knative.dev/initial-scale": "0"}),
        ("annotations", {"autoscaling.knative.dev/initial-scale": ABSENT}),
    ),
    "initial_scale_two_stays": (
        ("metadata.annotations", {"autoscaling.knative.dev/initial-scale": "2"}),
        ("annotations", {"autoscaling.knative.dev/initial-scale": "2"}),
    ),
    "the_name_of_the_predictor": (("spec.predictor.name", "main"), ("name", "bard-main-predictor")),
    "one_container_is_renamed": ((f"{FIRST}.name", "server"), ("container", {"name": "kserve-container"})),
    "a_given_limit_stays": (
        (f"{FIRST}.resources", {"limits": {"memory": "9Gi"}}),
        ("container", {"resources": {
            "requests": {"cpu": "1", "memory": "2Gi"}, "limits": {"cpu": "1", "memory": "9Gi"},
        }}),
    ),
    "the_name_variable_is_overwritten": (
        (f"{FIRST}.env", [{"name": "INFERENCE_SERVICE_NAME", "value": "x"}, {"name": "A", "value": "a"}]),
        ("container", {"env": [{"name": "INFERENCE_SERVICE_NAME", "value": "bard"}, {"name": "A", "value": "a"}]}),
    ),
    "tag_routing": (
        ("metadata.annotations", {"serving.kserve.io/enable-tag-routing": "true"}),
        ("traffic", [{"latestRevision": True, "percent": 100, "tag": "latest"}]),
    ),
    "timeout_sets_both": (
        ("spec.predictor.timeout", 600), ("pod", {"timeoutSeconds": 600, "responseStartTimeoutSeconds": 600}),
    ),
    "serverless_is_the_old_name": (
        ("metadata.annotations", {"serving.kserve.io/deploymentMode": "Serverless"}), ("name", "bard-predictor"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), SAID.values(), ids=SAID)
def test_what_is_said_arrives(given: tuple[str, object], expected: tuple[str, Any]) -> None:
    service = made(changed(custom(), *given))
    template = service["spec"]["template"]
    parts = {
        "name": service["metadata"]["name"],
        "traffic": service["spec"]["traffic"],
        "annotations": template["metadata"]["annotations"],
        "pod": template["spec"],
        "container": template["spec"]["containers"][0],
    }
    part, value = expected
    if not isinstance(value, dict):
        assert parts[part] == value
    else:
        assert {key: parts[part].get(key, ABSENT) for key in value} == value


def test_initial_scale_zero_stays_where_it_is_allowed() -> None:
    tree = changed(custom(), "metadata.annotations", {"autoscaling.knative.dev/initial-scale": "0"})
    service = made(tree, autoscaler=AutoscalerConfig(allow_zero_initial_scale=True))
    assert service["spec"]["template"]["metadata"]["annotations"]["autoscaling.knative.dev/initial-scale"] == "0"


IMAGES = {
    "as_it_is": ({}, {}, "r.io/a/stage:1.2"),
    "another_version": ({"runtimeVersion": "2"}, {}, "r.io/a/stage:2"),
    "a_digest_is_never_changed": ({"runtimeVersion": "2", "image": f"s@sha256:{'0' * 64}"}, {}, f"s@sha256:{'0' * 64}"),
    "the_build_for_gpus": (
        {"resources": {"limits": {"nvidia.com/gpu": 1}}}, {"serving.kserve.io/server-type": "huggingfaceserver"},
        "r.io/a/stage:1.2-gpu",
    ),
    "the_build_for_cpus": ({}, {"serving.kserve.io/server-type": "vllmserver"}, "r.io/a/stage-cpu:1.2"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "annotations", "image"), IMAGES.values(), ids=IMAGES)
def test_the_image_of_a_runtime(model: Tree, annotations: Tree, image: str) -> None:
    of_runtime = changed(runtime(), "spec.containers[0].image", "r.io/a/stage:1.2")
    of_runtime["metadata"]["annotations"] = annotations
    service = made(of_runtime, by_runtime(**model))
    assert service["spec"]["template"]["spec"]["containers"][0]["image"] == image


# -- which runtime

FORMAT = {"name": "huggingface", "autoSelect": True}
CHOICES = {
    "its_namespace_before_the_cluster": (
        {}, [("a", "ClusterServingRuntime", {"supportedModelFormats": [{**FORMAT, "priority": 9}]}),
             ("b", "ServingRuntime", {})], "b",
    ),
    "the_higher_priority": (
        {}, [("a", "ServingRuntime", {"supportedModelFormats": [{**FORMAT, "priority": 1}]}),
             ("b", "ServingRuntime", {"supportedModelFormats": [{**FORMAT, "priority": 2}]}),
             ("c", "ServingRuntime", {})], "b",
    ),
    "not_the_disabled_one": ({}, [("a", "ServingRuntime", {"disabled": True}), ("b", "ServingRuntime", {})], "b"),
    "one_with_the_version": (
        {"modelFormat": {"name": "huggingface", "version": "1"}},
        [("a", "ServingRuntime", {"supportedModelFormats": [FORMAT]}), ("b", "ServingRuntime", {})], "b",
    ),
    "one_that_speaks_the_protocol": (
        {"protocolVersion": "v2"},
        [("a", "ServingRuntime", {"protocolVersions": ["v1"]}),
         ("b", "ServingRuntime", {"protocolVersions": ["v1", "v2"]})], "b",
    ),
    "v1_unless_said": (
        {}, [("a", "ServingRuntime", {"protocolVersions": ["v2"]}),
             ("b", "ServingRuntime", {"protocolVersions": ["v1"]})], "b",
    ),
    "only_by_name_without_autoselect": (
        {"runtime": "a"}, [("a", "ServingRuntime", {"supportedModelFormats": [{"name": "huggingface"}]}),
                           ("b", "ServingRuntime", {})], "a",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "runtimes", "chosen"), CHOICES.values(), ids=CHOICES)
def test_the_runtime_of_a_model(model: Tree, runtimes: list[tuple[str, str, Tree]], chosen: str) -> None:
    trees = [runtime(name, kind, annotations={"from": name}, **spec) for name, kind, spec in runtimes]
    service = made(*trees, by_runtime(**{"runtime": ABSENT, **model}))
    assert service["spec"]["template"]["metadata"]["annotations"]["from"] == chosen


def test_a_runtime_may_come_behind_its_service() -> None:
    assert made(by_runtime(), runtime()) == made(runtime(), by_runtime())


def test_two_runtimes_with_the_same_priority_are_refused() -> None:
    listed = {"supportedModelFormats": [{**FORMAT, "priority": 1}], "protocolVersions": ["v2"]}
    assert refused_by_a_cluster(runtime("a", **listed), runtime("b", **listed)) == [
        '"a" has the same priority for the model format "huggingface": spec.supportedModelFormats[0].priority'
    ]
    assert refused_by_a_cluster(runtime("a", **listed), runtime("b", "ClusterServingRuntime", **listed)) == []


@pytest.mark.parametrize(
    ("model", "of_runtime", "complaint"),
    [
        ({"modelFormat": {"name": "onnx"}, "storageUri": "x"}, {}, "does not support the model format"),
        ({"protocolVersion": "v2"}, {"protocolVersions": ["v1"]}, "does not support the protocol v2"),
        ({}, {"disabled": True}, 'the runtime "stage" is disabled'),
        ({}, {"containers": [{"name": "other", "image": "a"}]}, 'has no container "kserve-container"'),
        ({"args": ["{{ .Spec }}"]}, {}, "cannot fill in the template {{ .Spec }}"),
        ({"env": [{"name": "PYTHONPATH", "value": "/"}]}, {}, "the variable PYTHONPATH is not allowed"),
        ({"name": "x"}, {}, "the 'name' field is not allowed in standard predictor"),
        ({"modelFormat": {}}, {}, "missing field(s): spec.predictor.model.modelFormat.name"),
    ],
)
def test_a_model_that_does_not_fit_its_runtime(model: Tree, of_runtime: Tree, complaint: str) -> None:
    found = refused_by_a_cluster(runtime(**of_runtime), by_runtime(**model))
    assert any(complaint in problem for problem in found), found


def test_a_model_without_weights_makes_a_multi_model_server_by_accident() -> None:
    formats = {"supportedModelFormats": [{"name": "onnx"}]}
    trap = by_runtime(modelFormat={"name": "onnx"})
    (found,) = refused_by_a_cluster(runtime(**formats), trap)
    assert found.startswith("a model without storageUri or storage makes a multi-model server: spec.predictor.model\n")
    assert refused_by_a_cluster(runtime(**formats), changed(trap, "spec.predictor.model.storageUri", "s3://a/b")) == []


# -- refusals

CLUSTER = {  # case: (path, value) -> the one complaint of a cluster, or how it begins
    "name_with_a_digit_first": ("metadata.name", "1bard", "invalid value: 1bard: metadata.name"),
    "name_too_long": ("metadata.name", "a" * 54, "invalid value: " + "a" * 54 + ": metadata.name\nits Knative Service"),
    "name_with_predictor": ("metadata.name", "a-predictor-b", "invalid value: a-predictor-b: metadata.name\nKServe"),
    "namespace_with_default": ("metadata.namespace", "my-default", "invalid value: my-default: metadata.namespace"),
    "no_name": ("metadata.name", ABSENT, "missing field(s): metadata.name"),
    "autoscaler_kpa": (
        "metadata.annotations", {"serving.kserve.io/autoscalerClass": "kpa"},
        "[kpa] is not a supported autoscaler class type: metadata.annotations.serving.kserve.io/autoscalerClass",
    ),
    "min_below_zero": ("spec.predictor.minReplicas", -1, "'MinReplicas' cannot be less than 0: spec.predictor.minRep"),
    "max_below_zero": ("spec.predictor.maxReplicas", -1, "'MaxReplicas' cannot be less than 0: spec.predictor.maxRep"),
    "concurrency_below_zero": ("spec.predictor.containerConcurrency", -1, "parallelism cannot be less than 0"),
    "concurrency_over_knatives": (
        "spec.predictor.containerConcurrency", 1001, "expected 0 <= 1001 <= 1000: spec.predictor.containerConcurrency",
    ),
    "timeout_over_knatives": ("spec.predictor.timeout", 601, "expected 0 <= 601 <= 600: spec.predictor.timeout"),
    "metric_of_hpa": ("spec.predictor.scaleMetric", "cpu", "[cpu] is not a supported metric: spec.predictor.scaleM"),
    "target_zero": (
        "spec.predictor.scaleTarget", 0, "target 0 should be at least 0.01: spec.predictor.scaleTarget",
    ),
    "a_canary_of_its_own": ("spec.canary", {"a": 1}, "canary is only supported in deployment mode Standard"),
    "deployment_strategy": ("spec.predictor.deploymentStrategy", {"type": "x"}, "customizing deploymentStrategy is"),
    "worker_spec": ("spec.predictor.workerSpec", {"size": 2}, "workerSpec is only supported in deployment mode Stand"),
    "logger_mode": ("spec.predictor.logger", {"mode": "none"}, "invalid logger type: spec.predictor.logger.mode"),
    "two_predictors": ("spec.predictor.model", {"modelFormat": {"name": "x"}}, "exactly one of these must be specif"),
    "no_predictor": ("spec.predictor", ABSENT, "missing field(s): spec.predictor"),
    "no_container": ("spec.predictor.containers", [], "exactly one of model, containers must be specified"),
    "kserve_container_second": (
        "spec.predictor.containers",
        [{"name": "a", "image": "a", "ports": [{"containerPort": 1}]}, {"name": "kserve-container", "image": "b"}],
        '"kserve-container" must be the first of several containers: spec.predictor.containers',
    ),
    "protocol": (f"{FIRST}.env", [{"name": "PROTOCOL", "value": "v3"}], "invalid protocol v3. Must be one of [v1, v2]"),
    "multi_model": (f"{FIRST}.env", [{"name": "MULTI_MODEL_SERVER", "value": "true"}], "it would be a multi-model s"),
    "python_path": (f"{FIRST}.env", [{"name": "PYTHONPATH", "value": "/a"}], "the variable PYTHONPATH is not allowed"),
    "reserved_variable": (
        f"{FIRST}.env", [{"name": "A", "value": "a"}, {"name": "PORT", "value": "1"}],
        f'"PORT" is a reserved environment variable: {FIRST}.env[1].name',
    ),
    "reserved_port": (f"{FIRST}.ports", [{"containerPort": 8012}], "invalid value: 8012 is a reserved port: " + FIRST),
    "request_over_the_default_limit": (
        f"{FIRST}.resources", {"requests": {"memory": "3Gi"}},
        f"invalid value: 3Gi: {FIRST}.resources.requests.memory\nmust be less than or equal to memory limit of 2Gi",
    ),
    "a_grace_period": (
        "spec.predictor.terminationGracePeriodSeconds", 5,
        "must not set the field(s): spec.predictor.terminationGracePeriodSeconds\nKnative takes timeoutSeconds",
    ),
    "behind_a_flag": (
        "spec.predictor.nodeSelector", {"gpu": "yes"},
        "must not set the field(s): spec.predictor.nodeSelector\non a cluster this needs kubernetes.podspec-nodesel",
    ),
    "unknown_field": (
        "spec.predictor.minReplica", 1, 'unknown field "spec.predictor.minReplica"\ndid you mean "minReplicas"?',
    ),
    "a_type": ("spec.predictor.minReplicas", "0", "invalid value: 0: spec.predictor.minReplicas\nexpected a whole num"),
    "a_window": (
        "metadata.annotations", {"autoscaling.knative.dev/window": "1s"},
        "expected 6s <= 1s <= 1h0m0s: metadata.annotations.autoscaling.knative.dev/window",
    ),
    "initial_scale_of_the_predictor": (
        "spec.predictor.annotations", {"autoscaling.knative.dev/initial-scale": "0"},
        "invalid value: 0: spec.predictor.annotations.autoscaling.knative.dev/initial-scale=0 not allowed by cluster",
    ),
    "both_ways_of_storage": (
        "spec.predictor",
        {"model": {"modelFormat": {"name": "x"}, "storageUri": "s3://a"}, "storageUris": [{"uri": "s3://b"}]},
        "setting both storageUri and storageUris is not supported: spec.predictor.model.storageUri, spec.predictor.st",
    ),
    "storage_scheme": (
        f"{FIRST}.env", [{"name": "STORAGE_URI", "value": "ftp://a/b"}], "invalid value: ftp://a/b: " + FIRST,
    ),
    "a_folder_of_the_hub": (
        f"{FIRST}.env", [{"name": "STORAGE_URI", "value": "hf://a/b/c"}], "invalid value: hf://a/b/c: " + FIRST,
    ),
    "mounts_apart": (
        "spec.predictor.storageUris", [{"uri": "s3://a", "mountPath": "/a"}, {"uri": "s3://b", "mountPath": "/b"}],
        "storage paths must have a common parent directory: spec.predictor.storageUris",
    ),
    "canary_percent": ("spec.predictor.canaryTrafficPercent", 101, "expected 0 <= 101 <= 100: spec.predictor.canary"),
    "visibility": (
        "metadata.labels", {"networking.knative.dev/visibility": "private"},
        "invalid value: private: metadata.labels.networking.knative.dev/visibility",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("path", "value", "complaint"), CLUSTER.values(), ids=CLUSTER)
def test_a_cluster_refuses(path: str, value: object, complaint: str) -> None:
    (found,) = refused_by_a_cluster(changed(custom(), path, value))
    assert found.startswith(complaint)


def test_min_over_max_counts_the_default_of_one() -> None:
    (found,) = refused_by_a_cluster(custom(minReplicas=3, maxReplicas=2))
    places = "spec.predictor.minReplicas, spec.predictor.maxReplicas"
    assert found.startswith(f"'MinReplicas' cannot be greater than MaxReplicas: {places}\n3 is above 2")
    assert refused_by_a_cluster(custom(minReplicas=3, maxReplicas=0)) == []


ONE_MACHINE = {
    "another_mode": (
        "metadata.annotations", {"serving.kserve.io/deploymentMode": "RawDeployment"}, "one machine has no deployment",
    ),
    "stopped": ("metadata.annotations", {"serving.kserve.io/stop": "true"}, "one machine does not stop a service"),
    "transformer": ("spec.transformer", {"containers": []}, "the transformer is not run on one machine"),
    "explainer": ("spec.explainer", {"containers": []}, "the explainer is not run on one machine"),
    "canary": ("spec.predictor.canaryTrafficPercent", 20, "a canary is not run on one machine"),
    "storage": (f"{FIRST}.env", [{"name": "STORAGE_URI", "value": "pvc://a/b"}], "one machine does not download mod"),
    "no_such_runtime": (
        "spec.predictor", {"model": {"modelFormat": {"name": "huggingface"}, "runtime": "x"}},
        'there is no ServingRuntime or ClusterServingRuntime "x"',
    ),
    "no_runtime": (
        "spec.predictor", {"model": {"modelFormat": {"name": "huggingface"}}}, "no runtime found to support the model",
    ),
    "a_framework": ("spec.predictor", {"sklearn": {"storageUri": "s3://a"}}, "sklearn is not run on one machine"),
    "a_sidecar": (
        "spec.predictor.containers",
        [{"name": "kserve-container", "image": "a", "ports": [{"containerPort": 1}]}, {"name": "b", "image": "b"}],
        "one machine runs one container per replica",
    ),
    "a_secret": (
        f"{FIRST}.env", [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
        f"variable A has no source on one machine: {FIRST}.env[0].valueFrom.secretKeyRef",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("path", "value", "complaint"), ONE_MACHINE.values(), ids=ONE_MACHINE)
def test_one_machine_refuses_what_a_cluster_takes(path: str, value: object, complaint: str) -> None:
    tree = changed(custom(), path, value)
    (found,) = problems(tree)
    assert found.startswith(complaint)
    assert refused_by_a_cluster(tree) == []


def test_what_has_no_effect_here_is_warned_of_and_runs() -> None:
    tree = custom(
        volumes=[{"name": "shm", "emptyDir": {"medium": "Memory"}}], serviceAccountName="a", batcher={"maxBatchSize": 2}
    )
    tree["spec"]["predictor"]["containers"][0] |= {
        "env": [{"name": "T", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "optional": True}}}],
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
        "securityContext": {"runAsNonRoot": True},
        "imagePullPolicy": "Always",
    }
    tree["metadata"]["annotations"] = {"autoscaling.knative.dev/min-scale": "3"}
    result = parsed(tree)
    assert len(result.resources) == 1
    places = sorted(warning.rpartition(": ")[2] for warning in result.warnings)
    assert places == [
        "metadata.annotations.autoscaling.knative.dev/min-scale",
        "spec.predictor.batcher",
        f"{FIRST}.env[0].valueFrom.secretKeyRef",
        f"{FIRST}.securityContext",
        "spec.predictor.serviceAccountName",
        "spec.predictor.volumes",
    ]


# -- where complaints point


def places(text: str) -> list[str]:
    documents = parse_documents(text, "f.yaml")
    return check_documents(documents, autoscaler=AutoscalerConfig(), defaults=DefaultsConfig())


def test_complaints_of_knative_point_into_the_inference_service() -> None:
    text = """\
apiVersion: serving.kserve.io/v1alpha1
kind: ServingRuntime
metadata: {name: stage}
spec:
  supportedModelFormats: [{name: huggingface}]
  containers:
  - name: kserve-container
    image: stage
    env: [{name: A, value: a}, {name: K_SERVICE, value: b}]
---
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata: {name: one}
spec:
  predictor:
    timeout: 700
    model:
      modelFormat: {name: huggingface}
      runtime: stage
      env:
      - {name: A, value: c}
      - {name: PORT, value: "1"}
"""
    assert places(text) == [
        "f.yaml:16: expected 0 <= 700 <= 600: spec.predictor.timeout",
        'f.yaml:19: "K_SERVICE" is a reserved environment variable: '
        "spec.predictor.model.runtime[stage].spec.containers[0].env[1].name",
        'f.yaml:22: "PORT" is a reserved environment variable: spec.predictor.model.env[1].name',
    ]


def test_what_a_model_leaves_to_its_runtime_is_complained_of_there() -> None:
    assert refused_by_a_cluster(runtime(nodeSelector={"a": "b"}), by_runtime()) == [
        "must not set the field(s): spec.predictor.model.runtime[stage].spec.nodeSelector\n"
        "on a cluster this needs kubernetes.podspec-nodeselector in config-features"
    ]


# -- several objects


def test_an_inference_service_and_its_knative_service_cannot_both_be_given() -> None:
    service = {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": "bard-predictor"},
        "spec": {"template": {"spec": {"containers": [{"image": "a"}]}}},
    }
    (found,) = problems(service, custom())
    assert found == 'Service "bard-predictor" is given twice in namespace default, first at f.yaml:1'


def test_a_changed_runtime_changes_the_services_there_are() -> None:
    first = parsed(runtime(), by_runtime(), changed(custom(), "metadata.name", "other"))
    services = [one for one in first.resources if isinstance(one, InferenceService)]
    documents = parse_documents(yaml.safe_dump(runtime(annotations={"new": "yes"})), "f.yaml")
    again = parse(
        documents, autoscaler=AutoscalerConfig(), defaults=DefaultsConfig(), inference_services=services
    ).resources
    followed = [one.service for one in again if isinstance(one, InferenceService)]
    assert [service.template.annotations["new"] for service in followed] == ["yes"]


def test_what_was_applied_can_be_applied_again() -> None:
    (service,) = parsed(custom(minReplicas=0)).resources
    assert isinstance(service, InferenceService)
    assert parsed(dict(service.manifest)).resources == (service,)
    assert parsed(dict(service.service.manifest)).resources == (service.service,)
    assert isinstance(service.service, Service)
