"""Brokers and Triggers with `stagecraft local`: applied, listed, deleted; and the folder that outlives a platform."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.cli.data_folder import data_folder

ROOT = Path(__file__).resolve().parents[3]
MANIFEST = """
apiVersion: eventing.knative.dev/v1
kind: Broker
metadata:
  name: default
---
apiVersion: eventing.knative.dev/v1
kind: Trigger
metadata:
  name: later
spec:
  broker: default
  subscriber:
    ref:
      apiVersion: serving.knative.dev/v1
      kind: Service
      name: later
"""
HEADERS = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "/tests", "ce-type": "test"}


def test_events_outlive_a_platform(
    start_platform: Callable[..., Any], stagecraft: Callable[..., Any], tmp_path: Path
) -> None:
    manifest, data = tmp_path / "events.yaml", tmp_path / "data"
    manifest.write_text(MANIFEST)
    on = ("--platform", "events")
    with start_platform("events", "--data-dir", str(data)) as running:
        assert (running.facts["data_dir"], data.exists()) == (str(data), False)
        applied = stagecraft("local", "apply", "-f", manifest, *on)
        assert applied.out.splitlines() == [
            "broker.eventing.knative.dev/default created",
            "trigger.eventing.knative.dev/later created",
        ]
        url = f"{running.facts['url']}/default/default"
        assert httpx.post(url, headers=HEADERS, trust_env=False).status_code == 202
        head, row = stagecraft("local", "get", "brokers", *on).out.splitlines()
        assert (head.split(), row.split()[:2]) == (["NAME", "URL", "AGE", "READY", "REASON"], ["default", url])
        head, row = stagecraft("local", "get", "trigger", *on).out.splitlines()
        assert head.split() == ["NAME", "BROKER", "SUBSCRIBER_URI", "WAITING", "AGE", "READY", "REASON"]
        assert row.split()[:3] == ["later", "default", "1"]
        assert row.endswith("False   Unable to get the Subscriber's URI")
        assert running.end()[0] == 0
    with start_platform("events", "--data-dir", str(data)):
        (left,) = json.loads(stagecraft("status", "--json", *on).out)["triggers"]
        assert (left["namespace"], left["name"], left["waiting"], left["ready"]) == ("default", "later", 1, False)
        shown = stagecraft("status", *on).out
        assert re.search(r"default/later +1 +0 +0 +0 +0 +0\n", shown), shown
        assert "default/later: apply the trigger to have its events delivered, or delete it to drop them" in shown
        deleted = stagecraft("local", "delete", "trigger", "later", *on)
        assert (deleted.code, deleted.out) == (0, 'trigger.eventing.knative.dev "later" deleted\n')
        assert json.loads(stagecraft("status", "--json", *on).out)["triggers"] == []
        missing = stagecraft("local", "delete", "-f", manifest, *on)
        assert (missing.code, missing.err.count("not found in namespace 'default'")) == (1, 2)


def test_a_file_of_a_newer_version_stops_the_start(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "events.sqlite")) as db:
        db.execute("CREATE TABLE event (x)")
        db.execute("PRAGMA application_id = 0x53744576")
        db.execute("PRAGMA user_version = 99")
    argv = [sys.executable, "-m", "orchestrator.cli", "local", "start", "--port", "0", "--data-dir", str(tmp_path)]
    env = {**os.environ, "STAGECRAFT_RUNTIME_DIR": str(tmp_path / "run")}
    done = subprocess.run([*argv, "--name", "newer"], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot keep events in {tmp_path} (--data-dir): ")
    assert "has version 99, this program reads and writes version 1" in done.stderr


@pytest.mark.parametrize(
    ("state", "expected"), [("/var/state", "/var/state/stagecraft/mine"), ("not/absolute", "{home}/.local/state")]
)
def test_data_lies_where_the_user_keeps_state(
    state: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", state)
    assert str(data_folder(None, "mine")).startswith(expected.format(home=tmp_path))
    assert data_folder(Path("/elsewhere"), "mine") == Path("/elsewhere")
