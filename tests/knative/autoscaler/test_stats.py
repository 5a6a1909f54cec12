"""Averages of requests in flight beside the integral computed request by request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knative.autoscaler.stats import ActivatorStats, RequestStats

T0_S = 1_700_000_000.0

spans = st.lists(st.tuples(st.integers(0, 5_000), st.integers(0, 5_000), st.booleans()), max_size=30)
"""Requests: when they come in and how long they stay (ms), and whether through an activator."""


def overlap_s(spans: list[tuple[int, int, bool]], start: int, end: int) -> float:
    return sum(max(0, min(begin + length, end) - max(begin, start)) for begin, length, _ in spans) / 1000


@given(spans=spans)
def test_reports_equal_the_integral_of_requests_in_flight(spans: list[tuple[int, int, bool]]) -> None:
    stats = RequestStats(T0_S)
    events = [(begin, 1, proxied) for begin, _, proxied in spans]
    events += [(begin + length, 2, proxied) for begin, length, proxied in spans]
    events += [(second * 1000, 0, False) for second in range(1, 11)]
    for at_ms, kind, proxied in sorted(events):
        now_s = T0_S + at_ms / 1000
        if kind == 1:
            stats.request_in(now_s, proxied)
        elif kind == 2:
            stats.request_out(now_s, proxied)
        else:
            report = stats.report(now_s)
            came = [span for span in spans if at_ms - 1000 <= span[0] < at_ms]
            assert report.seconds == pytest.approx(1, abs=1e-5)
            assert report.concurrency == pytest.approx(overlap_s(spans, at_ms - 1000, at_ms), abs=1e-5)
            through = [span for span in spans if span[2]]
            assert report.proxied_concurrency == pytest.approx(overlap_s(through, at_ms - 1000, at_ms), abs=1e-5)
            assert report.requests == len(came)
            assert report.proxied_requests == sum(span[2] for span in came)
    assert stats.in_flight == 0


def test_report_right_after_a_report_is_all_zero_and_loses_no_request() -> None:
    stats = RequestStats(T0_S)
    stats.request_in(T0_S, False)
    assert stats.report(T0_S).requests == 1
    again = stats.report(T0_S)
    assert (again.concurrency, again.requests, again.seconds) == (0, 0, 0)
    assert stats.report(T0_S + 2).concurrency == 1


def test_a_clock_that_steps_back_counts_as_no_time() -> None:
    stats = RequestStats(T0_S)
    stats.request_in(T0_S + 1, False)
    stats.request_in(T0_S, False)
    assert stats.report(T0_S + 2).concurrency == 1  # 0 for one second, 2 for one second


def test_activator_tells_the_first_request_at_once_and_not_twice() -> None:
    stats = ActivatorStats()
    assert stats.request_in(T0_S) == 1.0
    assert stats.request_in(T0_S) is None
    first = stats.report(T0_S + 1)
    assert first is not None
    assert (first.concurrency, first.requests) == (1.0, 1.0)
    second = stats.report(T0_S + 2)
    assert second is not None
    assert (second.concurrency, second.requests) == (2.0, 0.0)


def test_activator_never_tells_less_than_nothing() -> None:
    stats = ActivatorStats()
    stats.request_in(T0_S)
    stats.request_out(T0_S + 0.25)
    report = stats.report(T0_S + 1)
    assert report is not None
    assert (report.concurrency, report.requests) == (0.0, 0.0)


def test_activator_is_silent_after_a_quiet_period_and_then_tells_at_once_again() -> None:
    stats = ActivatorStats()
    stats.request_in(T0_S)
    stats.request_out(T0_S + 0.5)
    assert stats.report(T0_S + 1) is not None
    assert stats.request_in(T0_S + 1.5) is None, "still in the period after the last activity"
    stats.request_out(T0_S + 1.5)
    quiet = stats.report(T0_S + 2)
    assert quiet is not None
    assert quiet.concurrency == 0
    assert stats.report(T0_S + 3) is None
    assert stats.request_in(T0_S + 4) == 1.0


def test_activator_keeps_counting_a_request_that_arrived_at_the_very_report() -> None:
    stats = ActivatorStats()
    stats.request_in(T0_S)
    stats.report(T0_S)
    later = stats.report(T0_S + 1)
    assert later is not None
    assert later.concurrency == 1
