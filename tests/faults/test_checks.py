"""The soak finds what it looks for: each kind of wrong answer, and whatever is left behind."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.faults.client import Expected, Verdict, verdict
from tests.faults.residue import RSS_GROWTH_BYTES_MAX, Usage, complaints

EXPECTED = Expected((5, 6, 7, 8, 9), "text")
USAGE = Usage(100 << 20, 20, 5, 30, 300 << 20, 8, 6)


@pytest.mark.parametrize(
    ("tokens", "text", "said"),
    [
        ((5, 6, 7, 8, 9), "text", "right"),
        ((5, 6, 7, 8, 9), "texT", "wrong"),
        ((5, 6, 7, 8), "text", "wrong"),
        ((), "", "wrong"),
        ((5, 6, 8, 9), "text", "wrong"),
        ((5, 6, 1, 8, 9), "text", "wrong"),
        ((5, 6, 6, 7, 8, 9), "text", "duplicated"),
        ((5, 6, 7, 6, 7, 8, 9), "text", "duplicated"),
        ((5, 6, 7, 8, 9, 9), "text", "duplicated"),
    ],
)
def test_an_answer_is_judged_token_by_token(tokens: tuple[int, ...], text: str, said: Verdict) -> None:
    assert verdict(tokens, text, EXPECTED)[0] == said


def test_a_run_that_leaves_nothing_behind_has_no_complaint() -> None:
    assert complaints(USAGE, replace(USAGE, stage_sockets=12, orchestrator_tasks=28), {}, replicas=4) == []


@pytest.mark.parametrize(
    ("after", "held", "word"),
    [
        (USAGE, {"stage-1-replica-3": 2}, "stage-1-replica-3: 2"),
        (replace(USAGE, stage_rss_bytes=USAGE.stage_rss_bytes + RSS_GROWTH_BYTES_MAX + 1), {}, "memory of the stage"),
        (replace(USAGE, orchestrator_sockets=200), {}, "sockets of the orchestrator"),
        (replace(USAGE, stage_threads=60), {}, "threads of the stage"),
        (replace(USAGE, orchestrator_tasks=40), {}, "tasks of the orchestrator"),
    ],
)
def test_what_is_left_behind_is_complained_of(after: Usage, held: dict[str, int], word: str) -> None:
    (complaint,) = complaints(USAGE, after, held, replicas=4)
    assert word in complaint
