"""Figures as JSON lines, as rows and as a file."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.report import Section, alone, beside


def test_figure_beside_a_peer_has_medians_and_the_paired_ratio() -> None:
    data = beside("x", "ms", [3.0, 2.0, 9.0], "echo", [1.0, 1.0, 3.0]).to_json()
    assert data == {
        "name": "x", "value": 3.0, "unit": "ms", "n": 3, "low": 2.0, "high": 9.0,
        "peer": "echo", "peer_value": 1.0, "ratio": 3.0,
    }  # fmt: skip


def test_figure_alone_has_no_peer() -> None:
    assert set(alone("x", "s", [1.0]).to_json()) == {"name", "value", "unit", "n", "low", "high"}


def test_json_line_per_figure() -> None:
    sections = [
        Section("one", [alone("a", "s", [1.0]), alone("b", "s", [2.0])]),
        Section("two", [alone("c", "s", [3.0])]),
    ]
    assert [json.loads(line)["name"] for line in report.json_lines(sections)] == ["a", "b", "c"]


def test_table_shows_ratio_and_notes() -> None:
    text = io.StringIO()
    section = Section("Title", [beside("x", "ms", [3.0], "echo", [2.0], note="[not markup]")], ["how to read it"])
    report.show(section, Console(file=text, width=120))
    shown = text.getvalue()
    assert "1.50 x" in shown
    assert "how to read it" in shown
    assert "x: [not markup]" in shown


def test_file_says_what_was_measured_on(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "latest.json"
    report.write(path, [Section("one", [alone("a", "s", [1.0])])], quick=True, load_before=0.25)
    data = json.loads(path.read_text())
    assert data["quick"] is True
    assert data["load_before"] == 0.25
    assert data["cores"] >= 1
    assert set(report.VERSIONED) == set(data["versions"])
    assert [figure["name"] for figure in data["figures"]] == ["a"]


def test_file_holds_the_points_of_a_plot(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    section = Section("Title", [alone("a", "s", [1.0])], series={"line": [(0.0, 1.0), (1.2345678, 2.0)]})
    report.write(path, [section, Section("no plot", [])], quick=True, load_before=0.25)
    assert json.loads(path.read_text())["series"] == {"Title": {"line": [[0.0, 1.0], [1.2346, 2.0]]}}
