"""config-defaults and config-features."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from knative.autoscaler.config import AUTOSCALER_KEYS
from knative.errors import ValidationError
from knative.resources.config_maps import DEFAULTS_KEYS, FEATURES_KEYS, DefaultsConfig, FeaturesConfig

Rows = dict[str, dict[str, str | None]]


@pytest.fixture(scope="module")
def rows(root: Path) -> Rows:
    """Config map -> key -> default, from Knative's own table."""
    table = root.parent / "shared" / "knative-config.yaml"
    if not table.exists():
        pytest.skip(f"{table} is absent: Knative's table of settings is not compared")
    entries = yaml.safe_load(table.read_text())["configmaps"]
    serving = [entry for entry in entries if entry["component"] == "serving"]
    return {entry["name"]: {row["key"]: row["default"] for row in entry["entries"]} for entry in serving}


def test_the_known_keys_are_those_of_knative(rows: Rows) -> None:
    assert set(rows["config-autoscaler"]) == AUTOSCALER_KEYS
    assert set(rows["config-defaults"]) == DEFAULTS_KEYS
    assert set(rows["config-features"]) == FEATURES_KEYS


def test_features_default_as_in_knative(rows: Rows) -> None:
    config = FeaturesConfig()
    assert {key: config.state(key) for key in FEATURES_KEYS} == rows["config-features"]


def test_spelling_out_the_defaults_changes_nothing(rows: Rows) -> None:
    data = {key: value for key, value in rows["config-defaults"].items() if value is not None}
    assert DefaultsConfig.from_data(data) == DefaultsConfig() == DefaultsConfig.from_data({})


def test_response_start_follows_the_timeout_unless_said() -> None:
    assert DefaultsConfig.from_data({"revision-timeout-seconds": "120"}).response_start_timeout_s == 120


def test_quantities_are_kept_by_resource() -> None:
    config = DefaultsConfig.from_data({"revision-cpu-request": "400m", "revision-memory-limit": "200M"})
    assert (config.requests, config.limits) == ({"cpu": "400m"}, {"memory": "200M"})


def test_the_name_template_knows_name_and_namespace() -> None:
    config = DefaultsConfig.from_data({"container-name-template": "{{.Name}}-in-{{ .Namespace }}"})
    assert config.container_name("stage", "prod") == "stage-in-prod"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (
            {"revision-timeout-seconds": "700"},
            "revision-timeout-seconds (700) cannot be greater than max-revision-timeout-seconds (600)",
        ),
        (
            {"revision-response-start-timeout-seconds": "301"},
            "revision-response-start-timeout-seconds (301) cannot be greater than revision-timeout-seconds (300)",
        ),
        (
            {"revision-idle-timeout-seconds": "301"},
            "revision-idle-timeout-seconds (301) cannot be greater than revision-timeout-seconds (300)",
        ),
        ({"container-concurrency": "1001"}, "expected 0 <= 1001 <= 1000: container-concurrency"),
        ({"container-concurrency-max-limit": "0"}, "expected 1 <= 0 <= 2147483647: container-concurrency-max-limit"),
        ({"container-concurrency": "many"}, "invalid value: many: container-concurrency\nexpected a whole number"),
        (
            {"container-name-template": "{{.Foo}}"},
            "invalid value: {{.Foo}}: container-name-template\nonly {{.Name}} and {{.Namespace}} are known",
        ),
    ],
)
def test_what_is_out_of_bounds_is_refused(data: dict[str, str], problem: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DefaultsConfig.from_data(data)
    assert caught.value.problems == (problem,)


def test_every_problem_is_said_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        DefaultsConfig.from_data({"revision-cpu-limit": "lots", "container-concurrency": "-1"})
    assert len(caught.value.problems) == 2


def test_a_flag_is_read_without_regard_to_case_and_nonsense_keeps_the_default() -> None:
    config = FeaturesConfig.from_data({"kubernetes.podspec-affinity": "Allowed", "multi-container": "maybe"})
    assert config.lets_pass("kubernetes.podspec-affinity")
    assert not config.enabled("kubernetes.podspec-affinity")
    assert config.enabled("multi-container")
