"""Recorded request lengths and arrivals, scaled down to what a small model can do on two cores.

The traces lie beside the checkout, in ../shared/traces; their README says where they come from.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmarks.bench import ROOT, MeasureError

EXCERPTS = ROOT.parent / "shared" / "traces" / "excerpts"


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes, seconds after the first one, and its lengths in tokens."""

    at_s: float
    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Scale:
    """Lengths are divided (rounded up) and cut off at their maximum; all requests come within `span_s` seconds."""

    prompt_by: int
    prompt_max: int
    output_by: int
    output_max: int
    span_s: float

    def apply(self, arrivals: Iterable[Arrival]) -> list[Arrival]:
        arrivals = list(arrivals)
        first_s, last_s = arrivals[0].at_s, arrivals[-1].at_s
        pressed = self.span_s / (last_s - first_s) if last_s > first_s else 0.0
        return [
            Arrival(
                (one.at_s - first_s) * pressed,
                min(-(-one.prompt // self.prompt_by), self.prompt_max),
                min(-(-one.output // self.output_by), self.output_max),
            )
            for one in arrivals
        ]


def excerpt(name: str, count: int, folder: Path = EXCERPTS) -> list[Arrival]:
    """The first `count` requests of a trace. Raises MeasureError where it is not there."""
    path = folder / f"{name}.csv.gz"
    if not path.is_file():
        raise MeasureError(f"there is no trace {path.name} in {path.parent}; it is not a part of this repository")
    with gzip.open(path, "rt", newline="") as stream:
        rows = islice(csv.DictReader(stream), count)
        return [Arrival(float(r["arrival_s"]), int(r["prompt_tokens"]), int(r["output_tokens"])) for r in rows]
