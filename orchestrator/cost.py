"""What a stage takes: counted from the headers of its checkpoint (`Cost`), or measured (`StageProfile`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import date
from itertools import pairwise

COUNT_MAX = 10**18  # of bytes, parameters and FLOPs: more than any model has, and exact in every reader of YAML
WIDTH_MAX = 1_000_000  # sequences or tokens of one step
SECONDS_MIN, SECONDS_MAX = 1e-9, 1e6

Timings = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a part of a model takes. FLOPs count two for each parameter that a token meets.

    Raises ValueError for a negative count."""

    parameters: int = 0
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    flops_per_token: int = 0

    def __post_init__(self) -> None:
        _check_counts(self)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters,
            self.weight_bytes + other.weight_bytes,
            self.kv_bytes_per_token + other.kv_bytes_per_token,
            self.flops_per_token + other.flops_per_token,
        )


@dataclass(frozen=True, slots=True)
class StageProfile:
    """What a stage took on one machine. Raises ValueError that names the field and what is allowed.

    `decode_s` pairs the sequences in a step, one token each, with the median seconds of such a step; `prefill_s` the
    tokens of one prompt in a step with the same. Both grow in their first numbers. `device` is for people, such as
    "cpu, 2 threads"; `measured` is the day, such as 2026-11-24. `load_s` is the time from the start of the process to
    its answer to a wake, `memory_bytes` the peak of its memory on the host, `device_memory_bytes` that on an
    accelerator."""

    device: str
    dtype: str
    measured: str
    load_s: float
    decode_s: Timings
    prefill_s: Timings
    memory_bytes: int
    device_memory_bytes: int = 0

    def __post_init__(self) -> None:
        _check_counts(self)
        for name, text in (("device", self.device), ("dtype", self.dtype)):
            if not text.strip() or not text.isprintable():
                raise ValueError(f"{name} must be text that can be printed, at least one character, got {text!r}")
        for problem in (
            day_problem(self.measured),
            seconds_problem("load_s", self.load_s),
            timings_problem("decode_s", self.decode_s),
            timings_problem("prefill_s", self.prefill_s),
        ):
            if problem:
                raise ValueError(problem)


def day_problem(text: str) -> str | None:
    """What is wrong with a day, None if nothing."""
    try:
        if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            date.fromisoformat(text)
            return None
    except ValueError:
        pass
    return f"measured must be a day such as 2026-11-24, got {text!r}"


def seconds_problem(what: str, value: float) -> str | None:
    """What is wrong with a duration, None if nothing."""
    if SECONDS_MIN <= value <= SECONDS_MAX:  # false for NaN
        return None
    return f"{what} must be above 0 s and at most {SECONDS_MAX:,.0f} s, got {value:g}"


def timings_problem(what: str, timings: Sequence[tuple[int, float]]) -> str | None:
    """What is wrong with the durations of steps by width, None if nothing."""
    widths = [width for width, _ in timings]
    if not widths:
        return f"{what} is empty; it has at least one width and its duration"
    for width, duration_s in timings:
        if not 1 <= width <= WIDTH_MAX:
            return f"{what}: a width is a whole number in 1..{WIDTH_MAX}, got {width}"
        if problem := seconds_problem(f"{what} at {width}", duration_s):
            return problem
    for before, width in pairwise(widths):
        if width <= before:
            return f"{what}: widths must grow, {width} stands after {before}"
    return None


def _check_counts(figures: Cost | StageProfile) -> None:
    for field in fields(figures):
        value = getattr(figures, field.name)
        if isinstance(value, int) and not 0 <= value <= COUNT_MAX:
            raise ValueError(f"{field.name} must be a whole number in 0..{COUNT_MAX}, got {value}")
