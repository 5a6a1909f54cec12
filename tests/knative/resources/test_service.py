"""Defaulting and validation of a Knative Service, in the words of Knative's webhook."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from knative.autoscaler.config import AutoscalerConfig
from knative.errors import ValidationError
from knative.resources.config_maps import DefaultsConfig, FeaturesConfig
from knative.resources.objects import Probe, Service, TrafficTarget
from knative.resources.service import Settings, check_update, read_service

POD = "spec.template.spec"
CONTAINER = f"{POD}.containers[0]"
ABSENT = object()


def bend(tree: Any, path: str, value: object) -> None:
    """Sets `path` ("spec.template.spec.containers[0].image", "a.[key.with.dots]") in `tree`, or takes it out."""
    steps: list[str | int] = []
    rest = path
    while rest:
        if rest.startswith("[") and (end := rest.index("]")):
            step, rest = rest[1:end], rest[end + 1 :].removeprefix(".")
            steps.append(int(step) if step.isdecimal() else step)
            continue
        cut = min((i for i in (rest.find("."), rest.find("[")) if i >= 0), default=len(rest))
        steps.append(rest[:cut])
        rest = rest[cut:].removeprefix(".")
    for step, follows in pairwise(steps):
        if isinstance(tree, list) and isinstance(step, int) and step == len(tree):
            tree.append({})
        elif isinstance(tree, dict):
            tree.setdefault(step, [] if isinstance(follows, int) else {})
        tree = tree[step]
    if value is ABSENT:
        del tree[steps[-1]]
    elif isinstance(tree, list):
        tree[steps[-1] :] = [value]
    else:
        tree[steps[-1]] = value


def read(manifest: dict[str, Any], settings: Settings | None = None) -> Service:
    service, problems = read_service(manifest, settings or Settings())
    assert [str(error) for error in problems.errors] == []
    assert service is not None
    return service


def complaints(manifest: dict[str, Any], settings: Settings | None = None) -> list[str]:
    service, problems = read_service(manifest, settings or Settings())
    assert (service is None) == bool(problems.errors)
    return [str(error) for error in problems.errors]


def minimal() -> dict[str, Any]:
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"template": {"spec": {"containers": [{"image": "stagecraft/stage"}]}}},
    }


def test_a_full_manifest_becomes_a_service(manifest: dict[str, Any]) -> None:
    service = read(manifest)
    template = service.template
    container = template.container
    assert (service.namespace, service.name, service.labels) == ("default", "stage-0", {"app": "demo"})
    assert (template.name, template.container_concurrency, template.timeout_s) == ("stage-0-first", 4, 400)
    assert (container.image, container.args) == ("registry.example/stagecraft/stage:1.2", ("--fast",))
    assert container.env == (("MODEL", "demo"), ("EMPTY", ""))
    assert (container.port, container.port_name) == (9000, "h2c")
    assert (container.cpus, container.memory_bytes, container.gpus) == (2.0, 1 << 30, 1)
    assert container.readiness == Probe(kind="http", path="/readyz")
    assert container.liveness == Probe(kind="tcp", period_s=10)
    assert container.startup == Probe(kind="exec", command=("true",), period_s=10, failure_threshold=30)
    assert service.traffic == (TrafficTarget("", 90, ""), TrafficTarget("stage-0-old", 10, "old"))


def test_the_manifest_that_is_kept_has_the_defaults_filled_in_and_reads_the_same() -> None:
    service = read(minimal())
    assert service.manifest == {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "template": {
                "spec": {
                    "containerConcurrency": 0,
                    "enableServiceLinks": False,
                    "timeoutSeconds": 300,
                    "containers": [
                        {
                            "name": "user-container",
                            "image": "stagecraft/stage",
                            "readinessProbe": {"successThreshold": 1, "tcpSocket": {}},
                            "resources": {},
                        }
                    ],
                },
            },
            "traffic": [{"latestRevision": True, "percent": 100}],
        },
    }
    assert read(json.loads(json.dumps(service.manifest))) == service


def test_defaulting_leaves_the_given_manifest_as_it_is(manifest: dict[str, Any]) -> None:
    before = json.dumps(manifest)
    read(manifest)
    assert json.dumps(manifest) == before


def test_settings_fill_in_what_the_manifest_leaves_out() -> None:
    defaults = DefaultsConfig(
        revision_timeout_s=120,
        response_start_timeout_s=60,
        idle_timeout_s=20,
        container_concurrency=3,
        container_name_template="c-{{.Name}}",
        requests={"cpu": "400m"},
        limits={"memory": "200M"},
    )
    template = read(minimal(), Settings(defaults=defaults)).template
    assert (template.timeout_s, template.response_start_timeout_s, template.idle_timeout_s) == (120, 60, 20)
    assert (template.container_concurrency, template.container.name) == (3, "c-web")
    assert (template.container.cpus, template.container.memory_bytes) == (0.4, 200_000_000)


@pytest.mark.parametrize(
    ("timeout_s", "start_s"),
    [(600, 300), (301, 300), (300, 300), (200, 200), (0, 300)],
)
def test_the_default_of_response_start_counts_only_below_the_timeout(timeout_s: int, start_s: int) -> None:
    tree = minimal()
    bend(tree, f"{POD}.timeoutSeconds", timeout_s)
    template = read(tree).template
    assert (template.timeout_s, template.response_start_timeout_s) == (timeout_s or 300, start_s)


def test_an_explicit_zero_of_response_start_leaves_only_the_timeout() -> None:
    tree = minimal()
    bend(tree, f"{POD}.timeoutSeconds", 600)
    bend(tree, f"{POD}.responseStartTimeoutSeconds", 0)
    assert read(tree).template.response_start_timeout_s == 600


def test_what_a_cluster_printed_can_be_applied_again() -> None:
    tree = minimal()
    tree["status"] = {"url": "http://web", "anything": [1, 2]}
    tree["metadata"] |= {"uid": "1", "resourceVersion": "5", "creationTimestamp": "2026-01-01T00:00:00Z"}
    tree["metadata"]["annotations"] = {"serving.knative.dev/creator": "me"}
    assert "status" not in read(tree).manifest


REFUSED: dict[str, tuple[str, object, list[str]]] = {
    # names
    "no_name": (
        "metadata.name", ABSENT,
        ["name or generateName is required: metadata.name\ngive it a name: one machine makes none from generateName"],
    ),
    "name_too_long": (
        "metadata.name", "a" * 64, ["not a DNS 1035 label: [must be no more than 63 characters]: metadata.name"],
    ),
    "name_with_capitals": (
        "metadata.name",
        "Web",
        [
            "not a DNS 1035 label: [a DNS-1035 label must consist of lower case alphanumeric characters or '-', start "
            "with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name', or 'abc-123')]: "
            "metadata.name"
        ],
    ),
    "namespace": ("metadata.namespace", "A_b", ["invalid value: A_b: metadata.namespace\nnot a DNS 1123 label"]),
    "revision_name_of_another": (
        "spec.template.metadata.name",
        "other-1",
        ['invalid value: "other-1" must have prefix "web-": spec.template.metadata.name'],
    ),
    # labels and annotations
    "reserved_label": (
        "metadata.labels",
        {"serving.knative.dev/service": "x"},
        ['invalid key name "serving.knative.dev/service": metadata.labels'],
    ),
    "visibility": (
        "metadata.labels",
        {"networking.knative.dev/visibility": "public"},
        ["invalid value: public: metadata.labels.networking.knative.dev/visibility"],
    ),
    "autoscaling_annotation_in_the_wrong_place": (
        "metadata.annotations",
        {"autoscaling.knative.dev/min-scale": "1"},
        [
            'invalid key name "autoscaling.knative.dev/min-scale": metadata.annotations\nautoscaling annotations must '
            'be put under "spec.template.metadata.annotations" to work'
        ],
    ),
    "rollout_duration": (
        "metadata.annotations",
        {"serving.knative.dev/rollout-duration": "1.5s"},
        [
            "rollout-duration=1.5s is not at second precision: "
            "metadata.annotations.serving.knative.dev/rollout-duration"
        ],
    ),
    "annotation_out_of_bounds": (
        "spec.template.metadata.annotations",
        {"autoscaling.knative.dev/window": "5s"},
        ["expected 6s <= 5s <= 1h0m0s: spec.template.metadata.annotations.autoscaling.knative.dev/window"],
    ),
    "annotation_that_is_no_text": (
        "spec.template.metadata.annotations",
        {"autoscaling.knative.dev/target": 5},
        [
            "invalid value: 5: spec.template.metadata.annotations.autoscaling.knative.dev/target\n"
            "expected text, got a number (quote it)"
        ],
    ),
    "progress_deadline": (
        "spec.template.metadata.annotations",
        {"serving.knative.dev/progress-deadline": "0s"},
        [
            "progress-deadline=0s must be positive: "
            "spec.template.metadata.annotations.serving.knative.dev/progress-deadline"
        ],
    ),
    # concurrency and timeouts
    "concurrency_above_the_limit": (
        f"{POD}.containerConcurrency", 1001, [f"expected 0 <= 1001 <= 1000: {POD}.containerConcurrency"],
    ),
    "concurrency_negative": (
        f"{POD}.containerConcurrency", -1, [f"expected 0 <= -1 <= 1000: {POD}.containerConcurrency"],
    ),
    "concurrency_as_text": (
        f"{POD}.containerConcurrency",
        "4",
        [f"invalid value: 4: {POD}.containerConcurrency\nexpected a whole number, got text"],
    ),
    "timeout_above_the_limit": (
        f"{POD}.timeoutSeconds", 601, [f"expected 0 <= 601 <= 600: {POD}.timeoutSeconds"],
    ),
    "timeout_negative": (f"{POD}.timeoutSeconds", -5, [f"expected 0 <= -5 <= 600: {POD}.timeoutSeconds"]),
    "response_start_above_the_timeout": (
        f"{POD}.responseStartTimeoutSeconds",
        301,
        [f"expected 0 <= 301 <= 300: {POD}.responseStartTimeoutSeconds"],
    ),
    "idle_above_the_timeout": (
        f"{POD}.idleTimeoutSeconds", 301, [f"expected 0 <= 301 <= 300: {POD}.idleTimeoutSeconds"],
    ),
    # fields
    "unknown_field": (f"{POD}.foo", 1, [f'unknown field "{POD}.foo"']),
    "misspelt_concurrency": (
        f"{POD}.containerConcurency",
        4,
        [f'unknown field "{POD}.containerConcurency"\ndid you mean "containerConcurrency"?'],
    ),
    "misspelt_field": (
        f"{CONTAINER}.volume_mounts", [], [f'unknown field "{CONTAINER}.volume_mounts"\ndid you mean "volumeMounts"?'],
    ),
    "unknown_field_at_the_top": ("specs", {}, ['unknown field "specs"\ndid you mean "spec"?']),
    "kubernetes_field_of_the_pod": (f"{POD}.nodeName", "n", [f"must not set the field(s): {POD}.nodeName"]),
    "grace_period": (
        f"{POD}.terminationGracePeriodSeconds",
        30,
        [
            f"must not set the field(s): {POD}.terminationGracePeriodSeconds\n"
            "Knative takes timeoutSeconds as the grace period"
        ],
    ),
    "lifecycle": (f"{CONTAINER}.lifecycle", {}, [f"must not set the field(s): {CONTAINER}.lifecycle"]),
    "field_behind_a_flag": (
        f"{POD}.nodeSelector",
        {"gpu": "yes"},
        [
            f"must not set the field(s): {POD}.nodeSelector\n"
            "on a cluster this needs kubernetes.podspec-nodeselector in config-features"
        ],
    ),
    "automount": (
        f"{POD}.automountServiceAccountToken",
        True,
        [f"must not set the field(s): {POD}.automountServiceAccountToken"],
    ),
    "service_account": (
        f"{POD}.serviceAccountName", "A!", [f"invalid value: A!: {POD}.serviceAccountName\nnot a DNS 1123 subdomain"],
    ),
    "spec_of_the_wrong_type": ("spec", True, ["invalid value: true: spec\nexpected a mapping, got true or false"]),
    # containers
    "no_containers": (f"{POD}.containers", [], [f"missing field(s): {POD}.containers"]),
    "no_spec": ("spec", ABSENT, [f"missing field(s): {POD}.containers"]),
    "container_null": (f"{POD}.containers", [None], [f"missing field(s): {CONTAINER}.image"]),
    "containers_as_a_mapping": (
        f"{POD}.containers",
        {"image": "x"},
        [f"invalid value: a mapping: {POD}.containers\nexpected a list, got a mapping"],
    ),
    "sidecar": (
        f"{POD}.containers",
        [{"image": "a", "ports": [{"containerPort": 80}]}, {"image": "b"}],
        [
            f"one machine runs one container per replica, but found 2 containers: {POD}.containers\nkeep the one that "
            "serves; what a sidecar does has to be part of it, or a Service of its own"
        ],
    ),
    "no_image": (f"{CONTAINER}.image", ABSENT, [f"missing field(s): {CONTAINER}.image"]),
    "bad_image": (
        f"{CONTAINER}.image",
        "a b",
        [
            f"Failed to parse image reference: {CONTAINER}.image\n"
            'image: "a b", error: could not parse reference: a b'
        ],
    ),
    "reserved_container_name": (
        f"{CONTAINER}.name", "queue-proxy", [f'"queue-proxy" is a reserved container name: {CONTAINER}.name'],
    ),
    "pull_policy": (f"{CONTAINER}.imagePullPolicy", "Often", [f"invalid value: Often: {CONTAINER}.imagePullPolicy"]),
    "args_with_a_number": (
        f"{CONTAINER}.args",
        ["a", 5],
        [f"invalid value: 5: {CONTAINER}.args[1]\nexpected text, got a number (quote it)"],
    ),
    "nul": (
        f"{CONTAINER}.workingDir",
        "a\0b",
        [f"invalid value: a\\x00b: {CONTAINER}.workingDir\ntext may not contain NUL"],
    ),
    # ports
    "two_ports": (
        f"{CONTAINER}.ports",
        [{"containerPort": 80}, {"containerPort": 81}],
        [
            f"more than one container port is set: {POD}.containers[*].ports\n"
            "Only a single port is allowed across all containers"
        ],
    ),
    "reserved_port": (
        f"{CONTAINER}.ports",
        [{"containerPort": 8012}],
        [
            f"invalid value: 8012 is a reserved port: {CONTAINER}.ports.containerPort\n"
            "8012 is a reserved port, please use a different value"
        ],
    ),
    "port_out_of_bounds": (
        f"{CONTAINER}.ports",
        [{"containerPort": 65536}],
        [f"expected 0 <= 65536 <= 65535: {CONTAINER}.ports.containerPort"],
    ),
    "port_name": (
        f"{CONTAINER}.ports",
        [{"containerPort": 80, "name": "grpc"}],
        [f"Port name grpc is not allowed: {CONTAINER}.ports\nName must be empty, or one of: 'h2c', 'http1'"],
    ),
    "port_protocol": (
        f"{CONTAINER}.ports",
        [{"containerPort": 80, "protocol": "UDP"}],
        [f"invalid value: UDP: {CONTAINER}.ports.protocol"],
    ),
    "host_port": (
        f"{CONTAINER}.ports",
        [{"containerPort": 80, "hostPort": 80}],
        [
            f"must not set the field(s): {CONTAINER}.ports[0].hostPort\nevery replica gets a port of its own"
        ],
    ),
    # environment
    "reserved_env": (
        f"{CONTAINER}.env",
        [{"name": "PORT", "value": "1"}],
        [f'"PORT" is a reserved environment variable: {CONTAINER}.env[0].name'],
    ),
    "env_without_name": (f"{CONTAINER}.env", [{"value": "1"}], [f"missing field(s): {CONTAINER}.env[0].name"]),
    "env_name_with_equals": (
        f"{CONTAINER}.env",
        [{"name": "A=B"}],
        [f"invalid value: A=B: {CONTAINER}.env[0].name\nprintable ASCII characters other than '='"],
    ),
    "env_twice": (
        f"{CONTAINER}.env", [{"name": "A"}, {"name": "A"}], [f'Duplicate value: "A": {CONTAINER}.env[1].name'],
    ),
    "env_number": (
        f"{CONTAINER}.env",
        [{"name": "A", "value": 1}],
        [f"invalid value: 1: {CONTAINER}.env[0].value\nexpected text, got a number (quote it)"],
    ),
    "env_boolean": (
        f"{CONTAINER}.env",
        [{"name": "A", "value": True}],
        [f"invalid value: true: {CONTAINER}.env[0].value\nexpected text, got true or false (quote it)"],
    ),
    "env_from_a_secret": (
        f"{CONTAINER}.env",
        [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
        [
            f"variable TOKEN has no source on one machine: {CONTAINER}.env[0].valueFrom.secretKeyRef\n"
            "give it a `value`, or mark the reference `optional: true`"
        ],
    ),
    "env_from_a_field": (
        f"{CONTAINER}.env",
        [{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        [
            f"must not set the field(s): {CONTAINER}.env[0].valueFrom.fieldRef\n"
            "on a cluster this needs kubernetes.podspec-fieldref in config-features"
        ],
    ),
    "env_from_a_config_map": (
        f"{CONTAINER}.envFrom",
        [{"configMapRef": {"name": "c"}}],
        [
            f"variables of configMapRef c have no source on one machine: {CONTAINER}.envFrom[0]\n"
            "list them under `env`, or mark the reference `optional: true`"
        ],
    ),
    "env_from_nothing": (
        f"{CONTAINER}.envFrom",
        [{}],
        [
            f"expected exactly one, got neither: {CONTAINER}.envFrom[0].configMapRef, "
            f"{CONTAINER}.envFrom[0].secretRef"
        ],
    ),
    # probes
    "two_handlers": (
        f"{CONTAINER}.readinessProbe",
        {"httpGet": {}, "tcpSocket": {}},
        [
            f"expected exactly one, got both: {CONTAINER}.readinessProbe.httpGet, "
            f"{CONTAINER}.readinessProbe.tcpSocket"
        ],
    ),
    "no_handler": (
        f"{CONTAINER}.livenessProbe",
        {"periodSeconds": 5},
        [
            "expected exactly one, got neither: "
            + ", ".join(f"{CONTAINER}.livenessProbe.{name}" for name in ("httpGet", "tcpSocket", "exec", "grpc"))
        ],
    ),
    "grpc": (
        f"{CONTAINER}.startupProbe",
        {"grpc": {"port": 1}},
        [
            f"must not set the field(s): {CONTAINER}.startupProbe.grpc\n"
            "on one machine probes are httpGet, tcpSocket or exec"
        ],
    ),
    "aggressive_probe_with_a_timeout": (
        f"{CONTAINER}.readinessProbe",
        {"timeoutSeconds": 2, "failureThreshold": 2},
        [
            f"failureThreshold is disallowed when periodSeconds is zero: {CONTAINER}.readinessProbe.failureThreshold",
            f"timeoutSeconds is disallowed when periodSeconds is zero: {CONTAINER}.readinessProbe.timeoutSeconds",
        ],
    ),
    "negative_period": (
        f"{CONTAINER}.readinessProbe",
        {"periodSeconds": -1},
        [f"expected 0 <= -1 <= 2147483647: {CONTAINER}.readinessProbe.periodSeconds"],
    ),
    "success_threshold": (
        f"{CONTAINER}.readinessProbe",
        {"successThreshold": -1},
        [f"expected 1 <= -1 <= 2147483647: {CONTAINER}.readinessProbe.successThreshold"],
    ),
    "liveness_success_threshold": (
        f"{CONTAINER}.livenessProbe",
        {"tcpSocket": {}, "successThreshold": 2},
        [f"invalid value: 2: {CONTAINER}.livenessProbe.successThreshold\nmust be 1"],
    ),
    "probe_of_another_port_name": (
        f"{CONTAINER}.readinessProbe",
        {"httpGet": {"port": "admin"}},
        [
            f"invalid value: admin: {CONTAINER}.readinessProbe.httpGet.port\nProbe port must match container port"
        ],
    ),
    "https_probe": (
        f"{CONTAINER}.readinessProbe",
        {"httpGet": {"scheme": "HTTPS"}},
        [f"invalid value: HTTPS: {CONTAINER}.readinessProbe.httpGet.scheme\non one machine probes are plain HTTP"],
    ),
    "probe_header_with_a_line_break": (
        f"{CONTAINER}.readinessProbe",
        {"httpGet": {"httpHeaders": [{"name": "A", "value": "x\r\ny"}]}},
        [
            f"invalid value: x\\r\\ny: {CONTAINER}.readinessProbe.httpGet.httpHeaders[0].value\n"
            "not the value of an HTTP header"
        ],
    ),
    "exec_without_command": (
        f"{CONTAINER}.readinessProbe", {"exec": {}}, [f"missing field(s): {CONTAINER}.readinessProbe.exec.command"],
    ),
    # resources
    "bad_quantity": (
        f"{CONTAINER}.resources",
        {"limits": {"memory": "1GB"}},
        [
            f"invalid value: 1GB: {CONTAINER}.resources.limits.memory\n"
            'a quantity is a number with an optional unit, such as "500m", "2", "512Mi" or "1.5Gi"'
        ],
    ),
    "negative_cpu": (
        f"{CONTAINER}.resources",
        {"limits": {"cpu": -1}},
        [f"invalid value: -1: {CONTAINER}.resources.limits.cpu\nmust be greater than or equal to 0"],
    ),
    "half_a_gpu": (
        f"{CONTAINER}.resources",
        {"limits": {"nvidia.com/gpu": "500m"}},
        [
            f"invalid value: 500m: {CONTAINER}.resources.limits.nvidia.com/gpu\n"
            "devices are counted in whole numbers"
        ],
    ),
    "request_above_limit": (
        f"{CONTAINER}.resources",
        {"limits": {"cpu": "1"}, "requests": {"cpu": "1500m"}},
        [
            f"invalid value: 1500m: {CONTAINER}.resources.requests.cpu\n"
            "must be less than or equal to cpu limit of 1"
        ],
    ),
    # security
    "privileged": (
        f"{CONTAINER}.securityContext",
        {"privileged": True},
        [f"must not set the field(s): {CONTAINER}.securityContext.privileged"],
    ),
    "added_capability": (
        f"{CONTAINER}.securityContext",
        {"capabilities": {"add": ["NET_ADMIN"]}},
        [f"must not set the field(s): {CONTAINER}.securityContext.capabilities.add"],
    ),
    "run_as_user": (
        f"{CONTAINER}.securityContext",
        {"runAsUser": -1},
        [f"expected 0 <= -1 <= 2147483647: {CONTAINER}.securityContext.runAsUser"],
    ),
    # volumes
    "volume_not_mounted": (
        f"{POD}.volumes",
        [{"name": "v", "emptyDir": {}}],
        [f'volume with name "v" not mounted: {POD}.volumes[0].name'],
    ),
    "mount_without_volume": (
        f"{CONTAINER}.volumeMounts",
        [{"name": "v", "mountPath": "/v"}],
        [f"volumeMount has no matching volume: {CONTAINER}.volumeMounts[0].name"],
    ),
    # traffic
    "traffic_sum": ("spec.traffic", [{"percent": 99}], ["Traffic targets sum to 99, want 100: spec.traffic"]),
    "traffic_percent": (
        "spec.traffic",
        [{"percent": 101}],
        [
            "expected 0 <= 101 <= 100: spec.traffic[0].percent",
            "Traffic targets sum to 101, want 100: spec.traffic",
        ],
    ),
    "tag_twice": (
        "spec.traffic",
        [{"percent": 50, "tag": "a"}, {"percent": 50, "tag": "a"}],
        ['Multiple definitions for "a": spec.traffic[1].tag, spec.traffic[0].tag'],
    ),
    "revision_and_latest": (
        "spec.traffic",
        [{"percent": 100, "revisionName": "web-1", "latestRevision": True}],
        ['may not set revisionName "web-1" when latestRevision is true: spec.traffic[0].latestRevision'],
    ),
    "neither_revision_nor_latest": (
        "spec.traffic",
        [{"percent": 100, "latestRevision": False}],
        ['may not set revisionName "" when latestRevision is false: spec.traffic[0].latestRevision'],
    ),
    "configuration_name": (
        "spec.traffic",
        [{"percent": 100, "configurationName": "web"}],
        ["must not set the field(s): spec.traffic[0].configurationName"],
    ),
    "traffic_url": (
        "spec.traffic", [{"percent": 100, "url": "http://x"}], ["must not set the field(s): spec.traffic[0].url"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("path", "value", "problems"), REFUSED.values(), ids=REFUSED)
def test_refused(path: str, value: object, problems: list[str]) -> None:
    tree = minimal()
    bend(tree, path, value)
    assert complaints(tree) == problems


MOUNTED = [{"name": "v", "mountPath": "/v"}]
VOLUMES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[str]]] = {
    "secret": ({"secret": {"secretName": "s"}}, MOUNTED, []),
    "config_map": ({"configMap": {"name": "c", "items": [{"key": "k", "path": "p"}]}}, MOUNTED, []),
    "empty_dir_medium": (
        {"emptyDir": {"medium": "Disk"}}, MOUNTED, [f"invalid value: Disk: {POD}.volumes[0].emptyDir.medium"],
    ),
    "item_without_path": (
        {"configMap": {"name": "c", "items": [{"key": "k"}]}},
        MOUNTED,
        [f"missing field(s): {POD}.volumes[0].configMap.items[0].path"],
    ),
    "claim": (
        {"persistentVolumeClaim": {"claimName": "c", "readOnly": True}},
        MOUNTED,
        [
            "Persistent volume claim support is disabled, but found persistent volume claim c: "
            f"{POD}.volumes[0].persistentVolumeClaim",
            f"volume is readOnly but volume mount is not: {CONTAINER}.volumeMounts[0].readOnly",
        ],
    ),
    "host_path": (
        {"hostPath": {"path": "/"}},
        MOUNTED,
        [f"HostPath volume support is disabled, but found HostPath volume v: {POD}.volumes[0].hostPath"],
    ),
    "no_source": (
        {},
        MOUNTED,
        [
            "expected exactly one, got neither: "
            + ", ".join(f"{POD}.volumes[0].{name}" for name in ("secret", "configMap", "projected", "emptyDir"))
        ],
    ),
    "two_sources": (
        {"secret": {}, "configMap": {}},
        MOUNTED,
        [f"expected exactly one, got both: {POD}.volumes[0].secret, {POD}.volumes[0].configMap"],
    ),
    "reserved_path": (
        {"emptyDir": {}},
        [{"name": "v", "mountPath": "/dev/"}],
        [f'mountPath "/dev" is a reserved path: {CONTAINER}.volumeMounts[0].mountPath'],
    ),
    "relative_path": (
        {"emptyDir": {}},
        [{"name": "v", "mountPath": "v"}],
        [f"invalid value: v: {CONTAINER}.volumeMounts[0].mountPath"],
    ),
    "same_path": (
        {"emptyDir": {}},
        [*MOUNTED, {"name": "v", "mountPath": "/v/"}],
        [f'invalid value: "/v/" must be unique: {CONTAINER}.volumeMounts[1].mountPath'],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("volume", "mounts", "problems"), VOLUMES.values(), ids=VOLUMES)
def test_volumes(volume: dict[str, Any], mounts: list[dict[str, Any]], problems: list[str]) -> None:
    tree = minimal()
    bend(tree, f"{POD}.volumes", [{"name": "v", **volume}])
    bend(tree, f"{CONTAINER}.volumeMounts", mounts)
    assert complaints(tree) == problems


def test_all_problems_are_said_at_once() -> None:
    tree = minimal()
    bend(tree, "metadata.name", "Web")
    bend(tree, f"{POD}.containerConcurrency", 2000)
    bend(tree, f"{CONTAINER}.image", 7)
    bend(tree, "spec.traffic", [{"percent": 5}])
    assert len(complaints(tree)) == 4


FLAGS = ("kubernetes.podspec-nodeselector", "kubernetes.podspec-volumes-hostpath", "kubernetes.podspec-dnspolicy")


@pytest.mark.parametrize("state", ["enabled", "allowed"])
def test_a_flag_lets_its_field_pass_which_then_has_no_effect(state: str) -> None:
    tree = minimal()
    bend(tree, f"{POD}.nodeSelector", {"gpu": "yes"})
    bend(tree, f"{POD}.dnsPolicy", "Default")
    settings = Settings(features=FeaturesConfig.from_data(dict.fromkeys(FLAGS, state)))
    service, problems = read_service(tree, settings)
    assert service is not None
    assert [str(warning) for warning in problems.warnings] == [
        f"{name} has no effect on one machine: {POD}.{name}" for name in ("dnsPolicy", "nodeSelector")
    ]


def test_settings_move_the_bounds() -> None:
    tree = minimal()
    bend(tree, f"{POD}.containerConcurrency", 0)
    bend(tree, f"{POD}.timeoutSeconds", 3000)
    bend(tree, "spec.template.metadata.annotations", {"autoscaling.knative.dev/initial-scale": "0"})
    strict = Settings(defaults=DefaultsConfig(allow_container_concurrency_zero=False))
    assert len(complaints(tree, strict)) == 3
    loose = Settings(
        autoscaler=AutoscalerConfig(allow_zero_initial_scale=True), defaults=DefaultsConfig(max_revision_timeout_s=3600)
    )
    assert complaints(tree, loose) == []


WARNED: dict[str, tuple[str, object, str]] = {
    "service_account": (
        f"{POD}.serviceAccountName", "me",
        f"serviceAccountName has no effect on one machine: {POD}.serviceAccountName",
    ),
    "security_context": (
        f"{CONTAINER}.securityContext", {"runAsNonRoot": True},
        f"has no effect: a process runs as the user who started the platform: {CONTAINER}.securityContext",
    ),
    "optional_secret": (
        f"{CONTAINER}.env", [{"name": "T", "valueFrom": {"secretKeyRef": {"key": "k", "optional": True}}}],
        f"variable T stays unset: it has no source on one machine: {CONTAINER}.env[0].valueFrom.secretKeyRef",
    ),
    "misspelt_annotation": (
        "spec.template.metadata.annotations", {"autoscaling.knative.dev/min_scale": "1"},
        'Knative knows no annotation "autoscaling.knative.dev/min_scale": it has no effect: '
        "spec.template.metadata.annotations.autoscaling.knative.dev/min_scale",
    ),
    "hpa": (
        "spec.template.metadata.annotations", {"autoscaling.knative.dev/class": "hpa.autoscaling.knative.dev"},
        "one machine has only the KPA: it scales this revision: "
        "spec.template.metadata.annotations.autoscaling.knative.dev/class",
    ),
    "class_of_others": (
        "spec.template.metadata.annotations", {"autoscaling.knative.dev/class": "keda.example.com"},
        "one machine has only the KPA: it scales this revision: "
        "spec.template.metadata.annotations.autoscaling.knative.dev/class",
    ),
    "http2": (
        f"{CONTAINER}.ports", [{"containerPort": 8080, "name": "h2c"}],
        f"one machine relays HTTP/1.1 only: requests do not reach this port as HTTP/2: {CONTAINER}.ports[0].name",
    ),
    "probe_of_another_port": (
        f"{CONTAINER}.livenessProbe", {"tcpSocket": {"port": 9999}},
        "port 9999 is not the container's port: all replicas share it on one machine: "
        f"{CONTAINER}.livenessProbe.tcpSocket.port",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("path", "value", "warning"), WARNED.values(), ids=WARNED)
def test_what_has_no_effect_here_is_said(path: str, value: object, warning: str) -> None:
    tree = minimal()
    bend(tree, path, value)
    service, problems = read_service(tree, Settings())
    assert service is not None
    assert [str(warning) for warning in problems.warnings] == [warning]


def test_a_probe_with_a_period_gets_the_defaults_of_kubernetes() -> None:
    tree = minimal()
    bend(tree, f"{CONTAINER}.readinessProbe", {"httpGet": {"path": "up", "port": "http"}, "periodSeconds": 5})
    service = read(tree)
    assert service.template.container.readiness == Probe(
        kind="http", path="/up", period_s=5, timeout_s=1, success_threshold=1, failure_threshold=3
    )


def test_a_named_revision_changes_only_with_its_name(manifest: dict[str, Any]) -> None:
    old = read(manifest)
    check_update(old, old)
    bend(manifest, "spec.traffic", ABSENT)
    check_update(old, read(manifest))
    bend(manifest, f"{POD}.containerConcurrency", 5)
    with pytest.raises(ValidationError) as caught:
        check_update(old, read(manifest))
    assert str(caught.value) == (
        "Saw the following changes without a name change (-old +new): spec.template.metadata.name\n"
        f"-{POD}.containerConcurrency: 4\n+{POD}.containerConcurrency: 5"
    )
    bend(manifest, "spec.template.metadata.name", "stage-0-second")
    check_update(old, read(manifest))


def test_an_unnamed_revision_changes_freely() -> None:
    old = read(minimal())
    tree = minimal()
    bend(tree, f"{POD}.containerConcurrency", 5)
    check_update(old, read(tree))
