"""Durations that nobody would write."""

from __future__ import annotations

import pytest

from knative.autoscaler.durations import parse_duration_s


def test_many_terms_that_are_no_duration_are_refused_at_once() -> None:
    """By a pattern that tries every way to split the digits it would take longer than the test may."""
    with pytest.raises(ValueError, match="invalid duration"):
        parse_duration_s("60s" * 300 + "x")


@pytest.mark.parametrize(
    ("text", "seconds"), [("1m30s", 90), ("-0.5s", -0.5), ("1.s", 1), (".5h", 1800), ("1ms", 0.001)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds
