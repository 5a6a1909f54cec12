"""The pattern of LIKE: % is any number of characters, _ exactly one, and a backslash before either takes it literally.

The parts between % have a fixed length each and are searched from left to right, so no pattern makes matching explode.
"""

from __future__ import annotations

import re

_PIECE = re.compile(r"\\[%_]|.", re.DOTALL)


class LikePattern:
    def __init__(self, pattern: str) -> None:
        first, *rest = _parts(pattern)
        self._first = re.compile(first[0], re.DOTALL)
        self._middle = [re.compile(source, re.DOTALL) for source, _ in rest[:-1]]
        self._last = re.compile(rest[-1][0], re.DOTALL) if rest else None
        self._last_length = rest[-1][1] if rest else 0

    def matches(self, text: str) -> bool:
        if self._last is None:
            return self._first.fullmatch(text) is not None
        start = self._first.match(text)
        if start is None:
            return False
        at = start.end()
        for part in self._middle:
            found = part.search(text, at)
            if found is None:
                return False
            at = found.end()
        tail = len(text) - self._last_length
        return tail >= at and self._last.fullmatch(text, tail) is not None


def _parts(pattern: str) -> list[tuple[str, int]]:
    """Regular expression and length of each part between the % signs."""
    parts: list[list[str]] = [[]]
    for piece in _PIECE.findall(pattern):
        if piece == "%":
            parts.append([])
        else:
            parts[-1].append("." if piece == "_" else re.escape(piece[-1]))
    return [("".join(part), len(part)) for part in parts]
