"""Where a stage finds its checkpoint: the demonstration model by name, and weights that appear late."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from functions.contract.checkpoint import CheckpointError, open_checkpoint
from functions.contract.location import checkpoint_location, default_wait_s, wait_for_checkpoint


def test_demo_is_the_model_beside_the_packages(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert checkpoint_location("demo") == str(root / "models" / "demo")
    assert open_checkpoint(checkpoint_location("demo")).block_count > 1
    (tmp_path / "demo").mkdir()
    assert checkpoint_location("demo") == "demo", "a folder of that name comes first"


@pytest.mark.parametrize("model", ["/mnt/models", "s3://bucket/demo", "./demo"])
def test_everything_else_is_itself(model: str) -> None:
    assert checkpoint_location(model) == model


@pytest.mark.parametrize(("mode", "expected"), [(None, 0), ("", 0), ("sync", 0), ("async", 300), ("ASYNC", 300)])
def test_kserve_says_whether_weights_come_late(
    monkeypatch: pytest.MonkeyPatch, mode: str | None, expected: float
) -> None:
    monkeypatch.delenv("MODEL_INIT_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("MODEL_INIT_MODE", mode)
    assert default_wait_s() == expected


def test_nothing_is_awaited_unless_asked_nor_at_a_url() -> None:
    wait_for_checkpoint("/no/such/folder", 0)
    wait_for_checkpoint("s3://bucket/x", 60)


def test_a_wait_in_vain_says_what_was_missing_and_what_to_do(tmp_path: Path) -> None:
    missing = tmp_path / "models"
    missing.symlink_to(tmp_path / "nowhere")
    reason = rf"{re.escape(str(missing))}/config.json cannot be read after 0.01 s \(No such file .*STAGE_MODEL_WAIT_S"
    with pytest.raises(CheckpointError, match=reason):
        wait_for_checkpoint(str(missing), 0.01)


def test_a_stage_loads_once_its_weights_are_there(
    start_stage: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    mount = tmp_path / "models"
    mount.symlink_to(tmp_path / "later")  # as /mnt/models before KServe's model container runs
    stage = start_stage({"model": mount, "blocks": "0:1", "model_wait_s": 60})
    while "waiting_for_checkpoint" not in stage.log.read_text():
        assert stage.process.poll() is None, stage.log.read_text()
        time.sleep(0.05)
    assert stage.get("/healthz").status_code == 200
    assert stage.get("/readyz").status_code == 503
    (tmp_path / "later").symlink_to(tiny_checkpoint)
    assert stage.wake()["blocks"] == [0, 1]


def test_a_stage_that_waits_still_ends_on_sigterm(start_stage: Callable[..., Any], tmp_path: Path) -> None:
    stage = start_stage({"model": tmp_path / "none", "blocks": "0:1", "model_wait_s": 60})
    assert stage.get("/readyz").status_code == 503
    stage.process.send_signal(signal.SIGTERM)
    code, log = stage.ended()
    assert (code, "Traceback" in log) == (0, False)
