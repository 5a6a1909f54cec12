"""The journal gives back what was sent, whatever has been sent again since, within its budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.contract.frames import Frame
from functions.contract.messages import Opening, Slice, Step
from functions.contract.sampling import SamplingParams
from orchestrator.journal import Journal

STAGES = 3
WIDTH = 4
AMPLE = 1 << 30
OPENING = Opening(SamplingParams(), 1)


def row(stage: int, sequence: int, position: int, turn: int) -> list[float]:
    """The hidden state that one step (the `turn`th) sends for a token."""
    return [stage, sequence, position, turn]


def body(stage: int, slices: list[Slice], turn: int) -> bytes:
    rows = [row(stage, piece.sequence, at, turn) for piece in slices for at in range(piece.start, piece.end)]
    step = Step(
        tuple(slices),
        np.zeros(len(rows), dtype=np.int32),
        Frame.of(np.array(rows, dtype=np.float32)),
        {piece.sequence: OPENING for piece in slices if piece.start == 0},
    )
    return b"".join(step.to_body())


def send(journal: Journal, slices: list[Slice], turn: int = 0, stages: int = STAGES) -> None:
    """A step that gets as far as the last of `stages`."""
    page = journal.open(slices)
    for stage in range(1, stages):
        if page is not None:
            journal.keep(page, stage, body(stage, slices, turn))


def kept(journal: Journal, stage: int, sequence: int, start: int, end: int) -> list[list[float]] | None:
    frame = journal.rows(stage, sequence, start, end)
    return None if frame is None else frame.numpy().tolist()


def test_rows_come_back_by_stage_sequence_and_position() -> None:
    journal = Journal(STAGES, AMPLE)
    send(journal, [Slice(7, 0, 3), Slice(9, 0, 2)])
    send(journal, [Slice(9, 2, 1), Slice(7, 3, 1)], turn=1)
    assert kept(journal, 2, 7, 1, 4) == [row(2, 7, 1, 0), row(2, 7, 2, 0), row(2, 7, 3, 1)]
    assert kept(journal, 1, 9, 0, 3) == [row(1, 9, 0, 0), row(1, 9, 1, 0), row(1, 9, 2, 1)]


def test_rows_that_were_never_sent_are_not_made_up() -> None:
    journal = Journal(STAGES, AMPLE)
    send(journal, [Slice(7, 0, 3)], stages=2)
    assert kept(journal, 1, 7, 0, 3) is not None
    assert kept(journal, 2, 7, 0, 3) is None, "the step did not get that far"
    assert kept(journal, 1, 7, 0, 4) is None
    assert kept(journal, 1, 8, 0, 1) is None


def test_a_sequence_that_is_not_seen_from_its_start_is_not_kept() -> None:
    journal = Journal(STAGES, AMPLE)
    send(journal, [Slice(7, 5, 1)])
    assert kept(journal, 1, 7, 5, 6) is None
    assert journal.bytes == 0


@pytest.mark.parametrize("journal", [Journal(1, AMPLE), Journal(STAGES, 0)])
def test_nothing_is_kept_for_one_stage_or_without_a_budget(journal: Journal) -> None:
    assert journal.open([Slice(7, 0, 3)]) is None


def test_a_page_counts_until_the_last_of_its_sequences_has_left() -> None:
    journal = Journal(STAGES, AMPLE)
    send(journal, [Slice(7, 0, 30), Slice(9, 0, 2)])
    held = journal.bytes
    assert held > 2 * 32 * WIDTH * 4
    journal.forget([7])
    assert journal.bytes == held
    journal.forget([9, 9, 11])
    assert journal.bytes == 0


def test_what_belongs_to_nobody_goes_first_when_the_budget_is_used_up() -> None:
    journal = Journal(STAGES, 10_000)
    send(journal, [Slice(7, 0, 200), Slice(9, 0, 2)])
    journal.forget([7])
    send(journal, [Slice(8, 0, 200)])
    assert journal.bytes <= 10_000
    assert kept(journal, 1, 9, 0, 2) == [row(1, 9, 0, 0), row(1, 9, 1, 0)]
    assert kept(journal, 2, 8, 199, 200) == [row(2, 8, 199, 0)]


def test_the_longest_sequence_goes_when_all_is_needed() -> None:
    journal = Journal(STAGES, 10_000)
    send(journal, [Slice(7, 0, 150)])
    send(journal, [Slice(9, 0, 100)])
    assert journal.bytes > 0
    send(journal, [Slice(8, 0, 100)])
    assert journal.bytes <= 10_000
    assert kept(journal, 1, 7, 0, 1) is None
    assert kept(journal, 1, 9, 0, 100) is not None
    assert kept(journal, 1, 8, 0, 100) is not None
    send(journal, [Slice(7, 150, 1)], turn=1)
    assert kept(journal, 1, 7, 150, 151) is None, "it has no beginning any more"
    send(journal, [Slice(7, 0, 5)], turn=2)
    assert kept(journal, 1, 7, 0, 5) is not None


def test_one_step_over_the_whole_budget_is_not_kept() -> None:
    journal = Journal(STAGES, 1000)
    send(journal, [Slice(7, 0, 500)])
    assert journal.bytes == 0
    assert kept(journal, 1, 7, 0, 500) is None


@st.composite
def histories(draw: st.DrawFn) -> list[list[Slice] | int]:
    """Steps of three sequences that go on or start anew from somewhere before, and sequences that leave."""
    at = {1: 0, 2: 0, 3: 0}
    events: list[list[Slice] | int] = []
    for _ in range(draw(st.integers(1, 25))):
        if draw(st.integers(0, 9)) == 0:
            gone = draw(st.sampled_from(sorted(at)))
            at[gone] = 0
            events.append(gone)
            continue
        slices = []
        for sequence in draw(st.sets(st.sampled_from(sorted(at)), min_size=1)):
            start = at[sequence] if draw(st.integers(0, 3)) else draw(st.integers(0, at[sequence]))
            length = draw(st.sampled_from([1, 1, 2, 7]))
            slices.append(Slice(sequence, start, length))
            at[sequence] = start + length
        events.append(slices)
    return events


@given(histories(), st.sampled_from([AMPLE, 4000, 1500, 600]))
def test_it_gives_back_what_was_sent_last_or_nothing(history: list[list[Slice] | int], bytes_max: int) -> None:
    journal = Journal(STAGES, bytes_max)
    sent: dict[int, list[int]] = {}  # by sequence, the turn in which each position was sent last
    for turn, event in enumerate(history):
        if isinstance(event, int):
            journal.forget([event])
            sent.pop(event, None)
            continue
        send(journal, event, turn)
        for piece in event:
            turns = sent.setdefault(piece.sequence, [])
            turns[piece.start :] = [turn] * piece.length
        assert journal.bytes <= bytes_max
        for sequence, turns in sent.items():
            for stage in range(1, STAGES):
                for start in {0, len(turns) // 2, len(turns) - 1}:
                    found = kept(journal, stage, sequence, start, len(turns))
                    expected = [row(stage, sequence, at, turns[at]) for at in range(start, len(turns))]
                    assert found == expected or (found is None and bytes_max < AMPLE)
    journal.forget(list(sent))
    assert journal.bytes == 0
