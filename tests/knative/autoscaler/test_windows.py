"""Bucketed windows beside a naive one that keeps every second in a dictionary."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knative.autoscaler.windows import BucketedWindow


class NaiveWindow:
    """Follows the written rules with a dictionary in place of a ring."""

    def __init__(self, size: int) -> None:
        self.size, self.seconds = size, dict[int, float]()
        self.first: int | None = None
        self.last: int | None = None

    def record(self, second: int, value: float) -> None:
        if self.last is not None and second != self.last and second + self.size <= self.last:
            return
        if self.last is None or second - self.last >= self.size:
            self.seconds, self.first = {}, second
        assert self.first is not None
        self.first = min(self.first, second)
        self.last = second if self.last is None else max(self.last, second)
        self.seconds[second] = self.seconds.get(second, 0.0) + value

    def average(self, now: int) -> float:
        if self.last is None or self.first is None or now - self.last >= self.size:
            return 0.0
        covered = range(max(now, self.last) - self.size + 1, self.last + 1)
        count = min(self.last - self.first + 1, self.size - max(now - self.last, 0))
        return sum(self.seconds.get(second, 0.0) for second in covered) / count

    def weighted(self, now: int) -> float:
        if self.last is None or now - self.last > self.size:
            return 0.0
        a = max(0.2, 1 - 0.0001 ** (1 / self.size))
        late = max(now - self.last, 0)
        ages = range(self.size - late)
        return math.fsum(self.seconds.get(self.last - i, 0.0) * a * (1 - a) ** (late + i) for i in ages)


steps = st.lists(
    st.tuples(st.integers(-15, 25), st.floats(0, 1e4), st.integers(-3, 25)),
    max_size=60,
)
"""Each: seconds from the newest sample so far to this one, its value, seconds from then to the look."""


@given(size=st.integers(1, 20), steps=steps)
def test_window_agrees_with_a_naive_one(size: int, steps: list[tuple[int, float, int]]) -> None:
    window, naive, newest = BucketedWindow(size), NaiveWindow(size), 1_000
    for ahead, value, look in steps:
        second = newest + ahead
        newest = max(newest, second)
        window.record(second + 0.75, value)
        naive.record(second, value)
        now = newest + look
        assert window.average(now + 0.5) == pytest.approx(naive.average(now), abs=1e-6)
        assert window.weighted_average(now) == pytest.approx(naive.weighted(now), rel=1e-9, abs=1e-300)
        assert window.is_empty(now) == (naive.last is None or now - naive.last > size)


@given(value=st.floats(0, 1e6))
def test_average_is_rounded_to_six_decimals_with_halves_up(value: float) -> None:
    window = BucketedWindow(6)
    window.record(10, value)
    # the product is rounded to double precision before its halves are looked at
    wanted = Decimal(value * 1e6).quantize(Decimal(1), rounding=ROUND_HALF_UP)
    assert window.average(10) == float(wanted) / 1e6


def test_new_window_is_empty_and_averages_to_zero() -> None:
    window = BucketedWindow(6)
    assert window.is_empty(0)
    assert window.average(0) == window.weighted_average(0) == 0


def test_filling_window_is_not_diluted() -> None:
    window = BucketedWindow(60)
    window.record(100, 4)
    window.record(101, 8)
    assert window.average(101) == 6


def test_samples_of_one_second_add_up() -> None:
    window = BucketedWindow(60)
    window.record(100.1, 4)
    window.record(100.9, 8)
    assert window.average(100) == 12


def test_silence_leads_to_zero_then_to_no_data() -> None:
    window = BucketedWindow(6)
    for second in range(6):
        window.record(second, 3)
    assert window.average(10) == 3  # only the newest second is left
    assert window.average(11) == 0
    assert not window.is_empty(11)
    assert window.is_empty(12)


@given(values=st.lists(st.floats(0, 1e4), min_size=1, max_size=30), old=st.integers(1, 40), new=st.integers(1, 40))
def test_resized_window_averages_what_both_lengths_cover(values: list[float], old: int, new: int) -> None:
    window = BucketedWindow(old)
    for second, value in enumerate(values):
        window.record(second, value)
    window.resize(new)
    kept = values[-min(old, new) :]
    assert window.average(len(values) - 1) == pytest.approx(sum(kept) / len(kept), abs=1e-6)
    window.record(len(values), 5.0)
    kept = [*kept, 5.0][-new:]
    assert window.average(len(values)) == pytest.approx(sum(kept) / len(kept), abs=1e-6)


def test_resized_window_weighs_by_its_new_length() -> None:
    window = BucketedWindow(600)
    window.resize(6)
    window.record(10, 1.0)
    assert window.weighted_average(10) == pytest.approx(1 - 0.0001 ** (1 / 6), rel=1e-12)
