"""Figures as tables for people and as JSON lines for programs."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.alternate import median_ratio

VERSIONED = ("torch", "transformers", "aiohttp", "uvicorn", "functions-framework", "cloudevents", "kserve")


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value, beside its peer's if it has one. `ratio` is value / peer_value, round by round."""

    name: str
    value: float
    unit: str
    n: int  # measured runs
    low: float  # the least and the greatest of them
    high: float
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Without what is not there; numbers with five digits."""
        return {key: rounded(value) for key, value in asdict(self).items() if value not in (None, "")}


@dataclass(frozen=True, slots=True)
class Section:
    """Figures that belong into one table. `remarks` say how to read it. `series` are points (x, y) for a plot."""

    title: str
    figures: Sequence[Figure]
    remarks: Sequence[str] = ()
    series: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)


def alone(name: str, unit: str, values: Sequence[float], note: str = "") -> Figure:
    """The median of `values`."""
    return Figure(name, statistics.median(values), unit, len(values), min(values), max(values), note=note)


def beside(
    name: str, unit: str, values: Sequence[float], peer: str, peer_values: Sequence[float], note: str = ""
) -> Figure:
    """The median of `values` beside the peer's of the same rounds."""
    return Figure(
        name,
        statistics.median(values),
        unit,
        len(values),
        min(values),
        max(values),
        peer,
        statistics.median(peer_values),
        median_ratio(values, peer_values),
        note,
    )


def show(section: Section, console: Console) -> None:
    table = Table("", "median", "range", "unit", "peer", "peer's", "ratio", "runs", title=section.title)
    for column in (1, 2, 5, 6, 7):
        table.columns[column].justify = "right"
    for figure in section.figures:
        table.add_row(*_cells(figure))
    console.print(table)
    for remark in [*section.remarks, *(f"{f.name}: {f.note}" for f in section.figures if f.note)]:
        console.print(f"  {remark}", highlight=False, markup=False, soft_wrap=True)


def json_lines(sections: Iterable[Section]) -> list[str]:
    """One line for each figure."""
    return [json.dumps(figure.to_json()) for section in sections for figure in section.figures]


def write(
    path: Path,
    sections: Sequence[Section],
    *,
    quick: bool,
    load_before: float,
    first: bool = False,
    goals: Sequence[Mapping[str, Any]] = (),
) -> None:
    """The figures and the verdicts on `goals`, with what they were measured on. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {
        **surroundings(),
        "load_before": round(load_before, 2),
        "before_other_programs": first,
        "quick": quick,
        "figures": [f.to_json() for s in sections for f in s.figures],
        "goals": list(goals),
        "series": {
            section.title: {
                name: [[rounded(x), rounded(y)] for x, y in points] for name, points in section.series.items()
            }
            for section in sections
            if section.series
        },
    }
    path.write_text(json.dumps(data, indent=1) + "\n")


def surroundings() -> dict[str, Any]:
    """Date, machine and versions; no names of machines."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONED},
    }


def _cells(figure: Figure) -> list[str]:
    return [
        figure.name,
        number(figure.value),
        f"{number(figure.low)} - {number(figure.high)}",
        figure.unit,
        figure.peer or "",
        "" if figure.peer_value is None else number(figure.peer_value),
        "" if figure.ratio is None else f"{figure.ratio:.2f} x",
        str(figure.n),
    ]


def number(value: float) -> str:
    """Three digits, or all of them before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def rounded(value: Any) -> Any:
    """A float with five digits; whatever is no float as it is."""
    return float(f"{value:.5g}") if isinstance(value, float) else value
