"""When a replica counts as hung: by what steps took, by the plan's figures, by what else is under way."""

from __future__ import annotations

import pytest

from orchestrator.deadlines import FACTOR, Deadlines

FLOOR_S, MOST_S = 2.0, 120.0


def limit_s(deadlines: Deadlines, tokens: int, now_s: float = 0.0, stage: int = 0) -> float:
    return deadlines.limit_s(stage, tokens, now_s, FLOOR_S, MOST_S)


def test_nothing_known_is_the_longest_limit() -> None:
    assert limit_s(Deadlines(2), 1) == MOST_S


def test_short_steps_get_the_floor_and_long_ones_a_multiple() -> None:
    deadlines = Deadlines(1)
    deadlines.observe(0, 1, 0.01)
    deadlines.observe(0, 512, 1.5)
    assert limit_s(deadlines, 1) == FLOOR_S
    assert limit_s(deadlines, 512) == FACTOR * 1.5


def test_a_stage_learns_nothing_from_another() -> None:
    deadlines = Deadlines(2)
    deadlines.observe(0, 1, 0.01)
    assert limit_s(deadlines, 1, stage=1) == MOST_S


def test_the_slowest_of_late_counts_and_is_forgotten_little_by_little() -> None:
    deadlines = Deadlines(1)
    deadlines.observe(0, 1, 4.0)
    deadlines.observe(0, 1, 1.0)
    assert 3.5 < (deadlines.expected_s(0, 1) or 0) < 4.0
    for _ in range(200):
        deadlines.observe(0, 1, 1.0)
    assert deadlines.expected_s(0, 1) == pytest.approx(1.0, rel=0.01)


def test_steps_of_other_sizes_bound_what_is_expected() -> None:
    deadlines = Deadlines(1)
    deadlines.observe(0, 64, 0.5)
    assert deadlines.expected_s(0, 1) == 0.5, "a larger step takes no less"
    assert (deadlines.expected_s(0, 512) or 0) >= 512 / 64 * 0.5, "nor a smaller one for each token"


def test_the_plans_figures_count_until_steps_of_that_size_were_seen() -> None:
    deadlines = Deadlines(2, [((1, 0.3), (8, 0.5), (512, 4.0)), ()])
    assert deadlines.expected_s(0, 1) == 0.3
    assert deadlines.expected_s(0, 5) == 0.5
    assert deadlines.expected_s(0, 1024) == 8.0
    assert deadlines.expected_s(1, 1) is None
    deadlines.observe(0, 1, 0.1)
    assert deadlines.expected_s(0, 1) == 0.1


def test_what_is_under_way_may_come_before() -> None:
    deadlines = Deadlines(2)
    deadlines.observe(0, 1, 0.1)
    deadlines.observe(1, 512, 3.0)
    with deadlines.under_way(1, 512):
        assert limit_s(deadlines, 1) == pytest.approx(FACTOR * 3.1)
    assert limit_s(deadlines, 1) == FLOOR_S


def test_an_alarm_makes_patient_for_some_time_and_a_right_one_does_not() -> None:
    deadlines = Deadlines(2)
    for stage in (0, 1):
        deadlines.observe(stage, 1, 0.01)
    deadlines.alarm(0, 100.0)
    assert limit_s(deadlines, 1, 101.0) == 2 * FLOOR_S
    deadlines.alarm(0, 101.0)
    assert limit_s(deadlines, 1, 102.0) == 4 * FLOOR_S
    assert limit_s(deadlines, 1, 102.0, stage=1) == FLOOR_S
    deadlines.confirm(0, 103.0)
    assert limit_s(deadlines, 1, 103.0) == 2 * FLOOR_S
    assert limit_s(deadlines, 1, 500.0) == FLOOR_S


def test_many_alarms_stay_below_the_longest_limit() -> None:
    deadlines = Deadlines(1)
    deadlines.observe(0, 1, 1.0)
    for _ in range(50):
        deadlines.alarm(0, 0.0)
    assert limit_s(deadlines, 1) == MOST_S
