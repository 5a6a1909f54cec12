"""Steps that give a stage again what it has lost of its sequences, and nothing else. No I/O and no clock.

They ask for no samples, and what the stage answers to them is of no use to anybody.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np

from functions.contract.frames import Frame
from functions.contract.messages import Slice, Step
from orchestrator.journal import cut
from orchestrator.lanes import Sequence


@dataclass(frozen=True, slots=True)
class Gap:
    """Positions of a sequence that a stage lacks, start <= position < end, and the hidden states [end - start, hidden
    size] that it was sent there; None for the first stage, which takes tokens only."""

    sequence: Sequence
    start: int
    end: int
    hidden: Frame | None = None

    def until(self, end: int) -> Gap:
        return Gap(self.sequence, self.start, end, self.hidden and cut(self.hidden, 0, end - self.start))

    def after(self, start: int) -> Gap:
        hidden = self.hidden and cut(self.hidden, start - self.start, self.end - self.start)
        return Gap(self.sequence, start, self.end, hidden)


def refill_steps(gaps: Items[Gap], tokens_max: int) -> Iterator[Step]:
    """The steps that fill these gaps, of `tokens_max` tokens at the most, the next parts of several sequences in
    each."""
    left = list(gaps)
    while left:
        parts, later, room = [], [], tokens_max
        for gap in left:
            end = min(gap.end, gap.start + room)
            room -= end - gap.start
            if end > gap.start:
                parts.append(gap.until(end))
            if end < gap.end:
                later.append(gap.after(end))
        left = later
        yield _step(parts)


def _step(gaps: Items[Gap]) -> Step:
    slices = tuple(Slice(gap.sequence.id, gap.start, gap.end - gap.start, sample=False) for gap in gaps)
    tokens = [token for gap in gaps for token in gap.sequence.history[gap.start : gap.end]]
    openings = {gap.sequence.id: gap.sequence.opening for gap in gaps if gap.start == 0}
    return Step(slices, np.array(tokens, dtype=np.int32), _joined([gap.hidden for gap in gaps if gap.hidden]), openings)


def _joined(frames: Items[Frame]) -> Frame | None:
    if not frames:
        return None
    rows = sum(frame.shape[0] for frame in frames)
    return Frame(frames[0].dtype, (rows, frames[0].shape[1]), b"".join(frame.data for frame in frames))
