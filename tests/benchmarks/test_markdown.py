"""A written run becomes a Markdown table."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import report
from benchmarks.goals import Goal, Verdict
from benchmarks.markdown import HEADINGS, tables
from benchmarks.report import Section, alone, beside


def test_every_figure_is_a_row_of_as_many_cells_as_headings(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    figures = [alone("a", "s", [1.0]), beside("b", "ms", [3.0], "echo", [2.0])]
    report.write(path, [Section("one", figures)], quick=False, load_before=0.1)
    rows = [line for line in tables(json.loads(path.read_text())).splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == ["figure", "---", "a", "b"]
    assert {len(row.split("|")) for row in rows} == {len(HEADINGS) + 2}
    assert "echo 2" in rows[-1]
    assert "1.50 x" in rows[-1]


def test_goals_are_a_table_below_the_figures(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    goal = Goal("quick", "hop", "b", "<=", 2)
    verdicts = [Verdict(goal, beside("b", "ms", [3.0], "echo", [2.0])), Verdict(goal)]
    facts = [verdict.to_json() for verdict in verdicts]
    report.write(path, [Section("one", [alone("a", "s", [1.0])])], quick=False, load_before=0.1, goals=facts)
    rows = tables(json.loads(path.read_text())).splitlines()[-2:]
    assert rows == ["| quick | 1.5 x | <= 2 x | holds |", "| quick |  | <= 2 x | not measured |"]
