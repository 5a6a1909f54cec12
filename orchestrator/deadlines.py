"""How long a replica may take for a step before it counts as hung. No I/O and no clock: times are given.

What a step takes is expected from what steps of its size have taken lately, waiting and way included; before there were
any, from the stage's profile in the plan. A replica counts as hung after ten times that, and what is under way in the
chain just now may all come before it. Nothing is known at first: then the limit is the one of the settings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from orchestrator.step_times import StepTimes

FACTOR = 10  # times what is expected
_FORGET = 0.05  # of the way from the slowest hop remembered to the latest one
_DOUBT_MAX = 16.0
_DOUBT_HALVES_S = 60.0


class Deadlines:
    """`profiles` gives the figures of each stage, none where there are none."""

    def __init__(self, stages: int, profiles: Sequence[StepTimes] = ()) -> None:
        self._profiles = tuple(profiles) or ((),) * stages
        self._slowest: list[dict[int, float]] = [{} for _ in range(stages)]  # by the bits of the number of tokens
        self._doubts = [_Doubt() for _ in range(stages)]
        self._under_way_s = 0.0

    def limit_s(self, stage: int, tokens: int, now_s: float, floor_s: float, most_s: float) -> float:
        """For a step that is about to be sent: between `floor_s` and `most_s`, and `most_s` if nothing is known."""
        expected_s = self.expected_s(stage, tokens)
        if expected_s is None:
            return most_s
        limit_s = max(floor_s, FACTOR * (expected_s + self._under_way_s))
        return min(most_s, limit_s * self._doubts[stage].factor(now_s))

    @contextlib.contextmanager
    def under_way(self, stage: int, tokens: int) -> Iterator[None]:
        """Around a hop: others may have to wait for it."""
        expected_s = self.expected_s(stage, tokens) or 0.0
        self._under_way_s += expected_s
        try:
            yield
        finally:
            self._under_way_s -= expected_s

    def observe(self, stage: int, tokens: int, took_s: float) -> None:
        """A replica has answered a step."""
        slowest, size = self._slowest[stage], tokens.bit_length()
        before_s = slowest.get(size, took_s)
        slowest[size] = max(took_s, before_s + (took_s - before_s) * _FORGET)

    def alarm(self, stage: int, now_s: float) -> None:
        """A replica has passed its limit. It may only be busy, so the next limits are longer for some time."""
        self._doubts[stage].grow(now_s)

    def confirm(self, stage: int, now_s: float) -> None:
        """The alarm was right, as far as one can tell: another replica has answered instead."""
        self._doubts[stage].shrink(now_s)

    def expected_s(self, stage: int, tokens: int) -> float | None:
        """None if nothing is known."""
        slowest, size = self._slowest[stage], tokens.bit_length()
        if size in slowest:
            return slowest[size]
        known = [bound for bound in (_seen(slowest, size), _profiled(self._profiles[stage], tokens)) if bound]
        return max(known, default=None)


class _Doubt:
    """A factor that grows with alarms and goes back with time."""

    def __init__(self) -> None:
        self._factor, self._since_s = 1.0, 0.0

    def factor(self, now_s: float) -> float:
        halvings = int((now_s - self._since_s) / _DOUBT_HALVES_S) if self._factor > 1 else 0
        if halvings:
            self._factor = max(1.0, self._factor / 2.0 ** min(halvings, 64))
            self._since_s += halvings * _DOUBT_HALVES_S
        return self._factor

    def grow(self, now_s: float) -> None:
        self._factor, self._since_s = min(_DOUBT_MAX, 2 * self.factor(now_s)), now_s

    def shrink(self, now_s: float) -> None:
        self._factor = max(1.0, self.factor(now_s) / 2)


def _seen(slowest: dict[int, float], size: int) -> float | None:
    """From steps of other sizes: a larger one takes no less, and a smaller one no less for each of its tokens."""
    larger = [known for known in slowest if known > size]
    if larger:
        return slowest[min(larger)]
    return slowest[max(slowest)] * 2.0 ** (size + 1 - max(slowest)) if slowest else None


def _profiled(timings: StepTimes, tokens: int) -> float | None:
    if not timings:
        return None
    for width, took_s in timings:
        if width >= tokens:
            return took_s
    width, took_s = timings[-1]
    return took_s * tokens / width
