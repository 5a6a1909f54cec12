"""Until when a stage keeps sequences that nobody touches. No I/O; the clock is given.

Whoever opens a sequence may be killed before it can release it. So a sequence is kept for a lease after each step and
each renewal, and then freed. Freeing one too early costs its owner a replay, never a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

Clock = Callable[[], float]  # seconds, monotonic


class Leases:
    """`lease_s` 0: nothing ever expires. `renew` may be called from another thread than the rest."""

    def __init__(self, lease_s: float, clock: Clock) -> None:
        self.lease_s = lease_s
        self._clock = clock
        self._touched_s: dict[int, float] = {}
        self._last_s = clock()

    def touch(self, sequences: Iterable[int]) -> None:
        """They are held, and in use now."""
        self._last_s = now_s = self._clock()
        self._touched_s.update(dict.fromkeys(sequences, now_s))

    def renew(self, sequences: Iterable[int]) -> list[int]:
        """Those held are in use now; returns those that are not held."""
        asked = list(sequences)
        known = [sequence for sequence in asked if sequence in self._touched_s]
        if known:
            self.touch(known)  # one that has gone in this moment is forgotten when it expires
        return [sequence for sequence in asked if sequence not in self._touched_s]

    def forget(self, sequences: Iterable[int]) -> None:
        for sequence in sequences:
            self._touched_s.pop(sequence, None)

    def expired(self) -> list[int]:
        """Those untouched for longer than the lease, in the order in which they were first held."""
        if not self.lease_s:
            return []
        before_s = self._clock() - self.lease_s
        return [sequence for sequence, touched_s in list(self._touched_s.items()) if touched_s < before_s]

    @property
    def quiet_s(self) -> float:
        """Seconds since any sequence was touched."""
        return self._clock() - self._last_s
