"""Signals that wait until something short is finished."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_HELD = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Held:
    """The signal that came meanwhile, 0 if none did."""

    number: int = 0


@contextmanager
def held_signals(message: str) -> Iterator[Held]:
    """Keeps the first SIGINT or SIGTERM until the block has ended, and says `message` on standard error; a second one
    acts at once. For the main thread only, as signals are."""
    held = Held()

    def keep(number: int, _frame: FrameType | None) -> None:
        if held.number:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
            return
        held.number = number
        # a handler may run in the middle of a print, which must not be entered twice
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{message}\n".encode())

    before = {number: signal.getsignal(number) for number in _HELD}
    try:
        for number in _HELD:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, keep)
        yield held
    finally:
        for number in _HELD:
            signal.signal(number, before[number])
