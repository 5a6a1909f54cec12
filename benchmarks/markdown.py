"""Figures and goals of a run as Markdown tables for docs/performance.md: `python -m benchmarks.markdown [FILE]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import number

LATEST = Path(__file__).parent / "results" / "latest.json"
HEADINGS = ("figure", "median", "range", "unit", "peer", "ratio")
GOAL_HEADINGS = ("goal", "measured", "wanted", "")


def tables(data: dict[str, Any]) -> str:
    """`data` is what a run writes, see `report.write`."""
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    verdicts = [_verdict(goal) for goal in data.get("goals", [])]
    lines = [
        f"{data['date']}, {data['cores']} CPU cores ({data['machine']}), load {data['load_before']} before the run"
        f"{', before other programs' if data['before_other_programs'] else ''}, "
        f"Python {data['python']}, {versions}.",
        "",
        f"| {' | '.join(HEADINGS)} |",
        f"| --- |{' ---: |' * 2} --- | --- | ---: |",
        *(_row(figure) for figure in data["figures"]),
        *(["", f"| {' | '.join(GOAL_HEADINGS)} |", "| --- | ---: | --- | --- |", *verdicts] if verdicts else []),
    ]
    return "\n".join(lines)


def _verdict(goal: dict[str, Any]) -> str:
    measured = "" if goal["measured"] is None else f"{goal['measured']:.3g} x"
    verdict = {None: "not measured", True: "holds", False: "missed"}[goal["holds"]]
    return f"| {goal['goal']} | {measured} | {goal['goal_ratio']} x | {verdict} |"


def _row(figure: dict[str, Any]) -> str:
    peer = f"{figure['peer']} {number(figure['peer_value'])}" if "peer" in figure else ""
    ratio = f"{figure['ratio']:.2f} x" if "ratio" in figure else ""
    spread = f"{number(figure['low'])} - {number(figure['high'])}"
    return f"| {' | '.join([figure['name'], number(figure['value']), spread, figure['unit'], peer, ratio])} |"


if __name__ == "__main__":
    print(tables(json.loads(Path(sys.argv[1] if len(sys.argv) > 1 else LATEST).read_text())))
