"""The replay tool on a small trace worked out by hand, whole and tampered with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import replay_kpa

TOOL = Path(replay_kpa.__file__)


def small_trace() -> dict[str, Any]:
    """14 requests at a time, 7 a pod: two pods, known from the first sample on."""
    config = {
        "scaling_metric": "concurrency",
        "aggregation": "linear",
        "target_value": 7,
        "total_value": 10,
        "target_burst_capacity": 5,
        "activator_capacity": 100,
        "panic_threshold": 3,
        "stable_window_s": 60,
        "panic_window_s": 6,
        "max_scale_up_rate": 1000,
        "max_scale_down_rate": 2,
        "activation_scale": 0,
        "scale_down_delay_s": 0,
        "reachable": True,
        "min_scale": 3,
        "max_scale": 0,
        "initial_scale": 1,
        "scraping": True,
        "ready_pods_at_start": 1,
    }
    nothing = {"desired_pod_count": None, "excess_burst_capacity": None, "observed_stable": None}
    return {
        "name": "small",
        "config": config,
        "samples": [
            {"t": 1, "concurrency_total": None, "ready_pods": 1},
            {"t": 3, "concurrency_total": 14, "ready_pods": 2},
        ],
        "expected": [
            {"t": 2, "scale_valid": False, "num_activators": 2, "panic": False, **nothing},
            {
                "t": 4,
                "scale_valid": True,
                "desired_pod_count": 2,
                "bounded_pod_count": 3,
                "excess_burst_capacity": 1,
                "num_activators": 2,
                "panic": False,
                "observed_stable": 14,
                "observed_panic": 14.0000009,
            },
        ],
    }


def write(folder: Path, name: str, trace: object) -> None:
    (folder / f"{name}.json").write_text(json.dumps(trace), encoding="utf-8")


def test_matching_trace(tmp_path: Path) -> None:
    write(tmp_path, "small", small_trace())
    done = subprocess.run([sys.executable, str(TOOL), str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 of 1 traces match\n", "")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale_valid", False),
        ("desired_pod_count", 3),
        ("desired_pod_count", None),
        ("bounded_pod_count", 2),
        ("excess_burst_capacity", 0),
        ("num_activators", 3),
        ("panic", True),
        ("observed_stable", 14.00001),
        ("observed_panic", None),
    ],
)
def test_tampered_trace_is_told_with_its_first_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    write(tmp_path, "good", small_trace())
    tampered = small_trace()
    tampered["expected"][1][key] = value
    write(tmp_path, "tampered", tampered)
    assert replay_kpa.main([str(tmp_path)]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"tampered: at t=4: {key} is ")
    assert f"expected {value}" in told[0]
    assert told[1] == "1 of 2 traces match"


def test_weighted_averages_are_compared_more_closely() -> None:
    trace = small_trace()
    trace["config"]["aggregation"] = "weighted-exponential"
    trace["config"]["stable_window_s"] = 600  # weight of the newest second: 0.2
    trace["expected"] = [{"t": 3, "observed_stable": 14 * 0.2 * (1 + 1e-10)}]
    assert replay_kpa.first_difference(trace) is None
    trace["expected"] = [{"t": 3, "observed_stable": 14 * 0.2 + 1e-7}]
    assert "observed_stable" in str(replay_kpa.first_difference(trace))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("trace.json", "{", "cannot be read as JSON"),
        ("trace.json", "[1]", "is no trace: it needs an object with config, samples, expected"),
        ("trace.json", '{"config": {}, "samples": [], "expected": []}', "has not the form of a trace (KeyError"),
        ("notes.txt", "", "holds no traces (*.json)"),
    ],
)
def test_what_is_no_trace_is_said_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert replay_kpa.main([str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_missing_folder_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay_kpa.main([str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        replay_kpa.main(["--help"])
    assert caught.value.code == 0
    assert "example: python tools/replay_kpa.py" in capsys.readouterr().out
