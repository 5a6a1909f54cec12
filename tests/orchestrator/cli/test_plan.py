"""`stagecraft plan` as a person runs it: what it prints, what it writes, how it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from functions.contract.checkpoint import open_checkpoint
from orchestrator.plan import dump_plan, load_plan, parse_plan
from orchestrator.planner import check_plan

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = "import sys, typer; from orchestrator.cli.plan import plan; typer.run(plan)"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs the command in an empty folder, with 100 columns."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
        done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


def test_the_table_shows_every_stage_and_the_sum(run: Run, tiny_checkpoint: Path) -> None:
    done = run(tiny_checkpoint, "--stages", 2, "--name", "mine")
    assert done.returncode == 0, done.stderr
    assert "mine: 4 blocks in 2 stages" in done.stdout
    for word in ("stage", "blocks", "parameters", "weights", "KV/token", "FLOPs/token", "share", "0:3", "3:4", "100 %"):
        assert word in done.stdout, done.stdout
    assert "…" not in done.stdout
    assert done.stderr == ""


def test_json_is_one_object_that_adds_up(run: Run, tiny_checkpoint: Path) -> None:
    done = run(tiny_checkpoint, "--stages", 3, "--dtype", "float16", "--json")
    facts = json.loads(done.stdout)
    tensors = open_checkpoint(str(tiny_checkpoint)).tensors.values()
    stored = sum(tensor.nbytes // 4 for tensor in tensors)
    assert sum(stage["parameters"] for stage in facts["stages"]) == stored
    assert sum(stage["weight_bytes"] for stage in facts["stages"]) == 2 * stored
    assert [stage["stage"] for stage in facts["stages"]] == [0, 1, 2]
    assert (facts["dtype"], facts["block_count"], facts["file"]) == ("float16", 4, None)
    assert facts["name"] == tiny_checkpoint.name


def test_int8_is_in_the_plan_and_in_its_figures(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = [tiny_checkpoint, "--stages", 2, "--dtype", "float32", "--json"]
    plain, int8 = (json.loads(run(*options, *more).stdout) for more in ([], ["--quantize", "int8", "-o", "plan.yaml"]))
    assert int8["quantize"] == load_plan(tmp_path / "plan.yaml").quantize == "int8"
    assert int8["digest"] == load_plan(tmp_path / "plan.yaml").digest != plain["digest"]
    assert all(b["weight_bytes"] < a["weight_bytes"] for a, b in zip(plain["stages"], int8["stages"], strict=True))
    assert run(tiny_checkpoint, "--stages", 2, "--quantize", "int4").returncode == 2


def test_the_file_is_a_plan_for_the_checkpoint(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = run(tiny_checkpoint, "--stages", 2, "-o", "plan.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert "stagecraft up --plan plan.yaml" in done.stderr
    plan = load_plan(tmp_path / "plan.yaml")
    checkpoint = open_checkpoint(plan.model)
    check_plan(plan, checkpoint)
    facts = json.loads(done.stdout)
    assert (facts["digest"], facts["fingerprint"]) == (plan.digest, plan.fingerprint)
    assert "# 0: embeddings + blocks 0 to 2: " in (tmp_path / "plan.yaml").read_text()
    counted = ("parameters", "weight_bytes", "kv_bytes_per_token", "flops_per_token")
    for stage, told in zip(plan.stages, facts["stages"], strict=True):
        assert stage.cost is not None
        assert stage.profile is None
        assert asdict(stage.cost) == {key: told[key] for key in counted}, "rendering needs no checkpoint"
    assert parse_plan(dump_plan(plan)) == plan


def test_a_folder_beside_the_file_is_written_as_seen_from_it(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "plans").mkdir()
    (tmp_path / "models" / "mine").symlink_to(tiny_checkpoint)
    assert run("models/mine", "--stages", 1, "-o", "plans/plan.yaml").returncode == 0
    assert "model: ../models/mine " in (tmp_path / "plans" / "plan.yaml").read_text()
    assert os.path.samefile(load_plan(tmp_path / "plans" / "plan.yaml").model, tiny_checkpoint)


def test_memory_decides_the_number_of_stages(run: Run, tiny_checkpoint: Path) -> None:
    def stages(memory: str) -> int:
        done = run(tiny_checkpoint, "--memory-per-stage", memory, "--kv-tokens", 0, "--json")
        assert done.returncode == 0, done.stderr
        return len(json.loads(done.stdout)["stages"])

    assert [stages("1GiB"), stages("50KiB"), stages("30KiB")] == [1, 2, 3]


def test_a_file_is_overwritten_by_force_only(run: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("precious")
    refused = run(tiny_checkpoint, "--stages", 2, "-o", "plan.yaml")
    assert refused.returncode == 2
    assert "plan.yaml exists already" in refused.stderr
    assert (tmp_path / "plan.yaml").read_text() == "precious"
    assert run(tiny_checkpoint, "--stages", 2, "-o", "plan.yaml", "--force").returncode == 0
    assert len(load_plan(tmp_path / "plan.yaml").stages) == 2


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["MODEL"], 2, "give either --stages N or --memory-per-stage SIZE"),
        (["MODEL", "--stages", "2", "--memory-per-stage", "1GiB"], 2, "give either"),
        (["MODEL", "--stages", "2", "--kv-tokens", "5"], 2, "--kv-tokens goes with --memory-per-stage"),
        (["MODEL", "--stages", "5"], 2, "has 4 blocks, so it can be cut into 1 to 4 stages, not into 5"),
        (["MODEL", "--stages", "0"], 2, "--stages"),
        (["MODEL", "--memory-per-stage", "lots"], 2, "--memory-per-stage: a size is a number and a unit"),
        (["MODEL", "--memory-per-stage", "1KiB"], 2, "the smallest memory that would do is 1MiB"),
        (["MODEL", "--stages", "2", "--dtype", "int4"], 2, "--dtype"),
        (["MODEL", "--stages", "2", "--name", ""], 2, "--name must be text"),
        (["MODEL", "--stages", "2", "-o", "no/such/folder/plan.yaml"], 1, "cannot write no/such/folder/plan.yaml"),
        (["nowhere", "--stages", "2"], 1, "there is no folder nowhere"),
        (["empty", "--stages", "2"], 1, "empty holds no config.json"),
        (["broken", "--stages", "2"], 1, "config.json is not JSON"),
        (["holed", "--stages", "2"], 1, "no tensors for block 4, config.json speaks of 5 blocks"),
        (["--stages", "2"], 2, "Missing"),
    ],
)
def test_refusals_say_why_in_one_paragraph(
    arguments: list[str], exit_code: int, said: str, run: Run, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("empty", "broken", "holed"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for path in tiny_checkpoint.iterdir():
        (tmp_path / "holed" / path.name).write_bytes(path.read_bytes())
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    (tmp_path / "holed" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    done = run(*[str(tiny_checkpoint) if word == "MODEL" else word for word in arguments])
    assert done.returncode == exit_code, done.stderr
    assert said in done.stderr
    assert done.stdout == ""
    if done.stderr.startswith("error:"):
        assert done.stderr.count("\n") == 1


def test_help_has_examples(run: Run) -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "stagecraft plan demo --stages 2" in done.stdout
