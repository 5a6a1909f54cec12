"""`stagecraft profile` as a person runs it: stages in processes of their own are measured, and the plan is written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import pytest

from functions.contract.checkpoint import open_checkpoint
from orchestrator.cost import StageProfile
from orchestrator.plan import dump_plan, load_plan
from orchestrator.planner import plan_by_stages

ROOT = Path(__file__).resolve().parents[3]
Command = Callable[..., Any]
PROFILE_ARGV = [sys.executable, "-P", "-m", "orchestrator.cli", "profile"]


@pytest.fixture
def plan_file(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A plan of two stages as earlier releases wrote it, without figures, its model beside it."""
    (tmp_path / "model").symlink_to(tiny_checkpoint)
    plan = plan_by_stages(open_checkpoint(str(tiny_checkpoint)), 2, name="tiny", model="./model")
    lines = dump_plan(plan).splitlines(keepends=True)
    file = tmp_path / "plan.yaml"
    file.write_text("".join(line for line in lines if "cost:" not in line))
    assert all(stage.cost is None for stage in load_plan(file).stages)
    return file


def test_stages_are_measured_and_the_plan_is_written(plan_file: Path, stagecraft: Command) -> None:
    (plan_file.parent / "elsewhere").mkdir()
    output = plan_file.parent / "elsewhere" / "measured.yaml"
    before = plan_file.read_text()
    options = ["--threads", 1, "--device", "cpu", "--widths", "3,1", "--prefill", "16,500", "--repeat", 2]
    done = stagecraft("profile", plan_file, "-o", output, *options, "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["file"] == str(output)
    assert done.err == f"wrote {output}\n", "no bar where nobody looks"
    plan = load_plan(output)
    assert (plan.digest, facts["digest"]) == (load_plan(plan_file).digest,) * 2, "stages of the same cut fit together"
    assert "model: ../model " in output.read_text(), "seen from the new file"
    for stage, told in zip(plan.stages, facts["stages"], strict=True):
        assert stage.cost is not None
        profile = stage.profile
        assert isinstance(profile, StageProfile)
        assert (profile.device, profile.dtype, profile.measured) == ("cpu, 1 thread", "float32", str(date.today()))
        assert [width for width, _ in profile.decode_s] == [1, 3]
        assert [width for width, _ in profile.prefill_s] == [16, 256], "cut to the positions of the model"
        assert profile.memory_bytes > 50 << 20, "of a process that holds torch"
        assert profile.load_s > 0.01
        assert told["blocks"] == str(stage.blocks)
        assert told["decode_ms"] == {str(width): pytest.approx(s * 1000) for width, s in profile.decode_s}
    assert plan_file.read_text() == before
    assert sorted(path.name for path in output.parent.iterdir()) == ["measured.yaml"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["PLAN", "--widths", "1,two"], "--widths must be whole numbers in 1..99999 with commas between them"),
        (["PLAN", "--widths", ""], "--widths must be whole numbers"),
        (["PLAN", "--prefill", "0"], "--prefill must be whole numbers"),
        (["PLAN", "--repeat", "0"], "--repeat"),
        (["PLAN", "--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["PLAN", "--dtype", "int4"], "--dtype"),
        (["PLAN", "--in-place", "-o", "x.yaml"], "give either -o FILE or --in-place"),
        (["PLAN", "-o", "PLAN"], "exists already; choose another file, or overwrite it with --force"),
        (["PLAN", "-o", "no/such/folder/x.yaml"], "cannot write no/such/folder/x.yaml: there must be a folder"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(
    arguments: list[str], said: str, plan_file: Path, stagecraft: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plan_file.parent)
    done = stagecraft("profile", *[str(plan_file) if word == "PLAN" else word for word in arguments])
    assert done.code == 2
    assert said in done.err
    assert done.out == ""


def test_a_model_that_does_not_fit_the_plan_is_refused(plan_file: Path, stagecraft: Command) -> None:
    before = plan_file.read_text().replace("./model ", "demo ")
    plan_file.write_text(before)
    done = stagecraft("profile", plan_file, "--in-place")
    assert done.code == 2
    assert "has 8 blocks" in done.err
    assert plan_file.read_text() == before


def test_a_stage_that_cannot_load_says_why(plan_file: Path, tiny_checkpoint: Path, stagecraft: Command) -> None:
    model = plan_file.parent / "model"
    model.unlink()
    model.mkdir()
    for path in tiny_checkpoint.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "nobody-knows"}))
    lines = plan_file.read_text().splitlines(keepends=True)
    before = "".join(line for line in lines if not line.startswith("fingerprint"))
    plan_file.write_text(before)
    done = stagecraft("profile", plan_file, "--in-place")
    assert done.code == 1
    assert done.err.startswith("error: stage 0: ")
    assert "nobody-knows" in done.err
    assert done.err.count("\n") == 1
    assert plan_file.read_text() == before


def test_ctrl_c_ends_the_stage_and_leaves_the_plan_alone(plan_file: Path) -> None:
    before = plan_file.read_text()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*PROFILE_ARGV, plan_file, "--in-place"], stderr=subprocess.PIPE, env=env) as run:
        assert run.stderr is not None
        try:
            stage = _child(run.pid)
            run.send_signal(signal.SIGINT)
            said = run.stderr.read().decode()
            assert run.wait() == 130, said
        finally:
            run.kill()
    assert "Traceback" not in said
    assert not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE
    assert plan_file.read_text() == before
    assert sorted(path.name for path in plan_file.parent.iterdir()) == ["model", "plan.yaml"]


def _child(pid: int) -> psutil.Process:
    """The process's first child."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if children := psutil.Process(pid).children():
            return children[0]
        time.sleep(0.02)
    raise AssertionError("no stage was started")


def test_help_has_examples(stagecraft: Command) -> None:
    done = stagecraft("profile", "--help")
    assert done.code == 0
    assert "stagecraft profile plan.yaml --in-place" in done.out
