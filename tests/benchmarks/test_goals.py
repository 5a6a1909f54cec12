"""Goals are judged by the figures that were measured, and only by those."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks import goals
from benchmarks.figures import FIGURES
from benchmarks.goals import GOALS, Goal, Verdict, judge
from benchmarks.report import Section, alone, beside

SMALL = Goal("small", "hop", "a", "<=", 1.5)
LARGE = Goal("large", "mixed", "b", ">=", 2.0)


def sections(ratio: float) -> list[Section]:
    """A figure for each of the two goals, both with this ratio."""
    return [Section(name, [beside(name, "ms", [ratio], "peer", [1.0])]) for name in ("a", "b")]


@given(st.floats(0.01, 100))
def test_a_goal_holds_up_to_its_bound_and_no_further(ratio: float) -> None:
    small, large = judge(sections(ratio), {"hop", "mixed"}, [SMALL, LARGE])
    assert small.holds is (ratio <= 1.5)
    assert large.holds is (ratio >= 2.0)


def test_the_bound_itself_holds() -> None:
    assert SMALL.holds(1.5)
    assert LARGE.holds(2.0)


def test_a_ratio_that_is_no_number_does_not_hold() -> None:
    assert not SMALL.holds(float("nan"))
    assert not LARGE.holds(float("nan"))


def test_a_verdict_as_json_has_name_ratio_goal_and_the_figure_behind_it() -> None:
    (verdict,) = judge(sections(3.0), {"mixed"}, [LARGE])
    assert verdict.to_json() == {
        "goal": "large", "measured": 3.0, "goal_ratio": ">= 2", "holds": True,
        "figure": "b", "value": 3.0, "unit": "ms", "peer": "peer", "peer_value": 1.0, "n": 1,
    }  # fmt: skip


def test_a_goal_whose_figure_is_missing_is_not_measured_and_never_holds() -> None:
    (verdict,) = judge([], {"hop"}, [SMALL, LARGE])
    assert verdict == Verdict(SMALL, None)
    facts = verdict.to_json()
    assert (facts["goal"], facts["measured"], facts["holds"]) == ("small", None, None)
    assert "not measured" in facts["note"]


def test_a_figure_without_a_peer_does_not_decide_a_goal() -> None:
    (verdict,) = judge([Section("", [alone("a", "ms", [1.0])])], {"hop"}, [SMALL])
    assert verdict.holds is None
    assert verdict.to_json()["measured"] is None


def test_goals_of_benchmarks_that_were_not_asked_for_are_left_out() -> None:
    assert [verdict.goal for verdict in judge(sections(1.0), {"hop"}, [SMALL, LARGE])] == [SMALL]


def test_the_table_says_what_holds_what_is_missed_and_what_is_not_measured() -> None:
    text = io.StringIO()
    other = Goal("other", "hop", "nothing", "<=", 1)
    goals.show(judge(sections(1.0), {"hop", "mixed"}, [SMALL, LARGE, other]), Console(file=text, width=140))
    rows = {row.split()[1]: row for row in text.getvalue().splitlines() if row.startswith("│")}
    assert "holds" in rows["small"]
    assert "MISSED" in rows["large"]
    assert "not measured" in rows["other"]


def test_goals_have_different_names_and_benchmarks_that_exist() -> None:
    assert len({goal.name for goal in GOALS}) == len(GOALS)
    assert set(goals.sources()) <= set(FIGURES)
