"""How fast the chain works, and so how long what waits in front of a request will take. No I/O and no clock.

Work is counted in tokens, those of prompts and those of answers alike. Their costs differ, so an estimate is right as
long as what waits is such a mix as was computed lately; under load, where it matters, it is. Requests often end before
their limit: what they are expected to make is the limit times the part of it that others have made lately.
"""

from __future__ import annotations

import math

RETRY_AFTER_S_MAX = 60
RETRY_AFTER_S_UNKNOWN = 5  # before there is a measured speed
_WINDOW_S = 10.0  # of work; what is older by that counts for 1/e
_KNOWN_AFTER_S = 1.0  # of work: before that the speed says little
_NEWEST_WEIGHS = 0.05  # in the part of their limits that requests make


class Pace:
    """Speed is measured while there is work only."""

    def __init__(self) -> None:
        self._tokens = 0.0  # lately, fading
        self._busy_s = 0.0  # in which these were computed
        self._seen_s: float | None = None  # up to when; None at rest
        self._part = 1.0

    def begin(self, now_s: float) -> None:
        """There is work from now on."""
        if self._seen_s is None:
            self._seen_s = now_s

    def worked(self, tokens: int, now_s: float) -> None:
        """So many tokens have been computed since."""
        if self._seen_s is None:
            return
        passed_s = max(0.0, now_s - self._seen_s)
        fade = math.exp(-passed_s / _WINDOW_S)
        self._tokens = self._tokens * fade + tokens
        self._busy_s = self._busy_s * fade + passed_s
        self._seen_s = now_s

    def rest(self) -> None:
        """There is no work from now on."""
        self._seen_s = None

    def ended(self, tokens: int, tokens_max: int) -> None:
        """A generation has made so many tokens of those it might have made."""
        self._part += _NEWEST_WEIGHS * (tokens / tokens_max - self._part)

    @property
    def tokens_per_s(self) -> float | None:
        """None as long as too little was seen."""
        return self._tokens / self._busy_s if self._busy_s >= _KNOWN_AFTER_S and self._tokens else None

    def takes_s(self, prompt_tokens: int, answer_tokens_max: int) -> float | None:
        """How long so much work will take, if that is known."""
        speed = self.tokens_per_s
        return None if speed is None else (prompt_tokens + self._part * answer_tokens_max) / speed


def retry_after_s(wait_s: float | None) -> int:
    """What a client that was refused is told: whole seconds, at least 1 and not so many that it gives up."""
    if wait_s is None:
        return RETRY_AFTER_S_UNKNOWN
    return min(max(math.ceil(wait_s), 1), RETRY_AFTER_S_MAX)
