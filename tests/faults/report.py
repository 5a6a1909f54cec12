"""What a soak found, as a table for people and as one JSON line for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.faults.run import Result
from tests.faults.schedule import KINDS

BAD = ("wrong", "duplicated", "lost", "hung")


def to_json(seed: int, results: Sequence[Result]) -> dict[str, Any]:
    """Of all runs together, and of each."""
    return {
        "seed": seed,
        "generations": sum(len(result.outcomes) for result in results),
        "faults": sum(sum(result.injected.values()) for result in results),
        "complaints": [text for result in results for text in result.complaints],
        "runs": [_run(result) for result in results],
    }


def _run(result: Result) -> dict[str, Any]:
    gaps_s = _gaps(result)
    return {
        "stages": result.stages,
        "seconds": round(result.seconds, 1),
        "generations": len(result.outcomes),
        "verdicts": dict(result.verdicts),
        "attempts": sum(outcome.attempts for outcome in result.outcomes.values()),
        "injected": dict(sorted(result.injected.items())),
        "gap_s_p50": _percentile(gaps_s, 50),
        "gap_s_p99": _percentile(gaps_s, 99),
        "gap_s_max": _percentile(gaps_s, 100),
        "tokens_needed": result.needed_tokens,
        "tokens_computed": list(result.computed_tokens),
        "before": asdict(result.before),
        "after": asdict(result.after),
        "complaints": result.complaints,
    }


def show(results: Sequence[Result], console: Console) -> None:
    """A column for each run."""
    table = Table("", *(f"{result.stages} stages" for result in results), title="faults, and what became of answers")
    for column in table.columns[1:]:
        column.justify = "right"
    runs = [_run(result) for result in results]
    for kind in KINDS:
        table.add_row(kind, *(str(result.injected.get(kind, 0)) for result in results))
    table.add_section()
    _rows(table, runs, ("generations", "attempts"))
    for verdict in ("right", *BAD):
        table.add_row(verdict, *(str(result.verdicts.get(verdict, 0)) for result in results))
    table.add_section()
    _rows(table, runs, ("seconds", "gap_s_p50", "gap_s_p99", "gap_s_max"))
    for result_row in _recomputed(results):
        table.add_row(*result_row)
    table.add_section()
    for name in results[0].before.__dataclass_fields__ if results else ():
        label, cells = name.replace("_", " "), []
        for result in results:
            old, new = getattr(result.before, name), getattr(result.after, name)
            cells.append(f"{old >> 20} -> {new >> 20} MiB" if name.endswith("bytes") else f"{old} -> {new}")
        table.add_row(label.removesuffix(" bytes"), *cells)
    console.print(table)


def _rows(table: Table, runs: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    for name in names:
        table.add_row(name.replace("_", " "), *(str(run[name]) for run in runs))


def _recomputed(results: Sequence[Result]) -> list[list[str]]:
    """For each stage, the tokens that it computed beyond those needed once, in per cent of these."""
    rows = []
    for stage in range(max((result.stages for result in results), default=0)):
        cells = []
        for result in results:
            if stage < result.stages:
                more = result.computed_tokens[stage] / max(1, result.needed_tokens) - 1
                cells.append(f"{100 * more:.0f} %")
            else:
                cells.append("")
        rows.append([f"computed again, stage {stage}", *cells])
    return rows


def _gaps(result: Result) -> list[float]:
    return sorted(gap_s for outcome in result.outcomes.values() for gap_s in outcome.gaps_s)


def _percentile(values: Sequence[float], percent: int) -> float | None:
    """Nearest rank, of sorted values."""
    if not values:
        return None
    return round(values[max(0, -(-len(values) * percent // 100) - 1)], 3)
