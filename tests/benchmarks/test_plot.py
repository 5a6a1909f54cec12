"""A run's series become a plot."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.plot import HEIGHT, WIDTH, steps_plot

SVG = "{http://www.w3.org/2000/svg}"

series_of_points = st.dictionaries(
    st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=12),
    st.lists(st.tuples(st.floats(0.1, 1e4), st.integers(0, 500)), min_size=1, max_size=20).map(sorted),
    min_size=1,
    max_size=3,
)


@given(series_of_points)
def test_every_series_is_a_line_within_the_picture_and_has_its_name(series: dict[str, list[tuple[float, int]]]) -> None:
    root = ElementTree.fromstring(steps_plot("A <title>", series, "x", "y"))
    lines = [path.attrib["d"] for path in root.iter(f"{SVG}path") if path.attrib.get("fill") == "none"]
    assert len(lines) == len(series)
    for line in lines:
        assert all(-10 <= float(x) <= WIDTH for x in re.findall(r"[MH]([-\d.]+)", line))
        assert all(-10 <= float(y) <= HEIGHT for y in re.findall(r"V([-\d.]+)", line))
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert all(name in texts for name in series)


def test_higher_values_are_higher_up() -> None:
    root = ElementTree.fromstring(steps_plot("t", {"a": [(0, 1), (1, 3), (2, 2)]}, "x", "y"))
    (line,) = [path.attrib["d"] for path in root.iter(f"{SVG}path") if path.attrib.get("fill") == "none"]
    first = float(re.findall(r"M[\d.]+ ([\d.]+)", line)[0])
    second, third = (float(y) for y in re.findall(r"V([\d.]+)", line))
    assert second < third < first


def test_a_run_without_series_is_told_how_to_make_them(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"series": {}}))
    argv = [sys.executable, "-m", "benchmarks.plot", str(file)]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--only slow" in done.stderr
