"""The goals for speed as data, and whether measured figures hold them. Pure: no process is started here.

Every goal is about the ratio of one figure, which was measured beside a peer, round by round (`Figure.ratio`). One
whose figure was not measured is said to be not measured; it never holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks.report import Figure, Section, number, rounded

Comparison = Literal["<=", ">="]


@dataclass(frozen=True, slots=True)
class Goal:
    """`source` is the benchmark (a key of `FIGURES`) that measures `figure`, whose ratio must compare to `bound`."""

    name: str
    source: str
    figure: str
    comparison: Comparison
    bound: float

    @property
    def wanted(self) -> str:
        return f"{self.comparison} {self.bound:g}"

    def holds(self, ratio: float) -> bool:
        """False for a ratio that is not a number."""
        return ratio <= self.bound if self.comparison == "<=" else ratio >= self.bound


GOALS = (
    Goal("hop, 10 KB, p50", "hop", "hop 10 KB p50", "<=", 1.5),
    Goal("hop, 16 MB, p50", "hop", "hop 16 MB p50", "<=", 1.2),
    Goal("time per token, 2 stages", "latency", "82M, 2 stages, 2 threads each", "<=", 1.0),
    Goal("time per token, 4 stages", "latency", "82M, 4 stages, 2 threads each", "<=", 1.1),
    Goal("tokens/s, 8 at once", "throughput", "8 at once", ">=", 1.0),
    Goal("tokens/s, 32 at once", "throughput", "32 at once", ">=", 1.3),
    Goal("tokens/s, 64 at once", "throughput", "64 at once", ">=", 1.6),
    Goal("tokens/s, 64 at once, over the floor", "throughput", "64 at once, beside the floor", ">=", 0.75),
    Goal("orchestrator's share of CPU time", "throughput", "64 at once over HTTP, CPU of the orchestrator", "<=", 0.05),
    Goal("goodput, mixed lengths", "mixed", "mixed lengths", ">=", 2.0),
    Goal("KV cache, set aside over filled", "mixed", "mixed lengths, KV cache set aside", "<=", 1.1),
    Goal("first token, 1,500 tokens in chunks", "prefill", "first token of 1,500, chunked", "<=", 0.65),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`figure` None: not measured."""

    goal: Goal
    figure: Figure | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.figure is None else self.figure.ratio

    @property
    def holds(self) -> bool | None:
        """None where nothing was measured."""
        return None if self.ratio is None else self.goal.holds(self.ratio)

    @property
    def in_words(self) -> str:
        return {None: "not measured", True: "holds", False: "MISSED"}[self.holds]

    def to_json(self) -> dict[str, Any]:
        """name, measured ratio, goal, holds; and the figure behind it."""
        facts: dict[str, Any] = {
            "goal": self.goal.name,
            "measured": rounded(self.ratio),
            "goal_ratio": self.goal.wanted,
            "holds": self.holds,
        }
        if self.holds is None:
            return facts | {"note": f"not measured: no figure {self.goal.figure!r} with a peer's value"}
        assert self.figure is not None  # or there would be no ratio
        shown = self.figure.to_json()
        facts |= {"figure": shown["name"]}
        return facts | {key: shown[key] for key in _SHOWN if key in shown}


_SHOWN = ("value", "unit", "peer", "peer_value", "n", "note")


def sources(goals: Iterable[Goal] = GOALS) -> list[str]:
    """The benchmarks that the goals need, each once."""
    return list(dict.fromkeys(goal.source for goal in goals))


def judge(sections: Iterable[Section], measured: Collection[str], goals: Iterable[Goal] = GOALS) -> list[Verdict]:
    """One verdict for each goal of the benchmarks in `measured` (also of those that failed)."""
    found: Mapping[str, Figure] = {figure.name: figure for section in sections for figure in section.figures}
    return [Verdict(goal, found.get(goal.figure)) for goal in goals if goal.source in measured]


def show(verdicts: Sequence[Verdict], console: Console) -> None:
    table = Table("goal", "measured", "wanted", "", "ours", "peer", "peer's", title="Goals")
    for column in (1, 2, 4, 6):
        table.columns[column].justify = "right"
    for verdict in verdicts:
        table.add_row(*_cells(verdict))
    console.print(table)


def _cells(verdict: Verdict) -> list[str]:
    goal, figure = verdict.goal, verdict.figure
    if figure is None or verdict.ratio is None:
        return [goal.name, "", f"{goal.wanted} x", verdict.in_words, "", "", ""]
    return [
        goal.name,
        f"{verdict.ratio:.3g} x",
        f"{goal.wanted} x",
        verdict.in_words,
        f"{number(figure.value)} {figure.unit}",
        figure.peer or "",
        "" if figure.peer_value is None else number(figure.peer_value),
    ]
