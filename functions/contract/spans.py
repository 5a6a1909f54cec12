"""Which blocks a stage runs."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TEXT = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True, slots=True)
class BlockSpan:
    """Blocks start <= i < end of a model (half-open, counted from 0)."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"a span needs 0 <= start < end, got {self.start}:{self.end}")

    @classmethod
    def parse(cls, text: str) -> BlockSpan:
        """'4:8' -> blocks 4, 5, 6 and 7. Raises ValueError with what is allowed."""
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"a span is written START:END (half-open), such as 0:6; got {text[:80]!r}")
        return cls(int(match[1]), int(match[2]))

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, block: int) -> bool:
        return self.start <= block < self.end

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"
