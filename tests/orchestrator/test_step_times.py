"""A plan's profiles reach the orchestrator as one setting."""

from __future__ import annotations

from dataclasses import replace

import pytest

from functions.contract.settings_error import SettingsError
from orchestrator.cost import StageProfile
from orchestrator.settings import load_settings
from orchestrator.step_times import read_step_times, step_times_text

PROFILE = StageProfile("cpu", "float32", "2026-11-24", 1.0, ((1, 0.004), (8, 0.009)), ((128, 0.1), (512, 0.4)), 1)
REQUIRED = {"ORCHESTRATOR_MODEL": "m", "ORCHESTRATOR_MODEL_NAME": "m", "ORCHESTRATOR_PLAN": "p"}


def settings(monkeypatch: pytest.MonkeyPatch, times: str, urls: str) -> tuple[object, ...]:
    given = {**REQUIRED, "ORCHESTRATOR_STAGE_URLS": urls, "ORCHESTRATOR_STEP_TIMES": times}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return load_settings(given).step_times


def test_figures_survive_the_way() -> None:
    slower = replace(PROFILE, decode_s=((1, 0.00512),))
    assert read_step_times(step_times_text([PROFILE, None, slower])) == [
        ((1, 0.004), (8, 0.009), (128, 0.1), (512, 0.4)),
        (),
        ((1, 0.00512), (128, 0.1), (512, 0.4)),
    ]


def test_no_figures_are_no_setting() -> None:
    assert step_times_text([None, None]) == ""


def test_the_setting_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings(monkeypatch, "1:0.5,8:2;", "http://a,http://b") == (((1, 0.5), (8, 2.0)), ())
    assert settings(monkeypatch, "", "http://a,http://b") == ()


@pytest.mark.parametrize("times", ["1", "1:x", "8:1,1:1", "1:0", "1:1:1", "a:1"])
def test_what_cannot_be_read_says_how_it_is_written(times: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="TOKENS:SECONDS"):
        settings(monkeypatch, times, "http://a")


def test_figures_of_another_number_of_stages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="1 stages, there are 2"):
        settings(monkeypatch, "1:0.5", "http://a,http://b")
