"""Manifests from files: which documents are taken, skipped or refused, and where a complaint points."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from knative.autoscaler.config import AutoscalerConfig
from knative.errors import ValidationError
from knative.resources.config_maps import DefaultsConfig
from knative.resources.documents import Parsed, parse, parse_documents, read_documents
from knative.resources.objects import ConfigMap, Service

SERVICE = """\
apiVersion: serving.knative.dev/v1
kind: Service
metadata:
  name: {name}
spec:
  template:
    spec:
      containerConcurrency: {concurrency}
      containers:
        - image: stagecraft/stage
"""


def service(name: str = "web", concurrency: object = 1) -> str:
    return SERVICE.format(name=name, concurrency=concurrency)


def config_map(name: str, data: dict[str, str], namespace: str = "knative-serving") -> str:
    metadata = {"name": name, "namespace": namespace}
    return json.dumps({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}) + "\n"


def parsed(*texts: str) -> Parsed:
    documents = parse_documents("---\n".join(texts), "f.yaml")
    return parse(documents, autoscaler=AutoscalerConfig(), defaults=DefaultsConfig())


def problems(*texts: str) -> tuple[str, ...]:
    with pytest.raises(ValidationError) as caught:
        parsed(*texts)
    return caught.value.problems


def test_a_complaint_points_at_the_line_of_its_field() -> None:
    assert problems("# a note\n" + service(concurrency=1001)) == (
        "f.yaml:9: expected 0 <= 1001 <= 1000: spec.template.spec.containerConcurrency",
    )


def test_a_missing_field_points_at_what_it_is_missing_from() -> None:
    text = service().replace("- image: stagecraft/stage", "- name: a")
    assert problems(text) == ("f.yaml:10: missing field(s): spec.template.spec.containers[0].image",)


def test_complaints_of_all_documents_come_together_in_order() -> None:
    found = problems(service("a", -1), service("Web"), "apiVersion: v1\nkind: Nonsense\n")
    assert [text.partition(": ")[0] for text in found] == ["f.yaml:8", "f.yaml:15", "f.yaml:24"]


def test_nothing_is_returned_if_one_document_is_wrong() -> None:
    assert len(problems(service("good"), service("bad", -1))) == 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_settings_are_in_force_for_services_beside_them(order: tuple[int, int]) -> None:
    texts = (service(concurrency=2000), config_map("config-defaults", {"container-concurrency-max-limit": "5000"}))
    result = parsed(*(texts[i] for i in order))
    assert [type(resource) for resource in result.resources] == [ConfigMap, Service]
    assert result.settings.defaults.container_concurrency_max == 5000


def test_each_of_the_three_settings_is_read() -> None:
    result = parsed(
        config_map("config-autoscaler", {"stable-window": "6s", "_example": "stable-window: 9s"}),
        config_map("config-defaults", {"revision-timeout-seconds": "100"}),
        config_map("config-features", {"kubernetes.podspec-tolerations": "enabled"}),
    )
    assert result.settings.autoscaler.stable_window_s == 6
    assert result.settings.defaults.revision_timeout_s == 100
    assert result.settings.features.enabled("kubernetes.podspec-tolerations")
    assert result.warnings == ()


def test_bad_settings_point_at_their_key() -> None:
    where = "metadata: {name: config-autoscaler, namespace: knative-serving}"
    text = f"apiVersion: v1\nkind: ConfigMap\n{where}\ndata:\n  a: b\n  stable-window: 1s\n"
    (found,) = problems(text)
    assert found.startswith("f.yaml:6: stable-window = 1s, must be in [6s; 1h0m0s] range")


@pytest.mark.parametrize("name", ["config-autoscaler", "config-defaults", "config-features"])
def test_a_misspelt_setting_is_warned_of(name: str) -> None:
    result = parsed(config_map(name, {"windw": "6s"}))
    assert result.warnings == ('f.yaml:1: Knative knows no setting "windw": it has no effect: data.windw',)


@pytest.mark.parametrize("name", ["config-deployment", "config-network", "config-gc", "config-autoscalar"])
def test_settings_that_nothing_here_reads_are_warned_of_once(name: str) -> None:
    result = parsed(config_map(name, {"progress-deadline": "60s", "other": "x"}))
    assert [resource.name for resource in result.resources] == [name]
    assert result.warnings == (
        f"f.yaml:1: {name} has no effect: one machine reads config-autoscaler, config-defaults, config-features: "
        "metadata.name",
    )


@pytest.mark.parametrize(
    ("autoscaler", "warned"),
    [("kpa.autoscaling.knative.dev", 0), ("hpa.autoscaling.knative.dev", 1), ("keda.example.com", 1)],
)
def test_another_autoscaler_for_all_is_warned_of(autoscaler: str, warned: int) -> None:
    result = parsed(config_map("config-autoscaler", {"pod-autoscaler-class": autoscaler}))
    text = "f.yaml:1: one machine has only the KPA: it scales all revisions: data.pod-autoscaler-class"
    assert result.warnings == (text,) * warned


def test_settings_in_a_namespace_that_knative_does_not_read_are_warned_of() -> None:
    result = parsed(config_map("config-autoscaler", {"stable-window": "6s"}, "default"))
    assert result.settings.autoscaler.stable_window_s == 60
    assert "has no effect in namespace default" in result.warnings[0]


def test_other_config_maps_are_kept_and_do_nothing() -> None:
    result = parsed(config_map("mine", {"stable-window": "never"}, "default"))
    assert result.resources == (ConfigMap("default", "mine", {"stable-window": "never"}, result.resources[0].manifest),)


def test_the_features_of_eventing_are_not_those_of_serving() -> None:
    result = parsed(config_map("config-features", {"delivery-timeout": "enabled"}, "knative-eventing"))
    assert (len(result.resources), result.warnings) == (1, ())


def test_a_config_map_with_a_number_is_refused() -> None:
    text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata:\n  a: 5\n"
    assert problems(text) == ("f.yaml:5: invalid value: 5: data.a\nexpected text, got a number (quote it)",)


@pytest.mark.parametrize(
    ("api_version", "kind"),
    [
        ("v1", "Namespace"),
        ("v1", "Service"),
        ("v1", "ServiceAccount"),
        ("v1", "Secret"),
        ("networking.k8s.io/v1", "NetworkPolicy"),
        ("monitoring.coreos.com/v1", "PodMonitor"),
        ("monitoring.coreos.com/v1", "ServiceMonitor"),
        ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"),
        ("flows.knative.dev/v1", "Parallel"),
        ("messaging.knative.dev/v1", "Channel"),
        ("eventing.knative.dev/v1beta2", "EventType"),
        ("kustomize.config.k8s.io/v1beta1", "Kustomization"),
        ("serving.kserve.io/v1alpha1", "InferenceGraph"),
        ("serving.kserve.io/v1alpha1", "ClusterStorageContainer"),
        ("apps/v1", "Deployment"),
        ("serving.knative.dev/v1beta1", "DomainMapping"),
    ],
)
def test_what_only_a_cluster_needs_is_skipped_with_a_reason(api_version: str, kind: str) -> None:
    result = parsed(f"apiVersion: {api_version}\nkind: {kind}\nmetadata: {{name: x}}\nspec: {{whatever: true}}\n")
    (skipped,) = result.skipped
    assert (result.resources, skipped.kind, skipped.name) == ((), kind, "x")
    assert str(skipped) == f"skipped {kind} x: {skipped.reason}"
    assert skipped.reason


@pytest.mark.parametrize(
    ("api_version", "kind"),
    [
        ("serving.knative.dev/v1alpha1", "Service"),
        ("serving.kserve.io/v1beta2", "InferenceService"),
        ("v1", "Servce"),
        ("acme.dev/v1", "Robot"),
    ],
)
def test_an_unknown_kind_is_an_error_that_names_the_known_ones(api_version: str, kind: str) -> None:
    (found,) = problems(f"apiVersion: {api_version}\nkind: {kind}\n")
    assert found == (
        f'f.yaml:2: no matches for kind "{kind}" in version "{api_version}"\nknown are '
        "Service (serving.knative.dev/v1), InferenceService (serving.kserve.io/v1beta1), ServingRuntime, "
        "ClusterServingRuntime (serving.kserve.io/v1alpha1), Broker, Trigger (eventing.knative.dev/v1), "
        "Sequence (flows.knative.dev/v1), ConfigMap (v1), List (v1); kinds that only a cluster needs are skipped"
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("metadata: {}\n", "f.yaml:1: missing field(s): apiVersion, kind"),
        ("apiVersion: v1\n", "f.yaml:1: missing field(s): kind"),
        ("apiVersion: v1\nkind: 5\n", "f.yaml:2: invalid value: 5: kind\nexpected text"),
        ("- a\n", "f.yaml:1: not a manifest: expected a mapping with apiVersion and kind"),
        ("\nhello\n", "f.yaml:2: not a manifest: expected a mapping with apiVersion and kind"),
        ("apiVersion: v1\nkind: List\nitems:\n- 5\n", "f.yaml:4: not a manifest: expected a mapping with "
         "apiVersion and kind"),
    ],
)  # fmt: skip
def test_what_is_no_object_is_refused(text: str, found: str) -> None:
    assert problems(text) == (found,)


def test_a_list_is_unfolded_with_its_lines() -> None:
    items = [f"- {text.strip()}".replace("\n", "\n  ") for text in (service(), service("b", -1))]
    assert problems("\n".join(["apiVersion: v1", "kind: List", "items:", *items])) == (
        "f.yaml:21: expected 0 <= -1 <= 1000: spec.template.spec.containerConcurrency",
    )


def test_the_same_object_twice_is_refused() -> None:
    assert problems(service(), service()) == (
        'f.yaml:15: Service "web" is given twice in namespace default, first at f.yaml:1',
    )


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.yml").write_text(service("two"))
    (tmp_path / "c.json").write_text(config_map("mine", {}))
    (tmp_path / "a.yaml").write_text(service("one") + "---\n" + service("three"))
    (tmp_path / "kustomization.yaml").write_text("resources: [a.yaml]\n")
    (tmp_path / "notes.md").write_text("{[")
    documents = read_documents(tmp_path)
    places = [(Path(document.file).name, document.line) for document in documents]
    assert places == [("a.yaml", 1), ("a.yaml", 12), ("two.yml", 1), ("c.json", 1), ("kustomization.yaml", 1)]
    result = parse(documents, autoscaler=AutoscalerConfig(), defaults=DefaultsConfig())
    assert [resource.name for resource in result.resources] == ["mine", "one", "three", "two"]
    assert [skipped.kind for skipped in result.skipped] == ["Kustomization"]


def test_every_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [")
    (tmp_path / "b.yaml").write_bytes(b"a: b\nc: \xff\n")
    with pytest.raises(ValidationError) as caught:
        read_documents(tmp_path)
    first, second = caught.value.problems
    assert first.startswith(f"{tmp_path}/a.yaml:1: not YAML: ")
    assert second == f"{tmp_path}/b.yaml:2: not UTF-8 text"


def test_no_file_and_no_manifests(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="no such file or folder"):
        read_documents(tmp_path / "nothing.yaml")
    with pytest.raises(ValidationError, match="no manifests here"):
        read_documents(tmp_path)


@pytest.mark.parametrize("name", ["apiVersion", "kind"])
def test_a_value_of_any_size_is_shown_in_short(name: str) -> None:
    document = {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": "a"},
        name: ["a"] * 9999,
    }
    with pytest.raises(ValidationError, match="expected text") as caught:
        parsed(json.dumps(document))
    assert len(str(caught.value)) < 1000
