"""Decisions recorded from Knative's own autoscaler, replayed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from knative.autoscaler.config import AutoscalerConfig, check_annotations, scaler_spec
from tools.replay_kpa import first_difference, read_trace, spec_of

TRACES = Path(__file__).resolve().parents[4] / "shared" / "conformance" / "kpa"

pytestmark = pytest.mark.skipif(
    not TRACES.is_dir(), reason=f"NOT CHECKED AGAINST KNATIVE: the recorded traces are not at {TRACES}"
)

each_trace = pytest.mark.parametrize("path", sorted(TRACES.glob("*.json")), ids=lambda path: path.stem)


def test_all_traces_are_there() -> None:
    assert len(list(TRACES.glob("*.json"))) == 35


@each_trace
def test_decides_as_knative_did(path: Path) -> None:
    assert first_difference(read_trace(path)) is None


@each_trace
def test_settings_come_to_the_same_values_as_in_knative(path: Path) -> None:
    trace = read_trace(path)
    inputs, wanted = trace["inputs"], spec_of(trace["config"])
    config = AutoscalerConfig.from_data(inputs["config_autoscaler"])
    assert check_annotations(inputs["annotations"], config) == []
    spec = scaler_spec(
        config, inputs["annotations"], inputs["container_concurrency"], reachable=trace["config"]["reachable"]
    )
    assert asdict(spec) == asdict(wanted)
