"""`stagecraft batch`: its arguments, the addresses that it finds by itself, and what it shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.batches.journal import State
from orchestrator.cli.batch_view import Speed, duration_text, expected, progress_line

Command = Callable[..., Any]

RESULTS_SERVICE = """
apiVersion: serving.knative.dev/v1
kind: Service
metadata: {name: tiny-results}
spec:
  template:
    spec:
      containers:
        - image: stagecraft/results
          env: [{name: RESULTS_FILE, value: /nowhere/at/all/results.sqlite}]
---
apiVersion: eventing.knative.dev/v1
kind: Broker
metadata: {name: default}
---
apiVersion: eventing.knative.dev/v1
kind: Trigger
metadata: {name: requests}
spec:
  broker: default
  filter: {attributes: {type: dev.stagecraft.batch.request.v1, model: Tiny-1}}
  subscriber: {uri: http://127.0.0.1:9/events}
"""


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.mark.parametrize("command", ["submit", "resume", "cancel", "status", "list", "results"])
def test_every_command_has_help_with_examples(stagecraft: Command, command: str) -> None:
    done = stagecraft("batch", command, "--help")
    assert done.code == 0
    assert f"stagecraft batch {command}" in done.out.split("Examples")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing.jsonl",), "cannot read missing.jsonl"),
        ((".",), "cannot read ."),
        (("in.jsonl", "-o", "no/such/folder/out.jsonl"), "there is no folder"),
        (("in.jsonl", "--broker", "broker"), "--broker must be a URL"),
        (("in.jsonl", "--broker", "http://b", "--results", "ftp://r"), "--results must be a URL"),
    ],
)
def test_wrong_arguments_end_with_2_and_leave_nothing(
    stagecraft: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"prompt": "x"}')
    done = stagecraft("batch", "submit", *arguments)
    assert (done.code, words in done.err) == (2, True), done.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("command", ["resume", "cancel", "status"])
def test_a_batch_that_is_not_known_is_told(stagecraft: Command, command: str) -> None:
    done = stagecraft("batch", command, "batch-none")
    assert done.code == 1
    assert "there is no batch batch-none on this machine; `stagecraft batch list` shows" in done.err


def test_nothing_to_list(stagecraft: Command) -> None:
    assert stagecraft("batch", "list", "--json").out == '{"batches": []}\n'
    assert "no batch" in stagecraft("batch", "list").err


def test_broker_results_and_model_are_found_from_the_platform(
    stagecraft: Command, start_platform: Callable[..., Any], tmp_path: Path
) -> None:
    manifest, source = tmp_path / "m.yaml", tmp_path / "in.jsonl"
    manifest.write_text(RESULTS_SERVICE)
    source.write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    with start_platform("batches", "--data-dir", str(tmp_path / "data")) as running:
        options = ("--platform", "batches")
        done = stagecraft("batch", "submit", source, *options)
        assert (done.code, "has no results service" in done.err) == (1, True), done.err
        assert stagecraft("local", "apply", "-f", manifest, *options).code == 0
        done = stagecraft("batch", "submit", source, *options, "--json")
        assert done.code == 0, done.err
        facts = json.loads(done.out)
        base = f"{running.facts['url']}/default"
        assert (facts["broker"], facts["results"]) == (f"{base}/default", f"{base}/tiny-results")
        assert (facts["model"], facts["sent"], facts["state"]) == ("Tiny-1", 2, "in progress")
        status = json.loads(stagecraft("batch", "status", facts["batch"], "--json").out)
        assert (status["service"], status["dead_letters"]) == (None, [])  # it answered: nothing has come


STATE = State("b", "/in", 4000, "/out", "http://b", None, "m", 0.0, offset=1000, sent=100, completed=40, failed=3)


def test_the_rest_is_estimated_from_what_was_read() -> None:
    assert expected(STATE) == 400
    assert expected(replace(STATE, input_bytes=None)) is None
    assert expected(replace(STATE, offset=0, sent=0)) is None
    assert expected(replace(STATE, all_sent=True)) == 100
    assert progress_line(STATE, 10.0, wait=True) == (
        "sent 100 of about 400, done 43, failed 3, 10.0/s, about 36 s left"
    )
    assert progress_line(replace(STATE, all_sent=True), 0.0, wait=True) == "sent 100, done 43, failed 3, 0.0/s"
    assert progress_line(STATE, 10.0, wait=False) == "sent 100 of about 400, 10.0/s, about 30 s left"


def test_speed_is_that_of_the_last_while() -> None:
    speed = Speed()
    speed.add(0.0, 0)
    assert speed.per_s == 0
    speed.add(10.0, 1000)
    assert speed.per_s == 100
    for now_s in range(20, 60, 10):
        speed.add(float(now_s), 1000)
    assert speed.per_s == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (-1, "0 s"), (99, "99 s"), (100, "2 min"), (7200, "2 h"), (10**6, "12 d")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
