"""What the platform rather than a person tells the orchestrator: its port, and that weights come late."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from functions.contract.settings_error import SettingsError
from orchestrator.settings import PREFIX, load_settings

GIVEN = {"model": "demo", "model_name": "demo", "plan": "p", "stage_urls": "http://stage"}


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({}, {}, 8080),
        ({"PORT": "8099"}, {}, 8099),
        ({"PORT": ""}, {}, 8080),
        ({"PORT": "8099", f"{PREFIX}HTTP_PORT": "8100"}, {}, 8100),
        ({"PORT": "8099"}, {"http_port": "8101"}, 8101),
    ],
)
def test_the_port_of_the_platform_is_the_last_resort_but_one(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], flags: dict[str, Any], expected: int
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert load_settings(environment, **GIVEN, **flags).http_port == expected


def test_a_port_that_is_none_is_refused() -> None:
    with pytest.raises(SettingsError, match="HTTP_PORT: Input should be a valid integer"):
        load_settings({"PORT": "http"}, **GIVEN)


def test_weights_that_come_late_are_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL_INIT_MODE", raising=False)
    assert load_settings({}, **GIVEN).model_wait_s == 0
    monkeypatch.setenv("MODEL_INIT_MODE", "async")
    assert load_settings({}, **GIVEN).model_wait_s == 300
    assert load_settings({}, **GIVEN, model_wait_s="7").model_wait_s == 7


def test_a_wait_for_weights_ends_on_sigterm_and_is_told_when_it_is_over(root: Path, tmp_path: Path) -> None:
    flags = [part for name, value in GIVEN.items() for part in (f"--{name.replace('_', '-')}", value)]
    argv = [sys.executable, "-m", "orchestrator.server", *flags, "--model", str(tmp_path / "none"), "--model-wait-s"]
    process = subprocess.Popen([*argv, "60"], cwd=root, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr as log:
        assert "waiting_for_checkpoint" in log.readline()
        process.send_signal(signal.SIGTERM)
        assert (process.wait(20), log.read()) == (0, "")
    over = subprocess.run([*argv, "0.01"], cwd=root, capture_output=True, text=True, check=False)
    assert over.returncode == 2
    assert "config.json cannot be read after 0.01 s" in over.stderr
    assert "Traceback" not in over.stderr


def test_the_sink_of_the_platform_is_the_last_resort_but_one() -> None:
    assert load_settings({"K_SINK": "http://broker/ns/b"}, **GIVEN).events_sink == "http://broker/ns/b"
    assert load_settings({"K_SINK": "http://broker"}, **GIVEN, events_sink="http://mine").events_sink == "http://mine"


def test_mode_later_needs_a_file_and_a_sink() -> None:
    with pytest.raises(SettingsError, match=f"needs {PREFIX}EVENTS_FILE and {PREFIX}EVENTS_SINK"):
        load_settings({}, **GIVEN, events="later")
    with pytest.raises(SettingsError, match=f"needs {PREFIX}EVENTS_FILE$"):
        load_settings({"K_SINK": "http://broker"}, **GIVEN, events="later")
    load_settings({"K_SINK": "http://broker"}, **GIVEN, events="later", events_file="/events.sqlite")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({}, 192), ({"lane_width": "8"}, 24), ({"spread": "1"}, 128), ({"batch_requests_max": "5"}, 5)],
)
def test_batches_may_fill_the_chain_and_a_lane_more(flags: dict[str, str], expected: int) -> None:
    stages = {**GIVEN, "stage_urls": "http://a,http://b"}
    assert load_settings({}, **stages, **flags).batch_workers == expected
