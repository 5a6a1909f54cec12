"""What a door is to the fuzzer: it makes hostile inputs, takes them, and is checked for harm."""

from __future__ import annotations

import re
from collections.abc import Mapping
from random import Random
from typing import Literal, Protocol

Verdict = Literal["accepted", "refused"]

# how a trace of Python shows itself in a reply, also one that was put into JSON
_TRACE = re.compile(rb"Traceback \(most recent call last\)|File \\?\"[^\"\\]+\\?\", line \d+")


class Violation(Exception):
    """A door did what none may do: an error of the server (5xx), a trace in a reply, harm to others, a leak."""

    def __init__(self, kind: Literal["crash", "5xx", "harm"], message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Door(Protocol):
    """Something of the project that takes what others send. Built once, used by one thread, closed at the end."""

    def make(self, random: Random) -> bytes:
        """An input; the same for the same state of `random`."""
        ...

    def take(self, data: bytes) -> Verdict:
        """Gives the input to the door. Raises Violation; any other exception is a crash."""
        ...

    def check(self) -> None:
        """A good request gets its right answer, and nothing is held for those before it. Raises Violation."""
        ...

    def close(self) -> None: ...


def judged(status: int, headers: Mapping[str, str], body: bytes, *, allowed: frozenset[int] = frozenset()) -> Verdict:
    """The verdict on an HTTP reply. Header names are in lower case. Raises Violation.

    A door may say that it is busy or starting (503 with Retry-After); every other 5xx that is not in `allowed` is a
    fault of the server, which no input may cause."""
    expect_no_trace(body)
    if status >= 500 and status not in allowed and not (status == 503 and "retry-after" in headers):
        raise Violation("5xx", f"answered {status}: {body[:300]!r}")
    if status < 200:
        raise Violation("crash", f"answered status {status}")
    return "accepted" if status < 400 else "refused"


def expect_no_trace(reply: bytes) -> None:
    """Raises Violation."""
    if match := _TRACE.search(reply):
        raise Violation("crash", f"the reply shows a trace: {reply[max(0, match.start() - 80) : match.end() + 80]!r}")
