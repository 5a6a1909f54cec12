"""config-autoscaler and annotations: defaults, complaints, and the values they come to."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from knative.autoscaler import config as module
from knative.autoscaler.config import AutoscalerConfig, ScalerSpec, check_annotations, scaler_spec
from knative.autoscaler.durations import format_duration, parse_duration_s
from knative.errors import ValidationError

SETTINGS = Path(__file__).resolve().parents[4] / "shared" / "knative-config.yaml"
DEFAULTS = AutoscalerConfig()


def notes(**values: str) -> dict[str, str]:
    return {f"autoscaling.knative.dev/{name.replace('_', '-')}": value for name, value in values.items()}


def complaint(data: dict[str, str]) -> str:
    with pytest.raises(ValidationError) as caught:
        AutoscalerConfig.from_data(data)
    return str(caught.value)


def test_defaults_are_those_of_knative() -> None:
    if not SETTINGS.is_file():
        pytest.skip(f"NOT CHECKED AGAINST KNATIVE: no list of its settings at {SETTINGS}")
    maps = next(part for part in yaml.safe_load(SETTINGS.read_text()).values() if isinstance(part, list))
    entries = next(each["entries"] for each in maps if each["name"] == "config-autoscaler")
    shipped = {entry["key"]: str(entry["default"]) for entry in entries}
    assert AutoscalerConfig.from_data(shipped) == DEFAULTS
    assert shipped.keys() == module._KEYS.keys()


def test_example_and_unknown_keys_are_ignored() -> None:
    assert AutoscalerConfig.from_data({"_example": "stable-window: nonsense", "no-such-key": "1"}) == DEFAULTS


def test_values_are_read() -> None:
    config = AutoscalerConfig.from_data(
        {"stable-window": "1m30s", "enable-scale-to-zero": "False", "target-burst-capacity": "-1", "max-scale": "7"}
    )
    assert (config.stable_window_s, config.enable_scale_to_zero) == (90, False)
    assert (config.target_burst_capacity, config.max_scale) == (-1, 7)


@pytest.mark.parametrize(("text", "fraction"), [("70", 0.7), ("0.7", 0.7), ("1", 1.0), ("1.5", 0.015), ("100", 1.0)])
def test_percentage_up_to_one_is_a_fraction(text: str, fraction: float) -> None:
    config = AutoscalerConfig.from_data({"container-concurrency-target-percentage": text})
    assert config.container_concurrency_target_fraction == pytest.approx(fraction)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"stable-window": "60"}, 'failed to parse "stable-window": time: invalid duration "60"'),
        ({"stable-window": "5s"}, "stable-window = 5s, must be in [6s; 1h0m0s] range"),
        ({"stable-window": "2h"}, "stable-window = 2h0m0s, must be in [6s; 1h0m0s] range"),
        ({"stable-window": "6.5s"}, "stable-window = 6.5s, must be specified with at most second precision"),
        ({"scale-down-delay": "-1s"}, "scale-down-delay cannot be negative, was: -1s"),
        ({"scale-down-delay": "100ms"}, "scale-down-delay = 100ms, must be specified with at most second precision"),
        ({"scale-to-zero-grace-period": "0s"}, "scale-to-zero-grace-period must be positive, was: 0s"),
        ({"scale-to-zero-pod-retention-period": "-2m"}, "retention-period cannot be negative, was: -2m0s"),
        ({"target-burst-capacity": "-2"}, "target-burst-capacity must be either non-negative or -1"),
        ({"container-concurrency-target-percentage": "101"}, "= 101 is outside of valid range of (0, 100]"),
        ({"container-concurrency-target-percentage": "0"}, "= 0 is outside of valid range of (0, 100]"),
        ({"container-concurrency-target-default": "0.001"}, "can't be less than 0.01"),
        ({"requests-per-second-target-default": "0"}, "must be at least 0.01, was: 0"),
        ({"activator-capacity": "0.5"}, "activator-capacity = 0.5, must be at least 1"),
        ({"max-scale-up-rate": "1"}, "max-scale-up-rate = 1, must be greater than 1.0"),
        ({"max-scale-down-rate": "nan"}, 'failed to parse "max-scale-down-rate": parsing "nan"'),
        ({"max-scale-down-rate": "0.9"}, "max-scale-down-rate = 0.9, must be greater than 1.0"),
        ({"panic-window-percentage": "0.5"}, "panic-window-percentage = 0.5, must be in [1, 100] interval"),
        ({"initial-scale": "0"}, "initial-scale = 0, must be at least 0 (or at least 1 when"),
        ({"initial-scale": "1.0"}, 'failed to parse "initial-scale": parsing "1.0": invalid syntax'),
        ({"max-scale": "-1"}, "max-scale = -1, must be at least 0"),
        ({"max-scale": "3000000000"}, "value out of range"),
        ({"max-scale-limit": "5"}, "max-scale = 0, must be in [1, max-scale-limit(5)] range"),
        ({"max-scale-limit": "5", "max-scale": "6"}, "max-scale = 6, must be in [1, max-scale-limit(5)] range"),
        ({"max-scale-limit": "-5"}, "max-scale-limit = -5, must be at least 0"),
        ({"min-scale": "3", "max-scale": "2"}, "min-scale = 3, must be in [0, max-scale(2)] range"),
        ({"enable-scale-to-zero": "yes"}, 'failed to parse "enable-scale-to-zero": parsing "yes"'),
    ],
)
def test_config_complaints_name_key_value_and_range(data: dict[str, str], words: str) -> None:
    assert words in complaint(data)


def test_every_complaint_is_told_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        AutoscalerConfig.from_data({"max-scale": "x", "stable-window": "1s", "activator-capacity": "0"})
    assert len(caught.value.problems) == 3


def test_initial_scale_zero_where_it_is_allowed() -> None:
    config = AutoscalerConfig.from_data({"initial-scale": "0", "allow-zero-initial-scale": "true"})
    assert scaler_spec(config, {}, 0).initial_scale == 0
    assert check_annotations(notes(initial_scale="0"), config) == []


def test_initial_scale_zero_of_an_annotation_is_ignored_where_it_is_not_allowed() -> None:
    config = AutoscalerConfig(initial_scale=2)
    assert scaler_spec(config, notes(initial_scale="0"), 0).initial_scale == 2


@pytest.mark.parametrize(
    ("annotations", "complaints"),
    [
        ({}, []),
        (notes(min_scale="1", max_scale="0"), []),
        (notes(min_scale="-1"), ["expected 0 <= -1 <= 2147483647: autoscaling.knative.dev/min-scale"]),
        (notes(max_scale="2147483648"), ["expected 0 <= 2147483648 <= 2147483647: autoscaling.knative.dev/max-scale"]),
        (notes(max_scale="9" * 5000), [f"expected 0 <= {'9' * 5000} <= 2147483647: autoscaling.knative.dev/max-scale"]),
        (notes(min_scale="x"), ["invalid value: x: autoscaling.knative.dev/min-scale"]),
        (notes(minScale="-3"), ["expected 0 <= -3 <= 2147483647: autoscaling.knative.dev/minScale"]),
        (
            notes(min_scale="3", max_scale="2"),
            [
                "max-scale=2 is less than min-scale=3: "
                "autoscaling.knative.dev/max-scale, autoscaling.knative.dev/min-scale"
            ],
        ),
        (notes(activation_scale="1"), ["activation-scale=1 must be greater than 1: .../activation-scale"]),
        (notes(activation_scale="x"), ["invalid value: x: .../activation-scale"]),
        (
            notes(activation_scale="3", min_scale="4"),
            ["min-scale=4 is greater than activation-scale=3: .../activation-scale"],
        ),
        (
            notes(activation_scale="3", max_scale="2"),
            ["max-scale=2 is less than activation-scale=3: .../activation-scale"],
        ),
        (notes(initial_scale="x"), ["invalid value: x: .../initial-scale"]),
        (notes(initial_scale="0"), ["invalid value: 0: .../initial-scale=0 not allowed by cluster"]),
        (notes(initial_scale="-1"), ["invalid value: -1: .../initial-scale must be greater than 0"]),
        (notes(window="x"), ["invalid value: x: .../window"]),
        (notes(window="5s"), ["expected 6s <= 5s <= 1h0m0s: .../window"]),
        (notes(window="61m"), ["expected 6s <= 61m <= 1h0m0s: .../window"]),
        (notes(window="6500ms"), ["must be specified with at most second precision: .../window"]),
        (notes(scale_down_delay="2h"), ["expected 0s <= 2h <= 1h0m0s: .../scale-down-delay"]),
        (notes(scale_down_delay="1.5s"), ["must be specified with at most second precision: .../scale-down-delay"]),
        (notes(scale_to_zero_pod_retention_period="1.5s"), []),
        (
            notes(scale_to_zero_pod_retention_period="-1s"),
            ["expected 0s <= -1s <= 1h0m0s: .../scale-to-zero-pod-retention-period"],
        ),
        (notes(target="0.001"), ["target 0.001 should be at least 0.01: .../target"]),
        (notes(target="inf"), ["invalid value: inf: .../target"]),
        (notes(target_utilization_percentage="0.5"), ["expected 1 <= 0.5 <= 100: .../target-utilization-percentage"]),
        (notes(panic_window_percentage="200"), ["expected 1 <= 200 <= 100: .../panic-window-percentage"]),
        (notes(panic_threshold_percentage="100"), ["expected 110 <= 100 <= 1000: .../panic-threshold-percentage"]),
        (notes(target_burst_capacity="-1"), []),
        (notes(target_burst_capacity="-2"), ["invalid value: -2: .../target-burst-capacity"]),
        (notes(metric="rps"), []),
        (notes(metric="cpu"), ["invalid value: cpu: .../metric"]),
        ({**notes(metric="cpu"), "autoscaling.knative.dev/class": "hpa.autoscaling.knative.dev"}, []),
        ({"autoscaling.knative.dev/class": "x.knative.dev"}, ["invalid value: x.knative.dev: .../class"]),
        ({"autoscaling.knative.dev/class": "keda.example.com", **notes(metric="queue")}, []),
        (
            {"autoscaling.knative.dev/class": "kpa.autoscaling.knative.dev", **notes(metric_aggregation_algorithm="x")},
            ["invalid value: x: .../metric-aggregation-algorithm"],
        ),
    ],
)
def test_annotation_complaints(annotations: dict[str, str], complaints: list[str]) -> None:
    wanted = [text.replace("...", "autoscaling.knative.dev") for text in complaints]
    assert check_annotations(annotations, DEFAULTS) == wanted


def test_every_complaint_about_annotations_is_told_with_its_path() -> None:
    found = check_annotations(notes(window="1s", metric="cpu"), DEFAULTS, path="metadata.annotations.")
    assert found == [
        "expected 6s <= 1s <= 1h0m0s: metadata.annotations.autoscaling.knative.dev/window",
        "invalid value: cpu: metadata.annotations.autoscaling.knative.dev/metric",
    ]


@pytest.mark.parametrize(
    ("scale", "complaints"),
    [
        ("5", []),
        ("6", ["expected 1 <= 6 <= 5: autoscaling.knative.dev/max-scale"]),
        ("0", ["max-scale=0 (unlimited), must be less than 5: autoscaling.knative.dev/max-scale"]),
    ],
)
def test_max_scale_limit(scale: str, complaints: list[str]) -> None:
    assert check_annotations(notes(max_scale=scale), AutoscalerConfig(max_scale=5, max_scale_limit=5)) == complaints


@pytest.mark.parametrize(
    ("annotations", "container_concurrency", "target", "total"),
    [
        ({}, 0, 70.0, 100.0),
        ({}, 10, 7.0, 10.0),
        (notes(target="4"), 10, 2.8, 4.0),
        (notes(target="40"), 10, 7.0, 10.0),
        (notes(target="40"), 0, 28.0, 40.0),
        (notes(metric="rps"), 10, 140.0, 200.0),
        (notes(metric="rps", target="50"), 10, 35.0, 50.0),
        (notes(target_utilization_percentage="90"), 10, 9.0, 10.0),
        (notes(metric="rps", target_utilization_percentage="50"), 0, 100.0, 200.0),
        (notes(target="0.01", target_utilization_percentage="1"), 0, 0.01, 0.01),
    ],
)
def test_target(annotations: dict[str, str], container_concurrency: int, target: float, total: float) -> None:
    spec = scaler_spec(DEFAULTS, annotations, container_concurrency)
    assert spec.target_value == pytest.approx(target)
    assert spec.total_value == total


def test_utilization_of_the_rps_metric_ignores_the_percentage_of_the_config() -> None:
    config = AutoscalerConfig.from_data({"container-concurrency-target-percentage": "50"})
    assert scaler_spec(config, notes(metric="rps"), 0).target_value == 140
    assert scaler_spec(config, {}, 0).target_value == 50


@pytest.mark.parametrize(
    ("window", "percentage", "seconds"), [("60s", "10", 6), ("6s", "1", 1), ("6s", "25", 2), ("30s", "5", 2)]
)
def test_panic_window_is_whole_seconds_with_halves_up(window: str, percentage: str, seconds: int) -> None:
    spec = scaler_spec(DEFAULTS, notes(window=window, panic_window_percentage=percentage), 0)
    assert spec.panic_window_s == seconds


def test_kebab_case_goes_before_camel_case() -> None:
    both = notes(minScale="5", min_scale="2", maxScale="9", initialScale="4", targetBurstCapacity="-1")
    spec = scaler_spec(DEFAULTS, both, 0)
    assert (spec.min_scale, spec.max_scale, spec.initial_scale, spec.scraping) == (2, 9, 4, False)


def test_unreachable_revision_has_no_lower_bound_and_no_retention() -> None:
    annotations = notes(min_scale="2", max_scale="3", scale_to_zero_pod_retention_period="1m")
    spec = scaler_spec(DEFAULTS, annotations, 0, reachable=False)
    assert (spec.min_scale, spec.max_scale, spec.pod_retention_s, spec.reachable) == (0, 3, 0, False)
    assert scaler_spec(DEFAULTS, annotations, 0).pod_retention_s == 60


def test_spec_of_defaults_is_the_default_spec() -> None:
    assert scaler_spec(DEFAULTS, {}, 0) == ScalerSpec()


def test_progress_deadline_annotation() -> None:
    assert scaler_spec(DEFAULTS, {"serving.knative.dev/progress-deadline": "2m"}, 0).progress_deadline_s == 120


def test_unreadable_annotation_names_itself() -> None:
    with pytest.raises(ValidationError, match=r"invalid value: soon: serving\.knative\.dev/progress-deadline"):
        scaler_spec(DEFAULTS, {"serving.knative.dev/progress-deadline": "soon"}, 0)


@given(
    annotations=st.dictionaries(
        st.sampled_from(
            [f"autoscaling.knative.dev/{key}" for key in module._KEYS] + ["autoscaling.knative.dev/window"]
        ),
        st.sampled_from(["", "0", "1", "-1", "1e3", "nan", "5s", "60s", "x", "99999999999", "1_0", " 1", "٣"]),
    )
)
def test_annotations_without_complaint_can_be_read(annotations: dict[str, str]) -> None:
    if not check_annotations(annotations, DEFAULTS):
        scaler_spec(DEFAULTS, annotations, 0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("60s", 60),
        ("1m30s", 90),
        ("0.5s", 0.5),
        (".5s", 0.5),
        ("1.s", 1),
        ("1h2m3s", 3723),
        ("-1.5h", -5400),
        ("+5ms", 0.005),
        ("0", 0),
        ("100us", 1e-4),
        ("100µs", 1e-4),
        ("3ns", 3e-9),
    ],
)
def test_durations_are_read_as_go_does(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds, rel=1e-15)


@pytest.mark.parametrize("text", ["", "60", "s", "1 s", "1d", "1m 30s", "--1s", ".s", "1e3s", "٣s", "999999999h", "1S"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="time: invalid duration"):
        parse_duration_s(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (3600, "1h0m0s"),
        (90, "1m30s"),
        (6.5, "6.5s"),
        (0.1, "100ms"),
        (0.0015, "1.5ms"),
        (2e-6, "2µs"),
        (7e-9, "7ns"),
        (-61.25, "-1m1.25s"),
    ],
)
def test_durations_are_written_as_go_does(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(-(10**15), 10**15))
def test_durations_survive_writing_and_reading(ns: int) -> None:
    assert parse_duration_s(format_duration(ns / 1e9)) == ns / 1e9
