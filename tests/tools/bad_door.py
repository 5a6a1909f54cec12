"""A door that does everything that none may do, one thing after another."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

from tools.fuzzing.door import Verdict, judged

CRASHES, HANGS, DIES, FAILS, TELLS = 3, 5, 7, 9, 11  # numbers of inputs


class BadDoor:
    name = "bad"

    def __init__(self) -> None:
        self._made = 0

    def make(self, random: Random) -> bytes:
        return random.randbytes(8)

    def take(self, data: bytes) -> Verdict:
        number, self._made = self._made, self._made + 1
        if data.startswith(b"number "):
            number = int(data[7:])
        if number == CRASHES:
            raise KeyError("what nobody has thought of")
        while number == HANGS:
            pass
        if number == DIES:
            os._exit(3)
        if number == FAILS:
            return judged(500, {}, b"internal error")
        if number == TELLS:
            return judged(400, {}, b'{"error": "Traceback (most recent call last):"}')
        return judged(400 if number % 2 else 200, {}, b"{}")

    def check(self) -> None: ...

    def close(self) -> None: ...


class CountedDoor(BadDoor):
    """Starts to count where the process has to go on after a hang or a death."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        count = Path(os.environ["BAD_DOOR_COUNT"])
        self._count = count
        self._made = int(count.read_text()) if count.exists() else 0

    def take(self, data: bytes) -> Verdict:
        self._count.write_text(str(self._made + 1))
        return super().take(data)


def open_bad(folder: Path) -> BadDoor:
    return CountedDoor(folder)
