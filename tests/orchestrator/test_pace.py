"""How long what waits will take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.pace import RETRY_AFTER_S_MAX, RETRY_AFTER_S_UNKNOWN, Pace, retry_after_s


def working(tokens_per_s: int, seconds: int, pace: Pace | None = None, begin_s: float = 0.0) -> Pace:
    """After some time of steps, ten a second."""
    pace = pace or Pace()
    pace.begin(begin_s)
    for step in range(1, 10 * seconds + 1):
        pace.worked(tokens_per_s // 10, begin_s + step / 10)
    return pace


def test_nothing_is_known_at_first() -> None:
    pace = Pace()
    pace.begin(0)
    assert pace.takes_s(10, 10) is None
    pace.worked(10, 0.5)
    assert pace.takes_s(10, 10) is None


def test_work_takes_its_tokens_through_the_speed() -> None:
    assert working(200, 5).takes_s(300, 700) == pytest.approx(5)


def test_the_speed_of_late_counts() -> None:
    pace = working(500, 60, working(100, 60), begin_s=60)
    assert pace.tokens_per_s == pytest.approx(500, rel=0.01)


def test_rest_is_no_slowness() -> None:
    pace = working(200, 5)
    pace.rest()
    pace.worked(7, 6)  # of nobody's work
    working(200, 1, pace, begin_s=1000)
    assert pace.tokens_per_s == pytest.approx(200)


def test_answers_that_end_early_take_less() -> None:
    pace = working(100, 5)
    for _ in range(200):
        pace.ended(25, 100)
    assert pace.takes_s(0, 1000) == pytest.approx(2.5, rel=0.01)
    assert pace.takes_s(1000, 0) == pytest.approx(10)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.floats(0, 1000)), max_size=50))
def test_an_estimate_is_never_negative(steps: list[tuple[int, float]]) -> None:
    pace, now_s = Pace(), 0.0
    pace.begin(now_s)
    for tokens, passed_s in steps:
        now_s += passed_s
        pace.worked(tokens, now_s)
        assert (pace.takes_s(1, 1) or 0) >= 0


@pytest.mark.parametrize(
    ("wait_s", "told_s"),
    [(None, RETRY_AFTER_S_UNKNOWN), (0, 1), (0.2, 1), (1.2, 2), (59.5, 60), (1e9, RETRY_AFTER_S_MAX)],
)
def test_clients_are_told_whole_seconds_within_bounds(wait_s: float | None, told_s: int) -> None:
    assert retry_after_s(wait_s) == told_s
