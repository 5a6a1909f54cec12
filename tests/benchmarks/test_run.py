"""Every figure runs at toy size, as real processes, so that the benchmarks never rot. No test looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.goals import GOALS
from benchmarks.traces import EXCERPTS

WAYS = ("queue-proxy", "ingress, queue-proxy", "ingress, activator, queue-proxy")

# figure -> names that its JSON lines must have
EXPECTED = {
    "hop": [
        *(f"hop {size} p{percent}" for size in ("10 KB", "16 MB") for percent in (50, 99)),
        *(f"hop 16 MB, at the {end}" for end in ("stage", "client")),
    ],
    "latency": ["82M, generate, 2 threads", "82M, 2 stages, 2 threads each", "82M, 4 stages, 2 threads each"],
    "throughput": [
        *(
            f"{count} at once{what}"
            for count in (1, 8, 32, 64)
            for what in ("", " over HTTP", ", generate", ", one at a time")
        ),
        "64 at once, beside the floor",
        "64 at once over HTTP, CPU of the orchestrator",
    ],
    "mixed": ["mixed lengths", "mixed lengths, KV cache set aside"],
    "prefill": ["first token of 1,500, chunked"],
    "path": [
        *(f"{way}, {percent}" for percent in ("p50", "p99") for way in WAYS),
        *(f"{way}, 2 connections" for way in WAYS if way.startswith("ingress")),
    ],
    "wake": ["wake demo, 2 stages"],
    "startup": ["first token, up, 2 stages"],
    "slow": [
        "replicas, stage 0, 10 ms a step",
        "replicas, stage 1, 20 ms a step",
        "replicas, stage 2, 10 ms a step",
        "replicas, slow stage",
    ],
    "events": [
        "accepted, single, 8 connections",
        "accepted, single, 64 connections",
        "accepted, batches of 100, 8 connections",
        "delivered, 16 in flight",
        "delivered, 64 in flight",
        "2,000 queued, accepted in batches of 1,000",
        "2,000 queued, memory of the platform",
        "2,000 queued, files",
    ],
    "batch": ["batch demo, 16 tokens out"],
    "memory": ["base: a stage next to empty", "2 stages: stage 0", "2 stages: stage 1"],
}


QUICKEST = ("path", "hop")


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICKEST else pytest.mark.slow) for n in EXPECTED])
def test_figure_runs_at_toy_size(root: Path, tmp_path: Path, name: str) -> None:
    if name == "mixed" and not EXCERPTS.is_dir():
        pytest.skip(f"the traces are not there: {EXCERPTS}")
    output = tmp_path / "new" / "figures.json"
    done = run(root, "--quick", "--json", "--only", name, "--output", str(output))
    assert done.returncode == 0, done.stderr
    every = [json.loads(line) for line in done.stdout.splitlines()]
    lines, verdicts = [line for line in every if "name" in line], [line for line in every if "goal" in line]
    assert every == lines + verdicts
    assert [verdict["goal"] for verdict in verdicts] == [goal.name for goal in GOALS if goal.source == name]
    assert all(verdict["measured"] > 0 and verdict["holds"] in (True, False) for verdict in verdicts)
    names = [line["name"] for line in lines if "transformers serve" not in line["name"]]  # where it can run
    assert names == EXPECTED[name]
    assert all(line["value"] > 0 and line["n"] == 1 and line["unit"] for line in lines)
    assert all(line["ratio"] > 0 for line in lines if "peer" in line)
    # tokens or texts that differ from the peer's are noted, and would make the figure worthless
    notes = [line.get("note", "") for line in lines]
    assert not any("tokens" in note or "texts are those of the peer" in note for note in notes)
    written = json.loads(output.read_text())
    assert written["figures"] == lines
    assert written["goals"] == verdicts
    assert written["quick"] is True


def test_expected_names_cover_all_figures(root: Path) -> None:
    done = run(root, "--only", "nothing")
    assert done.returncode == 2
    assert all(name in done.stderr for name in EXPECTED)


def test_every_goal_is_about_a_figure_that_is_measured() -> None:
    assert all(goal.figure in EXPECTED[goal.source] for goal in GOALS)


def test_goals_choose_the_figures_by_themselves(root: Path) -> None:
    done = run(root, "--goals", "--only", "hop")
    assert done.returncode == 2
    assert "--only cannot" in done.stderr


@pytest.mark.slow
def test_real_time_needs_a_right(root: Path, tmp_path: Path) -> None:
    limits = "import os; os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))"
    allowed = subprocess.run([sys.executable, "-c", limits], capture_output=True, check=False).returncode == 0
    output = tmp_path / "x.json"
    done = run(root, "--first", "--quick", "--only", "hop", "--output", str(output))
    if allowed:
        assert done.returncode == 0, done.stderr
        assert json.loads(output.read_text())["before_other_programs"] is True
    else:
        assert done.returncode == 2
        assert "CAP_SYS_NICE" in done.stderr


def test_help_shows_examples(root: Path) -> None:
    done = run(root, "--help")
    assert done.returncode == 0
    assert "python -m benchmarks --only hop" in done.stdout


def test_interrupt_leaves_no_process_behind(root: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "benchmarks", "--quick", "--only", "memory", "--output", str(tmp_path / "x.json")]
    process = psutil.Popen(argv, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children: list[psutil.Process] = []
    while not any("functions" in child.cmdline() for child in children):
        assert process.poll() is None, "ended before a stage was started"
        time.sleep(0.05)
        children = alive(process)
    process.send_signal(2)
    assert process.wait() != 0
    _, left = psutil.wait_procs(children, timeout=10)
    assert left == []


def alive(process: psutil.Process) -> list[psutil.Process]:
    """Its children, without those that are gone by the time one looks."""
    found = process.children(recursive=True)
    return [child for child in found if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
