"""Samples of the last seconds in buckets of one second, and their averages.

After knative/serving pkg/autoscaler/aggregation/bucketing.go. Times are Unix seconds, cut to whole ones.
"""

from __future__ import annotations

import math

SMOOTHING_MIN = 0.2
"""Least weight of the newest second in the weighted average."""

WINDOW_WEIGHT = 0.9999
"""Share of all weight that falls within the window."""


class BucketedWindow:
    """A ring of one bucket per second; samples of one second add up.

    `_first` and `_last` are the seconds of the first and the newest sample that the window still answers for.
    """

    def __init__(self, size_s: int) -> None:
        self._buckets = [0.0] * size_s
        self._first = self._last = 0
        self._started = False
        self._smoothing = _smoothing(size_s)

    @property
    def size_s(self) -> int:
        return len(self._buckets)

    def record(self, at_s: float, value: float) -> None:
        """Adds `value` to its second; a sample older than the window is dropped."""
        second, size = int(at_s), self.size_s
        if not self._started or second - self._last >= size:
            self._restart(second)
        elif second + size <= self._last:
            return
        for skipped in range(self._last + 1, second + 1):
            self._buckets[skipped % size] = 0.0
        self._first = min(self._first, second)
        self._last = max(self._last, second)
        self._buckets[second % size] += value

    def _restart(self, second: int) -> None:
        self._buckets = [0.0] * self.size_s
        self._first = self._last = second
        self._started = True

    def is_empty(self, now_s: float) -> bool:
        """Whether there is nothing to average: no sample yet, or none for more than the window's length."""
        return not self._started or int(now_s) - self._last > self.size_s

    def average(self, now_s: float) -> float:
        """Mean per second, to 6 decimals; 0 if empty.

        Only seconds since the first sample count, so a filling window is not diluted; and seconds after the
        newest sample are no zeros, they shorten the window from its old end.
        """
        ahead = max(int(now_s) - self._last, 0)
        if self.is_empty(now_s) or ahead >= self.size_s:
            return 0.0
        seconds = self.size_s - ahead
        total = sum(self._buckets[second % self.size_s] for second in range(self._last - seconds + 1, self._last + 1))
        return _round6(total / min(self._last - self._first + 1, seconds))

    def weighted_average(self, now_s: float) -> float:
        """Exponentially weighted sum, newest second heaviest; 0 if empty. Not normalised, seconds without samples
        count as zeros."""
        if self.is_empty(now_s):
            return 0.0
        ahead = max(int(now_s) - self._last, 0)
        weight = self._smoothing * (1 - self._smoothing) ** ahead
        total = 0.0
        for age in range(self.size_s - ahead):
            total += self._buckets[(self._last - age) % self.size_s] * weight
            weight *= 1 - self._smoothing
        return total

    def resize(self, size_s: int) -> None:
        """Another length from now on; samples that both lengths cover stay."""
        old = self._buckets
        if size_s == len(old):
            return
        self._buckets = [0.0] * size_s
        self._smoothing = _smoothing(size_s)
        kept = min(size_s, len(old))
        for second in range(self._last - kept + 1, self._last + 1):
            self._buckets[second % size_s] = old[second % len(old)]
        # what lies before is not known any more, so it must not count as zeros
        self._first = max(self._first, self._last - kept + 1)


def _smoothing(size_s: int) -> float:
    return max(SMOOTHING_MIN, 1.0 - math.pow(1.0 - WINDOW_WEIGHT, 1.0 / size_s))


def _round6(value: float) -> float:
    """To 6 decimals, halves away from zero (Python rounds them to even)."""
    scaled = abs(value) * 1e6
    whole = math.floor(scaled)
    rounded = (whole + 1 if scaled - whole >= 0.5 else whole) / 1e6
    return math.copysign(rounded, value)
