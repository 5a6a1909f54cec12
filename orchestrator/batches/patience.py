"""How long to wait before something is tried again: overload, a full disk, a lost connection."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 30.0
RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504, 507))

Tell = Callable[[str], None]


class Patience:
    """One for a server, shared by all who ask it: when it has no time for one, the others wait as well."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._told = ""
        self._failures = 0
        self._not_before_s = 0.0

    async def ready(self) -> None:
        """Returns when it may be tried."""
        clock = asyncio.get_running_loop().time
        while (wait_s := self._not_before_s - clock()) > 0:  # noqa: ASYNC110  a point in time that moves, no event
            await asyncio.sleep(wait_s)

    def worked(self) -> None:
        self._failures = 0
        if self._told:
            self._told = ""
            self._tell("going on")

    def failed(self, why: str, retry_after: str | None = None) -> None:
        """`retry_after` is the header of the answer, if there was one. The reason is told once."""
        wait_s = retry_after_s(retry_after)
        if wait_s is None:
            wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(self._failures, 16)) * random.uniform(0.5, 1.0)
            self._failures += 1
        now_s = asyncio.get_running_loop().time()
        self._not_before_s = max(self._not_before_s, now_s + min(max(wait_s, FIRST_WAIT_S / 2), LONGEST_WAIT_S))
        if why != self._told:
            self._told = why
            self._tell(f"{why}; trying again")


def retry_after_s(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3); None if it says nothing that can be used."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
